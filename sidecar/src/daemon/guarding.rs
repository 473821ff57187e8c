//! The second layer in the loop: the tc guard is put in force at the start, follows the
//! interfaces, and is looked at and put right at every tick.

use std::collections::BTreeMap;
use std::path::Path;

use crate::apply;
use crate::desired::{Desired, GuardRules};
use crate::observed::{Amount, Link};
use crate::source::bpf::guard::{self, Force, Guard};
use crate::source::links;

#[derive(Default)]
pub(super) struct Guarding {
    guard: Option<Guard>,
    /// Why it is not in force as declared, if so.
    pub(super) gap: Option<String>,
    /// What was last put in force, and whether it waited for a confirmation then: other rules
    /// since, or that it waits no longer, are not drift.
    last: Option<(GuardRules, bool)>,
    /// Names and numbers of the interfaces that it is on.
    on: Vec<(String, u32)>,
}

/// What keeping it in force came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Kept {
    /// It was in force.
    Sound,
    /// It is now; this was found.
    Restored(String),
    /// Why it is not.
    Failed(String),
}

impl Guarding {
    /// Adopts what the loader pinned. `failed`: what the loader said, if it failed.
    pub(super) fn start(pins: &Path, desired: &Desired, waits: bool, failed: Option<String>) -> Self {
        let mut this = Self::default();
        let Some(rules) = &desired.guard else {
            // As declared: nothing is refused. A table of ours stays until `release`, and so does
            // a guard in force whose policy can't be read any more.
            let stays = desired.policy.enforce.firewall
                && Guard::open(pins).is_ok_and(|guard| {
                    guard.is_some_and(|guard| guard.force().is_ok_and(|force| force != Force::Nothing))
                });
            if !stays && let Err(error) = guard::release(pins) {
                log::warn!("the tc guard could not be taken away: {error:#}");
            }
            return this;
        };
        let opened = Guard::open(pins)
            .and_then(|guard| guard.ok_or_else(|| anyhow::anyhow!(failed.unwrap_or("not loaded".into()))));
        match opened {
            Ok(guard) => this.guard = Some(guard),
            Err(error) => {
                this.gap = Some(format!("{error:#}"));
                log::warn!("the second layer, the tc guard, is not active: {error:#}");
                return this;
            }
        }
        if let Err(error) = apply::guard::carry_glass(pins) {
            log::warn!("break-glass in the tc guard: {error:#}");
        }
        match links::read() {
            Ok(links) => {
                let kept = this.keep(rules, &links, waits);
                match kept {
                    Kept::Failed(why) => log::warn!("the tc guard is not in force: {why}"),
                    _ => log::info!("the second layer, the tc guard: {}", this.told()),
                }
            }
            Err(error) => this.gap = Some(format!("{error:#}")),
        }
        this
    }

    /// Makes it what is declared: these rules, on the public ones of these interfaces. While
    /// a change waits for its confirmation, the rules before it let in as well.
    pub(super) fn keep(&mut self, rules: &GuardRules, links: &[Link], waits: bool) -> Kept {
        let Some(guard) = &mut self.guard else {
            return Kept::Failed(self.gap.clone().unwrap_or_default());
        };
        let kept = keep(guard, rules, links, waits, &self.on);
        let kept = match kept {
            Kept::Restored(_)
                if self.last.as_ref().is_none_or(|last| (&last.0, last.1) != (rules, waits)) =>
            {
                Kept::Sound
            }
            kept => kept,
        };
        self.last = Some((rules.clone(), waits));
        let mut unread = None;
        match guard.attached() {
            Ok(on) => {
                let on = links.iter().filter(|l| on.contains(&l.name));
                self.on = on.map(|l| (l.name.clone(), l.index)).collect();
                self.on.sort_unstable();
            }
            // Where it was stays known, or what is taken away meanwhile would pass for new.
            Err(error) => unread = Some(format!("where it stands can't be read: {error:#}")),
        }
        let kept = match (kept, &unread) {
            (Kept::Sound, Some(why)) => Kept::Failed(why.clone()),
            (kept, _) => kept,
        };
        self.gap = if let Kept::Failed(why) = &kept { Some(why.clone()) } else { unread };
        kept
    }

    /// Whether there is one to keep.
    pub(super) fn runs(&self) -> bool {
        self.guard.is_some()
    }

    pub(super) fn is_pinned(&self) -> bool {
        self.guard.as_ref().is_some_and(Guard::is_pinned)
    }

    /// Whether it is in force, as far as the last look at it tells.
    pub(super) fn holds(&self) -> bool {
        self.guard.is_some() && self.gap.is_none() && !self.on.is_empty()
    }

    /// For `status`, one line.
    pub(super) fn told(&self) -> String {
        match &self.gap {
            Some(gap) => format!("not active: {gap}"),
            None if self.guard.is_none() => "off".to_owned(),
            None if self.on.is_empty() => "on no interface: none is public".to_owned(),
            None => {
                let names: Vec<&str> = self.on.iter().map(|(name, _)| name.as_str()).collect();
                format!("on {}", names.join(", "))
            }
        }
    }

    /// Adds what it refused to what our table's counters say: a packet met one of them only.
    pub(super) fn add_to(&self, drops: &mut BTreeMap<String, Amount>) {
        let Some(Ok([refused, _])) = self.guard.as_ref().map(Guard::refused) else { return };
        for ((reason, family), packets) in refused {
            let sum = drops.entry(reason.counter(family)).or_default();
            sum.packets = sum.packets.saturating_add(packets);
        }
    }
}

fn keep(
    guard: &mut Guard,
    rules: &GuardRules,
    links: &[Link],
    waits: bool,
    was_on: &[(String, u32)],
) -> Kept {
    let mut found = Vec::new();
    let mut look = || -> anyhow::Result<()> {
        let force = guard.force()?;
        if !guard.is_as(rules)? {
            found.push("it held other rules".to_owned());
        } else if force == Force::Nothing && !waits {
            found.push("it let everything pass".to_owned());
        }
        let before = guard.attached()?;
        // An interface that is new, or was made anew under its old name, is no drift.
        let is_away = |link: &&Link| {
            was_on.iter().any(|(name, index)| (name, *index) == (&link.name, link.index))
                && !before.contains(&link.name)
        };
        found.extend(links.iter().filter(is_away).map(|link| format!("it was taken off {}", link.name)));
        guard.relax(rules, links)?;
        if !waits {
            guard.settle()?;
        }
        guard.sync(rules, links)?;
        Ok(())
    };
    match look() {
        Err(error) => Kept::Failed(format!("{error:#}")),
        Ok(()) if found.is_empty() => Kept::Sound,
        Ok(()) => Kept::Restored(found.join("; ")),
    }
}
