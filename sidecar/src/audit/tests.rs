use expect_test::{Expect, expect};

use super::*;
use crate::diff::stage::{Stage, chain, dnat, dport, exception, ip, link, now, port, table};
use crate::observed::{Gap, Reading};
use crate::ruleset::{Hook, Statement, TableFamily};
use crate::terms::Scope;

const OUTSIDER: &str = "185.1.199.199";

/// A sweep of one address through eth0: `fates` in the order of the ports from 1; the
/// listed ones differ.
fn sweep(address: &str, proto: Proto, usual: Fate, listed: &[(u16, Fate)]) -> Sweep {
    let source = if address.contains(':') { "2a0d:5600:5ca1::c7" } else { OUTSIDER };
    let fates = (1..=60_000u16).map(|number| {
        let fate = listed.iter().find(|(n, _)| *n == number).map(|(_, fate)| fate.clone());
        (port(number), fate.unwrap_or(usual.clone()))
    });
    Sweep {
        interface: "eth0".into(),
        address: ip(address),
        proto,
        source: ip(source),
        fates: fates.collect(),
        unproven: Vec::new(),
    }
}

fn here(address: &str, number: u16) -> Fate {
    Fate::Delivered { address: ip(address), port: port(number) }
}

/// The two wanted ports get through at 203.0.113.7 and 2001:db8:7::7, and nothing else.
fn good() -> Vec<Sweep> {
    ["203.0.113.7", "2001:db8:7::7"]
        .map(|address| {
            sweep(address, Proto::Tcp, Fate::Dropped, &[(80, here(address, 80)), (443, here(address, 443))])
        })
        .to_vec()
}

fn audit(stage: Stage, sweeps: &[Sweep]) -> Audit {
    let (desired, snapshot) = stage.set();
    Audit::outside_in(sweeps, &View::of(&desired, &snapshot), now(), 0.2)
}

fn shown(audit: &Audit, expected: Expect) {
    expected.assert_eq(&audit.to_text(80, false));
}

/// Port, state, wanted and reason of a listed port.
fn line(audit: &Audit, address: &str, number: u16) -> String {
    let target = audit.targets.iter().find(|t| t.address == ip(address)).expect("a target");
    let mut all = target.protocols.iter().flat_map(|p| &p.ports);
    let Some(found) = all.find(|p| p.port == port(number)) else { return "not listed".into() };
    let PortState { state, wanted, reason, by, .. } = found;
    let by = by.as_ref().map_or("nobody", |actor| &actor.process);
    format!("{} {} {by}: {reason}", state.name(), wanted.map_or("-", |w| w.name()))
}

#[test]
fn a_spoke_as_its_policy_says_is_ok_and_every_port_is_accounted_for() {
    let audit = audit(Stage::spoke(), &good());
    assert_eq!((audit.verdict, audit.exit_code()), (Verdict::Ok, 0));
    assert!(audit.exposed.is_empty() && audit.missing.is_empty() && audit.blind.is_empty());
    for protocol in audit.targets.iter().flat_map(|t| &t.protocols) {
        assert_eq!(protocol.scanned, 60_000);
        assert_eq!(protocol.ports.len() as u32 + protocol.others.count, protocol.scanned);
        assert_eq!(protocol.others.state, State::Filtered);
    }
    shown(
        &audit,
        expect![[r#"
        203.0.113.7 on eth0, as 185.1.199.199 would see it
        59,998 tcp ports filtered
        PORT     STATE  SERVICE  WANTED  BY           WHY
        80/tcp   open   http     open    nginx (812)  syn-ack
        443/tcp  open   https    open    nginx (812)  syn-ack

        2001:db8:7::7 on eth0, as 2a0d:5600:5ca1::c7 would see it
        59,998 tcp ports filtered
        PORT     STATE   SERVICE  WANTED  BY           WHY
        80/tcp   open    http     open    nginx (812)  syn-ack
        443/tcp  closed  https    open    -            reset

        As the policy says. 120,000 ports of 2 addresses in 0.20 s.
    "#]],
    );
}

#[test]
fn an_open_port_that_nobody_wants_is_exposed_and_one_that_is_held_back_is_not() {
    let stage = || Stage::spoke().listens("tcp 0.0.0.0:5432 postgres");
    let fine = audit(stage(), &good());
    assert_eq!(fine.verdict, Verdict::Ok);
    // Somebody waits there, so it is worth a line.
    assert_eq!(
        line(&fine, "203.0.113.7", 5432),
        "filtered closed postgres: no-response; dropped by spokeguard's tc guard: public-tcp"
    );
    assert_eq!(line(&fine, "2001:db8:7::7", 5432), "not listed");

    let mut sweeps = good();
    sweeps[0].fates[5431].1 = here("203.0.113.7", 5432);
    let audit = audit(stage(), &sweeps);
    assert_eq!((audit.verdict, audit.exit_code()), (Verdict::Drift, 1));
    let spot = Spot { address: ip("203.0.113.7"), proto: Proto::Tcp, port: port(5432) };
    assert_eq!((audit.exposed.as_slice(), audit.missing.len()), ([spot].as_slice(), 0));
    shown(
        &audit,
        expect![[r#"
        203.0.113.7 on eth0, as 185.1.199.199 would see it
        59,997 tcp ports filtered
        PORT      STATE  SERVICE     WANTED  BY              WHY
        80/tcp    open   http        open    nginx (812)     syn-ack
        443/tcp   open   https       open    nginx (812)     syn-ack
        5432/tcp  open   postgresql  closed  postgres (812)  syn-ack

        2001:db8:7::7 on eth0, as 2a0d:5600:5ca1::c7 would see it
        59,998 tcp ports filtered
        PORT     STATE   SERVICE  WANTED  BY           WHY
        80/tcp   open    http     open    nginx (812)  syn-ack
        443/tcp  closed  https    open    -            reset

        Exposed: tcp/203.0.113.7:5432
        Differs from the policy. 120,000 ports of 2 addresses in 0.20 s.
    "#]],
    );
}

#[test]
fn what_gets_through_to_no_socket_is_closed_and_not_exposed() {
    let mut sweeps = good();
    sweeps[0].fates[8079].1 = here("203.0.113.7", 8080);
    let audit = audit(Stage::spoke(), &sweeps);
    assert_eq!(line(&audit, "203.0.113.7", 8080), "closed closed nobody: reset");
    assert_eq!(audit.verdict, Verdict::Ok);
}

#[test]
fn only_a_socket_that_answers_there_makes_a_port_open() {
    for (listens, state) in [
        ("tcp 203.0.113.7:8080 app", "open"),
        ("tcp 127.0.0.1:8080 app", "closed"),
        ("tcp 10.84.0.16:8080 app", "closed"),
        ("tcp [::]:8080 app", "open"),
        ("udp 0.0.0.0:8080 app", "closed"),
    ] {
        let mut sweeps = good();
        sweeps[0].fates[8079].1 = here("203.0.113.7", 8080);
        let found = line(&audit(Stage::spoke().listens(listens), &sweeps), "203.0.113.7", 8080);
        assert!(found.starts_with(state), "{listens}: {found}");
    }
    // A socket of another device takes nothing that comes in here.
    let mut stage = Stage::spoke().listens("tcp 0.0.0.0:8080 app");
    stage.listeners().last_mut().expect("a listener").device = Some(3);
    let mut sweeps = good();
    sweeps[0].fates[8079].1 = here("203.0.113.7", 8080);
    assert!(line(&audit(stage, &sweeps), "203.0.113.7", 8080).starts_with("closed"));
}

#[test]
fn redirects_and_containers_are_named() {
    let nat = table(
        TableFamily::Ip,
        "docker",
        chain(Hook::Prerouting, -100, false, vec![vec![dport(8443), dnat("172.17.0.2", 443)]]),
    );
    let mut sweeps = good();
    sweeps[0].fates[8442].1 = Fate::Forwarded { address: ip("172.17.0.2"), port: port(443) };
    sweeps[0].fates[8879].1 = here("203.0.113.7", 80);
    sweeps[0].fates[8880].1 = here("203.0.113.7", 81);
    sweeps[0].fates[8881].1 = here("127.0.0.1", 9000);
    let stage = Stage::spoke().foreign(nat).listens("tcp 127.0.0.1:9000 php");
    let audit = audit(stage, &sweeps);
    let of = |number| line(&audit, "203.0.113.7", number);
    assert_eq!(of(8443), "open closed nobody: forwarded; dnat to 172.17.0.2:443");
    assert_eq!(of(8880), "open closed nginx: syn-ack; redirected to port 80");
    assert_eq!(of(8881), "closed closed nobody: reset; redirected to port 81");
    assert_eq!(of(8882), "open closed php: syn-ack; dnat to 127.0.0.1:9000");
    assert_eq!(audit.exposed.len(), 3);
}

#[test]
fn states_of_probes_follow_nmap() {
    let icmp = |icmp_type, code| Fate::Unreachable { icmp_type, code };
    for (proto, fate, wanted) in [
        (Proto::Tcp, Fate::Reset, "closed closed nobody: reset"),
        (Proto::Tcp, icmp(3, 3), "filtered closed nobody: port-unreach"),
        (Proto::Tcp, icmp(3, 13), "filtered closed nobody: admin-prohibited"),
        (Proto::Udp, icmp(3, 3), "closed closed nobody: port-unreach"),
        (Proto::Udp, icmp(3, 1), "filtered closed nobody: host-unreach"),
        (Proto::Udp, here("203.0.113.7", 9), "closed closed nobody: port-unreach"),
        (Proto::Udp, here("203.0.113.7", 514), "open closed rsyslogd: udp-response; redirected to port 514"),
        (Proto::Tcp, Fate::Answered, "open closed nobody: syn-ack; answered"),
        (Proto::Tcp, Fate::Lost, "unknown closed nobody: unknown; the probe was not seen to arrive"),
    ] {
        let mut sweeps = [sweep("203.0.113.7", proto, Fate::Dropped, &[(9, fate.clone())])];
        // Few ports are listed one by one.
        sweeps[0].fates.truncate(9);
        let found =
            line(&audit(Stage::spoke().listens("udp 0.0.0.0:514 rsyslogd"), &sweeps), "203.0.113.7", 9);
        assert!(found.starts_with(wanted), "{proto} {fate:?}: {found}");
    }
}

#[test]
fn a_wanted_port_that_a_rule_holds_back_is_missing_and_the_rule_is_named() {
    let foreign = table(
        TableFamily::Inet,
        "ufw",
        chain(Hook::Input, 0, false, vec![vec![dport(443), Statement::Drop]]),
    );
    let mut sweeps = good();
    sweeps[0].fates[442].1 = Fate::Dropped;
    let audit = audit(Stage::spoke().foreign(foreign), &sweeps[..1]);
    let found = line(&audit, "203.0.113.7", 443);
    assert!(found.starts_with("filtered open nginx: no-response; dropped by inet ufw"), "{found}");
    let spot = Spot { address: ip("203.0.113.7"), proto: Proto::Tcp, port: port(443) };
    assert_eq!((audit.missing.as_slice(), audit.verdict), ([spot].as_slice(), Verdict::Drift));
}

#[test]
fn a_wanted_port_where_nobody_listens_is_missing_only_if_nobody_does_anywhere() {
    // nginx takes 443 on IPv4 only.
    assert_eq!(line(&audit(Stage::spoke(), &good()), "2001:db8:7::7", 443), "closed open nobody: reset");
    assert!(audit(Stage::spoke(), &good()).missing.is_empty());
    let mut stage = Stage::spoke();
    stage.listeners().retain(|l| l.port != port(443));
    assert_eq!(audit(stage, &good()).missing.len(), 2);
}

#[test]
fn an_exception_is_listed_and_changes_nothing() {
    let mut sweeps = good();
    sweeps[0].fates[2221].1 = here("203.0.113.7", 2222);
    let stage = |until| {
        let hole = exception(2222, until);
        Stage::spoke().policy(|p| p.exceptions.push(hole)).listens("tcp 0.0.0.0:2222 sshd")
    };
    let holds = audit(stage(jiff::civil::date(2027, 1, 31)), &sweeps);
    assert_eq!((holds.verdict, holds.exposed.len()), (Verdict::Ok, 0));
    let listed = holds.targets[0].protocols[0].ports.iter().find(|p| p.port == port(2222)).expect("listed");
    assert!(listed.accepted.is_some(), "{listed:?}");
    let expired = audit(stage(jiff::civil::date(2026, 1, 31)), &sweeps);
    assert_eq!((expired.verdict, expired.exposed.len()), (Verdict::Drift, 1));
    // Nobody has to use it.
    let unused =
        Stage::spoke().policy(|p| p.exceptions.push(exception(2222, jiff::civil::date(2027, 1, 31))));
    assert!(audit(unused, &good()).missing.is_empty());
}

#[test]
fn the_mesh_address_must_not_answer_a_stranger_not_even_at_a_public_port() {
    let (desired, snapshot) = Stage::spoke().set();
    let view = View::of(&desired, &snapshot);
    let all = aims(&view, None, None);
    let found: Vec<(&str, String, bool)> =
        all.iter().map(|a| (a.link.name.as_str(), a.address.to_string(), a.must_not_answer)).collect();
    assert_eq!(
        found,
        [
            ("eth0", "203.0.113.7".to_owned(), false),
            ("eth0", "2001:db8:7::7".to_owned(), false),
            ("eth0", "10.84.0.16".to_owned(), true),
            ("eth0", "fd84::16".to_owned(), true),
        ]
    );
    let leak = sweep(
        "10.84.0.16",
        Proto::Tcp,
        Fate::Dropped,
        &[(22, here("10.84.0.16", 22)), (443, here("10.84.0.16", 443))],
    );
    let audit = Audit::outside_in(&[leak], &view, now(), 0.1);
    assert_eq!(audit.exposed.iter().map(|s| s.port.get()).collect::<Vec<_>>(), [22, 443]);
    assert!(audit.missing.is_empty());
    let ports: Vec<u16> = view.likely(Proto::Tcp, &Ports::all()).iter().map(|p| p.get()).collect();
    assert!(ports.contains(&22) && ports.contains(&443) && ports.len() < 20, "{ports:?}");
}

#[test]
fn only_doors_that_strangers_use_are_aimed_at() {
    let stage = Stage::spoke().links(|links| {
        links.push(link(5, "br0", &["192.168.7.1/24"]));
        let mut member = link(6, "veth1", &["192.168.8.1/24"]);
        member.master = Some(5);
        links.push(member);
        let mut down = link(7, "eth1", &["203.0.113.99/24"]);
        down.up = false;
        links.push(down);
        links.push(link(8, "eth2", &[]));
    });
    let (desired, snapshot) = stage.set();
    let view = View::of(&desired, &snapshot);
    let names = |interface: Option<&str>, address: Option<&str>| {
        let mut all: Vec<String> = aims(&view, interface, address.map(ip))
            .iter()
            .map(|a| format!("{} {}", a.link.name, a.address))
            .collect();
        all.retain(|text| !text.ends_with(".16") && !text.ends_with("::16"));
        all
    };
    assert_eq!(names(None, None), ["eth0 203.0.113.7", "eth0 2001:db8:7::7", "br0 192.168.7.1"]);
    assert_eq!(names(Some("wg0"), None), Vec::<String>::new());
    assert_eq!(names(Some("eth1"), None), ["eth1 203.0.113.99"]);
    assert_eq!(names(Some("lo"), None), Vec::<String>::new());
    assert_eq!(names(None, Some("203.0.113.7")), ["eth0 203.0.113.7"]);
    // Without a policy nobody says which are public.
    let bare = View { desired: None, ..view };
    assert!(aims(&bare, None, None).iter().any(|a| a.link.name == "wg0" && !a.must_not_answer));
    assert_eq!(desired.policy.scope_of("wg0"), Some(Scope::Mesh));
}

#[test]
fn a_stranger_is_nobody_that_a_rule_knows() {
    let (desired, snapshot) = Stage::spoke().set();
    let view = View::of(&desired, &snapshot);
    assert_eq!(stranger(&view, ip("203.0.113.7")), ip(OUTSIDER));
    let hole = |stage: Stage| {
        stage.policy(|p| {
            let mut hole = exception(2222, jiff::civil::date(2027, 1, 31));
            hole.from = vec!["185.0.0.0/8".parse().expect("a prefix")];
            p.exceptions.push(hole);
        })
    };
    let (desired, snapshot) = hole(Stage::spoke()).set();
    assert_ne!(stranger(&View::of(&desired, &snapshot), ip("203.0.113.7")), ip(OUTSIDER));
}

#[test]
fn who_could_not_look_never_says_fine() {
    let blind = audit(Stage::spoke().blind(crate::observed::Facet::Listeners), &good());
    assert_eq!((blind.verdict, blind.exit_code()), (Verdict::Unknown, 2));
    assert_eq!(blind.blind[0].facet, "listeners");
    assert_eq!(line(&blind, "203.0.113.7", 443), "unknown open nobody: unknown");
    let mut sweeps = good();
    sweeps[0].fates[8079].1 = Fate::Lost;
    let lost = audit(Stage::spoke(), &sweeps);
    assert_eq!((lost.verdict, lost.blind.len()), (Verdict::Unknown, 1));
    assert!(lost.blind[0].reason.contains("1 tcp port of 203.0.113.7 on eth0"), "{:?}", lost.blind);
    // Rules that could not be read explain nothing; what was probed stands all the same.
    let unruled = audit(Stage::spoke().blind(crate::observed::Facet::Nftables), &good());
    assert_eq!(unruled.verdict, Verdict::Ok);
}

#[test]
fn the_evaluators_opinion_is_one_of_ports_that_could_answer() {
    let (desired, snapshot) = Stage::spoke().listens("tcp 0.0.0.0:5432 postgres").set();
    let view = View::of(&desired, &snapshot);
    let ports = view.likely(Proto::Tcp, &Ports::all());
    let told = opinion(&view, "eth0", ip("203.0.113.7"), ip(OUTSIDER), Proto::Tcp, &ports);
    let of = |number: u16| told.fates.iter().find(|(p, _)| *p == port(number)).map(|(_, fate)| fate.clone());
    assert_eq!(of(443), Some(here("203.0.113.7", 443)));
    assert_eq!(of(5432), Some(Fate::Dropped));
    // What the guard refuses gets to no rule, be there any or not.
    let flushed = Reading::Seen(Default::default());
    let view = View { rules: &flushed, ..view };
    let told = opinion(&view, "eth0", ip("203.0.113.7"), ip(OUTSIDER), Proto::Tcp, &[port(443), port(5432)]);
    assert_eq!(told.fates, [(port(443), here("203.0.113.7", 443)), (port(5432), Fate::Dropped)]);
    let links = snapshot.links.clone();
    let gone = Reading::Blind(Gap::new("no nft"));
    let view =
        View { desired: None, rules: &gone, listeners: &snapshot.listeners, links: &links, guarded: &[] };
    let told = opinion(&view, "eth0", ip("203.0.113.7"), ip(OUTSIDER), Proto::Tcp, &[port(443)]);
    assert_eq!(told.fates, [(port(443), Fate::Lost)]);
}

fn scan(answers: &[(u16, Answer)]) -> Scan {
    let all = (1..=1000u16).map(|n| {
        (port(n), answers.iter().find(|(p, _)| *p == n).map_or(Answer::Silent, |(_, answer)| *answer))
    });
    Scan {
        address: ip("203.0.113.7"),
        name: Some("spoke.example".into()),
        proto: Proto::Tcp,
        source: Some(ip("198.51.100.99")),
        answers: all.collect(),
        gap: None,
        effort: None,
    }
}

#[test]
fn another_host_is_compared_with_its_own_policy_and_only_then() {
    let (desired, _) = Stage::spoke().set();
    let good = [(80, Answer::SynAck), (443, Answer::SynAck)];
    let bad = [(22, Answer::SynAck), (443, Answer::SynAck), (25, Answer::Reset)];
    let of = |answers: &[(u16, Answer)], expect| Audit::remote(&[scan(answers)], expect, now(), 1.0);
    assert_eq!(of(&good, Some(&desired)).exit_code(), 0);
    let audit = of(&bad, Some(&desired));
    assert_eq!(audit.exit_code(), 1);
    assert_eq!(audit.exposed.iter().map(|s| s.port.get()).collect::<Vec<_>>(), [22]);
    assert_eq!(audit.missing.iter().map(|s| s.port.get()).collect::<Vec<_>>(), [80]);
    let alone = of(&bad, None);
    assert_eq!((alone.exit_code(), alone.exposed.len(), alone.missing.len()), (0, 0, 0));
    shown(
        &alone,
        expect![[r#"
        spoke.example (203.0.113.7)
        997 tcp ports filtered
        PORT     STATE   SERVICE  WHY
        22/tcp   open    ssh      syn-ack
        25/tcp   closed  smtp     reset
        443/tcp  open    https    syn-ack

        Not compared with a policy. 1,000 ports of 1 address in 1.00 s.
    "#]],
    );
    // Through the mesh, the hub is let in by other rules than strangers are.
    let mut mesh = scan(&[(22, Answer::SynAck)]);
    (mesh.address, mesh.source) = (ip("10.84.0.16"), Some(ip("10.84.0.1")));
    let through = Audit::remote(&[mesh.clone()], Some(&desired), now(), 1.0);
    assert!(through.exposed.is_empty(), "{:?}", through.exposed);
    let mut gone = scan(&good);
    gone.gap = Some("no route".into());
    assert_eq!(Audit::remote(&[gone], None, now(), 1.0).exit_code(), 2);
    let mut lossy = scan(&good);
    lossy.effort = Some(Effort { passes: 6, loss: 0.098, ..Effort::default() });
    let lossy = Audit::remote(&[lossy], None, now(), 1.0);
    let says = "tcp: 10 of 100 packets got lost, silent ports were asked 6 times";
    assert!(lossy.to_text(80, false).lines().any(|line| line == says));
    assert!(!alone.to_text(80, false).contains("got lost") && lossy.exit_code() == 0);
}

#[test]
fn who_says_that_a_host_is_away_is_not_that_host() {
    let heard = |address: &str, answer| Scan { address: ip(address), ..scan(&[(22, answer)]) }.is_heard();
    let told = |address: &str, icmp_type, code| heard(address, Answer::Unreachable { icmp_type, code });
    for answer in [Answer::SynAck, Answer::Connected, Answer::Reset, Answer::Datagram] {
        assert!(heard("203.0.113.7", answer), "{answer:?}");
    }
    assert!(!heard("203.0.113.7", Answer::Silent) && !heard("203.0.113.7", Answer::Unasked));
    // Network and host unreachable; then port unreachable and what firewalls say.
    assert_eq!([0, 1, 3, 10, 13].map(|code| told("203.0.113.7", 3, code)), [false, false, true, true, true]);
    // No route and address unreachable; prohibited and port unreachable.
    assert_eq!([0, 3, 1, 4].map(|code| told("2001:db8::7", 1, code)), [false, false, true, true]);
}

#[test]
fn the_json_is_the_contracts_and_reads_back() {
    let mut sweeps = good();
    sweeps[0].fates[5431].1 = here("203.0.113.7", 5432);
    let audit = audit(Stage::spoke().listens("tcp 0.0.0.0:5432 postgres"), &sweeps[..1]);
    let text = audit.to_json();
    assert_eq!(serde_json::from_str::<Audit>(&text).expect("our own JSON"), audit);
    expect![[r#"
        {
          "version": 1,
          "vantage": "outside-in",
          "started": "2026-11-21T08:27:03.000Z",
          "seconds": 0.2,
          "targets": [
            {
              "address": "203.0.113.7",
              "interface": "eth0",
              "family": "ipv4",
              "source": "185.1.199.199",
              "protocols": [
                {
                  "proto": "tcp",
                  "scanned": 60000,
                  "ports": [
                    {
                      "port": 80,
                      "state": "open",
                      "service": "http",
                      "wanted": "open",
                      "by": {
                        "pid": 812,
                        "process": "nginx",
                        "unit": null
                      },
                      "reason": "syn-ack"
                    },
                    {
                      "port": 443,
                      "state": "open",
                      "service": "https",
                      "wanted": "open",
                      "by": {
                        "pid": 812,
                        "process": "nginx",
                        "unit": null
                      },
                      "reason": "syn-ack"
                    },
                    {
                      "port": 5432,
                      "state": "open",
                      "service": "postgresql",
                      "wanted": "closed",
                      "by": {
                        "pid": 812,
                        "process": "postgres",
                        "unit": null
                      },
                      "reason": "syn-ack"
                    }
                  ],
                  "others": {
                    "state": "filtered",
                    "count": 59997
                  }
                }
              ]
            }
          ],
          "verdict": "drift",
          "exposed": [
            {
              "address": "203.0.113.7",
              "proto": "tcp",
              "port": 5432
            }
          ],
          "missing": [],
          "blind": []
        }
    "#]]
    .assert_eq(&text);
}

#[test]
fn nmaps_xml_keeps_strangers_text_harmless() {
    let mut stage = Stage::spoke().listens("tcp 0.0.0.0:5432 db");
    if let Some(owner) = &mut stage.listeners().last_mut().expect("a listener").owner {
        owner.process = "a\"<b>&\u{1b}'\u{ffff}".into();
    }
    let mut sweeps = good();
    sweeps[0].fates[5431].1 = here("203.0.113.7", 5432);
    let xml = audit(stage, &sweeps[..1])
        .to_xml("spokeguard audit --ports \"<1\"", &"1-60000".parse().expect("ports"));
    expect![[r#"
        <?xml version="1.0" encoding="UTF-8"?>
        <!DOCTYPE nmaprun>
        <nmaprun scanner="nmap" args="spokeguard audit --ports &quot;&lt;1&quot;" start="1795249623" startstr="2026-11-21 08:27:03 UTC" version="0.1.0" xmloutputversion="1.05">
        <scaninfo type="syn" protocol="tcp" numservices="60000" services="1-60000"/>
        <verbose level="0"/>
        <debugging level="0"/>
        <host starttime="1795249623" endtime="1795249624">
        <status state="up" reason="user-set" reason_ttl="0"/>
        <address addr="203.0.113.7" addrtype="ipv4"/>
        <ports><extraports state="filtered" count="59997"><extrareasons reason="no-response" count="59997" proto="tcp"/></extraports>
        <port protocol="tcp" portid="80"><state state="open" reason="syn-ack" reason_ttl="0"/><owner name="nginx"/><service name="http" method="table" conf="3"/><script id="spokeguard" output="reason: syn-ack, wanted: open, pid: 812, interface: eth0"><elem key="reason">syn-ack</elem><elem key="wanted">open</elem><elem key="pid">812</elem><elem key="interface">eth0</elem></script></port>
        <port protocol="tcp" portid="443"><state state="open" reason="syn-ack" reason_ttl="0"/><owner name="nginx"/><service name="https" method="table" conf="3"/><script id="spokeguard" output="reason: syn-ack, wanted: open, pid: 812, interface: eth0"><elem key="reason">syn-ack</elem><elem key="wanted">open</elem><elem key="pid">812</elem><elem key="interface">eth0</elem></script></port>
        <port protocol="tcp" portid="5432"><state state="open" reason="syn-ack" reason_ttl="0"/><owner name="a&quot;&lt;b&gt;&amp;�&apos;�"/><service name="postgresql" method="table" conf="3"/><script id="spokeguard" output="reason: syn-ack, wanted: closed, pid: 812, interface: eth0"><elem key="reason">syn-ack</elem><elem key="wanted">closed</elem><elem key="pid">812</elem><elem key="interface">eth0</elem></script></port>
        </ports>
        </host>
        <runstats><finished time="1795249624" timestr="2026-11-21 08:27:03 UTC" elapsed="0.20" summary="spokeguard: verdict drift, 1 exposed, 0 missing, 1 addresses in 0.20 seconds" exit="success"/><hosts up="1" down="0" total="1"/></runstats>
        </nmaprun>
    "#]].assert_eq(&xml);
}

#[test]
fn a_table_fits_any_terminal_and_hides_no_open_port() {
    let mut sweeps = good();
    for number in [22u16, 5432, 6379] {
        sweeps[0].fates[usize::from(number) - 1].1 = here("203.0.113.7", number);
    }
    for number in (100..400usize).step_by(7) {
        sweeps[0].fates[number].1 = Fate::Reset;
    }
    let mut stage =
        Stage::spoke().listens("tcp 0.0.0.0:5432 a-very-long-name").listens("tcp 0.0.0.0:6379 redis");
    if let Some(owner) = &mut stage.listeners().last_mut().expect("a listener").owner {
        owner.unit = Some("redis-server-with-a-long-name@instance.service".into());
    }
    let audit = audit(stage, &sweeps);
    for width in [40, 60, 80, 132] {
        let text = audit.to_text(width, false);
        for line in text.lines() {
            assert!(line.chars().count() <= width.max(78) && line == line.trim_end(), "{width}: {line:?}");
        }
        for number in ["443/tcp", "5432/tcp", "6379/tcp"] {
            assert!(text.contains(number), "{number} at {width}");
        }
        assert!(text.contains("44 tcp ports closed"), "{text}");
    }
    let coloured = audit.to_text(80, true);
    let mut plain = String::new();
    for (at, part) in coloured.split('\u{1b}').enumerate() {
        plain.push_str(if at == 0 { part } else { part.split_once('m').expect("a colour").1 });
    }
    assert_eq!(plain, audit.to_text(80, false));
}

#[test]
fn ports_are_read_like_nmaps() {
    let read =
        |text: &str| text.parse::<Ports>().map(|p| p.to_vec().iter().map(|p| p.get()).collect::<Vec<_>>());
    assert_eq!(read("22,80,8000-8002"), Ok(vec![22, 80, 8000, 8001, 8002]));
    assert_eq!(read("80,1-3,2-4,80"), Ok(vec![1, 2, 3, 4, 80]));
    assert_eq!(read("-").map(|all| all.len()), Ok(65_535));
    assert_eq!(read("65534-").map(|all| all.len()), Ok(2));
    for wrong in ["", "0", "65536", "80-70", "a", "1,,2", "1-2-3", "-0"] {
        assert!(read(wrong).is_err(), "{wrong:?} was taken");
    }
}

#[test]
fn what_holds_a_packet_back_behind_the_rules_is_filtered_and_named() {
    for gate in [Gate::Xdp, Gate::ControlGroup, Gate::Ipsec, Gate::Signature] {
        let held = sweep("203.0.113.7", Proto::Tcp, Fate::Dropped, &[(80, Fate::Held(gate))]);
        let audit = audit(Stage::spoke(), &[held]);
        let expected = format!("filtered open nginx: no-response; dropped by {}", gate.name());
        assert_eq!(line(&audit, "203.0.113.7", 80), expected);
        assert!(audit.missing.iter().any(|spot| spot.port == port(80)), "it was wanted");
    }
}
