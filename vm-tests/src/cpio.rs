//! Archives as the kernel unpacks them at boot (newc). Several in a row are one root; a later file replaces an earlier.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

const FILE: u32 = 0o100_000;
const FOLDER: u32 = 0o040_000;
const LINK: u32 = 0o120_000;

/// Debian's own packages still say /bin, where the systems that they are installed on have a link to /usr/bin.
const MERGED: [&str; 4] = ["bin", "sbin", "lib", "lib64"];

/// What a root will hold, by path without a leading slash; folders above come by themselves. Everything is root's.
#[derive(Default)]
pub struct Tree {
    entries: BTreeMap<String, Entry>,
}

enum Entry {
    Folder(u32),
    Link(String),
    Copy(u32, PathBuf),
    Text(u32, Vec<u8>),
}

impl Tree {
    pub fn file(&mut self, path: &str, mode: u32, bytes: impl Into<Vec<u8>>) {
        self.put(path, Entry::Text(mode, bytes.into()));
    }

    /// A file of this machine, read when the archive is written; its permissions go with it.
    pub fn copy(&mut self, path: &str, from: &Path) -> Result<()> {
        let mode = fs::metadata(from).with_context(|| format!("look at {}", from.display()))?;
        self.put(path, Entry::Copy(mode.permissions().mode() & 0o7777, from.to_path_buf()));
        Ok(())
    }

    pub fn link(&mut self, path: &str, to: &str) {
        self.put(path, Entry::Link(to.to_owned()));
    }

    pub fn folder(&mut self, path: &str, mode: u32) {
        self.put(path, Entry::Folder(mode));
    }

    pub fn has(&self, path: &str) -> bool {
        self.entries.contains_key(&merged(path))
    }

    /// Everything below a folder of this machine that `keep` wants by its path there.
    pub fn below(&mut self, at: &str, folder: &Path, keep: &dyn Fn(&str) -> bool) -> Result<()> {
        let entries = fs::read_dir(folder).with_context(|| format!("list {}", folder.display()))?;
        for entry in entries {
            let entry = entry.with_context(|| format!("list {}", folder.display()))?;
            let name = entry.file_name();
            let name = name.to_str().with_context(|| format!("{name:?} is not UTF-8"))?;
            let path = if at.is_empty() { name.to_owned() } else { format!("{at}/{name}") };
            if !keep(&path) {
                continue;
            }
            let kind = entry.file_type().with_context(|| format!("look at {path}"))?;
            if kind.is_dir() {
                self.below(&path, &entry.path(), keep)?;
            } else if kind.is_symlink() {
                let to = fs::read_link(entry.path()).with_context(|| format!("read the link {path}"))?;
                self.link(
                    &path,
                    to.to_str().with_context(|| format!("{path} leads to a name not in UTF-8"))?,
                );
            } else if kind.is_file() {
                self.copy(&path, &entry.path())?;
            }
        }
        Ok(())
    }

    pub fn write(&self, out: &mut dyn Write) -> Result<()> {
        for (number, (path, entry)) in (1..).zip(&self.entries) {
            let (mode, bytes) = match entry {
                Entry::Folder(mode) => (FOLDER | mode, Vec::new()),
                Entry::Link(to) => (LINK | 0o777, to.clone().into_bytes()),
                Entry::Text(mode, bytes) => (FILE | mode, bytes.clone()),
                Entry::Copy(mode, from) => {
                    (FILE | mode, fs::read(from).with_context(|| format!("read {}", from.display()))?)
                }
            };
            record(out, number, mode, path, &bytes).with_context(|| format!("archive {path}"))?;
        }
        record(out, 0, 0, "TRAILER!!!", &[])
    }

    fn put(&mut self, path: &str, entry: Entry) {
        let path = merged(path);
        for (end, _) in path.match_indices('/') {
            self.entries.entry(path[..end].to_owned()).or_insert(Entry::Folder(0o755));
        }
        self.entries.insert(path, entry);
    }
}

fn merged(path: &str) -> String {
    let path = path.trim_start_matches('/');
    let first = path.split('/').next().unwrap_or_default();
    if MERGED.contains(&first) && path.contains('/') { format!("usr/{path}") } else { path.to_owned() }
}

fn record(out: &mut dyn Write, number: u32, mode: u32, path: &str, bytes: &[u8]) -> Result<()> {
    ensure!(bytes.len() <= u32::MAX as usize, "too long for this format");
    // Magic, then in hexadecimal: inode, mode, owner, group, links, time, size, device, device, path's length, 0.
    let head = [number, mode, 0, 0, 1, 0, bytes.len() as u32, 0, 0, 0, 0, path.len() as u32 + 1, 0];
    let mut record = b"070701".to_vec();
    for word in head {
        write!(record, "{word:08x}")?;
    }
    record.extend_from_slice(path.as_bytes());
    record.push(0);
    pad(&mut record);
    out.write_all(&record)?;
    out.write_all(bytes)?;
    out.write_all(&[0; 3][..(4 - bytes.len() % 4) % 4])?;
    Ok(())
}

fn pad(record: &mut Vec<u8>) {
    record.resize(record.len().next_multiple_of(4), 0);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_come_first_and_old_places_lead_to_the_new_ones() {
        let mut tree = Tree::default();
        tree.file("/sbin/tool", 0o755, "abcde");
        tree.link("bin", "usr/bin");
        let mut out = Vec::new();
        tree.write(&mut out).unwrap();
        assert_eq!(out.len() % 4, 0);
        let names: Vec<String> = (0..out.len() - 5)
            .filter(|at| out[*at..].starts_with(b"070701"))
            .map(|at| {
                let name = &out[at + 110..];
                String::from_utf8_lossy(&name[..name.iter().position(|byte| *byte == 0).unwrap()])
                    .into_owned()
            })
            .collect();
        assert_eq!(names, ["bin", "usr", "usr/sbin", "usr/sbin/tool", "TRAILER!!!"]);
        assert!(tree.has("sbin/tool") && tree.has("/usr/sbin/tool") && !tree.has("bin/tool"));
    }
}
