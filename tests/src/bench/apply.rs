//! `spokeguard apply` beside `nft -f` of the same rules.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use lab::{Lab, Node};

use crate::figures::{Goal, Row, Section, paired};
use crate::policy;

pub fn measure(quick: bool) -> Result<Section> {
    let rounds = if quick { 5 } else { 31 };
    let lab = Lab::build(crate::PLAIN)?;
    let node = &lab.spoke;
    let folder = crate::folder(&lab, &policy::of_the_contracts_size(&lab)?)?;
    let (apply, confirm) = (spokeguard(&folder, "apply")?, spokeguard(&folder, "confirm")?);
    let timed_apply = || time(node, &apply);

    timed_apply()?;
    node.ok(&confirm)?;
    let rules = node.ok(&["nft", "-s", "list", "table", "inet", "spokeguard"])?;
    let load = lab.file("rules.nft", &rules)?;
    let anew = format!("table inet spokeguard\ndelete table inet spokeguard\n{rules}");
    let reload = lab.file("reload.nft", &anew)?;
    let nft = |file: &Path| time(node, &["nft".to_string(), "-f".to_string(), file.display().to_string()]);
    let gone = || node.nft("delete table inet spokeguard");

    let [mut cold, mut unchanged, mut first, mut again] = [const { Vec::new() }; 4];
    for _ in 0..rounds {
        gone()?;
        cold.push(timed_apply()?);
        node.ok(&confirm)?;
        unchanged.push(timed_apply()?);
        gone()?;
        first.push(nft(&load)?);
        again.push(nft(&reload)?);
    }
    let goals = vec![
        Goal::at_most(
            "apply, nothing there, of `nft -f`'s first load",
            "x",
            paired(&cold, &first)?.median(),
            1.0,
        ),
        Goal::at_most(
            "apply, nothing there, of `nft -f`'s reload",
            "x",
            paired(&cold, &again)?.median(),
            1.0,
        ),
        Goal::at_most(
            "apply, in force already, of `nft -f`'s reload",
            "x",
            paired(&unchanged, &again)?.median(),
            1.0,
        ),
    ];
    let rows = vec![
        Row::new("ours: nothing there", "ms", "spokeguard apply", cold)?,
        Row::new("ours: in force already", "ms", "spokeguard apply", unchanged)?,
        Row::new("nft: first load, nothing there", "ms", "nft -f rules.nft", first)?,
        Row::new("nft: atomic reload (delete and load)", "ms", "nft -f reload.nft", again)?,
    ];
    let notes = vec![format!(
        "A table of {} rules. Ours also reads policy and table before, arms the rollback, and \
         reads the table back.",
        policy::rules_in(&rules)
    )];
    Ok(Section { name: "apply", title: "Putting the rules in force", rows, goals, notes })
}

/// A verb of the program on that folder.
pub fn spokeguard(folder: &Path, verb: &str) -> Result<Vec<String>> {
    let mut words = vec![lab::spokeguard()?.display().to_string(), verb.to_string()];
    for (flag, place) in [("--policy", "policy.toml"), ("--state-dir", "state"), ("--run-dir", "run")] {
        words.extend([flag.to_string(), folder.join(place).display().to_string()]);
    }
    Ok(words)
}

/// Milliseconds from start to end of a command that must succeed, in the node's network namespace.
pub fn time(node: &Node, words: &[String]) -> Result<f64> {
    node.inside(|| {
        let (program, arguments) = words.split_first().context("no command")?;
        let mut command = Command::new(program);
        command.args(arguments).stdin(Stdio::null()).stdout(Stdio::null());
        let started = Instant::now();
        let status = command.status().with_context(|| format!("start {}", words.join(" ")))?;
        let took = started.elapsed().as_secs_f64() * 1e3;
        ensure!(status.success(), "{}: {status}", words.join(" "));
        Ok(took)
    })
}
