//! What systemd is told: readiness, a status line, signs of life. Without NOTIFY_SOCKET
//! every call does nothing.

use std::time::Duration;

use sd_notify::NotifyState;

use crate::terms::printable;

const STATUS_MAX: usize = 256;

/// The first cycle is done and the listeners are up.
pub fn ready() {
    tell(&[NotifyState::Ready]);
}

/// The line that `systemctl status` shows. Texts of findings end up in it, so it is made
/// harmless first: a line break would begin another assignment of the protocol.
pub fn status(text: &str) {
    tell(&[NotifyState::Status(&printable(text, STATUS_MAX))]);
}

/// A sign of life, due every [`watchdog_interval`].
pub fn alive() {
    tell(&[NotifyState::Watchdog]);
}

/// A reload begins; [`ready`] ends it. systemd (253, `Type=notify-reload`) waits for that and
/// tells it from an earlier one by the time.
pub fn reloading() {
    match NotifyState::monotonic_usec_now() {
        Ok(now) => tell(&[NotifyState::Reloading, now]),
        Err(error) => log::debug!("notify the service manager: {error}"),
    }
}

pub fn stopping() {
    tell(&[NotifyState::Stopping]);
}

/// How often [`alive`] is due: half of what systemd allows. `None`: nobody watches us.
pub fn watchdog_interval() -> Option<Duration> {
    sd_notify::watchdog_enabled().map(|limit| limit / 2).filter(|interval| !interval.is_zero())
}

/// A service manager that doesn't listen is no reason to stop guarding.
fn tell(state: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        log::debug!("notify the service manager: {error}");
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixDatagram;
    use std::process::Command;

    use super::*;

    const CHILD: &str = "SPOKEGUARD_TEST_NOTIFY";

    /// Environment variables belong to the whole process, so the talking is done by a child.
    fn in_a_child(name: &str, environment: &[(&str, &str)]) {
        let out = Command::new(std::env::current_exe().expect("the test binary"))
            .args(["--exact", &format!("daemon::notify::tests::{name}"), "--nocapture"])
            .env_remove("NOTIFY_SOCKET")
            .env_remove("WATCHDOG_PID")
            .env(CHILD, "1")
            .envs(environment.iter().copied())
            .output()
            .expect("run the child");
        let said = String::from_utf8_lossy(&out.stdout).into_owned();
        assert!(out.status.success() && said.contains("1 passed"), "{said}");
    }

    #[test]
    fn systemd_hears_what_it_is_told() {
        if std::env::var_os(CHILD).is_some() {
            assert_eq!(watchdog_interval(), Some(Duration::from_secs(15)));
            ready();
            status("ok\nMAINPID=1");
            status(&"long ".repeat(1000));
            alive();
            return stopping();
        }
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("notify");
        let socket = UnixDatagram::bind(&path).expect("bind");
        socket.set_read_timeout(Some(Duration::from_secs(10))).expect("a timeout");
        let path = path.to_str().expect("a path");
        in_a_child(
            "systemd_hears_what_it_is_told",
            &[("NOTIFY_SOCKET", path), ("WATCHDOG_USEC", "30000000")],
        );
        let hear = || {
            let mut buffer = [0; 4096];
            let n = socket.recv(&mut buffer).expect("a message");
            String::from_utf8(buffer[..n].to_vec()).expect("text")
        };
        assert_eq!(hear(), "READY=1\n");
        assert_eq!(hear(), "STATUS=ok\u{fffd}MAINPID=1\n");
        assert_eq!(hear().chars().count(), "STATUS=\n".len() + STATUS_MAX);
        assert_eq!(hear(), "WATCHDOG=1\n");
        assert_eq!(hear(), "STOPPING=1\n");
    }

    #[test]
    fn without_a_service_manager_nothing_happens() {
        if std::env::var_os(CHILD).is_some() {
            assert_eq!(watchdog_interval(), None);
            ready();
            return status("nobody hears this");
        }
        in_a_child("without_a_service_manager_nothing_happens", &[("WATCHDOG_USEC", "0")]);
        // A socket that is gone is survived as well.
        let gone = [("NOTIFY_SOCKET", "/nonexistent/notify"), ("WATCHDOG_USEC", "many")];
        in_a_child("without_a_service_manager_nothing_happens", &gone);
    }
}
