//! What a node says of itself, taken from its metrics. Words are the node's and harmless;
//! numbers are the node's and may be lies.

use std::collections::BTreeMap;

use serde::Serialize;

use super::exposition::{Exposition, count};
use crate::metrics::Control;
use crate::report::Verdict;

#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Vitals {
    pub node: String,
    pub version: String,
    pub mode: String,
    /// [`crate::policy::fingerprint`] of the policy it enforces.
    pub policy: String,
    pub verdict: Verdict,
    /// Differences that nobody has accepted, the worst first.
    pub findings: Vec<Found>,
    pub accepted: u64,
    /// Facets that could not be read.
    pub blind: Vec<String>,
    /// Controls that are not shown to work.
    pub unproven: Vec<String>,
    /// Seconds since the last handshake with the hub, or the oldest of all peers; `None` without peers.
    pub handshake_age: Option<u64>,
    /// Ports that its own audit reached against the policy; `None`: never audited.
    pub exposed: Option<u64>,
    pub disagreements: u64,
    /// Seconds since that audit, by the node's clock.
    pub audit_age: Option<u64>,
    /// Seconds since a heartbeat was last acknowledged; `None`: it sends none, or does not say.
    pub heartbeat_age: Option<u64>,
    pub drift_events: u64,
    /// Repairs by what came of them.
    pub repairs: BTreeMap<String, u64>,
    /// Bytes since `counters_created`, by scope and direction.
    pub bytes: BTreeMap<String, u64>,
    /// Packets that our rules dropped; `None`: blind.
    pub dropped: Option<u64>,
    /// New connections that the policy refuses.
    pub refused: Option<u64>,
    /// When its daemon began, in Unix time by the node's clock.
    pub started: Option<u64>,
    pub resident_bytes: Option<u64>,
}

/// Findings of one kind.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Found {
    pub code: String,
    pub severity: String,
    pub count: u64,
}

/// The worst first; a word that we don't know comes before all that we know.
const SEVERITIES: [&str; 5] = ["critical", "high", "medium", "low", "info"];

impl Found {
    fn rank(&self) -> usize {
        SEVERITIES.iter().position(|s| *s == self.severity).map_or(0, |at| at + 1)
    }

    /// Whether it is listed only, and no difference.
    pub fn is_info(&self) -> bool {
        self.severity == "info"
    }
}

impl Vitals {
    /// From metrics; an error says what they lack to be those of a daemon of ours.
    pub fn of(text: &Exposition) -> Result<Self, &'static str> {
        let verdict = match text.one("verdict") {
            Some(0.0) => Verdict::Ok,
            Some(1.0) => Verdict::Drift,
            Some(2.0) => Verdict::Unknown,
            Some(_) => return Err("its metrics have a verdict that we don't know"),
            None => return Err("its metrics have no verdict: is it spokeguard that answers?"),
        };
        let info = |name: &str, label: &str| {
            text.of(name).next().map(|sample| sample.label(label).to_owned()).unwrap_or_default()
        };
        let on = |name: &'static str, label: &'static str, wanted: bool| -> Vec<String> {
            let named = text.of(name).filter(|s| (s.value != 0.0) == wanted);
            named.map(|sample| sample.label(label).to_owned()).take(Control::ALL.len().max(16)).collect()
        };
        let mut findings: Vec<Found> = text
            .of("findings")
            .filter(|sample| sample.count() > 0)
            .map(|sample| Found {
                code: sample.label("code").to_owned(),
                severity: sample.label("severity").to_owned(),
                count: sample.count(),
            })
            .collect();
        findings.sort_by(|a, b| (a.rank(), &a.code).cmp(&(b.rank(), &b.code)));
        let by = |name: &'static str, labels: &[&str]| -> BTreeMap<String, u64> {
            let mut out: BTreeMap<String, u64> = BTreeMap::new();
            for sample in text.of(name) {
                let key: Vec<&str> = labels.iter().map(|label| sample.label(label)).collect();
                let sum = out.entry(key.join(" ")).or_default();
                *sum = sum.saturating_add(sample.count());
            }
            out
        };
        let handshakes = || text.of("wireguard_handshake_age_seconds");
        let hub = handshakes().find(|sample| sample.label("peer") == "hub").map(|sample| sample.count());
        Ok(Self {
            node: info("policy_info", "node"),
            version: info("build_info", "version"),
            mode: info("policy_info", "mode"),
            policy: info("policy_info", "hash"),
            verdict,
            findings,
            accepted: text.sum("accepted_findings", &[]).unwrap_or(0),
            blind: on("blind", "facet", true),
            unproven: on("control_enforced", "control", false),
            handshake_age: hub.or_else(|| handshakes().map(|sample| sample.count()).max()),
            exposed: text.sum("audit_exposed_ports", &[]),
            disagreements: text.sum("audit_disagreements", &[]).unwrap_or(0),
            audit_age: text.one("audit_age_seconds").map(count),
            heartbeat_age: text.of("heartbeat_age_seconds").map(|sample| sample.count()).max(),
            drift_events: text.sum("drift_events_total", &[]).unwrap_or(0),
            repairs: by("repairs_total", &["outcome"]),
            bytes: by("bytes_total", &["scope", "direction"]),
            dropped: text.sum("dropped_packets_total", &[]),
            refused: text.sum("connection_attempts_total", &[("verdict", "denied")]),
            started: text.one("start_time_seconds").map(count),
            resident_bytes: text.one("resident_memory_bytes").map(count),
        })
    }

    /// Differences, without what is listed only.
    pub fn differences(&self) -> impl Iterator<Item = &Found> {
        self.findings.iter().filter(|found| !found.is_info())
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// Metrics as a daemon in good health writes them, with further lines.
    pub(crate) fn text(node: &str, verdict: u64, more: &str) -> String {
        format!(
            "spokeguard_build_info{{version=\"0.1.0\",abi=\"7\"}} 1\n\
             spokeguard_policy_info{{node=\"{node}\",role=\"spoke\",mode=\"enforce\",hash=\"00ff\"}} 1\n\
             spokeguard_start_time_seconds 1700000000\nspokeguard_verdict {verdict}\n\
             spokeguard_blind{{facet=\"nftables\"}} 0\nspokeguard_control_enforced{{control=\"firewall\"}} 1\n\
             spokeguard_wireguard_handshake_age_seconds{{peer=\"hub\"}} 12\n\
             spokeguard_audit_exposed_ports{{family=\"ipv4\",proto=\"tcp\"}} 0\nspokeguard_audit_age_seconds 60\n\
             spokeguard_bytes_total{{scope=\"public\",direction=\"in\",family=\"ipv4\",proto=\"tcp\",service=\"https\"}} 700\n\
             spokeguard_bytes_total{{scope=\"public\",direction=\"in\",family=\"ipv6\",proto=\"tcp\",service=\"https\"}} 300\n{more}"
        )
    }

    pub(crate) fn vitals(node: &str, verdict: u64, more: &str) -> Vitals {
        Vitals::of(&Exposition::parse(&text(node, verdict, more)).unwrap()).unwrap()
    }

    #[test]
    fn a_node_in_good_health() {
        let read = vitals("oslo", 0, "");
        assert_eq!((read.node.as_str(), read.policy.as_str(), read.verdict), ("oslo", "00ff", Verdict::Ok));
        assert_eq!((read.handshake_age, read.exposed, read.audit_age), (Some(12), Some(0), Some(60)));
        assert_eq!(read.bytes.get("public in"), Some(&1000));
        assert!(read.findings.is_empty() && read.blind.is_empty() && read.unproven.is_empty());
        assert_eq!(read.dropped, None, "blind is not 0");
    }

    #[test]
    fn the_worst_finding_comes_first_and_info_is_no_difference() {
        let more = "spokeguard_findings{code=\"file-mode\",severity=\"medium\"} 1\n\
                    spokeguard_findings{code=\"listener-exposed\",severity=\"critical\"} 2\n\
                    spokeguard_findings{code=\"listener-wide\",severity=\"info\"} 4\n\
                    spokeguard_findings{code=\"ssh-bind\",severity=\"high\"} 0\n\
                    spokeguard_blind{facet=\"sshd\"} 1\nspokeguard_control_enforced{control=\"guard\"} 0\n";
        let read = vitals("oslo", 1, more);
        let codes: Vec<&str> = read.findings.iter().map(|found| found.code.as_str()).collect();
        assert_eq!(codes, ["listener-exposed", "file-mode", "listener-wide"]);
        assert_eq!(read.differences().count(), 2);
        assert_eq!((read.blind, read.unproven), (vec!["sshd".to_owned()], vec!["guard".to_owned()]));
    }

    #[test]
    fn without_a_verdict_it_is_nobody_of_ours() {
        let other = Exposition::parse("up 1\n").unwrap();
        assert!(Vitals::of(&other).unwrap_err().contains("no verdict"));
        let odd = Exposition::parse("spokeguard_verdict 3\n").unwrap();
        assert!(Vitals::of(&odd).is_err());
    }
}
