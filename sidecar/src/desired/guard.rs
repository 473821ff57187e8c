//! What the tc guard lets in, as a value: the second layer, for the moments in which our
//! table is away. Made from the very openings that the table's `public` chains are made
//! of, so that the two can't say different things of a stranger's new TCP connection.
//!
//! The guard sees a packet before any NAT: the port is the one that the outsider asked
//! for. It judges the first packet of a connection (SYN without ACK) that arrives on a
//! public interface and nothing else; the mesh, and so the hub's way in, never meets it.

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnet::IpNet;

use super::DropReason;
use super::table::stranger_openings;
use crate::policy::{Mode, Policy};
use crate::terms::{Family, IfacePattern, Port};

#[derive(Clone, Debug, PartialEq)]
pub struct GuardRules {
    /// Only counts what it would refuse.
    pub audit: bool,
    /// Refused under a reason of its own.
    pub ssh: Port,
    /// Addresses that have no business on a public interface, at either end.
    pub mesh: Vec<IpNet>,
    /// Ports open to anyone.
    pub anyone: BTreeSet<Port>,
    /// Ports open to some, or at some addresses.
    pub listed: Vec<Listed>,
    /// Ports open for a while; beside `listed`, and the same whatever the policy.
    pub timed: Vec<Timed>,
    interfaces: Interfaces,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    pub port: Port,
    pub from: Vec<IpNet>,
    /// Addresses of this host; empty: all.
    pub to: Vec<IpAddr>,
}

/// A port that closes by itself, whoever is alive then.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Timed {
    pub port: Port,
    pub from: Vec<IpNet>,
    pub until: Boot,
}

/// Nanoseconds since the machine was booted, its sleep included (CLOCK_BOOTTIME).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Boot(pub u64);

#[derive(Clone, Debug, PartialEq, Eq)]
struct Interfaces {
    mesh: String,
    locals: Vec<IfacePattern>,
    public: Option<Vec<IfacePattern>>,
}

/// What an interface is to the guard.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Side {
    Public,
    Mesh,
    /// One of a `[[local]]`.
    Local,
    /// The policy doesn't speak of it: loopback, or not on the list of public ones.
    Other,
}

/// The first packet of a TCP connection, as it arrives on a public interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Syn {
    pub source: IpAddr,
    pub destination: IpAddr,
    /// The port asked for. 0 can't be opened.
    pub port: u16,
    /// Where it would be routed on to; `None`: it is for this host.
    pub onward: Option<Side>,
}

impl GuardRules {
    pub(super) fn new(policy: &Policy, today: jiff::civil::Date) -> Self {
        let Policy { mesh, public, ssh, locals, enforce, .. } = policy;
        let (mut anyone, mut listed): (_, Vec<Listed>) = (BTreeSet::new(), Vec::new());
        for opening in stranger_openings(policy, today) {
            match opening.from {
                None => anyone.extend(opening.ports),
                Some(from) => listed.extend(opening.ports.iter().map(|&port| Listed {
                    port,
                    from: from.to_vec(),
                    to: opening.to.into_iter().collect(),
                })),
            }
        }
        Self {
            audit: enforce.mode == Mode::Audit,
            ssh: ssh.port,
            mesh: mesh.prefix.clone(),
            anyone,
            listed: listed.into_iter().map(Listed::plain).collect(),
            timed: Vec::new(),
            interfaces: Interfaces {
                mesh: mesh.interface.clone(),
                locals: locals.iter().flat_map(|local| &local.interfaces).cloned().collect(),
                public: public.interfaces.clone(),
            },
        }
    }

    /// As the table's base chains sort interfaces, in their order.
    pub fn side(&self, interface: &str) -> Side {
        let Interfaces { mesh, locals, public } = &self.interfaces;
        let is_any = |list: &[IfacePattern]| list.iter().any(|pattern| pattern.matches(interface));
        if interface == "lo" {
            Side::Other
        } else if interface == mesh {
            Side::Mesh
        } else if is_any(locals) {
            Side::Local
        } else if public.as_deref().is_none_or(is_any) {
            Side::Public
        } else {
            Side::Other
        }
    }

    /// Why this connection is refused; `None`: it may come in. What audit mode would
    /// refuse is told as well.
    pub fn judge(&self, syn: &Syn, now: Boot) -> Option<DropReason> {
        let in_mesh = |address: IpAddr| self.mesh.iter().any(|net| net.contains(&address));
        if in_mesh(syn.destination) {
            return Some(DropReason::WeakHost);
        }
        if in_mesh(syn.source) {
            return Some(DropReason::SpoofedMesh);
        }
        match syn.onward {
            Some(Side::Public | Side::Other) => None,
            Some(Side::Mesh) => Some(DropReason::Forward),
            Some(Side::Local) => (!self.is_open(syn, now)).then_some(DropReason::Forward),
            None if self.is_open(syn, now) => None,
            None if syn.port == self.ssh.get() => Some(DropReason::Ssh),
            None => Some(DropReason::PublicTcp),
        }
    }

    fn is_open(&self, syn: &Syn, now: Boot) -> bool {
        let Some(port) = Port::new(syn.port) else { return false };
        let within = |nets: &[IpNet]| nets.iter().any(|net| net.contains(&syn.source));
        self.anyone.contains(&port)
            || self.listed.iter().any(|listed| {
                let to = listed.to.is_empty() || listed.to.contains(&syn.destination);
                listed.port == port && to && within(&listed.from)
            })
            || self.timed.iter().any(|timed| timed.port == port && now < timed.until && within(&timed.from))
    }
}

impl Listed {
    /// Without unspecified addresses: those are any address of their family.
    fn plain(self) -> Self {
        match self.to[..] {
            [to] if to.is_unspecified() => {
                let family = Family::of(to);
                let from = self.from.into_iter().filter(|net| Family::of_net(net) == family).collect();
                Self { from, to: Vec::new(), ..self }
            }
            _ => self,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::desired::{Desired, samples};
    use crate::policy::{Bind, Sources};

    fn rules(policy: Policy) -> GuardRules {
        Desired::new(policy, samples::TODAY).expect("a path").guard.expect("a guard")
    }

    fn judged(
        rules: &GuardRules,
        from: &str,
        to: &str,
        port: u16,
        onward: Option<Side>,
    ) -> Option<DropReason> {
        let syn = Syn { source: samples::ip(from), destination: samples::ip(to), port, onward };
        rules.judge(&syn, Boot(1000))
    }

    #[test]
    fn a_stranger_reaches_what_is_public_and_nothing_else() {
        use DropReason::{PublicTcp, SpoofedMesh, Ssh, WeakHost};
        let rules = rules(samples::everything());
        for (from, to) in [("192.0.2.200", "198.51.100.7"), ("2001:db8::1", "2001:db8::7")] {
            let here = |port| judged(&rules, from, to, port, None);
            assert_eq!([80, 443, 2222].map(here), [None; 3]);
            assert_eq!(here(22), Some(Ssh));
            assert_eq!([0, 53, 3333, 5432, 8443, 9984, 19999, 51821].map(here), [Some(PublicTcp); 8]);
        }
        let here = |from, to, port| judged(&rules, from, to, port, None);
        assert_eq!(here("192.0.2.130", "198.51.100.7", 8443), None, "an exception by source");
        assert_eq!(here("192.0.2.200", "10.84.0.16", 443), Some(WeakHost));
        assert_eq!(here("10.84.0.1", "198.51.100.7", 443), Some(SpoofedMesh), "the hub comes by the mesh");
    }

    #[test]
    fn what_is_routed_on_is_refused_only_on_the_way_to_the_mesh_or_a_local_network() {
        let rules = rules(samples::everything());
        let on = |port, side| judged(&rules, "192.0.2.200", "203.0.113.9", port, Some(side));
        for port in [443, 5432] {
            assert_eq!(on(port, Side::Public), None, "{port}: not ours to judge");
            assert_eq!(on(port, Side::Mesh), Some(DropReason::Forward), "{port}");
        }
        assert_eq!(on(443, Side::Local), None);
        assert_eq!(on(5432, Side::Local), Some(DropReason::Forward));
    }

    #[test]
    fn an_interface_is_what_the_base_chains_take_it_for() {
        let spoke = rules(samples::everything());
        let sides =
            |names: &[&str], rules: &GuardRules| names.iter().map(|n| rules.side(n)).collect::<Vec<_>>();
        assert_eq!(
            sides(&["lo", "wg0", "vmbr0", "docker0", "eth0", "newly0"], &spoke),
            [Side::Other, Side::Mesh, Side::Local, Side::Local, Side::Public, Side::Public]
        );
        let hub = rules(samples::hub());
        assert_eq!(
            sides(&["eth0", "ens5", "eth1", "wg0"], &hub),
            [Side::Public, Side::Public, Side::Other, Side::Mesh]
        );
    }

    #[test]
    fn sshd_outside_of_the_mesh_is_open_at_its_address_for_its_sources() {
        let mut policy = samples::everything();
        policy.ssh.bind = Bind::Addresses(vec![samples::ip("198.51.100.7"), samples::ip("10.84.0.16")]);
        policy.ssh.from = Sources::Prefixes(vec![samples::net("192.0.2.0/24"), samples::net("10.84.0.1/32")]);
        let at = rules(policy.clone());
        assert_eq!(judged(&at, "192.0.2.9", "198.51.100.7", 22, None), None);
        assert_eq!(judged(&at, "192.0.2.9", "198.51.100.8", 22, None), Some(DropReason::Ssh));
        assert_eq!(judged(&at, "203.0.113.9", "198.51.100.7", 22, None), Some(DropReason::Ssh));
        policy.ssh.bind = Bind::Addresses(vec![samples::ip("0.0.0.0")]);
        let any = rules(policy);
        assert_eq!(judged(&any, "192.0.2.9", "198.51.100.8", 22, None), None);
        assert_eq!(judged(&any, "2001:db8::1", "2001:db8::7", 22, None), Some(DropReason::Ssh));
    }

    #[test]
    fn a_timed_opening_ends_at_its_moment() {
        let mut rules = rules(samples::spoke());
        let from = vec![samples::net("192.0.2.0/24")];
        rules.timed.push(Timed { port: samples::port(2222), from, until: Boot(2000) });
        let syn = |from| Syn {
            source: samples::ip(from),
            destination: samples::ip("198.51.100.7"),
            port: 2222,
            onward: None,
        };
        assert_eq!(rules.judge(&syn("192.0.2.9"), Boot(1999)), None);
        assert_eq!(rules.judge(&syn("192.0.2.9"), Boot(2000)), Some(DropReason::PublicTcp));
        assert_eq!(rules.judge(&syn("192.0.3.9"), Boot(1999)), Some(DropReason::PublicTcp));
    }

    #[test]
    fn without_a_firewall_there_is_no_guard_and_audit_only_counts() {
        let mut policy = samples::spoke();
        policy.enforce.mode = Mode::Audit;
        assert!(rules(policy.clone()).audit && !rules(samples::spoke()).audit);
        policy.enforce.firewall = false;
        assert_eq!(Desired::new(policy, samples::TODAY).expect("a path").guard, None);
    }

    mod in_step {
        use proptest::prelude::*;
        use proptest::sample::{select, subsequence};

        use super::*;
        use crate::ruleset::{Packet, Ruleset, Verdict, evaluate};
        use crate::terms::Proto;

        const PORTS: [u16; 9] = [1, 22, 63, 64, 80, 443, 2222, 9984, 65535];
        const SOURCES: [&str; 9] = [
            "192.0.2.0",
            "192.0.2.127",
            "192.0.2.128",
            "198.51.100.9",
            "10.84.0.255",
            "10.84.1.0",
            "2001:db8:1::1",
            "2001:db8:2::",
            "fd84::9",
        ];
        const NETS: [&str; 9] = [
            "0.0.0.0/0",
            "::/0",
            "192.0.2.0/24",
            "192.0.2.0/25",
            "192.0.2.128/32",
            "198.51.100.9/32",
            "2001:db8:1::/48",
            "10.84.0.0/23",
            "fd84::/64",
        ];
        const HERE: [&str; 6] =
            ["198.51.100.7", "198.51.100.8", "10.84.0.16", "10.84.1.7", "2001:db8::7", "fd84::16"];

        fn nets() -> impl Strategy<Value = Vec<IpNet>> {
            let parsed = |nets: Vec<&str>| nets.into_iter().map(samples::net).collect();
            subsequence(NETS.to_vec(), 1..=4).prop_map(parsed)
        }

        fn ports() -> impl Strategy<Value = Vec<Port>> {
            let parsed = |ports: Vec<u16>| ports.into_iter().map(samples::port).collect();
            subsequence(PORTS.to_vec(), 0..=4).prop_map(parsed)
        }

        prop_compose! {
            fn policy()(
                public in ports(),
                exceptions in proptest::collection::vec((ports(), nets(), any::<bool>()), 0..4),
                bind in proptest::option::of(subsequence(
                    vec!["198.51.100.7", "0.0.0.0", "::", "2001:db8::7", "10.84.0.16"], 1..=3)),
                from in nets(),
                six in any::<bool>(),
                ssh in select(vec![22, 2222, 443]),
            ) -> Policy {
                let mut policy = samples::everything();
                policy.enforce.allow_no_admin_path = true;
                policy.public.tcp = public;
                policy.ssh.port = samples::port(ssh);
                if six {
                    policy.mesh.prefix.push(samples::net("fd84::/64"));
                }
                if let Some(bind) = bind {
                    policy.ssh.bind = Bind::Addresses(bind.into_iter().map(samples::ip).collect());
                    policy.ssh.from = Sources::Prefixes(from);
                }
                let template = policy.exceptions[0].clone();
                policy.exceptions = exceptions.into_iter().map(|(tcp, from, over)| {
                    let until = if over { jiff::civil::date(2026, 11, 20) } else { samples::TODAY };
                    crate::policy::Exception { tcp, from, until, ..template.clone() }
                }).collect();
                policy
            }
        }

        proptest! {
            /// A stranger's first packet for this host meets the same verdict, for the same
            /// reason, whether our table judges it or the guard.
            #[test]
            fn the_guard_and_the_table_agree(
                policy in policy(),
                packets in proptest::collection::vec((select(SOURCES.to_vec()), select(HERE.to_vec()),
                    select(PORTS.to_vec())), 24),
            ) {
                let desired = Desired::new(policy, samples::TODAY).expect("no path is asked for");
                let rules = desired.guard.expect("a guard");
                let ruleset = Ruleset { tables: vec![desired.table.expect("a table")] };
                for (from, to, port) in packets {
                    let (source, destination) = (samples::ip(from), samples::ip(to));
                    if Family::of(source) != Family::of(destination) {
                        continue;
                    }
                    let packet = Packet {
                        iifname: "eth0".into(),
                        source,
                        destination,
                        proto: Proto::Tcp,
                        source_port: samples::port(40_000),
                        port: samples::port(port),
                    };
                    let judged = evaluate::judge(&ruleset, &packet, &|_| true);
                    let refused = rules.judge(&Syn { source, destination, port, onward: None }, Boot(0));
                    let expected = if refused.is_some() { Verdict::Drop } else { Verdict::Accept };
                    prop_assert_eq!(&judged.verdict, &expected, "{} -> {}:{}", from, to, port);
                    if let Some(reason) = refused {
                        let rule = judged.by.and_then(|place| place.comment).unwrap_or_default();
                        prop_assert!(rule.contains(reason.name()), "{} by {}", reason.name(), rule);
                    }
                }
            }
        }
    }
}
