//! The contract of the bind guard: its maps, their layouts, and the one judgement that the
//! programs and user space share, so that what is predicted is what happens.
//!
//! Anything here that changes its meaning or layout needs a new [`ABI`]: the guard is pinned
//! below a directory of that number, apart from the counters, and outlives who loaded it.

/// Number of this contract; part of the directory that the guard is pinned in.
pub const ABI: u32 = 1;

/// Addresses, prefixes and devices of all lists together.
pub const PLACES_MAX: u32 = 1024;
/// Refusals that are remembered; the one not heard of for longest makes way.
pub const REFUSALS_MAX: u32 = 256;
/// Bytes of the ring buffer: one page. A full ring loses wakes, never a count.
pub const RING_BYTES: u32 = 4096;

/// Names of the pinned maps: the file name below `maps/` and the symbol in the object.
pub mod maps {
    pub const GUARD: &str = "GUARD";
    pub const KINDS: &str = "KINDS";
    pub const PLACES: &str = "PLACES";
    pub const REFUSALS: &str = "REFUSALS";
    pub const TALLY: &str = "TALLY";
    pub const WAKES: &str = "WAKES";
    pub const BUILD: &str = "BUILD";
    pub const ALL: [&str; 7] = [GUARD, KINDS, PLACES, REFUSALS, TALLY, WAKES, BUILD];
}

/// Names of the programs: the symbol in the object, and the file names below `programs/`
/// and `links/`.
pub mod programs {
    pub const BIND4: &str = "bind4";
    pub const BIND6: &str = "bind6";
    pub const ALL: [&str; 2] = [BIND4, BIND6];
}

pub const TCP: u8 = 0;
pub const UDP: u8 = 1;

/// [`Guard::mode`].
pub mod mode {
    pub const OFF: u32 = 0;
    /// Counts and records what would be refused, and refuses nothing.
    pub const AUDIT: u32 = 1;
    pub const ENFORCE: u32 = 2;
}

/// What the policy says of a port.
pub mod kind {
    /// Nothing.
    pub const UNNAMED: u8 = 0;
    /// May be bound on every address.
    pub const ANYWHERE: u8 = 1;
    /// On the addresses of its list only: the mesh's, or those of sshd.
    pub const LISTED: u8 = 2;
    /// Meant for a local network, whose addresses come and go.
    pub const LOCAL: u8 = 3;
}

/// [`PlaceKey::list`].
pub mod list {
    pub const MESH: u32 = 0;
    pub const SSH: u32 = 1;
    /// Addresses of this host by which strangers come in.
    pub const PUBLIC: u32 = 2;
    /// Devices by which strangers come in; the number stands where the address would.
    pub const DOORS: u32 = 3;
}

/// [`RefusalKey::outcome`], and indexes of the map TALLY.
pub mod outcome {
    pub const REFUSED: u8 = 0;
    /// Would have been refused or moved: mode is audit.
    pub const AUDITED: u8 = 1;
    /// sshd's wildcard, moved to another address. Counted, never recorded.
    pub const MOVED: u8 = 2;
    pub const COUNT: u32 = 3;
}

/// The one entry of the map GUARD.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Guard {
    /// The network namespace that is guarded; sockets of any other are left alone.
    pub netns: u64,
    /// One of [`mode`].
    pub mode: u32,
    /// Not 0: put aside by hand. Nothing is refused, counted or moved.
    pub lifted: u32,
    /// The mark (SO_MARK) on sockets by which a daemon tries whether the guard holds: they are
    /// judged like any other, refused in audit mode too, and neither counted nor recorded. 0:
    /// nobody tries.
    pub prover: u32,
    /// Not 0: we let sockets bind addresses that are not there yet, and take that back; only
    /// user space cares.
    pub nonlocal: u32,
    pub ssh_port: u16,
    /// The kernel's own choice of ports (net.ipv4.ip_local_port_range), both included.
    pub ephemeral: [u16; 2],
    pub pad: u16,
    /// Where a wildcard bind of sshd's port goes: an IPv4 socket's, an IPv6-only socket's,
    /// one's that takes both. Nothing but zeros: nowhere, it is refused.
    pub move_v4: [u8; 16],
    pub move_v6: [u8; 16],
    pub move_dual: [u8; 16],
}
const _: () = assert!(size_of::<Guard>() == 80);

/// What the trie of places is searched by, after its prefix length.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct PlaceKey {
    /// One of [`list`]; always matched whole.
    pub list: u32,
    /// In network order; IPv4 as `::ffff:a.b.c.d`.
    pub address: [u8; 16],
}
const _: () = assert!(size_of::<PlaceKey>() == 20);
/// Bits of a [`PlaceKey`] before the address.
pub const PLACE_KEY_HEAD_BITS: u32 = 32;

/// Who wanted to bind what. A process that tries again is counted, not listed again.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct RefusalKey {
    pub address: [u8; 16],
    /// Chosen by the process itself; ends at the first 0.
    pub comm: [u8; 16],
    pub port: u16,
    pub proto: u8,
    /// One of [`outcome`].
    pub outcome: u8,
}
const _: () = assert!(size_of::<RefusalKey>() == 36);

#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Refusal {
    pub count: u64,
    /// Nanoseconds since boot (CLOCK_BOOTTIME).
    pub first_ns: u64,
    pub last_ns: u64,
    /// The control group of the last one, by its inode.
    pub cgroup: u64,
    /// The process of the last one, not the thread.
    pub pid: u32,
    pub uid: u32,
}
const _: () = assert!(size_of::<Refusal>() == 40);

/// Sent for each refusal; only a wake.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Wake {
    pub key: RefusalKey,
    pub pid: u32,
    pub cgroup: u64,
}
const _: () = assert!(size_of::<Wake>() == 48);

/// Ports of one word of the map KINDS, two bits each.
pub const KINDS_PER_WORD: u32 = 32;
pub const KINDS_WORDS: u32 = 2 * 65536 / KINDS_PER_WORD;

/// Index into the map KINDS, and the shift within that word.
#[inline(always)]
pub const fn kind_place(proto: u8, port: u16) -> (u32, u32) {
    let at = (proto as u32 & 1) << 16 | port as u32;
    (at / KINDS_PER_WORD, at % KINDS_PER_WORD * 2)
}

/// The policy's tables, as maps or as values.
pub trait Tables {
    /// What the policy says of this port: one of [`kind`].
    fn kind(&self, proto: u8, port: u16) -> u8;
    /// Whether this list holds the address.
    fn holds(&self, list: u32, address: &[u8; 16]) -> bool;
}

/// A bind that somebody asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bind {
    /// [`TCP`] or [`UDP`].
    pub proto: u8,
    pub port: u16,
    /// In network order; IPv4 as `::ffff:a.b.c.d`.
    pub address: [u8; 16],
    /// An IPv6 socket, and one that takes IPv4 as well.
    pub ipv6: bool,
    pub dual: bool,
    /// Held to this device (SO_BINDTODEVICE); 0: to none.
    pub device: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Judgement {
    Allow,
    Refuse,
    /// sshd's wildcard, to this address.
    Move([u8; 16]),
}

/// Outgoing NFS, RPC and the like bind a port of these before they connect (glibc's
/// bindresvport takes 600 to 1023, the kernel's NFS client 665 to 1023).
pub const RESERVED: [u16; 2] = [600, 1023];
/// Active FTP servers connect from here.
const FTP_DATA: u16 = 20;

/// Whether a bind may be, without regard to the guard's mode.
///
/// bind(2) comes before listen(2), and outgoing connections bind, too. So where the policy
/// says nothing of a port, only what can hardly be anything but a server is refused: TCP, a
/// chosen port, on every address or on one that strangers reach.
#[inline(always)]
pub fn judge(guard: &Guard, tables: &impl Tables, bind: &Bind) -> Judgement {
    if bind.port == 0 || is_private_to_the_host(&bind.address) {
        return Judgement::Allow;
    }
    if bind.device != 0 && !tables.holds(list::DOORS, &device_place(bind.device)) {
        return Judgement::Allow;
    }
    let kind = tables.kind(bind.proto, bind.port);
    let ssh = bind.proto == TCP && bind.port == guard.ssh_port;
    let wildcard = is_wildcard(&bind.address);
    match kind {
        kind::ANYWHERE => Judgement::Allow,
        kind::UNNAMED => {
            let outgoing = within(bind.port, guard.ephemeral) || within(bind.port, RESERVED);
            if bind.proto != TCP || outgoing || bind.port == FTP_DATA {
                return Judgement::Allow;
            }
            if wildcard || tables.holds(list::PUBLIC, &bind.address) {
                return Judgement::Refuse;
            }
            Judgement::Allow
        }
        _ => {
            let local = kind == kind::LOCAL;
            if wildcard {
                if !ssh {
                    return if local { Judgement::Allow } else { Judgement::Refuse };
                }
                if tables.holds(list::SSH, &bind.address) {
                    return Judgement::Allow;
                }
                let to = match (bind.ipv6 && !is_mapped(&bind.address), bind.dual) {
                    (false, _) => guard.move_v4,
                    (true, false) => guard.move_v6,
                    (true, true) => guard.move_dual,
                };
                return if is_zero(&to) { Judgement::Refuse } else { Judgement::Move(to) };
            }
            if tables.holds(if ssh { list::SSH } else { list::MESH }, &bind.address) {
                return Judgement::Allow;
            }
            if local && !tables.holds(list::PUBLIC, &bind.address) {
                return Judgement::Allow;
            }
            Judgement::Refuse
        }
    }
}

#[inline(always)]
fn within(port: u16, range: [u16; 2]) -> bool {
    port >= range[0] && port <= range[1]
}

/// How a device stands in the list of doors.
#[inline(always)]
pub const fn device_place(index: u32) -> [u8; 16] {
    let [a, b, c, d] = index.to_be_bytes();
    mapped([a, b, c, d])
}

/// `::ffff:a.b.c.d`.
#[inline(always)]
pub const fn mapped(v4: [u8; 4]) -> [u8; 16] {
    [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, v4[0], v4[1], v4[2], v4[3]]
}

// By words, since the verifier follows each byte of a comparison.
#[inline(always)]
fn words(address: &[u8; 16]) -> [u32; 4] {
    let a = address;
    [
        u32::from_be_bytes([a[0], a[1], a[2], a[3]]),
        u32::from_be_bytes([a[4], a[5], a[6], a[7]]),
        u32::from_be_bytes([a[8], a[9], a[10], a[11]]),
        u32::from_be_bytes([a[12], a[13], a[14], a[15]]),
    ]
}

#[inline(always)]
fn is_zero(address: &[u8; 16]) -> bool {
    let [a, b, c, d] = words(address);
    a | b | c | d == 0
}

#[inline(always)]
pub fn is_mapped(address: &[u8; 16]) -> bool {
    let [a, b, c, _] = words(address);
    a | b == 0 && c == 0xffff
}

#[inline(always)]
fn is_wildcard(address: &[u8; 16]) -> bool {
    let [a, b, c, d] = words(address);
    a | b | d == 0 && (c == 0 || c == 0xffff)
}

/// Loopback, and link-local addresses, which no listener's finding speaks of either.
#[inline(always)]
fn is_private_to_the_host(address: &[u8; 16]) -> bool {
    let [a, b, c, d] = words(address);
    if a | b == 0 && c == 0xffff {
        return d >> 24 == 127 || d >> 16 == 0xa9fe;
    }
    (a | b | c == 0 && d == 1) || a >> 22 == 0xfe80 >> 6
}

#[cfg(feature = "user")]
mod user {
    // Sound: every struct is #[repr(C)] of integers without padding, which the size
    // asserts above hold.
    unsafe impl aya::Pod for super::Guard {}
    unsafe impl aya::Pod for super::PlaceKey {}
    unsafe impl aya::Pod for super::RefusalKey {}
    unsafe impl aya::Pod for super::Refusal {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_port_has_two_bits_of_its_own() {
        let mut seen = [0u64; KINDS_WORDS as usize];
        for proto in [TCP, UDP] {
            for port in 0..=u16::MAX {
                let (word, shift) = kind_place(proto, port);
                assert_eq!(seen[word as usize] >> shift & 3, 0, "{proto} {port}");
                seen[word as usize] |= 3 << shift;
            }
        }
        assert!(seen.iter().all(|word| *word == u64::MAX));
    }

    #[test]
    fn addresses_are_told_apart() {
        let v6 = |text: &str| text.parse::<core::net::Ipv6Addr>().expect("an address").octets();
        for inner in
            ["::1", "::ffff:127.0.0.1", "::ffff:127.9.9.9", "fe80::7", "febf::1", "::ffff:169.254.1.2"]
        {
            assert!(is_private_to_the_host(&v6(inner)) && !is_wildcard(&v6(inner)), "{inner}");
        }
        for outer in
            ["::", "::2", "::ffff:0.0.0.0", "::ffff:128.0.0.1", "fec0::1", "fd84::1", "1::1", "::127.0.0.1"]
        {
            assert!(!is_private_to_the_host(&v6(outer)), "{outer}");
        }
        assert!(
            is_wildcard(&v6("::"))
                && is_wildcard(&v6("::ffff:0.0.0.0"))
                && !is_wildcard(&v6("::ffff:0.0.0.1"))
        );
    }
}
