//! The tunnel: its interface and addresses, its peers, and whether it is alive.

use super::sight::{Sight, is_link_local};
use super::{Assessment, Code, Finding, Severity, lasting, listed};
use crate::observed::{Device, Link, Peer, Snapshot};
use crate::policy::{Hub, MeshKind, Policy, Role};
use std::net::{IpAddr, SocketAddr};

pub(super) fn compare(sight: &Sight, snapshot: &Snapshot, out: &mut Assessment) {
    if let Some(links) = snapshot.links.seen() {
        interface(sight, links, out);
    }
    if sight.policy.mesh.kind == MeshKind::Wireguard {
        match snapshot.wireguard.seen() {
            Some(Some(device)) => tunnel(sight, device, out),
            Some(None) if sight.link(&sight.policy.mesh.interface).is_some_and(|l| l.up) => {
                missing(sight.policy, "the interface is there, but it is no WireGuard device", out);
            }
            Some(None) | None => {}
        }
    }
}

/// Peers whose keepalive is not as the policy says.
pub(crate) fn wrong_keepalive<'a>(policy: &Policy, device: &'a Device) -> Vec<&'a Peer> {
    let Some(wanted) = keepalive_s(policy) else { return Vec::new() };
    watched(policy, device).into_iter().filter(|peer| peer.keepalive != wanted).collect()
}

/// The keepalive that the policy asks for, in seconds.
pub(crate) fn keepalive_s(policy: &Policy) -> Option<u16> {
    let wanted = policy.mesh.keepalive?;
    Some(u16::try_from(wanted.as_secs()).unwrap_or(u16::MAX))
}

fn missing(policy: &Policy, found: &str, out: &mut Assessment) {
    let name = &policy.mesh.interface;
    let next = match policy.mesh.kind {
        MeshKind::Wireguard => {
            format!("Bring it up (`wg-quick up {name}`, or what your system uses), and see why it went.")
        }
        MeshKind::Tailscale => "Start tailscaled and log in with `tailscale up`.".to_owned(),
    };
    let subject = format!("interface {name}");
    out.add(Finding::new(Code::MeshMissing, Severity::High, subject, "there and up", found, next));
}

fn interface(sight: &Sight, links: &[Link], out: &mut Assessment) {
    let policy = sight.policy;
    let mesh = &policy.mesh;
    let Some(link) = sight.link(&mesh.interface) else {
        return missing(policy, "there is no such interface", out);
    };
    if !link.up {
        missing(policy, "the interface is down", out);
    }
    let has = |address: &IpAddr| link.addresses.iter().any(|net| net.addr() == *address);
    for address in mesh.address.iter().filter(|a| !has(a)) {
        let elsewhere = links.iter().find(|l| l.addresses.iter().any(|net| net.addr() == *address));
        let others: Vec<String> = link.addresses.iter().map(|net| net.addr().to_string()).collect();
        let found = match (elsewhere, others.as_slice()) {
            (Some(other), _) => format!("it is on {}", other.name),
            (None, []) => format!("{} has no address", link.name),
            (None, others) => format!("{} has {}", link.name, listed(others, 3)),
        };
        out.add(Finding::new(
            Code::MeshAddress,
            Severity::High,
            format!("address {address}"),
            format!("on {}", mesh.interface),
            found,
            format!("Give {} the address (`ip address add`), or correct [mesh] address.", mesh.interface),
        ));
    }
    if mesh.address.is_empty() && link.up && link.addresses.iter().all(|net| is_link_local(net.addr())) {
        out.add(Finding::new(
            Code::MeshAddress,
            Severity::High,
            format!("interface {}", mesh.interface),
            "a mesh address",
            format!("{} has no address", link.name),
            "Log in with `tailscale up`, and see `tailscale status`.",
        ));
    }
}

fn tunnel(sight: &Sight, device: &Device, out: &mut Assessment) {
    let policy = sight.policy;
    let hub = policy.mesh.hub.as_ref().filter(|_| policy.node.role != Role::Hub);
    keepalive(policy, device, out);
    handshakes(sight, device, out);
    if let Some(hub) = hub {
        hub_peer(policy, hub, device, out);
    }
}

fn keepalive(policy: &Policy, device: &Device, out: &mut Assessment) {
    let seconds = |s: u16| if s == 0 { "off".to_owned() } else { format!("{s} s") };
    let Some(wanted) = keepalive_s(policy) else { return };
    for peer in wrong_keepalive(policy, device) {
        let next = if policy.enforce.keepalive {
            "The daemon sets it again; put `PersistentKeepalive` in the tunnel's configuration so that it \
             stays."
                .to_owned()
        } else {
            let (name, key) = (&device.name, peer.public_key);
            format!("Set it with `wg set {name} peer {key} persistent-keepalive {wanted}`.")
        };
        out.add(Finding::new(
            Code::MeshKeepalive,
            Severity::Medium,
            name(policy, peer),
            format!("keepalive {}", seconds(wanted)),
            format!("keepalive {}", seconds(peer.keepalive)),
            next,
        ));
    }
}

fn handshakes(sight: &Sight, device: &Device, out: &mut Assessment) {
    let policy = sight.policy;
    let oldest = policy.mesh.handshake_max_age.as_secs();
    for peer in watched(policy, device) {
        let (severity, found) = match peer.last_handshake {
            None if policy.node.role == Role::Hub => (Severity::Medium, "never".to_owned()),
            None => (Severity::High, "never".to_owned()),
            Some(last) => match sight.now.seconds_since(last) {
                age if age > oldest => (Severity::Medium, format!("{} ago", lasting(age))),
                _ => continue,
            },
        };
        let endpoint = peer.endpoint.map_or("no endpoint known".to_owned(), |e| format!("endpoint {e}"));
        let next = match policy.node.role {
            Role::Hub => "See whether that node is up; if it is, whether its UDP packets reach this hub.",
            Role::Spoke | Role::Device => {
                "See whether the hub is up, whether its UDP port is open, and whether both have each \
                 other's key."
            }
        };
        out.add(Finding::new(
            Code::MeshHandshake,
            severity,
            name(policy, peer),
            format!("a handshake in the last {}", lasting(oldest)),
            format!("last handshake: {found} ({endpoint})"),
            next,
        ));
    }
}

fn hub_peer(policy: &Policy, hub: &Hub, device: &Device, out: &mut Assessment) {
    let carries = |peer: &Peer, address: &IpAddr| peer.allowed.iter().any(|net| net.contains(address));
    let restore = "Put the hub's peer section of the tunnel's configuration right, and load it again.";
    let mut differs = |severity, subject: String, wanted: String, found: String, next: &str| {
        out.add(Finding::new(Code::MeshPeer, severity, subject, wanted, found, next));
    };
    let Some(peer) = hub_of(policy, device) else {
        let (wanted, found) = match (hub.public_key, device.peers.len()) {
            (Some(key), 0) => (format!("a peer with key {key}"), "there are no peers".to_owned()),
            (Some(key), n) => (format!("a peer with key {key}"), format!("none of {n} peers has it")),
            (None, 0) => (format!("a peer for {}", listed(&hub.address, 2)), "there are no peers".to_owned()),
            (None, n) => (
                format!("a peer for {}", listed(&hub.address, 2)),
                format!("none of {n} peers has it in its allowed IPs"),
            ),
        };
        return differs(Severity::High, "peer hub".to_owned(), wanted, found, restore);
    };
    let lost: Vec<&IpAddr> = hub.address.iter().filter(|address| !carries(peer, address)).collect();
    if !lost.is_empty() {
        let found = match peer.allowed.as_slice() {
            [] => "no allowed IPs".to_owned(),
            allowed => format!("allowed IPs {}", listed(allowed, 4)),
        };
        let wanted = format!("{} in its allowed IPs", listed(&lost, 2));
        differs(Severity::High, "peer hub".to_owned(), wanted, found, restore);
    }
    if policy.node.role == Role::Spoke && hub.public_key.is_some() {
        for extra in device.peers.iter().filter(|p| p.public_key != peer.public_key) {
            let found = format!(
                "a peer that the policy does not name, with allowed IPs {}",
                listed(&extra.allowed, 4)
            );
            let next =
                "Remove the peer, or find out who added it: it reaches this node through the mesh interface.";
            differs(
                Severity::Medium,
                name(policy, extra),
                "the hub as the only peer".to_owned(),
                found,
                next,
            );
        }
    }
    if let Some(wanted) = hub.endpoint {
        let plain = |e: SocketAddr| SocketAddr::new(e.ip().to_canonical(), e.port());
        if peer.endpoint.map(plain) != Some(plain(wanted)) {
            out.add(Finding::new(
                Code::MeshEndpoint,
                Severity::Low,
                "peer hub",
                format!("endpoint {wanted}"),
                peer.endpoint.map_or("no endpoint".to_owned(), |e| format!("endpoint {e}")),
                "If the hub moved, change [mesh.hub] endpoint; else set the peer's endpoint back with `wg \
                 set`.",
            ));
        }
    }
}

/// The hub among the peers: by its key, or by its address where the policy gives no key.
fn hub_of<'a>(policy: &Policy, device: &'a Device) -> Option<&'a Peer> {
    let hub = policy.mesh.hub.as_ref()?;
    device.peers.iter().find(|peer| match hub.public_key {
        Some(key) => peer.public_key == key,
        None => hub.address.iter().any(|a| peer.allowed.iter().any(|net| net.contains(a))),
    })
}

/// The peers that this node must keep alive: all of them on a hub, else the hub; all, too,
/// where the policy does not say by key who the hub is.
fn watched<'a>(policy: &Policy, device: &'a Device) -> Vec<&'a Peer> {
    let key = policy.mesh.hub.as_ref().and_then(|hub| hub.public_key);
    match (policy.node.role, key) {
        (Role::Spoke | Role::Device, Some(key)) => {
            device.peers.iter().filter(|p| p.public_key == key).collect()
        }
        _ => device.peers.iter().collect(),
    }
}

/// "peer hub", or "peer xTIBA5rboUvn…": the start of a key tells peers apart, the whole
/// would fill the line.
fn name(policy: &Policy, peer: &Peer) -> String {
    let hub = policy.mesh.hub.as_ref().and_then(|hub| hub.public_key);
    if policy.node.role != Role::Hub && hub == Some(peer.public_key) {
        return "peer hub".to_owned();
    }
    let key = peer.public_key.to_string();
    format!("peer {}…", &key[..12])
}

#[cfg(test)]
mod tests {
    use expect_test::{Expect, expect};

    use crate::diff::stage::*;
    use crate::observed::{Facet, Reading};
    use crate::policy::{MeshKind, Role};
    use crate::terms::{PublicKey, Stamp};

    fn check(stage: Stage, expected: Expect) {
        expected.assert_eq(&stage.show());
    }

    #[test]
    fn a_tunnel_that_is_gone_or_down_is_reported() {
        let gone = Stage::spoke().links(|links| links.retain(|l| l.name != "wg0"));
        check(
            gone,
            expect![[r#"
            high mesh-missing interface wg0
                wanted there and up
                found there is no such interface
        "#]],
        );
        let down = Stage::spoke().links(|links| links[2].up = false);
        assert_eq!(down.codes(), ["high mesh-missing interface wg0"]);
        let mut fake = Stage::spoke();
        fake.snapshot.wireguard = Reading::Seen(None);
        assert_eq!(fake.codes(), ["high mesh-missing interface wg0"]);
    }

    #[test]
    fn an_address_elsewhere_is_said_to_be_there() {
        let stage = Stage::spoke().links(|links| {
            let moved = links[2].addresses.remove(0);
            links[1].addresses.push(moved);
        });
        let findings = stage.assess().findings;
        let address = findings.iter().find(|f| f.code == crate::diff::Code::MeshAddress).expect("a finding");
        assert_eq!(
            (address.subject.as_str(), address.found.as_str()),
            ("address 10.84.0.16", "it is on eth0")
        );
    }

    #[test]
    fn a_keepalive_that_is_off_is_reported_for_the_hub() {
        let extra = |role| {
            Stage::spoke().policy(move |p| p.node.role = role).device(|d| {
                d.peers[0].keepalive = 0;
                d.peers.push(peer(PublicKey([9; 32]), &["10.84.0.77/32"]));
                d.peers[1].keepalive = 0;
                d.peers[1].last_handshake = None;
            })
        };
        check(
            extra(Role::Device),
            expect![[r#"
            medium mesh-keepalive peer hub
                wanted keepalive 25 s
                found keepalive off
        "#]],
        );
        check(
            extra(Role::Spoke),
            expect![[r#"
            medium mesh-keepalive peer hub
                wanted keepalive 25 s
                found keepalive off
            medium mesh-peer peer CQkJCQkJCQkJ…
                wanted the hub as the only peer
                found a peer that the policy does not name, with allowed IPs 10.84.0.77/32
        "#]],
        );
        let unnamed = extra(Role::Device).policy(|p| p.mesh.hub.as_mut().expect("a hub").public_key = None);
        let keepalive: Vec<String> =
            unnamed.codes().into_iter().filter(|line| line.contains("mesh-keepalive")).collect();
        assert_eq!(keepalive.len(), 2, "without a key every peer is watched: {keepalive:?}");
    }

    #[test]
    fn a_hub_watches_all_peers_and_asks_for_no_keepalive_by_itself() {
        let stage = Stage::spoke()
            .policy(|p| {
                p.node.role = Role::Hub;
                p.mesh.keepalive = None;
                // Its own section, as a file shared by the fleet has it: asks nothing of a hub.
                p.mesh.hub.as_mut().expect("a hub").endpoint = "192.0.2.1:1".parse().ok();
                p.ssh.from = crate::policy::Sources::Mesh;
            })
            .device(|d| {
                d.peers[0].keepalive = 0;
                d.peers.push(peer(PublicKey([9; 32]), &["10.84.0.77/32"]));
                d.peers[1].last_handshake = None;
            });
        check(
            stage,
            expect![[r#"
            medium mesh-handshake peer CQkJCQkJCQkJ…
                wanted a handshake in the last 3 min
                found last handshake: never (endpoint 203.0.113.47:51820)
        "#]],
        );
    }

    #[test]
    fn a_handshake_may_be_as_old_as_the_policy_says_and_no_older() {
        let aged = |seconds| {
            Stage::spoke().device(move |d| d.peers[0].last_handshake = Some(Stamp::from_unix(NOW - seconds)))
        };
        assert_eq!(aged(180).codes(), [""; 0]);
        assert_eq!(aged(-5000).codes(), [""; 0], "a clock set back is not an old handshake");
        check(
            aged(840),
            expect![[r#"
            medium mesh-handshake peer hub
                wanted a handshake in the last 3 min
                found last handshake: 14 min ago (endpoint 203.0.113.47:51820)
        "#]],
        );
        let never = Stage::spoke().device(|d| d.peers[0].last_handshake = None);
        assert_eq!(never.codes(), ["high mesh-handshake peer hub"]);
    }

    #[test]
    fn the_hub_must_be_a_peer_and_be_routed_to() {
        check(
            Stage::spoke().device(|d| d.peers[0].public_key = PublicKey([8; 32])),
            expect![[r#"
            high mesh-peer peer hub
                wanted a peer with key BwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwc=
                found none of 1 peers has it
        "#]],
        );
        check(
            Stage::spoke().device(|d| d.peers[0].allowed = vec![net("10.84.0.0/24")]),
            expect![[r#"
            high mesh-peer peer hub
                wanted fd84::1 in its allowed IPs
                found allowed IPs 10.84.0.0/24
        "#]],
        );
        let by_address = |allowed: &'static str| {
            Stage::spoke()
                .policy(|p| p.mesh.hub.as_mut().expect("a hub").public_key = None)
                .device(move |d| d.peers[0].allowed = vec![net(allowed), net("fd84::/64")])
        };
        assert_eq!(by_address("10.84.0.1/32").codes(), [""; 0]);
        assert_eq!(by_address("10.84.0.2/32").codes(), ["high mesh-peer peer hub"]);
    }

    #[test]
    fn an_endpoint_that_moved_is_worth_a_word() {
        check(
            Stage::spoke().device(|d| d.peers[0].endpoint = "198.51.100.9:51820".parse().ok()),
            expect![[r#"
                low mesh-endpoint peer hub
                    wanted endpoint 203.0.113.47:51820
                    found endpoint 198.51.100.9:51820
            "#]],
        );
        let mapped =
            Stage::spoke().device(|d| d.peers[0].endpoint = "[::ffff:203.0.113.47]:51820".parse().ok());
        assert_eq!(mapped.codes(), [""; 0]);
    }

    #[test]
    fn tailscale_needs_no_sight_of_wireguard() {
        let stage = || {
            Stage::spoke()
                .policy(|p| {
                    p.mesh.kind = MeshKind::Tailscale;
                    p.mesh.keepalive = None;
                    p.mesh.address.clear();
                })
                .blind(Facet::Wireguard)
        };
        assert_eq!(stage().codes(), [""; 0]);
        let bare = stage().links(|links| links[2].addresses = vec![net("fe80::3/64")]);
        assert!(bare.codes().contains(&"high mesh-address interface wg0".to_owned()));
    }
}
