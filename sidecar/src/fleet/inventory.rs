//! From the text of a `fleet.toml` to an [`Inventory`], or to every mistake in it at once: the
//! inventory's own, those between nodes, and those of the policies that follow from it.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::ops::Range;

use jiff::civil::Date;
use toml::de::{DeTable, DeValue};

use super::merge::{self, ELSEWHERE, Hub, OVERRIDES, Shared, Who};
use super::{Inventory, Mesh, Node, role_name, secrets};
use crate::desired::admin_path;
use crate::policy::mistake::Source;
use crate::policy::read::{
    self, Class, Found, Grammar, Ground, POLICY, Reader, Section, Wrong, shorten, text_of, wrong,
};
use crate::policy::{MeshKind, Mistakes, Note, NoteKind, Policy, Role};
use crate::terms::{Port, PublicKey};

/// A larger file is refused before it is parsed.
pub const BYTES_MAX: u64 = 16 << 20;
pub const NODES_MAX: usize = 10_000;
const ADDRESSES_MAX: usize = 64;
const SUBDOMAINS_MAX: usize = 16;
const LABELS_MAX: usize = 16;
/// The port of a WireGuard hub that names none.
const TUNNEL_PORT: Port = Port::new(51820).expect("51820 is a port");

const INVENTORY: Grammar = Grammar {
    tables: &[
        ("", None, &["version", "fleet", "mesh", "defaults", "node"]),
        ("fleet", None, &["name", "domain"]),
        ("mesh", None, &["kind", "prefix", "hub", "port"]),
        ("defaults", None, &OVERRIDES),
        ("node", Some(NODES_MAX), &NODE),
    ],
    advice,
};
#[rustfmt::skip]
const NODE: [&str; 19] = [
    "name", "role", "mesh_address", "public_address", "public_key", "endpoint", "region", "hostname", "subdomain",
    "labels", "mesh", "public", "ssh", "local", "exception", "file", "enforce", "metrics", "heartbeat",
];
/// Labels that every target has already.
const LABELS_TAKEN: [&str; 6] = ["node", "region", "role", "fleet", "job", "instance"];

/// Whether every node of a WireGuard fleet must have its public key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keys {
    Required,
    /// For whoever is about to make them.
    MayBeMissing,
}

/// `file` is only a name to show. `today` (UTC) tells which exceptions have expired.
pub fn parse(text: &str, file: &str, today: Date, keys: Keys) -> Result<Inventory, Mistakes> {
    let source = Source::new(text);
    let report = |found: Found| found.report(&source, file);
    let (table, found) = read::document(&source).map_err(report)?;
    let mut reader = Reader::new(found);
    let root = Section::root(&INVENTORY, table.get_ref());
    if !reader.version(&root, "inventories") {
        return Err(report(reader.found));
    }
    reader.unknown_keys(&root);
    let fleet = reader.section(&root, "fleet");
    let name = reader.need(&fleet, "name", "name = \"vault\"", read::name).unwrap_or_default();
    let domain = reader.get(&fleet, "domain", domain);
    let section = reader.section(&root, "mesh");
    let kind = reader.get(&section, "kind", read::mesh_kind).unwrap_or(MeshKind::Wireguard);
    let wireguard = kind == MeshKind::Wireguard && !reader.doubtful.contains("mesh.kind");
    if wireguard {
        reader.missing(&section, "prefix", "prefix = [\"10.84.0.0/24\"]");
        reader.missing(&section, "hub", "hub = \"zurich\"");
    }
    let prefixes = ("prefixes", read::PREFIXES_MAX);
    let mesh = Mesh {
        kind,
        prefix: reader.list(&section, "prefix", prefixes, read::mesh_prefix).unwrap_or_else(|| match kind {
            MeshKind::Wireguard => Vec::new(),
            MeshKind::Tailscale => read::tailscale_prefixes(),
        }),
        hub: reader.get(&section, "hub", read::name),
        port: reader.get(&section, "port", read::port).or(wireguard.then_some(TUNNEL_PORT)),
    };
    let defaults = reader.section(&root, "defaults");
    fleets_own(&mut reader, &defaults);
    let sections = reader.sections(&root, "node");
    let drafts =
        sections.into_iter().filter_map(|section| Some(Draft::read(&mut reader, section.table?, section)));
    let drafts: Vec<Draft<'_, '_>> = drafts.collect();
    let known = Known { source: &source, mesh: &mesh, domain: domain.as_deref(), drafts: &drafts };
    let between = Between { known: &known, keys, reader: &reader };
    let between = between.mistakes(&section);
    reader.found.0.extend(between.into_iter().map(|(at, wrong)| (Class::Whole, at, wrong)));

    let hub = mesh.hub.as_ref().and_then(|hub| drafts.iter().find(|draft| draft.name == *hub));
    let shared = section.table.map(|table| Shared {
        mesh: table,
        at: section.at.clone(),
        version: root.table.and_then(|root| root.get("version")),
        defaults: defaults.table,
        hub: hub.map(|hub| Hub {
            at: hub.section.at.clone(),
            table: hub.table,
            wireguard,
            endpoint: hub.endpoint(&mesh).map(|at| {
                let said = ["endpoint", "public_address"].map(|key| hub.at(&reader, key));
                merge::text(
                    said.iter().find(|said| **said != hub.section.at).unwrap_or(&said[0]),
                    &at.to_string(),
                )
            }),
        }),
    });
    let mut policies = Policies::new(&known, table.get_ref(), today);
    if let Some(shared) = &shared {
        policies.read(shared);
    }
    let (list, found, notes) = policies.finish(!reader.found.0.is_empty());
    reader.found.0.extend(found.0);
    if !reader.found.0.is_empty() {
        return Err(report(reader.found));
    }
    let nodes = drafts
        .iter()
        .zip(list)
        .filter_map(|(draft, policy)| Some(draft.node(policy?, &mesh, domain.as_deref(), &source)));
    let nodes = nodes.collect();
    let mut notes: Vec<(usize, Note)> = notes
        .into_iter()
        .map(|(kind, key, at, wrong)| {
            (at.start, Note { kind, key, mistake: source.mistake(at, &wrong.what, &wrong.help) })
        })
        .collect();
    notes.sort_by_key(|(at, _)| *at);
    let notes = notes.into_iter().map(|(_, note)| note).collect();
    Ok(Inventory { file: file.to_owned(), name, domain, mesh, nodes, notes })
}

fn advice(kind: &str, key: &str) -> Option<String> {
    match (kind, key) {
        ("mesh", key) if POLICY.keys("mesh").contains(&key) => {
            Some(format!("write `{key}` in [defaults.mesh], or in [node.mesh] of one node"))
        }
        ("", key) if OVERRIDES.contains(&key) => {
            Some(format!("write [defaults.{key}], or [node.{key}] of one node"))
        }
        ("node", "address" | "addresses" | "ip" | "wg_ip") => {
            Some("write `mesh_address`, or `public_address`".to_owned())
        }
        _ => read::advice_on_secrets(kind, key),
    }
}

/// One `[[node]]` as far as it was understood.
struct Draft<'r, 't> {
    section: Section<'r, 't>,
    table: &'r DeTable<'t>,
    name: String,
    role: Option<Role>,
    mesh_address: Vec<IpAddr>,
    public_address: Vec<IpAddr>,
    public_key: Option<PublicKey>,
    endpoint: Option<SocketAddr>,
    region: Option<String>,
    hostname: Option<String>,
    subdomain: Option<Vec<String>>,
    labels: BTreeMap<String, String>,
}

impl<'r, 't> Draft<'r, 't> {
    fn read(reader: &mut Reader, table: &'r DeTable<'t>, section: Section<'r, 't>) -> Self {
        fleets_own(reader, &section);
        let addresses = ("addresses", ADDRESSES_MAX);
        Self {
            name: reader.need(&section, "name", "name = \"singapore\"", read::name).unwrap_or_default(),
            role: reader.get(&section, "role", read::role),
            mesh_address: one_or_list(reader, &section, "mesh_address", addresses, read::unicast)
                .unwrap_or_default(),
            public_address: one_or_list(reader, &section, "public_address", addresses, public_address)
                .unwrap_or_default(),
            public_key: reader.get(&section, "public_key", read::public_key),
            endpoint: reader.get(&section, "endpoint", read::endpoint),
            region: reader.get(&section, "region", read::name),
            hostname: reader.get(&section, "hostname", domain),
            subdomain: one_or_list(reader, &section, "subdomain", ("names", SUBDOMAINS_MAX), subdomain),
            labels: reader.get(&section, "labels", labels).unwrap_or_default(),
            section,
            table,
        }
    }

    /// Where a key of it is, or else the node.
    fn at(&self, reader: &Reader, key: &str) -> Range<usize> {
        let ground = Ground { places: &reader.places, doubtful: &reader.doubtful };
        ground.at(&self.section.path(key))
    }

    fn is_hub(&self, mesh: &Mesh) -> bool {
        mesh.hub.as_ref() == Some(&self.name)
    }

    fn shown(&self) -> &str {
        if self.name.is_empty() { "a node without a name" } else { &self.name }
    }

    /// What no two nodes may have in common, by its key.
    fn values(&self, key: &str, domain: Option<&str>) -> Vec<String> {
        let texts = |list: &[IpAddr]| list.iter().map(ToString::to_string).collect();
        match key {
            "name" | "hostname" if self.name.is_empty() => Vec::new(),
            "name" => vec![self.name.clone()],
            "hostname" => vec![self.hostname().to_owned()],
            "subdomain" => self.subdomains(domain).into_iter().take(1).collect(),
            "mesh_address" => texts(&self.mesh_address),
            "public_address" => texts(&self.public_address),
            _ => self.public_key.iter().map(ToString::to_string).collect(),
        }
    }

    fn hostname(&self) -> &str {
        self.hostname.as_deref().unwrap_or(&self.name)
    }

    /// Names below the domain: by default its own, where there is something to lead to.
    fn subdomains(&self, domain: Option<&str>) -> Vec<String> {
        match &self.subdomain {
            Some(list) => list.clone(),
            None if domain.is_some() && !self.public_address.is_empty() => {
                vec![self.name.to_ascii_lowercase()]
            }
            None => Vec::new(),
        }
    }

    fn endpoint(&self, mesh: &Mesh) -> Option<SocketAddr> {
        let first = self.public_address.first().filter(|_| self.is_hub(mesh));
        self.endpoint.or_else(|| Some(SocketAddr::new(*first?, mesh.port?.get())))
    }

    fn node(&self, policy: Policy, mesh: &Mesh, domain: Option<&str>, source: &Source<'_>) -> Node {
        Node {
            name: self.name.clone(),
            role: policy.node.role,
            mesh_address: self.mesh_address.clone(),
            public_address: self.public_address.clone(),
            public_key: self.public_key,
            endpoint: self.endpoint(mesh),
            region: self.region.clone(),
            labels: self.labels.clone(),
            hostname: self.hostname().to_owned(),
            subdomain: self.subdomains(domain),
            policy,
            line: source.place(self.section.at.start).0,
        }
    }
}

fn one_or_list<T: Clone + Eq + std::hash::Hash + std::fmt::Display>(
    reader: &mut Reader,
    section: &Section<'_, '_>,
    key: &str,
    limit: (&str, usize),
    read: impl Fn(&DeValue<'_>) -> Result<T, Wrong>,
) -> Option<Vec<T>> {
    let one = section.table.and_then(|table| table.get(key)).is_some_and(|value| value.get_ref().is_str());
    match one {
        true => reader.get(section, key, read).map(|one| vec![one]),
        false => reader.list(section, key, limit, read),
    }
}

/// What a policy says in `[mesh]` and an inventory elsewhere.
fn fleets_own(reader: &mut Reader, section: &Section<'_, '_>) {
    let mesh = section.table.and_then(|table| table.get("mesh")).and_then(|mesh| mesh.get_ref().as_table());
    for (key, help) in ELSEWHERE {
        if let Some((name, _)) = mesh.and_then(|mesh| mesh.get_key_value(key)) {
            reader.complain(name.span(), wrong(format!("`{key}` can't be overridden"), help));
        }
    }
}

/// What was understood of the whole file.
struct Known<'a, 'r, 't> {
    source: &'a Source<'t>,
    mesh: &'a Mesh,
    domain: Option<&'a str>,
    drafts: &'a [Draft<'r, 't>],
}

/// What is wrong between nodes, though each is right alone.
struct Between<'a, 'r, 't> {
    known: &'a Known<'a, 'r, 't>,
    keys: Keys,
    reader: &'a Reader,
}

type Places = Vec<(Range<usize>, Wrong)>;

impl Between<'_, '_, '_> {
    fn mistakes(&self, mesh: &Section<'_, '_>) -> Places {
        let mut out = Vec::new();
        if self.known.drafts.is_empty() {
            let help = "write [[node]] above each one, and below it its `name`";
            out.push((0..0, wrong("there is no [[node]], and a fleet has at least one", help)));
        }
        self.hub(mesh, &mut out);
        self.unlike(&mut out);
        for draft in self.known.drafts {
            self.one(draft, &mut out);
        }
        self.secrets(&mut out);
        out
    }

    fn sound(&self, key: &str) -> bool {
        !self.reader.doubtful.contains(key)
    }

    fn hub(&self, section: &Section<'_, '_>, out: &mut Places) {
        let Known { mesh, drafts, .. } = self.known;
        let Some(hub) = &mesh.hub else { return };
        match drafts.iter().find(|draft| draft.is_hub(mesh)) {
            Some(draft) => {
                let wireguard = mesh.kind == MeshKind::Wireguard;
                // Tailscale's needs no port of its own to be reached.
                let fits = |role| role == Role::Hub || role == Role::Device && !wireguard;
                if draft.role.is_some_and(|role| !fits(role)) {
                    let what = format!("{hub} is the hub of [mesh], so its role is \"hub\"");
                    out.push((
                        draft.at(self.reader, "role"),
                        wrong(what, "write role = \"hub\", or leave it out"),
                    ));
                }
                if !wireguard && !draft.table.contains_key("mesh_address") {
                    let what = format!("the hub {hub} has no `mesh_address` that the others could let in");
                    out.push((draft.section.at.clone(), wrong(what, "write what `tailscale ip` says there")));
                }
                let sound =
                    ["public_address", "endpoint"].iter().all(|key| self.sound(&draft.section.path(key)));
                if wireguard && sound && draft.endpoint(mesh).is_none() {
                    let what = format!("the hub {hub} has no address at which the others reach its tunnel");
                    let help = "write its `public_address`, or `endpoint` with address and port";
                    out.push((draft.section.at.clone(), wrong(what, help)));
                }
            }
            None if drafts.iter().all(|draft| !draft.name.is_empty()) => {
                let names: Vec<&str> = drafts.iter().map(|draft| draft.name.as_str()).collect();
                let help = match read::nearest(hub, &names) {
                    Some(near) => format!("did you mean \"{near}\"?"),
                    None => "write the name of a [[node]]".to_owned(),
                };
                let ground = Ground { places: &self.reader.places, doubtful: &self.reader.doubtful };
                let at = ground.at(&section.path("hub"));
                out.push((at, wrong(format!("no [[node]] is named \"{hub}\""), help)));
                return;
            }
            None => return,
        }
        for draft in drafts.iter().filter(|draft| !draft.is_hub(mesh) && draft.role == Some(Role::Hub)) {
            let what = format!("the hub of [mesh] is {hub}, and a fleet has one");
            let help = "write role = \"spoke\" or \"device\", or change `hub` in [mesh]";
            out.push((draft.at(self.reader, "role"), wrong(what, help)));
        }
    }

    /// Names, addresses and keys that two nodes have.
    fn unlike(&self, out: &mut Places) {
        const SORTS: [(&str, &str, &str); 6] = [
            ("name", "name", "give each node a name of its own"),
            ("hostname", "hostname", "give each node a hostname of its own"),
            ("subdomain", "first name in DNS", "give each node one of its own; those after it may be shared"),
            ("mesh_address", "mesh address", "give each node an address of its own"),
            ("public_address", "public address", "leave it to the node that has it"),
            ("public_key", "public key", "make another pair for one: spokeguard fleet keygen NODE --replace"),
        ];
        let Known { drafts, domain, source, .. } = self.known;
        for (key, sort, help) in SORTS {
            let mut first: BTreeMap<String, &Draft<'_, '_>> = BTreeMap::new();
            for draft in drafts.iter() {
                for (j, value) in draft.values(key, *domain).into_iter().enumerate() {
                    let lower = if key == "public_key" { value.clone() } else { value.to_ascii_lowercase() };
                    let Some(other) = first.get(&lower) else {
                        first.insert(lower, draft);
                        continue;
                    };
                    // What follows from the name was complained about there.
                    let follows = draft.name.eq_ignore_ascii_case(&other.name);
                    if (follows && matches!(key, "hostname" | "subdomain")) || std::ptr::eq(*other, draft) {
                        continue;
                    }
                    let value =
                        if key == "public_key" { String::new() } else { format!(" {}", shorten(&value)) };
                    let (line, _) = source.place(other.section.at.start);
                    let what = format!("the {sort}{value} is that of {} (line {line}) too", other.shown());
                    out.push((draft.at(self.reader, &format!("{key}[{j}]")), wrong(what, help)));
                }
            }
        }
    }

    fn one(&self, draft: &Draft<'_, '_>, out: &mut Places) {
        let Known { mesh, domain, .. } = self.known;
        let path = |key: &str| draft.section.path(key);
        let here = || draft.section.at.clone();
        let name = draft.shown();
        let wireguard = mesh.kind == MeshKind::Wireguard && self.sound("mesh.kind");
        let lacks = |key: &str| !draft.table.contains_key(key);
        if wireguard
            && (lacks("mesh_address") || draft.mesh_address.is_empty() && self.sound(&path("mesh_address")))
        {
            let help = "write its address in the mesh: `mesh_address = \"10.84.0.16\"`";
            out.push((here(), wrong(format!("{name} has no `mesh_address`"), help)));
        }
        if wireguard && lacks("public_key") && self.keys == Keys::Required {
            let help =
                format!("run `spokeguard fleet keygen {name} --private-key FILE`, which writes it here");
            out.push((here(), wrong(format!("{name} has no `public_key`"), help)));
        }
        if mesh.kind == MeshKind::Tailscale && !lacks("public_key") {
            let what = "with kind = \"tailscale\" nobody else knows or needs this key";
            out.push((draft.at(self.reader, "public_key"), wrong(what, "leave it out")));
        }
        let in_mesh = |address: &IpAddr| mesh.prefix.iter().any(|prefix| prefix.contains(address));
        for (j, address) in draft.public_address.iter().enumerate().filter(|(_, address)| in_mesh(address)) {
            let what = format!("the public address {address} is one of the mesh");
            let help = "write what the internet reaches it at, or `mesh_address`";
            out.push((draft.at(self.reader, &format!("public_address[{j}]")), wrong(what, help)));
        }
        if domain.is_none()
            && draft.subdomain.as_ref().is_some_and(|list| !list.is_empty())
            && self.sound("fleet.domain")
        {
            let help = "write `domain` in [fleet], or leave `subdomain` out";
            out.push((draft.at(self.reader, "subdomain"), wrong("`subdomain` is below no domain", help)));
        }
    }

    fn secrets(&self, out: &mut Places) {
        let known: BTreeSet<PublicKey> =
            self.known.drafts.iter().filter_map(|draft| draft.public_key).collect();
        let help =
            "take it out of the file and of its history, and make another: whoever read the file has it";
        for secret in secrets::find(self.known.source.text(), &known) {
            out.push((secret.at, wrong(secret.what, help)));
        }
    }
}

/// The policies of all nodes, and what is wrong with them: said once where many nodes share
/// the place.
struct Policies<'a, 'r, 't> {
    known: &'a Known<'a, 'r, 't>,
    /// Where each part of the file begins, and whose it is.
    parts: Vec<(usize, Option<usize>)>,
    today: Date,
    list: Vec<Option<Policy>>,
    said: BTreeMap<(usize, usize, String), Said>,
    /// Mistakes that show at another node's keys, which complains itself.
    others: BTreeMap<(usize, usize, String), Said>,
}

struct Said {
    class: Option<Class>,
    note: Option<(NoteKind, String)>,
    help: String,
    /// The nodes whose policies it is in; at most [`NAMED_MAX`].
    nodes: Vec<usize>,
    more: usize,
    /// Whether it is at this node's own keys.
    own: bool,
}

type Noted = (NoteKind, String, Range<usize>, Wrong);

/// How many nodes are named where a mistake of `[defaults]` is in many policies.
const NAMED_MAX: usize = 3;

impl<'a, 'r, 't> Policies<'a, 'r, 't> {
    fn new(known: &'a Known<'a, 'r, 't>, root: &DeTable<'t>, today: Date) -> Self {
        let mut parts: Vec<(usize, Option<usize>)> = root
            .iter()
            .filter(|(key, _)| key.get_ref() != "node")
            .map(|(key, _)| (key.span().start, None))
            .collect();
        parts.extend(known.drafts.iter().enumerate().map(|(i, draft)| (draft.section.at.start, Some(i))));
        parts.sort_unstable();
        Self { known, parts, today, list: Vec::new(), said: BTreeMap::new(), others: BTreeMap::new() }
    }

    /// The node to which a place of the file belongs.
    fn owner(&self, at: usize) -> Option<usize> {
        let after = self.parts.partition_point(|(start, _)| *start <= at);
        after.checked_sub(1).and_then(|part| self.parts[part].1)
    }

    fn read(&mut self, shared: &Shared<'_, 't>) {
        for (i, draft) in self.known.drafts.iter().enumerate() {
            let is_hub = draft.is_hub(self.known.mesh);
            let role = role_name(if is_hub { Role::Hub } else { Role::Spoke });
            let unnamed = format!("node-{i}");
            let name = if draft.name.is_empty() { &unnamed } else { &draft.name };
            let at = draft.section.at.clone();
            let who = Who { at, table: draft.table, name, role, is_hub };
            let policy = self.one(i, &merge::policy(shared, &who));
            self.list.push(policy);
        }
    }

    fn one(&mut self, i: usize, table: &DeTable<'t>) -> Option<Policy> {
        let read = match read::read_table(table, Found::default()) {
            Ok(read) => read,
            Err(found) => {
                for (class, at, mut wrong) in found.0 {
                    let shared = self.owner(at.start).is_none();
                    if shared && wrong.what.ends_with("on the hub itself lets nobody in") {
                        // Right for all the others, so it is not to be widened.
                        wrong.help =
                            "leave it, and write below the hub's [[node]] who may come in there".into();
                    }
                    // These are said already, in the inventory's own words.
                    let said = ["`address` is missing in [mesh]", "`prefix` is missing in [mesh]"];
                    if !said.contains(&wrong.what.as_str()) {
                        self.say(i, Some(class), None, at, wrong);
                    }
                }
                return None;
            }
        };
        let read::Read { policy, places, noted } = read;
        let ground = Ground { places: &places, doubtful: &BTreeSet::new() };
        for (key, why) in noted {
            let what = wrong(format!("`{key}` has no effect{why}"), "");
            let at = ground.at(&key);
            self.say(i, None, Some((NoteKind::NoEffect, key)), at, what);
        }
        let today = self.today;
        for (j, exception) in policy.exceptions.iter().enumerate().filter(|(_, e)| !e.holds_on(today)) {
            let key = format!("exception[{j}].until");
            let at = ground.at(&key);
            self.say(i, None, Some((NoteKind::Expired, key)), at, crate::policy::expired(exception));
        }
        match admin_path(&policy) {
            Err(nobody) if !policy.enforce.allow_no_admin_path => {
                let help = format!("{}, or set allow_no_admin_path = true in [enforce]", nobody.remedy);
                self.say(i, Some(Class::Whole), None, ground.at(nobody.key), wrong(nobody.reason, help));
                None
            }
            _ => Some(policy),
        }
    }

    fn say(
        &mut self,
        i: usize,
        class: Option<Class>,
        note: Option<(NoteKind, String)>,
        at: Range<usize>,
        wrong: Wrong,
    ) {
        let at = if at == (0..0) { self.known.drafts[i].section.at.clone() } else { at };
        let owner = self.owner(at.start);
        let list = if owner.is_none_or(|owner| owner == i) { &mut self.said } else { &mut self.others };
        let said = list.entry((at.start, at.end, wrong.what)).or_insert_with(|| Said {
            class,
            note,
            help: wrong.help,
            nodes: Vec::new(),
            more: 0,
            own: owner == Some(i),
        });
        if said.nodes.len() < NAMED_MAX { said.nodes.push(i) } else { said.more += 1 }
    }

    /// The policies, what is wrong with them, and what is worth a note. `said`: something else
    /// is known to be wrong.
    fn finish(mut self, said: bool) -> (Vec<Option<Policy>>, Found, Vec<Noted>) {
        // The owner of a place says it better, but somebody must.
        if !said && self.said.values().all(|said| said.class.is_none()) {
            self.said.append(&mut self.others);
        }
        let (mut found, mut notes) = (Found::default(), Vec::new());
        for ((start, end, what), said) in self.said {
            let names: Vec<&str> = said.nodes.iter().map(|i| self.known.drafts[*i].shown()).collect();
            // A key that is wrong by itself is wrong in every policy.
            let alone = said.own || matches!(said.class, Some(Class::Value | Class::Syntax));
            let what = match (alone, said.more) {
                (true, _) => what,
                (false, 0) => format!("{what} (in the policy of {})", names.join(", ")),
                (false, more) => format!("{what} (in the policy of {} and {more} more)", names.join(", ")),
            };
            let wrong = Wrong { what, help: said.help };
            match (said.class, said.note) {
                (Some(class), _) => found.0.push((class, start..end, wrong)),
                (None, Some((kind, key))) => notes.push((kind, key, start..end, wrong)),
                (None, None) => {}
            }
        }
        (self.list, found, notes)
    }
}

/// A name in DNS, without the dot at the end.
fn domain(value: &DeValue<'_>) -> Result<String, Wrong> {
    let text = text_of(value)?;
    let label = |label: &str| {
        (1..=63).contains(&label.len())
            && label.chars().all(|c| c.is_ascii_alphanumeric() || c == '-')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    match text.len() <= 253 && text.split('.').all(label) {
        true => Ok(text),
        false => {
            let help = "letters, digits and hyphens between dots, without a dot at the end";
            Err(wrong(format!("\"{}\" can't be a name in DNS", shorten(&text)), help))
        }
    }
}

fn subdomain(value: &DeValue<'_>) -> Result<String, Wrong> {
    if text_of(value)? == "@" { Ok("@".to_owned()) } else { domain(value) }
}

fn public_address(value: &DeValue<'_>) -> Result<IpAddr, Wrong> {
    let address = read::address(value)?;
    match address.is_unspecified() || address.is_loopback() || address.is_multicast() {
        true => Err(wrong(
            format!("nobody reaches a node at {address}"),
            "write the address that the internet knows",
        )),
        false => Ok(address),
    }
}

/// Label names as Prometheus takes them.
fn labels(value: &DeValue<'_>) -> Result<BTreeMap<String, String>, Wrong> {
    let DeValue::Table(table) = value else {
        return Err(wrong("`labels` is a table", "write labels = { provider = \"aws\" }"));
    };
    if table.len() > LABELS_MAX {
        return Err(wrong(format!("`labels` has {}; the most is {LABELS_MAX}", table.len()), ""));
    }
    let label = |(key, value): (&toml::Spanned<toml::de::DeString<'_>>, &read::Value<'_>)| {
        let key: &str = key.get_ref();
        let shown = shorten(key);
        if let Some(help) = read::advice_on_secrets("labels", key) {
            return Err(wrong(format!("the label `{shown}` looks like a credential"), help));
        }
        let head = key.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_') && !key.starts_with("__");
        if !head || key.len() > 63 || !key.chars().all(|c| c.is_ascii_alphanumeric() || c == '_') {
            let help = "letters, digits and _, not beginning with a digit or with __";
            return Err(wrong(format!("`{shown}` can't be a label's name"), help));
        }
        if LABELS_TAKEN.contains(&key) {
            return Err(wrong(format!("every target has a label `{shown}` already"), "choose another name"));
        }
        match text_of(value.get_ref())? {
            text if text.len() <= 200 => Ok((key.to_owned(), text)),
            _ => Err(wrong(format!("the label `{shown}` is longer than 200 bytes"), "say it shorter")),
        }
    };
    table.iter().map(label).collect()
}
