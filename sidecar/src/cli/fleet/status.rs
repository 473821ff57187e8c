//! `fleet status`: who is fine, drifting, blind or silent, as the hub hears it.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{IsTerminal, Write as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::ensure;
use clap::Args;

use super::{Format, Global, Selection, load_inventory};
use crate::fleet::history::Snapshot;
use crate::fleet::view::{Heard, Look, Overview, Place};
use crate::fleet::{Inventory, Node, role_name};
use crate::policy::{MeshKind, fingerprint};
use crate::source::{hub, looks, wireguard};
use crate::sys::clock;
use crate::terms::PublicKey;

#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub struct Options {
    #[command(flatten)]
    selection: Selection,
    /// Look again every so many seconds, until Ctrl-C
    #[arg(
        long,
        value_name = "SECONDS",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "5",
        value_parser = clap::value_parser!(u64).range(1..=3600)
    )]
    watch: Option<u64>,
    /// List the fine ones, however many they are
    #[arg(long)]
    all: bool,
    /// Keep each look there (the last 288) for `fleet report`, and say when a silent node was last heard
    #[arg(long, value_name = "DIR")]
    history: Option<PathBuf>,
}

const EXAMPLES: &str = "\
Examples:
  spokeguard fleet status                    every node, the worst first
  spokeguard fleet status --role spoke --label tier=edge
  spokeguard fleet status --watch=10         and again every 10 s

Exit codes: 0 all as their policies say, 1 some differ, 2 some could not be told.";

pub fn run(global: &Global, inventory: &Path, options: &Options) -> anyhow::Result<u8> {
    let inventory = load_inventory(inventory)?;
    let nodes = options.selection.of(&inventory)?;
    let Some(seconds) = options.watch else {
        let overview = look(&inventory, &nodes, options.history.as_deref())?;
        global.tell(&overview.to_text(global.width(), global.colour(), options.all), overview.to_json())?;
        return Ok(overview.exit_code());
    };
    ensure!(global.format != Format::Json, "--watch has no end, so it can't be one JSON document");
    let mut heard: BTreeMap<String, clock::Uptime> = BTreeMap::new();
    loop {
        let looks = looks(&inventory, &nodes, options.history.as_deref())?;
        let looks = looks.into_iter().map(|mut look| {
            match &look.heard {
                Heard::Silent(_) => {
                    look.last_heard = heard.get(&look.place.name).map(|at| at.elapsed().as_secs());
                }
                Heard::Garbled(_) | Heard::Said(_) => {
                    heard.insert(look.place.name.clone(), clock::Uptime::start());
                }
            }
            look
        });
        let overview = Overview::new(&inventory.name, clock::now(), looks.collect());
        keep(&overview, options.history.as_deref())?;
        show(global, &overview.to_text(global.width(), global.colour(), options.all), &overview)?;
        std::thread::sleep(Duration::from_secs(seconds));
    }
}

/// One screen, written over the last one; elsewhere than on a terminal one after the other.
fn show(global: &Global, text: &str, overview: &Overview) -> anyhow::Result<()> {
    if !std::io::stdout().is_terminal() {
        return global.print(&format!("{}\n{text}\n", overview.at));
    }
    let rows = rustix::termios::tcgetwinsize(std::io::stdout()).map_or(24, |size| usize::from(size.ws_row));
    let room = rows.saturating_sub(3).max(4);
    let lines: Vec<&str> = text.lines().collect();
    let mut screen = format!("\x1b[H{}  (Ctrl-C ends)\x1b[K\n", overview.at);
    for line in lines.iter().take(room) {
        let _ = writeln!(screen, "{line}\x1b[K");
    }
    if lines.len() > room {
        let _ = write!(screen, "and {} lines more\x1b[K", lines.len() - room);
    }
    screen.push_str("\x1b[J");
    let mut out = std::io::stdout().lock();
    out.write_all(screen.as_bytes())?;
    Ok(out.flush()?)
}

/// One look at these nodes, kept if there is a place for it.
pub fn look(inventory: &Inventory, nodes: &[&Node], history: Option<&Path>) -> anyhow::Result<Overview> {
    let looks = looks(inventory, nodes, history)?;
    let overview = Overview::new(&inventory.name, clock::now(), looks);
    keep(&overview, history)?;
    Ok(overview)
}

fn keep(overview: &Overview, history: Option<&Path>) -> anyhow::Result<()> {
    history.map_or(Ok(()), |folder| looks::keep(folder, &Snapshot::of(overview)))
}

/// The nodes as they answer, in their order.
pub fn looks(inventory: &Inventory, nodes: &[&Node], history: Option<&Path>) -> anyhow::Result<Vec<Look>> {
    let places: Vec<Place> = nodes
        .iter()
        .map(|node| Place {
            name: node.name.clone(),
            role: role_name(node.role).to_owned(),
            region: node.region.clone(),
            at: node.metrics_target(),
            policy: Some(fingerprint(&node.policy)),
        })
        .collect();
    let last_heard = match history {
        Some(folder) => Snapshot::last_heard(&looks::read(folder, &inventory.name)?, clock::now()),
        None => BTreeMap::new(),
    };
    let handshakes = handshakes(inventory);
    let heard = hub::ask(&places);
    let looks = places.into_iter().zip(nodes).zip(heard).map(|((place, node), heard)| {
        let handshake = node.public_key.and_then(|key| handshakes.get(&key).copied());
        let last_heard = last_heard.get(&place.name).copied();
        Look { place, heard, last_heard, handshake }
    });
    Ok(looks.collect())
}

/// Seconds since this host's end of the tunnel had a handshake with each peer. A hint only: where there
/// is no such interface, or it may not be read, nothing is claimed.
fn handshakes(inventory: &Inventory) -> BTreeMap<PublicKey, u64> {
    let interface = inventory.hub().filter(|_| inventory.mesh.kind == MeshKind::Wireguard);
    let device = interface.and_then(|hub| wireguard::read(&hub.policy.mesh.interface).ok().flatten());
    let now = clock::now();
    let peers = device.into_iter().flat_map(|device| device.peers);
    // One that is yet to come was noted before the clock was set.
    let told = peers.filter_map(|peer| Some((peer.public_key, peer.last_handshake.filter(|at| *at <= now)?)));
    told.map(|(key, at)| (key, now.seconds_since(at))).collect()
}
