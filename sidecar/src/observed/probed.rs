//! What probes from outside met: sweep by sweep, and as a compact value that outlives them.

use std::collections::BTreeSet;
use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::terms::{Port, Proto, Stamp};

/// What became of the probes of one sweep: one protocol, one address, one interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sweep {
    pub interface: String,
    pub address: IpAddr,
    pub proto: Proto,
    /// Where the probes said they came from (the first of them, where each has its own).
    pub source: IpAddr,
    /// In the order of the ports; no port twice.
    pub fates: Vec<(Port, Fate)>,
    /// Ports that were not probed, in order: their fates are what the rules say.
    pub unproven: Vec<Port>,
}

/// What one probe met, after every table, NAT and program of the host had its say.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Fate {
    /// Got through to this host itself, at this port after any DNAT or redirect. Whether a
    /// socket is there, the listeners tell.
    Delivered { address: IpAddr, port: Port },
    /// Got through on its way to another machine or a container.
    Forwarded { address: IpAddr, port: Port },
    /// Answered by a socket (a SYN-ACK, a datagram) where replies were asked for; or taken
    /// by a proxy: a transparent one's socket, or netfilter's own for SYNs.
    Answered,
    /// Answered by a TCP reset before any socket: a reject rule. Where replies were asked for, a closed
    /// port as well.
    Reset,
    /// Answered by ICMP (type, code): a reject rule, or no route behind a DNAT.
    Unreachable { icmp_type: u8, code: u8 },
    /// No trace of it: dropped.
    Dropped,
    /// Held back where no rule and no listing of sockets shows it.
    Held(Gate),
    /// We can't tell; it was never seen to arrive.
    Lost,
}

/// What may hold a packet back besides rules and routes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Gate {
    /// A program that the device's driver runs, before anything else.
    Xdp,
    /// A program on the control group of the socket; of systemd, for example, for IPAddressDeny=.
    ControlGroup,
    /// A policy of IPsec: blocked, or not to come in unprotected.
    Ipsec,
    /// The socket takes signed segments only (TCP MD5).
    Signature,
}

impl Gate {
    pub const fn name(self) -> &'static str {
        match self {
            Gate::Xdp => "an XDP program of the device",
            Gate::ControlGroup => "a BPF program of the socket's control group (IPAddressDeny=?)",
            Gate::Ipsec => "an IPsec policy",
            Gate::Signature => "the socket, which takes signed segments only",
        }
    }
}

/// Every sweep of one look from the outside in. Ports that fared alike are one run, so that
/// 65,535 of them are a few lines.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Probed {
    pub sweeps: Vec<Runs>,
    /// Spots that were asked once more because of what the rules say of them.
    #[serde(skip)]
    confirmed: BTreeSet<Dispute>,
}

/// One sweep, as runs in the order of their ports.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Runs {
    pub interface: String,
    pub address: IpAddr,
    pub proto: Proto,
    pub source: IpAddr,
    pub runs: Vec<Run>,
}

/// Neighbouring ports that met the same.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Run {
    pub first: Port,
    pub last: Port,
    /// Of the first port.
    pub fate: Fate,
    /// Where a packet came to follows its port: 81 came to 81 as 80 came to 80.
    #[serde(default)]
    pub along: bool,
}

/// One question to the host: a port of an address, asked through an interface.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Probe {
    pub interface: String,
    pub address: IpAddr,
    pub proto: Proto,
    pub port: Port,
}

/// What a probe met is doubted, because the rules let it in (`true`), hold it, or can't be
/// judged.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Dispute {
    pub probe: Probe,
    pub rules: Option<bool>,
}

/// When the last look from outside was, and what it cost.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Probing {
    pub at: Stamp,
    pub seconds: f64,
}

impl Probed {
    pub fn new(sweeps: &[Sweep]) -> Self {
        Self { sweeps: sweeps.iter().map(Runs::of).collect(), confirmed: BTreeSet::new() }
    }

    /// What a probe of this port met; `None`: it was not asked, or not seen to arrive.
    pub fn fate(&self, interface: &str, address: IpAddr, proto: Proto, port: Port) -> Option<Fate> {
        let at = |s: &&Runs| s.interface == interface && s.address == address && s.proto == proto;
        self.sweeps.iter().find(at)?.fate(port).filter(|fate| *fate != Fate::Lost)
    }

    pub fn of(&self, probe: &Probe) -> Option<Fate> {
        self.fate(&probe.interface, probe.address, probe.proto, probe.port)
    }

    /// It was asked once more because of this very doubt, and has met the same since.
    pub fn is_confirmed(&self, dispute: &Dispute) -> bool {
        self.confirmed.contains(dispute)
    }

    /// What a whole new look found takes the place of an older one; what stays the same
    /// stays confirmed.
    #[must_use]
    pub fn after(mut self, before: &Self) -> Self {
        let same = |d: &&Dispute| self.of(&d.probe).is_some_and(|fate| before.of(&d.probe) == Some(fate));
        self.confirmed = before.confirmed.iter().filter(same).cloned().collect();
        self
    }

    /// A later look at some ports only. Those of `asked` were asked because of a doubt, and
    /// count as confirmed from now on, whatever they met.
    pub fn update(&mut self, later: &[Runs], asked: &[Dispute]) {
        let before = std::mem::take(&mut self.confirmed);
        let before: Vec<(Dispute, Option<Fate>)> =
            before.into_iter().map(|d| (d.clone(), self.of(&d.probe))).collect();
        for sweep in later {
            let at = |s: &&mut Runs| {
                s.interface == sweep.interface && s.address == sweep.address && s.proto == sweep.proto
            };
            match self.sweeps.iter_mut().find(at) {
                Some(runs) => runs.update(sweep),
                None => self.sweeps.push(sweep.clone()),
            }
        }
        let same = before.into_iter().filter(|(d, fate)| self.of(&d.probe) == *fate).map(|(d, _)| d);
        self.confirmed = asked.iter().cloned().chain(same).take(CONFIRMED_MAX).collect();
    }

    /// How many ports were asked, all sweeps together.
    pub fn ports(&self) -> u64 {
        let runs = self.sweeps.iter().flat_map(|sweep| &sweep.runs);
        runs.map(|run| u64::from(run.last.get() - run.first.get()) + 1).sum()
    }
}

const CONFIRMED_MAX: usize = 4096;

impl Runs {
    pub fn of(sweep: &Sweep) -> Self {
        let Sweep { interface, address, proto, source, fates, unproven } = sweep;
        let mut runs: Vec<Run> = Vec::new();
        // The rules' opinion of a port is no second one.
        for (port, fate) in fates.iter().filter(|(port, _)| unproven.binary_search(port).is_err()) {
            if !runs.last_mut().is_some_and(|run| run.takes(*port, fate)) {
                runs.push(Run { first: *port, last: *port, fate: fate.clone(), along: false });
            }
        }
        Self { interface: interface.clone(), address: *address, proto: *proto, source: *source, runs }
    }

    pub fn fate(&self, port: Port) -> Option<Fate> {
        let at = self.runs.partition_point(|run| run.last < port);
        self.runs.get(at).filter(|run| run.first <= port).map(|run| run.at(port))
    }

    /// Probes that were never seen to arrive.
    pub fn lost(&self) -> u64 {
        let runs = self.runs.iter().filter(|run| run.fate == Fate::Lost);
        runs.map(|run| u64::from(run.last.get() - run.first.get()) + 1).sum()
    }

    fn update(&mut self, later: &Self) {
        self.source = later.source;
        for run in &later.runs {
            for port in (run.first.get()..=run.last.get()).filter_map(Port::new) {
                self.set(port, &run.at(port));
            }
        }
    }

    fn set(&mut self, port: Port, fate: &Fate) {
        let one = Run { first: port, last: port, fate: fate.clone(), along: false };
        let at = self.runs.partition_point(|run| run.last < port);
        let Some(run) = self.runs.get(at).filter(|run| run.first <= port).cloned() else {
            self.runs.insert(at, one);
            return;
        };
        if run.at(port) == *fate {
            return;
        }
        let before = Port::new(port.get() - 1).filter(|_| run.first < port);
        let after = port.get().checked_add(1).and_then(Port::new).filter(|_| port < run.last);
        let before = before.map(|last| Run { last, ..run.clone() });
        let after = after.map(|first| Run { first, fate: run.at(first), ..run });
        self.runs.splice(at..=at, before.into_iter().chain([one]).chain(after));
    }
}

impl Run {
    fn at(&self, port: Port) -> Fate {
        let beyond = port.get() - self.first.get();
        let follow = |to: Port| to.get().checked_add(beyond).and_then(Port::new).unwrap_or(to);
        match &self.fate {
            Fate::Delivered { address, port } if self.along => {
                Fate::Delivered { address: *address, port: follow(*port) }
            }
            Fate::Forwarded { address, port } if self.along => {
                Fate::Forwarded { address: *address, port: follow(*port) }
            }
            fate => fate.clone(),
        }
    }

    /// Makes the run one port longer, if that port is the next and fared alike.
    fn takes(&mut self, port: Port, fate: &Fate) -> bool {
        if self.last.get().checked_add(1) != Some(port.get()) {
            return false;
        }
        let single = self.first == self.last;
        let along = match &self.fate {
            // Of one port alone it can't be told yet.
            Fate::Delivered { .. } | Fate::Forwarded { .. } if single => &[true, false][..],
            _ => &[self.along][..],
        };
        let fits = along.iter().find(|along| Self { along: **along, ..self.clone() }.at(port) == *fate);
        let Some(fits) = fits else { return false };
        (self.last, self.along) = (port, *fits);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HERE: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(198, 51, 100, 7));

    fn port(number: u16) -> Port {
        Port::new(number).expect("a port")
    }

    fn to(number: u16) -> Fate {
        Fate::Delivered { address: HERE, port: port(number) }
    }

    fn sweep(fate: impl Fn(u16) -> Fate, ports: impl Iterator<Item = u16>) -> Sweep {
        let fates = ports.map(|number| (port(number), fate(number))).collect();
        Sweep {
            interface: "eth0".into(),
            address: HERE,
            proto: Proto::Tcp,
            source: HERE,
            fates,
            unproven: Vec::new(),
        }
    }

    fn check(fate: impl Fn(u16) -> Fate, runs: usize) {
        let sweep = sweep(fate, 1..=u16::MAX);
        let probed = Probed::new(std::slice::from_ref(&sweep));
        assert_eq!((probed.sweeps[0].runs.len(), probed.ports()), (runs, 65_535));
        for (port, fate) in &sweep.fates {
            assert_eq!(probed.sweeps[0].fate(*port).as_ref(), Some(fate), "{port}");
        }
        let text = serde_json::to_string(&probed).expect("a document");
        assert_eq!(serde_json::from_str::<Probed>(&text).expect("the same"), probed);
    }

    #[test]
    fn all_ports_are_a_few_runs_and_each_is_still_what_it_met() {
        check(|_| Fate::Dropped, 1);
        check(to, 1);
        check(|_| to(80), 1);
        check(|number| if (80..=90).contains(&number) { to(number + 1000) } else { Fate::Dropped }, 3);
        check(|number| if number < 1000 { to(80) } else { to(number) }, 2);
        check(|number| if number % 2 == 0 { Fate::Reset } else { Fate::Dropped }, 65_535);
    }

    #[test]
    fn what_was_asked_again_takes_its_place_and_nothing_else_does() {
        let mut probed = Probed::new(&[sweep(to, (1..=100).chain(200..=300))]);
        let probe =
            |number| Probe { interface: "eth0".into(), address: HERE, proto: Proto::Tcp, port: port(number) };
        let doubt = |number| Dispute { probe: probe(number), rules: Some(true) };
        let later = Runs::of(&sweep(|_| Fate::Reset, [1, 50, 100, 150, 250].into_iter()));
        probed.update(&[later], &[doubt(50)]);
        for number in 1..=400 {
            let expected = match number {
                1 | 50 | 100 | 150 | 250 => Some(Fate::Reset),
                1..=100 | 200..=300 => Some(to(number)),
                _ => None,
            };
            assert_eq!(probed.of(&probe(number)), expected, "{number}");
        }
        assert!(probed.is_confirmed(&doubt(50)) && !probed.is_confirmed(&doubt(250)));
        let other = Dispute { rules: Some(false), ..doubt(50) };
        assert!(!probed.is_confirmed(&other), "the rules have come to say something else");
        // In a whole new look only what met the same is still confirmed.
        let again = Probed::new(&[sweep(|_| Fate::Reset, 1..=300)]).after(&probed);
        assert!(again.is_confirmed(&doubt(50)));
        assert!(!Probed::new(&[sweep(to, 1..=300)]).after(&probed).is_confirmed(&doubt(50)));
        probed.update(&[Runs::of(&sweep(to, 50..=50))], &[]);
        assert!(!probed.is_confirmed(&doubt(50)), "it meets something else now");
    }

    #[test]
    fn a_probe_that_did_not_arrive_is_no_answer() {
        let probed = Probed::new(&[sweep(|n| if n == 7 { Fate::Lost } else { to(n) }, 1..=9)]);
        let fate = |number| probed.fate("eth0", HERE, Proto::Tcp, port(number));
        assert_eq!((fate(7), fate(8), fate(10)), (None, Some(to(8)), None));
        assert_eq!(probed.fate("eth1", HERE, Proto::Tcp, port(8)), None);
        assert_eq!((probed.sweeps[0].lost(), probed.ports()), (1, 9));
    }
}
