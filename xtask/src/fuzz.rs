//! The fuzzers: every decoder of foreign bytes under libFuzzer, as many at once as there are cores.
//!
//! The decoders are safe Rust, so that what can be found is panics, endless loops and memory without bound;
//! no sanitizer is asked for, and the compiler that builds everything else will do. Only our own packages
//! are built anew, with libFuzzer's instruments.

use std::collections::VecDeque;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use anyhow::{Context, Result, ensure};

const FOLDER: &str = "tests/fuzz";
/// Address space of one fuzzer, in KiB: what a decoder may ask for, and libFuzzer's own tables.
const MEMORY_KIB: u32 = 2 << 20;

/// `decoder`: one of the folders of seeds; `None`: each of them, so many seconds long.
pub fn run(decoder: Option<&str>, seconds: u64) -> Result<()> {
    let all = decoders()?;
    let chosen: VecDeque<&String> =
        all.iter().filter(|name| decoder.is_none_or(|wanted| *name == wanted)).collect();
    ensure!(
        !chosen.is_empty(),
        "no decoder is called {}: there are {}",
        decoder.unwrap_or(""),
        all.join(" ")
    );
    let program = build()?;
    let at_once = std::thread::available_parallelism().map_or(1, usize::from).min(chosen.len());
    println!("==> {} decoders, {seconds} s each, {at_once} at a time", chosen.len());
    let (queue, failed) = (Mutex::new(chosen), Mutex::new(Vec::new()));
    let next = || queue.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
    std::thread::scope(|scope| {
        for _ in 0..at_once {
            scope.spawn(|| {
                while let Some(name) = next() {
                    match one(&program, name, seconds) {
                        Ok(said) => println!("    {name:<18} {said}"),
                        Err(error) => {
                            println!("    {name:<18} FAILED: {error:#}");
                            failed.lock().unwrap_or_else(PoisonError::into_inner).push(name.as_str());
                        }
                    }
                }
            });
        }
    });
    let failed = failed.into_inner().unwrap_or_else(PoisonError::into_inner);
    ensure!(
        failed.is_empty(),
        "what {} fails on is in {FOLDER}/artifacts/; once that is mended, the file belongs into \
         {FOLDER}/seeds/DECODER/, where the tests find it",
        failed.join(", ")
    );
    Ok(())
}

/// Each has a folder with seeds; the tests see to that.
fn decoders() -> Result<Vec<String>> {
    let folder = Path::new(FOLDER).join("seeds");
    let entries = fs::read_dir(&folder).with_context(|| format!("read {}", folder.display()))?;
    let names: std::io::Result<Vec<_>> =
        entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect();
    let mut names = names.with_context(|| format!("read {}", folder.display()))?;
    names.sort();
    Ok(names)
}

fn build() -> Result<PathBuf> {
    let mut command = super::cargo();
    command
        .args(["build", "--quiet", "--package", "spokeguard-fuzz", "--features", "libfuzzer"])
        .env("RUSTC_WORKSPACE_WRAPPER", super::root().join(FOLDER).join("rustc"));
    let shown = super::shown(&command);
    let status = command.status().with_context(|| format!("start `{shown}`"))?;
    ensure!(status.success(), "`{shown}`: {status}");
    Ok(super::setup::target().join("debug/decoder"))
}

/// Gives libFuzzer's count, or its last words.
fn one(program: &Path, name: &str, seconds: u64) -> Result<String> {
    let folder = |kind: &str| {
        let folder = Path::new(FOLDER).join(kind).join(name);
        fs::create_dir_all(&folder).with_context(|| format!("create {}", folder.display()))?;
        anyhow::Ok(folder)
    };
    let (corpus, artifacts) = (folder("corpus")?, folder("artifacts")?);
    let started = Instant::now();
    let output = Command::new("sh")
        .args(["-c", &format!("ulimit -c 0; ulimit -v {MEMORY_KIB}; exec \"$@\""), "sh"])
        .arg(program)
        .args([&corpus, &Path::new(FOLDER).join("seeds").join(name)])
        .args(["-max_len=65536", "-timeout=10", "-rss_limit_mb=1536", "-print_final_stats=1"])
        .arg(format!("-max_total_time={seconds}"))
        .arg(format!("-artifact_prefix={}/", artifacts.display()))
        .env("SPOKEGUARD_FUZZ", name)
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("start {}", program.display()))?;
    let said = String::from_utf8_lossy(&output.stderr);
    let lines: Vec<&str> = said.lines().collect();
    let last = lines[lines.len().saturating_sub(30)..].join("\n");
    ensure!(output.status.success(), "{}\n{last}", output.status);
    let count = lines.iter().find_map(|line| line.strip_prefix("stat::number_of_executed_units:"));
    let count: u64 = count.and_then(|count| count.trim().parse().ok()).with_context(|| last.clone())?;
    // Without its instruments it would go round in circles, and be content.
    let covered = lines.iter().rev().find_map(|line| line.split_once(" cov: ")?.1.split(' ').next());
    let covered = covered.with_context(|| format!("no place was counted:\n{last}"))?;
    Ok(format!("{count:>9} inputs in {:>3} s, {covered:>5} places", started.elapsed().as_secs()))
}
