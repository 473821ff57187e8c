//! When the daemon asks from outside, and what it makes of the answers.
//!
//! A whole sweep at start, after the rules or addresses have changed, and hourly; the ports
//! that matter after a new listener; what a look left in doubt at once. One at a time, in a
//! child process, and each is paid for with a rest, so that neither a fight over the rules
//! nor a process that calls listen() in a loop can keep the host busy with it.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::path::Path;
use std::time::Duration;

use tokio::task::JoinHandle;
use tokio::time::Instant;

use crate::audit::{Aim, View, aims};
use crate::cli::INTERNAL_PROBE;
use crate::desired::Desired;
use crate::diff::Proof;
use crate::metrics;
use crate::observed::{Dispute, Listener, Probed, Probing, Reading, Snapshot};
use crate::source::outside::{self, Answer, Errand, Extent};
use crate::sys::clock::{self, Uptime};
use crate::terms::{Port, Proto, Stamp};

/// A daemon that is started again and again does not probe again and again.
const START: Duration = Duration::from_secs(2);
const HOURLY: Duration = Duration::from_secs(3600);
/// What findings stand on is asked about this often.
const AGAIN: Duration = Duration::from_secs(60);
/// More changes of their kind are waited for.
const SETTLE: Duration = Duration::from_millis(300);
/// Somebody else's audit is under way.
const BUSY: Duration = Duration::from_secs(5);
/// After a failure, and twice as long after each further one, up to an hour.
const FAILED: Duration = Duration::from_secs(60);
/// An audit is paid for with this many times as much rest, and at least so long.
const REST: u32 = 20;
const REST_MIN: Duration = Duration::from_secs(2);
const WHOLE_REST_MIN: Duration = Duration::from_secs(30);

pub struct Audits {
    /// What is to be asked, and from when on.
    whole: Option<Instant>,
    likely: Option<Instant>,
    doubts: Vec<Dispute>,
    again: Instant,
    rest_until: Instant,
    whole_rest_until: Instant,
    doubts_rest_until: Instant,
    failures: u32,
    under_way: Option<JoinHandle<Ended>>,
    /// To be put into the next look.
    fresh: Option<Fresh>,
    /// As they were when it was last asked.
    asked: Asked,
    last: Option<Probing>,
    /// When that was, by a clock that nobody sets.
    last_at: Option<Instant>,
    proof: Option<Proof>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Asked {
    generation: Option<u32>,
    listeners: BTreeSet<(Proto, IpAddr, Port)>,
    aims: Vec<Aim>,
}

/// What one audit came to.
struct Ended {
    answer: anyhow::Result<Answer>,
    extent: Extent,
    at: Stamp,
    took: Duration,
}

enum Fresh {
    Whole(Probed),
    Part(Probed, Vec<Dispute>),
    Blind(String),
}

impl Audits {
    pub fn new(now: Instant) -> Self {
        Self {
            whole: None,
            likely: None,
            doubts: Vec::new(),
            again: now + AGAIN,
            rest_until: now,
            whole_rest_until: now,
            doubts_rest_until: now,
            failures: 0,
            under_way: None,
            fresh: None,
            asked: Asked::default(),
            last: None,
            last_at: None,
            proof: None,
        }
    }

    pub fn is_under_way(&self) -> bool {
        self.under_way.is_some()
    }

    /// Takes in what a look has found: what has changed is asked about soon.
    pub fn looked(
        &mut self,
        desired: &Desired,
        snapshot: &Snapshot,
        generation: Option<u32>,
        proof: Option<Proof>,
        disputed: Vec<Dispute>,
        now: Instant,
    ) {
        if let Some(proof) = proof {
            self.proof = Some(proof);
        }
        let seen = Asked::of(desired, snapshot, generation);
        let sooner = |known: Option<Instant>, due: Instant| Some(known.map_or(due, |known| known.min(due)));
        if self.last.is_none() && self.failures == 0 && self.under_way.is_none() {
            self.whole = sooner(self.whole, now + START);
        } else if seen.generation != self.asked.generation || seen.aims != self.asked.aims {
            // Changes come in droves; and an address that has just come is not used at once.
            self.whole = sooner(self.whole, now + REST_MIN);
            self.likely = sooner(self.likely, now + SETTLE);
        } else if !seen.listeners.is_subset(&self.asked.listeners) {
            self.likely = sooner(self.likely, now + SETTLE);
        }
        self.doubts = disputed;
    }

    /// The kernel has announced a change that is none of rules: our own audit's table.
    pub fn generation_moved(&mut self, from: u32, to: u32) {
        if self.asked.generation == Some(from) {
            self.asked.generation = Some(to);
        }
    }

    /// When there is something to do; not while an audit is under way.
    pub fn due(&self) -> Option<Instant> {
        if self.under_way.is_some() || self.fresh.is_some() {
            return None;
        }
        let whole = self.whole.map(|due| due.max(self.whole_rest_until));
        // What an audit has just left in doubt is asked about at once.
        let doubts = (!self.doubts.is_empty()).then_some(self.doubts_rest_until);
        let standing = self.proof.as_ref().is_some_and(|proof| !proof.standing.is_empty());
        let again = standing.then_some(self.again.max(self.doubts_rest_until));
        let likely = self.likely.map(|due| due.max(self.rest_until));
        [whole, likely, doubts, again].into_iter().flatten().min()
    }

    /// Starts what is due.
    pub fn begin(
        &mut self,
        desired: &Desired,
        snapshot: &Snapshot,
        generation: Option<u32>,
        run_dir: &Path,
        now: Instant,
        uptime: Uptime,
    ) {
        let extent = self.choose(now);
        self.remember(&extent, Asked::of(desired, snapshot, generation));
        let errand = outside::errand(&View::of(desired, snapshot), run_dir, &extent);
        self.under_way = Some(tokio::spawn(ask(errand, extent, uptime)));
    }

    /// The most urgent of what is due.
    fn choose(&mut self, now: Instant) -> Extent {
        if self.whole.is_some_and(|due| due.max(self.whole_rest_until) <= now) {
            (self.whole, self.likely) = (None, None);
            Extent::All
        } else if !self.doubts.is_empty() && self.doubts_rest_until <= now {
            Extent::Doubts(std::mem::take(&mut self.doubts))
        } else if self.likely.is_some_and(|due| due.max(self.rest_until) <= now) {
            self.likely = None;
            Extent::Likely
        } else {
            let standing = self.proof.iter().flat_map(|proof| proof.standing.iter().cloned());
            self.again = now + AGAIN;
            Extent::Doubts(standing.collect())
        }
    }

    /// A part of the ports says little of what rules have done to the others, but then the
    /// whole is wanted already.
    fn remember(&mut self, extent: &Extent, asked: Asked) {
        if !matches!(extent, Extent::Doubts(_)) {
            self.asked = asked;
        }
    }

    /// Until the audit that is under way has ended.
    pub async fn ended(&mut self) {
        let Some(task) = &mut self.under_way else { return std::future::pending().await };
        let ended = task.await;
        self.under_way = None;
        let now = Instant::now();
        match ended {
            Ok(ended) => self.take(ended, now),
            // It panicked or was taken away; to ask again may help.
            Err(error) => self.fail(format!("the audit broke off: {error}"), now),
        }
    }

    fn take(&mut self, ended: Ended, now: Instant) {
        let Ended { answer, extent, at, took } = ended;
        let cost = match &answer {
            Ok(Answer::Probed { cost, .. }) => *cost,
            _ => Duration::ZERO,
        };
        let rest = (cost * REST).clamp(REST_MIN, HOURLY);
        match extent {
            Extent::All => self.whole_rest_until = now + rest.max(WHOLE_REST_MIN),
            Extent::Likely => self.rest_until = now + rest,
            Extent::Doubts(_) => self.doubts_rest_until = now + rest,
        }
        match answer {
            Ok(Answer::Probed { probed, .. }) => {
                log::debug!("asked from outside about {} ports in {took:.1?}", probed.ports());
                self.failures = 0;
                if extent == Extent::All {
                    self.last = Some(Probing { at, seconds: took.as_secs_f64() });
                    self.last_at = now.checked_sub(took);
                    self.whole = Some(now + HOURLY);
                    self.again = now + AGAIN;
                }
                self.fresh = Some(match extent {
                    Extent::All => Fresh::Whole(probed),
                    Extent::Likely => Fresh::Part(probed, Vec::new()),
                    Extent::Doubts(asked) => Fresh::Part(probed, asked),
                });
            }
            Ok(Answer::Busy) => {
                self.rest_until = self.rest_until.max(now + BUSY);
                self.doubts_rest_until = self.doubts_rest_until.max(now + BUSY);
                self.whole_rest_until = self.whole_rest_until.max(now + BUSY);
                match extent {
                    Extent::All => self.whole = Some(now),
                    Extent::Likely => self.likely = Some(now),
                    // The next look finds the same doubts.
                    Extent::Doubts(asked) => self.doubts = asked,
                }
            }
            Ok(Answer::Failed(why)) => self.fail(why, now),
            Err(error) => self.fail(format!("{error:#}"), now),
        }
    }

    fn fail(&mut self, why: String, now: Instant) {
        let wait = (FAILED * 2u32.saturating_pow(self.failures.min(10))).min(HOURLY);
        self.failures = self.failures.saturating_add(1);
        (self.rest_until, self.whole_rest_until, self.doubts_rest_until) =
            (now + wait, now + wait, now + wait);
        (self.whole, self.likely) = (Some(now + wait), None);
        self.fresh = Some(Fresh::Blind(why));
    }

    /// Whether an answer waits for a look to take it in.
    pub fn is_fresh(&self) -> bool {
        self.fresh.is_some()
    }

    /// Puts the last answer into a snapshot.
    pub fn tell(&mut self, snapshot: &mut Snapshot) {
        let before = snapshot.audit.take();
        snapshot.audit = match (self.fresh.take(), before) {
            (None, before) => before,
            (Some(Fresh::Blind(why)), _) => Some(outside::reading(Err(anyhow::anyhow!(why)))),
            (Some(Fresh::Whole(probed)), Some(Reading::Seen(before))) => {
                Some(Reading::Seen(probed.after(&before)))
            }
            (Some(Fresh::Whole(probed)), _) => Some(Reading::Seen(probed)),
            (Some(Fresh::Part(later, asked)), Some(Reading::Seen(mut probed))) => {
                probed.update(&later.sweeps, &asked);
                Some(Reading::Seen(probed))
            }
            // A part of the ports is no look at all of them.
            (Some(Fresh::Part(..)), before) => before,
        };
    }

    /// The last whole audit.
    pub fn last(&self) -> Option<Probing> {
        self.last
    }

    pub fn metrics(&self) -> Option<metrics::Audit> {
        Some(metrics::Audit { age: self.last_at?.elapsed(), proof: self.proof.clone()? })
    }
}

impl Asked {
    fn of(desired: &Desired, snapshot: &Snapshot, generation: Option<u32>) -> Self {
        // Clients talk from unbound UDP sockets on ports of the kernel's choice.
        const EPHEMERAL: u16 = 32_768;
        let counts = |l: &&Listener| !l.is_loopback() && (l.proto == Proto::Tcp || l.port.get() < EPHEMERAL);
        let listeners = snapshot.listeners.seen().into_iter().flatten().filter(counts);
        Self {
            generation,
            listeners: listeners.map(|l| (l.proto, l.address, l.port)).collect(),
            aims: aims(&View::of(desired, snapshot), None, None),
        }
    }
}

async fn ask(errand: Errand, extent: Extent, uptime: Uptime) -> Ended {
    let (at, begun) = (clock::now(), uptime.elapsed());
    let answer = if errand.requests.is_empty() {
        Ok(Answer::Probed { probed: Probed::default(), cost: Duration::ZERO })
    } else {
        outside::run_in_child(INTERNAL_PROBE, &errand).await
    };
    Ended { answer, extent, at, took: uptime.elapsed() - begun }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::diff::stage::Stage;

    /// A daemon's hours without a daemon: each audit takes no time and finds nothing.
    struct Day {
        audits: Audits,
        now: Instant,
        begun: Instant,
    }

    impl Day {
        fn new() -> Self {
            let now = Instant::now();
            Self { audits: Audits::new(now), now, begun: now + START }
        }

        fn look(&mut self, stage: Stage, generation: u32, disputed: Vec<Dispute>) {
            let (desired, snapshot) = stage.set();
            self.audits.looked(&desired, &snapshot, Some(generation), None, disputed, self.now);
        }

        /// The next audit: how many seconds later, and of what.
        fn next(&mut self, stage: Stage, generation: u32, cost: Duration) -> (u64, Extent) {
            let due = self.audits.due().expect("something is due");
            self.now = self.now.max(due);
            let (desired, snapshot) = stage.set();
            let extent = self.audits.choose(self.now);
            self.audits.remember(&extent, Asked::of(&desired, &snapshot, Some(generation)));
            let answer = Ok(Answer::Probed { probed: Probed::default(), cost });
            let at = clock::now();
            self.audits.take(Ended { answer, extent: extent.clone(), at, took: cost }, self.now);
            self.audits.fresh = None;
            ((self.now - self.begun).as_secs(), extent)
        }
    }

    const QUICK: Duration = Duration::from_millis(200);

    #[test]
    fn at_start_and_hourly_and_not_otherwise() {
        let mut day = Day::new();
        assert_eq!(day.audits.due(), None, "not before the first look");
        for hour in 0..3 {
            day.look(Stage::spoke(), 1, Vec::new());
            assert_eq!(day.next(Stage::spoke(), 1, QUICK), (hour * 3600, Extent::All));
        }
    }

    #[test]
    fn looks_in_a_row_do_not_put_the_first_audit_off() {
        let mut day = Day::new();
        for _ in 0..20 {
            day.look(Stage::spoke(), 1, Vec::new());
            day.now += START / 4;
        }
        assert_eq!(day.audits.due(), Some(day.begun), "whoever listens anew every second must not hinder it");
    }

    #[test]
    fn a_new_listener_is_asked_about_at_once_and_a_storm_of_them_with_rests() {
        let mut day = Day::new();
        day.look(Stage::spoke(), 1, Vec::new());
        day.next(Stage::spoke(), 1, QUICK);
        let with = |number: u16| Stage::spoke().listens(&format!("tcp 0.0.0.0:{number} storm"));
        day.look(with(1), 1, Vec::new());
        assert_eq!(day.next(with(1), 1, QUICK), (0, Extent::Likely));
        for number in 2..=10 {
            day.look(with(number), 1, Vec::new());
            let (at, extent) = day.next(with(number), 1, QUICK);
            assert_eq!(extent, Extent::Likely);
            // 0.2 s of work each, and twenty times as much rest.
            assert_eq!(at, u64::from(number - 1) * 4);
        }
        let client = || with(10).listens("udp 0.0.0.0:51000 resolver").listens("tcp 127.0.0.1:631 cupsd");
        day.look(client(), 1, Vec::new());
        assert!(day.audits.due().expect("hourly") > day.now + HOURLY / 2, "these are no new exposure");
    }

    #[test]
    fn a_fight_over_the_rules_is_asked_about_in_part_and_whole_after_a_rest() {
        let mut day = Day::new();
        day.look(Stage::spoke(), 1, Vec::new());
        day.next(Stage::spoke(), 1, QUICK);
        let mut whole = 0;
        for generation in 2..=20 {
            day.look(Stage::spoke(), generation, Vec::new());
            let (_, extent) = day.next(Stage::spoke(), generation, QUICK);
            whole += u32::from(extent == Extent::All);
        }
        let took = (day.now - day.begun).as_secs();
        assert!(whole >= 1 && u64::from(whole) * 30 <= took + 30, "{whole} in {took} s");
        day.audits.generation_moved(20, 21);
        day.look(Stage::spoke(), 21, Vec::new());
        assert_eq!(day.audits.likely, None, "our own table is none");
    }

    #[test]
    fn what_fails_is_tried_again_later_and_later() {
        let mut day = Day::new();
        let mut waits = Vec::new();
        day.look(Stage::spoke(), 1, Vec::new());
        for _ in 0..9 {
            let due = day.audits.due().expect("something is due");
            waits.push(due.saturating_duration_since(day.now).as_secs());
            day.now = day.now.max(due);
            let extent = day.audits.choose(day.now);
            let ended =
                Ended { answer: Ok(Answer::Failed("no".into())), extent, at: clock::now(), took: QUICK };
            day.audits.take(ended, day.now);
            let (_, mut snapshot) = Stage::spoke().set();
            day.audits.tell(&mut snapshot);
            assert!(snapshot.gap(crate::observed::Facet::Audit).is_some());
            day.look(Stage::spoke(), 1, Vec::new());
        }
        assert_eq!(waits, [2, 60, 120, 240, 480, 960, 1920, 3600, 3600]);
    }
}
