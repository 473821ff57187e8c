//! What a policy file lets into one node, and our own policy that says the same.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

use super::names::{Holds, Names};
use super::{Access, Addresses, Node, Rule, Selector, Status, Target, tailnet};
use crate::terms::{Port, Proto, printable};

/// More ports than this in one rule are no list of services: only those that the node is
/// said to serve are taken.
const PORTS_MAX: usize = 32;
/// Our own, for the hub only.
const METRICS: u16 = 9984;
const WIDTH: usize = 96;

/// What the operator says of the node beside what the file says.
#[derive(Clone, Debug)]
pub struct Wanted {
    /// The ports that it serves; what wide rules open of others is left out.
    pub ports: Vec<(Proto, Port)>,
    pub ssh: Port,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Mirror {
    pub allowed: BTreeMap<(Proto, u16), Guest>,
    /// What the file allows, or may allow, and the mirror does not.
    pub left_out: Vec<LeftOut>,
    pub notes: Vec<(u32, String)>,
}

/// Who may reach a port, and by which rules.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Guest {
    pub from: Addresses,
    /// Line and text of each rule.
    pub rules: BTreeSet<(u32, String)>,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Serialize)]
pub struct LeftOut {
    pub line: u32,
    pub what: String,
    pub why: String,
}

/// What the file lets into this node. Never more: whatever is not certain is left out.
pub fn mirror(access: &Access, node: &Node, status: Option<&Status>, wanted: &Wanted) -> Mirror {
    let names = Names { access, status };
    let mut out = Mirror { notes: access.notes.clone(), ..Mirror::default() };
    for rule in &access.rules {
        for target in &rule.dst {
            mirror_target(&names, node, wanted, rule, target, &mut out);
        }
    }
    if let Some(guest) = out.allowed.remove(&(Proto::Tcp, METRICS)) {
        let line = guest.rules.first().map_or(1, |(line, _)| *line);
        out.notes.push((line, format!("tcp {METRICS} is for our own metrics, which are for the hub only")));
        out.allowed.remove(&(Proto::Udp, METRICS));
    }
    out.left_out.sort();
    out.left_out.dedup();
    out.notes.sort();
    out.notes.dedup();
    out
}

fn mirror_target(
    names: &Names<'_>,
    node: &Node,
    wanted: &Wanted,
    rule: &Rule,
    target: &Target,
    out: &mut Mirror,
) {
    let line = rule.line;
    let own = matches!(&target.to, Selector::Auto(name) if name == "autogroup:self");
    let text = format!("-> {}", target.to);
    let mut leave = |what: String, why: String| out.left_out.push(LeftOut { line, what, why });
    if !target.reach.tcp && !target.reach.udp {
        return;
    }
    let here = if own {
        match (&node.user, node.tags.is_empty()) {
            (_, false) => Holds::No,
            (Some(_), true) => Holds::Yes,
            (None, true) => Holds::Unknown("whose node this is was not said: give --user".into()),
        }
    } else {
        names.means(&target.to, node, true)
    };
    match here {
        Holds::No => return,
        Holds::Unknown(why) => return leave(text, why),
        Holds::Yes => {}
    }
    if let Some(condition) = names.condition(rule) {
        return leave(text, condition);
    }
    let families = names.families(&target.to, node);
    let (ports, dropped) = ports(target, wanted);
    if let Some(dropped) = dropped {
        leave(text.clone(), dropped);
    }
    for who in &rule.src {
        let text = format!("{who} {text}");
        let from = if own { own_devices(names, node, who) } else { names.addresses(who) };
        match from {
            Err(why) => leave(text, why),
            Ok(from) => {
                let from = from.only(&families);
                for port in ports.iter().filter(|_| !from.is_empty()) {
                    let guest = out.allowed.entry(*port).or_default();
                    guest.from = guest.from.union(&from);
                    guest.rules.insert((line, text.clone()));
                }
            }
        }
    }
}

/// The user's other devices, if `who` means the user.
fn own_devices(names: &Names<'_>, node: &Node, who: &Selector) -> Result<Addresses, String> {
    match names.means(who, &Node { addresses: Vec::new(), ..node.clone() }, false) {
        Holds::No => Ok(Addresses::default()),
        Holds::Unknown(why) => Err(why),
        Holds::Yes => names.addresses(&Selector::User(node.user.clone().unwrap_or_default())),
    }
}

/// The ports of a target that are mirrored, and why others are not.
fn ports(target: &Target, wanted: &Wanted) -> (Vec<(Proto, u16)>, Option<String>) {
    let reach = &target.reach;
    let count: usize = reach.ports.iter().map(|range| usize::from(range.end() - range.start()) + 1).sum();
    if count <= PORTS_MAX {
        let protos = Proto::ALL.into_iter().filter(|proto| reach.speaks(*proto));
        let all = protos.flat_map(|proto| {
            reach.ports.iter().cloned().flatten().filter(|port| *port != 0).map(move |port| (proto, port))
        });
        return (all.collect(), None);
    }
    let served = wanted.ports.iter().map(|(proto, port)| (*proto, port.get()));
    let served: Vec<(Proto, u16)> = served.filter(|port| reach.has(*port)).collect();
    let dropped = wanted.ports.is_empty().then(|| {
        format!("{count} ports are no list of services: say with --ports which of them this node serves")
    });
    (served, dropped)
}

/// What the written policy says of itself, beside the rules.
#[derive(Clone, Debug)]
pub struct Heading<'a> {
    /// Of the policy file that was read.
    pub file: &'a str,
    /// A name that `[node] name` takes.
    pub name: &'a str,
    /// The file by which tags and users were turned into addresses.
    pub status: Option<&'a str>,
}

impl Mirror {
    /// Our policy. The same input gives the same text.
    pub fn policy(&self, node: &Node, wanted: &Wanted, heading: &Heading<'_>) -> String {
        let mut out = String::new();
        let whose = if node.tags.is_empty() {
            node.user.as_ref().map_or("this node".to_owned(), |user| format!("a device of {user}"))
        } else {
            node.tags.join(", ")
        };
        let file = printable(heading.file, 200);
        comment(&mut out, &format!("What {file} lets into {whose}: `spokeguard policy import tailscale`."));
        if let Some(status) = heading.status {
            let status = printable(status, 200);
            comment(
                &mut out,
                &format!("Tags and users are addresses as of {status}: import again when devices change."),
            );
        }
        let _ = writeln!(out, "version = 1\n\n[node]\nname = {}\nrole = \"device\"\n", quoted(heading.name));
        let _ = writeln!(out, "[mesh]\nkind = \"tailscale\"");
        if !node.addresses.is_empty() {
            let _ = writeln!(out, "address = [{}]", list(node.addresses.iter()));
        }
        let _ = writeln!(out, "\n[ssh]\nport = {}", wanted.ssh);
        let ssh = (Proto::Tcp, wanted.ssh.get());
        // Rules without a protocol mean UDP as well, and there is no such thing for ssh.
        let no_ssh = |port: &(Proto, u16)| {
            port.1 != ssh.1 || (port.0 == Proto::Udp && !self.allowed.contains_key(&ssh))
        };
        match self.allowed.get(&ssh) {
            Some(guest) => self.guest(&mut out, guest),
            None => {
                comment(
                    &mut out,
                    &format!(
                        "No rule lets anybody to tcp {} here. Say who may administer this node,",
                        wanted.ssh
                    ),
                );
                comment(
                    &mut out,
                    "or set allow_no_admin_path = true in [enforce] (Tailscale SSH needs no rule).",
                );
                out.push_str("bind = [\"127.0.0.1\"]\nfrom = [\"127.0.0.1/32\"]\n");
            }
        }
        let mut services: BTreeMap<&Addresses, [Vec<u16>; 2]> = BTreeMap::new();
        for ((proto, port), guest) in self.allowed.iter().filter(|(port, _)| no_ssh(port)) {
            services.entry(&guest.from).or_default()[usize::from(*proto == Proto::Udp)].push(*port);
        }
        let mut services: Vec<_> = services.into_iter().collect();
        services.sort_by_key(|(_, [tcp, udp])| (tcp.first().or(udp.first()).copied(), tcp.is_empty()));
        for (from, [tcp, udp]) in services {
            let _ = writeln!(out, "\n[[mesh.service]]\nname = {}", quoted(&name(&tcp, &udp)));
            for (key, ports) in [("tcp", &tcp), ("udp", &udp)].iter().filter(|(_, ports)| !ports.is_empty()) {
                let _ = writeln!(out, "{key} = {ports:?}");
            }
            let mine = self.allowed.iter().filter(|((proto, port), _)| {
                if *proto == Proto::Tcp { tcp.contains(port) } else { udp.contains(port) }
            });
            let rules = mine.flat_map(|(_, guest)| guest.rules.iter().cloned()).collect();
            self.guest(&mut out, &Guest { from: from.clone(), rules });
        }
        if !self.left_out.is_empty() {
            out.push_str("\n# Left out, because it can't be said with certainty here:\n");
            for LeftOut { line, what, why } in &self.left_out {
                comment(&mut out, &format!("line {line}: {what}: {why}"));
            }
        }
        if !self.notes.is_empty() {
            out.push('\n');
            for (line, text) in &self.notes {
                comment(&mut out, &format!("line {line}: {text}"));
            }
        }
        out
    }

    fn guest(&self, out: &mut String, guest: &Guest) {
        for (line, text) in &guest.rules {
            comment(out, &format!("line {line}: {text}"));
        }
        if guest.from == tailnet() {
            out.push_str("from = \"mesh\"\n");
        } else {
            let _ = writeln!(out, "from = [{}]", list(guest.from.prefixes().iter()));
        }
    }
}

/// As ports tell it, so that it stays when lines of the file move.
fn name(tcp: &[u16], udp: &[u16]) -> String {
    let (kind, ports) = match (tcp, udp) {
        (tcp, udp) if tcp == udp => ("port", tcp),
        (tcp, []) => ("tcp", tcp),
        ([], udp) => ("udp", udp),
        (tcp, _) => ("mixed", tcp),
    };
    match ports {
        [first, .., last] if ports.len() > 3 => format!("{kind}-{first}-to-{last}"),
        ports => ports.iter().fold(kind.to_owned(), |name, port| format!("{name}-{port}")),
    }
}

fn list<T: ToString>(all: impl Iterator<Item = T>) -> String {
    all.map(|one| quoted(&one.to_string())).collect::<Vec<_>>().join(", ")
}

fn quoted(text: &str) -> String {
    toml::Value::String(text.to_owned()).to_string()
}

/// One comment, wrapped; the text is made harmless and can't leave it.
fn comment(out: &mut String, text: &str) {
    let text = printable(text, 2000);
    let mut column = 0;
    for word in text.split(' ') {
        let length = word.chars().count();
        if column > 0 && column + 1 + length > WIDTH {
            out.push('\n');
            column = 0;
        }
        out.push_str(if column == 0 { "# " } else { " " });
        out.push_str(word);
        column += length + if column == 0 { 2 } else { 1 };
    }
    out.push('\n');
}
