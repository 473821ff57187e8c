//! Every decoder of foreign bytes on captures of real ones, whole and changed at random: none may panic, hang, or
//! ask for memory without bound. The fuzzers (`cargo xtask fuzz`) do the same for longer and with more wit.
//!
//! The work is done in a process of its own, which has no more memory than it should need. What it last looked at
//! is in a file, so that whatever ends it can be had again: `tests/fuzz/seeds/DECODER/` is where it belongs then.

use std::collections::BTreeMap;
use std::os::unix::fs::FileExt as _;
use std::panic::catch_unwind;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use lab::foreign::{Decode, decoders};

use crate::guard::Dice;

const INSIDE: &str = "SPOKEGUARD_DECODERS";
const TEST: &str = "decoders::captures_whole_and_changed_harm_no_decoder";
/// For each decoder.
const QUICK: Duration = Duration::from_millis(120);
const LONG: Duration = Duration::from_secs(10);
/// No input is longer; the kernel's datagrams are at most half of it.
const BYTES_MAX: usize = 64 * 1024;
/// What one input may take, on a busy machine and without optimisation.
const SLOW: Duration = Duration::from_secs(4);
/// Address space of the process: its own code and threads, and what decoders may ask for.
const MEMORY_MAX: u64 = 1 << 30;

#[test]
fn captures_whole_and_changed_harm_no_decoder() {
    if let Some(last) = std::env::var_os(INSIDE) {
        return all(Path::new(&last));
    }
    let folder = tempfile::tempdir().unwrap();
    let last = folder.path().join("input");
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", TEST, "--nocapture", "--test-threads=1"])
        .env(INSIDE, &last)
        .stderr(std::fs::File::create(folder.path().join("stderr")).unwrap())
        .stdout(std::fs::File::create(folder.path().join("stdout")).unwrap())
        .spawn()
        .unwrap();
    let limit = Instant::now() + decoders().count() as u32 * (time() * 3 + Duration::from_secs(1));
    let status =
        lab::wait_until(limit - Instant::now(), "all decoders are done", || child.try_wait().unwrap());
    if status.is_err() {
        child.kill().unwrap();
        child.wait().unwrap();
    }
    let said = ["stdout", "stderr"].map(|name| std::fs::read_to_string(folder.path().join(name)).unwrap());
    let written = std::fs::read(&last).unwrap_or_default();
    let end = written.iter().position(|byte| *byte == b'\n').unwrap_or(0);
    let (name, length) = std::str::from_utf8(&written[..end]).unwrap().split_once(' ').unwrap_or_default();
    let input = &written[end..][1.min(written.len())..][..length.parse().unwrap_or(0)];
    let ended_well = status.as_ref().is_ok_and(|status| status.success());
    assert!(
        ended_well,
        "{status:?} at the decoder {name:?} with {} bytes: {}\n{}",
        input.len(),
        input.escape_ascii(),
        said.concat()
    );
    print!("{}", said[0]);
    assert!(said[0].contains("1 passed"), "{}", said.concat());
}

fn time() -> Duration {
    let all = std::env::var_os("SPOKEGUARD_ALL").is_some();
    if all { LONG } else { QUICK }
}

fn all(last: &Path) {
    use rustix::process::{Resource, Rlimit, setrlimit};
    let limit = Rlimit { current: Some(MEMORY_MAX), maximum: Some(MEMORY_MAX) };
    setrlimit(Resource::As, limit).unwrap();
    let last = std::fs::File::create(last).unwrap();
    let mut seeds = seeds();
    let mut done = 0u64;
    for (name, decode) in decoders() {
        let mine = seeds.remove(name).unwrap_or_default();
        assert!(!mine.is_empty(), "{name} has no seed");
        // One that no decoder understands would leave all behind its first lines untried. What libFuzzer
        // found and called so is there for what it did, and may be refused.
        let found = |file: &Path| {
            let name = file.file_name().unwrap_or_default().to_string_lossy();
            ["crash-", "oom-", "timeout-"].iter().any(|kind| name.starts_with(kind))
        };
        for (file, bytes) in &mine {
            assert!(one(name, decode, bytes, &last) || found(file), "{} is not understood", file.display());
        }
        let seed =
            name.bytes().fold(std::process::id().into(), |n: u64, byte| n.wrapping_mul(31) + u64::from(byte));
        let mut dice = Dice::new(seed);
        let until = Instant::now() + time();
        while Instant::now() < until {
            let input = changed(&mut dice, &mine);
            one(name, decode, &input, &last);
            done += 1;
        }
    }
    assert!(seeds.is_empty(), "seeds of no decoder: {:?}", seeds.keys());
    println!("{done} inputs");
}

fn one(name: &str, decode: Decode, input: &[u8], last: &std::fs::File) -> bool {
    let head = format!("{name} {}\n", input.len());
    last.write_all_at(&[head.as_bytes(), input].concat(), 0).unwrap();
    let started = Instant::now();
    let sound = catch_unwind(|| decode(input));
    assert!(started.elapsed() < SLOW, "{name} took {:?}: {}", started.elapsed(), input.escape_ascii());
    sound.unwrap_or_else(|_| panic!("{name} panicked on {}", input.escape_ascii()))
}

/// By the decoder that they are for, which their folder is called by.
fn seeds() -> BTreeMap<String, Vec<(PathBuf, Vec<u8>)>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/seeds");
    let list = |folder: &Path| -> Vec<PathBuf> {
        let mut all: Vec<_> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
        all.sort();
        all
    };
    let of = |folder: PathBuf| {
        let name = folder.file_name().unwrap().to_string_lossy().into_owned();
        let read = |file: PathBuf| {
            let bytes = std::fs::read(&file).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
            (file, bytes)
        };
        (name, list(&folder).into_iter().map(read).collect())
    };
    list(&folder).into_iter().map(of).collect()
}

fn changed(dice: &mut Dice, seeds: &[(PathBuf, Vec<u8>)]) -> Vec<u8> {
    let mut bytes = dice.pick(seeds).1.clone();
    for _ in 0..1 + dice.below(6) {
        let at = dice.below(bytes.len().max(1));
        let length = dice.below(bytes.len() - at.min(bytes.len()) + 1).min(64);
        match dice.below(9) {
            0 => bytes.truncate(at),
            1 | 2 if !bytes.is_empty() => bytes[at] ^= 1 << dice.below(8),
            3 if !bytes.is_empty() => bytes[at] = *dice.pick(&[0, 1, 0x7f, 0x80, 0xff, b'"', b'\n', b'-']),
            // Lengths and numbers in the kernel's byte order, and in the network's.
            4 if at + 4 <= bytes.len() => {
                let number =
                    *dice.pick(&[0u32, 1, 3, 4, 5, 15, 16, 0xffff, 0x7fff_ffff, u32::MAX, u32::MAX - 3]);
                bytes[at..at + 4].copy_from_slice(&number.to_ne_bytes());
            }
            5 if at + 2 <= bytes.len() => {
                let number = *dice.pick(&[0u16, 1, 3, 4, 5, 0x7fff, 0x8000, u16::MAX]);
                bytes[at..at + 2].copy_from_slice(&number.to_be_bytes());
            }
            6 => drop(bytes.drain(at..at + length)),
            7 => {
                let part = bytes[at..at + length].to_vec();
                let to = dice.below(bytes.len() + 1);
                bytes.splice(to..to, part);
            }
            _ => {
                // What another one has there.
                let other = &dice.pick(seeds).1;
                let from = dice.below(other.len().max(1));
                let part = other.get(from..(from + length).min(other.len())).unwrap_or_default().to_vec();
                bytes.splice(at..at, part);
            }
        }
    }
    bytes.truncate(BYTES_MAX);
    bytes
}
