//! The daemon's side of the metrics server, which is another process.
//!
//! What parses strangers' bytes has no business with netlink and bpf, and if it falls over,
//! enforcement must not. So `/metrics` and `/healthz` are served by a child that has no
//! capability, can open nothing and start nothing. The daemon makes the listening sockets
//! and hands them over; the child rings when a scrape wants a fresh text.
//!
//! One message is one packet of a socket pair, as text: a word, what it concerns, and after
//! the first line the rest. Nothing the child says is believed beyond a number to show and
//! whether it is held in; and a child that has ended is started again.

use std::collections::BTreeSet;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::net::SocketAddr;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::Context as _;
use ipnet::IpNet;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
};
use tokio::time::{Instant, sleep_until};

use super::http;
use super::privileges::{Confinement, Landlock};
use crate::sys::memory;
use crate::sys::sockets::Readable;
use crate::terms::printable;

/// A text of 150 series is some 20 KB.
pub(super) const ORDER_BYTES_MAX: usize = 128 * 1024;
const WORD_BYTES_MAX: usize = 4096;
const GAPS_MAX: usize = 32;
const GAP_CHARS_MAX: usize = 160;
/// Between the ends of servers and the starts of others.
const PAUSE: Duration = Duration::from_millis(500);
const PAUSE_MAX: Duration = Duration::from_secs(60);
/// An address may be held for a moment by the server of a daemon that was killed.
const RETRY: Duration = Duration::from_millis(200);
const RETRIES: u32 = 10;

/// What the daemon tells its server.
#[derive(Clone, Debug, PartialEq)]
pub enum Order {
    /// Whom to serve.
    Clients(Vec<IpNet>),
    /// A listening socket comes along.
    Listen(SocketAddr),
    Close(SocketAddr),
    /// The OpenMetrics text to show from now on.
    Text(String),
    /// A cycle has finished; the next is due after this.
    Beat(Duration),
}

impl Order {
    pub fn to_text(&self) -> String {
        match self {
            Order::Clients(clients) => {
                clients.iter().fold("clients".to_owned(), |text, client| format!("{text} {client}"))
            }
            Order::Listen(address) => format!("listen {address}"),
            Order::Close(address) => format!("close {address}"),
            Order::Text(text) => format!("text\n{text}"),
            Order::Beat(period) => format!("beat {}", period.as_millis()),
        }
    }

    pub fn from_text(text: &str) -> Option<Self> {
        let (line, body) = text.split_once('\n').unwrap_or((text, ""));
        let (word, rest) = line.split_once(' ').unwrap_or((line, ""));
        Some(match word {
            "clients" => {
                Order::Clients(rest.split_whitespace().map(str::parse).collect::<Result<_, _>>().ok()?)
            }
            "listen" => Order::Listen(rest.parse().ok()?),
            "close" => Order::Close(rest.parse().ok()?),
            "text" => Order::Text(body.to_owned()),
            "beat" => Order::Beat(Duration::from_millis(rest.parse().ok()?)),
            _ => return None,
        })
    }
}

/// What the server tells the daemon.
#[derive(Clone, Debug, PartialEq)]
pub enum Word {
    /// A scrape wants a fresh text; so many connections were refused so far.
    Ring { rejects: u64 },
    /// It is held in, or how it is not.
    Confined(Confinement),
}

impl Word {
    pub fn to_text(&self) -> String {
        match self {
            Word::Ring { rejects } => format!("ring {rejects}"),
            Word::Confined(Confinement { landlock, gaps }) => {
                gaps.iter().fold(format!("confined {}", landlock.name()), |text, gap| {
                    format!("{text}\n{}", printable(gap, GAP_CHARS_MAX))
                })
            }
        }
    }

    pub fn from_text(text: &str) -> Option<Self> {
        let (line, body) = text.split_once('\n').unwrap_or((text, ""));
        match line.split_once(' ')? {
            ("ring", rejects) => Some(Word::Ring { rejects: rejects.parse().ok()? }),
            ("confined", landlock) => {
                let landlock = Landlock::ALL.into_iter().find(|kind| kind.name() == landlock)?;
                let gaps = body.lines().take(GAPS_MAX).map(|gap| printable(gap, GAP_CHARS_MAX)).collect();
                Some(Word::Confined(Confinement { landlock, gaps }))
            }
            _ => None,
        }
    }
}

/// What there is to do for the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    /// Make a fresh text.
    Text,
    /// Say again where to listen: it is new, or an address was taken.
    Listen,
    /// It has said how it is held in.
    Confined,
}

/// The server as the daemon sees it.
#[derive(Default)]
pub struct Front {
    clients: Vec<IpNet>,
    listening: BTreeSet<SocketAddr>,
    period: Option<Duration>,
    server: Option<Server>,
    confinement: Option<Confinement>,
    /// Of this server, and of those before it.
    rejects: u64,
    rejects_before: u64,
    /// When an ended server is followed by another, and how long the one after that waits.
    due: Option<Instant>,
    pause: Duration,
    /// When to listen again where it failed, and how often yet.
    retry: Option<Instant>,
    retries: u32,
}

struct Server {
    process: Option<Child>,
    channel: Readable,
    since: Instant,
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(process) = &mut self.process {
            let _ = process.kill();
            let _ = process.wait();
        }
    }
}

impl Front {
    /// Serves these clients, once it is started.
    pub fn new(clients: Vec<IpNet>) -> Self {
        Self { clients, retries: RETRIES, pause: PAUSE, ..Self::default() }
    }

    /// Serves these from now on. The listeners are made anew by the next [`Self::listen_on`].
    pub fn serve_only(&mut self, clients: Vec<IpNet>) {
        if self.clients != clients {
            self.clients = clients;
            self.tell(&Order::Clients(self.clients.clone()));
            self.listen_on(&[]);
        }
    }

    /// Starts the server. Must be called inside a tokio runtime. A failure is logged, and
    /// [`Front::next`] tries again.
    pub fn start(&mut self) {
        match spawn() {
            Ok((channel, process)) => self.take(channel, Some(process)),
            Err(error) => {
                log::warn!("metrics: {error:#}");
                self.rest();
            }
        }
    }

    /// Another server, but not at once; and later each time, unless they last.
    fn rest(&mut self) {
        self.due = Some(Instant::now() + self.pause);
        self.pause = (self.pause * 2).min(PAUSE_MAX);
    }

    fn take(&mut self, channel: Readable, process: Option<Child>) {
        self.server = Some(Server { process, channel, since: Instant::now() });
        self.due = None;
        self.tell(&Order::Clients(self.clients.clone()));
        if let Some(period) = self.period {
            self.tell(&Order::Beat(period));
        }
    }

    /// Waits for something to do for the server. Cancel safe. Never comes back before
    /// [`Front::start`] was called.
    pub async fn next(&mut self) -> Call {
        loop {
            let retry = self.retry;
            match (&self.server, self.due) {
                (Some(server), _) => {
                    let word = tokio::select! {
                        word = server.channel.take(receive_word) => word,
                        () = sleep_until(retry.unwrap_or_else(Instant::now)), if retry.is_some() => {
                            self.retry = None;
                            return Call::Listen;
                        }
                    };
                    match word {
                        Ok(Some(Word::Ring { rejects })) => {
                            self.rejects = rejects;
                            return Call::Text;
                        }
                        Ok(Some(Word::Confined(confinement))) => {
                            self.confinement = Some(confinement);
                            return Call::Confined;
                        }
                        Ok(None) => self.lose("it has ended"),
                        Err(error) => self.lose(&error.to_string()),
                    }
                }
                (None, Some(due)) => {
                    sleep_until(due).await;
                    self.start();
                    if self.server.is_some() {
                        return Call::Listen;
                    }
                }
                (None, None) => std::future::pending().await,
            }
        }
    }

    fn lose(&mut self, why: &str) {
        log::warn!("the metrics server is started again: {}", printable(why, GAP_CHARS_MAX));
        if self.server.take().is_some_and(|server| server.since.elapsed() > PAUSE_MAX) {
            self.pause = PAUSE;
        }
        self.rest();
        self.listening.clear();
        self.confinement = None;
        self.rejects_before = self.rejects_before.saturating_add(std::mem::take(&mut self.rejects));
    }

    /// Shows this OpenMetrics text from now on.
    pub fn set(&mut self, openmetrics: String) {
        self.tell(&Order::Text(openmetrics));
    }

    /// A cycle has finished; without another within some of these periods, `/healthz` fails.
    pub fn beat(&mut self, period: Duration) {
        self.period = Some(period);
        self.tell(&Order::Beat(period));
    }

    /// Connections that were closed because they were not the hub's, or were too many.
    pub fn rejects(&self) -> u64 {
        self.rejects_before.saturating_add(self.rejects)
    }

    /// How the server is held in, once it has said so.
    pub fn confinement(&self) -> Option<&Confinement> {
        self.confinement.as_ref()
    }

    pub fn pid(&self) -> Option<u32> {
        Some(self.server.as_ref()?.process.as_ref()?.id())
    }

    pub fn listening(&self) -> impl Iterator<Item = SocketAddr> {
        self.listening.iter().copied()
    }

    /// Listens on exactly these addresses. What fails is returned and tried again at the
    /// next call; the others work all the same.
    pub fn listen_on(&mut self, wanted: &[SocketAddr]) -> Vec<(SocketAddr, io::Error)> {
        let Some(server) = &self.server else { return Vec::new() };
        let channel = server.channel.descriptor();
        self.listening.retain(|address| {
            // What can't be told stays on the list, and is told the next time.
            wanted.contains(address) || send(channel, &Order::Close(*address).to_text(), None).is_err()
        });
        let mut failed = Vec::new();
        for address in wanted {
            if self.listening.contains(address) {
                continue;
            }
            let handed = http::listen_at(*address).and_then(|listener| {
                send(channel, &Order::Listen(*address).to_text(), Some(&OwnedFd::from(listener)))
            });
            match handed {
                Ok(()) => drop(self.listening.insert(*address)),
                Err(error) => failed.push((*address, error)),
            }
        }
        let taken = failed.iter().any(|(_, error)| error.kind() == io::ErrorKind::AddrInUse);
        if failed.is_empty() {
            self.retries = RETRIES;
        } else if taken && self.retries > 0 {
            self.retries -= 1;
            self.retry = Some(Instant::now() + RETRY);
        }
        failed
    }

    /// Whether such a failure is tried again in a moment: an address that is taken may be so by ours of before, which
    /// the server has not closed yet.
    pub fn tries_again(&self, error: &io::Error) -> bool {
        error.kind() == io::ErrorKind::AddrInUse && self.retry.is_some()
    }

    /// A server that has ended is noticed by [`Front::next`], and one that reads nothing any
    /// more keeps its old text.
    fn tell(&self, order: &Order) {
        if let Some(server) = &self.server
            && let Err(error) = send(server.channel.descriptor(), &order.to_text(), None)
        {
            log::debug!("metrics server: {error}");
        }
    }
}

fn spawn() -> anyhow::Result<(Readable, Child)> {
    let (ours, theirs) = pair()?;
    let process = Command::new("/proc/self/exe")
        .arg0("spokeguard")
        .arg(crate::cli::INTERNAL_HTTP)
        .env_clear()
        .current_dir("/")
        .stdin(Stdio::from(theirs))
        .stdout(Stdio::null())
        .spawn()
        .context("start of the server")?;
    memory::sacrifice(process.id());
    Ok((Readable::new(ours).context("watch of the server")?, process))
}

pub(super) fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    Ok(socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?)
}

pub(super) fn send(channel: BorrowedFd<'_>, text: &str, along: Option<&OwnedFd>) -> io::Result<()> {
    use std::os::fd::AsFd as _;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let descriptors: Vec<BorrowedFd<'_>> = along.iter().map(|descriptor| descriptor.as_fd()).collect();
    if !descriptors.is_empty() {
        ancillary.push(SendAncillaryMessage::ScmRights(&descriptors));
    }
    let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
    sendmsg(channel, &[IoSlice::new(text.as_bytes())], &mut ancillary, flags)?;
    Ok(())
}

/// One packet, and the descriptor that came with it. `None`: the other side has ended.
pub(super) fn receive(
    channel: BorrowedFd<'_>,
    buffer: &mut [u8],
) -> io::Result<Option<(usize, Option<OwnedFd>)>> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
    let message = recvmsg(channel, &mut [IoSliceMut::new(buffer)], &mut ancillary, flags)?;
    let mut along = None;
    for part in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(descriptors) = part {
            // More than one is not ours to keep: dropped, they are closed.
            for descriptor in descriptors {
                along = Some(descriptor);
            }
        }
    }
    if message.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC) {
        return Err(io::Error::other("a message is too long"));
    }
    Ok((message.bytes > 0).then_some((message.bytes, along)))
}

fn receive_word(channel: BorrowedFd<'_>) -> io::Result<Option<Word>> {
    let mut buffer = [0; WORD_BYTES_MAX];
    // No space for descriptors: we want none from there.
    let Some((length, _)) = receive(channel, &mut buffer)? else { return Ok(None) };
    let text = buffer.get(..length).and_then(|bytes| std::str::from_utf8(bytes).ok());
    let word = text.and_then(Word::from_text);
    word.map(Some).ok_or_else(|| io::Error::other("it says what nobody understands"))
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::net::{TcpListener, TcpStream};

    use super::*;
    use crate::daemon::server;

    #[test]
    fn orders_and_words_survive_the_way() {
        let orders = [
            Order::Clients(Vec::new()),
            Order::Clients(vec!["10.84.0.1/32".parse().unwrap(), "fd84::/64".parse().unwrap()]),
            Order::Listen("10.84.0.16:9984".parse().unwrap()),
            Order::Close("[fd84::16]:9984".parse().unwrap()),
            Order::Text("# HELP a b\na 1\n# EOF\n".to_owned()),
            Order::Text(String::new()),
            Order::Beat(Duration::from_secs(10)),
        ];
        for order in orders {
            assert_eq!(Order::from_text(&order.to_text()), Some(order));
        }
        for broken in
            ["", "listen", "listen 10.84.0.16", "clients 10.84.0.1/33", "beat -1", "stop", "text2\n"]
        {
            assert_eq!(Order::from_text(broken), None, "{broken}");
        }
        let gaps = vec!["bpf() is possible".to_owned(), "Landlock: no".to_owned()];
        for gaps in [Vec::new(), gaps] {
            for landlock in Landlock::ALL {
                let word = Word::Confined(Confinement { landlock, gaps: gaps.clone() });
                assert_eq!(Word::from_text(&word.to_text()), Some(word));
            }
        }
        assert_eq!(Word::from_text("ring 17"), Some(Word::Ring { rejects: 17 }));
        for broken in ["", "ring", "ring -1", "ring 1 2", "confined", "confined fully", "text\n"] {
            assert_eq!(Word::from_text(broken), None, "{broken}");
        }
    }

    #[test]
    fn what_the_server_says_is_bounded_and_printable() {
        let said = format!("confined none\n\x1b[31mred\n{}", "x\n".repeat(1000));
        let Some(Word::Confined(Confinement { gaps, .. })) = Word::from_text(&said) else { panic!("{said}") };
        assert_eq!(gaps.len(), GAPS_MAX);
        assert!(!gaps[0].contains('\x1b'), "{gaps:?}");
        let long = format!("confined none\n{}", "y".repeat(3000));
        let Some(Word::Confined(Confinement { gaps, .. })) = Word::from_text(&long) else { panic!("long") };
        assert!(gaps[0].chars().count() <= GAP_CHARS_MAX + 1, "{}", gaps[0].len());
    }

    /// A front whose server is a task of this test, and not held in.
    fn front(clients: &str) -> Front {
        let (ours, theirs) = pair().expect("a pair");
        let channel = Readable::new(theirs).expect("watched");
        tokio::spawn(async move { server::serve(&channel, None).await });
        let mut front = Front::new(vec![clients.parse().expect("a prefix")]);
        front.take(Readable::new(ours).expect("watched"), None);
        front
    }

    /// The whole answer, from a thread that may wait for it.
    fn get(address: SocketAddr, path: &'static str) -> tokio::task::JoinHandle<String> {
        tokio::task::spawn_blocking(move || {
            let mut stream = TcpStream::connect(address).expect("connect");
            stream.set_read_timeout(Some(Duration::from_secs(20))).expect("a timeout");
            // Who refuses may close before it has read anything.
            let _ = write!(stream, "GET {path} HTTP/1.1\r\nHost: spoke\r\n\r\n");
            let mut reply = String::new();
            let _ = stream.read_to_string(&mut reply);
            reply
        })
    }

    /// A port that nobody has right now.
    fn free() -> SocketAddr {
        TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).expect("a free port")
    }

    #[tokio::test]
    async fn a_scrape_rings_and_gets_what_the_daemon_says_then() {
        let mut front = front("127.0.0.1/32");
        let address = free();
        assert!(front.listen_on(&[address]).is_empty());
        front.beat(Duration::from_secs(3600));
        let scrape = get(address, "/metrics");
        assert_eq!(front.next().await, Call::Text);
        front.set("spokeguard_test 7\n# EOF\n".to_owned());
        let reply = scrape.await.expect("a scrape");
        assert!(reply.starts_with("HTTP/1.1 200") && reply.contains("spokeguard_test 7"), "{reply}");
        let health = get(address, "/healthz").await.expect("an answer");
        assert!(health.ends_with("ok\n"), "{health}");
        // Closed means closed.
        assert!(front.listen_on(&[]).is_empty());
        let deadline = Instant::now() + Duration::from_secs(20);
        while TcpStream::connect(address).is_ok() {
            assert!(Instant::now() < deadline, "still open");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    #[tokio::test]
    async fn others_are_refused_and_the_count_comes_with_the_next_ring() {
        let mut front = front("127.0.0.2/32");
        let address = free();
        assert!(front.listen_on(&[address]).is_empty());
        assert_eq!(get(address, "/metrics").await.expect("an answer"), "");
        assert_eq!(front.rejects(), 0, "nobody has rung yet");
        front.tell(&Order::Clients(vec!["127.0.0.1/32".parse().expect("a prefix")]));
        // Clients are those of the listeners to come.
        let address = free();
        assert!(front.listen_on(&[address]).is_empty());
        let scrape = get(address, "/metrics");
        assert_eq!(front.next().await, Call::Text);
        assert_eq!(front.rejects(), 1);
        front.set("spokeguard_test 7\n# EOF\n".to_owned());
        assert!(scrape.await.expect("a scrape").contains("spokeguard_test 7"));
    }

    #[tokio::test]
    async fn a_server_that_ends_or_talks_nonsense_is_given_up_and_its_count_kept() {
        let (ours, theirs) = pair().expect("a pair");
        let mut front = Front::new(Vec::new());
        front.take(Readable::new(ours).expect("watched"), None);
        use std::os::fd::AsFd as _;
        send(theirs.as_fd(), "ring 5", None).expect("ring");
        assert_eq!(front.next().await, Call::Text);
        send(theirs.as_fd(), "open 5432", None).expect("talk");
        assert!(tokio::time::timeout(Duration::from_millis(50), front.next()).await.is_err());
        assert!(front.server.is_none() && front.due.is_some());
        assert_eq!(front.rejects(), 5);
        let (ours, theirs) = pair().expect("a pair");
        front.take(Readable::new(ours).expect("watched"), None);
        send(theirs.as_fd(), "ring 2", None).expect("ring");
        assert_eq!(front.next().await, Call::Text);
        assert_eq!(front.rejects(), 7);
        drop(theirs);
        assert!(tokio::time::timeout(Duration::from_millis(50), front.next()).await.is_err());
        assert!(front.server.is_none());
    }

    #[tokio::test]
    async fn listeners_follow_the_addresses_and_failures_are_told() {
        let mut front = front("127.0.0.1/32");
        // Documentation addresses: nobody has them, and freebind does not mind.
        let absent: SocketAddr = "192.0.2.7:39984".parse().expect("an address");
        let absent6: SocketAddr = "[2001:db8::7]:39984".parse().expect("an address");
        let wildcards = ["0.0.0.0:39984", "[::]:39984"].map(|text| text.parse().expect("an address"));
        let taken = TcpListener::bind("127.0.0.1:0").expect("bind");
        let busy = taken.local_addr().expect("an address");
        let mut wanted = vec![absent, absent6, busy];
        wanted.extend(wildcards);
        let failed = front.listen_on(&wanted);
        let kinds: Vec<_> = failed.iter().map(|(address, error)| (*address, error.kind())).collect();
        assert_eq!(
            kinds,
            [
                (busy, io::ErrorKind::AddrInUse),
                (wildcards[0], io::ErrorKind::InvalidInput),
                (wildcards[1], io::ErrorKind::InvalidInput)
            ]
        );
        assert_eq!(front.listening().collect::<Vec<_>>(), [absent, absent6]);
        // Not for ever, and then it is a failure like the others.
        let soon = |front: &Front, failed: &[(_, io::Error)]| {
            failed.iter().map(|(_, error)| front.tries_again(error)).collect::<Vec<_>>()
        };
        assert_eq!(soon(&front, &failed), [true, false, false]);
        front.retry = None;
        front.retries = 0;
        let failed = front.listen_on(&wanted);
        assert_eq!(soon(&front, &failed), [false; 3]);
        // The port becomes free: the next call has it, and lets go of what is not wanted.
        drop(taken);
        assert!(front.listen_on(&[busy]).is_empty());
        assert_eq!(front.listening().collect::<Vec<_>>(), [busy]);
        assert!(front.listen_on(&[busy]).is_empty());
    }
}
