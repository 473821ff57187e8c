//! What tailscaled says of itself, against the policy: logged in, with our addresses and
//! tags, a key that lasts, and no second way in that the policy does not speak of.

use std::collections::BTreeSet;

use super::sight::Sight;
use super::{Assessment, Code, Finding, Severity, lasting, listed};
use crate::observed::{Snapshot, Tailscaled};

/// A key that ends within this needs somebody to log in again.
const EXPIRY_SOON_S: u64 = 14 * 24 * 3600;

pub(super) fn compare(sight: &Sight, snapshot: &Snapshot, out: &mut Assessment) {
    let Some(Some(found)) = snapshot.tailscale.seen() else { return };
    if found.state == "Running" {
        addresses(sight, found, out);
        tags(sight, found, out);
    } else {
        missing(found, out);
    }
    key(sight, found, out);
    ways_in(sight, found, out);
}

fn missing(found: &Tailscaled, out: &mut Assessment) {
    let health = match found.health.first() {
        Some(first) => format!(": {first}"),
        None => String::new(),
    };
    out.add(Finding::new(
        Code::MeshMissing,
        Severity::High,
        "tailscaled",
        "running and logged in",
        format!("its state is {}{health}", found.state),
        match found.state.as_str() {
            "Stopped" => "Bring it up with `tailscale up`, and find out who took it down.",
            "NeedsMachineAuth" => "Approve this machine in the Tailscale console.",
            "Starting" => "Wait a moment; if it stays so, see `tailscale status` and its log.",
            _ => "Log in with `tailscale up`, and see `tailscale status`.",
        },
    ));
}

fn addresses(sight: &Sight, found: &Tailscaled, out: &mut Assessment) {
    for address in sight.policy.mesh.address.iter().filter(|a| !found.addresses.contains(a)) {
        let own: Vec<String> = found.addresses.iter().map(ToString::to_string).collect();
        let has = if own.is_empty() { "none".to_owned() } else { listed(&own, 3) };
        out.add(Finding::new(
            Code::MeshAddress,
            Severity::High,
            format!("tailscale address {address}"),
            "assigned to this node",
            format!("it was assigned {has}"),
            "Correct [mesh] address, or give the node its address again in the Tailscale console.",
        ));
    }
}

fn tags(sight: &Sight, found: &Tailscaled, out: &mut Assessment) {
    let wanted: BTreeSet<&String> = sight.policy.mesh.tags.iter().collect();
    let there: BTreeSet<&String> = found.tags.iter().collect();
    if wanted.is_empty() || wanted == there {
        return;
    }
    let list = |tags: &BTreeSet<&String>| {
        let tags: Vec<String> = tags.iter().map(ToString::to_string).collect();
        if tags.is_empty() { "no tags".to_owned() } else { listed(&tags, 4) }
    };
    out.add(Finding::new(
        Code::MeshTags,
        Severity::Medium,
        "tailscale tags",
        list(&wanted),
        list(&there),
        "Who reaches this node hangs on its tags: set them in the console, or correct [mesh] tags.",
    ));
}

fn key(sight: &Sight, found: &Tailscaled, out: &mut Assessment) {
    let left = found.key_expiry.map(|expiry| expiry.seconds_since(sight.now));
    let (severity, text) = match left {
        _ if found.expired => (Severity::High, "it has expired".to_owned()),
        Some(0) => (Severity::High, "it has expired".to_owned()),
        Some(left) if left < EXPIRY_SOON_S => (Severity::Medium, format!("it expires in {}", lasting(left))),
        _ => return,
    };
    out.add(Finding::new(
        Code::MeshKeyExpiry,
        severity,
        "tailscale node key",
        "a key that lasts",
        text,
        "Log in again (`tailscale up --force-reauth`), or turn key expiry off for this node in the console.",
    ));
}

fn ways_in(sight: &Sight, found: &Tailscaled, out: &mut Assessment) {
    if found.ssh && !sight.policy.mesh.tailscale_ssh {
        out.add(Finding::new(
            Code::TailscaleSsh,
            Severity::Medium,
            "tailscale ssh",
            "off: sshd alone lets people in",
            "tailscaled serves ssh itself, to whom the tailnet's policy file says",
            "Turn it off (`tailscale set --ssh=false`), or say tailscale_ssh = true in [mesh].",
        ));
    }
    if found.shields_up {
        out.add(Finding::new(
            Code::MeshMissing,
            Severity::High,
            "tailscale shields-up",
            "connections from the mesh come in",
            "tailscaled refuses every one of them",
            "Turn it off (`tailscale set --shields-up=false`): nobody reaches sshd through the mesh.",
        ));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::diff::stage::{NOW, Stage, ip};
    use crate::observed::{Facet, Reading};
    use crate::policy::MeshKind;
    use crate::terms::Stamp;

    fn stage(change: impl FnOnce(&mut Tailscaled)) -> Stage {
        let mut found = Tailscaled {
            state: "Running".into(),
            addresses: vec![ip("10.84.0.16"), ip("fd84::16")],
            tags: vec!["tag:server".into()],
            ..Tailscaled::default()
        };
        change(&mut found);
        let mut stage = Stage::spoke().policy(|policy| {
            policy.mesh.kind = MeshKind::Tailscale;
            policy.mesh.keepalive = None;
            policy.mesh.tags = vec!["tag:server".into()];
        });
        stage.snapshot.tailscale = Reading::Seen(Some(found));
        stage
    }

    fn soon(seconds: i64) -> Option<Stamp> {
        Some(Stamp::from_unix(NOW + seconds))
    }

    #[test]
    fn a_node_that_is_as_its_policy_says_is_fine() {
        assert_eq!(stage(|_| {}).codes(), [""; 0]);
        assert_eq!(stage(|t| t.key_expiry = soon(100 * 24 * 3600)).codes(), [""; 0]);
        assert_eq!(stage(|t| t.ssh = true).policy(|p| p.mesh.tailscale_ssh = true).codes(), [""; 0]);
        assert_eq!(stage(|t| t.tags.clear()).policy(|p| p.mesh.tags.clear()).codes(), [""; 0]);
    }

    type Change = fn(&mut Tailscaled);

    #[test]
    fn each_difference_is_told_once() {
        let cases: [(Change, &str); 8] = [
            (|t| t.state = "NeedsLogin".into(), "high mesh-missing tailscaled"),
            (
                |t| t.addresses = vec![ip("100.64.0.9"), ip("fd84::16")],
                "high mesh-address tailscale address 10.84.0.16",
            ),
            (|t| t.tags = vec!["tag:other".into()], "medium mesh-tags tailscale tags"),
            (|t| t.key_expiry = soon(3 * 24 * 3600), "medium mesh-key-expiry tailscale node key"),
            (|t| t.key_expiry = soon(-5), "high mesh-key-expiry tailscale node key"),
            (|t| t.expired = true, "high mesh-key-expiry tailscale node key"),
            (|t| t.ssh = true, "medium tailscale-ssh tailscale ssh"),
            (|t| t.shields_up = true, "high mesh-missing tailscale shields-up"),
        ];
        for (change, wanted) in cases {
            assert_eq!(stage(change).codes(), [wanted]);
        }
    }

    #[test]
    fn blindness_is_never_fine_on_a_tailscale_node_and_no_matter_on_others() {
        let needed = |stage: Stage| {
            crate::diff::needed(
                &crate::desired::Desired::new(stage.policy, crate::desired::samples::TODAY).expect("a path"),
            )
        };
        assert!(needed(stage(|_| {})).contains(&Facet::Tailscale));
        assert!(!needed(Stage::spoke()).contains(&Facet::Tailscale));
    }
}
