//! The policy of one node as a table: the fleet's `[defaults]`, the node's own keys over them
//! (tables are merged, lists and everything else replaced), and what follows from its place in
//! the mesh. Every value keeps its place in the inventory, so that a mistake of the policy is
//! shown where its author wrote it.

use std::ops::Range;

use toml::Spanned;
use toml::de::{DeArray, DeTable, DeValue};

use crate::policy::read::Value;

/// What a policy says of the mesh and the inventory says once for all.
pub(super) struct Shared<'r, 't> {
    /// `[mesh]`, and where it is.
    pub(super) mesh: &'r DeTable<'t>,
    pub(super) at: Range<usize>,
    pub(super) version: Option<&'r Value<'t>>,
    pub(super) defaults: Option<&'r DeTable<'t>>,
    pub(super) hub: Option<Hub<'r, 't>>,
}

/// The hub as the others see it.
#[derive(Clone)]
pub(super) struct Hub<'r, 't> {
    pub(super) at: Range<usize>,
    pub(super) table: &'r DeTable<'t>,
    /// With WireGuard its key and endpoint are the others' business.
    pub(super) wireguard: bool,
    pub(super) endpoint: Option<Value<'t>>,
}

/// Who a node is.
pub(super) struct Who<'r, 't> {
    pub(super) at: Range<usize>,
    pub(super) table: &'r DeTable<'t>,
    pub(super) name: &'r str,
    pub(super) role: &'static str,
    pub(super) is_hub: bool,
}

/// Tables of a policy that a node, or `[defaults]`, may hold.
pub(super) const OVERRIDES: [&str; 9] =
    ["mesh", "public", "ssh", "local", "exception", "file", "enforce", "metrics", "heartbeat"];
/// Keys of a policy's `[mesh]` that the inventory says elsewhere, and where.
pub(super) const ELSEWHERE: [(&str, &str); 4] = [
    ("kind", "it is the same for all nodes: write it in [mesh]"),
    ("prefix", "it is the same for all nodes: write it in [mesh]"),
    ("hub", "write hub = \"NAME\" in [mesh]; the rest is taken from that node"),
    ("address", "write `mesh_address` in [[node]]"),
];

pub(super) fn policy<'t>(shared: &Shared<'_, 't>, who: &Who<'_, 't>) -> DeTable<'t> {
    let mut out = DeTable::new();
    if let Some(version) = shared.version {
        put(&mut out, "version", version.clone());
    }
    for key in OVERRIDES {
        let own = who.table.get(key);
        match (shared.defaults.and_then(|defaults| defaults.get(key)), own) {
            (Some(base), Some(own)) => put(&mut out, key, merged(base, own)),
            (Some(one), None) | (None, Some(one)) => put(&mut out, key, one.clone()),
            (None, None) => {}
        }
    }
    let mut node = DeTable::new();
    put(&mut node, "name", who.table.get("name").cloned().unwrap_or_else(|| text(&who.at, who.name)));
    put(&mut node, "role", who.table.get("role").cloned().unwrap_or_else(|| text(&who.at, who.role)));
    put(&mut out, "node", Spanned::new(who.at.clone(), DeValue::Table(node)));
    if !out.contains_key("mesh") {
        put(&mut out, "mesh", Spanned::new(shared.at.clone(), DeValue::Table(DeTable::new())));
    }
    if let Some(DeValue::Table(mesh)) = out.get_mut("mesh").map(Spanned::get_mut) {
        for (key, _) in ELSEWHERE {
            mesh.remove(key);
        }
        copy(shared.mesh, &["kind", "prefix"], mesh);
        if let Some(address) = who.table.get("mesh_address") {
            put(mesh, "address", listed(address));
        }
        match &shared.hub {
            Some(_) if who.is_hub => {
                if let Some(port) = shared.mesh.get("port").filter(|_| !mesh.contains_key("listen_port")) {
                    put(mesh, "listen_port", port.clone());
                }
            }
            Some(hub) => put(mesh, "hub", hub_table(hub)),
            None => {}
        }
    }
    out
}

fn hub_table<'t>(hub: &Hub<'_, 't>) -> Value<'t> {
    let mut out = DeTable::new();
    if let Some(address) = hub.table.get("mesh_address") {
        put(&mut out, "address", address.clone());
    }
    if hub.wireguard {
        copy(hub.table, &["public_key"], &mut out);
    }
    if let Some(endpoint) = hub.endpoint.as_ref().filter(|_| hub.wireguard) {
        put(&mut out, "endpoint", endpoint.clone());
    }
    Spanned::new(hub.at.clone(), DeValue::Table(out))
}

fn merged<'t>(base: &Value<'t>, own: &Value<'t>) -> Value<'t> {
    let (DeValue::Table(under), DeValue::Table(over)) = (base.get_ref(), own.get_ref()) else {
        return own.clone();
    };
    let mut out = under.clone();
    for (key, value) in over.iter() {
        let value = match out.get(key.get_ref().as_ref()) {
            Some(base) => merged(base, value),
            None => value.clone(),
        };
        // The key goes too: it is the place of a value that is missing.
        out.remove(key.get_ref().as_ref());
        out.insert(key.clone(), value);
    }
    Spanned::new(own.span(), DeValue::Table(out))
}

fn copy<'t>(from: &DeTable<'t>, keys: &[&str], to: &mut DeTable<'t>) {
    for (key, value) in keys.iter().filter_map(|key| from.get_key_value(*key)) {
        to.insert(key.clone(), value.clone());
    }
}

fn put<'t>(table: &mut DeTable<'t>, key: &'static str, value: Value<'t>) {
    table.insert(Spanned::new(value.span(), key.into()), value);
}

/// One address may stand without brackets in an inventory.
fn listed<'t>(value: &Value<'t>) -> Value<'t> {
    if !matches!(value.get_ref(), DeValue::String(_)) {
        return value.clone();
    }
    let mut array = DeArray::new();
    array.push(value.clone());
    Spanned::new(value.span(), DeValue::Array(array))
}

pub(super) fn text<'t>(at: &Range<usize>, text: &str) -> Value<'t> {
    Spanned::new(at.clone(), DeValue::String(text.to_owned().into()))
}
