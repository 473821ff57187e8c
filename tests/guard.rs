//! The second layer: what the tc guard refuses when nftables is away, and that the two
//! never disagree.

use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsFd as _;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use lab::{
    Answer, CONTAINER, Lab, Mesh, Need, Node, OUTSIDER, OUTSIDER_V6, SPOKE_MESH, SPOKE_PUBLIC,
    SPOKE_PUBLIC_V6, Shape, lacking, wait_until,
};
use spokeguard::desired::GuardRules;
use spokeguard::desired::guard::{Boot, Listed, Side, Syn, Timed};
use spokeguard::observed::Link;
use spokeguard::source::bpf::Hook;
use spokeguard::source::bpf::guard::{self, Force, Guard};
use spokeguard::source::links;
use spokeguard::sys::bpf;
use spokeguard::terms::Port;

use crate::daemon::{LONG, SHORT, findings, plain_policy, status};
use crate::metrics::{fresh, sum};

const FAMILIES: [(IpAddr, IpAddr); 2] = [(OUTSIDER, SPOKE_PUBLIC), (OUTSIDER_V6, SPOKE_PUBLIC_V6)];
const FLUSH: [&str; 3] = ["nft", "flush", "ruleset"];

fn opened<T: Send>(lab: &Lab, use_it: impl FnOnce(&mut Guard) -> anyhow::Result<T> + Send) -> T {
    let pins = lab.spoke.path("/sys/fs/bpf/spokeguard");
    lab.spoke.inside(|| use_it(&mut Guard::open(&pins)?.expect("a guard"))).unwrap()
}

fn on(lab: &Lab) -> Vec<String> {
    opened(lab, |guard| guard.attached())
}

/// A TCP header that opens a connection and nothing more.
fn syn(from: u16, to: u16) -> Vec<u8> {
    let mut segment = [from.to_be_bytes(), to.to_be_bytes()].concat();
    segment.extend([0, 0, 0, 1, 0, 0, 0, 0, 0x50, 0x02, 0xff, 0xff, 0, 0, 0, 0]);
    segment
}

/// Opening segments from as many ports, each sent once: no kernel repeats them. One for which a slow machine has no
/// room was not sent, and has another turn.
pub fn send_syns(node: &Node, to: IpAddr, port: u16, count: u16) {
    use rustix::io::Errno;
    use rustix::net::{AddressFamily, SendFlags, SocketFlags, SocketType, ipproto, sendto, socket_with};
    const SOON: Duration = Duration::from_secs(5);
    node.inside(|| {
        let family = if to.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
        let socket = socket_with(family, SocketType::RAW, SocketFlags::CLOEXEC, Some(ipproto::TCP))?;
        for n in 0..count {
            let send =
                || sendto(&socket, &syn(20_000 + n, port), SendFlags::empty(), &SocketAddr::new(to, 0));
            let sent = wait_until(SOON, "room for a segment", || {
                Some(send()).filter(|sent| *sent != Err(Errno::NOBUFS))
            });
            sent??;
        }
        Ok(())
    })
    .unwrap();
}

/// Connects without waiting, hundreds at once, until told to stop. Gives how many began
/// and how many came about.
fn storm(node: &Node, to: SocketAddr, stop: &AtomicBool) -> (u32, u32) {
    use rustix::event::{PollFd, PollFlags, poll};
    use rustix::net::{AddressFamily, SocketFlags, SocketType, connect, socket_with, sockopt};
    node.inside(|| {
        let family = if to.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
        let (mut begun, mut open) = (0, 0);
        while !stop.load(Ordering::Relaxed) {
            let mut sockets = Vec::new();
            for _ in 0..200 {
                let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
                let socket = socket_with(family, SocketType::STREAM, flags, None)?;
                let _ = connect(&socket, &to);
                begun += 1;
                sockets.push(socket);
            }
            // An answer on a veth takes microseconds; the last of them get some more.
            std::thread::sleep(Duration::from_millis(5));
            let mut polled: Vec<_> = sockets.iter().map(|s| PollFd::new(s, PollFlags::OUT)).collect();
            poll(&mut polled, Some(&Default::default()))?;
            let ready: Vec<bool> = polled.iter().map(|p| !p.revents().is_empty()).collect();
            for (socket, ready) in sockets.iter().zip(ready) {
                open += u32::from(ready && sockopt::socket_error(socket)?.is_ok());
            }
        }
        Ok((begun, open))
    })
    .unwrap()
}

/// While `work` goes on: how many connections were begun and came about, by family.
fn stormed<T>(lab: &Lab, port: u16, work: impl FnOnce() -> T) -> (Vec<(u32, u32)>, T) {
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let senders: Vec<_> = FAMILIES
            .into_iter()
            .map(|(_, to)| {
                let (stop, lab) = (&stop, &lab);
                scope.spawn(move || storm(&lab.internet, SocketAddr::new(to, port), stop))
            })
            .collect();
        let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
        stop.store(true, Ordering::Relaxed);
        let counts = senders.into_iter().map(|sender| sender.join().unwrap()).collect();
        (counts, done.unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    })
}

fn reach(lab: &Lab, port: u16) -> [Answer; 2] {
    FAMILIES.map(|(_, to)| lab.internet.connect(SocketAddr::new(to, port), SHORT))
}

/// The kernel lets go of a program a moment after its pin is gone. That it is open then
/// shows that the storms and probes before would have been seen.
fn open_soon(lab: &Lab, port: u16) {
    wait_until(LONG, "the port is open", || (reach(lab, port) == [Answer::Open; 2]).then_some(())).unwrap();
}

/// Takes the guard off every device, whichever way it was put there.
pub fn unguard(node: &Node) {
    node.sh("rm -f /sys/fs/bpf/spokeguard/guard1/links/*
         ip -br link | while read -r device _; do
             tc filter del dev ${device%@*} ingress pref 8 2>/dev/null || true
         done")
        .unwrap();
}

#[test]
fn guard_refuses_while_the_rules_are_away_and_nobody_is_alive() {
    if lacking(&[Need::Lab, Need::Spokeguard]) {
        return;
    }
    let lab = Lab::plain();
    let _all = lab.spoke.listen("all", &["tcp/[::]:80", "tcp/[::]:5432", "tcp/[::]:22"]).unwrap();
    let mut daemon = lab.spoke.daemon(&plain_policy(&lab)).unwrap();
    let folder = daemon.folder().to_path_buf();
    assert_eq!(on(&lab), ["eth0"], "not on the mesh");

    // The daemon repairs, the ruleset is flushed all the time, and nobody slips in between.
    let (refused, flushes) = stormed(&lab, 5432, || {
        let until = Instant::now() + Duration::from_millis(1500);
        let mut flushes = 0;
        while Instant::now() < until || flushes < 30 {
            lab.spoke.ok(&FLUSH).unwrap();
            assert_eq!(lab.internet.connect(SocketAddr::new(SPOKE_PUBLIC, 80), LONG), Answer::Open);
            flushes += 1;
        }
        flushes
    });
    assert!(refused.iter().all(|(begun, open)| *begun > 200 && *open == 0), "{refused:?} in {flushes}");

    // Nobody is alive, nothing of nftables is left.
    daemon.kill_9().unwrap();
    let gone = || {
        // A table of an audit that was under way is nft's own, and goes when that has ended.
        wait_until(LONG, "nothing is left of nftables", || {
            lab.spoke.ok(&FLUSH).unwrap();
            (lab.spoke.ok(&["nft", "list", "ruleset"]).unwrap() == "").then_some(())
        })
        .unwrap();
    };
    gone();
    let (refused, ()) = stormed(&lab, 5432, || {
        for _ in 0..20 {
            // A queue may overflow in the storm; TCP tries again.
            for (_, to) in FAMILIES {
                assert_eq!(lab.internet.connect(SocketAddr::new(to, 80), LONG), Answer::Open);
            }
            assert_eq!(reach(&lab, 22), [Answer::Silent; 2]);
        }
    });
    assert!(refused.iter().all(|(begun, open)| *begun > 200 && *open == 0), "{refused:?}");
    // The hub's way in, and what this host begins itself, never met it.
    let ssh = SocketAddr::new(SPOKE_MESH, 22);
    assert_eq!(lab.hub.connect(ssh, LONG), Answer::Open);
    let _far = lab.internet.listen("far", &["tcp/[::]:7777"]).unwrap();
    for (far, _) in FAMILIES {
        assert_eq!(lab.spoke.connect(SocketAddr::new(far, 7777), LONG), Answer::Open);
    }
    // The mesh address through the public interface: a neighbour's trick.
    lab.internet.sh("ip route add 10.84.0.16 via 198.51.100.7").unwrap();
    assert_eq!(lab.internet.connect(SocketAddr::new(SPOKE_MESH, 80), SHORT), Answer::Silent);

    // `check` names what is left, and a damaged guard.
    let arguments = daemon.arguments(&["check", "--format", "json"]);
    let codes = || {
        let report = lab.spoke.spokeguard(&arguments).unwrap().json().unwrap();
        report["findings"].as_array().unwrap().iter().map(|f| f["code"].to_string()).collect::<Vec<_>>()
    };
    assert!(
        codes().contains(&"\"firewall-missing\"".into()) && !codes().contains(&"\"guard-missing\"".into())
    );
    unguard(&lab.spoke);
    assert!(codes().contains(&"\"guard-missing\"".into()));
    open_soon(&lab, 5432);

    // A daemon puts it back, follows the interfaces, and repairs it at its tick.
    daemon = lab.spoke.daemon_in(&folder, &[]).unwrap();
    assert_eq!(on(&lab), ["eth0"]);
    lab.spoke.sh("ip link add new0 type veth peer name new1 && ip link set new0 up").unwrap();
    wait_until(LONG, "new interfaces are guarded", || (on(&lab) == ["eth0", "new0", "new1"]).then_some(()))
        .unwrap();
    wait_until(LONG, "and known to be", || {
        let told = status(&lab.spoke, &daemon);
        let is_known = told["daemon"]["guard"] == "on eth0, new0, new1";
        (is_known && findings(&told, "guard-missing").is_empty()).then_some(())
    })
    .unwrap();
    unguard(&lab.spoke);
    wait_until(LONG, "the guard is back", || (on(&lab) == ["eth0", "new0", "new1"]).then_some(())).unwrap();
    // Taken away altogether, it is loaded anew.
    lab.spoke.sh("rm -r /sys/fs/bpf/spokeguard/guard1").unwrap();
    let pins = lab.spoke.path("/sys/fs/bpf/spokeguard");
    wait_until(2 * LONG, "the guard is loaded anew", || {
        let on = lab.spoke.inside(|| Guard::open(&pins)?.map(|guard| guard.attached()).transpose());
        (on.ok()?? == ["eth0", "new0", "new1"]).then_some(())
    })
    .unwrap();
    let shown = |what: &str| sum(&fresh(&lab.hub), "control_enforced", &[("control", what)]);
    wait_until(2 * LONG, "the guard is told", || (shown("guard") == 1.0).then_some(())).unwrap();
    let status = lab.spoke.spokeguard(&daemon.arguments(&["status", "--format", "json"])).unwrap();
    let status = status.json().unwrap().to_string();
    assert!(status.contains("on eth0, new0, new1"), "{status}");
    assert!(status.contains("it was taken off eth0"), "{status}");

    assert!(daemon.running.stop().unwrap().success());
    gone();
    assert_eq!(reach(&lab, 5432), [Answer::Silent; 2], "in force without a daemon");
    // Another version's, in force beside ours, as an upgrade that was broken off leaves it.
    let pins = "/sys/fs/bpf/spokeguard";
    lab.spoke.sh(&format!("mv {pins}/guard1 {pins}/guard7")).unwrap();
    assert_eq!(reach(&lab, 22), [Answer::Silent; 2]);
    // It waits its turn: whoever has the lock may be about to put rules in.
    let lock = std::fs::File::open(daemon.run_dir.join("rollback/lock")).unwrap();
    rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive).unwrap();
    let program = lab::spokeguard().unwrap().display().to_string();
    let words: Vec<String> = [program].into_iter().chain(daemon.arguments(&["release"])).collect();
    let mut waits = lab.spoke.spawn(&words).unwrap();
    crate::daemon::over(Duration::from_millis(700));
    assert!(!waits.has_ended(), "{}", waits.log());
    waits.signal(lab::Signal::KILL).unwrap();
    waits.wait(LONG).unwrap();
    drop(lock);
    let said = lab.spoke.spokeguard(&daemon.arguments(&["release"])).unwrap();
    assert!(said.stdout.contains("the tc guard is gone"), "{}", said.all());
    open_soon(&lab, 5432);
}

fn dropped(body: &str, family: &str) -> f64 {
    sum(body, "dropped_packets_total", &[("rule", "public-tcp"), ("family", family)])
}

fn denied(body: &str, family: &str) -> f64 {
    sum(body, "connection_attempts_total", &[("family", family), ("verdict", "denied")])
}

#[test]
fn guard_counts_what_it_refuses_once_whoever_comes_and_goes() {
    if lacking(&[Need::Lab, Need::Spokeguard]) {
        return;
    }
    let lab = Lab::plain();
    let mut daemon = lab.spoke.daemon(&plain_policy(&lab)).unwrap();
    let folder = daemon.folder().to_path_buf();
    let before = fresh(&lab.hub);
    let (stop, sent) = (AtomicBool::new(false), AtomicU32::new(0));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) && sent.load(Ordering::Relaxed) < 1_000_000 {
                for (_, to) in FAMILIES {
                    send_syns(&lab.internet, to, 5432, 50);
                }
                sent.fetch_add(50, Ordering::Relaxed);
            }
        });
        for round in 0..5 {
            if round % 2 == 0 {
                daemon.kill_9().unwrap();
            } else {
                assert!(daemon.running.stop().unwrap().success());
            }
            daemon = lab.spoke.daemon_in(&folder, &[]).unwrap();
        }
        stop.store(true, Ordering::Relaxed);
    });
    let (after, sent) = (fresh(&lab.hub), f64::from(sent.into_inner()));
    assert!(sent > 500.0, "{sent}");
    for family in ["ipv4", "ipv6"] {
        assert_eq!(dropped(&after, family) - dropped(&before, family), sent, "{family}");
        // The counters come first, and see it all the same.
        assert_eq!(denied(&after, family) - denied(&before, family), sent, "{family}");
    }
    let counted = lab.spoke.ok(&["nft", "list", "counter", "inet", "spokeguard", "drop-public-tcp-ipv4"]);
    assert!(counted.unwrap().contains("packets 0 "), "nftables never saw them");

    // Audit mode: everything passes, and every number is the same, once.
    drop(daemon);
    let policy = std::fs::read_to_string(folder.join("policy.toml")).unwrap();
    std::fs::write(folder.join("policy.toml"), policy + "[enforce]\nmode = \"audit\"\n").unwrap();
    let _daemon = lab.spoke.daemon_in(&folder, &[]).unwrap();
    let _all = lab.spoke.listen("all", &["tcp/[::]:5432"]).unwrap();
    // Which of the drops that nftables counted during an audit were probes is known after it.
    wait_until(3 * LONG, "the first audit", || {
        fresh(&lab.hub).contains("spokeguard_audit_age_seconds").then_some(())
    })
    .unwrap();
    let before = fresh(&lab.hub);
    // From a network that has no answer for them: the kernel there would send resets.
    for (_, to) in FAMILIES {
        send_syns(&lab.internet, to, 9, 300);
    }
    let after = fresh(&lab.hub);
    for family in ["ipv4", "ipv6"] {
        assert_eq!(dropped(&after, family) - dropped(&before, family), 300.0, "{family}");
        assert_eq!(denied(&after, family) - denied(&before, family), 300.0, "{family}");
    }
    assert_eq!(reach(&lab, 5432), [Answer::Open; 2]);
    assert_eq!(sum(&after, "control_enforced", &[("control", "guard")]), 0.0, "counting is not enforcing");
    let [refused, counted] = opened(&lab, |guard| guard.refused());
    assert!(counted.values().sum::<u64>() >= 600, "{counted:?}");
    assert_eq!(refused.values().sum::<u64>() as f64, sent * 2.0, "none of them was refused");
}

#[test]
fn guard_judges_published_ports_by_what_was_asked_for_and_leaves_routing_alone() {
    if lacking(&[Need::Lab, Need::Spokeguard]) {
        return;
    }
    let lab = Lab::shaped(Shape { mesh: Mesh::Plain, container: true });
    let container = lab.container.as_ref().unwrap();
    let _web = container.listen("web", &["tcp/[::]:80"]).unwrap();
    let _far = lab.internet.listen("far", &["tcp/[::]:7777"]).unwrap();
    let _own = lab.spoke.listen("own", &["tcp/[::]:5432", "tcp/[::]:53"]).unwrap();
    lab.publish(8080, 80).unwrap();
    let local = "[[local]]\nname = \"containers\"\ninterfaces = [\"docker*\"]\ntcp = [53]\n";
    // With docker0 as a [[local]], and without, where it is public like any other.
    for (ports, more) in [("80, 8080", local), ("80", local), ("80, 8080", "")] {
        let policy = plain_policy(&lab).replace("tcp = [80, 443]", &format!("tcp = [{ports}]"));
        let mut daemon = lab.spoke.daemon(&(policy + more)).unwrap();
        daemon.kill_9().unwrap();
        lab.spoke.ok(&["nft", "delete", "table", "inet", "spokeguard"]).unwrap();
        let wanted = if ports.contains("8080") { Answer::Open } else { Answer::Silent };
        assert_eq!(reach(&lab, 8080), [wanted; 2], "{ports} {more}: 80 inside is another port");
        let far = SocketAddr::new(OUTSIDER, 7777);
        assert_eq!(container.connect(far, LONG), Answer::Open, "{more}: a container's own way out");
        let gateway = |port| container.connect(SocketAddr::new("172.17.0.1".parse().unwrap(), port), SHORT);
        let (guarded, own) = (on(&lab).contains(&"docker0".to_owned()), gateway(5432));
        assert_eq!(
            (guarded, own),
            if more.is_empty() { (true, Answer::Silent) } else { (false, Answer::Open) }
        );
        // A neighbour that routes to the container's own address.
        lab.internet.sh("ip route replace 172.17.0.0/16 via 198.51.100.7").unwrap();
        let inside = |port| lab.internet.connect(SocketAddr::new(CONTAINER, port), SHORT);
        if !more.is_empty() {
            assert_eq!((inside(80), inside(81)), (Answer::Open, Answer::Silent));
        }
    }
}

#[test]
fn guard_keeps_to_sources_ends_and_confirmations() {
    if lacking(&[Need::Lab, Need::Spokeguard]) {
        return;
    }
    let lab = Lab::plain();
    let _all =
        lab.spoke.listen("all", &["tcp/[::]:80", "tcp/[::]:8443", "tcp/[::]:2222", "tcp/[::]:443"]).unwrap();
    let exception = "[[exception]]\nname = \"office\"\ntcp = [8443]\nfrom = [\"198.51.100.99/32\", \
                     \"2001:db8:1::/64\"]\nreason = \"the office\"\nuntil = \"2099-01-01\"\n";
    let policy = plain_policy(&lab).replace("tcp = [80, 443]", "tcp = [80]") + exception;
    let guard = crate::enforce::Guard::new(&lab, &lab.spoke);
    guard.enforce(&policy);
    let away = || lab.spoke.ok(&["nft", "delete", "table", "inet", "spokeguard"]).map(drop).unwrap();
    away();
    assert_eq!(reach(&lab, 8443), [Answer::Open; 2]);
    assert_eq!(reach(&lab, 443), [Answer::Silent; 2]);
    lab.internet
        .sh("ip addr add 198.51.100.98/24 dev spoke0 && ip route replace 198.51.100.7 dev spoke0 \
                     src 198.51.100.98")
        .unwrap();
    assert_eq!(reach(&lab, 8443), [Answer::Silent, Answer::Open], "another source");
    lab.internet.sh("ip route del 198.51.100.7 dev spoke0").unwrap();

    // Openings with an end: by source, and none after it.
    let port = Port::new(2222).unwrap();
    let now = spokeguard::sys::clock::since_boot_ns();
    let timed = |from: &str, until| Timed { port, from: vec![from.parse().unwrap()], until: Boot(until) };
    let minute = now + 60_000_000_000;
    let set = |openings: &[Timed]| opened(&lab, |guard| guard.set_timed(port, openings));
    assert_eq!(reach(&lab, 2222), [Answer::Silent; 2]);
    set(&[timed("198.51.100.0/24", minute), timed("198.51.100.99/32", now), timed("2001:db8:1::/48", now)]);
    assert_eq!(reach(&lab, 2222), [Answer::Open, Answer::Silent], "the wider one holds for the narrower");
    set(&[timed("2001:db8:1::/48", minute)]);
    assert_eq!(reach(&lab, 2222), [Answer::Silent, Answer::Open]);
    set(&[]);
    assert_eq!(reach(&lab, 2222), [Answer::Silent; 2]);

    // A change that nobody has confirmed lets in what either policy does; then only the new.
    guard.write(&policy.replace("tcp = [80]", "tcp = [443]"));
    guard.says(0, &["apply", "--confirm-within", "60s"]);
    away();
    assert_eq!(opened(&lab, |guard| guard.force()), Force::Both);
    assert_eq!(
        (reach(&lab, 80), reach(&lab, 443), reach(&lab, 22)),
        ([Answer::Open; 2], [Answer::Open; 2], [Answer::Silent; 2])
    );
    // What is not in force is not confirmed: it is put back first, and the same trial goes on.
    assert!(guard.says(0, &["apply", "--confirm-within", "60s"]).contains("in force"));
    guard.says(0, &["confirm"]);
    away();
    assert_eq!(opened(&lab, |guard| guard.force()), Force::Newest);
    assert_eq!((reach(&lab, 80), reach(&lab, 443)), ([Answer::Silent; 2], [Answer::Open; 2]));
}

/// Small numbers from a seed: the same policies and packets in every run.
pub struct Dice(u64);

impl Dice {
    pub fn new(seed: u64) -> Self {
        // Never 0, and neighbours have nothing in common.
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x5eed_0bad_cafe_f00d)
    }

    pub fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 33) as usize % bound
    }

    pub fn pick<'a, T>(&mut self, of: &'a [T]) -> &'a T {
        &of[self.below(of.len())]
    }

    pub fn some<T: Clone>(&mut self, of: &[T]) -> Vec<T> {
        of.iter().filter(|_| self.below(2) == 0).cloned().collect()
    }
}

fn frame(mac: [u8; 6], from: IpAddr, to: IpAddr, ports: (u16, u16)) -> Vec<u8> {
    let segment = syn(ports.0, ports.1);
    let (kind, packet): ([u8; 2], Vec<u8>) = match (from, to) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            let head = [0x45, 0, 0, 40, 0, 0, 0x40, 0, 64, 6, 0, 0];
            ([0x08, 0x00], [&head[..], &from.octets(), &to.octets(), &segment].concat())
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            let head = [0x60, 0, 0, 0, 0, 20, 6, 64];
            ([0x86, 0xdd], [&head[..], &from.octets(), &to.octets(), &segment].concat())
        }
        _ => panic!("two families"),
    };
    [&mac[..], &[2, 0, 0, 0, 0, 2], &kind, &packet].concat()
}

const PASS: i32 = -1;
const SHOT: i32 = 2;

#[test]
fn guard_in_the_kernel_agrees_with_its_rules_and_reads_every_packet() {
    if lacking(&[Need::Lab, Need::Spokeguard]) {
        return;
    }
    let lab = Lab::shaped(Shape { mesh: Mesh::Plain, container: true });
    let _own = lab.spoke.listen("own", &["tcp/[::]:80", "tcp/[::]:5432"]).unwrap();
    // Something behind the mesh that is not of its prefix.
    lab.spoke.sh("ip route add 10.99.0.0/16 via 10.84.0.1 dev wg0").unwrap();
    let mut daemon = lab.spoke.daemon(&plain_policy(&lab)).unwrap();
    assert!(daemon.running.stop().unwrap().success());
    let pins = lab.spoke.path("/sys/fs/bpf/spokeguard");
    let links = lab.spoke.inside(links::read).unwrap();
    let eth0 = links.iter().find(|link| link.name == "eth0").unwrap().index;
    let mac = lab.spoke.ok(&["ip", "-br", "link", "show", "eth0"]).unwrap();
    let mac = mac.split_whitespace().find(|word| word.matches(':').count() == 5).unwrap();
    let mac: Vec<u8> = mac.split(':').map(|byte| u8::from_str_radix(byte, 16).unwrap()).collect();
    let mac: [u8; 6] = mac.try_into().unwrap();
    let run =
        |frame: &[u8]| lab.spoke.inside(|| guard::test_run(&pins, "guard_eth", (eth0, frame), 1)).unwrap().0;

    let mut dice = Dice(0x5eed_0bad_cafe_f00d);
    let ports = [1u16, 22, 63, 64, 80, 443, 2222, 9984, 65535];
    let sources = ["198.51.100.99", "192.0.2.127", "192.0.2.128", "10.84.0.255", "2001:db8:1::99", "fd84::9"];
    let nets = [
        "0.0.0.0/0",
        "::/0",
        "192.0.2.0/24",
        "192.0.2.0/25",
        "192.0.2.128/32",
        "198.51.100.99/32",
        "2001:db8:1::/48",
        "10.84.0.0/23",
    ];
    let targets = [
        ("198.51.100.7", None),
        ("10.84.0.16", None),
        ("10.84.0.77", Some(Side::Mesh)),
        ("172.17.0.2", Some(Side::Local)),
        ("10.99.1.1", Some(Side::Mesh)),
        ("203.0.113.47", Some(Side::Public)),
        ("2001:db8:1::7", None),
        ("fd84::16", None),
        ("fd00:17::2", Some(Side::Local)),
        ("2001:db8:2::47", Some(Side::Public)),
    ];
    let (mut passed, mut refused) = (0, 0);
    let today = spokeguard::cli::today(spokeguard::sys::clock::now());
    let rules_of = |text: &str| {
        let loaded = spokeguard::policy::parse(text, "policy.toml", today).unwrap_or_else(|e| panic!("{e}"));
        spokeguard::desired::Desired::new(loaded.policy, today).unwrap().guard.unwrap()
    };
    let local = "[[local]]\nname = \"containers\"\ninterfaces = [\"docker*\"]\ntcp = [53]\n";
    let base = rules_of(&(plain_policy(&lab) + local));
    let port = |number: &u16| Port::new(*number).unwrap();
    for round in 0..12 {
        let mut rules = base.clone();
        rules.ssh = port(dice.pick(&[22, 443]));
        rules.anyone = dice.some(&ports).iter().map(port).collect();
        rules.listed = (0..dice.below(5))
            .map(|_| Listed {
                port: port(dice.pick(&ports)),
                from: dice.some(&nets).iter().map(|net| net.parse().unwrap()).collect(),
                to: Vec::new(),
            })
            .collect();
        if dice.below(2) == 0 {
            let at = ["198.51.100.7", "2001:db8:1::7"].map(|to| to.parse().unwrap());
            let from = dice.some(&nets).iter().map(|net| net.parse().unwrap()).collect();
            rules.listed.push(Listed { port: rules.ssh, from, to: dice.some(&at) });
        }
        opened(&lab, |guard| guard.install(&rules, &links, None));
        for _ in 0..60 {
            let (source, (destination, onward), port) =
                (dice.pick(&sources), dice.pick(&targets), *dice.pick(&ports));
            let [source, destination]: [IpAddr; 2] = [source, destination].map(|text| text.parse().unwrap());
            if source.is_ipv4() != destination.is_ipv4() {
                continue;
            }
            let wanted = rules.judge(&Syn { source, destination, port, onward: *onward }, Boot(0));
            let got = run(&frame(mac, source, destination, (40_000, port)));
            let expected = if wanted.is_some() { SHOT } else { PASS };
            assert_eq!(
                got, expected,
                "round {round}: {source} -> {destination}:{port} {wanted:?}\n{rules:?}"
            );
            *if wanted.is_some() { &mut refused } else { &mut passed } += 1;
        }
    }
    assert!(passed > 50 && refused > 50, "{passed} passed, {refused} refused");

    // What is no new connection, or nobody's business here, passes whatever its port.
    let closed = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut frame = frame(mac, OUTSIDER, SPOKE_PUBLIC, (40_000, 5432));
        change(&mut frame);
        run(&frame)
    };
    assert_eq!(closed(&|_| ()), SHOT);
    for flags in [0x12, 0x10, 0x04, 0x18, 0x11] {
        assert_eq!(closed(&|frame| frame[47] = flags), PASS, "{flags:#x}");
    }
    for flags in [0x03, 0x0a, 0xc2, 0x42] {
        assert_eq!(closed(&|frame| frame[47] = flags), SHOT, "{flags:#x}: SYN with something else");
    }
    assert_eq!(closed(&|frame| frame[0] ^= 2), PASS, "for another machine's address");
    assert_eq!(closed(&|frame| frame[23] = 17), PASS, "UDP");
    assert_eq!(closed(&|frame| frame[21] = 5), PASS, "a later fragment");
    let tiny = |frame: &mut Vec<u8>| {
        frame[20] = 0x20;
        frame.truncate(14 + 20 + 8);
    };
    assert_eq!(closed(&tiny), SHOT, "the flags are in the next fragment");
    let tagged = |id: u8| move |frame: &mut Vec<u8>| drop(frame.splice(12..12, [0x81, 0x00, 0, id]));
    assert_eq!(closed(&tagged(7)), PASS, "the VLAN's interface has a guard of its own");
    // IPv6 extension headers: hop-by-hop, destination options, a fragment header.
    let extended = |chain: &[u8]| {
        let mut frame = frame(mac, OUTSIDER_V6, SPOKE_PUBLIC_V6, (40_000, 5432));
        let mut headers = Vec::new();
        for at in 0..chain.len() {
            frame[20] = chain[0];
            headers.extend([*chain.get(at + 1).unwrap_or(&6), 0, 0, 0, 0, 0, 0, 0]);
        }
        frame.splice(54..54, headers);
        run(&frame)
    };
    for chain in [&[][..], &[0], &[60], &[0, 60], &[44], &[0, 43, 60], &[0, 60, 60, 60, 60, 60]] {
        assert_eq!(extended(chain), SHOT, "{chain:?}");
    }

    // Both ends begin at once: its SYN answers ours.
    lab.internet
        .nft(
            "add table inet mute
             add chain inet mute c { type filter hook input priority 0; }
             add rule inet mute c tcp dport 50000 drop",
        )
        .unwrap();
    let _ours = lab.spoke.inside(|| {
        use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, connect, socket_with};
        let socket = socket_with(AddressFamily::INET, SocketType::STREAM, SocketFlags::NONBLOCK, None)?;
        bind(&socket, &SocketAddr::new(SPOKE_PUBLIC, 41_000))?;
        let _ = connect(&socket, &SocketAddr::new(OUTSIDER, 50_000));
        Ok(socket)
    });
    assert_eq!(run(&frame(mac, OUTSIDER, SPOKE_PUBLIC, (50_000, 41_000))), PASS);
    assert_eq!(run(&frame(mac, OUTSIDER, SPOKE_PUBLIC, (50_001, 41_000))), SHOT);

    // The older hook, for kernels before tcx. Its counters come first as well.
    lab.spoke.ok(&FLUSH).unwrap();
    // Off at once, though its link is still held: nobody waits for the kernel to let go of it.
    let link = lab.spoke.inside(|| Ok(bpf::open_pin(&pins.join(format!("guard1/links/in-{eth0}"))).ok()));
    let link = link.unwrap();
    assert_eq!(link.is_some(), Hook::of_this_kernel() == Hook::Tcx);
    let device = || link.as_ref().map(|link| bpf::tcx_link(link.as_fd()).unwrap().index);
    assert!(device().is_none_or(|device| device == eth0));
    lab.spoke.inside(|| guard::release(&pins)).unwrap();
    assert!(device().is_none_or(|device| device == 0));
    // A slow machine's answer is waited for, and silence where silence is expected.
    let ways = |expected: [Answer; 2]| {
        for (port, expected) in [80, 5432].into_iter().zip(expected) {
            let patience = if expected == Answer::Open { LONG } else { SHORT };
            let address = SocketAddr::new(SPOKE_PUBLIC, port);
            assert_eq!(lab.internet.connect(address, patience), expected, "{address}");
        }
    };
    open_soon(&lab, 5432);
    lab.spoke.spokeguard(&["internal-load-bpf", "/sys/fs/bpf/spokeguard", "--guard-only"]).unwrap();
    let rules = |public: &str| rules_of(&(plain_policy(&lab).replace("tcp = [80, 443]", public) + local));
    let clsact = |rules: &GuardRules, links: &[Link]| {
        lab.spoke
            .inside(|| {
                let mut guard = Guard::open(&pins)?.expect("a guard").with_hook(Hook::Clsact);
                guard.install(rules, links, None)?;
                guard.attached()
            })
            .unwrap()
    };
    assert_eq!(clsact(&rules("tcp = [80]"), &links), ["eth0"]);
    ways([Answer::Open, Answer::Silent]);
    assert_eq!(clsact(&rules("tcp = [5432]"), &links), ["eth0"]);
    ways([Answer::Silent, Answer::Open]);
    assert_eq!(clsact(&rules("tcp = []"), &[]), [""; 0]);
    ways([Answer::Open; 2]);
}
