//! bpf(2) for the programs of an audit: maps that are memory, programs of a type that aya
//! doesn't know, links that end with their descriptor, and runs of the injector.

use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd};
use std::ptr::NonNull;

use aya_obj::generated::bpf_insn;

const BPF_MAP_CREATE: libc::c_long = 0;
const BPF_PROG_LOAD: libc::c_long = 5;
pub(super) const BPF_PROG_TEST_RUN: libc::c_long = 10;
const BPF_LINK_CREATE: libc::c_long = 28;
const BPF_MAP_TYPE_ARRAY: u32 = 2;
const BPF_F_MMAPABLE: u32 = 1 << 10;
const BPF_F_BEFORE: u32 = 1 << 3;
const BPF_F_AFTER: u32 = 1 << 4;
const BPF_F_LINK: u32 = 1 << 13;
const BPF_TCX_INGRESS: u32 = 46;
const BPF_TCX_EGRESS: u32 = 47;
const BPF_NETFILTER: u32 = 45;
const BPF_PROG_TYPE_SOCKET_FILTER: u32 = 1;
const BPF_PROG_TYPE_SCHED_CLS: u32 = 3;
const BPF_PROG_TYPE_NETFILTER: u32 = 32;

/// What a program is loaded as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Classifier,
    Netfilter,
    SocketFilter,
}

/// An array map that is mapped into this process, so that reading it costs no call.
///
/// The kernel's programs write to it meanwhile, so every access is a single volatile copy
/// and no reference into it ever exists.
pub struct Mapped<T: aya::Pod> {
    map: OwnedFd,
    memory: NonNull<u8>,
    bytes: usize,
    entries: u32,
    entry: PhantomData<T>,
}

// SAFETY: the mapping lasts as long as the value and is not tied to a thread; every access is a volatile copy,
// as it has to be beside the kernel's own, and writing takes `&mut`.
unsafe impl<T: aya::Pod + Send> Send for Mapped<T> {}
// SAFETY: the same.
unsafe impl<T: aya::Pod + Sync> Sync for Mapped<T> {}

impl<T: aya::Pod> Mapped<T> {
    const STRIDE: usize = size_of::<T>().next_multiple_of(8);

    pub fn create(entries: u32) -> io::Result<Self> {
        #[repr(C)]
        struct MapCreate {
            kind: u32,
            key_size: u32,
            value_size: u32,
            max_entries: u32,
            flags: u32,
        }
        let mut attr = MapCreate {
            kind: BPF_MAP_TYPE_ARRAY,
            key_size: 4,
            value_size: size_of::<T>() as u32,
            max_entries: entries,
            flags: BPF_F_MMAPABLE,
        };
        // SAFETY: the kernel reads the attributes and nothing that they point to.
        let map = unsafe { descriptor(BPF_MAP_CREATE, &mut attr) }?;
        // The kernel rounds up to whole pages by itself; the length need not be one.
        let bytes = Self::STRIDE * entries as usize;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let memory = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                map.as_raw_fd(),
                0,
            )
        };
        if memory == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let memory = NonNull::new(memory.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { map, memory, bytes, entries, entry: PhantomData })
    }

    /// `None` beyond the end.
    pub fn get(&self, index: u32) -> Option<T> {
        let at = self.at(index)?;
        // SAFETY: inside the mapping and aligned, as strides are multiples of 8; any bytes
        // are a value of a Pod type.
        Some(unsafe { at.read_volatile() })
    }

    /// `false` beyond the end.
    pub fn set(&mut self, index: u32, value: T) -> bool {
        let Some(at) = self.at(index) else { return false };
        // SAFETY: as above; nobody holds a reference into the mapping.
        unsafe { at.write_volatile(value) };
        true
    }

    fn at(&self, index: u32) -> Option<*mut T> {
        // SAFETY: below the number of entries, so inside the mapping.
        (index < self.entries)
            .then(|| unsafe { self.memory.as_ptr().add(index as usize * Self::STRIDE).cast() })
    }
}

impl<T: aya::Pod> AsFd for Mapped<T> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.map.as_fd()
    }
}

impl<T: aya::Pod> Drop for Mapped<T> {
    fn drop(&mut self) {
        // SAFETY: mapped by `create` with this length, and not used after this.
        unsafe { libc::munmap(self.memory.as_ptr().cast(), self.bytes) };
    }
}

/// Loads a program; `log` gets what the verifier says when it refuses.
pub fn load(kind: Kind, code: &[bpf_insn], log: &mut [u8]) -> io::Result<OwnedFd> {
    #[repr(C)]
    struct ProgLoad {
        kind: u32,
        instructions: u32,
        code: u64,
        license: u64,
        log_level: u32,
        log_size: u32,
        log_buf: u64,
        kern_version: u32,
        flags: u32,
        name: [u8; 16],
        ifindex: u32,
        expected_attach_type: u32,
    }
    let (program_type, expected_attach_type) = match kind {
        Kind::Classifier => (BPF_PROG_TYPE_SCHED_CLS, 0),
        Kind::Netfilter => (BPF_PROG_TYPE_NETFILTER, BPF_NETFILTER),
        Kind::SocketFilter => (BPF_PROG_TYPE_SOCKET_FILTER, 0),
    };
    let mut attr = ProgLoad {
        kind: program_type,
        instructions: code.len() as u32,
        code: code.as_ptr() as u64,
        license: c"Dual MIT/GPL".as_ptr() as u64,
        log_level: 0,
        log_size: 0,
        log_buf: 0,
        kern_version: 0,
        flags: 0,
        name: *b"spokeguard_probe",
        ifindex: 0,
        expected_attach_type,
    };
    attr.name[15] = 0;
    // SAFETY: the code and the licence outlive the call, and nothing else is pointed to.
    match unsafe { descriptor(BPF_PROG_LOAD, &mut attr) } {
        Err(error) if !log.is_empty() && error.raw_os_error() != Some(libc::EPERM) => {
            (attr.log_level, attr.log_size, attr.log_buf) = (1, log.len() as u32, log.as_mut_ptr() as u64);
            // SAFETY: as above, and the kernel writes at most `log_size` bytes to `log`.
            unsafe { descriptor(BPF_PROG_LOAD, &mut attr) }
        }
        other => other,
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    In,
    Out,
}

/// Where a classifier goes among the others of a device.
#[derive(Clone, Copy, Debug)]
pub enum Rank<'a> {
    First,
    /// Right before this link.
    Before(BorrowedFd<'a>),
    /// Right behind it.
    Behind(BorrowedFd<'a>),
}

/// Puts a classifier on a device; it leaves with the descriptor.
pub fn attach_tcx(
    program: BorrowedFd<'_>,
    index: u32,
    direction: Direction,
    rank: Rank<'_>,
) -> io::Result<OwnedFd> {
    #[repr(C)]
    struct LinkCreate {
        program: u32,
        index: u32,
        attach_type: u32,
        flags: u32,
        relative: u32,
        _hole: u32,
        expected_revision: u64,
    }
    let mut attr = LinkCreate {
        program: program.as_raw_fd() as u32,
        index,
        attach_type: match direction {
            Direction::In => BPF_TCX_INGRESS,
            Direction::Out => BPF_TCX_EGRESS,
        },
        flags: match rank {
            Rank::First => BPF_F_BEFORE,
            Rank::Before(_) => BPF_F_BEFORE | BPF_F_LINK,
            Rank::Behind(_) => BPF_F_AFTER | BPF_F_LINK,
        },
        relative: match rank {
            Rank::First => 0,
            Rank::Before(link) | Rank::Behind(link) => link.as_raw_fd() as u32,
        },
        _hole: 0,
        expected_revision: 0,
    };
    // SAFETY: the kernel reads the attributes and nothing that they point to.
    unsafe { descriptor(BPF_LINK_CREATE, &mut attr) }
}

/// Hooks of netfilter (uapi/linux/netfilter.h).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hook {
    LocalIn = 1,
    Forward = 2,
    PostRouting = 4,
}

/// Puts a program into a netfilter hook; it leaves with the descriptor.
pub fn attach_netfilter(
    program: BorrowedFd<'_>,
    family: crate::terms::Family,
    hook: Hook,
    priority: i32,
) -> io::Result<OwnedFd> {
    #[repr(C)]
    struct LinkCreate {
        program: u32,
        target: u32,
        attach_type: u32,
        flags: u32,
        family: u32,
        hook: u32,
        priority: i32,
        netfilter_flags: u32,
    }
    const NFPROTO_IPV4: u32 = 2;
    const NFPROTO_IPV6: u32 = 10;
    let mut attr = LinkCreate {
        program: program.as_raw_fd() as u32,
        target: 0,
        attach_type: BPF_NETFILTER,
        flags: 0,
        family: match family {
            crate::terms::Family::Ipv4 => NFPROTO_IPV4,
            crate::terms::Family::Ipv6 => NFPROTO_IPV6,
        },
        hook: hook as u32,
        priority,
        netfilter_flags: 0,
    };
    // SAFETY: the kernel reads the attributes and nothing that they point to.
    unsafe { descriptor(BPF_LINK_CREATE, &mut attr) }
}

/// Where what a packet socket gives begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layer {
    Link,
    Network,
}

/// Shows a program every packet of a device, before tc and netfilter; it leaves with the
/// descriptor. What the program lets through can be received.
pub fn tap(program: BorrowedFd<'_>, index: u32, layer: Layer) -> io::Result<OwnedFd> {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};
    // Of no protocol, so that nothing arrives before the filter is there.
    let kind = match layer {
        Layer::Link => SocketType::RAW,
        Layer::Network => SocketType::DGRAM,
    };
    let socket = socket_with(AddressFamily::PACKET, kind, SocketFlags::CLOEXEC, None)?;
    let filter = program.as_raw_fd();
    // SAFETY: the kernel reads an integer that outlives the call.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ATTACH_BPF,
            (&raw const filter).cast(),
            size_of_val(&filter) as libc::socklen_t,
        )
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    let address = libc::sockaddr_ll {
        sll_family: libc::AF_PACKET as u16,
        sll_protocol: (libc::ETH_P_ALL as u16).to_be(),
        sll_ifindex: i32::try_from(index).map_err(|_| io::ErrorKind::InvalidInput)?,
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 0,
        sll_addr: [0; 8],
    };
    // SAFETY: the kernel reads the address, which is as long as said and outlives the call.
    let result = unsafe {
        libc::bind(socket.as_raw_fd(), (&raw const address).cast(), size_of_val(&address) as libc::socklen_t)
    };
    if result != 0 { Err(io::Error::last_os_error()) } else { Ok(socket) }
}

/// How many packets did not fit into a packet socket's buffer since this was last asked.
pub fn missed(socket: BorrowedFd<'_>) -> io::Result<u64> {
    // struct tpacket_stats: packets, of which dropped.
    let mut stats = [0u32; 2];
    let mut length = size_of_val(&stats) as libc::socklen_t;
    // SAFETY: the kernel writes at most `length` bytes to `stats`, which outlives the call.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_PACKET,
            libc::PACKET_STATISTICS,
            stats.as_mut_ptr().cast(),
            &raw mut length,
        )
    };
    if result == 0 { Ok(u64::from(stats[1])) } else { Err(io::Error::last_os_error()) }
}

/// Kernels before 5.9 know no context and take the rest as long as it is zero.
#[repr(C)]
#[derive(Default)]
pub(super) struct TestRun {
    pub(super) program: u32,
    pub(super) retval: u32,
    pub(super) data_size_in: u32,
    pub(super) data_size_out: u32,
    pub(super) data_in: u64,
    pub(super) data_out: u64,
    pub(super) repeat: u32,
    pub(super) duration: u32,
    pub(super) context_size_in: u32,
    pub(super) context_size_out: u32,
    pub(super) context_in: u64,
    pub(super) context_out: u64,
}

/// Runs a classifier `repeat` times over a packet, which starts with an Ethernet header.
pub fn test_run(program: BorrowedFd<'_>, packet: &[u8], repeat: u32) -> io::Result<()> {
    let mut attr = TestRun {
        program: program.as_raw_fd() as u32,
        data_size_in: packet.len() as u32,
        data_in: packet.as_ptr() as u64,
        repeat,
        ..TestRun::default()
    };
    loop {
        // SAFETY: the kernel reads the packet, which outlives the call, and writes back
        // into `attr` alone.
        let result = unsafe { call(BPF_PROG_TEST_RUN, &mut attr) };
        match result {
            // A signal between two repetitions ends the run; the caller sees what is missing.
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return Ok(()),
            // Another run of this program is under way in the kernel.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => std::thread::yield_now(),
            other => return other.map(|_| ()),
        }
    }
}

/// Waits until every CPU has finished the packets it is at.
pub fn settle() {
    const MEMBARRIER_CMD_GLOBAL: libc::c_int = 1;
    // SAFETY: takes three integers. It waits for an RCU grace period, and packets are
    // handled inside RCU read sections.
    let result = unsafe { libc::syscall(libc::SYS_membarrier, MEMBARRIER_CMD_GLOBAL, 0, 0) };
    if result != 0 {
        // Not there with nohz_full; ten ticks are as good for packets that take microseconds.
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
}

/// # Safety
/// As for [`call`], and the command must return a new descriptor.
pub(super) unsafe fn descriptor<T>(command: libc::c_long, attr: &mut T) -> io::Result<OwnedFd> {
    // SAFETY: by the caller.
    let fd = unsafe { call(command, attr) }?;
    // SAFETY: the command returned a new descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// # Safety
/// `T` must be laid out as the head of `union bpf_attr` for this command, and all that it
/// points to must be as long as it says. The kernel takes what is left out as zero.
pub(super) unsafe fn call<T>(command: libc::c_long, attr: &mut T) -> io::Result<i32> {
    // SAFETY: by the caller; the attributes outlive the call.
    let result = unsafe {
        libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attr), size_of::<T>() as libc::c_uint)
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    i32::try_from(result).map_err(|_| io::Error::from(io::ErrorKind::InvalidData))
}
