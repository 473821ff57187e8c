//! Listening sockets with their owners: the source as the daemon calls it, beside `ss`.

use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use lab::{Lab, Listening, Node};
use spokeguard::source::{listeners, owners::Owners};

use crate::figures::{Goal, Row, Section, paired};

pub fn measure(quick: bool) -> Result<Section> {
    let rounds = if quick { 5 } else { 21 };
    let lab = Lab::build(crate::PLAIN)?;
    let mut section = Section {
        name: "listeners",
        title: "Listening sockets with their owners",
        rows: Vec::new(),
        goals: Vec::new(),
        notes: Vec::new(),
    };
    for count in [10, 1000, 10_000] {
        let holders = hold(&lab.spoke, count)?;
        let [cold, warm, ss] = lab.spoke.inside(|| times(rounds, count))?;
        let ours = "spokeguard::source::listeners::read, cold (new Owners) and warm (kept)";
        for (what, times) in [("cold", &cold), ("warm", &warm)] {
            let ratio = paired(times, &ss)?.median();
            section.goals.push(Goal::at_most(
                format!("{count} sockets, {what}, of ss's"),
                "x",
                ratio,
                1.0 / 3.0,
            ));
        }
        section.rows.push(Row::new(format!("ours, {count} sockets, cold"), "ms", ours, cold)?);
        section.rows.push(Row::new(format!("ours, {count} sockets, warm"), "ms", ours, warm)?);
        section.rows.push(Row::new(format!("ss, {count} sockets"), "ms", "ss -Hltunp", ss)?);
        drop(holders);
    }
    let processes = std::fs::read_dir("/proc")?
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u32>().ok())
        .count();
    section.notes.push(format!(
        "Half TCP, half UDP, held by up to 100 processes beside {processes} others on this machine. Every \
         row was \
         counted and had its owner in both. ss is a process that is started, ours is a call: starting costs \
         ss \
         about a millisecond of its time."
    ));
    Ok(section)
}

/// `count` sockets held by at most 100 processes.
fn hold(node: &Node, count: u16) -> Result<Vec<Listening>> {
    let processes = (count / 2).min(100);
    let each = count / processes / 2;
    (0..processes)
        .map(|number| {
            let (first, more) = (10_000 + number * each, each - 1);
            let [tcp, udp] = ["tcp", "udp"].map(|proto| format!("{proto}/0.0.0.0:{first}+{more}"));
            node.listen("holder", &[&tcp, &udp])
        })
        .collect()
}

/// Milliseconds of each round: cold, warm, ss. The thread is in the node's namespace, as its children are.
fn times(rounds: usize, count: u16) -> Result<[Vec<f64>; 3]> {
    let [mut cold, mut warm, mut ss] = [const { Vec::new() }; 3];
    for _ in 0..rounds {
        let mut owners = Owners::new();
        for times in [&mut cold, &mut warm] {
            let started = Instant::now();
            let found = listeners::read(&mut owners)?;
            times.push(started.elapsed().as_secs_f64() * 1e3);
            let owned = found.iter().filter(|listener| listener.owner.is_some()).count();
            ensure!(
                (found.len(), owned) == (count.into(), count.into()),
                "{count} sockets, {} seen, {owned} with owner",
                found.len()
            );
        }
        let started = Instant::now();
        let output = Command::new("ss").arg("-Hltunp").stderr(Stdio::null()).output().context("start ss")?;
        ss.push(started.elapsed().as_secs_f64() * 1e3);
        let text = String::from_utf8_lossy(&output.stdout);
        let owned = text.lines().filter(|line| line.contains("users:((")).count();
        ensure!(owned == usize::from(count), "{count} sockets, {owned} with owner in ss");
    }
    Ok([cold, warm, ss])
}
