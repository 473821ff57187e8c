//! The face of a finished cycle: verdict, findings, blind facets; as JSON and as text. Pure.

use serde::{Deserialize, Serialize};

use crate::desired::Desired;
use crate::diff::{self, Assessment, Finding};
use crate::observed::{Facet, Snapshot};
use crate::terms::{Stamp, printable};

mod history;
mod text;

pub use history::{History, Transition};

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    Ok,
    Drift,
    Unknown,
}

/// The JSON of `check` (version 1 of the contract).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    pub version: u32,
    pub node: String,
    pub verdict: Verdict,
    pub at: Stamp,
    pub findings: Vec<Finding>,
    pub blind: Vec<Blind>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Blind {
    pub facet: Facet,
    pub reason: String,
}

impl Verdict {
    /// As scripts know it: 0 as the policy says, 1 it differs, 2 could not tell.
    pub const fn exit_code(self) -> u8 {
        match self {
            Verdict::Ok => 0,
            Verdict::Drift => 1,
            Verdict::Unknown => 2,
        }
    }

    pub const fn name(self) -> &'static str {
        match self {
            Verdict::Ok => "ok",
            Verdict::Drift => "drift",
            Verdict::Unknown => "unknown",
        }
    }
}

impl Report {
    /// Blind and doubtful come before drift: what was found is listed all the same, but who
    /// could not look at everything must not be read as "this is all there is".
    pub fn new(desired: &Desired, snapshot: &Snapshot, assessment: Assessment, now: Stamp) -> Self {
        let Assessment { findings, doubts, .. } = assessment;
        let gaps = diff::needed(desired)
            .into_iter()
            .filter_map(|facet| Some(Blind { facet, reason: printable(&snapshot.gap(facet)?.reason, 600) }));
        let doubts =
            doubts.into_iter().map(|(facet, text)| Blind { facet, reason: format!("cannot tell {text}") });
        let blind: Vec<Blind> = gaps.chain(doubts).collect();
        let verdict = if !blind.is_empty() {
            Verdict::Unknown
        } else if findings.iter().any(Finding::is_drift) {
            Verdict::Drift
        } else {
            Verdict::Ok
        };
        Self { version: 1, node: printable(&desired.policy.node.name, 64), verdict, at: now, findings, blind }
    }

    pub const fn exit_code(&self) -> u8 {
        self.verdict.exit_code()
    }

    /// The contract's document, with a newline at its end.
    pub fn to_json(&self) -> String {
        // Only maps with odd keys and failing Serialize impls can fail; there are none.
        let mut text = serde_json::to_string_pretty(self).unwrap_or_default();
        text.push('\n');
        text
    }

    /// For a terminal of this width; with ANSI colours only if asked.
    pub fn to_text(&self, width: usize, colour: bool) -> String {
        text::render(self, width, colour)
    }
}

#[cfg(test)]
mod tests {
    use expect_test::expect;

    use super::*;
    use crate::diff::stage::{Stage, exception, now};
    use crate::diff::{Code, Severity, assess};
    use crate::policy::MeshKind;
    use crate::ruleset::{Hook, Statement, TableFamily};

    fn report(stage: Stage) -> Report {
        let (desired, snapshot) = stage.set();
        Report::new(&desired, &snapshot, assess(&desired, &snapshot, now()), now())
    }

    /// Drift, an accepted risk and a blind facet in one.
    fn everything() -> Report {
        let stage = Stage::spoke()
            .without_our_table()
            .listens("tcp 0.0.0.0:5432 postgres")
            .policy(|p| p.exceptions.push(exception(2222, jiff::civil::date(2027, 1, 31))))
            .blind(Facet::Counters);
        let mut report = report(stage);
        for finding in report.findings.iter_mut().filter(|f| f.code == Code::ListenerExposed) {
            finding.since = Some(Stamp::from_unix(crate::diff::stage::NOW - 420));
            if let Some(actor) = &mut finding.by {
                actor.unit = Some("postgresql.service".into());
            }
        }
        report
    }

    #[test]
    fn the_verdict_is_ok_only_if_all_was_seen_and_nothing_differs() {
        let of = |stage| {
            let report = report(stage);
            (report.verdict, report.exit_code())
        };
        let drift = || Stage::spoke().listens("tcp 0.0.0.0:5432 db");
        let hole =
            || Stage::spoke().policy(|p| p.exceptions.push(exception(2222, jiff::civil::date(2027, 1, 31))));
        assert_eq!(of(Stage::spoke()), (Verdict::Ok, 0));
        assert_eq!(of(hole()), (Verdict::Ok, 0), "an accepted risk changes nothing");
        assert_eq!(of(drift()), (Verdict::Drift, 1));
        for facet in Facet::ALL {
            // No [[file]] in this policy, and no Tailscale: nobody asks.
            let expected = match facet {
                Facet::Files | Facet::Tailscale => (Verdict::Ok, 0),
                // A finding, and no reason to doubt the rest.
                Facet::Binds => (Verdict::Drift, 1),
                _ => (Verdict::Unknown, 2),
            };
            assert_eq!(of(Stage::spoke().blind(facet)), expected, "{facet}");
        }
        let facets = || Facet::ALL.into_iter().filter(|facet| *facet != Facet::Tailscale);
        for mask in 1..1 << facets().count() {
            let blind: Vec<Facet> =
                (0..).zip(facets()).filter(|(i, _)| mask >> i & 1 == 1).map(|(_, facet)| facet).collect();
            let (verdict, code) = of(blind.iter().fold(drift(), |stage, facet| stage.blind(*facet)));
            let expected = match blind.as_slice() {
                [Facet::Files] | [Facet::Binds] | [Facet::Files, Facet::Binds] => (Verdict::Drift, 1),
                _ => (Verdict::Unknown, 2),
            };
            assert_eq!((verdict, code), expected, "{blind:?}");
        }
        let both = report(drift().blind(Facet::Wireguard));
        assert_eq!(both.verdict, Verdict::Unknown);
        assert!(both.findings.iter().any(|f| f.code == Code::ListenerWide), "and still says what it found");
        let tailscale =
            || Stage::spoke().policy(|p| (p.mesh.kind, p.mesh.keepalive) = (MeshKind::Tailscale, None));
        assert_eq!(of(tailscale().blind(Facet::Wireguard)), (Verdict::Ok, 0));
        assert_eq!(of(tailscale().blind(Facet::Tailscale)), (Verdict::Unknown, 2));
    }

    #[test]
    fn a_doubt_keeps_the_verdict_from_being_ok() {
        let rule = vec![crate::diff::stage::dport(443), Statement::Unknown("{\"queue\":{}}".into())];
        let chain = crate::diff::stage::chain(Hook::Input, 0, false, vec![rule]);
        let report =
            report(Stage::spoke().foreign(crate::diff::stage::table(TableFamily::Inet, "ips", chain)));
        assert_eq!((report.verdict, report.findings.len()), (Verdict::Unknown, 0));
        assert!(report.blind[0].reason.starts_with("cannot tell whether https tcp/443 ipv4"), "{report:?}");
    }

    #[test]
    fn the_json_is_the_contract() {
        expect![[r#"
            {
              "version": 1,
              "node": "singapore",
              "verdict": "unknown",
              "at": "2026-11-21T08:27:03.000Z",
              "findings": [
                {
                  "code": "firewall-missing",
                  "severity": "critical",
                  "subject": "table inet spokeguard",
                  "wanted": "the policy's table, in force",
                  "found": "there is no such table",
                  "by": null,
                  "since": null,
                  "accepted": false,
                  "next": "Put it back with `spokeguard apply`, or keep `spokeguard run` going, which does it at once."
                },
                {
                  "code": "listener-exposed",
                  "severity": "critical",
                  "subject": "tcp/0.0.0.0:5432",
                  "wanted": "closed to the public: the policy names no such port",
                  "found": "a stranger gets in through eth0 over ipv4; table inet spokeguard is not there",
                  "by": {
                    "pid": 812,
                    "process": "postgres",
                    "unit": "postgresql.service"
                  },
                  "since": "2026-11-21T08:20:03.000Z",
                  "accepted": false,
                  "next": "Stop postgres, bind it to loopback or 10.84.0.16 and fd84::16, or declare the port under [public], as a [[mesh.service]] or as an [[exception]]."
                },
                {
                  "code": "mesh-leak",
                  "severity": "high",
                  "subject": "10.84.0.16",
                  "wanted": "answers on wg0 only",
                  "found": "a neighbour on eth0 gets to tcp/22, tcp/9984 and tcp/19999; table inet spokeguard is not there",
                  "by": null,
                  "since": null,
                  "accepted": false,
                  "next": "Put our table in force with `spokeguard apply`; it drops what is sent to 10.84.0.16 and does not come through wg0."
                },
                {
                  "code": "mesh-leak",
                  "severity": "high",
                  "subject": "fd84::16",
                  "wanted": "answers on wg0 only",
                  "found": "a neighbour on eth0 gets to tcp/22, tcp/9984 and tcp/19999; table inet spokeguard is not there",
                  "by": null,
                  "since": null,
                  "accepted": false,
                  "next": "Put our table in force with `spokeguard apply`; it drops what is sent to fd84::16 and does not come through wg0."
                },
                {
                  "code": "control-unproven",
                  "severity": "high",
                  "subject": "control counters",
                  "wanted": "packets counted by policy service",
                  "found": "could not be seen: needs CAP_NET_ADMIN: run as root",
                  "by": null,
                  "since": null,
                  "accepted": false,
                  "next": "Give spokeguard CAP_BPF, CAP_NET_ADMIN and a bpffs; the rest works without it."
                },
                {
                  "code": "exception-open",
                  "severity": "info",
                  "subject": "exception emergency-ssh",
                  "wanted": "declared until 2027-01-31: way in when the mesh is down",
                  "found": "tcp/2222 is open to 0.0.0.0/0 and ::/0",
                  "by": null,
                  "since": null,
                  "accepted": true,
                  "next": "Nothing until 2027-01-31, when it closes by itself; ask ops whether it is still needed."
                }
              ],
              "blind": [
                {
                  "facet": "counters",
                  "reason": "needs CAP_NET_ADMIN: run as root"
                }
              ]
            }
        "#]].assert_eq(&everything().to_json());
        let text = everything().to_json();
        let mut back: Report = serde_json::from_str(&text).expect("our own document");
        for (read, written) in back.findings.iter_mut().zip(everything().findings) {
            read.facet = written.facet;
        }
        assert_eq!(back, everything());
        assert!(text.ends_with("}\n") && text.matches('\n').count() > 20);
    }

    #[test]
    fn the_text_fits_a_terminal() {
        expect![[r#"
            singapore: differs, and could not tell all               2026-11-21 08:27:03 UTC

            CRITICAL
              firewall-missing  table inet spokeguard
                  wanted  the policy's table, in force
                  found   there is no such table
                  next    Put it back with `spokeguard apply`, or keep `spokeguard run`
                          going, which does it at once.
              listener-exposed  tcp/0.0.0.0:5432
                  wanted  closed to the public: the policy names no such port
                  found   a stranger gets in through eth0 over ipv4; table inet spokeguard
                          is not there
                  by      postgres (pid 812, postgresql.service)
                  since   2026-11-21 08:20:03 UTC, 7 min ago
                  next    Stop postgres, bind it to loopback or 10.84.0.16 and fd84::16, or
                          declare the port under [public], as a [[mesh.service]] or as an
                          [[exception]].

            HIGH
              mesh-leak  10.84.0.16
                  wanted  answers on wg0 only
                  found   a neighbour on eth0 gets to tcp/22, tcp/9984 and tcp/19999; table
                          inet spokeguard is not there
                  next    Put our table in force with `spokeguard apply`; it drops what is
                          sent to 10.84.0.16 and does not come through wg0.
              mesh-leak  fd84::16
                  wanted  answers on wg0 only
                  found   a neighbour on eth0 gets to tcp/22, tcp/9984 and tcp/19999; table
                          inet spokeguard is not there
                  next    Put our table in force with `spokeguard apply`; it drops what is
                          sent to fd84::16 and does not come through wg0.
              control-unproven  control counters
                  wanted  packets counted by policy service
                  found   could not be seen: needs CAP_NET_ADMIN: run as root
                  next    Give spokeguard CAP_BPF, CAP_NET_ADMIN and a bpffs; the rest works
                          without it.

            ACCEPTED RISKS, declared by the policy
              exception-open  exception emergency-ssh
                  wanted  declared until 2027-01-31: way in when the mesh is down
                  found   tcp/2222 is open to 0.0.0.0/0 and ::/0
                  next    Nothing until 2027-01-31, when it closes by itself; ask ops
                          whether it is still needed.

            COULD NOT TELL
              counters   needs CAP_NET_ADMIN: run as root

            2 critical, 3 high, 1 accepted and 1 not answered.
            `spokeguard explain firewall-missing` tells more.
        "#]]
        .assert_eq(&everything().to_text(80, false));
        expect![[r#"
            singapore: as the policy says                            2026-11-21 08:27:03 UTC

            No findings.
        "#]]
        .assert_eq(&report(Stage::spoke()).to_text(80, false));
        for width in [0, 40, 60, 80, 120] {
            let text = everything().to_text(width, false);
            // The first line holds the node's name, which is as long as it is.
            let longest = text.lines().skip(1).map(|line| line.chars().count()).max().unwrap_or(0);
            assert!(longest <= width.max(40), "{longest} columns for {width}:\n{text}");
            assert!(!text.contains('\x1b') && !text.lines().any(|line| line.ends_with(' ')), "{text}");
        }
    }

    #[test]
    fn colour_comes_only_when_asked_and_changes_no_letter() {
        let coloured = everything().to_text(80, true);
        assert!(coloured.contains("\x1b[1;31mCRITICAL\x1b[0m"));
        let ink = |part: &'static str| {
            part.strip_prefix('[').and_then(|p| p.split_once('m')).map_or(part, |(_, ink)| ink)
        };
        let plain: String = coloured.leak().split('\x1b').map(ink).collect();
        assert_eq!(plain, everything().to_text(80, false));
    }

    #[test]
    fn names_from_strangers_can_not_write_on_the_terminal() {
        let mut report = everything();
        let evil = "\x1b[2J\u{202e}gnp\r\nCRITICAL";
        report.node = evil.into();
        report.blind[0].reason = evil.into();
        for finding in &mut report.findings {
            finding.subject = evil.into();
            finding.found = evil.repeat(50);
            finding.by = Some(crate::terms::Actor {
                pid: 1,
                process: evil.into(),
                unit: Some(evil.into()),
                user: None,
            });
        }
        let text = report.to_text(80, false);
        assert!(!text.contains(['\x1b', '\r', '\u{202e}']));
        assert!(text.lines().all(|line| line.chars().count() <= 80));
    }

    #[test]
    fn a_finding_keeps_its_beginning_until_it_was_looked_for_and_gone() {
        let look = |history: &mut History, stage: Stage, at: i64| {
            let (desired, snapshot) = stage.set();
            let at = Stamp::from_unix(at);
            let mut findings = assess(&desired, &snapshot, at).findings;
            let transitions = history.update(&mut findings, &snapshot, at);
            let since: Vec<i64> = findings.iter().filter_map(|f| f.since).map(|s| s.0.as_second()).collect();
            let events: Vec<String> = transitions
                .iter()
                .map(|t| match t {
                    Transition::Appeared { finding } => format!("+{}", finding.code),
                    Transition::Changed { finding, was } => {
                        format!("{}~{}", was.name(), finding.severity.name())
                    }
                    Transition::Cleared { finding } => format!("-{}", finding.code),
                })
                .collect();
            (events.join(" "), since)
        };
        let start = crate::diff::stage::NOW;
        let off = || Stage::spoke().device(|d| d.peers[0].keepalive = 0);
        let mut history = History::default();
        assert_eq!(look(&mut history, off(), start), ("+mesh-keepalive".into(), vec![start]));
        assert_eq!(look(&mut history, off(), start + 5), (String::new(), vec![start]));
        // While the tunnel can't be read, the finding is neither there nor over.
        let (events, _) = look(&mut history, off().blind(Facet::Wireguard), start + 10);
        assert_eq!(events, "+control-unproven");
        let (events, since) = look(&mut history, off(), start + 15);
        assert_eq!((events.as_str(), since), ("-control-unproven", vec![start]));
        // Over a restart, too.
        let text = serde_json::to_string(&history).expect("a document");
        let mut history: History = serde_json::from_str(&text).expect("the same");
        assert_eq!(look(&mut history, off(), start + 20).1, [start]);
        assert_eq!(look(&mut history, Stage::spoke(), start + 25), ("-mesh-keepalive".into(), vec![]));
        assert_eq!(look(&mut history, off(), start + 30), ("+mesh-keepalive".into(), vec![start + 30]));
        let (events, _) =
            look(&mut history, Stage::spoke().device(|d| d.peers[0].last_handshake = None), start + 35);
        assert_eq!(events, "+mesh-handshake -mesh-keepalive");
        let old =
            Stage::spoke().device(move |d| d.peers[0].last_handshake = Some(Stamp::from_unix(start - 900)));
        assert_eq!(look(&mut history, old, start + 40).0, "high~medium");
    }

    #[test]
    fn what_is_remembered_is_bounded_and_quiet_beyond() {
        let finding = |n: usize| {
            let severity = if n < 3000 { Severity::Low } else { Severity::High };
            Finding::new(Code::ListenerWide, severity, format!("tcp/0.0.0.0:{n}"), "", "", "")
        };
        let (_, snapshot) = Stage::spoke().set();
        let mut history = History::default();
        let mut findings: Vec<Finding> = (0..3000).map(finding).collect();
        assert_eq!(history.update(&mut findings, &snapshot, now()).len(), 1024);
        assert_eq!(history.update(&mut findings, &snapshot, now()).len(), 0);
        assert_eq!(findings.iter().filter(|f| f.since.is_some()).count(), 1024);
        // A graver one, sorted before them, still gets its place.
        findings.insert(0, finding(3000));
        let transitions = history.update(&mut findings, &snapshot, now());
        assert_eq!((transitions.len(), history.len()), (1, 1024));
        assert_eq!(history.update(&mut [], &snapshot, now()).len(), 1024);
        assert!(history.is_empty());
    }
}
