//! The file's own tests, against how its rules are understood here and against the mirror.

use serde::Serialize;

use super::names::{Holds, Names};
use super::{Access, Addresses, Aim, Mirror, Node, Selector, Status};
use crate::terms::Proto;

/// One line of one test.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Trial {
    pub line: u32,
    /// "alice@example.com -> tag:server:22".
    pub what: String,
    /// What the test asks for: `true` accept, `false` deny.
    pub accept: bool,
    pub outcome: Outcome,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    Passed,
    /// What was found instead.
    Failed(String),
    /// Why it could not be told.
    Unclear(String),
}

/// Runs them all, in the order of the file.
pub fn trials(access: &Access, mirror: &Mirror, node: &Node, status: Option<&Status>) -> Vec<Trial> {
    let names = Names { access, status };
    let each = access.tests.iter().flat_map(|test| test.aims.iter().map(move |aim| (test, aim)));
    each.map(|(test, aim)| {
        let ports: Vec<String> = aim.reach.ports.iter().map(|range| range.start().to_string()).collect();
        Trial {
            line: aim.line,
            what: format!("{} -> {}:{}", test.src, aim.to, ports.join(",")),
            accept: aim.accept,
            outcome: outcome(&names, mirror, node, &test.src, aim),
        }
    })
    .collect()
}

fn outcome(names: &Names<'_>, mirror: &Mirror, node: &Node, src: &Selector, aim: &Aim) -> Outcome {
    let (from, to) = match (devices(names, src), devices(names, &aim.to)) {
        (Ok(from), Ok(to)) => (from, to),
        (Err(why), _) | (_, Err(why)) => return Outcome::Unclear(why),
    };
    let mut unclear = None;
    let ports = Proto::ALL
        .into_iter()
        .filter(|proto| aim.reach.speaks(*proto))
        .flat_map(|proto| aim.reach.ports.iter().map(move |range| (proto, *range.start())));
    for port in ports {
        for (from, to) in from.iter().flat_map(|from| to.iter().map(move |to| (from, to))) {
            let rules = names.access.rules.iter();
            let found = rules.fold(Holds::No, |sum, rule| sum.or(|| names.allows(rule, from, to, port)));
            match (found, aim.accept) {
                (Holds::Unknown(why), _) => unclear = Some(why),
                (Holds::Yes, false) => return Outcome::Failed("a rule accepts it".into()),
                (Holds::No, true) => return Outcome::Failed("no rule accepts it".into()),
                _ => {}
            }
        }
        let here = names.means(&aim.to, node, true) == Holds::Yes;
        if here
            && let Ok(sources) = names.addresses(src)
            && !sources.is_empty()
        {
            let nobody = Addresses::default();
            let allowed = mirror.allowed.get(&port).map_or(&nobody, |guest| &guest.from);
            if !aim.accept && sources.touches(allowed) {
                return Outcome::Failed("the mirrored policy lets it in".into());
            }
            let families = names.families(&aim.to, node);
            if aim.accept && unclear.is_none() && !sources.only(&families).without(allowed).is_empty() {
                return Outcome::Failed("the mirrored policy leaves it out".into());
            }
        }
    }
    unclear.map_or(Outcome::Passed, Outcome::Unclear)
}

/// The devices that a test names: what holds, must hold for each.
fn devices(names: &Names<'_>, who: &Selector) -> Result<Vec<Node>, String> {
    let addresses = || -> Vec<std::net::IpAddr> {
        let of = |peer: &&super::Peer| peer.is(who);
        let peers = names.status.into_iter().flat_map(|status| status.peers.iter().chain(&status.own));
        peers.filter(of).flat_map(|peer| peer.addresses.clone()).collect()
    };
    Ok(match who {
        Selector::Tag(tag) => {
            vec![Node { tags: vec![tag.clone()], addresses: addresses(), ..Node::default() }]
        }
        Selector::User(user) => {
            vec![Node { user: Some(user.clone()), addresses: addresses(), ..Node::default() }]
        }
        Selector::Group(name) => {
            let members = names.access.groups.get(name).into_iter().flatten();
            members.map(|user| Node { user: Some(user.clone()), ..Node::default() }).collect()
        }
        Selector::Auto(name) if name == "autogroup:member" => {
            vec![Node { anybody: true, ..Node::default() }]
        }
        Selector::Net(_) | Selector::Host(_) => {
            let first = names.addresses(who)?.prefixes().first().map(|net| net.addr());
            vec![Node { addresses: first.into_iter().collect(), bare: true, ..Node::default() }]
        }
        other => return Err(format!("{other} names no device")),
    })
}
