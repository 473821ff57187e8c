//! `cargo xtask vm`: scenarios on real kernels, one machine after another.

use std::fs;
use std::io::Write;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::{Arg, ArgAction, ArgMatches, Command};
use vm::image;
use vm::machine::{self, Machine};
use vm::packages::Arch;
use vm::payload::{self, Programs};
use vm::scenario::{ALL, Scenario};
use vm::step::{Line, Verdict};

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
        .arg(Arg::new("kernel").long("kernel").help("Only this series, such as 6.12"))
        .arg(Arg::new("arch").long("arch").value_parser(["amd64", "arm64"]).default_value("amd64"))
        .arg(Arg::new("filter").long("filter").action(ArgAction::Append).help("For `tests`: only these"))
        .arg(flag("quick", "Only what is part of every `cargo xtask test`"))
        .arg(flag("list", "Say what there is, and end"))
}

fn run(matches: &ArgMatches) -> Result<bool> {
    let (quick, only) = (matches.get_flag("quick"), matches.get_one::<String>("kernel"));
    let names: Vec<&String> = matches.get_many("name").into_iter().flatten().collect();
    for name in &names {
        let known: Vec<_> = ALL.iter().map(|scenario| scenario.name).collect();
        ensure!(known.contains(&name.as_str()), "no scenario {name}; there are {}", known.join(", "));
    }
    let chosen =
        ALL.iter().filter(|scenario| names.is_empty() || names.iter().any(|name| *name == scenario.name));
    let boots: Vec<(&Scenario, &str)> = chosen
        .flat_map(|scenario| {
            let kernels = if quick { scenario.quick } else { scenario.kernels };
            kernels.iter().map(move |kernel| (scenario, *kernel))
        })
        .filter(|(_, kernel)| only.is_none_or(|only| only == kernel))
        .collect();
    if matches.get_flag("list") {
        for scenario in ALL {
            println!("{:<12} {:<10} {}", scenario.name, scenario.kernels.join(" "), scenario.about);
        }
        return Ok(true);
    }
    ensure!(!boots.is_empty(), "no scenario fits");
    let arch = Arch::ALL
        .into_iter()
        .find(|arch| Some(arch.name()) == matches.get_one::<String>("arch").map(|n| &**n));
    let arch = arch.context("no such architecture")?;
    let programs = payload::build(boots.iter().any(|(scenario, _)| scenario.tests))?;
    let root = image::root(arch)?;
    let filters: Vec<String> = matches.get_many("filter").into_iter().flatten().cloned().collect();
    let mut failed = Vec::new();
    for (scenario, kernel) in &boots {
        let begun = Instant::now();
        let title = format!("{} {kernel} {}", scenario.name, arch.name());
        // A machine that could not be started has failed, and the others still have their turn.
        let verdict = boot(scenario, kernel, arch, &root, &programs, &filters)
            .unwrap_or_else(|error| Verdict::Failed(format!("{error:#}")));
        let seconds = begun.elapsed().as_secs_f64();
        match verdict {
            Verdict::Ok => println!("vm: {title}: ok, {seconds:.1} s"),
            Verdict::Failed(why) => {
                let folder = machine::folder(&title.replace(' ', "-"));
                println!("vm: {title}: FAILED: {why}, {seconds:.1} s");
                println!(
                    "  the console, {}:\n{}",
                    folder.join("serial.log").display(),
                    machine::console(&folder, 40)
                );
                failed.push(title);
            }
        }
    }
    println!("\nvm: {} of {} machines passed", boots.len() - failed.len(), boots.len());
    for title in &failed {
        println!("  FAILED {title}");
    }
    Ok(failed.is_empty())
}

fn boot(
    scenario: &Scenario,
    series: &str,
    arch: Arch,
    root: &std::path::Path,
    programs: &Programs,
    filters: &[String],
) -> Result<Verdict> {
    let folder = machine::folder(&format!("{}-{series}-{}", scenario.name, arch.name()));
    if folder.exists() {
        fs::remove_dir_all(&folder).with_context(|| format!("remove {}", folder.display()))?;
    }
    let kernel = image::kernel(arch, series)?;
    let scratch = folder.join("programs");
    let own = folder.join("own.cpio");
    let programs =
        Programs { plain: programs.plain.clone(), tests: programs.tests.clone().filter(|_| scenario.tests) };
    println!("\nvm: {} on {} ({}, {} MiB)", scenario.name, kernel.release, arch.name(), scenario.memory_mib);
    fs::create_dir_all(&folder).with_context(|| format!("create {}", folder.display()))?;
    let disk = if scenario.boots > 1 { Some(image::disk(&folder)?) } else { None };
    let mut verdict = Verdict::Ok;
    for boot in 1..=scenario.boots {
        let number = if disk.is_some() { vec![boot.to_string()] } else { vec![] };
        let words = [&[scenario.name.to_owned()], &*number, filters].concat().join(" ");
        let mut file = Vec::new();
        payload::tree(&programs, &scratch, &words)?.write(&mut file)?;
        fs::File::create(&own)
            .and_then(|mut out| out.write_all(&file))
            .with_context(|| format!("write {}", own.display()))?;
        let machine = Machine {
            arch,
            vmlinuz: &kernel.vmlinuz,
            initrd: vec![root, &kernel.modules, &own],
            memory_mib: scenario.memory_mib,
            disk: disk.as_deref(),
            limit: Duration::from_secs(scenario.limit_s),
            folder: &folder,
        };
        verdict = machine::run(&machine, show)?;
        if verdict != Verdict::Ok {
            break;
        }
    }
    if let Some(disk) = disk {
        fs::remove_file(&disk).with_context(|| format!("remove {}", disk.display()))?;
    }
    fs::remove_dir_all(&scratch).with_context(|| format!("remove {}", scratch.display()))?;
    fs::remove_file(&own).with_context(|| format!("remove {}", own.display()))?;
    Ok(verdict)
}

fn show(line: &Line) {
    let Line::Step { name, ok, seconds, detail } = line else { return };
    let word = if *ok { "ok  " } else { "FAIL" };
    let mut detail = detail.trim_end().lines();
    println!("  {word} {seconds:6.1} s  {name}: {}", detail.next().unwrap_or_default());
    for more in detail {
        println!("                 {more}");
    }
}
