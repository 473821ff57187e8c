//! bpf(2) for other people's programs, which are asked about a packet that nobody sent.

use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd, OwnedFd};

use super::probe::{BPF_PROG_TEST_RUN, TestRun, call, descriptor};

const BPF_PROG_GET_FD_BY_ID: libc::c_long = 13;
const BPF_PROG_QUERY: libc::c_long = 16;
const BPF_CGROUP_INET_INGRESS: u32 = 0;
const BPF_SK_LOOKUP: u32 = 36;
const BPF_F_QUERY_EFFECTIVE: u32 = 1;
/// The kernel allows so many on a control group, with those that it inherits.
const PROGRAMS_MAX: usize = 64;

/// The programs that decide about what sockets of a control group receive, its own and those that
/// it inherits, by number. Linux 4.15; an error where the kernel has no such programs.
pub fn of_group(group: BorrowedFd<'_>) -> io::Result<Vec<u32>> {
    query(group, BPF_CGROUP_INET_INGRESS, BPF_F_QUERY_EFFECTIVE)
}

/// The programs that choose sockets in a network namespace (sk_lookup), by number. Linux 5.9.
pub fn of_namespace(namespace: BorrowedFd<'_>) -> io::Result<Vec<u32>> {
    query(namespace, BPF_SK_LOOKUP, 0)
}

fn query(target: BorrowedFd<'_>, attach_type: u32, query_flags: u32) -> io::Result<Vec<u32>> {
    #[repr(C)]
    struct Query {
        target: u32,
        attach_type: u32,
        query_flags: u32,
        attach_flags: u32,
        ids: u64,
        count: u32,
        _hole: u32,
    }
    let mut ids = [0u32; PROGRAMS_MAX];
    let mut attr = Query {
        target: target.as_raw_fd() as u32,
        attach_type,
        query_flags,
        attach_flags: 0,
        ids: ids.as_mut_ptr() as u64,
        count: PROGRAMS_MAX as u32,
        _hole: 0,
    };
    // SAFETY: the kernel writes at most `count` numbers to `ids`, which outlives the call.
    unsafe { call(BPF_PROG_QUERY, &mut attr) }?;
    Ok(ids.into_iter().take(attr.count as usize).collect())
}

/// Takes CAP_SYS_ADMIN.
pub fn by_id(id: u32) -> io::Result<OwnedFd> {
    #[repr(C)]
    struct ById {
        id: u32,
        next: u32,
        flags: u32,
    }
    let mut attr = ById { id, next: 0, flags: 0 };
    // SAFETY: the kernel reads the attributes and nothing that they point to; the descriptor is new.
    unsafe { descriptor(BPF_PROG_GET_FD_BY_ID, &mut attr) }
}

/// How a program takes its packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Context {
    /// `struct xdp_md`. Linux 5.15 tells such a program which device it is.
    Frame,
    /// `struct __sk_buff`, of which the kernel takes the Ethernet header away. Linux 5.9.
    Packet,
}

/// What a program says to a frame that came in by this device; `out` gets the frame as it leaves it, cut to fit.
pub fn run(
    program: BorrowedFd<'_>,
    context: Context,
    index: u32,
    frame: &[u8],
    out: &mut [u8; 256],
) -> io::Result<u32> {
    // In words. xdp_md: data, data_end, data_meta, the device; __sk_buff: the device is the eleventh.
    let mut words = [0u32; 48];
    let length = match context {
        Context::Frame => {
            (words[1], words[3]) = (frame.len() as u32, index);
            6
        }
        Context::Packet => {
            words[10] = index;
            words.len()
        }
    };
    let mut attr = TestRun {
        program: program.as_raw_fd() as u32,
        data_size_in: frame.len() as u32,
        data_size_out: out.len() as u32,
        data_in: frame.as_ptr() as u64,
        data_out: out.as_mut_ptr() as u64,
        repeat: 1,
        context_size_in: 4 * length as u32,
        context_in: words.as_ptr() as u64,
        ..TestRun::default()
    };
    // SAFETY: the kernel reads the frame and the context and writes at most `data_size_out` bytes to `out`; all
    // three outlive the call and are as long as it says.
    match unsafe { call(BPF_PROG_TEST_RUN, &mut attr) } {
        // It grew beyond what fits, which changes nothing about what was said.
        Err(error) if error.raw_os_error() != Some(libc::ENOSPC) => Err(error),
        _ => Ok(attr.retval),
    }
}

/// `struct bpf_sk_lookup`: whom the kernel looks a socket up for. Addresses as they are in the packet.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Search {
    /// Zero; after the run, the socket that was chosen.
    pub cookie: u64,
    pub family: u32,
    pub proto: u32,
    pub remote_ip4: [u8; 4],
    pub remote_ip6: [u8; 16],
    /// In the order of the network.
    pub remote_port: [u8; 2],
    pub _hole: [u8; 2],
    pub local_ip4: [u8; 4],
    pub local_ip6: [u8; 16],
    pub local_port: u32,
    /// The device, which a run takes as zero only; and padding.
    pub _end: [u8; 8],
}
const _: () = assert!(size_of::<Search>() == 72);

/// Which socket an sk_lookup program chooses, by its cookie: `Some(None)`: the one that the kernel finds without
/// it; `None`: none at all. Linux 5.13.
pub fn choice(program: BorrowedFd<'_>, search: &Search) -> io::Result<Option<Option<u64>>> {
    const DROP: u32 = 0;
    let mut out = *search;
    let mut attr = TestRun {
        program: program.as_raw_fd() as u32,
        repeat: 1,
        context_size_in: size_of::<Search>() as u32,
        context_size_out: size_of::<Search>() as u32,
        context_in: std::ptr::from_ref(search) as u64,
        context_out: (&raw mut out) as u64,
        ..TestRun::default()
    };
    // SAFETY: the kernel reads one search and writes another, of integers only; both outlive the call and are as
    // long as it says.
    unsafe { call(BPF_PROG_TEST_RUN, &mut attr) }?;
    Ok(match (attr.retval, out.cookie) {
        (DROP, _) => None,
        (_, 0) => Some(None),
        (_, cookie) => Some(Some(cookie)),
    })
}
