//! The policy file, watched: on SIGHUP at once, on change after it has settled.
//!
//! inotify says when to look, on the directory of the file and of every link on the way to
//! it, since files are replaced by rename and NixOS's /etc is all links. Where that does not
//! work the tick finds out. A file that is being written may be a valid policy of half the
//! size, so a change is taken up only when a second look finds the same.

use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::mem::MaybeUninit;
use std::os::fd::BorrowedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::inotify;
use tokio::time::Instant;

use super::Daemon;
use crate::desired::Desired;
use crate::observed::Facet;
use crate::policy;
use crate::sys::clock;
use crate::sys::sockets::Readable;

/// Between the first look at a change and the one that must find the same.
const SETTLE: Duration = Duration::from_millis(150);
/// Links on the way to the file; the kernel follows 40.
const LINKS_MAX: usize = 40;

/// What the file says: a policy, or why it can't be one.
type Said = Result<Box<Desired>, String>;

pub struct PolicyFile {
    path: PathBuf,
    watch: Option<Readable>,
    names: BTreeSet<OsString>,
    /// What tells an unchanged file apart without reading it.
    marks: Option<Marks>,
    /// The fingerprint or the mistake that was taken up last.
    known: Result<String, String>,
    /// What the last look found, where that was something new.
    candidate: Option<Result<String, String>>,
    due: Option<Instant>,
}

type Marks = (u64, u64, u64, (i64, i64), (i64, i64));

impl PolicyFile {
    /// `known`: the fingerprint of what was loaded from it.
    pub fn open(path: &Path, known: String) -> Self {
        let mut file = Self {
            path: path.to_owned(),
            watch: None,
            names: BTreeSet::new(),
            marks: marks(path),
            known: Ok(known),
            candidate: None,
            due: None,
        };
        file.watch_again();
        // It may have changed between being loaded and being watched.
        file.due = Some(Instant::now());
        file
    }

    /// Waits until it is time to [`Self::look`].
    pub async fn change(&mut self) {
        loop {
            let due = self.due;
            let Some(watch) = &self.watch else { return super::sleep_until(due).await };
            tokio::select! {
                () = super::sleep_until(due) => return,
                named = watch.take(|watch| drain(watch, &self.names)) => match named {
                    Ok(true) => self.due = Some(Instant::now() + SETTLE),
                    Ok(false) => {}
                    Err(error) => {
                        log::debug!("{}: {error}; looking every 10 s instead", self.path.display());
                        self.watch = None;
                    }
                }
            }
        }
    }

    /// For the tick: has it changed without an event?
    pub fn tick(&mut self) {
        if self.due.is_none() && (marks(&self.path) != self.marks || self.candidate.is_some()) {
            self.due = Some(Instant::now());
        }
    }

    /// What it says now, if that is new and has settled; `at_once`: whatever it says.
    fn look(&mut self, at_once: bool) -> Option<Said> {
        self.due = None;
        self.marks = marks(&self.path);
        let said = read(&self.path);
        let brief = match &said {
            Ok(desired) => Ok(policy::fingerprint(&desired.policy)),
            Err(mistake) => Err(mistake.clone()),
        };
        if brief == self.known && !at_once {
            self.candidate = None;
            return None;
        }
        if !at_once && self.candidate.as_ref() != Some(&brief) {
            self.candidate = Some(brief);
            self.due = Some(Instant::now() + SETTLE);
            return None;
        }
        self.candidate = None;
        self.known = brief;
        self.watch_again();
        Some(said)
    }

    /// Links may lead elsewhere now.
    fn watch_again(&mut self) {
        let flags = inotify::WatchFlags::CLOSE_WRITE
            | inotify::WatchFlags::MOVED_TO
            | inotify::WatchFlags::MOVED_FROM
            | inotify::WatchFlags::CREATE
            | inotify::WatchFlags::DELETE
            | inotify::WatchFlags::ONLYDIR;
        let open = || {
            let watch = inotify::init(inotify::CreateFlags::NONBLOCK | inotify::CreateFlags::CLOEXEC)?;
            let mut names = BTreeSet::new();
            for step in steps(&self.path) {
                let (Some(dir), Some(name)) = (step.parent(), step.file_name()) else { continue };
                // A directory that is not there yet is met by the tick.
                let _ = inotify::add_watch(&watch, dir, flags);
                names.insert(name.to_owned());
            }
            Ok::<_, std::io::Error>((Readable::new(watch)?, names))
        };
        match open() {
            Ok((watch, names)) => (self.watch, self.names) = (Some(watch), names),
            Err(error) => {
                log::debug!("{}: {error}; looking every 10 s instead", self.path.display());
                self.watch = None;
            }
        }
    }
}

impl Daemon {
    /// The file has changed, as far as events and the tick know.
    pub(super) fn on_policy_file(&mut self, file: &mut PolicyFile) {
        if let Some(said) = file.look(false) {
            self.heed(said, file);
        }
    }

    /// SIGHUP.
    pub(super) fn on_hangup(&mut self, file: &mut PolicyFile) {
        super::notify::reloading();
        if let Some(said) = file.look(true) {
            self.heed(said, file);
        }
        super::notify::ready();
    }

    /// A bad policy changes nothing; it is told once.
    fn heed(&mut self, said: Said, file: &PolicyFile) {
        match said {
            Ok(desired) => {
                if self.standing.mistake.take().is_some() {
                    self.wake([Facet::Files], Duration::ZERO);
                }
                self.take_up(*desired);
            }
            Err(mistake) => self.refuse(&file.path, mistake),
        }
    }
}

/// The policy and what follows from it, or the first mistake in one line.
fn read(path: &Path) -> Said {
    match crate::cli::load_policy(path, clock::now()) {
        Ok((_, desired)) => Ok(Box::new(desired)),
        Err(error) => {
            let text = format!("{error:#}");
            let line = text.lines().find(|line| !line.trim().is_empty()).unwrap_or_default();
            let place = text.lines().find_map(|line| line.trim().strip_prefix("--> "));
            let first = line.strip_prefix("error: ").unwrap_or(line);
            Err(place.map_or_else(|| first.to_owned(), |place| format!("{place}: {first}")))
        }
    }
}

fn marks(path: &Path) -> Option<Marks> {
    let meta = std::fs::metadata(path).ok()?;
    let times = ((meta.mtime(), meta.mtime_nsec()), (meta.ctime(), meta.ctime_nsec()));
    Some((meta.dev(), meta.ino(), meta.len(), times.0, times.1))
}

/// Every path on the way to the file: the file itself, its directories that are links, and
/// where each of those leads.
fn steps(path: &Path) -> Vec<PathBuf> {
    let mut out = Vec::new();
    let mut open = vec![std::path::absolute(path).unwrap_or_else(|_| path.to_owned())];
    while let Some(next) = open.pop() {
        if out.contains(&next) || out.len() >= LINKS_MAX {
            continue;
        }
        let mut at = PathBuf::from("/");
        let mut parts = next.components().skip(1).peekable();
        while let Some(part) = parts.next() {
            at.push(part);
            let Ok(target) = std::fs::read_link(&at) else { continue };
            let target = at.parent().unwrap_or(Path::new("/")).join(target);
            open.push(target.join(parts.clone().collect::<PathBuf>()));
            if parts.peek().is_some() && !out.contains(&at) {
                out.push(at.clone());
            }
        }
        out.push(next);
    }
    out
}

/// Takes the events in. `true`: one of them was about a name on the way to the file.
fn drain(watch: BorrowedFd<'_>, names: &BTreeSet<OsString>) -> std::io::Result<bool> {
    let mut buffer = [MaybeUninit::uninit(); 4096];
    let mut reader = inotify::Reader::new(watch, &mut buffer);
    let (mut named, mut any) = (false, false);
    loop {
        match reader.next() {
            Ok(event) => {
                let name = event.file_name().map(|name| OsStr::from_bytes(name.to_bytes()));
                // Without a name: the queue ran over, or the directory itself went away.
                named |= name.is_none_or(|name| names.contains(name));
                any = true;
            }
            Err(rustix::io::Errno::AGAIN) if any => return Ok(named),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_link_on_the_way_is_watched() {
        let dir = tempfile::tempdir().expect("a directory");
        let real = std::fs::canonicalize(dir.path()).expect("a path");
        let at = |name: &str| real.join(name);
        std::fs::create_dir_all(at("store/1")).expect("create");
        std::fs::write(at("store/1/policy.toml"), "").expect("write");
        std::os::unix::fs::symlink(at("store/1"), at("static")).expect("link");
        std::fs::create_dir(at("etc")).expect("create");
        std::os::unix::fs::symlink("../static/policy.toml", at("etc/policy.toml")).expect("link");
        let found = steps(&at("etc/policy.toml"));
        let names: Vec<_> = found.iter().map(|step| step.display().to_string()).collect();
        assert!(names.iter().any(|step| step.ends_with("etc/policy.toml")), "{names:?}");
        assert!(found.iter().any(|step| step.ends_with("static")), "{names:?}");
        assert!(found.contains(&at("store/1/policy.toml")), "{names:?}");
        // A circle ends.
        std::os::unix::fs::symlink(at("b"), at("a")).expect("link");
        std::os::unix::fs::symlink(at("a"), at("b")).expect("link");
        assert!(steps(&at("a")).len() < LINKS_MAX);
    }

    #[tokio::test]
    async fn a_change_is_heard_and_taken_up_when_it_has_settled() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("policy.toml");
        let write = |policy: &crate::policy::Policy| {
            std::fs::write(dir.path().join("new"), policy::show(policy)).expect("write");
            std::fs::rename(dir.path().join("new"), &path).expect("rename");
        };
        let first = crate::desired::samples::spoke();
        write(&first);
        let mut file = PolicyFile::open(&path, policy::fingerprint(&first));
        assert!(file.watch.is_some());
        file.change().await;
        assert!(file.look(false).is_none(), "it is what was loaded");
        let mut second = first.clone();
        second.public.tcp.pop();
        write(&second);
        let limit = Duration::from_secs(10);
        let mut looks = 0;
        let said = loop {
            tokio::time::timeout(limit, file.change()).await.expect("an event, and no tick");
            looks += 1;
            if let Some(said) = file.look(false) {
                break said;
            }
        };
        assert_eq!(said.expect("a policy").policy.public.tcp, second.public.tcp);
        assert_eq!(looks, 2);
        // The name of somebody else's file wakes nobody.
        std::fs::write(dir.path().join("other"), "x").expect("write");
        assert!(tokio::time::timeout(SETTLE * 3, file.change()).await.is_err());
        // What is no policy is told with its place; and once.
        std::fs::write(&path, "version = 1\nnonsense = 2\n").expect("write");
        let mistake = loop {
            tokio::time::timeout(limit, file.change()).await.expect("an event");
            if let Some(said) = file.look(false) {
                break said.expect_err("a mistake");
            }
        };
        assert!(mistake.contains("policy.toml:") && !mistake.contains('\n'), "{mistake}");
        assert!(file.look(false).is_none() && file.look(true).is_some());
    }
}
