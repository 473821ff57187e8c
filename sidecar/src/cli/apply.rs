//! `apply` and `confirm`: the policy in force, once, with a way back armed.

use std::time::Duration;

use anyhow::Context;
use clap::Args;

use super::{Format, Global, Places};
use crate::apply::guard;
use crate::apply::trial::{BringError, Brought, Glance, Ledger, Phase};
use crate::daemon::{logging, socket};
use crate::desired::Desired;
use crate::ruleset::Change;
use crate::source::evidence::{self, Sought};
use crate::sys::clock;
use crate::terms::counted;

/// A daemon puts its rules right within milliseconds, at its own pace within this.
const REPAIR: Duration = Duration::from_secs(1);

/// For `--help` of whatever puts a policy in force.
pub const ON_TRIAL: &str = "\
A policy that refuses anything new is on trial: unless the hub opens a new
connection through the tunnel in time (60s, or [enforce] confirm_within; its
scrape will do, and a daemon or --wait looks for it), or you run `spokeguard
confirm`, the policy confirmed before comes back. The very first has none
before it: then no rules of ours stay. `status` and `check` tell.";

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
    // What is no failure and yet worth knowing: others who change the rules meanwhile, files that can't be read.
    logging::start(true);
    let (_, desired) = super::policy::load(global, clock::now())?;
    let places = global.places()?;
    let ledger = Ledger::new(&places);
    let within = options.confirm_within.unwrap_or(desired.policy.enforce.confirm_within);
    if let Some(pid) = other_policy(global, &places, &desired) {
        anyhow::bail!(
            "a daemon (pid {pid}) enforces another policy and would put its own rules back at once: \
             restart it with this one, or stop it first"
        );
    }
    let before = ledger.glance()?;
    let lock = ledger.lock()?;
    let now = ledger.glance()?;
    if let Some(trial) = ledger.read(&now).filter(|_| now != before)
        && trial.fingerprint != crate::policy::fingerprint(&desired.policy)
    {
        anyhow::bail!(
            "another change (policy {}) went in while this one waited for it: nothing was changed; \
             apply again to take its place",
            trial.fingerprint
        );
    }
    // Whatever comes of it: the second layer first lets in what the rules will.
    let known = guard::warn(guard::relax(&places.pin, &desired)).flatten();
    let brought = ledger.bring_in(&lock, &desired, within);
    drop(lock);
    let (changes, again) = match brought {
        Ok(Brought::NotWanted { taken_back }) => {
            let taken_back = taken_back.map_or_else(String::new, |policy| {
                format!("; policy {policy}, which was on trial, was taken back")
            });
            let text = format!("[enforce] firewall = false: nothing to apply{taken_back}\n");
            global.tell(&text, said("not-wanted", &[]))?;
            return Ok(0);
        }
        Ok(Brought::Confirmed { changes, unrecorded }) => {
            guard::warn(guard::install(&places.pin, &desired, known));
            if let Some(error) = unrecorded {
                eprintln!("warning: a boot will not know of these rules: {error:#}");
            }
            if changes.is_empty() {
                global.tell("in force already: nothing changed\n", said("unchanged", &changes))?;
                return Ok(0);
            }
            let text = format!(
                "in force: {}; there is nothing to confirm\n",
                counted(changes.len() as u64, "change")
            );
            return stays(global, Some(&desired), text, said("applied", &changes)).map(|()| 0);
        }
        Ok(Brought::OnTrial { changes, again }) => (changes, again),
        // How far it came is not known, and an earlier apply may have armed it, too: so it stays.
        Err(BringError::Half(error)) => {
            let time = humantime::format_duration(Duration::from_secs(within.as_secs()));
            let text = format!(
                "what was in force before comes back in {time}, unless the rules are in force and confirmed by then"
            );
            return Err(anyhow::Error::new(error).context(text));
        }
        Err(BringError::Before(error)) => return Err(error),
    };
    let left = ledger.glance().ok().and_then(|glance| Some(ledger.read(&glance)?.left())).unwrap_or(within);
    let is_first = ledger.confirmed(desired.today).is_none();
    let text = match (again, changes.as_slice()) {
        (true, []) => "in force already, and not confirmed yet: nothing changed\n".to_owned(),
        (_, some) => format!(
            "in force: {}; {}, else it is rolled back in {}{}\n",
            counted(some.len() as u64, "change"),
            keeps(&places, &desired, options.wait),
            humantime::format_duration(Duration::from_secs(left.as_secs_f64().round() as u64)),
            if is_first { " to what was there before: no policy was confirmed yet" } else { "" }
        ),
    };
    guard::warn(guard::ready(&places.pin, &desired));
    if options.wait {
        return wait(global, &places, &ledger, &desired, &text, &changes);
    }
    global.tell(&text, said(if again && changes.is_empty() { "unchanged" } else { "applied" }, &changes))?;
    Ok(0)
}

/// What will confirm it, now that it is in force.
fn keeps(places: &Places, desired: &Desired, wait: bool) -> String {
    let by_hand = "`spokeguard confirm` keeps it";
    // Without anyone who looks, a connection confirms nothing.
    let looks = wait || socket::ask(&places.run, "status").is_ok();
    match Sought::new(desired).filter(|_| looks) {
        Some(sought) => {
            let who = if desired.policy.mesh.hub.is_some() { "the hub" } else { "whoever may administer it" };
            format!("a new connection of {who} through {} or {by_hand}", sought.interface)
        }
        None => by_hand.to_owned(),
    }
}

/// The one document of `--format json`.
fn said(result: &str, changes: &[Change]) -> serde_json::Value {
    let changes: Vec<String> = changes.iter().map(ToString::to_string).collect();
    serde_json::json!({ "version": 1, "result": result, "changes": changes })
}

/// The pid of a running daemon that enforces something else, from another file than ours.
/// One that reads the same file takes up what it says.
fn other_policy(global: &Global, places: &Places, desired: &Desired) -> Option<u32> {
    let text = socket::ask(&places.run, "status").ok()?;
    let status: socket::Status = serde_json::from_str(&text).ok()?;
    let ours = crate::policy::fingerprint(&desired.policy);
    let same_file = match (std::fs::canonicalize(&global.policy), &status.daemon.file) {
        (Ok(ours), Some(theirs)) => std::fs::canonicalize(theirs).is_ok_and(|theirs| theirs == ours),
        _ => false,
    };
    (status.daemon.policy != ours && !same_file).then_some(status.daemon.pid)
}

/// Looks for the evidence itself: there may be no daemon that does.
fn wait(
    global: &Global,
    places: &Places,
    ledger: &Ledger,
    desired: &Desired,
    text: &str,
    changes: &[Change],
) -> anyhow::Result<u8> {
    if global.format == Format::Text {
        global.print(text)?;
    }
    let sought = Sought::new(desired);
    let own = ledger.glance()?;
    let trial = ledger.read(&own);
    let mut old = trial.as_ref().and_then(|trial| ledger.old(trial)).unwrap_or_default();
    loop {
        let glance = ledger.glance()?;
        match &glance {
            Some((Phase::Armed | Phase::Firing, _)) if !same(&glance, &own) => {
                anyhow::bail!(
                    "another change took this one's place: `spokeguard status` says what is in force"
                );
            }
            None if !ledger.confirmed(desired.today).is_some_and(|last| last.policy == desired.policy) => {
                anyhow::bail!(
                    "another change took this one's place: `spokeguard status` says what is in force"
                );
            }
            None | Some((Phase::Confirmed, _)) => {
                guard::warn(guard::settle(&places.pin));
                return stays(global, Some(desired), "confirmed\n".to_owned(), said("confirmed", changes))
                    .map(|()| 0);
            }
            Some((Phase::Fired, _)) => {
                global.tell("not confirmed in time: rolled back\n", said("rolled-back", changes))?;
                return Ok(1);
            }
            Some((phase, _)) => {
                if let (Phase::Armed, Some(sought)) = (phase, &sought)
                    && let Some(connection) = evidence::find(sought, &old)?
                    && let Some(lock) = ledger.try_lock()?
                {
                    match ledger.look(&lock, desired.today)? {
                        Some(Ok(in_force)) => {
                            eprintln!("{} reached port {}", connection.peer, connection.port);
                            ledger.confirm(&lock, &in_force, desired.today)?;
                            continue;
                        }
                        // It came in by other rules, and says nothing of these.
                        Some(Err(_)) => old.extend(
                            trial.as_ref().map(|trial| ledger.note_old(trial, desired)).into_iter().flatten(),
                        ),
                        None => continue,
                    }
                }
                if trial.as_ref().is_some_and(|trial| trial.left().is_zero())
                    && let Some(lock) = ledger.try_lock()?
                {
                    // Does the watchdog's work where that is gone.
                    ledger.settle(&lock, desired.today)?;
                }
                std::thread::sleep(Duration::from_millis(100));
            }
        }
    }
}

fn same(a: &Glance, b: &Glance) -> bool {
    matches!((a, b), (Some((_, a)), Some((_, b))) if a == b)
}

pub fn confirm(global: &Global) -> anyhow::Result<u8> {
    logging::start(true);
    let places = global.places()?;
    let ledger = Ledger::new(&places);
    // Not a directory of our making where there is none.
    let confirmed = !ledger.is_empty() && confirm_trial(&ledger, super::today(clock::now()))?;
    let (text, result) = match confirmed {
        true => {
            guard::warn(guard::settle(&places.pin));
            ("confirmed: the rules in force stay\n", "confirmed")
        }
        false => ("nothing waits for a confirmation\n", "nothing-to-confirm"),
    };
    let said = serde_json::json!({ "version": 1, "result": result });
    if confirmed {
        let desired = super::policy::load(global, clock::now()).ok().map(|(_, desired)| desired);
        stays(global, desired.as_ref(), text.to_owned(), said)?
    } else {
        global.tell(text, said)?
    }
    Ok(0)
}

/// Nobody can have tried rules that are not in force: such a trial is ended instead. `false`: there is none.
fn confirm_trial(ledger: &Ledger, today: jiff::civil::Date) -> anyhow::Result<bool> {
    let began = clock::Uptime::start();
    let (lock, missing) = loop {
        let lock = ledger.lock()?;
        match ledger
            .look(&lock, today)
            .context("not confirmed: look whether the rules on trial are in force")?
        {
            Some(Ok(in_force)) => return ledger.confirm(&lock, &in_force, today),
            Some(Err(missing)) if began.elapsed() > REPAIR => break (lock, missing),
            Some(Err(_)) => {}
            None => return ledger.settle(&lock, today).map(|()| false),
        }
        // Who repairs needs the lock.
        drop(lock);
        std::thread::sleep(Duration::from_millis(50));
    };
    let first = missing.first().map_or_else(String::new, ToString::to_string);
    let more = missing.len().saturating_sub(1);
    let more = if more == 0 { String::new() } else { format!(" and {more} more") };
    let text = format!("not confirmed: the rules on trial are not in force ({first}{more})");
    ledger
        .roll_back(&lock, today)
        .with_context(|| format!("{text}, and what was before them is not back yet"))?;
    anyhow::bail!(
        "{text}: what was in force before them is back; find out who changed them, then apply again"
    )
}

/// Says so, and cuts what the rules in force refuse. Not before they are certain to stay:
/// what is rolled back must find its flows as they were.
fn stays(
    global: &Global,
    desired: Option<&Desired>,
    mut text: String,
    mut said: serde_json::Value,
) -> anyhow::Result<()> {
    let (line, cut) = super::break_glass::cut_what_is_closed(desired);
    text += &line;
    if let Some(attention) = desired.and_then(super::ssh_start::refused) {
        text += &format!("{attention}\n");
    }
    said["cut"] = serde_json::json!(cut);
    global.tell(&text, said)
}
