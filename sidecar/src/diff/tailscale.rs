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
        super::mesh_filter::compare(sight, found, out);
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
    use ipnet::IpNet;

    use super::*;
    use crate::diff::stage::{NOW, Stage, ip};
    use crate::observed::{Facet, FilterRule, MeshFilter, Reading};
    use crate::policy::MeshKind;
    use crate::terms::{Proto, Stamp};

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

    /// One rule for each (sources, first and last port), to this node.
    fn filter(rules: &[(&str, u16, u16)], protos: &[Proto]) -> MeshFilter {
        let set = |text: &str| text.split(' ').map(|net| net.parse::<IpNet>().expect("a prefix")).collect();
        let rule = |(from, first, last): &(&str, u16, u16)| FilterRule {
            from: set(from),
            to: set("10.84.0.16/32"),
            protos: protos.to_vec(),
            ports: (*first, *last),
        };
        MeshFilter::Rules(rules.iter().map(rule).collect())
    }

    #[test]
    fn a_filter_that_lets_in_more_is_told_and_matters_where_nothing_else_refuses() {
        let tcp = &[Proto::Tcp][..];
        let of = |filter: &MeshFilter| {
            let mut stage = stage(|t| t.filter = filter.clone());
            stage = stage.policy(|p| p.public.tcp = vec![crate::desired::samples::port(80)]);
            stage
        };
        let found = |filter: &MeshFilter| {
            let assessment = of(filter).assess();
            let finding = assessment.findings.into_iter().find(|f| f.code == Code::MeshFilter);
            finding.map(|finding| (finding.severity, finding.found))
        };
        let hub = "10.84.0.1/32";
        for fine in [
            filter(&[(hub, 22, 22), ("10.84.0.0/24", 80, 80)], tcp),
            filter(&[("192.0.2.0/24", 0, 65535)], tcp),
            filter(&[], tcp),
            MeshFilter::NotOffered,
        ] {
            assert_eq!(found(&fine), None, "{fine:?}");
        }
        let wide = filter(&[(hub, 22, 22), ("10.84.0.0/24 192.0.2.0/24", 79, 81)], tcp);
        let text = "it lets in tcp 79 from 10.84.0.0/24 and tcp 81 from 10.84.0.0/24".to_owned();
        assert_eq!(found(&wide), Some((Severity::Info, text.clone())));
        let audit = of(&wide).policy(|p| p.enforce.mode = crate::policy::Mode::Audit).assess();
        let finding = audit.findings.iter().find(|f| f.code == Code::MeshFilter).expect("one");
        assert_eq!((finding.severity, &finding.found), (Severity::Medium, &text));
        let all = found(&filter(&[("0.0.0.0/0", 0, 65535)], &Proto::ALL));
        let text = "it lets in tcp 1-79 from 10.84.0.0/24, tcp 81-19998 from 10.84.0.0/24, tcp 20000-65535 from \
                    10.84.0.0/24 and udp 1-65535 from 10.84.0.0/24";
        assert_eq!(all, Some((Severity::Info, text.into())));
        let unread = found(&MeshFilter::Unread("it is no JSON".into()));
        assert_eq!(unread, Some((Severity::Info, "it can't be compared: it is no JSON".into())));
        // Rules for another node say nothing of this one.
        let MeshFilter::Rules(mut rules) = wide else { unreachable!() };
        rules.iter_mut().for_each(|rule| rule.to = ip("10.84.0.99").into());
        assert_eq!(found(&MeshFilter::Rules(rules)), None);
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
