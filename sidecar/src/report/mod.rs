//! The face of a finished cycle: verdict, findings, blind facets; as JSON and as text. Pure.

use serde::{Deserialize, Serialize};

use crate::diff::Finding;
use crate::observed::Facet;
use crate::terms::Stamp;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    Ok,
    Drift,
    Unknown,
}

/// The JSON of `check` (version 1 of the contract).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    pub version: u32,
    pub node: String,
    pub verdict: Verdict,
    pub at: Stamp,
    pub findings: Vec<Finding>,
    pub blind: Vec<Blind>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Blind {
    pub facet: Facet,
    pub reason: String,
}
