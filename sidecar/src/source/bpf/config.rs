//! From the policy's services to what the counters' maps hold. Pure: the caller reads and
//! writes the maps.

use std::collections::{BTreeMap, BTreeSet};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use sidecar_ebpf::{
    ANYONE, CANARY_CLASS, ClassEntry, LISTED, PortClasses, REFUSED, SOURCE_KEY_HEAD_BITS, SOURCES_MAX,
    SourceKey, TCP, UDP, port_index,
};

use crate::desired::Service;
use crate::terms::{Family, Port, Proto, Scope};

/// What is counted apart, and how new connections are judged. The position in `services`
/// is the class number that [`crate::observed::TrafficKey`] speaks of.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CounterConfig {
    pub services: Vec<CountedService>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CountedService {
    pub proto: Proto,
    pub port: Port,
    pub scope: Scope,
    /// `None`: anyone in that scope.
    pub from: Option<Vec<IpNet>>,
    /// Holds in every scope.
    pub everywhere: bool,
}

impl CounterConfig {
    pub fn new(services: &[Service]) -> Self {
        let services = services.iter().map(|service| CountedService {
            proto: service.proto,
            port: service.port,
            scope: service.scope,
            from: service.from.clone(),
            everywhere: service.is_everywhere(),
        });
        Self { services: services.collect() }
    }

    /// The service that a class of the kernel's table belongs to.
    pub(super) fn service_of(&self, entry: &ClassEntry) -> Option<u16> {
        let at = self.services.iter().position(|service| service.identity() == identity(entry))?;
        u16::try_from(at).ok()
    }

    /// What the maps should hold, given the classes that they hold now: a service keeps
    /// its class number, and so its counts, whatever is added or removed around it.
    pub(super) fn tables(&self, current: &Classes) -> Tables {
        let mut tables = Tables::default();
        let mut class_of = BTreeMap::new();
        for (class, entry) in current {
            class_of.entry(identity(entry)).or_insert(*class);
        }
        // Numbers of services that are gone come last: packets may still be counted
        // under them until their ports are rewritten.
        let free = |class: &u8| !current.contains_key(class);
        let mut unused = (1..CANARY_CLASS).filter(free).chain(
            current
                .iter()
                .filter(|(_, entry)| {
                    !self.services.iter().any(|service| service.identity() == identity(entry))
                })
                .map(|(class, _)| *class),
        );
        for service in &self.services {
            let id = service.identity();
            let class = match class_of.get(&id) {
                Some(class) => *class,
                None => match unused.next() {
                    Some(class) => class,
                    None => {
                        tables.omitted.insert(id);
                        continue;
                    }
                },
            };
            class_of.insert(id, class);
            let (port, proto, scope) = id;
            tables.classes.entry(class).or_insert(ClassEntry {
                port,
                proto,
                scope,
                used: 1,
                ..Default::default()
            });
        }
        for service in &self.services {
            for scope in Scope::ALL {
                self.judge(service, scope, &class_of, &mut tables);
            }
        }
        tables
    }

    /// Fills in what one port means in one scope.
    fn judge(
        &self,
        service: &CountedService,
        scope: Scope,
        class_of: &BTreeMap<Identity, u8>,
        tables: &mut Tables,
    ) {
        let same = || self.services.iter().filter(|s| s.proto == service.proto && s.port == service.port);
        let here = || same().filter(move |s| s.scope == scope || s.everywhere);
        // A port that is open elsewhere only is refused here, and counted under its name.
        let Some(label) =
            same().find(|s| s.scope == scope).or_else(|| here().next()).or_else(|| same().next())
        else {
            return;
        };
        let Some(&class) = class_of.get(&label.identity()) else { return };
        let Some(entry) = tables.classes.get_mut(&class) else { return };
        let judgement = if here().any(|s| s.from.is_none()) {
            ANYONE
        } else if here().next().is_some() {
            LISTED
        } else {
            REFUSED
        };
        entry.judgement[scope_number(scope)] = judgement;
        if judgement == LISTED {
            for net in here().filter_map(|s| s.from.as_ref()).flatten() {
                if tables.sources.len() < SOURCES_MAX as usize {
                    tables.sources.insert(source_key(class, net));
                } else {
                    tables.sources_omitted = true;
                }
            }
        }
        let at = port_index(scope_number(scope), proto_number(service.proto));
        tables.ports.entry(service.port.get()).or_default().class[at] = class;
    }
}

/// Classes in use, by number.
pub(super) type Classes = BTreeMap<u8, ClassEntry>;

/// What makes a service the same one after a change of the policy: port, proto, scope.
/// Of two that share it (two local networks with DNS) the first one is counted.
pub(super) type Identity = (u16, u8, u8);

pub(super) fn identity(entry: &ClassEntry) -> Identity {
    (entry.port, entry.proto, entry.scope)
}

impl CountedService {
    fn identity(&self) -> Identity {
        (self.port.get(), proto_number(self.proto) as u8, scope_number(self.scope) as u8)
    }
}

#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Tables {
    pub(super) classes: Classes,
    pub(super) ports: BTreeMap<u16, PortClasses>,
    /// With the length of the prefix, the key's head included.
    pub(super) sources: BTreeSet<(u32, SourceKey)>,
    /// Services for which there was no number left. They count as "no service".
    pub(super) omitted: BTreeSet<Identity>,
    pub(super) sources_omitted: bool,
}

pub(super) const fn scope_number(scope: Scope) -> usize {
    match scope {
        Scope::Public => 0,
        Scope::Mesh => 1,
        Scope::Other => 2,
    }
}

const fn proto_number(proto: Proto) -> usize {
    match proto {
        Proto::Tcp => TCP,
        Proto::Udp => UDP,
    }
}

pub(super) const fn family_number(family: Family) -> usize {
    match family {
        Family::Ipv4 => sidecar_ebpf::IPV4,
        Family::Ipv6 => sidecar_ebpf::IPV6,
    }
}

fn source_key(class: u8, net: &IpNet) -> (u32, SourceKey) {
    let mut address = [0; 16];
    match net.trunc() {
        IpNet::V4(net) => address[..4].copy_from_slice(&net.addr().octets()),
        IpNet::V6(net) => address = net.addr().octets(),
    }
    let family = family_number(Family::of_net(net)) as u16;
    (
        SOURCE_KEY_HEAD_BITS + u32::from(net.prefix_len()),
        SourceKey { class: u16::from(class), family, address },
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use sidecar_ebpf::NO_CLASS;

    fn service(proto: Proto, port: u16, scope: Scope, from: Option<&[&str]>) -> CountedService {
        CountedService {
            proto,
            port: Port::new(port).expect("a port"),
            scope,
            from: from.map(|nets| nets.iter().map(|net| net.parse().expect("a prefix")).collect()),
            everywhere: false,
        }
    }

    fn config(services: &[CountedService]) -> CounterConfig {
        CounterConfig { services: services.to_vec() }
    }

    fn http() -> CountedService {
        service(Proto::Tcp, 80, Scope::Public, None)
    }

    fn ssh() -> CountedService {
        service(Proto::Tcp, 22, Scope::Mesh, Some(&["10.84.0.1/32", "fd84::1/128"]))
    }

    fn class(tables: &Tables, port: u16, proto: usize, scope: Scope) -> u8 {
        tables.ports.get(&port).map_or(NO_CLASS, |ports| ports.class[port_index(scope_number(scope), proto)])
    }

    #[test]
    fn a_port_is_judged_by_scope_and_named_in_all_of_them() {
        let tables = config(&[http(), ssh()]).tables(&Classes::new());
        assert_eq!(Scope::ALL.map(|scope| class(&tables, 22, TCP, scope)), [2, 2, 2]);
        assert_eq!(tables.classes[&1].judgement, [ANYONE, REFUSED, REFUSED]);
        assert_eq!(tables.classes[&2].judgement, [REFUSED, LISTED, REFUSED]);
        assert_eq!(class(&tables, 22, UDP, Scope::Mesh), NO_CLASS);
        assert_eq!(class(&tables, 23, TCP, Scope::Public), NO_CLASS);
        let keys: Vec<_> = tables.sources.iter().map(|(bits, key)| (*bits, key.class, key.family)).collect();
        assert_eq!(keys, [(64, 2, 0), (160, 2, 1)]);
    }

    #[test]
    fn the_same_port_in_two_scopes_has_two_classes_with_sources_of_their_own() {
        let open = service(Proto::Tcp, 22, Scope::Public, Some(&["198.51.100.0/24"]));
        let tables = config(&[ssh(), open]).tables(&Classes::new());
        assert_eq!(class(&tables, 22, TCP, Scope::Mesh), 1);
        assert_eq!(class(&tables, 22, TCP, Scope::Public), 2);
        assert_eq!(tables.classes[&1].judgement, [REFUSED, LISTED, REFUSED]);
        assert_eq!(tables.classes[&2].judgement, [LISTED, REFUSED, REFUSED]);
        let of_public: Vec<_> = tables.sources.iter().filter(|(_, key)| key.class == 2).collect();
        assert_eq!(of_public.len(), 1, "the hub is not let in from the public: {of_public:?}");
        assert_eq!(of_public[0].1.address[..4], [198, 51, 100, 0]);
    }

    #[test]
    fn an_exception_holds_in_every_scope_and_adds_to_what_is_there() {
        let mut way_in = service(Proto::Tcp, 22, Scope::Public, Some(&["0.0.0.0/0"]));
        way_in.everywhere = true;
        let tables = config(&[ssh(), way_in.clone()]).tables(&Classes::new());
        assert_eq!(tables.classes[&1].judgement, [REFUSED, LISTED, REFUSED]);
        assert_eq!(tables.classes[&2].judgement, [LISTED, REFUSED, LISTED]);
        let of = |class| tables.sources.iter().filter(|(_, key)| key.class == class).count();
        assert_eq!((of(1), of(2)), (3, 1), "{:?}", tables.sources);
        way_in.from = None;
        let tables = config(&[ssh(), way_in]).tables(&Classes::new());
        assert_eq!(tables.classes[&1].judgement[scope_number(Scope::Mesh)], ANYONE);
    }

    #[test]
    fn any_ipv6_source_is_not_any_ipv4_source() {
        let six = source_key(1, &"::/0".parse().expect("a prefix"));
        let four = source_key(1, &"0.0.0.0/0".parse().expect("a prefix"));
        assert_eq!((six.0, four.0), (32, 32));
        assert_ne!(six.1.family, four.1.family);
        assert_eq!(source_key(1, &"10.84.0.9/8".parse().expect("a prefix")).1.address[..4], [10, 0, 0, 0]);
    }

    #[test]
    fn a_service_keeps_its_class_when_others_come_and_go() {
        let first = config(&[http(), ssh()]).tables(&Classes::new());
        let https = service(Proto::Tcp, 443, Scope::Public, None);
        let changed = config(&[https, ssh()]);
        let second = changed.tables(&first.classes);
        assert_eq!(class(&second, 22, TCP, Scope::Mesh), class(&first, 22, TCP, Scope::Mesh));
        assert_eq!(class(&second, 443, TCP, Scope::Public), 3, "the number of http is not reused at once");
        assert_eq!(class(&second, 80, TCP, Scope::Public), NO_CLASS);
        assert_eq!(changed.service_of(&second.classes[&2]), Some(1));
        assert_eq!(changed.service_of(&first.classes[&1]), None, "http is no service any more");
    }

    #[test]
    fn services_beyond_the_last_class_are_named_and_harm_no_other() {
        let many: Vec<_> = (1..=300).map(|port| service(Proto::Tcp, port, Scope::Public, None)).collect();
        let tables = config(&many).tables(&Classes::new());
        assert_eq!((tables.classes.len(), tables.omitted.len()), (usize::from(CANARY_CLASS) - 1, 46));
        assert!(!tables.classes.contains_key(&CANARY_CLASS));
        assert_eq!(class(&tables, 254, TCP, Scope::Public), 254);
        assert_eq!(class(&tables, 255, TCP, Scope::Public), NO_CLASS);
        // When all numbers were in use, those of services that are gone come back.
        let next = config(&many[100..]).tables(&tables.classes);
        assert_eq!(next.omitted.len(), 0);
        assert_eq!(class(&next, 200, TCP, Scope::Public), 200);
        assert_eq!(class(&next, 300, TCP, Scope::Public), 46);
    }

    #[test]
    fn the_trie_of_sources_is_never_overfilled() {
        let nets: Vec<String> = (0..2000).map(|n| format!("10.{}.{}.0/24", n / 250, n % 250)).collect();
        let nets: Vec<&str> = nets.iter().map(String::as_str).collect();
        let tables = config(&[service(Proto::Tcp, 22, Scope::Mesh, Some(&nets))]).tables(&Classes::new());
        assert_eq!(tables.sources.len(), SOURCES_MAX as usize);
        assert!(tables.sources_omitted);
    }
}
