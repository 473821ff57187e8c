//! Sweeps of a spoke from the outside in: what must not happen, older kernels, odd devices. What the states are,
//! `audit_matrix` compares with a real nmap.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::time::{Duration, Instant};

use aya::programs::{SchedClassifier, TcAttachType};
use lab::{
    Answer, CONTAINER, CONTAINER_V6, Lab, Mesh, Need, Node, OUTSIDER, Running, SPOKE_MESH, SPOKE_PUBLIC,
    SPOKE_PUBLIC_V6, Shape, Signal, lacking, wait_until,
};
use spokeguard::audit::{Fate, Sweep};
use spokeguard::observed::{Link, Listener};
use spokeguard::source::probe::{Means, Mode, Request, SweepError, is_table, sweep, sweep_by};
use spokeguard::source::{links, listeners, owners};
use spokeguard::terms::{Port, Proto};

use crate::canary::{SHOT, dropped, stranger_program};

const SOON: Duration = Duration::from_secs(10);

/// A firewall of the spoke, in nft's words. Its listeners are those of [`spoke`].
struct Case {
    name: &'static str,
    rules: &'static str,
    /// Where the probes come from; `None`: from wherever the sweep likes.
    source: Option<IpAddr>,
}

const CASES: &[Case] = &[
    Case { name: "no firewall", rules: "", source: None },
    Case {
        name: "default drop and a few accepted",
        rules: "table inet t { chain i { type filter hook input priority filter; policy drop;
                ct state established,related accept; icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert } accept;
                tcp dport { 22, 80, 5432, 9000-9100 } accept; }; }",
        source: None,
    },
    Case {
        name: "reject by reset",
        rules: "table inet t { chain i { type filter hook input priority filter;
                icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert } accept;
                tcp dport { 80, 443 } accept; tcp dport 1000-1999 drop; reject with tcp reset; }; }",
        source: None,
    },
    Case {
        name: "reject by ICMP",
        rules: "table inet t { chain i { type filter hook input priority filter;
                icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert } accept;
                tcp dport { 80, 443, 7 } accept; reject with icmpx admin-prohibited; }; }",
        source: None,
    },
    Case {
        name: "redirect and DNAT, to here and to a container",
        rules: "table inet t {
                chain n { type nat hook prerouting priority dstnat;
                  tcp dport 8880 redirect to :80; tcp dport 8881 redirect to :81;
                  meta nfproto ipv4 tcp dport 8443 dnat ip to 172.17.0.2:8000;
                  meta nfproto ipv6 tcp dport 8443 dnat ip6 to [fd00:17::2]:8000;
                  meta nfproto ipv4 tcp dport 7777 dnat ip to 172.17.0.2:8001; };
                chain f { type filter hook forward priority filter; policy drop;
                  ct state established,related accept; tcp dport 8000 accept; };
                chain i { type filter hook input priority filter; policy drop;
                  ct state established,related accept; icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert } accept;
                  ct status dnat accept; tcp dport 443 accept; }; }",
        source: None,
    },
    Case {
        name: "a second table drops what the first accepts",
        rules: "table inet a { chain i { type filter hook input priority filter; tcp dport { 80, 443, 5432 } accept; }; }
                table inet b { chain i { type filter hook input priority filter + 10; tcp dport 443 drop; }; }
                table inet c { chain r { type filter hook prerouting priority raw; tcp dport 5432 drop;
                  tcp dport 100-199 drop; }; }
                table inet d { chain i { type filter hook input priority 2147483000; tcp dport 200-299 drop; }; }",
        source: None,
    },
    Case {
        name: "netdev ingress",
        rules: "table netdev t { chain i { type filter hook ingress device eth0 priority 0;
                tcp dport { 80, 1000-60000 } drop; }; }",
        source: None,
    },
    Case {
        name: "bound to interfaces, jumps and addresses",
        rules: "table inet t {
                chain public { tcp dport { 80, 443 } accept; tcp dport 5000-5999 reject with tcp reset; };
                chain i { type filter hook input priority filter; policy drop;
                  ct state established,related accept; icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert } accept;
                  iifname \"wg0\" accept; iifname \"eth0\" jump public; iif lo accept;
                  ip daddr 10.84.0.16 accept; ip daddr 198.51.100.7 tcp dport 5432 accept;
                  ip6 daddr 2001:db8:1::7 tcp dport 6000 accept; }; }",
        source: None,
    },
    Case {
        name: "bound to a source that this outsider has",
        rules: "table inet t { chain i { type filter hook input priority filter; policy drop;
                ct state established,related accept;
                ip saddr 198.51.100.99 tcp dport { 80, 5432, 6000-6010 } accept; ip saddr 203.0.113.0/24 accept; }; }",
        source: Some(OUTSIDER),
    },
    Case {
        name: "connection states, flags and options",
        rules: "table inet t {
                chain r { type filter hook prerouting priority raw; tcp dport 81 notrack; };
                chain i { type filter hook input priority filter; policy drop;
                ct state invalid drop; ct state established,related accept;
                icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert } accept;
                tcp dport 80 ct state new accept; tcp dport 443 tcp flags & (fin|syn|rst|ack) == syn accept;
                tcp dport 5432 tcp option maxseg size 1400-1500 accept; tcp dport 90 tcp flags & (syn|ack) == ack accept;
                tcp dport { 81, 82 } ct state untracked accept; fib saddr . iif oif missing drop;
                tcp dport 2000-2099 meta pkttype host accept; }; }",
        source: None,
    },
    Case {
        name: "limited for all together, within its burst",
        rules: "table inet t { chain i { type filter hook input priority filter; policy drop;
                ct state established,related accept; icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert } accept;
                tcp dport { 80, 443, 5432 } limit rate 10/second burst 20 packets accept; }; }",
        source: None,
    },
];

#[test]
fn older_means_say_the_same() {
    if lacking(&[Need::Lab]) {
        return;
    }
    let lab = Lab::shaped(Shape { mesh: Mesh::Plain, container: true });
    let _listeners = spoke(&lab);
    let older = |request: &Request| lab.spoke.inside(|| sweep_by(OLDER, request, &mut |_| ())).unwrap();
    for case in CASES {
        lab.spoke.nft(&format!("flush ruleset\n{}", case.rules)).unwrap();
        let addresses: &[IpAddr] =
            if case.source.is_some() { &[SPOKE_PUBLIC] } else { &[SPOKE_PUBLIC, SPOKE_PUBLIC_V6] };
        // The two families and protocols differ in the words of the rules only.
        let ports = vec![1..=6500, 7777..=9200];
        // One thread, so that there is a first of all.
        let request =
            Request { source: case.source, ports, threads: 1, ..request(&lab, addresses, &Proto::ALL) };
        let (new, old) = (swept(&lab, &request), older(&request));
        for (new, old) in new.iter().zip(&old) {
            assert_eq!((new.address, new.proto), (old.address, old.proto));
            assert_eq!(states(&lab, new), states(&lab, old), "{}: {} {}", case.name, new.address, new.proto);
            // The first of all, before the kernel's limit on ICMP makes a difference.
            if (new.address, new.proto) == (SPOKE_PUBLIC, Proto::Tcp) {
                assert_eq!(new.fates[0], old.fates[0], "{}", case.name);
            }
        }
    }
    lab.spoke.nft("flush ruleset").unwrap();
    // Nothing is refused, and each port is remembered.
    let [sweep] =
        &older(&Request { ports: vec![1..=65535], ..request(&lab, &[SPOKE_PUBLIC], &[Proto::Udp]) })[..]
    else {
        panic!("one address, one protocol")
    };
    let (delivered, others): (Vec<_>, Vec<_>) =
        sweep.fates.iter().partition(|(_, fate)| matches!(fate, Fate::Delivered { .. }));
    // Where the kernel moved a set while it was listed, 14,780 were not.
    let some = &others[..others.len().min(5)];
    assert_eq!((sweep.fates.len(), delivered.len()), (65_535, 65_535), "{some:?}");
    let wire = capture(&lab.internet, "spoke0");
    let replies = Request {
        mode: Mode::Reply,
        ports: vec![80..=81],
        ..request(&lab, &[SPOKE_PUBLIC, SPOKE_PUBLIC_V6], &[Proto::Tcp])
    };
    for sweep in older(&replies) {
        let fates: Vec<&Fate> = sweep.fates.iter().map(|(_, fate)| fate).collect();
        assert_eq!(fates, [&Fate::Answered, &Fate::Reset]);
    }
    assert_eq!(lab.internet.connect(SocketAddr::new(SPOKE_PUBLIC, 80), SOON), Answer::Open);
    let foreign = foreign(&ended(wire, ".80: Flags [S]"));
    assert!(foreign.is_empty(), "{foreign:#?}");
    assert_eq!(lab.spoke.sh("nft list tables").unwrap(), "");
}

/// Those of Linux 6.1.
const OLDER: Means = Means { programs: false, tcx: false };

#[test]
fn nothing_of_a_sweep_leaves_the_host_or_stays_on_it() {
    if lacking(&[Need::Lab]) {
        return;
    }
    let lab = Lab::shaped(Shape { mesh: Mesh::Plain, container: true });
    lab.publish(8080, 8000).unwrap();
    let socket = quiet_listener(&lab.spoke, SocketAddr::new(SPOKE_PUBLIC, 443));
    // Conntrack is at work, and everything is answered that can be.
    lab.spoke
        .nft(
            "table inet t { chain i { type filter hook input priority filter; ct state established accept;
             tcp dport 1000-1999 reject with tcp reset; udp dport 1000-1999 reject;
             tcp dport 2000-2999 reject; }; }",
        )
        .unwrap();
    let wire = capture(&lab.internet, "spoke0");
    let container = capture(lab.container.as_ref().unwrap(), "eth0");
    let before = conntrack(&lab.spoke);
    let all = swept(&lab, &request(&lab, &[SPOKE_PUBLIC, SPOKE_PUBLIC_V6], &Proto::ALL));
    assert_eq!(all.len(), 4);
    for sweep in &all {
        let kinds: BTreeMap<&str, usize> =
            sweep.fates.iter().fold(BTreeMap::new(), |mut kinds, (_, fate)| {
                *kinds.entry(kind(fate)).or_default() += 1;
                kinds
            });
        assert_eq!(kinds.values().sum::<usize>(), 65535, "{kinds:?}");
        if sweep.proto == Proto::Tcp {
            assert_eq!((kinds["reset"], kinds["forwarded"]), (1000, 1), "{kinds:?}");
            assert_eq!(kinds["delivered"], 65535 - 2000 - 1, "{kinds:?}");
        } else {
            assert_eq!(kinds["delivered"], 65535 - 1000, "{kinds:?}");
            // The kernel limits what it says by ICMP.
            assert!(kinds["unreachable"] > 0, "{kinds:?}");
        }
    }
    let after = conntrack(&lab.spoke);
    assert!(
        after.lines().count() <= before.lines().count(),
        "{before}
then
{after}"
    );
    assert_eq!(lab.spoke.sh("ss -Htan state syn-recv").unwrap(), "");
    assert_eq!(socket.accept().unwrap_err().kind(), ErrorKind::WouldBlock, "an application was disturbed");
    assert_eq!(lab.spoke.sh("nft list ruleset").unwrap().matches("table").count(), 3);
    // Both ends would have noticed: a real connection is seen everywhere.
    assert_eq!(lab.internet.connect(SocketAddr::new(SPOKE_PUBLIC, 443), SOON), Answer::Open);
    assert!(socket.accept().is_ok());
    let _ = lab.internet.connect(SocketAddr::new(SPOKE_PUBLIC, 8080), SOON);
    for (capture, port) in [(wire, 443), (container, 8000)] {
        let seen = ended(capture, &format!(".{port}: Flags [S]"));
        let foreign = foreign(&seen);
        assert!(foreign.is_empty(), "{foreign:#?}");
    }
}

#[test]
fn our_own_counters_do_not_count_the_probes() {
    if lacking(&[Need::Lab, Need::Spokeguard]) {
        return;
    }
    let lab = Lab::plain();
    let _daemon = lab.spoke.daemon(&lab.policy()).unwrap();
    let metrics = SocketAddr::new(SPOKE_MESH, 9984);
    let incoming = |least: u64| {
        wait_until(SOON, "the daemon's counters", || {
            let page = lab.hub.http_get(metrics, "/metrics", &[]).ok()?;
            let sum = page
                .body
                .lines()
                .filter(|line| {
                    line.starts_with("spokeguard_packets_total{") && line.contains("scope=\"public\"")
                })
                .filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok())
                .sum::<f64>() as u64;
            (sum >= least).then_some(sum)
        })
        .unwrap()
    };
    let before = incoming(0);
    swept(&lab, &request(&lab, &[SPOKE_PUBLIC, SPOKE_PUBLIC_V6], &Proto::ALL));
    lab.internet.flood_udp(SocketAddr::new(SPOKE_PUBLIC, 9), 1000).unwrap();
    let after = incoming(before + 1000);
    assert!(after < before + 3000, "{before} packets, then {after}");
}

#[test]
fn our_rules_know_probes_where_no_program_of_ours_can_stand() {
    if lacking(&[Need::Lab, Need::Spokeguard]) {
        return;
    }
    let lab = Lab::plain();
    let mut daemon = lab.spoke.daemon(&lab.plain_policy()).unwrap();
    assert!(daemon.running.stop().unwrap().success());
    // Somebody else has the place of its filters on the device, or there is no bpffs.
    lab.spoke.sh("rm -r /sys/fs/bpf/spokeguard").unwrap();
    let ports = vec![1..=3000];
    let all = Request { ports, ..request(&lab, &[SPOKE_PUBLIC, SPOKE_PUBLIC_V6], &Proto::ALL) };
    let sweeps = lab.spoke.inside(|| sweep_by(OLDER, &all, &mut |_| ())).unwrap();
    let is_held =
        |sweep: &Sweep| sweep.fates.iter().filter(|(_, fate)| *fate == Fate::Dropped).count() > 2900;
    assert!(sweeps.len() == 4 && sweeps.iter().all(is_held), "{sweeps:?}");
    assert_eq!(dropped(&lab.spoke), 0);
    lab.internet.flood_udp(SocketAddr::new(SPOKE_PUBLIC, 9), 1000).unwrap();
    wait_until(SOON, "the stranger is counted", || (dropped(&lab.spoke) == 1000).then_some(())).unwrap();
}

#[test]
fn limits_by_source_hide_nothing_from_a_sweep() {
    if lacking(&[Need::Lab]) {
        return;
    }
    let lab = Lab::plain();
    // Who touches a closed port is shut out, and nobody gets more than one connection a minute. nmap finds one
    // port behind this.
    lab.spoke
        .nft(
            "table inet t { set bad { type ipv4_addr; flags dynamic, timeout; timeout 1h; size 200000; }
             set slow { type ipv4_addr; flags dynamic, timeout; timeout 1m; size 200000; }
             chain i { type filter hook input priority filter; policy drop;
               ip saddr @bad drop; tcp dport != { 22, 80, 443, 8080, 9000 } add @bad { ip saddr } drop;
               add @slow { ip saddr limit rate over 1/minute burst 1 packets } drop; accept; }; }",
        )
        .unwrap();
    for _ in 0..3 {
        let sweep = swept(&lab, &request(&lab, &[SPOKE_PUBLIC], &[Proto::Tcp])).remove(0);
        assert_eq!(delivered(&sweep), [22, 80, 443, 8080, 9000]);
    }
    // From one source it goes as it goes for nmap.
    let one = Request { source: Some(OUTSIDER), ..request(&lab, &[SPOKE_PUBLIC], &[Proto::Tcp]) };
    assert!(delivered(&swept(&lab, &one)[0]).len() < 2);
}

#[test]
fn a_pace_gets_through_a_limit_for_all_sources_together() {
    if lacking(&[Need::Lab]) {
        return;
    }
    let lab = Lab::plain();
    lab.spoke.drop_all_but("tcp dport 100-109 limit rate 50/second burst 1 packets accept;").unwrap();
    let fast = Request { ports: vec![100..=109], ..request(&lab, &[SPOKE_PUBLIC], &[Proto::Tcp]) };
    let slow = Request { rate: Some(25), ..fast.clone() };
    assert!(delivered(&swept(&lab, &fast)[0]).len() < 10);
    assert_eq!(delivered(&swept(&lab, &slow)[0]).len(), 10);
}

#[test]
fn replies_prove_ports_end_to_end_and_nothing_of_it_stays() {
    if lacking(&[Need::Lab]) {
        return;
    }
    let lab = Lab::shaped(Shape { mesh: Mesh::Plain, container: true });
    let _listeners = spoke(&lab);
    let _echo = lab.spoke.listen("echo", &["udp/[::]:7"]).unwrap();
    lab.publish(8080, 8000).unwrap();
    lab.spoke
        .nft(
            "table inet t { chain i { type filter hook input priority filter; ct state established accept;
             tcp dport 443 drop; }; }",
        )
        .unwrap();
    let wire = capture(&lab.internet, "spoke0");
    let before = conntrack(&lab.spoke);
    let replies = Request {
        mode: Mode::Reply,
        ports: vec![7..=7, 80..=81, 443..=443, 8080..=8080],
        ..request(&lab, &[SPOKE_PUBLIC, SPOKE_PUBLIC_V6], &Proto::ALL)
    };
    for sweep in swept(&lab, &replies) {
        let fates: Vec<(u16, Fate)> =
            sweep.fates.iter().map(|(port, fate)| (port.get(), fate.clone())).collect();
        if sweep.proto == Proto::Tcp {
            let expected = [
                (7, Fate::Reset),
                (80, Fate::Answered),
                (81, Fate::Reset),
                (443, Fate::Dropped),
                (8080, Fate::Answered),
            ];
            assert_eq!(fates, expected, "{}", sweep.address);
        } else {
            assert_eq!(fates[0], (7, Fate::Answered), "{}", sweep.address);
            assert!(matches!(fates[1].1, Fate::Unreachable { .. }), "{}: {fates:?}", sweep.address);
        }
    }
    assert_eq!(lab.spoke.sh("ss -Htan state syn-recv").unwrap(), "");
    let after = conntrack(&lab.spoke);
    assert!(
        after.lines().count() <= before.lines().count(),
        "{before}
then
{after}"
    );
    assert_eq!(lab.internet.connect(SocketAddr::new(SPOKE_PUBLIC, 80), SOON), Answer::Open);
    let seen = ended(wire, ".80: Flags [S]");
    let foreign = foreign(&seen);
    assert!(foreign.is_empty(), "{foreign:#?}");
}

#[test]
fn an_audit_that_is_killed_leaves_nothing_and_a_second_one_waits_its_turn() {
    if lacking(&[Need::Lab]) {
        return;
    }
    let lab = Lab::plain();
    let run_dir = lab.dir.join("run");
    let mut slow = lab.spoke.sweep_slowly("eth0", SPOKE_PUBLIC, &run_dir).unwrap();
    let few = Request { ports: vec![1..=100], ..request(&lab, &[SPOKE_PUBLIC], &[Proto::Tcp]) };
    let busy = lab.spoke.inside(|| sweep(&few, &mut |_| ())).unwrap_err();
    assert!(matches!(busy.downcast_ref(), Some(SweepError::Busy(_))), "{busy:#}");
    assert_eq!(attached(&lab.spoke), if Means::of_this_kernel().tcx { 2 } else { 1 });
    slow.signal(Signal::KILL).unwrap();
    slow.wait(SOON).unwrap();
    wait_until(SOON, "the programs leave", || (attached(&lab.spoke) == 0).then_some(())).unwrap();
    assert_eq!(swept(&lab, &few)[0].fates.len(), 100, "and the lock with it");
}

#[test]
fn an_audit_that_waited_judges_by_what_the_policy_says_by_then() {
    if lacking(&[Need::Lab, Need::Spokeguard]) {
        return;
    }
    let lab = Lab::plain();
    let run_dir = lab.dir.join("run");
    let policy = lab.file("policy.toml", &lab.plain_policy()).unwrap();
    let _app = lab.spoke.listen_tcp(SPOKE_PUBLIC, 8080).unwrap();
    let program = lab::spokeguard().unwrap();
    let [program, file, run] = [&program, &policy, &run_dir].map(|path| path.to_str().unwrap());
    let audit = ["audit", "--tcp", "-p", "8080", "--interface", "eth0"];
    let words = [&[program], &audit[..], &["--policy", file, "--run-dir", run]].concat();
    let judge = |changes: bool| {
        let mut slow = lab.spoke.sweep_slowly("eth0", SPOKE_PUBLIC, &run_dir).unwrap();
        let mut waits = lab.spoke.spawn(&words).unwrap();
        // It has read the policy once, and sleeps until it asks for the lock again.
        let asleep = format!("/proc/{}/wchan", waits.pid());
        wait_until(Duration::from_secs(20), "the second audit waits", || {
            std::fs::read_to_string(&asleep).ok()?.contains("nanosleep").then_some(())
        })
        .unwrap_or_else(|error| panic!("{error:#}: {}", waits.log()));
        assert!(!waits.has_ended(), "it did not wait: {}", waits.log());
        if changes {
            let wider = lab.plain_policy().replace("tcp = [80, 443]", "tcp = [80, 443, 8080]");
            std::fs::write(&policy, wider).unwrap();
        }
        slow.signal(Signal::KILL).unwrap();
        slow.wait(SOON).unwrap();
        let ended = waits.wait(Duration::from_secs(30)).unwrap();
        (ended.code(), waits.log())
    };
    let (code, said) = judge(false);
    assert_eq!(code, Some(1), "{said}");
    let (code, said) = judge(true);
    assert_eq!(code, Some(0), "{said}");
}

#[test]
fn devices_of_every_kind() {
    if lacking(&[Need::Lab]) {
        return;
    }
    let lab = Lab::plain();
    lab.spoke
        .sh("ip tuntap add mode tun name tun0; ip addr add 10.9.0.1/24 dev tun0; ip link set tun0 up
             ip link add br0 type bridge; ip link add p0 type veth peer name p1; ip link set p0 master br0 up
             ip addr add 10.8.0.1/24 dev br0; ip link set br0 up; ip link set p1 up
             # Not every kernel has VLANs.
             if ip link add link eth0 name eth0.5 type vlan id 5; then
               ip addr add 192.0.2.9/24 dev eth0.5; ip link set eth0.5 up; fi")
        .unwrap();
    let rules = "tcp dport 80 accept; iifname eth0.5 tcp dport 81 accept; iifname tun0 tcp dport 82 accept; \
                 iifname br0 tcp dport 83 accept; iifname wg0 tcp dport 84 accept; tcp dport 90 reject with tcp reset;";
    lab.spoke.drop_all_but(rules).unwrap();
    for (name, address, special) in [
        ("eth0.5", "192.0.2.9", 81),
        ("tun0", "10.9.0.1", 82),
        ("br0", "10.8.0.1", 83),
        ("wg0", "10.84.0.16", 84),
        // The mesh address asked for at the public door (weak host).
        ("eth0", "10.84.0.16", 0),
    ] {
        let Some(link) = find(&lab.spoke, name) else {
            assert_eq!(name, "eth0.5");
            eprintln!("skipped: VLAN devices (this kernel has none)");
            continue;
        };
        assert_eq!(link.ethernet, name != "tun0");
        let request = Request { link, ..request(&lab, &[address.parse().unwrap()], &[Proto::Tcp]) };
        let request = Request { ports: vec![1..=1000], ..request };
        let sweep = swept(&lab, &request).remove(0);
        let expected: Vec<u16> = [80, special].into_iter().filter(|port| *port != 0).collect();
        assert_eq!(delivered(&sweep), expected, "{name}");
        assert_eq!(sweep.fates[89].1, Fate::Reset, "{name}: a reject is heard though no neighbour answers");
    }
    let down = link(&lab.spoke, "br0");
    lab.spoke.sh("ip link set br0 down").unwrap();
    let request = Request { link: down, ..request(&lab, &["10.8.0.1".parse().unwrap()], &[Proto::Tcp]) };
    let error = lab.spoke.inside(|| sweep(&request, &mut |_| ())).unwrap_err();
    assert!(matches!(error.downcast_ref(), Some(SweepError::Down(_))), "{error:#}");
}

/// As of a host that is too busy for a moment to take what arrives.
#[test]
fn probes_that_are_not_seen_for_a_moment_are_sent_again_and_those_that_never_are_are_told_of() {
    if lacking(&[Need::Lab]) || !Means::of_this_kernel().tcx {
        return;
    }
    let lab = Lab::plain();
    let all = Request { threads: 1, ..request(&lab, &[SPOKE_PUBLIC], &[Proto::Tcp]) };
    let silenced = |moment: Duration| {
        let mut program = None;
        let mut tell = |_| match &program {
            None => program = Some((Instant::now(), Some(stranger_program(&lab, SHOT)))),
            Some((since, Some(_))) if since.elapsed() > moment => program = Some((Instant::now(), None)),
            Some(_) => {}
        };
        lab.spoke.inside(|| sweep(&all, &mut tell))
    };
    let fates = silenced(Duration::from_millis(300)).unwrap().remove(0).fates;
    assert_eq!(fates.iter().filter(|(_, fate)| *fate == Fate::Lost).count(), 0);
    let error = silenced(Duration::MAX).unwrap_err();
    assert!(matches!(error.downcast_ref(), Some(SweepError::Lost { .. })), "{error:#}");
}

fn request(lab: &Lab, addresses: &[IpAddr], protos: &[Proto]) -> Request {
    Request {
        link: link(&lab.spoke, "eth0"),
        addresses: addresses.to_vec(),
        protos: protos.to_vec(),
        ports: vec![1..=u16::MAX],
        source: None,
        named: Vec::new(),
        plain: false,
        mode: Mode::Verdict,
        rate: None,
        threads: 2,
        care: Vec::new(),
        keeper: None,
        run_dir: lab.dir.join("run"),
    }
}

/// What listens on the spoke and in its container.
fn spoke(lab: &Lab) -> Vec<lab::Listening> {
    let mesh = format!("tcp/{SPOKE_MESH}:7000");
    let v6 = format!("tcp/[{SPOKE_PUBLIC_V6}]:6000");
    let container = lab.container.as_ref().unwrap();
    vec![
        lab.spoke.web().unwrap(),
        lab.spoke
            .listen("app", &["tcp/0.0.0.0:5432", "tcp/127.0.0.1:6379", "tcp/[::]:9050", &mesh, &v6])
            .unwrap(),
        container.listen("app", &["tcp/[::]:8000+1"]).unwrap(),
    ]
}

fn link(node: &Node, name: &str) -> Link {
    find(node, name).unwrap_or_else(|| panic!("{name} in {}", node.name))
}

fn find(node: &Node, name: &str) -> Option<Link> {
    node.inside(links::read).unwrap().into_iter().find(|link| link.name == name)
}

fn swept(lab: &Lab, request: &Request) -> Vec<Sweep> {
    lab.spoke.inside(|| sweep(request, &mut |_| ())).unwrap()
}

fn delivered(sweep: &Sweep) -> Vec<u16> {
    let through = sweep.fates.iter().filter(|(_, fate)| matches!(fate, Fate::Delivered { .. }));
    through.map(|(port, _)| port.get()).collect()
}

/// In nmap's words, with what listens here and in the container.
fn states(lab: &Lab, sweep: &Sweep) -> BTreeMap<u16, &'static str> {
    let here = listening(&lab.spoke);
    let there = listening(lab.container.as_ref().unwrap());
    let answers = |all: &[Listener], address: IpAddr, port: Port| {
        let open = all.iter().any(|l| l.proto == sweep.proto && l.port == port && l.answers(address));
        if open { "open" } else { "closed" }
    };
    let state = |fate: &Fate| match fate {
        Fate::Delivered { address, port } => answers(&here, *address, *port),
        Fate::Forwarded { address, port } => {
            assert!([CONTAINER, CONTAINER_V6].contains(address), "{fate:?}");
            answers(&there, *address, *port)
        }
        Fate::Answered => "open",
        Fate::Reset => "closed",
        Fate::Unreachable { .. } | Fate::Dropped | Fate::Held(_) => "filtered",
        Fate::Lost => "lost",
    };
    sweep.fates.iter().map(|(port, fate)| (port.get(), state(fate))).collect()
}

fn listening(node: &Node) -> Vec<Listener> {
    node.inside(|| listeners::read(&mut owners::Owners::new())).unwrap()
}

fn kind(fate: &Fate) -> &'static str {
    match fate {
        Fate::Delivered { .. } => "delivered",
        Fate::Forwarded { .. } => "forwarded",
        Fate::Answered => "answered",
        Fate::Reset => "reset",
        Fate::Unreachable { .. } => "unreachable",
        Fate::Dropped => "dropped",
        Fate::Held(_) => "held",
        Fate::Lost => "lost",
    }
}

/// A listener that nobody accepts from but the test.
fn quiet_listener(node: &Node, at: SocketAddr) -> TcpListener {
    node.inside(|| {
        let socket = TcpListener::bind(at)?;
        socket.set_nonblocking(true)?;
        Ok(socket)
    })
    .unwrap()
}

/// Programs of an audit on the spoke's public interface, both ways; those of netfilter end with the same process.
/// By the older means its table.
fn attached(node: &Node) -> usize {
    if !Means::of_this_kernel().tcx {
        let tables = node.ok(&["nft", "list", "tables"]).unwrap();
        return tables.split_whitespace().filter(|word| is_table(word.as_bytes())).count();
    }
    let both = [TcAttachType::Ingress, TcAttachType::Egress];
    let programs = |way| SchedClassifier::query_tcx("eth0", way).map(|(_, programs)| programs.len());
    node.inside(|| Ok(programs(both[0])? + programs(both[1])?)).unwrap()
}

/// Conntrack's table, but for what bridges say to multicast routers.
fn conntrack(node: &Node) -> String {
    node.sh("grep -E ' (tcp|udp|icmp|icmpv6) ' /proc/thread-self/net/nf_conntrack || true").unwrap()
}

/// Everything on an interface but neighbour discovery and the like.
fn capture(node: &Node, interface: &str) -> Running {
    let filter = "(ip and not igmp) or (ip6 and (tcp or udp or (icmp6 and ip6[40] < 128)))";
    let mut running =
        node.spawn(&["tcpdump", "-n", "-l", "--immediate-mode", "-i", interface, filter]).unwrap();
    running.wait_for("listening on", SOON).unwrap();
    running
}

/// What neither comes from the outsider nor goes there.
fn foreign(captured: &str) -> Vec<String> {
    let strange = captured.lines().filter(|line| line.contains(" > ") && !line.contains("198.51.100.99"));
    strange.map(str::to_owned).collect()
}

/// What was captured up to a packet that the test sent last.
fn ended(mut capture: Running, last: &str) -> String {
    capture.wait_for(last, SOON).unwrap();
    let seen = capture.log();
    capture.stop().unwrap();
    seen
}
