//! What became of the frames by which our controls are tried.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::terms::{Port, Proto};

/// Frames of one kind that were put into the receive path of a public interface, from a
/// stranger to a port that the policy refuses.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Flight {
    pub interface: String,
    pub address: IpAddr,
    pub proto: Proto,
    pub port: Port,
    /// They were kept from the guard, so that they could get to our table.
    pub past_guard: bool,
    pub sent: u8,
    /// Of those, how many were seen to arrive.
    pub arrived: u8,
    /// `None`: no guard is on the interface, or it was not asked about.
    pub guard: Option<Crossing>,
    pub table: Crossing,
    /// They got behind the last chain of all, or were answered.
    pub through: bool,
    /// `None`: the counters were not asked about.
    pub counted: Option<Counted>,
}

/// Whether any of the frames was seen right before something, and right behind it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Crossing {
    pub reached: bool,
    pub passed: bool,
}

/// What the counters counted of these frames and of nothing else, beside what they should
/// have.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counted {
    pub packets: u64,
    pub bytes: u64,
    /// New connections, as refused.
    pub attempts: u64,
    pub bytes_wanted: u64,
}
