//! What is worth waking somebody for: a difference that appeared, was repaired, could not be,
//! or is over. Each finding (code and subject) speaks at most twice in a while, so that one
//! that comes and goes tells that it does, and not each time.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::diff::{Code, Severity};
use crate::terms::{Actor, Stamp};

/// How long a finding that has spoken twice is held.
pub const HOLD: Duration = Duration::from_secs(300);
const SPOKEN_MAX: u32 = 2;
/// Findings that are followed. The one that spoke longest ago makes room.
const FOLLOWED_MAX: usize = 512;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum NoticeKind {
    Appeared,
    Repaired,
    RepairFailed,
    Recovered,
}

impl NoticeKind {
    pub const fn name(self) -> &'static str {
        match self {
            NoticeKind::Appeared => "drift",
            NoticeKind::Repaired => "repaired",
            NoticeKind::RepairFailed => "repair failed",
            NoticeKind::Recovered => "recovered",
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Notice {
    pub at: Stamp,
    pub kind: NoticeKind,
    pub code: Code,
    pub severity: Severity,
    pub subject: String,
    pub found: String,
    pub by: Option<Actor>,
    /// How often this finding changed since it last spoke, this time not counted.
    pub unspoken: u32,
}

impl Notice {
    /// ntfy's, 1 to 5: what lets strangers in wakes people, what is over wakes nobody.
    pub fn priority(&self) -> u8 {
        match (self.kind, self.severity) {
            (NoticeKind::Appeared, Severity::Critical) => 5,
            (NoticeKind::RepairFailed, Severity::Critical) => 5,
            (NoticeKind::Appeared | NoticeKind::RepairFailed, Severity::High) => 4,
            (NoticeKind::Appeared | NoticeKind::RepairFailed, _) => 3,
            (NoticeKind::Repaired, _) => 3,
            (NoticeKind::Recovered, _) => 2,
        }
    }
}

/// A finding that was last told as wrong, and how urgently.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Wrong {
    pub code: Code,
    pub subject: String,
    pub priority: u8,
}

/// Follows what each finding has told.
#[derive(Clone, Debug, Default)]
pub struct Notices {
    followed: BTreeMap<(Code, String), Followed>,
}

#[derive(Clone, Debug)]
struct Followed {
    /// Since when it is counted how often it spoke.
    since: Duration,
    spoken: u32,
    /// The most urgent of those.
    priority: u8,
    told: NoticeKind,
    waits: Option<Notice>,
    unspoken: u32,
}

impl Notices {
    /// Takes note of a change at `now`, by a clock that nobody sets. Gives back what is to be
    /// told at once.
    pub fn note(&mut self, notice: Notice, now: Duration) -> Option<Notice> {
        let key = (notice.code, notice.subject.clone());
        let Some(followed) = self.followed.get_mut(&key) else {
            // What was never told as wrong is not told as right.
            if notice.kind == NoticeKind::Recovered {
                return None;
            }
            self.make_room();
            self.followed.insert(key, Followed::new(&notice, now));
            return Some(notice);
        };
        if now.saturating_sub(followed.since) >= HOLD && followed.waits.is_none() {
            *followed = Followed { unspoken: followed.unspoken, ..Followed::new(&notice, now) };
            return Some(Notice { unspoken: std::mem::take(&mut followed.unspoken), ..notice });
        }
        // The same word again says nothing new, and a worse one doesn't wait.
        let same = followed.told == notice.kind;
        let worse = notice.priority() > followed.priority;
        if worse || (!same && followed.spoken < SPOKEN_MAX) {
            followed.spoken += 1;
            followed.priority = followed.priority.max(notice.priority());
            followed.told = notice.kind;
            followed.waits = None;
            return Some(Notice { unspoken: std::mem::take(&mut followed.unspoken), ..notice });
        }
        followed.unspoken = followed.unspoken.saturating_add(1);
        followed.waits = Some(notice);
        None
    }

    /// What was held long enough and differs from what was last told, or came again meanwhile.
    pub fn ripe(&mut self, now: Duration) -> Vec<Notice> {
        let ripe = |followed: &&mut Followed| now.saturating_sub(followed.since) >= HOLD;
        let mut out = Vec::new();
        for followed in self.followed.values_mut().filter(ripe) {
            let Some(notice) = followed.waits.take() else { continue };
            // Itself is among those that were not told.
            let unspoken = std::mem::take(&mut followed.unspoken).saturating_sub(1);
            *followed = Followed::new(&notice, now);
            out.push(Notice { unspoken, ..notice });
        }
        out.sort_by_key(|notice| notice.at);
        // A finding that is over and quiet is forgotten.
        self.followed.retain(|_, followed| {
            let over = matches!(followed.told, NoticeKind::Recovered | NoticeKind::Repaired);
            !(over && now.saturating_sub(followed.since) >= HOLD)
        });
        out
    }

    /// Those that [`Self::ripe`] will tell if nothing changes, the oldest first.
    pub fn held(&self) -> impl Iterator<Item = &Notice> {
        let mut held: Vec<&Notice> = self.followed.values().filter_map(|f| f.waits.as_ref()).collect();
        held.sort_by_key(|notice| notice.at);
        held.into_iter()
    }

    pub fn wrong(&self) -> impl Iterator<Item = Wrong> {
        let told = |kind| matches!(kind, NoticeKind::Appeared | NoticeKind::RepairFailed);
        let wrong = self.followed.iter().filter(move |(_, followed)| told(followed.told));
        wrong.map(|((code, subject), followed)| Wrong {
            code: *code,
            subject: subject.clone(),
            priority: followed.priority,
        })
    }

    /// What an earlier process had told.
    pub fn restore(&mut self, wrong: Wrong, now: Duration) {
        self.make_room();
        let Wrong { code, subject, priority } = wrong;
        let told = NoticeKind::Appeared;
        let followed = Followed { since: now, spoken: 1, priority, told, waits: None, unspoken: 0 };
        self.followed.insert((code, subject), followed);
    }

    /// When [`Self::ripe`] has something to do.
    pub fn due(&self) -> Option<Duration> {
        let held = self.followed.values().filter(|followed| followed.waits.is_some());
        held.map(|followed| followed.since + HOLD).min()
    }

    fn make_room(&mut self) {
        if self.followed.len() >= FOLLOWED_MAX
            && let Some(key) = self.followed.iter().min_by_key(|(_, f)| f.since).map(|(key, _)| key.clone())
        {
            self.followed.remove(&key);
        }
    }
}

impl Followed {
    fn new(notice: &Notice, now: Duration) -> Self {
        let (priority, told) = (notice.priority(), notice.kind);
        Self { since: now, spoken: 1, priority, told, waits: None, unspoken: 0 }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use NoticeKind::{Appeared, Recovered, RepairFailed, Repaired};

    pub fn notice(kind: NoticeKind, subject: &str) -> Notice {
        Notice {
            at: Stamp::from_unix(1_795_000_000),
            kind,
            code: Code::ListenerExposed,
            severity: Severity::Critical,
            subject: subject.into(),
            found: "anyone gets in".into(),
            by: Some(Actor { pid: 812, process: "postgres".into(), unit: None, user: None }),
            unspoken: 0,
        }
    }

    /// Seconds and what happens then -> seconds, what is told, and how much was not.
    fn told(changes: &[(u64, NoticeKind)]) -> Vec<(u64, NoticeKind, u32)> {
        let mut notices = Notices::default();
        let mut out = Vec::new();
        let end = changes.last().map_or(0, |(at, _)| *at) + 700;
        for second in 0..end {
            let now = Duration::from_secs(second);
            if notices.due().is_some_and(|due| due <= now) {
                out.extend(notices.ripe(now).into_iter().map(|n| (second, n.kind, n.unspoken)));
            }
            for (_, kind) in changes.iter().filter(|(at, _)| *at == second) {
                out.extend(
                    notices
                        .note(notice(*kind, "tcp/0.0.0.0:5432"), now)
                        .map(|n| (second, n.kind, n.unspoken)),
                );
            }
        }
        out
    }

    #[test]
    fn a_finding_tells_that_it_came_and_went() {
        assert_eq!(told(&[(0, Appeared), (9, Recovered)]), [(0, Appeared, 0), (9, Recovered, 0)]);
        assert_eq!(told(&[(0, Recovered)]), []);
        // In other words than before: told once it was held.
        assert_eq!(told(&[(0, Appeared), (5, Appeared)]), [(0, Appeared, 0), (300, Appeared, 0)]);
        // An hour later it is told anew.
        let hour = [(0, Appeared), (9, Recovered), (3600, Appeared), (3609, Recovered)];
        assert_eq!(told(&hour).len(), 4);
    }

    #[test]
    fn one_that_comes_and_goes_is_held_and_its_end_is_told() {
        let mut changes: Vec<(u64, NoticeKind)> =
            (0..100).map(|n| (n, if n % 2 == 0 { Appeared } else { Recovered })).collect();
        assert_eq!(told(&changes), [(0, Appeared, 0), (1, Recovered, 0), (300, Recovered, 97)]);
        changes.pop();
        assert_eq!(told(&changes), [(0, Appeared, 0), (1, Recovered, 0), (300, Appeared, 96)]);
    }

    #[test]
    fn a_thousand_repairs_of_one_table_are_a_handful_of_notices() {
        let changes: Vec<(u64, NoticeKind)> = (0..1000).map(|n| (n, Repaired)).collect();
        let told = told(&changes);
        assert!((4..=6).contains(&told.len()), "{told:?}");
        assert!(told.iter().all(|(_, kind, _)| *kind == Repaired));
        let all: u32 = told.iter().map(|(_, _, unspoken)| unspoken + 1).sum();
        assert_eq!(all, 1000, "each is counted: {told:?}");
    }

    #[test]
    fn what_is_worse_than_what_was_told_does_not_wait() {
        let told = told(&[(0, Repaired), (1, Recovered), (2, Repaired), (3, RepairFailed)]);
        assert_eq!(told, [(0, Repaired, 0), (1, Recovered, 0), (3, RepairFailed, 1)]);
    }

    #[test]
    fn findings_are_told_apart_and_bounded() {
        let mut notices = Notices::default();
        for n in 0..2000u64 {
            let new = notice(Appeared, &format!("tcp/0.0.0.0:{n}"));
            assert!(notices.note(new, Duration::from_millis(n)).is_some(), "{n}");
            assert!(notices.followed.len() <= FOLLOWED_MAX);
        }
        let other = Notice { code: Code::SshBind, ..notice(Appeared, "tcp/0.0.0.0:1999") };
        assert!(notices.note(other, Duration::from_secs(3)).is_some());
        // The newest are still followed.
        assert!(notices.note(notice(Appeared, "tcp/0.0.0.0:1999"), Duration::from_secs(3)).is_none());
    }

    #[test]
    fn urgency_follows_what_it_is() {
        let of = |kind, severity| Notice { severity, ..notice(kind, "x") }.priority();
        use Severity::{Critical, High, Low, Medium};
        assert_eq!(
            (of(Appeared, Critical), of(Appeared, High), of(Appeared, Medium), of(Appeared, Low)),
            (5, 4, 3, 3)
        );
        assert_eq!((of(RepairFailed, High), of(Repaired, Critical), of(Recovered, Critical)), (4, 3, 2));
    }
}
