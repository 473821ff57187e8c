//! Declared holes: shown for as long as they stand, and called out when they are over.

use super::{Assessment, Code, Finding, Severity, listed};
use crate::desired::Desired;
use crate::policy::Exception;
use crate::terms::Proto;

pub(super) fn compare(desired: &Desired, out: &mut Assessment) {
    for exception in &desired.policy.exceptions {
        let Exception { name, tcp: _, udp: _, from, reason, owner, until } = exception;
        let ports: Vec<String> = Proto::ALL
            .into_iter()
            .flat_map(|proto| exception.ports(proto).iter().map(move |port| format!("{proto}/{port}")))
            .collect();
        let (ports, from) = (listed(&ports, 6), listed(from, 4));
        let subject = format!("exception {name}");
        let owner = owner.as_deref().unwrap_or("whoever declared it");
        if exception.holds_on(desired.today) {
            let mut finding = Finding::new(
                Code::ExceptionOpen,
                Severity::Info,
                subject,
                format!("declared until {until}: {reason}"),
                format!("{ports} is open to {from}"),
                format!(
                    "Nothing until {until}, when it closes by itself; ask {owner} whether it is still needed."
                ),
            );
            finding.accepted = true;
            out.add(finding);
        } else {
            out.add(Finding::new(
                Code::ExceptionExpired,
                Severity::Medium,
                subject,
                format!("held until {until}: {reason}"),
                format!("over; {ports} is closed to {from} again"),
                format!("Take it out of the policy, or let {owner} give it a new date."),
            ));
        }
    }
}

#[cfg(test)]
mod tests {
    use expect_test::expect;

    use crate::diff::stage::{Stage, exception};

    #[test]
    fn a_hole_is_accepted_to_its_last_day_and_called_out_after_it() {
        let until = |date| Stage::spoke().policy(move |p| p.exceptions.push(exception(2222, date)));
        // The stage plays on 2026-11-21.
        let last_day = until(jiff::civil::date(2026, 11, 21));
        let findings = last_day.assess().findings;
        assert!(findings.iter().all(|f| f.accepted) && findings.len() == 1, "{findings:?}");
        expect![[r#"
            info exception-open exception emergency-ssh
                wanted declared until 2026-11-21: way in when the mesh is down
                found tcp/2222 is open to 0.0.0.0/0 and ::/0
        "#]]
        .assert_eq(&until(jiff::civil::date(2026, 11, 21)).show());
        let over = until(jiff::civil::date(2026, 11, 20));
        assert!(over.assess().findings.iter().all(|f| !f.accepted));
        expect![[r#"
            medium exception-expired exception emergency-ssh
                wanted held until 2026-11-20: way in when the mesh is down
                found over; tcp/2222 is closed to 0.0.0.0/0 and ::/0 again
        "#]]
        .assert_eq(&until(jiff::civil::date(2026, 11, 20)).show());
    }
}
