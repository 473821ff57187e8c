//! Builds the eBPF object with whatever toolchain is here, so that plain `cargo build`
//! works, and tells the crate where it is (`SPOKEGUARD_EBPF_OBJECT`) and what it hashes to
//! (`SPOKEGUARD_EBPF_BUILD`); the same for the other objects.
//!
//! The target `bpfel-unknown-none` has no prebuilt `core`, so the compiler must come with
//! the library's source. On a stable compiler `RUSTC_BOOTSTRAP=1` unlocks `-Z build-std`.
//! Where there is no such compiler, `SPOKEGUARD_EBPF_OBJECTS` names a folder with objects
//! that were built elsewhere: they are the same for every architecture.

use std::env;
use std::ffi::OsString;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, exit};

const TARGET: &str = "bpfel-unknown-none";
/// The counters and the two guards, which are pinned, and the audit's programs, which never are.
const BINARIES: [(&str, &str, &str); 4] = [
    ("spokeguard-ebpf", "spokeguard.bpf.o", "SPOKEGUARD_EBPF_OBJECT"),
    ("spokeguard-probe", "spokeguard-probe.bpf.o", "SPOKEGUARD_PROBE_OBJECT"),
    ("spokeguard-bind", "spokeguard-bind.bpf.o", "SPOKEGUARD_BIND_OBJECT"),
    ("spokeguard-guard", "spokeguard-guard.bpf.o", "SPOKEGUARD_GUARD_OBJECT"),
];

const GIVEN: &str = "SPOKEGUARD_EBPF_OBJECTS";

/// A compiler that has the source of `core`.
struct Toolchain {
    cargo: PathBuf,
    rustc: PathBuf,
}

fn main() {
    let manifest = PathBuf::from(required("CARGO_MANIFEST_DIR"));
    let workspace = manifest.parent().unwrap_or(&manifest).to_path_buf();
    for path in ["sidecar-ebpf/src", "sidecar-ebpf/Cargo.toml", "Cargo.toml", "Cargo.lock"] {
        println!("cargo::rerun-if-changed={}", workspace.join(path).display());
    }
    println!("cargo::rerun-if-changed=build.rs");
    for variable in [GIVEN, "SPOKEGUARD_BPF_CARGO", "SPOKEGUARD_BPF_RUSTC", "SPOKEGUARD_BPF_LINKER"] {
        println!("cargo::rerun-if-env-changed={variable}");
    }

    let objects = match env::var_os(GIVEN) {
        Some(folder) => given(Path::new(&folder)),
        None => build(&workspace),
    };
    let objects = match objects {
        Ok(objects) => objects,
        Err(text) => {
            // A panic would bury the text below a backtrace hint.
            eprintln!("\n{text}");
            exit(1);
        }
    };
    for ((_, _, variable), object) in BINARIES.iter().zip(&objects) {
        println!("cargo::rustc-env={variable}={}", object.display());
    }
    for ((_, _, variable), object) in BINARIES.iter().zip(&objects) {
        let bytes = fs::read(object).unwrap_or_default();
        println!("cargo::rustc-env={}={}", variable.replace("_OBJECT", "_BUILD"), fnv1a(&bytes));
    }
}

/// Objects built before, by the names that they have in an earlier build's OUT_DIR.
fn given(folder: &Path) -> Result<Vec<PathBuf>, String> {
    if !folder.is_absolute() {
        return Err(format!("error: {GIVEN}={}: write the folder's full path", folder.display()));
    }
    let one = |(_, name, _): &(&str, &str, &str)| {
        let path = folder.join(name);
        println!("cargo::rerun-if-changed={}", path.display());
        let elf = fs::read(&path).is_ok_and(|bytes| bytes.starts_with(b"\x7fELF"));
        if elf { Ok(path) } else { Err(format!("error: {GIVEN}: {}: no such object", path.display())) }
    };
    BINARIES.iter().map(one).collect()
}

fn build(workspace: &Path) -> Result<Vec<PathBuf>, String> {
    let mut tried = String::new();
    let toolchain = toolchain(&mut tried);
    let linker = linker();
    let (Some(toolchain), Some(linker)) = (&toolchain, &linker) else {
        return Err(missing(toolchain.is_none(), linker.is_none(), &tried));
    };
    // Only a compiler's own file says that it was replaced by another version.
    println!("cargo::rerun-if-changed={}", toolchain.rustc.display());
    println!("cargo::rerun-if-changed={}", linker.display());

    let target_dir = target_dir();
    let mut command = Command::new(&toolchain.cargo);
    clean(&mut command);
    command
        .current_dir(workspace)
        .args(["build", "--quiet", "--locked", "--release", "--package", "sidecar-ebpf", "--bins"])
        .args(["--features", "program", "--target", TARGET, "-Z", "build-std=core", "--target-dir"])
        .arg(&target_dir)
        .env("RUSTC", &toolchain.rustc)
        .env("RUSTC_BOOTSTRAP", "1")
        .env("CARGO_TARGET_BPFEL_UNKNOWN_NONE_LINKER", linker)
        // Nanoseconds per packet come before bytes here, unlike in the rest of the
        // workspace; and the symbols are the names of programs and maps.
        .env("CARGO_PROFILE_RELEASE_OPT_LEVEL", "3")
        .env("CARGO_PROFILE_RELEASE_STRIP", "none");
    let output = command
        .output()
        .map_err(|error| format!("error: could not run {}: {error}", toolchain.cargo.display()))?;
    if !output.status.success() {
        return Err(format!(
            "error: the eBPF programs did not build ({} with {}, linked by {}):\n\n{}",
            toolchain.cargo.display(),
            toolchain.rustc.display(),
            linker.display(),
            String::from_utf8_lossy(&output.stderr)
        ));
    }
    // Warnings of the inner build would otherwise be lost.
    for line in String::from_utf8_lossy(&output.stderr).lines().filter(|line| line.starts_with("warning")) {
        println!("cargo::warning=eBPF: {line}");
    }
    // Two profiles share the inner target directory; each keeps the objects it embeds.
    let (built, out) = (target_dir.join(TARGET).join("release"), PathBuf::from(required("OUT_DIR")));
    let keep = |(binary, name, _): &(&str, &str, &str)| {
        let (from, to) = (built.join(binary), out.join(name));
        fs::copy(&from, &to).map_err(|error| format!("error: copy of {}: {error}", from.display()))?;
        Ok(to)
    };
    BINARIES.iter().map(keep).collect()
}

/// The first compiler that can do it: the one that was named, the one that builds us, a
/// rustup nightly, or the distribution's.
fn toolchain(tried: &mut String) -> Option<Toolchain> {
    let mut candidates = Vec::new();
    if let (Some(cargo), Some(rustc)) =
        (env::var_os("SPOKEGUARD_BPF_CARGO"), env::var_os("SPOKEGUARD_BPF_RUSTC"))
    {
        candidates.push((PathBuf::from(cargo), PathBuf::from(rustc)));
    }
    candidates.push((PathBuf::from(required("CARGO")), PathBuf::from(required("RUSTC"))));
    if let (Some(cargo), Some(rustc)) = (rustup_which("cargo"), rustup_which("rustc")) {
        candidates.push((cargo, rustc));
    }
    candidates.push((PathBuf::from("/usr/bin/cargo"), PathBuf::from("/usr/bin/rustc")));

    for (cargo, rustc) in candidates {
        let Some(rustc) = absolute(&rustc) else { continue };
        let Some(sysroot) = stdout(Command::new(&rustc).args(["--print", "sysroot"])) else { continue };
        let library = Path::new(&sysroot).join("lib/rustlib/src/rust/library/core/Cargo.toml");
        if library.is_file() && (cargo.is_file() || absolute(&cargo).is_some()) {
            return Some(Toolchain { cargo: absolute(&cargo)?, rustc });
        }
        let _ = writeln!(tried, "  {} has no {}", rustc.display(), library.display());
    }
    None
}

fn rustup_which(tool: &str) -> Option<PathBuf> {
    stdout(Command::new("rustup").args(["which", "--toolchain", "nightly", tool])).map(PathBuf::from)
}

fn linker() -> Option<PathBuf> {
    if let Some(named) = env::var_os("SPOKEGUARD_BPF_LINKER") {
        return absolute(Path::new(&named));
    }
    let home = env::var_os("CARGO_HOME")
        .map(PathBuf::from)
        .or_else(|| env::var_os("HOME").map(|home| PathBuf::from(home).join(".cargo")));
    absolute(Path::new("bpf-linker"))
        .or_else(|| home.map(|home| home.join("bin/bpf-linker")).filter(|path| path.is_file()))
}

/// A program by its path, or by its name on PATH.
fn absolute(program: &Path) -> Option<PathBuf> {
    if program.components().count() > 1 {
        return program.is_file().then(|| program.to_path_buf());
    }
    env::split_paths(&env::var_os("PATH")?).map(|dir| dir.join(program)).find(|path| path.is_file())
}

/// One directory for all profiles, beside theirs, so that `core` is built once; below
/// OUT_DIR where the layout is not Cargo's usual one.
fn target_dir() -> PathBuf {
    let out = PathBuf::from(required("OUT_DIR"));
    let target = out.ancestors().find(|dir| dir.join("CACHEDIR.TAG").is_file());
    target.map_or_else(|| out.join("ebpf"), |target| target.join("ebpf"))
}

/// What the outer cargo (or clippy, or a rustup proxy) says to its own compiler must not
/// reach the inner one: flags, wrappers, the chosen toolchain, its libraries.
fn clean(command: &mut Command) {
    const KEEP: [&str; 5] =
        ["CARGO_HOME", "CARGO_NET_", "CARGO_HTTP_", "CARGO_REGISTRIES_", "CARGO_REGISTRY_"];
    const DROP: [&str; 11] = [
        "CARGO",
        "RUSTC",
        "RUSTDOC",
        "RUSTFLAGS",
        "RUSTUP_TOOLCHAIN",
        "MAKEFLAGS",
        "MFLAGS",
        "LD_LIBRARY_PATH",
        "CLIPPY_",
        "DEP_",
        "__CARGO",
    ];
    for (name, _) in env::vars_os() {
        let text = name.to_string_lossy();
        if DROP.iter().any(|drop| text.starts_with(drop)) && !KEEP.iter().any(|keep| text.starts_with(keep)) {
            command.env_remove(&name);
        }
    }
}

fn missing(toolchain: bool, linker: bool, tried: &str) -> String {
    let mut text = String::from("error: the eBPF programs can't be built here.\n");
    if toolchain {
        let _ = write!(
            text,
            "\nNo Rust compiler with the source of its library was found:\n{tried}\n\
             With rustup:  rustup toolchain install nightly --component rust-src\n\
             On Debian:    apt-get install rustc-web cargo-web rust-web-src\n\
             Elsewhere:    set SPOKEGUARD_BPF_CARGO and SPOKEGUARD_BPF_RUSTC to such a pair\n"
        );
    }
    if linker {
        text.push_str(
            "\nbpf-linker is neither on PATH nor in ~/.cargo/bin (or name it in SPOKEGUARD_BPF_LINKER). Its LLVM must\n\
             not be older than the compiler's (rustc -vV):\n\
             With LLVM from Debian:  apt-get install llvm-22-dev libpolly-22-dev libzstd-dev zlib1g-dev\n\
             \u{20}                       LLVM_PREFIX=/usr/lib/llvm-22 cargo install bpf-linker --version 0.13.0 \
             --no-default-features --features llvm-22\n\
             Or the released one:    cargo binstall bpf-linker\n",
        );
    }
    text.push_str("\n`cargo xtask setup` does this on Debian.\n");
    text
}

fn stdout(command: &mut Command) -> Option<String> {
    let mut inner = Command::new(command.get_program());
    inner.args(command.get_args());
    clean(&mut inner);
    let output = inner.output().ok().filter(|output| output.status.success())?;
    Some(String::from_utf8(output.stdout).ok()?.trim().to_owned()).filter(|text| !text.is_empty())
}

fn required(name: &str) -> OsString {
    env::var_os(name).unwrap_or_else(|| panic!("cargo sets {name} for build scripts"))
}

/// Names an object among the few that one host ever sees; it guards against nothing.
fn fnv1a(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3))
}
