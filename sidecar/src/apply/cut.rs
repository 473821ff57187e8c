//! Close means closed: ends the flows that the rules in force would not let begin. Our
//! rules already judge TCP from outside packet by packet; this ends its sockets at once
//! instead of leaving them to hang, and ends UDP, which would go on.
//!
//! Each flow is judged as its first packet would be, by the evaluator on the rules as they
//! are now, on every interface that it may have come by. It is cut only if our table
//! refuses it on all of them. What this host began is left alone, and so is whatever
//! can't be told.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use serde::Serialize;

use crate::desired::{Desired, TABLE, is_own_table};
use crate::observed::Link;
use crate::ruleset::{Chain, Evaluator, Hook, Host, Packet, Ruleset, Table, TableFamily, Verdict};
use crate::source::flows::{self, Flow};
use crate::source::probe::Routes;
use crate::source::{links, nft};
use crate::terms::{Port, Proto};

/// Questions put to the evaluator in one go, some 50 us each. Flows beyond that are left,
/// and counted: TCP among them gets nothing through all the same.
const QUESTIONS_MAX: usize = 4096;
const EXAMPLES_MAX: usize = 5;

/// What was cut.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Cut {
    /// TCP connections with sockets of this host.
    pub connections: usize,
    /// Flows passed on to containers and machines behind this host, and UDP.
    pub flows: usize,
    /// Not looked at, because there were too many.
    pub left: usize,
    /// Some of them: "tcp 192.0.2.9:40000 -> 198.51.100.7:5432".
    pub examples: Vec<String>,
}

impl Cut {
    pub fn is_nothing(&self) -> bool {
        self.connections + self.flows + self.left == 0
    }
}

impl fmt::Display for Cut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} connections to this host, {} other flows", self.connections, self.flows)?;
        if !self.examples.is_empty() {
            write!(f, " ({})", self.examples.join(", "))?;
        }
        if self.left > 0 {
            write!(f, "; {} were too many to look at", self.left)?;
        }
        Ok(())
    }
}

/// Cuts what the rules in force refuse. To be called once a change is certain to stay: what
/// was cut under rules that are rolled back does not come back. The policy, where there is
/// one, saves questions and spares the hub twice.
pub fn flows(desired: Option<&Desired>) -> anyhow::Result<Cut> {
    let links = links::read()?;
    // Rules with many prefixes take longer to read than flows do, and most often there are none.
    match candidates(desired, &links)? {
        none if none.is_empty() => Ok(Cut::default()),
        some => cut(some, desired, &nft::list_ruleset()?, &links),
    }
}

/// The same for rules and interfaces that have just been read.
pub fn in_force(desired: Option<&Desired>, rules: &Ruleset, links: &[Link]) -> anyhow::Result<Cut> {
    cut(candidates(desired, links)?, desired, rules, links)
}

/// What others began.
fn candidates(desired: Option<&Desired>, links: &[Link]) -> anyhow::Result<Vec<Flow>> {
    let own = own_addresses(links);
    flows::tracked(|flow| !is_own(&own, flow.from.ip()) && !is_spared(desired, flow))
}

fn own_addresses(links: &[Link]) -> HashSet<IpAddr> {
    links.iter().flat_map(|l| l.addresses.iter().map(IpNet::addr)).collect()
}

/// Also what loopback answers for, all of 127/8.
fn is_own(own: &HashSet<IpAddr>, address: IpAddr) -> bool {
    own.contains(&address) || address.is_loopback()
}

fn cut(
    candidates: Vec<Flow>,
    desired: Option<&Desired>,
    rules: &Ruleset,
    links: &[Link],
) -> anyhow::Result<Cut> {
    let own = own_addresses(links);
    let is_own = |address: IpAddr| is_own(&own, address);
    if candidates.is_empty() || rules.table(TableFamily::Inet, TABLE).is_none() {
        return Ok(Cut::default());
    }
    let is_local = |address: IpAddr| is_own(address);
    let rules = essential(rules);
    let mut court = Court {
        desired,
        evaluator: Evaluator::new(&rules),
        links,
        host: &is_local,
        routes: Routes::open()?,
        ways: HashMap::new(),
        answers: HashMap::new(),
    };
    let mut cut = Cut::default();
    let mut refused: Vec<Flow> = Vec::new();
    for flow in candidates {
        match court.refuses(&flow)? {
            Some(true) => refused.push(flow),
            Some(false) => {}
            None => cut.left += 1,
        }
    }
    if refused.is_empty() {
        return Ok(cut);
    }

    let here: HashMap<(SocketAddr, SocketAddr), &Flow> = (refused.iter())
        .filter(|flow| flow.proto == Proto::Tcp && is_own(flow.server.ip()))
        .map(|flow| ((flow.server, flow.client), flow))
        .collect();
    let (streams, listening) = flows::streams(|local, remote| here.contains_key(&(local, remote)))?;
    // Conntrack takes the first packet that it sees for the first of the flow: after a reply
    // to something older than itself, this host's own connection looks like a stranger's.
    // Those are on ports that the kernel chose, where nobody listens.
    let (first, last) = flows::ephemeral_ports();
    let serves = |at: SocketAddr| {
        let any = |l: &SocketAddr| l.port() == at.port() && (l.ip().is_unspecified() || l.ip() == at.ip());
        !(first..=last).contains(&at.port()) || listening.iter().any(any)
    };
    let doomed: Vec<_> = streams.into_iter().filter(|stream| serves(stream.local)).collect();
    let (ours, others): (Vec<Flow>, Vec<Flow>) = (refused.iter().cloned())
        .partition(|flow| flow.proto == Proto::Tcp && here.contains_key(&(flow.server, flow.client)));
    // Sockets first: their resets still belong to a flow then.
    cut.connections = flows::destroy(&doomed)?;
    flows::forget(&ours.into_iter().filter(|flow| serves(flow.server)).collect::<Vec<_>>())?;
    cut.flows = flows::forget(&others)?;
    let ended = doomed.iter().filter_map(|stream| here.get(&(stream.local, stream.remote)).copied());
    let text = |flow: &Flow| format!("{} {} -> {}", flow.proto, flow.from, flow.to);
    cut.examples = ended.chain(&others).take(EXAMPLES_MAX).map(text).collect();
    Ok(cut)
}

/// Whatever the hub has begun, and its tunnel. The rules let both through; a mistake in
/// them, or here, must not cost the way in.
fn is_spared(desired: Option<&Desired>, flow: &Flow) -> bool {
    let Some(mesh) = desired.map(|desired| &desired.policy.mesh) else { return false };
    let Some(hub) = &mesh.hub else { return false };
    let from = flow.from.ip();
    hub.address.contains(&from) || (flow.proto == Proto::Udp && hub.endpoint.is_some_and(|e| e.ip() == from))
}

/// What of the rules decides whether our table refuses a packet: our table, and what
/// rewrites packets before it.
fn essential(rules: &Ruleset) -> Ruleset {
    let rewrites = |chain: &Chain| chain.base.as_ref().is_some_and(|base| base.hook == Hook::Prerouting);
    let needed = rules.tables.iter().filter(|table| is_own_table(table) || table.chains.iter().any(rewrites));
    let cleared = |table: &Table| {
        let mut table = table.clone();
        if !is_own_table(&table) {
            table.chains.retain(|chain| chain.base.is_none() || rewrites(chain));
        }
        table
    };
    Ruleset { tables: needed.map(cleared).collect() }
}

type Question = (String, IpAddr, SocketAddr, Proto);

struct Court<'a> {
    desired: Option<&'a Desired>,
    evaluator: Evaluator<'a>,
    links: &'a [Link],
    host: &'a dyn Host,
    routes: Routes,
    ways: HashMap<(IpAddr, IpAddr), Vec<String>>,
    answers: HashMap<Question, bool>,
}

impl Court<'_> {
    /// Whether our table would refuse its first packet now. `None`: too many were asked.
    fn refuses(&mut self, flow: &Flow) -> anyhow::Result<Option<bool>> {
        let (Some(port), Some(source_port)) = (Port::new(flow.to.port()), Port::new(flow.from.port())) else {
            return Ok(Some(false));
        };
        // Most flows of a busy host, and no question for the evaluator.
        if self.desired.is_some_and(|desired| {
            desired.policy.public.ports(flow.proto).contains(&port) && !desired.in_mesh(flow.to.ip())
        }) {
            return Ok(Some(false));
        }
        let ways = self.ways(flow)?;
        for iifname in &ways {
            let question = (iifname.clone(), flow.from.ip(), flow.to, flow.proto);
            let refused = match self.answers.get(&question) {
                Some(answer) => *answer,
                None if self.answers.len() >= QUESTIONS_MAX => return Ok(None),
                None => {
                    let packet = Packet {
                        iifname: iifname.clone(),
                        source: flow.from.ip(),
                        destination: flow.to.ip(),
                        proto: flow.proto,
                        source_port,
                        port,
                    };
                    let judgement = self.evaluator.judge(&packet, self.host);
                    let ours = |place: &crate::ruleset::Place| {
                        place.family == TableFamily::Inet && place.table == TABLE
                    };
                    let refused = matches!(judgement.verdict, Verdict::Drop | Verdict::Reject)
                        && judgement.by.as_ref().is_some_and(ours);
                    self.answers.insert(question, refused);
                    refused
                }
            };
            if !refused {
                return Ok(Some(false));
            }
        }
        Ok(Some(!ways.is_empty()))
    }

    /// The interfaces that it may have come by: where answers go, and where the address is
    /// that it asked for. From the mesh also the mesh's, which may be away for a moment.
    fn ways(&mut self, flow: &Flow) -> anyhow::Result<Vec<String>> {
        let key = (flow.from.ip(), flow.to.ip());
        if let Some(ways) = self.ways.get(&key) {
            return Ok(ways.clone());
        }
        let Some(index) = self.routes.leaves_by(flow.to.ip(), flow.from.ip())? else { return Ok(Vec::new()) };
        let holds =
            |link: &&Link| link.index == index || link.addresses.iter().any(|net| net.addr() == flow.to.ip());
        let mut ways: Vec<String> = self.links.iter().filter(holds).map(|link| link.name.clone()).collect();
        if let Some(desired) = self.desired.filter(|desired| desired.in_mesh(flow.from.ip())) {
            ways.push(desired.policy.mesh.interface.clone());
        }
        self.ways.insert(key, ways.clone());
        Ok(ways)
    }
}
