//! What is really there. A [`Snapshot`] holds one [`Reading`] per facet; a facet that
//! could not be read is `Blind` with a reason, never empty and never fine.

use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::ruleset::Ruleset;
use crate::terms::{Actor, Addresses, Family, Port, Proto, PublicKey, Stamp};

mod canary;
mod probed;

pub use canary::{Counted, Crossing, Flight};
pub use probed::{Dispute, Fate, Gate, Probe, Probed, Probing, Run, Runs, Sweep};

/// One thing we look at. The order is the order in reports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Facet {
    /// nftables: our own table and everybody else's.
    Nftables,
    /// Sockets that wait for strangers.
    Listeners,
    /// Interfaces and addresses.
    Links,
    /// The WireGuard device of the mesh. Not read on Tailscale nodes.
    Wireguard,
    /// What tailscaled says of itself. Not read on WireGuard nodes.
    Tailscale,
    /// What sshd says of itself.
    Sshd,
    /// Modes of the files that the policy names.
    Files,
    /// The eBPF counters.
    Counters,
    /// The bind guard.
    Binds,
    /// Probes from the outside in.
    Audit,
}

impl Facet {
    pub const ALL: [Facet; 10] = [
        Facet::Nftables,
        Facet::Listeners,
        Facet::Links,
        Facet::Wireguard,
        Facet::Tailscale,
        Facet::Sshd,
        Facet::Files,
        Facet::Counters,
        Facet::Binds,
        Facet::Audit,
    ];

    pub const fn name(self) -> &'static str {
        match self {
            Facet::Nftables => "nftables",
            Facet::Listeners => "listeners",
            Facet::Links => "links",
            Facet::Wireguard => "wireguard",
            Facet::Tailscale => "tailscale",
            Facet::Sshd => "sshd",
            Facet::Files => "files",
            Facet::Counters => "counters",
            Facet::Binds => "binds",
            Facet::Audit => "audit",
        }
    }
}

impl fmt::Display for Facet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A look at one facet: what was seen, or why nothing was.
#[derive(Clone, Debug, PartialEq)]
pub enum Reading<T> {
    Seen(T),
    Blind(Gap),
}

/// Why we could not look. `reason` is one sentence for the operator, with what to do
/// about it where that is known ("needs CAP_NET_ADMIN: run as root").
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gap {
    pub reason: String,
    /// There was no answer in time: what is missing is no right and no program.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub late: bool,
}

impl Gap {
    pub fn new(reason: impl Into<String>) -> Self {
        Self { reason: reason.into(), late: false }
    }
}

impl<T> Reading<T> {
    pub fn blind(reason: impl Into<String>) -> Self {
        Reading::Blind(Gap::new(reason))
    }

    /// From a result whose error chain is the reason.
    pub fn from_result(result: anyhow::Result<T>) -> Self {
        match result {
            Ok(value) => Reading::Seen(value),
            Err(error) => Reading::blind(format!("{error:#}")),
        }
    }

    pub fn seen(&self) -> Option<&T> {
        match self {
            Reading::Seen(value) => Some(value),
            Reading::Blind(_) => None,
        }
    }

    pub fn gap(&self) -> Option<&Gap> {
        match self {
            Reading::Seen(_) => None,
            Reading::Blind(gap) => Some(gap),
        }
    }

    pub fn map<U>(self, f: impl FnOnce(T) -> U) -> Reading<U> {
        match self {
            Reading::Seen(value) => Reading::Seen(f(value)),
            Reading::Blind(gap) => Reading::Blind(gap),
        }
    }
}

/// One look at everything.
#[derive(Clone, Debug, PartialEq)]
pub struct Snapshot {
    pub at: Stamp,
    pub nftables: Reading<Ruleset>,
    pub listeners: Reading<Vec<Listener>>,
    pub links: Reading<Vec<Link>>,
    /// `Seen(None)`: looked, and there is no such device.
    pub wireguard: Reading<Option<Device>>,
    /// `Seen(None)`: the mesh is another one.
    pub tailscale: Reading<Option<Tailscaled>>,
    /// `Seen(None)`: looked, and no sshd runs or is installed.
    pub sshd: Reading<Option<Sshd>>,
    pub files: Reading<Vec<FileMode>>,
    pub counters: Reading<Counters>,
    pub binds: Reading<Binds>,
    /// Read with the counters. No facet: nftables enforces the policy without it.
    pub guard: Guard,
    /// `None`: nobody has asked from outside, or not yet.
    pub audit: Option<Reading<Probed>>,
}

impl Snapshot {
    /// The gap of a facet, if it is blind.
    pub fn gap(&self, facet: Facet) -> Option<&Gap> {
        let Self {
            at: _,
            nftables,
            listeners,
            links,
            wireguard,
            tailscale,
            sshd,
            files,
            counters,
            binds,
            guard: _,
            audit,
        } = self;
        match facet {
            Facet::Nftables => nftables.gap(),
            Facet::Listeners => listeners.gap(),
            Facet::Links => links.gap(),
            Facet::Wireguard => wireguard.gap(),
            Facet::Tailscale => tailscale.gap(),
            Facet::Sshd => sshd.gap(),
            Facet::Files => files.gap(),
            Facet::Counters => counters.gap(),
            Facet::Binds => binds.gap(),
            Facet::Audit => audit.as_ref()?.gap(),
        }
    }

    /// Whether the facet was looked at, so that what is not there now is gone.
    pub fn was_seen(&self, facet: Facet) -> bool {
        self.gap(facet).is_none() && (facet != Facet::Audit || self.audit.is_some())
    }
}

/// A TCP socket in LISTEN, or a UDP socket without a peer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listener {
    pub proto: Proto,
    /// The bound address; `0.0.0.0` or `::` for a wildcard.
    pub address: IpAddr,
    pub port: Port,
    /// On an IPv6 socket: `true` if it takes IPv6 only. `false` on `::` means that it
    /// answers on IPv4 too, although the kernel lists it once.
    pub v6only: bool,
    /// Bound to this device (SO_BINDTODEVICE), by index.
    pub device: Option<u32>,
    pub inode: u64,
    pub uid: u32,
    /// `None`: a socket of the kernel (WireGuard), or its holder could not be read.
    pub owner: Option<Actor>,
}

impl Listener {
    /// Whether a packet to `address` of this family would find this socket.
    pub fn answers(&self, address: IpAddr) -> bool {
        match (self.address, address) {
            (bound, wanted) if bound == wanted => true,
            (IpAddr::V4(bound), IpAddr::V4(_)) => bound.is_unspecified(),
            (IpAddr::V6(bound), IpAddr::V6(_)) => bound.is_unspecified(),
            (IpAddr::V6(bound), IpAddr::V4(v4)) => {
                let mapped = bound.to_ipv4_mapped().is_some_and(|own| own == v4 || own.is_unspecified());
                !self.v6only && (bound.is_unspecified() || mapped)
            }
            (IpAddr::V4(_), IpAddr::V6(_)) => false,
        }
    }

    /// Whether it takes packets of this family at all.
    pub fn serves(&self, family: Family) -> bool {
        match (self.address, family) {
            (IpAddr::V4(_), Family::Ipv4) => true,
            (IpAddr::V4(_), Family::Ipv6) => false,
            (IpAddr::V6(a), Family::Ipv6) => a.to_ipv4_mapped().is_none(),
            (IpAddr::V6(a), Family::Ipv4) => {
                !self.v6only && (a.is_unspecified() || a.to_ipv4_mapped().is_some())
            }
        }
    }

    /// `::ffff:0.0.0.0` as well, which takes any IPv4 address.
    pub fn is_wildcard(&self) -> bool {
        self.address.to_canonical().is_unspecified()
    }

    pub fn is_loopback(&self) -> bool {
        match self.address {
            IpAddr::V4(a) => a.is_loopback(),
            IpAddr::V6(a) => a.is_loopback() || a.to_ipv4_mapped().is_some_and(|m| m.is_loopback()),
        }
    }
}

/// A network interface and its addresses.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Link {
    pub index: u32,
    pub name: String,
    pub up: bool,
    /// Frames start with an Ethernet header. WireGuard and TUN devices have none.
    pub ethernet: bool,
    pub loopback: bool,
    /// Index of the bridge or bond that this is a port of. Its packets arrive on that one,
    /// too: rules see the master's name, and counting here would count them twice.
    pub master: Option<u32>,
    pub addresses: Vec<IpNet>,
}

impl Link {
    /// The link by which packets to this address leave: the one with the narrowest network
    /// that holds it. `None` where no link's network does, so that routes decide that are
    /// not read here, or where two links have the same.
    pub fn towards(links: &[Link], address: IpAddr) -> Option<&Link> {
        let usable = links.iter().filter(|link| link.up && link.master.is_none() && !link.loopback);
        let holding = usable.flat_map(|link| link.addresses.iter().map(move |net| (net, link)));
        let holding =
            holding.filter(|(net, _)| net.contains(&address) && net.prefix_len() < net.max_prefix_len());
        let narrowest = holding.clone().map(|(net, _)| net.prefix_len()).max()?;
        let mut found = holding.filter(|(net, _)| net.prefix_len() == narrowest).map(|(_, link)| link);
        let first = found.next()?;
        found.all(|other| other.index == first.index).then_some(first)
    }
}

/// A WireGuard device, from the kernel or from a userspace implementation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    pub name: String,
    /// Which interface answered: `Kernel` (generic netlink) or `Userspace` (UAPI socket).
    pub backend: Backend,
    pub public_key: Option<PublicKey>,
    pub listen_port: u16,
    pub peers: Vec<Peer>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Backend {
    Kernel,
    Userspace,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    pub public_key: PublicKey,
    pub endpoint: Option<SocketAddr>,
    /// Seconds; 0 is off.
    pub keepalive: u16,
    /// `None`: never.
    pub last_handshake: Option<Stamp>,
    pub rx_bytes: u64,
    pub tx_bytes: u64,
    pub allowed: Vec<IpNet>,
}

/// What tailscaled says of itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tailscaled {
    /// "Running" where it is up and logged in.
    pub state: String,
    pub addresses: Vec<IpAddr>,
    /// As `tag:server`.
    pub tags: Vec<String>,
    /// When its key ends; `None`: never.
    pub key_expiry: Option<Stamp>,
    pub expired: bool,
    /// It serves ssh itself, which no socket shows.
    pub ssh: bool,
    /// It refuses every connection that comes in.
    pub shields_up: bool,
    /// Its own complaints.
    pub health: Vec<String>,
    pub filter: MeshFilter,
}

/// What the control server compiled for this node: whom tailscaled lets in from the mesh.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum MeshFilter {
    /// This tailscaled doesn't tell.
    #[default]
    NotOffered,
    /// It tells, and not in a form that is known here.
    Unread(String),
    Rules(Vec<FilterRule>),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FilterRule {
    pub from: Addresses,
    pub to: Addresses,
    pub protos: Vec<Proto>,
    /// First and last.
    pub ports: (u16, u16),
}

/// What `sshd -T` of the running sshd says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sshd {
    pub password_authentication: bool,
    pub keyboard_interactive: bool,
    pub permit_root_login: String,
    pub listen: Vec<SocketAddr>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileMode {
    pub path: std::path::PathBuf,
    /// `None`: there is no such file.
    pub mode: Option<u32>,
    pub uid: u32,
}

/// Sums of the eBPF counters since they were first pinned.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// `false`: no programs are loaded (no daemon has run here yet); the rest is empty.
    pub loaded: bool,
    /// Interfaces whose two programs are attached.
    pub attached: Vec<String>,
    pub traffic: BTreeMap<TrafficKey, Amount>,
    pub attempts: BTreeMap<AttemptKey, u64>,
    /// Bytes of kernel memory that our maps and programs hold.
    pub memory_bytes: u64,
    /// When counting began, in seconds of Unix time; 0: not known.
    pub created: u64,
}

/// The bind guard, and what it refused.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Binds {
    /// `false`: no guard is loaded (no daemon has run here yet); the rest is empty.
    pub loaded: bool,
    /// Both programs are on a control group.
    pub attached: bool,
    /// Put aside by `spokeguard release --binds`.
    pub lifted: bool,
    /// At most 256; of who tried before that, only the tally tells.
    pub refusals: Vec<RefusedBind>,
    pub tally: BindTally,
    /// Bytes of kernel memory that the maps and programs hold.
    pub memory_bytes: u64,
}

/// A process that wanted to listen where it may not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RefusedBind {
    pub proto: Proto,
    pub address: IpAddr,
    pub port: Port,
    /// It was let be, since mode is audit.
    pub audited: bool,
    /// The last one that tried.
    pub by: Actor,
    pub uid: u32,
    pub count: u64,
    pub first: Stamp,
    pub last: Stamp,
}

/// Binds since the guard was first loaded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BindTally {
    pub refused: u64,
    /// Would have been refused or moved: mode was audit.
    pub audited: u64,
    /// Of sshd, from a wildcard to another address.
    pub moved: u64,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Amount {
    pub packets: u64,
    pub bytes: u64,
}

/// The tc guard, the second layer, as its pins and maps say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Guard {
    /// Nothing is pinned.
    Absent,
    /// It can't be had or looked at here, and why.
    Unavailable(String),
    There {
        rules: GuardState,
        /// Interfaces that it is on.
        attached: Vec<String>,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuardState {
    /// Everything passes.
    Idle,
    /// The policy's rules, and nothing else.
    Declared,
    /// Those or the ones before them, until a change is confirmed.
    Unconfirmed,
    /// Other rules.
    Other,
}

impl Guard {
    /// Interfaces on which the policy's rules are in force.
    pub fn holding(&self) -> &[String] {
        match self {
            Guard::There { rules: GuardState::Declared, attached } => attached,
            _ => &[],
        }
    }
}

/// One cell of the traffic table. `class` is an index into `desired.services`, or
/// `None` for a port that no service of the policy uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct TrafficKey {
    pub scope: crate::terms::Scope,
    pub direction: Direction,
    pub family: Family,
    pub proto: CountedProto,
    pub class: Option<u16>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Direction {
    In,
    Out,
}

impl Direction {
    pub const ALL: [Direction; 2] = [Direction::In, Direction::Out];
    pub const fn name(self) -> &'static str {
        match self {
            Direction::In => "in",
            Direction::Out => "out",
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum CountedProto {
    Tcp,
    Udp,
    Icmp,
    Other,
}

impl CountedProto {
    pub const ALL: [CountedProto; 4] =
        [CountedProto::Tcp, CountedProto::Udp, CountedProto::Icmp, CountedProto::Other];
    pub const fn name(self) -> &'static str {
        match self {
            CountedProto::Tcp => "tcp",
            CountedProto::Udp => "udp",
            CountedProto::Icmp => "icmp",
            CountedProto::Other => "other",
        }
    }
}

/// One cell of the table of new TCP connections (SYN without ACK) that arrive.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct AttemptKey {
    pub class: Option<u16>,
    pub family: Family,
    /// As the policy would judge it: `true` allowed.
    pub allowed: bool,
}
