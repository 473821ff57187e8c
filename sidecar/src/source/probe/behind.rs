//! What stands behind the last rule, before a socket: policies of IPsec, programs on the socket's control group, and
//! signatures that it asks for. All of them drop in silence, and no listing of rules or sockets shows it. Nor does
//! one show programs that choose the socket (sk_lookup).
//!
//! What can't be read holds nothing back: a port is called filtered only where something surely filters.
//! Packet filters of a single socket (SO_ATTACH_FILTER) and the least TTL that it takes (IP_MINTTL) can't be read.

use std::collections::HashMap;
use std::fs::File;
use std::net::IpAddr;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::DirEntryExt as _;
use std::path::{Path, PathBuf};

use ipnet::IpNet;

use super::super::listeners;
use super::super::netlink::{Netlink, NetlinkError, array_at, attributes, u16_at, u32_at, u64_at};
use super::frame::{self, Kind, Shape, frame};
use crate::observed::{Fate, Gate, Listener};
use crate::sys::foreign::{self, Context, Search};
use crate::terms::{Family, Port, Proto};

pub struct Behind {
    index: u32,
    proto: Proto,
    sockets: HashMap<Port, Vec<Socket>>,
    policies: Vec<Policy>,
    /// Where the control groups are that sockets are of, once somebody asks.
    groups: Option<HashMap<u64, PathBuf>>,
    programs: HashMap<u64, Vec<OwnedFd>>,
    /// Programs that choose sockets, in the order in which they are asked.
    choosers: Vec<OwnedFd>,
}

/// A listener, and what holds packets back from it.
struct Socket {
    listener: Listener,
    cookie: u64,
    /// The number of its control group; 0 where the kernel (before 5.9) does not tell.
    group: u64,
    /// Sources that have to sign.
    signed: Vec<IpNet>,
}

impl Behind {
    pub fn read(index: u32, proto: Proto) -> Self {
        let mut sockets: HashMap<Port, Vec<Socket>> = HashMap::new();
        let found = self::sockets(proto).inspect_err(|error| log::debug!("sockets: {error}"));
        for socket in found.unwrap_or_default() {
            sockets.entry(socket.listener.port).or_default().push(socket);
        }
        let policies = policies().inspect_err(|error| log::debug!("IPsec policies: {error}"));
        Self {
            index,
            proto,
            sockets,
            policies: policies.unwrap_or_default(),
            groups: None,
            programs: HashMap::new(),
            choosers: choosers().unwrap_or_default(),
        }
    }

    /// What becomes of the probe of `asked`, which got through the rules to this address and port.
    pub fn fate(&mut self, shape: &Shape, asked: Port, (address, port): (IpAddr, Port)) -> Fate {
        let as_found = Fate::Delivered { address, port };
        let fate = match self.choice(shape, asked, (address, port)) {
            Choice::None => as_found,
            Choice::Refused if self.proto == Proto::Tcp => Fate::Reset,
            Choice::Refused if address.is_ipv4() => Fate::Unreachable { icmp_type: 3, code: 3 },
            Choice::Refused => Fate::Unreachable { icmp_type: 1, code: 4 },
            Choice::Of(to, port) => {
                Fate::Delivered { address: if to.is_unspecified() { address } else { to }, port }
            }
        };
        let Fate::Delivered { address, port } = fate else { return fate };
        self.holds(shape, asked, (address, port)).map_or(fate, Fate::Held)
    }

    fn choice(&self, shape: &Shape, asked: Port, (address, port): (IpAddr, Port)) -> Choice {
        let family = if address.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
        let mut search = Search {
            family: family as u32,
            proto: self.proto.number().into(),
            remote_port: shape.order.source_port.to_be_bytes(),
            local_port: port.get().into(),
            ..Search::default()
        };
        match super::source_of(shape, asked) {
            IpAddr::V4(source) => search.remote_ip4 = source.octets(),
            IpAddr::V6(source) => search.remote_ip6 = source.octets(),
        }
        match address {
            IpAddr::V4(address) => search.local_ip4 = address.octets(),
            IpAddr::V6(address) => search.local_ip6 = address.octets(),
        }
        let mut refused = false;
        for program in &self.choosers {
            match foreign::choice(program.as_fd(), &search) {
                Ok(Some(Some(cookie))) => {
                    let all = self.sockets.values().flatten();
                    let chosen = all.into_iter().find(|socket| socket.cookie == cookie);
                    // One that is connected takes nobody else.
                    return chosen.map_or(Choice::Refused, |socket| {
                        Choice::Of(socket.listener.address.to_canonical(), socket.listener.port)
                    });
                }
                Ok(None) => refused = true,
                Ok(Some(None)) | Err(_) => {}
            }
        }
        if refused { Choice::Refused } else { Choice::None }
    }

    /// What holds back the probe of `asked`, which got through the rules to this address and port.
    fn holds(&mut self, shape: &Shape, asked: Port, (address, port): (IpAddr, Port)) -> Option<Gate> {
        let source = super::source_of(shape, asked);
        let flow = Flow {
            source,
            destination: address,
            proto: self.proto.number(),
            source_port: shape.order.source_port,
            port: port.get(),
            index: self.index,
        };
        if self.policies.iter().find(|policy| policy.concerns(&flow)).is_some_and(|policy| policy.refuses) {
            return Some(Gate::Ipsec);
        }
        let takes = |socket: &&Socket| {
            socket.listener.answers(address)
                && socket.listener.device.is_none_or(|device| device == self.index)
        };
        let here: Vec<&Socket> = self.sockets.get(&port)?.iter().filter(takes).collect();
        // As the kernel chooses. Of a group that shares the port, any may be given the packet.
        let rank = |socket: &Socket| (socket.listener.device.is_some(), !socket.listener.is_wildcard());
        let best = here.iter().map(|socket| rank(socket)).max()?;
        let chosen = || here.iter().filter(|socket| rank(socket) == best);
        if self.proto == Proto::Tcp
            && chosen().all(|socket| socket.signed.iter().any(|net| net.contains(&source)))
        {
            return Some(Gate::Signature);
        }
        let groups: Vec<u64> = chosen().map(|socket| socket.group).collect();
        let probe = frame(&Shape { to: address, ..*shape }, port.get(), Kind::Probe);
        let packet = probe.bytes.get(..frame::length(&shape.order))?;
        groups.iter().all(|group| self.refuses(*group, packet)).then_some(Gate::ControlGroup)
    }

    /// Whether a program on the control group, or above it, drops the packet.
    fn refuses(&mut self, group: u64, packet: &[u8]) -> bool {
        let (groups, index) = (&mut self.groups, self.index);
        let programs = self.programs.entry(group).or_insert_with(|| {
            let path = groups.get_or_insert_with(groups_of_the_host).get(&group);
            path.and_then(|path| programs(path)).unwrap_or_default()
        });
        let mut out = [0; 256];
        let mut drops = |program: &OwnedFd| {
            foreign::run(program.as_fd(), Context::Packet, index, packet, &mut out)
                .is_ok_and(|said| said == 0)
        };
        programs.iter().any(&mut drops)
    }
}

/// What programs say of whom a packet is for.
enum Choice {
    None,
    Refused,
    Of(IpAddr, Port),
}

/// `None`: there are none, or they can't be had, which takes CAP_SYS_ADMIN.
fn choosers() -> Option<Vec<OwnedFd>> {
    let namespace = File::open("/proc/thread-self/ns/net").ok()?;
    let ids = foreign::of_namespace(namespace.as_fd());
    let found = ids.and_then(|ids| ids.into_iter().map(foreign::by_id).collect::<Result<_, _>>());
    found.inspect_err(|error| log::debug!("sk_lookup programs: {error}")).ok()
}

const INET_DIAG_INFO: u16 = 2;
const INET_DIAG_MD5SIG: u16 = 18;
const INET_DIAG_CGROUP_ID: u16 = 21;
/// The size of `struct inet_diag_msg`.
const SOCKET: usize = 72;
/// `struct tcp_diag_md5sig`: family, bits of the prefix, length of the key, address, key.
const SIGNATURE: usize = 100;

fn sockets(proto: Proto) -> Result<Vec<Socket>, NetlinkError> {
    let mut link = Netlink::open(listeners::PROTOCOL)?;
    let mut all = Vec::new();
    for family in Family::ALL {
        let mut request = listeners::request(proto, family);
        // Whom a socket asks to sign is told together with its statistics only.
        if let Some(extensions) = request.get_mut(2) {
            *extensions = 1 << (INET_DIAG_INFO - 1);
        }
        all.extend(link.dump(listeners::SOCK_DIAG_BY_FAMILY, &request, |payload, out| {
            let mut listener = Vec::new();
            listeners::decode(payload, proto, &mut listener)?;
            // Two words, the lower one first.
            let cookie = [48, 44].map(|at| u32_at(payload, at).map_or(0, u64::from));
            let cookie = cookie[0] << 32 | cookie[1];
            let (mut group, mut signed) = (0, Vec::new());
            for attribute in attributes(payload.get(SOCKET..).unwrap_or(&[])) {
                match attribute? {
                    (INET_DIAG_CGROUP_ID, value) => group = u64_at(value, 0).unwrap_or(0),
                    (INET_DIAG_MD5SIG, value) => {
                        signed = value.chunks_exact(SIGNATURE).filter_map(signer).collect()
                    }
                    _ => {}
                }
            }
            out.extend(listener.pop().map(|listener| Socket { listener, cookie, group, signed }));
            Ok(())
        })?);
    }
    Ok(all)
}

fn signer(signature: &[u8]) -> Option<IpNet> {
    let [family, bits] = array_at(signature, 0)?;
    let address = address(family.into(), array_at(signature, 4)?)?;
    IpNet::new(address, bits).ok()
}

fn address(family: u16, octets: [u8; 16]) -> Option<IpAddr> {
    let [a, b, c, d, ..] = octets;
    match i32::from(family) {
        libc::AF_INET => Some([a, b, c, d].into()),
        libc::AF_INET6 => Some(octets.into()),
        _ => None,
    }
}

/// So many control groups are looked at for one sweep.
const GROUPS_MAX: usize = 16_384;
const DEPTH_MAX: usize = 16;

/// Every control group that is in sight, by the number that its folder has.
fn groups_of_the_host() -> HashMap<u64, PathBuf> {
    let roots = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"].map(Path::new);
    let mut out = HashMap::new();
    let is_of_version_2 = |root: &&Path| root.join("cgroup.controllers").is_file();
    let Some(root) = roots.into_iter().find(is_of_version_2) else { return out };
    if let Ok(metadata) = std::fs::metadata(root) {
        out.insert(std::os::unix::fs::MetadataExt::ino(&metadata), root.to_owned());
    }
    let mut pending = vec![(root.to_owned(), 0)];
    while let Some((folder, depth)) = pending.pop() {
        for entry in std::fs::read_dir(&folder).into_iter().flatten().flatten() {
            if depth < DEPTH_MAX
                && out.len() < GROUPS_MAX
                && entry.file_type().is_ok_and(|kind| kind.is_dir())
            {
                out.insert(entry.ino(), entry.path());
                pending.push((entry.path(), depth + 1));
            }
        }
    }
    out
}

/// `None`: they can't be had, which takes CAP_SYS_ADMIN.
fn programs(group: &Path) -> Option<Vec<OwnedFd>> {
    let ids = foreign::of_group(File::open(group).ok()?.as_fd());
    let found = ids.and_then(|ids| ids.into_iter().map(foreign::by_id).collect::<Result<_, _>>());
    found.inspect_err(|error| log::debug!("programs of {}: {error}", group.display())).ok()
}

const NETLINK_XFRM: isize = 6;
const XFRM_MSG_GETPOLICY: u16 = 21;
const XFRMA_TMPL: u16 = 5;
const XFRMA_MARK: u16 = 21;
const XFRMA_IF_ID: u16 = 31;
/// `struct xfrm_userpolicy_info` and `struct xfrm_user_tmpl`.
const POLICY: usize = 168;
const TEMPLATE: usize = 64;
const POLICIES_MAX: usize = 4096;

/// A policy of IPsec for what comes in.
struct Policy {
    priority: u32,
    source: Option<IpNet>,
    destination: Option<IpNet>,
    /// 0: any.
    proto: u8,
    /// With the bits that count.
    source_port: (u16, u16),
    port: (u16, u16),
    /// 0: any.
    index: u32,
    /// What comes in without protection.
    refuses: bool,
}

struct Flow {
    source: IpAddr,
    destination: IpAddr,
    proto: u8,
    source_port: u16,
    port: u16,
    index: u32,
}

impl Policy {
    fn concerns(&self, flow: &Flow) -> bool {
        let within = |net: &Option<IpNet>, address| net.is_none_or(|net| net.contains(&address));
        let fits = |(wanted, mask): (u16, u16), port| (wanted ^ port) & mask == 0;
        within(&self.source, flow.source)
            && within(&self.destination, flow.destination)
            && (self.proto == 0 || self.proto == flow.proto)
            && fits(self.source_port, flow.source_port)
            && fits(self.port, flow.port)
            && (self.index == 0 || self.index == flow.index)
    }
}

/// In the order in which the kernel asks them.
fn policies() -> Result<Vec<Policy>, NetlinkError> {
    let mut all = Netlink::open(NETLINK_XFRM)?.dump(XFRM_MSG_GETPOLICY, &[0; 64], |payload, out| {
        if out.len() < POLICIES_MAX {
            out.extend(policy(payload)?);
        }
        Ok(())
    })?;
    all.sort_by_key(|policy| policy.priority);
    Ok(all)
}

/// One `struct xfrm_userpolicy_info`; `None` where it is for another direction, or not for what comes
/// without mark and by no interface of its own.
fn policy(payload: &[u8]) -> Result<Option<Policy>, NetlinkError> {
    let cut = || NetlinkError::Truncated("an IPsec policy");
    let (head, rest) = payload.split_at_checked(POLICY).ok_or_else(cut)?;
    let number = |at| u16_at(head, at).ok_or_else(cut);
    let [bits_destination, bits_source, proto] = array_at(head, 42).ok_or_else(cut)?;
    let [direction, action] = array_at(head, 160).ok_or_else(cut)?;
    let mut refuses = action != 0;
    let mut applies = direction == 0;
    for attribute in attributes(rest) {
        match attribute? {
            (XFRMA_TMPL, value) => {
                // One that is optional asks for nothing.
                refuses |= value.chunks_exact(TEMPLATE).any(|template| template.get(50) == Some(&0));
            }
            // Of a packet without mark.
            (XFRMA_MARK, value) => applies &= u32_at(value, 0) == Some(0),
            (XFRMA_IF_ID, value) => applies &= u32_at(value, 0) == Some(0),
            _ => {}
        }
    }
    let family = number(40)?;
    let net = |at: usize, bits: u8| -> Result<Option<IpNet>, NetlinkError> {
        let address = address(family, array_at(head, at).ok_or_else(cut)?);
        Ok(address.and_then(|address| IpNet::new(address, bits).ok()))
    };
    let port = |at| Ok((number(at)?.swap_bytes(), number(at + 2)?.swap_bytes()));
    // Behind the two addresses: destination port, source port, each with its mask, family, and the rest.
    let policy = Policy {
        priority: u32_at(head, 152).ok_or_else(cut)?,
        source: net(16, bits_source)?,
        destination: net(0, bits_destination)?,
        proto,
        source_port: port(36)?,
        port: port(32)?,
        index: u32_at(head, 48).ok_or_else(cut)?,
        refuses,
    };
    Ok(applies.then_some(policy))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A policy for what comes from 192.0.2.0/24 to TCP ports 443, with this direction and action.
    fn said(direction: u8, action: u8, attributes: &[(u16, &[u8])]) -> Vec<u8> {
        let mut bytes = vec![0; POLICY];
        bytes[..4].copy_from_slice(&[198, 51, 100, 7]);
        bytes[16..20].copy_from_slice(&[192, 0, 2, 0]);
        bytes[32..36].copy_from_slice(&[0x01, 0xbb, 0xff, 0xff]);
        bytes[40..42].copy_from_slice(&(libc::AF_INET as u16).to_ne_bytes());
        bytes[42..45].copy_from_slice(&[32, 24, 6]);
        bytes[160..162].copy_from_slice(&[direction, action]);
        for (kind, value) in attributes {
            bytes.extend_from_slice(&(4 + value.len() as u16).to_ne_bytes());
            bytes.extend_from_slice(&kind.to_ne_bytes());
            bytes.extend_from_slice(value);
        }
        bytes
    }

    fn flow(source: [u8; 4], port: u16) -> Flow {
        let destination = [198, 51, 100, 7].into();
        Flow { source: source.into(), destination, proto: 6, source_port: 40_000, port, index: 2 }
    }

    #[test]
    fn a_policy_concerns_whom_it_names_and_refuses_what_is_not_protected() {
        let read = |bytes: &[u8]| policy(bytes).expect("a policy");
        let block = read(&said(0, 1, &[])).expect("one for what comes in");
        assert!(block.refuses && block.concerns(&flow([192, 0, 2, 9], 443)));
        assert!(!block.concerns(&flow([192, 0, 2, 9], 444)) && !block.concerns(&flow([192, 0, 3, 9], 443)));
        assert!(!block.concerns(&Flow { proto: 17, ..flow([192, 0, 2, 9], 443) }));
        let template = |optional: u8| {
            let mut bytes = [0; TEMPLATE];
            bytes[50] = optional;
            bytes
        };
        let refuses =
            |optional| read(&said(0, 0, &[(XFRMA_TMPL, &template(optional))])).expect("one").refuses;
        assert!(refuses(0) && !refuses(1));
        assert!(!read(&said(0, 0, &[])).expect("one").refuses, "it allows");
        assert!(read(&said(1, 1, &[])).is_none(), "for what goes out");
        assert!(read(&said(0, 1, &[(XFRMA_MARK, &[1, 0, 0, 0, 255, 255, 255, 255])])).is_none(), "by a mark");
        assert!(policy(&said(0, 1, &[])[..POLICY - 1]).is_err());
    }

    #[test]
    fn whoever_has_to_sign_is_read_with_his_prefix() {
        let mut bytes = [0; SIGNATURE];
        bytes[..8].copy_from_slice(&[2, 24, 3, 0, 192, 0, 2, 0]);
        assert_eq!(signer(&bytes), "192.0.2.0/24".parse().ok());
        bytes[1] = 33;
        assert_eq!(signer(&bytes), None);
    }

    proptest! {
        #[test]
        fn no_bytes_bring_the_decoder_down(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
            let _ = policy(&bytes);
            let _ = signer(&bytes);
        }
    }
}
