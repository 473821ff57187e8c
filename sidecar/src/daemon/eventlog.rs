//! What happened here, for as long as nobody asked: JSON lines in the state directory,
//! bounded by rotation. Two files at most, `events.jsonl` and the older `events.jsonl.1`.
//!
//! Nothing is synced for each event: a power cut may cost the last ones, and may leave a
//! torn line, which reading skips. A disk that is full or read-only costs nothing but
//! memory, within a bound, until it is writable again.

use std::collections::VecDeque;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::diff::Code;
use crate::terms::{Actor, Stamp, printable};

const FILE: &str = "events.jsonl";
const OLD_FILE: &str = "events.jsonl.1";
const FILE_BYTES_MAX: u64 = 256 * 1024;
/// Events that wait for a disk to take them.
const QUEUE_MAX: usize = 256;
/// Longest subject and text of an event, in characters.
const TEXT_MAX: usize = 512;

/// One line of the log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    pub at: Stamp,
    pub kind: EventKind,
    /// The finding it is about; `null` for the daemon's own events.
    #[serde(default)]
    pub code: Option<Code>,
    pub subject: String,
    pub found: String,
    #[serde(default)]
    pub by: Option<Actor>,
    /// How long it took from the wake to the end of the repair.
    #[serde(default)]
    pub took_ms: Option<u64>,
    pub cycle: u64,
}

impl Event {
    /// For a log: when, and what a person wants to know of it.
    pub fn to_line(&self) -> String {
        format!("{} {}", self.at, self.told())
    }

    /// What, who, how fast.
    pub fn told(&self) -> String {
        let words = [self.kind.name(), self.code.map_or("", Code::name), &self.subject];
        let mut text = words.into_iter().filter(|word| !word.is_empty()).collect::<Vec<_>>().join(" ");
        if !self.found.is_empty() {
            text += &format!(": {}", self.found);
        }
        if let Some(actor) = &self.by {
            text += &format!(", by {actor}");
        }
        if let Some(took) = self.took_ms {
            text += &format!(", in {took} ms");
        }
        printable(&text, 2 * TEXT_MAX)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum EventKind {
    DriftAppeared,
    DriftCleared,
    Repaired,
    RepairFailed,
    /// Somebody was let in for a while.
    Opened,
    /// That ended before its time, and that it ended in time.
    Closed,
    Expired,
    /// Flows that the rules refuse were ended.
    Cut,
    Started,
    Stopped,
    PolicyLoaded,
    PolicyOnTrial,
    PolicyConfirmed,
    PolicyRolledBack,
    PolicyRejected,
}

impl EventKind {
    pub const fn name(self) -> &'static str {
        match self {
            EventKind::DriftAppeared => "drift-appeared",
            EventKind::DriftCleared => "drift-cleared",
            EventKind::Repaired => "repaired",
            EventKind::RepairFailed => "repair-failed",
            EventKind::Opened => "opened",
            EventKind::Closed => "closed",
            EventKind::Expired => "expired",
            EventKind::Cut => "cut",
            EventKind::Started => "started",
            EventKind::Stopped => "stopped",
            EventKind::PolicyLoaded => "policy-loaded",
            EventKind::PolicyOnTrial => "policy-on-trial",
            EventKind::PolicyConfirmed => "policy-confirmed",
            EventKind::PolicyRolledBack => "policy-rolled-back",
            EventKind::PolicyRejected => "policy-rejected",
        }
    }
}

/// The log of one state directory. Opening touches nothing and can't fail: a directory
/// that is not writable yet is met, and told, by the first `append`.
#[derive(Debug)]
pub struct EventLog {
    dir: PathBuf,
    queue: VecDeque<Event>,
    lost: u64,
}

impl EventLog {
    pub fn open(dir: impl Into<PathBuf>) -> Self {
        Self { dir: dir.into(), queue: VecDeque::new(), lost: 0 }
    }

    /// Writes this event and those that wait. After an error they all wait in memory, and
    /// the next `append` or `flush` tries again; the daemon goes on.
    pub fn append(&mut self, event: Event) -> io::Result<()> {
        if self.queue.len() >= QUEUE_MAX {
            self.queue.pop_front();
            self.lost += 1;
        }
        self.queue.push_back(bounded(event));
        self.flush()
    }

    pub fn flush(&mut self) -> io::Result<()> {
        if self.queue.is_empty() {
            return Ok(());
        }
        fs::create_dir_all(&self.dir)?;
        while let Some(event) = self.queue.front() {
            self.write(event)?;
            self.queue.pop_front();
        }
        Ok(())
    }

    /// Events that wait to be written.
    pub fn waiting(&self) -> usize {
        self.queue.len()
    }

    /// Events that no longer fit into memory while the disk took none.
    pub fn lost(&self) -> u64 {
        self.lost
    }

    /// The last `n` events, oldest first, those that wait included. What can't be read is
    /// skipped: torn lines, files that are not there.
    pub fn tail(&self, n: usize) -> Vec<Event> {
        let mut events = read(&self.dir.join(OLD_FILE));
        events.extend(read(&self.dir.join(FILE)));
        events.extend(self.queue.iter().cloned());
        events.split_off(events.len().saturating_sub(n))
    }

    fn write(&self, event: &Event) -> io::Result<()> {
        let mut line = serde_json::to_vec(event).map_err(io::Error::other)?;
        line.push(b'\n');
        let path = self.dir.join(FILE);
        let mut file = open(&path)?;
        let mut length = file.metadata()?.len();
        if length > 0 && length + line.len() as u64 > FILE_BYTES_MAX {
            fs::rename(&path, self.dir.join(OLD_FILE))?;
            file = open(&path)?;
            length = file.metadata()?.len();
        }
        if length > 0 && !ends_with_newline(&mut file)? {
            // A torn line: whoever wrote it died in the middle. It must not swallow ours.
            line.insert(0, b'\n');
        }
        file.write_all(&line).inspect_err(|_| {
            // A full disk took a part of it. Retries must not pile parts up.
            let _ = file.set_len(length);
        })
    }
}

/// Subjects and texts come from other people's processes: no control characters, bounded.
fn bounded(mut event: Event) -> Event {
    event.subject = printable(&event.subject, TEXT_MAX);
    event.found = printable(&event.found, TEXT_MAX);
    event.by = event.by.map(|by| by.bounded(TEXT_MAX));
    event
}

fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .append(true)
        .create(true)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
        .open(path)
}

fn ends_with_newline(file: &mut File) -> io::Result<bool> {
    let mut last = [0];
    file.seek(SeekFrom::End(-1))?;
    file.read_exact(&mut last)?;
    Ok(last == *b"\n")
}

/// The events of one file. Of one that is larger than we make them, the end.
fn read(path: &Path) -> Vec<Event> {
    let mut bytes = Vec::new();
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
    if let Ok(mut file) = OpenOptions::new().read(true).custom_flags(flags).open(path) {
        let start = file.metadata().map_or(0, |meta| meta.len().saturating_sub(FILE_BYTES_MAX));
        // A part of what was there is better than nothing.
        let _ = file.seek(SeekFrom::Start(start));
        let _ = file.take(FILE_BYTES_MAX).read_to_end(&mut bytes);
    }
    bytes.split(|byte| *byte == b'\n').filter_map(|line| serde_json::from_slice(line).ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(cycle: u64, found: &str) -> Event {
        Event {
            at: Stamp::from_unix(1_760_000_000),
            kind: EventKind::DriftAppeared,
            code: Some(Code::ListenerExposed),
            subject: "tcp/0.0.0.0:5432".into(),
            found: found.into(),
            by: Some(Actor { pid: 812, process: "postgres".into(), unit: None, user: None }),
            took_ms: Some(3),
            cycle,
        }
    }

    fn cycles(events: &[Event]) -> Vec<u64> {
        events.iter().map(|event| event.cycle).collect()
    }

    #[test]
    fn an_event_is_told_in_one_line() {
        let whole = event(1, "a listener");
        assert_eq!(
            whole.to_line(),
            "2025-10-09T08:53:20.000Z drift-appeared listener-exposed tcp/0.0.0.0:5432: a listener, by postgres \
             (pid 812), in 3 ms"
        );
        let bare = Event { code: None, subject: String::new(), by: None, took_ms: None, ..event(1, "") };
        assert_eq!(bare.told(), "drift-appeared");
    }

    #[test]
    fn events_come_back_as_they_were_told() {
        let dir = tempfile::tempdir().expect("a directory");
        let mut log = EventLog::open(dir.path().join("state"));
        assert!(log.tail(5).is_empty());
        for n in 1..=3 {
            log.append(event(n, "a listener")).expect("append");
        }
        assert_eq!(log.tail(2), [event(2, "a listener"), event(3, "a listener")]);
        // Another process, after a restart, reads the same and goes on.
        let mut again = EventLog::open(dir.path().join("state"));
        again.append(event(4, "a listener")).expect("append");
        assert_eq!(cycles(&again.tail(99)), [1, 2, 3, 4]);
        let line = fs::read_to_string(dir.path().join("state").join(FILE)).expect("the file");
        let first = line.lines().next().expect("a line");
        assert!(first.contains(r#""kind":"drift-appeared","code":"listener-exposed""#), "{first}");
        assert!(first.contains(r#""at":"2025-10-09T08:53:20.000Z""#), "{first}");
    }

    #[test]
    fn the_log_stays_within_two_files() {
        let dir = tempfile::tempdir().expect("a directory");
        let mut log = EventLog::open(dir.path());
        for n in 0..3000 {
            log.append(event(n, &"x".repeat(TEXT_MAX))).expect("append");
        }
        let sizes: Vec<(String, u64)> = fs::read_dir(dir.path())
            .expect("the directory")
            .map(|entry| entry.expect("an entry"))
            .map(|e| (e.file_name().to_string_lossy().into_owned(), e.metadata().expect("a file").len()))
            .collect();
        assert_eq!(sizes.len(), 2, "{sizes:?}");
        assert!(sizes.iter().all(|(_, bytes)| *bytes <= FILE_BYTES_MAX), "{sizes:?}");
        // What is left is the end, without a gap, and more than one file's worth.
        let left = cycles(&log.tail(usize::MAX));
        assert!(left.len() > 400, "{}", left.len());
        assert_eq!(left, ((3000 - left.len() as u64)..3000).collect::<Vec<_>>());
    }

    #[test]
    fn torn_and_foreign_lines_cost_nothing_but_themselves() {
        let dir = tempfile::tempdir().expect("a directory");
        let mut log = EventLog::open(dir.path());
        log.append(event(1, "whole")).expect("append");
        let whole = fs::read(dir.path().join(FILE)).expect("the file");
        let mut torn = whole.clone();
        torn.extend(b"\xff\xfe not JSON\n{\"kind\":\"started\"}\n\n");
        torn.extend(&whole[..whole.len() / 2]);
        fs::write(dir.path().join(FILE), &torn).expect("write");
        assert_eq!(cycles(&log.tail(9)), [1]);
        log.append(event(2, "after the tear")).expect("append");
        assert_eq!(cycles(&log.tail(9)), [1, 2]);
        // A file far larger than ours: its end is read, no more.
        let mut huge = vec![b'a'; 3 * FILE_BYTES_MAX as usize];
        huge.push(b'\n');
        huge.extend(&whole);
        fs::write(dir.path().join(FILE), &huge).expect("write");
        assert_eq!(cycles(&log.tail(9)), [1]);
    }

    #[test]
    fn what_a_stranger_named_is_bounded_and_printable() {
        let dir = tempfile::tempdir().expect("a directory");
        let mut log = EventLog::open(dir.path());
        log.append(event(1, &format!("\x1b[2J\n{}", "y".repeat(100_000)))).expect("append");
        let found = &log.tail(1)[0].found;
        assert!(found.starts_with("\u{fffd}[2J\u{fffd}yyy") && found.chars().count() == TEXT_MAX);
    }

    #[test]
    fn a_directory_that_refuses_is_told_and_tried_again() {
        let dir = tempfile::tempdir().expect("a directory");
        let state = dir.path().join("state");
        // A file where the directory should be: refused to root as well.
        fs::write(&state, b"in the way").expect("write");
        let mut log = EventLog::open(&state);
        for n in 0..300 {
            log.append(event(n, "x")).expect_err("nothing can be written there");
        }
        assert_eq!((log.waiting(), log.lost()), (QUEUE_MAX, 300 - QUEUE_MAX as u64));
        assert_eq!(cycles(&log.tail(2)), [298, 299]);
        fs::remove_file(&state).expect("remove");
        log.append(event(300, "x")).expect("append");
        assert_eq!((log.waiting(), log.tail(999).len()), (0, QUEUE_MAX));
        assert_eq!(cycles(&log.tail(2)), [299, 300]);
    }

    #[test]
    fn a_full_disk_leaves_no_pieces() {
        // /dev/full can't be truncated or renamed, so a link to it would prove little; the
        // limit on file sizes cuts a write short like a full disk does, and is our child's.
        if std::env::var_os("SPOKEGUARD_TEST_FSIZE").is_none() {
            let exe = std::env::current_exe().expect("the test binary");
            let name = "daemon::eventlog::tests::a_full_disk_leaves_no_pieces";
            let out = std::process::Command::new("sh")
                .args(["-c", "trap '' XFSZ; exec prlimit --fsize=2000 \"$@\"", "sh"])
                .arg(exe)
                .args(["--exact", name, "--nocapture"])
                .env("SPOKEGUARD_TEST_FSIZE", "1")
                .output()
                .expect("run the child");
            let said = String::from_utf8_lossy(&out.stdout).into_owned();
            assert!(out.status.success() && said.contains("1 passed"), "{said}");
            return;
        }
        let dir = tempfile::tempdir().expect("a directory");
        let mut log = EventLog::open(dir.path());
        let mut written = 0;
        while log.append(event(written, &"z".repeat(200))).is_ok() {
            written += 1;
            assert!(written < 100, "the limit does not hold");
        }
        let before = fs::read(dir.path().join(FILE)).expect("the file");
        assert!(written > 0 && before.ends_with(b"}\n"), "{}", String::from_utf8_lossy(&before));
        log.flush().expect_err("still full");
        assert_eq!(fs::read(dir.path().join(FILE)).expect("the file"), before);
        assert_eq!(cycles(&log.tail(99)), (0..=written).collect::<Vec<_>>());
    }

    #[test]
    fn links_are_not_followed() {
        let dir = tempfile::tempdir().expect("a directory");
        let victim = dir.path().join("victim");
        fs::write(&victim, b"precious").expect("write");
        std::os::unix::fs::symlink(&victim, dir.path().join(FILE)).expect("link");
        EventLog::open(dir.path()).append(event(1, "x")).expect_err("a link");
        assert_eq!(fs::read(&victim).expect("the file"), b"precious");
    }
}
