//! tc ingress, before every other program there: which probes arrived. What was seen here
//! and left no other trace was dropped by the host, and not lost on the way to it.

use aya_ebpf::bindings::{__sk_buff, TC_ACT_OK, TC_ACT_UNSPEC};
use aya_ebpf::{macros::classifier, programs::TcContext};
use sidecar_ebpf::sweep::{COUNTED, MARK, PRIORITY, canary};

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

/// The same where there is no tcx: a filter on a packet socket, which keeps nothing.
// The section's name says nothing to the kernel, as in the netfilter programs.
#[unsafe(no_mangle)]
#[unsafe(link_section = "classifier")]
pub extern "C" fn tap_eth(skb: *mut __sk_buff) -> i32 {
    tap::<14>(skb)
}

#[unsafe(no_mangle)]
#[unsafe(link_section = "classifier")]
pub extern "C" fn tap_ip(skb: *mut __sk_buff) -> i32 {
    tap::<0>(skb)
}

#[inline(always)]
fn tap<const IP: usize>(skb: *mut __sk_buff) -> i32 {
    let Some(order) = ORDERS.get(0) else { return 0 };
    if let Some((port, _)) = probed(&TcContext::new(skb), order, IP) {
        see(port);
    }
    0
}

#[inline(always)]
fn see(port: u16) {
    if let Some(trace) = TRACES.get_ptr_mut(port as u32) {
        // SAFETY: a value of this map. One byte only ever becomes 1; the other counts the
        // frames of one canary, which come one after the other.
        unsafe {
            (*trace).seen = 1;
            (*trace).arrivals = (*trace).arrivals.saturating_add(1);
        }
    }
}

#[inline(always)]
fn arrive<const IP: usize>(mut ctx: TcContext) -> i32 {
    let Some(order) = ORDERS.get(0) else { return TC_ACT_UNSPEC };
    let Some((port, _)) = probed(&ctx, order, IP) else { return TC_ACT_UNSPEC };
    see(port);
    if order.canary & canary::PLAIN == 0 {
        // SAFETY: a writable field of the context.
        unsafe { (*ctx.skb.skb).priority = PRIORITY };
    }
    if order.canary & canary::COUNTED != 0 {
        let block = ctx.cb_mut();
        block[0] = MARK[0];
        block[1] = MARK[1];
        block[2] = COUNTED;
    }
    if order.canary & canary::PAST_TC != 0 { TC_ACT_OK as i32 } else { TC_ACT_UNSPEC }
}
