//! The difference between the table that should be and the one that is, rule by rule.

use std::fmt;

use super::decode::unclear_flags;
use super::{Base, Change, NamedSet, Rule, Statement, Table, glass, normal, render};
use crate::terms::printable;

/// Every difference, chain by chain in the order of `desired`; empty where the kernel
/// holds what it should. Handles, amounts, order within sets and what nft writes
/// differently for the same meaning are no differences.
pub fn changes(desired: &Table, found: Option<&Table>) -> Vec<Change> {
    let Some(found) = found else { return vec![Change::TableMissing] };
    let mut out = vec![];
    if found.dormant && !desired.dormant {
        out.push(Change::Dormant);
    }
    for name in desired.counters.keys().filter(|name| !found.counters.contains_key(*name)) {
        out.push(Change::CounterMissing { name: name.clone() });
    }
    for set in desired.sets.iter().filter(|set| !found.sets.iter().any(|other| same_set(set, other))) {
        out.push(Change::SetMissing { name: set.name.clone() });
    }
    for (set, key) in glass::foreign(found).filter(|(set, _)| desired.sets.iter().any(|d| same_set(d, set))) {
        out.push(Change::ElementForeign { set: set.name.clone(), found: render::operand(key) });
    }
    for wanted in &desired.chains {
        let Some(chain) = found.chains.iter().find(|c| c.name == wanted.name) else {
            out.push(Change::ChainMissing { chain: wanted.name.clone() });
            continue;
        };
        if wanted.base != chain.base {
            let text = |base: &Option<Base>| base.as_ref().map_or("no hook".into(), render::base);
            out.push(Change::ChainDiffers {
                chain: wanted.name.clone(),
                wanted: text(&wanted.base),
                found: text(&chain.base),
            });
        }
        let rules: Vec<&Rule> = chain.rules.iter().filter(|r| **r != unclear_flags()).collect();
        rule_changes(&wanted.name, desired, &wanted.rules, &rules, &mut out);
    }
    for chain in &found.chains {
        if !desired.chains.iter().any(|d| d.name == chain.name) {
            out.push(Change::ChainForeign { chain: chain.name.clone() });
        }
    }
    out
}

/// Declared alike, and with the same in them, but for what comes and goes by itself: openings.
pub fn same_set(a: &NamedSet, b: &NamedSet) -> bool {
    let flags = |set: &NamedSet| {
        let mut flags = set.flags.clone();
        flags.sort();
        flags
    };
    let alike = (&a.name, &a.kind, a.map) == (&b.name, &b.kind, b.map) && flags(a) == flags(b);
    alike && (a.is_timed() || (a.truncated == b.truncated && normal::same_list(&a.elements, &b.elements)))
}

/// The differences as a diff: `-` goes, `+` comes, `~` changes. Empty for no differences.
pub fn plan_text(changes: &[Change]) -> String {
    let mut out = String::new();
    let mut chain = None;
    for change in changes {
        let (sign, text) = change.parts();
        if change.chain() != chain
            && let Some(name) = change.chain()
        {
            out.push_str(&format!("  chain {}\n", printable(name, 64)));
        }
        chain = change.chain();
        let indent = if chain.is_some() { "    " } else { "  " };
        out.push_str(&format!("{sign}{}{text}\n", &indent[1..]));
    }
    out
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (sign, text) = self.parts();
        let verb = match sign {
            '+' => "missing",
            '-' => "not ours",
            _ => "differs",
        };
        match self.chain() {
            Some(chain) => write!(f, "{verb} in chain {}: {text}", printable(chain, 64)),
            None => write!(f, "{verb}: {text}"),
        }
    }
}

impl Change {
    fn chain(&self) -> Option<&str> {
        match self {
            Change::RuleMissing { chain, .. }
            | Change::RuleForeign { chain, .. }
            | Change::RuleOrder { chain } => Some(chain),
            Change::TableMissing
            | Change::ChainMissing { .. }
            | Change::ChainDiffers { .. }
            | Change::ChainForeign { .. }
            | Change::CounterMissing { .. }
            | Change::SetMissing { .. }
            | Change::ElementForeign { .. }
            | Change::Dormant => None,
        }
    }

    fn parts(&self) -> (char, String) {
        match self {
            Change::TableMissing => ('+', "the whole table".into()),
            Change::ChainMissing { chain } => {
                ('+', format!("chain {} with all its rules", printable(chain, 64)))
            }
            Change::ChainDiffers { chain, wanted, found } => (
                '~',
                format!(
                    "chain {}: {} (wanted {})",
                    printable(chain, 64),
                    printable(found, 160),
                    printable(wanted, 160)
                ),
            ),
            Change::ChainForeign { chain } => ('-', format!("chain {}", printable(chain, 64))),
            Change::RuleMissing { wanted, .. } => ('+', printable(wanted, 400)),
            Change::RuleForeign { found, .. } => ('-', printable(found, 400)),
            Change::RuleOrder { .. } => ('~', "all rules are there, in another order".into()),
            Change::CounterMissing { name } => ('+', format!("counter {}", printable(name, 64))),
            Change::SetMissing { name } => ('+', format!("set {}", printable(name, 64))),
            Change::ElementForeign { set, found } => {
                ('-', format!("element {} of set {}", printable(found, 160), printable(set, 64)))
            }
            Change::Dormant => ('~', "the table is dormant: its rules see no packets".into()),
        }
    }
}

/// Rules are equal by what they do and by their comment, which is how ours are known.
type Form = (Option<String>, Vec<Statement>);

fn rule_changes(chain: &str, table: &Table, wanted: &[Rule], found: &[&Rule], out: &mut Vec<Change>) {
    let form = |rule: &Rule| -> Form { (rule.comment.clone(), normal::statements(rule, table.family)) };
    let a: Vec<Form> = wanted.iter().map(form).collect();
    let b: Vec<Form> = found.iter().map(|r| form(r)).collect();
    if a.len() == b.len() && a != b && is_permutation(&a, &b) {
        out.push(Change::RuleOrder { chain: chain.to_owned() });
        return;
    }
    for step in alignment(&a, &b) {
        out.push(match step {
            Step::Missing(i) => {
                Change::RuleMissing { chain: chain.to_owned(), wanted: render::rule(&wanted[i]) }
            }
            Step::Foreign(j) => Change::RuleForeign {
                chain: chain.to_owned(),
                found: render::rule(found[j]),
                handle: found[j].handle,
            },
        });
    }
}

fn is_permutation(a: &[Form], b: &[Form]) -> bool {
    if a.len() > ALIGN_MAX {
        return false;
    }
    let mut taken = vec![false; b.len()];
    a.iter().all(|x| match (0..b.len()).find(|j| !taken[*j] && b[*j] == *x) {
        Some(j) => {
            taken[j] = true;
            true
        }
        None => false,
    })
}

#[derive(Debug, PartialEq)]
enum Step {
    Missing(usize),
    Foreign(usize),
}

/// Above this many rules on a side, what differs in the middle is listed without looking
/// for the shortest difference, whose cost is the product.
const ALIGN_MAX: usize = 1_000;

/// What to take out of `b` and put in to get `a`, by the longest common subsequence of
/// what lies between their equal heads and tails.
fn alignment(a: &[Form], b: &[Form]) -> Vec<Step> {
    let head = a.iter().zip(b).take_while(|(x, y)| x == y).count();
    let tail = a[head..].iter().rev().zip(b[head..].iter().rev()).take_while(|(x, y)| x == y).count();
    let (m, n) = (a.len() - head - tail, b.len() - head - tail);
    let (x, y) = (&a[head..head + m], &b[head..head + n]);
    if m > ALIGN_MAX || n > ALIGN_MAX {
        let foreign = (head..head + n).map(Step::Foreign);
        return foreign.chain((head..head + m).map(Step::Missing)).collect();
    }
    // common[i][j]: length of the longest common subsequence of x[i..] and y[j..].
    let mut common = vec![vec![0u16; n + 1]; m + 1];
    for i in (0..m).rev() {
        for j in (0..n).rev() {
            common[i][j] =
                if x[i] == y[j] { common[i + 1][j + 1] + 1 } else { common[i + 1][j].max(common[i][j + 1]) };
        }
    }
    let (mut i, mut j) = (0, 0);
    let mut steps = vec![];
    while i < m || j < n {
        if i < m && j < n && x[i] == y[j] {
            (i, j) = (i + 1, j + 1);
        } else if j < n && (i == m || common[i][j + 1] >= common[i + 1][j]) {
            steps.push(Step::Foreign(head + j));
            j += 1;
        } else {
            steps.push(Step::Missing(head + i));
            i += 1;
        }
    }
    steps
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ruleset::{Chain, Operand, TableFamily, decode};
    use expect_test::{Expect, expect};

    fn capture() -> Table {
        let json = include_str!("captures/nixos-fw.json");
        let found = decode::ruleset(json.as_bytes()).expect("a capture");
        found.table(TableFamily::Inet, "nixos-fw").expect("the table").clone()
    }

    fn check(edit: impl FnOnce(&mut Table), want: Expect) {
        let desired = capture();
        let mut found = capture();
        edit(&mut found);
        want.assert_eq(&plan_text(&changes(&desired, Some(&found))));
    }

    fn chain<'a>(table: &'a mut Table, name: &str) -> &'a mut Chain {
        table.chains.iter_mut().find(|c| c.name == name).expect("the chain")
    }

    #[test]
    fn a_table_equals_itself_whatever_moved() {
        check(
            |t| {
                chain(t, "input").rules.iter_mut().for_each(|r| r.handle = Some(99));
                t.counters.insert("foreign".into(), Default::default());
            },
            expect![[""]],
        );
    }

    #[test]
    fn one_rule_put_in_or_taken_out_is_one_change() {
        check(
            |t| {
                chain(t, "input-allow").rules.remove(1);
            },
            expect![[r#"
                  chain input-allow
                +   udp dport 60000-61000 accept
            "#]],
        );
        check(
            |t| {
                let rule = Rule { statements: vec![Statement::Accept], handle: Some(7), comment: None };
                chain(t, "input-allow").rules.insert(0, rule);
            },
            expect![[r#"
                  chain input-allow
                -   accept
            "#]],
        );
    }

    #[test]
    fn order_policy_chains_and_sleep_are_told_apart() {
        check(
            |t| chain(t, "input-allow").rules.swap(0, 3),
            expect![[r#"
              chain input-allow
            ~   all rules are there, in another order
        "#]],
        );
        check(
            |t| {
                if let Some(base) = &mut chain(t, "input").base {
                    base.drops = false;
                }
            },
            expect![[r#"
                ~ chain input: type filter hook input priority 0; policy accept; (wanted type filter hook input priority 0; policy drop;)
            "#]],
        );
        check(
            |t| {
                t.dormant = true;
                t.chains.retain(|c| c.name != "rpfilter-allow");
                t.chains.push(Chain { name: "x\u{1b}[2J".into(), base: None, rules: vec![] });
            },
            expect![[r#"
                ~ the table is dormant: its rules see no packets
                + chain rpfilter-allow with all its rules
                - chain x�[2J
            "#]],
        );
        assert_eq!(changes(&capture(), None), vec![Change::TableMissing]);
        assert_eq!(Change::TableMissing.to_string(), "missing: the whole table");
    }

    #[test]
    fn a_set_is_what_is_in_it_unless_that_ends_by_itself() {
        let set = |flags: &[&str], elements: &[&str]| NamedSet {
            name: "s".into(),
            kind: "ipv4_addr".into(),
            map: false,
            flags: flags.iter().map(|flag| (*flag).to_owned()).collect(),
            elements: elements.iter().map(|net| Operand::Prefix(net.parse().expect("a prefix"))).collect(),
            timed: vec![],
            verdicts: vec![],
            truncated: false,
        };
        let list = |elements: &[&str]| set(&["interval"], elements);
        let wanted = list(&["10.0.0.0/24", "10.0.2.0/24"]);
        assert!(same_set(&wanted, &list(&["10.0.2.0/24", "10.0.0.0/25", "10.0.0.128/25"])));
        for other in [&["10.0.0.0/24"][..], &["10.0.0.0/24", "10.0.2.0/24", "0.0.0.0/1"], &[]] {
            assert!(!same_set(&wanted, &list(other)), "{other:?}");
        }
        assert!(!same_set(&wanted, &NamedSet { truncated: true, ..wanted.clone() }));
        let timed = |elements: &[&str]| set(&["interval", "timeout"], elements);
        assert!(same_set(&timed(&[]), &timed(&["10.0.0.0/24"])));
    }

    #[test]
    fn a_rule_with_another_comment_or_verdict_is_another_rule() {
        check(
            |t| {
                chain(t, "input-allow").rules[0].comment = Some("not mine".into());
                chain(t, "input-allow").rules[2].statements.pop();
            },
            expect![[r#"
                  chain input-allow
                -   tcp dport { 22, 80, 443 } accept comment "not mine"
                +   tcp dport { 22, 80, 443 } accept
                -   iifname "wg0" tcp dport 9100
                +   iifname "wg0" tcp dport 9100 accept
            "#]],
        );
    }
}
