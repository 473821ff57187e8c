//! Scans other hosts as nmap would: SYN scan and UDP by packets of our own making where
//! CAP_NET_RAW lets us, by ordinary connections where it does not.

mod connect;
mod loss;
pub(super) mod packets;
mod raw;

use std::collections::{HashMap, HashSet};
use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::Context;

use crate::audit::{Answer, Effort, Scan};
use crate::source::ping::{self, Ping};
use crate::terms::{Port, Proto};

/// What to ask, and how.
#[derive(Clone, Debug)]
pub struct Request {
    /// Addresses, with the name that each was asked for by.
    pub targets: Vec<(IpAddr, Option<String>)>,
    pub protos: Vec<Proto>,
    pub ports: Vec<Port>,
    /// Probes a second, for all targets together; `None`: as fast as answers come.
    pub rate: Option<u32>,
    /// Send from this address of ours.
    pub source: Option<IpAddr>,
    /// Ports that most likely answer: asked first, to learn how the path behaves.
    pub likely: Vec<Port>,
}

/// How far it is; `left` is a guess.
#[derive(Clone, Copy, Debug, Default)]
pub struct Progress {
    pub sent: u64,
    pub total: u64,
    pub per_second: f64,
    pub left: Duration,
}

/// Side by side at most; each has its own sockets and table of answers.
const JOBS_MAX: usize = 8;
/// The same where few ports are asked: then most of a job is waiting for those who say nothing.
const SHORT_JOBS_MAX: usize = 48;
const FEW_PORTS: usize = 1024;
/// Targets of one run, so that a prefix given by mistake does not ask for memory.
pub const TARGETS_MAX: usize = 1024;

/// What is said of an address that nothing came from, behind what became of an echo request.
const ABSENT: &str = "a host that is down looks like one that drops everything";

/// What the jobs tell about themselves while they run.
#[derive(Default)]
pub(crate) struct Count {
    sent: AtomicU64,
    total: AtomicU64,
}

impl Count {
    pub(crate) fn sent(&self, probes: usize) {
        self.sent.fetch_add(probes as u64, Ordering::Relaxed);
    }

    pub(crate) fn expect(&self, probes: usize) {
        self.total.fetch_add(probes as u64, Ordering::Relaxed);
    }

    fn progress(&self, elapsed: Duration) -> Progress {
        let (sent, total) = (self.sent.load(Ordering::Relaxed), self.total.load(Ordering::Relaxed));
        let per_second = sent as f64 / elapsed.as_secs_f64().max(0.001);
        let left = total.saturating_sub(sent) as f64 / per_second.max(1.0);
        Progress { sent, total, per_second, left: Duration::from_secs_f64(left.min(86_400.0)) }
    }
}

/// Asks every port of every target, in the order of the targets. What could not be asked
/// is in the scans' gaps.
pub fn scan(request: &Request, progress: &mut dyn FnMut(Progress)) -> anyhow::Result<Vec<Scan>> {
    anyhow::ensure!(
        request.targets.len() <= TARGETS_MAX,
        "{} targets are too many for one run: at most {TARGETS_MAX}",
        request.targets.len()
    );
    let mut jobs: Vec<(usize, IpAddr, Option<String>, Proto)> = Vec::new();
    for (address, name) in &request.targets {
        for proto in &request.protos {
            jobs.push((jobs.len(), *address, name.clone(), *proto));
        }
    }
    let count = Count::default();
    let most = if request.ports.len() <= FEW_PORTS { SHORT_JOBS_MAX } else { JOBS_MAX };
    let side_by_side = jobs.len().clamp(1, most);
    let share = request.rate.map(|rate| f64::from(rate.max(1)) / side_by_side as f64);
    let mut done: Vec<Option<Scan>> = vec![None; jobs.len()];
    jobs.reverse();
    let (waiting, finished) = (Mutex::new(jobs), Mutex::new(&mut done));
    let started = std::time::Instant::now();
    std::thread::scope(|scope| {
        let (end, ended) = std::sync::mpsc::channel::<()>();
        for _ in 0..side_by_side {
            let (waiting, finished, count, end) = (&waiting, &finished, &count, end.clone());
            scope.spawn(move || {
                // Held until the thread ends, however it does.
                let _end = end;
                loop {
                    let next = waiting.lock().ok().and_then(|mut jobs| jobs.pop());
                    let Some((at, address, name, proto)) = next else { break };
                    let scan = one(request, address, name, proto, share, count);
                    if let Ok(mut list) = finished.lock() {
                        list[at] = Some(scan);
                    }
                }
            });
        }
        drop(end);
        while ended.recv_timeout(Duration::from_millis(200))
            == Err(std::sync::mpsc::RecvTimeoutError::Timeout)
        {
            progress(count.progress(started.elapsed()));
        }
    });
    let mut scans: Vec<Scan> = (done.into_iter().map(|scan| scan.context("a scanning thread ended early")))
        .collect::<anyhow::Result<_>>()?;
    tell_silence_from_absence(&mut scans, &echoes);
    Ok(scans)
}

/// A host that nobody heard anything of may drop everything, or not be there: whoever answers an echo is there.
/// `echoes` says whether one came, or why none could be asked for.
fn tell_silence_from_absence(
    scans: &mut [Scan],
    echoes: &(dyn Fn(Option<IpAddr>, IpAddr) -> Result<bool, String> + Sync),
) {
    let heard: HashSet<IpAddr> =
        scans.iter().filter(|scan| scan.gap.is_some() || scan.is_heard()).map(|scan| scan.address).collect();
    let mut silent: Vec<(IpAddr, Option<IpAddr>)> =
        scans.iter().map(|scan| (scan.address, scan.source)).filter(|(to, _)| !heard.contains(to)).collect();
    silent.sort_unstable();
    silent.dedup();
    let mut absent = HashMap::new();
    for some in silent.chunks(SHORT_JOBS_MAX) {
        let asked = std::thread::scope(|scope| {
            let asking = some.iter().map(|(to, source)| (*to, scope.spawn(|| echoes(*source, *to))));
            let asking: Vec<_> = asking.collect();
            let ended = |asked: std::thread::Result<_>| asked.unwrap_or_else(|_| Err("it broke off".into()));
            asking.into_iter().map(|(to, asked)| (to, ended(asked.join()))).collect::<Vec<_>>()
        });
        for (to, asked) in asked {
            let became = match asked {
                Ok(true) => continue,
                Ok(false) => "nor did an echo request".to_owned(),
                Err(why) => format!("and no echo request could be sent ({why})"),
            };
            absent.insert(to, format!("no port answered, {became}: {ABSENT}"));
        }
    }
    for scan in scans {
        if let Some(why) = absent.get(&scan.address) {
            scan.gap = Some(why.clone());
        }
    }
}

fn echoes(source: Option<IpAddr>, to: IpAddr) -> Result<bool, String> {
    let ping = Ping::open_from(source, to).map_err(|error| match error.kind() {
        ErrorKind::PermissionDenied => ping::NEEDS.to_owned(),
        _ => error.to_string(),
    })?;
    Ok(ping.first_round_trip_ms().is_some())
}

fn one(
    request: &Request,
    address: IpAddr,
    name: Option<String>,
    proto: Proto,
    rate: Option<f64>,
    count: &Count,
) -> Scan {
    let source = match source_for(address, request.source) {
        Ok(source) => source,
        Err(error) => {
            let answers = request.ports.iter().map(|port| (*port, Answer::Unasked)).collect();
            return Scan {
                address,
                name,
                proto,
                source: None,
                answers,
                gap: Some(format!("{error:#}")),
                effort: None,
            };
        }
    };
    let order = Order::new(&request.ports, &request.likely);
    let result = match raw::Wire::open(proto, source, address) {
        Ok(wire) => raw::run(wire, &order, rate, count),
        Err(error) if raw::is_refused(&error) => {
            connect::run(proto, request.source, address, &order, rate, count)
        }
        Err(error) => Err(error),
    };
    let found = result.unwrap_or_else(|error| Found {
        answers: Answers::new(),
        gap: Some(format!("{error:#}")),
        effort: None,
    });
    let Found { answers, gap, effort } = found;
    let answers = request.ports.iter().map(|port| (*port, answers.get(port.get()))).collect();
    Scan { address, name, proto, source: Some(source), answers, gap, effort }
}

/// The address that the kernel sends from on the way there.
fn source_for(target: IpAddr, wanted: Option<IpAddr>) -> anyhow::Result<IpAddr> {
    if let Some(source) = wanted {
        anyhow::ensure!(
            source.is_ipv4() == target.is_ipv4(),
            "{target} can't be asked from {source}: that is another address family"
        );
    }
    let any: IpAddr = if target.is_ipv4() { [0u8; 4].into() } else { [0u16; 8].into() };
    let from = wanted.unwrap_or(any);
    let socket = UdpSocket::bind(SocketAddr::new(from, 0))
        .with_context(|| format!("{from} is not an address of this host"))?;
    socket.connect(SocketAddr::new(target, 9)).with_context(|| format!("no route to {target}"))?;
    Ok(socket.local_addr().context("which address to send from")?.ip())
}

/// What a job came to.
pub(crate) struct Found {
    pub(crate) answers: Answers,
    pub(crate) gap: Option<String>,
    pub(crate) effort: Option<Effort>,
}

/// The answers by port: one byte-sized slot for each that could be, whatever is asked.
pub(crate) struct Answers(Box<[Option<Answer>]>);

impl Answers {
    pub(crate) fn new() -> Self {
        Self(vec![None; 1 << 16].into_boxed_slice())
    }

    pub(crate) fn get(&self, port: u16) -> Answer {
        self.0[usize::from(port)].unwrap_or(Answer::Unasked)
    }

    pub(crate) fn has(&self, port: u16) -> bool {
        self.0[usize::from(port)].is_some_and(|a| !matches!(a, Answer::Silent | Answer::Unasked))
    }

    /// A port that stayed silent was not asked to the end.
    pub(crate) fn doubt(&mut self, port: u16) {
        let slot = &mut self.0[usize::from(port)];
        if *slot == Some(Answer::Silent) {
            *slot = None;
        }
    }

    /// Marks a port as asked, or takes its answer. Something that answers for itself
    /// outweighs an error that something on the way sent. Says whether that was news.
    pub(crate) fn put(&mut self, port: u16, answer: Answer) -> bool {
        const fn weight(answer: Option<Answer>) -> u8 {
            match answer {
                None | Some(Answer::Unasked) => 0,
                Some(Answer::Silent) => 1,
                Some(Answer::Unreachable { .. }) => 2,
                Some(Answer::Reset) => 3,
                Some(Answer::SynAck | Answer::Connected | Answer::Datagram) => 4,
            }
        }
        let slot = &mut self.0[usize::from(port)];
        let news = weight(Some(answer)) > weight(*slot);
        if news {
            *slot = Some(answer);
        }
        news
    }
}

/// The ports in the order of asking: the likely ones first, the rest as shuffled cards, so
/// that no rule that looks for neighbours in a row is met by chance.
pub(crate) struct Order {
    pub(crate) first: Vec<u16>,
    pub(crate) rest: Vec<u16>,
}

impl Order {
    fn new(ports: &[Port], likely: &[Port]) -> Self {
        const KNOWN: [u16; 10] = [443, 80, 22, 53, 25, 8080, 8443, 993, 3389, 21];
        let asked: HashSet<u16> = ports.iter().map(|p| p.get()).collect();
        let mut first: Vec<u16> = Vec::new();
        for port in likely.iter().map(|p| p.get()).chain(KNOWN) {
            if asked.contains(&port) && !first.contains(&port) && first.len() < 32 {
                first.push(port);
            }
        }
        let mut rest: Vec<u16> = ports.iter().map(|p| p.get()).filter(|p| !first.contains(p)).collect();
        let mut state = secret() | 1;
        for at in (1..rest.len()).rev() {
            // xorshift: good enough to shuffle, and no secret hangs on it.
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            rest.swap(at, (state % (at as u64 + 1)) as usize);
        }
        Self { first, rest }
    }
}

/// A number that nobody outside this process knows; another one at each call.
pub(crate) fn secret() -> u64 {
    use std::hash::{BuildHasher, Hasher};
    std::hash::RandomState::new().build_hasher().finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_could_not_be_asked_is_not_said_to_be_silent() {
        let scan = |address: &str, answer| Scan {
            address: address.parse().expect("an address"),
            name: None,
            proto: Proto::Tcp,
            source: None,
            answers: vec![(Port::new(22).expect("a port"), answer)],
            gap: None,
            effort: None,
        };
        let mut scans =
            ["192.0.2.1", "192.0.2.2", "192.0.2.3", "192.0.2.4"].map(|to| scan(to, Answer::Silent));
        scans[3].answers[0].1 = Answer::Reset;
        tell_silence_from_absence(&mut scans, &|_, to| match to.to_string().as_str() {
            "192.0.2.1" => Ok(true),
            "192.0.2.2" => Ok(false),
            _ => Err("no right".into()),
        });
        let gaps = scans.each_ref().map(|scan| scan.gap.as_deref().unwrap_or_default());
        let told = |became: &str| format!("no port answered, {became}: {ABSENT}");
        assert_eq!(
            gaps,
            [
                "",
                &told("nor did an echo request"),
                &told("and no echo request could be sent (no right)"),
                "" // It was heard.
            ]
        );
    }
}
