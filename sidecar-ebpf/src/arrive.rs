//! tc ingress, before every other program there: which probes arrived. What was seen here
//! and left no other trace was dropped by the host, and not lost on the way to it.

use aya_ebpf::bindings::TC_ACT_UNSPEC;
use aya_ebpf::{macros::classifier, programs::TcContext};
use sidecar_ebpf::sweep::MARK;

use crate::probe_maps::{ORDERS, TRACES};
use crate::recognise::probed;

#[classifier]
pub fn arrive_eth(ctx: TcContext) -> i32 {
    arrive::<14>(ctx)
}

#[classifier]
pub fn arrive_ip(ctx: TcContext) -> i32 {
    arrive::<0>(ctx)
}

#[inline(always)]
fn arrive<const IP: usize>(mut ctx: TcContext) -> i32 {
    let Some(order) = ORDERS.get(0) else { return TC_ACT_UNSPEC };
    let Some((port, _)) = probed(&ctx, order, IP) else { return TC_ACT_UNSPEC };
    if let Some(trace) = TRACES.get_ptr_mut(port as u32) {
        // SAFETY: a value of this map; one byte, which only ever becomes 1.
        unsafe { (*trace).seen = 1 };
    }
    let block = ctx.cb_mut();
    block[0] = MARK[0];
    block[1] = MARK[1];
    TC_ACT_UNSPEC
}
