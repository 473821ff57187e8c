//! All nodes on one screen: who is fine, who drifts, who is blind, who is silent.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::table::{BOLD, GREEN, RED, Row, Table, YELLOW, paint, wrapped};
use super::vitals::{Found, Vitals};
use crate::diff::{Code, lasting, listed};
use crate::report::Verdict;
use crate::terms::{Stamp, printable};

/// Clocks may differ by this many seconds without a word: the date of an answer is in whole
/// seconds, and it was on its way.
const SKEW_MAX: i64 = 5;
/// Findings that are named one by one.
const WORDS_MAX: usize = 6;
/// Nodes in good health that a text lists one by one.
const FINE_MAX: usize = 64;

/// A node of the inventory, as far as looking at it goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    pub name: String,
    pub role: String,
    pub region: Option<String>,
    /// Where its metrics are, `host:port`.
    pub at: String,
    /// [`crate::policy::fingerprint`] of what it should enforce.
    pub policy: Option<String>,
}

/// What came of asking a node.
#[derive(Clone, Debug, PartialEq)]
pub enum Heard {
    /// Nothing, or not in time.
    Silent(String),
    /// Something, but no metrics of ours.
    Garbled(String),
    Said(Box<Said>),
}

#[derive(Clone, Debug, PartialEq)]
pub struct Said {
    pub vitals: Vitals,
    /// Why it can't be told to be up to date: its loop is stuck, or nobody knows.
    pub stale: Option<String>,
    /// The time by its own clock, in Unix time; `None`: it did not say.
    pub date: Option<i64>,
    /// Seconds by which that is ahead of ours.
    pub skew: Option<i64>,
    pub took: Duration,
}

/// One node, looked at.
#[derive(Clone, Debug, PartialEq)]
pub struct Look {
    pub place: Place,
    pub heard: Heard,
    /// Seconds since it was last heard, where that is known of a silent one.
    pub last_heard: Option<u64>,
    /// Seconds since the hub's own end of the tunnel had a handshake with it.
    pub handshake: Option<u64>,
}

/// In the order of a reader's interest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// It differs from its policy.
    Drifting,
    /// It does not answer.
    Silent,
    /// It answers, and can't tell.
    Blind,
    Fine,
}

impl State {
    pub const ALL: [State; 4] = [State::Drifting, State::Silent, State::Blind, State::Fine];

    pub const fn name(self) -> &'static str {
        match self {
            State::Drifting => "drifting",
            State::Silent => "silent",
            State::Blind => "blind",
            State::Fine => "fine",
        }
    }

    const fn shade(self) -> &'static str {
        match self {
            State::Drifting | State::Silent => RED,
            State::Blind => YELLOW,
            State::Fine => GREEN,
        }
    }
}

impl Look {
    pub fn vitals(&self) -> Option<&Vitals> {
        match &self.heard {
            Heard::Said(said) => Some(&said.vitals),
            Heard::Silent(_) | Heard::Garbled(_) => None,
        }
    }

    /// What to think of it, and why, where it isn't fine.
    pub fn judge(&self) -> (State, Vec<String>) {
        let said = match &self.heard {
            Heard::Silent(reason) => return (State::Silent, self.silence(reason)),
            Heard::Garbled(reason) => return (State::Blind, vec![reason.clone()]),
            Heard::Said(said) => said,
        };
        let Vitals { node, policy, mode, blind, unproven, disagreements, .. } = &said.vitals;
        if *node != self.place.name {
            let reason =
                format!("\"{}\" answers at {}, and not this node", printable(node, 64), self.place.at);
            return (State::Blind, vec![reason]);
        }
        let mut reasons = Vec::new();
        let open: Vec<String> = said.vitals.differences().map(told).collect();
        if !open.is_empty() {
            reasons.push(listed(&open, WORDS_MAX));
        }
        if let Some(exposed) = said.vitals.exposed.filter(|n| *n > 0) {
            reasons.push(format!("{exposed} {} reached from outside", plural(exposed, "port")));
        }
        if *disagreements > 0 {
            let ports = plural(*disagreements, "port");
            reasons.push(format!("its rules and its probe disagree on {disagreements} {ports}"));
        }
        let other = self.place.policy.as_ref().filter(|wanted| *wanted != policy);
        if let Some(wanted) = other {
            reasons.push(format!("enforces policy {policy}, the inventory says {wanted}"));
        }
        let differs = other.is_some() || said.vitals.verdict == Verdict::Drift;
        if !blind.is_empty() {
            reasons.push(format!("could not read {}", listed(blind, WORDS_MAX)));
        }
        reasons.extend(said.stale.clone());
        let unseen = said.stale.is_some() || said.vitals.verdict == Verdict::Unknown || !blind.is_empty();
        // What was found is true whatever else could not be looked at.
        let found = said.vitals.differences().any(|found| found.code != Code::ControlUnproven.name());
        let state = match (differs || found, unseen) {
            (true, _) => State::Drifting,
            (false, true) => State::Blind,
            (false, false) => State::Fine,
        };
        if state != State::Fine && !unproven.is_empty() {
            reasons.push(format!("not shown to work: {}", listed(unproven, WORDS_MAX)));
        }
        if state == State::Blind && reasons.is_empty() {
            reasons.push("says that it could not tell".to_owned());
        }
        if said.vitals.accepted > 0 {
            let accepted = said.vitals.accepted;
            reasons.push(format!("{accepted} accepted {}", plural(accepted, "risk")));
        }
        if mode == "audit" && state != State::Fine {
            reasons.push("audit mode: it counts and drops nothing".to_owned());
        }
        (state, reasons)
    }

    /// Whether it could not be told in full, whatever was found.
    fn unseen(&self) -> bool {
        match &self.heard {
            Heard::Said(said) => {
                said.stale.is_some()
                    || said.vitals.verdict == Verdict::Unknown
                    || !said.vitals.blind.is_empty()
                    || said.vitals.node != self.place.name
            }
            Heard::Silent(_) | Heard::Garbled(_) => true,
        }
    }

    fn silence(&self, reason: &str) -> Vec<String> {
        let mut reasons = vec![reason.to_owned()];
        if let Some(seconds) = self.last_heard {
            reasons.push(format!("last heard {} ago", lasting(seconds)));
        }
        if let Some(seconds) = self.handshake {
            reasons.push(format!("last handshake of its tunnel with this host {} ago", lasting(seconds)));
        }
        reasons
    }
}

fn told(found: &Found) -> String {
    let times = if found.count > 1 { format!(" ({} times)", found.count) } else { String::new() };
    format!("{} {}{times}", found.severity, found.code)
}

pub(super) fn plural(n: u64, word: &str) -> String {
    if n == 1 { word.to_owned() } else { format!("{word}s") }
}

/// All nodes, the worst first.
#[derive(Clone, Debug, PartialEq)]
pub struct Overview {
    pub fleet: String,
    pub at: Stamp,
    pub looks: Vec<Judged>,
    /// Seconds by which this host's own clock is behind those of most nodes.
    pub own_skew: Option<i64>,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Judged {
    pub look: Look,
    pub state: State,
    pub reasons: Vec<String>,
}

impl Overview {
    pub fn new(fleet: &str, at: Stamp, looks: Vec<Look>) -> Self {
        let own_skew = common_skew(&looks);
        let mut looks: Vec<Judged> = looks
            .into_iter()
            .map(|look| {
                let (state, mut reasons) = look.judge();
                if let Heard::Said(said) = &look.heard
                    && let Some(skew) = said.skew
                    && skew.saturating_sub(own_skew.unwrap_or(0)).saturating_abs() > SKEW_MAX
                {
                    reasons.push(format!("its clock is {} ours", apart(skew)));
                }
                Judged { look, state, reasons }
            })
            .collect();
        let worst = |judged: &Judged| {
            let vitals = judged.look.vitals();
            let worst = vitals.and_then(|v| v.differences().next()).map(|f| f.severity.clone());
            let rank =
                ["critical", "high", "medium", "low"].iter().position(|s| Some(*s) == worst.as_deref());
            let exposed = vitals.and_then(|v| v.exposed).unwrap_or(0);
            (judged.state, exposed == 0, rank.unwrap_or(4))
        };
        looks.sort_by(|a, b| (worst(a), &a.look.place.name).cmp(&(worst(b), &b.look.place.name)));
        Self { fleet: printable(fleet, 64), at, looks, own_skew }
    }

    pub fn count(&self, state: State) -> usize {
        self.looks.iter().filter(|judged| judged.state == state).count()
    }

    /// As in `check`, not having seen all comes before having seen a difference.
    pub fn exit_code(&self) -> u8 {
        if self.looks.iter().any(|judged| judged.look.unseen()) {
            Verdict::Unknown.exit_code()
        } else if self.count(State::Drifting) > 0 {
            Verdict::Drift.exit_code()
        } else {
            Verdict::Ok.exit_code()
        }
    }

    /// "21 nodes of clavitor: 1 drifting, 17 fine"
    fn headline(&self, colour: bool) -> String {
        let counts = State::ALL.map(|state| (self.count(state), state));
        let counts = counts.into_iter().filter(|(n, _)| *n > 0);
        let counts: Vec<String> =
            counts.map(|(n, state)| paint(&format!("{n} {}", state.name()), state.shade(), colour)).collect();
        let nodes = self.looks.len();
        let name = paint(&self.fleet, BOLD, colour);
        format!("{name}, {nodes} {}: {}\n", plural(nodes as u64, "node"), counts.join(", "))
    }

    /// A table for a terminal of this width. Of many nodes in good health only their number, unless `all`.
    pub fn to_text(&self, width: usize, colour: bool, all: bool) -> String {
        let mut out = self.headline(colour);
        if let Some(skew) = self.own_skew {
            let text = format!("This host's clock is {} those of most nodes.", apart(-skew));
            out.push_str(&wrapped(&text, width, 0));
        }
        out.push('\n');
        let fine = self.count(State::Fine);
        let short = !all && fine > FINE_MAX;
        let shown = self.looks.iter().filter(|judged| !short || judged.state != State::Fine);
        let rows: Vec<Row> = shown.map(Judged::row).collect();
        if !rows.is_empty() {
            let heads = vec!["NODE", "ROLE", "STATE", "FINDINGS", "EXPOSED", "TUNNEL", "AUDIT", "UP"];
            out.push_str(&Table { heads, rows }.render(width, colour));
        }
        if short {
            out.push_str(&format!("{fine} fine nodes are not listed: --all lists them.\n"));
        }
        out
    }

    /// One document.
    pub fn to_json(&self) -> serde_json::Value {
        let counts: serde_json::Map<String, serde_json::Value> =
            State::ALL.iter().map(|state| (state.name().to_owned(), self.count(*state).into())).collect();
        let nodes: Vec<serde_json::Value> = self.looks.iter().map(Judged::json).collect();
        serde_json::json!({
            "version": 1, "fleet": self.fleet, "at": self.at, "verdict": self.verdict().name(),
            "counts": counts, "clock_behind_seconds": self.own_skew, "nodes": nodes,
        })
    }

    fn verdict(&self) -> Verdict {
        match self.exit_code() {
            0 => Verdict::Ok,
            1 => Verdict::Drift,
            _ => Verdict::Unknown,
        }
    }
}

impl Judged {
    fn row(&self) -> Row {
        let place = &self.look.place;
        let none = || "-".to_owned();
        let mut cells = vec![place.name.clone(), place.role.clone(), self.state.name().to_owned()];
        match (self.look.vitals(), &self.look.heard) {
            (Some(vitals), Heard::Said(said)) => {
                let findings: u64 = vitals.differences().map(|found| found.count).sum();
                let worst = vitals.differences().next().map(|found| found.severity.clone());
                cells.push(worst.map_or(none(), |worst| format!("{findings} {worst}")));
                cells.push(vitals.exposed.map_or(none(), |n| n.to_string()));
                cells.push(vitals.handshake_age.map_or(none(), age));
                cells.push(vitals.audit_age.map_or(none(), age));
                let now = said.date.and_then(|date| u64::try_from(date).ok());
                let up = vitals.started.zip(now).map(|(start, now)| now.saturating_sub(start));
                cells.push(up.map_or(none(), age));
            }
            _ => cells.extend([none(), none(), none(), none(), none()]),
        }
        Row { cells, shade: Some((2, self.state.shade())), tail: String::new(), notes: self.reasons.clone() }
    }

    fn json(&self) -> serde_json::Value {
        let place = &self.look.place;
        let (skew, took, stale) = match &self.look.heard {
            Heard::Said(said) => (said.skew, Some(said.took.as_secs_f64()), said.stale.clone()),
            Heard::Silent(_) | Heard::Garbled(_) => (None, None, None),
        };
        serde_json::json!({
            "name": place.name, "role": place.role, "region": place.region, "address": place.at,
            "state": self.state.name(), "reasons": self.reasons, "last_heard_seconds": self.look.last_heard,
            "tunnel_handshake_seconds": self.look.handshake, "clock_ahead_seconds": skew, "took_seconds": took,
            "stale": stale, "vitals": self.look.vitals(),
        })
    }
}

/// In few letters; an age without end, which comes as the largest number there is, is never.
pub(super) fn age(seconds: u64) -> String {
    match seconds {
        0..=119 => format!("{seconds} s"),
        120..=7199 => format!("{} min", seconds / 60),
        7200..=172_799 => format!("{} h", seconds / 3600),
        172_800..=3_153_600_000 => format!("{} d", seconds / 86_400),
        _ => "never".to_owned(),
    }
}

/// "1 h ahead of"
fn apart(skew: i64) -> String {
    format!("{} {}", lasting(skew.unsigned_abs()), if skew > 0 { "ahead of" } else { "behind" })
}

/// The median of all clocks, where it is far from ours and most agree with it.
fn common_skew(looks: &[Look]) -> Option<i64> {
    let mut skews: Vec<i64> = looks
        .iter()
        .filter_map(|look| match &look.heard {
            Heard::Said(said) => said.skew,
            _ => None,
        })
        .collect();
    skews.sort_unstable();
    let median = *skews.get(skews.len() / 2)?;
    let agree = skews.iter().filter(|skew| skew.saturating_sub(median).saturating_abs() <= SKEW_MAX).count();
    (skews.len() > 1 && median.saturating_abs() > SKEW_MAX && agree * 2 > skews.len()).then_some(median)
}

#[cfg(test)]
pub(super) mod tests {
    use expect_test::expect;

    use super::super::vitals::tests::vitals;
    use super::*;

    pub(crate) fn place(name: &str) -> Place {
        let at = "10.84.0.16:9984".to_owned();
        Place { name: name.into(), role: "spoke".into(), region: None, at, policy: Some("00ff".into()) }
    }

    pub(crate) fn look(name: &str, heard: Heard) -> Look {
        Look { place: place(name), heard, last_heard: None, handshake: None }
    }

    pub(crate) fn said(vitals: Vitals) -> Heard {
        let date = Some(1_700_003_600);
        Heard::Said(Box::new(Said {
            vitals,
            stale: None,
            date,
            skew: Some(0),
            took: Duration::from_millis(3),
        }))
    }

    fn node(name: &str, verdict: u64, more: &str) -> Look {
        look(name, said(vitals(name, verdict, more)))
    }

    fn skewed(name: &str, skew: i64) -> Look {
        let mut look = node(name, 0, "");
        let Heard::Said(said) = &mut look.heard else { unreachable!() };
        said.skew = Some(skew);
        look
    }

    const EXPOSED: &str = "spokeguard_findings{code=\"listener-exposed\",severity=\"critical\"} 2\n\
                           spokeguard_findings{code=\"file-mode\",severity=\"medium\"} 1\n\
                           spokeguard_audit_exposed_ports{family=\"ipv4\",proto=\"udp\"} 1\n";

    fn all(looks: Vec<Look>) -> Overview {
        Overview::new("clavitor", Stamp::from_unix(1_700_003_600), looks)
    }

    #[test]
    fn the_worst_comes_first_and_says_why() {
        let silent = Look {
            last_heard: Some(300),
            handshake: Some(250),
            ..look("zurich", Heard::Silent("no answer from 10.84.0.16:9984".into()))
        };
        let looks = vec![
            node("oslo", 0, ""),
            node("lagos", 2, "spokeguard_blind{facet=\"sshd\"} 1\n"),
            silent,
            node("tokyo", 1, "spokeguard_findings{code=\"file-mode\",severity=\"medium\"} 1\n"),
            node("frankfurt-am-main", 1, EXPOSED),
            look("mumbai", Heard::Garbled("sends more than 1024 KiB".into())),
            look("lima", said(vitals("paris", 0, ""))),
        ];
        let overview = all(looks);
        expect![[r#"
            clavitor, 7 nodes: 2 drifting, 1 silent, 3 blind, 1 fine

            NODE               ROLE   STATE       FINDINGS  EXPOSED  TUNNEL  AUDIT      UP
            frankfurt-am-main  spoke  drifting  3 critical        1    12 s   60 s  60 min
                critical listener-exposed (2 times) and medium file-mode
                1 port reached from outside
            tokyo              spoke  drifting    1 medium        0    12 s   60 s  60 min
                medium file-mode
            zurich             spoke  silent             -        -       -      -       -
                no answer from 10.84.0.16:9984
                last heard 5 min ago
                last handshake of its tunnel with this host 4 min ago
            lagos              spoke  blind              -        0    12 s   60 s  60 min
                could not read sshd
            lima               spoke  blind              -        0    12 s   60 s  60 min
                "paris" answers at 10.84.0.16:9984, and not this node
            mumbai             spoke  blind              -        -       -      -       -
                sends more than 1024 KiB
            oslo               spoke  fine               -        0    12 s   60 s  60 min
        "#]]
        .assert_eq(&overview.to_text(80, false, false));
        assert_eq!(overview.exit_code(), 2, "not all was seen");
        let json = overview.to_json();
        assert_eq!(
            (json["verdict"].as_str(), json["counts"]["drifting"].as_u64()),
            (Some("unknown"), Some(2))
        );
        assert_eq!(json["nodes"][0]["vitals"]["findings"][0]["code"], "listener-exposed");
        assert_eq!(json["nodes"][6]["state"], "fine");
    }

    #[test]
    fn exit_codes_are_those_of_check() {
        assert_eq!(all(vec![node("oslo", 0, "")]).exit_code(), 0);
        assert_eq!(all(vec![node("oslo", 0, ""), node("lima", 1, EXPOSED)]).exit_code(), 1);
        assert_eq!(all(vec![node("oslo", 0, ""), look("lima", Heard::Silent(String::new()))]).exit_code(), 2);
        let mut stale = node("oslo", 0, "");
        let Heard::Said(said) = &mut stale.heard else { unreachable!() };
        said.stale = Some("its loop is stuck: no cycle for 90 s".into());
        let overview = all(vec![stale]);
        assert_eq!((overview.exit_code(), overview.looks[0].state), (2, State::Blind));
    }

    #[test]
    fn another_policy_than_the_inventorys_is_a_difference() {
        let mut look = node("oslo", 0, "");
        look.place.policy = Some("0123".into());
        let (state, reasons) = look.judge();
        assert_eq!(state, State::Drifting);
        assert_eq!(reasons, ["enforces policy 00ff, the inventory says 0123"]);
        look.place.policy = None;
        assert_eq!(look.judge(), (State::Fine, vec![]));
        let accepted = node("oslo", 0, "spokeguard_accepted_findings 2\n").judge();
        assert_eq!(accepted, (State::Fine, vec!["2 accepted risks".to_owned()]), "listed, and no difference");
    }

    #[test]
    fn a_clock_of_the_hub_that_is_off_makes_nobody_look_dead() {
        let overview = all(vec![skewed("a", 3600), skewed("b", 3601), skewed("c", 3599), skewed("d", 0)]);
        assert_eq!(overview.count(State::Fine), 4);
        assert_eq!(overview.own_skew, Some(3600));
        let text = overview.to_text(80, false, false);
        assert!(text.contains("This host's clock is 60 min behind those of most nodes."), "{text}");
        assert_eq!(text.matches("its clock").count(), 1, "only the one that differs from the others: {text}");
        let one = all(vec![skewed("a", -7200), skewed("b", 1), skewed("c", 0)]);
        assert_eq!(
            (one.own_skew, one.looks[0].reasons.clone()),
            (None, vec!["its clock is 2 h behind ours".into()])
        );
        all(vec![skewed("a", i64::MIN), skewed("b", i64::MAX)]);
    }

    #[test]
    fn of_many_fine_nodes_only_the_number_is_told() {
        let mut looks: Vec<Look> = (0..1000).map(|n| node(&format!("node-{n}"), 0, "")).collect();
        looks.push(look("lost", Heard::Silent("nothing listens".into())));
        let overview = all(looks);
        let text = overview.to_text(80, false, false);
        assert!(text.contains("lost") && text.lines().count() < 8, "{text}");
        assert!(text.ends_with("1000 fine nodes are not listed: --all lists them.\n"), "{text}");
        assert!(overview.to_text(80, false, true).contains("node-999 "));
    }

    #[test]
    fn a_poisoned_label_never_reaches_the_terminal() {
        let poison = "spokeguard_findings{code=\"\x1b]0;owned\x07\",severity=\"\x1b[31m\"} 1\n\
                      spokeguard_blind{facet=\"\x1b[2J\"} 1\n";
        let overview = all(vec![node("oslo", 1, poison), look("a", said(vitals("\x1b[5m", 0, "")))]);
        let text = overview.to_text(80, false, true);
        assert!(!text.contains(['\x1b', '\x07']), "{text:?}");
        assert!(!overview.to_json().to_string().contains("\\u001b"), "nor the document");
    }
}
