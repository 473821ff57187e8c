//! What `break-glass open` has opened: accepted for as long as the kernel keeps it.

use super::{Assessment, Code, Finding, Severity};
use crate::desired::TABLE;
use crate::observed::{Reading, Snapshot};
use crate::ruleset::glass::{self, Opening};
use crate::ruleset::{Ruleset, TableFamily};
use crate::terms::Stamp;

/// The openings that the last look saw; none where nftables could not be read.
pub fn openings(snapshot: &Snapshot) -> Vec<Opening> {
    openings_in(&snapshot.nftables)
}

pub fn openings_in(rules: &Reading<Ruleset>) -> Vec<Opening> {
    let table = rules.seen().and_then(|rules| rules.table(TableFamily::Inet, TABLE));
    table.map(glass::openings).unwrap_or_default()
}

pub(super) fn compare(openings: &[Opening], now: Stamp, out: &mut Assessment) {
    for opening in openings {
        let Opening { proto, port, owner, reason, began, .. } = opening;
        let ends = opening.ends(now);
        let udp = if proto.name() == "udp" { "/udp" } else { "" };
        let mut finding = Finding::new(
            Code::BreakGlassOpen,
            Severity::Info,
            opening,
            "closed by the policy",
            format!("open until {} by {owner}, since {}: {reason}", seconds(ends), seconds(*began)),
            format!(
                "Nothing: the kernel closes it by itself. `spokeguard break-glass close {port}{udp}` does it now."
            ),
        );
        finding.accepted = true;
        finding.since = Some(*began);
        out.add(finding);
    }
}

/// RFC 3339 without fractions, which the mark does not know.
pub fn seconds(at: Stamp) -> String {
    format!("{:.0}", at.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::diff::stage::{Stage, now};
    use crate::ruleset::Timed;
    use crate::terms::Proto;
    use expect_test::expect;

    fn stage(from: &'static str) -> Stage {
        let mut stage = Stage::spoke();
        stage.ours = match from {
            "0.0.0.0/0" => |table| Some(opened(table, "0.0.0.0/0")),
            _ => |table| Some(opened(table, "192.0.2.0/24")),
        };
        stage
    }

    fn opened(mut table: crate::ruleset::Table, from: &str) -> crate::ruleset::Table {
        let opening = Opening {
            proto: Proto::Tcp,
            port: crate::diff::stage::port(2222),
            from: from.parse().expect("a prefix"),
            owner: "alice".into(),
            reason: "the mesh is down".into(),
            began: Stamp::from_unix(now().0.as_second() - 300),
            lasts_s: 900,
            left_s: 600,
        };
        let (set, key) = opening.element();
        let set = table.sets.iter_mut().find(|s| s.name == set).expect("declared");
        set.elements.push(key);
        set.timed.push(Timed { timeout_s: 900, expires_s: 600, comment: Some(opening.comment()) });
        table
    }

    #[test]
    fn an_opening_is_accepted_with_its_owner_and_end_and_is_no_drift() {
        let findings = stage("192.0.2.0/24").assess().findings;
        assert!(findings.iter().all(|f| f.accepted) && findings.len() == 1, "{findings:?}");
        expect![[r#"
            info break-glass-open tcp/2222 from 192.0.2.0/24
                wanted closed by the policy
                found open until 2026-11-21T08:37:03Z by alice, since 2026-11-21T08:22:03Z: the mesh is down
        "#]]
        .assert_eq(&stage("192.0.2.0/24").show());
    }

    #[test]
    fn who_is_let_in_by_it_is_no_exposure_and_others_still_are() {
        let listens =
            |stage: Stage| stage.listens("tcp 0.0.0.0:2222 sshd").listens("tcp 0.0.0.0:5432 db").codes();
        let closed = listens(Stage::spoke());
        assert!(closed.iter().any(|c| c.contains("listener-wide tcp/0.0.0.0:2222")), "{closed:?}");
        for from in ["192.0.2.0/24", "0.0.0.0/0"] {
            let codes = listens(stage(from));
            assert!(!codes.iter().any(|c| c.contains("0.0.0.0:2222")), "{codes:?}");
            assert!(codes.iter().any(|c| c.contains("listener-wide tcp/0.0.0.0:5432")), "{codes:?}");
            assert!(!codes.iter().any(|c| c.contains("firewall-changed")), "{codes:?}");
        }
    }

    #[test]
    fn an_element_without_our_mark_is_drift() {
        let mut stage = Stage::spoke();
        stage.ours = |table| {
            let mut table = opened(table, "192.0.2.0/24");
            table.sets.iter_mut().flat_map(|s| &mut s.timed).for_each(|t| t.comment = None);
            Some(table)
        };
        assert_eq!(stage.codes(), ["high firewall-changed table inet spokeguard"]);
    }
}
