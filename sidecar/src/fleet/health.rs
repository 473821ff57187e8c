//! Whether a node may be built upon: checks from the hub, each with what it met. What could
//! not be tried is unknown, and never passes.

use serde::Serialize;

use super::table::{GREEN, RED, Row, Table, YELLOW};
use super::view::{Heard, Look, State};
use crate::diff::lasting;
use crate::policy::{MeshKind, Policy, Role};
use crate::report::Verdict;
use crate::terms::{Stamp, printable};

/// Everything that is looked at, in the order of telling.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum What {
    /// An echo through the tunnel
    Ping,
    /// WireGuard's last handshake
    Handshake,
    /// The daemon answers, and its loop runs
    Metrics,
    /// The node is as its policy says
    Policy,
    /// Its heartbeats are acknowledged
    Heartbeat,
    /// HTTPS answers 200
    Https,
    /// Days until the certificate ends
    Certificate,
    /// sshd answers through the tunnel
    Ssh,
    /// and to nobody else
    SshPublic,
}

impl What {
    pub const fn name(self) -> &'static str {
        match self {
            What::Ping => "ping",
            What::Handshake => "handshake",
            What::Metrics => "metrics",
            What::Policy => "policy",
            What::Heartbeat => "heartbeat",
            What::Https => "https",
            What::Certificate => "certificate",
            What::Ssh => "ssh",
            What::SshPublic => "ssh-public",
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    Fail,
    Unknown,
    Pass,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Check {
    pub what: What,
    pub outcome: Outcome,
    pub reason: String,
}

impl Check {
    pub fn pass(what: What, reason: impl Into<String>) -> Self {
        Self::new(what, Outcome::Pass, reason)
    }

    pub fn fail(what: What, reason: impl Into<String>) -> Self {
        Self::new(what, Outcome::Fail, reason)
    }

    pub fn unknown(what: What, reason: impl Into<String>) -> Self {
        Self::new(what, Outcome::Unknown, reason)
    }

    fn new(what: What, outcome: Outcome, reason: impl Into<String>) -> Self {
        Self { what, outcome, reason: printable(&unnumbered(&reason.into()), 300) }
    }
}

/// Without the number that the kernel's words for an error end with: "(os error 111)".
fn unnumbered(text: &str) -> String {
    let mut parts = text.split(" (os error ");
    let first = parts.next().unwrap_or_default().to_owned();
    parts.fold(first, |said, part| said + part.split_once(')').map_or("", |(_, rest)| rest))
}

/// One node's checks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Health {
    pub node: String,
    pub checks: Vec<Check>,
}

impl Health {
    /// Without a single check nobody knows anything.
    pub fn outcome(&self) -> Outcome {
        self.checks.iter().map(|check| check.outcome).min().unwrap_or(Outcome::Unknown)
    }

    /// "https: answers 503; ssh: no answer"
    pub fn complaints(&self) -> String {
        let bad = self.checks.iter().filter(|check| check.outcome != Outcome::Pass);
        let texts: Vec<String> =
            bad.map(|check| format!("{}: {}", check.what.name(), check.reason)).collect();
        if self.checks.is_empty() { "nothing was checked".to_owned() } else { texts.join("; ") }
    }
}

/// What a node's own words say of its health.
pub fn by_words(look: &Look, policy: &Policy) -> Vec<Check> {
    let mut out = Vec::new();
    let (state, reasons) = look.judge();
    let reasons = reasons.join("; ");
    // A hub has a handshake with each of the others, which they tell.
    let wireguard = policy.mesh.kind == MeshKind::Wireguard && policy.node.role != Role::Hub;
    let said = match &look.heard {
        Heard::Said(said) if said.vitals.node == look.place.name => said,
        _ => {
            if wireguard {
                out.push(handshake(look.handshake, policy));
            }
            out.push(Check::fail(What::Metrics, reasons));
            out.push(Check::unknown(What::Policy, "the node does not say"));
            return out;
        }
    };
    if wireguard {
        // By the node's own clock, whatever happens to this host's.
        out.push(handshake(said.vitals.handshake_age.or(look.handshake), policy));
    }
    out.push(match &said.stale {
        None => Check::pass(What::Metrics, format!("in {:.0} ms", said.took.as_secs_f64() * 1000.0)),
        Some(stale) => Check::fail(What::Metrics, stale.clone()),
    });
    out.push(match state {
        State::Fine => Check::pass(What::Policy, format!("as policy {} says", said.vitals.policy)),
        State::Drifting => Check::fail(What::Policy, reasons),
        State::Blind | State::Silent => Check::unknown(What::Policy, reasons),
    });
    if policy.heartbeat.kuma_url_file.is_some() {
        let most = policy.heartbeat.every.as_secs().saturating_mul(2).saturating_add(10);
        out.push(match said.vitals.heartbeat_age {
            Some(age) if age <= most => Check::pass(What::Heartbeat, format!("{} ago", lasting(age))),
            Some(age) => Check::fail(What::Heartbeat, format!("the last one was taken {} ago", ever(age))),
            None => Check::unknown(What::Heartbeat, "the node does not say whether one was ever taken"),
        });
    }
    out
}

fn handshake(age: Option<u64>, policy: &Policy) -> Check {
    let most = policy.mesh.handshake_max_age.as_secs();
    match age {
        Some(age) if age <= most => Check::pass(What::Handshake, format!("{} ago", lasting(age))),
        Some(age) => {
            let (age, most) = (ever(age), lasting(most));
            Check::fail(What::Handshake, format!("{age} ago, the policy allows {most}"))
        }
        None => Check::unknown(What::Handshake, "neither the node nor this host tells of a handshake"),
    }
}

/// Never comes as the largest number there is.
fn ever(age: u64) -> String {
    if age > 100 * 365 * 86_400 { "more than a lifetime".to_owned() } else { lasting(age) }
}

/// A certificate that ends at `end` (Unix time).
pub fn certificate(end: i64, now: Stamp, least_days: u32) -> Check {
    let left = end.saturating_sub(now.0.as_second());
    let days = left.div_euclid(86_400);
    let text = if left < 0 { format!("ended {} d ago", -days) } else { format!("{days} d left") };
    match left >= i64::from(least_days) * 86_400 {
        true => Check::pass(What::Certificate, text),
        false => Check::fail(What::Certificate, format!("{text}, at least {least_days} wanted")),
    }
}

/// Nodes and their checks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Checkup {
    pub fleet: String,
    pub at: Stamp,
    pub nodes: Vec<Health>,
}

impl Checkup {
    /// What failed comes before what is not known: it is certain whatever else is.
    pub fn outcome(&self) -> Outcome {
        self.nodes.iter().map(Health::outcome).min().unwrap_or(Outcome::Unknown)
    }

    /// All that is wrong, in one line.
    pub fn complaints(&self) -> String {
        let bad = self.nodes.iter().filter(|health| health.outcome() != Outcome::Pass);
        bad.map(Health::complaints).collect::<Vec<_>>().join("; ")
    }

    pub fn exit_code(&self) -> u8 {
        match self.outcome() {
            Outcome::Pass => Verdict::Ok.exit_code(),
            Outcome::Fail => Verdict::Drift.exit_code(),
            Outcome::Unknown => Verdict::Unknown.exit_code(),
        }
    }

    /// The worst node first; of a healthy one among many only that it is.
    pub fn to_text(&self, width: usize, colour: bool) -> String {
        let mut nodes: Vec<&Health> = self.nodes.iter().collect();
        nodes.sort_by(|a, b| (a.outcome(), &a.node).cmp(&(b.outcome(), &b.node)));
        let mut rows = Vec::new();
        for health in nodes {
            if self.nodes.len() > 1 && health.outcome() == Outcome::Pass {
                let all = format!("all {} checks", health.checks.len());
                rows.push(row(&health.node, &all, Outcome::Pass, ""));
                continue;
            }
            let told = health.checks.iter().filter(|c| self.nodes.len() == 1 || c.outcome != Outcome::Pass);
            rows.extend(told.map(|check| row(&health.node, check.what.name(), check.outcome, &check.reason)));
        }
        let count = |outcome| self.nodes.iter().filter(|health| health.outcome() == outcome).count();
        let (pass, fail, unknown) = (count(Outcome::Pass), count(Outcome::Fail), count(Outcome::Unknown));
        let table = Table { heads: vec!["NODE", "CHECK", "RESULT"], rows }.render(width, colour);
        format!("{table}\n{pass} healthy, {fail} not, {unknown} could not be told.\n")
    }

    pub fn to_json(&self) -> serde_json::Value {
        serde_json::json!({
            "version": 1, "fleet": self.fleet, "at": self.at, "outcome": self.outcome(),
            "nodes": self.nodes.iter().map(|health| serde_json::json!({
                "name": health.node, "outcome": health.outcome(), "checks": health.checks,
            })).collect::<Vec<_>>(),
        })
    }
}

fn row(node: &str, what: &str, outcome: Outcome, reason: &str) -> Row {
    let (word, shade) = match outcome {
        Outcome::Pass => ("pass", GREEN),
        Outcome::Fail => ("FAIL", RED),
        Outcome::Unknown => ("unknown", YELLOW),
    };
    let mut row = Row { shade: Some((2, shade)), ..Row::default() };
    row.cells = vec![node.to_owned(), what.to_owned(), word.to_owned()];
    match outcome {
        Outcome::Pass => row.tail = reason.to_owned(),
        _ => row.notes = vec![reason.to_owned()],
    }
    row
}

#[cfg(test)]
mod tests {
    use expect_test::expect;

    use super::super::view::tests::{look, said};
    use super::super::vitals::tests::vitals;
    use super::*;
    use crate::desired::samples;

    fn words(heard: Heard) -> Vec<(What, Outcome)> {
        let checks = by_words(&look("oslo", heard), &samples::spoke());
        checks.into_iter().map(|check| (check.what, check.outcome)).collect()
    }

    #[test]
    fn what_a_node_says_is_judged() {
        use Outcome::{Fail, Pass, Unknown};
        let all = |a, b, c| vec![(What::Handshake, a), (What::Metrics, b), (What::Policy, c)];
        assert_eq!(words(said(vitals("oslo", 0, ""))), all(Pass, Pass, Pass));
        let blind = "spokeguard_blind{facet=\"sshd\"} 1\n";
        assert_eq!(words(said(vitals("oslo", 2, blind))), all(Pass, Pass, Unknown));
        let drift = "spokeguard_findings{code=\"ssh-bind\",severity=\"high\"} 1\n";
        let mut old = vitals("oslo", 1, drift);
        old.handshake_age = Some(900);
        assert_eq!(words(said(old)), all(Fail, Pass, Fail));
        assert_eq!(words(Heard::Silent("gone".into())), all(Unknown, Fail, Unknown));
        assert_eq!(words(said(vitals("lima", 0, ""))), all(Unknown, Fail, Unknown), "somebody else answers");
    }

    #[test]
    fn a_heartbeat_is_wanted_where_the_policy_has_one() {
        let mut policy = samples::spoke();
        let outcome = |policy: &Policy, age| {
            let mut vitals = vitals("oslo", 0, "");
            vitals.heartbeat_age = age;
            let checks = by_words(&look("oslo", said(vitals)), policy);
            checks.into_iter().find(|check| check.what == What::Heartbeat).map(|check| check.outcome)
        };
        assert_eq!(outcome(&policy, Some(5)), None);
        policy.heartbeat.kuma_url_file = Some("kuma-url".into());
        let most = 2 * policy.heartbeat.every.as_secs() + 10;
        assert_eq!(outcome(&policy, Some(most)), Some(Outcome::Pass));
        for late in [most + 1, u64::MAX] {
            assert_eq!(outcome(&policy, Some(late)), Some(Outcome::Fail), "{late}");
        }
        assert_eq!(outcome(&policy, None), Some(Outcome::Unknown));
    }

    #[test]
    fn a_certificate_has_days() {
        let now = Stamp::from_unix(1_700_000_000);
        let day = 86_400;
        assert_eq!(certificate(1_700_000_000 + 63 * day + 5, now, 14).reason, "63 d left");
        let short = certificate(1_700_000_000 + 13 * day, now, 14);
        assert_eq!((short.outcome, short.reason.as_str()), (Outcome::Fail, "13 d left, at least 14 wanted"));
        assert_eq!(certificate(1_700_000_000 - 1, now, 0).reason, "ended 1 d ago, at least 0 wanted");
    }

    #[test]
    fn an_error_is_told_in_words() {
        let reason = |text: &str| Check::fail(What::Ssh, text).reason;
        assert_eq!(
            reason("10.84.0.7:22: connect: Connection refused (os error 111)"),
            "10.84.0.7:22: connect: Connection refused"
        );
        assert_eq!(reason("a (os error 1); b (os error 2): c"), "a; b: c");
        assert_eq!(reason("says (no error) at all"), "says (no error) at all");
    }

    #[test]
    fn unknown_is_never_a_pass() {
        let health = |checks: Vec<Check>| Checkup {
            fleet: "f".into(),
            at: Stamp::from_unix(0),
            nodes: vec![Health { node: "oslo".into(), checks }],
        };
        let (pass, unknown) = (Check::pass(What::Ping, "1 ms"), Check::unknown(What::Https, "no name"));
        let fail = Check::fail(What::Ssh, "\x1b[2Jno banner");
        assert_eq!(health(vec![pass.clone()]).exit_code(), 0);
        assert_eq!(health(vec![pass.clone(), unknown.clone()]).exit_code(), 2);
        assert_eq!(health(vec![]).exit_code(), 2);
        let all = health(vec![pass, unknown, fail]);
        assert_eq!(all.exit_code(), 1);
        expect![[r#"
            NODE  CHECK  RESULT
            oslo  ping   pass     1 ms
            oslo  https  unknown
                no name
            oslo  ssh    FAIL
                �[2Jno banner

            0 healthy, 1 not, 0 could not be told.
        "#]]
        .assert_eq(&all.to_text(80, false));
        assert_eq!(all.nodes[0].complaints(), "https: no name; ssh: \u{fffd}[2Jno banner");
    }
}
