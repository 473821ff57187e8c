//! The two clocks: the wall's for reports, and one that only goes forward for waiting.

use std::time::{Duration, Instant};

use crate::terms::Stamp;

pub fn now() -> Stamp {
    Stamp(jiff::Timestamp::now())
}

/// How long ago the machine started, time asleep included (CLOCK_BOOTTIME): the clock that
/// eBPF programs write down.
pub fn since_boot() -> Duration {
    at(rustix::time::ClockId::Boottime)
}

/// The same without time asleep: the same for all processes, never set back.
pub fn monotonic() -> Duration {
    at(rustix::time::ClockId::Monotonic)
}

fn at(clock: rustix::time::ClockId) -> Duration {
    let now = rustix::time::clock_gettime(clock);
    Duration::new(u64::try_from(now.tv_sec).unwrap_or(0), u32::try_from(now.tv_nsec).unwrap_or(0))
}

/// Nanoseconds since the machine was booted, its sleep included: what the guard's openings
/// with an end are measured by.
pub fn since_boot_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
    seconds.saturating_mul(1_000_000_000).saturating_add(u64::try_from(now.tv_nsec).unwrap_or(0))
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
    let spent = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    let seconds = u64::try_from(spent.tv_sec).unwrap_or(0);
    std::time::Duration::new(seconds, u32::try_from(spent.tv_nsec).unwrap_or(0))
}
