//! `status` of a running daemon, over a unix socket in the run directory; and the lock that
//! makes it the only one there.
//!
//! The protocol: one line with a request, one JSON document as the answer, end of stream.
//! The answer is a snapshot that the loop left on a [`Board`]; nobody here waits for it.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, bail};
use rustix::fs::{FlockOperation, Mode, fchmod, flock};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::sync::Semaphore;

use super::eventlog::Event;
use super::privileges::Privileges;
use crate::observed::Probing;
use crate::policy;
use crate::report::Report;
use crate::terms::{Stamp, printable};

const SOCKET: &str = "spokeguard.sock";
const LOCK: &str = "spokeguard.lock";
const CLIENTS_MAX: usize = 8;
const BACKLOG: i32 = 16;
const TIMEOUT: Duration = Duration::from_secs(5);
const REQUEST_BYTES_MAX: u64 = 256;
/// Far above any real report; a bound all the same.
const ANSWER_BYTES_MAX: u64 = 16 * 1024 * 1024;

/// The answer to `status`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// The JSON of `check`, its keys at the top.
    #[serde(flatten)]
    pub report: Report,
    pub daemon: Daemon,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Daemon {
    pub pid: u32,
    pub started: Stamp,
    pub mode: policy::Mode,
    /// [`policy::fingerprint`] of what it enforces.
    pub policy: String,
    /// The policy file that it watches.
    #[serde(default)]
    pub file: Option<PathBuf>,
    /// How its rules stand.
    #[serde(default)]
    pub rules: Rules,
    /// When rules on trial are rolled back.
    #[serde(default)]
    pub until: Option<Stamp>,
    /// The policy that a rollback leads back to, or led; `null`: to no rules of ours.
    #[serde(default)]
    pub before: Option<String>,
    pub cycle: u64,
    pub last_cycle_seconds: f64,
    /// Repairs that were done.
    pub repairs: u64,
    /// The second layer: the interfaces that the tc guard is on, or why it is not active.
    #[serde(default)]
    pub guard: String,
    /// The last whole look from outside; `null`: none yet.
    #[serde(default)]
    pub audit: Option<Probing>,
    /// The last events, oldest first.
    pub events: Vec<Event>,
    pub privileges: Privileges,
}

/// How the rules in force stand.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Rules {
    #[default]
    Confirmed,
    /// In force, and rolled back unless somebody confirms.
    OnTrial,
    /// What the policy file says was rolled back: those confirmed before it are in force.
    RolledBack,
    /// What the policy file says could not be put in force.
    NotInForce,
}

/// Where the loop leaves the answer. Cheap to clone; every clone is the same board.
#[derive(Clone, Default)]
pub struct Board(Arc<Mutex<Option<Arc<str>>>>);

impl Board {
    pub fn set(&self, status: &Status) -> serde_json::Result<()> {
        let text: Arc<str> = serde_json::to_string(status)?.into();
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(text);
        Ok(())
    }

    fn answer(&self, request: &str) -> Arc<str> {
        match request.trim() {
            "status" => self
                .0
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .clone()
                .unwrap_or_else(|| refusal("the first cycle has not finished yet")),
            other => refusal(&format!("unknown request \"{}\": there is \"status\"", printable(other, 64))),
        }
    }
}

fn refusal(reason: &str) -> Arc<str> {
    serde_json::json!({ "error": reason }).to_string().into()
}

/// The right to be the daemon of a run directory, for as long as it is held. The kernel
/// gives it back when the process ends, in whatever way.
#[derive(Debug)]
pub struct Lock {
    _file: File,
}

impl Lock {
    pub fn take(run_dir: &Path) -> anyhow::Result<Self> {
        fs::create_dir_all(run_dir).with_context(|| format!("create {}", run_dir.display()))?;
        let path = run_dir.join(LOCK);
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW)
            .open(&path)
            .with_context(|| format!("open the lock file {}", path.display()))?;
        match held(&file) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => {
                let mut pid = String::new();
                // It may have the lock since a moment only, and not have said who it is.
                for _ in 0..20 {
                    let _ = (&mut file).take(16).read_to_string(&mut pid);
                    if !pid.is_empty() {
                        break;
                    }
                    std::thread::sleep(Duration::from_millis(10));
                }
                bail!(
                    "another spokeguard daemon (pid {}) holds {}: stop it first, or give this one a \
                     --run-dir of its own",
                    printable(pid.trim(), 16),
                    path.display()
                );
            }
            Err(error) => return Err(error).with_context(|| format!("lock {}", path.display())),
        }
        // For people and for the message above; the lock is what counts.
        file.set_len(0).and_then(|()| writeln!(file, "{}", std::process::id()))?;
        Ok(Self { _file: file })
    }
}

/// A child of a daemon that was killed holds its lock from fork to exec. That is waited out.
fn held(file: &File) -> rustix::io::Result<()> {
    let mut result = flock(file, FlockOperation::NonBlockingLockExclusive);
    for _ in 0..20 {
        let Err(rustix::io::Errno::WOULDBLOCK) = result else { break };
        std::thread::sleep(Duration::from_millis(10));
        result = flock(file, FlockOperation::NonBlockingLockExclusive);
    }
    result
}

/// The socket, listening. Removed from the directory when dropped.
#[derive(Debug)]
pub struct StatusSocket {
    listener: Option<UnixListener>,
    path: PathBuf,
}

impl StatusSocket {
    /// Takes the place of a socket that a killed daemon left behind, which the lock proves
    /// to be dead; one that still answers is left alone.
    pub fn bind(run_dir: &Path, _only_one: &Lock) -> anyhow::Result<Self> {
        let path = run_dir.join(SOCKET);
        let doing = || format!("listen on {}", path.display());
        match connect(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                fs::remove_file(&path).with_context(|| format!("remove the old {}", path.display()))?;
            }
            // Busy is alive, too.
            Err(error) if error.kind() != io::ErrorKind::WouldBlock => return Err(error).with_context(doing),
            _ => bail!("{}: a daemon without our lock answers there", doing()),
        }
        let listener = listen(&path).with_context(doing)?;
        Ok(Self { listener: Some(listener), path })
    }

    /// Answers for ever. Must be called inside a tokio runtime; ends with an error only if
    /// the runtime can't take the socket.
    pub async fn serve(mut self, board: Board) -> io::Result<()> {
        let Some(listener) = self.listener.take() else { return Ok(()) };
        let listener = tokio::net::UnixListener::from_std(listener)?;
        let places = Arc::new(Semaphore::new(CLIENTS_MAX));
        loop {
            let stream = match listener.accept().await {
                Ok((stream, _)) => stream,
                // Out of file descriptors: without a pause this would spin.
                Err(_) => {
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            };
            let board = board.clone();
            match Arc::clone(&places).try_acquire_owned() {
                Ok(place) => drop(tokio::spawn(async move {
                    // How a client leaves is its own business.
                    let _ = tokio::time::timeout(TIMEOUT, converse(stream, &board)).await;
                    drop(place);
                })),
                // It fits into an empty socket's buffer, so this does not wait for the client.
                Err(_) => drop(stream.try_write(refusal("too many clients").as_bytes())),
            }
        }
    }
}

impl Drop for StatusSocket {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

/// 0660 from the first moment on: Linux makes the file with the mode that the socket has
/// when it is bound, less the umask.
fn listen(path: &Path) -> io::Result<UnixListener> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    fchmod(&socket, Mode::from_raw_mode(0o660))?;
    rustix::net::bind(&socket, &SocketAddrUnix::new(path)?)?;
    // The umask may have taken the group's right to write, which is needed to connect.
    fs::set_permissions(path, fs::Permissions::from_mode(0o660))?;
    rustix::net::listen(&socket, BACKLOG)?;
    Ok(UnixListener::from(socket))
}

async fn converse(mut stream: tokio::net::UnixStream, board: &Board) -> io::Result<()> {
    let (reader, mut writer) = stream.split();
    let mut request = Vec::new();
    BufReader::new(reader.take(REQUEST_BYTES_MAX)).read_until(b'\n', &mut request).await?;
    let answer = board.answer(&String::from_utf8_lossy(&request));
    writer.write_all(answer.as_bytes()).await?;
    writer.write_all(b"\n").await?;
    writer.shutdown().await
}

/// Asks the daemon of a run directory; what it says is one JSON document. Blocks for a few
/// seconds at most.
pub fn ask(run_dir: &Path, request: &str) -> anyhow::Result<String> {
    ask_within(TIMEOUT, run_dir, request)
}

fn ask_within(patience: Duration, run_dir: &Path, request: &str) -> anyhow::Result<String> {
    let path = run_dir.join(SOCKET);
    let mut stream = match connect(&path) {
        Ok(stream) => stream,
        Err(error) => match error.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
                bail!("no daemon answers on {}: is `spokeguard run` running?", path.display())
            }
            io::ErrorKind::WouldBlock => bail!("the daemon on {} is too busy to answer", path.display()),
            _ => return Err(error).with_context(|| format!("connect to {}", path.display())),
        },
    };
    let mut answer = String::new();
    let told = (|| {
        stream.set_nonblocking(false)?;
        stream.set_read_timeout(Some(patience))?;
        stream.set_write_timeout(Some(patience))?;
        // A daemon that is too busy refuses before it reads, and closes: what it said counts.
        let asked = stream.write_all(format!("{request}\n").as_bytes());
        let read = stream.take(ANSWER_BYTES_MAX).read_to_string(&mut answer);
        if answer.is_empty() { asked.and(read.map(drop)) } else { Ok(()) }
    })();
    match told {
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => bail!(
            "the daemon on {} has not answered for {patience:?}: it hangs or is stopped",
            path.display()
        ),
        told => told.with_context(|| format!("ask the daemon on {}", path.display()))?,
    }
    let json: serde_json::Value = serde_json::from_str(&answer)
        .with_context(|| format!("the daemon on {} closed before its answer was complete", path.display()))?;
    if let Some(reason) = json.get("error").and_then(|reason| reason.as_str()) {
        bail!("the daemon on {} says: {}", path.display(), printable(reason, 256));
    }
    Ok(answer)
}

/// Without blocking: a daemon that hangs with a full queue must not hang its clients.
fn connect(path: &Path) -> io::Result<UnixStream> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(UnixStream::from(socket))
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;
    use crate::report::Verdict;

    fn status() -> Status {
        let at = Stamp::from_unix(1_760_000_000);
        let report = Report {
            version: 1,
            node: "singapore".into(),
            verdict: Verdict::Ok,
            at,
            findings: Vec::new(),
            blind: Vec::new(),
        };
        let daemon = Daemon {
            pid: 1,
            started: at,
            mode: policy::Mode::Enforce,
            file: None,
            rules: Rules::Confirmed,
            until: None,
            before: None,
            policy: "0123456789abcdef".into(),
            cycle: 7,
            last_cycle_seconds: 0.25,
            audit: None,
            repairs: 2,
            guard: String::new(),
            events: Vec::new(),
            privileges: Privileges::default(),
        };
        Status { report, daemon }
    }

    /// A daemon's socket in a thread of its own.
    fn served<T>(run_dir: &Path, board: &Board, then: impl FnOnce() -> T) -> T {
        let lock = Lock::take(run_dir).expect("the lock");
        let socket = StatusSocket::bind(run_dir, &lock).expect("bind");
        let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
        std::thread::scope(|scope| {
            scope.spawn(move || {
                let runtime =
                    tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
                runtime.block_on(async move {
                    tokio::select! {
                        ended = socket.serve(board.clone()) => panic!("the server ended: {ended:?}"),
                        _ = stopped => {}
                    }
                });
            });
            // The sender is dropped when `then` has returned or panicked, and that stops it.
            let _stop = stop;
            then()
        })
    }

    fn says(error: &anyhow::Error, what: &str) {
        assert!(format!("{error:#}").contains(what), "{error:#}");
    }

    #[test]
    fn the_answer_is_what_the_loop_left() {
        let dir = tempfile::tempdir().expect("a directory");
        let board = Board::default();
        served(dir.path(), &board, || {
            says(&ask(dir.path(), "status").expect_err("too early"), "first cycle has not finished");
            board.set(&status()).expect("set");
            let answer = ask(dir.path(), "status").expect("an answer");
            assert_eq!(serde_json::from_str::<Status>(&answer).expect("a status"), status());
            assert!(answer.contains(r#""version":1,"node":"singapore","verdict":"ok""#), "{answer}");
            says(&ask(dir.path(), "sta\x1btus").expect_err("unknown"), "unknown request \"sta\u{fffd}tus\"");
            says(&ask(dir.path(), &"long".repeat(200_000)).expect_err("too long"), "unknown request");
            let mode = fs::metadata(dir.path().join(SOCKET)).expect("the socket").permissions().mode();
            assert_eq!(mode & 0o777, 0o660);
        });
        // It cleans up after itself.
        assert!(!dir.path().join(SOCKET).exists());
    }

    #[test]
    fn without_a_daemon_the_error_says_what_to_do() {
        let dir = tempfile::tempdir().expect("a directory");
        let hint = "spokeguard.sock: is `spokeguard run` running?";
        says(&ask(dir.path(), "status").expect_err("nobody"), hint);
        // A socket that a killed daemon left behind refuses, which is the same to the user.
        drop(UnixListener::bind(dir.path().join(SOCKET)).expect("bind"));
        says(&ask(dir.path(), "status").expect_err("nobody"), hint);
        let far = dir.path().join("x".repeat(200));
        says(&ask(&far, "status").expect_err("too long a path"), "connect to ");
    }

    #[test]
    fn a_dead_socket_is_replaced_and_a_living_one_is_not() {
        let dir = tempfile::tempdir().expect("a directory");
        drop(UnixListener::bind(dir.path().join(SOCKET)).expect("bind"));
        let board = Board::default();
        board.set(&status()).expect("set");
        served(dir.path(), &board, || ask(dir.path(), "status").expect("an answer"));
        let alive = UnixListener::bind(dir.path().join(SOCKET)).expect("bind");
        let lock = Lock::take(dir.path()).expect("the lock");
        let refused = StatusSocket::bind(dir.path(), &lock).expect_err("somebody answers");
        says(&refused, "a daemon without our lock answers there");
        let patience = Duration::from_millis(20);
        let late = ask_within(patience, dir.path(), "status").expect_err("deaf");
        says(&late, "has not answered for 20ms: it hangs or is stopped");
        let mut queued = Vec::new();
        while let Ok(stream) = connect(&dir.path().join(SOCKET)) {
            queued.push(stream);
            assert!(queued.len() < 10_000, "the queue has no end");
        }
        says(&StatusSocket::bind(dir.path(), &lock).expect_err("busy"), "a daemon without our lock");
        drop(alive);
        assert!(dir.path().join(SOCKET).exists());
    }

    #[test]
    fn two_daemons_do_not_share_a_run_directory() {
        let dir = tempfile::tempdir().expect("a directory");
        let first = Lock::take(dir.path()).expect("the lock");
        let second = Lock::take(dir.path()).expect_err("taken");
        says(&second, &format!("another spokeguard daemon (pid {}) holds ", std::process::id()));
        let elsewhere = tempfile::tempdir().expect("a directory");
        Lock::take(elsewhere.path()).expect("another directory is free");
        drop(first);
        Lock::take(dir.path()).expect("free again");
    }

    #[test]
    fn idle_clients_do_not_keep_others_out_for_long() {
        let dir = tempfile::tempdir().expect("a directory");
        let board = Board::default();
        board.set(&status()).expect("set");
        served(dir.path(), &board, || {
            let idle: Vec<UnixStream> = (0..CLIENTS_MAX)
                .map(|_| UnixStream::connect(dir.path().join(SOCKET)).expect("connect"))
                .collect();
            says(&ask(dir.path(), "status").expect_err("full"), "too many clients");
            let began = Instant::now();
            while ask(dir.path(), "status").is_err() {
                assert!(began.elapsed() < TIMEOUT * 3, "idle clients hold their places");
                std::thread::sleep(Duration::from_millis(20));
            }
            drop(idle);
        });
    }

    #[test]
    fn a_daemon_that_hangs_does_not_hang_its_clients() {
        let dir = tempfile::tempdir().expect("a directory");
        let _deaf = listen(&dir.path().join(SOCKET)).expect("listen");
        let patience = Duration::from_millis(20);
        let late = ask_within(patience, dir.path(), "status").expect_err("deaf");
        says(&late, "has not answered for 20ms: it hangs or is stopped");
        let mut queued = Vec::new();
        while let Ok(stream) = connect(&dir.path().join(SOCKET)) {
            queued.push(stream);
            assert!(queued.len() < 1000, "the queue has no end");
        }
        says(&ask(dir.path(), "status").expect_err("deaf"), "too busy to answer");
    }
}
