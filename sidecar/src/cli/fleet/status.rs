//! `fleet status`: who is fine, drifting, blind or silent, as the hub hears it.

use std::collections::BTreeMap;
use std::io::{IsTerminal, Write as _};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, TryRecvError};
use std::time::Duration;

use anyhow::{bail, ensure};
use clap::Args;

use super::{FAILED, Format, Global, Selection, load_inventory};
use crate::cli::screen::{Screen, TICK, Wish};
use crate::fleet::history::Snapshot;
use crate::fleet::view::{Heard, Look, Overview, Place};
use crate::fleet::{Inventory, Node, role_name};
use crate::policy::{MeshKind, fingerprint};
use crate::source::{hub, looks, wireguard};
use crate::sys::clock;
use crate::terms::PublicKey;

#[derive(Args, Clone)]
#[command(after_help = EXAMPLES)]
pub struct Options {
    #[command(flatten)]
    selection: Selection,
    /// Look again every so many seconds (5 where none are said), until q or Ctrl-C
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
    drop(nodes);
    let Options { selection, history, all, .. } = options.clone();
    let mut watch = Watch { inventory, selection, history, heard: BTreeMap::new() };
    let every = Duration::from_secs(seconds);
    if std::io::stdout().is_terminal() {
        return live(global, watch, every, all);
    }
    loop {
        let overview = watch.look()?;
        let text = overview.to_text(global.width(), global.colour(), all);
        global.print(&format!("{}\n{text}\n", overview.at))?;
        std::thread::sleep(every);
    }
}

/// Looks that follow each other: each knows whom those before it heard.
struct Watch {
    inventory: Inventory,
    selection: Selection,
    history: Option<PathBuf>,
    heard: BTreeMap<String, clock::Uptime>,
}

impl Watch {
    fn look(&mut self) -> anyhow::Result<Overview> {
        let nodes = self.selection.of(&self.inventory)?;
        let mut looks = looks(&self.inventory, &nodes, self.history.as_deref())?;
        for look in &mut looks {
            let name = &look.place.name;
            match &look.heard {
                Heard::Silent(_) => {
                    let before = self.heard.get(name).map(|at| at.elapsed().as_secs());
                    look.last_heard = before.or(look.last_heard);
                }
                Heard::Garbled(_) | Heard::Said(_) => {
                    self.heard.insert(name.clone(), clock::Uptime::start());
                }
            }
        }
        let overview = Overview::new(&self.inventory.name, clock::now(), looks);
        keep(&overview, self.history.as_deref())?;
        Ok(overview)
    }
}

/// A screen that is written over until somebody wants it to end; then the last look counts.
fn live(global: &Global, mut watch: Watch, every: Duration, all: bool) -> anyhow::Result<u8> {
    let mut screen = Screen::open()?;
    let (tell, told) = mpsc::channel();
    // A look takes as long as its slowest node, and no key is to wait for that.
    std::thread::spawn(move || {
        loop {
            let look = watch.look();
            let failed = look.is_err();
            if tell.send(look).is_err() || failed {
                return;
            }
            std::thread::sleep(every);
        }
    });
    let mut last: Option<Overview> = None;
    let mut draw = true;
    loop {
        match told.try_recv() {
            Ok(overview) => {
                last = Some(overview?);
                draw = true;
            }
            Err(TryRecvError::Empty) => {}
            Err(TryRecvError::Disconnected) => bail!("the thread that looks is gone"),
        }
        if std::mem::take(&mut draw) {
            show(global, last.as_ref(), all)?;
        }
        match screen.wait(TICK)? {
            Wish::End => return Ok(last.map_or(FAILED, |overview| overview.exit_code())),
            Wish::Redraw => draw = true,
            Wish::None => {}
        }
    }
}

fn show(global: &Global, overview: Option<&Overview>, all: bool) -> anyhow::Result<()> {
    let rows = rustix::termios::tcgetwinsize(std::io::stdout()).map_or(24, |size| usize::from(size.ws_row));
    let mut lines = match overview {
        None => vec!["looking; q ends".to_owned()],
        Some(overview) => {
            let text = overview.to_text(global.width(), global.colour(), all);
            let head = format!("{}  (q ends)", overview.at);
            std::iter::once(head).chain(text.lines().map(str::to_owned)).collect()
        }
    };
    if lines.len() > rows {
        let kept = rows.saturating_sub(1);
        let left_out = format!("and {} lines more", lines.len() - kept);
        lines.truncate(kept);
        lines.push(left_out);
    }
    // Raw: a line's end doesn't go to the next line's begin by itself.
    let screen = format!("\x1b[H{}\x1b[K\x1b[J", lines.join("\x1b[K\r\n"));
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
