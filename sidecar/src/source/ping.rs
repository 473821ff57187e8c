//! ICMP echoes: the round trip to the hub's mesh address, and whether a host is there at all.

use std::io;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::net::{AddressFamily, Protocol, SocketFlags, SocketType, ipproto, socket_with, sockopt};

const HEADER: usize = 8;
const MARK: usize = 16;
/// Replies to others that may lie before ours.
const STRANGERS_MAX: usize = 64;
const BUFFER: usize = 4096;
/// How often, and how long each time, a host is asked before it is called silent.
pub const TRIES: usize = 3;
const PATIENCE: Duration = Duration::from_secs(1);
/// For whoever may not ask.
pub const NEEDS: &str = "this needs CAP_NET_RAW, or a group of net.ipv4.ping_group_range";

/// A socket for echoes. Made while raw sockets may still be: which kind a process may have
/// without a privilege is `net.ipv4.ping_group_range`'s to say, and it is nobody's by default.
pub struct Ping {
    to: IpAddr,
    socket: UdpSocket,
    raw: bool,
}

impl Ping {
    pub fn open(to: IpAddr) -> io::Result<Self> {
        Self::open_from(None, to)
    }

    /// `source`: an address of this host to send from; `None`: the kernel's choice.
    pub fn open_from(source: Option<IpAddr>, to: IpAddr) -> io::Result<Self> {
        let (family, protocol) = match to {
            IpAddr::V4(_) => (AddressFamily::INET, ipproto::ICMP),
            IpAddr::V6(_) => (AddressFamily::INET6, ipproto::ICMPV6),
        };
        let (socket, raw) = match open(family, SocketType::DGRAM, protocol) {
            Ok(socket) => (socket, false),
            Err(_) => (open(family, SocketType::RAW, protocol)?, true),
        };
        sockopt::set_socket_recv_buffer_size(&socket, BUFFER)?;
        if let Some(source) = source {
            rustix::net::bind(&socket, &SocketAddr::new(source, 0))?;
        }
        // By way of std, whose connect, send and receive are the same for every kind of socket.
        let socket = UdpSocket::from(socket);
        // The kernel keeps what others send from it.
        socket.connect(SocketAddr::new(to, 0))?;
        Ok(Self { to, socket, raw })
    }

    pub fn to(&self) -> IpAddr {
        self.to
    }

    /// Milliseconds there and back, of the first of [`TRIES`] that came back within a second.
    pub fn first_round_trip_ms(&self) -> Option<f64> {
        (0..TRIES).find_map(|_| self.round_trip_ms(PATIENCE))
    }

    /// Milliseconds there and back. `None`: no reply within `patience`.
    pub fn round_trip_ms(&self, patience: Duration) -> Option<f64> {
        let mut mark = [0; MARK];
        rustix::rand::getrandom(&mut mark, rustix::rand::GetRandomFlags::empty()).ok()?;
        self.socket.set_nonblocking(true).ok()?;
        let mut buffer = [0; 512];
        for _ in 0..STRANGERS_MAX {
            if self.socket.recv(&mut buffer).is_err() {
                break;
            }
        }
        self.socket.set_nonblocking(false).ok()?;
        let begun = Instant::now();
        self.socket.send(&request(self.to, &mark)).ok()?;
        for _ in 0..STRANGERS_MAX {
            let left = patience.checked_sub(begun.elapsed()).filter(|left| !left.is_zero())?;
            self.socket.set_read_timeout(Some(left)).ok()?;
            let length = self.socket.recv(&mut buffer).ok()?;
            if is_reply(buffer.get(..length)?, self.to, self.raw, &mark) {
                return Some(begun.elapsed().as_secs_f64() * 1000.0);
            }
        }
        None
    }
}

fn open(family: AddressFamily, kind: SocketType, protocol: Protocol) -> io::Result<OwnedFd> {
    Ok(socket_with(family, kind, SocketFlags::CLOEXEC, Some(protocol))?)
}

/// An echo request. The kernel sums up ICMPv6, and all of a datagram socket's.
fn request(to: IpAddr, mark: &[u8; MARK]) -> Vec<u8> {
    let kind = if to.is_ipv4() { 8 } else { 128 };
    let mut packet = vec![kind, 0, 0, 0, mark[0], mark[1], 0, 1];
    packet.extend(mark);
    if to.is_ipv4() {
        let sum = checksum(&packet).to_be_bytes();
        packet[2..4].copy_from_slice(&sum);
    }
    packet
}

fn checksum(packet: &[u8]) -> u16 {
    let words =
        packet.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(pair.get(1).copied().unwrap_or(0)));
    let sum: u32 = words.sum();
    let sum = (sum & 0xffff) + (sum >> 16);
    !((sum & 0xffff) + (sum >> 16)) as u16
}

/// Raw IPv4 sockets give the IP header as well.
fn is_reply(packet: &[u8], from: IpAddr, raw: bool, mark: &[u8; MARK]) -> bool {
    let header = match packet.first() {
        Some(first) if raw && from.is_ipv4() => usize::from(first & 15) * 4,
        _ => 0,
    };
    let Some(icmp) = packet.get(header..) else { return false };
    let kind = if from.is_ipv4() { 0 } else { 129 };
    icmp.first() == Some(&kind) && icmp.get(HEADER..HEADER + MARK) == Some(mark)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_reply_to_this_request_counts() {
        let (four, six) = (IpAddr::from([10, 84, 0, 1]), "fd84::1".parse::<IpAddr>().expect("an address"));
        let mark = [7; MARK];
        let mut reply = request(four, &mark);
        assert_eq!(checksum(&reply), 0, "summed up");
        assert!(!is_reply(&reply, four, false, &mark), "a request is no reply");
        reply[0] = 0;
        assert!(is_reply(&reply, four, false, &mark));
        assert!(!is_reply(&reply, four, false, &[8; MARK]) && !is_reply(&reply, six, false, &mark));
        assert!(!is_reply(&reply[..20], four, false, &mark) && !is_reply(&[], four, true, &mark));
        let mut with_ip = vec![0x46; 24];
        with_ip.extend(&reply);
        assert!(is_reply(&with_ip, four, true, &mark) && !is_reply(&with_ip, four, false, &mark));
        reply[0] = 129;
        assert!(is_reply(&reply, six, true, &mark));
    }

    #[test]
    fn loopback_answers_at_once() {
        // Root may have raw sockets; elsewhere it is the group range that decides.
        for to in ["127.0.0.1", "::1"] {
            let Ok(ping) = Ping::open(to.parse().expect("an address")) else { continue };
            let took = ping.round_trip_ms(Duration::from_secs(10));
            assert!(took.is_some_and(|ms| ms < 10_000.0), "{to}: {took:?}");
        }
    }
}
