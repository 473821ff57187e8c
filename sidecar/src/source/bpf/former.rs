//! What daemons of other ABIs left pinned beside ours (`abi1/` beside `abi2/`). Their links
//! are taken over one by one, each exchanging its program at once ([`super::attach`]); then
//! nothing counts for them any more, and their counts come to ours.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use anyhow::Context as _;
use aya::maps::{Array, Map};
use sidecar_ebpf::{ClassEntry, NO_CLASS, PROTOS, about, maps, row_index};

use super::carried::{Carried, Store};
use super::config::{Classes, identity};
use super::{classes_in_use, map};

/// The directories `STEM<N>` of other ABIs than this one, oldest first.
pub(super) fn roots(pin_dir: &Path, stem: &str, abi: u32) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(pin_dir) else { return Vec::new() };
    let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let mut found: Vec<u32> =
        names.filter_map(|name| number(&name, stem)).filter(|other| *other != abi).collect();
    found.sort_unstable();
    found.into_iter().map(|abi| pin_dir.join(format!("{stem}{abi}"))).collect()
}

fn number(name: &str, stem: &str) -> Option<u32> {
    let number = name.strip_prefix(stem)?;
    // Only what we write ourselves: no sign, no leading zero.
    number.parse().ok().filter(|n: &u32| n.to_string() == number)
}

/// Moves everything that was counted below `former` to ours, by service, and takes the rest
/// of it away. Every program of it must have ended. `false`: it is of an ABI that came after
/// this one, whose rows can't be read; its counts stay for who can.
pub(super) fn take_over(former: &Path, carried: &mut Carried, ours: &Classes) -> anyhow::Result<bool> {
    let is_known = former.file_name().and_then(|name| name.to_str()).and_then(|name| number(name, STEM));
    if is_known.is_none_or(|abi| !(FIRST_READ..sidecar_ebpf::ABI).contains(&abi)) {
        return Ok(false);
    }
    // Somebody was killed while removing what had been moved already.
    let is_whole = [maps::CLASSES, maps::ROWS].iter().all(|name| former.join("maps").join(name).exists());
    if is_whole {
        // The same rows and classes in all of these; another one would be translated here.
        let theirs = classes_in_use(&Array::try_from(Map::Array(map(former, maps::CLASSES)?))?)?;
        let to = destinations(&theirs, ours);
        for mut store in Store::all(former)? {
            to.iter().try_for_each(|(from, to)| carried.take(&mut store, *from, *to))?;
        }
    }
    fs::remove_dir_all(former).with_context(|| format!("removal of {}", former.display()))?;
    Ok(true)
}

/// Directories of the counters are called this and a number.
pub(super) const STEM: &str = "abi";
/// The oldest ABI whose rows we read.
const FIRST_READ: u32 = 1;

/// Rows of theirs by the row of ours that counts the same. A service that we don't have
/// counts as none.
fn destinations(theirs: &Classes, ours: &Classes) -> BTreeMap<u32, u32> {
    let same = |entry: &ClassEntry| {
        let found = ours.iter().find(|(_, own)| identity(own) == identity(entry));
        found.map(|(class, _)| row_index(*class, 0))
    };
    let none = |proto: u8| row_index(NO_CLASS, usize::from(proto & 3));
    let known = theirs
        .iter()
        .map(|(class, entry)| (row_index(*class, 0), same(entry).unwrap_or_else(|| none(entry.proto))));
    // What ABI 1 kept of services that were gone it no longer told either, as nobody knows
    // what it was.
    known.chain((0..PROTOS as u8).map(|proto| (none(proto), none(proto)))).collect()
}

/// When counting began there, in seconds of Unix time. ABI 1 did not write it down, so it is
/// the time of the pin.
pub(super) fn created(root: &Path) -> Option<u64> {
    let about = map(root, maps::BUILD).ok().and_then(|map| Array::<_, u64>::try_from(Map::Array(map)).ok());
    let written = about.and_then(|about| about.get(&about::CREATED, 0).ok());
    if let Some(written @ 1..) = written {
        return Some(written);
    }
    let pinned = fs::metadata(root.join("maps").join(maps::ROWS)).ok()?.modified().ok()?;
    Some(pinned.duration_since(UNIX_EPOCH).ok()?.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_directories_that_we_made_are_another_abis() {
        assert_eq!(number("abi1", "abi"), Some(1));
        for other in ["abi", "abi01", "abi+1", "abi1_new", "guard1", "abi4294967296", ""] {
            assert_eq!(number(other, "abi"), None, "{other}");
        }
        let dir = tempfile::tempdir().expect("a directory");
        for name in ["abi1", "abi2", "abi10", "guard1", "abi3x"] {
            fs::create_dir(dir.path().join(name)).expect("a directory");
        }
        let found = roots(dir.path(), "abi", 2);
        assert_eq!(found, [dir.path().join("abi1"), dir.path().join("abi10")]);
        assert_eq!(roots(Path::new("/no/such/place"), "abi", 2), Vec::<PathBuf>::new());
    }

    #[test]
    fn counts_go_to_the_same_service_and_those_of_none_to_none() {
        let entry = |port, proto| ClassEntry { port, proto, used: 1, ..ClassEntry::default() };
        let theirs = Classes::from([(1, entry(80, 0)), (2, entry(53, 1)), (3, entry(443, 0))]);
        let ours = Classes::from([(1, entry(443, 0)), (7, entry(80, 0))]);
        let to = destinations(&theirs, &ours);
        let row = |class| row_index(class, 0);
        let none = (0..4).map(|proto| (proto, proto));
        assert_eq!(to, none.chain([(row(1), row(7)), (row(2), 1), (row(3), row(1))]).collect());
    }
}
