//! What the operator declares. [`Policy`] is the validated value that everything
//! downstream starts from; `load` makes it from a file, reporting every mistake at once.

mod check;
mod load;
pub(crate) mod mistake;
pub(crate) mod read;
mod show;
#[cfg(test)]
mod tests;

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::terms::{IfacePattern, Port, Proto, PublicKey};

pub(crate) use load::expired;
pub use load::{BYTES_MAX, LoadError, Loaded, Note, NoteKind, load, parse, read_text};
pub(crate) use mistake::Source;
pub use mistake::{MISTAKES_MAX, Mistake, Mistakes};
pub use read::tailscale_prefixes;
pub use show::{fingerprint, show, sum};

/// A policy that has been parsed and checked. Every default is filled in.
#[derive(Clone, Debug, PartialEq)]
pub struct Policy {
    pub node: Node,
    pub mesh: Mesh,
    pub public: Public,
    pub ssh: Ssh,
    /// `[[mesh.service]]`, in the order of the file.
    pub services: Vec<MeshService>,
    /// `[[local]]`, in the order of the file.
    pub locals: Vec<Local>,
    /// `[[exception]]`, expired ones included: an expired exception grants nothing and
    /// is reported.
    pub exceptions: Vec<Exception>,
    /// `[[file]]`.
    pub files: Vec<FileRule>,
    pub enforce: Enforce,
    pub metrics: Metrics,
    pub heartbeat: Heartbeat,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    pub name: String,
    pub role: Role,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    Spoke,
    Hub,
    Device,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum MeshKind {
    Wireguard,
    Tailscale,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Mesh {
    pub kind: MeshKind,
    /// Default `wg0` or `tailscale0`.
    pub interface: String,
    /// This node's mesh addresses. May be empty for Tailscale, which assigns them.
    pub address: Vec<IpAddr>,
    pub prefix: Vec<IpNet>,
    /// Persistent keepalive that every peer must have; `None` where the policy does not
    /// say (Tailscale, or a hub: see the file's documentation). Whole seconds, 1..=65535.
    pub keepalive: Option<Duration>,
    pub handshake_max_age: Duration,
    /// The tunnel's own UDP port. On a hub it is open to the public.
    pub listen_port: Option<Port>,
    /// Tailscale tags that this node must have (`tag:server`); empty: any.
    pub tags: Vec<String>,
    /// tailscaled may serve ssh itself.
    pub tailscale_ssh: bool,
    pub hub: Option<Hub>,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Hub {
    /// The hub's mesh addresses (`address` takes one or a list).
    pub address: Vec<IpAddr>,
    pub public_key: Option<PublicKey>,
    pub endpoint: Option<SocketAddr>,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Public {
    pub tcp: Vec<Port>,
    pub udp: Vec<Port>,
    /// `None`: every interface but loopback, the mesh and the `[[local]]` ones.
    pub interfaces: Option<Vec<IfacePattern>>,
}

impl Public {
    pub fn ports(&self, proto: Proto) -> &[Port] {
        match proto {
            Proto::Tcp => &self.tcp,
            Proto::Udp => &self.udp,
        }
    }
}

#[derive(Clone, Debug, PartialEq)]
pub struct Ssh {
    pub port: Port,
    pub bind: Bind,
    pub rebind: bool,
    pub from: Sources,
}

#[derive(Clone, Debug, PartialEq)]
pub enum Bind {
    /// The mesh addresses of this node.
    Mesh,
    Addresses(Vec<IpAddr>),
}

/// Who may reach a mesh service.
#[derive(Clone, Debug, PartialEq)]
pub enum Sources {
    /// The hub's mesh addresses.
    Hub,
    /// The whole mesh prefix.
    Mesh,
    Prefixes(Vec<IpNet>),
}

impl Sources {
    /// The prefixes meant, given the mesh: host prefixes of the hub, the mesh's own, or
    /// the listed ones.
    pub fn prefixes(&self, mesh: &Mesh) -> Vec<IpNet> {
        match self {
            Sources::Hub => {
                mesh.hub.iter().flat_map(|hub| hub.address.iter().copied().map(IpNet::from)).collect()
            }
            Sources::Mesh => mesh.prefix.clone(),
            Sources::Prefixes(list) => list.clone(),
        }
    }
}

#[derive(Clone, Debug, PartialEq)]
pub struct MeshService {
    pub name: String,
    pub tcp: Vec<Port>,
    pub udp: Vec<Port>,
    pub from: Sources,
}

impl MeshService {
    pub fn ports(&self, proto: Proto) -> &[Port] {
        match proto {
            Proto::Tcp => &self.tcp,
            Proto::Udp => &self.udp,
        }
    }
}

#[derive(Clone, Debug, PartialEq)]
pub struct Local {
    pub name: String,
    pub interfaces: Vec<IfacePattern>,
    pub tcp: Vec<Port>,
    pub udp: Vec<Port>,
}

impl Local {
    pub fn ports(&self, proto: Proto) -> &[Port] {
        match proto {
            Proto::Tcp => &self.tcp,
            Proto::Udp => &self.udp,
        }
    }
}

#[derive(Clone, Debug, PartialEq)]
pub struct Exception {
    pub name: String,
    pub tcp: Vec<Port>,
    pub udp: Vec<Port>,
    pub from: Vec<IpNet>,
    pub reason: String,
    pub owner: Option<String>,
    /// The last day on which it holds, UTC.
    pub until: jiff::civil::Date,
}

impl Exception {
    pub fn ports(&self, proto: Proto) -> &[Port] {
        match proto {
            Proto::Tcp => &self.tcp,
            Proto::Udp => &self.udp,
        }
    }

    /// Whether it still grants anything on `today` (UTC).
    pub fn holds_on(&self, today: jiff::civil::Date) -> bool {
        today <= self.until
    }

    /// The first second (Unix) after its last day, UTC; `None` at the end of the calendar.
    pub fn ends(&self) -> Option<u64> {
        let midnight = self.until.tomorrow().ok()?.to_zoned(jiff::tz::TimeZone::UTC).ok()?;
        u64::try_from(midnight.timestamp().as_second()).ok()
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileRule {
    pub path: PathBuf,
    /// The most permissive mode allowed, as in `chmod`: 0o600.
    pub mode: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    Enforce,
    Audit,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Enforce {
    pub mode: Mode,
    pub firewall: bool,
    pub binds: bool,
    pub keepalive: bool,
    pub confirm_within: Duration,
    pub allow_no_admin_path: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Metrics {
    pub port: Port,
}

/// What is told to the hub by itself, and what is measured for it. Nothing that is absent is
/// told or measured.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Heartbeat {
    /// The push URL of this node's monitor in Uptime Kuma, as Kuma shows it. A name without a
    /// slash is a credential of the service (`LoadCredential=`).
    pub kuma_url_file: Option<PathBuf>,
    /// The URL of an ntfy topic; an access token (`tk_...`) may follow on a line of its own.
    pub ntfy_url_file: Option<PathBuf>,
    pub every: Duration,
    /// Written at every beat, for whoever polls a share: verdict and checks as JSON.
    pub status_file: Option<PathBuf>,
    /// JSON object of what only the application knows: db_size_mb, db_integrity,
    /// active_sessions, req_1h, err_1h, cert_days_remaining. Believed for 5 min.
    pub app_file: Option<PathBuf>,
    /// PEM chain whose first certificate is the one served on port 443.
    pub certificate_file: Option<PathBuf>,
    /// Without a file: the name to ask this host's own port 443 for.
    pub certificate_name: Option<String>,
    /// Its size is db_size_mb.
    pub database_file: Option<PathBuf>,
}

impl Default for Heartbeat {
    fn default() -> Self {
        Self {
            kuma_url_file: None,
            ntfy_url_file: None,
            every: Duration::from_secs(30),
            status_file: None,
            app_file: None,
            certificate_file: None,
            certificate_name: None,
            database_file: None,
        }
    }
}

impl Policy {
    /// The scope of an interface by its name; `None` for loopback, which has none.
    pub fn scope_of(&self, interface: &str) -> Option<crate::terms::Scope> {
        use crate::terms::Scope;
        if interface == "lo" {
            return None;
        }
        if interface == self.mesh.interface {
            return Some(Scope::Mesh);
        }
        if self.locals.iter().flat_map(|l| &l.interfaces).any(|p| p.matches(interface)) {
            return Some(Scope::Other);
        }
        match &self.public.interfaces {
            None => Some(Scope::Public),
            Some(list) if list.iter().any(|p| p.matches(interface)) => Some(Scope::Public),
            Some(_) => Some(Scope::Other),
        }
    }
}
