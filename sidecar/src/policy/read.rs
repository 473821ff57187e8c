//! TOML to [`Policy`], key by key. A value that is wrong is replaced by a stand-in and
//! its key remembered as doubtful, so that reading goes on and every mistake is found in
//! one pass; checks that would rest on a doubtful key stay silent.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fmt;
use std::hash::Hash;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::ops::Range;
use std::path::PathBuf;
use std::time::Duration;

use ipnet::IpNet;
use jiff::civil::Date;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::mistake::{MISTAKES_MAX, Mistakes, Source};
use super::{
    Bind, Enforce, Exception, FileRule, Heartbeat, Hub, Local, Mesh, MeshKind, MeshService, Metrics, Mode,
    Node, Policy, Public, Role, Sources, Ssh, check,
};
use crate::terms::{IfacePattern, Port, PublicKey};

pub(super) const PORTS_MAX: usize = 1024;
pub(crate) const PREFIXES_MAX: usize = 4096;
const ADDRESSES_MAX: usize = 64;
const INTERFACES_MAX: usize = 64;
const TAGS_MAX: usize = 64;

/// What a file may say: every table with its keys, in the order in which people are told of
/// them. With a number: an array of tables, and how many there may be.
#[derive(Debug)]
pub(crate) struct Grammar {
    pub(crate) tables: &'static [(&'static str, Option<usize>, &'static [&'static str])],
    /// On a key (of a table) that is out of place, where the general advice would mislead.
    pub(crate) advice: fn(&str, &str) -> Option<String>,
}

pub(crate) const POLICY: Grammar = Grammar { tables: TABLES, advice: advice_on_secrets };

const TABLES: &[(&str, Option<usize>, &[&str])] = &[
    ("", None, &ROOT),
    ("node", None, &["name", "role"]),
    ("mesh", None, &MESH),
    ("mesh.hub", None, &["address", "public_key", "endpoint"]),
    ("public", None, &["tcp", "udp", "interfaces"]),
    ("ssh", None, &["port", "bind", "rebind", "from"]),
    ("mesh.service", Some(64), &["name", "tcp", "udp", "from"]),
    ("local", Some(16), &["name", "interfaces", "tcp", "udp"]),
    ("exception", Some(64), &["name", "tcp", "udp", "from", "reason", "owner", "until"]),
    ("file", Some(256), &["path", "mode"]),
    ("enforce", None, &ENFORCE),
    ("metrics", None, &["port"]),
    ("heartbeat", None, &HEARTBEAT),
];
#[rustfmt::skip]
const ROOT: [&str; 11] = [
    "version", "node", "mesh", "public", "ssh", "local", "exception", "file", "enforce", "metrics", "heartbeat",
];
#[rustfmt::skip]
const MESH: [&str; 11] = [
    "kind", "interface", "address", "prefix", "keepalive", "handshake_max_age", "listen_port", "tags", "tailscale_ssh",
    "hub", "service",
];
const ENFORCE: [&str; 6] =
    ["mode", "firewall", "binds", "keepalive", "confirm_within", "allow_no_admin_path"];

#[rustfmt::skip]
const HEARTBEAT: [&str; 8] = [
    "kuma_url_file", "ntfy_url_file", "every", "status_file", "app_file", "certificate_file", "certificate_name",
    "database_file",
];

/// Keys that speak of WireGuard's own state, which Tailscale keeps to itself.
const WIREGUARD_ONLY: &[&str] =
    &["mesh.keepalive", "mesh.handshake_max_age", "mesh.hub.public_key", "mesh.hub.endpoint"];
/// Keys that speak of tailscaled.
const TAILSCALE_ONLY: &[&str] = &["mesh.tags", "mesh.tailscale_ssh"];

/// Where the keys of a file are, and the elements of their lists (`public.tcp[1]`).
#[derive(Debug, Default)]
pub(crate) struct Places {
    pub(crate) keys: BTreeMap<String, Range<usize>>,
    elements: BTreeMap<String, Vec<Range<usize>>>,
}

impl Places {
    pub(crate) fn get(&self, key: &str) -> Option<&Range<usize>> {
        self.keys.get(key).or_else(|| {
            let (list, at) = key.strip_suffix(']')?.rsplit_once('[')?;
            self.elements.get(list)?.get(at.parse::<usize>().ok()?)
        })
    }
}

#[derive(Debug)]
pub(crate) struct Read {
    pub(crate) policy: Policy,
    /// Of every key that the file sets.
    pub(crate) places: Places,
    /// Keys without effect, and the rest of the sentence that says so.
    pub(crate) noted: Vec<(String, &'static str)>,
}

/// What was found wrong, in any order.
#[derive(Debug, Default)]
pub(crate) struct Found(pub(crate) Vec<(Class, Range<usize>, Wrong)>);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Class {
    /// The text is not TOML there, so the tables below it can't be trusted to be whole.
    Syntax,
    /// This key, looked at alone.
    Value,
    /// Something is not there, or two things contradict each other.
    Whole,
}

/// What is wrong and what to write instead.
#[derive(Debug)]
pub(crate) struct Wrong {
    pub(crate) what: String,
    pub(crate) help: String,
}

pub(crate) fn wrong(what: impl fmt::Display, help: impl fmt::Display) -> Wrong {
    Wrong { what: what.to_string(), help: help.to_string() }
}

impl Found {
    pub(crate) fn report(mut self, source: &Source<'_>, file: &str) -> Mistakes {
        // Where the text is not TOML, what the parser made of it is a guess: one mistake
        // a line, and no complaints about what may be missing only because of it.
        let lines: Vec<&str> = source.text().split('\n').collect();
        let is_header = |line: usize| lines.get(line).is_none_or(|text| text.trim_start().starts_with('['));
        let mut broken = BTreeSet::new();
        for (_, at, _) in self.0.iter().filter(|(class, ..)| *class == Class::Syntax) {
            let line = source.line(at.start);
            broken.insert(line);
            // The keys below a broken header are taken for those of another table.
            if is_header(line) {
                broken.extend((line + 1..).take_while(|line| !is_header(*line)));
            }
        }
        let mut seen = BTreeSet::new();
        self.0.retain(|(class, at, _)| match class {
            Class::Syntax => seen.insert(source.line(at.start)),
            Class::Value => !broken.contains(&source.line(at.start)),
            Class::Whole => broken.is_empty(),
        });
        self.0.sort_by_key(|(_, at, _)| at.start);
        // A list that is never closed swallows the rest of the file, and every line of
        // that is the same mistake again.
        let indented = |at: &Range<usize>| {
            let before = source.text().get(..at.start).unwrap_or_default();
            before.trim_end_matches([' ', '\t']).ends_with('\n')
        };
        self.0.dedup_by(|later, first| {
            let same = (later.0, first.0) == (Class::Syntax, Class::Syntax) && later.2.what == first.2.what;
            same && indented(&later.1) && indented(&first.1)
        });
        let more = self.0.len().saturating_sub(MISTAKES_MAX);
        let first = self.0.into_iter().take(MISTAKES_MAX);
        let list = first.map(|(_, at, wrong)| source.mistake(at, &wrong.what, &wrong.help)).collect();
        Mistakes { file: file.to_owned(), list, more }
    }
}

pub(super) fn read(source: &Source<'_>) -> Result<Read, Found> {
    let (table, found) = document(source)?;
    read_table(table.get_ref(), found)
}

/// The file as TOML, with what is not TOML in it.
pub(crate) fn document<'t>(source: &Source<'t>) -> Result<(Spanned<DeTable<'t>>, Found), Found> {
    let mut found = Found::default();
    match DeTable::parse(source.text()) {
        Ok(table) => Ok((table, found)),
        // Recovery keeps every error it meets, so it is for files of a human size only.
        Err(first) if source.text().len() > 128 << 10 => {
            found.0.push(syntax(source, &first));
            Err(found)
        }
        Err(_) => {
            let (table, errors) = DeTable::parse_recoverable(source.text());
            found.0.extend(errors.iter().map(|error| syntax(source, error)));
            Ok((table, found))
        }
    }
}

/// A policy from a table whose values may come from several places of one file. Adds to what
/// was found before.
pub(crate) fn read_table(table: &DeTable<'_>, found: Found) -> Result<Read, Found> {
    let mut reader = Reader::new(found);
    let root = Section::root(&POLICY, table);
    if !reader.version(&root, "policies") {
        return Err(reader.found);
    }
    let policy = reader.policy(&root);
    let Reader { mut found, places, doubtful } = reader;
    for (at, wrong) in check::contradictions(&policy, &Ground { places: &places, doubtful: &doubtful }) {
        found.0.push((Class::Whole, at, wrong));
    }
    if !found.0.is_empty() {
        return Err(found);
    }
    let foreign = WIREGUARD_ONLY
        .iter()
        .filter(|_| policy.mesh.kind == MeshKind::Tailscale)
        .map(|key| (*key, " with kind = \"tailscale\", which looks after its own tunnels"));
    let tailscale = TAILSCALE_ONLY
        .iter()
        .filter(|_| policy.mesh.kind == MeshKind::Wireguard)
        .map(|key| (*key, " with kind = \"wireguard\", which has no such thing"));
    let set = |(key, why): (&str, &'static str)| places.get(key).is_some().then(|| (key.to_owned(), why));
    let noted = foreign.chain(tailscale).filter_map(set).collect();
    Ok(Read { policy, places, noted })
}

/// What [`check`] stands on: where keys are, and which of them can't be trusted.
pub(crate) struct Ground<'a> {
    pub(crate) places: &'a Places,
    pub(crate) doubtful: &'a BTreeSet<String>,
}

impl Ground<'_> {
    /// The key, or the nearest table around it, or the file as a whole.
    pub(crate) fn at(&self, key: &str) -> Range<usize> {
        let mut key = key;
        loop {
            if let Some(range) = self.places.get(key) {
                return range.clone();
            }
            match key.rfind(['.', '[']) {
                Some(dot) => key = &key[..dot],
                None => return 0..0,
            }
        }
    }

    pub(crate) fn sound(&self, key: &str) -> bool {
        !self.doubtful.contains(key)
    }
}

fn syntax(source: &Source<'_>, error: &toml::de::Error) -> (Class, Range<usize>, Wrong) {
    let end = source.text().len();
    let at = error.span().unwrap_or(end..end);
    let at = at.start.min(end)..at.end.min(end);
    if error.message() == "duplicate key" {
        let key = source.text().get(at.clone()).unwrap_or("this key");
        return (Class::Value, at, wrong(format!("`{key}` is written twice"), "keep one of them"));
    }
    // The end of the last line reads better than the line after it.
    let at = if at.start == end && end > 0 { end - 1..end } else { at };
    let at = if source.text().is_char_boundary(at.start) { at } else { end..end };
    let found = source.text().get(at.clone()).unwrap_or_default();
    let wrong = match error.message() {
        text if text.starts_with("string values must be quoted") && found.trim().is_empty() => {
            wrong("not TOML: a value is missing", "")
        }
        text if text.starts_with("string values must be quoted") => wrong(
            format!("not TOML: `{}` is not a value", shorten(found)),
            "put text in quotes, and commas between values",
        ),
        text if text.contains("array") => {
            wrong(format!("not TOML: {text}"), "does the list have its commas, and its closing bracket?")
        }
        text => wrong(format!("not TOML: {text}"), ""),
    };
    (Class::Syntax, at, wrong)
}

/// One table of the file, or one that isn't there.
pub(crate) struct Section<'r, 't> {
    /// As [`Places`] names it: `mesh.service[0]`.
    pub(crate) path: String,
    pub(crate) at: Range<usize>,
    pub(crate) table: Option<&'r DeTable<'t>>,
    /// Its name in the grammar.
    kind: &'static str,
    grammar: &'static Grammar,
}

impl<'r, 't> Section<'r, 't> {
    pub(crate) fn root(grammar: &'static Grammar, table: &'r DeTable<'t>) -> Self {
        Self { path: String::new(), at: 0..0, table: Some(table), kind: "", grammar }
    }

    pub(crate) fn path(&self, key: &str) -> String {
        if self.path.is_empty() { key.to_owned() } else { format!("{}.{key}", self.path) }
    }

    /// For people: `[ssh]`, `[[mesh.service]]`.
    fn header(&self) -> String {
        self.grammar.header(self.kind)
    }
}

impl Grammar {
    fn header(&self, kind: &str) -> String {
        match self.tables.iter().find(|(name, ..)| *name == kind) {
            Some((_, Some(_), _)) => format!("[[{kind}]]"),
            _ if kind.is_empty() => "the top of the file".into(),
            _ => format!("[{kind}]"),
        }
    }

    pub(crate) fn keys(&self, kind: &str) -> &'static [&'static str] {
        self.tables.iter().find(|(name, ..)| *name == kind).map_or(&[], |(.., keys)| keys)
    }
}

pub(crate) struct Reader {
    pub(crate) found: Found,
    pub(crate) places: Places,
    pub(crate) doubtful: BTreeSet<String>,
}

pub(crate) type Value<'t> = Spanned<DeValue<'t>>;

impl Reader {
    pub(crate) fn new(found: Found) -> Self {
        Self { found, places: Places::default(), doubtful: BTreeSet::new() }
    }

    /// Whether the file is of the version that is read here; one that we don't know may mean
    /// anything by its other keys.
    pub(crate) fn version(&mut self, root: &Section<'_, '_>, files: &str) -> bool {
        if self.need(root, "version", "version = 1", version) != Some(false) {
            return true;
        }
        let at = self.places.get("version").cloned().unwrap_or_default();
        let help = "write `version = 1`, or install the spokeguard that this file was written for";
        self.complain(at, wrong(format!("this spokeguard reads {files} of version 1 only"), help));
        false
    }

    pub(crate) fn complain(&mut self, at: Range<usize>, wrong: Wrong) {
        self.found.0.push((Class::Value, at, wrong));
    }

    /// Looks a key up. The value of a key that has none (`tcp =`) lies nowhere; its key
    /// stands for it.
    fn find<'r, 't>(
        &mut self,
        section: &Section<'r, 't>,
        key: &str,
    ) -> Option<(&'r Value<'t>, Range<usize>)> {
        let (name, value) = section.table?.get_key_value(key)?;
        let at = if value.span() == (0..0) { name.span() } else { value.span() };
        self.places.keys.insert(section.path(key), at.clone());
        Some((value, at))
    }

    pub(crate) fn get<T>(
        &mut self,
        section: &Section<'_, '_>,
        key: &str,
        read: impl FnOnce(&DeValue<'_>) -> Result<T, Wrong>,
    ) -> Option<T> {
        let (value, at) = self.find(section, key)?;
        match read(value.get_ref()) {
            Ok(value) => Some(value),
            Err(wrong) => {
                self.doubtful.insert(section.path(key));
                self.complain(at, wrong);
                None
            }
        }
    }

    pub(crate) fn need<T>(
        &mut self,
        section: &Section<'_, '_>,
        key: &str,
        example: &str,
        read: impl FnOnce(&DeValue<'_>) -> Result<T, Wrong>,
    ) -> Option<T> {
        self.missing(section, key, example);
        self.get(section, key, read)
    }

    pub(crate) fn missing(&mut self, section: &Section<'_, '_>, key: &str, example: &str) {
        let faulty = section.table.is_none() && self.doubtful.contains(&section.path);
        if faulty || section.table.is_some_and(|t| t.contains_key(key)) {
            return;
        }
        self.doubtful.insert(section.path(key));
        let what = match (section.table, section.kind) {
            (_, "") => format!("`{key}` is missing"),
            (Some(_), _) => format!("`{key}` is missing in {}", section.header()),
            (None, _) => format!("{} with its `{key}` is missing", section.header()),
        };
        let help = match section.table {
            Some(_) => format!("write `{example}`"),
            None => format!("write {} and below it `{example}`", section.header()),
        };
        self.found.0.push((Class::Whole, section.at.clone(), wrong(what, help)));
    }

    /// A list in which nothing is said twice. A faulty element is left out.
    pub(crate) fn list<T: Clone + Eq + Hash + fmt::Display>(
        &mut self,
        section: &Section<'_, '_>,
        key: &str,
        (what, max): (&str, usize),
        read: impl Fn(&DeValue<'_>) -> Result<T, Wrong>,
    ) -> Option<Vec<T>> {
        let (value, at) = self.find(section, key)?;
        let path = section.path(key);
        let DeValue::Array(array) = value.get_ref() else {
            self.doubtful.insert(path);
            let help = match read(value.get_ref()) {
                Ok(_) => "put it in brackets, also when it is the only one".to_owned(),
                Err(_) => format!("write a list of {what} in brackets"),
            };
            let found = kind_of(value.get_ref());
            self.complain(at, wrong(format!("`{key}` is a list of {what}, not {found}"), help));
            return None;
        };
        if array.len() > max {
            self.doubtful.insert(path);
            let found = array.len();
            self.complain(at, wrong(format!("`{key}` has {found} {what}; the most is {max}"), ""));
            return None;
        }
        let mut list: Vec<T> = Vec::with_capacity(array.len());
        let mut places = Vec::with_capacity(array.len());
        let mut known = HashSet::with_capacity(array.len());
        for value in array.iter() {
            match read(value.get_ref()) {
                Ok(element) if !known.insert(element.clone()) => {
                    let what = format!("`{key}` lists {element} twice");
                    self.complain(value.span(), wrong(what, "keep one of them"));
                }
                Ok(element) => {
                    places.push(value.span());
                    list.push(element);
                }
                Err(wrong) => {
                    self.doubtful.insert(path.clone());
                    self.complain(value.span(), wrong);
                }
            }
        }
        self.places.elements.insert(path, places);
        Some(list)
    }

    /// An optional list that says nothing when it is empty.
    fn filled<T: Clone + Eq + Hash + fmt::Display>(
        &mut self,
        section: &Section<'_, '_>,
        key: &str,
        (what, max): (&str, usize),
        help: &str,
        read: impl Fn(&DeValue<'_>) -> Result<T, Wrong>,
    ) -> Option<Vec<T>> {
        let list = self.list(section, key, (what, max), read)?;
        if list.is_empty() && !self.doubtful.contains(&section.path(key)) {
            self.doubtful.insert(section.path(key));
            let at = self.places.get(&section.path(key)).cloned().unwrap_or_default();
            self.complain(at, wrong(format!("`{key}` is empty"), help));
        }
        Some(list)
    }

    fn ports(&mut self, section: &Section<'_, '_>, key: &str) -> Vec<Port> {
        self.list(section, key, ("ports", PORTS_MAX), port).unwrap_or_default()
    }

    pub(crate) fn section<'r, 't>(
        &mut self,
        parent: &Section<'r, 't>,
        kind: &'static str,
    ) -> Section<'r, 't> {
        let key = kind.rsplit('.').next().unwrap_or(kind);
        let grammar = parent.grammar;
        let absent = Section { path: parent.path(key), at: parent.at.clone(), table: None, kind, grammar };
        let Some((value, at)) = self.find(parent, key) else { return absent };
        match value.get_ref() {
            DeValue::Table(table) => {
                let section = Section { path: parent.path(key), at, table: Some(table), kind, grammar };
                self.unknown_keys(&section);
                section
            }
            DeValue::Array(array)
                if matches!(array.first().map(Spanned::get_ref), Some(DeValue::Table(_))) =>
            {
                self.doubtful.insert(parent.path(key));
                let what = format!("there is one [{kind}], so it is not a list");
                self.complain(at.clone(), wrong(what, format!("write [{kind}], once")));
                // Its keys are looked at all the same.
                let table = array.first().and_then(|t| t.get_ref().as_table());
                let section = Section { path: parent.path(key), at, table, kind, grammar };
                self.unknown_keys(&section);
                section
            }
            other => {
                self.doubtful.insert(parent.path(key));
                let what = format!("`{kind}` is a table, not {}", kind_of(other));
                self.complain(
                    at,
                    wrong(what, format!("write [{kind}] on a line of its own, its keys below it")),
                );
                absent
            }
        }
    }

    pub(crate) fn sections<'r, 't>(
        &mut self,
        parent: &Section<'r, 't>,
        kind: &'static str,
    ) -> Vec<Section<'r, 't>> {
        let key = kind.rsplit('.').next().unwrap_or(kind);
        let grammar = parent.grammar;
        let table = grammar.tables.iter().find(|(name, ..)| *name == kind);
        let max = table.and_then(|(_, max, _)| *max).unwrap_or(1);
        let Some((value, at)) = self.find(parent, key) else { return Vec::new() };
        let path = parent.path(key);
        let array = match value.get_ref() {
            DeValue::Array(array) => array,
            other => {
                let what = format!("`{kind}` is a list of tables, not {}", kind_of(other));
                self.complain(at, wrong(what, format!("write [[{kind}]] above each one")));
                return Vec::new();
            }
        };
        if array.len() > max {
            let what = format!("there are {} [[{kind}]]; the most is {max}", array.len());
            self.complain(at, wrong(what, ""));
            return Vec::new();
        }
        let mut sections = Vec::new();
        for value in array.iter() {
            let DeValue::Table(table) = value.get_ref() else {
                let what = format!("`{kind}` is a list of tables, not of {}", kind_of(value.get_ref()));
                self.complain(value.span(), wrong(what, format!("write [[{kind}]] above each one")));
                continue;
            };
            let path = format!("{path}[{}]", sections.len());
            self.places.keys.insert(path.clone(), value.span());
            let section = Section { path, at: value.span(), table: Some(table), kind, grammar };
            self.unknown_keys(&section);
            sections.push(section);
        }
        sections
    }

    pub(crate) fn unknown_keys(&mut self, section: &Section<'_, '_>) {
        let known = section.grammar.keys(section.kind);
        let strangers = section.table.iter().flat_map(|t| t.iter()).filter(|(k, _)| {
            let key: &str = k.get_ref();
            !known.contains(&key)
        });
        for (key, value) in strangers {
            let help = advice_on_key(section.grammar, section.kind, key.get_ref(), value.get_ref());
            let here =
                if section.kind.is_empty() { String::new() } else { format!(" in {}", section.header()) };
            let what = format!("unknown key `{}`{here}", crate::terms::printable(key.get_ref(), 60));
            self.complain(key.span(), wrong(what, help));
        }
    }

    fn policy(&mut self, root: &Section<'_, '_>) -> Policy {
        self.unknown_keys(root);
        let node = self.section(root, "node");
        let node = Node {
            name: self.need(&node, "name", "name = \"singapore\"", name).unwrap_or_default(),
            role: self.get(&node, "role", role).unwrap_or(Role::Spoke),
        };
        let mesh_section = self.section(root, "mesh");
        let mesh = self.mesh(&mesh_section, node.role);
        let public = self.section(root, "public");
        let every = "leave `interfaces` out to mean every interface but lo, the mesh and [[local]] ones";
        let public = Public {
            tcp: self.ports(&public, "tcp"),
            udp: self.ports(&public, "udp"),
            interfaces: self.filled(&public, "interfaces", ("interfaces", INTERFACES_MAX), every, interface),
        };
        let ssh = self.section(root, "ssh");
        let ssh = Ssh {
            port: self.get(&ssh, "port", port).unwrap_or(SSH_PORT),
            bind: self.bind(&ssh),
            rebind: self.get(&ssh, "rebind", boolean).unwrap_or(false),
            from: self.sources(&ssh, default_from(node.role, &mesh)),
        };
        let services = self.sections(&mesh_section, "mesh.service");
        let services = services
            .iter()
            .map(|section| MeshService {
                name: self.need(section, "name", "name = \"netdata\"", name).unwrap_or_default(),
                tcp: self.ports(section, "tcp"),
                udp: self.ports(section, "udp"),
                from: self.sources(section, Sources::Mesh),
            })
            .collect();
        let locals = self.sections(root, "local");
        let locals = locals.iter().map(|section| self.local(section)).collect();
        let exceptions = self.sections(root, "exception");
        let exceptions = exceptions.iter().map(|section| self.exception(section)).collect();
        let files = self.sections(root, "file");
        let files = files
            .iter()
            .map(|section| FileRule {
                path: self
                    .need(section, "path", "path = \"/etc/vault/production.env\"", path)
                    .unwrap_or_default(),
                mode: self.need(section, "mode", "mode = \"0600\"", mode_bits).unwrap_or(0o600),
            })
            .collect();
        let enforce = self.section(root, "enforce");
        let enforce = Enforce {
            mode: self.get(&enforce, "mode", mode).unwrap_or(Mode::Enforce),
            firewall: self.get(&enforce, "firewall", boolean).unwrap_or(true),
            binds: self.get(&enforce, "binds", boolean).unwrap_or(true),
            keepalive: self.get(&enforce, "keepalive", boolean).unwrap_or(true),
            confirm_within: self.get(&enforce, "confirm_within", span).unwrap_or(Duration::from_secs(60)),
            allow_no_admin_path: self.get(&enforce, "allow_no_admin_path", boolean).unwrap_or(false),
        };
        let metrics = self.section(root, "metrics");
        let metrics = Metrics { port: self.get(&metrics, "port", port).unwrap_or(METRICS_PORT) };
        let heartbeat = self.section(root, "heartbeat");
        let heartbeat = Heartbeat {
            kuma_url_file: self.get(&heartbeat, "kuma_url_file", url_file),
            ntfy_url_file: self.get(&heartbeat, "ntfy_url_file", url_file),
            every: self.get(&heartbeat, "every", span).unwrap_or(Heartbeat::default().every),
            status_file: self.get(&heartbeat, "status_file", path),
            app_file: self.get(&heartbeat, "app_file", path),
            certificate_file: self.get(&heartbeat, "certificate_file", path),
            certificate_name: self.get(&heartbeat, "certificate_name", host_name),
            database_file: self.get(&heartbeat, "database_file", path),
        };
        Policy { node, mesh, public, ssh, services, locals, exceptions, files, enforce, metrics, heartbeat }
    }

    fn mesh(&mut self, section: &Section<'_, '_>, role: Role) -> Mesh {
        let kind = self.get(section, "kind", mesh_kind).unwrap_or(MeshKind::Wireguard);
        // Of a kind that can't be read, nothing is known about what it requires.
        let wireguard = kind == MeshKind::Wireguard && !self.doubtful.contains("mesh.kind");
        if wireguard {
            self.missing(section, "address", "address = [\"10.84.0.16\"]");
            self.missing(section, "prefix", "prefix = [\"10.84.0.0/24\"]");
        }
        let needed = "name at least one, or leave the key out with kind = \"tailscale\"";
        let address = ("addresses", ADDRESSES_MAX);
        let prefix = self.filled(section, "prefix", ("prefixes", PREFIXES_MAX), needed, mesh_prefix);
        let hub = self.section(section, "mesh.hub");
        let hub = hub.table.is_some().then(|| Hub {
            address: self.hub_addresses(&hub),
            public_key: self.get(&hub, "public_key", public_key),
            endpoint: self.get(&hub, "endpoint", endpoint),
        });
        let (spoke_keepalive, hub_port) = match kind {
            MeshKind::Wireguard => (Some(Duration::from_secs(25)), Port::new(51820)),
            MeshKind::Tailscale => (None, Port::new(41641)),
        };
        Mesh {
            kind,
            interface: self.get(section, "interface", mesh_interface).unwrap_or_else(|| match kind {
                MeshKind::Wireguard => "wg0".into(),
                MeshKind::Tailscale => "tailscale0".into(),
            }),
            address: self.filled(section, "address", address, needed, unicast).unwrap_or_default(),
            prefix: prefix.unwrap_or_else(|| match kind {
                MeshKind::Wireguard => Vec::new(),
                MeshKind::Tailscale => tailscale_prefixes(),
            }),
            keepalive: self.get(section, "keepalive", keepalive).unwrap_or(if role == Role::Hub {
                None
            } else {
                spoke_keepalive
            }),
            handshake_max_age: self
                .get(section, "handshake_max_age", span)
                .unwrap_or(Duration::from_secs(180)),
            listen_port: self.get(section, "listen_port", port).or(if role == Role::Hub {
                hub_port
            } else {
                None
            }),
            tags: self.list(section, "tags", ("tags", TAGS_MAX), tag).unwrap_or_default(),
            tailscale_ssh: self.get(section, "tailscale_ssh", boolean).unwrap_or(false),
            hub,
        }
    }

    fn hub_addresses(&mut self, section: &Section<'_, '_>) -> Vec<IpAddr> {
        self.missing(section, "address", "address = \"10.84.0.1\"");
        let one = section.table.and_then(|t| t.get("address")).is_some_and(|v| v.get_ref().is_str());
        if one {
            return self.get(section, "address", unicast).into_iter().collect();
        }
        let help = "write the hub's address in the mesh";
        self.filled(section, "address", ("addresses", ADDRESSES_MAX), help, unicast).unwrap_or_default()
    }

    fn bind(&mut self, section: &Section<'_, '_>) -> Bind {
        let text = section.table.and_then(|t| t.get("bind")).is_some_and(|v| v.get_ref().is_str());
        if text {
            return self
                .get(section, "bind", |v| match text_of(v)?.as_str() {
                    "mesh" => Ok(Bind::Mesh),
                    other if other.parse::<IpAddr>().is_ok_and(|a| !a.is_unspecified()) => Err(wrong(
                        "`bind` is \"mesh\" or a list of addresses",
                        format!("write bind = [\"{other}\"]"),
                    )),
                    other => Err(choice("bind", other, &["mesh"], "or a list of addresses")),
                })
                .unwrap_or(Bind::Mesh);
        }
        let help = "write bind = \"mesh\"";
        self.filled(section, "bind", ("addresses", ADDRESSES_MAX), help, bind_address)
            .map_or(Bind::Mesh, Bind::Addresses)
    }

    fn sources(&mut self, section: &Section<'_, '_>, default: Sources) -> Sources {
        let text = section.table.and_then(|t| t.get("from")).is_some_and(|v| v.get_ref().is_str());
        if text {
            return self
                .get(section, "from", |v| match text_of(v)?.as_str() {
                    "hub" => Ok(Sources::Hub),
                    "mesh" => Ok(Sources::Mesh),
                    other if other.parse::<IpNet>().is_ok() => Err(wrong(
                        "`from` is \"hub\", \"mesh\" or a list of prefixes",
                        format!("write from = [\"{other}\"]"),
                    )),
                    other => Err(choice("from", other, &["hub", "mesh"], "or a list of prefixes")),
                })
                .unwrap_or(default);
        }
        let help = "an empty list lets nobody in: write \"hub\", \"mesh\" or the prefixes meant";
        self.filled(section, "from", ("prefixes", PREFIXES_MAX), help, prefix)
            .map_or(default, Sources::Prefixes)
    }

    fn local(&mut self, section: &Section<'_, '_>) -> Local {
        let interfaces = "interfaces = [\"vmbr0\"]";
        self.missing(section, "interfaces", interfaces);
        Local {
            name: self.need(section, "name", "name = \"lan\"", name).unwrap_or_default(),
            interfaces: self
                .filled(
                    section,
                    "interfaces",
                    ("interfaces", INTERFACES_MAX),
                    &format!("write `{interfaces}`"),
                    interface,
                )
                .unwrap_or_default(),
            tcp: self.ports(section, "tcp"),
            udp: self.ports(section, "udp"),
        }
    }

    fn exception(&mut self, section: &Section<'_, '_>) -> Exception {
        self.missing(section, "from", "from = [\"192.0.2.0/24\"]");
        let help = "write the prefixes that may come in; [\"0.0.0.0/0\", \"::/0\"] is anyone";
        let reason = "reason = \"way in when the mesh is down\"";
        Exception {
            name: self.need(section, "name", "name = \"emergency-ssh\"", name).unwrap_or_default(),
            tcp: self.ports(section, "tcp"),
            udp: self.ports(section, "udp"),
            from: self.filled(section, "from", ("prefixes", PREFIXES_MAX), help, prefix).unwrap_or_default(),
            reason: self.need(section, "reason", reason, |v| sentence(v, "reason")).unwrap_or_default(),
            owner: self.get(section, "owner", |v| sentence(v, "owner")),
            until: self.need(section, "until", "until = \"2027-01-31\"", date).unwrap_or(Date::MAX),
        }
    }
}

const SSH_PORT: Port = Port::new(22).expect("22 is a port");
const METRICS_PORT: Port = Port::new(9984).expect("9984 is a port");

/// The ranges that Tailscale hands out from.
pub fn tailscale_prefixes() -> Vec<IpNet> {
    ["100.64.0.0/10", "fd7a:115c:a1e0::/48"].iter().filter_map(|p| p.parse().ok()).collect()
}

fn default_from(role: Role, mesh: &Mesh) -> Sources {
    if mesh.hub.is_some() && role != Role::Hub { Sources::Hub } else { Sources::Mesh }
}

pub(crate) fn kind_of(value: &DeValue<'_>) -> &'static str {
    match value {
        DeValue::String(_) => "a string",
        DeValue::Integer(_) | DeValue::Float(_) => "a number",
        DeValue::Boolean(_) => "true or false",
        DeValue::Datetime(_) => "a date",
        DeValue::Array(_) => "a list",
        DeValue::Table(_) => "a table",
    }
}

/// What to do with a key that looks like a credential.
pub(crate) fn advice_on_secrets(kind: &str, key: &str) -> Option<String> {
    if kind == "heartbeat" && (key == "kuma_url" || key == "ntfy_url") {
        return Some(format!(
            "a policy may be read by anyone, a push URL may not: put it in a file of its own and write {key}_file"
        ));
    }
    let lower = key.to_ascii_lowercase();
    let secret = ["private", "preshared", "secret", "token", "passw"].iter().any(|word| lower.contains(word));
    (secret && !lower.ends_with("_file")).then(|| {
        "take it out: this file may be read by anyone. What was in it is known now, so make another"
            .to_owned()
    })
}

fn advice_on_key(grammar: &Grammar, kind: &str, key: &str, value: &DeValue<'_>) -> String {
    if let Some(advice) = (grammar.advice)(kind, key) {
        return advice;
    }
    let (known, tables) = (grammar.keys(kind), grammar.tables);
    let header = |kind: &str| grammar.header(kind);
    let full = |name: &str| if kind.is_empty() { name.to_owned() } else { format!("{kind}.{name}") };
    if let Some(close) = nearest(key, known) {
        let close = full(close);
        return match tables.iter().any(|(name, ..)| *name == close) {
            true => format!("did you mean {}?", header(&close)),
            false => format!("did you mean `{}`?", close.rsplit('.').next().unwrap_or(&close)),
        };
    }
    // A table or key that is right elsewhere.
    let is_table = matches!(value, DeValue::Table(_) | DeValue::Array(_));
    let last = |name: &'static str| name.rsplit('.').next().unwrap_or(name);
    let kinds: Vec<&'static str> = tables.iter().map(|(name, ..)| *name).filter(|n| !n.is_empty()).collect();
    let names: Vec<&str> = kinds.iter().map(|name| last(name)).collect();
    let close = if is_table { nearest(key, &names) } else { names.iter().find(|n| **n == key).copied() };
    if let Some(name) = close.and_then(|close| kinds.iter().find(|name| last(name) == close)) {
        return format!("did you mean {}?", header(name));
    }
    let homes = tables.iter().filter(|(name, _, keys)| *name != kind && keys.contains(&key));
    let homes: Vec<String> = homes.map(|(name, ..)| header(name)).collect();
    match homes.as_slice() {
        [] => format!("{} knows {}", header(kind), known.join(", ")),
        homes => format!("`{key}` belongs in {}", homes.join(" or ")),
    }
}

/// The name that was probably meant, if one is near enough to suggest.
pub(crate) fn nearest<'n>(typed: &str, names: &[&'n str]) -> Option<&'n str> {
    if typed.len() > 40 {
        return None;
    }
    let typed = typed.to_lowercase().replace('-', "_");
    names
        .iter()
        .map(|name| (strsim::damerau_levenshtein(&typed, name), *name))
        .filter(|(distance, name)| *distance <= 1.max(name.len() / 3))
        .min()
        .map(|(_, name)| name)
}

pub(crate) fn choice(key: &str, found: &str, names: &[&str], rest: &str) -> Wrong {
    let found = crate::terms::printable(found, 60);
    let quoted: Vec<String> = names.iter().map(|n| format!("\"{n}\"")).collect();
    let what = format!("`{key}` can't be \"{found}\"");
    match nearest(&found, names) {
        Some(close) => wrong(what, format!("did you mean \"{close}\"?")),
        None => wrong(what, format!("write {} {rest}", quoted.join(" or ")).trim_end()),
    }
}

/// Whether it is ours.
fn version(value: &DeValue<'_>) -> Result<bool, Wrong> {
    match value {
        DeValue::Integer(n) => Ok(i64::from_str_radix(n.as_str(), n.radix()) == Ok(1)),
        other => {
            Err(wrong(format!("`version` is the number 1, not {}", kind_of(other)), "write version = 1"))
        }
    }
}

pub(crate) fn text_of(value: &DeValue<'_>) -> Result<String, Wrong> {
    let DeValue::String(text) = value else {
        return Err(wrong(format!("expected a string, found {}", kind_of(value)), "put it in quotes"));
    };
    if text.len() > 4096 {
        return Err(wrong("this text is longer than 4096 bytes", ""));
    }
    if let Some(bad) = text.chars().find(|c| c.is_control()) {
        return Err(wrong(format!("the control character {bad:?} can't be in a policy's text"), "remove it"));
    }
    Ok(text.to_string())
}

fn boolean(value: &DeValue<'_>) -> Result<bool, Wrong> {
    match value {
        DeValue::Boolean(b) => Ok(*b),
        DeValue::String(s) if s == "true" || s == "false" => {
            Err(wrong("expected true or false, found a string", format!("write {s} without quotes")))
        }
        other => {
            Err(wrong(format!("expected true or false, found {}", kind_of(other)), "write true or false"))
        }
    }
}

pub(crate) fn port(value: &DeValue<'_>) -> Result<Port, Wrong> {
    const RANGE: &str = "a port is a number from 1 to 65535";
    let number = match value {
        DeValue::Integer(n) => i128::from_str_radix(n.as_str(), n.radix()).ok(),
        DeValue::String(s) if s.parse::<u16>().is_ok() => {
            return Err(wrong("expected a port, found a string", format!("write {s} without quotes")));
        }
        DeValue::String(s) if s.contains(['-', ':']) => {
            return Err(wrong("ranges of ports are not understood", "list each port"));
        }
        other => return Err(wrong(format!("expected a port, found {}", kind_of(other)), RANGE)),
    };
    let port = number.and_then(|n| u16::try_from(n).ok()).and_then(Port::new);
    port.ok_or_else(|| match number {
        Some(n) => wrong(format!("{n} is not a port"), RANGE),
        None => wrong("this is not a port", RANGE),
    })
}

/// As Tailscale takes them (tailcfg.CheckTag).
fn tag(value: &DeValue<'_>) -> Result<String, Wrong> {
    let text = text_of(value)?;
    let name = text.strip_prefix("tag:").unwrap_or_default();
    let fine = name.starts_with(|c: char| c.is_ascii_alphabetic())
        && name.len() <= 60
        && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '-');
    if fine {
        Ok(text)
    } else {
        Err(wrong(format!("\"{}\" is no tag", shorten(&text)), "write \"tag:server\""))
    }
}

/// Names go into labels, rules and file names, so they are DNS labels.
pub(crate) fn name(value: &DeValue<'_>) -> Result<String, Wrong> {
    const HELP: &str = "1 to 63 letters, digits and hyphens, with a letter or digit at both ends";
    let text = text_of(value)?;
    let fine = (1..=63).contains(&text.len())
        && text.chars().all(|c| c.is_ascii_alphanumeric() || c == '-')
        && !text.starts_with('-')
        && !text.ends_with('-');
    if fine { Ok(text) } else { Err(wrong(format!("\"{}\" can't be a name", shorten(&text)), HELP)) }
}

fn sentence(value: &DeValue<'_>, key: &str) -> Result<String, Wrong> {
    let text = text_of(value)?;
    match text.trim().len() {
        0 => Err(wrong(format!("`{key}` is empty"), "write it for whoever reads the report")),
        1..=400 => Ok(text),
        n => Err(wrong(format!("`{key}` has {n} bytes; the most is 400"), "say it shorter")),
    }
}

pub(crate) fn role(value: &DeValue<'_>) -> Result<Role, Wrong> {
    match text_of(value)?.as_str() {
        "spoke" => Ok(Role::Spoke),
        "hub" => Ok(Role::Hub),
        "device" => Ok(Role::Device),
        other => Err(choice("role", other, &["spoke", "hub", "device"], "")),
    }
}

pub(crate) fn mesh_kind(value: &DeValue<'_>) -> Result<MeshKind, Wrong> {
    match text_of(value)?.as_str() {
        "wireguard" => Ok(MeshKind::Wireguard),
        "tailscale" => Ok(MeshKind::Tailscale),
        other => Err(choice("kind", other, &["wireguard", "tailscale"], "")),
    }
}

fn mode(value: &DeValue<'_>) -> Result<Mode, Wrong> {
    match text_of(value)?.as_str() {
        "enforce" => Ok(Mode::Enforce),
        "audit" => Ok(Mode::Audit),
        other => Err(choice("mode", other, &["enforce", "audit"], "")),
    }
}

fn interface(value: &DeValue<'_>) -> Result<IfacePattern, Wrong> {
    let help = "a name as `ip link` shows it, or the start of one and a star: \"docker*\"";
    IfacePattern::new(&text_of(value)?).map_err(|what| wrong(crate::terms::printable(&what, 120), help))
}

fn mesh_interface(value: &DeValue<'_>) -> Result<String, Wrong> {
    let pattern = interface(value)?;
    match pattern.as_str() {
        "lo" => Err(wrong("the mesh can't be on lo", "name the tunnel's interface")),
        _ if pattern.is_prefix() => {
            Err(wrong("the mesh has one interface, not a pattern", "write its whole name"))
        }
        name => Ok(name.to_owned()),
    }
}

pub(crate) fn address(value: &DeValue<'_>) -> Result<IpAddr, Wrong> {
    let text = text_of(value)?;
    let address: IpAddr = text.parse().map_err(|_| {
        let help = match (text.parse::<IpNet>(), text.parse::<SocketAddr>()) {
            (Ok(net), _) => format!("write the address alone: \"{}\"", net.addr()),
            (_, Ok(socket)) => format!("write the address alone: \"{}\"", socket.ip()),
            _ => "write an IPv4 or IPv6 address, such as \"10.84.0.16\"".into(),
        };
        wrong(format!("\"{}\" is not an address", shorten(&text)), help)
    })?;
    match address {
        IpAddr::V6(v6) if v6.to_ipv4_mapped().is_some() => Err(mapped(&text, &address.to_canonical())),
        _ => Ok(address),
    }
}

fn mapped(text: &str, canonical: &dyn fmt::Display) -> Wrong {
    wrong(
        format!("\"{}\" is IPv4 mapped into IPv6", shorten(text)),
        format!("no packet carries it: write \"{canonical}\""),
    )
}

/// An address that one host in the mesh can have.
pub(crate) fn unicast(value: &DeValue<'_>) -> Result<IpAddr, Wrong> {
    let address = address(value)?;
    let sort = match address {
        a if a.is_unspecified() => "the unspecified address",
        a if a.is_loopback() => "a loopback address",
        a if a.is_multicast() => "a multicast address",
        IpAddr::V4(Ipv4Addr::BROADCAST) => "the broadcast address",
        _ => return Ok(address),
    };
    Err(wrong(format!("{address} is {sort}, which no host in a mesh has"), MESH_ADDRESS))
}

const MESH_ADDRESS: &str = "write the address that the tunnel's interface has";

fn bind_address(value: &DeValue<'_>) -> Result<IpAddr, Wrong> {
    let address = address(value)?;
    if address.is_unspecified() {
        let what = format!("{address} would have sshd listen everywhere");
        return Err(wrong(what, "write bind = \"mesh\""));
    }
    if address.is_loopback() { Ok(address) } else { unicast(value) }
}

fn prefix(value: &DeValue<'_>) -> Result<IpNet, Wrong> {
    let text = text_of(value)?;
    let net: IpNet = text.parse().map_err(|_| {
        let help = match text.parse::<IpAddr>() {
            Ok(address) => format!("write \"{}\" for this one address", IpNet::from(address)),
            Err(_) => "write address/length, such as \"10.84.0.0/24\" or \"fd00::/64\"".into(),
        };
        wrong(format!("\"{}\" is not a prefix", shorten(&text)), help)
    })?;
    if let IpNet::V6(v6) = net
        && let (Some(v4), Some(length)) = (v6.addr().to_ipv4_mapped(), v6.prefix_len().checked_sub(96))
    {
        return Err(mapped(&text, &format_args!("{v4}/{length}")));
    }
    if net.addr() != net.network() {
        let what = format!("{net} has bits set outside its {}-bit prefix", net.prefix_len());
        return Err(wrong(what, format!("write the network \"{}\"", net.trunc())));
    }
    Ok(net)
}

pub(crate) fn mesh_prefix(value: &DeValue<'_>) -> Result<IpNet, Wrong> {
    let net = prefix(value)?;
    if net.prefix_len() == 0 {
        let help = "write the prefix that the mesh's own addresses are in";
        return Err(wrong(format!("{net} is the whole internet, not a mesh"), help));
    }
    if net.addr().is_loopback() || net.addr().is_multicast() {
        let what = format!("{net} holds no address that a host in a mesh could have");
        return Err(wrong(what, "write the prefix that the mesh's own addresses are in"));
    }
    Ok(net)
}

pub(crate) fn public_key(value: &DeValue<'_>) -> Result<PublicKey, Wrong> {
    let text = text_of(value)?;
    // The text isn't echoed: it may well be the private key.
    PublicKey::from_base64(&text).ok_or_else(|| {
        wrong("this is not a WireGuard public key", "write the 44 characters that `wg show` prints")
    })
}

pub(crate) fn endpoint(value: &DeValue<'_>) -> Result<SocketAddr, Wrong> {
    let text = text_of(value)?;
    let shape = "write \"203.0.113.47:51820\" or \"[2001:db8::1]:51820\"";
    let what = format!("\"{}\" is not an address and a port", shorten(&text));
    let endpoint: SocketAddr = text.parse().map_err(|_| {
        let host = text.rsplit_once(':').map_or(text.as_str(), |(host, _)| host);
        let named = host.contains(|c: char| c.is_ascii_alphabetic()) && !host.contains(':');
        if named {
            wrong(
                format!("\"{}\" is a name, and spokeguard does not resolve names", shorten(&text)),
                format!("whoever answers DNS would choose the hub; {shape}"),
            )
        } else if let Ok(address) = text.parse::<IpAddr>() {
            wrong(&what, format!("add the port: \"{}\"", SocketAddr::new(address, 51820)))
        } else {
            wrong(&what, shape)
        }
    })?;
    if endpoint.port() == 0 {
        return Err(wrong("0 is not a port", shape));
    }
    match endpoint.ip() {
        IpAddr::V6(v6) if v6.to_ipv4_mapped().is_some() => {
            Err(mapped(&text, &SocketAddr::new(endpoint.ip().to_canonical(), endpoint.port())))
        }
        a if a.is_unspecified() || a.is_multicast() => Err(wrong(what, shape)),
        _ => Ok(endpoint),
    }
}

/// Whole seconds up to a day.
fn span(value: &DeValue<'_>) -> Result<Duration, Wrong> {
    duration(value, 86_400, "a day")
}

/// `None`: the policy asks for none. Not "0s", which WireGuard reads as "off" and a
/// person may read as "all the time".
fn keepalive(value: &DeValue<'_>) -> Result<Option<Duration>, Wrong> {
    match value {
        DeValue::String(s) if s == "off" => Ok(None),
        DeValue::String(s) if humantime::parse_duration(s).is_ok_and(|d| d.is_zero()) => {
            Err(wrong("a keepalive of no time", "write keepalive = \"off\" to ask for none"))
        }
        _ => duration(value, 65_535, "65535 seconds").map(Some),
    }
}

fn duration(value: &DeValue<'_>, max_s: u64, max: &str) -> Result<Duration, Wrong> {
    const HELP: &str = "write a number and a unit, such as \"25s\" or \"3m\"";
    if let DeValue::Integer(n) = value {
        return Err(wrong("a duration needs its unit", format!("write \"{n}s\" if seconds are meant")));
    }
    let text = text_of(value)?;
    let duration = humantime::parse_duration(&text)
        .map_err(|_| wrong(format!("\"{}\" is not a duration", shorten(&text)), HELP))?;
    if duration.subsec_nanos() != 0 || duration.is_zero() {
        return Err(wrong(format!("\"{}\" is not one or more whole seconds", shorten(&text)), HELP));
    }
    if duration.as_secs() > max_s {
        return Err(wrong(format!("\"{}\" is longer than {max}", shorten(&text)), "write less"));
    }
    Ok(duration)
}

fn path(value: &DeValue<'_>) -> Result<PathBuf, Wrong> {
    let text = text_of(value)?;
    if text.starts_with('/') && text.len() > 1 && !text.split('/').any(|part| part == "..") {
        return Ok(PathBuf::from(text));
    }
    let what = format!("\"{}\" is not the absolute path of a file", shorten(&text));
    Err(wrong(what, "begin it with / and leave out \"..\""))
}

fn url_file(value: &DeValue<'_>) -> Result<PathBuf, Wrong> {
    if text_of(value)?.contains("://") {
        return Err(wrong(
            "this is a URL, not the path of a file that holds it",
            "a policy may be read by anyone, a push URL may not: put it in a file and write its path",
        ));
    }
    let name = text_of(value)?;
    // By name alone: a credential of the service.
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if !name.is_empty() && name.len() <= 255 && name.chars().all(plain) && !name.starts_with('.') {
        return Ok(PathBuf::from(name));
    }
    path(value)
}

/// As a certificate names its host.
fn host_name(value: &DeValue<'_>) -> Result<String, Wrong> {
    let name = text_of(value)?;
    let label = |label: &str| {
        let plain = |b: u8| b.is_ascii_alphanumeric() || b == b'-';
        (1..=63).contains(&label.len()) && label.bytes().all(plain)
    };
    if name.len() <= 253 && name.split('.').all(label) {
        return Ok(name);
    }
    Err(wrong(format!("\"{}\" is not a host's name", shorten(&name)), "write it as in \"www.example.org\""))
}

/// `mode = "0600"`, as `chmod` takes it.
fn mode_bits(value: &DeValue<'_>) -> Result<u32, Wrong> {
    const HELP: &str = "write it as chmod takes it, in quotes: \"0600\"";
    if !matches!(value, DeValue::String(_)) {
        return Err(wrong(format!("`mode` is a string of octal digits, not {}", kind_of(value)), HELP));
    }
    let text = text_of(value)?;
    let octal = (3..=4).contains(&text.len()) && text.bytes().all(|b| (b'0'..=b'7').contains(&b));
    match u32::from_str_radix(&text, 8) {
        Ok(bits) if octal && bits <= 0o777 => Ok(bits),
        Ok(_) if octal => Err(wrong(
            format!("mode \"{text}\" has a set-user-id, set-group-id or sticky bit"),
            "those grant rights instead of limiting them: leave the first digit 0",
        )),
        _ => Err(wrong(format!("\"{}\" is not a mode", shorten(&text)), HELP)),
    }
}

fn date(value: &DeValue<'_>) -> Result<Date, Wrong> {
    let text = match value {
        DeValue::Datetime(d) if d.time.is_none() && d.offset.is_none() => d.to_string(),
        DeValue::Datetime(_) => {
            return Err(wrong(
                "`until` is a day, without a time",
                "write \"2027-01-31\": it ends with that day, UTC",
            ));
        }
        other => text_of(other)?,
    };
    let date = (text.len() == 10).then(|| text.parse::<Date>().ok()).flatten();
    date.ok_or_else(|| {
        wrong(format!("\"{}\" is not a day of the calendar", shorten(&text)), "write it as \"2027-01-31\"")
    })
}

/// Foreign text inside a sentence.
pub(crate) fn shorten(text: &str) -> String {
    let short = crate::terms::printable(text, 48);
    if text.chars().count() > 48 { format!("{short}...") } else { short }
}
