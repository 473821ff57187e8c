//! What the bind guard refused, and whether it is there to refuse anything.

use std::net::SocketAddr;

use super::{Assessment, Code, Finding, Severity, lasting};
use crate::desired::Desired;
use crate::desired::binds::BindRules;
use crate::observed::{RefusedBind, Snapshot};
use crate::terms::{Proto, Stamp};

/// Seconds that a refusal stays a finding: longer than any service waits between tries.
const STANDS: u64 = 3600;
/// Refusals told one by one, the latest; the rest are summed up.
const TOLD_MAX: usize = 16;

pub(super) fn compare(desired: &Desired, snapshot: &Snapshot, now: Stamp, out: &mut Assessment) {
    let policy = &desired.policy;
    let Some(guard) = snapshot.binds.seen().filter(|guard| guard.loaded && policy.enforce.binds) else {
        return;
    };
    if guard.lifted || !guard.attached {
        let (found, next) = match guard.lifted {
            true => (
                "put aside by `spokeguard release --binds`",
                "Restart the daemon to put the bind guard in force again.",
            ),
            false => ("its programs are on no control group", "Restart the daemon, which attaches them."),
        };
        let wanted = "the bind guard in force";
        out.add(Finding::new(Code::ControlUnproven, Severity::Low, "control binds", wanted, found, next));
    }
    let rules = BindRules::new(desired, &[]);
    let mut fresh: Vec<&RefusedBind> =
        guard.refusals.iter().filter(|refusal| now.seconds_since(refusal.last) < STANDS).collect();
    fresh.sort_by_key(|refusal| std::cmp::Reverse((refusal.last, refusal.port)));
    for refusal in fresh.iter().take(TOLD_MAX) {
        out.add(tell(&rules, refusal, now));
    }
    if let Some(rest @ [first, ..]) = fresh.get(TOLD_MAX..) {
        let wanted = "binds as the policy allows them";
        let found = format!("{} more refused binds, one by {}", rest.len(), first.by);
        let next = "Look at the process named here first; `spokeguard explain bind-refused` tells the rest.";
        let severity = rest.iter().map(|refusal| severity(&rules, refusal)).min().unwrap_or(Severity::Medium);
        let finding = Finding::new(Code::BindRefused, severity, "further binds", wanted, found, next);
        out.add(finding.held_by(Some(&first.by)));
    }
}

fn severity(rules: &BindRules, refusal: &RefusedBind) -> Severity {
    match refusal.audited {
        true => Severity::Low,
        false if is_ssh(rules, refusal) => Severity::High,
        false => Severity::Medium,
    }
}

fn is_ssh(rules: &BindRules, refusal: &RefusedBind) -> bool {
    refusal.proto == Proto::Tcp && refusal.port == rules.ssh_port
}

fn tell(rules: &BindRules, refusal: &RefusedBind, now: Stamp) -> Finding {
    let RefusedBind { proto, address, port, audited, by, count, last, .. } = refusal;
    let subject = format!("{proto}/{}", SocketAddr::new(*address, port.get()));
    let times = if *count == 1 { "once".to_owned() } else { format!("{count} times") };
    let ago = lasting(now.seconds_since(*last));
    let found = match audited {
        false => format!("refused {times}, last {ago} ago"),
        true => format!("would have been refused {times}, last {ago} ago; mode is audit"),
    };
    let allowed = rules.allowed(*proto, *port);
    let next = match is_ssh(rules, refusal) {
        true => "Set `ListenAddress` of sshd (or ListenStream of ssh.socket) to an address it may have, or \
                 [ssh] rebind = true."
            .to_owned(),
        false => format!("Bind {} {allowed}; or declare the port in the policy.", by.process),
    };
    Finding::new(Code::BindRefused, severity(rules, refusal), subject, allowed, found, next).held_by(Some(by))
}

#[cfg(test)]
mod tests {
    use expect_test::expect;

    use crate::diff::stage::{NOW, Stage, ip, port};
    use crate::observed::{Binds, Reading, RefusedBind};
    use crate::terms::{Actor, Proto, Stamp};

    fn refusal(address: &str, number: u16, seconds_ago: i64) -> RefusedBind {
        RefusedBind {
            proto: Proto::Tcp,
            address: ip(address),
            port: port(number),
            audited: false,
            by: Actor { pid: 812, process: "db".into(), unit: None, user: None },
            uid: 0,
            count: 2,
            first: Stamp::from_unix(NOW - seconds_ago - 60),
            last: Stamp::from_unix(NOW - seconds_ago),
        }
    }

    fn stage(refusals: Vec<RefusedBind>) -> Stage {
        let mut stage = Stage::spoke();
        let guard = Binds { loaded: true, attached: true, refusals, ..Binds::default() };
        stage.snapshot.binds = Reading::Seen(guard);
        stage
    }

    #[test]
    fn refusals_are_told_with_who_and_how_often_and_not_for_ever() {
        let mut audited = refusal("::", 19_999, 5);
        (audited.audited, audited.count) = (true, 1);
        let all = vec![
            refusal("0.0.0.0", 22, 12),
            refusal("0.0.0.0", 5432, 3599),
            refusal("0.0.0.0", 80, 3600),
            audited,
        ];
        expect![[r#"
            high bind-refused tcp/0.0.0.0:22 [db]
                wanted on 10.84.0.16 and fd84::16 only
                found refused 2 times, last 12 s ago
            medium bind-refused tcp/0.0.0.0:5432 [db]
                wanted on loopback or the mesh: the policy names no such port
                found refused 2 times, last 59 min ago
            low bind-refused tcp/[::]:19999 [db]
                wanted on the mesh only: 10.84.0.16 and fd84::16
                found would have been refused once, last 5 s ago; mode is audit
        "#]]
        .assert_eq(&stage(all.clone()).show());
        let off = stage(all).policy(|policy| policy.enforce.binds = false);
        assert_eq!(off.codes(), [""; 0]);
    }

    #[test]
    fn a_thousand_refusals_are_a_bounded_number_of_findings() {
        let many = (0..1000).map(|n| refusal("0.0.0.0", 2000 + n, i64::from(n))).collect();
        let codes = stage(many).codes();
        assert_eq!(codes.len(), super::TOLD_MAX + 1, "{codes:?}");
        assert!(codes.contains(&"medium bind-refused tcp/0.0.0.0:2000".to_owned()), "the latest: {codes:?}");
        assert!(codes.contains(&"medium bind-refused further binds".to_owned()), "{codes:?}");
    }

    #[test]
    fn a_guard_that_does_not_hold_is_told_and_does_not_blind() {
        for (attached, lifted) in [(false, false), (true, true)] {
            let mut stage = stage(Vec::new());
            if let Reading::Seen(guard) = &mut stage.snapshot.binds {
                (guard.attached, guard.lifted) = (attached, lifted);
            }
            assert_eq!(stage.codes(), ["low control-unproven control binds"]);
        }
        let blind = || Stage::spoke().blind(crate::observed::Facet::Binds);
        assert_eq!(blind().codes(), ["low control-unproven control binds"]);
        assert_eq!(blind().policy(|policy| policy.enforce.binds = false).codes(), [""; 0]);
        assert_eq!(stage(Vec::new()).codes(), [""; 0]);
    }
}
