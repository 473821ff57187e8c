//! The way in and the way back: the device's state by rtnetlink, and a source for probes
//! whose replies the host would route out through that device.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use anyhow::{Context as _, bail};
use ipnet::IpNet;
use netlink_packet_core::Emitable as _;
use netlink_packet_route::link::{LinkFlags, LinkHeader};

use super::super::links;
use super::super::netlink::{Netlink, NetlinkError, attributes, hint, u32_at};
use super::SweepError;
use crate::observed::Link;
use crate::terms::Family;

/// What the kernel says of the device now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Device {
    pub up: bool,
    /// All zero without a link layer.
    pub mac: [u8; 6],
    /// The program that its driver runs on what arrives.
    pub native_xdp: Option<u32>,
    /// The device that gives it its frames as they are: a macvlan's.
    pub below: Option<u32>,
}

/// Where probes come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Origin {
    pub base: IpAddr,
    /// A block of which each probe has an address of its own; else one for all.
    pub spread: bool,
}

impl Origin {
    /// As in [`sidecar_ebpf::sweep::Order`].
    pub fn words(&self) -> [u32; 4] {
        match self.base {
            IpAddr::V4(base) => [base.to_bits(), 0, 0, 0],
            IpAddr::V6(base) => {
                let bits = base.to_bits();
                [96, 64, 32, 0].map(|shift| (bits >> shift) as u32)
            }
        }
    }

    pub fn address(&self, words: [u32; 4]) -> IpAddr {
        match self.base {
            IpAddr::V4(_) => Ipv4Addr::from_bits(words[0]).into(),
            IpAddr::V6(_) => {
                Ipv6Addr::from_bits(words.iter().fold(0, |bits, word| bits << 32 | u128::from(*word))).into()
            }
        }
    }
}

/// Where packets of strangers come in for a device, and as whose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Door {
    pub index: u32,
    /// The neighbour whom strangers come through, if he is known.
    pub neighbour: Option<[u8; 6]>,
}

pub struct Routes(Netlink);

const PROTOCOL: isize = netlink_sys::protocols::NETLINK_ROUTE;
const RTM_GETLINK: u16 = 18;
const RTM_GETROUTE: u16 = 26;
const RTM_GETNEIGH: u16 = 30;
const NDA_DST: u16 = 1;
const NDA_LLADDR: u16 = 2;
const AF_BRIDGE: u8 = 7;
const RTA_GATEWAY: u16 = 5;
const IFLA_ADDRESS: u16 = 1;
const IFLA_LINK: u16 = 5;
const IFLA_LINKINFO: u16 = 18;
const IFLA_INFO_KIND: u16 = 1;
const IFLA_LINK_NETNSID: u16 = 37;
const IFLA_XDP: u16 = 43;
const IFLA_XDP_DRV_PROG_ID: u16 = 5;
const RTA_DST: u16 = 1;
const RTA_SRC: u16 = 2;
const RTA_OIF: u16 = 4;

impl Routes {
    pub fn open() -> anyhow::Result<Self> {
        Ok(Self(Netlink::open(PROTOCOL).context("read routes")?))
    }

    pub fn device(&mut self, index: u32) -> anyhow::Result<Device> {
        let header = LinkHeader { index, ..LinkHeader::default() };
        let mut request = vec![0; header.buffer_len()];
        header.emit(&mut request);
        let found = self.0.request(RTM_GETLINK, &request, decode_device);
        let found = found.with_context(|| format!("read interface {index}"))?;
        found.first().copied().with_context(|| format!("no interface {index}"))
    }

    /// Of a bridge, the port behind which the gateway is: its chains and those of the
    /// bridge family are on a stranger's way, too. Of a macvlan, the device below.
    pub fn door(&mut self, link: &Link, to: IpAddr, origin: IpAddr) -> anyhow::Result<Door> {
        let mut door = self.door_above(link, to, origin)?;
        if let Some(below) = self.device(door.index)?.below {
            door.index = below;
        }
        Ok(door)
    }

    fn door_above(&mut self, link: &Link, to: IpAddr, origin: IpAddr) -> anyhow::Result<Door> {
        let Some(hop) = self.way(to, origin)?.map(|(_, gateway)| gateway.unwrap_or(origin)) else {
            return Ok(Door { index: link.index, neighbour: None });
        };
        let family = if to.is_ipv4() { 2 } else { 10 };
        let mut neighbour = None;
        self.neighbours(family, |index, address, mac| {
            if index == link.index && address == Some(hop) {
                neighbour = mac;
            }
        })?;
        let mut index = link.index;
        if let Some(neighbour) = neighbour {
            let ports: Vec<u32> = links::read()?
                .into_iter()
                .filter(|l| l.master == Some(link.index))
                .map(|l| l.index)
                .collect();
            if !ports.is_empty() {
                self.neighbours(AF_BRIDGE, |port, _, mac| {
                    if mac == Some(neighbour) && ports.contains(&port) {
                        index = port;
                    }
                })?;
            }
        }
        Ok(Door { index, neighbour })
    }

    /// Calls with the device, the address and the link-layer address of each entry.
    fn neighbours(
        &mut self,
        family: u8,
        mut each: impl FnMut(u32, Option<IpAddr>, Option<[u8; 6]>),
    ) -> anyhow::Result<()> {
        // struct ndmsg: family, padding, device, state, flags, type.
        let request = [family, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        let found = self.0.dump(RTM_GETNEIGH, &request, decode_neighbour).context("read neighbours")?;
        found.into_iter().for_each(|(index, address, mac)| each(index, address, mac));
        Ok(())
    }

    /// The device that a packet from `from` (an address of this host) to `to` leaves by.
    /// `None`: there is no route.
    pub fn leaves_by(&mut self, from: IpAddr, to: IpAddr) -> anyhow::Result<Option<u32>> {
        Ok(self.way(from, to)?.map(|(index, _)| index))
    }

    /// The same with the gateway, if the way leads by one.
    fn way(&mut self, from: IpAddr, to: IpAddr) -> anyhow::Result<Option<(u32, Option<IpAddr>)>> {
        let (family, bits) = if to.is_ipv4() { (2u8, 32u8) } else { (10, 128) };
        // struct rtmsg: family, bits of destination and source, tos, table, protocol,
        // scope, type, flags.
        let mut request = vec![family, bits, bits, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        for (kind, address) in [(RTA_DST, to), (RTA_SRC, from)] {
            let octets = match address {
                IpAddr::V4(a) => a.octets().to_vec(),
                IpAddr::V6(a) => a.octets().to_vec(),
            };
            request.extend_from_slice(&(4 + octets.len() as u16).to_ne_bytes());
            request.extend_from_slice(&kind.to_ne_bytes());
            request.extend_from_slice(&octets);
        }
        match self.0.request(RTM_GETROUTE, &request, decode_route) {
            Ok(found) => Ok(found.first().copied()),
            Err(error) => match error.refusal() {
                Some(libc::ENETUNREACH | libc::EHOSTUNREACH | libc::EACCES | libc::EINVAL | libc::ESRCH) => {
                    Ok(None)
                }
                _ => {
                    let hint = hint(&error);
                    Err(anyhow::Error::new(error).context(format!("look up the route to {to}{hint}")))
                }
            },
        }
    }

    /// A source as a stranger far away would have: a random block that is routed out
    /// through the device and that no rule names, so that each probe can have an address
    /// of its own. Where only neighbours are routed that way, one unused address of theirs.
    pub fn origin(
        &mut self,
        link: &Link,
        to: IpAddr,
        named: &[IpNet],
        random: &mut impl FnMut() -> u32,
    ) -> anyhow::Result<Origin> {
        // A probe from an address of this host's own would be a martian.
        let local: Vec<IpNet> = links::read()?.into_iter().flat_map(|link| link.addresses).collect();
        for _ in 0..TRIES {
            let origin = far(Family::of(to), random());
            let block = IpNet::new(origin.base, if to.is_ipv4() { 16 } else { 48 })
                .context("a block of addresses")?;
            if named.iter().chain(&local).all(|net| !overlap(net, &block))
                && self.leaves_by(to, origin.base)? == Some(link.index)
            {
                return Ok(origin);
            }
        }
        for net in link.addresses.iter().filter(|net| Family::of_net(net) == Family::of(to)) {
            for base in
                near(net, random()).into_iter().filter(|base| local.iter().all(|net| net.addr() != *base))
            {
                if self.leaves_by(to, base)? == Some(link.index) {
                    return Ok(Origin { base, spread: false });
                }
            }
        }
        bail!(SweepError::NoWay(link.name.clone(), to))
    }

    /// As the operator chose; must be routed the same way.
    pub fn chosen(&mut self, link: &Link, to: IpAddr, source: IpAddr) -> anyhow::Result<Origin> {
        if Family::of(source) != Family::of(to) {
            bail!("the source {source} and the address {to} are of two families");
        }
        if self.leaves_by(to, source)? != Some(link.index) {
            bail!("no route back to the source {source} through {}", link.name);
        }
        Ok(Origin { base: source, spread: false })
    }
}

pub(in crate::source) fn decode_device(payload: &[u8], out: &mut Vec<Device>) -> Result<(), NetlinkError> {
    let header = LinkHeader::parse(payload).map_err(|_| NetlinkError::Truncated("an interface"))?;
    let mut device = Device { up: header.flags.contains(LinkFlags::Up), ..Device::default() };
    let (mut is_macvlan, mut elsewhere) = (false, false);
    for attribute in attributes(payload.get(header.buffer_len()..).unwrap_or(&[])) {
        match attribute? {
            (IFLA_ADDRESS, value) => device.mac = value.try_into().unwrap_or(device.mac),
            (IFLA_LINK, value) => device.below = u32_at(value, 0),
            (IFLA_LINK_NETNSID, _) => elsewhere = true,
            (IFLA_LINKINFO, value) => {
                for of_kind in attributes(value) {
                    let (kind, value) = of_kind?;
                    is_macvlan |= kind == IFLA_INFO_KIND && value.starts_with(b"macvlan");
                }
            }
            (IFLA_XDP, value) => {
                for of_xdp in attributes(value) {
                    if let (IFLA_XDP_DRV_PROG_ID, value) = of_xdp? {
                        device.native_xdp = u32_at(value, 0);
                    }
                }
            }
            _ => {}
        }
    }
    device.below = device.below.filter(|_| is_macvlan && !elsewhere);
    out.push(device);
    Ok(())
}

/// The device, the address and the link-layer address.
type Neighbour = (u32, Option<IpAddr>, Option<[u8; 6]>);

pub(in crate::source) fn decode_neighbour(
    payload: &[u8],
    out: &mut Vec<Neighbour>,
) -> Result<(), NetlinkError> {
    let (mut address, mut mac) = (None, None);
    for attribute in attributes(payload.get(12..).unwrap_or(&[])) {
        match attribute? {
            (NDA_DST, value) => address = ip(value),
            (NDA_LLADDR, value) => mac = value.try_into().ok(),
            _ => {}
        }
    }
    out.extend(u32_at(payload, 4).map(|index| (index, address, mac)));
    Ok(())
}

/// The device and the gateway.
pub(in crate::source) fn decode_route(
    payload: &[u8],
    out: &mut Vec<(u32, Option<IpAddr>)>,
) -> Result<(), NetlinkError> {
    const UNICAST: u8 = 1;
    let (mut index, mut gateway) = (None, None);
    for attribute in attributes(payload.get(12..).unwrap_or(&[])) {
        match attribute? {
            (RTA_OIF, value) => index = u32_at(value, 0),
            (RTA_GATEWAY, value) => gateway = ip(value),
            _ => {}
        }
    }
    if payload.get(7) == Some(&UNICAST) {
        out.extend(index.map(|index| (index, gateway)));
    }
    Ok(())
}

fn ip(octets: &[u8]) -> Option<IpAddr> {
    match octets.len() {
        4 => <[u8; 4]>::try_from(octets).ok().map(IpAddr::from),
        16 => <[u8; 16]>::try_from(octets).ok().map(IpAddr::from),
        _ => None,
    }
}

const TRIES: usize = 64;

/// First bytes of IPv4 blocks that have been assigned as a whole for decades: no bogons,
/// no documentation, no private or shared space in them.
const FAR: [u8; 12] = [4, 8, 12, 18, 20, 38, 52, 63, 68, 73, 75, 99];

fn far(family: Family, random: u32) -> Origin {
    let [a, b, c, d] = random.to_be_bytes();
    match family {
        Family::Ipv4 => {
            let first = FAR[usize::from(a) % FAR.len()];
            Origin { base: Ipv4Addr::new(first, b, c, d).into(), spread: true }
        }
        Family::Ipv6 => {
            // 2600::/12, North America. Each probe from a /64 of its own.
            let segments = [0x2600 | u16::from(a & 0x0f), u16::from_be_bytes([b, c]), u16::from(d) << 4];
            let host = random.rotate_left(9);
            let base = Ipv6Addr::new(
                segments[0],
                segments[1],
                segments[2],
                0,
                0x0200 | (host >> 24) as u16,
                host as u16,
                (host >> 16) as u16,
                0x1d,
            );
            Origin { base: base.into(), spread: true }
        }
    }
}

/// Some addresses on the device's own network.
fn near(net: &IpNet, random: u32) -> Vec<IpAddr> {
    match net {
        IpNet::V4(net) => {
            let free = 32 - net.prefix_len();
            let mask = if free >= 32 { u32::MAX } else { (1u32 << free) - 1 };
            let network = u32::from(net.network());
            let host = |n: u32| IpAddr::from(Ipv4Addr::from(network | (n & mask)));
            let usable = |n: &u32| free < 2 || (n & mask != 0 && n & mask != mask);
            (0..8).map(|step| random.wrapping_add(step)).filter(usable).map(host).collect()
        }
        IpNet::V6(net) => {
            let free = 128 - u32::from(net.prefix_len());
            let mask = if free >= 128 { u128::MAX } else { (1u128 << free) - 1 };
            let network = u128::from(net.network());
            (0..8)
                .map(|step| u128::from(random.wrapping_add(step)) | 1)
                .map(|n| Ipv6Addr::from(network | (n & mask)).into())
                .collect()
        }
    }
}

/// A prefix that names everything (0.0.0.0/0) names nobody.
fn overlap(named: &IpNet, block: &IpNet) -> bool {
    named.prefix_len() > 1 && (named.contains(block) || block.contains(named))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn far_sources_are_nobodys_special_addresses() {
        for random in (0..=u32::MAX).step_by(1_000_003) {
            match far(Family::Ipv4, random).base {
                IpAddr::V4(base) => assert!(
                    !(base.is_private()
                        || base.is_loopback()
                        || base.is_multicast()
                        || base.is_documentation())
                        && FAR.contains(&base.octets()[0])
                ),
                IpAddr::V6(base) => panic!("{base}"),
            }
            let six = far(Family::Ipv6, random).base;
            let net: IpNet = "2600::/12".parse().expect("a prefix");
            assert!(net.contains(&six), "{six}");
        }
    }

    #[test]
    fn near_sources_are_hosts_of_the_network() {
        let net: IpNet = "198.51.100.7/30".parse().expect("a prefix");
        for random in 0..64 {
            for base in near(&net, random) {
                assert!(net.contains(&base) && base != net.network() && base != net.broadcast(), "{base}");
            }
        }
        let net: IpNet = "2001:db8:1::7/64".parse().expect("a prefix");
        assert!(near(&net, 99).iter().all(|base| net.contains(base) && *base != net.network()));
        assert_eq!(near(&"10.0.0.1/32".parse().expect("a prefix"), 5)[0], IpAddr::from([10, 0, 0, 1]));
    }

    #[test]
    fn a_rule_for_everyone_names_nobody() {
        let block: IpNet = "12.34.0.0/16".parse().expect("a prefix");
        let net = |text: &str| text.parse::<IpNet>().expect("a prefix");
        assert!(!overlap(&net("0.0.0.0/0"), &block));
        assert!(overlap(&net("12.0.0.0/8"), &block) && overlap(&net("12.34.5.6/32"), &block));
        assert!(!overlap(&net("13.0.0.0/8"), &block) && !overlap(&net("2600::/12"), &block));
    }
}
