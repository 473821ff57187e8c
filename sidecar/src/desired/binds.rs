//! Where the policy lets a port be bound, as the bind guard in the kernel is told.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use ipnet::IpNet;
use sidecar_ebpf::bind::{self, Bind, Guard, Judgement, PLACE_KEY_HEAD_BITS, PlaceKey, Tables, kind, list};

use super::Desired;
use crate::policy::{Bind as SshBind, Mode};
use crate::terms::{Port, Proto, Scope};

/// What the guard is to hold. The surroundings (namespace, devices, public addresses) are
/// added by whoever writes it into the kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BindRules {
    /// `None`: `[enforce] binds = false`.
    pub mode: Option<Mode>,
    /// For each port that the policy speaks of: one of [`kind`], never `UNNAMED`.
    pub kinds: BTreeMap<(Proto, Port), u8>,
    pub mesh: Vec<IpNet>,
    pub ssh_port: Port,
    pub ssh: Vec<IpNet>,
    /// Where sshd's wildcard goes: an IPv4 socket's, an IPv6-only one's, one's that takes
    /// both. `None`: it is refused.
    pub moves: [Option<IpAddr>; 3],
}

/// What the host looks like to the guard.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Surroundings {
    /// The cookie of the network namespace.
    pub netns: u64,
    /// The ports that the kernel itself chooses, both included.
    pub ephemeral: [u16; 2],
    /// Addresses on public interfaces, the mesh's left out.
    pub public: BTreeSet<IpAddr>,
    /// Public interfaces.
    pub doors: BTreeSet<u32>,
}

impl BindRules {
    /// `mesh_found`: the addresses of the mesh interface, for a policy that leaves them to
    /// Tailscale.
    pub fn new(desired: &Desired, mesh_found: &[IpAddr]) -> Self {
        let policy = &desired.policy;
        let own = if policy.mesh.address.is_empty() { mesh_found } else { &policy.mesh.address };
        let mesh: Vec<IpNet> = match own {
            // Tailscale assigns it, and what it is not can't be bound anyway.
            [] => policy.mesh.prefix.clone(),
            some => some.iter().copied().map(IpNet::from).collect(),
        };
        let (ssh, candidates) = match &policy.ssh.bind {
            SshBind::Mesh => (mesh.clone(), own.to_vec()),
            SshBind::Addresses(list) => (list.iter().copied().map(IpNet::from).collect(), list.clone()),
        };
        let mut kinds = BTreeMap::from([((Proto::Tcp, policy.ssh.port), kind::LISTED)]);
        for service in &desired.services {
            let ssh = service.proto == Proto::Tcp && service.port == policy.ssh.port;
            let found = match service.scope {
                Scope::Public if ssh && service.exception.is_none() => kind::LISTED,
                Scope::Public => kind::ANYWHERE,
                Scope::Mesh => kind::LISTED,
                Scope::Other => kind::LOCAL,
            };
            let known = kinds.entry((service.proto, service.port)).or_insert(found);
            // The widest holds: what one part of the policy asks for, the guard must not refuse.
            *known = match (*known, found) {
                (kind::ANYWHERE, _) | (_, kind::ANYWHERE) => kind::ANYWHERE,
                (kind::LOCAL, _) | (_, kind::LOCAL) => kind::LOCAL,
                _ => kind::LISTED,
            };
        }
        let from = policy.ssh.from.prefixes(&policy.mesh);
        let moves = if policy.ssh.rebind { moves(&candidates, &from) } else { [None; 3] };
        let mode = policy.enforce.binds.then_some(policy.enforce.mode);
        Self { mode, kinds, mesh, ssh_port: policy.ssh.port, ssh, moves }
    }

    /// The entry of the map GUARD.
    pub fn guard(&self, around: &Surroundings) -> Guard {
        let to = |address: Option<IpAddr>| address.map_or([0; 16], octets);
        Guard {
            netns: around.netns,
            mode: match self.mode {
                None => bind::mode::OFF,
                Some(Mode::Audit) => bind::mode::AUDIT,
                Some(Mode::Enforce) => bind::mode::ENFORCE,
            },
            ssh_port: self.ssh_port.get(),
            ephemeral: around.ephemeral,
            move_v4: to(self.moves[0]),
            move_v6: to(self.moves[1]),
            move_dual: to(self.moves[2]),
            ..Guard::default()
        }
    }

    /// The words of the map KINDS, all of them.
    pub fn words(&self) -> Vec<u64> {
        let mut words = vec![0; bind::KINDS_WORDS as usize];
        for ((proto, port), kind) in &self.kinds {
            let (word, shift) = bind::kind_place(proto_number(*proto), port.get());
            words[word as usize] |= u64::from(*kind) << shift;
        }
        words
    }

    /// The keys of the map PLACES with their prefix lengths. What exceeds the map's bound is
    /// left out: public addresses and doors first, without which less is refused.
    pub fn places(&self, around: &Surroundings) -> BTreeSet<(u32, PlaceKey)> {
        let net = |list: u32| move |net: &IpNet| (list, net.network(), net.prefix_len());
        let host = |list: u32| move |address: &IpAddr| (list, *address, 128);
        let mut places: Vec<(u32, PlaceKey)> = (self.ssh.iter().map(net(list::SSH)))
            .chain(self.mesh.iter().map(net(list::MESH)))
            .chain(around.public.iter().map(host(list::PUBLIC)))
            .map(|(list, address, bits)| {
                let bits = match address {
                    IpAddr::V4(_) if list != list::PUBLIC => 96 + u32::from(bits),
                    _ => u32::from(bits),
                };
                (PLACE_KEY_HEAD_BITS + bits, PlaceKey { list, address: octets(address) })
            })
            .collect();
        places.extend(around.doors.iter().map(|index| {
            let address = bind::device_place(*index);
            (PLACE_KEY_HEAD_BITS + 128, PlaceKey { list: list::DOORS, address })
        }));
        places.truncate(bind::PLACES_MAX as usize);
        places.into_iter().collect()
    }

    /// What the guard makes of a bind, in the words of the programs themselves.
    pub fn judge(&self, around: &Surroundings, bind: &Bind) -> Judgement {
        bind::judge(&self.guard(around), &Values { rules: self, around }, bind)
    }

    /// Whether a socket that is held to no device is refused this bind, or would be if mode
    /// were enforce. `dual`: an IPv6 socket that takes IPv4 as well.
    pub fn refuses(&self, around: &Surroundings, proto: Proto, at: SocketAddr, dual: bool) -> bool {
        self.judge_any(around, proto, at, dual) == Judgement::Refuse
    }

    /// What becomes of a bind of a socket that is held to no device.
    pub fn judge_any(&self, around: &Surroundings, proto: Proto, at: SocketAddr, dual: bool) -> Judgement {
        let bind = Bind {
            proto: proto_number(proto),
            port: at.port(),
            address: octets(at.ip()),
            ipv6: at.is_ipv6(),
            dual,
            device: 0,
        };
        self.judge(around, &bind)
    }

    /// Where the policy lets this port be bound, for a person.
    pub fn allowed(&self, proto: Proto, port: Port) -> String {
        let listed = |places: &[IpNet]| match places {
            [] => "no address now".to_owned(),
            some => some.iter().take(4).map(|net| net.addr().to_string()).collect::<Vec<_>>().join(" and "),
        };
        match self.kinds.get(&(proto, port)).copied().unwrap_or(kind::UNNAMED) {
            kind::UNNAMED => "on loopback or the mesh: the policy names no such port".to_owned(),
            kind::LOCAL if port != self.ssh_port => "on local networks only".to_owned(),
            _ if proto == Proto::Tcp && port == self.ssh_port => format!("on {} only", listed(&self.ssh)),
            _ => format!("on the mesh only: {}", listed(&self.mesh)),
        }
    }
}

/// A socket that takes both families is moved to the one that its users come by: it can be
/// bound to one address only. One of a family in which there is no such address goes to
/// loopback: systemd gives up a whole ssh.socket, such as Ubuntu's of two listeners, where one
/// of its binds is refused.
fn moves(candidates: &[IpAddr], from: &[IpNet]) -> [Option<IpAddr>; 3] {
    let usable = || candidates.iter().copied().filter(|a| !a.is_loopback() && !a.is_unspecified());
    let (v4, v6) = (usable().find(IpAddr::is_ipv4), usable().find(IpAddr::is_ipv6));
    let by_v6 = matches!(from.first(), Some(IpNet::V6(_)));
    let beside =
        |own: Option<IpAddr>, other: Option<IpAddr>, loopback: IpAddr| own.or(other.map(|_| loopback));
    [
        beside(v4, v6, Ipv4Addr::LOCALHOST.into()),
        beside(v6, v4, Ipv6Addr::LOCALHOST.into()),
        if by_v6 { v6.or(v4) } else { v4.or(v6) },
    ]
}

struct Values<'a> {
    rules: &'a BindRules,
    around: &'a Surroundings,
}

impl Tables for Values<'_> {
    fn kind(&self, proto: u8, port: u16) -> u8 {
        let proto = if proto == bind::UDP { Proto::Udp } else { Proto::Tcp };
        let port = Port::new(port).map(|port| (proto, port));
        port.and_then(|key| self.rules.kinds.get(&key)).copied().unwrap_or(kind::UNNAMED)
    }

    fn holds(&self, list: u32, address: &[u8; 16]) -> bool {
        let plain = Ipv6Addr::from(*address).to_canonical();
        match list {
            list::MESH => self.rules.mesh.iter().any(|net| net.contains(&plain)),
            list::SSH => self.rules.ssh.iter().any(|net| net.contains(&plain)),
            list::PUBLIC => self.around.public.contains(&plain),
            _ => self.around.doors.iter().any(|index| bind::device_place(*index) == *address),
        }
    }
}

/// As the programs write addresses: IPv4 as `::ffff:a.b.c.d`.
fn octets(address: IpAddr) -> [u8; 16] {
    match address {
        IpAddr::V4(v4) => bind::mapped(v4.octets()),
        IpAddr::V6(v6) => v6.octets(),
    }
}

const fn proto_number(proto: Proto) -> u8 {
    match proto {
        Proto::Tcp => bind::TCP,
        Proto::Udp => bind::UDP,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::desired::samples::spoke;
    use crate::policy::{Exception, Local, MeshService, Policy, Sources};
    use crate::terms::IfacePattern;

    fn port(number: u16) -> Port {
        Port::new(number).expect("a port")
    }

    fn rules(change: impl FnOnce(&mut Policy)) -> BindRules {
        let mut policy = spoke();
        change(&mut policy);
        let today = jiff::civil::date(2026, 11, 21);
        BindRules::new(&Desired::new(policy, today).expect("an admin path"), &[])
    }

    fn around() -> Surroundings {
        Surroundings {
            netns: 7,
            ephemeral: [32_768, 60_999],
            public: ["203.0.113.7", "2001:db8:7::7"].map(|a| a.parse().expect("an address")).into(),
            doors: [2].into(),
        }
    }

    /// "tcp 0.0.0.0:22 [dual] [dev=2]" -> "allow", "refuse" or where to.
    fn verdict(rules: &BindRules, text: &str) -> String {
        let words: Vec<&str> = text.split(' ').collect();
        let at: SocketAddr = words[1].parse().expect("an address and a port");
        let bind = Bind {
            proto: if words[0] == "udp" { bind::UDP } else { bind::TCP },
            port: at.port(),
            address: octets(at.ip()),
            ipv6: at.is_ipv6(),
            dual: words.contains(&"dual"),
            device: words.iter().find_map(|w| w.strip_prefix("dev=")?.parse().ok()).unwrap_or(0),
        };
        match rules.judge(&around(), &bind) {
            Judgement::Allow => "allow".into(),
            Judgement::Refuse => "refuse".into(),
            Judgement::Move(to) => Ipv6Addr::from(to).to_canonical().to_string(),
        }
    }

    fn check(rules: &BindRules, cases: &[(&str, &str)]) {
        for (text, expected) in cases {
            assert_eq!(verdict(rules, text), *expected, "{text}");
        }
    }

    #[test]
    fn a_port_is_held_to_the_addresses_that_the_policy_lets_it_have() {
        let rules = rules(|policy| {
            policy.ssh.port = port(22);
            policy.services = vec![MeshService {
                name: "netdata".into(),
                tcp: vec![port(19_999)],
                udp: vec![port(161)],
                from: Sources::Mesh,
            }];
        });
        let mesh = rules.mesh[0].addr();
        check(
            &rules,
            &[
                ("tcp 0.0.0.0:22", "refuse"),
                ("tcp [::]:22", "refuse"),
                ("tcp [::]:22 dual", "refuse"),
                ("tcp [::ffff:0.0.0.0]:22 dual", "refuse"),
                ("tcp 203.0.113.7:22", "refuse"),
                ("tcp [::ffff:203.0.113.7]:22 dual", "refuse"),
                ("tcp 127.0.0.1:22", "allow"),
                ("tcp [::1]:22", "allow"),
                ("tcp 0.0.0.0:22 dev=3", "allow"),
                ("tcp 0.0.0.0:22 dev=2", "refuse"),
                ("tcp 0.0.0.0:443", "allow"),
                ("tcp [::]:443 dual", "allow"),
                ("tcp 0.0.0.0:19999", "refuse"),
                ("udp 0.0.0.0:161", "refuse"),
                ("udp 172.17.0.1:161", "refuse"),
                ("udp 127.0.0.1:161", "allow"),
                ("udp 0.0.0.0:22", "allow"),
            ],
        );
        for text in ["tcp ADDRESS:22", "tcp ADDRESS:19999", "udp ADDRESS:161", "tcp ADDRESS:5432"] {
            assert_eq!(verdict(&rules, &text.replace("ADDRESS", &mesh.to_string())), "allow", "{text}");
        }
    }

    #[test]
    fn of_ports_that_the_policy_does_not_name_only_sure_servers_are_refused() {
        check(
            &rules(|_| {}),
            &[
                ("tcp 0.0.0.0:5432", "refuse"),
                ("tcp [::]:5432 dual", "refuse"),
                ("tcp 203.0.113.7:5432", "refuse"),
                ("tcp [2001:db8:7::7]:8080", "refuse"),
                ("tcp 127.0.0.1:5432", "allow"),
                ("tcp 172.17.0.1:5432", "allow"),
                ("tcp [fe80::7]:5432", "allow"),
                ("tcp 0.0.0.0:0", "allow"),
                // The kernel's own choice; NFS and RPC; active FTP.
                ("tcp 0.0.0.0:32768", "allow"),
                ("tcp 203.0.113.7:60999", "allow"),
                ("tcp 0.0.0.0:61000", "refuse"),
                ("tcp 0.0.0.0:700", "allow"),
                ("tcp 0.0.0.0:599", "refuse"),
                ("tcp 0.0.0.0:1024", "refuse"),
                ("tcp 0.0.0.0:20", "allow"),
                // Clients bind UDP ports as servers do: DHCP, mDNS, IPsec, resolvers.
                ("udp 0.0.0.0:68", "allow"),
                ("udp 203.0.113.7:5353", "allow"),
            ],
        );
    }

    #[test]
    fn local_ports_and_exceptions_are_as_wide_as_they_must_be() {
        let rules = rules(|policy| {
            policy.locals = vec![Local {
                name: "lan".into(),
                interfaces: vec![IfacePattern::new("vmbr0").expect("a pattern")],
                tcp: vec![port(53)],
                udp: vec![port(67)],
            }];
            policy.exceptions = [("old", "2026-11-20", 2222), ("new", "2026-11-21", 2223)]
                .map(|(name, until, number)| Exception {
                    name: name.into(),
                    tcp: vec![port(number)],
                    udp: Vec::new(),
                    from: vec!["198.51.100.0/24".parse().expect("a prefix")],
                    reason: "test".into(),
                    owner: None,
                    until: until.parse().expect("a date"),
                })
                .to_vec();
        });
        check(
            &rules,
            &[
                ("tcp 0.0.0.0:53", "allow"),
                ("tcp 192.168.7.1:53", "allow"),
                ("tcp 203.0.113.7:53", "refuse"),
                ("udp 0.0.0.0:67", "allow"),
                ("udp 203.0.113.7:67", "refuse"),
                ("tcp 0.0.0.0:2222", "refuse"),
                ("tcp 0.0.0.0:2223", "allow"),
                ("tcp 203.0.113.7:2223", "allow"),
            ],
        );
    }

    #[test]
    fn sshd_is_moved_to_the_address_that_its_users_come_by() {
        let moved = |from: &[&str], mesh: &[&str]| {
            let rules = rules(|policy| {
                policy.ssh.rebind = true;
                policy.mesh.hub = None;
                policy.enforce.allow_no_admin_path = true;
                policy.mesh.prefix.push("fd84::/64".parse().expect("a prefix"));
                policy.mesh.address = mesh.iter().map(|a| a.parse().expect("an address")).collect();
                let from = from.iter().map(|net| net.parse().expect("a prefix"));
                policy.ssh.from = Sources::Prefixes(from.collect());
            });
            ["tcp 0.0.0.0:22", "tcp [::]:22", "tcp [::]:22 dual"].map(|text| verdict(&rules, text))
        };
        let (four, six) = ("10.84.0.16", "fd84::16");
        assert_eq!(moved(&["10.84.0.1/32"], &[four, six]), [four, six, four]);
        assert_eq!(moved(&["fd84::1/128", "10.84.0.1/32"], &[four, six]), [four, six, six]);
        assert_eq!(moved(&["10.84.0.1/32"], &[four]), [four, "::1", four]);
        assert_eq!(moved(&["fd84::1/128", "10.84.0.1/32"], &[four]), [four, "::1", four]);
        assert_eq!(moved(&["fd84::1/128"], &[six]), ["127.0.0.1", six, six]);
    }
}
