//! `_status.json`: the state of this node for whoever polls a share.

use serde::Serialize;

use super::Payload;
use crate::diff::Finding;
use crate::observed::Facet;
use crate::report::{Report, Verdict};
use crate::terms::Stamp;

#[derive(Serialize)]
struct Status<'a> {
    version: u32,
    node: &'a str,
    /// When this was written: an old one tells that nobody writes any more.
    at: Stamp,
    ok: bool,
    verdict: Verdict,
    checks: Vec<Check>,
    payload: &'a Payload,
}

#[derive(Serialize)]
struct Check {
    name: &'static str,
    ok: bool,
    /// What differs, or could not be read.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    detail: Vec<String>,
}

/// A check for each facet of the host; `ok` is false where it differs or could not be read.
pub fn render(report: &Report, payload: &Payload, now: Stamp) -> String {
    let check = |facet: Facet| {
        let here = |finding: &&Finding| finding.is_drift() && facet_of(finding) == facet;
        let told =
            |finding: &Finding| format!("{} {}: {}", finding.code.name(), finding.subject, finding.found);
        let differs = report.findings.iter().filter(here).map(told);
        let blind = report
            .blind
            .iter()
            .filter(|blind| blind.facet == facet)
            .map(|blind| format!("blind: {}", blind.reason));
        let detail: Vec<String> = differs.chain(blind).take(DETAILS_MAX).collect();
        Check { name: facet.name(), ok: detail.is_empty(), detail }
    };
    let status = Status {
        version: 1,
        node: &report.node,
        at: now,
        ok: report.verdict == Verdict::Ok,
        verdict: report.verdict,
        checks: Facet::ALL.into_iter().map(check).collect(),
        payload,
    };
    let mut text = serde_json::to_string_pretty(&status).unwrap_or_default();
    text.push('\n');
    text
}

const DETAILS_MAX: usize = 32;

fn facet_of(finding: &Finding) -> Facet {
    finding.facet.or(finding.code.facets().first().copied()).unwrap_or(Facet::Nftables)
}

#[cfg(test)]
mod tests {
    use super::super::tests::{finding, report};
    use super::*;
    use crate::diff::{Code, Severity};
    use crate::report::Blind;

    #[test]
    fn every_facet_is_a_check_and_says_what_is_wrong() {
        let exposed = finding(Code::ListenerExposed, Severity::Critical, "tcp/0.0.0.0:5432");
        let accepted =
            Finding { accepted: true, ..finding(Code::ExceptionOpen, Severity::Info, "emergency-ssh") };
        let mut report = report(&[exposed, accepted]);
        report.blind = vec![Blind { facet: Facet::Wireguard, reason: "no such device".into() }];
        let payload = Payload { node: "oslo".into(), ram_mb: Some(7), ..Payload::default() };
        let text = render(&report, &payload, Stamp::from_unix(1_795_000_030));
        let json: serde_json::Value = serde_json::from_str(&text).expect("JSON");
        assert_eq!((&json["ok"], &json["verdict"]), (&false.into(), &"drift".into()));
        assert_eq!(json["at"], "2026-11-18T11:07:10.000Z");
        assert_eq!(json["payload"]["ram_mb"], 7);
        let checks = json["checks"].as_array().expect("checks");
        assert_eq!(checks.len(), Facet::ALL.len());
        let bad: Vec<String> = checks
            .iter()
            .filter(|c| c["ok"] == false)
            .map(|c| format!("{} {}", c["name"], c["detail"]))
            .collect();
        assert_eq!(
            bad,
            [
                r#""listeners" ["listener-exposed tcp/0.0.0.0:5432: anyone gets in"]"#,
                r#""wireguard" ["blind: no such device"]"#
            ]
        );
        let fine = render(&super::super::tests::report(&[]), &payload, Stamp::from_unix(0));
        assert!(
            fine.contains("\"ok\": true") && !fine.contains("detail") && !fine.contains("false"),
            "{fine}"
        );
    }
}
