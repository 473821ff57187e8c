//! Since when: remembers findings from look to look, and says which came, went or changed.
//! Bounded, and serialisable, so that a restart of the daemon does not forget.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::diff::{Code, Finding, Severity};
use crate::observed::Snapshot;
use crate::terms::Stamp;

/// Findings remembered at most; the gravest come first.
const REMEMBERED_MAX: usize = 1024;

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "Vec<Finding>", into = "Vec<Finding>")]
pub struct History {
    /// As they were last seen, `since` filled in.
    known: BTreeMap<(Code, String), Finding>,
}

/// What a look changed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase", tag = "event")]
pub enum Transition {
    Appeared {
        finding: Finding,
    },
    /// It got worse or milder.
    Changed {
        finding: Finding,
        was: Severity,
    },
    /// It was looked for, and is not there any more.
    Cleared {
        finding: Finding,
    },
}

impl History {
    /// Fills in `since`, and tells what is different from the look before. A finding whose
    /// facet is blind now is neither there nor gone, and is kept as it was.
    pub fn update(&mut self, findings: &mut [Finding], snapshot: &Snapshot, now: Stamp) -> Vec<Transition> {
        let mut before = std::mem::take(&mut self.known);
        let mut transitions = Vec::new();
        let mut present = BTreeSet::new();
        for finding in findings.iter_mut() {
            let key = (finding.code, finding.subject.clone());
            if !present.insert(key.clone()) {
                continue;
            }
            let room = self.known.len() < REMEMBERED_MAX;
            match before.remove(&key) {
                Some(known) => {
                    // A clock that was set back must not put the beginning into the future.
                    finding.since = Some(known.since.unwrap_or(now).min(now));
                    if known.severity != finding.severity {
                        transitions
                            .push(Transition::Changed { finding: finding.clone(), was: known.severity });
                    }
                }
                // Not remembered, it would appear again with every look; so it keeps quiet.
                None if !room => continue,
                None => {
                    finding.since = Some(now);
                    transitions.push(Transition::Appeared { finding: finding.clone() });
                }
            }
            if room {
                self.known.insert(key, finding.clone());
            }
        }
        for (key, finding) in before {
            let looked = key.0.facets().iter().all(|facet| snapshot.was_seen(*facet));
            if looked {
                transitions.push(Transition::Cleared { finding });
            } else if self.known.len() < REMEMBERED_MAX {
                self.known.insert(key, finding);
            }
        }
        transitions
    }

    /// When this finding was first seen, if it is remembered.
    pub fn since(&self, finding: &Finding) -> Option<Stamp> {
        self.known(finding).and_then(|known| known.since)
    }

    /// The same finding as it was last seen.
    pub fn known(&self, finding: &Finding) -> Option<&Finding> {
        self.known.get(&(finding.code, finding.subject.clone()))
    }

    pub fn len(&self) -> usize {
        self.known.len()
    }

    pub fn is_empty(&self) -> bool {
        self.known.is_empty()
    }
}

impl From<Vec<Finding>> for History {
    fn from(findings: Vec<Finding>) -> Self {
        let known = findings.into_iter().take(REMEMBERED_MAX);
        Self { known: known.map(|f| ((f.code, f.subject.clone()), f)).collect() }
    }
}

impl From<History> for Vec<Finding> {
    fn from(history: History) -> Self {
        history.known.into_values().collect()
    }
}
