//! `apply` and `confirm`: the policy in force, once, with a way back armed.

use std::time::Duration;

use clap::Args;

use super::Global;
use crate::apply::{self, Applied, rollback};
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
    let time = humantime::parse_duration(text).map_err(|e| format!("{e}; write 60s or 5m"))?;
    match time.as_secs() {
        1..=86_400 => Ok(time),
        _ => Err("between 1s and 1 day".into()),
    }
}

pub fn run(global: &Global, options: &Options) -> anyhow::Result<u8> {
    let (_, desired) = super::policy::load(global, clock::now())?;
    let Some(table) = &desired.table else {
        global.print("[enforce] firewall = false: nothing to apply\n")?;
        return Ok(0);
    };
    let run = global.places()?.run;
    let found = nft::list_table()?;
    if crate::ruleset::compare::changes(table, found.as_ref()).is_empty() {
        global.print("in force already: nothing changed\n")?;
        return Ok(0);
    }
    let within = options.confirm_within.unwrap_or(desired.policy.enforce.confirm_within);
    let previous = if found.is_some() { Some(nft::list_table_text()?) } else { None };
    rollback::arm(&run, previous.as_deref(), within, &nft::program()?)?;
    let changes = match apply::apply_table(&desired) {
        Ok(Applied::Changed(changes)) => changes.len(),
        Ok(Applied::Unchanged | Applied::NotWanted) => 0,
        Err(error) => {
            // Nothing was changed, so there is nothing to roll back.
            rollback::confirm(&run)?;
            return Err(error.into());
        }
    };
    global.print(&format!(
        "in force: {changes} {}; `spokeguard confirm` keeps it, else it is rolled back in {}\n",
        if changes == 1 { "change" } else { "changes" },
        humantime::format_duration(Duration::from_secs(within.as_secs())),
    ))?;
    if options.wait { wait(global, &run, within) } else { Ok(0) }
}

fn wait(global: &Global, run: &std::path::Path, within: Duration) -> anyhow::Result<u8> {
    let started = clock::Uptime::start();
    loop {
        match rollback::state(run)? {
            rollback::State::Idle => {
                global.print("confirmed\n")?;
                return Ok(0);
            }
            rollback::State::Fired => {
                global.print("not confirmed in time: rolled back\n")?;
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
    if rollback::confirm(&global.places()?.run)? {
        global.print("confirmed: the rules in force stay\n")?;
    } else {
        global.print("nothing waits for a confirmation\n")?;
    }
    Ok(0)
}
