//! Probes of our own making, as fast as the path takes them.
//!
//! Most ports of a guarded host never answer, so silence says nothing about the path. What
//! does are canaries: ports that answered once are asked again, from another port of ours,
//! all the time. From how many of those come back follow the speed and how often a silent
//! port must be asked before its silence counts.
//!
//! Linux answers a second SYN of the same connection at once, a third only after half a second
//! (net.ipv4.tcp_invalid_ratelimit). Where both answers are lost, an open port would be as silent
//! as a filtered one however often it is asked, so no source port asks the same port three times.

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU32;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use anyhow::Context;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, Protocol, RecvFlags, SendFlags, SocketFlags, SocketType, bind, connect, getsockname,
    ipproto, recv, send, socket_with, sockopt,
};

use super::loss::Loss;
use super::packets::{Flow, Heard, SNAP};
use super::{Answers, Count, Found, Order};
use crate::audit::{Answer, Effort};
use crate::sys::filter;
use crate::terms::Proto;

/// Sockets to send with and to hear with, and ports that nobody else can use meanwhile.
pub(super) struct Wire {
    flow: Flow,
    out: OwnedFd,
    back: OwnedFd,
    reserved: Vec<OwnedFd>,
    keys: RandomState,
}

const RECEIVE_BYTES: usize = 16 << 20;
const BATCH: usize = 64;
/// Kernels ask for a neighbour's address, and send a SYN-ACK, again after a second. Where nothing
/// answered at all, that is waited for.
const ASKED_AGAIN: Duration = Duration::from_millis(1050);
const PASSES_MAX: u32 = 10;
/// The same where few ports are left to ask, which costs little.
const FEW_PASSES_MAX: u32 = 20;
const FEW_LEFT: usize = 256;
/// Probes a second at first, at most, and where nothing that answers tells how it goes.
const RATE_START: f64 = 20_000.0;
const RATE_MAX: f64 = 400_000.0;
const RATE_BLIND: f64 = 80_000.0;
const RATE_MIN: f64 = 1_000.0;
const CANARY_EVERY: Duration = Duration::from_millis(8);
/// A port that stays away so often in a row is limited or gone, and tells nothing any more.
const CANARY_MISSES_MAX: u32 = 12;
const CANARIES_MAX: usize = 64;
/// Refused by our own host this often in a row: it will not get better.
const REFUSED_MAX: u32 = 200;

impl Wire {
    pub fn open(proto: Proto, source: IpAddr, target: IpAddr) -> anyhow::Result<Self> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let (family, ethertype) = match target {
            IpAddr::V4(_) => (AddressFamily::INET, 0x0800u16),
            IpAddr::V6(_) => (AddressFamily::INET6, 0x86dd),
        };
        let out =
            socket_with(family, SocketType::RAW, flags, Some(ipproto::RAW)).context("open a raw socket")?;
        bind(&out, &SocketAddr::new(source, 0)).with_context(|| format!("send from {source}"))?;
        connect(&out, &SocketAddr::new(target, 0)).with_context(|| format!("no route to {target}"))?;
        let _ = sockopt::set_socket_send_buffer_size(&out, 1 << 20);
        // Before every rule of this host: what it drops must not read as silence over there.
        let all = NonZeroU32::new(u32::from(ethertype.to_be())).map(Protocol::from_raw);
        let back = socket_with(AddressFamily::PACKET, SocketType::DGRAM, flags, all)
            .context("open a packet socket")?;
        // The first needs CAP_NET_ADMIN, the second is cut to the system's limit.
        if sockopt::set_socket_recv_buffer_size_force(&back, RECEIVE_BYTES).is_err() {
            let _ = sockopt::set_socket_recv_buffer_size(&back, RECEIVE_BYTES);
        }
        let flow = Flow { proto, source, target, source_ports: Vec::new() };
        let mut wire = Self { flow, out, back, reserved: Vec::new(), keys: RandomState::new() };
        wire.reserve()?;
        Ok(wire)
    }

    /// One source port more. Answers to the others are heard as before.
    fn reserve(&mut self) -> anyhow::Result<()> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let (kind, protocol) = match self.flow.proto {
            Proto::Tcp => (SocketType::STREAM, ipproto::TCP),
            Proto::Udp => (SocketType::DGRAM, ipproto::UDP),
        };
        let family = if self.flow.source.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
        let socket = socket_with(family, kind, flags, Some(protocol)).context("open a socket")?;
        bind(&socket, &SocketAddr::new(self.flow.source, 0)).context("reserve a port")?;
        let bound = SocketAddr::try_from(getsockname(&socket).context("which port was reserved")?)?;
        self.reserved.push(socket);
        self.flow.source_ports.push(bound.port());
        filter::attach(&self.back, &self.flow.filter()).context("filter a packet socket")
    }

    /// The source port that asks now.
    fn asker(&self) -> usize {
        self.flow.source_ports.len() - 1
    }

    fn cookie(&self, port: u16, asker: usize) -> u32 {
        self.keys.hash_one((port, asker)) as u32
    }
}

/// Whether we lack the right to make packets, so that ordinary sockets must do.
pub(super) fn is_refused(error: &anyhow::Error) -> bool {
    error.downcast_ref::<Errno>().is_some_and(|e| matches!(*e, Errno::PERM | Errno::ACCESS))
}

/// The source port of canaries; the one after it is the first that asks.
const CANARY: usize = 0;

struct Run<'a> {
    wire: Wire,
    answers: Answers,
    count: &'a Count,
    pace: Pace,
    path: Path,
    packet: Vec<u8>,
    refused: u32,
    started: Instant,
    passes: u32,
    /// Ports that answered, for the first time, since the pass began; in all passes but the
    /// first; in all.
    fresh: u64,
    late: u64,
    answered: u64,
    effort: Effort,
    gap: Option<String>,
    /// Probes whose moment of sending is known, to learn the time there and back.
    timed: HashMap<u16, Instant>,
}

pub(super) fn run(wire: Wire, order: &Order, rate: Option<f64>, count: &Count) -> anyhow::Result<Found> {
    let now = Instant::now();
    let proto = wire.flow.proto;
    let mut run = Run {
        wire,
        answers: Answers::new(),
        count,
        pace: Pace::new(rate, now),
        path: Path::new(now),
        packet: Vec::with_capacity(128),
        refused: 0,
        started: now,
        passes: 0,
        fresh: 0,
        late: 0,
        answered: 0,
        effort: Effort::default(),
        gap: None,
        timed: HashMap::new(),
    };
    let total = order.first.len() + order.rest.len();
    let passes = if proto == Proto::Udp { 3 } else { 2 };
    count.expect(total * passes);
    let failed = run.ask(order).err().map(|error| format!("{error:#}"));
    let effort = run.effort();
    Ok(Found { answers: run.answers, gap: failed.or(run.gap), effort: Some(effort) })
}

impl Run<'_> {
    fn ask(&mut self, order: &Order) -> anyhow::Result<()> {
        let is_tcp = self.wire.flow.proto == Proto::Tcp;
        let many = order.rest.len() > 100;
        self.wire.reserve()?;
        if many {
            // A first knock learns the neighbour's address, the time there and back, and who answers.
            self.send_all(&order.first)?;
            self.hear_for(Duration::from_millis(250), true)?;
            if is_tcp {
                self.wire.reserve()?;
            }
        }
        loop {
            let all = order.first.iter().chain(&order.rest);
            let todo: Vec<u16> = all.copied().filter(|port| !self.answers.has(*port)).collect();
            if todo.is_empty() {
                break;
            }
            let few = is_tcp && todo.len() <= FEW_LEFT;
            let most = if few { FEW_PASSES_MAX } else { PASSES_MAX };
            if self.passes >= most {
                if is_tcp {
                    self.give_up(&todo);
                }
                break;
            }
            self.passes += 1;
            if self.passes > 2 {
                self.count.expect(todo.len());
                if is_tcp && self.passes % 2 == 1 {
                    self.wire.reserve()?;
                }
            }
            self.fresh = 0;
            self.send_all(&todo)?;
            let last = self.passes > 1 && !self.needs_more();
            self.listen(self.path.patience(last))?;
            if self.passes > 1 {
                self.late += std::mem::take(&mut self.fresh);
            }
            if !self.needs_more() {
                break;
            }
        }
        self.slowly(order)?;
        let all = order.first.iter().chain(&order.rest);
        let unasked = all.filter(|port| self.answers.get(**port) == Answer::Unasked).count();
        if unasked > 0 && self.gap.is_none() {
            self.gap = Some(format!("this host's own rules held the probes of {unasked} ports back"));
        }
        Ok(())
    }

    /// Says what silence means on a path that loses too much to be sure.
    fn give_up(&mut self, silent: &[u16]) {
        let loss = self.loss();
        self.gap = Some(format!(
            "about {:.0} of 100 probes or their answers got lost: after {} passes, some of the {} silent ports \
             may still be open",
            loss.share() * 100.0,
            self.passes,
            silent.len()
        ));
        if loss.leaves_doubt(self.passes, silent.len()) {
            silent.iter().for_each(|port| self.answers.doubt(*port));
        }
    }

    fn loss(&self) -> Loss {
        // What answered in a later pass was lost in the first.
        let late = self.late + if self.passes > 1 { self.fresh } else { 0 };
        let (canaries, lost) = (u64::from(self.path.canaries), u64::from(self.path.lost));
        Loss { asked: self.answered + canaries, lost: late + lost, answered: self.answered }
    }

    fn effort(&self) -> Effort {
        let overrun = filter::overrun(&self.wire.back).map_or(0, u64::from);
        let loss = (self.loss().share() * 1000.0).round() / 1000.0;
        Effort { passes: self.passes, loss, overrun, ..self.effort }
    }

    /// Whether a silent port may still be one whose packets were lost, after this many passes.
    fn needs_more(&self) -> bool {
        let seen_enough = self.path.canaries >= 20;
        let loss = self.loss();
        if loss.lost == 0 {
            let least = match self.wire.flow.proto {
                Proto::Udp => 3,
                Proto::Tcp if self.answered == 0 && self.started.elapsed() < ASKED_AGAIN => 3,
                Proto::Tcp if seen_enough || self.answered == 0 => 2,
                Proto::Tcp if self.answered > 100 => 2,
                Proto::Tcp => 3,
            };
            return self.passes < least;
        }
        loss.may_miss(self.passes)
    }

    fn send_all(&mut self, ports: &[u16]) -> anyhow::Result<()> {
        // An answer to what was sent before this pass would tell a wrong time.
        self.timed.clear();
        let mut rest = ports;
        while !rest.is_empty() {
            let now = Instant::now();
            self.path.settle(now, &mut self.pace, self.wire.flow.proto);
            self.canary(now)?;
            let n = self.pace.allow(now).min(rest.len()).min(BATCH);
            if n == 0 {
                self.hear_for(self.pace.wait(), false)?;
                continue;
            }
            let (batch, later) = rest.split_at(n);
            // One in a batch tells the time; more would cost more than they tell.
            self.timed.insert(batch[0], now);
            if self.timed.len() > 4096 {
                self.timed.clear();
            }
            for port in batch {
                if self.send(*port, self.wire.asker())? {
                    self.answers.put(*port, Answer::Silent);
                }
            }
            self.count.sent(n);
            self.pace.spend(n);
            self.hear()?;
            rest = later;
        }
        Ok(())
    }

    /// Asks a port again that answered before, if it is time.
    fn canary(&mut self, now: Instant) -> anyhow::Result<()> {
        // Within the limit, and a small part of it: it may be one of many hosts' shares.
        let every = CANARY_EVERY.max(Duration::from_secs_f64(10.0 / self.pace.most.max(1.0)));
        if let Some(port) = self.path.next_canary(now, every) {
            self.send(port, CANARY)?;
            self.pace.spend(1);
        }
        Ok(())
    }

    /// Whether it was sent. A full queue is waited for; what our own rules refuse is not sent.
    fn send(&mut self, port: u16, asker: usize) -> anyhow::Result<bool> {
        let cookie = self.wire.cookie(port, asker);
        self.wire.flow.probe(port, asker, cookie, &mut self.packet);
        for _ in 0..100 {
            match send(&self.wire.out, &self.packet, SendFlags::DONTWAIT) {
                Ok(_) => {
                    self.refused = 0;
                    self.effort.sent += 1;
                    return Ok(true);
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN | Errno::NOBUFS) => {
                    self.effort.queue_full += 1;
                    self.pace.back_off(Instant::now());
                    self.hear_for(Duration::from_millis(2), false)?;
                }
                Err(error @ (Errno::PERM | Errno::ACCESS)) => {
                    self.refused += 1;
                    self.effort.refused += 1;
                    if self.refused > REFUSED_MAX {
                        return Err(error)
                            .context("this host's own rules or a full conntrack table hold the probes back");
                    }
                    return Ok(false);
                }
                // Nobody there answered who has this address; packets sent now would go nowhere.
                Err(Errno::HOSTUNREACH) if self.refused < REFUSED_MAX => {
                    self.refused += 1;
                    return Ok(true);
                }
                Err(error) => {
                    return Err(error).with_context(|| format!("send to {}", self.wire.flow.target));
                }
            }
        }
        anyhow::bail!("send to {}: the queue stays full", self.wire.flow.target)
    }

    /// Takes what is there.
    fn hear(&mut self) -> anyhow::Result<()> {
        let mut buffer = [0u8; SNAP];
        loop {
            let length = match recv(&self.wire.back, &mut buffer, RecvFlags::DONTWAIT) {
                Ok((_, length)) => length.min(SNAP),
                Err(Errno::AGAIN) => return Ok(()),
                // The interface went down: that is said once and passes.
                Err(Errno::INTR | Errno::NETDOWN) => continue,
                Err(error) => return Err(io::Error::from(error)).context("receive answers"),
            };
            let wire = &self.wire;
            let heard = wire.flow.hear(&buffer[..length], |port, asker| wire.cookie(port, asker));
            if let Some(heard) = heard {
                self.take(heard);
            }
        }
    }

    fn take(&mut self, heard: Heard) {
        let now = Instant::now();
        let Heard { port, asker, answer } = heard;
        if asker == CANARY {
            self.path.canary_came_back(port, now);
            return;
        }
        let before = self.answers.has(port);
        if !self.answers.put(port, answer) {
            return;
        }
        // Errors are limited by whoever sends them, so that they tell nothing about losses.
        if matches!(answer, Answer::Unreachable { .. }) || before {
            return;
        }
        if let Some(sent) = self.timed.remove(&port) {
            self.path.round_trip(now.saturating_duration_since(sent));
        }
        self.fresh += 1;
        self.answered += 1;
        self.path.answers_at(port, answer);
    }

    /// Listens for a while after a pass. Where packets get lost, canaries tell meanwhile how many.
    fn listen(&mut self, time: Duration) -> anyhow::Result<()> {
        let end = Instant::now() + time;
        loop {
            let now = Instant::now();
            let left = end.saturating_duration_since(now);
            if left.is_zero() {
                return Ok(());
            }
            if self.loss().lost > 0 {
                self.path.settle(now, &mut self.pace, self.wire.flow.proto);
                self.canary(now)?;
            }
            self.hear_for(left.min(CANARY_EVERY), false)?;
        }
    }

    /// Listens for a while; `any`: only until the first that answers.
    fn hear_for(&mut self, time: Duration, any: bool) -> anyhow::Result<()> {
        let end = Instant::now() + time;
        loop {
            self.hear()?;
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() || any && self.answered > 0 {
                return Ok(());
            }
            let left = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) };
            match poll(&mut [PollFd::new(&self.wire.back, PollFlags::IN)], Some(&left)) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(io::Error::from(error)).context("wait for answers"),
            }
        }
    }

    /// Closed UDP ports answer by ICMP, which Linux sends once a second. Where few ports are
    /// left, that is waited for, as nmap does.
    fn slowly(&mut self, order: &Order) -> anyhow::Result<()> {
        const FEW: usize = 50;
        const TRIED: usize = 3;
        let all = || order.first.iter().chain(&order.rest).copied();
        let silent: Vec<u16> = all().filter(|port| !self.answers.has(*port)).collect();
        if self.wire.flow.proto != Proto::Udp || silent.len() > FEW {
            return Ok(());
        }
        let is_closed = |answers: &Answers, port: u16| {
            matches!(answers.get(port), Answer::Unreachable { code: 3 | 4, .. })
        };
        let mut limited = all().any(|port| is_closed(&self.answers, port));
        self.count.expect(silent.len());
        // The first of them met what the passes left of the limit: those few are asked again.
        let again: Vec<u16> = silent.iter().copied().take(TRIED).collect();
        for (at, port) in silent.into_iter().chain(again).enumerate() {
            if self.answers.has(port) {
                continue;
            }
            // Nothing there ever said "closed", not even now.
            if at == TRIED && !limited {
                break;
            }
            let end = Instant::now() + Duration::from_millis(1050);
            self.send(port, self.wire.asker())?;
            self.count.sent(1);
            // The limit is by time: an early answer makes the next one no earlier.
            self.hear_for(end.saturating_duration_since(Instant::now()), false)?;
            limited |= is_closed(&self.answers, port);
        }
        Ok(())
    }
}

/// A token bucket whose speed grows while nothing gets lost.
struct Pace {
    rate: f64,
    most: f64,
    tokens: f64,
    filled: Instant,
    grown: Instant,
}

impl Pace {
    fn new(limit: Option<f64>, now: Instant) -> Self {
        let most = limit.unwrap_or(RATE_MAX);
        // Where a limit is shared among many hosts, each one's first burst would be beyond it.
        let tokens = if limit.is_some() { 1.0 } else { BATCH as f64 };
        Self { rate: RATE_START.min(most), most, tokens, filled: now, grown: now }
    }

    /// How many may go now.
    fn allow(&mut self, now: Instant) -> usize {
        let time = now.saturating_duration_since(self.filled).as_secs_f64();
        self.filled = now;
        // No more than what a tick of the clock brings, so that a pause makes no burst.
        let most = (self.rate * 0.005).max(1.0);
        self.tokens = (self.tokens + time * self.rate).min(most.max(BATCH as f64).min(self.rate.max(1.0)));
        let whole = self.tokens as usize;
        // Full batches where it is fast: fewer wake-ups.
        if whole < BATCH.min((self.rate * 0.002) as usize) { 0 } else { whole }
    }

    fn spend(&mut self, n: usize) {
        self.tokens -= n as f64;
    }

    fn wait(&self) -> Duration {
        let batch = (BATCH as f64).min((self.rate * 0.002).floor()).max(1.0);
        Duration::from_secs_f64(((batch - self.tokens) / self.rate).clamp(0.000_05, 1.0))
    }

    fn grow(&mut self, now: Instant, most: f64) {
        if now.saturating_duration_since(self.grown) >= Duration::from_millis(20) {
            self.rate = (self.rate * 2.0).min(most.max(RATE_MIN)).min(self.most);
            self.grown = now;
        }
    }

    fn back_off(&mut self, now: Instant) {
        if now.saturating_duration_since(self.grown) >= Duration::from_millis(20) {
            self.rate = (self.rate / 2.0).max(RATE_MIN).min(self.most);
            // Takes its time before it grows again.
            self.grown = now + Duration::from_millis(100);
        }
    }
}

/// What is known about the way there and back.
struct Path {
    /// Smoothed, with its variation (RFC 6298).
    round_trip: Option<(Duration, Duration)>,
    /// Ports that answer, open ones first in line.
    witnesses: Vec<Witness>,
    next: usize,
    asked_at: Instant,
    /// Canaries that came back or were given up, and those given up.
    canaries: u32,
    lost: u32,
    recent: u16,
}

struct Witness {
    port: u16,
    out: Option<Instant>,
    misses: u32,
    hits: u32,
}

impl Path {
    fn new(now: Instant) -> Self {
        Self {
            round_trip: None,
            witnesses: Vec::new(),
            next: 0,
            asked_at: now,
            canaries: 0,
            lost: 0,
            recent: 0,
        }
    }

    fn round_trip(&mut self, time: Duration) {
        // A server sends its answer again after a second: that is how long it was lost, not
        // how long it was on its way. What is really slower now is learnt in steps.
        let time = if self.round_trip.is_some() { time.min(self.timeout() * 2) } else { time };
        self.round_trip = Some(match self.round_trip {
            None => (time, time / 2),
            Some((mean, spread)) => ((mean * 7 + time) / 8, (spread * 3 + mean.abs_diff(time)) / 4),
        });
    }

    /// After this long an answer is not coming any more.
    fn timeout(&self) -> Duration {
        match self.round_trip {
            Some((mean, spread)) => {
                (mean * 2 + spread * 4).clamp(Duration::from_millis(40), Duration::from_secs(2))
            }
            None => Duration::from_millis(300),
        }
    }

    /// How long to listen after a pass; longer after the last one.
    fn patience(&self, last: bool) -> Duration {
        match (self.round_trip, last) {
            (Some(_), false) => self.timeout(),
            (Some(_), true) => self.timeout() * 2,
            (None, false) => Duration::from_millis(300),
            (None, true) => Duration::from_millis(500),
        }
    }

    fn answers_at(&mut self, port: u16, answer: Answer) {
        if self.witnesses.len() < CANARIES_MAX && !matches!(answer, Answer::Datagram) {
            let witness = Witness { port, out: None, misses: 0, hits: 0 };
            match answer {
                Answer::SynAck => self.witnesses.insert(0, witness),
                _ => self.witnesses.push(witness),
            }
        }
    }

    fn next_canary(&mut self, now: Instant, every: Duration) -> Option<u16> {
        if self.witnesses.is_empty() || now.saturating_duration_since(self.asked_at) < every {
            return None;
        }
        self.next = (self.next + 1) % self.witnesses.len();
        let witness = &mut self.witnesses[self.next];
        if witness.out.is_some() {
            return None;
        }
        witness.out = Some(now);
        self.asked_at = now;
        Some(witness.port)
    }

    fn canary_came_back(&mut self, port: u16, now: Instant) {
        let Some(witness) = self.witnesses.iter_mut().find(|w| w.port == port) else { return };
        let Some(sent) = witness.out.take() else { return };
        (witness.misses, witness.hits) = (0, witness.hits + 1);
        let time = now.saturating_duration_since(sent);
        // Late by so much, it is an answer that was sent a second time.
        let late = time > self.timeout() * 2;
        self.canaries += 1;
        self.lost += u32::from(late);
        self.recent = self.recent << 1 | u16::from(late);
        self.round_trip(time);
    }

    /// Gives up canaries that are overdue, and lets the speed follow.
    fn settle(&mut self, now: Instant, pace: &mut Pace, proto: Proto) {
        let timeout = self.timeout();
        let mut given_up = 0;
        for witness in &mut self.witnesses {
            if witness.out.is_some_and(|sent| now.saturating_duration_since(sent) > timeout) {
                witness.out = None;
                witness.misses += 1;
                given_up += 1;
                self.recent = self.recent << 1 | 1;
            }
        }
        if given_up > 0 {
            self.canaries += given_up;
            self.lost += given_up;
            let bad = |w: &Witness| w.misses >= CANARY_MISSES_MAX || w.misses >= 4 && w.hits == 0;
            for gone in self.witnesses.iter().filter(|w| bad(w)) {
                // What a limit kept away was not lost on the way.
                self.lost = self.lost.saturating_sub(gone.misses);
                self.canaries = self.canaries.saturating_sub(gone.misses);
            }
            self.witnesses.retain(|w| !bad(w));
        }
        // Half of the last sixteen: more than a bad path loses by chance.
        if self.recent.count_ones() >= 8 {
            if given_up > 0 {
                pace.back_off(now);
            }
        } else {
            let blind = self.witnesses.is_empty() || proto == Proto::Udp;
            pace.grow(now, if blind { RATE_BLIND } else { RATE_MAX });
        }
    }
}
