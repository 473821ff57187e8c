//! What xtables put into rules of nftables: matches and targets that iptables-nft writes and
//! nft names without their parameters. The kernel gives those as the bytes of the structs in
//! `linux/netfilter/xt_*.h` (since Linux 3.13); here they become statements that mean the
//! same. What is not understood keeps its name and stays `Maybe` or `Unknown`.
//!
//! Taken for granted in addition to what `evaluate` says: the stranger came without IPsec,
//! and has not knocked often enough before to be on a list of `recent` with a hit count.

use std::net::IpAddr;

use ipnet::IpNet;
use serde_json::{Value, json};

use super::{Match, Nat, Op, Operand, Statement, TableFamily, Term};

/// One match or target of a rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    pub target: bool,
    pub name: String,
    pub revision: u32,
    /// Its struct, padded to the alignment of a `u64`.
    pub info: Vec<u8>,
}

/// Whether these are the parts of the rule that nft lists so. nft may leave out their names.
pub(super) fn fit(listed: &[Value], parts: &[Part]) -> bool {
    let listed: Vec<&Value> = listed.iter().filter_map(|s| s.get("xt")).collect();
    let same = |(xt, part): (&&Value, &Part)| {
        let says = |key: &str, value: &str| xt.get(key).is_none_or(|found| found == value);
        says("name", &part.name) && says("type", kind(part.target))
    };
    listed.len() == parts.len() && listed.iter().zip(parts).all(same)
}

fn kind(target: bool) -> &'static str {
    if target { "target" } else { "match" }
}

/// What `-m NAME` or `-j NAME` is, for reasons; `None` where the JSON is not of xtables.
pub(super) fn named(value: &Value) -> Option<String> {
    let xt = value.get("xt")?;
    let name = xt.get("name").and_then(Value::as_str);
    let option = if xt.get("type").is_some_and(|t| t == "target") { "-j" } else { "-m" };
    Some(name.map_or("a rule of iptables that nft does not print".into(), |name| {
        format!("iptables' `{option} {}`", crate::terms::printable(name, 32))
    }))
}

/// A part whose parameters are not known: only the targets whose name alone says enough are
/// understood.
pub(super) fn unread(json: &Value) -> Statement {
    let text = |key: &str| json["xt"].get(key).and_then(Value::as_str).unwrap_or_default();
    let target = || Operand::Unknown(json.to_string());
    match (text("type"), text("name")) {
        ("match", "comment") => Statement::Neutral(json.to_string()),
        ("match", _) => Statement::Maybe(json.to_string()),
        (
            "target",
            "AUDIT" | "CHECKSUM" | "CLASSIFY" | "CONNMARK" | "CONNSECMARK" | "DSCP" | "ECN" | "HL" | "HMARK"
            | "IDLETIMER" | "LED" | "LOG" | "MARK" | "MASQUERADE" | "NFLOG" | "RATEEST" | "SECMARK" | "SET"
            | "SNAT" | "TCPMSS" | "TCPOPTSTRIP" | "TEE" | "TOS" | "TRACE" | "TTL",
        ) => Statement::Neutral(json.to_string()),
        ("target", "REJECT") => Statement::Reject { tcp_reset: false },
        ("target", "DNAT") => Statement::Dnat(Nat { address: Some(target()), port: None }),
        ("target", "REDIRECT") => Statement::Redirect { port: Some(target()) },
        _ => Statement::Unknown(json.to_string()),
    }
}

/// The statements that do what the part does.
pub(super) fn statements(part: &Part, family: TableFamily) -> Vec<Statement> {
    let unread = unread(&json!({"xt": {"name": part.name, "type": kind(part.target)}}));
    let info = Info { bytes: &part.info, v6: family == TableFamily::Ip6 };
    // The structs are laid out for one family each.
    if !matches!(family, TableFamily::Ip | TableFamily::Ip6) {
        return vec![unread];
    }
    let read = if part.target { target(part, info) } else { matched(part, info) };
    match read {
        Some((mut known, Whole)) => {
            // It always holds.
            if known.is_empty() {
                known.push(Statement::Neutral(r#"{"continue":null}"#.into()));
            }
            known
        }
        // What is known of it may rule it out.
        Some((mut known, InPart)) => {
            known.push(unread);
            known
        }
        None => vec![unread],
    }
}

/// Whether the statements say all that the part asks for.
enum Completeness {
    Whole,
    InPart,
}

use Completeness::{InPart, Whole};

type Read = Option<(Vec<Statement>, Completeness)>;

fn matched(part: &Part, info: Info) -> Read {
    let list = match (part.name.as_str(), part.revision) {
        ("addrtype", 1) => return addrtype(info),
        ("conntrack", revision @ 1..=3) => return conntrack(info, revision),
        ("state", 0) => vec![states(info.u32(0)?, 6, false)?],
        ("multiport", revision @ 0..=1) => multiport(info, revision)?,
        ("tcp", 0) => return tcp(info),
        ("udp", 0) => {
            let inverted = info.u8(8)?;
            [port("sport", info.u16(0)?, info.u16(2)?, inverted & 1 != 0)]
                .into_iter()
                .chain([port("dport", info.u16(4)?, info.u16(6)?, inverted & 2 != 0)])
                .flatten()
                .collect()
        }
        ("icmp", 0) => vec![icmp("icmp", info)?],
        ("icmp6", 0) => vec![icmp("icmpv6", info)?],
        ("pkttype", 0) => {
            let left = Term::Meta("pkttype".into());
            vec![equal(left, Operand::Number(info.u32(0)?.into()), info.u32(4)? != 0)]
        }
        ("mark", 1) => vec![mark(Term::Meta("mark".into()), info)?],
        ("connmark", 1) => vec![mark(ct("mark", None), info)?],
        ("iprange", 1) => iprange(info)?,
        ("recent", 0..=1) => recent(info)?,
        // The reverse path is taken to exist.
        ("rpfilter", 0) => constant(info.u8(0)? & 8 == 0),
        ("policy", 0) => policy(info)?,
        // `--physdev-is-bridged` alone: what a host gets or routes is not bridged.
        ("physdev", 0) if info.u8(65)? == 4 => constant(info.u8(64)? & 4 != 0),
        // Extension headers, which the packet has none of. Without them these never hold,
        // inverted or not.
        ("rt" | "frag" | "hbh" | "dst" | "mh" | "ah" | "esp", _) => constant(false),
        _ => return None,
    };
    Some((list, Whole))
}

fn target(part: &Part, info: Info) -> Read {
    let neutral = |value: Value| Statement::Neutral(value.to_string());
    let statement = match (part.name.as_str(), part.revision) {
        ("REJECT", 0) => Statement::Reject { tcp_reset: info.u32(0)? == if info.v6 { 6 } else { 7 } },
        ("DNAT", revision @ 0..=2) => {
            let range = range(info, revision == 0)?;
            Statement::Dnat(Nat { address: range.address, port: range.port })
        }
        ("REDIRECT", 0) => Statement::Redirect { port: range(info, !info.v6)?.port },
        // As nft says it: masked, then flipped.
        ("MARK", 2) => {
            let (value, mask) = (info.u32(0)?, info.u32(4)?);
            neutral(json!({"xt": {"to": "meta", "keep": !mask, "take": 0, "flip": value}}))
        }
        ("CONNMARK", revision @ 1..=2) => {
            let (value, ct_mask, mask) = (info.u32(0)?, info.u32(4)?, info.u32(8)?);
            let mode = match revision {
                1 => info.u8(12)?,
                _ if info.u8(13)? != 0 => return None,
                _ => info.u8(14)?,
            };
            neutral(json!({"xt": match mode {
                0 => json!({"to": "ct", "keep": !ct_mask, "take": 0, "flip": value}),
                1 => json!({"to": "ct", "keep": !ct_mask, "take": mask, "flip": 0}),
                2 => json!({"to": "meta", "keep": !mask, "take": ct_mask, "flip": 0}),
                _ => return None,
            }}))
        }
        ("CT", 0..=2) if info.u16(0)? & 1 != 0 => neutral(json!({"notrack": null})),
        // A zone, a helper, a timeout: the flow is tracked all the same.
        ("CT", 0..=2) => neutral(json!({"ct helper": null})),
        ("NOTRACK", 0) => neutral(json!({"notrack": null})),
        _ => return None,
    };
    Some((vec![statement], Whole))
}

/// struct xt_addrtype_info_v1
fn addrtype(info: Info) -> Read {
    let flags = info.u32(4)?;
    let mut list = vec![];
    for (key, types, inverted) in [("saddr", info.u16(0)?, flags & 1), ("daddr", info.u16(2)?, flags & 2)] {
        // Routes to nowhere make types that `evaluate` does not know.
        let names = [(1, "unicast"), (2, "local"), (3, "broadcast"), (4, "anycast"), (5, "multicast")];
        let wanted = names.iter().filter(|(bit, _)| types >> bit & 1 != 0);
        let wanted: Vec<Operand> = wanted.map(|(_, name)| Operand::Text((*name).into())).collect();
        if types == 0 {
            continue;
        }
        if types & !0x3e != 0 {
            return None;
        }
        let mut fib = vec![key.to_owned()];
        if flags & 4 != 0 {
            fib.push("iif".into());
        }
        if flags & 8 != 0 {
            fib.push("oif".into());
        }
        let left = Term::Fib { flags: fib, result: "type".into() };
        list.push(equal(left, set(wanted), inverted != 0));
    }
    Some((list, Whole))
}

/// struct xt_conntrack_mtinfo1, 2 and 3, which differ from offset 138 on.
fn conntrack(info: Info, revision: u32) -> Read {
    let l4proto = info.u16(136)?;
    let (flags, inverted) = (info.u16(146)?, info.u16(148)?);
    let (state, status) = match revision {
        1 => (u16::from(info.u8(150)?), u16::from(info.u8(151)?)),
        _ => (info.u16(150)?, info.u16(152)?),
    };
    let asks = |bit: u16| flags >> bit & 1 != 0;
    let not = |bit: u16| inverted >> bit & 1 != 0;
    let mut list = vec![];
    let mut whole = Whole;
    if asks(0) {
        list.push(states(state.into(), 8, not(0))?);
        // A packet without an entry that satisfies this skips all other conditions.
        let no_entry_passes = (state & 0x101 != 0) != not(0);
        if no_entry_passes && flags & !0x2001 != 0 {
            return None;
        }
    }
    if asks(1) {
        list.push(equal(ct("protocol", None), Operand::Number(l4proto.into()), not(1)));
    }
    let addresses = [
        (2, 0, "saddr", "original"),
        (3, 32, "daddr", "original"),
        (4, 64, "saddr", "reply"),
        (5, 96, "daddr", "reply"),
    ];
    for (bit, at, key, dir) in addresses.into_iter().filter(|(bit, ..)| asks(*bit)) {
        let family = if info.v6 { "ip6" } else { "ip" };
        match info.prefix(at) {
            Some(net) => {
                let left = ct(&format!("{family} {key}"), Some(dir));
                list.push(equal(left, Operand::Prefix(net), not(bit)));
            }
            None => whole = InPart,
        }
    }
    if asks(6) {
        let op = if not(6) { Op::NoneOf } else { Op::Any };
        list.push(compare(ct("status", None), op, Operand::Number(status.into())));
    }
    // How long an entry still lives.
    if asks(7) {
        whole = InPart;
    }
    let ports = [
        (8, 138, "proto-src", "original"),
        (9, 140, "proto-dst", "original"),
        (10, 142, "proto-src", "reply"),
        (11, 144, "proto-dst", "reply"),
    ];
    for (bit, at, key, dir) in ports.into_iter().filter(|(bit, ..)| asks(*bit)) {
        let (low, high) = match revision {
            3 => (info.u16(at)?, info.u16(at + 16)?),
            _ => (info.be16(at)?, info.be16(at)?),
        };
        list.push(equal(ct(key, Some(dir)), numbers(low, high), not(bit)));
    }
    if asks(12) {
        // Inverted means replies.
        let dir = if not(12) { "reply" } else { "original" };
        list.push(equal(ct("direction", None), Operand::Text(dir.into()), false));
    }
    Some((list, whole))
}

/// XT_CONNTRACK_STATE_*. `untracked`: the bit for it.
fn states(mask: u32, untracked: u32, inverted: bool) -> Option<Statement> {
    let names = [(0, "invalid"), (1, "established"), (2, "related"), (3, "new"), (untracked, "untracked")];
    let held = names.iter().filter(|(bit, _)| mask >> bit & 1 != 0);
    let held: Vec<Operand> = held.map(|(_, name)| Operand::Text((*name).into())).collect();
    // Whether NAT changed its address: not a state, but asked for like one.
    let nat = if untracked == 8 { [(6, "snat"), (7, "dnat")] } else { [(32, ""), (32, "")] };
    let nat = nat.iter().filter(|(bit, _)| mask.checked_shr(*bit).unwrap_or(0) & 1 != 0);
    let nat: Vec<Operand> = nat.map(|(_, name)| Operand::Text((*name).into())).collect();
    let op = if inverted { Op::NoneOf } else { Op::Any };
    let state = |held| Match { left: ct("state", None), op, right: Operand::Set(held) };
    let status = |nat| Match { left: ct("status", None), op, right: Operand::Set(nat) };
    match (held.is_empty(), nat.is_empty(), inverted) {
        (_, true, _) => Some(Statement::Match(state(held))),
        // A packet without an entry has no status, and no NAT either.
        (true, false, false) => Some(Statement::Match(status(nat))),
        (false, false, false) => Some(Statement::Either(vec![state(held), status(nat)])),
        (_, false, true) => None,
    }
}

/// struct xt_multiport and xt_multiport_v1
fn multiport(info: Info, revision: u32) -> Option<Vec<Statement>> {
    let (which, count) = (info.u8(0)?, usize::from(info.u8(1)?));
    let inverted = revision == 1 && info.u8(47)? != 0;
    let mut ports = vec![];
    let mut at = 0;
    while at < count.min(15) {
        let low = info.u16(2 + 2 * at)?;
        let high = if revision == 1 && at < 14 && info.u8(32 + at)? != 0 {
            at += 1;
            info.u16(2 + 2 * at)?
        } else {
            low
        };
        ports.push(numbers(low, high));
        at += 1;
    }
    let ports = set(ports);
    let side = |field: &str| Match {
        left: Term::Payload { protocol: "th".into(), field: field.into() },
        op: if inverted { Op::Ne } else { Op::Eq },
        right: ports.clone(),
    };
    Some(match (which, inverted) {
        (0, _) => vec![Statement::Match(side("sport"))],
        (1, _) => vec![Statement::Match(side("dport"))],
        (2, false) => vec![Statement::Either(vec![side("sport"), side("dport")])],
        (2, true) => vec![Statement::Match(side("sport")), Statement::Match(side("dport"))],
        _ => return None,
    })
}

/// struct xt_tcp
fn tcp(info: Info) -> Read {
    let (option, mask, flags, inverted) = (info.u8(8)?, info.u8(9)?, info.u8(10)?, info.u8(11)?);
    let mut list: Vec<Statement> = [
        port("sport", info.u16(0)?, info.u16(2)?, inverted & 1 != 0),
        port("dport", info.u16(4)?, info.u16(6)?, inverted & 2 != 0),
    ]
    .into_iter()
    .flatten()
    .collect();
    if mask != 0 || flags != 0 || inverted & 4 != 0 {
        let field = Term::Payload { protocol: "tcp".into(), field: "flags".into() };
        let left = Term::And { term: Box::new(field), mask: Operand::Number(mask.into()) };
        list.push(equal(left, Operand::Number(flags.into()), inverted & 4 != 0));
    }
    Some((list, if option == 0 { Whole } else { InPart }))
}

/// struct ipt_icmp and ip6t_icmp: packets that are judged here are neither.
fn icmp(protocol: &str, info: Info) -> Option<Statement> {
    let left = Term::Payload { protocol: protocol.into(), field: "type".into() };
    Some(equal(left, Operand::Number(info.u8(0)?.into()), info.u8(3)? & 1 != 0))
}

/// struct xt_mark_mtinfo1 and xt_connmark_mtinfo1
fn mark(left: Term, info: Info) -> Option<Statement> {
    let (value, mask, inverted) = (info.u32(0)?, info.u32(4)?, info.u8(8)? != 0);
    let left = Term::And { term: Box::new(left), mask: Operand::Number(mask.into()) };
    Some(equal(left, Operand::Number(value.into()), inverted))
}

/// struct xt_iprange_mtinfo
fn iprange(info: Info) -> Option<Vec<Statement>> {
    let flags = info.u8(64)?;
    let mut list = vec![];
    for (bit, at, key) in [(0, 0, "saddr"), (1, 32, "daddr")] {
        if flags >> bit & 1 != 0 {
            let (low, high) = (info.address(at)?, info.address(at + 16)?);
            let right = if low == high { Operand::Address(low) } else { addresses(low, high) };
            let family = if info.v6 { "ip6" } else { "ip" };
            let left = Term::Payload { protocol: family.into(), field: key.into() };
            list.push(equal(left, right, flags >> (4 + bit) & 1 != 0));
        }
    }
    Some(list)
}

/// struct xt_recent_mtinfo and its v1
fn recent(info: Info) -> Option<Vec<Statement>> {
    let (hits, check, inverted) = (info.u32(4)?, info.u8(8)?, info.u8(9)? != 0);
    match check & 0xf {
        // Whoever it is, it is on the list now.
        2 => Some(constant(!inverted)),
        // A stranger's first packet, or the second in this minute.
        1 | 4 if hits > 2 => Some(constant(inverted)),
        _ => None,
    }
}

/// struct xt_policy_info: four elements of 76 bytes, flags, length.
fn policy(info: Info) -> Option<Vec<Statement>> {
    let flags = info.u16(304)?;
    // `--dir in`, with `--pol none` or `--pol ipsec`.
    (flags & 3 == 1).then(|| constant(flags & 4 != 0))
}

struct Range {
    address: Option<Operand>,
    port: Option<Operand>,
}

/// struct nf_nat_ipv4_multi_range_compat (`old`), or nf_nat_range and nf_nat_range2.
fn range(info: Info, old: bool) -> Option<Range> {
    let (flags, low, high, ports) = if old {
        if info.u32(0)? != 1 {
            return None;
        }
        (info.u32(4)?, info.address4(8)?, info.address4(12)?, 16)
    } else {
        (info.u32(0)?, info.address(4)?, info.address(20)?, 36)
    };
    let (first, last) = (info.be16(ports)?, info.be16(ports + 2)?);
    // NETMAP, and ports that shift by an offset.
    if flags & 0x60 != 0 {
        return None;
    }
    let address = if low == high { Operand::Address(low) } else { addresses(low, high) };
    Some(Range {
        address: (flags & 1 != 0).then_some(address),
        port: (flags & 2 != 0).then(|| numbers(first, last)),
    })
}

fn constant(holds: bool) -> Vec<Statement> {
    if holds { vec![] } else { vec![Statement::Either(vec![])] }
}

fn compare(left: Term, op: Op, right: Operand) -> Statement {
    Statement::Match(Match { left, op, right })
}

fn equal(left: Term, right: Operand, inverted: bool) -> Statement {
    compare(left, if inverted { Op::Ne } else { Op::Eq }, right)
}

/// `None`: any port will do.
fn port(field: &str, low: u16, high: u16, inverted: bool) -> Option<Statement> {
    let left = Term::Payload { protocol: "th".into(), field: field.into() };
    ((low, high, inverted) != (0, u16::MAX, false)).then(|| equal(left, numbers(low, high), inverted))
}

fn ct(key: &str, dir: Option<&str>) -> Term {
    Term::Ct { key: key.into(), dir: dir.map(str::to_owned) }
}

fn numbers(low: u16, high: u16) -> Operand {
    let number = |n: u16| Operand::Number(n.into());
    if low == high { number(low) } else { Operand::Range(Box::new(number(low)), Box::new(number(high))) }
}

fn addresses(low: IpAddr, high: IpAddr) -> Operand {
    Operand::Range(Box::new(Operand::Address(low)), Box::new(Operand::Address(high)))
}

fn set(mut values: Vec<Operand>) -> Operand {
    values.sort();
    values.dedup();
    if values.len() == 1 { values.remove(0) } else { Operand::Set(values) }
}

/// A struct of the kernel, which may be shorter than it should be.
#[derive(Clone, Copy)]
struct Info<'a> {
    bytes: &'a [u8],
    v6: bool,
}

impl Info<'_> {
    fn bytes<const N: usize>(self, at: usize) -> Option<[u8; N]> {
        self.bytes.get(at..)?.first_chunk().copied()
    }

    fn u8(self, at: usize) -> Option<u8> {
        self.bytes.get(at).copied()
    }

    fn u16(self, at: usize) -> Option<u16> {
        self.bytes(at).map(u16::from_ne_bytes)
    }

    fn be16(self, at: usize) -> Option<u16> {
        self.bytes(at).map(u16::from_be_bytes)
    }

    fn u32(self, at: usize) -> Option<u32> {
        self.bytes(at).map(u32::from_ne_bytes)
    }

    fn address4(self, at: usize) -> Option<IpAddr> {
        self.bytes::<4>(at).map(IpAddr::from)
    }

    /// union nf_inet_addr
    fn address(self, at: usize) -> Option<IpAddr> {
        if self.v6 { self.bytes::<16>(at).map(IpAddr::from) } else { self.address4(at) }
    }

    /// An address and its mask; `None` also where the mask has holes.
    fn prefix(self, at: usize) -> Option<IpNet> {
        IpNet::with_netmask(self.address(at)?, self.address(at + 16)?).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn part(target: bool, name: &str, revision: u32, info: &[u8]) -> Part {
        Part { target, name: name.into(), revision, info: info.to_vec() }
    }

    fn of(part: &Part) -> Vec<Statement> {
        statements(part, TableFamily::Ip)
    }

    /// conntrack's struct, of which only these fields are asked for.
    fn ask_conntrack(flags: u16, inverted: u16, state: u16) -> Vec<Statement> {
        let mut info = [0; 168];
        info[146..148].copy_from_slice(&flags.to_ne_bytes());
        info[148..150].copy_from_slice(&inverted.to_ne_bytes());
        info[150..152].copy_from_slice(&state.to_ne_bytes());
        of(&part(false, "conntrack", 3, &info))
    }

    #[test]
    fn conditions_that_a_packet_without_an_entry_would_skip_are_not_taken_as_read() {
        let unread = |list: Vec<Statement>| matches!(list.as_slice(), [Statement::Maybe(_)]);
        // NEW, and NEW with a protocol; `! NEW` alone, and with a protocol.
        assert!(!unread(ask_conntrack(1, 0, 8)));
        assert!(!unread(ask_conntrack(3, 0, 8)));
        assert!(!unread(ask_conntrack(1, 1, 8)));
        assert!(unread(ask_conntrack(3, 1, 8)));
        // INVALID and UNTRACKED, with a protocol.
        assert!(unread(ask_conntrack(3, 0, 1)));
        assert!(unread(ask_conntrack(3, 0, 0x100)));
        assert!(!unread(ask_conntrack(3, 1, 0x101)));
    }

    #[test]
    fn how_long_an_entry_lives_stays_open_and_the_rest_is_read() {
        let list = ask_conntrack(0x81, 0, 2);
        assert!(matches!(list.as_slice(), [Statement::Match(_), Statement::Maybe(_)]), "{list:?}");
    }

    #[test]
    fn another_revision_or_family_is_not_taken_for_the_known_one() {
        let zeros = [0; 168];
        for (name, revision) in [("conntrack", 4), ("addrtype", 0), ("multiport", 2), ("mark", 0), ("set", 4)]
        {
            let list = of(&part(false, name, revision, &zeros));
            assert!(
                matches!(list.as_slice(), [Statement::Maybe(json)] if json.contains(name)),
                "{name} {revision}: {list:?}"
            );
        }
        for (name, revision) in [("DNAT", 3), ("REDIRECT", 1)] {
            let shown = format!("{:?}", of(&part(true, name, revision, &zeros)));
            assert!(shown.contains("Unknown"), "{name} {revision}: {shown}");
        }
        let new = part(false, "conntrack", 3, &zeros);
        assert!(matches!(statements(&new, TableFamily::Bridge).as_slice(), [Statement::Maybe(_)]));
    }

    #[test]
    fn parts_are_those_of_the_rule_only_where_every_name_is_the_same() {
        let list: Vec<Value> = serde_json::from_str(
            r#"[{"xt":{"type":"match","name":"mark"}},{"counter":null},{"xt":{"type":"target","name":"MARK"}}]"#,
        )
        .expect("JSON");
        let (mark, set) = (part(false, "mark", 1, &[]), part(true, "MARK", 2, &[]));
        assert!(fit(&list, &[mark.clone(), set.clone()]));
        assert!(!fit(&list, &[set.clone(), mark.clone()]));
        assert!(!fit(&list, std::slice::from_ref(&mark)));
        assert!(!fit(&list, &[mark.clone(), set, mark.clone()]));
        assert!(!fit(&list, &[mark.clone(), part(false, "MARK", 2, &[])]));
        // Without its library nft names nothing.
        let nameless = [serde_json::json!({"xt": null})];
        assert!(fit(&nameless, &[mark]));
    }

    const NAMES: [&str; 33] = [
        "comment",
        "addrtype",
        "conntrack",
        "state",
        "multiport",
        "tcp",
        "udp",
        "icmp",
        "icmp6",
        "pkttype",
        "mark",
        "connmark",
        "iprange",
        "recent",
        "rpfilter",
        "policy",
        "physdev",
        "rt",
        "set",
        "limit",
        "REJECT",
        "DNAT",
        "SNAT",
        "MASQUERADE",
        "REDIRECT",
        "MARK",
        "CONNMARK",
        "CT",
        "NOTRACK",
        "LOG",
        "NFQUEUE",
        "TPROXY",
        "x",
    ];

    proptest! {
        #[test]
        fn any_bytes_are_read_or_left(
            target: bool,
            name in proptest::sample::select(NAMES.to_vec()),
            revision in 0u32..4,
            info in proptest::collection::vec(any::<u8>(), 0..320),
            v6: bool,
        ) {
            let family = if v6 { TableFamily::Ip6 } else { TableFamily::Ip };
            let list = statements(&part(target, name, revision, &info), family);
            prop_assert!(!list.is_empty());
        }
    }
}
