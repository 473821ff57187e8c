//! `status`: the running daemon's last report.

use std::fmt::Write;

use anyhow::Context;

use super::{Format, Global};
use crate::daemon::socket::{self, Rules, Status};
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
                about(&status, global.width())
            )
        }
    })?;
    Ok(status.report.exit_code())
}

/// A few lines on the daemon itself, below its report.
fn about(status: &Status, width: usize) -> String {
    let daemon = &status.daemon;
    let mut text = format!(
        "\nDaemon {} since {}: {}, {}{}\n",
        daemon.pid,
        daemon.started.to_the_second(),
        counted(daemon.cycle, "look"),
        counted(daemon.repairs, "repair"),
        if daemon.mode == Mode::Audit { "; audit mode counts and drops nothing" } else { "" }
    );
    if !daemon.guard.is_empty() {
        let _ = writeln!(text, "Second layer (tc guard): {}", daemon.guard);
    }
    let stands = match daemon.rules {
        Rules::Confirmed => String::new(),
        Rules::OnTrial => {
            let until =
                daemon.until.map(|until| format!(" at {}", until.to_the_second())).unwrap_or_default();
            let back_to = match &daemon.before {
                Some(policy) => format!(" to policy {policy}"),
                None => "\n  to NO rules of ours, since none was ever confirmed".to_owned(),
            };
            format!(
                "  policy {} is on trial: unless confirmed it is rolled back{until}{back_to};\n  \
                 a new connection of the hub through the tunnel confirms it, or `spokeguard confirm`\n",
                daemon.policy
            )
        }
        Rules::RolledBack => match &daemon.before {
            Some(policy) => format!(
                "  the policy file was ROLLED BACK: the rules confirmed before it count (policy {policy})\n"
            ),
            None => {
                "  the policy file was ROLLED BACK, and none was ever confirmed: NO rules of ours are in\n  \
                     force; `spokeguard apply --wait` tries it again\n"
                    .to_owned()
            }
        },
        Rules::NotInForce => "  what the policy file says is NOT in force\n".to_owned(),
    };
    text.push_str(&stands);
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
