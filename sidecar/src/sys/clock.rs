//! The two clocks: the wall's for reports, and one that only goes forward for waiting.

use std::time::{Duration, Instant};

use crate::terms::Stamp;

pub fn now() -> Stamp {
    Stamp(jiff::Timestamp::now())
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
