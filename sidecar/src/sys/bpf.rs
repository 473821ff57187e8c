//! What aya has no call for: opening a pin without knowing what it is, where a link is
//! attached, and the mounts around bpffs.

use std::ffi::{CStr, CString};
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use aya::Pod;
use aya::maps::{MapData, RingBuf};
use aya_log::EbpfLogger;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// A ring buffer that a task can wait for. Call it inside a tokio runtime.
pub fn poll_ring(ring: RingBuf<MapData>) -> io::Result<AsyncFd<RingBuf<MapData>>> {
    // SAFETY: the ring owns the map's descriptor, never exchanges it, and closes it only
    // when dropped, which the AsyncFd does after deregistering.
    Ok(unsafe { AsyncFd::register_with_interest(ring, Interest::READABLE) }?)
}

/// The same for aya-log's ring.
pub fn poll_log(logger: ProgramLogger) -> io::Result<AsyncFd<ProgramLogger>> {
    // SAFETY: as above; the logger owns a ring.
    Ok(unsafe { AsyncFd::register_with_interest(logger, Interest::READABLE) }?)
}

pub type ProgramLogger = EbpfLogger<&'static dyn log::Log>;

/// A tcx link as the kernel describes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TcxLink {
    pub program_id: u32,
    /// 0 when the device is gone and only the pin keeps the link.
    pub index: u32,
}

const BPF_OBJ_GET: libc::c_long = 7;
const BPF_OBJ_GET_INFO_BY_FD: libc::c_long = 15;
const BPF_MAP_LOOKUP_BATCH: libc::c_long = 24;
const BPF_LINK_DETACH: libc::c_long = 34;
const BPF_LINK_TYPE_TCX: u32 = 11;

/// Opens whatever is pinned there: a map, a program or a link.
pub fn open_pin(path: &Path) -> io::Result<OwnedFd> {
    /// The head of `union bpf_attr` for BPF_OBJ_GET. Fields that are left out are zero to
    /// the kernel, which takes any size.
    #[repr(C)]
    struct ObjGet {
        pathname: u64,
        bpf_fd: u32,
        file_flags: u32,
    }
    let path = CString::new(path.as_os_str().as_bytes())?;
    let attr = ObjGet { pathname: path.as_ptr() as u64, bpf_fd: 0, file_flags: 0 };
    // SAFETY: the kernel reads size_of::<ObjGet>() bytes of `attr` and the string it
    // points to; both outlive the call.
    let fd = unsafe {
        libc::syscall(libc::SYS_bpf, BPF_OBJ_GET, &raw const attr, size_of::<ObjGet>() as libc::c_uint)
    };
    let fd = i32::try_from(fd).map_err(|_| io::Error::from(io::ErrorKind::InvalidData))?;
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call returned a new descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Every entry of a map, up to `most` of them, in a few calls (BPF_MAP_LOOKUP_BATCH; of an LPM trie since Linux 5.13).
/// Of a map that changes meanwhile some may be missing or there twice. `None`: this kernel can't.
pub fn entries<K: Pod, V: Pod>(map: &MapData, most: usize) -> io::Result<Option<Vec<(K, V)>>> {
    /// The head of `union bpf_attr` for this call.
    #[repr(C)]
    struct Batch {
        in_batch: u64,
        out_batch: u64,
        keys: u64,
        values: u64,
        count: u32,
        map_fd: u32,
        elem_flags: u64,
        flags: u64,
    }
    /// ENOTSUPP, which no libc names.
    const NOT_SUPPORTED: i32 = 524;
    const AT_ONCE: usize = 1024;
    let info = map.info().map_err(io::Error::other)?;
    if (info.key_size() as usize, info.value_size() as usize) != (size_of::<K>(), size_of::<V>()) {
        return Err(io::Error::other("a map of other entries"));
    }
    let mut keys = Vec::<K>::with_capacity(AT_ONCE);
    let mut values = Vec::<V>::with_capacity(AT_ONCE);
    // Where one call ended and the next begins: a key.
    let mut last = std::mem::MaybeUninit::<K>::uninit();
    let (mut out, mut begun) = (Vec::new(), false);
    while out.len() < most {
        let last = last.as_mut_ptr() as u64;
        let mut attr = Batch {
            in_batch: if begun { last } else { 0 },
            out_batch: last,
            keys: keys.as_mut_ptr() as u64,
            values: values.as_mut_ptr() as u64,
            count: AT_ONCE as u32,
            map_fd: map.fd().as_fd().as_raw_fd() as u32,
            elem_flags: 0,
            flags: 0,
        };
        // SAFETY: the kernel reads and writes size_of::<Batch>() bytes of `attr`, writes at most `count` keys and
        // values, whose sizes were compared and for which there is room, and a key into `last`, which it has
        // written when it reads it.
        let result = unsafe {
            libc::syscall(
                libc::SYS_bpf,
                BPF_MAP_LOOKUP_BATCH,
                &raw mut attr,
                size_of::<Batch>() as libc::c_uint,
            )
        };
        let ended = if result == 0 { None } else { Some(io::Error::last_os_error()) };
        match ended.as_ref().and_then(io::Error::raw_os_error) {
            None | Some(libc::ENOENT) => {}
            Some(NOT_SUPPORTED | libc::EINVAL | libc::EOPNOTSUPP) if !begun => return Ok(None),
            Some(_) => return Err(ended.unwrap_or_else(io::Error::last_os_error)),
        }
        let count = (attr.count as usize).min(AT_ONCE);
        // SAFETY: the kernel has written as many, and any bytes are a `Pod`.
        unsafe {
            keys.set_len(count);
            values.set_len(count);
        }
        out.extend(keys.drain(..).zip(values.drain(..)));
        if ended.is_some() || count == 0 {
            break;
        }
        begun = true;
    }
    out.truncate(most);
    Ok(Some(out))
}

/// Where a tcx link is attached and what runs there.
pub fn tcx_link(link: BorrowedFd<'_>) -> io::Result<TcxLink> {
    /// The head of `struct bpf_link_info`, up to the end of its tcx part.
    #[repr(C)]
    #[derive(Default)]
    struct LinkInfo {
        kind: u32,
        id: u32,
        program_id: u32,
        _hole: u32,
        index: u32,
        attach_type: u32,
    }
    let info: LinkInfo = link_info(link)?;
    if info.kind != BPF_LINK_TYPE_TCX {
        return Err(io::Error::other("not a tcx link"));
    }
    Ok(TcxLink { program_id: info.program_id, index: info.index })
}

/// A link to a control group as the kernel describes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CgroupLink {
    pub program_id: u32,
    /// The inode of the control group; 0 when it is gone and only the pin keeps the link.
    pub cgroup: u64,
}

/// Where a link to a control group is attached and what runs there.
pub fn cgroup_link(link: BorrowedFd<'_>) -> io::Result<CgroupLink> {
    const BPF_LINK_TYPE_CGROUP: u32 = 3;
    /// The head of `struct bpf_link_info`, up to the end of its cgroup part.
    #[repr(C)]
    #[derive(Default)]
    struct LinkInfo {
        kind: u32,
        id: u32,
        program_id: u32,
        _hole: u32,
        cgroup: u64,
        attach_type: u32,
        _end: u32,
    }
    let info: LinkInfo = link_info(link)?;
    if info.kind != BPF_LINK_TYPE_CGROUP {
        return Err(io::Error::other("not a link to a control group"));
    }
    Ok(CgroupLink { program_id: info.program_id, cgroup: info.cgroup })
}

/// What the kernel says of a link.
///
/// `T` is the head of `struct bpf_link_info`: `repr(C)`, integers only, no padding.
fn link_info<T: Default>(link: BorrowedFd<'_>) -> io::Result<T> {
    #[repr(C)]
    struct InfoByFd {
        bpf_fd: u32,
        info_len: u32,
        info: u64,
    }
    let mut info = T::default();
    let attr = InfoByFd {
        bpf_fd: link.as_raw_fd() as u32,
        info_len: size_of::<T>() as u32,
        info: (&raw mut info) as u64,
    };
    // SAFETY: the kernel reads `attr` and writes at most `info_len` bytes to `info`,
    // which is that long; both outlive the call. Every bit pattern is a value of integers.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            BPF_OBJ_GET_INFO_BY_FD,
            &raw const attr,
            size_of::<InfoByFd>() as libc::c_uint,
        )
    };
    if result != 0 { Err(io::Error::last_os_error()) } else { Ok(info) }
}

/// Takes the program off where the link has it, whoever else holds the link (Linux 5.9).
pub fn detach_link(link: BorrowedFd<'_>) -> io::Result<()> {
    let attr = link.as_raw_fd() as u32;
    // SAFETY: the kernel reads the four bytes of `attr`, which outlives the call.
    let result = unsafe {
        libc::syscall(libc::SYS_bpf, BPF_LINK_DETACH, &raw const attr, size_of::<u32>() as libc::c_uint)
    };
    if result != 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Returns when every program that was running on any CPU at the call has ended: what it
/// read before is no longer in use then.
pub fn wait_for_running_programs() {
    const MEMBARRIER_CMD_GLOBAL: libc::c_int = 1;
    // SAFETY: touches no memory. GLOBAL waits for an RCU grace period, and programs run
    // within RCU read-side sections.
    let done = unsafe { libc::syscall(libc::SYS_membarrier, MEMBARRIER_CMD_GLOBAL, 0, 0) };
    if done != 0 {
        // Refused by a filter, or by nohz_full. A program runs for microseconds.
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
}

/// Kernel memory that a map or program holds, as /proc tells it.
pub fn memory_bytes(object: impl AsFd) -> io::Result<u64> {
    let text = fs::read_to_string(format!("/proc/self/fdinfo/{}", object.as_fd().as_raw_fd()))?;
    memlock(&text).ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))
}

fn memlock(fdinfo: &str) -> Option<u64> {
    fdinfo.lines().find_map(|line| line.strip_prefix("memlock:"))?.trim().parse().ok()
}

/// Mounts a bpffs at /sys/fs/bpf, in the mount namespace of PID 1 if we may, else in our
/// own. The caller looks where it can be seen.
pub fn mount_bpffs() -> io::Result<()> {
    // Only a thread that shares its root and working directory with no other may enter
    // another mount namespace, so this one ends with the mount.
    let in_first = std::thread::spawn(|| {
        let first = fs::File::open("/proc/1/ns/mnt")?;
        // SAFETY: changes this thread only, which holds no path that it uses afterwards.
        if unsafe { libc::unshare(libc::CLONE_FS) } != 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: as above; the descriptor is open for the length of the call.
        if unsafe { libc::setns(first.as_raw_fd(), libc::CLONE_NEWNS) } != 0 {
            return Err(io::Error::last_os_error());
        }
        mount(c"bpf", c"/sys/fs/bpf", Some(c"bpf"), 0, Some(c"mode=0700"))
    });
    match in_first.join() {
        Ok(Ok(())) => Ok(()),
        _ => mount(c"bpf", c"/sys/fs/bpf", Some(c"bpf"), 0, Some(c"mode=0700")),
    }
}

/// Hides the kernel's type information from this process: aya parses all 5 MB of it
/// (30 MB of memory) whenever it loads an object, and ours has nothing to relocate. Only
/// for a process that does nothing but load.
pub fn hide_kernel_btf() -> io::Result<()> {
    // SAFETY: gives this thread a mount namespace of its own; no memory is involved.
    if unsafe { libc::unshare(libc::CLONE_NEWNS) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // Without this the next mount would appear on the whole machine.
    mount(c"none", c"/", None, libc::MS_REC | libc::MS_PRIVATE, None)?;
    mount(c"/dev/null", c"/sys/kernel/btf/vmlinux", None, libc::MS_BIND, None)
}

fn mount(
    source: &CStr,
    target: &CStr,
    kind: Option<&CStr>,
    flags: libc::c_ulong,
    data: Option<&CStr>,
) -> io::Result<()> {
    let pointer = |text: Option<&CStr>| text.map_or(std::ptr::null(), CStr::as_ptr);
    // SAFETY: every pointer is null or a C string that outlives the call.
    let result =
        unsafe { libc::mount(source.as_ptr(), target.as_ptr(), pointer(kind), flags, pointer(data).cast()) };
    if result != 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_read_from_fdinfo_and_nothing_else_passes_for_it() {
        let map = "pos:\t0\nflags:\t02000002\nmap_type:\t2\nmemlock:\t524624\nmap_id:\t7\n";
        assert_eq!(memlock(map), Some(524_624));
        assert_eq!(memlock("pos:\t0\nflags:\t02\n"), None);
        assert_eq!(memlock("memlock:\tmany\n"), None);
        let file = fs::File::open("/dev/null").expect("a file");
        assert!(memory_bytes(&file).is_err(), "a plain file holds no locked memory");
    }

    #[test]
    fn a_file_is_no_pin_and_no_link() {
        assert!(open_pin(Path::new("/proc/version")).is_err());
        let file = fs::File::open("/dev/null").expect("a file");
        assert!(tcx_link(file.as_fd()).is_err());
    }
}
