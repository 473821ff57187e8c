//! Which network namespace this is. Instances in different ones must not share pins,
//! sockets or state.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::fs::MetadataExt as _;

use rustix::net::{AddressFamily, SocketType};

/// Whether this is the network namespace of PID 1: the files below /proc/PID/net are files
/// of their own in each namespace, and unlike /proc/PID/ns anyone may look at them. Where
/// even that is hidden, this is taken to be the initial one.
pub fn is_initial() -> bool {
    match (fs::metadata("/proc/thread-self/net/dev"), fs::metadata("/proc/1/net/dev")) {
        (Ok(ours), Ok(first)) => (ours.dev(), ours.ino()) == (first.dev(), first.ino()),
        _ => true,
    }
}

/// A number that no other network namespace has or gets until the next boot (Linux 5.14).
pub fn cookie() -> Option<u64> {
    let socket = rustix::net::socket(AddressFamily::INET, SocketType::DGRAM, None).ok()?;
    socket_netns_cookie(&socket).ok()
}

/// What keeps this instance's directories apart: nothing in the initial namespace,
/// `netns-4097` in another. `None` as well where the kernel has no cookies.
pub fn instance_suffix() -> Option<String> {
    if is_initial() { None } else { cookie().map(|cookie| format!("netns-{cookie}")) }
}

/// From the kernel's uapi (asm-generic/socket.h); the libc crate has no name for it.
const SO_NETNS_COOKIE: libc::c_int = 71;

fn socket_netns_cookie(socket: &OwnedFd) -> io::Result<u64> {
    let mut cookie = 0u64;
    let mut length = size_of::<u64>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `length` bytes to `cookie`, which is that long;
    // both outlive the call.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut length,
        )
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    if length as usize != size_of::<u64>() {
        return Err(io::Error::from(io::ErrorKind::InvalidData));
    }
    Ok(cookie)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_namespace_has_one_cookie_and_another_namespace_another_one() {
        let cookie = cookie().expect("Linux 5.14 or later");
        assert!(cookie != 0);
        assert_eq!(super::cookie(), Some(cookie), "every socket of a namespace says the same");
        if is_initial() {
            assert_eq!(instance_suffix(), None);
        } else {
            assert_eq!(instance_suffix(), Some(format!("netns-{cookie}")));
        }
    }

    #[test]
    fn a_namespace_of_our_own_is_not_the_initial_one() {
        let elsewhere = std::thread::spawn(|| {
            // SAFETY: moves this thread alone, which ends with the test.
            if unsafe { libc::unshare(libc::CLONE_NEWNET) } != 0 {
                return Err(io::Error::last_os_error());
            }
            Ok((is_initial(), cookie(), instance_suffix()))
        });
        let (initial, other, suffix) =
            elsewhere.join().expect("a thread").expect("this test makes a network namespace: run it as root");
        assert!(!initial);
        assert!(other.is_some() && other != cookie());
        assert_eq!(suffix, other.map(|other| format!("netns-{other}")));
    }
}
