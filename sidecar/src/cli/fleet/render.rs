//! `fleet render`: what every node, Prometheus, Nix and DNS need, from the inventory.

use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::json;
use similar::TextDiff;

use super::tree::{Changes, Found, Tree};
use super::{Selection, load_inventory, notes};
use crate::cli::Global;
use crate::fleet::Inventory;
use crate::fleet::render::{self, Files};
use crate::terms::printable;

/// No longer differences are printed; JSON names all files.
const DIFF_LINES_MAX: usize = 2_000;
/// Nor more paths.
const PATHS_MAX: usize = 60;

#[derive(Args)]
pub struct Options {
    #[command(flatten)]
    nodes: Selection,
    /// Where to; replaced as a whole [default: rendered, beside the inventory]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Write nothing: show what differs, and exit 1 if anything does
    #[arg(long)]
    check: bool,
}

pub const FILES: &str = "\
Files:
  nodes/NAME/policy.toml           for /etc/spokeguard/policy.toml
  nodes/NAME/wireguard.conf        for wg-quick; public keys only
  nodes/NAME/wireguard.netdev      for systemd-networkd, with wireguard.network
  nodes/NAME/wireguard.json        for networking.wireguard of NixOS
  prometheus/file_sd.json          targets with node, role, region and labels
  nix/nodes.json                   wg_ip, hostname, region, subdomain, ...
  dns.txt, dns.json                records to expect, where [fleet] has a domain

With NODE, --role, --region or --label only those nodes' files are written, and
nothing is removed. The same inventory gives the same bytes, in whatever order
it is written. All files are put in place at once or none. What a node had that
left is removed if it carries our mark; what is not ours is neither removed nor
overwritten.";

pub fn run(global: &Global, file: &Path, options: &Options) -> anyhow::Result<u8> {
    let inventory = load_inventory(file)?;
    notes(&inventory)?;
    let whole = options.nodes.is_everyone();
    let wanted = wanted(&inventory, &options.nodes)?;
    let beside = || file.parent().unwrap_or(Path::new("")).join("rendered");
    let tree = Tree::new(&options.out.clone().unwrap_or_else(beside), file)?;
    if options.check {
        let found = tree.read()?;
        let changes = tree.changes(&found, &wanted, whole)?;
        let text = match changes.are_none() {
            true => format!("{}: as the inventory says\n", tree.shown()),
            false => differences(&found, &wanted, &changes),
        };
        global.tell(&text, told(&tree, &changes))?;
        return Ok(u8::from(!changes.are_none()));
    }
    let changes = tree.write(&wanted, whole)?;
    global.tell(&summary(&tree, &wanted, &changes), told(&tree, &changes))?;
    Ok(0)
}

/// Of some nodes only their own files.
fn wanted(inventory: &Inventory, nodes: &Selection) -> anyhow::Result<Files> {
    if nodes.is_everyone() {
        return Ok(render::all(inventory));
    }
    let nodes = nodes.of(inventory)?;
    Ok(nodes.into_iter().flat_map(|node| render::of_node(inventory, node)).collect())
}

fn told(tree: &Tree, changes: &Changes) -> serde_json::Value {
    let Changes { added, changed, removed } = changes;
    json!({ "version": 1, "out": tree.shown(), "added": added, "changed": changed, "removed": removed })
}

/// One line for each file, and how many stayed.
fn summary(tree: &Tree, wanted: &Files, changes: &Changes) -> String {
    let Changes { added, changed, removed } = changes;
    let mut lines = Vec::new();
    for (sign, list) in [('-', removed), ('~', changed), ('+', added)] {
        lines.extend(list.iter().map(|path| format!("{sign} {}\n", printable(path, 200))));
    }
    let more = lines.len().saturating_sub(PATHS_MAX);
    lines.truncate(PATHS_MAX);
    let mut out = lines.concat();
    if more > 0 {
        out += &format!("... and {more} more\n");
    }
    let same = wanted.len() - added.len() - changed.len();
    out + &format!(
        "{}: {} added, {} changed, {} removed, {same} as they were\n",
        tree.shown(),
        added.len(),
        changed.len(),
        removed.len()
    )
}

/// As `diff -u` shows them: what is there, and what the inventory says.
fn differences(found: &Found, wanted: &Files, changes: &Changes) -> String {
    let mut lines = Vec::new();
    let mut more = 0;
    let paths = changes.changed.iter().chain(&changes.added).chain(&changes.removed);
    for path in paths {
        let old = found.ours.get(path).map_or("", String::as_str);
        let new = wanted.get(path).map_or("", String::as_str);
        let (from, to) = (
            if old.is_empty() { "/dev/null" } else { path },
            if new.is_empty() { "/dev/null" } else { path },
        );
        if lines.len() >= DIFF_LINES_MAX {
            more += 1;
            continue;
        }
        let diff =
            TextDiff::from_lines(old, new).unified_diff().context_radius(2).header(from, to).to_string();
        lines.extend(diff.lines().map(|line| printable(line, 400) + "\n"));
    }
    let cut = lines.len() > DIFF_LINES_MAX || more > 0;
    lines.truncate(DIFF_LINES_MAX);
    if cut {
        lines.push(format!("... and more: these are the first {DIFF_LINES_MAX} lines\n"));
    }
    let Changes { added, changed, removed } = changes;
    let (added, changed, removed) = (added.len(), changed.len(), removed.len());
    lines
        .push(format!("{added} to add, {changed} to change, {removed} to remove: spokeguard fleet render\n"));
    lines.concat()
}
