//! Verdicts without netfilter programs, for kernels before 6.4: a table of our own behind
//! all others, whose rules note probes and answers in sets and drop them.
//!
//! The table belongs to an interactive `nft` that we feed through a pipe. However this
//! process ends, the pipe is closed, nft ends, and the kernel takes the table away.

use std::fmt::Write as _;
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use serde::Deserialize;
use sidecar_ebpf::sweep::{Order, Trace, canary, ends};

use super::super::nft;
use crate::desired::PROBE_PRIORITY;
use crate::sys::probe::Mapped;

/// The audit's own, for as long as one sweep takes.
pub const TABLE: &str = "spokeguard_audit";
/// Behind every chain of others, and before conntrack confirms what passed.
const PRIORITY: i32 = i32::MAX - 7;
/// Before every chain of others, and still before conntrack.
const FIRST: i32 = i32::MIN + 7;
const READY: Duration = Duration::from_secs(10);

/// The rules for one sweep; gone when dropped.
pub struct Tables(Child);

impl Tables {
    pub fn put(order: &Order) -> anyhow::Result<Self> {
        let child = Command::new(nft::program()?)
            .arg("-i")
            // Where it would keep a history of what it is told.
            .env("HOME", "/proc")
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .context("start nft")?;
        let mut tables = Self(child);
        let script = script(order);
        let stdin = tables.0.stdin.as_mut().context("nft has no standard input")?;
        stdin.write_all(script.as_bytes()).and_then(|()| stdin.flush()).context("feed nft")?;
        let deadline = Instant::now() + READY;
        // The last command of the script.
        while let Err(error) = nft::listing(&["-j", "list", "chain", "inet", TABLE, "ready"]) {
            if matches!(error.downcast_ref(), Some(nft::NftError::Unsupported { .. })) {
                return Err(error);
            }
            if Instant::now() >= deadline || !matches!(tables.0.try_wait(), Ok(None)) {
                bail!("nft did not take the audit's table: {}", tables.complaint());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(tables)
    }

    /// Writes what the sets hold into the traces.
    pub fn read(&self, order: &Order, traces: &mut Mapped<Trace>) -> anyhow::Result<()> {
        for (set, end) in SETS {
            let json = nft::listing(&["-j", "list", "set", "inet", TABLE, set])?;
            for element in elements(&json).with_context(|| format!("read the set {set}"))? {
                let (port, found) = decode(order, end, &element)
                    .with_context(|| format!("read an element of the set {set}"))?;
                let seen = traces.get(u32::from(port)).unwrap_or_default().seen;
                traces.set(u32::from(port), Trace { seen, ..found });
            }
        }
        Ok(())
    }

    fn complaint(&mut self) -> String {
        let _ = self.0.kill();
        let mut text = Vec::new();
        if let Some(stderr) = self.0.stderr.as_mut() {
            let _ = stderr.take(4096).read_to_end(&mut text);
        }
        // Before the error it remarks on a terminal that it has not got, and after it on every further line.
        let text = String::from_utf8_lossy(&text);
        let error = text.lines().find(|line| line.contains("Error"));
        error.unwrap_or(text.trim()).to_owned()
    }
}

impl Drop for Tables {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

const SETS: [(&str, u8); 5] = [
    ("unreachable", ends::UNREACHABLE),
    ("was_reset", ends::RESET),
    ("answered", ends::ANSWERED),
    ("forwarded", ends::FORWARD),
    ("delivered", ends::LOCAL),
];

/// As the programs do it; `@th,OFFSET,BITS` are the words of [`Order::words_at`].
fn script(order: &Order) -> String {
    let ipv4 = order.is_ipv4();
    let (family, ip, icmp, inner) =
        if ipv4 { ("ipv4", "ip", "icmp", 8 + 20) } else { ("ipv6", "ip6", "icmpv6", 8 + 40) };
    let l4 = if order.proto == 6 { "tcp" } else { "udp" };
    let (head_at, token_at) = Order::words_at(order.proto);
    let (high, token, port) = (order.head >> 16, order.token, order.source_port);
    // The words of a probe whose transport header begins at a byte.
    let probe =
        |at: usize| format!("@th,{},16 {high} @th,{},32 {token}", (at + head_at) * 8, (at + token_at) * 8);
    let own = |at: usize| format!("@th,{},16", (at + head_at + 2) * 8);
    let mut text = format!("add table inet {TABLE} {{ flags owner; }}\n");
    let sets = [
        ("delivered", format!("{} . {ip} daddr . {l4} dport", own(0))),
        ("forwarded", format!("{} . {ip} daddr . {l4} dport", own(0))),
        ("was_reset", "@th,80,16".to_owned()),
        ("answered", if order.proto == 6 { "@th,80,16".to_owned() } else { "udp sport".to_owned() }),
        ("unreachable", format!("{} . @th,0,16", own(inner))),
    ];
    for (name, kind) in &sets {
        let _ = writeln!(text, "add set inet {TABLE} {name} {{ typeof {kind}; size 65536; flags dynamic; }}");
    }
    for (name, hook, priority) in [
        ("arrived", "prerouting", FIRST),
        ("delivered", "input", PRIORITY),
        ("forwarded", "forward", PRIORITY),
        ("out", "postrouting", PRIORITY),
    ] {
        let _ = writeln!(
            text,
            "add chain inet {TABLE} {name} {{ type filter hook {hook} priority {priority}; policy accept; }}"
        );
    }
    let mine = format!("meta nfproto {family} meta l4proto {l4} {}", probe(0));
    if order.canary & canary::PLAIN == 0 {
        // Our rules are told, also where none of our programs stands on the device.
        let _ = writeln!(text, "add rule inet {TABLE} arrived {mine} meta priority set {PROBE_PRIORITY}");
    }
    let mut rule = |chain: &str, rule: &str| {
        let _ = writeln!(text, "add rule inet {TABLE} {chain} meta nfproto {family} {rule} drop");
    };
    let add = |set: usize| format!("add @{} {{ {} }}", sets[set].0, sets[set].1);
    if order.reply == 0 {
        rule("delivered", &format!("meta l4proto {l4} {} {}", probe(0), add(0)));
        rule("forwarded", &format!("meta l4proto {l4} {} {}", probe(0), add(1)));
    }
    let unreachable = format!("{icmp} type destination-unreachable {} {}", probe(inner), add(4));
    rule("out", &unreachable);
    if order.proto == 6 {
        let answer = format!("tcp dport {port} @th,64,16 {high}");
        rule("out", &format!("{answer} tcp flags & (syn|rst|ack) == (rst|ack) {}", add(2)));
        rule("out", &format!("{answer} tcp flags & (syn|rst|ack) == (syn|ack) {}", add(3)));
    } else if order.reply != 0 {
        let to = if ipv4 {
            let mask = !u32::from(order.spread_mask);
            format!("ip daddr & {} == {}", Ipv4Addr::from(mask), Ipv4Addr::from(order.source[0] & mask))
        } else {
            let bits = |words: [u32; 4]| words.iter().fold(0, |bits, word| bits << 32 | u128::from(*word));
            let mask = [u32::MAX, !u32::from(order.spread_mask), u32::MAX, u32::MAX];
            let mut to = order.source;
            to[1] &= mask[1];
            format!("ip6 daddr & {} == {}", Ipv6Addr::from(bits(mask)), Ipv6Addr::from(bits(to)))
        };
        rule("out", &format!("udp dport {port} {to} {}", add(3)));
    }
    let _ = writeln!(text, "add chain inet {TABLE} ready");
    text
}

/// One element of a set: a single value, or several that belong together.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
pub(in crate::source) enum Element {
    Together { concat: Vec<Value> },
    Single(Value),
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
pub(in crate::source) enum Value {
    Number(u64),
    Text(String),
}

pub(in crate::source) fn elements(json: &[u8]) -> anyhow::Result<Vec<Element>> {
    #[derive(Deserialize)]
    struct Listing {
        nftables: Vec<Object>,
    }
    #[derive(Deserialize)]
    struct Object {
        set: Option<Set>,
    }
    #[derive(Deserialize)]
    struct Set {
        #[serde(default)]
        elem: Vec<Element>,
    }
    let listing: Listing = serde_json::from_slice(json)?;
    Ok(listing.nftables.into_iter().filter_map(|object| object.set).flat_map(|set| set.elem).collect())
}

pub(in crate::source) fn decode(order: &Order, end: u8, element: &Element) -> Option<(u16, Trace)> {
    let values = match element {
        Element::Together { concat } => concat.as_slice(),
        Element::Single(value) => std::slice::from_ref(value),
    };
    let mut trace = Trace { end, ..Trace::default() };
    let port = |word: u16| word ^ order.head as u16;
    let first = number(values.first()?)?;
    match (end, &values[1..]) {
        (ends::LOCAL | ends::FORWARD, [Value::Text(address), to]) => {
            match address.parse().ok()? {
                IpAddr::V4(address) => trace.address[..4].copy_from_slice(&address.octets()),
                IpAddr::V6(address) => trace.address = address.octets(),
            }
            trace.port = number(to)?;
            Some((port(first), trace))
        }
        // Type and code in one number; by themselves nft would print them as names.
        (ends::UNREACHABLE, [both]) => {
            [trace.icmp_type, trace.icmp_code] = number(both)?.to_be_bytes();
            Some((port(first), trace))
        }
        // One more than the sequence number; its lower half is never all ones, since no
        // probe is for port 0.
        (ends::RESET, []) => Some((port(first.wrapping_sub(1)), trace)),
        (ends::ANSWERED, []) if order.proto == 6 => Some((port(first.wrapping_sub(1)), trace)),
        (ends::ANSWERED, []) => Some((first, trace)),
        _ => None,
    }
}

fn number(value: &Value) -> Option<u16> {
    match value {
        Value::Number(number) => u16::try_from(*number).ok(),
        Value::Text(text) => text.parse().ok(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(end: u8, json: &str) -> Option<(u16, Trace)> {
        let order = Order { head: 0x1234_ffff, proto: 6, ..Order::default() };
        let element = serde_json::from_str(json).expect("an element");
        decode(&order, end, &element)
    }

    #[test]
    fn elements_say_which_port_was_probed_and_what_became_of_it() {
        let (port, trace) = found(ends::LOCAL, r#"{"concat":[57455,"198.51.100.7",80]}"#).expect("one");
        assert_eq!((port, trace.port, &trace.address[..4]), (8080, 80, &[198, 51, 100, 7][..]));
        // 65535 ^ 443 is the sequence number, and the answer's is one more.
        assert_eq!(found(ends::RESET, "65093").expect("one").0, 443);
        let (port, trace) = found(ends::UNREACHABLE, r#"{"concat":[65092,781]}"#).expect("one");
        assert_eq!((port, trace.icmp_type, trace.icmp_code), (443, 3, 13));
    }

    #[test]
    fn what_is_no_element_of_ours_is_refused() {
        for (end, json) in [
            (ends::LOCAL, "5"),
            (ends::LOCAL, r#"{"concat":[1,"nowhere",80]}"#),
            (ends::LOCAL, r#"{"concat":[1,"::1",70000]}"#),
            (ends::LOCAL, r#"{"concat":[]}"#),
            (ends::RESET, r#"{"concat":[1,2]}"#),
            (ends::UNREACHABLE, r#"{"concat":[1,65536]}"#),
        ] {
            assert_eq!(found(end, json), None, "{json}");
        }
    }

    #[test]
    fn a_table_names_every_set_that_is_read() {
        for proto in [6, 17] {
            for family in [0, 1] {
                for reply in [0, 1] {
                    let text = script(&Order { head: 0xffff, proto, family, reply, ..Order::default() });
                    for (set, _) in SETS {
                        assert!(text.contains(&format!("add set inet {TABLE} {set} ")), "{set}: {text}");
                    }
                    assert_eq!(text.contains("delivered meta"), reply == 0, "{text}");
                    assert!(text.contains("flags owner") && text.ends_with(" ready\n"), "{text}");
                    assert_eq!(text.matches("meta priority set 7370:6f6b").count(), 1, "{text}");
                }
            }
        }
        let plain = script(&Order { head: 0xffff, proto: 6, canary: canary::PLAIN, ..Order::default() });
        assert!(!plain.contains("priority set"), "{plain}");
    }
}
