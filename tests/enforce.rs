//! `apply`, `confirm`, `plan` and `release` on a real kernel: what the stranger and the hub meet afterwards.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use lab::{
    Answer, CONTAINER, CONTAINER_V6, HUB_MESH, HUB_PUBLIC, HUB_PUBLIC_V6, Lab, Mesh, Need, Node, OUTSIDER,
    OUTSIDER_V6, Outcome, SPOKE_MESH, SPOKE_MESH_V6, SPOKE_PUBLIC, SPOKE_PUBLIC_V6, Shape, lacking,
    wait_until,
};

/// For an answer that must not come.
const SHORT: Duration = Duration::from_millis(250);
/// For one that must.
const LONG: Duration = Duration::from_secs(5);

pub(crate) const PUBLIC: [IpAddr; 2] = [SPOKE_PUBLIC, SPOKE_PUBLIC_V6];
const MESH: [IpAddr; 2] = [SPOKE_MESH, SPOKE_MESH_V6];

/// The program on one node, with a policy and folders of its own.
pub(crate) struct Guard<'a> {
    pub node: &'a Node,
    pub dir: PathBuf,
}

impl<'a> Guard<'a> {
    pub fn new(lab: &Lab, node: &'a Node) -> Guard<'a> {
        let dir = lab.dir.join(format!("guard-{}", node.name));
        std::fs::create_dir_all(&dir).unwrap();
        Guard { node, dir }
    }

    pub fn write(&self, policy: &str) {
        std::fs::write(self.dir.join("policy.toml"), policy).unwrap();
    }

    /// The flags that keep this instance apart from every other.
    pub fn flags(&self) -> Vec<String> {
        let path = |name: &str| self.dir.join(name).display().to_string();
        let flags = [("--policy", "policy.toml"), ("--state-dir", "state"), ("--run-dir", "run")];
        let own = flags.into_iter().flat_map(|(flag, name)| [flag.to_string(), path(name)]);
        // Where a daemon of the lab pins; the node has a bpffs of its own.
        own.chain(["--pin-dir", "/sys/fs/bpf/spokeguard"].map(String::from)).collect()
    }

    pub fn run(&self, verb: &[&str]) -> Outcome {
        let words: Vec<String> = verb.iter().map(|word| word.to_string()).chain(self.flags()).collect();
        self.node.spokeguard(&words).unwrap()
    }

    /// Runs a verb that must end with this code.
    #[track_caller]
    pub fn says(&self, code: i32, verb: &[&str]) -> String {
        let outcome = self.run(verb);
        assert_eq!(outcome.code, Some(code), "{verb:?}: {}", outcome.all());
        outcome.stdout
    }

    /// Puts a policy in force, for good.
    #[track_caller]
    pub fn enforce(&self, policy: &str) {
        self.write(policy);
        self.says(0, &["apply"]);
        self.says(0, &["confirm"]);
    }

    /// The counters of our table that counted anything.
    fn counters(&self) -> BTreeMap<String, u64> {
        let text = self.node.ok(&["nft", "-j", "list", "counters", "table", "inet", "spokeguard"]).unwrap();
        let document: serde_json::Value = serde_json::from_str(&text).unwrap();
        let counters = document["nftables"].as_array().unwrap().iter().map(|object| &object["counter"]);
        let counted = counters.filter_map(|counter| {
            Some((counter["name"].as_str()?.to_string(), counter["packets"].as_u64().filter(|n| *n > 0)?))
        });
        let mut sums: BTreeMap<String, u64> = counted.collect();
        // What the guard refuses never comes to the table.
        let pins = self.node.path("/sys/fs/bpf/spokeguard");
        let refused = self.node.inside(|| match spokeguard::source::bpf::guard::Guard::open(&pins)? {
            Some(guard) => guard.refused(),
            None => Ok(Default::default()),
        });
        for ((reason, family), n) in &refused.unwrap()[0] {
            *sums.entry(reason.counter(*family)).or_default() += n;
        }
        sums
    }

    fn counter(&self, name: &str) -> u64 {
        self.counters().get(name).copied().unwrap_or(0)
    }
}

fn tcp(from: &Node, to: IpAddr, port: u16) -> Answer {
    from.connect(SocketAddr::new(to, port), SHORT)
}

fn udp(from: &Node, to: IpAddr, port: u16) -> bool {
    from.ask_udp(SocketAddr::new(to, port), SHORT).unwrap().is_some()
}

/// From now on, `node` speaks to `to` from this address.
fn speak_from(node: &Node, interface: &str, to: IpAddr, via: Option<IpAddr>, from: IpAddr) {
    let six = if to.is_ipv6() { "-6" } else { "-4" };
    let bits = if to.is_ipv6() { 128 } else { 32 };
    let via = via.map(|via| format!("via {via}")).unwrap_or_default();
    // An address that may still prove a duplicate is none to speak from.
    let settled = if to.is_ipv6() { "nodad" } else { "" };
    node.sh(&format!(
        "ip {six} addr replace {from}/{bits} dev {interface} {settled}
         ip {six} route replace {to}/{bits} {via} dev {interface} src {from}"
    ))
    .unwrap();
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// What everybody else's tables hold.
fn foreign_rules(node: &Node) -> String {
    let all = node.ok(&["nft", "-s", "-n", "list", "ruleset"]).unwrap();
    let mut out = String::new();
    let mut ours = false;
    for line in all.lines() {
        ours |= line == "table inet spokeguard {";
        if !ours {
            out += line;
            out.push('\n');
        }
        ours &= line != "}";
    }
    out
}

fn generation(node: &Node) -> u32 {
    node.inside(|| {
        let mut queries = spokeguard::source::nft_events::NftQueries::open()?;
        Ok(queries.generation()?)
    })
    .unwrap()
}

#[test]
fn a_stranger_reaches_the_public_ports_and_no_other() {
    if lacking(&[Need::Lab, Need::Nmap, Need::Spokeguard]) {
        return;
    }
    let lab = Lab::plain();
    let ports = ["22", "5432", "80", "443", "8080", "9984", "19999"];
    let words: Vec<String> = ports
        .iter()
        .map(|port| format!("tcp/[::]:{port}"))
        .chain(["udp/[::]:443".into(), "udp/[::]:8080".into()])
        .collect();
    let _all = lab.spoke.listen("all", &words.iter().map(String::as_str).collect::<Vec<_>>()).unwrap();
    let guard = Guard::new(&lab, &lab.spoke);
    for to in PUBLIC {
        assert_eq!(
            lab.internet.nmap_open(to, &ports.join(",")).unwrap().len(),
            ports.len(),
            "before, to {to}"
        );
        assert!(udp(&lab.internet, to, 8080), "before, to {to}");
    }
    guard.enforce(&lab.policy().replace("tcp = [80, 443]", "tcp = [80, 443]\nudp = [443]"));
    for to in PUBLIC {
        // At this pace a scan may miss what is open, and never calls open what is not.
        let scan = lab.internet.nmap(to, "-").unwrap();
        assert!(scan.open().is_subset(&BTreeSet::from([80, 443])), "{to}: {scan:?}");
        assert_eq!(lab.internet.nmap_open(to, &ports.join(",")).unwrap(), BTreeSet::from([80, 443]), "{to}");
        // Not a word about the others: neither a reset nor an ICMP error.
        assert_eq!(scan.others.keys().collect::<Vec<_>>(), ["filtered"], "{to}: {scan:?}");
        assert!(udp(&lab.internet, to, 443), "udp 443 at {to}");
        assert!(!udp(&lab.internet, to, 8080), "udp 8080 at {to}");
    }
    // The spoke itself still reaches everything, itself included.
    let _outside = lab.internet.listen("web", &["tcp/[::]:80", "udp/[::]:53"]).unwrap();
    for to in [OUTSIDER, OUTSIDER_V6] {
        assert_eq!(lab.spoke.connect(SocketAddr::new(to, 80), LONG), Answer::Open);
        assert!(lab.spoke.ask_udp(SocketAddr::new(to, 53), LONG).unwrap().is_some());
    }
    for to in [ip("127.0.0.1"), ip("::1"), SPOKE_PUBLIC, SPOKE_PUBLIC_V6, SPOKE_MESH, SPOKE_MESH_V6] {
        assert_eq!(lab.spoke.connect(SocketAddr::new(to, 5432), LONG), Answer::Open, "{to} from the spoke");
    }
}

#[test]
fn the_hub_gets_in_through_the_mesh_and_another_peer_only_where_it_may() {
    if lacking(&[Need::Lab, Need::Sshd, Need::Spokeguard]) {
        return;
    }
    let lab = Lab::plain();
    let sshd = lab.spoke.sshd(22, &["0.0.0.0", "::"], "").unwrap();
    let _services = lab
        .spoke
        .listen("services", &["tcp/[::]:9984", "tcp/[::]:19999", "udp/[::]:19999", "tcp/[::]:3000"])
        .unwrap();
    let guard = Guard::new(&lab, &lab.spoke);
    let hub_v6 = lab.policy().replace("address = \"10.84.0.1\"", "address = [\"10.84.0.1\", \"fd84::1\"]");
    let service = "[[mesh.service]]\nname = \"netdata\"\ntcp = [19999]\nudp = [19999]\nfrom = \"mesh\"\n";
    guard.enforce(&format!("{hub_v6}{service}"));
    for to in MESH {
        let login = sshd.login(&lab.hub, to, "echo in").unwrap();
        assert_eq!((login.code, login.stdout.as_str()), (Some(0), "in\n"), "{to}: {}", login.all());
        assert_eq!(tcp(&lab.hub, to, 9984), Answer::Open, "metrics at {to}");
        assert_eq!(tcp(&lab.hub, to, 19999), Answer::Open, "service at {to}");
        assert!(udp(&lab.hub, to, 19999), "service at {to}");
        assert_eq!(tcp(&lab.hub, to, 3000), Answer::Silent, "undeclared at {to}");
    }
    for to in PUBLIC {
        for port in [22, 9984, 19999, 3000] {
            assert_eq!(tcp(&lab.internet, to, port), Answer::Silent, "{to} {port}");
        }
        assert!(!udp(&lab.internet, to, 19999));
    }
    // Another peer of the mesh: same cable, another address.
    for (to, peer) in MESH.into_iter().zip([ip("10.84.0.9"), ip("fd84::9")]) {
        speak_from(&lab.hub, "wg0", to, None, peer);
        assert_eq!(tcp(&lab.hub, to, 19999), Answer::Open, "service at {to} from {peer}");
        assert!(udp(&lab.hub, to, 19999), "service at {to} from {peer}");
        assert_eq!(tcp(&lab.hub, to, 22), Answer::Silent, "ssh at {to} from {peer}");
        assert_eq!(tcp(&lab.hub, to, 9984), Answer::Silent, "metrics at {to} from {peer}");
    }
    // ssh.from as a list, which must hold the hub.
    let listed = hub_v6.replace(
        "from = \"hub\"",
        "from = [\"10.84.0.1/32\", \"fd84::1/128\", \"10.84.0.8/31\", \"fd84::8/127\"]",
    );
    guard.enforce(&listed);
    for to in MESH {
        assert_eq!(tcp(&lab.hub, to, 22), Answer::Open, "ssh at {to} from the list");
        assert_eq!(tcp(&lab.hub, to, 19999), Answer::Silent, "a service that is no longer declared");
    }
    for (to, peer) in MESH.into_iter().zip([ip("10.84.0.10"), ip("fd84::10")]) {
        speak_from(&lab.hub, "wg0", to, None, peer);
        assert_eq!(tcp(&lab.hub, to, 22), Answer::Silent, "ssh at {to} from {peer}");
    }
}

#[test]
fn the_mesh_address_does_not_answer_on_the_public_side_and_nobody_borrows_a_mesh_source() {
    if lacking(&[Need::Lab, Need::Spokeguard]) {
        return;
    }
    let lab = Lab::plain();
    let _ssh = lab
        .spoke
        .listen("sshd", &["tcp/10.84.0.16:22", "tcp/[fd84::16]:22", "tcp/[::]:80", "udp/[::]:443"])
        .unwrap();
    // What survives every other table, seen from the last place in the input path.
    lab.spoke
        .nft(
            "table inet judge {
               counter four { }
               counter six { }
               chain input { type filter hook input priority 1000;
                 iifname eth0 ip saddr 10.84.0.0/24 counter name four
                 iifname eth0 ip6 saddr fd84::/64 counter name six
               }
             }",
        )
        .unwrap();
    let survived = || {
        ["four", "six"].map(|name| {
            let text = lab.spoke.ok(&["nft", "-j", "list", "counter", "inet", "judge", name]).unwrap();
            let document: serde_json::Value = serde_json::from_str(&text).unwrap();
            document["nftables"][1]["counter"]["packets"].as_u64().unwrap()
        })
    };
    let guard = Guard::new(&lab, &lab.spoke);
    lab.internet
        .sh("ip route add 10.84.0.16 via 198.51.100.7; ip -6 route add fd84::16 via 2001:db8:1::7")
        .unwrap();
    for to in MESH {
        assert_eq!(tcp(&lab.internet, to, 22), Answer::Open, "before, {to}");
    }
    guard.enforce(&lab.policy().replace("tcp = [80, 443]", "tcp = [80, 443]\nudp = [443]"));
    for to in MESH {
        for port in [22, 80, 9] {
            assert_eq!(tcp(&lab.internet, to, port), Answer::Silent, "{to} {port} through the public side");
        }
        assert!(!udp(&lab.internet, to, 443), "{to} through the public side");
        assert_eq!(tcp(&lab.hub, to, 80), Answer::Open, "public is public through the mesh as well");
    }
    assert!(
        guard.counter("drop-weak-host-ipv4") >= 4 && guard.counter("drop-weak-host-ipv6") >= 4,
        "{:?}",
        guard.counters()
    );
    assert_eq!(survived(), [0, 0]);
    // The stranger takes the hub's own address; his datagrams need no answer to do harm.
    let spoof = || {
        for (to, hub) in PUBLIC.into_iter().zip([HUB_MESH, lab::HUB_MESH_V6]) {
            speak_from(&lab.internet, "spoke0", to, None, hub);
            lab.internet.flood_udp(SocketAddr::new(to, 443), 3).unwrap();
            assert_ne!(tcp(&lab.internet, to, 22), Answer::Open);
        }
    };
    spoof();
    assert_eq!(survived(), [0, 0]);
    assert!(
        guard.counter("drop-spoofed-mesh-ipv4") >= 4 && guard.counter("drop-spoofed-mesh-ipv6") >= 4,
        "{:?}",
        guard.counters()
    );
    guard.says(0, &["release"]);
    spoof();
    assert!(survived().iter().all(|count| *count >= 4), "{:?}: the judge sees spoofed packets", survived());
}

#[test]
fn a_published_port_is_judged_by_the_port_that_the_stranger_asked_for() {
    if lacking(&[Need::Lab, Need::Spokeguard]) {
        return;
    }
    let lab = Lab::shaped(Shape { mesh: Mesh::Plain, container: true });
    let container = lab.container.as_ref().unwrap();
    let _app = container.listen("app", &["tcp/[::]:8000", "tcp/[::]:443"]).unwrap();
    let _local = lab.spoke.listen("local", &["tcp/[::]:9443"]).unwrap();
    lab.publish(5432, 8000).unwrap();
    // Nothing else on the spoke listens on 443: an answer there is the container's.
    lab.publish(443, 8000).unwrap();
    let redirects = "table inet redirects {
        chain prerouting { type nat hook prerouting priority -110;
          tcp dport 80 redirect to :9443
          tcp dport 8888 redirect to :9443
        }
      }";
    lab.spoke.nft(redirects).unwrap();
    let guard = Guard::new(&lab, &lab.spoke);
    for to in PUBLIC {
        for port in [5432, 443, 80, 8888, 9443] {
            assert_eq!(tcp(&lab.internet, to, port), Answer::Open, "before, {to} {port}");
        }
    }
    guard.enforce(&lab.policy());
    let judged = |when: &str| {
        for to in PUBLIC {
            let answers: Vec<(u16, Answer)> =
                [443, 80, 5432, 8888, 9443].map(|port| (port, tcp(&lab.internet, to, port))).to_vec();
            let (open, silent) = (Answer::Open, Answer::Silent);
            assert_eq!(
                answers,
                [(443, open), (80, open), (5432, silent), (8888, silent), (9443, silent)],
                "{when}, {to}"
            );
        }
    };
    judged("published before");
    // Docker starts after us, and again: its tables come and go.
    lab.spoke
        .nft("delete table ip docker_like\ndelete table ip6 docker_like\ndelete table inet redirects")
        .unwrap();
    assert_eq!(tcp(&lab.internet, SPOKE_PUBLIC, 443), Answer::Refused, "nothing there without them");
    lab.publish(5432, 8000).unwrap();
    lab.publish(443, 8000).unwrap();
    lab.spoke.nft(redirects).unwrap();
    lab.spoke.nft("table inet open { chain i { type filter hook input priority -300; accept; }; chain f { type filter hook forward priority -300; accept; }; }").unwrap();
    judged("published after");
    // What the container asks of the world is not ours to judge.
    let _world = lab.internet.listen("world", &["tcp/[::]:8443", "udp/[::]:53"]).unwrap();
    lab.internet.sh("ip -6 route add fd00:17::/64 via 2001:db8:1::7").unwrap();
    for to in [OUTSIDER, OUTSIDER_V6] {
        assert_eq!(
            container.connect(SocketAddr::new(to, 8443), LONG),
            Answer::Open,
            "{to} from the container"
        );
        assert!(
            container.ask_udp(SocketAddr::new(to, 53), LONG).unwrap().is_some(),
            "{to} from the container"
        );
    }
    // And the host reaches the container.
    for to in [CONTAINER, CONTAINER_V6] {
        assert_eq!(lab.spoke.connect(SocketAddr::new(to, 8000), LONG), Answer::Open);
    }
}

#[test]
fn a_local_network_has_a_list_of_its_own_and_what_is_routed_there_is_judged() {
    if lacking(&[Need::Lab, Need::Spokeguard]) {
        return;
    }
    let lab = Lab::shaped(Shape { mesh: Mesh::Plain, container: true });
    let container = lab.container.as_ref().unwrap();
    let _app = container.listen("app", &["tcp/[::]:8000", "tcp/[::]:443", "udp/[::]:8000"]).unwrap();
    let _host = lab
        .spoke
        .listen("host", &["tcp/[::]:53", "udp/[::]:53", "tcp/[::]:443", "tcp/[::]:5432", "udp/[::]:5432"])
        .unwrap();
    lab.internet
        .sh("ip -6 route add fd00:17::/64 via 2001:db8:1::7; ip route add 172.17.0.0/16 via 198.51.100.7")
        .unwrap();
    let guard = Guard::new(&lab, &lab.spoke);
    for to in [CONTAINER, CONTAINER_V6] {
        assert_eq!(tcp(&lab.internet, to, 8000), Answer::Open, "before, {to}");
        assert!(udp(&lab.internet, to, 8000), "before, {to}");
    }
    guard.enforce(&format!(
        "{}[[local]]\nname = \"containers\"\ninterfaces = [\"docker*\"]\ntcp = [53]\nudp = [53]\n",
        lab.policy()
    ));
    for gateway in [ip("172.17.0.1"), ip("fd00:17::1"), SPOKE_PUBLIC, SPOKE_PUBLIC_V6] {
        assert_eq!(tcp(container, gateway, 53), Answer::Open, "{gateway}");
        // A wildcard UDP socket answers from the address that is nearest, so only that one is asked.
        assert!(PUBLIC.contains(&gateway) || udp(container, gateway, 53), "{gateway}");
        assert_eq!(tcp(container, gateway, 443), Answer::Open, "{gateway}: public is public here as well");
        for port in [5432, 22] {
            assert_eq!(tcp(container, gateway, port), Answer::Silent, "{gateway} {port}: on no list");
        }
        assert!(!udp(container, gateway, 5432), "{gateway}");
    }
    for to in MESH {
        assert_eq!(tcp(container, to, 53), Answer::Silent, "{to}: the mesh address is for the mesh");
    }
    for to in PUBLIC {
        assert_eq!(tcp(&lab.internet, to, 443), Answer::Open);
        assert_eq!(tcp(&lab.internet, to, 53), Answer::Silent, "the local list opens nothing to the public");
        assert!(!udp(&lab.internet, to, 53));
    }
    for to in [CONTAINER, CONTAINER_V6] {
        assert_eq!(tcp(&lab.internet, to, 443), Answer::Open, "{to}: routed, by the public's list");
        assert_eq!(tcp(&lab.internet, to, 8000), Answer::Silent, "{to}");
        assert!(!udp(&lab.internet, to, 8000), "{to}");
    }
}

#[test]
fn a_hub_has_its_tunnel_port_open_and_exceptions_hold_for_whom_and_until_when_they_say() {
    if lacking(&[Need::Lab, Need::Spokeguard]) {
        return;
    }
    let lab = Lab::plain();
    let _all = lab
        .hub
        .listen(
            "all",
            &[
                "udp/[::]:51820",
                "udp/[::]:51821",
                "tcp/[::]:2222",
                "tcp/[::]:3333",
                "tcp/[::]:4444",
                "udp/[::]:4444",
                "tcp/[::]:22",
                "tcp/[::]:80",
            ],
        )
        .unwrap();
    let guard = Guard::new(&lab, &lab.hub);
    guard.enforce(
        r#"version = 1
[node]
name = "zurich"
role = "hub"
[mesh]
kind = "wireguard"
address = ["10.84.0.1", "fd84::1"]
prefix = ["10.84.0.0/24", "fd84::/64"]
listen_port = 51820
[public]
tcp = [80]
[ssh]
from = ["10.84.0.16/32", "fd84::16/128"]
[[exception]]
name = "anyone"
tcp = [2222]
from = ["0.0.0.0/0", "::/0"]
reason = "way in when the mesh is down"
until = "2099-01-31"
[[exception]]
name = "over"
tcp = [3333]
from = ["0.0.0.0/0", "::/0"]
reason = "was needed once"
until = "2020-01-31"
[[exception]]
name = "office"
tcp = [4444]
udp = [4444]
from = ["203.0.113.1/32", "2001:db8:2::1/128"]
reason = "the office"
until = "2099-01-31"
"#,
    );
    // The spoke's packets reach the hub's public side from 198.51.100.7: another stranger.
    for (to, office) in [(HUB_PUBLIC, "203.0.113.1"), (HUB_PUBLIC_V6, "2001:db8:2::1")] {
        assert!(udp(&lab.internet, to, 51820), "the tunnel's port at {to}");
        assert!(!udp(&lab.internet, to, 51821), "{to}");
        assert_eq!(tcp(&lab.internet, to, 80), Answer::Open, "{to}");
        assert_eq!(tcp(&lab.internet, to, 2222), Answer::Open, "{to}");
        assert_eq!(tcp(&lab.spoke, to, 2222), Answer::Open, "{to}");
        assert_eq!(tcp(&lab.internet, to, 3333), Answer::Silent, "an exception that is over, {to}");
        assert_eq!(tcp(&lab.internet, to, 4444), Answer::Open, "{to} from {office}");
        assert!(udp(&lab.internet, to, 4444), "{to} from {office}");
        assert_eq!(tcp(&lab.spoke, to, 4444), Answer::Silent, "{to} from elsewhere");
        assert!(!udp(&lab.spoke, to, 4444), "{to} from elsewhere");
        assert_eq!(tcp(&lab.internet, to, 22), Answer::Silent, "{to}");
    }
    for to in [HUB_MESH, lab::HUB_MESH_V6] {
        assert_eq!(tcp(&lab.spoke, to, 22), Answer::Open, "ssh for the spoke that is listed");
        assert_eq!(tcp(&lab.spoke, to, 80), Answer::Open);
        assert_eq!(tcp(&lab.spoke, to, 3333), Answer::Silent);
    }
}

#[test]
fn what_hosts_need_passes() {
    if lacking(&[Need::Lab, Need::Nmap, Need::Spokeguard]) {
        return;
    }
    let lab = Lab::plain();
    let guard = Guard::new(&lab, &lab.spoke);
    // Each answers a datagram; the DHCP client's ports among them.
    let _sockets = lab.spoke.listen("client", &["udp/[::]:68", "udp/[::]:546"]).unwrap();
    let echo = |to: IpAddr| {
        let to = to.to_string();
        let mut words = vec!["nmap", "-sn", "-n", "-PE", "--disable-arp-ping", "--max-retries", "1"];
        if to.contains(':') {
            words.push("-6");
        }
        words.push(&to);
        lab.internet.ok(&words).unwrap().contains("1 host up")
    };
    let from_port = |port: u16, source: &str, to: &str| {
        let (source, to): (SocketAddr, SocketAddr) =
            (format!("{source}:{port}").parse().unwrap(), to.parse().unwrap());
        lab.internet
            .inside(|| {
                let socket = UdpSocket::bind(source)?;
                socket.set_read_timeout(Some(SHORT))?;
                socket.send_to(b"offer", to)?;
                Ok(socket.recv(&mut [0; 16]).is_ok())
            })
            .unwrap()
    };
    let index = lab
        .internet
        .sh("cat /sys/class/net/spoke0/ifindex 2>/dev/null || ip -o link show spoke0 | cut -d: -f1")
        .unwrap();
    let link_local = |node: &Node, interface: &str| {
        let text = node.ok(&["ip", "-6", "-br", "addr", "show", "dev", interface, "scope", "link"]).unwrap();
        text.split_whitespace().nth(2).unwrap().split('/').next().unwrap().to_string()
    };
    let offer_v6 = format!("[{}%{}]:546", link_local(&lab.spoke, "eth0"), index.trim());
    guard.enforce(&lab.policy());
    for to in PUBLIC {
        assert!(echo(to), "{to} answers an echo request");
    }
    // Neighbour discovery starts again from nothing, in both directions.
    lab.internet.sh("ip neigh flush all; ip -6 neigh flush all").unwrap();
    lab.spoke.sh("ip neigh flush all; ip -6 neigh flush all").unwrap();
    for to in PUBLIC {
        assert_eq!(
            lab.internet.connect(SocketAddr::new(to, 443), LONG),
            Answer::Refused,
            "{to}: found, nothing there"
        );
    }
    lab.spoke.sh("ip neigh flush all; ip -6 neigh flush all").unwrap();
    for to in [OUTSIDER, OUTSIDER_V6] {
        assert_eq!(lab.spoke.connect(SocketAddr::new(to, 9), LONG), Answer::Refused, "{to}");
    }
    assert!(from_port(67, "0.0.0.0", "198.51.100.7:68"), "a DHCP server's answer");
    assert!(!from_port(6767, "0.0.0.0", "198.51.100.7:68"), "not from a DHCP server's port");
    assert!(from_port(547, "[::]", &offer_v6), "a DHCPv6 server's answer, on the link");
    assert!(!from_port(547, "[2001:db8:1::99]", "[2001:db8:1::7]:546"), "not from beyond the link");
}

#[test]
fn a_narrow_place_on_the_way_does_not_stop_a_big_transfer() {
    if lacking(&[Need::Lab, Need::Spokeguard]) {
        return;
    }
    const SIZE: usize = 1 << 20;
    let lab = Lab::plain();
    // Between spoke and hub, and only the router knows: both ends believe in 1500.
    lab.internet.sh("ip link set hub0 mtu 1300").unwrap();
    Guard::new(&lab, &lab.spoke).enforce(&lab.policy());
    let fetch = |to: IpAddr| {
        let server = lab.spoke.inside(|| Ok(TcpListener::bind(SocketAddr::new(to, 80))?)).unwrap();
        std::thread::scope(|scope| {
            scope.spawn(move || {
                let (mut stream, _) = server.accept().unwrap();
                stream.set_write_timeout(Some(LONG)).unwrap();
                let _ = stream.write_all(&vec![7; SIZE]);
            });
            lab.hub.inside(|| {
                let mut stream = TcpStream::connect_timeout(&SocketAddr::new(to, 80), LONG)?;
                stream.set_read_timeout(Some(LONG))?;
                let mut all = Vec::new();
                let ended = stream.read_to_end(&mut all);
                Ok((all.len(), ended.is_ok()))
            })
        })
        .unwrap()
    };
    for to in PUBLIC {
        assert_eq!(fetch(to), (SIZE, true), "{to}");
    }
    // The router's word is what it hangs on; without it, it hangs.
    lab.spoke.sh("ip route flush cache; ip -6 route flush cache").unwrap();
    lab.spoke
        .nft("table inet deaf { chain i { type filter hook prerouting priority -500; icmp type destination-unreachable drop; icmpv6 type packet-too-big drop; }; }")
        .unwrap();
    assert!(fetch(SPOKE_PUBLIC).0 < SIZE, "the place is narrow");
}

#[test]
fn established_flows_survive_apply() {
    if lacking(&[Need::Lab, Need::Spokeguard]) {
        return;
    }
    let lab = Lab::plain();
    let guard = Guard::new(&lab, &lab.spoke);
    // From the hub to sshd, from a stranger to the web server, and from the spoke to the world.
    let ways = [
        (&lab.spoke, SocketAddr::new(SPOKE_MESH, 22), &lab.hub),
        (&lab.spoke, SocketAddr::new(SPOKE_PUBLIC, 443), &lab.internet),
        (&lab.spoke, SocketAddr::new(SPOKE_PUBLIC_V6, 443), &lab.internet),
        (&lab.internet, SocketAddr::new(OUTSIDER, 8443), &lab.spoke),
        (&lab.internet, SocketAddr::new(OUTSIDER_V6, 8443), &lab.spoke),
    ];
    let flows: Vec<(TcpStream, TcpStream, String)> = ways
        .iter()
        .map(|(server, at, client)| {
            let listener = server.inside(|| Ok(TcpListener::bind(at)?)).unwrap();
            let near = client.inside(|| Ok(TcpStream::connect_timeout(at, LONG)?)).unwrap();
            let (far, _) = listener.accept().unwrap();
            (near, far, format!("{} to {at}", client.name))
        })
        .collect();
    guard.enforce(&lab.policy());
    for (near, far, name) in &flows {
        // The kernel had no memory of these flows before our table came. What is for a port of this node goes
        // on at once, whoever speaks; of one that this node began, it learns when this node speaks.
        let ours = name.starts_with("spoke");
        let turns = if ours { [(near, far), (far, near)] } else { [(far, near), (near, far)] };
        for (mut from, mut to) in turns {
            from.write_all(b"still here").unwrap();
            to.set_read_timeout(Some(LONG)).unwrap();
            let mut word = [0; 10];
            let read = to.read_exact(&mut word).map(|()| word);
            assert_eq!(read.ok().as_ref().map(|word| &word[..]), Some(&b"still here"[..]), "{name}");
        }
    }
    // One that the policy does not want ends with it, also where somebody else has the kernel know every flow.
    lab.spoke
        .nft("table inet tracks { chain i { type filter hook input priority 5; ct state established accept; }; }")
        .unwrap();
    let listener = lab.spoke.inside(|| Ok(TcpListener::bind(SocketAddr::new(SPOKE_PUBLIC, 5432))?)).unwrap();
    assert_eq!(tcp(&lab.internet, SPOKE_PUBLIC, 5432), Answer::Silent);
    guard.says(0, &["release"]);
    let mut near = lab
        .internet
        .inside(|| Ok(TcpStream::connect_timeout(&SocketAddr::new(SPOKE_PUBLIC, 5432), LONG)?))
        .unwrap();
    let (mut far, _) = listener.accept().unwrap();
    guard.enforce(&lab.policy());
    // The confirmation has cut it: this side may know already.
    let _ = near.write_all(b"still here");
    far.set_read_timeout(Some(SHORT)).unwrap();
    assert!(far.read(&mut [0; 10]).is_err(), "a stranger's flow to a port that is closed now");
}

#[test]
fn audit_mode_counts_the_same_and_drops_nothing() {
    if lacking(&[Need::Lab, Need::Spokeguard]) {
        return;
    }
    let counted = |mode: &str, refused: Answer| {
        let lab = Lab::shaped(Shape { mesh: Mesh::Plain, container: true });
        let container = lab.container.as_ref().unwrap();
        let _app = container.listen("app", &["tcp/[::]:8000"]).unwrap();
        lab.publish(8080, 8000).unwrap();
        let _all = lab
            .spoke
            .listen("all", &["tcp/[::]:22", "tcp/[::]:80", "tcp/[::]:5432", "udp/[::]:53", "tcp/[::]:9984"])
            .unwrap();
        lab.internet
            .sh("ip route add 10.84.0.16 via 198.51.100.7; ip -6 route add fd84::16 via 2001:db8:1::7")
            .unwrap();
        let guard = Guard::new(&lab, &lab.spoke);
        guard.enforce(&format!("{}[enforce]\nmode = \"{mode}\"\n", lab.policy()));
        for to in PUBLIC {
            for port in [22, 5432, 8080] {
                assert_eq!(tcp(&lab.internet, to, port), refused, "{mode} {to} {port}");
            }
            assert_eq!(tcp(&lab.internet, to, 80), Answer::Open, "{mode} {to}");
            assert_eq!(udp(&lab.internet, to, 53), refused == Answer::Open, "{mode} {to}");
        }
        for to in MESH {
            assert_eq!(tcp(&lab.internet, to, 22), refused, "{mode} {to}");
            assert_eq!(tcp(&lab.hub, to, 5432), refused, "{mode} {to}");
        }
        assert_eq!(tcp(&lab.hub, SPOKE_MESH, 9984), Answer::Open, "{mode}");
        // The guard refuses before NAT, and can't know that a port is published.
        let mut counters = guard.counters();
        for family in ["ipv4", "ipv6"] {
            let published = counters.remove(&format!("drop-forward-{family}")).unwrap_or(0);
            *counters.entry(format!("drop-public-tcp-{family}")).or_default() += published;
        }
        counters
    };
    let enforced = counted("enforce", Answer::Silent);
    let mut audited = counted("audit", Answer::Open);
    // What flows went on with that enforcing had not let begin.
    for family in ["ipv4", "ipv6"] {
        let went_on = audited.insert(format!("drop-stale-{family}"), 0);
        assert!(went_on > Some(0), "{family}: {went_on:?}");
    }
    audited.retain(|name, count| *count > 0 || enforced.contains_key(name));
    assert_eq!(enforced, audited);
    for counter in ["ssh", "public-tcp", "public-udp", "weak-host", "mesh"] {
        for family in ["ipv4", "ipv6"] {
            assert!(
                enforced.contains_key(&format!("drop-{counter}-{family}")),
                "{counter} {family}: {enforced:?}"
            );
        }
    }
}

#[test]
fn apply_changes_what_differs_and_only_our_table() {
    if lacking(&[Need::Lab, Need::Spokeguard]) {
        return;
    }
    let lab = Lab::shaped(Shape { mesh: Mesh::Plain, container: true });
    lab.publish(8080, 8000).unwrap();
    lab.spoke
        .nft(
            "table inet filter {
               set banned { type ipv4_addr; flags timeout; }
               chain input { type filter hook input priority filter; policy accept; ct state invalid drop; ip saddr @banned drop; }
             }
             table inet spokeguard-of-somebody-else {
               chain input { type filter hook input priority 7; }
             }",
        )
        .unwrap();
    let before = foreign_rules(&lab.spoke);
    let guard = Guard::new(&lab, &lab.spoke);
    guard.write(&lab.policy());
    let plan = guard.says(1, &["plan"]);
    assert!(
        plan.starts_with(
            "apply would add table inet spokeguard, and the tc guard behind it; no other table is\ntouched."
        ),
        "{plan}"
    );
    for line in [
        "  tcp/443    https            from anyone\n",
        "  tcp/22     ssh              from 10.84.0.1 through wg0\n",
    ] {
        assert!(plan.contains(line), "{plan}");
    }
    assert!(
        plan.contains("  chain input {\n    type filter hook input priority -10; policy accept;\n"),
        "{plan}"
    );
    assert_eq!(foreign_rules(&lab.spoke), before, "plan changes nothing");
    assert!(
        !lab.spoke.ok(&["nft", "list", "tables"]).unwrap().contains("inet spokeguard\n"),
        "plan changes nothing"
    );
    let first = guard.says(0, &["apply"]);
    assert!(first.contains("in force") && first.contains("spokeguard confirm"), "{first}");
    guard.says(0, &["confirm"]);
    assert!(guard.says(0, &["plan"]).contains("apply would change nothing"));
    assert_eq!(foreign_rules(&lab.spoke), before);
    assert_ne!(foreign_rules(&lab.spoke), "");

    let was = generation(&lab.spoke);
    let again = guard.says(0, &["apply"]);
    assert!(again.contains("nothing changed"), "{again}");
    let again = guard.run(&["apply", "--format", "json"]).json().unwrap();
    assert_eq!((&again["result"], &again["changes"]), (&"unchanged".into(), &serde_json::json!([])));
    assert_eq!(generation(&lab.spoke), was);
    assert!(guard.says(0, &["confirm"]).contains("nothing waits"), "nothing was armed");

    // Counters outlive a policy that is another one.
    for to in PUBLIC {
        assert_eq!(tcp(&lab.internet, to, 5432), Answer::Silent);
    }
    let counted = guard.counters();
    assert!(counted["drop-public-tcp-ipv4"] >= 1 && counted["drop-public-tcp-ipv6"] >= 1, "{counted:?}");
    guard.write(&lab.policy().replace("[80, 443]", "[80, 443, 5432]"));
    let plan = guard.says(1, &["plan"]);
    assert!(plan.contains("+   meta l4proto tcp ct original proto-dst 5432 accept"), "{plan}");
    let at_once: Vec<&str> = plan.lines().filter(|line| line.contains("spokeguard:open-tcp-")).collect();
    assert_eq!(at_once.len(), 4, "one of each family goes, one comes: {plan}");
    let same = ["proto-dst 443", "hub-failsafe", "chain forward", "chain public", "chain mesh"];
    assert!(!same.iter().any(|same| plan.contains(same)), "only what differs: {plan}");
    let json: serde_json::Value =
        serde_json::from_str(&guard.says(1, &["plan", "--format", "json"])).unwrap();
    assert_eq!(json["version"], 1);
    assert!(!json["changes"].as_array().unwrap().is_empty());
    guard.says(0, &["apply"]);
    guard.says(0, &["confirm"]);
    for to in PUBLIC {
        assert_eq!(tcp(&lab.internet, to, 5432), Answer::Refused, "open now, and nothing listens");
        assert_eq!(tcp(&lab.internet, to, 5433), Answer::Silent);
    }
    let now = guard.counters();
    assert!(now["drop-public-tcp-ipv4"] > counted["drop-public-tcp-ipv4"], "{counted:?} {now:?}");
    assert_eq!(foreign_rules(&lab.spoke), before);

    // Someone's rule in our table goes; the plan says which.
    lab.spoke.nft("insert rule inet spokeguard input tcp dport 22 accept").unwrap();
    assert_eq!(tcp(&lab.internet, SPOKE_PUBLIC, 22), Answer::Silent, "the guard is not fooled");
    let plan = guard.says(1, &["plan"]);
    assert!(plan.contains("22"), "{plan}");
    guard.says(0, &["apply"]);
    guard.says(0, &["confirm"]);
    assert_eq!(tcp(&lab.internet, SPOKE_PUBLIC, 22), Answer::Silent);

    // A daemon that tries whether it repairs its table at this moment changes nothing; what hides behind that name does.
    lab.spoke.nft("add chain inet spokeguard canary-00000001").unwrap();
    let changed =
        || guard.run(&["check", "--no-probe", "--format", "json"]).stdout.contains("firewall-changed");
    assert!(guard.says(0, &["plan"]).contains("apply would change nothing"));
    assert!(!changed());
    assert!(guard.says(0, &["apply"]).contains("nothing changed"), "as plan said");
    let table = lab.spoke.ok(&["nft", "list", "table", "inet", "spokeguard"]).unwrap();
    assert!(!table.contains("canary-"), "it is taken away all the same");
    lab.spoke.nft("add chain inet spokeguard canary-00000001").unwrap();
    lab.spoke.nft("add rule inet spokeguard canary-00000001 tcp dport 22 accept").unwrap();
    assert!(guard.says(1, &["plan"]).contains("canary-00000001"));
    assert!(changed());
    guard.says(0, &["apply"]);

    let _db = lab.spoke.listen("postgres", &["tcp/[::]:9999"]).unwrap();
    let dry = guard.says(0, &["release", "--dry-run"]);
    assert!(dry.contains("tcp/[::]:9999") && dry.contains("postgres"), "{dry}");
    assert_eq!(tcp(&lab.internet, SPOKE_PUBLIC, 9999), Answer::Silent, "a dry run");
    let dry = guard.run(&["release", "--dry-run", "--format", "json"]).json().unwrap();
    assert_eq!(dry["result"], "dry-run");
    assert!(dry["opens"].to_string().contains("tcp/[::]:9999"), "{dry}");
    let released = guard.says(0, &["release"]);
    assert!(released.contains("tcp/[::]:9999") && released.contains("the tc guard are gone"), "{released}");
    assert_eq!(lab.spoke.ok(&["nft", "-s", "-n", "list", "ruleset"]).unwrap(), before);
    for to in PUBLIC {
        // The kernel lets go of the guard's programs a moment after their pins.
        wait_until(LONG, "released is open", || (tcp(&lab.internet, to, 9999) == Answer::Open).then_some(()))
            .unwrap();
    }
    assert!(guard.says(0, &["release"]).contains("there was no table"));
}

#[test]
fn a_policy_that_is_wrong_or_locks_its_operator_out_changes_nothing() {
    if lacking(&[Need::Lab, Need::Spokeguard]) {
        return;
    }
    let lab = Lab::plain();
    let guard = Guard::new(&lab, &lab.spoke);
    let no_way_in = lab.policy().replace("from = \"hub\"", "from = [\"10.84.0.99/32\"]");
    for (policy, word) in [
        ("version = 1\n[node\n".to_string(), "policy.toml:2"),
        (lab.policy().replace("tcp = [80, 443]", "tcp = [80, 443, 22]"), "22"),
        (lab.policy().replace("[public]", "[pubic]"), "public"),
        (no_way_in.clone(), "allow_no_admin_path"),
    ] {
        guard.write(&policy);
        for verb in ["apply", "plan", "check"] {
            let outcome = guard.run(&[verb]);
            assert_eq!(outcome.code, Some(2), "{verb}: {}", outcome.all());
            assert!(outcome.stderr.contains(word) && outcome.stdout.is_empty(), "{verb}: {}", outcome.all());
        }
    }
    assert_eq!(lab.spoke.ok(&["nft", "list", "ruleset"]).unwrap(), "");
    // And with something in force, that stays.
    guard.enforce(&lab.policy());
    let was = generation(&lab.spoke);
    guard.write(&no_way_in);
    assert_eq!(guard.run(&["apply"]).code, Some(2));
    assert_eq!(generation(&lab.spoke), was);
    guard.write(&format!("{no_way_in}[enforce]\nallow_no_admin_path = true\n"));
    guard.says(0, &["apply"]);
}

#[test]
fn without_a_confirmation_everything_is_as_it_was() {
    if lacking(&[Need::Lab, Need::Spokeguard]) {
        return;
    }
    let lab = Lab::plain();
    let _db = lab.spoke.listen("postgres", &["tcp/[::]:5432"]).unwrap();
    let guard = Guard::new(&lab, &lab.spoke);
    let opens_again = |what: &str, limit: Duration| {
        wait_until(limit, what, || {
            PUBLIC.iter().all(|to| tcp(&lab.internet, *to, 5432) == Answer::Open).then_some(())
        })
        .unwrap();
    };
    // Nothing in force before: nothing in force afterwards, though the CLI was killed while it waited.
    guard.write(&lab.policy());
    let words: Vec<String> = [lab::spokeguard().unwrap().display().to_string()]
        .into_iter()
        .chain(["apply", "--wait", "--confirm-within", "4s"].map(String::from))
        .chain(guard.flags())
        .collect();
    let started = Instant::now();
    let mut cli = lab.spoke.spawn(&words).unwrap();
    cli.wait_for("in force", LONG).unwrap();
    cli.signal(lab::Signal::KILL).unwrap();
    cli.wait(LONG).unwrap();
    for to in PUBLIC {
        assert_eq!(tcp(&lab.internet, to, 5432), Answer::Silent);
    }
    opens_again("rolled back after kill -9", Duration::from_secs(10));
    assert!(started.elapsed() >= Duration::from_secs(4), "it waited");
    assert!(!lab.spoke.ok(&["nft", "list", "tables"]).unwrap().contains("spokeguard"));
    let late = guard.run(&["confirm"]);
    assert!(late.code != Some(0) || !late.stdout.contains("rules in force stay"), "{}", late.all());

    // A second apply neither confirms the first nor hides that it waits, nor does one that fails.
    guard.write(&lab.policy());
    guard.says(0, &["apply", "--confirm-within", "3s"]);
    let again = guard.says(0, &["apply"]);
    assert!(again.contains("not confirmed yet"), "{again}");
    guard.write("version = 1\n");
    guard.says(2, &["apply"]);
    guard.write(&lab.policy());
    let waited = guard.run(&["apply", "--wait", "--format", "json"]);
    assert_eq!(
        (waited.code, &waited.json().unwrap()["result"]),
        (Some(1), &"rolled-back".into()),
        "{}",
        waited.all()
    );
    opens_again("the first one's way back", SHORT);

    // A rule set before: that one again, with what it has counted.
    let open = lab.policy().replace("[80, 443]", "[80, 443, 5432]");
    guard.enforce(&open);
    assert_eq!(tcp(&lab.internet, SPOKE_PUBLIC, 5433), Answer::Silent);
    let before = lab.spoke.ok(&["nft", "-s", "list", "ruleset"]).unwrap();
    guard.write(&lab.policy());
    let outcome = guard.run(&["apply", "--wait", "--confirm-within", "1s"]);
    assert_eq!(outcome.code, Some(1), "{}", outcome.all());
    assert!(outcome.stdout.contains("rolled back"), "{}", outcome.all());
    opens_again("the rules before, by the time it says so", SHORT);
    assert_eq!(lab.spoke.ok(&["nft", "-s", "list", "ruleset"]).unwrap(), before);
    assert!(guard.counter("drop-public-tcp-ipv4") >= 1, "{:?}", guard.counters());

    // Confirmed: --wait says so at once, and the time passes without consequences.
    let words: Vec<String> =
        words.iter().map(|word| if word == "2s" { "3s".to_string() } else { word.clone() }).collect();
    let started = Instant::now();
    let mut cli = lab.spoke.spawn(&words).unwrap();
    cli.wait_for("in force", LONG).unwrap();
    guard.says(0, &["confirm"]);
    assert_eq!(cli.wait(LONG).unwrap().code(), Some(0), "{}", cli.log());
    assert!(cli.log().contains("confirmed"), "{}", cli.log());
    wait_until(LONG, "the time is over", || (started.elapsed() > Duration::from_secs(4)).then_some(()))
        .unwrap();
    for to in PUBLIC {
        assert_eq!(tcp(&lab.internet, to, 5432), Answer::Silent, "confirmed");
    }
}

#[test]
fn an_apply_that_fails_halfway_is_rolled_back_with_the_one_before_it() {
    if lacking(&[Need::Lab, Need::Spokeguard]) {
        return;
    }
    let lab = Lab::plain();
    let guard = Guard::new(&lab, &lab.spoke);
    let failing = failing_apply(&lab, &guard);
    guard.write(&lab.policy());
    guard.says(0, &["apply", "--confirm-within", "60s"]);
    assert_eq!(tcp(&lab.internet, SPOKE_PUBLIC, 5432), Answer::Silent);
    guard.write(&lab.policy().replace("[80, 443]", "[443]"));
    let outcome = lab.spoke.run(&["sh", "-c", &failing.replace("60s", "1s")]).unwrap();
    assert_eq!(outcome.code, Some(2), "{}", outcome.all());
    assert!(
        outcome.stderr.contains("comes back in 1s") && outcome.stderr.contains("no room"),
        "{}",
        outcome.all()
    );
    wait_until(LONG, "what was there before both", || {
        (!lab.spoke.ok(&["nft", "list", "tables"]).unwrap().contains("spokeguard")).then_some(())
    })
    .unwrap();

    // What a canary left that was killed changes nothing for anybody, and is taken away by the next daemon.
    guard.write(&lab.policy());
    guard.says(0, &["apply", "--confirm-within", "60s"]);
    lab.spoke.nft("add chain inet spokeguard canary-00000001").unwrap();
    guard.says(0, &["confirm"]);

    // What never went in, or is gone by now, is not confirmed: what was confirmed before is back at once.
    let table = || lab.spoke.ok(&["nft", "-s", "list", "table", "inet", "spokeguard"]).unwrap();
    let state = |name: &str| std::fs::read_to_string(guard.dir.join("state").join(name)).unwrap();
    guard.enforce(&lab.policy());
    let (stood, recorded) = (table(), [state("confirmed.toml"), state("sealed.nft")]);
    for (ports, in_force) in [("[443]", false), ("[80]", true)] {
        guard.write(&lab.policy().replace("[80, 443]", ports));
        if in_force {
            guard.says(0, &["apply", "--confirm-within", "60s"]);
            assert_ne!(table(), stood);
            lab.spoke.nft("flush chain inet spokeguard public").unwrap();
        } else {
            assert_eq!(lab.spoke.run(&["sh", "-c", &failing]).unwrap().code, Some(2));
        }
        let outcome = guard.run(&["confirm"]);
        assert_eq!(outcome.code, Some(2), "{}", outcome.all());
        let told = "not confirmed: the rules on trial are not in force";
        assert!(outcome.stderr.contains(told) && outcome.stderr.contains("is back"), "{}", outcome.all());
        assert_eq!(
            (table(), [state("confirmed.toml"), state("sealed.nft")]),
            (stood.clone(), recorded.clone())
        );
        assert_eq!(guard.says(0, &["confirm"]), "nothing waits for a confirmation\n");
    }
    // And when nothing is in the way any more, the same policy comes in.
    guard.says(0, &["apply"]);
    guard.says(0, &["confirm"]);
    assert_ne!((table(), state("confirmed.toml")), (stood, recorded[0].clone()));
}

/// An apply, with 60 s to confirm it, by an nft that lists, restores from a file, and takes no transaction.
fn failing_apply(lab: &Lab, guard: &Guard) -> String {
    let bin = lab.dir.join("bin");
    std::fs::create_dir(&bin).unwrap();
    std::fs::write(
        bin.join("nft"),
        "#!/bin/sh\ncase \"$*\" in *-f\\ -*) echo no room >&2; exit 1;; esac\nPATH=$REST exec nft \"$@\"\n",
    )
    .unwrap();
    let program = lab::spokeguard().unwrap().display().to_string();
    format!(
        "chmod 755 {0}/nft; REST=$PATH PATH={0}:$PATH exec {program} apply --confirm-within 60s {1}",
        bin.display(),
        guard.flags().join(" ")
    )
}

/// Hundreds of prefixes stand in sets of their own: kept, put right and rolled back like rules.
#[test]
fn long_lists_are_kept_put_right_and_rolled_back() {
    if lacking(&[Need::Lab, Need::Spokeguard]) {
        return;
    }
    let lab = Lab::plain();
    let guard = Guard::new(&lab, &lab.spoke);
    let _all = lab.spoke.listen("all", &["tcp/[::]:8443"]).unwrap();
    let policy = |own: &[&str]| {
        let others = (0..100)
            .flat_map(|n| [format!("24.0.{}.0/24", 2 * n), format!("2001:db8:{:x}::/48", 100 + 2 * n)]);
        let from: Vec<String> =
            others.chain(own.iter().map(|net| net.to_string())).map(|net| format!("{net:?}")).collect();
        format!(
            "{}[[exception]]\nname = \"partners\"\ntcp = [8443]\nfrom = [{}]\nreason = \"r\"\nowner = \"ops\"\n\
             until = \"2099-01-31\"\n",
            lab.policy(),
            from.join(", ")
        )
    };
    // A set that was made anew is listed last.
    let table = || {
        let text = lab.spoke.ok(&["nft", "-s", "list", "table", "inet", "spokeguard"]).unwrap();
        let (head, rest) = text.split_at(text.find("\tchain ").unwrap());
        let mut blocks: Vec<&str> = head.split_inclusive("\t}\n").map(str::trim).collect();
        blocks.sort_unstable();
        format!("{}\n{rest}", blocks.join("\n"))
    };
    let answers = || [SPOKE_PUBLIC, SPOKE_PUBLIC_V6].map(|to| tcp(&lab.internet, to, 8443));
    let (open, shut) = ([Answer::Open; 2], [Answer::Silent; 2]);
    // What went in ahead of rules that nft then doesn't take goes again, with the table that was made for it.
    let failing = failing_apply(&lab, &guard);
    let fails = || {
        let outcome = lab.spoke.run(&["sh", "-c", &failing]).unwrap();
        assert!(outcome.code == Some(2) && outcome.stderr.contains("no room"), "{}", outcome.all());
    };
    let tables = || lab.spoke.ok(&["nft", "list", "tables"]).unwrap();
    guard.write(&policy(&[]));
    fails();
    assert!(!tables().contains("spokeguard"), "{}", tables());
    guard.enforce(&policy(&[]));
    assert_eq!(answers(), shut);
    let before = table();
    guard.write(&policy(&["198.51.100.99/32", "2001:db8:1::/64"]));
    fails();
    assert_eq!(table(), before);
    guard.enforce(&policy(&["198.51.100.99/32", "2001:db8:1::/64"]));
    assert_eq!(answers(), open);
    let stood = table();
    assert_eq!((stood.matches("set list-").count(), stood.matches("24.0.2.0/24").count()), (2, 1), "{stood}");
    assert!(guard.says(0, &["plan"]).contains("nothing"));

    // What somebody puts in or takes out is a difference, and goes.
    let set = |family: &str| {
        let from = stood.find(&format!("list-{family}-")).unwrap();
        stood[from..].split_whitespace().next().unwrap().to_owned()
    };
    let (four, six) = (set("ipv4"), set("ipv6"));
    for change in [
        format!("add element inet spokeguard {four} {{ 203.0.113.0/24 }}"),
        format!("delete element inet spokeguard {six} {{ 2001:db8:1::/64 }}"),
        format!("flush set inet spokeguard {four}"),
    ] {
        lab.spoke.nft(&change).unwrap();
        assert!(guard.says(1, &["plan"]).contains("set list-"), "{change}");
        guard.says(0, &["apply"]);
        assert_eq!(table(), stood, "{change}");
        assert_eq!(answers(), open, "{change}");
    }
    // A foreign set of the same kind is read in the same way, one that only nft can list beside it or not.
    let check = || {
        let said = guard.run(&["check", "--no-probe", "--format", "json"]).json().unwrap();
        let codes =
            said["findings"].as_array().unwrap().iter().map(|finding| finding["code"].as_str().unwrap());
        let codes: BTreeSet<String> =
            codes.filter(|code| code.starts_with("firewall-")).map(str::to_owned).collect();
        codes.into_iter().collect::<Vec<_>>().join(" ")
    };
    assert_eq!(check(), "");
    lab.spoke.nft(
        "table inet theirs { set everyone { type ipv4_addr; flags interval; elements = { 0.0.0.0/1, 128.0.0.0/1 }; }; \
         chain inbound { type filter hook input priority -300; ip saddr @everyone tcp dport 443 drop; }; }",
    )
    .unwrap();
    assert_eq!(check(), "firewall-blocked");
    lab.spoke.nft(&format!("add element inet spokeguard {four} {{ 203.0.113.0/24 }}")).unwrap();
    lab.spoke.nft("add map inet theirs m { type inet_service : verdict; elements = { 9 : drop }; }").unwrap();
    assert_eq!(check(), "firewall-blocked firewall-changed");
    lab.spoke.nft("delete map inet theirs m").unwrap();
    assert_eq!(check(), "firewall-blocked firewall-changed");
    lab.spoke.nft("flush set inet theirs everyone").unwrap();
    assert_eq!(check(), "firewall-changed");
    lab.spoke.nft("delete table inet theirs").unwrap();
    guard.says(0, &["apply"]);
    assert_eq!((table(), answers()), (stood.clone(), open));

    // Another list, and back; the sealed file over itself.
    guard.write(&policy(&[]));
    guard.says(0, &["apply", "--confirm-within", "1s"]);
    assert_eq!(table(), before);
    wait_until(LONG, "rolled back", || (table() == stood).then_some(())).unwrap();
    assert_eq!(answers(), open);
    for _ in 0..2 {
        lab.spoke.ok(&["nft", "-f", &guard.dir.join("state/sealed.nft").display().to_string()]).unwrap();
    }
    // It has the same sets; its rules say until when as well.
    let sets = |text: &str| text.split("\tchain ").next().unwrap().to_owned();
    assert_eq!((sets(&table()), answers()), (sets(&stood), open));

    // A daemon puts right what is in them at the pace of a fight, also while something is open for a while.
    guard.write(&policy(&["198.51.100.99/32", "2001:db8:1::/64"]));
    let _daemon = lab.spoke.daemon_in(&guard.dir, &[]).unwrap();
    wait_until(6 * LONG, "put in force by the daemon", || (table() == stood).then_some(())).unwrap();
    let changes = [
        format!("add element inet spokeguard {four} {{ 203.0.113.0/24 }}"),
        format!("delete element inet spokeguard {six} {{ 2001:db8:1::/64 }}"),
        format!("flush set inet spokeguard {four}"),
    ];
    for change in &changes {
        lab.spoke.nft(change).unwrap();
        wait_until(6 * LONG, change, || (table() == stood).then_some(())).unwrap();
        assert_eq!(answers(), open, "{change}");
    }
    guard.says(
        0,
        &["break-glass", "open", "2222", "--for", "15m", "--from", "192.0.2.0/24", "--reason", "test"],
    );
    let kept = || table().contains("break-glass") && guard.says(0, &["break-glass", "list"]).contains("2222");
    lab.spoke.nft(&changes[0]).unwrap();
    wait_until(6 * LONG, "the element gone, the opening not", || {
        (!table().contains("203.0.113.0/24") && kept()).then_some(())
    })
    .unwrap();
}

#[test]
fn what_is_released_stays_away() {
    if lacking(&[Need::Lab, Need::Spokeguard]) {
        return;
    }
    let lab = Lab::plain();
    let guard = Guard::new(&lab, &lab.spoke);
    let tables = || lab.spoke.ok(&["nft", "list", "tables"]).unwrap();
    guard.enforce(&lab.policy());
    guard.write(&lab.policy().replace("[80, 443]", "[443]"));
    guard.says(0, &["apply", "--confirm-within", "1s"]);
    guard.says(0, &["release"]);
    // Until well after the rollback would have put the first rules back.
    let until = std::time::Instant::now() + std::time::Duration::from_secs(2);
    while std::time::Instant::now() < until {
        assert!(!tables().contains("spokeguard"));
    }
    // With a daemon's lock held, busy or not, it does not claim to have taken anything away.
    guard.enforce(&lab.policy());
    let lock = std::fs::File::open(guard.dir.join("run/spokeguard.lock")).unwrap();
    rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive).unwrap();
    let refused = guard.run(&["release"]);
    assert_eq!(refused.code, Some(2), "{}", refused.all());
    assert!(refused.stderr.contains("a daemon would put the rules back"), "{}", refused.all());
    assert!(tables().contains("spokeguard"));
}

#[test]
fn the_way_back_works_from_a_relative_run_directory() {
    if lacking(&[Need::Lab, Need::Spokeguard]) {
        return;
    }
    let lab = Lab::plain();
    let guard = Guard::new(&lab, &lab.spoke);
    guard.write(&lab.policy());
    let program = lab::spokeguard().unwrap().display().to_string();
    let apply = format!(
        "cd {} && exec {program} apply --confirm-within 1s --wait --policy policy.toml --run-dir run",
        guard.dir.display()
    );
    let outcome = lab.spoke.run_within(LONG * 4, &["sh", "-c", &apply]).unwrap();
    assert_eq!(outcome.code, Some(1), "{}", outcome.all());
    assert!(!lab.spoke.ok(&["nft", "list", "tables"]).unwrap().contains("spokeguard"));
}

#[test]
fn without_nft_or_rights_it_says_so_and_changes_nothing() {
    if lacking(&[Need::Lab, Need::Spokeguard]) {
        return;
    }
    let lab = Lab::plain();
    let guard = Guard::new(&lab, &lab.spoke);
    guard.write(&lab.policy());
    let program = lab::spokeguard().unwrap().display().to_string();
    let flags = guard.flags().join(" ");
    for verb in ["apply", "plan"] {
        let outcome =
            lab.spoke.run(&["sh", "-c", &without_nft(&format!("{program} {verb} {flags}"))]).unwrap();
        assert_eq!(outcome.code, Some(2), "{}", outcome.all());
        assert!(outcome.stderr.contains("nft not found: install nftables"), "{}", outcome.all());
        let outcome = lab
            .spoke
            .run(&[
                "sh",
                "-c",
                &format!("setpriv --bounding-set=-all --inh-caps=-all {program} {verb} {flags}"),
            ])
            .unwrap();
        assert_eq!(outcome.code, Some(2), "{}", outcome.all());
        assert!(outcome.stderr.contains("CAP_NET_ADMIN"), "{}", outcome.all());
    }
    assert_eq!(lab.spoke.ok(&["nft", "list", "ruleset"]).unwrap(), "");
    assert!(guard.says(0, &["confirm"]).contains("nothing waits"), "no rollback is left armed");
    guard.says(1, &["plan"]);
}

/// Runs a command where every nft on this machine is hidden.
pub(crate) fn without_nft(command: &str) -> String {
    format!(
        "exec unshare -m sh -c 'set -e
           touch /run/sshd/nothing; chmod 0 /run/sshd/nothing
           for nft in /usr/sbin/nft /usr/local/sbin/nft /usr/local/bin/nft /usr/bin/nft /run/current-system/sw/bin/nft; do
             if test -e $nft; then mount --bind /run/sshd/nothing $nft; fi
           done
           exec {command}'"
    )
}
