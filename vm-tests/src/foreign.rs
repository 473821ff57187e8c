//! Programs of another architecture, run here by an emulator of theirs: in a user namespace with a binfmt_misc of its
//! own, so that this machine itself runs nothing that it did not run before.

use std::ffi::OsStr;
use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::packages::Arch;

/// How Debian's binfmt-support knows them: the head of an ELF file, and what of it counts.
const AARCH64: &str = r":aarch64:M::\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\xb7\x00:\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff\xff:/usr/bin/qemu-aarch64-static:OCF";
/// Of the interpreter that was opened at registration: nobody needs it within a changed root.
const INSIDE: &str = r#"read -r _ || true
mount -t binfmt_misc binfmt_misc /proc/sys/fs/binfmt_misc
printf %s "$1" >/proc/sys/fs/binfmt_misc/register
shift
exec "$@""#;

/// Runs a command to its end where programs of `arch` can be run.
pub(crate) fn done<S: AsRef<OsStr>>(arch: Arch, words: &[S]) -> Result<()> {
    let [program, arguments @ ..] = words else { bail!("no command") };
    let shown = program.as_ref().to_string_lossy().into_owned();
    let child = if arch == Arch::HOST {
        Command::new(program)
            .args(arguments)
            .env("LC_ALL", "C")
            .stdin(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
    } else {
        ensure!(arch == Arch::Arm64, "programs for {} are not run on {}", arch.name(), Arch::HOST.name());
        let emulator = Path::new("/usr/bin/qemu-aarch64-static");
        ensure!(emulator.exists(), "no {}: apt-get install qemu-user-static", emulator.display());
        let mut command = Command::new("unshare");
        command.args(["--user", "--mount", "--propagation", "private", "sh", "-ec", INSIDE, "sh", AARCH64]);
        command.args(words).env("LC_ALL", "C").stdin(Stdio::piped()).stderr(Stdio::piped()).spawn()
    };
    let mut child = child.with_context(|| format!("start {shown} (is it installed?)"))?;
    if arch != Arch::HOST
        && let Err(error) = everybody_as_here(&child)
    {
        child.kill().and_then(|()| child.wait()).context("end a namespace")?;
        return Err(error);
    }
    // Its input ends here, which lets the namespace go on.
    let output = child.wait_with_output().with_context(|| format!("wait for {shown}"))?;
    let errors = String::from_utf8_lossy(&output.stderr);
    let hint = if arch == Arch::HOST { "" } else { " (binfmt_misc in a user namespace is Linux 6.7's)" };
    ensure!(output.status.success(), "`{shown}`: {}{hint}\n{}", output.status, errors.trim_end());
    Ok(())
}

/// Every user of the namespace is the same user outside: what is installed belongs to whom it should.
fn everybody_as_here(child: &Child) -> Result<()> {
    let own = fs::read_link("/proc/self/ns/user").context("read our user namespace")?;
    let folder = Path::new("/proc").join(child.id().to_string());
    let begun = Instant::now();
    loop {
        let theirs = fs::read_link(folder.join("ns/user")).context("read a new user namespace")?;
        if theirs != own {
            break;
        }
        ensure!(begun.elapsed() < Duration::from_secs(10), "no user namespace could be made");
        std::thread::sleep(Duration::from_millis(5));
    }
    for map in ["uid_map", "gid_map"] {
        fs::write(folder.join(map), "0 0 4294967295").with_context(|| format!("write its {map}"))?;
    }
    Ok(())
}
