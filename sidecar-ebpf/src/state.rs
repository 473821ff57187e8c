//! The maps, all pinned by name: they belong to the kernel, and programs and daemons come
//! and go around them.

use aya_ebpf::macros::map;
use aya_ebpf::maps::{Array, LpmTrie, PerCpuArray, RingBuf};
use sidecar_ebpf::{ClassEntry, PortClasses, Row, SourceKey};

/// Port to classes: an array, because a hash costs six times as much per packet.
#[map]
pub static PORTS: Array<PortClasses> = Array::pinned(65536, 0);

#[map]
pub static CLASSES: Array<ClassEntry> = Array::pinned(sidecar_ebpf::CLASSES_MAX as u32 + 1, 0);

#[map]
pub static SOURCES: LpmTrie<SourceKey, u8> = LpmTrie::pinned(sidecar_ebpf::SOURCES_MAX, 0);

#[map]
pub static ROWS: PerCpuArray<Row> = PerCpuArray::pinned(sidecar_ebpf::ROWS, 0);

/// Only user space reads and writes it, as BUILD.
#[map]
pub static CARRIED: Array<Row> = Array::pinned(sidecar_ebpf::ROWS + 1, 0);

#[map]
pub static LISTENS: RingBuf = RingBuf::pinned(sidecar_ebpf::RING_BYTES, 0);

/// How often each kind of unreadable packet was met; the first one is also logged.
#[map]
pub static NOTES: Array<u64> = Array::pinned(sidecar_ebpf::notes::COUNT, 0);

/// What is known of the pins, by [`sidecar_ebpf::about`]; only user space reads and writes it.
#[map]
pub static BUILD: Array<u64> = Array::pinned(sidecar_ebpf::about::COUNT, 0);
