//! tc egress: answers that some program or a netdev chain sends past netfilter's hooks.

use aya_ebpf::bindings::{TC_ACT_SHOT, TC_ACT_UNSPEC};
use aya_ebpf::{macros::classifier, programs::TcContext};

use crate::probe_maps::ORDERS;
use crate::recognise::answer;
use crate::verdict::note;

#[classifier]
pub fn caught_eth(ctx: TcContext) -> i32 {
    caught::<14>(ctx)
}

#[classifier]
pub fn caught_ip(ctx: TcContext) -> i32 {
    caught::<0>(ctx)
}

#[inline(always)]
fn caught<const IP: usize>(ctx: TcContext) -> i32 {
    let Some(order) = ORDERS.get(0) else { return TC_ACT_UNSPEC };
    let Some(answer) = answer(&ctx, order, IP) else { return TC_ACT_UNSPEC };
    note(answer);
    // Not STOLEN: the sender is to learn that it did not get out.
    TC_ACT_SHOT
}
