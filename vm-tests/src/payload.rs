//! Our own programs for a machine, and the tests' data.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

use crate::cpio::Tree;
use crate::packages::{Arch, said};
use crate::scenario::{Disk, Scenario};

/// Where they are inside.
pub const FOLDER: &str = "opt/sg";

/// The programs, as cargo built them.
#[derive(Debug)]
pub struct Programs {
    pub product: PathBuf,
    /// The same as users get it, for whoever wants that.
    pub release: Option<PathBuf>,
    /// What runs the scenarios.
    pub lab: Vec<PathBuf>,
    /// The integration tests.
    pub tests: Option<PathBuf>,
    /// The product as Debian's package.
    pub package: Option<PathBuf>,
    /// The same of another version, to be upgraded from.
    pub earlier: Option<PathBuf>,
    /// The program that takes away what only a debugger wants.
    pub strip: &'static str,
}

const PRODUCT: &str = "spokeguard";
const HELPER: &str = "sg-lab-helper";
const GUEST: &str = "sg-vm-guest";
const TESTS: &str = "integration-tests";

/// What is built only where somebody needs it.
#[derive(Clone, Copy, Debug)]
pub struct Wanted {
    pub tests: bool,
    pub release: bool,
    pub package: bool,
}

/// Builds for machines of `arch`. Another architecture's are as users get them, and the lab's without what few tests
/// of this machine need: its emulation is slow, and so is building everything once more.
pub fn build(arch: Arch, wanted: Wanted) -> Result<Programs> {
    let tools = Tools::of(arch)?;
    let in_profile = |profile: &str, name: &str| tools.folder.join(profile).join(name);
    let own = tools.cross.is_none();
    let guest = ["--package", "spokeguard-vm-tests", "--bin", GUEST];
    let helper = ["--package", "spokeguard-tests", "--bin", HELPER];
    let product = ["--package", "spokeguard", "--bin", PRODUCT];
    // In one go, so that they share what they depend on.
    let mut cases = if own {
        vec![[guest, helper, product].concat()]
    } else {
        vec![[&guest[..], &helper, &["--no-default-features"]].concat()]
    };
    if wanted.release || !own {
        cases.push([&product[..], &["--release"]].concat());
    }
    for words in cases {
        let status = tools.cargo("build").args(words).stdin(Stdio::null()).status().context("start cargo")?;
        ensure!(status.success(), "cargo build for {}: {status}", arch.name());
    }
    let release = Some(in_profile("release", PRODUCT)).filter(|_| wanted.release || !own);
    let product = if own { in_profile("debug", PRODUCT) } else { in_profile("release", PRODUCT) };
    let tests = if wanted.tests { Some(integration_tests(&tools)?) } else { None };
    let lab = [HELPER, GUEST].map(|name| in_profile("debug", name)).to_vec();
    let out = crate::target().join("vm/package");
    let package = if wanted.package { Some(lab::debian_package(&product, &out)?) } else { None };
    Ok(Programs { product, release, lab, tests, package, earlier: None, strip: strip(arch) })
}

/// Programs that were built before, such as those that go to users, with the package and the integration tests
/// that lie beside them.
pub fn built(arch: Arch, folder: &Path) -> Result<Programs> {
    let product = folder.join(PRODUCT);
    let lab = [HELPER, GUEST].map(|name| folder.join(name)).to_vec();
    let package = package(arch, folder)?;
    let tests = Some(folder.join(TESTS)).filter(|path| path.is_file());
    let release = Some(product.clone());
    Ok(Programs { release, product, lab, tests, package, earlier: None, strip: strip(arch) })
}

/// The Debian package for an architecture that lies in a folder.
pub fn package(arch: Arch, folder: &Path) -> Result<Option<PathBuf>> {
    let end = format!("_{}.deb", arch.name());
    let entries = fs::read_dir(folder).with_context(|| format!("list {}", folder.display()))?.flatten();
    let mut packages =
        entries.map(|entry| entry.path()).filter(|path| path.to_string_lossy().ends_with(&end));
    let package = packages.next();
    let other = packages.next();
    ensure!(
        other.is_none(),
        "more than one package for {} is in {}: leave the one that is meant",
        arch.name(),
        folder.display()
    );
    Ok(package)
}

fn strip(arch: Arch) -> &'static str {
    // The one of binutils knows its own machine's files only.
    if arch == Arch::HOST { "strip" } else { "aarch64-linux-gnu-strip" }
}

/// What makes programs for an architecture.
struct Tools {
    cross: Option<Cross>,
    /// Where cargo leaves them.
    folder: PathBuf,
}

/// Debian's own compiler, whose standard library comes for other architectures, too.
struct Cross {
    cargo: &'static str,
    rustc: &'static str,
    triple: &'static str,
    linker: &'static str,
    target: PathBuf,
}

/// What must be there, and Debian's package for it.
const CROSS: [(&str, &str); 5] = [
    ("/usr/bin/cargo", "cargo-web"),
    ("/usr/bin/rustc", "rustc-web"),
    ("/usr/lib/rustlib/aarch64-unknown-linux-gnu/lib", "libstd-rust-web-dev:arm64"),
    ("/usr/bin/aarch64-linux-gnu-gcc", "gcc-aarch64-linux-gnu"),
    ("/usr/aarch64-linux-gnu/lib/libc.a", "libc6-dev-arm64-cross"),
];

impl Tools {
    fn of(arch: Arch) -> Result<Tools> {
        if arch == Arch::HOST {
            return Ok(Tools { cross: None, folder: crate::target() });
        }
        ensure!(arch == Arch::Arm64, "programs for {} are not built on {}", arch.name(), Arch::HOST.name());
        let missing =
            |(path, package): &(&str, &'static str)| (!Path::new(path).exists()).then_some(*package);
        let missing: Vec<&str> = CROSS.iter().filter_map(missing).collect();
        ensure!(
            missing.is_empty(),
            "programs for arm64 need packages: dpkg --add-architecture arm64; apt-get update; apt-get install {}",
            missing.join(" ")
        );
        let (triple, target) = ("aarch64-unknown-linux-gnu", crate::target().join("arm64"));
        let folder = target.join(triple);
        let [(cargo, _), (rustc, _), _, (linker, _), _] = CROSS;
        let cross = Some(Cross { cargo, rustc, triple, linker, target });
        Ok(Tools { cross, folder })
    }

    fn cargo(&self, verb: &str) -> Command {
        let Some(cross) = &self.cross else {
            let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
            command.current_dir(crate::root()).args([verb, "--quiet"]);
            return command;
        };
        let mut command = Command::new(cross.cargo);
        // What the cargo that started us says to its own compiler is not for this one.
        for name in ["RUSTUP_TOOLCHAIN", "LD_LIBRARY_PATH", "RUSTFLAGS", "CARGO_ENCODED_RUSTFLAGS"] {
            command.env_remove(name);
        }
        let (under, upper) = (cross.triple.replace('-', "_"), cross.triple.replace('-', "_").to_uppercase());
        command.env("RUSTC", cross.rustc).env(format!("CC_{under}"), cross.linker);
        command.env(format!("CARGO_TARGET_{upper}_LINKER"), cross.linker);
        // As users get them.
        command.env(format!("CARGO_TARGET_{upper}_RUSTFLAGS"), "-Ctarget-feature=+crt-static");
        command.env("CARGO_PROFILE_DEV_DEBUG", "false").env("CARGO_INCREMENTAL", "0");
        command.current_dir(crate::root()).args([verb, "--quiet", "--locked", "--target", cross.triple]);
        command.arg("--target-dir").arg(&cross.target);
        command
    }
}

fn integration_tests(tools: &Tools) -> Result<PathBuf> {
    let mut command = tools.cargo("test");
    command.args(["--package", "spokeguard-tests", "--test", "all", "--no-run", "--message-format=json"]);
    let output = command.stderr(Stdio::inherit()).stdin(Stdio::null()).output().context("start cargo")?;
    ensure!(output.status.success(), "cargo's build of the integration tests: {}", output.status);
    let messages = String::from_utf8_lossy(&output.stdout);
    // The package's other programs are built with it.
    let programs = (messages.lines())
        .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
        .filter(|message| message["target"]["name"] == "all");
    let named =
        programs.filter_map(|message| Some(PathBuf::from(message["executable"].as_str()?))).next_back();
    named.context("cargo names no program of the integration tests")
}

/// The part of a machine's root that is ours, with the words that say what to do there.
pub fn tree(programs: &Programs, scenario: &Scenario, scratch: &Path, words: &str) -> Result<Tree> {
    let release = programs.release.as_ref().filter(|_| scenario.release);
    ensure!(!scenario.release || release.is_some(), "the release was not built");
    let product = release.unwrap_or(&programs.product);
    let tests = programs.tests.as_ref().filter(|_| scenario.tests);
    ensure!(!scenario.tests || tests.is_some(), "the integration tests were not built");
    let mut tree = Tree::default();
    fs::create_dir_all(scratch).with_context(|| format!("create {}", scratch.display()))?;
    let name = |path: &PathBuf| path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let plain = programs.lab.iter().chain([product]).map(|path| (path, name(path)));
    let named = plain.chain(tests.map(|path| (path, TESTS.to_owned())));
    for (path, name) in named {
        ensure!(path.is_file(), "{} was not built", path.display());
        // That is most of it.
        let stripped = scratch.join(&name);
        said(Command::new(programs.strip).arg("--strip-debug").arg("-o").arg(&stripped).arg(path))?;
        tree.copy(&format!("{FOLDER}/{name}"), &stripped)?;
    }
    if tests.is_some() {
        // The tests look for their data where they were built.
        for data in ["tests/audit-cases", "tests/cases", "examples"] {
            let folder = crate::root().join(data);
            if folder.is_dir() {
                let at = folder.to_str().context("the workspace's path is not UTF-8")?;
                tree.below(at.trim_start_matches('/'), &folder, &|_| true)?;
            }
        }
    }
    let package = programs.package.as_ref().filter(|_| scenario.package);
    ensure!(!scenario.package || package.is_some(), "the package was not built");
    if let Some(package) = package {
        tree.copy(&format!("{FOLDER}/spokeguard.deb"), package)?;
        if let Some(earlier) = &programs.earlier {
            tree.copy(&format!("{FOLDER}/earlier.deb"), earlier)?;
        }
    }
    if scenario.disk == Disk::Systemd {
        tree.file(&format!("{FOLDER}/systemd"), 0o644, "");
    }
    tree.file(&format!("{FOLDER}/words"), 0o644, words);
    Ok(tree)
}
