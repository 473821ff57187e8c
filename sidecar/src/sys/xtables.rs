//! The tables of iptables-legacy, which nftables does not know of.

use std::ffi::c_int;
use std::io;
use std::os::fd::AsRawFd;

use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};

use crate::terms::Family;

/// IPT_SO_GET_INFO and IPT_SO_GET_ENTRIES; those of IPv6 are the same.
const GET_INFO: c_int = 64;
const GET_ENTRIES: c_int = 65;
/// XT_TABLE_MAXNAMELEN.
const NAME_MAX: usize = 32;
/// struct ipt_getinfo
const INFO: usize = 84;

/// struct ipt_getinfo of a table. Needs CAP_NET_ADMIN; an error also where it does not exist.
pub fn info(family: Family, table: &str) -> io::Result<Vec<u8>> {
    ask(family, table, GET_INFO, vec![0; INFO])
}

/// struct ipt_get_entries with the table's `size` bytes of entries, as `info` gave it.
pub fn entries(family: Family, table: &str, size: u32) -> io::Result<Vec<u8>> {
    let mut request = vec![0; NAME_MAX + 8 + size as usize];
    request[NAME_MAX..NAME_MAX + 4].copy_from_slice(&size.to_ne_bytes());
    ask(family, table, GET_ENTRIES, request)
}

fn ask(family: Family, table: &str, option: c_int, mut answer: Vec<u8>) -> io::Result<Vec<u8>> {
    let (family, level) = match family {
        Family::Ipv4 => (AddressFamily::INET, libc::IPPROTO_IP),
        Family::Ipv6 => (AddressFamily::INET6, libc::IPPROTO_IPV6),
    };
    if table.len() >= NAME_MAX {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    answer[..table.len()].copy_from_slice(table.as_bytes());
    let socket = socket_with(family, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?;
    let mut length = libc::socklen_t::try_from(answer.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    // SAFETY: the kernel reads and writes at most `length` bytes of `answer`, which is that
    // long; both outlive the call.
    let result = unsafe {
        libc::getsockopt(socket.as_raw_fd(), level, option, answer.as_mut_ptr().cast(), &raw mut length)
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    answer.truncate(length as usize);
    Ok(answer)
}
