//! Tables as nft's own text: for `nft -f` where our binary is not at hand, and for people.

use std::fmt::Write;

use super::normal;
use super::{Base, Hook, Match, Nat, Op, Operand, Rule, Statement, Table, TableFamily, Term, VerdictMap};
use crate::terms::{printable, push_address, push_net};

/// The table as a file for `nft -f`. Loading it again changes nothing, and named counters
/// keep what they counted. nft 1.0.6 wants every statement on its own line.
pub fn table(table: &Table) -> String {
    let name = format!("{} {}", family(table.family), table.name);
    let mut out = format!("table {name} {{\n}}\nflush table {name}\ntable {name} {{\n");
    for counter in table.counters.keys() {
        let _ = write!(out, "\tcounter {counter} {{\n\t}}\n");
    }
    for set in &table.sets {
        let _ = write!(out, "\tset {} {{\n\t\ttype {}\n", set.name, set.kind);
        if !set.flags.is_empty() {
            let _ = writeln!(out, "\t\tflags {}", set.flags.join(","));
        }
        // What ends by itself would begin anew, and for ever, by loading the text.
        if !set.is_timed() && !set.elements.is_empty() {
            let _ = writeln!(out, "\t\telements = {{ {} }}", list(&set.elements, ", "));
        }
        out.push_str("\t}\n");
    }
    for chain in &table.chains {
        let _ = writeln!(out, "\tchain {} {{", chain.name);
        if let Some(base) = &chain.base {
            let _ = writeln!(out, "\t\t{}", self::base(base));
        }
        for rule in &chain.rules {
            let _ = writeln!(out, "\t\t{}", self::rule(rule));
        }
        out.push_str("\t}\n");
    }
    out.push_str("}\n");
    out
}

/// One rule on one line.
pub fn rule(rule: &Rule) -> String {
    let mut words: Vec<String> = rule.statements.iter().map(statement).collect();
    if let Some(comment) = &rule.comment {
        words.push(format!("comment {}", quoted(comment)));
    }
    words.join(" ")
}

/// `type filter hook input priority -10; policy accept;`
pub fn base(base: &Base) -> String {
    let hook = match base.hook {
        Hook::Ingress => "ingress",
        Hook::Prerouting => "prerouting",
        Hook::Input => "input",
        Hook::Forward => "forward",
        Hook::Output => "output",
        Hook::Postrouting => "postrouting",
        Hook::Egress => "egress",
    };
    let devices = match base.devices.as_slice() {
        [] => String::new(),
        [one] => format!(" device {}", quoted(one)),
        many => {
            let names: Vec<String> = many.iter().map(|d| quoted(d)).collect();
            format!(" devices = {{ {} }}", names.join(", "))
        }
    };
    let policy = if base.drops { "drop" } else { "accept" };
    format!("type {} hook {hook}{devices} priority {}; policy {policy};", base.kind, base.priority)
}

pub fn family(family: TableFamily) -> &'static str {
    match family {
        TableFamily::Inet => "inet",
        TableFamily::Ip => "ip",
        TableFamily::Ip6 => "ip6",
        TableFamily::Arp => "arp",
        TableFamily::Bridge => "bridge",
        TableFamily::Netdev => "netdev",
    }
}

fn statement(statement: &Statement) -> String {
    match statement {
        Statement::Match(m) => comparison(m),
        // nft has no words for it.
        Statement::Either(list) if list.is_empty() => "<never>".into(),
        Statement::Either(list) => {
            format!("<{}>", list.iter().map(comparison).collect::<Vec<_>>().join(" or "))
        }
        Statement::CounterRef(name) => format!("counter name {}", quoted(name)),
        Statement::Counter(_) => "counter".into(),
        Statement::Accept => "accept".into(),
        Statement::Drop => "drop".into(),
        Statement::Return => "return".into(),
        Statement::Reject { tcp_reset: false } => "reject".into(),
        Statement::Reject { tcp_reset: true } => "reject with tcp reset".into(),
        Statement::Jump(chain) => format!("jump {}", bare(chain)),
        Statement::Goto(chain) => format!("goto {}", bare(chain)),
        Statement::Dnat(nat) => {
            let family = match &nat.address {
                Some(Operand::Address(a)) if a.is_ipv6() => " ip6",
                _ => " ip",
            };
            format!("dnat{family} to {}", nat_target(nat))
        }
        Statement::Redirect { port: None } => "redirect".into(),
        Statement::Redirect { port: Some(port) } => format!("redirect to :{}", operand(port)),
        Statement::Vmap { key, map } => match map {
            VerdictMap::Named(name) => format!("{} vmap @{}", term(key), bare(name)),
            VerdictMap::Pairs(pairs) => {
                let pairs: Vec<String> = pairs
                    .iter()
                    .map(|(k, v)| format!("{} : {}", value(key, k), self::statement(v)))
                    .collect();
                format!("{} vmap {{ {} }}", term(key), pairs.join(", "))
            }
        },
        Statement::Neutral(json) | Statement::Maybe(json) | Statement::Unknown(json) => foreign(json),
    }
}

/// `172.17.0.2:5432`, `[fd00::2]:80`, `:5353`.
pub(super) fn nat_target(nat: &Nat) -> String {
    let address = match &nat.address {
        None => String::new(),
        Some(Operand::Address(a)) if a.is_ipv6() && nat.port.is_some() => format!("[{a}]"),
        Some(other) => operand(other),
    };
    match &nat.port {
        None => address,
        Some(port) => format!("{address}:{}", operand(port)),
    }
}

fn comparison(m: &Match) -> String {
    let left = term(&m.left);
    let flags = |list: &[Operand]| {
        let words: Vec<String> = list.iter().map(|v| value(&m.left, v)).collect();
        words.join(",")
    };
    match (m.op, &m.right) {
        (Op::Any, Operand::Set(list) | Operand::Bits(list)) => format!("{left} {}", flags(list)),
        (Op::NoneOf, Operand::Set(list) | Operand::Bits(list)) => format!("{left} ! {}", flags(list)),
        (op, right) => {
            // Without a sign nft takes "==", except for flags, where it takes "any of".
            let flagged = match &m.left {
                Term::Ct { key, .. } => key == "status",
                Term::Payload { field, .. } => field == "flags",
                Term::And { .. } => true,
                _ => false,
            };
            let sign = match op {
                Op::Eq if flagged && !matches!(right, Operand::Set(_) | Operand::Named(_)) => "== ",
                Op::Eq | Op::Any => "",
                Op::Ne => "!= ",
                Op::Lt => "< ",
                Op::Gt => "> ",
                Op::Le => "<= ",
                Op::Ge => ">= ",
                Op::NoneOf => "! ",
            };
            format!("{left} {sign}{}", value(&m.left, right))
        }
    }
}

fn term(term: &Term) -> String {
    match term {
        Term::Meta(key) => match key.as_str() {
            "iifname" | "oifname" | "iif" | "oif" => key.clone(),
            _ => format!("meta {}", bare(key)),
        },
        Term::Payload { protocol, field } => format!("{} {}", bare(protocol), bare(field)),
        Term::Ct { key, dir } => match dir {
            Some(dir) => format!("ct {} {}", bare(dir), bare(key)),
            None => format!("ct {}", bare(key)),
        },
        Term::Fib { flags, result } => format!("fib {} {}", bare(&flags.join(" . ")), bare(result)),
        Term::And { term: inner, mask } => format!("{} & {}", self::term(inner), value(inner, mask)),
        Term::Concat(terms) => terms.iter().map(self::term).collect::<Vec<_>>().join(" . "),
        Term::Unknown(json) => foreign(json),
    }
}

/// A value as nft reads it back for `term`: names of interfaces are quoted.
fn value(term: &Term, value: &Operand) -> String {
    let interface = matches!(term, Term::Meta(key) if key.starts_with("iif") || key.starts_with("oif"));
    match value {
        Operand::Text(text) if interface => quoted(text),
        Operand::Set(values) => {
            let values: Vec<String> = values.iter().map(|v| self::value(term, v)).collect();
            format!("{{ {} }}", values.join(", "))
        }
        Operand::Concat(parts) => {
            let terms: &[Term] = if let Term::Concat(terms) = term { terms } else { &[] };
            let parts = parts.iter().enumerate();
            let parts: Vec<String> = parts
                .map(|(i, part)| terms.get(i).map_or_else(|| operand(part), |t| self::value(t, part)))
                .collect();
            parts.join(" . ")
        }
        other => operand(other),
    }
}

/// A value as nft reads it back.
pub fn operand(value: &Operand) -> String {
    let mut out = String::new();
    push_operand(&mut out, value);
    out
}

/// Several, as in an anonymous set.
pub fn list(values: &[Operand], between: &str) -> String {
    let mut out = String::new();
    push_list(&mut out, values, between);
    out
}

fn push_operand(out: &mut String, value: &Operand) {
    match value {
        Operand::Number(n) => drop(write!(out, "{n}")),
        Operand::Text(text) => out.push_str(&bare(text)),
        Operand::Address(address) => push_address(out, *address),
        Operand::Prefix(net) => push_net(out, &net.trunc()),
        Operand::Range(low, high) => match (low.as_ref(), high.as_ref()) {
            (Operand::Address(a), Operand::Address(b)) => match normal::prefix_of(*a, *b) {
                Some(net) => push_net(out, &net),
                None => drop(write!(out, "{a}-{b}")),
            },
            _ => {
                push_operand(out, low);
                out.push('-');
                push_operand(out, high);
            }
        },
        Operand::Set(values) => {
            out.push_str("{ ");
            push_list(out, values, ", ");
            out.push_str(" }");
        }
        Operand::Bits(flags) => match flags.as_slice() {
            [one] => push_operand(out, one),
            many => {
                out.push('(');
                push_list(out, many, "|");
                out.push(')');
            }
        },
        Operand::Named(name) => {
            out.push('@');
            out.push_str(&bare(name));
        }
        Operand::Concat(parts) => push_list(out, parts, " . "),
        Operand::Unknown(json) => out.push_str(&foreign(json)),
    }
}

fn push_list(out: &mut String, values: &[Operand], between: &str) {
    for (at, value) in values.iter().enumerate() {
        if at > 0 {
            out.push_str(between);
        }
        push_operand(out, value);
    }
}

/// Names of other people's chains and comments may hold anything. nft has no escape for a
/// quote, so it becomes another one.
fn quoted(text: &str) -> String {
    format!("\"{}\"", printable(text, 256).replace('"', "'"))
}

fn bare(text: &str) -> String {
    printable(text, 256).replace(['"', ';', '{', '}'], "?")
}

/// What we have no words for, as its JSON and shortened. Our own tables hold none.
fn foreign(json: &str) -> String {
    format!("<{}>", printable(json, 120))
}
