//! Sockets that wait for strangers, by NETLINK_SOCK_DIAG: TCP in LISTEN and UDP without a
//! peer, of the thread's network namespace.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use anyhow::Context;
use netlink_packet_core::Emitable;
use netlink_packet_sock_diag::inet::{ExtensionFlags, InetRequest, SocketId, StateFlags};

use super::netlink::{Netlink, NetlinkError, array_at, attributes, hint, u32_at};
use super::owners::Owners;
use crate::observed::Listener;
use crate::terms::{Family, Port, Proto};

/// Ordered by protocol, port and address, whatever the order of the kernel's tables.
pub fn read(owners: &mut Owners) -> anyhow::Result<Vec<Listener>> {
    let mut link = Netlink::open(PROTOCOL).context("read listening sockets")?;
    let mut all = Vec::new();
    for proto in Proto::ALL {
        for family in Family::ALL {
            let found = link
                .dump(SOCK_DIAG_BY_FAMILY, &request(proto, family), |payload, out| {
                    decode(payload, proto, out)
                })
                .map_err(|error| {
                    let hint = hint(&error);
                    anyhow::Error::new(error).context(format!("read {proto} sockets of {family}{hint}"))
                })?;
            all.extend(found);
        }
    }
    sort(&mut all);
    owners.look_up(all.iter().map(|listener| listener.inode))?;
    for listener in &mut all {
        listener.owner = owners.of(listener.inode).cloned();
    }
    Ok(all)
}

pub(super) const PROTOCOL: isize = netlink_sys::protocols::NETLINK_SOCK_DIAG;
pub(super) const SOCK_DIAG_BY_FAMILY: u16 = 20;
const TCP_CLOSE: u8 = 7;
const TCP_LISTEN: u8 = 10;
const INET_DIAG_SKV6ONLY: u16 = 11;
/// The size of `struct inet_diag_msg`; attributes follow.
const MESSAGE: usize = 72;

pub(super) fn request(proto: Proto, family: Family) -> Vec<u8> {
    let (family, socket_id) = match family {
        Family::Ipv4 => (libc::AF_INET as u8, SocketId::new_v4()),
        Family::Ipv6 => (libc::AF_INET6 as u8, SocketId::new_v6()),
    };
    let states = match proto {
        Proto::Tcp => StateFlags::LISTEN,
        // A connected UDP socket is ESTABLISHED and takes packets of its peer only.
        Proto::Udp => StateFlags::CLOSE,
    };
    let request = InetRequest {
        family,
        protocol: proto.number(),
        extensions: ExtensionFlags::empty(),
        states,
        socket_id,
    };
    let mut bytes = vec![0; request.buffer_len()];
    request.emit(&mut bytes);
    bytes
}

/// One `struct inet_diag_msg`. Decoded by hand, since the packet crate builds every
/// attribute of every socket on the heap, and there may be tens of thousands.
pub(super) fn decode(payload: &[u8], proto: Proto, out: &mut Vec<Listener>) -> Result<(), NetlinkError> {
    let cut = || NetlinkError::Truncated("a socket");
    let (message, rest) = payload.split_at_checked(MESSAGE).ok_or_else(cut)?;
    let [family, state] = array_at(message, 0).ok_or_else(cut)?;
    let port = u16::from_be_bytes(array_at(message, 4).ok_or_else(cut)?);
    let address: [u8; 16] = array_at(message, 8).ok_or_else(cut)?;
    let device = u32_at(message, 40).ok_or_else(cut)?;
    let uid = u32_at(message, 64).ok_or_else(cut)?;
    let inode = u32_at(message, 68).ok_or_else(cut)?;

    let wanted = match proto {
        Proto::Tcp => TCP_LISTEN,
        Proto::Udp => TCP_CLOSE,
    };
    if state != wanted {
        return Err(NetlinkError::Malformed("a socket in a state that was not asked for"));
    }
    let (address, v6only) = match i32::from(family) {
        libc::AF_INET => {
            let [a, b, c, d, ..] = address;
            (IpAddr::V4(Ipv4Addr::new(a, b, c, d)), false)
        }
        libc::AF_INET6 => {
            let mut v6only = false;
            for attribute in attributes(rest) {
                if let (INET_DIAG_SKV6ONLY, value) = attribute? {
                    v6only = *value.first().ok_or_else(cut)? != 0;
                }
            }
            (IpAddr::V6(Ipv6Addr::from(address)), v6only)
        }
        _ => return Err(NetlinkError::Malformed("a socket of another address family")),
    };
    // A UDP socket without a port is bound to nothing.
    if let Some(port) = Port::new(port) {
        let device = (device != 0).then_some(device);
        out.push(Listener { proto, address, port, v6only, device, inode: inode.into(), uid, owner: None });
    }
    Ok(())
}

/// Sorts, and drops what a dump that ran beside changes listed twice.
fn sort(listeners: &mut Vec<Listener>) {
    listeners.sort_unstable_by(|a, b| {
        let rest = |l: &Listener| (l.address, l.device, l.inode);
        (a.proto, a.port).cmp(&(b.proto, b.port)).then_with(|| rest(a).cmp(&rest(b)))
    });
    listeners.dedup_by(|a, b| {
        a.inode == b.inode && (a.proto, a.port, a.address, a.device) == (b.proto, b.port, b.address, b.device)
    });
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream, UdpSocket};

    use expect_test::expect;
    use proptest::prelude::*;

    use super::*;
    use crate::source::netlink::replay;
    use crate::source::{in_namespace, sh};

    fn show(listeners: &[Listener]) -> String {
        let line = |l: &Listener| {
            let only = if l.v6only { " v6only" } else { "" };
            let device = l.device.map(|index| format!(" device {index}")).unwrap_or_default();
            format!("{} {} {}{only}{device} uid {}\n", l.proto, l.address, l.port, l.uid)
        };
        listeners.iter().map(line).collect()
    }

    fn captured() -> Vec<Listener> {
        let captures: [(Proto, &[u8]); 4] = [
            (Proto::Udp, include_bytes!("captures/udp-ipv6.bin")),
            (Proto::Udp, include_bytes!("captures/udp-ipv4.bin")),
            (Proto::Tcp, include_bytes!("captures/tcp-ipv6.bin")),
            (Proto::Tcp, include_bytes!("captures/tcp-ipv4.bin")),
        ];
        let mut all = Vec::new();
        for (proto, capture) in captures {
            all.extend(replay(capture, |payload, out| decode(payload, proto, out)).expect("a sound capture"));
        }
        sort(&mut all);
        all
    }

    #[test]
    fn a_capture_of_the_kernel_tells_addresses_v6only_and_devices() {
        // Recorded beside an established connection and a connected UDP socket.
        expect![[r#"
            tcp 0.0.0.0 22 uid 0
            tcp :: 80 uid 0
            tcp :: 443 v6only uid 0
            tcp ::1 5432 v6only uid 0
            tcp 127.0.0.1 8080 device 1 uid 0
            tcp 10.84.0.2 9984 uid 0
            udp 0.0.0.0 53 uid 0
            udp 10.84.0.2 123 device 3 uid 0
            udp :: 546 v6only uid 0
            udp :: 5353 uid 0
        "#]]
        .assert_eq(&show(&captured()));
    }

    #[test]
    fn what_a_dump_lists_twice_is_one_socket_and_reuseport_is_two() {
        let mut twice = captured();
        let once = twice.len();
        twice.extend(captured());
        let mut sibling = twice[0].clone();
        sibling.inode += 100_000;
        twice.push(sibling);
        sort(&mut twice);
        assert_eq!(twice.len(), once + 1);
    }

    #[test]
    fn a_socket_in_another_state_or_cut_off_is_an_error() {
        let capture = include_bytes!("captures/tcp-ipv6.bin");
        let mut sound = None;
        let _ = replay(capture, |payload, _: &mut Vec<()>| {
            sound.get_or_insert(payload.to_vec());
            Ok(())
        });
        let sound = sound.expect("a socket");
        assert!(decode(&sound, Proto::Tcp, &mut Vec::new()).is_ok());
        assert!(decode(&sound, Proto::Udp, &mut Vec::new()).is_err(), "a TCP state passed for UDP's");
        for cut in 0..MESSAGE {
            assert!(decode(&sound[..cut], Proto::Tcp, &mut Vec::new()).is_err(), "{cut} bytes were taken");
        }
        let mut family = sound.clone();
        family[0] = 1;
        assert!(decode(&family, Proto::Tcp, &mut Vec::new()).is_err());
    }

    proptest! {
        #[test]
        fn no_bytes_bring_the_decoder_down(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = decode(&bytes, Proto::Tcp, &mut Vec::new());
        }
    }

    #[test]
    fn listeners_come_with_their_owner_and_nothing_else_does() {
        if !in_namespace(
            "source::listeners::tests::listeners_come_with_their_owner_and_nothing_else_does",
            &[],
        ) {
            return;
        }
        sh("ip link set lo up");
        let mut owners = Owners::new();
        assert_eq!(read(&mut owners).expect("read"), [], "a fresh namespace has listeners");

        let four = TcpListener::bind("127.0.0.1:0").expect("bound");
        let six = TcpListener::bind("[::]:0").expect("bound");
        let udp = UdpSocket::bind("0.0.0.0:0").expect("bound");
        let connected = UdpSocket::bind("127.0.0.1:0").expect("bound");
        connected
            .connect(udp.local_addr().map(|a| (Ipv4Addr::LOCALHOST, a.port())).expect("bound"))
            .expect("peer");
        let _stream = TcpStream::connect(four.local_addr().expect("bound")).expect("connected");

        let found = read(&mut owners).expect("read");
        let mut wanted = [
            (Proto::Tcp, four.local_addr().expect("bound"), false),
            (Proto::Tcp, six.local_addr().expect("bound"), false),
            (Proto::Udp, udp.local_addr().expect("bound"), false),
        ];
        wanted.sort_by_key(|(proto, address, _)| (*proto, address.port()));
        let seen: Vec<_> =
            found.iter().map(|l| (l.proto, (l.address, l.port.get()).into(), l.v6only)).collect();
        assert_eq!(seen, wanted);
        for listener in &found {
            assert_eq!(
                listener.owner.as_ref().map(|owner| owner.pid),
                Some(std::process::id()),
                "{listener:?}"
            );
        }

        drop(six);
        assert_eq!(read(&mut owners).expect("read").len(), 2);
    }

    #[test]
    fn ten_thousand_sockets_are_all_there() {
        if !in_namespace("source::listeners::tests::ten_thousand_sockets_are_all_there", &[]) {
            return;
        }
        sh("ip link set lo up");
        let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
        let raised = rustix::process::Rlimit { current: limit.maximum, maximum: limit.maximum };
        rustix::process::setrlimit(rustix::process::Resource::Nofile, raised).expect("a limit");
        // Each loopback address has its own ports, so that one port is enough.
        let address = |n: u16| Ipv4Addr::new(127, 1, (n >> 8) as u8, n as u8);
        let sockets: Vec<_> =
            (0..10_000).map(|n| UdpSocket::bind((address(n), 5000)).expect("bound")).collect();
        let found = read(&mut Owners::new()).expect("read");
        assert_eq!(found.len(), sockets.len());
        let owned =
            found.iter().filter(|l| l.owner.as_ref().is_some_and(|o| o.pid == std::process::id())).count();
        assert_eq!(owned, sockets.len());
    }
}
