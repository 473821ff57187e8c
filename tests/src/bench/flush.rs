//! While somebody flushes every rule a thousand times: how many of a stranger's SYNs to a port that is closed
//! get an answer, on a host with spokeguard and on one where a shell puts nftables' rules back.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use lab::wire::{self, SYN, Sender, TCP};
use lab::{Lab, Node, OUTSIDER, OUTSIDER_V6, SPOKE_PUBLIC, SPOKE_PUBLIC_V6};
use spokeguard::source::bpf::guard;
use spokeguard::source::nft_events::NftQueries;

use crate::figures::{Goal, Row, Section};
use crate::policy;
use crate::repair::{Observer, watchdog};

const PORT: u16 = 5432;
/// SYNs a second, IPv4 and IPv6 in turn.
const RATE: u32 = 1000;
/// From the end of one flush to the next: longer than either takes to put the rules back.
const APART: Duration = Duration::from_millis(30);

pub fn measure(quick: bool) -> Result<Section> {
    let flushes = if quick { 100 } else { 1000 };
    let lab = Lab::build(crate::PLAIN)?;
    let _listener = lab.spoke.listen("postgres", &[&format!("tcp/[::]:{PORT}")])?;
    count_answers(&lab.internet)?;
    // The bind guard would refuse the listener that is to be found.
    let text = policy::of_the_contracts_size(&lab)?;
    let unbound = text.replace("binds = true", "binds = false");
    ensure!(unbound != text, "the policy has no binds to leave alone");
    let folder = crate::folder(&lab, &unbound)?;

    let mut daemon = lab.spoke.daemon_in(&folder, &[])?;
    let rules = lab.spoke.ok(&["nft", "-s", "list", "table", "inet", "spokeguard"])?;
    let ours = flushed(&lab, flushes).context("with spokeguard")?;
    daemon.running.stop()?;

    lab.spoke.inside(|| guard::release(&lab.spoke.path("/sys/fs/bpf/spokeguard")))?;
    lab.spoke.nft(&format!("table inet spokeguard\ndelete table inet spokeguard\n{rules}"))?;
    let file = lab.file("rules.nft", &rules)?.display().to_string();
    let observer = Observer::open(&lab.spoke)?;
    let mut queries = lab.spoke.inside(|| Ok(NftQueries::open()?))?;
    let _watchdog = watchdog(&lab.spoke, &observer, &mut queries, &rules, &file)?;
    let shell = flushed(&lab, flushes).context("with the shell watchdog")?;

    let command = "nft flush ruleset (spokeguard run)";
    let theirs = "nft flush ruleset (nft monitor | while read l; do ... nft -f rules.nft; done)";
    let rows = vec![
        Row::new("ours: SYNs sent", "", command, vec![ours.sent])?,
        Row::new("ours: SYNs answered", "", command, vec![ours.answered])?,
        Row::new("shell: SYNs sent", "", theirs, vec![shell.sent])?,
        Row::new("shell: SYNs answered", "", theirs, vec![shell.answered])?,
        Row::new("shell: open after a flush, mean", "ms", theirs, vec![shell.open_ms(flushes)])?,
    ];
    let goals = vec![Goal::at_most("answered on a host with spokeguard", "", ours.answered, 0.0)];
    let notes = vec![
        format!(
            "{flushes} flushes each, {} ms apart; SYNs to tcp/{PORT}, where a process listens on all addresses. \
             The daemon's budget ends before the flushes do: from then on the tc guard stands alone most of \
             the time.",
            APART.as_millis()
        ),
        format!(
            "{:.0} and {:.0} SYNs a second were sent; answers are counted by nftables on the stranger's host.",
            ours.rate, shell.rate
        ),
    ];
    Ok(Section { name: "flush", title: "A closed port while rules are flushed", rows, goals, notes })
}

struct Flushed {
    sent: f64,
    answered: f64,
    rate: f64,
}

impl Flushed {
    fn open_ms(&self, flushes: u32) -> f64 {
        self.answered / self.rate * 1e3 / f64::from(flushes)
    }
}

fn flushed(lab: &Lab, flushes: u32) -> Result<Flushed> {
    let before = answers(&lab.internet)?;
    let stop = AtomicBool::new(false);
    let begun = Instant::now();
    let (sent, took) = std::thread::scope(|scope| {
        let sender = scope.spawn(|| syns(&lab.internet, &stop));
        let done = (0..flushes).try_for_each(|_| {
            std::thread::sleep(APART);
            lab.spoke.ok(&["nft", "flush", "ruleset"]).map(|_| ())
        });
        stop.store(true, Ordering::Relaxed);
        let sent = sender.join().map_err(|_| anyhow::anyhow!("the sender panicked"))??;
        done.map(|()| (sent, begun.elapsed()))
    })?;
    let answered = answers(&lab.internet)? - before;
    Ok(Flushed { sent: f64::from(sent), answered, rate: f64::from(sent) / took.as_secs_f64() })
}

fn syns(node: &Node, stop: &AtomicBool) -> Result<u32> {
    let ways = [(OUTSIDER, SPOKE_PUBLIC), (OUTSIDER_V6, SPOKE_PUBLIC_V6)];
    node.inside(|| {
        let sender = Sender::open()?;
        let begun = Instant::now();
        let mut sent = 0u32;
        while !stop.load(Ordering::Relaxed) {
            let way = ways[sent as usize % 2];
            // Never the port of a connection that is still remembered.
            let from = 1024 + (sent / 2 % 60_000) as u16;
            sender.send(&wire::ip(way, TCP, &wire::tcp(way, (from, PORT), SYN)), way.1)?;
            sent += 1;
            let due = begun + Duration::from_secs(1) * sent / RATE;
            std::thread::sleep(due.saturating_duration_since(Instant::now()));
        }
        Ok(sent)
    })
}

fn count_answers(node: &Node) -> Result<()> {
    node.nft(&format!(
        "add table inet watch
         add counter inet watch answered
         add chain inet watch in {{ type filter hook input priority -300; }}
         add rule inet watch in tcp sport {PORT} tcp flags & (syn | ack) == syn | ack counter name answered"
    ))
}

fn answers(node: &Node) -> Result<f64> {
    let text = node.ok(&["nft", "-j", "list", "counter", "inet", "watch", "answered"])?;
    let document: serde_json::Value = serde_json::from_str(&text).context("read nft's JSON")?;
    let objects = document["nftables"].as_array().into_iter().flatten();
    let packets = objects.filter_map(|object| object["counter"]["packets"].as_f64()).next();
    packets.context("nft told of no counter")
}
