//! `cargo xtask`: what a fresh clone needs, and what a change has to pass.
//!
//! It knows the project by cargo's commands only and links none of it, so that it builds in seconds and
//! works when the rest does not.

mod dist;
mod fuzz;
mod integration;
mod setup;

use std::collections::BTreeSet;
use std::fs::File;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::{Arg, ArgAction, ArgMatches};

/// Programs of the package `tests` that are a command here, listed as soon as their source is there.
const PROGRAMS: &[(&str, &str)] = &[
    ("demo", "Show the main job on a lab of network namespaces on this machine"),
    ("bench", "Measure beside the peers, in one run"),
];

/// The machines' harness: cargo's words that run it.
const VM: &[&str] = &["run", "--quiet", "--package", "spokeguard-vm-tests", "--bin", "vm", "--"];

/// What each decoder gets under `test --all`; by hand it is longer.
const FUZZ_S: u64 = 10;

fn main() -> ExitCode {
    match run(&commands().get_matches()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn commands() -> clap::Command {
    let all = Arg::new("all")
        .long("all")
        .action(ArgAction::SetTrue)
        .help("Also the integration tests' long forms against the release build, the fuzzers, `dist --check` and every machine of `vm --list` (hours)");
    let mut commands = clap::Command::new("cargo xtask")
        .about("Sets up, tests and shows spokeguard")
        .subcommand_required(true)
        .arg_required_else_help(true)
        .subcommand(
            clap::Command::new("setup")
                .about("Install what building and testing need, or say what is missing"),
        )
        .subcommand(
            clap::Command::new("test").about("Set up, then everything that a change has to pass").arg(all),
        );
    let decoder = Arg::new("decoder").help("A folder of tests/fuzz/seeds; none: each in turn");
    let seconds = Arg::new("seconds")
        .long("seconds")
        .value_parser(clap::value_parser!(u64).range(1..))
        .default_value("60")
        .help("How long for each");
    commands = commands.subcommand(
        clap::Command::new("fuzz")
            .about("Put random bytes to the decoders, by libFuzzer")
            .args([decoder, seconds]),
    );
    let arch = Arg::new("arch")
        .long("arch")
        .value_parser(dist::ARCHES.map(dist::Arch::name))
        .action(ArgAction::Append)
        .help("One architecture only; none: both");
    let check = Arg::new("check")
        .long("check")
        .action(ArgAction::SetTrue)
        .help("Build once more in another folder and compare every byte");
    let package_of = Arg::new("package-of").long("package-of").value_name("PROGRAM").hide(true);
    let out = Arg::new("out").long("out").value_name("DIR").default_value("target/dist").hide(true);
    commands = commands.subcommand(
        clap::Command::new("dist")
            .about("Static programs, Debian packages, manual pages, checksums and bills of materials")
            .args([arch, check, package_of, out]),
    );
    let vm = ("vm", "Boot real kernels under QEMU and run scenarios inside (--list: which)");
    for (name, about) in programs().chain([vm]) {
        let rest = Arg::new("arguments").num_args(0..).trailing_var_arg(true).allow_hyphen_values(true);
        commands = commands.subcommand(clap::Command::new(name).about(about).arg(rest));
    }
    commands
}

fn programs() -> impl Iterator<Item = (&'static str, &'static str)> {
    PROGRAMS.iter().copied().filter(|(name, _)| root().join(format!("tests/src/bin/{name}.rs")).is_file())
}

fn run(matches: &ArgMatches) -> Result<()> {
    std::env::set_current_dir(root()).with_context(|| format!("go to {}", root().display()))?;
    match matches.subcommand() {
        Some(("setup", _)) => setup::setup(),
        Some(("fuzz", matches)) => {
            let decoder = matches.get_one::<String>("decoder").map(String::as_str);
            fuzz::run(decoder, *matches.get_one("seconds").context("seconds have a default")?)
        }
        Some(("dist", matches)) => distribute(matches),
        Some(("test", matches)) => test(matches.get_flag("all")),
        Some((name, matches)) => {
            let arguments: Vec<&String> = matches.get_many("arguments").into_iter().flatten().collect();
            if name == "vm" { vm(&arguments) } else { program(name, &arguments) }
        }
        None => bail!("no command"),
    }
}

/// The folder above this package's.
fn root() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here).to_path_buf()
}

fn distribute(matches: &ArgMatches) -> Result<()> {
    let word = |name: &str| matches.get_one::<String>(name).map(PathBuf::from);
    if let (Some(program), Some(out)) = (word("package-of"), word("out")) {
        return dist::package_of(&program, &out);
    }
    let arches: Vec<_> = matches.get_many::<String>("arch").into_iter().flatten().collect();
    match &*arches {
        [] => dist::dist(&dist::ARCHES, matches.get_flag("check")),
        some => {
            let some: Vec<_> = some.iter().map(|name| dist::Arch::named(name)).collect::<Result<_>>()?;
            dist::dist(&some, matches.get_flag("check"))
        }
    }
}

/// Builds and becomes one of the programs, so that Ctrl-C and the exit code are its own.
fn program(name: &str, arguments: &[&String]) -> Result<()> {
    setup::setup()?;
    let mut steps = Steps::default();
    steps.cargo(
        "build, release",
        &["build", "--release", "--package", "spokeguard", "--package", "spokeguard-tests", "--bins"],
    )?;
    let mut command = cargo();
    command
        .args(["run", "--quiet", "--release", "--package", "spokeguard-tests", "--bin", name, "--"])
        .args(arguments);
    Err(command.exec()).with_context(|| format!("start {name}"))
}

/// Becomes the harness, which builds what it needs itself.
fn vm(arguments: &[&String]) -> Result<()> {
    setup::setup()?;
    let other = ["arm64", "all", "--arch=arm64", "--arch=all"];
    if arguments.iter().any(|word| other.contains(&word.as_str())) {
        setup::dist(&[dist::Arch::Aarch64], false)?;
    }
    Err(cargo().args(VM).args(arguments).exec()).context("start the harness of the machines")
}

fn test(all: bool) -> Result<()> {
    let mut steps = Steps::default();
    let result = passes(all, &mut steps);
    steps.summary();
    result
}

fn passes(all: bool, steps: &mut Steps) -> Result<()> {
    steps.step("setup", setup::setup)?;
    steps.cargo("formatting", &["fmt", "--all", "--check"])?;
    steps.cargo("clippy", &["clippy", "--workspace", "--all-targets", "--", "--deny", "warnings"])?;
    steps.cargo("build", &["build", "--workspace"])?;
    // Real kernels take one processor, and nothing that looks at the clock runs beside them.
    let name = "real kernels, the quick ones";
    let machines = Beside::start(name, quick_machines("debug"), setup::target().join("vm/quick.log"))?;
    let unit = steps.run("unit tests", promised(&["test", "--workspace", "--lib", "--bins"], "debug"));
    machines.end(steps)?;
    unit?;
    steps.integration("integration tests", "debug")?;
    nixpkgs_lib(steps, std::env::var_os(NIXPKGS_LIB).is_some())?;
    // Not `--offline`: what only other systems need was never fetched on a new machine.
    let deny = ["deny", "--locked", "check", "licenses", "bans", "sources"];
    steps.cargo("licences, bans, sources", &deny)?;
    advisories(steps)?;
    if all {
        // Each takes hours, and a failure of one is no reason not to hear of the others.
        let built = steps.cargo("build, release", &["build", "--release", "--package", "spokeguard"]);
        let tested = built.and_then(|()| steps.integration("integration tests, release", "release"));
        let fuzzed = steps.step("fuzzers", || fuzz::run(None, FUZZ_S));
        let dist = steps.step("what goes to users, built twice", || dist::dist(&dist::ARCHES, true));
        let packages = setup::target().join("dist").display().to_string();
        let given: &[&str] = if dist.is_ok() { &["--packages", &packages] } else { &[] };
        let jobs = std::thread::available_parallelism().map_or(1, usize::from).min(4).to_string();
        let booted = steps.cargo("real kernels", &[VM, &["--arch", "all", "--jobs", &jobs], given].concat());
        [tested, fuzzed, dist, booted].into_iter().collect::<Result<()>>()?;
    }
    Ok(())
}

/// After setup nothing may be missing: a test that would skip itself fails instead.
fn promised(arguments: &[&str], profile: &str) -> Command {
    let mut command = cargo();
    command.args(arguments).env("SPOKEGUARD_LAB", "required");
    command.env("SPOKEGUARD_BIN", setup::target().join(profile).join("spokeguard"));
    // Which kernels of build machines may lack; `cargo xtask vm cases` has all but the last.
    command.env("SPOKEGUARD_AUDIT_SKIPS", "flowtable macvlan vlan sets-protocol");
    if profile == "release" {
        // Only under --all: every port of every case of the audit, every moment to be killed at, and
        // what else has a longer version.
        command.env("SPOKEGUARD_AUDIT_CASES", "all").env("SPOKEGUARD_MOMENTS", "500");
        command.env("SPOKEGUARD_ALL", "1");
    }
    command
}

/// Where the environment says nixpkgs' own lib is.
const NIXPKGS_LIB: &str = "SPOKEGUARD_NIXPKGS_LIB";

/// Whether what stands for nixpkgs' lib in the tests gives what that gives. Setup can't fetch it, so its test is
/// ignored unless asked for.
fn nixpkgs_lib(steps: &mut Steps, named: bool) -> Result<()> {
    let name = "nixpkgs' own lib";
    if !named {
        steps.skip(name, &format!("{NIXPKGS_LIB} does not say where it is"));
        return Ok(());
    }
    let test = ["test", "--package", "spokeguard-tests", "--test", "all", "--", "--ignored", "nix::"];
    steps.run(name, promised(&test, "debug"))
}

/// The advisory database is a git repository on the internet. Without the internet an older copy does; without
/// either nothing is known, and that is said.
fn advisories(steps: &mut Steps) -> Result<()> {
    let mut fetch = cargo();
    let fetched = bounded(fetch.args(["deny", "fetch", "db"]), Duration::from_secs(60));
    let home = std::env::var_os("CARGO_HOME").map(PathBuf::from);
    let home = home.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cargo")));
    // A clone that failed may leave an empty folder.
    let copies = home.and_then(|home| std::fs::read_dir(home.join("advisory-dbs")).ok());
    let copy = copies.into_iter().flatten().flatten().any(|entry| entry.path().join(".git").exists());
    match fetched {
        Ok(()) => steps.cargo("advisories", &["deny", "--offline", "check", "advisories"]),
        Err(why) if copy => {
            println!("the advisory database could not be renewed ({why:#}): using the copy at hand");
            steps.cargo("advisories, old copy", &["deny", "--offline", "check", "advisories"])
        }
        Err(why) => {
            steps.skip("advisories", &format!("no advisory database on this machine, and {why:#}"));
            Ok(())
        }
    }
}

/// With programs that are built already: cargo itself would wait for the other step's cargo.
fn quick_machines(profile: &str) -> Command {
    let programs = setup::target().join(profile);
    let mut command = Command::new(programs.join("vm"));
    command.args(["--quick", "--programs"]).arg(&programs);
    command
}

/// What runs while another step does, such as the machines: each has a limit of its own, and its console is kept.
struct Beside {
    name: &'static str,
    child: Child,
    log: PathBuf,
    started: Instant,
}

impl Beside {
    fn start(name: &'static str, mut command: Command, log: PathBuf) -> Result<Beside> {
        std::fs::create_dir_all(log.parent().unwrap_or(&log)).context("create the log's folder")?;
        let out = File::create(&log).with_context(|| format!("create {}", log.display()))?;
        let errors = out.try_clone().context("share a log")?;
        let child = command.stdin(Stdio::null()).stdout(out).stderr(errors).spawn();
        let child = child.with_context(|| format!("start `{}`", shown(&command)))?;
        Ok(Beside { name, child, log, started: Instant::now() })
    }

    fn end(mut self, steps: &mut Steps) -> Result<()> {
        let started = self.started;
        steps.step_since(self.name, started, || {
            let status = self.child.wait().with_context(|| format!("wait for {}", self.name))?;
            let said = std::fs::read(&self.log).with_context(|| format!("read {}", self.log.display()))?;
            println!("{}", String::from_utf8_lossy(&said).trim_end());
            ensure!(status.success(), "{status}; all it said is in {}", self.log.display());
            Ok(())
        })
    }
}

/// cargo itself, as the one that runs this program.
fn cargo() -> Command {
    Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
}

/// Runs a command without its output and with a limit, for questions whose answer may be no.
fn bounded(command: &mut Command, limit: Duration) -> Result<()> {
    let shown = shown(command);
    let started = Instant::now();
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .with_context(|| format!("start `{shown}`"))?;
    loop {
        if let Some(status) = child.try_wait().with_context(|| format!("wait for `{shown}`"))? {
            ensure!(status.success(), "`{shown}` failed");
            return Ok(());
        }
        if started.elapsed() > limit {
            child.kill().and_then(|()| child.wait()).with_context(|| format!("end `{shown}`"))?;
            bail!("`{shown}` took longer than {} s", limit.as_secs());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn shown(command: &Command) -> String {
    let program =
        Path::new(command.get_program()).file_name().unwrap_or_default().to_string_lossy().into_owned();
    let words = command.get_args().map(|word| word.to_string_lossy().into_owned());
    std::iter::once(program).chain(words).collect::<Vec<_>>().join(" ")
}

/// What has been done so far, a line each.
#[derive(Default)]
struct Steps {
    lines: Vec<String>,
    failed: bool,
}

impl Steps {
    fn cargo(&mut self, name: &str, arguments: &[&str]) -> Result<()> {
        let mut command = cargo();
        command.args(arguments);
        self.run(name, command)
    }

    fn run(&mut self, name: &str, mut command: Command) -> Result<()> {
        let shown = shown(&command);
        self.step(name, || {
            let status = command.stdin(Stdio::null()).status().with_context(|| format!("start `{shown}`"))?;
            ensure!(status.success(), "`{shown}`: {status}");
            Ok(())
        })
    }

    fn integration(&mut self, name: &str, profile: &str) -> Result<()> {
        let command = || promised(&["test", "--package", "spokeguard-tests", "--test", "all"], profile);
        let mut flaky = BTreeSet::new();
        self.step(name, || integration::run(command).map(|names| flaky = names))?;
        if !flaky.is_empty() {
            self.line(name, "FLAKY", &format!("only at the second try: {}", integration::list(&flaky)));
        }
        Ok(())
    }

    fn step(&mut self, name: &str, work: impl FnOnce() -> Result<()>) -> Result<()> {
        self.step_since(name, Instant::now(), work)
    }

    fn step_since(&mut self, name: &str, started: Instant, work: impl FnOnce() -> Result<()>) -> Result<()> {
        println!("==> {name}");
        let result = work();
        let word = if result.is_ok() { "ok" } else { "FAILED" };
        self.failed |= result.is_err();
        self.line(name, word, &format!("{:6.1} s", started.elapsed().as_secs_f64()));
        result.with_context(|| name.to_string())
    }

    fn skip(&mut self, name: &str, why: &str) {
        self.line(name, "SKIPPED", why);
    }

    fn line(&mut self, name: &str, word: &str, more: &str) {
        let line = format!("{name:<28} {word:<8} {more}");
        println!("    {line}");
        self.lines.push(line);
    }

    fn summary(&self) {
        let word = if self.failed { "failed; what is not listed did not run" } else { "passed" };
        println!("\ncargo xtask test: {word}");
        for line in &self.lines {
            println!("    {line}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_left_out_is_named_and_fails_nothing() {
        let mut steps = Steps::default();
        nixpkgs_lib(&mut steps, false).unwrap();
        assert!(!steps.failed && steps.lines.len() == 1, "{:?}", steps.lines);
        assert!(steps.lines[0].contains("SKIPPED  SPOKEGUARD_NIXPKGS_LIB does not"), "{:?}", steps.lines);
    }

    #[test]
    fn what_runs_beside_another_step_is_judged_like_one() {
        let log = std::env::temp_dir().join(format!("sg-beside-{}/log", std::process::id()));
        for (script, ok) in [("echo in", true), ("echo in; exit 3", false), ("kill -9 $$", false)] {
            let mut shell = Command::new("sh");
            shell.args(["-c", script]);
            let mut steps = Steps::default();
            let done = Beside::start("beside", shell, log.clone()).and_then(|beside| beside.end(&mut steps));
            assert_eq!((done.is_ok(), steps.failed), (ok, !ok), "{script}: {done:?}");
            assert_eq!(steps.lines.len(), 1, "{:?}", steps.lines);
        }
        let missing = Command::new("/nonexistent/vm");
        assert!(Beside::start("beside", missing, log.clone()).is_err());
        std::fs::remove_dir_all(log.parent().unwrap()).unwrap();
    }
}
