//! A fleet as its inventory declares it: who is in it, where, and the policy of each. Values
//! only; `cli::fleet` reads and writes the files.

pub mod bundle;
pub mod edit;
pub mod exposition;
pub mod health;
pub mod history;
mod inventory;
mod merge;
pub mod page;
pub mod render;
pub mod roll;
pub mod secrets;
pub mod side;
pub mod table;
#[cfg(test)]
mod tests;
pub mod view;
pub mod vitals;

use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;

use crate::policy::{MeshKind, Note, NoteKind, Policy, Role};
use crate::terms::{Port, PublicKey};

pub use inventory::{BYTES_MAX, Keys, NODES_MAX, parse};

/// An inventory that has been read and checked, each node with the policy that follows.
#[derive(Clone, Debug)]
pub struct Inventory {
    /// The name under which its mistakes are shown.
    pub file: String,
    /// `[fleet] name`.
    pub name: String,
    /// `[fleet] domain`, below which the nodes' names are.
    pub domain: Option<String>,
    pub mesh: Mesh,
    /// In the order of the file; at least one. Names, addresses and keys are unlike.
    pub nodes: Vec<Node>,
    /// What its author will want to know, in the order of the file.
    pub notes: Vec<Note>,
}

/// `[mesh]`: what all nodes share.
#[derive(Clone, Debug, PartialEq)]
pub struct Mesh {
    pub kind: MeshKind,
    pub prefix: Vec<IpNet>,
    /// The node that is the hub; always there with WireGuard.
    pub hub: Option<String>,
    /// The UDP port of the hub's tunnel. `None` with Tailscale, which chooses it.
    pub port: Option<Port>,
}

/// One `[[node]]`.
#[derive(Clone, Debug, PartialEq)]
pub struct Node {
    /// A DNS label.
    pub name: String,
    pub role: Role,
    /// May be empty with Tailscale, which assigns them.
    pub mesh_address: Vec<IpAddr>,
    pub public_address: Vec<IpAddr>,
    /// `None` with Tailscale, or where [`Keys::MayBeMissing`] was asked for.
    pub public_key: Option<PublicKey>,
    /// Where its tunnel is reached from the internet; the hub's is known with WireGuard.
    pub endpoint: Option<SocketAddr>,
    pub region: Option<String>,
    /// Names as Prometheus takes them.
    pub labels: BTreeMap<String, String>,
    /// What the machine calls itself; by default its name.
    pub hostname: String,
    /// Below the fleet's domain; "@" is the domain itself. Empty where it has no domain.
    pub subdomain: Vec<String>,
    /// The `[defaults]` with this node's overrides, checked as `policy check` does.
    pub policy: Policy,
    /// Where it begins in the inventory, from 1.
    pub line: u32,
}

impl Inventory {
    pub fn node(&self, name: &str) -> Option<&Node> {
        self.nodes.iter().find(|node| node.name == name)
    }

    /// The hub, where the fleet has one.
    pub fn hub(&self) -> Option<&Node> {
        self.mesh.hub.as_deref().and_then(|hub| self.node(hub))
    }

    /// In the order of their names, which is that of everything that is written.
    pub fn sorted(&self) -> Vec<&Node> {
        let mut nodes: Vec<&Node> = self.nodes.iter().collect();
        nodes.sort_by(|a, b| a.name.cmp(&b.name));
        nodes
    }

    /// Names in DNS that lead to a node, the first one before others; fully qualified,
    /// without the dot at the end.
    pub fn domains(&self, node: &Node) -> Vec<String> {
        let domain = self.domain.iter();
        let full = |domain: &String| {
            let below = node.subdomain.iter();
            let full =
                below.map(|below| if below == "@" { domain.clone() } else { format!("{below}.{domain}") });
            full.collect::<Vec<_>>()
        };
        domain.flat_map(full).collect()
    }

    /// Notes on exceptions past their end, which `policy check` calls mistakes.
    pub fn expired(&self) -> impl Iterator<Item = &Note> {
        self.notes.iter().filter(|note| note.kind == NoteKind::Expired)
    }
}

impl Node {
    pub fn is_hub(&self) -> bool {
        self.role == Role::Hub
    }

    pub fn ssh_port(&self) -> Port {
        self.policy.ssh.port
    }

    pub fn metrics_port(&self) -> Port {
        self.policy.metrics.port
    }

    /// Where its metrics are scraped, `host:port`: at its first mesh address, or by its
    /// hostname where Tailscale assigns the address.
    pub fn metrics_target(&self) -> String {
        self.target(self.metrics_port())
    }

    /// `host:port` through the mesh.
    pub fn target(&self, port: Port) -> String {
        match self.mesh_address.first() {
            Some(address) => SocketAddr::new(*address, port.get()).to_string(),
            None => format!("{}:{port}", self.hostname),
        }
    }
}

/// As the inventory spells it.
pub fn role_name(role: Role) -> &'static str {
    match role {
        Role::Spoke => "spoke",
        Role::Hub => "hub",
        Role::Device => "device",
    }
}

/// Some of a fleet's nodes: by name, role, region and labels, all of which must fit.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Filter {
    /// None, or "all": every node.
    pub names: Vec<String>,
    pub role: Option<Role>,
    pub region: Option<String>,
    pub labels: Vec<(String, String)>,
}

/// Nothing is selected, or somebody who isn't there.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotSelected {
    #[error("{}", Unknown(.name, .near.as_deref(), .file))]
    Unknown { name: String, near: Option<String>, file: String },
    #[error("no node of {file} is meant by this role, region and labels")]
    Nobody { file: String },
}

struct Unknown<'a>(&'a str, Option<&'a str>, &'a str);

impl fmt::Display for Unknown<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Unknown(name, near, file) = self;
        let printable = crate::terms::printable;
        write!(f, "no node \"{}\" in {}", printable(name, 63), printable(file, 200))?;
        near.map_or(Ok(()), |near| write!(f, "; did you mean {near}?"))
    }
}

impl Filter {
    /// In the order of the file.
    pub fn of<'i>(&self, inventory: &'i Inventory) -> Result<Vec<&'i Node>, NotSelected> {
        let everyone = self.names.is_empty() || self.names.iter().any(|name| name == "all");
        for name in self.names.iter().filter(|name| *name != "all") {
            if inventory.node(name).is_none() {
                let names: Vec<&str> = inventory.nodes.iter().map(|node| node.name.as_str()).collect();
                let near = crate::policy::read::nearest(name, &names).map(str::to_owned);
                return Err(NotSelected::Unknown { name: name.clone(), near, file: inventory.file.clone() });
            }
        }
        let meant = |node: &&Node| {
            (everyone || self.names.contains(&node.name))
                && self.role.is_none_or(|role| role == node.role)
                && self.region.as_ref().is_none_or(|region| Some(region) == node.region.as_ref())
                && self.labels.iter().all(|(key, value)| node.labels.get(key) == Some(value))
        };
        let nodes: Vec<&Node> = inventory.nodes.iter().filter(meant).collect();
        match nodes.is_empty() {
            true => Err(NotSelected::Nobody { file: inventory.file.clone() }),
            false => Ok(nodes),
        }
    }
}
