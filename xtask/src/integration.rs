//! The integration tests: real tools in network namespaces, on a machine that may be busy with other work.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

/// With more failures than these it is the code and not the machine.
const ASKED_AGAIN: usize = 3;

/// Runs them all; `command` starts `cargo test ... --test all`. A few that fail get one more try by themselves,
/// since nmap, sshd and timers depend on what else the machine does. Gives those that only passed then: they are
/// to be named, for a test that fails now and then is a fault somewhere.
pub fn run(command: impl Fn() -> Command) -> Result<BTreeSet<String>> {
    // They wait more than they compute.
    let threads = std::thread::available_parallelism().map_or(2, |cores| (cores.get() * 2).min(8));
    let (passed, failed) = attempt(command().arg("--").arg(format!("--test-threads={threads}")))?;
    if passed {
        return Ok(BTreeSet::new());
    }
    ensure!(!failed.is_empty(), "the tests did not run to their end");
    ensure!(failed.len() <= ASKED_AGAIN, "{} tests failed", failed.len());
    println!("\n{} failed; once more, one at a time: {}", failed.len(), list(&failed));
    let (passed, still) = attempt(command().args(["--", "--exact", "--test-threads=1"]).args(&failed))?;
    ensure!(passed, "failed twice: {}", list(if still.is_empty() { &failed } else { &still }));
    Ok(failed)
}

pub fn list(names: &BTreeSet<String>) -> String {
    names.iter().map(String::as_str).collect::<Vec<_>>().join(", ")
}

/// Shows the output as it comes. `true`: all passed; the names: what failed.
fn attempt(command: &mut Command) -> Result<(bool, BTreeSet<String>)> {
    let shown = super::shown(command);
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("start `{shown}`"))?;
    let output = BufReader::new(child.stdout.take().context("a pipe that was asked for")?);
    let mut failed = BTreeSet::new();
    for line in output.split(b'\n') {
        let line = line.with_context(|| format!("read what `{shown}` prints"))?;
        let line = String::from_utf8_lossy(&line);
        failed.extend(failure(&line).map(str::to_owned));
        println!("{line}");
    }
    let status = child.wait().with_context(|| format!("wait for `{shown}`"))?;
    Ok((status.success(), failed))
}

/// The name in `test NAME ... FAILED`.
fn failure(line: &str) -> Option<&str> {
    line.strip_prefix("test ")?.strip_suffix(" ... FAILED")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn script(text: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", text]);
        command
    }

    #[test]
    fn a_failure_is_asked_again_and_named() {
        let folder = std::env::temp_dir().join(format!("sg-xtask-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let mark = folder.join("seen");
        let once = format!(
            "test -e {0} && exit 0; touch {0}; echo 'test a::b ... ok'; echo 'test a::c ... FAILED'; exit 101",
            mark.display()
        );
        let flaky = run(|| script(&once)).unwrap();
        assert_eq!(flaky, BTreeSet::from(["a::c".to_string()]));
        assert!(run(|| script(&once)).unwrap().is_empty());
        std::fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn what_fails_twice_or_in_numbers_or_without_a_name_has_failed() {
        for (text, says) in [
            ("echo 'test a::c ... FAILED'; exit 101", "failed twice: a::c"),
            ("for i in 1 2 3 4; do echo \"test t$i ... FAILED\"; done; exit 101", "4 tests failed"),
            ("echo 'error: could not compile'; exit 101", "did not run to their end"),
        ] {
            let error = run(|| script(text)).unwrap_err();
            assert!(format!("{error:#}").contains(says), "{error:#}");
        }
    }
}
