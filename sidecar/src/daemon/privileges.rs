//! What this process may do: taken away right after start, from the children to come too,
//! and then tried to get back, since a call that returned 0 is no proof.
//!
//! The daemon keeps six capabilities, without new privileges and under a filter of system
//! calls. It is not in a Landlock domain: from inside one, /proc/PID/fd of processes outside
//! can't be read, whatever the rules, and no listener would have an owner any more. The
//! server of the metrics keeps nothing at all, and is in one.

use std::path::Path;

use caps::{CapSet, Capability, CapsHashSet};
use landlock::{
    ABI, Access as _, AccessFs, AccessNet, CompatLevel, Compatible as _, NetPort, Ruleset, RulesetAttr as _,
    RulesetCreatedAttr as _, RulesetError, RulesetStatus, Scope, path_beneath_rules,
};
use rustix::process::{Resource, Rlimit, setrlimit};
use serde::{Deserialize, Serialize};

use super::seccomp;
use crate::source::probe::Means;
use crate::sys::attempt::Attempt;
use crate::sys::descriptors;

/// What stays, and for what.
const KEPT: [Capability; 6] = [
    // nftables, WireGuard, tc, nfnetlink and rtnetlink groups.
    Capability::CAP_NET_ADMIN,
    // Maps, links, the loader child and the audits; PERFMON for the tracepoint.
    Capability::CAP_BPF,
    Capability::CAP_PERFMON,
    // Which process holds a socket: /proc/PID/fd of other users.
    Capability::CAP_SYS_PTRACE,
    Capability::CAP_DAC_READ_SEARCH,
    // `[metrics] port` may be below 1024.
    Capability::CAP_NET_BIND_SERVICE,
];

/// Where a name server that has much to say is asked by TCP.
const DNS: u16 = 53;

/// Before Linux 6.6, audits see what arrives by a packet socket.
fn kept() -> Vec<Capability> {
    let raw = (!Means::of_this_kernel().tcx).then_some(Capability::CAP_NET_RAW);
    KEPT.into_iter().chain(raw).collect()
}

/// What the daemon has left, and what it found when it tried to get more.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Privileges {
    /// Nothing that was dropped can be had back, by the daemon or by its server.
    pub proven: bool,
    pub capabilities: Vec<String>,
    /// What could not be dropped, or came back.
    pub gaps: Vec<String>,
    /// `null`: the server has not said it yet.
    pub http: Option<Confinement>,
}

/// What holds the server of the metrics in.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Confinement {
    pub landlock: Landlock,
    pub gaps: Vec<String>,
}

/// How much of Landlock the kernel has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Landlock {
    Full,
    /// An older kernel: files are closed off, but not all of network, devices and signals.
    Partial,
    /// The filter of system calls holds alone.
    None,
}

impl Landlock {
    pub const ALL: [Landlock; 3] = [Landlock::Full, Landlock::Partial, Landlock::None];

    pub const fn name(self) -> &'static str {
        match self {
            Landlock::Full => "full",
            Landlock::Partial => "partial",
            Landlock::None => "none",
        }
    }
}

impl Privileges {
    /// With what the server has said of itself, if it has.
    pub fn with(&self, http: Option<Confinement>) -> Self {
        let proven = self.gaps.is_empty() && http.as_ref().is_some_and(|http| http.gaps.is_empty());
        Self { proven, http, ..self.clone() }
    }
}

/// Drops what this process and its children don't need, and tries to get it back. To be called
/// while there is one thread only: all of this belongs to threads, and later ones inherit it.
pub fn confine_daemon() -> Privileges {
    let mut gaps = Vec::new();
    // Nobody's privilege, and so no gap: an older kernel leaves it as it is everywhere.
    if let Err(error) = descriptors::keep_from_children() {
        log::debug!("children inherit what this process was started with: {error}");
    }
    let dropped = drop_capabilities(&kept()).unwrap_or_else(|error| {
        gaps.push(format!("capabilities could not be dropped: {error:#}"));
        CapsHashSet::new()
    });
    if let Err(error) = rustix::thread::set_no_new_privs(true) {
        gaps.push(format!("no_new_privs: {error}"));
    }
    let filtered = seccomp::confine_daemon();
    gaps.extend(regained(&dropped));
    match filtered {
        Ok(()) => gaps.extend(Attempt::OF_A_DAEMON.into_iter().filter_map(Attempt::gets_through)),
        Err(error) => gaps.push(format!("no filter of system calls: {error:#}")),
    }
    Privileges { proven: false, capabilities: names(CapSet::Permitted, &mut gaps), gaps, http: None }
}

/// Takes everything from a process that serves descriptors which it was given. Descriptors to
/// come must not exceed `descriptors_max`.
pub fn confine_server(descriptors_max: u64) -> Confinement {
    confine_child(descriptors_max, &[], &[], seccomp::confine_server, &Attempt::OF_A_SERVER)
}

/// The same for a process that sends to one TCP port: it may read these files and folders, by
/// which names are resolved, and connect there and to name servers.
pub fn confine_sender(descriptors_max: u64, readable: &[&Path], port: Option<u16>) -> Confinement {
    let ports: Vec<u16> = port.into_iter().chain([DNS]).collect();
    let mut held =
        confine_child(descriptors_max, readable, &ports, seccomp::confine_sender, &Attempt::OF_A_SENDER);
    if held.landlock != Landlock::None {
        held.gaps.extend(Attempt::Open.gets_through());
    }
    held
}

fn confine_child(
    descriptors_max: u64,
    readable: &[&Path],
    ports: &[u16],
    filter: fn() -> anyhow::Result<()>,
    attempts: &[Attempt],
) -> Confinement {
    let mut gaps = Vec::new();
    // This process was started with exec by the daemon, which is how root gets back what it
    // has dropped: not past no_new_privs.
    match caps::read(None, CapSet::Permitted) {
        Ok(had) => gaps.extend(
            had.iter().filter(|c| !kept().contains(c)).map(|c| format!("{} came back at exec", name(*c))),
        ),
        Err(error) => gaps.push(format!("capabilities can't be read: {error}")),
    }
    let dropped = drop_capabilities(&[]).unwrap_or_else(|error| {
        gaps.push(format!("capabilities could not be dropped: {error:#}"));
        CapsHashSet::new()
    });
    if let Err(error) = rustix::thread::set_no_new_privs(true) {
        gaps.push(format!("no_new_privs: {error}"));
    }
    let limit = Rlimit { current: Some(descriptors_max), maximum: Some(descriptors_max) };
    if let Err(error) = setrlimit(Resource::Nofile, limit) {
        gaps.push(format!("limit of descriptors: {error}"));
    }
    let landlock = only_by_landlock(readable, ports).unwrap_or_else(|error| {
        gaps.push(format!("Landlock: {error}"));
        Landlock::None
    });
    // Asked before the filter, which refuses capset() as well, and so would prove nothing.
    gaps.extend(regained(&dropped));
    match filter() {
        Ok(()) => gaps.extend(attempts.iter().copied().filter_map(Attempt::gets_through)),
        Err(error) => gaps.push(format!("no filter of system calls: {error:#}")),
    }
    Confinement { landlock, gaps }
}

/// Drops all but these, for good, and says what went. A process that has none to begin with
/// passes: there is nothing to drop.
fn drop_capabilities(kept: &[Capability]) -> anyhow::Result<CapsHashSet> {
    let had = caps::read(None, CapSet::Permitted)?;
    let keep: CapsHashSet = kept.iter().copied().filter(|c| had.contains(c)).collect();
    // The bounding set needs SETPCAP, so it goes first.
    if had.contains(&Capability::CAP_SETPCAP) {
        for capability in caps::read(None, CapSet::Bounding)? {
            if !kept.contains(&capability) {
                caps::drop(None, CapSet::Bounding, capability)?;
            }
        }
    }
    caps::clear(None, CapSet::Ambient).or_else(|error| if had.is_empty() { Ok(()) } else { Err(error) })?;
    caps::set(None, CapSet::Effective, &keep)?;
    caps::set(None, CapSet::Permitted, &keep)?;
    caps::set(None, CapSet::Inheritable, &CapsHashSet::new())?;
    Ok(had.difference(&keep).copied().collect())
}

/// Those of them that can be raised again.
fn regained(dropped: &CapsHashSet) -> Vec<String> {
    let raised = |capability: &Capability| {
        let has = |set| caps::has_cap(None, set, *capability).unwrap_or(true);
        caps::raise(None, CapSet::Permitted, *capability).is_ok()
            || caps::raise(None, CapSet::Effective, *capability).is_ok()
            || has(CapSet::Permitted)
            || has(CapSet::Effective)
    };
    let mut back: Vec<String> = dropped.iter().filter(|c| raised(c)).map(|c| name(*c)).collect();
    back.sort_unstable();
    back.into_iter().map(|name| format!("{name} came back after it was dropped")).collect()
}

/// No other file, no other port, no process outside: every right that Landlock knows, and no
/// rule that gives one back but these.
fn only_by_landlock(readable: &[&Path], ports: &[u16]) -> Result<Landlock, RulesetError> {
    // The last version that this can be asked of; the kernel's own may be older.
    let abi = ABI::V6;
    let status = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(abi))?
        .handle_access(AccessNet::from_all(abi))?
        .scope(Scope::from_all(abi))?
        .create()?
        // What is not there needs no right.
        .add_rules(path_beneath_rules(readable, AccessFs::ReadFile | AccessFs::ReadDir))?
        .add_rules(
            ports.iter().map(|port| Ok::<_, RulesetError>(NetPort::new(*port, AccessNet::ConnectTcp))),
        )?
        .restrict_self()?;
    Ok(match status.ruleset {
        RulesetStatus::FullyEnforced => Landlock::Full,
        RulesetStatus::PartiallyEnforced => Landlock::Partial,
        RulesetStatus::NotEnforced => Landlock::None,
    })
}

fn names(set: CapSet, gaps: &mut Vec<String>) -> Vec<String> {
    match caps::read(None, set) {
        Ok(left) => {
            let mut names: Vec<String> = left.into_iter().map(name).collect();
            names.sort_unstable();
            names
        }
        Err(error) => {
            gaps.push(format!("capabilities can't be read: {error}"));
            Vec::new()
        }
    }
}

fn name(capability: Capability) -> String {
    capability.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_can_be_raised_again_is_named_and_what_is_gone_is_not() {
        // Capabilities belong to threads, and end with them.
        let thread = std::thread::spawn(|| {
            let had = caps::read(None, CapSet::Permitted).expect("capabilities");
            let Some(one) = had.iter().copied().next() else {
                return println!("skipped: this process has no capability to lose");
            };
            let lost = CapsHashSet::from([one]);
            let lower = |set| caps::drop(None, set, one).expect("a capability less");
            lower(CapSet::Effective);
            assert_eq!(regained(&lost), [format!("{} came back after it was dropped", name(one))]);
            lower(CapSet::Effective);
            lower(CapSet::Permitted);
            assert_eq!(regained(&lost), [""; 0]);
        });
        thread.join().expect("a thread");
    }
}
