//! nft's JSON listing into values, one element at a time: ten thousand rules are never in
//! memory as JSON. The listing is foreign input: it is bounded, and what it holds that we
//! don't understand becomes `Unknown`, never an error and never nothing.

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use serde::de::{self, DeserializeSeed, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};

use super::{
    Base, Chain, Hook, Match, NamedSet, Nat, Op, Operand, Rule, Ruleset, Statement, Table, TableFamily, Term,
    Timed, VerdictMap,
    unlisted::{self, Held, Unlisted},
    xt,
};
use crate::observed::Amount;

/// More rules, chains, counters or sets than this are refused as a whole: a listing that
/// is cut short would read as a host with fewer rules.
pub const OBJECTS_MAX: usize = 65_536;
/// A named set keeps this many elements and is then marked as truncated.
pub const SET_ELEMENTS_MAX: usize = 16_384;
/// The kernel keeps no longer one.
const COMMENT_MAX: usize = 128;
/// All named sets together keep this many elements.
const ELEMENTS_MAX: usize = 262_144;

#[derive(Debug, thiserror::Error)]
pub enum DecodeError {
    #[error("read of the rule set as JSON")]
    Json(#[source] serde_json::Error),
    #[error("the rule set holds more than {OBJECTS_MAX} {0}")]
    TooMany(&'static str),
}

/// Reads what `nft -j list ruleset` (or `list table`) prints.
pub fn ruleset(json: impl io::Read) -> Result<Ruleset, DecodeError> {
    ruleset_with(json, Unlisted::default())
}

/// The same, with what the kernel says of what nft does not print.
pub fn ruleset_with(json: impl io::Read, unlisted: Unlisted) -> Result<Ruleset, DecodeError> {
    let mut building = Building { unlisted, ..Building::default() };
    let mut reader = serde_json::Deserializer::from_reader(io::BufReader::new(json));
    let read = Document(&mut building).deserialize(&mut reader).and_then(|()| reader.end());
    // The bound is noticed inside the visitor, whose errors are JSON errors.
    match (building.too_many, read) {
        (Some(what), _) => Err(DecodeError::TooMany(what)),
        (None, Err(e)) => Err(DecodeError::Json(e)),
        (None, Ok(())) => Ok(building.ruleset),
    }
}

#[derive(Default)]
struct Building {
    ruleset: Ruleset,
    unlisted: Unlisted,
    tables: HashMap<(TableFamily, String), usize>,
    chains: HashMap<(usize, String), usize>,
    /// Tables whose flags could not be read.
    unclear: Vec<bool>,
    /// Named limits, by table; nft lists them before the rules.
    limits: HashMap<(usize, String), Value>,
    rules: usize,
    objects: usize,
    elements: usize,
    too_many: Option<&'static str>,
}

impl Building {
    fn table(&mut self, family: TableFamily, name: &str) -> usize {
        if let Some(at) = self.tables.get(&(family, name.to_owned())) {
            return *at;
        }
        let at = self.ruleset.tables.len();
        self.ruleset.tables.push(Table {
            family,
            name: name.to_owned(),
            dormant: false,
            chains: vec![],
            counters: Default::default(),
            sets: vec![],
        });
        self.unclear.push(false);
        self.tables.insert((family, name.to_owned()), at);
        at
    }

    fn chain(&mut self, table: usize, name: &str) -> &mut Chain {
        let chains = &mut self.ruleset.tables[table].chains;
        let at = *self.chains.entry((table, name.to_owned())).or_insert_with(|| {
            chains.push(Chain { name: name.to_owned(), base: None, rules: vec![] });
            chains.len() - 1
        });
        &mut chains[at]
    }

    /// Takes one element of the listing. Objects that can't decide a packet's fate
    /// (flowtables, helpers) are left out.
    fn take(&mut self, kind: &str, body: &Value) -> Result<(), &'static str> {
        let text = |key: &str| body.get(key).and_then(Value::as_str).unwrap_or_default();
        let Some(family) = family(text("family")) else { return Ok(()) };
        match kind {
            "table" => {
                self.count_object()?;
                let at = self.table(family, text("name"));
                let known = |f: &Value| matches!(f.as_str(), Some("dormant" | "owner" | "persist"));
                let (dormant, unclear) = match body.get("flags") {
                    None | Some(Value::Null) => (false, false),
                    Some(Value::Array(flags)) => {
                        (flags.iter().any(|f| f == "dormant"), !flags.iter().all(known))
                    }
                    // nft 1.0.6 prints a single flag from memory that it has freed: as a
                    // rule the name of another table.
                    Some(flag) => (flag == "dormant", !known(flag)),
                };
                self.ruleset.tables[at].dormant = dormant || unclear;
                self.unclear[at] = unclear && !dormant;
            }
            "chain" => {
                self.count_object()?;
                let at = self.table(family, text("table"));
                let unclear = self.unclear[at];
                let chain = self.chain(at, text("name"));
                chain.base = base(body);
                if chain.base.is_some() && unclear {
                    chain.rules.insert(0, unclear_flags());
                }
            }
            "rule" => {
                self.rules += 1;
                if self.rules > OBJECTS_MAX {
                    return Err("rules");
                }
                let at = self.table(family, text("table"));
                let handle = body.get("handle").and_then(Value::as_u64);
                let held = self.unlisted.take(family, text("table"), text("chain"), handle);
                let rule = match self.limits.is_empty() {
                    true => rule(body, family, held.as_deref()),
                    false => rule(&self.with_limits(at, body), family, held.as_deref()),
                };
                self.chain(at, text("chain")).rules.push(rule);
            }
            "counter" => {
                self.count_object()?;
                let at = self.table(family, text("table"));
                self.ruleset.tables[at].counters.insert(text("name").to_owned(), amount(body));
            }
            "limit" => {
                self.count_object()?;
                let at = self.table(family, text("table"));
                let mut limit = body.clone();
                for known in ["family", "table", "handle"] {
                    limit.as_object_mut().and_then(|limit| limit.remove(known));
                }
                self.limits.insert((at, text("name").to_owned()), limit);
            }
            _ => {}
        }
        Ok(())
    }

    /// A rule, with what it calls a limit by name put in its place.
    fn with_limits(&self, table: usize, rule: &Value) -> Value {
        let mut rule = rule.clone();
        for statement in rule.get_mut("expr").and_then(Value::as_array_mut).into_iter().flatten() {
            let named = statement.get("limit").and_then(Value::as_str);
            if let Some(limit) = named.and_then(|name| self.limits.get(&(table, name.to_owned()))).cloned() {
                statement["limit"] = limit;
            }
        }
        rule
    }

    fn take_set(&mut self, map: bool, body: &Value, elements: Elements) -> Result<(), &'static str> {
        let text = |key: &str| body.get(key).and_then(Value::as_str).unwrap_or_default();
        let Some(family) = family(text("family")) else { return Ok(()) };
        self.count_object()?;
        self.elements += elements.keys.len();
        let at = self.table(family, text("table"));
        let verdict_map = map && text("map") == "verdict";
        let flags = strings(body.get("flags"));
        self.ruleset.tables[at].sets.push(NamedSet {
            name: text("name").to_owned(),
            kind: match body.get("type") {
                Some(Value::Array(parts)) => {
                    parts.iter().map(|p| p.as_str().unwrap_or("?")).collect::<Vec<_>>().join(" . ")
                }
                Some(Value::String(kind)) => kind.clone(),
                other => other.map(Value::to_string).unwrap_or_default(),
            },
            map,
            elements: elements.keys,
            timed: if flags.iter().any(|flag| flag == "timeout") { elements.timed } else { vec![] },
            flags,
            verdicts: if verdict_map { elements.verdicts } else { vec![] },
            truncated: elements.truncated,
        });
        Ok(())
    }

    fn count_object(&mut self) -> Result<(), &'static str> {
        self.objects += 1;
        if self.objects > OBJECTS_MAX { Err("tables, chains, counters and sets") } else { Ok(()) }
    }
}

/// Stands first in each base chain of a table that may be dormant or not: maybe the packet
/// passes it unseen. No rule of the kernel looks like this.
pub(super) fn unclear_flags() -> Rule {
    let maybe = Statement::Maybe("the flags of the table, which this nft does not print".into());
    Rule { comment: None, handle: None, statements: vec![maybe, Statement::Accept] }
}

/// `{"nftables": [...]}`
struct Document<'a>(&'a mut Building);

impl<'de> DeserializeSeed<'de> for Document<'_> {
    type Value = ();
    fn deserialize<D: de::Deserializer<'de>>(self, d: D) -> Result<(), D::Error> {
        d.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Document<'_> {
    type Value = ();
    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("an object with the list \"nftables\"")
    }
    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let mut seen = false;
        while let Some(key) = map.next_key::<String>()? {
            if key == "nftables" {
                map.next_value_seed(List(self.0))?;
                seen = true;
            } else {
                map.next_value::<IgnoredAny>()?;
            }
        }
        if seen { Ok(()) } else { Err(de::Error::missing_field("nftables")) }
    }
}

struct List<'a>(&'a mut Building);

impl<'de> DeserializeSeed<'de> for List<'_> {
    type Value = ();
    fn deserialize<D: de::Deserializer<'de>>(self, d: D) -> Result<(), D::Error> {
        d.deserialize_seq(self)
    }
}

impl<'de> Visitor<'de> for List<'_> {
    type Value = ();
    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("a list of rule set objects")
    }
    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<(), A::Error> {
        while seq.next_element_seed(Object(self.0))?.is_some() {}
        Ok(())
    }
}

/// `{"rule": {...}}`
struct Object<'a>(&'a mut Building);

impl<'de> DeserializeSeed<'de> for Object<'_> {
    type Value = ();
    fn deserialize<D: de::Deserializer<'de>>(self, d: D) -> Result<(), D::Error> {
        d.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Object<'_> {
    type Value = ();
    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("a rule set object")
    }
    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let building = self.0;
        while let Some(kind) = map.next_key::<String>()? {
            let taken = match kind.as_str() {
                "set" | "map" => {
                    let room = SET_ELEMENTS_MAX.min(ELEMENTS_MAX.saturating_sub(building.elements));
                    let (body, elements) = map.next_value_seed(Set { room })?;
                    building.take_set(kind == "map", &Value::Object(body), elements)
                }
                "table" | "chain" | "rule" | "counter" | "limit" => {
                    let body = map.next_value::<Value>()?;
                    building.take(&kind, &body)
                }
                _ => {
                    map.next_value::<IgnoredAny>()?;
                    Ok(())
                }
            };
            if let Err(what) = taken {
                building.too_many = Some(what);
                return Err(de::Error::custom("too many objects"));
            }
        }
        Ok(())
    }
}

/// The body of a named set, with its elements taken one by one up to `room`.
struct Set {
    room: usize,
}

impl<'de> DeserializeSeed<'de> for Set {
    type Value = (Map<String, Value>, Elements);
    fn deserialize<D: de::Deserializer<'de>>(self, d: D) -> Result<Self::Value, D::Error> {
        d.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Set {
    type Value = (Map<String, Value>, Elements);
    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("a named set")
    }
    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut body = Map::new();
        let mut elements = Elements::default();
        while let Some(key) = map.next_key::<String>()? {
            if key == "elem" {
                elements = map.next_value_seed(Elements { room: self.room, ..Elements::default() })?;
            } else {
                body.insert(key, map.next_value()?);
            }
        }
        Ok((body, elements))
    }
}

#[derive(Default)]
struct Elements {
    room: usize,
    keys: Vec<Operand>,
    timed: Vec<Timed>,
    verdicts: Vec<Statement>,
    truncated: bool,
}

impl<'de> DeserializeSeed<'de> for Elements {
    type Value = Self;
    fn deserialize<D: de::Deserializer<'de>>(self, d: D) -> Result<Self, D::Error> {
        d.deserialize_seq(self)
    }
}

impl<'de> Visitor<'de> for Elements {
    type Value = Self;
    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("a list of set elements")
    }
    fn visit_seq<A: SeqAccess<'de>>(mut self, mut seq: A) -> Result<Self, A::Error> {
        while self.keys.len() < self.room {
            let Some(element) = seq.next_element::<Value>()? else { return Ok(self) };
            // An element of a map is a pair; of a set, a value.
            match element.as_array().map(Vec::as_slice) {
                Some([key, verdict]) => {
                    self.keys.push(operand(key));
                    self.timed.push(timed(key));
                    self.verdicts.push(statement(verdict));
                }
                _ => {
                    self.keys.push(operand(&element));
                    self.timed.push(timed(&element));
                    self.verdicts.push(Statement::Unknown(String::new()));
                }
            }
        }
        while seq.next_element::<IgnoredAny>()?.is_some() {
            self.truncated = true;
        }
        Ok(self)
    }
}

/// nft wraps an element that is more than its value; its times are whole seconds.
fn timed(element: &Value) -> Timed {
    let Some(body) = element.get("elem") else { return Timed::default() };
    let seconds = |key: &str| {
        let number = body.get(key).and_then(Value::as_u64).unwrap_or(0);
        u32::try_from(number).unwrap_or(u32::MAX)
    };
    let comment = body.get("comment").and_then(Value::as_str);
    Timed {
        timeout_s: seconds("timeout"),
        expires_s: seconds("expires"),
        comment: comment.filter(|text| text.len() <= COMMENT_MAX).map(str::to_owned),
    }
}

fn family(text: &str) -> Option<TableFamily> {
    Some(match text {
        "inet" => TableFamily::Inet,
        "ip" => TableFamily::Ip,
        "ip6" => TableFamily::Ip6,
        "arp" => TableFamily::Arp,
        "bridge" => TableFamily::Bridge,
        "netdev" => TableFamily::Netdev,
        _ => return None,
    })
}

fn base(body: &Value) -> Option<Base> {
    let hook = match body.get("hook")?.as_str()? {
        "ingress" => Hook::Ingress,
        "prerouting" => Hook::Prerouting,
        "input" => Hook::Input,
        "forward" => Hook::Forward,
        "output" => Hook::Output,
        "postrouting" => Hook::Postrouting,
        "egress" => Hook::Egress,
        _ => return None,
    };
    Some(Base {
        kind: body.get("type").and_then(Value::as_str).unwrap_or("filter").to_owned(),
        hook,
        priority: body
            .get("prio")
            .and_then(Value::as_i64)
            .map_or(0, |p| p.clamp(i32::MIN.into(), i32::MAX.into()) as i32),
        drops: body.get("policy").and_then(Value::as_str) == Some("drop"),
        devices: strings(body.get("dev")),
    })
}

fn amount(body: &Value) -> Amount {
    let number = |key| body.get(key).and_then(Value::as_u64).unwrap_or(0);
    Amount { packets: number("packets"), bytes: number("bytes") }
}

fn strings(value: Option<&Value>) -> Vec<String> {
    match value {
        Some(Value::String(one)) => vec![one.clone()],
        Some(Value::Array(many)) => many.iter().filter_map(|v| v.as_str().map(str::to_owned)).collect(),
        _ => vec![],
    }
}

fn rule(body: &Value, family: TableFamily, held: Option<&Held>) -> Rule {
    let mut statements = vec![];
    match body.get("expr") {
        Some(Value::Array(list)) => match held.map(|held| &held.parts).filter(|parts| xt::fit(list, parts)) {
            Some(parts) => {
                let mut parts = parts.iter();
                for json in list {
                    match json.get("xt").and_then(|_| parts.next()) {
                        Some(part) => statements.extend(xt::statements(part, family)),
                        None => with_lookup(json, &mut statements),
                    }
                }
            }
            None => list.iter().for_each(|json| with_lookup(json, &mut statements)),
        },
        None | Some(Value::Null) => {}
        Some(other) => statements.push(Statement::Unknown(other.to_string())),
    }
    if let Some(rejects) = family_rejected(body, family) {
        let at = statements.iter().position(|s| matches!(s, Statement::Reject { .. }));
        statements.insert(at.unwrap_or(statements.len()), Statement::Match(rejects));
    }
    match held {
        Some(held) => unlisted::complete(&mut statements, held, family),
        None => unlisted::doubted(&mut statements),
    }
    Rule {
        comment: body.get("comment").and_then(Value::as_str).map(str::to_owned),
        handle: body.get("handle").and_then(Value::as_u64),
        statements,
    }
}

/// A rule ends where a map has nothing for the packet, also one that only counts or marks; and `dnat ip to
/// MAP` is for IPv4 alone, as one to an address is by that.
fn with_lookup(json: &Value, out: &mut Vec<Statement>) {
    let read = statement(json);
    let acts = matches!(
        read,
        Statement::Dnat(_)
            | Statement::Redirect { .. }
            | Statement::Neutral(_)
            | Statement::Counter(_)
            | Statement::CounterRef(_)
    );
    if acts && looks_up(json) {
        if let (Statement::Dnat(_), Some(nat)) = (&read, json.get("dnat"))
            && let Some(only @ ("ip" | "ip6")) = nat.get("family").and_then(Value::as_str)
        {
            out.push(Statement::Match(of_family(if only == "ip" { "ipv4" } else { "ipv6" })));
        }
        out.push(Statement::Maybe(json.to_string()));
    }
    out.push(read);
}

fn looks_up(json: &Value) -> bool {
    match json {
        Value::Object(object) => {
            object.get("map").is_some_and(|map| map.get("key").is_some()) || object.values().any(looks_up)
        }
        Value::Array(list) => list.iter().any(looks_up),
        _ => false,
    }
}

fn of_family(nfproto: &str) -> Match {
    Match { left: Term::Meta("nfproto".into()), op: Op::Eq, right: Operand::Text(nfproto.into()) }
}

/// `reject with icmp` is for IPv4 alone, and `icmpv6` for IPv6. Where a table sees both, nft adds a match for
/// that and does not list it.
fn family_rejected(rule: &Value, family: TableFamily) -> Option<Match> {
    if matches!(family, TableFamily::Ip | TableFamily::Ip6) {
        return None;
    }
    let kind =
        rule.get("expr")?.as_array()?.iter().find_map(|json| json.get("reject")?.get("type")?.as_str());
    let (only, ethernet) = match kind? {
        "icmp" => ("ipv4", "ip"),
        "icmpv6" => ("ipv6", "ip6"),
        _ => return None,
    };
    // Where a chain is not of a family that packets have, nft asks for what the link says.
    Some(match family {
        TableFamily::Inet => of_family(only),
        _ => Match { left: Term::Meta("protocol".into()), op: Op::Eq, right: Operand::Text(ethernet.into()) },
    })
}

/// One statement of a rule, or the verdict of a map.
pub(super) fn statement(json: &Value) -> Statement {
    let unknown = || Statement::Unknown(json.to_string());
    let Some((kind, body)) = single(json) else {
        // `notrack` is a bare word in some versions.
        return if json == "notrack" { Statement::Neutral(r#"{"notrack":null}"#.into()) } else { unknown() };
    };
    let target = || body.get("target").and_then(Value::as_str).map(str::to_owned);
    match kind {
        "match" => match_statement(body).unwrap_or_else(unknown),
        "accept" => Statement::Accept,
        "drop" => Statement::Drop,
        "return" => Statement::Return,
        "jump" => target().map_or_else(unknown, Statement::Jump),
        "goto" => target().map_or_else(unknown, Statement::Goto),
        "counter" => match body {
            Value::String(name) => Statement::CounterRef(name.clone()),
            // `counter name KEY map {...}` counts and nothing else.
            Value::Object(o) if o.contains_key("map") => Statement::Neutral(json.to_string()),
            _ => Statement::Counter(amount(body)),
        },
        "reject" => Statement::Reject { tcp_reset: body.get("type").is_some_and(|t| t == "tcp reset") },
        "dnat" => Statement::Dnat(Nat {
            address: body.get("addr").map(operand),
            port: body.get("port").map(operand),
        }),
        "redirect" => Statement::Redirect { port: body.get("port").map(operand) },
        "vmap" => vmap(body).unwrap_or_else(unknown),
        "continue" | "log" | "notrack" | "snat" | "masquerade" | "last" | "secmark" | "flow" | "dup"
        | "ct helper" | "ct timeout" | "ct expectation" | "reset" => Statement::Neutral(json.to_string()),
        "limit" | "quota" | "ct count" | "meter" => Statement::Maybe(json.to_string()),
        // An update of a set counts on; with a limit inside, it may also stop the rule.
        // (A full set stops it too, so a rule may go on or not; but nft's own rules for
        // packets that must pass do not hang on that.)
        "set" if body.get("stmt").is_none() => Statement::Neutral(json.to_string()),
        "set" | "map" => Statement::Maybe(json.to_string()),
        "mangle" => mangle(json, body),
        "xt" => xt::unread(json),
        _ => unknown(),
    }
}

fn single(json: &Value) -> Option<(&str, &Value)> {
    let object = json.as_object()?;
    let mut entries = object.iter();
    let (key, value) = entries.next()?;
    entries.next().is_none().then_some((key.as_str(), value))
}

fn match_statement(body: &Value) -> Option<Statement> {
    let op = match body.get("op").and_then(Value::as_str).unwrap_or("==") {
        "==" => Op::Eq,
        "!=" => Op::Ne,
        "<" => Op::Lt,
        ">" => Op::Gt,
        "<=" => Op::Le,
        ">=" => Op::Ge,
        "in" => Op::Any,
        "!" => Op::NoneOf,
        _ => return None,
    };
    let right = match operand(body.get("right")?) {
        Operand::Bits(flags) if matches!(op, Op::Any | Op::NoneOf) => Operand::Set(flags),
        other => other,
    };
    Some(Statement::Match(Match { left: term(body.get("left")?), op, right }))
}

fn vmap(body: &Value) -> Option<Statement> {
    let key = term(body.get("key")?);
    let data = body.get("data")?;
    let map = match data {
        Value::String(name) => VerdictMap::Named(name.strip_prefix('@')?.to_owned()),
        _ => {
            let pairs = data.get("set")?.as_array()?;
            if pairs.len() > SET_ELEMENTS_MAX {
                return None;
            }
            let pairs = pairs.iter().map(|pair| match pair.as_array()?.as_slice() {
                [key, verdict] => Some((operand(key), statement(verdict))),
                _ => None,
            });
            VerdictMap::Pairs(pairs.collect::<Option<_>>()?)
        }
    };
    Some(Statement::Vmap { key, map })
}

/// Setting a mark or a priority leaves a packet as it is; writing into its headers may
/// send it anywhere.
fn mangle(json: &Value, body: &Value) -> Statement {
    let key = body.get("key");
    let meta = key.and_then(|k| k.get("meta")).and_then(|m| m.get("key")).and_then(Value::as_str);
    let harmless = matches!(meta, Some("mark" | "priority" | "nftrace" | "secmark" | "rtclassid"))
        || key.is_some_and(|k| k.get("ct").is_some() || k.get("tcp option").is_some());
    if harmless { Statement::Neutral(json.to_string()) } else { Statement::Unknown(json.to_string()) }
}

pub(super) fn term(json: &Value) -> Term {
    known_term(json).unwrap_or_else(|| Term::Unknown(json.to_string()))
}

fn known_term(json: &Value) -> Option<Term> {
    let (kind, body) = single(json)?;
    let text = |key: &str| body.get(key).and_then(Value::as_str).map(str::to_owned);
    Some(match kind {
        "meta" => Term::Meta(text("key")?),
        // Without `protocol` it is a raw payload, by offset.
        "payload" => Term::Payload { protocol: text("protocol")?, field: text("field")? },
        "ct" => {
            let key = text("key")?;
            // Older versions name the family apart: {"key": "daddr", "family": "ip"}.
            let key = match text("family") {
                Some(family) if !key.contains(' ') => format!("{family} {key}"),
                _ => key,
            };
            Term::Ct { key, dir: text("dir") }
        }
        "fib" => Term::Fib { flags: strings(body.get("flags")), result: text("result")? },
        "&" => match body.as_array()?.as_slice() {
            [left, mask] => Term::And { term: Box::new(known_term(left)?), mask: operand(mask) },
            _ => return None,
        },
        "concat" => Term::Concat(body.as_array()?.iter().map(term).collect()),
        _ => return None,
    })
}

pub(super) fn operand(json: &Value) -> Operand {
    known_operand(json).unwrap_or_else(|| Operand::Unknown(json.to_string()))
}

fn known_operand(json: &Value) -> Option<Operand> {
    Some(match json {
        Value::Number(n) => Operand::Number(n.as_u64()?),
        Value::Bool(true) => Operand::Text("exists".into()),
        Value::Bool(false) => Operand::Text("missing".into()),
        Value::String(text) => word(text),
        Value::Array(list) => Operand::Bits(sorted(list)?),
        Value::Object(_) => {
            let (kind, body) = single(json)?;
            match kind {
                "set" => Operand::Set(sorted(body.as_array()?)?),
                "|" => Operand::Bits(sorted(body.as_array()?)?),
                "elem" => known_operand(body.get("val")?)?,
                "concat" => Operand::Concat(body.as_array()?.iter().map(operand).collect()),
                "range" => match body.as_array()?.as_slice() {
                    [low, high] => {
                        Operand::Range(Box::new(known_operand(low)?), Box::new(known_operand(high)?))
                    }
                    _ => return None,
                },
                "prefix" => prefix(body)?,
                _ => return None,
            }
        }
        Value::Null => return None,
    })
}

fn sorted(list: &[Value]) -> Option<Vec<Operand>> {
    if list.len() > SET_ELEMENTS_MAX {
        return None;
    }
    let mut values: Vec<Operand> = list.iter().map(operand).collect();
    values.sort();
    values.dedup();
    Some(values)
}

fn word(text: &str) -> Operand {
    if let Some(name) = text.strip_prefix('@') {
        return Operand::Named(name.to_owned());
    }
    // nft 1.0.6 has no type for the elements of `ct original proto-dst { 80 }` and prints
    // "0x50 [invalid type]".
    if let Some(hex) = text.strip_prefix("0x") {
        let digits = hex.strip_suffix(" [invalid type]").unwrap_or(hex);
        if let Ok(number) = u64::from_str_radix(digits, 16) {
            return Operand::Number(number);
        }
    }
    if text.contains(['.', ':'])
        && let Ok(address) = text.parse::<IpAddr>()
    {
        return Operand::Address(address);
    }
    Operand::Text(text.to_owned())
}

fn prefix(body: &Value) -> Option<Operand> {
    let length = u8::try_from(body.get("len")?.as_u64()?).ok()?;
    let address = match body.get("addr")?.as_str()? {
        "0" => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        "" => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
        text => text.parse().ok()?,
    };
    Some(Operand::Prefix(IpNet::new(address, length).ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ruleset::render;

    fn capture(json: &str) -> Ruleset {
        ruleset(json.as_bytes()).expect("a capture decodes")
    }

    fn lines(ruleset: &Ruleset, name: &str) -> Vec<String> {
        let chains = ruleset.tables.iter().flat_map(|t| &t.chains).filter(|c| c.name == name);
        chains.flat_map(|c| c.rules.iter().map(render::rule)).collect()
    }

    fn one(expr: &str) -> Statement {
        statement(&serde_json::from_str(expr).expect("JSON"))
    }

    #[test]
    fn every_construct_of_our_own_table_is_understood() {
        let found = capture(include_str!("captures/constructs.json"));
        let table = found.table(TableFamily::Inet, "spokeguard").expect("our table");
        assert_eq!(table.chains.len(), 6);
        assert_eq!(table.counters["c2"], Amount { packets: 9_999_999_999, bytes: 999_999_999_999 });
        for name in ["input", "mesh"] {
            for line in lines(&found, name) {
                assert!(!line.contains('<'), "not understood: {line}");
            }
        }
        assert_eq!(lines(&found, "input")[0], "iifname \"lo\" accept comment \"spokeguard:lo\"");
        assert_eq!(
            lines(&found, "mesh")[0],
            "meta l4proto tcp ct state new ct original proto-dst { 80, 443 } counter accept"
        );
        let forward = table.chains.iter().find(|c| c.name == "forward").and_then(|c| c.base.clone());
        let forward = forward.expect("a base chain");
        assert_eq!((forward.hook, forward.priority, forward.drops), (Hook::Forward, -10, true));
    }

    #[test]
    fn nothing_of_a_listing_is_skipped() {
        let json = include_str!("captures/zoo.json");
        let value: Value = serde_json::from_str(json).expect("JSON");
        let listed = value["nftables"].as_array().expect("a list");
        let statements: usize =
            listed.iter().filter_map(|o| o["rule"]["expr"].as_array()).map(Vec::len).sum();
        let found = capture(json);
        let rules = found.tables.iter().flat_map(|t| &t.chains).flat_map(|c| &c.rules);
        let of_one_family = |o: &&Value| {
            let rejects = o["rule"]["expr"].to_string().contains(r#"{"reject":{"expr":"#);
            rejects && o["rule"]["family"] == "inet" && !o.to_string().contains("icmpx")
        };
        let implied = listed.iter().filter(of_one_family).count();
        // What looks something up may end its rule; a `dnat ip to` of those is for IPv4.
        let expressions = listed.iter().filter_map(|o| o["rule"]["expr"].as_array()).flatten();
        let lookups = expressions.filter(|e| looks_up(e) && matches!(statement(e), Statement::Neutral(_)));
        let lookups =
            lookups.count() + 2 * json.matches(r#"{"dnat": {"family": "ip", "addr": {"map""#).count();
        assert_eq!(lookups, 6);
        // The table with unreadable flags has one chain, which got a rule of our own.
        assert_eq!(rules.map(|r| r.statements.len()).sum::<usize>(), statements + 2 + implied + lookups);
        assert_eq!(implied, 2, "rejects that bring a match of their own");
        assert!(statements > 200, "{statements}");
    }

    #[test]
    fn what_may_decide_and_is_not_understood_is_never_neutral() {
        for (json, kind) in [
            (r#"{"queue": {"num": 1}}"#, "Unknown"),
            (r#"{"tproxy": {"port": 80}}"#, "Unknown"),
            (r#"{"synproxy": {"mss": 1460}}"#, "Unknown"),
            (r#"{"from the future": {}}"#, "Unknown"),
            (
                r#"{"mangle": {"key": {"payload": {"protocol": "tcp", "field": "dport"}}, "value": 22}}"#,
                "Unknown",
            ),
            (r#"{"xt": {"type": "target", "name": "NFQUEUE"}}"#, "Unknown"),
            (r#"{"xt": null}"#, "Unknown"),
            (r#"{"xt": {"type": "match", "name": "conntrack"}}"#, "Maybe"),
            (r#"{"limit": {"rate": 5, "per": "second"}}"#, "Maybe"),
            (r#"{"set": {"op": "update", "elem": 1, "set": "@s", "stmt": [{"limit": {}}]}}"#, "Maybe"),
            (r#"{"mangle": {"key": {"meta": {"key": "mark"}}, "value": 1}}"#, "Neutral"),
            (r#"{"last": null}"#, "Neutral"),
            (r#"{"secmark": "x"}"#, "Neutral"),
            (r#"{"xt": {"type": "target", "name": "MASQUERADE"}}"#, "Neutral"),
            (r#"{"xt": {"type": "target", "name": "REJECT"}}"#, "Reject"),
            (r#"{"xt": {"type": "target", "name": "DNAT"}}"#, "Dnat"),
            (r#"{"match": {"op": "~", "left": 1, "right": 1}}"#, "Unknown"),
            (r#"{"match": {"op": "==", "left": {"osf": {"key": "name"}}, "right": "Linux"}}"#, "Match"),
        ] {
            let debug = format!("{:?}", one(json));
            assert!(debug.starts_with(kind), "{json} is {debug}");
        }
        let Statement::Match(m) = one(r#"{"match": {"left": {"osf": {}}, "op": "==", "right": 1}}"#) else {
            panic!("a match")
        };
        assert!(matches!(m.left, Term::Unknown(_)));
    }

    #[test]
    fn ports_that_nft_can_not_type_are_read() {
        assert_eq!(word("0x1bb [invalid type]"), Operand::Number(443));
        assert_eq!(word("0xzz"), Operand::Text("0xzz".into()));
    }

    #[test]
    fn a_long_set_is_cut_and_says_so() {
        let many: Vec<String> = (0..SET_ELEMENTS_MAX + 1).map(|n| n.to_string()).collect();
        let listing = |elements: &[String]| {
            let list = elements.join(",");
            format!(
                r#"{{"nftables": [{{"set": {{"family": "inet", "table": "t", "name": "s", "type": "mark", "elem": [{list}]}}}}]}}"#
            )
        };
        let long = capture(&listing(&many));
        assert!(long.tables[0].sets[0].truncated);
        assert_eq!(long.tables[0].sets[0].elements.len(), SET_ELEMENTS_MAX);
        let fits = capture(&listing(&many[1..]));
        assert!(!fits.tables[0].sets[0].truncated);
    }

    #[test]
    fn too_many_rules_are_an_error_and_not_a_shorter_list() {
        let rule = r#"{"rule":{"family":"ip","table":"t","chain":"c","expr":[]}}"#;
        let listing = |n: usize| format!(r#"{{"nftables":[{}]}}"#, vec![rule; n].join(","));
        let full = capture(&listing(OBJECTS_MAX));
        assert_eq!(full.tables[0].chains[0].rules.len(), OBJECTS_MAX);
        let over = ruleset(listing(OBJECTS_MAX + 1).as_bytes());
        assert!(matches!(over, Err(DecodeError::TooMany("rules"))), "{over:?}");
    }

    #[test]
    fn a_listing_that_is_cut_off_or_something_else_is_an_error() {
        let whole = include_str!("captures/nixos-fw.json");
        assert!(ruleset(whole.as_bytes()).is_ok());
        for bad in [&whole[..whole.len() / 2], &whole[..whole.trim_end().len() - 1], "", "{}", "[]", "null"] {
            assert!(matches!(ruleset(bad.as_bytes()), Err(DecodeError::Json(_))), "{bad:.40} was taken");
        }
    }

    #[test]
    fn flags_of_a_table_that_can_not_be_read_are_not_taken_for_none() {
        let listing = |flags: &str| {
            format!(
                r#"{{"nftables":[{{"table":{{"family":"inet","name":"t"{flags}}}}},
                {{"chain":{{"family":"inet","table":"t","name":"c","type":"filter","hook":"input","prio":0,"policy":"drop"}}}}]}}"#
            )
        };
        let table = |flags: &str| {
            let mut found = capture(&listing(flags));
            let table = found.tables.remove(0);
            (table.dormant, table.chains[0].rules.len())
        };
        assert_eq!(table(""), (false, 0));
        assert_eq!(table(r#","flags":"dormant""#), (true, 0));
        assert_eq!(table(r#","flags":["owner","persist"]"#), (false, 0));
        assert_eq!(table(r#","flags":["owner","dormant"]"#), (true, 0));
        assert_eq!(table(r#","flags":"another-table""#), (true, 1));
    }

    #[test]
    fn a_limit_by_name_is_the_limit_that_has_the_name_in_that_table() {
        let limit = |table: &str, rate: u32| {
            format!(
                r#"{{"limit":{{"family":"inet","table":"{table}","name":"slow","handle":3,"rate":{rate},"per":"second"}}}}"#
            )
        };
        let rule = |table: &str, name: &str| {
            format!(
                r#"{{"rule":{{"family":"inet","table":"{table}","chain":"c","expr":[{{"limit":"{name}"}}]}}}}"#
            )
        };
        let all = [limit("a", 7), limit("b", 9), rule("a", "slow"), rule("b", "slow"), rule("b", "other")];
        let read = ruleset(format!(r#"{{"nftables":[{}]}}"#, all.join(",")).as_bytes()).unwrap();
        let said = |table: usize| -> Vec<String> {
            let rules = read.tables[table].chains[0].rules.iter();
            rules.map(|rule| format!("{:?}", rule.statements)).collect()
        };
        assert!(said(0)[0].contains(r#"\"rate\":7"#), "{:?}", said(0));
        assert!(said(1)[0].contains(r#"\"rate\":9"#) && said(1)[1].contains("other"), "{:?}", said(1));
    }
}
