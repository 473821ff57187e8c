//! The tc guard beside a change of the rules. What waits for a confirmation is let in
//! beside what was before ([`relax`], [`ready`]); only what is confirmed refuses
//! ([`settle`]). So a rollback, which is a shell and nft, has nothing to do here: the guard
//! then lets in more than the rules do, and never less.

use std::collections::BTreeSet;
use std::path::Path;

use crate::desired::Desired;
use crate::desired::guard::{Boot, Timed};
use crate::source::bpf::guard::{Guard, Known};
use crate::source::bpf::{ensure_bpffs, guard};
use crate::source::links;
use crate::sys::clock;
use crate::terms::{Port, Proto};

/// Before the rules change: lets in what they will, where a guard is in force.
pub fn relax(pins: &Path, desired: &Desired) -> anyhow::Result<Option<Known>> {
    match (&desired.guard, Guard::open(pins)?) {
        (Some(rules), Some(mut guard)) => guard.relax(rules, &links::read()?),
        _ => Ok(None),
    }
}

/// After they changed: on the interfaces, and ready to be settled. Loads it, if need be.
pub fn ready(pins: &Path, desired: &Desired) -> anyhow::Result<()> {
    let Some(rules) = &desired.guard else { return Ok(()) };
    loaded(pins)?.relax(rules, &links::read()?).map(drop)
}

/// Confirmed: only what was last made ready is let in. `false`: there is no guard.
pub fn settle(pins: &Path) -> anyhow::Result<bool> {
    match Guard::open(pins)? {
        Some(mut guard) => guard.settle().map(|()| true),
        None => Ok(false),
    }
}

/// Nothing waits for a confirmation: these rules at once. `known`: by [`relax`], a moment ago.
pub fn install(pins: &Path, desired: &Desired, known: Option<Known>) -> anyhow::Result<()> {
    let Some(rules) = &desired.guard else { return settle(pins).map(drop) };
    loaded(pins)?.install(rules, &links::read()?, known)
}

/// The guard, loaded if need be.
fn loaded(pins: &Path) -> anyhow::Result<Guard> {
    ensure_bpffs()?;
    guard::spawn_loader(pins)?;
    carry_glass(pins)?;
    Guard::open(pins)?.ok_or_else(|| anyhow::anyhow!("the loader pinned nothing"))
}

/// To be called before a guard that may just have been loaded is on any interface: what was opened before it
/// came, through that of another version, is known to our table.
pub fn carry_glass(pins: &Path) -> anyhow::Result<()> {
    match Guard::open(pins)? {
        Some(guard) if guard.timed()?.is_empty() => follow_glass(pins),
        _ => Ok(()),
    }
}

/// Lets in through the guard what break-glass has open in our table, for as long as that is.
pub fn follow_glass(pins: &Path) -> anyhow::Result<()> {
    let Some(mut guard) = Guard::open(pins)? else { return Ok(()) };
    let (openings, now) = (super::glass::list()?, clock::since_boot_ns());
    let tcp = openings.iter().filter(|opening| opening.proto == Proto::Tcp);
    let wanted: Vec<Timed> = tcp
        .map(|opening| Timed {
            port: opening.port,
            from: vec![opening.from],
            until: Boot(now.saturating_add(u64::from(opening.left_s).saturating_mul(1_000_000_000))),
        })
        .collect();
    let ports: BTreeSet<Port> = wanted.iter().chain(&guard.timed()?).map(|timed| timed.port).collect();
    ports.into_iter().try_for_each(|port| guard.set_timed(port, &wanted))
}

/// What a failure of any of these means to whoever changes rules: a word of warning.
pub fn warn<T>(result: anyhow::Result<T>) -> Option<T> {
    result
        .inspect_err(|error| {
            eprintln!("warning: the second layer, the tc guard, is not active: {error:#}");
        })
        .ok()
}
