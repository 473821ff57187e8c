//! What should be, computed from a [`Policy`] alone: our nftables table, the services
//! by port, and the proof that the operator keeps a way in. Pure.

mod admin;
pub mod binds;
pub mod guard;
mod services;
mod table;

use ipnet::IpNet;
use std::net::IpAddr;

use crate::policy::Exception;
use crate::policy::Policy;
use crate::ruleset::{Chain, Table, TableFamily, glass};
use crate::terms::{Port, Proto, Scope, Stamp};

pub use admin::{NoAdminPath, admin_path};
pub use guard::GuardRules;
pub use table::DropReason;

pub const TABLE: &str = "spokeguard";
/// Before every firewall at `filter` (0) that composes with us, after conntrack and DNAT.
pub const PRIORITY: i32 = -10;
/// How the chains begin that a canary puts into our table, to see that they are taken out again.
pub const CANARY_CHAIN: &str = "canary-";

pub fn is_own_table(table: &Table) -> bool {
    table.family == TableFamily::Inet && table.name == TABLE
}

/// Takes out of what was listed of our table what a daemon's canary does there at the moment, or left when it was
/// stopped in the middle: chains that nothing enters and that hold nothing. To whoever asks what differs that is
/// nothing; the daemon takes them away.
pub fn take_out_canaries(table: &mut Table) {
    let is_canary = |chain: &Chain| {
        chain.name.starts_with(CANARY_CHAIN) && chain.base.is_none() && chain.rules.is_empty()
    };
    table.chains.retain(|chain| !is_canary(chain));
}
/// `meta priority` of the probes of our own audits, as nft writes it, and of no packet that
/// a device received: only who has it is not counted among what is dropped.
pub const PROBE_PRIORITY: &str = "7370:6f6b";
/// What an opening is called among services and exceptions.
pub const BREAK_GLASS: &str = "break-glass";
/// Every rule of ours carries this comment prefix and then its rule id.
pub const COMMENT_PREFIX: &str = "spokeguard:";

#[derive(Clone, Debug, PartialEq)]
pub struct Desired {
    pub policy: Policy,
    /// The day (UTC) for which exceptions were judged.
    pub today: jiff::civil::Date,
    /// Our table; `None` where `[enforce] firewall = false`.
    pub table: Option<Table>,
    /// The same for new connections, below every table; `None` where `table` is.
    pub guard: Option<GuardRules>,
    /// `None` only where the policy says `allow_no_admin_path = true`.
    pub admin: Option<AdminPath>,
    /// Every port that the policy speaks of, in a stable order. The index is the class
    /// number of the eBPF counters.
    pub services: Vec<Service>,
}

impl Desired {
    /// Refuses a policy by which nobody could get in, unless it says that this is meant.
    pub fn new(policy: Policy, today: jiff::civil::Date) -> Result<Self, NoAdminPath> {
        let admin = match admin_path(&policy) {
            Ok(path) => Some(path),
            Err(_) if policy.enforce.allow_no_admin_path => None,
            Err(nobody) => return Err(nobody),
        };
        let table = policy.enforce.firewall.then(|| table::table(&policy, today));
        let guard = policy.enforce.firewall.then(|| GuardRules::new(&policy, today));
        let services = services::services(&policy, today);
        Ok(Self { policy, today, table, guard, admin, services })
    }

    /// The same table for a day that is not known: what an exception opens carries its end,
    /// which the kernel judges by its clock.
    pub fn sealed(&self) -> Option<Table> {
        self.table.is_some().then(|| table::sealed(&self.policy))
    }

    /// The services that a packet to this port, arriving in this scope, may be meant for.
    /// Exceptions and what `[public]` opens to anyone count in every scope. For `Scope::Other` look at `local` as well: each
    /// `[[local]]` has a list of its own.
    pub fn wanted(&self, proto: Proto, port: Port, scope: Scope) -> Vec<&Service> {
        self.services
            .iter()
            .filter(|s| s.proto == proto && s.port == port && (s.scope == scope || s.is_everywhere()))
            .collect()
    }

    /// The service that opens this port to anyone on the internet, if one does. An
    /// exception may: see [`Service::exception`].
    pub fn public(&self, proto: Proto, port: Port) -> Option<&Service> {
        self.wanted(proto, port, Scope::Public).into_iter().find(|s| s.is_for_anyone())
    }

    /// The same with what is open for a while counted among the exceptions, so that what it
    /// lets in is accepted as theirs is. The table stays: it is the policy's alone.
    pub fn with_openings(&self, openings: &[glass::Opening], now: Stamp) -> Self {
        let mut out = self.clone();
        for opening in openings {
            let glass::Opening { proto, port, from, owner, reason, .. } = opening;
            let ports = |of: Proto| if of == *proto { vec![*port] } else { Vec::new() };
            out.services.push(Service {
                name: BREAK_GLASS.to_owned(),
                proto: *proto,
                port: *port,
                scope: Scope::Public,
                local: None,
                from: Some(vec![*from]),
                exception: Some(out.policy.exceptions.len()),
            });
            out.policy.exceptions.push(Exception {
                name: BREAK_GLASS.to_owned(),
                tcp: ports(Proto::Tcp),
                udp: ports(Proto::Udp),
                from: vec![*from],
                reason: reason.clone(),
                owner: Some(owner.clone()),
                until: opening.ends(now).0.to_zoned(jiff::tz::TimeZone::UTC).date(),
            });
        }
        out
    }

    /// What a port is called in metrics and reports, wherever it is reachable.
    pub fn name_of(&self, proto: Proto, port: Port) -> Option<&str> {
        self.services.iter().find(|s| s.proto == proto && s.port == port).map(|s| s.name.as_str())
    }

    /// Whether an address is one of the mesh.
    pub fn in_mesh(&self, address: IpAddr) -> bool {
        self.policy.mesh.prefix.iter().any(|net| net.contains(&address))
    }
}

/// Proof that the hub (or whoever administers this node) gets in: someone, through the
/// mesh or from listed addresses, reaches sshd. Only [`admin_path`] makes one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AdminPath {
    pub(crate) from: Vec<IpNet>,
    pub(crate) to: Vec<IpAddr>,
    pub(crate) within: Vec<IpNet>,
    pub(crate) port: Port,
}

impl AdminPath {
    /// Who gets in. Never empty.
    pub fn from(&self) -> &[IpNet] {
        &self.from
    }

    /// The addresses of this node that they reach. Empty where the mesh assigns the
    /// address (Tailscale): it lies in [`Self::within`] then.
    pub fn to(&self) -> &[IpAddr] {
        &self.to
    }

    /// The mesh prefixes that stand for an address the policy does not know; empty
    /// where it does.
    pub fn within(&self) -> &[IpNet] {
        &self.within
    }

    /// The port of sshd.
    pub fn port(&self) -> Port {
        self.port
    }
}

/// One port of the policy and who may reach it.
#[derive(Clone, Debug, PartialEq)]
pub struct Service {
    /// Label in metrics: the well-known or configured name ("http", "https", "ssh",
    /// "metrics", "netdata", "wireguard", else "tcp-8443"). With `proto` it is unique.
    pub name: String,
    pub proto: Proto,
    pub port: Port,
    pub scope: Scope,
    /// Which `[[local]]`, for `Scope::Other`.
    pub local: Option<usize>,
    /// Who may reach it; `None`: anyone in that scope.
    pub from: Option<Vec<IpNet>>,
    /// Which `[[exception]]` opened it, if one did. Holds in every scope.
    pub exception: Option<usize>,
}

impl Service {
    /// Whether this source may reach it.
    pub fn admits(&self, source: IpAddr) -> bool {
        self.from.as_ref().is_none_or(|nets| nets.iter().any(|net| net.contains(&source)))
    }

    /// Open by whatever way one comes: an exception, or what `[public]` opens to anyone.
    pub fn is_everywhere(&self) -> bool {
        self.exception.is_some() || (self.scope == Scope::Public && self.from.is_none())
    }

    /// No restriction of the source, for one family at least.
    pub fn is_for_anyone(&self) -> bool {
        self.from.as_ref().is_none_or(|nets| nets.iter().any(|net| net.prefix_len() == 0))
    }
}

#[cfg(test)]
pub(crate) mod samples;
