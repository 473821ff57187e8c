//! Contradictions: keys that are right one by one and wrong together. Each check names
//! the keys it rests on and is silent while one of them is doubtful.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::ops::Range;

use super::read::{Ground, Wrong, shorten, wrong};
use super::{Bind, MeshKind, Policy, Role, Sources};
use crate::terms::{IfacePattern, Port, Proto};

/// Names of services that mean something else already in metrics and reports.
const RESERVED: [&str; 4] = ["ssh", "metrics", "wireguard", "other"];

pub(super) fn contradictions(policy: &Policy, ground: &Ground<'_>) -> Vec<(Range<usize>, Wrong)> {
    let mut checks = Checks { policy, ground, out: Vec::new() };
    checks.mesh();
    checks.hub();
    checks.sources();
    checks.ssh_bind();
    checks.ports();
    checks.exceptions();
    checks.interfaces();
    checks.names();
    checks.files();
    checks.out
}

struct Checks<'a> {
    policy: &'a Policy,
    ground: &'a Ground<'a>,
    out: Vec<(Range<usize>, Wrong)>,
}

impl Checks<'_> {
    fn add(&mut self, key: &str, what: String, help: impl Into<String>) {
        self.out.push((self.ground.at(key), wrong(what, help.into())));
    }

    fn in_mesh(&self, address: IpAddr) -> bool {
        self.policy.mesh.prefix.iter().any(|prefix| prefix.contains(&address))
    }

    fn is_own(&self, address: &IpAddr) -> bool {
        self.policy.mesh.address.contains(address)
    }

    fn mesh(&mut self) {
        if !self.ground.sound("mesh.prefix") || !self.ground.sound("mesh.kind") {
            return;
        }
        let mesh = &self.policy.mesh;
        let hub = mesh.hub.iter().flat_map(|hub| &hub.address);
        let hub = hub.enumerate().map(|(i, a)| (format!("mesh.hub.address[{i}]"), "the hub's", *a));
        let own = mesh.address.iter().enumerate();
        let own = own.map(|(i, a)| (format!("mesh.address[{i}]"), "this node's", *a));
        let prefixes: Vec<String> = mesh.prefix.iter().take(4).map(ToString::to_string).collect();
        for (key, whose, address) in own.chain(hub).collect::<Vec<_>>() {
            if !self.in_mesh(address) {
                let what = format!("{whose} address {address} is outside the mesh ({})", prefixes.join(", "));
                self.add(&key, what, "correct the address, or add its network to mesh.prefix");
            }
        }
    }

    fn hub(&mut self) {
        let Some(hub) = &self.policy.mesh.hub else { return };
        if !self.ground.sound("node.role") || !self.ground.sound("mesh.address") {
            return;
        }
        let is_hub = self.policy.node.role == Role::Hub;
        for (i, address) in hub.address.iter().enumerate() {
            let key = format!("mesh.hub.address[{i}]");
            match (is_hub, self.is_own(address)) {
                (false, true) => self.add(
                    &key,
                    format!("the hub has this node's own address {address}"),
                    "write the hub's address, or role = \"hub\" if this node is the hub",
                ),
                (true, false) => self.add(
                    &key,
                    format!("this node is the hub, and {address} is not its address"),
                    "leave [mesh.hub] out, or write role = \"spoke\"",
                ),
                _ => {}
            }
        }
    }

    fn sources(&mut self) {
        let (policy, ground) = (self.policy, self.ground);
        if !["node.role", "mesh", "mesh.hub"].iter().all(|key| ground.sound(key)) {
            return;
        }
        let services = policy.services.iter().enumerate();
        let services = services.map(|(i, s)| (format!("mesh.service[{i}].from"), &s.from));
        for (key, from) in services.chain([("ssh.from".to_owned(), &policy.ssh.from)]) {
            if *from != Sources::Hub || !ground.sound(&key) {
                continue;
            }
            if policy.node.role == Role::Hub {
                let what = "from = \"hub\" on the hub itself lets nobody in".to_owned();
                self.add(&key, what, "write \"mesh\", or the prefixes of those who may come in");
            } else if policy.mesh.hub.is_none() {
                let what = "from = \"hub\", and no hub is named".to_owned();
                self.add(&key, what, "write [mesh.hub] with its `address`, or from = \"mesh\"");
            }
        }
    }

    fn ssh_bind(&mut self) {
        let Bind::Addresses(list) = &self.policy.ssh.bind else { return };
        let sound = ["ssh.bind", "ssh.from", "mesh.address", "mesh.prefix", "mesh.kind"];
        let through_mesh = !matches!(self.policy.ssh.from, Sources::Prefixes(_));
        if !through_mesh || !sound.iter().all(|key| self.ground.sound(key)) {
            return;
        }
        for (i, address) in list.iter().enumerate().filter(|(_, a)| !a.is_loopback()) {
            // Tailscale assigns addresses, so they need not be in the file.
            let assigned = self.policy.mesh.address.is_empty()
                && self.policy.mesh.kind == MeshKind::Tailscale
                && self.in_mesh(*address);
            if !self.is_own(address) && !assigned {
                let what = format!("sshd is for the mesh, and {address} is not this node's mesh address");
                self.add(&format!("ssh.bind[{i}]"), what, "write bind = \"mesh\"");
            }
        }
        if list.iter().all(IpAddr::is_loopback) {
            let what = "sshd is for the mesh, and listens on this host's loopback only".to_owned();
            self.add("ssh.bind", what, "write bind = \"mesh\"");
        }
    }

    fn ports(&mut self) {
        let policy = self.policy;
        // First come, first served: key of the port, and what it is for.
        let mut taken: BTreeMap<(Proto, Port), String> = BTreeMap::new();
        for proto in Proto::ALL {
            for port in policy.public.ports(proto) {
                taken.insert((proto, *port), "[public]".into());
            }
        }
        if let Some(port) = policy.mesh.listen_port {
            taken.entry((Proto::Udp, port)).or_insert_with(|| "the tunnel itself".into());
        }
        self.private_port(&mut taken, Proto::Tcp, policy.ssh.port, "ssh.port", "ssh");
        // Of the two, the one that the file speaks of is shown.
        let clash = policy.metrics.port == policy.ssh.port && self.ground.at("metrics.port") == (0..0);
        let key = if clash { "ssh.port" } else { "metrics.port" };
        self.private_port(&mut taken, Proto::Tcp, policy.metrics.port, key, "metrics");
        for (i, service) in policy.services.iter().enumerate() {
            for proto in Proto::ALL {
                for (j, port) in service.ports(proto).iter().enumerate() {
                    let key = format!("mesh.service[{i}].{proto}[{j}]");
                    let name = format!("mesh service \"{}\"", service.name);
                    self.private_port(&mut taken, proto, *port, &key, &name);
                }
            }
            let key = format!("mesh.service[{i}]");
            let listed = |proto| self.ground.sound(&format!("{key}.{proto}"));
            if service.tcp.is_empty() && service.udp.is_empty() && Proto::ALL.into_iter().all(listed) {
                let what = format!("mesh service \"{}\" has no port", service.name);
                self.add(&key, what, "write tcp = [...] or udp = [...]");
            }
        }
    }

    /// A port that is not for everyone, in competition with those before it.
    fn private_port(
        &mut self,
        taken: &mut BTreeMap<(Proto, Port), String>,
        proto: Proto,
        port: Port,
        key: &str,
        name: &str,
    ) {
        if !self.ground.sound(key) {
            return;
        }
        let owner = match taken.get(&(proto, port)) {
            Some(owner) => owner.clone(),
            None => {
                taken.insert((proto, port), name.to_owned());
                return;
            }
        };
        if owner != "[public]" {
            let what = format!("{proto} {port} of {name} is taken by {owner}");
            self.add(key, what, "give each port to one of them");
            return;
        }
        // Blame the line that opens the port to everyone: that is the dangerous one.
        let at = self.policy.public.ports(proto).iter().position(|p| *p == port).unwrap_or(0);
        let what = format!("{proto} {port} is public, and {name} is for the mesh only");
        let help = match name {
            "ssh" => "remove it here; a dated [[exception]] is the way to open ssh to others".to_owned(),
            _ => format!("remove it here, or from {name}"),
        };
        self.add(&format!("public.{proto}[{at}]"), what, help);
    }

    fn exceptions(&mut self) {
        let policy = self.policy;
        for (i, exception) in policy.exceptions.iter().enumerate() {
            let key = format!("exception[{i}]");
            let listed = |proto| self.ground.sound(&format!("{key}.{proto}"));
            if exception.tcp.is_empty() && exception.udp.is_empty() && Proto::ALL.into_iter().all(listed) {
                let what = format!("exception \"{}\" has no port", exception.name);
                self.add(&key, what, "write tcp = [...] or udp = [...]");
            }
            for proto in Proto::ALL {
                for (j, port) in exception.ports(proto).iter().enumerate() {
                    if policy.public.ports(proto).contains(port) {
                        let what = format!("{proto} {port} is public already, so it is no exception");
                        self.add(&format!("{key}.{proto}[{j}]"), what, "remove it here or from [public]");
                    }
                }
            }
        }
    }

    fn interfaces(&mut self) {
        let policy = self.policy;
        let locals = policy.locals.iter().enumerate().flat_map(|(i, local)| {
            let patterns = local.interfaces.iter().enumerate();
            patterns.map(move |(j, p)| (format!("local[{i}].interfaces[{j}]"), i, p))
        });
        let locals: Vec<(String, usize, &IfacePattern)> = locals.collect();
        let public = policy.public.interfaces.iter().flatten().enumerate();
        let public = public.map(|(i, p)| (format!("public.interfaces[{i}]"), p));
        let public: Vec<(String, &IfacePattern)> = public.collect();
        let everywhere = public.iter().map(|(key, p)| (key, *p));
        let everywhere = locals.iter().map(|(key, _, p)| (key, *p)).chain(everywhere);
        for (key, pattern) in everywhere {
            if pattern.matches("lo") {
                let what = format!("\"{pattern}\" matches lo, which has no list of its own");
                self.add(key, what, "name the other interfaces in full");
            }
            if pattern.matches(&policy.mesh.interface) && self.ground.sound("mesh.interface") {
                let what = format!("\"{pattern}\" matches {}, which is the mesh", policy.mesh.interface);
                self.add(key, what, "leave it out: [mesh] and [[mesh.service]] speak for it");
            }
        }
        let other = |p: &IfacePattern| !p.matches("lo") && !p.matches(&policy.mesh.interface);
        for (key, pattern) in public.iter().filter(|(_, p)| other(p)) {
            if let Some((_, i, local)) = locals.iter().find(|(_, _, local)| covers(local, pattern)) {
                let name = shorten(&policy.locals[*i].name);
                let what =
                    format!("\"{pattern}\" is public, and \"{local}\" of local \"{name}\" takes it away");
                self.add(key, what, "an interface is public or local: remove it from one");
            }
        }
        for (n, (key, i, pattern)) in locals.iter().enumerate() {
            let before = &locals[..n];
            let rival = before.iter().find(|(_, j, p)| i != j && (covers(p, pattern) || covers(pattern, p)));
            if let Some((_, j, rival)) = rival {
                let name = shorten(&policy.locals[*j].name);
                let what =
                    format!("\"{pattern}\" and \"{rival}\" of local \"{name}\" mean the same interface");
                self.add(key, what, "give each interface to one [[local]]");
            }
        }
    }

    fn names(&mut self) {
        let policy = self.policy;
        let services = policy.services.iter().map(|s| &s.name).enumerate();
        let locals = policy.locals.iter().map(|l| &l.name).enumerate();
        let exceptions = policy.exceptions.iter().map(|e| &e.name).enumerate();
        let mut first = BTreeMap::new();
        let all = (services.map(|(i, n)| ("mesh.service", i, n)))
            .chain(locals.map(|(i, n)| ("local", i, n)))
            .chain(exceptions.map(|(i, n)| ("exception", i, n)));
        for (kind, i, name) in all.filter(|(_, _, name)| !name.is_empty()) {
            let key = format!("{kind}[{i}].name");
            if first.insert((kind, name), i).is_some() {
                self.add(&key, format!("two [[{kind}]] are named \"{name}\""), "give each a name of its own");
            }
            if kind == "mesh.service" && RESERVED.contains(&name.as_str()) {
                let what = format!("\"{name}\" means something else in metrics");
                self.add(&key, what, "choose another name for this service");
            }
        }
    }

    fn files(&mut self) {
        let mut first = BTreeMap::new();
        for (i, file) in self.policy.files.iter().enumerate() {
            let named = !file.path.as_os_str().is_empty();
            if named && first.insert(&file.path, i).is_some() {
                let what =
                    format!("two [[file]] have the path \"{}\"", shorten(&file.path.to_string_lossy()));
                self.add(&format!("file[{i}].path"), what, "keep one of them");
            }
        }
    }
}

/// Whether every interface that `inner` matches is matched by `outer` too.
fn covers(outer: &IfacePattern, inner: &IfacePattern) -> bool {
    match outer.as_str().strip_suffix('*') {
        Some(stem) => inner.as_str().trim_end_matches('*').starts_with(stem),
        None => outer == inner,
    }
}
