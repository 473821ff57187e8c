//! A table into the JSON that `nft -j -f -` takes, through the schema types of the
//! `nftables` crate. nft runs a document as one transaction: all of it or nothing.
//!
//! Only our own table is ever named. It is flushed and filled again, never deleted: that
//! keeps its named counters. What the crate's types can't say is written so that nft
//! refuses the whole document, rather than left out.

use std::borrow::Cow;

use nftables::expr::{self, Expression, NamedExpression};
use nftables::schema::{self, FlushObject, NfCmd, NfListObject, NfObject, Nftables};
use nftables::stmt;
use nftables::types::{NfChainPolicy, NfChainType, NfFamily, NfHook};
use serde_json::Value;

use super::compare::same_set;
use super::glass::{self, Opening};
use super::{
    Base, Chain, Hook, Match, NamedSet, Nat, Op, Operand, Rule, Statement, Table, TableFamily, Term,
    VerdictMap,
};

/// The document that brings the kernel from `found` to `desired`.
///
/// The kernel takes no new base chain in the transaction that wakes a dormant table. Then
/// this only wakes, flushes and clears it, and the next round, which finds it awake, does
/// the rest: whoever applies reads back and applies again while there are changes.
///
/// The kernel refuses all of it where a rule of `found` is gone by then: taken out, replaced by
/// another, or with the table that held it. Rules that came in meanwhile go with the others.
pub fn transaction(desired: &Table, found: Option<&Table>) -> String {
    let family = family(desired.family);
    let name = || Cow::Owned(desired.name.clone());
    let table = || schema::Table { family, name: name(), handle: None };
    let chain_named = |chain: &str| schema::Chain {
        family,
        table: name(),
        name: Cow::Owned(chain.to_owned()),
        ..schema::Chain::default()
    };
    let mut out = vec![add(NfListObject::Table(table()))];
    let existing = found.map_or(&[][..], |t| &t.chains);
    for chain in existing {
        let handles = chain.rules.iter().filter_map(|rule| u32::try_from(rule.handle?).ok());
        out.extend(handles.map(|handle| {
            let rule = self::rule(&Rule::default(), chain, desired);
            command(NfCmd::Delete(NfListObject::Rule(schema::Rule { handle: Some(handle), ..rule })))
        }));
    }
    out.push(command(NfCmd::Flush(FlushObject::Table(table()))));
    // Whatever is not ours goes, after the rules that used it: maps before the chains that
    // their elements may jump to.
    for set in found.map_or(&[][..], |t| &t.sets) {
        if desired.sets.iter().any(|d| same_set(d, set)) {
            continue;
        }
        let gone = if set.map {
            NfListObject::Map(Box::new(schema::Map {
                family,
                table: name(),
                name: Cow::Owned(set.name.clone()),
                ..schema::Map::default()
            }))
        } else {
            NfListObject::Set(Box::new(named_set(set, family, &desired.name, false)))
        };
        out.push(command(NfCmd::Delete(gone)));
    }
    // What is in the sets that stay goes on counting down: openings are neither lost nor
    // lengthened by putting the rules around them in place again.
    for (set, key) in found.into_iter().flat_map(glass::foreign) {
        if desired.sets.iter().any(|d| same_set(d, set)) {
            out.push(command(NfCmd::Delete(elements(desired, &set.name, vec![operand(key)]))));
        }
    }
    for chain in existing {
        let stays = desired.chains.iter().any(|d| d.name == chain.name && same_hook(d, chain));
        if !stays {
            out.push(command(NfCmd::Delete(NfListObject::Chain(chain_named(&chain.name)))));
        }
    }
    for counter in found.into_iter().flat_map(|t| t.counters.keys()) {
        if !desired.counters.contains_key(counter) {
            out.push(command(NfCmd::Delete(NfListObject::Counter(named_counter(counter, desired)))));
        }
    }
    let new_base = desired
        .chains
        .iter()
        .any(|d| d.base.is_some() && !existing.iter().any(|c| c.name == d.name && same_hook(d, c)));
    if found.is_some_and(|t| t.dormant) && new_base {
        return document(out);
    }
    for counter in desired.counters.keys() {
        out.push(add(NfListObject::Counter(named_counter(counter, desired))));
    }
    for set in &desired.sets {
        let mut object = named_set(set, family, &desired.name, true);
        // What is in it already is not sent again.
        if !found.is_some_and(|found| found.sets.iter().any(|there| same_set(set, there))) {
            let elements = (!set.elements.is_empty()).then(|| set.elements.iter().map(operand).collect());
            object.elem = elements;
        }
        out.push(add(NfListObject::Set(Box::new(object))));
    }
    // All chains come before the first rule, which may jump to any of them.
    for chain in &desired.chains {
        let mut object = chain_named(&chain.name);
        if let Some(base) = &chain.base {
            let Base { kind, hook, priority, drops, devices } = base;
            object._type = Some(match kind.as_str() {
                "nat" => NfChainType::NAT,
                "route" => NfChainType::Route,
                _ => NfChainType::Filter,
            });
            object.hook = Some(self::hook(*hook));
            object.prio = Some(*priority);
            object.policy = Some(if *drops { NfChainPolicy::Drop } else { NfChainPolicy::Accept });
            // The schema has room for one; nft refuses a name with a comma in it.
            object.dev = (!devices.is_empty()).then(|| Cow::Owned(devices.join(",")));
        }
        out.push(add(NfListObject::Chain(object)));
    }
    for chain in &desired.chains {
        for rule in &chain.rules {
            out.push(add(NfListObject::Rule(self::rule(rule, chain, desired))));
        }
    }
    document(out)
}

/// The document that opens these holes for as long as they last. One that is open already
/// is opened anew: `replace` names those.
pub fn open(table: &Table, openings: &[Opening], replace: &[Opening]) -> String {
    let mut out = closing(table, replace);
    for opening in openings {
        let (set, key) = opening.element();
        let element = Expression::Named(NamedExpression::Elem(expr::Elem {
            val: Box::new(self::operand(&key)),
            timeout: Some(opening.lasts_s),
            expires: None,
            comment: Some(Cow::Owned(opening.comment())),
            counter: None,
        }));
        out.push(add(elements(table, &set, vec![element])));
    }
    document(out)
}

/// The document that closes these.
pub fn close(table: &Table, openings: &[Opening]) -> String {
    document(closing(table, openings))
}

fn closing<'a>(table: &Table, openings: &[Opening]) -> Vec<NfObject<'a>> {
    let each = openings.iter().map(|opening| {
        let (set, key) = opening.element();
        command(NfCmd::Delete(elements(table, &set, vec![operand(&key)])))
    });
    each.collect()
}

fn elements<'a>(table: &Table, set: &str, elem: Vec<Expression<'a>>) -> NfListObject<'a> {
    NfListObject::Element(schema::Element {
        family: family(table.family),
        table: Cow::Owned(table.name.clone()),
        name: Cow::Owned(set.to_owned()),
        elem: Cow::Owned(elem),
    })
}

/// The document that takes our table away, whatever is in it. It is added first, because
/// deleting a table that is not there fails the transaction.
pub fn delete(table: &Table) -> String {
    let object =
        || schema::Table { family: family(table.family), name: Cow::Owned(table.name.clone()), handle: None };
    document(vec![add(NfListObject::Table(object())), command(NfCmd::Delete(NfListObject::Table(object())))])
}

/// Whether a chain can stay as it is; only its policy can change in place.
fn same_hook(a: &Chain, b: &Chain) -> bool {
    match (&a.base, &b.base) {
        (None, None) => true,
        (Some(a), Some(b)) => {
            (&a.kind, a.hook, a.priority, &a.devices) == (&b.kind, b.hook, b.priority, &b.devices)
        }
        _ => false,
    }
}

fn document(objects: Vec<NfObject<'_>>) -> String {
    // The types hold strings, integers and lists only, which always serialise.
    serde_json::to_string(&Nftables { objects: Cow::Owned(objects) }).unwrap_or_default()
}

fn command(command: NfCmd<'_>) -> NfObject<'_> {
    NfObject::CmdObject(command)
}

fn add(object: NfListObject<'_>) -> NfObject<'_> {
    command(NfCmd::Add(object))
}

fn family(family: TableFamily) -> NfFamily {
    match family {
        TableFamily::Inet => NfFamily::INet,
        TableFamily::Ip => NfFamily::IP,
        TableFamily::Ip6 => NfFamily::IP6,
        TableFamily::Arp => NfFamily::ARP,
        TableFamily::Bridge => NfFamily::Bridge,
        TableFamily::Netdev => NfFamily::NetDev,
    }
}

fn hook(hook: Hook) -> NfHook {
    match hook {
        Hook::Ingress => NfHook::Ingress,
        Hook::Prerouting => NfHook::Prerouting,
        Hook::Input => NfHook::Input,
        Hook::Forward => NfHook::Forward,
        Hook::Output => NfHook::Output,
        Hook::Postrouting => NfHook::Postrouting,
        Hook::Egress => NfHook::Egress,
    }
}

/// Amounts stay out of it: a counter that exists keeps what it counted.
fn named_counter<'a>(counter: &str, table: &Table) -> schema::Counter<'a> {
    schema::Counter {
        family: family(table.family),
        table: Cow::Owned(table.name.clone()),
        name: Cow::Owned(counter.to_owned()),
        handle: None,
        packets: None,
        bytes: None,
    }
}

fn named_set<'a>(set: &NamedSet, family: NfFamily, table: &str, whole: bool) -> schema::Set<'a> {
    let strings = |values: Vec<String>| Value::Array(values.into_iter().map(Value::String).collect());
    let mut kind: Vec<String> = set.kind.split(" . ").map(str::to_owned).collect();
    let kind = if kind.len() == 1 { Value::String(kind.remove(0)) } else { strings(kind) };
    let default = schema::Set::default();
    schema::Set {
        family,
        table: Cow::Owned(table.to_owned()),
        name: Cow::Owned(set.name.clone()),
        set_type: serde_json::from_value(kind).unwrap_or(default.set_type),
        flags: serde_json::from_value(strings(set.flags.clone()))
            .ok()
            .filter(|f: &std::collections::HashSet<_>| whole && !f.is_empty()),
        ..schema::Set::default()
    }
}

fn rule<'a>(rule: &Rule, chain: &Chain, table: &Table) -> schema::Rule<'a> {
    schema::Rule {
        family: family(table.family),
        table: Cow::Owned(table.name.clone()),
        chain: Cow::Owned(chain.name.clone()),
        expr: rule.statements.iter().map(statement).collect(),
        handle: None,
        index: None,
        comment: rule.comment.clone().map(Cow::Owned),
    }
}

fn statement<'a>(statement: &Statement) -> stmt::Statement<'a> {
    let target = |chain: &String| stmt::JumpTarget { target: Cow::Owned(chain.clone()) };
    match statement {
        Statement::Match(m) => stmt::Statement::Match(comparison(m)),
        // Only rules of others have it, and those are not written.
        Statement::Either(_) => stmt::Statement::XT(None),
        Statement::CounterRef(name) => {
            stmt::Statement::Counter(stmt::Counter::Named(Cow::Owned(name.clone())))
        }
        Statement::Counter(_) => stmt::Statement::Counter(stmt::Counter::Anonymous(None)),
        Statement::Accept => stmt::Statement::Accept(None),
        Statement::Drop => stmt::Statement::Drop(None),
        Statement::Return => stmt::Statement::Return(None),
        Statement::Reject { tcp_reset: true } => stmt::Statement::Reject(Some(stmt::Reject {
            _type: Some(stmt::RejectType::TCPReset),
            expr: None,
        })),
        Statement::Reject { tcp_reset: false } => stmt::Statement::Reject(None),
        Statement::Jump(chain) => stmt::Statement::Jump(target(chain)),
        Statement::Goto(chain) => stmt::Statement::Goto(target(chain)),
        Statement::Dnat(Nat { address, port }) => stmt::Statement::DNAT(Some(stmt::NAT {
            addr: address.as_ref().map(operand),
            family: address.as_ref().map(|address| match address {
                Operand::Address(a) if a.is_ipv6() => stmt::NATFamily::IP6,
                _ => stmt::NATFamily::IP,
            }),
            port: port.as_ref().map(operand),
            flags: None,
        })),
        Statement::Redirect { port } => stmt::Statement::Redirect(port.as_ref().map(|port| stmt::NAT {
            addr: None,
            family: None,
            port: Some(operand(port)),
            flags: None,
        })),
        Statement::Vmap { key, map } => stmt::Statement::VerdictMap(stmt::VerdictMap {
            key: term(key),
            data: match map {
                VerdictMap::Named(name) => Expression::String(Cow::Owned(format!("@{name}"))),
                VerdictMap::Pairs(pairs) => Expression::Named(NamedExpression::Set(
                    pairs
                        .iter()
                        .map(|(k, v)| expr::SetItem::MappingStatement(operand(k), self::statement(v)))
                        .collect(),
                )),
            },
        }),
        Statement::Neutral(json) | Statement::Maybe(json) | Statement::Unknown(json) => {
            // `xt` takes any value, and nft takes no `xt`.
            serde_json::from_str::<Value>(json)
                .ok()
                .and_then(|value| serde_json::from_value(value).ok())
                .unwrap_or_else(|| stmt::Statement::XT(Some(Value::String(json.clone()))))
        }
    }
}

fn comparison<'a>(m: &Match) -> stmt::Match<'a> {
    let left = term(&m.left);
    let right = match (&m.right, m.op) {
        (Operand::Set(flags) | Operand::Bits(flags), Op::Any | Op::NoneOf) => flag_list(flags),
        (other, _) => operand(other),
    };
    let op = match m.op {
        Op::Eq => stmt::Operator::EQ,
        Op::Ne => stmt::Operator::NEQ,
        Op::Lt => less(),
        Op::Gt => greater(),
        Op::Le => stmt::Operator::LEQ,
        Op::Ge => stmt::Operator::GEQ,
        Op::Any => stmt::Operator::IN,
        Op::NoneOf => {
            // The schema has no `!`; nft lists a mask that must come out 0 as one.
            let masked = Expression::BinaryOperation(Box::new(expr::BinaryOperation::AND(left, right)));
            return stmt::Match { left: masked, right: Expression::Number(0), op: stmt::Operator::EQ };
        }
    };
    stmt::Match { left, right, op }
}

// In the crate's 0.6.3 the names of these two are exchanged: `LT` serialises as ">". Read
// by the sign, so that a corrected crate does not turn a rule around.
fn less() -> stmt::Operator {
    sign("<", stmt::Operator::GT)
}

fn greater() -> stmt::Operator {
    sign(">", stmt::Operator::LT)
}

fn sign(sign: &str, otherwise: stmt::Operator) -> stmt::Operator {
    serde_json::from_value(Value::String(sign.to_owned())).unwrap_or(otherwise)
}

fn term<'a>(term: &Term) -> Expression<'a> {
    let named = match term {
        Term::Meta(key) => serde_json::from_value(Value::String(key.clone()))
            .ok()
            .map(|key| NamedExpression::Meta(expr::Meta { key })),
        Term::Payload { protocol, field } => {
            Some(NamedExpression::Payload(expr::Payload::PayloadField(expr::PayloadField {
                protocol: Cow::Owned(protocol.clone()),
                field: Cow::Owned(field.clone()),
            })))
        }
        Term::Ct { key, dir } => match dir.as_deref() {
            None => Some(None),
            Some("original") => Some(Some(expr::CTDir::Original)),
            Some("reply") => Some(Some(expr::CTDir::Reply)),
            Some(_) => None,
        }
        .map(|dir| NamedExpression::CT(expr::CT { key: Cow::Owned(key.clone()), family: None, dir })),
        Term::Fib { flags, result } => {
            serde_json::from_value(serde_json::json!({"result": result, "flags": flags}))
                .ok()
                .map(NamedExpression::Fib)
        }
        Term::And { term, mask } => {
            let mask = match mask {
                Operand::Set(flags) | Operand::Bits(flags) => flag_list(flags),
                other => operand(other),
            };
            return Expression::BinaryOperation(Box::new(expr::BinaryOperation::AND(self::term(term), mask)));
        }
        Term::Concat(terms) => Some(NamedExpression::Concat(terms.iter().map(self::term).collect())),
        Term::Unknown(json) => return raw(json),
    };
    // A key that the schema lacks: as a bare word, which nft refuses on this side.
    named.map_or_else(|| Expression::String(Cow::Owned(format!("{term:?}"))), Expression::Named)
}

fn operand<'a>(value: &Operand) -> Expression<'a> {
    match value {
        Operand::Number(n) => match u32::try_from(*n) {
            Ok(n) => Expression::Number(n),
            Err(_) => Expression::String(Cow::Owned(n.to_string())),
        },
        Operand::Text(text) if text == "exists" => Expression::Boolean(true),
        Operand::Text(text) if text == "missing" => Expression::Boolean(false),
        Operand::Text(text) => Expression::String(Cow::Owned(text.clone())),
        Operand::Address(address) => Expression::String(Cow::Owned(address.to_string())),
        Operand::Prefix(net) => Expression::Named(NamedExpression::Prefix(expr::Prefix {
            addr: Box::new(Expression::String(Cow::Owned(net.network().to_string()))),
            len: net.prefix_len().into(),
        })),
        Operand::Range(low, high) => {
            Expression::Range(Box::new(expr::Range { range: [operand(low), operand(high)] }))
        }
        Operand::Set(values) => Expression::Named(NamedExpression::Set(
            values.iter().map(|v| expr::SetItem::Element(operand(v))).collect(),
        )),
        // As a list, nft would read it as a pair where it stands in a set.
        Operand::Bits(flags) => Expression::BinaryOperation(Box::new(expr::BinaryOperation::OR(
            flags.iter().map(operand).collect(),
        ))),
        Operand::Named(name) => Expression::String(Cow::Owned(format!("@{name}"))),
        Operand::Concat(parts) => {
            Expression::Named(NamedExpression::Concat(parts.iter().map(operand).collect()))
        }
        Operand::Unknown(json) => raw(json),
    }
}

fn flag_list<'a>(flags: &[Operand]) -> Expression<'a> {
    match flags {
        [one] => operand(one),
        _ => Expression::List(flags.iter().map(operand).collect()),
    }
}

fn raw<'a>(json: &str) -> Expression<'a> {
    serde_json::from_str::<Value>(json)
        .ok()
        .and_then(|value| serde_json::from_value(value).ok())
        .unwrap_or_else(|| Expression::String(Cow::Owned(json.to_owned())))
}
