//! Our table against the desired one; ports that others publish by DNAT; wanted ports that
//! others drop; the mesh address answering on a public interface.

use std::net::IpAddr;

use ipnet::IpNet;

use super::sight::{Reach, Sight, held, is_ours, place, someone_in, told};
use super::{Assessment, Code, Finding, Severity, listed};
use crate::desired::{BREAK_GLASS, Desired, Service, TABLE};
use crate::observed::{Facet, Link, Snapshot};
use crate::policy::Mode;
use crate::ruleset::compare::changes;
use crate::ruleset::{Published, Ruleset, TableFamily, Verdict, published};
use crate::terms::{Family, Port, Proto, Scope};

pub(super) fn compare(sight: &Sight, snapshot: &Snapshot, out: &mut Assessment) {
    let Some(rules) = snapshot.nftables.seen() else { return };
    if let Some(finding) = own_table(sight.desired, rules) {
        out.add(finding);
    }
    if snapshot.links.seen().is_none() {
        return;
    }
    unguarded(sight, out);
    blocked(sight, out);
    leaks(sight, snapshot, out);
    for port in published(rules) {
        dnat(sight, &port, out);
    }
}

/// Our table alone: what the daemon asks first after every change of the rules, because
/// the answer decides a repair and takes microseconds.
pub fn own_table(desired: &Desired, rules: &Ruleset) -> Option<Finding> {
    let wanted = desired.table.as_ref()?;
    let subject = format!("table inet {TABLE}");
    let purpose = match desired.policy.enforce.mode {
        Mode::Enforce => "the policy's table, in force",
        Mode::Audit => "the policy's table, counting (mode audit)",
    };
    let Some(found) = rules.table(TableFamily::Inet, TABLE) else {
        return Some(Finding::new(
            Code::FirewallMissing,
            Severity::Critical,
            subject,
            purpose,
            "there is no such table",
            "Put it back with `spokeguard apply`, or keep `spokeguard run` going, which does it at once.",
        ));
    };
    let changes = changes(wanted, Some(found));
    if changes.is_empty() {
        return None;
    }
    Some(Finding::new(
        Code::FirewallChanged,
        Severity::High,
        subject,
        purpose,
        listed(&changes, 3),
        "See all of it with `spokeguard plan`; `spokeguard apply` puts the table right.",
    ))
}

/// `public.interfaces` names what our rules judge. Where strangers come by another name (an
/// interface renamed, made the port of a bridge or VRF, or new), those rules judge nobody.
fn unguarded(sight: &Sight, out: &mut Assessment) {
    if sight.desired.table.is_none() || sight.policy.public.interfaces.is_none() {
        return;
    }
    // A port of a bridge is never the `iifname` of a packet for this host.
    let guarded = |l: &&Link| l.master.is_none() && sight.policy.scope_of(&l.name) == Some(Scope::Public);
    let none_guarded = !sight.all_links().iter().any(|l| guarded(&l));
    for link in sight.all_links().iter().filter(|l| sight.is_unspoken(l) && !l.loopback && l.master.is_none())
    {
        let mut addresses =
            link.addresses.iter().map(IpNet::addr).filter(|a| !super::sight::is_link_local(*a));
        let found = match (none_guarded, addresses.clone().find(|a| is_global(*a)), addresses.next()) {
            (_, Some(address), _) => format!("it has {address}, and [public] interfaces leaves it out"),
            (true, None, Some(address)) => {
                format!("it has {address}, and no interface is there that [public] interfaces names")
            }
            _ => continue,
        };
        let name = &link.name;
        out.add(Finding::new(
            Code::ControlUnproven,
            Severity::High,
            format!("interface {name}"),
            "our table judges what comes from the public",
            found,
            format!(
                "If strangers come through {name}, name it in [public] interfaces or leave that list out; \
                 else declare it as [[local]]."
            ),
        ));
        out.doubt(Facet::Links, format!("who comes through {name}: the policy does not speak of it"));
    }
}

/// Routed on the internet, so that strangers may well come to it.
fn is_global(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => {
            let shared = v4.octets()[0] == 100 && v4.octets()[1] & 0xc0 == 64;
            !(v4.is_private() || shared || v4.is_loopback() || v4.is_link_local())
        }
        IpAddr::V6(v6) => v6.segments()[0] & 0xe000 == 0x2000,
    }
}

/// Ports that the policy wants reachable, and that somebody else's table stops.
fn blocked(sight: &Sight, out: &mut Assessment) {
    let mesh = sight.link(&sight.policy.mesh.interface);
    // What is open for a while changes no verdict, by being blocked as little as by being open.
    let lasting = sight.desired.services.iter().filter(|service| service.name != BREAK_GLASS);
    for service in lasting {
        for family in Family::ALL {
            let approaches: Vec<(&Link, IpAddr)> = match service.scope {
                Scope::Public => {
                    let each = |door: &&'_ Link| door.addresses.iter().map(IpNet::addr).collect::<Vec<_>>();
                    let doors = sight.doors.iter();
                    doors.flat_map(|door| each(door).into_iter().map(move |a| (*door, a))).collect()
                }
                Scope::Mesh => {
                    let addresses = sight.mesh_addresses().into_iter();
                    addresses.filter_map(|address| Some((mesh?, address))).collect()
                }
                Scope::Other => Vec::new(),
            };
            let approaches = approaches
                .into_iter()
                .filter(|(_, a)| Family::of(*a) == family && !super::sight::is_link_local(*a))
                .collect::<Vec<_>>();
            blocked_in(sight, service, family, &approaches, out);
        }
    }
}

fn blocked_in(
    sight: &Sight,
    service: &Service,
    family: Family,
    approaches: &[(&Link, IpAddr)],
    out: &mut Assessment,
) {
    let Service { name, proto, port, .. } = service;
    let is_ssh = *proto == Proto::Tcp && *port == sight.policy.ssh.port && service.scope == Scope::Mesh;
    let subject = format!("{name} {proto}/{port} {family}");
    for (link, destination) in approaches {
        let mut stopped = None;
        for source in askers(sight, service, *destination) {
            let Some(judgement) = sight.judge(link, source, *destination, *proto, *port) else { return };
            let verb = if judgement.verdict == Verdict::Reject { "rejected" } else { "dropped" };
            match (judgement.verdict, judgement.by) {
                (Verdict::Accept, _) => {
                    // One of them gets in: the port is not shut, and the other stranger met
                    // a rule that is about strangers like him.
                    stopped = None;
                    break;
                }
                (Verdict::Unknown(why), _) => {
                    let text = format!(
                        "whether {subject} can be reached through {}: it depends on {why}",
                        link.name
                    );
                    out.doubt(Facet::Nftables, text);
                    stopped = None;
                    break;
                }
                // Ours is compared rule by rule elsewhere.
                (Verdict::Drop | Verdict::Reject, Some(by)) if is_ours(&by) => {}
                // Without a place it was the probe that told.
                (Verdict::Drop | Verdict::Reject, by) => stopped = Some((verb, by)),
            }
        }
        let Some((verb, by)) = stopped else { continue };
        let (by, found) = match by {
            Some(by) => (place(&by), format!("{verb} by {}", place(&by))),
            None => ("the rules".to_owned(), held(None)),
        };
        let from = match service.scope {
            Scope::Public if service.from.is_none() => "by anyone",
            Scope::Public => "from the listed addresses",
            _ => "through the mesh",
        };
        let next = if is_ssh {
            format!("Let {by} accept tcp/{port} on {}: the way in for the hub is shut.", link.name)
        } else {
            format!("Let {by} accept {proto}/{port} on {}, or take the port out of the policy.", link.name)
        };
        out.add(Finding::new(
            Code::FirewallBlocked,
            if is_ssh { Severity::High } else { Severity::Medium },
            &subject,
            format!("reachable {from} at {destination} on {}", link.name),
            found,
            next,
        ));
        return;
    }
}

/// Who may reach a service, as source addresses to try.
fn askers(sight: &Sight, service: &Service, destination: IpAddr) -> Vec<IpAddr> {
    let family = Family::of(destination);
    let mesh = &sight.policy.mesh;
    let nets = match (&service.from, service.scope) {
        (Some(from), _) => from.as_slice(),
        (None, Scope::Mesh) => mesh.prefix.as_slice(),
        (None, _) => return sight.sources(destination),
    };
    // Sources of the mesh don't come through a public interface.
    let strayed = |net: &IpNet| service.scope == Scope::Public && mesh.prefix.iter().any(|m| m.contains(net));
    let net = nets.iter().find(|net| Family::of_net(net) == family && !strayed(net));
    match net.map(|net| someone_in(net).filter(|a| *a != destination).or_else(|| net.hosts().nth(1))) {
        None => Vec::new(),
        Some(Some(address)) if net.is_some_and(|net| net.prefix_len() > 0) => vec![address],
        Some(_) => sight.sources(destination),
    }
}

/// The mesh address reached through a public interface: for the ports that are meant for
/// the mesh, and for what listens on that address.
fn leaks(sight: &Sight, snapshot: &Snapshot, out: &mut Assessment) {
    let policy = sight.policy;
    let listeners = snapshot.listeners.seen().map(Vec::as_slice).unwrap_or_default();
    for address in sight.mesh_addresses().into_iter().filter(|a| sight.is_local(*a)) {
        let mut ports = vec![(Proto::Tcp, policy.ssh.port)];
        let services = sight.desired.services.iter().filter(|s| s.scope == Scope::Mesh);
        ports.extend(services.map(|s| (s.proto, s.port)));
        ports.extend(
            listeners
                .iter()
                .filter(|l| l.address.to_canonical() == address)
                .take(64)
                .map(|l| (l.proto, l.port)),
        );
        ports.sort();
        ports.dedup();
        // Someone on the link can put any source on his packets, a mesh address as well: a
        // rule that trusts the mesh's sources without asking for its interface lets him in.
        let hub = policy.mesh.hub.iter().flat_map(|hub| hub.address.iter().copied());
        let spoofed = hub.chain(policy.mesh.prefix.iter().filter_map(someone_in));
        let spoofed: Vec<IpAddr> =
            spoofed.filter(|s| Family::of(*s) == Family::of(address) && *s != address).take(2).collect();
        // One finding an address: a host with a dozen bridges would have a dozen of the same.
        let (mut doors, mut open) = (Vec::new(), Vec::new());
        for door in &sight.doors {
            let before = open.len();
            let mut doubt = None;
            for (proto, port) in &ports {
                for source in sight.sources(address).iter().chain(&spoofed) {
                    let Some(judgement) = sight.judge(door, *source, address, *proto, *port) else { return };
                    match judgement.verdict {
                        Verdict::Accept => open.push((*proto, *port)),
                        Verdict::Unknown(why) => doubt = Some(why),
                        Verdict::Drop | Verdict::Reject => {}
                    }
                }
            }
            if open.len() > before {
                doors.push(door.name.as_str());
            } else if let Some(why) = doubt {
                let text =
                    format!("whether {address} can be reached through {}: it depends on {why}", door.name);
                out.doubt(Facet::Nftables, text);
            }
        }
        if doors.is_empty() {
            continue;
        }
        open.sort();
        open.dedup();
        let open: Vec<String> = open.iter().map(|(proto, port)| format!("{proto}/{port}")).collect();
        let mesh = &policy.mesh.interface;
        out.add(Finding::new(
            Code::MeshLeak,
            Severity::High,
            address,
            format!("answers on {mesh} only"),
            format!("a neighbour on {} gets to {}{}", listed(&doors, 4), listed(&open, 4), sight.excuse()),
            format!(
                "Put our table in force with `spokeguard apply`; it drops what is sent to {address} and \
                 does not come through {mesh}."
            ),
        ));
    }
}

/// Ports of one published range that are tried. Every one gives a finding anyway if the
/// policy does not want it; trying decides only whether it is held.
const TRIED_MAX: usize = 64;

fn dnat(sight: &Sight, rule: &Published, out: &mut Assessment) {
    let Published { place: by, proto, first, last, family, address, iifname, target } = rule;
    let unwanted: Vec<Port> = (first.get()..=last.get())
        .filter_map(Port::new)
        .filter(|port| !sight.desired.services.iter().any(|s| is_public(s, *proto, *port)))
        .collect();
    let doors: Vec<&Link> = sight
        .doors
        .iter()
        .copied()
        .filter(|door| iifname.as_ref().is_none_or(|name| matches_iifname(name, &door.name)))
        .collect();
    // A rule for an interface that is not public publishes nothing to strangers.
    if unwanted.is_empty() || (iifname.is_some() && doors.is_empty()) {
        return;
    }
    let mut approaches = Vec::new();
    for door in doors {
        for net in &door.addresses {
            let fits = family.is_none_or(|f| f == Family::of_net(net))
                && address.as_ref().is_none_or(|asked| asked.contains(&net.addr()));
            if fits {
                approaches.push((door, net.addr()));
            }
        }
        if let Some(one) = address.filter(|asked| asked.prefix_len() == asked.max_prefix_len()) {
            approaches.push((door, one.addr()));
        }
    }
    approaches.sort_by_key(|(door, address)| (door.index, *address));
    approaches.dedup_by_key(|(door, address)| (door.index, *address));
    // A rule that does not say which ports it takes, or not in a way that we understand: the
    // probe names them one by one.
    let any_port = first.get() == 1 && last.get() == u16::MAX;
    let mut asked = approaches.iter().filter(|(_, address)| !super::sight::is_link_local(*address));
    if any_port && asked.all(|(door, address)| sight.is_probed(door, *address, *proto)) {
        return;
    }
    let declared = |port| sight.desired.services.iter().any(|s| is_declared(s, *proto, port));
    let step = unwanted.len().div_ceil(TRIED_MAX).max(1);
    let tried = unwanted.iter().step_by(step).chain(unwanted.last());
    let mut held = None;
    let mut doubt = None;
    let mut ways = Vec::new();
    for port in tried {
        match sight.stranger(&approaches, *proto, *port, &|judgement| judgement.rewritten.is_some()) {
            Reach::Open(open) => ways.extend(open),
            Reach::Held(by) => held = held.or(by),
            Reach::Doubtful(why) | Reach::Blind(why) => doubt = doubt.or(Some(why)),
        }
    }
    ways.sort();
    ways.dedup();
    let subject = published_subject(rule);
    let what = format!("{} sends it to {target}", place(by));
    let (severity, found) = match (ways.is_empty(), doubt, held) {
        (false, ..) => (
            Severity::Critical,
            format!("{what}; a stranger gets in through {}{}", told(&ways), sight.excuse()),
        ),
        (true, Some(why), _) => {
            out.doubt(Facet::Nftables, format!("whether a stranger gets in at {subject}: {why}"));
            (Severity::Medium, format!("{what}; cannot tell whether a stranger gets in: {why}"))
        }
        // Open to those whom the policy names, and closed to strangers: as it should be.
        (true, None, _) if unwanted.iter().all(|port| declared(*port)) => return,
        (true, None, Some(held)) => (Severity::Low, format!("{what}; {held}")),
        (true, None, None) => (Severity::Low, format!("{what}; no stranger's packet takes it now")),
    };
    out.add(Finding::new(
        Code::DnatExposed,
        severity,
        subject,
        "not published to the public",
        found,
        "Publish it on a mesh or loopback address only (with Docker `-p ADDRESS:PORT:PORT`), or declare \
         the port under [public] or as an [[exception]].",
    ));
}

/// "tcp/5432 -> 172.17.0.2:5432".
pub(super) fn published_subject(rule: &Published) -> String {
    let Published { proto, first, last, target, .. } = rule;
    let ports = if first == last { format!("{proto}/{first}") } else { format!("{proto}/{first}-{last}") };
    format!("{ports} -> {target}")
}

/// Whether anybody at all may use this port. One for some sources only is judged like a
/// closed one: strangers are not among them.
fn is_public(service: &Service, proto: Proto, port: Port) -> bool {
    let anyone = service.from.as_ref().is_none_or(|nets| nets.iter().any(|net| net.prefix_len() == 0));
    service.scope == Scope::Public && service.proto == proto && service.port == port && anyone
}

/// Declared, at least for some.
fn is_declared(service: &Service, proto: Proto, port: Port) -> bool {
    service.scope == Scope::Public && service.proto == proto && service.port == port
}

fn matches_iifname(pattern: &str, name: &str) -> bool {
    match pattern.strip_suffix('*') {
        Some(stem) => name.starts_with(stem),
        None => pattern == name,
    }
}

#[cfg(test)]
mod tests {
    use expect_test::{Expect, expect};

    use crate::diff::stage::*;
    use crate::policy::Mode;
    use crate::ruleset::{Hook, Rule, Statement, TableFamily};

    fn check(stage: Stage, expected: Expect) {
        expected.assert_eq(&stage.show());
    }

    fn about(code: &str, stage: Stage) -> Vec<String> {
        stage.codes().into_iter().filter(|line| line.contains(code)).collect()
    }

    #[test]
    fn a_table_that_is_gone_opens_the_mesh_address_as_well() {
        check(
            Stage::spoke().without_our_table(),
            expect![[r#"
            critical firewall-missing table inet spokeguard
                wanted the policy's table, in force
                found there is no such table
            high mesh-leak 10.84.0.16
                wanted answers on wg0 only
                found a neighbour on eth0 gets to tcp/22, tcp/9984 and tcp/19999; table inet spokeguard is not there
            high mesh-leak fd84::16
                wanted answers on wg0 only
                found a neighbour on eth0 gets to tcp/22, tcp/9984 and tcp/19999; table inet spokeguard is not there
        "#]],
        );
        let off = Stage::spoke().without_our_table().policy(|p| p.enforce.firewall = false);
        assert_eq!(about("firewall-", off), [""; 0]);
    }

    #[test]
    fn a_table_that_differs_is_one_finding() {
        let mut stage = Stage::spoke();
        stage.ours = |mut table| {
            let chain = table.chains.iter_mut().find(|c| c.base.is_some())?;
            let foreign = Rule { statements: vec![dport(5432), Statement::Accept], ..Rule::default() };
            chain.rules.insert(0, foreign);
            Some(table)
        };
        assert_eq!(about("firewall-", stage), ["high firewall-changed table inet spokeguard"]);
        let mut stage = Stage::spoke().listens("tcp 0.0.0.0:5432 db");
        stage.ours = |table| Some(crate::ruleset::Table { dormant: true, ..table });
        let codes = stage.codes();
        assert!(codes.contains(&"high firewall-changed table inet spokeguard".to_owned()), "{codes:?}");
        assert!(codes.contains(&"critical listener-exposed tcp/0.0.0.0:5432".to_owned()), "{codes:?}");
    }

    #[test]
    fn our_own_table_gone_wrong_is_changed_and_not_somebody_elses_block() {
        let mut stage = Stage::spoke();
        stage.ours = |mut table| {
            let chain = table.chains.iter_mut().find(|c| c.base.is_some())?;
            let shut = Rule { statements: vec![dport(443), Statement::Drop], ..Rule::default() };
            chain.rules.insert(0, shut);
            Some(table)
        };
        assert_eq!(about("firewall-", stage), ["high firewall-changed table inet spokeguard"]);
    }

    #[test]
    fn an_address_that_is_not_there_leaks_nothing() {
        let gone = Stage::spoke().without_our_table().links(|links| links.retain(|l| l.name != "wg0"));
        assert_eq!(about("mesh-leak", gone), [""; 0]);
    }

    #[test]
    fn the_counting_table_of_audit_mode_is_wanted_too() {
        let audit = || Stage::spoke().policy(|p| p.enforce.mode = Mode::Audit);
        assert_eq!(about("firewall-", audit()), [""; 0]);
        assert_eq!(
            about("firewall-", audit().without_our_table()),
            ["critical firewall-missing table inet spokeguard"]
        );
    }

    #[test]
    fn a_wanted_port_that_another_table_drops_is_reported_per_family() {
        check(
            Stage::spoke().foreign(drops(TableFamily::Ip, 443)),
            expect![[r#"
            medium firewall-blocked https tcp/443 ipv4
                wanted reachable by anyone at 203.0.113.7 on eth0
                found dropped by table ip other chain input
        "#]],
        );
        assert_eq!(
            Stage::spoke().foreign(drops(TableFamily::Inet, 443)).codes(),
            ["medium firewall-blocked https tcp/443 ipv4", "medium firewall-blocked https tcp/443 ipv6"]
        );
        assert_eq!(Stage::spoke().foreign(drops(TableFamily::Inet, 8443)).codes(), [""; 0]);
    }

    #[test]
    fn the_way_in_for_the_hub_is_asked_for_through_the_mesh() {
        check(
            Stage::spoke().foreign(drops(TableFamily::Ip6, 22)),
            expect![[r#"
            high firewall-blocked ssh tcp/22 ipv6
                wanted reachable through the mesh at fd84::16 on wg0
                found dropped by table ip6 other chain input
        "#]],
        );
        let shut = chain(Hook::Input, 0, true, vec![vec![iifname("eth0"), Statement::Accept]]);
        let shut = Stage::spoke().foreign(table(TableFamily::Inet, "filter", shut)).codes();
        let blocked: Vec<&str> = shut.iter().map(String::as_str).collect();
        assert!(blocked.contains(&"high firewall-blocked ssh tcp/22 ipv4"), "{blocked:?}");
        assert!(blocked.contains(&"medium firewall-blocked metrics tcp/9984 ipv6"), "{blocked:?}");
        assert!(!blocked.iter().any(|line| line.contains("https")), "{blocked:?}");
    }

    #[test]
    fn a_foreign_rule_that_drops_only_some_strangers_blocks_nobody_else() {
        use crate::ruleset::{Match, Op, Operand, Term};
        let saddr = Term::Payload { protocol: "ip".into(), field: "saddr".into() };
        let bogon = Match { left: saddr, op: Op::Eq, right: Operand::Prefix(net("198.51.100.0/24")) };
        let rules = vec![vec![Statement::Match(bogon), Statement::Drop]];
        let bogons = table(TableFamily::Ip, "bogons", chain(Hook::Input, 0, false, rules));
        assert_eq!(Stage::spoke().foreign(bogons).codes(), [""; 0]);
        let saddr = Term::Payload { protocol: "ip6".into(), field: "saddr".into() };
        let near = Match { left: saddr, op: Op::Eq, right: Operand::Prefix(net("fe80::/10")) };
        let rules = vec![vec![Statement::Match(near), Statement::Drop]];
        let near = table(TableFamily::Ip6, "near", chain(Hook::Input, 0, false, rules));
        assert_eq!(Stage::spoke().foreign(near).codes(), [""; 0]);
    }

    #[test]
    fn a_published_port_is_exposed_unless_our_table_holds_it() {
        check(
            Stage::spoke().foreign(publishes(5432)),
            expect![[r#"
            low dnat-exposed tcp/5432 -> 172.17.0.2:5432
                wanted not published to the public
                found table ip nat chain prerouting sends it to 172.17.0.2:5432; held by table inet spokeguard chain forward-public
        "#]],
        );
        let open = Stage::spoke().foreign(publishes(5432)).without_our_table();
        assert_eq!(about("dnat", open), ["critical dnat-exposed tcp/5432 -> 172.17.0.2:5432"]);
        assert_eq!(about("dnat", Stage::spoke().foreign(publishes(443)).without_our_table()), [""; 0]);
    }

    #[test]
    fn a_port_published_to_some_is_reported_only_if_strangers_get_in() {
        let stage = || {
            let mut hole = exception(5432, jiff::civil::date(2027, 1, 31));
            hole.from = vec![net("192.0.2.0/24")];
            Stage::spoke().policy(move |p| p.exceptions.push(hole)).foreign(publishes(5432))
        };
        assert_eq!(about("dnat", stage()), [""; 0]);
        let open = about("dnat", stage().without_our_table());
        assert_eq!(open, ["critical dnat-exposed tcp/5432 -> 172.17.0.2:5432"]);
    }

    #[test]
    fn a_port_published_to_the_mesh_is_not_public() {
        let rules = vec![vec![iifname("wg0"), dport(5432), dnat("172.17.0.2", 5432)]];
        let nat = table(TableFamily::Ip, "nat", chain(Hook::Prerouting, -100, false, rules));
        assert_eq!(about("dnat", Stage::spoke().without_our_table().foreign(nat)), [""; 0]);
    }

    #[test]
    fn a_rule_that_trusts_mesh_sources_on_any_interface_leaks() {
        use crate::ruleset::{Match, Op, Operand, Term};
        let saddr = Term::Payload { protocol: "ip".into(), field: "saddr".into() };
        let mesh = Match { left: saddr, op: Op::Eq, right: Operand::Prefix(net("10.84.0.0/24")) };
        let rules = || vec![vec![Statement::Match(mesh.clone()), Statement::Accept]];
        let trusts = || table(TableFamily::Ip, "filter", chain(Hook::Input, 0, true, rules()));
        let leaks = about("mesh-leak", Stage::spoke().without_our_table().foreign(trusts()));
        assert!(leaks.contains(&"high mesh-leak 10.84.0.16".to_owned()), "{leaks:?}");
        assert_eq!(about("mesh-leak", Stage::spoke().foreign(trusts())), [""; 0]);
    }
}
