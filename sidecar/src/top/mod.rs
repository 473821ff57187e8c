//! What a node is busy with right now: traffic by scope and service, who knocks and is
//! refused, what drifted and who did it. Samples and knocks in, a [`Frame`] out; how it
//! looks is `page`. Every table has a bound, whatever comes.

mod datagrams;
mod page;
mod tally;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use serde::Serialize;

use crate::desired::guard::{Boot, Syn};
use crate::desired::{Desired, DropReason};
use crate::observed::{Amount, CountedProto, Direction, TrafficKey};
use crate::policy::Mode;
use crate::report::Verdict;
use crate::terms::{Family, Proto, Scope, Stamp};

pub use datagrams::{Datagram, Judge, Known, Welcome};
pub use page::{page, to_text};
pub use tally::Tally;

/// Sources and ports that are remembered; the least busy make way.
const KEPT_MAX: usize = 256;
/// Ports of one stranger that are told apart.
const PORTS_MAX: usize = 64;
/// Rows of a list in a frame.
const ROWS_MAX: usize = 20;

/// The kernel's sums at one moment.
#[derive(Clone, Debug, Default)]
pub struct Sample {
    /// Of a clock that only goes forward.
    pub at: Duration,
    pub traffic: BTreeMap<TrafficKey, Amount>,
    /// Packets by the name of the counter that dropped them, both layers together.
    pub dropped: BTreeMap<String, u64>,
}

/// One screen full, or one JSON document.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Frame {
    pub version: u32,
    pub node: String,
    pub verdict: Verdict,
    pub at: Stamp,
    pub mode: Mode,
    /// Findings that are not accepted, and facets that could not be read.
    pub findings: usize,
    pub blind: usize,
    /// What rates are taken over.
    pub seconds: f64,
    /// Since when refused and strangers are counted.
    pub since: Stamp,
    pub scopes: Vec<Flow>,
    /// The busiest first.
    pub services: Vec<Flow>,
    /// By reason, in packets; those that ever counted any.
    pub dropped: Vec<Dropped>,
    /// Ports that strangers asked for and may not reach, the busiest first.
    pub refused: Vec<RefusedPort>,
    /// Who opens TCP connections from public interfaces, or sends datagrams that are refused;
    /// the busiest first.
    pub strangers: Vec<Stranger>,
    /// New connections and datagrams (answers among them) that came too fast to be looked at;
    /// drop counters have all that was refused.
    pub missed: u64,
    /// The newest first.
    pub drift: Vec<Drift>,
    /// What could not be shown, and why.
    pub notes: Vec<String>,
}

#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Flow {
    pub name: String,
    #[serde(rename = "in")]
    pub inward: Rate,
    pub out: Rate,
}

/// Per second.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Rate {
    pub packets: f64,
    pub bytes: f64,
}

#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Dropped {
    pub reason: &'static str,
    pub packets: u64,
    pub per_second: f64,
}

#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct RefusedPort {
    pub proto: Proto,
    pub port: u16,
    pub name: Option<String>,
    /// First packets of connections, or datagrams.
    pub tries: u64,
    pub per_second: f64,
}

#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Stranger {
    pub address: IpAddr,
    pub tries: u64,
    pub refused: u64,
    pub per_second: f64,
    /// How many ports it asked for; at most 64 are told apart.
    pub ports: usize,
    pub last_port: u16,
}

/// Something that happened, as the daemon wrote it down.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Drift {
    pub at: Stamp,
    pub text: String,
}

/// What the daemon says, for a frame.
#[derive(Clone, Debug, PartialEq)]
pub struct Told {
    pub verdict: Verdict,
    pub findings: usize,
    pub blind: usize,
    pub drift: Vec<Drift>,
}

/// Everything that is remembered between two frames.
#[derive(Debug)]
pub struct Watch {
    since: Stamp,
    before: Option<Sample>,
    last: Option<Sample>,
    strangers: Tally<IpAddr, Visits>,
    ports: Tally<(Proto, u16), ()>,
    missed: u64,
}

#[derive(Clone, Debug, Default)]
struct Visits {
    refused: u64,
    ports: BTreeSet<u16>,
    last_port: u16,
}

impl Watch {
    pub fn new(now: Stamp) -> Self {
        Self {
            since: now,
            before: None,
            last: None,
            strangers: Tally::new(KEPT_MAX),
            ports: Tally::new(KEPT_MAX),
            missed: 0,
        }
    }

    /// A new connection that arrives on a public interface, judged by the rules of the guard
    /// where there are any.
    pub fn knock(&mut self, desired: &Desired, syn: &Syn, now: Boot) {
        let refused = desired.guard.as_ref().is_some_and(|guard| guard.judge(syn, now).is_some());
        self.visit(syn.source, Proto::Tcp, syn.port, refused);
    }

    /// A datagram that arrives on a public interface and is refused.
    pub fn refused_datagram(&mut self, datagram: &Datagram) {
        self.visit(datagram.from.ip(), Proto::Udp, datagram.to.port(), true);
    }

    fn visit(&mut self, source: IpAddr, proto: Proto, port: u16, refused: bool) {
        let visits = self.strangers.add(source);
        visits.refused += u64::from(refused);
        visits.last_port = port;
        if visits.ports.len() < PORTS_MAX {
            visits.ports.insert(port);
        }
        if refused {
            self.ports.add((proto, port));
        }
    }

    pub fn missed(&mut self, more: u64) {
        self.missed = self.missed.saturating_add(more);
    }

    /// The next sums; rates are taken from the ones before to these.
    pub fn sample(&mut self, sample: Sample) {
        let seconds = self.last.as_ref().map_or(0.0, |last| sample.at.saturating_sub(last.at).as_secs_f64());
        self.strangers.turn(seconds);
        self.ports.turn(seconds);
        self.before = self.last.replace(sample);
    }

    pub fn frame(&self, desired: &Desired, told: Told, now: Stamp, notes: Vec<String>) -> Frame {
        let empty = Sample::default();
        let last = self.last.as_ref().unwrap_or(&empty);
        let before = self.before.as_ref().unwrap_or(last);
        let seconds = last.at.saturating_sub(before.at).as_secs_f64();
        let per_second = |now: u64, then: u64| match seconds {
            s if s > 0.0 => now.saturating_sub(then) as f64 / s,
            _ => 0.0,
        };
        let rate = |of: &dyn Fn(&TrafficKey) -> bool| {
            let sum = |sample: &Sample| {
                let cells = sample.traffic.iter().filter(|(key, _)| of(key));
                cells.fold((0u64, 0u64), |(packets, bytes), (_, amount)| {
                    (packets.saturating_add(amount.packets), bytes.saturating_add(amount.bytes))
                })
            };
            let (now, then) = (sum(last), sum(before));
            Rate { packets: per_second(now.0, then.0), bytes: per_second(now.1, then.1) }
        };
        let flow = |name: String, of: &dyn Fn(&TrafficKey) -> bool| Flow {
            name,
            inward: rate(&|key| key.direction == Direction::In && of(key)),
            out: rate(&|key| key.direction == Direction::Out && of(key)),
        };
        let scopes = Scope::ALL.map(|scope| flow(scope.name().into(), &|key| key.scope == scope)).to_vec();
        let named = desired.services.iter().enumerate().map(|(class, service)| {
            let class = u16::try_from(class).ok();
            let name = format!("{} {}/{}", service.name, service.proto, service.port);
            flow(name, &|key| key.class.is_some() && key.class == class)
        });
        let others = CountedProto::ALL.map(|proto| {
            flow(format!("other {}", proto.name()), &|key| key.class.is_none() && key.proto == proto)
        });
        let mut services: Vec<Flow> = named.chain(others).collect();
        let busy = |flow: &Flow| flow.inward.bytes + flow.out.bytes;
        services.sort_by(|a, b| busy(b).total_cmp(&busy(a)));
        services.truncate(ROWS_MAX);
        let dropped = DropReason::ALL.into_iter().filter_map(|reason| {
            let sum = |sample: &Sample| {
                let names = Family::ALL.map(|family| reason.counter(family));
                names.iter().filter_map(|name| sample.dropped.get(name)).sum::<u64>()
            };
            let packets = sum(last);
            (packets > 0).then(|| Dropped {
                reason: reason.name(),
                packets,
                per_second: per_second(packets, sum(before)),
            })
        });
        let mut dropped: Vec<Dropped> = dropped.collect();
        dropped.sort_by_key(|dropped| std::cmp::Reverse(dropped.packets));
        let refused =
            self.ports.busiest(ROWS_MAX).into_iter().map(|((proto, port), count, ())| RefusedPort {
                proto: *proto,
                port: *port,
                name: crate::terms::Port::new(*port).and_then(|port| {
                    let own = desired.name_of(*proto, port);
                    own.or_else(|| crate::audit::service_name(*proto, port)).map(ToOwned::to_owned)
                }),
                tries: count.times,
                per_second: count.per_second,
            });
        let strangers =
            self.strangers.busiest(ROWS_MAX).into_iter().map(|(address, count, visits)| Stranger {
                address: *address,
                tries: count.times,
                refused: visits.refused,
                per_second: count.per_second,
                ports: visits.ports.len(),
                last_port: visits.last_port,
            });
        Frame {
            version: 1,
            node: desired.policy.node.name.clone(),
            verdict: told.verdict,
            at: now,
            mode: desired.policy.enforce.mode,
            findings: told.findings,
            blind: told.blind,
            seconds,
            since: self.since,
            scopes,
            services,
            dropped,
            refused: refused.collect(),
            strangers: strangers.collect(),
            missed: self.missed,
            drift: told.drift.into_iter().take(ROWS_MAX).collect(),
            notes,
        }
    }
}
