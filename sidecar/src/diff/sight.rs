//! What a stranger's packet meets: the ways in, and the question put to every table that
//! was seen. Our own table gets no special trust here; it is one table among the others.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;

use super::listed;
use crate::desired::{Desired, TABLE};
use crate::observed::{Dispute, Fate, Link, Listener, Probe, Probed, Reading, Snapshot};
use crate::policy::{Mode, Policy};
use crate::ruleset::{Evaluator, Host, Judgement, Packet, Place, Rewritten, Ruleset, TableFamily, Verdict};
use crate::terms::{Family, IfacePattern, Port, Proto, Scope, Stamp};

/// The readings side by side, and the packets that were judged already.
pub(super) struct Sight<'a> {
    pub desired: &'a Desired,
    pub policy: &'a Policy,
    pub now: Stamp,
    rules: &'a Reading<Ruleset>,
    evaluator: Option<Evaluator<'a>>,
    links: &'a Reading<Vec<Link>>,
    /// Public interfaces that have an address. Without one an interface is a bridge port or
    /// idle, and never the `iifname` of a packet for this host.
    pub doors: Vec<&'a Link>,
    local: HashSet<IpAddr>,
    strangers: [Vec<IpAddr>; 2],
    judged: RefCell<HashMap<Question, Judgement>>,
    /// What probes from outside met.
    probed: Option<&'a Probed>,
    /// Ports at which a probe would decide, if it met the same once more.
    disputed: RefCell<BTreeSet<Dispute>>,
}

type Question = (u32, IpAddr, IpAddr, Proto, Port);

/// Answers remembered; beyond this they are worked out again.
const JUDGED_MAX: usize = 65_536;

/// What becomes of a stranger's packets, all ways in taken together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Reach {
    /// They get in, through these interfaces.
    Open(Vec<Way>),
    /// They do not; who stops them, if a rule or policy does.
    Held(Option<String>),
    /// It depends on a rule that we do not understand.
    Doubtful(String),
    /// Rules or interfaces could not be read.
    Blind(String),
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Way {
    pub interface: String,
    pub family: Family,
}

/// "eth0 over ipv4 and ipv6": interfaces with the same families are told together.
pub(super) fn told(ways: &[Way]) -> String {
    let mut families: BTreeMap<&str, BTreeSet<Family>> = BTreeMap::new();
    for way in ways {
        families.entry(&way.interface).or_default().insert(way.family);
    }
    let mut interfaces: BTreeMap<BTreeSet<Family>, Vec<&str>> = BTreeMap::new();
    for (interface, families) in families {
        interfaces.entry(families).or_default().push(interface);
    }
    let group = |(families, interfaces): (BTreeSet<Family>, Vec<&str>)| {
        let families: Vec<Family> = families.into_iter().collect();
        format!("{} over {}", listed(&interfaces, 4), listed(&families, 2))
    };
    interfaces.into_iter().map(group).collect::<Vec<_>>().join(", ")
}

impl<'a> Sight<'a> {
    pub fn new(desired: &'a Desired, snapshot: &'a Snapshot, now: Stamp) -> Self {
        let policy = &desired.policy;
        let links = snapshot.links.seen().map(Vec::as_slice).unwrap_or_default();
        let doors = links
            .iter()
            .filter(|l| !l.loopback && l.master.is_none() && !l.addresses.is_empty())
            .filter(|l| policy.scope_of(&l.name) == Some(Scope::Public))
            .collect();
        let local = links.iter().flat_map(|l| l.addresses.iter().map(IpNet::addr)).collect();
        Self {
            desired,
            policy,
            now,
            rules: &snapshot.nftables,
            evaluator: snapshot.nftables.seen().map(Evaluator::new),
            links: &snapshot.links,
            doors,
            local,
            strangers: strangers(desired, links),
            judged: RefCell::default(),
            probed: snapshot.audit.as_ref().and_then(Reading::seen),
            disputed: RefCell::default(),
        }
    }

    pub fn all_links(&self) -> &'a [Link] {
        self.links.seen().map(Vec::as_slice).unwrap_or_default()
    }

    /// Neither public nor mesh, and no [[local]] speaks of it.
    pub fn is_unspoken(&self, link: &Link) -> bool {
        self.policy.scope_of(&link.name) == Some(Scope::Other)
            && !self.policy.locals.iter().flat_map(|local| &local.interfaces).any(|p| p.matches(&link.name))
    }

    pub fn link(&self, name: &str) -> Option<&'a Link> {
        self.links.seen()?.iter().find(|l| l.name == name)
    }

    /// The link that has this address.
    pub fn holder(&self, address: IpAddr) -> Option<&'a Link> {
        self.links.seen()?.iter().find(|l| l.addresses.iter().any(|net| net.addr() == address))
    }

    pub fn links_like(&self, pattern: &IfacePattern) -> impl Iterator<Item = &'a Link> {
        let links = self.links.seen().map(Vec::as_slice).unwrap_or_default();
        links.iter().filter(move |l| pattern.matches(&l.name))
    }

    /// This node's addresses in the mesh: as declared, or what the interface has where the
    /// policy leaves them to Tailscale.
    pub fn mesh_addresses(&self) -> Vec<IpAddr> {
        if !self.policy.mesh.address.is_empty() {
            return self.policy.mesh.address.clone();
        }
        let link = self.link(&self.policy.mesh.interface);
        let all = link.into_iter().flat_map(|l| l.addresses.iter().map(IpNet::addr));
        all.filter(|a| !is_link_local(*a)).collect()
    }

    /// Why strangers can't be judged at all, if so.
    pub fn blindness(&self) -> Option<String> {
        let gaps = [("nftables", self.rules.gap()), ("the interfaces", self.links.gap())];
        let (what, gap) = gaps.into_iter().find_map(|(what, gap)| Some((what, gap?)))?;
        Some(format!("{what} could not be read ({})", gap.reason))
    }

    /// The socket's address is on no public interface, so that only a neighbour gets to it
    /// there: someone on the same link, who need not care where packets should be routed.
    pub fn is_neighbours_only(&self, listener: &Listener) -> bool {
        let bound = listener.address.to_canonical();
        let public = self.doors.iter().any(|door| door.addresses.iter().any(|net| net.addr() == bound));
        !listener.is_wildcard() && !public
    }

    /// Whether a stranger gets to this socket.
    pub fn reaches(&self, listener: &Listener) -> Reach {
        self.stranger(&self.approaches(listener), listener.proto, listener.port, &|judgement| {
            // Rewritten to somewhere else, the packet gets in, but not here.
            judgement.rewritten.as_ref().is_none_or(|r| {
                r.address.is_none_or(|a| self.is_local(a)) && r.port.is_none_or(|p| p == listener.port)
            })
        })
    }

    /// What becomes of a stranger's packets to these addresses, arriving on these links.
    /// `lands` says of an accepted packet whether it arrived where the question meant.
    pub fn stranger(
        &self,
        approaches: &[(&Link, IpAddr)],
        proto: Proto,
        port: Port,
        lands: &dyn Fn(&Judgement) -> bool,
    ) -> Reach {
        if let Some(why) = self.blindness() {
            return Reach::Blind(why);
        }
        let (mut ways, mut doubt, mut holder) = (Vec::new(), None, None);
        for (link, destination) in approaches {
            let way = Way { interface: link.name.clone(), family: Family::of(*destination) };
            for source in self.sources(*destination) {
                // Open is open: what else gets in there says nothing new.
                if ways.contains(&way) {
                    break;
                }
                let Some(judgement) = self.judge(link, source, *destination, proto, port) else { continue };
                match &judgement.verdict {
                    Verdict::Accept if lands(&judgement) => {
                        ways.push(way.clone());
                    }
                    Verdict::Accept => {
                        if let Some(r) = &judgement.rewritten {
                            holder.get_or_insert_with(|| format!("sent elsewhere by {}", place(&r.by)));
                        }
                    }
                    Verdict::Drop | Verdict::Reject => {
                        holder.get_or_insert_with(|| held(judgement.by.as_ref()));
                    }
                    Verdict::Unknown(why) => {
                        doubt.get_or_insert_with(|| format!("it depends on {why}"));
                    }
                }
            }
        }
        ways.sort();
        match (ways.is_empty(), doubt) {
            (false, _) => Reach::Open(ways),
            (true, Some(why)) => Reach::Doubtful(why),
            (true, None) => Reach::Held(holder),
        }
    }

    /// What one packet meets; `None` where the rules could not be read. Where they leave it
    /// open, a probe of that very port decides, if one was sent.
    pub fn judge(
        &self,
        link: &Link,
        source: IpAddr,
        destination: IpAddr,
        proto: Proto,
        port: Port,
    ) -> Option<Judgement> {
        let judgement = self.rules(link, source, destination, proto, port)?;
        let Verdict::Unknown(why) = &judgement.verdict else { return Some(judgement) };
        // The probe came as somebody of whom no rule and no policy knows.
        if !self.sources(destination).contains(&source) {
            return Some(judgement);
        }
        let probe = Probe { interface: link.name.clone(), address: destination, proto, port };
        let dispute = Dispute { probe, rules: None };
        let met = self.probed.and_then(|p| Some((p.of(&dispute.probe)?, p.is_confirmed(&dispute))));
        let decided = match met {
            None => judgement,
            Some((Fate::Delivered { address, port }, _) | (Fate::Forwarded { address, port }, _)) => {
                let here = (address, port) == (destination, dispute.probe.port);
                // Where it came to is the probe's word; by which rule, that of the rules.
                let by = || judgement.rewritten.clone().map(|r| r.by).or(judgement.by.clone());
                let rewritten = (!here).then(|| Rewritten {
                    address: Some(address),
                    port: Some(port),
                    by: by().unwrap_or_else(nowhere),
                });
                Judgement { verdict: Verdict::Accept, by: None, rewritten }
            }
            Some((Fate::Answered, _)) => Judgement { verdict: Verdict::Accept, by: None, ..judgement },
            // A limit that others have used up lets the next stranger in.
            Some(_) if is_limited(why) => judgement,
            Some((_, false)) => {
                let mut disputed = self.disputed.borrow_mut();
                if disputed.len() < super::proof::DISPUTED_MAX {
                    disputed.insert(dispute);
                }
                judgement
            }
            Some((fate, true)) => {
                let verdict = if matches!(fate, Fate::Dropped | Fate::Held(_)) {
                    Verdict::Drop
                } else {
                    Verdict::Reject
                };
                Judgement { verdict, by: None, rewritten: None }
            }
        };
        Some(decided)
    }

    /// What should be asked once more from outside, because the answer would decide.
    pub fn disputed(&self) -> BTreeSet<Dispute> {
        self.disputed.take()
    }

    /// Every port of this way in was asked from outside.
    pub fn is_probed(&self, link: &Link, destination: IpAddr, proto: Proto) -> bool {
        let ends = [Port::new(1), Port::new(u16::MAX)].into_iter().flatten();
        self.probed.is_some_and(|probed| {
            ends.clone().all(|port| probed.fate(&link.name, destination, proto, port).is_some())
        })
    }

    /// What the rules alone say of one packet.
    pub fn rules(
        &self,
        link: &Link,
        source: IpAddr,
        destination: IpAddr,
        proto: Proto,
        port: Port,
    ) -> Option<Judgement> {
        const SOURCE_PORT: Port = Port::new(50_123).unwrap();
        let evaluator = self.evaluator.as_ref()?;
        let question = (link.index, source, destination, proto, port);
        if let Some(known) = self.judged.borrow().get(&question) {
            return Some(known.clone());
        }
        let packet =
            Packet { iifname: link.name.clone(), source, destination, proto, source_port: SOURCE_PORT, port };
        let judgement = evaluator.judge(&packet, self);
        let mut judged = self.judged.borrow_mut();
        if judged.len() < JUDGED_MAX {
            judged.insert(question, judgement.clone());
        }
        Some(judgement)
    }

    /// Addresses of a host that the policy knows nothing about, as a packet to
    /// `destination` would carry.
    pub fn sources(&self, destination: IpAddr) -> Vec<IpAddr> {
        if is_link_local(destination) {
            let neighbour = match destination {
                IpAddr::V4(_) => IpAddr::V4(Ipv4Addr::new(169, 254, 199, 199)),
                IpAddr::V6(_) => IpAddr::V6(Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0x5ca1, 0xc7)),
            };
            return vec![neighbour];
        }
        self.strangers[usize::from(destination.is_ipv6())].clone()
    }

    /// The links and destination addresses by which packets from outside find a socket. A
    /// bound address counts on every public link, whichever link has it: Linux answers for
    /// all of its addresses everywhere (the weak host model).
    fn approaches(&self, listener: &Listener) -> Vec<(&'a Link, IpAddr)> {
        let bound = listener.address.to_canonical();
        let doors = self.doors.iter().copied().filter(|door| self.admits(listener, door));
        if listener.is_wildcard() {
            let each = |door: &'a Link| door.addresses.iter().map(move |net| (door, net.addr()));
            return doors.flat_map(each).filter(|(_, address)| listener.answers(*address)).collect();
        }
        if !self.is_local(bound) {
            return Vec::new();
        }
        doors.map(|door| (door, bound)).collect()
    }

    /// Whether the socket takes packets that arrive on this link. A device without
    /// addresses of its own may be a VRF, which stands for all its members.
    pub fn admits(&self, listener: &Listener, door: &Link) -> bool {
        let Some(index) = listener.device else { return true };
        let device = self.links.seen().and_then(|links| links.iter().find(|l| l.index == index));
        match device {
            None => true,
            Some(device) => device.index == door.index || device.addresses.is_empty(),
        }
    }

    pub fn is_local(&self, address: IpAddr) -> bool {
        let everyone = match address {
            IpAddr::V4(v4) => v4.is_broadcast(),
            IpAddr::V6(_) => false,
        };
        everyone || address.is_loopback() || address.is_multicast() || self.local.contains(&address)
    }

    /// Why our own table does not hold, where that explains an open port.
    pub fn excuse(&self) -> &'static str {
        let found = self.rules.seen().map(|rules| rules.table(TableFamily::Inet, TABLE));
        match (&self.desired.table, found) {
            (None, _) => "; [enforce] firewall is off",
            (Some(_), Some(None)) => "; table inet spokeguard is not there",
            (Some(_), Some(Some(table))) if table.dormant => "; table inet spokeguard is dormant",
            (Some(_), _) if self.policy.enforce.mode == Mode::Audit => "; mode is audit: nothing is dropped",
            _ => "",
        }
    }
}

impl Host for Sight<'_> {
    fn is_local(&self, address: IpAddr) -> bool {
        self.is_local(address)
    }

    fn way_out(&self, address: IpAddr) -> Option<&str> {
        Link::towards(self.all_links(), address).map(|link| link.name.as_str())
    }
}

/// A host of the prefix, to ask as; `None` for the whole internet, whom strangers stand for.
pub(super) fn someone_in(net: &IpNet) -> Option<IpAddr> {
    match net {
        _ if net.prefix_len() == 0 => None,
        _ if net.prefix_len() == net.max_prefix_len() => Some(net.addr()),
        _ => net.hosts().next(),
    }
}

pub(super) fn is_link_local(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => v4.is_link_local(),
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    }
}

pub(super) fn is_ours(place: &Place) -> bool {
    place.family == TableFamily::Inet && place.table == TABLE
}

/// "held by table inet filter chain input"; without a place it was the probe that told.
pub(super) fn held(by: Option<&Place>) -> String {
    match by {
        Some(by) => format!("held by {}", place(by)),
        None => "held, as a probe from outside found; the rules do not tell by what".to_owned(),
    }
}

/// The text of a doubt names a rule that lets only so many through.
fn is_limited(why: &str) -> bool {
    ["limit", "quota", "ct count", "numgen", "meter"].iter().any(|word| why.contains(word))
}

/// The place of a rule that nobody could name.
fn nowhere() -> Place {
    let (table, chain) = ("unknown".to_owned(), "unknown".to_owned());
    Place { family: TableFamily::Inet, table, chain, handle: None, comment: None }
}

/// "table inet filter chain input".
pub(super) fn place(place: &Place) -> String {
    let family = match place.family {
        TableFamily::Inet => "inet",
        TableFamily::Ip => "ip",
        TableFamily::Ip6 => "ip6",
        TableFamily::Arp => "arp",
        TableFamily::Bridge => "bridge",
        TableFamily::Netdev => "netdev",
    };
    format!("table {family} {} chain {}", place.table, place.chain)
}

/// Two strangers per family: one from the ranges kept for documentation, who is nobody's
/// neighbour, and one with an ordinary routable address, because a rule that drops bogons
/// stops the first and says nothing about the world. Neither is near an address that this
/// host or its policy knows.
fn strangers(desired: &Desired, links: &[Link]) -> [Vec<IpAddr>; 2] {
    let far = |address: &IpAddr| {
        let on_link = links.iter().flat_map(|l| &l.addresses).any(|net| net.contains(address));
        let from = desired.services.iter().filter_map(|s| s.from.as_ref()).flatten();
        let known = from.chain(&desired.policy.mesh.prefix);
        !on_link && !known.filter(|net| net.prefix_len() > 0).any(|net| net.contains(address))
    };
    let first_far = |list: &[&str]| {
        let all: Vec<IpAddr> = list.iter().filter_map(|text| text.parse().ok()).collect();
        all.iter().copied().find(far).or(all.first().copied())
    };
    let v4 = [
        first_far(&["198.51.100.199", "203.0.113.199", "192.0.2.199", "198.18.99.199"]),
        first_far(&["185.1.199.199", "94.130.199.199", "23.92.199.199"]),
    ];
    let v6 = [
        first_far(&["2001:db8:ffff:5ca1::c7", "3fff:fff:5ca1::c7"]),
        first_far(&["2a0d:5600:5ca1::c7", "2604:a880:5ca1::c7"]),
    ];
    [v4.into_iter().flatten().collect(), v6.into_iter().flatten().collect()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ways_in_are_told_by_family() {
        let way = |interface: &str, family| Way { interface: interface.into(), family };
        let (four, six) = (Family::Ipv4, Family::Ipv6);
        assert_eq!(told(&[way("eth0", six)]), "eth0 over ipv6");
        let ways =
            [way("br0", four), way("br0", six), way("eth0", four), way("eth0", six), way("ppp0", four)];
        assert_eq!(told(&ways), "ppp0 over ipv4, br0 and eth0 over ipv4 and ipv6");
    }
}
