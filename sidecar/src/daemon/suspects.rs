//! Who may have caused what a look finds in nftables: those who committed since the look
//! before. Where several different programs did, none of them is named, since naming the
//! wrong one is worse.

use crate::diff::{Code, FIREWALL_CONTROL, Finding};
use crate::observed::Gap;
use crate::terms::Actor;

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Suspects {
    /// Who changed our own table.
    own: Suspect,
    /// Who changed any other.
    foreign: Suspect,
    /// Since the look before, seen or not.
    commits: u32,
    /// There were many at the last look, which saw nothing; until the next, that stands.
    were_many: bool,
}

/// So many commits since the look before are no coincidence with an nft that takes too long.
const MANY: u32 = 20;

#[derive(Clone, Debug, Default, PartialEq, Eq)]
enum Suspect {
    #[default]
    Nobody,
    One(Actor),
    Several,
}

impl Suspects {
    pub fn add(&mut self, actor: &Actor, own: bool, foreign: bool) {
        self.commits = self.commits.saturating_add(1);
        if own {
            self.own.add(actor);
        }
        if foreign {
            self.foreign.add(actor);
        }
    }

    /// Announcements were lost: it may have been anybody.
    pub fn lose(&mut self) {
        *self = Self { own: Suspect::Several, foreign: Suspect::Several, ..*self };
    }

    /// Those of a later time join these.
    pub fn merge(&mut self, later: &Self) {
        self.commits = self.commits.saturating_add(later.commits);
        self.were_many |= later.were_many;
        self.own.join(&later.own);
        self.foreign.join(&later.foreign);
    }

    /// Who changed any table at all.
    pub fn any(&self) -> Option<Actor> {
        let mut any = self.own.clone();
        any.join(&self.foreign);
        any.named()
    }

    /// Who changed our table.
    pub fn own(&self) -> Option<Actor> {
        self.own.named()
    }

    /// Of a look that did not see the rules: what they did is still to be seen, and how often counts anew.
    pub fn unseen(&self) -> Self {
        Self { commits: 0, were_many: self.commits >= MANY, ..self.clone() }
    }

    /// For a look that begins: it judges by what has been counted for it.
    pub fn looked_for(self) -> Self {
        Self { were_many: false, ..self }
    }

    /// Rules that change faster than nft lists them can't be seen: by whom, where that is known.
    pub fn tell_who_blinds(&self, nftables: Option<&Gap>, findings: &mut [Finding]) {
        let late = nftables.is_some_and(|gap| gap.late);
        let Some(actor) = self.any().filter(|_| late && (self.were_many || self.commits >= MANY)) else {
            return;
        };
        let blind = |finding: &&mut Finding| {
            finding.code == Code::ControlUnproven && finding.subject == FIREWALL_CONTROL
        };
        for finding in findings.iter_mut().filter(blind) {
            // The process may be an nft that has ended already.
            finding.next = format!(
                "Stop {actor}, or what starts it again and again: the rules change faster than nft can list them; \
                 until then assume no firewall."
            );
            finding.by = Some(actor.clone());
        }
    }

    /// Who brought about a finding of this kind, if a commit to nftables can.
    pub fn of(&self, code: Code) -> Option<Actor> {
        match code {
            Code::FirewallMissing | Code::FirewallChanged | Code::BreakGlassOpen => self.own.named(),
            Code::FirewallBlocked | Code::DnatExposed => self.foreign.named(),
            _ => None,
        }
    }
}

impl Suspect {
    /// A script runs nft again and again: the same name is the same suspect, as last seen.
    /// Which unit a process was in, and who logged in, can't be read once it has ended.
    fn add(&mut self, actor: &Actor) {
        let Suspect::One(known) = self else {
            *self = if *self == Suspect::Nobody { Suspect::One(actor.clone()) } else { Suspect::Several };
            return;
        };
        let differ =
            |one: &Option<String>, other: &Option<String>| one.is_some() && other.is_some() && one != other;
        if known.process != actor.process
            || differ(&known.unit, &actor.unit)
            || differ(&known.user, &actor.user)
        {
            *self = Suspect::Several;
        } else {
            let unit = actor.unit.clone().or(known.unit.take());
            let user = actor.user.clone().or(known.user.take());
            *known = Actor { unit, user, ..actor.clone() };
        }
    }

    fn join(&mut self, other: &Self) {
        match other {
            Self::Nobody => {}
            Self::One(actor) => self.add(actor),
            Self::Several => *self = Self::Several,
        }
    }

    fn named(&self) -> Option<Actor> {
        match self {
            Suspect::One(actor) => Some(actor.clone()),
            Suspect::Nobody | Suspect::Several => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::diff::{self, stage::Stage};
    use crate::observed::Reading;

    fn actor(process: &str, pid: u32) -> Actor {
        Actor { pid, process: process.into(), unit: None, user: None }
    }

    #[test]
    fn who_changes_the_rules_all_the_time_keeps_them_from_being_seen() {
        let blind = |late: bool| Gap { late, ..Gap::new("nft: no answer within 30 s") };
        let told = |suspects: &Suspects, gap: &Gap| {
            let (desired, mut snapshot) = Stage::spoke().set();
            snapshot.nftables = Reading::Blind(gap.clone());
            let mut assessment = diff::assess(&desired, &snapshot, snapshot.at);
            suspects.tell_who_blinds(snapshot.nftables.gap(), &mut assessment.findings);
            let named: Vec<_> =
                assessment.findings.into_iter().filter(|finding| finding.by.is_some()).collect();
            assert!(named.iter().all(|one| one.subject == "control firewall"), "{named:?}");
            named.into_iter().next().map(|one| (one.by.unwrap().pid, one.next))
        };
        let mut suspects = Suspects::default();
        assert_eq!(told(&suspects, &blind(true)), None);
        (1..=19).for_each(|pid| suspects.add(&actor("enemy", pid), true, false));
        assert_eq!(told(&suspects, &blind(true)), None, "an nft that hangs by itself");
        suspects.add(&actor("enemy", 20), true, false);
        let (pid, next) = told(&suspects, &blind(true)).unwrap();
        assert!(pid == 20 && next.starts_with("Stop enemy (pid 20), or what starts it"), "{next}");
        assert_eq!(told(&suspects, &blind(false)), None, "nft is not there");
        // A cycle that does not look at the rules says the same.
        let mut suspects = suspects.unseen();
        let mut between = Suspects::default();
        between.merge(&suspects);
        assert!(told(&between, &blind(true)).is_some());
        // While nft hangs for an hour, two at each look.
        suspects = suspects.looked_for();
        for pid in 21..41 {
            assert_eq!(
                (suspects.any().map(|by| by.pid), told(&suspects, &blind(true))),
                (Some(pid - 1), None)
            );
            let mut later = Suspects::default();
            (0..2).for_each(|_| later.add(&actor("enemy", pid), true, false));
            suspects.merge(&later);
            suspects = suspects.unseen().looked_for();
        }
    }

    #[test]
    fn one_name_is_named_and_two_are_not() {
        let mut suspects = Suspects::default();
        assert_eq!(suspects.of(Code::FirewallBlocked), None);
        suspects.add(&actor("nft", 1), false, true);
        suspects.add(&actor("nft", 2), false, true);
        assert_eq!(suspects.of(Code::FirewallBlocked), Some(actor("nft", 2)));
        assert_eq!(suspects.of(Code::FirewallMissing), None, "our table was not touched");
        assert_eq!(suspects.of(Code::ListenerExposed), None, "no commit opens a socket");
        let living = Actor { unit: Some("ufw.service".into()), ..actor("nft", 3) };
        suspects.add(&living, false, true);
        suspects.add(&actor("nft", 4), false, true);
        assert_eq!(
            suspects.of(Code::FirewallBlocked),
            Some(Actor { pid: 4, ..living.clone() }),
            "it has ended"
        );
        assert_eq!((suspects.any(), Suspects::default().any()), (suspects.of(Code::DnatExposed), None));
        let mut others = suspects.clone();
        others.add(&Actor { unit: Some("docker.service".into()), ..living }, false, true);
        assert_eq!(others.of(Code::FirewallBlocked), None);
        let mut later = Suspects::default();
        later.add(&actor("firewalld", 3), true, true);
        assert_eq!(later.any(), Some(actor("firewalld", 3)));
        suspects.merge(&later);
        assert_eq!((suspects.of(Code::DnatExposed), suspects.any()), (None, None));
        assert_eq!(suspects.own(), Some(actor("firewalld", 3)));
        // Whose announcement was lost may be the one.
        let mut lossy = Suspects::default();
        lossy.lose();
        lossy.add(&actor("firewalld", 3), true, true);
        suspects.merge(&lossy);
        assert_eq!((suspects.own(), suspects.of(Code::FirewallBlocked)), (None, None));
    }
}
