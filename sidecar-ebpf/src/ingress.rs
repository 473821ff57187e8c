//! Packets that arrive: one program for each link layer and scope, so that neither has to
//! be looked up.

use aya_ebpf::{macros::classifier, programs::TcContext};
use sidecar_ebpf::IN;

use crate::count::count;

#[classifier]
pub fn in_eth_public(ctx: TcContext) -> i32 {
    count::<true, 0, IN>(&ctx)
}

#[classifier]
pub fn in_eth_mesh(ctx: TcContext) -> i32 {
    count::<true, 1, IN>(&ctx)
}

#[classifier]
pub fn in_eth_other(ctx: TcContext) -> i32 {
    count::<true, 2, IN>(&ctx)
}

#[classifier]
pub fn in_ip_public(ctx: TcContext) -> i32 {
    count::<false, 0, IN>(&ctx)
}

#[classifier]
pub fn in_ip_mesh(ctx: TcContext) -> i32 {
    count::<false, 1, IN>(&ctx)
}

#[classifier]
pub fn in_ip_other(ctx: TcContext) -> i32 {
    count::<false, 2, IN>(&ctx)
}
