//! Takes the entries away that probes of the reply mode left in conntrack's table.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use anyhow::Context as _;

use super::super::flows;
use super::super::netlink::Netlink;
use super::frame::Shape;
use crate::terms::{Port, Proto};

const NETFILTER: isize = netlink_sys::protocols::NETLINK_NETFILTER;

pub fn forget(shape: &Shape, ports: &[Port]) -> anyhow::Result<()> {
    let mut netlink = Netlink::open(NETFILTER).context("clean conntrack's table")?;
    for port in ports {
        let Some(request) = request(shape, *port) else { continue };
        match netlink.request::<()>(flows::CT_DELETE, &request, |_, _| Ok(())) {
            Ok(_) => {}
            // Most probes leave none; a kernel without conntrack has no entries at all.
            Err(error) if matches!(error.refusal(), Some(libc::ENOENT | libc::EINVAL | libc::EOPNOTSUPP)) => {
                if error.refusal() != Some(libc::ENOENT) {
                    return Ok(());
                }
            }
            Err(error) => return Err(error).context("delete a probe's entry from conntrack's table"),
        }
    }
    Ok(())
}

fn request(shape: &Shape, port: Port) -> Option<Vec<u8>> {
    let order = &shape.order;
    let source = order.source_of(port.get()).map(u32::to_be_bytes).concat();
    let source: IpAddr = match shape.to {
        IpAddr::V4(_) => Ipv4Addr::from(*source.first_chunk()?).into(),
        IpAddr::V6(_) => Ipv6Addr::from(*source.first_chunk()?).into(),
    };
    let proto = Proto::ALL.into_iter().find(|proto| proto.number() == order.proto)?;
    let from = SocketAddr::new(source, order.source_port);
    Some(flows::forgetting(proto, from, SocketAddr::new(shape.to, port.get()), None))
}
