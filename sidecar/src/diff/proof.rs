//! Three opinions on every port that matters, side by side: whether a socket waits there,
//! what the rules say of a stranger's packet, and what the probe of one met.
//!
//! Where they agree, the findings of the other comparisons stand and nothing is told twice.
//! A probe that gets in where it should not is `audit-exposed`; any other disagreement is
//! `proof-disagrees`. Either is told only once the port was asked a second time, since a
//! socket or a rule may have come or gone between the looks.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

use super::listeners::{is_expected, subject};
use super::sight::{Sight, place};
use super::{Assessment, Code, Finding, Severity};
use crate::observed::{Dispute, Facet, Fate, Link, Listener, Probe, Probed, Reading, Run, Runs, Snapshot};
use crate::ruleset::{Judgement, Published, Verdict, published};
use crate::terms::{Family, Port, Proto, Scope};

/// What the opinions come to, in numbers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Proof {
    /// Ports that a probe got to against the policy.
    pub exposed: BTreeMap<(Family, Proto), u64>,
    /// Ports of which rules and probe say different things.
    pub disagreements: BTreeMap<(Family, Proto), u64>,
    /// What findings stand on, to be asked again now and then: what gets a packet past the
    /// rules announces its end by no event.
    pub standing: Vec<Dispute>,
}

/// Runs of ports that lead elsewhere, one finding each, in one sweep.
const ODD_MAX: usize = 256;

pub(super) fn compare(sight: &Sight, snapshot: &Snapshot, out: &mut Assessment) {
    let Some(Reading::Seen(probed)) = &snapshot.audit else { return };
    let mut sockets: BTreeMap<(Proto, Port), Vec<&Listener>> = BTreeMap::new();
    for listener in snapshot.listeners.seen().into_iter().flatten() {
        sockets.entry((listener.proto, listener.port)).or_default().push(listener);
    }
    let table = Table {
        sight,
        probed,
        sockets,
        tunnel: snapshot.wireguard.seen().and_then(Option::as_ref).and_then(|d| Port::new(d.listen_port)),
        published: snapshot.nftables.seen().map(published).unwrap_or_default(),
    };
    let mut proof = Proof::default();
    for sweep in &probed.sweeps {
        let there = sight.link(&sweep.interface).filter(|_| sight.is_local(sweep.address));
        // What is no more, or is no way in any more, has nothing to be compared with.
        let Some(door) = there.filter(|link| sight.doors.iter().any(|door| door.index == link.index)) else {
            continue;
        };
        if sweep.lost() > 0 {
            let Runs { proto, address, interface, .. } = sweep;
            let ports = if sweep.lost() == 1 { "port" } else { "ports" };
            let text = format!(
                "what strangers meet at {} {proto} {ports} of {address}: the probes were not seen to arrive \
                 through {interface}",
                sweep.lost()
            );
            out.doubt(Facet::Audit, text);
        }
        for (first, last) in table.questions(sweep) {
            table.compare(sweep, door, (first, last), &mut proof, out);
        }
    }
    out.disputed.extend(sight.disputed());
    out.disputed.sort();
    out.disputed.dedup();
    out.proof = Some(proof);
}

/// Everything that the opinions are read from.
struct Table<'a> {
    sight: &'a Sight<'a>,
    probed: &'a Probed,
    sockets: BTreeMap<(Proto, Port), Vec<&'a Listener>>,
    tunnel: Option<Port>,
    published: Vec<Published>,
}

/// The three of them on one port.
struct Opinions<'a> {
    /// Who would take the packet where it comes to.
    socket: Option<&'a Listener>,
    /// `None`: the rules can't be judged.
    rules: Option<bool>,
    judgement: Option<Judgement>,
    fate: Fate,
}

impl<'a> Table<'a> {
    /// The ports at which a socket waits or of which the policy speaks, one by one, and what
    /// the probe found to lead elsewhere, as ranges.
    fn questions(&self, sweep: &Runs) -> BTreeSet<(Port, Port)> {
        let proto = sweep.proto;
        let of_proto = |((p, _), _): &(&(Proto, Port), &Vec<&Listener>)| *p == proto;
        let here = |l: &&Listener| l.answers(sweep.address);
        let waits = self.sockets.iter().filter(of_proto).filter(|(_, list)| list.iter().any(&here));
        let mut single: BTreeSet<Port> = waits.map(|((_, port), _)| *port).collect();
        single.extend(self.sight.desired.services.iter().filter(|s| s.proto == sweep.proto).map(|s| s.port));
        let odd = sweep.runs.iter().filter(|run| is_odd(run, sweep.address)).take(ODD_MAX);
        let odd = odd.filter(|run| run.first != run.last || !single.contains(&run.first));
        let odd: Vec<(Port, Port)> = odd.map(|run| (run.first, run.last)).collect();
        single.into_iter().map(|port| (port, port)).chain(odd).collect()
    }

    fn compare(
        &self,
        sweep: &Runs,
        door: &Link,
        (port, last): (Port, Port),
        proof: &mut Proof,
        out: &mut Assessment,
    ) {
        let Runs { address, proto, .. } = sweep;
        let Some(opinions) = self.opinions(sweep, door, port) else { return };
        let Opinions { socket, rules, fate, .. } = &opinions;
        let got_in = is_in(fate);
        let wanted = self.is_wanted(sweep, port);
        let open = got_in && (socket.is_some() || matches!(fate, Fate::Forwarded { .. } | Fate::Answered));
        let against = open && !wanted && !socket.is_some_and(|l| is_expected(self.sight, l, self.tunnel));
        let cell = (Family::of(*address), *proto);
        if against {
            *proof.exposed.entry(cell).or_default() += u64::from(last.get() - port.get()) + 1;
        }
        let probe = Probe { interface: door.name.clone(), address: *address, proto: *proto, port };
        let differ = rules.is_some_and(|rules| rules != got_in) && opinions.matter(wanted);
        if differ {
            *proof.disagreements.entry(cell).or_default() += 1;
            // Once is an accident: a socket or a rule that has just come or gone.
            let dispute = Dispute { probe: probe.clone(), rules: *rules };
            if !self.probed.is_confirmed(&dispute) {
                if out.disputed.len() < DISPUTED_MAX {
                    out.disputed.push(dispute);
                }
                return;
            }
        }
        if against && (differ || !self.is_told(sweep, port, &opinions, out)) {
            out.add(self.exposed(sweep, door, (port, last), &opinions));
        } else if differ && !against {
            out.add(self.disagrees(sweep, door, port, wanted, &opinions));
        } else {
            return;
        }
        if proof.standing.len() < DISPUTED_MAX {
            proof.standing.push(Dispute { probe, rules: *rules });
        }
    }

    fn opinions(&self, sweep: &Runs, door: &Link, port: Port) -> Option<Opinions<'a>> {
        let fate = sweep.fate(port).filter(|fate| *fate != Fate::Lost)?;
        // One whom other comparisons have asked about already. Only where he fares otherwise is
        // it asked about the very one that the probe came as: rules may speak of him.
        let known = self.sight.sources(sweep.address).into_iter().last().unwrap_or(sweep.source);
        let ask = |source| self.sight.rules(door, source, sweep.address, sweep.proto, port);
        let known = ask(known).filter(|judgement| gets_in(judgement) == Some(is_in(&fate)));
        let judgement = known.or_else(|| ask(sweep.source));
        let rules = judgement.as_ref().and_then(gets_in);
        let landed = match (&fate, judgement.as_ref().and_then(|j| j.rewritten.as_ref())) {
            (Fate::Delivered { address, port }, _) => Some((*address, *port)),
            (Fate::Forwarded { .. }, _) => None,
            // Where it would have come to.
            (_, Some(to)) if to.address.is_some_and(|a| !self.sight.is_local(a)) => None,
            (_, Some(to)) => Some((to.address.unwrap_or(sweep.address), to.port.unwrap_or(port))),
            (_, None) => Some((sweep.address, port)),
        };
        let socket = landed.and_then(|(address, port)| {
            let takes = |l: &&Listener| l.answers(address) && self.sight.admits(l, door);
            // The kernel prefers what is bound more narrowly.
            let rank = |l: &&Listener| (l.device.is_some(), !l.is_wildcard(), l.owner.is_some());
            self.sockets.get(&(sweep.proto, port))?.iter().copied().filter(takes).max_by_key(rank)
        });
        Some(Opinions { socket, rules, judgement, fate })
    }

    /// Whether the policy wants the probe's packets to be taken there. On a mesh address that
    /// is asked from outside, never.
    fn is_wanted(&self, sweep: &Runs, port: Port) -> bool {
        let desired = self.sight.desired;
        let mesh = desired.in_mesh(sweep.address) || self.sight.mesh_addresses().contains(&sweep.address);
        let wanted = desired.wanted(sweep.proto, port, Scope::Public);
        !mesh && wanted.iter().any(|service| service.admits(sweep.source))
    }

    /// Another finding says already that this is open.
    fn is_told(&self, sweep: &Runs, port: Port, opinions: &Opinions, out: &Assessment) -> bool {
        let told = |code: Code, subject: &str| {
            out.findings
                .iter()
                .any(|f| f.code == code && f.severity <= Severity::High && f.subject == subject)
        };
        let socket = opinions.socket.map(subject);
        let socket = socket.is_some_and(|s| told(Code::ListenerExposed, &s) || told(Code::SshBind, &s));
        let rules = self
            .published
            .iter()
            .filter(|rule| rule.proto == sweep.proto && (rule.first..=rule.last).contains(&port));
        let sent = is_odd_fate(&opinions.fate, sweep.address, port);
        let mut subjects = rules.map(super::firewall::published_subject);
        socket
            || told(Code::MeshLeak, &sweep.address.to_string())
            || sent && subjects.any(|subject| told(Code::DnatExposed, &subject))
    }

    fn exposed(&self, sweep: &Runs, door: &Link, (port, last): (Port, Port), opinions: &Opinions) -> Finding {
        let Runs { address, proto, .. } = sweep;
        let spot = SocketAddr::new(*address, port.get());
        let subject = if port == last { format!("{proto}/{spot}") } else { format!("{proto}/{spot}-{last}") };
        let who = opinions.socket.and_then(|l| l.owner.as_ref());
        let name = match (who, &opinions.fate) {
            (Some(owner), _) => format!("Stop {}", owner.process),
            (None, Fate::Forwarded { .. }) => "Take away what sends it on".to_owned(),
            (None, _) => "Stop what listens there".to_owned(),
        };
        // Only somebody on the same link sends to a mesh address through a public interface.
        let severity =
            if self.sight.mesh_addresses().contains(address) { Severity::High } else { Severity::Critical };
        Finding::new(
            Code::AuditExposed,
            severity,
            subject,
            "closed to strangers",
            self.told(sweep, door, port, opinions),
            format!("{name}, or declare the port under [public] or as an [[exception]]."),
        )
        .held_by(who)
    }

    fn disagrees(&self, sweep: &Runs, door: &Link, port: Port, wanted: bool, opinions: &Opinions) -> Finding {
        let Runs { address, proto, .. } = sweep;
        let shut = !is_in(&opinions.fate);
        let (severity, meant) = match (wanted, shut) {
            // Those who should get in do not, and no rule says why.
            (true, true) if opinions.socket.is_some() => (Severity::High, "open to anyone"),
            (true, true) => (Severity::Medium, "open to anyone"),
            (true, false) => (Severity::Low, "open to anyone, by every opinion"),
            (false, _) => (Severity::Low, "closed to strangers, by every opinion"),
        };
        let next = if shut {
            format!(
                "Look for what drops it besides nftables: `tc filter show dev {0} ingress`, `ip link show dev \
                 {0}` (XDP), `ip rule`.",
                door.name
            )
        } else {
            "Look for what takes the packet past the rules: tc and eBPF programs, a flowtable, `ip rule`."
                .to_owned()
        };
        Finding::new(
            Code::ProofDisagrees,
            severity,
            format!("{proto}/{}", SocketAddr::new(*address, port.get())),
            meant,
            self.told(sweep, door, port, opinions),
            next,
        )
        .held_by(opinions.socket.and_then(|l| l.owner.as_ref()))
    }

    /// "sockets: ...; rules: ...; probe: ...".
    fn told(&self, sweep: &Runs, door: &Link, port: Port, opinions: &Opinions) -> String {
        let Opinions { socket, judgement, fate, .. } = opinions;
        let sockets = match (socket, fate) {
            (Some(l), _) => {
                let who = l.owner.as_ref().map_or("somebody", |owner| owner.process.as_str());
                format!("{who} listens on {}", SocketAddr::new(l.address, l.port.get()))
            }
            (None, Fate::Forwarded { .. }) => "none of this host's".to_owned(),
            (None, _) => "nobody listens".to_owned(),
        };
        let rules = match judgement {
            None => "could not be read".to_owned(),
            Some(Judgement { verdict, by, rewritten }) => {
                let by = by.as_ref().map(|by| format!(" by {}", place(by))).unwrap_or_default();
                match (verdict, rewritten) {
                    (Verdict::Accept, None) => "let it in".to_owned(),
                    (Verdict::Accept, Some(to)) => format!("let it in, sent elsewhere by {}", place(&to.by)),
                    (Verdict::Drop, _) => format!("dropped{by}"),
                    (Verdict::Reject, _) => format!("rejected{by}"),
                    (Verdict::Unknown(why), _) => format!("cannot tell, it depends on {why}"),
                }
            }
        };
        let met = match fate {
            Fate::Delivered { address, port: to } if (*address, *to) == (sweep.address, port) => {
                "gets in".to_owned()
            }
            Fate::Delivered { address, port: to } if *address == sweep.address => {
                format!("gets in, redirected to port {to}")
            }
            Fate::Delivered { address, port: to } => {
                format!("gets in, sent to {}", SocketAddr::new(*address, to.get()))
            }
            Fate::Forwarded { address, port: to } => {
                format!("is sent on to {}", SocketAddr::new(*address, to.get()))
            }
            Fate::Answered => "is answered".to_owned(),
            Fate::Reset => "is refused by a reset".to_owned(),
            Fate::Unreachable { icmp_type, code } => format!("is refused by ICMP {icmp_type}/{code}"),
            Fate::Dropped => "is dropped".to_owned(),
            Fate::Held(gate) => format!("is dropped by {}", gate.name()),
            Fate::Lost => "was lost".to_owned(),
        };
        format!("sockets: {sockets}; rules: {rules}; probe: {met} through {} as {}", door.name, sweep.source)
    }
}

/// Asked again at most, in one look.
pub(super) const DISPUTED_MAX: usize = 256;

impl Opinions<'_> {
    /// A difference that somebody may feel.
    fn matter(&self, wanted: bool) -> bool {
        let elsewhere = self.judgement.as_ref().and_then(|j| j.rewritten.as_ref()).is_some();
        match self.fate {
            // No route behind a DNAT: rules do not know of routes.
            Fate::Unreachable { .. } if elsewhere => false,
            // Known not to be the rules' doing.
            Fate::Held(_) => wanted,
            Fate::Forwarded { .. } | Fate::Answered => true,
            _ => wanted || self.socket.is_some() || elsewhere,
        }
    }
}

/// `None`: the rules can't be judged.
fn gets_in(judgement: &Judgement) -> Option<bool> {
    match judgement.verdict {
        Verdict::Accept => Some(true),
        Verdict::Drop | Verdict::Reject => Some(false),
        Verdict::Unknown(_) => None,
    }
}

fn is_in(fate: &Fate) -> bool {
    matches!(fate, Fate::Delivered { .. } | Fate::Forwarded { .. } | Fate::Answered)
}

/// Leads elsewhere than it was sent.
fn is_odd(run: &Run, address: IpAddr) -> bool {
    is_odd_fate(&run.fate, address, run.first) || (run.first != run.last && !run.along && is_in(&run.fate))
}

fn is_odd_fate(fate: &Fate, asked: IpAddr, at: Port) -> bool {
    match fate {
        Fate::Delivered { address, port } => (*address, *port) != (asked, at),
        Fate::Forwarded { .. } | Fate::Answered => true,
        Fate::Reset | Fate::Unreachable { .. } | Fate::Dropped | Fate::Held(_) | Fate::Lost => false,
    }
}

#[cfg(test)]
mod tests {
    use expect_test::{Expect, expect};

    use super::*;
    use crate::diff::stage::*;
    use crate::ruleset::{Hook, Statement, TableFamily};

    const HERE: &str = "203.0.113.7";

    fn to(number: u16) -> Fate {
        Fate::Delivered { address: ip(HERE), port: port(number) }
    }

    /// The web ports get in, as the policy wants.
    fn web(more: &[(u16, Fate)]) -> Vec<(u16, Fate)> {
        more.iter().cloned().chain([(80, to(80)), (443, to(443))]).collect()
    }

    fn tcp(stage: Stage, listed: &[(u16, Fate)]) -> Stage {
        stage.probed(Proto::Tcp, HERE, &web(listed), Fate::Dropped)
    }

    #[track_caller]
    fn check(stage: Stage, expected: Expect) {
        expected.assert_eq(&stage.asked_again().show());
    }

    fn numbers(stage: Stage) -> (u64, u64) {
        let proof = stage.assess().proof.expect("somebody asked");
        (proof.exposed.values().sum(), proof.disagreements.values().sum())
    }

    /// What iptables-nft leaves behind where a match has no word of nft's own.
    fn riddle(number: u64, then: Statement) -> crate::ruleset::Table {
        let rule = vec![dport(number), Statement::Unknown("{\"xt\":null}".into()), then];
        table(TableFamily::Ip, "filter", chain(Hook::Input, -200, false, vec![rule]))
    }

    #[test]
    fn where_all_three_agree_nothing_is_said() {
        let stage = || tcp(Stage::spoke(), &[]);
        check(stage(), expect![[""]]);
        assert_eq!(numbers(stage()), (0, 0));
        let wide = || tcp(Stage::spoke().listens("tcp 0.0.0.0:5432 db"), &[]);
        assert_eq!(wide().codes(), ["low listener-wide tcp/0.0.0.0:5432"], "held, as the probe found");
    }

    #[test]
    fn a_port_that_another_finding_calls_open_is_not_called_so_twice() {
        let everything = (1..=u16::MAX).map(|n| (n, to(n))).collect::<Vec<_>>();
        let stage = || {
            let stage = Stage::spoke().policy(|p| p.enforce.firewall = false).listens("tcp 0.0.0.0:5432 db");
            tcp(stage, &everything)
        };
        let about = |line: &String| line.contains("5432");
        assert_eq!(
            stage().codes().into_iter().filter(about).collect::<Vec<_>>(),
            ["critical listener-exposed tcp/0.0.0.0:5432"]
        );
        assert_eq!(numbers(stage()), (1, 0));
    }

    #[test]
    fn a_published_port_that_the_probe_reaches_is_told_by_its_rule() {
        let sent = Fate::Forwarded { address: ip("172.17.0.2"), port: port(5432) };
        let stage = || {
            let stage = Stage::spoke().policy(|p| p.enforce.firewall = false).foreign(publishes(5432));
            let plain: Vec<(u16, Fate)> =
                (1..=u16::MAX).map(|n| if n == 5432 { (n, sent.clone()) } else { (n, to(n)) }).collect();
            tcp(stage, &plain)
        };
        let codes = stage().codes();
        assert!(codes.contains(&"critical dnat-exposed tcp/5432 -> 172.17.0.2:5432".to_owned()), "{codes:?}");
        assert!(!codes.iter().any(|line| line.contains("audit-exposed")), "{codes:?}");
        assert_eq!(numbers(stage()), (1, 0));
    }

    #[test]
    fn what_gets_past_the_rules_is_told_after_it_did_so_twice() {
        let stage = || tcp(Stage::spoke().listens("tcp 0.0.0.0:5432 postgres"), &[(5432, to(5432))]);
        assert_eq!(stage().codes(), ["low listener-wide tcp/0.0.0.0:5432"], "once is an accident");
        assert_eq!(stage().assess().disputed.len(), 1);
        assert_eq!(numbers(stage()), (1, 1), "the numbers are as they are");
        check(
            stage(),
            expect![[r#"
                critical audit-exposed tcp/203.0.113.7:5432 [postgres]
                    wanted closed to strangers
                    found sockets: postgres listens on 0.0.0.0:5432; rules: dropped by table inet spokeguard chain public; probe: gets in through eth0 as 73.9.1.4
                low listener-wide tcp/0.0.0.0:5432 [postgres]
                    wanted closed to the public: the policy names no such port
                    found listens on every address; held by table inet spokeguard chain public
            "#]],
        );
    }

    #[test]
    fn a_wanted_port_that_no_rule_holds_and_that_is_shut_all_the_same() {
        check(
            Stage::spoke().probed(Proto::Tcp, HERE, &[(443, to(443))], Fate::Dropped),
            expect![[r#"
                high proof-disagrees tcp/203.0.113.7:80 [nginx]
                    wanted open to anyone
                    found sockets: nginx listens on [::]:80; rules: let it in; probe: is dropped through eth0 as 73.9.1.4
            "#]],
        );
    }

    #[test]
    fn a_wanted_port_that_a_rule_holds_is_told_by_the_rule_alone() {
        let stage = Stage::spoke().foreign(drops(TableFamily::Ip, 80));
        let stage = stage.probed(Proto::Tcp, HERE, &[(443, to(443))], Fate::Dropped).asked_again();
        assert_eq!(stage.codes(), ["medium firewall-blocked http tcp/80 ipv4"]);
        let rejects = vec![dport(80), Statement::Reject { tcp_reset: true }];
        let rejects = table(TableFamily::Ip, "other", chain(Hook::Input, 5, false, vec![rejects]));
        let stage = Stage::spoke().foreign(rejects);
        let stage = stage.probed(Proto::Tcp, HERE, &[(443, to(443)), (80, Fate::Reset)], Fate::Dropped);
        assert_eq!(stage.asked_again().codes(), ["medium firewall-blocked http tcp/80 ipv4"]);
    }

    #[test]
    fn a_rule_that_we_do_not_understand_is_decided_by_the_probe() {
        let doubtful = || Stage::spoke().foreign(riddle(443, Statement::Drop));
        let facets = |stage: Stage| stage.assess().doubts.into_iter().map(|(f, _)| f).collect::<Vec<_>>();
        assert_eq!(facets(doubtful()), [Facet::Nftables]);
        check(tcp(doubtful(), &[]), expect![[""]]);
        // That it is shut must be seen twice: a limit that others have used up looks the same.
        let shut = || doubtful().probed(Proto::Tcp, HERE, &[(80, to(80))], Fate::Dropped);
        assert_eq!(facets(shut()), [Facet::Nftables]);
        check(
            shut(),
            expect![[r#"
                medium firewall-blocked https tcp/443 ipv4
                    wanted reachable by anyone at 203.0.113.7 on eth0
                    found held, as a probe from outside found; the rules do not tell by what
            "#]],
        );
    }

    #[test]
    fn a_probe_that_a_limit_held_says_nothing_of_the_next_stranger() {
        let limit = Statement::Unknown("{\"limit\":{\"burst\":5,\"per\":\"second\",\"rate\":5}}".into());
        let rule = vec![dport(443), limit, Statement::Drop];
        let limited = table(TableFamily::Ip, "t", chain(Hook::Input, -200, false, vec![rule]));
        let stage = Stage::spoke().foreign(limited).probed(Proto::Tcp, HERE, &[(80, to(80))], Fate::Dropped);
        let assessment = stage.asked_again().assess();
        assert_eq!(assessment.findings, []);
        assert_eq!(assessment.doubts.len(), 1);
    }

    #[test]
    fn what_is_sent_on_by_a_rule_that_nobody_can_read_is_found() {
        let sent = Fate::Forwarded { address: ip("172.17.0.2"), port: port(80) };
        let unread = Statement::Dnat(crate::ruleset::Nat { address: None, port: None });
        let rule = vec![Statement::Unknown("{\"map\":{}}".into()), unread];
        let nat = table(TableFamily::Ip, "nat", chain(Hook::Prerouting, -100, false, vec![rule]));
        let stage = Stage::spoke().policy(|p| p.enforce.firewall = false).foreign(nat);
        let plain = (1..=u16::MAX).map(|n| (n, if n == 8080 { sent.clone() } else { to(n) }));
        let stage = tcp(stage, &plain.collect::<Vec<_>>()).asked_again();
        let text = stage.show();
        assert!(text.contains("critical audit-exposed tcp/203.0.113.7:8080\n"), "{text}");
        assert!(text.contains("probe: is sent on to 172.17.0.2:80 through eth0 as 73.9.1.4"), "{text}");
    }

    #[test]
    fn sockets_that_every_such_host_has_are_no_exposure() {
        let plain = |n| (n, to(n));
        let stage = Stage::spoke().policy(|p| p.enforce.firewall = false);
        let stage = stage.listens("udp 0.0.0.0:68 dhclient").listens("udp 0.0.0.0:40021 -");
        let stage = stage.probed(Proto::Udp, HERE, &(1..=u16::MAX).map(plain).collect::<Vec<_>>(), to(1));
        assert_eq!(numbers(stage), (0, 0));
    }

    #[test]
    fn ports_that_were_not_decided_are_a_doubt() {
        let stage = tcp(Stage::spoke(), &[(7, Fate::Lost), (9, Fate::Lost)]);
        expect![[r#"
            doubt audit: what strangers meet at 2 tcp ports of 203.0.113.7: the probes were not seen to arrive through eth0
        "#]]
        .assert_eq(&stage.show());
    }
}
