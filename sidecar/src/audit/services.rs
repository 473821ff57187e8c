//! What ports are usually called, by the names that nmap prints. Short on purpose: a port
//! that strangers meet often deserves a name, and the policy's own names come first.

use crate::terms::{Port, Proto};

pub fn service_name(proto: Proto, port: Port) -> Option<&'static str> {
    let number = port.get();
    let list = match proto {
        Proto::Tcp => TCP,
        Proto::Udp => UDP,
    };
    list.binary_search_by_key(&number, |(n, _)| *n).ok().map(|at| list[at].1)
}

/// The ports that have a name here, in order.
pub fn well_known(proto: Proto) -> impl Iterator<Item = Port> {
    let list = match proto {
        Proto::Tcp => TCP,
        Proto::Udp => UDP,
    };
    list.iter().filter_map(|(number, _)| Port::new(*number))
}

const TCP: &[(u16, &str)] = &[
    (21, "ftp"),
    (22, "ssh"),
    (23, "telnet"),
    (25, "smtp"),
    (53, "domain"),
    (80, "http"),
    (110, "pop3"),
    (111, "rpcbind"),
    (139, "netbios-ssn"),
    (143, "imap"),
    (179, "bgp"),
    (389, "ldap"),
    (443, "https"),
    (445, "microsoft-ds"),
    (465, "smtps"),
    (587, "submission"),
    (631, "ipp"),
    (636, "ldapssl"),
    (853, "domain-s"),
    (873, "rsync"),
    (993, "imaps"),
    (995, "pop3s"),
    (1433, "ms-sql-s"),
    (1883, "mqtt"),
    (2049, "nfs"),
    (2375, "docker"),
    (2376, "docker"),
    (2379, "etcd-client"),
    (2380, "etcd-server"),
    (3000, "ppp"),
    (3306, "mysql"),
    (3389, "ms-wbt-server"),
    (5355, "llmnr"),
    (5432, "postgresql"),
    (5671, "amqps"),
    (5672, "amqp"),
    (5900, "vnc"),
    (6379, "redis"),
    (6443, "sun-sr-https"),
    (8000, "http-alt"),
    (8006, "wpl-analytics"),
    (8080, "http-proxy"),
    (8443, "https-alt"),
    (9090, "zeus-admin"),
    (9100, "jetdirect"),
    (9200, "wap-wsp"),
    (10250, "kubelet"),
    (11211, "memcache"),
    (19999, "dnp-sec"),
    (27017, "mongod"),
];

const UDP: &[(u16, &str)] = &[
    (53, "domain"),
    (67, "dhcps"),
    (68, "dhcpc"),
    (69, "tftp"),
    (111, "rpcbind"),
    (123, "ntp"),
    (137, "netbios-ns"),
    (138, "netbios-dgm"),
    (161, "snmp"),
    (443, "https"),
    (500, "isakmp"),
    (514, "syslog"),
    (546, "dhcpv6-client"),
    (547, "dhcpv6-server"),
    (853, "domain-s"),
    (1194, "openvpn"),
    (1900, "upnp"),
    (3478, "stun"),
    (4500, "nat-t-ike"),
    (5353, "zeroconf"),
    (5355, "llmnr"),
    (11211, "memcache"),
    (41641, "tailscale"),
    (51820, "wireguard"),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_is_found_and_no_other() {
        for (proto, list) in [(Proto::Tcp, TCP), (Proto::Udp, UDP)] {
            for (number, name) in list {
                assert_eq!(service_name(proto, Port::new(*number).expect("a port")), Some(*name));
            }
        }
        assert_eq!(service_name(Proto::Udp, Port::new(22).expect("a port")), None);
    }
}
