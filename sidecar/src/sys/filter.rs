//! Classic BPF on a socket: the kernel throws away what we would not look at.

use std::io;
use std::os::fd::{AsFd, AsRawFd as _};

/// One instruction: code, jump if true, jump if false, constant.
pub type Instruction = (u16, u8, u8, u32);

pub fn attach(socket: impl AsFd, program: &[Instruction]) -> io::Result<()> {
    let mut code: Vec<libc::sock_filter> =
        program.iter().map(|&(code, jt, jf, k)| libc::sock_filter { code, jt, jf, k }).collect();
    let length = u16::try_from(code.len()).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    let head = libc::sock_fprog { len: length, filter: code.as_mut_ptr() };
    // SAFETY: the kernel reads `head` and the `length` instructions that it points to, and
    // copies and checks them before the call returns; both live until then.
    let result = unsafe {
        libc::setsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ATTACH_FILTER,
            (&raw const head).cast(),
            size_of::<libc::sock_fprog>() as libc::socklen_t,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// How many packets the kernel threw away since the last time it was asked, since nobody
/// took those before them from this packet socket.
pub fn overrun(socket: impl AsFd) -> io::Result<u32> {
    let mut counts = libc::tpacket_stats { tp_packets: 0, tp_drops: 0 };
    let mut length = size_of::<libc::tpacket_stats>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `length` bytes to `counts`, which has room for them and
    // is made of integers alone; both live until the call returns.
    let result = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_PACKET,
            libc::PACKET_STATISTICS,
            (&raw mut counts).cast(),
            &raw mut length,
        )
    };
    if result == 0 { Ok(counts.tp_drops) } else { Err(io::Error::last_os_error()) }
}
