//! The measures that the project has promised itself, ours beside the peer's in one run, each with its
//! command. A missed goal is said and is no failure; what could not be measured is one.

#[path = "../bench/apply.rs"]
mod apply;
#[path = "../bench/audit.rs"]
mod audit;
#[path = "../bench/connects.rs"]
mod connects;
#[path = "../bench/figures.rs"]
mod figures;
#[path = "../bench/fleet.rs"]
mod fleet;
#[path = "../bench/flush.rs"]
mod flush;
#[path = "../bench/hub.rs"]
mod hub;
#[path = "../bench/idle.rs"]
mod idle;
#[path = "../bench/listeners.rs"]
mod listeners;
#[path = "../bench/packets.rs"]
mod packets;
#[path = "../bench/policy.rs"]
mod policy;
#[path = "../bench/prefixes.rs"]
mod prefixes;
#[path = "../bench/repair.rs"]
mod repair;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use figures::Section;
use lab::{Lab, Mesh, Need, Shape};
use serde_json::json;

/// One part of the run, by the name that chooses it. `true`: few rounds.
type Measure = fn(bool) -> Result<Section>;
const SECTIONS: [(&str, Measure); 11] = [
    ("repair", repair::measure),
    ("flush", flush::measure),
    ("apply", apply::measure),
    ("prefixes", prefixes::measure),
    ("listeners", listeners::measure),
    ("packets", packets::measure),
    ("connects", connects::measure),
    ("idle", idle::measure),
    ("audit", audit::measure),
    ("hub", hub::measure),
    ("fleet", fleet::measure),
];

const PLAIN: Shape = Shape { mesh: Mesh::Plain, container: false };

const USAGE: &str = "usage: bench [--quick] [--json FILE] [PART..]
Measures beside the peers, all of it (22 minutes) or the named parts.
  repair     `nft flush ruleset` until the table is back; a shell on `nft monitor`
  flush      a stranger's SYNs to a closed port during 1,000 flushes; the same shell
  apply      the rules put in force; `nft -f` of the same
  prefixes   a policy with 10,000 prefixes put in force; `nft -f` of the same
  listeners  listening sockets with their owners; `ss`
  packets    what a packet and a stream pay; nothing at all
  connects   new connections a second to an allowed port; nothing, and iptables
  idle       memory, CPU and scrapes at rest; prometheus-node-exporter
  audit      every port from outside; nmap and masscan
  hub        a real Prometheus over 1,000 simulated spokes; nothing
  fleet      1,000 nodes looked at, some of them lost
  --quick      few rounds: figures for a look, not for a claim (8 minutes)
  --json FILE  also writes every figure there";

struct Options {
    quick: bool,
    json: Option<PathBuf>,
    wanted: Vec<String>,
}

fn main() -> ExitCode {
    let options = match options(std::env::args().skip(1)) {
        Ok(Some(options)) => options,
        Ok(None) => {
            println!("{USAGE}");
            return ExitCode::SUCCESS;
        }
        Err(error) => {
            eprintln!("bench: {error:#}\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    match run(&options) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn options(words: impl Iterator<Item = String>) -> Result<Option<Options>> {
    let mut options = Options { quick: false, json: None, wanted: Vec::new() };
    let mut words = words;
    while let Some(word) = words.next() {
        match &*word {
            "--quick" => options.quick = true,
            "--json" => options.json = Some(words.next().context("--json needs a file")?.into()),
            "--help" | "-h" => return Ok(None),
            name if SECTIONS.iter().any(|(known, _)| *known == name) => options.wanted.push(word),
            _ => bail!("{word} is neither an option nor a part"),
        }
    }
    Ok(Some(options))
}

/// False: something could not be measured.
fn run(options: &Options) -> Result<bool> {
    let missing = lab::missing(&[Need::Lab, Need::WireGuard, Need::Spokeguard]);
    if !missing.is_empty() {
        bail!("this machine lacks: {}", missing.join("; "));
    }
    let started = Instant::now();
    println!("{}", machine()?);
    let (mut done, mut failed) = (Vec::new(), Vec::new());
    for (name, measure) in SECTIONS {
        if !options.wanted.is_empty() && !options.wanted.iter().any(|wanted| wanted == name) {
            continue;
        }
        match measure(options.quick) {
            Ok(section) => {
                print!("{}", section.text());
                done.push(section);
            }
            Err(error) => {
                println!("\n== {name}: NOT MEASURED: {error:#}");
                failed.push(json!({ "name": name, "error": format!("{error:#}") }));
            }
        }
    }
    let goals = done.iter().flat_map(|section| &section.goals);
    let (met, all) = goals.fold((0, 0), |(met, all), goal| (met + usize::from(goal.met()), all + 1));
    println!("\n{met} of {all} goals met, in {:.0} s", started.elapsed().as_secs_f64());
    if !failed.is_empty() {
        println!("{} of {} parts could not be measured", failed.len(), failed.len() + done.len());
    }
    if let Some(path) = &options.json {
        let sections: Vec<_> = done.iter().map(Section::json).collect();
        let document = json!({
            "version": 1, "machine": machine()?, "quick": options.quick, "release": !cfg!(debug_assertions),
            "sections": sections, "failed": failed,
        });
        std::fs::write(path, format!("{document:#}\n"))
            .with_context(|| format!("write {}", path.display()))?;
    }
    Ok(failed.is_empty())
}

fn machine() -> Result<String> {
    let kernel =
        std::fs::read_to_string("/proc/sys/kernel/osrelease").context("read the kernel's release")?;
    let load = std::fs::read_to_string("/proc/loadavg").context("read the load")?;
    let cpus = std::thread::available_parallelism().context("count the CPUs")?;
    let build = if cfg!(debug_assertions) { "; A DEBUG BUILD: no figure of it counts" } else { "" };
    let load = load.split(' ').next().unwrap_or_default();
    Ok(format!("Linux {}, {cpus} CPUs, load {load}{build}", kernel.trim()))
}

/// A folder of a daemon with that policy.
fn folder(lab: &Lab, policy: &str) -> Result<PathBuf> {
    let folder = tempfile::Builder::new().prefix("guard-").tempdir_in(&lab.dir)?.keep();
    std::fs::write(folder.join("policy.toml"), policy).context("write a policy")?;
    Ok(folder)
}

#[cfg(test)]
mod tests {
    #[test]
    fn help_names_every_part_and_no_other() {
        let told = super::USAGE.lines().filter_map(|line| line.strip_prefix("  ")?.split(' ').next());
        let told: Vec<&str> = told.filter(|word| !word.starts_with('-')).collect();
        assert_eq!(told, super::SECTIONS.map(|(name, _)| name));
    }
}
