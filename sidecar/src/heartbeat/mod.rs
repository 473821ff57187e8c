//! What the hub is told by itself: a beat for Uptime Kuma, notices for ntfy, a status file.
//! Pure: who measures, writes and sends is `daemon::heart`, and a process of its own speaks
//! to the hub.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};

pub mod app;
pub mod certificate;
pub mod host;
pub mod kept;
pub mod kuma;
pub mod notice;
pub mod ntfy;
pub mod outbox;
pub mod payload;
pub mod status_file;
mod url;

pub use kept::Kept;
pub use notice::{Notice, NoticeKind, Notices};
pub use outbox::Outbox;
pub use payload::Payload;
pub use url::UrlError;

/// What one request came to. Nothing of what the other side wrote is in it but numbers, and
/// nothing of the URL.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reply {
    Accepted,
    /// A status other than the one that says yes.
    Status(u16),
    /// Kuma says that the monitor is paused, or that there is none with this token.
    NoMonitor,
    /// A page instead of the answer: another server, or another path.
    NotTheService,
    /// Asked to come back after so many seconds, if it said when.
    TooMany(Option<u32>),
    Unresolved,
    Refused,
    Unreachable,
    TimedOut,
    Tls,
    /// The connection ended early, or what came is no HTTP.
    Broken,
}

impl Reply {
    pub fn outcome(self) -> Outcome {
        use Reply::*;
        match self {
            Accepted => Outcome::Accepted,
            Status(_) | NoMonitor | NotTheService | TooMany(_) => Outcome::Refused,
            Unresolved | Refused | Unreachable | TimedOut | Tls | Broken => Outcome::Unreachable,
        }
    }

    /// For a person: what came of it, and what to do.
    pub fn why(self) -> String {
        match self {
            Reply::Accepted => "accepted".into(),
            Reply::Status(status @ 300..=399) => {
                format!("HTTP {status}, a redirect, which is not followed: write the final URL into the file")
            }
            Reply::Status(status @ (401 | 403)) => {
                format!("HTTP {status}: the token in the URL's file is not accepted")
            }
            Reply::Status(status) => format!("HTTP {status}"),
            Reply::NoMonitor => {
                "no such monitor, or it is paused: compare the token with the one Uptime Kuma shows".into()
            }
            Reply::NotTheService => {
                "an answer that is not the service's: compare the path in the URL's file".into()
            }
            Reply::TooMany(_) => "too many requests: what waits is sent later".into(),
            Reply::Unresolved => "the name in the URL can't be resolved".into(),
            Reply::Refused => "the connection was refused".into(),
            Reply::Unreachable => "there is no way to it".into(),
            Reply::TimedOut => "no answer in time".into(),
            Reply::Tls => {
                "TLS: its certificate is not one that this host trusts, or not for this name".into()
            }
            Reply::Broken => "the connection broke off, or what came is no HTTP".into(),
        }
    }
}

/// [`Reply`] as a label.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Outcome {
    Accepted,
    Refused,
    Unreachable,
}

impl Outcome {
    pub const ALL: [Outcome; 3] = [Outcome::Accepted, Outcome::Refused, Outcome::Unreachable];

    pub const fn name(self) -> &'static str {
        match self {
            Outcome::Accepted => "accepted",
            Outcome::Refused => "refused",
            Outcome::Unreachable => "unreachable",
        }
    }
}

/// Whom we tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Target {
    Kuma,
    Ntfy,
}

impl Target {
    pub const ALL: [Target; 2] = [Target::Kuma, Target::Ntfy];

    pub const fn name(self) -> &'static str {
        match self {
            Target::Kuma => "kuma",
            Target::Ntfy => "ntfy",
        }
    }
}

/// What metrics tell of all this.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// The policy names a file of this target's.
    pub told: Vec<Target>,
    pub sent: BTreeMap<(Target, Outcome), u64>,
    /// Since the last beat that Kuma accepted. `None`: there was none yet.
    pub age: Option<Duration>,
    /// Notices that wait, and those that no longer fitted.
    pub queue: u64,
    pub dropped: u64,
    /// In Unix time, of what port 443 serves. `None`: none, or it could not be asked.
    pub certificate_ends: Option<i64>,
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::diff::{Code, Finding, Severity};
    use crate::report::{Report, Verdict};
    use crate::terms::{Actor, Stamp};

    pub fn finding(code: Code, severity: Severity, subject: &str) -> Finding {
        let by = Actor { pid: 812, process: "postgres".into(), unit: None, user: None };
        let finding = Finding::new(code, severity, subject, "nobody", "anyone gets in", "Close it.");
        Finding { by: Some(by), ..finding }
    }

    pub fn report(findings: &[Finding]) -> Report {
        Report {
            version: 1,
            node: "oslo".into(),
            verdict: if findings.iter().any(Finding::is_drift) { Verdict::Drift } else { Verdict::Ok },
            at: Stamp::from_unix(1_795_000_000),
            findings: findings.to_vec(),
            blind: Vec::new(),
        }
    }

    #[test]
    fn every_reply_has_an_outcome_and_a_sentence_without_secrets() {
        let unreachable = [
            Reply::Unresolved,
            Reply::Refused,
            Reply::Unreachable,
            Reply::TimedOut,
            Reply::Tls,
            Reply::Broken,
        ];
        let refused = [
            Reply::Status(302),
            Reply::Status(403),
            Reply::NoMonitor,
            Reply::NotTheService,
            Reply::TooMany(None),
        ];
        let outcomes = [
            (Outcome::Unreachable, &unreachable[..]),
            (Outcome::Refused, &refused),
            (Outcome::Accepted, &[Reply::Accepted]),
        ];
        for (outcome, replies) in outcomes {
            for reply in replies {
                assert_eq!(reply.outcome(), outcome, "{reply:?}");
                assert!(!reply.why().is_empty());
                let json = serde_json::to_string(reply).expect("JSON");
                assert_eq!(serde_json::from_str::<Reply>(&json).expect("a reply"), *reply);
            }
        }
        assert!(Reply::Status(301).why().contains("final URL") && Reply::Status(500).why() == "HTTP 500");
    }
}
