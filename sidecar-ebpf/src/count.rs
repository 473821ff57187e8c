//! What the twelve counters share: read the packet, find its row, add. On the way in also
//! judge new TCP connections as the policy would, so that attempts show by verdict.

use aya_ebpf::EbpfContext as _;
use aya_ebpf::bindings::{
    BPF_FIB_LKUP_RET_FRAG_NEEDED, BPF_FIB_LKUP_RET_NO_NEIGH, BPF_FIB_LKUP_RET_SUCCESS, TC_ACT_UNSPEC,
    bpf_fib_lookup,
};
use aya_ebpf::helpers::generated::bpf_fib_lookup;
use aya_ebpf::maps::lpm_trie::Key;
use aya_ebpf::programs::TcContext;
use aya_log_ebpf::info;
use sidecar_ebpf::{
    ANYONE, CANARY_CLASS, IN, IPV4, LISTED, NO_CLASS, SOURCE_KEY_HEAD_BITS, SourceKey, TCP, UDP,
    attempt_index, cell_index, port_index, row_index,
};

use crate::packet::{self, Packet};
use crate::state::{CLASSES, NOTES, PORTS, ROWS, SOURCES};

/// Always TC_ACT_UNSPEC, which tcx reads as "next": other programs on this device still
/// run, and the packet's fate is none of our business.
#[inline(always)]
pub fn count<const ETHERNET: bool, const SCOPE: usize, const DIRECTION: usize>(ctx: &TcContext) -> i32 {
    // Of an audit of our own; those that are sent to see whether this program counts are asked for again below: a
    // kernel's verifier follows whatever is remembered across the reading of the packet.
    if DIRECTION == IN && packet::is_probe(ctx) && !packet::is_canary(ctx) {
        return TC_ACT_UNSPEC;
    }
    let packet = packet::read::<ETHERNET, DIRECTION>(ctx);
    if packet.note != 0 {
        note(ctx, packet.note);
    }
    if packet.skip {
        return TC_ACT_UNSPEC;
    }
    let mut class = NO_CLASS;
    if (packet.proto == TCP || packet.proto == UDP)
        && let Some(classes) = PORTS.get(packet.port as u32)
    {
        class = classes.class[port_index(SCOPE, packet.proto & 1)];
    }
    if DIRECTION == IN && packet::is_canary(ctx) {
        class = CANARY_CLASS;
    }
    let Some(row) = ROWS.get_ptr_mut(row_index(class, packet.proto & 3)) else { return TC_ACT_UNSPEC };
    // SAFETY: the verifier knows the row as a value of this map. It belongs to this CPU,
    // and neither softirq nor the transmit path moves to another one meanwhile.
    let row = unsafe { &mut *row };
    // One skb may carry many segments (GRO, GSO): count what was or will be on the wire.
    // SAFETY: a readable field of the context, since Linux 5.1.
    let segments = unsafe { (*ctx.skb.skb).gso_segs };
    let family = packet.family & 1;
    let cell = &mut row.traffic[cell_index(SCOPE, DIRECTION, family)];
    cell.packets += if segments == 0 { 1 } else { segments as u64 };
    cell.bytes += ctx.len() as u64;
    if DIRECTION == IN && packet.syn && !is_forwarded(ctx, &packet) {
        let allowed = allowed::<SCOPE>(ctx, class, &packet);
        row.attempts[attempt_index(family, allowed)] += 1;
    }
    TC_ACT_UNSPEC
}

/// Whether the routing table sends it on to another host: then it is no attempt on this
/// one (a hub sees its spokes talk to each other). A published container port is asked for
/// at an address of this host, so it counts. Only asked for the first packet of a
/// connection; on a host that doesn't route, the kernel answers at once.
#[inline(always)]
fn is_forwarded(ctx: &TcContext, packet: &Packet) -> bool {
    const AF_INET: u8 = 2;
    const AF_INET6: u8 = 10;
    // SAFETY: a structure of integers.
    let mut route: bpf_fib_lookup = unsafe { core::mem::zeroed() };
    route.l4_protocol = 6;
    // SAFETY: a readable field of the context; on the way in it is the arriving device.
    route.ifindex = unsafe { (*ctx.skb.skb).ifindex };
    // Source and destination lie side by side in both families.
    let at = packet.source_at as usize;
    if packet.family == IPV4 {
        route.family = AF_INET;
        let Ok([source, destination]) = ctx.load::<[u32; 2]>(at) else { return false };
        route.__bindgen_anon_3.ipv4_src = source;
        route.__bindgen_anon_4.ipv4_dst = destination;
    } else {
        route.family = AF_INET6;
        let Ok([source, destination]) = ctx.load::<[[u32; 4]; 2]>(at) else { return false };
        route.__bindgen_anon_3.ipv6_src = source;
        route.__bindgen_anon_4.ipv6_dst = destination;
    }
    // SAFETY: the context is ours for the length of the program, and the size is that of
    // the structure.
    let answer =
        unsafe { bpf_fib_lookup(ctx.as_ptr(), &raw mut route, size_of::<bpf_fib_lookup>() as i32, 0) };
    matches!(
        answer as u32,
        BPF_FIB_LKUP_RET_SUCCESS | BPF_FIB_LKUP_RET_NO_NEIGH | BPF_FIB_LKUP_RET_FRAG_NEEDED
    )
}

/// As the policy judges the source of a new connection to this class.
#[inline(always)]
fn allowed<const SCOPE: usize>(ctx: &TcContext, class: u8, packet: &Packet) -> bool {
    if class == NO_CLASS {
        return false;
    }
    let Some(entry) = CLASSES.get(class as u32) else { return false };
    match entry.judgement[SCOPE] {
        ANYONE => true,
        LISTED => {
            let mut key = SourceKey { class: class as u16, family: packet.family as u16, address: [0; 16] };
            let at = packet.source_at as usize;
            let bits = if packet.family == IPV4 {
                let Ok(address) = ctx.load::<[u8; 4]>(at) else { return false };
                key.address[..4].copy_from_slice(&address);
                32
            } else {
                let Ok(address) = ctx.load::<[u8; 16]>(at) else { return false };
                key.address = address;
                128
            };
            SOURCES.get(Key::new(SOURCE_KEY_HEAD_BITS + bits, key)).is_some()
        }
        _ => false,
    }
}

/// Counts a packet that could not be read; only the first of each kind is worth a line.
#[inline(always)]
fn note(ctx: &TcContext, note: u8) {
    let kind = note as u32 - 1;
    let Some(seen) = NOTES.get_ptr_mut(kind) else { return };
    // SAFETY: a value of this map. Two CPUs may meet here: then a count is lost or the
    // line comes twice, and nothing else.
    let first = unsafe {
        *seen += 1;
        *seen == 1
    };
    if first {
        // The kinds are sidecar_ebpf::notes.
        info!(ctx, "first packet that could not be read whole: kind {}, {} bytes", kind, ctx.len());
    }
}
