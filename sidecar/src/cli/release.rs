//! `release`: takes our rules away, after saying what that opens.

use anyhow::Context as _;
use clap::Args;

use super::{Format, Global, install};
use crate::apply::{self, trial::Ledger};
use crate::daemon::socket;
use crate::diff::{self, Code};
use crate::observed::Reading;
use crate::source::Eyes;
use crate::source::bpf::{bind, guard};
use crate::sys::{clock, netns};

#[derive(Args)]
pub struct Options {
    /// Only say what it would open
    #[arg(long)]
    dry_run: bool,
    /// Only put the bind guard aside, until the daemon starts again
    #[arg(long, conflicts_with = "dry_run")]
    binds: bool,
}

pub fn run(global: &Global, options: &Options) -> anyhow::Result<u8> {
    let places = global.places()?;
    if options.binds {
        return lift_binds(global, &places.pin);
    }
    // The lock and not the socket: a daemon that is busy, or has only just begun, is one all the same.
    let daemon = if options.dry_run { None } else { Some(socket::Lock::take(&places.run)) };
    let _daemon =
        daemon.transpose().context("a daemon would put the rules back (systemctl stop spokeguard)")?;
    let opens = match opened(global, &places.pin) {
        Ok(opens) => Some(opens),
        Err(error) => {
            eprintln!("warning: can't tell what this opens: {error:#}");
            None
        }
    };
    if global.format == Format::Text {
        global.print(&match opens.as_deref() {
            Some([]) => {
                "nothing that listens now would be opened by this; later listeners would be\n".to_owned()
            }
            Some(some) => format!("without our rules strangers reach:\n  {}\n", some.join("\n  ")),
            None => String::new(),
        })?;
    }
    let ledger = Ledger::new(&places);
    // No other command's change comes in between, and none after it finds half of this.
    let change = if options.dry_run { None } else { Some(ledger.lock()?) };
    if let Some(lock) = &change {
        // An apply that waits for its confirmation would put the rules before it back later, and
        // a boot those that are sealed.
        ledger.forget(lock)?;
    }
    let (text, result) = match options.dry_run {
        true => ("", "dry-run"),
        // The table first: if that fails, nothing was opened.
        false => match (apply::release()?, guard::release(&places.pin)?) {
            (true, true) => ("released: table inet spokeguard and the tc guard are gone\n", "released"),
            (true, false) => ("released: table inet spokeguard is gone\n", "released"),
            (false, true) => {
                ("released: the tc guard is gone; there was no table inet spokeguard\n", "released")
            }
            (false, false) => ("there was no table inet spokeguard\n", "nothing-to-release"),
        },
    };
    // Last, so that what hinders it leaves neither rules behind nor the word of them unsaid.
    let binds = if options.dry_run { Ok(false) } else { bind::release(&places.pin) };
    let again = match !options.dry_run && is_enabled(global) {
        true => {
            "spokeguard.service is enabled: the next boot puts the policy on trial again\n\
             (systemctl disable spokeguard)\n"
        }
        false => "",
    };
    let said = serde_json::json!({ "version": 1, "result": result, "opens": opens });
    global.tell(&format!("{text}{again}"), said)?;
    binds.context("removal of the bind guard")?;
    Ok(0)
}

/// Whether a boot starts a daemon that would put these rules in force.
fn is_enabled(global: &Global) -> bool {
    [&global.state_dir, &global.run_dir].into_iter().all(Option::is_none)
        && global.policy.exists()
        && std::path::Path::new("/run/systemd/system").is_dir()
        && netns::is_initial()
        && install::properties("UnitFileState", &[install::SERVICE]) == ["enabled"]
}

/// The emergency exit of whoever is refused: at once, with or without a daemon.
fn lift_binds(global: &Global, pins: &std::path::Path) -> anyhow::Result<u8> {
    let lifted = match bind::Guard::open(pins).context("the bind guard")? {
        Some(mut guard) => guard.lift(true)?,
        None => false,
    };
    let (text, result) = match lifted {
        true => ("released: binds are not refused until the daemon starts again\n", "released"),
        false => ("no bind guard is in force here\n", "nothing-to-release"),
    };
    global.tell(text, serde_json::json!({ "version": 1, "result": result }))?;
    Ok(0)
}

/// What a look finds exposed once our table is thought away.
fn opened(global: &Global, pins: &std::path::Path) -> anyhow::Result<Vec<String>> {
    let now = clock::now();
    let (_, desired) = super::policy::load(global, now)?;
    let mut snapshot = Eyes::new(pins).look(&desired, now);
    match &mut snapshot.nftables {
        Reading::Seen(ruleset) => ruleset.tables.retain(|t| t.name != crate::desired::TABLE),
        Reading::Blind(gap) => anyhow::bail!("{}", gap.reason),
    }
    let exposing = [Code::ListenerExposed, Code::DnatExposed, Code::SshBind, Code::MeshLeak];
    let found = diff::assess(&desired, &snapshot, now).findings;
    Ok(found
        .iter()
        .filter(|f| exposing.contains(&f.code))
        .map(|f| match &f.by {
            Some(actor) => format!("{}  {actor}", f.subject),
            None if f.code == Code::MeshLeak => format!("{}  (the mesh address, for neighbours)", f.subject),
            None => f.subject.clone(),
        })
        .collect())
}
