//! Which datagrams are refused. UDP has no first packet: what arrives may be an attempt, or
//! the answer to what this host asked. Our table knows by conntrack, so conntrack is asked of
//! whatever the policy's rules refuse, and what it knows is not counted.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};

use crate::desired::Desired;
use crate::policy::Mode;
use crate::ruleset::evaluate::Evaluator;
use crate::ruleset::{Packet, Ruleset, Verdict};
use crate::terms::{Port, Proto};

/// Questions to conntrack at once.
const QUESTIONS_MAX: usize = 256;

/// What conntrack knows of a packet by its addresses and ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Known {
    /// No flow has it: it would be the first of a new one, or the rules have refused it.
    No,
    /// It goes the way in which its flow was begun.
    Begun,
    /// It is an answer.
    Answer,
}

/// Datagrams to this port are refused to nobody, or not to this source, and may be very many.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Welcome {
    pub port: u16,
    /// `None`: whoever sends them.
    pub source: Option<IpAddr>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Datagram {
    pub from: SocketAddr,
    pub to: SocketAddr,
}

/// The policy's rules for strangers' datagrams.
#[derive(Clone, Debug)]
pub struct Judge {
    /// As in enforce mode; no table where the policy has none.
    rules: Ruleset,
    /// What the rules would refuse gets in.
    audit: bool,
    pub welcome: Vec<Welcome>,
}

impl Judge {
    pub fn new(desired: &Desired) -> Self {
        let audit = desired.policy.enforce.mode == Mode::Audit;
        let table = if audit {
            let mut policy = desired.policy.clone();
            policy.enforce.mode = Mode::Enforce;
            Desired::new(policy, desired.today).ok().and_then(|desired| desired.table)
        } else {
            desired.table.clone()
        };
        let services = desired.services.iter().filter(|s| s.proto == Proto::Udp && s.is_everywhere());
        let anybody =
            services.filter(|s| s.from.is_none()).map(|s| Welcome { port: s.port.get(), source: None });
        let hub = desired.policy.mesh.hub.as_ref().and_then(|hub| hub.endpoint);
        let tunnel = hub.zip(desired.policy.mesh.listen_port);
        let tunnel = tunnel.map(|(hub, port)| Welcome { port: port.get(), source: Some(hub.ip()) });
        Self {
            rules: Ruleset { tables: table.into_iter().collect() },
            audit,
            welcome: anybody.chain(tunnel).collect(),
        }
    }

    /// Gives `refused` each of those that arrived by `interface` and that the rules refuse.
    /// How many could not be judged, since there were too many.
    pub fn refused<E>(
        &self,
        interface: &str,
        arrived: &[Datagram],
        is_local: &dyn Fn(IpAddr) -> bool,
        mut known: impl FnMut(&Datagram) -> Result<Known, E>,
        mut refused: impl FnMut(&Datagram),
    ) -> Result<u64, E> {
        if self.rules.tables.is_empty() || arrived.is_empty() {
            return Ok(0);
        }
        let evaluator = Evaluator::new(&self.rules);
        let mut answers: HashMap<Datagram, bool> = HashMap::new();
        let (mut asked, mut unjudged) = (0, 0);
        for datagram in arrived {
            let answer = match answers.get(datagram) {
                Some(answer) => *answer,
                None if !self.refuses(&evaluator, interface, datagram, is_local) => false,
                None if asked >= QUESTIONS_MAX => {
                    unjudged += 1;
                    continue;
                }
                None => {
                    asked += 1;
                    match known(datagram)? {
                        Known::No => true,
                        // It was let in, which in audit mode says nothing.
                        Known::Begun => self.audit,
                        Known::Answer => false,
                    }
                }
            };
            answers.insert(*datagram, answer);
            if answer {
                refused(datagram);
            }
        }
        Ok(unjudged)
    }

    fn refuses(
        &self,
        evaluator: &Evaluator,
        interface: &str,
        datagram: &Datagram,
        is_local: &dyn Fn(IpAddr) -> bool,
    ) -> bool {
        // Port 0 can't be opened. As a source it says that nobody waits for an answer.
        let Some(port) = Port::new(datagram.to.port()) else { return true };
        let Some(source_port) = Port::new(datagram.from.port().max(1)) else { return true };
        let packet = Packet {
            iifname: interface.to_owned(),
            source: datagram.from.ip(),
            destination: datagram.to.ip(),
            proto: Proto::Udp,
            source_port,
            port,
        };
        matches!(evaluator.judge(&packet, &is_local).verdict, Verdict::Drop | Verdict::Reject)
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use super::*;
    use crate::desired::samples;
    use crate::policy::Policy;

    fn datagram(from: &str, to: &str) -> Datagram {
        Datagram { from: from.parse().expect("an end"), to: to.parse().expect("an end") }
    }

    /// Those to 161 are new, those to 5000 answers, those to 6000 of a flow that was let in.
    fn judged(change: impl FnOnce(&mut Policy), arrived: &[Datagram]) -> (Vec<u16>, u64, usize) {
        let mut policy = samples::spoke();
        change(&mut policy);
        let judge = Judge::new(&Desired::new(policy, samples::TODAY).expect("a path"));
        let (mut ports, mut asked) = (Vec::new(), 0);
        let known = |datagram: &Datagram| {
            asked += 1;
            Ok::<_, Infallible>(match datagram.to.port() {
                5000 => Known::Answer,
                6000 => Known::Begun,
                _ => Known::No,
            })
        };
        let Ok(unjudged) =
            judge.refused("eth0", arrived, &|_| true, known, |datagram| ports.push(datagram.to.port()));
        (ports, unjudged, asked)
    }

    #[test]
    fn an_attempt_is_counted_each_time_and_an_answer_never() {
        let arrived = [
            datagram("192.0.2.7:4000", "198.51.100.1:161"),
            datagram("192.0.2.7:53", "198.51.100.1:5000"),
            datagram("192.0.2.7:4000", "198.51.100.1:161"),
            datagram("192.0.2.7:4000", "198.51.100.1:6000"),
            datagram("192.0.2.7:0", "198.51.100.1:0"),
            datagram("192.0.2.7:67", "198.51.100.1:68"),
            datagram("[2001:db8::7]:4000", "[2001:db8::1]:161"),
            datagram("192.0.2.7:4000", "198.51.100.1:53"),
        ];
        let dns = |policy: &mut Policy| policy.public.udp = vec![samples::port(53)];
        let (ports, unjudged, asked) = judged(dns, &arrived);
        assert_eq!((ports, unjudged), (vec![161, 161, 0, 161], 0));
        assert_eq!(asked, 5, "once of each that the rules refuse");
        let audit = |policy: &mut Policy| {
            dns(policy);
            policy.enforce.mode = Mode::Audit;
        };
        assert_eq!(judged(audit, &arrived).0, [161, 161, 6000, 0, 161], "what would be refused");
        assert_eq!(judged(|policy| policy.enforce.firewall = false, &arrived), (vec![], 0, 0));
    }

    #[test]
    fn a_flood_asks_conntrack_so_often_and_no_more() {
        let arrived: Vec<Datagram> =
            (1..2000).map(|port| datagram(&format!("192.0.2.7:{port}"), "198.51.100.1:161")).collect();
        let (ports, unjudged, asked) = judged(|_| {}, &arrived);
        assert_eq!((ports.len(), unjudged, asked), (QUESTIONS_MAX, 1999 - 256, QUESTIONS_MAX));
    }

    #[test]
    fn welcome_are_public_ports_and_the_hub_at_the_tunnel() {
        let mut policy = samples::spoke();
        policy.public.udp = vec![samples::port(443)];
        let judge = Judge::new(&Desired::new(policy.clone(), samples::TODAY).expect("a path"));
        let hub = policy.mesh.hub.as_ref().and_then(|hub| hub.endpoint).map(|end| end.ip());
        let mut expected = vec![Welcome { port: 443, source: None }];
        expected.extend(policy.mesh.listen_port.map(|port| Welcome { port: port.get(), source: hub }));
        assert_eq!(judge.welcome, expected);
    }
}
