//! Requests to the kernel over netlink, for the sources whose replies must be complete:
//! an interrupted, truncated or foreign reply is an error here, never a short list.
//!
//! netlink-proto is not used for these: it drops messages it can't decode, and ends a
//! dump whose connection broke in the same way as one that is complete.

use std::io;
use std::time::Duration;

use netlink_packet_core::{
    Emitable, NLM_F_ACK, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NLMSG_DONE, NLMSG_ERROR, NLMSG_OVERRUN,
    NetlinkHeader, NlasIterator,
};
use netlink_sys::{Socket, SocketAddr};

use crate::sys::memory::Wiped;

/// The kernel's dump messages are at most 32 KiB since Linux 4.9; a single object that
/// needs more (a link with hundreds of virtual functions) gets a buffer of its own size,
/// which is then seen as truncated here.
const BUFFER: usize = 64 * 1024;
const TRIES: u8 = 5;
const DEADLINE: Duration = Duration::from_secs(5);

#[derive(Debug, thiserror::Error)]
pub enum NetlinkError {
    #[error("open a netlink socket")]
    Open(#[source] io::Error),
    #[error("send the request")]
    Send(#[source] io::Error),
    #[error("receive the reply")]
    Receive(#[source] io::Error),
    #[error("the kernel refused")]
    Refused(#[source] io::Error),
    #[error("the dump was interrupted by changes {TRIES} times in a row")]
    Interrupted,
    #[error("the reply was cut off: {0}")]
    Truncated(&'static str),
    #[error("the kernel dropped part of the reply")]
    Overrun,
    #[error("a message of the reply makes no sense: {0}")]
    Malformed(&'static str),
}

impl NetlinkError {
    /// The error number of a refusal, for callers that tell "absent" from "failed".
    pub fn refusal(&self) -> Option<i32> {
        match self {
            Self::Refused(source) => source.raw_os_error(),
            _ => None,
        }
    }
}

/// A socket to one netlink protocol of the thread's network namespace. Its buffer is
/// wiped when it goes, since WireGuard's replies carry private keys.
pub struct Netlink {
    socket: Socket,
    buffer: Wiped,
    sequence: u32,
}

impl Netlink {
    pub fn open(protocol: isize) -> Result<Self, NetlinkError> {
        let open = || {
            let mut socket = Socket::new(protocol)?;
            socket.bind_auto()?;
            // A thread that waits for ever would look like a quiet host.
            rustix::net::sockopt::set_socket_timeout(
                &socket,
                rustix::net::sockopt::Timeout::Recv,
                Some(DEADLINE),
            )?;
            Ok(socket)
        };
        let socket = open().map_err(NetlinkError::Open)?;
        Ok(Self { socket, buffer: Wiped::new(BUFFER), sequence: 0 })
    }

    /// Every object of a dump, through `decode`, which gets one message's payload. Starts
    /// over when the kernel says that the objects changed underneath.
    pub fn dump<T>(
        &mut self,
        kind: u16,
        payload: &[u8],
        mut decode: impl FnMut(&[u8], &mut Vec<T>) -> Result<(), NetlinkError>,
    ) -> Result<Vec<T>, NetlinkError> {
        let mut out = Vec::new();
        for _ in 0..TRIES {
            out.clear();
            self.send(kind, NLM_F_REQUEST | NLM_F_DUMP, payload)?;
            if self.receive(|payload| decode(payload, &mut out))? == Reply::Whole {
                return Ok(out);
            }
        }
        Err(NetlinkError::Interrupted)
    }

    /// A request that the kernel acknowledges, with whatever objects come before that.
    pub fn request<T>(
        &mut self,
        kind: u16,
        payload: &[u8],
        mut decode: impl FnMut(&[u8], &mut Vec<T>) -> Result<(), NetlinkError>,
    ) -> Result<Vec<T>, NetlinkError> {
        let mut out = Vec::new();
        self.send(kind, NLM_F_REQUEST | NLM_F_ACK, payload)?;
        self.receive(|payload| decode(payload, &mut out))?;
        Ok(out)
    }

    fn send(&mut self, kind: u16, flags: u16, payload: &[u8]) -> Result<(), NetlinkError> {
        self.sequence = self.sequence.wrapping_add(1);
        let message = message(kind, flags, self.sequence, payload);
        let sent = self.socket.send_to(&message, &SocketAddr::new(0, 0), 0).map_err(|error| {
            match error.raw_os_error() {
                // The protocol itself is missing: a kernel without it, or its module.
                Some(libc::ECONNREFUSED) => NetlinkError::Refused(io::Error::from_raw_os_error(libc::ENOENT)),
                _ => NetlinkError::Send(error),
            }
        })?;
        if sent != message.len() { Err(NetlinkError::Truncated("the request")) } else { Ok(()) }
    }

    fn receive(
        &mut self,
        mut object: impl FnMut(&[u8]) -> Result<(), NetlinkError>,
    ) -> Result<Reply, NetlinkError> {
        let mut reply = Reply::Whole;
        loop {
            let (length, from) = match self.socket.recv_from(&mut &mut self.buffer[..], libc::MSG_TRUNC) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => {
                    return Err(NetlinkError::Overrun);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    return Err(NetlinkError::Receive(io::ErrorKind::TimedOut.into()));
                }
                other => other.map_err(NetlinkError::Receive)?,
            };
            let datagram = self.buffer.get(..length).ok_or(NetlinkError::Truncated("a message"))?;
            // Any process may send to our port; only the kernel has number 0.
            if from.port_number() != 0 {
                continue;
            }
            match decode_datagram(datagram, self.sequence, &mut reply, &mut object)? {
                Progress::More => {}
                Progress::Done => return Ok(reply),
            }
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reply {
    Whole,
    Interrupted,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Progress {
    More,
    Done,
}

const HEADER: usize = 16;

fn message(kind: u16, flags: u16, sequence: u32, payload: &[u8]) -> Vec<u8> {
    let mut header = NetlinkHeader::default();
    header.length = (HEADER + payload.len()) as u32;
    header.message_type = kind;
    header.flags = flags;
    header.sequence_number = sequence;
    let mut message = vec![0; HEADER];
    header.emit(&mut message);
    message.extend_from_slice(payload);
    message
}

/// The messages of one datagram. Those of an earlier request, which was given up, are
/// passed over.
fn decode_datagram(
    mut rest: &[u8],
    sequence: u32,
    reply: &mut Reply,
    object: &mut impl FnMut(&[u8]) -> Result<(), NetlinkError>,
) -> Result<Progress, NetlinkError> {
    while !rest.is_empty() {
        let header = (u32_at(rest, 0), u16_at(rest, 4), u16_at(rest, 6), u32_at(rest, 8));
        let (Some(length), Some(kind), Some(flags), Some(number)) = header else {
            return Err(NetlinkError::Truncated("a message header"));
        };
        let length = length as usize;
        if length < HEADER {
            return Err(NetlinkError::Malformed("shorter than its header"));
        }
        let payload = rest.get(HEADER..length).ok_or(NetlinkError::Truncated("a message"))?;
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or(&[]);
        if number != sequence {
            continue;
        }
        if flags & NLM_F_DUMP_INTR != 0 {
            *reply = Reply::Interrupted;
        }
        match kind {
            NLMSG_OVERRUN => return Err(NetlinkError::Overrun),
            // Both start with an error number: 0 is the acknowledgement or a whole dump.
            NLMSG_ERROR | NLMSG_DONE => {
                let code = u32_at(payload, 0).ok_or(NetlinkError::Truncated("an error number"))? as i32;
                if code != 0 {
                    return Err(NetlinkError::Refused(io::Error::from_raw_os_error(code.saturating_neg())));
                }
                return Ok(Progress::Done);
            }
            // Other control messages (NOOP) say nothing.
            0..16 => {}
            _ => object(payload)?,
        }
    }
    Ok(Progress::More)
}

/// The attributes in `bytes`, as (kind without flag bits, value).
pub fn attributes(bytes: &[u8]) -> impl Iterator<Item = Result<(u16, &[u8]), NetlinkError>> {
    NlasIterator::new(bytes).map(|attribute| {
        let attribute =
            attribute.map_err(|_| NetlinkError::Malformed("an attribute longer than its message"))?;
        let length = attribute.value_length();
        let whole = attribute.into_inner();
        let value = whole.get(4..4 + length).ok_or(NetlinkError::Truncated("an attribute"))?;
        Ok((u16_at(whole, 2).unwrap_or(0) & netlink_packet_core::NLA_TYPE_MASK, value))
    })
}

/// An attribute as it is sent, with what fills it up to words. The value is far shorter than 64 KiB.
pub fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(value.len() + 8);
    bytes.extend_from_slice(&(4 + value.len() as u16).to_ne_bytes());
    bytes.extend_from_slice(&kind.to_ne_bytes());
    bytes.extend_from_slice(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

/// A string, which ends with a zero byte as the kernel sends it.
pub fn text(value: &[u8]) -> String {
    String::from_utf8_lossy(value.strip_suffix(b"\0").unwrap_or(value)).into_owned()
}

pub fn array_at<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..)?.first_chunk().copied()
}

pub fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    array_at(bytes, at).map(u16::from_ne_bytes)
}

pub fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    array_at(bytes, at).map(u32::from_ne_bytes)
}

pub fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    array_at(bytes, at).map(u64::from_ne_bytes)
}

/// What a refusal means to the operator, where that is known; chained before the error.
pub fn hint(error: &NetlinkError) -> &'static str {
    match error.refusal() {
        Some(libc::EPERM | libc::EACCES) => " (needs CAP_NET_ADMIN: run as root)",
        Some(libc::ENOENT | libc::EPROTONOSUPPORT) => " (this kernel lacks the feature, or its module)",
        _ => "",
    }
}

/// The messages of a capture (datagrams one after the other, as recorded) for decoders.
pub fn replay<T>(
    capture: &[u8],
    mut decode: impl FnMut(&[u8], &mut Vec<T>) -> Result<(), NetlinkError>,
) -> Result<Vec<T>, NetlinkError> {
    let mut out = Vec::new();
    let sequence = u32_at(capture, 8).unwrap_or(0);
    match decode_datagram(capture, sequence, &mut Reply::Whole, &mut |payload| decode(payload, &mut out))? {
        Progress::Done => Ok(out),
        Progress::More => Err(NetlinkError::Truncated("no end")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MULTI: u16 = 2;

    fn collect(datagram: &[u8]) -> (Result<Progress, NetlinkError>, Reply, Vec<Vec<u8>>) {
        let (mut reply, mut seen) = (Reply::Whole, Vec::new());
        let progress = decode_datagram(datagram, 7, &mut reply, &mut |payload| {
            seen.push(payload.to_vec());
            Ok(())
        });
        (progress, reply, seen)
    }

    #[test]
    fn a_dump_is_whole_only_when_its_end_has_come() {
        let object = message(20, MULTI, 7, b"abcd");
        let end = message(NLMSG_DONE, MULTI, 7, &0i32.to_ne_bytes());
        let (progress, reply, seen) = collect(&object);
        assert_eq!((progress.expect("sound"), reply), (Progress::More, Reply::Whole));
        assert_eq!(seen, [b"abcd".to_vec()]);
        let (progress, _, seen) = collect(&[object, end].concat());
        assert_eq!((progress.expect("sound"), seen.len()), (Progress::Done, 1));
    }

    #[test]
    fn an_interruption_is_seen_on_any_message_the_last_one_too() {
        let end = message(NLMSG_DONE, MULTI | NLM_F_DUMP_INTR, 7, &0i32.to_ne_bytes());
        assert_eq!(collect(&end).1, Reply::Interrupted);
        let object = message(20, MULTI | NLM_F_DUMP_INTR, 7, b"abcd");
        assert_eq!(collect(&object).1, Reply::Interrupted);
    }

    #[test]
    fn a_refusal_is_an_error_also_at_the_end_of_a_dump() {
        for kind in [NLMSG_ERROR, NLMSG_DONE] {
            let refused = message(kind, MULTI, 7, &(-libc::ENOENT).to_ne_bytes());
            assert_eq!(collect(&refused).0.expect_err("refused").refusal(), Some(libc::ENOENT));
        }
    }

    #[test]
    fn replies_to_an_earlier_request_and_broken_ones_are_not_taken() {
        let (progress, _, seen) = collect(&message(20, MULTI, 6, b"late"));
        assert_eq!((progress.expect("sound"), seen.len()), (Progress::More, 0));
        let whole = message(20, MULTI, 7, b"abcdefgh");
        for cut in 1..whole.len() {
            assert!(collect(&whole[..cut]).0.is_err(), "{cut} bytes were taken");
        }
        let mut short = whole.clone();
        short[0] = 8;
        assert!(collect(&short).0.is_err());
        let overrun = message(NLMSG_OVERRUN, 0, 7, b"");
        assert!(matches!(collect(&overrun).0, Err(NetlinkError::Overrun)));
    }

    #[test]
    fn attributes_that_reach_past_their_message_are_an_error() {
        let sound = [6, 0, 1, 0x80, 0xaa, 0xbb, 0, 0, 4, 0, 2, 0];
        let seen: Vec<_> = attributes(&sound).map(|a| a.expect("sound")).collect();
        assert_eq!(seen, [(1, &[0xaa, 0xbb][..]), (2, &[][..])]);
        for broken in [&[8u8, 0, 1, 0, 1][..], &[3, 0, 1, 0], &[4, 0]] {
            assert!(attributes(broken).any(|a| a.is_err()), "{broken:?} was taken");
        }
    }
}
