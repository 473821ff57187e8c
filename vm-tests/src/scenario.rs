//! What is run, on which machines.

use std::time::Duration;

use crate::packages::{Arch, NEWEST};

/// What outlives each boot.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Disk {
    None,
    Empty,
    /// Debian as its packages install it; its systemd becomes the first process.
    Systemd,
}

/// The word for a scenario that is part of every `cargo xtask test`: no more than that needs.
pub const QUICK: &str = "quick";

/// One scenario is one machine for each of its kernels and architectures.
#[derive(Debug)]
pub struct Scenario {
    pub name: &'static str,
    pub about: &'static str,
    /// Debian's series, for amd64.
    pub kernels: &'static [&'static str],
    /// Those of them that are part of every `cargo xtask test`.
    pub quick: &'static [&'static str],
    /// The series for arm64, which are never quick: their programs are built by another compiler.
    pub arm64: &'static [&'static str],
    /// On amd64; arm64 has what the fleet's small machines have.
    pub memory_mib: u32,
    /// Of the emulator's own time, which other work on this machine does not change; the clock may go four times as far.
    pub limit_s: u64,
    pub boots: u32,
    pub disk: Disk,
    /// Whether it measures the program as users get it.
    pub release: bool,
    /// Whether it needs the integration tests' program.
    pub tests: bool,
    /// Whether it needs our Debian package.
    pub package: bool,
}

const SMALL_MIB: u32 = 512;
/// As [`Scenario::limit_s`], of a quick run: nobody waits for long to hear that it hangs.
const QUICK_LIMIT_S: u64 = 300;

impl Scenario {
    pub fn kernels(&self, arch: Arch, quick: bool) -> &'static [&'static str] {
        match (arch, quick) {
            (Arch::Amd64, false) => self.kernels,
            (Arch::Amd64, true) => self.quick,
            (Arch::Arm64, false) => self.arm64,
            (Arch::Arm64, true) => &[],
        }
    }

    pub fn limit(&self, quick: bool) -> Duration {
        Duration::from_secs(if quick { QUICK_LIMIT_S } else { self.limit_s })
    }

    pub fn memory_mib(&self, arch: Arch) -> u32 {
        if arch == Arch::Arm64 { SMALL_MIB } else { self.memory_mib }
    }
}

const USUAL: Scenario = Scenario {
    name: "",
    about: "",
    kernels: &["6.1", "6.12", NEWEST],
    quick: &[],
    arm64: &[],
    memory_mib: 1024,
    limit_s: 900,
    boots: 1,
    disk: Disk::None,
    release: false,
    tests: false,
    package: false,
};

pub const ALL: &[Scenario] = &[
    Scenario {
        name: "spoke",
        about: "The kernel's WireGuard: policy, keepalive, handshakes, scrape, ssh and audit beside nmap",
        quick: &["6.12"],
        arm64: &["6.1", "6.12", NEWEST],
        ..USUAL
    },
    Scenario {
        name: "boot-window",
        about: "From power-on a stranger knocks at a host with systemd: nothing answers that may not, with our program and without",
        arm64: &["6.1", "6.12", NEWEST],
        boots: 3,
        disk: Disk::Systemd,
        ..USUAL
    },
    Scenario {
        name: "ssh-race",
        about: "The mesh comes a minute late, goes and comes again: sshd is there in five seconds, never in public",
        arm64: &["6.12"],
        boots: 3,
        disk: Disk::Systemd,
        ..USUAL
    },
    Scenario {
        name: "package",
        about: "Our Debian package under systemd: installed, upgraded, booted by its units alone, removed, purged while on trial",
        arm64: &["6.1", "6.12", NEWEST],
        boots: 3,
        disk: Disk::Systemd,
        package: true,
        ..USUAL
    },
    Scenario {
        name: "neighbours",
        about: "ufw and firewalld beside us under systemd: enabled, reloaded, restarted",
        disk: Disk::Systemd,
        ..USUAL
    },
    Scenario {
        name: "lock-out",
        about: "A policy that shuts the hub out goes back: by itself, with all of ours killed, across a power cut",
        arm64: &["6.1", "6.12", NEWEST],
        boots: 2,
        disk: Disk::Empty,
        ..USUAL
    },
    Scenario {
        name: "lock-out-boot",
        about: "By the installed units alone: a power cut while the hub is shut out, a daemon that hangs, spoilt rules, and what uninstall leaves",
        arm64: &["6.12"],
        boots: 4,
        disk: Disk::Systemd,
        ..USUAL
    },
    Scenario {
        name: "docker-like",
        about: "Others write rules after ours, delete, flush and restore: containers, NixOS, iptables",
        arm64: &["6.1", "6.12", NEWEST],
        ..USUAL
    },
    Scenario {
        name: "upgrade",
        about: "A long connection and steady traffic across restarts, reloads and upgrades; counted exactly",
        memory_mib: 1536,
        limit_s: 1800,
        // As users get it: a debug build that shares one emulated processor with the traffic takes minutes to audit.
        release: true,
        tests: true,
        ..USUAL
    },
    Scenario {
        name: "no-features",
        about: "Without cgroup2, BTF or nf_tables: older means, or it says what it lacks, by words and exit code, and does the rest",
        quick: &["6.1"],
        arm64: &["6.1", "6.12", NEWEST],
        ..USUAL
    },
    Scenario {
        name: "small",
        about: "The unit with its MemoryMax=32M on 512 MB: minutes of a busy host, with memory, time and BPF memory in figures",
        kernels: &["6.12", NEWEST],
        arm64: &["6.1", "6.12", NEWEST],
        memory_mib: SMALL_MIB,
        limit_s: 1800,
        disk: Disk::Systemd,
        release: true,
        ..USUAL
    },
    Scenario {
        name: "cases",
        about: "Cases of the audit's matrix that most build machines' kernels can't do: VLANs, flow tables",
        memory_mib: 1536,
        limit_s: 1800,
        tests: true,
        ..USUAL
    },
    Scenario {
        name: "tests",
        about: "The integration tests that ask most of a kernel; --filter chooses others",
        memory_mib: 1536,
        limit_s: 7_200,
        // An audit by a debug build takes longer there than some tests wait.
        release: true,
        tests: true,
        ..USUAL
    },
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_boots_twice_has_a_disk() {
        assert!(ALL.iter().all(|scenario| scenario.boots == 1 || scenario.disk != Disk::None));
    }

    #[test]
    fn every_test_run_boots_something_and_all_of_them_more() {
        let quick: Vec<_> = ALL.iter().filter(|scenario| !scenario.quick.is_empty()).collect();
        assert!(!quick.is_empty() && quick.len() < ALL.len());
        for scenario in ALL {
            let known = |kernel: &&&str| scenario.kernels.contains(*kernel);
            assert_eq!(
                scenario.quick.iter().filter(known).count(),
                scenario.quick.len(),
                "{}",
                scenario.name
            );
            assert_eq!(
                ALL.iter().filter(|other| other.name == scenario.name).count(),
                1,
                "{}",
                scenario.name
            );
        }
    }
}
