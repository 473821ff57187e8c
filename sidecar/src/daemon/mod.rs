//! The loop: wake, look, decide, repair, report.
//!
//! Events say when to look and never what is true: a wake names a facet, and the facet is
//! read again. Two paths lead to a repair. The fast one answers an nftables commit that
//! touched our table, on the loop's own thread, within milliseconds. The slow one is the
//! whole cycle on a worker thread, where reading 10,000 foreign rules delays nobody.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::future::Future;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
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
use crate::diff::canary::Canary;
use crate::diff::{self, Assessment, Code, Finding};
use crate::metrics::{self, Control, RepairOutcome};
use crate::observed::{Facet, Link, Peer, Reading, Snapshot};
use crate::policy::{Mode, Sources};
use crate::repair::{self, Action, ActionKind, Budget, Ended, Outcome};
use crate::report::{Report, Transition};
use crate::ruleset::{TableFamily, compare};
use crate::source::nft_events::{NftEvent, NftEvents, NftQueries};
use crate::source::{Eyes, bpf, links, nft, nft_counters, owners, probe, wireguard};
use crate::sys::clock::{self, Uptime};
use crate::sys::memory;
use crate::terms::{Port, Proto, Scope, Stamp, counted};

pub mod canary;
pub mod confirm;
pub mod eventlog;
pub mod front;
pub mod history;
pub mod http;
pub mod logging;
pub mod notify;
pub mod privileges;
pub mod sender;
pub mod server;
pub mod socket;

mod audits;
mod binds;
mod glass;
mod guarding;
mod heart;
mod journal;
mod keeping;
mod pace;
mod pinned;
mod reload;
mod seccomp;
mod suspects;

use audits::Audits;
use canary::Canaries;
use confirm::Standing;
use eventlog::{Event, EventKind, EventLog};
use front::{Call, Front};
use guarding::{Guarding, Kept};
use heart::Heart;
use pace::Pace;
use privileges::Privileges;
use suspects::Suspects;

/// What has no events of its own is read this often.
const TICK: Duration = Duration::from_secs(10);
/// Everything is read this often, whatever the events said.
const FULL_LOOK: Duration = Duration::from_secs(600);
/// A wake waits this long for more of its kind.
const SETTLE: Duration = Duration::from_millis(20);
/// How long the answer to a commit waits for nft. One that hangs must not keep us from the next commit,
/// which may take the table away: that needs no nft to be seen and put right.
const AT_ONCE: Duration = Duration::from_secs(5);
/// How long being ready waits for the first proof of our controls.
const PROOF: Duration = Duration::from_secs(5);
/// Announced commits that are taken together, and of how many of them it is asked which unit it was.
const COMMITS_AT_ONCE: usize = 4096;
const STRANGERS_ASKED: usize = 64;
/// Events that `status` shows.
const EVENTS_SHOWN: usize = 20;

/// Runs until SIGTERM or SIGINT, and leaves the rules in force. `policy_hash` names the
/// policy in metrics.
pub async fn run(
    desired: Desired,
    policy_hash: String,
    places: Places,
    policy_file: PathBuf,
) -> anyhow::Result<()> {
    let lock = socket::Lock::take(&places.run)?;
    let mut daemon = Daemon::new(desired, policy_hash, places, policy_file);
    daemon.start().await;
    let result = daemon.serve(&lock).await;
    daemon.note(EventKind::Stopped, None, None);
    notify::stopping();
    result
}

struct Daemon {
    desired: Arc<Desired>,
    policy_hash: String,
    policy_file: PathBuf,
    standing: Standing,
    places: Places,
    /// Away while a look is under way on the worker thread.
    eyes: Option<Eyes>,
    /// Away with them.
    snapshot: Option<Snapshot>,
    /// What scrapes need of the last look, also while the next one is under way.
    seen: Seen,
    /// The whole table as one transaction for nft, ready to send.
    transaction: Option<String>,
    /// The same in the kernel's own words, which needs no nft: a tenth of the time.
    replay: Option<Replay>,
    queries: Option<NftQueries>,
    budget: Arc<Mutex<Budget>>,
    config: bpf::CounterConfig,
    counters: Option<bpf::Bpf>,
    listens: Option<bpf::ListenEvents>,
    binds: binds::Keeper,
    bind_events: Option<bpf::bind::BindEvents>,
    program_log: Option<bpf::ProgramLog>,
    history: history::Stored,
    log: EventLog,
    /// The last events, oldest first, for `status`: reading them back from the log would
    /// cost more than everything else that a quiet cycle does.
    recent: VecDeque<Event>,
    layout: metrics::Layout,
    front: Front,
    privileges: Privileges,
    board: socket::Board,
    uptime: Uptime,
    started: Stamp,
    wanted: BTreeSet<Facet>,
    due: Option<Instant>,
    pace: Pace,
    rest_until: Instant,
    /// Who committed to nftables since the look before the present one began, and since
    /// that one began; `None`: it does not look at the rules.
    looked_for: Option<Suspects>,
    suspects: Suspects,
    /// Repairs that were due since the last look and had to be left undone.
    withheld: BTreeSet<ActionKind>,
    glass: glass::Watch,
    /// Why the counters can't be trusted to count everything, if so.
    counter_gap: Option<String>,
    guarding: Guarding,
    /// When what is pinned was last loaded because somebody had taken it away.
    pinned_again: Option<Instant>,
    generation: Option<u32>,
    report: Option<Report>,
    cycles: u64,
    cycle_took: Duration,
    drifts: BTreeMap<Facet, u64>,
    repairs: BTreeMap<(ActionKind, RepairOutcome), u64>,
    /// The last repair of this kind that was tried failed, or could not be tried.
    repair_fails: bool,
    audits: Audits,
    canaries: Canaries,
    heart: Heart,
}

/// Facts of the last look.
#[derive(Default)]
struct Seen {
    /// Our table was there.
    table: bool,
    peers: Option<Vec<Peer>>,
    /// What could not be read.
    blind: Vec<Facet>,
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
    links_read: bool,
    /// What was looked for.
    desired: Arc<Desired>,
    replay: Option<Replay>,
    took: Duration,
    cut: Option<anyhow::Result<apply::cut::Cut>>,
}

impl Daemon {
    fn new(desired: Desired, policy_hash: String, places: Places, policy_file: PathBuf) -> Self {
        let config = bpf::CounterConfig::new(&desired.services);
        Self {
            transaction: apply::restoring_transaction(&desired),
            replay: None,
            layout: metrics::Layout::new(&desired),
            eyes: Some(Eyes::new(&places.pin)),
            log: EventLog::open(&places.state),
            history: history::read(&places.state),
            recent: VecDeque::new(),
            seen: Seen::default(),
            front: Front::new(hub_of(&desired)),
            privileges: Privileges::default(),
            heart: Heart::new(&desired, &places.state),
            desired: Arc::new(desired),
            standing: Standing::new(&places, policy_hash.clone()),
            policy_hash,
            policy_file,
            audits: Audits::new(Instant::now()),
            canaries: Canaries::default(),
            places,
            snapshot: None,
            queries: None,
            budget: Arc::default(),
            config,
            counters: None,
            listens: None,
            binds: binds::Keeper::default(),
            bind_events: None,
            program_log: None,
            board: socket::Board::default(),
            uptime: Uptime::start(),
            started: clock::now(),
            wanted: BTreeSet::new(),
            due: None,
            pace: Pace::new(Instant::now()),
            rest_until: Instant::now(),
            looked_for: None,
            suspects: Suspects::default(),
            withheld: BTreeSet::new(),
            glass: glass::Watch::default(),
            counter_gap: None,
            guarding: Guarding::default(),
            pinned_again: None,
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
        self.recent = self.log.tail(EVENTS_SHOWN).into();
        self.stand();
        self.queries = NftQueries::open().map_err(|error| warn("nftables queries", error.into())).ok();
        let verb = [crate::cli::INTERNAL_LOAD.into(), self.places.pin.clone().into_os_string()];
        let loaded = bpf::spawn_loader(&verb, &self.config);
        let failed = loaded.as_ref().err().map(|error| format!("{error:#}"));
        let waits = self.standing.is_on_trial();
        self.guarding = Guarding::start(&self.places.pin, &self.desired, waits, failed);
        if let Err(error) = self.open_counters(loaded) {
            self.counter_gap = Some(format!("the counters do not run: {error:#}"));
            warn("the counters do not run", error);
        }
        self.binds.waits = self.standing.is_on_trial();
        if let Err(error) = self.binds.start(&self.desired, &self.places) {
            self.gap_of_binds(Some(format!("the bind guard does not run: {error:#}")));
        }
        self.bind_events = self.binds.events();
        self.privileges = privileges::confine_daemon();
        for gap in &self.privileges.gaps {
            log::warn!("privileges: {gap}");
        }
        probe::Means::of_this_kernel().lacking().iter().for_each(|lacking| log::info!("{lacking}"));
        self.front.start();
        self.note(EventKind::Started, None, None);
        self.wake(Facet::ALL, Duration::ZERO);
    }

    /// The loader child mounts and loads; this process only opens what it pinned. The
    /// programs' own log needs CAP_SYS_ADMIN to be found, so it is opened before that goes.
    /// Waits on this very thread: there is nothing else to do yet, and a second thread
    /// would keep the capabilities that this one is about to drop.
    fn open_counters(&mut self, loaded: anyhow::Result<()>) -> anyhow::Result<()> {
        let pins = &self.places.pin;
        let counters = match (bpf::Bpf::open(pins)?, loaded) {
            (Some(counters), _) => counters,
            (None, loaded) => loaded.and_then(|()| anyhow::bail!("the loader pinned nothing"))?,
        };
        self.listens = bpf::ListenEvents::open(pins).map_err(|error| warn("listen events", error)).ok();
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
        let mut bind_events = self.bind_events.take();
        if let Some(log) = self.program_log.take() {
            tokio::spawn(log.forward());
        }
        let status = socket::StatusSocket::bind(&self.places.run, lock)?;
        tokio::spawn(status.serve(self.board.clone()));
        let mut tick = tokio::time::interval_at(Instant::now() + TICK, TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut full = tokio::time::interval_at(Instant::now() + FULL_LOOK, FULL_LOOK);
        let mut watchdog = notify::watchdog_interval().map(tokio::time::interval);
        let mut terminate = signal(SignalKind::terminate()).context("wait for SIGTERM")?;
        let mut interrupt = signal(SignalKind::interrupt()).context("wait for SIGINT")?;
        let mut hangup = signal(SignalKind::hangup()).context("wait for SIGHUP")?;
        let mut file = reload::PolicyFile::open(&self.policy_file, self.standing.wanted().to_owned());
        let mut look: Option<JoinHandle<Pass>> = None;
        let (mut greeted, mut greet_by) = (false, None);
        let mut guarded = (Arc::clone(&self.desired), self.standing.is_on_trial());
        let (mut deaf_until, mut deaf_to_binds) = (Instant::now(), Instant::now());
        loop {
            let in_time = |by: Instant| self.canaries.are_in() || by <= Instant::now();
            if !greeted && greet_by.is_some_and(in_time) {
                greeted = true;
                // Who asks now gets an answer, whatever else is to be done.
                self.show();
                self.heart.begin();
                notify::ready();
            }
            // What was asked for during a look rests after it, too.
            let due = self.due.filter(|_| look.is_none()).map(|due| due.max(self.rest_until));
            let stands = (Arc::clone(&self.desired), self.standing.is_on_trial());
            if !Arc::ptr_eq(&stands.0, &guarded.0) || stands.1 != guarded.1 {
                guarded = stands;
                self.renew_guard();
                self.renew_binds();
                bind_events = bind_events.or_else(|| self.binds.events());
            }
            let trial_due = self.trial_due();
            // What to ask from outside is read off the last look. In a fight it would be out of date before it is
            // had; where looks are slow, or asked for all the time, it has its turn when they rest.
            let calm = (look.is_none() && self.withheld.is_empty()).then(|| self.pace.calm_at());
            let in_turn = |due: Option<Instant>, beside: bool| Some(due?.max(calm?)).filter(|_| !beside);
            let ask = in_turn(self.audits.due(), self.canaries.is_under_way());
            let canary = in_turn(self.canaries.due(), self.audits.is_under_way());
            // Whoever waits on the status socket has a turn after each event. Where there is always a next one, this loop
            // would go round 128 times before tokio has it rest: 10 s of a fight on a slow processor.
            tokio::task::yield_now().await;
            // In no order: whoever floods one source must not silence the others.
            tokio::select! {
                event = maybe(commits.as_mut().map(NftEvents::next)) => match event {
                    Ok(event) => self.on_commits(event, &mut commits),
                    Err(error) => {
                        warn("nftables events; looking every 10 s instead", error.into());
                        commits = None;
                    }
                },
                _ = terminate.recv() => return Ok(()),
                _ = interrupt.recv() => return Ok(()),
                pass = maybe(look.as_mut()) => {
                    look = None;
                    // Who did it is known before it is said what was done.
                    if let Some(event) = commits.as_mut().and_then(NftEvents::announced) {
                        self.on_commits(event, &mut commits);
                    }
                    self.finish(pass.context("a look at the host")?);
                    self.listen();
                    // Who waits for us is told when it is known that our controls hold, or don't.
                    greet_by = greet_by.or_else(|| Some(Instant::now() + PROOF));
                }
                call = self.front.next() => match call {
                    Call::Text => self.show(),
                    Call::Listen => {
                        self.listen();
                        self.show();
                    }
                    Call::Confined => self.tell_of_server(),
                },
                // Tells the hub, and never comes back.
                () = self.heart.beat() => {}
                _ = hangup.recv() => self.on_hangup(&mut file),
                () = file.change() => self.on_policy_file(&mut file),
                () = sleep_until(trial_due) => self.on_trial(),
                () = sleep_until(due) => look = self.begin(),
                () = sleep_until(self.glass.ends()) => {
                    self.glass.ended();
                    self.wake([Facet::Nftables], Duration::ZERO);
                }
                () = sleep_until(ask) => self.ask(),
                () = sleep_until(canary) => self.send_canaries(),
                () = sleep_until(greet_by.filter(|_| !greeted)) => {}
                ended = self.canaries.ended() => {
                    let now = Instant::now();
                    let news = self.canaries.take(ended, now);
                    self.repair_fails &= !self.canaries.is_proven_since(Canary::Repair, now);
                    if news {
                        self.wake([Facet::Audit], Duration::ZERO);
                    }
                }
                () = self.audits.ended() => {
                    if self.audits.is_fresh() {
                        self.wake([Facet::Listeners, Facet::Audit], Duration::ZERO);
                    }
                }
                event = maybe(link_events.as_mut().map(links::LinkEvents::next)) => match event {
                    Ok(_) => self.wake(
                        [Facet::Links, Facet::Wireguard, Facet::Tailscale, Facet::Listeners],
                        SETTLE,
                    ),
                    Err(error) => {
                        warn("link events; looking every 10 s instead", error);
                        link_events = None;
                    }
                },
                event = maybe(listens.as_mut().map(|events| after(deaf_until, events.next()))) => match event {
                    Ok(_) => {
                        // Anyone may call listen() a hundred thousand times a second.
                        deaf_until = Instant::now() + SETTLE;
                        self.wake([Facet::Listeners], Duration::from_millis(1));
                    }
                    Err(error) => {
                        warn("listen events; looking every 10 s instead", error.into());
                        listens = None;
                    }
                },
                event = maybe(bind_events.as_mut().map(|events| after(deaf_to_binds, events.next()))) => match event {
                    Ok(actors) => {
                        // Anyone may be refused a hundred thousand times a second.
                        deaf_to_binds = Instant::now() + SETTLE;
                        self.binds.remember(actors);
                        self.wake([Facet::Binds], Duration::from_millis(1));
                    }
                    Err(error) => {
                        warn("bind events; looking every 10 s instead", error.into());
                        bind_events = None;
                    }
                },
                _ = tick.tick() => {
                    file.tick();
                    self.on_tick();
                }
                _ = full.tick() => {
                    self.check_sealed();
                    self.wake(Facet::ALL, Duration::ZERO);
                }
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
        self.wake(
            [Facet::Wireguard, Facet::Tailscale, Facet::Listeners, Facet::Files, Facet::Binds],
            Duration::ZERO,
        );
        // What could not be read may be readable now, and announces that by no event.
        self.wake(self.seen.blind.clone(), Duration::ZERO);
        // Without events, or after one was missed, the generation still tells. A repair
        // that failed is tried again; and on a new day an exception may have ended.
        let generation = self.queries.as_mut().and_then(|queries| queries.generation().ok());
        let own = [Code::FirewallMissing, Code::FirewallChanged];
        let broken =
            self.report.as_ref().is_some_and(|report| report.findings.iter().any(|f| own.contains(&f.code)));
        // Where nft can't list all there is, our own table may still be put right.
        if self.seen.blind.contains(&Facet::Nftables)
            && let Some((finding, outcome)) = self.repair_at_once(false)
        {
            self.record(Finding { by: self.suspects.own(), ..finding }, &outcome);
        }
        if broken || self.repair_fails || generation.is_none() || generation != self.generation {
            self.wake([Facet::Nftables], Duration::ZERO);
        }
        self.settle();
        self.renew_day();
        let links = self.snapshot.as_ref().and_then(|snapshot| snapshot.links.seen()).cloned();
        match self.keep_pins() {
            Some(kept) => self.on_guard(kept),
            None => self.keep_guard(links.as_deref()),
        }
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
            // What never was confirmed does not come in by a change of date.
            Ok(desired) if self.desired.table.is_none() => {
                self.swap(Desired { table: None, guard: None, ..desired })
            }
            Ok(desired) => {
                self.swap(desired);
                self.bring_in_day();
            }
            Err(error) => log::error!("the policy no longer leaves a way in: {error}; the old rules stay"),
        }
    }

    /// At once and by us: that an exception has ended is no drift of anybody's making.
    fn bring_in_day(&mut self) {
        let Ok(Some(_lock)) = self.standing.ledger.try_lock() else { return };
        match apply::apply_table(&self.desired) {
            Ok(Applied::Changed(changes)) => {
                let (policy, today) = (&self.policy_hash, self.desired.today);
                let text =
                    format!("policy {policy} as of {today}: {}", counted(changes.len() as u64, "change"));
                self.note_text(EventKind::PolicyLoaded, text);
                self.close_what_is_closed();
            }
            Ok(_) => {}
            Err(error) => warn("the rules of another day", error.into()),
        }
    }

    /// Keeps another policy, or another day's, from now on. What was counted stays.
    fn swap(&mut self, desired: Desired) {
        self.transaction = apply::restoring_transaction(&desired);
        self.replay = None;
        self.layout = metrics::Layout::new(&desired);
        self.config = bpf::CounterConfig::new(&desired.services);
        self.policy_hash = crate::policy::fingerprint(&desired.policy);
        self.heart.follow(&desired);
        self.desired = Arc::new(desired);
        if let Some(counters) = &mut self.counters
            && let Err(error) = counters.configure(&self.config)
        {
            warn("the counters keep the services before", error);
        }
        // The last text is of the layout before.
        self.show();
        self.wake(Facet::ALL, Duration::ZERO);
    }

    /// The fast path. A commit that touched our table, or events that were lost, are
    /// answered here and now; everything else waits for the next cycle.
    ///
    /// What has been announced meanwhile is taken together: in a fight, an answer to each
    /// commit would be an answer to one of long ago.
    fn on_commits(&mut self, first: NftEvent, commits: &mut Option<NftEvents>) {
        let later = std::iter::from_fn(|| commits.as_mut()?.announced());
        let events: Vec<NftEvent> = std::iter::once(first).chain(later).take(COMMITS_AT_ONCE).collect();
        let (events, of_audits): (Vec<NftEvent>, Vec<NftEvent>) =
            events.into_iter().partition(NftEvent::matters);
        for event in of_audits {
            // The rules are what they were; only the number of the generation is another.
            if self.generation == Some(event.generation.wrapping_sub(1)) {
                self.audits.generation_moved(event.generation.wrapping_sub(1), event.generation);
                self.generation = Some(event.generation);
            }
        }
        if events.is_empty() {
            return;
        }
        self.wake([Facet::Nftables], SETTLE);
        let (mut touched, mut own_touched, mut strangers) = (false, false, Vec::new());
        for event in events {
            // Our own repairs are announced as well, at times after somebody has undone them.
            let ours = |pid: u32| pid == std::process::id() || nft::committed(pid);
            if event.actor.as_ref().is_some_and(|(pid, _)| ours(*pid)) {
                continue;
            }
            touched |= event.own_touched || event.overrun;
            if event.actor.as_ref().is_some_and(|(pid, _)| self.canaries.is_by(*pid)) {
                continue;
            }
            own_touched |= event.own_touched && event.actor.is_some();
            strangers.push(event);
        }
        let repair = touched.then(|| self.repair_at_once(own_touched)).flatten();
        // Who it was is asked after the repair: 100 us decide whether it waits (see Replay).
        let mut by = None;
        let unasked = strangers.len().saturating_sub(STRANGERS_ASKED);
        for (at, event) in strangers.into_iter().enumerate() {
            if event.overrun {
                self.suspects.lose();
                by = None;
            }
            let Some((pid, name)) = event.actor else { continue };
            let actor = if at < unasked { owners::stranger(pid, &name) } else { owners::actor(pid, &name) };
            self.suspects.add(&actor, event.own_touched, event.foreign_touched);
            if event.own_touched {
                by = Some(actor);
            }
        }
        if let Some((mut finding, outcome)) = repair {
            finding.by = by.or_else(|| self.suspects.own());
            self.record(finding, &outcome);
        }
    }

    /// Looks at our table and puts it right, where that can't wait for a cycle. `None`: it
    /// was right, or the cycle has to see to it.
    fn repair_at_once(&mut self, undone: bool) -> Option<(Finding, Outcome)> {
        self.follow();
        let begun = self.uptime.elapsed();
        let (table, queries) = (self.desired.table.as_ref()?, self.queries.as_mut()?);
        let exists = queries.own_table_exists().ok()?;
        // In a fight, and under a flood of changes that change nothing, the cycle tells of
        // it and tries again: it has a pace.
        let spent = lock(&self.budget).wait(ActionKind::ApplyTable, begun).is_some();
        if spent || (exists && self.pace.is_spent(Instant::now())) {
            if undone {
                self.withheld.insert(ActionKind::ApplyTable);
            }
            return None;
        }
        let mut looked = None;
        let (code, found) = if !exists {
            (Code::FirewallMissing, "the table was gone".to_owned())
        } else {
            let listed = apply::Found::look_within(AT_ONCE);
            self.rest_until =
                self.rest_until.max(self.pace.pay(self.uptime.elapsed() - begun, Instant::now()));
            // No change: our own commit, or one that left the table as it should be. An
            // error: the cycle reads it again and says what is wrong.
            let listed = looked.insert(listed.ok()?);
            (Code::FirewallChanged, compare::changes(table, listed.table.as_ref()).first()?.to_string())
        };
        if !lock(&self.budget).take(ActionKind::ApplyTable, begun) {
            return None;
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
            _ => match looked {
                Some(found) => apply::put_in_place(&self.desired, found),
                None => apply::apply_table(&self.desired),
            },
        };
        let took = self.uptime.elapsed() - begun;
        apply::knock(&self.desired);
        let ended = match result {
            Ok(_) => Ended::Done,
            Err(error) => Ended::Failed(format!("{:#}", anyhow::Error::from(error))),
        };
        let subject = format!("table inet {}", crate::desired::TABLE);
        let finding = Finding::new(
            code,
            code.severity(),
            subject,
            "the policy's table",
            found,
            "Nothing: it was repaired.",
        );
        if ended == Ended::Done && self.canaries.is_all_of(&finding) {
            return None;
        }
        Some((finding, Outcome { action: ActionKind::ApplyTable, result: ended, took }))
    }

    /// Counts and logs one repair that was tried.
    fn record(&mut self, finding: Finding, outcome: &Outcome) {
        let facet = finding.facet.unwrap_or(Facet::Nftables);
        *self.drifts.entry(facet).or_default() += 1;
        *self.repairs.entry((outcome.action, RepairOutcome::from(&outcome.result))).or_default() += 1;
        let kind = if let Ended::Failed(error) = &outcome.result {
            self.repair_fails = true;
            log::error!("{} failed: {error}", outcome.action.name());
            EventKind::RepairFailed
        } else {
            self.repair_fails = false;
            if outcome.action == ActionKind::ApplyTable {
                self.close_what_is_closed();
            }
            EventKind::Repaired
        };
        self.note(kind, Some(&finding), Some(outcome.took));
    }

    /// What came in while something was open is ended with the next look.
    fn close_what_is_closed(&mut self) {
        self.glass.closed();
        self.wake([Facet::Nftables, Facet::Links], SETTLE);
    }

    /// Sends the eyes off to the worker thread.
    fn begin(&mut self) -> Option<JoinHandle<Pass>> {
        if self.wanted.contains(&Facet::Links) {
            // Before it is looked at: a new interface is not open for as long as a look takes.
            self.keep_guard(links::read().ok().as_deref());
        }
        self.tell_eyes();
        let eyes = self.eyes.take()?;
        self.due = None;
        let facets: Vec<Facet> = std::mem::take(&mut self.wanted).into_iter().collect();
        if facets.contains(&Facet::Nftables) {
            self.looked_for = Some(std::mem::take(&mut self.suspects).looked_for());
        }
        self.follow();
        let (desired, mut snapshot) = (Arc::clone(&self.desired), self.snapshot.take());
        if let Some(snapshot) = &mut snapshot {
            self.audits.tell(snapshot);
            if let Reading::Seen(rules) = &mut snapshot.nftables {
                self.glass.count_down(rules, Instant::now());
            }
        }
        let (budget, uptime) = (Arc::clone(&self.budget), self.uptime);
        let (gap, replay) = (self.counter_gap.clone(), self.replay.is_none());
        let cut = facets.contains(&Facet::Nftables) && self.glass.take_cut(self.standing.is_on_trial());
        let (ledger, glance) = (self.standing.ledger.clone(), self.standing.glance.clone());
        Some(tokio::task::spawn_blocking(move || {
            // Rules that went on trial, or back, during the look are not to be repaired by it.
            let stands = || ledger.glance().is_ok_and(|now| now == glance);
            let mut pass = cycle(eyes, &desired, snapshot, &facets, gap, &budget, uptime, &stands);
            if replay {
                pass.replay = capture(&desired, &pass);
            }
            let begun = uptime.elapsed();
            pass.cut = (cut && stands()).then(|| glass::cut(&desired, &pass.snapshot)).flatten();
            pass.took += uptime.elapsed() - begun;
            pass
        }))
    }

    /// What no look can see for itself.
    fn tell_eyes(&mut self) {
        let Some(eyes) = &mut self.eyes else { return };
        eyes.guard_gap.clone_from(&self.guarding.gap);
        eyes.binds_gap.clone_from(&self.binds.gap);
    }

    /// Asks from outside what is due.
    fn ask(&mut self) {
        let Some(snapshot) = &self.snapshot else { return };
        let run_dir = &self.places.run;
        self.audits.begin(&self.desired, snapshot, self.generation, run_dir, Instant::now(), self.uptime);
    }

    /// Tries whether the controls hold that should.
    fn send_canaries(&mut self) {
        let Some(snapshot) = &self.snapshot else { return };
        // In a fight, a repair that is withheld proves nothing.
        let spent = lock(&self.budget).wait(ActionKind::ApplyTable, self.uptime.elapsed()).is_some();
        let asked = self.canaries_asked();
        let asked = canary::Asked { repair: asked.repair && !spent, ..asked };
        self.canaries.begin(&self.desired, snapshot, &self.places, asked, Instant::now());
    }

    /// Those that are in force as far as reading back tells. What is not is told of anyway.
    fn canaries_asked(&self) -> canary::Asked {
        let enforces = self.desired.policy.enforce.mode == Mode::Enforce && !self.standing.is_on_trial();
        let table = self.desired.table.is_some();
        canary::Asked {
            firewall: table,
            guard: enforces && self.guarding.holds(),
            counters: self.counters.is_some(),
            repair: table,
        }
    }

    fn finish(&mut self, pass: Pass) {
        let (links_read, rules_read) = (pass.links_read, pass.generation.is_some());
        let Pass {
            eyes,
            snapshot,
            mut assessment,
            repaired,
            mut plan,
            generation,
            desired,
            replay,
            took,
            cut,
            ..
        } = pass;
        let now = snapshot.at;
        if !Arc::ptr_eq(&desired, &self.desired) {
            // Other rules came to stand during the look: the same host, judged by those. What
            // it repaired, if anything, was by the old ones, so the rules are read again.
            plan = repair::Plan::default();
            assessment = diff::assess(&self.desired, &snapshot, now);
            self.wake(Facet::ALL, Duration::ZERO);
        } else {
            self.replay = self.replay.take().or(replay);
        }
        assessment.extend(self.standing.findings(&self.policy_file, &self.policy_hash));
        self.canaries.tell(&mut assessment);
        self.eyes = Some(eyes);
        self.generation = generation.or(self.generation);
        self.cycles += 1;
        self.cycle_took = took;
        self.rest_until = self.rest_until.max(self.pace.pay(took, Instant::now()));
        let looked_for = self.looked_for.take();
        let looked = looked_for.is_some();
        let mut suspects = looked_for.unwrap_or_default();
        suspects.merge(&self.suspects);
        if looked && snapshot.nftables.seen().is_none() {
            self.suspects = suspects.unseen();
        }
        // A repair now and then is no peace: between two of them it was withheld.
        self.withheld.extend(plan.withheld.drain(..));
        plan.withheld.extend(std::mem::take(&mut self.withheld));
        for (mut finding, outcome) in repaired {
            if outcome.result == Ended::Done && self.canaries.is_all_of(&finding) {
                continue;
            }
            finding.by = finding.by.or_else(|| suspects.of(finding.code));
            self.record(finding.clone(), &outcome);
            let stands =
                assessment.findings.iter().any(|f| repair::repaired_by(f.code) == Some(outcome.action));
            if plan.withheld.contains(&outcome.action) && !stands {
                assessment.findings.push(finding);
            }
        }
        for kind in &plan.withheld {
            *self.repairs.entry((*kind, RepairOutcome::Withheld)).or_default() += 1;
            let wait = lock(&self.budget).wait(*kind, self.uptime.elapsed());
            let facet = match kind {
                ActionKind::ApplyTable => Facet::Nftables,
                ActionKind::SetKeepalive => Facet::Wireguard,
            };
            if let Some(wait) = wait {
                self.wake([facet], wait);
            }
        }
        self.binds.name(&mut assessment.findings);
        suspects.tell_who_blinds(snapshot.nftables.gap(), &mut assessment.findings);
        for finding in assessment.findings.iter_mut().filter(|finding| finding.by.is_none()) {
            // What stood before in the same words was not caused by whoever came since.
            let suspect = suspects.of(finding.code);
            let ours = repair::repaired_by(finding.code) == Some(ActionKind::ApplyTable);
            finding.by = match self.history.history.known(finding) {
                // Whoever touches our table while it is wrong keeps it wrong.
                Some(_) if ours && suspect.is_some() => suspect,
                Some(known) if known.by.is_some() || known.found == finding.found => known.by.clone(),
                _ => suspect,
            };
        }
        repair::tell_of_withheld(&mut assessment.findings, &plan, &lock(&self.budget), self.uptime.elapsed());
        let transitions = self.history.history.update(&mut assessment.findings, &snapshot, now);
        for transition in &transitions {
            match transition {
                Transition::Appeared { finding } | Transition::Changed { finding, .. } => {
                    if let (true, Some(facet)) = (finding.is_drift(), finding.facet) {
                        *self.drifts.entry(facet).or_default() += 1;
                    }
                    let kind = glass::beginning(finding).unwrap_or(EventKind::DriftAppeared);
                    self.note(kind, Some(finding), None);
                }
                Transition::Cleared { finding } => {
                    let kind = self.glass.end(finding, now, Instant::now());
                    if kind.is_some() {
                        self.close_what_is_closed();
                    }
                    let by = suspects.own().filter(|_| kind == Some(EventKind::Closed));
                    let finding = Finding { by: by.or_else(|| finding.by.clone()), ..finding.clone() };
                    self.note(kind.unwrap_or(EventKind::DriftCleared), Some(&finding), None);
                }
            }
        }
        if rules_read && snapshot.nftables.seen().is_some() {
            let open = diff::glass::openings(&snapshot);
            for opening in self.glass.look(open, now, Instant::now()) {
                let again = assessment.findings.iter().find(|f| f.subject == opening.to_string());
                self.note(EventKind::Opened, again, None);
            }
        }
        match cut {
            Some(Ok(cut)) if !cut.is_nothing() => self.note_text(EventKind::Cut, cut.to_string()),
            Some(Err(error)) => warn("what is closed now could not be cut", error),
            _ => {}
        }
        if !transitions.is_empty()
            && let Err(error) = self.history.write(&self.places.state)
        {
            log::debug!("first-seen history: {error:#}");
        }
        if links_read || self.counter_gap.is_some() {
            self.count_on(&snapshot);
        }
        self.keep_binds(&snapshot, links_read);
        self.seen = Seen {
            table: snapshot
                .nftables
                .seen()
                .is_some_and(|r| r.table(TableFamily::Inet, crate::desired::TABLE).is_some()),
            peers: snapshot.wireguard.seen().and_then(Option::as_ref).map(|device| device.peers.clone()),
            blind: Facet::ALL.into_iter().filter(|facet| snapshot.gap(*facet).is_some()).collect(),
        };
        let (proof, disputed) = (assessment.proof.take(), std::mem::take(&mut assessment.disputed));
        self.audits.looked(&self.desired, &snapshot, self.generation, proof, disputed, Instant::now());
        self.canaries.looked(&self.desired, &snapshot, self.canaries_asked(), Instant::now());
        let report = Report::new(&self.desired, &snapshot, assessment, now);
        notify::status(&headline(&report));
        self.heart.looked(&report, &snapshot);
        self.snapshot = Some(snapshot);
        self.report = Some(report);
        self.front.beat(TICK);
        self.post();
        // Large listings come and go; a quiet look leaves nothing to give back.
        if rules_read {
            memory::trim();
        }
        if self.cycles == 1
            && let Err(error) = memory::drop_start_up_code()
        {
            log::debug!("start-up code stays in memory: {error}");
        }
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
        let failed: Vec<String> = counters.sync(&wanted).iter().map(|error| format!("{error:#}")).collect();
        let gap =
            (!failed.is_empty()).then(|| format!("not every interface is counted: {}", failed.join("; ")));
        if gap != self.counter_gap {
            self.counter_gap = gap;
            self.wake([Facet::Counters], Duration::ZERO);
        }
    }

    /// The bind guard learns of the interfaces that are there now, and is tried.
    fn keep_binds(&mut self, snapshot: &Snapshot, links_read: bool) {
        let mut told = Ok(());
        if let (true, Reading::Seen(links)) = (links_read, &snapshot.links) {
            told = self.binds.configure(&self.desired, Some(links));
        }
        match told.and_then(|()| self.binds.keep()) {
            Ok(put_back) => {
                if put_back {
                    log::warn!("the bind guard had been taken off, and is back");
                    self.wake([Facet::Binds], Duration::ZERO);
                }
                // Why it could not be loaded stays true until the daemon starts again.
                if self.binds.runs() {
                    self.gap_of_binds(None);
                }
            }
            Err(error) => self.gap_of_binds(Some(format!("{error:#}"))),
        }
    }

    /// Why binds are not refused as they should be. Told once.
    fn gap_of_binds(&mut self, gap: Option<String>) {
        if self.binds.gap != gap {
            if let Some(gap) = &gap {
                log::warn!("{gap}");
            }
            self.binds.gap = gap;
            self.wake([Facet::Binds], Duration::ZERO);
        }
    }

    /// The guard has no events: it is looked at, and put right, at every tick.
    fn keep_guard(&mut self, links: Option<&[Link]>) {
        let (Some(rules), Some(links)) = (&self.desired.guard, links) else { return };
        let before = self.guarding.told();
        let mut kept = self.guarding.keep(rules, links, self.standing.is_on_trial());
        // What it was last seen on is not what it is on.
        if self.guarding.told() != before {
            self.wake([Facet::Counters], Duration::ZERO);
        }
        // Somebody took the pins away: what we hold of it can't be attached again.
        if let Kept::Failed(_) = kept
            && let Some(again) = self.keep_pins()
        {
            kept = again;
        }
        self.on_guard(kept);
    }

    /// The same for binds, which a reload may also have turned on.
    fn renew_binds(&mut self) {
        self.binds.waits = self.standing.is_on_trial();
        let renewed = if self.binds.runs() == self.desired.policy.enforce.binds {
            self.binds.configure(&self.desired, None)
        } else {
            self.binds.start(&self.desired, &self.places)
        };
        self.gap_of_binds(renewed.err().map(|error| format!("the bind guard does not run: {error:#}")));
        self.wake([Facet::Links, Facet::Binds], Duration::ZERO);
    }

    /// Other rules stand than before, or the same ones more firmly.
    fn renew_guard(&mut self) {
        let failed = match (&self.desired.guard, self.guarding.runs()) {
            (Some(_), true) => {
                let links = links::read().map_err(|error| warn("interfaces for the tc guard", error)).ok();
                return self.keep_guard(links.as_deref());
            }
            // What stood before any policy was confirmed needs none, and is let in by one on trial.
            (None, _) if self.desired.policy.enforce.firewall => return,
            (None, _) => None,
            (Some(_), false) => {
                bpf::guard::spawn_loader(&self.places.pin).err().map(|error| format!("{error:#}"))
            }
        };
        let waits = self.standing.is_on_trial();
        self.guarding = Guarding::start(&self.places.pin, &self.desired, waits, failed);
        self.wake([Facet::Counters], Duration::ZERO);
    }

    fn on_guard(&mut self, kept: Kept) {
        let (kind, found) = match kept {
            Kept::Sound => return,
            Kept::Restored(found) => {
                self.canaries.doubt(Instant::now());
                (EventKind::Repaired, found)
            }
            Kept::Failed(why) => {
                log::debug!("the tc guard: {why}");
                return self.wake([Facet::Counters], Duration::ZERO);
            }
        };
        let finding = Finding::new(
            Code::GuardMissing,
            Code::GuardMissing.severity(),
            "tc guard",
            "the policy's rules, on every public interface",
            found,
            "Nothing: it was repaired.",
        );
        *self.drifts.entry(Facet::Counters).or_default() += 1;
        self.note(kind, Some(&finding), None);
        self.wake([Facet::Counters], Duration::ZERO);
    }

    /// The metrics server on every mesh address, present or not.
    fn listen(&mut self) {
        let policy = &self.desired.policy;
        self.front.serve_only(hub_of(&self.desired));
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
        for (address, error) in self.front.listen_on(&wanted) {
            let level = if self.front.tries_again(&error) { log::Level::Debug } else { log::Level::Warn };
            log::log!(level, "metrics on {address}: {error}");
        }
    }

    /// Makes the text that a scrape gets.
    fn show(&mut self) {
        let Some(report) = &self.report else { return };
        let counters = self.counters.as_ref().and_then(|counters| match counters.read(&self.config) {
            Reading::Seen(counters) => Some(counters),
            Reading::Blind(_) => None,
        });
        let mut drops = nft_counters::read().ok();
        if let Some(drops) = &mut drops {
            self.guarding.add_to(drops);
        }
        let audit = self.audits.metrics();
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
            binds: self.binds.tally(),
            peers: self.seen.peers.as_deref(),
            audit: audit.as_ref(),
            openings: self.glass.count(),
            openings_end: self.glass.last_end(),
            on_trial: self.standing.is_on_trial(),
            cycles: self.cycles,
            cycle_seconds: self.cycle_took.as_secs_f64(),
            resident_bytes: self.resident_bytes(),
            http_rejects: self.front.rejects(),
            heartbeat: &self.heart.tally(),
        };
        self.front.set(metrics::render(&state, &self.layout));
    }

    /// Ours and the server's, what they share twice.
    fn resident_bytes(&self) -> Option<u64> {
        let servers = self.front.pid().and_then(|pid| memory::resident_bytes_of(pid).ok());
        Some(memory::resident_bytes().ok()?.saturating_add(servers.unwrap_or_default()))
    }

    /// What holds the metrics server in, and what does not.
    fn tell_of_server(&mut self) {
        for gap in self.front.confinement().iter().flat_map(|confinement| &confinement.gaps) {
            log::warn!("metrics server: {gap}");
        }
        self.post();
    }

    /// The controls that are as declared at the last look, and did what they are there for when
    /// they were last tried.
    fn enforced(&self, report: &Report, counters: Option<&crate::observed::Counters>) -> BTreeSet<Control> {
        let enforce = &self.desired.policy.enforce;
        let stands = |codes: &[Code]| report.findings.iter().any(|f| codes.contains(&f.code));
        let blind = |facet| report.blind.iter().any(|blind| blind.facet == facet);
        let now = Instant::now();
        let proven = |canary| self.canaries.holds(canary, now);
        let mut held = BTreeSet::new();
        if self.desired.table.is_some()
            && enforce.mode == Mode::Enforce
            && self.seen.table
            && !stands(&[Code::FirewallMissing, Code::FirewallChanged])
            && proven(Canary::Firewall)
        {
            held.insert(Control::Firewall);
        }
        if enforce.mode == Mode::Enforce && self.guarding.holds() && proven(Canary::Guard) {
            held.insert(Control::Guard);
        }
        // Where there is no tunnel of ours or no peer, nothing is kept alive.
        if enforce.keepalive
            && enforce.mode == Mode::Enforce
            && self.desired.policy.mesh.keepalive.is_some()
            && self.seen.peers.as_ref().is_some_and(|peers| !peers.is_empty())
            && !blind(Facet::Wireguard)
            && !stands(&[Code::MeshKeepalive, Code::MeshMissing])
        {
            held.insert(Control::Keepalive);
        }
        if self.binds.holds() {
            held.insert(Control::Binds);
        }
        if counters.is_some_and(|counters| !counters.attached.is_empty()) && proven(Canary::Counters) {
            held.insert(Control::Counters);
        }
        // Where the policy has no table of ours, there is none to be repaired.
        let repairs = self.desired.table.is_none() || proven(Canary::Repair);
        if repairs && !self.repair_fails && !blind(Facet::Nftables) && self.queries.is_some() {
            held.insert(Control::Repair);
        }
        if self.privileges.with(self.front.confinement().cloned()).proven {
            held.insert(Control::Privileges);
        }
        held
    }

    /// Leaves the answer to `status`.
    fn post(&mut self) {
        let Some(report) = self.report.clone() else { return };
        let done = |(key, count): (&(ActionKind, RepairOutcome), &u64)| {
            (key.1 == RepairOutcome::Done).then_some(*count)
        };
        let (rules, until) = self.standing.state();
        let daemon = socket::Daemon {
            file: Some(self.policy_file.clone()),
            rules,
            until,
            before: self.standing.before().map(str::to_owned),
            pid: std::process::id(),
            started: self.started,
            mode: self.desired.policy.enforce.mode,
            policy: self.policy_hash.clone(),
            cycle: self.cycles,
            last_cycle_seconds: self.cycle_took.as_secs_f64(),
            repairs: self.repairs.iter().filter_map(done).sum(),
            guard: self.guarding.told(),
            audit: self.audits.last(),
            events: self.recent.iter().cloned().collect(),
            privileges: self.privileges.with(self.front.confinement().cloned()),
        };
        if let Err(error) = self.board.set(&socket::Status { report, daemon }) {
            log::warn!("status: {error}");
        }
    }

    /// One line in the event log and one in the journal.
    fn note(&mut self, kind: EventKind, finding: Option<&Finding>, took: Option<Duration>) {
        finding.into_iter().for_each(|finding| self.heart.note(kind, finding));
        self.enter(Event {
            at: clock::now(),
            kind,
            code: finding.map(|f| f.code),
            subject: finding.map_or_else(|| self.desired.policy.node.name.clone(), |f| f.subject.clone()),
            found: finding.map_or_else(String::new, |f| f.found.clone()),
            by: finding.and_then(|f| f.by.clone()),
            took_ms: took.map(|took| u64::try_from(took.as_millis()).unwrap_or(u64::MAX)),
            cycle: self.cycles,
        });
    }

    /// The same of something that no finding tells.
    fn note_text(&mut self, kind: EventKind, found: String) {
        let subject = self.desired.policy.node.name.clone();
        self.enter(Event {
            at: clock::now(),
            kind,
            code: None,
            subject,
            found,
            by: None,
            took_ms: None,
            cycle: self.cycles,
        });
    }

    fn enter(&mut self, event: Event) {
        if !journal::tell(&event) {
            log::info!("{}", event.to_line());
        }
        if self.recent.len() >= EVENTS_SHOWN {
            self.recent.pop_front();
        }
        self.recent.push_back(event.clone());
        if let Err(error) = self.log.append(event) {
            log::warn!("event log in {}: {error}; kept in memory", self.places.state.display());
        }
        self.post();
    }
}

/// One cycle: look, decide, repair, look again at what was touched, decide again.
#[allow(clippy::too_many_arguments)]
fn cycle(
    mut eyes: Eyes,
    desired: &Arc<Desired>,
    before: Option<Snapshot>,
    facets: &[Facet],
    counter_gap: Option<String>,
    budget: &Mutex<Budget>,
    uptime: Uptime,
    stands: &dyn Fn() -> bool,
) -> Pass {
    let begun = uptime.elapsed();
    let now = clock::now();
    let looked_at_rules = before.is_none() || facets.contains(&Facet::Nftables);
    let links_read = before.is_none() || facets.contains(&Facet::Links);
    // Read before the look: a commit during the look shows as a newer generation, and the
    // next tick looks again.
    let mut generation = generation(looked_at_rules);
    let mut snapshot = match before {
        Some(before) => {
            let port = desired.policy.ssh.port;
            let sshd = ssh_listeners(&before, port);
            let after = eyes.look_again(desired, before, facets, now);
            // Another sshd, or the same one elsewhere, may say something else of itself.
            let changed = ssh_listeners(&after, port) != sshd;
            if changed { eyes.look_again(desired, after, &[Facet::Sshd], now) } else { after }
        }
        None => eyes.look(desired, now),
    };
    if let Some(gap) = counter_gap {
        snapshot.counters = Reading::blind(gap);
    }
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
        if matches!(action, Action::ApplyTable) && !stands() {
            continue;
        }
        let Some(outcome) = execute(desired, &snapshot, action, uptime) else { continue };
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
    Pass {
        eyes,
        snapshot,
        assessment,
        repaired,
        plan,
        generation,
        links_read,
        desired: Arc::clone(desired),
        replay: None,
        took,
        cut: None,
    }
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

/// Who listens where on sshd's port.
fn ssh_listeners(snapshot: &Snapshot, port: Port) -> Option<Vec<(IpAddr, Option<u32>)>> {
    let on_port = snapshot.listeners.seen()?.iter().filter(|l| l.port == port && l.proto == Proto::Tcp);
    Some(on_port.map(|l| (l.address, l.owner.as_ref().map(|owner| owner.pid))).collect())
}

fn generation(wanted: bool) -> Option<u32> {
    if !wanted {
        return None;
    }
    NftQueries::open().and_then(|mut queries| queries.generation()).ok()
}

/// `None`: the fast path was faster, and there was nothing left to do.
fn execute(desired: &Desired, snapshot: &Snapshot, action: &Action, uptime: Uptime) -> Option<Outcome> {
    let begun = uptime.elapsed();
    let result = match action {
        Action::ApplyTable => match apply::apply_table(desired) {
            Ok(Applied::Unchanged | Applied::NotWanted) => return None,
            result => result.map(drop).map_err(anyhow::Error::from),
        },
        Action::SetKeepalive { peer, seconds, .. } => match &snapshot.wireguard {
            Reading::Seen(Some(device)) => wireguard::set_keepalive(device, *peer, *seconds),
            _ => Err(anyhow::anyhow!("the tunnel is gone")),
        },
    };
    let result = match result {
        Ok(()) => Ended::Done,
        Err(error) => Ended::Failed(format!("{error:#}")),
    };
    Some(Outcome { action: action.kind(), result, took: uptime.elapsed() - begun })
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
    let open = report.findings.iter().filter(|finding| finding.is_drift()).count();
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

/// What comes, but not before.
async fn after<F: Future>(moment: Instant, future: F) -> F::Output {
    tokio::time::sleep_until(moment).await;
    future.await
}

async fn sleep_until(due: Option<Instant>) {
    match due {
        Some(due) => tokio::time::sleep_until(due).await,
        None => std::future::pending().await,
    }
}
