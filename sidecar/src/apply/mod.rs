//! Carries out what was decided: our table into the kernel, and out of it again. Touches
//! the table `inet spokeguard` and nothing else, in single transactions.

pub mod cut;
pub mod glass;
pub mod guard;
mod lists;
pub mod replay;
pub mod sealed;
pub mod trial;

use std::net::UdpSocket;
use std::time::Duration;

use crate::desired::{Desired, TABLE};
use crate::ruleset::{Change, Table, compare, encode};
use crate::source::nft;
use crate::source::nft_events::{NftCommits, NftEvent, NftQueries};

/// What came of putting our table in place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Applied {
    /// It was as desired already.
    Unchanged,
    /// It is now; these differences were found before.
    Changed(Vec<Change>),
    /// The policy wants no table of ours (`[enforce] firewall = false`). One that is
    /// there stays until `release`.
    NotWanted,
}

#[derive(Debug, thiserror::Error)]
pub enum ApplyError {
    #[error("read table inet spokeguard before the change")]
    Look(#[source] anyhow::Error),
    #[error("put table inet spokeguard in place")]
    Act(#[source] anyhow::Error),
    #[error("read table inet spokeguard back")]
    LookAgain(#[source] anyhow::Error),
    /// Each time that it was read, and refused because it was another by then.
    #[error(
        "put table inet spokeguard in place: others changed it {ROUNDS} times meanwhile, the last was {by}: stop \
         what manages it, or try again"
    )]
    Contested { by: String, source: anyhow::Error },
    /// nft took the transaction, and yet the kernel holds something else: another tool
    /// was faster, or nft did not mean what we did.
    #[error("table inet spokeguard still differs after it was put in place: {}", named(.0))]
    StillDiffers(Vec<Change>),
}

/// A table that was made dormant takes two transactions; more of them means somebody else.
const ROUNDS: usize = 5;

/// Makes the kernel's table what is desired, and reads it back.
///
/// A transaction says what is to go of what was found. Where that is another by the time it
/// arrives the kernel refuses all of it, and it is written anew, for what is there then.
pub fn apply_table(desired: &Desired) -> Result<Applied, ApplyError> {
    if desired.table.is_none() {
        return Ok(Applied::NotWanted);
    }
    put_in_place(desired, Found::look().map_err(ApplyError::Look)?)
}

/// Our table as it was found.
pub(crate) struct Found {
    pub(crate) table: Option<Table>,
    /// Of all rules, from just before.
    generation: Option<u32>,
    /// What was committed since then.
    commits: Option<NftCommits>,
}

impl Found {
    pub(crate) fn look() -> anyhow::Result<Self> {
        Self::look_within(nft::DEADLINE)
    }

    /// The same for whoever can't wait.
    pub(crate) fn look_within(limit: Duration) -> anyhow::Result<Self> {
        let commits = NftCommits::open()
            .inspect_err(|error| log::debug!("others may change the rules unnoticed: {error}"))
            .ok();
        let generation = generation();
        Ok(Self { table: nft::list_table_within(limit)?, generation, commits })
    }
}

/// The same where the table has just been read.
pub(crate) fn put_in_place(desired: &Desired, found: Found) -> Result<Applied, ApplyError> {
    let Found { table: mut found, generation: mut written_for, commits } = found;
    let Some(table) = &desired.table else { return Ok(Applied::NotWanted) };
    let changes = compare::changes(table, found.as_ref());
    let mut left = changes.clone();
    let mut ahead = None;
    let mut taken = false;
    for round in 1..=ROUNDS {
        if left.is_empty() {
            break;
        }
        if round == 1 {
            ahead = lists::put(table, &mut found);
            written_for = ahead.as_ref().map_or(written_for, |ahead| ahead.generation);
            taken = ahead.is_some();
        }
        let text = encode::transaction(table, found.as_ref());
        let sent = nft::run_transaction(&text);
        taken |= sent.is_ok();
        let now = generation();
        // One that failed makes no generation.
        if let Err(error) = sent
            && (now == written_for || round == ROUNDS)
        {
            if let Some(Err(stay)) = ahead.map(|ahead| ahead.take_back(now)) {
                log::warn!(
                    "lists of addresses stay in table inet {TABLE} until the next apply: take them out: {stay}"
                );
            }
            let by = others(commits, taken).filter(|_| now != written_for);
            return Err(match by {
                Some(by) => ApplyError::Contested { by, source: error },
                None => ApplyError::Act(error),
            });
        }
        written_for = now;
        found = nft::list_table().map_err(ApplyError::LookAgain)?;
        left = compare::changes(table, found.as_ref());
    }
    match (changes.is_empty(), left.is_empty()) {
        (true, _) => Ok(Applied::Unchanged),
        (false, true) => {
            if let Some(by) = others(commits, taken) {
                log::warn!(
                    "table inet {TABLE} was changed by {by} while it was put in place: it is as the policy says"
                );
            }
            knock(desired);
            Ok(Applied::Changed(changes))
        }
        (false, false) => Err(ApplyError::StillDiffers(left)),
    }
}

/// The last process but ours that changed our table. `taken`: something of ours went in, so that one of the changes
/// must be ours. Where none is, processes can't be told apart: in a pid namespace the kernel's numbers are others.
fn others(commits: Option<NftCommits>, taken: bool) -> Option<String> {
    let of_table = commits?.take(COMMITS_MAX).filter(|event| event.own_touched);
    let actors = of_table.filter_map(|NftEvent { actor, .. }| actor);
    let (ours, others): (Vec<_>, Vec<_>) = actors.partition(|(pid, _)| nft::committed(*pid));
    let known = !taken || !ours.is_empty();
    others.last().filter(|_| known).map(|(pid, name)| format!("{name} (pid {pid})"))
}

/// More would be a fight, of which the last ones don't matter.
const COMMITS_MAX: usize = 1000;

fn generation() -> Option<u32> {
    NftQueries::open().and_then(|mut queries| queries.generation()).ok()
}

/// Has the tunnel send a packet. Conntrack begins with our first rule: it knows no flow from
/// before, takes the hub's next packet for the first of a new one, and we would drop those
/// until this node sends something by itself, which an idle tunnel does every 25 seconds.
pub fn knock(desired: &Desired) {
    let mesh = &desired.policy.mesh;
    for hub in mesh.hub.iter().flat_map(|hub| &hub.address) {
        // From our own mesh address: it leads into the tunnel or, while there is none, nowhere.
        let Some(source) = mesh.address.iter().find(|own| own.is_ipv4() == hub.is_ipv4()) else { continue };
        let sent = UdpSocket::bind((*source, 0)).and_then(|socket| socket.send_to(&[0], (*hub, DISCARD)));
        if let Err(error) = sent {
            log::debug!("no packet to the hub: {error}");
        }
    }
}

/// RFC 863.
const DISCARD: u16 = 9;

/// The way back that is made ready in advance, for [`restore_table`].
pub fn restoring_transaction(desired: &Desired) -> Option<String> {
    desired.table.as_ref().map(|table| encode::transaction(table, None))
}

/// Puts the whole table in place at once, for when it is known to be gone. Does not look
/// before or after: the event of its own commit brings the next look.
pub fn restore_table(transaction: &str) -> Result<(), ApplyError> {
    nft::run_transaction(transaction).map_err(ApplyError::Act)
}

/// Takes our table away. `false`: there was none.
pub fn release() -> Result<bool, ApplyError> {
    let there = NftQueries::open()
        .and_then(|mut queries| queries.own_table_exists())
        .map_err(|e| ApplyError::Look(e.into()))?;
    if there {
        nft::run_transaction(&encode::delete(&lists::bare())).map_err(ApplyError::Act)?;
    }
    Ok(there)
}

fn named(changes: &[Change]) -> String {
    let mut names: Vec<String> = changes.iter().take(5).map(ToString::to_string).collect();
    if changes.len() > names.len() {
        names.push(format!("and {} more", changes.len() - names.len()));
    }
    names.join("; ")
}
