//! Packets that leave: one program for each link layer and scope, so that neither has to
//! be looked up.

use aya_ebpf::{macros::classifier, programs::TcContext};
use sidecar_ebpf::OUT;

use crate::count::count;

#[classifier]
pub fn out_eth_public(ctx: TcContext) -> i32 {
    count::<true, 0, OUT>(&ctx)
}

#[classifier]
pub fn out_eth_mesh(ctx: TcContext) -> i32 {
    count::<true, 1, OUT>(&ctx)
}

#[classifier]
pub fn out_eth_other(ctx: TcContext) -> i32 {
    count::<true, 2, OUT>(&ctx)
}

#[classifier]
pub fn out_ip_public(ctx: TcContext) -> i32 {
    count::<false, 0, OUT>(&ctx)
}

#[classifier]
pub fn out_ip_mesh(ctx: TcContext) -> i32 {
    count::<false, 1, OUT>(&ctx)
}

#[classifier]
pub fn out_ip_other(ctx: TcContext) -> i32 {
    count::<false, 2, OUT>(&ctx)
}
