//! The packet filter that a tailnet's control server compiled for this node, against the
//! policy: where it lets in more, the tailnet's policy file and ours have parted. Our table
//! refuses what it lets in too much, so that this is worth knowing, and no more than that,
//! for as long as the table does.

use std::collections::BTreeSet;

use super::sight::Sight;
use super::{Assessment, Code, Finding, Severity, listed};
use crate::observed::{FilterRule, MeshFilter, Tailscaled};
use crate::policy::Mode;
use crate::terms::{Addresses, Proto, Scope};

/// Ranges of ports that are named.
const NAMED_MAX: usize = 4;

pub(super) fn compare(sight: &Sight, found: &Tailscaled, out: &mut Assessment) {
    let (text, next) = match &found.filter {
        MeshFilter::NotOffered => return,
        MeshFilter::Unread(why) => (
            format!("it can't be compared: {why}"),
            "Compare it by hand: `spokeguard policy import tailscale FILE --netmap FILE`.",
        ),
        MeshFilter::Rules(rules) => match wider(sight, found, rules) {
            wider if wider.is_empty() => return,
            wider => (
                format!("it lets in {}", listed(&wider, NAMED_MAX)),
                "Narrow the tailnet's policy file, or open these ports in [[mesh.service]].",
            ),
        },
    };
    let refused = sight.desired.table.is_some() && sight.policy.enforce.mode == Mode::Enforce;
    let unread = matches!(found.filter, MeshFilter::Unread(_));
    let severity = if refused || unread { Severity::Info } else { Severity::Medium };
    let wanted = "no more than the policy opens to the mesh";
    out.add(Finding::new(Code::MeshFilter, severity, "tailscale packet filter", wanted, text, next));
}

/// Whom it lets to ports that are not open to all of them, neighbours together: "tcp 23-79 from 100.64.0.0/10".
fn wider(sight: &Sight, found: &Tailscaled, rules: &[FilterRule]) -> Vec<String> {
    // Nobody else comes through the tunnel.
    let mesh: Addresses = sight.policy.mesh.prefix.iter().copied().collect();
    let own: Vec<_> = found.addresses.iter().chain(&sight.policy.mesh.address).collect();
    let here: Vec<&FilterRule> =
        rules.iter().filter(|rule| own.iter().any(|own| rule.to.contains(**own))).collect();
    let open = |proto: Proto, port: u16| {
        let services = sight.desired.services.iter();
        let here = services.filter(|s| s.proto == proto && s.port.get() == port);
        let here = here.filter(|s| s.scope == Scope::Mesh || s.is_everywhere());
        here.fold(Addresses::default(), |sum, service| match &service.from {
            None => sum.union(&mesh),
            Some(from) => sum.union(&from.iter().copied().collect()),
        })
    };
    let mut out: Vec<(Proto, u16, u16, Addresses)> = Vec::new();
    for proto in Proto::ALL {
        let rules: Vec<&&FilterRule> = here.iter().filter(|rule| rule.protos.contains(&proto)).collect();
        let services = sight.desired.services.iter().filter(|s| s.proto == proto).map(|s| s.port.get());
        let mut starts: BTreeSet<u16> = services.flat_map(|port| [port, port.saturating_add(1)]).collect();
        starts.extend(rules.iter().flat_map(|rule| [rule.ports.0.max(1), rule.ports.1.saturating_add(1)]));
        let starts: Vec<u16> = starts.into_iter().collect();
        for (at, first) in starts.iter().enumerate() {
            let last = starts.get(at + 1).map_or(u16::MAX, |next| next - 1);
            let from = rules.iter().filter(|rule| (rule.ports.0..=rule.ports.1).contains(first));
            let let_in = from.fold(Addresses::default(), |sum, rule| sum.union(&rule.from));
            let let_in = let_in.within(&mesh);
            match out.last_mut() {
                _ if let_in.without(&open(proto, *first)).is_empty() => {}
                Some((known, _, end, from))
                    if *known == proto && end.checked_add(1) == Some(*first) && *from == let_in =>
                {
                    *end = last;
                }
                _ => out.push((proto, *first, last, let_in)),
            }
        }
    }
    let ports = |first: u16, last: u16| match first == last {
        true => first.to_string(),
        false => format!("{first}-{last}"),
    };
    out.iter()
        .map(|(proto, first, last, from)| format!("{proto} {} from {from}", ports(*first, *last)))
        .collect()
}
