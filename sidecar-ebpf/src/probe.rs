//! The programs of an audit, apart from the counters' object: loaded for the few moments
//! that an audit takes, never pinned, gone with the process that loaded them.

#![cfg_attr(target_arch = "bpf", no_std, no_main)]

#[cfg(target_arch = "bpf")]
mod arrive;
#[cfg(target_arch = "bpf")]
mod caught;
#[cfg(target_arch = "bpf")]
mod inject;
#[cfg(target_arch = "bpf")]
mod object;
#[cfg(target_arch = "bpf")]
mod recognise;
#[cfg(target_arch = "bpf")]
mod stages;
#[cfg(target_arch = "bpf")]
mod verdict;

#[cfg(target_arch = "bpf")]
mod probe_maps {
    use aya_ebpf::macros::map;
    use aya_ebpf::maps::Array;
    use sidecar_ebpf::sweep::{CHUNK, Frame, MMAPABLE, Order, Progress, Trace};

    #[map]
    pub static ORDERS: Array<Order> = Array::with_max_entries(1, MMAPABLE);
    #[map]
    pub static FRAMES: Array<Frame> = Array::with_max_entries(CHUNK, MMAPABLE);
    #[map]
    pub static PROGRESS: Array<Progress> = Array::with_max_entries(1, MMAPABLE);
    #[map]
    pub static TRACES: Array<Trace> = Array::with_max_entries(65536, MMAPABLE);
}

/// For the host there is no program to build.
#[cfg(not(target_arch = "bpf"))]
fn main() {}
