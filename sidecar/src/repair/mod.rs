//! Findings -> Plan: what the daemon or `apply` would do, as data, with an order and a
//! budget. Pure; `apply` interprets it.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::desired::Desired;
use crate::diff::{self, Code, Finding};
use crate::observed::Snapshot;
use crate::policy::Mode;
use crate::terms::PublicKey;

mod budget;

pub use budget::Budget;

/// What to do, in this order, and what is left undone because its budget is spent.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    pub actions: Vec<Action>,
    pub withheld: Vec<ActionKind>,
}

/// The firewall comes first: while it is away, ports are open. `now` is a monotonic clock's
/// reading, so that a clock set back can't refill or empty the budget.
///
/// In audit mode the table is still put in place, because it is the table that counts;
/// nothing else of the host is changed.
pub fn plan(
    desired: &Desired,
    findings: &[Finding],
    snapshot: &Snapshot,
    budget: &mut Budget,
    now: Duration,
) -> Plan {
    let policy = &desired.policy;
    let mut wanted: Vec<(ActionKind, Vec<Action>)> = Vec::new();
    if desired.table.is_some() && findings.iter().any(|f| repaired_by(f.code) == Some(ActionKind::ApplyTable))
    {
        wanted.push((ActionKind::ApplyTable, vec![Action::ApplyTable]));
    }
    let keepalive = policy.enforce.keepalive
        && policy.enforce.mode == Mode::Enforce
        && findings.iter().any(|f| repaired_by(f.code) == Some(ActionKind::SetKeepalive));
    if let (true, Some(Some(device)), Some(seconds)) =
        (keepalive, snapshot.wireguard.seen(), diff::mesh::keepalive_s(policy))
    {
        let set = diff::mesh::wrong_keepalive(policy, device).into_iter().map(|peer| Action::SetKeepalive {
            interface: policy.mesh.interface.clone(),
            peer: peer.public_key,
            seconds,
        });
        wanted.push((ActionKind::SetKeepalive, set.collect()));
    }
    let mut plan = Plan::default();
    for (kind, actions) in wanted.into_iter().filter(|(_, actions)| !actions.is_empty()) {
        // One token a round, however many peers it sets: it is rounds that show a fight.
        if budget.take(kind, now) {
            plan.actions.extend(actions);
        } else {
            plan.withheld.push(kind);
        }
    }
    plan
}

/// Says in the findings that their repair is withheld, because somebody undoes it as fast
/// as we make it: who, if the kernel named him, and how often of late.
pub fn tell_of_withheld(findings: &mut [Finding], plan: &Plan, budget: &Budget, now: Duration) {
    for finding in findings {
        let Some(kind) = repaired_by(finding.code).filter(|kind| plan.withheld.contains(kind)) else {
            continue;
        };
        let times = budget.in_last_minute(kind, now);
        let who = finding.by.as_ref().map_or("another program".to_owned(), |actor| actor.to_string());
        finding.found =
            format!("{}; {who} keeps undoing our repair ({times} in the last minute)", finding.found);
        finding.next = format!(
            "Stop {who} from changing it, then run `spokeguard apply`; until then we repair now and then only."
        );
    }
}

/// What puts right a finding of this kind, if we do.
pub fn repaired_by(code: Code) -> Option<ActionKind> {
    match code {
        Code::FirewallMissing | Code::FirewallChanged => Some(ActionKind::ApplyTable),
        Code::MeshKeepalive => Some(ActionKind::SetKeepalive),
        _ => None,
    }
}

/// One thing to do to the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Put our table in place, in one transaction.
    ApplyTable,
    /// Set the keepalive of one peer that exists.
    SetKeepalive { interface: String, peer: PublicKey, seconds: u16 },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ActionKind {
    ApplyTable,
    SetKeepalive,
}

impl ActionKind {
    pub const ALL: [ActionKind; 2] = [ActionKind::ApplyTable, ActionKind::SetKeepalive];
    pub const fn name(self) -> &'static str {
        match self {
            ActionKind::ApplyTable => "apply-table",
            ActionKind::SetKeepalive => "set-keepalive",
        }
    }
}

impl Action {
    pub fn kind(&self) -> ActionKind {
        match self {
            Action::ApplyTable => ActionKind::ApplyTable,
            Action::SetKeepalive { .. } => ActionKind::SetKeepalive,
        }
    }
}

/// What came of an action.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outcome {
    pub action: ActionKind,
    pub result: Ended,
    pub took: Duration,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Ended {
    Done,
    Failed(String),
    /// The budget is spent: someone undoes our repairs as fast as we make them.
    Withheld,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::diff::assess;
    use crate::diff::stage::{HUB_KEY, Stage, now, peer};
    use crate::terms::Actor;

    const AT: Duration = Duration::from_secs(7);

    fn planned(stage: Stage, budget: &mut Budget) -> Plan {
        let (desired, snapshot) = stage.set();
        let findings = assess(&desired, &snapshot, now()).findings;
        plan(&desired, &findings, &snapshot, budget, AT)
    }

    fn actions(stage: Stage) -> Vec<Action> {
        planned(stage, &mut Budget::default()).actions
    }

    fn keepalive_off(stage: Stage) -> Stage {
        stage.device(|d| d.peers[0].keepalive = 0)
    }

    fn set(peer: PublicKey) -> Action {
        Action::SetKeepalive { interface: "wg0".into(), peer, seconds: 25 }
    }

    #[test]
    fn the_firewall_is_repaired_first_and_then_the_keepalive() {
        assert_eq!(actions(Stage::spoke()), []);
        let both = keepalive_off(Stage::spoke().without_our_table());
        assert_eq!(actions(both), [Action::ApplyTable, set(HUB_KEY)]);
        assert_eq!(actions(keepalive_off(Stage::spoke())), [set(HUB_KEY)]);
        assert_eq!(actions(Stage::spoke().listens("tcp 0.0.0.0:5432 db")), [], "listeners are reported only");
    }

    #[test]
    fn every_peer_that_is_off_is_set_and_no_other() {
        let other = PublicKey([9; 32]);
        let two =
            Stage::spoke().policy(|p| p.mesh.hub.as_mut().expect("a hub").public_key = None).device(|d| {
                d.peers.push(peer(PublicKey([9; 32]), &["10.84.0.77/32"]));
                d.peers[1].keepalive = 90;
            });
        assert_eq!(actions(two), [set(other)]);
    }

    #[test]
    fn audit_mode_puts_its_counting_table_in_place_and_changes_nothing_else() {
        let audit =
            keepalive_off(Stage::spoke().without_our_table()).policy(|p| p.enforce.mode = Mode::Audit);
        assert_eq!(actions(audit), [Action::ApplyTable]);
    }

    #[test]
    fn what_the_policy_does_not_enforce_is_left_alone() {
        let off = || keepalive_off(Stage::spoke().without_our_table());
        assert_eq!(actions(off().policy(|p| p.enforce.firewall = false)), [set(HUB_KEY)]);
        assert_eq!(actions(off().policy(|p| p.enforce.keepalive = false)), [Action::ApplyTable]);
    }

    #[test]
    fn what_could_not_be_read_is_not_repaired() {
        use crate::observed::Facet;
        let blind = keepalive_off(Stage::spoke()).blind(Facet::Nftables).blind(Facet::Wireguard);
        assert_eq!(actions(blind), []);
    }

    #[test]
    fn a_fight_is_given_up_and_told_by_name() {
        let mut budget = Budget::default();
        let off = || keepalive_off(Stage::spoke().without_our_table());
        for _ in 0..10 {
            assert_eq!(planned(off(), &mut budget).withheld, []);
        }
        for _ in 10..120 {
            planned(off(), &mut budget);
        }
        let plan = planned(off(), &mut budget);
        assert_eq!((plan.actions.len(), plan.withheld.as_slice()), (0, ActionKind::ALL.as_slice()));

        let (desired, snapshot) = off().set();
        let mut findings = assess(&desired, &snapshot, now()).findings;
        findings[0].by = Some(Actor { pid: 4211, process: "nft".into(), unit: None, user: None });
        let untouched = findings.iter().find(|f| f.code == Code::MeshLeak).cloned();
        tell_of_withheld(&mut findings, &plan, &budget, AT);
        assert_eq!(
            findings[0].found,
            "there is no such table; nft (pid 4211) keeps undoing our repair (120 in the last minute)"
        );
        let keepalive = findings.iter().find(|f| f.code == Code::MeshKeepalive).expect("a finding");
        assert_eq!(
            keepalive.found,
            "keepalive off; another program keeps undoing our repair (10 in the last minute)"
        );
        assert_eq!(findings.iter().find(|f| f.code == Code::MeshLeak).cloned(), untouched);
    }
}
