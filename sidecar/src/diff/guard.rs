//! The second layer: whether the tc guard holds the policy's rules, on every public
//! interface. One that can't be had here is no finding: nftables enforces without it.

use super::sight::Sight;
use super::{Assessment, Code, Finding, listed};
use crate::desired::guard::Side;
use crate::observed::{Guard, GuardState, Snapshot};

pub(super) fn compare(sight: &Sight<'_>, snapshot: &Snapshot, out: &mut Assessment) {
    let Some(rules) = &sight.desired.guard else { return };
    let found = match &snapshot.guard {
        Guard::Unavailable(_) => return,
        Guard::Absent => "it is not loaded".to_owned(),
        Guard::There { rules: GuardState::Idle, .. } => "it is loaded and lets everything pass".to_owned(),
        Guard::There { rules: GuardState::Other, .. } => "it holds other rules".to_owned(),
        Guard::There { attached, .. } => {
            let missing: Vec<&str> = (sight.all_links().iter())
                .filter(|link| !link.loopback && link.master.is_none())
                .map(|link| link.name.as_str())
                .filter(|name| rules.side(name) == Side::Public && !attached.iter().any(|on| on == name))
                .collect();
            if missing.is_empty() {
                return;
            }
            format!("not on {}", listed(&missing, 4))
        }
    };
    out.add(Finding::new(
        Code::GuardMissing,
        Code::GuardMissing.severity(),
        "tc guard",
        "the policy's rules, on every public interface",
        found,
        "Put it back with `spokeguard apply`, or keep `spokeguard run` going, which does it every 10 s.",
    ));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::diff::stage::{Stage, link};

    fn found(guard: Guard) -> Vec<String> {
        let mut stage = Stage::spoke();
        stage.snapshot.guard = guard;
        stage.links(|links| links.push(link(9, "docker0", &[]))).codes()
    }

    #[test]
    fn a_guard_that_is_not_as_declared_or_not_everywhere_is_told() {
        let on = |rules, names: &[&str]| Guard::There {
            rules,
            attached: names.iter().map(|name| (*name).to_owned()).collect(),
        };
        let missing = ["medium guard-missing tc guard"];
        let both = ["docker0", "eth0"];
        for guard in [
            Guard::Absent,
            on(GuardState::Idle, &both),
            on(GuardState::Other, &both),
            on(GuardState::Declared, &["eth0"]),
            on(GuardState::Declared, &["wg0", "lo"]),
        ] {
            assert_eq!(found(guard.clone()), missing, "{guard:?}");
        }
        for guard in [
            on(GuardState::Declared, &both),
            on(GuardState::Unconfirmed, &both),
            Guard::Unavailable("no bpffs".into()),
        ] {
            assert_eq!(found(guard.clone()), [""; 0], "{guard:?}");
        }
    }

    #[test]
    fn without_a_firewall_nobody_asks_for_a_guard() {
        let mut stage = Stage::spoke().policy(|p| p.enforce.firewall = false);
        stage.snapshot.guard = Guard::Absent;
        assert!(!stage.codes().iter().any(|code| code.contains("guard")));
    }
}
