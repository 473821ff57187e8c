//! Flows that are under way: what conntrack knows, by ctnetlink, and this host's TCP sockets,
//! by sock_diag. Reads them, and ends one when told to; which, others decide.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use anyhow::Context as _;
use netlink_packet_core::{Emitable as _, NLA_TYPE_MASK};
use netlink_packet_sock_diag::inet::{ExtensionFlags, InetRequest, SocketId, StateFlags};

use super::netlink::{Netlink, NetlinkError, array_at, attribute, attributes, hint};
use crate::terms::{Family, Proto};
use crate::top::Known;

/// A flow as conntrack has it. It was begun by `from`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Flow {
    pub proto: Proto,
    pub from: SocketAddr,
    /// What `from` asked for.
    pub to: SocketAddr,
    /// Who answers: not `to` where a DNAT or redirect rewrote it.
    pub server: SocketAddr,
    /// Whom it answers: not `from` where an SNAT rewrote it.
    pub client: SocketAddr,
    /// CTA_ID: another flow with the same addresses has another one.
    id: Option<[u8; 4]>,
}

/// A TCP connection that ends in a socket of this host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stream {
    pub local: SocketAddr,
    pub remote: SocketAddr,
    family: u8,
    /// `struct inet_diag_sockid` as the kernel gave it, with the socket's cookie.
    id: [u8; SOCKET_ID],
}

const NETFILTER: isize = netlink_sys::protocols::NETLINK_NETFILTER;
/// NFNL_SUBSYS_CTNETLINK << 8 | IPCTNL_MSG_CT_{GET, DELETE}.
const CT_GET: u16 = 1 << 8 | 1;
pub(super) const CT_DELETE: u16 = 1 << 8 | 2;
const NESTED: u16 = 0x8000;
const CTA_TUPLE_ORIG: u16 = 1;
const CTA_TUPLE_REPLY: u16 = 2;
/// CTA_PROTOINFO, CTA_PROTOINFO_TCP and CTA_PROTOINFO_TCP_STATE in it.
const CTA_PROTOINFO: u16 = 4;
const PROTOINFO_TCP: u16 = 1;
const PROTOINFO_TCP_STATE: u16 = 1;
/// TCP_CONNTRACK_LAST_ACK; TIME_WAIT and CLOSE come after it.
const OVER_FROM: u8 = 6;
const CTA_ID: u16 = 12;
const CTA_ZONE: u16 = 18;
const CTA_TUPLE_IP: u16 = 1;
const CTA_TUPLE_PROTO: u16 = 2;
const CTA_TUPLE_ZONE: u16 = 3;
/// CTA_IP_{V4_SRC, V4_DST, V6_SRC, V6_DST}.
const CTA_IP: [u16; 4] = [1, 2, 3, 4];
/// CTA_PROTO_{NUM, SRC_PORT, DST_PORT}.
const CTA_PROTO: [u16; 3] = [1, 2, 3];

const DIAG: isize = netlink_sys::protocols::NETLINK_SOCK_DIAG;
const SOCK_DIAG_BY_FAMILY: u16 = 20;
const SOCK_DESTROY: u16 = 21;
/// The sizes of `struct inet_diag_msg` and of the id in it, which begins at byte 4.
const DIAG_MESSAGE: usize = 72;
const SOCKET_ID: usize = 48;
const TCP_LISTEN: u8 = 10;

/// The TCP and UDP flows that `keep` wants. A table may hold hundreds of thousands, so they
/// are chosen while they come. None where the kernel tracks nothing.
pub fn tracked(mut keep: impl FnMut(&Flow) -> bool) -> anyhow::Result<Vec<Flow>> {
    let mut netlink = Netlink::open(NETFILTER).context("read conntrack's table")?;
    // struct nfgenmsg: any family, version, resource.
    let found = netlink.dump(CT_GET, &[0; 4], |payload, out| {
        out.extend(flow(payload)?.filter(&mut keep));
        Ok(())
    });
    match found {
        Ok(found) => Ok(found),
        Err(error) if matches!(error.refusal(), Some(libc::ENOENT | libc::EINVAL | libc::EOPNOTSUPP)) => {
            Ok(Vec::new())
        }
        Err(error) => {
            let hint = hint(&error);
            Err(anyhow::Error::new(error).context(format!("read conntrack's table{hint}")))
        }
    }
}

/// Asks conntrack for single flows, each in some microseconds.
pub struct Tracker(Netlink);

impl Tracker {
    pub fn open() -> anyhow::Result<Self> {
        Ok(Self(Netlink::open(NETFILTER).context("ask conntrack")?))
    }

    /// Of flows in no zone.
    pub fn knows(&mut self, proto: Proto, from: SocketAddr, to: SocketAddr) -> anyhow::Result<Known> {
        let original = |payload: &[u8], out: &mut Vec<Option<Flow>>| {
            out.push(flow(payload)?);
            Ok(())
        };
        match self.0.request(CT_GET, &about(proto, from, to), original) {
            Ok(found) => Ok(match found.into_iter().flatten().next() {
                Some(flow) if (flow.from, flow.to) == (from, to) => Known::Begun,
                Some(_) => Known::Answer,
                None => Known::No,
            }),
            Err(error) if matches!(error.refusal(), Some(libc::ENOENT | libc::EOPNOTSUPP)) => Ok(Known::No),
            Err(error) => {
                let hint = hint(&error);
                Err(anyhow::Error::new(error).context(format!("ask conntrack{hint}")))
            }
        }
    }
}

/// Has conntrack forget these, so that their next packet is judged as the first of a new
/// flow. How many there were still.
pub fn forget(flows: &[Flow]) -> anyhow::Result<usize> {
    let mut netlink = Netlink::open(NETFILTER).context("delete from conntrack's table")?;
    let mut gone = 0;
    for flow in flows {
        let request = forgetting(flow.proto, flow.from, flow.to, flow.id);
        match netlink.request::<()>(CT_DELETE, &request, |_, _| Ok(())) {
            Ok(_) => gone += 1,
            Err(error) if error.refusal() == Some(libc::ENOENT) => {}
            Err(error) => {
                let text = format!("delete {} -> {} from conntrack's table", flow.from, flow.to);
                return Err(anyhow::Error::new(error).context(text));
            }
        }
    }
    Ok(gone)
}

/// This host's TCP connections that `keep` wants, and where TCP is listened.
pub fn streams(
    mut keep: impl FnMut(SocketAddr, SocketAddr) -> bool,
) -> anyhow::Result<(Vec<Stream>, BTreeSet<SocketAddr>)> {
    let mut netlink = Netlink::open(DIAG).context("read connections")?;
    let (mut all, mut listening) = (Vec::new(), BTreeSet::new());
    for family in Family::ALL {
        let found = netlink.dump(SOCK_DIAG_BY_FAMILY, &sockets(family), |payload, out| {
            match socket(payload)? {
                (stream, TCP_LISTEN) => {
                    listening.insert(stream.local);
                }
                (stream, _) if keep(stream.local, stream.remote) => out.push(stream),
                _ => {}
            }
            Ok(())
        });
        all.extend(found.with_context(|| format!("read TCP connections of {family}"))?);
    }
    Ok((all, listening))
}

/// Ends these: their processes get an error, the other side a reset. How many there were
/// still. Needs CONFIG_INET_DIAG_DESTROY.
pub fn destroy(streams: &[Stream]) -> anyhow::Result<usize> {
    let mut netlink = Netlink::open(DIAG).context("end connections")?;
    let mut gone = 0;
    for stream in streams {
        // struct inet_diag_req_v2: family, protocol, extensions, padding, states, id.
        let mut request = vec![stream.family, Proto::Tcp.number(), 0, 0, 0, 0, 0, 0];
        request.extend_from_slice(&stream.id);
        match netlink.request::<()>(SOCK_DESTROY, &request, |_, _| Ok(())) {
            Ok(_) => gone += 1,
            Err(error) if error.refusal() == Some(libc::ENOENT) => {}
            Err(error) => {
                let text = format!("end the connection of {} with {}", stream.local, stream.remote);
                return Err(anyhow::Error::new(error).context(text));
            }
        }
    }
    Ok(gone)
}

/// One entry; `None` for another protocol, for a connection that is over and only remembered,
/// and for one of a zone: its addresses are not this host's alone.
pub(super) fn flow(payload: &[u8]) -> Result<Option<Flow>, NetlinkError> {
    let body = payload.get(4..).ok_or(NetlinkError::Truncated("a flow"))?;
    let (mut original, mut reply, mut id, mut excluded) = (None, None, None, false);
    for attribute in attributes(body) {
        let (kind, value) = attribute?;
        match kind & NLA_TYPE_MASK {
            CTA_TUPLE_ORIG => original = tuple(value)?,
            CTA_TUPLE_REPLY => reply = tuple(value)?,
            CTA_ID => id = value.first_chunk().copied(),
            CTA_ZONE => excluded = true,
            CTA_PROTOINFO => excluded |= tcp_state(value)?.is_some_and(|state| state >= OVER_FROM),
            _ => {}
        }
    }
    let (Some((proto, from, to)), Some((_, server, client)), false) = (original, reply, excluded) else {
        return Ok(None);
    };
    Ok(Some(Flow { proto, from, to, server, client, id }))
}

/// Of another protocol it has none.
fn tcp_state(value: &[u8]) -> Result<Option<u8>, NetlinkError> {
    for attribute in attributes(value) {
        let (PROTOINFO_TCP, value) = attribute.map(|(kind, value)| (kind & NLA_TYPE_MASK, value))? else {
            continue;
        };
        for attribute in attributes(value) {
            let (kind, value) = attribute?;
            if kind & NLA_TYPE_MASK == PROTOINFO_TCP_STATE {
                return Ok(value.first().copied());
            }
        }
    }
    Ok(None)
}

type Tuple = (Proto, SocketAddr, SocketAddr);

/// Protocol, source and destination; `None` for other protocols and for zones.
fn tuple(value: &[u8]) -> Result<Option<Tuple>, NetlinkError> {
    let (mut addresses, mut ports, mut proto) = ([None; 2], [None; 2], None);
    for attribute in attributes(value) {
        let (kind, value) = attribute?;
        match kind & NLA_TYPE_MASK {
            CTA_TUPLE_IP => {
                for attribute in attributes(value) {
                    let (kind, value) = attribute?;
                    let kind = kind & NLA_TYPE_MASK;
                    let Some(at) = CTA_IP.iter().position(|known| *known == kind) else { continue };
                    let address: Option<IpAddr> = match at {
                        0 | 1 => value.first_chunk::<4>().map(|octets| Ipv4Addr::from(*octets).into()),
                        _ => value.first_chunk::<16>().map(|octets| Ipv6Addr::from(*octets).into()),
                    };
                    addresses[at % 2] = address;
                }
            }
            CTA_TUPLE_PROTO => {
                for attribute in attributes(value) {
                    let (kind, value) = attribute?;
                    match CTA_PROTO.iter().position(|known| *known == kind & NLA_TYPE_MASK) {
                        Some(0) => {
                            let number = value.first().copied();
                            proto = Proto::ALL.into_iter().find(|p| Some(p.number()) == number);
                        }
                        Some(at) => ports[at - 1] = value.first_chunk().copied().map(u16::from_be_bytes),
                        None => {}
                    }
                }
            }
            CTA_TUPLE_ZONE => return Ok(None),
            _ => {}
        }
    }
    let Some(proto) = proto else { return Ok(None) };
    let whole = |at: usize| Some(SocketAddr::new(addresses[at]?, ports[at]?));
    let ends = whole(0).zip(whole(1)).ok_or(NetlinkError::Malformed("a flow without its ends"))?;
    Ok(Some((proto, ends.0, ends.1)))
}

/// The message that deletes the flow with this original side; with an id, no later one.
pub(super) fn forgetting(proto: Proto, from: SocketAddr, to: SocketAddr, id: Option<[u8; 4]>) -> Vec<u8> {
    let mut request = about(proto, from, to);
    request.extend(id.iter().flat_map(|id| attribute(CTA_ID, id)));
    request
}

/// A message about the flow that has a packet from here to there.
fn about(proto: Proto, from: SocketAddr, to: SocketAddr) -> Vec<u8> {
    let (family, [source, destination]) = match from.ip() {
        IpAddr::V4(_) => (libc::AF_INET as u8, [CTA_IP[0], CTA_IP[1]]),
        IpAddr::V6(_) => (libc::AF_INET6 as u8, [CTA_IP[2], CTA_IP[3]]),
    };
    let octets = |address: IpAddr| match address {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    };
    let ip = [attribute(source, &octets(from.ip())), attribute(destination, &octets(to.ip()))].concat();
    let proto = [
        attribute(CTA_PROTO[0], &[proto.number()]),
        attribute(CTA_PROTO[1], &from.port().to_be_bytes()),
        attribute(CTA_PROTO[2], &to.port().to_be_bytes()),
    ]
    .concat();
    let tuple = [attribute(CTA_TUPLE_IP | NESTED, &ip), attribute(CTA_TUPLE_PROTO | NESTED, &proto)].concat();
    let mut request = vec![family, 0, 0, 0];
    request.extend(attribute(CTA_TUPLE_ORIG | NESTED, &tuple));
    request
}

fn sockets(family: Family) -> Vec<u8> {
    let (family, socket_id) = match family {
        Family::Ipv4 => (libc::AF_INET as u8, SocketId::new_v4()),
        Family::Ipv6 => (libc::AF_INET6 as u8, SocketId::new_v6()),
    };
    // Those that data can still pass through, and those that made them.
    let states = StateFlags::ESTABLISHED
        | StateFlags::FIN_WAIT1
        | StateFlags::FIN_WAIT2
        | StateFlags::CLOSE_WAIT
        | StateFlags::LISTEN;
    let request = InetRequest {
        family,
        protocol: Proto::Tcp.number(),
        extensions: ExtensionFlags::empty(),
        states,
        socket_id,
    };
    let mut bytes = vec![0; request.buffer_len()];
    request.emit(&mut bytes);
    bytes
}

/// One socket and its state. An IPv4 connection of an IPv6 socket has IPv4 addresses here.
pub(super) fn socket(payload: &[u8]) -> Result<(Stream, u8), NetlinkError> {
    let cut = || NetlinkError::Truncated("a connection");
    let message = payload.get(..DIAG_MESSAGE).ok_or_else(cut)?;
    let [family, state] = array_at(message, 0).ok_or_else(cut)?;
    let id: [u8; SOCKET_ID] = array_at(message, 4).ok_or_else(cut)?;
    let end = |port: usize, address: usize| {
        let port = u16::from_be_bytes(array_at(&id, port)?);
        let octets: [u8; 16] = array_at(&id, address)?;
        let address: IpAddr = match i32::from(family) {
            libc::AF_INET => Ipv4Addr::from(*octets.first_chunk()?).into(),
            libc::AF_INET6 => Ipv6Addr::from(octets).into(),
            _ => return None,
        };
        Some(SocketAddr::new(address.to_canonical(), port))
    };
    let ends = end(0, 4).zip(end(2, 20));
    let (local, remote) = ends.ok_or(NetlinkError::Malformed("a connection of another address family"))?;
    Ok((Stream { local, remote, family, id }, state))
}

/// The ports that the kernel gives to those who ask for none, first and last.
pub fn ephemeral_ports() -> (u16, u16) {
    let text = std::fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").unwrap_or_default();
    let mut numbers = text.split_whitespace().map(str::parse);
    match (numbers.next(), numbers.next()) {
        (Some(Ok(first)), Some(Ok(last))) => (first, last),
        _ => (32_768, 60_999),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn nested(kind: u16, parts: &[Vec<u8>]) -> Vec<u8> {
        attribute(kind | NESTED, &parts.concat())
    }

    fn side(kind: u16, source: (&str, u16), destination: (&str, u16), proto: u8) -> Vec<u8> {
        let octets = |text: &str| text.parse::<Ipv4Addr>().expect("an address").octets();
        nested(
            kind,
            &[
                nested(
                    CTA_TUPLE_IP,
                    &[attribute(CTA_IP[0], &octets(source.0)), attribute(CTA_IP[1], &octets(destination.0))],
                ),
                nested(
                    CTA_TUPLE_PROTO,
                    &[
                        attribute(CTA_PROTO[0], &[proto]),
                        attribute(CTA_PROTO[1], &source.1.to_be_bytes()),
                        attribute(CTA_PROTO[2], &destination.1.to_be_bytes()),
                    ],
                ),
            ],
        )
    }

    fn entry(proto: u8) -> Vec<u8> {
        [
            vec![2, 0, 0, 0],
            side(CTA_TUPLE_ORIG, ("192.0.2.9", 40_000), ("198.51.100.7", 8080), proto),
            side(CTA_TUPLE_REPLY, ("172.17.0.2", 80), ("192.0.2.9", 40_000), proto),
            attribute(CTA_ID, &[1, 2, 3, 4]),
        ]
        .concat()
    }

    #[test]
    fn a_flow_says_what_was_asked_for_and_who_answers() {
        let found = flow(&entry(6)).expect("sound").expect("TCP");
        let ends = [found.from, found.to, found.server, found.client].map(|end| end.to_string());
        assert_eq!(ends, ["192.0.2.9:40000", "198.51.100.7:8080", "172.17.0.2:80", "192.0.2.9:40000"]);
        assert!(flow(&entry(1)).expect("sound").is_none(), "ICMP has no ports");
    }

    #[test]
    fn what_is_over_is_no_flow() {
        let in_state = |state: u8| {
            let tcp = nested(PROTOINFO_TCP, &[attribute(PROTOINFO_TCP_STATE, &[state])]);
            flow(&[entry(6), nested(CTA_PROTOINFO, &[tcp])].concat()).expect("sound").is_some()
        };
        // ESTABLISHED, CLOSE_WAIT, LAST_ACK, TIME_WAIT, CLOSE.
        assert_eq!([3, 5, 6, 7, 8].map(in_state), [true, true, false, false, false]);
    }

    #[test]
    fn of_a_zone_nothing_is_told() {
        let zoned = [entry(6), attribute(CTA_ZONE, &[0, 7])].concat();
        assert!(flow(&zoned).expect("sound").is_none());
    }

    #[test]
    fn what_is_forgotten_is_what_was_found() {
        let found = flow(&entry(6)).expect("sound").expect("TCP");
        let request = forgetting(found.proto, found.from, found.to, found.id);
        // The same original side, and the same id.
        let whole = entry(6);
        assert!(whole.starts_with(&request[..request.len() - 8]) && request.ends_with(&[1, 2, 3, 4]));
    }

    #[test]
    fn a_flow_cut_short_is_an_error_or_no_flow() {
        let whole = entry(6);
        for length in 0..whole.len() - 8 {
            assert!(!matches!(flow(&whole[..length]), Ok(Some(_))), "{length} bytes were taken");
        }
    }

    #[test]
    fn a_connection_of_a_mapped_address_is_one_of_ipv4() {
        let mut message = vec![0; DIAG_MESSAGE];
        message[0] = libc::AF_INET6 as u8;
        message[1] = 1;
        message[4..8].copy_from_slice(&[0, 22, 156, 64]);
        for (at, last) in [(8, 7), (24, 9)] {
            message[at + 10..at + 16].copy_from_slice(&[0xff, 0xff, 192, 0, 2, last]);
        }
        let (stream, state) = socket(&message).expect("sound");
        assert_eq!(
            (stream.local.to_string(), stream.remote.to_string(), state),
            ("192.0.2.7:22".into(), "192.0.2.9:40000".into(), 1)
        );
        assert!(socket(&message[..DIAG_MESSAGE - 1]).is_err());
    }

    proptest! {
        #[test]
        fn no_bytes_bring_the_decoders_down(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = (flow(&bytes).is_ok(), socket(&bytes).is_ok());
        }
    }
}
