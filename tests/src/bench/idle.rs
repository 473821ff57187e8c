//! What the daemon costs while nothing happens, beside an exporter that everybody runs anyway: memory and CPU
//! under the same scrapes, start, scrape, size.

use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use lab::{Lab, Mesh, Node, Running, SPOKE_MESH, Shape};
use spokeguard::source::bpf;

use crate::figures::{Goal, Row, Section, paired};
use crate::policy::{self, EXPORTER, METRICS};

const SCRAPE_EVERY: Duration = Duration::from_secs(15);
const NAME: &str = "prometheus-node-exporter";
const PATIENCE: Duration = Duration::from_secs(10);

pub fn measure(quick: bool) -> Result<Section> {
    let mut section = Section {
        name: "idle",
        title: "What it costs while nothing happens",
        rows: Vec::new(),
        goals: Vec::new(),
        notes: Vec::new(),
    };
    // A window is a whole number of scrapes long.
    let (windows, scrapes) = if quick { (1, 2) } else { (5, 4) };
    windows_of(&mut section, windows, scrapes)?;
    starts(&mut section, if quick { 5 } else { 21 })?;
    Ok(section)
}

/// One of the two that are compared.
struct Agent {
    to: SocketAddr,
    group: Group,
    rss: Vec<f64>,
    anonymous: Vec<f64>,
    cpu: Vec<f64>,
    used: Duration,
    children: usize,
}

impl Agent {
    fn new(port: u16, process: &Running) -> Result<Agent> {
        let group = Group::around(process.pid(), port)?;
        let used = group.cpu()?;
        let to = SocketAddr::new(SPOKE_MESH, port);
        Ok(Agent { to, group, rss: Vec::new(), anonymous: Vec::new(), cpu: Vec::new(), used, children: 0 })
    }

    fn look(&mut self) -> Result<()> {
        let processes = self.group.processes()?;
        self.children = self.children.max(processes.len() - 1);
        let (mut rss, mut anonymous) = (0.0, 0.0);
        for pid in processes {
            let path = format!("/proc/{pid}/smaps_rollup");
            // A child may end between the two looks.
            let Ok(text) = fs::read_to_string(&path) else { continue };
            rss += kib(&text, "Rss:").with_context(|| path.clone())? / 1024.0;
            anonymous += kib(&text, "Anonymous:").with_context(|| path.clone())? / 1024.0;
        }
        ensure!(rss > 0.0, "an agent has ended");
        self.rss.push(rss);
        self.anonymous.push(anonymous);
        Ok(())
    }
}

fn windows_of(section: &mut Section, windows: u32, scrapes: u32) -> Result<()> {
    let lab = Lab::build(Shape { mesh: Mesh::WireGuard, container: false })?;
    let folder = crate::folder(&lab, &policy::of_the_contracts_size(&lab)?)?;
    let daemon = lab.spoke.daemon_in(&folder, &[])?;
    let exporter = exporter(&lab.spoke)?;
    let mut agents = [Agent::new(METRICS, &daemon.running)?, Agent::new(EXPORTER, &exporter)?];
    answers(&lab.hub, agents[1].to)?;
    let mut series = [0, 0];
    // Pools fill and code is paged in during the first few.
    for _ in 0..3 {
        for (agent, series) in agents.iter().zip(&mut series) {
            let body = lab.hub.inside(|| scrape(agent.to))?;
            *series = body.lines().filter(|line| !line.starts_with('#') && !line.is_empty()).count();
        }
    }
    for agent in &mut agents {
        agent.used = agent.group.cpu()?;
    }
    let mut next = Instant::now();
    for _ in 0..windows {
        for _ in 0..scrapes {
            for agent in &agents {
                lab.hub.inside(|| scrape(agent.to))?;
            }
            next += SCRAPE_EVERY;
            // Half way to the next scrape, when the work of this one is over.
            std::thread::sleep((next - SCRAPE_EVERY / 2).saturating_duration_since(Instant::now()));
            for agent in &mut agents {
                agent.look()?;
            }
            std::thread::sleep(next.saturating_duration_since(Instant::now()));
        }
        let window = SCRAPE_EVERY * scrapes;
        for agent in &mut agents {
            let used = agent.group.cpu()?;
            let ms = (used - agent.used).as_secs_f64() * 1e3;
            agent.cpu.push(ms * 60.0 / window.as_secs_f64());
            agent.used = used;
        }
    }
    let peak = |process: &Running| {
        let text = fs::read_to_string(format!("/proc/{}/status", process.pid()))?;
        Ok::<_, anyhow::Error>(kib(&text, "VmHWM:")? / 1024.0)
    };
    let peaks = [peak(&daemon.running)?, peak(&exporter)?];
    let [ours, theirs] = agents;
    section.notes.push(format!(
        "{windows} windows of {} s, both at work at once, scraped each 15 s through the tunnel \
         ({} and {} series). \
         CPU and memory of all their processes: {} and {} children were seen. CPU by {}.",
        (SCRAPE_EVERY * scrapes).as_secs(),
        series[0],
        series[1],
        ours.children,
        theirs.children,
        ours.group.means(),
    ));
    section.notes.push(
        "The daemon looks at everything each 10 minutes; a window that holds such a look shows it as \
         its maximum."
            .to_string(),
    );
    let (rss, anonymous) =
        (paired(&ours.rss, &theirs.rss)?.median(), paired(&ours.anonymous, &theirs.anonymous)?);
    section.rows.extend(rows("ours", "spokeguard run", ours, peaks[0])?);
    section.rows.extend(rows(
        "node-exporter",
        "prometheus-node-exporter --web.listen-address=...",
        theirs,
        peaks[1],
    )?);
    let median = |at: usize| section.rows[at].samples.median();
    section.goals.extend([
        Goal::at_most("resident", "MiB", median(0), 6.0),
        Goal::at_most("resident, stretch", "MiB", median(0), 4.0),
        Goal::at_most("resident, of node-exporter's", "x", rss, 1.0 / 3.0),
        Goal::at_most("anonymous, of node-exporter's", "x", anonymous.median(), 1.0 / 3.0),
        Goal::at_most("CPU a minute", "ms", median(3), 10.0),
    ]);
    Ok(())
}

fn rows(who: &str, command: &str, agent: Agent, peak: f64) -> Result<Vec<Row>> {
    Ok(vec![
        Row::new(format!("{who}: resident"), "MiB", command, agent.rss)?,
        Row::new(format!("{who}: anonymous"), "MiB", command, agent.anonymous)?,
        Row::new(format!("{who}: peak resident since start"), "MiB", command, vec![peak])?,
        Row::new(format!("{who}: CPU a minute"), "ms", command, agent.cpu)?,
    ])
}

/// Without a tunnel, which would be most of what a scrape takes.
fn starts(section: &mut Section, rounds: usize) -> Result<()> {
    let lab = Lab::build(crate::PLAIN)?;
    let folder = crate::folder(&lab, &policy::of_the_contracts_size(&lab)?)?;
    let pins = lab.spoke.path("/sys/fs/bpf/spokeguard");
    let (mut cold, mut again, mut theirs) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..rounds {
        for times in [&mut cold, &mut again] {
            let mut daemon = lab.spoke.daemon_in(&folder, &[])?;
            times.push(daemon.started_in.as_secs_f64() * 1e3);
            daemon.running.stop()?;
        }
        lab.spoke.inside(|| bpf::release(&pins))?;
        lab.spoke.inside(|| bpf::guard::release(&pins))?;
        lab.spoke.nft("delete table inet spokeguard")?;
        let started = Instant::now();
        let exporter = exporter(&lab.spoke)?;
        answers(&lab.spoke, SocketAddr::new(SPOKE_MESH, EXPORTER))?;
        theirs.push(started.elapsed().as_secs_f64() * 1e3);
        drop(exporter);
    }
    let _daemon = lab.spoke.daemon_in(&folder, &[])?;
    let _exporter = exporter(&lab.spoke)?;
    let agents = [METRICS, EXPORTER].map(|port| SocketAddr::new(SPOKE_MESH, port));
    answers(&lab.hub, agents[1])?;
    let mut scrapes = [const { Vec::new() }; 2];
    lab.hub.inside(|| {
        for _ in 0..rounds * 5 {
            for (agent, times) in agents.iter().zip(&mut scrapes) {
                let started = Instant::now();
                scrape(*agent)?;
                times.push(started.elapsed().as_secs_f64() * 1e3);
            }
        }
        Ok(())
    })?;
    let [scrape, their_scrape] = scrapes;
    let sizes = [size(&lab::spokeguard()?)?, size(&program(NAME)?)?];
    section.goals.extend([
        Goal::at_most(
            "start (nothing there), of node-exporter's",
            "x",
            paired(&cold, &theirs)?.median(),
            0.6,
        ),
        Goal::at_most(
            "start (all in force), of node-exporter's",
            "x",
            paired(&again, &theirs)?.median(),
            0.6,
        ),
        Goal::at_most("scrape, of node-exporter's", "x", paired(&scrape, &their_scrape)?.median(), 0.15),
        Goal::at_most("binary, of node-exporter's", "x", sizes[0] / sizes[1], 0.5),
    ]);
    let get = "GET /metrics HTTP/1.0, a new connection each, over veth";
    section.rows.extend([
        Row::new("ours: start to ready, nothing there", "ms", "spokeguard run, to READY=1", cold)?,
        Row::new("ours: start to ready, all in force", "ms", "spokeguard run, to READY=1", again)?,
        Row::new("node-exporter: start to first answer", "ms", NAME, theirs)?,
        Row::new("ours: scrape", "ms", get, scrape)?,
        Row::new("node-exporter: scrape", "ms", get, their_scrape)?,
        Row::new("ours: binary", "MiB", "ls -l", vec![sizes[0]])?,
        Row::new("node-exporter: binary", "MiB", "ls -l", vec![sizes[1]])?,
    ]);
    Ok(())
}

fn exporter(node: &Node) -> Result<Running> {
    node.spawn(&[NAME.to_string(), format!("--web.listen-address={SPOKE_MESH}:{EXPORTER}")])
}

fn answers(node: &Node, to: SocketAddr) -> Result<()> {
    node.inside(|| {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match scrape(to) {
                Ok(_) => return Ok(()),
                Err(error) if Instant::now() > deadline => {
                    return Err(error.context(format!("no metrics within {PATIENCE:?}")));
                }
                Err(_) => std::thread::sleep(Duration::from_micros(200)),
            }
        }
    })
}

/// The page, from a thread in the right namespace.
fn scrape(to: SocketAddr) -> Result<String> {
    let mut stream = TcpStream::connect_timeout(&to, Duration::from_secs(2))
        .with_context(|| format!("connect to {to}"))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(format!("GET /metrics HTTP/1.0\r\nHost: {to}\r\n\r\n").as_bytes())?;
    let mut answer = String::new();
    stream.take(16 << 20).read_to_string(&mut answer).with_context(|| format!("read http://{to}/metrics"))?;
    match answer.split_once("\r\n\r\n") {
        Some((head, body)) if head.split(' ').nth(1) == Some("200") => Ok(body.to_string()),
        _ => bail!("http://{to}/metrics: {}", answer.lines().next().unwrap_or("no answer")),
    }
}

/// A control group of one agent's own: its CPU time counts every thread and child, also those that have
/// ended, to the microsecond. Where there is none, /proc/PID/stat does, in steps of 10 ms.
struct Group {
    pid: u32,
    folder: Option<PathBuf>,
}

impl Group {
    fn around(pid: u32, number: u16) -> Result<Group> {
        let folder = unified().and_then(|root| {
            sweep(&root);
            let folder = root.join(format!("sg-bench-{}-{number}", std::process::id()));
            fs::create_dir(&folder).ok()?;
            let entered = fs::write(folder.join("cgroup.procs"), pid.to_string()).is_ok()
                && fs::read_to_string(folder.join("cpu.stat")).is_ok_and(|text| text.contains("usage_usec"));
            if !entered {
                let _ = fs::remove_dir(&folder);
            }
            entered.then_some(folder)
        });
        Ok(Group { pid, folder })
    }

    fn means(&self) -> &'static str {
        if self.folder.is_some() { "cgroup cpu.stat" } else { "/proc/PID/stat, steps of 10 ms" }
    }

    fn cpu(&self) -> Result<Duration> {
        match &self.folder {
            Some(folder) => {
                let path = folder.join("cpu.stat");
                let text = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
                let usage = text.lines().find_map(|line| line.strip_prefix("usage_usec "));
                Ok(Duration::from_micros(usage.context("cpu.stat has no usage_usec")?.trim().parse()?))
            }
            None => {
                let path = format!("/proc/{}/stat", self.pid);
                let text = fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
                Ok(Duration::from_millis(10 * ticks(&text).with_context(|| format!("decode {path}"))?))
            }
        }
    }

    fn processes(&self) -> Result<Vec<u32>> {
        let text = match &self.folder {
            Some(folder) => fs::read_to_string(folder.join("cgroup.procs")).context("read cgroup.procs")?,
            None => {
                let children = fs::read_to_string(format!("/proc/{0}/task/{0}/children", self.pid));
                format!("{} {}", self.pid, children.unwrap_or_default())
            }
        };
        let pids: Vec<u32> = text.split_whitespace().filter_map(|word| word.parse().ok()).collect();
        ensure!(pids.contains(&self.pid), "process {} has ended", self.pid);
        Ok(pids)
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(folder) = &self.folder {
            // Its process goes back to where everything is; an empty group can be removed.
            if let Some(root) = folder.parent() {
                let _ = fs::write(root.join("cgroup.procs"), self.pid.to_string());
            }
            let _ = fs::remove_dir(folder);
        }
    }
}

/// Where the unified hierarchy is mounted, if it is.
fn unified() -> Option<PathBuf> {
    let mounts = fs::read_to_string("/proc/mounts").ok()?;
    let mut words = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>());
    words.find(|words| words.get(2) == Some(&"cgroup2")).map(|words| PathBuf::from(words[1]))
}

/// Groups of a run that was killed: they are empty, and only those can be removed this way.
fn sweep(root: &Path) {
    for entry in fs::read_dir(root).into_iter().flatten().flatten() {
        if entry.file_name().to_string_lossy().starts_with("sg-bench-") {
            let _ = fs::remove_dir(entry.path());
        }
    }
}

/// Fields 14 to 17 of proc(5), children that were waited for included.
fn ticks(stat: &str) -> Option<u64> {
    let (_, rest) = stat.rsplit_once(')')?;
    let fields: Vec<u64> =
        rest.split_whitespace().skip(11).take(4).map_while(|word| word.parse().ok()).collect();
    (fields.len() == 4).then(|| fields.iter().sum())
}

fn kib(text: &str, field: &str) -> Result<f64> {
    let line = text.lines().find_map(|line| line.strip_prefix(field));
    let number = line.and_then(|line| line.trim().strip_suffix(" kB")).map(str::trim);
    number.with_context(|| format!("no {field}"))?.parse().with_context(|| format!("decode {field}"))
}

fn program(name: &str) -> Result<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .map(|folder| folder.join(name))
        .find(|path| path.is_file())
        .with_context(|| format!("{name} is not installed"))
}

fn size(path: &Path) -> Result<f64> {
    let meta = fs::metadata(path).with_context(|| format!("look at {}", path.display()))?;
    Ok(meta.len() as f64 / f64::from(1 << 20))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_of_children_counts_and_names_may_hold_brackets() {
        let stat = "7 (a) b) S 1 7 7 0 -1 4194560 1 2 3 4 10 20 300 4000 20 0 1 0 99 1 1";
        assert_eq!(ticks(stat), Some(4330));
        assert_eq!(ticks("7 (a) S 1 2"), None, "cut short");
    }

    #[test]
    fn memory_is_read_in_its_own_unit_only() {
        assert_eq!(kib("1-2 [rollup]\nRss:      2048 kB\n", "Rss:").unwrap(), 2048.0);
        assert!(kib("Rss: 2 MB\n", "Rss:").is_err());
        assert!(kib("Pss: 2 kB\n", "Rss:").is_err());
    }
}
