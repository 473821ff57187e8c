//! What nft does not list of rules, by netlink: what the parts of xtables ask for, of which it prints the names, and
//! conditions that it takes for its own.

use anyhow::Context as _;
use netlink_sys::protocols::NETLINK_NETFILTER;

use super::netlink::{Netlink, NetlinkError, array_at, attributes, text};
use crate::desired::TABLE;
use crate::ruleset::TableFamily;
use crate::ruleset::unlisted::{Gate, Held, Key, Unlisted};
use crate::ruleset::xt::Part;
use crate::terms::printable;

/// NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_GETRULE.
const GET_RULES: u16 = 10 << 8 | 7;
/// NFTA_RULE_{TABLE, CHAIN, HANDLE, EXPRESSIONS}, NFTA_LIST_ELEM, NFTA_EXPR_{NAME, DATA}.
const RULE_TABLE: u16 = 1;
const RULE_CHAIN: u16 = 2;
const RULE_HANDLE: u16 = 3;
const RULE_EXPRESSIONS: u16 = 4;
const LIST_ELEMENT: u16 = 1;
const EXPRESSION_NAME: u16 = 1;
const EXPRESSION_DATA: u16 = 2;
/// NFTA_MATCH_{NAME, REV, INFO}; those of targets are the same.
const PART_NAME: u16 = 1;
const PART_REVISION: u16 = 2;
const PART_INFO: u16 = 3;
/// Longer ones (programs, strings to search for) are none that we understand.
const INFO_MAX: usize = 512;
/// What comes before a comparison: a load into a register. NFTA_{META, CT, PAYLOAD}_DREG, NFTA_{META, CT}_KEY.
const LOAD_TO: u16 = 1;
const LOAD_KEY: u16 = 2;
/// NFTA_META_SREG, NFTA_CT_SREG: not a load.
const META_FROM: u16 = 3;
const CT_FROM: u16 = 4;
/// NFTA_PAYLOAD_{BASE, OFFSET, LEN}.
const PAYLOAD_BASE: u16 = 2;
const PAYLOAD_OFFSET: u16 = 3;
const PAYLOAD_LENGTH: u16 = 4;
/// NFTA_CMP_{SREG, OP, DATA}, NFTA_DATA_VALUE.
const COMPARE_FROM: u16 = 1;
const COMPARE_HOW: u16 = 2;
const COMPARE_WITH: u16 = 3;
const DATA_VALUE: u16 = 1;
/// NFT_CMP_EQ.
const EQUAL: u32 = 0;
/// Of the protocol in an IPv4 header (RFC 791), of the next header in one of IPv6 (RFC 8200).
const PROTOCOL_AT: u32 = 9;
const NEXT_HEADER_AT: u32 = 6;
/// A rule has 128 expressions at most, and a condition is two.
const GATES_MAX: usize = 64;
/// As many rules as a listing may hold.
const RULES_MAX: usize = crate::ruleset::decode::OBJECTS_MAX;

pub(super) struct Rule {
    pub(super) family: TableFamily,
    pub(super) table: String,
    pub(super) chain: String,
    pub(super) handle: u64,
    pub(super) held: Held,
}

/// What every rule of this network namespace holds beside its listing. Needs CAP_NET_ADMIN.
pub fn read() -> anyhow::Result<Unlisted> {
    let mut unlisted = nothing();
    // One by one: with their places, tens of thousands of rules would take as much again.
    let each = |payload: &[u8], _: &mut Vec<()>| {
        let mut one = Vec::new();
        decode(payload, &mut one)?;
        for Rule { family, table, chain, handle, held } in one {
            unlisted.add(family, table, chain, handle, held);
        }
        // A dump that is begun again says the same rules again, and those that came since.
        if unlisted.count() > RULES_MAX { Err(NetlinkError::Malformed("too many rules")) } else { Ok(()) }
    };
    // struct nfgenmsg: any family, version, resource id.
    let rules =
        Netlink::open(NETLINK_NETFILTER).and_then(|mut socket| socket.dump(GET_RULES, &[0, 0, 0, 0], each));
    rules.context("read the rules of nftables")?;
    Ok(unlisted)
}

/// For a listing of rules that could not be read: what is in them stays unknown.
pub fn nothing() -> Unlisted {
    Unlisted::of_kernel((TableFamily::Inet, TABLE))
}

/// One rule.
pub(super) fn decode(payload: &[u8], out: &mut Vec<Rule>) -> Result<(), NetlinkError> {
    let (Some(&family), Some(body)) = (payload.first(), payload.get(4..)) else {
        return Err(NetlinkError::Truncated("a rule"));
    };
    let Some(family) = family_of(family) else { return Ok(()) };
    let (mut table, mut chain, mut handle) = (None, None, None);
    let next_header = match family {
        TableFamily::Ip => Some(PROTOCOL_AT),
        TableFamily::Ip6 => Some(NEXT_HEADER_AT),
        _ => None,
    };
    let mut reading = Reading { next_header, ..Reading::default() };
    for attribute in attributes(body) {
        let (kind, value) = attribute?;
        match kind {
            RULE_TABLE => table = Some(text(value)),
            RULE_CHAIN => chain = Some(text(value)),
            RULE_HANDLE => handle = array_at(value, 0).map(u64::from_be_bytes),
            RULE_EXPRESSIONS => {
                for element in attributes(value) {
                    let (kind, value) = element?;
                    if kind == LIST_ELEMENT {
                        reading.expression(value)?;
                    }
                }
            }
            _ => {}
        }
    }
    let (Some(table), Some(chain), Some(handle)) = (table, chain, handle) else {
        return Err(NetlinkError::Malformed("a rule without its place"));
    };
    out.push(Rule { family, table, chain, handle, held: reading.held });
    Ok(())
}

/// By NFPROTO_*.
pub(super) fn family_of(number: u8) -> Option<TableFamily> {
    Some(match number {
        1 => TableFamily::Inet,
        2 => TableFamily::Ip,
        3 => TableFamily::Arp,
        5 => TableFamily::Netdev,
        7 => TableFamily::Bridge,
        10 => TableFamily::Ip6,
        _ => return None,
    })
}

/// A rule, expression by expression.
#[derive(Default)]
struct Reading {
    held: Held,
    /// Of the expression before: what it loaded, and into which register.
    loaded: Option<(Key, u32)>,
    /// Where the network header says what comes next, once it is known of which family that is.
    next_header: Option<u32>,
}

impl Reading {
    fn expression(&mut self, bytes: &[u8]) -> Result<(), NetlinkError> {
        let (mut name, mut data) = (&[][..], None);
        for attribute in attributes(bytes) {
            match attribute? {
                (EXPRESSION_NAME, value) => name = value,
                (EXPRESSION_DATA, value) => data = Some(value),
                _ => {}
            }
        }
        let data = || data.ok_or(NetlinkError::Malformed("an expression without its data"));
        let loaded = self.loaded.take();
        match name {
            b"match\0" => self.held.parts.push(part(false, data()?)?),
            b"target\0" => self.held.parts.push(part(true, data()?)?),
            b"reject\0" => self.held.rejects = true,
            b"meta\0" => self.loaded = self.load(data()?, META_FROM, meta)?,
            b"ct\0" => self.loaded = self.load(data()?, CT_FROM, conntrack)?,
            b"payload\0" => self.loaded = header(data()?, self.next_header)?,
            b"cmp\0" => {
                if let Some((key, register)) = loaded
                    && let Some(value) = compared(data()?, key, register)?
                {
                    if self.held.gates.len() >= GATES_MAX {
                        return Err(NetlinkError::Malformed("too many conditions in one rule"));
                    }
                    match (key, value) {
                        (Key::Family, 2) | (Key::Protocol, 0x0800) => self.next_header = Some(PROTOCOL_AT),
                        (Key::Family, 10) | (Key::Protocol, 0x86dd) => {
                            self.next_header = Some(NEXT_HEADER_AT)
                        }
                        _ => {}
                    }
                    self.held.gates.push(Gate { key, value, after: self.held.sets });
                }
            }
            _ => {}
        }
        Ok(())
    }

    /// What `meta` or `ct` loads; that it sets something instead is counted.
    fn load(
        &mut self,
        data: &[u8],
        from: u16,
        known: fn(u32) -> Option<Key>,
    ) -> Result<Option<(Key, u32)>, NetlinkError> {
        let (mut to, mut key) = (None, None);
        for attribute in attributes(data) {
            match attribute? {
                (LOAD_TO, value) => to = number(value),
                (LOAD_KEY, value) => key = number(value).and_then(known),
                (kind, _) if kind == from => self.held.sets = self.held.sets.saturating_add(1),
                _ => {}
            }
        }
        Ok(key.zip(to))
    }
}

fn number(value: &[u8]) -> Option<u32> {
    array_at(value, 0).map(u32::from_be_bytes)
}

/// NFT_META_{PROTOCOL, IIFTYPE, NFPROTO, L4PROTO}.
fn meta(key: u32) -> Option<Key> {
    Some(match key {
        1 => Key::Protocol,
        8 => Key::LinkType,
        15 => Key::Family,
        16 => Key::L4proto,
        _ => return None,
    })
}

/// NFT_CT_{L3PROTOCOL, PROTOCOL}.
fn conntrack(key: u32) -> Option<Key> {
    Some(match key {
        7 => Key::CtFamily,
        10 => Key::CtProtocol,
        _ => return None,
    })
}

/// The fields that say what comes next: of Ethernet, and of the network header at this place; other bytes there
/// (flags, addresses) are asked for by `@nh` and mean something else.
fn header(data: &[u8], next_header: Option<u32>) -> Result<Option<(Key, u32)>, NetlinkError> {
    let (mut to, mut place) = (None, [None; 3]);
    for attribute in attributes(data) {
        match attribute? {
            (LOAD_TO, value) => to = number(value),
            (PAYLOAD_BASE, value) => place[0] = number(value),
            (PAYLOAD_OFFSET, value) => place[1] = number(value),
            (PAYLOAD_LENGTH, value) => place[2] = number(value),
            _ => {}
        }
    }
    // NFT_PAYLOAD_{LL, NETWORK}_HEADER.
    let key = match place {
        [Some(0), Some(12), Some(2)] => Some(Key::Protocol),
        [Some(1), at, Some(1)] if at.is_some() && at == next_header => Some(Key::L4proto),
        _ => None,
    };
    Ok(key.zip(to))
}

/// The value that a register must have, if it must have one.
fn compared(data: &[u8], key: Key, register: u32) -> Result<Option<u16>, NetlinkError> {
    let (mut from, mut how, mut with) = (None, None, None);
    for attribute in attributes(data) {
        match attribute? {
            (COMPARE_FROM, value) => from = number(value),
            (COMPARE_HOW, value) => how = number(value),
            (COMPARE_WITH, value) => {
                for attribute in attributes(value) {
                    if let (DATA_VALUE, value) = attribute? {
                        with = Some(value);
                    }
                }
            }
            _ => {}
        }
    }
    if (from, how) != (Some(register), Some(EQUAL)) {
        return Ok(None);
    }
    Ok(with.and_then(|value| match key {
        Key::Protocol => array_at(value, 0).map(u16::from_be_bytes),
        Key::LinkType => array_at(value, 0).map(u16::from_ne_bytes),
        Key::Family | Key::L4proto | Key::CtFamily | Key::CtProtocol => {
            value.first().map(|byte| (*byte).into())
        }
    }))
}

fn part(target: bool, data: &[u8]) -> Result<Part, NetlinkError> {
    let (mut name, mut revision, mut info) = (None, None, Vec::new());
    for attribute in attributes(data) {
        match attribute? {
            (PART_NAME, value) => name = Some(printable(&text(value), 32)),
            (PART_REVISION, value) => revision = array_at(value, 0).map(u32::from_be_bytes),
            (PART_INFO, value) if value.len() <= INFO_MAX => info = value.to_vec(),
            _ => {}
        }
    }
    match name.zip(revision) {
        Some((name, revision)) => Ok(Part { target, name, revision, info }),
        None => Err(NetlinkError::Malformed("an expression of xtables without its name")),
    }
}

#[cfg(test)]
mod tests {
    use super::super::netlink::{self, replay};
    use super::*;
    use crate::ruleset::{decode, render};

    /// What iptables-nft 1.8.9 made of one rule for each match and target, and how nft
    /// 1.0.6 lists that.
    const BYTES: &[u8] = include_bytes!("captures/iptables.bin");
    const LISTED: &str = include_str!("captures/iptables.json");

    fn known(rules: Vec<Rule>) -> Unlisted {
        let mut unlisted = Unlisted::default();
        for rule in rules {
            unlisted.add(rule.family, rule.table, rule.chain, rule.handle, rule.held);
        }
        unlisted
    }

    fn shown(unlisted: Unlisted) -> String {
        listed(LISTED, unlisted)
    }

    fn listed(json: &str, unlisted: Unlisted) -> String {
        let ruleset = decode::ruleset_with(json.as_bytes(), unlisted).expect("a listing");
        let mut out = String::new();
        for table in &ruleset.tables {
            for chain in &table.chains {
                out += &format!("{} {} {}\n", render::family(table.family), table.name, chain.name);
                for rule in &chain.rules {
                    out += &format!("    {}\n", render::rule(rule).replace(" counter", ""));
                }
            }
        }
        out
    }

    #[test]
    fn other_bytes_of_a_header_are_not_taken_for_its_protocol() {
        let asks = |at: u32, known| {
            let fields = [(LOAD_TO, 1), (PAYLOAD_BASE, 1), (PAYLOAD_OFFSET, at), (PAYLOAD_LENGTH, 1)];
            let data = fields.map(|(kind, value)| netlink::attribute(kind, &u32::to_be_bytes(value)));
            header(&data.concat(), known).expect("whole").is_some()
        };
        let known = [None, Some(PROTOCOL_AT), Some(NEXT_HEADER_AT)];
        assert_eq!(known.map(|known| asks(9, known)), [false, true, false]);
        // Of IPv4 the flags.
        assert_eq!(known.map(|known| asks(6, known)), [false, false, true]);
    }

    #[test]
    fn what_nft_does_not_print_is_read_from_the_kernel() {
        let rules = replay(BYTES, decode).expect("a whole dump");
        expect_test::expect![[r#"
            ip raw PREROUTING
                iifname != "docker0" ip daddr 172.17.0.2 drop
                udp dport 9 <{"notrack":null}>
            ip mangle PREROUTING
                meta mark & 255 == 1 <{"xt":{"flip":2,"keep":0,"take":0,"to":"meta"}}>
                counter <{"xt":{"flip":5,"keep":0,"take":0,"to":"meta"}}>
                counter <{"xt":{"flip":0,"keep":4294901760,"take":65535,"to":"meta"}}>
                tcp flags & (rst|syn) == syn <{"xt":{"name":"tcpmss","type":"match"}}> <{"xt":{"name":"TCPMSS","type":"target"}}>
                counter <{"xt":{"flip":0,"keep":4294967040,"take":255,"to":"ct"}}>
                counter <{"xt":{"flip":1,"keep":4294967040,"take":0,"to":"ct"}}>
                <{"xt":{"name":"socket","type":"match"}}> <{"xt":{"flip":16384,"keep":4294950911,"take":0,"to":"meta"}}>
            ip nat PREROUTING
                fib daddr type local jump DOCKER
            ip nat INPUT
            ip nat OUTPUT
                ip daddr != 127.0.0.0/8 fib daddr type local jump DOCKER
            ip nat POSTROUTING
                oifname != "docker0" ip saddr 172.17.0.0/16 <{"xt":{"name":"MASQUERADE","type":"target"}}>
                oifname "eth0" <{"xt":{"name":"SNAT","type":"target"}}>
            ip nat DOCKER
                iifname "docker0" return
                iifname != "docker0" tcp dport 8080 dnat ip to 172.17.0.2:80
                iifname != "docker0" tcp dport 8082 dnat ip to 172.17.0.2-172.17.0.5:80-90
                iifname != "docker0" tcp dport 8083 dnat ip to 172.17.0.2
                tcp dport 8081 redirect to :81
                tcp dport 8085 redirect
            ip filter INPUT
                ct state established,related accept
                ct state invalid drop
                ct state new ct protocol 6 ct original proto-dst 80 accept
                ct original ip daddr 10.0.0.0/8 ct direction original accept
                ct status 4 accept
                meta l4proto tcp th dport { 80, 443, 8000-8100 } accept
                meta l4proto tcp th dport 22 jump F2B
                meta l4proto udp th sport != { 53, 54 } th dport != { 53, 54 } accept
                meta l4proto tcp th sport { 53, 54 } accept
                tcp flags & (ack|fin|rst|syn) == syn tcp sport 1024-65535 tcp dport != 81-90 reject with tcp reset
                meta l4proto tcp <{"xt":{"name":"tcp","type":"match"}}> accept
                udp dport 53 accept
                meta l4proto icmp icmp type 8 accept
                <{"limit":{"burst":10,"per":"minute","rate":3}}> <{"xt":{"name":"LOG","type":"target"}}>
                meta l4proto tcp <{"xt":{"name":"hashlimit","type":"match"}}> accept
                meta pkttype 1 accept
                fib daddr type multicast accept
                fib saddr . iif type != local accept
                <{"xt":{"name":"physdev","type":"match"}}> accept
                <never> drop
                <{"continue":null}>
                ip saddr 10.0.0.1-10.0.0.9 ip daddr != 1.1.1.1-2.2.2.2 accept
                <{"xt":{"name":"mac","type":"match"}}> accept
                <{"xt":{"name":"length","type":"match"}}> accept
                meta mark & 16384 != 16384 return
                ct mark & 16384 == 16384 accept
                <{"xt":{"name":"ttl","type":"match"}}> accept
                <{"xt":{"name":"comment","type":"match"}}> <{"log":{"group":5}}>
                <{"xt":{"name":"statistic","type":"match"}}> accept
                <{"xt":{"name":"connlimit","type":"match"}}> reject
                tcp dport 22 <{"xt":{"name":"time","type":"match"}}> accept
                <{"xt":{"name":"string","type":"match"}}> drop
                <{"xt":{"name":"u32","type":"match"}}> drop
                ct state new <{"xt":{"name":"helper","type":"match"}}> drop
                <{"xt":{"name":"socket","type":"match"}}> accept
                <{"xt":{"name":"dscp","type":"match"}}> accept
                meta l4proto icmp icmp type 3 accept
                ip frag-off & 8191 != 0 drop
                counter reject
                ct status dnat accept
                <ct state established or ct status dnat> accept
                meta l4proto tcp <th sport { 1, 2, 10-20 } or th dport { 1, 2, 10-20 }> accept
                <never> accept
                <never> accept
                <{"continue":null}> accept
                meta l4proto udp ct protocol 6 ct reply ip saddr 10.0.0.0/8 ct direction reply accept
                meta l4proto tcp <{"xt":{"name":"conntrack","type":"match"}}> accept
                <{"xt":{"name":"recent","type":"match"}}> accept
            ip filter FORWARD
            ip filter OUTPUT
                <{"xt":{"name":"owner","type":"match"}}> accept
            ip filter F2B
            ip6 mangle PREROUTING
                <{"continue":null}> accept
                <never> drop
            ip6 nat PREROUTING
                meta l4proto tcp fib daddr type local tcp dport 8080 dnat ip6 to [fd00::2]:80
                udp dport 53 redirect to :5353
            ip6 filter INPUT
                ct state established,related accept
                <never> drop
                meta l4proto ipv6-icmp icmpv6 type 128 accept
                meta l4proto ipv6-icmp icmpv6 type 134 <{"xt":{"name":"hl","type":"match"}}> accept
                ct original ip6 daddr fd00::/8 accept
                ip6 saddr fd00::1-fd00::9 accept
                meta l4proto tcp reject with tcp reset
                counter reject
        "#]].assert_eq(&shown(known(rules)));
    }

    /// Whatever is cut off, what is left reads as the whole does or as not read at all.
    #[test]
    fn bytes_that_are_missing_are_never_guessed() {
        let lines = |cut: usize| {
            let mut rules = replay(BYTES, decode).expect("a whole dump");
            for part in rules.iter_mut().flat_map(|rule| &mut rule.held.parts) {
                let length = part.info.len();
                part.info.truncate(length.saturating_sub(cut));
            }
            shown(known(rules)).lines().map(str::to_owned).collect::<Vec<_>>()
        };
        let (whole, nothing) = (lines(0), lines(usize::MAX));
        assert_ne!(whole, nothing);
        for cut in 1..400 {
            for (found, (whole, nothing)) in lines(cut).iter().zip(whole.iter().zip(&nothing)) {
                // A rule of two parts may have lost only the longer one.
                let parts = nothing.matches("\"xt\"").count();
                assert!(found == whole || found == nothing || parts > 1, "{cut} bytes less: {found}");
            }
        }
    }

    #[test]
    fn parts_of_other_rules_are_not_taken() {
        let plain = shown(Unlisted::default());
        let mut rules = replay(BYTES, decode).expect("a whole dump");
        for rule in &mut rules {
            rule.handle += 1000;
        }
        assert_eq!(shown(known(rules)), plain);
        let cut = replay(&BYTES[..BYTES.len() - 21], decode);
        assert!(cut.is_err(), "a dump without its end was taken");
    }

    /// Rules that ask for a family, a protocol or a kind of link, and how nft 1.0.6 lists them.
    const CONDITIONS: &[u8] = include_bytes!("captures/conditions.bin");
    const CONDITIONS_LISTED: &str = include_str!("captures/conditions.json");

    #[test]
    fn conditions_that_nft_takes_for_its_own_are_put_back() {
        let rules = replay(CONDITIONS, decode).expect("a whole dump");
        expect_test::expect![[r#"
            inet filter c
                meta nfproto ipv4 tcp dport 22 reject with tcp reset
                meta protocol ip6 tcp dport 22 reject with tcp reset
                tcp dport 22 reject with tcp reset
                ip saddr 192.0.2.1 tcp dport 22 reject with tcp reset
                meta nfproto ipv6 tcp dport 22 drop
                meta nfproto ipv4 ct protocol tcp drop
                ct protocol tcp th dport { 53, 5432 } drop
                <{"mangle":{"key":{"meta":{"key":"mark"}},"value":7}}> meta nfproto ipv6 tcp dport 22 reject with tcp reset
                meta nfproto ipv4 <{"mangle":{"key":{"meta":{"key":"mark"}},"value":7}}> tcp dport 22 reject with tcp reset
                meta nfproto ipv4 meta l4proto tcp <{"mangle":{"key":{"ct":{"key":"mark"}},"value":7}}> <{"mangle":{"key":{"meta":{"key":"mark"}},"value":7}}> reject with tcp reset
                meta iiftype 1 meta protocol ip6 tcp dport 22 reject with tcp reset
                ether saddr 02:00:00:00:00:01 drop
                meta protocol ip6 meta nfproto ipv4 meta nfproto ipv4 reject
                ip protocol tcp reject with tcp reset
                ip6 nexthdr tcp tcp dport vmap { 22 : drop }
                meta nfproto != ipv4 tcp dport 22 reject with tcp reset
                meta l4proto tcp ct original ip saddr 192.0.2.1 reject with tcp reset
            ip filter c
                meta protocol ip6 ip saddr 192.0.2.1 drop
                meta protocol ip6 tcp dport 22 drop
                tcp dport 22 drop
                ip saddr 192.0.2.1 drop
                udp dport 53 drop
                meta protocol ip6 reject with tcp reset
            ip6 filter c
                meta protocol ip ip6 saddr 2001:db8::1 drop
                tcp dport 22 reject with tcp reset
            netdev early c
                meta protocol ip6 meta l4proto tcp reject with tcp reset
                ip saddr 192.0.2.1 drop
        "#]].assert_eq(&listed(CONDITIONS_LISTED, known(rules)));
    }

    #[test]
    fn a_rule_that_was_not_read_is_not_taken_for_all_that_is_listed() {
        let doubted = |json: &str| {
            let text = listed(json, nothing());
            let rules: Vec<&str> = text.lines().filter(|line| line.starts_with(' ')).collect();
            (
                rules.iter().filter(|rule| rule.contains("conditions that nft may have left out")).count(),
                rules.len(),
            )
        };
        assert_eq!(doubted(CONDITIONS_LISTED), (27, 27));
        // Of our own table, which is compared with what it should be, the listing is enough.
        let own =
            CONDITIONS_LISTED.replace(r#""inet", "table": "filter""#, r#""inet", "table": "spokeguard""#);
        assert_eq!(doubted(&own), (10, 27));
    }
}
