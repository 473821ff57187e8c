//! `fleet audit`: every node from outside, beside what its policy and its own audit say.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::Path;

use clap::Args;

use super::{Global, Selection, load_inventory, status, today};
use crate::audit::{Audit, Ports, Scan, well_known};
use crate::cli::audit::{Line, Protos};
use crate::desired::Desired;
use crate::fleet::side::{Compared, Outside, SideBySide};
use crate::source::scan;
use crate::sys::clock;
use crate::terms::{Port, Proto};

#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub struct Options {
    #[command(flatten)]
    selection: Selection,
    /// Only these ports: 22,80,8000-8100, or - for all [default: those that policies name and
    /// well-known ones]
    #[arg(long, short, value_name = "LIST", allow_hyphen_values = true)]
    ports: Option<Ports>,
    #[command(flatten)]
    protos: Protos,
    /// Probes a second at most, for all nodes together
    #[arg(long, value_name = "N", default_value_t = 10_000, value_parser = clap::value_parser!(u32).range(1..=10_000_000))]
    rate: u32,
}

const EXAMPLES: &str = "\
Examples:
  spokeguard fleet audit                   what does this host reach?
  spokeguard fleet audit oslo -p - --tcp   every TCP port of one node

Exit codes: 0 as the policies say, 1 some differ, 2 some could not be told.";

pub fn run(global: &Global, inventory: &Path, options: &Options) -> anyhow::Result<u8> {
    let inventory = load_inventory(inventory)?;
    let nodes = options.selection.of(&inventory)?;
    let (started, clock) = (clock::now(), clock::Uptime::start());
    let mut desired: Vec<Desired> = Vec::new();
    for node in &nodes {
        desired.push(Desired::new(node.policy.clone(), today(started))?);
    }
    let looks = status::looks(&inventory, &nodes, None)?;
    let addresses: BTreeSet<IpAddr> =
        nodes.iter().flat_map(|node| node.public_address.iter().copied()).collect();
    let ports = options.ports(&desired);
    let mut scans = options.scan(global, &addresses.into_iter().collect::<Vec<_>>(), &ports, &desired)?;
    let seconds = clock.elapsed().as_secs_f64();
    let compared = nodes.iter().zip(&desired).zip(&looks).map(|((node, desired), look)| {
        let mine: Vec<Scan> = node.public_address.iter().filter_map(|a| scans.remove(a)).flatten().collect();
        // A packet to oneself goes by no interface that a stranger's comes by.
        let myself = |scan: &Scan| scan.source == Some(scan.address);
        let outside = if mine.is_empty() {
            Outside::NoAddress
        } else if mine.iter().any(myself) {
            Outside::Myself
        } else {
            Outside::Met(Audit::remote(&mine, Some(desired), started, seconds))
        };
        Compared::new(look, outside)
    });
    let all = SideBySide::new(&inventory.name, started, seconds, ports.len(), compared.collect());
    global.tell(&all.to_text(global.width(), global.colour()), all.to_json())?;
    Ok(all.verdict().exit_code())
}

impl Options {
    fn ports(&self, desired: &[Desired]) -> Vec<Port> {
        if let Some(ports) = &self.ports {
            return ports.to_vec();
        }
        let named = desired.iter().flat_map(|desired| &desired.services).map(|service| service.port);
        let known = Proto::ALL.into_iter().flat_map(well_known);
        named.chain(known).collect::<BTreeSet<Port>>().into_iter().collect()
    }

    fn scan(
        &self,
        global: &Global,
        addresses: &[IpAddr],
        ports: &[Port],
        desired: &[Desired],
    ) -> anyhow::Result<BTreeMap<IpAddr, Vec<Scan>>> {
        let services = desired.iter().flat_map(|desired| &desired.services);
        let likely: BTreeSet<Port> = services.filter(|s| s.is_for_anyone()).map(|s| s.port).collect();
        let mut out: BTreeMap<IpAddr, Vec<Scan>> = BTreeMap::new();
        let mut progress = Line::new(global);
        for some in addresses.chunks(scan::TARGETS_MAX) {
            let request = scan::Request {
                targets: some.iter().map(|address| (*address, None)).collect(),
                protos: self.protos.list(),
                ports: ports.to_vec(),
                rate: Some(self.rate),
                source: None,
                likely: likely.iter().copied().collect(),
            };
            let scans =
                scan::scan(&request, &mut |at| progress.show(at.sent, at.total, at.per_second, at.left))?;
            scans.into_iter().for_each(|scan| out.entry(scan.address).or_default().push(scan));
        }
        progress.end();
        Ok(out)
    }
}
