//! What a test needs from the machine, and what to say when it is not there.

use std::path::{Path, PathBuf};

/// One thing that a machine may lack.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Need {
    /// Namespaces: root with ip, nft and unshare.
    Lab,
    /// A tunnel: wg, and wireguard-go with /dev/net/tun where the kernel has no WireGuard.
    WireGuard,
    Nmap,
    /// Control groups of version 2, where binds can be guarded.
    Cgroup2,
    /// Control groups that bound memory, of either version.
    MemoryGroup,
    /// Sets the clock that one program sees.
    Faketime,
    /// A C compiler, which whoever builds Rust has.
    Compiler,
    /// Only for the benchmark.
    Masscan,
    /// Python with the package libnmap, which reads nmap's XML.
    Libnmap,
    /// Makes certificates.
    Openssl,
    /// Ansible, in the same folder.
    Ansible,
    /// Judges XML by its definition.
    Xmllint,
    Sshd,
    /// iptables-nft, and ufw on top of it.
    Iptables,
    Prometheus,
    /// Packages that are installed in a container only.
    Firewalld,
    /// A terminal that can be read.
    Tmux,
    /// With amtool, which judges its configuration.
    Alertmanager,
    /// A container with systemd as its init.
    Nspawn,
    /// Evaluates NixOS modules; no store, no root.
    Nix,
    /// A Debian, and what makes packages for it.
    Debian,
    /// The product's own program.
    Spokeguard,
}

/// Firewalld's packages, downloaded by `cargo xtask setup` and never installed here: a host that starts what it
/// installs would be shut.
pub fn firewalld() -> PathBuf {
    target().join("packages/firewalld")
}

/// True when the test must be skipped, after saying why. On a machine that promised to have everything
/// (`CI` or `SPOKEGUARD_LAB=required`) a missing piece is a failure instead.
pub fn lacking(needs: &[Need]) -> bool {
    let missing = missing(needs);
    if missing.is_empty() {
        return false;
    }
    let text = missing.join("; ");
    let promised = std::env::var_os("CI").is_some_and(|value| !value.is_empty())
        || std::env::var_os("SPOKEGUARD_LAB").is_some_and(|value| value == "required");
    assert!(!promised, "this machine promised to run every test, but: {text}");
    eprintln!("skipped: {text}");
    true
}

/// Everything that is missing, each with the way to get it.
pub fn missing(needs: &[Need]) -> Vec<String> {
    let mut out = Vec::new();
    let mut program = |name: &str, package: &str| {
        if find(name).is_none() {
            out.push(format!("{name} is missing (apt-get install {package})"));
        }
    };
    for need in needs {
        match need {
            Need::Lab => {
                program("ip", "iproute2");
                program("nft", "nftables");
                program("unshare", "util-linux");
            }
            Need::WireGuard => {
                program("wg", "wireguard-tools");
                if !crate::tunnel::kernel_has_it() {
                    program("wireguard-go", "wireguard-go");
                }
            }
            Need::Cgroup2 | Need::MemoryGroup => {}
            Need::Faketime => program("faketime", "faketime"),
            Need::Tmux => program("tmux", "tmux"),
            Need::Nmap => program("nmap", "nmap"),
            Need::Masscan => program("masscan", "masscan"),
            // Below, with what is no program.
            Need::Libnmap | Need::Ansible => {}
            Need::Xmllint => program("xmllint", "libxml2-utils"),
            Need::Sshd => {
                program("sshd", "openssh-server");
                program("ssh", "openssh-client");
                program("ssh-keygen", "openssh-client");
            }
            Need::Iptables => {
                program("iptables-nft-restore", "iptables");
                program("ufw", "ufw");
            }
            Need::Prometheus => program("prometheus", "prometheus"),
            Need::Alertmanager => {
                program("prometheus-alertmanager", "prometheus-alertmanager");
                program("amtool", "prometheus-alertmanager");
            }
            Need::Compiler => program("cc", "gcc"),
            Need::Openssl => program("openssl", "openssl"),
            Need::Nspawn => {
                program("systemd-nspawn", "systemd-container");
                program("dbus-daemon", "dbus");
            }
            Need::Nix => program("nix-instantiate", "nix-bin"),
            Need::Debian => {
                program("dpkg", "dpkg, and a Debian around it");
                program("deb-systemd-helper", "init-system-helpers");
            }
            Need::Firewalld | Need::Spokeguard => {}
        }
    }
    if needs.contains(&Need::Debian) && cargo_deb().is_none() {
        out.push("cargo-deb is missing (cargo xtask setup)".to_string());
    }
    for (need, module) in [(Need::Libnmap, "libnmap"), (Need::Ansible, "ansible")] {
        if needs.contains(&need) && !has(module) {
            out.push(format!("Python's {module} is missing (cargo xtask setup)"));
        }
    }
    if needs.contains(&Need::Firewalld) && !firewalld().is_dir() {
        out.push("the packages of firewalld are missing (cargo xtask setup, on Debian as root)".to_string());
    }
    let in_a_lab = needs.iter().any(|need| ![Need::Spokeguard, Need::Nix].contains(need));
    if in_a_lab && !rustix::process::geteuid().is_root() {
        out.push("network namespaces need root".to_string());
    }
    if needs.contains(&Need::WireGuard)
        && !crate::tunnel::kernel_has_it()
        && !Path::new("/dev/net/tun").exists()
    {
        out.push("/dev/net/tun is missing and the kernel has no WireGuard (modprobe tun)".to_string());
    }
    if needs.contains(&Need::MemoryGroup) && crate::reaper::memory_group("sg-").is_none() {
        out.push("control groups don't bound memory here".to_string());
    }
    if needs.contains(&Need::Cgroup2) && crate::reaper::cgroup("sg-").is_none() {
        out.push("control groups of version 2 are not mounted".to_string());
    }
    if needs.contains(&Need::Spokeguard)
        && let Err(error) = crate::spokeguard()
    {
        out.push(format!("{error:#}"));
    }
    out
}

fn cargo_deb() -> Option<std::path::PathBuf> {
    let home = || Some(Path::new(&std::env::var_os("HOME")?).join(".cargo"));
    let home = std::env::var_os("CARGO_HOME").map(std::path::PathBuf::from).or_else(home)?;
    find("cargo-deb").or_else(|| Some(home.join("bin/cargo-deb")).filter(|path| path.is_file()))
}

fn has(module: &str) -> bool {
    let lib = python().parent().and_then(Path::parent).map(|folder| folder.join("lib"));
    let versions = lib.and_then(|lib| std::fs::read_dir(lib).ok()).into_iter().flatten().flatten();
    versions.map(|version| version.path().join("site-packages").join(module)).any(|path| path.is_dir())
}

/// The Python of the folder that `cargo xtask setup` fills.
pub fn python() -> PathBuf {
    target().join("python/bin/python3")
}

fn target() -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or(Path::new("/"));
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), Into::into)
}

/// Where a program is; the folders of administrators' programs too, which a user's PATH may lack.
pub(crate) fn find(name: &str) -> Option<std::path::PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = std::env::split_paths(&path).chain(["/usr/sbin".into(), "/sbin".into()]);
    folders.map(|folder| folder.join(name)).find(|path| path.is_file())
}
