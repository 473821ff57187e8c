//! Every port of the policy as one flat list, in an order that follows the file.

use ipnet::IpNet;

use super::Service;
use super::table::{open_binds, tunnel_sources};
use crate::policy::Policy;
use crate::terms::{Port, Proto, Scope};

/// Public TCP and UDP, ssh, metrics, mesh services, locals, exceptions that hold today,
/// the tunnel's own port. A change at the end of the list leaves the numbers before it.
pub(super) fn services(policy: &Policy, today: jiff::civil::Date) -> Vec<Service> {
    let mut out = Listing(Vec::new());
    for proto in Proto::ALL {
        for &port in policy.public.ports(proto) {
            out.add(known_name(proto, port), proto, port, Scope::Public, None);
        }
    }
    let ssh = policy.ssh.from.prefixes(&policy.mesh);
    out.add("ssh".into(), Proto::Tcp, policy.ssh.port, Scope::Mesh, Some(ssh.clone()));
    if !open_binds(policy).is_empty() {
        out.add("ssh-public".into(), Proto::Tcp, policy.ssh.port, Scope::Public, Some(ssh));
    }
    let hub = crate::policy::Sources::Hub.prefixes(&policy.mesh);
    out.add("metrics".into(), Proto::Tcp, policy.metrics.port, Scope::Mesh, Some(hub));
    for service in &policy.services {
        let from = service.from.prefixes(&policy.mesh);
        for (name, proto, port) in named(&service.name, &service.tcp, &service.udp) {
            out.add(name, proto, port, Scope::Mesh, Some(from.clone()));
        }
    }
    for (at, local) in policy.locals.iter().enumerate() {
        for (name, proto, port) in named(&local.name, &local.tcp, &local.udp) {
            out.add(name, proto, port, Scope::Other, None).local = Some(at);
        }
    }
    for (at, exception) in policy.exceptions.iter().enumerate().filter(|(_, e)| e.holds_on(today)) {
        for (name, proto, port) in named(&exception.name, &exception.tcp, &exception.udp) {
            out.add(name, proto, port, Scope::Public, Some(exception.from.clone())).exception = Some(at);
        }
    }
    if let (Some(port), Some(from)) = (policy.mesh.listen_port, tunnel_sources(policy)) {
        out.add("wireguard".into(), Proto::Udp, port, Scope::Public, from);
    }
    out.0
}

struct Listing(Vec<Service>);

impl Listing {
    fn add(
        &mut self,
        name: String,
        proto: Proto,
        port: Port,
        scope: Scope,
        from: Option<Vec<IpNet>>,
    ) -> &mut Service {
        let taken = |name: &str| self.0.iter().any(|s| s.name == name && s.proto == proto);
        // Two cells with one label set would be an error in every scrape.
        let name = if taken(&name) {
            (2..).map(|n| format!("{name}-{n}")).find(|name| !taken(name)).unwrap_or(name)
        } else {
            name
        };
        self.0.push(Service { name, proto, port, scope, local: None, from, exception: None });
        let last = self.0.len() - 1;
        &mut self.0[last]
    }
}

/// The ports of a named entry: its own name if there is one port, else name and port.
fn named(name: &str, tcp: &[Port], udp: &[Port]) -> Vec<(String, Proto, Port)> {
    let all: Vec<(Proto, Port)> = (tcp.iter().map(|&port| (Proto::Tcp, port)))
        .chain(udp.iter().map(|&port| (Proto::Udp, port)))
        .collect();
    let single = all.iter().all(|(_, port)| Some(port) == all.first().map(|(_, first)| first));
    all.into_iter()
        .map(|(proto, port)| {
            let name = if single { name.to_owned() } else { format!("{name}-{port}") };
            (name, proto, port)
        })
        .collect()
}

fn known_name(proto: Proto, port: Port) -> String {
    let name = match (proto, port.get()) {
        (Proto::Tcp, 22) => "ssh",
        (Proto::Tcp, 25) => "smtp",
        (_, 53) => "dns",
        (Proto::Tcp, 80) => "http",
        (_, 443) => "https",
        (Proto::Udp, 123) => "ntp",
        (Proto::Tcp, 465) => "submissions",
        (Proto::Tcp, 587) => "submission",
        (_, 853) => "dot",
        (Proto::Tcp, 993) => "imaps",
        (Proto::Udp, 51820) => "wireguard",
        _ => return format!("{proto}-{port}"),
    };
    name.to_owned()
}

#[cfg(test)]
mod tests {
    use expect_test::expect;

    use crate::desired::{Desired, samples};
    use crate::policy::Policy;
    use crate::terms::{Port, Proto, Scope};

    fn listed(policy: Policy) -> String {
        let desired = Desired::new(policy, samples::TODAY).expect("a path");
        let mut out = String::new();
        for s in &desired.services {
            let from = s.from.as_ref().map_or("anyone".to_owned(), |nets| format!("{nets:?}"));
            out += &format!("{} {}/{} {} from {from}", s.name, s.proto, s.port, s.scope);
            out += &s.local.map_or(String::new(), |n| format!(" local {n}"));
            out += &s.exception.map_or(String::new(), |n| format!(" exception {n}"));
            out += "\n";
        }
        out
    }

    #[test]
    fn every_port_has_a_class_in_the_order_of_the_policy() {
        expect![[r#"
            http tcp/80 public from anyone
            https tcp/443 public from anyone
            ssh tcp/22 mesh from [10.84.0.1/32]
            metrics tcp/9984 mesh from [10.84.0.1/32]
            netdata tcp/19999 mesh from [10.84.0.0/24]
            lan tcp/53 other from anyone local 0
            lan udp/53 other from anyone local 0
            containers-5432 tcp/5432 other from anyone local 1
            containers-6379 tcp/6379 other from anyone local 1
            emergency-ssh tcp/2222 public from [0.0.0.0/0, ::/0] exception 0
            office tcp/8443 public from [192.0.2.0/25, 192.0.2.128/26, 198.51.100.9/32, 2001:db8:1::/48] exception 2
            wireguard udp/51821 public from [203.0.113.47/32]
        "#]].assert_eq(&listed(samples::everything()));
    }

    #[test]
    fn a_name_never_stands_for_two_classes_of_one_protocol() {
        let mut policy = samples::everything();
        policy.public.tcp = vec![samples::port(9984), samples::port(443)];
        policy.locals[0].name = "metrics".into();
        policy.services[0].name = "https".into();
        let desired = Desired::new(policy, samples::TODAY).expect("a path");
        for (at, s) in desired.services.iter().enumerate() {
            assert!(
                desired.services[..at].iter().all(|o| (&o.name, o.proto) != (&s.name, s.proto)),
                "{} twice",
                s.name
            );
        }
    }

    #[test]
    fn what_is_wanted_depends_on_where_the_packet_arrives() {
        let desired = Desired::new(samples::everything(), samples::TODAY).expect("a path");
        let wanted = |number, scope| {
            let port = Port::new(number).expect("a port");
            desired.wanted(Proto::Tcp, port, scope).iter().map(|s| s.name.clone()).collect::<Vec<_>>()
        };
        assert_eq!(wanted(443, Scope::Public), ["https"]);
        assert_eq!(wanted(443, Scope::Other), ["https"], "what is public is for anyone");
        assert_eq!(wanted(443, Scope::Mesh), ["https"]);
        assert_eq!(wanted(22, Scope::Public), [""; 0]);
        assert_eq!(wanted(22, Scope::Mesh), ["ssh"]);
        assert_eq!(wanted(2222, Scope::Public), ["emergency-ssh"]);
        assert_eq!(wanted(2222, Scope::Other), ["emergency-ssh"]);
        assert_eq!(wanted(3333, Scope::Public), [""; 0], "an expired exception grants nothing");
        assert!(desired.public(Proto::Tcp, samples::port(443)).is_some());
        assert!(desired.public(Proto::Udp, samples::port(443)).is_none());
        assert!(desired.public(Proto::Tcp, samples::port(8443)).is_none(), "from a list is not anyone");
    }
}
