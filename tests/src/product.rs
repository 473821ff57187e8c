//! The product's own program inside a node.

use std::ffi::OsStr;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::Signal;

use crate::{Node, Outcome, Running};

/// Where the program is: `SPOKEGUARD_BIN`, else beside or above this program in cargo's target folder.
pub fn spokeguard() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os("SPOKEGUARD_BIN") {
        let path = PathBuf::from(path);
        ensure!(path.is_file(), "SPOKEGUARD_BIN names {}, which is not a file", path.display());
        return Ok(path);
    }
    let me = std::env::current_exe().context("find this program")?;
    let folders = me.ancestors().skip(1).take(2);
    folders
        .map(|folder| folder.join("spokeguard"))
        .find(|path| path.is_file())
        .with_context(|| format!("no spokeguard near {}: cargo build -p spokeguard", me.display()))
}

/// A running `spokeguard run` that has said it is ready.
pub struct Daemon {
    pub running: Running,
    pub policy: PathBuf,
    /// The flags that make another command speak to this instance.
    pub flags: Vec<String>,
    pub state_dir: PathBuf,
    pub run_dir: PathBuf,
    pub started_in: Duration,
}

impl Node {
    /// Runs the program to its end, whatever its exit code.
    pub fn spokeguard<A: AsRef<OsStr>>(&self, arguments: &[A]) -> Result<Outcome> {
        self.run(&words(arguments)?)
    }

    /// Starts the daemon with folders of its own, and waits until it says READY=1 to sd_notify.
    pub fn daemon(&self, policy: &str) -> Result<Daemon> {
        self.daemon_with(policy, &[])
    }

    pub fn daemon_with(&self, policy: &str, more: &[&str]) -> Result<Daemon> {
        let folder = tempfile::Builder::new()
            .prefix(&format!("{}-guard-", self.name))
            .tempdir_in(&self.dir)
            .context("create a folder for the daemon")?
            .keep();
        let file = folder.join("policy.toml");
        std::fs::write(&file, policy).with_context(|| format!("write {}", file.display()))?;
        self.daemon_in(&folder, more)
    }

    /// Starts the daemon on a folder that an earlier one left: the same policy, state and pins.
    pub fn daemon_in(&self, folder: &Path, more: &[&str]) -> Result<Daemon> {
        self.daemon_under(&[], folder, more)
    }

    /// The same below a command that changes what it finds and then becomes it, such as setpriv.
    pub fn daemon_under(&self, wrapper: &[&str], folder: &Path, more: &[&str]) -> Result<Daemon> {
        let daemon = self.daemon_on_trial(wrapper, folder, more)?;
        // As its operator would, so that its rules outlive the test; where there is nothing to confirm,
        // or no way to record it, that is the test's business.
        let confirmed = self.spokeguard(&daemon.arguments(&["confirm", "--format", "json"]))?;
        // The daemon follows a moment later; only then are binds refused, too.
        if confirmed.code == Some(0) && confirmed.json()?["result"] == "confirmed" {
            crate::wait_until(
                Duration::from_secs(10),
                "the daemon knows that its rules are confirmed",
                || {
                    let status = self.spokeguard(&daemon.arguments(&["status", "--format", "json"])).ok()?;
                    (status.json().ok()?["daemon"]["rules"] != "on-trial").then_some(())
                },
            )?;
        }
        Ok(daemon)
    }

    /// The same, with the rules that it brought in unconfirmed.
    pub fn daemon_on_trial(&self, wrapper: &[&str], folder: &Path, more: &[&str]) -> Result<Daemon> {
        let policy = folder.join("policy.toml");
        let (state_dir, run_dir) = (folder.join("state"), folder.join("run"));
        let flags: Vec<String> = [
            ("--policy", policy.display().to_string()),
            ("--state-dir", state_dir.display().to_string()),
            ("--run-dir", run_dir.display().to_string()),
            // The node has a bpffs of its own, so the default would do as well; this says it.
            ("--pin-dir", "/sys/fs/bpf/spokeguard".to_string()),
        ]
        .into_iter()
        .flat_map(|(flag, value)| [flag.to_string(), value])
        .collect();
        let notify = folder.join("notify");
        // A daemon that is started again finds the socket of the last one.
        let _ = std::fs::remove_file(&notify);
        let socket = UnixDatagram::bind(&notify).with_context(|| format!("bind {}", notify.display()))?;
        let arguments: Vec<&str> =
            ["run"].into_iter().chain(flags.iter().map(String::as_str)).chain(more.iter().copied()).collect();
        let wrapped = wrapper.iter().map(std::ffi::OsString::from).chain(words(&arguments)?);
        let mut command = self.command(&wrapped.collect::<Vec<_>>());
        command.env("NOTIFY_SOCKET", &notify);
        let started = Instant::now();
        let mut running = self.start(command, &format!("spokeguard run in {}", self.name))?;
        await_ready(&socket, &mut running)?;
        Ok(Daemon { running, policy, flags, state_dir, run_dir, started_in: started.elapsed() })
    }
}

impl Daemon {
    /// The flags in front of which a verb goes: `node.spokeguard(&daemon.arguments(&["status"]))`.
    pub fn arguments(&self, verb: &[&str]) -> Vec<String> {
        verb.iter().map(|word| word.to_string()).chain(self.flags.iter().cloned()).collect()
    }

    pub fn folder(&self) -> &Path {
        self.policy.parent().unwrap_or(Path::new("/"))
    }

    /// As a crash would: no chance to say or to clean up anything.
    pub fn kill_9(&mut self) -> Result<()> {
        self.running.signal(Signal::KILL)?;
        self.running.wait(Duration::from_secs(5)).map(|_| ())
    }
}

fn words<A: AsRef<OsStr>>(arguments: &[A]) -> Result<Vec<std::ffi::OsString>> {
    let program = spokeguard()?.into_os_string();
    Ok(std::iter::once(program).chain(arguments.iter().map(|word| word.as_ref().to_os_string())).collect())
}

/// A loader takes a second of a core, and a busy machine has little left of its cores.
const READY: Duration = Duration::from_secs(60);

fn await_ready(socket: &UnixDatagram, running: &mut Running) -> Result<()> {
    let deadline = Instant::now() + READY;
    socket.set_read_timeout(Some(Duration::from_millis(50)))?;
    let mut message = [0u8; 4096];
    loop {
        if let Ok(length) = socket.recv(&mut message) {
            if String::from_utf8_lossy(&message[..length]).lines().any(|line| line == "READY=1") {
                return Ok(());
            }
        } else if running.has_ended() {
            bail!("the daemon ended before it was ready\n{}", running.log());
        }
        ensure!(Instant::now() < deadline, "the daemon was not ready within {READY:?}\n{}", running.log());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn running(folder: &Path, program: &str, argument: &str) -> Running {
        let mut command = std::process::Command::new(program);
        command.arg(argument);
        Running::start(command, folder.join("log"), program.to_string()).unwrap()
    }

    #[test]
    fn ready_is_a_line_of_its_own_and_an_early_end_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("notify");
        let socket = UnixDatagram::bind(&path).unwrap();
        let daemon = UnixDatagram::unbound().unwrap();
        let mut waiting = running(folder.path(), "sleep", "60");
        for message in ["STATUS=not READY=1", "STATUS=looking\nREADY=1\n"] {
            daemon.send_to(message.as_bytes(), &path).unwrap();
        }
        await_ready(&socket, &mut waiting).unwrap();
        let left = socket.set_nonblocking(true).and_then(|()| socket.recv(&mut [0u8; 64]));
        assert!(left.is_err(), "the first message was not enough");
        socket.set_nonblocking(false).unwrap();
        let error =
            await_ready(&socket, &mut running(folder.path(), "ls", "/no/such/file")).unwrap_err().to_string();
        assert!(
            error.starts_with("the daemon ended before it was ready\n") && error.contains("No such file"),
            "{error}"
        );
    }
}
