//! `apply` and `confirm`: the policy in force, once, with a way back armed.

use std::time::Duration;

use clap::Args;

use super::{Format, Global};
use crate::apply::{self, Applied, guard, rollback};
use crate::daemon::socket;
use crate::ruleset::{Change, compare};
use crate::source::nft;
use crate::sys::clock;

#[derive(Args)]
pub struct Options {
    /// Roll back after this long unless confirmed [default: the policy's, 60s]
    #[arg(long, value_name = "TIME", value_parser = within)]
    confirm_within: Option<Duration>,
    /// Stay until it is confirmed (exit 0) or rolled back (exit 1)
    #[arg(long)]
    wait: bool,
}

fn within(text: &str) -> Result<Duration, String> {
    let time =
        humantime::parse_duration(text).map_err(|_| "write a number and its unit, such as 60s or 5m")?;
    match time.as_secs() {
        1..=86_400 => Ok(time),
        _ => Err("between 1s and 1 day".into()),
    }
}

pub fn run(global: &Global, options: &Options) -> anyhow::Result<u8> {
    let (_, desired) = super::policy::load(global, clock::now())?;
    let Some(table) = &desired.table else {
        global.tell("[enforce] firewall = false: nothing to apply\n", said("not-wanted", &[]))?;
        return Ok(0);
    };
    let super::Places { run, pin, .. } = global.places()?;
    let found = nft::list_table()?;
    let within = options.confirm_within.unwrap_or(desired.policy.enforce.confirm_within);
    if compare::changes(table, found.as_ref()).is_empty() {
        // An earlier apply may still wait for its confirmation, and is rolled back without it.
        let armed = rollback::state(&run)? == rollback::State::Armed;
        let text =
            if armed { "in force already, and not confirmed yet: nothing changed\n" } else { UNCHANGED };
        return if armed && options.wait {
            wait(global, &run, &pin, within, text, &[])
        } else {
            if !armed {
                guard::warn(guard::install(&pin, &desired));
            }
            global.tell(text, said("unchanged", &[]))?;
            Ok(0)
        };
    }
    if let Some(pid) = other_policy(&run, &desired) {
        anyhow::bail!(
            "a daemon (pid {pid}) enforces another policy and would put its own rules back at once: \
             restart it with this one, or stop it first"
        );
    }
    let previous = if found.is_some() { Some(nft::list_table_text()?) } else { None };
    rollback::arm(&run, previous.as_deref(), within, &nft::program()?)?;
    guard::warn(guard::relax(&pin, &desired));
    let time = humantime::format_duration(Duration::from_secs(within.as_secs()));
    let changes = match apply::apply_table(&desired) {
        Ok(Applied::Changed(changes)) => changes,
        Ok(Applied::Unchanged | Applied::NotWanted) => Vec::new(),
        // How far it came is not known, and an earlier apply may have armed it, too: so it stays.
        Err(error) => {
            let text = format!(
                "what was in force before comes back in {time}, unless `spokeguard confirm` keeps it as it is"
            );
            return Err(anyhow::Error::new(error).context(text));
        }
    };
    guard::warn(guard::ready(&pin, &desired));
    let count = if changes.len() == 1 { "1 change".to_owned() } else { format!("{} changes", changes.len()) };
    let text =
        format!("in force: {count}; `spokeguard confirm` keeps it, else it is rolled back in {time}\n");
    if options.wait {
        return wait(global, &run, &pin, within, &text, &changes);
    }
    global.tell(&text, said("applied", &changes))?;
    Ok(0)
}

const UNCHANGED: &str = "in force already: nothing changed\n";

/// The one document of `--format json`.
fn said(result: &str, changes: &[Change]) -> serde_json::Value {
    let changes: Vec<String> = changes.iter().map(ToString::to_string).collect();
    serde_json::json!({ "version": 1, "result": result, "changes": changes })
}

/// The pid of a running daemon that enforces something else.
fn other_policy(run: &std::path::Path, desired: &crate::desired::Desired) -> Option<u32> {
    let text = socket::ask(run, "status").ok()?;
    let status: socket::Status = serde_json::from_str(&text).ok()?;
    let ours = crate::policy::fingerprint(&desired.policy);
    (status.daemon.policy != ours).then_some(status.daemon.pid)
}

fn wait(
    global: &Global,
    run: &std::path::Path,
    pin: &std::path::Path,
    within: Duration,
    text: &str,
    changes: &[Change],
) -> anyhow::Result<u8> {
    if global.format == Format::Text {
        global.print(text)?;
    }
    let started = clock::Uptime::start();
    loop {
        match rollback::state(run)? {
            rollback::State::Idle => {
                guard::warn(guard::settle(pin));
                global.tell("confirmed\n", said("confirmed", changes))?;
                return Ok(0);
            }
            rollback::State::Fired => {
                global.tell("not confirmed in time: rolled back\n", said("rolled-back", changes))?;
                return Ok(1);
            }
            rollback::State::Armed if started.elapsed() > within + Duration::from_secs(30) => {
                anyhow::bail!(
                    "the rollback is overdue: its watchdog is gone; the new rules are still in force"
                );
            }
            rollback::State::Armed => std::thread::park_timeout(Duration::from_millis(100)),
        }
    }
}

pub fn confirm(global: &Global) -> anyhow::Result<u8> {
    let super::Places { run, pin, .. } = global.places()?;
    let (text, result) = match rollback::confirm(&run)? {
        true => {
            guard::warn(guard::settle(&pin));
            ("confirmed: the rules in force stay\n", "confirmed")
        }
        false => ("nothing waits for a confirmation\n", "nothing-to-confirm"),
    };
    let mut said = serde_json::json!({ "version": 1, "result": result });
    let mut text = text.to_owned();
    if result == "confirmed" {
        // Not before: what is rolled back must find its flows as they were.
        let (line, cut) = super::break_glass::cut_what_is_closed(global);
        text += &line;
        said["cut"] = serde_json::json!(cut);
    }
    global.tell(&text, said)?;
    Ok(0)
}
