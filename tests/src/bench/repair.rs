//! From `nft flush ruleset` to the table being back: the daemon beside a shell on `nft monitor`.

use std::process::Command;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use lab::{Lab, Node, Running};
use spokeguard::source::nft_events::{NftEvent, NftEvents, NftQueries};
use tokio::sync::oneshot;

use crate::figures::{Goal, Row, Section};
use crate::policy;

/// The daemon repairs 120 times at once and once a second from then on, and starts anew with every batch:
/// no batch gets near the end of that.
const BATCH: usize = 40;
const PATIENCE: Duration = Duration::from_secs(5);

pub fn measure(quick: bool) -> Result<Section> {
    let batches = if quick { 1 } else { 6 };
    let lab = Lab::build(crate::PLAIN)?;
    let folder = crate::folder(&lab, &policy::of_the_contracts_size(&lab)?)?;
    let mut observer = Observer::open(&lab.spoke)?;
    let mut queries = lab.spoke.inside(|| Ok(NftQueries::open()?))?;
    let mut pace = Pace(1);

    let mut daemon = lab.spoke.daemon_in(&folder, &[])?;
    let rules = lab.spoke.ok(&["nft", "-s", "list", "table", "inet", "spokeguard"])?;
    daemon.running.stop()?;
    let lines = policy::rules_in(&rules);
    let file = lab.file("rules.nft", &rules)?.display().to_string();

    let (mut ours, mut theirs) = (Taken::default(), Taken::default());
    for _ in 0..batches {
        let mut daemon = lab.spoke.daemon_in(&folder, &[])?;
        for _ in 0..BATCH {
            pace.wait();
            ours.add(observer.flush().context("the daemon's repair")?);
        }
        daemon.running.stop()?;

        let watchdog = watchdog(&lab.spoke, &observer, &mut queries, &rules, &file)?;
        for _ in 0..BATCH {
            pace.wait();
            theirs.add(observer.flush().context("the shell watchdog's repair")?);
        }
        drop(watchdog);
    }

    let run = "spokeguard run; nft flush ruleset";
    let shell = "nft monitor | while read l; do case $l in 'delete table inet spokeguard'*) nft -f rules.nft;; \
                 esac; done; nft flush ruleset";
    let rows = vec![
        Row::new("ours: flush's event to repair's event", "ms", run, ours.event)?,
        Row::new("ours: start of `nft flush` to repair", "ms", run, ours.start)?,
        Row::new("shell: flush's event to repair's event", "ms", shell, theirs.event)?,
        Row::new("shell: start of `nft flush` to repair", "ms", shell, theirs.start)?,
    ];
    let (event, shell) = (&rows[0].samples, &rows[2].samples);
    let goals = vec![
        Goal::at_most("p99 from the flush to the table being back", "ms", event.quantile(0.99), 20.0),
        Goal::at_most("median", "ms", event.median(), 5.0),
        Goal::at_most("median, of the shell's", "x", event.median() / shell.median(), 0.8),
    ];
    let mut notes = vec![
        format!(
            "A table of {lines} rules. Times are those at which an observer of the kernel's nftables events \
             has \
                 the flush's and the repair's end of batch."
        ),
        format!("Flushes come 20 to 150 ms apart, {BATCH} to a batch; batches of the two take turns."),
    ];
    if ours.more + theirs.more > 0 {
        notes.push(format!(
            "Commits to our table beyond the one repair: ours {}, shell {}.",
            ours.more, theirs.more
        ));
    }
    Ok(Section { name: "repair", title: "Repair after `nft flush ruleset`", rows, goals, notes })
}

#[derive(Default)]
struct Taken {
    event: Vec<f64>,
    start: Vec<f64>,
    more: usize,
}

impl Taken {
    fn add(&mut self, flush: Flush) {
        self.event.push(flush.from_event);
        self.start.push(flush.from_start);
        self.more += flush.more;
    }
}

struct Flush {
    from_event: f64,
    from_start: f64,
    /// Commits to our table since the last repair, before this flush: there should be none.
    more: usize,
}

/// Hears of every commit in the node, on a thread of its own.
pub struct Observer<'a> {
    node: &'a Node,
    commits: Receiver<(Instant, NftEvent)>,
    queries: NftQueries,
    _stop: oneshot::Sender<()>,
}

impl<'a> Observer<'a> {
    pub fn open(node: &'a Node) -> Result<Observer<'a>> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
        let (mut events, queries) = node.inside(|| {
            let _entered = runtime.enter();
            Ok((NftEvents::open()?, NftQueries::open()?))
        })?;
        let (send, commits) = channel();
        let (stop, mut stopped) = oneshot::channel::<()>();
        std::thread::spawn(move || {
            // An observer that waits for a CPU itself sees repairs that took no time. This thread alone:
            // to Linux, 0 is the caller. Where it is not allowed, only the figures of busy machines suffer.
            let _ = rustix::process::setpriority_process(None, -20);
            runtime.block_on(async {
                loop {
                    let event = tokio::select! {
                        biased;
                        event = events.next() => event,
                        _ = &mut stopped => return,
                    };
                    // An error shows as the end of the channel.
                    let Ok(event) = event else { return };
                    if send.send((Instant::now(), event)).is_err() {
                        return;
                    }
                }
            });
        });
        Ok(Observer { node, commits, queries, _stop: stop })
    }

    /// Flushes, and waits until somebody else has put the table back.
    fn flush(&mut self) -> Result<Flush> {
        let more = self.commits.try_iter().filter(|(_, event)| event.own_touched).count();
        ensure!(self.queries.own_table_exists()?, "there is no table to flush");
        let started = self.node.inside(|| {
            let started = Instant::now();
            let status = Command::new("nft").args(["flush", "ruleset"]).status().context("start nft")?;
            ensure!(status.success(), "nft flush ruleset: {status}");
            Ok(started)
        })?;
        let flushed = self.commit(started)?;
        let back = self.commit(started)?;
        ensure!(self.queries.own_table_exists()?, "two commits to the table, and it is not there");
        Ok(Flush { from_event: ms(back - flushed), from_start: ms(back - started), more })
    }

    fn commit(&self, since: Instant) -> Result<Instant> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match self.commits.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok((_, event)) if event.overrun => bail!("the observer lost events"),
                Ok((at, event)) if event.own_touched && at >= since => return Ok(at),
                Ok(_) => {}
                Err(RecvTimeoutError::Timeout) => bail!("no commit to the table within {PATIENCE:?}"),
                Err(RecvTimeoutError::Disconnected) => bail!("the observer failed"),
            }
        }
    }
}

/// The usual answer of a shell. It looks at what the lines say, since its own repair makes lines as well.
pub fn watchdog(
    node: &Node,
    observer: &Observer<'_>,
    queries: &mut NftQueries,
    rules: &str,
    file: &str,
) -> Result<Running> {
    let script = format!(
        "nft monitor | while read -r l; do case \"$l\" in 'delete table inet spokeguard'*) nft -f {file};; \
         esac; done"
    );
    let running = node.spawn(&["sh", "-c", &script])?;
    // nft does not say when it has begun to listen: the table is deleted until it comes back.
    for _ in 0..20 {
        node.nft("delete table inet spokeguard")?;
        let back = lab::wait_until(Duration::from_millis(300), "", || {
            queries.own_table_exists().ok().filter(|there| *there)
        });
        if back.is_ok() {
            while observer.commits.recv_timeout(Duration::from_millis(100)).is_ok() {}
            return Ok(running);
        }
        node.nft(rules)?;
    }
    bail!("the shell watchdog never repaired\n{}", running.log())
}

/// Distances between flushes, the same in every run and none like the one before: they meet the daemon at
/// every point of the look that follows a repair, and when it rests.
struct Pace(u64);

impl Pace {
    fn wait(&mut self) {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        std::thread::sleep(Duration::from_millis(20 + (self.0 >> 33) % 130));
    }
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}
