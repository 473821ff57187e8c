//! The unit's own 32 MB under systemd on a machine of 512: some minutes of a busy host, with what all of it took in
//! figures.

use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use lab::{Answer, Machine, MemoryGroup, SPOKE_PUBLIC};

use crate::spoke::{all_held, keepalive_comes_back, scrape};
use crate::{SOON, Steps, blind, patiently, systemd};

const UNIT: &str = "spokeguard.service";
const GROUP: &str = "/sys/fs/cgroup/system.slice/spokeguard.service";
const LIMIT: u64 = 32 << 20;
/// Of it, what no other use of the memory could take: without the files that the kernel keeps for it.
const OWN: u64 = 12 << 20;
/// More of it before Linux 6.4, where each audit makes five sets of 2 MiB for a moment.
const OLDER_MEANS: u64 = 6 << 20;
/// As its operators were promised, whatever they watch.
const BPF: f64 = (2 << 20) as f64;
const LONG_ENOUGH: Duration = Duration::from_secs(180);
const ROUND: Duration = Duration::from_secs(3);
/// Packets of a stranger in each, beside the knocks; a processor's queue holds a thousand.
const FLOOD: u32 = 900;
/// Counts what a stranger sends beside the knocks, as his kernel does it.
const SENT: &str = "table inet sent {
  counter others { }
  chain forth { type filter hook output priority -300;
    udp dport 33000 counter name others; tcp dport 20000-20999 counter name others; }
}";

pub fn run(steps: &mut Steps) -> Result<()> {
    let lab = systemd::lab(steps)?;
    let mut machine = Machine::whole(&lab, Path::new(systemd::DISK));
    systemd::furnish(&machine, &lab.policy())?;
    steps.step("systemd is up, and so is the kernel's WireGuard", || {
        machine.boot();
        systemd::tunnel(&lab)?;
        memory()
    })?;
    systemd::installed(steps, &machine)?;
    steps.step("the unit starts with MemoryMax=32M", || {
        // What `install` has read of the program is not the unit's to pay.
        machine.ok(&["systemctl", "stop", UNIT]);
        machine.ok(&["sync"]);
        fs::write("/proc/sys/vm/drop_caches", "3").context("forget what was read")?;
        machine.ok_within(lab::machine::LONG, &["systemctl", "start", UNIT]);
        let limit = machine.property(UNIT, "MemoryMax");
        ensure!(limit == LIMIT.to_string(), "MemoryMax is {limit}");
        let stamp = |name: &str| machine.property(UNIT, name).parse::<f64>().context("systemd's clock");
        let ready_us = stamp("ActiveEnterTimestampMonotonic")? - stamp("ExecMainStartTimestampMonotonic")?;
        Ok(format!("ready after {:.1} s; {}", ready_us / 1e6, took(&MemoryGroup::of(GROUP))))
    })?;
    let group = MemoryGroup::of(GROUP);
    steps.step("the first audit of its own", || {
        machine.wait("an audit", |machine| !machine.status()["daemon"]["audit"].is_null());
        Ok(took(&group))
    })?;
    steps.step(
        "by what its unit lets it, it holds every control, is blind to nothing, and sets a keepalive back",
        || {
            let held = all_held(&lab.hub);
            let report = machine.status();
            let held = held.with_context(|| format!("{report:#}\n{}", machine.journal()))?;
            // sshd listens on every address of this disk, which is told.
            ensure!(blind(&report).is_empty() && report["verdict"] == "drift", "{report:#}");
            Ok(format!("{}; after {:.1?}", held.join(" "), keepalive_comes_back(&lab)?))
        },
    )?;
    steps.step("minutes of strangers, scrapes, listeners and foreign rules", || {
        let (mut rounds, mut most, mut done) = (0, 0, Ok(()));
        lab.internet.nft(SENT)?;
        let before = machine.dropped()?;
        let heard = machine.nobody_answers_while(|machine| {
            let until = Instant::now() + LONG_ENOUGH;
            while done.is_ok() && Instant::now() < until {
                let next = Instant::now() + ROUND;
                done = round(machine, rounds).and_then(|()| {
                    most = most.max(own(&group)?);
                    Ok(())
                });
                rounds += 1;
                std::thread::sleep(next.saturating_duration_since(Instant::now()));
            }
        });
        done.with_context(|| format!("round {rounds}: {}", machine.journal()))?;
        ensure!(most <= bound()?, "{most} bytes without files in one of the rounds: {}", took(&group));
        let listed = lab.internet.ok(&["nft", "list", "counter", "inet", "sent", "others"])?;
        let others = listed.split_whitespace().skip_while(|word| *word != "packets").nth(1);
        let sent = heard.knocks as f64 + others.unwrap_or_default().parse::<f64>().context("what was sent")?;
        ensure!(sent > f64::from(rounds * FLOOD / 2), "only {sent} packets were sent");
        let counted = patiently("everything refused is counted", || {
            machine.dropped().ok().map(|now| now - before).filter(|counted| *counted >= sent)
        })?;
        ensure!(counted == sent, "{counted} packets were counted of {sent}");
        Ok(format!(
            "{rounds} rounds, {sent} packets sent and {counted} counted in {:.0} s; at most {} KiB without files; {}",
            heard.lasted.as_secs_f64(),
            most >> 10,
            took(&group)
        ))
    })?;
    steps.step("a flush of all rules is repaired", || {
        lab.spoke.ok(&["nft", "flush", "ruleset"])?;
        // By the tc guard, until then.
        systemd::others_are_silent(&machine)?;
        machine.wait("the table is there again", |machine| {
            machine.run(&["nft", "list", "table", "inet", "spokeguard"]).code == Some(0)
        });
        systemd::is_shut(&machine)?;
        Ok(took(&group))
    })?;
    steps.step("nobody was killed, and nothing was too much", || {
        let (killed, restarts) = (group.killed()?, machine.property(UNIT, "NRestarts"));
        ensure!(
            killed == 0 && restarts == "0",
            "{killed} killed, {restarts} restarts: {}\n{}",
            took(&group),
            machine.journal()
        );
        let own = own(&group)?;
        ensure!(own <= bound()?, "{own} bytes without files: {}", took(&group));
        in_figures(&machine, &group)
    })
}

/// What happens on a busy host in three seconds, and that the rules hold.
fn round(machine: &Machine, number: u32) -> Result<()> {
    let lab = machine.lab;
    lab.internet.flood_udp(SocketAddr::new(SPOKE_PUBLIC, 33_000), FLOOD)?;
    let name = format!("app-{number}");
    let port = 20_000 + (number % 1000) as u16;
    let app = lab.spoke.listen(&name, &[&format!("tcp/127.0.0.1:{port}")])?;
    lab.spoke.nft(&format!(
        "table inet busy
         delete table inet busy
         table inet busy {{
           chain a {{ type filter hook input priority 10; tcp dport {port} counter accept
           }}
         }}"
    ))?;
    systemd::is_shut(machine)?;
    let answer = lab.internet.connect(SocketAddr::new(SPOKE_PUBLIC, port), SOON);
    ensure!(answer == Answer::Silent, "{port} of a new process: {answer:?}");
    drop(app);
    let page = scrape(&lab.hub)?;
    ensure!(page.contains("spokeguard_packets_total{"), "{page}");
    Ok(())
}

/// Bytes. The limit itself can't be passed; most of what reaches it are files, which the kernel gives up.
fn own(group: &MemoryGroup) -> Result<u64> {
    Ok(group.stat("anon")? + group.stat("kernel")?)
}

fn bound() -> Result<u64> {
    Ok(if crate::features::is_at_least(6, 4)? { OWN } else { OWN + OLDER_MEANS })
}

/// Of the group, which is the daemon and all that it starts.
fn took(group: &MemoryGroup) -> String {
    let kib = |bytes: Result<u64>| bytes.map_or_else(|_| "?".to_owned(), |bytes| (bytes >> 10).to_string());
    let stat = |name| kib(group.stat(name));
    let limited = group.limited().map_or_else(|_| "?".to_owned(), |times| times.to_string());
    format!(
        "peak {} KiB, limit met {limited} times; now without files {} KiB, the kernel's {} KiB, files {} KiB",
        kib(group.peak()),
        stat("anon"),
        stat("kernel"),
        stat("file")
    )
}

fn in_figures(machine: &Machine, group: &MemoryGroup) -> Result<String> {
    let page = scrape(&machine.lab.hub)?;
    let value = |name: &str| {
        let line = page.lines().find(|line| line.starts_with(name) && line[name.len()..].starts_with(' '));
        let text = line.and_then(|line| line.split(' ').nth(1)).with_context(|| format!("no {name}"))?;
        text.parse::<f64>().with_context(|| format!("{name} {text}"))
    };
    let status = format!("/proc/{}/status", machine.property(UNIT, "MainPID"));
    let status = fs::read_to_string(status).context("the daemon's memory")?;
    let high = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap_or_default().trim();
    let used = fs::read_to_string(group.file("cpu.stat")).context("the group's time")?;
    let used_us = used.lines().find_map(|line| line.strip_prefix("usage_usec ")).context("no usage_usec")?;
    let cpu_s = used_us.trim().parse::<f64>().context("usage_usec")? / 1e6;
    let bpf = value("spokeguard_bpf_memory_bytes")?;
    ensure!(bpf > 0.0 && bpf <= BPF, "{bpf} bytes of BPF memory");
    Ok(format!(
        "resident {:.0} KiB (highest {high}), BPF {:.0} KiB, {}\n{cpu_s:.1} s of a processor that does 500 million instructions a second; {}",
        value("spokeguard_resident_memory_bytes")? / 1024.0,
        bpf / 1024.0,
        took(group),
        memory()?
    ))
}

/// Of the machine.
fn memory() -> Result<String> {
    let text = fs::read_to_string("/proc/meminfo").context("read the machine's memory")?;
    let value = |name: &str| text.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default().trim();
    Ok(format!("machine: {} in all, {} available", value("MemTotal:"), value("MemAvailable:")))
}
