//! Where to probe: which addresses through which interfaces, and which ports there.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::str::FromStr;

use ipnet::{IpNet, Ipv4Subnets, Ipv6Subnets};

use super::join::View;
use crate::desired::TABLE;
use crate::observed::Link;
use crate::ruleset::evaluate::published;
use crate::ruleset::{Operand, Statement, Term, VerdictMap};
use crate::terms::{Port, Proto, Scope};

/// One address as strangers get to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Aim {
    pub link: Link,
    pub address: IpAddr,
    /// It must not answer here, so that only ports which could are asked.
    pub must_not_answer: bool,
}

/// Every address of every public interface, and the mesh addresses through each of them.
///
/// Link-local addresses are left out unless asked for: a stranger can't send there. Ports
/// of bridges and interfaces without addresses never are where a packet for this host
/// comes from.
pub fn aims(view: &View, interface: Option<&str>, address: Option<IpAddr>) -> Vec<Aim> {
    let links = view.links.seen().map(Vec::as_slice).unwrap_or_default();
    let policy = view.desired.map(|d| &d.policy);
    let is_public = |name: &str| policy.is_none_or(|p| p.scope_of(name) == Some(Scope::Public));
    let has = |link: &Link, address: IpAddr| link.addresses.iter().any(|net| net.addr() == address);
    let home = address.and_then(|address| links.iter().find(|l| has(l, address)));
    let doors = links.iter().filter(|l| !l.loopback && l.master.is_none() && !l.addresses.is_empty());
    let doors = doors.filter(|l| match (interface, home) {
        (Some(name), _) => l.name == name,
        // An address is asked where it lives, if strangers come that way.
        (None, Some(home)) if is_public(&home.name) && !home.loopback => l.index == home.index,
        (None, _) => l.up && is_public(&l.name),
    });
    let mesh: Vec<IpAddr> = match policy {
        Some(p) if !p.mesh.address.is_empty() => p.mesh.address.clone(),
        Some(p) => {
            let link = links.iter().filter(|l| l.name == p.mesh.interface);
            link.flat_map(|l| l.addresses.iter().map(IpNet::addr)).collect()
        }
        None => Vec::new(),
    };
    let mut out = Vec::new();
    for door in doors {
        let mut aim = |address: IpAddr, must_not_answer: bool| {
            out.push(Aim { link: door.clone(), address, must_not_answer });
        };
        if let Some(address) = address {
            // Wherever it lives: Linux answers for all of its addresses on every interface.
            aim(address, false);
            continue;
        }
        let own = door.addresses.iter().map(IpNet::addr).filter(|a| !is_link_local(*a));
        own.for_each(|address| aim(address, false));
        if is_public(&door.name) {
            // One that this host does not have (yet) is nowhere to be sent to.
            let here = |address: IpAddr| links.iter().any(|link| has(link, address));
            // Where a door has no address of the family, no outsider could be answered there.
            let speaks = |a: IpAddr| {
                let global = door.addresses.iter().map(|net| net.addr()).filter(|own| !is_link_local(*own));
                global.into_iter().any(|own| own.is_ipv4() == a.is_ipv4())
            };
            let elsewhere =
                mesh.iter().filter(|a| !has(door, **a) && here(**a) && !is_link_local(**a) && speaks(**a));
            elsewhere.for_each(|address| aim(*address, true));
        }
    }
    out
}

/// The aims of each interface, in the order of the interfaces.
pub fn by_link(aims: &[Aim]) -> Vec<(&Link, Vec<&Aim>)> {
    let mut out: Vec<(&Link, Vec<&Aim>)> = Vec::new();
    for aim in aims {
        match out.last_mut() {
            Some((link, list)) if link.index == aim.link.index => list.push(aim),
            _ => out.push((&aim.link, vec![aim])),
        }
    }
    out
}

/// Neighbouring ports as ranges; the list is in order.
pub fn ranges(ports: &[Port]) -> Vec<std::ops::RangeInclusive<u16>> {
    let mut out: Vec<std::ops::RangeInclusive<u16>> = Vec::new();
    for port in ports {
        match out.last_mut() {
            Some(last) if last.end().checked_add(1) == Some(port.get()) => *last = *last.start()..=port.get(),
            _ => out.push(port.get()..=port.get()),
        }
    }
    out
}

impl View<'_> {
    /// The ports at which anything could answer: where sockets wait, which rules publish,
    /// and of which the policy speaks.
    pub fn likely(&self, proto: Proto, asked: &Ports) -> Vec<Port> {
        let mut out = BTreeSet::new();
        for listener in self.listeners.seen().into_iter().flatten().filter(|l| l.proto == proto) {
            out.insert(listener.port);
        }
        for rule in self.rules.seen().map(published).unwrap_or_default() {
            // A rule that takes any port says nothing about which.
            let range = rule.first.get()..=rule.last.get();
            if rule.proto == proto && range.len() <= 4096 {
                out.extend(range.filter_map(Port::new));
            }
        }
        let services = self.desired.iter().flat_map(|d| &d.services);
        out.extend(services.filter(|s| s.proto == proto).map(|s| s.port));
        out.into_iter().filter(|port| asked.contains(*port)).collect()
    }
}

/// Somebody on the internet of whom neither the policy nor a network of this host knows.
/// An ordinary address comes first: rules that drop reserved ones say nothing about the world.
pub fn stranger(view: &View, address: IpAddr) -> IpAddr {
    const V4: [[u8; 4]; 4] =
        [[185, 1, 199, 199], [94, 130, 199, 199], [23, 92, 199, 199], [198, 51, 100, 199]];
    const V6: [[u16; 8]; 3] = [
        [0x2a0d, 0x5600, 0x5ca1, 0, 0, 0, 0, 0xc7],
        [0x2604, 0xa880, 0x5ca1, 0, 0, 0, 0, 0xc7],
        [0x2001, 0xdb8, 0xffff, 0x5ca1, 0, 0, 0, 0xc7],
    ];
    let all: Vec<IpAddr> =
        if address.is_ipv4() { V4.map(IpAddr::from).to_vec() } else { V6.map(IpAddr::from).to_vec() };
    let links = view.links.seen().into_iter().flatten().flat_map(|l| l.addresses.iter().copied());
    let known: Vec<IpNet> = links.chain(view.named()).collect();
    let far = |a: &&IpAddr| !known.iter().any(|net| net.contains(*a));
    all.iter().find(far).or(all.first()).copied().unwrap_or(address)
}

impl View<'_> {
    /// Sources, and other addresses, that rules and policy name: an outsider of whom
    /// nobody knows has none of them.
    pub fn named(&self) -> Vec<IpNet> {
        let mut out = BTreeSet::new();
        for table in self.rules.seen().into_iter().flat_map(|rules| &rules.tables) {
            let statements = table.chains.iter().flat_map(|c| &c.rules).flat_map(|r| &r.statements);
            for statement in statements {
                match statement {
                    Statement::Match(of) => nets(&of.right, &mut out),
                    Statement::Vmap { map: VerdictMap::Pairs(pairs), .. } => {
                        pairs.iter().for_each(|(key, _)| nets(key, &mut out));
                    }
                    _ => {}
                }
            }
            table.sets.iter().flat_map(|set| &set.elements).for_each(|element| nets(element, &mut out));
        }
        let services = self.desired.iter().flat_map(|d| &d.services);
        out.extend(services.filter_map(|s| s.from.as_ref()).flatten().map(IpNet::trunc));
        out.extend(self.desired.iter().flat_map(|d| &d.policy.mesh.prefix).map(IpNet::trunc));
        // Everybody is in there.
        out.retain(|net| net.prefix_len() > 0);
        out.into_iter().take(NAMED_MAX).collect()
    }
}

impl View<'_> {
    /// Whether a verdict of somebody else's rules may hang on a packet's priority, by which our own
    /// table knows a probe.
    pub fn asks_for_priority(&self) -> bool {
        let tables = self.rules.seen().into_iter().flat_map(|rules| &rules.tables);
        let rules = tables.filter(|t| t.name != TABLE).flat_map(|t| &t.chains).flat_map(|c| &c.rules);
        rules.flat_map(|rule| &rule.statements).any(|statement| match statement {
            Statement::Match(of) => is_of_priority(&of.left),
            Statement::Vmap { key, .. } => is_of_priority(key),
            // What isn't understood may ask for anything.
            Statement::Unknown(json) => json.contains("priority"),
            _ => false,
        })
    }
}

fn is_of_priority(term: &Term) -> bool {
    match term {
        Term::Meta(key) => key == "priority",
        Term::And { term, .. } => is_of_priority(term),
        Term::Concat(terms) => terms.iter().any(is_of_priority),
        Term::Unknown(json) => json.contains("priority"),
        _ => false,
    }
}

/// Bound of the list of sources; rules with long lists of addresses exist.
const NAMED_MAX: usize = 4096;

/// The addresses in a value, as prefixes.
fn nets(operand: &Operand, out: &mut BTreeSet<IpNet>) {
    match operand {
        Operand::Address(address) => {
            out.insert(IpNet::from(*address));
        }
        Operand::Prefix(net) => {
            out.insert(net.trunc());
        }
        Operand::Range(first, last) => match (first.as_ref(), last.as_ref()) {
            (Operand::Address(IpAddr::V4(first)), Operand::Address(IpAddr::V4(last))) => {
                out.extend(Ipv4Subnets::new(*first, *last, 0).map(IpNet::V4));
            }
            (Operand::Address(IpAddr::V6(first)), Operand::Address(IpAddr::V6(last))) => {
                out.extend(Ipv6Subnets::new(*first, *last, 0).map(IpNet::V6));
            }
            _ => {}
        },
        Operand::Set(list) | Operand::Concat(list) => list.iter().for_each(|each| nets(each, out)),
        Operand::Number(_)
        | Operand::Text(_)
        | Operand::Bits(_)
        | Operand::Named(_)
        | Operand::Unknown(_) => {}
    }
}

fn is_link_local(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => v4.is_link_local(),
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    }
}

/// A list of ports such as `22,80,8000-8100`; `-` is all of them, as for nmap's `-p`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ports(Vec<(Port, Port)>);

impl Ports {
    pub fn all() -> Self {
        Self(vec![(FIRST, LAST)])
    }

    /// Of ports in order.
    pub fn of(ports: &[Port]) -> Self {
        let ends = ranges(ports).into_iter();
        Self(ends.filter_map(|run| Port::new(*run.start()).zip(Port::new(*run.end()))).collect())
    }

    pub fn contains(&self, port: Port) -> bool {
        self.0.iter().any(|(first, last)| (*first..=*last).contains(&port))
    }

    /// In order, none twice.
    pub fn to_vec(&self) -> Vec<Port> {
        let ranges = self.0.iter().map(|(first, last)| first.get()..=last.get());
        ranges.flatten().filter_map(Port::new).collect()
    }
}

const FIRST: Port = Port::new(1).unwrap();
const LAST: Port = Port::new(u16::MAX).unwrap();

impl std::fmt::Display for Ports {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (at, (first, last)) in self.0.iter().enumerate() {
            let comma = if at > 0 { "," } else { "" };
            match first == last {
                true => write!(f, "{comma}{first}")?,
                false => write!(f, "{comma}{first}-{last}")?,
            }
        }
        Ok(())
    }
}

impl FromStr for Ports {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let number = |word: &str| {
            let port = word.parse::<u16>().ok().and_then(Port::new);
            port.ok_or_else(|| format!("\"{word}\" is not a port; write 22,80,8000-8100 or - for all"))
        };
        let mut ranges = Vec::new();
        for word in text.split(',').map(str::trim) {
            let range = match word.split_once('-') {
                Some((first, last)) => (
                    if first.is_empty() { FIRST } else { number(first)? },
                    if last.is_empty() { LAST } else { number(last)? },
                ),
                None => (number(word)?, number(word)?),
            };
            if range.0 > range.1 {
                return Err(format!("\"{word}\" ends before it begins"));
            }
            ranges.push(range);
        }
        ranges.sort();
        let mut merged: Vec<(Port, Port)> = Vec::new();
        for (first, last) in ranges {
            match merged.last_mut() {
                Some(before) if u32::from(first.get()) <= u32::from(before.1.get()) + 1 => {
                    before.1 = before.1.max(last);
                }
                _ => merged.push((first, last)),
            }
        }
        Ok(Self(merged))
    }
}
