//! Takes the entries away that probes of the reply mode left in conntrack's table.

use std::net::IpAddr;

use anyhow::Context as _;

use super::super::netlink::Netlink;
use super::frame::Shape;
use crate::terms::Port;

const NETFILTER: isize = netlink_sys::protocols::NETLINK_NETFILTER;
const CTNETLINK: u16 = 1 << 8;
const DELETE: u16 = 2;
const NESTED: u16 = 0x8000;
const CTA_TUPLE_ORIG: u16 = 1;
const CTA_TUPLE_IP: u16 = 1;
const CTA_TUPLE_PROTO: u16 = 2;
const CTA_IP_V4_SRC: u16 = 1;
const CTA_IP_V4_DST: u16 = 2;
const CTA_IP_V6_SRC: u16 = 3;
const CTA_IP_V6_DST: u16 = 4;
const CTA_PROTO_NUM: u16 = 1;
const CTA_PROTO_SRC_PORT: u16 = 2;
const CTA_PROTO_DST_PORT: u16 = 3;

pub fn forget(shape: &Shape, ports: &[Port]) -> anyhow::Result<()> {
    let mut netlink = Netlink::open(NETFILTER).context("clean conntrack's table")?;
    for port in ports {
        match netlink.request::<()>(CTNETLINK | DELETE, &request(shape, *port), |_, _| Ok(())) {
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

fn request(shape: &Shape, port: Port) -> Vec<u8> {
    let order = &shape.order;
    let source = order.source_of(port.get()).map(u32::to_be_bytes).concat();
    let (family, ip) = match shape.to {
        IpAddr::V4(to) => {
            (2, [attribute(CTA_IP_V4_SRC, &source[..4]), attribute(CTA_IP_V4_DST, &to.octets())].concat())
        }
        IpAddr::V6(to) => {
            (10, [attribute(CTA_IP_V6_SRC, &source), attribute(CTA_IP_V6_DST, &to.octets())].concat())
        }
    };
    let proto = [
        attribute(CTA_PROTO_NUM, &[order.proto]),
        attribute(CTA_PROTO_SRC_PORT, &order.source_port.to_be_bytes()),
        attribute(CTA_PROTO_DST_PORT, &port.get().to_be_bytes()),
    ]
    .concat();
    let tuple = [attribute(CTA_TUPLE_IP | NESTED, &ip), attribute(CTA_TUPLE_PROTO | NESTED, &proto)].concat();
    // struct nfgenmsg: family, version, resource.
    [vec![family, 0, 0, 0], attribute(CTA_TUPLE_ORIG | NESTED, &tuple)].concat()
}

fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(value.len() + 8);
    bytes.extend_from_slice(&(4 + value.len() as u16).to_ne_bytes());
    bytes.extend_from_slice(&kind.to_ne_bytes());
    bytes.extend_from_slice(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}
