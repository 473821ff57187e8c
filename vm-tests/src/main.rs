//! `cargo xtask vm`: scenarios on real kernels, one machine after another.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};
use clap::{Arg, ArgAction, ArgMatches, Command, value_parser};
use vm::disk;
use vm::image;
use vm::machine::{self, Machine, Ran};
use vm::packages::{self, Arch};
use vm::payload::{self, Programs, Wanted};
use vm::scenario::{ALL, Disk, QUICK, Scenario};
use vm::step::{Line, Verdict};

/// More machines at once than anybody has memory for.
const JOBS: i64 = 64;

fn main() -> ExitCode {
    match run(&command().get_matches()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("vm: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn command() -> Command {
    let flag = |name, help| Arg::new(name).long(name).action(ArgAction::SetTrue).help(help);
    Command::new("cargo xtask vm")
        .about("Boots real kernels under QEMU and runs scenarios inside\n\nExample: cargo xtask vm spoke --kernel 6.1")
        .arg(Arg::new("name").num_args(0..).help("Scenarios [default: all of them]"))
        .arg(Arg::new("kernel").long("kernel").help("Only this series, such as 6.12, or newest"))
        .arg(Arg::new("arch").long("arch").value_parser(["amd64", "arm64", "all"]).default_value("amd64"))
        .arg(Arg::new("filter").long("filter").action(ArgAction::Append).help("For `tests`: only these"))
        .arg(Arg::new("programs").long("programs").value_name("DIR").help("Programs and package of that architecture, built before"))
        .arg(Arg::new("packages").long("packages").value_name("DIR").help("For `package`: Debian packages made before, such as target/dist"))
        .arg(Arg::new("earlier").long("earlier").value_name("DIR").help("For `package`: those of another version, to upgrade from"))
        .arg(Arg::new("jobs").long("jobs").value_name("N").value_parser(value_parser!(u8).range(1..=JOBS)).default_value("1").help("So many machines at once, each with a processor and up to 1.5 GiB"))
        .arg(flag("quick", "Only what is part of every `cargo xtask test`"))
        .arg(flag("list", "Say what there is, and end"))
}

/// Held for as long as machines of this clone run.
fn alone(folder: &Path) -> Result<fs::File> {
    fs::create_dir_all(folder).with_context(|| format!("create {}", folder.display()))?;
    let path = folder.join("lock");
    let lock = fs::File::create(&path).with_context(|| format!("create {}", path.display()))?;
    match lock.try_lock() {
        Ok(()) => Ok(lock),
        Err(fs::TryLockError::WouldBlock) => {
            bail!("another `cargo xtask vm` runs machines in this clone: wait for it, or use another clone")
        }
        Err(fs::TryLockError::Error(error)) => Err(error).with_context(|| format!("lock {}", path.display())),
    }
}

fn run(matches: &ArgMatches) -> Result<bool> {
    let (quick, only) = (matches.get_flag("quick"), matches.get_one::<String>("kernel"));
    let names: Vec<&String> = matches.get_many("name").into_iter().flatten().collect();
    for name in &names {
        let known: Vec<_> = ALL.iter().map(|scenario| scenario.name).collect();
        ensure!(known.contains(&name.as_str()), "no scenario {name}; there are {}", known.join(", "));
    }
    if matches.get_flag("list") {
        for scenario in ALL {
            let kernels = Arch::ALL.into_iter().filter(|arch| !scenario.kernels(*arch, false).is_empty());
            let kernels =
                kernels.map(|arch| format!("{} {}", arch.name(), scenario.kernels(arch, false).join(" ")));
            let kernels = kernels.collect::<Vec<_>>().join(", ");
            println!("{:<13} {kernels}\n{}", scenario.name, indented(scenario.about));
        }
        return Ok(true);
    }
    let filters: Vec<String> = matches.get_many("filter").into_iter().flatten().cloned().collect();
    ensure!(
        filters.is_empty() || names.iter().all(|name| *name == "tests") && !names.is_empty(),
        "--filter chooses among the integration tests: write `vm tests --filter {}`",
        filters.join(" --filter ")
    );
    let arch = matches.get_one::<String>("arch").map(|name| &**name);
    let arches: Vec<Arch> =
        Arch::ALL.into_iter().filter(|one| [Some(one.name()), Some("all")].contains(&arch)).collect();
    let boots = |arch| -> Vec<(&Scenario, &str)> {
        let chosen = ALL.iter().filter(|one| names.is_empty() || names.iter().any(|name| *name == one.name));
        chosen
            .flat_map(|one| one.kernels(arch, quick).iter().map(move |kernel| (one, *kernel)))
            .filter(|(_, kernel)| only.is_none_or(|only| only == kernel))
            .collect()
    };
    let [packages, earlier] =
        ["packages", "earlier"].map(|name| matches.get_one::<String>(name).map(Path::new));
    let installs = arches.iter().flat_map(|arch| boots(*arch)).any(|(scenario, _)| scenario.package);
    ensure!(
        packages.or(earlier).is_none() || installs,
        "no machine of these installs a package: --packages and --earlier are for `vm package`"
    );
    // One that was named and is left out would look as if it had passed.
    for name in &names {
        let any = arches.iter().flat_map(|arch| boots(*arch)).any(|(scenario, _)| scenario.name == **name);
        ensure!(any, "no machine of {name} is all of that: --list says which there are");
    }
    // Each machine has one folder, which a second run would empty under the first.
    let _alone = alone(&vm::target().join("vm"))?;
    let jobs = usize::from(matches.get_one::<u8>("jobs").copied().unwrap_or(1));
    let (mut count, mut failed) = (0, Vec::new());
    for arch in arches {
        let boots = boots(arch);
        if boots.is_empty() {
            continue;
        }
        count += boots.len();
        // What can't be made fails all of its machines, and the others still have their turn.
        let wanted = Wanted {
            tests: boots.iter().any(|(scenario, _)| scenario.tests),
            release: boots.iter().any(|(scenario, _)| scenario.release),
            package: boots.iter().any(|(scenario, _)| scenario.package),
        };
        let boots: Vec<Boot> = boots
            .into_iter()
            .map(|(scenario, series)| Boot { scenario, series, arch, quick, filters: &filters })
            .collect();
        // What an earlier run said must not stand below the error of one that never began.
        boots.iter().try_for_each(Boot::forget)?;
        let programs = matches.get_one::<String>("programs").map(Path::new);
        let room = packages::ROOM_BYTES * jobs.min(boots.len()) as u64;
        let made = make(arch, wanted, programs, Packages { folder: packages, earlier }, room);
        failed.extend(at_once(jobs, &boots, |boot, say| {
            let done = made.as_ref().map_err(|error| anyhow!("{error:#}"));
            let ran = done.and_then(|(programs, root)| boot.run(root, programs, say));
            report(boot, ran, say)
        }));
    }
    ensure!(count > 0, "no machine is all of that: --list says which there are");
    println!("\nvm: {} of {count} machines passed", count - failed.len());
    for title in &failed {
        println!("  FAILED {title}");
    }
    Ok(failed.is_empty())
}

/// Does `work` for each, so many at a time, and gives the titles of those it is false for. What it says comes as it
/// is said where there is one at a time, and otherwise at its end and in one piece.
fn at_once(jobs: usize, boots: &[Boot], work: impl Fn(&Boot, Say) -> bool + Sync) -> Vec<String> {
    if jobs == 1 {
        let alone = boots.iter().filter(|boot| !work(boot, &mut |text| println!("{text}")));
        return alone.map(Boot::title).collect();
    }
    let (next, failed) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    let worker = || {
        while let Some(boot) = boots.get(next.fetch_add(1, Ordering::Relaxed)) {
            println!("vm: {} begins", boot.title());
            let mut said = String::new();
            let passed = work(boot, &mut |text| said += &format!("{text}\n"));
            print!("{said}");
            if !passed {
                failed.lock().unwrap_or_else(PoisonError::into_inner).push(boot.title());
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..jobs.min(boots.len()) {
            scope.spawn(worker);
        }
    });
    failed.into_inner().unwrap_or_else(PoisonError::into_inner)
}

/// Where a line, or several, of what is to be read goes.
type Say<'a> = &'a mut dyn FnMut(String);

/// Held while what machines share is made: whoever comes second finds it made.
static SHARED: Mutex<()> = Mutex::new(());

/// Below its name, in 80 columns.
fn indented(text: &str) -> String {
    let indent = " ".repeat(13);
    let (mut out, mut column) = (indent.clone(), indent.len());
    for word in text.split_whitespace() {
        if column + 1 + word.len() > 80 {
            out += &format!("\n{indent}");
            column = indent.len();
        }
        out += &format!(" {word}");
        column += 1 + word.len();
    }
    out
}

/// Folders with Debian packages that were made before.
struct Packages<'a> {
    /// What is tested.
    folder: Option<&'a Path>,
    /// What that upgrades.
    earlier: Option<&'a Path>,
}

/// What all machines of an architecture share.
fn make(
    arch: Arch,
    wanted: Wanted,
    built: Option<&Path>,
    packages: Packages,
    room_bytes: u64,
) -> Result<(Programs, PathBuf)> {
    machine::assert_emulator(arch)?;
    let target = vm::target();
    fs::create_dir_all(&target).with_context(|| format!("create {}", target.display()))?;
    packages::assert_space(&target, room_bytes)?;
    let find = |folder: Option<&Path>| match folder.filter(|_| wanted.package) {
        Some(folder) => payload::package(arch, folder)?.map(Some).with_context(|| {
            let (folder, arch) = (folder.display(), arch.name());
            format!("no package for {arch} is in {folder}: `cargo xtask dist` makes them in target/dist")
        }),
        None => Ok(None),
    };
    let (given, earlier) = (find(packages.folder)?, find(packages.earlier)?);
    let mut programs = match built {
        Some(folder) => payload::built(arch, folder)?,
        None => payload::build(arch, Wanted { package: wanted.package && given.is_none(), ..wanted })?,
    };
    programs.package = given.or(programs.package);
    programs.earlier = earlier;
    if let (Some(package), Some(earlier)) = (&programs.package, &programs.earlier) {
        let read = |path: &Path| fs::read(path).with_context(|| format!("read {}", path.display()));
        ensure!(
            read(package)? != read(earlier)?,
            "{} is the package that is tested: --earlier wants one of another version",
            earlier.display()
        );
    }
    if let Some(package) = programs.package.as_ref().filter(|_| wanted.package) {
        println!("vm: the package is {}", package.display());
    }
    Ok((programs, image::root(arch)?))
}

const CONSOLE_LINES: usize = 40;

/// Says what came of a machine; whether it passed. One that could not be started has failed.
fn report(boot: &Boot, ran: Result<Ran>, say: Say) -> bool {
    let title = boot.title();
    let why = match ran {
        Ok(Ran { verdict: Verdict::Ok, cpu, wall }) => {
            let (wall, cpu) = (wall.as_secs_f64(), cpu.as_secs_f64());
            say(format!("vm: {title}: ok, {wall:.1} s, of a processor {cpu:.1} s"));
            return true;
        }
        Ok(Ran { verdict: Verdict::Failed(why), cpu, wall }) => {
            format!("{why}; {:.1} s, of a processor {:.1} s", wall.as_secs_f64(), cpu.as_secs_f64())
        }
        Err(error) => format!("{error:#}"),
    };
    say(format!("vm: {title}: FAILED: {why}"));
    let folder = boot.folder();
    if let Some((path, last)) = machine::console(&folder, boot.scenario.boots, CONSOLE_LINES) {
        say(format!("  the console, {}:\n{last}", path.display()));
    }
    false
}

struct Boot<'a> {
    scenario: &'a Scenario,
    series: &'a str,
    arch: Arch,
    quick: bool,
    filters: &'a [String],
}

impl Boot<'_> {
    fn title(&self) -> String {
        format!("{} {} {}", self.scenario.name, self.series, self.arch.name())
    }

    fn folder(&self) -> PathBuf {
        machine::folder(&self.title().replace(' ', "-"))
    }

    fn forget(&self) -> Result<()> {
        let folder = self.folder();
        if folder.exists() {
            fs::remove_dir_all(&folder).with_context(|| format!("remove {}", folder.display()))?;
        }
        Ok(())
    }

    fn run(&self, root: &Path, programs: &Programs, say: Say) -> Result<Ran> {
        let Boot { scenario, series, arch, quick, filters } = *self;
        let folder = self.folder();
        fs::create_dir_all(&folder).with_context(|| format!("create {}", folder.display()))?;
        packages::assert_space(&folder, packages::ROOM_BYTES)?;
        let shared = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
        let kernel = image::kernel(arch, series)?;
        let (scratch, own) = (folder.join("programs"), folder.join("own.cpio"));
        let more = if scenario.tests { Some(image::more(arch)?) } else { None };
        let parts = [Some(root), more.as_deref(), Some(&*kernel.modules), Some(&*own)];
        let parts: Vec<&Path> = parts.into_iter().flatten().collect();
        let memory_mib = scenario.memory_mib(arch);
        let installed = match scenario.disk {
            Disk::Systemd => Some(disk::installed(arch, series)?),
            Disk::None | Disk::Empty => None,
        };
        drop(shared);
        say(format!("\nvm: {} on {} ({}, {memory_mib} MiB)", scenario.name, kernel.release, arch.name()));
        let disk = match (scenario.disk, installed) {
            (Disk::Empty, _) => Some(disk::empty(&folder)?),
            (_, Some(installed)) => Some(disk::copy(&installed, &folder)?),
            (_, None) => None,
        };
        let mut whole = Ran { verdict: Verdict::Ok, cpu: Duration::ZERO, wall: Duration::ZERO };
        for boot in 1..=scenario.boots {
            let number = match (scenario.boots, quick) {
                (1, false) => vec![],
                (1, true) => vec![QUICK.to_owned()],
                _ => vec![boot.to_string()],
            };
            let words = [&[scenario.name.to_owned()], &*number, filters].concat().join(" ");
            let mut file = Vec::new();
            payload::tree(programs, scenario, &scratch, &words)?.write(&mut file)?;
            fs::write(&own, file).with_context(|| format!("write {} (no space?)", own.display()))?;
            let machine = Machine {
                arch,
                vmlinuz: &kernel.vmlinuz,
                initrd: parts.clone(),
                memory_mib,
                disk: disk.as_deref(),
                waits: scenario.disk == Disk::Systemd,
                limit: scenario.limit(quick),
                folder: &folder,
                boot,
            };
            let ran = machine::run(&machine, |line| shown(line).into_iter().for_each(&mut *say))?;
            whole = Ran { verdict: ran.verdict, cpu: whole.cpu + ran.cpu, wall: whole.wall + ran.wall };
            if whole.verdict != Verdict::Ok {
                break;
            }
        }
        if let Some(disk) = disk {
            fs::remove_file(&disk).with_context(|| format!("remove {}", disk.display()))?;
        }
        fs::remove_dir_all(&scratch).with_context(|| format!("remove {}", scratch.display()))?;
        fs::remove_file(&own).with_context(|| format!("remove {}", own.display()))?;
        Ok(whole)
    }
}

/// A step and what it found, as it is read.
fn shown(line: &Line) -> Option<String> {
    let Line::Step { name, ok, seconds, detail } = line else { return None };
    let word = if *ok { "ok  " } else { "FAIL" };
    let detail = detail.trim_end().replace('\n', &format!("\n{}", " ".repeat(17)));
    let colon = if detail.is_empty() { "" } else { ": " };
    Some(format!("  {word} {seconds:6.1} s  {name}{colon}{detail}"))
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    fn boots() -> Vec<Boot<'static>> {
        let boot =
            |scenario| Boot { scenario, series: "6.12", arch: Arch::Amd64, quick: false, filters: &[] };
        ALL.iter().take(4).map(boot).collect()
    }

    #[test]
    fn one_clone_runs_machines_once_at_a_time() {
        let folder = tempfile::tempdir().unwrap();
        let first = alone(folder.path()).unwrap();
        let said = alone(folder.path()).unwrap_err().to_string();
        assert!(said.contains("another `cargo xtask vm`"), "{said}");
        drop(first);
        drop(alone(folder.path()).unwrap());
    }

    #[test]
    fn each_machine_has_one_turn_and_those_that_fail_are_named() {
        let boots = boots();
        for jobs in [1, 2, 9] {
            let begun = Mutex::new(Vec::new());
            let failed = at_once(jobs, &boots, |boot, say| {
                begun.lock().unwrap().push(boot.title());
                say("\na step".to_owned());
                !["boot-window", "package"].contains(&boot.scenario.name)
            });
            let sorted = |mut titles: Vec<String>| {
                titles.sort();
                titles
            };
            assert_eq!(
                sorted(begun.into_inner().unwrap()),
                sorted(boots.iter().map(Boot::title).collect()),
                "{jobs}"
            );
            assert_eq!(sorted(failed), ["boot-window 6.12 amd64", "package 6.12 amd64"], "{jobs}");
        }
    }

    #[test]
    fn of_a_machine_that_failed_the_last_console_is_shown_and_kept() {
        let scenario = Scenario { name: "test-of-report", boots: 3, ..ALL[0] };
        let boot = Boot { scenario: &scenario, ..boots().remove(0) };
        boot.forget().unwrap();
        let reported = |ran| {
            let mut said = Vec::new();
            (report(&boot, ran, &mut |text| said.push(text)), said.join("\n"))
        };
        let killed = |why: &str| {
            let verdict = Verdict::Failed(why.to_owned());
            Ok(Ran { verdict, cpu: Duration::ZERO, wall: Duration::from_secs(2) })
        };
        // It never got that far.
        let (passed, said) = reported(Err(anyhow::anyhow!("no emulator")));
        assert_eq!((passed, &*said), (false, "vm: test-of-report 6.12 amd64: FAILED: no emulator"));
        fs::create_dir_all(boot.folder()).unwrap();
        for (boot_number, lines) in [(1, 3), (2, CONSOLE_LINES + 1)] {
            let text: String =
                (1..=lines).map(|line| format!("boot {boot_number} line {line}\r\n")).collect();
            fs::write(boot.folder().join(format!("serial-{boot_number}.log")), text).unwrap();
        }
        let (passed, said) = reported(killed("killed: it hung"));
        let second = boot.folder().join("serial-2.log");
        assert!(!passed && said.contains("FAILED: killed: it hung") && second.exists(), "{said}");
        assert!(said.contains(&format!("the console, {}:", second.display())), "{said}");
        assert!(said.contains("    | boot 2 line 2\n") && said.ends_with("boot 2 line 41\n"), "{said}");
        assert!(!said.contains("line 1\n") && !said.contains('\r') && !said.contains("boot 1"), "{said}");
        let whole = Ran { verdict: Verdict::Ok, cpu: Duration::ZERO, wall: Duration::ZERO };
        assert!(reported(Ok(whole)).0);
        boot.forget().unwrap();
    }

    #[test]
    fn as_many_as_asked_for_are_there_at_once() {
        let (boots, there) = (boots(), AtomicUsize::new(0));
        let most = AtomicUsize::new(0);
        at_once(2, &boots, |_, _| {
            most.fetch_max(there.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
            let begun = Instant::now();
            while most.load(Ordering::SeqCst) < 2 && begun.elapsed() < Duration::from_secs(60) {
                std::thread::yield_now();
            }
            there.fetch_sub(1, Ordering::SeqCst);
            true
        });
        assert_eq!(most.into_inner(), 2);
    }
}
