//! One form for rules that mean the same. nft drops matches that others imply, merges the
//! intervals of a set, and names numbers; two rules are compared in the form made here, in
//! which none of that shows. Every step keeps the meaning, so equal forms are equal rules.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;

use super::{Match, Op, Operand, Rule, Statement, TableFamily, Term, VerdictMap};
use crate::observed::Amount;
use crate::terms::Family;

/// The statements of a rule in normal form.
pub fn statements(rule: &Rule, family: TableFamily) -> Vec<Statement> {
    let mut list: Vec<Statement> = rule.statements.iter().map(statement).collect();
    // A bare TCP reset brings its own `meta l4proto tcp`.
    if list.iter().any(|s| matches!(s, Statement::Reject { tcp_reset: true })) {
        list.retain(|s| !is_l4proto(s, 6));
    }
    th_of_one_protocol(&mut list);
    let mut at = 0;
    while at < list.len() {
        if implied(&list, at, family) {
            list.remove(at);
        } else {
            at += 1;
        }
    }
    list
}

/// The number that an IP protocol goes by, for the names that nft prints.
pub(super) fn protocol_number(name: &str) -> Option<u64> {
    Some(match name {
        "icmp" => 1,
        "igmp" => 2,
        "ipencap" | "ipip" => 4,
        "tcp" => 6,
        "udp" => 17,
        "dccp" => 33,
        "ipv6" => 41,
        "gre" => 47,
        "esp" => 50,
        "ah" => 51,
        "ipv6-icmp" | "icmpv6" => 58,
        "ospf" => 89,
        "pim" => 103,
        "comp" | "ipcomp" => 108,
        "vrrp" => 112,
        "sctp" => 132,
        "udplite" => 136,
        _ => return None,
    })
}

/// The value of an operand on the right of `term`, as a number where it has one. Addresses
/// are their bits.
pub(super) fn number(term: &Term, value: &Operand) -> Option<u128> {
    match value {
        Operand::Number(n) => Some((*n).into()),
        Operand::Address(a) => Some(bits(*a)),
        Operand::Text(name) => name_number(term, name).map(u128::from),
        // Both ends of a range print as names where they have one.
        _ => None,
    }
}

fn name_number(term: &Term, name: &str) -> Option<u64> {
    let protocol = |name: &str| protocol_number(name).or_else(|| name.parse().ok());
    match term {
        Term::And { term, .. } => name_number(term, name),
        Term::Meta(key) => match (key.as_str(), name) {
            ("l4proto", _) => protocol(name),
            ("nfproto", "ipv4") => Some(2),
            ("nfproto", "ipv6") => Some(10),
            ("protocol", "ip") => Some(0x0800),
            ("protocol", "arp") => Some(0x0806),
            ("protocol", "ip6") => Some(0x86dd),
            ("pkttype", "host" | "unicast") => Some(0),
            ("pkttype", "broadcast") => Some(1),
            ("pkttype", "multicast") => Some(2),
            ("pkttype", "other") => Some(3),
            _ => None,
        },
        Term::Payload { protocol: p, field } => match (p.as_str(), field.as_str(), name) {
            ("ip", "protocol", _) | ("ip6", "nexthdr", _) => protocol(name),
            ("tcp", "flags", _) => tcp_flag(name),
            ("icmp", "type", _) => icmp_type(name),
            ("icmpv6", "type", _) => icmpv6_type(name),
            ("tcp" | "udp" | "th", "dport" | "sport", _) => name.parse().ok(),
            _ => None,
        },
        Term::Ct { key, .. } => match (key.as_str(), name) {
            ("protocol", _) => protocol(name),
            ("l3proto", "ipv4") => Some(2),
            ("l3proto", "ipv6") => Some(10),
            ("direction", "original") => Some(0),
            ("direction", "reply") => Some(1),
            ("state", "invalid") => Some(1),
            ("state", "established") => Some(2),
            ("state", "related") => Some(4),
            ("state", "new") => Some(8),
            ("state", "untracked") => Some(64),
            ("status", "expected") => Some(1),
            ("status", "seen-reply") => Some(2),
            ("status", "assured") => Some(4),
            ("status", "confirmed") => Some(8),
            ("status", "snat") => Some(16),
            ("status", "dnat") => Some(32),
            ("status", "dying") => Some(512),
            _ => None,
        },
        _ => None,
    }
}

fn tcp_flag(name: &str) -> Option<u64> {
    Some(match name {
        "fin" => 1,
        "syn" => 2,
        "rst" => 4,
        "psh" => 8,
        "ack" => 16,
        "urg" => 32,
        "ecn" => 64,
        "cwr" => 128,
        _ => return None,
    })
}

fn icmp_type(name: &str) -> Option<u64> {
    Some(match name {
        "echo-reply" => 0,
        "destination-unreachable" => 3,
        "source-quench" => 4,
        "redirect" => 5,
        "echo-request" => 8,
        "router-advertisement" => 9,
        "router-solicitation" => 10,
        "time-exceeded" => 11,
        "parameter-problem" => 12,
        "timestamp-request" => 13,
        "timestamp-reply" => 14,
        "info-request" => 15,
        "info-reply" => 16,
        "address-mask-request" => 17,
        "address-mask-reply" => 18,
        _ => return None,
    })
}

fn icmpv6_type(name: &str) -> Option<u64> {
    Some(match name {
        "destination-unreachable" => 1,
        "packet-too-big" => 2,
        "time-exceeded" => 3,
        "parameter-problem" => 4,
        "echo-request" => 128,
        "echo-reply" => 129,
        "mld-listener-query" => 130,
        "mld-listener-report" => 131,
        "mld-listener-done" | "mld-listener-reduction" => 132,
        "nd-router-solicit" => 133,
        "nd-router-advert" => 134,
        "nd-neighbor-solicit" => 135,
        "nd-neighbor-advert" => 136,
        "nd-redirect" => 137,
        "router-renumbering" => 138,
        "ind-neighbor-solicit" => 141,
        "ind-neighbor-advert" => 142,
        "mld2-listener-report" => 143,
        _ => return None,
    })
}

pub(super) fn bits(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(a) => u32::from(a).into(),
        IpAddr::V6(a) => a.into(),
    }
}

/// The interval that a value stands for. The family is there for addresses, so that
/// 0.0.0.1 is not ::1.
pub(super) fn interval(term: &Term, value: &Operand) -> Option<(Option<Family>, u128, u128)> {
    match value {
        Operand::Prefix(net) => Some((Some(Family::of_net(net)), bits(net.network()), bits(net.broadcast()))),
        Operand::Range(low, high) => {
            let (family, low, _) = interval(term, low)?;
            let (other, _, high) = interval(term, high)?;
            (family == other && low <= high).then_some((family, low, high))
        }
        Operand::Address(a) => Some((Some(Family::of(*a)), bits(*a), bits(*a))),
        _ => number(term, value).map(|n| (None, n, n)),
    }
}

fn statement(statement: &Statement) -> Statement {
    match statement {
        Statement::Counter(_) => Statement::Counter(Amount::default()),
        Statement::Match(m) => Statement::Match(comparison(m)),
        Statement::Vmap { key, map: VerdictMap::Pairs(pairs) } => {
            let key = term(key);
            let mut pairs: Vec<_> = pairs.iter().map(|(k, v)| (single(&key, k), v.clone())).collect();
            pairs.sort_by(|a, b| a.0.cmp(&b.0));
            Statement::Vmap { key, map: VerdictMap::Pairs(pairs) }
        }
        Statement::Redirect { port: Some(port) } => {
            Statement::Redirect { port: Some(single(&Term::Unknown(String::new()), port)) }
        }
        Statement::Neutral(json) => Statement::Neutral(ordered(json)),
        Statement::Maybe(json) => Statement::Maybe(ordered(json)),
        Statement::Unknown(json) => Statement::Unknown(ordered(json)),
        other => other.clone(),
    }
}

/// JSON with its keys in one order.
fn ordered(json: &str) -> String {
    match serde_json::from_str::<serde_json::Value>(json) {
        Ok(mut value) => {
            value.sort_all_objects();
            value.to_string()
        }
        Err(_) => json.to_owned(),
    }
}

fn comparison(m: &Match) -> Match {
    let left = term(&m.left);
    let mut op = m.op;
    let mut right = match (&m.right, op) {
        (Operand::Set(flags) | Operand::Bits(flags), Op::Any | Op::NoneOf) => {
            Operand::Set(sorted(flags.iter().map(|f| single(&left, f)).collect()))
        }
        (Operand::Set(values), _) => merged(&left, values),
        (other, _) => merged(&left, std::slice::from_ref(other)),
    };
    if let Operand::Set(values) = &mut right
        && values.len() == 1
    {
        right = values.remove(0);
    }
    // A flow has one state, so "this state" and "one of these bits" are the same question.
    if matches!(&left, Term::Ct { key, .. } if key == "state")
        && op == Op::Any
        && !matches!(right, Operand::Unknown(_) | Operand::Bits(_))
    {
        op = Op::Eq;
        if let Operand::Set(values) = right {
            right = merged(&left, &values);
        }
    }
    Match { left, op, right }
}

fn term(term: &Term) -> Term {
    match term {
        Term::And { term: inner, mask } => {
            let inner = self::term(inner);
            let mask = match mask {
                Operand::Set(flags) | Operand::Bits(flags) => bitmask(&inner, flags),
                one => single(&inner, one),
            };
            Term::And { term: Box::new(inner), mask }
        }
        Term::Concat(terms) => Term::Concat(terms.iter().map(self::term).collect()),
        Term::Fib { flags, result } => {
            let mut flags = flags.clone();
            flags.sort();
            Term::Fib { flags, result: result.clone() }
        }
        other => other.clone(),
    }
}

/// One value: names become numbers, prefixes and ranges of one value become that value,
/// ranges that are a prefix stay ranges of addresses.
fn single(term: &Term, value: &Operand) -> Operand {
    match value {
        Operand::Set(values) => Operand::Set(sorted(values.iter().map(|v| single(term, v)).collect())),
        Operand::Bits(flags) => bitmask(term, flags),
        Operand::Concat(parts) => {
            let terms: &[Term] = if let Term::Concat(terms) = term { terms } else { &[] };
            let unknown = Term::Unknown(String::new());
            let parts = parts.iter().enumerate();
            Operand::Concat(parts.map(|(i, p)| single(terms.get(i).unwrap_or(&unknown), p)).collect())
        }
        _ => match interval(term, value) {
            Some((family, low, high)) => of_interval(family, low, high),
            None => value.clone(),
        },
    }
}

fn bitmask(term: &Term, flags: &[Operand]) -> Operand {
    let numbers: Option<Vec<u128>> = flags.iter().map(|f| number(term, f)).collect();
    match numbers.map(|n| n.into_iter().fold(0, |all, bit| all | bit)).and_then(|n| u64::try_from(n).ok()) {
        Some(n) => Operand::Number(n),
        None => Operand::Bits(sorted(flags.to_vec())),
    }
}

fn sorted(mut values: Vec<Operand>) -> Vec<Operand> {
    values.sort();
    values.dedup();
    values
}

/// Whether the same is in two named sets of addresses, however it is written.
pub(super) fn same_list(a: &[Operand], b: &[Operand]) -> bool {
    let any = Term::Unknown(String::new());
    a == b || intervals(&any, a) == intervals(&any, b)
}

/// A set as its disjoint intervals: nft merges some that touch and leaves others.
fn merged(term: &Term, values: &[Operand]) -> Operand {
    let (joined, mut rest) = intervals(term, values);
    rest.extend(joined.into_iter().map(|(family, low, high)| of_interval(family, low, high)));
    let mut values = sorted(rest);
    if values.len() == 1 { values.remove(0) } else { Operand::Set(values) }
}

pub(super) type Interval = (Option<Family>, u128, u128);

/// The disjoint intervals of these values in their order, and the values that are none, sorted.
pub(super) fn intervals(term: &Term, values: &[Operand]) -> (Vec<Interval>, Vec<Operand>) {
    let mut intervals = vec![];
    let mut rest = vec![];
    for value in values {
        match interval(term, value) {
            Some(found) => intervals.push(found),
            None => rest.push(single(term, value)),
        }
    }
    intervals.sort();
    let mut joined: Vec<Interval> = vec![];
    for (family, low, high) in intervals {
        match joined.last_mut() {
            Some((f, _, end)) if *f == family && low <= end.saturating_add(1) => *end = high.max(*end),
            _ => joined.push((family, low, high)),
        }
    }
    (joined, sorted(rest))
}

fn of_interval(family: Option<Family>, low: u128, high: u128) -> Operand {
    let value = |n: u128| match family {
        Some(Family::Ipv4) => Operand::Address(Ipv4Addr::from(n as u32).into()),
        Some(Family::Ipv6) => Operand::Address(Ipv6Addr::from(n).into()),
        None => Operand::Number(u64::try_from(n).unwrap_or(u64::MAX)),
    };
    if low == high { value(low) } else { Operand::Range(Box::new(value(low)), Box::new(value(high))) }
}

fn is_l4proto(statement: &Statement, number: u64) -> bool {
    matches!(statement, Statement::Match(Match { left: Term::Meta(key), op: Op::Eq, right: Operand::Number(n) })
        if key == "l4proto" && *n == number)
}

/// `meta l4proto tcp th dport 53` is listed as `tcp dport 53`.
fn th_of_one_protocol(list: &mut [Statement]) {
    let mut known = None;
    for statement in list {
        match statement {
            Statement::Match(Match { left: Term::Meta(key), op: Op::Eq, right: Operand::Number(n) })
                if key == "l4proto" =>
            {
                known = match n {
                    6 => Some("tcp"),
                    17 => Some("udp"),
                    _ => None,
                }
            }
            Statement::Match(Match { left: Term::Payload { protocol, .. }, .. }) if protocol == "th" => {
                if let Some(name) = known {
                    *protocol = name.into();
                }
            }
            _ => {}
        }
    }
}

/// Whether the match at `at` follows from another one: from one before it, or from one
/// behind it with nothing but matches in between, since those have no effect of their own.
fn implied(list: &[Statement], at: usize, family: TableFamily) -> bool {
    let Some(Statement::Match(Match { left: Term::Meta(key), op: Op::Eq, right: Operand::Number(wanted) })) =
        list.get(at)
    else {
        return false;
    };
    if key == "nfproto" && matches!((family, wanted), (TableFamily::Ip, 2) | (TableFamily::Ip6, 10)) {
        return true;
    }
    let implies = |s: &Statement| match s {
        Statement::Match(m) => term_implies(&m.left, key, *wanted),
        Statement::Vmap { key: term, .. } => term_implies(term, key, *wanted),
        _ => false,
    };
    let behind = list[at + 1..].iter();
    list[..at].iter().any(|s| matches!(s, Statement::Match(_)) && implies(s))
        || behind
            .clone()
            .take_while(|s| matches!(s, Statement::Match(_)))
            .chain(behind.clone().find(|s| !matches!(s, Statement::Match(_))))
            .any(implies)
}

/// Whether only packets of which `meta KEY` is this have a value for the term.
pub(super) fn term_implies(term: &Term, key: &str, wanted: u64) -> bool {
    match term {
        Term::Payload { protocol, .. } => match (key, protocol.as_str()) {
            ("l4proto", "tcp") => wanted == 6,
            ("l4proto", "udp") => wanted == 17,
            ("l4proto", "icmp") => wanted == 1,
            ("l4proto", "icmpv6") => wanted == 58,
            ("nfproto", "ip" | "icmp") => wanted == 2,
            ("nfproto", "ip6" | "icmpv6") => wanted == 10,
            _ => false,
        },
        Term::Ct { key: of, .. } => match (key, of.split_once(' ')) {
            ("nfproto", Some(("ip", _))) => wanted == 2,
            ("nfproto", Some(("ip6", _))) => wanted == 10,
            _ => false,
        },
        Term::And { term, .. } => term_implies(term, key, wanted),
        Term::Concat(terms) => terms.iter().any(|t| term_implies(t, key, wanted)),
        _ => false,
    }
}

/// A prefix where the range is one.
pub fn prefix_of(low: IpAddr, high: IpAddr) -> Option<IpNet> {
    let width: u32 = if low.is_ipv4() { 32 } else { 128 };
    if low.is_ipv4() != high.is_ipv4() {
        return None;
    }
    let free = 128 - (bits(low) ^ bits(high)).leading_zeros();
    let net = IpNet::new(low, u8::try_from(width.checked_sub(free)?).ok()?).ok()?;
    (net.network() == low && net.broadcast() == high).then_some(net)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ruleset::decode;

    fn form(expr: &str) -> Vec<Statement> {
        let json: serde_json::Value = serde_json::from_str(expr).expect("JSON");
        let list = json.as_array().expect("a list").iter().map(decode::statement).collect();
        statements(&Rule { statements: list, ..Rule::default() }, TableFamily::Inet)
    }

    fn same(a: &str, b: &str) {
        assert_eq!(form(a), form(b));
    }

    fn other(a: &str, b: &str) {
        assert_ne!(form(a), form(b));
    }

    fn eq(left: &str, right: &str) -> String {
        format!(r#"{{"match":{{"op":"==","left":{left},"right":{right}}}}}"#)
    }

    const L4: &str = r#"{"meta":{"key":"l4proto"}}"#;
    const DPORT: &str = r#"{"payload":{"protocol":"tcp","field":"dport"}}"#;
    const SADDR: &str = r#"{"payload":{"protocol":"ip","field":"saddr"}}"#;

    #[test]
    fn implied_matches_go_and_others_stay() {
        let dport = eq(DPORT, "22");
        let th = eq(r#"{"payload":{"protocol":"th","field":"dport"}}"#, "22");
        let nfproto = eq(r#"{"meta":{"key":"nfproto"}}"#, r#""ipv4""#);
        let saddr = eq(SADDR, r#""1.1.1.1""#);
        let (tcp, udp) = (eq(L4, r#""tcp""#), eq(L4, r#""udp""#));
        same(&format!("[{tcp},{dport}]"), &format!("[{dport}]"));
        same(&format!("[{},{th}]", eq(L4, "6")), &format!("[{dport}]"));
        same(&format!("[{nfproto},{saddr}]"), &format!("[{saddr}]"));
        other(&format!("[{udp},{dport}]"), &format!("[{dport}]"));
        let dport_of_udp = dport.replace("tcp", "udp");
        same(&format!("[{udp},{dport_of_udp}]"), &format!("[{dport_of_udp}]"));
        other(&format!("[{tcp},{dport_of_udp}]"), &format!("[{dport_of_udp}]"));
        other(&format!("[{nfproto},{dport}]"), &format!("[{dport}]"));
        // The counter sees more packets where the match stands behind it.
        let count = r#"{"counter":null}"#;
        other(&format!("[{tcp},{count},{dport}]"), &format!("[{count},{dport}]"));
    }

    #[test]
    fn sets_are_compared_by_what_is_in_them() {
        let ports = |right: &str| format!("[{}]", eq(DPORT, right));
        same(&ports(r#"{"set":[22]}"#), &ports("22"));
        same(&ports(r#"{"range":[22,22]}"#), &ports("22"));
        same(&ports(r#"{"set":[443,80,{"range":[81,90]}]}"#), &ports(r#"{"set":[{"range":[80,90]},443]}"#));
        other(&ports(r#"{"set":[80,443]}"#), &ports(r#"{"range":[80,443]}"#));
        let from = |right: &str| format!("[{}]", eq(SADDR, right));
        let prefix = |a: &str, n: u8| format!(r#"{{"prefix":{{"addr":"{a}","len":{n}}}}}"#);
        let halves = format!(r#"{{"set":[{},{}]}}"#, prefix("10.0.0.0", 25), prefix("10.0.0.128", 25));
        same(&from(&halves), &from(&prefix("10.0.0.0", 24)));
        same(&from(&prefix("10.0.0.1", 32)), &from(r#""10.0.0.1""#));
        other(&from(&prefix("10.0.0.0", 25)), &from(&prefix("10.0.0.0", 24)));
    }

    #[test]
    fn any_of_some_flags_is_not_all_of_them() {
        let flags = |key: &str, op: &str, right: &str| {
            format!(r#"[{{"match":{{"op":"{op}","left":{{"ct":{{"key":"{key}"}}}},"right":{right}}}}}]"#)
        };
        let both = r#"["established","related"]"#;
        same(&flags("state", "in", both), &flags("state", "==", r#"{"set":["related","established"]}"#));
        other(&flags("state", "in", both), &flags("state", "==", r#"{"|":["established","related"]}"#));
        other(&flags("status", "in", r#""dnat""#), &flags("status", "==", r#""dnat""#));
        other(&flags("status", "in", r#""dnat""#), &flags("status", "!", r#""dnat""#));
    }
}
