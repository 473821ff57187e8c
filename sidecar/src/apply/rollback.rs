//! Commit-confirm: before rules change, the way back is armed outside our process, and
//! only a confirmation disarms it. `kill -9` of everything of ours does not.
//!
//! The watchdog is a shell of its own process group that sleeps and then runs `nft -f` on a
//! file that holds the rules as they were. Whoever renames the armed file first has won, so
//! a confirmation and the watchdog can't both act.

use std::fs;
use std::io::Write;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::Context;

const RULES: &str = "rollback.nft";
const ARMED: &str = "rollback.armed";
const FIRED: &str = "rollback.fired";
/// What the armed file is called while the old rules are put back.
const FIRING: &str = "rollback.fired.now";

/// How an armed rollback ended, or that it has not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Nothing is armed and nothing fired.
    Idle,
    Armed,
    /// Time ran out, and the rules went back to what they were.
    Fired,
}

/// The script gets: seconds, armed file, fired file, rules, nft. SIGHUP, SIGINT and SIGTERM
/// are ignored, since a closed session must not cancel the way back. It has fired when the
/// old rules are back, and not before: until then, and if nft fails, it counts as armed.
const SCRIPT: &str = r#"trap "" HUP INT TERM
sleep "$1"
mv "$2" "$3.now" 2>/dev/null || exit 0
"$5" -f "$4" && mv "$3.now" "$3"
"#;

/// Arms the way back to `previous` (our table as `nft list table` prints it; `None`: there
/// was none). An armed rollback keeps its older target, which is the last confirmed one.
pub fn arm(run: &Path, previous: Option<&str>, within: Duration, nft: &Path) -> anyhow::Result<()> {
    fs::create_dir_all(run).with_context(|| format!("create {}", run.display()))?;
    let meta = fs::metadata(run).with_context(|| format!("look at {}", run.display()))?;
    // Who can write here can choose what root's nft will be given.
    anyhow::ensure!(
        meta.mode() & 0o022 == 0,
        "{} can be written by others (mode {:04o}): the way back is not safe there; use a --run-dir of root's",
        run.display(),
        meta.mode() & 0o7777
    );
    let rules = run.join(RULES);
    // A second apply inside the window: its watchdog replaces the first one's, whose armed
    // file is gone, and the target stays what it was.
    let armed_before = fs::remove_file(armed(run)?.unwrap_or_else(|| run.join(ARMED))).is_ok();
    if !armed_before || !rules.exists() {
        write_private(&rules, &way_back(previous))?;
    }
    for ended in [FIRED, FIRING] {
        let _ = fs::remove_file(run.join(ended));
    }
    let token = run.join(format!("{ARMED}.{}", std::process::id()));
    write_private(&token, "")?;
    let mut command = Command::new("/bin/sh");
    command
        .args(["-c", SCRIPT, "spokeguard-rollback"])
        .arg(within.as_secs().max(1).to_string())
        .args([&token, &run.join(FIRED), &rules])
        .arg(nft)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .current_dir("/")
        .process_group(0);
    let spawned = command.spawn().context("start the rollback's watchdog (/bin/sh)");
    if spawned.is_err() {
        let _ = fs::remove_file(&token);
    }
    spawned.map(drop)
}

/// Confirms: the rules in force stay. `false`: nothing was armed.
pub fn confirm(run: &Path) -> anyhow::Result<bool> {
    let Some(token) = armed(run)? else { return Ok(false) };
    match fs::remove_file(&token) {
        Ok(()) => {
            let _ = fs::remove_file(run.join(RULES));
            Ok(true)
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error).with_context(|| format!("remove {}", token.display())),
    }
}

pub fn state(run: &Path) -> anyhow::Result<State> {
    Ok(match armed(run)? {
        Some(_) => State::Armed,
        None if run.join(FIRING).exists() => State::Armed,
        None if run.join(FIRED).exists() => State::Fired,
        None => State::Idle,
    })
}

fn armed(run: &Path) -> anyhow::Result<Option<PathBuf>> {
    let entries = match fs::read_dir(run) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error).with_context(|| format!("read {}", run.display())),
    };
    for entry in entries {
        let entry = entry.with_context(|| format!("read {}", run.display()))?;
        if entry.file_name().to_string_lossy().starts_with(&format!("{ARMED}.")) {
            return Ok(Some(entry.path()));
        }
    }
    Ok(None)
}

/// The table as it was, in one transaction. Here the table is deleted and made again: its
/// chains may differ from the new ones in hook or priority, and the listing carries the
/// counters' amounts.
fn way_back(previous: Option<&str>) -> String {
    let table = crate::desired::TABLE;
    format!("table inet {table} {{\n}}\ndelete table inet {table}\n{}", previous.unwrap_or_default())
}

fn write_private(path: &Path, text: &str) -> anyhow::Result<()> {
    let name = || format!("write {}", path.display());
    // Always a file of our own making: what is there may be a link, or open to others.
    match fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error).with_context(name),
        _ => {}
    }
    let mut file =
        fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).with_context(name)?;
    file.write_all(text.as_bytes()).with_context(name)?;
    file.sync_all().with_context(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Stands for nft: appends the file it is given to `log`.
    fn fake_nft(dir: &Path) -> PathBuf {
        use std::os::unix::fs::PermissionsExt;
        let path = dir.join("nft");
        fs::write(&path, format!("#!/bin/sh\ncat \"$2\" >> {}/log\n", dir.display())).expect("write");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("chmod");
        path
    }

    fn wait_for(mut done: impl FnMut() -> bool) -> bool {
        let deadline = std::time::Instant::now() + Duration::from_secs(10);
        while std::time::Instant::now() < deadline {
            if done() {
                return true;
            }
            std::thread::yield_now();
        }
        false
    }

    #[test]
    fn without_a_confirmation_the_old_rules_come_back() {
        let dir = tempfile::tempdir().expect("a directory");
        let nft = fake_nft(dir.path());
        arm(dir.path(), Some("table inet spokeguard {\n}\n"), Duration::from_secs(1), &nft).expect("armed");
        assert_eq!(state(dir.path()).expect("state"), State::Armed);
        assert!(wait_for(|| state(dir.path()).is_ok_and(|s| s == State::Fired)));
        assert!(wait_for(
            || fs::read_to_string(dir.path().join("log")).is_ok_and(|t| t.contains("delete table"))
        ));
        assert!(!confirm(dir.path()).expect("too late"), "a fired rollback can't be confirmed");
    }

    #[test]
    fn a_confirmation_disarms_it() {
        let dir = tempfile::tempdir().expect("a directory");
        let nft = fake_nft(dir.path());
        arm(dir.path(), None, Duration::from_secs(1), &nft).expect("armed");
        assert!(confirm(dir.path()).expect("confirmed"));
        assert_eq!(state(dir.path()).expect("state"), State::Idle);
        assert!(!confirm(dir.path()).expect("again"));
        let later = std::time::Instant::now() + Duration::from_millis(1500);
        wait_for(|| std::time::Instant::now() > later);
        assert!(!dir.path().join("log").exists(), "the watchdog ran nft after a confirmation");
    }

    #[test]
    fn what_others_can_write_is_not_given_to_nft() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().expect("a directory");
        let nft = fake_nft(dir.path());
        let victim = dir.path().join("victim");
        fs::write(&victim, "precious").expect("write");
        let run = dir.path().join("run");
        fs::create_dir(&run).expect("create");
        std::os::unix::fs::symlink(&victim, run.join(RULES)).expect("link");
        fs::set_permissions(&run, fs::Permissions::from_mode(0o1777)).expect("chmod");
        let error = arm(&run, None, Duration::from_secs(60), &nft).expect_err("anyone may write there");
        assert!(error.to_string().contains("mode 1777"), "{error:#}");
        assert_eq!(state(&run).expect("state"), State::Idle);
        fs::set_permissions(&run, fs::Permissions::from_mode(0o755)).expect("chmod");
        arm(&run, None, Duration::from_secs(60), &nft).expect("armed");
        assert_eq!(fs::read_to_string(&victim).expect("read"), "precious", "wrote through a link");
        assert!(confirm(&run).expect("confirmed"));
    }

    #[test]
    fn a_second_apply_keeps_the_first_way_back() {
        let dir = tempfile::tempdir().expect("a directory");
        let nft = fake_nft(dir.path());
        arm(dir.path(), Some("first"), Duration::from_secs(60), &nft).expect("armed");
        arm(dir.path(), Some("second"), Duration::from_secs(60), &nft).expect("armed again");
        let rules = fs::read_to_string(dir.path().join(RULES)).expect("rules");
        assert!(rules.ends_with("first"), "{rules}");
        assert!(confirm(dir.path()).expect("confirmed"));
    }
}
