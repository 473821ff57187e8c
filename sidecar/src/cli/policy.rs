//! `policy check` and `policy show`.

use std::path::Path;

use anyhow::Context as _;
use clap::Subcommand;

use super::{Global, today};
use crate::desired::Desired;
use crate::policy::{self, Loaded};
use crate::sys::clock;

#[derive(Subcommand)]
pub enum Verb {
    /// Report every mistake of the policy file, with line and advice
    Check {
        /// Let an exception past its day be a note, as it is for the daemon: it opens nothing any more
        #[arg(long)]
        allow_expired: bool,
    },
    /// Print the policy as it is understood, every default filled in
    Show,
    /// Another tool's access rules as a policy
    #[command(subcommand)]
    Import(super::import::Verb),
}

pub fn run(global: &Global, verb: &Verb) -> anyhow::Result<u8> {
    let now = clock::now();
    match verb {
        Verb::Import(verb) => super::import::run(global, verb),
        Verb::Check { allow_expired } => check(global, *allow_expired, now),
        Verb::Show => {
            let loaded = policy::load(&global.policy, today(now))?;
            let text = policy::show(&loaded.policy);
            // The same keys as the file, as JSON.
            let json = toml::from_str::<serde_json::Value>(&text).context("read the policy back as shown")?;
            global.tell(&text, json)?;
            Ok(0)
        }
    }
}

fn check(global: &Global, allow_expired: bool, now: crate::terms::Stamp) -> anyhow::Result<u8> {
    let (loaded, desired) = load(global, now)?;
    if let Some(expired) = loaded.expired().filter(|_| !allow_expired) {
        anyhow::bail!("{expired}");
    }
    for note in &loaded.notes {
        let mut text = String::new();
        note.mistake.render(&loaded.file, "note", &mut text)?;
        eprintln!("{}", text.trim_end());
    }
    if desired.admin.is_none() {
        eprintln!(
            "note: this policy proves no way in for the node's operator; allow_no_admin_path = true permits that"
        );
    }
    let node = &loaded.policy.node.name;
    let text = format!("{}: right, for {node}\n", global.policy.display());
    // By which a daemon's status names it.
    let policy = policy::fingerprint(&loaded.policy);
    global.tell(&text, serde_json::json!({ "version": 1, "node": node, "right": true, "policy": policy }))?;
    Ok(0)
}

/// The policy and what follows from it; refuses one that leaves its operator no way in.
pub fn load(global: &Global, now: crate::terms::Stamp) -> anyhow::Result<(Loaded, Desired)> {
    load_policy(&global.policy, now)
}

/// The same of any file.
pub fn load_policy(file: &Path, now: crate::terms::Stamp) -> anyhow::Result<(Loaded, Desired)> {
    let loaded = policy::load(file, today(now))?;
    match Desired::new(loaded.policy.clone(), today(now)) {
        Ok(desired) => Ok((loaded, desired)),
        Err(closed) => {
            let help = format!("{}, or set allow_no_admin_path = true in [enforce]", closed.remedy);
            anyhow::bail!("{}", loaded.mistake(closed.key, &closed.reason, &help))
        }
    }
}
