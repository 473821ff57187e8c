//! The probes themselves: a SYN as Linux would send it, or a small datagram, from its
//! Ethernet header on, with checksums that hold. Pure.

use std::net::IpAddr;

use sidecar_ebpf::sweep::{FRAME_MAX, Frame, Order};

/// What all frames of a sweep share.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    pub order: Order,
    pub to: IpAddr,
    /// All zero for devices without link layer, which never see it.
    pub mac: [u8; 6],
    /// The neighbour whom they seem to come through.
    pub from: [u8; 6],
}

/// Locally administered: no vendor's.
pub const NOBODY: [u8; 6] = [2, 0, 0, 0x53, 0x47, 1];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A SYN, or a datagram.
    Probe,
    /// A segment of a connection that nobody began.
    Later,
    /// Ends what the probe for this port began.
    Reset,
}

const TCP: u8 = 6;
const ETHERNET: usize = 14;
const IPV4: usize = 20;
const IPV6: usize = 40;
const SYN: u8 = 2;
const RST: u8 = 4;
const ACK: u8 = 16;
/// What a host some hops away would have left of 64.
const TTL: u8 = 55;

/// Bytes of every frame of a sweep. A reset has the length of a probe, so that both fit
/// the same run: its options are padding.
pub fn length(order: &Order) -> usize {
    let network = if order.is_ipv4() { IPV4 } else { IPV6 };
    ETHERNET + network + if order.proto == TCP { 40 } else { 16 }
}

pub fn frame(shape: &Shape, port: u16, kind: Kind) -> Frame {
    let order = &shape.order;
    let head = order.head ^ u32::from(port);
    let mut segment = [0u8; 40];
    segment[..2].copy_from_slice(&order.source_port.to_be_bytes());
    segment[2..4].copy_from_slice(&port.to_be_bytes());
    let segment = if order.proto == TCP {
        // Header of ten words, window 64240.
        let (sequence, flags) = match kind {
            Kind::Probe => (head, SYN),
            Kind::Later => (head, ACK),
            Kind::Reset => (head.wrapping_add(1), RST),
        };
        segment[4..8].copy_from_slice(&sequence.to_be_bytes());
        segment[12..16].copy_from_slice(&[10 << 4, flags, 0xfa, 0xf0]);
        match kind {
            Kind::Probe | Kind::Later => {
                // MSS 1460, SACK permitted, timestamp, NOP, window scale 7: the order of Linux.
                segment[20..26].copy_from_slice(&[2, 4, 0x05, 0xb4, 4, 2]);
                segment[26..28].copy_from_slice(&[8, 10]);
                segment[28..32].copy_from_slice(&order.token.to_be_bytes());
                segment[36..40].copy_from_slice(&[1, 3, 3, 7]);
            }
            Kind::Reset => segment[20..40].fill(1),
        }
        &mut segment[..40]
    } else {
        segment[4..6].copy_from_slice(&16u16.to_be_bytes());
        segment[8..12].copy_from_slice(&head.to_be_bytes());
        segment[12..16].copy_from_slice(&order.token.to_be_bytes());
        &mut segment[..16]
    };
    let mut frame = Frame { bytes: [0; FRAME_MAX] };
    let bytes = &mut frame.bytes;
    bytes[..6].copy_from_slice(&shape.mac);
    if shape.mac != [0; 6] {
        bytes[6..12].copy_from_slice(&shape.from);
    }
    let mut source = [0; 16];
    for (bytes, word) in source.chunks_exact_mut(4).zip(order.source_of(port)) {
        bytes.copy_from_slice(&word.to_be_bytes());
    }
    let checksum_at = if order.proto == TCP { 16 } else { 6 };
    let at = match shape.to {
        IpAddr::V4(to) => {
            bytes[12..14].copy_from_slice(&[0x08, 0x00]);
            let ip = &mut bytes[ETHERNET..ETHERNET + IPV4];
            ip[0] = 0x45;
            ip[2..4].copy_from_slice(&((IPV4 + segment.len()) as u16).to_be_bytes());
            ip[4..6].copy_from_slice(&(port ^ order.token as u16).to_be_bytes());
            ip[6] = 0x40;
            ip[8] = TTL;
            ip[9] = order.proto;
            ip[12..16].copy_from_slice(&source[..4]);
            ip[16..20].copy_from_slice(&to.octets());
            let sum = checksum(&[ip]);
            ip[10..12].copy_from_slice(&sum.to_be_bytes());
            let pseudo = [0, order.proto, 0, segment.len() as u8];
            let sum = checksum(&[&source[..4], &to.octets(), &pseudo, segment]);
            segment[checksum_at..checksum_at + 2].copy_from_slice(&sum.to_be_bytes());
            ETHERNET + IPV4
        }
        IpAddr::V6(to) => {
            bytes[12..14].copy_from_slice(&[0x86, 0xdd]);
            let ip = &mut bytes[ETHERNET..ETHERNET + IPV6];
            ip[0] = 0x60;
            ip[5] = segment.len() as u8;
            ip[6] = order.proto;
            ip[7] = TTL;
            ip[8..24].copy_from_slice(&source);
            ip[24..40].copy_from_slice(&to.octets());
            let pseudo = [0, segment.len() as u8, 0, order.proto];
            let sum = checksum(&[&source, &to.octets(), &pseudo, segment]);
            segment[checksum_at..checksum_at + 2].copy_from_slice(&sum.to_be_bytes());
            ETHERNET + IPV6
        }
    };
    bytes[at..at + segment.len()].copy_from_slice(segment);
    frame
}

/// The Internet checksum (RFC 1071) over parts of even length; never 0, which UDP would
/// take for "none".
fn checksum(parts: &[&[u8]]) -> u16 {
    let words = parts.iter().flat_map(|part| part.chunks_exact(2));
    let mut sum: u32 = words.map(|word| u32::from(u16::from_be_bytes([word[0], word[1]]))).sum();
    while sum >> 16 != 0 {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    match !(sum as u16) {
        0 => 0xffff,
        sum => sum,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shape(to: &str, proto: u8) -> Shape {
        let to: IpAddr = to.parse().expect("an address");
        let source = [0x0c22_0102, 0x0506_0708, 9, 10];
        let order = Order {
            head: 0x1234_5678,
            token: 0x9abc_def0,
            source,
            source_port: 40000,
            spread_mask: 0xffff,
            family: u8::from(to.is_ipv6()),
            proto,
            ..Order::default()
        };
        Shape { order, to, mac: [2, 1, 2, 3, 4, 5], from: NOBODY }
    }

    /// A sum over a part that contains its own checksum folds to 0xffff.
    fn holds(parts: &[&[u8]]) -> bool {
        matches!(checksum(parts), 0xffff | 0)
    }

    #[test]
    fn checksums_hold_for_every_port_family_and_protocol() {
        for (to, ip) in [("198.51.100.7", 20), ("2001:db8::7", 40)] {
            for proto in [6, 17] {
                let shape = shape(to, proto);
                for port in (1..=u16::MAX).step_by(97) {
                    for kind in [Kind::Probe, Kind::Reset] {
                        let frame = frame(&shape, port, kind);
                        let packet = &frame.bytes[14..length(&shape.order)];
                        let (header, segment) = packet.split_at(ip);
                        let addresses = if ip == 20 { &header[12..20] } else { &header[8..40] };
                        assert!(ip == 40 || holds(&[header]), "IP header of {port} to {to}");
                        let pseudo = [0, proto, 0, segment.len() as u8];
                        assert!(holds(&[addresses, &pseudo, segment]), "{proto} {port} to {to}");
                    }
                }
            }
        }
    }

    #[test]
    fn a_probe_says_its_port_where_the_programs_look_and_comes_from_its_own_source() {
        let shape = shape("198.51.100.7", 6);
        let frame = frame(&shape, 443, Kind::Probe);
        let (head, token) = Order::words_at(6);
        let word = |at: usize| u32::from_be_bytes(frame.bytes[34 + at..38 + at].try_into().expect("four"));
        assert_eq!(word(head) ^ shape.order.head, 443);
        assert_eq!(word(token), shape.order.token);
        assert_eq!(frame.bytes[26..30], [12, 34, 1 ^ 1, 2 ^ 187]);
        assert_eq!(frame.bytes[36..38], 443u16.to_be_bytes());
    }

    #[test]
    fn the_longest_frame_fits() {
        assert_eq!(length(&shape("2001:db8::7", 6).order), 94);
        assert_eq!(length(&shape("198.51.100.7", 17).order), 50);
    }
}
