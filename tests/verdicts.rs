//! Three judges of one packet: the kernel, the evaluator of rules and the tc guard, over policies, rule sets of
//! other software and packets that are put together at random.
//!
//! Each round has a number from which all of it follows, and which a failure names: `SPOKEGUARD_VERDICTS=NUMBER`
//! repeats that round alone. Every run has the same first rounds, and some that nobody has seen before.

mod packets;
mod policies;
mod rules;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use lab::{Lab, Mesh, Need, Shape, lacking, wait_until};
use serde_json::Value;
use spokeguard::desired::Desired;
use spokeguard::desired::guard::{Boot, Side, Syn};
use spokeguard::observed::Link;
use spokeguard::ruleset::{self, Evaluator, Host, Packet, Ruleset, TableFamily, Verdict, render};
use spokeguard::source::bpf::guard::{self, Guard};
use spokeguard::source::{links, nft};
use spokeguard::terms::{Port, Proto};

use crate::daemon::{LONG, plain_policy};
use crate::guard::Dice;

/// Packets of one round.
const PACKETS: u16 = 240;
const FIRST_PORT: u16 = 20_000;
const PORTS: u16 = 40_000;

#[test]
fn kernel_evaluator_and_guard_agree_on_generated_policies_rules_and_packets() {
    if lacking(&[Need::Lab, Need::Spokeguard]) {
        return;
    }
    let mut bench = Bench::new();
    let mut tally = Tally::default();
    if let Some(seed) = std::env::var("SPOKEGUARD_VERDICTS").ok().map(|text| text.parse().unwrap()) {
        bench.round(seed, &mut tally);
        println!("{tally:?}");
        return;
    }
    let all = std::env::var_os("SPOKEGUARD_ALL").is_some();
    let (rounds, limit) = if all { (2000, 600) } else { (90, 15) };
    let fresh = std::process::id() as u64 * 1_000_003 + bench.now().as_nanos() as u64 % 1_000_000_007;
    let until = Instant::now() + Duration::from_secs(limit);
    for round in 0..rounds {
        // The first ones always; then in turns, as long as there is time. Fewer than thirty say little of all.
        if round >= 30 && Instant::now() > until {
            break;
        }
        let seed = if round < 10 || round % 2 == 0 { round } else { fresh + round };
        bench.round(seed, &mut tally);
    }
    println!("rounds from {fresh}: {tally:?}");
    tally.is_worth_something();
}

/// What was compared.
#[derive(Debug, Default)]
struct Tally {
    rounds: usize,
    /// Verdicts of the kernel, by whether the packet got through.
    reached: usize,
    stopped: usize,
    /// Those of which the evaluator could not tell, with why and how often.
    unknown: usize,
    /// Of these, those that a packet that comes alone has known.
    known_alone: usize,
    rewritten: usize,
    guard_refused: usize,
    guard_passed: usize,
    /// Refused by our table and let in by the guard, as documented.
    differ: usize,
    refused_on_the_wire: usize,
}

impl Tally {
    fn is_worth_something(&self) {
        let Tally { reached, stopped, unknown, rewritten, guard_refused, guard_passed, .. } = self;
        let all = reached + stopped;
        assert!(*reached * 10 > all && *stopped * 10 > all, "one-sided: {self:?}");
        assert!(*rewritten > 0 && self.refused_on_the_wire > 0, "{self:?}");
        assert!(*guard_refused > 100 && *guard_passed > 100, "{self:?}");
        assert!(*unknown * 100 < all * UNKNOWN_PERCENT, "too often nobody can tell: {self:?}");
    }
}

/// Measured: 6 to 7 in a hundred, of rules that ask on purpose for what the evaluator does not know.
const UNKNOWN_PERCENT: usize = 16;

struct Bench {
    lab: Lab,
    pins: PathBuf,
    links: Vec<Link>,
    eth0: u32,
    mac: [u8; 6],
    next_port: u16,
}

/// One round's world, for the judges and for a repetition with less in it.
struct Case<'a> {
    desired: &'a Desired,
    foreign: &'a str,
    /// Whether the tc guard is on the wire as well.
    guarded: bool,
}

impl Bench {
    fn new() -> Self {
        let lab = Lab::shaped(Shape { mesh: Mesh::Plain, container: true });
        packets::prepare(&lab);
        // It loads and pins the guard.
        let mut daemon = lab.spoke.daemon(&plain_policy(&lab)).unwrap();
        assert!(daemon.running.stop().unwrap().success());
        let pins = lab.spoke.path("/sys/fs/bpf/spokeguard");
        let links = lab.spoke.inside(links::read).unwrap();
        let eth0 = links.iter().find(|link| link.name == "eth0").unwrap().index;
        let mac = packets::mac(&lab.spoke, "eth0");
        let mac = mac.split(':').map(|byte| u8::from_str_radix(byte, 16).unwrap());
        let mac = mac.collect::<Vec<u8>>().try_into().unwrap();
        Self { lab, pins, links, eth0, mac, next_port: 0 }
    }

    fn now(&self) -> Duration {
        std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap()
    }

    fn round(&mut self, seed: u64, tally: &mut Tally) {
        let mut dice = Dice::new(seed);
        let (text, desired) = policies::some(&mut dice);
        let foreign = rules::foreign(&mut dice);
        let foreign = self.loadable(foreign);
        let packets = packets::some(&mut dice, PACKETS, FIRST_PORT);
        let case = Case { desired: &desired, foreign: &foreign, guarded: dice.below(2) == 0 };
        let wrong = self.judge(&case, packets, tally);
        tally.rounds += 1;
        let Some((packet, _)) = wrong.first() else { return };
        let (least, why) = self.shrink(&case, packet);
        panic!(
            "{} of {PACKETS} verdicts differ in round SPOKEGUARD_VERDICTS={seed}. The first: {packet:?}\n{why}\n\
             with the tc guard: {}\n--- policy\n{text}\n--- rules of others, as few as show it\n{least}",
            wrong.len(),
            case.guarded,
        );
    }

    /// The rules without the lines that nft refuses, such as two protocols in one rule.
    fn loadable(&self, mut text: String) -> String {
        for _ in 0..80 {
            let Err(error) = self.lab.spoke.nft(&format!("flush ruleset; {text}")) else { return text };
            let error = format!("{error:#}");
            let number = |part: &str| part.split(':').next().and_then(|n| n.parse::<usize>().ok());
            let lines: BTreeSet<usize> = error.split("stdin:").skip(1).filter_map(number).collect();
            assert!(!lines.is_empty(), "nft says nothing of where: {error}");
            text = lines.iter().rev().fold(text, |text, line| rules::without(&text, line - 1));
        }
        panic!("nft takes none of this:\n{text}");
    }

    /// Fewer lines of the foreign rules by which the judges still differ about this packet.
    fn shrink(&mut self, case: &Case, packet: &Packet) -> (String, String) {
        let mut text = case.foreign.to_owned();
        let mut why = "not seen again".to_owned();
        let mut line = text.lines().count();
        while line > 0 {
            line -= 1;
            if !rules::lines(&text).contains(&line) {
                continue;
            }
            let less = rules::without(&text, line);
            if self.lab.spoke.nft(&format!("flush ruleset\n{less}")).is_err() {
                continue;
            }
            let again = Case { foreign: &less, ..*case };
            if let Some((_, text)) = self.judge(&again, vec![packet.clone()], &mut Tally::default()).pop() {
                why = text;
            } else {
                continue;
            }
            text = less;
        }
        (text, why)
    }

    /// What each judge says of each packet; gives those about which they differ, and how.
    fn judge(&mut self, case: &Case, mut packets: Vec<Packet>, tally: &mut Tally) -> Vec<(Packet, String)> {
        let ours = case.desired.table.as_ref().unwrap();
        let rules = case.desired.guard.as_ref().unwrap();
        // Not the source ports of the last rounds, whose flows may be known yet.
        for packet in &mut packets {
            packet.source_port = Port::new(FIRST_PORT + self.next_port).unwrap();
            self.next_port = (self.next_port + 1) % PORTS;
        }
        self.lab.spoke.nft(&format!("flush ruleset\n{}\n{}", case.foreign, render::table(ours))).unwrap();
        let found = self.lab.spoke.inside(nft::list_ruleset).unwrap();
        let loaded = found.table(TableFamily::Inet, &ours.name);
        assert_eq!(ruleset::changes(ours, loaded), vec![], "our table comes back as it was");
        let (pins, index, mac) = (&self.pins, self.eth0, self.mac);
        let by_guard = self.lab.spoke.inside(|| {
            let mut guard = Guard::open(pins)?.expect("a guard");
            guard.install(rules, &self.links, None)?;
            let each = packets.iter().map(|packet| {
                let kind: [u8; 2] = if packet.source.is_ipv4() { [0x08, 0] } else { [0x86, 0xdd] };
                let frame = [&mac[..], &[2, 0, 0, 0, 0, 2], &kind, &packets::datagram(packet)].concat();
                let is_judged = packet.iifname == "eth0" && packet.proto == Proto::Tcp;
                is_judged.then(|| guard::test_run(pins, "guard_eth", (index, &frame), 1)).transpose()
            });
            let each = each.collect::<anyhow::Result<Vec<_>>>()?;
            if !case.guarded {
                guard.sync(rules, &[])?;
            }
            Ok(each)
        });
        let by_guard = by_guard.unwrap();
        let seen = self.observe(&packets, case, &found);
        let evaluator = Evaluator::new(&found);
        let asks_the_way_back = case.foreign.contains("fib saddr . iif");
        let mut wrong = Vec::new();
        for (packet, by_guard) in packets.into_iter().zip(by_guard) {
            let port = packet.source_port.get();
            let end = seen.end.get(&port);
            let arrived = seen.wire.contains(&port);
            let mut differ = Vec::new();
            let mut refused = None;
            if let Some((verdict, _)) = by_guard.filter(|_| rules.side("eth0") == Side::Public) {
                let syn = Syn {
                    source: packet.source,
                    destination: packet.destination,
                    port: packet.port.get(),
                    onward: self.onward(packet.destination).map(|interface| rules.side(interface)),
                };
                refused = rules.judge(&syn, Boot(0));
                let refuses = refused.is_some() && !rules.audit;
                if (verdict == SHOT) != refuses {
                    differ.push(format!("the guard's program says {verdict}, its judge {refused:?}"));
                }
                if case.guarded && arrived == refuses {
                    differ.push(format!("on the wire: arrived {arrived}, the guard's judge: {refused:?}"));
                }
                *if refuses { &mut tally.guard_refused } else { &mut tally.guard_passed } += 1;
                tally.refused_on_the_wire += usize::from(case.guarded && !arrived);
            }
            let judged = evaluator.judge(&packet, self);
            let is_stopped = |verdict: &Verdict| matches!(verdict, Verdict::Drop | Verdict::Reject);
            // A bridge sends nothing back by the port that it came from, whatever the rules say.
            // Where the address comes out of a map it may be that one.
            let back = judged.rewritten.as_ref().is_some_and(|new| match new.address {
                Some(address) => address == packet.source,
                None => end.is_none() && packet.iifname == "docker0" && case.foreign.contains(" map {"),
            });
            if arrived && !back && !(asks_the_way_back && packets::is_spoofed(&packet)) {
                *if end.is_some() { &mut tally.reached } else { &mut tally.stopped } += 1;
                match &judged.verdict {
                    Verdict::Unknown(_) => {
                        tally.unknown += 1;
                        let alone = evaluator.judge_alone(&packet, self);
                        if !matches!(alone.verdict, Verdict::Unknown(_)) {
                            tally.known_alone += 1;
                            if is_stopped(&alone.verdict) != end.is_none() {
                                differ.push(format!("the kernel: {end:?}, alone: {alone:?}"));
                            }
                        }
                    }
                    verdict if is_stopped(verdict) != end.is_none() => {
                        differ.push(format!("the kernel: {end:?}, the evaluator: {judged:?}"));
                    }
                    _ => {}
                }
                if let (Some(end), Verdict::Accept) = (end, &judged.verdict) {
                    let rewritten = judged.rewritten.as_ref();
                    tally.rewritten += usize::from(rewritten.is_some());
                    let address = rewritten.map_or(Some(packet.destination), |new| new.address);
                    let port = rewritten.map_or(Some(packet.port), |new| new.port);
                    let same = (address.is_none_or(|address| address == end.0))
                        && port.is_none_or(|port| port.get() == end.1);
                    if !same {
                        differ.push(format!("the kernel sent it to {end:?}, the evaluator: {judged:?}"));
                    }
                }
                // The second layer never refuses what the first lets in, whatever stands beside that one.
                if refused.is_some() && !rules.audit && end.is_some() {
                    differ.push(format!("the guard refuses ({refused:?}) what got to {end:?}"));
                }
                let by_ours = judged.by.as_ref().is_some_and(|place| place.table == ours.name);
                if by_ours && is_stopped(&judged.verdict) && by_guard.is_some() && refused.is_none() {
                    let sent_here = !self.is_local(packet.destination);
                    match rules.side("eth0") {
                        Side::Public if sent_here => tally.differ += 1,
                        Side::Public => differ.push(format!("our table alone refuses: {judged:?}")),
                        _ => {}
                    }
                }
            }
            if !differ.is_empty() {
                wrong.push((packet, differ.join("\n")));
            }
        }
        wrong
    }

    /// The interface by which a packet to this address goes on; `None`: it stays.
    fn onward(&self, address: IpAddr) -> Option<&str> {
        (!self.is_local(address)).then(|| self.way_out(address).unwrap_or("eth0"))
    }

    /// What becomes of the packets, seen before and behind all other chains.
    fn observe(&self, packets: &[Packet], case: &Case, found: &Ruleset) -> Seen {
        // Before anything else but tc, also where a chain of the device drops.
        let early = found.table(TableFamily::Netdev, "early").is_some();
        assert_eq!(early, case.foreign.contains("table netdev early"));
        self.lab.spoke.nft(OBSERVER).unwrap();
        let mut missing: Vec<Packet> = packets.to_vec();
        let mut seen = Seen::default();
        for marker in MARKERS {
            missing.push(Packet {
                iifname: "eth0".into(),
                source: lab::OUTSIDER,
                destination: lab::SPOKE_PUBLIC,
                proto: Proto::Udp,
                source_port: Port::new(marker).unwrap(),
                port: Port::new(9).unwrap(),
            });
            packets::send(&self.lab, &missing);
            // Behind it on the same queue, so all others are where they were to get by then.
            let arrived = || Some(self.look()).filter(|seen| seen.wire.contains(&marker));
            seen = wait_until(LONG, "the last packet arrives", arrived).unwrap();
            let may_be_refused =
                |packet: &Packet| case.guarded && packet.iifname == "eth0" && packet.proto == Proto::Tcp;
            missing = (packets.iter())
                .filter(|p| !seen.wire.contains(&p.source_port.get()) && !may_be_refused(p))
                .cloned()
                .collect();
            if missing.is_empty() {
                return seen;
            }
        }
        panic!("{} packets were lost on the wire: {seen:?} {missing:?}", missing.len());
    }

    fn look(&self) -> Seen {
        let json = self.lab.spoke.ok(&["nft", "-j", "list", "table", "inet", "observer"]).unwrap();
        let json: Value = serde_json::from_str(&json).unwrap();
        let set = |name: &str| -> Vec<Vec<Value>> {
            let objects = json["nftables"].as_array().unwrap();
            let set = objects.iter().filter_map(|object| object.get("set")).find(|set| set["name"] == name);
            let elements = set.unwrap()["elem"].as_array().cloned().unwrap_or_default();
            let parts = |element: Value| match element.get("concat").and_then(Value::as_array) {
                Some(parts) => parts.clone(),
                None => vec![element],
            };
            elements.into_iter().map(parts).collect()
        };
        let number = |value: &Value| value.as_u64().and_then(|n| u16::try_from(n).ok()).unwrap();
        let wire = set("wire").iter().map(|parts| number(&parts[0])).collect();
        let ends = [set("end4"), set("end6")].concat();
        let address = |value: &Value| value.as_str().unwrap().parse::<IpAddr>().unwrap();
        let end = ends.iter().map(|parts| (number(&parts[0]), (address(&parts[1]), number(&parts[2]))));
        Seen { wire, end: end.collect() }
    }
}

impl Host for Bench {
    fn is_local(&self, address: IpAddr) -> bool {
        address.is_loopback() || self.links.iter().flat_map(|l| &l.addresses).any(|net| net.addr() == address)
    }

    fn way_out(&self, address: IpAddr) -> Option<&str> {
        Link::towards(&self.links, address).map(|link| link.name.as_str())
    }
}

/// By the packets' source ports.
#[derive(Debug, Default)]
struct Seen {
    wire: BTreeSet<u16>,
    /// Where they were bound for, behind all other chains of input and forward.
    end: BTreeMap<u16, (IpAddr, u16)>,
}

/// TC_ACT_SHOT.
const SHOT: i32 = 2;
const MARKERS: [u16; 3] = [61_000, 61_001, 61_002];

/// Of the bridge it is the port: where br_netfilter is loaded, prerouting comes before the bridge's own hook.
const OBSERVER: &str = "table inet observer
delete table inet observer
table inet observer {
	set wire { type inet_service; size 65535; flags dynamic; }
	set end4 { type inet_service . ipv4_addr . inet_service; size 65535; flags dynamic; }
	set end6 { type inet_service . ipv6_addr . inet_service; size 65535; flags dynamic; }
	chain arrive {
		type filter hook ingress devices = { eth0, wg0, veth0 } priority -2000000000; policy accept;
		tcp sport >= 20000 add @wire { tcp sport }
		udp sport >= 20000 add @wire { udp sport }
	}
	chain ends {
		meta nfproto ipv4 tcp sport >= 20000 add @end4 { tcp sport . ip daddr . tcp dport }
		meta nfproto ipv4 udp sport >= 20000 add @end4 { udp sport . ip daddr . udp dport }
		meta nfproto ipv6 tcp sport >= 20000 add @end6 { tcp sport . ip6 daddr . tcp dport }
		meta nfproto ipv6 udp sport >= 20000 add @end6 { udp sport . ip6 daddr . udp dport }
	}
	chain input {
		type filter hook input priority 2000000000; policy accept;
		jump ends
	}
	chain forward {
		type filter hook forward priority 2000000000; policy accept;
		jump ends
	}
}
";
