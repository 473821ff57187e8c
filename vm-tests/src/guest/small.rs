//! The unit's 32 MB on a machine of 512: some minutes of a busy host, with what all of it took in figures.

use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use lab::{Answer, Daemon, Lab, MemoryGroup, Mesh, SPOKE_MESH, SPOKE_PUBLIC, Shape};

use crate::{SOON, Steps, patiently, run_to_end};

const LIMIT: u64 = 32 << 20;
/// Of it, what no other use of the memory could take: without the files that the kernel keeps for it.
const OWN: u64 = 12 << 20;
/// Of the guest's time: what is idle of it costs nothing.
const LONG_ENOUGH: Duration = Duration::from_secs(180);
const ROUND: Duration = Duration::from_secs(3);
const METRICS: u16 = 9984;
const GROUPS: &str = "/sys/fs/cgroup";
const DISK: &str = "/mnt";

pub fn run(steps: &mut Steps) -> Result<()> {
    // Pages of a program that came with the root belong to nobody; those of one on a disk count as the service's.
    // Before the lab, whose nodes have mounts of their own.
    steps.step("the program lies on a disk", || {
        run_to_end(Command::new("mount").args(["-t", "ext4", "/dev/vda", DISK]))?;
        let (program, copy) = (lab::spokeguard()?, Path::new(DISK).join("spokeguard"));
        let bytes = fs::copy(&program, &copy).context("copy the program to the disk")?;
        run_to_end(Command::new("mount").arg("--bind").arg(&copy).arg(&program))?;
        run_to_end(&mut Command::new("sync"))?;
        fs::write("/proc/sys/vm/drop_caches", "3").context("forget what was read")?;
        Ok(format!("{} KiB", bytes >> 10))
    })?;
    let lab = steps.make("a lab of the kernel's WireGuard", || {
        let lab = Lab::build(Shape { mesh: Mesh::WireGuard, container: false })?;
        Ok((lab, format!("{}; {}", crate::release()?, memory()?)))
    })?;
    let _web = lab.spoke.web()?;
    let _database = lab.spoke.listen("postgres", &["tcp/[::]:5432"])?;
    fs::write(format!("{GROUPS}/cgroup.subtree_control"), "+memory").context("hand memory on to groups")?;
    let group = MemoryGroup::new(&lab, LIMIT)?;
    let folder = lab.dir.join("guard");
    fs::create_dir_all(&folder)?;
    fs::write(folder.join("policy.toml"), lab.policy())?;
    let daemon = steps.make("the daemon starts with MemoryMax=32M", || {
        // Outside of the lab's own group, where the bind guard would be otherwise.
        let guarded = format!("SPOKEGUARD_CGROUP={GROUPS}");
        let wrapper = group.wrapper();
        let wrapper = wrapper.iter().map(String::as_str);
        let wrapper: Vec<&str> = ["env", &guarded].into_iter().chain(wrapper).collect();
        let daemon = lab.spoke.daemon_under(&wrapper, &folder, &[]).with_context(|| took(&group))?;
        let detail = format!("ready after {:.1} s; {}", daemon.started_in.as_secs_f64(), took(&group));
        Ok((daemon, detail))
    })?;
    steps.step("the first audit of its own", || {
        patiently("an audit", || {
            let status = lab.spoke.spokeguard(&daemon.arguments(&["status", "--format", "json"])).ok()?;
            (!status.json().ok()?["daemon"]["audit"].is_null()).then_some(())
        })
        .with_context(|| daemon.running.log())?;
        Ok(took(&group))
    })?;
    steps.step("minutes of strangers, scrapes, listeners and foreign rules", || {
        let before = Instant::now();
        let mut rounds = 0;
        while before.elapsed() < LONG_ENOUGH {
            let next = Instant::now() + ROUND;
            round(&lab, rounds).with_context(|| format!("round {rounds}: {}", daemon.running.log()))?;
            rounds += 1;
            std::thread::sleep(next.saturating_duration_since(Instant::now()));
        }
        Ok(format!("{rounds} rounds in {:.0} s; {}", before.elapsed().as_secs_f64(), took(&group)))
    })?;
    steps.step("a flush of all rules is repaired", || {
        lab.spoke.ok(&["nft", "flush", "ruleset"])?;
        shut(&lab)?;
        patiently("the table is there again", || {
            lab.spoke.ok(&["nft", "list", "table", "inet", "spokeguard"]).ok()
        })
        .with_context(|| daemon.running.log())?;
        open_and_shut(&lab)?;
        Ok(took(&group))
    })?;
    steps.step("nobody was killed, and nothing was too much", || {
        ensure!(
            group.killed()? == 0,
            "{} were killed: {}\n{}",
            group.killed()?,
            took(&group),
            daemon.running.log()
        );
        // The limit itself could not have been passed; most of what reached it are files, which the kernel gives up.
        let own = group.stat("anon")? + group.stat("kernel")?;
        ensure!(own <= OWN, "{own} bytes: {}", took(&group));
        in_figures(&lab, &daemon, &group)
    })
}

/// What happens on a busy host in three seconds, and that the rules hold.
fn round(lab: &Lab, number: u32) -> Result<()> {
    lab.internet.flood_udp(SocketAddr::new(SPOKE_PUBLIC, 33_000), 200)?;
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
    open_and_shut(lab)?;
    let answer = lab.internet.connect(SocketAddr::new(SPOKE_PUBLIC, port), SOON);
    ensure!(answer == Answer::Silent, "{port} of a new process: {answer:?}");
    drop(app);
    let page = lab.hub.http_get(SocketAddr::new(SPOKE_MESH, METRICS), "/metrics", &[])?;
    ensure!(page.status == 200 && page.body.contains("spokeguard_packets_total{"), "{}", page.head);
    Ok(())
}

fn shut(lab: &Lab) -> Result<()> {
    let answer = lab.internet.connect(SocketAddr::new(SPOKE_PUBLIC, 5432), SOON);
    ensure!(answer == Answer::Silent, "5432 for a stranger: {answer:?}");
    Ok(())
}

fn open_and_shut(lab: &Lab) -> Result<()> {
    shut(lab)?;
    let answer = lab.internet.connect(SocketAddr::new(SPOKE_PUBLIC, 443), SOON);
    ensure!(answer == Answer::Open, "443 for a stranger: {answer:?}");
    Ok(())
}

/// Of the group, which is the daemon and all that it starts.
fn took(group: &MemoryGroup) -> String {
    let kib = |bytes: Result<u64>| bytes.map_or_else(|_| "?".to_owned(), |bytes| (bytes >> 10).to_string());
    let stat = |name| kib(group.stat(name));
    format!(
        "peak {} KiB; now without files {} KiB, the kernel's {} KiB, files {} KiB",
        kib(group.peak()),
        stat("anon"),
        stat("kernel"),
        stat("file")
    )
}

fn in_figures(lab: &Lab, daemon: &Daemon, group: &MemoryGroup) -> Result<String> {
    let page = lab.hub.http_get(SocketAddr::new(SPOKE_MESH, METRICS), "/metrics", &[])?.body;
    let value = |name: &str| {
        let line = page.lines().find(|line| line.starts_with(name) && line[name.len()..].starts_with(' '));
        let text = line.and_then(|line| line.split(' ').nth(1)).with_context(|| format!("no {name}"))?;
        text.parse::<f64>().with_context(|| format!("{name} {text}"))
    };
    let status = fs::read_to_string(format!("/proc/{}/status", daemon.running.pid()))
        .context("the daemon's memory")?;
    let high = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap_or_default().trim();
    let used = fs::read_to_string(group.file("cpu.stat")).context("the group's time")?;
    let used_us = used.lines().find_map(|line| line.strip_prefix("usage_usec ")).context("no usage_usec")?;
    let cpu_s = used_us.trim().parse::<f64>().context("usage_usec")? / 1e6;
    Ok(format!(
        "resident {:.0} KiB (highest {high}), BPF {:.0} KiB, {}\n{cpu_s:.1} s of a processor that does 500 million instructions a second; {}",
        value("spokeguard_resident_memory_bytes")? / 1024.0,
        value("spokeguard_bpf_memory_bytes")? / 1024.0,
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
