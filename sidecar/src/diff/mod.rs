//! Desired x Snapshot -> findings, and the catalogue that `explain` prints. Pure.

use serde::{Deserialize, Serialize};

use crate::observed::Facet;
use crate::terms::{Actor, Stamp};

/// What kind of difference it is. Stable: scripts match on the kebab-case names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Code {
    FirewallMissing,
    FirewallChanged,
    FirewallBlocked,
    ListenerExposed,
    ListenerWide,
    DnatExposed,
    SshBind,
    SshUnreachable,
    SshPassword,
    MeshMissing,
    MeshAddress,
    MeshKeepalive,
    MeshHandshake,
    MeshPeer,
    MeshEndpoint,
    MeshLeak,
    ExceptionExpired,
    ExceptionOpen,
    FileMode,
    ControlUnproven,
    AuditExposed,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    Critical,
    High,
    Medium,
    Low,
    Info,
}

/// We looked, and it differs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    pub code: Code,
    pub severity: Severity,
    /// What it is about, stable for as long as the finding lasts: "tcp/0.0.0.0:5432",
    /// "table inet spokeguard", "peer hub (xTIB…)". Part of the finding's identity.
    pub subject: String,
    pub wanted: String,
    pub found: String,
    pub by: Option<Actor>,
    pub since: Option<Stamp>,
    /// Declared by the policy: listed, and never changes verdict or exit code.
    pub accepted: bool,
    /// What to do about it, one sentence.
    pub next: String,
    /// The facet it was read from.
    #[serde(skip)]
    pub facet: Option<Facet>,
}

impl Finding {
    /// Two findings with the same identity are the same finding at two moments.
    pub fn identity(&self) -> (Code, &str) {
        (self.code, &self.subject)
    }
}
