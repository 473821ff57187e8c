//! A packet's headers, no further than counting needs. Ordinary packets are read in place;
//! whatever is unusual about one (VLAN tags, IPv6 extension headers, headers spread over
//! fragments of the skb) is left to a slower reader, which keeps the fast one short for
//! the CPU and for the verifier.

use aya_ebpf::programs::TcContext;
use aya_ebpf::programs::sk_buff::SkBuff;
use sidecar_ebpf::sweep::{COUNTED, MARK, PRIORITY, TC_INDEX, TC_INDEX_PLAIN};
use sidecar_ebpf::{ICMP, IN, IPV4, IPV6, OTHER, TCP, UDP, notes};

const ETHERNET_BYTES: usize = 14;
const ETHERTYPE_AT: usize = 12;
const IPV4_BYTES: usize = 20;
const IPV6_BYTES: usize = 40;
/// Of a TCP header, up to its flags; of UDP, its ports.
const TCP_BYTES: usize = 14;
const UDP_BYTES: usize = 4;
/// VLAN tags that are followed: 802.1Q, 802.1ad, one in the other.
const TAGS_MAX: usize = 2;
/// IPv6 extension headers that are followed. Ordinary traffic has none or one.
const EXTENSIONS_MAX: usize = 3;

const TYPE_IPV4: u16 = 0x0800;
const TYPE_IPV6: u16 = 0x86dd;
const TYPE_VLAN: u16 = 0x8100;
const TYPE_QINQ: u16 = 0x88a8;

#[derive(Clone, Copy)]
pub struct Packet {
    /// [`IPV4`] or [`IPV6`].
    pub family: usize,
    /// Below [`sidecar_ebpf::PROTOS`].
    pub proto: usize,
    /// The port on this host's side. 0: none (later fragments, other protocols).
    pub port: u16,
    /// The first packet of a TCP connection: SYN without ACK.
    pub syn: bool,
    /// Where the source address begins.
    pub source_at: u16,
    /// What to tell about this packet: a number of [`notes`] and one.
    pub note: u8,
    /// ARP and the like, or unreadable: not counted.
    pub skip: bool,
}

impl Packet {
    const SKIPPED: Self =
        Self { family: IPV4, proto: OTHER, port: 0, syn: false, source_at: 0, note: 0, skip: true };

    const fn unread(kind: u32) -> Self {
        Self { note: kind as u8 + 1, ..Self::SKIPPED }
    }

    /// Functions of eBPF return one register.
    const fn to_bits(self) -> u64 {
        self.port as u64
            | (self.source_at as u64) << 16
            | (self.note as u64) << 32
            | (self.proto as u64) << 40
            | (self.family as u64) << 42
            | (self.syn as u64) << 43
            | (self.skip as u64) << 44
    }

    const fn from_bits(bits: u64) -> Self {
        Self {
            port: bits as u16,
            source_at: (bits >> 16) as u16,
            note: (bits >> 32) as u8,
            proto: (bits >> 40) as usize & 3,
            family: (bits >> 42) as usize & 1,
            syn: bits >> 43 & 1 != 0,
            skip: bits >> 44 & 1 != 0,
        }
    }
}

#[inline(always)]
pub fn read<const ETHERNET: bool, const DIRECTION: usize>(ctx: &TcContext) -> Packet {
    match fast::<ETHERNET, DIRECTION>(ctx.data(), ctx.data_end()) {
        Some(packet) => packet,
        None => Packet::from_bits(forgotten(ctx, slow::<ETHERNET, DIRECTION>(&ctx.skb))),
    }
}

/// The same number, of which the kernel's verifier knows nothing any more: otherwise it goes through the rest of the
/// program once for each of the many ways to such a number.
#[inline(always)]
pub fn forgotten(ctx: &TcContext, bits: u64) -> u64 {
    // SAFETY: a readable field of the context, which nobody else changes meanwhile.
    let mark = || unsafe { (&raw const (*ctx.skb.skb).mark).read_volatile() } as u64 * 0x1_0000_0001;
    bits ^ mark() ^ mark()
}

/// The common packet, all in one piece. `None`: not that.
#[inline(always)]
fn fast<const ETHERNET: bool, const DIRECTION: usize>(data: usize, end: usize) -> Option<Packet> {
    let ip = if ETHERNET { data + ETHERNET_BYTES } else { data };
    if ip + IPV4_BYTES > end {
        return None;
    }
    // SAFETY (here and below): each read lies before an address that was compared with
    // the packet's end; the verifier holds us to it. Packets are not aligned.
    let first = unsafe { byte(ip) };
    if ETHERNET {
        let kind = unsafe { be16(data + ETHERTYPE_AT) };
        match first >> 4 {
            4 if kind == TYPE_IPV4 => {}
            6 if kind == TYPE_IPV6 => {}
            _ => return None,
        }
    }
    let source_at = ip - data;
    let (family, number, source_at, at) = if first >> 4 == 4 {
        let length = (first & 0x0f) as usize * 4;
        if length < IPV4_BYTES || unsafe { be16(ip + 6) } & 0x1fff != 0 {
            return None;
        }
        (IPV4, unsafe { byte(ip + 9) }, source_at + 12, ip + length)
    } else if first >> 4 == 6 {
        if ip + IPV6_BYTES > end {
            return None;
        }
        (IPV6, unsafe { byte(ip + 6) }, source_at + 8, ip + IPV6_BYTES)
    } else {
        return None;
    };
    let mut packet = Packet {
        family,
        proto: proto(family, number),
        source_at: source_at as u16,
        ..Packet { skip: false, ..Packet::SKIPPED }
    };
    if number == 6 {
        if at + TCP_BYTES > end {
            return None;
        }
        packet.port = unsafe { be16(at + port_at::<DIRECTION>()) };
        packet.syn = is_syn(unsafe { byte(at + 13) });
    } else if number == 17 {
        if at + UDP_BYTES > end {
            return None;
        }
        packet.port = unsafe { be16(at + port_at::<DIRECTION>()) };
    } else if family == IPV6 && is_extension(number) {
        return None;
    }
    Some(packet)
}

/// Any packet, by copies: the kernel's helper gathers what is in fragments of the skb.
#[inline(never)]
fn slow<const ETHERNET: bool, const DIRECTION: usize>(skb: &SkBuff) -> u64 {
    read_slowly::<ETHERNET, DIRECTION>(skb).to_bits()
}

#[inline(always)]
fn read_slowly<const ETHERNET: bool, const DIRECTION: usize>(skb: &SkBuff) -> Packet {
    let short = Packet::unread(notes::SHORT);
    let mut ip = 0;
    if ETHERNET {
        let Ok(mut kind) = skb.load::<u16>(ETHERTYPE_AT).map(u16::from_be) else { return short };
        ip = ETHERNET_BYTES;
        let mut tags = 0;
        while tags < TAGS_MAX && (kind == TYPE_VLAN || kind == TYPE_QINQ) {
            let Ok(inner) = skb.load::<u16>(ip + 2).map(u16::from_be) else { return short };
            kind = inner;
            ip += 4;
            tags += 1;
        }
        if kind != TYPE_IPV4 && kind != TYPE_IPV6 {
            return Packet::SKIPPED;
        }
    }
    let Ok(first) = skb.load::<u8>(ip) else { return short };
    match first >> 4 {
        4 => {
            let Ok(head) = skb.load::<[u8; IPV4_BYTES]>(ip) else { return short };
            let mut packet = Packet {
                family: IPV4,
                proto: proto(IPV4, head[9]),
                source_at: ip as u16 + 12,
                ..Packet { skip: false, ..Packet::SKIPPED }
            };
            let fragment = u16::from_be_bytes([head[6], head[7]]) & 0x1fff;
            let length = (first & 0x0f) as usize * 4;
            // A later fragment has no ports.
            if fragment == 0 {
                if length < IPV4_BYTES {
                    packet.note = notes::SHORT as u8 + 1;
                } else {
                    ports::<DIRECTION>(skb, ip + length, &mut packet);
                }
            }
            packet
        }
        6 => ipv6_slowly::<DIRECTION>(skb, ip),
        _ => Packet::unread(notes::VERSION),
    }
}

#[inline(always)]
fn ipv6_slowly<const DIRECTION: usize>(skb: &SkBuff, ip: usize) -> Packet {
    // The last byte too: a header that is cut off is not counted as one.
    let (Ok(mut next), Ok(_)) = (skb.load::<u8>(ip + 6), skb.load::<u8>(ip + IPV6_BYTES - 1)) else {
        return Packet::unread(notes::SHORT);
    };
    let mut packet =
        Packet { family: IPV6, source_at: ip as u16 + 8, ..Packet { skip: false, ..Packet::SKIPPED } };
    let mut at = ip + IPV6_BYTES;
    let mut later_fragment = false;
    let mut followed = 0;
    while followed < EXTENSIONS_MAX && is_extension(next) && !later_fragment {
        let Ok(head) = skb.load::<[u8; 4]>(at) else {
            packet.note = notes::SHORT as u8 + 1;
            return packet;
        };
        if next == FRAGMENT {
            later_fragment = u16::from_be_bytes([head[2], head[3]]) & 0xfff8 != 0;
            at += 8;
        } else {
            at += (head[1] as usize + 1) * 8;
        }
        next = head[0];
        followed += 1;
    }
    packet.proto = proto(IPV6, next);
    if is_extension(next) && !later_fragment {
        packet.note = notes::EXTENSIONS as u8 + 1;
    } else if !later_fragment {
        ports::<DIRECTION>(skb, at, &mut packet);
    }
    packet
}

#[inline(always)]
fn ports<const DIRECTION: usize>(skb: &SkBuff, at: usize, packet: &mut Packet) {
    if packet.proto != TCP && packet.proto != UDP {
        return;
    }
    let flags = if packet.proto == TCP { skb.load::<u8>(at + 13) } else { Ok(0) };
    match (skb.load::<u16>(at + port_at::<DIRECTION>()), flags) {
        (Ok(port), Ok(flags)) => {
            packet.port = u16::from_be(port);
            packet.syn = is_syn(flags);
        }
        _ => packet.note = notes::SHORT as u8 + 1,
    }
}

const FRAGMENT: u8 = 44;

/// Hop-by-hop, routing, fragment, destination options (RFC 8200).
#[inline(always)]
const fn is_extension(number: u8) -> bool {
    matches!(number, 0 | 43 | FRAGMENT | 60)
}

#[inline(always)]
const fn proto(family: usize, number: u8) -> usize {
    match number {
        6 => TCP,
        17 => UDP,
        1 if family == IPV4 => ICMP,
        58 if family == IPV6 => ICMP,
        _ => OTHER,
    }
}

#[inline(always)]
const fn is_syn(flags: u8) -> bool {
    flags & 0x12 == 0x02
}

/// The local port is the destination on the way in and the source on the way out.
#[inline(always)]
const fn port_at<const DIRECTION: usize>() -> usize {
    if DIRECTION == IN { 2 } else { 0 }
}

/// # Safety
/// Both bytes must lie before the packet's end.
#[inline(always)]
unsafe fn be16(at: usize) -> u16 {
    // SAFETY: by the caller.
    u16::from_be(unsafe { (at as *const u16).read_unaligned() })
}

/// # Safety
/// The byte must lie before the packet's end.
#[inline(always)]
unsafe fn byte(at: usize) -> u8 {
    // SAFETY: by the caller.
    unsafe { *(at as *const u8) }
}

/// Whether an audit of our own sent it. Then the rules behind this program are told, too: on
/// kernels without tcx there is no other program to do it.
#[inline(always)]
pub fn is_probe(ctx: &TcContext) -> bool {
    // SAFETY: fields of the context, the first readable, the second writable.
    unsafe {
        match (*ctx.skb.skb).tc_index {
            TC_INDEX => (*ctx.skb.skb).priority = PRIORITY,
            TC_INDEX_PLAIN => {}
            _ => return false,
        }
    }
    true
}

/// Whether it was sent to see that this program works: counted apart, by the counters alone. The only sign of a test
/// run, whose context has no `tc_index`.
#[inline(always)]
pub fn is_canary(ctx: &TcContext) -> bool {
    let block = |at: usize| {
        // SAFETY: readable fields of the context. Read anew each time: what the compiler remembered of them would be
        // another state of all that follows, for the kernel's verifier to go through.
        unsafe { (&raw const (*ctx.skb.skb).cb[at]).read_volatile() }
    };
    block(0) == MARK[0] && block(1) == MARK[1] && block(2) == COUNTED
}
