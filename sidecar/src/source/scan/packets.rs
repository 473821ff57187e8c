//! Probes as bytes, and answers from bytes. Everything that comes in was sent by anyone.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::audit::Answer;
use crate::sys::filter::Instruction;
use crate::terms::Proto;

/// One way of asking: from an address and port of ours, to one address.
#[derive(Clone, Debug)]
pub(in crate::source) struct Flow {
    pub proto: Proto,
    pub source: IpAddr,
    pub target: IpAddr,
    /// How many packets get lost is found out from the first, at ports that answered before.
    /// Ports are asked from the others, of which a scan opens one after the other.
    pub source_ports: Vec<u16>,
}

/// An answer to a probe of ours: which port, from which of the source ports it was asked, what
/// it says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::source) struct Heard {
    pub port: u16,
    pub asker: usize,
    pub answer: Answer,
}

const HOPS: u8 = 64;
const SYN: u8 = 0x02;
const RST: u8 = 0x04;
const ACK: u8 = 0x10;
/// Kernels are asked for no more of a packet: headers, and the headers that ICMP quotes.
pub(super) const SNAP: usize = 192;

impl Flow {
    /// A SYN as an ordinary host sends it, or an empty datagram, with its IP header, from the
    /// source port at `asker`. `cookie` is the sequence number: who did not see the probe can't
    /// answer it.
    pub fn probe(&self, port: u16, asker: usize, cookie: u32, out: &mut Vec<u8>) {
        out.clear();
        let payload: u8 = match self.proto {
            Proto::Tcp => 24,
            Proto::Udp => 8,
        };
        match (self.source, self.target) {
            (IpAddr::V4(source), IpAddr::V4(target)) => {
                // The kernel fills in length, id and checksum.
                out.extend([0x45, 0, 0, 0, 0, 0, 0x40, 0, HOPS, self.proto.number(), 0, 0]);
                out.extend(source.octets());
                out.extend(target.octets());
            }
            (source, target) => {
                out.extend([0x60, 0, 0, 0, 0, payload, self.proto.number(), HOPS]);
                out.extend(six(source).octets());
                out.extend(six(target).octets());
            }
        }
        let head = out.len();
        out.extend(self.source_ports[asker].to_be_bytes());
        out.extend(port.to_be_bytes());
        match self.proto {
            Proto::Tcp => {
                out.extend(cookie.to_be_bytes());
                out.extend([0, 0, 0, 0, 0x60, SYN, 0xfa, 0xf0, 0, 0, 0, 0]);
                // Maximum segment size 1460: rules may ask for the option.
                out.extend([2, 4, 0x05, 0xb4]);
                self.seal(out, head, head + 16);
            }
            Proto::Udp => {
                out.extend([0, 8, 0, 0]);
                self.seal(out, head, head + 6);
            }
        }
    }

    fn seal(&self, packet: &mut [u8], head: usize, at: usize) {
        let mut sum = u32::from(self.proto.number()) + (packet.len() - head) as u32;
        let mut add = |bytes: &[u8]| {
            sum += bytes.chunks(2).map(|c| u32::from(u16::from_be_bytes([c[0], c[1]]))).sum::<u32>();
        };
        for address in [self.source, self.target] {
            match address {
                IpAddr::V4(a) => add(&a.octets()),
                IpAddr::V6(a) => add(&a.octets()),
            }
        }
        add(&packet[head..]);
        while sum > 0xffff {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        // 0 would mean "no checksum" in UDP.
        let checksum = match !(sum as u16) {
            0 => 0xffff,
            other => other,
        };
        packet[at..at + 2].copy_from_slice(&checksum.to_be_bytes());
    }

    /// What a packet from the wire, from its IP header on, says about a probe of ours.
    pub fn hear(&self, packet: &[u8], cookie: impl Fn(u16, usize) -> u32) -> Option<Heard> {
        let (source, destination, protocol, payload) = ip(packet)?;
        if destination != self.source {
            return None;
        }
        let icmp = if self.source.is_ipv4() { 1 } else { 58 };
        if protocol == icmp {
            return self.quoted(payload, cookie);
        }
        if protocol != self.proto.number() || source != self.target {
            return None;
        }
        let (port, asker) = (be16(payload, 0)?, self.asked_from(be16(payload, 2)?)?);
        let answer = match self.proto {
            Proto::Udp => Answer::Datagram,
            Proto::Tcp => {
                let flags = *payload.get(13)?;
                let (wanted, found) = (cookie(port, asker).wrapping_add(1), be32(payload, 8)?);
                match flags & (SYN | RST | ACK) {
                    _ if found != wanted => return None,
                    f if f == SYN | ACK => Answer::SynAck,
                    f if f == RST | ACK => Answer::Reset,
                    _ => return None,
                }
            }
        };
        Some(Heard { port, asker, answer })
    }

    /// ICMP, which quotes the beginning of what it is about.
    fn quoted(&self, icmp: &[u8], cookie: impl Fn(u16, usize) -> u32) -> Option<Heard> {
        let (icmp_type, code) = (*icmp.first()?, *icmp.get(1)?);
        let is_error = match self.source {
            IpAddr::V4(_) => matches!((icmp_type, code), (3, 0..=3 | 5..=15) | (11, 0)),
            IpAddr::V6(_) => matches!((icmp_type, code), (1, _) | (3, 0)),
        };
        if !is_error {
            return None;
        }
        let (source, destination, protocol, payload) = ip(icmp.get(8..)?)?;
        if source != self.source || destination != self.target || protocol != self.proto.number() {
            return None;
        }
        let (asker, port) = (self.asked_from(be16(payload, 0)?)?, be16(payload, 2)?);
        if self.proto == Proto::Tcp && be32(payload, 4)? != cookie(port, asker) {
            return None;
        }
        Some(Heard { port, asker, answer: Answer::Unreachable { icmp_type, code } })
    }

    fn asked_from(&self, port: u16) -> Option<usize> {
        self.source_ports.iter().position(|p| *p == port)
    }

    /// What the kernel should hand us of all that comes in: segments for our ports, of which
    /// there are fewer than 200, and ICMP errors.
    pub fn filter(&self) -> Vec<Instruction> {
        const LOAD_BYTE: u16 = 0x30;
        const LOAD_HALF: u16 = 0x28;
        const LOAD_HALF_X: u16 = 0x48;
        const HEADER_X: u16 = 0xb1;
        const EQUAL: u16 = 0x15;
        const SET: u16 = 0x45;
        const RETURN: u16 = 0x06;
        let proto = u32::from(self.proto.number());
        let n = self.source_ports.len() as u8;
        let mut out: Vec<Instruction> = if self.source.is_ipv4() {
            vec![
                (LOAD_HALF, 0, 0, 6),
                (SET, n + 5, 0, 0x1fff), // a later fragment
                (LOAD_BYTE, 0, 0, 9),
                (EQUAL, n + 4, 0, 1), // ICMP
                (EQUAL, 0, n + 2, proto),
                (HEADER_X, 0, 0, 0),
                (LOAD_HALF_X, 0, 0, 2),
            ]
        } else {
            vec![
                (LOAD_BYTE, 0, 0, 6),
                (EQUAL, n + 3, 0, 58), // ICMPv6
                (EQUAL, 0, n + 1, proto),
                (LOAD_HALF, 0, 0, 42),
            ]
        };
        let ports = (1..=n).rev().zip(&self.source_ports);
        out.extend(ports.map(|(to_take, port)| (EQUAL, to_take, 0, u32::from(*port))));
        out.extend([(RETURN, 0, 0, 0), (RETURN, 0, 0, SNAP as u32)]);
        out
    }
}

fn six(address: IpAddr) -> Ipv6Addr {
    match address {
        IpAddr::V4(v4) => v4.to_ipv6_mapped(),
        IpAddr::V6(v6) => v6,
    }
}

/// Source, destination, protocol and what follows the header.
fn ip(packet: &[u8]) -> Option<(IpAddr, IpAddr, u8, &[u8])> {
    match packet.first()? >> 4 {
        4 => {
            let header = usize::from(packet[0] & 0x0f) * 4;
            if header < 20 {
                return None;
            }
            let address = |at: usize| {
                let bytes: [u8; 4] = packet.get(at..at + 4)?.try_into().ok()?;
                Some(IpAddr::V4(Ipv4Addr::from(bytes)))
            };
            Some((address(12)?, address(16)?, *packet.get(9)?, packet.get(header..)?))
        }
        6 => {
            let address = |at: usize| {
                let bytes: [u8; 16] = packet.get(at..at + 16)?.try_into().ok()?;
                Some(IpAddr::V6(Ipv6Addr::from(bytes)))
            };
            Some((address(8)?, address(24)?, *packet.get(6)?, packet.get(40..)?))
        }
        _ => None,
    }
}

fn be16(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn be32(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_be_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    const COOKIE: u32 = 0xfffffffe;

    fn flow(proto: Proto, six: bool) -> Flow {
        let (source, target) = if six { ("2001:db8::1", "2001:db8::7") } else { ("192.0.2.1", "192.0.2.7") };
        Flow {
            proto,
            source: source.parse().expect("an address"),
            target: target.parse().expect("an address"),
            source_ports: vec![40_001, 40_002],
        }
    }

    /// The answer that the target would send, as seen by whoever asked.
    fn answer(flow: &Flow, segment: &[u8]) -> Vec<u8> {
        let back = Flow { source: flow.target, target: flow.source, ..flow.clone() };
        packet(&back, flow.proto.number(), segment)
    }

    fn packet(flow: &Flow, protocol: u8, payload: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        flow.probe(1, 0, 0, &mut out);
        out.truncate(if flow.source.is_ipv4() { 20 } else { 40 });
        out[if flow.source.is_ipv4() { 9 } else { 6 }] = protocol;
        out.extend(payload);
        out
    }

    fn segment(from: u16, to: u16, ack: u32, flags: u8) -> Vec<u8> {
        let mut out = [from.to_be_bytes(), to.to_be_bytes()].concat();
        out.extend([9, 9, 9, 9]);
        out.extend(ack.to_be_bytes());
        out.extend([0x50, flags, 0, 0, 0, 0, 0, 0]);
        out
    }

    #[test]
    fn the_checksum_of_a_probe_sums_up() {
        for six in [false, true] {
            for proto in Proto::ALL {
                let flow = flow(proto, six);
                let mut out = Vec::new();
                flow.probe(443, 0, 0x1234_5678, &mut out);
                let head = if six { 40 } else { 20 };
                let mut sum = u32::from(proto.number()) + (out.len() - head) as u32;
                for half in out[if six { 8 } else { 12 }..].chunks(2) {
                    sum += u32::from(u16::from_be_bytes([half[0], half[1]]));
                }
                while sum > 0xffff {
                    sum = (sum & 0xffff) + (sum >> 16);
                }
                assert_eq!(sum, 0xffff, "{proto} six={six}");
            }
        }
    }

    #[test]
    fn only_an_answer_to_our_own_probe_is_heard() {
        for six in [false, true] {
            let flow = flow(Proto::Tcp, six);
            let hear = |bytes: &[u8]| flow.hear(bytes, |_, asker| COOKIE.wrapping_add(asker as u32));
            let good = answer(&flow, &segment(443, 40_001, COOKIE.wrapping_add(1), SYN | ACK));
            assert_eq!(hear(&good), Some(Heard { port: 443, asker: 0, answer: Answer::SynAck }));
            let closed = answer(&flow, &segment(80, 40_002, COOKIE.wrapping_add(2), RST | ACK));
            assert_eq!(hear(&closed), Some(Heard { port: 80, asker: 1, answer: Answer::Reset }));
            // A number that a stranger guessed, another port of ours, another sender, a plain ACK.
            for (bytes, what) in [
                (answer(&flow, &segment(443, 40_001, COOKIE, SYN | ACK)), "cookie"),
                (answer(&flow, &segment(443, 40_003, COOKIE.wrapping_add(1), SYN | ACK)), "port"),
                (answer(&flow, &segment(443, 40_001, COOKIE.wrapping_add(1), ACK)), "flags"),
                (packet(&flow, 6, &segment(443, 40_001, COOKIE.wrapping_add(1), SYN | ACK)), "direction"),
            ] {
                assert_eq!(hear(&bytes), None, "{what}");
            }
            for length in 0..good.len() - 6 {
                assert_eq!(hear(&good[..length]), None, "{length} bytes");
            }
        }
    }

    #[test]
    fn icmp_errors_count_only_with_our_probe_inside() {
        for (six, icmp_type, code) in [(false, 3, 13), (true, 1, 1)] {
            for proto in Proto::ALL {
                let flow = flow(proto, six);
                let mut probe = Vec::new();
                flow.probe(25, 0, COOKIE, &mut probe);
                let hear = |bytes: &[u8]| flow.hear(bytes, |_, _| COOKIE);
                let icmp = |quoted: &[u8], icmp_type: u8| {
                    let body = [&[icmp_type, code, 0, 0, 0, 0, 0, 0], quoted].concat();
                    answer(&Flow { proto: Proto::Tcp, ..flow.clone() }, &body)
                };
                let number = if six { 58 } else { 1 };
                let mut good = icmp(&probe, icmp_type);
                good[if six { 6 } else { 9 }] = number;
                let answer = Answer::Unreachable { icmp_type, code };
                assert_eq!(hear(&good), Some(Heard { port: 25, asker: 0, answer }));
                let mut echo = icmp(&probe, if six { 129 } else { 0 });
                echo[if six { 6 } else { 9 }] = number;
                assert_eq!(hear(&echo), None);
                let mut stranger = Vec::new();
                let other = Flow { target: flow.source, source: flow.target, ..flow.clone() };
                other.probe(25, 0, COOKIE, &mut stranger);
                let mut wrong = icmp(&stranger, icmp_type);
                wrong[if six { 6 } else { 9 }] = number;
                assert_eq!(hear(&wrong), None);
                for length in 0..good.len() {
                    let _ = hear(&good[..length]);
                }
            }
        }
    }
}
