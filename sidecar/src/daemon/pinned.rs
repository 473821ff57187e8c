//! What we pinned, when somebody else took it away or put something else in its place: the
//! loader pins it anew, and the loop adopts that.

use std::time::Duration;

use tokio::time::Instant;

use super::guarding::{Guarding, Kept};
use super::{Daemon, warn};
use crate::source::bpf;

/// Whoever takes pins away again and again is answered this often.
const PAUSE: Duration = Duration::from_secs(5);

impl Daemon {
    /// At every tick. `None`: there was nothing to do.
    pub(super) fn keep_pins(&mut self) -> Option<Kept> {
        let guard = self.guarding.runs() && !self.guarding.is_pinned();
        let counters = self.counters.is_some() && !bpf::is_pinned(&self.places.pin);
        if !(guard || counters) || self.pinned_again.is_some_and(|at| at.elapsed() < PAUSE) {
            return None;
        }
        self.pinned_again = Some(Instant::now());
        log::warn!("somebody took away what was pinned below {}: loading it anew", self.places.pin.display());
        let verb = [crate::cli::INTERNAL_LOAD.into(), self.places.pin.clone().into_os_string()];
        let loaded = bpf::spawn_loader(&verb, &self.config);
        let failed = loaded.as_ref().err().map(|error| format!("{error:#}"));
        if counters {
            match loaded.and_then(|()| bpf::Bpf::open(&self.places.pin)) {
                Ok(Some(counters)) => self.counters = Some(counters),
                Ok(None) => {}
                Err(error) => warn("the counters", error),
            }
            if let Some(snapshot) = self.snapshot.take() {
                self.count_on(&snapshot);
                self.snapshot = Some(snapshot);
            }
        }
        if !guard {
            return None;
        }
        let waits = self.standing.is_on_trial();
        self.guarding = Guarding::start(&self.places.pin, &self.desired, waits, failed);
        Some(match &self.guarding.gap {
            Some(gap) => Kept::Failed(gap.clone()),
            None => Kept::Restored("its pins were gone, or were another program's".to_owned()),
        })
    }
}
