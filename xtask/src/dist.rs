//! `cargo xtask dist`: static binaries and what goes to users beside them, the same bytes from the same commit
//! wherever the tree lies.
//!
//! Everything is built by Debian's compiler, which has a standard library for the other architecture and the
//! library's source for eBPF; rustup's need not be there.

mod bill;
mod elf;
mod package;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};

use crate::{Steps, setup};

const CARGO: &str = "/usr/bin/cargo";
const RUSTC: &str = "/usr/bin/rustc";

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Arch {
    X86_64,
    Aarch64,
}

pub const ARCHES: [Arch; 2] = [Arch::X86_64, Arch::Aarch64];

impl Arch {
    pub fn named(name: &str) -> Result<Arch> {
        let known = ARCHES.into_iter().find(|arch| arch.name() == name);
        known.with_context(|| format!("no architecture {name}: x86_64 or aarch64"))
    }

    pub fn name(self) -> &'static str {
        match self {
            Arch::X86_64 => "x86_64",
            Arch::Aarch64 => "aarch64",
        }
    }

    fn triple(self) -> &'static str {
        match self {
            Arch::X86_64 => "x86_64-unknown-linux-gnu",
            Arch::Aarch64 => "aarch64-unknown-linux-gnu",
        }
    }

    fn debian(self) -> &'static str {
        match self {
            Arch::X86_64 => "amd64",
            Arch::Aarch64 => "arm64",
        }
    }

    /// A C compiler for it, which is also the linker.
    fn compiler(self) -> String {
        let here = self.name() == std::env::consts::ARCH;
        if here { "cc".into() } else { format!("{}-linux-gnu-gcc", self.name()) }
    }

    /// Of binutils, which knows its own machine's files only.
    fn strip(self) -> String {
        let here = self.name() == std::env::consts::ARCH;
        if here { "strip".into() } else { format!("{}-linux-gnu-strip", self.name()) }
    }

    /// A command that runs its programs here.
    fn run(self, program: &Path) -> Command {
        if self.name() == std::env::consts::ARCH {
            return Command::new(program);
        }
        let mut command = Command::new(format!("qemu-{}-static", self.name()));
        command.arg(program);
        command
    }
}

/// A tree, and what a build of it must not depend on but for these.
struct Source {
    tree: PathBuf,
    /// Seconds since 1970: the date of everything that is made.
    epoch: u64,
    /// Where its builds go.
    target: PathBuf,
}

/// Builds everything for `arches` into target/dist; with `check` once more in another folder, and compares.
pub fn dist(arches: &[Arch], check: bool) -> Result<()> {
    setup::dist(arches, check)?;
    let target = setup::target();
    let source = Source { tree: crate::root(), epoch: epoch()?, target: target.join("dist-build") };
    let out = target.join("dist");
    let mut steps = Steps::default();
    make(&source, arches, &out, &mut steps)?;
    if check {
        let folder = Scratch::new("spokeguard-elsewhere")?;
        let other = Source {
            // Neither of the same name nor of the same length.
            tree: folder.0.join("a/tree that lies elsewhere"),
            epoch: source.epoch,
            target: folder.0.join("built"),
        };
        copy_tree(&source.tree, &other.tree)?;
        let again = folder.0.join("again");
        make(&other, arches, &again, &mut steps)?;
        steps.step("the same bytes from both folders", || same(&out, &again))?;
        let bills: Vec<PathBuf> = files(&out)?
            .iter()
            .filter(|name| name.ends_with(".cdx.json"))
            .map(|name| out.join(name))
            .collect();
        steps.step("bills of materials keep to their definition", || bill::assert_valid(&bills))?;
    }
    println!("\nin {}:", out.display());
    print!("{}", fs::read_to_string(out.join(SUMS)).context("read the checksums")?);
    Ok(())
}

/// Tar and Debian package of a program that is there already, for tests: quick, and not for users.
pub fn package_of(program: &Path, out: &Path) -> Result<()> {
    let arch = elf::arch(program)?;
    let folder = Scratch::new("spokeguard-package")?;
    let source = Source { tree: crate::root(), epoch: epoch()?, target: folder.0.clone() };
    fs::create_dir_all(out).with_context(|| format!("create {}", out.display()))?;
    // Nobody debugs it, and it is packed and unpacked often.
    let stripped = folder.0.join("stripped");
    said(Command::new(arch.strip()).arg("-o").arg(&stripped).arg(program))?;
    let stage = package::Stage::new(&source, arch, &stripped, &package::Papers::default())?;
    stage.tar(out, true)?;
    println!("{}", stage.deb(out, true)?.display());
    Ok(())
}

const SUMS: &str = "SHA256SUMS";

fn make(source: &Source, arches: &[Arch], out: &Path, steps: &mut Steps) -> Result<()> {
    // What an earlier run left would be in the checksums.
    let _ = fs::remove_dir_all(out);
    fs::create_dir_all(out).with_context(|| format!("create {}", out.display()))?;
    let mut objects = None;
    for &arch in arches {
        let name = arch.name();
        let mut program = PathBuf::new();
        steps.step(&format!("{name}: static program"), || {
            program = build(source, arch, objects.as_deref())?;
            objects = Some(objects_of(source, arch)?);
            elf::assert_static(&program, arch)?;
            says_nothing_of_here(source, &program)
        })?;
        steps.step(&format!("{name}: it runs"), || runs(source, arch, &program))?;
        steps.step(&format!("{name}: bill of materials, licences, archives"), || {
            let papers = bill::papers(source, arch)?;
            let stage = package::Stage::new(source, arch, &program, &papers)?;
            stage.tar(out, false)?;
            stage.deb(out, false)?;
            fs::write(out.join(format!("spokeguard-{}-{name}.cdx.json", stage.version)), &papers.bill)
                .context("write the bill of materials")
        })?;
    }
    let names = files(out)?;
    let sums = said(Command::new("sha256sum").current_dir(out).arg("--").args(&names))?;
    fs::write(out.join(SUMS), sums).context("write the checksums")?;
    // As users do it.
    steps.step("checksums are of these files, and of all of them", || {
        let checked = said(Command::new("sha256sum").current_dir(out).args(["--check", "--strict", SUMS]))?;
        let unchecked = |name: &String| name != SUMS && !checked.contains(&format!("{name}: OK\n"));
        let left: Vec<String> = files(out)?.into_iter().filter(unchecked).collect();
        ensure!(left.is_empty(), "not among the checksums: {}", left.join(", "));
        Ok(())
    })
}

/// `objects`: a folder with the eBPF objects, which are the same for every architecture.
fn build(source: &Source, arch: Arch, objects: Option<&Path>) -> Result<PathBuf> {
    let triple = arch.triple();
    let mut command = Command::new(CARGO);
    clean(&mut command);
    command.current_dir(&source.tree).args(["build", "--quiet", "--locked", "--release"]);
    command.args(["--package", "spokeguard", "--bin", "spokeguard", "--target", triple, "--target-dir"]);
    command.arg(&source.target).env("RUSTC", RUSTC);
    let paths = paths(source)?;
    let mut flags = vec!["-Ctarget-feature=+crt-static".to_owned()];
    flags.extend(paths.iter().map(|(from, to)| format!("--remap-path-prefix={from}={to}")));
    command.env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"));
    // A path with a blank would be two flags, and assembler files have no paths that matter.
    let c: Vec<String> = paths
        .iter()
        .filter(|(from, _)| !from.contains(' '))
        .map(|(from, to)| format!("-ffile-prefix-map={from}={to}"))
        .collect();
    let (under, upper) = (triple.replace('-', "_"), triple.replace('-', "_").to_uppercase());
    command.env(format!("CFLAGS_{under}"), c.join(" ")).env(format!("CC_{under}"), arch.compiler());
    command.env(format!("CARGO_TARGET_{upper}_LINKER"), arch.compiler());
    command.env("SOURCE_DATE_EPOCH", source.epoch.to_string()).env("CARGO_INCREMENTAL", "0");
    command.env_remove(OBJECTS);
    if let Some(objects) = objects {
        command.env(OBJECTS, objects);
    }
    let status = command.stdin(Stdio::null()).status().with_context(|| format!("start {CARGO}"))?;
    ensure!(status.success(), "the build for {triple}: {status}");
    Ok(source.target.join(triple).join("release/spokeguard"))
}

/// sidecar/build.rs takes the objects from there.
const OBJECTS: &str = "SPOKEGUARD_EBPF_OBJECTS";

/// Where the last build left its eBPF objects, for the next architecture: copied, since they are named by hashes.
fn objects_of(source: &Source, arch: Arch) -> Result<PathBuf> {
    let to = source.target.join("objects");
    let built = source.target.join(arch.triple()).join("release/build");
    let mut newest = None;
    for name in files(&built)?.iter().filter(|name| name.starts_with("spokeguard-")) {
        let folder = built.join(name).join("out");
        if let Ok(at) = fs::metadata(folder.join("spokeguard.bpf.o")).and_then(|data| data.modified()) {
            newest = newest.max(Some((at, folder)));
        }
    }
    match newest {
        Some((_, from)) => {
            package::copy(&from, &to)?;
            Ok(to)
        }
        // It was given them itself.
        None => Ok(to),
    }
}

/// What no path in a program may begin with, and what stands there instead. Later ones win.
fn paths(source: &Source) -> Result<Vec<(String, &'static str)>> {
    let home = cargo_home()?;
    let mut paths = vec![
        (source.tree.display().to_string(), "/spokeguard"),
        (source.target.display().to_string(), "/spokeguard/target"),
        (home.display().to_string(), "/cargo"),
    ];
    // Named after whatever mirror the crates came from.
    let mut fetch = Command::new(CARGO);
    clean(&mut fetch);
    said(fetch.current_dir(&source.tree).env("RUSTC", RUSTC).args(["fetch", "--quiet", "--locked"]))?;
    let registry = home.join("registry/src");
    for name in files(&registry)? {
        paths.push((registry.join(name).display().to_string(), "/cargo/registry"));
    }
    Ok(paths)
}

/// What whoever started us says to its own cargo is not for this one.
fn clean(command: &mut Command) {
    const KEEP: [&str; 5] =
        ["CARGO_HOME", "CARGO_NET_", "CARGO_HTTP_", "CARGO_REGISTRIES_", "CARGO_REGISTRY_"];
    const DROP: [&str; 9] =
        ["CARGO", "RUSTC", "RUSTDOC", "RUSTFLAGS", "RUSTUP_", "LD_LIBRARY_PATH", "CFLAGS", "CC_", "TARGET_"];
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy();
        if DROP.iter().any(|drop| text.starts_with(drop)) && !KEEP.iter().any(|keep| text.starts_with(keep)) {
            command.env_remove(&name);
        }
    }
    command.env_remove("CC");
}

/// Paths of the machine that built it would be different bytes on another, and nobody's business.
fn says_nothing_of_here(source: &Source, program: &Path) -> Result<()> {
    let bytes = fs::read(program).with_context(|| format!("read {}", program.display()))?;
    for (path, _) in paths(source)? {
        let found = bytes.windows(path.len()).any(|window| window == path.as_bytes());
        ensure!(!found, "{} has {path} in it", program.display());
    }
    Ok(())
}

/// A proof that the program does something on the machine it is for, or on what stands in for it.
fn runs(source: &Source, arch: Arch, program: &Path) -> Result<()> {
    let version = said(arch.run(program).arg("--version"))?;
    ensure!(version == format!("spokeguard {}\n", version_of(&source.tree)?), "--version says {version:?}");
    let policy = source.tree.join("examples/spoke.toml");
    let right = said(arch.run(program).args(["policy", "check", "--policy"]).arg(&policy))?;
    ensure!(right.contains(": right, for "), "policy check says {right:?}");
    let codes = said(arch.run(program).arg("explain"))?;
    ensure!(codes.contains("listener-exposed"), "explain says {codes:?}");
    Ok(())
}

/// The same files with the same bytes, or which differ.
fn same(one: &Path, other: &Path) -> Result<()> {
    let names = files(one)?;
    ensure!(names == files(other)?, "not the same files: {names:?} and {:?}", files(other)?);
    let read = |folder: &Path, name: &str| fs::read(folder.join(name)).with_context(|| name.to_owned());
    let mut differ = Vec::new();
    for name in names {
        if read(one, &name)? != read(other, &name)? {
            differ.push(name);
        }
    }
    ensure!(differ.is_empty(), "not the same bytes: {}", differ.join(", "));
    Ok(())
}

fn files(folder: &Path) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(folder).with_context(|| format!("read {}", folder.display()))? {
        names.push(entry?.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    Ok(names)
}

/// What git knows of the tree, as it is now; other files are nobody's source.
fn copy_tree(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to).with_context(|| format!("create {}", to.display()))?;
    let list = Command::new("git")
        .current_dir(from)
        .args(["ls-files", "-z", "--cached", "--others", "--exclude-standard"])
        .output()
        .context("start git")?;
    ensure!(list.status.success(), "git ls-files: {}", String::from_utf8_lossy(&list.stderr).trim());
    for name in String::from_utf8(list.stdout).context("names of files")?.split_terminator('\0') {
        let (source, target) = (from.join(name), to.join(name));
        if !source.is_file() {
            continue;
        }
        let folder = target.parent().context("a file has a folder")?;
        fs::create_dir_all(folder).with_context(|| format!("create {}", folder.display()))?;
        fs::copy(&source, &target).with_context(|| format!("copy {name}"))?;
    }
    Ok(())
}

/// The commit's time, or what the environment says where there is no git.
fn epoch() -> Result<u64> {
    let text = match std::env::var("SOURCE_DATE_EPOCH") {
        Ok(text) => text,
        Err(_) => said(Command::new("git").current_dir(crate::root()).args(["log", "-1", "--format=%ct"]))
            .context("the time of the commit (without git, set SOURCE_DATE_EPOCH)")?,
    };
    text.trim().parse().with_context(|| format!("SOURCE_DATE_EPOCH={text:?} is no number of seconds"))
}

fn version_of(tree: &Path) -> Result<String> {
    let path = tree.join("Cargo.toml");
    let text = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
    let line = text.lines().find_map(|line| line.strip_prefix("version = \"")?.strip_suffix('"'));
    line.map(str::to_owned).with_context(|| format!("{} has no version", path.display()))
}

fn cargo_home() -> Result<PathBuf> {
    let home = std::env::var_os("CARGO_HOME").map(PathBuf::from);
    let home = home.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cargo")));
    home.context("neither CARGO_HOME nor HOME is set")
}

/// The standard output of a command that must succeed.
fn said(command: &mut Command) -> Result<String> {
    let shown = crate::shown(command);
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("start `{shown}`"))?;
    if !output.status.success() {
        bail!("`{shown}`: {}\n{}", output.status, String::from_utf8_lossy(&output.stderr).trim());
    }
    String::from_utf8(output.stdout).with_context(|| format!("what `{shown}` says"))
}

/// A folder that goes with the value.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Result<Scratch> {
        let path = std::env::temp_dir().join(format!("{name}-{}", std::process::id()));
        fs::create_dir(&path).with_context(|| format!("create {}", path.display()))?;
        Ok(Scratch(path))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_byte_or_one_file_more_is_not_the_same() {
        let folder = Scratch::new("sg-dist-same").unwrap();
        let (one, other) = (folder.0.join("one"), folder.0.join("other"));
        for path in [&one, &other] {
            fs::create_dir(path).unwrap();
            fs::write(path.join("a"), "same").unwrap();
            fs::write(path.join("b"), "same").unwrap();
        }
        same(&one, &other).unwrap();
        fs::write(other.join("b"), "sane").unwrap();
        assert_eq!(same(&one, &other).unwrap_err().to_string(), "not the same bytes: b");
        fs::write(other.join("c"), "").unwrap();
        assert!(same(&one, &other).unwrap_err().to_string().starts_with("not the same files"));
    }

    #[test]
    fn a_copy_has_what_git_has() {
        let folder = Scratch::new("sg-dist-copy").unwrap();
        let to = folder.0.join("a b");
        copy_tree(&crate::root(), &to).unwrap();
        assert!(to.join("xtask/src/dist.rs").is_file() && to.join("Cargo.lock").is_file());
        assert!(!to.join("target").exists() && !to.join(".git").exists());
        assert_eq!(version_of(&to).unwrap(), env!("CARGO_PKG_VERSION"));
    }
}
