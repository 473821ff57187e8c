//! The world as values: one file per source. Each decodes purely (bytes to values, tested
//! on captures) and reads thinly. A source that can't look says why; it never guesses.

pub mod bpf;
pub mod canary;
pub mod child;
pub mod evidence;
pub mod files;
pub mod flows;
pub mod handshakes;
pub mod hub;
pub mod knocks;
pub mod legacy;
pub mod links;
pub mod listeners;
pub mod looks;
pub mod netlink;
pub mod nft;
pub mod nft_counters;
pub mod nft_events;
pub mod nft_lists;
pub mod nft_unlisted;
pub mod outside;
pub mod owners;
pub mod ping;
pub mod probe;
pub mod prometheus;
pub mod reach;
pub mod recorded;
pub mod scan;
pub mod sshd;
pub mod tailscale;
pub mod vitals;
pub mod wireguard;

use std::path::{Path, PathBuf};

use crate::desired::Desired;
use crate::observed::{Facet, Guard, Reading, Snapshot};
use crate::policy::MeshKind;
use crate::sys::clock;
use crate::terms::Stamp;

/// What looks. Keeps the caches that make a second look cheap, and nothing else.
pub struct Eyes {
    owners: owners::Owners,
    handshakes: handshakes::Handshakes,
    pins: PathBuf,
    /// Why the bind guard does not run although it should, where that is known.
    pub binds_gap: Option<String>,
    /// Why the guard can't be had, where whoever tried knows.
    pub guard_gap: Option<String>,
}

impl Eyes {
    /// `pins`: where the eBPF maps of this instance are pinned.
    pub fn new(pins: &Path) -> Self {
        Self {
            owners: owners::Owners::new(),
            handshakes: handshakes::Handshakes::default(),
            pins: pins.to_owned(),
            binds_gap: None,
            guard_gap: None,
        }
    }

    /// One look at every facet.
    pub fn look(&mut self, desired: &Desired, now: Stamp) -> Snapshot {
        let listeners = Reading::from_result(listeners::read(&mut self.owners));
        let sshd = self.sshd(desired, &listeners);
        Snapshot {
            at: now,
            nftables: nft::read(),
            links: Reading::from_result(links::read()),
            wireguard: self.wireguard(desired),
            tailscale: tailscale(desired),
            sshd,
            files: Reading::from_result(files::read(&desired.policy.files)),
            counters: bpf::read(&self.pins, &bpf::CounterConfig::new(&desired.services)),
            binds: self.binds(now),
            guard: self.guard(desired),
            // Asked for by name: see `outside`.
            audit: None,
            listeners,
        }
    }

    /// Looks again at some facets; the others keep what they were.
    pub fn look_again(
        &mut self,
        desired: &Desired,
        mut snapshot: Snapshot,
        facets: &[Facet],
        now: Stamp,
    ) -> Snapshot {
        snapshot.at = now;
        for facet in facets {
            match facet {
                Facet::Nftables => snapshot.nftables = nft::read(),
                Facet::Listeners => {
                    snapshot.listeners = Reading::from_result(listeners::read(&mut self.owners))
                }
                Facet::Links => snapshot.links = Reading::from_result(links::read()),
                Facet::Wireguard => snapshot.wireguard = self.wireguard(desired),
                Facet::Tailscale => snapshot.tailscale = tailscale(desired),
                Facet::Sshd => snapshot.sshd = self.sshd(desired, &snapshot.listeners),
                Facet::Files => snapshot.files = Reading::from_result(files::read(&desired.policy.files)),
                Facet::Audit => {}
                Facet::Counters => {
                    snapshot.counters = bpf::read(&self.pins, &bpf::CounterConfig::new(&desired.services));
                    snapshot.guard = self.guard(desired);
                }
                Facet::Binds => snapshot.binds = self.binds(now),
            }
        }
        snapshot
    }

    fn binds(&self, now: Stamp) -> Reading<crate::observed::Binds> {
        match &self.binds_gap {
            Some(gap) => Reading::blind(gap),
            None => bpf::bind::read(&self.pins, now),
        }
    }

    fn guard(&self, desired: &Desired) -> Guard {
        match (bpf::guard::read(&self.pins, desired.guard.as_ref()), &self.guard_gap) {
            (Guard::Absent, Some(gap)) => Guard::Unavailable(gap.clone()),
            (guard, _) => guard,
        }
    }

    fn wireguard(&mut self, desired: &Desired) -> Reading<Option<crate::observed::Device>> {
        // tailscaled keeps its tunnel to itself.
        if desired.policy.mesh.kind == MeshKind::Tailscale {
            return Reading::Seen(None);
        }
        let mut device = Reading::from_result(wireguard::read(&desired.policy.mesh.interface));
        if let Reading::Seen(Some(device)) = &mut device {
            self.handshakes.correct(device, clock::now(), clock::since_boot());
        }
        device
    }

    fn sshd(
        &self,
        desired: &Desired,
        listeners: &Reading<Vec<crate::observed::Listener>>,
    ) -> Reading<Option<crate::observed::Sshd>> {
        match listeners {
            Reading::Seen(list) => Reading::from_result(sshd::read(list, desired.policy.ssh.port)),
            Reading::Blind(gap) => Reading::blind(format!("the listeners could not be read: {}", gap.reason)),
        }
    }
}

fn tailscale(desired: &Desired) -> Reading<Option<crate::observed::Tailscaled>> {
    match desired.policy.mesh.kind {
        MeshKind::Wireguard => Reading::Seen(None),
        MeshKind::Tailscale => Reading::from_result(tailscale::read().map(Some)),
    }
}

/// Runs the calling test once more, alone in fresh network and mount namespaces. `true`
/// inside; outside it returns `false` once that run has passed.
///
/// Without root it is skipped, which is said, and is a failure where CI or
/// SPOKEGUARD_LAB=required promises that everything is there, as for the lab's tests.
#[cfg(test)]
fn in_namespace(test: &str, programs: &[&str]) -> bool {
    const INSIDE: &str = "SPOKEGUARD_TEST_INSIDE";
    if std::env::var_os(INSIDE).is_some_and(|inside| inside == test) {
        return true;
    }
    let path = std::env::var("PATH").unwrap_or_default();
    let have = |name: &str| {
        path.split(':')
            .chain(["/usr/sbin", "/sbin"])
            .any(|folder| std::path::Path::new(folder).join(name).is_file())
    };
    let mut missing: Vec<&str> =
        ["unshare", "ip"].iter().chain(programs).copied().filter(|p| !have(p)).collect();
    if !rustix::process::geteuid().is_root() {
        missing.push("root");
    }
    if !missing.is_empty() {
        eprintln!("skipped {test}: needs {}", missing.join(", "));
        let promised = std::env::var_os("CI").is_some()
            || std::env::var_os("SPOKEGUARD_LAB").is_some_and(|value| value == "required");
        assert!(!promised, "{test} needs {}", missing.join(", "));
        return false;
    }
    let output = std::process::Command::new("unshare")
        .args(["--net", "--mount", "--"])
        .arg(std::env::current_exe().expect("this program"))
        .args(["--exact", test, "--nocapture", "--test-threads=1"])
        .env(INSIDE, test)
        .output()
        .expect("unshare");
    let text =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    // A name that matches no test passes too, so that is looked at as well.
    assert!(output.status.success() && text.contains("1 passed"), "{test} in its namespaces:\n{text}");
    false
}

/// Waits for something that happens soon, or fails at a deadline.
#[cfg(test)]
fn soon<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(std::time::Instant::now() < deadline, "{what} did not happen");
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
}

/// A child process of a test, ended with it.
#[cfg(test)]
struct Running(std::process::Child);

#[cfg(test)]
impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Runs a command of a test's set-up, and returns its output.
#[cfg(test)]
fn sh(command: &str) -> String {
    let output = std::process::Command::new("sh").args(["-ec", command]).output().expect("sh");
    assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}
