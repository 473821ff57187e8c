//! Sweeps this host from the outside in: probes are put into the receive path of a device,
//! where they meet tc, every table, conntrack and NAT like packets from the wire, and are
//! read and dropped behind the last chain. What the host says in answer is read and dropped
//! before it leaves.
//!
//! Everything in the kernel is held by descriptors of this process: however it ends,
//! nothing of it stays.
//!
//! What drops in silence before the first or behind the last of these is asked by itself: see
//! `front` and `behind`.
//!
//! What it can't see: packet filters of the provider, and ICMP that the kernel's own rate
//! limit holds back (a reject by ICMP then reads as dropped, which nmap calls filtered, too).

mod behind;
pub(super) mod btf;
pub mod canary;
mod conntrack;
mod frame;
mod front;
pub mod keeper;
mod lock;
mod programs;
mod queues;
pub(super) mod route;
pub(super) mod tables;

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::ops::RangeInclusive;
use std::os::fd::AsFd as _;
use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use sidecar_ebpf::sweep::{self, CHUNK, Order, Trace, ends};

use crate::audit::{Care, Fate, Sweep};
use crate::observed::Link;
use crate::sys::probe::{Mapped, settle, test_run};
use crate::terms::{Family, Port, Proto};
use aya::util::KernelVersion;
use behind::Behind;
use frame::{Kind, Shape, frame};
use front::Front;
use keeper::{Keeper, Unfinished};
use lock::Lock;
use programs::{Attached, Lane, Place, Programs};
use queues::Queues;
pub(crate) use route::Routes;
use route::{Door, Origin};
pub use tables::is_table;
use tables::{Tables, Whose};

/// What to sweep: every protocol on every address, as it looks through one device.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Request {
    pub link: Link,
    pub addresses: Vec<IpAddr>,
    pub protos: Vec<Proto>,
    pub ports: Vec<RangeInclusive<u16>>,
    /// `None`: chosen, and said in [`Sweep::source`].
    pub source: Option<IpAddr>,
    /// Prefixes that rules name: a chosen source lies in none of them.
    pub named: Vec<IpNet>,
    /// Rules of others ask for a packet's priority: probes keep theirs, and our table counts them.
    #[serde(default)]
    pub plain: bool,
    pub mode: Mode,
    /// At most so many probes a second.
    pub rate: Option<u32>,
    /// So many threads inject; each keeps a CPU busy for a moment.
    pub threads: u8,
    /// Ports that are probed slowly or not at all, since rules limit what all sources do
    /// together, and what a probe uses up real traffic lacks.
    pub care: Vec<Care>,
    /// Where the lock lies that keeps audits apart.
    pub run_dir: PathBuf,
    /// The program that [`keeper::VERB`] is given to, in reply mode: it ends what this
    /// process began, should this process be killed. `None`: the next sweep does.
    pub keeper: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// Read and dropped behind the last chain: no socket, container or conntrack entry
    /// ever knows.
    Verdict,
    /// To the sockets and back: proves chosen ports end to end. Applications may notice.
    Reply,
}

/// For a terminal: told after each chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    pub address: IpAddr,
    pub proto: Proto,
    /// Of this address and protocol.
    pub done: u32,
    pub of: u32,
}

/// Why a sweep did not take place at all; the caller may say more than "failed".
#[derive(Debug, thiserror::Error)]
pub enum SweepError {
    #[error("another audit is under way ({0} is locked)")]
    Busy(PathBuf),
    #[error("interface {0} is down")]
    Down(String),
    #[error("{0} is a loopback interface: nothing from outside arrives there")]
    Loopback(String),
    #[error(
        "probes put into {interface} never arrive at its tc ingress: an XDP program may drop them, or a flood"
    )]
    Lost { interface: String },
    #[error("no route back to any outsider through {0} for {1}")]
    NoWay(String, IpAddr),
}

/// How verdicts are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Means {
    /// By netfilter programs (Linux 6.4), or by a table of our own.
    pub programs: bool,
    /// What arrives is seen by tcx programs (Linux 6.6), which also tell our table; or by a
    /// packet socket's filter, and then our counters or the guard tell it.
    pub tcx: bool,
}

impl Means {
    pub fn of_this_kernel() -> Self {
        let here = KernelVersion::current().map_or(0, |version| version.code());
        let since = |minor: u32| here >= 6 << 16 | minor << 8;
        Self { programs: since(4), tcx: since(6) }
    }

    /// What is missing here, and by what an audit sees as much without it: a sentence for each.
    pub fn lacking(self) -> Vec<String> {
        let by_table = "audits read what becomes of a probe by a table of their own in nftables";
        let types = Path::new(btf::PATH).exists();
        [
            (!self.programs).then(|| format!("no netfilter programs before Linux 6.4: {by_table}")),
            (self.programs && !types)
                .then(|| format!("no BTF, the kernel's types, in {}: {by_table}", btf::PATH)),
            (!self.tcx).then(|| {
                "no tcx programs before Linux 6.6: audits see what arrives by packet sockets".into()
            }),
        ]
        .into_iter()
        .flatten()
        .collect()
    }
}

/// One sweep for each address and protocol, in their order.
pub fn sweep(request: &Request, progress: &mut dyn FnMut(Progress)) -> anyhow::Result<Vec<Sweep>> {
    sweep_by(Means::of_this_kernel(), request, progress)
}

/// The same, but waits so long for another audit to end. One that takes longer is
/// [`SweepError::Busy`].
pub fn sweep_when_free(
    request: &Request,
    patience: Duration,
    progress: &mut dyn FnMut(Progress),
) -> anyhow::Result<Vec<Sweep>> {
    when_free(patience, || sweep(request, progress))
}

/// Waits until no sweep or trial is under way here, at most that long: what is read then is as new as what the next
/// one meets.
pub fn await_free(run_dir: &Path, patience: Duration) {
    // Whatever is in the way of a lock is told by who needs it.
    let _ = when_free(patience, || Lock::take(run_dir).map(drop));
}

fn when_free<T>(patience: Duration, mut go: impl FnMut() -> anyhow::Result<T>) -> anyhow::Result<T> {
    let deadline = Instant::now() + patience;
    loop {
        match go() {
            Err(error) if is_busy(&error) && Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(20));
            }
            result => return result,
        }
    }
}

/// No stranger gets an answer by this way, whatever the rules say.
pub fn is_unreachable(error: &anyhow::Error) -> bool {
    matches!(error.downcast_ref(), Some(SweepError::NoWay(..) | SweepError::Down(_)))
}

/// Another audit is under way: asking again later may help.
pub fn is_busy(error: &anyhow::Error) -> bool {
    matches!(error.downcast_ref(), Some(SweepError::Busy(_)))
}

/// The same by older means, on a kernel that has the newer ones.
pub fn sweep_by(
    means: Means,
    request: &Request,
    progress: &mut dyn FnMut(Progress),
) -> anyhow::Result<Vec<Sweep>> {
    let name = &request.link.name;
    let _lock = Lock::take(&request.run_dir)?;
    keeper::finish_what_was_left(&request.run_dir)?;
    if request.link.loopback {
        bail!(SweepError::Loopback(name.clone()));
    }
    let mut routes = Routes::open()?;
    let device = routes.device(request.link.index)?;
    if !device.up {
        bail!(SweepError::Down(name.clone()));
    }
    let ports = ports(&request.ports);
    let mut programs = Programs::load(usize::from(request.threads.clamp(1, THREADS_MAX)))
        .context("load the audit's programs")?;
    // A kernel without types runs no netfilter programs either.
    let offsets = if means.programs { known(btf::read()) } else { None };
    let around = format!("attach the audit's programs around {name}");
    let mut watched: Vec<(u32, Attached)> = Vec::new();
    let mut sweeps = Vec::new();
    for family in Family::ALL {
        let addresses: Vec<IpAddr> =
            request.addresses.iter().copied().filter(|a| Family::of(*a) == family).collect();
        if addresses.is_empty() {
            continue;
        }
        let mut shapes = Vec::new();
        let mut fronts = HashMap::new();
        for to in addresses {
            let origin = match request.source.filter(|source| Family::of(*source) == family) {
                Some(source) => routes.chosen(&request.link, to, source)?,
                None => routes.origin(&request.link, to, &request.named, &mut random)?,
            };
            let Door { index, neighbour } = routes.door(&request.link, to, origin.base)?;
            if !watched.iter().any(|(device, _)| *device == index) {
                let watch = |tcx: bool| programs.watch(index, request.link.ethernet, tcx);
                let attached = match if means.tcx { known(watch(true)) } else { None } {
                    Some(attached) => attached,
                    None => watch(false).with_context(|| around.clone())?,
                };
                watched.push((index, attached));
            }
            if let Entry::Vacant(place) = fronts.entry(index) {
                let program = routes.device(index)?.native_xdp;
                place.insert(program.and_then(|program| Front::of(index, program)));
            }
            for proto in &request.protos {
                let mut order =
                    order(request.link.index, request.mode, offsets.unwrap_or_default(), &origin, *proto);
                order.index = index;
                order.canary = if request.plain { sidecar_ebpf::sweep::canary::PLAIN } else { 0 };
                let from = neighbour.unwrap_or(frame::NOBODY);
                shapes.push((*proto, origin, Shape { order, to, mac: device.mac, from }));
            }
        }
        // Reading kernel memory takes CAP_PERFMON, which a table does without.
        let place = if request.mode == Mode::Verdict { Place::Verdict } else { Place::Answers };
        let hooked = offsets.and_then(|_| known(programs.hook(family, place)));
        for (proto, origin, shape) in shapes {
            let tables = if hooked.is_some() { None } else { Some(Tables::put(&shape.order, Whose::Sweep)?) };
            let care = request.care.iter().find(|care| (care.address, care.proto) == (shape.to, proto));
            let front = fronts.get(&shape.order.index).and_then(Option::as_ref);
            let mut run = Run { request, programs: &mut programs, tables, shape, proto, care, front };
            let fates = run.fates(&ports, progress)?;
            let asked = |port: &Port| ports.binary_search(port).is_ok();
            let spared = care.into_iter().flat_map(|care| &care.spared).map(|(port, _)| *port);
            sweeps.push(Sweep {
                interface: name.clone(),
                address: shape.to,
                proto,
                source: run.source(&ports, &origin),
                fates,
                unproven: spared.filter(asked).collect(),
            });
        }
        drop::<Option<Attached>>(hooked);
    }
    let place = |sweep: &Sweep| {
        (
            request.addresses.iter().position(|a| *a == sweep.address),
            request.protos.iter().position(|p| *p == sweep.proto),
        )
    };
    sweeps.sort_by_key(place);
    Ok(sweeps)
}

/// One address and protocol.
struct Run<'a> {
    request: &'a Request,
    programs: &'a mut Programs,
    tables: Option<Tables>,
    shape: Shape,
    proto: Proto,
    care: Option<&'a Care>,
    front: Option<&'a Front>,
}

/// What a newer kernel or a privilege would allow; without it, older means do.
fn known<T>(result: anyhow::Result<T>) -> Option<T> {
    result.inspect_err(|error| log::debug!("older means, since: {error:#}")).ok()
}

pub const THREADS_MAX: u8 = 2;
/// Fewer than these ports aren't worth a thread.
const SHARE: usize = 4 * CHUNK as usize;
/// How often a port is probed that was not seen to arrive.
const TRIES: u32 = 3;
/// A probe arrives within microseconds of the one before, unless the CPU is busy elsewhere.
const ARRIVAL: Duration = Duration::from_millis(20);
/// Nothing arrived of so many chunks in a row and for so long, or till the end, and nothing will. While a flood fills
/// the queue of the only CPU, some gets through by then.
const LOST_CHUNKS: u32 = 4;
const LOST: Duration = Duration::from_secs(1);
/// How long a socket or a container may take to answer (reply mode).
const ANSWER: Duration = Duration::from_millis(500);
/// A SYN-ACK that did not get out is sent once more after a second, and then given up.
const RETRANSMISSION: Duration = Duration::from_secs(2);

impl Run<'_> {
    fn fates(
        &mut self,
        ports: &[Port],
        progress: &mut dyn FnMut(Progress),
    ) -> anyhow::Result<Vec<(Port, Fate)>> {
        for port in 0..=u32::from(u16::MAX) {
            self.programs.traces.set(port, Trace::default());
        }
        self.programs.orders.set(0, self.shape.order);
        let mut keeper = match self.request.mode {
            Mode::Reply => Some(Keeper::begin(
                &self.request.run_dir,
                self.request.keeper.as_deref(),
                &Unfinished::new(&self.shape, ports),
            )?),
            Mode::Verdict => None,
        };
        let mut spared: Vec<(Port, Fate)> = self.care.map(|care| care.spared.clone()).unwrap_or_default();
        spared.retain(|(port, _)| ports.binary_search(port).is_ok());
        spared.sort_by_key(|(port, _)| *port);
        let is_spared = |port: &Port| spared.binary_search_by_key(port, |(port, _)| *port).is_ok();
        let is_slow = |port: &Port| self.care.is_some_and(|care| care.paced.contains(port));
        let meets = |port: &Port| {
            let probe = frame(&self.shape, port.get(), Kind::Probe);
            Some((*port, self.front?.meets(&self.shape.order, &probe)?))
        };
        let stopped: HashMap<Port, Fate> = match self.front {
            Some(_) => ports.iter().filter(|port| !is_spared(port)).filter_map(meets).collect(),
            None => HashMap::new(),
        };
        let mine = ports.iter().copied().filter(|port| !is_spared(port) && !stopped.contains_key(port));
        let (slow, fast): (Vec<Port>, Vec<Port>) = mine.partition(|port| is_slow(port));
        // What is limited comes last: everything else is decided by then.
        self.all(&fast, self.request.rate, ports.len(), progress)?;
        let slowly = self.care.map_or(1, |care| care.per_second);
        self.all(&slow, Some(self.request.rate.unwrap_or(slowly).min(slowly)), ports.len(), progress)?;
        // Seen on one CPU, and maybe still on its way there.
        settle();
        if let Some(tables) = &self.tables {
            tables.read(&self.shape.order, &mut self.programs.traces)?;
        }
        if let Some(keeper) = keeper.take() {
            self.clean_up(ports)?;
            keeper.end();
        }
        let family = Family::of(self.shape.to);
        // Replies of sockets have been through all that is behind the rules.
        let mut behind = match self.request.mode {
            Mode::Verdict => Some(Behind::read(self.request.link.index, self.proto)),
            Mode::Reply => None,
        };
        let like = |port: &Port| {
            let alike = &self.care?.alike;
            let asked = alike[alike.binary_search_by_key(port, |(port, _)| *port).ok()?].1;
            Some(match fate(&self.trace(asked), family) {
                Fate::Delivered { address, port: to } if to == asked => {
                    Fate::Delivered { address, port: *port }
                }
                Fate::Forwarded { address, port: to } if to == asked => {
                    Fate::Forwarded { address, port: *port }
                }
                same => same,
            })
        };
        let mut fate = |port: &Port| {
            let fate = match spared.binary_search_by_key(port, |(port, _)| *port) {
                Ok(at) if spared[at].1 == Fate::Lost => like(port).unwrap_or(Fate::Lost),
                Ok(at) => spared[at].1.clone(),
                Err(_) => match stopped.get(port) {
                    Some(fate) => fate.clone(),
                    None => fate(&self.trace(*port), family),
                },
            };
            let fate = match (fate, &mut behind) {
                (Fate::Delivered { address, port: to }, Some(behind)) => {
                    behind.fate(&self.shape, *port, (address, to))
                }
                (fate, _) => fate,
            };
            (*port, fate)
        };
        Ok(ports.iter().map(&mut fate).collect())
    }

    /// Probes these ports until each was seen to arrive, or often enough. `rate`: so many a
    /// second at most; `of`: ports of the whole sweep.
    fn all(
        &mut self,
        ports: &[Port],
        rate: Option<u32>,
        of: usize,
        progress: &mut dyn FnMut(Progress),
    ) -> anyhow::Result<()> {
        let mut pending = ports.to_vec();
        for _ in 0..TRIES {
            let done = AtomicUsize::new(of - pending.len());
            let (traces, lanes) = (&self.programs.traces, &mut self.programs.lanes);
            // Sockets and the sets of a table are left their time.
            let queued = Queues::open().is_some();
            let single =
                rate.is_some() || queued || self.tables.is_some() || self.request.mode == Mode::Reply;
            let threads = if single { 1 } else { (pending.len() / SHARE).clamp(1, lanes.len()) };
            let way = Way { request: self.request, traces, shape: &self.shape, proto: self.proto, rate };
            let mut tell = || {
                let done = done.load(Ordering::Relaxed) as u32;
                progress(Progress { address: self.shape.to, proto: self.proto, done, of: of as u32 });
            };
            // What a thread sends, its own CPU takes through the host, so each needs one.
            let mut shares = pending.chunks(pending.len().div_ceil(threads).max(1)).zip(lanes);
            let Some(mine) = shares.next() else { break };
            std::thread::scope(|scope| {
                let (way, done) = (&way, &done);
                let others: Vec<_> = shares
                    .map(|(share, lane)| scope.spawn(move || way.walk(lane, share, done, &mut || ())))
                    .collect();
                let (share, lane) = mine;
                let mut result = way.walk(lane, share, done, &mut tell);
                for other in others {
                    result = result.and(other.join().unwrap_or_else(|panic| resume_unwind(panic)));
                }
                result
            })?;
            tell();
            pending.retain(|port| self.trace(*port).seen == 0);
            if pending.is_empty() {
                break;
            }
        }
        Ok(())
    }

    fn trace(&self, port: Port) -> Trace {
        self.programs.traces.get(u32::from(port.get())).unwrap_or_default()
    }

    /// Reply mode: outlives retransmissions, and takes conntrack's entries away.
    fn clean_up(&mut self, ports: &[Port]) -> anyhow::Result<()> {
        if self.proto == Proto::Tcp && ports.iter().any(|port| self.trace(*port).end == ends::ANSWERED) {
            std::thread::sleep(RETRANSMISSION);
        }
        conntrack::forget(&self.shape, ports)
    }

    fn source(&self, ports: &[Port], origin: &Origin) -> IpAddr {
        ports.first().map_or(origin.base, |first| source_of(&self.shape, *first))
    }
}

/// What the threads of a sweep have in common.
struct Way<'a> {
    request: &'a Request,
    traces: &'a Mapped<Trace>,
    shape: &'a Shape,
    proto: Proto,
    rate: Option<u32>,
}

impl Way<'_> {
    /// Probes these ports once, each of them.
    fn walk(
        &self,
        lane: &mut Lane,
        ports: &[Port],
        done: &AtomicUsize,
        tell: &mut dyn FnMut(),
    ) -> anyhow::Result<()> {
        let mut queues = Queues::open();
        let chunk = match (self.rate, &queues) {
            (Some(_), _) => 1,
            (None, Some(_)) => queues::CHUNK,
            (None, None) => CHUNK as usize,
        };
        let (mut lost, mut heard) = (0, Instant::now());
        let mut chunks = ports.chunks(chunk);
        while let Some(chunk) = chunks.next() {
            let start = Instant::now();
            self.inject(lane, chunk, Kind::Probe)?;
            if self.wait(chunk, ARRIVAL, |trace| trace.seen != 0) == 0 {
                lost += 1;
                if lost >= LOST_CHUNKS && (heard.elapsed() >= LOST || chunks.len() == 0) {
                    bail!(SweepError::Lost { interface: self.request.link.name.clone() });
                }
            } else {
                (lost, heard) = (0, Instant::now());
            }
            queues.iter_mut().for_each(Queues::drain);
            if self.request.mode == Mode::Reply {
                self.finish(lane, chunk)?;
            }
            done.fetch_add(chunk.len(), Ordering::Relaxed);
            tell();
            if let Some(rate) = self.rate {
                let due = Duration::from_secs(1) * chunk.len() as u32 / rate.max(1);
                std::thread::sleep(due.saturating_sub(start.elapsed()));
            }
        }
        Ok(())
    }

    fn inject(&self, lane: &mut Lane, ports: &[Port], kind: Kind) -> anyhow::Result<()> {
        inject(lane, self.shape, ports, kind)
            .with_context(|| format!("inject probes into {}", self.request.link.name))
    }

    /// Waits until all of a chunk is as wanted, or for so long no more of it came to be; how many are. A slow CPU takes
    /// longer for a chunk, and the next one on top of it would fill the queue that other packets come in by.
    fn wait(&self, ports: &[Port], limit: Duration, wanted: impl Fn(&Trace) -> bool) -> usize {
        let trace = |port: &Port| self.traces.get(u32::from(port.get())).unwrap_or_default();
        let (mut most, mut since) = (0, Instant::now());
        loop {
            let there = ports.iter().filter(|port| wanted(&trace(port))).count();
            if there > most {
                (most, since) = (there, Instant::now());
            }
            if there == ports.len() || since.elapsed() >= limit {
                return there;
            }
            std::thread::sleep(Duration::from_micros(50));
        }
    }

    /// Reply mode: ends at once what the probes of a chunk began.
    fn finish(&self, lane: &mut Lane, chunk: &[Port]) -> anyhow::Result<()> {
        self.wait(chunk, ANSWER, |trace| trace.end != ends::NONE);
        if self.proto == Proto::Tcp {
            // Also where no answer was seen: a container may be about to give one.
            self.inject(lane, chunk, Kind::Reset)?;
        }
        Ok(())
    }
}

/// Up to a chunk of frames, into the order's device.
fn inject(lane: &mut Lane, shape: &Shape, ports: &[Port], kind: Kind) -> std::io::Result<()> {
    for (at, port) in ports.iter().enumerate() {
        lane.frames.set(at as u32, frame(shape, port.get(), kind));
    }
    lane.progress.set(0, sweep::Progress::default());
    let first = frame(shape, ports.first().map_or(1, |port| port.get()), kind);
    let packet = &first.bytes[..frame::length(&shape.order)];
    test_run(lane.inject.as_fd(), packet, ports.len() as u32)
}

/// Whom the probe for a port comes from.
fn source_of(shape: &Shape, port: Port) -> IpAddr {
    Origin { base: shape.to, spread: false }.address(shape.order.source_of(port.get()))
}

fn order(index: u32, mode: Mode, offsets: btf::Offsets, origin: &Origin, proto: Proto) -> Order {
    let mut order = Order {
        // See Order: an answer's number is one more, and must not carry.
        head: random() | 0xffff,
        token: random(),
        index,
        frame_bytes: 0,
        skb_head: offsets.head,
        skb_network_header: offsets.network_header,
        skb_sk: offsets.sk,
        source: origin.words(),
        // Fresh each time, for what remains of an earlier sweep would answer differently;
        // from the range that clients use.
        source_port: 32768 + (random() % 28000) as u16,
        spread_mask: if origin.spread { u16::MAX } else { 0 },
        family: if origin.base.is_ipv4() { sidecar_ebpf::IPV4 as u8 } else { sidecar_ebpf::IPV6 as u8 },
        proto: proto.number(),
        reply: u8::from(mode == Mode::Reply),
        canary: 0,
    };
    order.frame_bytes = frame::length(&order) as u32;
    order
}

fn fate(trace: &Trace, family: Family) -> Fate {
    let to = || Some((address(&trace.address, family), Port::new(trace.port)?));
    match trace.end {
        ends::LOCAL => to().map_or(Fate::Lost, |(address, port)| Fate::Delivered { address, port }),
        ends::FORWARD => to().map_or(Fate::Lost, |(address, port)| Fate::Forwarded { address, port }),
        ends::RESET => Fate::Reset,
        ends::UNREACHABLE => Fate::Unreachable { icmp_type: trace.icmp_type, code: trace.icmp_code },
        ends::ANSWERED | ends::TAKEN => Fate::Answered,
        _ if trace.seen != 0 => Fate::Dropped,
        _ => Fate::Lost,
    }
}

fn address(octets: &[u8; 16], family: Family) -> IpAddr {
    match family {
        Family::Ipv4 => Ipv4Addr::new(octets[0], octets[1], octets[2], octets[3]).into(),
        Family::Ipv6 => Ipv6Addr::from(*octets).into(),
    }
}

/// In order, none twice.
fn ports(ranges: &[RangeInclusive<u16>]) -> Vec<Port> {
    let mut wanted = vec![false; 1 << 16];
    ranges.iter().flat_map(|range| range.clone()).for_each(|port| wanted[usize::from(port)] = true);
    (1..=u16::MAX).filter(|port| wanted[usize::from(*port)]).filter_map(Port::new).collect()
}

/// From the kernel's generator: whoever could guess it could forge a result.
fn random() -> u32 {
    let mut bytes = [0; 4];
    // Four bytes are never cut short; before the generator is ready, the call waits.
    while rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty()) != Ok(4) {}
    u32::from_ne_bytes(bytes)
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_rules_know_probes_by_what_the_programs_give_them() {
        let priority = sidecar_ebpf::sweep::PRIORITY;
        let text = format!("{:x}:{:x}", priority >> 16, priority & 0xffff);
        assert_eq!(text, crate::desired::PROBE_PRIORITY);
    }
}
