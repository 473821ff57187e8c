//! A Tailscale policy file, read as what it means for one node: which addresses may reach
//! which of its ports. Mirrored into our own policy, never widened: what can't be resolved
//! to addresses here is left out and listed.
//!
//! Values only. The formats are foreign (HuJSON that people write, JSON of tailscaled), so
//! every input is bounded, and names out of them are cleaned where they are shown.

mod filter;
mod mirror;
mod names;
mod read;
mod status;
#[cfg(test)]
mod tests;
mod trial;
use std::collections::BTreeMap;
use std::ops::RangeInclusive;

use ipnet::IpNet;

pub use crate::terms::Addresses;
pub use filter::{Difference, Entry, Filter, compare};
pub use mirror::{Guest, Heading, LeftOut, Mirror, Wanted, mirror};
pub use names::Node;
pub use read::{BYTES_MAX, read};
pub use status::{Peer, Status};
pub use trial::{Outcome, Trial, trials};

/// What a policy file says about packets.
#[derive(Clone, Debug, Default)]
pub struct Access {
    pub groups: BTreeMap<String, Vec<String>>,
    pub hosts: BTreeMap<String, IpNet>,
    pub ipsets: BTreeMap<String, Vec<SetEntry>>,
    /// `acls` and `grants`, in the order of the file.
    pub rules: Vec<Rule>,
    pub tests: Vec<Test>,
    /// Line of a `defaultSrcPosture` that is not empty: every rule without a posture of its
    /// own hangs on it.
    pub default_posture: Option<u32>,
    /// What the file holds besides, which says nothing about packets to this node.
    pub notes: Vec<(u32, String)>,
}

/// One rule: any of `src` may reach any of `dst`.
#[derive(Clone, Debug)]
pub struct Rule {
    pub line: u32,
    pub src: Vec<Selector>,
    pub dst: Vec<Target>,
    /// Why it holds only at times or for some, in a way that no host can see.
    pub condition: Option<String>,
}

#[derive(Clone, Debug)]
pub struct Target {
    pub to: Selector,
    pub reach: Reach,
}

/// Ports and protocols of a target. Neither TCP nor UDP: nothing that we mirror.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reach {
    pub tcp: bool,
    pub udp: bool,
    pub ports: Vec<RangeInclusive<u16>>,
}

/// Who or what a rule means.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Selector {
    /// `*`
    Any,
    Net(IpNet),
    Range(std::net::IpAddr, std::net::IpAddr),
    Host(String),
    Tag(String),
    Group(String),
    User(String),
    Auto(String),
    IpSet(String),
    /// A Tailscale service (`svc:`), which lives at an address of its own.
    Service(String),
}

impl std::fmt::Display for Selector {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Selector::Any => f.write_str("*"),
            Selector::Net(net) if net.prefix_len() == net.max_prefix_len() => write!(f, "{}", net.addr()),
            Selector::Net(net) => write!(f, "{net}"),
            Selector::Range(first, last) => write!(f, "{first}-{last}"),
            Selector::Tag(text)
            | Selector::Group(text)
            | Selector::Auto(text)
            | Selector::IpSet(text)
            | Selector::Service(text)
            | Selector::Host(text)
            | Selector::User(text) => f.write_str(&crate::terms::printable(text, 100)),
        }
    }
}

#[derive(Clone, Debug)]
pub struct SetEntry {
    pub add: bool,
    pub of: Selector,
}

/// One of the file's own tests.
#[derive(Clone, Debug)]
pub struct Test {
    pub src: Selector,
    pub aims: Vec<Aim>,
}

#[derive(Clone, Debug)]
pub struct Aim {
    pub line: u32,
    pub accept: bool,
    pub to: Selector,
    pub reach: Reach,
}

/// The addresses that Tailscale hands out.
pub fn tailnet() -> Addresses {
    crate::policy::tailscale_prefixes().into_iter().collect()
}
