//! `fleet report`: the fleet as one page for people, that needs nothing but itself.

use std::path::{Path, PathBuf};

use clap::Args;

use super::{Global, Selection, load_inventory, status};
use crate::fleet::history::{Snapshot, Trends};
use crate::fleet::{Inventory, Node, page};
use crate::source::{looks, prometheus};
use crate::sys::clock;

#[derive(Args)]
pub struct Options {
    #[command(flatten)]
    selection: Selection,
    /// Where to write the page; - is standard output
    #[arg(long, value_name = "FILE")]
    html: PathBuf,
    /// Take timelines and traffic from this Prometheus, such as http://127.0.0.1:9090
    #[arg(long, value_name = "URL")]
    prometheus: Option<String>,
    /// Keep this look there (the last 288), and take timelines and traffic from those kept
    #[arg(long, value_name = "DIR")]
    history: Option<PathBuf>,
    /// How far back
    #[arg(long, value_name = "HOURS", default_value_t = 24, value_parser = clap::value_parser!(u16).range(1..=2400))]
    hours: u16,
}

pub fn run(global: &Global, inventory: &Path, options: &Options) -> anyhow::Result<u8> {
    let inventory = load_inventory(inventory)?;
    let nodes = options.selection.of(&inventory)?;
    let overview = status::look(&inventory, &nodes, options.history.as_deref())?;
    let seconds = i64::from(options.hours) * 3600;
    let trends = match (&options.prometheus, &options.history) {
        (Some(url), _) => asked(&inventory, &nodes, url, seconds)?,
        (None, Some(folder)) => {
            Trends::of_snapshots(&looks::read(folder, &inventory.name)?, overview.at, seconds)
        }
        (None, None) => Trends::of_snapshots(&[Snapshot::of(&overview)], overview.at, seconds),
    };
    let page = page::render(&overview, &trends);
    if options.html == Path::new("-") {
        global.print(&page)?;
    } else {
        looks::replace(&options.html, page.as_bytes(), 0o644)?;
        if !global.quiet {
            eprintln!("{} nodes in {}", overview.looks.len(), options.html.display());
        }
    }
    Ok(overview.exit_code())
}

fn asked(inventory: &Inventory, nodes: &[&Node], url: &str, seconds: i64) -> anyhow::Result<Trends> {
    let to = clock::now().0.as_second();
    let instances = nodes.iter().map(|node| (node.metrics_target(), node.name.clone())).collect();
    let range = prometheus::Range { url, from: to - seconds, to, instances: &instances };
    let rate = |direction: &str| {
        let traffic = format!("spokeguard_bytes_total{{scope=\"public\",direction=\"{direction}\"}}");
        format!("sum by (instance, node) (rate({traffic}[{}s]))", range.step().max(300))
    };
    let verdicts = range.ask("max by (instance, node) (spokeguard_verdict)")?;
    let (inward, outward) = (range.ask(&rate("in"))?, range.ask(&rate("out"))?);
    let source = format!("Prometheus of {}", inventory.name);
    Ok(Trends::new(range.from, range.to, &source).of_series(&verdicts, &inward, &outward))
}
