//! Descriptors as a whole, whoever opened them.

use std::io;

/// Keeps from programs that are started from now on whatever is open at present beyond the
/// standard three: what our own starter forgot to close, too. Needs Linux 5.11.
pub fn keep_from_children() -> io::Result<()> {
    let first: libc::c_uint = 3;
    // SAFETY: changes a flag of descriptors and closes none; no memory is involved.
    let result =
        unsafe { libc::syscall(libc::SYS_close_range, first, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
