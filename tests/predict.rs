//! `audit` predicts `enforce`: one trace of packets and binds, replayed in both modes, gives the same numbers
//! rule by rule, in the rules, in the tc guard and in the bind guard.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::net::{IpAddr, UdpSocket};

use lab::wire::{ACK, ICMP, ICMPV6, RST, SYN, Sender, TCP, UDP, fragments, icmp, ip, tcp, udp};
use lab::{
    CONTAINER, CONTAINER_V6, HUB_MESH, HUB_MESH_V6, Lab, Mesh, Need, Node, OUTSIDER, OUTSIDER_V6, SPOKE_MESH,
    SPOKE_MESH_V6, SPOKE_PUBLIC, SPOKE_PUBLIC_V6, Shape, lacking, wait_until,
};
use spokeguard::desired::Desired;
use spokeguard::observed::{Direction, Reading};
use spokeguard::source::bpf::guard::Guard;
use spokeguard::source::bpf::{self, CounterConfig, bind};
use spokeguard::source::nft_counters;
use spokeguard::terms::Stamp;

use crate::counters::{quiet, started};
use crate::daemon::{LONG, plain_policy};

/// A number of one layer by its name.
type Numbers = BTreeMap<String, u64>;

#[test]
fn audit_mode_counts_what_enforce_mode_refuses() {
    if lacking(&[Need::Lab, Need::Cgroup2, Need::Spokeguard]) {
        return;
    }
    let seeds: &[u64] = if std::env::var_os("SPOKEGUARD_ALL").is_some() { &[1, 2, 3, 4] } else { &[1] };
    for seed in seeds {
        let [enforced, audited] = ["enforce", "audit"].map(|mode| replay(mode, *seed));
        let differences = differences(&enforced, &audited);
        assert!(differences.is_empty(), "trace {seed}: enforce and audit differ\n{differences}");
        for name in [
            "refused ssh-ipv4",
            "refused public-udp-ipv4",
            "refused public-udp-ipv6",
            "refused public-other-ipv4",
            "refused weak-host-ipv4",
            "refused spoofed-mesh-ipv6",
            "refused mesh-ipv4",
            "refused mesh-ipv6",
            "refused local-ipv4",
            "refused local-ipv6",
            "refused forward-ipv4",
            "refused public-tcp-ipv6",
            "guard public-tcp-ipv4",
            "guard public-tcp-ipv6",
            "guard ssh-ipv6",
            "guard weak-host-ipv4",
            "guard spoofed-mesh-ipv6",
            "guard forward-ipv4",
        ] {
            assert!(enforced.get(name).is_some_and(|n| *n > 0), "nothing met {name}: {enforced:#?}");
        }
        for family in ["ipv4", "ipv6"] {
            assert_eq!(enforced[&format!("refused by any name-{family}")], 40, "{family}");
        }
        assert!(enforced.keys().filter(|name| name.starts_with("bind ")).count() >= 5, "{enforced:#?}");
    }
}

/// A line for each number that is not the same.
fn differences(enforced: &Numbers, audited: &Numbers) -> String {
    let names: std::collections::BTreeSet<&String> = enforced.keys().chain(audited.keys()).collect();
    let mut out = String::new();
    for name in names {
        let both = [enforced, audited].map(|numbers| numbers.get(name).copied().unwrap_or(0));
        if both[0] != both[1] {
            let _ = writeln!(out, "  {name:<60} enforce {:>6}  audit {:>6}", both[0], both[1]);
        }
    }
    out
}

/// What everything counted of the trace, on a host of its own.
fn replay(mode: &str, seed: u64) -> Numbers {
    let lab = Lab::shaped(Shape { mesh: Mesh::Plain, container: true });
    let ctr = lab.container.as_ref().unwrap();
    lab.publish(PUBLISHED, 80).unwrap();
    let _all =
        lab.spoke.listen("all", &["tcp/[::]:80", "tcp/[::]:22", "tcp/[::]:5432", "udp/[::]:53"]).unwrap();
    quiet(&lab);
    let policy = format!(
        "[[local]]\nname = \"containers\"\ninterfaces = [\"docker0\"]\ntcp = [53]\nudp = [53]\n\
         [[mesh.service]]\nname = \"netdata\"\ntcp = [19999]\nudp = [161]\nfrom = \"mesh\"\n\
         [enforce]\nmode = \"{mode}\"\n"
    );
    let text = plain_policy(&lab) + &policy;
    let mut daemon = started(&lab, &policy);
    // What is in force stays, and nobody probes or scrapes while it is counted.
    assert!(daemon.running.stop().unwrap().success());
    // Who is whose neighbour is asked now, once: asked later it would be counted with the trace.
    for (node, to) in [
        (&lab.internet, [SPOKE_PUBLIC, SPOKE_PUBLIC_V6]),
        (&lab.hub, [SPOKE_MESH, SPOKE_MESH_V6]),
        (ctr, BRIDGE.map(|address| address.parse().unwrap())),
    ] {
        meet(node, to);
    }
    for node in [&lab.internet, &lab.hub, ctr, &lab.spoke] {
        node.sh(
            "ip neigh show | awk '$4 == \"lladdr\" { print \"neigh replace\", $1, $2, $3, $4, $5, \"nud permanent\" }' \
             | ip -batch -",
        )
        .unwrap();
    }
    // The answers that only one mode gives would set off packets that the other never sees: only
    // packets that a process sends leave these.
    for node in [&lab.internet, &lab.hub, ctr] {
        node.nft(
            "add table inet mute
             add chain inet mute out { type filter hook output priority 0; policy drop; }
             add chain inet mute on { type filter hook forward priority 0; policy drop; }
             add rule inet mute out meta skuid 0 accept",
        )
        .unwrap();
    }

    let today = "2026-07-01".parse().unwrap();
    let loaded = spokeguard::policy::parse(&text, "policy.toml", today).unwrap();
    let config = CounterConfig::new(&Desired::new(loaded.policy, today).unwrap().services);
    let before = numbers(&lab, mode, &config);
    let trace = Trace::new(seed);
    // The container's first: a bridge keeps a few frames to itself, so that only the others tell when
    // all have come.
    for (node, packets) in
        [(ctr, &trace.container), (&lab.hub, &trace.mesh), (&lab.internet, &trace.stranger)]
    {
        send(node, packets);
    }
    let arrived = |all: usize| {
        let so_far = || {
            let now = numbers(&lab, mode, &config);
            let counts =
                |name: &String| name.starts_with("packets Public") || name.starts_with("packets Mesh");
            let sum = |of: &Numbers| of.iter().filter(|(name, _)| counts(name)).map(|(_, n)| *n).sum::<u64>();
            (sum(&now) - sum(&before)) as usize
        };
        wait_until(LONG, "the whole trace has arrived", || (so_far() >= all).then_some(()))
            .unwrap_or_else(|error| panic!("{error:#}: {} of {all}", so_far()));
    };
    let all = trace.stranger.len() + trace.mesh.len();
    arrived(all);
    try_binds(&lab);
    let after = numbers(&lab, mode, &config);
    let grown = |after: &Numbers, before: &Numbers| -> Numbers {
        let grown = |(name, n): (&String, &u64)| (name.clone(), n - before.get(name).copied().unwrap_or(0));
        after.iter().map(grown).collect()
    };
    let mut told = grown(&after, &before);

    // What the guard judges before it is sent on or put together again has another name there.
    send(&lab.internet, &trace.renamed);
    arrived(all + trace.renamed.len());
    for (name, n) in grown(&numbers(&lab, mode, &config), &after) {
        if let Some((_, family)) = name.strip_prefix("refused ").and_then(|name| name.rsplit_once('-')) {
            *told.entry(format!("refused by any name-{family}")).or_default() += n;
        }
    }
    told
}

/// Rule by rule: what was refused, and by the guard alone, before the rules; who tried to connect, what
/// arrived, and which binds were refused. In audit mode, what would have been.
fn numbers(lab: &Lab, mode: &str, config: &CounterConfig) -> Numbers {
    let pins = lab.spoke.path("/sys/fs/bpf/spokeguard");
    let mut all = Numbers::new();
    let (rules, [refused, audited], counters) = lab
        .spoke
        .inside(|| {
            let guard = Guard::open(&pins)?.expect("a guard").refused()?;
            Ok((nft_counters::read()?, guard, bpf::read(&pins, config)))
        })
        .unwrap();
    for (name, amount) in rules {
        let name = name.strip_prefix("drop-").unwrap_or(&name).to_owned();
        *all.entry(format!("refused {name}")).or_default() += amount.packets;
    }
    // What the guard refuses never comes to the rules; what it only counts, does.
    for ((reason, family), n) in &refused {
        *all.entry(format!("refused {}-{family}", reason.name())).or_default() += n;
    }
    for ((reason, family), n) in if mode == "audit" { &audited } else { &refused } {
        all.insert(format!("guard {}-{family}", reason.name()), *n);
    }
    let Reading::Seen(counters) = counters else { panic!("the counters can't be read") };
    for (key, amount) in counters.traffic.iter().filter(|(key, _)| key.direction == Direction::In) {
        let name = format!("packets {:?} {:?} {:?} {:?}", key.scope, key.family, key.proto, key.class);
        *all.entry(name).or_default() += amount.packets;
    }
    for (key, n) in &counters.attempts {
        *all.entry(format!("attempts {:?} {:?} {}", key.class, key.family, key.allowed)).or_default() += n;
    }
    let Reading::Seen(binds) = bind::read(&pins, Stamp::from_unix(0)) else { panic!("binds can't be read") };
    for refusal in &binds.refusals {
        let name = format!("bind {:?} {} {}", refusal.proto, refusal.address, refusal.port);
        *all.entry(name).or_default() += refusal.count;
    }
    all.insert("binds".to_owned(), binds.tally.refused + binds.tally.audited);
    all
}

/// Both know each other's hardware address.
fn meet(node: &Node, addresses: [IpAddr; 2]) {
    wait_until(LONG, "neighbours know each other", || {
        for address in addresses {
            let any: IpAddr = if address.is_ipv6() { "::" } else { "0.0.0.0" }.parse().unwrap();
            let hello = || Ok(UdpSocket::bind((any, 0))?.send_to(b"hello", (address, 9))?);
            node.inside(hello).unwrap();
        }
        let known = node.sh("ip neigh show").unwrap();
        let is_known = |line: &str, address: &IpAddr| {
            line.starts_with(&format!("{address} ")) && line.contains("lladdr")
        };
        addresses.iter().all(|address| known.lines().any(|line| is_known(line, address))).then_some(())
    })
    .unwrap();
}

fn send(node: &Node, packets: &[(Vec<u8>, IpAddr)]) {
    node.inside(|| {
        let sender = Sender::open()?;
        for some in packets.chunks(20) {
            for (packet, to) in some {
                sender.send(packet, *to)?;
            }
            // The far end's queue is finite.
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        Ok(())
    })
    .unwrap();
}

/// Good binds and bad ones, some of them more than once.
fn try_binds(lab: &Lab) {
    let mut what = vec!["tcp/[::]:161/dual".to_owned(), "udp/[::]:161/dual".to_owned()];
    for address in ["0.0.0.0", "198.51.100.7", "10.84.0.16", "127.0.0.1"] {
        for port in [19999, 22, 80, 5432] {
            what.push(format!("tcp/{address}:{port}"));
        }
        what.push(format!("udp/{address}:161"));
    }
    let again: Vec<String> = what.iter().filter(|word| word.contains("0.0.0.0")).cloned().collect();
    what.extend(again);
    let helper = lab::helper().unwrap().display().to_string();
    let words: Vec<&str> = [&*helper, "bind"].into_iter().chain(what.iter().map(String::as_str)).collect();
    lab.spoke.ok(&words).unwrap();
}

/// The same packets for the same seed, by where they set out, each with who gets it next.
struct Trace {
    stranger: Vec<(Vec<u8>, IpAddr)>,
    mesh: Vec<(Vec<u8>, IpAddr)>,
    container: Vec<(Vec<u8>, IpAddr)>,
    /// Of strangers: connections to a published port, and first packets in pieces.
    renamed: Vec<(Vec<u8>, IpAddr)>,
}

impl Trace {
    fn new(seed: u64) -> Trace {
        let mut dice = Dice(seed);
        let mut trace =
            Trace { stranger: Vec::new(), mesh: Vec::new(), container: Vec::new(), renamed: Vec::new() };
        for n in 0..1200u16 {
            // No two of one flow: what one of them leaves behind in conntrack hangs on the mode.
            let from = 1024 + n;
            let v6 = dice.below(2) == 1;
            let pick = |v4: &str, other: &str| if v6 { other } else { v4 }.parse::<IpAddr>().unwrap();
            let host = 17 + n % 200;
            let (spoke, mesh) =
                if v6 { (SPOKE_PUBLIC_V6, SPOKE_MESH_V6) } else { (SPOKE_PUBLIC, SPOKE_MESH) };
            match dice.below(10) {
                0 | 1 => {
                    // The hub, which is let in to more than others, or another member.
                    let hub = if v6 { HUB_MESH_V6 } else { HUB_MESH };
                    let member = pick(&format!("10.84.0.{host}"), &format!("fd84::{host}"));
                    let way = ([hub, member][dice.below(2)], mesh);
                    trace.mesh.push((packet(&mut dice, way, from), mesh));
                }
                2 => {
                    let (own, bridge, beyond) = if v6 {
                        (CONTAINER_V6, BRIDGE[1].parse().unwrap(), SPOKE_MESH_V6)
                    } else {
                        (CONTAINER, BRIDGE[0].parse().unwrap(), SPOKE_MESH)
                    };
                    let way = (own, [bridge, beyond, spoke][dice.below(3)]);
                    trace.container.push((packet(&mut dice, way, from), bridge));
                }
                kind => {
                    let own = pick(&format!("198.51.100.{host}"), &format!("2001:db8:1::{host}"));
                    let false_source = pick(&format!("10.84.0.{host}"), &format!("fd84::{host}"));
                    let way = match kind {
                        3 => (own, mesh),
                        4 => (false_source, spoke),
                        5 => (own, if v6 { CONTAINER_V6 } else { CONTAINER }),
                        _ => (own, spoke),
                    };
                    trace.stranger.push((packet(&mut dice, way, from), spoke));
                    // Once in a while the rest of what was cut.
                    if dice.below(20) == 0 {
                        let body = udp(way, (from, dice.port()), &[0; 40]);
                        let parts = fragments(way, UDP, &body, 8 * (1 + dice.below(2)), from);
                        trace.stranger.extend(parts.map(|part| (part, spoke)));
                    }
                }
            }
        }
        for n in 0..40 {
            let way = [(OUTSIDER, SPOKE_PUBLIC), (OUTSIDER_V6, SPOKE_PUBLIC_V6)][usize::from(n % 2)];
            let whole = ip(way, TCP, &tcp(way, (3000 + n, PUBLISHED), SYN));
            let parts = fragments(way, TCP, &tcp(way, (4000 + n, 5432), SYN), 8, 4000 + n);
            trace.renamed.extend([whole].into_iter().chain(parts).map(|packet| (packet, way.1)));
        }
        trace
    }
}

/// The container's way out of its network.
const BRIDGE: [&str; 2] = ["172.17.0.1", "fd00:17::1"];

/// Of the container, on the host.
const PUBLISHED: u16 = 8080;

fn packet(dice: &mut Dice, way: (IpAddr, IpAddr), from: u16) -> Vec<u8> {
    let ports = (from, dice.port());
    let mut id = [0; 56];
    id[..2].copy_from_slice(&from.to_be_bytes());
    match dice.below(12) {
        0..5 => ip(way, TCP, &tcp(way, ports, SYN)),
        5 => ip(way, TCP, &tcp(way, ports, [ACK, RST, SYN | ACK, 0][dice.below(4)])),
        6..9 => ip(way, UDP, &udp(way, ports, b"trace")),
        9 if way.0.is_ipv6() => {
            let kind = [128, 1, 2, 3][dice.below(4)];
            ip(way, ICMPV6, &icmp(way, kind, 0, &id))
        }
        9 => ip(way, ICMP, &icmp(way, [8, 3, 11, 13][dice.below(4)], 0, &id)),
        10 => ip(way, [47, 50, 4, 103][dice.below(4)], &id),
        _ => ip(way, UDP, &udp(way, ports, &[0; 900])),
    }
}

/// Xorshift: the same numbers on every machine.
struct Dice(u64);

impl Dice {
    fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % bound
    }

    /// What policies speak of, what they do not, and anything.
    fn port(&mut self) -> u16 {
        let known = [22, 53, 80, 161, 443, 5432, 9984, 19999, 51820];
        match self.below(3) {
            0 => Some(self.below(65535) as u16 + 1).filter(|port| *port != PUBLISHED).unwrap_or(1),
            1.. => known[self.below(known.len())],
        }
    }
}
