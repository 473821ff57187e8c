//! From a file to a [`Policy`], or to every mistake in it at once.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use jiff::civil::Date;
use serde::Serialize;

use super::mistake::{Mistake, Mistakes, Source};
use super::{Exception, Policy, read};

/// A larger file is refused before it is parsed.
pub const BYTES_MAX: u64 = 1 << 20;

/// A policy that was read, with what later checks need to point into its file.
#[derive(Clone, Debug)]
pub struct Loaded {
    pub policy: Policy,
    /// In the order of the file.
    pub notes: Vec<Note>,
    /// The name under which mistakes are shown.
    pub file: String,
    text: String,
    places: BTreeMap<String, std::ops::Range<usize>>,
}

/// Something true of a valid policy that its author will want to know.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Note {
    pub kind: NoteKind,
    /// The key, as [`Loaded::place`] takes it.
    pub key: String,
    #[serde(flatten)]
    pub mistake: Mistake,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum NoteKind {
    /// The key is valid and changes nothing yet, or nothing on this kind of node.
    NoEffect,
    /// An exception past its `until`. It grants nothing; `policy check` counts it as a
    /// mistake, and everything else must be able to close the hole it left.
    Expired,
}

#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    #[error("cannot {operation} {sort} {}", shown(file))]
    Read { operation: &'static str, sort: &'static str, file: PathBuf, source: io::Error },
    #[error("there is no {sort} {}{}", shown(file), if *sort == "policy" {
        ": write one (README.md has a small one), or name another with --policy"
    } else {
        ""
    })]
    Missing { sort: &'static str, file: PathBuf },
    #[error("{sort} {} is not a regular file", shown(file))]
    NotRegular { sort: &'static str, file: PathBuf },
    #[error("{sort} {} is larger than {bytes_max} bytes", shown(file))]
    TooLarge { sort: &'static str, file: PathBuf, bytes_max: u64 },
    #[error("{sort} {} is not UTF-8: line {line} holds the byte 0x{byte:02x}", shown(file))]
    NotUtf8 { sort: &'static str, file: PathBuf, line: usize, byte: u8 },
    #[error(transparent)]
    Mistakes(#[from] Mistakes),
}

/// Reads and checks a policy file. Never waits: a FIFO or a device is refused.
pub fn load(path: &Path, today: Date) -> Result<Loaded, LoadError> {
    let text = read_text(path, "policy", BYTES_MAX)?;
    Ok(parse(&text, &path.to_string_lossy(), today)?)
}

/// `file` is only a name to show. `today` (UTC) tells which exceptions have expired.
pub fn parse(text: &str, file: &str, today: Date) -> Result<Loaded, Mistakes> {
    let source = Source::new(text);
    let read = read::read(&source).map_err(|found| found.report(&source, file))?;
    let read::Read { policy, places, noted } = read;
    let mut notes: Vec<(usize, Note)> = Vec::new();
    let mut note = |kind, key: String, help: &str, what: &str| {
        let at = places.get(&key).cloned().unwrap_or(0..0);
        notes.push((at.start, Note { kind, key, mistake: source.mistake(at, what, help) }));
    };
    for (key, why) in noted {
        let what = format!("`{key}` has no effect{why}");
        note(NoteKind::NoEffect, key, "", &what);
    }
    for (i, exception) in policy.exceptions.iter().enumerate().filter(|(_, e)| !e.holds_on(today)) {
        let read::Wrong { what, help } = expired(exception);
        note(NoteKind::Expired, format!("exception[{i}].until"), &help, &what);
    }
    notes.sort_by_key(|(at, _)| *at);
    let notes = notes.into_iter().map(|(_, note)| note).collect();
    // Those of elements were only needed for the checks above.
    Ok(Loaded { policy, notes, file: file.to_owned(), text: text.to_owned(), places: places.keys })
}

/// What to say of an exception past its `until`.
pub(crate) fn expired(exception: &Exception) -> read::Wrong {
    let what = format!("exception \"{}\" expired: its last day was {}", exception.name, exception.until);
    read::wrong(what, "remove it, or agree on a new `until`; until then it opens nothing")
}

impl Loaded {
    /// Line and column (from 1) of a key such as `ssh.from` or `exception[0].until`, or of
    /// the nearest table around it that the file has.
    pub fn place(&self, key: &str) -> Option<(u32, u32)> {
        self.range(key).map(|range| Source::new(&self.text).place(range.start))
    }

    /// A mistake that a later check found, to be shown like all others.
    pub fn mistake(&self, key: &str, what: &str, help: &str) -> Mistakes {
        let at = self.range(key).unwrap_or(0..0);
        let mistake = Source::new(&self.text).mistake(at, what, help);
        Mistakes { file: self.file.clone(), list: vec![mistake], more: 0 }
    }

    /// The expired exceptions as mistakes, which is what `policy check` calls them.
    pub fn expired(&self) -> Option<Mistakes> {
        let list: Vec<Mistake> = self
            .notes
            .iter()
            .filter(|note| note.kind == NoteKind::Expired)
            .map(|note| note.mistake.clone())
            .collect();
        (!list.is_empty()).then(|| Mistakes { file: self.file.clone(), list, more: 0 })
    }

    fn range(&self, key: &str) -> Option<std::ops::Range<usize>> {
        let mut key = key;
        loop {
            if let Some(range) = self.places.get(key) {
                return Some(range.clone());
            }
            key = &key[..key.rfind('.')?];
        }
    }
}

/// The text of a file of this sort ("policy"), of at most so many bytes. Never waits.
pub fn read_text(path: &Path, sort: &'static str, bytes_max: u64) -> Result<String, LoadError> {
    let file = || path.to_path_buf();
    let fail =
        |operation| move |source| LoadError::Read { operation, sort, file: path.to_path_buf(), source };
    // Without O_NONBLOCK, opening a FIFO waits for a writer that may never come.
    let handle: File =
        OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(path).map_err(
            |error| match error.kind() {
                io::ErrorKind::NotFound => LoadError::Missing { sort, file: file() },
                _ => fail("open")(error),
            },
        )?;
    if !handle.metadata().map_err(fail("look at"))?.is_file() {
        return Err(LoadError::NotRegular { sort, file: file() });
    }
    let mut bytes = Vec::new();
    handle.take(bytes_max + 1).read_to_end(&mut bytes).map_err(fail("read"))?;
    if bytes.len() as u64 > bytes_max {
        return Err(LoadError::TooLarge { sort, file: file(), bytes_max });
    }
    String::from_utf8(bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        let bytes = error.as_bytes();
        let line = bytes[..at].iter().filter(|b| **b == b'\n').count() + 1;
        LoadError::NotUtf8 { sort, file: file(), line, byte: bytes.get(at).copied().unwrap_or(0) }
    })
}

fn shown(path: &Path) -> String {
    crate::terms::printable(&path.to_string_lossy(), 4096)
}
