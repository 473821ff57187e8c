//! Who may have caused what a look finds in nftables: those who committed since the look
//! before. Where several different programs did, none of them is named, since naming the
//! wrong one is worse.

use crate::diff::Code;
use crate::terms::Actor;

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Suspects {
    /// Who changed our own table.
    own: Suspect,
    /// Who changed any other.
    foreign: Suspect,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
enum Suspect {
    #[default]
    Nobody,
    One(Actor),
    Several,
}

impl Suspects {
    pub fn add(&mut self, actor: &Actor, own: bool, foreign: bool) {
        if own {
            self.own.add(actor);
        }
        if foreign {
            self.foreign.add(actor);
        }
    }

    /// Announcements were lost: it may have been anybody.
    pub fn lose(&mut self) {
        *self = Self { own: Suspect::Several, foreign: Suspect::Several };
    }

    /// Those of a later time join these.
    pub fn merge(&mut self, later: &Self) {
        for (here, there) in [(&mut self.own, &later.own), (&mut self.foreign, &later.foreign)] {
            match there {
                Suspect::Nobody => {}
                Suspect::One(actor) => here.add(actor),
                Suspect::Several => *here = Suspect::Several,
            }
        }
    }

    /// Who changed our table.
    pub fn own(&self) -> Option<Actor> {
        self.own.named()
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

    fn actor(process: &str, pid: u32) -> Actor {
        Actor { pid, process: process.into(), unit: None, user: None }
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
        let mut others = suspects.clone();
        others.add(&Actor { unit: Some("docker.service".into()), ..living }, false, true);
        assert_eq!(others.of(Code::FirewallBlocked), None);
        let mut later = Suspects::default();
        later.add(&actor("firewalld", 3), true, true);
        suspects.merge(&later);
        assert_eq!(suspects.of(Code::DnatExposed), None);
        assert_eq!(suspects.own(), Some(actor("firewalld", 3)));
        // Whose announcement was lost may be the one.
        let mut lossy = Suspects::default();
        lossy.lose();
        lossy.add(&actor("firewalld", 3), true, true);
        suspects.merge(&lossy);
        assert_eq!((suspects.own(), suspects.of(Code::FirewallBlocked)), (None, None));
    }
}
