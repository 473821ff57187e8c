//! The loop: wake, look, decide, repair, report.
//!
//! Events say when to look and never what is true: a wake names a facet, and the facet is
//! read again. Two paths lead to a repair. The fast one answers an nftables commit that
//! touched our table, on the loop's own thread, within milliseconds. The slow one is the
//! whole cycle on a worker thread, where reading 10,000 foreign rules delays nobody.

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::Context;
use ipnet::IpNet;
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::JoinHandle;
use tokio::time::Instant;

use crate::apply::replay::Replay;
use crate::apply::{self, Applied};
use crate::cli::Places;
use crate::desired::Desired;
use crate::diff::{self, Assessment, Code, Finding};
use crate::metrics::{self, Control, RepairOutcome};
use crate::observed::{Facet, Link, Reading, Snapshot};
use crate::policy::{Mode, Sources};
use crate::repair::{self, Action, ActionKind, Budget, Ended, Outcome};
use crate::report::{Report, Transition};
use crate::ruleset::{TableFamily, compare};
use crate::source::nft_events::{NftEvent, NftEvents, NftQueries};
use crate::source::{Eyes, bpf, links, nft, nft_counters, owners, wireguard};
use crate::sys::clock::{self, Uptime};
use crate::sys::memory;
use crate::terms::{Actor, Scope, Stamp};

pub mod eventlog;
pub mod history;
pub mod http;
pub mod logging;
pub mod notify;
pub mod privileges;
pub mod socket;

use eventlog::{Event, EventKind, EventLog};

/// What has no events of its own is read this often.
const TICK: Duration = Duration::from_secs(10);
/// Everything is read this often, whatever the events said.
const FULL_LOOK: Duration = Duration::from_secs(600);
/// A wake waits this long for more of its kind.
const SETTLE: Duration = Duration::from_millis(20);
/// Cycles keep a distance of this many times their own cost, so that a burst of foreign
/// changes costs at most a twentieth of a core.
const REST: u32 = 20;
const REST_MIN: Duration = Duration::from_millis(50);
const REST_MAX: Duration = Duration::from_secs(5);
/// Events that `status` shows.
const EVENTS_SHOWN: usize = 20;

/// Runs until SIGTERM or SIGINT, and leaves the rules in force. `policy_hash` names the
/// policy in metrics.
pub async fn run(desired: Desired, policy_hash: String, places: Places) -> anyhow::Result<()> {
    let lock = socket::Lock::take(&places.run)?;
    let mut daemon = Daemon::new(desired, policy_hash, places);
    daemon.start().await;
    let result = daemon.serve(&lock).await;
    daemon.note(EventKind::Stopped, None, None);
    notify::stopping();
    result
}

struct Daemon {
    desired: Arc<Desired>,
    policy_hash: String,
    places: Places,
    /// Away while a look is under way on the worker thread.
    eyes: Option<Eyes>,
    snapshot: Option<Snapshot>,
    /// The whole table as one transaction for nft, ready to send.
    transaction: Option<String>,
    /// The same in the kernel's own words, which needs no nft: a tenth of the time.
    replay: Option<Replay>,
    queries: Option<NftQueries>,
    budget: Arc<Mutex<Budget>>,
    config: bpf::CounterConfig,
    counters: Option<bpf::Bpf>,
    listens: Option<bpf::ListenEvents>,
    program_log: Option<bpf::ProgramLog>,
    history: history::Stored,
    log: EventLog,
    layout: metrics::Layout,
    face: http::Face,
    board: socket::Board,
    uptime: Uptime,
    started: Stamp,
    wanted: BTreeSet<Facet>,
    due: Option<Instant>,
    rest_until: Instant,
    /// Who made the last commit to nftables that changed something of ours, or of others.
    culprit: Option<Actor>,
    generation: Option<u32>,
    report: Option<Report>,
    cycles: u64,
    cycle_took: Duration,
    drifts: BTreeMap<Facet, u64>,
    repairs: BTreeMap<(ActionKind, RepairOutcome), u64>,
    /// The last repair of this kind that was tried failed, or could not be tried.
    repair_fails: bool,
}

/// What one cycle on the worker thread gives back.
struct Pass {
    eyes: Eyes,
    snapshot: Snapshot,
    assessment: Assessment,
    /// What stood before the repairs, where there were any.
    repaired: Vec<(Finding, Outcome)>,
    plan: repair::Plan,
    /// The generation that the rules were read at; `None`: they were not read.
    generation: Option<u32>,
    replay: Option<Replay>,
    took: Duration,
}

impl Daemon {
    fn new(desired: Desired, policy_hash: String, places: Places) -> Self {
        let config = bpf::CounterConfig::new(&desired.services);
        Self {
            transaction: apply::restoring_transaction(&desired),
            replay: None,
            layout: metrics::Layout::new(&desired),
            eyes: Some(Eyes::new(&places.pin)),
            log: EventLog::open(&places.state),
            history: history::read(&places.state),
            desired: Arc::new(desired),
            policy_hash,
            places,
            snapshot: None,
            queries: None,
            budget: Arc::default(),
            config,
            counters: None,
            listens: None,
            program_log: None,
            face: http::Face::default(),
            board: socket::Board::default(),
            uptime: Uptime::start(),
            started: clock::now(),
            wanted: BTreeSet::new(),
            due: None,
            rest_until: Instant::now(),
            culprit: None,
            generation: None,
            report: None,
            cycles: 0,
            cycle_took: Duration::ZERO,
            drifts: BTreeMap::new(),
            repairs: BTreeMap::new(),
            repair_fails: false,
        }
    }

    /// Enforcement first, and it waits for nothing else: the mesh may be late, eBPF may be
    /// missing, the state directory may be full.
    async fn start(&mut self) {
        let begun = self.uptime.elapsed();
        match apply::apply_table(&self.desired) {
            Ok(Applied::Unchanged) => log::info!("the rules were in force already"),
            Ok(Applied::Changed(changes)) => {
                let took = self.uptime.elapsed() - begun;
                log::info!("rules put in force: {} changes in {took:.1?}", changes.len());
            }
            Ok(Applied::NotWanted) => log::info!("[enforce] firewall = false: no rules of ours"),
            Err(error) => {
                self.repair_fails = true;
                log::error!("the rules are NOT in force: {:#}", anyhow::Error::from(error));
            }
        }
        self.queries = NftQueries::open().map_err(|error| warn("nftables queries", error.into())).ok();
        if let Err(error) = self.load_counters().await {
            warn("the counters do not run", error);
        }
        if let Err(error) = privileges::drop_needless() {
            warn("capabilities could not be dropped", error);
        }
        self.note(EventKind::Started, None, None);
        self.wake(Facet::ALL, Duration::ZERO);
    }

    /// The loader child mounts and loads; this process only opens what it pinned. The
    /// programs' own log needs CAP_SYS_ADMIN to be found, so it is opened before that goes.
    async fn load_counters(&mut self) -> anyhow::Result<()> {
        let (pins, config) = (self.places.pin.clone(), self.config.clone());
        let verb = [crate::cli::INTERNAL_LOAD.into(), pins.clone().into_os_string()];
        tokio::task::spawn_blocking(move || bpf::spawn_loader(&verb, &config)).await??;
        let counters = bpf::Bpf::open(&pins)?.context("the loader pinned nothing")?;
        self.listens = bpf::ListenEvents::open(&pins).map_err(|error| warn("listen events", error)).ok();
        match bpf::ProgramLog::open(&counters) {
            Ok(log) => self.program_log = Some(log),
            Err(error) => log::debug!("the programs' own log: {error:#}"),
        }
        self.counters = Some(counters);
        Ok(())
    }

    async fn serve(&mut self, lock: &socket::Lock) -> anyhow::Result<()> {
        let mut commits = NftEvents::open().map_err(|error| warn("nftables events", error.into())).ok();
        let mut link_events = links::LinkEvents::open().map_err(|error| warn("link events", error)).ok();
        let mut listens = self.listens.take();
        if let Some(log) = self.program_log.take() {
            tokio::spawn(log.forward());
        }
        let mut server = http::Server::new(self.face.clone(), hub_of(&self.desired));
        let status = socket::StatusSocket::bind(&self.places.run, lock)?;
        tokio::spawn(status.serve(self.board.clone()));
        let mut tick = tokio::time::interval_at(Instant::now() + TICK, TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut full = tokio::time::interval_at(Instant::now() + FULL_LOOK, FULL_LOOK);
        let mut watchdog = notify::watchdog_interval().map(tokio::time::interval);
        let mut terminate = signal(SignalKind::terminate()).context("wait for SIGTERM")?;
        let mut interrupt = signal(SignalKind::interrupt()).context("wait for SIGINT")?;
        let mut look: Option<JoinHandle<Pass>> = None;
        let face = self.face.clone();
        let mut greeted = false;
        loop {
            let due = self.due.filter(|_| look.is_none());
            tokio::select! {
                biased;
                event = maybe(commits.as_mut().map(NftEvents::next)) => match event {
                    Ok(event) => self.on_commit(event),
                    Err(error) => {
                        warn("nftables events; looking every 10 s instead", error.into());
                        commits = None;
                    }
                },
                _ = terminate.recv() => return Ok(()),
                _ = interrupt.recv() => return Ok(()),
                pass = maybe(look.as_mut()) => {
                    look = None;
                    self.finish(pass.context("a look at the host")?);
                    self.listen(&mut server);
                    if !greeted {
                        greeted = true;
                        notify::ready();
                    }
                }
                () = face.wanted() => self.show(),
                () = sleep_until(due) => look = self.begin(),
                event = maybe(link_events.as_mut().map(links::LinkEvents::next)) => match event {
                    Ok(_) => self.wake([Facet::Links, Facet::Wireguard, Facet::Listeners], SETTLE),
                    Err(error) => {
                        warn("link events; looking every 10 s instead", error);
                        link_events = None;
                    }
                },
                event = maybe(listens.as_mut().map(bpf::ListenEvents::next)) => match event {
                    Ok(_) => self.wake([Facet::Listeners], Duration::from_millis(1)),
                    Err(error) => {
                        warn("listen events; looking every 10 s instead", error.into());
                        listens = None;
                    }
                },
                _ = tick.tick() => self.on_tick(),
                _ = full.tick() => self.wake(Facet::ALL, Duration::ZERO),
                _ = maybe(watchdog.as_mut().map(tokio::time::Interval::tick)) => notify::alive(),
            }
        }
    }

    /// Facets to read again, not before `delay` has passed.
    fn wake(&mut self, facets: impl IntoIterator<Item = Facet>, delay: Duration) {
        self.wanted.extend(facets);
        let due = (Instant::now() + delay).max(self.rest_until);
        self.due = Some(self.due.map_or(due, |earlier| earlier.min(due)));
    }

    fn on_tick(&mut self) {
        self.wake([Facet::Wireguard, Facet::Listeners, Facet::Files], Duration::ZERO);
        if self.snapshot.as_ref().is_some_and(|s| s.links.gap().is_some()) {
            self.wake([Facet::Links], Duration::ZERO);
        }
        // Without events, or after one was missed, the generation still tells; and on a
        // new day an exception may have ended.
        let generation = self.queries.as_mut().and_then(|queries| queries.generation().ok());
        if generation.is_none() || generation != self.generation {
            self.wake([Facet::Nftables], Duration::ZERO);
        }
        self.renew_day();
        if self.log.waiting() > 0
            && let Err(error) = self.log.flush()
        {
            log::debug!("event log: {error}");
        }
    }

    /// Exceptions end at midnight UTC: the table is computed anew for the new day.
    fn renew_day(&mut self) {
        let today = crate::cli::today(clock::now());
        if today == self.desired.today {
            return;
        }
        match Desired::new(self.desired.policy.clone(), today) {
            Ok(desired) => {
                self.transaction = apply::restoring_transaction(&desired);
                self.replay = None;
                self.desired = Arc::new(desired);
                self.wake(Facet::ALL, Duration::ZERO);
            }
            Err(error) => log::error!("the policy no longer leaves a way in: {error}; the old rules stay"),
        }
    }

    /// The fast path. A commit that touched our table, or events that were lost, are
    /// answered here and now; everything else waits for the next cycle.
    fn on_commit(&mut self, event: NftEvent) {
        let begun = self.uptime.elapsed();
        self.wake([Facet::Nftables], SETTLE);
        // Who it was is asked after the repair: 100 us decide whether it waits (see Replay).
        let blame = |culprit: Option<Actor>| event.actor.map(|(pid, name)| owners::actor(pid, &name)).or(culprit);
        let touched = event.own_touched || event.overrun;
        let (true, Some(table), Some(queries)) = (touched, &self.desired.table, &mut self.queries) else {
            self.culprit = blame(self.culprit.take());
            return;
        };
        let Ok(exists) = queries.own_table_exists() else { return };
        let (code, found) = if !exists {
            (Code::FirewallMissing, "the table was gone".to_owned())
        } else {
            match nft::list_table().map(|found| compare::changes(table, found.as_ref())) {
                // Our own commit, or a change that left the table as it should be.
                Ok(changes) if changes.is_empty() => return,
                Ok(changes) => (Code::FirewallChanged, changes[0].to_string()),
                // The cycle reads it again and says what is wrong.
                Err(_) => return,
            }
        };
        if !lock(&self.budget).take(ActionKind::ApplyTable, begun) {
            self.culprit = blame(self.culprit.take());
            // The cycle tells of it, and tries again when the budget allows.
            return;
        }
        let replayed = !exists
            && self.replay.as_ref().is_some_and(|replay| match replay.send() {
                Ok(()) => true,
                Err(error) => {
                    warn("by way of nft instead", error.into());
                    false
                }
            });
        let result = match (&self.transaction, exists) {
            _ if replayed => Ok(Applied::Unchanged),
            (Some(transaction), false) => apply::restore_table(transaction).map(|()| Applied::Unchanged),
            _ => apply::apply_table(&self.desired),
        };
        let took = self.uptime.elapsed() - begun;
        self.culprit = blame(self.culprit.take());
        apply::greet_hub(&self.desired);
        let ended = match result {
            Ok(_) => Ended::Done,
            Err(error) => Ended::Failed(format!("{:#}", anyhow::Error::from(error))),
        };
        let finding = Finding::new(
            code,
            code.severity(),
            format!("table inet {}", crate::desired::TABLE),
            "the policy's table",
            found,
            "Nothing: it was repaired.",
        );
        self.record(finding, &Outcome { action: ActionKind::ApplyTable, result: ended, took });
    }

    /// Counts and logs one repair that was tried.
    fn record(&mut self, mut finding: Finding, outcome: &Outcome) {
        let facet = finding.facet.unwrap_or(Facet::Nftables);
        if finding.by.is_none() && facet == Facet::Nftables {
            finding.by = self.culprit.clone();
        }
        *self.drifts.entry(facet).or_default() += 1;
        *self.repairs.entry((outcome.action, RepairOutcome::from(&outcome.result))).or_default() += 1;
        let kind = if let Ended::Failed(error) = &outcome.result {
            self.repair_fails = true;
            log::error!("{} failed: {error}", outcome.action.name());
            EventKind::RepairFailed
        } else {
            self.repair_fails = false;
            EventKind::Repaired
        };
        self.note(kind, Some(&finding), Some(outcome.took));
    }

    /// Sends the eyes off to the worker thread.
    fn begin(&mut self) -> Option<JoinHandle<Pass>> {
        let eyes = self.eyes.take()?;
        self.due = None;
        let facets: Vec<Facet> = std::mem::take(&mut self.wanted).into_iter().collect();
        let (desired, snapshot) = (Arc::clone(&self.desired), self.snapshot.take());
        let (budget, uptime, replay) = (Arc::clone(&self.budget), self.uptime, self.replay.is_none());
        Some(tokio::task::spawn_blocking(move || {
            let mut pass = cycle(eyes, &desired, snapshot, &facets, &budget, uptime);
            if replay {
                pass.replay = capture(&desired, &pass);
            }
            pass
        }))
    }

    fn finish(&mut self, pass: Pass) {
        let Pass { eyes, snapshot, mut assessment, repaired, plan, generation, replay, took } = pass;
        self.replay = self.replay.take().or(replay);
        let now = snapshot.at;
        self.eyes = Some(eyes);
        self.generation = generation.or(self.generation);
        self.cycles += 1;
        self.cycle_took = took;
        self.rest_until = Instant::now() + (took * REST).clamp(REST_MIN, REST_MAX);
        for (finding, outcome) in repaired {
            self.record(finding, &outcome);
        }
        for kind in &plan.withheld {
            *self.repairs.entry((*kind, RepairOutcome::Withheld)).or_default() += 1;
            let wait = lock(&self.budget).wait(*kind, self.uptime.elapsed());
            if let Some(wait) = wait {
                self.wake([Facet::Nftables], wait);
            }
        }
        for finding in &mut assessment.findings {
            if finding.by.is_none() && CAUSED_BY_COMMITS.contains(&finding.code) {
                finding.by = self.culprit.clone();
            }
        }
        repair::tell_of_withheld(&mut assessment.findings, &plan, &lock(&self.budget), self.uptime.elapsed());
        let transitions = self.history.history.update(&mut assessment.findings, &snapshot, now);
        for transition in &transitions {
            match transition {
                Transition::Appeared { finding } | Transition::Changed { finding, .. } => {
                    if let (false, Some(facet)) = (finding.accepted, finding.facet) {
                        *self.drifts.entry(facet).or_default() += 1;
                    }
                    self.note(EventKind::DriftAppeared, Some(finding), None);
                }
                Transition::Cleared { finding } => self.note(EventKind::DriftCleared, Some(finding), None),
            }
        }
        if !transitions.is_empty()
            && let Err(error) = self.history.write(&self.places.state)
        {
            log::debug!("first-seen history: {error:#}");
        }
        self.count_on(&snapshot);
        let report = Report::new(&self.desired, &snapshot, assessment, now);
        notify::status(&headline(&report));
        self.snapshot = Some(snapshot);
        self.report = Some(report);
        self.face.set_health(http::Beat { at: std::time::Instant::now(), period: TICK });
        self.post();
        memory::trim();
    }

    /// Attaches the counters to the interfaces that are there now.
    fn count_on(&mut self, snapshot: &Snapshot) {
        let (Some(counters), Reading::Seen(links)) = (&mut self.counters, &snapshot.links) else { return };
        let policy = &self.desired.policy;
        let wanted: Vec<(&Link, Scope)> = links
            .iter()
            .filter(|link| link.master.is_none())
            .filter_map(|link| Some((link, policy.scope_of(&link.name)?)))
            .collect();
        for error in counters.sync(&wanted) {
            log::debug!("counters: {error:#}");
        }
    }

    /// The metrics server on every mesh address, present or not.
    fn listen(&self, server: &mut http::Server) {
        let policy = &self.desired.policy;
        let mut addresses: Vec<IpAddr> = policy.mesh.address.clone();
        if let (true, Some(Reading::Seen(links))) =
            (addresses.is_empty(), self.snapshot.as_ref().map(|s| &s.links))
        {
            let mesh = links.iter().filter(|link| link.name == policy.mesh.interface);
            addresses.extend(
                mesh.flat_map(|link| &link.addresses).map(IpNet::addr).filter(|a| self.desired.in_mesh(*a)),
            );
        }
        let wanted: Vec<SocketAddr> =
            addresses.iter().map(|address| SocketAddr::new(*address, policy.metrics.port.get())).collect();
        for (address, error) in server.listen_on(&wanted) {
            log::warn!("metrics on {address}: {error}");
        }
    }

    /// Makes the text that a scrape gets.
    fn show(&mut self) {
        let Some(report) = &self.report else { return };
        let snapshot = self.snapshot.as_ref();
        let counters = self.counters.as_ref().and_then(|counters| match counters.read(&self.config) {
            Reading::Seen(counters) => Some(counters),
            Reading::Blind(_) => None,
        });
        let drops = nft_counters::read().ok();
        let peers = snapshot.and_then(|s| s.wireguard.seen()).and_then(Option::as_ref).map(|d| &d.peers[..]);
        let blind: Vec<Facet> = report.blind.iter().map(|blind| blind.facet).collect();
        let state = metrics::State {
            now: clock::now(),
            started: self.started,
            version: env!("CARGO_PKG_VERSION"),
            abi: sidecar_ebpf::ABI,
            node: &self.desired.policy.node.name,
            role: self.desired.policy.node.role,
            mode: self.desired.policy.enforce.mode,
            policy_hash: &self.policy_hash,
            verdict: report.verdict,
            findings: &report.findings,
            blind: &blind,
            enforced: &self.enforced(report, counters.as_ref()),
            drift: &self.drifts,
            repairs: &self.repairs,
            counters: counters.as_ref(),
            drops: drops.as_ref(),
            peers,
            audit: None,
            cycles: self.cycles,
            cycle_seconds: self.cycle_took.as_secs_f64(),
            resident_bytes: memory::resident_bytes().ok(),
            http_rejects: self.face.rejects(),
        };
        self.face.set(metrics::render(&state, &self.layout));
    }

    /// The controls that were seen to hold at the last look. Reading back is all the proof
    /// there is so far; canaries come with a later version.
    fn enforced(&self, report: &Report, counters: Option<&crate::observed::Counters>) -> BTreeSet<Control> {
        let enforce = &self.desired.policy.enforce;
        let stands = |codes: &[Code]| report.findings.iter().any(|f| codes.contains(&f.code));
        let blind = |facet| report.blind.iter().any(|blind| blind.facet == facet);
        let mut held = BTreeSet::new();
        let firewall = self
            .snapshot
            .as_ref()
            .and_then(|s| s.nftables.seen())
            .is_some_and(|rules| rules.table(TableFamily::Inet, crate::desired::TABLE).is_some());
        if enforce.firewall
            && enforce.mode == Mode::Enforce
            && firewall
            && !stands(&[Code::FirewallMissing, Code::FirewallChanged])
        {
            held.insert(Control::Firewall);
        }
        if enforce.keepalive && !blind(Facet::Wireguard) && !stands(&[Code::MeshKeepalive, Code::MeshMissing])
        {
            held.insert(Control::Keepalive);
        }
        if counters.is_some_and(|counters| !counters.attached.is_empty()) {
            held.insert(Control::Counters);
        }
        if !self.repair_fails && !blind(Facet::Nftables) && self.queries.is_some() {
            held.insert(Control::Repair);
        }
        held
    }

    /// Leaves the answer to `status`.
    fn post(&mut self) {
        let Some(report) = self.report.clone() else { return };
        let done = |(key, count): (&(ActionKind, RepairOutcome), &u64)| {
            (key.1 == RepairOutcome::Done).then_some(*count)
        };
        let daemon = socket::Daemon {
            pid: std::process::id(),
            started: self.started,
            mode: self.desired.policy.enforce.mode,
            cycle: self.cycles,
            last_cycle_seconds: self.cycle_took.as_secs_f64(),
            repairs: self.repairs.iter().filter_map(done).sum(),
            events: self.log.tail(EVENTS_SHOWN),
        };
        if let Err(error) = self.board.set(&socket::Status { report, daemon }) {
            log::warn!("status: {error}");
        }
    }

    /// One line in the event log and one in the journal.
    fn note(&mut self, kind: EventKind, finding: Option<&Finding>, took: Option<Duration>) {
        let event = Event {
            at: clock::now(),
            kind,
            code: finding.map(|f| f.code),
            subject: finding.map_or_else(|| self.desired.policy.node.name.clone(), |f| f.subject.clone()),
            found: finding.map_or_else(String::new, |f| f.found.clone()),
            by: finding.and_then(|f| f.by.clone()),
            took_ms: took.map(|took| u64::try_from(took.as_millis()).unwrap_or(u64::MAX)),
            cycle: self.cycles,
        };
        log::info!("{}", event.to_line());
        if let Err(error) = self.log.append(event) {
            log::warn!("event log in {}: {error}; kept in memory", self.places.state.display());
        }
        self.post();
    }
}

/// Findings that a commit to nftables can bring about.
const CAUSED_BY_COMMITS: [Code; 4] =
    [Code::FirewallMissing, Code::FirewallChanged, Code::FirewallBlocked, Code::DnatExposed];

/// One cycle: look, decide, repair, look again at what was touched, decide again.
fn cycle(
    mut eyes: Eyes,
    desired: &Desired,
    before: Option<Snapshot>,
    facets: &[Facet],
    budget: &Mutex<Budget>,
    uptime: Uptime,
) -> Pass {
    let begun = uptime.elapsed();
    let now = clock::now();
    let looked_at_rules = before.is_none() || facets.contains(&Facet::Nftables);
    // Read before the look: a commit during the look shows as a newer generation, and the
    // next tick looks again.
    let mut generation = generation(looked_at_rules);
    let mut snapshot = match before {
        Some(before) => eyes.look_again(desired, before, facets, now),
        None => eyes.look(desired, now),
    };
    let mut assessment = diff::assess(desired, &snapshot, now);
    let plan = repair::plan(desired, &assessment.findings, &snapshot, &mut lock(budget), begun);
    let mut repaired = Vec::new();
    let mut touched = BTreeSet::new();
    for action in &plan.actions {
        let (codes, facet): (&[Code], _) = match action {
            Action::ApplyTable => (&[Code::FirewallMissing, Code::FirewallChanged], Facet::Nftables),
            Action::SetKeepalive { .. } => (&[Code::MeshKeepalive], Facet::Wireguard),
        };
        touched.insert(facet);
        let outcome = execute(desired, &snapshot, action, uptime);
        let cause = assessment.findings.iter().find(|finding| codes.contains(&finding.code));
        repaired.extend(cause.map(|finding| (finding.clone(), outcome)));
    }
    if !touched.is_empty() {
        let touched: Vec<Facet> = touched.into_iter().collect();
        generation = self::generation(true);
        snapshot = eyes.look_again(desired, snapshot, &touched, clock::now());
        assessment = diff::assess(desired, &snapshot, snapshot.at);
    }
    let took = uptime.elapsed() - begun;
    Pass { eyes, snapshot, assessment, repaired, plan, generation, replay: None, took }
}

/// Takes our table down in the kernel's own words, if it is the one that was just read and
/// found right.
fn capture(desired: &Desired, pass: &Pass) -> Option<Replay> {
    let right = diff::firewall::own_table(desired, pass.snapshot.nftables.seen()?).is_none();
    if desired.table.is_none() || !right || pass.generation.is_none() {
        return None;
    }
    match Replay::capture() {
        Ok(replay) => (Some(replay.generation()) == pass.generation).then_some(replay),
        Err(error) => {
            log::debug!("{:#}; repairs go by way of nft", anyhow::Error::from(error));
            None
        }
    }
}

fn generation(wanted: bool) -> Option<u32> {
    if !wanted {
        return None;
    }
    NftQueries::open().and_then(|mut queries| queries.generation()).ok()
}

fn execute(desired: &Desired, snapshot: &Snapshot, action: &Action, uptime: Uptime) -> Outcome {
    let begun = uptime.elapsed();
    let result = match action {
        Action::ApplyTable => apply::apply_table(desired).map(drop).map_err(anyhow::Error::from),
        Action::SetKeepalive { peer, seconds, .. } => match &snapshot.wireguard {
            Reading::Seen(Some(device)) => wireguard::set_keepalive(device, *peer, *seconds),
            _ => Err(anyhow::anyhow!("the tunnel is gone")),
        },
    };
    let result = match result {
        Ok(()) => Ended::Done,
        Err(error) => Ended::Failed(format!("{error:#}")),
    };
    Outcome { action: action.kind(), result, took: uptime.elapsed() - begun }
}

/// Who may scrape: the hub's addresses, or on the hub itself the mesh.
fn hub_of(desired: &Desired) -> Vec<IpNet> {
    let mesh = &desired.policy.mesh;
    match &mesh.hub {
        Some(_) => Sources::Hub.prefixes(mesh),
        None => Sources::Mesh.prefixes(mesh),
    }
}

fn headline(report: &Report) -> String {
    let open = report.findings.iter().filter(|finding| !finding.accepted).count();
    format!("{}: {open} findings, {} blind", report.verdict.name(), report.blind.len())
}

fn warn(what: &str, error: anyhow::Error) {
    log::warn!("{what}: {error:#}");
}

/// A panic elsewhere leaves the budget whole: it is plain numbers.
fn lock(budget: &Mutex<Budget>) -> MutexGuard<'_, Budget> {
    budget.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Waits for what may be absent; the absent never comes.
async fn maybe<F: Future>(future: Option<F>) -> F::Output {
    match future {
        Some(future) => future.await,
        None => std::future::pending().await,
    }
}

async fn sleep_until(due: Option<Instant>) {
    match due {
        Some(due) => tokio::time::sleep_until(due).await,
        None => std::future::pending().await,
    }
}
