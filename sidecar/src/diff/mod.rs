//! Desired x Snapshot -> findings, and the catalogue that `explain` prints. Pure: the
//! same values give the same findings, and nothing here can fail.
//!
//! One file per thing that is compared. Whether a stranger gets in is never read off a
//! socket's address or off our own table: [`sight`] lets a made-up packet run through
//! every table that was seen, and an answer that depends on something we do not
//! understand becomes a doubt, which keeps the verdict from being "ok".

use std::collections::BTreeMap;
use std::fmt::Display;

use serde::{Deserialize, Serialize};

use crate::desired::Desired;
use crate::observed::{Dispute, Facet, Snapshot};
use crate::policy::MeshKind;
use crate::terms::{Actor, Stamp, printable};

mod binds;
pub mod canary;
pub mod catalogue;
mod exceptions;
mod files;
pub mod firewall;
pub mod glass;
mod guard;
mod listeners;
pub(crate) mod mesh;
mod mesh_filter;
mod proof;
mod sight;
mod ssh;
#[cfg(test)]
pub(crate) mod stage;
mod tailscale;

pub use catalogue::{UnknownCode, explain};
pub use proof::Proof;
use sight::Sight;

/// Everything that differs, the worst first: by severity, then code, then subject.
pub fn findings(desired: &Desired, snapshot: &Snapshot, now: Stamp) -> Vec<Finding> {
    assess(desired, snapshot, now).findings
}

/// The findings, and what could not be decided although it was looked at.
pub fn assess(desired: &Desired, snapshot: &Snapshot, now: Stamp) -> Assessment {
    let mut out = Assessment::default();
    let openings = glass::openings(snapshot);
    let declared = desired;
    let with_openings = (!openings.is_empty()).then(|| desired.with_openings(&openings, now));
    let desired = with_openings.as_ref().unwrap_or(desired);
    let sight = Sight::new(desired, snapshot, now);
    firewall::compare(&sight, snapshot, &mut out);
    guard::compare(&sight, snapshot, &mut out);
    listeners::compare(&sight, snapshot, &mut out);
    ssh::compare(&sight, snapshot, &mut out);
    mesh::compare(&sight, snapshot, &mut out);
    tailscale::compare(&sight, snapshot, &mut out);
    proof::compare(&sight, snapshot, &mut out);
    exceptions::compare(declared, &mut out);
    glass::compare(&openings, now, &mut out);
    files::compare(desired, snapshot, &mut out);
    binds::compare(desired, snapshot, now, &mut out);
    unproven(desired, snapshot, &mut out);
    out.settle();
    out
}

/// The facets without which nothing can be said about this policy.
pub fn needed(desired: &Desired) -> Vec<Facet> {
    let policy = &desired.policy;
    Facet::ALL
        .into_iter()
        .filter(|facet| match facet {
            Facet::Nftables | Facet::Listeners | Facet::Links | Facet::Sshd => true,
            Facet::Counters | Facet::Audit => true,
            Facet::Wireguard => policy.mesh.kind == MeshKind::Wireguard,
            Facet::Tailscale => policy.mesh.kind == MeshKind::Tailscale,
            Facet::Files => !policy.files.is_empty(),
            // A second layer, not on every host to be had: its absence is a finding, and what
            // it would hold is looked at by other means.
            Facet::Binds => false,
        })
        .collect()
}

/// What a comparison comes to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Assessment {
    pub findings: Vec<Finding>,
    /// Questions that matter and have no answer although the facet was read: a rule that
    /// we do not understand stands in the way. Each makes the verdict unknown.
    pub doubts: Vec<(Facet, String)>,
    /// `None`: nobody has asked from outside.
    pub proof: Option<Proof>,
    /// What probes should ask once more before it is told, or before it decides.
    pub disputed: Vec<Dispute>,
}

/// More doubts than this say nothing new; the last one then counts the rest.
const DOUBTS_MAX: usize = 32;

impl Assessment {
    /// What the shell knows besides, such as how a change of the policy stands.
    pub fn extend(&mut self, findings: impl IntoIterator<Item = Finding>) {
        self.findings.extend(findings);
        self.settle();
    }

    fn add(&mut self, finding: Finding) {
        self.findings.push(finding);
    }

    fn doubt(&mut self, facet: Facet, text: impl AsRef<str>) {
        self.doubts.push((facet, printable(text.as_ref(), TEXT_MAX)));
    }

    /// Sorts, and leaves one finding per identity, the worst: eight workers of one server
    /// share an address by SO_REUSEPORT and are one finding.
    fn settle(&mut self) {
        let mut worst: BTreeMap<(Code, String), Finding> = BTreeMap::new();
        for finding in self.findings.drain(..) {
            let key = (finding.code, finding.subject.clone());
            match worst.get(&key) {
                Some(known) if known.severity <= finding.severity => {}
                _ => {
                    worst.insert(key, finding);
                }
            }
        }
        self.findings = worst.into_values().collect();
        self.findings.sort_by(|a, b| (a.severity, a.code, &a.subject).cmp(&(b.severity, b.code, &b.subject)));
        self.doubts.sort();
        self.doubts.dedup();
        if self.doubts.len() > DOUBTS_MAX {
            let more = self.doubts.len() - DOUBTS_MAX + 1;
            self.doubts.truncate(DOUBTS_MAX - 1);
            self.doubts.push((Facet::Nftables, format!("{more} more questions of this kind have no answer")));
        }
    }
}

/// What a finding about our table as a control is about.
pub const FIREWALL_CONTROL: &str = "control firewall";

/// A control that the policy asks for, and that we can't see working.
fn unproven(desired: &Desired, snapshot: &Snapshot, out: &mut Assessment) {
    let policy = &desired.policy;
    let keepalive = policy.enforce.keepalive
        && policy.mesh.kind == MeshKind::Wireguard
        && policy.mesh.keepalive.is_some();
    let controls = [
        (Facet::Binds, "control binds", policy.enforce.binds, "the bind guard in force"),
        (Facet::Nftables, FIREWALL_CONTROL, policy.enforce.firewall, "our table in force"),
        (Facet::Counters, "control counters", true, "packets counted by policy service"),
        (Facet::Wireguard, "control keepalive", keepalive, "the keepalive of the tunnel seen and kept"),
    ];
    for (facet, control, asked, wanted) in controls {
        let Some(gap) = snapshot.gap(facet).filter(|_| asked) else { continue };
        let next = match facet {
            Facet::Nftables if gap.late => {
                "See what changes the rules all the time (`nft monitor`), or how many there are; \
                 until then assume no firewall."
            }
            Facet::Nftables => {
                "Give spokeguard root or CAP_NET_ADMIN and the nft program; until then assume no firewall."
            }
            Facet::Counters => {
                "Give spokeguard CAP_BPF, CAP_NET_ADMIN and a bpffs; the rest works without it."
            }
            Facet::Binds => {
                "Mount cgroup2 and give spokeguard CAP_BPF and CAP_NET_ADMIN, or set [enforce] binds = false; \
                 the firewall holds without it."
            }
            _ => "Give spokeguard root or CAP_NET_ADMIN in the network namespace of the tunnel.",
        };
        let severity = if facet == Facet::Binds { Severity::Low } else { Severity::High };
        out.add(Finding::new(
            Code::ControlUnproven,
            severity,
            control,
            wanted,
            format!("could not be seen: {}", gap.reason),
            next,
        ));
    }
}

/// What kind of difference it is. Stable: scripts match on the kebab-case names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Code {
    FirewallMissing,
    FirewallChanged,
    FirewallBlocked,
    GuardMissing,
    ListenerExposed,
    ListenerWide,
    DnatExposed,
    SshBind,
    SshUnreachable,
    SshPassword,
    MeshMissing,
    MeshAddress,
    MeshKeepalive,
    MeshHandshake,
    MeshPeer,
    MeshEndpoint,
    MeshLeak,
    MeshTags,
    MeshKeyExpiry,
    TailscaleSsh,
    MeshFilter,
    ExceptionExpired,
    ExceptionOpen,
    BreakGlassOpen,
    FileMode,
    ControlUnproven,
    AuditExposed,
    BindRefused,
    PolicyRolledBack,
    PolicyNotLoaded,
    SealedRules,
    ProofDisagrees,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    Critical,
    High,
    Medium,
    Low,
    Info,
}

/// We looked, and it differs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    pub code: Code,
    pub severity: Severity,
    /// What it is about, stable for as long as the finding lasts: "tcp/0.0.0.0:5432",
    /// "table inet spokeguard", "peer hub (xTIB…)". Part of the finding's identity.
    pub subject: String,
    pub wanted: String,
    pub found: String,
    pub by: Option<Actor>,
    pub since: Option<Stamp>,
    /// Declared by the policy: listed, and never changes verdict or exit code.
    pub accepted: bool,
    /// What to do about it, one sentence.
    pub next: String,
    /// The facet it was read from.
    #[serde(skip)]
    pub facet: Option<Facet>,
}

/// Longest text of one field, in characters; what others wrote may be longer.
const TEXT_MAX: usize = 600;

impl Severity {
    pub const ALL: [Severity; 5] =
        [Severity::Critical, Severity::High, Severity::Medium, Severity::Low, Severity::Info];

    pub const fn name(self) -> &'static str {
        match self {
            Severity::Critical => "critical",
            Severity::High => "high",
            Severity::Medium => "medium",
            Severity::Low => "low",
            Severity::Info => "info",
        }
    }
}

impl Finding {
    /// Every text may quote a stranger (a process, a table, an address), so all of them
    /// are cleaned here.
    pub fn new(
        code: Code,
        severity: Severity,
        subject: impl Display,
        wanted: impl AsRef<str>,
        found: impl AsRef<str>,
        next: impl AsRef<str>,
    ) -> Self {
        Self {
            code,
            severity,
            subject: printable(&subject.to_string(), 200),
            wanted: printable(wanted.as_ref(), TEXT_MAX),
            found: printable(found.as_ref(), TEXT_MAX),
            by: None,
            since: None,
            accepted: false,
            next: printable(next.as_ref(), TEXT_MAX),
            facet: code.facets().first().copied(),
        }
    }

    pub(crate) fn held_by(mut self, owner: Option<&Actor>) -> Self {
        self.by = owner.cloned();
        self
    }

    /// Whether the host is not as the policy says because of it. What is accepted, and what is
    /// merely worth knowing, is listed and changes no verdict.
    pub fn is_drift(&self) -> bool {
        !self.accepted && self.severity != Severity::Info
    }

    /// Two findings with the same identity are the same finding at two moments.
    pub fn identity(&self) -> (Code, &str) {
        (self.code, &self.subject)
    }
}

/// "40 s", "7 min", "3 h 5 min", "12 d": for people.
pub(crate) fn lasting(seconds: u64) -> String {
    match seconds {
        0..=119 => format!("{seconds} s"),
        120..=7199 => format!("{} min", seconds / 60),
        7200..=172_799 if seconds % 3600 < 60 => format!("{} h", seconds / 3600),
        7200..=172_799 => format!("{} h {} min", seconds / 3600, seconds % 3600 / 60),
        _ => format!("{} d", seconds / 86_400),
    }
}

/// "a", "a and b", "a, b and c"; after `most`, how many more.
pub(crate) fn listed<T: Display>(items: &[T], most: usize) -> String {
    let mut texts: Vec<String> = items.iter().take(most).map(T::to_string).collect();
    if items.len() > most {
        texts.push(format!("{} more", items.len() - most));
    }
    match texts.split_last() {
        None => String::new(),
        Some((last, [])) => last.clone(),
        Some((last, rest)) => format!("{} and {last}", rest.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::stage::*;
    use super::*;

    #[test]
    fn the_worst_comes_first_and_the_order_is_always_the_same() {
        let stage = || {
            ["tcp 0.0.0.0:9999 b", "tcp 0.0.0.0:5432 a", "udp 0.0.0.0:161 c", "tcp 0.0.0.0:22 sshd"]
                .into_iter()
                .fold(Stage::spoke().foreign(publishes(6379)), Stage::listens)
                .policy(|p| p.exceptions.push(exception(2222, jiff::civil::date(2027, 1, 31))))
        };
        let mut turned = stage();
        turned.listeners().reverse();
        let codes = stage().codes();
        assert_eq!(codes, turned.codes());
        assert_eq!(
            codes,
            [
                "medium ssh-bind tcp/0.0.0.0:22",
                "low listener-wide tcp/0.0.0.0:5432",
                "low listener-wide tcp/0.0.0.0:9999",
                "low listener-wide udp/0.0.0.0:161",
                "low dnat-exposed tcp/6379 -> 172.17.0.2:6379",
                "info exception-open exception emergency-ssh",
            ]
        );
    }

    #[test]
    fn controls_that_can_not_be_seen_are_unproven_only_if_the_policy_asks_for_them() {
        let blind = || Stage::spoke().blind(Facet::Nftables).blind(Facet::Counters).blind(Facet::Wireguard);
        let unproven = |stage: Stage| -> Vec<String> {
            let findings = stage.assess().findings.into_iter();
            findings.filter(|f| f.code == Code::ControlUnproven).map(|f| f.subject).collect()
        };
        assert_eq!(unproven(blind()), ["control counters", "control firewall", "control keepalive"]);
        let modest = blind().policy(|p| (p.enforce.firewall, p.enforce.keepalive) = (false, false));
        assert_eq!(unproven(modest), ["control counters"]);
        assert_eq!(unproven(Stage::spoke()), [""; 0]);
    }

    #[test]
    fn a_hub_opens_its_tunnel_and_must_be_able_to() {
        use crate::policy::{Role, Sources};
        let hub = || {
            Stage::spoke()
                .policy(|p| {
                    p.node.role = Role::Hub;
                    p.mesh.hub = None;
                    p.mesh.keepalive = None;
                    p.mesh.listen_port = Some(port(51_820));
                    p.ssh.from = Sources::Prefixes(vec![net("10.84.0.7/32"), net("fd84::7/128")]);
                })
                .device(|d| d.listen_port = 51_820)
                .listens("udp 0.0.0.0:51820 -")
                .listens("udp [::]:51820 -")
        };
        assert_eq!(hub().codes(), [""; 0]);
        let udp = crate::ruleset::Match {
            left: crate::ruleset::Term::Meta("l4proto".into()),
            op: crate::ruleset::Op::Eq,
            right: crate::ruleset::Operand::Text("udp".into()),
        };
        use crate::ruleset::{Hook, Statement, TableFamily};
        let rule = vec![Statement::Match(udp), Statement::Reject { tcp_reset: false }];
        let shut = table(TableFamily::Ip6, "other", chain(Hook::Input, 5, false, vec![rule]));
        let stage = hub().foreign(shut);
        assert_eq!(
            stage.show(),
            "medium firewall-blocked wireguard udp/51820 ipv6\n    wanted reachable by anyone at \
             2001:db8:7::7 on eth0\n    found rejected by table ip6 other chain input\n"
        );
    }

    #[test]
    fn doubts_are_bounded() {
        let mut out = Assessment::default();
        for n in 0..1000 {
            out.doubt(Facet::Nftables, format!("question {n}"));
            out.doubt(Facet::Nftables, format!("question {n}"));
        }
        out.settle();
        assert_eq!(out.doubts.len(), DOUBTS_MAX);
        assert_eq!(out.doubts[DOUBTS_MAX - 1].1, "969 more questions of this kind have no answer");
    }

    #[test]
    fn texts_of_strangers_are_cleaned_and_cut() {
        let evil = "a\x1b[2J\u{202e}".repeat(1000);
        let finding = Finding::new(Code::ListenerWide, Severity::Low, &evil, &evil, &evil, &evil);
        for text in [&finding.subject, &finding.wanted, &finding.found, &finding.next] {
            assert!(!text.contains(['\x1b', '\u{202e}']) && text.chars().count() <= TEXT_MAX);
        }
    }

    #[test]
    fn lists_and_spans_read_as_people_say_them() {
        assert_eq!([listed::<u8>(&[], 3), listed(&[1], 3), listed(&[1, 2], 3)], ["", "1", "1 and 2"]);
        assert_eq!(listed(&[1, 2, 3, 4, 5], 3), "1, 2, 3 and 2 more");
        let spans = [0, 119, 120, 7199, 7200, 11_100, 172_800].map(lasting);
        assert_eq!(spans, ["0 s", "119 s", "2 min", "119 min", "2 h", "3 h 5 min", "2 d"]);
    }
}
