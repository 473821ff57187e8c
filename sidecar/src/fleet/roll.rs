//! A command on one node after another, as a value that survives being interrupted.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::policy::{fingerprint, sum};

/// What is to be done, and where.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    pub fleet: String,
    /// The program and its arguments.
    pub command: Vec<String>,
    /// Names, in the order of rolling.
    pub order: Vec<String>,
    /// Of all that the inventory says of those nodes.
    pub inventory: String,
}

/// A plan and how far it came; the state file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Roll {
    version: u32,
    pub plan: Plan,
    /// Of the order, how many are done and passed their gate.
    pub done: usize,
    /// The next one was begun, and nobody knows how it ended, or it failed for this reason.
    pub stopped: Option<String>,
}

/// Why a state file is not continued.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Mismatch {
    NoState(String),
    Command { before: String },
    Inventory,
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Mismatch::NoState(why) => write!(f, "is not the state of a roll: {why}"),
            Mismatch::Command { before } => write!(f, "is of another command: {before}"),
            Mismatch::Inventory => f.write_str(
                "was begun with another inventory: its nodes, or what it says of them, have changed",
            ),
        }
    }
}

impl Plan {
    /// `nodes` in the order of rolling.
    pub fn new(fleet: &str, nodes: &[&super::Node], command: &[String]) -> Self {
        let said: String =
            nodes.iter().map(|node| format!("{} {}\n", node.name, fingerprint_of(node))).collect();
        Self {
            fleet: fleet.to_owned(),
            command: command.to_vec(),
            order: nodes.iter().map(|node| node.name.clone()).collect(),
            inventory: sum(&said),
        }
    }
}

/// Of everything by which a command or a gate knows a node.
fn fingerprint_of(node: &super::Node) -> String {
    let super::Node {
        public_address, public_key, endpoint, region, labels, hostname, subdomain, policy, ..
    } = node;
    let (key, policy) = (public_key.map(|key| key.to_string()), fingerprint(policy));
    sum(&format!(
        "{public_address:?} {key:?} {endpoint:?} {region:?} {labels:?} {hostname} {subdomain:?} {policy}"
    ))
}

impl Roll {
    pub fn new(plan: Plan) -> Self {
        Self { version: 1, plan, done: 0, stopped: None }
    }

    /// Goes on where a state file ends, if that is of the same plan.
    pub fn resume(text: &str, plan: &Plan) -> Result<Self, Mismatch> {
        let roll: Roll = serde_json::from_str(text).map_err(|error| Mismatch::NoState(error.to_string()))?;
        if roll.version != 1 {
            return Err(Mismatch::NoState(format!("version {} is not known here", roll.version)));
        }
        if roll.plan.command != plan.command {
            return Err(Mismatch::Command { before: roll.plan.command.join(" ") });
        }
        if roll.plan != *plan {
            return Err(Mismatch::Inventory);
        }
        if roll.done > roll.plan.order.len() {
            return Err(Mismatch::NoState("more nodes are done than there are".to_owned()));
        }
        Ok(roll)
    }

    /// The node whose turn it is.
    pub fn next(&self) -> Option<&str> {
        self.plan.order.get(self.done).map(String::as_str)
    }

    /// The next one is about to be touched.
    pub fn begin(&mut self) {
        self.stopped = Some("it was interrupted".to_owned());
    }

    pub fn fail(&mut self, reason: &str) {
        self.stopped = Some(reason.to_owned());
    }

    /// The next one passed its gate.
    pub fn pass(&mut self) {
        self.stopped = None;
        self.done += 1;
    }

    /// The state file.
    pub fn to_json(&self) -> String {
        serde_json::to_string_pretty(self).unwrap_or_default() + "\n"
    }

    /// "3 of 21 done"
    pub fn progress(&self) -> String {
        format!("{} of {} done", self.done, self.plan.order.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan() -> Plan {
        let order = ["oslo", "lima", "hub"].map(str::to_owned).to_vec();
        Plan { fleet: "f".into(), command: vec!["deploy".into(), "-v".into()], order, inventory: "00".into() }
    }

    #[test]
    fn it_goes_on_where_it_stopped() {
        let mut roll = Roll::new(plan());
        assert_eq!(roll.next(), Some("oslo"));
        roll.begin();
        roll.pass();
        roll.begin();
        let again = Roll::resume(&roll.to_json(), &plan()).unwrap();
        assert_eq!(again, roll);
        assert_eq!((again.next(), again.progress().as_str()), (Some("lima"), "1 of 3 done"));
        assert_eq!(again.stopped.as_deref(), Some("it was interrupted"));
        roll.fail("exit 3");
        assert_eq!(Roll::resume(&roll.to_json(), &plan()).unwrap().stopped.as_deref(), Some("exit 3"));
        roll.pass();
        roll.pass();
        assert_eq!(roll.next(), None);
    }

    #[test]
    fn another_plan_is_noticed() {
        let text = Roll::new(plan()).to_json();
        let command = Plan { command: vec!["deploy".into()], ..plan() };
        let before = "deploy -v".to_owned();
        assert_eq!(Roll::resume(&text, &command), Err(Mismatch::Command { before }));
        let fewer = Plan { order: vec!["oslo".into()], ..plan() };
        assert_eq!(Roll::resume(&text, &fewer), Err(Mismatch::Inventory));
        let policy = Plan { inventory: "01".into(), ..plan() };
        assert_eq!(Roll::resume(&text, &policy), Err(Mismatch::Inventory));
        for broken in ["", "{}", &text.replace("\"done\": 0", "\"done\": 9"), &text.replace("1,", "2,")] {
            assert!(matches!(Roll::resume(broken, &plan()), Err(Mismatch::NoState(_))), "{broken}");
        }
    }
}
