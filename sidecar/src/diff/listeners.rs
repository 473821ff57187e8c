//! Every socket that waits for strangers, against what the policy lets listen where.

use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;

use super::sight::{Reach, Sight, Way, is_link_local, told};
use super::{Assessment, Code, Finding, Severity, listed};
use crate::observed::{Facet, Listener, Snapshot};
use crate::policy::{Bind, MeshKind, Mode};
use crate::terms::{Port, Proto, Scope};

pub(super) fn compare(sight: &Sight, snapshot: &Snapshot, out: &mut Assessment) {
    let Some(listeners) = snapshot.listeners.seen() else { return };
    let device = snapshot.wireguard.seen().and_then(Option::as_ref);
    let tunnel = device.and_then(|d| Port::new(d.listen_port));
    for listener in listeners {
        if listener.is_loopback()
            || is_link_local(listener.address.to_canonical())
            || is_expected(sight, listener, tunnel)
        {
            continue;
        }
        match allowance(sight, listener) {
            Allowance::Anywhere => {}
            Allowance::Someone(from) => {
                admitted(sight, listener, &format!("open to {}", listed(&from, 4)), out)
            }
            Allowance::On(place) if place.addresses.contains(&listener.address.to_canonical()) => {
                // The mesh address on a public interface is `mesh-leak`, whatever listens there.
                if !sight.mesh_addresses().contains(&listener.address.to_canonical()) {
                    admitted(sight, listener, &format!("reachable as {}", listed(&place.names, 3)), out);
                }
            }
            Allowance::On(place) => report(sight, listener, Some(place), out),
            Allowance::Nowhere => report(sight, listener, None, out),
        }
    }
}

/// "tcp/0.0.0.0:5432".
pub(super) fn subject(listener: &Listener) -> String {
    format!("{}/{}", listener.proto, SocketAddr::new(listener.address, listener.port.get()))
}

/// Where the policy lets a port listen. Loopback is always allowed besides.
enum Allowance {
    Anywhere,
    /// On every address, for these sources.
    Someone(Vec<IpNet>),
    On(Place),
    Nowhere,
}

struct Place {
    addresses: Vec<IpAddr>,
    /// It is sshd's port: other words, and its own code.
    ssh: bool,
    /// "mesh", "local lan": for the text.
    names: Vec<String>,
}

fn allowance(sight: &Sight, listener: &Listener) -> Allowance {
    let policy = sight.policy;
    let ssh = listener.proto == Proto::Tcp && listener.port == policy.ssh.port;
    let services = sight.desired.services.iter();
    let services = services.filter(|s| s.proto == listener.proto && s.port == listener.port);
    let mut place = Place { addresses: Vec::new(), ssh, names: Vec::new() };
    let mut known = ssh;
    let mut someone: Vec<IpNet> = Vec::new();
    if ssh {
        match &policy.ssh.bind {
            Bind::Mesh => {
                place.addresses.extend(sight.mesh_addresses());
                place.names.push("mesh".into());
            }
            Bind::Addresses(list) => {
                place.addresses.extend(list);
                place.names.push("listed".into());
            }
        }
    }
    for service in services {
        known = true;
        match (service.scope, service.local) {
            // An [[exception]] on sshd's port may listen anywhere, too: it says so aloud.
            (Scope::Public, _) if !ssh || service.exception.is_some() => match &service.from {
                Some(from) if from.iter().all(|net| net.prefix_len() > 0) => someone.extend(from),
                _ => return Allowance::Anywhere,
            },
            (Scope::Public, _) => {}
            (Scope::Mesh, _) if ssh => {}
            (Scope::Mesh, _) => {
                place.addresses.extend(sight.mesh_addresses());
                place.names.push("mesh".into());
            }
            (Scope::Other, index) => {
                let Some(local) = index.and_then(|i| policy.locals.get(i)) else { continue };
                let links = local.interfaces.iter().flat_map(|pattern| sight.links_like(pattern));
                place.addresses.extend(links.flat_map(|l| l.addresses.iter().map(IpNet::addr)));
                place.names.push(local.name.clone());
            }
        }
    }
    if !someone.is_empty() {
        return Allowance::Someone(someone);
    }
    if known { Allowance::On(place) } else { Allowance::Nowhere }
}

/// Sockets that every such host has: the DHCP client's, and the tunnel's own.
pub(super) fn is_expected(sight: &Sight, listener: &Listener, tunnel: Option<Port>) -> bool {
    const DHCP_CLIENT: [u16; 2] = [68, 546];
    const TAILSCALE: u16 = 41_641;
    let mesh = &sight.policy.mesh;
    let port = listener.port;
    match (listener.proto, mesh.kind) {
        (Proto::Udp, _) if DHCP_CLIENT.contains(&port.get()) => true,
        (Proto::Udp, MeshKind::Wireguard) => tunnel == Some(port) || mesh.listen_port == Some(port),
        // A name is what a process says of itself; only root's is believed.
        (Proto::Udp, MeshKind::Tailscale) => port.get() == TAILSCALE || is_tailscaled(listener),
        // The PeerAPI: a port of its own choice on each of the node's mesh addresses.
        (Proto::Tcp, MeshKind::Tailscale) => {
            is_tailscaled(listener) && sight.mesh_addresses().contains(&listener.address.to_canonical())
        }
        (Proto::Tcp, MeshKind::Wireguard) => false,
    }
}

fn is_tailscaled(listener: &Listener) -> bool {
    listener.uid == 0 && listener.owner.as_ref().is_some_and(|owner| owner.process == "tailscaled")
}

/// Time and names of the local network: clients of these protocols keep their well-known port
/// open on every address and can't be told otherwise. While the rules hold it, that is worth
/// a word and no drift.
fn is_chatter(listener: &Listener) -> bool {
    const NTP: u16 = 123;
    const CHRONY: u16 = 323;
    const MDNS: u16 = 5353;
    const LLMNR: u16 = 5355;
    listener.proto == Proto::Udp
        && listener.is_wildcard()
        && [NTP, CHRONY, MDNS, LLMNR].contains(&listener.port.get())
}

/// A socket that may be where it is, though not for everybody: reported if a stranger gets
/// to it all the same.
fn admitted(sight: &Sight, listener: &Listener, meant: &str, out: &mut Assessment) {
    let subject = subject(listener);
    let ssh = listener.proto == Proto::Tcp && listener.port == sight.policy.ssh.port;
    match sight.reaches(listener) {
        Reach::Open(ways) => {
            let (code, severity) = exposed(sight, listener, ssh);
            let found = gets_in(sight, listener, &ways);
            let next =
                "Put our table in force with `spokeguard apply`: it lets in only whom the policy names.";
            let finding = Finding::new(code, severity, subject, format!("{meant} only"), found, next);
            out.add(finding.held_by(listener.owner.as_ref()));
        }
        Reach::Doubtful(why) => {
            out.doubt(Facet::Nftables, format!("whether a stranger gets in at {subject}: {why}"));
        }
        Reach::Held(_) | Reach::Blind(_) => {}
    }
}

/// A neighbour is a stranger too, but there are fewer of them.
fn exposed(sight: &Sight, listener: &Listener, ssh: bool) -> (Code, Severity) {
    match (ssh, sight.is_neighbours_only(listener)) {
        (true, _) => (Code::SshBind, Severity::High),
        (false, true) => (Code::ListenerExposed, Severity::High),
        (false, false) => (Code::ListenerExposed, Severity::Critical),
    }
}

fn gets_in(sight: &Sight, listener: &Listener, ways: &[Way]) -> String {
    let who = if sight.is_neighbours_only(listener) {
        "a neighbour who sends to this address gets in"
    } else {
        "a stranger gets in"
    };
    format!("{who} through {}{}", told(ways), sight.excuse())
}

fn report(sight: &Sight, listener: &Listener, place: Option<Place>, out: &mut Assessment) {
    let reach = sight.reaches(listener);
    if matches!(reach, Reach::Held(_)) && place.is_none() {
        // Clients talk from unbound UDP sockets on ports of the kernel's choice; they look
        // like servers, and are worth a word only if somebody gets to them.
        const EPHEMERAL: u16 = 32_768;
        if listener.proto == Proto::Udp && listener.port.get() >= EPHEMERAL {
            return;
        }
        // An interface that is neither public nor mesh, and that no [[local]] speaks of.
        let link = sight.holder(listener.address.to_canonical());
        if link.is_some_and(|l| sight.is_unspoken(l)) {
            return;
        }
    }
    let who = match &listener.owner {
        None => "its owner",
        Some(owner) if owner.pid == 1 => "its socket unit (`systemctl list-sockets` names it)",
        Some(owner) => owner.process.as_str(),
    };
    let ssh = place.as_ref().is_some_and(|p| p.ssh);
    let subject = subject(listener);
    if let Reach::Doubtful(why) = &reach {
        out.doubt(Facet::Nftables, format!("whether a stranger gets in at {subject}: {why}"));
    }
    let (code, severity) = match (&reach, ssh) {
        (Reach::Open(_), _) => exposed(sight, listener, ssh),
        (_, true) => (Code::SshBind, Severity::Medium),
        (Reach::Held(_), false) if place.is_none() && is_chatter(listener) => {
            (Code::ListenerWide, Severity::Info)
        }
        (Reach::Held(_), false) => (Code::ListenerWide, Severity::Low),
        (Reach::Doubtful(_) | Reach::Blind(_), false) => (Code::ListenerWide, Severity::Medium),
    };
    let bound = if listener.is_wildcard() { "on every address" } else { "on an address it may not use" };
    let found = match &reach {
        Reach::Open(ways) => gets_in(sight, listener, ways),
        Reach::Held(Some(by)) => format!("listens {bound}; {by}"),
        Reach::Held(None) => format!("listens {bound}; no public interface leads there now"),
        Reach::Doubtful(why) | Reach::Blind(why) => {
            format!("listens {bound}; cannot tell whether a stranger gets in: {why}")
        }
    };
    let allowed = place.as_ref().map(|p| listed(&p.addresses, 4)).filter(|text| !text.is_empty());
    let wanted = match (&place, &allowed) {
        (None, _) => "closed to the public: the policy names no such port".to_owned(),
        (Some(place), None) => format!("{} addresses only, and there are none now", listed(&place.names, 3)),
        (Some(place), Some(allowed)) => format!("{} only: {allowed}", listed(&place.names, 3)),
    };
    let guard = &sight.policy.enforce;
    let refused = guard.binds && guard.mode == Mode::Enforce && !sight.policy.ssh.rebind;
    let next = match (&allowed, ssh) {
        (Some(allowed), true) => {
            // It listens since before the guard, or the guard is not there.
            let later = if refused { "; as it is, the bind guard refuses its next start" } else { "" };
            format!(
                "Set `ListenAddress` of sshd (or ListenStream of ssh.socket) to {allowed} and restart \
                 it{later}."
            )
        }
        (Some(allowed), false) => format!("Bind {who} to {allowed}, or to a loopback address."),
        (None, true) => "Bring the mesh interface up, then let sshd listen on its address only.".to_owned(),
        (None, false) => {
            let mesh = sight.mesh_addresses();
            let mesh = if mesh.is_empty() { "the mesh address".to_owned() } else { listed(&mesh, 2) };
            format!(
                "Stop {who}, bind it to loopback or {mesh}, or declare the port under [public], as a \
                 [[mesh.service]] or as an [[exception]]."
            )
        }
    };
    out.add(Finding::new(code, severity, subject, wanted, found, next).held_by(listener.owner.as_ref()));
}

#[cfg(test)]
mod tests {
    use expect_test::{Expect, expect};

    use crate::diff::stage::*;
    use crate::observed::Facet;
    use crate::policy::{Bind, MeshKind, Mode};
    use crate::ruleset::{Hook, Statement, TableFamily};

    fn check(stage: Stage, expected: Expect) {
        expected.assert_eq(&stage.show());
    }

    /// Only what is said of listeners; the absent table is a finding of its own.
    fn codes(stage: Stage) -> Vec<String> {
        let about = |line: &String| ["listener-", "ssh-bind"].iter().any(|code| line.contains(code));
        stage.codes().into_iter().filter(about).collect()
    }

    #[test]
    fn a_host_that_is_as_its_policy_says_has_no_findings() {
        check(Stage::spoke(), expect![[r#""#]]);
    }

    #[test]
    fn a_port_open_to_the_world_but_held_by_the_firewall_is_wide() {
        check(
            Stage::spoke().listens("tcp 0.0.0.0:5432 postgres"),
            expect![[r#"
            low listener-wide tcp/0.0.0.0:5432 [postgres]
                wanted closed to the public: the policy names no such port
                found listens on every address; held by table inet spokeguard chain public
        "#]],
        );
    }

    #[test]
    fn a_port_open_to_the_world_but_meant_for_the_mesh_is_reported() {
        check(
            Stage::spoke().without_our_table().listens("tcp 0.0.0.0:19999 netdata"),
            expect![[r#"
                critical firewall-missing table inet spokeguard
                    wanted the policy's table, in force
                    found there is no such table
                critical listener-exposed tcp/0.0.0.0:19999 [netdata]
                    wanted mesh only: 10.84.0.16 and fd84::16
                    found a stranger gets in through eth0 over ipv4; table inet spokeguard is not there
                high mesh-leak 10.84.0.16
                    wanted answers on wg0 only
                    found a neighbour on eth0 gets to tcp/22, tcp/9984 and tcp/19999; table inet spokeguard is not there
                high mesh-leak fd84::16
                    wanted answers on wg0 only
                    found a neighbour on eth0 gets to tcp/22, tcp/9984 and tcp/19999; table inet spokeguard is not there
            "#]],
        );
    }

    #[test]
    fn one_socket_on_the_ipv6_wildcard_counts_for_both_families() {
        let open = |text: &str| {
            let findings = Stage::spoke().without_our_table().listens(text).assess().findings;
            let found = findings.into_iter().find(|f| f.subject.ends_with(":5432")).expect("a finding");
            found.found.split(';').next().unwrap_or_default().to_owned()
        };
        assert_eq!(open("tcp [::]:5432 db"), "a stranger gets in through eth0 over ipv4 and ipv6");
        assert_eq!(open("tcp [::]:5432 db v6only"), "a stranger gets in through eth0 over ipv6");
        assert_eq!(open("tcp 0.0.0.0:5432 db"), "a stranger gets in through eth0 over ipv4");
        assert_eq!(open("tcp 203.0.113.7:5432 db"), "a stranger gets in through eth0 over ipv4");
    }

    #[test]
    fn a_firewall_for_one_family_does_not_hold_the_other() {
        let stage = Stage::spoke().without_our_table().foreign(drops(TableFamily::Ip, 5432));
        check(
            stage.listens("tcp [::]:5432 db"),
            expect![[r#"
                critical firewall-missing table inet spokeguard
                    wanted the policy's table, in force
                    found there is no such table
                critical listener-exposed tcp/[::]:5432 [db]
                    wanted closed to the public: the policy names no such port
                    found a stranger gets in through eth0 over ipv6; table inet spokeguard is not there
                high mesh-leak 10.84.0.16
                    wanted answers on wg0 only
                    found a neighbour on eth0 gets to tcp/22, tcp/9984 and tcp/19999; table inet spokeguard is not there
                high mesh-leak fd84::16
                    wanted answers on wg0 only
                    found a neighbour on eth0 gets to tcp/22, tcp/9984 and tcp/19999; table inet spokeguard is not there
            "#]],
        );
    }

    #[test]
    fn a_firewall_that_drops_bogons_only_holds_nobody() {
        use crate::ruleset::{Match, Op, Operand, Term};
        let saddr = Term::Payload { protocol: "ip".into(), field: "saddr".into() };
        let bogons = ["192.0.2.0/24", "198.51.100.0/24", "203.0.113.0/24", "198.18.0.0/15"];
        let right = Operand::Set(bogons.map(|text| Operand::Prefix(net(text))).to_vec());
        let rule = vec![Statement::Match(Match { left: saddr, op: Op::Eq, right }), Statement::Drop];
        let stage = Stage::spoke().without_our_table().foreign(table(
            TableFamily::Ip,
            "bogons",
            chain(Hook::Input, 0, false, vec![rule]),
        ));
        assert_eq!(
            codes(stage.listens("tcp 0.0.0.0:5432 db")),
            ["critical listener-exposed tcp/0.0.0.0:5432"]
        );
    }

    #[test]
    fn loopback_and_declared_places_are_no_findings() {
        let stage = ["tcp 127.0.0.1:5432 db", "tcp [::1]:5432 db", "tcp [::ffff:127.0.0.1]:5432 db"]
            .into_iter()
            .chain([
                "tcp 10.84.0.16:19999 netdata",
                "tcp [fd84::16]:9984 spokeguard",
                "tcp 127.0.0.1:22 sshd",
                "tcp [::ffff:10.84.0.16]:22 sshd",
                "tcp [fe80::7]:9999 neighbourly",
            ])
            .fold(Stage::spoke().without_our_table(), Stage::listens);
        assert_eq!(codes(stage), [""; 0]);
    }

    #[test]
    fn the_mesh_address_is_no_protection_from_a_neighbour() {
        let listens = "tcp 10.84.0.16:5432 postgres";
        check(
            Stage::spoke().without_our_table().listens(listens),
            expect![[r#"
                critical firewall-missing table inet spokeguard
                    wanted the policy's table, in force
                    found there is no such table
                high listener-exposed tcp/10.84.0.16:5432 [postgres]
                    wanted closed to the public: the policy names no such port
                    found a neighbour who sends to this address gets in through eth0 over ipv4; table inet spokeguard is not there
                high mesh-leak 10.84.0.16
                    wanted answers on wg0 only
                    found a neighbour on eth0 gets to tcp/22, tcp/5432, tcp/9984 and tcp/19999; table inet spokeguard is not there
                high mesh-leak fd84::16
                    wanted answers on wg0 only
                    found a neighbour on eth0 gets to tcp/22, tcp/9984 and tcp/19999; table inet spokeguard is not there
            "#]],
        );
        assert_eq!(codes(Stage::spoke().listens(listens)), ["low listener-wide tcp/10.84.0.16:5432"]);
    }

    #[test]
    fn an_interface_with_link_local_addresses_only_is_still_a_way_in() {
        let stage = || {
            Stage::spoke()
                .without_our_table()
                .links(|links| links[1].addresses = vec![net("fe80::7/64")])
                .listens("tcp [::]:5432 db")
        };
        assert_eq!(codes(stage()), ["critical listener-exposed tcp/[::]:5432"]);
        let cut_off = stage().links(|links| links[1].addresses.clear());
        assert_eq!(codes(cut_off), ["low listener-wide tcp/[::]:5432"]);
    }

    #[test]
    fn neighbours_are_asked_about_with_link_local_sources() {
        use crate::ruleset::{Match, Op, Operand, Term};
        let saddr = Term::Payload { protocol: "ip6".into(), field: "saddr".into() };
        let near = Match { left: saddr, op: Op::Eq, right: Operand::Prefix(net("fe80::/10")) };
        let rules = vec![vec![Statement::Match(near), Statement::Accept]];
        let stage = |rules| {
            Stage::spoke()
                .without_our_table()
                .foreign(table(TableFamily::Inet, "filter", chain(Hook::Input, 0, true, rules)))
                .listens("tcp [::]:5432 db")
        };
        assert_eq!(codes(stage(rules)), ["critical listener-exposed tcp/[::]:5432"]);
        assert_eq!(codes(stage(Vec::new())), ["low listener-wide tcp/[::]:5432"]);
    }

    #[test]
    fn a_proxy_behind_a_published_port_is_not_where_the_packet_goes() {
        let stage = Stage::spoke().without_our_table().foreign(publishes(5432));
        let findings = stage.listens("tcp 0.0.0.0:5432 docker-proxy").assess().findings;
        let found = findings.iter().find(|f| f.subject == "tcp/0.0.0.0:5432").expect("a finding");
        assert_eq!(found.code, crate::diff::Code::ListenerWide);
        assert_eq!(found.found, "listens on every address; sent elsewhere by table ip nat chain prerouting");
        assert!(findings.iter().any(|f| f.code == crate::diff::Code::DnatExposed), "{findings:?}");
    }

    #[test]
    fn the_declared_tunnel_port_is_known_without_sight_of_the_tunnel() {
        let stage = |number| {
            Stage::spoke()
                .policy(move |p| p.mesh.listen_port = crate::terms::Port::new(number))
                .blind(Facet::Wireguard)
                .listens("udp 0.0.0.0:5182 -")
        };
        assert_eq!(codes(stage(5182)), [""; 0]);
        assert_eq!(codes(stage(5183)), ["low listener-wide udp/0.0.0.0:5182"]);
    }

    #[test]
    fn a_socket_held_to_the_mesh_interface_hears_no_stranger() {
        let stage = || Stage::spoke().without_our_table();
        assert_eq!(
            codes(stage().listens("tcp 0.0.0.0:5432 db dev=3")),
            ["low listener-wide tcp/0.0.0.0:5432"]
        );
        assert_eq!(
            codes(stage().listens("tcp 0.0.0.0:5432 db dev=2")),
            ["critical listener-exposed tcp/0.0.0.0:5432"]
        );
    }

    #[test]
    fn without_sight_of_the_rules_nothing_is_called_held() {
        check(
            Stage::spoke().blind(Facet::Nftables).listens("tcp 0.0.0.0:5432 db"),
            expect![[r#"
            high control-unproven control firewall
                wanted our table in force
                found could not be seen: needs CAP_NET_ADMIN: run as root
            medium listener-wide tcp/0.0.0.0:5432 [db]
                wanted closed to the public: the policy names no such port
                found listens on every address; cannot tell whether a stranger gets in: nftables could not be read (needs CAP_NET_ADMIN: run as root)
        "#]],
        );
        assert_eq!(
            codes(Stage::spoke().blind(Facet::Links).listens("tcp 0.0.0.0:5432 db")),
            ["medium listener-wide tcp/0.0.0.0:5432"]
        );
    }

    #[test]
    fn a_rule_that_we_do_not_understand_is_a_doubt_and_not_an_answer() {
        let rule = vec![dport(5432), Statement::Unknown("{\"queue\":{}}".into()), Statement::Drop];
        let queue = table(TableFamily::Inet, "ips", chain(Hook::Input, 0, false, vec![rule]));
        check(
            Stage::spoke().without_our_table().foreign(queue).listens("tcp 0.0.0.0:5432 db"),
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
                medium listener-wide tcp/0.0.0.0:5432 [db]
                    wanted closed to the public: the policy names no such port
                    found listens on every address; cannot tell whether a stranger gets in: it depends on {"queue":{}}
                doubt nftables: whether a stranger gets in at tcp/0.0.0.0:5432: it depends on {"queue":{}}
            "#]],
        );
    }

    #[test]
    fn clients_and_the_tunnel_itself_are_not_servers() {
        let usual =
            ["udp 0.0.0.0:68 dhcpcd", "udp [fe80::7]:546 dhcpcd", "udp 0.0.0.0:40021 -", "udp [::]:40021 -"];
        let stage = usual.into_iter().fold(Stage::spoke().without_our_table(), Stage::listens);
        assert_eq!(codes(stage), [""; 0]);
        let client = "udp 0.0.0.0:53211 resolver";
        assert_eq!(codes(Stage::spoke().listens(client)), [""; 0]);
        assert_eq!(
            codes(Stage::spoke().without_our_table().listens(client)),
            ["critical listener-exposed udp/0.0.0.0:53211"]
        );
        assert_eq!(
            codes(Stage::spoke().listens("udp 0.0.0.0:161 snmpd")),
            ["low listener-wide udp/0.0.0.0:161"]
        );
    }

    #[test]
    fn a_client_on_its_well_known_port_is_no_drift_while_the_rules_hold_it() {
        use crate::report::{Report, Verdict};
        let verdict = |stage: Stage| {
            let (desired, snapshot) = stage.set();
            let assessment = crate::diff::assess(&desired, &snapshot, snapshot.at);
            Report::new(&desired, &snapshot, assessment, snapshot.at).verdict
        };
        for (socket, subject) in [
            ("udp 0.0.0.0:323 chronyd", "udp/0.0.0.0:323"),
            ("udp [::]:5353 avahi-daemon", "udp/[::]:5353"),
            ("udp 0.0.0.0:5355 systemd-resolve", "udp/0.0.0.0:5355"),
        ] {
            let held = || Stage::spoke().listens(socket);
            assert_eq!(codes(held()), [format!("info listener-wide {subject}")]);
            assert_eq!(verdict(held()), Verdict::Ok);
            assert_eq!(
                codes(held().without_our_table()),
                [format!("critical listener-exposed {subject}")],
                "and when they don't, it is what it is"
            );
            assert_eq!(codes(held().blind(Facet::Nftables)), [format!("medium listener-wide {subject}")]);
        }
        for (socket, found) in [
            ("tcp 0.0.0.0:5355 systemd-resolve", "low listener-wide tcp/0.0.0.0:5355"),
            ("udp 203.0.113.7:5353 avahi-daemon", "low listener-wide udp/203.0.113.7:5353"),
            ("udp 0.0.0.0:161 snmpd", "low listener-wide udp/0.0.0.0:161"),
        ] {
            assert_eq!(codes(Stage::spoke().listens(socket)), [found]);
            assert_eq!(verdict(Stage::spoke().listens(socket)), Verdict::Drift);
        }
    }

    #[test]
    fn tailscale_has_sockets_of_its_own() {
        let stage = || {
            Stage::spoke().policy(|p| {
                p.mesh.kind = MeshKind::Tailscale;
                p.mesh.keepalive = None;
                p.mesh.address.clear();
            })
        };
        let usual =
            ["tcp 10.84.0.16:38211 tailscaled", "udp 0.0.0.0:41641 tailscaled", "udp [::]:50333 tailscaled"];
        assert_eq!(codes(usual.into_iter().fold(stage(), Stage::listens)), [""; 0]);
        assert_eq!(
            codes(stage().listens("tcp 10.84.0.16:38211 tailscaled uid=1000")),
            ["low listener-wide tcp/10.84.0.16:38211"]
        );
        assert_eq!(
            codes(stage().listens("tcp 0.0.0.0:38211 tailscaled")),
            ["low listener-wide tcp/0.0.0.0:38211"]
        );
        assert_eq!(codes(Stage::spoke().listens("udp 0.0.0.0:41641 x").without_our_table()).len(), 1);
    }

    #[test]
    fn a_lan_service_listens_on_the_lan_only() {
        let stage = || {
            Stage::spoke()
                .policy(|p| p.locals.push(lan("vmbr*", 8006)))
                .links(|links| links.push(link(4, "vmbr0", &["192.168.7.1/24"])))
        };
        let allowed = || stage().listens("tcp 192.168.7.1:8006 pveproxy");
        assert_eq!(codes(allowed()), [""; 0]);
        // A neighbour on eth0 sends to the LAN's address.
        let exposed = codes(allowed().without_our_table());
        assert_eq!(exposed, ["high listener-exposed tcp/192.168.7.1:8006"]);
        check(
            stage().listens("tcp 0.0.0.0:8006 pveproxy"),
            expect![[r#"
            low listener-wide tcp/0.0.0.0:8006 [pveproxy]
                wanted lan only: 192.168.7.1
                found listens on every address; held by table inet spokeguard chain public
        "#]],
        );
        assert_eq!(
            codes(stage().listens("tcp 192.168.7.1:9999 other")),
            ["low listener-wide tcp/192.168.7.1:9999"]
        );
    }

    #[test]
    fn an_interface_that_the_policy_leaves_out_is_its_own_business() {
        let stage = || {
            Stage::spoke()
                .policy(|p| p.public.interfaces = Some(lan("eth0", 1).interfaces))
                .links(|links| links.push(link(4, "virbr0", &["192.168.122.1/24"])))
                .listens("tcp 192.168.122.1:53 dnsmasq")
        };
        assert_eq!(codes(stage()), [""; 0]);
        let exposed = codes(stage().without_our_table());
        assert_eq!(exposed, ["high listener-exposed tcp/192.168.122.1:53"], "a neighbour on eth0 gets there");
    }

    #[test]
    fn strangers_who_come_by_an_interface_that_the_list_does_not_name_are_not_overlooked() {
        let stage = |name: &str, master| {
            Stage::spoke().policy(|p| p.public.interfaces = Some(lan(name, 1).interfaces)).links(
                move |links| {
                    links[1].master = master;
                },
            )
        };
        assert_eq!(stage("eth0", None).codes(), [""; 0]);
        // Renamed: eth0 of the stage is not what the policy calls it.
        let renamed = || stage("ens5", None);
        assert_eq!(renamed().codes(), ["high control-unproven interface eth0"]);
        assert_eq!(renamed().assess().doubts.len(), 1, "the verdict can't be ok");
        // Behind a NAT of the cloud its address tells nothing; that no public interface is there does.
        let bridged = |address: &'static str, master| {
            stage("eth0", master).links(move |links| links.push(link(4, "vmbr0", &[address])))
        };
        let codes = bridged("10.0.0.7/24", Some(4)).codes();
        assert_eq!(codes, ["high control-unproven interface vmbr0"]);
        assert_eq!(bridged("10.0.0.7/24", None).codes(), [""; 0]);
        assert_eq!(bridged("8.8.4.4/24", None).codes(), ["high control-unproven interface vmbr0"]);
        let spoken = bridged("8.8.4.4/24", None).policy(|p| p.locals.push(lan("vmbr0", 53)));
        assert_eq!(spoken.codes(), [""; 0]);
    }

    #[test]
    fn an_exception_listens_anywhere_for_as_long_as_it_holds() {
        let stage = |until| {
            Stage::spoke()
                .policy(move |p| p.exceptions.push(exception(2222, until)))
                .listens("tcp 0.0.0.0:2222 sshd")
        };
        assert_eq!(codes(stage(jiff::civil::date(2027, 1, 31))), [""; 0]);
        assert_eq!(codes(stage(jiff::civil::date(2026, 1, 31))), ["low listener-wide tcp/0.0.0.0:2222"]);
    }

    #[test]
    fn an_exception_for_some_is_not_one_for_all() {
        let stage = || {
            let mut hole = exception(2222, jiff::civil::date(2027, 1, 31));
            hole.from = vec![net("192.0.2.0/24")];
            Stage::spoke().policy(move |p| p.exceptions.push(hole)).listens("tcp 0.0.0.0:2222 sshd")
        };
        assert_eq!(codes(stage()), [""; 0]);
        let open = codes(stage().without_our_table());
        assert_eq!(open, ["critical listener-exposed tcp/0.0.0.0:2222"]);
    }

    #[test]
    fn sshd_beyond_the_mesh_is_graver_where_a_stranger_gets_in() {
        let listens = "tcp 0.0.0.0:22 sshd";
        check(
            Stage::spoke().listens(listens),
            expect![[r#"
            medium ssh-bind tcp/0.0.0.0:22 [sshd]
                wanted mesh only: 10.84.0.16 and fd84::16
                found listens on every address; held by table inet spokeguard chain public
        "#]],
        );
        assert_eq!(
            codes(Stage::spoke().without_our_table().listens(listens)),
            ["high ssh-bind tcp/0.0.0.0:22"]
        );
        let lists = |p: &mut crate::policy::Policy| {
            p.ssh.bind = Bind::Addresses(vec![ip("10.84.0.16"), ip("192.168.7.1")]);
        };
        let stage = || Stage::spoke().policy(lists).links(|l| l.push(link(4, "eth1", &["192.168.7.1/24"])));
        let bound = codes(stage().listens("tcp 192.168.7.1:22 sshd"));
        // The IPv6 mesh address is not in the list.
        assert_eq!(bound, ["medium ssh-bind tcp/[fd84::16]:22"]);
    }

    #[test]
    fn audit_mode_says_why_the_port_is_open() {
        let stage = Stage::spoke().policy(|p| p.enforce.mode = Mode::Audit).listens("tcp 0.0.0.0:5432 db");
        let findings = stage.assess().findings;
        let found = findings.iter().find(|f| f.subject == "tcp/0.0.0.0:5432").expect("a finding");
        assert!(found.found.ends_with("; mode is audit: nothing is dropped"), "{}", found.found);
    }

    #[test]
    fn workers_that_share_an_address_are_one_finding() {
        let stage = (0..8).fold(Stage::spoke(), |stage, _| stage.listens("tcp 0.0.0.0:8080 worker"));
        assert_eq!(codes(stage), ["low listener-wide tcp/0.0.0.0:8080"]);
        let stage = [" dev=3", "", " dev=3"]
            .into_iter()
            .fold(Stage::spoke(), |stage, device| stage.listens(&format!("tcp 0.0.0.0:22 sshd{device}")));
        let worst = codes(stage.without_our_table());
        assert_eq!(worst, ["high ssh-bind tcp/0.0.0.0:22"], "held to the mesh it would be medium");
    }

    #[test]
    fn ten_thousand_listeners_are_all_judged() {
        let mut stage = Stage::spoke().without_our_table();
        let base = listener("tcp 0.0.0.0:1 many");
        stage
            .listeners()
            .extend((20_000..30_000).map(|n| crate::observed::Listener { port: port(n), ..base.clone() }));
        let exposed = codes(stage);
        assert_eq!(exposed.len(), 10_000);
        assert!(exposed.iter().all(|line| line.starts_with("critical listener-exposed")));
    }
}
