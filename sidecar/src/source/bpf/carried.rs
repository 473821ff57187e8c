//! Counts that outlive their row. A service that leaves the policy, and the maps of another
//! ABI, leave their counts to rows that no program writes; whoever reads adds both.
//!
//! Each move is noted before it is made and ended by whoever comes next, so that a count is
//! there exactly once, wherever this process is killed. That holds for rows that nothing
//! counts in any more.

use std::io;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use aya::maps::{Array, Map, MapData, PerCpuArray, PerCpuValues};
use aya::util::nr_cpus;
use sidecar_ebpf::{CARRIED_NOTE, ROWS, Row, about, maps};

use super::{map, sum};
use crate::sys;

/// Rows to take from.
pub(super) enum Store {
    Counting { id: u32, rows: PerCpuArray<MapData, Row> },
    Carried { id: u32, rows: Array<MapData, Row> },
}

impl Store {
    /// Everything that was counted below this root: what programs count in, and what they did before.
    pub(super) fn all(root: &Path) -> anyhow::Result<Vec<Self>> {
        let counting = map(root, maps::ROWS)?;
        let id = counting.info()?.id();
        let mut all = vec![Store::Counting { id, rows: PerCpuArray::try_from(Map::PerCpuArray(counting))? }];
        if is_there(&root.join("maps").join(maps::CARRIED))? {
            let carried = map(root, maps::CARRIED)?;
            let id = carried.info()?.id();
            all.push(Store::Carried { id, rows: Array::try_from(Map::Array(carried))? });
        }
        Ok(all)
    }

    fn id(&self) -> u32 {
        match self {
            Store::Counting { id, .. } | Store::Carried { id, .. } => *id,
        }
    }

    fn row(&self, at: u32) -> anyhow::Result<Row> {
        let row = match self {
            Store::Counting { rows, .. } => rows.get(&at, 0).map(|cpus| sum(cpus.iter())),
            Store::Carried { rows, .. } => rows.get(&at, 0),
        };
        row.context("read of a row of counters")
    }

    fn clear(&mut self, at: u32) -> anyhow::Result<()> {
        let cleared = match self {
            Store::Counting { rows, .. } => {
                let cpus = nr_cpus().map_err(|(path, error)| io::Error::other(format!("{path}: {error}")))?;
                rows.set(at, PerCpuValues::try_from(vec![Row::default(); cpus])?, 0)
            }
            Store::Carried { rows, .. } => rows.set(at, Row::default(), 0),
        };
        cleared.context("reset of a row of counters")
    }
}

/// Where counts are carried to.
pub(super) struct Carried {
    rows: Array<MapData, Row>,
    about: Array<MapData, u64>,
}

impl Carried {
    pub(super) fn open(root: &Path) -> anyhow::Result<Self> {
        Ok(Self {
            rows: Array::try_from(Map::Array(map(root, maps::CARRIED)?))?,
            about: Array::try_from(Map::Array(map(root, maps::BUILD)?))?,
        })
    }

    pub(super) fn row(&self, at: u32) -> anyhow::Result<Row> {
        self.rows.get(&at, 0).context("read of the carried counters")
    }

    /// What the row `from` of `store` holds goes to the row `to`, and leaves there. Nothing may
    /// count in it any more.
    pub(super) fn take(&mut self, store: &mut Store, from: u32, to: u32) -> anyhow::Result<()> {
        let taken = store.row(from)?;
        if taken == Row::default() {
            return Ok(());
        }
        let whole = sum([self.row(to)?, taken].iter());
        self.rows.set(CARRIED_NOTE, whole, 0).context("note of a move of counts")?;
        self.note(Move { of: store.id(), from: from as u16, to: to as u16 }.encode())?;
        self.rows.set(to, whole, 0).context("move of counts")?;
        store.clear(from)?;
        self.note(0)
    }

    /// Ends a move that somebody was killed in. `roots`: of every ABI that is there.
    pub(super) fn finish(&mut self, roots: &[PathBuf]) -> anyhow::Result<()> {
        let noted = self.about.get(&about::MOVE, 0).context("read of a move of counts")?;
        let Some(begun) = Move::decode(noted) else { return Ok(()) };
        let whole = self.row(CARRIED_NOTE)?;
        self.rows.set(u32::from(begun.to), whole, 0).context("move of counts")?;
        let stores = roots.iter().filter_map(|root| Store::all(root).ok()).flatten();
        for mut store in stores.filter(|store| store.id() == begun.of) {
            store.clear(u32::from(begun.from))?;
        }
        self.note(0)
    }

    fn note(&mut self, word: u64) -> anyhow::Result<()> {
        self.about.set(about::MOVE, word, 0).context("note of a move of counts")
    }
}

/// A row of the map with the kernel's number `of` to one of the carried rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Move {
    of: u32,
    from: u16,
    to: u16,
}

impl Move {
    fn encode(self) -> u64 {
        u64::from(self.of) << 32 | u64::from(self.from) << 16 | u64::from(self.to)
    }

    /// `None`: nothing is under way. No map has the number 0.
    fn decode(word: u64) -> Option<Self> {
        let Move { of, from, to } =
            Move { of: (word >> 32) as u32, from: (word >> 16) as u16, to: word as u16 };
        (of != 0 && u32::from(from) < ROWS && u32::from(to) < ROWS).then_some(Move { of, from, to })
    }
}

fn is_there(pin: &Path) -> anyhow::Result<bool> {
    match sys::bpf::open_pin(pin) {
        Ok(_) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error).with_context(|| format!("open of {}", pin.display())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_noted_move_is_read_back_and_damage_is_none() {
        let noted = Move { of: u32::MAX, from: (ROWS - 1) as u16, to: 3 };
        assert_eq!(Move::decode(noted.encode()), Some(noted));
        assert_eq!(Move::decode(0), None);
        assert_eq!(Move::decode(Move { from: ROWS as u16, ..noted }.encode()), None);
        assert_eq!(Move::decode(Move { to: u16::MAX, ..noted }.encode()), None);
    }
}
