//! What the trials of our controls prove. A control that is configured, attached and reads
//! back well may still refuse nothing; only a packet that it refused says that it does.

use super::{Assessment, Code, Finding, Severity};
use crate::observed::{Facet, Flight};
use crate::policy::Mode;

/// The controls that are tried by canaries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Canary {
    /// Our table.
    Firewall,
    /// The tc guard.
    Guard,
    /// The eBPF counters.
    Counters,
    /// The daemon's repair of our table.
    Repair,
}

/// What one trial came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    Proven,
    /// It did not do what it is there for, and how.
    Failed(String),
    /// It could not be tried, and why.
    Untried(String),
}

/// Whether our table refuses what the policy does, or in audit mode sees it and lets it pass.
pub fn firewall(flights: &[Flight], mode: Mode) -> Outcome {
    judged(flights.iter().filter(|flight| flight.past_guard), |flight| match mode {
        _ if !flight.table.reached && flight.through => {
            failed(flight, "got in by a way on which our table is not asked")
        }
        _ if !flight.table.reached => untried(flight, "was refused by something before it got to our table"),
        Mode::Enforce if flight.table.passed => failed(flight, "got past our table"),
        Mode::Audit if !flight.table.passed => {
            failed(flight, "was refused by our table, which is to count only")
        }
        _ => Some(Outcome::Proven),
    })
}

/// Whether the guard refuses by itself what the policy does.
pub fn guard(flights: &[Flight]) -> Outcome {
    let own: Vec<&Flight> = flights.iter().filter(|flight| !flight.past_guard).collect();
    judged(own.into_iter().filter(|flight| flight.proto == crate::terms::Proto::Tcp), |flight| {
        let on = flight.table.reached || flight.through;
        match flight.guard {
            None => failed(flight, "met no guard: none is on this interface"),
            Some(guard) if guard.passed => failed(flight, "got past the guard"),
            Some(guard) if guard.reached && on => {
                failed(flight, "got in although the guard let nothing pass: its program is another")
            }
            Some(guard) if guard.reached => Some(Outcome::Proven),
            Some(_) if on => failed(flight, "got in by a way on which the guard is not asked"),
            Some(_) => untried(flight, "was refused by something before it got to the guard"),
        }
    })
}

/// Whether the counters count each packet once, and each byte of it.
pub fn counters(flights: &[Flight]) -> Outcome {
    judged(flights.iter().filter(|flight| flight.counted.is_some()), |flight| {
        let counted = flight.counted?;
        let packets = u64::from(flight.arrived);
        if (counted.packets, counted.bytes, counted.attempts) == (packets, counted.bytes_wanted, packets) {
            return Some(Outcome::Proven);
        }
        let reached = flight.guard.is_some_and(|guard| guard.reached) || flight.table.reached;
        if counted.packets == 0 && !reached && !flight.through {
            return untried(flight, "was refused by something before it got to the counters");
        }
        let text = format!(
            "{}: of {packets} packets with {} bytes they counted {} with {}, {} of them as new connections",
            way(flight),
            counted.bytes_wanted,
            counted.packets,
            counted.bytes,
            counted.attempts
        );
        Some(Outcome::Failed(text))
    })
}

/// The worst of them decides; of none, nothing is known.
fn judged<'a>(
    flights: impl IntoIterator<Item = &'a Flight>,
    judge: impl Fn(&Flight) -> Option<Outcome>,
) -> Outcome {
    let mut worst = None;
    for flight in flights {
        let outcome = if flight.arrived == 0 { untried(flight, "never arrived") } else { judge(flight) };
        worst = match (worst, outcome) {
            (Some(Outcome::Failed(why)), _) => Some(Outcome::Failed(why)),
            (_, Some(Outcome::Failed(why))) => Some(Outcome::Failed(why)),
            (Some(Outcome::Untried(why)), _) => Some(Outcome::Untried(why)),
            (before, None) => before,
            (_, outcome) => outcome,
        };
    }
    worst.unwrap_or_else(|| Outcome::Untried("no packet could be sent by any public interface".into()))
}

fn way(flight: &Flight) -> String {
    let Flight { interface, address, proto, port, .. } = flight;
    format!("{proto}/{port} to {address} through {interface}")
}

fn failed(flight: &Flight, how: &str) -> Option<Outcome> {
    Some(Outcome::Failed(format!("a stranger's {} {how}", way(flight))))
}

fn untried(flight: &Flight, why: &str) -> Option<Outcome> {
    Some(Outcome::Untried(format!("a stranger's {} {why}", way(flight))))
}

impl Canary {
    pub const ALL: [Canary; 4] = [Canary::Firewall, Canary::Guard, Canary::Counters, Canary::Repair];

    const fn name(self) -> &'static str {
        match self {
            Canary::Firewall => "firewall",
            Canary::Guard => "guard",
            Canary::Counters => "counters",
            Canary::Repair => "repair",
        }
    }

    const fn wanted(self) -> &'static str {
        match self {
            Canary::Firewall => "our table refuses a stranger's packet to a port that the policy refuses",
            Canary::Guard => "the tc guard refuses a stranger's SYN to such a port by itself",
            Canary::Counters => "each packet counted once",
            Canary::Repair => "a change of our table undone within seconds",
        }
    }

    const fn facet(self) -> Facet {
        match self {
            Canary::Firewall | Canary::Guard => Facet::Audit,
            Canary::Counters => Facet::Counters,
            Canary::Repair => Facet::Nftables,
        }
    }
}

impl Outcome {
    /// What is to be told of it. Not having been able to try makes the verdict unknown; having
    /// tried in vain is a difference.
    pub fn tell(&self, canary: Canary, out: &mut Assessment) {
        let (found, next) = match (self, canary) {
            (Outcome::Proven, _) => return,
            (Outcome::Failed(why), Canary::Firewall | Canary::Guard) => (
                format!("configured but does not refuse: {why}"),
                "Look for what leads packets around it (`nft list ruleset`, `bpftool net`, `tc filter show`), \
                 and run `spokeguard audit` for what is open meanwhile.",
            ),
            (Outcome::Failed(why), Canary::Counters) => (
                format!("attached but does not count: {why}"),
                "Look for programs that run before ours (`bpftool net`); until then don't trust the traffic \
                 numbers.",
            ),
            (Outcome::Failed(why), Canary::Repair) => (
                format!("running but does not repair: {why}"),
                "Look into the journal for why nft fails; until then drift stays.",
            ),
            (Outcome::Untried(why), _) => {
                out.doubt(canary.facet(), format!("whether the {} works: {why}", canary.name()));
                (
                    format!("could not be tried: {why}"),
                    "Give spokeguard CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON, or remove what is in the way; it \
                     is tried again by itself.",
                )
            }
        };
        let subject = format!("control {}", canary.name());
        out.add(Finding::new(Code::ControlUnproven, Severity::High, subject, canary.wanted(), found, next));
        out.settle();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::observed::{Counted, Crossing};
    use crate::terms::{Port, Proto};

    const REFUSED: Crossing = Crossing { reached: true, passed: false };
    const PASSED: Crossing = Crossing { reached: true, passed: true };
    const AWAY: Crossing = Crossing { reached: false, passed: false };

    /// What a host does whose controls hold: a SYN ends at the guard, what gets around that
    /// ends at the table.
    fn sound() -> Vec<Flight> {
        let counted = Counted { packets: 3, bytes: 222, attempts: 3, bytes_wanted: 222 };
        let syn = Flight {
            interface: "eth0".into(),
            address: [198, 51, 100, 7].into(),
            proto: Proto::Tcp,
            port: Port::new(29_999).expect("a port"),
            past_guard: false,
            sent: 3,
            arrived: 3,
            guard: Some(REFUSED),
            table: AWAY,
            through: false,
            counted: Some(counted),
        };
        let past = Flight {
            past_guard: true,
            sent: 1,
            arrived: 1,
            guard: None,
            table: REFUSED,
            counted: None,
            ..syn.clone()
        };
        let datagram = Flight { proto: Proto::Udp, ..past.clone() };
        vec![syn, past, datagram]
    }

    fn with(at: usize, change: impl Fn(&mut Flight)) -> Vec<Flight> {
        let mut flights = sound();
        change(&mut flights[at]);
        flights
    }

    fn is_failed(outcome: Outcome, how: &str) {
        assert!(matches!(&outcome, Outcome::Failed(why) if why.contains(how)), "{outcome:?}");
    }

    fn is_untried(outcome: Outcome, why: &str) {
        assert!(matches!(&outcome, Outcome::Untried(text) if text.contains(why)), "{outcome:?}");
    }

    #[test]
    fn a_control_is_proven_by_what_it_refused_and_by_nothing_less() {
        let flights = sound();
        assert_eq!(firewall(&flights, Mode::Enforce), Outcome::Proven);
        assert_eq!((guard(&flights), counters(&flights)), (Outcome::Proven, Outcome::Proven));
        for at in [1, 2] {
            let open = with(at, |flight| flight.table = PASSED);
            is_failed(firewall(&open, Mode::Enforce), "got past our table");
            assert_eq!(guard(&open), Outcome::Proven, "the one says nothing of the other");
            let around = with(at, |flight| (flight.table, flight.through) = (AWAY, true));
            is_failed(firewall(&around, Mode::Enforce), "not asked");
            let early = with(at, |flight| flight.table = AWAY);
            is_untried(firewall(&early, Mode::Enforce), "before it got to our table");
            let lost = with(at, |flight| (flight.arrived, flight.table) = (0, AWAY));
            is_untried(firewall(&lost, Mode::Enforce), "never arrived");
        }
        is_untried(firewall(&[], Mode::Enforce), "no packet");
    }

    #[test]
    fn a_guard_that_is_passed_or_passed_by_is_told_from_one_that_was_not_reached() {
        let seen =
            |crossing, table| guard(&with(0, |flight| (flight.guard, flight.table) = (crossing, table)));
        is_failed(seen(Some(PASSED), REFUSED), "got past the guard");
        is_failed(seen(Some(REFUSED), REFUSED), "another");
        is_failed(seen(Some(AWAY), REFUSED), "the guard is not asked");
        is_failed(seen(None, REFUSED), "none is on this interface");
        is_untried(seen(Some(AWAY), AWAY), "before it got to the guard");
        // What was kept from the guard, or is none of its business, says nothing of it.
        is_untried(guard(&sound()[1..]), "no packet");
    }

    #[test]
    fn in_audit_mode_a_refusal_is_the_failure() {
        let with = |table: Crossing| {
            let mut flights = sound();
            flights.iter_mut().for_each(|f| (f.guard, f.table, f.through) = (None, table, table.passed));
            flights
        };
        assert_eq!(firewall(&with(PASSED), Mode::Audit), Outcome::Proven);
        is_failed(firewall(&with(REFUSED), Mode::Audit), "count only");
        is_failed(firewall(&with(PASSED), Mode::Enforce), "got past our table");
    }

    #[test]
    fn counters_that_miss_or_invent_anything_are_not_proven() {
        let changes: [fn(&mut Counted); 5] = [
            |counted| *counted = Counted { bytes_wanted: 222, ..Counted::default() },
            |counted| counted.packets += 1,
            |counted| counted.packets -= 1,
            |counted| counted.bytes -= 14,
            |counted| counted.attempts = 0,
        ];
        for change in changes {
            let flights = with(0, |flight| change(flight.counted.as_mut().expect("counted")));
            is_failed(counters(&flights), "they counted");
        }
        is_untried(counters(&sound()[1..]), "no packet");
        let early = with(0, |f| (f.guard, f.counted) = (Some(AWAY), Some(Counted::default())));
        is_untried(counters(&early), "before it got to the counters");
    }

    #[test]
    fn a_failed_control_differs_and_an_untried_one_leaves_the_verdict_open() {
        let told = |outcome: Outcome| {
            let mut out = Assessment::default();
            Canary::ALL.into_iter().for_each(|canary| outcome.tell(canary, &mut out));
            out
        };
        assert_eq!(told(Outcome::Proven), Assessment::default());
        let failed = told(Outcome::Failed("so".into()));
        assert!(failed.findings.len() == 4 && failed.doubts.is_empty(), "{failed:?}");
        assert!(failed.findings.iter().any(|f| f.found == "configured but does not refuse: so"));
        let untried = told(Outcome::Untried("so".into()));
        assert_eq!((untried.findings.len(), untried.doubts.len()), (4, 4));
        assert!(untried.findings.iter().all(|f| f.found == "could not be tried: so"));
    }
}
