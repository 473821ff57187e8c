//! What the product reads of foreign rules beside what nft says of them.

use lab::{Lab, Need, lacking};
use spokeguard::ruleset::{NamedSet, Ruleset, TableFamily, decode, render};
use spokeguard::source::nft;

/// Sets of one name in several tables, of intervals and of single addresses.
const LISTS: &str = "\
    table inet a {\n set s {\n type ipv4_addr\n flags interval\n elements = { 192.0.2.0/25, 198.51.100.7 }\n }\n\
    set other {\n type ipv6_addr\n elements = { 2001:db8::7, ::1 }\n }\n }\n\
    table inet b {\n set s {\n type ipv4_addr\n flags interval\n elements = { 203.0.113.0/24 }\n }\n\
    set single {\n type ipv4_addr\n elements = { 192.0.2.200, 192.0.2.1, 255.255.255.255 }\n }\n }\n\
    table ip a {\n set s {\n type ipv4_addr\n flags interval\n elements = { 0.0.0.0/1 }\n }\n }\n\
    table ip6 a {\n set s {\n type ipv6_addr\n flags interval\n elements = { 2001:db8::/32 }\n }\n }\n";

/// nft 1.0.6 lists the first and the third as the second.
const CONDITIONS: &str = "\
    table inet c {\n chain c {\n\
    meta nfproto ipv4 tcp dport 22 reject with tcp reset\n\
    tcp dport 22 reject with tcp reset\n\
    meta protocol ip6 tcp dport 22 reject with tcp reset\n }\n }\n";

#[test]
fn what_nft_does_not_list_is_read_from_the_kernel() {
    if lacking(&[Need::Lab]) {
        return;
    }
    let lab = Lab::plain();
    let sets = |ruleset: &Ruleset| -> Vec<(TableFamily, String, NamedSet)> {
        let tables = ruleset.tables.iter().filter(|table| !table.sets.is_empty());
        let each = tables.flat_map(|table| table.sets.iter().map(move |set| (table, set.clone())));
        let mut each: Vec<_> = each.map(|(table, set)| (table.family, table.name.clone(), set)).collect();
        each.iter_mut().for_each(|(.., set)| set.elements.sort());
        each
    };
    lab.spoke.nft(LISTS).unwrap();
    let listed = lab.spoke.ok(&["nft", "-j", "list", "ruleset"]).unwrap();
    let wanted = sets(&decode::ruleset(listed.as_bytes()).unwrap());
    assert_eq!(wanted.iter().map(|(.., set)| set.elements.len()).collect::<Vec<_>>(), [2, 2, 1, 3, 1, 1]);
    assert_eq!(sets(&lab.spoke.inside(nft::list_ruleset).unwrap()), wanted);

    // With lists of addresses beside them and without are two ways to list.
    for text in [CONDITIONS.to_owned(), format!("flush ruleset\n{CONDITIONS}")] {
        lab.spoke.nft(&text).unwrap();
        let found = lab.spoke.inside(nft::list_ruleset).unwrap();
        let rules = &found.table(TableFamily::Inet, "c").unwrap().chains[0].rules;
        let rules: Vec<String> = rules.iter().map(render::rule).collect();
        assert_eq!(
            rules,
            [
                "meta nfproto ipv4 tcp dport 22 reject with tcp reset",
                "tcp dport 22 reject with tcp reset",
                "meta protocol ip6 tcp dport 22 reject with tcp reset"
            ]
        );
    }
}
