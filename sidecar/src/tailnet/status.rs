//! `tailscale status --json`: who the tags and users of a policy file are right now.

use std::collections::BTreeMap;
use std::net::IpAddr;

use serde::Deserialize;

use super::{Addresses, Selector};

/// This node and the peers that it knows: those that may reach it, or that it may reach.
#[derive(Clone, Debug, Default)]
pub struct Status {
    pub own: Option<Peer>,
    pub peers: Vec<Peer>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Peer {
    pub name: String,
    pub addresses: Vec<IpAddr>,
    /// As `tag:server`. A tagged node belongs to no user.
    pub tags: Vec<String>,
    /// Login name of its owner.
    pub user: Option<String>,
    /// Shared into this tailnet from another one.
    pub foreign: bool,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct RawStatus {
    #[serde(rename = "Self")]
    own: Option<RawPeer>,
    #[serde(default)]
    peer: Option<BTreeMap<String, RawPeer>>,
    #[serde(default)]
    user: Option<BTreeMap<String, RawUser>>,
}

#[derive(Deserialize)]
struct RawPeer {
    #[serde(rename = "HostName", default)]
    name: String,
    #[serde(rename = "TailscaleIPs", default)]
    addresses: Option<Vec<IpAddr>>,
    #[serde(rename = "Tags", default)]
    tags: Option<Vec<String>>,
    #[serde(rename = "UserID", default)]
    user: i64,
    #[serde(rename = "ShareeNode", default)]
    foreign: bool,
}

#[derive(Deserialize)]
struct RawUser {
    #[serde(rename = "LoginName", default)]
    login: String,
}

impl Status {
    pub fn from_json(text: &str) -> Result<Self, serde_json::Error> {
        let raw: RawStatus = serde_json::from_str(text)?;
        let users = raw.user.unwrap_or_default();
        let peer = |raw: RawPeer| {
            let tags = raw.tags.unwrap_or_default();
            let login = users.get(&raw.user.to_string()).map(|user| user.login.clone());
            Peer {
                name: raw.name,
                addresses: raw.addresses.unwrap_or_default(),
                user: login.filter(|login| !login.is_empty() && tags.is_empty()),
                tags,
                foreign: raw.foreign,
            }
        };
        Ok(Self {
            own: raw.own.map(peer),
            peers: raw.peer.unwrap_or_default().into_values().map(peer).collect(),
        })
    }

    /// Addresses of the peers that this holds for.
    pub fn addresses(&self, is: impl Fn(&Peer) -> bool) -> Addresses {
        self.peers.iter().filter(|peer| is(peer)).flat_map(|peer| peer.addresses.iter().copied()).collect()
    }

    /// Whoever has this address.
    pub fn holder(&self, address: IpAddr) -> Option<&Peer> {
        self.peers.iter().chain(&self.own).find(|peer| peer.addresses.contains(&address))
    }
}

impl Peer {
    pub fn is_member(&self) -> bool {
        self.tags.is_empty() && !self.foreign
    }

    pub fn is(&self, selector: &Selector) -> bool {
        match selector {
            Selector::Tag(tag) => self.tags.contains(tag),
            Selector::User(user) => self.user.as_ref().is_some_and(|own| is_user(user, own)),
            _ => false,
        }
    }
}

/// Whether a selector of users means this login; `*@example.com` is everybody of that domain.
pub(super) fn is_user(selector: &str, login: &str) -> bool {
    match selector.strip_prefix('*') {
        Some(domain) => login
            .len()
            .checked_sub(domain.len())
            .and_then(|at| login.get(at..))
            .is_some_and(|end| end.eq_ignore_ascii_case(domain)),
        None => selector.eq_ignore_ascii_case(login),
    }
}
