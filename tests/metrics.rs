//! What the hub scrapes: from where, in which form, and whether it is true.

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use lab::{
    Answer, Http, Lab, Need, Node, SPOKE_MESH, SPOKE_MESH_V6, SPOKE_PUBLIC, SPOKE_PUBLIC_V6, lacking,
    wait_until,
};

use crate::daemon::{LONG, SHORT, UNGUARDED, plain_policy};

pub const PORT: u16 = 9984;
const OPENMETRICS: (&str, &str) = ("Accept", "application/openmetrics-text; version=1.0.0");

pub fn scrape(hub: &Node) -> String {
    let answer = hub.http_get(SocketAddr::new(SPOKE_MESH, PORT), "/metrics", &[]).unwrap();
    assert_eq!(answer.status, 200, "{}", answer.body);
    answer.body
}

/// The same, of this very moment: a text younger than 250 ms is served once more.
pub fn fresh(hub: &Node) -> String {
    crate::daemon::over(Duration::from_millis(260));
    scrape(hub)
}

/// The sum of all series of a name (without prefix) that have these labels.
pub fn sum(body: &str, name: &str, labels: &[(&str, &str)]) -> f64 {
    samples(body)
        .filter(|(series, _)| {
            let (found, rest) = series.split_once('{').unwrap_or((series, ""));
            found.strip_prefix("spokeguard_") == Some(name)
                && labels.iter().all(|(key, value)| rest.contains(&format!("{key}=\"{value}\"")))
        })
        .map(|(_, value)| value)
        .sum()
}

fn samples(body: &str) -> impl Iterator<Item = (&str, f64)> {
    let lines = body.lines().filter(|line| !line.starts_with('#') && !line.is_empty());
    lines.map(|line| {
        let (series, value) = line.rsplit_once(' ').unwrap_or_else(|| panic!("no value in {line}"));
        (series, value.parse().unwrap_or_else(|_| panic!("no number in {line}")))
    })
}

fn promtool(text: &str) {
    let mut child = Command::new("promtool")
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let said = [output.stdout, output.stderr].concat();
    assert!(output.status.success() && said.is_empty(), "{}", String::from_utf8_lossy(&said));
}

#[test]
fn metrics_are_for_the_hub_on_the_mesh_and_for_nobody_else() {
    if lacking(&[Need::Lab, Need::Spokeguard]) {
        return;
    }
    let lab = Lab::plain();
    // Another member of the mesh: a second address of the far end of wg0.
    let member: IpAddr = Ipv4Addr::new(10, 84, 0, 77).into();
    lab.hub.sh(&format!("ip addr add {member}/32 dev wg0")).unwrap();
    let _daemon = lab.spoke.daemon(&lab.policy()).unwrap();
    assert!(scrape(&lab.hub).contains("spokeguard_verdict"));
    // The policy names the hub by its IPv4 address only: its other one is another member's.
    assert_eq!(lab.hub.connect(SocketAddr::new(SPOKE_MESH_V6, PORT), SHORT), Answer::Silent);
    let health = lab.hub.http_get(SocketAddr::new(SPOKE_MESH, PORT), "/healthz", &[]).unwrap();
    assert_eq!((health.status, health.body.as_str()), (200, "ok\n"));
    assert_eq!(lab.hub.http_get(SocketAddr::new(SPOKE_MESH, PORT), "/", &[]).unwrap().status, 404);

    for address in [SPOKE_PUBLIC, SPOKE_PUBLIC_V6] {
        let stranger = lab.internet.connect(SocketAddr::new(address, PORT), SHORT);
        assert_eq!(stranger, Answer::Silent, "{address}");
        assert_ne!(
            lab.spoke.connect(SocketAddr::new(address, PORT), SHORT),
            Answer::Open,
            "not bound there at all"
        );
    }
    assert_ne!(lab.spoke.connect(SocketAddr::new(Ipv4Addr::LOCALHOST.into(), PORT), SHORT), Answer::Open);
    // The firewall refuses the other member, and so does the daemon where nobody else does.
    assert_eq!(from(&lab.hub, member, SocketAddr::new(SPOKE_MESH, PORT)), None);
    lab.spoke.nft("add table inet hole { chain in { type filter hook input priority -300; }; }").unwrap();
    let audit = lab.policy() + "[enforce]\nmode = \"audit\"\n";
    drop(_daemon);
    let _daemon = lab.spoke.daemon(&audit).unwrap();
    let before = sum(&scrape(&lab.hub), "http_rejected_connections_total", &[]);
    assert_eq!(
        from(&lab.hub, member, SocketAddr::new(SPOKE_MESH, PORT)),
        Some(String::new()),
        "closed without a word"
    );
    wait_until(LONG, "the refusal is counted", || {
        (sum(&scrape(&lab.hub), "http_rejected_connections_total", &[]) > before).then_some(())
    })
    .unwrap();
}

/// Asks for metrics from one of several addresses; `None`: no connection.
fn from(node: &Node, source: IpAddr, to: SocketAddr) -> Option<String> {
    let text = node
        .sh(&format!(
            "code=0; curl -s --max-time 1 --interface {source} http://{to}/metrics || code=$?; echo \"exit $code\"",
        ))
        .unwrap();
    let (body, code) = text.rsplit_once("exit ").unwrap();
    match code.trim() {
        // Could not connect, or not in time.
        "7" | "28" => None,
        // Empty reply, or reset.
        "52" | "56" | "0" => Some(body.to_owned()),
        other => panic!("curl ended with {other}: {text}"),
    }
}

#[test]
fn metrics_pass_the_tools_of_prometheus_in_both_forms() {
    if lacking(&[Need::Lab, Need::Prometheus, Need::Spokeguard]) {
        return;
    }
    let lab = Lab::plain();
    let _daemon = lab.spoke.daemon(&lab.policy()).unwrap();
    let at = SocketAddr::new(SPOKE_MESH, PORT);
    let text = lab.hub.http_get(at, "/metrics", &[]).unwrap();
    assert!(text.head.to_lowercase().contains("content-type: text/plain; version=0.0.4"), "{}", text.head);
    promtool(&text.body);
    let open: Http = lab.hub.http_get(at, "/metrics", &[OPENMETRICS]).unwrap();
    assert!(open.head.to_lowercase().contains("content-type: application/openmetrics-text"), "{}", open.head);
    assert!(open.body.ends_with("# EOF\n"));
    let names: BTreeSet<&str> =
        samples(&open.body).map(|(series, _)| series.split('{').next().unwrap()).collect();
    for name in [
        "build_info",
        "policy_info",
        "verdict",
        "findings",
        "blind",
        "control_enforced",
        "drift_events_total",
        "repairs_total",
        "packets_total",
        "bytes_total",
        "dropped_packets_total",
        "connection_attempts_total",
        "cycle_seconds",
    ] {
        assert!(names.contains(format!("spokeguard_{name}").as_str()), "{name} in {names:?}");
    }

    let prometheus = lab.hub.prometheus(&[at]).unwrap();
    wait_until(LONG, "it is scraped", || {
        let up = prometheus.query(&lab.hub, "up == 1").ok()?;
        (up.len() == 1).then_some(())
    })
    .unwrap_or_else(|error| panic!("{error:#}\n{}", prometheus.running.log()));
    let series = prometheus.query(&lab.hub, "count by (instance) ({__name__=~\"spokeguard_.*\"})").unwrap();
    assert!(
        series.len() == 1 && series.iter().all(|(_, count)| (60.0..=150.0).contains(count)),
        "{series:?}"
    );
    let log = prometheus.running.log();
    assert!(!log.contains("level=warn") && !log.contains("level=error"), "{log}");
}

#[test]
fn metrics_with_a_tunnel_tell_of_it() {
    if lacking(&[Need::Lab, Need::WireGuard, Need::Spokeguard]) {
        return;
    }
    let lab = Lab::new();
    let _daemon = lab.spoke.daemon(&lab.policy()).unwrap();
    // At once: the tunnel's flow from before the rules is not cut off by them.
    let body = scrape(&lab.hub);
    assert_eq!(sum(&body, "wireguard_keepalive_seconds", &[]), 25.0);
    let age = sum(&body, "wireguard_handshake_age_seconds", &[]);
    assert!((0.0..180.0).contains(&age), "{age}");
    assert_eq!(sum(&body, "control_enforced", &[("control", "keepalive")]), 1.0);
    // While a look is under way as well, which so many rules make long.
    let rules: String = (0..4000)
        .map(|n| format!("add rule inet many c ip saddr 10.9.{}.{} drop\n", n / 250, n % 250))
        .collect();
    lab.spoke.nft(&format!("add table inet many\nadd chain inet many c\n{rules}")).unwrap();
    for _ in 0..12 {
        lab.spoke.nft("add table inet x; delete table inet x").unwrap();
        let body = fresh(&lab.hub);
        assert_eq!(sum(&body, "wireguard_keepalive_seconds", &[]), 25.0);
        assert_eq!(sum(&body, "control_enforced", &[("control", "firewall")]), 1.0);
    }
}

#[test]
fn metrics_stay_few_whatever_arrives() {
    if lacking(&[Need::Lab, Need::Spokeguard]) {
        return;
    }
    let lab = Lab::plain();
    let _web = lab.spoke.web().unwrap();
    let _daemon = lab.spoke.daemon(&lab.policy()).unwrap();
    let before = scrape(&lab.hub);
    let dropped =
        |body: &str| sum(body, "dropped_packets_total", &[("rule", "public-udp"), ("family", "ipv4")]);
    let counted = |body: &str| {
        sum(
            body,
            "packets_total",
            &[("scope", "public"), ("direction", "in"), ("family", "ipv4"), ("proto", "udp")],
        )
    };
    // Any source address of 198.51.100.0/24 and beyond, any port: raw packets.
    lab.internet
        .inside(|| {
            let socket = raw()?;
            let mut state = 0x2545_f491_4f6c_dd1d_u64;
            for _ in 0..100_000 {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                let source = Ipv4Addr::new(11, (state >> 8) as u8, (state >> 16) as u8, (state >> 24) as u8);
                send(&socket, &udp(source, (state >> 32) as u16 | 1, (state >> 48) as u16 | 1024))?;
            }
            Ok(())
        })
        .unwrap();
    wait_until(LONG, "all are counted", || {
        (counted(&scrape(&lab.hub)) - counted(&before) >= 100_000.0).then_some(())
    })
    .unwrap_or_else(|error| panic!("{error:#}: {} of 100000", counted(&scrape(&lab.hub)) - counted(&before)));
    let after = scrape(&lab.hub);
    assert_eq!(counted(&after) - counted(&before), 100_000.0);
    assert!(samples(&after).count() <= 150, "{}", samples(&after).count());
    let names = |body: &str| samples(body).map(|(series, _)| series.to_owned()).collect::<BTreeSet<_>>();
    let findings = |name: &String| name.starts_with("spokeguard_findings");
    let new: Vec<String> =
        names(&after).difference(&names(&before)).filter(|name| !findings(name)).cloned().collect();
    assert_eq!(new, [] as [String; 0]);
    // Those that reverse path filtering lets through are dropped by us; how many is the machine's choice.
    assert!(dropped(&after) <= dropped(&before) + 100_000.0);
}

fn raw() -> anyhow::Result<std::os::fd::OwnedFd> {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, ipproto, socket_with};
    let raw = Some(ipproto::RAW);
    Ok(socket_with(AddressFamily::INET, SocketType::RAW, SocketFlags::CLOEXEC, raw)?)
}

fn send(socket: &std::os::fd::OwnedFd, packet: &[u8]) -> anyhow::Result<()> {
    let to = SocketAddr::new(SPOKE_PUBLIC, 0);
    // The far end may be slower than we are.
    wait_until(LONG, "room for a packet", || {
        rustix::net::sendto(socket, packet, rustix::net::SendFlags::empty(), &to).ok()
    })?;
    Ok(())
}

/// An IPv4 packet with a UDP datagram without checksum; the kernel fills in the header's own.
fn udp(source: Ipv4Addr, source_port: u16, port: u16) -> [u8; 28] {
    let mut packet = [0u8; 28];
    packet[0] = 0x45;
    packet[3] = 28;
    packet[8] = 64;
    packet[9] = 17;
    packet[12..16].copy_from_slice(&source.octets());
    packet[16..20].copy_from_slice(&[198, 51, 100, 7]);
    packet[20..22].copy_from_slice(&source_port.to_be_bytes());
    packet[22..24].copy_from_slice(&port.to_be_bytes());
    packet[25] = 8;
    packet
}

#[test]
fn metrics_survive_a_hundred_slow_clients() {
    if lacking(&[Need::Lab, Need::Spokeguard]) {
        return;
    }
    let lab = Lab::plain();
    let _database = lab.spoke.listen("postgres", &["tcp/0.0.0.0:5432"]).unwrap();
    let _daemon = lab.spoke.daemon(&lab.policy()).unwrap();
    let at = SocketAddr::new(SPOKE_MESH, PORT);
    let slow: Vec<TcpStream> = lab
        .hub
        .inside(|| {
            let mut slow = Vec::new();
            for number in 0..100 {
                let mut stream = TcpStream::connect_timeout(&at, Duration::from_secs(5))?;
                let part = [
                    "",
                    "GET /metrics",
                    "GET /metrics HTTP/1.1\r\nHost: x\r\n",
                    "GET /metrics HTTP/1.1\r\nX: ",
                ][number % 4];
                // Pushed out already, perhaps: that is what is meant to happen.
                let _ = stream.write_all(part.as_bytes());
                slow.push(stream);
            }
            Ok(slow)
        })
        .unwrap();
    let begun = Instant::now();
    assert!(scrape(&lab.hub).contains("spokeguard_verdict"));
    assert!(begun.elapsed() < Duration::from_secs(1), "{:?}", begun.elapsed());
    lab.spoke.nft("flush ruleset").unwrap();
    wait_until(LONG, "repairs go on", || {
        (lab.internet.connect(SocketAddr::new(SPOKE_PUBLIC, 5432), SHORT) == Answer::Silent).then_some(())
    })
    .unwrap();
    // Nobody is served for ever: each is closed within the deadline.
    for mut stream in slow {
        stream.set_read_timeout(Some(LONG)).unwrap();
        let ended = stream.read_to_end(&mut Vec::new());
        assert!(!ended.as_ref().is_err_and(|e| e.kind() == std::io::ErrorKind::WouldBlock), "{ended:?}");
    }
    assert!(sum(&scrape(&lab.hub), "http_rejected_connections_total", &[]) >= 50.0);
}

#[test]
fn metrics_count_every_drop_and_follow_the_verdict() {
    if lacking(&[Need::Lab, Need::Sshd, Need::Spokeguard]) {
        return;
    }
    let lab = Lab::plain();
    let sshd = lab.spoke.sshd(22, &["10.84.0.16", "fd84::16"], "").unwrap();
    let _web = lab.spoke.web().unwrap();
    let daemon = lab.spoke.daemon(&(plain_policy(&lab) + UNGUARDED)).unwrap();
    // While it asks from outside, drops are told a moment later.
    wait_until(3 * LONG, "the first audit", || {
        (!crate::daemon::status(&lab.spoke, &daemon)["daemon"]["audit"].is_null()).then_some(())
    })
    .unwrap();
    let before = fresh(&lab.hub);
    assert_eq!(
        sum(&before, "dropped_packets_total", &[("rule", "public-udp")]),
        0.0,
        "probes are no strangers"
    );
    let syns = 7;
    for (address, family) in [(SPOKE_PUBLIC, "ipv4"), (SPOKE_PUBLIC_V6, "ipv6")] {
        for (port, rule) in [(22, "ssh"), (5432, "public-tcp")] {
            let rule = [("rule", rule), ("family", family)];
            let dropped = || sum(&fresh(&lab.hub), "dropped_packets_total", &rule);
            let first = dropped();
            for _ in 0..syns {
                // Shorter than the second after which the kernel sends its SYN again.
                assert_eq!(lab.internet.connect(SocketAddr::new(address, port), SHORT), Answer::Silent);
            }
            assert_eq!(dropped() - first, f64::from(syns), "{rule:?}");
        }
        assert_eq!(lab.internet.connect(SocketAddr::new(address, 443), LONG), Answer::Open);
    }
    let after = fresh(&lab.hub);
    let all = |body: &str| sum(body, "dropped_packets_total", &[]);
    assert_eq!(all(&after) - all(&before), f64::from(4 * syns), "and nothing else was dropped");

    let listener = || sum(&fresh(&lab.hub), "findings", &[("code", "listener-wide")]);
    let verdict = || sum(&fresh(&lab.hub), "verdict", &[]);
    assert_eq!(listener(), 0.0);
    let drifts = sum(&after, "drift_events_total", &[("facet", "listeners")]);
    let redis = lab.spoke.listen("redis", &["tcp/0.0.0.0:6379"]).unwrap();
    wait_until(LONG, "the finding is a series", || (listener() == 1.0).then_some(())).unwrap();
    assert_eq!(verdict(), 1.0);
    assert_eq!(sum(&fresh(&lab.hub), "drift_events_total", &[("facet", "listeners")]) - drifts, 1.0);
    drop(redis);
    wait_until(LONG, "and goes with it", || (listener() == 0.0).then_some(())).unwrap();
    drop(sshd);
    wait_until(LONG, "sshd is missed", || {
        (sum(&fresh(&lab.hub), "findings", &[("code", "ssh-unreachable")]) == 2.0).then_some(())
    })
    .unwrap();
    for control in ["firewall", "counters", "repair"] {
        assert_eq!(sum(&fresh(&lab.hub), "control_enforced", &[("control", control)]), 1.0, "{control}");
    }
}
