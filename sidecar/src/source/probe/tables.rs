//! Verdicts without netfilter programs, for kernels before 6.4: a table of our own behind
//! all others, whose rules note probes and answers in sets and drop them.
//!
//! The table belongs to an interactive `nft` that we feed through a pipe. However this
//! process ends, the pipe is closed, nft ends, and the kernel takes the table away.

use std::fmt::Write as _;
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, Ipv6Addr};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use sidecar_ebpf::sweep::{Order, Trace, canary, ends, stages};

use super::super::netlink::{NetlinkError, array_at};
use super::super::{nft, nft_lists};
use crate::desired::{PRIORITY as OURS, PROBE_PRIORITY};
use crate::sys::probe::Mapped;

/// How the names of its tables begin. Each sweep has one of its own, since another operator's with another run
/// directory may be under way.
const PREFIX: &str = "spokeguard_audit_";
/// And how those end that catch what is left over.
const SUFFIXES: [&str; 2] = ["_kept", "_left"];
/// Behind every chain of others, and before conntrack confirms what passed; what is left over meets one more.
const PRIORITY: i32 = i32::MAX - 7;
/// Before every chain of others, and still before conntrack.
const FIRST: i32 = i32::MIN + 7;
/// One for each port. The kernel makes room for as many at once, so that the set is never moved to a larger place: it
/// would be while it is listed, and the list then holds some elements twice and others, as many, not at all. One more,
/// and its hint of 16 bits (`rhashtable_params.nelem_hint`, Linux 6.18 as well) would be 0, room for 64.
const ELEMENTS: u16 = u16::MAX;
/// Of a trial, which asks of one port.
const TRIAL_ELEMENTS: u16 = 64;
/// How often such a set is listed again.
const LISTINGS: u8 = 3;
const READY: Duration = Duration::from_secs(10);

/// Whether a table of family inet is one by which a sweep reads verdicts, for as long as that takes.
pub fn is_table(name: &[u8]) -> bool {
    let token = name.strip_prefix(PREFIX.as_bytes());
    let token = token.map(|token| {
        let bare = SUFFIXES.iter().find_map(|suffix| token.strip_suffix(suffix.as_bytes()));
        bare.unwrap_or(token)
    });
    token.is_some_and(|token| token.len() == 8 && token.iter().all(u8::is_ascii_hexdigit))
}

/// Whom a table is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Whose {
    Sweep,
    /// With sensors on both sides of our table, too.
    Trial,
    /// Catches what the sweep's, which comes first, no longer does.
    Keeper,
    /// Of a sweep that ends what one before it left, whose keeper may still be there.
    Next,
}

fn name(order: &Order, whose: Whose) -> String {
    let suffix = match whose {
        Whose::Sweep | Whose::Trial => "",
        Whose::Keeper => SUFFIXES[0],
        Whose::Next => SUFFIXES[1],
    };
    format!("{PREFIX}{:08x}{suffix}", order.token)
}

/// The rules for one sweep; gone when dropped.
pub struct Tables {
    nft: Child,
    name: String,
    whose: Whose,
}

impl Tables {
    pub fn put(order: &Order, whose: Whose) -> anyhow::Result<Self> {
        let child = Command::new(nft::program()?)
            .arg("-i")
            // Where it would keep a history of what it is told.
            .env("HOME", "/proc")
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .context("start nft")?;
        let mut tables = Self { nft: child, name: name(order, whose), whose };
        let script = script(order, whose);
        let stdin = tables.nft.stdin.as_mut().context("nft has no standard input")?;
        stdin.write_all(script.as_bytes()).and_then(|()| stdin.flush()).context("feed nft")?;
        let deadline = Instant::now() + READY;
        // The last command of the script.
        while let Err(error) = nft::listing(&["-j", "list", "chain", "inet", &tables.name, "ready"]) {
            if matches!(error.downcast_ref(), Some(nft::NftError::Unsupported { .. })) {
                return Err(error);
            }
            if Instant::now() >= deadline || !matches!(tables.nft.try_wait(), Ok(None)) {
                bail!("nft did not take the audit's table: {}", tables.complaint());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(tables)
    }

    /// Writes what the sets hold into the traces.
    pub fn read(&self, order: &Order, traces: &mut Mapped<Trace>) -> anyhow::Result<()> {
        for (set, says) in sets(self.whose) {
            let list = || {
                nft_lists::keys(&self.name, set, usize::from(ELEMENTS), |key| {
                    decode(order, *says, key).ok_or(NetlinkError::Malformed("an element of another form"))
                })
            };
            let mut keys = list()?;
            let mut again = 0;
            // What is not in it would be said to be shut.
            while has_one_twice(&mut keys) {
                again += 1;
                if again > LISTINGS {
                    bail!(
                        "set {set} of table {} was moved by the kernel each time that it was read: run the audit again",
                        self.name
                    );
                }
                keys = list()?;
            }
            for (port, found) in keys {
                let before = traces.get(u32::from(port)).unwrap_or_default();
                traces.set(u32::from(port), joined(before, found));
            }
        }
        Ok(())
    }

    fn complaint(&mut self) -> String {
        let _ = self.nft.kill();
        let mut text = Vec::new();
        if let Some(stderr) = self.nft.stderr.as_mut() {
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
        drop(self.nft.stdin.take());
        let _ = self.nft.kill();
        let _ = self.nft.wait();
    }
}

/// What it says of a probe that it is in a set.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(in crate::source) enum Says {
    /// One of [`ends`].
    Ends(u8),
    /// One of [`stages`].
    Was(u8),
}

/// The later the set, the later a probe gets there.
const SETS: [(&str, Says); 7] = [
    ("to_table", Says::Was(stages::TO_TABLE)),
    ("past_table", Says::Was(stages::PAST_TABLE)),
    ("unreachable", Says::Ends(ends::UNREACHABLE)),
    ("was_reset", Says::Ends(ends::RESET)),
    ("answered", Says::Ends(ends::ANSWERED)),
    ("forwarded", Says::Ends(ends::FORWARD)),
    ("delivered", Says::Ends(ends::LOCAL)),
];

/// Those that are read; where a probe met our table only a trial asks.
fn sets(whose: Whose) -> &'static [(&'static str, Says)] {
    if whose == Whose::Trial { &SETS } else { &SETS[2..] }
}

/// Sorts them: a set has each element once, and so has a list of it that is whole.
fn has_one_twice<T: Ord>(keys: &mut [T]) -> bool {
    keys.sort_unstable();
    keys.windows(2).any(|two| two[0] == two[1])
}

/// What is known of a probe and what a set adds.
fn joined(before: Trace, found: Trace) -> Trace {
    let stages = before.stages | found.stages;
    let last = if found.end == ends::NONE { before } else { found };
    Trace { seen: before.seen, arrivals: before.arrivals, stages, ..last }
}

/// As the programs do it; `@th,OFFSET,BITS` are the words of [`Order::words_at`].
fn script(order: &Order, whose: Whose) -> String {
    let (table, ipv4) = (name(order, whose), order.is_ipv4());
    let last = if matches!(whose, Whose::Keeper | Whose::Next) { PRIORITY + 1 } else { PRIORITY };
    let (family, ip, icmp, inner) =
        if ipv4 { ("ipv4", "ip", "icmp", 8 + 20) } else { ("ipv6", "ip6", "icmpv6", 8 + 40) };
    let l4 = if order.proto == 6 { "tcp" } else { "udp" };
    let (head_at, token_at) = Order::words_at(order.proto);
    let (high, token, port) = (order.head >> 16, order.token, order.source_port);
    // The words of a probe whose transport header begins at a byte.
    let probe =
        |at: usize| format!("@th,{},16 {high} @th,{},32 {token}", (at + head_at) * 8, (at + token_at) * 8);
    let own = |at: usize| format!("@th,{},16", (at + head_at + 2) * 8);
    let elements = if whose == Whose::Trial { TRIAL_ELEMENTS } else { ELEMENTS };
    let mut text = format!("add table inet {table} {{ flags owner; }}\n");
    let kinds = [
        ("delivered", format!("{} . {ip} daddr . {l4} dport", own(0))),
        ("forwarded", format!("{} . {ip} daddr . {l4} dport", own(0))),
        ("was_reset", "@th,80,16".to_owned()),
        ("answered", if order.proto == 6 { "@th,80,16".to_owned() } else { "udp sport".to_owned() }),
        ("unreachable", format!("{} . @th,0,16", own(inner))),
        ("to_table", own(0)),
        ("past_table", own(0)),
    ];
    for (name, kind) in kinds.iter().filter(|(name, _)| sets(whose).iter().any(|(set, _)| set == name)) {
        let _ = writeln!(
            text,
            "add set inet {table} {name} {{ typeof {kind}; size {elements}; flags dynamic; }}"
        );
    }
    for (name, hook, priority) in [
        ("arrived", "prerouting", FIRST),
        ("delivered", "input", last),
        ("forwarded", "forward", last),
        ("out", "postrouting", last),
    ] {
        let _ = writeln!(
            text,
            "add chain inet {table} {name} {{ type filter hook {hook} priority {priority}; policy accept; }}"
        );
    }
    let mine = format!("meta nfproto {family} meta l4proto {l4} {}", probe(0));
    if order.canary & canary::PLAIN == 0 {
        // Our rules are told, also where none of our programs stands on the device.
        let _ = writeln!(text, "add rule inet {table} arrived {mine} meta priority set {PROBE_PRIORITY}");
    }
    if whose == Whose::Trial {
        for (side, priority, (set, key)) in [("to", OURS - 1, &kinds[5]), ("past", OURS + 1, &kinds[6])] {
            for hook in ["input", "forward"] {
                let _ = writeln!(
                    text,
                    "add chain inet {table} {side}_{hook} {{ type filter hook {hook} priority {priority}; }}\n\
                     add rule inet {table} {side}_{hook} {mine} add @{set} {{ {key} }}"
                );
            }
        }
    }
    let mut rule = |chain: &str, rule: &str| {
        let _ = writeln!(text, "add rule inet {table} {chain} meta nfproto {family} {rule} drop");
    };
    let add = |set: usize| format!("add @{} {{ {} }}", kinds[set].0, kinds[set].1);
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
    let _ = writeln!(text, "add chain inet {table} ready");
    text
}

/// The key of an element: one word, or several that belong together, each filled up to four bytes.
pub(in crate::source) fn decode(order: &Order, says: Says, key: &[u8]) -> Option<(u16, Trace)> {
    let word = |at| array_at(key, at).map(u16::from_be_bytes);
    let port = |word: u16| word ^ order.head as u16;
    let first = word(0)?;
    let end = match says {
        Says::Was(stages) => return Some((port(first), Trace { stages, ..Trace::default() })),
        Says::Ends(end) => end,
    };
    let mut trace = Trace { end, ..Trace::default() };
    let port = match end {
        ends::LOCAL | ends::FORWARD => {
            let address = key.get(4..key.len().checked_sub(4)?)?;
            let expected = if order.is_ipv4() { 4 } else { 16 };
            trace.address.get_mut(..expected).filter(|_| address.len() == expected)?.copy_from_slice(address);
            trace.port = word(4 + expected)?;
            port(first)
        }
        // Type and code in one word; by themselves nft would write them as names.
        ends::UNREACHABLE => {
            [trace.icmp_type, trace.icmp_code] = array_at(key, 4)?;
            port(first)
        }
        // One more than the sequence number; its lower half is never all ones, since no
        // probe is for port 0.
        ends::RESET => port(first.wrapping_sub(1)),
        ends::ANSWERED if order.proto == 6 => port(first.wrapping_sub(1)),
        ends::ANSWERED => first,
        _ => return None,
    };
    Some((port, trace))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(end: u8, key: &[u8]) -> Option<(u16, Trace)> {
        let order = Order { head: 0x1234_ffff, proto: 6, ..Order::default() };
        decode(&order, Says::Ends(end), key)
    }

    #[test]
    fn elements_say_which_port_was_probed_and_what_became_of_it() {
        let key = [0xe0, 0x6f, 0, 0, 198, 51, 100, 7, 0, 80, 0, 0];
        let (port, trace) = found(ends::LOCAL, &key).expect("one");
        assert_eq!((port, trace.port, &trace.address[..4]), (8080, 80, &[198, 51, 100, 7][..]));
        let key: Vec<u8> = [&[0xe0, 0x6f, 0, 0][..], &[7; 16], &[0, 80, 0, 0]].concat();
        assert_eq!(found(ends::LOCAL, &key), None, "an address of the other family");
        let order = Order { head: 0x1234_ffff, proto: 17, family: 1, ..Order::default() };
        let (port, trace) = decode(&order, Says::Ends(ends::FORWARD), &key).expect("one");
        assert_eq!((port, trace.port, trace.address), (8080, 80, [7; 16]));
        // 65535 ^ 443 is the sequence number, and the answer's is one more.
        assert_eq!(found(ends::RESET, &65093u16.to_be_bytes()).expect("one").0, 443);
        assert_eq!(decode(&order, Says::Ends(ends::ANSWERED), &[1, 187]).expect("one").0, 443);
        let (port, trace) = found(ends::UNREACHABLE, &[0xfe, 0x44, 0, 0, 3, 13, 0, 0]).expect("one");
        assert_eq!((port, trace.icmp_type, trace.icmp_code), (443, 3, 13));
    }

    #[test]
    fn tables_of_sweeps_are_told_from_others() {
        let order = Order { token: 0xbeef, ..Order::default() };
        assert_eq!(name(&order, Whose::Sweep), "spokeguard_audit_0000beef");
        assert_eq!(name(&order, Whose::Keeper), "spokeguard_audit_0000beef_kept");
        assert!(
            [Whose::Sweep, Whose::Keeper, Whose::Next]
                .iter()
                .all(|whose| is_table(name(&order, *whose).as_bytes()))
        );
        let others = [
            "spokeguard",
            "spokeguard_audit",
            "spokeguard_audit_",
            "spokeguard_audit_0000beef0",
            "spokeguard_audit__kept",
        ];
        assert!(!others.iter().chain(&["spokeguard_audit_0000b33z"]).any(|other| is_table(other.as_bytes())));
    }

    #[test]
    fn what_is_no_element_of_ours_is_refused() {
        for (end, key) in [
            (ends::LOCAL, &[1, 2, 0, 0][..]),
            (ends::LOCAL, &[1, 2, 0, 0, 198, 51, 100, 7]),
            (ends::LOCAL, &[1, 2, 0, 0, 198, 51, 100, 7, 0]),
            (ends::LOCAL, &[]),
            (ends::RESET, &[1]),
            (ends::UNREACHABLE, &[1, 2, 0, 0, 3]),
            (ends::NONE, &[1, 2]),
        ] {
            assert_eq!(found(end, key), None, "{key:?}");
        }
    }

    #[test]
    fn a_list_that_has_an_element_twice_is_told_wherever_the_two_stand() {
        let at = |end| Trace { end, ..Trace::default() };
        let (a, b) = ((7, at(ends::LOCAL)), (7, at(ends::FORWARD)));
        assert!(!has_one_twice(&mut [a, b, (8, a.1)]), "a port may have two");
        assert!(!has_one_twice::<(u16, Trace)>(&mut []));
        for mut twice in [vec![a, b, a], vec![(8, a.1), a, b, (8, a.1)]] {
            assert!(has_one_twice(&mut twice), "{twice:?}");
        }
    }

    #[test]
    fn where_a_probe_was_does_not_hide_where_it_ended() {
        let seen = Trace { seen: 1, arrivals: 3, ..Trace::default() };
        let was = |stages| Trace { stages, ..Trace::default() };
        let end = Trace { end: ends::LOCAL, port: 80, ..Trace::default() };
        let all = [was(stages::TO_TABLE), end, was(stages::PAST_TABLE)].into_iter().fold(seen, joined);
        let both = stages::TO_TABLE | stages::PAST_TABLE;
        assert_eq!(all, Trace { seen: 1, arrivals: 3, stages: both, ..end });
    }

    #[test]
    fn a_table_names_every_set_that_is_read() {
        for proto in [6, 17] {
            for family in [0, 1] {
                for reply in [0, 1] {
                    let order = Order { head: 0xffff, proto, family, reply, ..Order::default() };
                    let (text, around) = (script(&order, Whose::Sweep), script(&order, Whose::Trial));
                    for (set, _) in SETS {
                        let added = |text: &str, whose| {
                            text.contains(&format!("add set inet {} {set} ", name(&order, whose)))
                        };
                        assert!(added(&around, Whose::Trial), "{set}: {around}");
                        assert_eq!(
                            added(&text, Whose::Sweep),
                            sets(Whose::Sweep).iter().any(|(read, _)| *read == set),
                            "{set}: {text}"
                        );
                    }
                    assert_eq!(text.contains("delivered meta"), reply == 0, "{text}");
                    assert!(text.contains("flags owner") && text.ends_with(" ready\n"), "{text}");
                    assert_eq!(text.matches("meta priority set 7370:6f6b").count(), 1, "{text}");
                    assert_eq!(
                        (text.matches("_table {").count(), around.matches("_table {").count()),
                        (0, 6)
                    );
                }
            }
        }
        let plain = script(
            &Order { head: 0xffff, proto: 6, canary: canary::PLAIN, ..Order::default() },
            Whose::Sweep,
        );
        assert!(!plain.contains("priority set"), "{plain}");
    }
}
