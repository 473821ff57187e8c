//! First packets of flows, as they arrive at the spoke's three interfaces.

use std::net::{IpAddr, SocketAddr};

use lab::{Lab, Node};
use rustix::net::{AddressFamily, SendFlags, SocketFlags, SocketType, ipproto, sendto, socket_with};
use spokeguard::ruleset::Packet;
use spokeguard::terms::{Port, Proto};

use crate::guard::Dice;

pub const PORTS: [u16; 14] = [1, 22, 53, 80, 81, 443, 2222, 5432, 8080, 8085, 8443, 9984, 19999, 65535];

/// (interface, sources, destinations), of one address family each; what is most worth asking is named twice.
type Way = (&'static str, &'static [&'static str], &'static [&'static str]);

const WAYS: &[Way] = &[
    (
        "eth0",
        &["198.51.100.99", "198.51.100.98", "192.0.2.1", "192.0.2.130", "203.0.113.9", "10.84.0.99"],
        &[
            "198.51.100.7",
            "198.51.100.7",
            "198.51.100.7",
            "10.84.0.16",
            "172.17.0.2",
            "10.84.0.1",
            "203.0.113.77",
        ],
    ),
    (
        "eth0",
        &["2001:db8:1::99", "2001:db8:1::98", "2001:db8:9::9", "fd84::99"],
        &["2001:db8:1::7", "2001:db8:1::7", "2001:db8:1::7", "fd84::16", "fd00:17::2", "fd84::1"],
    ),
    ("wg0", &["10.84.0.1", "10.84.0.99"], &["10.84.0.16", "10.84.0.16", "198.51.100.7", "172.17.0.2"]),
    ("wg0", &["fd84::1", "fd84::99"], &["fd84::16", "fd84::16", "fd00:17::2"]),
    ("docker0", &["172.17.0.2"], &["172.17.0.1", "198.51.100.7", "10.84.0.16", "10.84.0.1", "203.0.113.47"]),
    ("docker0", &["fd00:17::2"], &["fd00:17::1", "2001:db8:1::7", "fd84::1"]),
];

/// What a prefix of the mesh sends when it is not the mesh.
pub fn is_spoofed(packet: &Packet) -> bool {
    let text = packet.source.to_string();
    packet.iifname == "eth0" && (text.starts_with("10.84.") || text.starts_with("fd84:"))
}

/// Each with a source port of its own, from `first` on, by which it is known again.
pub fn some(dice: &mut Dice, count: u16, first: u16) -> Vec<Packet> {
    let port = |number: u16| Port::new(number).expect("not 0");
    (0..count)
        .map(|n| {
            // Half of them are strangers.
            let (interface, sources, destinations) =
                if dice.below(2) == 0 { *dice.pick(&WAYS[..2]) } else { *dice.pick(WAYS) };
            let ip = |text: &&str| text.parse::<IpAddr>().expect("an address");
            Packet {
                iifname: interface.into(),
                source: ip(dice.pick(sources)),
                destination: ip(dice.pick(destinations)),
                proto: if dice.below(3) == 0 { Proto::Udp } else { Proto::Tcp },
                source_port: port(first + n),
                port: port(*dice.pick(&PORTS)),
            }
        })
        .collect()
}

/// The datagram that it is, with right checksums: connection tracking looks at them.
pub fn datagram(packet: &Packet) -> Vec<u8> {
    let Packet { source, destination, proto, source_port, port, .. } = packet;
    let ports = [source_port.get().to_be_bytes(), port.get().to_be_bytes()].concat();
    let (mut segment, at) = match proto {
        // A plain SYN, as the evaluator takes it to be.
        Proto::Tcp => {
            ([&ports[..], &[0, 0, 0, 1, 0, 0, 0, 0, 0x50, 0x02, 0xff, 0xff, 0, 0, 0, 0]].concat(), 16)
        }
        Proto::Udp => ([&ports[..], &[0, 12, 0, 0], b"ask?"].concat(), 6),
    };
    let length = segment.len() as u16;
    let addresses = match (source, destination) {
        (IpAddr::V4(from), IpAddr::V4(to)) => [from.octets(), to.octets()].concat(),
        (IpAddr::V6(from), IpAddr::V6(to)) => [from.octets(), to.octets()].concat(),
        _ => panic!("two families"),
    };
    let pseudo = [&length.to_be_bytes()[..], &[0, proto.number()]].concat();
    let sum = checksum(&[&addresses, &pseudo, &segment]);
    segment[at..at + 2].copy_from_slice(&sum.to_be_bytes());
    let head = match source {
        IpAddr::V4(_) => {
            let total = (20 + length).to_be_bytes();
            let mut head = vec![0x45, 0, total[0], total[1], 0, 7, 0x40, 0, 64, proto.number(), 0, 0];
            head.extend(&addresses);
            let sum = checksum(&[&head]);
            head[10..12].copy_from_slice(&sum.to_be_bytes());
            head
        }
        IpAddr::V6(_) => {
            let length = length.to_be_bytes();
            [&[0x60, 0, 0, 0, length[0], length[1], proto.number(), 64], &addresses[..]].concat()
        }
    };
    [head, segment].concat()
}

/// Of parts whose lengths are even.
fn checksum(parts: &[&[u8]]) -> u16 {
    let words = parts.iter().flat_map(|part| part.chunks(2));
    let mut sum: u32 = words.map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

pub fn mac(node: &Node, interface: &str) -> String {
    let text = node.ok(&["ip", "-br", "link", "show", interface]).expect("a link");
    text.split_whitespace().find(|word| word.matches(':').count() == 5).expect("an address").to_owned()
}

/// Ways to the spoke that need no neighbour discovery (rules may drop it), with no answer to what it replies,
/// and a spoke that takes whatever source comes.
pub fn prepare(lab: &Lab) {
    let container = lab.container.as_ref().expect("a lab with a container");
    let spoke = |interface| mac(&lab.spoke, interface);
    for (node, interface, mac, neighbours) in [
        (&lab.internet, "spoke0", spoke("eth0"), ["198.51.100.7", "2001:db8:1::7"]),
        (&lab.hub, "wg0", spoke("wg0"), ["10.84.0.16", "fd84::16"]),
        (container, "eth0", spoke("docker0"), ["172.17.0.1", "fd00:17::1"]),
    ] {
        for neighbour in neighbours {
            node.ok(&[
                "ip",
                "neigh",
                "replace",
                neighbour,
                "lladdr",
                &mac,
                "dev",
                interface,
                "nud",
                "permanent",
            ])
            .expect("a neighbour");
        }
        node.nft(
            "table inet mute {\n chain in { type filter hook prerouting priority -400; policy drop; }\n\
             chain out { type filter hook output priority 400; meta l4proto { tcp, udp } accept; drop; }\n}\n",
        )
        .expect("silence");
    }
    let internet = "ip route add 10.84.0.0/24 via 198.51.100.7; ip route add 172.17.0.0/16 via 198.51.100.7
        ip route add 203.0.113.77 via 198.51.100.7
        ip route add fd84::/64 via 2001:db8:1::7; ip route add fd00:17::/64 via 2001:db8:1::7";
    lab.internet.sh(internet).expect("routes");
    let hub = "ip route add 198.51.100.7 via 10.84.0.16; ip route add 172.17.0.0/16 via 10.84.0.16
        ip route add fd00:17::/64 via fd84::16";
    lab.hub.sh(hub).expect("routes");
    // Flows are forgotten soon, since source ports come again.
    let spoke = "for each in /proc/sys/net/ipv4/conf/*/rp_filter; do echo 0 > $each; done
        cd /proc/sys/net/netfilter
        echo 1 > nf_conntrack_tcp_timeout_syn_sent; echo 1 > nf_conntrack_tcp_timeout_close
        echo 1 > nf_conntrack_udp_timeout; echo 1 > nf_conntrack_tcp_timeout_syn_recv";
    lab.spoke.sh(spoke).expect("settings");
}

/// Puts them on the wire, in order: one CPU, so one queue.
pub fn send(lab: &Lab, packets: &[Packet]) {
    let container = lab.container.as_ref().expect("a lab with a container");
    for (interface, node) in [("wg0", &lab.hub), ("docker0", container), ("eth0", &lab.internet)] {
        let mine: Vec<&Packet> = packets.iter().filter(|packet| packet.iifname == interface).collect();
        node.inside(|| {
            let allowed = rustix::thread::sched_getaffinity(None)?;
            let mut first = rustix::thread::CpuSet::new();
            first.set((0..rustix::thread::CpuSet::MAX_CPU).find(|cpu| allowed.is_set(*cpu)).unwrap_or(0));
            rustix::thread::sched_setaffinity(None, &first)?;
            let raw = |family| socket_with(family, SocketType::RAW, SocketFlags::CLOEXEC, Some(ipproto::RAW));
            let sockets = [raw(AddressFamily::INET)?, raw(AddressFamily::INET6)?];
            for packet in mine {
                let socket = &sockets[usize::from(packet.source.is_ipv6())];
                let to = SocketAddr::new(packet.destination, 0);
                sendto(socket, &datagram(packet), SendFlags::empty(), &to)?;
            }
            Ok(())
        })
        .unwrap_or_else(|error| panic!("send by {interface}: {error:#}"));
    }
}
