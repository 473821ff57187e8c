//! Which rules the daemon keeps: those on trial while they are, the last confirmed ones
//! after that.
//!
//! Whoever changes which rules stand says so in the run directory first (see
//! [`crate::apply::trial`]); the daemon looks there before each repair and follows. So it
//! never repairs against a command's change, nor against a watchdog that puts the old rules
//! back. A policy that was rolled back is not tried again until it changes or an operator
//! applies it.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::Duration;

use tokio::time::Instant;

use super::eventlog::EventKind;
use super::{Daemon, warn};
use crate::apply::trial::{BringError, Brought, End, Glance, Ledger, Phase, Trial};
use crate::apply::{self, sealed};
use crate::cli::Places;
use crate::desired::Desired;
use crate::diff::{Code, Finding, Severity};
use crate::observed::Facet;
use crate::policy;
use crate::source::evidence::{self, Sought};
use crate::sys::clock;
use crate::terms::{Stamp, counted};

/// How often connections are looked at during a trial: sshd is done with a short one in
/// less than a second.
const LOOK: Duration = Duration::from_millis(100);
/// And at most a twentieth of the time.
const LOOK_SHARE: u32 = 20;
/// How soon a change is tried again while another command makes one.
const BUSY: Duration = Duration::from_millis(100);

/// What stands, and what does not.
pub struct Standing {
    pub ledger: Ledger,
    /// As it was followed last.
    pub glance: Glance,
    watch: Option<Watch>,
    /// The fingerprint of the policy that was taken up last, whatever became of it.
    wanted: String,
    /// What could not be brought in yet.
    pending: Option<(Box<Desired>, Instant)>,
    /// The first mistake of a policy file that was not taken up.
    pub mistake: Option<String>,
    /// Why what was taken up is not in force.
    hindrance: Option<String>,
    /// The policy that was rolled back, while the file still says it.
    refused: Option<String>,
    /// The trial that was last gone back from.
    gone_back: Option<String>,
    /// Why a boot would not come up with the rules in force.
    unsealed: Option<String>,
    /// The policy that was confirmed last, as of the last trial or rollback.
    before: Option<String>,
}

/// A trial that is waiting for its evidence.
struct Watch {
    trial: Trial,
    sought: Option<Sought>,
    old: BTreeSet<u64>,
    next: Instant,
    /// Connections could not be looked at, and it was said.
    blind: bool,
    /// The way back was taken away, and it was said.
    lost: bool,
}

impl Standing {
    pub fn new(places: &Places, wanted: String) -> Self {
        Self {
            ledger: Ledger::new(places),
            glance: None,
            watch: None,
            wanted,
            pending: None,
            mistake: None,
            hindrance: None,
            refused: None,
            gone_back: None,
            unsealed: None,
            before: None,
        }
    }

    /// The fingerprint of what the policy file says, as far as it was taken up.
    pub fn wanted(&self) -> &str {
        &self.wanted
    }

    /// Whether the rules in force may still be rolled back.
    pub fn is_on_trial(&self) -> bool {
        matches!(self.glance, Some((Phase::Armed | Phase::Firing, _)))
    }

    /// What a rollback leads back to, or led; `None`: to no rules of ours.
    pub fn before(&self) -> Option<&str> {
        self.before.as_deref()
    }

    /// For `status`: how the rules stand, and until when.
    pub fn state(&self) -> (super::socket::Rules, Option<Stamp>) {
        use super::socket::Rules;
        match (&self.watch, &self.refused) {
            // By the wall's clock as it is now: what counts the time down is another.
            (Some(watch), _) => (Rules::OnTrial, Some(ends(&watch.trial))),
            (None, Some(_)) => (Rules::RolledBack, None),
            (None, None) if self.pending.is_some() => (Rules::NotInForce, None),
            (None, None) => (Rules::Confirmed, None),
        }
    }

    /// What an operator has to know of it.
    pub fn findings(&self, file: &Path, in_force: &str) -> Vec<Finding> {
        let file = file.display();
        let mut out = Vec::new();
        if let Some(refused) = &self.refused {
            out.push(rolled_back(refused, self.before()));
        }
        for (what, next) in [
            (&self.mistake, "Correct it: `spokeguard policy check` shows every mistake."),
            (&self.hindrance, "Remove the cause; it is tried again every 10 s."),
        ] {
            if let Some(what) = what {
                out.push(Finding::new(
                    Code::PolicyNotLoaded,
                    Severity::High,
                    format!("policy file {file}"),
                    "the policy of the file, in force",
                    format!("{what}; policy {in_force} stays in force"),
                    next,
                ));
            }
        }
        out.extend(self.unsealed.as_deref().map(unsealed));
        out
    }
}

/// The finding for a policy that nobody confirmed. `before`: the one that was confirmed last.
pub fn rolled_back(fingerprint: &str, before: Option<&str>) -> Finding {
    let stands = before.map_or_else(
        || {
            "what was there before is back: none was ever confirmed, and NO rules of ours are in force"
                .to_owned()
        },
        |policy| format!("the rules before it are back; policy {policy} is what counts"),
    );
    Finding::new(
        Code::PolicyRolledBack,
        Severity::High,
        format!("policy {fingerprint}"),
        "the policy of the file, confirmed and in force",
        format!("nobody confirmed it in time, and {stands}"),
        "Find out why the hub could not connect, then correct the policy, or `spokeguard apply` it again.",
    )
}

/// The finding for sealed rules that are not those of the last confirmed policy.
pub fn unsealed(why: &str) -> Finding {
    Finding::new(
        Code::SealedRules,
        Severity::Medium,
        format!("file {}", sealed::FILE),
        "the rules of the last confirmed policy, for the next boot",
        why,
        "Make the state directory writable; the daemon, `apply` and `confirm` write the file anew.",
    )
}

/// When the rules before come back, in whole seconds.
fn ends(trial: &Trial) -> Stamp {
    let left = i64::try_from(trial.left().as_secs()).unwrap_or(i64::MAX);
    Stamp::from_unix(clock::now().0.as_second().saturating_add(left))
}

impl Daemon {
    /// At start: enforcement first. What is not the last confirmed policy goes on trial.
    pub(super) fn stand(&mut self) {
        let desired = Desired::clone(&self.desired);
        // Until it is known what stands, nothing of ours is repaired.
        self.set_bare();
        let lock = match self.standing.ledger.lock() {
            Ok(lock) => lock,
            Err(error) => return self.hinder(desired, &error),
        };
        if let Err(error) = self.standing.ledger.settle(&lock, desired.today) {
            warn("an earlier change", error);
        }
        let fingerprint = policy::fingerprint(&desired.policy);
        if self.standing.ledger.refused().is_some_and(|refused| refused.fingerprint == fingerprint) {
            match self.standing.ledger.restore(&lock, desired.today) {
                Ok(true) => log::warn!("the sealed rules were put in force"),
                Ok(false) => {}
                Err(error) => warn("the sealed rules", error),
            }
            drop(lock);
            self.standing.glance = self.standing.ledger.glance().unwrap_or_default();
            self.go_back(&desired, fingerprint);
            self.check_sealed();
            match apply::apply_table(&self.desired) {
                Ok(_) => {}
                Err(error) => warn("the last confirmed rules", error.into()),
            }
            return;
        }
        self.bring_in(&lock, desired);
    }

    /// The policy file says something else now.
    pub(super) fn take_up(&mut self, desired: Desired) {
        let fingerprint = policy::fingerprint(&desired.policy);
        self.follow();
        if fingerprint == self.standing.wanted && self.standing.pending.is_none() {
            if self.standing.refused.is_some() {
                log::warn!("policy {fingerprint} was rolled back: `spokeguard apply` tries it again");
            }
            return;
        }
        self.standing.wanted = fingerprint;
        match self.standing.ledger.try_lock() {
            Ok(Some(lock)) => self.bring_in(&lock, desired),
            Ok(None) => self.standing.pending = Some((Box::new(desired), Instant::now() + BUSY)),
            Err(error) => self.hinder(desired, &error),
        }
    }

    /// A policy file that can't be taken up. Told once: the file is looked at again only
    /// after it has changed.
    pub(super) fn refuse(&mut self, file: &Path, mistake: String) {
        log::error!("{} is not taken up: {mistake}", file.display());
        if self.standing.mistake.as_ref() != Some(&mistake) {
            self.note_text(EventKind::PolicyRejected, mistake.clone());
            self.standing.mistake = Some(mistake);
        }
        self.wake([Facet::Files], Duration::ZERO);
    }

    fn bring_in(&mut self, lock: &apply::trial::Lock, desired: Desired) {
        let within = desired.policy.enforce.confirm_within;
        let begun = self.uptime.elapsed();
        let brought = self.standing.ledger.bring_in(lock, &desired, within);
        let took = self.uptime.elapsed() - begun;
        let (pending, hindered) = (self.standing.pending.take(), self.standing.hindrance.take());
        let fingerprint = policy::fingerprint(&desired.policy);
        match brought {
            Ok(Brought::Confirmed { changes, unrecorded }) => {
                match changes.len() {
                    0 => log::info!("the rules were in force already"),
                    count => {
                        log::info!("rules put in force: {} in {took:.1?}", counted(count as u64, "change"));
                        self.glass.closed();
                    }
                }
                self.standing.unsealed = unrecorded.map(|error| {
                    warn("a boot will not know of these rules", anyhow::anyhow!("{error:#}"));
                    format!("{error:#}")
                });
            }
            Ok(Brought::OnTrial { changes, .. }) => {
                log::info!("rules put in force: {} in {took:.1?}", counted(changes.len() as u64, "change"));
            }
            Ok(Brought::NotWanted { taken_back }) => {
                log::info!("[enforce] firewall = false: no rules of ours are kept");
                if let Some(policy) = taken_back {
                    let text =
                        format!("policy {policy}: taken back, since the policy file wants no rules now");
                    self.note_text(EventKind::PolicyRolledBack, text);
                }
            }
            Err(BringError::Half(error)) => {
                self.repair_fails = true;
                log::error!("the rules are NOT in force: {:#}", anyhow::Error::from(error));
            }
            Err(BringError::Before(error)) => {
                (self.standing.pending, self.standing.hindrance) = (pending, hindered);
                return self.hinder(desired, &error);
            }
        }
        self.repair_fails &= hindered.is_none();
        self.standing.wanted = fingerprint;
        self.standing.refused = None;
        self.swap(desired);
        self.standing.glance = self.standing.ledger.glance().unwrap_or_default();
        self.watch_trial();
        if self.standing.watch.is_none() {
            self.note_text(EventKind::PolicyLoaded, format!("policy {}", self.policy_hash));
        }
    }

    /// It can't be brought in. What was confirmed before stays, or comes back.
    fn hinder(&mut self, desired: Desired, error: &anyhow::Error) {
        let text = format!("it could not be put in force: {error:#}");
        if self.standing.hindrance.as_ref() != Some(&text) {
            log::error!("the rules are NOT in force: {error:#}");
            self.note_text(EventKind::PolicyRejected, text.clone());
        }
        self.standing.hindrance = Some(text);
        self.repair_fails = true;
        if self.desired.table.is_none() && desired.table.is_some() {
            self.set_confirmed(&desired);
        }
        self.standing.pending = Some((Box::new(desired), Instant::now() + super::TICK));
        self.wake([Facet::Files], Duration::ZERO);
    }

    /// Does what the run directory says. To be called before every repair: it costs some
    /// 10 us. `true`: other rules stand now.
    pub(super) fn follow(&mut self) -> bool {
        let glance = match self.standing.ledger.glance() {
            Ok(glance) => glance,
            Err(error) => {
                log::debug!("trials: {error:#}");
                return false;
            }
        };
        if glance == self.standing.glance {
            return false;
        }
        let before = std::mem::replace(&mut self.standing.glance, glance);
        match self.standing.glance.clone() {
            Some((Phase::Armed, _)) => self.follow_trial(),
            Some((Phase::Firing | Phase::Fired, _)) => {
                let id = self.standing.glance.as_ref().map(|(_, id)| id.clone());
                if self.standing.gone_back != id {
                    self.standing.gone_back = id;
                    let trial = self.standing.ledger.read(&self.standing.glance);
                    let fingerprint =
                        trial.map_or_else(|| self.policy_hash.clone(), |trial| trial.fingerprint);
                    let desired = Desired::clone(&self.desired);
                    self.go_back(&desired, fingerprint);
                }
            }
            Some((Phase::Confirmed, _)) | None => return self.end_trial(before),
        }
        true
    }

    /// A command has put a policy on trial.
    fn follow_trial(&mut self) {
        let Some(trial) = self.standing.ledger.read(&self.standing.glance) else { return };
        if trial.fingerprint != self.policy_hash || self.desired.table.is_none() {
            let today = crate::cli::today(clock::now());
            let desired = policy::parse(&trial.text, "the policy on trial", today)
                .map_err(anyhow::Error::from)
                .and_then(|loaded| Ok(Desired::new(loaded.policy, today)?));
            match desired {
                Ok(desired) => self.swap(desired),
                Err(error) => return warn("the policy on trial", error),
            }
        }
        self.standing.wanted.clone_from(&trial.fingerprint);
        self.standing.refused = None;
        self.standing.pending = None;
        self.standing.hindrance = None;
        self.watch_trial();
    }

    fn watch_trial(&mut self) {
        let armed = matches!(self.standing.glance, Some((Phase::Armed, _)));
        let Some(trial) = self.standing.ledger.read(&self.standing.glance).filter(|_| armed) else {
            self.standing.watch = None;
            return;
        };
        let until = ends(&trial);
        let sought = Sought::new(&self.desired);
        let who = match &sought {
            Some(sought) => format!(
                "a new connection from {} through {}, or `spokeguard confirm`,",
                crate::diff::listed(&sought.peers, 3),
                sought.interface
            ),
            None => "nothing but `spokeguard confirm`".to_owned(),
        };
        let today = crate::cli::today(clock::now());
        let before = self.standing.ledger.confirmed(today).map(|last| policy::fingerprint(&last.policy));
        let back_to = before.as_ref().map_or_else(
            || "no rules of ours, since none was ever confirmed".to_owned(),
            |policy| format!("policy {policy}"),
        );
        self.standing.before = before;
        let text = format!(
            "policy {}: {who} keeps it; else it is rolled back at {until} to {back_to}",
            trial.fingerprint
        );
        self.note_text(EventKind::PolicyOnTrial, text);
        // A command that was killed may not have come to note them. Then all that are there
        // now are old ones.
        let old = self
            .standing
            .ledger
            .old(&trial)
            .unwrap_or_else(|| self.standing.ledger.note_old(&trial, &self.desired));
        let next = Instant::now() + LOOK;
        self.standing.watch = Some(Watch { trial, sought, old, next, blind: false, lost: false });
    }

    /// The trial that was watched has ended. `false`: how can't be told yet.
    fn end_trial(&mut self, before: Glance) -> bool {
        let Some(watch) = &mut self.standing.watch else { return true };
        let today = crate::cli::today(clock::now());
        let replaced = match &self.standing.glance {
            Some((_, id)) if *id == watch.trial.id => None,
            _ => {
                let ledger = &self.standing.ledger;
                let Ok(Some(lock)) = ledger.try_lock() else {
                    self.standing.glance = before;
                    return false;
                };
                if let Err(error) = ledger.settle(&lock, today) {
                    warn("an earlier change", error);
                }
                self.standing.glance = ledger.glance().unwrap_or_default();
                if self.standing.glance.is_some() {
                    // Another trial has begun.
                    self.standing.glance = before;
                    return false;
                }
                match ledger.end_of(&lock, &watch.trial, today) {
                    End::Confirmed => None,
                    End::Replaced(stands) => Some(stands),
                    End::Lost => {
                        self.standing.glance = before;
                        if !std::mem::replace(&mut watch.lost, true) {
                            log::error!("the files of the rollback were taken away: it is done at once");
                        }
                        if let Err(error) = ledger.fall_back(&lock, &watch.trial, today) {
                            log::debug!("{error:#}");
                            return false;
                        }
                        drop(lock);
                        return self.follow();
                    }
                }
            }
        };
        let fingerprint = watch.trial.fingerprint.clone();
        self.standing.watch = None;
        match replaced {
            Some(stands) => {
                self.standing.wanted = policy::fingerprint(&stands.policy);
                self.swap(*stands);
            }
            None => {
                self.note_text(EventKind::PolicyConfirmed, format!("policy {fingerprint}"));
                // What these rules refuse is cut now that they stay.
                self.glass.closed();
                self.wake([Facet::Nftables], Duration::ZERO);
            }
        }
        self.check_sealed();
        true
    }

    /// The rules that were on trial are not in force any more.
    fn go_back(&mut self, of: &Desired, fingerprint: String) {
        self.standing.watch = None;
        // What the file says meanwhile, and could not be put in force yet, was not refused.
        let of_file =
            self.standing.pending.take_if(|(desired, _)| policy::fingerprint(&desired.policy) == fingerprint);
        drop(of_file);
        if self.standing.pending.is_none() {
            self.standing.wanted.clone_from(&fingerprint);
            self.standing.refused = Some(fingerprint.clone());
        }
        self.set_confirmed(of);
        let stands = match &self.desired.table {
            Some(_) => format!("policy {}, confirmed last, is in force", self.policy_hash),
            None => {
                "what was there before any was confirmed is back: NO rules of ours are in force".to_owned()
            }
        };
        let text = format!("policy {fingerprint}: nobody confirmed it in time; {stands}");
        log::error!("rolled back: {text}");
        self.note_text(EventKind::PolicyRolledBack, text);
        self.wake(Facet::ALL, Duration::ZERO);
    }

    /// The last confirmed policy, or if there is none, no rules of ours.
    fn set_confirmed(&mut self, otherwise: &Desired) {
        match self.standing.ledger.confirmed(crate::cli::today(clock::now())) {
            Some(confirmed) => {
                self.standing.before = Some(policy::fingerprint(&confirmed.policy));
                self.swap(confirmed);
            }
            None => {
                self.standing.before = None;
                self.swap(Desired { table: None, guard: None, ..otherwise.clone() });
            }
        }
    }

    fn set_bare(&mut self) {
        self.desired =
            std::sync::Arc::new(Desired { table: None, guard: None, ..Desired::clone(&self.desired) });
        self.transaction = None;
        self.replay = None;
    }

    /// When [`Self::on_trial`] has something to do.
    pub(super) fn trial_due(&self) -> Option<Instant> {
        let pending = self.standing.pending.as_ref().map(|(_, at)| *at);
        self.standing.watch.as_ref().map(|watch| watch.next).into_iter().chain(pending).min()
    }

    /// Looks for the evidence that ends a trial, and tries again what could not be begun.
    pub(super) fn on_trial(&mut self) {
        self.follow();
        let now = Instant::now();
        if self.standing.pending.as_ref().is_some_and(|(_, at)| *at <= now)
            && let Some((desired, _)) = self.standing.pending.take()
        {
            match self.standing.ledger.try_lock() {
                Ok(Some(lock)) => self.bring_in(&lock, *desired),
                Ok(None) => self.standing.pending = Some((desired, now + BUSY)),
                Err(error) => self.hinder(*desired, &error),
            }
        }
        let Some(watch) = self.standing.watch.as_mut().filter(|watch| watch.next <= now) else { return };
        let begun = std::time::Instant::now();
        let found = watch.sought.as_ref().map(|sought| evidence::find(sought, &watch.old));
        watch.next = now + LOOK.max(begun.elapsed() * LOOK_SHARE);
        let today = crate::cli::today(clock::now());
        match found {
            Some(Ok(Some(connection))) => {
                let Ok(Some(lock)) = self.standing.ledger.try_lock() else { return };
                match self.standing.ledger.look(&lock, today) {
                    Ok(Some(Ok(in_force))) => {
                        log::info!("confirmed by {} at port {}", connection.peer, connection.port);
                        if let Err(error) = self.standing.ledger.confirm(&lock, &in_force, today) {
                            warn("confirmation", error);
                        }
                    }
                    // It came in by other rules, and says nothing of these.
                    Ok(Some(Err(_))) => {
                        let old = self.standing.ledger.note_old(&watch.trial, &self.desired);
                        watch.old.extend(old);
                    }
                    Ok(None) => {}
                    Err(error) => log::debug!("the rules on trial: {error:#}"),
                }
                drop(lock);
                self.follow();
                return;
            }
            Some(Err(error)) if !watch.blind => {
                watch.blind = true;
                warn("connections can't be looked at; `spokeguard confirm` confirms", error);
            }
            _ => {}
        }
        if watch.trial.left().is_zero()
            && let Ok(Some(lock)) = self.standing.ledger.try_lock()
        {
            if let Err(error) = self.standing.ledger.settle(&lock, today) {
                warn("rollback", error);
            }
            drop(lock);
            self.follow();
        }
    }

    /// At every tick: what others left unfinished.
    pub(super) fn settle(&mut self) {
        self.follow();
        let unfinished = self.standing.ledger.is_unrecorded()
            || matches!(self.standing.glance, Some((Phase::Confirmed | Phase::Firing | Phase::Fired, _)))
            // A token that can't be read.
            || (matches!(self.standing.glance, Some((Phase::Armed, _))) && self.standing.watch.is_none());
        if unfinished && let Ok(Some(lock)) = self.standing.ledger.try_lock() {
            let today = crate::cli::today(clock::now());
            let settled = self.standing.ledger.settle(&lock, today);
            drop(lock);
            match settled {
                Ok(()) => self.check_sealed(),
                Err(error) => self.standing.unsealed = Some(format!("{error:#}")),
            }
            self.follow();
        }
    }

    /// The sealed rules are ours to keep: what somebody changed is written anew.
    pub(super) fn check_sealed(&mut self) {
        let today = crate::cli::today(clock::now());
        let ledger = &self.standing.ledger;
        if let Some((Phase::Confirmed, _)) = self.standing.glance {
            return;
        }
        let Some(why) = ledger.unsealed(today) else {
            self.standing.unsealed = ledger.complete(today).err().map(|error| format!("{error:#}"));
            return;
        };
        // Where the file can't be read, this process still knows what was in it.
        let is_known = matches!(self.standing.state().0, super::socket::Rules::Confirmed)
            && self.desired.table.is_some()
            && self.standing.glance.is_none();
        let known = || is_known.then(|| Desired::clone(&self.desired));
        match ledger.confirmed(today).or_else(known).map(|confirmed| ledger.record(&confirmed.policy, today))
        {
            Some(Ok(())) => {
                self.standing.unsealed = None;
                log::warn!("{}: {why}; written anew", sealed::FILE);
                self.note(EventKind::Repaired, Some(&unsealed(&why)), None);
            }
            Some(Err(error)) => self.standing.unsealed = Some(format!("{why}; {error:#}")),
            None => self.standing.unsealed = Some(why),
        }
    }
}
