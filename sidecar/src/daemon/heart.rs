//! When the hub is told what, and what came of it.
//!
//! A beat follows from a completed cycle: a daemon whose cycles don't end falls silent. Nothing
//! here is waited for by what enforces. Measuring is done by a thread, since files may
//! lie on a share that hangs; speaking to the hub by a process of its own ([`super::sender`]).
//! What is to be told and can't be waits in an [`Outbox`], and on the disk ([`Keeping`]).

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep_until};

use super::eventlog::EventKind;
use super::keeping::Keeping;
use super::sender::{Answer, Errand, PATIENCE};
use crate::cli::INTERNAL_SEND;
use crate::desired::Desired;
use crate::diff::Finding;
use crate::heartbeat::host::CpuTimes;
use crate::heartbeat::kuma::Monitor;
use crate::heartbeat::ntfy::Topic;
use crate::heartbeat::{Kept, Notice, NoticeKind, Notices, Outbox, Payload, Reply, Tally, Target};
use crate::observed::Snapshot;
use crate::policy::Heartbeat;
use crate::report::Report;
use crate::source::outside::{Dropped, ask_child};
use crate::source::ping::Ping;
use crate::source::vitals::{self, Measured, Wanted};
use crate::sys::clock;
use crate::terms::{Port, Proto, printable};

/// A cycle that ended longer ago than this, and than the time between two beats, is no sign of life.
const CYCLE_AGE_MAX: Duration = Duration::from_secs(30);
/// A thread that measures takes some milliseconds, and a second where the hub doesn't answer a ping.
const MEASURED_WITHIN: Duration = Duration::from_secs(5);
/// A certificate is renewed days before its end.
const CERTIFICATE: Duration = Duration::from_secs(600);
/// The same trouble is told this often.
const REMIND: Duration = Duration::from_secs(3600);
const HTTPS: u16 = 443;

type Asked = JoinHandle<anyhow::Result<Answer>>;

pub(super) struct Heart {
    policy: Heartbeat,
    node: String,
    ping: Option<Arc<Ping>>,
    /// What the clocks of notices and outbox count from.
    start: Instant,
    /// Of the last cycle: what it came to, and when it ended.
    report: Option<Report>,
    cycle: Option<Instant>,
    /// When the next beat is due, once there are any.
    due: Option<Instant>,
    measuring: Option<(oneshot::Receiver<Box<Measured>>, Instant)>,
    /// A thread that has not come back in time.
    hangs: Option<oneshot::Receiver<Box<Measured>>>,
    times: Option<CpuTimes>,
    monitor: Option<Monitor>,
    topic: Option<Topic>,
    /// Where our own port 443 answers; when its certificate ends, and when to ask again.
    https: Option<IpAddr>,
    ends: Option<i64>,
    ask_again: Instant,
    asking: Option<Asked>,
    beating: Option<Asked>,
    posting: Option<(Asked, usize)>,
    notices: Notices,
    outbox: Outbox,
    keeping: Keeping,
    sent: BTreeMap<(Target, crate::heartbeat::Outcome), u64>,
    accepted: Option<Instant>,
    troubles: BTreeMap<&'static str, Trouble>,
}

/// What was told last of one of our concerns, and when.
struct Trouble {
    text: String,
    at: Instant,
}

/// What [`Heart::beat`] waits for.
enum Pulse {
    Due,
    Measured(Option<Box<Measured>>),
    CameBack,
    Beaten(anyhow::Result<Answer>),
    Posted(anyhow::Result<Answer>),
    Certified(anyhow::Result<Answer>),
    Kept(std::io::Result<()>),
    Outbox,
    Ripe,
}

impl Heart {
    /// To be made while raw sockets may still be. Tells nothing before [`Self::begin`].
    pub fn new(desired: &Desired, state: &Path) -> Self {
        let now = Instant::now();
        let mut heart = Self {
            policy: Heartbeat::default(),
            node: String::new(),
            ping: None,
            start: now,
            report: None,
            cycle: None,
            due: None,
            measuring: None,
            hangs: None,
            times: None,
            monitor: None,
            topic: None,
            https: None,
            ends: None,
            ask_again: now,
            asking: None,
            beating: None,
            posting: None,
            notices: Notices::default(),
            outbox: Outbox::default(),
            keeping: Keeping::new(state),
            sent: BTreeMap::new(),
            accepted: None,
            troubles: BTreeMap::new(),
        };
        heart.follow(desired);
        heart.restore();
        heart
    }

    /// What an earlier process could not tell any more is told late. Only the wall clock has gone on
    /// meanwhile, and it may have been set: how late is no more than a hint.
    fn restore(&mut self) {
        if self.policy.ntfy_url_file.is_none() {
            return self.keeping.forget();
        }
        let Kept { waiting, wrong, .. } = self.keeping.read().unwrap_or_else(|error| {
            log::warn!("notices that waited are lost: {error}");
            Kept::default()
        });
        if !waiting.is_empty() {
            log::info!("{} notices waited over the restart", waiting.len());
        }
        let (now, date) = (self.now(), clock::now());
        for notice in waiting {
            let waited = Duration::from_secs(date.seconds_since(notice.at));
            self.outbox.restore(notice, waited, now);
        }
        wrong.into_iter().for_each(|wrong| self.notices.restore(wrong, now));
    }

    fn keep(&mut self) {
        self.keeping.keep(Kept::of(&self.outbox, &self.notices));
    }

    /// Does as another policy says from now on.
    pub fn follow(&mut self, desired: &Desired) {
        let policy = &desired.policy;
        if self.policy != policy.heartbeat {
            self.policy = policy.heartbeat.clone();
            (self.monitor, self.topic, self.ends) = (None, None, None);
            self.ask_again = Instant::now();
            self.due = self.due.map(|_| Instant::now());
        }
        self.node = printable(&policy.node.name, 64);
        let hub = policy.mesh.hub.as_ref().and_then(|hub| hub.address.first().copied());
        if self.ping.as_ref().map(|ping| ping.to()) != hub {
            let open = |hub| Ping::open(hub).map_err(|error| log::debug!("echo to the hub: {error}"));
            self.ping = hub.filter(|_| self.tells()).and_then(|hub| open(hub).ok()).map(Arc::new);
        }
    }

    fn tells(&self) -> bool {
        let Heartbeat { kuma_url_file, ntfy_url_file, status_file, .. } = &self.policy;
        kuma_url_file.is_some() || ntfy_url_file.is_some() || status_file.is_some()
    }

    /// Beats from now on.
    pub fn begin(&mut self) {
        self.due = Some(Instant::now());
    }

    /// A cycle has ended well.
    pub fn looked(&mut self, report: &Report, snapshot: &Snapshot) {
        self.cycle = Some(Instant::now());
        if self.tells() {
            self.report = Some(report.clone());
            let listeners = snapshot.listeners.seen().into_iter().flatten();
            let https = listeners.filter(|l| l.proto == Proto::Tcp && Port::new(HTTPS) == Some(l.port));
            self.https = vitals::own_https(https.map(|listener| listener.address));
        }
    }

    /// Something that people may want to know happened to a finding.
    pub fn note(&mut self, kind: EventKind, finding: &Finding) {
        let kind = match kind {
            EventKind::DriftAppeared => NoticeKind::Appeared,
            EventKind::DriftCleared => NoticeKind::Recovered,
            EventKind::Repaired => NoticeKind::Repaired,
            EventKind::RepairFailed => NoticeKind::RepairFailed,
            _ => return,
        };
        // What is accepted, or merely worth knowing, wakes nobody; nor does its end.
        if self.policy.ntfy_url_file.is_none() || !finding.is_drift() {
            return;
        }
        let notice = Notice {
            at: clock::now(),
            kind,
            code: finding.code,
            severity: finding.severity,
            subject: finding.subject.clone(),
            found: finding.found.clone(),
            by: finding.by.clone(),
            unspoken: 0,
        };
        let now = self.now();
        if let Some(notice) = self.notices.note(notice, now) {
            self.outbox.push(notice, now);
        }
        self.keep();
    }

    pub fn tally(&self) -> Tally {
        let named = [(Target::Kuma, &self.policy.kuma_url_file), (Target::Ntfy, &self.policy.ntfy_url_file)];
        Tally {
            told: named.into_iter().filter(|(_, file)| file.is_some()).map(|(target, _)| target).collect(),
            sent: self.sent.clone(),
            age: self.accepted.map(|at| at.elapsed()),
            queue: self.outbox.waiting() as u64,
            dropped: self.outbox.dropped(),
            certificate_ends: self.ends,
        }
    }

    fn now(&self) -> Duration {
        self.start.elapsed()
    }

    /// Does all that is to be done, for ever. Cancel safe: what is under way is kept by `self`.
    pub async fn beat(&mut self) {
        loop {
            let pulse = self.pulse().await;
            self.act(pulse);
            self.keep();
        }
    }

    async fn pulse(&mut self) -> Pulse {
        let alive = self.is_alive();
        let beat = self.due.filter(|_| alive && self.tells() && self.measuring.is_none());
        let idle = self.posting.is_none() && self.topic.is_some();
        let post = self.outbox.due().filter(|_| idle).map(|due| self.start + due);
        let ripe = self.notices.due().map(|due| self.start + due);
        let within = self.measuring.as_ref().map(|(_, since)| *since + MEASURED_WITHIN);
        tokio::select! {
            () = until(beat) => Pulse::Due,
            measured = come(self.measuring.as_mut().map(|(measured, _)| measured)) => Pulse::Measured(measured),
            () = until(within) => Pulse::Measured(None),
            _ = come(self.hangs.as_mut()) => Pulse::CameBack,
            answer = ended(self.beating.as_mut()) => Pulse::Beaten(answer),
            answer = ended(self.posting.as_mut().map(|(asked, _)| asked)) => Pulse::Posted(answer),
            answer = ended(self.asking.as_mut()) => Pulse::Certified(answer),
            kept = self.keeping.done() => Pulse::Kept(kept),
            () = until(post) => Pulse::Outbox,
            () = until(ripe) => Pulse::Ripe,
        }
    }

    /// A cycle has ended not long ago.
    fn is_alive(&self) -> bool {
        self.cycle.is_some_and(|at| at.elapsed() <= CYCLE_AGE_MAX.max(self.policy.every))
    }

    fn act(&mut self, pulse: Pulse) {
        match pulse {
            Pulse::Due => self.measure(),
            Pulse::Measured(measured) => {
                let measuring = self.measuring.take();
                match measured {
                    Some(measured) => self.tell(*measured),
                    None => {
                        self.hangs = measuring.map(|(receiver, _)| receiver);
                        self.tell_unmeasured();
                    }
                }
            }
            Pulse::CameBack => self.hangs = None,
            Pulse::Beaten(answer) => {
                self.beating = None;
                let reply = self.replies(answer).first().copied().unwrap_or(Reply::Broken);
                if reply == Reply::Accepted {
                    self.accepted = Some(Instant::now());
                }
                self.count(Target::Kuma, reply);
            }
            Pulse::Posted(answer) => {
                let asked = self.posting.take().map_or(0, |(_, asked)| asked);
                let replies = self.replies(answer);
                let now = self.now();
                self.outbox.told(&replies, now);
                for reply in replies.iter().take(asked) {
                    self.count(Target::Ntfy, *reply);
                }
                if replies.is_empty() {
                    self.count(Target::Ntfy, Reply::Broken);
                }
            }
            Pulse::Certified(answer) => {
                self.asking = None;
                self.ends = answer.ok().and_then(|answer| answer.ends);
            }
            Pulse::Kept(kept) => {
                let error = self.keeping.ended(kept).err();
                self.trouble("notices", error, "disk");
            }
            Pulse::Outbox => self.post(),
            Pulse::Ripe => {
                let now = self.now();
                for notice in self.notices.ripe(now) {
                    self.outbox.push(notice, now);
                }
            }
        }
    }

    fn measure(&mut self) {
        let now = Instant::now();
        // In step, and not in bursts after a pause.
        self.due = self.due.map(|due| {
            if due + self.policy.every > now { due + self.policy.every } else { now + self.policy.every }
        });
        let Some(report) = self.report.clone() else { return };
        if self.hangs.is_some() {
            return self.tell_unmeasured();
        }
        let wanted = Wanted {
            heartbeat: self.policy.clone(),
            report,
            before: self.times,
            certificate_ends: self.ends,
            ping: self.ping.clone(),
        };
        let (tell, told) = oneshot::channel();
        // Not one of the runtime's: an end of the daemon waits for those.
        let thread = std::thread::Builder::new().name("vitals".into());
        match thread.spawn(move || drop(tell.send(Box::new(vitals::measure(&wanted))))) {
            Ok(_) => self.measuring = Some((told, now)),
            Err(error) => {
                log::debug!("a thread that measures: {error}");
                self.tell_unmeasured();
            }
        }
    }

    fn tell(&mut self, measured: Measured) {
        let Measured { payload, gaps, ping_ms, times, chain, monitor, topic } = measured;
        self.times = times;
        (self.monitor, self.topic) = (monitor, topic);
        self.trouble(
            "gaps",
            (!gaps.is_empty()).then(|| format!("heartbeat: {}", gaps.join("; "))),
            &gaps.len().to_string(),
        );
        if self.asking.is_none() && Instant::now() >= self.ask_again {
            self.certify(chain);
        }
        self.push(&payload, &gaps, ping_ms);
    }

    /// A sign of life goes out all the same, if it is known where to.
    fn tell_unmeasured(&mut self) {
        let gap = format!(
            "no figures: a file of [heartbeat] does not answer within {} s",
            MEASURED_WITHIN.as_secs()
        );
        self.trouble("hangs", Some(format!("heartbeat: {gap}")), "hangs");
        // Where to is read by the same thread: it is known from before, or not at all.
        let payload = Payload { node: self.node.clone(), ..Payload::default() };
        self.push(&payload, &[gap], None);
    }

    fn push(&mut self, payload: &Payload, gaps: &[String], ping_ms: Option<f64>) {
        // One that is still under way has its own end.
        if let (Some(monitor), Some(report), None) = (&self.monitor, &self.report, &self.beating) {
            let url = monitor.push(report, payload, gaps, ping_ms);
            self.beating = Some(ask(&Errand::Push { url: url.expose().to_owned() }, PATIENCE));
        }
    }

    fn post(&mut self) {
        let now = self.now();
        let Some(topic) = &self.topic else { return };
        // Who hears of it two beats later than could be hears that.
        let batch = self.outbox.take(now, self.policy.every * 2);
        if batch.is_empty() {
            return;
        }
        let bodies: Vec<String> = batch
            .iter()
            .map(|(notice, late)| topic.post(&self.node, notice, *late).expose().to_owned())
            .collect();
        let asked = bodies.len();
        let errand = Errand::Post {
            root: topic.root.expose().to_owned(),
            token: topic.token.as_ref().map(|token| token.expose().to_owned()),
            bodies,
        };
        self.posting = Some((ask(&errand, PATIENCE * u32::try_from(asked).unwrap_or(1)), asked));
    }

    fn certify(&mut self, chain: Option<String>) {
        let served = || {
            let address = SocketAddr::new(self.https?, HTTPS);
            Some(Errand::Served { address, name: self.policy.certificate_name.clone() })
        };
        let errand = match (&self.policy.certificate_file, chain) {
            (Some(_), chain) => chain.map(Errand::Chain),
            (None, _) => served(),
        };
        match errand {
            Some(errand) => {
                self.ask_again = Instant::now() + CERTIFICATE;
                self.asking = Some(ask(&errand, PATIENCE));
            }
            None => self.ends = None,
        }
    }

    /// What the process said, once it is known how it was held in.
    fn replies(&mut self, answer: anyhow::Result<Answer>) -> Vec<Reply> {
        match answer {
            Ok(answer) => {
                let gaps: Vec<String> =
                    answer.confinement.gaps.iter().map(|gap| printable(gap, 160)).collect();
                let text = (!gaps.is_empty()).then(|| format!("the process that sends: {}", gaps.join("; ")));
                self.trouble("held", text, "held");
                answer.replies
            }
            Err(error) => {
                let text = printable(&format!("the process that sends: {error:#}"), 300);
                self.trouble("process", Some(text), "process");
                Vec::new()
            }
        }
    }

    fn count(&mut self, target: Target, reply: Reply) {
        *self.sent.entry((target, reply.outcome())).or_default() += 1;
        let text = (reply != Reply::Accepted).then(|| format!("{}: {}", target.name(), reply.why()));
        self.trouble(target.name(), text, &format!("{reply:?}"));
    }

    /// One warning when there is trouble, when it becomes another, and now and then while it lasts; one
    /// word when it is over. What makes it another is `kind`.
    fn trouble(&mut self, of: &'static str, text: Option<String>, kind: &str) {
        let now = Instant::now();
        match (text, self.troubles.get(of)) {
            (None, Some(_)) => {
                log::info!("{of}: as it should be again");
                self.troubles.remove(of);
            }
            (Some(text), known) => {
                if known.is_none_or(|known| known.text != kind || now.duration_since(known.at) >= REMIND) {
                    log::warn!("{text}");
                    self.troubles.insert(of, Trouble { text: kind.to_owned(), at: now });
                }
            }
            (None, None) => {}
        }
    }
}

/// Starts the process for this errand. Its URL is in no argument, environment or log.
fn ask(errand: &Errand, patience: Duration) -> Asked {
    let json = serde_json::to_vec(errand);
    tokio::spawn(async move {
        // Starting it takes a moment on a busy machine.
        let deadline = patience + Duration::from_secs(5);
        ask_child(INTERNAL_SEND, "process that sends", json?, deadline, Dropped::Ends).await
    })
}

async fn until(due: Option<Instant>) {
    match due {
        Some(due) => sleep_until(due).await,
        None => std::future::pending().await,
    }
}

/// `None`: its thread has gone without a word.
async fn come(receiver: Option<&mut oneshot::Receiver<Box<Measured>>>) -> Option<Box<Measured>> {
    match receiver {
        Some(receiver) => receiver.await.ok(),
        None => std::future::pending().await,
    }
}

async fn ended(asked: Option<&mut Asked>) -> anyhow::Result<Answer> {
    match asked {
        Some(asked) => asked.await?,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::diff::stage::{Stage, now};
    use crate::diff::{Code, Severity, assess};

    fn heart() -> (Heart, Report, Snapshot) {
        let telling = |policy: &mut crate::policy::Policy| {
            policy.heartbeat.kuma_url_file = Some("/nonexistent/kuma-url".into());
            policy.heartbeat.ntfy_url_file = Some("/nonexistent/ntfy-url".into());
        };
        let (desired, snapshot) = Stage::spoke().policy(telling).set();
        let report = Report::new(&desired, &snapshot, assess(&desired, &snapshot, now()), now());
        // No directory can be made there, by root neither.
        (Heart::new(&desired, Path::new("/dev/null/state")), report, snapshot)
    }

    /// What it does next, if it does anything soon.
    async fn next(heart: &mut Heart) -> Option<Pulse> {
        tokio::time::timeout(Duration::from_millis(50), heart.pulse()).await.ok()
    }

    #[tokio::test]
    async fn without_a_cycle_that_ended_there_is_no_beat() {
        let (mut heart, report, snapshot) = heart();
        heart.looked(&report, &snapshot);
        assert!(next(&mut heart).await.is_none(), "nobody has said begin");
        heart.begin();
        assert!(matches!(next(&mut heart).await, Some(Pulse::Due)));
        // The cycle hangs: what was true half a minute ago is no sign of life.
        heart.cycle = Instant::now().checked_sub(CYCLE_AGE_MAX + Duration::from_secs(1));
        assert!(heart.cycle.is_some() && next(&mut heart).await.is_none());
        // It ends after all, and what is overdue goes out at once; the next one is in step.
        heart.looked(&report, &snapshot);
        assert!(matches!(next(&mut heart).await, Some(Pulse::Due)));
        heart.act(Pulse::Due);
        assert!(heart.measuring.is_some() && heart.due.is_some_and(|due| due > Instant::now()));
    }

    #[tokio::test]
    async fn a_thread_that_hangs_is_waited_for_by_nobody_and_joined_by_none() {
        let (mut heart, report, snapshot) = heart();
        heart.looked(&report, &snapshot);
        let (hanging, receiver) = oneshot::channel();
        heart.measuring = Some((receiver, Instant::now().checked_sub(MEASURED_WITHIN).expect("a moment")));
        let pulse = next(&mut heart).await.expect("it is given up");
        assert!(matches!(pulse, Pulse::Measured(None)));
        heart.act(pulse);
        heart.act(Pulse::Due);
        assert!(heart.measuring.is_none() && heart.hangs.is_some(), "no other thread beside it");
        drop(hanging);
        let pulse = next(&mut heart).await.expect("it is gone");
        heart.act(pulse);
        heart.act(Pulse::Due);
        assert!(heart.measuring.is_some());
    }

    #[tokio::test]
    async fn what_is_accepted_or_only_worth_knowing_wakes_nobody() {
        let (mut heart, ..) = heart();
        let finding =
            crate::heartbeat::tests::finding(Code::ListenerExposed, Severity::Critical, "tcp/0.0.0.0:5432");
        let accepted = Finding { accepted: true, ..finding.clone() };
        let info = Finding { severity: Severity::Info, subject: "udp/0.0.0.0:123".into(), ..finding.clone() };
        for quiet in [&accepted, &info] {
            heart.note(EventKind::DriftAppeared, quiet);
        }
        heart.note(EventKind::PolicyConfirmed, &finding);
        assert_eq!(heart.tally().queue, 0);
        heart.note(EventKind::DriftAppeared, &finding);
        assert_eq!(heart.tally().queue, 1);
        heart.policy.ntfy_url_file = None;
        heart.note(EventKind::DriftCleared, &finding);
        assert_eq!(heart.tally().queue, 1, "nobody to tell");
    }
}
