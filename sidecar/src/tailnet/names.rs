//! Who a selector means: as addresses, and whether it means a given device. Three answers,
//! since a host knows only some of what the control server knows.

use std::net::IpAddr;

use super::status::is_user;
use super::{Access, Addresses, Reach, Rule, Selector, Status, tailnet};
use crate::terms::{Family, Proto};

/// The node that rules are read for, or whoever a test is about.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Node {
    /// As `tag:server`; a tagged node belongs to no user.
    pub tags: Vec<String>,
    pub user: Option<String>,
    /// Empty: not known.
    pub addresses: Vec<IpAddr>,
    /// Known by its address alone, which may be no device of the tailnet.
    pub bare: bool,
    /// Some member, no matter which.
    pub anybody: bool,
}

/// `Unknown` says why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Holds {
    Yes,
    No,
    Unknown(String),
}

impl Holds {
    fn of(is: bool) -> Self {
        if is { Holds::Yes } else { Holds::No }
    }

    pub fn or(self, other: impl FnOnce() -> Holds) -> Self {
        match self {
            Holds::Yes => Holds::Yes,
            Holds::No => other(),
            Holds::Unknown(why) => match other() {
                Holds::Yes => Holds::Yes,
                Holds::No | Holds::Unknown(_) => Holds::Unknown(why),
            },
        }
    }

    pub fn and(self, other: impl FnOnce() -> Holds) -> Self {
        match self {
            Holds::No => Holds::No,
            Holds::Yes => other(),
            Holds::Unknown(why) => match other() {
                Holds::No => Holds::No,
                Holds::Yes | Holds::Unknown(_) => Holds::Unknown(why),
            },
        }
    }
}

const NO_STATUS: &str = "its addresses are not known here: give `tailscale status --json` with --status";
const SYNCED: &str = "who is in it only the identity provider knows";
const SETS_DEEP: usize = 8;

/// What names mean, by the file and, where it was given, the status.
#[derive(Clone, Copy)]
pub struct Names<'a> {
    pub access: &'a Access,
    pub status: Option<&'a Status>,
}

impl Names<'_> {
    /// The addresses of a source. The error says why they can't be had.
    pub fn addresses(&self, of: &Selector) -> Result<Addresses, String> {
        self.within(of, SETS_DEEP)
    }

    fn within(&self, of: &Selector, deep: usize) -> Result<Addresses, String> {
        let status = || self.status.ok_or_else(|| NO_STATUS.to_owned());
        match of {
            Selector::Any => Ok(tailnet()),
            Selector::Net(net) => Ok((*net).into()),
            Selector::Range(first, last) => Ok(Addresses::range(*first, *last)),
            Selector::Host(name) => {
                self.access.hosts.get(name).map(|net| (*net).into()).ok_or("it is not in `hosts`".into())
            }
            Selector::Tag(_) | Selector::User(_) => Ok(status()?.addresses(|peer| peer.is(of))),
            Selector::Group(name) if !self.access.groups.contains_key(name) => Err(SYNCED.into()),
            Selector::Group(name) => {
                let members = self.members(name);
                Ok(status()?.addresses(|peer| members.iter().any(|user| peer.is(user))))
            }
            Selector::Auto(name) => match name.as_str() {
                "autogroup:member" | "autogroup:members" => Ok(status()?.addresses(|peer| peer.is_member())),
                "autogroup:tagged" => Ok(status()?.addresses(|peer| !peer.tags.is_empty())),
                "autogroup:danger-all" => {
                    Err("means every address there is: write that by hand if it is meant".into())
                }
                _ => Err("who that is only the control server knows".into()),
            },
            Selector::IpSet(name) => {
                if deep == 0 {
                    return Err("the sets contain each other".into());
                }
                let mut sum = Addresses::default();
                for entry in self.access.ipsets.get(name).into_iter().flatten() {
                    let part = self.within(&entry.of, deep - 1)?;
                    sum = if entry.add { sum.union(&part) } else { sum.without(&part) };
                }
                Ok(sum)
            }
            Selector::Service(_) => Err("a Tailscale service has an address of its own".into()),
        }
    }

    /// Whether `who` means this device. `goal`: it is where the packets go.
    pub fn means(&self, who: &Selector, device: &Node, goal: bool) -> Holds {
        // A bare address is the device that holds it, where the status tells.
        if device.bare
            && let Selector::Tag(_) | Selector::User(_) | Selector::Group(_) | Selector::Auto(_) = who
        {
            let Some(address) = device.addresses.first() else { return Holds::No };
            return match (self.status.and_then(|status| status.holder(*address)), self.status) {
                (Some(peer), _) => self.means(
                    who,
                    &Node {
                        tags: peer.tags.clone(),
                        user: peer.user.clone(),
                        addresses: peer.addresses.clone(),
                        ..Node::default()
                    },
                    goal,
                ),
                (None, None) if tailnet().contains(*address) => Holds::Unknown(NO_STATUS.into()),
                (None, _) => Holds::No,
            };
        }
        let untagged = device.tags.is_empty();
        match who {
            Selector::Any if goal || !device.bare => Holds::Yes,
            Selector::Any => match device.addresses.iter().all(|address| tailnet().contains(*address)) {
                true => Holds::Yes,
                false => Holds::Unknown("whether * takes that address in hangs on subnet routes".into()),
            },
            Selector::Tag(tag) => Holds::of(device.tags.contains(tag)),
            Selector::User(user) => match &device.user {
                Some(own) => Holds::of(untagged && is_user(user, own)),
                None if untagged && !device.anybody => Holds::Unknown("whose node it is was not said".into()),
                None => Holds::No,
            },
            Selector::Group(name) if !self.access.groups.contains_key(name) && untagged => {
                Holds::Unknown(SYNCED.into())
            }
            Selector::Group(name) => {
                let members = self.members(name);
                members.iter().fold(Holds::No, |sum, user| sum.or(|| self.means(user, device, goal)))
            }
            Selector::Auto(name) => match name.as_str() {
                "autogroup:member" | "autogroup:members" => Holds::of(untagged),
                "autogroup:tagged" => Holds::of(!untagged),
                "autogroup:internet" => Holds::No,
                "autogroup:danger-all" => Holds::Yes,
                _ if !untagged => Holds::No,
                _ => Holds::Unknown("who that is only the control server knows".into()),
            },
            Selector::Service(_) => Holds::Unknown("whether this node serves it is not known here".into()),
            Selector::Net(_) | Selector::Range(..) | Selector::Host(_) | Selector::IpSet(_) => {
                match self.addresses(who) {
                    Ok(set) => at(&set, device),
                    Err(why) => Holds::Unknown(why),
                }
            }
        }
    }

    /// Families in which `who` means the device: one of its addresses may be in a prefix
    /// and the other not.
    pub fn families(&self, who: &Selector, device: &Node) -> Vec<Family> {
        let by_address =
            matches!(who, Selector::Net(_) | Selector::Range(..) | Selector::Host(_) | Selector::IpSet(_));
        let Some(set) = self.addresses(who).ok().filter(|_| by_address && !device.addresses.is_empty())
        else {
            return Family::ALL.to_vec();
        };
        let inside = device.addresses.iter().filter(|address| set.contains(**address));
        inside.map(|address| Family::of(*address)).collect()
    }

    /// Whether a rule lets one device reach another. Without a port: any.
    pub fn allows(&self, rule: &Rule, from: &Node, to: &Node, port: (Proto, u16)) -> Holds {
        let targets = rule.dst.iter().filter(|target| target.reach.has(port));
        let reached = targets.fold(Holds::No, |sum, target| {
            sum.or(|| match &target.to {
                Selector::Auto(name) if name == "autogroup:self" => own(from, to),
                who => self.means(who, to, true),
            })
        });
        let known = reached
            .and(|| rule.src.iter().fold(Holds::No, |sum, who| sum.or(|| self.means(who, from, false))));
        match (known, self.condition(rule)) {
            (Holds::Yes, Some(condition)) => Holds::Unknown(condition),
            (known, _) => known,
        }
    }

    /// Why a rule holds at times only.
    pub fn condition(&self, rule: &Rule) -> Option<String> {
        rule.condition.clone().or_else(|| {
            let line = self.access.default_posture?;
            Some(format!("hangs on `defaultSrcPosture` (line {line}), which no host can see"))
        })
    }

    fn members(&self, group: &str) -> Vec<Selector> {
        let members = self.access.groups.get(group).into_iter().flatten();
        members.map(|user| Selector::User(user.clone())).collect()
    }
}

impl Reach {
    pub fn has(&self, (proto, port): (Proto, u16)) -> bool {
        self.speaks(proto) && self.ports.iter().any(|range| range.contains(&port))
    }

    pub fn speaks(&self, proto: Proto) -> bool {
        match proto {
            Proto::Tcp => self.tcp,
            Proto::Udp => self.udp,
        }
    }
}

/// `autogroup:self`: both are one user's own devices.
fn own(from: &Node, to: &Node) -> Holds {
    if !from.tags.is_empty() || !to.tags.is_empty() || from.bare || to.bare {
        return Holds::No;
    }
    match (&from.user, &to.user) {
        (Some(one), Some(two)) => Holds::of(one.eq_ignore_ascii_case(two)),
        _ => Holds::Unknown("whose node it is was not said".into()),
    }
}

fn at(set: &Addresses, device: &Node) -> Holds {
    let whole = tailnet();
    if device.addresses.is_empty() {
        return if whole.without(set).is_empty() {
            Holds::Yes
        } else if set.touches(&whole) {
            Holds::Unknown("its addresses are not known here: give --status, or the node's --address".into())
        } else {
            Holds::No
        };
    }
    Holds::of(device.addresses.iter().any(|address| set.contains(*address)))
}
