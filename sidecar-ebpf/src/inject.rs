//! Run by BPF_PROG_TEST_RUN, once for each frame of a chunk: puts the next frame into the
//! receive path of a device, in front of everything but native XDP.

use core::hint::black_box;

use aya_ebpf::bindings::{BPF_F_INGRESS, TC_ACT_OK};
use aya_ebpf::helpers::generated::bpf_skb_store_bytes;
use aya_ebpf::{macros::classifier, programs::TcContext};
use sidecar_ebpf::sweep::{FRAME_MAX, TC_INDEX, TC_INDEX_PLAIN, canary};

use crate::probe_maps::{FRAMES, ORDERS, PROGRESS};

#[classifier]
pub fn inject(ctx: TcContext) -> i32 {
    let (Some(order), Some(progress)) = (ORDERS.get(0), PROGRESS.get_ptr_mut(0)) else { return TC_ACT_OK };
    // SAFETY: a value of this map, which user space leaves alone while a chunk runs.
    let progress = unsafe { &mut *progress };
    let Some(frame) = FRAMES.get(progress.next) else { return TC_ACT_OK };
    progress.next += 1;
    let last = u64::from(order.frame_bytes).wrapping_sub(1);
    if last >= FRAME_MAX as u64 {
        return TC_ACT_OK;
    }
    // The compiler would undo the subtraction and keep the check on a copy, from which verifiers before Linux 6.10
    // learn nothing of the length.
    let length = black_box(last) as u32 + 1;
    // The packet's data is still shared with the clone of the frame before; storing makes
    // a copy of its own first.
    // SAFETY: the frame is FRAME_MAX bytes long, and the kernel checks the packet's bounds.
    let stored = unsafe { bpf_skb_store_bytes(ctx.skb.skb, 0, frame.bytes.as_ptr().cast(), length, 0) };
    let index = if order.canary & canary::PLAIN != 0 { TC_INDEX_PLAIN } else { TC_INDEX };
    // SAFETY: a writable field of the context.
    unsafe { (*ctx.skb.skb).tc_index = index };
    if stored != 0 || ctx.clone_redirect(order.index, BPF_F_INGRESS as u64).is_err() {
        progress.refused += 1;
    }
    TC_ACT_OK
}
