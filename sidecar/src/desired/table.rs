//! The table `inet spokeguard` as a value. Deny-only: our `accept` ends nothing but our
//! own chain, so every other table on the host still has its say.
//!
//! Per interface: `mesh`, `local-NAME` or `public` judges what this host receives, and
//! `forward-...` what it passes on to containers and machines behind it, with the same
//! lists (`allowed-...`). Ports are those that the outsider asked for: new flows by
//! `ct original proto-dst`, whatever a DNAT or redirect made of them since; packets that
//! conntrack does not know by what they carry.
//!
//! The forms are those in which nft 1.0.6 and later list what they were given, so that
//! what is read back compares equal: interface patterns are rules of their own (a set
//! holds no wildcards), so are the ports of `ct original proto-dst` (a set of them lists
//! as "0x50 [invalid type]"), addresses are merged into ranges as an interval set does,
//! and no chain is called by a keyword of nft's.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;

use super::{COMMENT_PREFIX, PRIORITY, PROBE_PRIORITY, TABLE};
use crate::observed::Amount;
use crate::policy::{Bind, Exception, Mode, Policy, Role, Sources};
use crate::ruleset::normal::prefix_of;
use crate::ruleset::{
    Base, Chain, Hook, Match, NamedSet, Op, Operand, Rule, Statement, Table, TableFamily, Term,
};
use crate::ruleset::{glass, render};
use crate::terms::{Family, IfacePattern, Port, Proto};

/// Why a packet is dropped: one named counter for each reason and family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum DropReason {
    /// The sshd port, from the internet.
    Ssh,
    PublicTcp,
    PublicUdp,
    /// Neither TCP nor UDP, nor the ICMP that hosts need.
    PublicOther,
    /// A mesh address, asked for through an interface that is not the mesh.
    WeakHost,
    /// A source in the mesh that did not come through the mesh.
    SpoofedMesh,
    /// Through the mesh, but not open to it.
    Mesh,
    /// Through a `[[local]]` interface, but not on its list.
    Local,
    /// On the way to a container or a machine behind this host.
    Forward,
    /// TCP of a connection that is established and not allowed: it came while our table
    /// was away, or under an older policy.
    Stale,
}

impl DropReason {
    pub const ALL: [DropReason; 10] = [
        DropReason::Ssh,
        DropReason::PublicTcp,
        DropReason::PublicUdp,
        DropReason::PublicOther,
        DropReason::WeakHost,
        DropReason::SpoofedMesh,
        DropReason::Mesh,
        DropReason::Local,
        DropReason::Forward,
        DropReason::Stale,
    ];

    pub const fn name(self) -> &'static str {
        match self {
            DropReason::Ssh => "ssh",
            DropReason::PublicTcp => "public-tcp",
            DropReason::PublicUdp => "public-udp",
            DropReason::PublicOther => "public-other",
            DropReason::WeakHost => "weak-host",
            DropReason::SpoofedMesh => "spoofed-mesh",
            DropReason::Mesh => "mesh",
            DropReason::Local => "local",
            DropReason::Forward => "forward",
            DropReason::Stale => "stale",
        }
    }

    /// The name of the counter in our table: "drop-weak-host-ipv4". In audit mode it
    /// counts what would have been dropped.
    pub fn counter(self, family: Family) -> String {
        format!("drop-{}-{family}", self.name())
    }

    /// Of a stranger's packet to a port of this host that nobody opened.
    pub const fn of(proto: Proto) -> Self {
        match proto {
            Proto::Tcp => DropReason::PublicTcp,
            Proto::Udp => DropReason::PublicUdp,
        }
    }

    /// From the name of a counter; `None` for one that is not ours.
    pub fn of_counter(name: &str) -> Option<(Self, Family)> {
        Self::ALL
            .into_iter()
            .flat_map(|reason| Family::ALL.map(|family| (reason, family)))
            .find(|(reason, family)| reason.counter(*family) == name)
    }
}

pub(super) fn table(policy: &Policy, today: jiff::civil::Date) -> Table {
    built(policy, Some(today))
}

/// For any day: exceptions end by the kernel's own clock.
pub(super) fn sealed(policy: &Policy) -> Table {
    built(policy, None)
}

fn built(policy: &Policy, today: Option<jiff::civil::Date>) -> Table {
    let mut lists = BTreeMap::new();
    // Once for every scope's rules.
    let exceptions: Vec<Senders> = (policy.exceptions.iter())
        .map(|exception| match holds(exception, today) {
            true => by_family(&exception.from),
            false => Vec::new(),
        })
        .map(|mut senders| {
            senders.iter_mut().flat_map(|(_, from)| from).for_each(|from| name_if_long(from, &mut lists));
            senders
        })
        .collect();
    let build = Build { policy, today, exceptions: &exceptions };
    let locals = local_names(policy);
    let mut chains = vec![
        base("input", Hook::Input, build.input(&locals)),
        base("forward", Hook::Forward, build.forward(&locals)),
        regular("mesh", build.mesh()),
        regular("public", build.public()),
    ];
    for (local, name) in policy.locals.iter().zip(&locals) {
        let allowed = format!("allowed-local-{name}");
        chains.push(regular(format!("local-{name}"), build.local(name)));
        chains.push(regular(format!("forward-local-{name}"), build.forward_published(&allowed)));
        chains.push(regular(allowed, build.allowed_local(local)));
    }
    chains.extend([
        regular("forward-mesh", build.forward_published("allowed-mesh")),
        regular("forward-public", build.forward_public()),
        regular("allowed-mesh", build.allowed_mesh()),
        regular("allowed-public", build.allowed_public()),
        regular("allowed-anyone", build.allowed_anyone()),
        regular("mesh-leaks", build.mesh_leaks()),
        regular("icmp-needed", icmp_needed()),
    ]);
    let counters: BTreeMap<String, Amount> = chains
        .iter()
        .flat_map(|chain| &chain.rules)
        .flat_map(|rule| &rule.statements)
        .filter_map(|statement| match statement {
            Statement::CounterRef(name) => Some((name.clone(), Amount::default())),
            _ => None,
        })
        .collect();
    for statement in
        chains.iter_mut().flat_map(|chain| &mut chain.rules).flat_map(|rule| &mut rule.statements)
    {
        if let Statement::Match(Match { right, .. }) = statement {
            name_if_long(right, &mut lists);
        }
    }
    let mut sets = glass::sets();
    sets.extend(lists.into_values());
    Table { family: TableFamily::Inet, name: TABLE.to_owned(), dormant: false, chains, counters, sets }
}

/// More addresses than this stand in a set of their own, once, however many rules ask for them.
const LISTED_MAX: usize = 64;

/// Takes a long list of addresses out of its rule. A set is called by what is in it: one of the same name is the
/// same one, so that only what changes is sent, and a transaction, a rollback and a file may declare it again.
fn name_if_long(right: &mut Operand, lists: &mut BTreeMap<String, NamedSet>) {
    let Operand::Set(list) = &*right else { return };
    let Some(family) = list.first().and_then(family_of).filter(|_| list.len() > LISTED_MAX) else { return };
    // The same list is asked for by several rules.
    let name = lists.values().find(|set| set.elements == *list).map_or_else(
        || format!("list-{family}-{}", crate::policy::sum(&render::list(list, ","))),
        |set| set.name.clone(),
    );
    let Operand::Set(elements) = std::mem::replace(right, Operand::Named(name.clone())) else { return };
    lists.entry(name.clone()).or_insert_with(|| NamedSet {
        name,
        kind: format!("{family}_addr"),
        map: false,
        flags: vec!["interval".to_owned()],
        elements,
        timed: Vec::new(),
        verdicts: Vec::new(),
        truncated: false,
    });
}

/// Of a value that stands for addresses.
fn family_of(value: &Operand) -> Option<Family> {
    match value {
        Operand::Address(address) => Some(Family::of(*address)),
        Operand::Prefix(net) => Some(Family::of_net(net)),
        Operand::Range(first, _) => family_of(first),
        _ => None,
    }
}

/// Addresses of `ssh.bind` outside of the mesh: sshd is meant to be reached there from
/// `ssh.from`, through whatever interface. An unspecified address is any.
pub(super) fn open_binds(policy: &Policy) -> Vec<IpAddr> {
    match &policy.ssh.bind {
        Bind::Mesh => Vec::new(),
        Bind::Addresses(list) => (list.iter().copied())
            .filter(|&address| !address.is_loopback() && !super::admin::in_mesh(policy, address))
            .collect(),
    }
}

/// Who may reach the tunnel's own UDP port from outside: anyone on a hub, the hub's
/// endpoint on a node that names it. `None`: nobody needs to, this node calls first.
pub(super) fn tunnel_sources(policy: &Policy) -> Option<Option<Vec<IpNet>>> {
    let endpoint = policy.mesh.hub.as_ref().and_then(|hub| hub.endpoint);
    match (policy.node.role, endpoint) {
        (Role::Hub, _) => Some(None),
        (_, Some(endpoint)) => Some(Some(vec![endpoint.ip().into()])),
        (_, None) => None,
    }
}

/// The openings of TCP ports to who comes through a public interface, as in the chain
/// `allowed-public`.
pub(super) fn stranger_openings(policy: &Policy, today: jiff::civil::Date) -> Vec<Opening<'_>> {
    let build = Build { policy, today: Some(today), exceptions: &[] };
    let all = [build.anyone_openings(), build.ssh_openings("public"), build.exception_openings("public")];
    let all = all.into_iter().flatten().map(|(_, opening)| opening);
    all.filter(|opening| opening.proto == Proto::Tcp).collect()
}

#[derive(Clone, Copy)]
struct Build<'a> {
    policy: &'a Policy,
    /// The day for which exceptions are judged; `None`: the rules judge them.
    today: Option<jiff::civil::Date>,
    /// Who each of the policy's exceptions is for, as rules say it.
    exceptions: &'a [Senders],
}

/// Addresses by family. `None`: all of them.
type Senders = Vec<(Family, Option<Operand>)>;

/// Whether rules are made for it.
fn holds(exception: &Exception, today: Option<jiff::civil::Date>) -> bool {
    let opens = !exception.tcp.is_empty() || !exception.udp.is_empty();
    opens && today.is_none_or(|today| exception.holds_on(today))
}

impl<'a> Build<'a> {
    fn input(&self, locals: &[String]) -> Vec<Rule> {
        let Policy { mesh, ssh, metrics, public, .. } = self.policy;
        let mut rules = self.open_at_once();
        rules.push(accept("loopback", [iifname("lo")]));
        rules.extend(known_flows(""));
        // First, and apart from everything that a policy may say: a mistake in the mesh's
        // own list must not cost the way in.
        let hub = Sources::Hub.prefixes(mesh);
        let failsafe = Opening {
            proto: Proto::Tcp,
            ports: &[ssh.port, metrics.port],
            from: Some(Cow::Borrowed(&hub)),
            to: None,
            iifname: Some(&mesh.interface),
        };
        rules.extend(failsafe.rules("hub-failsafe"));
        rules.push(jump("mesh", "mesh", [iifname(&mesh.interface)]));
        for (pattern, name) in self.local_patterns(locals) {
            rules.push(jump(
                &format!("local-{name}-{pattern}"),
                &format!("local-{name}"),
                [iifname(pattern.as_str())],
            ));
        }
        rules.extend(to_public(public.interfaces.as_deref(), "public", "public"));
        rules
    }

    /// TCP that `allowed-anyone` lets in by whatever way it comes: most packets of a server, and each would meet
    /// three dozen rules before that. Asked here is all that could have kept it out there. What a NAT has
    /// rewritten goes that way, to be judged by the port asked for.
    fn open_at_once(&self) -> Vec<Rule> {
        let Policy { mesh, public, .. } = self.policy;
        let mut ports: Vec<Port> = public.ports(Proto::Tcp).to_vec();
        ports.sort_unstable();
        ports.dedup();
        let ports = ports.iter().map(|port| Operand::Number(port.get().into())).collect();
        let Some(ports) = set(ports) else { return Vec::new() };
        let in_mesh = by_family(&mesh.prefix);
        let of_family = |family| {
            let outside = match in_mesh.iter().find(|(of, _)| *of == family) {
                None => vec![nfproto(family)],
                // Every address is in the mesh.
                Some((_, None)) => return None,
                Some((_, Some(mesh))) => ["saddr", "daddr"]
                    .map(|field| Match { op: Op::Ne, ..address(field, (family, mesh.clone())) })
                    .to_vec(),
            };
            let as_asked_for = Match { op: Op::NoneOf, ..published() };
            let matches = std::iter::once(payload("tcp", "dport", ports.clone())).chain(outside);
            Some(accept(&format!("open-tcp-{family}"), matches.chain([as_asked_for])))
        };
        Family::ALL.into_iter().filter_map(of_family).collect()
    }

    fn mesh(&self) -> Vec<Rule> {
        let mut rules = vec![jump("mesh-allowed", "allowed-mesh", [])];
        rules.extend(self.deny_both(DropReason::Mesh, "drop-mesh", []));
        rules
    }

    fn public(&self) -> Vec<Rule> {
        let mut rules = self.weak_host("public");
        rules.push(jump("public-mesh-leaks", "mesh-leaks", []));
        rules.push(jump("public-allowed", "allowed-public", []));
        rules.extend(dhcp_client("public"));
        let ssh = [l4proto("tcp"), original_port(self.policy.ssh.port)];
        rules.extend(self.deny_both(DropReason::Ssh, "drop-ssh", ssh));
        rules.extend(self.deny_both(DropReason::PublicTcp, "drop-public-tcp", [l4proto("tcp")]));
        rules.extend(self.deny_both(DropReason::PublicUdp, "drop-public-udp", [l4proto("udp")]));
        rules.extend(self.deny_both(DropReason::PublicOther, "drop-public-other", []));
        rules
    }

    fn local(&self, name: &str) -> Vec<Rule> {
        let id = format!("local-{name}");
        let mut rules = self.weak_host(&id);
        rules.push(jump(&format!("{id}-mesh-leaks"), "mesh-leaks", []));
        rules.push(jump(&format!("{id}-allowed"), &format!("allowed-{id}"), []));
        rules.extend(dhcp_client(&id));
        rules.extend(self.deny_both(DropReason::Local, &format!("drop-{id}"), []));
        rules
    }

    fn allowed_mesh(&self) -> Vec<Rule> {
        let Policy { mesh, ssh, metrics, services, .. } = self.policy;
        let mut rules = vec![jump("mesh-icmp", "icmp-needed", []), jump("mesh-anyone", "allowed-anyone", [])];
        let from_ssh = ssh.from.prefixes(mesh);
        rules.extend(Opening::tcp(&[ssh.port], Some(&from_ssh)).rules("ssh"));
        let hub = Sources::Hub.prefixes(mesh);
        rules.extend(Opening::tcp(&[metrics.port], Some(&hub)).rules("metrics"));
        for service in services {
            let from = service.from.prefixes(mesh);
            for proto in Proto::ALL {
                let id = format!("service-{}-{proto}", service.name);
                rules.extend(Opening::new(proto, service.ports(proto), Some(&from)).rules(&id));
            }
        }
        rules.extend(self.exceptions("mesh"));
        rules
    }

    fn allowed_public(&self) -> Vec<Rule> {
        let mut rules =
            vec![jump("public-icmp", "icmp-needed", []), jump("public-anyone", "allowed-anyone", [])];
        rules.extend(self.open_ssh("public"));
        rules.extend(self.exceptions("public"));
        rules
    }

    /// What `[public]` opens is open to anyone, by whatever way they come.
    fn allowed_anyone(&self) -> Vec<Rule> {
        let mut rules = opened(self.anyone_openings());
        rules.extend(break_glass());
        rules
    }

    fn anyone_openings(self) -> Vec<(String, Opening<'a>)> {
        let Policy { public, mesh, .. } = self.policy;
        let mut openings = Proto::ALL
            .map(|proto| (format!("public-{proto}"), Opening::new(proto, public.ports(proto), None)))
            .to_vec();
        if let (Some(port), Some(from)) = (&mesh.listen_port, tunnel_sources(self.policy)) {
            let tunnel = Opening::new(Proto::Udp, std::slice::from_ref(port), None);
            openings.push(("tunnel".into(), Opening { from: from.map(Cow::Owned), ..tunnel }));
        }
        openings
    }

    fn allowed_local(&self, local: &crate::policy::Local) -> Vec<Rule> {
        let id = format!("local-{}", local.name);
        let mut rules = vec![
            jump(&format!("{id}-icmp"), "icmp-needed", []),
            jump(&format!("{id}-anyone"), "allowed-anyone", []),
        ];
        for proto in Proto::ALL {
            rules.extend(Opening::new(proto, local.ports(proto), None).rules(&format!("{id}-{proto}")));
        }
        rules.extend(self.open_ssh(&id));
        rules.extend(self.exceptions(&id));
        rules
    }

    fn forward(&self, locals: &[String]) -> Vec<Rule> {
        let Policy { mesh, public, .. } = self.policy;
        let mut rules = vec![accept("forward-loopback", [iifname("lo")])];
        rules.extend(known_flows("forward-"));
        rules.push(jump("forward-mesh", "forward-mesh", [iifname(&mesh.interface)]));
        for (pattern, name) in self.local_patterns(locals) {
            rules.push(jump(
                &format!("forward-local-{name}-{pattern}"),
                &format!("forward-local-{name}"),
                [iifname(pattern.as_str())],
            ));
        }
        rules.extend(to_public(public.interfaces.as_deref(), "forward-public", "forward-public"));
        rules
    }

    /// From the mesh or a local network: published ports are judged, whatever else is
    /// routed (between spokes, to an exit node, out of a container) is left alone.
    fn forward_published(&self, allowed: &str) -> Vec<Rule> {
        let id = allowed.replacen("allowed", "forward", 1);
        let mut rules = vec![jump(&format!("{id}-published"), allowed, [published()])];
        rules.extend(self.deny_both(DropReason::Forward, &format!("drop-{id}-published"), [published()]));
        // Else it would go back to `forward` and on to the public's rules.
        rules.push(accept(&format!("{id}-routed"), []));
        rules
    }

    fn forward_public(&self) -> Vec<Rule> {
        let Policy { mesh, locals, .. } = self.policy;
        let deny = |id: &str, of: Match| self.deny_both(DropReason::Forward, id, [of]);
        let mut rules = vec![
            jump("forward-public-mesh-leaks", "mesh-leaks", []),
            jump("forward-public-published", "allowed-public", [published()]),
        ];
        rules.extend(deny("drop-forward-public-published", published()));
        rules.extend(deny("drop-forward-public-to-mesh", oifname(&mesh.interface)));
        for pattern in locals.iter().flat_map(|local| &local.interfaces) {
            let to = || oifname(pattern.as_str());
            rules.push(jump(&format!("forward-public-to-{pattern}"), "allowed-public", [to()]));
            rules.extend(deny(&format!("drop-forward-public-to-{pattern}"), to()));
        }
        rules
    }

    /// The packet goes to a mesh address of this host and came by another way. On input
    /// only: what is published may well go on to the mesh.
    fn weak_host(&self, id: &str) -> Vec<Rule> {
        self.on_mesh_prefixes(DropReason::WeakHost, &format!("drop-{id}-weak-host"), |net| {
            vec![address("daddr", net)]
        })
    }

    /// Asked for a mesh address, or says to come from one, without coming from the mesh.
    fn mesh_leaks(&self) -> Vec<Rule> {
        let mut rules =
            self.on_mesh_prefixes(DropReason::WeakHost, "drop-weak-host", |net| vec![original_address(net)]);
        rules.extend(self.on_mesh_prefixes(DropReason::SpoofedMesh, "drop-spoofed-mesh", |net| {
            vec![address("saddr", net)]
        }));
        rules
    }

    fn on_mesh_prefixes(
        &self,
        reason: DropReason,
        id: &str,
        matches: impl Fn((Family, Operand)) -> Vec<Match>,
    ) -> Vec<Rule> {
        (by_family(&self.policy.mesh.prefix).into_iter())
            .flat_map(|(family, from)| from.map(|operand| (family, operand)))
            .flat_map(|(family, operand)| {
                self.deny(reason, family, &format!("{id}-{family}"), matches((family, operand)))
            })
            .collect()
    }

    fn open_ssh(&self, scope: &str) -> Vec<Rule> {
        opened(self.ssh_openings(scope))
    }

    fn ssh_openings(self, scope: &str) -> Vec<(String, Opening<'a>)> {
        let ssh = &self.policy.ssh;
        let from = ssh.from.prefixes(&self.policy.mesh);
        let at = |to: IpAddr| Opening {
            to: Some(to),
            from: Some(Cow::Owned(from.clone())),
            ..Opening::tcp(std::slice::from_ref(&ssh.port), None)
        };
        open_binds(self.policy).into_iter().map(|to| (format!("{scope}-ssh-{to}"), at(to))).collect()
    }

    fn exceptions(&self, scope: &str) -> Vec<Rule> {
        let mut all = Vec::new();
        for (exception, proto, senders) in self.held_exceptions() {
            let (id, opening) = exception_opening(scope, exception, proto);
            let mut rules = opening.rules_for(&id, opening.sources_of(senders.clone()));
            if let (None, Some(end)) = (self.today, exception.ends()) {
                for rule in &mut rules {
                    rule.statements.insert(0, Statement::Match(before(end)));
                }
            }
            all.append(&mut rules);
        }
        all
    }

    fn exception_openings(self, scope: &str) -> Vec<(String, Opening<'a>)> {
        let held = self.policy.exceptions.iter().filter(|exception| holds(exception, self.today));
        held.flat_map(|exception| Proto::ALL.map(|proto| exception_opening(scope, exception, proto)))
            .collect()
    }

    fn held_exceptions(&self) -> impl Iterator<Item = (&'a Exception, Proto, &'a Senders)> + use<'a> {
        let today = self.today;
        (self.policy.exceptions.iter().zip(self.exceptions))
            .filter(move |(exception, _)| holds(exception, today))
            .flat_map(|(exception, senders)| Proto::ALL.map(|proto| (exception, proto, senders)))
    }

    fn local_patterns<'b>(
        &'b self,
        names: &'b [String],
    ) -> impl Iterator<Item = (&'b IfacePattern, &'b String)> {
        (self.policy.locals.iter().zip(names))
            .flat_map(|(local, name)| local.interfaces.iter().map(move |pattern| (pattern, name)))
    }

    /// One rule for each family, so that each has its counter.
    fn deny_both<const N: usize>(&self, reason: DropReason, id: &str, matches: [Match; N]) -> Vec<Rule> {
        (Family::ALL.into_iter())
            .flat_map(|family| {
                let all = std::iter::once(nfproto(family)).chain(matches.iter().cloned()).collect();
                self.deny(reason, family, &format!("{id}-{family}"), all)
            })
            .collect()
    }

    /// The only place that denies. Audit mode ends the chain at the same rule, so that
    /// it counts exactly what enforcing would have dropped: the first packet of a flow under
    /// its reason, and apart from that what belongs to a flow that should never have begun.
    fn deny(&self, reason: DropReason, family: Family, id: &str, matches: Vec<Match>) -> Vec<Rule> {
        let verdict = match self.policy.enforce.mode {
            Mode::Enforce => Statement::Drop,
            Mode::Audit => Statement::Accept,
        };
        let counter = |reason: DropReason| Statement::CounterRef(reason.counter(family));
        let mut rules = Vec::new();
        // Of what is not TCP nothing established comes this far.
        if !matches!(reason, DropReason::PublicUdp | DropReason::PublicOther) {
            let of_a_flow: Vec<Match> = matches.iter().cloned().chain([ct_state(&["established"])]).collect();
            let then = [counter(DropReason::Stale), verdict.clone()];
            rules.push(rule(&format!("{id}-stale"), of_a_flow, then));
        }
        if !meets_probes(reason, family) {
            rules.push(rule(id, matches, [counter(reason), verdict]));
            return rules;
        }
        // One rule judges strangers and probes; only strangers are counted before it.
        let of_strangers = matches.iter().cloned().chain([not_a_probe()]);
        rules.push(rule(&id.replacen("drop-", "count-", 1), of_strangers, [counter(reason)]));
        rules.push(rule(id, matches, [verdict]));
        rules
    }
}

/// Whether probes of our own audits come by this way, and are known there: forwarding gives
/// IPv4 packets another priority.
fn meets_probes(reason: DropReason, family: Family) -> bool {
    match reason {
        DropReason::Ssh | DropReason::PublicTcp | DropReason::PublicUdp | DropReason::WeakHost => true,
        DropReason::Forward => family == Family::Ipv6,
        DropReason::PublicOther
        | DropReason::SpoofedMesh
        | DropReason::Mesh
        | DropReason::Local
        | DropReason::Stale => false,
    }
}

fn not_a_probe() -> Match {
    Match { op: Op::Ne, ..meta("priority", PROBE_PRIORITY) }
}

/// Ports that become reachable: by the original port for flows that conntrack knows, by
/// the packet's own port for the others, which no NAT has rewritten.
#[derive(Clone)]
pub(super) struct Opening<'a> {
    proto: Proto,
    pub(super) ports: &'a [Port],
    /// `None`: anyone.
    pub(super) from: Option<Cow<'a, [IpNet]>>,
    /// One address of this host only. Unspecified: any of its family.
    pub(super) to: Option<IpAddr>,
    iifname: Option<&'a str>,
}

impl<'a> Opening<'a> {
    fn new(proto: Proto, ports: &'a [Port], from: Option<&'a [IpNet]>) -> Self {
        Self { proto, ports, from: from.map(Cow::Borrowed), to: None, iifname: None }
    }

    fn tcp(ports: &'a [Port], from: Option<&'a [IpNet]>) -> Self {
        Self::new(Proto::Tcp, ports, from)
    }

    fn rules(&self, id: &str) -> Vec<Rule> {
        self.rules_for(id, self.sources())
    }

    fn rules_for(&self, id: &str, sources: Vec<(Option<Family>, Option<Operand>)>) -> Vec<Rule> {
        let mut ports: Vec<u64> = self.ports.iter().map(|port| u64::from(port.get())).collect();
        ports.sort_unstable();
        ports.dedup();
        let Some(own_port) = set(ports.iter().map(|&port| Operand::Number(port)).collect()) else {
            return Vec::new();
        };
        let mut rules = Vec::new();
        for (family, from) in sources {
            let suffix = family.map_or(String::new(), |family| format!("-{family}"));
            let iif = self.iifname.map(iifname);
            let source = match (family, from) {
                (Some(family), Some(operand)) => Some(address("saddr", (family, operand))),
                (Some(family), None) if self.to.is_none_or(|to| to.is_unspecified()) => Some(nfproto(family)),
                _ => None,
            };
            let to =
                self.to.filter(|to| !to.is_unspecified()).map(|to| (Family::of(to), Operand::Address(to)));
            for &port in &ports {
                let matches = (iif.clone().into_iter())
                    .chain(source.clone())
                    .chain(to.clone().map(original_address))
                    .chain([l4proto(self.proto.name()), original_is(port)]);
                rules.push(accept(&format!("{id}-{port}{suffix}"), matches));
            }
            let matches = (iif.into_iter())
                .chain([ct_state(&["invalid", "untracked"])])
                .chain(source)
                .chain(to.map(|to| address("daddr", to)))
                .chain([payload(self.proto.name(), "dport", own_port.clone())]);
            rules.push(accept(&format!("{id}-untracked{suffix}"), matches));
        }
        rules
    }

    /// The sources by family: `(None, None)` is anyone, `(Some(family), None)` is anyone
    /// of one family.
    fn sources(&self) -> Vec<(Option<Family>, Option<Operand>)> {
        self.sources_of(match &self.from {
            None => Family::ALL.map(|family| (family, None)).to_vec(),
            Some(from) => by_family(from),
        })
    }

    /// The same where they are at hand by family.
    fn sources_of(&self, all: Senders) -> Vec<(Option<Family>, Option<Operand>)> {
        match self.to {
            Some(to) => (all.into_iter())
                .filter(|(family, _)| *family == Family::of(to))
                .map(|(family, from)| (Some(family), from))
                .collect(),
            None if all.len() == 2 && all.iter().all(|(_, from)| from.is_none()) => vec![(None, None)],
            None => all.into_iter().map(|(family, from)| (Some(family), from)).collect(),
        }
    }
}

/// As rules that accept, each by its id.
fn exception_opening<'a>(scope: &str, exception: &'a Exception, proto: Proto) -> (String, Opening<'a>) {
    let id = format!("{scope}-exception-{}-{proto}", exception.name);
    (id, Opening::new(proto, exception.ports(proto), Some(&exception.from)))
}

fn opened(openings: Vec<(String, Opening<'_>)>) -> Vec<Rule> {
    openings.iter().flat_map(|(id, opening)| opening.rules(id)).collect()
}

/// Prefixes as the right side of a match, for each family that has any. `None`: all of
/// its addresses.
fn by_family(nets: &[IpNet]) -> Senders {
    (Family::ALL.into_iter())
        .filter_map(|family| {
            let ranges = merged(nets.iter().filter(|net| Family::of_net(net) == family));
            if ranges.is_empty() {
                return None;
            }
            let highest = match family {
                Family::Ipv4 => u128::from(u32::MAX),
                Family::Ipv6 => u128::MAX,
            };
            let everything = ranges == [(0, highest)];
            let operands = ranges.into_iter().map(|range| range_operand(family, range)).collect();
            Some((family, set(operands).filter(|_| !everything)))
        })
        .collect()
}

/// Sorted, and joined where they overlap or touch, as the kernel's interval sets are.
fn merged<'a>(nets: impl Iterator<Item = &'a IpNet>) -> Vec<(u128, u128)> {
    let mut ranges: Vec<(u128, u128)> =
        nets.map(|net| (number(net.network()), number(last_address(net)))).collect();
    ranges.sort_unstable();
    let mut out: Vec<(u128, u128)> = Vec::new();
    for (first, last) in ranges {
        match out.last_mut() {
            Some((_, end)) if first <= end.saturating_add(1) => *end = last.max(*end),
            _ => out.push((first, last)),
        }
    }
    out
}

fn range_operand(family: Family, (first, last): (u128, u128)) -> Operand {
    let (low, high) = (ip(family, first), ip(family, last));
    if first == last {
        return Operand::Address(low);
    }
    match prefix_of(low, high) {
        Some(net) => Operand::Prefix(net),
        None => Operand::Range(Box::new(Operand::Address(low)), Box::new(Operand::Address(high))),
    }
}

/// `IpNet::broadcast` under the name that holds for both families.
fn last_address(net: &IpNet) -> IpAddr {
    net.broadcast()
}

fn number(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(v4) => u128::from(v4.to_bits()),
        IpAddr::V6(v6) => v6.to_bits(),
    }
}

fn ip(family: Family, number: u128) -> IpAddr {
    match family {
        // Only numbers that came from IPv4 addresses get here, so nothing is cut off.
        Family::Ipv4 => Ipv4Addr::from_bits(number as u32).into(),
        Family::Ipv6 => Ipv6Addr::from_bits(number).into(),
    }
}

/// A set of one is written as the element itself; of none, not at all.
fn set(mut operands: Vec<Operand>) -> Option<Operand> {
    match operands.len() {
        0 => None,
        1 => operands.pop(),
        _ => Some(Operand::Set(operands)),
    }
}

/// Without a list of public interfaces, what gets this far is public. With one, the rest
/// of the host's interfaces is not ours to judge.
fn to_public(interfaces: Option<&[IfacePattern]>, id: &str, chain: &str) -> Vec<Rule> {
    match interfaces {
        None => vec![jump(id, chain, [])],
        Some(list) => (list.iter())
            .map(|pattern| jump(&format!("{id}-{pattern}"), chain, [iifname(pattern.as_str())]))
            .collect(),
    }
}

/// What an operator has opened for a while, see [`glass`]: by the original port, as all
/// openings. These rules stand in every policy and let nobody in while the sets are empty.
fn break_glass() -> Vec<Rule> {
    let each = Family::ALL.into_iter().flat_map(|family| Proto::ALL.map(|proto| (family, proto)));
    let rules = each.flat_map(|(family, proto)| {
        let (set, name) = (glass::set_name(proto, family), proto.name());
        let within = |port: Term| {
            let source = Term::Payload { protocol: header(family).to_owned(), field: "saddr".to_owned() };
            equal(Term::Concat(vec![port, source]), Operand::Named(set.clone()))
        };
        let last = || [Statement::CounterRef(glass::counter(family)), Statement::Accept];
        let own = Term::Payload { protocol: name.to_owned(), field: "dport".to_owned() };
        [
            // First the protocol: nft gives the port a type only then.
            rule(&set, vec![l4proto(name), within(original("proto-dst"))], last()),
            rule(&format!("{set}-untracked"), vec![ct_state(&["invalid", "untracked"]), within(own)], last()),
        ]
    });
    rules.collect()
}

/// Path MTU, errors, echo; for IPv6 also neighbour and router discovery and multicast
/// listening. No redirects: no host needs them, and they move its routes.
fn icmp_needed() -> Vec<Rule> {
    let v4 = ["destination-unreachable", "echo-request", "parameter-problem", "time-exceeded"];
    let v6 = [
        "destination-unreachable",
        "echo-request",
        "mld-listener-done",
        "mld-listener-query",
        "mld-listener-report",
        "mld2-listener-report",
        "nd-neighbor-advert",
        "nd-neighbor-solicit",
        "nd-router-advert",
        "nd-router-solicit",
        "packet-too-big",
        "parameter-problem",
        "time-exceeded",
    ];
    vec![
        accept("icmp-needed-ipv4", [payload("icmp", "type", texts(&v4))]),
        accept("icmp-needed-ipv6", [payload("icmpv6", "type", texts(&v6))]),
    ]
}

/// Answers to a DHCP client: they come from addresses it never wrote to.
fn dhcp_client(id: &str) -> [Rule; 2] {
    let link_local = IpNet::new_assert(IpAddr::V6(Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 0)), 10);
    [
        accept(
            &format!("{id}-dhcp-ipv4"),
            [
                nfproto(Family::Ipv4),
                payload("udp", "sport", Operand::Number(67)),
                payload("udp", "dport", Operand::Number(68)),
            ],
        ),
        accept(
            &format!("{id}-dhcp-ipv6"),
            [
                address("saddr", (Family::Ipv6, Operand::Prefix(link_local))),
                payload("udp", "dport", Operand::Number(546)),
            ],
        ),
    ]
}

/// The names of the `[[local]]` entries as parts of chain names: what nft's own language
/// takes, and each once.
fn local_names(policy: &Policy) -> Vec<String> {
    let mut names: Vec<String> = Vec::new();
    for local in &policy.locals {
        let clean: String = (local.name.chars().take(40))
            .map(|c| if c.is_ascii_alphanumeric() || c == '_' { c } else { '-' })
            .collect();
        let mut name = clean.clone();
        for n in 2.. {
            if !names.contains(&name) {
                break;
            }
            name = format!("{clean}-{n}");
        }
        names.push(name);
    }
    names
}

fn base(name: &str, hook: Hook, rules: Vec<Rule>) -> Chain {
    let base = Base { kind: "filter".into(), hook, priority: PRIORITY, drops: false, devices: Vec::new() };
    Chain { name: name.to_owned(), base: Some(base), rules }
}

fn regular(name: impl Into<String>, rules: Vec<Rule>) -> Chain {
    Chain { name: name.into(), base: None, rules }
}

fn accept(id: &str, matches: impl IntoIterator<Item = Match>) -> Rule {
    rule(id, matches, [Statement::Accept])
}

fn jump(id: &str, chain: &str, matches: impl IntoIterator<Item = Match>) -> Rule {
    rule(id, matches, [Statement::Jump(chain.to_owned())])
}

/// nft takes comments of up to 128 bytes; names in a policy may be longer.
fn rule(
    id: &str,
    matches: impl IntoIterator<Item = Match>,
    then: impl IntoIterator<Item = Statement>,
) -> Rule {
    let comment: String = format!("{COMMENT_PREFIX}{id}")
        .chars()
        .map(|c| if c.is_ascii_graphic() && c != '"' && c != '\\' { c } else { '-' })
        .take(120)
        .collect();
    let statements = matches.into_iter().map(Statement::Match).chain(then).collect();
    Rule { comment: Some(comment), handle: None, statements }
}

fn equal(left: Term, right: Operand) -> Match {
    Match { left, op: Op::Eq, right }
}

fn meta(key: &str, value: &str) -> Match {
    equal(Term::Meta(key.to_owned()), Operand::Text(value.to_owned()))
}

fn iifname(name: &str) -> Match {
    meta("iifname", name)
}

fn oifname(name: &str) -> Match {
    meta("oifname", name)
}

fn l4proto(name: &str) -> Match {
    meta("l4proto", name)
}

fn nfproto(family: Family) -> Match {
    meta("nfproto", family.name())
}

fn payload(protocol: &str, field: &str, right: Operand) -> Match {
    equal(Term::Payload { protocol: protocol.to_owned(), field: field.to_owned() }, right)
}

fn header(family: Family) -> &'static str {
    match family {
        Family::Ipv4 => "ip",
        Family::Ipv6 => "ip6",
    }
}

/// The address that the packet carries now.
fn address(field: &str, (family, operand): (Family, Operand)) -> Match {
    payload(header(family), field, operand)
}

/// The address that the sender asked for.
fn original_address((family, operand): (Family, Operand)) -> Match {
    equal(original(&format!("{} daddr", header(family))), operand)
}

/// The port that the sender asked for. Only meaningful beside `meta l4proto`.
fn original_port(port: Port) -> Match {
    original_is(u64::from(port.get()))
}

fn original_is(port: u64) -> Match {
    equal(original("proto-dst"), Operand::Number(port))
}

fn original(key: &str) -> Term {
    Term::Ct { key: key.to_owned(), dir: Some("original".to_owned()) }
}

/// Flows that need no second judgement: answers to what was begun on this side, errors about
/// known flows, and everything that is known but TCP.
///
/// TCP that came from the other side is judged packet by packet. A connection that a
/// stranger got through while our table was away, or under an older policy, must not live
/// on because it is established. UDP is spared: the kernel may believe that the hub began
/// the tunnel's flow, and judging that one again would cut the tunnel.
fn known_flows(id: &str) -> [Rule; 3] {
    let direction = Term::Ct { key: "direction".to_owned(), dir: None };
    let replies = equal(direction, Operand::Text("reply".to_owned()));
    let not_tcp = Match { op: Op::Ne, ..l4proto("tcp") };
    [
        accept(&format!("{id}related"), [ct_state(&["related"])]),
        accept(&format!("{id}replies"), [ct_state(&["established"]), replies]),
        accept(&format!("{id}established"), [not_tcp, ct_state(&["established"])]),
    ]
}

/// By the clock of the kernel, whatever the time zone of nft.
fn before(second: u64) -> Match {
    let left = Term::Meta("time".to_owned());
    Match { left, op: Op::Lt, right: Operand::Number(second) }
}

fn ct_state(states: &[&str]) -> Match {
    Match { left: Term::Ct { key: "state".to_owned(), dir: None }, op: Op::Any, right: texts(states) }
}

/// A flow that some DNAT or redirect has rewritten: a published port.
fn published() -> Match {
    let left = Term::Ct { key: "status".to_owned(), dir: None };
    Match { left, op: Op::Any, right: Operand::Text("dnat".to_owned()) }
}

fn texts(list: &[&str]) -> Operand {
    Operand::Set(list.iter().map(|text| Operand::Text((*text).to_owned())).collect())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use expect_test::{ExpectFile, expect_file};
    use proptest::prelude::*;

    use super::*;
    use crate::desired::{Desired, samples};
    use crate::ruleset::{Packet, Ruleset, Verdict, evaluate, render};

    fn built(policy: Policy) -> Table {
        Desired::new(policy, samples::TODAY).expect("a path").table.expect("a table")
    }

    #[track_caller]
    fn check(policy: Policy, wanted: ExpectFile) {
        wanted.assert_eq(&render::table(&built(policy)));
    }

    fn audited() -> Policy {
        let mut policy = samples::everything();
        policy.enforce.mode = Mode::Audit;
        policy
    }

    #[test]
    fn a_spoke_of_the_contract() {
        check(samples::spoke(), expect_file!["snapshots/spoke.nft"]);
    }

    #[test]
    fn a_hub_opens_its_tunnel_and_judges_its_public_interfaces_only() {
        check(samples::hub(), expect_file!["snapshots/hub.nft"]);
    }

    #[test]
    fn a_tailscale_device_opens_nothing() {
        check(samples::tailscale(), expect_file!["snapshots/tailscale.nft"]);
    }

    #[test]
    fn locals_exceptions_and_audit() {
        check(audited(), expect_file!["snapshots/audit.nft"]);
    }

    #[test]
    fn audit_is_enforce_with_accept_for_drop_and_nothing_else() {
        let mut enforced = built(samples::everything());
        let mut denials = 0;
        for statement in enforced.chains.iter_mut().flat_map(|c| &mut c.rules).flat_map(|r| &mut r.statements)
        {
            if *statement == Statement::Drop {
                *statement = Statement::Accept;
                denials += 1;
            }
        }
        assert!(denials > 20, "{denials} denials");
        assert_eq!(enforced, built(audited()));
    }

    #[test]
    fn every_rule_has_an_id_of_its_own_that_fits() {
        let mut long = samples::everything();
        long.exceptions[0].name = "x\"\u{e9} ".repeat(100);
        for (policy, unique) in [(samples::everything(), true), (samples::hub(), true), (long, false)] {
            let mut seen = BTreeSet::new();
            for rule in built(policy).chains.iter().flat_map(|chain| &chain.rules) {
                let comment = rule.comment.clone().expect("a comment");
                assert!(comment.starts_with(COMMENT_PREFIX) && comment.len() < 128, "{comment}");
                assert!(!comment.contains(['"', '\\']) && comment.is_ascii(), "{comment}");
                assert!(seen.insert(comment.clone()) || !unique, "{comment} twice");
            }
        }
    }

    #[test]
    fn every_jump_has_a_chain_that_comes_to_it_once_and_every_drop_a_counter() {
        for policy in [samples::spoke(), samples::hub(), samples::tailscale(), samples::everything()] {
            let table = built(policy);
            let names: BTreeSet<&str> = table.chains.iter().map(|chain| chain.name.as_str()).collect();
            assert_eq!(names.len(), table.chains.len());
            let mut last = None;
            for rule in table.chains.iter().flat_map(|chain| &chain.rules) {
                for statement in &rule.statements {
                    match statement {
                        Statement::Jump(to) => assert!(names.contains(to.as_str()), "no chain {to}"),
                        Statement::CounterRef(name) => {
                            assert!(table.counters.contains_key(name));
                            if Family::ALL.map(glass::counter).contains(name) {
                                continue;
                            }
                            let (reason, family) = DropReason::of_counter(name).expect("one of ours");
                            assert_eq!(reason.counter(family), *name);
                        }
                        Statement::Drop => {
                            let counts = |rule: &Rule| {
                                rule.statements.iter().any(|s| matches!(s, Statement::CounterRef(_)))
                            };
                            let of_strangers = |before: &Rule| {
                                let same: Vec<_> = rule
                                    .statements
                                    .iter()
                                    .take(rule.statements.len() - 1)
                                    .cloned()
                                    .chain([Statement::Match(not_a_probe())])
                                    .collect();
                                counts(before) && before.statements[..before.statements.len() - 1] == same
                            };
                            assert!(counts(rule) || last.is_some_and(of_strangers), "{rule:?}");
                        }
                        _ => {}
                    }
                }
                last = Some(rule);
            }
        }
        assert_eq!(DropReason::of_counter("drop-ssh-ipv5"), None);
    }

    #[test]
    fn local_names_become_chains_that_nft_takes() {
        let mut policy = samples::everything();
        policy.locals[0].name = "b\u{fc}ro \"x\"".into();
        policy.locals[1].name = "b ro -x-".into();
        assert_eq!(local_names(&policy), ["b-ro--x-", "b-ro--x--2"]);
    }

    #[test]
    fn a_long_list_stands_once_in_a_set_and_means_the_same() {
        let mut policy = samples::everything();
        let listed = |n: u32| -> IpNet {
            let [_, _, a, b] = (n * 2).to_be_bytes();
            format!("24.{a}.{b}.0/24").parse().expect("a prefix")
        };
        policy.exceptions.truncate(1);
        policy.exceptions[0].from = (0..64).map(listed).chain([samples::net("2001:db8:7::/48")]).collect();
        let own = |table: &Table| {
            table.sets.iter().filter(|set| set.name.starts_with("list-")).cloned().collect::<Vec<_>>()
        };
        let short = Desired::new(policy.clone(), samples::TODAY).expect("a way in").table.expect("a table");
        assert_eq!(own(&short), []);
        policy.exceptions[0].from.push(listed(64));
        let long = Desired::new(policy.clone(), samples::TODAY).expect("a way in");
        let [list] = own(long.table.as_ref().expect("a table")).try_into().expect("one set");
        assert_eq!((list.kind.as_str(), list.elements.len()), ("ipv4_addr", 65));
        let text = render::table(long.table.as_ref().expect("a table"));
        assert_eq!(text.matches("24.0.2.0/24").count(), 1, "{text}");
        assert!(text.matches(&format!("@{}", list.name)).count() > 1, "{text}");
        let sealed = long.sealed().expect("sealed rules");
        assert_eq!(own(&sealed), [list], "called the same wherever it stands");
        let rules = Ruleset { tables: vec![long.table.clone().expect("a table")] };
        let port = *policy.exceptions[0].tcp.first().expect("a port");
        for (source, verdict) in [("24.0.128.9", Verdict::Accept), ("24.0.129.9", Verdict::Drop)] {
            let packet = Packet {
                iifname: "eth0".into(),
                source: samples::ip(source),
                destination: samples::ip("198.51.100.7"),
                proto: Proto::Tcp,
                source_port: samples::port(50_000),
                port,
            };
            assert_eq!(evaluate::judge(&rules, &packet, &|_| true).verdict, verdict, "{source}");
        }
    }

    /// Packets to ports that are open to anyone, so that a test of none is seen.
    static AT_ONCE: std::sync::atomic::AtomicUsize = std::sync::atomic::AtomicUsize::new(0);

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(400) })]

        fn check_at_once(text in policies(), nat in any(&["", "5432 80", "80 5432", "8080 22", "mesh", "somewhere"])) {
            let Ok(loaded) = crate::policy::parse(&text, "policy.toml", samples::TODAY) else { return Ok(()) };
            let Ok(desired) = Desired::new(loaded.policy, samples::TODAY) else { return Ok(()) };
            let Some(with) = desired.table else { return Ok(()) };
            let mut without = with.clone();
            let input = without.chains.iter_mut().find(|chain| chain.name == "input").expect("the chain");
            let at_once = |rule: &Rule| {
                rule.comment.as_deref().is_some_and(|comment| comment.starts_with("spokeguard:open-tcp-"))
            };
            input.rules.retain(|rule| !at_once(rule));
            let rules = [with, without].map(|table| Ruleset { tables: vec![rewriting(nat), table] });
            let [with, without] = rules.each_ref().map(evaluate::Evaluator::new);
            let ends = [
                ("192.0.2.9", "198.51.100.7"),
                ("192.0.2.9", "10.84.0.16"),
                ("10.84.0.1", "198.51.100.7"),
                ("10.84.0.9", "10.84.0.16"),
                ("2001:db8::9", "2001:db8::7"),
                ("2001:db8::9", "fd84::16"),
                ("fd84::1", "fd84::16"),
            ];
            for (iifname, (source, destination)) in
                ["eth0", "wg0", "vmbr0", "lan0"].iter().flat_map(|name| ends.map(|ends| (*name, ends)))
            {
                for port in [22, 80, 8080, 5432] {
                    let packet = Packet {
                        iifname: iifname.to_owned(),
                        source: samples::ip(source),
                        destination: samples::ip(destination),
                        proto: Proto::Tcp,
                        source_port: samples::port(40000),
                        port: samples::port(port),
                    };
                    if desired.policy.public.tcp.contains(&packet.port) {
                        AT_ONCE.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                    }
                    let [with, without] = [&with, &without].map(|rules| rules.judge(&packet, &|_| true).verdict);
                    prop_assert_eq!(with, without, "{:?} with NAT {:?} by\n{}", packet, nat, text);
                }
            }
        }
    }

    /// Another tool's NAT: of a port ("asked for" and "inside"), or of all TCP to the address of the host, which is
    /// sent to the mesh address or to wherever a map says.
    fn rewriting(nat: &str) -> Table {
        let number = |text: &str| Operand::Number(text.parse().expect("a port"));
        let of_all = |to: Operand, port: Option<Operand>| {
            let host = Operand::Address(samples::ip("198.51.100.7"));
            let target = crate::ruleset::Nat { address: Some(to), port };
            vec![Statement::Match(address("daddr", (Family::Ipv4, host))), Statement::Dnat(target)]
        };
        let unknown = || Operand::Unknown("map".into());
        let statements = match nat.split_once(' ') {
            Some((asked, inside)) => vec![
                Statement::Match(payload("tcp", "dport", number(asked))),
                Statement::Redirect { port: Some(number(inside)) },
            ],
            None if nat == "mesh" => of_all(Operand::Address(samples::ip("10.84.0.16")), None),
            None if nat == "somewhere" => of_all(unknown(), Some(unknown())),
            None => Vec::new(),
        };
        let base = Base {
            kind: "nat".into(),
            hook: Hook::Prerouting,
            priority: -100,
            drops: false,
            devices: vec![],
        };
        let rules = vec![Rule { statements, ..Rule::default() }];
        Table {
            family: TableFamily::Inet,
            name: "theirs".into(),
            dormant: false,
            chains: vec![Chain { name: "prerouting".into(), base: Some(base), rules }],
            counters: BTreeMap::new(),
            sets: Vec::new(),
        }
    }

    #[test]
    fn what_is_open_at_once_is_what_the_rules_below_let_in() {
        check_at_once();
        let seen = AT_ONCE.load(std::sync::atomic::Ordering::Relaxed);
        assert!(seen > 500, "only {seen} packets went to ports that are open to anyone");
    }

    #[test]
    fn prefixes_merge_as_interval_sets_do() {
        let merged = |list: &[&str]| {
            let nets: Vec<IpNet> = list.iter().map(|text| samples::net(text)).collect();
            format!("{:?}", by_family(&nets).into_iter().map(|(_, operand)| operand).collect::<Vec<_>>())
        };
        assert_eq!(merged(&["10.0.0.0/25", "10.0.0.128/25"]), "[Some(Prefix(10.0.0.0/24))]");
        assert_eq!(merged(&["10.0.0.1/32", "10.0.0.0/24"]), "[Some(Prefix(10.0.0.0/24))]");
        assert_eq!(
            merged(&["10.0.0.1/32", "10.0.0.2/32"]),
            "[Some(Range(Address(10.0.0.1), Address(10.0.0.2)))]"
        );
        assert_eq!(merged(&["0.0.0.0/1", "128.0.0.0/1", "fd00::1/128"]), "[None, Some(Address(fd00::1))]");
        assert_eq!(merged(&["ff00::/8", "::/0"]), "[None]");
        assert_eq!(merged(&[]), "[]");
    }

    /// What our table alone does to the first packet of a flow.
    fn verdict(policy: Policy, iifname: &str, from: &str, to: &str, proto: Proto, port: u16) -> Verdict {
        let table = built(policy);
        let packet = Packet {
            iifname: iifname.to_owned(),
            source: samples::ip(from),
            destination: samples::ip(to),
            proto,
            source_port: samples::port(40000),
            port: samples::port(port),
        };
        evaluate::judge(&Ruleset { tables: vec![table] }, &packet, &|_| true).verdict
    }

    #[test]
    fn a_stranger_reaches_what_is_public_and_the_hub_reaches_sshd() {
        use Proto::{Tcp, Udp};
        let on = |iif, from, to, proto, port| verdict(samples::everything(), iif, from, to, proto, port);
        for (from, to) in [("192.0.2.200", "198.51.100.7"), ("2001:db8::1", "2001:db8::7")] {
            assert_eq!(on("eth0", from, to, Tcp, 443), Verdict::Accept);
            assert_eq!(on("newly0", from, to, Tcp, 443), Verdict::Accept, "a new interface is public");
            assert_eq!(on("eth0", from, to, Tcp, 2222), Verdict::Accept, "an exception");
            for port in [22, 3333, 5432, 8443, 9984, 19999] {
                assert_eq!(on("eth0", from, to, Tcp, port), Verdict::Drop, "{port}");
                assert_eq!(on("newly0", from, to, Tcp, port), Verdict::Drop, "{port}");
            }
            assert_eq!(on("eth0", from, to, Udp, 443), Verdict::Drop);
        }
        assert_eq!(on("eth0", "192.0.2.130", "198.51.100.7", Tcp, 8443), Verdict::Accept);
        assert_eq!(
            on("eth0", "203.0.113.47", "198.51.100.7", Udp, 51821),
            Verdict::Accept,
            "the hub's endpoint"
        );
        assert_eq!(on("eth0", "203.0.113.48", "198.51.100.7", Udp, 51821), Verdict::Drop);
        for port in [22, 9984, 19999] {
            assert_eq!(on("wg0", "10.84.0.1", "10.84.0.16", Tcp, port), Verdict::Accept, "{port}");
            assert_eq!(
                on("eth0", "10.84.0.1", "10.84.0.16", Tcp, port),
                Verdict::Drop,
                "not the mesh: {port}"
            );
        }
        assert_eq!(on("wg0", "10.84.0.9", "10.84.0.16", Tcp, 19999), Verdict::Accept);
        assert_eq!(on("wg0", "10.84.0.9", "10.84.0.16", Tcp, 22), Verdict::Drop);
        assert_eq!(on("wg0", "10.84.0.9", "10.84.0.16", Tcp, 9984), Verdict::Drop);
        assert_eq!(on("eth0", "192.0.2.200", "10.84.0.16", Tcp, 443), Verdict::Drop, "weak host");
        assert_eq!(on("docker0", "172.17.0.2", "172.17.0.1", Tcp, 5432), Verdict::Accept);
        assert_eq!(
            on("docker0", "172.17.0.2", "172.17.0.1", Tcp, 53),
            Verdict::Drop,
            "the other local's list"
        );
        assert_eq!(on("docker0", "172.17.0.2", "10.84.0.16", Tcp, 5432), Verdict::Drop, "weak host");
        assert_eq!(on("lo", "10.84.0.16", "10.84.0.16", Tcp, 5432), Verdict::Accept);
    }

    #[test]
    fn an_opening_lets_in_whom_it_names_on_every_interface_but_to_no_mesh_address() {
        let mut table = built(samples::everything());
        let element = |port: u16, from: &str| {
            Operand::Concat(vec![Operand::Number(port.into()), Operand::Prefix(samples::net(from))])
        };
        let fill = |table: &mut Table, set: &str, element| {
            let set = table.sets.iter_mut().find(|found| found.name == set).expect("declared");
            set.elements.push(element);
        };
        fill(&mut table, "break-glass-tcp-ipv4", element(3333, "192.0.2.0/24"));
        fill(&mut table, "break-glass-udp-ipv6", element(53, "2001:db8::/32"));
        let ruleset = Ruleset { tables: vec![table] };
        let on = |iifname: &str, from: &str, to: &str, proto, port| {
            let packet = Packet {
                iifname: iifname.to_owned(),
                source: samples::ip(from),
                destination: samples::ip(to),
                proto,
                source_port: samples::port(40000),
                port: samples::port(port),
            };
            evaluate::judge(&ruleset, &packet, &|_| true).verdict
        };
        use Proto::{Tcp, Udp};
        for iifname in ["eth0", "newly0"] {
            assert_eq!(on(iifname, "192.0.2.9", "198.51.100.7", Tcp, 3333), Verdict::Accept);
            assert_eq!(on(iifname, "198.51.100.9", "198.51.100.7", Tcp, 3333), Verdict::Drop);
            assert_eq!(on(iifname, "192.0.2.9", "198.51.100.7", Tcp, 3334), Verdict::Drop);
            assert_eq!(on(iifname, "192.0.2.9", "198.51.100.7", Udp, 3333), Verdict::Drop);
            assert_eq!(on(iifname, "192.0.2.9", "10.84.0.16", Tcp, 3333), Verdict::Drop, "weak host");
            assert_eq!(on(iifname, "2001:db8::9", "2001:db8::7", Udp, 53), Verdict::Accept);
            assert_eq!(on(iifname, "2001:dba::9", "2001:db8::7", Udp, 53), Verdict::Drop);
            assert_eq!(on(iifname, "2001:db8::9", "2001:db8::7", Tcp, 3333), Verdict::Drop);
        }
    }

    #[test]
    fn with_a_list_of_public_interfaces_the_others_are_left_alone() {
        let on = |iif, port| verdict(samples::hub(), iif, "192.0.2.200", "198.51.100.7", Proto::Tcp, port);
        assert_eq!(on("eth0", 22), Verdict::Drop);
        assert_eq!(on("ens5", 22), Verdict::Drop);
        assert_eq!(on("lan0", 22), Verdict::Accept);
        let tunnel = |policy| verdict(policy, "eth0", "192.0.2.200", "198.51.100.7", Proto::Udp, 51820);
        assert_eq!(tunnel(samples::hub()), Verdict::Accept);
        assert_eq!(tunnel(samples::spoke()), Verdict::Drop);
    }

    #[test]
    fn sshd_outside_of_the_mesh_is_open_at_its_address_for_its_sources_only() {
        let mut policy = samples::everything();
        policy.ssh.bind = Bind::Addresses(vec![samples::ip("198.51.100.7"), samples::ip("10.84.0.16")]);
        policy.ssh.from = Sources::Prefixes(vec![samples::net("192.0.2.0/24"), samples::net("10.84.0.1/32")]);
        let on = |iif, from, to| verdict(policy.clone(), iif, from, to, Proto::Tcp, 22);
        for iif in ["eth0", "docker0"] {
            assert_eq!(on(iif, "192.0.2.9", "198.51.100.7"), Verdict::Accept);
            assert_eq!(on(iif, "192.0.2.9", "198.51.100.8"), Verdict::Drop);
            assert_eq!(on(iif, "203.0.113.9", "198.51.100.7"), Verdict::Drop);
        }
        assert_eq!(on("wg0", "10.84.0.1", "10.84.0.16"), Verdict::Accept);
    }

    /// One of these.
    fn any(of: &'static [&'static str]) -> impl Strategy<Value = &'static str> {
        proptest::sample::select(of)
    }

    prop_compose! {
        /// Policies with everything that might get in the hub's way, most of them right.
        fn policies()(
            role in any(&["spoke", "spoke", "spoke", "spoke", "hub", "device"]),
            own in any(&["\"10.84.0.16\"", "\"10.84.0.16\", \"fd84::16\"", "\"fd84::16\""]),
            hub in any(&["", "\"10.84.0.1\"", "[\"10.84.0.1\", \"fd84::1\"]", "\"fd84::1\""]),
            public in any(&["", "", "80", "80, 8080", "8443, 2222", "22"]),
            interfaces in any(&["", "", "interfaces = [\"eth0\"]", "interfaces = [\"eth*\", \"w*\"]"]),
            port in any(&["22", "2222", "443"]),
            bind in any(&["\"mesh\"", "[\"10.84.0.16\"]", "[\"198.51.100.7\"]", "[\"0.0.0.0\"]"]),
            from in any(&["\"hub\"", "\"mesh\"", "[\"10.84.0.0/24\"]", "[\"10.84.0.1/32\", \"fd84::1/128\"]",
                "[\"10.84.0.9/32\"]", "[\"203.0.113.0/24\"]", "[\"0.0.0.0/0\"]"]),
            service in any(&["", "19999", "19999, 5432", "443"]),
            local in any(&["", "vmbr0", "eth1", "v*", "w*"]),
            exception in any(&["", "", "2223", "22"]),
            until in any(&["2026-11-20", "2026-11-21", "2030-01-01"]),
            mode in any(&["enforce", "audit"]),
            metrics in any(&["9984", "9100"]),
        ) -> String {
            let mut text = format!(
                "version = 1\n[node]\nname = \"n\"\nrole = \"{role}\"\n[mesh]\naddress = [{own}]\n\
                 prefix = [\"10.84.0.0/24\", \"fd84::/64\"]\n"
            );
            if role == "hub" {
                text += "listen_port = 51820\n";
            }
            if !hub.is_empty() {
                text += &format!("[mesh.hub]\naddress = {hub}\n\
                    public_key = \"xTIBA5rboUvnH4htodjb6e697QjLERt1NAB4mZqp8Dg=\"\n");
            }
            text += &format!("[public]\ntcp = [{public}]\n{interfaces}\n[ssh]\nport = {port}\nbind = {bind}\nfrom = {from}\n");
            if !service.is_empty() {
                text += &format!("[[mesh.service]]\nname = \"s\"\ntcp = [{service}]\nfrom = \"hub\"\n");
            }
            if !local.is_empty() {
                text += &format!("[[local]]\nname = \"lan\"\ninterfaces = [\"{local}\"]\ntcp = [53]\n");
            }
            if !exception.is_empty() {
                text += &format!("[[exception]]\nname = \"e\"\ntcp = [{exception}]\nfrom = [\"192.0.2.0/24\"]\n\
                    reason = \"r\"\nowner = \"o\"\nuntil = \"{until}\"\n");
            }
            text + &format!("[enforce]\nmode = \"{mode}\"\n[metrics]\nport = {metrics}\n")
        }
    }

    /// How many generated policies were right, so that a test of none is seen.
    static RIGHT: std::sync::atomic::AtomicUsize = std::sync::atomic::AtomicUsize::new(0);

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(1000) })]

        fn check_one(text in policies()) {
            let Ok(loaded) = crate::policy::parse(&text, "policy.toml", samples::TODAY) else { return Ok(()) };
            let Ok(desired) = Desired::new(loaded.policy, samples::TODAY) else { return Ok(()) };
            let (Some(table), Some(sealed)) = (&desired.table, desired.sealed()) else { return Ok(()) };
            RIGHT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            let Policy { mesh, ssh, metrics, .. } = &desired.policy;
            // The hub, to sshd and to the metrics; where none is named, whoever administers the node.
            let admin = desired.admin.as_ref().expect("a path");
            let hubs: Vec<IpAddr> = mesh.hub.iter().flat_map(|hub| hub.address.clone()).collect();
            let others: Vec<IpAddr> = admin.from().iter().map(|net| net.network()).filter(|_| hubs.is_empty())
                .filter(|from| desired.in_mesh(*from)).collect();
            for (from, ports) in [(hubs, vec![ssh.port, metrics.port]), (others, vec![ssh.port])] {
                for (from, to) in from.iter().flat_map(|from| mesh.address.iter().map(move |to| (from, to))) {
                    for port in ports.iter().filter(|_| from.is_ipv4() == to.is_ipv4()) {
                        if hubs_only(mesh, *from) || admin.to().contains(to) {
                            let packet = Packet {
                                iifname: mesh.interface.clone(),
                                source: *from,
                                destination: *to,
                                proto: Proto::Tcp,
                                source_port: samples::port(40000),
                                port: *port,
                            };
                            for table in [table, &sealed] {
                                let ruleset = Ruleset { tables: vec![table.clone()] };
                                let verdict = evaluate::judge(&ruleset, &packet, &|_| true).verdict;
                                prop_assert_eq!(verdict, Verdict::Accept, "{} to {}:{} by\n{}", from, to, port, text);
                            }
                        }
                    }
                }
            }
        }
    }

    fn hubs_only(mesh: &crate::policy::Mesh, from: IpAddr) -> bool {
        mesh.hub.iter().any(|hub| hub.address.contains(&from))
    }

    #[test]
    fn no_policy_that_is_right_drops_the_hubs_way_in() {
        check_one();
        let right = RIGHT.load(std::sync::atomic::Ordering::Relaxed);
        assert!(right > 100, "only {right} of the generated policies were right");
    }

    #[test]
    fn in_every_chain_that_can_drop_on_input_the_hub_comes_before_the_policy() {
        for policy in [samples::spoke(), samples::everything()] {
            let table = built(policy);
            let input = table.chains.iter().find(|chain| chain.name == "input").expect("the chain");
            let at = |id: &str| {
                let is = |rule: &Rule| {
                    rule.comment.as_deref().is_some_and(|c| c.starts_with(&format!("{COMMENT_PREFIX}{id}")))
                };
                input.rules.iter().position(is)
            };
            let failsafe = at("hub-failsafe").expect("the failsafe");
            let jumps = |rule: &Rule| {
                matches!(
                    rule.statements.last(),
                    Some(Statement::Jump(_) | Statement::Goto(_) | Statement::Drop)
                )
            };
            let first = input.rules.iter().position(jumps).expect("a jump");
            assert!(failsafe < first, "the failsafe comes after {:?}", input.rules[first]);
            // Of the base chains only `forward` is left, where nothing is on its way to this host.
            let bases: Vec<&str> =
                table.chains.iter().filter(|c| c.base.is_some()).map(|c| c.name.as_str()).collect();
            assert_eq!(bases, ["input", "forward"]);
        }
    }

    #[test]
    fn sealed_exceptions_carry_their_end_and_nothing_else_differs() {
        let mut policy = samples::everything();
        let mut exception = policy.exceptions[0].clone();
        policy.exceptions.retain(|exception| exception.holds_on(samples::TODAY));
        assert!(!policy.exceptions.is_empty());
        let today = Desired::new(policy.clone(), samples::TODAY).expect("a path");
        let mut sealed = today.sealed().expect("a table");
        let end = exception.ends().expect("an end");
        let mut bounded = 0;
        for rule in sealed.chains.iter_mut().flat_map(|chain| &mut chain.rules) {
            let before = rule.statements.len();
            rule.statements
                .retain(|s| !matches!(s, Statement::Match(m) if m.left == Term::Meta("time".into())));
            if rule.statements.len() < before {
                bounded += 1;
                assert!(rule.comment.as_deref().is_some_and(|c| c.contains("-exception-")), "{rule:?}");
            }
        }
        assert!(bounded > 0);
        assert!(Some(sealed) == today.table, "something else differs");
        // 2027-02-01 00:00 UTC is the end of January.
        exception.until = jiff::civil::date(2027, 1, 31);
        assert_eq!(exception.ends(), Some(1_801_440_000));
        assert!(
            render::rule(&Rule { statements: vec![Statement::Match(before(end))], ..Rule::default() })
                .contains(&format!("meta time < {end}"))
        );
        // One that is over is in it and lets nobody in; the day's own table leaves it out.
        exception.until = jiff::civil::date(2020, 1, 1);
        policy.exceptions.iter_mut().for_each(|other| other.until = exception.until);
        let over = Desired::new(policy, samples::TODAY).expect("a path").sealed().expect("a table");
        assert!(render::table(&over).contains(&format!("meta time < {}", exception.ends().expect("an end"))));
    }
}
