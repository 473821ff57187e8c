//! Interfaces and their addresses by rtnetlink, and waking when they change.

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::BorrowedFd;

use anyhow::Context;
use ipnet::IpNet;
use netlink_packet_core::Emitable;
use netlink_packet_route::address::AddressHeader;
use netlink_packet_route::link::{LinkFlags, LinkHeader, LinkLayerType};
use rtnetlink::MulticastGroup;
use rustix::io::Errno;
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType, bind, recv, socket_with};

use super::netlink::{Netlink, NetlinkError, array_at, attributes, hint, u32_at};
use crate::observed::Link;
use crate::sys::sockets::Readable;
use crate::terms::printable;

/// Ordered by index. Headers and the few attributes that count are decoded, not whole
/// messages: an attribute that a newer kernel adds must not make this facet blind.
pub fn read() -> anyhow::Result<Vec<Link>> {
    let explain = |what: &'static str| {
        move |error: NetlinkError| {
            let hint = hint(&error);
            anyhow::Error::new(error).context(format!("read {what}{hint}"))
        }
    };
    let mut route = Netlink::open(PROTOCOL).context("read interfaces")?;
    let links = route.dump(RTM_GETLINK, &link_request(), decode_link).map_err(explain("interfaces"))?;
    let addresses = route
        .dump(RTM_GETADDR, &address_request(), decode_address)
        .map_err(explain("interface addresses"))?;
    Ok(join(links, addresses))
}

/// Wakes when a link or an address changes. The event says only that, so that losing one
/// costs a look and no truth.
pub struct LinkEvents {
    socket: Readable,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinkEvent {
    /// The kernel dropped events, because more came than the socket holds.
    pub overrun: bool,
}

impl LinkEvents {
    /// On a tokio runtime, and in the network namespace of the calling thread.
    pub fn open() -> anyhow::Result<Self> {
        let open = || {
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            // NETLINK_ROUTE is protocol 0, which rustix spells None.
            let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, None)?;
            let groups = [MulticastGroup::Link, MulticastGroup::Ipv4Ifaddr, MulticastGroup::Ipv6Ifaddr];
            let mask = groups.into_iter().fold(0, |mask, group| mask | 1 << (group as u32 - 1));
            bind(&socket, &SocketAddrNetlink::new(0, mask))?;
            Readable::new(socket)
        };
        Ok(Self { socket: open().context("subscribe to interface changes")? })
    }

    /// The next change, with all that is queued behind it. Cancel safe: events leave the
    /// queue only together with returning them.
    pub async fn next(&mut self) -> anyhow::Result<LinkEvent> {
        self.socket.take(drain).await.context("receive interface changes")
    }
}

/// Takes what is queued, up to a bound so that a flood can't hold the caller.
fn drain(socket: BorrowedFd<'_>) -> io::Result<LinkEvent> {
    let mut event = None;
    for _ in 0..4096 {
        // Nothing of a message counts but its arrival, so it may be cut to a header.
        match recv(socket, &mut [0u8; 16], RecvFlags::DONTWAIT) {
            Ok(_) => {
                event.get_or_insert(LinkEvent { overrun: false });
            }
            Err(Errno::NOBUFS) => event = Some(LinkEvent { overrun: true }),
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => break,
            Err(error) => return Err(error.into()),
        }
    }
    event.ok_or_else(|| io::ErrorKind::WouldBlock.into())
}

const PROTOCOL: isize = netlink_sys::protocols::NETLINK_ROUTE;
const RTM_GETLINK: u16 = 18;
const RTM_GETADDR: u16 = 22;
const IFLA_IFNAME: u16 = 3;
const IFLA_MASTER: u16 = 10;
const IFLA_EXT_MASK: u16 = 29;
/// Without it each link brings kilobytes of counters.
const RTEXT_FILTER_SKIP_STATS: u32 = 1 << 3;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;

fn link_request() -> Vec<u8> {
    let header = LinkHeader::default();
    let mut bytes = vec![0; header.buffer_len()];
    header.emit(&mut bytes);
    bytes.extend_from_slice(&8u16.to_ne_bytes());
    bytes.extend_from_slice(&IFLA_EXT_MASK.to_ne_bytes());
    bytes.extend_from_slice(&RTEXT_FILTER_SKIP_STATS.to_ne_bytes());
    bytes
}

fn address_request() -> Vec<u8> {
    let header = AddressHeader::default();
    let mut bytes = vec![0; header.buffer_len()];
    header.emit(&mut bytes);
    bytes
}

pub(super) fn decode_link(payload: &[u8], out: &mut Vec<Link>) -> Result<(), NetlinkError> {
    let cut = NetlinkError::Truncated("an interface");
    let Ok(header) = LinkHeader::parse(payload) else { return Err(cut) };
    let (mut name, mut master) = (None, None);
    for attribute in attributes(payload.get(header.buffer_len()..).unwrap_or(&[])) {
        match attribute? {
            (IFLA_IFNAME, value) => {
                let text = value.split(|byte| *byte == 0).next().unwrap_or(value);
                name = Some(printable(&String::from_utf8_lossy(text), 15));
            }
            (IFLA_MASTER, value) => master = u32_at(value, 0),
            _ => {}
        }
    }
    out.push(Link {
        index: header.index,
        name: name.ok_or(NetlinkError::Malformed("an interface without a name"))?,
        up: header.flags.contains(LinkFlags::Up),
        ethernet: header.link_layer_type == LinkLayerType::Ether,
        loopback: header.link_layer_type == LinkLayerType::Loopback,
        master,
        addresses: Vec::new(),
    });
    Ok(())
}

pub(super) fn decode_address(payload: &[u8], out: &mut Vec<(u32, IpNet)>) -> Result<(), NetlinkError> {
    let cut = || NetlinkError::Truncated("an address");
    let header = AddressHeader::parse(payload).map_err(|_| cut())?;
    let (mut address, mut local) = (None, None);
    for attribute in attributes(payload.get(header.buffer_len()..).unwrap_or(&[])) {
        match attribute? {
            (IFA_ADDRESS, value) => address = Some(value),
            (IFA_LOCAL, value) => local = Some(value),
            _ => {}
        }
    }
    // On a point-to-point link IFA_ADDRESS is the other end.
    let bytes = local.or(address).ok_or(NetlinkError::Malformed("an address entry without an address"))?;
    let ip = match bytes.len() {
        4 => IpAddr::V4(Ipv4Addr::from(array_at::<4>(bytes, 0).ok_or_else(cut)?)),
        16 => IpAddr::V6(Ipv6Addr::from(array_at::<16>(bytes, 0).ok_or_else(cut)?)),
        _ => return Err(NetlinkError::Malformed("an address of an unknown length")),
    };
    let net = IpNet::new(ip, header.prefix_len)
        .map_err(|_| NetlinkError::Malformed("a prefix that is too long"))?;
    out.push((header.index, net));
    Ok(())
}

/// The two dumps are not one moment: an address of a link that came in between waits for
/// the next look, which its own event brings.
fn join(links: Vec<Link>, addresses: Vec<(u32, IpNet)>) -> Vec<Link> {
    let mut by_index: BTreeMap<u32, Link> = links.into_iter().map(|link| (link.index, link)).collect();
    for (index, address) in addresses {
        if let Some(link) = by_index.get_mut(&index) {
            link.addresses.push(address);
        }
    }
    let mut links: Vec<Link> = by_index.into_values().collect();
    for link in &mut links {
        link.addresses.sort_unstable();
        link.addresses.dedup();
    }
    links
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use expect_test::expect;
    use proptest::prelude::*;

    use super::*;
    use crate::source::netlink::replay;
    use crate::source::{in_namespace, sh};

    fn show(links: &[Link]) -> String {
        let line = |l: &Link| {
            let addresses: Vec<_> = l.addresses.iter().map(|a| a.to_string()).collect();
            let flag = |set, name| if set { name } else { "" };
            format!(
                "{} {}{}{}{} {}\n",
                l.index,
                l.name,
                flag(l.up, " up"),
                flag(l.ethernet, " ethernet"),
                flag(l.loopback, " loopback"),
                addresses.join(" ")
            )
        };
        links.iter().map(line).collect()
    }

    #[test]
    fn captures_of_the_kernel_become_links_with_their_own_addresses() {
        let links = replay(include_bytes!("captures/links.bin"), decode_link).expect("links");
        let addresses = replay(include_bytes!("captures/addresses.bin"), decode_address).expect("addresses");
        // tun0 is point to point: 10.9.0.2 is the other end and no address of ours.
        expect![[r#"
            1 lo up loopback 127.0.0.1/8 ::1/128
            2 v1 up ethernet fe80::492:78ff:fe9a:12fb/64
            3 v0 up ethernet 10.84.0.2/24 fd84::2/64 fe80::c481:94ff:fe6b:6fad/64
            4 tun0 up 10.9.0.1/32
        "#]]
        .assert_eq(&show(&join(links, addresses)));
    }

    #[test]
    fn an_address_of_a_link_that_is_not_listed_makes_no_link() {
        let net = "192.0.2.1/24".parse().expect("a prefix");
        assert_eq!(join(Vec::new(), vec![(9, net)]), []);
    }

    #[test]
    fn entries_that_lack_what_counts_are_errors() {
        assert!(decode_link(&[0; 16], &mut Vec::new()).is_err(), "a link without a name was taken");
        assert!(decode_link(&[0; 15], &mut Vec::new()).is_err());
        assert!(decode_address(&[2, 24, 0, 0, 1, 0, 0, 0], &mut Vec::new()).is_err());
        let long = [2, 33, 0, 0, 1, 0, 0, 0, 8, 0, 1, 0, 10, 0, 0, 1];
        assert!(decode_address(&long, &mut Vec::new()).is_err(), "a prefix of 33 bits was taken");
        let mut sound = long;
        sound[1] = 32;
        assert!(decode_address(&sound, &mut Vec::new()).is_ok());
    }

    proptest! {
        #[test]
        fn no_bytes_bring_the_decoders_down(bytes in prop::collection::vec(any::<u8>(), 0..120)) {
            let _ = decode_link(&bytes, &mut Vec::new());
            let _ = decode_address(&bytes, &mut Vec::new());
        }
    }

    async fn woken(events: &mut LinkEvents, limit_ms: u64) -> Option<LinkEvent> {
        let event = tokio::time::timeout(Duration::from_millis(limit_ms), events.next()).await.ok()?;
        Some(event.expect("an event"))
    }

    /// What a change brings, with all that follows it.
    async fn change(events: &mut LinkEvents, command: &str) -> LinkEvent {
        sh(command);
        let event = woken(events, 5000).await.expect("no event");
        while woken(events, 50).await.is_some() {}
        event
    }

    #[test]
    fn links_of_the_namespace_are_read_and_changes_wake() {
        if !in_namespace("source::links::tests::links_of_the_namespace_are_read_and_changes_wake", &[]) {
            return;
        }
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        runtime.block_on(async {
            let mut events = LinkEvents::open().expect("subscribed");
            assert!(woken(&mut events, 50).await.is_none(), "woken without a change");
            assert!(!change(&mut events, "ip link add v0 type veth peer name v1").await.overrun);
            change(&mut events, "ip link set v0 up").await;
            change(&mut events, "ip addr add 192.0.2.1/24 dev v0").await;
            change(&mut events, "ip addr add 2001:db8::1/64 dev v0 nodad").await;
            let v0 = read().expect("read").into_iter().find(|link| link.name == "v0").expect("v0");
            assert!(v0.up && v0.ethernet && !v0.loopback);
            for wanted in ["192.0.2.1/24", "2001:db8::1/64"] {
                assert!(v0.addresses.contains(&wanted.parse().expect("a prefix")), "{v0:?}");
            }
            change(&mut events, "ip addr del 192.0.2.1/24 dev v0").await;
            let v0 = read().expect("read").into_iter().find(|link| link.name == "v0").expect("v0");
            assert!(!v0.addresses.contains(&"192.0.2.1/24".parse().expect("a prefix")));

            // More than the socket holds, while nobody reads.
            let add = "for a in $(seq 2000); do echo addr add 10.0.$((a / 250)).$((a % 250))/32 dev v0; done";
            sh(&format!("{{ {add}; }} | ip -batch -"));
            assert!(woken(&mut events, 5000).await.expect("no event").overrun, "an overrun was not seen");
            change(&mut events, "ip link del v0").await;
            assert!(read().expect("read").iter().all(|link| link.name != "v0"));
        });
    }
}
