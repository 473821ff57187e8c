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
            Code::FirewallMissing | Code::FirewallChanged => self.own.named(),
            Code::FirewallBlocked | Code::DnatExposed => self.foreign.named(),
            _ => None,
        }
    }
}

impl Suspect {
    /// A script runs nft again and again: the same name is the same suspect, as last seen.
    fn add(&mut self, actor: &Actor) {
        *self = match self {
            Suspect::Nobody => Suspect::One(actor.clone()),
            Suspect::One(known) if known.process == actor.process && known.unit == actor.unit => {
                Suspect::One(actor.clone())
            }
            _ => Suspect::Several,
        };
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
        Actor { pid, process: process.into(), unit: None }
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
        let mut later = Suspects::default();
        later.add(&actor("firewalld", 3), true, true);
        suspects.merge(&later);
        assert_eq!(suspects.of(Code::DnatExposed), None);
        assert_eq!(suspects.own(), Some(actor("firewalld", 3)));
    }
}
