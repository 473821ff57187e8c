//! `status`: the running daemon's last report.

use std::fmt::Write;

use anyhow::Context;

use super::{Format, Global};
use crate::daemon::socket::{self, Daemon, Rules, Status};
use crate::fleet::table::wrapped;
use crate::policy::Mode;
use crate::terms::counted;

/// The newest events come first; more are in the event log.
const EVENTS: usize = 8;

pub fn run(global: &Global) -> anyhow::Result<u8> {
    let text = socket::ask(&global.places()?.run, "status")?;
    let status: Status = serde_json::from_str(&text).context("the daemon's answer")?;
    global.print(&match global.format {
        Format::Json => format!("{}\n", text.trim_end()),
        _ => {
            format!(
                "{}{}",
                status.report.to_text(global.width(), global.colour()),
                about(&status.daemon, global.width())
            )
        }
    })?;
    Ok(status.report.exit_code())
}

/// A few lines on the daemon itself, below its report.
fn about(daemon: &Daemon, width: usize) -> String {
    let begun = format!(
        "Daemon {} since {}: {}, {}{}",
        daemon.pid,
        daemon.started.to_the_second(),
        counted(daemon.cycle, "look"),
        counted(daemon.repairs, "repair"),
        if daemon.mode == Mode::Audit { "; audit mode counts and drops nothing" } else { "" }
    );
    let mut text = format!("\n{}", wrapped(&begun, width, 0));
    if !daemon.guard.is_empty() {
        text.push_str(&wrapped(&format!("Second layer (tc guard): {}", daemon.guard), width, 0));
    }
    let stands = match daemon.rules {
        Rules::Confirmed => None,
        Rules::OnTrial => {
            let until =
                daemon.until.map(|until| format!(" at {}", until.to_the_second())).unwrap_or_default();
            let back_to = match &daemon.before {
                Some(policy) => format!(" to policy {policy}"),
                None => " to NO rules of ours, since none was ever confirmed".to_owned(),
            };
            Some(format!(
                "policy {} is on trial: unless confirmed it is rolled back{until}{back_to}; \
                 a new connection of the hub through the tunnel confirms it, or `spokeguard confirm`",
                daemon.policy
            ))
        }
        Rules::RolledBack => Some(match &daemon.before {
            Some(policy) => format!(
                "the policy file was ROLLED BACK: the rules confirmed before it count (policy {policy})"
            ),
            None => "the policy file was ROLLED BACK, and none was ever confirmed: NO rules of ours are in force; \
                     `spokeguard apply --wait` tries it again"
                .to_owned(),
        }),
        Rules::NotInForce => Some("what the policy file says is NOT in force".to_owned()),
    };
    text.extend(stands.map(|stands| wrapped(&stands, width, 2)));
    let _ = match &daemon.audit {
        Some(audit) => {
            writeln!(text, "Probed from outside at {}, in {:.2} s", audit.at.to_the_second(), audit.seconds)
        }
        None => writeln!(text, "Not probed from outside yet"),
    };
    for event in daemon.events.iter().rev().take(EVENTS) {
        text.push_str(&wrapped(&format!("{} {}", event.at.to_the_second(), event.told()), width, 2));
    }
    text
}

#[cfg(test)]
mod tests {
    use expect_test::expect;

    use super::*;

    #[test]
    fn what_is_said_of_the_daemon_fits_the_terminal() {
        let json = serde_json::json!({
            "pid": 812_345, "started": "2025-10-09T08:53:20Z", "mode": "audit", "policy": "0123456789abcdef",
            "rules": "on-trial", "until": "2025-10-09T08:54:20Z", "before": "fedcba9876543210",
            "cycle": 1, "last_cycle_seconds": 0.1, "repairs": 20,
            "guard": "on eth0, eth1, eth2, docker0, docker1, veth0a1b2c, veth0a1b2d, veth0a1b2e",
            "audit": { "at": "2025-10-09T08:53:22Z", "seconds": 0.25 }, "events": [],
            "privileges": { "proven": true, "capabilities": [], "gaps": [], "http": null }
        });
        let daemon: Daemon = serde_json::from_value(json).expect("a daemon");
        expect![[r#"

            Daemon 812345 since 2025-10-09 08:53:20 UTC: 1 look, 20 repairs; audit mode
              counts and drops nothing
            Second layer (tc guard): on eth0, eth1, eth2, docker0, docker1, veth0a1b2c,
              veth0a1b2d, veth0a1b2e
              policy 0123456789abcdef is on trial: unless confirmed it is rolled back at
                2025-10-09 08:54:20 UTC to policy fedcba9876543210; a new connection of the
                hub through the tunnel confirms it, or `spokeguard confirm`
            Probed from outside at 2025-10-09 08:53:22 UTC, in 0.25 s
        "#]]
        .assert_eq(&about(&daemon, 80));
        let first = Daemon { before: None, ..daemon };
        for rules in [Rules::Confirmed, Rules::OnTrial, Rules::RolledBack, Rules::NotInForce] {
            let told = about(&Daemon { rules, ..first.clone() }, 80);
            assert!(told.lines().all(|line| line.len() <= 80), "{told}");
            assert_eq!(
                told.contains("NO rules of ours"),
                matches!(rules, Rules::OnTrial | Rules::RolledBack)
            );
        }
    }
}
