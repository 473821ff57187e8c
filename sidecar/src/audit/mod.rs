//! What an outsider meets, port by port: the values that a sweep of this host and a scan
//! of another one come to, joined with listeners and policy, and their faces. Pure.

use std::net::IpAddr;

use crate::terms::{Port, Proto};

/// What became of the probes of one sweep: one protocol, one address, one interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sweep {
    pub interface: String,
    pub address: IpAddr,
    pub proto: Proto,
    /// Where the probes said they came from (the first of them, where each has its own).
    pub source: IpAddr,
    /// In the order of the ports; no port twice.
    pub fates: Vec<(Port, Fate)>,
}

/// What one probe met, after every table, NAT and program of the host had its say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fate {
    /// Got through to this host itself, at this port after any DNAT or redirect. Whether a
    /// socket is there, the listeners tell.
    Delivered { address: IpAddr, port: Port },
    /// Got through on its way to another machine or a container.
    Forwarded { address: IpAddr, port: Port },
    /// Answered by a socket (a SYN-ACK, a datagram); only where replies were asked for.
    Answered,
    /// Answered by a TCP reset before any socket: a reject rule. Where replies were asked for, a closed
    /// port as well.
    Reset,
    /// Answered by ICMP (type, code): a reject rule, or no route behind a DNAT.
    Unreachable { icmp_type: u8, code: u8 },
    /// No trace of it: dropped.
    Dropped,
    /// We can't tell; it was never seen to arrive.
    Lost,
}
