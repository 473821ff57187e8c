//! Programs that were started and may take too long.

use std::io;
use std::os::fd::OwnedFd;
use std::process::{Child, ExitStatus};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

/// Readable once it has ended (Linux 5.3).
pub fn exit_of(child: &Child) -> io::Result<OwnedFd> {
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw).ok_or(rustix::io::Errno::SRCH)?;
    Ok(pidfd_open(pid, PidfdFlags::empty())?)
}

/// How it ended; `None`: not by then, and it is still to be killed and waited for.
pub fn ended_within(child: &mut Child, limit: Duration) -> io::Result<Option<ExitStatus>> {
    let (exit, deadline) = (exit_of(child)?, Instant::now() + limit);
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = Timespec {
            tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: left.subsec_nanos().into(),
        };
        match poll(&mut [PollFd::new(&exit, PollFlags::IN)], Some(&timeout)) {
            Ok(0) => return Ok(None),
            Ok(_) => return child.wait().map(Some),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn what_ends_says_how_and_what_does_not_is_not_waited_for() {
        let mut ends = Command::new("sh").args(["-c", "exit 3"]).spawn().unwrap();
        let status = ended_within(&mut ends, Duration::from_secs(20)).unwrap();
        assert_eq!(status.and_then(|status| status.code()), Some(3));
        let mut hangs = Command::new("sleep").arg("1000").spawn().unwrap();
        assert_eq!(ended_within(&mut hangs, Duration::from_millis(20)).unwrap(), None);
        hangs.kill().unwrap();
        assert_eq!(ended_within(&mut hangs, Duration::from_secs(20)).unwrap().unwrap().code(), None);
    }
}
