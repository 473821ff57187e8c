//! The kernel's own word on nftables: one event for each committed batch, with the
//! process that committed it, and two questions that take microseconds. Says that
//! something changed and whether it was ours; what is there now, `source::nft` lists.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use netlink_packet_core::NLA_TYPE_MASK;
use rustix::net::netlink::{self, SocketAddrNetlink};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, bind, connect, recvfrom, send, socket_with,
    sockopt,
};

use super::probe;
use crate::desired::TABLE;
use crate::sys::sockets::Readable;
use crate::terms::printable;

/// NFNLGRP_NFTABLES.
const GROUP: u32 = 7;
/// NFNL_SUBSYS_NFTABLES; the upper byte of a message's type.
pub(crate) const SUBSYSTEM: u16 = 10;
const NEWTABLE: u8 = 0;
const GETTABLE: u8 = 1;
const NEWGEN: u8 = 15;
const GETGEN: u8 = 16;
const TRACE: u8 = 17;
/// NFTA_GEN_ID, NFTA_GEN_PROC_PID, NFTA_GEN_PROC_NAME.
const GEN_ID: u16 = 1;
const GEN_PROC_PID: u16 = 2;
const GEN_PROC_NAME: u16 = 3;
/// NFTA_TABLE_NAME, NFTA_CHAIN_TABLE, NFTA_RULE_TABLE, NFTA_SET_TABLE, NFTA_OBJ_TABLE ...:
/// every message about something in a table names the table in its attribute 1.
pub(crate) const TABLE_NAME: u16 = 1;
/// NFTA_TABLE_FLAGS.
const TABLE_FLAGS: u16 = 2;
/// NFT_TABLE_F_DORMANT: the chains of the table see no packets.
pub const DORMANT: u32 = 1;
pub(crate) const NFPROTO_INET: u8 = 1;
const NLMSG_ERROR: u16 = 2;
const NLM_F_REQUEST: u16 = 1;
/// A flush of ten thousand rules announces each of them; the default holds some 200 KiB.
const RECEIVE_BUFFER: usize = 1 << 20;
/// The kernel's largest notification is two pages; an attribute can't pass 64 KiB.
const DATAGRAM_MAX: usize = 1 << 16;
/// A reply is one small message; waiting longer means that it was lost.
const REPLY_TIMEOUT: std::time::Duration = std::time::Duration::from_secs(2);

#[derive(Debug, thiserror::Error)]
pub enum NftSocketError {
    #[error("open the nftables netlink socket")]
    Open(#[source] io::Error),
    #[error("join the nftables event group")]
    Join(#[source] io::Error),
    #[error("{question} over the nftables netlink socket")]
    Ask { question: &'static str, source: io::Error },
    #[error("receive nftables events")]
    Receive(#[source] io::Error),
}

/// One committed batch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NftEvent {
    /// The generation it made; 0 in an overrun, which is not one batch.
    pub generation: u32,
    /// Pid and comm of who committed it. The pid is in the kernel's first pid namespace
    /// and may be that of a thread, or of a process that has ended by now.
    pub actor: Option<(u32, String)>,
    /// Something in our table, or the table itself, was added or removed.
    pub own_touched: bool,
    pub foreign_touched: bool,
    /// Events were lost: anything may have changed, by anyone.
    pub overrun: bool,
}

impl NftEvent {
    /// `false`: it was about nothing but the table by which older kernels audit.
    pub fn matters(&self) -> bool {
        self.own_touched || self.foreign_touched || self.overrun
    }
}

/// The stream of committed batches of this network namespace, from `open` on.
pub struct NftEvents {
    socket: Readable,
    batch: Batch,
    buffer: Vec<u8>,
}

impl NftEvents {
    /// Needs a tokio runtime with IO.
    pub fn open() -> Result<Self, NftSocketError> {
        let socket = Readable::new(listening()?).map_err(NftSocketError::Open)?;
        Ok(Self { socket, batch: Batch::default(), buffer: vec![0; DATAGRAM_MAX] })
    }

    /// Waits for the next batch. May be dropped and called again: what has been read of
    /// a batch is kept.
    pub async fn next(&mut self) -> Result<NftEvent, NftSocketError> {
        loop {
            if let Some(event) = self.batch.finished() {
                return Ok(event);
            }
            match self.socket.take(|socket| receive(socket, &mut self.buffer)).await {
                Ok(Some(length)) => self.batch.take(&self.buffer[..length]),
                // Not from the kernel: anyone may write to a netlink socket.
                Ok(None) => {}
                Err(e) if e.raw_os_error() == Some(rustix::io::Errno::NOBUFS.raw_os_error()) => {
                    return Ok(self.batch.overrun());
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(NftSocketError::Receive(e)),
            }
        }
    }
}

impl NftEvents {
    /// The next batch if it has been announced already. Errors are left to [`Self::next`].
    pub fn announced(&mut self) -> Option<NftEvent> {
        announced(self.socket.descriptor(), &mut self.batch, &mut self.buffer)
    }
}

/// The same for whoever waits for nothing: what was committed from `open` on.
pub struct NftCommits {
    socket: OwnedFd,
    batch: Batch,
    buffer: Vec<u8>,
}

impl NftCommits {
    pub fn open() -> Result<Self, NftSocketError> {
        Ok(Self { socket: listening()?, batch: Batch::default(), buffer: vec![0; DATAGRAM_MAX] })
    }
}

impl Iterator for NftCommits {
    type Item = NftEvent;

    /// A commit is announced before whoever made it hears of it.
    fn next(&mut self) -> Option<NftEvent> {
        announced(&self.socket, &mut self.batch, &mut self.buffer)
    }
}

/// A socket to which commits are announced. Never waits.
fn listening() -> Result<OwnedFd, NftSocketError> {
    let failed = |errno: rustix::io::Errno| NftSocketError::Open(errno.into());
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let protocol = Some(netlink::NETFILTER);
    let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, protocol).map_err(failed)?;
    // Over the sysctl's limit with CAP_NET_ADMIN, up to it without.
    if sockopt::set_socket_recv_buffer_size_force(&socket, RECEIVE_BUFFER).is_err() {
        sockopt::set_socket_recv_buffer_size(&socket, RECEIVE_BUFFER).map_err(failed)?;
    }
    let groups = 1 << (GROUP - 1);
    bind(&socket, &SocketAddrNetlink::new(0, groups)).map_err(|errno| NftSocketError::Join(errno.into()))?;
    Ok(socket)
}

fn announced(socket: impl AsFd, batch: &mut Batch, buffer: &mut [u8]) -> Option<NftEvent> {
    loop {
        if let Some(event) = batch.finished() {
            return Some(event);
        }
        match receive(&socket, buffer) {
            Ok(Some(length)) => batch.take(&buffer[..length]),
            Ok(None) => {}
            Err(e) if e.raw_os_error() == Some(rustix::io::Errno::NOBUFS.raw_os_error()) => {
                return Some(batch.overrun());
            }
            Err(_) => return None,
        }
    }
}

/// A socket for questions. Blocking, since an answer takes microseconds.
pub struct NftQueries {
    socket: OwnedFd,
    sequence: u32,
    buffer: Vec<u8>,
}

impl NftQueries {
    pub fn open() -> Result<Self, NftSocketError> {
        let socket = to_kernel(REPLY_TIMEOUT).map_err(NftSocketError::Open)?;
        Ok(Self { socket, sequence: 0, buffer: vec![0; 8192] })
    }

    /// The number of the rule set's last change, of any table.
    pub fn generation(&mut self) -> Result<u32, NftSocketError> {
        let question = "ask for the generation";
        let failed = |source| NftSocketError::Ask { question, source };
        match self.ask(GETGEN, 0, &[]).map_err(failed)? {
            Reply::Message { kind: NEWGEN, attributes } => attribute(attributes, GEN_ID)
                .and_then(be32)
                .ok_or_else(|| failed(io::ErrorKind::InvalidData.into())),
            Reply::Message { .. } => Err(failed(io::ErrorKind::InvalidData.into())),
            Reply::Error(errno) => Err(failed(io::Error::from_raw_os_error(errno))),
        }
    }

    /// Whether `inet spokeguard` is there at all. What it holds, only a listing says.
    pub fn own_table_exists(&mut self) -> Result<bool, NftSocketError> {
        Ok(self.own_table_flags()?.is_some())
    }

    /// The flags of `inet spokeguard`, such as [`DORMANT`]; `None`: there is no such table.
    pub fn own_table_flags(&mut self) -> Result<Option<u32>, NftSocketError> {
        let question = "ask for the table inet spokeguard";
        let failed = |source| NftSocketError::Ask { question, source };
        let name = [TABLE.as_bytes(), b"\0"].concat();
        match self.ask(GETTABLE, NFPROTO_INET, &[(TABLE_NAME, &name)]).map_err(failed)? {
            Reply::Message { kind: NEWTABLE, attributes } => {
                let flags = attribute(attributes, TABLE_FLAGS).and_then(|flags| flags.first_chunk());
                Ok(Some(flags.map_or(0, |flags| u32::from_be_bytes(*flags))))
            }
            Reply::Error(errno) if errno == rustix::io::Errno::NOENT.raw_os_error() => Ok(None),
            Reply::Message { .. } => Err(failed(io::ErrorKind::InvalidData.into())),
            Reply::Error(errno) => Err(failed(io::Error::from_raw_os_error(errno))),
        }
    }

    fn ask(&mut self, kind: u8, family: u8, attributes: &[(u16, &[u8])]) -> io::Result<Reply<'_>> {
        self.sequence = self.sequence.wrapping_add(1);
        send(&self.socket, &request(kind, family, self.sequence, attributes), SendFlags::empty())?;
        // An answer to an earlier question that timed out may still be there; more than a
        // few would be a broken kernel.
        for _ in 0..16 {
            let Some(length) = receive(&self.socket, &mut self.buffer)? else { continue };
            let answers = Messages(&self.buffer[..length]).any(|message| message.sequence == self.sequence);
            if answers {
                return Messages(&self.buffer[..length])
                    .find(|message| message.sequence == self.sequence)
                    .and_then(reply)
                    .ok_or_else(|| io::ErrorKind::InvalidData.into());
            }
        }
        Err(io::ErrorKind::TimedOut.into())
    }
}

/// A blocking nftables socket whose only peer is the kernel.
pub(crate) fn to_kernel(timeout: std::time::Duration) -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC;
    let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, Some(netlink::NETFILTER))?;
    connect(&socket, &SocketAddrNetlink::new(0, 0))?;
    sockopt::set_socket_timeout(&socket, sockopt::Timeout::Recv, Some(timeout))?;
    Ok(socket)
}

/// One datagram of the kernel; `None` if it came from somebody else. One that does not
/// fit reads as an overrun, for part of it is lost.
pub(crate) fn receive(socket: impl AsFd, buffer: &mut [u8]) -> io::Result<Option<usize>> {
    let size = buffer.len();
    let (_, length, from) = recvfrom(socket, buffer, RecvFlags::TRUNC)?;
    let from = from.and_then(|address| SocketAddrNetlink::try_from(address).ok());
    if from.is_none_or(|address| address.pid() != 0) {
        return Ok(None);
    }
    if length > size {
        return Err(rustix::io::Errno::NOBUFS.into());
    }
    Ok(Some(length))
}

/// What has been seen of the batch that is being announced. It ends with NEWGEN.
#[derive(Debug, Default)]
pub(super) struct Batch {
    own_touched: bool,
    foreign_touched: bool,
    /// A datagram may hold the end of one batch and the start of the next.
    done: std::collections::VecDeque<NftEvent>,
}

impl Batch {
    pub(super) fn take(&mut self, datagram: &[u8]) {
        for message in Messages(datagram) {
            let Some((kind, family, attributes)) = message.nftables() else { continue };
            match kind {
                NEWGEN => {
                    let pid = attribute(attributes, GEN_PROC_PID).and_then(be32);
                    let comm = attribute(attributes, GEN_PROC_NAME).map(text);
                    self.done.push_back(NftEvent {
                        generation: attribute(attributes, GEN_ID).and_then(be32).unwrap_or(0),
                        actor: pid.zip(comm),
                        own_touched: std::mem::take(&mut self.own_touched),
                        foreign_touched: std::mem::take(&mut self.foreign_touched),
                        overrun: false,
                    });
                }
                TRACE => {}
                _ => {
                    let name = attribute(attributes, TABLE_NAME)
                        .map(|name| name.strip_suffix(b"\0").unwrap_or(name));
                    if family == NFPROTO_INET && name == Some(TABLE.as_bytes()) {
                        self.own_touched = true;
                    } else if family != NFPROTO_INET || !name.is_some_and(probe::is_table) {
                        self.foreign_touched = true;
                    }
                }
            }
        }
    }

    pub(super) fn finished(&mut self) -> Option<NftEvent> {
        self.done.pop_front()
    }

    /// What was half read belongs to something that can't be known any more.
    fn overrun(&mut self) -> NftEvent {
        *self = Self::default();
        NftEvent { generation: 0, actor: None, own_touched: true, foreign_touched: true, overrun: true }
    }
}

enum Reply<'a> {
    Message {
        kind: u8,
        attributes: &'a [u8],
    },
    /// The positive errno.
    Error(i32),
}

fn reply(message: Message<'_>) -> Option<Reply<'_>> {
    if message.kind == NLMSG_ERROR {
        let errno = i32::from_ne_bytes(*message.body.first_chunk()?);
        return Some(Reply::Error(errno.checked_neg()?));
    }
    let (kind, _, attributes) = message.nftables()?;
    Some(Reply::Message { kind, attributes })
}

fn request(kind: u8, family: u8, sequence: u32, attributes: &[(u16, &[u8])]) -> Vec<u8> {
    let mut body = vec![family, 0, 0, 0];
    for (kind, value) in attributes {
        // Only our own table's name and the like: far below 64 KiB.
        body.extend_from_slice(&(4 + value.len() as u16).to_ne_bytes());
        body.extend_from_slice(&kind.to_ne_bytes());
        body.extend_from_slice(value);
        body.resize(body.len().next_multiple_of(4), 0);
    }
    let mut out = Vec::with_capacity(16 + body.len());
    out.extend_from_slice(&(16 + body.len() as u32).to_ne_bytes());
    out.extend_from_slice(&((SUBSYSTEM << 8) | u16::from(kind)).to_ne_bytes());
    out.extend_from_slice(&NLM_F_REQUEST.to_ne_bytes());
    out.extend_from_slice(&sequence.to_ne_bytes());
    out.extend_from_slice(&0u32.to_ne_bytes());
    out.extend_from_slice(&body);
    out
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Message<'a> {
    pub(crate) kind: u16,
    pub(crate) flags: u16,
    pub(crate) sequence: u32,
    pub(crate) body: &'a [u8],
}

impl<'a> Message<'a> {
    /// The nftables message kind, its family and its attributes.
    pub(crate) fn nftables(self) -> Option<(u8, u8, &'a [u8])> {
        let (header, attributes) = self.body.split_at_checked(4)?;
        let [kind, subsystem] = self.kind.to_le_bytes();
        (u16::from(subsystem) == SUBSYSTEM).then_some((kind, header[0], attributes))
    }
}

/// The messages of a datagram; ends at the first whose length can't be.
pub(crate) struct Messages<'a>(pub(crate) &'a [u8]);

impl<'a> Iterator for Messages<'a> {
    type Item = Message<'a>;

    fn next(&mut self) -> Option<Message<'a>> {
        let (header, _) = self.0.split_at_checked(16)?;
        let length = usize::try_from(u32::from_ne_bytes(*header.first_chunk()?)).ok()?;
        let body = self.0.get(16..length)?;
        self.0 = self.0.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(Message {
            kind: u16::from_ne_bytes(*header[4..].first_chunk()?),
            flags: u16::from_ne_bytes(*header[6..].first_chunk()?),
            sequence: u32::from_ne_bytes(*header[8..].first_chunk()?),
            body,
        })
    }
}

/// The value of the first attribute of this kind; what can't be read ends the search.
pub(crate) fn attribute(mut attributes: &[u8], kind: u16) -> Option<&[u8]> {
    loop {
        let (header, _) = attributes.split_at_checked(4)?;
        let length = usize::from(u16::from_ne_bytes(*header.first_chunk()?));
        let value = attributes.get(4..length)?;
        if u16::from_ne_bytes(*header[2..].first_chunk()?) & NLA_TYPE_MASK == kind {
            return Some(value);
        }
        attributes = attributes.get(length.next_multiple_of(4)..)?;
    }
}

fn be32(value: &[u8]) -> Option<u32> {
    <[u8; 4]>::try_from(value).ok().map(u32::from_be_bytes)
}

/// A process chose this name itself.
fn text(value: &[u8]) -> String {
    let end = value.iter().position(|&byte| byte == 0).unwrap_or(value.len());
    printable(&String::from_utf8_lossy(&value[..end]), 15)
}

#[cfg(test)]
mod tests {
    use super::*;

    // Captured from Linux 6.18 (little-endian) while nft ran: the announcements of a batch,
    // and the NEWGEN that ends it.
    const TABLE_OWN: &str = "40000000000a0000010000007a1600000100000f0f00010073706f6b656775617264000008000300\
        000000000c00040000000000000000080800020000000000";
    const GEN_15: &str =
        "2c0000000f0a0000010000007a1600000000000f080001000000000f080002000000167a080003006e667400";
    const TABLE_IP_SAME_NAME: &str = "40000000000a0000010000007c160000020000100f00010073706f6b6567756172640000\
        08000300000000000c00040000000000000000090800020000000000";
    const RULE_OWN: &str = "70000000060a000c0100000080160000010000120f00010073706f6b65677561726400000a000200\
        696e7075740000000c000300000000000000000234000400300001000e000100696d6d6564696174650000001c00020008000100\
        00000000100002000c0002000800010000000001";
    const FLUSH_ALL: &str = "34000000020a00000100000084160000010000130c000100666f726569676e000800030000000000\
        0c000400000000000000000770000000080a00000100000084160000010000130f00010073706f6b65677561726400000a000200\
        696e7075740000000c000300000000000000000234000400300001000e000100696d6d6564696174650000001c00020008000100\
        00000000100002000c0002000800010000000001";
    const GEN_19: &str =
        "2c0000000f0a000001000000841600000000001308000100000000130800020000001684080003006e667400";

    fn bytes(hex: &str) -> Vec<u8> {
        let digits: Vec<u32> = hex.chars().filter_map(|c| c.to_digit(16)).collect();
        digits.chunks(2).map(|pair| (pair[0] * 16 + pair[1]) as u8).collect()
    }

    fn events(datagrams: &[&str]) -> Vec<NftEvent> {
        let mut batch = Batch::default();
        let mut out = Vec::new();
        for hex in datagrams {
            batch.take(&bytes(hex));
            out.extend(std::iter::from_fn(|| batch.finished()));
        }
        out
    }

    #[test]
    #[cfg(target_endian = "little")]
    fn a_batch_names_who_committed_it_and_whether_it_was_about_our_table() {
        let event = |generation, pid, own_touched, foreign_touched| NftEvent {
            generation,
            actor: Some((pid, "nft".to_owned())),
            own_touched,
            foreign_touched,
            overrun: false,
        };
        assert_eq!(events(&[TABLE_OWN, GEN_15]), [event(15, 0x167a, true, false)]);
        assert_eq!(events(&[RULE_OWN, GEN_15]), [event(15, 0x167a, true, false)]);
        // A table of our name in another family is somebody else's.
        assert_eq!(events(&[TABLE_IP_SAME_NAME, GEN_15]), [event(15, 0x167a, false, true)]);
        assert_eq!(events(&[FLUSH_ALL, GEN_19]), [event(19, 0x1684, true, true)]);
        // What one batch touched does not stick to the next; datagrams may be joined.
        let joined = [TABLE_OWN, GEN_15, TABLE_IP_SAME_NAME, GEN_19].concat();
        assert_eq!(events(&[&joined]), [event(15, 0x167a, true, false), event(19, 0x1684, false, true)]);
        assert_eq!(events(&[TABLE_OWN]), []);
    }

    #[test]
    fn an_overrun_forgets_the_half_batch_and_claims_everything_was_touched() {
        let mut batch = Batch::default();
        batch.take(&bytes(TABLE_IP_SAME_NAME));
        let event = batch.overrun();
        assert!(event.overrun && event.own_touched && event.foreign_touched && event.actor.is_none());
        batch.take(&bytes(GEN_15));
        let next = batch.finished().expect("an event");
        assert!(!next.own_touched && !next.foreign_touched);
    }

    #[test]
    fn bytes_cut_off_or_wrong_never_panic() {
        let whole = bytes(&[TABLE_OWN, FLUSH_ALL, GEN_19].concat());
        for length in 0..whole.len() {
            Batch::default().take(&whole[..length]);
        }
        for at in 0..whole.len() {
            for value in [0, 1, 3, 4, 15, 16, 0x7f, 0xff] {
                let mut broken = whole.clone();
                broken[at] = value;
                let mut batch = Batch::default();
                batch.take(&broken);
                assert!(batch.done.len() <= broken.len() / 16);
            }
        }
    }

    #[test]
    fn a_comm_from_a_stranger_is_made_harmless() {
        assert_eq!(text(b"nft\0junk"), "nft");
        assert_eq!(text(b"a\x1b[2J"), "a\u{fffd}[2J");
        assert_eq!(text(b""), "");
    }

    #[test]
    #[cfg(target_endian = "little")]
    fn a_request_is_what_the_kernel_documents() {
        let name = [TABLE.as_bytes(), b"\0"].concat();
        let request = request(GETTABLE, NFPROTO_INET, 7, &[(TABLE_NAME, &name)]);
        assert_eq!(
            request,
            bytes("24000000010a0100070000000000000001000000 0f00010073706f6b65677561726400 00")
        );
        let message = Messages(&request).next().expect("a message");
        assert_eq!((message.sequence, message.nftables().map(|m| m.0)), (7, Some(GETTABLE)));
    }

    #[test]
    fn an_error_reply_is_an_errno() {
        let mut body = (-2i32).to_ne_bytes().to_vec();
        body.extend_from_slice(&[0; 16]);
        let message = |body| Message { kind: NLMSG_ERROR, flags: 0, sequence: 1, body };
        assert!(matches!(reply(message(&body)), Some(Reply::Error(2))));
        assert!(reply(message(&body[..3])).is_none());
        assert!(reply(message(&i32::MIN.to_ne_bytes())).is_none());
    }
}
