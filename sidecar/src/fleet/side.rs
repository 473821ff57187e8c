//! All nodes side by side: what the hub reaches from outside, what their policies say, and what
//! their own audits say. Where two of them disagree one is wrong, and that comes first.

use serde::Serialize;

use super::table::{GREEN, RED, Row, Table, YELLOW, wrapped};
use super::view::{Heard, Look, age, plural};
use crate::audit::{Audit, Spot};
use crate::diff::{lasting, listed};
use crate::report::Verdict;
use crate::terms::{Stamp, printable};

/// A node's own audit is hourly; older than this it says nothing of now.
const OLD_S: u64 = 2 * 3600;
/// Ports that are named one by one.
const SPOTS_MAX: usize = 8;

/// In the order of a reader's interest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Stand {
    /// The hub and the node's own audit say different things.
    Disagrees,
    /// Strangers get in, or not where they should, and nobody says otherwise.
    Differs,
    /// The hub could not look, or the node has not.
    Unknown,
    Agrees,
}

impl Stand {
    const fn name(self) -> &'static str {
        match self {
            Stand::Disagrees => "DISAGREES",
            Stand::Differs => "differs",
            Stand::Unknown => "unknown",
            Stand::Agrees => "agrees",
        }
    }
}

/// What a node's own audit came to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Own {
    /// Ports reached against the policy.
    pub exposed: u64,
    /// Seconds ago.
    pub age: u64,
}

/// What the hub met.
#[derive(Clone, Debug, PartialEq)]
pub enum Outside {
    /// Compared with the policy already.
    Met(Audit),
    /// The inventory names no public address.
    NoAddress,
    /// The node is the hub: nobody is outside of himself.
    Myself,
}

#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Compared {
    pub node: String,
    pub stand: Stand,
    pub reasons: Vec<String>,
    /// `None`: it does not answer, or was never audited.
    pub own: Option<Own>,
    /// `None`: no public address is known, or the node is the hub itself.
    pub outside: Option<Audit>,
    /// Nobody looked from outside.
    #[serde(skip)]
    unseen: bool,
}

impl Compared {
    /// What the hub met, beside what the node says.
    pub fn new(look: &Look, outside: Outside) -> Self {
        let myself = outside == Outside::Myself;
        let outside = match outside {
            Outside::Met(audit) => Some(audit),
            Outside::NoAddress | Outside::Myself => None,
        };
        let own = look.vitals().filter(|vitals| vitals.node == look.place.name).and_then(|vitals| {
            let (exposed, age) = vitals.exposed.zip(vitals.audit_age)?;
            Some(Own { exposed, age })
        });
        let fresh = own.as_ref().filter(|own| own.age <= OLD_S);
        let mut reasons = Vec::new();
        let none = (&[][..], &[][..], &[][..]);
        let (exposed, missing, blind) = outside.as_ref().map_or(none, |a| (&a.exposed, &a.missing, &a.blind));
        if !exposed.is_empty() {
            reasons.push(format!("reached from here against the policy: {}", spots(exposed)));
        }
        if !missing.is_empty() {
            reasons.push(format!("not reached though the policy lets everybody: {}", spots(missing)));
        }
        let disagrees = match fresh {
            Some(own) if own.exposed == 0 && !exposed.is_empty() => {
                reasons.push("its own audit reaches nothing against the policy".to_owned());
                true
            }
            Some(own) if own.exposed > 0 && exposed.is_empty() && outside.is_some() => {
                let ports = plural(own.exposed, "port");
                reasons
                    .push(format!("its own audit reaches {} {ports}, this host none of them", own.exposed));
                true
            }
            _ => false,
        };
        let mut unknown = false;
        let mut doubt = |reason: String| {
            reasons.push(reason);
            unknown = true;
        };
        blind.iter().for_each(|blind| doubt(format!("could not be told from here: {}", blind.reason)));
        let unseen = outside.is_none() && !myself;
        if unseen {
            doubt("the inventory names no public address".to_owned());
        }
        match (&look.heard, &own) {
            (Heard::Silent(why) | Heard::Garbled(why), _) => {
                doubt(format!("its own audit is not known: {why}"))
            }
            (Heard::Said(_), None) => doubt("it has not been audited by itself".to_owned()),
            (Heard::Said(_), Some(own)) if own.age > OLD_S => {
                doubt(format!("its own audit is {} old", lasting(own.age)));
            }
            _ => {}
        }
        let differs = !exposed.is_empty() || !missing.is_empty() || fresh.is_some_and(|own| own.exposed > 0);
        let stand = match (disagrees, differs, unknown) {
            (true, _, _) => Stand::Disagrees,
            (_, true, _) => Stand::Differs,
            (_, _, true) => Stand::Unknown,
            _ => Stand::Agrees,
        };
        if myself {
            reasons.push("it is this host: only its own audit tells".to_owned());
        }
        Self { node: look.place.name.clone(), stand, reasons, own, outside, unseen }
    }

    fn is_unknown(&self) -> bool {
        self.own.is_none()
            || self.unseen
            || self.outside.as_ref().is_some_and(|audit| !audit.blind.is_empty())
    }

    fn row(&self) -> Row {
        let number = |n: usize| n.to_string();
        let none = || "-".to_owned();
        let outside = self.outside.as_ref();
        let cells = vec![
            self.node.clone(),
            self.stand.name().to_owned(),
            outside.map_or(none(), |audit| number(audit.targets.len())),
            outside.map_or(none(), |audit| number(audit.exposed.len())),
            outside.map_or(none(), |audit| number(audit.missing.len())),
            self.own.as_ref().map_or(none(), |own| own.exposed.to_string()),
            self.own.as_ref().map_or(none(), |own| age(own.age)),
        ];
        let shade = match self.stand {
            Stand::Disagrees | Stand::Differs => RED,
            Stand::Unknown => YELLOW,
            Stand::Agrees => GREEN,
        };
        Row { cells, shade: Some((1, shade)), tail: String::new(), notes: self.reasons.clone() }
    }
}

/// "tcp/198.51.100.7:5432 and udp/.."
fn spots(list: &[Spot]) -> String {
    let texts: Vec<String> = list
        .iter()
        .map(|Spot { address, proto, port }| {
            format!("{proto}/{}", std::net::SocketAddr::new(*address, port.get()))
        })
        .collect();
    listed(&texts, SPOTS_MAX)
}

/// The whole fleet.
#[derive(Clone, Debug, PartialEq)]
pub struct SideBySide {
    pub fleet: String,
    pub at: Stamp,
    pub seconds: f64,
    /// How many ports of each address and protocol were asked.
    pub ports: usize,
    pub nodes: Vec<Compared>,
}

impl SideBySide {
    pub fn new(fleet: &str, at: Stamp, seconds: f64, ports: usize, mut nodes: Vec<Compared>) -> Self {
        nodes.sort_by(|a, b| (a.stand, &a.node).cmp(&(b.stand, &b.node)));
        Self { fleet: printable(fleet, 64), at, seconds, ports, nodes }
    }

    /// As in `audit`, not having seen all comes before having seen a difference.
    pub fn verdict(&self) -> Verdict {
        if self.nodes.iter().any(|node| node.stand == Stand::Unknown || node.is_unknown()) {
            Verdict::Unknown
        } else if self.nodes.iter().any(|node| node.stand != Stand::Agrees) {
            Verdict::Drift
        } else {
            Verdict::Ok
        }
    }

    pub fn to_text(&self, width: usize, colour: bool) -> String {
        let heads = vec!["NODE", "STANDS", "ADDRESSES", "EXPOSED", "MISSING", "OWN AUDIT", "AGE"];
        let table = Table { heads, rows: self.nodes.iter().map(Compared::row).collect() };
        let asked = match self.ports {
            65_535 => "every port".to_owned(),
            n => format!("{n} of 65535 ports (-p - for all)"),
        };
        let note = format!(
            "Asked {asked} of each address in {:.0} s. EXPOSED and MISSING are what this host met, against the \
             policies.",
            self.seconds
        );
        format!("{}\n{}", table.render(width, colour), wrapped(&note, width, 0))
    }

    pub fn to_json(&self) -> serde_json::Value {
        serde_json::json!({
            "version": 1, "fleet": self.fleet, "at": self.at, "seconds": self.seconds, "ports": self.ports,
            "verdict": self.verdict(), "nodes": self.nodes,
        })
    }
}

#[cfg(test)]
mod tests {
    use expect_test::expect;

    use super::super::view::tests::{look, said};
    use super::super::vitals::tests::vitals;
    use super::*;
    use crate::audit::{Answer, Scan};
    use crate::desired::{Desired, samples};
    use crate::terms::{Port, Proto};

    fn outside(answers: &[(u16, Answer)], gap: Option<&str>) -> Audit {
        let desired = Desired::new(samples::spoke(), samples::TODAY).unwrap();
        let answers = answers.iter().map(|(port, answer)| (Port::new(*port).unwrap(), *answer)).collect();
        let address = "198.51.100.7".parse().unwrap();
        let gap = gap.map(str::to_owned);
        let scan = Scan { address, name: None, proto: Proto::Tcp, source: None, answers, gap, effort: None };
        Audit::remote(&[scan], Some(&desired), Stamp::from_unix(0), 1.0)
    }

    const RIGHT: [(u16, Answer); 3] = [(80, Answer::SynAck), (443, Answer::SynAck), (5432, Answer::Silent)];
    const OPEN: [(u16, Answer); 3] = [(80, Answer::SynAck), (443, Answer::SynAck), (5432, Answer::SynAck)];
    const SHUT: [(u16, Answer); 3] = [(80, Answer::SynAck), (443, Answer::Silent), (5432, Answer::Silent)];

    fn own(name: &str, more: &str) -> Look {
        look(name, said(vitals(name, 0, more)))
    }

    #[test]
    fn disagreements_come_first() {
        let exposed = "spokeguard_audit_exposed_ports{family=\"ipv4\",proto=\"udp\"} 2\n";
        let nodes = vec![
            Compared::new(&own("agrees", ""), Outside::Met(outside(&RIGHT, None))),
            Compared::new(&own("hub-sees-more", ""), Outside::Met(outside(&OPEN, None))),
            Compared::new(&own("node-sees-more", exposed), Outside::Met(outside(&RIGHT, None))),
            Compared::new(&own("both-see", exposed), Outside::Met(outside(&OPEN, None))),
            Compared::new(&own("shut", ""), Outside::Met(outside(&SHUT, None))),
            Compared::new(&own("hidden", ""), Outside::NoAddress),
            Compared::new(&own("hub", ""), Outside::Myself),
            Compared::new(
                &look("silent", Heard::Silent("nobody".into())),
                Outside::Met(outside(&RIGHT, None)),
            ),
        ];
        let all = SideBySide::new("f", Stamp::from_unix(0), 2.0, 3, nodes);
        expect![[r#"
            NODE            STANDS     ADDRESSES  EXPOSED  MISSING  OWN AUDIT   AGE
            hub-sees-more   DISAGREES          1        1        0          0  60 s
                reached from here against the policy: tcp/198.51.100.7:5432
                its own audit reaches nothing against the policy
            node-sees-more  DISAGREES          1        0        0          2  60 s
                its own audit reaches 2 ports, this host none of them
            both-see        differs            1        1        0          2  60 s
                reached from here against the policy: tcp/198.51.100.7:5432
            shut            differs            1        0        1          0  60 s
                not reached though the policy lets everybody: tcp/198.51.100.7:443
            hidden          unknown            -        -        -          0  60 s
                the inventory names no public address
            silent          unknown            1        0        0          -     -
                its own audit is not known: nobody
            agrees          agrees             1        0        0          0  60 s
            hub             agrees             -        -        -          0  60 s
                it is this host: only its own audit tells

            Asked 3 of 65535 ports (-p - for all) of each address in 2 s. EXPOSED and
              MISSING are what this host met, against the policies.
        "#]]
        .assert_eq(&all.to_text(80, false));
        assert_eq!(all.verdict(), Verdict::Unknown);
    }

    #[test]
    fn a_verdict_is_never_fine_where_somebody_could_not_look() {
        let verdict = |nodes| SideBySide::new("f", Stamp::from_unix(0), 1.0, 3, nodes).verdict();
        let right = || Outside::Met(outside(&RIGHT, None));
        assert_eq!(verdict(vec![Compared::new(&own("a", ""), right())]), Verdict::Ok);
        assert_eq!(
            verdict(vec![Compared::new(&own("a", ""), Outside::Met(outside(&OPEN, None)))]),
            Verdict::Drift
        );
        let gap = Compared::new(&own("a", ""), Outside::Met(outside(&RIGHT, Some("no route"))));
        assert_eq!((gap.stand, verdict(vec![gap])), (Stand::Unknown, Verdict::Unknown));
        let mut old = own("a", "");
        let Heard::Said(said) = &mut old.heard else { unreachable!() };
        said.vitals.audit_age = Some(OLD_S + 1);
        assert_eq!(verdict(vec![Compared::new(&old, right())]), Verdict::Unknown);
    }
}
