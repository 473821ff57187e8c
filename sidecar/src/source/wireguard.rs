//! The WireGuard device of the mesh, from the kernel by generic netlink or from a userspace
//! implementation by its UAPI socket, and setting a peer's keepalive.
//!
//! Both replies carry private and preshared keys. Those attributes and lines are passed
//! over undecoded, and the buffers that held them are wiped.

use std::collections::HashMap;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use ipnet::IpNet;
use netlink_packet_core::Emitable;
use netlink_packet_generic::ctrl::nlas::GenlCtrlAttrs;
use netlink_packet_generic::ctrl::{GenlCtrl, GenlCtrlCmd};
use netlink_packet_generic::{GenlFamily, GenlHeader};
use netlink_packet_wireguard::{
    WireguardAttribute, WireguardCmd, WireguardMessage, WireguardPeer, WireguardPeerAttribute,
    WireguardPeerFlags,
};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with, sockopt};

use super::netlink::{Netlink, NetlinkError, array_at, attributes, hint, u16_at, u64_at};
use crate::observed::{Backend, Device, Peer};
use crate::sys::memory::Wiped;
use crate::terms::{PublicKey, Stamp};

/// `None`: there is no interface of this name in the thread's network namespace. One that
/// is there, but that nobody knows as WireGuard, is an error.
pub fn read(interface: &str) -> anyhow::Result<Option<Device>> {
    let what = || format!("read WireGuard device {interface}");
    // The name becomes part of a path.
    ensure!(
        (1..16).contains(&interface.len()) && !interface.contains(['/', '\0']) && !interface.starts_with('.'),
        "{interface:?} is not an interface name"
    );
    match read_kernel(interface) {
        Ok(device) => return Ok(Some(device)),
        // No such family, no such interface, and an interface of another kind (a TUN).
        Err(error) if matches!(error.refusal(), Some(libc::ENOENT | libc::ENODEV | libc::EOPNOTSUPP)) => {}
        Err(error) => {
            let hint = hint(&error);
            return Err(error).with_context(|| format!("{}{hint}", what()));
        }
    }
    if !exists(interface).with_context(what)? {
        return Ok(None);
    }
    read_uapi(interface, &uapi_path(interface), UAPI_DEADLINE).map(Some).with_context(what)
}

/// Sets the keepalive of a peer that the device already has, and reads it back: both back
/// ends accept a change to a peer that is gone without a word.
pub fn set_keepalive(device: &Device, peer: PublicKey, seconds: u16) -> anyhow::Result<()> {
    let name = &device.name;
    let what = || format!("set the keepalive of peer {peer} on {name} to {seconds} s");
    match device.backend {
        Backend::Kernel => set_kernel(name, peer, seconds).map_err(|error| {
            let hint = hint(&error);
            anyhow::Error::new(error).context(format!("{}{hint}", what()))
        })?,
        Backend::Userspace => {
            ensure!(exists(name).with_context(what)?, "{}: there is no such interface any more", what());
            set_uapi(&uapi_path(name), peer, seconds, UAPI_DEADLINE).with_context(what)?;
        }
    }
    let after = read(name).with_context(what)?.with_context(|| format!("{}: the device is gone", what()))?;
    match after.peers.iter().find(|found| found.public_key == peer) {
        Some(found) if found.keepalive == seconds => Ok(()),
        Some(found) => bail!("{}: it is {} s after that", what(), found.keepalive),
        None => bail!("{}: the device has no such peer", what()),
    }
}

fn exists(interface: &str) -> anyhow::Result<bool> {
    let any = socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None)
        .context("open a socket to look for the interface")?;
    match rustix::net::netdevice::name_to_index(&any, interface) {
        Ok(_) => Ok(true),
        Err(Errno::NODEV | Errno::NXIO) => Ok(false),
        Err(error) => Err(error).context("look for the interface"),
    }
}

// ---- kernel ----

const PROTOCOL: isize = netlink_sys::protocols::NETLINK_GENERIC;
const GENL_ID_CTRL: u16 = 16;
const CTRL_ATTR_FAMILY_ID: u16 = 1;
const GENL_HEADER: usize = 4;

fn read_kernel(interface: &str) -> Result<Device, NetlinkError> {
    let mut link = Netlink::open(PROTOCOL)?;
    let family = family(&mut link, WireguardMessage::family_name())?;
    let request = WireguardMessage {
        cmd: WireguardCmd::GetDevice,
        attributes: vec![WireguardAttribute::IfName(interface.to_owned())],
    };
    let parts = link.dump(family, &genl(&request), decode_part)?;
    Ok(merge(interface, Backend::Kernel, parts))
}

fn set_kernel(interface: &str, peer: PublicKey, seconds: u16) -> Result<(), NetlinkError> {
    let mut link = Netlink::open(PROTOCOL)?;
    let family = family(&mut link, WireguardMessage::family_name())?;
    link.request(family, &genl(&set_message(interface, peer, seconds)), |_, _: &mut Vec<()>| Ok(()))?;
    Ok(())
}

/// Without `UpdateOnly` an unknown key would create a peer.
fn set_message(interface: &str, peer: PublicKey, seconds: u16) -> WireguardMessage {
    WireguardMessage {
        cmd: WireguardCmd::SetDevice,
        attributes: vec![
            WireguardAttribute::IfName(interface.to_owned()),
            WireguardAttribute::Peers(vec![WireguardPeer(vec![
                WireguardPeerAttribute::PublicKey(peer.0),
                WireguardPeerAttribute::Flags(WireguardPeerFlags::UpdateOnly),
                WireguardPeerAttribute::PersistentKeepalive(seconds),
            ])]),
        ],
    }
}

/// The family's number, asked for each time: it changes when the module is loaded anew.
/// Asking also loads the module.
fn family(link: &mut Netlink, name: &str) -> Result<u16, NetlinkError> {
    let name = GenlCtrlAttrs::FamilyName(name.to_owned());
    let request = GenlCtrl { cmd: GenlCtrlCmd::GetFamily, nlas: vec![name] };
    let found = link.request(GENL_ID_CTRL, &genl(&request), decode_family)?;
    found.first().copied().ok_or(NetlinkError::Malformed("a family without a number"))
}

pub(super) fn decode_family(payload: &[u8], out: &mut Vec<u16>) -> Result<(), NetlinkError> {
    for attribute in attributes(payload.get(GENL_HEADER..).unwrap_or(&[])) {
        if let (CTRL_ATTR_FAMILY_ID, value) = attribute? {
            out.push(u16_at(value, 0).ok_or(NetlinkError::Truncated("a family number"))?);
        }
    }
    Ok(())
}

fn genl<M: GenlFamily + Emitable>(message: &M) -> Vec<u8> {
    let header = GenlHeader { cmd: message.command(), version: message.version() };
    let mut bytes = vec![0; header.buffer_len() + message.buffer_len()];
    let (head, body) = bytes.split_at_mut(header.buffer_len());
    header.emit(head);
    message.emit(body);
    bytes
}

/// What one message says of the device; a device with many peers takes several.
#[derive(Default)]
pub(super) struct Part {
    public_key: Option<PublicKey>,
    listen_port: Option<u16>,
    peers: Vec<Peer>,
}

/// Attributes of `enum wgdevice_attribute`, `wgpeer_attribute` and `wgallowedip_attribute`
/// in linux/wireguard.h. The packet crate's decoder is not used: it copies the keys.
pub(super) fn decode_part(payload: &[u8], out: &mut Vec<Part>) -> Result<(), NetlinkError> {
    let cut = || NetlinkError::Truncated("a WireGuard attribute");
    let mut part = Part::default();
    for attribute in attributes(payload.get(GENL_HEADER..).ok_or_else(cut)?) {
        match attribute? {
            (4, value) => part.public_key = Some(PublicKey(array_at(value, 0).ok_or_else(cut)?)),
            (6, value) => part.listen_port = Some(u16_at(value, 0).ok_or_else(cut)?),
            (8, value) => {
                for peer in attributes(value) {
                    part.peers.push(decode_peer(peer?.1)?);
                }
            }
            // 3 is the private key.
            _ => {}
        }
    }
    out.push(part);
    Ok(())
}

fn decode_peer(bytes: &[u8]) -> Result<Peer, NetlinkError> {
    let cut = || NetlinkError::Truncated("a WireGuard peer");
    let mut key = None;
    let mut peer = new_peer(PublicKey([0; 32]));
    for attribute in attributes(bytes) {
        match attribute? {
            (1, value) => key = Some(PublicKey(array_at(value, 0).ok_or_else(cut)?)),
            (4, value) => peer.endpoint = Some(decode_endpoint(value)?),
            (5, value) => peer.keepalive = u16_at(value, 0).ok_or_else(cut)?,
            (6, value) => peer.last_handshake = handshake(u64_at(value, 0).ok_or_else(cut)?),
            (7, value) => peer.rx_bytes = u64_at(value, 0).ok_or_else(cut)?,
            (8, value) => peer.tx_bytes = u64_at(value, 0).ok_or_else(cut)?,
            (9, value) => {
                for allowed in attributes(value) {
                    peer.allowed.push(decode_allowed(allowed?.1)?);
                }
            }
            // 2 is the preshared key.
            _ => {}
        }
    }
    peer.public_key = key.ok_or(NetlinkError::Malformed("a WireGuard peer without a key"))?;
    Ok(peer)
}

/// A `struct sockaddr_in` or `sockaddr_in6`.
fn decode_endpoint(bytes: &[u8]) -> Result<SocketAddr, NetlinkError> {
    let cut = || NetlinkError::Truncated("a WireGuard endpoint");
    let port = u16::from_be_bytes(array_at(bytes, 2).ok_or_else(cut)?);
    match u16_at(bytes, 0).map(i32::from) {
        Some(libc::AF_INET) => {
            let address = Ipv4Addr::from(array_at::<4>(bytes, 4).ok_or_else(cut)?);
            Ok(SocketAddrV4::new(address, port).into())
        }
        Some(libc::AF_INET6) => {
            let address = Ipv6Addr::from(array_at::<16>(bytes, 8).ok_or_else(cut)?);
            let scope = super::netlink::u32_at(bytes, 24).ok_or_else(cut)?;
            Ok(SocketAddrV6::new(address, port, 0, scope).into())
        }
        _ => Err(NetlinkError::Malformed("a WireGuard endpoint of an unknown family")),
    }
}

fn decode_allowed(bytes: &[u8]) -> Result<IpNet, NetlinkError> {
    let bad = || NetlinkError::Malformed("an allowed address of a WireGuard peer");
    let (mut address, mut length) = (None, None);
    for attribute in attributes(bytes) {
        match attribute? {
            (2, value) => {
                address = array_at::<16>(value, 0)
                    .map(|v6| IpAddr::V6(v6.into()))
                    .or_else(|| array_at::<4>(value, 0).map(|v4| IpAddr::V4(v4.into())));
            }
            (3, value) => length = value.first().copied(),
            _ => {}
        }
    }
    IpNet::new(address.ok_or_else(bad)?, length.ok_or_else(bad)?).map_err(|_| bad())
}

fn new_peer(public_key: PublicKey) -> Peer {
    Peer {
        public_key,
        endpoint: None,
        keepalive: 0,
        last_handshake: None,
        rx_bytes: 0,
        tx_bytes: 0,
        allowed: Vec::new(),
    }
}

/// Both back ends say 0 for never.
fn handshake(seconds: u64) -> Option<Stamp> {
    i64::try_from(seconds).ok().filter(|seconds| *seconds > 0).map(Stamp::from_unix)
}

/// A peer whose allowed addresses don't fit one message goes on in the next one, with its
/// key and the rest of them only.
pub(super) fn merge(interface: &str, backend: Backend, parts: Vec<Part>) -> Device {
    let mut device =
        Device { name: interface.to_owned(), backend, public_key: None, listen_port: 0, peers: Vec::new() };
    let mut at: HashMap<PublicKey, usize> = HashMap::new();
    for part in parts {
        device.public_key = device.public_key.or(part.public_key);
        device.listen_port = part.listen_port.unwrap_or(device.listen_port);
        for peer in part.peers {
            match at.get(&peer.public_key).and_then(|at| device.peers.get_mut(*at)) {
                Some(first) => first.allowed.extend(peer.allowed),
                None => {
                    at.insert(peer.public_key, device.peers.len());
                    device.peers.push(peer);
                }
            }
        }
    }
    device
}

// ---- userspace: the cross-platform interface, text over a unix socket ----

const UAPI_DEADLINE: Duration = Duration::from_secs(2);
const UAPI_LINE: usize = 64 * 1024;
const UAPI_MAX: usize = 16 << 20;

fn uapi_path(interface: &str) -> PathBuf {
    PathBuf::from(format!("/var/run/wireguard/{interface}.sock"))
}

fn read_uapi(interface: &str, path: &Path, limit: Duration) -> anyhow::Result<Device> {
    let mut reply = Uapi::default();
    exchange(path, "get=1\n\n", limit, |line| reply.line(line))?;
    reply.finish()?;
    Ok(merge(interface, Backend::Userspace, vec![reply.part]))
}

fn set_uapi(path: &Path, peer: PublicKey, seconds: u16, limit: Duration) -> anyhow::Result<()> {
    let mut reply = Uapi::default();
    let key = peer.to_hex();
    let request =
        format!("set=1\npublic_key={key}\nupdate_only=true\npersistent_keepalive_interval={seconds}\n\n");
    exchange(path, &request, limit, |line| reply.line(line))?;
    reply.finish()
}

/// Sends a request and gives each line of the reply, up to the empty one that ends it.
fn exchange(
    path: &Path,
    request: &str,
    limit: Duration,
    mut line: impl FnMut(&[u8]) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let deadline = Instant::now() + limit;
    let shown = path.display();
    let mut stream = dial(path)?;
    same_namespace(&stream, path)?;
    let late = || format!("{shown} does not answer within {limit:?}");
    let left = || {
        let left = deadline.saturating_duration_since(Instant::now());
        ensure!(!left.is_zero(), late());
        Ok(left)
    };
    stream.set_write_timeout(Some(left()?))?;
    stream.write_all(request.as_bytes()).with_context(|| format!("write to {shown}"))?;

    let mut buffer = Wiped::new(UAPI_LINE);
    let (mut filled, mut total) = (0, 0);
    loop {
        stream.set_read_timeout(Some(left()?))?;
        let space = buffer.get_mut(filled..).unwrap_or(&mut []);
        ensure!(!space.is_empty(), "a line from {shown} is longer than {UAPI_LINE} bytes");
        let length = match stream.read(space) {
            Ok(0) => bail!("{shown} closed the connection in the middle of its answer"),
            Ok(length) => length,
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            Err(error) if error.kind() == ErrorKind::WouldBlock => bail!(late()),
            Err(error) => return Err(error).with_context(|| format!("read from {shown}")),
        };
        filled += length;
        total += length;
        ensure!(total <= UAPI_MAX, "the answer of {shown} is larger than {UAPI_MAX} bytes");
        let mut start = 0;
        let data = buffer.get(..filled).unwrap_or(&[]);
        while let Some(end) = data.get(start..).and_then(|rest| rest.iter().position(|byte| *byte == b'\n')) {
            if end == 0 {
                return Ok(());
            }
            line(data.get(start..start + end).unwrap_or(&[]))
                .with_context(|| format!("answer of {shown}"))?;
            start += end + 1;
        }
        buffer.copy_within(start..filled, 0);
        filled -= start;
    }
}

fn dial(path: &Path) -> anyhow::Result<UnixStream> {
    // Nonblocking at first: a server that never accepts must not hold us.
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let open = || -> io::Result<UnixStream> {
        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        connect(&socket, &SocketAddrUnix::new(path)?)?;
        let stream = UnixStream::from(socket);
        stream.set_nonblocking(false)?;
        Ok(stream)
    };
    let shown = path.display();
    open().map_err(|error| {
        let reason = match error.kind() {
            ErrorKind::NotFound | ErrorKind::NotADirectory | ErrorKind::ConnectionRefused => format!(
                "the interface is there, but neither the kernel knows it as WireGuard nor does a userspace \
                 implementation answer at {shown}"
            ),
            ErrorKind::PermissionDenied => format!("connect to {shown} (run as root)"),
            _ => format!("connect to {shown}"),
        };
        anyhow::Error::new(error).context(reason)
    })
}

/// The folder of the sockets belongs to no network namespace, so a device of the same name
/// in another one may answer. Only a process that is known to be elsewhere is refused: one
/// that has handed its socket to a child and ended can't be asked.
fn same_namespace(stream: &UnixStream, path: &Path) -> anyhow::Result<()> {
    let peer =
        sockopt::socket_peercred(stream).with_context(|| format!("ask who serves {}", path.display()))?;
    let ours = std::fs::read_link("/proc/thread-self/ns/net").context("read our own network namespace")?;
    match std::fs::read_link(format!("/proc/{}/ns/net", peer.pid.as_raw_nonzero())) {
        Ok(theirs) if theirs != ours => bail!(
            "{} belongs to process {} in another network namespace: its device is not the one here",
            path.display(),
            peer.pid.as_raw_nonzero()
        ),
        _ => Ok(()),
    }
}

#[derive(Default)]
pub(super) struct Uapi {
    pub(super) part: Part,
    errno: Option<i64>,
}

impl Uapi {
    /// No value is ever repeated in an error: it may be a key.
    pub(super) fn line(&mut self, line: &[u8]) -> anyhow::Result<()> {
        let at = line.iter().position(|byte| *byte == b'=').context("a line is not of the form key=value")?;
        let (key, value) = line.split_at(at);
        // Before anything reads the value.
        if key == b"private_key" || key == b"preshared_key" {
            return Ok(());
        }
        let value = std::str::from_utf8(value.get(1..).unwrap_or(&[])).context("a value is not text")?;
        match key {
            b"errno" => self.errno = Some(number(value, "errno")?),
            b"listen_port" => self.part.listen_port = Some(number(value, "listen_port")?),
            b"public_key" => {
                let key = PublicKey::from_hex(value).context("public_key is not a key")?;
                self.part.peers.push(new_peer(key));
            }
            b"endpoint" => {
                self.peer()?.endpoint = Some(parse_endpoint(value).context("endpoint is no address")?)
            }
            b"persistent_keepalive_interval" => {
                self.peer()?.keepalive = number(value, "persistent_keepalive_interval")?;
            }
            b"last_handshake_time_sec" => {
                self.peer()?.last_handshake = handshake(number(value, "last_handshake_time_sec")?);
            }
            b"rx_bytes" => self.peer()?.rx_bytes = number(value, "rx_bytes")?,
            b"tx_bytes" => self.peer()?.tx_bytes = number(value, "tx_bytes")?,
            b"allowed_ip" => {
                let net = value.parse().ok().context("allowed_ip is no prefix")?;
                self.peer()?.allowed.push(net);
            }
            _ => {}
        }
        Ok(())
    }

    fn peer(&mut self) -> anyhow::Result<&mut Peer> {
        self.part.peers.last_mut().context("a peer's value comes before its public_key")
    }

    pub(super) fn finish(&self) -> anyhow::Result<()> {
        match self.errno {
            Some(0) => Ok(()),
            Some(code) => bail!("it answers with error {code}"),
            None => bail!("its answer has no errno"),
        }
    }
}

fn number<T: std::str::FromStr>(value: &str, key: &str) -> anyhow::Result<T> {
    value.parse().ok().with_context(|| format!("{key} is not a number that fits"))
}

/// `192.0.2.1:51820` or `[fe80::1%eth0]:51820`; a zone's name means nothing to us.
fn parse_endpoint(text: &str) -> Option<SocketAddr> {
    match text.split_once('%') {
        None => text.parse().ok(),
        Some((address, rest)) => format!("{address}{}", rest.get(rest.find(']')?..)?).parse().ok(),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use expect_test::expect;
    use netlink_packet_wireguard::{
        WireguardAddressFamily, WireguardAllowedIp, WireguardAllowedIpAttr, WireguardTimeSpec,
    };
    use proptest::prelude::*;

    use super::*;
    use crate::source::{Running, in_namespace, sh, soon};

    const HUB: [u8; 32] = [0xaa; 32];
    const OTHER: [u8; 32] = [0xbb; 32];
    /// Bytes that no decoder may let through.
    const PRIVATE: [u8; 32] = [0x5e; 32];

    fn show(device: &Device) -> String {
        let mut text = format!("{} {:?} port {}\n", device.name, device.backend, device.listen_port);
        for peer in &device.peers {
            let allowed: Vec<_> = peer.allowed.iter().map(|net| net.to_string()).collect();
            text += &format!(
                "{}\n  endpoint {:?} keepalive {} handshake {:?}\n  rx {} tx {} allowed {}.\n",
                peer.public_key,
                peer.endpoint.map(|endpoint| endpoint.to_string()),
                peer.keepalive,
                peer.last_handshake.map(|stamp| stamp.to_string()),
                peer.rx_bytes,
                peer.tx_bytes,
                allowed.join(" ")
            );
        }
        text
    }

    fn allowed(text: &str) -> WireguardAllowedIp {
        let net: IpNet = text.parse().expect("a prefix");
        let family = match net {
            IpNet::V4(_) => WireguardAddressFamily::Ipv4,
            IpNet::V6(_) => WireguardAddressFamily::Ipv6,
        };
        WireguardAllowedIp(vec![
            WireguardAllowedIpAttr::Family(family),
            WireguardAllowedIpAttr::IpAddr(net.addr()),
            WireguardAllowedIpAttr::Cidr(net.prefix_len()),
        ])
    }

    /// Two messages as the kernel sends them, the first peer cut in two.
    fn kernel_messages() -> Vec<Vec<u8>> {
        use WireguardPeerAttribute as P;
        let hub = WireguardPeer(vec![
            P::PublicKey(HUB),
            P::PresharedKey(PRIVATE),
            P::LastHandshake(WireguardTimeSpec { seconds: 1_795_000_000, nano_seconds: 5 }),
            P::PersistentKeepalive(25),
            P::TxBytes(180),
            P::RxBytes(92),
            P::ProtocolVersion(1),
            P::Endpoint("203.0.113.47:51820".parse().expect("an address")),
            P::AllowedIps(vec![allowed("10.84.0.0/24")]),
        ]);
        let rest = WireguardPeer(vec![P::PublicKey(HUB), P::AllowedIps(vec![allowed("fd84::/64")])]);
        let other = WireguardPeer(vec![
            P::PublicKey(OTHER),
            P::PresharedKey([0; 32]),
            P::LastHandshake(WireguardTimeSpec::default()),
            P::PersistentKeepalive(0),
            P::Endpoint("[2001:db8::5]:40000".parse().expect("an address")),
            P::AllowedIps(vec![]),
        ]);
        let first = vec![
            WireguardAttribute::ListenPort(51820),
            WireguardAttribute::Fwmark(0),
            WireguardAttribute::IfIndex(3),
            WireguardAttribute::IfName("wg0".into()),
            WireguardAttribute::PrivateKey(PRIVATE),
            WireguardAttribute::PublicKey([0xcc; 32]),
            WireguardAttribute::Peers(vec![hub]),
        ];
        let second = vec![WireguardAttribute::Peers(vec![rest, other])];
        [first, second]
            .map(|attributes| genl(&WireguardMessage { cmd: WireguardCmd::GetDevice, attributes }))
            .into_iter()
            .collect()
    }

    fn kernel_device() -> Device {
        let mut parts = Vec::new();
        for message in kernel_messages() {
            decode_part(&message, &mut parts).expect("sound");
        }
        merge("wg0", Backend::Kernel, parts)
    }

    #[test]
    fn the_kernels_messages_become_one_device() {
        let device = kernel_device();
        assert_eq!(device.public_key, Some(PublicKey([0xcc; 32])));
        expect![[r#"
            wg0 Kernel port 51820
            qqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqo=
              endpoint Some("203.0.113.47:51820") keepalive 25 handshake Some("2026-11-18T11:06:40.000Z")
              rx 92 tx 180 allowed 10.84.0.0/24 fd84::/64.
            u7u7u7u7u7u7u7u7u7u7u7u7u7u7u7u7u7u7u7u7u7s=
              endpoint Some("[2001:db8::5]:40000") keepalive 0 handshake None
              rx 0 tx 0 allowed .
        "#]]
        .assert_eq(&show(&device));
    }

    #[test]
    fn no_key_of_ours_comes_out_of_the_decoders() {
        let shown = format!("{:?}", kernel_device());
        let private = PublicKey(PRIVATE);
        assert!(kernel_messages()[0].windows(32).any(|bytes| bytes == PRIVATE), "the test holds no key");
        assert!(
            !shown.contains(&private.to_string())
                && !shown.contains(&private.to_hex())
                && !shown.contains("94, 94")
        );
        let device = from_text(include_str!("captures/uapi.txt")).expect("sound");
        let shown = format!("{device:?}");
        for secret in [PublicKey([0x11; 32]), PublicKey([0x22; 32])] {
            assert!(!shown.contains(&secret.to_string()) && !shown.contains(&secret.to_hex()));
        }
        // Nor out of an error about a line that is broken.
        let secret = "5e".repeat(31);
        for line in
            [format!("private_key={secret}"), format!("public_key={secret}"), format!("endpoint={secret}")]
        {
            let error = from_text(&format!("{line}\n\n")).expect_err("no errno");
            assert!(!format!("{error:#}").contains("5e5e"), "{error:#}");
        }
    }

    #[test]
    fn a_message_that_is_cut_or_lacks_a_key_is_an_error() {
        let peers = |peer| WireguardMessage {
            cmd: WireguardCmd::GetDevice,
            attributes: vec![WireguardAttribute::Peers(vec![WireguardPeer(peer)])],
        };
        let decode = |message: &WireguardMessage| decode_part(&genl(message), &mut Vec::new());
        assert!(decode(&peers(vec![WireguardPeerAttribute::PublicKey(HUB)])).is_ok());
        assert!(decode(&peers(vec![WireguardPeerAttribute::PersistentKeepalive(1)])).is_err());
        let long = WireguardAllowedIp(vec![
            WireguardAllowedIpAttr::IpAddr([10, 0, 0, 0].into()),
            WireguardAllowedIpAttr::Cidr(33),
        ]);
        let keyed = |last| peers(vec![WireguardPeerAttribute::PublicKey(HUB), last]);
        assert!(decode(&keyed(WireguardPeerAttribute::AllowedIps(vec![long]))).is_err());
        assert!(
            decode(&keyed(WireguardPeerAttribute::AllowedIps(vec![WireguardAllowedIp(vec![])]))).is_err()
        );
        // Inside the last attribute, every cut is seen.
        let whole = &kernel_messages()[1];
        for cut in 5..whole.len() {
            assert!(decode_part(&whole[..cut], &mut Vec::new()).is_err(), "{cut} bytes were taken");
        }
    }

    proptest! {
        #[test]
        fn no_bytes_bring_the_decoders_down(
            bytes in prop::collection::vec(any::<u8>(), 0..200),
            at in 0usize..200,
            value in any::<u8>(),
        ) {
            let _ = decode_part(&bytes, &mut Vec::new());
            let mut message = kernel_messages().remove(0);
            let at = at % message.len();
            message[at] = value;
            let _ = decode_part(&message, &mut Vec::new());
            let _ = Uapi::default().line(&bytes);
        }
    }

    #[test]
    fn a_family_is_found_by_its_name_and_an_unknown_one_is_absent() {
        let mut link = Netlink::open(PROTOCOL).expect("a socket");
        assert_eq!(family(&mut link, "nlctrl").expect("every kernel has it"), GENL_ID_CTRL);
        assert_eq!(family(&mut link, "no-such").expect_err("absent").refusal(), Some(libc::ENOENT));
        // The socket goes on after a refusal.
        assert!(family(&mut link, "nlctrl").is_ok());
    }

    #[test]
    fn setting_a_keepalive_updates_only() {
        let bytes = genl(&set_message("wg0", PublicKey(HUB), 25));
        // Command SET_DEVICE, version 1, and within the peer: the key, flag 4, 25 seconds.
        expect![[r#"
            [01, 01, 00, 00, 08, 00, 02, 00, 77, 67, 30, 00, 3c, 00, 08, 80]
            [38, 00, 00, 80, 24, 00, 01, 00, aa, aa, aa, aa, aa, aa, aa, aa]
            [aa, aa, aa, aa, aa, aa, aa, aa, aa, aa, aa, aa, aa, aa, aa, aa]
            [aa, aa, aa, aa, aa, aa, aa, aa, 08, 00, 03, 00, 04, 00, 00, 00]
            [06, 00, 05, 00, 19, 00, 00, 00]
        "#]]
        .assert_eq(&bytes.chunks(16).map(|line| format!("{line:02x?}\n")).collect::<String>());
    }

    fn from_text(text: &str) -> anyhow::Result<Device> {
        let mut reply = Uapi::default();
        for line in text.lines().take_while(|line| !line.is_empty()) {
            reply.line(line.as_bytes())?;
        }
        reply.finish()?;
        Ok(merge("wg0", Backend::Userspace, vec![reply.part]))
    }

    #[test]
    fn a_capture_of_wireguard_go_becomes_the_same_kind_of_device() {
        let device = from_text(include_str!("captures/uapi.txt")).expect("sound");
        assert_eq!(device.public_key, None);
        expect![[r#"
            wg0 Userspace port 51820
            xTIBA5rboUvnH4htodjb6e697QjLERt1NAB4mZqp8Dg=
              endpoint Some("203.0.113.47:51820") keepalive 25 handshake Some("2026-11-18T11:06:40.000Z")
              rx 92 tx 180 allowed 10.84.0.0/24 fd84::/64.
            rRGxk5NJF8WZwKMVCZiR0vfnD3YVR8Zv1tdsVqVjUg4=
              endpoint Some("[2001:db8::5]:40000") keepalive 0 handshake None
              rx 0 tx 0 allowed 10.84.0.9/32.
        "#]]
        .assert_eq(&show(&device));
    }

    #[test]
    fn broken_text_is_an_error_and_unknown_keys_are_not() {
        let key = PublicKey(HUB).to_hex();
        assert!(from_text("listen_port=1\njc=4\nerrno=0\n\n").is_ok());
        for broken in [
            "listen_port=1\n\n",
            "errno=-13\n\n",
            "listen_port=65536\nerrno=0\n\n",
            "nonsense\nerrno=0\n\n",
            "endpoint=192.0.2.1:1\nerrno=0\n\n",
            &format!("public_key={key}\nallowed_ip=10.0.0.0/33\nerrno=0\n\n"),
            &format!("public_key={key}\nendpoint=example.org:1\nerrno=0\n\n"),
            &format!("public_key={key}0\nerrno=0\n\n"),
        ] {
            assert!(from_text(broken).is_err(), "{broken:?} was taken");
        }
        assert_eq!(parse_endpoint("[fe80::1%eth0]:7"), "[fe80::1]:7".parse().ok());
    }

    /// A userspace implementation that answers with these pieces, and holds on for longer.
    fn served(pieces: &[&[u8]], hold: bool, limit_ms: u64) -> anyhow::Result<Device> {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("wg0.sock");
        let server = UnixListener::bind(&path).expect("a socket");
        let (done, waits) = std::sync::mpsc::channel::<()>();
        std::thread::scope(|scope| {
            scope.spawn(move || {
                let (mut stream, _) = server.accept().expect("a client");
                let mut request = [0; 64];
                let length = stream.read(&mut request).expect("a request");
                assert_eq!(&request[..length], b"get=1\n\n");
                for piece in pieces {
                    // The client may have gone by then, which is its right.
                    let _ = stream.write_all(piece);
                }
                if hold {
                    let _ = waits.recv();
                }
            });
            let result = read_uapi("wg0", &path, Duration::from_millis(limit_ms));
            drop(done);
            result
        })
    }

    #[test]
    fn a_userspace_answer_is_bounded_and_must_be_whole() {
        let capture = include_bytes!("captures/uapi.txt");
        let (head, tail) = capture.split_at(100);
        assert_eq!(served(&[head, tail], true, 5000).expect("whole").peers.len(), 2);
        let error =
            |pieces: &[&[u8]], hold, limit| format!("{:#}", served(pieces, hold, limit).expect_err("broken"));
        assert!(error(&[head], false, 5000).contains("closed the connection"));
        assert!(error(&[head], true, 100).contains("does not answer within"));
        assert!(error(&[], true, 100).contains("does not answer within"));
        assert!(error(&[&vec![b'a'; UAPI_LINE + 1]], true, 5000).contains("longer than"));
        let endless =
            b"fwmark=0000000000000000000000000000000000000000000000000000000\n".repeat(UAPI_MAX / 60);
        assert!(error(&[&endless], true, 5000).contains("larger than"));
    }

    #[test]
    fn names_that_are_no_interface_reach_no_path() {
        for name in ["", "..", "../../etc/x", "a/b", "sixteen-is-wrong", "a\0b"] {
            assert!(read(name).is_err(), "{name:?} was taken");
        }
    }

    #[test]
    fn a_userspace_device_is_read_and_its_keepalive_set() {
        let name = "source::wireguard::tests::a_userspace_device_is_read_and_its_keepalive_set";
        if !in_namespace(name, &["wireguard-go", "wg"]) {
            return;
        }
        assert_eq!(read("wgt0").expect("looked"), None, "a device before there is one");
        sh("ip link set lo up; mkdir -p /var/run/wireguard; mount -t tmpfs none /var/run/wireguard");
        // An interface that is there, but that nobody knows as WireGuard.
        sh("ip tuntap add dev wgt1 mode tun");
        let error = format!("{:#}", read("wgt1").expect_err("a TUN device"));
        assert!(error.contains("wgt1") && error.contains("neither the kernel"), "{error}");

        let server =
            std::process::Command::new("wireguard-go").args(["-f", "wgt0"]).spawn().expect("wireguard-go");
        let _server = Running(server);
        soon("the device", || read("wgt0").ok().flatten());
        let (hub, other) = (PublicKey(HUB), PublicKey([0xc4; 32]));
        sh(&format!(
            "umask 077; cd /var/run/wireguard; wg genkey > private; wg genpsk > shared
             wg set wgt0 listen-port 51820 private-key private \\
                 peer {hub} preshared-key shared endpoint 203.0.113.47:51820 persistent-keepalive 25 \\
                     allowed-ips 10.84.0.0/24,fd84::/64 \\
                 peer {other} endpoint '[2001:db8::5]:40000' allowed-ips 10.84.0.9/32"
        ));
        let device = read("wgt0").expect("read").expect("a device");
        assert_eq!((device.backend, device.listen_port, device.peers.len()), (Backend::Userspace, 51820, 2));
        let peer = |device: &Device, key| {
            device.peers.iter().find(|p| p.public_key == key).cloned().expect("a peer")
        };
        let before = peer(&device, hub);
        assert_eq!((before.keepalive, before.last_handshake), (25, None));
        assert_eq!(before.endpoint, "203.0.113.47:51820".parse().ok());
        assert_eq!(before.allowed.len(), 2);

        set_keepalive(&device, hub, 7).expect("set");
        let after = read("wgt0").expect("read").expect("a device");
        assert_eq!(peer(&after, hub), Peer { keepalive: 7, ..before }, "more than the keepalive changed");
        assert_eq!(peer(&after, other), peer(&device, other));
        assert!(sh("wg show wgt0 persistent-keepalive").contains(&format!("{hub}\t7")));

        let error =
            format!("{:#}", set_keepalive(&device, PublicKey([9; 32]), 25).expect_err("an unknown peer"));
        assert!(error.contains("no such peer"), "{error}");
        assert_eq!(read("wgt0").expect("read").expect("a device").peers.len(), 2, "a peer was created");

        // From another namespace the same socket is in sight, but it isn't about that place.
        let elsewhere = "unshare --net sh -c 'ip tuntap add dev wgt0 mode tun && exec \"$0\" --exact \
            source::wireguard::tests::elsewhere --nocapture'";
        let program = std::env::current_exe().expect("this program");
        let output =
            sh(&elsewhere
                .replace("\"$0\"", &format!("env SPOKEGUARD_TEST_ELSEWHERE=1 {}", program.display())));
        assert!(output.contains("refused: ") && output.contains("another network namespace"), "{output}");
    }

    /// The second half of the test above, in a namespace of its own.
    #[test]
    fn elsewhere() {
        if std::env::var_os("SPOKEGUARD_TEST_ELSEWHERE").is_some() {
            println!("refused: {:#}", read("wgt0").expect_err("the device of another namespace"));
        }
    }
}
