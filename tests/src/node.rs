//! One machine of the lab: commands and sockets inside its namespaces, and what an outsider sees from there.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, kill_process_group, pidfd_open};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// Long enough for a busy machine: a test that gets here has failed anyway.
const PATIENCE: Duration = Duration::from_secs(60);

/// How long an HTTP answer may keep still.
pub const HTTP_PATIENCE: Duration = Duration::from_secs(10);

/// A network namespace with a mount namespace of its own.
pub struct Node {
    /// `internet`, `hub`, `spoke` or `ctr`.
    pub name: String,
    /// The namespace's name in `/run/netns`, for `ip -n` and `nsenter --net=`.
    pub netns: String,
    pub(crate) dir: PathBuf,
    /// The lab's control group, which every command joins; none where the machine has no cgroup2.
    pub cgroup: Option<PathBuf>,
    keeper: Running,
}

/// What a finished command left behind.
#[derive(Debug, Clone)]
pub struct Outcome {
    /// None: ended by a signal.
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
    pub took: Duration,
}

/// What a connection attempt met.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Answer {
    /// The handshake completed.
    Open,
    /// A reset: nothing listens there, or something says so.
    Refused,
    /// No answer at all within the time.
    Silent,
    /// The network said no: no route, prohibited.
    Unreachable,
}

/// A finished HTTP exchange.
#[derive(Debug, Clone)]
pub struct Http {
    pub status: u16,
    pub head: String,
    pub body: String,
}

/// What nmap says about one address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Scan {
    /// State by port, for the ports nmap lists one by one.
    pub ports: BTreeMap<u16, String>,
    /// State and number of the ports that it sums up.
    pub others: BTreeMap<String, u32>,
}

impl Scan {
    pub fn open(&self) -> BTreeSet<u16> {
        self.ports.iter().filter(|(_, state)| *state == "open").map(|(port, _)| *port).collect()
    }
}

/// More than this many silent ports are a firewall and no accident.
const MANY_SILENT: usize = 4096;

impl Node {
    /// Starts the keepers of all nodes side by side: a process per node holds its mount namespace.
    pub(crate) fn open_all(prefix: &str, names: &[&str], dir: &Path) -> Result<Vec<Node>> {
        let helper = crate::helper()?;
        let cgroup = crate::reaper::cgroup(prefix);
        if let Some(group) = &cgroup {
            fs::create_dir_all(group).with_context(|| format!("create {}", group.display()))?;
        }
        let mut nodes = Vec::new();
        for name in names {
            let netns = format!("{prefix}{name}");
            let mut command = Command::new("unshare");
            command.args(["--mount", "--propagation", "private"]).arg(&helper).args(["keep", &netns]);
            let log = dir.join(format!("{name}-keeper.log"));
            let keeper = Running::start(command, log, format!("keeper of {netns}"))?;
            nodes.push(Node {
                name: name.to_string(),
                netns,
                dir: dir.to_path_buf(),
                cgroup: cgroup.clone(),
                keeper,
            });
        }
        for node in &mut nodes {
            node.keeper.wait_for(crate::HELD, PATIENCE)?;
        }
        Ok(nodes)
    }

    /// Turns the node into a router. Written from inside, as /proc/sys/net is the reader's own namespace.
    pub(crate) fn forward(&self) -> Result<()> {
        self.inside(|| {
            for family in ["ipv4/ip_forward", "ipv6/conf/all/forwarding"] {
                let path = format!("/proc/sys/net/{family}");
                fs::write(&path, "1").with_context(|| format!("write {path}"))?;
            }
            Ok(())
        })
    }

    /// A path of the node's own mounts as seen from here, such as its bpffs or wireguard-go's sockets.
    pub fn path(&self, path: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root{path}", self.keeper.pid()))
    }

    /// Where the node's network namespace can be opened.
    pub fn net_path(&self) -> String {
        format!("/run/netns/{}", self.netns)
    }

    /// A command that will run inside; the helper enters and then becomes it, so its pid is the command's.
    pub fn command<A: AsRef<OsStr>>(&self, words: &[A]) -> Command {
        // Lab::build found the helper before any node existed.
        let mut command = Command::new(crate::helper().unwrap_or_else(|_| "sg-lab-helper".into()));
        command
            .arg("enter")
            .arg(self.net_path())
            .arg(format!("/proc/{}/ns/mnt", self.keeper.pid()))
            .args(words);
        command.env("SPOKEGUARD_TAILSCALED", self.dir.join(crate::tailscaled::SOCKET));
        if let Some(group) = &self.cgroup {
            command.env("SPOKEGUARD_CGROUP", group);
        }
        command
    }

    /// Runs a command to its end, whatever its exit code. Taking longer than 20 s is an error.
    pub fn run<A: AsRef<OsStr>>(&self, words: &[A]) -> Result<Outcome> {
        self.run_within(PATIENCE, words)
    }

    pub fn run_within<A: AsRef<OsStr>>(&self, limit: Duration, words: &[A]) -> Result<Outcome> {
        finish(self.command(words), "", limit, &self.said(words))
    }

    /// Runs a command that must succeed, and gives its standard output.
    pub fn ok<A: AsRef<OsStr>>(&self, words: &[A]) -> Result<String> {
        let outcome = self.run(words)?;
        ensure!(outcome.code == Some(0), "{}: exit {:?}\n{}", self.said(words), outcome.code, outcome.all());
        Ok(outcome.stdout)
    }

    /// Runs a shell script that must succeed.
    pub fn sh(&self, script: &str) -> Result<String> {
        self.ok(&["sh", "-ec", script])
    }

    /// Runs nft commands in one transaction; an error means that nothing changed.
    pub fn nft(&self, text: &str) -> Result<()> {
        let outcome = finish(self.command(&["nft", "-f", "-"]), text, PATIENCE, "nft -f -")?;
        ensure!(outcome.code == Some(0), "nft in {}: {}\n{text}", self.name, outcome.stderr);
        Ok(())
    }

    /// A firewall that drops whatever comes in, but for what these rules say.
    pub fn drop_all_but(&self, rules: &str) -> Result<()> {
        self.nft(&format!(
            "table inet t {{ chain i {{ type filter hook input priority filter; policy drop; {rules} }}; }}"
        ))
    }

    /// Starts a command that stays; it ends with the guard, or with the lab.
    pub fn spawn<A: AsRef<OsStr>>(&self, words: &[A]) -> Result<Running> {
        self.start(self.command(words), &self.said(words))
    }

    /// The same for a prepared command, with an environment or a folder of its own.
    pub fn start(&self, command: Command, what: &str) -> Result<Running> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let log = self.dir.join(format!("{}-{}.log", self.name, NEXT.fetch_add(1, Ordering::Relaxed)));
        Running::start(command, log, what.to_string())
    }

    /// Runs a function on a thread that is in the node's network namespace (not in its mounts). A socket made
    /// there stays there, wherever it is used from.
    pub fn inside<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        inside(Path::new(&self.net_path()), work)
    }

    /// Tries to open a TCP connection from here. An emulated machine has SPOKEGUARD_PATIENCE times that limit; for one
    /// that is far below a second that should not be a second, which is when a SYN is sent again and counted again.
    pub fn connect(&self, to: SocketAddr, limit: Duration) -> Answer {
        use std::io::ErrorKind;
        let limit = limit * times("SPOKEGUARD_PATIENCE");
        let attempt = self.inside(|| {
            Ok(match TcpStream::connect_timeout(&to, limit) {
                Ok(_) => Answer::Open,
                Err(error) => match error.kind() {
                    // The connection was there (a SYN is refused otherwise), and ended before we looked.
                    ErrorKind::ConnectionReset => Answer::Open,
                    ErrorKind::ConnectionRefused => Answer::Refused,
                    ErrorKind::TimedOut | ErrorKind::WouldBlock => Answer::Silent,
                    ErrorKind::HostUnreachable | ErrorKind::NetworkUnreachable => Answer::Unreachable,
                    _ => bail!("connect to {to}: {error}"),
                },
            })
        });
        attempt.unwrap_or_else(|error| panic!("{}: {error:#}", self.name))
    }

    /// Sends a datagram and waits for any answer.
    pub fn ask_udp(&self, to: SocketAddr, limit: Duration) -> Result<Option<Vec<u8>>> {
        self.inside(|| {
            let socket = UdpSocket::bind(any(to)).with_context(|| format!("bind to ask {to}"))?;
            socket.set_read_timeout(Some(limit))?;
            socket.connect(to)?;
            socket.send(b"?")?;
            let mut answer = [0u8; 512];
            Ok(socket.recv(&mut answer).ok().map(|length| answer[..length].to_vec()))
        })
    }

    /// Sends datagrams as quickly as it can, without looking for answers.
    pub fn flood_udp(&self, to: SocketAddr, count: u32) -> Result<()> {
        self.inside(|| {
            let socket = UdpSocket::bind(any(to)).with_context(|| format!("bind to flood {to}"))?;
            for _ in 0..count {
                // An ICMP error of an earlier datagram comes back here; the flood goes on.
                let _ = socket.send_to(b"flood", to);
            }
            Ok(())
        })
    }

    /// GET with HTTP/1.0, so that the answer ends with the connection. At most 16 MiB.
    pub fn http_get(&self, to: SocketAddr, path: &str, headers: &[(&str, &str)]) -> Result<Http> {
        self.inside(|| {
            let mut stream = TcpStream::connect_timeout(&to, Duration::from_secs(2))
                .with_context(|| format!("connect to http://{to}"))?;
            stream.set_read_timeout(Some(HTTP_PATIENCE))?;
            let headers: String =
                headers.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
            stream.write_all(format!("GET {path} HTTP/1.0\r\nHost: {to}\r\n{headers}\r\n").as_bytes())?;
            let mut answer = Vec::new();
            stream
                .take(16 << 20)
                .read_to_end(&mut answer)
                .with_context(|| format!("read http://{to}{path}"))?;
            let answer = String::from_utf8_lossy(&answer);
            let (head, body) = answer
                .split_once("\r\n\r\n")
                .with_context(|| format!("http://{to}{path} ended within its head"))?;
            let status = head.split(' ').nth(1).and_then(|word| word.parse().ok());
            let status = status.with_context(|| format!("http://{to}{path} has no status: {head}"))?;
            Ok(Http { status, head: head.to_string(), body: body.to_string() })
        })
    }

    /// A SYN scan by a real nmap; `ports` as for its `-p`, `-` being all of them (7 s when they are dropped).
    /// It is an error unless every port got a verdict.
    ///
    /// On a busy machine a scan at this pace loses probes and answers, which hides a port and never invents
    /// one: what a scan of all ports calls filtered is asked once more, with care unless it is most of them.
    pub fn nmap(&self, address: IpAddr, ports: &str) -> Result<Scan> {
        if ports != "-" {
            return scan(&self.nmap_xml(address, ports, "5000")?);
        }
        let first = self.nmap_xml(address, ports, "20000")?;
        let silent: Vec<String> = states(&first)?
            .iter()
            .filter(|(_, state)| *state == "filtered")
            .map(|(port, _)| port.to_string())
            .collect();
        let second = match silent.len() {
            0 => return scan(&first),
            1..=MANY_SILENT => states(&self.nmap_xml(address, &silent.join(","), "1000")?)?,
            _ => states(&self.nmap_xml(address, ports, "20000")?)?,
        };
        let mut scan = scan(&first)?;
        for port in silent.iter().flat_map(|port| port.parse()) {
            let Some(state) = second.get(&port).filter(|state| *state != "filtered") else { continue };
            if scan.ports.remove(&port).is_none()
                && let Some(count) = scan.others.get_mut("filtered")
            {
                *count -= 1;
            }
            scan.ports.insert(port, state.clone());
        }
        scan.others.retain(|_, count| *count > 0);
        Ok(scan)
    }

    /// The state of each port by itself, at a pace that a busy machine keeps up with.
    pub fn nmap_states(&self, address: IpAddr, ports: &str) -> Result<BTreeMap<u16, String>> {
        states(&self.nmap_xml(address, ports, "15000")?)
    }

    /// The same with care, for what is in dispute.
    pub fn nmap_states_slowly(&self, address: IpAddr, ports: &str) -> Result<BTreeMap<u16, String>> {
        states(&self.nmap_xml(address, ports, "300")?)
    }

    /// `-T4` waits up to 1.25 s for an answer; nmap repeats a probe so often only where repeating has helped.
    fn nmap_xml(&self, address: IpAddr, ports: &str, per_second: &str) -> Result<String> {
        let address = address.to_string();
        let mut words =
            vec!["nmap", "-sS", "-Pn", "-n", "-T4", "--max-retries", "5", "--min-rate", per_second];
        if address.contains(':') {
            words.push("-6");
        }
        words.extend(["-p", ports, "-oX", "-", &address]);
        let outcome = self.run_within(Duration::from_secs(300), &words)?;
        ensure!(outcome.code == Some(0), "{}: {}", self.said(&words), outcome.all());
        Ok(outcome.stdout)
    }

    /// Every UDP port's state. nmap takes a second for each closed one.
    pub fn nmap_udp_states(&self, address: IpAddr, ports: &str) -> Result<BTreeMap<u16, String>> {
        let address = address.to_string();
        let mut words = vec!["nmap", "-sU", "-Pn", "-n", "-T4", "--max-retries", "3"];
        if address.contains(':') {
            words.push("-6");
        }
        words.extend(["-p", ports, "-oX", "-", &address]);
        let outcome = self.run_within(Duration::from_secs(120), &words)?;
        ensure!(outcome.code == Some(0), "{}: {}", self.said(&words), outcome.all());
        states(&outcome.stdout)
    }

    /// The ports that nmap calls open.
    pub fn nmap_open(&self, address: IpAddr, ports: &str) -> Result<BTreeSet<u16>> {
        Ok(self.nmap(address, ports)?.open())
    }

    fn said<A: AsRef<OsStr>>(&self, words: &[A]) -> String {
        let words: Vec<_> = words.iter().map(|word| word.as_ref().to_string_lossy()).collect();
        format!("{} in {}", words.join(" "), self.name)
    }
}

/// A factor that a slow machine's environment tells; 1 where it tells none.
pub fn times(name: &str) -> u32 {
    std::env::var(name)
        .map_or(1, |times| times.parse().unwrap_or_else(|_| panic!("{name}={times}: no factor")))
}

impl Outcome {
    /// Nothing on either stream.
    pub fn is_silent(&self) -> bool {
        self.stdout.trim().is_empty() && self.stderr.trim().is_empty()
    }

    /// Both streams, for the message of an assertion.
    pub fn all(&self) -> String {
        format!("--- stdout\n{}--- stderr\n{}", self.stdout, self.stderr)
    }

    pub fn json(&self) -> Result<serde_json::Value> {
        serde_json::from_str(&self.stdout).with_context(|| format!("read JSON\n{}", self.all()))
    }
}

/// A process that stays. Dropping it kills its group.
pub struct Running {
    child: Child,
    log: PathBuf,
    what: String,
}

impl Running {
    /// Both streams go to `log`: a pipe that nobody reads would stop the process sooner or later.
    pub fn start(mut command: Command, log: PathBuf, what: String) -> Result<Running> {
        let out = File::create(&log).with_context(|| format!("create {}", log.display()))?;
        let errors = out.try_clone().context("share a log file")?;
        let child = command
            .stdin(Stdio::null())
            .stdout(out)
            .stderr(errors)
            .process_group(0)
            .spawn()
            .with_context(|| format!("start {what}"))?;
        Ok(Running { child, log, what })
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it has written so far, standard output and errors together.
    pub fn log(&self) -> String {
        fs::read(&self.log).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
    }

    pub fn has_ended(&mut self) -> bool {
        !matches!(self.child.try_wait(), Ok(None))
    }

    /// Waits until its log contains `text`; its end before that is an error, with the log.
    pub fn wait_for(&mut self, text: &str, limit: Duration) -> Result<()> {
        let started = Instant::now();
        loop {
            let ended = self.has_ended();
            let log = self.log();
            if log.contains(text) {
                return Ok(());
            }
            ensure!(!ended, "{} ended before it said `{text}`\n{log}", self.what);
            ensure!(started.elapsed() < limit, "{} did not say `{text}` in {limit:?}\n{log}", self.what);
            std::thread::sleep(POLL);
        }
    }

    pub fn signal(&self, signal: Signal) -> Result<()> {
        let pid = Pid::from_raw(self.child.id() as i32).context("a process number is never 0")?;
        kill_process(pid, signal).with_context(|| format!("signal {}", self.what))
    }

    /// Waits for its end.
    pub fn wait(&mut self, limit: Duration) -> Result<ExitStatus> {
        match end_of(&mut self.child, limit)? {
            Some(status) => Ok(status),
            None => bail!("{} is still running after {limit:?}\n{}", self.what, self.log()),
        }
    }

    /// SIGTERM, and then its end.
    pub fn stop(&mut self) -> Result<ExitStatus> {
        if !self.has_ended() {
            self.signal(Signal::TERM)?;
        }
        self.wait(PATIENCE)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        kill_group(&self.child);
        let _ = self.child.wait();
    }
}

/// Runs `work` in a thread of its own in the network namespace that has this file.
pub(crate) fn inside<T: Send>(namespace: &Path, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    let path = namespace.display();
    std::thread::scope(|scope| {
        let thread = scope.spawn(move || {
            let namespace = rustix::fs::open(namespace, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
                .with_context(|| format!("open {}", namespace.display()))?;
            use std::os::fd::AsFd;
            move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))
                .context("enter the namespace")?;
            work()
        });
        thread.join().map_err(|_| anyhow!("work inside {path} panicked"))?
    })
}

/// How long to wait between two looks at something that sends no event.
const POLL: Duration = Duration::from_millis(2);

/// Looks until there is something to see; an error that names it when there is nothing in time.
pub fn wait_until<T>(limit: Duration, what: &str, mut look: impl FnMut() -> Option<T>) -> Result<T> {
    let started = Instant::now();
    loop {
        if let Some(seen) = look() {
            return Ok(seen);
        }
        ensure!(started.elapsed() < limit, "not within {limit:?}: {what}");
        std::thread::sleep(POLL);
    }
}

/// Runs a command with a deadline. Its output goes to files, not pipes: a grandchild that keeps a pipe
/// open would hold us long after the command has ended.
pub(crate) fn finish(mut command: Command, input: &str, limit: Duration, what: &str) -> Result<Outcome> {
    let started = Instant::now();
    let (mut out, mut errors) = (tempfile::tempfile()?, tempfile::tempfile()?);
    let mut child = command
        .stdin(if input.is_empty() { Stdio::null() } else { Stdio::piped() })
        .stdout(out.try_clone()?)
        .stderr(errors.try_clone()?)
        .process_group(0)
        .spawn()
        .with_context(|| format!("start {what}"))?;
    if let Some(mut stdin) = child.stdin.take() {
        // A program that does not read all of it says why on its standard error.
        let _ = stdin.write_all(input.as_bytes());
    }
    let status = end_of(&mut child, limit)?;
    if status.is_none() {
        kill_group(&child);
        let _ = child.wait();
    }
    let took = started.elapsed();
    let outcome = Outcome {
        code: status.and_then(|status| status.code()),
        stdout: read_back(&mut out)?,
        stderr: read_back(&mut errors)?,
        took,
    };
    ensure!(status.is_some(), "{what}: still running after {limit:?}\n{}", outcome.all());
    Ok(outcome)
}

fn read_back(file: &mut File) -> Result<String> {
    use std::io::{Seek, SeekFrom};
    file.seek(SeekFrom::Start(0)).context("rewind a command's output")?;
    let mut bytes = Vec::new();
    file.take(64 << 20).read_to_end(&mut bytes).context("read a command's output")?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// The end of a child, or None when the time is over; woken by the kernel, not by looking again.
fn end_of(child: &mut Child, limit: Duration) -> Result<Option<ExitStatus>> {
    let pid = Pid::from_raw(child.id() as i32).context("a process number is never 0")?;
    let deadline = Instant::now() + limit;
    loop {
        if let Some(status) = child.try_wait().context("wait for a command")? {
            return Ok(Some(status));
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(None);
        }
        let handle = pidfd_open(pid, PidfdFlags::empty()).context("open a command's pidfd")?;
        let left = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) };
        match poll(&mut [PollFd::new(&handle, PollFlags::IN)], Some(&left)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error).context("poll a command's pidfd"),
        }
    }
}

/// The group as well as the process: a shell's children are in it. Safe while the child is not waited for,
/// since its number is not given away before that.
fn kill_group(child: &Child) {
    if let Some(pid) = Pid::from_raw(child.id() as i32) {
        let _ = kill_process_group(pid, Signal::KILL);
    }
}

fn any(like: SocketAddr) -> SocketAddr {
    if like.is_ipv4() { ([0, 0, 0, 0], 0).into() } else { ([0u16; 8], 0).into() }
}

/// nmap's XML: the two elements that carry states. An answer without a finished host is an error, so that
/// a scan that failed never reads as "nothing is open".
fn scan(xml: &str) -> Result<Scan> {
    ensure!(xml.contains("<finished ") && xml.contains("exit=\"success\""), "the scan did not finish");
    let asked: u32 =
        attribute(xml, "numservices").context("no number of ports")?.parse().context("number of ports")?;
    let mut scan = Scan { ports: BTreeMap::new(), others: BTreeMap::new() };
    for element in xml.split('<') {
        if element.starts_with("extraports ") {
            let state = attribute(element, "state").context("extraports without a state")?;
            let count: u32 = attribute(element, "count").context("extraports without a count")?.parse()?;
            *scan.others.entry(state.to_string()).or_default() += count;
        }
    }
    for element in xml.split("<port ").skip(1) {
        let port = attribute(element, "portid").context("port without a number")?.parse()?;
        let state = element.split("<state ").nth(1).and_then(|rest| attribute(rest, "state"));
        scan.ports.insert(port, state.context("port without a state")?.to_string());
    }
    let judged = scan.ports.len() as u32 + scan.others.values().sum::<u32>();
    ensure!(judged == asked, "{asked} ports asked, {judged} judged");
    Ok(scan)
}

/// Every port's state by nmap's XML. Ports that it sums up are listed as ranges in the reasons of each sum.
pub fn states(xml: &str) -> Result<BTreeMap<u16, String>> {
    let asked = scan(xml)?;
    let mut all = asked.ports;
    for sum in xml.split("<extraports ").skip(1) {
        let sum = sum.split("</extraports>").next().unwrap_or(sum);
        let state = attribute(sum, "state").context("extraports without a state")?;
        for reason in sum.split("<extrareasons ").skip(1) {
            for range in attribute(reason, "ports").context("a reason without ports")?.split(',') {
                let (first, last) = range.split_once('-').unwrap_or((range, range));
                for port in first.parse::<u16>()?..=last.parse()? {
                    all.insert(port, state.to_string());
                }
            }
        }
    }
    let judged = asked.others.values().sum::<u32>() as usize;
    let single = xml.split("<port ").skip(1).count();
    ensure!(all.len() == judged + single, "{} ports listed, {} judged", all.len(), judged + single);
    Ok(all)
}

fn attribute<'a>(element: &'a str, name: &str) -> Option<&'a str> {
    element.split(&format!("{name}=\"")).nth(1)?.split('"').next()
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEAD: &str =
        r#"<nmaprun><scaninfo type="syn" protocol="tcp" numservices="3" services="22,80,443"/>"#;
    const TAIL: &str = r#"<runstats><finished time="1" exit="success"/></runstats></nmaprun>"#;

    #[test]
    fn a_scan_counts_every_port_or_is_an_error() {
        let port = r#"<ports><extraports state="filtered" count="2"></extraports>
            <port protocol="tcp" portid="80"><state state="open" reason="syn-ack"/><service name="http"/></port></ports>"#;
        let seen = scan(&format!("{HEAD}{port}{TAIL}")).unwrap();
        assert_eq!(seen.open(), BTreeSet::from([80]));
        assert_eq!(seen.others, BTreeMap::from([("filtered".to_string(), 2)]));
        for (xml, why) in [
            (format!("{HEAD}{TAIL}"), "3 ports asked, 0 judged"),
            (format!("{HEAD}{port}"), "did not finish"),
            (String::new(), "did not finish"),
        ] {
            let error = scan(&xml).unwrap_err().to_string();
            assert!(error.contains(why), "{error}");
        }
    }

    #[test]
    fn a_command_that_does_not_end_is_killed_with_its_children_and_reported() {
        let mut shell = Command::new("sh");
        shell.args(["-c", "echo begun; sleep 987 & echo $! >&2; wait"]);
        let error = finish(shell, "", Duration::from_millis(300), "a slow shell").unwrap_err().to_string();
        assert!(error.starts_with("a slow shell: still running after 300ms"), "{error}");
        assert!(error.contains("begun"), "{error}");
        let grandchild = error.lines().last().unwrap().trim().to_string();
        wait_until(Duration::from_secs(5), "the grandchild is gone", || {
            let state = fs::read_to_string(format!("/proc/{grandchild}/stat")).unwrap_or_default();
            // Whoever adopts it may take a while to collect it.
            (state.is_empty() || state.contains(") Z ")).then_some(())
        })
        .unwrap();
    }

    #[test]
    fn a_finished_command_keeps_code_and_streams_apart() {
        let mut shell = Command::new("sh");
        shell.args(["-c", "read word; echo out $word; echo err >&2; exit 3"]);
        let outcome = finish(shell, "in\n", PATIENCE, "a shell").unwrap();
        assert_eq!((outcome.code, &*outcome.stdout, &*outcome.stderr), (Some(3), "out in\n", "err\n"));
    }
}
