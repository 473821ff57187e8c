//! The guard: programs on the way in of public interfaces that refuse new TCP connections
//! which the policy doesn't let in, whatever becomes of nftables. An object of its own, so
//! that the counters go on without it and it without them.

#![cfg_attr(target_arch = "bpf", no_std, no_main)]

#[cfg(target_arch = "bpf")]
mod object;
#[cfg(target_arch = "bpf")]
#[allow(dead_code, reason = "shared with the counters, which read both directions")]
mod packet;
#[cfg(target_arch = "bpf")]
mod refuse;

/// All pinned by name: rules and counts belong to the kernel and outlive every process.
#[cfg(target_arch = "bpf")]
mod guard_maps {
    use aya_ebpf::macros::map;
    use aya_ebpf::maps::{Array, HashMap, LpmTrie, PerCpuArray};
    use sidecar_ebpf::gate::{
        BANKS, PREFIXES_MAX, PrefixKey, REFUSED, Rules, SIDES_MAX, Sides, TIMED_MAX, TimedKey, WORDS, state,
    };

    #[map]
    pub static GUARD_STATE: Array<u64> = Array::pinned(state::COUNT, 0);
    #[map]
    pub static GUARD_RULES: Array<Rules> = Array::pinned(BANKS as u32, 0);
    #[map]
    pub static GUARD_PORTS: Array<u64> = Array::pinned((BANKS * WORDS) as u32, 0);
    #[map]
    pub static GUARD_PREFIXES: LpmTrie<PrefixKey, u8> = LpmTrie::pinned(PREFIXES_MAX, 0);
    #[map]
    pub static GUARD_TIMED: LpmTrie<TimedKey, u64> = LpmTrie::pinned(TIMED_MAX, 0);
    #[map]
    pub static GUARD_SIDES: HashMap<u32, Sides> = HashMap::pinned(SIDES_MAX, NO_PREALLOC);
    #[map]
    pub static GUARD_REFUSED: PerCpuArray<u64> = PerCpuArray::pinned(REFUSED, 0);
    /// Which object the pinned programs come from; only user space reads and writes it.
    #[map]
    pub static GUARD_BUILD: Array<u64> = Array::pinned(1, 0);

    /// BPF_F_NO_PREALLOC.
    const NO_PREALLOC: u32 = 1;
}

/// For the host there is no program to build.
#[cfg(not(target_arch = "bpf"))]
fn main() {}
