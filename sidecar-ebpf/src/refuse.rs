//! tc ingress of public interfaces, behind the counters: whether a new TCP connection may
//! come in. The same questions in the same order as `GuardRules::judge` in user space.

use aya_ebpf::EbpfContext as _;
use aya_ebpf::bindings::{
    BPF_FIB_LKUP_RET_FRAG_NEEDED, BPF_FIB_LKUP_RET_NO_NEIGH, BPF_FIB_LKUP_RET_SUCCESS, TC_ACT_SHOT,
    TC_ACT_UNSPEC, bpf_fib_lookup, bpf_sock_tuple,
};
use aya_ebpf::helpers::generated::{
    bpf_fib_lookup, bpf_ktime_get_boot_ns, bpf_sk_release, bpf_skc_lookup_tcp,
};
use aya_ebpf::macros::classifier;
use aya_ebpf::maps::lpm_trie::Key;
use aya_ebpf::programs::TcContext;
use sidecar_ebpf::gate::{
    BANKS, PREFIX_HEAD_BITS, PrefixKey, TIMED_HEAD_BITS, TimedKey, kinds, open, reasons, refused_index,
    sides, state, word_index,
};
use sidecar_ebpf::{IN, IPV4, IPV6, TCP, notes};

use crate::guard_maps::{
    GUARD_PORTS, GUARD_PREFIXES, GUARD_REFUSED, GUARD_RULES, GUARD_SIDES, GUARD_STATE, GUARD_TIMED,
};
use crate::packet::{self, Packet};

#[classifier]
pub fn guard_eth(ctx: TcContext) -> i32 {
    guard::<true>(&ctx)
}

#[classifier]
pub fn guard_ip(ctx: TcContext) -> i32 {
    guard::<false>(&ctx)
}

/// The first packet of a connection, or what can't be told from one.
struct Syn {
    source: [u8; 16],
    destination: [u8; 16],
    family: u32,
    /// The device that it came by, and the one that it would leave by (0: none).
    from: u32,
    onward: u32,
    port: u16,
    unreadable: bool,
}

/// TC_ACT_UNSPEC, which tcx reads as "next", or TC_ACT_SHOT. Never TC_ACT_OK: it would
/// end the run of everybody else's programs.
#[inline(always)]
fn guard<const ETHERNET: bool>(ctx: &TcContext) -> i32 {
    let packet = packet::read::<ETHERNET, IN>(ctx);
    let is_tagged = ETHERNET && packet.skip && is_vlan(ctx);
    let unreadable = is_tagged
        || packet.note == notes::EXTENSIONS as u8 + 1
        // The flags are in a later fragment, or so are the headers before them.
        || (packet.note == notes::SHORT as u8 + 1
            && !packet.skip
            && (packet.proto == TCP || packet.family == IPV6));
    if !packet.syn && !unreadable {
        return TC_ACT_UNSPEC;
    }
    let Some(&in_force) = GUARD_STATE.get(state::IN_FORCE) else { return TC_ACT_UNSPEC };
    if in_force == 0 || !is_for_this_device::<ETHERNET>(ctx) {
        return TC_ACT_UNSPEC;
    }
    let Some(syn) = read(ctx, &packet, unreadable) else { return TC_ACT_UNSPEC };
    let mut reason = reasons::PASSES;
    let mut audit = false;
    let mut bank = 0;
    while bank < BANKS {
        if in_force >> bank & 1 != 0 {
            let verdict = packet::forgotten(ctx, judge(bank as u32, &syn) as u64) as u32;
            if verdict == reasons::PASSES {
                return TC_ACT_UNSPEC;
            }
            reason = verdict;
            audit |= GUARD_RULES.get(bank as u32).is_none_or(|rules| rules.audit != 0);
        }
        bank += 1;
    }
    if reason == reasons::PASSES || is_answer(ctx, &packet, &syn) {
        return TC_ACT_UNSPEC;
    }
    // What we send ourselves is refused as a stranger's, and is no attack.
    if !packet::is_probe(ctx)
        && !packet::is_canary(ctx)
        && let Some(count) = GUARD_REFUSED.get_ptr_mut(refused_index(reason, packet.family & 1, audit))
    {
        // SAFETY: a value of this map that belongs to this CPU; the receive path doesn't
        // move to another one meanwhile.
        unsafe { *count += 1 };
    }
    if audit { TC_ACT_UNSPEC } else { TC_ACT_SHOT }
}

/// Not a frame for somebody else (macvlan, promiscuous mode), and of no VLAN: that one's
/// interface has a guard of its own.
#[inline(always)]
fn is_for_this_device<const ETHERNET: bool>(ctx: &TcContext) -> bool {
    const OTHERHOST: u32 = 3;
    // SAFETY: readable fields of the context.
    let (kind, tagged, tag) =
        unsafe { ((*ctx.skb.skb).pkt_type, (*ctx.skb.skb).vlan_present, (*ctx.skb.skb).vlan_tci) };
    if kind == OTHERHOST || (tagged != 0 && tag & 0xfff != 0) {
        return false;
    }
    // A tag within a tag of VLAN 0, which is none.
    !(ETHERNET && is_vlan(ctx) && ctx.load::<u16>(14).is_ok_and(|tag| u16::from_be(tag) & 0xfff != 0))
}

#[inline(always)]
fn is_vlan(ctx: &TcContext) -> bool {
    ctx.load::<u16>(12).is_ok_and(|kind| matches!(u16::from_be(kind), 0x8100 | 0x88a8))
}

#[inline(always)]
fn read(ctx: &TcContext, packet: &Packet, unreadable: bool) -> Option<Syn> {
    let mut syn = Syn {
        source: [0; 16],
        destination: [0; 16],
        family: packet.family as u32,
        // SAFETY: a readable field of the context; on the way in it is the arriving device.
        from: unsafe { (*ctx.skb.skb).ifindex },
        onward: 0,
        port: packet.port,
        unreadable,
    };
    if packet.skip {
        return Some(syn);
    }
    let at = packet.source_at as usize;
    if packet.family == IPV4 {
        let [source, destination] = ctx.load::<[[u8; 4]; 2]>(at).ok()?;
        syn.source[..4].copy_from_slice(&source);
        syn.destination[..4].copy_from_slice(&destination);
    } else {
        [syn.source, syn.destination] = ctx.load::<[[u8; 16]; 2]>(at).ok()?;
    }
    syn.onward = onward(ctx, packet);
    Some(syn)
}

/// The device that the routing table sends it on by; 0: it is for this host, or nothing
/// is ever forwarded from here. Before any NAT, as everything here.
#[inline(always)]
fn onward(ctx: &TcContext, packet: &Packet) -> u32 {
    const AF_INET: u8 = 2;
    const AF_INET6: u8 = 10;
    const HOST: u32 = 0;
    // SAFETY: a readable field of the context.
    if unsafe { (*ctx.skb.skb).pkt_type } != HOST {
        return 0;
    }
    // SAFETY: a structure of integers.
    let mut route: bpf_fib_lookup = unsafe { core::mem::zeroed() };
    route.l4_protocol = 6;
    // SAFETY: as above.
    route.ifindex = unsafe { (*ctx.skb.skb).ifindex };
    let at = packet.source_at as usize;
    if packet.family == IPV4 {
        route.family = AF_INET;
        let Ok([source, destination]) = ctx.load::<[u32; 2]>(at) else { return 0 };
        route.__bindgen_anon_3.ipv4_src = source;
        route.__bindgen_anon_4.ipv4_dst = destination;
    } else {
        route.family = AF_INET6;
        let Ok([source, destination]) = ctx.load::<[[u32; 4]; 2]>(at) else { return 0 };
        route.__bindgen_anon_3.ipv6_src = source;
        route.__bindgen_anon_4.ipv6_dst = destination;
    }
    // SAFETY: the context is ours for the length of the program, and the size is that of
    // the structure.
    let answer =
        unsafe { bpf_fib_lookup(ctx.as_ptr(), &raw mut route, size_of::<bpf_fib_lookup>() as i32, 0) };
    match answer as u32 {
        BPF_FIB_LKUP_RET_SUCCESS | BPF_FIB_LKUP_RET_NO_NEIGH | BPF_FIB_LKUP_RET_FRAG_NEEDED => route.ifindex,
        _ => 0,
    }
}

/// One of [`reasons`], by the rules of one bank.
#[inline(never)]
fn judge(bank: u32, syn: &Syn) -> u32 {
    let side = |index: u32| {
        // SAFETY: a value of this map; it is replaced whole.
        let sides = unsafe { GUARD_SIDES.get(index) };
        sides.map_or(sides::PUBLIC, |sides| sides.by_bank[bank as usize & 3])
    };
    if side(syn.from) != sides::PUBLIC {
        return reasons::PASSES;
    }
    if is_listed(bank, kinds::MESH, 0, syn.family, &syn.destination) {
        return reasons::WEAK_HOST;
    }
    if is_listed(bank, kinds::MESH, 0, syn.family, &syn.source) {
        return reasons::SPOOFED_MESH;
    }
    let beyond = if syn.onward == 0 { sides::PUBLIC } else { side(syn.onward) };
    if syn.onward != 0 {
        if beyond == sides::PUBLIC || beyond == sides::OTHER {
            return reasons::PASSES;
        }
        if beyond == sides::MESH {
            return reasons::FORWARD;
        }
    }
    if syn.unreadable {
        return reasons::UNREADABLE;
    }
    if is_open(bank, syn) {
        return reasons::PASSES;
    }
    if syn.onward != 0 {
        return reasons::FORWARD;
    }
    match GUARD_RULES.get(bank) {
        Some(rules) if rules.ssh == syn.port => reasons::SSH,
        _ => reasons::PUBLIC_TCP,
    }
}

#[inline(always)]
fn is_open(bank: u32, syn: &Syn) -> bool {
    if let Some(word) = GUARD_PORTS.get(word_index(bank as usize, syn.port))
        && word >> (syn.port & 63) & 1 != 0
    {
        return true;
    }
    let how = prefix(bank, kinds::FROM, syn.port, syn.family, &syn.source);
    if how & open::EVERYWHERE != 0
        || (how & open::AT_ADDRESSES != 0
            && is_listed(bank, kinds::TO, syn.port, syn.family, &syn.destination))
    {
        return true;
    }
    if GUARD_STATE.get(state::TIMED).is_none_or(|count| *count == 0) {
        return false;
    }
    let key = TimedKey { port: syn.port, family: syn.family as u16, address: syn.source };
    let until = GUARD_TIMED.get(Key::new(TIMED_HEAD_BITS + address_bits(syn.family), key));
    // SAFETY: the helper has no preconditions.
    until.is_some_and(|until| unsafe { bpf_ktime_get_boot_ns() } < *until)
}

#[inline(always)]
fn is_listed(bank: u32, kind: u8, port: u16, family: u32, address: &[u8; 16]) -> bool {
    prefix(bank, kind, port, family, address) != 0
}

/// The value of the longest prefix that has this address; 0: none has.
#[inline(always)]
fn prefix(bank: u32, kind: u8, port: u16, family: u32, address: &[u8; 16]) -> u8 {
    let key = PrefixKey { bank: bank as u8, kind, port, family, address: *address };
    GUARD_PREFIXES.get(Key::new(PREFIX_HEAD_BITS + address_bits(family), key)).map_or(0, |value| *value)
}

#[inline(always)]
fn address_bits(family: u32) -> u32 {
    if family == IPV4 as u32 { 32 } else { 128 }
}

/// A SYN that answers one of this host's own (a simultaneous open, RFC 9293 3.5): nftables
/// takes it for a reply, and so do we. Asked of what would be refused only.
#[inline(always)]
fn is_answer(ctx: &TcContext, packet: &Packet, syn: &Syn) -> bool {
    const THIS_NETNS: u64 = u64::MAX;
    const SYN_SENT: u32 = 2;
    if !packet.syn || syn.onward != 0 {
        return false;
    }
    let at = packet.source_at as usize;
    let transport = if packet.family == IPV4 {
        let Ok(first) = ctx.load::<u8>(at - 12) else { return false };
        at - 12 + (first & 15) as usize * 4
    } else {
        // Behind extension headers nothing is begun by two at once.
        if !ctx.load::<u8>(at - 2).is_ok_and(|next| next == 6) {
            return false;
        }
        at + 32
    };
    let Ok([source_port, port]) = ctx.load::<[u16; 2]>(transport) else { return false };
    // SAFETY: a structure of integers.
    let mut tuple: bpf_sock_tuple = unsafe { core::mem::zeroed() };
    let length = if packet.family == IPV4 {
        let Ok([source, destination]) = ctx.load::<[u32; 2]>(at) else { return false };
        // SAFETY: integers in a union of integers, here and below.
        let ipv4 = unsafe { &mut tuple.__bindgen_anon_1.ipv4 };
        ipv4.saddr = source;
        ipv4.daddr = destination;
        ipv4.sport = source_port;
        ipv4.dport = port;
        size_of_val(ipv4)
    } else {
        let Ok([source, destination]) = ctx.load::<[[u32; 4]; 2]>(at) else { return false };
        // SAFETY: as above.
        let ipv6 = unsafe { &mut tuple.__bindgen_anon_1.ipv6 };
        ipv6.saddr = source;
        ipv6.daddr = destination;
        ipv6.sport = source_port;
        ipv6.dport = port;
        size_of_val(ipv6)
    };
    // SAFETY: the tuple is as long as it says. A socket that is found is given back below,
    // and read before that.
    unsafe {
        let socket = bpf_skc_lookup_tcp(ctx.as_ptr(), &raw mut tuple, length as u32, THIS_NETNS, 0);
        if socket.is_null() {
            return false;
        }
        let state = (*socket).state;
        bpf_sk_release(socket.cast());
        state == SYN_SENT
    }
}
