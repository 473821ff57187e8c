//! `spokeguard apply` of a policy with 10,000 prefixes beside `nft -f` of the rules that come of it.

use std::fs;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use lab::{Lab, Node};

use crate::apply::{spokeguard, time};
use crate::figures::{Goal, Row, Section, paired};
use crate::policy;

const PREFIXES: u32 = 10_000;

pub fn measure(quick: bool) -> Result<Section> {
    let rounds = if quick { 3 } else { 15 };
    let lab = Lab::build(crate::PLAIN)?;
    let node = &lab.spoke;
    let folder = crate::folder(&lab, &with_prefixes(&policy::of_the_contracts_size(&lab)?))?;
    let (apply, confirm) = (spokeguard(&folder, "apply")?, spokeguard(&folder, "confirm")?);

    time(node, &apply)?;
    node.ok(&confirm)?;
    let rules = node.ok(&["nft", "-s", "list", "table", "inet", "spokeguard"])?;
    let listed = rules.matches("/24").count();
    ensure!(listed >= PREFIXES as usize, "only {listed} prefixes came into the table");
    let file = lab.file("rules.nft", &rules)?.display().to_string();
    let load = ["nft".to_string(), "-f".to_string(), file];
    let gone = || node.nft("delete table inet spokeguard");

    let [mut cold, mut unchanged, mut first] = [const { Vec::new() }; 3];
    for _ in 0..rounds {
        gone()?;
        cold.push(time(node, &apply)?);
        node.ok(&confirm)?;
        unchanged.push(time(node, &apply)?);
        gone()?;
        first.push(time(node, &load)?);
    }
    gone()?;
    let ours = peak_mib(node, &apply)?;
    node.ok(&confirm)?;
    gone()?;
    let theirs = peak_mib(node, &load)?;

    let goals = vec![
        Goal::at_most("apply, nothing there, of `nft -f`", "x", paired(&cold, &first)?.median(), 1.2),
        Goal::at_most("apply, in force already, of `nft -f`", "x", paired(&unchanged, &first)?.median(), 1.2),
        Goal::at_most("most memory of apply and all it starts", "MiB", ours, 128.0),
    ];
    let rows = vec![
        Row::new("ours: nothing there", "ms", "spokeguard apply", cold)?,
        Row::new("ours: in force already", "ms", "spokeguard apply", unchanged)?,
        Row::new("ours: most memory, with its nft", "MiB", "spokeguard apply", vec![ours])?,
        Row::new("nft: first load, nothing there", "ms", "nft -f rules.nft", first)?,
        Row::new("nft: most memory", "MiB", "nft -f rules.nft", vec![theirs])?,
    ];
    let notes = vec![format!(
        "Exceptions for {PREFIXES} prefixes, no two of them neighbours. Ours also reads policy and table, puts the tc \
         guard beside them, seals the rules, and reads the table back; the lists go in and out by netlink, and \
         nft, started twice, never sees them. What ours takes beyond that is the policy (as TOML, and in the \
         form that is sealed) and the guard's trie."
    )];
    Ok(Section { name: "prefixes", title: "Putting 10,000 prefixes in force", rows, goals, notes })
}

/// Every other /24 from 16.0.0.0 on, so that none can be merged; in lists as long as a policy may have.
fn with_prefixes(policy: &str) -> String {
    const LISTS: u32 = 4;
    let each = PREFIXES / LISTS;
    let lists = (0..LISTS).map(|list| {
        let prefixes: Vec<String> = (list * each..(list + 1) * each)
            .map(|n| {
                let [_, a, b, c] = (n * 2).to_be_bytes();
                format!("\"{}.{b}.{c}.0/24\"", 16 + a)
            })
            .collect();
        format!(
            "[[exception]]\nname = \"partners-{list}\"\ntcp = [{}]\nfrom = [{}]\nreason = \"partners\"\n\
             owner = \"ops\"\nuntil = \"2099-01-31\"\n",
            2300 + list,
            prefixes.join(", ")
        )
    });
    let lists: String = lists.collect();
    format!("{policy}{lists}")
}

/// The most memory that a command and all it starts had at once, as often as one can look.
pub fn peak_mib(node: &Node, words: &[String]) -> Result<f64> {
    peak_mib_until(node, words, &[0])
}

/// The same of what may end with one of these codes.
pub fn peak_mib_until(node: &Node, words: &[String], codes: &[i32]) -> Result<f64> {
    node.inside(|| {
        let (program, arguments) = words.split_first().context("no command")?;
        let mut command = Command::new(program);
        let mut child = command.args(arguments).stdin(Stdio::null()).stdout(Stdio::null()).spawn()?;
        let mut most = 0;
        let status = loop {
            most = most.max(resident_kib(child.id()));
            if let Some(status) = child.try_wait()? {
                break status;
            }
            // What is measured needs the CPU more than this does.
            std::thread::sleep(std::time::Duration::from_millis(1));
        };
        let ended = status.code().is_some_and(|code| codes.contains(&code));
        ensure!(ended && most > 0, "{}: {status}, {most} KiB", words.join(" "));
        Ok(most as f64 / 1024.0)
    })
}

fn resident_kib(pid: u32) -> u64 {
    let own = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let own =
        own.lines().find_map(|line| line.strip_prefix("VmRSS:")?.split_whitespace().next()?.parse().ok());
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    own.unwrap_or(0) + children.split_whitespace().flat_map(str::parse).map(resident_kib).sum::<u64>()
}
