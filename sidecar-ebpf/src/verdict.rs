//! netfilter hooks behind every chain of every table: a probe that comes this far got
//! through. It is noted and dropped, before a socket, a container or conntrack's table
//! gets to know of it. Answers end the same way, before the neighbour is asked for.

use core::ffi::c_void;

use aya_ebpf::helpers::generated::bpf_probe_read_kernel;
use sidecar_ebpf::sweep::{Order, ends};

use crate::probe_maps::{ORDERS, TRACES};
use crate::recognise::{Answer, Bytes, answer, probed};

const NF_DROP: i32 = 0;
pub const NF_ACCEPT: i32 = 1;

// The section's name says nothing to the kernel: our own loader gives the type, for which
// aya has no macro.
#[unsafe(no_mangle)]
#[unsafe(link_section = "classifier")]
pub extern "C" fn verdict_local(ctx: *mut c_void) -> i32 {
    through::<{ ends::LOCAL }>(ctx)
}

#[unsafe(no_mangle)]
#[unsafe(link_section = "classifier")]
pub extern "C" fn verdict_forward(ctx: *mut c_void) -> i32 {
    through::<{ ends::FORWARD }>(ctx)
}

#[unsafe(no_mangle)]
#[unsafe(link_section = "classifier")]
pub extern "C" fn verdict_reply(ctx: *mut c_void) -> i32 {
    let Some(order) = ORDERS.get(0) else { return NF_ACCEPT };
    let Some(packet) = Kernel::of(ctx, order) else { return NF_ACCEPT };
    let Some(answer) = answer(&packet, order, 0) else { return NF_ACCEPT };
    note(answer);
    NF_DROP
}

#[inline(always)]
fn through<const END: u8>(ctx: *mut c_void) -> i32 {
    let Some(order) = ORDERS.get(0) else { return NF_ACCEPT };
    let Some(packet) = Kernel::of(ctx, order) else { return NF_ACCEPT };
    let Some((port, at)) = probed(&packet, order, 0) else { return NF_ACCEPT };
    let Some(trace) = TRACES.get_ptr_mut(port as u32) else { return NF_DROP };
    // SAFETY: a value of this map. A probe is one packet on one CPU.
    let trace = unsafe { &mut *trace };
    trace.port = packet.load::<u16>(at + 2).map_or(0, u16::from_be);
    if order.is_ipv4() {
        let address = packet.load::<[u8; 4]>(16).unwrap_or_default();
        trace.address[0] = address[0];
        trace.address[1] = address[1];
        trace.address[2] = address[2];
        trace.address[3] = address[3];
    } else {
        trace.address = packet.load::<[u8; 16]>(24).unwrap_or_default();
    }
    // The first packet of a connection has no socket yet, unless a transparent proxy gave
    // it one.
    trace.end = if END == ends::LOCAL && packet.socket != 0 { ends::TAKEN } else { END };
    NF_DROP
}

#[inline(always)]
pub fn note(answer: Answer) {
    let Some(trace) = TRACES.get_ptr_mut(answer.port as u32) else { return };
    // SAFETY: a value of this map; two answers to one probe say the same.
    let trace = unsafe { &mut *trace };
    trace.icmp_type = answer.icmp_type;
    trace.icmp_code = answer.icmp_code;
    trace.end = answer.end;
}

/// The packet of a netfilter hook, from its IP header on. Such programs have no access to
/// the bytes but by reading kernel memory.
pub struct Kernel {
    ip: u64,
    socket: u64,
}

impl Kernel {
    #[inline(always)]
    pub fn of(ctx: *mut c_void, order: &Order) -> Option<Self> {
        // struct bpf_nf_ctx: the hook's state, then the packet.
        // SAFETY: the context of this program type, as the verifier knows it.
        let skb = unsafe { *(ctx as *const u64).add(1) };
        let head = read::<u64>(skb + order.skb_head as u64)?;
        let offset = read::<u16>(skb + order.skb_network_header as u64)?;
        let socket = if order.skb_sk == 0 { 0 } else { read::<u64>(skb + order.skb_sk as u64)? };
        Some(Self { ip: head + offset as u64, socket })
    }
}

impl Bytes for Kernel {
    #[inline(always)]
    fn load<T: Copy>(&self, at: usize) -> Option<T> {
        read(self.ip + at as u64)
    }
}

#[inline(always)]
fn read<T: Copy>(from: u64) -> Option<T> {
    let mut value = core::mem::MaybeUninit::<T>::uninit();
    // SAFETY: the kernel writes the whole value or fails, wherever `from` points.
    let result = unsafe {
        bpf_probe_read_kernel(value.as_mut_ptr().cast(), size_of::<T>() as u32, from as *const c_void)
    };
    // SAFETY: written, as the helper did not fail.
    if result == 0 { Some(unsafe { value.assume_init() }) } else { None }
}
