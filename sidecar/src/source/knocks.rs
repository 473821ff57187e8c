//! Who knocks: the first packet of every TCP connection that arrives on a device, and its
//! datagrams, seen before tc and netfilter by packet sockets with a filter, for as long as
//! somebody looks and no longer. Nothing is pinned and nothing is changed.
//!
//! Bounded by the sockets' buffers: what doesn't fit into one is counted, and not looked at.
//! Datagrams have a socket of their own, so that much traffic by UDP hides no connection.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd as _, OwnedFd};

use anyhow::Context as _;
use aya_obj::generated::bpf_insn;
use rustix::net::{RecvFlags, recv, sockopt};
use sidecar_ebpf::sweep::{TC_INDEX, TC_INDEX_PLAIN};

use crate::sys::probe::{Kind, Layer, load, missed, tap};
use crate::terms::Proto;
use crate::top::Welcome;

/// Enough for every header that counts.
const SNAP: i32 = 96;
/// Some thousand packets, as the kernel reckons them.
const RECEIVE_BYTES: usize = 1 << 20;

/// Datagrams that are passed over by port; further ones are looked at.
const WELCOME_MAX: usize = 64;

/// The first packet of a TCP connection, or a datagram, whose sender may be the first to
/// speak or answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Knock {
    pub proto: Proto,
    pub source: IpAddr,
    pub source_port: u16,
    pub destination: IpAddr,
    pub port: u16,
}

/// What to listen for.
#[derive(Clone, Copy, Debug)]
pub enum For<'a> {
    Connections,
    /// All but these.
    Datagrams(&'a [Welcome]),
}

/// The knocks of one device.
#[derive(Debug)]
pub struct Knocks {
    socket: OwnedFd,
}

impl Knocks {
    /// Needs CAP_NET_RAW, and CAP_BPF or root.
    pub fn listen(index: u32, what: For<'_>) -> anyhow::Result<Self> {
        let mut log = vec![0; 4096];
        let filter = load(Kind::SocketFilter, &filter(what), &mut log).map_err(|error| {
            let log = String::from_utf8_lossy(&log);
            let said = log.trim_matches('\0').lines().last().unwrap_or_default().to_owned();
            anyhow::Error::new(error).context(format!("load the filter for those who knock {said}"))
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

/// From the network header on. `None`: neither the beginning of a TCP connection nor a datagram.
fn knock(packet: &[u8]) -> Option<Knock> {
    let (number, source, destination, segment): (u8, IpAddr, IpAddr, &[u8]) = match packet.first()? >> 4 {
        4 => {
            let header = usize::from(packet[0] & 15) * 4;
            if header < 20 {
                return None;
            }
            let address = |at: usize| packet.get(at..)?.first_chunk::<4>().copied().map(Ipv4Addr::from);
            (*packet.get(9)?, address(12)?.into(), address(16)?.into(), packet.get(header..)?)
        }
        6 => {
            let address = |at: usize| packet.get(at..)?.first_chunk::<16>().copied().map(Ipv6Addr::from);
            (*packet.get(6)?, address(8)?.into(), address(24)?.into(), packet.get(40..)?)
        }
        _ => return None,
    };
    const SYN: u8 = 2;
    const ACK: u8 = 16;
    let proto = Proto::ALL.into_iter().find(|proto| proto.number() == number)?;
    if proto == Proto::Tcp && segment.get(13)? & (SYN | ACK) != SYN {
        return None;
    }
    let port = |at: usize| Some(u16::from_be_bytes(*segment.get(at..)?.first_chunk()?));
    Some(Knock { proto, source, source_port: port(0)?, destination, port: port(2)? })
}

/// What arrives for this host and is no probe of an audit of ours: SYN without ACK, or
/// datagrams. IPv6 with extension headers is passed over.
fn filter(what: For<'_>) -> Vec<bpf_insn> {
    const LOAD_WORD: u8 = 0x61;
    const PACKET_WORD: u8 = 0x20;
    const PACKET_BYTE: u8 = 0x30;
    const PACKET_HALF: u8 = 0x28;
    const PACKET_BYTE_AT: u8 = 0x50;
    const PACKET_HALF_AT: u8 = 0x48;
    const JUMP_IF: u8 = 0x15;
    const JUMP_UNLESS: u8 = 0x55;
    // Of the lower half: the other one extends the sign of what it compares with.
    const JUMP_UNLESS_WORD: u8 = 0x56;
    const JUMP: u8 = 0x05;
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
    let (proto, welcome) = match what {
        For::Connections => (Proto::Tcp, &[][..]),
        For::Datagrams(welcome) => (Proto::Udp, &welcome[..welcome.len().min(WELCOME_MAX)]),
    };
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
        op(JUMP_UNLESS, 0, 0, DROP, proto.number().into()),
        // A later fragment has no ports.
        op(PACKET_HALF, 0, 0, 0, NETWORK + 6),
        op(AND, 0, 0, 0, 0x1fff),
        op(JUMP_UNLESS, 0, 0, DROP, 0),
        op(PACKET_BYTE, 0, 0, 0, NETWORK),
        op(AND, 0, 0, 0, 15),
        op(SHIFT_LEFT, 0, 0, 0, 2),
        op(COPY, 7, 0, 0, 0),
    ];
    // Passes over what is welcome from anybody, or from the address whose words are these.
    let pass_over = |port: u16, words: &[u32], at: i32| {
        let mut code = vec![op(JUMP_UNLESS, 8, 0, words.len() as i16 * 2 + 1, port.into())];
        for (number, word) in words.iter().enumerate() {
            code.push(op(PACKET_WORD, 0, 0, 0, NETWORK + at + number as i32 * 4));
            let rest = (words.len() - number) as i16 * 2 - 1;
            code.push(op(JUMP_UNLESS_WORD, 0, 0, rest, word.cast_signed()));
        }
        code.push(op(JUMP, 0, 0, DROP, 0));
        code
    };
    let take = [op(MOVE, 0, 0, 0, SNAP), op(EXIT, 0, 0, 0, 0)];
    let syn = [op(AND, 0, 0, 0, 0x12), op(JUMP_UNLESS, 0, 0, DROP, 2)];
    match proto {
        Proto::Tcp => {
            code.push(op(PACKET_BYTE_AT, 0, 7, 0, NETWORK + 13));
            code.extend(syn);
        }
        Proto::Udp => {
            code.extend([op(PACKET_HALF_AT, 0, 7, 0, NETWORK + 2), op(COPY, 8, 0, 0, 0)]);
            for Welcome { port, source } in welcome {
                match source {
                    None => code.extend(pass_over(*port, &[], 0)),
                    Some(IpAddr::V4(v4)) => code.extend(pass_over(*port, &[v4.to_bits()], 12)),
                    Some(IpAddr::V6(_)) => {}
                }
            }
        }
    }
    code.extend(take);
    let ipv6 = code.len();
    code.extend([op(PACKET_BYTE, 0, 0, 0, NETWORK + 6), op(JUMP_UNLESS, 0, 0, DROP, proto.number().into())]);
    match proto {
        Proto::Tcp => {
            code.push(op(PACKET_BYTE, 0, 0, 0, NETWORK + 40 + 13));
            code.extend(syn);
        }
        Proto::Udp => {
            code.extend([op(PACKET_HALF, 0, 0, 0, NETWORK + 40 + 2), op(COPY, 8, 0, 0, 0)]);
            for Welcome { port, source } in welcome {
                match source {
                    None => code.extend(pass_over(*port, &[], 0)),
                    Some(IpAddr::V4(_)) => {}
                    Some(IpAddr::V6(v6)) => {
                        let words = [96, 64, 32, 0].map(|shift| (v6.to_bits() >> shift) as u32);
                        code.extend(pass_over(*port, &words, 8));
                    }
                }
            }
        }
    }
    code.extend(take);
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
        let expected = Knock {
            proto: Proto::Tcp,
            source: [192, 0, 2, 7].into(),
            source_port: 40_000,
            destination: [198, 51, 100, 1].into(),
            port: 22,
        };
        assert_eq!(knock(&ipv4(2, 0)), Some(expected));
        assert_eq!(knock(&ipv4(0xc2, 3)), Some(expected), "with options, and asking for ECN");
        for flags in [0, 1, 4, 16, 18] {
            assert_eq!(knock(&ipv4(flags, 0)), None, "flags {flags}");
        }
        let whole = ipv4(2, 1);
        assert!((0..whole.len() - 6).all(|length| knock(&whole[..length]).is_none()));
        // Of a datagram the ports are enough.
        let mut datagram = ipv4(16, 1);
        datagram[9] = 17;
        assert_eq!(knock(&datagram), Some(Knock { proto: Proto::Udp, ..expected }));
        assert!((0..28).all(|length| knock(&datagram[..length]).is_none()));
        datagram[9] = 1;
        assert_eq!(knock(&datagram), None, "ICMP");
    }

    proptest! {
        #[test]
        fn no_packet_makes_it_panic(packet in prop::collection::vec(any::<u8>(), 0..100)) {
            knock(&packet);
        }
    }
}
