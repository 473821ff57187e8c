//! The fuzzers: every decoder of foreign bytes under libFuzzer, one after the other.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

const FOLDER: &str = "tests/fuzz";
/// The one that this was written with.
const CARGO_FUZZ: &str = "0.13.2";

/// `decoder`: one of the folders of seeds; `None`: each of them, so many seconds long.
pub fn run(decoder: Option<&str>, seconds: u64) -> Result<()> {
    let all = decoders()?;
    let chosen: Vec<&String> =
        all.iter().filter(|name| decoder.is_none_or(|wanted| *name == wanted)).collect();
    ensure!(
        !chosen.is_empty(),
        "no decoder is called {}: there are {}",
        decoder.unwrap_or(""),
        all.join(" ")
    );
    tools()?;
    // The workspace's versions, to which cargo adds what the fuzzers need besides.
    let lock = Path::new(FOLDER).join("Cargo.lock");
    if !lock.exists() {
        std::fs::copy("Cargo.lock", &lock).with_context(|| format!("write {}", lock.display()))?;
    }
    for name in chosen {
        println!("==> {name}, {seconds} s");
        let corpus = PathBuf::from(FOLDER).join("corpus").join(name);
        std::fs::create_dir_all(&corpus).with_context(|| format!("create {}", corpus.display()))?;
        let status = fuzz()
            .args(["run", "--fuzz-dir", FOLDER, "--target-dir", "target/fuzz", "decoder"])
            .args([&corpus, &PathBuf::from(FOLDER).join("seeds").join(name)])
            .args(["--", "-max_len=65536", "-timeout=10", "-rss_limit_mb=1536", "-malloc_limit_mb=512"])
            .arg(format!("-max_total_time={seconds}"))
            .env("SPOKEGUARD_FUZZ", name)
            .status()
            .context("start cargo fuzz")?;
        if !status.success() {
            bail!(
                "the decoder {name} fails on the file that is named above; once it is mended, the file belongs into \
                 {FOLDER}/seeds/{name}/, where the tests find it"
            );
        }
    }
    Ok(())
}

/// Each has a folder with seeds; the tests see to that.
fn decoders() -> Result<Vec<String>> {
    let folder = Path::new(FOLDER).join("seeds");
    let entries = std::fs::read_dir(&folder).with_context(|| format!("read {}", folder.display()))?;
    let names: std::io::Result<Vec<_>> =
        entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect();
    let mut names = names.with_context(|| format!("read {}", folder.display()))?;
    names.sort();
    Ok(names)
}

/// By rustup: the compiler that runs us is a stable one.
fn fuzz() -> Command {
    let mut command = Command::new("rustup");
    command.args(["run", "nightly", "cargo", "fuzz"]);
    for name in ["CARGO", "RUSTC", "RUSTUP_TOOLCHAIN"] {
        command.env_remove(name);
    }
    command
}

fn tools() -> Result<()> {
    let works = |command: &mut Command| command.output().is_ok_and(|output| output.status.success());
    ensure!(
        works(Command::new("rustup").args(["run", "nightly", "rustc", "--version"])),
        "fuzzing needs a nightly compiler, and this machine has none: rustup toolchain install nightly"
    );
    if works(fuzz().arg("--version")) {
        return Ok(());
    }
    println!("==> cargo-fuzz is missing: installing {CARGO_FUZZ}");
    let wanted = ["install", "cargo-fuzz", "--locked", "--version", CARGO_FUZZ];
    let status = super::cargo().args(wanted).status().context("start cargo install")?;
    ensure!(status.success(), "cargo-fuzz could not be installed: cargo {}", wanted.join(" "));
    Ok(())
}
