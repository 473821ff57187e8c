//! The qdisc and filters of a device by rtnetlink, as far as kernels before tcx need it.

use anyhow::{Context as _, bail};
use aya::programs::tc::TcHandle;
use netlink_packet_core::{NLM_F_DUMP, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::tc::{TcAttribute, TcFilterBpfOption, TcMessage, TcOption};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};
use rustix::net::{AddressFamily, SocketType, netdevice};
use sidecar_ebpf::IN;

/// A bpf filter below a clsact qdisc.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Filter {
    pub(super) name: String,
    pub(super) program_id: Option<u32>,
    pub(super) priority: u16,
    pub(super) handle: u32,
}

impl Filter {
    pub(super) fn handle(&self) -> TcHandle {
        TcHandle::from(self.handle)
    }

    pub(super) fn is_at(&self, priority: u16, handle: TcHandle) -> bool {
        self.priority == priority && self.handle == u32::from(handle)
    }
}

const CLSACT: u32 = 0xffff_fff1;
const CLSACT_INGRESS: u32 = 0xffff_fff2;
const CLSACT_EGRESS: u32 = 0xffff_fff3;

/// Kind of the qdisc in the place of clsact.
pub(super) fn qdisc(index: u32) -> anyhow::Result<Option<String>> {
    let messages = dump(RouteNetlinkMessage::GetQueueDiscipline(TcMessage::with_index(device(index)?)))?;
    Ok(messages
        .into_iter()
        .find_map(|message| match message {
            RouteNetlinkMessage::NewQueueDiscipline(message)
                if message.header.index as u32 == index && u32::from(message.header.parent) == CLSACT =>
            {
                Some(message.attributes.into_iter().find_map(|attribute| match attribute {
                    TcAttribute::Kind(kind) => Some(kind),
                    _ => None,
                }))
            }
            _ => None,
        })
        .flatten())
}

/// The bpf filters of one direction.
pub(super) fn filters(index: u32, direction: usize) -> anyhow::Result<Vec<Filter>> {
    let mut request = TcMessage::with_index(device(index)?);
    request.header.parent = if direction == IN { CLSACT_INGRESS } else { CLSACT_EGRESS }.into();
    let parent = request.header.parent;
    let messages = dump(RouteNetlinkMessage::GetTrafficFilter(request))?;
    Ok(messages
        .into_iter()
        .filter_map(|message| match message {
            RouteNetlinkMessage::NewTrafficFilter(message)
                if message.header.index as u32 == index && message.header.parent == parent =>
            {
                filter(&message)
            }
            _ => None,
        })
        .collect())
}

fn filter(message: &TcMessage) -> Option<Filter> {
    let (mut name, mut program_id) = (None, None);
    for attribute in &message.attributes {
        let TcAttribute::Options(options) = attribute else { continue };
        for option in options {
            match option {
                TcOption::Bpf(TcFilterBpfOption::ProgName(text)) => name = Some(text.clone()),
                TcOption::Bpf(TcFilterBpfOption::ProgId(id)) => program_id = Some(*id),
                _ => {}
            }
        }
    }
    // A filter's first message names its chain only; it has no handle yet.
    let handle = u32::from(message.header.handle);
    let priority = (message.header.info >> 16) as u16;
    name.filter(|_| handle != 0).map(|name| Filter { name, program_id, priority, handle })
}

fn device(index: u32) -> anyhow::Result<i32> {
    i32::try_from(index).with_context(|| format!("{index} is no device number"))
}

fn dump(request: RouteNetlinkMessage) -> anyhow::Result<Vec<RouteNetlinkMessage>> {
    let mut socket = Socket::new(NETLINK_ROUTE).context("open a netlink socket")?;
    socket.bind_auto().context("bind a netlink socket")?;
    socket.connect(&SocketAddr::new(0, 0)).context("connect a netlink socket")?;
    let mut message = NetlinkMessage::new(NetlinkHeader::default(), NetlinkPayload::from(request));
    message.header.flags = NLM_F_REQUEST | NLM_F_DUMP;
    message.header.sequence_number = 1;
    message.finalize();
    let mut buffer = vec![0; message.buffer_len()];
    message.serialize(&mut buffer);
    socket.send(&buffer, 0).context("send a netlink request")?;
    let mut out = Vec::new();
    loop {
        let (reply, _) = socket.recv_from_full().context("receive a netlink reply")?;
        if decode(&reply, &mut out)? {
            return Ok(out);
        }
        if reply.is_empty() {
            bail!("dump of traffic control ended early");
        }
    }
}

/// The messages of one datagram; whether the dump has come to its end.
pub(in crate::source) fn decode(mut rest: &[u8], out: &mut Vec<RouteNetlinkMessage>) -> anyhow::Result<bool> {
    while !rest.is_empty() {
        let message =
            NetlinkMessage::<RouteNetlinkMessage>::deserialize(rest).context("decode a netlink reply")?;
        let length = (message.header.length as usize).next_multiple_of(4);
        match message.payload {
            NetlinkPayload::Done(_) => return Ok(true),
            NetlinkPayload::Error(error) if error.code.is_some() => {
                // Not by `to_io`, which panics at the lowest number there is.
                let refusal = std::io::Error::from_raw_os_error(error.raw_code().saturating_abs());
                return Err(refusal).context("dump of traffic control");
            }
            NetlinkPayload::InnerMessage(message) => out.push(message),
            _ => {}
        }
        if length == 0 || length > rest.len() {
            break;
        }
        rest = &rest[length..];
    }
    Ok(false)
}

/// The name of a device of this network namespace.
pub(super) fn name_of(index: u32) -> Option<String> {
    let socket = rustix::net::socket(AddressFamily::INET, SocketType::DGRAM, None).ok()?;
    netdevice::index_to_name(&socket, index).ok()
}

/// Numbers and names of the devices of this network namespace.
pub(super) fn names() -> anyhow::Result<Vec<(u32, String)>> {
    use netlink_packet_route::link::{LinkAttribute, LinkMessage};
    let messages = dump(RouteNetlinkMessage::GetLink(LinkMessage::default()))?;
    Ok(messages
        .into_iter()
        .filter_map(|message| match message {
            RouteNetlinkMessage::NewLink(link) => {
                let name = link.attributes.into_iter().find_map(|attribute| match attribute {
                    LinkAttribute::IfName(name) => Some(name),
                    _ => None,
                });
                name.map(|name| (link.header.index, name))
            }
            _ => None,
        })
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_filter_without_handle_or_name_is_none_of_ours() {
        let mut message = TcMessage::with_index(2);
        message.header.info = 7 << 16 | 0x0300;
        message.header.handle = 0x5347.into();
        assert_eq!(filter(&message), None);
        let name = TcOption::Bpf(TcFilterBpfOption::ProgName("in_eth_public".into()));
        let id = TcOption::Bpf(TcFilterBpfOption::ProgId(42));
        message.attributes.push(TcAttribute::Options(vec![name, id]));
        let found = filter(&message).expect("a filter");
        assert_eq!((found.name.as_str(), found.program_id), ("in_eth_public", Some(42)));
        assert!(found.is_at(7, TcHandle::new(0, 0x5347)) && !found.is_at(8, TcHandle::new(0, 0x5347)));
        message.header.handle = 0.into();
        assert_eq!(filter(&message), None, "the head of a chain");
    }

    #[test]
    fn the_devices_here_have_numbers_and_names_that_agree() {
        let names = names().expect("a dump");
        assert!(names.iter().any(|(_, name)| name == "lo"), "{names:?}");
        for (index, name) in &names {
            assert_eq!(name_of(*index).as_ref(), Some(name));
        }
        assert_eq!(name_of(u32::MAX - 1), None);
    }
}
