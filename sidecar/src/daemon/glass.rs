//! What the daemon does about openings: tells of them, looks when one ends, and has what
//! came in by them cut. It neither opens nor closes any.

use std::time::Duration;

use tokio::time::Instant;

use super::eventlog::EventKind;
use crate::apply::cut::{self, Cut};
use crate::desired::{Desired, is_own_table};
use crate::diff::{Code, Finding};
use crate::observed::Snapshot;
use crate::policy::Mode;
use crate::ruleset::Ruleset;
use crate::ruleset::glass::{self, Opening};
use crate::terms::Stamp;

/// The kernel counts in whole milliseconds and the listing in seconds.
const AFTER_THE_END: Duration = Duration::from_millis(1100);

/// A listing gives whole seconds, and takes a while.
const LATE: Duration = Duration::from_secs(3);

#[derive(Default)]
pub(super) struct Watch {
    seen: Vec<Seen>,
    at: Option<Stamp>,
    /// Up to when what a snapshot says of them has been counted down.
    counted: Option<Instant>,
    /// When the next one ends.
    ends: Option<Instant>,
    /// Something was closed since flows were last looked through.
    cut_is_due: bool,
}

/// An opening as the last look saw it.
struct Seen {
    opening: Opening,
    /// When the kernel ends it: by the clock that nobody sets, as the kernel counts.
    ends: Instant,
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
    pub fn look(&mut self, found: Vec<Opening>, at: Stamp, now: Instant) -> Vec<Opening> {
        let ends = |opening: &Opening| now + Duration::from_secs(opening.left_s.into());
        self.ends = found.iter().map(ends).min().map(|least| least + AFTER_THE_END);
        let anew = |new: &&Opening| {
            self.seen.iter().any(|old| old.opening.same_hole(new) && old.opening.began < new.began)
        };
        let anew = found.iter().filter(anew).cloned().collect();
        self.seen = found.into_iter().map(|opening| Seen { ends: ends(&opening), opening }).collect();
        self.at = Some(at);
        self.counted = Some(now);
        anew
    }

    /// Counts down what is left of them in rules that the next look may not read again.
    pub fn count_down(&mut self, rules: &mut Ruleset, now: Instant) {
        let Some(counted) = &mut self.counted else { return };
        let passed = now.saturating_duration_since(*counted).as_secs();
        *counted += Duration::from_secs(passed);
        if let Some(table) = rules.tables.iter_mut().find(|table| is_own_table(table)) {
            glass::count_down(table, passed.try_into().unwrap_or(u32::MAX));
        }
    }

    /// What to call the end of a finding about an opening, told at these times.
    pub fn end(&self, finding: &Finding, told: Stamp, now: Instant) -> Option<EventKind> {
        if finding.code != Code::BreakGlassOpen {
            return None;
        }
        let seen = self.seen.iter().find(|seen| seen.opening.to_string() == finding.subject);
        let early = match seen {
            // The time of day may have been set since it was read.
            Some(seen) => now + LATE < seen.ends,
            // "open until 2026-11-21T12:15:00Z by ...", of one that a daemon before us saw.
            None => {
                let end = finding.found.split(' ').nth(2);
                let end = end.and_then(|word| word.parse::<jiff::Timestamp>().ok());
                end.is_some_and(|end| end.as_second() - told.0.as_second() > LATE.as_secs() as i64)
            }
        };
        Some(if early { EventKind::Closed } else { EventKind::Expired })
    }

    pub fn count(&self) -> u64 {
        self.seen.len() as u64
    }

    pub fn last_end(&self) -> Option<Stamp> {
        let at = self.at?;
        self.seen.iter().map(|seen| seen.opening.ends(at)).max()
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

/// What to call the appearing of a finding about an opening.
pub(super) fn beginning(finding: &Finding) -> Option<EventKind> {
    (finding.code == Code::BreakGlassOpen).then_some(EventKind::Opened)
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
    use crate::desired::samples;
    use crate::diff::Severity;
    use crate::ruleset::Timed;
    use crate::terms::{Port, Proto};

    const AT: i64 = 1_763_726_400;

    fn finding(code: Code) -> Finding {
        let found = format!("open until {} by alice, since ...: why", Stamp::from_unix(AT + 900).0);
        Finding::new(code, Severity::Info, opening(900).to_string(), "", found, "")
    }

    fn opening(left_s: u32) -> Opening {
        Opening {
            proto: Proto::Tcp,
            port: Port::new(2222).expect("a port"),
            from: "192.0.2.0/24".parse().expect("a prefix"),
            owner: "alice".into(),
            reason: "why".into(),
            began: Stamp::from_unix(AT),
            lasts_s: 900,
            left_s,
        }
    }

    #[test]
    fn of_what_another_daemon_saw_the_text_says_when_it_was_to_end() {
        let told =
            |at| Watch::default().end(&finding(Code::BreakGlassOpen), Stamp::from_unix(at), Instant::now());
        assert_eq!(beginning(&finding(Code::BreakGlassOpen)), Some(EventKind::Opened));
        assert_eq!(told(AT + 840), Some(EventKind::Closed));
        assert_eq!(told(AT + 900), Some(EventKind::Expired));
        assert_eq!(told(AT + 86_400), Some(EventKind::Expired));
        let other = finding(Code::ExceptionOpen);
        assert_eq!(beginning(&other), None);
        assert_eq!(Watch::default().end(&other, Stamp::from_unix(AT), Instant::now()), None);
    }

    #[test]
    fn an_end_is_told_by_the_clock_that_nobody_sets() {
        let (mut watch, now) = (Watch::default(), Instant::now());
        assert_eq!(watch.look(vec![opening(900)], Stamp::from_unix(AT), now), [] as [Opening; 0]);
        assert_eq!(watch.ends(), Some(now + Duration::from_secs(900) + AFTER_THE_END));
        let told = |seconds, at| {
            let now = now + Duration::from_secs(seconds);
            watch.end(&finding(Code::BreakGlassOpen), Stamp::from_unix(at), now)
        };
        // The same ends after the time of day was set back by a year, and forward.
        for year in [-31_536_000, 0, 31_536_000] {
            assert_eq!(told(840, AT + 840 + year), Some(EventKind::Closed), "{year}");
            assert_eq!(told(901, AT + 901 + year), Some(EventKind::Expired), "{year}");
        }
    }

    #[test]
    fn what_was_read_once_is_counted_down_once() {
        let (mut watch, now) = (Watch::default(), Instant::now());
        let mut table =
            Desired::new(samples::spoke(), samples::TODAY).expect("a way in").table.expect("a table");
        let (set, key) = opening(900).element();
        let set = table.sets.iter_mut().find(|found| found.name == set).expect("declared");
        set.elements.push(key);
        set.timed.push(Timed { timeout_s: 900, expires_s: 900, comment: Some(opening(900).comment()) });
        let mut rules = Ruleset { tables: vec![table] };
        watch.look(glass::openings(&rules.tables[0]), Stamp::from_unix(AT), now);
        for (seconds, left) in [(4.6, 896), (9.5, 891), (9.9, 891), (2000.0, 0)] {
            watch.count_down(&mut rules, now + Duration::from_secs_f64(seconds));
            assert_eq!(glass::openings(&rules.tables[0])[0].left_s, left, "{seconds}");
        }
    }
}
