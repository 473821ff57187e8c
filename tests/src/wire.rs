//! Packets as bytes, with right checksums: the kernel's conntrack and its sockets look at them.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context, Result};
use rustix::net::{AddressFamily, SendFlags, SocketFlags, SocketType, ipproto, sendto, socket_with};

pub const ICMP: u8 = 1;
pub const TCP: u8 = 6;
pub const UDP: u8 = 17;
pub const FRAGMENT: u8 = 44;
pub const ICMPV6: u8 = 58;

pub const SYN: u8 = 0x02;
pub const RST: u8 = 0x04;
pub const ACK: u8 = 0x10;

/// From where to where.
pub type Way = (IpAddr, IpAddr);

/// A segment with these flags and no data.
pub fn tcp(way: Way, (from, to): (u16, u16), flags: u8) -> Vec<u8> {
    let mut segment = [from.to_be_bytes(), to.to_be_bytes()].concat();
    segment.extend([0, 0, 0, 1, 0, 0, 0, 0, 0x50, flags, 0xff, 0xff, 0, 0, 0, 0]);
    sealed(way, TCP, segment, 16)
}

pub fn udp(way: Way, (from, to): (u16, u16), data: &[u8]) -> Vec<u8> {
    let length = 8 + data.len() as u16;
    let mut datagram = [from.to_be_bytes(), to.to_be_bytes(), length.to_be_bytes(), [0, 0]].concat();
    datagram.extend(data);
    sealed(way, UDP, datagram, 6)
}

/// An ICMP message of either family; its number is `kind`.
pub fn icmp(way: Way, kind: u8, code: u8, rest: &[u8]) -> Vec<u8> {
    let message = [&[kind, code, 0, 0], rest].concat();
    let proto = if way.0.is_ipv4() { ICMP } else { ICMPV6 };
    sealed(way, proto, message, 2)
}

/// A whole packet.
pub fn ip(way: Way, proto: u8, body: &[u8]) -> Vec<u8> {
    match way {
        (IpAddr::V4(_), _) => part(way, proto, body, (1, 0, false)),
        (from, to) => {
            let [high, low] = (body.len() as u16).to_be_bytes();
            [&[0x60, 0, 0, 0, high, low, proto, 64][..], &octets(from), &octets(to), body].concat()
        }
    }
}

/// One packet cut into two at `at`, which is a multiple of 8.
pub fn fragments(way: Way, proto: u8, body: &[u8], at: usize, id: u16) -> [Vec<u8>; 2] {
    let (first, second) = body.split_at(at);
    [(first, 0, true), (second, at, false)].map(|(body, at, more)| part(way, proto, body, (id, at, more)))
}

fn part(way: Way, proto: u8, body: &[u8], (id, at, more): (u16, usize, bool)) -> Vec<u8> {
    let (from, to) = way;
    if from.is_ipv6() {
        let offset = (at as u16 | u16::from(more)).to_be_bytes();
        let [high, low] = id.to_be_bytes();
        let head = [proto, 0, offset[0], offset[1], 0, 0, high, low];
        return ip(way, FRAGMENT, &[&head, body].concat());
    }
    let [high, low] = (20 + body.len() as u16).to_be_bytes();
    let more = if more { 0x2000 } else { 0 };
    let offset = (at as u16 / 8 + more).to_be_bytes();
    let [id_high, id_low] = id.to_be_bytes();
    let mut head = [0x45, 0, high, low, id_high, id_low, offset[0], offset[1], 64, proto, 0, 0].to_vec();
    head.extend(octets(from));
    head.extend(octets(to));
    let sum = checksum(&head).to_be_bytes();
    head[10..12].copy_from_slice(&sum);
    [&head, body].concat()
}

/// Sends them as they are, from any address, to whoever has `to` (the sources need not be
/// this node's). Call it inside a node.
pub struct Sender {
    v4: rustix::fd::OwnedFd,
    v6: rustix::fd::OwnedFd,
}

impl Sender {
    pub fn open() -> Result<Sender> {
        let raw = |family| {
            socket_with(family, SocketType::RAW, SocketFlags::CLOEXEC, Some(ipproto::RAW))
                .context("open a raw socket")
        };
        Ok(Sender { v4: raw(AddressFamily::INET)?, v6: raw(AddressFamily::INET6)? })
    }

    pub fn send(&self, packet: &[u8], to: IpAddr) -> Result<()> {
        // The far end may be slower than we are.
        crate::wait_until(std::time::Duration::from_secs(5), "room for a packet", || {
            self.send_or_lose(packet, to).then_some(())
        })
    }

    /// Whether it went out: the cable may be out.
    pub fn send_or_lose(&self, packet: &[u8], to: IpAddr) -> bool {
        let socket = if to.is_ipv4() { &self.v4 } else { &self.v6 };
        sendto(socket, packet, SendFlags::empty(), &SocketAddr::new(to, 0)).is_ok()
    }
}

/// With the checksum of these protocols, which covers both addresses as well.
fn sealed((from, to): Way, proto: u8, mut body: Vec<u8>, at: usize) -> Vec<u8> {
    let mut covered = Vec::new();
    if proto != ICMP {
        covered = [octets(from), octets(to)].concat();
        covered.extend([0, proto]);
        covered.extend((body.len() as u16).to_be_bytes());
    }
    covered.extend(&body);
    let sum = checksum(&covered).to_be_bytes();
    body[at..at + 2].copy_from_slice(&sum);
    body
}

fn checksum(bytes: &[u8]) -> u16 {
    let word = |pair: &[u8]| u32::from(pair[0]) << 8 | u32::from(pair.get(1).copied().unwrap_or(0));
    let mut sum: u32 = bytes.chunks(2).map(word).sum();
    while sum >> 16 != 0 {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// RFC 1071's own example, and a whole datagram, whose sum over everything is then 0.
    #[test]
    fn checksums_are_those_of_the_standard() {
        assert_eq!(checksum(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7]), !0xddf2);
        let way = (crate::OUTSIDER, crate::SPOKE_PUBLIC);
        let packet = ip(way, UDP, &udp(way, (5000, 53), b"odd"));
        assert_eq!(checksum(&packet[..20]), 0);
        assert_eq!(packet.len(), 31);
        let [first, second] = fragments(way, UDP, &udp(way, (5000, 53), &[7; 16]), 8, 9);
        assert_eq!((&first[6..8], &second[6..8]), (&[0x20, 0][..], &[0, 1][..]));
    }
}
