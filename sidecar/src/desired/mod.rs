//! What should be, computed from a [`Policy`] alone: our nftables table, the services
//! by port, and the proof that the operator keeps a way in. Pure.

use ipnet::IpNet;
use std::net::IpAddr;

use crate::policy::Policy;
use crate::ruleset::Table;
use crate::terms::{Port, Proto, Scope};

pub const TABLE: &str = "spokeguard";
/// Before every firewall at `filter` (0) that composes with us, after conntrack and DNAT.
pub const PRIORITY: i32 = -10;
/// Every rule of ours carries this comment prefix and then its rule id.
pub const COMMENT_PREFIX: &str = "spokeguard:";

#[derive(Clone, Debug, PartialEq)]
pub struct Desired {
    pub policy: Policy,
    /// The day (UTC) for which exceptions were judged.
    pub today: jiff::civil::Date,
    /// Our table; `None` where `[enforce] firewall = false`.
    pub table: Option<Table>,
    /// `None` only where the policy says `allow_no_admin_path = true`.
    pub admin: Option<AdminPath>,
    /// Every port that the policy speaks of, in a stable order. The index is the class
    /// number of the eBPF counters.
    pub services: Vec<Service>,
}

/// Proof that the hub (or whoever administers this node) gets in: someone, through the
/// mesh or from listed addresses, reaches sshd. Only [`admin_path`] makes one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AdminPath {
    pub(crate) from: Vec<IpNet>,
    pub(crate) to: Vec<IpAddr>,
    pub(crate) port: Port,
}

/// One port of the policy and who may reach it.
#[derive(Clone, Debug, PartialEq)]
pub struct Service {
    /// Label in metrics: the well-known or configured name ("http", "https", "ssh",
    /// "metrics", "netdata", "wireguard", else "tcp-8443").
    pub name: String,
    pub proto: Proto,
    pub port: Port,
    pub scope: Scope,
    /// Which `[[local]]`, for `Scope::Other`.
    pub local: Option<usize>,
    /// Who may reach it; `None`: anyone in that scope.
    pub from: Option<Vec<IpNet>>,
    /// Which `[[exception]]` opened it, if one did.
    pub exception: Option<usize>,
}
