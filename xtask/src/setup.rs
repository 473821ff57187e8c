//! What building and testing need beyond a Rust toolchain, and where it comes from.
//!
//! On Debian as root it is installed. Elsewhere it is listed with the way to get it, and nothing is changed.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};

use crate::dist::Arch;

/// A program that some step runs, and Debian's package for it.
const PROGRAMS: &[(&str, &str)] = &[
    ("ip", "iproute2"),
    ("ss", "iproute2"),
    ("nft", "nftables"),
    ("unshare", "util-linux"),
    ("ps", "procps"),
    ("nmap", "nmap"),
    // Measured beside.
    ("masscan", "masscan"),
    ("iptables-nft", "iptables"),
    ("python3", "python3-venv"),
    ("openssl", "openssl"),
    ("xmllint", "libxml2-utils"),
    ("sshd", "openssh-server"),
    ("ssh", "openssh-client"),
    ("iptables-nft-restore", "iptables"),
    ("ufw", "ufw"),
    ("wg", "wireguard-tools"),
    ("wireguard-go", "wireguard-go"),
    ("prometheus", "prometheus"),
    ("promtool", "prometheus"),
    ("prometheus-alertmanager", "prometheus-alertmanager"),
    ("amtool", "prometheus-alertmanager"),
    ("prometheus-node-exporter", "prometheus-node-exporter"),
    ("tcpdump", "tcpdump"),
    ("iperf3", "iperf3"),
    ("conntrack", "conntrack"),
    ("systemd-nspawn", "systemd-container"),
    ("dbus-daemon", "dbus"),
    ("faketime", "faketime"),
    // Evaluates the NixOS module, which needs no more of Nix than that.
    ("nix-instantiate", "nix-bin"),
    ("tmux", "tmux"),
    ("script", "bsdutils"),
    // Real kernels: their packages are unpacked, never installed.
    ("qemu-system-x86_64", "qemu-system-x86"),
    ("qemu-system-aarch64", "qemu-system-arm"),
    ("depmod", "kmod"),
    ("xz", "xz-utils"),
    ("strip", "binutils"),
    // libFuzzer is C++.
    ("c++", "g++"),
    ("mke2fs", "e2fsprogs"),
    // Installs the disk of a machine with systemd.
    ("mmdebstrap", "mmdebstrap"),
];

/// A Rust compiler that comes with the source of its library, for the eBPF target.
const BPF_COMPILER: &[&str] = &["rustc-web", "cargo-web", "rust-web-src"];

/// What bpf-linker is built against.
const LLVM: &[&str] = &["llvm-22-dev", "libpolly-22-dev", "libzstd-dev", "zlib1g-dev"];
const LLVM_PREFIX: &str = "/usr/lib/llvm-22";

const BPF_LINKER: &[&str] = &[
    "install",
    "bpf-linker",
    "--version",
    "0.13.0",
    "--locked",
    "--no-default-features",
    "--features",
    "llvm-22",
];
/// Programs that others wrote in Python, in a folder of their own below cargo's: what can be asked for once it is
/// there, and what to install.
const PYTHON: &[(&str, &str)] = &[
    // Reads nmap's XML.
    ("libnmap.parser", "python-libnmap==0.7.3"),
    // Runs the role in contrib/ansible.
    ("ansible.cli.playbook", "ansible-core==2.19.14"),
];

/// Run in a container only: a host that starts what it installs would be shut.
const FIREWALLD: &str = "firewalld";
const FIREWALLD_FOLDER: &str = "packages/firewalld";
/// Grafana's own types for dashboards and what checks them, in a folder of their own beside it, where there
/// is npm. Without it one test is skipped.
const GRAFANA_SCHEMA: &[&str] = &["@grafana/schema@11.6.16", "typescript@5.9.3"];

/// For static programs of the other architecture: what is there once it is installed, and Debian's package. The
/// standard library must be of the compiler's version, which apt sees to.
const CROSS: &[(&str, &str)] = &[
    ("/usr/bin/aarch64-linux-gnu-gcc", "gcc-aarch64-linux-gnu"),
    ("/usr/aarch64-linux-gnu/lib/libc.a", "libc6-dev-arm64-cross"),
    ("/usr/lib/rustlib/aarch64-unknown-linux-gnu/lib", "libstd-rust-web-dev:arm64"),
    ("/usr/bin/qemu-aarch64-static", "qemu-user-static"),
];

/// Judges bills of materials, for `cargo xtask dist --check`.
const CYCLONEDX: (&str, &str) =
    ("cyclonedx.validation.json", "cyclonedx-python-lib[json-validation]==11.12.0");

const CARGO_DEB: &[&str] = &["install", "cargo-deb", "--version", "3.8.0", "--locked"];
const CARGO_DENY: &[&str] = &["install", "cargo-deny", "--version", "0.20.2", "--locked"];

/// How often a download is tried.
const TRIES: u32 = 3;

pub fn setup() -> Result<()> {
    let mut packages = missing_packages();
    let linker = find("bpf-linker").is_none();
    if linker && !Path::new(LLVM_PREFIX).join("bin/llvm-config").exists() {
        packages.extend(LLVM);
    }
    packages.sort_unstable();
    packages.dedup();
    let deny = find("cargo-deny").is_none();
    let deb = find("cargo-deb").is_none();
    let python = missing_python(PYTHON);
    let firewalld = target().join(FIREWALLD_FOLDER);
    let contained = firewalld.is_dir();
    let schema = schema_folder();
    let no_schema = find("npm").is_some() && !schema.join("node_modules/@grafana/schema").is_dir();
    if packages.is_empty() && !linker && !deny && !deb && python.is_empty() && contained && !no_schema {
        println!("setup: everything is there");
        return Ok(());
    }
    if !packages.is_empty() {
        let here = find("apt-get").is_some() && Path::new("/etc/debian_version").exists();
        ensure!(here && is_root(), "{}", advice(&packages, linker, deny, here));
        apt(&packages)?;
        let left = missing_packages();
        ensure!(left.is_empty(), "still missing after the installation: {}", left.join(" "));
    }
    if linker {
        timed(
            "bpf-linker 0.13.0, about a minute",
            cargo_install(BPF_LINKER).env("LLVM_PREFIX", LLVM_PREFIX),
        )?;
    }
    if deny {
        timed("cargo-deny 0.20.2, about three minutes", &mut cargo_install(CARGO_DENY))?;
    }
    cargo_deb()?;
    pip_install(&python)?;
    if !contained {
        download(FIREWALLD, &firewalld)?;
    }
    if no_schema {
        fs::create_dir_all(&schema).with_context(|| format!("create {}", schema.display()))?;
        let mut npm = Command::new("npm");
        npm.args(["install", "--ignore-scripts", "--no-audit", "--no-fund", "--silent", "--no-save"]);
        timed("@grafana/schema", npm.args(GRAFANA_SCHEMA).current_dir(&schema))?;
    }
    Ok(())
}

fn pip_install(packages: &[&str]) -> Result<()> {
    if packages.is_empty() {
        return Ok(());
    }
    timed("a folder for Python", Command::new("python3").args(["-m", "venv"]).arg(python_folder()))?;
    // Not by its own name: that is a script with the full path of the folder that it was made for.
    let mut pip = Command::new(python());
    pip.args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check"]).args(packages);
    timed(&packages.join(", "), &mut pip)
}

pub fn target() -> PathBuf {
    crate::root().join(std::env::var_os("CARGO_TARGET_DIR").unwrap_or_else(|| "target".into()))
}

/// What `cargo xtask dist` needs beyond that.
pub fn dist(arches: &[Arch], check: bool) -> Result<()> {
    // Whatever the compiler in use can do, these are built by Debian's.
    let compiler =
        BPF_COMPILER.iter().filter(|_| !Path::new("/usr/lib/rustlib/src/rust/library/core").exists());
    install(&compiler.copied().collect::<Vec<_>>())?;
    if arches.contains(&Arch::Aarch64) {
        cross()?;
    }
    if check {
        pip_install(&missing_python(&[CYCLONEDX]))?;
    }
    cargo_deb()
}

/// What makes and runs programs for aarch64 on x86_64.
pub fn cross() -> Result<()> {
    ensure!(std::env::consts::ARCH == "x86_64", "programs for aarch64 are made on x86_64");
    let missing: Vec<&str> =
        CROSS.iter().filter(|(file, _)| !Path::new(file).exists()).map(|(_, package)| *package).collect();
    if !missing.is_empty() && is_root() && find("dpkg").is_some() {
        timed("packages of arm64", Command::new("dpkg").args(["--add-architecture", "arm64"]))?;
    }
    install(&missing)
}

fn cargo_deb() -> Result<()> {
    if find("cargo-deb").is_some() {
        return Ok(());
    }
    timed("cargo-deb 3.8.0, about three minutes", &mut cargo_install(CARGO_DEB))
}

fn install(packages: &[&str]) -> Result<()> {
    if packages.is_empty() {
        return Ok(());
    }
    let here = find("apt-get").is_some() && Path::new("/etc/debian_version").exists();
    ensure!(here && is_root(), "{}", advice(packages, false, false, here));
    apt(packages)
}

fn python_folder() -> PathBuf {
    target().join("python")
}

/// Fetches a package and what it needs beyond what is installed here, and installs none of it.
fn download(package: &str, folder: &Path) -> Result<()> {
    if find("apt-get").is_none() || !is_root() {
        println!("setup: {package} is not downloaded (needs root on Debian); its test will say so");
        return Ok(());
    }
    let half = folder.with_extension("half");
    fs::create_dir_all(half.join("partial")).with_context(|| format!("create {}", half.display()))?;
    let apt = |arguments: &[&str]| apt_get(&half, arguments);
    timed("apt-get update", &mut apt(&["update"]))?;
    let words = ["install", "--download-only", "--no-install-recommends", package];
    timed(&format!("download of {package}, which is not installed"), &mut apt(&words))?;
    // What is left is packages alone.
    for path in [half.join("lock"), half.join("partial")] {
        let removed = if path.is_dir() { fs::remove_dir(&path) } else { fs::remove_file(&path) };
        removed.with_context(|| format!("remove {}", path.display()))?;
    }
    fs::rename(&half, folder).with_context(|| format!("name {}", folder.display()))
}

fn schema_folder() -> PathBuf {
    target().join("grafana-schema")
}

/// The Python of that folder.
pub fn python() -> PathBuf {
    python_folder().join("bin/python3")
}

fn missing_python(wanted: &[(&str, &'static str)]) -> Vec<&'static str> {
    let there = |module: &str| {
        let mut python = Command::new(python());
        let asked = python.args(["-c", &format!("import {module}")]).stderr(Stdio::null()).status();
        asked.is_ok_and(|status| status.success())
    };
    wanted.iter().filter(|(module, _)| !there(module)).map(|(_, package)| *package).collect()
}

fn missing_packages() -> Vec<&'static str> {
    let mut packages: Vec<&str> =
        PROGRAMS.iter().filter(|(name, _)| find(name).is_none()).map(|(_, package)| *package).collect();
    if !bpf_compiler() {
        packages.extend(BPF_COMPILER);
    }
    packages
}

/// Whether some compiler can build a core library for eBPF: the one in use, rustup's nightly or the
/// distribution's. sidecar/build.rs looks in the same places and decides.
fn bpf_compiler() -> bool {
    if std::env::var_os("SPOKEGUARD_BPF_RUSTC").is_some() {
        return true;
    }
    let said = |command: &mut Command| {
        let output = command.stderr(Stdio::null()).output().ok().filter(|output| output.status.success())?;
        Some(PathBuf::from(String::from_utf8_lossy(&output.stdout).trim().to_string()))
    };
    // `rustup which` never fetches a toolchain, as `rustup run` might.
    let nightly = said(Command::new("rustup").args(["which", "--toolchain", "nightly", "rustc"]));
    [Some("rustc".into()), nightly, Some("/usr/bin/rustc".into())].into_iter().flatten().any(
        |rustc: PathBuf| {
            said(Command::new(rustc).args(["--print", "sysroot"]))
                .is_some_and(|sysroot| sysroot.join("lib/rustlib/src/rust/library/core/Cargo.toml").exists())
        },
    )
}

/// What to type where nothing is installed for you.
fn advice(packages: &[&str], linker: bool, deny: bool, debian: bool) -> String {
    let mut out = if debian {
        format!(
            "missing, and not root. Run this and come back:\n  sudo apt-get install --no-install-recommends {}",
            packages.join(" ")
        )
    } else {
        let mut out = String::from(
            "missing, and this is no Debian. Get these with your system's means (Debian's names):\n",
        );
        out += &packages.iter().map(|package| format!("  {package}\n")).collect::<String>();
        out + "The compiler for eBPF may be rustup's: rustup toolchain install nightly --component rust-src"
    };
    if linker {
        out += &format!("\n  LLVM_PREFIX={LLVM_PREFIX} cargo {}", BPF_LINKER.join(" "));
    }
    if deny {
        out += &format!("\n  cargo {}", CARGO_DENY.join(" "));
    }
    out
}

/// Packages are downloaded into `archives`: some images empty apt's own folder after every command of anybody's, also
/// while another installs from it.
fn apt_get(archives: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new("apt-get");
    command.args(["-o", "Acquire::Retries=3", "-o", "DPkg::Lock::Timeout=120", "-qq", "-y"]).args(arguments);
    command.arg("-o").arg(format!("Dir::Cache::archives={}", archives.display()));
    command.env("DEBIAN_FRONTEND", "noninteractive");
    command
}

/// Installs packages without starting their services: nothing may begin to listen because a test was run.
fn apt(packages: &[&str]) -> Result<()> {
    let _quiet = NoServices::begin()?;
    println!("setup: apt-get install {} (their services are not started)", packages.join(" "));
    let folder = target().join(format!("apt-{}", std::process::id()));
    fs::create_dir_all(folder.join("partial")).with_context(|| format!("make {}", folder.display()))?;
    let apt = |arguments: &[&str]| apt_get(&folder, arguments);
    let install: Vec<&str> = ["install", "--no-install-recommends"].iter().chain(packages).copied().collect();
    for attempt in 1..=TRIES {
        let done = timed("apt-get update", &mut apt(&["update"]))
            .and_then(|()| timed("apt-get install", &mut apt(&install)));
        match done {
            Ok(()) => {
                return fs::remove_dir_all(&folder).with_context(|| format!("remove {}", folder.display()));
            }
            Err(error) if attempt == TRIES => return Err(error),
            Err(error) => eprintln!("setup: try {attempt} of {TRIES}: {error:#}"),
        }
        // What was begun and broke off, now or in an earlier run, is in the way of the next try.
        let mut configure = Command::new("dpkg");
        configure.args(["--configure", "-a"]).env("DEBIAN_FRONTEND", "noninteractive");
        let mended = [
            timed("dpkg --configure -a", &mut configure),
            timed("apt-get --fix-broken install", &mut apt(&["--fix-broken", "--no-remove", "install"])),
        ];
        mended.into_iter().filter_map(Result::err).for_each(|error| eprintln!("setup: {error:#}"));
    }
    bail!("no try was made")
}

const NO_SERVICES: &str =
    "#!/bin/sh\n# Written by `cargo xtask setup` of spokeguard for the time of an installation.\nexit 101\n";

/// While it lives, Debian's packages ask it whether to start their services, and the answer is no.
struct NoServices(Option<PathBuf>);

impl NoServices {
    fn begin() -> Result<NoServices> {
        let path = PathBuf::from("/usr/sbin/policy-rc.d");
        // Somebody else's decision stands. One of ours is what an interrupted setup left, and ends with this one.
        if path.exists() && fs::read_to_string(&path).ok().as_deref() != Some(NO_SERVICES) {
            return Ok(NoServices(None));
        }
        fs::write(&path, NO_SERVICES).with_context(|| format!("write {}", path.display()))?;
        let guard = NoServices(Some(path.clone()));
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755))
            .with_context(|| format!("make {} executable", path.display()))?;
        Ok(guard)
    }
}

impl Drop for NoServices {
    fn drop(&mut self) {
        if let Some(path) = &self.0
            && let Err(error) = fs::remove_file(path)
        {
            eprintln!("setup: remove {}: {error}", path.display());
        }
    }
}

fn cargo_install(arguments: &[&str]) -> Command {
    let mut command = crate::cargo();
    command.args(arguments);
    // This is another program's build: the workspace's target folder and flags are not for it.
    for name in ["CARGO_TARGET_DIR", "RUSTFLAGS", "CARGO_ENCODED_RUSTFLAGS", "CARGO_BUILD_TARGET"] {
        command.env_remove(name);
    }
    command
}

/// Runs a long command quietly and says how long it took; its last words are shown when it failed.
fn timed(what: &str, command: &mut Command) -> Result<()> {
    println!("setup: {what} ...");
    let started = Instant::now();
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("start `{}`", crate::shown(command)))?;
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text);
    let last =
        text.lines().rev().take(40).collect::<Vec<_>>().into_iter().rev().collect::<Vec<_>>().join("\n");
    ensure!(output.status.success(), "`{}`: {}\n{last}", crate::shown(command), output.status);
    println!("setup: {what} done in {:.0} s", started.elapsed().as_secs_f64());
    Ok(())
}

fn is_root() -> bool {
    let id = Command::new("id").arg("-u").output();
    id.is_ok_and(|output| output.stdout.trim_ascii() == b"0")
}

/// On the PATH, among administrators' programs, or where `cargo install` puts things.
pub fn find(name: &str) -> Option<PathBuf> {
    let home = std::env::var_os("HOME").map(PathBuf::from).unwrap_or_default();
    let installed =
        std::env::var_os("CARGO_HOME").map_or_else(|| home.join(".cargo"), PathBuf::from).join("bin");
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin".into(), "/sbin".into(), installed])
        .map(|folder| folder.join(name))
        .find(|path| path.is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_advice_can_be_typed_in() {
        let text = advice(&["nmap", "nftables"], true, false, true);
        assert!(text.contains("sudo apt-get install --no-install-recommends nmap nftables\n"), "{text}");
        assert!(
            text.contains("LLVM_PREFIX=/usr/lib/llvm-22 cargo install bpf-linker --version 0.13.0"),
            "{text}"
        );
        assert!(!text.contains("cargo-deny"), "{text}");
        let text = advice(&["nmap"], false, true, false);
        assert!(text.contains("  nmap\n") && text.contains("cargo install cargo-deny"), "{text}");
        assert!(!text.contains("sudo") && !text.contains("bpf-linker"), "{text}");
    }

    #[test]
    fn a_failed_command_shows_its_last_words() {
        let mut command = Command::new("sh");
        command.args(["-c", "seq 1 100; echo the reason >&2; exit 4"]);
        let error = timed("a failure", &mut command).unwrap_err().to_string();
        assert!(error.contains("the reason") && error.contains("exit status: 4"), "{error}");
        assert!(!error.contains("\n10\n"), "{error}");
        assert!(timed("a success", Command::new("sh").args(["-c", "exit 0"])).is_ok());
    }
}
