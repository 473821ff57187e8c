//! Looks at the fleet that were kept, one file each, so many and no more.

use std::fs::{self, DirBuilder, File};
use std::io::Read;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use anyhow::Context;

use crate::fleet::history::{SNAPSHOTS_MAX, Snapshot};
use crate::sys::file;

const PREFIX: &str = "fleet-";
const SUFFIX: &str = ".json";
/// 10,000 nodes have a fifth of it.
const BYTES_MAX: u64 = 8 << 20;

/// What was kept of this fleet, oldest first. Files that are none of ours are passed over.
pub fn read(folder: &Path, fleet: &str) -> anyhow::Result<Vec<Snapshot>> {
    if !folder.exists() {
        return Ok(Vec::new());
    }
    let mut out: Vec<Snapshot> = Vec::new();
    let files = files(folder)?;
    for (_, path) in files.iter().skip(files.len().saturating_sub(SNAPSHOTS_MAX)) {
        let mut text = String::new();
        let file = File::open(path).with_context(|| format!("open {}", path.display()))?;
        // One that is not whole, or not to be read, is as if it had not been kept.
        if file.take(BYTES_MAX).read_to_string(&mut text).is_err() {
            continue;
        }
        let snapshot = serde_json::from_str::<Snapshot>(&text);
        out.extend(snapshot.ok().filter(|snapshot| snapshot.version == 1 && snapshot.fleet == fleet));
    }
    Ok(out)
}

/// Keeps one more, whole or not at all, and lets the oldest go.
pub fn keep(folder: &Path, snapshot: &Snapshot) -> anyhow::Result<()> {
    let what = || format!("keep a look in {}", folder.display());
    DirBuilder::new().recursive(true).mode(0o700).create(folder).with_context(what)?;
    let text = serde_json::to_string(snapshot).with_context(what)?;
    replace(&folder.join(format!("{PREFIX}{:012}{SUFFIX}", snapshot.at)), text.as_bytes(), 0o600)?;
    let files = files(folder)?;
    for (_, path) in files.iter().take(files.len().saturating_sub(SNAPSHOTS_MAX)) {
        fs::remove_file(path).with_context(|| format!("remove {}", path.display()))?;
    }
    Ok(())
}

/// Puts a file in place by one rename. The error names it.
pub fn replace(path: &Path, bytes: &[u8], mode: u32) -> anyhow::Result<()> {
    file::replace(path, bytes, mode).with_context(|| format!("write {}", path.display()))
}

/// In the order of their times.
fn files(folder: &Path) -> anyhow::Result<Vec<(i64, PathBuf)>> {
    let what = || format!("list {}", folder.display());
    let mut out = Vec::new();
    for entry in fs::read_dir(folder).with_context(what)? {
        let path = entry.with_context(what)?.path();
        let name = path.file_name().and_then(|name| name.to_str());
        let at = name.and_then(|name| name.strip_prefix(PREFIX)?.strip_suffix(SUFFIX)?.parse::<i64>().ok());
        out.extend(at.map(|at| (at, path)));
    }
    out.sort();
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn so_many_are_kept_and_no_more() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path().join("looks");
        assert!(read(&folder, "f").unwrap().is_empty());
        let at = |at: i64| Snapshot { version: 1, fleet: "f".into(), at, nodes: Default::default() };
        for n in 0..SNAPSHOTS_MAX as i64 + 5 {
            keep(&folder, &at(n)).unwrap();
        }
        fs::write(folder.join("fleet-000000009999.json"), "{half").unwrap();
        fs::write(folder.join("notes.txt"), "mine").unwrap();
        let other = Snapshot { fleet: "other".into(), ..at(10_000) };
        keep(&folder, &other).unwrap();
        let read = read(&folder, "f").unwrap();
        assert_eq!(read.len(), SNAPSHOTS_MAX - 2, "a broken one and another fleet's take their places");
        assert_eq!(read.last().unwrap().at, SNAPSHOTS_MAX as i64 + 4);
        assert_eq!(fs::read_dir(&folder).unwrap().count(), SNAPSHOTS_MAX + 1);
        assert!(folder.join("notes.txt").exists());
    }
}
