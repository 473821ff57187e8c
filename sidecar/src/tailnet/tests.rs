//! Files as people write them, and what becomes of them.

use std::net::IpAddr;

use ipnet::IpNet;
use proptest::prelude::*;

use super::*;
use crate::terms::{Port, Proto};

fn access(rules: &str) -> Access {
    let text = format!(
        r#"{{ "groups": {{ "group:ops": ["alice@example.com"] }}, "hosts": {{ "hub": "100.64.0.1", "lan": "10.0.0.0/8" }},
        "ipsets": {{ "ipset:loop": ["ipset:loop"] }}, {rules} }}"#
    );
    read(&text, "acl.hujson").unwrap_or_else(|mistakes| panic!("{mistakes}"))
}

fn server() -> Node {
    Node { tags: vec!["tag:server".into()], ..Node::default() }
}

fn device() -> Node {
    let addresses =
        vec!["100.64.0.16".parse().expect("an address"), "fd7a:115c:a1e0::16".parse().expect("one")];
    Node { user: Some("alice@example.com".into()), addresses, ..Node::default() }
}

fn wanted() -> Wanted {
    Wanted { ports: Vec::new(), ssh: Port::new(22).expect("a port") }
}

/// "tcp 22 from ..." a line, then what was left out.
fn said(rules: &str, node: &Node) -> String {
    let mirror = mirror(&access(rules), node, None, &wanted());
    let allowed =
        mirror.allowed.iter().map(|((proto, port), guest)| format!("{proto} {port} from {}", guest.from));
    let left = mirror.left_out.iter().map(|left| format!("left out {}: {}", left.what, left.why));
    allowed.chain(left).collect::<Vec<_>>().join("\n")
}

#[test]
fn only_what_is_for_this_node_is_mirrored() {
    let rules = r#""acls": [{ "action": "accept", "src": ["hub"], "dst": ["tag:server:443", "tag:other:80", "hub:81"], "proto": "tcp" }]"#;
    assert_eq!(
        said(rules, &server()),
        "tcp 443 from 100.64.0.1\nleft out -> hub: its addresses are not known here: give --status, or the node's --address"
    );
    assert_eq!(said(rules, &device()), "");
    let rules =
        r#""grants": [{ "src": ["hub"], "dst": ["100.64.0.16", "autogroup:member"], "ip": ["udp:53"] }]"#;
    assert_eq!(said(rules, &device()), "udp 53 from 100.64.0.1");
}

#[test]
fn an_address_of_one_family_lets_in_one_family() {
    let rules = r#""grants": [{ "src": ["*"], "dst": ["fd7a:115c:a1e0::16"], "ip": ["tcp:80"] }]"#;
    assert_eq!(said(rules, &device()), "tcp 80 from fd7a:115c:a1e0::/48");
}

#[test]
fn what_is_not_certain_is_left_out_and_never_widened() {
    for (rule, why) in [
        (r#""src": ["tag:ci"], "dst": ["tag:server:80"]"#, "--status"),
        (r#""src": ["group:ops"], "dst": ["tag:server:80"]"#, "--status"),
        (r#""src": ["group:eng@example.com"], "dst": ["tag:server:80"]"#, "identity provider"),
        (r#""src": ["user:*@example.com"], "dst": ["tag:server:80"]"#, "--status"),
        (r#""src": ["autogroup:admin"], "dst": ["tag:server:80"]"#, "control server"),
        (r#""src": ["autogroup:danger-all"], "dst": ["tag:server:80"]"#, "by hand"),
        (r#""src": ["ipset:loop"], "dst": ["tag:server:80"]"#, "contain each other"),
        (r#""src": ["hub"], "dst": ["tag:server:*"]"#, "--ports"),
        (r#""src": ["hub"], "dst": ["tag:server:80"], "srcPosture": ["posture:x"]"#, "posture"),
        (r#""src": ["hub"], "dst": ["tag:server:80"], "onTuesdays": true"#, "onTuesdays"),
        (r#""src": ["hub"], "dst": ["svc:web:80"]"#, "not known here"),
    ] {
        let said = said(&format!(r#""acls": [{{ "action": "accept", {rule} }}]"#), &server());
        assert!(
            said.starts_with("left out ") && said.contains(why) && !said.contains('\n'),
            "{rule}: {said}"
        );
    }
    let whole = r#""defaultSrcPosture": ["posture:x"], "acls": [{ "action": "accept", "src": ["hub"], "dst": ["tag:server:80"] }]"#;
    assert!(said(whole, &server()).starts_with("left out "), "{}", said(whole, &server()));
}

#[test]
fn what_carries_no_packets_is_no_gap() {
    for rule in [
        r#""grants": [{ "src": ["hub"], "dst": ["tag:server"], "app": { "x/y": [{}] } }]"#,
        r#""acls": [{ "action": "accept", "src": ["hub"], "dst": ["tag:server:*"], "proto": "icmp" }]"#,
        r#""acls": [{ "action": "accept", "src": ["hub"], "dst": ["autogroup:internet:*"] }]"#,
        r#""acls": [{ "action": "accept", "src": ["autogroup:member"], "dst": ["autogroup:self:22"] }]"#,
    ] {
        assert_eq!(said(rule, &server()), "", "{rule}");
    }
}

#[test]
fn everybody_of_a_domain_is_a_source() {
    let status = r#"{ "Peer": { "a": { "UserID": 1, "TailscaleIPs": ["100.64.0.21"] }, "b": { "UserID": 2, "TailscaleIPs":
        ["100.64.0.22"] }, "c": { "UserID": 1, "TailscaleIPs": ["100.64.0.23"], "Tags": ["tag:x"] } },
        "User": { "1": { "LoginName": "Alice@Example.com" }, "2": { "LoginName": "bob@other.example" } } }"#;
    let status = Status::from_json(status).expect("a status");
    let rules =
        r#""acls": [{ "action": "accept", "src": ["user:*@example.com"], "dst": ["tag:server:80"] }]"#;
    let mirror = mirror(&access(rules), &server(), Some(&status), &wanted());
    let from = &mirror.allowed[&(Proto::Tcp, 80)].from;
    assert_eq!(from.to_string(), "100.64.0.21", "nobody of another domain, and no tagged node");
}

#[test]
fn wide_rules_are_cut_to_the_ports_that_the_node_serves() {
    let rules = r#""acls": [{ "action": "accept", "src": ["hub"], "dst": ["tag:server:1000-60000"] }]"#;
    let ports = [(Proto::Tcp, 19999), (Proto::Tcp, 80)];
    let ports = ports.map(|(proto, port)| (proto, Port::new(port).expect("a port"))).to_vec();
    let mirror = mirror(&access(rules), &server(), None, &Wanted { ports, ..wanted() });
    assert_eq!(mirror.allowed.keys().copied().collect::<Vec<_>>(), [(Proto::Tcp, 19999)]);
    assert!(mirror.left_out.is_empty(), "{mirror:?}");
}

/// Outcomes in the order of the file: p, f, or u.
fn tried(text: &str, node: &Node) -> String {
    let access = access(text);
    let mirror = mirror(&access, node, None, &wanted());
    let letter = |trial: &Trial| match trial.outcome {
        Outcome::Passed => 'p',
        Outcome::Failed(_) => 'f',
        Outcome::Unclear(_) => 'u',
    };
    trials(&access, &mirror, node, None).iter().map(letter).collect()
}

#[test]
fn the_files_own_tests_pass_fail_or_stay_open() {
    let rules = r#""acls": [{ "action": "accept", "src": ["group:ops", "hub"], "dst": ["tag:server:22", "lan:80"] }],"#;
    for (test, outcome) in [
        (r#""src": "alice@example.com", "accept": ["tag:server:22"], "deny": ["tag:server:80"]"#, "pp"),
        (r#""src": "hub", "accept": ["tag:server:22"], "deny": ["tag:server:80"]"#, "pp"),
        (r#""src": "mallory@example.com", "accept": ["tag:server:22"]"#, "u"),
        (r#""src": "tag:web", "accept": ["tag:server:23"]"#, "f"),
        (r#""src": "group:ops", "deny": ["10.1.2.3:80"]"#, "f"),
        (r#""src": "hub", "accept": ["10.1.2.3:80"], "deny": ["11.1.2.3:80"]"#, "pp"),
        (r#""src": "100.64.0.77", "deny": ["10.1.2.3:80"]"#, "u"),
        (r#""user": "hub", "allow": ["tag:db:22"]"#, "f"),
    ] {
        let text = format!(r#"{rules} "tests": [{{ {test} }}]"#);
        assert_eq!(tried(&text, &server()), outcome, "{test}");
    }
}

#[test]
fn the_compiled_filter_tells_wider_from_narrower() {
    let rules = r#""acls": [{ "action": "accept", "src": ["*"], "dst": ["tag:server:80"], "proto": "tcp" },
        { "action": "accept", "src": ["hub"], "dst": ["tag:server:443"], "proto": "tcp" }]"#;
    let mirror = mirror(&access(rules), &server(), None, &wanted());
    let rule = |src: &str, first: u16, last: u16| {
        format!(
            r#"{{ "SrcIPs": [{src}], "DstPorts": [{{ "IP": "100.64.0.16", "Ports": {{ "First": {first}, "Last": {last} }} }}], "IPProto": [6] }}"#
        )
    };
    let carved = r#""100.64.0.0-100.115.91.255", "100.115.94.0-100.127.255.255", "fd7a:115c:a1e0::/48""#;
    let same = format!("[{}, {}]", rule(carved, 80, 80), rule(r#""100.64.0.1""#, 443, 443));
    let told = |text: &str| compare(&mirror, &Filter::from_json(text).expect("a filter"), &server(), &[]);
    assert_eq!(told(&same), []);
    let other = format!("[{}, {}]", rule(carved, 80, 80), rule(r#""100.64.0.2""#, 443, 445));
    let net = |text: &str| vec![text.parse::<IpNet>().expect("a prefix")];
    assert_eq!(
        told(&other),
        [
            Difference {
                proto: Proto::Tcp,
                first: 443,
                last: 443,
                wider: net("100.64.0.1/32"),
                narrower: net("100.64.0.2/32")
            },
            Difference {
                proto: Proto::Tcp,
                first: 444,
                last: 445,
                wider: vec![],
                narrower: net("100.64.0.2/32")
            },
        ]
    );
    assert!(Filter::from_json("{}").is_err() && Filter::from_json(r#"[{"SrcIPs":["x"]}]"#).is_err());
}

#[test]
fn the_policy_that_is_written_is_one_that_is_read_and_says_the_same() {
    let rules = r#""acls": [{ "action": "accept", "src": ["hub", "*"], "dst": ["tag:server:80,443"], "proto": "tcp" },
        { "action": "accept", "src": ["hub"], "dst": ["tag:server:22,53,9984"] }]"#;
    let mirror = mirror(&access(rules), &server(), None, &wanted());
    let heading = Heading { file: "evil\nversion = 2", name: "node", status: None };
    let text = mirror.policy(&server(), &wanted(), &heading);
    let today = jiff::civil::date(2026, 11, 21);
    let loaded =
        crate::policy::parse(&text, "written", today).unwrap_or_else(|mistakes| panic!("{text}\n{mistakes}"));
    let services: Vec<String> =
        loaded.policy.services.iter().map(|s| format!("{} {:?} {:?}", s.name, s.tcp, s.udp)).collect();
    assert_eq!(services, ["port-53 [53] [53]", "tcp-80-443 [80, 443] []"]);
    assert_eq!(loaded.policy.services[1].from, crate::policy::Sources::Mesh);
    let hub: IpAddr = [100, 64, 0, 1].into();
    assert_eq!(loaded.policy.ssh.from, crate::policy::Sources::Prefixes(vec![hub.into()]));
}

proptest! {
    #[test]
    fn no_file_makes_it_panic(text in "[\\[\\]{}:,\"a-z0-9.*/ -]{0,200}") {
        if let Ok(access) = read(&text, "x") {
            let mirror = mirror(&access, &server(), None, &wanted());
            trials(&access, &mirror, &server(), None);
        }
        let _ = Status::from_json(&text);
        let _ = Filter::from_json(&text);
    }

    #[test]
    fn no_rule_makes_it_panic(src in "[a-z:.*0-9/-]{1,12}", dst in "[a-z:.*0-9/-]{1,12}", ip in "[a-z:*0-9-]{1,9}") {
        let text = format!(r#"{{ "acls": [{{ "action": "accept", "src": ["{src}"], "dst": ["{dst}:{ip}"] }}],
            "grants": [{{ "src": ["{src}"], "dst": ["{dst}"], "ip": ["{ip}"] }}], "tests": [{{ "src": "{src}", "accept": ["{dst}:{ip}"] }}] }}"#);
        if let Ok(access) = read(&text, "x") {
            let mirror = mirror(&access, &device(), None, &wanted());
            trials(&access, &mirror, &device(), None);
        }
    }
}
