//! nftables rule sets as values: our own table, and everybody else's as far as it can be
//! understood. Encodes to and decodes from nft's JSON, renders nft's text, compares two
//! tables and evaluates what a packet meets. Reads and writes nothing.
//!
//! What we cannot understand is kept as `Unknown`, and an evaluation that would depend on
//! it answers "unknown": a rule is never skipped as if it were not there.

pub mod alike;
pub mod compare;
pub mod decode;
pub mod encode;
pub mod evaluate;
pub mod glass;
pub mod lists;
pub mod normal;
pub mod render;
pub mod unlisted;
pub mod xt;

#[cfg(test)]
mod live;

pub use compare::{changes, plan_text};
pub use decode::DecodeError;
pub use evaluate::{Evaluator, Host, judge, published};

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::IpNet;

use crate::observed::Amount;
use crate::terms::{Family, Port, Proto};

/// Every table that one listing showed, in the order of the listing.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Ruleset {
    pub tables: Vec<Table>,
}

impl Ruleset {
    pub fn table(&self, family: TableFamily, name: &str) -> Option<&Table> {
        self.tables.iter().find(|t| t.family == family && t.name == name)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum TableFamily {
    Inet,
    Ip,
    Ip6,
    Arp,
    Bridge,
    Netdev,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Table {
    pub family: TableFamily,
    pub name: String,
    /// `flags dormant`: its chains see no packets. Also true where the flags could not be
    /// read, which `decode` then marks in the chains for `evaluate`.
    pub dormant: bool,
    pub chains: Vec<Chain>,
    /// Named counters with what they counted. In a desired table the amounts are 0 and
    /// are not compared.
    pub counters: BTreeMap<String, Amount>,
    pub sets: Vec<NamedSet>,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Chain {
    pub name: String,
    /// `None`: a regular chain, entered by jumps only.
    pub base: Option<Base>,
    pub rules: Vec<Rule>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Base {
    pub kind: String,
    pub hook: Hook,
    pub priority: i32,
    /// `true`: policy drop.
    pub drops: bool,
    /// Devices of a netdev or ingress chain.
    pub devices: Vec<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Hook {
    Ingress,
    Prerouting,
    Input,
    Forward,
    Output,
    Postrouting,
    Egress,
}

#[derive(Clone, Debug, Default, PartialEq)]
pub struct Rule {
    /// Ours carry `spokeguard:<rule-id>`.
    pub comment: Option<String>,
    /// The kernel's number for it; `None` in a desired rule, and never compared.
    pub handle: Option<u64>,
    pub statements: Vec<Statement>,
}

#[derive(Clone, Debug, PartialEq)]
pub enum Statement {
    Match(Match),
    /// Holds if one of these does, and never if there is none: some matches of xtables.
    Either(Vec<Match>),
    /// `counter name "x"`.
    CounterRef(String),
    /// An anonymous counter; the amounts are never compared.
    Counter(Amount),
    Accept,
    Drop,
    /// A `reject`, of whatever type; for TCP reset the flag is set.
    Reject {
        tcp_reset: bool,
    },
    Jump(String),
    Goto(String),
    Return,
    Dnat(Nat),
    Redirect {
        port: Option<Operand>,
    },
    /// Statements that never decide a packet's fate: log, mark, comment, snat, masquerade,
    /// notrack, set updates ... kept as their JSON.
    Neutral(String),
    /// `KEY vmap { value : verdict, ... }`, or `vmap @name`.
    Vmap {
        key: Term,
        map: VerdictMap,
    },
    /// A statement that lets the packet go on in this rule or not, and never decides by
    /// itself: limit, quota, ct count, meter, matches of xtables ... kept as its JSON.
    Maybe(String),
    /// A statement that may decide, and that we cannot evaluate: queue, tproxy, fwd,
    /// synproxy, targets of xtables ... kept as its JSON.
    Unknown(String),
}

#[derive(Clone, Debug, PartialEq)]
pub enum VerdictMap {
    /// Pairs of a key and Accept, Drop, Jump, Goto, Return or Neutral (`continue`).
    Pairs(Vec<(Operand, Statement)>),
    /// `@name`: a [`NamedSet`] with `verdicts`.
    Named(String),
}

/// The target of a DNAT. `Operand::Unknown` where it rewrites to something that we can't
/// tell: a map, or a target of xtables.
#[derive(Clone, Debug, PartialEq)]
pub struct Nat {
    pub address: Option<Operand>,
    pub port: Option<Operand>,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Match {
    pub left: Term,
    pub op: Op,
    pub right: Operand,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// `==`, or membership where the right side is a set, a range or a prefix. nft's `in`
    /// (for flags: any of these bits) decodes to `Any`.
    Eq,
    Ne,
    Lt,
    Gt,
    Le,
    Ge,
    Any,
    /// None of these bits; nft's `!`.
    NoneOf,
}

/// The left side of a match.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Term {
    /// `meta KEY`: "iifname", "oifname", "iif", "l4proto", "nfproto", "iiftype", "pkttype", "mark" ...
    Meta(String),
    /// `PROTOCOL FIELD`: ("tcp", "dport"), ("ip", "saddr"), ("icmpv6", "type"), ("th", "dport") ...
    Payload { protocol: String, field: String },
    /// `ct [original|reply] KEY`: "state", "status", "proto-dst", "ip daddr", "ip6 saddr" ...
    Ct { key: String, dir: Option<String> },
    /// `fib KEYS RESULT`: (["daddr"], "type").
    Fib { flags: Vec<String>, result: String },
    /// `TERM & MASK`.
    And { term: Box<Term>, mask: Operand },
    /// `TERM . TERM`.
    Concat(Vec<Term>),
    /// Anything else, as its JSON.
    Unknown(String),
}

/// A value on the right side of a match.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Operand {
    Number(u64),
    /// Names: interface names (also `docker*`), states ("established"), ICMP types, protocols;
    /// "exists" and "missing" where nft's JSON has true and false.
    Text(String),
    Address(IpAddr),
    Prefix(IpNet),
    Range(Box<Operand>, Box<Operand>),
    /// An anonymous set `{ ... }`, or with `Any` and `NoneOf` a list of flags. Sorted and
    /// without duplicates where we make or decode it, so that order never counts as a
    /// difference.
    Set(Vec<Operand>),
    /// Flags joined with `|`: a mask, or the exact value of a masked field.
    Bits(Vec<Operand>),
    /// `@name`.
    Named(String),
    /// `VALUE . VALUE`.
    Concat(Vec<Operand>),
    /// Anything else, as its JSON.
    Unknown(String),
}

#[derive(Clone, Debug, PartialEq)]
pub struct NamedSet {
    pub name: String,
    /// The type as nft prints it: "ipv4_addr", "inet_service" ...
    pub kind: String,
    pub map: bool,
    /// Flags as nft prints them: "interval", "timeout", "dynamic" ...
    pub flags: Vec<String>,
    /// Elements, or keys of a map.
    pub elements: Vec<Operand>,
    /// What the listing says of each of `elements`, in a set with the flag "timeout". Else empty.
    pub timed: Vec<Timed>,
    /// For a map to verdicts: one for each of `elements`. Else empty.
    pub verdicts: Vec<Statement>,
    /// The listing was cut at our bound: membership of what is not listed is unknown.
    pub truncated: bool,
}

impl NamedSet {
    /// Whether its elements may end by themselves.
    pub fn is_timed(&self) -> bool {
        self.flags.iter().any(|flag| flag == "timeout")
    }
}

/// How long an element lives. 0 and 0: for ever.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Timed {
    pub timeout_s: u32,
    /// What is left.
    pub expires_s: u32,
    pub comment: Option<String>,
}

/// A packet as it would come off the wire: the first of a new flow.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packet {
    pub iifname: String,
    pub source: IpAddr,
    pub destination: IpAddr,
    pub proto: Proto,
    pub source_port: Port,
    pub port: Port,
}

impl Packet {
    pub fn family(&self) -> Family {
        Family::of(self.destination)
    }
}

/// What becomes of a packet after every table has had its say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Judgement {
    pub verdict: Verdict,
    /// The rule or chain policy that decided (for `Accept`: nothing did, so `None`).
    pub by: Option<Place>,
    /// Where the packet goes if a DNAT or redirect rewrote it before, or may have.
    pub rewritten: Option<Rewritten>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Reaches a socket of this host, or is forwarded where `rewritten` says so.
    Accept,
    Drop,
    Reject,
    /// Depends on something that we do not understand; the text says what.
    Unknown(String),
}

/// A place in a rule set.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Place {
    pub family: TableFamily,
    pub table: String,
    pub chain: String,
    /// Handle of the rule; `None` for the chain's policy.
    pub handle: Option<u64>,
    pub comment: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rewritten {
    /// `None` for redirect, which goes to this host itself, and where rules leave it open.
    pub address: Option<IpAddr>,
    pub port: Option<Port>,
    pub by: Place,
}

/// A DNAT or redirect rule that some table holds: a port that is published.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Published {
    pub place: Place,
    pub proto: Proto,
    /// The ports outsiders use, inclusive.
    pub first: Port,
    pub last: Port,
    /// `None`: both families.
    pub family: Option<Family>,
    /// The destination address the rule asks for, if it names one.
    pub address: Option<IpNet>,
    /// Interfaces the rule asks for, if it names any.
    pub iifname: Option<String>,
    /// Target as text, for people: "172.17.0.2:5432".
    pub target: String,
}

/// One difference between the table that should be and the table that is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    TableMissing,
    ChainMissing {
        chain: String,
    },
    /// A chain of ours whose hook, priority or policy is not as desired; text of both.
    ChainDiffers {
        chain: String,
        wanted: String,
        found: String,
    },
    ChainForeign {
        chain: String,
    },
    RuleMissing {
        chain: String,
        wanted: String,
    },
    RuleForeign {
        chain: String,
        found: String,
        handle: Option<u64>,
    },
    /// All rules are there, in another order.
    RuleOrder {
        chain: String,
    },
    CounterMissing {
        name: String,
    },
    /// A set of ours is not there, or is of another type.
    SetMissing {
        name: String,
    },
    /// An element that is no opening of ours; text of it.
    ElementForeign {
        set: String,
        found: String,
    },
    Dormant,
}
