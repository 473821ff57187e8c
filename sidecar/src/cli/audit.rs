//! `audit`: this host as strangers meet it, or other hosts as they look from here.

use std::io::{IsTerminal, Write};
use std::net::{IpAddr, ToSocketAddrs};

use anyhow::Context;
use clap::Args;
use ipnet::IpNet;

use super::{Format, Global};
use crate::audit::{Aim, Audit, Ports, Sweep, View, aims, by_link, opinion, ranges, stranger};
use crate::desired::Desired;
use crate::diff::glass::openings_in;
use crate::observed::{Link, Reading};
use crate::source::bpf::guard;
use crate::source::{links, listeners, nft, owners, probe, scan};
use crate::sys::clock;
use crate::terms::{Port, Proto};

#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub struct Options {
    /// Hosts to scan from here, by name or address; none: this host, from the outside in
    #[arg(value_name = "TARGET")]
    targets: Vec<String>,
    /// Only these ports: 22,80,8000-8100 [default: all 65,535]
    #[arg(long, short, value_name = "LIST", allow_hyphen_values = true)]
    ports: Option<Ports>,
    #[command(flatten)]
    protos: Protos,
    /// Only this address of this host
    #[arg(long, value_name = "ADDRESS", conflicts_with = "targets")]
    address: Option<IpAddr>,
    /// Only by this interface of this host
    #[arg(long, value_name = "NAME", conflicts_with = "targets")]
    interface: Option<String>,
    /// Whom the probes come from: any address for this host, one of ours for others
    #[arg(long, value_name = "ADDRESS")]
    source: Option<IpAddr>,
    /// Say what is there, without a policy to compare it with
    #[arg(long, conflicts_with = "expect")]
    no_policy: bool,
    /// Compare the targets with this policy file, which is theirs
    #[arg(long, value_name = "FILE", requires = "targets")]
    expect: Option<std::path::PathBuf>,
    /// Probes a second at most, for all addresses together
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=10_000_000))]
    rate: Option<u32>,
    /// Let sockets answer and catch the replies: proof, but applications may notice
    #[arg(long, conflicts_with = "targets")]
    reply: bool,
}

/// One protocol or both.
#[derive(Args, Clone, Copy)]
pub struct Protos {
    /// TCP only, unless --udp is given as well
    #[arg(long)]
    tcp: bool,
    /// UDP only, unless --tcp is given as well
    #[arg(long)]
    udp: bool,
}

impl Protos {
    pub fn list(self) -> Vec<Proto> {
        match (self.tcp, self.udp) {
            (true, false) => vec![Proto::Tcp],
            (false, true) => vec![Proto::Udp],
            _ => Proto::ALL.to_vec(),
        }
    }
}

const EXAMPLES: &str = "\
Examples:
  spokeguard audit                      what do strangers reach on this host?
  spokeguard audit --tcp -p 1-1024      only those
  spokeguard audit 198.51.100.7 --expect spoke.toml
                                        is that host as its policy says?
  spokeguard audit --format xml         as nmap's -oX

Exit codes: 0 as the policy says, 1 it differs, 2 could not tell.";

/// The daemon's audits take less than a second, and ten on the smallest machines at their start; another operator's
/// may take longer, which is said.
pub(super) const PATIENCE: std::time::Duration = std::time::Duration::from_secs(15);

pub fn run(global: &Global, options: &Options) -> anyhow::Result<u8> {
    let audit = if options.targets.is_empty() { local(global, options)? } else { remote(global, options)? };
    global.print(&match global.format {
        Format::Json => audit.to_json(),
        Format::Xml => audit.to_xml(&command_line(), &options.ports()),
        _ => audit.to_text(global.width(), global.colour()),
    })?;
    Ok(audit.exit_code())
}

fn local(global: &Global, options: &Options) -> anyhow::Result<Audit> {
    let (started, clock) = (clock::now(), clock::Uptime::start());
    let read = |now| -> anyhow::Result<Option<Desired>> {
        if options.no_policy {
            return Ok(None);
        }
        let load = super::policy::load(global, now);
        if load.is_err() && !global.policy.exists() {
            let file = global.policy.display();
            anyhow::bail!("there is no policy {file}: name one with --policy, or say --no-policy");
        }
        Ok(Some(load?.1))
    };
    // A mistake is told at once; what is judged by is what the file says after the wait.
    read(started)?;
    probe::await_free(&global.places()?.run, PATIENCE);
    let now = clock::now();
    let desired = read(now)?;
    let rules = nft::read();
    // What break-glass holds open is an exception of this moment.
    let desired = desired.map(|desired| desired.with_openings(&openings_in(&rules), now));
    let sockets = Reading::from_result(listeners::read(&mut owners::Owners::new()));
    let interfaces = Reading::from_result(links::read());
    let guard = guard::read(&global.places()?.pin, desired.as_ref().and_then(|d| d.guard.as_ref()));
    let view = View {
        desired: desired.as_ref(),
        rules: &rules,
        listeners: &sockets,
        links: &interfaces,
        guarded: guard.holding(),
    };
    if let Some(gap) = interfaces.gap() {
        anyhow::bail!("the interfaces could not be read: {}", gap.reason);
    }
    let aims = aims(&view, options.interface.as_deref(), options.address);
    if aims.is_empty() {
        anyhow::bail!("{}", nowhere(options, &view));
    }
    let sight = Sight { view: &view, named: view.named(), run_dir: global.places()?.run, options };
    let mut sweeps: Vec<Sweep> = Vec::new();
    let mut gaps: Vec<String> = Vec::new();
    let mut progress = Line::new(global);
    for (link, of_link) in by_link(&aims) {
        if let Err(error) = sight.sweep(link, &of_link, &mut sweeps, &mut progress) {
            gaps.push(format!("{error:#}; what is shown for {} is what its rules say, unproven", link.name));
            sweeps.retain(|sweep| sweep.interface != link.name);
            sweeps.extend(sight.opinions(&of_link));
        }
    }
    progress.end();
    let mut audit = Audit::outside_in(&sweeps, &view, started, clock.elapsed().as_secs_f64());
    for gap in gaps {
        audit.blind("probe", &gap);
    }
    Ok(audit)
}

/// What all sweeps of one audit share.
struct Sight<'a> {
    view: &'a View<'a>,
    named: Vec<IpNet>,
    run_dir: std::path::PathBuf,
    options: &'a Options,
}

impl Sight<'_> {
    /// Everything that comes in by one interface.
    fn sweep(
        &self,
        link: &Link,
        aims: &[&Aim],
        sweeps: &mut Vec<Sweep>,
        progress: &mut Line,
    ) -> anyhow::Result<()> {
        let asked = self.options.ports();
        let mut sweep = |addresses: Vec<IpAddr>, protos: Vec<Proto>, ports: Vec<Port>| {
            if addresses.is_empty() || ports.is_empty() {
                return anyhow::Ok(());
            }
            let with = |address: &IpAddr, proto: &Proto| {
                let source = self.options.source.unwrap_or_else(|| stranger(self.view, *address));
                self.view.care(&link.name, *address, source, *proto, &asked)
            };
            // An operator who gives a rate has decided.
            let care = match self.options.rate {
                Some(_) => Vec::new(),
                None => addresses
                    .iter()
                    .flat_map(|address| protos.iter().filter_map(|proto| with(address, proto)))
                    .collect(),
            };
            let request = probe::Request {
                link: link.clone(),
                addresses,
                protos,
                ports: ranges(&ports),
                source: self.options.source,
                named: self.named.clone(),
                plain: self.view.asks_for_priority(),
                mode: if self.options.reply { probe::Mode::Reply } else { probe::Mode::Verdict },
                rate: self.options.rate,
                threads: std::thread::available_parallelism().map_or(1, |cpus| cpus.get().min(2)) as u8,
                care,
                run_dir: self.run_dir.clone(),
                keeper: std::env::current_exe().ok(),
            };
            let clock = clock::Uptime::start();
            let mut before = (0u64, None);
            let found = probe::sweep_when_free(&request, PATIENCE, &mut |at| {
                let now = Some((at.address, at.proto));
                if before.1 != now {
                    before = (before.0 + u64::from(at.of), now);
                }
                let each = u64::from(at.of) * (request.addresses.len() * request.protos.len()) as u64;
                let sent = (before.0 - u64::from(at.of - at.done.min(at.of))).min(each);
                progress.at(sent, each, clock.elapsed());
            })?;
            sweeps.extend(found);
            Ok(())
        };
        let mine = |must_not: bool| -> Vec<IpAddr> {
            let all = aims.iter().filter(|aim| aim.must_not_answer == must_not).map(|aim| aim.address);
            // A source fits the addresses of its own family.
            let family = self.options.source.map(|s| s.is_ipv4());
            all.filter(|a| family.is_none_or(|v4| a.is_ipv4() == v4)).collect()
        };
        sweep(mine(false), self.options.protos.list(), asked.to_vec())?;
        for proto in self.options.protos.list() {
            sweep(mine(true), vec![proto], self.view.likely(proto, &asked))?;
        }
        Ok(())
    }

    /// What the evaluator of the rules thinks: of all ports, or of those that could answer
    /// where none may.
    fn opinions(&self, aims: &[&Aim]) -> Vec<Sweep> {
        let mut out = Vec::new();
        for aim in aims {
            for proto in self.options.protos.list() {
                let source = self.options.source.unwrap_or_else(|| stranger(self.view, aim.address));
                let asked = self.options.ports();
                let ports =
                    if aim.must_not_answer { self.view.likely(proto, &asked) } else { asked.to_vec() };
                if source.is_ipv4() == aim.address.is_ipv4() {
                    out.push(opinion(self.view, &aim.link.name, aim.address, source, proto, &ports));
                }
            }
        }
        out
    }
}

/// Why there is nothing to probe.
fn nowhere(options: &Options, view: &View) -> String {
    let links = view.links.seen().map(Vec::as_slice).unwrap_or_default();
    match (&options.interface, &options.address) {
        (Some(name), _) if !links.iter().any(|l| l.name == *name) => format!("there is no interface {name}"),
        (Some(name), _) if links.iter().any(|l| l.name == *name && l.loopback) => {
            format!("{name} is the loopback interface: no stranger comes that way")
        }
        (Some(name), _) => format!("{name} has no address of its own to probe, or is a port of a bridge"),
        (None, Some(address)) => {
            format!("no public interface to probe {address} through: name one with --interface")
        }
        (None, None) => "no public interface is up and has an address: name one with --interface".to_owned(),
    }
}

fn remote(global: &Global, options: &Options) -> anyhow::Result<Audit> {
    let (started, clock) = (clock::now(), clock::Uptime::start());
    let expected: Option<Desired> = match &options.expect {
        Some(file) => {
            let theirs = Global { policy: file.clone(), ..global.clone() };
            Some(super::policy::load(&theirs, started)?.1)
        }
        None => None,
    };
    let mut targets: Vec<(IpAddr, Option<String>)> = Vec::new();
    for word in &options.targets {
        for target in resolve(word)? {
            if !targets.iter().any(|(address, _)| *address == target.0) {
                targets.push(target);
            }
        }
    }
    let likely = expected.iter().flat_map(|d| &d.services).filter(|s| s.is_for_anyone()).map(|s| s.port);
    let request = scan::Request {
        targets,
        protos: options.protos.list(),
        ports: options.ports().to_vec(),
        rate: options.rate,
        source: options.source,
        likely: likely.collect(),
    };
    let mut progress = Line::new(global);
    let scans = scan::scan(&request, &mut |at| {
        progress.show(at.sent, at.total, at.per_second, at.left);
    })?;
    progress.end();
    Ok(Audit::remote(&scans, expected.as_ref(), started, clock.elapsed().as_secs_f64()))
}

/// Every address of a name, v4 and v6 alike.
fn resolve(word: &str) -> anyhow::Result<Vec<(IpAddr, Option<String>)>> {
    let bare = word.strip_prefix('[').and_then(|w| w.strip_suffix(']')).unwrap_or(word);
    if let Ok(address) = bare.parse::<IpAddr>() {
        return Ok(vec![(address, None)]);
    }
    let found = (word, 0).to_socket_addrs().with_context(|| format!("find the addresses of {word}"))?;
    let found: Vec<(IpAddr, Option<String>)> = found.map(|a| (a.ip(), Some(word.to_owned()))).collect();
    anyhow::ensure!(!found.is_empty(), "{word} has no address");
    Ok(found)
}

impl Options {
    fn ports(&self) -> Ports {
        self.ports.clone().unwrap_or_else(Ports::all)
    }
}

/// One line on a terminal that is written over; nothing elsewhere.
pub(super) struct Line {
    on: bool,
    shown: bool,
}

impl Line {
    pub(super) fn new(global: &Global) -> Self {
        Self { on: !global.quiet && std::io::stderr().is_terminal(), shown: false }
    }

    pub(super) fn show(&mut self, sent: u64, total: u64, per_second: f64, left: std::time::Duration) {
        if !self.on || total == 0 {
            return;
        }
        let percent = (sent * 100 / total).min(99);
        let mut err = std::io::stderr().lock();
        let _ = write!(
            err,
            "\r\x1b[K{percent:3}%  {per_second:.0} probes/s, about {} left",
            humantime::format_duration(std::time::Duration::from_secs(left.as_secs() + 1))
        );
        let _ = err.flush();
        self.shown = true;
    }

    fn at(&mut self, sent: u64, total: u64, elapsed: std::time::Duration) {
        let per_second = sent as f64 / elapsed.as_secs_f64().max(0.001);
        let left = total.saturating_sub(sent) as f64 / per_second.max(1.0);
        self.show(sent, total, per_second, std::time::Duration::from_secs_f64(left.min(86_400.0)));
    }

    pub(super) fn end(&mut self) {
        if self.shown {
            let _ = write!(std::io::stderr(), "\r\x1b[K");
        }
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        self.end();
    }
}

/// As it was typed, for nmap's `args`.
fn command_line() -> String {
    let words: Vec<String> = std::env::args_os().map(|w| w.to_string_lossy().into_owned()).collect();
    words.join(" ")
}
