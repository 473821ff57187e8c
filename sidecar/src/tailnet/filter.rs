//! The packet filter that the control server compiled for a node: exact, with no names left
//! in it. Read from what tailscaled shows of it, and compared with what we let in.

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::{Mirror, Node, tailnet};
use crate::terms::{Addresses, Proto};

/// For every rule: who may reach which ports of this node.
#[derive(Clone, Debug, Default)]
pub struct Filter(Vec<Entry>);

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    pub from: Addresses,
    pub to: Addresses,
    pub protos: Vec<Proto>,
    /// First and last.
    pub ports: (u16, u16),
}

/// Where the filter and what we let in are not the same.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Difference {
    pub proto: Proto,
    pub first: u16,
    pub last: u16,
    /// We let them in and the filter does not.
    pub wider: Vec<IpNet>,
    /// The filter lets them in and we do not.
    pub narrower: Vec<IpNet>,
}

/// Both shapes: `FilterRule` of the local API, and `filter.Match` of `tailscale debug netmap`.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct RawRule {
    #[serde(rename = "SrcIPs", alias = "Srcs", default)]
    from: Option<Vec<String>>,
    #[serde(rename = "DstPorts", alias = "Dsts", default)]
    to: Option<Vec<RawPort>>,
    #[serde(rename = "IPProto", default)]
    protos: Option<Vec<u8>>,
}

#[derive(Deserialize)]
struct RawPort {
    #[serde(rename = "IP", alias = "Net")]
    address: String,
    #[serde(rename = "Ports")]
    ports: RawRange,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct RawRange {
    first: u16,
    last: u16,
}

impl Filter {
    /// A list of rules, or a network map that holds one.
    pub fn from_json(text: &str) -> Result<Self, String> {
        let mut value: serde_json::Value = serde_json::from_str(text).map_err(|error| error.to_string())?;
        if let Some(map) = value.get_mut("NetMap") {
            value = map.take();
        }
        if value.is_object() {
            let keys = ["PacketFilterRules", "PacketFilter"];
            let found = keys.iter().find_map(|key| value.get(key).filter(|list| list.is_array()).cloned());
            value = found.ok_or("it holds neither PacketFilterRules nor PacketFilter")?;
        }
        // Go writes a list without elements as null.
        let rules: Option<Vec<RawRule>> = serde_json::from_value(value).map_err(|error| error.to_string())?;
        let mut entries = Vec::new();
        for rule in rules.unwrap_or_default() {
            let known = |number: &u8| Proto::ALL.into_iter().find(|proto| proto.number() == *number);
            let protos: Vec<Proto> = match rule.protos.filter(|list| !list.is_empty()) {
                Some(list) => list.iter().filter_map(known).collect(),
                None => Proto::ALL.to_vec(),
            };
            let from = rule.from.unwrap_or_default();
            // A source by capability is no address; the peers that have it are listed too.
            let from = from.iter().filter(|text| !text.starts_with("cap:"));
            let from = from.map(|text| addresses(text)).collect::<Result<Vec<_>, _>>()?;
            let from: Addresses = from.into_iter().collect();
            for port in rule.to.unwrap_or_default() {
                entries.push(Entry {
                    from: from.clone(),
                    to: addresses(&port.address)?,
                    protos: protos.clone(),
                    ports: (port.ports.first, port.ports.last),
                });
            }
        }
        Ok(Self(entries))
    }

    pub fn entries(&self) -> &[Entry] {
        &self.0
    }

    fn from(&self, node: &Node, proto: Proto, port: u16) -> Addresses {
        let here = |entry: &&Entry| {
            entry.protos.contains(&proto)
                && (entry.ports.0..=entry.ports.1).contains(&port)
                && match node.addresses.as_slice() {
                    [] => entry.to.touches(&tailnet()),
                    own => own.iter().any(|address| entry.to.contains(*address)),
                }
        };
        self.0.iter().filter(here).fold(Addresses::default(), |sum, entry| sum.union(&entry.from))
    }
}

/// Port by port, neighbours with one answer together. `only`: just these ports, and those
/// that the mirror lets somebody to.
pub fn compare(mirror: &Mirror, filter: &Filter, node: &Node, only: &[(Proto, u16)]) -> Vec<Difference> {
    let mut out: Vec<Difference> = Vec::new();
    // Never handed out to devices, and left out of what * is compiled to.
    let carved: Addresses = "100.115.92.0/23".parse::<IpNet>().into_iter().collect();
    for proto in Proto::ALL {
        let ours = mirror.allowed.keys().filter(|(p, _)| *p == proto).map(|(_, port)| *port);
        let mut starts: BTreeSet<u16> = ours.flat_map(|port| [port, port.saturating_add(1)]).collect();
        let theirs = filter.0.iter().filter(|entry| entry.protos.contains(&proto));
        starts.extend(theirs.flat_map(|entry| [entry.ports.0, entry.ports.1.saturating_add(1)]));
        if !only.is_empty() {
            let listed = only.iter().filter(|(p, _)| *p == proto).map(|(_, port)| *port);
            let ours = mirror.allowed.keys().filter(|(p, _)| *p == proto).map(|(_, port)| *port);
            starts = listed.chain(ours).collect();
        }
        let starts: Vec<u16> = starts.into_iter().collect();
        for (at, first) in starts.iter().enumerate() {
            let last = match starts.get(at + 1) {
                _ if !only.is_empty() => *first,
                Some(next) => next - 1,
                None => u16::MAX,
            };
            let allowed = mirror.allowed.get(&(proto, *first)).map(|guest| guest.from.clone());
            let (allowed, filtered) = (allowed.unwrap_or_default(), filter.from(node, proto, *first));
            let wider = allowed.without(&filtered).without(&carved).prefixes();
            let narrower = filtered.without(&allowed).prefixes();
            if wider.is_empty() && narrower.is_empty() {
                continue;
            }
            match out.last_mut() {
                Some(before)
                    if before.proto == proto
                        && u32::from(before.last) + 1 == u32::from(*first)
                        && before.wider == wider
                        && before.narrower == narrower =>
                {
                    before.last = last;
                }
                _ => out.push(Difference { proto, first: *first, last, wider, narrower }),
            }
        }
    }
    out
}

/// `*`, an address, a prefix, `first-last`.
fn addresses(text: &str) -> Result<Addresses, String> {
    if text == "*" {
        return Ok(["0.0.0.0/0", "::/0"].iter().filter_map(|net| net.parse::<IpNet>().ok()).collect());
    }
    if let Ok(net) = text.parse::<IpNet>() {
        return Ok(net.into());
    }
    if let Ok(address) = text.parse::<IpAddr>() {
        return Ok(address.into());
    }
    let ends = text.split_once('-').map(|(a, b)| (a.parse::<IpAddr>(), b.parse::<IpAddr>()));
    match ends {
        Some((Ok(first), Ok(last))) => Ok(Addresses::range(first, last)),
        _ => Err(format!("\"{}\" is no address", crate::terms::printable(text, 60))),
    }
}
