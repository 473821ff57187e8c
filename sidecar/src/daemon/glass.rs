//! What the daemon does about openings: tells of them, looks when one ends, and has what
//! came in by them cut. It neither opens nor closes any.

use std::time::Duration;

use tokio::time::Instant;

use super::eventlog::EventKind;
use crate::apply::cut::{self, Cut};
use crate::desired::Desired;
use crate::diff::glass::openings;
use crate::diff::{Code, Finding};
use crate::observed::Snapshot;
use crate::policy::Mode;
use crate::ruleset::glass::Opening;
use crate::terms::Stamp;

/// The kernel counts in whole milliseconds and the listing in seconds.
const AFTER_THE_END: Duration = Duration::from_millis(1100);

#[derive(Default)]
pub(super) struct Watch {
    seen: Vec<Opening>,
    at: Option<Stamp>,
    /// When the next one ends.
    ends: Option<Instant>,
    /// Something was closed since flows were last looked through.
    cut_is_due: bool,
}

impl Watch {
    /// When to look because an opening ends; once for each end.
    pub fn ends(&self) -> Option<Instant> {
        self.ends
    }

    pub fn ended(&mut self) {
        self.ends = None;
    }

    /// Takes note of what a look saw. Gives those that were opened anew, which no finding
    /// tells: it is the same hole.
    pub fn look(&mut self, snapshot: &Snapshot) -> Vec<Opening> {
        if snapshot.nftables.seen().is_none() {
            return Vec::new();
        }
        let found = openings(snapshot);
        let least = found.iter().map(|opening| opening.left_s).min();
        self.ends = least.map(|left| Instant::now() + Duration::from_secs(left.into()) + AFTER_THE_END);
        let anew = |new: &&Opening| self.seen.iter().any(|old| old.same_hole(new) && old.began < new.began);
        let anew = found.iter().filter(anew).cloned().collect();
        self.seen = found;
        self.at = Some(snapshot.at);
        anew
    }

    pub fn count(&self) -> u64 {
        self.seen.len() as u64
    }

    pub fn last_end(&self) -> Option<Stamp> {
        let at = self.at?;
        self.seen.iter().map(|opening| opening.ends(at)).max()
    }

    pub fn closed(&mut self) {
        self.cut_is_due = true;
    }

    /// Whether flows are to be cut now. Not while a change waits for its confirmation: what
    /// was cut under rules that are rolled back would not come back with them.
    pub fn take_cut(&mut self, on_trial: bool) -> bool {
        self.cut_is_due && !on_trial && std::mem::take(&mut self.cut_is_due)
    }
}

/// What to call the appearing or, at this time, the end of a finding about an opening.
pub(super) fn kind(finding: &Finding, cleared: Option<Stamp>) -> Option<EventKind> {
    if finding.code != Code::BreakGlassOpen {
        return None;
    }
    let Some(now) = cleared else { return Some(EventKind::Opened) };
    // "open until 2026-11-21T12:15:00Z by ...": also of one that a daemon before us saw.
    let end = finding.found.split(' ').nth(2).and_then(|word| word.parse::<jiff::Timestamp>().ok());
    // Whole seconds, and after the clock was set counted from a listing that takes a while.
    let early = end.is_some_and(|end| now.0.as_second() + 3 < end.as_second());
    Some(if early { EventKind::Closed } else { EventKind::Expired })
}

/// Cuts on what has just been read.
pub(super) fn cut(desired: &Desired, snapshot: &Snapshot) -> Option<anyhow::Result<Cut>> {
    if desired.policy.enforce.mode != Mode::Enforce {
        return None;
    }
    Some(cut::in_force(Some(desired), snapshot.nftables.seen()?, snapshot.links.seen()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::diff::Severity;

    #[test]
    fn an_end_in_time_is_told_from_one_before() {
        let found = "open until 2026-11-21T12:15:00Z by alice, since 2026-11-21T12:00:00Z: why";
        let finding = |code| Finding::new(code, Severity::Info, "tcp/2222 from 192.0.2.0/24", "", found, "");
        let at = |text: &str| Some(Stamp(text.parse().expect("a time")));
        let glass = finding(Code::BreakGlassOpen);
        assert_eq!(kind(&glass, None), Some(EventKind::Opened));
        assert_eq!(kind(&glass, at("2026-11-21T12:14:00Z")), Some(EventKind::Closed));
        assert_eq!(kind(&glass, at("2026-11-21T12:15:00Z")), Some(EventKind::Expired));
        assert_eq!(kind(&glass, at("2026-11-22T00:00:00Z")), Some(EventKind::Expired));
        assert_eq!(kind(&finding(Code::ExceptionOpen), None), None);
    }
}
