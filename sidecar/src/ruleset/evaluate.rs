//! What the first packet of a new flow meets, from the wire to a socket or out again.
//!
//! A rule that we can't evaluate may match or not. Both ways are followed, and only when
//! they end differently is the verdict unknown. Rules are walked once with "the packet
//! surely / maybe gets here", so that doubt costs no time.
//!
//! Taken for granted, because they hold for what an outsider sends in earnest: the packet
//! passes reverse-path filters (`fib saddr . iif oif` finds a route), carries no options,
//! fragments or extension headers that matter, has no mark before a rule sets one (tc
//! programs could), and is a plain SYN where it is TCP.
//!
//! nft lists rules without some of what they ask for; `unlisted` puts that back before a rule gets here.

use std::cell::{Cell, OnceCell, RefCell};
use std::collections::{BTreeSet, HashMap, HashSet};
use std::net::IpAddr;
use std::rc::Rc;

use ipnet::IpNet;
use serde_json::Value;

use super::decode::unclear_flags;
use super::{
    Base, Chain, Hook, Judgement, Match, NamedSet, Nat, Op, Operand, Packet, Place, Published, Rewritten,
    Rule, Ruleset, Statement, Table, TableFamily, Term, Verdict, VerdictMap, normal, render, xt,
};
use crate::terms::{Family, Port, Proto};

/// The kernel refuses deeper jumps.
const DEPTH_MAX: usize = 16;
/// Rules looked at for one packet (an element of a set counts as a part of one). Chains
/// that jump to each other many times could make it astronomic; beyond this the answer is
/// "unknown".
const STEPS_MAX: usize = 400_000;
/// Ways that the NAT chains may have left the packet.
const WAYS_MAX: usize = 16;
/// Shorter chains are read whole.
const SIEVE_FROM: usize = 8;
/// A rule for more ports than this is looked at for each of them.
const PORTS_MAX: usize = 64;
const PRIORITY_CONNTRACK: i32 = -200;
/// All NAT chains of a hook run together here, whatever their own priorities, which only
/// order them among themselves.
const PRIORITY_DSTNAT: i32 = -100;

/// What rules ask of a host and do not hold themselves.
pub trait Host {
    /// Whether this is an address of the host.
    fn is_local(&self, address: IpAddr) -> bool;

    /// The interface by which packets to this address leave; `None` where that is not sure.
    fn way_out(&self, address: IpAddr) -> Option<&str>;
}

/// A host of which only the addresses are known.
impl<F: Fn(IpAddr) -> bool> Host for F {
    fn is_local(&self, address: IpAddr) -> bool {
        self(address)
    }

    fn way_out(&self, _: IpAddr) -> Option<&str> {
        None
    }
}

/// The verdict over all tables, for one packet. For many, an [`Evaluator`] is much quicker.
pub fn judge(ruleset: &Ruleset, packet: &Packet, host: &dyn Host) -> Judgement {
    Evaluator::new(ruleset).judge(packet, host)
}

/// A rule set made ready for many packets.
pub struct Evaluator<'a> {
    tables: Vec<Index<'a>>,
    /// Whether a rule turns connection tracking on, for IPv4 and for IPv6. Without it NAT
    /// chains see no packets; something outside nftables may have turned it on as well.
    tracking: [bool; 2],
    /// Base chains in the order in which packets meet them.
    hooks: HashMap<(Hook, Family), Vec<BaseChain<'a>>>,
    /// Rules that packets of one kind can match at all.
    kinds: RefCell<HashMap<Kind, Rc<Candidates>>>,
}

/// Kinds of packets that are remembered: links, strangers and protocols make some dozen.
const KINDS_MAX: usize = 64;

impl<'a> Evaluator<'a> {
    pub fn new(ruleset: &'a Ruleset) -> Self {
        let tables = ruleset.tables.iter().filter(|t| !t.dormant || unclear(t));
        let tables: Vec<Index> = tables.map(Index::new).collect();
        let tracking = Family::ALL.map(|family| ruleset.tables.iter().any(|t| turns_tracking_on(t, family)));
        let mut hooks: HashMap<(Hook, Family), Vec<BaseChain>> = HashMap::new();
        for (table, index) in tables.iter().enumerate() {
            for (chain, base) in
                index.table.chains.iter().enumerate().filter_map(|(n, c)| Some((n, c.base.as_ref()?)))
            {
                for family in Family::ALL.into_iter().filter(|f| sees(index.table.family, base.hook, *f)) {
                    hooks.entry((base.hook, family)).or_default().push(BaseChain { table, chain, base });
                }
            }
        }
        for chains in hooks.values_mut() {
            // Of equals the kernel asks the one first that was made last.
            chains.reverse();
            chains.sort_by_key(|c| c.base.priority);
        }
        Self { tables, tracking, hooks, kinds: RefCell::default() }
    }

    pub fn judge(&self, packet: &Packet, host: &dyn Host) -> Judgement {
        self.walk(packet, host, false).judgement()
    }

    /// The same for a packet that comes alone: a `limit` is not exceeded.
    pub fn judge_alone(&self, packet: &Packet, host: &dyn Host) -> Judgement {
        self.walk(packet, host, true).judgement()
    }

    /// The slowest limit of those that this packet may use up, in packets a second; `None`:
    /// none. Only limits that hold for all sources together and that decide about packets:
    /// one by source concerns nobody else, and one before a `log` costs a line.
    pub fn limited(&self, packet: &Packet, host: &dyn Host) -> Option<f64> {
        self.walk(packet, host, false).slowest
    }

    fn walk<'w>(&'w self, packet: &'w Packet, host: &'w dyn Host, alone: bool) -> Walk<'w> {
        let mut walk = Walk {
            rules: self,
            kind: self.kind(packet),
            packet,
            host,
            steps: Cell::new(0),
            doubt: None,
            overrun: false,
            drop: None,
            reject: None,
            decided: false,
            accepted: false,
            rewritten: vec![],
            alone,
            slowest: None,
        };
        walk.whole_way();
        walk
    }

    fn kind(&self, packet: &Packet) -> Rc<Candidates> {
        let kind = Kind {
            iifname: packet.iifname.clone(),
            source: packet.source,
            source_port: packet.source_port,
            proto: packet.proto,
            family: packet.family(),
        };
        let mut kinds = self.kinds.borrow_mut();
        if kinds.len() >= KINDS_MAX && !kinds.contains_key(&kind) {
            kinds.clear();
        }
        let chains = |index: &Index| index.table.chains.iter().map(|_| OnceCell::new()).collect();
        kinds.entry(kind).or_insert_with(|| Rc::new(self.tables.iter().map(chains).collect())).clone()
    }
}

/// Whether packets of a family meet the chains of a table at a hook.
fn sees(table: TableFamily, hook: Hook, family: Family) -> bool {
    match (table, hook) {
        (TableFamily::Netdev, _) => hook == Hook::Ingress,
        (TableFamily::Inet, _) => true,
        (TableFamily::Ip | TableFamily::Ip6, Hook::Ingress) => false,
        (TableFamily::Ip, _) => family == Family::Ipv4,
        (TableFamily::Ip6, _) => family == Family::Ipv6,
        (TableFamily::Arp | TableFamily::Bridge, _) => false,
    }
}

#[derive(Clone, Copy)]
struct BaseChain<'a> {
    table: usize,
    /// Its number in the table.
    chain: usize,
    base: &'a Base,
}

/// What packets have in common that differ in destination and port only.
#[derive(PartialEq, Eq, Hash)]
struct Kind {
    iifname: String,
    source: IpAddr,
    source_port: Port,
    proto: Proto,
    family: Family,
}

/// By table and chain; made when a packet first gets there.
type Candidates = Vec<Vec<OnceCell<Sieve>>>;

/// The rules of a chain that a kind of packets can match, by their numbers in it.
struct Sieve {
    any_port: Vec<u32>,
    by_port: HashMap<u16, Vec<u32>>,
}

impl Sieve {
    fn rules(&self, port: u16) -> impl Iterator<Item = usize> {
        let (mut any, mut own) =
            (self.any_port.as_slice(), self.by_port.get(&port).map(Vec::as_slice).unwrap_or_default());
        std::iter::from_fn(move || {
            let list = match (any.first(), own.first()) {
                (Some(a), Some(b)) if b < a => &mut own,
                (Some(_), _) => &mut any,
                (None, _) => &mut own,
            };
            let (first, rest) = list.split_first()?;
            *list = rest;
            Some(*first as usize)
        })
    }
}

/// Whether any rule has a limit that [`Evaluator::limited`] tells of.
pub fn has_limits(ruleset: &Ruleset) -> bool {
    let rules = ruleset.tables.iter().flat_map(|t| &t.chains).flat_map(|c| &c.rules);
    rules.into_iter().any(|rule| rule.statements.iter().any(|s| limit_of(rule, s).is_some()))
}

/// Every DNAT and redirect that a packet from outside can reach, with its ports. A rule
/// that does not say which ports it takes, or says it in a way that we don't understand,
/// is listed with all of them.
pub fn published(ruleset: &Ruleset) -> Vec<Published> {
    let mut out = vec![];
    for table in &ruleset.tables {
        if table.dormant && !unclear(table) || family_of(table.family) == Some(None) {
            continue;
        }
        for chain in reachable(table) {
            for rule in &chain.rules {
                publish(table, chain, rule, &mut out);
            }
        }
    }
    out.sort();
    out.dedup();
    out
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Truth {
    Yes,
    No,
    Maybe,
}

use Truth::{Maybe, No, Yes};

impl Truth {
    fn of(b: bool) -> Self {
        if b { Yes } else { No }
    }

    fn and(self, other: Self) -> Self {
        match (self, other) {
            (No, _) | (_, No) => No,
            (Yes, Yes) => Yes,
            _ => Maybe,
        }
    }

    fn or(self, other: Self) -> Self {
        self.not().and(other.not()).not()
    }

    fn not(self) -> Self {
        match self {
            Yes => No,
            No => Yes,
            Maybe => Maybe,
        }
    }
}

/// The packet as it is at one place. `None` is "we can't tell".
#[derive(Clone, PartialEq)]
struct Way {
    destination: Option<IpAddr>,
    /// After a redirect: to some address of this host.
    here: bool,
    port: Option<u16>,
    mark: Option<u64>,
    ct_mark: Option<u64>,
    tracked: Option<bool>,
    dnat: Option<bool>,
    rewritten: Option<Rewritten>,
}

/// Where a chain is hooked, for what its expressions can see.
#[derive(Clone, Copy)]
struct Site {
    hook: Hook,
    /// Whether connection tracking has seen the packet.
    conntrack: Truth,
    netdev: bool,
    nat: bool,
}

/// How the packet may come out of one base chain.
#[derive(Default)]
struct Ends {
    accept: bool,
    drop: Option<Place>,
    reject: Option<Place>,
    /// DNAT verdicts that it may have met.
    rewrites: Vec<(Rewrite, Place)>,
}

struct Rewrite {
    /// `None`: redirect, to this host itself.
    address: Option<Target<IpAddr>>,
    port: Option<Target<u16>>,
}

#[derive(Clone, Copy)]
enum Target<T> {
    Known(T),
    Unclear,
}

/// How a chain was left.
struct Left {
    /// Falls off the end, or returns.
    pass: bool,
    /// Whether it may have ended for good.
    ended: bool,
}

struct Walk<'a> {
    rules: &'a Evaluator<'a>,
    kind: Rc<Candidates>,
    packet: &'a Packet,
    host: &'a dyn Host,
    steps: Cell<usize>,
    /// Why something was not clear; the first reason is the one reported.
    doubt: Option<String>,
    overrun: bool,
    /// What may end it, or does.
    drop: Option<Place>,
    reject: Option<Place>,
    /// Nothing gets past what is named so.
    decided: bool,
    accepted: bool,
    /// What the ways that were walked to their end were rewritten to.
    rewritten: Vec<Option<Rewritten>>,
    /// No limit is exceeded.
    alone: bool,
    /// Packets a second of the slowest limit that was met.
    slowest: Option<f64>,
}

/// A limit for all sources together.
#[derive(Clone, Copy)]
struct Limit {
    per_second: f64,
    /// Matches what exceeds it.
    over: bool,
}

fn ct_count_is_over(value: &Value) -> bool {
    value["ct count"].get("inv").and_then(Value::as_bool).unwrap_or(false)
}

/// `ct status ! dnat`.
fn is_for_unrewritten(rule: &Rule) -> bool {
    rule.statements.iter().any(|statement| match statement {
        Statement::Match(Match {
            left: Term::Ct { key, .. },
            op: Op::NoneOf,
            right: Operand::Text(flag),
        }) => key == "status" && flag == "dnat",
        _ => false,
    })
}

/// The limit in a statement, if the rule then decides anything by it.
fn limit_of(rule: &Rule, statement: &Statement) -> Option<Limit> {
    let Statement::Maybe(json) = statement else { return None };
    let decides = |s: &Statement| {
        !matches!(
            s,
            Statement::Match(_)
                | Statement::Maybe(_)
                | Statement::Neutral(_)
                | Statement::Counter(_)
                | Statement::CounterRef(_)
        )
    };
    if !rule.statements.iter().any(decides) {
        return None;
    }
    let value: Value = serde_json::from_str(json).ok()?;
    if value.get("ct count").is_some() {
        // Probes count as connections for some milliseconds.
        return Some(Limit { per_second: 100.0, over: ct_count_is_over(&value) });
    }
    let body = match (value.get("limit"), value.get("set").or(value.get("meter"))) {
        (Some(limit), _) => limit,
        // A limit for each source, or each port, is not for all together.
        (None, Some(set)) => {
            let key = set.get("elem").or(set.get("key"))?.to_string();
            if key.contains("saddr") || key.contains("dport") {
                return None;
            }
            set.get("stmt")?.as_array().map_or(set.get("stmt"), |all| all.first())?.get("limit")?
        }
        (None, None) => {
            let xt = value.get("xt")?;
            return (xt.get("name")? == "limit").then_some(Limit { per_second: 0.0, over: false });
        }
    };
    let over = body.get("inv").and_then(Value::as_bool).unwrap_or(false);
    let rate = body.get("rate").and_then(Value::as_f64);
    let seconds = match body.get("per").and_then(Value::as_str).unwrap_or("second") {
        "second" => 1.0,
        "minute" => 60.0,
        "hour" => 3600.0,
        "day" => 86_400.0,
        _ => 604_800.0,
    };
    // A probe has so many bytes, or some more.
    const BYTES: f64 = 64.0;
    let packets = match body.get("rate_unit").and_then(Value::as_str) {
        None | Some("packets") => Some(1.0),
        Some("bytes") => Some(1.0 / BYTES),
        Some("kbytes") => Some(1024.0 / BYTES),
        Some("mbytes") => Some(1024.0 * 1024.0 / BYTES),
        Some(_) => None,
    };
    // A named one that this listing doesn't have: as if it were slow.
    let per_second = rate.zip(packets).map_or(0.0, |(rate, packets)| rate * packets / seconds);
    Some(Limit { per_second, over })
}

struct Index<'a> {
    /// Dormant, or maybe so.
    table: &'a Table,
    /// Numbers of chains in the table.
    chains: HashMap<&'a str, usize>,
    sets: HashMap<&'a str, &'a NamedSet>,
    /// Sets that rules add to: what is not in them may be by the time it is looked up.
    written: HashSet<String>,
}

impl<'a> Index<'a> {
    fn new(table: &'a Table) -> Self {
        Self {
            table,
            chains: table.chains.iter().enumerate().map(|(at, c)| (c.name.as_str(), at)).collect(),
            sets: table.sets.iter().map(|s| (s.name.as_str(), s)).collect(),
            written: written_sets(table),
        }
    }
}

impl<'a> Walk<'a> {
    /// Where all ways lead; of several, what they have in common, so that a rule which may have sent it
    /// elsewhere is not forgotten.
    fn landing(&self) -> Option<Rewritten> {
        let first = self.rewritten.iter().flatten().next()?;
        let unchanged = (Some(self.packet.destination), Some(self.packet.port));
        let ends =
            || self.rewritten.iter().map(|new| new.as_ref().map_or(unchanged, |r| (r.address, r.port)));
        Some(Rewritten {
            address: first.address.filter(|_| ends().all(|(address, _)| address == first.address)),
            port: first.port.filter(|_| ends().all(|(_, port)| port == first.port)),
            by: first.by.clone(),
        })
    }

    fn judgement(self) -> Judgement {
        let rewritten = self.landing();
        let doubt = || self.doubt.clone().unwrap_or_else(|| "a rule that can't be evaluated".into());
        let ends = (self.accepted, self.drop.is_some(), self.reject.is_some());
        let (verdict, by) = match ends {
            _ if self.overrun => {
                (Verdict::Unknown("the chains jump to each other too often to follow".into()), None)
            }
            (true, false, false) => (Verdict::Accept, None),
            (false, true, false) => (Verdict::Drop, self.drop),
            (false, false, true) => (Verdict::Reject, self.reject),
            _ => (Verdict::Unknown(doubt()), self.drop.or(self.reject)),
        };
        Judgement { verdict, by, rewritten }
    }

    fn whole_way(&mut self) {
        let start = Way {
            destination: Some(self.packet.destination),
            here: false,
            port: Some(self.packet.port.get()),
            mark: Some(0),
            ct_mark: Some(0),
            tracked: Some(true),
            dnat: Some(false),
            rewritten: None,
        };
        let ingress = self.base_chains(Hook::Ingress);
        let Some(mut way) = self.hook(&ingress, start) else { return };
        let prerouting = self.base_chains(Hook::Prerouting);
        let is_nat = |c: &BaseChain| c.base.kind == "nat";
        let before = |c: &BaseChain| !is_nat(c) && c.base.priority < PRIORITY_DSTNAT;
        let (early, rest): (Vec<_>, Vec<_>) = prerouting.into_iter().partition(before);
        let (nat, late): (Vec<_>, Vec<_>) = rest.into_iter().partition(is_nat);
        way = match self.hook(&early, way) {
            Some(way) => way,
            None => return,
        };
        for way in self.nat(&nat, way) {
            let Some(way) = self.hook(&late, way) else { continue };
            let local = match way.destination {
                _ if way.here => Yes,
                Some(address) => Truth::of(address_is_here(address, self.host)),
                None => {
                    self.doubt("where a DNAT sends the packet");
                    Maybe
                }
            };
            if local != No {
                let chains = self.base_chains(Hook::Input);
                self.last(&chains, way.clone());
            }
            if local != Yes {
                let chains = self.base_chains(Hook::Forward);
                let mut way = way;
                // Sent on although it was for this host: then its destination did change.
                if way.rewritten.is_some() && address_is_here(self.packet.destination, self.host) {
                    way.dnat = Some(true);
                }
                self.last(&chains, way);
            }
        }
    }

    fn last(&mut self, chains: &[BaseChain<'a>], way: Way) {
        self.rewritten.push(way.rewritten.clone());
        if self.hook(chains, way).is_some() {
            self.accepted = true;
        }
    }

    /// The base chains that see this packet at a hook, in the order of their priorities.
    fn base_chains(&self, hook: Hook) -> Vec<BaseChain<'a>> {
        let chains = self.rules.hooks.get(&(hook, self.packet.family())).into_iter().flatten();
        let device =
            |c: &&BaseChain| c.base.devices.is_empty() || c.base.devices.contains(&self.packet.iifname);
        chains.filter(device).copied().collect()
    }

    /// Runs the packet through the chains of a hook. `None`: it surely went no further.
    fn hook(&mut self, chains: &[BaseChain<'a>], mut way: Way) -> Option<Way> {
        for chain in chains {
            let ends = self.base_chain(*chain, &mut way);
            // nft 1.0.6 does not print the device of an ingress chain. It may be another's.
            let elsewhere = chain.base.hook == Hook::Ingress && chain.base.devices.is_empty();
            if elsewhere && (ends.drop.is_some() || ends.reject.is_some()) {
                self.doubt("the device of an ingress chain, which this nft does not print");
            }
            let goes_on = ends.accept || elsewhere;
            if !ends.accept && !self.decided {
                // Whatever may have ended it before, this does, on its device.
                self.decided = true;
                self.drop = ends.drop.or(self.drop.take());
                self.reject = ends.reject.or(self.reject.take());
            } else {
                self.drop = self.drop.take().or(ends.drop);
                self.reject = self.reject.take().or(ends.reject);
            }
            if !goes_on {
                return None;
            }
        }
        Some(way)
    }

    /// The NAT chains of prerouting: the first that rewrites ends them all.
    fn nat(&mut self, chains: &[BaseChain<'a>], way: Way) -> Vec<Way> {
        let mut ways = vec![];
        // NAT does not touch what connection tracking was told to leave alone.
        if way.tracked == Some(false) {
            return vec![way];
        }
        let mut unchanged = Some(way);
        let tracking = self.rules.tracking[usize::from(self.packet.family() == Family::Ipv6)];
        for equals in chains.chunk_by(|a, b| a.base.priority == b.base.priority) {
            let Some(mut way) = unchanged.take() else { break };
            let (mut goes_on, mut deciding) = (true, 0);
            for chain in equals {
                let mut ends = self.base_chain(*chain, &mut way);
                if !tracking {
                    self.doubt("whether anything turned connection tracking on, which NAT chains need");
                    ends.accept = true;
                }
                deciding +=
                    usize::from(ends.drop.is_some() || ends.reject.is_some() || !ends.rewrites.is_empty());
                for (rewrite, place) in ends.rewrites {
                    ways.push(self.rewrite(&way, rewrite, place));
                }
                self.drop = self.drop.take().or(ends.drop);
                self.reject = self.reject.take().or(ends.reject);
                goes_on &= ends.accept;
            }
            // The one that was made last comes first, which no listing tells for sure.
            if deciding > 1 {
                self.doubt("which of two NAT chains of one priority comes first");
            }
            if goes_on {
                unchanged = Some(way);
            }
        }
        if let Some(mut way) = unchanged {
            if way.tracked.is_none() && !ways.is_empty() {
                way.dnat = None;
            }
            ways.push(way);
        }
        if ways.len() > WAYS_MAX {
            self.overrun = true;
            ways.truncate(WAYS_MAX);
        }
        ways
    }

    fn rewrite(&self, way: &Way, rewrite: Rewrite, place: Place) -> Way {
        let here = rewrite.address.is_none();
        let address = match rewrite.address {
            Some(Target::Known(address)) => Some(address),
            // A redirect goes to an address of the interface that the packet came in by.
            Some(Target::Unclear) | None => None,
        };
        let port = match rewrite.port {
            Some(Target::Known(port)) => Some(port),
            Some(Target::Unclear) => None,
            None => way.port,
        };
        // The kernel sets the status bit only where the address or the port changes.
        let same_address = address.map(|a| Some(a) == way.destination);
        let dnat = match (same_address, port.map(|p| Some(p) == way.port)) {
            (Some(false), _) | (_, Some(false)) => Some(true),
            (Some(true), Some(true)) => Some(false),
            _ => None,
        };
        let rewritten = Some(Rewritten { address, port: port.and_then(Port::new), by: place });
        Way { destination: address, here, port, dnat, rewritten, ..way.clone() }
    }

    fn base_chain(&mut self, BaseChain { table, chain, base }: BaseChain<'a>, way: &mut Way) -> Ends {
        let nat = base.kind == "nat";
        let site = Site {
            hook: base.hook,
            conntrack: match base.hook {
                Hook::Ingress => No,
                Hook::Prerouting if base.priority < PRIORITY_CONNTRACK => No,
                Hook::Prerouting if base.priority == PRIORITY_CONNTRACK => Maybe,
                _ => Yes,
            },
            netdev: self.is_netdev(table),
            nat,
        };
        let mut ends = Ends::default();
        let (doubt, before) = (self.doubt.clone(), way.clone());
        let left = self.chain(table, chain, site, way, &mut ends, true, 0);
        if left.pass {
            if base.drops {
                let chain = &self.rules.tables[table].table.chains[chain];
                let place = self.place(table, chain, &Rule::default());
                ends.drop.get_or_insert(place);
            } else {
                ends.accept = true;
            }
        }
        // Doubts that came to one end all the same are none.
        let Ends { accept, drop, reject, rewrites } = &ends;
        let outcomes =
            [*accept, drop.is_some(), reject.is_some()].into_iter().filter(|o| *o).count() + rewrites.len();
        if outcomes < 2 && *way == before {
            self.doubt = doubt;
        }
        ends
    }

    /// Runs one chain. `sure`: whether the packet certainly gets here.
    #[allow(clippy::too_many_arguments)]
    fn chain(
        &mut self,
        table: usize,
        number: usize,
        site: Site,
        way: &mut Way,
        ends: &mut Ends,
        mut sure: bool,
        depth: usize,
    ) -> Left {
        let chain = &self.rules.tables[table].table.chains[number];
        let kind = self.kind.clone();
        let sieve = (chain.rules.len() >= SIEVE_FROM)
            .then(|| kind[table][number].get_or_init(|| self.sieve(table, chain, way)));
        let mut left = Left { pass: false, ended: false };
        let candidates = sieve.zip(way.port).map(|(sieve, port)| sieve.rules(port));
        let mut all = if candidates.is_some() { 0..0 } else { 0..chain.rules.len() };
        let mut candidates = candidates.into_iter().flatten();
        while let Some(at) = candidates.next().or_else(|| all.next()) {
            self.steps.set(self.steps.get() + 1);
            if self.steps.get() > STEPS_MAX || depth > DEPTH_MAX {
                self.overrun = true;
                return Left { pass: true, ended: true };
            }
            let after = self.rule(table, chain, &chain.rules[at], site, way, ends, sure, depth);
            left.pass |= after.returned;
            left.ended |= after.ended;
            if !after.goes_on {
                return left;
            }
            sure &= !after.returned && !after.ended;
        }
        left.pass = true;
        left
    }

    /// Leaves out the rules that no packet of this kind gets through, wherever it goes.
    fn sieve(&self, table: usize, chain: &Chain, way: &Way) -> Sieve {
        let mut sieve = Sieve { any_port: vec![], by_port: HashMap::new() };
        // What is asked of here does not depend on where, or on what happened before.
        let site = Site { hook: Hook::Input, conntrack: Maybe, netdev: self.is_netdev(table), nat: false };
        let steps = self.steps.get();
        'rules: for (at, rule) in (0..).zip(&chain.rules) {
            let mut ports = None;
            for statement in &rule.statements {
                match statement {
                    Statement::Match(m) if is_of_kind(&m.left) => {
                        if self.comparison(table, site, way, m) == No {
                            continue 'rules;
                        }
                    }
                    Statement::Match(Match { left, op: Op::Eq, right }) if is_port(left) => {
                        ports = ports.or_else(|| few_ports(left, right));
                    }
                    // Whoever gets here uses it up, whatever the rule asks for afterwards.
                    Statement::Maybe(_) if limit_of(rule, statement).is_some() => break,
                    Statement::Match(_)
                    | Statement::Either(_)
                    | Statement::Maybe(_)
                    | Statement::Counter(_)
                    | Statement::CounterRef(_) => {}
                    // Beyond this a rule may have done something.
                    _ => break,
                }
            }
            match ports {
                None => sieve.any_port.push(at),
                Some(ports) => {
                    ports.into_iter().for_each(|port| sieve.by_port.entry(port).or_default().push(at))
                }
            }
        }
        self.steps.set(steps);
        sieve
    }

    fn is_netdev(&self, table: usize) -> bool {
        self.rules.tables[table].table.family == TableFamily::Netdev
    }

    #[allow(clippy::too_many_arguments)]
    fn rule(
        &mut self,
        table: usize,
        chain: &'a Chain,
        rule: &'a Rule,
        site: Site,
        way: &mut Way,
        ends: &mut Ends,
        sure: bool,
        depth: usize,
    ) -> After {
        let mut taken = Yes;
        let sure_so_far = self.doubt.is_none();
        // Where a NAT may have sent it nobody knows where to: a rule for what no NAT has touched can only take it
        // as it was sent.
        let as_sent = (way.dnat.is_none() && is_for_unrewritten(rule)).then(|| Way {
            destination: Some(self.packet.destination),
            here: false,
            port: Some(self.packet.port.get()),
            ..way.clone()
        });
        for statement in &rule.statements {
            let decided = match statement {
                Statement::Match(m) => {
                    let truth = self.comparison(table, site, as_sent.as_ref().unwrap_or(&*way), m);
                    if truth == Maybe {
                        self.doubt(&format!("`{}`", rendered(statement)));
                    }
                    taken = taken.and(truth);
                    if taken == No {
                        // Whatever else it asks for.
                        if sure_so_far {
                            self.doubt = None;
                        }
                        return After::NEXT;
                    }
                    continue;
                }
                Statement::Either(list) => {
                    let truths = list.iter().map(|m| self.comparison(table, site, way, m));
                    let truth = truths.fold(No, Truth::or);
                    if truth == Maybe {
                        self.doubt(&format!("`{}`", rendered(statement)));
                    }
                    taken = taken.and(truth);
                    if taken == No {
                        // Whatever else it asks for.
                        if sure_so_far {
                            self.doubt = None;
                        }
                        return After::NEXT;
                    }
                    continue;
                }
                Statement::Maybe(json) => {
                    if let Some(Limit { per_second, over }) = limit_of(rule, statement) {
                        self.slowest = Some(self.slowest.map_or(per_second, |other| other.min(per_second)));
                        if self.alone && over {
                            return After::NEXT;
                        }
                        if self.alone {
                            continue;
                        }
                    }
                    self.doubt(&foreign(json));
                    taken = Maybe;
                    continue;
                }
                Statement::Neutral(json) => {
                    neutral(json, way, site, sure && taken == Yes);
                    continue;
                }
                Statement::CounterRef(_) | Statement::Counter(_) => continue,
                Statement::Vmap { key, map } => {
                    match self.vmap(table, site, way, key, map) {
                        // Whatever no key is found for ends the rule.
                        Some(Lookup::Missing) => {
                            if sure_so_far {
                                self.doubt = None;
                            }
                            return After::NEXT;
                        }
                        Some(Lookup::Found(verdict)) => verdict,
                        None => {
                            self.doubt(&format!("`{}`", rendered(statement)));
                            &Statement::Unknown(String::new())
                        }
                    }
                }
                other => other,
            };
            let certain = taken == Yes;
            let finish = |ended: bool| After { goes_on: !certain, returned: false, ended };
            return match decided {
                Statement::Accept => {
                    ends.accept = true;
                    finish(true)
                }
                Statement::Drop => {
                    let place = self.place(table, chain, rule);
                    ends.drop.get_or_insert(place);
                    finish(true)
                }
                // nft matches TCP before it, and does not always list that.
                Statement::Reject { tcp_reset: true } if self.packet.proto != Proto::Tcp => {
                    return After::NEXT;
                }
                Statement::Reject { .. } => {
                    let place = self.place(table, chain, rule);
                    ends.reject.get_or_insert(place);
                    finish(true)
                }
                // nft's `dnat ip to` lets packets of the other family go on.
                Statement::Dnat(Nat { address: Some(Operand::Address(a)), .. })
                    if site.nat && Family::of(*a) != self.packet.family() =>
                {
                    continue;
                }
                Statement::Dnat(Nat { address, port }) if site.nat => {
                    let place = self.place(table, chain, rule);
                    if ends.rewrites.len() < WAYS_MAX {
                        ends.rewrites.push((dnat(address, port, way), place));
                    } else {
                        self.overrun = true;
                    }
                    finish(true)
                }
                Statement::Redirect { port } if site.nat => {
                    let place = self.place(table, chain, rule);
                    if ends.rewrites.len() < WAYS_MAX {
                        let port = port.as_ref().map(target_port);
                        ends.rewrites.push((Rewrite { address: None, port }, place));
                    } else {
                        self.overrun = true;
                    }
                    finish(true)
                }
                Statement::Return => After { goes_on: !certain, returned: true, ended: false },
                Statement::Jump(name) | Statement::Goto(name) => {
                    let Some(target) = self.rules.tables[table].chains.get(name.as_str()).copied() else {
                        self.doubt(&format!("the chain {name:?}, which is not in the listing"));
                        ends.accept = true;
                        let place = self.place(table, chain, rule);
                        ends.drop.get_or_insert(place);
                        return After { goes_on: true, returned: true, ended: true };
                    };
                    let inner = self.chain(table, target, site, way, ends, sure && certain, depth + 1);
                    if matches!(decided, Statement::Jump(_)) {
                        After { goes_on: inner.pass || !certain, returned: false, ended: inner.ended }
                    } else {
                        After { goes_on: !certain, returned: inner.pass, ended: inner.ended }
                    }
                }
                // `continue` in a verdict map.
                Statement::Neutral(_) | Statement::Counter(_) | Statement::CounterRef(_) => continue,
                _ => {
                    if let Statement::Unknown(json) = decided
                        && !json.is_empty()
                    {
                        self.doubt(&foreign(json));
                    }
                    ends.accept = true;
                    let place = self.place(table, chain, rule);
                    ends.drop.get_or_insert(place);
                    After { goes_on: true, returned: true, ended: true }
                }
            };
        }
        After::NEXT
    }

    fn place(&self, table: usize, chain: &Chain, rule: &Rule) -> Place {
        let table = self.rules.tables[table].table;
        Place {
            family: table.family,
            table: table.name.clone(),
            chain: chain.name.clone(),
            handle: rule.handle,
            comment: rule.comment.clone(),
        }
    }

    fn doubt(&mut self, text: &str) {
        if self.doubt.is_none() {
            self.doubt = Some(text.to_owned());
        }
    }

    fn vmap(
        &self,
        table: usize,
        site: Site,
        way: &Way,
        key: &Term,
        map: &'a VerdictMap,
    ) -> Option<Lookup<'a>> {
        let value = match self.value(site, way, key) {
            Seen::Values(values) => values,
            Seen::Break => return Some(Lookup::Missing),
            Seen::Unclear => return None,
        };
        let mut found = None;
        let mut look = |k: &Operand, verdict: &'a Statement| match self.contains(key, &value, k) {
            Yes => {
                found = found.or(Some(verdict));
                Some(())
            }
            No => Some(()),
            Maybe => None,
        };
        match map {
            VerdictMap::Pairs(pairs) => {
                for (k, verdict) in pairs {
                    look(k, verdict)?;
                }
            }
            VerdictMap::Named(name) => {
                let index = self.rules.tables.get(table)?;
                let set = index.sets.get(name.as_str())?;
                if set.verdicts.len() != set.elements.len() {
                    return None;
                }
                for (k, verdict) in set.elements.iter().zip(&set.verdicts) {
                    look(k, verdict)?;
                }
                if found.is_none() && (set.truncated || index.written.contains(name)) {
                    return None;
                }
            }
        }
        Some(found.map_or(Lookup::Missing, Lookup::Found))
    }

    fn comparison(&self, table: usize, site: Site, way: &Way, m: &Match) -> Truth {
        let values = match self.value(site, way, &m.left) {
            Seen::Values(values) => values,
            // An expression without a value ends the rule, whatever it is compared with.
            Seen::Break => return No,
            Seen::Unclear => return Maybe,
        };
        let within = |right: &Operand| self.contains(&m.left, &values, right);
        match (m.op, &m.right) {
            (Op::Eq | Op::Ne, Operand::Named(name)) => {
                let index = &self.rules.tables[table];
                let Some(set) = index.sets.get(name.as_str()) else { return Maybe };
                self.steps.set(self.steps.get() + set.elements.len() / 16);
                let mut found = No;
                for element in &set.elements {
                    found = found.or(within(element));
                    if found == Yes {
                        break;
                    }
                }
                if found == No && (set.truncated || index.written.contains(name)) {
                    found = Maybe;
                }
                if m.op == Op::Eq { found } else { found.not() }
            }
            (Op::Eq, right) => within(right),
            (Op::Ne, right) => within(right).not(),
            (Op::Any | Op::NoneOf, right) => {
                let Some(mask) = mask(&m.left, right) else { return Maybe };
                let any = match values.as_slice() {
                    [Exact::Number(value)] => Truth::of(value & mask != 0),
                    [Exact::Bits { value, .. }] if value & mask != 0 => Yes,
                    [Exact::Bits { known, .. }] if mask & !known == 0 => No,
                    _ => Maybe,
                };
                if m.op == Op::Any { any } else { any.not() }
            }
            (op, right) => {
                let [value] = values.as_slice() else { return Maybe };
                let (Some(left), Some(right)) = (value.number(), normal::number(&m.left, right)) else {
                    return Maybe;
                };
                Truth::of(match op {
                    Op::Lt => left < right,
                    Op::Gt => left > right,
                    Op::Le => left <= right,
                    _ => left >= right,
                })
            }
        }
    }

    /// Whether `right` (a value, an interval, or a set of them) holds the value.
    fn contains(&self, term: &Term, values: &[Exact], right: &Operand) -> Truth {
        match right {
            Operand::Set(elements) => elements.iter().fold(No, |found, e| {
                if found == Yes { Yes } else { found.or(self.contains(term, values, e)) }
            }),
            Operand::Concat(parts) => {
                let Term::Concat(terms) = term else { return Maybe };
                if parts.len() != terms.len() || parts.len() != values.len() {
                    return Maybe;
                }
                let each = terms.iter().zip(values).zip(parts);
                each.fold(Yes, |all, ((t, v), p)| all.and(self.contains(t, std::slice::from_ref(v), p)))
            }
            Operand::Unknown(_) | Operand::Named(_) => Maybe,
            _ => {
                let [value] = values else { return Maybe };
                value.within(term, right)
            }
        }
    }

    /// The value of the left side for this packet, here.
    fn value(&self, site: Site, way: &Way, term: &Term) -> Seen {
        match term {
            Term::Meta(key) => self.meta(site, way, key),
            Term::Payload { protocol, field } => self.payload(way, protocol, field),
            Term::Ct { key, dir } => self.ct(site, way, key, dir.as_deref()),
            Term::Fib { flags, result } => self.fib(way, flags, result),
            Term::And { term: inner, mask: bits } => {
                match (self.value(site, way, inner), mask(inner, bits)) {
                    (Seen::Break, _) => Seen::Break,
                    (Seen::Values(values), Some(bits)) => match values.as_slice() {
                        [Exact::Number(n)] => Seen::number(n & bits),
                        [Exact::Bits { value, known }] if bits & !known == 0 => Seen::number(value & bits),
                        _ => Seen::Unclear,
                    },
                    _ => Seen::Unclear,
                }
            }
            Term::Concat(terms) => {
                let mut all = vec![];
                let mut unclear = false;
                for term in terms {
                    match self.value(site, way, term) {
                        Seen::Break => return Seen::Break,
                        Seen::Unclear => unclear = true,
                        Seen::Values(mut values) => all.append(&mut values),
                    }
                }
                if unclear { Seen::Unclear } else { Seen::Values(all) }
            }
            Term::Unknown(_) => Seen::Unclear,
        }
    }

    fn meta(&self, site: Site, way: &Way, key: &str) -> Seen {
        let v4 = self.packet.family() == Family::Ipv4;
        match key {
            "iifname" | "iif" => Seen::text(&self.packet.iifname),
            // There is no output device before routing, and none for what stays here: the
            // name is empty then.
            "oifname" | "oif" if site.hook != Hook::Forward => Seen::text(""),
            "oifname" | "oif" => {
                let interface = way.destination.and_then(|address| self.host.way_out(address));
                interface.map_or(Seen::Unclear, Seen::text)
            }
            "l4proto" => Seen::number(self.packet.proto.number().into()),
            // Of the chain, not of the packet: NFPROTO_NETDEV.
            "nfproto" if site.netdev => Seen::number(5),
            "nfproto" => Seen::number(if v4 { 2 } else { 10 }),
            "protocol" => Seen::number(if v4 { 0x0800 } else { 0x86dd }),
            "mark" => way.mark.map_or(Seen::Unclear, |m| Seen::number(m.into())),
            // `host`, for what is addressed to this host's link-layer address.
            "pkttype" if !is_group(self.packet.destination) => Seen::number(0),
            _ => Seen::Unclear,
        }
    }

    fn payload(&self, way: &Way, protocol: &str, field: &str) -> Seen {
        let Packet { source, proto, source_port, .. } = self.packet;
        let v4 = self.packet.family() == Family::Ipv4;
        let port = |port: Option<u16>| port.map_or(Seen::Unclear, |p| Seen::number(p.into()));
        match (protocol, field) {
            ("ip", _) if !v4 => Seen::Break,
            ("ip6", _) if v4 => Seen::Break,
            ("ip" | "ip6", "saddr") => Seen::address(*source),
            ("ip" | "ip6", "daddr") => way.destination.map_or(Seen::Unclear, Seen::address),
            ("ip", "version") => Seen::number(4),
            // It may say that it must not be fragmented.
            ("ip", "frag-off") => Seen::Values(vec![Exact::Bits { value: 0, known: 0xbfff }]),
            ("ip6", "version") => Seen::number(6),
            ("ip", "protocol") | ("ip6", "nexthdr") => Seen::number(proto.number().into()),
            ("tcp", _) if *proto != Proto::Tcp => Seen::Break,
            ("udp", _) if *proto != Proto::Udp => Seen::Break,
            ("tcp" | "udp" | "th", "dport") => port(way.port),
            ("tcp" | "udp" | "th", "sport") => Seen::number(source_port.get().into()),
            // A SYN.
            ("tcp", "flags") => Seen::number(2),
            ("icmp" | "icmpv6" | "igmp" | "sctp" | "dccp" | "udplite" | "esp" | "ah" | "comp" | "arp", _) => {
                Seen::Break
            }
            _ => Seen::Unclear,
        }
    }

    fn ct(&self, site: Site, way: &Way, key: &str, dir: Option<&str>) -> Seen {
        let Packet { source, destination, port, source_port, proto, .. } = self.packet;
        let tracked = match (site.conntrack, way.tracked) {
            (No, _) => {
                // Without an entry the state is invalid, or untracked where a rule said so;
                // everything else has no value.
                return match (key, way.tracked) {
                    ("state", Some(true)) => Seen::number(1),
                    ("state", Some(false)) => Seen::number(64),
                    ("state", None) => Seen::Unclear,
                    _ => Seen::Break,
                };
            }
            (Maybe, _) | (_, None) => return Seen::Unclear,
            (Yes, Some(tracked)) => tracked,
        };
        if !tracked {
            return if key == "state" { Seen::number(64) } else { Seen::Break };
        }
        let v4 = self.packet.family() == Family::Ipv4;
        match (key, dir) {
            ("state", _) => Seen::number(8),
            ("direction", _) => Seen::number(0),
            ("protocol", _) => Seen::number(proto.number().into()),
            ("l3proto", _) => Seen::number(if v4 { 2 } else { 10 }),
            ("mark", _) => way.ct_mark.map_or(Seen::Unclear, |m| Seen::number(m.into())),
            // Other bits (NAT done, confirmed at the very end) have no names in rules.
            ("status", _) => match way.dnat {
                Some(dnat) => {
                    Seen::Values(vec![Exact::Bits { value: if dnat { 32 } else { 0 }, known: 0x23f }])
                }
                None => Seen::Values(vec![Exact::Bits { value: 0, known: 0x21f }]),
            },
            ("ip saddr" | "ip daddr", Some(_)) if !v4 => Seen::Break,
            ("ip6 saddr" | "ip6 daddr", Some(_)) if v4 => Seen::Break,
            ("proto-dst", Some("original")) => Seen::number(port.get().into()),
            ("proto-src", Some("original")) => Seen::number(source_port.get().into()),
            ("proto-src", Some("reply")) => way.port.map_or(Seen::Unclear, |p| Seen::number(p.into())),
            ("saddr" | "ip saddr" | "ip6 saddr", Some("original")) => Seen::address(*source),
            ("daddr" | "ip daddr" | "ip6 daddr", Some("original")) => Seen::address(*destination),
            ("saddr" | "ip saddr" | "ip6 saddr", Some("reply")) => {
                way.destination.map_or(Seen::Unclear, Seen::address)
            }
            ("daddr" | "ip daddr" | "ip6 daddr", Some("reply")) => Seen::address(*source),
            _ => Seen::Unclear,
        }
    }

    fn fib(&self, way: &Way, flags: &[String], result: &str) -> Seen {
        let has = |flag: &str| flags.iter().any(|f| f == flag);
        if has("saddr") {
            // The reverse path is taken to exist; see the head of this module.
            return match result {
                "oif" => Seen::text("exists"),
                "type" if !self.host.is_local(self.packet.source) && !is_group(self.packet.source) => {
                    Seen::text("unicast")
                }
                _ => Seen::Unclear,
            };
        }
        if way.here && result == "type" && !has("iif") && !has("oif") {
            return Seen::text("local");
        }
        let (Some(address), "type") = (way.destination, result) else { return Seen::Unclear };
        let local = self.host.is_local(address);
        match (is_group(address), local) {
            (true, _) => match address {
                IpAddr::V4(a) if a.is_broadcast() => Seen::text("broadcast"),
                _ => Seen::text("multicast"),
            },
            // Local to the interface it came in by, or to another one.
            (false, true) if has("iif") || has("oif") => Seen::Unclear,
            (false, true) => Seen::text("local"),
            (false, false) => Seen::text("unicast"),
        }
    }
}

/// What follows a rule.
struct After {
    /// The next rule may see the packet.
    goes_on: bool,
    /// It may have left the chain for its caller.
    returned: bool,
    /// It may have ended for good.
    ended: bool,
}

impl After {
    const NEXT: After = After { goes_on: true, returned: false, ended: false };
}

enum Lookup<'a> {
    Found(&'a Statement),
    Missing,
}

enum Seen {
    /// One value; several for a concatenation.
    Values(Vec<Exact>),
    /// No value: the rule ends here.
    Break,
    Unclear,
}

impl Seen {
    fn number(n: u128) -> Self {
        Seen::Values(vec![Exact::Number(n)])
    }

    fn text(text: &str) -> Self {
        Seen::Values(vec![Exact::Text(text.to_owned())])
    }

    fn address(address: IpAddr) -> Self {
        Seen::Values(vec![Exact::Address(address)])
    }
}

enum Exact {
    Number(u128),
    Text(String),
    Address(IpAddr),
    /// Flags, of which only the `known` bits are known.
    Bits {
        value: u128,
        known: u128,
    },
}

impl Exact {
    fn number(&self) -> Option<u128> {
        match self {
            Exact::Number(n) => Some(*n),
            Exact::Address(a) => Some(normal::bits(*a)),
            _ => None,
        }
    }

    fn within(&self, term: &Term, right: &Operand) -> Truth {
        match (self, right) {
            (Exact::Text(name), Operand::Text(pattern)) => Truth::of(match pattern.strip_suffix('*') {
                Some(stem) if is_interface(term) => name.starts_with(stem),
                _ => name == pattern,
            }),
            // An interface by the number of a device that is gone, or a value by number.
            (Exact::Text(_), _) => Maybe,
            (Exact::Bits { value, known }, _) => match mask(term, right) {
                // What is wanted is not what is known to be there.
                Some(wanted) if (wanted ^ value) & known != 0 => No,
                Some(_) | None => Maybe,
            },
            (Exact::Number(n), Operand::Bits(_)) => match mask(term, right) {
                Some(wanted) => Truth::of(*n == wanted),
                None => Maybe,
            },
            (Exact::Number(n), _) => match normal::interval(term, right) {
                Some((None, low, high)) => Truth::of((low..=high).contains(n)),
                _ => Maybe,
            },
            (Exact::Address(a), _) => match normal::interval(term, right) {
                Some((Some(family), low, high)) if family == Family::of(*a) => {
                    Truth::of((low..=high).contains(&normal::bits(*a)))
                }
                Some((Some(_), ..)) => No,
                _ => Maybe,
            },
        }
    }
}

fn is_interface(term: &Term) -> bool {
    matches!(term, Term::Meta(key) if key.starts_with("iif") || key.starts_with("oif"))
}

/// What all packets of a kind have in common.
fn is_of_kind(term: &Term) -> bool {
    match term {
        Term::Meta(key) => matches!(key.as_str(), "iifname" | "iif" | "l4proto" | "nfproto" | "protocol"),
        Term::Payload { field, .. } => !matches!(field.as_str(), "dport" | "daddr"),
        Term::And { term, .. } => is_of_kind(term),
        Term::Concat(terms) => terms.iter().all(is_of_kind),
        Term::Ct { .. } | Term::Fib { .. } | Term::Unknown(_) => false,
    }
}

fn is_port(term: &Term) -> bool {
    matches!(term, Term::Payload { protocol, field } if matches!(protocol.as_str(), "tcp" | "udp" | "th") && field == "dport")
}

/// The ports, where they are few and all are known.
fn few_ports(term: &Term, right: &Operand) -> Option<BTreeSet<u16>> {
    let ranges = match right {
        Operand::Number(_) | Operand::Range(..) | Operand::Set(_) => port_ranges(term, right)?,
        _ => return None,
    };
    let mut ports = BTreeSet::new();
    for (first, last) in ranges {
        if usize::from(last - first) + ports.len() >= PORTS_MAX {
            return None;
        }
        ports.extend(first..=last);
    }
    Some(ports)
}

/// The bits that an operand stands for.
fn mask(term: &Term, operand: &Operand) -> Option<u128> {
    match operand {
        Operand::Set(flags) | Operand::Bits(flags) => {
            flags.iter().try_fold(0, |all, flag| Some(all | normal::number(term, flag)?))
        }
        one => normal::number(term, one),
    }
}

/// Multicast and broadcast go to the input hook, though no interface has the address.
fn address_is_here(address: IpAddr, host: &dyn Host) -> bool {
    is_group(address) || host.is_local(address)
}

fn is_group(address: IpAddr) -> bool {
    address.is_multicast() || matches!(address, IpAddr::V4(a) if a.is_broadcast())
}

fn rendered(statement: &Statement) -> String {
    render::rule(&Rule { statements: vec![statement.clone()], ..Rule::default() })
}

fn foreign(json: &str) -> String {
    let named = serde_json::from_str(json).ok().and_then(|value| xt::named(&value));
    named.unwrap_or_else(|| crate::terms::printable(json, 120))
}

/// Whether `decode` could not read the flags of the table.
fn unclear(table: &Table) -> bool {
    table.chains.iter().any(|c| c.rules.first() == Some(&unclear_flags()))
}

const XT_MASQUERADE: &str = r#"{"xt":{"name":"MASQUERADE""#;
const XT_SNAT: &str = r#"{"xt":{"name":"SNAT""#;

/// A NAT chain alone does not turn connection tracking on; rules that use it do.
fn turns_tracking_on(table: &Table, family: Family) -> bool {
    fn uses(term: &Term) -> bool {
        match term {
            Term::Ct { .. } => true,
            Term::And { term, .. } => uses(term),
            Term::Concat(terms) => terms.iter().any(uses),
            _ => false,
        }
    }
    let fits = family_of(table.family).is_none_or(|f| f == Some(family));
    let mut statements = table.chains.iter().flat_map(|c| &c.rules).flat_map(|r| &r.statements);
    fits && statements.any(|s| match s {
        Statement::Match(m) => uses(&m.left),
        Statement::Either(list) => list.iter().any(|m| uses(&m.left)),
        Statement::Vmap { key, .. } => uses(key),
        Statement::Dnat(_) | Statement::Redirect { .. } => true,
        Statement::Neutral(json) => {
            let known = ["{\"snat\"", "{\"masquerade\"", "{\"ct ", XT_MASQUERADE, XT_SNAT];
            known.iter().any(|start| json.starts_with(start))
        }
        _ => false,
    })
}

fn written_sets(table: &Table) -> HashSet<String> {
    let rules = table.chains.iter().flat_map(|c| &c.rules);
    let texts = rules.flat_map(|r| &r.statements).filter_map(|s| match s {
        Statement::Neutral(json) | Statement::Maybe(json)
            if json.starts_with("{\"set\"")
                || json.starts_with("{\"map\"")
                || json.starts_with("{\"meter\"") =>
        {
            Some(json)
        }
        _ => None,
    });
    texts
        .filter_map(|json| {
            let value: Value = serde_json::from_str(json).ok()?;
            let body = value.as_object()?.values().next()?;
            let name = body.get("set").or_else(|| body.get("map")).or_else(|| body.get("name"))?;
            let name = name.as_str()?;
            Some(name.strip_prefix('@').unwrap_or(name).to_owned())
        })
        .collect()
}

/// What a statement without a verdict does to what later rules see.
fn neutral(json: &str, way: &mut Way, site: Site, certain: bool) {
    let set = |slot: &mut Option<u64>, value: Option<u64>| {
        if *slot != value {
            *slot = if certain { value } else { None };
        }
    };
    // What is not tracked, or not yet, has no mark that could be set.
    let set_ct = |way: &mut Way, value: Option<u64>| match (site.conntrack, way.tracked) {
        (No, _) | (_, Some(false)) => {}
        (Yes, Some(true)) => set(&mut way.ct_mark, value),
        (Maybe, _) | (Yes, None) => way.ct_mark = way.ct_mark.filter(|_| way.ct_mark == value),
    };
    let Ok(value) = serde_json::from_str::<Value>(json) else { return };
    // Behind connection tracking it comes too late, and the kernel ignores it.
    if value.get("notrack").is_some() && site.conntrack != Yes {
        way.tracked = match (certain && site.conntrack == No, way.tracked) {
            (true, _) | (_, Some(false)) => Some(false),
            _ => None,
        };
    }
    if let Some(mangle) = value.get("mangle") {
        let number = mangle.get("value").and_then(Value::as_u64);
        let key = |kind: &str| mangle.get("key")?.get(kind)?.get("key")?.as_str().map(str::to_owned);
        if key("meta").as_deref() == Some("mark") {
            set(&mut way.mark, number);
        }
        if key("ct").as_deref() == Some("mark") {
            set_ct(way, number);
        }
    }
    if let Some(xt) = value.get("xt") {
        let number = |key: &str| xt.get(key).and_then(Value::as_u64);
        // Only connections that are tracked have a mark.
        let (mark, ct_mark) = (way.mark, way.ct_mark.filter(|_| site.conntrack == Yes));
        let result = |to: Option<u64>, from: Option<u64>| {
            Some(to? & number("keep")? ^ from? & number("take")? ^ number("flip")?)
        };
        let zero_where_unused = |from| if number("take") == Some(0) { Some(0) } else { from };
        match (xt.get("to").and_then(Value::as_str), xt.get("name").and_then(Value::as_str)) {
            (Some("meta"), _) => set(&mut way.mark, result(mark, zero_where_unused(ct_mark))),
            (Some("ct"), _) => set_ct(way, result(ct_mark, zero_where_unused(mark))),
            (_, Some("MARK" | "HMARK")) => way.mark = None,
            // It saves, restores or sets either.
            (_, Some("CONNMARK")) => (way.mark, way.ct_mark) = (None, None),
            _ => {}
        }
    }
}

fn dnat(address: &Option<Operand>, port: &Option<Operand>, way: &Way) -> Rewrite {
    let unclear_map = matches!(address, Some(Operand::Unknown(_)));
    Rewrite {
        address: Some(match address {
            Some(Operand::Address(a)) => Target::Known(*a),
            // `dnat to :8080` changes the port alone.
            None => way.destination.map_or(Target::Unclear, Target::Known),
            Some(_) => Target::Unclear,
        }),
        port: match port {
            // A map, or a target of xtables, may hold a port as well.
            None if unclear_map => Some(Target::Unclear),
            None => None,
            Some(port) => Some(target_port(port)),
        },
    }
}

fn target_port(port: &Operand) -> Target<u16> {
    match port {
        Operand::Number(n) => u16::try_from(*n).map_or(Target::Unclear, Target::Known),
        _ => Target::Unclear,
    }
}

/// `Some(None)`: no table that IP packets meet at prerouting.
fn family_of(family: TableFamily) -> Option<Option<Family>> {
    match family {
        TableFamily::Inet => None,
        TableFamily::Ip => Some(Some(Family::Ipv4)),
        TableFamily::Ip6 => Some(Some(Family::Ipv6)),
        _ => Some(None),
    }
}

/// The chains that the NAT chains of prerouting lead to, themselves among them.
fn reachable(table: &Table) -> Vec<&Chain> {
    let is_entry =
        |c: &&Chain| c.base.as_ref().is_some_and(|b| b.hook == Hook::Prerouting && b.kind == "nat");
    let by_name: HashMap<&str, &Chain> = table.chains.iter().map(|c| (c.name.as_str(), c)).collect();
    let mut found: Vec<&Chain> = table.chains.iter().filter(is_entry).collect();
    let mut seen: HashSet<&str> = found.iter().map(|c| c.name.as_str()).collect();
    let mut at = 0;
    while let Some(chain) = found.get(at).copied() {
        at += 1;
        let mut verdicts: Vec<&Statement> = chain.rules.iter().flat_map(|r| &r.statements).collect();
        for rule in &chain.rules {
            for statement in &rule.statements {
                if let Statement::Vmap { map, .. } = statement {
                    match map {
                        VerdictMap::Pairs(pairs) => verdicts.extend(pairs.iter().map(|(_, v)| v)),
                        VerdictMap::Named(name) => {
                            let set = table.sets.iter().find(|s| s.name == *name);
                            verdicts.extend(set.into_iter().flat_map(|s| &s.verdicts));
                        }
                    }
                }
            }
        }
        for verdict in verdicts {
            if let Statement::Jump(name) | Statement::Goto(name) = verdict
                && let Some(target) = by_name.get(name.as_str())
                && seen.insert(target.name.as_str())
            {
                found.push(target);
            }
        }
    }
    found
}

fn publish(table: &Table, chain: &Chain, rule: &Rule, out: &mut Vec<Published>) {
    let target = rule.statements.iter().find_map(|s| match s {
        Statement::Dnat(nat) => Some(match &nat.address {
            Some(Operand::Unknown(_)) => "somewhere that nft does not print".to_owned(),
            _ => render::nat_target(nat),
        }),
        Statement::Redirect { port: Some(Operand::Unknown(_)) } => {
            Some("a port of this host that nft does not print".to_owned())
        }
        Statement::Redirect { port: Some(port) } => Some(format!("this host:{}", render::operand(port))),
        Statement::Redirect { port: None } => Some("this host".to_owned()),
        _ => None,
    });
    let Some(target) = target else { return };
    let mut family = family_of(table.family).flatten();
    for statement in &rule.statements {
        if let Statement::Dnat(Nat { address: Some(Operand::Address(a)), .. }) = statement {
            family = Some(Family::of(*a));
        }
    }
    let mut protos = Proto::ALL.to_vec();
    let mut ports = vec![(1, u16::MAX)];
    let mut address = None;
    let mut iifname = None;
    for statement in normal::statements(rule, table.family) {
        let Statement::Match(Match { left, op: Op::Eq, right }) = &statement else { continue };
        match left {
            Term::Payload { protocol, field } => {
                match protocol.as_str() {
                    "tcp" => protos.retain(|p| *p == Proto::Tcp),
                    "udp" => protos.retain(|p| *p == Proto::Udp),
                    "ip" => family = Some(Family::Ipv4),
                    "ip6" => family = Some(Family::Ipv6),
                    _ => {}
                }
                match field.as_str() {
                    "dport" => ports = port_ranges(left, right).unwrap_or(ports),
                    "daddr" => address = network(right),
                    _ => {}
                }
            }
            Term::Meta(key) => match key.as_str() {
                "l4proto" => {
                    let wanted: Vec<u128> = match right {
                        Operand::Set(values) => {
                            values.iter().filter_map(|v| normal::number(left, v)).collect()
                        }
                        one => normal::number(left, one).into_iter().collect(),
                    };
                    protos.retain(|p| wanted.contains(&p.number().into()));
                }
                "nfproto" => match normal::number(left, right) {
                    Some(2) => family = Some(Family::Ipv4),
                    Some(10) => family = Some(Family::Ipv6),
                    _ => {}
                },
                "iifname" | "iif" => iifname = Some(render::operand(right)),
                _ => {}
            },
            _ => {}
        }
    }
    let place = Place {
        family: table.family,
        table: table.name.clone(),
        chain: chain.name.clone(),
        handle: rule.handle,
        comment: rule.comment.clone(),
    };
    for proto in protos {
        for (first, last) in &ports {
            // Port 0 reaches nothing.
            let (Some(first), Some(last)) = (Port::new((*first).max(1)), Port::new(*last)) else { continue };
            out.push(Published {
                place: place.clone(),
                proto,
                first,
                last,
                family,
                address,
                iifname: iifname.clone(),
                target: target.clone(),
            });
        }
    }
}

fn port_ranges(term: &Term, right: &Operand) -> Option<Vec<(u16, u16)>> {
    let range = |value: &Operand| {
        let (_, low, high) = normal::interval(term, value)?;
        Some((u16::try_from(low).ok()?, u16::try_from(high).ok()?))
    };
    match right {
        Operand::Set(values) => values.iter().map(range).collect(),
        one => range(one).map(|r| vec![r]),
    }
}

fn network(right: &Operand) -> Option<IpNet> {
    match right {
        Operand::Address(a) => Some(IpNet::from(*a)),
        Operand::Prefix(net) => Some(*net),
        Operand::Range(low, high) => match (low.as_ref(), high.as_ref()) {
            (Operand::Address(a), Operand::Address(b)) => normal::prefix_of(*a, *b),
            _ => None,
        },
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::super::alike::Alike;
    use super::super::decode;
    use super::*;
    use expect_test::{Expect, expect};
    use proptest::prelude::*;

    fn load(name: &str) -> Ruleset {
        let json = match name {
            "nixos-fw" => include_str!("captures/nixos-fw.json"),
            "firewalld" => include_str!("captures/firewalld.json"),
            "iptables-docker-ufw" => include_str!("captures/iptables-docker-ufw.json"),
            "constructs" => include_str!("captures/constructs.json"),
            "zoo" => include_str!("captures/zoo.json"),
            _ => include_str!("captures/netdev-limits-vmaps.json"),
        };
        decode::ruleset(json.as_bytes()).expect("a capture")
    }

    fn here(address: IpAddr) -> bool {
        address.to_string() == "192.0.2.7" || address.to_string() == "2001:db8::7"
    }

    /// `proto/port from source`; to this host's address of that family, on eth0.
    fn packet(text: &str) -> Packet {
        let (to, source) = text.split_once(" from ").expect("a source");
        let (proto, port) = to.split_once('/').expect("a port");
        let source: IpAddr = source.parse().expect("an address");
        Packet {
            iifname: "eth0".into(),
            source,
            destination: if source.is_ipv4() {
                [192, 0, 2, 7].into()
            } else {
                "2001:db8::7".parse().expect("ours")
            },
            proto: if proto == "tcp" { Proto::Tcp } else { Proto::Udp },
            source_port: Port::new(40_000).expect("a port"),
            port: Port::new(port.parse().expect("a number")).expect("a port"),
        }
    }

    fn check(capture: &str, packets: &[&str], want: Expect) {
        let ruleset = load(capture);
        let mut out = String::new();
        for text in packets {
            let Judgement { verdict, by, rewritten } = judge(&ruleset, &packet(text), &here);
            let by = by.map(|p| {
                format!(" by {}/{}/{}", p.table, p.chain, p.handle.map_or("policy".into(), |h| h.to_string()))
            });
            let to = rewritten.map(|r| format!(" to {:?}:{:?}", r.address, r.port));
            out += &format!("{text}: {verdict:?}{}{}\n", by.unwrap_or_default(), to.unwrap_or_default());
        }
        want.assert_eq(&out);
    }

    #[test]
    fn what_a_map_has_nothing_for_gets_no_further_in_its_rule() {
        let verdict = |elements: &str, packet: &Packet| {
            let json = format!(
                r#"{{"nftables":[{{"table":{{"family":"inet","name":"t"}}}},{{"chain":{{"family":"inet","table":"t",
                "name":"c","type":"filter","hook":"input","prio":0,"policy":"accept"}}}},{{"rule":{{"family":"inet",
                "table":"t","chain":"c","handle":2,"expr":[{{"vmap":{{"key":{{"payload":{{"protocol":"tcp",
                "field":"dport"}}}},"data":{{"set":[{elements}]}}}}}},{{"drop":null}}]}}}}]}}"#
            );
            judge(&decode::ruleset(json.as_bytes()).expect("JSON"), packet, &here).verdict
        };
        let (asked, other) = (packet("tcp/22 from 198.51.100.9"), packet("tcp/23 from 198.51.100.9"));
        let udp = packet("udp/22 from 198.51.100.9");
        for (elements, asked_for) in
            [(r#"[22,{"accept":null}]"#, Verdict::Accept), (r#"[22,{"continue":null}]"#, Verdict::Drop)]
        {
            assert_eq!(verdict(elements, &asked), asked_for);
            assert_eq!(
                [verdict(elements, &other), verdict(elements, &udp)],
                [Verdict::Accept, Verdict::Accept]
            );
        }
    }

    #[test]
    fn a_nixos_firewall_opens_what_it_lists() {
        check(
            "nixos-fw",
            &[
                "tcp/443 from 203.0.113.9",
                "tcp/443 from 2001:db8:9::9",
                "tcp/5432 from 203.0.113.9",
                "tcp/9100 from 203.0.113.9",
                "tcp/8080 from 203.0.113.9",
                "udp/8080 from 203.0.113.9",
                "udp/60500 from 203.0.113.9",
            ],
            expect![[r#"
                tcp/443 from 203.0.113.9: Accept
                tcp/443 from 2001:db8:9::9: Accept
                tcp/5432 from 203.0.113.9: Drop by nixos-fw/input/policy
                tcp/9100 from 203.0.113.9: Drop by nixos-fw/input/policy
                tcp/8080 from 203.0.113.9: Accept
                udp/8080 from 203.0.113.9: Drop by nixos-fw/input/policy
                udp/60500 from 203.0.113.9: Accept
            "#]],
        );
    }

    #[test]
    fn firewalld_rejects_last_and_forwards_ports() {
        check(
            "firewalld",
            &[
                "tcp/22 from 203.0.113.9",
                "tcp/25 from 203.0.113.9",
                "tcp/8443 from 203.0.113.9",
                "tcp/8443 from 2001:db8:9::9",
                "tcp/8080 from 203.0.113.9",
            ],
            expect![[r#"
                tcp/22 from 203.0.113.9: Accept
                tcp/25 from 203.0.113.9: Reject by firewalld/filter_INPUT/35
                tcp/8443 from 203.0.113.9: Accept to Some(172.17.0.2):Some(443)
                tcp/8443 from 2001:db8:9::9: Reject by firewalld/filter_INPUT/35
                tcp/8080 from 203.0.113.9: Accept to None:Some(80)
            "#]],
        );
    }

    #[test]
    fn what_iptables_hides_is_unknown_only_where_it_matters() {
        check(
            "iptables-docker-ufw",
            &[
                "tcp/9 from 203.0.113.9",
                "tcp/22 from 203.0.113.9",
                "tcp/8080 from 203.0.113.9",
                "tcp/22 from 2001:db8:9::9",
            ],
            expect![[r#"
                tcp/9 from 203.0.113.9: Drop by raw/PREROUTING/2
                tcp/22 from 203.0.113.9: Unknown("iptables' `-m conntrack`") by filter/ufw-before-input/12
                tcp/8080 from 203.0.113.9: Unknown("iptables' `-m addrtype`") by filter/ufw-before-input/12 to None:None
                tcp/22 from 2001:db8:9::9: Accept
            "#]],
        );
    }

    #[test]
    fn a_packet_that_comes_alone_exceeds_no_limit_and_says_which_it_uses_up() {
        let rules = load("netdev-limits-vmaps");
        let evaluator = Evaluator::new(&rules);
        let (of, alone) = (
            |text: &str| evaluator.limited(&packet(text), &here),
            |text: &str| evaluator.judge_alone(&packet(text), &here).verdict,
        );
        for text in ["tcp/22 from 203.0.113.9", "tcp/24 from 203.0.113.9"] {
            assert_eq!((of(text), alone(text)), (Some(5.0), Verdict::Accept), "{text}");
        }
        assert_eq!(of("tcp/80 from 203.0.113.9"), None, "no limit on its way");
        assert!(has_limits(&rules) && !has_limits(&load("nixos-fw")));
        let limit = |json: &str, then: Statement| {
            let rule = Rule { statements: vec![Statement::Maybe(json.into()), then], ..Rule::default() };
            limit_of(&rule, &rule.statements[0]).map(|limit| (limit.per_second, limit.over))
        };
        let minute = r#"{"limit": {"rate": 30, "burst": 5, "per": "minute", "inv": true}}"#;
        assert_eq!(limit(minute, Statement::Drop), Some((0.5, true)));
        assert_eq!(limit(minute, Statement::Neutral("log".into())), None, "a line of a log");
        assert_eq!(limit(r#"{"limit": "named"}"#, Statement::Accept), Some((0.0, false)));
        let set = |field: &str| {
            format!(
                r#"{{"set": {{"op": "add", "set": "@s", "elem": {{"payload": {{"protocol": "ip", "field": "{field}"}}}},
                "stmt": [{{"limit": {{"rate": 7, "per": "second"}}}}]}}}}"#
            )
        };
        assert_eq!(limit(&set("saddr"), Statement::Drop), None, "each source for itself");
        assert_eq!(limit(&set("daddr"), Statement::Drop), Some((7.0, false)));
    }

    #[test]
    fn limits_sets_maps_marks_and_raw() {
        check(
            "netdev-limits-vmaps",
            &[
                "tcp/80 from 203.0.113.9",
                "tcp/81 from 203.0.113.9",
                "tcp/82 from 203.0.113.9",
                "tcp/150 from 203.0.113.9",
                "tcp/151 from 203.0.113.9",
                "tcp/443 from 198.51.100.66",
                "udp/53 from 198.51.100.5",
                "udp/53 from 198.51.100.15",
                "tcp/22 from 203.0.113.9",
                "tcp/24 from 203.0.113.9",
                "udp/5353 from 203.0.113.9",
                "tcp/99 from 203.0.113.9",
                "tcp/23 from 203.0.113.9",
            ],
            expect![[r#"
                tcp/80 from 203.0.113.9: Accept
                tcp/81 from 203.0.113.9: Drop by limits/in/12
                tcp/82 from 203.0.113.9: Accept
                tcp/150 from 203.0.113.9: Accept
                tcp/151 from 203.0.113.9: Drop by limits/in/policy
                tcp/443 from 198.51.100.66: Drop by limits/in/6
                udp/53 from 198.51.100.5: Accept
                udp/53 from 198.51.100.15: Drop by limits/in/policy
                tcp/22 from 203.0.113.9: Unknown("{\"limit\":{\"burst\":5,\"per\":\"second\",\"rate\":5}}") by limits/in/policy
                tcp/24 from 203.0.113.9: Unknown("{\"limit\":{\"burst\":5,\"inv\":true,\"per\":\"second\",\"rate\":5}}") by limits/in/8
                udp/5353 from 203.0.113.9: Accept
                tcp/99 from 203.0.113.9: Drop by raw/pre/4
                tcp/23 from 203.0.113.9: Drop by early/in/3
            "#]],
        );
    }

    #[test]
    fn both_ways_of_a_doubt_with_one_end_are_no_doubt() {
        let rules = |tail: &str| {
            let json = format!(
                r#"{{"nftables":[{{"chain":{{"family":"inet","table":"t","name":"c","type":"filter","hook":"input","prio":0,"policy":"drop"}}}},
                {{"rule":{{"family":"inet","table":"t","chain":"c","expr":[{{"limit":{{"rate":1}}}},{{"drop":null}}]}}}}{tail}]}}"#
            );
            let ruleset = decode::ruleset(json.as_bytes()).expect("JSON");
            judge(&ruleset, &packet("tcp/22 from 203.0.113.9"), &here).verdict
        };
        let accept = r#",{"rule":{"family":"inet","table":"t","chain":"c","expr":[{"accept":null}]}}"#;
        assert_eq!(rules(""), Verdict::Drop);
        assert!(matches!(rules(accept), Verdict::Unknown(why) if why.contains("limit")));
    }

    #[test]
    fn who_decides_is_who_lets_nothing_past_and_not_who_may_have() {
        let by = |policy: &str| {
            let json = format!(
                r#"{{"nftables":[{{"chain":{{"family":"inet","table":"may","name":"c","type":"filter","hook":"input","prio":0,"policy":"accept"}}}},
                {{"rule":{{"family":"inet","table":"may","chain":"c","expr":[{{"limit":{{"rate":1}}}},{{"drop":null}}]}}}},
                {{"chain":{{"family":"inet","table":"does","name":"c","type":"filter","hook":"input","prio":1,"policy":"{policy}"}}}}]}}"#
            );
            let ruleset = decode::ruleset(json.as_bytes()).expect("JSON");
            let judgement = judge(&ruleset, &packet("tcp/22 from 203.0.113.9"), &here);
            (judgement.verdict == Verdict::Drop, judgement.by.expect("a chain").table)
        };
        assert_eq!((by("drop"), by("accept")), ((true, "does".to_owned()), (false, "may".to_owned())));
    }

    /// As a published port of Docker looks through iptables-nft: neither when nor where to.
    #[test]
    fn a_dnat_that_nft_does_not_print_is_a_dnat_all_the_same() {
        let judged = |forward: &str| {
            let json = format!(
                r#"{{"nftables":[{{"table":{{"family":"inet","name":"t"}}}},
                {{"chain":{{"family":"inet","table":"t","name":"n","type":"nat","hook":"prerouting","prio":-100,"policy":"accept"}}}},
                {{"chain":{{"family":"inet","table":"t","name":"i","type":"filter","hook":"input","prio":0,"policy":"drop"}}}},
                {{"chain":{{"family":"inet","table":"t","name":"f","type":"filter","hook":"forward","prio":0,"policy":"accept"}}}},
                {{"rule":{{"family":"inet","table":"t","chain":"n","expr":[{{"xt":{{"type":"match","name":"addrtype"}}}},{{"xt":{{"type":"target","name":"DNAT"}}}}]}}}},
                {{"rule":{{"family":"inet","table":"t","chain":"f","expr":[{forward}{{"drop":null}}]}}}}]}}"#
            );
            let ruleset = decode::ruleset(json.as_bytes()).expect("JSON");
            judge(&ruleset, &packet("tcp/8080 from 203.0.113.9"), &here).verdict
        };
        let status = r#"{"match":{"op":"in","left":{"ct":{"key":"status"}},"right":"dnat"}},"#;
        assert_eq!(judged(status), Verdict::Drop);
        assert!(matches!(judged(&status.replace("dnat", "snat")), Verdict::Unknown(_)));
    }

    /// nft 1.0.6 of `dnat ip to tcp dport map {...}`, `counter name tcp dport map {...} drop` and the like.
    #[test]
    fn a_rule_ends_where_its_map_has_nothing() {
        let map = |value: &str| {
            format!(
                r#"{{"map":{{"key":{{"payload":{{"protocol":"tcp","field":"dport"}}}},"data":{{"set":[[8080,{value}]]}}}}}}"#
            )
        };
        let judged = |base: &str, expr: &str, packet_: &str| {
            let json = format!(
                r#"{{"nftables":[{{"table":{{"family":"inet","name":"t"}}}},
                {{"chain":{{"family":"inet","table":"t","name":"c",{base},"policy":"accept"}}}},
                {{"rule":{{"family":"inet","table":"t","chain":"c","handle":5,"expr":[{expr}]}}}},
                {{"rule":{{"family":"inet","table":"t","chain":"c","handle":6,"expr":[{{"drop":null}}]}}}}]}}"#
            );
            let ruleset = decode::ruleset(json.as_bytes()).expect("JSON");
            judge(&ruleset, &packet(packet_), &here).verdict
        };
        let nat = r#""type":"nat","hook":"prerouting","prio":-100"#;
        let dnat = format!(r#"{{"dnat":{{"family":"ip","addr":{}}}}}"#, map("\"172.17.0.2\""));
        // Dropped by the rule behind it, unless the map has it.
        assert!(matches!(judged(nat, &dnat, "tcp/53 from 203.0.113.9"), Verdict::Unknown(_)));
        // No rule for this family at all.
        assert_eq!(judged(nat, &dnat, "tcp/8080 from 2001:db8:9::9"), Verdict::Drop);
        // Let in either way, and nobody knows where.
        let json = format!(
            r#"{{"nftables":[{{"table":{{"family":"inet","name":"t"}}}},
            {{"chain":{{"family":"inet","table":"t","name":"c",{nat},"policy":"accept"}}}},
            {{"rule":{{"family":"inet","table":"t","chain":"c","handle":5,"expr":[{dnat}]}}}}]}}"#
        );
        let ruleset = decode::ruleset(json.as_bytes()).expect("JSON");
        let judgement = judge(&ruleset, &packet("tcp/8080 from 203.0.113.9"), &here);
        let to = judgement.rewritten.expect("it may be rewritten");
        assert_eq!((judgement.verdict, to.address, to.by.handle), (Verdict::Accept, None, Some(5)));

        let filter = r#""type":"filter","hook":"input","prio":0"#;
        for before in [
            format!(r#"{{"counter":{}}}"#, map("\"hits\"")),
            format!(r#"{{"mangle":{{"key":{{"meta":{{"key":"mark"}}}},"value":{}}}}}"#, map("7")),
        ] {
            let expr = format!(r#"{before},{{"accept":null}}"#);
            assert!(
                matches!(judged(filter, &expr, "tcp/53 from 203.0.113.9"), Verdict::Unknown(_)),
                "{expr}"
            );
        }
    }

    #[test]
    fn before_connection_tracking_there_is_no_mark_to_set() {
        let judged = |prio: i32, set: &str| {
            let json = format!(
                r#"{{"nftables":[{{"table":{{"family":"inet","name":"t"}}}},
                {{"chain":{{"family":"inet","table":"t","name":"p","type":"filter","hook":"prerouting","prio":{prio},"policy":"accept"}}}},
                {{"chain":{{"family":"inet","table":"t","name":"i","type":"filter","hook":"input","prio":0,"policy":"drop"}}}},
                {{"rule":{{"family":"inet","table":"t","chain":"p","handle":1,"expr":[{set}{{"mangle":{{"key":{{"ct":{{"key":"mark"}}}},"value":9}}}}]}}}},
                {{"rule":{{"family":"inet","table":"t","chain":"i","handle":2,"expr":[{{"match":{{"op":"==","left":{{"ct":{{"key":"mark"}}}},"right":9}}}},{{"accept":null}}]}}}}]}}"#
            );
            let ruleset = decode::ruleset(json.as_bytes()).expect("JSON");
            judge(&ruleset, &packet("tcp/22 from 203.0.113.9"), &here).verdict
        };
        assert_eq!((judged(-150, ""), judged(-400, "")), (Verdict::Accept, Verdict::Drop));
        assert_eq!(judged(-400, r#"{"notrack":null},"#), Verdict::Drop);
    }

    /// As nft lists `ip daddr != 198.51.100.7 reject with tcp reset` and, in a table that sees both families,
    /// `meta nfproto ipv4 reject`: without the protocol or family that they are for.
    #[test]
    fn a_reject_is_for_its_own_protocol_and_family_only() {
        let judged = |family: &str, reject: &str, packet_: &str| {
            let json = format!(
                r#"{{"nftables":[{{"table":{{"family":"{family}","name":"t"}}}},
                {{"chain":{{"family":"{family}","table":"t","name":"c","type":"filter","hook":"input","prio":0,"policy":"accept"}}}},
                {{"rule":{{"family":"{family}","table":"t","chain":"c","handle":9,"expr":[{{"reject":{reject}}}]}}}}]}}"#
            );
            let ruleset = decode::ruleset(json.as_bytes()).expect("JSON");
            judge(&ruleset, &packet(packet_), &here).verdict
        };
        let [tcp, udp, tcp6] =
            ["tcp/22 from 203.0.113.9", "udp/22 from 203.0.113.9", "tcp/22 from 2001:db8:9::9"];
        let reset = r#"{"type":"tcp reset"}"#;
        assert_eq!((judged("ip", reset, tcp), judged("ip", reset, udp)), (Verdict::Reject, Verdict::Accept));
        let icmp = r#"{"type":"icmp","expr":"port-unreachable"}"#;
        assert_eq!(
            (judged("inet", icmp, tcp), judged("inet", icmp, tcp6)),
            (Verdict::Reject, Verdict::Accept)
        );
        let icmp6 = &icmp.replace("icmp", "icmpv6");
        assert_eq!(
            (judged("inet", icmp6, tcp), judged("inet", icmp6, tcp6)),
            (Verdict::Accept, Verdict::Reject)
        );
        assert_eq!((judged("ip", icmp, tcp), judged("ip6", icmp6, tcp6)), (Verdict::Reject, Verdict::Reject));
        let icmpx = &icmp.replace("icmp", "icmpx");
        assert_eq!(
            (judged("inet", icmpx, udp), judged("inet", icmpx, tcp6)),
            (Verdict::Reject, Verdict::Reject)
        );
    }

    #[test]
    fn of_two_nat_chains_of_one_priority_either_may_be_first() {
        let table = |name: &str, prio: i32, to: &str| {
            format!(
                r#"{{"table":{{"family":"ip","name":"{name}"}}}},
                {{"chain":{{"family":"ip","table":"{name}","name":"n","type":"nat","hook":"prerouting","prio":{prio},"policy":"accept"}}}},
                {{"rule":{{"family":"ip","table":"{name}","chain":"n","handle":9,"expr":[
                {{"match":{{"op":"==","left":{{"payload":{{"protocol":"tcp","field":"dport"}}}},"right":22}}}},{to}]}}}}"#
            )
        };
        let judged = |first: i32, second: i32| {
            let (one, other) = (r#"{"dnat":{"addr":"192.0.2.7","port":443}}"#, r#"{"drop":null}"#);
            let json =
                format!(r#"{{"nftables":[{},{}]}}"#, table("a", first, one), table("b", second, other));
            let ruleset = decode::ruleset(json.as_bytes()).expect("JSON");
            judge(&ruleset, &packet("tcp/22 from 203.0.113.9"), &here).verdict
        };
        assert_eq!((judged(-100, -90), judged(-90, -100)), (Verdict::Accept, Verdict::Drop));
        assert!(matches!(judged(-100, -100), Verdict::Unknown(why) if why.contains("one priority")));
    }

    #[test]
    fn chains_that_multiply_end_as_unknown() {
        let mut objects = vec![
            r#"{"chain":{"family":"inet","table":"t","name":"c0","type":"filter","hook":"input","prio":0,"policy":"accept"}}"#.to_owned(),
        ];
        for n in 0..15 {
            for _ in 0..8 {
                let next = n + 1;
                objects.push(format!(
                    r#"{{"rule":{{"family":"inet","table":"t","chain":"c{n}","expr":[{{"jump":{{"target":"c{next}"}}}}]}}}}"#
                ));
            }
        }
        let json = format!(r#"{{"nftables":[{}]}}"#, objects.join(","));
        let verdict = |json: &str| {
            let ruleset = decode::ruleset(json.as_bytes()).expect("JSON");
            judge(&ruleset, &packet("tcp/22 from 203.0.113.9"), &here).verdict
        };
        assert!(matches!(verdict(&json), Verdict::Unknown(why) if why.contains("too often")));
        // A loop, which the kernel does not let in.
        assert!(matches!(verdict(&json.replace("\"c15\"", "\"c0\"")), Verdict::Unknown(_)));
    }

    #[test]
    fn published_ports_are_listed_with_their_targets() {
        let list = |name: &str| {
            let lines = published(&load(name)).into_iter().map(|p| {
                let family = p.family.map_or("both", Family::name);
                let address = p.address.map_or("any".into(), |a| a.to_string());
                format!("{} {}-{} {family} {address} -> {}\n", p.proto, p.first, p.last, p.target)
            });
            lines.collect::<String>()
        };
        expect![[r#"
            tcp 8443-8443 ipv4 any -> 172.17.0.2:443
            tcp 8080-8080 ipv4 any -> this host:80
        "#]]
        .assert_eq(&list("firewalld"));
        expect![[r#"
            tcp 8080-8080 ipv4 any -> somewhere that nft does not print
            udp 53-53 ipv4 any -> a port of this host that nft does not print
        "#]]
        .assert_eq(&list("iptables-docker-ufw"));
        expect![[r#"
            tcp 1-65535 ipv4 any -> 1.1.1.1
            udp 1-65535 ipv4 any -> 1.1.1.1
            tcp 80-80 ipv4 any -> 1.1.1.1:8080
            tcp 80-90 both any -> 1.1.1.1-1.1.1.9:8080-8090
            tcp 80-80 ipv4 any -> somewhere that nft does not print
            tcp 1-65535 ipv4 any -> somewhere that nft does not print
            udp 1-65535 ipv4 any -> somewhere that nft does not print
            udp 53-53 both any -> this host:5353
            tcp 53-53 both any -> this host
            tcp 8-8 ipv6 any -> [fd00::1]:80
            tcp 80-80 ipv4 1.2.3.4/32 -> 10.0.0.1
            tcp 443-443 ipv4 1.2.3.4/32 -> 10.0.0.1
        "#]]
        .assert_eq(&list("zoo"));
        assert_eq!(published(&load("nixos-fw")), []);
    }

    /// Rules about ports, sources, interfaces and things that nobody knows.
    fn rule_of_a_long_chain() -> impl Strategy<Value = Rule> {
        let port = |n: u64| Operand::Number(n);
        let ports = prop_oneof![
            (20u64..26).prop_map(port),
            (20u64..26).prop_map(move |n| Operand::Set(vec![port(n), port(443)])),
            (20u64..26).prop_map(move |n| Operand::Range(Box::new(port(n)), Box::new(port(n + 2)))),
            Just(Operand::Range(Box::new(port(1)), Box::new(port(1000)))),
        ];
        let sources = proptest::sample::select(vec!["203.0.113.0/24", "198.51.100.0/24", "2001:db8::/32"]);
        let payload =
            |protocol: &str, field: &str| Term::Payload { protocol: protocol.into(), field: field.into() };
        let op = prop_oneof![4 => Just(Op::Eq), 1 => Just(Op::Ne)];
        let asked = prop_oneof![
            6 => (proptest::sample::select(vec!["tcp", "udp", "th"]), op.clone(), ports)
                .prop_map(move |(p, op, right)| Match { left: payload(p, "dport"), op, right }),
            2 => (sources, op.clone()).prop_map(move |(net, op)| {
                let net: IpNet = net.parse().expect("a prefix");
                let protocol = if net.addr().is_ipv4() { "ip" } else { "ip6" };
                Match { left: payload(protocol, "saddr"), op, right: Operand::Prefix(net) }
            }),
            1 => (proptest::sample::select(vec!["eth0", "eth*", "wg0"]), op.clone()).prop_map(|(name, op)| {
                Match { left: Term::Meta("iifname".into()), op, right: Operand::Text(name.into()) }
            }),
            1 => (0u64..2).prop_map(|n| Match { left: Term::Meta("mark".into()), op: Op::Eq, right: Operand::Number(n) }),
        ];
        let asked = prop_oneof![
            6 => asked.clone().prop_map(Statement::Match),
            1 => proptest::collection::vec(asked, 0..3).prop_map(Statement::Either),
        ];
        let effect = prop_oneof![
            3 => Just(Statement::Counter(crate::observed::Amount::default())),
            1 => Just(Statement::Maybe(r#"{"limit":{}}"#.into())),
            1 => Just(Statement::Neutral(r#"{"mangle":{"key":{"meta":{"key":"mark"}},"value":1}}"#.into())),
        ];
        let last = prop_oneof![
            3 => Just(Statement::Accept),
            3 => Just(Statement::Drop),
            1 => Just(Statement::Reject { tcp_reset: true }),
            4 => Just(Statement::Counter(crate::observed::Amount::default())),
        ];
        let middle = proptest::collection::vec(prop_oneof![3 => asked.clone(), 1 => effect], 0..3);
        (asked, middle, last).prop_map(|(first, middle, last)| Rule {
            statements: [vec![first], middle, vec![last]].concat(),
            ..Rule::default()
        })
    }

    /// The same rules in chains so short that each is looked at.
    fn in_pieces(rules: &[Rule], length: usize) -> Ruleset {
        let pieces = rules.chunks(length).enumerate();
        let name = |n: usize| format!("piece{n}");
        let jump = |n: usize| Rule { statements: vec![Statement::Jump(name(n))], ..Rule::default() };
        let chain = |name: String, base: Option<Base>, rules: Vec<Rule>| Chain { name, base, rules };
        let base = |priority| Base {
            kind: "filter".into(),
            hook: Hook::Input,
            priority,
            drops: false,
            devices: vec![],
        };
        let table = |at: i32, chains: Vec<Chain>| Table {
            family: TableFamily::Inet,
            name: format!("t{at}"),
            dormant: false,
            chains,
            counters: Default::default(),
            sets: vec![],
        };
        let mut chains: Vec<Chain> =
            pieces.clone().map(|(n, rules)| chain(name(n), None, rules.to_vec())).collect();
        chains.push(chain("in".into(), Some(base(0)), pieces.map(|(n, _)| jump(n)).collect()));
        Ruleset { tables: vec![table(0, chains)] }
    }

    /// JSON that looks like nft's often enough to get deep into the decoder.
    fn json() -> impl Strategy<Value = Value> {
        let words = [
            "match",
            "left",
            "right",
            "op",
            "==",
            "in",
            "!",
            "!=",
            "<",
            "meta",
            "key",
            "iifname",
            "oifname",
            "l4proto",
            "ct",
            "state",
            "status",
            "dir",
            "original",
            "proto-dst",
            "payload",
            "protocol",
            "field",
            "tcp",
            "ip",
            "saddr",
            "dport",
            "set",
            "range",
            "prefix",
            "addr",
            "len",
            "concat",
            "elem",
            "val",
            "vmap",
            "data",
            "drop",
            "accept",
            "jump",
            "target",
            "c",
            "counter",
            "dnat",
            "port",
            "redirect",
            "fib",
            "flags",
            "result",
            "type",
            "&",
            "|",
            "new",
            "10.0.0.1",
            "fe80::1",
            "@s",
            "tcp",
            "xt",
            "limit",
            "mangle",
            "value",
            "0x50 [invalid type]",
            "*",
            "",
            "eth*",
        ];
        let word = proptest::sample::select(words.to_vec());
        let leaf = prop_oneof![
            word.clone().prop_map(Value::from),
            any::<u64>().prop_map(Value::from),
            (0..130u64).prop_map(Value::from),
            any::<bool>().prop_map(Value::from),
            Just(Value::Null),
            ".{0,6}".prop_map(Value::from),
        ];
        leaf.prop_recursive(6, 48, 4, move |inner| {
            prop_oneof![
                proptest::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                proptest::collection::vec((word.clone(), inner), 1..4)
                    .prop_map(|pairs| pairs.into_iter().map(|(k, v)| (k.to_owned(), v)).collect::<Value>()),
            ]
        })
    }

    /// A listing of one table whose statements are real ones with something else put in.
    fn listing() -> impl Strategy<Value = String> {
        let mut real: Vec<Value> = vec![];
        for text in [include_str!("captures/constructs.json"), include_str!("captures/zoo.json")] {
            let value: Value = serde_json::from_str(text).expect("JSON");
            let objects = value["nftables"].as_array().expect("a list");
            real.extend(objects.iter().filter_map(|o| o["rule"]["expr"].as_array()).flatten().cloned());
        }
        let statement = prop_oneof![
            3 => proptest::sample::select(real.clone()),
            1 => json(),
            1 => (proptest::sample::select(real), json()).prop_map(|(mut real, other)| {
                if let Some(right) = real.get_mut("match").and_then(|m| m.get_mut("right")) {
                    *right = other;
                }
                real
            }),
        ];
        let rules = proptest::collection::vec(proptest::collection::vec(statement, 0..5), 0..12);
        (rules, json(), json()).prop_map(|(rules, elements, flags)| {
            let chain = |name: &str, kind: &str, hook: &str| {
                serde_json::json!({"chain": {"family": "inet", "table": "t", "name": name, "type": kind, "hook": hook,
                    "prio": -100, "policy": "accept"}})
            };
            let mut list = vec![
                serde_json::json!({"table": {"family": "inet", "name": "t", "flags": flags}}),
                serde_json::json!({"set": {"family": "inet", "table": "t", "name": "s", "type": "mark", "elem": [elements]}}),
                chain("c", "filter", "input"),
                chain("n", "nat", "prerouting"),
                chain("i", "filter", "ingress"),
                chain("mesh", "filter", "forward"),
            ];
            for (at, expr) in rules.into_iter().enumerate() {
                let chain = ["c", "n", "i", "mesh", "public", "forward-public", "local-lan"][at % 7];
                list.push(serde_json::json!({"rule": {"family": "inet", "table": "t", "chain": chain, "expr": expr}}));
            }
            serde_json::json!({ "nftables": list }).to_string()
        })
    }

    proptest! {
        #[test]
        fn rules_that_are_passed_over_would_not_have_matched(
            rules in proptest::collection::vec(rule_of_a_long_chain(), SIEVE_FROM..7 * SIEVE_FROM),
        ) {
            let (whole, pieces) = (in_pieces(&rules, rules.len()), in_pieces(&rules, SIEVE_FROM - 1));
            let evaluator = Evaluator::new(&whole);
            for source in ["203.0.113.9", "198.51.100.9", "2001:db8:9::9"] {
                for to in ["tcp/21", "udp/21", "tcp/443", "tcp/24", "tcp/999", "udp/2000"] {
                    let packet = packet(&format!("{to} from {source}"));
                    let (sieved, looked_at) = (evaluator.judge(&packet, &here), judge(&pieces, &packet, &here));
                    prop_assert_eq!(sieved.verdict, looked_at.verdict, "{} from {}", to, source);
                    prop_assert_eq!(sieved.by.is_some(), looked_at.by.is_some());
                    let limits = (evaluator.limited(&packet, &here), Evaluator::new(&pieces).limited(&packet, &here));
                    prop_assert_eq!(limits.0, limits.1, "{} from {}", to, source);
                }
            }
        }

        #[test]
        fn ports_of_one_group_are_judged_alike(
            rules in proptest::collection::vec(rule_of_a_long_chain(), 1..3 * SIEVE_FROM),
            proto in proptest::sample::select(vec!["tcp", "udp"]),
        ) {
            let rules = in_pieces(&rules, rules.len());
            let (evaluator, alike) = (Evaluator::new(&rules), Alike::of(&rules));
            let mut known = HashMap::new();
            for port in [1, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 442, 443, 444, 999, 1000, 1001, 65535] {
                let packet = packet(&format!("{proto}/{port} from 203.0.113.9"));
                let judged = (evaluator.judge(&packet, &here), evaluator.limited(&packet, &here));
                let group = alike.group(packet.port);
                prop_assert_eq!(known.entry(group).or_insert(judged.clone()), &judged, "{}", port);
            }
        }

        #[test]
        fn nothing_panics_and_every_packet_gets_an_answer(text in listing(), port in 1u16.., tcp: bool, v4: bool) {
            let ruleset = decode::ruleset(text.as_bytes()).expect("a listing");
            let source = if v4 { "203.0.113.9" } else { "2001:db8:9::9" };
            let packet = packet(&format!("{}/{port} from {source}", if tcp { "tcp" } else { "udp" }));
            judge(&ruleset, &packet, &here);
            published(&ruleset);
            for table in &ruleset.tables {
                render::table(table);
                let document = super::super::encode::transaction(table, Some(table));
                prop_assert!(serde_json::from_str::<Value>(&document).is_ok());
                let mut awake = table.clone();
                awake.dormant = false;
                awake.chains.iter_mut().for_each(|c| c.rules.retain(|r| *r != unclear_flags()));
                let found = awake.clone();
                prop_assert_eq!(super::super::compare::changes(&awake, Some(&found)), vec![]);
            }
        }

        #[test]
        fn any_text_is_decoded_or_refused(text in ".{0,60}", value in json()) {
            let _ = decode::ruleset(text.as_bytes());
            let _ = decode::ruleset(value.to_string().as_bytes());
            let _ = decode::ruleset(serde_json::json!({"nftables": value}).to_string().as_bytes());
        }
    }
}
