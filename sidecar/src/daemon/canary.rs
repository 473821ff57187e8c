//! Whether our controls hold, by trial: at start, hourly, and soon after what they stand on
//! has changed. Packets that must be refused are sent and must be refused, packets are
//! counted, and a change of our table that harms nobody must be undone. One at a time, never
//! beside an audit, each paid for with a rest.
//!
//! What fails is tried once more before it is told: rules may have changed on the way.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinHandle;
use tokio::time::Instant;

use crate::audit::View;
use crate::cli::{INTERNAL_CANARY, Places};
use crate::desired::{CANARY_CHAIN, Desired};
use crate::diff::canary::{Canary, Outcome, counters, firewall, guard};
use crate::diff::{Assessment, Code, Finding};
use crate::observed::Snapshot;
use crate::policy::Mode;
use crate::ruleset::Change;
use crate::source::canary::{Answer, Disturbance, run_in_child, trial};
use crate::source::probe::canary::Trial;

const HOURLY: Duration = Duration::from_secs(3600);
/// A proof that is older than this is none.
const STALE: Duration = Duration::from_secs(2 * 3600);
/// More changes of their kind are waited for.
const SETTLE: Duration = Duration::from_millis(300);
/// What failed is tried once more after this, and what goes on failing this often.
const DOUBTED: Duration = Duration::from_secs(1);
const STANDING: Duration = Duration::from_secs(10);
/// A repair that fails is tried by the daemon itself, too, and told with each try.
const UNREPAIRED: Duration = Duration::from_secs(60);
/// An audit of somebody else is under way.
const BUSY: Duration = Duration::from_secs(5);
/// A trial is paid for with this many times as much rest.
const REST: u32 = 20;

#[derive(Default)]
pub(super) struct Canaries {
    due: Option<Instant>,
    rest_until: Option<Instant>,
    under_way: Option<JoinHandle<Ended>>,
    /// What the last trial stood on.
    stood: Option<Ground>,
    standing: BTreeMap<Canary, Standing>,
    disturbed: Option<Disturbed>,
}

/// Which controls to try.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Asked {
    pub firewall: bool,
    pub guard: bool,
    pub counters: bool,
    pub repair: bool,
}

/// What one control has come to.
#[derive(Clone, Debug, Default)]
struct Standing {
    proven: Option<Instant>,
    /// It failed once, which may have been the moment.
    doubted: bool,
    told: Option<Outcome>,
}

/// What a proof is good for: other rules, interfaces or addresses need another.
struct Ground {
    desired: Arc<Desired>,
    asked: Asked,
    doors: Vec<(u32, Vec<IpAddr>)>,
}

/// The chain that a trial of the repair has put into our table.
struct Disturbed {
    chain: String,
    pid: Option<u32>,
}

pub(super) struct Ended {
    asked: Asked,
    mode: Mode,
    flown: Option<anyhow::Result<Answer>>,
    repaired: Option<anyhow::Result<Option<Duration>>>,
}

impl Canaries {
    /// Takes in what a look has found: a proof does not outlive what it stood on for long.
    pub fn looked(&mut self, desired: &Arc<Desired>, snapshot: &Snapshot, asked: Asked, now: Instant) {
        let ground = Ground::of(desired, snapshot, asked);
        if self.under_way.is_none() && !self.stood.as_ref().is_some_and(|stood| stood.is_same(&ground)) {
            let due = if self.stood.is_none() { now } else { now + SETTLE };
            self.due = Some(self.due.map_or(due, |known| known.min(due)));
        }
    }

    /// Something was put right: whether it holds now is another question.
    pub fn doubt(&mut self, now: Instant) {
        let due = now + SETTLE;
        self.due = Some(self.due.map_or(due, |known| known.min(due)));
    }

    /// When to try; not while a trial is under way, or before the first look.
    pub fn due(&self) -> Option<Instant> {
        let rested = |due: Instant| self.rest_until.map_or(due, |rest| due.max(rest));
        self.due.filter(|_| self.under_way.is_none()).map(rested)
    }

    pub fn is_under_way(&self) -> bool {
        self.under_way.is_some()
    }

    /// The first trial is over, and nothing of it waits for another.
    pub fn are_in(&self) -> bool {
        let waits = |standing: &Standing| standing.doubted && standing.told.is_none();
        self.stood.is_some() && !self.is_under_way() && !self.standing.values().any(waits)
    }

    /// Starts a trial of what is asked.
    pub fn begin(
        &mut self,
        desired: &Arc<Desired>,
        snapshot: &Snapshot,
        places: &Places,
        asked: Asked,
        now: Instant,
    ) {
        self.stood = Some(Ground::of(desired, snapshot, asked));
        self.due = Some(now + HOURLY);
        self.standing.retain(|canary, _| asked.of(*canary));
        let view = View::of(desired, snapshot);
        let Asked { firewall: table, guard, counters, repair } = asked;
        let trial = Trial { table, guard, counters, ..trial(&view, places) };
        // Where no stranger comes in there is nothing to refuse, and nothing is proven.
        let flies = (table || guard || counters) && !trial.targets.is_empty();
        if !flies {
            self.standing.retain(|canary, _| *canary == Canary::Repair);
        }
        let mut disturbance = None;
        // Our table is not touched more often than has to be: other rules are repaired no worse.
        let known = self.standing.get(&Canary::Repair).is_some_and(|standing| standing.is_fresh(now));
        if repair && !known {
            let mut tail = [0; 4];
            // Nobody is harmed where it is no random number.
            let _ = rustix::rand::getrandom(&mut tail, rustix::rand::GetRandomFlags::empty());
            let chain = format!("{CANARY_CHAIN}{:08x}", u32::from_ne_bytes(tail));
            let begun = Disturbance::begin(&chain);
            let pid = begun.as_ref().ok().and_then(Disturbance::pid);
            self.disturbed = Some(Disturbed { chain, pid });
            disturbance = Some(begun);
        }
        let mode = desired.policy.enforce.mode;
        self.under_way = Some(tokio::spawn(async move {
            let repaired = async {
                match disturbance {
                    Some(Ok(disturbance)) => Some(disturbance.outlasted().await),
                    Some(Err(error)) => Some(Err(error)),
                    None => None,
                }
            };
            let flown =
                async { if flies { Some(run_in_child(INTERNAL_CANARY, &trial).await) } else { None } };
            let (repaired, flown) = tokio::join!(repaired, flown);
            Ended { asked, mode, flown, repaired }
        }));
    }

    /// Until the trial that is under way has ended.
    pub async fn ended(&mut self) -> Result<Ended, tokio::task::JoinError> {
        let Some(task) = &mut self.under_way else { return std::future::pending().await };
        let ended = task.await;
        (self.under_way, self.disturbed) = (None, None);
        ended
    }

    /// What it came to. `true`: there is something else to tell than before.
    pub fn take(&mut self, ended: Result<Ended, tokio::task::JoinError>, now: Instant) -> bool {
        let before = self.told();
        match ended {
            Ok(ended) => self.judge(ended, now),
            Err(error) => {
                log::debug!("a trial of the controls broke off: {error}");
                self.due = Some(now + BUSY);
            }
        }
        self.told() != before
    }

    fn judge(&mut self, ended: Ended, now: Instant) {
        let Ended { asked, mode, flown, repaired } = ended;
        let mut outcomes = Vec::new();
        let mut cost = Duration::ZERO;
        match flown {
            None => {}
            Some(Ok(Answer::Flown { flights, cost: spent })) => {
                log::debug!("canaries: {flights:?}");
                cost = spent;
                let flown = [
                    (Canary::Firewall, asked.firewall.then(|| firewall(&flights, mode))),
                    (Canary::Guard, asked.guard.then(|| guard(&flights))),
                    (Canary::Counters, asked.counters.then(|| counters(&flights))),
                ];
                // Strangers come by none of these interfaces, or could not be answered.
                if !flights.is_empty() {
                    outcomes.extend(flown);
                }
            }
            Some(Ok(Answer::Busy)) => self.due = Some(now + BUSY),
            Some(Ok(Answer::Failed(why))) => outcomes.extend(untried(asked, &why)),
            Some(Err(error)) => outcomes.extend(untried(asked, &format!("{error:#}"))),
        }
        let repaired = repaired.map(|repaired| match repaired {
            Ok(Some(took)) => {
                log::debug!("canary: our table was put right within {took:.0?}");
                Outcome::Proven
            }
            Ok(None) => Outcome::Failed("a chain that is not ours stayed in our table".into()),
            Err(error) => Outcome::Untried(format!("{error:#}")),
        });
        outcomes.push((Canary::Repair, repaired));
        self.rest_until = Some(now + cost * REST);
        for (canary, outcome) in outcomes {
            let Some(outcome) = outcome else { continue };
            let again = self.standing.entry(canary).or_default().take(canary, outcome, now);
            if let Some(again) = again {
                self.due = Some(self.due.map_or(now + again, |due| due.min(now + again)));
            }
        }
    }

    /// Whether this control was seen to do what it is there for, not long ago, and not to fail
    /// since.
    pub fn holds(&self, canary: Canary, now: Instant) -> bool {
        self.proven(canary).is_some_and(|at| now.saturating_duration_since(at) < STALE)
    }

    pub fn is_proven_since(&self, canary: Canary, then: Instant) -> bool {
        self.proven(canary).is_some_and(|at| at >= then)
    }

    fn proven(&self, canary: Canary) -> Option<Instant> {
        self.standing.get(&canary)?.proven
    }

    /// What is to be told besides the findings of a look.
    pub fn tell(&self, out: &mut Assessment) {
        self.told().into_iter().for_each(|(canary, outcome)| outcome.tell(canary, out));
    }

    fn told(&self) -> Vec<(Canary, Outcome)> {
        let told = |(canary, standing): (&Canary, &Standing)| Some((*canary, standing.told.clone()?));
        self.standing.iter().filter_map(told).collect()
    }

    /// Whether this process has changed our table for a trial.
    pub fn is_by(&self, pid: u32) -> bool {
        self.disturbed.as_ref().is_some_and(|disturbed| disturbed.pid == Some(pid))
    }

    /// The trial of the repair, and nothing else, is what was found: no drift.
    pub fn is_all_of(&self, finding: &Finding) -> bool {
        let found =
            |disturbed: &Disturbed| Change::ChainForeign { chain: disturbed.chain.clone() }.to_string();
        finding.code == Code::FirewallChanged
            && self.disturbed.as_ref().is_some_and(|disturbed| found(disturbed) == finding.found)
    }
}

impl Asked {
    const fn of(self, canary: Canary) -> bool {
        match canary {
            Canary::Firewall => self.firewall,
            Canary::Guard => self.guard,
            Canary::Counters => self.counters,
            Canary::Repair => self.repair,
        }
    }
}

impl Standing {
    fn is_fresh(&self, now: Instant) -> bool {
        !self.doubted && self.proven.is_some_and(|at| now.saturating_duration_since(at) < HOURLY / 2)
    }

    /// When to try again, if it did not hold.
    fn take(&mut self, canary: Canary, outcome: Outcome, now: Instant) -> Option<Duration> {
        // The repair has had longer than a moment.
        let lasting = canary == Canary::Repair && matches!(outcome, Outcome::Failed(_));
        match outcome {
            Outcome::Proven => {
                *self = Self { proven: Some(now), doubted: false, told: None };
                None
            }
            outcome if self.doubted || lasting => {
                *self = Self { proven: None, doubted: true, told: Some(outcome) };
                Some(if lasting { UNREPAIRED } else { STANDING })
            }
            _ => {
                self.doubted = true;
                Some(DOUBTED)
            }
        }
    }
}

impl Ground {
    fn of(desired: &Arc<Desired>, snapshot: &Snapshot, asked: Asked) -> Self {
        let view = View::of(desired, snapshot);
        let aims = crate::audit::aims(&view, None, None);
        let doors = crate::audit::by_link(&aims).into_iter();
        let doors = doors.map(|(link, aims)| (link.index, aims.iter().map(|aim| aim.address).collect()));
        Self { desired: Arc::clone(desired), asked, doors: doors.collect() }
    }

    fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.desired, &other.desired) && self.asked == other.asked && self.doors == other.doors
    }
}

fn untried(asked: Asked, why: &str) -> Vec<(Canary, Option<Outcome>)> {
    let flown = Canary::ALL.into_iter().filter(|canary| *canary != Canary::Repair);
    flown.map(|c| (c, asked.of(c).then(|| Outcome::Untried(why.to_owned())))).collect()
}

/// The whole life of the child that sends them.
pub fn run_child() -> anyhow::Result<()> {
    crate::source::canary::run_from_stdin()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::diff::stage::Stage;

    fn failed() -> Outcome {
        Outcome::Failed("so".into())
    }

    fn taken(canaries: &mut Canaries, outcome: Outcome, now: Instant) {
        let again = canaries.standing.entry(Canary::Guard).or_default().take(Canary::Guard, outcome, now);
        canaries.due = again.map(|again| now + again);
    }

    #[test]
    fn what_fails_once_is_tried_again_and_what_fails_twice_is_told() {
        let (mut canaries, now) = (Canaries::default(), Instant::now());
        assert!(!canaries.holds(Canary::Guard, now), "nothing is proven before it is tried");
        taken(&mut canaries, failed(), now);
        assert_eq!((canaries.told(), canaries.due), (Vec::new(), Some(now + DOUBTED)));
        assert!(!canaries.holds(Canary::Guard, now));
        taken(&mut canaries, Outcome::Proven, now);
        assert!(canaries.holds(Canary::Guard, now) && !canaries.holds(Canary::Firewall, now));
        taken(&mut canaries, failed(), now);
        assert!(canaries.holds(Canary::Guard, now), "the moment may have been a bad one");
        taken(&mut canaries, failed(), now);
        assert!(!canaries.holds(Canary::Guard, now));
        assert_eq!((canaries.told(), canaries.due), (vec![(Canary::Guard, failed())], Some(now + STANDING)));
        taken(&mut canaries, Outcome::Proven, now);
        assert!(canaries.holds(Canary::Guard, now) && canaries.told().is_empty());
        assert!(!canaries.holds(Canary::Guard, now + STALE), "a proof does not last");
        let mut repair = Standing { proven: Some(now), ..Standing::default() };
        assert_eq!(repair.take(Canary::Repair, Outcome::Untried("no nft".into()), now), Some(DOUBTED));
        assert_eq!((repair.take(Canary::Repair, failed(), now), repair.proven), (Some(UNREPAIRED), None));
    }

    #[test]
    fn tried_at_start_and_after_what_it_stands_on_has_changed() {
        let now = Instant::now();
        let (desired, snapshot) = Stage::spoke().set();
        let desired = Arc::new(desired);
        let asked = Asked { firewall: true, ..Asked::default() };
        let mut canaries = Canaries::default();
        assert_eq!(canaries.due(), None, "not before the first look");
        canaries.looked(&desired, &snapshot, asked, now);
        assert_eq!(canaries.due(), Some(now));
        canaries.stood = Some(Ground::of(&desired, &snapshot, asked));
        canaries.due = Some(now + HOURLY);
        canaries.looked(&desired, &snapshot, asked, now);
        assert_eq!(canaries.due(), Some(now + HOURLY), "nothing has changed");
        let other = Arc::new(Stage::spoke().set().0);
        for (desired, asked) in [(&other, asked), (&desired, Asked { guard: true, ..asked })] {
            canaries.due = Some(now + HOURLY);
            canaries.looked(desired, &snapshot, asked, now);
            assert_eq!(canaries.due(), Some(now + SETTLE));
        }
        canaries.rest_until = Some(now + STANDING);
        assert_eq!(canaries.due(), Some(now + STANDING), "a change a second costs no trial a second");
    }

    #[test]
    fn only_the_very_chain_of_the_trial_is_no_drift() {
        let mut canaries = Canaries::default();
        let of = |code: Code, found: &str| Finding::new(code, code.severity(), "table", "", found, "");
        let own = of(Code::FirewallChanged, "not ours: chain canary-1");
        assert!(!canaries.is_all_of(&own) && !canaries.is_by(7));
        canaries.disturbed = Some(Disturbed { chain: "canary-1".into(), pid: Some(7) });
        assert!(canaries.is_all_of(&own) && canaries.is_by(7) && !canaries.is_by(8));
        for found in ["not ours: chain canary-2", "not ours: chain canary-1 and the whole table"] {
            assert!(!canaries.is_all_of(&of(Code::FirewallChanged, found)), "{found}");
        }
        assert!(!canaries.is_all_of(&of(Code::FirewallMissing, "not ours: chain canary-1")));
    }
}
