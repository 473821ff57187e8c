//! Sockets with options that the standard library can't set.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, ipproto, listen, socket_with, sockopt};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// A listening TCP socket on exactly this address, which need not exist yet: a mesh
/// address comes late at boot, and goes and comes when its device is made again.
///
/// An IPv6 socket takes IPv6 only, so that `::` never means IPv4 too.
pub fn listen_freebind(address: SocketAddr, backlog: u32) -> io::Result<TcpListener> {
    let (family, ipv6) = match address {
        SocketAddr::V4(_) => (AddressFamily::INET, false),
        SocketAddr::V6(_) => (AddressFamily::INET6, true),
    };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(family, SocketType::STREAM, flags, Some(ipproto::TCP))?;
    sockopt::set_socket_reuseaddr(&socket, true)?;
    if ipv6 {
        sockopt::set_ipv6_v6only(&socket, true)?;
        sockopt::set_ipv6_freebind(&socket, true)?;
    } else {
        sockopt::set_ip_freebind(&socket, true)?;
    }
    bind(&socket, &address)?;
    listen(&socket, i32::try_from(backlog).unwrap_or(i32::MAX))?;
    Ok(TcpListener::from(socket))
}

/// Binds a TCP socket of this mark and lets go of it again: whether it may be. The mark needs
/// CAP_NET_ADMIN.
pub fn try_bind(address: SocketAddr, mark: u32) -> io::Result<()> {
    use std::os::fd::AsRawFd as _;
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let socket = socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC, Some(ipproto::TCP))?;
    // SAFETY: the kernel reads the four bytes of `mark`, which outlives the call.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_MARK,
            (&raw const mark).cast(),
            size_of::<u32>() as libc::socklen_t,
        )
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(bind(&socket, &address)?)
}

/// A nonblocking descriptor that the tokio runtime watches. Unlike `AsyncFd` it never hands
/// the descriptor out to be replaced, so using it needs no unsafe code.
pub struct Readable(AsyncFd<OwnedFd>);

impl Readable {
    /// On a tokio runtime with IO; the descriptor must be nonblocking.
    pub fn new(descriptor: OwnedFd) -> io::Result<Self> {
        // SAFETY: an OwnedFd is open and ours; it stays inside this type, which neither
        // replaces nor closes it before the registration ends.
        Ok(Self(unsafe { AsyncFd::register_with_interest(descriptor, Interest::READABLE)? }))
    }

    /// The descriptor, for what it has to give right now.
    pub fn descriptor(&self) -> BorrowedFd<'_> {
        self.0.get_ref().as_fd()
    }

    /// Waits until `receive` gets something other than `WouldBlock`. Cancel safe: nothing
    /// is awaited between receiving and returning.
    pub async fn take<R>(&self, mut receive: impl FnMut(BorrowedFd<'_>) -> io::Result<R>) -> io::Result<R> {
        self.0.async_io(Interest::READABLE, |descriptor| receive(descriptor.as_fd())).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_that_is_not_there_can_be_listened_on() {
        // TEST-NET-1 and the documentation prefix: on no machine.
        for text in ["192.0.2.77:0", "[2001:db8::77]:0"] {
            let address: SocketAddr = text.parse().expect("an address");
            assert!(TcpListener::bind(address).is_err(), "{text} is an address of this machine");
            let listener = listen_freebind(address, 16).expect("a listener");
            assert_eq!(listener.local_addr().expect("bound").ip(), address.ip());
            let accepted = listener.accept().map(|_| ());
            assert_eq!(accepted.expect_err("nobody calls").kind(), io::ErrorKind::WouldBlock);
        }
    }

    #[test]
    fn a_listener_on_v6_leaves_v4_alone_and_a_taken_port_is_refused() {
        let six = listen_freebind("[::]:0".parse().expect("an address"), 1).expect("a listener");
        let port = six.local_addr().expect("bound").port();
        assert!(sockopt::ipv6_v6only(&six).expect("an option"));
        assert!(listen_freebind(format!("[::]:{port}").parse().expect("an address"), 1).is_err());
        let four = listen_freebind(format!("127.0.0.1:{port}").parse().expect("an address"), 1);
        assert!(four.is_ok(), "v4 was taken too: {four:?}");
    }
}
