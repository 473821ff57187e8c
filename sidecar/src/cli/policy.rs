//! `policy check` and `policy show`.

use clap::Subcommand;

use super::{Global, today};
use crate::desired::Desired;
use crate::policy::{self, Loaded};
use crate::sys::clock;

#[derive(Subcommand)]
pub enum Verb {
    /// Report every mistake of the policy file, with line and advice
    Check,
    /// Print the policy as it is understood, every default filled in
    Show,
}

pub fn run(global: &Global, verb: &Verb) -> anyhow::Result<u8> {
    let now = clock::now();
    match verb {
        Verb::Check => check(global, now),
        Verb::Show => {
            let loaded = policy::load(&global.policy, today(now))?;
            global.print(&policy::show(&loaded.policy))?;
            Ok(0)
        }
    }
}

fn check(global: &Global, now: crate::terms::Stamp) -> anyhow::Result<u8> {
    let (loaded, _) = load(global, now)?;
    if let Some(expired) = loaded.expired() {
        anyhow::bail!("{expired}");
    }
    for note in &loaded.notes {
        let mut text = String::new();
        note.mistake.render(&loaded.file, "note", &mut text)?;
        eprintln!("{}", text.trim_end());
    }
    global.print(&format!("{}: right, for {}\n", global.policy.display(), loaded.policy.node.name))?;
    Ok(0)
}

/// The policy and what follows from it; refuses one that leaves its operator no way in.
pub fn load(global: &Global, now: crate::terms::Stamp) -> anyhow::Result<(Loaded, Desired)> {
    let loaded = policy::load(&global.policy, today(now))?;
    match Desired::new(loaded.policy.clone(), today(now)) {
        Ok(desired) => Ok((loaded, desired)),
        Err(closed) => {
            let help = format!("{}, or set allow_no_admin_path = true in [enforce]", closed.remedy);
            anyhow::bail!("{}", loaded.mistake(closed.key, &closed.reason, &help))
        }
    }
}
