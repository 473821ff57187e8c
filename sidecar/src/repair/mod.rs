//! Findings -> Plan: what the daemon or `apply` would do, as data, with an order and a
//! budget. Pure; `apply` interprets it.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::terms::PublicKey;

/// One thing to do to the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Put our table in place, in one transaction.
    ApplyTable,
    /// Set the keepalive of one peer that exists.
    SetKeepalive { interface: String, peer: PublicKey, seconds: u16 },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ActionKind {
    ApplyTable,
    SetKeepalive,
}

impl ActionKind {
    pub const ALL: [ActionKind; 2] = [ActionKind::ApplyTable, ActionKind::SetKeepalive];
    pub const fn name(self) -> &'static str {
        match self {
            ActionKind::ApplyTable => "apply-table",
            ActionKind::SetKeepalive => "set-keepalive",
        }
    }
}

impl Action {
    pub fn kind(&self) -> ActionKind {
        match self {
            Action::ApplyTable => ActionKind::ApplyTable,
            Action::SetKeepalive { .. } => ActionKind::SetKeepalive,
        }
    }
}

/// What came of an action.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outcome {
    pub action: ActionKind,
    pub result: Ended,
    pub took: Duration,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Ended {
    Done,
    Failed(String),
    /// The budget is spent: someone undoes our repairs as fast as we make them.
    Withheld,
}
