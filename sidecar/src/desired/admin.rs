//! The proof that somebody gets in: from -> to -> port, or which key of the policy is at
//! fault that nobody does.

use std::net::IpAddr;

use ipnet::IpNet;

use super::AdminPath;
use crate::policy::{Bind, Policy, Role, Sources};
use crate::terms::Family;

/// By this policy nobody could administer the node.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{key}: {reason}; {remedy}, or set allow_no_admin_path = true in [enforce]")]
pub struct NoAdminPath {
    /// The key at fault, as in the policy file: "ssh.from".
    pub key: &'static str,
    /// Why nobody gets in.
    pub reason: String,
    /// What to write instead.
    pub remedy: String,
}

impl NoAdminPath {
    fn new(key: &'static str, reason: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { key, reason: reason.into(), remedy: remedy.into() }
    }
}

/// Who reaches sshd, at which address of this node. Only sources and addresses that can
/// meet count: of one family, and both in the mesh or both outside of it.
pub fn admin_path(policy: &Policy) -> Result<AdminPath, NoAdminPath> {
    let sources = sources(policy)?;
    let (to, within) = targets(policy)?;
    let listed = matches!(policy.ssh.from, Sources::Prefixes(_));
    let meets = |source: &IpNet, address: IpAddr| {
        // To an address outside of the mesh one comes through the internet, where no
        // source is a mesh address: only a list can name who does.
        let reachable =
            if in_mesh(policy, address) { !listed || touches_mesh(policy, source) } else { listed };
        reachable && Family::of(address) == Family::of_net(source)
    };
    let mesh_only = !within.is_empty() || to.iter().all(|&address| in_mesh(policy, address));
    let from: Vec<IpNet> = sources
        .into_iter()
        .filter(|source| {
            to.iter().any(|&address| meets(source, address)) || within.iter().any(|net| overlap(net, source))
        })
        .collect();
    if from.is_empty() {
        return Err(nobody(policy, mesh_only));
    }
    hub_included(policy, &from, mesh_only)?;
    Ok(AdminPath { from, to, within, port: policy.ssh.port })
}

fn sources(policy: &Policy) -> Result<Vec<IpNet>, NoAdminPath> {
    let list = policy.ssh.from.prefixes(&policy.mesh);
    match (&policy.ssh.from, list.is_empty()) {
        (_, false) => Ok(list),
        (Sources::Hub, true) => Err(NoAdminPath::new(
            "ssh.from",
            "\"hub\" may reach sshd, but the policy names no hub",
            "give [mesh.hub] an address, or list in ssh.from who administers this node",
        )),
        (Sources::Mesh, true) => Err(NoAdminPath::new(
            "mesh.prefix",
            "the mesh may reach sshd, but its prefix is empty",
            "write the mesh's prefix",
        )),
        (Sources::Prefixes(_), true) => Err(NoAdminPath::new(
            "ssh.from",
            "the list is empty, so nobody may reach sshd",
            "write \"hub\", \"mesh\" or the prefixes that administer this node",
        )),
    }
}

/// The addresses where sshd can be reached from elsewhere, or the prefixes that hold one
/// we do not know.
fn targets(policy: &Policy) -> Result<(Vec<IpAddr>, Vec<IpNet>), NoAdminPath> {
    match &policy.ssh.bind {
        Bind::Mesh if !policy.mesh.address.is_empty() => Ok((policy.mesh.address.clone(), Vec::new())),
        Bind::Mesh => match (policy.mesh.kind, policy.mesh.prefix.is_empty()) {
            (crate::policy::MeshKind::Tailscale, false) => Ok((Vec::new(), policy.mesh.prefix.clone())),
            _ => Err(NoAdminPath::new(
                "mesh.address",
                "sshd binds the mesh address, but this node has none",
                "write this node's mesh address",
            )),
        },
        Bind::Addresses(list) => {
            let reachable: Vec<IpAddr> =
                list.iter().copied().filter(|address| !address.is_loopback()).collect();
            if reachable.is_empty() {
                return Err(NoAdminPath::new(
                    "ssh.bind",
                    "no address in it can be reached from another machine",
                    "write \"mesh\" or an address of this node",
                ));
            }
            Ok((reachable, Vec::new()))
        }
    }
}

fn nobody(policy: &Policy, mesh_only: bool) -> NoAdminPath {
    match &policy.ssh.from {
        Sources::Hub | Sources::Mesh if !mesh_only => NoAdminPath::new(
            "ssh.bind",
            "sshd binds no mesh address, but only the mesh may reach it",
            "write ssh.bind = \"mesh\", or list in ssh.from the prefixes that administer this node",
        ),
        Sources::Hub => NoAdminPath::new(
            "mesh.hub.address",
            "the hub has no mesh address of a family that this node has one of, so it can't reach sshd",
            "write a hub address of the same family as mesh.address",
        ),
        Sources::Mesh => NoAdminPath::new(
            "mesh.address",
            "no mesh address of this node is of a family that the mesh prefix has, so nobody can reach sshd",
            "write a mesh address inside mesh.prefix",
        ),
        Sources::Prefixes(_) => NoAdminPath::new(
            "ssh.from",
            "none of its prefixes can reach an address that sshd binds",
            "write \"hub\", \"mesh\" or a prefix inside the mesh",
        ),
    }
}

/// A spoke is administered by its hub: a list that leaves the named hub out is a lock-out
/// in waiting, even where it lets somebody else in. A node whose sshd is bound outside of
/// the mesh on purpose is reached by other ways.
fn hub_included(policy: &Policy, from: &[IpNet], mesh_only: bool) -> Result<(), NoAdminPath> {
    let (Role::Spoke, Some(hub), true) = (policy.node.role, &policy.mesh.hub, mesh_only) else {
        return Ok(());
    };
    if hub.address.is_empty()
        || hub.address.iter().any(|address| from.iter().any(|net| net.contains(address)))
    {
        return Ok(());
    }
    let named = hub.address.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
    Err(NoAdminPath::new(
        "ssh.from",
        format!("the hub ({named}) is in none of its prefixes, so it can't administer this spoke"),
        format!("add {}", IpNet::from(hub.address[0])),
    ))
}

pub(super) fn in_mesh(policy: &Policy, address: IpAddr) -> bool {
    policy.mesh.address.contains(&address) || policy.mesh.prefix.iter().any(|net| net.contains(&address))
}

fn touches_mesh(policy: &Policy, source: &IpNet) -> bool {
    policy.mesh.prefix.iter().any(|net| overlap(net, source))
}

/// Prefixes overlap only if one holds the other.
fn overlap(a: &IpNet, b: &IpNet) -> bool {
    a.contains(b) || b.contains(a)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::desired::{Desired, samples};

    #[track_caller]
    fn refused(policy: &Policy, key: &str, part: &str) {
        let error = admin_path(policy).expect_err("a path was found");
        assert_eq!(error.key, key, "{error}");
        assert!(error.to_string().contains(part), "{error}");
        assert!(error.to_string().contains("allow_no_admin_path = true"), "{error}");
    }

    #[test]
    fn the_hub_reaches_the_mesh_address_of_a_spoke() {
        let path = admin_path(&samples::spoke()).expect("a path");
        assert_eq!(path.from(), [samples::net("10.84.0.1/32")]);
        assert_eq!(path.to(), [samples::ip("10.84.0.16")]);
        assert_eq!((path.port().get(), path.within().len()), (22, 0));
    }

    #[test]
    fn a_mesh_that_assigns_the_address_stands_for_it() {
        let path = admin_path(&samples::tailscale()).expect("a path");
        assert!(path.to().is_empty());
        assert_eq!(path.within(), samples::tailscale().mesh.prefix);
    }

    #[test]
    fn a_policy_by_which_nobody_gets_in_names_the_key() {
        let mut policy = samples::spoke();
        policy.mesh.hub = None;
        refused(&policy, "ssh.from", "names no hub");

        let mut policy = samples::spoke();
        policy.ssh.from = Sources::Prefixes(vec![samples::net("10.84.0.9/32")]);
        refused(&policy, "ssh.from", "add 10.84.0.1/32");
        policy.node.role = Role::Device;
        assert!(admin_path(&policy).is_ok(), "only a spoke is bound to its hub");

        let mut policy = samples::spoke();
        policy.ssh.from = Sources::Prefixes(vec![samples::net("198.51.100.0/24")]);
        refused(&policy, "ssh.from", "none of its prefixes");

        let mut policy = samples::spoke();
        policy.ssh.bind = Bind::Addresses(vec![samples::ip("127.0.0.1")]);
        refused(&policy, "ssh.bind", "another machine");

        let mut policy = samples::spoke();
        policy.ssh.bind = Bind::Addresses(vec![samples::ip("198.51.100.7")]);
        refused(&policy, "ssh.bind", "binds no mesh address");
        policy.ssh.from = Sources::Prefixes(vec![samples::net("203.0.113.0/24")]);
        assert_eq!(admin_path(&policy).expect("a path").from(), [samples::net("203.0.113.0/24")]);

        let mut policy = samples::spoke();
        policy.mesh.address.clear();
        refused(&policy, "mesh.address", "has none");

        let mut policy = samples::spoke();
        policy.mesh.hub.as_mut().expect("a hub").address = vec![samples::ip("fd00::1")];
        refused(&policy, "mesh.hub.address", "family");
    }

    #[test]
    fn only_a_policy_that_says_so_goes_without_a_path() {
        let mut policy = samples::spoke();
        policy.mesh.hub = None;
        let error = Desired::new(policy.clone(), samples::TODAY).expect_err("was accepted");
        assert_eq!(error.key, "ssh.from");
        policy.enforce.allow_no_admin_path = true;
        assert_eq!(Desired::new(policy, samples::TODAY).expect("accepted").admin, None);
    }
}
