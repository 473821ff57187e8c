//! Who holds a socket: from its inode to the process, and from the process to the systemd
//! unit. The kernel keeps no such table, so /proc is walked; a cache makes that rare.

use std::collections::HashMap;
use std::ffi::CStr;
use std::hash::{BuildHasherDefault, Hasher};
use std::io::Read as _;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};

use anyhow::Context;
use rustix::fs::{CWD, Mode, OFlags, RawDir, openat, readlinkat_raw};
use rustix::io::Errno;

use crate::terms::{Actor, printable};

/// Socket inodes and their holders, kept between reads.
///
/// Among several holders the lowest process number is named: the one that made the socket
/// before it forked workers, unless process numbers have wrapped since. For a socket of a
/// systemd socket unit that is process 1.
#[derive(Default)]
pub struct Owners {
    sockets: ByInode<Holder>,
    processes: HashMap<u32, Process>,
    unreadable: usize,
    round: u32,
}

struct Holder {
    /// `None`: looked for `misses` times, and found in no process.
    pid: Option<u32>,
    misses: u32,
    /// The round that last asked for it; what nobody asks for is forgotten.
    round: u32,
}

struct Process {
    /// In clock ticks since boot: with the number it names one process for good.
    started: u64,
    comm: Vec<u8>,
    actor: Actor,
}

impl Owners {
    pub fn new() -> Self {
        Self::default()
    }

    /// Processes whose descriptors could not be read in the last walk (no CAP_SYS_PTRACE,
    /// another user's): a socket without an owner may be theirs.
    pub fn unreadable(&self) -> usize {
        self.unreadable
    }

    /// The holder found by the last [`Owners::look_up`] that asked for this inode.
    pub fn of(&self, inode: u64) -> Option<&Actor> {
        let pid = self.sockets.get(&inode)?.pid?;
        Some(&self.processes.get(&pid)?.actor)
    }

    /// Finds the holders of these sockets. /proc is walked only for inodes not known yet,
    /// and for those whose holder has gone. Inode 0 is no socket of a process.
    pub fn look_up(&mut self, inodes: impl Iterator<Item = u64>) -> anyhow::Result<()> {
        let proc = open(CWD, c"/proc").context("open /proc to find the holders of sockets")?;
        self.round = self.round.wrapping_add(1);
        self.processes.retain(|pid, process| process.refresh(&proc, *pid));

        let mut unknown: ByInode<Option<u32>> = ByInode::default();
        for inode in inodes.filter(|inode| *inode != 0) {
            let holder = self.sockets.entry(inode).or_insert(Holder { pid: None, misses: 0, round: 0 });
            if holder.round == self.round {
                continue;
            }
            holder.round = self.round;
            let known = holder.pid.is_some_and(|pid| self.processes.contains_key(&pid));
            if !known && holder.is_due() {
                unknown.insert(inode, None);
            }
        }
        let round = self.round;
        self.sockets.retain(|_, holder| holder.round == round);
        if !unknown.is_empty() {
            self.walk(&proc, &mut unknown)?;
            for (inode, pid) in unknown {
                if let Some(holder) = self.sockets.get_mut(&inode) {
                    holder.misses = if pid.is_some() { 0 } else { holder.misses.saturating_add(1) };
                    holder.pid = pid;
                }
            }
        }
        // A process that holds no wanted socket any more needs no further look.
        let mut holders: Vec<u32> = self.sockets.values().filter_map(|holder| holder.pid).collect();
        holders.sort_unstable();
        self.processes.retain(|pid, _| holders.binary_search(pid).is_ok());
        Ok(())
    }

    fn walk(&mut self, proc: &OwnedFd, unknown: &mut ByInode<Option<u32>>) -> anyhow::Result<()> {
        self.unreadable = 0;
        let mut left = unknown.len();
        let mut entries = Vec::with_capacity(32 * 1024);
        let mut pids = Vec::new();
        each_number(proc, &mut entries, |pid, _| pids.push(pid)).context("list /proc")?;
        pids.sort_unstable();
        for pid in pids {
            if left == 0 {
                break;
            }
            // A process may end at any moment here; then it holds nothing.
            let Ok(folder) = open(proc, number(pid, &mut [0; 11])) else { continue };
            let mut found = false;
            match sockets_of(&folder, &mut entries, |inode| {
                if let Some(holder @ None) = unknown.get_mut(&inode) {
                    *holder = Some(pid);
                    left -= 1;
                    found = true;
                }
            }) {
                Err(Errno::ACCESS | Errno::PERM) => self.unreadable += 1,
                // Ended, or out of descriptors: the latter is worth an error.
                Err(error @ (Errno::MFILE | Errno::NFILE | Errno::NOMEM)) => {
                    return Err(error).with_context(|| format!("read the descriptors of process {pid}"));
                }
                Ok(()) | Err(_) => {}
            }
            if found && let Some(process) = Process::read(&folder, pid) {
                self.processes.insert(pid, process);
            }
        }
        Ok(())
    }
}

/// Inode numbers come from a counter of the kernel, so spreading them needs no keyed hash.
type ByInode<T> = HashMap<u64, T, BuildHasherDefault<InodeHasher>>;

#[derive(Default)]
struct InodeHasher(u64);

impl Hasher for InodeHasher {
    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u64(u64::from(*byte));
        }
    }

    fn write_u64(&mut self, value: u64) {
        // The odd number nearest to 2^64 / phi; the map uses the top bits and the low ones.
        self.0 = (self.0 ^ value).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(26);
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

impl Holder {
    /// A socket without a holder (in flight between processes, or held where we may not
    /// look) is looked for again at growing intervals, so that it costs no walk each time.
    fn is_due(&self) -> bool {
        self.pid.is_some() || self.misses.is_power_of_two() || self.misses.is_multiple_of(64)
    }
}

impl Process {
    fn read(folder: &OwnedFd, pid: u32) -> Option<Self> {
        let (started, comm) = stat(folder)?;
        let process = printable(&String::from_utf8_lossy(&comm), COMM);
        let actor = Actor { pid, process, unit: unit_in(folder), user: user_in(folder) };
        Some(Self { started, comm, actor })
    }

    /// Whether this process still runs; takes on its new name and unit after an exec.
    fn refresh(&mut self, proc: &OwnedFd, pid: u32) -> bool {
        let Ok(folder) = open(proc, number(pid, &mut [0; 11])) else { return false };
        match stat(&folder) {
            Some((started, comm)) if started == self.started => {
                if comm != self.comm {
                    match Self::read(&folder, pid) {
                        Some(process) => *self = process,
                        None => return false,
                    }
                }
                true
            }
            _ => false,
        }
    }
}

/// A process that the kernel named, with its unit and login user as long as it still runs.
pub fn actor(pid: u32, comm: &str) -> Actor {
    let folder = folder_of(pid);
    let (unit, user) = (folder.as_ref().and_then(unit_in), folder.as_ref().and_then(user_in));
    Actor { unit, user, ..stranger(pid, comm) }
}

/// The same without looking for either, which costs some 100 us.
pub fn stranger(pid: u32, comm: &str) -> Actor {
    Actor { pid, process: printable(comm, COMM), unit: None, user: None }
}

/// Whose login a process came from, by name.
pub fn user_of(pid: u32) -> Option<String> {
    user_in(&folder_of(pid)?)
}

fn folder_of(pid: u32) -> Option<OwnedFd> {
    let proc = open(CWD, c"/proc").ok()?;
    open(proc, number(pid, &mut [0; 11])).ok()
}

/// The systemd unit of a control group by its path below the root.
pub fn unit_in_cgroup(path: &str) -> Option<String> {
    decode_unit(&format!("0::{path}\n"))
}

/// The kernel's TASK_COMM_LEN, with room for what /proc escapes (a newline as `\n`).
const COMM: usize = 64;

/// The unit in the text of /proc/PID/cgroup: the innermost service, socket or scope of the
/// unified hierarchy, or of systemd's own one where version 1 is in use.
pub(super) fn decode_unit(text: &str) -> Option<String> {
    let line = |wanted: fn(&str) -> bool| {
        text.lines()
            .filter_map(|line| {
                let (_, rest) = line.split_once(':')?;
                let (controllers, path) = rest.split_once(':')?;
                wanted(controllers).then_some(path)
            })
            .next()
    };
    // In the hybrid layout both lines are there, and the unified one may say just "/".
    let unit_on = |path: &str| {
        path.rsplit('/')
            .find(|part| {
                [".service", ".socket", ".scope"]
                    .iter()
                    .any(|kind| part.len() > kind.len() && part.ends_with(kind))
            })
            .map(unescape)
    };
    line(str::is_empty).and_then(unit_on).or_else(|| line(|c| c == "name=systemd").and_then(unit_on))
}

/// systemd writes characters that a unit name can't hold as `\x2d`.
fn unescape(name: &str) -> String {
    let mut bytes = Vec::with_capacity(name.len());
    let mut rest = name.as_bytes();
    while let Some((first, tail)) = rest.split_first() {
        let code = (*first == b'\\' && tail.first() == Some(&b'x'))
            .then(|| {
                std::str::from_utf8(tail.get(1..3)?)
                    .ok()
                    .filter(|hex| hex.bytes().all(|b| b.is_ascii_hexdigit()))
            })
            .flatten()
            .and_then(|hex| u8::from_str_radix(hex, 16).ok());
        match code {
            Some(byte) => {
                bytes.push(byte);
                rest = tail.get(3..).unwrap_or(&[]);
            }
            None => {
                bytes.push(*first);
                rest = tail;
            }
        }
    }
    printable(&String::from_utf8_lossy(&bytes), 255)
}

/// Start time and name in the text of /proc/PID/stat. The name may hold anything, blanks
/// and brackets too, so the fields are counted from the last bracket.
pub(super) fn decode_stat(text: &[u8]) -> Option<(u64, Vec<u8>)> {
    let open = text.iter().position(|byte| *byte == b'(')?;
    let close = text.iter().rposition(|byte| *byte == b')')?;
    let comm = text.get(open + 1..close)?.to_vec();
    // Field 22 of proc(5); the one after the name is number 3.
    let field = text.get(close + 2..)?.split(|byte| *byte == b' ').nth(19)?;
    Some((std::str::from_utf8(field).ok()?.parse().ok()?, comm))
}

/// The inode in a link's text `socket:[123]`.
pub(super) fn decode_socket(link: &[u8]) -> Option<u64> {
    let digits = link.strip_prefix(b"socket:[")?.strip_suffix(b"]")?;
    if digits.is_empty() {
        return None;
    }
    digits.iter().try_fold(0u64, |sum, byte| {
        sum.checked_mul(10)?.checked_add(u64::from(byte.is_ascii_digit().then(|| byte - b'0')?))
    })
}

fn stat(folder: &OwnedFd) -> Option<(u64, Vec<u8>)> {
    let mut buffer = [0; 1024];
    decode_stat(read_start(folder, c"stat", &mut buffer)?)
}

fn unit_in(folder: &OwnedFd) -> Option<String> {
    let mut buffer = [0; 8192];
    decode_unit(&String::from_utf8_lossy(read_start(folder, c"cgroup", &mut buffer)?))
}

fn user_in(folder: &OwnedFd) -> Option<String> {
    let mut buffer = [0; 16];
    let uid = decode_login(read_start(folder, c"loginuid", &mut buffer)?)?;
    let mut users = Vec::new();
    if let Ok(file) = std::fs::File::open("/etc/passwd") {
        let _ = file.take(PASSWD_MAX).read_to_end(&mut users);
    }
    let named = named(&String::from_utf8_lossy(&users), uid);
    Some(named.unwrap_or_else(|| format!("uid-{uid}")))
}

/// The number in /proc/PID/loginuid; `None`: nobody logged in.
pub(super) fn decode_login(text: &[u8]) -> Option<u32> {
    std::str::from_utf8(text).ok()?.trim().parse().ok().filter(|uid| *uid != u32::MAX)
}

/// The name of a user in the text of /etc/passwd.
fn named(users: &str, uid: u32) -> Option<String> {
    users.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next().filter(|name| !name.is_empty())?;
        (fields.nth(1)?.parse() == Ok(uid)).then(|| printable(name, 64))
    })
}

/// Users beyond that are called by their number.
const PASSWD_MAX: u64 = 1 << 20;

/// As much of a small file of /proc as fits.
fn read_start<'a>(folder: &OwnedFd, name: &CStr, buffer: &'a mut [u8]) -> Option<&'a [u8]> {
    let file = openat(folder, name, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).ok()?;
    let mut filled = 0;
    while let Some(space) = buffer.get_mut(filled..).filter(|space| !space.is_empty()) {
        match rustix::io::read(&file, space) {
            Ok(0) => break,
            Ok(length) => filled += length,
            Err(Errno::INTR) => {}
            Err(_) => return None,
        }
    }
    buffer.get(..filled)
}

/// The inode of every socket that the process of this /proc folder holds.
fn sockets_of(folder: &OwnedFd, entries: &mut Vec<u8>, mut socket: impl FnMut(u64)) -> Result<(), Errno> {
    let descriptors = open(folder, c"fd")?;
    let mut denied = None;
    each_number(&descriptors, entries, |_, name| {
        // The longest text that matters is "socket:[4294967295]"; paths may be cut.
        let mut text = [MaybeUninit::uninit(); 32];
        match readlinkat_raw(&descriptors, name, &mut text[..]) {
            Ok((link, _)) => {
                if let Some(inode) = decode_socket(link) {
                    socket(inode);
                }
            }
            Err(error @ (Errno::ACCESS | Errno::PERM)) => denied = Some(error),
            // Closed in between.
            Err(_) => {}
        }
    })?;
    denied.map_or(Ok(()), Err)
}

/// Every entry of a folder whose name is a number.
fn each_number(
    folder: &OwnedFd,
    buffer: &mut Vec<u8>,
    mut entry: impl FnMut(u32, &CStr),
) -> Result<(), Errno> {
    buffer.clear();
    let mut listing = RawDir::new(folder, buffer.spare_capacity_mut());
    while let Some(found) = listing.next() {
        let found = found?;
        let name = found.file_name();
        let bytes = name.to_bytes();
        if bytes.first().is_some_and(u8::is_ascii_digit)
            && let Some(number) = std::str::from_utf8(bytes).ok().and_then(|text| text.parse().ok())
        {
            entry(number, name);
        }
    }
    Ok(())
}

fn open(folder: impl AsFd, name: &CStr) -> Result<OwnedFd, Errno> {
    openat(folder, name, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
}

/// A number as a path, without the heap: this is done for every process of the machine.
fn number(mut value: u32, buffer: &mut [u8; 11]) -> &CStr {
    let mut at = 10;
    buffer[at] = 0;
    loop {
        at -= 1;
        buffer[at] = b'0' + (value % 10) as u8;
        value /= 10;
        if value == 0 {
            break;
        }
    }
    CStr::from_bytes_until_nul(&buffer[at..]).unwrap_or(c"")
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;
    use crate::source::{Running, soon};

    /// No socket has this number: they come from a 32-bit counter.
    const NOBODY: u64 = u32::MAX as u64 + 7;

    fn inode(socket: &impl AsFd) -> u64 {
        rustix::fs::fstat(socket).expect("a socket").st_ino
    }

    #[test]
    fn login_users_are_called_as_the_machine_calls_them() {
        let users = "root:x:0:0:root:/root:/bin/sh\n:x:7::\nhalf\nal\u{1b}[1mice:x:1000:1000::/:/bin/sh\n";
        assert_eq!(named(users, 0).as_deref(), Some("root"));
        assert_eq!([7, 8].map(|uid| named(users, uid)), [None, None]);
        assert!(named(users, 1000).is_some_and(|name| name.ends_with("ice") && !name.contains('\u{1b}')));
        assert_eq!(decode_login(b"1000"), Some(1000));
        for nobody in [&b"4294967295"[..], b"", b"-1", b"x\n"] {
            assert_eq!(decode_login(nobody), None);
        }
    }

    #[test]
    fn units_are_read_from_both_versions_of_control_groups() {
        let check =
            |text: &str, unit: Option<&str>| assert_eq!(decode_unit(text).as_deref(), unit, "{text:?}");
        check("0::/system.slice/ssh.service\n", Some("ssh.service"));
        check(
            "0::/system.slice/system-postgresql.slice/postgresql@15-main.service\n",
            Some("postgresql@15-main.service"),
        );
        check("0::/system.slice/docker-4f2a.scope\n", Some("docker-4f2a.scope"));
        check(
            "0::/user.slice/user-1000.slice/user@1000.service/app.slice/web.service\n",
            Some("web.service"),
        );
        check("0::/system.slice/a.service/payload\n", Some("a.service"));
        check("0::/init.scope\n", Some("init.scope"));
        check("0::/system.slice/app\\x2dweb.service\n", Some("app-web.service"));
        // Version 1, and the hybrid layout.
        check("12:pids:/x.service\n1:name=systemd:/system.slice/nginx.service\n", Some("nginx.service"));
        check("1:name=systemd:/system.slice/nginx.service\n0::/\n", Some("nginx.service"));
        // A colon in the path is part of it.
        check("0::/system.slice/sys-net:0.service\n", Some("sys-net:0.service"));
        for none in ["0::/\n", "0::/system.slice\n", "", "garbage", "0::/.service\n", "5:cpu:/a.service\n"] {
            check(none, None);
        }
        // Neither escaped nor plain can a name move the cursor.
        check("0::/a\\x1b[2J.service\n", Some("a\u{fffd}[2J.service"));
        check("0::/a\\xg1\\x2.service\n", Some("a\\xg1\\x2.service"));
    }

    #[test]
    fn a_process_name_with_brackets_and_blanks_does_not_shift_the_fields() {
        let rest = "S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 4242 20 21";
        assert_eq!(decode_stat(format!("7 (a) b (c) {rest}").as_bytes()), Some((4242, b"a) b (c".to_vec())));
        for broken in ["7 (a) S 1 2", "7 a", "", "7 )(", "7 (a)"] {
            assert_eq!(decode_stat(broken.as_bytes()), None, "{broken:?}");
        }
    }

    #[test]
    fn only_a_link_to_a_socket_has_an_inode() {
        assert_eq!(decode_socket(b"socket:[4294967295]"), Some(4_294_967_295));
        for other in [
            "socket:[]",
            "socket:[12",
            "socket:[1x]",
            "pipe:[12]",
            "/tmp/socket:[12]",
            "socket:[99999999999999999999]",
        ] {
            assert_eq!(decode_socket(other.as_bytes()), None, "{other}");
        }
    }

    #[test]
    fn numbers_are_written_as_paths() {
        for value in [0, 7, 10, 4_294_967_295] {
            assert_eq!(number(value, &mut [0; 11]).to_str(), Ok(value.to_string().as_str()));
        }
    }

    #[test]
    fn a_socket_belongs_to_its_process_and_a_closed_one_to_nobody() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("bound");
        let mine = inode(&listener);
        let mut owners = Owners::new();
        owners.look_up([mine, NOBODY, 0].into_iter()).expect("looked up");
        let actor = owners.of(mine).expect("an owner").clone();
        assert_eq!(actor.pid, std::process::id());
        assert!(!actor.process.is_empty());
        assert_eq!((owners.of(NOBODY), owners.of(0)), (None, None));

        // Known by now: the answer stays without a walk, and what is not asked for goes.
        owners.look_up([mine].into_iter()).expect("looked up");
        assert_eq!(owners.of(mine), Some(&actor));
        owners.look_up([].into_iter()).expect("looked up");
        assert!(owners.of(mine).is_none() && owners.sockets.is_empty() && owners.processes.is_empty());
    }

    #[test]
    fn when_the_holder_ends_the_socket_goes_to_the_process_that_still_has_it() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("bound");
        let mine = inode(&listener);
        let folder = tempfile::tempdir().expect("a folder");
        let hold = || {
            // A child inherits only what is marked so; standard input is.
            let copy = listener.try_clone().expect("a copy");
            let mut child = std::process::Command::new("sh");
            let wait =
                format!("until [ -e {}/go ]; do sleep 0.01; done; exec sleep 600", folder.path().display());
            child.args(["-c", &wait]).stdin(std::os::fd::OwnedFd::from(copy));
            Running(child.spawn().expect("sh"))
        };
        let (first, second) = (hold(), hold());
        drop(listener);

        // An inode that nobody holds keeps the walk going past the first holder.
        let mut owners = Owners::new();
        let holder = |owners: &mut Owners| {
            owners.look_up([mine, NOBODY].into_iter()).expect("looked up");
            owners.of(mine).cloned()
        };
        let lowest = first.0.id().min(second.0.id());
        assert_eq!(holder(&mut owners).map(|actor| (actor.pid, actor.process)), Some((lowest, "sh".into())));
        std::fs::write(folder.path().join("go"), "").expect("written");
        soon("the new name after exec", || holder(&mut owners).filter(|actor| actor.process == "sleep"));

        let (gone, left) = if lowest == first.0.id() { (first, second) } else { (second, first) };
        drop(gone);
        // Soon, since a short-lived child or a test between fork and exec may have a copy.
        soon("the other holder", || holder(&mut owners).filter(|actor| actor.pid == left.0.id()));
        drop(left);
        soon("nobody left", || holder(&mut owners).is_none().then_some(()));
    }

    #[test]
    fn a_process_number_that_was_used_again_is_another_process() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("bound");
        let mut owners = Owners::new();
        let started = |owners: &mut Owners| {
            owners.look_up([inode(&listener)].into_iter()).expect("looked up");
            owners.processes[&std::process::id()].started
        };
        let true_start = started(&mut owners);
        let cached = owners.processes.get_mut(&std::process::id()).expect("cached");
        // As if the one that was seen had been started earlier.
        (cached.started, cached.actor.process) = (true_start - 1, "before".into());
        assert_eq!(started(&mut owners), true_start);
        assert!(owners.of(inode(&listener)).is_some_and(|actor| actor.process != "before"));
    }

    #[test]
    fn a_socket_that_nobody_holds_is_not_looked_for_every_time() {
        let due: Vec<u32> =
            (0..200).filter(|misses| Holder { pid: None, misses: *misses, round: 0 }.is_due()).collect();
        assert_eq!(due, [0, 1, 2, 4, 8, 16, 32, 64, 128, 192]);
        assert!(Holder { pid: Some(1), misses: 5, round: 0 }.is_due());
    }
}
