//! The contract between the programs of an audit and the process that runs them. Both come
//! from one build and die together, so none of this is part of [`crate::ABI`].

use crate::IPV4;

/// Frames of one run of the injector.
pub const CHUNK: u32 = 256;
/// The longest frame: Ethernet, IPv6, TCP with its options.
pub const FRAME_MAX: usize = 96;
/// `BPF_F_MMAPABLE`: user space reads and writes these maps as memory.
pub const MMAPABLE: u32 = 1 << 10;

pub mod maps {
    pub const ORDERS: &str = "ORDERS";
    pub const FRAMES: &str = "FRAMES";
    pub const PROGRESS: &str = "PROGRESS";
    pub const TRACES: &str = "TRACES";
    pub const ALL: [&str; 4] = [ORDERS, FRAMES, PROGRESS, TRACES];
}

pub mod programs {
    /// Sends frames into a device's receive path.
    pub const INJECT: &str = "inject";
    /// tc ingress: what arrived. By link layer: Ethernet, bare IP.
    pub const ARRIVE: [&str; 2] = ["arrive_eth", "arrive_ip"];
    /// A packet socket's filter, for kernels without tcx: the same.
    pub const TAP: [&str; 2] = ["tap_eth", "tap_ip"];
    /// tc egress: replies that went around netfilter's hooks.
    pub const CAUGHT: [&str; 2] = ["caught_eth", "caught_ip"];
    /// netfilter, behind every chain: what got through, and what is answered.
    pub const LOCAL: &str = "verdict_local";
    pub const FORWARD: &str = "verdict_forward";
    pub const REPLY: &str = "verdict_reply";
    /// tc ingress, right before and right behind the guard. By link layer.
    pub const AROUND_GUARD: [[&str; 2]; 2] =
        [["to_guard_eth", "to_guard_ip"], ["past_guard_eth", "past_guard_ip"]];
    /// netfilter, right before and right behind our table's chain.
    pub const AROUND_TABLE: [&str; 2] = ["to_table", "past_table"];
}

/// Bits of [`Order::canary`]: what a frame is sent to prove.
pub mod canary {
    /// The counters count it, under [`crate::CANARY_CLASS`].
    pub const COUNTED: u8 = 1;
    /// It meets no other program at tc ingress, so that the guard hides nothing of what
    /// is behind it.
    pub const PAST_TC: u8 = 2;
    /// Also of an audit: it keeps its priority, since somebody's rules ask for that.
    pub const PLAIN: u8 = 4;
}

/// Bits of [`Trace::stages`]: where a probe was seen on its way.
pub mod stages {
    pub const TO_GUARD: u8 = 1;
    pub const PAST_GUARD: u8 = 2;
    pub const TO_TABLE: u8 = 4;
    pub const PAST_TABLE: u8 = 8;
}

/// What the programs look for during one sweep.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Order {
    /// Random but for the lower half, which is all ones. A probe for port p carries `head ^ p` and `token`: as sequence number and
    /// timestamp of a SYN, as payload of a datagram. Nobody outside sees either, so nobody
    /// can make a packet that passes for a probe.
    pub head: u32,
    pub token: u32,
    /// The device that probes arrive on.
    pub index: u32,
    /// Of the frames of this sweep.
    pub frame_bytes: u32,
    /// Where in the kernel's sk_buff these are; different in each build of a kernel.
    pub skb_head: u32,
    pub skb_network_header: u32,
    pub skb_sk: u32,
    /// Where probes come from, in words of host order; IPv4 in the first.
    pub source: [u32; 4],
    pub source_port: u16,
    /// As far as this says, each port's probe has a source of its own: see
    /// [`Order::source_of`].
    pub spread_mask: u16,
    /// [`crate::IPV4`] or [`crate::IPV6`].
    pub family: u8,
    /// The number in the IP header.
    pub proto: u8,
    /// 1: replies of sockets are wanted, and theirs alone.
    pub reply: u8,
    /// Bits of [`canary`]; in an audit at most [`canary::PLAIN`].
    pub canary: u8,
}
const _: () = assert!(size_of::<Order>() == 52);

impl Order {
    /// Offsets of the two words in a transport header and what follows it.
    #[inline(always)]
    pub const fn words_at(proto: u8) -> (usize, usize) {
        // The timestamp is behind the options MSS and SACK-permitted.
        if proto == 6 { (4, 28) } else { (8, 12) }
    }

    /// The source of the probe for a port. The third and fourth byte of an IPv4 address
    /// are its own, or the fourth group of an IPv6 address: a network of its own.
    #[inline(always)]
    pub const fn source_of(&self, port: u16) -> [u32; 4] {
        let own = (port & self.spread_mask) as u32;
        let [first, second, third, fourth] = self.source;
        if self.is_ipv4() { [first ^ own, 0, 0, 0] } else { [first, second ^ own, third, fourth] }
    }

    #[inline(always)]
    pub const fn is_ipv4(&self) -> bool {
        self.family as usize == IPV4
    }
}

/// One frame, from its Ethernet header on.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Frame {
    pub bytes: [u8; FRAME_MAX],
}

/// How far the injector is.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// The next frame.
    pub next: u32,
    /// Frames that the kernel did not take.
    pub refused: u32,
}

/// Which way a probe ended.
pub mod ends {
    pub const NONE: u8 = 0;
    pub const LOCAL: u8 = 1;
    pub const FORWARD: u8 = 2;
    pub const RESET: u8 = 3;
    pub const UNREACHABLE: u8 = 4;
    pub const ANSWERED: u8 = 5;
    /// Got through to a socket that some rule or program chose for it, whatever its port.
    pub const TAKEN: u8 = 6;
}

/// What became of the probe for one port; the index is the port.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Trace {
    /// Arrived at tc ingress.
    pub seen: u8,
    /// One of [`ends`].
    pub end: u8,
    pub icmp_type: u8,
    pub icmp_code: u8,
    /// Where it was on its way to: after any NAT.
    pub port: u16,
    /// Bits of [`stages`].
    pub stages: u8,
    /// How many frames arrived; stays at 255.
    pub arrivals: u8,
    /// IPv4 in the first four bytes.
    pub address: [u8; 16],
}
const _: () = assert!(size_of::<Trace>() == 24);

/// By these our counters, the guard's and those of our nftables rules know a probe, which is
/// no traffic, and don't count it. They decide on nothing, and nothing from outside can set
/// them: the kernel clears both in what a device receives.
///
/// `skb->tc_index`, set by the injector: for tc programs.
pub const TC_INDEX: u32 = 0x5347;
/// The same for a probe that is [`canary::PLAIN`].
pub const TC_INDEX_PLAIN: u32 = 0x5348;
/// `skb->priority`, set by the first of our programs at tc ingress, for what comes behind it;
/// routing forgets it in IPv4 packets that are passed on. Not the mark, by which other
/// people's rules and routes choose.
pub const PRIORITY: u32 = 0x7370_6f6b;

/// Left by `arrive` in the control block of a frame that is [`canary::COUNTED`], for the
/// counters behind it, and in that of every test run. Nothing from outside can write there.
pub const MARK: [u32; 2] = [0x7370_6f6b, 0x6567_7561];
pub const COUNTED: u32 = 0x7264_6331;

#[cfg(feature = "user")]
mod user {
    // Sound: #[repr(C)], integers only, no padding.
    unsafe impl aya::Pod for super::Order {}
    unsafe impl aya::Pod for super::Frame {}
    unsafe impl aya::Pod for super::Progress {}
    unsafe impl aya::Pod for super::Trace {}
}
