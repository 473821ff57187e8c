//! `check`: one look, from the inside and from the outside, and what differs.

use clap::Args;

use super::{Format, Global, Places};
use crate::apply::trial::Ledger;
use crate::audit::View;
use crate::daemon::confirm;
use crate::desired::{Desired, is_own_table, take_out_canaries};
use crate::diff::{self, Assessment};
use crate::observed::{Facet, Probed, Reading, Snapshot};
use crate::report::Report;
use crate::source::Eyes;
use crate::source::outside::{self, Extent};
use crate::source::probe;
use crate::sys::clock;

#[derive(Args)]
pub struct Options {
    /// Do not probe this host from outside: believe what sockets and rules say
    #[arg(long)]
    no_probe: bool,
}

pub fn run(global: &Global, options: &Options) -> anyhow::Result<u8> {
    let places = global.places()?;
    if !options.no_probe {
        // A mistake is told at once; what is judged by is what the file says after the wait.
        super::policy::load(global, clock::now())?;
        probe::await_free(&places.run, super::audit::PATIENCE);
    }
    let now = clock::now();
    let (_, desired) = super::policy::load(global, now)?;
    let mut eyes = Eyes::new(&places.pin);
    let snapshot = without_canaries(eyes.look(&desired, now));
    let (snapshot, mut assessment) = if options.no_probe {
        let assessment = diff::assess(&desired, &snapshot, now);
        (snapshot, assessment)
    } else {
        probed(&desired, &places, &mut eyes, snapshot)
    };
    let ledger = Ledger::new(&places);
    let fingerprint = crate::policy::fingerprint(&desired.policy);
    let refused = ledger.refused().filter(|refused| refused.fingerprint == fingerprint);
    let before = ledger.confirmed(desired.today).map(|last| crate::policy::fingerprint(&last.policy));
    let more = refused.map(|refused| confirm::rolled_back(&refused.fingerprint, before.as_deref()));
    assessment
        .extend(more.into_iter().chain(ledger.unsealed(desired.today).as_deref().map(confirm::unsealed)));
    crate::daemon::history::read(&places.state).date(&mut assessment.findings);
    let report = Report::new(&desired, &snapshot, assessment, now);
    global.print(&match global.format {
        Format::Json => report.to_json(),
        _ => {
            let note = if options.no_probe { NOT_PROBED } else { "" };
            format!("{}{note}", report.to_text(global.width(), global.colour()))
        }
    })?;
    Ok(report.exit_code())
}

const NOT_PROBED: &str =
    "\nNot probed from outside (--no-probe): what is said of strangers is what the rules say.\n";

/// That a daemon tries, at this moment, whether it repairs its table is no drift.
fn without_canaries(mut snapshot: Snapshot) -> Snapshot {
    if let Reading::Seen(rules) = &mut snapshot.nftables {
        rules.tables.iter_mut().filter(|table| is_own_table(table)).for_each(take_out_canaries);
    }
    snapshot
}

/// The same look, and what probes met. Where they leave a doubt, the host is looked at and
/// asked a second time.
fn probed(
    desired: &Desired,
    places: &Places,
    eyes: &mut Eyes,
    mut snapshot: Snapshot,
) -> (Snapshot, Assessment) {
    let now = snapshot.at;
    let errand = |snapshot: &Snapshot, extent: &Extent| outside::Errand {
        patience: super::audit::PATIENCE,
        ..outside::errand(&View::of(desired, snapshot), &places.run, extent)
    };
    let first = match snapshot.links.gap() {
        None => outside::run(&errand(&snapshot, &Extent::All)).map(|sweeps| Probed::new(&sweeps)),
        Some(gap) => Err(anyhow::anyhow!("the interfaces could not be read: {}", gap.reason)),
    };
    snapshot.audit = Some(outside::reading(first));
    let assessment = diff::assess(desired, &snapshot, now);
    if assessment.disputed.is_empty() {
        return (snapshot, assessment);
    }
    let facets = [Facet::Nftables, Facet::Listeners, Facet::Links];
    let mut snapshot = without_canaries(eyes.look_again(desired, snapshot, &facets, now));
    let asked = outside::run(&errand(&snapshot, &Extent::Doubts(assessment.disputed.clone())));
    if let Some(Reading::Seen(probed)) = &mut snapshot.audit {
        // Not to be asked again is no reason to keep what was found to oneself.
        let later = Probed::new(&asked.unwrap_or_default());
        probed.update(&later.sweeps, &assessment.disputed);
    }
    let assessment = diff::assess(desired, &snapshot, now);
    (snapshot, assessment)
}
