//! Telling probes and the answers to them from all other packets.

use aya_ebpf::programs::TcContext;
use sidecar_ebpf::sweep::{Order, ends};

/// Bytes of a packet, wherever they come from.
pub trait Bytes {
    fn load<T: Copy>(&self, at: usize) -> Option<T>;
}

impl Bytes for TcContext {
    #[inline(always)]
    fn load<T: Copy>(&self, at: usize) -> Option<T> {
        self.skb.load::<T>(at).ok()
    }
}

/// An answer: the port that was probed, and what is said of it.
pub struct Answer {
    pub port: u16,
    pub end: u8,
    pub icmp_type: u8,
    pub icmp_code: u8,
}

const TCP: u8 = 6;
const UDP: u8 = 17;
const ICMP: u8 = 1;
const ICMP6: u8 = 58;
const UNREACHABLE: u8 = 3;
const UNREACHABLE6: u8 = 1;

/// (protocol, offset of the transport header) of the IP packet at `ip`, if it has the
/// sweep's family.
#[inline(always)]
pub fn transport<B: Bytes>(bytes: &B, order: &Order, ip: usize) -> Option<(u8, usize)> {
    let first = bytes.load::<u8>(ip)?;
    if order.is_ipv4() {
        if first >> 4 != 4 {
            return None;
        }
        Some((bytes.load::<u8>(ip + 9)?, ip + ((first & 15) as usize) * 4))
    } else {
        if first >> 4 != 6 {
            return None;
        }
        // Probes and the answers to them have no extension headers.
        Some((bytes.load::<u8>(ip + 6)?, ip + 40))
    }
}

/// The port that this packet probes.
#[inline(always)]
pub fn probed<B: Bytes>(bytes: &B, order: &Order, ip: usize) -> Option<(u16, usize)> {
    let (proto, at) = transport(bytes, order, ip)?;
    if proto != order.proto {
        return None;
    }
    let (head_at, token_at) = Order::words_at(proto);
    let token = u32::from_be(bytes.load::<u32>(at + token_at)?);
    let head = u32::from_be(bytes.load::<u32>(at + head_at)?) ^ order.head;
    if token != order.token || head >> 16 != 0 {
        return None;
    }
    Some((head as u16, at))
}

/// What this outgoing packet answers to a probe. Nothing but an answer to this very sweep
/// will do: it goes to a probe's own source and quotes what only the probe said.
#[inline(always)]
pub fn answer<B: Bytes>(bytes: &B, order: &Order, ip: usize) -> Option<Answer> {
    let (proto, at) = transport(bytes, order, ip)?;
    let answer = if proto == ICMP || proto == ICMP6 {
        let icmp_type = bytes.load::<u8>(at)?;
        let icmp_code = bytes.load::<u8>(at + 1)?;
        if icmp_type != if order.is_ipv4() { UNREACHABLE } else { UNREACHABLE6 } {
            return None;
        }
        let (port, _) = probed(bytes, order, at + 8)?;
        Answer { port, end: ends::UNREACHABLE, icmp_type, icmp_code }
    } else {
        if proto != order.proto || u16::from_be(bytes.load::<u16>(at + 2)?) != order.source_port {
            return None;
        }
        let (port, end) = if proto == TCP {
            let flags = bytes.load::<u8>(at + 13)?;
            let head = u32::from_be(bytes.load::<u32>(at + 8)?).wrapping_sub(1) ^ order.head;
            if head >> 16 != 0 {
                return None;
            }
            let end = match flags & 0x17 {
                0x14 => ends::RESET,
                0x12 => ends::ANSWERED,
                _ => return None,
            };
            (head as u16, end)
        } else if proto == UDP && order.reply != 0 {
            (u16::from_be(bytes.load::<u16>(at)?), ends::ANSWERED)
        } else {
            return None;
        };
        Answer { port, end, icmp_type: 0, icmp_code: 0 }
    };
    let source = order.source_of(answer.port);
    let to = if order.is_ipv4() {
        u32::from_be(bytes.load::<u32>(ip + 16)?) == source[0]
    } else {
        let to = bytes.load::<[u32; 4]>(ip + 24)?;
        u32::from_be(to[0]) == source[0]
            && u32::from_be(to[1]) == source[1]
            && u32::from_be(to[2]) == source[2]
            && u32::from_be(to[3]) == source[3]
    };
    if to { Some(answer) } else { None }
}
