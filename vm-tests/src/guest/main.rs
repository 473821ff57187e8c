//! What runs inside a machine: `sg-vm-guest PORT SCENARIO WORDS..` writes each step to the virtio port.

mod docker_like;
mod features;
mod integration;
mod lock_out;
mod lock_out_boot;
mod small;
mod spoke;
mod systemd;

use std::collections::BTreeSet;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::system::RebootCommand;
use serde_json::Value;
use vm::scenario::QUICK;
use vm::step::Line;

/// No answer by then is silence.
const SOON: Duration = Duration::from_millis(600);
/// Somebody who is not there by then does not come.
const LONG: Duration = Duration::from_secs(60);

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    match run(&words) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("sg-vm-guest: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(words: &[String]) -> Result<()> {
    let [port, scenario, rest @ ..] = words else { bail!("usage: sg-vm-guest PORT SCENARIO WORDS..") };
    let port = OpenOptions::new().write(true).open(port).with_context(|| format!("open {port}"))?;
    let mut steps = Steps { port, begun: Instant::now(), count: 0 };
    // The boot's number, or how much is wanted.
    let boot = rest.first().cloned().unwrap_or_default();
    let done = match scenario.as_str() {
        "spoke" => spoke::run(&mut steps, boot == QUICK),
        "no-features" => features::run(&mut steps, boot == QUICK),
        "boot-window" => systemd::boot_window(&mut steps, &boot),
        "ssh-race" => systemd::ssh_race(&mut steps, &boot),
        "package" => systemd::package(&mut steps, &boot),
        "neighbours" => systemd::neighbours(&mut steps),
        "lock-out" => lock_out::run(&mut steps, &boot),
        "lock-out-boot" => lock_out_boot::run(&mut steps, &boot),
        "docker-like" => docker_like::run(&mut steps),
        "upgrade" => integration::run(&mut steps, &["exact::".to_owned()]),
        "small" => small::run(&mut steps),
        "cases" => integration::cases(&mut steps),
        "tests" => integration::run(&mut steps, rest),
        other => bail!("no scenario {other}"),
    };
    if let Err(error) = done {
        steps.tell("the scenario", Err(error))?;
    }
    let steps_made = steps.count;
    steps.write(&Line::End { steps: steps_made })?;
    if scenario == "lock-out" || (scenario == "lock-out-boot" && boot == "1") {
        // What is not on the disk by now never gets there.
        rustix::system::reboot(RebootCommand::PowerOff).context("cut the power")?;
    }
    Ok(())
}

struct Steps {
    port: File,
    begun: Instant,
    count: usize,
}

impl Steps {
    /// Does something that must hold; the error of one is no reason not to try the next.
    fn step(&mut self, name: &str, work: impl FnOnce() -> Result<String>) -> Result<()> {
        self.begun = Instant::now();
        let done = catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| {
            let text = panic.downcast_ref::<String>().cloned();
            let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| text.to_string()));
            bail!("panicked: {}", text.unwrap_or_default())
        });
        self.tell(name, done)
    }

    /// The same for what others need.
    fn make<T>(&mut self, name: &str, work: impl FnOnce() -> Result<(T, String)>) -> Result<T> {
        let mut made = None;
        self.step(name, || {
            let (thing, detail) = work()?;
            made = Some(thing);
            Ok(detail)
        })?;
        made.with_context(|| format!("nothing can follow without: {name}"))
    }

    fn tell(&mut self, name: &str, done: Result<String>) -> Result<()> {
        let ok = done.is_ok();
        let detail = done.unwrap_or_else(|error| format!("{error:#}"));
        // The console has it, too, for when the port has not.
        println!("{} {name}: {detail}", if ok { "ok  " } else { "FAIL" });
        self.count += 1;
        let seconds = self.begun.elapsed().as_secs_f64();
        self.begun = Instant::now();
        self.write(&Line::Step { name: name.to_owned(), ok, seconds, detail })
    }

    fn write(&mut self, line: &Line) -> Result<()> {
        let mut text = serde_json::to_vec(line)?;
        text.push(b'\n');
        self.port.write_all(&text).context("write to the port of the steps")
    }
}

/// Looks again and again, in no hurry: time that is slept through inside costs nothing outside.
fn patiently<T>(what: &str, look: impl FnMut() -> Option<T>) -> Result<T> {
    patiently_within(LONG, what, look)
}

/// The same for what takes its time, with as many looks.
fn patiently_within<T>(limit: Duration, what: &str, mut look: impl FnMut() -> Option<T>) -> Result<T> {
    lab::wait_until(limit, what, || {
        let seen = look();
        if seen.is_none() {
            std::thread::sleep(limit / 240);
        }
        seen
    })
}

fn run_to_end(command: &mut Command) -> Result<()> {
    let output = command.output().with_context(|| format!("start {command:?}"))?;
    ensure!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr).trim());
    Ok(())
}

/// The kernel that runs here, in its own words.
fn release() -> Result<String> {
    let text = std::fs::read_to_string("/proc/sys/kernel/osrelease").context("read the kernel's release")?;
    Ok(text.trim().to_owned())
}

/// The codes of a report's findings.
fn codes(report: &Value) -> BTreeSet<String> {
    let all = report["findings"].as_array().into_iter().flatten();
    all.filter_map(|finding| finding["code"].as_str().map(str::to_owned)).collect()
}

/// What a report found of that code.
fn found(report: &Value, code: &str) -> Option<String> {
    let finding = report["findings"].as_array()?.iter().find(|finding| finding["code"] == code)?;
    finding["found"].as_str().map(str::to_owned)
}

/// What a report could not look at, and why.
fn blind(report: &Value) -> Vec<String> {
    let all = report["blind"].as_array().into_iter().flatten();
    all.map(|one| {
        format!(
            "{}: {}",
            one["facet"].as_str().unwrap_or_default(),
            one["reason"].as_str().unwrap_or_default()
        )
    })
    .collect()
}
