//! Which series there are. Decided from the policy alone, so that no traffic, no peer and
//! no finding can add one: what has no series of its own is folded into a neighbour that has.
//!
//! Services get series of their own in the order of the policy for as long as the budget
//! lasts; the ones after that count as `service="other"`. What the services leave over
//! goes to WireGuard peers.

use std::collections::{BTreeMap, BTreeSet};

use jiff::civil::Date;

use crate::desired::{Desired, Service};
use crate::heartbeat::Outcome;
use crate::observed::{Amount, AttemptKey, CountedProto, Direction, Facet, TrafficKey};
use crate::policy::{Exception, Heartbeat, MeshKind, Role};
use crate::repair::ActionKind;
use crate::terms::{Family, Proto, PublicKey, Scope};

use super::{Control, RepairOutcome, TOLD};

/// The contract's bound on all samples of one exposition together.
pub const SERIES_MAX: usize = 150;
/// Pairs of code and severity that are told apart, see `folded_findings`, and ports that strangers get in
/// at, which take from the same: see `divided`.
pub(super) const TOLD_MAX: usize = 8;
/// So many ports are told at least, however many kinds of findings there are: what is left are the severities.
const EXPOSED_MIN: usize = 3;
/// Pairs at most.
const FINDINGS_MAX: usize = 7;
/// `audit_exposed_ports` for two families and two protocols, `audit_disagreements` and
/// `audit_age_seconds`.
const AUDIT: usize = 6;
/// Series without labels, and the two info metrics: build, policy, start time, verdict, since
/// when is counted, accepted findings, rules on trial, refused binds, cycle seconds, cycles, resident and BPF
/// memory, refused connections.
const SINGLE: usize = 13;
/// What is open, until when, and what came in by it.
const BREAK_GLASS: usize = 3;
/// Exceptions with a series: those that end next. One is there in any case.
const EXCEPTIONS_MAX: usize = 2;
/// As many as there are reasons to drop, on two families each.
const RULES_MAX: usize = 9;
/// Peers with series of their own at most, and the `overflow` peer.
const PEERS_MAX: usize = 11;
/// Labels for peers that are there in any case.
const PEERS_MIN: usize = 2;
pub(super) const OTHER: &str = "other";
const ANY: &str = "any";

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    /// By class number: the label in traffic series, where the service has its own.
    named: Vec<Option<Named>>,
    /// Families that the mesh has addresses in. The other one sees no service of ours.
    mesh_families: BTreeSet<Family>,
    /// Whether any interface can be of scope `other` under this policy.
    other_scope: bool,
    /// Drop counters of the table. Reasons beyond the bound, by name, fold into `other`.
    drops: BTreeMap<(String, Family), DropLabel>,
    /// The facet of the mesh's kind.
    mesh: Facet,
    /// Labels for peers, `overflow` included. 0 where no WireGuard is read.
    pub(super) peers: usize,
    pub(super) hub: Option<PublicKey>,
    /// When the exceptions that end next do so, in Unix time.
    pub(super) exceptions: BTreeMap<String, u64>,
    /// Of the heartbeat.
    heartbeat: usize,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Named {
    label: String,
    scope: Scope,
    proto: Proto,
    /// Anyone may reach it, so that nobody is refused.
    open: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum DropLabel {
    Own,
    Other,
}

impl DropLabel {
    fn of(self, rule: &str) -> &str {
        match self {
            DropLabel::Own => rule,
            DropLabel::Other => OTHER,
        }
    }
}

/// The labels of one cell of `packets_total` and `bytes_total`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct TrafficLabels<'a> {
    pub(super) scope: Scope,
    pub(super) direction: Direction,
    pub(super) family: Family,
    pub(super) proto: &'static str,
    pub(super) service: &'a str,
}

/// The labels of one cell of `connection_attempts_total`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct AttemptLabels<'a> {
    pub(super) service: &'a str,
    pub(super) family: Family,
    pub(super) allowed: bool,
}

/// Outcomes of beats and their age; outcomes of notices, those that wait, and those given up; the end of the
/// certificate, which is looked at for all of them.
fn heartbeat(policy: &Heartbeat) -> usize {
    let Heartbeat { kuma_url_file, ntfy_url_file, status_file, .. } = policy;
    let kuma = kuma_url_file.as_ref().map_or(0, |_| Outcome::ALL.len() + 1);
    let ntfy = ntfy_url_file.as_ref().map_or(0, |_| Outcome::ALL.len() + 2);
    kuma + ntfy + usize::from(kuma + ntfy > 0 || status_file.is_some())
}

impl Layout {
    pub fn new(desired: &Desired) -> Self {
        let policy = &desired.policy;
        let counters = desired.table.iter().flat_map(|table| table.counters.keys());
        let counted: BTreeSet<(&str, Family)> = counters.filter_map(|name| drop_counter(name)).collect();
        let rules: BTreeSet<&str> = counted.iter().map(|(rule, _)| *rule).collect();
        let kept = if rules.len() > RULES_MAX { RULES_MAX - 1 } else { rules.len() };
        let folded: BTreeSet<&str> = rules.into_iter().skip(kept).collect();
        let drops = counted.into_iter().map(|(rule, family)| {
            let label = if folded.contains(rule) { DropLabel::Other } else { DropLabel::Own };
            ((rule.to_owned(), family), label)
        });
        let wireguard = policy.mesh.kind == MeshKind::Wireguard;
        let mut layout = Self {
            named: vec![None; desired.services.len()],
            mesh_families: policy.mesh.prefix.iter().map(Family::of_net).collect(),
            other_scope: !policy.locals.is_empty() || policy.public.interfaces.is_some(),
            drops: drops.collect(),
            mesh: if wireguard { Facet::Wireguard } else { Facet::Tailscale },
            peers: match (wireguard, policy.node.role) {
                (false, _) => 0,
                (true, Role::Hub) => 4,
                (true, Role::Spoke | Role::Device) => PEERS_MIN,
            },
            hub: policy.mesh.hub.as_ref().and_then(|hub| hub.public_key),
            exceptions: next_ends(&policy.exceptions, desired.today),
            heartbeat: heartbeat(&policy.heartbeat),
        };
        layout.give_way();
        for class in 0..desired.services.len() {
            let Some(named) = layout.candidate(&desired.services[class]) else { continue };
            layout.named[class] = Some(named);
            if layout.series_max() > SERIES_MAX {
                layout.named[class] = None;
                break;
            }
        }
        if wireguard {
            layout.peers =
                (layout.peers + SERIES_MAX.saturating_sub(layout.series_max()) / 2).min(PEERS_MAX + 1);
        }
        layout
    }

    /// The facets that have series.
    pub(super) fn told(&self) -> impl Iterator<Item = Facet> {
        TOLD.into_iter().chain([self.mesh])
    }

    /// The most series that an exposition of this layout can have.
    pub fn series_max(&self) -> usize {
        SINGLE
            + self.told().count() * 2
            + Control::ALL.len()
            + ActionKind::ALL.len() * RepairOutcome::ALL.len()
            + TOLD_MAX
            + AUDIT
            + BREAK_GLASS
            + self.exceptions.len()
            + self.heartbeat
            + self.peers * 2
            + self.drops().len()
            + self.traffic().len() * 2
            + self.attempts().len()
    }

    /// Where a policy has so much that not even its sums fit, the least of it goes.
    fn give_way(&mut self) {
        while self.series_max() > SERIES_MAX {
            let last = self.exceptions.iter().max_by_key(|(_, end)| **end).map(|(name, _)| name.clone());
            if self.peers > PEERS_MIN {
                self.peers -= 1;
            } else if let Some(last) = last.filter(|_| self.exceptions.len() > 1) {
                self.exceptions.remove(&last);
            } else {
                return;
            }
        }
    }

    /// A service that may have series of its own, if the budget allows. Ports of a LAN may
    /// not: scope `other` is counted in one sum for each direction and family.
    fn candidate(&self, service: &Service) -> Option<Named> {
        let reserved = service.name == OTHER || service.name == ANY;
        (service.scope != Scope::Other && !reserved).then(|| Named {
            label: service.name.clone(),
            scope: service.scope,
            proto: service.proto,
            open: service.scope == Scope::Public && service.from.is_none(),
        })
    }

    fn name(&self, class: Option<u16>) -> Option<&Named> {
        self.named.get(usize::from(class?))?.as_ref()
    }

    fn in_use(&self, scope: Scope, family: Family) -> bool {
        match scope {
            Scope::Public => true,
            Scope::Mesh => self.mesh_families.contains(&family),
            Scope::Other => false,
        }
    }

    /// The cell that a count belongs to.
    pub(super) fn traffic_cell(&self, key: &TrafficKey) -> TrafficLabels<'_> {
        let TrafficKey { scope, direction, family, proto, class } = *key;
        let (proto, service) = match proto {
            _ if !self.in_use(scope, family) => (ANY, ANY),
            CountedProto::Icmp | CountedProto::Other => (OTHER, OTHER),
            CountedProto::Tcp | CountedProto::Udp => {
                let named = self.name(class).filter(|n| n.scope == scope && n.proto.name() == proto.name());
                (proto.name(), named.map_or(OTHER, |n| &n.label))
            }
        };
        TrafficLabels { scope, direction, family, proto, service }
    }

    pub(super) fn attempt_cell(&self, key: &AttemptKey) -> AttemptLabels<'_> {
        let AttemptKey { class, family, allowed } = *key;
        let named = self.name(class).filter(|n| n.proto == Proto::Tcp).filter(|n| match allowed {
            true => self.in_use(n.scope, family),
            false => !n.open,
        });
        AttemptLabels { service: named.map_or(OTHER, |n| &n.label), family, allowed }
    }

    /// Every cell there is, at 0: what the key of any possible count folds into.
    pub(super) fn traffic(&self) -> BTreeMap<TrafficLabels<'_>, Amount> {
        let mut cells = BTreeMap::new();
        for (scope, direction, family) in Scope::ALL.into_iter().flat_map(|scope| {
            Direction::ALL.into_iter().flat_map(move |d| Family::ALL.into_iter().map(move |f| (scope, d, f)))
        }) {
            if scope == Scope::Other && !self.other_scope {
                continue;
            }
            for proto in CountedProto::ALL {
                for class in self.classes() {
                    let key = TrafficKey { scope, direction, family, proto, class };
                    cells.insert(self.traffic_cell(&key), Amount::default());
                }
            }
        }
        cells
    }

    pub(super) fn attempts(&self) -> BTreeMap<AttemptLabels<'_>, u64> {
        let mut cells = BTreeMap::new();
        for class in self.classes() {
            for family in Family::ALL {
                for allowed in [true, false] {
                    cells.insert(self.attempt_cell(&AttemptKey { class, family, allowed }), 0);
                }
            }
        }
        cells
    }

    fn classes(&self) -> impl Iterator<Item = Option<u16>> {
        std::iter::once(None).chain((0..self.named.len()).filter_map(|n| u16::try_from(n).ok()).map(Some))
    }

    /// The labels of a drop counter; one that this layout does not know has none.
    pub(super) fn drop_cell(&self, counter: &str) -> Option<(&str, Family)> {
        let (rule, family) = drop_counter(counter)?;
        let ((rule, family), label) = self.drops.get_key_value(&(rule.to_owned(), family))?;
        Some((label.of(rule), *family))
    }

    pub(super) fn drops(&self) -> BTreeMap<(&str, Family), u64> {
        self.drops.iter().map(|((rule, family), label)| ((label.of(rule), *family), 0)).collect()
    }
}

/// One that is over is a finding, and makes room for the next.
fn next_ends(exceptions: &[Exception], today: Date) -> BTreeMap<String, u64> {
    let standing = exceptions.iter().filter(|exception| exception.holds_on(today));
    let mut by_end: Vec<(u64, &str)> =
        standing.filter_map(|exception| Some((exception.ends()?, exception.name.as_str()))).collect();
    by_end.sort_unstable();
    by_end.into_iter().take(EXCEPTIONS_MAX).map(|(end, name)| (name.to_owned(), end)).collect()
}

/// How many pairs of code and severity, and how many open ports are told of so many.
pub(super) fn divided(findings: usize, exposed: usize) -> (usize, usize) {
    let exposed = exposed.min(TOLD_MAX.saturating_sub(findings).max(EXPOSED_MIN));
    (FINDINGS_MAX.min(TOLD_MAX - exposed), exposed)
}

/// `drop-REASON-FAMILY`, as the table names its counters.
fn drop_counter(name: &str) -> Option<(&str, Family)> {
    let (rule, family) = name.strip_prefix("drop-")?.rsplit_once('-')?;
    let family = Family::ALL.into_iter().find(|f| f.name() == family)?;
    (!rule.is_empty()).then_some((rule, family))
}
