//! The rules of iptables-legacy: whether there are any, and by which policies its chains
//! end. What the rules are is not read; a packet that meets them has an unknown fate.

use std::fs;

use super::netlink::{u16_at, u32_at};
use crate::ruleset::{Base, Chain, Hook, Rule, Statement, Table, TableFamily};
use crate::sys::xtables;
use crate::terms::Family;

/// The kernel has five tables by family.
const TABLES_MAX: usize = 16;
/// In the order of NF_INET_PRE_ROUTING ... POST_ROUTING.
const HOOKS: [(Hook, &str); 5] = [
    (Hook::Prerouting, "PREROUTING"),
    (Hook::Input, "INPUT"),
    (Hook::Forward, "FORWARD"),
    (Hook::Output, "OUTPUT"),
    (Hook::Postrouting, "POSTROUTING"),
];
/// Of a table that takes more, not even the policies are read: some five thousand rules.
const ENTRIES_MAX: u32 = 1 << 20;

/// A table for each of iptables-legacy's that does anything, in this network namespace.
pub fn read() -> Vec<Table> {
    let mut tables = Vec::new();
    for (family, names) in [(Family::Ipv4, "ip_tables_names"), (Family::Ipv6, "ip6_tables_names")] {
        // Without the file the kernel has no such tables, or none that were ever used.
        let names = fs::read_to_string(format!("/proc/thread-self/net/{names}")).unwrap_or_default();
        for name in names.lines().filter(|name| !name.is_empty()).take(TABLES_MAX) {
            let chains =
                look(family, name).unwrap_or_else(|| HOOKS.map(|h| chain(name, h, false, true)).into());
            if !chains.is_empty() {
                tables.push(Table {
                    family: if family == Family::Ipv4 { TableFamily::Ip } else { TableFamily::Ip6 },
                    name: format!("{name} (iptables-legacy)"),
                    dormant: false,
                    chains,
                    counters: Default::default(),
                    sets: Vec::new(),
                });
            }
        }
    }
    tables
}

/// `None`: it could not be read.
fn look(family: Family, name: &str) -> Option<Vec<Chain>> {
    let info = xtables::info(family, name).ok()?;
    let size = u32_at(&info, 80)?;
    let entries = if size <= ENTRIES_MAX { xtables::entries(family, name, size).ok()? } else { Vec::new() };
    decode(family, name, &info, &entries)
}

/// The chains that do anything, from struct ipt_getinfo and struct ipt_get_entries.
pub(super) fn decode(family: Family, name: &str, info: &[u8], entries: &[u8]) -> Option<Vec<Chain>> {
    let valid = u32_at(info, 32)?;
    let mut chains = Vec::new();
    for (number, hook) in HOOKS.into_iter().enumerate().filter(|(number, _)| valid >> number & 1 != 0) {
        let first = u32_at(info, 36 + 4 * number)?;
        let last = u32_at(info, 56 + 4 * number)?;
        let rules = first != last;
        match policy(family, entries, last as usize) {
            Some(drops) if drops || rules => chains.push(chain(name, hook, drops, rules)),
            Some(_) => {}
            None => chains.push(chain(name, hook, false, true)),
        }
    }
    Some(chains)
}

/// Whether the entry at this offset, a chain's last, drops. `None`: it can't be told.
fn policy(family: Family, entries: &[u8], at: usize) -> Option<bool> {
    // struct ipt_get_entries: name and size, aligned. struct ipt_entry: the match of
    // addresses, a word, the offset of the target. The target: 32 bytes and a verdict.
    let entry = entries.get(40..)?.get(at..)?;
    let offset = u16_at(entry, if family == Family::Ipv4 { 88 } else { 140 })?;
    // -NF_DROP - 1 and -NF_ACCEPT - 1.
    match u32_at(entry, usize::from(offset) + 32)? as i32 {
        -1 => Some(true),
        -2 => Some(false),
        _ => None,
    }
}

fn chain(table: &str, (hook, name): (Hook, &str), drops: bool, rules: bool) -> Chain {
    let priority = match (table, hook) {
        ("raw", _) => -300,
        ("mangle", _) => -150,
        ("nat", Hook::Prerouting | Hook::Output) => -100,
        ("nat", _) => 100,
        ("security", _) => 50,
        _ => 0,
    };
    let unread = Rule {
        statements: vec![Statement::Unknown(format!(
            "the rules of iptables-legacy in {table} {name}, which only `iptables-legacy-save` lists"
        ))],
        ..Rule::default()
    };
    Chain {
        name: name.to_owned(),
        base: Some(Base { kind: "filter".into(), hook, priority, drops, devices: Vec::new() }),
        rules: if rules { vec![unread] } else { Vec::new() },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The table filter with a rule in INPUT and the policy DROP in FORWARD; struct
    /// ipt_getinfo, then struct ipt_get_entries.
    const FILTER: &[u8] = include_bytes!("captures/iptables-legacy.bin");

    fn shown(chains: Vec<Chain>) -> Vec<(String, bool, usize)> {
        chains.into_iter().map(|c| (c.name, c.base.is_some_and(|b| b.drops), c.rules.len())).collect()
    }

    #[test]
    fn chains_with_rules_or_a_policy_are_seen_and_empty_ones_are_not() {
        let (info, entries) = FILTER.split_at(84);
        let chains = decode(Family::Ipv4, "filter", info, entries).expect("sound");
        assert_eq!(shown(chains), [("INPUT".to_owned(), false, 1), ("FORWARD".to_owned(), true, 0)]);
    }

    #[test]
    fn what_is_cut_off_is_a_doubt_and_never_an_empty_chain() {
        let (info, entries) = FILTER.split_at(84);
        for cut in 0..entries.len() {
            let chains = shown(decode(Family::Ipv4, "filter", info, &entries[..cut]).expect("sound"));
            assert!(chains.iter().any(|c| *c == ("INPUT".to_owned(), false, 1)), "{cut}: {chains:?}");
            let forward = chains.iter().find(|c| c.0 == "FORWARD").expect("a chain");
            assert!(forward.1 || forward.2 == 1, "{cut}: {chains:?}");
        }
        for cut in 0..72 {
            assert!(decode(Family::Ipv4, "filter", &info[..cut], entries).is_none(), "{cut}");
        }
    }
}
