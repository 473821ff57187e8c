//! What an outsider meets, port by port: the values that a sweep of this host and a scan
//! of another one come to, joined with listeners and policy, and their faces. Pure.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

pub use crate::observed::{Fate, Gate, Sweep};
use crate::report::Verdict;
use crate::terms::{Actor, Family, Port, Proto, Stamp};

mod aims;
mod care;
mod join;
mod services;
#[cfg(test)]
mod tests;
mod text;
mod xml;

pub use aims::{Aim, Ports, aims, by_link, ranges, stranger};
pub use care::Care;
pub use join::{View, opinion};
pub use services::{service_name, well_known};

/// What a scan of another host heard: one protocol, one address.
#[derive(Clone, Debug, PartialEq)]
pub struct Scan {
    pub address: IpAddr,
    /// The name that it was asked for by, where it was not the address itself.
    pub name: Option<String>,
    pub proto: Proto,
    pub source: Option<IpAddr>,
    /// In the order of the ports; no port twice.
    pub answers: Vec<(Port, Answer)>,
    /// Why the answers may not be all there are.
    pub gap: Option<String>,
    /// Unknown where the kernel asked for us.
    pub effort: Option<Effort>,
}

impl Scan {
    /// Whether the host itself said something, of any port. That a network or host can't be reached is said
    /// by others.
    #[must_use]
    pub fn is_heard(&self) -> bool {
        let away = |icmp_type, code| match self.address {
            IpAddr::V4(_) => icmp_type == 3 && code < 2,
            IpAddr::V6(_) => icmp_type == 1 && matches!(code, 0 | 3),
        };
        self.answers.iter().any(|(_, answer)| match *answer {
            Answer::Silent | Answer::Unasked => false,
            Answer::Unreachable { icmp_type, code } => !away(icmp_type, code),
            Answer::SynAck | Answer::Connected | Answer::Reset | Answer::Datagram => true,
        })
    }
}

/// What it took to ask over a path that may lose packets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Effort {
    /// How often a port that stayed silent was asked.
    pub passes: u32,
    /// Probes that left this host.
    pub sent: u64,
    /// Probes that this host's own rules held back.
    pub refused: u64,
    /// How often the queue was full and was waited for.
    pub queue_full: u64,
    /// Answers that came in faster than they were read.
    pub overrun: u64,
    /// The share of probes that went without an answer where there should be one, from 0 to 1.
    pub loss: f64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    SynAck,
    /// A finished handshake, where we may not send packets of our own making.
    Connected,
    Reset,
    /// A datagram back.
    Datagram,
    Unreachable {
        icmp_type: u8,
        code: u8,
    },
    Silent,
    /// Never asked, or not to the end.
    Unasked,
}

/// The JSON of `audit` (version 1 of the contract).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Audit {
    pub version: u32,
    pub vantage: Vantage,
    pub started: Stamp,
    pub seconds: f64,
    pub targets: Vec<Target>,
    pub verdict: Verdict,
    pub exposed: Vec<Spot>,
    pub missing: Vec<Spot>,
    pub blind: Vec<Blind>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Vantage {
    OutsideIn,
    Remote,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Target {
    pub address: IpAddr,
    /// The name it was asked for by; only in scans of other hosts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// The interface by which the probes came in; `null` where another host was scanned.
    pub interface: Option<String>,
    pub family: Family,
    /// As whom the probes came.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<IpAddr>,
    pub protocols: Vec<Protocol>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Protocol {
    pub proto: Proto,
    /// How many ports were asked: those listed and the others.
    pub scanned: u32,
    pub ports: Vec<PortState>,
    pub others: Others,
    /// How many of the ports were not probed: their state is what the rules say.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub unproven: u32,
    /// Only in scans of other hosts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub effort: Option<Effort>,
}

fn is_zero(number: &u32) -> bool {
    *number == 0
}

/// One port that is worth a line.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PortState {
    pub port: Port,
    pub state: State,
    pub service: Option<String>,
    /// `null` without a policy.
    pub wanted: Option<Wanted>,
    /// Who holds the socket, whether or not an outsider gets there.
    pub by: Option<Actor>,
    /// nmap's word first, then after a semicolon what we know better.
    pub reason: String,
    /// The exception of the policy that opens it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub accepted: Option<String>,
}

/// The ports that are not listed. They are all of one state, and nobody waits for them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Others {
    pub state: State,
    pub count: u32,
}

/// As nmap means them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum State {
    #[serde(rename = "open")]
    Open,
    #[serde(rename = "closed")]
    Closed,
    #[serde(rename = "filtered")]
    Filtered,
    #[serde(rename = "open|filtered")]
    OpenFiltered,
    /// We could not tell: see `blind`.
    #[serde(rename = "unknown")]
    Unknown,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Wanted {
    Open,
    Closed,
}

/// One port of one address.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Spot {
    pub address: IpAddr,
    pub proto: Proto,
    pub port: Port,
}

/// What could not be looked at: "probe", or a facet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Blind {
    pub facet: String,
    pub reason: String,
}

impl State {
    pub const ALL: [State; 5] =
        [State::Open, State::Closed, State::Filtered, State::OpenFiltered, State::Unknown];

    pub const fn name(self) -> &'static str {
        match self {
            State::Open => "open",
            State::Closed => "closed",
            State::Filtered => "filtered",
            State::OpenFiltered => "open|filtered",
            State::Unknown => "unknown",
        }
    }
}

impl Wanted {
    pub const fn name(self) -> &'static str {
        match self {
            Wanted::Open => "open",
            Wanted::Closed => "closed",
        }
    }
}

impl Audit {
    pub const fn exit_code(&self) -> u8 {
        self.verdict.exit_code()
    }

    /// The contract's document, with a newline at its end.
    pub fn to_json(&self) -> String {
        // Only maps with odd keys and failing Serialize impls can fail; there are none.
        let mut text = serde_json::to_string_pretty(self).unwrap_or_default();
        text.push('\n');
        text
    }

    /// A table for a terminal of this width; with ANSI colours only if asked.
    pub fn to_text(&self, width: usize, colour: bool) -> String {
        text::render(self, width, colour)
    }

    /// As nmap's `-oX`, for whatever reads that. `arguments` is the command line, `asked` the
    /// ports that it names.
    pub fn to_xml(&self, arguments: &str, asked: &Ports) -> String {
        xml::render(self, arguments, asked)
    }
}

impl std::fmt::Display for Spot {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.proto, std::net::SocketAddr::new(self.address, self.port.get()))
    }
}
