//! Programs of another architecture, run here by an emulator of theirs: in a user namespace with a binfmt_misc of its
//! own, so that this machine itself runs nothing that it did not run before.

use std::ffi::OsStr;
use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::packages::{Arch, said};

const EMULATOR: &str = "/usr/bin/qemu-aarch64-static";
/// How Debian's binfmt-support knows them: the head of an ELF file, and what of it counts.
const AARCH64: &str = concat!(
    r":aarch64:M::\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\xb7\x00",
    r":\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff\xff"
);
/// Waits for its users, then does the rest. The emulator is opened at registration (`F`): a changed root has none.
const INSIDE: &str = r#"read -r _ || true
mount -t binfmt_misc binfmt_misc /proc/sys/fs/binfmt_misc
printf %s "$1" >/proc/sys/fs/binfmt_misc/register
shift
exec "$@""#;

/// Runs a command to its end where programs of `arch` can be run.
pub(crate) fn done<S: AsRef<OsStr>>(arch: Arch, words: &[S]) -> Result<()> {
    let [program, arguments @ ..] = words else { bail!("no command") };
    if arch == Arch::HOST {
        return said(Command::new(program).args(arguments)).map(drop);
    }
    ensure!(arch == Arch::Arm64, "programs for {} are not run on {}", arch.name(), Arch::HOST.name());
    ensure!(Path::new(EMULATOR).exists(), "no {EMULATOR}: apt-get install qemu-user-static");
    let mut command = Command::new("unshare");
    command.args(["--user", "--mount", "--propagation", "private", "sh", "-ec", INSIDE, "sh"]);
    command.arg(format!("{AARCH64}:{EMULATOR}:OCF")).args(words).env("LC_ALL", "C");
    let child = command.stdin(Stdio::piped()).stderr(Stdio::piped()).spawn();
    let mut child = child.context("start unshare (apt-get install util-linux)")?;
    if let Err(error) = everybody_as_here(&child) {
        child.kill().and_then(|()| child.wait()).context("end a namespace")?;
        return Err(error);
    }
    // Its input ends here, which lets the namespace go on.
    let shown = program.as_ref().to_string_lossy();
    let output = child.wait_with_output().with_context(|| format!("wait for {shown}"))?;
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.success(),
        "`{shown}` for {}: {} (binfmt_misc in a user namespace is Linux 6.7's)\n{}",
        arch.name(),
        output.status,
        errors.trim_end()
    );
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
