//! `spokeguard audit TARGET...` beside a real nmap on the same path, and the command's faces and exit codes.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use lab::{
    Lab, Mesh, Need, Node, OUTSIDER, Outcome, SPOKE_MESH, SPOKE_PUBLIC, SPOKE_PUBLIC_V6, Shape, lacking,
    spokeguard,
};
use serde_json::Value;

const LIMIT: Duration = Duration::from_secs(60);

fn audit(node: &Node, words: &[&str]) -> Outcome {
    let program = spokeguard().unwrap().display().to_string();
    let words: Vec<&str> = [&*program, "audit"].into_iter().chain(words.iter().copied()).collect();
    node.run_within(LIMIT, &words).unwrap()
}

/// Every port's state, of one protocol of one target.
fn states(audit: &Value, address: IpAddr, proto: &str) -> BTreeMap<u16, String> {
    let targets = audit["targets"].as_array().unwrap();
    let target = targets.iter().find(|t| t["address"] == address.to_string()).expect("the target");
    let of =
        target["protocols"].as_array().unwrap().iter().find(|p| p["proto"] == proto).expect("the protocol");
    let listed = of["ports"].as_array().unwrap();
    let others = of["others"]["count"].as_u64().unwrap();
    assert_eq!(listed.len() as u64 + others, of["scanned"].as_u64().unwrap());
    let mut out = BTreeMap::new();
    if others > 0 && of["scanned"] == 65_535 {
        out.extend((1..=65_535u16).map(|port| (port, of["others"]["state"].as_str().unwrap().to_owned())));
    }
    for port in listed {
        out.insert(port["port"].as_u64().unwrap() as u16, port["state"].as_str().unwrap().to_owned());
    }
    out
}

const CASES: &[(&str, &str)] = &[
    ("no firewall", ""),
    (
        "default drop",
        "table inet t { chain i { type filter hook input priority filter; policy drop;
         icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert } accept; tcp dport { 80, 443, 9000-9009 } accept; }; }",
    ),
    (
        "reject by reset, and a few dropped",
        "table inet t { chain i { type filter hook input priority filter;
         icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert } accept; tcp dport 443 accept;
         tcp dport { 22, 5432 } drop; meta l4proto tcp reject with tcp reset; }; }",
    ),
    (
        "reject by ICMP",
        "table inet t { chain i { type filter hook input priority filter;
         icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert } accept; tcp dport { 80, 443 } accept; tcp dport 7 reject with tcp reset;
         reject with icmpx admin-prohibited; }; }",
    ),
];

#[test]
fn all_ports_of_another_host_are_as_nmap_sees_them() {
    if lacking(&[Need::Lab, Need::Nmap, Need::Spokeguard]) {
        return;
    }
    let lab = Lab::shaped(Shape { mesh: Mesh::Plain, container: true });
    let _web = lab.spoke.web().unwrap();
    let _database = lab.spoke.listen("postgres", &["tcp/0.0.0.0:5432"]).unwrap();
    let _in_container = lab.container.as_ref().unwrap().listen("app", &["tcp/[::]:8000"]).unwrap();
    lab.publish(8080, 8000).unwrap();
    // nmap takes most of two minutes for all of it.
    let all = std::env::var_os("SPOKEGUARD_ALL").is_some();
    for (number, (name, rules)) in CASES.iter().enumerate() {
        lab.spoke.nft(&format!("add table inet t\ndelete table inet t\n{rules}")).unwrap();
        let (v4, v6) = (SPOKE_PUBLIC.to_string(), SPOKE_PUBLIC_V6.to_string());
        let found = audit(&lab.internet, &["--format", "json", "--tcp", &v4, &v6]);
        assert_eq!(found.code, Some(0), "{name}: {}", found.all());
        let found = found.json().unwrap();
        for (family, address) in [SPOKE_PUBLIC, SPOKE_PUBLIC_V6].into_iter().enumerate() {
            if !all && number % 2 != family {
                continue;
            }
            let ours = states(&found, address, "tcp");
            let mut theirs = lab.internet.nmap_states(address, "1-65535").unwrap();
            // At that pace nmap loses answers; it gets a second and a third look at what is in dispute.
            for _ in 0..3 {
                let disputed = ours.iter().filter(|(port, state)| theirs[port] != **state);
                let disputed: Vec<String> = disputed.map(|(port, _)| port.to_string()).collect();
                if !disputed.is_empty() {
                    theirs.extend(lab.internet.nmap_states(address, &disputed.join(",")).unwrap());
                }
            }
            let wrong: Vec<_> =
                ours.iter().filter(|(port, state)| theirs[port] != **state).take(20).collect();
            assert!(wrong.is_empty() && ours.len() == 65_535, "{name}, {address}: {wrong:?}");
        }
    }
}

#[test]
fn the_same_ports_are_found_where_packets_get_lost() {
    if lacking(&[Need::Lab, Need::Spokeguard]) {
        return;
    }
    let lab = Lab::plain();
    let _web = lab.spoke.web().unwrap();
    let _more = lab.spoke.listen("more", &["tcp/[::]:40000+4"]).unwrap();
    lose(&lab, "", 5);
    let guarded = "table inet t { chain i { type filter hook input priority filter; policy drop;
         icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert } accept; tcp dport { 80, 443, 40000-40004 } accept; }; }";
    for (rules, others) in [("", "closed"), (guarded, "filtered")] {
        lab.spoke.nft(&format!("add table inet t\ndelete table inet t\n{rules}")).unwrap();
        for _ in 0..3 {
            assert_found(&lab, &[80, 443, 40000, 40001, 40002, 40003, 40004], others);
        }
    }
    // Linux answers the same SYN twice at most, then not for half a second.
    lab.spoke.nft("delete table inet t").unwrap();
    let five_answers = 5 * 44 + 10;
    lab.internet
        .nft(&format!(
            "table netdev unlucky {{ chain u {{ type filter hook ingress device spoke0 priority 1;
             tcp sport 443 tcp flags & (syn | ack) == syn | ack quota until {five_answers} bytes counter drop; }}; }}"
        ))
        .unwrap();
    assert_found(&lab, &[80, 443, 40000, 40001, 40002, 40003, 40004], "closed");
    let lost = lab.internet.ok(&["nft", "list", "table", "netdev", "unlucky"]).unwrap();
    assert!(lost.contains("counter packets 5 "), "{lost}");
}

#[test]
fn what_a_bad_path_leaves_open_is_said() {
    if lacking(&[Need::Lab, Need::Spokeguard]) {
        return;
    }
    let lab = Lab::plain();
    let _web = lab.spoke.web().unwrap();
    let target = SPOKE_PUBLIC.to_string();
    let scan =
        || audit(&lab.internet, &["--format", "json", "--tcp", "--ports", "80,443,1001-2000", &target]);
    let counted = |audit: &Value| {
        let of = &audit["targets"][0]["protocols"][0];
        let mut out: BTreeMap<String, u64> = BTreeMap::new();
        for port in of["ports"].as_array().unwrap() {
            *out.entry(port["state"].as_str().unwrap().to_owned()).or_default() += 1;
        }
        *out.entry(of["others"]["state"].as_str().unwrap().to_owned()).or_default() +=
            of["others"]["count"].as_u64().unwrap();
        (out, of["effort"].clone())
    };
    let good = scan();
    let (found, effort) = counted(&good.json().unwrap());
    assert_eq!((good.code, &found["open"], &found["closed"]), (Some(0), &2, &1000), "{}", good.all());
    assert!(effort["loss"].as_f64().unwrap() < 0.5 && effort["sent"].as_u64() >= Some(1002), "{effort}");
    lose(&lab, "ip protocol tcp", 70);
    let bad = scan();
    let audit = bad.json().unwrap();
    let (found, effort) = counted(&audit);
    // No rule filters, so nothing is called filtered; what was not heard is not known.
    assert_eq!((bad.code, audit["verdict"].as_str()), (Some(2), Some("unknown")), "{}", bad.all());
    assert!(!found.contains_key("filtered") && found["unknown"] > 0 && found["closed"] > 0, "{found:?}");
    let reason = audit["blind"][0]["reason"].as_str().unwrap();
    assert!(reason.contains("of 100 probes or their answers got lost"), "{reason}");
    assert!(effort["loss"].as_f64() > Some(0.5) && effort["passes"].as_u64() >= Some(10), "{effort}");
}

#[test]
fn a_host_that_is_not_there_is_not_called_filtered() {
    if lacking(&[Need::Lab, Need::Spokeguard]) {
        return;
    }
    let lab = Lab::plain();
    let there = SPOKE_PUBLIC.to_string();
    let drop_all = |but: &str| {
        lab.spoke
            .nft(&format!(
                "add table inet t\ndelete table inet t\n
                 table inet t {{ chain i {{ type filter hook input priority filter; policy drop; {but} }}; }}"
            ))
            .unwrap();
    };
    drop_all("icmp type echo-request accept;");
    let asked = |what: &str, target: &str| audit(&lab.internet, &[what, "--ports", "1-300", target]);
    for (protocol, says) in
        [("--tcp", "All 300 tcp ports filtered"), ("--udp", "All 300 udp ports open|filtered")]
    {
        let silent = asked(protocol, &there);
        assert_eq!(silent.code, Some(0), "{}", silent.all());
        assert!(silent.stdout.contains(says), "{}", silent.stdout);
    }
    drop_all("");
    let neighbour = there.replace(".7", ".77");
    for target in [&there, &neighbour] {
        let nothing = asked("--tcp", target);
        assert_eq!(nothing.code, Some(2), "{}", nothing.all());
        let said = nothing.stdout.split_whitespace().collect::<Vec<_>>().join(" ");
        let why = "no port answered, nor did an echo request: a host that is down looks like one that drops everything";
        assert!(said.contains(&format!("tcp of {target}: {why}")), "{}", nothing.stdout);
    }
    // One that is there and one that isn't are told apart, in one run.
    drop_all("icmp type echo-request accept;");
    let both = audit(&lab.internet, &["--tcp", "--ports", "1-300", "--format", "json", &there, &neighbour]);
    let both = both.json().unwrap();
    let blind = both["blind"].as_array().unwrap();
    assert_eq!((blind.len(), &both["verdict"]), (1, &"unknown".into()), "{both}");
    assert!(blind[0]["reason"].as_str().unwrap().contains(&neighbour), "{both}");
}

/// Packets, or only these, get lost between the spoke and the internet, so many of a hundred each way.
fn lose(lab: &Lab, what: &str, percent: u32) {
    for (node, device) in [(&lab.spoke, "eth0"), (&lab.internet, "spoke0")] {
        node.nft(&format!(
            "table netdev lossy {{ chain l {{ type filter hook ingress device {device} priority 0;
             {what} numgen random mod 100 < {percent} drop; }}; }}"
        ))
        .unwrap();
    }
}

fn assert_found(lab: &Lab, open: &[u16], others: &str) {
    let outcome = audit(&lab.internet, &["--format", "json", "--tcp", &SPOKE_PUBLIC.to_string()]);
    let audit = outcome.json().unwrap();
    let found = states(&audit, SPOKE_PUBLIC, "tcp");
    let wanted = |port: &u16| if open.contains(port) { "open" } else { others };
    let wrong: Vec<_> = found.iter().filter(|(port, state)| *state != wanted(port)).take(20).collect();
    let effort = &audit["targets"][0]["protocols"][0]["effort"];
    assert!(
        wrong.is_empty() && found.len() == 65_535,
        "open {open:?}, others {others}, but {wrong:?}; effort {effort}, blind {}, exit {:?}",
        audit["blind"],
        outcome.code
    );
    assert_eq!(outcome.code, Some(0), "{}", audit["blind"]);
}

#[test]
fn udp_says_what_can_be_known_from_outside() {
    if lacking(&[Need::Lab, Need::Spokeguard]) {
        return;
    }
    let lab = Lab::plain();
    let _echo = lab.spoke.listen("echo", &["udp/[::]:53"]).unwrap();
    lab.spoke
        .nft("table inet t { chain i { type filter hook input priority 0; udp dport 500 drop; udp dport 501 reject with icmpx admin-prohibited; }; }")
        .unwrap();
    for address in [SPOKE_PUBLIC, SPOKE_PUBLIC_V6] {
        let words = ["--format", "json", "--udp", "--ports", "53,54,500,501", &address.to_string()];
        let found = states(&audit(&lab.internet, &words).json().unwrap(), address, "udp");
        let found: Vec<(u16, &str)> = found.iter().map(|(port, state)| (*port, state.as_str())).collect();
        assert_eq!(
            found,
            [(53, "open"), (54, "closed"), (500, "open|filtered"), (501, "filtered")],
            "{address}"
        );
    }
}

#[test]
fn a_spoke_is_compared_with_its_policy_from_afar() {
    if lacking(&[Need::Lab, Need::Spokeguard]) {
        return;
    }
    let lab = Lab::plain();
    let _web = lab.spoke.web().unwrap();
    let policy = lab.file("spoke.toml", &lab.policy()).unwrap().display().to_string();
    let target = SPOKE_PUBLIC.to_string();
    let expected = |more: &[&str]| {
        let words = [&["--expect", &*policy, "--tcp", &*target], more].concat();
        audit(&lab.internet, &words)
    };
    let fine = expected(&[]);
    assert_eq!(fine.code, Some(0), "{}", fine.all());
    assert!(fine.stdout.contains("As the policy says.") && fine.stderr.is_empty(), "{}", fine.all());
    let _database = lab.spoke.listen("postgres", &["tcp/0.0.0.0:5432"]).unwrap();
    lab.spoke
        .nft("table inet t { chain i { type filter hook input priority 0; tcp dport 443 drop; }; }")
        .unwrap();
    let bad = expected(&["--format", "json"]);
    assert_eq!(bad.code, Some(1), "{}", bad.all());
    let bad = bad.json().unwrap();
    let spot = |list: &str| {
        let all = bad[list].as_array().unwrap().iter();
        all.map(|s| format!("{}/{}:{}", s["proto"], s["address"], s["port"])).collect::<Vec<_>>()
    };
    assert_eq!((bad["verdict"].as_str(), bad["vantage"].as_str()), (Some("drift"), Some("remote")));
    assert_eq!(spot("exposed"), [format!("\"tcp\"/\"{target}\":5432")]);
    assert_eq!(spot("missing"), [format!("\"tcp\"/\"{target}\":443")]);
    // Nobody there, no route, no such name, a policy that is none.
    let deaf = audit(&lab.internet, &["--tcp", "--ports", "80", "192.0.2.200"]);
    assert_eq!(deaf.code, Some(2), "{}", deaf.all());
    assert!(deaf.stdout.contains("no route to 192.0.2.200"), "{}", deaf.all());
    for wrong in [
        &["no.such.name.invalid"][..],
        &["--expect", "/no/such/file", &target],
        &["--ports", "0", &target],
        &["--expect", &policy],
        &["--address", &target, &target],
    ] {
        let outcome = audit(&lab.internet, wrong);
        assert_eq!((outcome.code, outcome.stdout.as_str()), (Some(2), ""), "{wrong:?}: {}", outcome.all());
    }
}

#[test]
fn without_the_right_to_make_packets_ordinary_connections_do() {
    if lacking(&[Need::Lab, Need::Spokeguard]) {
        return;
    }
    let lab = Lab::plain();
    let _web = lab.spoke.web().unwrap();
    let _echo = lab.spoke.listen("echo", &["udp/[::]:53"]).unwrap();
    lab.spoke
        .nft("table inet t { chain i { type filter hook input priority 0; tcp dport 22 drop; }; }")
        .unwrap();
    // As root, but without its capabilities.
    let program = spokeguard().unwrap().display().to_string();
    for address in [SPOKE_PUBLIC, SPOKE_PUBLIC_V6] {
        let words =
            ["setpriv", "--bounding-set=-all", "--inh-caps=-all", &program, "audit", "--format", "json"];
        let target = address.to_string();
        let words = [&words[..], &["--ports", "22,80,81,53", &target]].concat();
        let outcome = lab.internet.run_within(LIMIT, &words).unwrap();
        assert_eq!(outcome.code, Some(0), "{}", outcome.all());
        let found = outcome.json().unwrap();
        let tcp = states(&found, address, "tcp");
        let of = |port: u16| tcp[&port].as_str();
        assert_eq!((of(22), of(80), of(81), of(53)), ("filtered", "open", "closed", "closed"));
        assert_eq!(states(&found, address, "udp")[&53], "open");
    }
}

#[test]
fn nmaps_xml_is_valid_by_nmaps_own_definition() {
    if lacking(&[Need::Lab, Need::Nmap, Need::Xmllint, Need::Spokeguard]) {
        return;
    }
    let lab = Lab::plain();
    let _web = lab.spoke.web().unwrap();
    let _odd = lab.spoke.listen("a<b>&\"c'", &["tcp/0.0.0.0:5432"]).unwrap();
    let policy = lab.file("spoke.toml", &lab.policy()).unwrap().display().to_string();
    let remote = audit(&lab.internet, &["--format", "xml", &SPOKE_PUBLIC.to_string(), "--ports", "1-6000"]);
    let local = audit(&lab.spoke, &["--format", "xml", "--policy", &policy, "--ports", "1-6000"]);
    let definition = "/usr/share/nmap/nmap.dtd";
    for (name, outcome) in [("remote.xml", remote), ("local.xml", local)] {
        assert!(outcome.stdout.starts_with("<?xml"), "{}", outcome.all());
        assert!(outcome.stdout.contains("portid=\"443\"><state state=\"open\""), "{}", outcome.all());
        let file = lab.file(name, &outcome.stdout).unwrap().display().to_string();
        lab.spoke.ok(&["xmllint", "--noout", "--nonet", "--dtdvalid", definition, &file]).unwrap();
    }
}

#[test]
fn pythons_libnmap_reads_the_xml() {
    if lacking(&[Need::Lab, Need::Spokeguard, Need::Libnmap]) {
        return;
    }
    let lab = Lab::plain();
    let _web = lab.spoke.web().unwrap();
    let _dns = lab.spoke.listen("a<b>&", &["udp/0.0.0.0:53"]).unwrap();
    let both = [SPOKE_PUBLIC.to_string(), SPOKE_PUBLIC_V6.to_string()];
    let ports = ["--format", "xml", "--ports", "22,53,80,443"];
    let outside = audit(&lab.internet, &[&ports[..], &[&both[0], &both[1]]].concat());
    let inside = audit(&lab.spoke, &[&ports[..], &["--no-policy", "--interface", "eth0"]].concat());
    let script = "import sys
from libnmap.parser import NmapParser
report = NmapParser.parse_fromfile(sys.argv[1])
assert report.hosts_up == 2, report.summary
for host in report.hosts:
    for service in host.services:
        print(host.address, service.port, service.protocol, service.state, service.service)
";
    for (name, outcome) in [("outside.xml", outside), ("inside.xml", inside)] {
        let file = lab.file(name, &outcome.stdout).unwrap().display().to_string();
        let python = lab::python().display().to_string();
        let read = lab.spoke.ok(&[&*python, "-c", script, &file]).unwrap();
        for address in &both {
            for line in ["80 tcp open http", "443 tcp open https", "22 tcp closed ssh"] {
                assert!(read.contains(&format!("{address} {line}\n")), "{name}: {address} {line}: {read}");
            }
        }
        assert!(read.contains(&format!("{} 53 udp open domain\n", both[0])), "{name}: {read}");
        // Each of four ports, once for each protocol and address.
        assert_eq!(read.lines().count(), 16, "{name}: {read}");
    }
}

#[test]
fn this_host_is_seen_as_strangers_see_it() {
    if lacking(&[Need::Lab, Need::Spokeguard]) {
        return;
    }
    let lab = Lab::plain();
    let _web = lab.spoke.web().unwrap();
    let policy = lab.file("spoke.toml", &lab.policy()).unwrap().display().to_string();
    let run = |more: &[&str]| audit(&lab.spoke, &[&["--policy", &*policy], more].concat());
    // The mesh address answers strangers at the web's ports until a rule stops that.
    let leak = run(&["--format", "json"]);
    assert_eq!(leak.code, Some(1), "{}", leak.all());
    let exposed = leak.json().unwrap()["exposed"].clone();
    assert!(
        exposed.as_array().unwrap().iter().all(|s| s["address"] != SPOKE_PUBLIC.to_string()),
        "{exposed}"
    );
    assert!(exposed.as_array().unwrap().iter().any(|s| s["address"] == SPOKE_MESH.to_string()), "{exposed}");
    lab.spoke
        .nft("table inet t { chain i { type filter hook input priority 0; iifname eth0 ip daddr 10.84.0.0/24 drop;
              iifname eth0 ip6 daddr fd84::/64 drop; }; }")
        .unwrap();
    let fine = run(&[]);
    assert_eq!(fine.code, Some(0), "{}", fine.all());
    let _database = lab.spoke.listen("postgres", &["tcp/0.0.0.0:5432"]).unwrap();
    let bad = run(&["--tcp"]);
    assert_eq!(bad.code, Some(1), "{}", bad.all());
    assert!(bad.stdout.contains(&format!("Exposed: tcp/{SPOKE_PUBLIC}:5432")), "{}", bad.all());
    assert!(
        bad.stdout.lines().any(|l| l.starts_with("5432/tcp") && l.contains("postgres (")),
        "{}",
        bad.all()
    );
    // Only for some.
    lab.spoke.nft(&format!("add rule inet t i ip saddr != {OUTSIDER} tcp dport 5432 drop")).unwrap();
    let held = run(&["--tcp", "--address", &SPOKE_PUBLIC.to_string()]);
    assert_eq!(held.code, Some(0), "{}", held.all());
    let words: Vec<&str> = held.stdout.split_whitespace().collect();
    assert!(words.join(" ").contains(&format!("open to {OUTSIDER}")), "{}", held.all());
    let as_friend =
        run(&["--tcp", "--address", &SPOKE_PUBLIC.to_string(), "--source", &OUTSIDER.to_string()]);
    assert_eq!(as_friend.code, Some(1), "{}", as_friend.all());
    // Nothing to compare with; nothing to say where nothing can arrive.
    let bare = audit(&lab.spoke, &["--no-policy", "--ports", "80"]);
    assert_eq!(bare.code, Some(0), "{}", bare.all());
    lab.spoke.sh("ip link set wg0 down").unwrap();
    for (more, says) in [
        (&["--interface", "wg0"][..], "wg0 is down"),
        (&["--interface", "nope"], "there is no interface nope"),
        (&["--interface", "lo"], "loopback"),
    ] {
        let outcome = run(more);
        assert_eq!(outcome.code, Some(2), "{}", outcome.all());
        assert!(outcome.all().contains(says), "{says}: {}", outcome.all());
    }
    let other = audit(&lab.spoke, &["--policy", "/no/such/file"]);
    assert_eq!(other.code, Some(2), "{}", other.all());
    // nmap's format is for audits.
    let wrong = lab.spoke.spokeguard(&["check", "--format", "xml", "--policy", &policy]).unwrap();
    assert_eq!((wrong.code, wrong.stdout.as_str()), (Some(2), ""), "{}", wrong.all());
}
