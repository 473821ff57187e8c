//! The two clocks: the wall's for reports, and one that only goes forward for waiting.

use std::fs;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use rustix::time::ClockId;

use crate::terms::Stamp;

pub fn now() -> Stamp {
    Stamp(jiff::Timestamp::now())
}

/// How long ago the machine started, time asleep included: the clock that eBPF programs write
/// down, who know the first time namespace only.
pub fn since_boot() -> Duration {
    machine(ClockId::Boottime, "boottime")
}

/// The same in nanoseconds.
pub fn since_boot_ns() -> u64 {
    u64::try_from(since_boot().as_nanos()).unwrap_or(u64::MAX)
}

/// The same without time asleep: the same for all processes, never set back.
pub fn monotonic() -> Duration {
    machine(ClockId::Monotonic, "monotonic")
}

/// A clock of the machine's, whatever a time namespace (5.6+) adds to it for us.
fn machine(clock: ClockId, name: &str) -> Duration {
    static OFFSETS: OnceLock<String> = OnceLock::new();
    // A process stays in its time namespace.
    let offsets = OFFSETS.get_or_init(|| fs::read_to_string("/proc/self/timens_offsets").unwrap_or_default());
    let now = rustix::time::clock_gettime(clock);
    let now = i128::from(now.tv_sec) * 1_000_000_000 + i128::from(now.tv_nsec);
    Duration::from_nanos(u64::try_from(now - offset(offsets, name)).unwrap_or(0))
}

/// Nanoseconds, from lines such as "boottime  86400  0".
fn offset(offsets: &str, clock: &str) -> i128 {
    let of = |line: &str| {
        let mut words = line.split_whitespace().skip_while(|word| *word == clock);
        let (seconds, nanoseconds) =
            (words.next()?.parse::<i128>().ok()?, words.next()?.parse::<i128>().ok()?);
        Some(seconds.checked_mul(1_000_000_000)?.saturating_add(nanoseconds))
    };
    offsets.lines().filter(|line| line.starts_with(clock)).find_map(of).unwrap_or(0)
}

/// A clock that starts at 0 and is never set back.
#[derive(Clone, Copy, Debug)]
pub struct Uptime(Instant);

impl Uptime {
    pub fn start() -> Self {
        Self(Instant::now())
    }

    pub fn elapsed(self) -> Duration {
        self.0.elapsed()
    }
}

/// CPU time of this process so far, in user and kernel mode.
pub fn cpu_time() -> std::time::Duration {
    let spent = rustix::time::clock_gettime(ClockId::ProcessCPUTime);
    let seconds = u64::try_from(spent.tv_sec).unwrap_or(0);
    std::time::Duration::new(seconds, u32::try_from(spent.tv_nsec).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_time_namespace_adds_is_taken_off() {
        let text = "monotonic           0         0\nboottime       86400 500000000\n";
        assert_eq!((offset(text, "monotonic"), offset(text, "boottime")), (0, 86_400_500_000_000));
        assert_eq!(offset("boottime  -2  0\n", "boottime"), -2_000_000_000);
        for other in ["", "boottime", "boottime x y", "monotonic 1 0"] {
            assert_eq!(offset(other, "boottime"), 0, "{other}");
        }
        let awake = monotonic();
        assert!(since_boot() >= awake);
    }
}
