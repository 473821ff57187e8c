//! `top`: a live view of what the node is busy with. Reads counters and asks the daemon;
//! changes nothing, and leaves the terminal as it was, however it ends.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::io::{self, IsTerminal as _};
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context as _;
use clap::Args;
use ratatui::Terminal;
use ratatui::backend::CrosstermBackend;
use ratatui::style::Style;
use ratatui::widgets::Paragraph;

use super::screen::{Screen, TICK, Wish};
use super::{Format, Global, Places, policy};
use crate::daemon::eventlog::{Event, EventKind};
use crate::daemon::socket::{self, Status};
use crate::desired::Desired;
use crate::desired::guard::{Boot, GuardRules, Side, Syn};
use crate::observed::{Link, Reading};
use crate::source::flows::Tracker;
use crate::source::knocks::{For, Knock, Knocks};
use crate::source::{bpf, links, nft_counters};
use crate::sys::clock;
use crate::terms::Proto;
use crate::top::{self, Datagram, Drift, Frame, Judge, Sample, Told, Watch};

/// Packets that are looked at in one tick; the others are counted.
const KNOCKS_MAX: usize = 4096;
/// Public interfaces that are listened on.
const INTERFACES_MAX: usize = 32;

#[derive(Args)]
pub struct Options {
    /// Print one view and end (also when not on a terminal, and with --format json)
    #[arg(long)]
    once: bool,
    /// How long a rate is taken over, and how often the view is made anew
    #[arg(long, value_name = "TIME", default_value = "1s", value_parser = every)]
    every: Duration,
}

fn every(text: &str) -> Result<Duration, String> {
    match humantime::parse_duration(text) {
        Ok(every) if (Duration::from_millis(200)..=Duration::from_secs(60)).contains(&every) => Ok(every),
        Ok(_) => Err("between 200ms and 60s".into()),
        Err(error) => Err(error.to_string()),
    }
}

pub fn run(global: &Global, options: &Options) -> anyhow::Result<u8> {
    let mut view = View::begin(global)?;
    if options.once || global.format == Format::Json || !io::stdout().is_terminal() {
        let end = clock::monotonic() + options.every;
        while clock::monotonic() < end {
            view.listen();
            std::thread::sleep(TICK.min(end.saturating_sub(clock::monotonic())));
        }
        view.look();
        let frame = view.frame();
        let width = if io::stdout().is_terminal() { global.width() } else { 80 };
        global.tell(&top::to_text(&frame, width), serde_json::to_value(&frame)?)?;
        return Ok(0);
    }
    live(&mut view, options.every, global.colour())?;
    Ok(0)
}

fn live(view: &mut View, every: Duration, colour: bool) -> anyhow::Result<()> {
    let mut screen = Screen::open()?;
    let mut terminal = Terminal::new(CrosstermBackend::new(io::stdout())).context("open the terminal")?;
    let mut due = clock::monotonic();
    let mut draw = true;
    loop {
        view.listen();
        if clock::monotonic() >= due {
            view.look();
            due = clock::monotonic() + every;
            draw = true;
        }
        if std::mem::take(&mut draw) {
            let frame = view.frame();
            terminal
                .draw(|screen| {
                    let area = screen.area();
                    let mut lines = top::page(&frame, area.width.into(), area.height.into());
                    if !colour {
                        for line in &mut lines {
                            line.style = Style::new();
                            line.spans.iter_mut().for_each(|span| span.style = Style::new());
                        }
                    }
                    screen.render_widget(Paragraph::new(lines), area);
                })
                .context("draw")?;
        }
        match screen.wait(TICK.min(due.saturating_sub(clock::monotonic())))? {
            Wish::End => return Ok(()),
            Wish::Redraw => draw = true,
            Wish::None => {}
        }
    }
}

/// What is looked at, and what is remembered of it.
struct View {
    places: Places,
    file: PathBuf,
    desired: Desired,
    /// The rules by which knocks are judged: those of the policy with what break-glass holds open.
    fingerprint: String,
    status: Status,
    judge: Judge,
    links: Vec<Link>,
    /// By the index of the interface: for connections and for datagrams.
    ears: BTreeMap<u32, [Knocks; 2]>,
    tracker: Option<Tracker>,
    watch: Watch,
    /// What could not be read at the last look.
    gaps: BTreeMap<&'static str, String>,
}

impl View {
    /// Without a daemon there is nothing to show.
    fn begin(global: &Global) -> anyhow::Result<Self> {
        let places = global.places()?;
        let status = ask(&places.run)?;
        let file = status.daemon.file.clone().unwrap_or_else(|| global.policy.clone());
        let (_, desired) = policy::load_policy(&file, clock::now())?;
        let mut view = Self {
            fingerprint: crate::policy::fingerprint(&desired.policy),
            watch: Watch::new(clock::now()),
            judge: Judge::new(&desired),
            links: Vec::new(),
            ears: BTreeMap::new(),
            tracker: None,
            gaps: BTreeMap::new(),
            places,
            file,
            desired,
            status,
        };
        view.look();
        Ok(view)
    }

    /// Whoever knocked since the last call.
    fn listen(&mut self) {
        let now = Boot(clock::since_boot_ns());
        let Self { ears, links, watch, desired, judge, tracker, gaps, .. } = self;
        let is_local =
            |address: IpAddr| links.iter().flat_map(|link| &link.addresses).any(|net| net.addr() == address);
        for (index, [connections, datagrams]) in ears.iter() {
            // What is only passed on is no attempt on this host.
            let here = |knock: &Knock| is_local(knock.destination);
            let mut arrived: Vec<Datagram> = Vec::new();
            let heard = connections.read(KNOCKS_MAX, |knock| {
                if here(&knock) {
                    let Knock { source, destination, port, .. } = knock;
                    watch.knock(desired, &Syn { source, destination, port, onward: None }, now);
                }
            });
            let heard = heard.and_then(|()| {
                datagrams.read(KNOCKS_MAX, |knock| {
                    if here(&knock) {
                        let Knock { source, source_port, destination, port, .. } = knock;
                        arrived.push(Datagram {
                            from: SocketAddr::new(source, source_port),
                            to: SocketAddr::new(destination, port),
                        });
                    }
                })
            });
            if let Err(error) = heard {
                gaps.insert("strangers", format!("strangers can't be seen: {error}"));
            }
            let interface = links.iter().find(|link| link.index == *index).map_or("", |link| &link.name);
            let known = |datagram: &Datagram| {
                let tracker = match tracker {
                    Some(tracker) => tracker,
                    None => tracker.insert(Tracker::open()?),
                };
                tracker.knows(Proto::Udp, datagram.from, datagram.to)
            };
            let count = |datagram: &Datagram| watch.refused_datagram(datagram);
            match judge.refused(interface, &arrived, &is_local, known, count) {
                Ok(unjudged) => watch.missed(unjudged),
                Err(error) => {
                    let text = format!("attempts by UDP can't be told from answers: {error:#}");
                    gaps.insert("datagrams", text);
                }
            }
            for ear in [connections, datagrams] {
                watch.missed(ear.missed().unwrap_or(0));
            }
        }
    }

    /// The sums as they are now, and what the daemon says.
    fn look(&mut self) {
        self.gaps.clear();
        self.follow_daemon();
        match links::read() {
            Ok(links) => self.links = links,
            Err(error) => drop(self.gaps.insert("links", format!("interfaces could not be read: {error:#}"))),
        }
        self.follow_links();
        self.listen();
        let mut sample = Sample { at: clock::monotonic(), ..Sample::default() };
        match bpf::read(&self.places.pin, &bpf::CounterConfig::new(&self.desired.services)) {
            Reading::Seen(counters) if counters.loaded => sample.traffic = counters.traffic,
            Reading::Seen(_) => drop(
                self.gaps.insert("counters", "traffic is not counted: no eBPF counters are loaded".into()),
            ),
            Reading::Blind(gap) => {
                drop(self.gaps.insert("counters", format!("traffic could not be read: {}", gap.reason)))
            }
        }
        match nft_counters::read() {
            Ok(counters) => {
                sample.dropped = counters.into_iter().map(|(name, amount)| (name, amount.packets)).collect();
            }
            Err(error) => {
                self.gaps.insert("drops", format!("drop counters could not be read: {error:#}"));
            }
        }
        self.ask_guard(&mut sample.dropped);
        self.watch.sample(sample);
    }

    /// What the second layer refused, and what it lets in for a while.
    fn ask_guard(&mut self, dropped: &mut BTreeMap<String, u64>) {
        let Ok(Some(guard)) = bpf::guard::Guard::open(&self.places.pin) else { return };
        if let Ok([refused, _]) = guard.refused() {
            for ((reason, family), packets) in refused {
                let sum = dropped.entry(reason.counter(family)).or_default();
                *sum = sum.saturating_add(packets);
            }
        }
        if let (Some(rules), Ok(timed)) = (&mut self.desired.guard, guard.timed()) {
            rules.timed = timed;
        }
    }

    fn follow_daemon(&mut self) {
        match ask(&self.places.run) {
            Ok(status) => self.status = status,
            Err(error) => drop(self.gaps.insert("daemon", format!("{error:#}"))),
        }
        if self.status.daemon.policy == self.fingerprint {
            return;
        }
        match policy::load_policy(&self.file, clock::now()) {
            Ok((_, desired)) => {
                self.fingerprint = crate::policy::fingerprint(&desired.policy);
                self.judge = Judge::new(&desired);
                self.desired = desired;
                // What is welcome is in their filters.
                self.ears.clear();
            }
            Err(_) => self.fingerprint.clear(),
        }
        if self.status.daemon.policy != self.fingerprint {
            let text = "the daemon enforces another policy than the file has: names and ports are the file's";
            self.gaps.insert("policy", text.into());
        }
    }

    /// An ear on each public interface.
    fn follow_links(&mut self) {
        let rules = self.desired.guard.as_ref();
        let is_public = |link: &&Link| {
            !link.loopback
                && link.master.is_none()
                && rules.map_or_else(
                    || self.desired.policy.scope_of(&link.name) == Some(crate::terms::Scope::Public),
                    |rules: &GuardRules| rules.side(&link.name) == Side::Public,
                )
        };
        let public: Vec<u32> =
            self.links.iter().filter(is_public).map(|link| link.index).take(INTERFACES_MAX).collect();
        self.ears.retain(|index, _| public.contains(index));
        for index in public {
            if let Entry::Vacant(place) = self.ears.entry(index) {
                let connections = Knocks::listen(index, For::Connections);
                let both = connections.and_then(|connections| {
                    Ok([connections, Knocks::listen(index, For::Datagrams(&self.judge.welcome))?])
                });
                match both {
                    Ok(both) => drop(place.insert(both)),
                    Err(error) => {
                        self.gaps.insert("strangers", format!("strangers can't be seen: {error:#}"));
                    }
                }
            }
        }
    }

    fn frame(&self) -> Frame {
        let report = &self.status.report;
        let told = Told {
            verdict: report.verdict,
            findings: report.findings.iter().filter(|finding| finding.is_drift()).count(),
            blind: report.blind.len(),
            drift: self.status.daemon.events.iter().rev().filter_map(drift).collect(),
        };
        self.watch.frame(&self.desired, told, clock::now(), self.gaps.values().cloned().collect())
    }
}

fn ask(run: &Path) -> anyhow::Result<Status> {
    serde_json::from_str(&socket::ask(run, "status")?).context("the daemon's answer")
}

/// What an operator is to know, with who did it in front: the end of a line is cut first.
fn drift(event: &Event) -> Option<Drift> {
    match event.kind {
        EventKind::Started | EventKind::Stopped | EventKind::PolicyLoaded | EventKind::PolicyConfirmed => {
            return None;
        }
        _ => {}
    }
    let mut text = event.kind.name().to_owned();
    if let Some(actor) = &event.by {
        text.push_str(&format!(" by {actor}"));
    }
    for part in [event.code.map_or("", crate::diff::Code::name), &event.subject, &event.found] {
        if !part.is_empty() {
            text.push_str(if text.contains(':') { " " } else { ": " });
            text.push_str(part);
        }
    }
    if let Some(took) = event.took_ms {
        text.push_str(&format!(" in {took} ms"));
    }
    Some(Drift { at: event.at, text })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn how_often_has_bounds() {
        assert_eq!(every("2s"), Ok(Duration::from_secs(2)));
        for bad in ["0s", "1h", "soon", "-1s"] {
            assert!(every(bad).is_err(), "{bad}");
        }
    }
}
