//! Ports that no rule tells apart, so that a question about all 65,535 is asked a few times.

use std::collections::BTreeSet;

use super::{Match, Nat, Op, Operand, Ruleset, Statement, Term, VerdictMap};
use crate::terms::Port;

/// Where one group of ports ends and the next begins.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Alike {
    /// The first port of each group.
    starts: Vec<u16>,
}

impl Alike {
    pub fn of(ruleset: &Ruleset) -> Self {
        let mut cuts = Cuts { starts: BTreeSet::from([1]), each: false };
        for table in &ruleset.tables {
            for statement in table.chains.iter().flat_map(|c| &c.rules).flat_map(|r| &r.statements) {
                cuts.statement(statement);
            }
            table.sets.iter().flat_map(|set| &set.elements).for_each(|element| cuts.operand(element));
        }
        let starts = if cuts.each { (1..=u16::MAX).collect() } else { cuts.starts.into_iter().collect() };
        Self { starts }
    }

    /// The number of the group.
    pub fn group(&self, port: Port) -> usize {
        self.starts.partition_point(|start| *start <= port.get())
    }
}

struct Cuts {
    starts: BTreeSet<u16>,
    /// A rule looks at single bits of the port.
    each: bool,
}

impl Cuts {
    fn range(&mut self, first: u64, last: u64) {
        if let Ok(first) = u16::try_from(first) {
            self.starts.insert(first.max(1));
        }
        if let Ok(next) = u16::try_from(last.saturating_add(1)) {
            self.starts.insert(next);
        }
    }

    fn statement(&mut self, statement: &Statement) {
        match statement {
            Statement::Match(asked) => self.asked(asked),
            Statement::Either(list) => list.iter().for_each(|asked| self.asked(asked)),
            Statement::Vmap { key, map } => {
                self.term(key, false);
                if let VerdictMap::Pairs(pairs) = map {
                    pairs.iter().for_each(|(key, _)| self.operand(key));
                }
            }
            Statement::Dnat(Nat { address, port }) => {
                address.iter().chain(port).for_each(|to| self.operand(to));
            }
            Statement::Redirect { port } => port.iter().for_each(|port| self.operand(port)),
            Statement::Neutral(json) | Statement::Maybe(json) | Statement::Unknown(json) => {
                self.numbers(json)
            }
            Statement::CounterRef(_)
            | Statement::Counter(_)
            | Statement::Accept
            | Statement::Drop
            | Statement::Reject { .. }
            | Statement::Jump(_)
            | Statement::Goto(_)
            | Statement::Return => {}
        }
    }

    fn asked(&mut self, Match { left, op, right }: &Match) {
        self.term(left, matches!(op, Op::Any | Op::NoneOf));
        self.operand(right);
    }

    fn term(&mut self, term: &Term, bits: bool) {
        match term {
            Term::Payload { field, .. } => self.each |= bits && field == "dport",
            // Replies come from the port.
            Term::Ct { key, .. } => {
                self.each |= bits && matches!(key.as_str(), "proto-dst" | "proto-src");
            }
            Term::And { term, .. } => self.term(term, true),
            Term::Concat(terms) => terms.iter().for_each(|term| self.term(term, bits)),
            Term::Unknown(json) => self.numbers(json),
            Term::Meta(_) | Term::Fib { .. } => {}
        }
    }

    fn operand(&mut self, operand: &Operand) {
        match operand {
            Operand::Number(number) => self.range(*number, *number),
            Operand::Range(first, last) => match (first.as_ref(), last.as_ref()) {
                (Operand::Number(first), Operand::Number(last)) => self.range(*first, *last),
                (first, last) => {
                    self.operand(first);
                    self.operand(last);
                }
            },
            Operand::Set(list) | Operand::Bits(list) | Operand::Concat(list) => {
                list.iter().for_each(|each| self.operand(each));
            }
            Operand::Unknown(text) | Operand::Text(text) => self.numbers(text),
            Operand::Address(_) | Operand::Prefix(_) | Operand::Named(_) => {}
        }
    }

    /// In what we don't understand, every number may be a port, and the end of a range.
    fn numbers(&mut self, json: &str) {
        for digits in json.split(|c: char| !c.is_ascii_digit()) {
            if let Ok(number) = digits.parse::<u64>() {
                self.range(number, number);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Chain, Rule, Table, TableFamily};
    use super::*;

    fn alike(statements: Vec<Statement>) -> Alike {
        let rule = Rule { statements, ..Rule::default() };
        let chain = Chain { name: "c".into(), base: None, rules: vec![rule] };
        let table = Table {
            family: TableFamily::Inet,
            name: "t".into(),
            dormant: false,
            chains: vec![chain],
            counters: Default::default(),
            sets: vec![],
        };
        Alike::of(&Ruleset { tables: vec![table] })
    }

    fn dport() -> Term {
        Term::Payload { protocol: "tcp".into(), field: "dport".into() }
    }

    fn groups(alike: &Alike, ports: &[u16]) -> Vec<usize> {
        ports.iter().filter_map(|port| Port::new(*port)).map(|port| alike.group(port)).collect()
    }

    #[test]
    fn ports_are_apart_where_a_rule_names_one_and_alike_between() {
        let number = |n| Box::new(Operand::Number(n));
        let set = Operand::Set(vec![Operand::Number(80), Operand::Range(number(1000), number(1999))]);
        let of = alike(vec![
            Statement::Match(Match { left: dport(), op: Op::Eq, right: set }),
            Statement::Unknown(r#"{"queue": {"num": 65535}}"#.into()),
        ]);
        let found = groups(&of, &[1, 79, 80, 81, 999, 1000, 1999, 2000, 65534, 65535]);
        assert_eq!(found, [1, 1, 2, 3, 3, 4, 4, 5, 5, 6]);
        assert_eq!(groups(&alike(vec![]), &[1, 80, 65535]), [1, 1, 1]);
    }

    /// As iptables' `-m multiport --ports` and `-m conntrack --ctreplsrcport`.
    #[test]
    fn what_xtables_ask_for_tells_ports_apart() {
        let asked = |left, op, right| Match { left, op, right: Operand::Number(right) };
        let source = || Term::Payload { protocol: "th".into(), field: "sport".into() };
        let reply = || Term::Ct { key: "proto-src".into(), dir: Some("reply".into()) };
        let of = alike(vec![
            Statement::Either(vec![asked(source(), Op::Eq, 80), asked(dport(), Op::Eq, 90)]),
            Statement::Match(asked(reply(), Op::Lt, 100)),
        ]);
        assert_eq!(groups(&of, &[79, 80, 89, 90, 91, 99, 100, 101, 102]), [1, 2, 3, 4, 5, 5, 6, 7, 7]);
        let of = alike(vec![Statement::Either(vec![asked(reply(), Op::Any, 4096)])]);
        assert_ne!(groups(&of, &[5000]), groups(&of, &[5001]));
    }

    #[test]
    fn a_rule_that_looks_at_bits_takes_each_port_by_itself() {
        let odd = Term::And { term: Box::new(dport()), mask: Operand::Number(1) };
        let of = alike(vec![Statement::Match(Match { left: odd, op: Op::Eq, right: Operand::Number(1) })]);
        assert_ne!(of.group(Port::new(5000).expect("a port")), of.group(Port::new(5001).expect("a port")));
    }
}
