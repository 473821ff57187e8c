//! Evidence that whoever administers this node still gets in: a connection through the
//! tunnel to sshd or to the metrics that began after the rules went in.
//!
//! A socket in one of the states below has its handshake behind it: our answer went out
//! and came back acknowledged. Sockets from before are told apart by their cookie, which
//! the kernel gives once and which a half-open connection hands on to what becomes of it.
//! Closed connections stay visible for a minute where we closed first (metrics), and for
//! moments where they did (ssh): whoever waits looks ten times a second.
//!
//! The way is proven by the route of our answers: they leave through the mesh interface,
//! so the address at the other end is whoever the tunnel says it is. The way in is the
//! rules' to judge, which take a mesh address from no other interface.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use anyhow::Context;
use ipnet::IpNet;
use netlink_packet_core::Emitable;
use netlink_packet_sock_diag::inet::{ExtensionFlags, InetRequest, SocketId, StateFlags};

use super::netlink::{Netlink, NetlinkError, array_at, hint, u32_at};
use super::probe::Routes;
use crate::desired::Desired;
use crate::terms::{Family, Port, Proto};

/// What counts as evidence under a policy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sought {
    /// Who: the hub, or on a node that names none whoever may administer it.
    pub peers: Vec<IpNet>,
    /// Addresses of this node in the mesh.
    pub to: Vec<IpNet>,
    pub ports: Vec<Port>,
    pub interface: String,
}

/// One TCP connection from a peer that is sought, open or closed a moment ago.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Connection {
    /// The kernel's number for it, used once.
    pub cookie: u64,
    pub peer: IpAddr,
    pub local: IpAddr,
    pub port: Port,
    /// The handshake is complete.
    pub complete: bool,
}

impl Sought {
    /// `None`: by this policy nobody comes through the mesh to administer this node, so
    /// that only `spokeguard confirm` can confirm.
    pub fn new(desired: &Desired) -> Option<Self> {
        let mesh = &desired.policy.mesh;
        let (peers, ports) = match &mesh.hub {
            Some(hub) => (
                hub.address.iter().copied().map(IpNet::from).collect(),
                vec![desired.policy.ssh.port, desired.policy.metrics.port],
            ),
            None => {
                let admin = desired.admin.as_ref()?;
                (admin.from().to_vec(), vec![admin.port()])
            }
        };
        let to: Vec<IpNet> = match mesh.address.is_empty() {
            true => mesh.prefix.clone(),
            false => mesh.address.iter().copied().map(IpNet::from).collect(),
        };
        let sought = Self { peers, to, ports, interface: mesh.interface.clone() };
        (!sought.peers.is_empty() && !sought.to.is_empty()).then_some(sought)
    }

    fn covers(&self, connection: &Connection) -> bool {
        let within = |nets: &[IpNet], address| nets.iter().any(|net| net.contains(&address));
        within(&self.peers, connection.peer)
            && within(&self.to, connection.local)
            && self.ports.contains(&connection.port)
    }
}

/// Every connection that is sought, half-open ones included.
pub fn connections(sought: &Sought) -> anyhow::Result<Vec<Connection>> {
    let mut link = Netlink::open(PROTOCOL).context("read connections")?;
    let mut out = Vec::new();
    for family in Family::ALL {
        for port in &sought.ports {
            let found = link.dump(SOCK_DIAG_BY_FAMILY, &request(family, *port), decode).map_err(|error| {
                let hint = hint(&error);
                anyhow::Error::new(error)
                    .context(format!("read connections to port {port} of {family}{hint}"))
            })?;
            out.extend(found.into_iter().filter(|connection| sought.covers(connection)));
        }
    }
    Ok(out)
}

/// A complete one that is not among the `old`, and whose answers go through the mesh.
pub fn find(sought: &Sought, old: &std::collections::BTreeSet<u64>) -> anyhow::Result<Option<Connection>> {
    for connection in connections(sought)? {
        if connection.complete && !old.contains(&connection.cookie) {
            let mesh = interface_index(&sought.interface)?;
            let leaves = Routes::open()?.leaves_by(connection.local, connection.peer)?;
            if leaves.is_some() && leaves == mesh {
                return Ok(Some(connection));
            }
        }
    }
    Ok(None)
}

/// The index of an interface; `None`: there is none of that name.
fn interface_index(name: &str) -> anyhow::Result<Option<u32>> {
    let socket = rustix::net::socket(rustix::net::AddressFamily::INET, rustix::net::SocketType::DGRAM, None)
        .context("look for the mesh interface")?;
    match rustix::net::netdevice::name_to_index(&socket, name) {
        Ok(index) => Ok(Some(index)),
        Err(rustix::io::Errno::NODEV) => Ok(None),
        Err(error) => Err(error).context("look for the mesh interface"),
    }
}

const PROTOCOL: isize = netlink_sys::protocols::NETLINK_SOCK_DIAG;
const SOCK_DIAG_BY_FAMILY: u16 = 20;
/// The size of `struct inet_diag_msg`.
const MESSAGE: usize = 72;
const TCP_ESTABLISHED: u8 = 1;
const TCP_FIN_WAIT1: u8 = 4;
const TCP_FIN_WAIT2: u8 = 5;
const TCP_TIME_WAIT: u8 = 6;
const TCP_CLOSE_WAIT: u8 = 8;
const TCP_LAST_ACK: u8 = 9;
const TCP_CLOSING: u8 = 11;

fn request(family: Family, port: Port) -> Vec<u8> {
    let (family, mut socket_id) = match family {
        Family::Ipv4 => (libc::AF_INET as u8, SocketId::new_v4()),
        Family::Ipv6 => (libc::AF_INET6 as u8, SocketId::new_v6()),
    };
    // The kernel leaves out what has another port, so that a busy web server costs nothing.
    socket_id.source_port = port.get();
    let states = StateFlags::all() & !(StateFlags::LISTEN | StateFlags::CLOSE | StateFlags::SYN_SENT);
    let request = InetRequest {
        family,
        protocol: Proto::Tcp.number(),
        extensions: ExtensionFlags::empty(),
        states,
        socket_id,
    };
    let mut bytes = vec![0; request.buffer_len()];
    request.emit(&mut bytes);
    bytes
}

/// One `struct inet_diag_msg`.
pub(super) fn decode(payload: &[u8], out: &mut Vec<Connection>) -> Result<(), NetlinkError> {
    let cut = || NetlinkError::Truncated("a connection");
    let message = payload.get(..MESSAGE).ok_or_else(cut)?;
    let [family, state] = array_at(message, 0).ok_or_else(cut)?;
    let port = u16::from_be_bytes(array_at(message, 4).ok_or_else(cut)?);
    let [local, peer] =
        [8, 24].map(|at| array_at::<16>(message, at).and_then(|bytes| address(family, bytes)));
    let (Some(local), Some(peer)) = (local, peer) else {
        return Err(NetlinkError::Malformed("a connection of another address family"));
    };
    let low = u32_at(message, 44).ok_or_else(cut)?;
    let high = u32_at(message, 48).ok_or_else(cut)?;
    let complete = matches!(
        state,
        TCP_ESTABLISHED
            | TCP_FIN_WAIT1
            | TCP_FIN_WAIT2
            | TCP_TIME_WAIT
            | TCP_CLOSE_WAIT
            | TCP_LAST_ACK
            | TCP_CLOSING
    );
    if let Some(port) = Port::new(port) {
        let cookie = u64::from(high) << 32 | u64::from(low);
        out.push(Connection { cookie, peer, local, port, complete });
    }
    Ok(())
}

/// A dual-stack socket says ::ffff:10.84.0.1 and means 10.84.0.1.
fn address(family: u8, bytes: [u8; 16]) -> Option<IpAddr> {
    match i32::from(family) {
        libc::AF_INET => {
            let [a, b, c, d, ..] = bytes;
            Some(Ipv4Addr::new(a, b, c, d).into())
        }
        libc::AF_INET6 => Some(IpAddr::V6(Ipv6Addr::from(bytes)).to_canonical()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::net::{TcpListener, TcpStream};

    use super::*;
    use crate::desired::samples;
    use crate::source::{in_namespace, sh};

    fn sought(port: u16) -> Sought {
        let net = |text: &str| text.parse().expect("a prefix");
        Sought {
            peers: vec![net("10.84.0.1/32"), net("fd84::1/128")],
            to: vec![net("10.84.0.16/32"), net("fd84::16/128")],
            ports: vec![Port::new(port).expect("a port")],
            interface: "mesh0".into(),
        }
    }

    /// Both ends on loopback, from an address of choice.
    fn connect(from: &str, to: &str, port: u16) -> TcpStream {
        use rustix::net::{AddressFamily, SocketType};
        let (from, to): (IpAddr, IpAddr) =
            (from.parse().expect("an address"), to.parse().expect("an address"));
        let family = if to.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
        let socket = rustix::net::socket(family, SocketType::STREAM, None).expect("a socket");
        rustix::net::bind(&socket, &std::net::SocketAddr::new(from, 0)).expect("bind");
        rustix::net::connect(&socket, &std::net::SocketAddr::new(to, port)).expect("connect");
        TcpStream::from(socket)
    }

    #[test]
    fn new_connections_of_the_hub_count_and_no_others() {
        if !in_namespace("source::evidence::tests::new_connections_of_the_hub_count_and_no_others", &["ip"]) {
            return;
        }
        {
            sh("ip link set lo up; ip link add mesh0 type bridge; ip link set mesh0 up
                ip addr add 10.84.0.16/24 dev mesh0; ip addr add 10.84.0.1/32 dev lo; ip addr add 10.84.0.9/32 dev lo
                ip addr add fd84::16/64 dev mesh0 nodad; ip addr add fd84::1/128 dev lo nodad");
            let _sshd = TcpListener::bind("[::]:22").expect("bind");
            let sought = sought(22);
            let seen = || connections(&sought).expect("connections");
            let _before = connect("10.84.0.1", "10.84.0.16", 22);
            let mut old: BTreeSet<u64> = seen().iter().map(|c| c.cookie).collect();
            assert_eq!(old.len(), 1, "{:?}", seen());
            let _other = connect("10.84.0.9", "10.84.0.16", 22);
            let _elsewhere = connect("10.84.0.1", "10.84.0.9", 22);
            // Accepted by nobody: the kernel has shaken hands all the same. IPv4 by a dual-stack socket, and IPv6.
            for (from, to) in [("10.84.0.1", "10.84.0.16"), ("fd84::1", "fd84::16")] {
                let fresh = || seen().into_iter().filter(|c| !old.contains(&c.cookie)).collect::<Vec<_>>();
                assert_eq!(fresh(), []);
                let _stream = connect(from, to, 22);
                let found = fresh();
                assert!(
                    found.len() == 1 && found[0].complete && found[0].peer.to_string() == from,
                    "{found:?}"
                );
                // All of this is on loopback, so the answers go another way than through the mesh.
                assert_eq!(find(&sought, &old).expect("looked"), None);
                old.extend(found.iter().map(|c| c.cookie));
            }
        }
    }

    #[test]
    fn the_hub_counts_where_there_is_one_and_else_who_may_administer() {
        let of = |policy| Sought::new(&Desired::new(policy, samples::TODAY).expect("a path"));
        let spoke = of(samples::spoke()).expect("a hub");
        assert_eq!(spoke.peers, [samples::net("10.84.0.1/32")]);
        assert_eq!(spoke.to, [samples::net("10.84.0.16/32")]);
        assert_eq!(spoke.ports, [samples::port(22), samples::port(9984)]);
        let hub = of(samples::hub()).expect("two administrators");
        assert!(
            hub.peers.contains(&samples::net("10.84.0.7/32"))
                && !hub.peers.contains(&samples::net("10.84.0.0/24"))
        );
        assert_eq!(hub.ports, [samples::port(22)]);
        let mut nobody = samples::spoke();
        nobody.mesh.hub = None;
        nobody.enforce.allow_no_admin_path = true;
        assert_eq!(of(nobody), None);
    }

    #[test]
    fn what_is_cut_off_or_of_another_family_is_an_error() {
        for length in 0..MESSAGE {
            assert!(decode(&vec![2; length], &mut Vec::new()).is_err(), "{length}");
        }
        assert!(decode(&[9; MESSAGE], &mut Vec::new()).is_err());
        let mut sound = [0; MESSAGE];
        (sound[0], sound[1], sound[5]) = (libc::AF_INET as u8, TCP_ESTABLISHED, 22);
        let mut out = Vec::new();
        decode(&sound, &mut out).expect("sound");
        assert!(out[0].complete && out[0].port.get() == 22);
        sound[1] = 3;
        decode(&sound, &mut out).expect("sound");
        assert!(!out[1].complete, "half-open");
    }
}
