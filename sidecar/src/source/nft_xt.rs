//! The parts of xtables in the rules of nftables, by netlink: nft prints their names, and
//! nothing of what they ask for.

use anyhow::Context as _;
use netlink_sys::protocols::NETLINK_NETFILTER;

use super::netlink::{Netlink, NetlinkError, array_at, attributes, text};
use crate::ruleset::TableFamily;
use crate::ruleset::xt::{Part, Parts};
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
/// As many rules as a listing may hold.
const RULES_MAX: usize = crate::ruleset::decode::OBJECTS_MAX;

pub(super) struct Rule {
    pub(super) family: TableFamily,
    pub(super) table: String,
    pub(super) chain: String,
    pub(super) handle: u64,
    pub(super) parts: Vec<Part>,
}

/// The parts of every rule of this network namespace that has any. Needs CAP_NET_ADMIN.
pub fn read() -> anyhow::Result<Parts> {
    let rules = || {
        // struct nfgenmsg: any family, version, resource id.
        Netlink::open(NETLINK_NETFILTER)?.dump(GET_RULES, &[0, 0, 0, 0], decode)
    };
    let mut parts = Parts::default();
    for rule in rules().context("read the rules of nftables")? {
        parts.add(rule.family, rule.table, rule.chain, rule.handle, rule.parts);
    }
    Ok(parts)
}

/// One rule; those without parts of xtables are passed over.
pub(super) fn decode(payload: &[u8], out: &mut Vec<Rule>) -> Result<(), NetlinkError> {
    let (Some(&family), Some(body)) = (payload.first(), payload.get(4..)) else {
        return Err(NetlinkError::Truncated("a rule"));
    };
    let Some(family) = family_of(family) else { return Ok(()) };
    let (mut table, mut chain, mut handle, mut parts) = (None, None, None, Vec::new());
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
                        parts.extend(expression(value)?);
                    }
                }
            }
            _ => {}
        }
    }
    if parts.is_empty() {
        return Ok(());
    }
    let (Some(table), Some(chain), Some(handle)) = (table, chain, handle) else {
        return Err(NetlinkError::Malformed("a rule without its place"));
    };
    if out.len() >= RULES_MAX {
        return Err(NetlinkError::Malformed("too many rules"));
    }
    out.push(Rule { family, table, chain, handle, parts });
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

fn expression(bytes: &[u8]) -> Result<Option<Part>, NetlinkError> {
    let (mut target, mut data) = (None, None);
    for attribute in attributes(bytes) {
        match attribute? {
            (EXPRESSION_NAME, b"match\0") => target = Some(false),
            (EXPRESSION_NAME, b"target\0") => target = Some(true),
            (EXPRESSION_DATA, value) => data = Some(value),
            _ => {}
        }
    }
    let Some(target) = target else { return Ok(None) };
    let (mut name, mut revision, mut info) = (None, None, Vec::new());
    for attribute in attributes(data.ok_or(NetlinkError::Malformed("an expression without its data"))?) {
        match attribute? {
            (PART_NAME, value) => name = Some(printable(&text(value), 32)),
            (PART_REVISION, value) => revision = array_at(value, 0).map(u32::from_be_bytes),
            (PART_INFO, value) if value.len() <= INFO_MAX => info = value.to_vec(),
            _ => {}
        }
    }
    match name.zip(revision) {
        Some((name, revision)) => Ok(Some(Part { target, name, revision, info })),
        None => Err(NetlinkError::Malformed("an expression of xtables without its name")),
    }
}

#[cfg(test)]
mod tests {
    use super::super::netlink::replay;
    use super::*;
    use crate::ruleset::{decode, render};

    /// What iptables-nft 1.8.9 made of one rule for each match and target, and how nft
    /// 1.0.6 lists that.
    const BYTES: &[u8] = include_bytes!("captures/iptables.bin");
    const LISTED: &str = include_str!("captures/iptables.json");

    fn parts(rules: Vec<Rule>) -> Parts {
        let mut parts = Parts::default();
        for rule in rules {
            parts.add(rule.family, rule.table, rule.chain, rule.handle, rule.parts);
        }
        parts
    }

    fn shown(parts: Parts) -> String {
        let ruleset = decode::ruleset_with(LISTED.as_bytes(), parts).expect("a listing");
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
        "#]].assert_eq(&shown(parts(rules)));
    }

    /// Whatever is cut off, what is left reads as the whole does or as not read at all.
    #[test]
    fn bytes_that_are_missing_are_never_guessed() {
        let lines = |cut: usize| {
            let mut rules = replay(BYTES, decode).expect("a whole dump");
            for part in rules.iter_mut().flat_map(|rule| &mut rule.parts) {
                let length = part.info.len();
                part.info.truncate(length.saturating_sub(cut));
            }
            shown(parts(rules)).lines().map(str::to_owned).collect::<Vec<_>>()
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
        let plain = shown(Parts::default());
        let mut rules = replay(BYTES, decode).expect("a whole dump");
        for rule in &mut rules {
            rule.handle += 1000;
        }
        assert_eq!(shown(parts(rules)), plain);
        let cut = replay(&BYTES[..BYTES.len() - 21], decode);
        assert!(cut.is_err(), "a dump without its end was taken");
    }
}
