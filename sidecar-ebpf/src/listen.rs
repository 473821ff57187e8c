//! Tells user space that some socket began to listen, here or in any other network
//! namespace. Only a wake: which socket it is, is read by sock_diag afterwards.

use aya_ebpf::EbpfContext as _;
use aya_ebpf::macros::raw_tracepoint;
use aya_ebpf::programs::RawTracePointContext;
use sidecar_ebpf::ListenEvent;

use crate::state::LISTENS;

const TCP_LISTEN: i32 = 10;

/// The arguments are (sock, oldstate, newstate), from Linux 4.16 to this day.
#[raw_tracepoint]
pub fn listen(ctx: RawTracePointContext) -> i32 {
    if ctx.arg::<i32>(2) != TCP_LISTEN {
        return 0;
    }
    // listen() runs in its caller's context, so the current process is the listener.
    let event = ListenEvent { pid: ctx.tgid(), comm: ctx.command().unwrap_or_default() };
    if let Some(mut entry) = LISTENS.reserve::<ListenEvent>(0) {
        entry.write(event);
        entry.submit(0);
    }
    0
}
