//! Policies for tests, built by hand so that they stand for what they say.

use std::net::IpAddr;
use std::time::Duration;

use ipnet::IpNet;

use crate::policy::*;
use crate::terms::{IfacePattern, Port};

pub(crate) const TODAY: jiff::civil::Date = jiff::civil::date(2026, 11, 21);

pub(crate) fn net(text: &str) -> IpNet {
    text.parse().expect("a prefix")
}

pub(crate) fn ip(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

pub(crate) fn port(number: u16) -> Port {
    Port::new(number).expect("a port")
}

fn ports(numbers: &[u16]) -> Vec<Port> {
    numbers.iter().map(|&n| port(n)).collect()
}

fn patterns(names: &[&str]) -> Vec<IfacePattern> {
    names.iter().map(|name| IfacePattern::new(name).expect("a pattern")).collect()
}

/// The contract's example: a WireGuard spoke, 80 and 443 public, ssh from the hub.
pub(crate) fn spoke() -> Policy {
    Policy {
        node: Node { name: "singapore".into(), role: Role::Spoke },
        mesh: Mesh {
            kind: MeshKind::Wireguard,
            interface: "wg0".into(),
            address: vec![ip("10.84.0.16")],
            prefix: vec![net("10.84.0.0/24")],
            keepalive: Some(Duration::from_secs(25)),
            handshake_max_age: Duration::from_secs(180),
            listen_port: None,
            tags: Vec::new(),
            tailscale_ssh: false,
            hub: Some(Hub {
                address: vec![ip("10.84.0.1")],
                public_key: None,
                endpoint: Some("203.0.113.47:51820".parse().expect("an endpoint")),
            }),
        },
        public: Public { tcp: ports(&[80, 443]), udp: Vec::new(), interfaces: None },
        ssh: Ssh { port: port(22), bind: Bind::Mesh, rebind: false, from: Sources::Hub },
        services: Vec::new(),
        locals: Vec::new(),
        exceptions: Vec::new(),
        files: Vec::new(),
        enforce: Enforce {
            mode: Mode::Enforce,
            firewall: true,
            binds: true,
            keepalive: true,
            confirm_within: Duration::from_secs(60),
            allow_no_admin_path: false,
        },
        metrics: Metrics { port: port(9984) },
        heartbeat: Heartbeat::default(),
    }
}

/// A hub: the tunnel's port is public, the admins are two peers.
pub(crate) fn hub() -> Policy {
    let mut policy = spoke();
    policy.node.role = Role::Hub;
    policy.mesh.address = vec![ip("10.84.0.1"), ip("fd84::1")];
    policy.mesh.prefix = vec![net("10.84.0.0/24"), net("fd84::/64")];
    policy.mesh.listen_port = Some(port(51820));
    policy.mesh.hub = None;
    policy.public.interfaces = Some(patterns(&["eth0", "ens*"]));
    policy.ssh.from = Sources::Prefixes(vec![net("10.84.0.7/32"), net("10.84.0.8/32"), net("fd84::7/128")]);
    policy
}

/// A Tailscale device that opens nothing to the public; the tailnet may ssh.
pub(crate) fn tailscale() -> Policy {
    let mut policy = spoke();
    policy.node.role = Role::Device;
    policy.mesh.kind = MeshKind::Tailscale;
    policy.mesh.interface = "tailscale0".into();
    policy.mesh.address = Vec::new();
    policy.mesh.prefix = vec![net("100.64.0.0/10"), net("fd7a:115c:a1e0::/48")];
    policy.mesh.hub = None;
    policy.mesh.keepalive = None;
    policy.public.tcp = Vec::new();
    policy.ssh.from = Sources::Mesh;
    policy
}

/// A spoke with a mesh service, a LAN and containers, a standing and an expired
/// exception, one for a list of sources, and its own tunnel port.
pub(crate) fn everything() -> Policy {
    let mut policy = spoke();
    policy.mesh.listen_port = Some(port(51821));
    policy.services = vec![MeshService {
        name: "netdata".into(),
        tcp: ports(&[19999]),
        udp: Vec::new(),
        from: Sources::Mesh,
    }];
    policy.locals = vec![
        Local { name: "lan".into(), interfaces: patterns(&["vmbr0"]), tcp: ports(&[53]), udp: ports(&[53]) },
        Local {
            name: "containers".into(),
            interfaces: patterns(&["docker*", "br-*"]),
            tcp: ports(&[5432, 6379]),
            udp: Vec::new(),
        },
    ];
    let exception = |name: &str, tcp: u16, from: &[&str], until| Exception {
        name: name.into(),
        tcp: ports(&[tcp]),
        udp: Vec::new(),
        from: from.iter().map(|text| net(text)).collect(),
        reason: "way in when the mesh is down".into(),
        owner: Some("ops".into()),
        until,
    };
    policy.exceptions = vec![
        exception("emergency-ssh", 2222, &["0.0.0.0/0", "::/0"], jiff::civil::date(2027, 1, 31)),
        exception("old", 3333, &["0.0.0.0/0"], jiff::civil::date(2026, 11, 20)),
        exception(
            "office",
            8443,
            &["192.0.2.0/25", "192.0.2.128/26", "198.51.100.9/32", "2001:db8:1::/48"],
            TODAY,
        ),
    ];
    policy
}
