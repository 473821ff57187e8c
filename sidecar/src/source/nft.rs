//! The `nft` program: lists rule sets as JSON and takes transactions. It runs for a few
//! milliseconds at a time, under a deadline, and its listing is decoded while it writes.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, ChildStdout, Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::{legacy, nft_events, nft_lists, nft_unlisted};
use crate::desired::{TABLE, is_own_table};
use crate::observed::{Gap, Reading};
use crate::ruleset::unlisted::Unlisted;
use crate::ruleset::{Ruleset, Table, TableFamily, decode};
use crate::sys::memory;
use crate::terms::printable;

/// A listing of ten thousand rules takes 0.4 s; this is for a machine that swaps.
pub const DEADLINE: Duration = Duration::from_secs(30);
/// As much of its complaints as we keep.
const STDERR_MAX: usize = 4096;
/// Where distributions put it when PATH does not say.
const FALLBACK: [&str; 3] = ["/usr/sbin", "/sbin", "/run/current-system/sw/bin"];

#[derive(Debug, thiserror::Error)]
pub enum NftError {
    #[error("nft not found: install nftables")]
    Missing,
    #[error("{operation}: not permitted, needs CAP_NET_ADMIN: run as root")]
    Permission { operation: String },
    #[error("{operation}: this kernel has no nf_tables, or may not load it")]
    Unsupported { operation: String },
    #[error("{operation}: no answer within {} s", limit.as_secs())]
    TimedOut { operation: String, limit: Duration },
    #[error("{operation}: no such table, chain or rule: {text}")]
    NotFound { operation: String, text: String },
    #[error("{operation} failed: {text}")]
    Failed { operation: String, text: String },
    #[error("{operation}")]
    Run { operation: String, source: io::Error },
}

/// Times that we list again because somebody changed the rules meanwhile.
const TRIES: u8 = 3;

/// [`list_ruleset`], as a look at a facet.
pub fn read() -> Reading<Ruleset> {
    let late = |error: &anyhow::Error| matches!(error.downcast_ref(), Some(NftError::TimedOut { .. }));
    list_ruleset().map_or_else(
        |error| Reading::Blind(Gap { late: late(&error), ..Gap::new(format!("{error:#}")) }),
        Reading::Seen,
    )
}

/// Every table of this network namespace, with what nft does not print of them; tables of
/// iptables-legacy among them. But not those by which audits that are under way read
/// verdicts on older kernels: they are for their probes alone. (Whoever hid behind such a name
/// would still meet the probes.)
pub fn list_ruleset() -> anyhow::Result<Ruleset> {
    let mut ruleset = list_nftables()?;
    ruleset.tables.retain(|t| t.family != TableFamily::Inet || !super::probe::is_table(t.name.as_bytes()));
    ruleset.tables.extend(legacy::read());
    Ok(ruleset)
}

fn list_nftables() -> anyhow::Result<Ruleset> {
    if let Some(ruleset) = list_filled(None, &["-j", "-t", "list", "ruleset"], DEADLINE)? {
        return Ok(ruleset);
    }
    let args = ["-j", "list", "ruleset"];
    // The numbers of rules that were there before and after mean the same rules.
    let mut tries = 0..TRIES;
    while let (Some(_), Ok(before)) = (tries.next(), generation()) {
        let unlisted = match nft_unlisted::read() {
            Ok(unlisted) => unlisted,
            Err(error) => {
                log::debug!("what nft leaves out of its listing stays unknown: {error:#}");
                break;
            }
        };
        // Where nft says all there is, another rule under the same number is no other than listed.
        let enough = tries.is_empty() && !unlisted.matters();
        let ruleset = list(&args, unlisted, DEADLINE)?;
        if enough || generation().is_ok_and(|after| after == before) {
            return Ok(ruleset);
        }
    }
    // What nft does not say of them stays unknown.
    list(&args, nft_unlisted::nothing(), DEADLINE)
}

/// The same where nft need not say what is in long lists of addresses, in this table of ours or in any. `None`: there
/// are no such lists, or nft has to list them, or say what is wrong. An nft that hangs once is not waited for again.
fn list_filled(table: Option<&str>, args: &[&str], limit: Duration) -> anyhow::Result<Option<Ruleset>> {
    let listed = || -> anyhow::Result<Option<Ruleset>> {
        for _ in 0..TRIES {
            let before = generation()?;
            let Some(mut lists) = nft_lists::find(table)? else { return Ok(None) };
            let unlisted = if table.is_none() { nft_unlisted::read()? } else { Unlisted::default() };
            let mut ruleset = list(args, unlisted, limit)?;
            if !lists.fill(&mut ruleset)? {
                return Ok(None);
            }
            if generation()? == before {
                return Ok(Some(ruleset));
            }
        }
        Ok(None)
    };
    listed().or_else(|error| match error.downcast_ref() {
        Some(NftError::TimedOut { .. }) => Err(error),
        _ => {
            log::debug!("nft lists all of it: {error:#}");
            Ok(None)
        }
    })
}

fn generation() -> Result<u32, nft_events::NftSocketError> {
    nft_events::NftQueries::open()?.generation()
}

/// Our own table; `None` if there is none.
pub fn list_table() -> anyhow::Result<Option<Table>> {
    list_table_within(DEADLINE)
}

/// The same for whoever can't wait.
pub fn list_table_within(limit: Duration) -> anyhow::Result<Option<Table>> {
    // Without nft nothing could be done about what is found: that is said first.
    program()?;
    let flags = nft_events::NftQueries::open().and_then(|mut queries| queries.own_table_flags());
    let sleeps = match flags {
        Ok(None) => return Ok(None),
        Ok(Some(flags)) => flags & nft_events::DORMANT != 0,
        Err(_) => false,
    };
    match list_whole_table(limit) {
        // nft 1.0.6 writes a table's only flag from memory that it has freed, and may end there. What is in a table
        // that sleeps is in force nowhere: it is as good as empty.
        Err(error) if sleeps && error.downcast_ref::<decode::DecodeError>().is_some() => {
            log::debug!("table inet {TABLE} sleeps, and nft can't list it: {error:#}");
            Ok(Some(Table {
                family: TableFamily::Inet,
                name: TABLE.to_owned(),
                dormant: true,
                chains: Vec::new(),
                counters: Default::default(),
                sets: Vec::new(),
            }))
        }
        listed => listed,
    }
}

fn list_whole_table(limit: Duration) -> anyhow::Result<Option<Table>> {
    // Of one table nft 1.0.6 asks for every element, also where it is to leave them out.
    if let Some(ruleset) = list_filled(Some(TABLE), &["-j", "-t", "list", "ruleset", "inet"], limit)? {
        return Ok(own(ruleset));
    }
    list_own(&["-j", "list", "table", "inet", TABLE], limit)
}

/// Our own table with its named sets and nothing else in it.
pub fn list_sets() -> anyhow::Result<Option<Table>> {
    list_own(&["-j", "list", "sets", "table", "inet", TABLE], DEADLINE)
}

fn list_own(args: &[&str], limit: Duration) -> anyhow::Result<Option<Table>> {
    match list(args, Unlisted::default(), limit) {
        Ok(ruleset) => Ok(own(ruleset)),
        Err(e) if matches!(e.downcast_ref(), Some(NftError::NotFound { .. })) => Ok(None),
        Err(e) => Err(e),
    }
}

fn own(ruleset: Ruleset) -> Option<Table> {
    ruleset.tables.into_iter().find(is_own_table)
}

/// Our own table as nft prints it, which `nft -f` takes back: amounts of counters included, and what ends by
/// itself left out. A text that lies around must open nothing for longer than it was opened.
pub fn list_table_text() -> anyhow::Result<String> {
    let text = listing(&["list", "table", "inet", TABLE])?;
    Ok(without_timed(&String::from_utf8(text).context("nft list table: not UTF-8")?))
}

/// The text of a table without the elements of sets whose elements have a timeout.
fn without_timed(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let (mut timed, mut elements) = (false, false);
    for line in text.lines() {
        let words = line.trim_start_matches('\t');
        match line.len() - words.len() {
            // The head or the end of a set, map or chain.
            0 | 1 => (timed, elements) = (false, false),
            _ if words.starts_with("flags ") => timed |= words.contains("timeout"),
            _ => elements |= words.starts_with("elements = "),
        }
        if !(timed && elements) {
            out.push_str(line);
            out.push('\n');
        }
    }
    out
}

/// What one listing says, as JSON.
pub fn listing(args: &[&str]) -> anyhow::Result<Vec<u8>> {
    let mut nft = Running::start(&program()?, args, Stdio::null(), Stdio::piped(), DEADLINE)?;
    let mut json = Vec::new();
    let read = (&mut nft).take(LISTING_MAX).read_to_end(&mut json);
    nft.finish()?;
    read?;
    Ok(json)
}

const LISTING_MAX: u64 = 64 << 20;

/// All of it or nothing: nft sends what it reads as one batch.
pub fn run_transaction(json: &str) -> anyhow::Result<()> {
    let operation = "nft -j -f -";
    // A file in memory can't fill up as a pipe can while nobody reads its other end.
    let stdin = memory_file(json.as_bytes())
        .map_err(|source| NftError::Run { operation: operation.to_owned(), source })?;
    let program = program()?;
    let mut nft = {
        // Held from before it starts: its commit may be announced before we know its number.
        let mut committers = COMMITTERS.lock().unwrap_or_else(PoisonError::into_inner);
        let args = ["-j", "-f", "-"];
        let nft = Running::start(&program, &args, Stdio::from(stdin), Stdio::null(), DEADLINE)?;
        committers.rotate_right(1);
        committers[0] = nft.child.id();
        nft
    };
    nft.finish()?;
    Ok(())
}

/// Has nft load a file, as one transaction.
pub fn run_file(path: &Path) -> anyhow::Result<()> {
    let path = path.to_str().context("a path that is not UTF-8")?;
    let program = program()?;
    let mut nft = {
        let mut committers = COMMITTERS.lock().unwrap_or_else(PoisonError::into_inner);
        let nft = Running::start(&program, &["-f", path], Stdio::null(), Stdio::null(), DEADLINE)?;
        committers.rotate_right(1);
        committers[0] = nft.child.id();
        nft
    };
    nft.finish()?;
    Ok(())
}

/// The last processes that committed for us, newest first.
static COMMITTERS: Mutex<[u32; 64]> = Mutex::new([0; 64]);

/// Says that the calling thread is about to commit by itself: the kernel names the thread, not its process.
pub fn committing() {
    let own = rustix::thread::gettid().as_raw_nonzero().get().unsigned_abs();
    let mut committers = COMMITTERS.lock().unwrap_or_else(PoisonError::into_inner);
    if !committers.contains(&own) {
        committers.rotate_right(1);
        committers[0] = own;
    }
}

/// Whether this process was one of ours: the kernel announces our own commits, too, by
/// its name for them. In a pid namespace the numbers differ and none is known.
pub fn committed(pid: u32) -> bool {
    COMMITTERS.lock().unwrap_or_else(PoisonError::into_inner).contains(&pid)
}

fn list(args: &[&str], unlisted: Unlisted, limit: Duration) -> anyhow::Result<Ruleset> {
    decoded(Running::start(&program()?, args, Stdio::null(), Stdio::piped(), limit)?, unlisted)
}

fn decoded(mut nft: Running, unlisted: Unlisted) -> anyhow::Result<Ruleset> {
    let decoded = decode::ruleset_with(&mut nft, unlisted);
    if decoded.is_err() && !nft.ended {
        // Half a listing read: it would wait for ever to write the rest.
        nft.stop();
    }
    // What nft says of its failure explains more than JSON that ends in the middle.
    match (nft.finish(), decoded) {
        (Ok(()), Ok(ruleset)) => Ok(ruleset),
        (Err(e), _) if nft.timed_out || !nft.stopped => Err(e.into()),
        (_, Err(e)) => Err(anyhow::Error::new(e).context(nft.operation.clone())),
        (Err(e), Ok(_)) => Err(e.into()),
    }
}

fn memory_file(bytes: &[u8]) -> io::Result<File> {
    let mut file = File::from(rustix::fs::memfd_create("nft", rustix::fs::MemfdFlags::CLOEXEC)?);
    file.write_all(bytes)?;
    file.seek(SeekFrom::Start(0))?;
    Ok(file)
}

/// Where nft is, by PATH and then by where distributions keep it.
pub fn program() -> Result<PathBuf, NftError> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(FALLBACK.iter().map(PathBuf::from))
        .filter(|dir| dir.is_absolute())
        .map(|dir| dir.join("nft"))
        .find(|file| rustix::fs::access(file, rustix::fs::Access::EXEC_OK).is_ok())
        .ok_or(NftError::Missing)
}

/// An nft that runs. Reading it reads its output, until the deadline.
struct Running {
    operation: String,
    child: Child,
    /// Readable once it has ended, so that waiting has a deadline too.
    exit: OwnedFd,
    stdout: Option<ChildStdout>,
    stderr: Option<ChildStderr>,
    complaints: Vec<u8>,
    limit: Duration,
    deadline: Instant,
    timed_out: bool,
    /// We have killed it ourselves.
    stopped: bool,
    /// Its output has been read to the end.
    ended: bool,
}

impl Running {
    fn start(
        program: &Path,
        args: &[&str],
        stdin: Stdio,
        stdout: Stdio,
        limit: Duration,
    ) -> Result<Self, NftError> {
        let operation = format!("nft {}", args.join(" "));
        let failed = |source: io::Error| NftError::Run { operation: operation.clone(), source };
        let mut child = Command::new(program)
            .args(args)
            // Its messages are told apart by their text.
            .env("LC_ALL", "C")
            .stdin(stdin)
            .stdout(stdout)
            .stderr(Stdio::piped())
            .spawn()
            .map_err(failed)?;
        memory::sacrifice(child.id());
        let exit = match super::child::exit_of(&child) {
            Ok(exit) => exit,
            Err(error) => {
                let _ = child.kill();
                let _ = child.wait();
                return Err(failed(error));
            }
        };
        let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
        Ok(Self {
            ended: stdout.is_none(),
            operation,
            child,
            exit,
            stdout,
            stderr,
            complaints: Vec::new(),
            limit,
            deadline: Instant::now() + limit,
            timed_out: false,
            stopped: false,
        })
    }

    /// Its verdict, once it has ended.
    fn finish(&mut self) -> Result<(), NftError> {
        let failed = |operation: &str, source| NftError::Run { operation: operation.to_owned(), source };
        while self.stderr.is_some() || !self.exited_now() {
            match self.wait_readable() {
                Ok(_) => {}
                Err(_) if self.timed_out => break,
                Err(source) => return Err(failed(&self.operation, source)),
            }
        }
        let status = self.child.wait().map_err(|source| failed(&self.operation, source))?;
        let operation = self.operation.clone();
        if self.timed_out {
            return Err(NftError::TimedOut { operation, limit: self.limit });
        }
        if status.success() {
            return Ok(());
        }
        let said = String::from_utf8_lossy(&self.complaints);
        Err(explained(operation, &said, status))
    }

    fn exited_now(&self) -> bool {
        let mut fds = [PollFd::new(&self.exit, PollFlags::IN)];
        poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).is_ok_and(|ready| ready > 0)
    }

    /// Waits for output (`true`), or for anything else of note (`false`); takes in what
    /// it complains of meanwhile.
    fn wait_readable(&mut self) -> io::Result<bool> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        let timeout = Timespec {
            tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: i64::from(left.subsec_nanos()),
        };
        let mut fds: Vec<PollFd<'_>> = Vec::with_capacity(3);
        let reading = self.stdout.is_some() && !self.ended;
        if let (Some(stdout), true) = (&self.stdout, reading) {
            fds.push(PollFd::from_borrowed_fd(stdout.as_fd(), PollFlags::IN));
        } else {
            fds.push(PollFd::new(&self.exit, PollFlags::IN));
        }
        if let Some(stderr) = &self.stderr {
            fds.push(PollFd::from_borrowed_fd(stderr.as_fd(), PollFlags::IN));
        }
        match poll(&mut fds, Some(&timeout)) {
            // Also where there is always something to read.
            ready if ready == Ok(0) || left.is_zero() => {
                drop(fds);
                self.timed_out = true;
                self.stop();
                return Err(io::ErrorKind::TimedOut.into());
            }
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        let output = reading && !fds[0].revents().is_empty();
        let complaint = fds.get(1).is_some_and(|fd| !fd.revents().is_empty());
        drop(fds);
        if let (true, Some(stderr)) = (complaint, &mut self.stderr) {
            let mut piece = [0u8; 1024];
            match stderr.read(&mut piece) {
                Ok(0) => self.stderr = None,
                Ok(n) => {
                    let room = STDERR_MAX.saturating_sub(self.complaints.len());
                    self.complaints.extend_from_slice(&piece[..n.min(room)]);
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(output)
    }

    fn stop(&mut self) {
        self.stopped = true;
        // Fails only if it has ended already.
        let _ = self.child.kill();
    }
}

impl Read for Running {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while !self.ended && !self.wait_readable()? {}
        match &mut self.stdout {
            // Readers ask again after the end.
            _ if self.ended => Ok(0),
            Some(stdout) => {
                let n = stdout.read(buffer)?;
                self.ended |= n == 0 && !buffer.is_empty();
                Ok(n)
            }
            None => Ok(0),
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if !matches!(self.child.try_wait(), Ok(Some(_))) {
            self.stop();
            let _ = self.child.wait();
        }
    }
}

/// What nft says where nf_tables is no part of the kernel: nfnetlink calls a subsystem that it doesn't know invalid.
const UNSUPPORTED: [&str; 4] = [
    "Protocol not supported",
    "Operation not supported on",
    "Unable to initialize Netlink socket",
    "cache initialization failed: Invalid argument",
];

fn explained(operation: String, said: &str, status: std::process::ExitStatus) -> NftError {
    let lines: Vec<String> = (said.lines().map(str::trim))
        .filter(|line| !line.is_empty() && !line.chars().all(|c| c == '^' || c == '~' || c == ' '))
        .take(3)
        .map(|line| printable(line, 200))
        .collect();
    let text = match status.signal() {
        // Not by us: we say how that came about.
        Some(libc::SIGKILL) => "it was killed, as the kernel does where memory runs out".to_owned(),
        _ if lines.is_empty() => status.to_string(),
        _ => lines.join("; "),
    };
    // "cache initialization failed: Operation not permitted" and its like: the cause is
    // at the end of a line, in the words of strerror(3).
    if said.contains("Operation not permitted") {
        NftError::Permission { operation }
    } else if UNSUPPORTED.iter().any(|cause| said.contains(cause)) {
        NftError::Unsupported { operation }
    } else if said.contains("No such file or directory") && !said.contains("Could not open file") {
        NftError::NotFound { operation, text }
    } else {
        NftError::Failed { operation, text }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(said: &str) -> String {
        explained("nft x".into(), said, std::process::ExitStatus::from_raw(256)).to_string()
    }

    #[test]
    fn failures_are_told_apart_by_what_nft_says() {
        let denied = "Operation not permitted (you must be root)\nnetlink: Error: cache initialization failed: \
                      Operation not permitted\n";
        assert!(of(denied).contains("CAP_NET_ADMIN"));
        for lacking in [
            "Unable to initialize Netlink socket: Protocol not supported\n",
            "netlink: Error: cache initialization failed: Invalid argument\n",
        ] {
            assert!(of(lacking).contains("no nf_tables"), "{lacking}");
        }
        assert!(
            of("Error: No such file or directory\nlist table inet x\n      ^^^\n").contains("no such table")
        );
        assert_eq!(
            of("internal:0:0-0: Error: bad\x1b[2J rule\n"),
            "nft x failed: internal:0:0-0: Error: bad\u{fffd}[2J rule"
        );
        // What nft reads, and nothing that it was asked about.
        assert!(
            of("Error: Could not open file \"/dev/stdin\": No such file or directory\n").contains("failed")
        );
        assert!(of("").starts_with("nft x failed: exit status"));
        let killed = explained("nft x".into(), "", std::process::ExitStatus::from_raw(libc::SIGKILL));
        assert!(killed.to_string().contains("memory"), "{killed}");
    }

    /// A shell in nft's place.
    fn running(script: &str, deadline: Duration) -> Running {
        Running::start(Path::new("/bin/sh"), &["-c", script], Stdio::null(), Stdio::piped(), deadline)
            .expect("a shell")
    }

    const LONG: Duration = Duration::from_secs(60);

    #[track_caller]
    fn refused(script: &str, deadline: Duration) -> String {
        let start = Instant::now();
        let error =
            decoded(running(script, deadline), Unlisted::default()).expect_err("was taken for a listing");
        assert!(start.elapsed() < Duration::from_secs(20), "took {:?}", start.elapsed());
        format!("{error:#}")
    }

    #[test]
    fn a_listing_is_taken_only_whole_and_from_an_nft_that_succeeds() {
        let table = r#"{"nftables":[{"table":{"family":"inet","name":"x","handle":1}}]}"#;
        let listed = decoded(running(&format!("echo '{table}'; echo note >&2"), LONG), Unlisted::default())
            .expect("a listing");
        assert_eq!(listed.tables.len(), 1);
        assert!(
            refused(&format!("echo '{table}'; echo 'Error: Bad' >&2; exit 1"), LONG).contains("Error: Bad")
        );
        assert!(refused("echo '{\"nftables\":[{'", LONG).contains("JSON"));
        assert!(refused("exit 0", LONG).contains("JSON"));
        // One that would write for ever is stopped at its first mistake.
        assert!(refused("exec yes", LONG).contains("JSON"));
    }

    #[test]
    fn what_ends_by_itself_is_left_out_of_a_text_and_nothing_else() {
        let kept = "table inet spokeguard {\n\tset a {\n\t\ttype ipv4_addr\n\t\tflags interval,timeout\n";
        let timed = "\t\telements = { 10.0.0.0/24 timeout 15m expires 14m comment \"flags x\",\n\t\t\t     10.0.1.1 timeout 1h }\n";
        let rest = "\t}\n\n\tset b {\n\t\ttype ipv4_addr\n\t\tflags interval\n\t\telements = { 10.0.0.0/24,\n\t\t\t     \
                    10.0.2.0/24 }\n\t}\n\n\tchain c {\n\t\taccept\n\t}\n}\n";
        assert_eq!(without_timed(&[kept, timed, rest].concat()), [kept, rest].concat());
    }

    #[test]
    fn an_nft_that_hangs_is_ended_at_the_deadline() {
        let soon = Duration::from_millis(100);
        assert!(refused("exec sleep 600", soon).contains("no answer"));
        assert!(refused("echo '{\"nftables\":['; exec sleep 600", soon).contains("no answer"));
        assert!(refused("exec >&- 2>&-; exec sleep 600", soon).contains("no answer"));
        assert!(refused("yes ' '", soon).contains("no answer"), "blanks are JSON for as long as they come");
    }

    #[test]
    fn complaints_are_bounded() {
        let mut nft = running("exec >&-; head -c 1000000 /dev/zero | tr '\\0' x >&2; exit 1", LONG);
        let error = nft.finish().expect_err("it failed");
        assert_eq!(nft.complaints.len(), STDERR_MAX);
        assert!(error.to_string().len() < 300, "{error}");
    }

    #[test]
    fn a_transaction_is_read_from_its_start() {
        let mut text = String::new();
        memory_file(b"{}").expect("a file").read_to_string(&mut text).expect("reads");
        assert_eq!(text, "{}");
    }
}
