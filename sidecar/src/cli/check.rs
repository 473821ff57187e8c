//! `check`: one look, and what differs.

use super::{Format, Global};
use crate::apply::trial::Ledger;
use crate::daemon::confirm;
use crate::diff;
use crate::report::Report;
use crate::source::Eyes;
use crate::sys::clock;

pub fn run(global: &Global) -> anyhow::Result<u8> {
    let now = clock::now();
    let (_, desired) = super::policy::load(global, now)?;
    let places = global.places()?;
    let mut eyes = Eyes::new(&places.pin);
    let snapshot = eyes.look(&desired, now);
    let mut assessment = diff::assess(&desired, &snapshot, now);
    let ledger = Ledger::new(&places);
    let fingerprint = crate::policy::fingerprint(&desired.policy);
    let refused = ledger.refused().filter(|refused| refused.fingerprint == fingerprint);
    let more = refused.map(|refused| confirm::rolled_back(&refused.fingerprint, None));
    assessment
        .extend(more.into_iter().chain(ledger.unsealed(desired.today).as_deref().map(confirm::unsealed)));
    crate::daemon::history::read(&places.state).date(&mut assessment.findings);
    let report = Report::new(&desired, &snapshot, assessment, now);
    global.print(&match global.format {
        Format::Json => report.to_json(),
        Format::Text | Format::Xml => report.to_text(global.width(), global.colour()),
    })?;
    Ok(report.exit_code())
}
