//! Rule sets as other software on a host leaves them: tables, chains, sets and rules put together at random
//! from the parts that real ones are made of.

use crate::guard::Dice;

/// What a rule may ask for. Where nft wants no such thing in a family, the line is left out when it is loaded.
const MATCHES: &[&str] = &[
    "tcp dport 22",
    "tcp dport != 22",
    "tcp dport { 22, 80, 8000-9000 }",
    "tcp dport != { 22, 80, 443 }",
    "tcp dport 1-1023",
    "tcp dport != 8000-8999",
    "udp dport 53",
    "udp dport != { 53, 443 }",
    "th dport { 53, 5432 }",
    "tcp dport < 1024",
    "tcp dport >= 8080",
    "tcp sport >= 1024",
    "tcp sport != 20000-65535",
    "tcp dport @ports",
    "tcp dport != @ports",
    "udp dport @ports",
    "meta l4proto tcp",
    "meta l4proto != tcp",
    "meta l4proto { tcp, udp } th dport 8080",
    "meta nfproto ipv4",
    "meta nfproto ipv6",
    "meta nfproto != ipv4",
    "meta protocol ip",
    "meta protocol ip6",
    "iifname eth0",
    "iifname != eth0",
    "iifname \"eth*\"",
    "iifname { eth0, wg0 }",
    "iifname != { wg0, lo }",
    "iifname @ifaces",
    "iifname . tcp dport { eth0 . 22, eth0 . 443, wg0 . 22 }",
    "iif eth0",
    "iif != docker0",
    "oifname docker0",
    "oifname != docker0",
    "oifname \"wg*\"",
    "ip saddr 198.51.100.0/24",
    "ip saddr != 198.51.100.0/24",
    "ip saddr { 192.0.2.0/25, 203.0.113.9 }",
    "ip saddr 192.0.2.1-192.0.2.200",
    "ip saddr @nets",
    "ip saddr != @nets",
    "ip saddr @banned",
    "ip saddr & 255.255.0.0 == 198.51.0.0",
    "ip saddr . tcp dport @pairs",
    "ip saddr . tcp dport { 198.51.100.0/24 . 22-80, 192.0.2.1 . 443 }",
    "ip daddr . tcp dport { 198.51.100.7 . 22, 198.51.100.7 . 80, 10.84.0.16 . 22 }",
    "ip daddr { 198.51.100.7, 172.17.0.0/16 }",
    "ip daddr != 198.51.100.7",
    "ip6 saddr 2001:db8::/32",
    "ip6 saddr != { 2001:db8:1::/48, fe80::/10 }",
    "ip6 saddr @nets6",
    "ip6 daddr != fd00:17::2",
    "ip6 daddr & ffff:ffff:: == 2001:db8::",
    "ip protocol udp",
    "ip protocol != icmp",
    "ip6 nexthdr tcp",
    "ip version 4",
    "ct state new",
    "ct state established,related",
    "ct state != new",
    "ct state { new, untracked }",
    "ct state invalid",
    "ct state untracked",
    "ct state & (new | established) != 0",
    "ct status dnat",
    "ct status ! dnat",
    "ct status & dnat == dnat",
    "ct protocol tcp",
    "ct direction original",
    "ct direction reply",
    "meta l4proto tcp ct original proto-dst { 80, 8080 }",
    "meta l4proto tcp ct original proto-dst != 22",
    "meta l4proto udp ct original proto-dst 53",
    "ct original ip daddr 198.51.100.7",
    "ct original ip saddr != 198.51.100.0/24",
    "ct original ip6 daddr 2001:db8::/32",
    "tcp flags & (syn | ack) == syn",
    "tcp flags syn",
    "tcp flags != syn",
    "tcp flags & (fin | syn | rst | ack) != syn",
    "tcp flags ! ack",
    "fib daddr type local",
    "fib daddr type != local",
    "fib daddr type { local, broadcast }",
    "fib saddr type local",
    "meta mark 7",
    "meta mark != 0",
    "meta mark & 0x0f == 0x07",
    "ct mark 9",
    "ct mark and 0x8 == 0x8",
    "meta pkttype host",
    "ip frag-off & 0x1fff != 0",
    "icmp type echo-request",
    "icmpv6 type nd-neighbor-solicit",
];

/// Limits that no run reaches: what lies behind them is known to whoever knows that a packet comes alone.
const LIMITS: &[&str] = &[
    "limit rate 1000000/second burst 1000000 packets",
    "limit rate over 1000000/second burst 1000000 packets",
    "ct count 1000000",
    "ct count over 1000000",
];

/// What the evaluator does not know of a packet, or of a set that rules write to.
const OPAQUE: &[&str] = &[
    "ip ttl < 5",
    "meta length > 1000",
    "ip dscp != cs0",
    "ip saddr @seen",
    "meta skuid 0",
    "quota 1 mbytes",
    "numgen random mod 2 0",
];

const VERDICTS: &[&str] = &[
    "accept",
    "accept",
    "accept",
    "drop",
    "drop",
    "counter drop",
    "reject",
    "reject with tcp reset",
    "reject with icmp type host-prohibited",
    "reject with icmpv6 type admin-prohibited",
    "reject with icmpx type port-unreachable",
    "jump a",
    "jump a",
    "jump b",
    "goto a",
    "goto b",
    "return",
    "counter",
    "continue",
    "log prefix \"x\"",
    "counter name hits",
    "meta mark set 7",
    "meta mark set meta mark | 0x10",
    "ct mark set 9",
    "meta mark set ct mark",
];

const VMAPS: &[&str] = &[
    "tcp dport vmap { 22 : accept, 80-90 : jump a, 443 : drop }",
    "tcp dport vmap @ruling",
    "udp dport vmap { 53 : accept, 443 : drop }",
    "ct state vmap { established : accept, new : jump b, invalid : drop }",
    "ct state vmap { invalid : drop, established : accept, related : accept, untracked : return }",
    "iifname vmap { eth0 : goto a, wg0 : accept }",
    "iifname vmap { lo : accept, eth0 : jump a, docker0 : continue }",
    "ip daddr vmap { 198.51.100.0/24 : jump b, 172.17.0.2 : drop }",
    "ip saddr . tcp dport vmap { 198.51.100.99 . 22 : drop, 192.0.2.1 . 443 : accept }",
    "meta l4proto vmap { tcp : jump a, udp : return }",
    "meta nfproto vmap { ipv4 : jump a, ipv6 : jump b }",
];

const NAT: &[&str] = &[
    "tcp dport 8080 dnat ip to 172.17.0.2:80",
    "tcp dport 8080 dnat ip6 to [fd00:17::2]:80",
    "fib daddr type local tcp dport { 8443, 9984 } dnat ip to 172.17.0.2:443",
    "fib daddr type local udp dport 53 dnat ip to 172.17.0.2",
    "iifname eth0 tcp dport 5432 dnat ip to 10.84.0.1",
    "iifname eth0 tcp dport 2222 dnat ip to 198.51.100.7:22",
    "iifname eth0 ip daddr 198.51.100.7 tcp dport 19999 dnat ip to 203.0.113.47:80",
    "iifname eth0 ip daddr 203.0.113.77 dnat ip to 198.51.100.7",
    "tcp dport 8443 redirect to :443",
    "udp dport 443 redirect to :53",
    "ip6 daddr 2001:db8:1::7 tcp dport 22 redirect to :2222",
    "tcp dport 81 redirect",
    "ct state new tcp dport 443 dnat ip to 172.17.0.2",
    "tcp dport 80 accept",
    "iifname eth0 tcp dport 443 drop",
    "meta l4proto tcp dnat ip to ip saddr map { 192.0.2.0/25 : 172.17.0.2 }",
    "dnat ip to tcp dport map { 8080 : 172.17.0.2, 8443 : 10.84.0.1 }",
    "tcp dport 8080-8090 dnat ip to 172.17.0.2:8000-8010",
    "jump a",
];

const MANGLE: &[&str] = &[
    "udp dport 53 notrack",
    "tcp dport 5432 notrack",
    "tcp dport { 80, 5432 } meta mark set 7",
    "iifname wg0 meta mark set 0x17",
    "ip saddr 192.0.2.0/24 ct mark set 9",
    "meta mark set tcp dport map { 22 : 7, 80 : 1 }",
    "meta mark set tcp dport map { 22 : 7, 80 : 1 } drop",
    "counter name tcp dport map { 22 : \"hits\", 443 : \"hits\" } drop",
    "update @seen { ip saddr }",
];

/// Names that rules refer to. Of both address families everywhere: an `ip` table may name IPv6 addresses.
const SETS: &str = "\tset ports {\n\t\ttype inet_service\n\t\tflags interval\n\
    \t\telements = { 22, 80-90, 5432, 8000-8999 }\n\t}\n\
    \tset nets {\n\t\ttype ipv4_addr\n\t\tflags interval\n\
    \t\telements = { 192.0.2.0/25, 198.51.100.90-198.51.100.99, 10.84.0.0/24 }\n\t}\n\
    \tset nets6 {\n\t\ttype ipv6_addr\n\t\tflags interval\n\
    \t\telements = { 2001:db8:1::/48, fd84::-fd84::50 }\n\t}\n\
    \tset banned {\n\t\ttype ipv4_addr\n\t\tflags timeout\n\t\ttimeout 1d\n\
    \t\telements = { 203.0.113.9, 192.0.2.1 timeout 1h }\n\t}\n\
    \tset pairs {\n\t\ttype ipv4_addr . inet_service\n\t\tflags interval\n\
    \t\telements = { 198.51.100.0/24 . 22-80, 192.0.2.1 . 443 }\n\t}\n\
    \tset ifaces {\n\t\ttype ifname\n\t\telements = { \"eth0\", \"docker0\" }\n\t}\n\
    \tset seen {\n\t\ttype ipv4_addr\n\t\tsize 65535\n\t\tflags dynamic,timeout\n\t\ttimeout 1h\n\t}\n\
    \tcounter hits {\n\t}\n";

/// As text for `nft -f`. Lines that nft refuses are expected; see [`lines`].
pub fn foreign(dice: &mut Dice) -> String {
    let mut out = String::new();
    for number in 0..dice.below(4) {
        let family = *dice.pick(&["inet", "inet", "ip", "ip6"]);
        out += &table(dice, family, number);
    }
    if dice.below(6) == 0 {
        let rules =
            rules(dice, Depth::Base, &Vec::from_iter(MATCHES.iter().copied().filter(|m| !is_late(m))));
        out += &format!(
            "table netdev early {{\n\tchain a {{\n\t}}\n\tchain b {{\n\t}}\n\tchain ingress {{\n\
             \t\ttype filter hook ingress device \"eth0\" priority 0; policy accept;\n{rules}\t}}\n}}\n"
        );
    }
    out
}

/// What has no meaning before connection tracking and routing, or none on a device.
fn is_late(text: &str) -> bool {
    ["ct ", "fib ", "oif", "@", "jump", "goto", "reject"].iter().any(|word| text.contains(word))
}

fn table(dice: &mut Dice, family: &str, number: usize) -> String {
    let rules = |dice: &mut Dice, depth| rules(dice, depth, MATCHES);
    let (a, b) = (rules(dice, Depth::First), rules(dice, Depth::Second));
    let mut out = format!(
        "table {family} t{number} {{\n{SETS}\tchain a {{\n{}\t}}\n\tchain b {{\n{}\t}}\n\
         \tmap ruling {{\n\t\ttype inet_service : verdict\n\t\tflags interval\n\
         \t\telements = {{ 22 : accept, 80-89 : jump a, 443 : drop, 5432 : continue }}\n\t}}\n",
        // Chains that prerouting jumps to as well.
        without_rejects(&a),
        without_rejects(&b),
    );
    for (name, hook, priorities) in [
        ("input", "input", ["-150", "-20", "-10", "0", "100"]),
        ("forward", "forward", ["-150", "-20", "0", "10", "100"]),
        ("pre", "prerouting", ["-400", "-300", "-150", "-90", "0"]),
    ] {
        if dice.below(if hook == "prerouting" { 3 } else { 2 }) == 0 {
            continue;
        }
        let priority = *dice.pick(&priorities);
        // One that drops what it does not know would hide all others too often.
        let policy = if dice.below(5) == 0 && hook != "prerouting" { "drop" } else { "accept" };
        let mut body = rules(dice, Depth::Base);
        if policy == "drop" {
            body += &format!("\t\t{} accept\n\t\t{} accept\n", dice.pick(MATCHES), dice.pick(MATCHES));
        }
        if hook == "prerouting" {
            body = without_rejects(&body);
            if dice.below(2) == 0 {
                body = format!("\t\t{}\n{body}", dice.pick(MANGLE));
            }
        }
        out += &format!(
            "\tchain {name} {{\n\t\ttype filter hook {hook} priority {priority}; policy {policy};\n{body}\t}}\n"
        );
    }
    if dice.below(2) == 0 {
        let mut body = String::new();
        for _ in 0..1 + dice.below(4) {
            body += &format!("\t\t{}\n", dice.pick(NAT));
        }
        let priority = *dice.pick(&["dstnat", "dstnat", "-150", "10"]);
        out += &format!(
            "\tchain nat {{\n\t\ttype nat hook prerouting priority {priority}; policy accept;\n{body}\t}}\n"
        );
    }
    out + "}\n"
}

/// A reject is for input, forward and output.
fn without_rejects(rules: &str) -> String {
    let line = |line: &str| {
        format!("{}\n", line.find("reject").map_or(line.to_owned(), |at| line[..at].to_owned() + "drop"))
    };
    rules.lines().map(line).collect()
}

#[derive(Clone, Copy, PartialEq)]
enum Depth {
    /// Jumps nowhere.
    First,
    /// To the first only.
    Second,
    Base,
}

fn rules(dice: &mut Dice, depth: Depth, matches: &[&str]) -> String {
    let mut out = String::new();
    for _ in 0..dice.below(6) {
        let mut line = String::new();
        for _ in 0..1 + dice.below(2) {
            line += *dice.pick(matches);
            line += " ";
        }
        match dice.below(24) {
            0 | 1 => line = line + *dice.pick(LIMITS) + " ",
            2 if matches.len() == MATCHES.len() => line = line + *dice.pick(OPAQUE) + " ",
            // Set for whatever goes no further in this rule, too.
            3 => line = format!("meta mark set 7 {line}"),
            _ => {}
        }
        let ends = match dice.below(6) {
            0 => {
                // A map of verdicts is a rule of its own more often than not.
                if dice.below(2) == 0 {
                    line.clear();
                }
                *dice.pick(VMAPS)
            }
            _ => *dice.pick(VERDICTS),
        };
        let jumps = |to: &str| ends.contains(&format!("jump {to}")) || ends.contains(&format!("goto {to}"));
        let loops = match depth {
            Depth::First => jumps("a") || jumps("b") || ends.contains("@ruling"),
            Depth::Second => jumps("b"),
            Depth::Base => false,
        };
        // Not for what the map has nothing for.
        let behind = if !loops && ends.contains(" vmap ") && dice.below(3) == 0 { " drop" } else { "" };
        out += &format!("\t\t{line}{}{behind}\n", if loops { "drop" } else { ends });
    }
    out
}

/// Each line that can be left out without the rest losing its meaning: all rules.
pub fn lines(text: &str) -> Vec<usize> {
    let is_rule = |line: &str| {
        let line = line.trim_start();
        let of_a_set = ["type ", "flags ", "elements ", "timeout ", "size "];
        !line.ends_with('{') && !line.starts_with('}') && !of_a_set.iter().any(|head| line.starts_with(head))
    };
    text.lines().enumerate().filter(|(_, line)| is_rule(line)).map(|(at, _)| at).collect()
}

pub fn without(text: &str, line: usize) -> String {
    text.lines().enumerate().filter(|(at, _)| *at != line).map(|(_, line)| format!("{line}\n")).collect()
}
