//! What is run, on which kernels.

/// One scenario is one boot for each of its kernels.
#[derive(Debug)]
pub struct Scenario {
    pub name: &'static str,
    pub about: &'static str,
    pub kernels: &'static [&'static str],
    /// Those of the kernels that are part of every `cargo xtask test`.
    pub quick: &'static [&'static str],
    pub memory_mib: u32,
    pub limit_s: u64,
    /// More than one: with a disk that outlives each of them.
    pub boots: u32,
    /// Whether it needs the integration tests' program.
    pub tests: bool,
}

pub const ALL: &[Scenario] = &[
    Scenario {
        name: "spoke",
        about: "The kernel's WireGuard: policy, keepalive, handshakes, scrape, ssh and audit beside nmap",
        kernels: &["6.1", "6.12"],
        quick: &["6.12"],
        memory_mib: 1024,
        limit_s: 900,
        boots: 1,
        tests: false,
    },
    Scenario {
        name: "lock-out",
        about: "A policy that shuts the hub out goes back: by itself, with all of ours killed, across a power cut",
        kernels: &["6.1", "6.12"],
        quick: &[],
        memory_mib: 1024,
        limit_s: 900,
        boots: 2,
        tests: false,
    },
    Scenario {
        name: "docker-like",
        about: "Others write rules after ours, delete, flush and restore: containers, NixOS, iptables",
        kernels: &["6.1", "6.12"],
        quick: &[],
        memory_mib: 1024,
        limit_s: 900,
        boots: 1,
        tests: false,
    },
    Scenario {
        name: "upgrade",
        about: "A long connection and steady traffic across restarts, reloads and upgrades; counted exactly",
        kernels: &["6.1", "6.12"],
        quick: &[],
        memory_mib: 1536,
        limit_s: 1800,
        boots: 1,
        tests: true,
    },
    Scenario {
        name: "no-features",
        about: "Without cgroup2, BTF or nf_tables: says so, does the rest, exit code 2",
        kernels: &["6.1", "6.12"],
        quick: &[],
        memory_mib: 1024,
        limit_s: 900,
        boots: 1,
        tests: false,
    },
    Scenario {
        name: "cases",
        about: "Cases of the audit's matrix that most build machines' kernels can't do: VLANs, flow tables",
        kernels: &["6.1", "6.12"],
        quick: &[],
        memory_mib: 1536,
        limit_s: 1800,
        boots: 1,
        tests: true,
    },
    Scenario {
        name: "tests",
        about: "The integration tests, on that kernel",
        kernels: &["6.1", "6.12"],
        quick: &[],
        memory_mib: 1536,
        limit_s: 7200,
        boots: 1,
        tests: true,
    },
];

#[cfg(test)]
mod tests {
    use super::*;

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
