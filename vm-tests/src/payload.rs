//! Our own programs for a machine, and the tests' data.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

use crate::cpio::Tree;
use crate::packages::said;

/// Where they are inside.
pub const FOLDER: &str = "opt/sg";

/// The programs, as cargo built them.
#[derive(Debug)]
pub struct Programs {
    /// spokeguard, sg-lab-helper, sg-vm-guest.
    pub plain: Vec<PathBuf>,
    /// The integration tests.
    pub tests: Option<PathBuf>,
}

/// Builds for this machine's architecture; the tests only when they are wanted.
pub fn build(tests: bool) -> Result<Programs> {
    let packages = ["spokeguard", "spokeguard-tests", "spokeguard-vm-tests"];
    let mut command = cargo();
    command.args(["build", "--quiet", "--bins"]);
    for package in packages {
        command.args(["--package", package]);
    }
    run(&mut command)?;
    let folder = crate::target().join("debug");
    let plain = ["spokeguard", "sg-lab-helper", "sg-vm-guest"].map(|name| folder.join(name)).to_vec();
    let tests = if tests { Some(integration_tests()?) } else { None };
    Ok(Programs { plain, tests })
}

fn integration_tests() -> Result<PathBuf> {
    let words = ["test", "--quiet", "--package", "spokeguard-tests", "--test", "all", "--no-run"];
    let mut command = cargo();
    command.args(words).arg("--message-format=json").stderr(Stdio::inherit()).stdin(Stdio::null());
    let output = command.output().context("start cargo")?;
    ensure!(output.status.success(), "cargo {}: {}", words.join(" "), output.status);
    let messages = String::from_utf8_lossy(&output.stdout);
    // The package's other programs are built with it.
    let programs = (messages.lines())
        .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
        .filter(|message| message["target"]["name"] == "all");
    let named =
        programs.filter_map(|message| Some(PathBuf::from(message["executable"].as_str()?))).next_back();
    named.context("cargo names no program of the integration tests")
}

fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(crate::root());
    command
}

fn run(command: &mut Command) -> Result<()> {
    let status = command.stdin(Stdio::null()).status().context("start cargo")?;
    ensure!(status.success(), "cargo build: {status}");
    Ok(())
}

/// The part of a machine's root that is ours, with the words that say what to do there.
pub fn tree(programs: &Programs, scratch: &Path, words: &str) -> Result<Tree> {
    let mut tree = Tree::default();
    fs::create_dir_all(scratch).with_context(|| format!("create {}", scratch.display()))?;
    let tests = programs.tests.iter().map(|path| (path, "integration-tests".to_owned()));
    let name = |path: &PathBuf| path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let plain = programs.plain.iter().map(|path| (path, name(path)));
    for (path, name) in plain.chain(tests) {
        ensure!(path.is_file(), "{} was not built", path.display());
        // What a debugger wants is most of it.
        let stripped = scratch.join(&name);
        said(Command::new("strip").arg("--strip-debug").arg("-o").arg(&stripped).arg(path))?;
        tree.copy(&format!("{FOLDER}/{name}"), &stripped)?;
    }
    if programs.tests.is_some() {
        // The tests look for their data where they were built.
        for data in ["tests/audit-cases", "tests/cases", "examples"] {
            let folder = crate::root().join(data);
            if folder.is_dir() {
                let at = folder.to_str().context("the workspace's path is not UTF-8")?;
                tree.below(at.trim_start_matches('/'), &folder, &|_| true)?;
            }
        }
    }
    tree.file(&format!("{FOLDER}/words"), 0o644, words);
    Ok(tree)
}
