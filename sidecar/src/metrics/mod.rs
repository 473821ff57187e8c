//! The face of a finished cycle for Prometheus: everything as OpenMetrics text, with a
//! bounded number of series. Pure: who serves it is `daemon::http`.
//!
//! What could not be read has no series (a 0 would be a claim, and a counter that falls to
//! 0 and back is counted twice by `rate`); `blind{facet}` says why it is missing.

mod exposed;
mod layout;
mod text;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::time::Duration;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::text::encode;
use prometheus_client::encoding::{DescriptorEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::{Registry, Unit};
use serde::Serialize;

use crate::diff::{Code, Finding, Proof, Severity};
use crate::heartbeat::{Outcome, Tally, Target};
use crate::observed::{Amount, BindTally, Counters, Facet, Peer};
use crate::policy::{Mode, Role};
use crate::repair::{ActionKind, Ended};
use crate::report::Verdict;
use crate::ruleset::glass;
use crate::terms::{Family, Proto, PublicKey, Stamp};

use layout::OTHER;
pub use layout::{Layout, SERIES_MAX};
pub use text::to_prometheus_text;

/// Everything that is exported, as plain values.
#[derive(Clone, Debug)]
pub struct State<'a> {
    pub now: Stamp,
    pub started: Stamp,
    pub version: &'a str,
    /// Number of the contract between the programs in the kernel and us.
    pub abi: u32,
    pub node: &'a str,
    pub role: Role,
    pub mode: Mode,
    pub policy_hash: &'a str,
    pub verdict: Verdict,
    pub findings: &'a [Finding],
    pub blind: &'a [Facet],
    /// Controls that are shown to work right now. The others are 0.
    pub enforced: &'a BTreeSet<Control>,
    pub drift: &'a BTreeMap<Facet, u64>,
    pub repairs: &'a BTreeMap<(ActionKind, RepairOutcome), u64>,
    /// `None`: blind.
    pub counters: Option<&'a Counters>,
    /// The named counters of our table as it is; `None`: blind, or there is no table.
    pub drops: Option<&'a BTreeMap<String, Amount>>,
    /// `None`: blind, or no bind guard.
    pub binds: Option<BindTally>,
    /// `None`: blind, or no WireGuard here.
    pub peers: Option<&'a [Peer]>,
    pub audit: Option<&'a Audit>,
    /// What break-glass holds open, and when the last of it ends.
    pub openings: u64,
    pub openings_end: Option<Stamp>,
    /// The rules in force wait for a confirmation.
    pub on_trial: bool,
    pub cycles: u64,
    pub cycle_seconds: f64,
    /// `None`: could not be read.
    pub resident_bytes: Option<u64>,
    pub http_rejects: u64,
    pub heartbeat: &'a Tally,
}

/// The facets that have series, beside the mesh's. Of the bind guard `control_enforced` and `refused_binds` tell all.
const TOLD: [Facet; 6] =
    [Facet::Nftables, Facet::Listeners, Facet::Links, Facet::Sshd, Facet::Files, Facet::Counters];

/// What we promise to hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Control {
    Firewall,
    Guard,
    Keepalive,
    Counters,
    Repair,
    Binds,
    Privileges,
}

impl Control {
    pub const ALL: [Control; 7] = [
        Control::Firewall,
        Control::Guard,
        Control::Keepalive,
        Control::Counters,
        Control::Repair,
        Control::Binds,
        Control::Privileges,
    ];

    pub const fn name(self) -> &'static str {
        match self {
            Control::Firewall => "firewall",
            Control::Guard => "guard",
            Control::Keepalive => "keepalive",
            Control::Counters => "counters",
            Control::Repair => "repair",
            Control::Binds => "binds",
            Control::Privileges => "privileges",
        }
    }
}

/// [`Ended`] without its text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum RepairOutcome {
    Done,
    Failed,
    Withheld,
}

impl RepairOutcome {
    pub const ALL: [RepairOutcome; 3] = [RepairOutcome::Done, RepairOutcome::Failed, RepairOutcome::Withheld];

    pub const fn name(self) -> &'static str {
        match self {
            RepairOutcome::Done => "done",
            RepairOutcome::Failed => "failed",
            RepairOutcome::Withheld => "withheld",
        }
    }
}

impl From<&Ended> for RepairOutcome {
    fn from(ended: &Ended) -> Self {
        match ended {
            Ended::Done => RepairOutcome::Done,
            Ended::Failed(_) => RepairOutcome::Failed,
            Ended::Withheld => RepairOutcome::Withheld,
        }
    }
}

/// The last look from the outside in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Audit {
    /// Since it began, by a clock that nobody sets.
    pub age: Duration,
    pub proof: Proof,
}

/// The state as OpenMetrics 1.0 text, end mark included.
pub fn render(state: &State<'_>, layout: &Layout) -> String {
    let mut registry = Registry::with_prefix("spokeguard");
    registry.register_collector(Box::new(Exposition::new(state, layout)));
    let mut out = String::with_capacity(16 * 1024);
    // Writing to a String can't fail, and the encoder has no other errors for our types.
    if encode(&mut out, &registry).is_err() {
        return "# EOF\n".to_owned();
    }
    // OpenMetrics spells infinity "+Inf". A line can only end like this in a value: label
    // values hold no raw line breaks.
    out.replace(" inf\n", " +Inf\n")
}

/// Every family with its samples, ready to be written.
#[derive(Clone, Debug)]
pub struct Exposition {
    families: Vec<MetricFamily>,
}

#[derive(Clone, Debug)]
struct MetricFamily {
    /// Without the prefix, the unit, and the suffix of its kind.
    name: &'static str,
    unit: Option<Unit>,
    kind: MetricType,
    help: &'static str,
    samples: Vec<(Labels, Value)>,
}

type Labels = Vec<(&'static str, String)>;

#[derive(Clone, Copy, Debug)]
enum Value {
    Whole(u64),
    Real(f64),
}

impl Exposition {
    pub fn new(state: &State<'_>, layout: &Layout) -> Self {
        let mut out = Self { families: Vec::with_capacity(24) };
        out.about(state);
        out.verdict(state, layout);
        out.work(state, layout);
        out.traffic(state, layout);
        out.break_glass(state);
        out.binds(state);
        out.wireguard(state, layout);
        out.audit(state);
        out.own(state);
        out.heartbeat(state.heartbeat);
        out
    }

    /// How many samples it has.
    pub fn series(&self) -> usize {
        self.families.iter().map(|family| family.samples.len()).sum()
    }

    fn about(&mut self, state: &State<'_>) {
        let version = vec![("version", state.version.to_owned()), ("abi", state.abi.to_string())];
        self.info("build", "Version of spokeguard and of its contract with the kernel side", version);
        let policy = vec![
            ("node", state.node.to_owned()),
            ("role", word(state.role)),
            ("mode", word(state.mode)),
            ("hash", state.policy_hash.to_owned()),
        ];
        self.info("policy", "The policy in force", policy);
        let started = u64::try_from(state.started.0.as_second()).unwrap_or(0);
        self.gauge("start_time", Some(Unit::Seconds), "When the daemon started, in Unix time", one(started));
    }

    fn verdict(&mut self, state: &State<'_>, layout: &Layout) {
        let verdict: u64 = match state.verdict {
            Verdict::Ok => 0,
            Verdict::Drift => 1,
            Verdict::Unknown => 2,
        };
        self.gauge("verdict", None, "0 as the policy says, 1 it differs, 2 could not tell", one(verdict));
        let (findings, doors) = told(state.findings);
        self.gauge(
            "findings",
            None,
            "Differences from the policy that nobody has accepted",
            findings
                .into_iter()
                .map(|((code, severity), n)| (vec![("code", code), ("severity", severity)], Value::Whole(n))),
        );
        let accepted = state.findings.iter().filter(|finding| finding.accepted).count();
        self.gauge(
            "accepted_findings",
            None,
            "Differences that the policy declares as accepted risk",
            one(accepted as u64),
        );
        self.push(
            "exposed",
            None,
            MetricType::Info,
            "A port that strangers get in at against the policy, and the process behind it",
            doors.iter().map(|row| (row.labels(), Value::Whole(1))),
        );
        self.gauge(
            "exception_expires_timestamp",
            Some(Unit::Seconds),
            "When an exception of the policy ends, in Unix time",
            layout.exceptions.iter().map(|(name, end)| labelled("exception", name, *end)),
        );
        self.gauge(
            "rules_on_trial",
            None,
            "1 while the rules in force wait for a confirmation, or are rolled back without one",
            one(u64::from(state.on_trial)),
        );
        self.gauge(
            "blind",
            None,
            "1 where a facet of the host could not be read, so that nothing is claimed about it",
            layout.told().map(|f| labelled("facet", f.name(), u64::from(state.blind.contains(&f)))),
        );
        self.gauge(
            "control_enforced",
            None,
            "1 where a control is shown to work right now",
            Control::ALL.map(|c| labelled("control", c.name(), u64::from(state.enforced.contains(&c)))),
        );
    }

    fn work(&mut self, state: &State<'_>, layout: &Layout) {
        self.counter(
            "drift_events",
            "Times that a difference from the policy appeared",
            layout.told().map(|f| labelled("facet", f.name(), state.drift.get(&f).copied().unwrap_or(0))),
        );
        let pairs = ActionKind::ALL.into_iter().flat_map(|a| RepairOutcome::ALL.map(|o| (a, o)));
        self.counter(
            "repairs",
            "Repairs by what came of them; withheld ones would have fought another tool",
            pairs.map(|(action, outcome)| {
                let labels = vec![("action", action.name().into()), ("outcome", outcome.name().into())];
                (labels, Value::Whole(state.repairs.get(&(action, outcome)).copied().unwrap_or(0)))
            }),
        );
    }

    fn traffic(&mut self, state: &State<'_>, layout: &Layout) {
        let began = state.counters.filter(|counters| counters.created != 0);
        self.gauge(
            "counters_created",
            Some(Unit::Seconds),
            "Since when packets are counted, in Unix time: also across restarts and upgrades",
            began.map(|counters| (Vec::new(), Value::Whole(counters.created))),
        );
        let mut cells = BTreeMap::new();
        let mut attempts = BTreeMap::new();
        if let Some(counters) = state.counters {
            cells = layout.traffic();
            for (key, amount) in &counters.traffic {
                if let Some(sum) = cells.get_mut(&layout.traffic_cell(key)) {
                    sum.packets = sum.packets.saturating_add(amount.packets);
                    sum.bytes = sum.bytes.saturating_add(amount.bytes);
                }
            }
            attempts = layout.attempts();
            for (key, n) in &counters.attempts {
                if let Some(sum) = attempts.get_mut(&layout.attempt_cell(key)) {
                    *sum = sum.saturating_add(*n);
                }
            }
        }
        let samples = |pick: fn(&Amount) -> u64| {
            let one = move |(cell, amount): (&layout::TrafficLabels<'_>, &Amount)| {
                let labels = vec![
                    ("scope", cell.scope.name().to_owned()),
                    ("direction", cell.direction.name().to_owned()),
                    ("family", cell.family.name().to_owned()),
                    ("proto", cell.proto.to_owned()),
                    ("service", cell.service.to_owned()),
                ];
                (labels, Value::Whole(pick(amount)))
            };
            cells.iter().map(one).collect::<Vec<_>>()
        };
        self.counter(
            "packets",
            "Packets by where they came from and what they were for",
            samples(|a| a.packets),
        );
        self.counter("bytes", "Bytes of those packets", samples(|a| a.bytes));
        self.counter(
            "connection_attempts",
            "New TCP connections that arrived, by what the policy says of them",
            attempts.iter().map(|(cell, n)| {
                let verdict = if cell.allowed { "allowed" } else { "denied" };
                let labels = vec![
                    ("service", cell.service.to_owned()),
                    ("family", cell.family.name().to_owned()),
                    ("verdict", verdict.to_owned()),
                ];
                (labels, Value::Whole(*n))
            }),
        );
        let mut drops = BTreeMap::new();
        if let Some(counted) = state.drops {
            drops = layout.drops();
            for (counter, amount) in counted {
                if let Some(sum) = layout.drop_cell(counter).and_then(|cell| drops.get_mut(&cell)) {
                    *sum = sum.saturating_add(amount.packets);
                }
            }
        }
        self.counter(
            "dropped_packets",
            "Packets that our rules dropped, or would have dropped where policy_info says mode=audit",
            drops.into_iter().map(|((rule, family), n)| {
                (vec![("rule", rule.to_owned()), ("family", family.name().to_owned())], Value::Whole(n))
            }),
        );
    }

    fn break_glass(&mut self, state: &State<'_>) {
        self.gauge(
            "break_glass_open",
            None,
            "Prefixes that break-glass lets in for a while",
            one(state.openings),
        );
        let end = state.openings_end.map_or(0, |end| u64::try_from(end.0.as_second()).unwrap_or(0));
        self.gauge(
            "break_glass_end_time",
            Some(Unit::Seconds),
            "When the last of them is closed by the kernel, in Unix time; 0 if nothing is open",
            one(end),
        );
        let counted = state.drops.map(|counters| {
            let packets = |family| Some(counters.get(&glass::counter(family))?.packets);
            Family::ALL.into_iter().filter_map(packets).fold(0, u64::saturating_add)
        });
        self.counter(
            "break_glass_packets",
            "Packets that break-glass let in: of TCP all, of UDP the first of a flow",
            counted.map(|packets| (Vec::new(), Value::Whole(packets))),
        );
    }

    fn binds(&mut self, state: &State<'_>) {
        let refused = state.binds.map(|n| (Vec::new(), Value::Whole(n.refused.saturating_add(n.audited))));
        self.counter(
            "refused_binds",
            "Sockets refused an address that the policy does not let them have, or that would have been where \
             policy_info says mode=audit",
            refused,
        );
    }

    fn wireguard(&mut self, state: &State<'_>, layout: &Layout) {
        let rows = peer_rows(state.peers.unwrap_or_default(), layout.hub, layout.peers, state.now);
        self.gauge(
            "wireguard_handshake_age",
            Some(Unit::Seconds),
            "Time since the last handshake with a peer, infinite if there was none",
            rows.iter().map(|(peer, row)| (vec![("peer", peer.clone())], Value::Real(row.age))),
        );
        self.gauge(
            "wireguard_keepalive",
            Some(Unit::Seconds),
            "Persistent keepalive of a peer, 0 if it is off",
            rows.iter().map(|(peer, row)| (vec![("peer", peer.clone())], Value::Whole(row.keepalive.into()))),
        );
    }

    fn audit(&mut self, state: &State<'_>) {
        let Some(audit) = state.audit else { return };
        let pairs = Family::ALL.into_iter().flat_map(|f| Proto::ALL.map(|p| (f, p)));
        self.gauge(
            "audit_exposed_ports",
            None,
            "Ports that the last audit reached from outside against the policy",
            pairs.map(|(family, proto)| {
                let labels = vec![("family", family.name().into()), ("proto", proto.name().into())];
                (labels, Value::Whole(audit.proof.exposed.get(&(family, proto)).copied().unwrap_or(0)))
            }),
        );
        self.gauge(
            "audit_disagreements",
            None,
            "Ports of which the rules say one thing and a probe from outside met another",
            one(audit.proof.disagreements.values().sum()),
        );
        let age = audit.age.as_secs();
        self.gauge("audit_age", Some(Unit::Seconds), "Time since the last audit", one(age));
    }

    fn own(&mut self, state: &State<'_>) {
        let cycle = [(Vec::new(), Value::Real(state.cycle_seconds))];
        self.gauge("cycle", Some(Unit::Seconds), "How long the last cycle took", cycle);
        self.counter("cycles", "Cycles of looking, deciding and repairing", one(state.cycles));
        let resident = state.resident_bytes.map(|bytes| (Vec::new(), Value::Whole(bytes)));
        self.gauge("resident_memory", Some(Unit::Bytes), "Resident memory of the daemon", resident);
        let bpf = state.counters.map(|counters| (Vec::new(), Value::Whole(counters.memory_bytes)));
        self.gauge("bpf_memory", Some(Unit::Bytes), "Kernel memory of our BPF maps and programs", bpf);
        self.counter(
            "http_rejected_connections",
            "Connections to this endpoint that were closed: not the hub, or too many",
            one(state.http_rejects),
        );
    }

    /// Nothing of whom the policy does not tell.
    fn heartbeat(&mut self, tally: &Tally) {
        let pairs = tally.told.iter().flat_map(|target| Outcome::ALL.map(|outcome| (*target, outcome)));
        self.counter(
            "heartbeat",
            "What the hub was told, by what came of it",
            pairs.map(|(target, outcome)| {
                let labels = vec![("target", target.name().into()), ("outcome", outcome.name().into())];
                (labels, Value::Whole(tally.sent.get(&(target, outcome)).copied().unwrap_or(0)))
            }),
        );
        let age = tally.age.map(|age| (Vec::new(), Value::Whole(age.as_secs())));
        self.gauge("heartbeat_age", Some(Unit::Seconds), "Time since Uptime Kuma accepted a beat", age);
        let of_ntfy = |n| tally.told.contains(&Target::Ntfy).then(|| (Vec::new(), Value::Whole(n)));
        self.gauge("heartbeat_queue", None, "Notices that wait to be sent", of_ntfy(tally.queue));
        self.counter("heartbeat_dropped", "Notices that were given up", of_ntfy(tally.dropped));
        let ends = tally.certificate_ends.and_then(|end| u64::try_from(end).ok());
        self.gauge(
            "certificate_expires_timestamp",
            Some(Unit::Seconds),
            "When the certificate ends that port 443 serves, in Unix time",
            ends.map(|end| (Vec::new(), Value::Whole(end))),
        );
    }

    fn info(&mut self, name: &'static str, help: &'static str, labels: Labels) {
        self.push(name, None, MetricType::Info, help, [(labels, Value::Whole(1))]);
    }

    fn gauge(
        &mut self,
        name: &'static str,
        unit: Option<Unit>,
        help: &'static str,
        samples: impl IntoIterator<Item = (Labels, Value)>,
    ) {
        self.push(name, unit, MetricType::Gauge, help, samples);
    }

    fn counter(
        &mut self,
        name: &'static str,
        help: &'static str,
        samples: impl IntoIterator<Item = (Labels, Value)>,
    ) {
        self.push(name, None, MetricType::Counter, help, samples);
    }

    fn push(
        &mut self,
        name: &'static str,
        unit: Option<Unit>,
        kind: MetricType,
        help: &'static str,
        samples: impl IntoIterator<Item = (Labels, Value)>,
    ) {
        let samples = samples.into_iter().collect();
        self.families.push(MetricFamily { name, unit, kind, help, samples });
    }
}

impl Collector for Exposition {
    fn encode(&self, mut encoder: DescriptorEncoder) -> Result<(), fmt::Error> {
        for family in &self.families {
            let MetricFamily { name, unit, kind, help, samples } = family;
            let mut metric = encoder.encode_descriptor(name, help, unit.as_ref(), *kind)?;
            for (labels, value) in samples {
                match (kind, value) {
                    (MetricType::Info, _) => metric.encode_info(labels)?,
                    (MetricType::Counter, Value::Whole(n)) if labels.is_empty() => {
                        metric.encode_counter::<NoLabelSet, u64, f64>(n, None)?;
                    }
                    (MetricType::Counter, Value::Whole(n)) => {
                        metric.encode_family(labels)?.encode_counter::<NoLabelSet, u64, f64>(n, None)?;
                    }
                    (_, Value::Whole(n)) if labels.is_empty() => metric.encode_gauge(n)?,
                    (_, Value::Whole(n)) => metric.encode_family(labels)?.encode_gauge(n)?,
                    (_, Value::Real(x)) if labels.is_empty() => metric.encode_gauge(x)?,
                    (_, Value::Real(x)) => metric.encode_family(labels)?.encode_gauge(x)?,
                }
            }
        }
        Ok(())
    }
}

fn one(n: u64) -> [(Labels, Value); 1] {
    [(Vec::new(), Value::Whole(n))]
}

fn labelled(key: &'static str, value: &str, n: u64) -> (Labels, Value) {
    (vec![(key, value.to_owned())], Value::Whole(n))
}

/// The name of a unit variant as it is serialised, so that labels and JSON never disagree.
fn word(value: impl Serialize) -> String {
    match serde_json::to_value(value) {
        Ok(serde_json::Value::String(text)) => text,
        _ => String::new(),
    }
}

/// Findings that nobody accepted, by code and severity, and the ports open among them, the lowest first: as
/// many of both as there is room for.
fn told(findings: &[Finding]) -> (BTreeMap<(String, String), u64>, Vec<exposed::Row>) {
    let mut pairs = BTreeMap::new();
    for finding in findings.iter().filter(|finding| !finding.accepted) {
        *pairs.entry((finding.severity, finding.code)).or_insert(0) += 1;
    }
    let doors = exposed::rows(findings);
    let (told, open) = layout::divided(pairs.len(), doors.len());
    (folded_findings(pairs, told), doors.into_iter().take(open).collect())
}

/// Beyond the bound only the worst keep their code; the others are summed up for each severity as
/// `code="other"`.
fn folded_findings(pairs: BTreeMap<(Severity, Code), u64>, bound: usize) -> BTreeMap<(String, String), u64> {
    let kept = if pairs.len() > bound { bound - Severity::ALL.len() } else { pairs.len() };
    let mut folded = BTreeMap::new();
    for (at, ((severity, code), n)) in pairs.into_iter().enumerate() {
        let code = if at < kept { word(code) } else { OTHER.to_owned() };
        *folded.entry((code, word(severity))).or_insert(0) += n;
    }
    folded
}

#[derive(Clone, Copy, Debug, PartialEq)]
struct PeerRow {
    age: f64,
    keepalive: u16,
}

/// At most `slots` rows: the hub, then the others by key, then everybody else as
/// `overflow`. Peers that share a label share its row, which then tells the worst of them.
fn peer_rows(peers: &[Peer], hub: Option<PublicKey>, slots: usize, now: Stamp) -> BTreeMap<String, PeerRow> {
    let mut peers: Vec<&Peer> = peers.iter().collect();
    peers.sort_by_key(|peer| (Some(peer.public_key) != hub, peer.public_key));
    let named = if peers.len() > slots { slots.saturating_sub(1) } else { slots };
    let mut rows = BTreeMap::new();
    for (at, peer) in peers.into_iter().enumerate().take_while(|_| slots > 0) {
        let label = match Some(peer.public_key) == hub {
            _ if at >= named => "overflow".to_owned(),
            true => "hub".to_owned(),
            false => peer.public_key.to_string().chars().take(8).collect(),
        };
        let age = peer.last_handshake.map_or(f64::INFINITY, |at| now.seconds_since(at) as f64);
        let row = rows.entry(label).or_insert(PeerRow { age, keepalive: peer.keepalive });
        row.age = row.age.max(age);
        row.keepalive = row.keepalive.min(peer.keepalive);
    }
    rows
}

#[cfg(test)]
pub(crate) mod tests;
