//! Sensors around the guard and around our table: a probe that is seen before one of them
//! and not behind it was refused right there, and by nothing else.

use core::ffi::c_void;

use aya_ebpf::bindings::TC_ACT_UNSPEC;
use aya_ebpf::{macros::classifier, programs::TcContext};
use sidecar_ebpf::sweep::stages::{PAST_GUARD, PAST_TABLE, TO_GUARD, TO_TABLE};

use crate::probe_maps::{ORDERS, TRACES};
use crate::recognise::{Bytes, probed};
use crate::verdict::{Kernel, NF_ACCEPT};

#[classifier]
pub fn to_guard_eth(ctx: TcContext) -> i32 {
    pass::<14, TO_GUARD>(&ctx)
}

#[classifier]
pub fn to_guard_ip(ctx: TcContext) -> i32 {
    pass::<0, TO_GUARD>(&ctx)
}

#[classifier]
pub fn past_guard_eth(ctx: TcContext) -> i32 {
    pass::<14, PAST_GUARD>(&ctx)
}

#[classifier]
pub fn past_guard_ip(ctx: TcContext) -> i32 {
    pass::<0, PAST_GUARD>(&ctx)
}

// The section's name says nothing to the kernel, as in the netfilter programs that end probes.
#[unsafe(no_mangle)]
#[unsafe(link_section = "classifier")]
pub extern "C" fn to_table(ctx: *mut c_void) -> i32 {
    pass_table::<TO_TABLE>(ctx)
}

#[unsafe(no_mangle)]
#[unsafe(link_section = "classifier")]
pub extern "C" fn past_table(ctx: *mut c_void) -> i32 {
    pass_table::<PAST_TABLE>(ctx)
}

#[inline(always)]
fn pass<const IP: usize, const STAGE: u8>(ctx: &TcContext) -> i32 {
    see::<IP, STAGE>(ctx);
    TC_ACT_UNSPEC
}

#[inline(always)]
fn pass_table<const STAGE: u8>(ctx: *mut c_void) -> i32 {
    if let Some(packet) = ORDERS.get(0).and_then(|order| Kernel::of(ctx, order)) {
        see::<0, STAGE>(&packet);
    }
    NF_ACCEPT
}

#[inline(always)]
fn see<const IP: usize, const STAGE: u8>(packet: &impl Bytes) {
    let Some(order) = ORDERS.get(0) else { return };
    let Some((port, _)) = probed(packet, order, IP) else { return };
    if let Some(trace) = TRACES.get_ptr_mut(port as u32) {
        // SAFETY: a value of this map. The frames of one canary come one after the other,
        // and bits are only ever added.
        unsafe { (*trace).stages |= STAGE };
    }
}
