//! A directory of rendered files, replaced as a whole: a new one is built beside it and the two
//! are exchanged by one rename, so that whoever reads sees the old tree or the new, whenever we
//! are killed. Files of others in it are carried over.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, ErrorKind, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, symlink};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail, ensure};
use rustix::fs::{CWD, FlockOperation, RenameFlags, flock, renameat_with, syncfs};

use crate::fleet::render::{Files, MARK, MARK_WITHIN};
use crate::terms::printable;

/// A directory with more entries is somebody else's.
const ENTRIES_MAX: usize = 200_000;
/// No rendered file is larger.
const BYTES_MAX: u64 = 64 << 20;

/// What lies in the directory, by path below it.
#[derive(Debug, Default)]
pub struct Found {
    /// Files that carry our mark, with their text.
    pub ours: Files,
    /// Everything else but directories.
    foreign: BTreeMap<String, Sort>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sort {
    File,
    Link,
}

/// What writing would change, by path.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Changes {
    pub added: Vec<String>,
    pub changed: Vec<String>,
    pub removed: Vec<String>,
}

impl Changes {
    pub fn are_none(&self) -> bool {
        self == &Self::default()
    }
}

/// Where rendered files go.
#[derive(Debug)]
pub struct Tree {
    /// Absolute; symbolic links are followed.
    root: PathBuf,
}

impl Tree {
    /// `inventory` must not be in it, nor may it be where somebody works.
    pub fn new(root: &Path, inventory: &Path) -> anyhow::Result<Self> {
        let root = match root.canonicalize() {
            Ok(root) => root,
            Err(error) if error.kind() == ErrorKind::NotFound => std::path::absolute(root)?,
            Err(error) => return Err(error).with_context(|| format!("look at {}", root.display())),
        };
        let inside = |path: Option<PathBuf>| path.is_some_and(|path| path.starts_with(&root));
        let shown = root.display();
        ensure!(!root.exists() || root.is_dir(), "{shown}: not a directory");
        ensure!(
            !inside(inventory.canonicalize().ok())
                && !inside(std::env::current_dir().ok())
                && !root.join(".git").exists(),
            "{shown} holds the inventory, a repository or this shell, and would be replaced as a whole: \
             write --out rendered"
        );
        Ok(Self { root })
    }

    pub fn shown(&self) -> String {
        printable(&self.root.to_string_lossy(), 200)
    }

    /// Everything in it; nothing where it isn't there.
    pub fn read(&self) -> anyhow::Result<Found> {
        let mut found = Found::default();
        let mut folders = vec![PathBuf::new()];
        let mut entries = 0;
        while let Some(folder) = folders.pop() {
            let at = self.root.join(&folder);
            let list = match fs::read_dir(&at) {
                Err(error) if error.kind() == ErrorKind::NotFound && folder.as_os_str().is_empty() => break,
                list => list.with_context(|| format!("list {}", at.display()))?,
            };
            for entry in list {
                let entry = entry.with_context(|| format!("list {}", at.display()))?;
                entries += 1;
                ensure!(entries <= ENTRIES_MAX, "{}: more than {ENTRIES_MAX} entries", self.shown());
                let below = folder.join(entry.file_name());
                let sort =
                    entry.file_type().with_context(|| format!("look at {}", entry.path().display()))?;
                let Some(path) = below.to_str().map(str::to_owned) else {
                    bail!("{}: its name is not UTF-8", printable(&entry.path().to_string_lossy(), 400));
                };
                if sort.is_dir() {
                    folders.push(below);
                } else if sort.is_symlink() {
                    found.foreign.insert(path, Sort::Link);
                } else if !sort.is_file() {
                    bail!(
                        "{}: neither a file nor a directory",
                        printable(&entry.path().to_string_lossy(), 400)
                    );
                } else if let Some(text) = ours(&entry.path())? {
                    found.ours.insert(path, text);
                } else {
                    found.foreign.insert(path, Sort::File);
                }
            }
        }
        Ok(found)
    }

    /// What would change by writing these. A file of somebody else in the way is an error.
    pub fn changes(&self, found: &Found, wanted: &Files, whole: bool) -> anyhow::Result<Changes> {
        let mut changes = Changes::default();
        let mut in_the_way = Vec::new();
        for (path, text) in wanted {
            let above = Path::new(path).ancestors().skip(1).filter_map(Path::to_str);
            if let Some(other) =
                std::iter::once(path.as_str()).chain(above).find(|path| found.foreign.contains_key(*path))
            {
                in_the_way.push(format!("  {}", self.root.join(other).display()));
                continue;
            }
            match found.ours.get(path) {
                None => changes.added.push(path.clone()),
                Some(old) if old != text => changes.changed.push(path.clone()),
                Some(_) => {}
            }
        }
        in_the_way.dedup();
        if !in_the_way.is_empty() {
            in_the_way.truncate(20);
            let list = in_the_way.join("\n");
            bail!("these were not written by us and stand in the way; move them away:\n{list}");
        }
        if whole {
            changes.removed = found.ours.keys().filter(|path| !wanted.contains_key(*path)).cloned().collect();
        }
        Ok(changes)
    }

    /// Puts it all in place, or leaves everything as it was.
    pub fn write(&self, wanted: &Files, whole: bool) -> anyhow::Result<Changes> {
        let parent = self.root.parent().context("the root directory can't be rendered into")?;
        let name = self.root.file_name().context("a directory needs a name")?.to_string_lossy().into_owned();
        let _lock = lock(parent)?;
        // Looked at again under the lock: nobody else writes from here on.
        let found = self.read()?;
        let changes = self.changes(&found, wanted, whole)?;
        if changes.are_none() {
            return Ok(changes);
        }
        let new = parent.join(format!(".{name}.spokeguard-new"));
        let clear = || match fs::remove_dir_all(&new) {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
            result => result.with_context(|| format!("remove {}", new.display())),
        };
        // Of a render that was killed.
        clear()?;
        let built = self.build(&new, &found, wanted, &changes).and_then(|()| self.exchange(&new));
        let cleared = clear();
        built?;
        cleared?;
        sync(parent)?;
        Ok(changes)
    }

    fn build(&self, new: &Path, found: &Found, wanted: &Files, changes: &Changes) -> anyhow::Result<()> {
        // Must be ours alone: beside the inventory others may be able to write.
        let made = DirBuilder::new().mode(0o755).create(new);
        made.with_context(|| format!("create {}", new.display()))?;
        let other: BTreeSet<&String> = changes.changed.iter().chain(&changes.removed).collect();
        let same = found.ours.keys().filter(|path| !other.contains(path));
        let foreign_files =
            found.foreign.iter().filter(|(_, sort)| **sort == Sort::File).map(|(path, _)| path);
        for path in same.chain(foreign_files) {
            let (from, to) = (self.root.join(path), new.join(path));
            above(&to)?;
            fs::hard_link(&from, &to).with_context(|| format!("carry {} over", from.display()))?;
        }
        for (path, _) in found.foreign.iter().filter(|(_, sort)| **sort == Sort::Link) {
            let (from, to) = (self.root.join(path), new.join(path));
            above(&to)?;
            let target = fs::read_link(&from);
            let made = target.and_then(|target| symlink(target, &to));
            made.with_context(|| format!("carry {} over", from.display()))?;
        }
        for path in changes.added.iter().chain(&changes.changed) {
            let to = new.join(path);
            above(&to)?;
            let mut options = OpenOptions::new();
            let file = options.write(true).create_new(true).mode(0o644).open(&to);
            let written = file.and_then(|mut file| file.write_all(wanted[path].as_bytes()));
            written.with_context(|| format!("write {}", to.display()))?;
        }
        sync(new)
    }

    fn exchange(&self, new: &Path) -> anyhow::Result<()> {
        let what = || format!("put {} in place", self.root.display());
        if !self.root.exists() {
            return fs::rename(new, &self.root).with_context(what);
        }
        match renameat_with(CWD, new, CWD, &self.root, RenameFlags::EXCHANGE) {
            // Network file systems know no exchange.
            Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOSYS) => {
                let old = new.with_extension("old");
                fs::rename(&self.root, &old).with_context(what)?;
                if let Err(error) = fs::rename(new, &self.root) {
                    let _ = fs::rename(&old, &self.root);
                    return Err(error).with_context(what);
                }
                fs::remove_dir_all(&old).with_context(|| format!("remove {}", old.display()))
            }
            result => Ok(result.with_context(what)?),
        }
    }
}

/// Held while it lives, so that of two writers beside each other the second is told.
pub fn lock(folder: &Path) -> anyhow::Result<File> {
    let file = File::open(folder).with_context(|| format!("open {}", folder.display()))?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(rustix::io::Errno::WOULDBLOCK) => {
            bail!("another spokeguard is writing in {}: try again when it is done", folder.display())
        }
        Err(error) => Err(error).with_context(|| format!("lock {}", folder.display())),
    }
}

fn sync(folder: &Path) -> anyhow::Result<()> {
    let done = File::open(folder).and_then(|file| Ok(syncfs(&file)?));
    done.with_context(|| format!("flush {}", folder.display()))
}

fn above(path: &Path) -> anyhow::Result<()> {
    path.parent().map_or(Ok(()), folder)
}

fn folder(path: &Path) -> anyhow::Result<()> {
    let made = DirBuilder::new().recursive(true).mode(0o755).create(path);
    made.with_context(|| format!("create {}", path.display()))
}

/// The text of a file of ours.
fn ours(path: &Path) -> anyhow::Result<Option<String>> {
    let fail = || format!("read {}", path.display());
    let mut file = File::open(path).with_context(fail)?;
    let mut text = Vec::new();
    io::Read::by_ref(&mut file).take(MARK_WITHIN as u64).read_to_end(&mut text).with_context(fail)?;
    if !text.windows(MARK.len()).any(|window| window == MARK.as_bytes()) {
        return Ok(None);
    }
    file.take(BYTES_MAX).read_to_end(&mut text).with_context(fail)?;
    Ok(Some(String::from_utf8_lossy(&text).into_owned()))
}
