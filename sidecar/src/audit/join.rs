//! Joins what probes met with who listens, which rule decides and what the policy wants.

use std::cell::OnceCell;
use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, SocketAddr};

use super::{
    Answer, Audit, Blind, Fate, Others, PortState, Protocol, Scan, Spot, State, Sweep, Target, Vantage,
    Wanted, service_name,
};
use ipnet::IpNet;

use crate::desired::guard::{Boot, Syn};
use crate::desired::{COMMENT_PREFIX, Desired, DropReason, Service, TABLE};
use crate::observed::{Link, Listener, Reading, Snapshot};
use crate::report::Verdict;
use crate::ruleset::alike::Alike;
use crate::ruleset::evaluate::published;
use crate::ruleset::{
    Evaluator, Host, Judgement, Packet, Place, Published, Ruleset, Statement, TableFamily, Verdict as Says,
};
use crate::terms::{Family, Port, Proto, Scope, Stamp, printable};

/// Up to this many ports of one state are listed one by one; nmap does the same.
const LISTED_MAX: usize = 25;
/// Rules asked why a port does not answer, for one sweep. Each question walks every table.
const ASKED_MAX: usize = 256;
/// Sources asked for each port that is held back.
const NAMED_MAX: usize = 64;
const SOURCE_PORT: Port = Port::new(50_123).unwrap();

/// The readings that explain what probes met. Without a policy nothing is wanted or not.
#[derive(Clone, Copy)]
pub struct View<'a> {
    pub desired: Option<&'a Desired>,
    pub rules: &'a Reading<Ruleset>,
    pub listeners: &'a Reading<Vec<Listener>>,
    pub links: &'a Reading<Vec<Link>>,
    /// Interfaces on which the tc guard holds the policy's rules.
    pub guarded: &'a [String],
}

impl<'a> View<'a> {
    pub fn of(desired: &'a Desired, snapshot: &'a Snapshot) -> Self {
        let Snapshot { nftables, listeners, links, guard, .. } = snapshot;
        Self { desired: Some(desired), rules: nftables, listeners, links, guarded: guard.holding() }
    }
}

impl Audit {
    /// What sweeps of this host came to. In them nothing is answered, so a port is open if
    /// the packet got through and a socket is there to take it, and a port that leads to
    /// another machine or a container is open as far as this host is concerned.
    pub fn outside_in(sweeps: &[Sweep], view: &View, started: Stamp, seconds: f64) -> Self {
        let mut audit = Self::empty(Vantage::OutsideIn, started, seconds);
        if let Reading::Blind(gap) = view.listeners {
            audit.blind("listeners", &gap.reason);
        }
        let mut all = Vec::new();
        for sweep in sweeps {
            let joined = Joined::sweep(sweep, view);
            let lost = sweep.fates.iter().filter(|(_, fate)| *fate == Fate::Lost).count();
            if lost > 0 {
                let Sweep { proto, address, interface, .. } = sweep;
                let ports = if lost == 1 { "port" } else { "ports" };
                audit.blind(
                    "probe",
                    &format!("{lost} {proto} {ports} of {address} on {interface} stayed undecided"),
                );
            }
            let target = audit.target(sweep.address, None, Some(&sweep.interface), Some(sweep.source));
            target.protocols.push(joined.protocol.clone());
            all.push(joined);
        }
        audit.conclude(&all);
        audit
    }

    /// What scans of other hosts came to; `expect` is the policy of the host behind them.
    pub fn remote(scans: &[Scan], expect: Option<&Desired>, started: Stamp, seconds: f64) -> Self {
        let mut audit = Self::empty(Vantage::Remote, started, seconds);
        let mut all = Vec::new();
        for scan in scans {
            let joined = Joined::scan(scan, expect);
            if let Some(gap) = &scan.gap {
                audit.blind("probe", &format!("{} of {}: {gap}", scan.proto, scan.address));
            }
            let target = audit.target(scan.address, scan.name.as_deref(), None, scan.source);
            target.protocols.push(joined.protocol.clone());
            all.push(joined);
        }
        audit.conclude(&all);
        audit
    }

    /// Says that something could not be looked at; the verdict is unknown from then on.
    pub fn blind(&mut self, facet: &str, reason: &str) {
        let blind = Blind { facet: facet.to_owned(), reason: printable(reason, 600) };
        if !self.blind.contains(&blind) {
            self.blind.push(blind);
        }
        self.verdict = Verdict::Unknown;
    }

    fn empty(vantage: Vantage, started: Stamp, seconds: f64) -> Self {
        Self {
            version: 1,
            vantage,
            started,
            seconds: (seconds * 1000.0).round() / 1000.0,
            targets: Vec::new(),
            verdict: Verdict::Ok,
            exposed: Vec::new(),
            missing: Vec::new(),
            blind: Vec::new(),
        }
    }

    fn target(
        &mut self,
        address: IpAddr,
        name: Option<&str>,
        interface: Option<&str>,
        source: Option<IpAddr>,
    ) -> &mut Target {
        let same = |t: &Target| t.address == address && t.interface.as_deref() == interface;
        let at = self.targets.iter().position(same).unwrap_or_else(|| {
            self.targets.push(Target {
                address,
                name: name.map(|name| printable(name, 253)),
                interface: interface.map(str::to_owned),
                family: Family::of(address),
                source,
                protocols: Vec::new(),
            });
            self.targets.len() - 1
        });
        &mut self.targets[at]
    }

    /// A port that nobody listens at is missed only where its service is found nowhere: a
    /// policy that lets a port be reached does not ask for it on every address. One that a
    /// rule holds back is missed wherever that happens.
    fn conclude(&mut self, all: &[Joined]) {
        let open: HashSet<(Proto, Port)> = all.iter().flat_map(|j| j.open.iter().copied()).collect();
        for joined in all {
            self.exposed.extend(joined.exposed.iter().cloned());
            let missed = joined.wanting.iter().filter(|(spot, state)| {
                *state == State::Filtered || !open.contains(&(spot.proto, spot.port))
            });
            self.missing.extend(missed.map(|(spot, _)| spot.clone()));
        }
        self.exposed.sort();
        self.exposed.dedup();
        self.missing.sort();
        self.missing.dedup();
        if self.verdict == Verdict::Ok && !(self.exposed.is_empty() && self.missing.is_empty()) {
            self.verdict = Verdict::Drift;
        }
    }
}

/// What the evaluator of rules thinks would become of probes, where none could be sent.
pub fn opinion(
    view: &View,
    interface: &str,
    address: IpAddr,
    source: IpAddr,
    proto: Proto,
    ports: &[Port],
) -> Sweep {
    let fates = Site::new(view, interface, address, source, proto).alone(ports.iter().copied());
    Sweep { interface: interface.to_owned(), address, proto, source, fates, unproven: ports.to_vec() }
}

/// One protocol of one target, and what follows from it.
struct Joined {
    protocol: Protocol,
    open: Vec<(Proto, Port)>,
    exposed: Vec<Spot>,
    /// Wanted and not open.
    wanting: Vec<(Spot, State)>,
}

/// One port before it is known whether it gets a line.
struct Cell<'a> {
    port: Port,
    state: State,
    by: Option<&'a Listener>,
    wanted: Option<&'a Service>,
}

impl Joined {
    fn sweep(sweep: &Sweep, view: &View) -> Self {
        let Sweep { interface, address, proto, source, fates, unproven } = sweep;
        let site = Site::new(view, interface, *address, *source, *proto);
        let fates = &site.heard(fates);
        let way = Way {
            scope: view.desired.and_then(|d| d.policy.scope_of(interface)),
            interface: Some(interface),
            address: *address,
            source: Some(*source),
        };
        let welcome = view.desired.map(|d| way.welcome(d, *proto)).unwrap_or_default();
        let cells = fates.iter().map(|(port, fate)| {
            let landed = match fate {
                Fate::Delivered { address, port } => (*address, *port),
                _ => (*address, *port),
            };
            let by =
                if matches!(fate, Fate::Forwarded { .. }) { None } else { site.listener(landed.0, landed.1) };
            let state = match fate {
                Fate::Delivered { .. } if view.listeners.seen().is_none() => State::Unknown,
                Fate::Delivered { .. } if by.is_some() => State::Open,
                Fate::Delivered { .. } => State::Closed,
                Fate::Forwarded { .. } | Fate::Answered => State::Open,
                Fate::Reset => State::Closed,
                Fate::Unreachable { icmp_type, code } => unreachable(*proto, *address, *icmp_type, *code).0,
                Fate::Dropped | Fate::Held(_) => State::Filtered,
                Fate::Lost => State::Unknown,
            };
            Cell { port: *port, state, by, wanted: welcome.get(port).copied() }
        });
        let cells: Vec<Cell> = cells.collect();
        let mut asked = 0;
        let reason = |at: usize| {
            asked += 1;
            let text = site.reason(&fates[at].1, &cells[at], asked <= ASKED_MAX);
            match (unproven.binary_search(&fates[at].0), &fates[at].1) {
                (Err(_), _) => text,
                (Ok(_), Fate::Lost) => "unknown; not probed, and the rules don't tell".to_owned(),
                (Ok(_), _) if text.contains("; ") => text + ", unproven",
                (Ok(_), _) => text + "; unproven",
            }
        };
        let mut joined = Self::of(view.desired, *address, *proto, &cells, reason);
        joined.protocol.unproven = u32::try_from(unproven.len()).unwrap_or(u32::MAX);
        joined
    }

    fn scan(scan: &Scan, expect: Option<&Desired>) -> Self {
        let Scan { address, proto, source, answers, effort, .. } = scan;
        let mesh = |d: &Desired| d.in_mesh(*address) || d.policy.mesh.address.contains(address);
        let scope = expect.map(|d| if mesh(d) { Scope::Mesh } else { Scope::Public });
        let way = Way { scope, interface: None, address: *address, source: *source };
        let welcome = expect.map(|d| way.welcome(d, *proto)).unwrap_or_default();
        let cells = answers.iter().map(|(port, answer)| {
            let (state, _) = heard(*proto, *address, *answer);
            Cell { port: *port, state, by: None, wanted: welcome.get(port).copied() }
        });
        let cells: Vec<Cell> = cells.collect();
        let reason = |at: usize| heard(*proto, *address, answers[at].1).1.to_owned();
        let mut joined = Self::of(expect, *address, *proto, &cells, reason);
        joined.protocol.effort = *effort;
        joined
    }

    fn of(
        desired: Option<&Desired>,
        address: IpAddr,
        proto: Proto,
        cells: &[Cell],
        mut reason: impl FnMut(usize) -> String,
    ) -> Self {
        // Worth a line: open, wanted, or somebody waits there although nobody gets through.
        let notable = |c: &Cell| c.state == State::Open || c.wanted.is_some() || c.by.is_some();
        let count = |state: State| cells.iter().filter(|c| c.state == state && !notable(c)).count();
        let most = State::ALL.into_iter().filter(|s| *s != State::Open).max_by_key(|state| count(*state));
        let state = most.unwrap_or(State::Closed);
        let summed = if count(state) > LISTED_MAX { count(state) } else { 0 };
        let is_listed = |c: &Cell| summed == 0 || notable(c) || c.state != state;
        let mut out = Self {
            protocol: Protocol {
                proto,
                scanned: u32::try_from(cells.len()).unwrap_or(u32::MAX),
                ports: Vec::new(),
                others: Others { state, count: u32::try_from(summed).unwrap_or(u32::MAX) },
                unproven: 0,
                effort: None,
            },
            open: Vec::new(),
            exposed: Vec::new(),
            wanting: Vec::new(),
        };
        for (at, cell) in cells.iter().enumerate().filter(|(_, c)| is_listed(c)) {
            let Cell { port, state, by, wanted } = *cell;
            let exception = wanted.and_then(|s| s.exception);
            let accepted = exception.and_then(|at| desired?.policy.exceptions.get(at));
            let spot = Spot { address, proto, port };
            match state {
                State::Open | State::OpenFiltered => out.open.push((proto, port)),
                State::Closed | State::Filtered if wanted.is_some() && exception.is_none() => {
                    out.wanting.push((spot.clone(), state));
                }
                State::Closed | State::Filtered | State::Unknown => {}
            }
            if state == State::Open && wanted.is_none() && desired.is_some() {
                out.exposed.push(spot);
            }
            let named = desired.and_then(|d| d.name_of(proto, port));
            // "tcp-8443" says nothing new.
            let named = named.filter(|name| *name != format!("{proto}-{port}"));
            let service = named.or(service_name(proto, port)).map(|name| printable(name, 64));
            out.protocol.ports.push(PortState {
                port,
                state,
                service,
                wanted: desired.map(|_| if wanted.is_some() { Wanted::Open } else { Wanted::Closed }),
                by: by.and_then(|l| l.owner.clone()),
                reason: reason(at),
                accepted: accepted.map(|e| printable(&e.name, 64)),
            });
        }
        out
    }
}

/// How the packets of a sweep or scan come to a host that has a policy.
struct Way<'a> {
    scope: Option<Scope>,
    interface: Option<&'a str>,
    address: IpAddr,
    source: Option<IpAddr>,
}

impl Way<'_> {
    /// The ports at which the policy wants these packets to be taken. On a mesh address
    /// that is asked from outside, none.
    fn welcome<'d>(&self, desired: &'d Desired, proto: Proto) -> HashMap<Port, &'d Service> {
        let Some(scope) = self.scope else { return HashMap::new() };
        let is_mesh = desired.in_mesh(self.address) || desired.policy.mesh.address.contains(&self.address);
        if scope == Scope::Public && is_mesh {
            return HashMap::new();
        }
        let local = |s: &Service| {
            let of = s.local.and_then(|at| desired.policy.locals.get(at));
            of.is_none_or(|of| {
                self.interface.is_some_and(|name| of.interfaces.iter().any(|p| p.matches(name)))
            })
        };
        let admits = |s: &Service| self.source.map_or_else(|| s.is_for_anyone(), |source| s.admits(source));
        let all = desired.services.iter().filter(|s| s.proto == proto);
        let here = all.filter(|s| s.scope == scope && local(s) || s.is_everywhere()).filter(|s| admits(s));
        let mut out: HashMap<Port, &Service> = HashMap::new();
        for service in here {
            let known = out.entry(service.port).or_insert(service);
            // What the policy wants anyway is no exception.
            if known.exception.is_some() && service.exception.is_none() {
                *known = service;
            }
        }
        out
    }
}

/// Where the packets of one sweep come in.
pub(super) struct Site<'a> {
    view: &'a View<'a>,
    evaluator: Option<Evaluator<'a>>,
    alike: OnceCell<Alike>,
    interface: &'a str,
    address: IpAddr,
    source: IpAddr,
    proto: Proto,
    sockets: HashMap<Port, Vec<&'a Listener>>,
    /// Sources that rules name, of this family.
    named: Vec<IpNet>,
}

impl<'a> Site<'a> {
    pub(super) fn new(
        view: &'a View<'a>,
        interface: &'a str,
        address: IpAddr,
        source: IpAddr,
        proto: Proto,
    ) -> Self {
        let index =
            view.links.seen().and_then(|links| links.iter().find(|l| l.name == interface)).map(|l| l.index);
        let mut sockets: HashMap<Port, Vec<&Listener>> = HashMap::new();
        for listener in view.listeners.seen().into_iter().flatten().filter(|l| l.proto == proto) {
            let here = match listener.device {
                None => true,
                // A device without addresses of its own may be a VRF, which stands for its members.
                Some(device) => Some(device) == index || view.is_bare(device),
            };
            if here {
                sockets.entry(listener.port).or_default().push(listener);
            }
        }
        let named = view.named().into_iter().filter(|net| Family::of_net(net) == Family::of(address));
        let named = named.take(NAMED_MAX).collect();
        let evaluator = view.rules.seen().map(Evaluator::new);
        let alike = OnceCell::new();
        Self { view, evaluator, alike, interface, address, source, proto, sockets, named }
    }

    fn packet(&self, port: Port, source: IpAddr) -> Packet {
        Packet {
            iifname: self.interface.to_owned(),
            source,
            destination: self.address,
            proto: self.proto,
            source_port: SOURCE_PORT,
            port,
        }
    }

    fn judge(&self, port: Port, source: IpAddr) -> Option<Judgement> {
        Some(self.evaluator.as_ref()?.judge(&self.packet(port, source), self.view))
    }

    /// The number of the group of ports that no rule tells apart.
    pub(super) fn group(&self, port: Port) -> usize {
        let alike = self.alike.get_or_init(|| self.view.rules.seen().map(Alike::of).unwrap_or_default());
        alike.group(port)
    }

    /// The slowest limit that a probe may use up, in packets a second.
    pub(super) fn limited(&self, port: Port) -> Option<f64> {
        self.evaluator.as_ref()?.limited(&self.packet(port, self.source), self.view)
    }

    /// What the rules say of packets that come alone. Ports that no rule tells apart are
    /// judged once.
    pub(super) fn alone(&self, ports: impl Iterator<Item = Port>) -> Vec<(Port, Fate)> {
        let Some(evaluator) = &self.evaluator else { return ports.map(|p| (p, Fate::Lost)).collect() };
        let mut known: HashMap<usize, (Port, Fate)> = HashMap::new();
        let mut fate = |port: Port| {
            if self.guarded(port).is_some() {
                return Fate::Dropped;
            }
            let (asked, fate) = known.entry(self.group(port)).or_insert_with(|| {
                let judgement = evaluator.judge_alone(&self.packet(port, self.source), self.view);
                (port, self.fate(port, &judgement))
            });
            match fate.clone() {
                // A port that a rule gives is in a group of its own, so this one is unchanged.
                Fate::Delivered { address, port: to } if to == *asked => Fate::Delivered { address, port },
                Fate::Forwarded { address, port: to } if to == *asked => Fate::Forwarded { address, port },
                other => other,
            }
        };
        ports.map(|port| (port, fate(port))).collect()
    }

    fn fate(&self, port: Port, judgement: &Judgement) -> Fate {
        match &judgement.verdict {
            Says::Accept => {
                let to = judgement.rewritten.as_ref();
                let address = to.and_then(|r| r.address).unwrap_or(self.address);
                let port = to.and_then(|r| r.port).unwrap_or(port);
                if self.view.is_local(address) {
                    Fate::Delivered { address, port }
                } else {
                    Fate::Forwarded { address, port }
                }
            }
            Says::Drop => Fate::Dropped,
            Says::Reject if judgement.by.as_ref().is_some_and(|by| self.resets(by)) => Fate::Reset,
            // What `reject` alone does.
            Says::Reject if self.address.is_ipv4() => Fate::Unreachable { icmp_type: 3, code: 3 },
            Says::Reject => Fate::Unreachable { icmp_type: 1, code: 4 },
            Says::Unknown(_) => Fate::Lost,
        }
    }

    /// Whether the rule that rejects does so by a TCP reset.
    fn resets(&self, by: &Place) -> bool {
        let tables = self.view.rules.seen().into_iter().flat_map(|rules| &rules.tables);
        let chains = tables.filter(|t| (t.family, &t.name) == (by.family, &by.table)).flat_map(|t| &t.chains);
        let rules = chains.filter(|chain| chain.name == by.chain).flat_map(|chain| &chain.rules);
        let mut said = rules.filter(|rule| rule.handle == by.handle).flat_map(|rule| &rule.statements);
        said.any(|statement| *statement == Statement::Reject { tcp_reset: true })
    }

    /// The kernel limits what it says by ICMP. A probe of which nothing was heard, and
    /// which by the rules is rejected where others were, was rejected like them.
    fn heard(&self, fates: &[(Port, Fate)]) -> Vec<(Port, Fate)> {
        let mut out = fates.to_vec();
        if self.evaluator.is_none() || !fates.iter().any(|(_, fate)| matches!(fate, Fate::Unreachable { .. }))
        {
            return out;
        }
        let mut known: HashMap<usize, Option<Place>> = HashMap::new();
        let mut rejects = |port: Port| {
            // Dropped before any rule could reject it.
            if self.guarded(port).is_some() {
                return None;
            }
            let by = known.entry(self.group(port)).or_insert_with(|| {
                let judgement = self.judge(port, self.source)?;
                if judgement.verdict == Says::Reject { judgement.by } else { None }
            });
            by.clone()
        };
        let mut said: HashMap<Place, Fate> = HashMap::new();
        for (port, fate) in fates {
            if matches!(fate, Fate::Unreachable { .. })
                && let Some(place) = rejects(*port)
            {
                said.entry(place).or_insert_with(|| fate.clone());
            }
        }
        for (port, fate) in out.iter_mut().filter(|(_, fate)| *fate == Fate::Dropped) {
            if let Some(like) = rejects(*port).and_then(|place| said.get(&place)) {
                *fate = like.clone();
            }
        }
        out
    }

    /// Who takes a packet for this address and port. The kernel prefers a socket bound to
    /// the device and to the address over one that takes anything.
    fn listener(&self, address: IpAddr, port: Port) -> Option<&'a Listener> {
        let all = self.sockets.get(&port)?.iter().copied().filter(|l| l.answers(address));
        all.max_by_key(|l| (l.device.is_some(), !l.is_wildcard(), l.owner.is_some()))
    }

    /// nmap's word for it, and after a semicolon which rule or redirect explains it.
    fn reason(&self, fate: &Fate, cell: &Cell, ask: bool) -> String {
        let (word, more) = match fate {
            Fate::Delivered { address, port } => {
                let word = match (self.proto, cell.state) {
                    (_, State::Unknown) => "unknown",
                    (Proto::Tcp, State::Open) => "syn-ack",
                    (Proto::Udp, State::Open) => "udp-response",
                    (Proto::Tcp, _) => "reset",
                    (Proto::Udp, _) => "port-unreach",
                };
                let more = if *port == cell.port && *address == self.address {
                    None
                } else if ask && self.is_unpublished(cell.port) {
                    Some(format!(
                        "given to {} by a program (sk_lookup)",
                        SocketAddr::new(*address, port.get())
                    ))
                } else if self.view.interface_has(self.interface, *address) {
                    Some(format!("redirected to port {port}"))
                } else {
                    Some(format!("dnat to {}", SocketAddr::new(*address, port.get())))
                };
                (word, more)
            }
            Fate::Forwarded { address, port } if *address == self.address && *port == cell.port => {
                ("forwarded", None)
            }
            Fate::Forwarded { address, port } => {
                ("forwarded", Some(format!("dnat to {}", SocketAddr::new(*address, port.get()))))
            }
            Fate::Answered if self.proto == Proto::Tcp => ("syn-ack", Some("answered".to_owned())),
            Fate::Answered => ("udp-response", Some("answered".to_owned())),
            Fate::Reset => ("reset", self.blame(cell.port, "rejected", ask)),
            Fate::Unreachable { icmp_type, code } => {
                let (_, word) = unreachable(self.proto, self.address, *icmp_type, *code);
                (word, self.blame(cell.port, "rejected", ask))
            }
            Fate::Dropped => ("no-response", self.blame(cell.port, "dropped", ask)),
            Fate::Held(gate) => ("no-response", Some(format!("dropped by {}", gate.name()))),
            Fate::Lost => ("unknown", Some("the probe was not seen to arrive".to_owned())),
        };
        match more {
            Some(more) => format!("{word}; {more}"),
            None => word.to_owned(),
        }
    }

    /// Whether the rules let a packet in and surely send it nowhere else.
    fn is_unpublished(&self, port: Port) -> bool {
        let says = self.judge(port, self.source);
        let lets_in = says.is_some_and(|says| says.verdict == Says::Accept && says.rewritten.is_none());
        let rules = self.view.rules.seen().map(published).unwrap_or_default();
        let sends = |rule: &Published| rule.proto == self.proto && (rule.first..=rule.last).contains(&port);
        lets_in && !rules.iter().any(sends)
    }

    /// Why the guard refuses it, which comes before every rule.
    pub(super) fn guarded(&self, port: Port) -> Option<&'static str> {
        let rules = self.view.desired?.guard.as_ref().filter(|rules| !rules.audit)?;
        if self.proto != Proto::Tcp || !self.view.guarded.iter().any(|name| name == self.interface) {
            return None;
        }
        let syn = Syn { source: self.source, destination: self.address, port: port.get(), onward: None };
        // At the time at which no opening has ended yet: what is refused then always is.
        rules.judge(&syn, Boot(0)).map(DropReason::name)
    }

    /// Which rule holds the port back, by the evaluator of rules.
    fn blame(&self, port: Port, verb: &str, ask: bool) -> Option<String> {
        if !ask {
            return None;
        }
        if let Some(reason) = self.guarded(port).filter(|_| verb == "dropped") {
            return Some(format!("{verb} by spokeguard's tc guard: {reason}"));
        }
        let judgement = self.judge(port, self.source)?;
        let mut text = match (judgement.verdict, judgement.by) {
            (Says::Drop | Says::Reject, Some(by)) => format!("{verb} by {}", place(&by)),
            (Says::Unknown(_), Some(by)) => format!("{verb}, it may be by {}", place(&by)),
            (Says::Unknown(why), None) => format!("{verb}; it depends on {}", printable(&why, 200)),
            _ => match judgement.rewritten.and_then(|r| Some((r.address?, r.port?))) {
                Some((to, port)) if !self.view.is_local(to) => {
                    format!("dnat to {}, which it never reached", SocketAddr::new(to, port.get()))
                }
                _ => format!("{verb}, though no nftables rule says so"),
            },
        };
        // Sources that a rule names may fare better than an outsider of whom none knows.
        let lets_in = |net: &&IpNet| {
            let judgement = self.judge(port, someone_in(net));
            judgement.is_some_and(|judgement| judgement.verdict == Says::Accept)
        };
        if self.sockets.contains_key(&port) {
            let friends: Vec<String> = self.named.iter().filter(lets_in).take(3).map(net_text).collect();
            if !friends.is_empty() {
                text = format!("{text}; open to {}", friends.join(", "));
            }
        }
        Some(text)
    }
}

/// A host of the prefix, to ask as.
fn someone_in(net: &IpNet) -> IpAddr {
    net.hosts().next().unwrap_or(net.addr())
}

fn net_text(net: &IpNet) -> String {
    if net.prefix_len() == net.max_prefix_len() { net.addr().to_string() } else { net.to_string() }
}

/// "inet filter input, handle 7", or the chain's policy; of our own the rule's name.
fn place(place: &Place) -> String {
    let family = match place.family {
        TableFamily::Inet => "inet",
        TableFamily::Ip => "ip",
        TableFamily::Ip6 => "ip6",
        TableFamily::Arp => "arp",
        TableFamily::Bridge => "bridge",
        TableFamily::Netdev => "netdev",
    };
    let ours = place.comment.as_ref().and_then(|comment| comment.strip_prefix(COMMENT_PREFIX));
    if let (TableFamily::Inet, TABLE, Some(rule)) = (place.family, place.table.as_str(), ours) {
        return format!("{TABLE}: {}", printable(rule, 64));
    }
    let rule = match (place.handle, &place.comment) {
        (_, Some(comment)) => format!("rule \"{}\"", printable(comment, 64)),
        (Some(handle), None) => format!("handle {handle}"),
        (None, None) => "policy".to_owned(),
    };
    format!("{family} {} {}, {rule}", printable(&place.table, 64), printable(&place.chain, 64))
}

/// What an answer says, as nmap reads it and in nmap's word.
fn heard(proto: Proto, address: IpAddr, answer: Answer) -> (State, &'static str) {
    match answer {
        Answer::SynAck => (State::Open, "syn-ack"),
        Answer::Connected => (State::Open, "syn-ack"),
        Answer::Reset => (State::Closed, "reset"),
        Answer::Datagram => (State::Open, "udp-response"),
        Answer::Unreachable { icmp_type, code } => unreachable(proto, address, icmp_type, code),
        Answer::Silent if proto == Proto::Udp => (State::OpenFiltered, "no-response"),
        Answer::Silent => (State::Filtered, "no-response"),
        Answer::Unasked => (State::Unknown, "unknown"),
    }
}

/// An ICMP error is how a closed UDP port answers, if it says "port unreachable"; all
/// others come from something in the way, and so does that one for TCP.
fn unreachable(proto: Proto, address: IpAddr, icmp_type: u8, code: u8) -> (State, &'static str) {
    let word = match (address, icmp_type, code) {
        (IpAddr::V4(_), 3, 0) => "net-unreach",
        (IpAddr::V4(_), 3, 1) => "host-unreach",
        (IpAddr::V4(_), 3, 2) => "proto-unreach",
        (IpAddr::V4(_), 3, 3) | (IpAddr::V6(_), 1, 4) => "port-unreach",
        (IpAddr::V4(_), 3, 9) => "net-prohibited",
        (IpAddr::V4(_), 3, 10) => "host-prohibited",
        (IpAddr::V4(_), 3, 13) | (IpAddr::V6(_), 1, 1) => "admin-prohibited",
        (IpAddr::V6(_), 1, 0) => "no-route",
        (IpAddr::V6(_), 1, 3) => "addr-unreach",
        (IpAddr::V6(_), 1, 5 | 6) => "admin-prohibited",
        (IpAddr::V4(_), 11, _) | (IpAddr::V6(_), 3, _) => "time-exceeded",
        _ => "dest-unreach",
    };
    match (proto, word) {
        (Proto::Udp, "port-unreach") => (State::Closed, word),
        _ => (State::Filtered, word),
    }
}

impl Host for View<'_> {
    fn is_local(&self, address: IpAddr) -> bool {
        self.is_local(address)
    }

    fn way_out(&self, address: IpAddr) -> Option<&str> {
        Link::towards(self.links.seen()?, address).map(|link| link.name.as_str())
    }
}

impl View<'_> {
    pub(super) fn is_local(&self, address: IpAddr) -> bool {
        let everyone = matches!(address, IpAddr::V4(v4) if v4.is_broadcast());
        let links = self.links.seen().into_iter().flatten();
        everyone
            || address.is_loopback()
            || address.is_multicast()
            || links.flat_map(|l| &l.addresses).any(|net| net.addr() == address)
    }

    fn interface_has(&self, name: &str, address: IpAddr) -> bool {
        let link = self.links.seen().and_then(|links| links.iter().find(|l| l.name == name));
        link.is_some_and(|l| l.addresses.iter().any(|net| net.addr() == address))
    }

    fn is_bare(&self, index: u32) -> bool {
        let link = self.links.seen().and_then(|links| links.iter().find(|l| l.index == index));
        link.is_some_and(|l| l.addresses.is_empty())
    }
}
