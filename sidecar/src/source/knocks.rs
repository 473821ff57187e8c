//! Who knocks: the first packet of every TCP connection that arrives on a device, seen
//! before tc and netfilter by a packet socket with a filter, for as long as somebody looks
//! and no longer. Nothing is pinned and nothing is changed.
//!
//! Bounded by the socket's buffer: what doesn't fit into it is counted, and not looked at.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd as _, OwnedFd};

use anyhow::Context as _;
use aya_obj::generated::bpf_insn;
use rustix::net::{RecvFlags, recv, sockopt};
use sidecar_ebpf::sweep::{TC_INDEX, TC_INDEX_PLAIN};

use crate::sys::probe::{Kind, Layer, load, missed, tap};

/// Enough for every header that counts.
const SNAP: i32 = 96;
/// Some thousand packets, as the kernel reckons them.
const RECEIVE_BYTES: usize = 1 << 20;

/// A new TCP connection, as its first packet has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Knock {
    pub source: IpAddr,
    pub destination: IpAddr,
    pub port: u16,
}

/// The knocks of one device.
#[derive(Debug)]
pub struct Knocks {
    socket: OwnedFd,
}

impl Knocks {
    /// Needs CAP_NET_RAW, and CAP_BPF or root.
    pub fn listen(index: u32) -> anyhow::Result<Self> {
        let mut log = vec![0; 4096];
        let filter = load(Kind::SocketFilter, &filter(), &mut log).map_err(|error| {
            let log = String::from_utf8_lossy(&log);
            let said = log.trim_matches('\0').lines().last().unwrap_or_default().to_owned();
            anyhow::Error::new(error).context(format!("load the filter for new connections {said}"))
        })?;
        let socket = tap(filter.as_fd(), index, Layer::Network)
            .with_context(|| format!("listen on device {index}"))?;
        // The first needs CAP_NET_ADMIN, the second is cut to the system's limit.
        if sockopt::set_socket_recv_buffer_size_force(&socket, RECEIVE_BYTES).is_err() {
            let _ = sockopt::set_socket_recv_buffer_size(&socket, RECEIVE_BYTES);
        }
        Ok(Self { socket })
    }

    /// What came since the last call, at most `most` of it. Never waits.
    pub fn read(&self, most: usize, mut take: impl FnMut(Knock)) -> io::Result<()> {
        let mut packet = [0u8; SNAP as usize];
        for _ in 0..most {
            match recv(&self.socket, &mut packet, RecvFlags::DONTWAIT) {
                Ok((length, _)) => {
                    if let Some(knock) = packet.get(..length).and_then(knock) {
                        take(knock);
                    }
                }
                Err(rustix::io::Errno::WOULDBLOCK) => return Ok(()),
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// How many did not fit, since the last call.
    pub fn missed(&self) -> io::Result<u64> {
        missed(self.socket.as_fd())
    }
}

/// From the network header on. `None`: no beginning of a TCP connection.
fn knock(packet: &[u8]) -> Option<Knock> {
    let (source, destination, segment): (IpAddr, IpAddr, &[u8]) = match packet.first()? >> 4 {
        4 => {
            let header = usize::from(packet[0] & 15) * 4;
            if *packet.get(9)? != 6 || header < 20 {
                return None;
            }
            let address = |at: usize| packet.get(at..)?.first_chunk::<4>().copied().map(Ipv4Addr::from);
            (address(12)?.into(), address(16)?.into(), packet.get(header..)?)
        }
        6 => {
            if *packet.get(6)? != 6 {
                return None;
            }
            let address = |at: usize| packet.get(at..)?.first_chunk::<16>().copied().map(Ipv6Addr::from);
            (address(8)?.into(), address(24)?.into(), packet.get(40..)?)
        }
        _ => return None,
    };
    const SYN: u8 = 2;
    const ACK: u8 = 16;
    let port = u16::from_be_bytes(*segment.get(2..)?.first_chunk()?);
    (segment.get(13)? & (SYN | ACK) == SYN).then_some(Knock { source, destination, port })
}

/// SYN without ACK that arrives for this host and is no probe of an audit of ours. IPv6 with
/// extension headers is passed over.
fn filter() -> Vec<bpf_insn> {
    const LOAD_WORD: u8 = 0x61;
    const PACKET_BYTE: u8 = 0x30;
    const PACKET_HALF: u8 = 0x28;
    const PACKET_BYTE_AT: u8 = 0x50;
    const JUMP_IF: u8 = 0x15;
    const JUMP_UNLESS: u8 = 0x55;
    const AND: u8 = 0x57;
    const SHIFT_LEFT: u8 = 0x67;
    const MOVE: u8 = 0xb7;
    const COPY: u8 = 0xbf;
    const EXIT: u8 = 0x95;
    /// SKF_NET_OFF: from the network header on.
    const NETWORK: i32 = -0x10_0000;
    // Of struct __sk_buff.
    const PACKET_TYPE: i16 = 4;
    const PROTOCOL: i16 = 16;
    const INDEX: i16 = 44;
    const DROP: i16 = i16::MAX;
    const IPV6: i16 = i16::MAX - 1;
    let op = |code: u8, to: u8, from: u8, off: i16, imm: i32| bpf_insn {
        code,
        _bitfield_align_1: [],
        _bitfield_1: bpf_insn::new_bitfield_1(to, from),
        off,
        imm,
    };
    let network_order = |kind: u16| i32::from(kind.to_be());
    let mut code = vec![
        op(COPY, 6, 1, 0, 0),
        op(LOAD_WORD, 2, 6, INDEX, 0),
        op(JUMP_IF, 2, 0, DROP, TC_INDEX as i32),
        op(JUMP_IF, 2, 0, DROP, TC_INDEX_PLAIN as i32),
        // PACKET_HOST: for us, and not on its way out.
        op(LOAD_WORD, 2, 6, PACKET_TYPE, 0),
        op(JUMP_UNLESS, 2, 0, DROP, 0),
        op(LOAD_WORD, 2, 6, PROTOCOL, 0),
        op(JUMP_IF, 2, 0, IPV6, network_order(0x86dd)),
        op(JUMP_UNLESS, 2, 0, DROP, network_order(0x0800)),
        op(PACKET_BYTE, 0, 0, 0, NETWORK + 9),
        op(JUMP_UNLESS, 0, 0, DROP, 6),
        // A later fragment has no ports.
        op(PACKET_HALF, 0, 0, 0, NETWORK + 6),
        op(AND, 0, 0, 0, 0x1fff),
        op(JUMP_UNLESS, 0, 0, DROP, 0),
        op(PACKET_BYTE, 0, 0, 0, NETWORK),
        op(AND, 0, 0, 0, 15),
        op(SHIFT_LEFT, 0, 0, 0, 2),
        op(COPY, 7, 0, 0, 0),
        op(PACKET_BYTE_AT, 0, 7, 0, NETWORK + 13),
        op(AND, 0, 0, 0, 0x12),
        op(JUMP_UNLESS, 0, 0, DROP, 2),
        op(MOVE, 0, 0, 0, SNAP),
        op(EXIT, 0, 0, 0, 0),
    ];
    let ipv6 = code.len();
    code.extend([
        op(PACKET_BYTE, 0, 0, 0, NETWORK + 6),
        op(JUMP_UNLESS, 0, 0, DROP, 6),
        op(PACKET_BYTE, 0, 0, 0, NETWORK + 40 + 13),
        op(AND, 0, 0, 0, 0x12),
        op(JUMP_UNLESS, 0, 0, DROP, 2),
        op(MOVE, 0, 0, 0, SNAP),
        op(EXIT, 0, 0, 0, 0),
    ]);
    let drop = code.len();
    code.extend([op(MOVE, 0, 0, 0, 0), op(EXIT, 0, 0, 0, 0)]);
    for (at, op) in code.iter_mut().enumerate() {
        let target = match op.off {
            DROP => drop,
            IPV6 => ipv6,
            _ => continue,
        };
        op.off = i16::try_from(target - at - 1).unwrap_or(0);
    }
    code
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn ipv4(flags: u8, options: usize) -> Vec<u8> {
        let words = u8::try_from(5 + options).expect("few");
        let mut packet = vec![0x40 | words, 0, 0, 60, 0, 0, 0, 0, 64, 6, 0, 0, 192, 0, 2, 7, 198, 51, 100, 1];
        packet.extend(vec![0; options * 4]);
        packet.extend([0x9c, 0x40, 0, 22, 0, 0, 0, 0, 0, 0, 0, 0, 0x50, flags, 0, 0, 0, 0, 0, 0]);
        packet
    }

    #[test]
    fn a_syn_is_a_knock_and_nothing_else_is() {
        let expected =
            Knock { source: [192, 0, 2, 7].into(), destination: [198, 51, 100, 1].into(), port: 22 };
        assert_eq!(knock(&ipv4(2, 0)), Some(expected));
        assert_eq!(knock(&ipv4(0xc2, 3)), Some(expected), "with options, and asking for ECN");
        for flags in [0, 1, 4, 16, 18] {
            assert_eq!(knock(&ipv4(flags, 0)), None, "flags {flags}");
        }
        let whole = ipv4(2, 1);
        assert!((0..whole.len() - 6).all(|length| knock(&whole[..length]).is_none()));
    }

    proptest! {
        #[test]
        fn no_packet_makes_it_panic(packet in prop::collection::vec(any::<u8>(), 0..100)) {
            knock(&packet);
        }
    }
}
