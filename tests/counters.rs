//! The eBPF counters against what was really sent: exactly, whatever happens to the daemon.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use lab::{
    Answer, Daemon, Lab, Need, Node, SPOKE_MESH, SPOKE_MESH_V6, SPOKE_PUBLIC, SPOKE_PUBLIC_V6, lacking,
    wait_until,
};

use crate::daemon::{LONG, SHORT, plain_policy};
use crate::metrics::{fresh, sum};

/// Neighbours are fixed at both ends, so that nobody asks for any and all packets are ours.
pub fn quiet(lab: &Lab) {
    let mac = |node: &Node, interface: &str| {
        let shown = node.ok(&["ip", "-o", "link", "show", interface]).unwrap();
        shown.split("link/ether ").nth(1).unwrap().split(' ').next().unwrap().to_owned()
    };
    for (near, near_interface, far, far_interface, addresses) in [
        (&lab.internet, "spoke0", &lab.spoke, "eth0", ["198.51.100.7", "2001:db8:1::7"]),
        (&lab.spoke, "eth0", &lab.internet, "spoke0", ["198.51.100.99", "2001:db8:1::99"]),
        (&lab.hub, "wg0", &lab.spoke, "wg0", ["10.84.0.16", "fd84::16"]),
        (&lab.spoke, "wg0", &lab.hub, "wg0", ["10.84.0.1", "fd84::1"]),
    ] {
        for address in addresses {
            let there = mac(far, far_interface);
            near.ok(&[
                "ip",
                "neigh",
                "replace",
                address,
                "lladdr",
                &there,
                "dev",
                near_interface,
                "nud",
                "permanent",
            ])
            .unwrap();
        }
    }
}

pub fn interface(node: &Node, name: &str, what: &str) -> f64 {
    let shown = node.ok(&["ip", "-j", "-s", "link", "show", name]).unwrap();
    let json: serde_json::Value = serde_json::from_str(&shown).unwrap();
    let (direction, field) = what.split_once('_').unwrap();
    json[0]["stats64"][direction][field].as_f64().unwrap()
}

fn family(address: IpAddr) -> &'static str {
    if address.is_ipv4() { "ipv4" } else { "ipv6" }
}

pub fn started(lab: &Lab, more: &str) -> Daemon {
    let daemon = lab.spoke.daemon(&(plain_policy(lab) + more)).unwrap();
    // Which of the drops during an audit were probes is known after it.
    let audited = wait_until(3 * LONG, "the first audit", || {
        fresh(&lab.hub).contains("spokeguard_audit_age_seconds").then_some(())
    });
    if let Err(error) = audited {
        let status = lab.spoke.spokeguard(&daemon.arguments(&["status"])).unwrap();
        panic!("{error:#}\n{}\n{}", status.all(), daemon.running.log());
    }
    daemon
}

#[test]
fn counters_are_exact_for_every_scope_family_and_protocol() {
    if lacking(&[Need::Lab, Need::Spokeguard]) {
        return;
    }
    let lab = Lab::plain();
    let _web = lab.spoke.listen("web", &["tcp/[::]:80", "udp/[::]:4500"]).unwrap();
    quiet(&lab);
    let _daemon = started(&lab, "[[mesh.service]]\nname = \"echo\"\nudp = [4500]\nfrom = \"mesh\"\n");
    let packets = |body: &str, labels: &[(&str, &str)]| sum(body, "packets_total", labels);
    let bytes = |body: &str, labels: &[(&str, &str)]| sum(body, "bytes_total", labels);
    for (from, to, scope) in [
        (&lab.internet, SPOKE_PUBLIC, "public"),
        (&lab.internet, SPOKE_PUBLIC_V6, "public"),
        (&lab.hub, SPOKE_MESH, "mesh"),
        (&lab.hub, SPOKE_MESH_V6, "mesh"),
    ] {
        let udp = [("scope", scope), ("direction", "in"), ("family", family(to)), ("proto", "udp")];
        let before = fresh(&lab.hub);
        from.flood_udp(SocketAddr::new(to, 4000), 1234).unwrap();
        let after = fresh(&lab.hub);
        assert_eq!(packets(&after, &udp) - packets(&before, &udp), 1234.0, "{udp:?}");
        // "flood" with its headers, Ethernet's included.
        let size = 5 + 8 + if to.is_ipv4() { 20 } else { 40 } + 14;
        assert_eq!(bytes(&after, &udp) - bytes(&before, &udp), f64::from(1234 * size), "{udp:?}");
        // Nothing else moved in the other scope or family.
        let others = |body: &str| packets(body, &[("proto", "udp")]) - packets(body, &udp);
        assert_eq!(others(&after), others(&before));

        let icmp = |direction| {
            [("scope", scope), ("direction", direction), ("family", family(to)), ("proto", "other")]
        };
        // The kernel has things of its own to say in ICMPv6 now and then (MLD, neighbours), so
        // one exact run of three will do; a counter that is wrong is wrong in all of them.
        let runs: Vec<[f64; 2]> = (0..3)
            .map(|_| {
                let before = fresh(&lab.hub);
                echo(from, to, 9);
                let pinged = fresh(&lab.hub);
                ["in", "out"].map(|d| packets(&pinged, &icmp(d)) - packets(&before, &icmp(d)))
            })
            .collect();
        assert!(runs.contains(&[9.0, 9.0]), "{scope} {}: {runs:?}", family(to));
    }
    // The answers of an allowed service count on their way out.
    let before = fresh(&lab.hub);
    for _ in 0..6 {
        assert!(lab.hub.ask_udp(SocketAddr::new(SPOKE_MESH, 4500), LONG).unwrap().is_some());
    }
    let after = fresh(&lab.hub);
    for direction in ["in", "out"] {
        let labels = [("scope", "mesh"), ("direction", direction), ("family", "ipv4"), ("proto", "udp")];
        assert_eq!(packets(&after, &labels) - packets(&before, &labels), 6.0, "{direction}");
    }
}

#[test]
fn drops_are_exact_whatever_audits_come_and_go() {
    if lacking(&[Need::Lab, Need::Spokeguard]) {
        return;
    }
    let lab = Lab::plain();
    quiet(&lab);
    // By the tc guard, which sees TCP first; and by nftables alone, where nothing is refused.
    for (more, guarded) in [("", true), ("[enforce]\nmode = \"audit\"\n", false)] {
        let daemon = lab.spoke.daemon(&(plain_policy(&lab) + more)).unwrap();
        let counter = |rule: &str, family: &str| {
            let name = format!("drop-{rule}-{family}");
            let words = ["nft", "-j", "list", "counter", "inet", "spokeguard", &name];
            let listed: serde_json::Value = serde_json::from_str(&lab.spoke.ok(&words).unwrap()).unwrap();
            listed["nftables"][1]["counter"]["packets"].as_u64().unwrap()
        };
        let before = fresh(&lab.hub);
        let nft_before = ["ipv4", "ipv6"].map(|family| counter("public-udp", family));
        let mut sent = 0u32;
        let mut strike = || {
            for to in [SPOKE_PUBLIC, SPOKE_PUBLIC_V6] {
                lab.internet.flood_udp(SocketAddr::new(to, 4000), 100).unwrap();
                crate::guard::send_syns(&lab.internet, to, 5432, 20);
                crate::guard::send_syns(&lab.internet, to, 22, 10);
            }
            sent += 1;
        };
        let program = lab::spokeguard().unwrap().display().to_string();
        let words = |verb: &str| -> Vec<String> {
            [program.clone()].into_iter().chain(daemon.arguments(&[verb])).collect()
        };
        // The daemon's first audit may be under way; whoever else audits waits for it, or is told.
        for verb in ["check", "audit"] {
            let mut asks = lab.spoke.spawn(&words(verb)).unwrap();
            while !asks.has_ended() {
                strike();
                // One that comes to an end on a slow processor, too, and leaves room in its queue.
                crate::daemon::over(Duration::from_millis(20) * lab::times("SPOKEGUARD_PAUSES"));
            }
            assert!(asks.wait(LONG).unwrap().code().is_some(), "{}", asks.log());
        }
        // Killed, sooner and later.
        for later in [40, 200] {
            let mut killed = lab.spoke.spawn(&words("audit")).unwrap();
            crate::daemon::over(Duration::from_millis(later));
            strike();
            killed.signal(lab::Signal::KILL).unwrap();
            killed.wait(LONG).unwrap();
        }
        strike();
        wait_until(3 * LONG, "the daemon's own audit", || {
            (!crate::daemon::status(&lab.spoke, &daemon)["daemon"]["audit"].is_null()).then_some(())
        })
        .unwrap();
        let after = fresh(&lab.hub);
        for (at, family) in ["ipv4", "ipv6"].into_iter().enumerate() {
            let dropped = ["public-udp", "public-tcp", "ssh"].map(|rule| {
                let of =
                    |body: &str| sum(body, "dropped_packets_total", &[("rule", rule), ("family", family)]);
                of(&after) - of(&before)
            });
            // Conntrack knows nothing of a segment without a checksum, so the rules can't tell its port.
            let each = if guarded { [100, 20, 10] } else { [100, 30, 0] };
            let wanted = each.map(|each| f64::from(each * sent));
            assert_eq!(dropped, wanted, "{family}, {}", if guarded { "both layers" } else { "nftables" });
            let counted = counter("public-udp", family) - nft_before[at];
            assert_eq!(counted, u64::from(100 * sent), "{family}: nft's own number");
            // Whoever comes in is counted as ever, also by tc.
            let udp = [("scope", "public"), ("direction", "in"), ("family", family), ("proto", "udp")];
            let came = sum(&after, "packets_total", &udp) - sum(&before, "packets_total", &udp);
            assert_eq!(came, f64::from(100 * sent), "{family} by tc");
        }
    }
}

/// Echo requests, each answered before the next.
fn echo(node: &Node, to: IpAddr, count: u8) {
    use rustix::net::{
        AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, ipproto, recv, sendto, socket_with,
        sockopt,
    };
    node.inside(|| {
        let (family, proto, request, answer) = match to {
            IpAddr::V4(_) => (AddressFamily::INET, ipproto::ICMP, 8u8, 0u8),
            IpAddr::V6(_) => (AddressFamily::INET6, ipproto::ICMPV6, 128, 129),
        };
        let socket = socket_with(family, SocketType::RAW, SocketFlags::CLOEXEC, Some(proto))?;
        sockopt::set_socket_timeout(&socket, sockopt::Timeout::Recv, Some(LONG))?;
        for sequence in 1..=count {
            let mut packet = [request, 0, 0, 0, 0x53, 0x47, 0, sequence];
            // Ones' complement of the sum of words; IPv6's is the kernel's work.
            let sum: u32 = packet.chunks(2).map(|word| u32::from(word[0]) << 8 | u32::from(word[1])).sum();
            packet[2..4].copy_from_slice(&(!((sum >> 16) + (sum & 0xffff)) as u16).to_be_bytes());
            sendto(&socket, &packet, SendFlags::empty(), &SocketAddr::new(to, 0))?;
            loop {
                let mut reply = [0u8; 128];
                let (reply, length) =
                    recv(&socket, &mut reply[..], RecvFlags::empty()).map(|(_, n)| (reply, n))?;
                // An IPv4 raw socket shows the IP header, too.
                let at = if to.is_ipv4() { 20 } else { 0 };
                if length >= at + 8 && reply[at] == answer && reply[at + 4..at + 8] == packet[4..8] {
                    break;
                }
            }
        }
        Ok(())
    })
    .unwrap();
}

#[test]
fn counters_agree_with_the_interface() {
    if lacking(&[Need::Lab, Need::Spokeguard]) {
        return;
    }
    let lab = Lab::plain();
    let _web = lab.spoke.web().unwrap();
    quiet(&lab);
    let _daemon = started(&lab, "");
    let all = |body: &str, name: &str, direction: &str| {
        sum(body, name, &[("scope", "public"), ("direction", direction)])
    };
    let kernel = |what: &str| interface(&lab.spoke, "eth0", what);
    let before = (fresh(&lab.hub), ["rx_packets", "tx_packets", "rx_bytes", "tx_bytes"].map(kernel));
    for address in [SPOKE_PUBLIC, SPOKE_PUBLIC_V6] {
        for _ in 0..20 {
            let answer = lab.internet.http_get(SocketAddr::new(address, 80), "/", &[]).unwrap();
            assert_eq!(answer.body, "web\n");
        }
        lab.internet.flood_udp(SocketAddr::new(address, 9), 500).unwrap();
    }
    // The last FIN is on its way when the client has ended.
    wait_until(LONG, "both count the same", || {
        let now = (fresh(&lab.hub), ["rx_packets", "tx_packets", "rx_bytes", "tx_bytes"].map(kernel));
        let again = ["rx_packets", "tx_packets", "rx_bytes", "tx_bytes"].map(kernel);
        let grown = |n: usize| now.1[n] - before.1[n];
        let ours = |name, direction| all(&now.0, name, direction) - all(&before.0, name, direction);
        let equal = ours("packets_total", "in") == grown(0)
            && ours("packets_total", "out") == grown(1)
            && ours("bytes_total", "in") == grown(2)
            && ours("bytes_total", "out") == grown(3);
        (equal && again == now.1 && grown(0) > 1100.0 && grown(1) > 100.0).then_some(())
    })
    .unwrap();
    let after = fresh(&lab.hub);
    for family in ["ipv4", "ipv6"] {
        let http = |direction| {
            let labels =
                [("scope", "public"), ("direction", direction), ("family", family), ("service", "http")];
            sum(&after, "packets_total", &labels) - sum(&before.0, "packets_total", &labels)
        };
        assert!(http("in") >= 100.0 && http("out") >= 60.0, "{family}: {} {}", http("in"), http("out"));
    }
}

#[test]
fn counters_tell_allowed_attempts_from_denied_ones() {
    if lacking(&[Need::Lab, Need::Spokeguard]) {
        return;
    }
    let lab = Lab::plain();
    let _all = lab.spoke.listen("all", &["tcp/[::]:80", "tcp/[::]:22", "tcp/[::]:5432"]).unwrap();
    let daemon = started(&lab, "");
    attempts(&lab, Answer::Silent);
    drop(daemon);
    // In audit mode the same counts, and the connections come about.
    let _daemon = started(&lab, "[enforce]\nmode = \"audit\"\n");
    attempts(&lab, Answer::Open);
}

fn attempts(lab: &Lab, denied: Answer) {
    let count = |body: &str, labels: &[(&str, &str)]| sum(body, "connection_attempts_total", labels);
    for address in [SPOKE_PUBLIC, SPOKE_PUBLIC_V6] {
        let (allowed_80, refused) = (
            [("service", "http"), ("family", family(address)), ("verdict", "allowed")],
            [("family", family(address)), ("verdict", "denied")],
        );
        let before = fresh(&lab.hub);
        for _ in 0..5 {
            assert_eq!(lab.internet.connect(SocketAddr::new(address, 80), LONG), Answer::Open);
        }
        for port in [22, 5432, 5432] {
            assert_eq!(lab.internet.connect(SocketAddr::new(address, port), SHORT), denied);
        }
        let after = fresh(&lab.hub);
        assert_eq!(count(&after, &allowed_80) - count(&before, &allowed_80), 5.0);
        assert_eq!(count(&after, &refused) - count(&before, &refused), 3.0);
        let others = |body: &str| {
            count(body, &[])
                - count(body, &[("service", "other"), ("family", "ipv4"), ("verdict", "allowed")])
        };
        assert_eq!(others(&after) - others(&before), 8.0, "nothing else was counted, scrapes apart");
        let dropped = |rule: &str| {
            let labels = [("rule", rule), ("family", family(address))];
            sum(&after, "dropped_packets_total", &labels) - sum(&before, "dropped_packets_total", &labels)
        };
        assert!(
            dropped("ssh") >= 1.0 && dropped("public-tcp") >= 2.0,
            "{} {}",
            dropped("ssh"),
            dropped("public-tcp")
        );
    }
    // Through the mesh: ssh is for the hub, 5432 for nobody.
    let before = fresh(&lab.hub);
    assert_eq!(lab.hub.connect(SocketAddr::new(SPOKE_MESH, 22), LONG), Answer::Open);
    assert_eq!(lab.hub.connect(SocketAddr::new(SPOKE_MESH, 5432), SHORT), denied);
    let after = fresh(&lab.hub);
    let refused = [("verdict", "denied")];
    assert_eq!(count(&after, &refused) - count(&before, &refused), 1.0);
}
