//! The contract between the eBPF programs and user space: names, fixed layouts and the
//! arithmetic of indexes. Plain integers only; user space turns numbers into its enums
//! with a conversion that can refuse.
//!
//! Anything here that changes its meaning or layout needs a new [`ABI`]: maps and links
//! are pinned below a directory of that number and outlive the process that made them.

#![no_std]

pub mod bind;
pub mod gate;
pub mod sweep;

/// Number of this contract; part of the directory that everything is pinned in.
/// Since 2, [`maps::CARRIED`] and [`about`].
pub const ABI: u32 = 2;

/// Public, mesh, other: the order of the user-space enum.
pub const SCOPES: usize = 3;
pub const DIRECTIONS: usize = 2;
pub const FAMILIES: usize = 2;
pub const PROTOS: usize = 4;

pub const IN: usize = 0;
pub const OUT: usize = 1;
pub const IPV4: usize = 0;
pub const IPV6: usize = 1;
pub const TCP: usize = 0;
pub const UDP: usize = 1;
pub const ICMP: usize = 2;
pub const OTHER: usize = 3;

/// Class numbers are 1..=255; 0 is a port that the policy doesn't speak of.
pub const NO_CLASS: u8 = 0;
pub const CLASSES_MAX: usize = 255;
/// No service's: under this class the programs count the frames by which they are tried
/// (see [`sweep::Order::canary`]), apart from all traffic. Nobody reports it.
pub const CANARY_CLASS: u8 = 255;
/// Rows 0..4 count packets without a class, by protocol; the classes follow.
pub const ROWS: u32 = (PROTOS + CLASSES_MAX) as u32;
/// Of the carried rows one more: the sum that a move under way is to leave.
pub const CARRIED_NOTE: u32 = ROWS;
/// Prefixes of allowed sources, of all classes together.
pub const SOURCES_MAX: u32 = 1024;
/// Bytes of each ring buffer: one page of 4 KiB. A full ring loses wakes, never truth.
pub const RING_BYTES: u32 = 4096;

/// Names of the pinned maps: the file name below `maps/` and the symbol in the object.
pub mod maps {
    pub const PORTS: &str = "PORTS";
    pub const CLASSES: &str = "CLASSES";
    pub const SOURCES: &str = "SOURCES";
    pub const ROWS: &str = "ROWS";
    /// Rows that no program writes: what was counted for services and by programs that are gone.
    pub const CARRIED: &str = "CARRIED";
    pub const LISTENS: &str = "LISTENS";
    pub const NOTES: &str = "NOTES";
    pub const BUILD: &str = "BUILD";
    pub const LOGS: &str = "AYA_LOGS";
    pub const ALL: [&str; 9] = [PORTS, CLASSES, SOURCES, ROWS, CARRIED, LISTENS, NOTES, BUILD, LOGS];
}

/// Names of the programs: the symbol in the object and the file name below `programs/`.
pub mod programs {
    /// By direction, then by link layer (Ethernet, bare IP), then by scope.
    pub const COUNTERS: [[[&str; super::SCOPES]; 2]; super::DIRECTIONS] = [
        [["in_eth_public", "in_eth_mesh", "in_eth_other"], ["in_ip_public", "in_ip_mesh", "in_ip_other"]],
        [
            ["out_eth_public", "out_eth_mesh", "out_eth_other"],
            ["out_ip_public", "out_ip_mesh", "out_ip_other"],
        ],
    ];
    /// A raw tracepoint that reports sockets that begin to listen.
    pub const LISTEN: &str = "listen";
    pub const LISTEN_TRACEPOINT: &str = "inet_sock_set_state";
    /// Does nothing: what the cost of the others is measured against.
    pub const EMPTY: &str = "empty";
}

/// Packets and bytes of one kind.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cell {
    pub packets: u64,
    pub bytes: u64,
}
const _: () = assert!(size_of::<Cell>() == 16);

/// Everything counted for one class (or for one protocol without a class).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Row {
    /// By [`cell_index`].
    pub traffic: [Cell; SCOPES * DIRECTIONS * FAMILIES],
    /// New TCP connections that arrived, by [`attempt_index`].
    pub attempts: [u64; FAMILIES * 2],
}
const _: () = assert!(size_of::<Row>() == 224);

/// What a port means: its class for each scope and protocol, by [`port_index`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PortClasses {
    pub class: [u8; 8],
}
const _: () = assert!(size_of::<PortClasses>() == 8);

/// Who a class belongs to and how new connections to it are judged. Only read for the
/// first packet of a connection.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ClassEntry {
    pub port: u16,
    pub proto: u8,
    pub scope: u8,
    /// By scope: [`REFUSED`], [`ANYONE`] or [`LISTED`].
    pub judgement: [u8; SCOPES],
    /// 0: this class number is free.
    pub used: u8,
}
const _: () = assert!(size_of::<ClassEntry>() == 8);

pub const REFUSED: u8 = 0;
pub const ANYONE: u8 = 1;
/// Allowed if the source is in the trie of sources under this class.
pub const LISTED: u8 = 2;

/// What the trie of sources is searched by, after its prefix length. The class and the
/// family are always matched whole, so `::/0` doesn't take IPv4 in.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct SourceKey {
    pub class: u16,
    pub family: u16,
    /// In network order; IPv4 in the first four bytes.
    pub address: [u8; 16],
}
const _: () = assert!(size_of::<SourceKey>() == 20);
/// Bits of a [`SourceKey`] before the address.
pub const SOURCE_KEY_HEAD_BITS: u32 = 32;

/// A socket began to listen.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ListenEvent {
    /// The process, not the thread.
    pub pid: u32,
    /// Chosen by the process itself; ends at the first 0.
    pub comm: [u8; 16],
}
const _: () = assert!(size_of::<ListenEvent>() == 20);

/// Kinds of packets that could not be read to the end; indexes of the map NOTES.
pub mod notes {
    /// The packet ends before its headers do.
    pub const SHORT: u32 = 0;
    /// More IPv6 extension headers than the programs follow.
    pub const EXTENSIONS: u32 = 1;
    /// Neither IPv4 nor IPv6 on a device without link layer.
    pub const VERSION: u32 = 2;
    pub const COUNT: u32 = 3;
}

/// Indexes of the map BUILD.
pub mod about {
    /// Which object the programs come from; 0: not everything is pinned.
    pub const BUILD: u32 = 0;
    /// A move of counts that is under way, packed by user space; 0: none is.
    pub const MOVE: u32 = 1;
    /// When counting began, in seconds of Unix time.
    pub const CREATED: u32 = 2;
    pub const COUNT: u32 = 3;
}

/// Index into [`Row::traffic`].
#[inline(always)]
pub const fn cell_index(scope: usize, direction: usize, family: usize) -> usize {
    (scope * DIRECTIONS + direction) * FAMILIES + family
}

/// Index into [`Row::attempts`].
#[inline(always)]
pub const fn attempt_index(family: usize, allowed: bool) -> usize {
    family * 2 + allowed as usize
}

/// Index into [`PortClasses::class`]; `proto` is [`TCP`] or [`UDP`].
#[inline(always)]
pub const fn port_index(scope: usize, proto: usize) -> usize {
    scope * 2 + proto
}

/// Index into the map ROWS.
#[inline(always)]
pub const fn row_index(class: u8, proto: usize) -> u32 {
    if class == NO_CLASS { proto as u32 } else { (PROTOS - 1) as u32 + class as u32 }
}

#[cfg(feature = "user")]
mod user {
    // Sound: every struct is #[repr(C)] of integers without padding, which the size
    // asserts above hold.
    unsafe impl aya::Pod for super::Cell {}
    unsafe impl aya::Pod for super::Row {}
    unsafe impl aya::Pod for super::PortClasses {}
    unsafe impl aya::Pod for super::ClassEntry {}
    unsafe impl aya::Pod for super::SourceKey {}
    unsafe impl aya::Pod for super::ListenEvent {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_cell_attempt_and_port_byte_has_an_index_of_its_own() {
        let mut cells = [0u8; SCOPES * DIRECTIONS * FAMILIES];
        for scope in 0..SCOPES {
            for direction in 0..DIRECTIONS {
                for family in 0..FAMILIES {
                    cells[cell_index(scope, direction, family)] += 1;
                }
            }
        }
        assert!(cells.iter().all(|n| *n == 1), "{cells:?}");
        let mut attempts = [0u8; FAMILIES * 2];
        for family in 0..FAMILIES {
            for allowed in [false, true] {
                attempts[attempt_index(family, allowed)] += 1;
            }
        }
        assert!(attempts.iter().all(|n| *n == 1), "{attempts:?}");
        let mut ports = [0u8; 8];
        for scope in 0..SCOPES {
            for proto in [TCP, UDP] {
                ports[port_index(scope, proto)] += 1;
            }
        }
        assert_eq!(ports, [1, 1, 1, 1, 1, 1, 0, 0]);
    }

    #[test]
    fn rows_of_classes_follow_the_rows_of_protocols_and_end_with_the_map() {
        for proto in 0..PROTOS {
            assert_eq!(row_index(NO_CLASS, proto), proto as u32);
        }
        assert_eq!(row_index(1, UDP), PROTOS as u32);
        assert_eq!(row_index(CLASSES_MAX as u8, TCP), ROWS - 1);
    }

    #[test]
    fn names_fit_what_the_kernel_keeps_of_them() {
        // 15 bytes of name, and bpffs refuses dots.
        let programs = programs::COUNTERS.iter().flatten().flatten();
        for name in programs.chain([&programs::LISTEN, &programs::EMPTY]).chain(&maps::ALL) {
            assert!(name.len() <= 15 && !name.contains(['.', '/']), "{name}");
        }
    }
}
