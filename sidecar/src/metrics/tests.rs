use std::io::Write;
use std::net::IpAddr;
use std::process::{Command, Stdio};
use std::time::Duration;

use proptest::prelude::*;

use super::*;
use crate::desired::{Desired, Service};
use crate::diff::{Code, Proof, Severity};
use crate::heartbeat::{Outcome, Tally, Target};
use crate::observed::{AttemptKey, BindTally, CountedProto, Direction, TrafficKey};
use crate::policy::*;
use crate::ruleset::{Table, TableFamily};
use crate::terms::{Port, Scope};

fn address(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

fn service(name: &str, scope: Scope, proto: Proto, port: u16) -> Service {
    let from = (scope == Scope::Mesh).then(|| vec!["10.84.0.0/24".parse().expect("a prefix")]);
    let local = (scope == Scope::Other).then_some(0);
    Service {
        name: name.into(),
        proto,
        port: Port::new(port).expect("a port"),
        scope,
        local,
        from,
        exception: None,
    }
}

fn spoke_services() -> Vec<Service> {
    vec![
        service("http", Scope::Public, Proto::Tcp, 80),
        service("https", Scope::Public, Proto::Tcp, 443),
        service("ssh", Scope::Mesh, Proto::Tcp, 22),
        service("metrics", Scope::Mesh, Proto::Tcp, 9984),
    ]
}

fn exception(name: &str, until: jiff::civil::Date) -> Exception {
    Exception {
        name: name.into(),
        tcp: vec![Port::new(2222).expect("a port")],
        udp: Vec::new(),
        from: vec!["0.0.0.0/0".parse().expect("a prefix")],
        reason: "way in when the mesh is down".into(),
        owner: None,
        until,
    }
}

/// A spoke by default; the arguments are what the layout depends on.
fn desired(
    role: Role,
    kind: MeshKind,
    dual: bool,
    lan: bool,
    rules: usize,
    services: Vec<Service>,
) -> Desired {
    let key = PublicKey([7; 32]);
    let mut prefix = vec!["10.84.0.0/24".parse().expect("a prefix")];
    if dual {
        prefix.push("fd84::/64".parse().expect("a prefix"));
    }
    let local = Local { name: "lan".into(), interfaces: Vec::new(), tcp: Vec::new(), udp: Vec::new() };
    let policy = Policy {
        node: Node { name: "singapore".into(), role },
        mesh: Mesh {
            kind,
            interface: "wg0".into(),
            address: vec![address("10.84.0.16")],
            prefix,
            keepalive: Some(Duration::from_secs(25)),
            handshake_max_age: Duration::from_secs(180),
            listen_port: None,
            tags: Vec::new(),
            tailscale_ssh: false,
            hub: Some(Hub { address: vec![address("10.84.0.1")], public_key: Some(key), endpoint: None }),
        },
        public: Public { tcp: Vec::new(), udp: Vec::new(), interfaces: None },
        ssh: Ssh {
            port: Port::new(22).expect("a port"),
            bind: Bind::Mesh,
            rebind: false,
            from: Sources::Hub,
        },
        services: Vec::new(),
        locals: if lan { vec![local] } else { Vec::new() },
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
        metrics: Metrics { port: Port::new(9984).expect("a port") },
        heartbeat: Heartbeat::default(),
    };
    let table = Table {
        family: TableFamily::Inet,
        name: "spokeguard".into(),
        dormant: false,
        chains: Vec::new(),
        counters: drops(rules, 0),
        sets: Vec::new(),
    };
    Desired {
        policy,
        today: jiff::civil::date(2026, 1, 1),
        table: Some(table),
        guard: None,
        admin: None,
        services,
    }
}

fn spoke() -> Desired {
    let mut spoke = desired(Role::Spoke, MeshKind::Wireguard, false, false, 8, spoke_services());
    spoke.policy.exceptions = vec![exception("emergency-ssh", jiff::civil::date(2026, 1, 1))];
    spoke
}

fn drops(rules: usize, packets: u64) -> BTreeMap<String, Amount> {
    let mut out = BTreeMap::from([("accepted".to_owned(), Amount { packets: 99, bytes: 99 })]);
    for rule in 0..rules {
        for family in Family::ALL {
            out.insert(format!("drop-reason-{rule:02}-{family}"), Amount { packets, bytes: 0 });
        }
    }
    out
}

fn finding(code: Code, severity: Severity, accepted: bool) -> Finding {
    Finding {
        code,
        severity,
        subject: "tcp/0.0.0.0:5432".into(),
        wanted: "nothing".into(),
        found: "a listener".into(),
        by: None,
        since: None,
        accepted,
        next: "close it".into(),
        facet: Some(Facet::Listeners),
    }
}

fn peer(key: u8, age: Option<i64>, keepalive: u16) -> Peer {
    // The multiplier spreads the first bits, so that labels differ.
    let mut bytes = [key; 32];
    bytes[0] = key.wrapping_mul(37);
    Peer {
        public_key: if key == 7 { PublicKey([7; 32]) } else { PublicKey(bytes) },
        endpoint: None,
        keepalive,
        last_handshake: age.map(|age| Stamp::from_unix(1_000_000 - age)),
        rx_bytes: 0,
        tx_bytes: 0,
        allowed: Vec::new(),
    }
}

fn traffic(scope: Scope, family: Family, proto: CountedProto, class: Option<u16>) -> TrafficKey {
    TrafficKey { scope, direction: Direction::In, family, proto, class }
}

#[derive(Clone, Debug, Default)]
struct World {
    findings: Vec<Finding>,
    counters: Counters,
    drops: BTreeMap<String, Amount>,
    peers: Vec<Peer>,
    drift: BTreeMap<Facet, u64>,
    repairs: BTreeMap<(ActionKind, RepairOutcome), u64>,
    enforced: BTreeSet<Control>,
    blind: Vec<Facet>,
    audit: Option<Audit>,
    heartbeat: Tally,
}

impl World {
    fn state(&self) -> State<'_> {
        State {
            now: Stamp::from_unix(1_000_000),
            started: Stamp::from_unix(900_000),
            version: "0.1.0",
            abi: 1,
            node: "singa\"pore\\\n inf",
            role: Role::Spoke,
            mode: Mode::Enforce,
            policy_hash: "abcdef012345",
            verdict: Verdict::Drift,
            findings: &self.findings,
            blind: &self.blind,
            enforced: &self.enforced,
            drift: &self.drift,
            repairs: &self.repairs,
            counters: Some(&self.counters),
            drops: Some(&self.drops),
            binds: Some(BindTally { refused: 4, audited: 0, moved: 1 }),
            peers: Some(&self.peers),
            openings: 2,
            openings_end: Some(Stamp::from_unix(1_795_263_300)),
            on_trial: true,
            audit: self.audit.as_ref(),
            cycles: 12,
            cycle_seconds: 0.0031,
            resident_bytes: Some(4_200_000),
            http_rejects: 3,
            heartbeat: &self.heartbeat,
        }
    }

    fn busy() -> Self {
        let mut world = World {
            findings: vec![
                finding(Code::ListenerExposed, Severity::Critical, false),
                finding(Code::ListenerExposed, Severity::Critical, false),
                finding(Code::ExceptionOpen, Severity::Info, true),
            ],
            drops: drops(8, 5),
            peers: vec![peer(1, None, 0), peer(7, Some(12), 25)],
            drift: BTreeMap::from([(Facet::Nftables, 3)]),
            repairs: BTreeMap::from([((ActionKind::ApplyTable, RepairOutcome::Done), 3)]),
            enforced: BTreeSet::from([Control::Firewall]),
            blind: vec![Facet::Sshd],
            audit: Some(Audit {
                age: Duration::from_secs(1000),
                proof: Proof {
                    exposed: BTreeMap::from([((Family::Ipv6, Proto::Tcp), 2)]),
                    disagreements: BTreeMap::from([((Family::Ipv4, Proto::Udp), 3)]),
                    standing: Vec::new(),
                },
            }),
            ..World::default()
        };
        let amount = |packets| Amount { packets, bytes: packets * 100 };
        world.counters.memory_bytes = 65536;
        world.counters.traffic = BTreeMap::from([
            (traffic(Scope::Public, Family::Ipv4, CountedProto::Tcp, Some(1)), amount(7)),
            (traffic(Scope::Public, Family::Ipv4, CountedProto::Tcp, None), amount(2)),
            // sshd's port met on the public side is not the mesh's service.
            (traffic(Scope::Public, Family::Ipv4, CountedProto::Tcp, Some(2)), amount(30)),
            (traffic(Scope::Mesh, Family::Ipv4, CountedProto::Tcp, Some(2)), amount(11)),
            (traffic(Scope::Mesh, Family::Ipv6, CountedProto::Udp, None), amount(13)),
            (traffic(Scope::Public, Family::Ipv6, CountedProto::Icmp, None), amount(17)),
            (traffic(Scope::Public, Family::Ipv6, CountedProto::Other, Some(9999)), amount(1)),
        ]);
        world.counters.attempts = BTreeMap::from([
            (AttemptKey { class: Some(2), family: Family::Ipv4, allowed: false }, 40),
            (AttemptKey { class: None, family: Family::Ipv4, allowed: false }, 50),
            (AttemptKey { class: Some(0), family: Family::Ipv6, allowed: true }, 60),
        ]);
        world
    }
}

/// What the lines of a text say: series -> value.
fn samples(text: &str) -> BTreeMap<&str, &str> {
    let mut out = BTreeMap::new();
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        let (series, value) = line.rsplit_once(' ').expect("a sample");
        assert_eq!(out.insert(series, value), None, "{series} is there twice");
    }
    out
}

/// A rendering that other modules' tests can serve.
pub(crate) fn example() -> String {
    render(&World::busy().state(), &Layout::new(&spoke()))
}

#[test]
fn a_busy_spoke_is_told_series_by_series() {
    let text = example();
    let series = samples(&text);
    let packets = "spokeguard_packets_total";
    let public_in = "scope=\"public\",direction=\"in\"";
    let mesh_in = "scope=\"mesh\",direction=\"in\"";
    let cells = [
        (format!("{packets}{{{public_in},family=\"ipv4\",proto=\"tcp\",service=\"https\"}}"), "7"),
        (format!("{packets}{{{mesh_in},family=\"ipv4\",proto=\"tcp\",service=\"ssh\"}}"), "11"),
        (format!("{packets}{{{mesh_in},family=\"ipv6\",proto=\"any\",service=\"any\"}}"), "13"),
        (format!("{packets}{{{public_in},family=\"ipv6\",proto=\"other\",service=\"other\"}}"), "18"),
        (format!("{packets}{{{public_in},family=\"ipv6\",proto=\"tcp\",service=\"http\"}}"), "0"),
        (
            format!("spokeguard_bytes_total{{{public_in},family=\"ipv4\",proto=\"tcp\",service=\"other\"}}"),
            "3200",
        ),
    ];
    for (name, value) in &cells {
        assert_eq!(series.get(name.as_str()), Some(value), "{name} in\n{text}");
    }
    for (name, value) in [
        ("spokeguard_build_info{version=\"0.1.0\",abi=\"1\"}", "1"),
        ("spokeguard_verdict", "1"),
        ("spokeguard_start_time_seconds", "900000"),
        ("spokeguard_findings{code=\"listener-exposed\",severity=\"critical\"}", "2"),
        ("spokeguard_accepted_findings", "1"),
        ("spokeguard_exposed_info{proto=\"tcp\",port=\"5432\",process=\"unknown\"}", "1"),
        ("spokeguard_exception_expires_timestamp_seconds{exception=\"emergency-ssh\"}", "1767312000"),
        ("spokeguard_rules_on_trial", "1"),
        ("spokeguard_blind{facet=\"sshd\"}", "1"),
        ("spokeguard_blind{facet=\"nftables\"}", "0"),
        ("spokeguard_control_enforced{control=\"firewall\"}", "1"),
        ("spokeguard_control_enforced{control=\"binds\"}", "0"),
        ("spokeguard_drift_events_total{facet=\"nftables\"}", "3"),
        ("spokeguard_repairs_total{action=\"apply-table\",outcome=\"done\"}", "3"),
        ("spokeguard_repairs_total{action=\"set-keepalive\",outcome=\"withheld\"}", "0"),
        ("spokeguard_connection_attempts_total{service=\"ssh\",family=\"ipv4\",verdict=\"denied\"}", "40"),
        ("spokeguard_connection_attempts_total{service=\"other\",family=\"ipv4\",verdict=\"denied\"}", "50"),
        ("spokeguard_connection_attempts_total{service=\"http\",family=\"ipv6\",verdict=\"allowed\"}", "60"),
        ("spokeguard_dropped_packets_total{rule=\"reason-00\",family=\"ipv6\"}", "5"),
        ("spokeguard_wireguard_handshake_age_seconds{peer=\"hub\"}", "12.0"),
        ("spokeguard_wireguard_keepalive_seconds{peer=\"hub\"}", "25"),
        ("spokeguard_wireguard_handshake_age_seconds{peer=\"JQEBAQEB\"}", "+Inf"),
        ("spokeguard_audit_exposed_ports{family=\"ipv6\",proto=\"tcp\"}", "2"),
        ("spokeguard_audit_disagreements", "3"),
        ("spokeguard_audit_age_seconds", "1000"),
        ("spokeguard_cycle_seconds", "0.0031"),
        ("spokeguard_resident_memory_bytes", "4200000"),
        ("spokeguard_bpf_memory_bytes", "65536"),
        ("spokeguard_http_rejected_connections_total", "3"),
    ] {
        assert_eq!(series.get(name), Some(&value), "{name} in\n{text}");
    }
    // Every service of a plain spoke has series of its own; the scrapes themselves may go without.
    assert!(series.keys().any(|name| name.contains("service=\"ssh\"")));
    // Anyone may reach 80, so nobody is ever refused there; nor does the mesh have IPv6.
    assert!(!series.contains_key(
        "spokeguard_connection_attempts_total{service=\"http\",family=\"ipv4\",verdict=\"denied\"}"
    ));
    // What the policy declares is not counted among what it does not want.
    assert!(!text.contains("exception-open"));
    assert!(text.ends_with("# EOF\n") && !text.contains("scope=\"other\""));
    assert_eq!(series.len(), Exposition::new(&World::busy().state(), &Layout::new(&spoke())).series());
}

#[test]
fn every_series_of_traffic_is_there_before_the_first_packet() {
    let layout = Layout::new(&spoke());
    let idle = render(&World::default().state(), &layout);
    let mut world = World::busy();
    world.findings.clear();
    world.audit = None;
    world.peers.clear();
    let busy = render(&world.state(), &layout);
    assert_eq!(
        samples(&idle).into_keys().collect::<Vec<_>>(),
        samples(&busy).into_keys().collect::<Vec<_>>()
    );
}

#[test]
fn what_could_not_be_read_has_no_series() {
    let world = World::busy();
    let blind = State { counters: None, drops: None, peers: None, resident_bytes: None, ..world.state() };
    let text = render(&blind, &Layout::new(&spoke()));
    let series = samples(&text);
    for family in ["packets", "bytes", "connection", "dropped", "wireguard", "resident", "bpf"] {
        let prefix = format!("spokeguard_{family}_");
        assert!(!series.keys().any(|name| name.starts_with(&prefix)), "{family} in\n{text}");
    }
    assert!(series.contains_key("spokeguard_verdict"));
}

#[test]
fn the_hub_comes_first_and_a_crowd_of_peers_tells_its_worst() {
    let mut peers: Vec<Peer> = (1..=200).map(|n| peer(n, Some(i64::from(n)), 25)).collect();
    peers[150].keepalive = 0;
    let rows = peer_rows(&peers, Some(PublicKey([7; 32])), 12, Stamp::from_unix(1_000_000));
    assert_eq!(rows.len(), 12);
    assert_eq!(rows.get("hub"), Some(&PeerRow { age: 7.0, keepalive: 25 }));
    let crowd = rows.get("overflow").expect("the crowd");
    assert_eq!((crowd.age, crowd.keepalive), (200.0, 0));
    // As many as there are slots: nobody is folded. Without slots: nobody is told.
    let exact = peer_rows(&peers[..12], None, 12, Stamp::from_unix(1_000_000));
    assert!(exact.len() == 12 && !exact.contains_key("overflow"));
    assert!(peer_rows(&peers, None, 0, Stamp::from_unix(0)).is_empty());
}

#[test]
fn beyond_the_bound_the_worst_findings_keep_their_code() {
    let all: Vec<Code> = serde_json::from_value(serde_json::json!([
        "firewall-missing",
        "firewall-changed",
        "firewall-blocked",
        "listener-exposed",
        "listener-wide",
        "dnat-exposed",
        "ssh-bind",
        "ssh-unreachable",
        "ssh-password",
        "mesh-missing",
        "mesh-address",
        "mesh-keepalive",
        "mesh-handshake",
        "mesh-peer",
        "mesh-endpoint",
        "mesh-leak",
    ]))
    .expect("codes");
    let mut findings: Vec<Finding> = all.iter().map(|c| finding(*c, Severity::Low, false)).collect();
    findings.push(finding(Code::AuditExposed, Severity::Critical, false));
    let (folded, doors) = told(&findings);
    assert_eq!(folded.get(&("audit-exposed".into(), "critical".into())), Some(&1));
    assert_eq!(folded.get(&("other".into(), "low".into())), Some(&15));
    assert_eq!(folded.values().sum::<u64>(), 17);
    // Both are about the same port.
    assert_eq!((folded.len(), doors.len()), (3, 1));
}

#[test]
fn open_ports_and_findings_share_their_room() {
    let others: Vec<Code> = Code::ALL.into_iter().filter(|code| *code != Code::ListenerExposed).collect();
    for (others_told, open, expected) in
        [(0, 1, (1, 1)), (0, 20, (1, 7)), (4, 20, (5, 3)), (5, 2, (6, 2)), (5, 20, (2, 3)), (9, 0, (3, 0))]
    {
        let door = |n| Finding {
            subject: format!("tcp/0.0.0.0:{}", 1000 + n),
            ..finding(Code::ListenerExposed, Severity::Critical, false)
        };
        let mut findings: Vec<Finding> = (0..open).map(door).collect();
        findings.extend(others.iter().take(others_told).map(|code| finding(*code, Severity::Low, false)));
        let (folded, doors) = told(&findings);
        assert_eq!((folded.len(), doors.len()), expected, "{others_told} other kinds, {open} open");
        assert_eq!(folded.values().sum::<u64>(), findings.len() as u64);
        findings.reverse();
        assert_eq!(told(&findings), (folded, doors), "the order changes nothing");
    }
}

#[test]
fn the_exceptions_that_end_next_have_a_series() {
    let mut desired = spoke();
    let on = |day| jiff::civil::date(2026, 1, day);
    desired.today = on(5);
    let named =
        |desired: &Desired| -> Vec<(String, u64)> { Layout::new(desired).exceptions.into_iter().collect() };
    desired.policy.exceptions =
        [(1, 9), (2, 7), (3, 5), (4, 4)].map(|(n, day)| exception(&format!("e{n}"), on(day))).into();
    // The last second of a day is still in it; e4 is over.
    let day = |n: u64| 1_767_225_600 + n * 86_400;
    assert_eq!(named(&desired), [("e2".to_owned(), day(7)), ("e3".to_owned(), day(5))]);
    // One without an end has no series.
    desired.policy.exceptions = vec![exception("for-ever", jiff::civil::Date::MAX)];
    assert_eq!(named(&desired), []);
}

#[test]
fn a_table_with_many_drop_counters_folds_the_later_ones() {
    let layout = Layout::new(&desired(Role::Spoke, MeshKind::Wireguard, false, false, 12, spoke_services()));
    let mut world = World::busy();
    world.drops = drops(12, 5);
    // A counter that the policy's table does not have is not ours to tell.
    world.drops.insert("drop-foreign-ipv4".into(), Amount { packets: 1000, bytes: 0 });
    let text = render(&world.state(), &layout);
    let found = samples(&text);
    let dropped = |rule: &str| {
        found
            .get(format!("spokeguard_dropped_packets_total{{rule=\"{rule}\",family=\"ipv6\"}}").as_str())
            .copied()
    };
    assert_eq!((dropped("reason-07"), dropped("reason-08"), dropped("other")), (Some("5"), None, Some("20")));
    assert_eq!(found.keys().filter(|name| name.starts_with("spokeguard_dropped_")).count(), 18);
    assert!(!text.contains("foreign"));
}

/// What `promtool check metrics` says to a text: parses it, and lints it.
fn promtool(text: &str) -> (bool, String) {
    let mut child = Command::new("promtool")
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("promtool must be installed for this test (Debian: apt-get install prometheus)");
    child.stdin.take().expect("stdin").write_all(text.as_bytes()).expect("write to promtool");
    let out = child.wait_with_output().expect("promtool ends");
    let said = [out.stdout, out.stderr].concat();
    (out.status.success(), String::from_utf8_lossy(&said).into_owned())
}

#[test]
fn promtool_finds_nothing_wrong_with_the_older_text() {
    let layout = Layout::new(&spoke());
    for world in [World::busy(), World::default()] {
        let text = to_prometheus_text(&render(&world.state(), &layout));
        let (passed, said) = promtool(&text);
        assert!(passed && said.trim().is_empty(), "{said}\n{text}");
        assert!(!text.contains("EOF") && !text.contains("# UNIT"));
        assert!(text.contains("# TYPE spokeguard_repairs_total counter\n"));
        assert!(text.contains("# TYPE spokeguard_policy_info gauge\n"));
    }
    // The judge is awake: it refuses what is wrong.
    assert!(!promtool(&example()).0, "OpenMetrics passed as 0.0.4");
    let no_suffix = "# HELP spokeguard_x y\n# TYPE spokeguard_x counter\nspokeguard_x 1\n";
    assert!(!promtool(no_suffix).0, "a counter without _total passed");
}

#[test]
fn both_texts_hold_the_same_samples() {
    let openmetrics = example();
    let text = to_prometheus_text(&openmetrics);
    assert_eq!(samples(&openmetrics), samples(&text));
    // A name that ends like a value, with a line break in it, stays inside its label.
    assert!(text.contains("node=\"singa\\\"pore\\\\\\n inf\""), "{text}");
}

fn any_service() -> impl Strategy<Value = Service> {
    let name =
        prop_oneof!["[a-z]{1,6}", Just("other".to_owned()), Just("any".to_owned()), Just("ssh".to_owned())];
    (name, 0usize..3, any::<bool>(), 1u16.., any::<bool>()).prop_map(|(name, scope, tcp, port, open)| {
        let proto = if tcp { Proto::Tcp } else { Proto::Udp };
        let mut service = service(&name, Scope::ALL[scope], proto, port);
        service.from = if open { None } else { Some(Vec::new()) };
        service
    })
}

fn any_world() -> impl Strategy<Value = World> {
    let key = (0usize..3, 0usize..2, 0usize..2, 0usize..4, proptest::option::of(0u16..80));
    let codes = prop_oneof![
        Just(Code::FirewallMissing),
        Just(Code::FirewallChanged),
        Just(Code::FirewallBlocked),
        Just(Code::ListenerExposed),
        Just(Code::ListenerWide),
        Just(Code::SshBind),
        Just(Code::SshPassword),
        Just(Code::MeshMissing),
        Just(Code::MeshPeer),
        Just(Code::FileMode),
        Just(Code::MeshLeak),
    ];
    let severity = prop_oneof![
        Just(Severity::Critical),
        Just(Severity::High),
        Just(Severity::Medium),
        Just(Severity::Low),
        Just(Severity::Info),
    ];
    (
        proptest::collection::vec((key, 0u64..1 << 40), 0..200),
        proptest::collection::vec((codes, severity, any::<bool>(), 1u16..12), 0..80),
        proptest::collection::vec((any::<u8>(), proptest::option::of(0i64..10_000), any::<u16>()), 0..300),
        0usize..12,
    )
        .prop_map(|(counts, findings, peers, rules)| {
            let mut world = World { drops: drops(rules, 9), audit: World::busy().audit, ..World::default() };
            for ((scope, direction, family, proto, class), n) in counts {
                let key = TrafficKey {
                    scope: Scope::ALL[scope],
                    direction: Direction::ALL[direction],
                    family: Family::ALL[family],
                    proto: CountedProto::ALL[proto],
                    class,
                };
                world.counters.traffic.insert(key, Amount { packets: n, bytes: n });
                world
                    .counters
                    .attempts
                    .insert(AttemptKey { class, family: key.family, allowed: proto > 1 }, n);
            }
            world.findings = findings
                .into_iter()
                .map(|(code, severity, accepted, port)| Finding {
                    subject: format!("tcp/0.0.0.0:{port}"),
                    ..finding(code, severity, accepted)
                })
                .collect();
            world.peers = peers.into_iter().map(|(key, age, keepalive)| peer(key, age, keepalive)).collect();
            world
        })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, ..ProptestConfig::default() })]

    #[test]
    fn no_policy_and_no_traffic_makes_more_series_than_the_bound(
        services in proptest::collection::vec(any_service(), 0..80),
        hub in any::<bool>(), tailscale in any::<bool>(), dual in any::<bool>(), lan in any::<bool>(),
        rules in 0usize..12, exceptions in 0u8..9, tells in any::<bool>(),
        world in any_world(),
    ) {
        let role = if hub { Role::Hub } else { Role::Spoke };
        let kind = if tailscale { MeshKind::Tailscale } else { MeshKind::Wireguard };
        let mut desired = desired(role, kind, dual, lan, rules, services);
        let day = jiff::civil::date(2026, 1, 1);
        desired.policy.exceptions = (0..exceptions).map(|n| exception(&format!("e{n}"), day)).collect();
        let mut world = world;
        if tells {
            (desired.policy.heartbeat, world.heartbeat) = telling();
        }
        let layout = Layout::new(&desired);
        prop_assert!(layout.series_max() <= SERIES_MAX);
        prop_assert_eq!(layout.exceptions.is_empty(), desired.policy.exceptions.is_empty());
        let text = render(&world.state(), &layout);
        let found = samples(&text);
        prop_assert!(found.len() <= layout.series_max(), "{} of {}", found.len(), layout.series_max());

        // The families are always the same ones.
        let names = |text: &str| -> Vec<String> {
            text.lines().filter(|line| line.starts_with("# TYPE")).map(str::to_owned).collect()
        };
        prop_assert_eq!(names(&text), names(&example()));

        // Folding loses nothing: in a scope that the policy can have, all counts are told.
        let total: u128 = found.iter()
            .filter(|(name, _)| name.starts_with("spokeguard_packets_total{scope=\"public\""))
            .map(|(_, value)| value.parse::<u128>().expect("a number"))
            .sum();
        let counted: u128 = world.counters.traffic.iter()
            .filter(|(key, _)| key.scope == Scope::Public)
            .map(|(_, amount)| u128::from(amount.packets))
            .sum();
        prop_assert_eq!(total, counted);
    }
}

/// A policy that tells the hub everything, and what came of it.
fn telling() -> (Heartbeat, Tally) {
    let policy = Heartbeat {
        kuma_url_file: Some("kuma-url".into()),
        ntfy_url_file: Some("ntfy-url".into()),
        ..Heartbeat::default()
    };
    let tally = Tally {
        told: Target::ALL.to_vec(),
        sent: BTreeMap::from([
            ((Target::Kuma, Outcome::Accepted), 40),
            ((Target::Ntfy, Outcome::Unreachable), 2),
        ]),
        age: Some(Duration::from_secs(12)),
        queue: 3,
        dropped: 1,
        certificate_ends: Some(1_800_000_000),
    };
    (policy, tally)
}

#[test]
fn heartbeats_are_told_where_the_policy_has_them_and_nowhere_else() {
    let silent = example();
    assert!(!samples(&silent).keys().any(|name| name.contains("heartbeat")), "{silent}");
    let mut spoke = spoke();
    let before = Layout::new(&spoke).series_max();
    let (policy, heartbeat) = telling();
    spoke.policy.heartbeat = policy;
    let world = World { heartbeat, ..World::busy() };
    let layout = Layout::new(&spoke);
    assert!(layout.series_max() <= SERIES_MAX && before <= SERIES_MAX);
    let text = render(&world.state(), &layout);
    let series = samples(&text);
    for (name, value) in [
        ("spokeguard_heartbeat_total{target=\"kuma\",outcome=\"accepted\"}", "40"),
        ("spokeguard_heartbeat_total{target=\"kuma\",outcome=\"refused\"}", "0"),
        ("spokeguard_heartbeat_total{target=\"ntfy\",outcome=\"unreachable\"}", "2"),
        ("spokeguard_heartbeat_age_seconds", "12"),
        ("spokeguard_heartbeat_queue", "3"),
        ("spokeguard_heartbeat_dropped_total", "1"),
        ("spokeguard_certificate_expires_timestamp_seconds", "1800000000"),
    ] {
        assert_eq!(series.get(name), Some(&value), "{name} in\n{text}");
    }
    assert_eq!(series.keys().filter(|name| name.contains("heartbeat")).count(), 9);
}

#[test]
fn services_are_named_in_the_order_of_the_policy() {
    let many: Vec<Service> =
        (0u16..64).map(|n| service(&format!("s{n:02}"), Scope::Public, Proto::Tcp, 1000 + n)).collect();
    let layout = Layout::new(&desired(Role::Hub, MeshKind::Wireguard, false, false, 4, many.clone()));
    let cells = layout.traffic();
    let named: BTreeSet<&str> =
        cells.keys().map(|cell| cell.service).filter(|s| s.starts_with('s')).collect();
    assert!(named.contains("s00") && named.contains("s01") && !named.contains("s40"), "{named:?}");
    let first: BTreeSet<String> = (0..named.len()).map(|n| format!("s{n:02}")).collect();
    assert_eq!(named, first.iter().map(String::as_str).collect());
    // The same policy gives the same series.
    assert_eq!(layout, Layout::new(&desired(Role::Hub, MeshKind::Wireguard, false, false, 4, many)));
}
