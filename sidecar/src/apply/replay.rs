//! Our table as the kernel holds it, ready to be sent again: what takes nft several
//! milliseconds of starting up takes this one system call.
//!
//! Nothing is encoded here. After nft has put the table in place and it has been read
//! back and compared, the kernel's own description of it is taken (tables, chains, sets,
//! counters, rules), less the numbers that the kernel gave; the kernel takes its own
//! words back. If it ever does not, `restore_table` does the same by way of nft.

use std::io;
use std::os::fd::OwnedFd;

use netlink_packet_core::NLA_TYPE_MASK;
use rustix::net::{RecvFlags, SendFlags};

use crate::desired::TABLE;
use crate::source::netlink;
use crate::source::nft_events::{
    self, Messages, NFPROTO_INET, NftQueries, NftSocketError, SUBSYSTEM, TABLE_NAME, attribute,
};

/// Beyond this a table is not ours: a policy with hundreds of rules stays far below.
pub(super) const BATCH_MAX: usize = 4 << 20;
const DATAGRAM_MAX: usize = 1 << 16;
const REPLY_TIMEOUT: std::time::Duration = std::time::Duration::from_secs(5);

const NLM_F_REQUEST: u16 = 0x1;
pub(super) const NLM_F_ACK: u16 = 0x4;
const NLM_F_DUMP_INTR: u16 = 0x10;
const NLM_F_DUMP: u16 = 0x300;
pub(super) const NLM_F_CREATE: u16 = 0x400;
const NLM_F_APPEND: u16 = 0x800;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
pub(super) const BATCH_BEGIN: u16 = 0x10;
pub(super) const BATCH_END: u16 = 0x11;

pub(super) const NEWTABLE: u8 = 0;
const DELRULE: u8 = 8;
pub(super) const SET_NAME: u16 = 2;
pub(super) const SET_FLAGS: u16 = 3;
/// NFT_SET_TIMEOUT.
const SET_TIMEOUT: u32 = 0x10;
pub(super) const SET_ID: u16 = 10;
const OBJ_DATA: u16 = 4;

/// A kind of object: how to ask for all of them, how to send one again, and which of its
/// attributes say what it is. The others are handles, positions and use counts.
struct Kind {
    get: u8,
    new: u8,
    keep: &'static [u16],
    flags: u16,
}

/// NFTA_CHAIN_{TABLE, NAME, HOOK, POLICY, TYPE}.
const CHAINS: Kind = Kind { get: 4, new: 3, keep: &[1, 3, 4, 5, 7], flags: NLM_F_CREATE };
/// NFTA_RULE_{TABLE, CHAIN, EXPRESSIONS, USERDATA}.
const RULES: Kind = Kind { get: 7, new: 6, keep: &[1, 2, 4, 7], flags: NLM_F_CREATE | NLM_F_APPEND };
/// NFTA_SET_{TABLE, NAME, FLAGS, KEY_TYPE, KEY_LEN, DESC, USERDATA}.
const SETS: Kind = Kind { get: 10, new: 9, keep: &[1, 2, 3, 4, 5, 9, 13], flags: NLM_F_CREATE };
/// NFTA_SET_ELEM_LIST_{TABLE, SET, ELEMENTS}.
const ELEMENTS: Kind = Kind { get: 13, new: 12, keep: &[1, 2, 3], flags: NLM_F_CREATE };
/// NFTA_OBJ_{TABLE, NAME, TYPE}; the data, what was counted, is left empty.
const COUNTERS: Kind = Kind { get: 19, new: 18, keep: &[1, 2, 3], flags: NLM_F_CREATE };

#[derive(Debug, thiserror::Error)]
pub enum ReplayError {
    #[error("take down table inet spokeguard as the kernel holds it")]
    Capture(#[source] io::Error),
    #[error("the rule set changed while table inet spokeguard was taken down")]
    Changed,
    #[error(transparent)]
    Generation(#[from] NftSocketError),
    #[error("send table inet spokeguard to the kernel")]
    Send(#[source] io::Error),
}

/// A batch that puts our whole table in place, whatever is left of it.
///
/// It keeps the socket that it will be sent over. Closing any nftables socket holds the
/// rule set's lock until what was deleted before is freed, 10 to 30 ms after a flush: whoever
/// flushed closes theirs some 100 us after the commit, and a repair that isn't waiting for
/// the lock by then waits for all of that.
pub struct Replay {
    batch: Vec<u8>,
    generation: u32,
    socket: OwnedFd,
}

impl Replay {
    /// Takes down the table that is there. Only of use after it was compared with what
    /// is desired: the caller checks that [`Self::generation`] is the one it compared.
    pub fn capture() -> Result<Self, ReplayError> {
        let mut queries = NftQueries::open()?;
        let generation = queries.generation()?;
        let socket = open().map_err(ReplayError::Capture)?;
        let batch = batch(&socket).map_err(ReplayError::Capture)?;
        if queries.generation()? != generation {
            return Err(ReplayError::Changed);
        }
        Ok(Self { batch, generation, socket })
    }

    /// The generation of the rule set that was taken down.
    pub fn generation(&self) -> u32 {
        self.generation
    }

    /// All of it or nothing. Counters that are gone start from 0 again.
    pub fn send(&self) -> Result<(), ReplayError> {
        send(&self.socket, &self.batch).map_err(ReplayError::Send)
    }
}

pub(super) fn send(socket: &OwnedFd, batch: &[u8]) -> io::Result<()> {
    let mut buffer = vec![0; DATAGRAM_MAX];
    // Of a batch that failed there may be more answers than the one that was read.
    while rustix::net::recv(socket, &mut buffer[..], RecvFlags::DONTWAIT).is_ok() {}
    rustix::net::send(socket, batch, SendFlags::empty())?;
    let length = receive(socket, &mut buffer)?;
    // Errors come in the order of the messages, that of the commit before all; the only
    // message that asks to be acknowledged is the last. So the first answer decides.
    let answer = Messages(&buffer[..length]).next().ok_or(io::ErrorKind::InvalidData)?;
    match (answer.kind, answer.body.first_chunk().map(|bytes| i32::from_ne_bytes(*bytes))) {
        (NLMSG_ERROR, Some(0)) => Ok(()),
        (NLMSG_ERROR, Some(negative)) => Err(io::Error::from_raw_os_error(negative.saturating_neg())),
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
}

fn batch(socket: &OwnedFd) -> io::Result<Vec<u8>> {
    let table = [(TABLE_NAME, [TABLE.as_bytes(), b"\0"].concat())];
    let mut out = Builder(Vec::new());
    out.marker(BATCH_BEGIN);
    out.message(NEWTABLE, NLM_F_CREATE, &table);
    // Of a table that is still there: its rules, in all chains, and with them their sets.
    out.message(DELRULE, 0, &table);
    for object in dump(socket, &COUNTERS, &table)? {
        out.message(COUNTERS.new, COUNTERS.flags, &[object, vec![(OBJ_DATA, Vec::new())]].concat());
    }
    // All chains before the first rule: rules jump to them.
    for object in dump(socket, &CHAINS, &table)? {
        out.message(CHAINS.new, CHAINS.flags, &object);
    }
    for (id, mut object) in (1u32..).zip(dump(socket, &SETS, &table)?) {
        let Some((_, name)) = object.iter().find(|(kind, _)| *kind == SET_NAME).cloned() else { continue };
        object.push((SET_ID, id.to_be_bytes().to_vec()));
        out.message(SETS.new, SETS.flags, &object);
        // What the kernel was to end by itself is not begun again: of a table that is gone
        // openings are gone, and in one that is still there they are still there.
        if is_timed(&object) {
            continue;
        }
        for elements in dump(socket, &ELEMENTS, &[table[0].clone(), (SET_NAME, name)])? {
            out.message(ELEMENTS.new, ELEMENTS.flags, &elements);
        }
    }
    let rules = dump(socket, &RULES, &table)?;
    if rules.is_empty() {
        return Err(io::ErrorKind::NotFound.into());
    }
    for (at, object) in rules.iter().enumerate() {
        let ack = if at + 1 == rules.len() { NLM_F_ACK } else { 0 };
        out.message(RULES.new, RULES.flags | ack, object);
    }
    out.marker(BATCH_END);
    if out.0.len() > BATCH_MAX {
        return Err(io::ErrorKind::FileTooLarge.into());
    }
    Ok(out.0)
}

/// Whether the elements of this set have a timeout of their own.
fn is_timed(set: &Attributes) -> bool {
    let flags = set.iter().find(|(kind, _)| kind & NLA_TYPE_MASK == SET_FLAGS);
    let flags =
        flags.and_then(|(_, value)| value.first_chunk()).map_or(0, |bytes| u32::from_be_bytes(*bytes));
    flags & SET_TIMEOUT != 0
}

/// Each with its kind, flag bits included.
pub type Attributes = Vec<(u16, Vec<u8>)>;

/// Every object of one kind in our table, in the kernel's order.
fn dump(socket: &OwnedFd, kind: &Kind, filter: &[(u16, Vec<u8>)]) -> io::Result<Vec<Attributes>> {
    let mut ask = Builder(Vec::new());
    ask.message(kind.get, NLM_F_DUMP, filter);
    rustix::net::send(socket, &ask.0, SendFlags::empty())?;
    let mut objects = Vec::new();
    let (mut total, mut buffer) = (0, vec![0; DATAGRAM_MAX]);
    loop {
        let length = receive(socket, &mut buffer)?;
        total += length;
        if total > BATCH_MAX {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        for message in Messages(&buffer[..length]) {
            if message.flags & NLM_F_DUMP_INTR != 0 {
                return Err(io::ErrorKind::Interrupted.into());
            }
            match message.kind {
                NLMSG_DONE => return Ok(objects),
                NLMSG_ERROR => {
                    let code = message.body.first_chunk().map_or(0, |bytes| i32::from_ne_bytes(*bytes));
                    return Err(io::Error::from_raw_os_error(code.saturating_neg()));
                }
                _ => {}
            }
            let Some((_, family, attributes)) = message.nftables() else { continue };
            let name = attribute(attributes, TABLE_NAME).and_then(|name| name.strip_suffix(b"\0"));
            if family == NFPROTO_INET && name == Some(TABLE.as_bytes()) {
                objects.push(kept(attributes, kind.keep).ok_or(io::ErrorKind::InvalidData)?);
            }
        }
    }
}

/// The attributes of these kinds, with their flags; `None` if they don't add up.
pub fn kept(mut attributes: &[u8], keep: &[u16]) -> Option<Attributes> {
    let mut out = Vec::new();
    while !attributes.is_empty() {
        let (header, _) = attributes.split_at_checked(4)?;
        let length = usize::from(u16::from_ne_bytes(*header.first_chunk()?));
        let kind = u16::from_ne_bytes(*header[2..].first_chunk()?);
        let value = attributes.get(4..length)?;
        if keep.contains(&(kind & NLA_TYPE_MASK)) {
            out.push((kind, value.to_vec()));
        }
        attributes = attributes.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    Some(out)
}

pub(super) fn open() -> io::Result<OwnedFd> {
    let socket = nft_events::to_kernel(REPLY_TIMEOUT)?;
    // The kernel copies the batch whole; the default allows some 200 KiB.
    rustix::net::sockopt::set_socket_send_buffer_size_force(&socket, BATCH_MAX)?;
    Ok(socket)
}

fn receive(socket: &OwnedFd, buffer: &mut [u8]) -> io::Result<usize> {
    // Connected to the kernel: another sender is refused before it gets here.
    nft_events::receive(socket, buffer)?.ok_or_else(|| io::ErrorKind::InvalidData.into())
}

/// Messages for the kernel, one after the other.
pub(super) struct Builder(pub(super) Vec<u8>);

impl Builder {
    pub(super) fn message(&mut self, kind: u8, flags: u16, attributes: &[(u16, Vec<u8>)]) {
        let mut body = vec![NFPROTO_INET, 0, 0, 0];
        for (kind, value) in attributes {
            // Values come out of attributes, so they are no longer than one can be.
            body.extend(netlink::attribute(*kind, value));
        }
        self.raw((SUBSYSTEM << 8) | u16::from(kind), flags, &body);
    }

    /// Begin and end of a batch: their body names the subsystem, in network order.
    pub(super) fn marker(&mut self, kind: u16) {
        let [high, low] = SUBSYSTEM.to_be_bytes();
        self.raw(kind, 0, &[0, 0, high, low]);
    }

    /// The begin of a batch that the kernel refuses (ERESTART) where the rules are of another generation. Linux 4.11.
    pub(super) fn begin_at(&mut self, generation: u32) {
        const BATCH_GENERATION: u16 = 1;
        let [high, low] = SUBSYSTEM.to_be_bytes();
        let asked = netlink::attribute(BATCH_GENERATION, &generation.to_be_bytes());
        self.raw(BATCH_BEGIN, 0, &[&[0, 0, high, low][..], &asked].concat());
    }

    fn raw(&mut self, kind: u16, flags: u16, body: &[u8]) {
        self.0.extend_from_slice(&(16 + body.len() as u32).to_ne_bytes());
        self.0.extend_from_slice(&kind.to_ne_bytes());
        self.0.extend_from_slice(&(flags | NLM_F_REQUEST).to_ne_bytes());
        self.0.extend_from_slice(&[0; 8]);
        self.0.extend_from_slice(body);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_an_object_is_is_kept() {
        let mut built = Builder(Vec::new());
        built.message(6, 0, &[(1, b"t\0".to_vec()), (3, vec![0; 8]), (0x8004, vec![1, 2, 3, 4])]);
        let message = Messages(&built.0).next().expect("a message");
        let (kind, family, attributes) = message.nftables().expect("of nftables");
        assert_eq!((kind, family, message.flags), (6, NFPROTO_INET, NLM_F_REQUEST));
        let rule = kept(attributes, RULES.keep).expect("adds up");
        assert_eq!(rule, [(1, b"t\0".to_vec()), (0x8004, vec![1, 2, 3, 4])]);
    }

    #[test]
    fn sets_whose_elements_end_by_themselves_are_known() {
        let set = |flags: u32| vec![(SET_NAME, b"s\0".to_vec()), (SET_FLAGS, flags.to_be_bytes().to_vec())];
        // NFT_SET_{ANONYMOUS, CONSTANT, INTERVAL}, NFT_SET_{INTERVAL, TIMEOUT, CONCAT}.
        assert_eq!([set(0x7), set(0x94), vec![]].map(|set| is_timed(&set)), [false, true, false]);
    }

    #[test]
    fn attributes_that_do_not_add_up_are_refused() {
        assert_eq!(kept(&[], &[1]), Some(Vec::new()));
        for bad in [&[1u8, 0][..], &[3, 0, 1, 0], &[0, 0, 1, 0], &[9, 0, 1, 0, 5, 5]] {
            assert_eq!(kept(bad, &[1]), None, "{bad:?}");
        }
    }
}
