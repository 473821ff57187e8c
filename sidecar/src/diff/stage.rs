//! A host for tests: by default one that is exactly as its policy says, so that every
//! finding comes from what a test changed.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use ipnet::IpNet;

use super::{Assessment, assess};
use crate::desired::Desired;
use crate::observed::*;
use crate::policy::*;
use crate::ruleset::{
    Base, Chain, Hook, Match, Nat, Op, Operand, Rule, Ruleset, Statement, Table, TableFamily, Term,
};
use crate::terms::{Actor, IfacePattern, Port, Proto, PublicKey, Stamp};

pub(crate) const NOW: i64 = 1_795_249_623;
pub(crate) const HUB_KEY: PublicKey = PublicKey([7; 32]);

pub(crate) fn now() -> Stamp {
    Stamp::from_unix(NOW)
}

pub(crate) fn port(number: u16) -> Port {
    Port::new(number).expect("a port")
}

pub(crate) fn net(text: &str) -> IpNet {
    text.parse().expect("a prefix")
}

pub(crate) fn ip(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

pub(crate) struct Stage {
    pub policy: Policy,
    pub snapshot: Snapshot,
    /// Tables beside ours.
    pub foreign: Vec<Table>,
    /// Makes of the desired table what is found in the kernel.
    pub ours: fn(Table) -> Option<Table>,
    pub nftables_gap: Option<Gap>,
}

impl Stage {
    /// A spoke with IPv4 and IPv6 outside and inside: web public, ssh and netdata in the mesh.
    pub fn spoke() -> Self {
        let listeners = [
            "tcp 0.0.0.0:443 nginx",
            "tcp [::]:80 nginx",
            "tcp 10.84.0.16:22 sshd",
            "tcp [fd84::16]:22 sshd",
        ];
        Self {
            policy: policy(),
            snapshot: Snapshot {
                at: now(),
                nftables: Reading::Seen(Ruleset::default()),
                listeners: Reading::Seen(listeners.map(listener).to_vec()),
                links: Reading::Seen(vec![
                    link(1, "lo", &["127.0.0.1/8", "::1/128"]),
                    link(2, "eth0", &["203.0.113.7/24", "2001:db8:7::7/64", "fe80::7/64"]),
                    link(3, "wg0", &["10.84.0.16/24", "fd84::16/64"]),
                ]),
                wireguard: Reading::Seen(Some(Device {
                    name: "wg0".into(),
                    backend: Backend::Kernel,
                    public_key: Some(PublicKey([1; 32])),
                    listen_port: 40_021,
                    peers: vec![peer(HUB_KEY, &["10.84.0.0/24", "fd84::/64"])],
                })),
                tailscale: Reading::Seen(None),
                sshd: Reading::Seen(Some(Sshd {
                    password_authentication: false,
                    keyboard_interactive: false,
                    permit_root_login: "prohibit-password".into(),
                    listen: vec!["10.84.0.16:22".parse().expect("an address")],
                })),
                files: Reading::Seen(Vec::new()),
                counters: Reading::Seen(Counters::default()),
                binds: Reading::Seen(Binds::default()),
                guard: Guard::There { rules: GuardState::Declared, attached: vec!["eth0".into()] },
                audit: None,
            },
            foreign: Vec::new(),
            ours: Some,
            nftables_gap: None,
        }
    }

    pub fn policy(mut self, change: impl FnOnce(&mut Policy)) -> Self {
        change(&mut self.policy);
        self
    }

    /// "tcp 0.0.0.0:5432 postgres", with what [`listener`] understands.
    pub fn listens(mut self, text: &str) -> Self {
        self.listeners().push(listener(text));
        self
    }

    pub fn listeners(&mut self) -> &mut Vec<Listener> {
        match &mut self.snapshot.listeners {
            Reading::Seen(list) => list,
            Reading::Blind(_) => panic!("blind"),
        }
    }

    pub fn links(mut self, change: impl FnOnce(&mut Vec<Link>)) -> Self {
        match &mut self.snapshot.links {
            Reading::Seen(list) => change(list),
            Reading::Blind(_) => panic!("blind"),
        }
        self
    }

    pub fn device(mut self, change: impl FnOnce(&mut Device)) -> Self {
        match &mut self.snapshot.wireguard {
            Reading::Seen(Some(device)) => change(device),
            _ => panic!("no device"),
        }
        self
    }

    pub fn without_our_table(mut self) -> Self {
        self.ours = |_| None;
        self
    }

    pub fn foreign(mut self, table: Table) -> Self {
        self.foreign.push(table);
        self
    }

    pub fn blind(mut self, facet: Facet) -> Self {
        let reason = "needs CAP_NET_ADMIN: run as root";
        match facet {
            Facet::Nftables => self.nftables_gap = Some(Gap::new(reason)),
            Facet::Listeners => self.snapshot.listeners = Reading::blind(reason),
            Facet::Links => self.snapshot.links = Reading::blind(reason),
            Facet::Wireguard => self.snapshot.wireguard = Reading::blind(reason),
            Facet::Tailscale => self.snapshot.tailscale = Reading::blind(reason),
            Facet::Sshd => self.snapshot.sshd = Reading::blind(reason),
            Facet::Files => self.snapshot.files = Reading::blind(reason),
            Facet::Counters => self.snapshot.counters = Reading::blind(reason),
            Facet::Binds => self.snapshot.binds = Reading::blind(reason),
            Facet::Audit => self.snapshot.audit = Some(Reading::blind(reason)),
        }
        self
    }

    /// Every port of an address through eth0 was asked from outside: what the listed ones
    /// met, and what all others did.
    pub fn probed(mut self, proto: Proto, address: &str, listed: &[(u16, Fate)], others: Fate) -> Self {
        let address = ip(address);
        let listed: BTreeMap<u16, &Fate> = listed.iter().map(|(n, fate)| (*n, fate)).collect();
        let met = |number| (*listed.get(&number).unwrap_or(&&others)).clone();
        let sweep = Sweep {
            interface: "eth0".into(),
            address,
            proto,
            source: ip(if address.is_ipv4() { "73.9.1.4" } else { "2600:1::1d" }),
            fates: (1..=u16::MAX).map(|number| (port(number), met(number))).collect(),
            unproven: Vec::new(),
        };
        let mut probed = match self.snapshot.audit.take() {
            Some(Reading::Seen(probed)) => probed,
            _ => Probed::default(),
        };
        probed.update(&[Runs::of(&sweep)], &[]);
        self.snapshot.audit = Some(Reading::Seen(probed));
        self
    }

    /// Asks again wherever a look left something in doubt, and meets the same.
    pub fn asked_again(mut self) -> Self {
        let again = |stage: Stage| -> (Stage, Vec<Dispute>) {
            let Stage { policy, snapshot, foreign, ours, nftables_gap } = stage;
            let same = Stage {
                policy: policy.clone(),
                snapshot: snapshot.clone(),
                foreign: foreign.clone(),
                ours,
                nftables_gap: nftables_gap.clone(),
            };
            (Stage { policy, snapshot, foreign, ours, nftables_gap }, same.assess().disputed)
        };
        let (stage, disputed) = again(self);
        self = stage;
        if let Some(Reading::Seen(probed)) = &mut self.snapshot.audit {
            probed.update(&[], &disputed);
        }
        self
    }

    pub fn set(self) -> (Desired, Snapshot) {
        let today = now().0.to_zoned(jiff::tz::TimeZone::UTC).date();
        let desired = Desired::new(self.policy, today).expect("an admin path");
        let ours = desired.table.clone().and_then(self.ours);
        let tables = ours.into_iter().chain(self.foreign).collect();
        let nftables = self.nftables_gap.map_or(Reading::Seen(Ruleset { tables }), Reading::Blind);
        (desired, Snapshot { nftables, ..self.snapshot })
    }

    pub fn assess(self) -> Assessment {
        let (desired, snapshot) = self.set();
        assess(&desired, &snapshot, now())
    }

    /// A line for each finding, and for each doubt.
    pub fn show(self) -> String {
        let Assessment { findings, doubts, .. } = self.assess();
        let mut text = String::new();
        for f in findings {
            let by = f.by.map(|actor| format!(" [{}]", actor.process)).unwrap_or_default();
            text += &format!("{} {} {}{by}\n", f.severity.name(), f.code, f.subject);
            text += &format!("    wanted {}\n    found {}\n", f.wanted, f.found);
        }
        for (facet, doubt) in doubts {
            text += &format!("doubt {facet}: {doubt}\n");
        }
        text
    }

    /// "critical listener-exposed tcp/0.0.0.0:5432" and so on: for tests of one thing.
    pub fn codes(self) -> Vec<String> {
        let findings = self.assess().findings;
        findings.iter().map(|f| format!("{} {} {}", f.severity.name(), f.code, f.subject)).collect()
    }
}

fn policy() -> Policy {
    Policy {
        node: Node { name: "singapore".into(), role: Role::Spoke },
        mesh: Mesh {
            kind: MeshKind::Wireguard,
            interface: "wg0".into(),
            address: vec![ip("10.84.0.16"), ip("fd84::16")],
            prefix: vec![net("10.84.0.0/24"), net("fd84::/64")],
            keepalive: Some(Duration::from_secs(25)),
            handshake_max_age: Duration::from_secs(180),
            listen_port: None,
            tags: Vec::new(),
            tailscale_ssh: false,
            hub: Some(crate::policy::Hub {
                address: vec![ip("10.84.0.1"), ip("fd84::1")],
                public_key: Some(HUB_KEY),
                endpoint: Some("203.0.113.47:51820".parse().expect("an endpoint")),
            }),
        },
        public: Public { tcp: vec![port(80), port(443)], udp: Vec::new(), interfaces: None },
        ssh: Ssh { port: port(22), bind: Bind::Mesh, rebind: false, from: Sources::Hub },
        services: vec![MeshService {
            name: "netdata".into(),
            tcp: vec![port(19_999)],
            udp: Vec::new(),
            from: Sources::Mesh,
        }],
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

pub(crate) fn exception(number: u16, until: jiff::civil::Date) -> Exception {
    Exception {
        name: "emergency-ssh".into(),
        tcp: vec![port(number)],
        udp: Vec::new(),
        from: vec![net("0.0.0.0/0"), net("::/0")],
        reason: "way in when the mesh is down".into(),
        owner: Some("ops".into()),
        until,
    }
}

pub(crate) fn lan(interface: &str, tcp: u16) -> Local {
    let interfaces = vec![IfacePattern::new(interface).expect("a pattern")];
    Local { name: "lan".into(), interfaces, tcp: vec![port(tcp)], udp: Vec::new() }
}

pub(crate) fn peer(public_key: PublicKey, allowed: &[&str]) -> Peer {
    Peer {
        public_key,
        endpoint: Some("203.0.113.47:51820".parse().expect("an endpoint")),
        keepalive: 25,
        last_handshake: Some(Stamp::from_unix(NOW - 60)),
        rx_bytes: 1,
        tx_bytes: 1,
        allowed: allowed.iter().map(|text| net(text)).collect(),
    }
}

pub(crate) fn link(index: u32, name: &str, addresses: &[&str]) -> Link {
    Link {
        index,
        name: name.into(),
        up: true,
        ethernet: name != "lo" && name != "wg0",
        loopback: name == "lo",
        master: None,
        addresses: addresses.iter().map(|text| net(text)).collect(),
    }
}

/// "PROTO ADDRESS:PORT PROCESS [v6only] [uid=N] [dev=INDEX]".
pub(crate) fn listener(text: &str) -> Listener {
    let words: Vec<&str> = text.split(' ').collect();
    let at: SocketAddr = words[1].parse().expect("an address and a port");
    let option = |key: &str| words.iter().find_map(|w| w.strip_prefix(key)?.parse::<u32>().ok());
    Listener {
        proto: if words[0] == "udp" { Proto::Udp } else { Proto::Tcp },
        address: at.ip(),
        port: port(at.port()),
        v6only: words.contains(&"v6only"),
        device: option("dev="),
        inode: 1,
        uid: option("uid=").unwrap_or(0),
        owner: (words[2] != "-").then(|| Actor {
            pid: 812,
            process: words[2].into(),
            unit: None,
            user: None,
        }),
    }
}

/// A table with one base chain.
pub(crate) fn table(family: TableFamily, name: &str, chain: Chain) -> Table {
    Table {
        family,
        name: name.into(),
        dormant: false,
        chains: vec![chain],
        counters: Default::default(),
        sets: Vec::new(),
    }
}

pub(crate) fn chain(hook: Hook, priority: i32, drops: bool, rules: Vec<Vec<Statement>>) -> Chain {
    let kind = if hook == Hook::Prerouting { "nat" } else { "filter" };
    Chain {
        name: format!("{hook:?}").to_lowercase(),
        base: Some(Base { kind: kind.into(), hook, priority, drops, devices: Vec::new() }),
        rules: rules
            .into_iter()
            .map(|statements| Rule { comment: None, handle: Some(9), statements })
            .collect(),
    }
}

pub(crate) fn dport(number: u64) -> Statement {
    matches(Term::Payload { protocol: "tcp".into(), field: "dport".into() }, Operand::Number(number))
}

pub(crate) fn iifname(name: &str) -> Statement {
    matches(Term::Meta("iifname".into()), Operand::Text(name.into()))
}

fn matches(left: Term, right: Operand) -> Statement {
    Statement::Match(Match { left, op: Op::Eq, right })
}

pub(crate) fn dnat(to: &str, number: u64) -> Statement {
    Statement::Dnat(Nat { address: Some(Operand::Address(ip(to))), port: Some(Operand::Number(number)) })
}

/// Drops tcp to this port in its own table at priority 5, as another firewall would.
pub(crate) fn drops(family: TableFamily, number: u64) -> Table {
    table(family, "other", chain(Hook::Input, 5, false, vec![vec![dport(number), Statement::Drop]]))
}

/// What Docker writes when a container publishes a port.
pub(crate) fn publishes(number: u64) -> Table {
    table(
        TableFamily::Ip,
        "nat",
        chain(Hook::Prerouting, -100, false, vec![vec![dport(number), dnat("172.17.0.2", number)]]),
    )
}
