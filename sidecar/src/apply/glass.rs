//! Opens a hole for a while, and closes it early. The kernel holds it, counts the time and
//! ends it; nothing is written down anywhere else, and no daemon is needed for any of it.

use super::ApplyError;
use crate::desired::TABLE;
use crate::ruleset::glass::{self, OPENINGS_MAX, Opening};
use crate::ruleset::{Table, compare, encode};
use crate::source::{nft, nft_lists};
use crate::terms::{Port, Proto};

#[derive(Debug, thiserror::Error)]
pub enum GlassError {
    #[error("there is no table inet spokeguard: it closes nothing, so there is nothing to open")]
    NoTable,
    #[error("table inet spokeguard has no room for openings: `spokeguard apply` puts it right")]
    NoSets,
    #[error("{0} is open already: close it first")]
    Overlaps(Opening),
    #[error("{0} prefixes would be open at once, and {OPENINGS_MAX} is the most: close some first")]
    TooMany(usize),
    #[error("nft took it, and yet {0} is not open")]
    NotThere(Opening),
    #[error(transparent)]
    Apply(#[from] ApplyError),
}

/// Which openings to close.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Which {
    All,
    One(Proto, Port),
}

/// What is open now.
pub fn list() -> Result<Vec<Opening>, ApplyError> {
    // The kernel is quick to say that nothing is.
    if nft_lists::are_all(TABLE).unwrap_or(false) {
        return Ok(Vec::new());
    }
    let sets = nft::list_sets().map_err(ApplyError::Look)?;
    Ok(sets.as_ref().map(glass::openings).unwrap_or_default())
}

/// Opens all of them or none, and reads them back. One that is open already is opened
/// anew, for as long as is asked for now.
pub fn open(wanted: &[Opening]) -> Result<Vec<Opening>, GlassError> {
    // An opening that ends in this moment can't be replaced any more: then it is not there.
    match attempt(wanted) {
        Err(GlassError::Apply(ApplyError::Act(_))) => attempt(wanted),
        done => done,
    }
}

fn attempt(wanted: &[Opening]) -> Result<Vec<Opening>, GlassError> {
    let table = look()?.ok_or(GlassError::NoTable)?;
    if !glass::sets().iter().all(|set| table.sets.iter().any(|found| compare::same_set(set, found))) {
        return Err(GlassError::NoSets);
    }
    let there = glass::openings(&table);
    let (mut replaced, mut stay) = (Vec::new(), Vec::new());
    for old in there {
        let meets = |new: &&Opening| {
            (new.proto, new.port) == (old.proto, old.port) && glass::overlap(&new.from, &old.from)
        };
        match wanted.iter().find(meets) {
            Some(new) if new.same_hole(&old) => replaced.push(old),
            // The kernel takes no two elements that share an address.
            Some(_) => return Err(GlassError::Overlaps(old)),
            None => stay.push(old),
        }
    }
    if stay.len() + wanted.len() > OPENINGS_MAX {
        return Err(GlassError::TooMany(stay.len() + wanted.len()));
    }
    nft::run_transaction(&encode::open(&table, wanted, &replaced)).map_err(ApplyError::Act)?;
    let found = list()?;
    let opened = |new: &Opening| {
        let seen = found.iter().find(|seen| seen.same_hole(new) && seen.lasts_s == new.lasts_s);
        seen.cloned().ok_or_else(|| GlassError::NotThere(new.clone()))
    };
    wanted.iter().map(opened).collect()
}

/// Closes them, and gives those that it closed.
pub fn close(which: Which) -> Result<Vec<Opening>, ApplyError> {
    let attempt = || {
        let Some(table) = look()? else { return Ok(Vec::new()) };
        let mut chosen = glass::openings(&table);
        chosen.retain(|opening| match which {
            Which::All => true,
            Which::One(proto, port) => (opening.proto, opening.port) == (proto, port),
        });
        if !chosen.is_empty() {
            nft::run_transaction(&encode::close(&table, &chosen)).map_err(ApplyError::Act)?;
        }
        Ok(chosen)
    };
    // One that ended by itself in between fails the whole transaction.
    match attempt() {
        Err(ApplyError::Act(_)) => attempt(),
        done => done,
    }
}

fn look() -> Result<Option<Table>, ApplyError> {
    nft::list_table().map_err(ApplyError::Look)
}
