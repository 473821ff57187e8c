//! The contract of the guard: the programs that refuse new TCP connections which the
//! policy doesn't let in. Their maps and links have a number of their own in the pin path,
//! so that counters and guard change apart from each other.
//!
//! Rules lie in banks. User space writes a bank that is not in force and then says in one
//! word which ones are: a packet meets whole rules, the old or the new. Where two banks
//! are in force (a change that nobody has confirmed), a connection passes that either lets
//! in.

/// Number of this contract; part of the directory that everything is pinned in.
pub const ABI: u32 = 1;

/// Two may be in force while a third one is written.
pub const BANKS: usize = 3;
/// Ports of one bank as bits.
pub const WORDS: usize = 65536 / 64;
/// Prefixes of all banks together.
pub const PREFIXES_MAX: u32 = 65536;
/// Prefixes of openings that end by themselves.
pub const TIMED_MAX: u32 = 256;
/// Interfaces that are not simply public.
pub const SIDES_MAX: u32 = 1024;

/// Names of the pinned maps: the file name below `maps/` and the symbol in the object.
pub mod maps {
    pub const STATE: &str = "GUARD_STATE";
    pub const RULES: &str = "GUARD_RULES";
    pub const PORTS: &str = "GUARD_PORTS";
    pub const PREFIXES: &str = "GUARD_PREFIXES";
    pub const TIMED: &str = "GUARD_TIMED";
    pub const SIDES: &str = "GUARD_SIDES";
    pub const REFUSED: &str = "GUARD_REFUSED";
    pub const BUILD: &str = "GUARD_BUILD";
    pub const ALL: [&str; 8] = [STATE, RULES, PORTS, PREFIXES, TIMED, SIDES, REFUSED, BUILD];
}

/// Names of the programs, by link layer: Ethernet, bare IP.
pub const PROGRAMS: [&str; 2] = ["guard_eth", "guard_ip"];

/// Indexes of the map GUARD_STATE.
pub mod state {
    /// Bit mask of the banks in force. 0: everything passes.
    pub const IN_FORCE: u32 = 0;
    /// Bit of the bank that was written last. Only user space reads this and the next.
    pub const NEWEST: u32 = 1;
    /// How many openings with an end there are; 0 spares the look.
    pub const TIMED: u32 = 2;
    pub const COUNT: u32 = 3;
}

/// What a bank says apart from ports and prefixes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rules {
    /// The port that is refused under [`reasons::SSH`].
    pub ssh: u16,
    /// Not 0: count and let pass.
    pub audit: u8,
    pub pad: u8,
}
const _: () = assert!(size_of::<Rules>() == 4);

/// What the trie of prefixes is searched by, after its prefix length. Everything before
/// the address is always matched whole.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct PrefixKey {
    pub bank: u8,
    /// One of [`kinds`].
    pub kind: u8,
    /// 0 for [`kinds::MESH`].
    pub port: u16,
    pub family: u32,
    /// In network order; IPv4 in the first four bytes.
    pub address: [u8; 16],
}
const _: () = assert!(size_of::<PrefixKey>() == 24);
/// Bits of a [`PrefixKey`] before the address.
pub const PREFIX_HEAD_BITS: u32 = 64;

pub mod kinds {
    /// Sources that a port is open to; the value is of [`super::open`].
    pub const FROM: u8 = 0;
    /// Addresses of the mesh.
    pub const MESH: u8 = 1;
    /// Addresses of this host that a port is open at.
    pub const TO: u8 = 2;
}

/// Bits of the value of a prefix of kind [`kinds::FROM`]. A longer prefix hides the
/// shorter ones in a trie, so it has their bits as well.
pub mod open {
    pub const EVERYWHERE: u8 = 1;
    /// At the addresses of kind [`super::kinds::TO`].
    pub const AT_ADDRESSES: u8 = 2;
}

/// The same for openings with an end; the value is the end in nanoseconds since boot.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct TimedKey {
    pub port: u16,
    pub family: u16,
    pub address: [u8; 16],
}
const _: () = assert!(size_of::<TimedKey>() == 20);
pub const TIMED_HEAD_BITS: u32 = 32;

/// What an interface is in each bank.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sides {
    /// One of [`sides`].
    pub by_bank: [u8; 4],
}
const _: () = assert!(size_of::<Sides>() == 4 && BANKS <= 4);

pub mod sides {
    /// Also every interface that the map doesn't name.
    pub const PUBLIC: u8 = 0;
    pub const MESH: u8 = 1;
    pub const LOCAL: u8 = 2;
    pub const OTHER: u8 = 3;
}

/// Why a connection is refused, and 0 for one that isn't.
pub mod reasons {
    pub const PASSES: u32 = 0;
    pub const SSH: u32 = 1;
    pub const PUBLIC_TCP: u32 = 2;
    pub const WEAK_HOST: u32 = 3;
    pub const SPOOFED_MESH: u32 = 4;
    pub const FORWARD: u32 = 5;
    /// Headers that no honest sender makes and that hide what the packet is.
    pub const UNREADABLE: u32 = 6;
    pub const COUNT: u32 = 7;
}

/// Index into the map GUARD_REFUSED; `audit`: it passed and was only counted.
#[inline(always)]
pub const fn refused_index(reason: u32, family: usize, audit: bool) -> u32 {
    (audit as u32 * reasons::COUNT + reason) * 2 + family as u32
}
pub const REFUSED: u32 = reasons::COUNT * 4;

/// Index into the map GUARD_PORTS of the word that has this port's bit.
#[inline(always)]
pub const fn word_index(bank: usize, port: u16) -> u32 {
    (bank * WORDS + port as usize / 64) as u32
}

#[cfg(feature = "user")]
mod user {
    // Sound: every struct is #[repr(C)] of integers without padding, which the size
    // asserts above hold.
    unsafe impl aya::Pod for super::Rules {}
    unsafe impl aya::Pod for super::PrefixKey {}
    unsafe impl aya::Pod for super::TimedKey {}
    unsafe impl aya::Pod for super::Sides {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_refusal_and_every_port_has_an_index_of_its_own() {
        let mut counts = [0u8; REFUSED as usize];
        for reason in 0..reasons::COUNT {
            for family in 0..2 {
                for audit in [false, true] {
                    counts[refused_index(reason, family, audit) as usize] += 1;
                }
            }
        }
        assert!(counts.iter().all(|n| *n == 1), "{counts:?}");
        assert_eq!(word_index(0, 63) + 1, word_index(0, 64));
        assert_eq!(word_index(0, u16::MAX) + 1, word_index(1, 0));
        assert_eq!(word_index(BANKS - 1, u16::MAX) as usize, BANKS * WORDS - 1);
    }

    #[test]
    fn names_fit_what_the_kernel_keeps_of_them() {
        for name in PROGRAMS.iter().chain(&maps::ALL) {
            assert!(name.len() <= 15 && !name.contains(['.', '/']), "{name}");
        }
    }
}
