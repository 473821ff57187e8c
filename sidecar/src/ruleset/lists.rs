//! Named sets of addresses by their borders, which is how the kernel keeps and names them: an element is where an
//! interval begins, or the address behind its end. nft takes five times as long to say the same in JSON.

use std::net::IpAddr;

use super::decode::SET_ELEMENTS_MAX;
use super::normal;
use super::{Match, NamedSet, Operand, Ruleset, Statement, Term, VerdictMap};
use crate::terms::Family;

/// More borders than this are not taken for a set: it would be kept in part only.
pub const BORDERS_MAX: usize = 2 * SET_ELEMENTS_MAX;

/// Of an interval. Ordered as the kernel means them: where one ends and the next begins is one key, and the
/// address belongs to the next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Border {
    /// The bits of an address.
    pub key: u128,
    /// Here one begins; else the one before has ended.
    pub begins: bool,
}

/// The family of a set that is nothing but addresses or intervals of them; `None` for any other.
pub fn family(set: &NamedSet) -> Option<Family> {
    let plain = |flag: &String| flag == "interval" || flag == "constant";
    match set.kind.as_str() {
        _ if set.map || !set.flags.iter().all(plain) => None,
        "ipv4_addr" => Some(Family::Ipv4),
        "ipv6_addr" => Some(Family::Ipv6),
        _ => None,
    }
}

/// A set of intervals for the kernel, in its order; `None`: it is of another kind.
pub fn borders(set: &NamedSet) -> Option<(Family, Vec<Border>)> {
    let family = family(set).filter(|_| set.flags == ["interval"] && !set.truncated)?;
    let (intervals, rest) = normal::intervals(&Term::Unknown(String::new()), &set.elements);
    if !rest.is_empty() || intervals.iter().any(|(of, ..)| *of != Some(family)) {
        return None;
    }
    let mut out = Vec::with_capacity(2 * intervals.len() + 1);
    // As nft has it: what lies before the first interval is in none.
    if intervals.first().is_some_and(|(_, low, _)| *low > 0) {
        out.push(Border { key: 0, begins: false });
    }
    for (_, low, high) in intervals {
        out.push(Border { key: low, begins: true });
        if high < last(family) {
            out.push(Border { key: high + 1, begins: false });
        }
    }
    Some((family, out))
}

/// What is in a set of these borders, as nft lists it; `None` for what no such set can hold.
pub fn elements(family: Family, interval: bool, mut borders: Vec<Border>) -> Option<Vec<Operand>> {
    if borders.len() > BORDERS_MAX || borders.iter().any(|border| border.key > last(family)) {
        return None;
    }
    borders.sort_unstable();
    borders.dedup();
    let mut out = Vec::with_capacity(borders.len() / 2 + 1);
    if !interval {
        out.extend(borders.iter().map(|border| element(family, border.key, border.key)));
        return borders.iter().all(|border| border.begins).then_some(out);
    }
    let mut began = None;
    for Border { key, begins } in borders {
        // Nothing ends before the first address, and an interval that begins ends the one before.
        if let (Some(low), Some(high)) = (began.take(), key.checked_sub(1)) {
            out.push(element(family, low, high));
        }
        began = begins.then_some(key);
    }
    out.extend(began.map(|low| element(family, low, last(family))));
    // In the order in which values of a set are compared.
    out.sort();
    Some(out)
}

fn last(family: Family) -> u128 {
    match family {
        Family::Ipv4 => u32::MAX.into(),
        Family::Ipv6 => u128::MAX,
    }
}

fn element(family: Family, low: u128, high: u128) -> Operand {
    let address = |bits: u128| match family {
        Family::Ipv4 => IpAddr::from((bits as u32).to_be_bytes()),
        Family::Ipv6 => IpAddr::from(bits.to_be_bytes()),
    };
    let (low, high) = (address(low), address(high));
    match normal::prefix_of(low, high) {
        _ if low == high => Operand::Address(low),
        Some(net) => Operand::Prefix(net),
        None => Operand::Range(Box::new(Operand::Address(low)), Box::new(Operand::Address(high))),
    }
}

/// Whether a rule of a terse listing lacks what is in a set of its own. nft leaves out what is in named sets;
/// which versions leave out more is not known.
pub fn lacks_values(ruleset: &Ruleset) -> bool {
    fn is_empty(operand: &Operand) -> bool {
        match operand {
            Operand::Set(values) => values.is_empty(),
            Operand::Unknown(json) => json.contains("\"set\""),
            _ => false,
        }
    }
    fn asks_nothing(asked: &Match) -> bool {
        is_empty(&asked.right) || matches!(&asked.left, Term::Unknown(json) if json.contains("\"set\""))
    }
    let rules = ruleset.tables.iter().flat_map(|table| &table.chains).flat_map(|chain| &chain.rules);
    rules.flat_map(|rule| &rule.statements).any(|statement| match statement {
        Statement::Match(asked) => asks_nothing(asked),
        Statement::Either(list) => list.iter().any(asks_nothing),
        Statement::Vmap { map: VerdictMap::Pairs(pairs), .. } => pairs.is_empty(),
        _ => false,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(kind: &str, elements: &[&str]) -> NamedSet {
        let value = |text: &&str| match text.split_once('-') {
            Some((low, high)) => {
                let end = |text: &str| Box::new(Operand::Address(text.parse().expect("an address")));
                Operand::Range(end(low), end(high))
            }
            None if text.contains('/') => Operand::Prefix(text.parse().expect("a prefix")),
            None => Operand::Address(text.parse().expect("an address")),
        };
        NamedSet {
            name: "s".into(),
            kind: kind.into(),
            map: false,
            flags: vec!["interval".into()],
            elements: elements.iter().map(value).collect(),
            timed: vec![],
            verdicts: vec![],
            truncated: false,
        }
    }

    fn shown(family: Family, borders: &[(u128, bool)]) -> Option<Vec<String>> {
        let borders = borders.iter().map(|&(key, begins)| Border { key, begins }).collect();
        let elements = elements(family, true, borders)?;
        Some(elements.iter().map(super::super::render::operand).collect())
    }

    #[test]
    fn what_is_said_in_borders_reads_back_the_same() {
        let four = ["0.0.0.0/8", "10.0.0.1", "10.0.0.3-10.0.0.9", "192.0.2.0/24", "224.0.0.0/3"];
        let six = ["::1", "2001:db8::/32", "fe80::1-fe80::5", "ff00::/8"];
        for set in [set("ipv4_addr", &four), set("ipv4_addr", &["0.0.0.0/0"]), set("ipv6_addr", &six)] {
            let (family, borders) = borders(&set).expect("a list");
            let mut wanted = set.elements.clone();
            wanted.sort();
            assert_eq!(elements(family, true, borders), Some(wanted));
        }
        // The first and the last address need no border of their own.
        let (_, ends) = borders(&set("ipv4_addr", &["0.0.0.0/1", "192.0.0.0/2"])).expect("a list");
        assert_eq!(ends.len(), 3, "{ends:?}");
    }

    #[test]
    fn neighbours_are_told_apart_and_what_is_merged_is_the_same_set() {
        let a = 0x0a00_0000;
        // As nft writes them: where one begins the one before ends.
        let two = shown(Family::Ipv4, &[(0, false), (a, true), (a + 128, true), (a + 256, false)]);
        assert_eq!(two.expect("sound"), ["10.0.0.0/25", "10.0.0.128/25"]);
        let both = shown(Family::Ipv4, &[(a + 4, true), (a + 4, false), (a, true), (a + 8, false)]);
        assert_eq!(both.expect("sound"), ["10.0.0.0/30", "10.0.0.4/30"]);
        let halves = set("ipv4_addr", &["10.0.0.0/25", "10.0.0.128/25"]);
        assert_eq!(borders(&halves), borders(&set("ipv4_addr", &["10.0.0.0/24"])));
    }

    #[test]
    fn a_set_within_a_rule_that_was_left_out_is_missed() {
        let lacks = |left: &str, right: &str| {
            let json = format!(
                r#"{{"nftables":[{{"chain":{{"family":"inet","table":"t","name":"c"}}}},{{"rule":{{"family":"inet",
                "table":"t","chain":"c","expr":[{{"match":{{"op":"==","left":{left},"right":{right}}}}},{{"drop":null}}]}}}}]}}"#
            );
            lacks_values(&super::super::decode::ruleset(json.as_bytes()).expect("JSON"))
        };
        let port = r#"{"payload":{"protocol":"tcp","field":"dport"}}"#;
        let asked = [r#"{"set":[]}"#, r#"{"set":[22]}"#, r#""@list""#, "22"];
        assert_eq!(asked.map(|right| lacks(port, right)), [true, false, false, false]);
    }

    #[test]
    fn what_is_no_plain_list_is_left_to_nft() {
        assert_eq!(borders(&set("ipv4_addr", &["2001:db8::/32"])), None);
        assert_eq!(borders(&set("inet_service", &[])), None);
        for flag in ["timeout", "dynamic"] {
            let mut timed = set("ipv4_addr", &[]);
            timed.flags.push(flag.into());
            assert_eq!((family(&timed), borders(&timed)), (None, None));
        }
        for (flags, truncated) in [(vec![], false), (vec!["interval".to_owned()], true)] {
            assert_eq!(borders(&NamedSet { flags, truncated, ..set("ipv4_addr", &["10.0.0.1"]) }), None);
        }
        let mut map = set("ipv4_addr", &[]);
        map.map = true;
        assert_eq!(family(&map), None);
        assert_eq!(shown(Family::Ipv4, &[(1 << 32, true)]), None, "no address of IPv4");
        assert_eq!(
            elements(Family::Ipv4, true, vec![Border { key: 1, begins: true }; BORDERS_MAX + 1]),
            None
        );
        assert_eq!(elements(Family::Ipv4, false, vec![Border { key: 1, begins: false }]), None);
    }
}
