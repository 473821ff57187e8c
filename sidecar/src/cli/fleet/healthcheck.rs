//! `fleet healthcheck` and `fleet gate`: may a node be built upon?

use std::path::Path;
use std::time::Duration;

use clap::Args;

use super::{Global, Selection, load_inventory, one, say, status};
use crate::fleet::health::{Check, Checkup, Health, Outcome, What, by_words};
use crate::fleet::{Inventory, Node};
use crate::source::hub;
use crate::source::reach::{self, Terms};
use crate::sys::clock;

/// Nodes checked side by side; most of a check is waiting.
const SIDE_BY_SIDE: usize = 32;
/// Between two looks of a gate.
pub const AGAIN: Duration = Duration::from_secs(1);

#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub struct Options {
    #[command(flatten)]
    selection: Selection,
    #[command(flatten)]
    checks: Checks,
}

/// What a healthy node is.
#[derive(Args, Clone, Debug)]
pub struct Checks {
    /// Leave a check out; may be repeated
    #[arg(long, value_name = "CHECK", value_enum, hide_possible_values = true)]
    skip: Vec<What>,
    /// The page that has to answer 200
    #[arg(long, value_name = "PATH", default_value = "/", value_parser = path)]
    path: String,
    /// Days that a certificate must have left
    #[arg(long, value_name = "DAYS", default_value_t = 14)]
    certificate_days: u32,
}

const EXAMPLES: &str = "\
Checks: ping and handshake through the tunnel; metrics, policy, heartbeat by
the node's own word; https and certificate at its public addresses; ssh through
the tunnel, and ssh-public: to nobody else. A node is asked only for what its
policy has. What could not be tried is unknown, and never a pass.

Exit codes: 0 all healthy, 1 something failed, 2 something could not be told.";

#[derive(Args)]
pub struct Gate {
    /// The node that has to be healthy
    node: String,
    /// How long it may take to become so
    #[arg(long, value_name = "TIME", default_value = "2m", value_parser = humantime::parse_duration)]
    wait: Duration,
    #[command(flatten)]
    checks: Checks,
}

fn path(text: &str) -> Result<String, String> {
    let right = text.starts_with('/') && text.len() <= 1024 && text.bytes().all(|b| b.is_ascii_graphic());
    if right { Ok(text.to_owned()) } else { Err("write a path such as /alive".to_owned()) }
}

pub fn run(global: &Global, inventory: &Path, options: &Options) -> anyhow::Result<u8> {
    let inventory = load_inventory(inventory)?;
    let nodes = options.selection.of(&inventory)?;
    let checkup = options.checks.examine(&inventory, &nodes)?;
    global.tell(&checkup.to_text(global.width(), global.colour()), checkup.to_json())?;
    Ok(checkup.exit_code())
}

pub fn gate(global: &Global, inventory: &Path, options: &Gate) -> anyhow::Result<u8> {
    let inventory = load_inventory(inventory)?;
    let nodes = [one(&inventory, &options.node)?];
    let clock = clock::Uptime::start();
    let mut told = String::new();
    let checkup = loop {
        let checkup = options.checks.examine(&inventory, &nodes)?;
        if checkup.outcome() == Outcome::Pass || clock.elapsed() + AGAIN > options.wait {
            break checkup;
        }
        let complaints = checkup.complaints();
        if complaints != told {
            say(global, &format!("not yet: {complaints}"));
            told = complaints;
        }
        std::thread::sleep(AGAIN);
    };
    global.tell(&checkup.to_text(global.width(), global.colour()), checkup.to_json())?;
    Ok(checkup.exit_code())
}

impl Checks {
    /// Every check of these nodes, side by side.
    pub fn examine(&self, inventory: &Inventory, nodes: &[&Node]) -> anyhow::Result<Checkup> {
        use clap::ValueEnum;
        let wanted: Vec<What> =
            What::value_variants().iter().copied().filter(|what| !self.skip.contains(what)).collect();
        let terms = Terms { wanted, path: self.path.clone(), certificate_days: self.certificate_days };
        let trust = reach::trust();
        let looks = status::looks(inventory, nodes, None)?;
        let reached = hub::each(nodes, SIDE_BY_SIDE, |node| {
            let domains = inventory.domains(node);
            reach::checks(node, domains.first().map(String::as_str), &terms, &trust)
        });
        let health = nodes.iter().zip(&looks).zip(reached).map(|((node, look), reached)| {
            let not_tried = || vec![Check::unknown(What::Ping, "this host had no thread to try with")];
            let mut checks = reached.unwrap_or_else(not_tried);
            let words = by_words(look, &node.policy).into_iter();
            checks.extend(words.filter(|check| terms.wanted.contains(&check.what)));
            checks.sort_by_key(|check| check.what);
            Health { node: node.name.clone(), checks }
        });
        Ok(Checkup { fleet: inventory.name.clone(), at: clock::now(), nodes: health.collect() })
    }
}
