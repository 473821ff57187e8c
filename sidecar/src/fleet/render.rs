//! What a fleet needs from its inventory, as files: a function of what the inventory says and
//! not of the order in which it says it.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::net::IpAddr;

use ipnet::IpNet;
use serde_json::{Value, json};

use super::{Inventory, Node, role_name};
use crate::policy::{self, MeshKind, Policy, Sources};

/// Every file that is written holds this near its beginning; others are never touched.
pub const MARK: &str = "Written by `spokeguard fleet render`";
/// How far into a file its mark is looked for, in bytes.
pub const MARK_WITHIN: usize = 512;

/// Path below the output directory, and text.
pub type Files = BTreeMap<String, String>;

/// Every file of the fleet.
pub fn all(inventory: &Inventory) -> Files {
    let mut out = Files::new();
    for node in &inventory.nodes {
        out.extend(of_node(inventory, node));
    }
    out.insert("prometheus/file_sd.json".into(), file_sd(inventory));
    out.insert("nix/nodes.json".into(), nix(inventory));
    let records = records(inventory);
    if !records.is_empty() {
        let mut zone = format!("; {}\n", marked(inventory));
        for record in &records {
            let Record { name, sort, address, node } = record;
            let _ = writeln!(zone, "{:<32} IN {sort:<4} {address} ; {node}", format!("{name}."));
        }
        out.insert("dns.txt".into(), zone);
        let records: Vec<Value> = records
            .iter()
            .map(|r| json!({ "name": r.name, "type": r.sort, "address": r.address, "node": r.node }))
            .collect();
        out.insert("dns.json".into(), pretty(&json!({ "comment": marked(inventory), "records": records })));
    }
    out
}

/// The files of one node, below `nodes/NAME/`.
pub fn of_node(inventory: &Inventory, node: &Node) -> Files {
    let mut out = Files::new();
    let mut put = |name: &str, text: String| out.insert(format!("nodes/{}/{name}", node.name), text);
    put("policy.toml", format!("# {}\n{}", marked(inventory), policy_text(&node.policy)));
    if inventory.mesh.kind == MeshKind::Wireguard {
        let tunnel = Tunnel::new(inventory, node);
        put("wireguard.conf", tunnel.quick());
        put("wireguard.netdev", tunnel.netdev());
        put("wireguard.network", tunnel.network());
        put("wireguard.json", tunnel.nix());
    }
    out
}

/// One name of a node in DNS that should lead to it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Record {
    /// Fully qualified, without the dot at the end.
    pub name: String,
    /// "A" or "AAAA".
    pub sort: &'static str,
    pub address: IpAddr,
    pub node: String,
}

/// The records to expect, by name.
pub fn records(inventory: &Inventory) -> Vec<Record> {
    let mut out = Vec::new();
    for node in &inventory.nodes {
        for name in inventory.domains(node) {
            out.extend(node.public_address.iter().map(|address| Record {
                name: name.to_ascii_lowercase(),
                sort: if address.is_ipv4() { "A" } else { "AAAA" },
                address: *address,
                node: node.name.clone(),
            }));
        }
    }
    out.sort();
    out
}

/// Where the private half of a node's key is expected on the node.
pub fn private_key_path(policy: &Policy) -> String {
    format!("/etc/wireguard/{}.key", policy.mesh.interface)
}

fn marked(inventory: &Inventory) -> String {
    format!("{MARK} from the inventory of {}: change that, not this.", inventory.name)
}

/// In normal form, lists in order, without keys that change nothing on this node.
pub fn policy_text(policy: &Policy) -> String {
    let mut policy = policy.clone();
    for list in [&mut policy.public.tcp, &mut policy.public.udp] {
        list.sort_unstable();
    }
    for service in &mut policy.services {
        service.tcp.sort_unstable();
        service.udp.sort_unstable();
        sort(&mut service.from);
    }
    sort(&mut policy.ssh.from);
    for local in &mut policy.locals {
        local.tcp.sort_unstable();
        local.udp.sort_unstable();
    }
    for exception in &mut policy.exceptions {
        exception.tcp.sort_unstable();
        exception.udp.sort_unstable();
        exception.from.sort_unstable();
    }
    policy.services.sort_by(|a, b| a.name.cmp(&b.name));
    policy.locals.sort_by(|a, b| a.name.cmp(&b.name));
    policy.exceptions.sort_by(|a, b| a.name.cmp(&b.name));
    policy.files.sort_by(|a, b| a.path.cmp(&b.path));
    let tailscale = policy.mesh.kind == MeshKind::Tailscale;
    let silent = policy.heartbeat.kuma_url_file.is_none() && policy.heartbeat.ntfy_url_file.is_none();
    let mut out = String::new();
    let mut table = "";
    let text = policy::show(&policy);
    for line in text.lines() {
        if line.starts_with('[') {
            table = line;
        }
        let idle = table == "[mesh]"
            && tailscale
            && (line.starts_with("keepalive = ") || line.starts_with("handshake_max_age = "))
            || table == "[heartbeat]" && silent;
        if !idle {
            out.push_str(line);
            out.push('\n');
        }
    }
    out.truncate(out.trim_end().len());
    out.push('\n');
    out
}

fn sort(from: &mut Sources) {
    if let Sources::Prefixes(list) = from {
        list.sort_unstable();
    }
}

/// One end of the tunnel: public keys only.
struct Tunnel<'i> {
    head: String,
    policy: &'i Policy,
    /// With the length of the mesh's prefix, as the interface gets them.
    addresses: Vec<IpNet>,
    peers: Vec<Peer<'i>>,
}

struct Peer<'i> {
    node: &'i Node,
    key: String,
    allowed: Vec<IpNet>,
    endpoint: Option<String>,
    keepalive_s: Option<u64>,
}

impl<'i> Tunnel<'i> {
    fn new(inventory: &'i Inventory, node: &'i Node) -> Self {
        let within = |address: &IpAddr| {
            let prefixes = inventory.mesh.prefix.iter().filter(|prefix| prefix.contains(address));
            let length = prefixes.map(IpNet::prefix_len).max();
            IpNet::new(*address, length?).ok()
        };
        let addresses = node.mesh_address.iter().filter_map(within).collect();
        let hub = inventory.hub().filter(|hub| hub.name != node.name);
        let others: Vec<&Node> = match hub {
            Some(hub) => vec![hub],
            None => inventory.sorted().into_iter().filter(|other| other.name != node.name).collect(),
        };
        let peer = |other: &'i Node| {
            Some(Peer {
                node: other,
                key: other.public_key?.to_string(),
                // A spoke reaches everybody through the hub.
                allowed: match hub {
                    Some(_) => inventory.mesh.prefix.clone(),
                    None => other.mesh_address.iter().copied().map(IpNet::from).collect(),
                },
                endpoint: other.endpoint.map(|endpoint| endpoint.to_string()),
                keepalive_s: node.policy.mesh.keepalive.map(|every| every.as_secs()),
            })
        };
        let peers = others.into_iter().filter_map(peer).collect();
        Self { head: format!("# {}\n", marked(inventory)), policy: &node.policy, addresses, peers }
    }

    /// For wg-quick.
    fn quick(&self) -> String {
        let mut out = format!("{}\n[Interface]\n", self.head);
        let _ = writeln!(out, "Address = {}", joined(&self.addresses));
        if let Some(port) = self.policy.mesh.listen_port {
            let _ = writeln!(out, "ListenPort = {port}");
        }
        // %i is the interface; it goes through a shell.
        out.push_str("# The private half never leaves the node.\n");
        out.push_str("PostUp = wg set %i private-key /etc/wireguard/%i.key\n");
        for peer in &self.peers {
            let _ = writeln!(out, "\n# {}\n[Peer]", peer.node.name);
            let _ = writeln!(out, "PublicKey = {}\nAllowedIPs = {}", peer.key, joined(&peer.allowed));
            if let Some(endpoint) = &peer.endpoint {
                let _ = writeln!(out, "Endpoint = {endpoint}");
            }
            if let Some(seconds) = peer.keepalive_s {
                let _ = writeln!(out, "PersistentKeepalive = {seconds}");
            }
        }
        out
    }

    /// For systemd-networkd, which reads the private half from a file.
    fn netdev(&self) -> String {
        let interface = &self.policy.mesh.interface;
        let mut out = format!("{}\n[NetDev]\nName={interface}\nKind=wireguard\n\n[WireGuard]\n", self.head);
        let _ = writeln!(out, "PrivateKeyFile={}", private_key_path(self.policy));
        if let Some(port) = self.policy.mesh.listen_port {
            let _ = writeln!(out, "ListenPort={port}");
        }
        for peer in &self.peers {
            let _ = writeln!(out, "\n# {}\n[WireGuardPeer]\nPublicKey={}", peer.node.name, peer.key);
            for net in &peer.allowed {
                let _ = writeln!(out, "AllowedIPs={net}");
            }
            if let Some(endpoint) = &peer.endpoint {
                let _ = writeln!(out, "Endpoint={endpoint}");
            }
            if let Some(seconds) = peer.keepalive_s {
                let _ = writeln!(out, "PersistentKeepalive={seconds}");
            }
        }
        out
    }

    fn network(&self) -> String {
        let mut out = format!("{}\n[Match]\nName={}\n\n[Network]\n", self.head, self.policy.mesh.interface);
        for address in &self.addresses {
            let _ = writeln!(out, "Address={address}");
        }
        out
    }

    /// For `networking.wireguard.interfaces` of NixOS, in its own words.
    fn nix(&self) -> String {
        let peers = self.peers.iter().map(|peer| {
            let mut out =
                json!({ "name": peer.node.name, "publicKey": peer.key, "allowedIPs": peer.allowed });
            if let Some(endpoint) = &peer.endpoint {
                out["endpoint"] = json!(endpoint);
            }
            if let Some(seconds) = peer.keepalive_s {
                out["persistentKeepalive"] = json!(seconds);
            }
            out
        });
        let peers: Vec<Value> = peers.collect();
        let mut interface = json!({
            "ips": self.addresses,
            "privateKeyFile": private_key_path(self.policy),
            "peers": peers,
        });
        if let Some(port) = self.policy.mesh.listen_port {
            interface["listenPort"] = json!(port);
        }
        let comment = self.head.trim_start_matches("# ").trim_end();
        pretty(
            &json!({ "comment": comment, "interfaces": { self.policy.mesh.interface.as_str(): interface } }),
        )
    }
}

/// For Prometheus' file_sd: one group for each node.
fn file_sd(inventory: &Inventory) -> String {
    let group = |node: &Node| {
        let mut labels = node.labels.clone();
        // Prometheus drops labels of this beginning; it is where the mark can be.
        labels.insert("__meta_spokeguard".into(), marked(inventory));
        labels.insert("fleet".into(), inventory.name.clone());
        labels.insert("node".into(), node.name.clone());
        labels.insert("role".into(), role_name(node.role).into());
        labels.extend(node.region.clone().map(|region| ("region".into(), region)));
        json!({ "labels": labels, "targets": [node.metrics_target()] })
    };
    pretty(&Value::Array(inventory.sorted().into_iter().map(group).collect()))
}

/// Variables of each node for Nix.
fn nix(inventory: &Inventory) -> String {
    let nodes = inventory.sorted().into_iter().map(|node| (node.name.clone(), variables(inventory, node)));
    let nodes: serde_json::Map<String, Value> = nodes.collect();
    let hub = inventory.hub().map(|hub| &hub.name);
    pretty(&json!({ "comment": marked(inventory), "fleet": inventory.name, "hub": hub, "nodes": nodes }))
}

/// Those of one node alone.
pub fn nix_node(inventory: &Inventory, node: &Node) -> String {
    pretty(&variables(inventory, node))
}

/// What is secret is no variable.
fn variables(inventory: &Inventory, node: &Node) -> Value {
    let mut out = json!({
        "hostname": node.hostname,
        "role": role_name(node.role),
        "mesh_address": node.mesh_address,
        "public_address": node.public_address,
        "labels": node.labels,
        "subdomain": node.subdomain.first(),
        "domains": inventory.domains(node),
        "region": node.region,
        "ssh_port": node.ssh_port(),
        "metrics_port": node.metrics_port(),
    });
    if inventory.mesh.kind == MeshKind::Wireguard {
        out["wg_ip"] = json!(node.mesh_address.first());
        out["public_key"] = json!(node.public_key);
        if let Some(endpoint) = node.endpoint {
            out["endpoint"] = json!(endpoint);
        }
    }
    if node.labels.get("provider").is_some_and(|provider| provider == "aws") {
        out["aws_region"] = json!(node.region);
    }
    out
}

fn joined(nets: &[IpNet]) -> String {
    nets.iter().map(IpNet::to_string).collect::<Vec<_>>().join(", ")
}

fn pretty(value: &Value) -> String {
    format!("{value:#}\n")
}
