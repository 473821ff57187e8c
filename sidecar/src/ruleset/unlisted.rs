//! What the kernel holds of a rule and nft does not list: the parts of xtables, and conditions that nft takes for
//! its own.
//!
//! nft adds a condition wherever an expression needs one (`meta l4proto tcp` for `tcp dport 22`), and leaves it out
//! of its listing again. It does so with some that were asked for: `meta nfproto ipv4 tcp dport 22 reject with tcp
//! reset` reads as a rule of both families (1.0.6), and `meta protocol ip6 ip saddr 192.0.2.1` in a table of IPv4,
//! which nothing meets, as one that asks for the address alone. So every condition of those kinds is read from the
//! kernel, and put back where the listing doesn't imply it.

use std::collections::HashMap;

use super::xt::Part;
use super::{Match, Op, Operand, Statement, TableFamily, Term, normal};

/// What is known of rules beside their listing.
#[derive(Debug, Default)]
pub struct Unlisted {
    /// By family, table and chain.
    rules: HashMap<(TableFamily, String, String), ByHandle>,
    /// The one table whose listing is taken for all of it where nothing is known; `None`: that of every table.
    as_listed: Option<(TableFamily, &'static str)>,
    matters: bool,
    count: usize,
}

/// `None`: nothing that its listing lacks.
type ByHandle = HashMap<u64, Option<Box<Held>>>;

/// What one rule holds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Held {
    /// In the order in which the rule holds them, as all of these.
    pub parts: Vec<Part>,
    pub gates: Vec<Gate>,
    /// How often it sets something of the packet.
    pub sets: u16,
    /// It may reject, for which nft leaves out more than for other verdicts.
    pub rejects: bool,
}

/// A condition that one value of the packet is this.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gate {
    pub key: Key,
    pub value: u16,
    /// So often the rule sets something of the packet before it asks for this.
    pub after: u16,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Key {
    /// NFPROTO_*.
    Family,
    /// By its number in Ethernet.
    Protocol,
    /// `ip protocol` and `ip6 nexthdr`, too.
    L4proto,
    /// ARPHRD_*.
    LinkType,
    CtFamily,
    CtProtocol,
}

impl Unlisted {
    /// To which all rules of the kernel are added. One that is not may hold more than its listing says, but for a
    /// table that is compared, rule by rule, with what it should be.
    pub fn of_kernel(compared: (TableFamily, &'static str)) -> Self {
        Self { as_listed: Some(compared), ..Self::default() }
    }

    pub fn add(&mut self, family: TableFamily, table: String, chain: String, handle: u64, held: Held) {
        self.matters |= !held.parts.is_empty() || held.gates.iter().any(|gate| held.may_lack(*gate, family));
        let nothing = held == Held { sets: held.sets, rejects: held.rejects, ..Held::default() };
        let held = (!nothing).then(|| Box::new(held));
        let before = self.rules.entry((family, table, chain)).or_default().insert(handle, held);
        self.count += usize::from(before.is_none());
    }

    /// Rules that were added.
    pub fn count(&self) -> usize {
        self.count
    }

    /// Whether a listing may mean something else without this.
    pub fn matters(&self) -> bool {
        self.matters
    }

    /// `None`: nothing that the listing lacks is known, and that may be something.
    pub(super) fn take(
        &mut self,
        family: TableFamily,
        table: &str,
        chain: &str,
        handle: Option<u64>,
    ) -> Option<Box<Held>> {
        let rules = self.rules.get_mut(&(family, table.to_owned(), chain.to_owned()));
        match handle.and_then(|handle| rules?.remove(&handle)) {
            Some(held) => Some(held.unwrap_or_default()),
            None => self.as_listed.is_none_or(|listed| listed == (family, table)).then(Box::default),
        }
    }
}

impl Held {
    /// Whether nft is known to leave this out, beside what it has put in itself.
    fn may_lack(&self, gate: Gate, family: TableFamily) -> bool {
        match gate.key {
            Key::Family | Key::Protocol => {
                let contradicts =
                    matches!(family, TableFamily::Ip | TableFamily::Ip6) && !gate.always_holds(family);
                self.rejects || contradicts || self.of_conntrack()
            }
            Key::L4proto => false,
            Key::LinkType | Key::CtFamily | Key::CtProtocol => true,
        }
    }

    fn of_conntrack(&self) -> bool {
        self.gates.iter().any(|gate| matches!(gate.key, Key::CtFamily | Key::CtProtocol))
    }
}

/// Puts conditions back that the listing of a rule does not imply.
pub(super) fn complete(statements: &mut Vec<Statement>, held: &Held, family: TableFamily) {
    let sets: Vec<usize> =
        statements.iter().enumerate().filter(|(_, s)| is_set(s)).map(|(at, _)| at).collect();
    // Where the two don't count alike, nobody knows where in the rule a condition stood.
    let counted = sets.len() == usize::from(held.sets);
    let mut missing = Vec::new();
    for gate in held.gates.iter().filter(|gate| !gate.always_holds(family)) {
        let end = match sets.get(usize::from(gate.after)) {
            Some(end) if counted => *end,
            _ => statements.len(),
        };
        if !statements[..end].iter().any(|s| implies(s, *gate)) && !missing.contains(gate) {
            missing.push(*gate);
        }
    }
    // From the last on, so that places found before still hold.
    for gate in missing.into_iter().rev() {
        let place = match usize::from(gate.after).checked_sub(1) {
            Some(last) if counted => sets.get(last).map_or(0, |at| at + 1),
            _ => 0,
        };
        let condition = match counted {
            true => Statement::Match(gate.matched()),
            false => doubt(),
        };
        statements.insert(place, condition);
    }
}

/// For a rule of which only the listing is known: it may ask for more, if it asks for anything in a header or rejects.
pub(super) fn doubted(statements: &mut Vec<Statement>) {
    let asks = |s: &Statement| match s {
        Statement::Match(m) => asks_a_header(&m.left),
        Statement::Vmap { key, .. } => asks_a_header(key),
        Statement::Reject { .. } => true,
        _ => false,
    };
    if statements.iter().any(asks) {
        statements.insert(0, doubt());
    }
}

fn doubt() -> Statement {
    Statement::Maybe(
        "conditions that nft may have left out: the rule changed, or could not be read, meanwhile".into(),
    )
}

fn asks_a_header(term: &Term) -> bool {
    match term {
        Term::Payload { .. } => true,
        Term::Ct { key, .. } => key == "protocol",
        Term::And { term, .. } => asks_a_header(term),
        Term::Concat(terms) => terms.iter().any(asks_a_header),
        _ => false,
    }
}

/// Whether the statement sets something that later rules, or later parts of this one, may ask for.
fn is_set(statement: &Statement) -> bool {
    let (Statement::Neutral(json) | Statement::Unknown(json)) = statement else { return false };
    [r#"{"mangle":{"key":{"meta""#, r#"{"mangle":{"key":{"ct""#].iter().any(|head| json.starts_with(head))
}

fn implies(statement: &Statement, gate: Gate) -> bool {
    let wanted = gate.matched().left;
    let value = |term: &Term, operand: &Operand| normal::number(term, operand) == Some(gate.value.into());
    match statement {
        Statement::Match(Match { left, op: Op::Eq, right: listed }) if *left == wanted => value(left, listed),
        Statement::Match(m) => {
            let of_header = matches!(&m.left, Term::Payload { protocol, field }
                if matches!((protocol.as_str(), field.as_str()), ("ip", "protocol") | ("ip6", "nexthdr")));
            let same = gate.key == Key::L4proto && of_header && m.op == Op::Eq && value(&m.left, &m.right);
            same || gate.follows_from(&m.left)
        }
        Statement::Vmap { key, .. } => gate.follows_from(key),
        Statement::Reject { tcp_reset: true } => (gate.key, gate.value) == (Key::L4proto, 6),
        _ => false,
    }
}

impl Gate {
    fn matched(self) -> Match {
        let meta = |key: &str| Term::Meta(key.into());
        let ct = |key: &str| Term::Ct { key: key.into(), dir: None };
        let left = match self.key {
            Key::Family => meta("nfproto"),
            Key::Protocol => meta("protocol"),
            Key::L4proto => meta("l4proto"),
            Key::LinkType => meta("iiftype"),
            Key::CtFamily => ct("l3proto"),
            Key::CtProtocol => ct("protocol"),
        };
        let name = match (self.key, self.value) {
            (Key::Family, 2) => Some("ipv4"),
            (Key::Family, 10) => Some("ipv6"),
            (Key::Protocol, 0x0800) => Some("ip"),
            (Key::Protocol, 0x86dd) => Some("ip6"),
            (Key::L4proto | Key::CtProtocol, 6) => Some("tcp"),
            (Key::L4proto | Key::CtProtocol, 17) => Some("udp"),
            _ => None,
        };
        let right = name.map_or(Operand::Number(self.value.into()), |name| Operand::Text(name.into()));
        Match { left, op: Op::Eq, right }
    }

    /// For every packet that a table of this family sees.
    fn always_holds(self, family: TableFamily) -> bool {
        match family {
            TableFamily::Ip => matches!((self.key, self.value), (Key::Family, 2) | (Key::Protocol, 0x0800)),
            TableFamily::Ip6 => matches!((self.key, self.value), (Key::Family, 10) | (Key::Protocol, 0x86dd)),
            _ => false,
        }
    }

    /// Whether only packets that pass have a value for this.
    fn follows_from(self, term: &Term) -> bool {
        match (self.key, self.value) {
            (Key::Family, number) => normal::term_implies(term, "nfproto", number.into()),
            (Key::Protocol, 0x0800) => normal::term_implies(term, "nfproto", 2),
            (Key::Protocol, 0x86dd) => normal::term_implies(term, "nfproto", 10),
            (Key::L4proto, number) => normal::term_implies(term, "l4proto", number.into()),
            (Key::LinkType, 1) => of_ethernet(term),
            _ => false,
        }
    }
}

fn of_ethernet(term: &Term) -> bool {
    match term {
        Term::Payload { protocol, .. } => matches!(protocol.as_str(), "ether" | "vlan"),
        Term::And { term, .. } => of_ethernet(term),
        Term::Concat(terms) => terms.iter().any(of_ethernet),
        _ => false,
    }
}
