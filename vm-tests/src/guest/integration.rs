//! The integration tests on this kernel: a step for each.

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, ensure};

use crate::Steps;

const PROGRAM: &str = "/opt/sg/integration-tests";

/// What is run when nothing was named: what asks most of the kernel. All of them would take three hours.
const MODULES: &[&str] =
    &["audit_local", "binds", "counters", "enforce", "guard", "look", "netns", "privileges"];
/// What the tests are told of this machine.
const ENVIRONMENT: &[(&str, &str)] = &[
    ("SPOKEGUARD_LAB", "required"),
    ("RUST_BACKTRACE", "1"),
    // Debian's kernels can do all other cases.
    ("SPOKEGUARD_AUDIT_SKIPS", "sets-protocol"),
    // nmap needs ten minutes for all ports of two addresses on an emulated processor; `cargo xtask test` compares them.
    ("SPOKEGUARD_AUDIT_CASES", "sampled"),
    // For senders of steady traffic, which have one slow processor here together with all that they send to.
    ("SPOKEGUARD_PAUSES", "20"),
    // For those who wait for an answer.
    ("SPOKEGUARD_PATIENCE", "3"),
];
/// They need what a machine of this size is not given: Prometheus, its users' Python libraries, xmllint, a compiler.
/// And nmap needs more than its five minutes for all ports of a host that refuses them; the machine `spoke` asks it.
const WITHOUT: &[&str] = &[
    "prometheus",
    "libnmap",
    "xml",
    "linux_6_1",
    "an_outsider_sees_every_port_of_an_unprotected_spoke",
    "all_ports_of_another_host_are_as_nmap_sees_them",
];

/// The cases that a kernel without these modules skips; here they must not be skipped.
pub fn cases(steps: &mut Steps) -> Result<()> {
    for name in ["vlan", "macvlan", "flowtable"] {
        case(steps, name)?;
    }
    Ok(())
}

/// One case of the audit's matrix, by its name.
fn case(steps: &mut Steps, name: &str) -> Result<()> {
    steps.step(&format!("case {name}"), || {
        let output = Command::new(PROGRAM)
            .args(["--nocapture", "every_case_is_what_a_real_nmap_says_or_explained"])
            .envs(ENVIRONMENT.iter().copied())
            .env("SPOKEGUARD_AUDIT_CASE", name)
            .stdin(Stdio::null())
            .output()
            .context("start the integration tests")?;
        let text =
            String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{text}");
        let (count, times) = text.split_once(" cases; ").context("no case was run")?;
        ensure!(count.split_whitespace().last() != Some("0"), "{text}");
        Ok(times.lines().next().unwrap_or_default().to_owned())
    })
}

/// Those that the words name, `case=NAME` being one of the audit's matrix; else [`MODULES`].
pub fn run(steps: &mut Steps, words: &[String]) -> Result<()> {
    let usual = MODULES.iter().map(|module| format!("{module}::"));
    let filters: Vec<String> = if words.is_empty() { usual.collect() } else { words.to_vec() };
    for filter in filters {
        match filter.strip_prefix("case=") {
            Some(name) => case(steps, name)?,
            None => module(steps, &filter)?,
        }
    }
    Ok(())
}

/// One at a time: two would be slower under emulation, and harder to tell apart. Each is told as it ends, and what
/// the failed ones wrote when all have ended.
fn module(steps: &mut Steps, filter: &str) -> Result<()> {
    let begun = Instant::now();
    let known = names(filter)?;
    let mut command = Command::new(PROGRAM);
    command.args(["--test-threads=1", filter]).envs(ENVIRONMENT.iter().copied()).stdin(Stdio::null());
    for name in WITHOUT {
        command.args(["--skip", name]);
    }
    let mut child = command.stdout(Stdio::piped()).spawn().context("start the integration tests")?;
    let output = BufReader::new(child.stdout.take().context("a pipe that was asked for")?);
    let (mut text, mut failed, mut count) = (String::new(), Vec::new(), 0);
    for line in output.lines() {
        let line = line.context("read what the integration tests write")?;
        if let Some((name, result)) = line.strip_prefix("test ").and_then(|rest| rest.split_once(" ... ")) {
            count += 1;
            match result {
                "ok" => steps.tell(name, Ok(String::new()))?,
                _ => {
                    println!("FAIL {name}");
                    failed.push(name.to_owned());
                }
            }
        }
        text += &line;
        text.push('\n');
    }
    let status = child.wait().context("wait for the integration tests")?;
    for name in &failed {
        steps.tell(name, Err(anyhow::anyhow!("{}", section(&text, name))))?;
    }
    let seconds = begun.elapsed().as_secs_f64();
    steps.step(&format!("all of {}", filter.trim_end_matches(':')), || {
        ensure!(count > 0, "no test is called so\n{text}");
        ensure!(status.success() || !failed.is_empty(), "{status}\n{text}");
        let left_out = known.iter().filter(|name| WITHOUT.iter().any(|word| name.contains(word)));
        let left_out: Vec<&str> = left_out.map(|name| &**name).collect();
        ensure!(count + left_out.len() == known.len(), "of {} tests {count} were run\n{text}", known.len());
        let without = if left_out.is_empty() { String::new() } else { "; not here: ".to_owned() };
        Ok(format!("{count} tests, {} failed, {seconds:.0} s{without}{}", failed.len(), left_out.join(", ")))
    })
}

/// The tests that a filter chooses.
fn names(filter: &str) -> Result<Vec<String>> {
    let output = Command::new(PROGRAM).args(["--list", filter]).output().context("list the tests")?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(output.status.success(), "{}: {text}", output.status);
    Ok(text.lines().filter_map(|line| line.strip_suffix(": test").map(str::to_owned)).collect())
}

/// What a failed test wrote: how it begins, and its end, where a daemon's last words are.
fn section(text: &str, name: &str) -> String {
    let from = text.split(&format!("---- {name} stdout ----")).nth(1).unwrap_or("it said nothing");
    let until = from.split("\n---- ").next().unwrap_or(from);
    let whole: Vec<char> = until.split("\nfailures:\n").next().unwrap_or(until).trim().chars().collect();
    const MOST: usize = 3000;
    if whole.len() <= 2 * MOST {
        return whole.into_iter().collect();
    }
    let (head, tail) = (&whole[..MOST], &whole[whole.len() - MOST..]);
    head.iter().chain(&['\n', '.', '.', '.', '\n']).chain(tail).collect()
}
