//! The main job, told as a story: a lab on this machine, a spoke with everything wrong,
//! spokeguard, the same spoke right, and three accidents. Ends with a summary, and with a
//! failure if any step did not hold.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use lab::{
    Answer, Daemon, HUB_MESH, HUB_PUBLIC, Lab, Mesh, Need, Node, Prometheus, SPOKE_MESH, SPOKE_PUBLIC,
    SPOKE_PUBLIC_V6, Shape, Sshd, wait_until,
};

const METRICS: u16 = 9984;
const PATIENCE: Duration = Duration::from_secs(15);

fn main() -> ExitCode {
    let lacking = lab::missing(&[
        Need::Lab,
        Need::WireGuard,
        Need::Nmap,
        Need::Sshd,
        Need::Prometheus,
        Need::Spokeguard,
    ]);
    if !lacking.is_empty() {
        eprintln!("demo: this machine lacks:\n{}", lacking.join("\n"));
        return ExitCode::FAILURE;
    }
    let mut story = Story { begun: Instant::now(), steps: Vec::new() };
    let told = tell(&mut story);
    if let Err(error) = &told {
        println!("\n  FAILED: {error:#}");
    }
    story.summary();
    if told.is_ok() && story.steps.iter().all(|step| step.held) {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

struct Story {
    begun: Instant,
    steps: Vec<Step>,
}

struct Step {
    what: &'static str,
    held: bool,
    detail: String,
}

impl Story {
    fn chapter(&self, title: &str) {
        println!("\n== {title} {}", "=".repeat(74_usize.saturating_sub(title.len())));
    }

    /// Records whether a promise held, and says so.
    fn promise(&mut self, what: &'static str, held: bool, detail: impl Into<String>) {
        let detail = detail.into();
        println!("  [{}] {what}: {detail}", if held { "held" } else { "FAILED" });
        self.steps.push(Step { what, held, detail });
    }

    fn summary(&self) {
        println!("\n== Summary {}", "=".repeat(69));
        for step in &self.steps {
            let mark = if step.held { "held  " } else { "FAILED" };
            println!("  {mark}  {:<44} {}", step.what, step.detail);
        }
        let failed = self.steps.iter().filter(|step| !step.held).count();
        println!(
            "\n  {} of {} promises held, in {:.0} s",
            self.steps.len() - failed,
            self.steps.len(),
            self.begun.elapsed().as_secs_f64()
        );
    }
}

fn tell(story: &mut Story) -> Result<()> {
    story.chapter("A spoke on the internet");
    let lab = Lab::build(Shape { mesh: Mesh::WireGuard, container: true })?;
    let sshd = lab.spoke.sshd(22, &["0.0.0.0", "::"], "KbdInteractiveAuthentication no")?;
    let _database = lab.spoke.listen("postgres", &["tcp/0.0.0.0:5432"])?;
    let _web = lab.spoke.web()?;
    let container = lab.container.as_ref().context("the lab has a container")?;
    let _app = container.listen("admin-panel", &["tcp/[::]:8000"])?;
    lab.publish(8080, 8000)?;
    println!("  internet ---- spoke {SPOKE_PUBLIC} ==== WireGuard ==== hub {HUB_MESH}");
    println!("  On the spoke: a web server on 80 and 443, sshd on 0.0.0.0:22, a database on");
    println!("  0.0.0.0:5432, and a container's port published by DNAT on 8080.");

    story.chapter("What the internet sees");
    for address in [SPOKE_PUBLIC, SPOKE_PUBLIC_V6] {
        let open = nmap(&lab, address)?;
        ensure!(open.contains(&22), "the spoke was not open to begin with: {open:?}");
    }

    story.chapter("What spokeguard thinks of that");
    let folder = lab.dir.join("guard");
    std::fs::create_dir_all(&folder)?;
    let policy = lab.policy() + "[[local]]\nname = \"containers\"\ninterfaces = [\"docker0\"]\n";
    std::fs::write(folder.join("policy.toml"), &policy)?;
    show_policy(&policy);
    let policy_path = folder.join("policy.toml").display().to_string();
    println!("\n  $ spokeguard check");
    let check = lab.spoke.spokeguard(&[
        "check",
        "--policy",
        &policy_path,
        "--state-dir",
        &folder.join("state").display().to_string(),
    ])?;
    print!("{}", &check.stdout);
    story.promise("check reports drift", check.code == Some(1), format!("exit code {}", code(check.code)));

    story.chapter("The daemon starts");
    println!("  $ spokeguard run &");
    let daemon = lab.spoke.daemon_in(&folder, &[])?;
    println!("  ready after {:.0} ms", daemon.started_in.as_secs_f64() * 1e3);

    story.chapter("What the internet sees now");
    let wanted = BTreeSet::from([80, 443]);
    for (address, what) in [
        (SPOKE_PUBLIC, "nmap over IPv4 finds 80 and 443 only"),
        (SPOKE_PUBLIC_V6, "nmap over IPv6 finds 80 and 443 only"),
    ] {
        let open = nmap(&lab, address)?;
        story.promise(what, open == wanted, list(&open));
    }
    ssh(story, &lab, &sshd)?;

    story.chapter("Accident 1: someone flushes the firewall");
    println!("  $ nft flush ruleset");
    let events = Events::mark(&daemon.state_dir);
    lab.spoke.ok(&["nft", "flush", "ruleset"])?;
    let event = events
        .wait("the flush is repaired", |e| e["kind"] == "repaired" && e["code"] == "firewall-missing")?;
    told(&event);
    let probe = lab.internet.connect(SocketAddr::new(SPOKE_PUBLIC, 5432), Duration::from_millis(300));
    story.promise(
        "a flush is repaired and attributed",
        probe == Answer::Silent && event["by"]["process"] == "nft",
        format!("{} ms, by {}", event["took_ms"], event["by"]["process"]),
    );

    story.chapter("Accident 2: someone turns the keepalive off");
    println!("  $ wg set wg0 peer ... persistent-keepalive 0");
    let begun = Instant::now();
    lab.spoke.ok(&["wg", "set", "wg0", "peer", &lab.keys.hub.public, "persistent-keepalive", "0"])?;
    let back = wait_until(PATIENCE, "the keepalive is 25 s again", || {
        let shown = lab.spoke.ok(&["wg", "show", "wg0", "persistent-keepalive"]).ok()?;
        shown.trim_end().ends_with("25").then(|| begun.elapsed())
    });
    let detail = back.as_ref().map_or_else(
        |error| error.to_string(),
        |took| format!("{:.1} s (read every 10 s)", took.as_secs_f64()),
    );
    story.promise("the keepalive is set again", back.is_ok(), detail);

    story.chapter("Accident 3: something new wants to listen");
    println!("  $ redis --bind 0.0.0.0 --port 6379");
    let events = Events::mark(&daemon.state_dir);
    let begun = Instant::now();
    let refused = lab.spoke.listen("redis", &["tcp/0.0.0.0:6379"]).err().map(|error| format!("{error:#}"));
    let refused = refused.unwrap_or_default().contains("Operation not permitted");
    let event = events.wait("the refused bind is reported", |e| e["subject"] == "tcp/0.0.0.0:6379")?;
    told(&event);
    story.promise(
        "a bind of every address is refused",
        refused && event["code"] == "bind-refused" && event["by"]["process"] == "redis",
        format!("{:.0} ms, by {}", begun.elapsed().as_secs_f64() * 1e3, event["by"]["process"]),
    );
    let probe = lab.internet.connect(SocketAddr::new(SPOKE_PUBLIC, 6379), Duration::from_millis(300));
    story.promise("and strangers don't reach it", probe == Answer::Silent, format!("{probe:?}"));

    story.chapter("What the daemon says");
    println!("  $ spokeguard status");
    print!("{}", &lab.spoke.spokeguard(&daemon.arguments(&["status"]))?.stdout);

    story.chapter("What the hub sees");
    let prometheus = lab.hub.prometheus(&[SocketAddr::new(SPOKE_MESH, METRICS)])?;
    scraped(story, &lab, &prometheus)?;
    let stranger = lab.internet.connect(SocketAddr::new(SPOKE_PUBLIC, METRICS), Duration::from_millis(300));
    story.promise("the metrics are not public", stranger != Answer::Open, format!("{stranger:?}"));

    story.chapter("The daemon is killed");
    let mut daemon: Daemon = daemon;
    println!("  $ kill -9 $(pidof spokeguard)");
    daemon.kill_9()?;
    let open = lab.internet.nmap_open(SPOKE_PUBLIC, "22,80,443,5432,6379,8080")?;
    story.promise("the rules outlive it", open == wanted, list(&open));
    Ok(())
}

/// A scan of every port by a real nmap, its answer shown.
fn nmap(lab: &Lab, address: IpAddr) -> Result<BTreeSet<u16>> {
    let six = if address.is_ipv6() { "-6 " } else { "" };
    println!("  $ nmap {six}-sS -p- {address}");
    let open = lab.internet.nmap_open(address, "-")?;
    println!("    open: {}", list(&open));
    Ok(open)
}

fn ssh(story: &mut Story, lab: &Lab, sshd: &Sshd) -> Result<()> {
    println!("  hub $ ssh root@{SPOKE_MESH} echo in");
    let login = sshd.login(&lab.hub, SPOKE_MESH, "echo in")?;
    let detail = if login.stdout.trim() == "in" { "logged in".to_owned() } else { login.all() };
    story.promise("ssh from the hub, through the tunnel", login.stdout.trim() == "in", detail);
    let refused: Vec<Answer> =
        [(&lab.internet, SPOKE_PUBLIC), (&lab.internet, SPOKE_PUBLIC_V6), (&lab.hub, SPOKE_PUBLIC)]
            .iter()
            .map(|(from, to): &(&Node, IpAddr)| {
                from.connect(SocketAddr::new(*to, 22), Duration::from_millis(300))
            })
            .collect();
    let held = refused.iter().all(|answer| *answer == Answer::Silent);
    println!("  (the hub's own public address is {HUB_PUBLIC}: it is a stranger there, too)");
    story.promise("ssh from anywhere else", held, "no answer, v4 and v6");
    Ok(())
}

fn scraped(story: &mut Story, lab: &Lab, prometheus: &Prometheus) -> Result<()> {
    let up = wait_until(PATIENCE, "Prometheus has scraped the spoke", || {
        let up = prometheus.query(&lab.hub, "up == 1").ok()?;
        (!up.is_empty()).then_some(())
    });
    story.promise("Prometheus scrapes it through the tunnel", up.is_ok(), "up = 1");
    up?;
    for expression in [
        "spokeguard_verdict",
        "spokeguard_findings > 0",
        "spokeguard_repairs_total > 0",
        "spokeguard_drift_events_total > 0",
        "spokeguard_wireguard_handshake_age_seconds",
        "spokeguard_dropped_packets_total > 0",
        "spokeguard_connection_attempts_total > 0",
        "spokeguard_packets_total{scope=\"public\",service!=\"other\"} > 0",
    ] {
        for (labels, value) in prometheus.query(&lab.hub, expression)?.iter().take(6) {
            println!("    {} {value}", series(labels));
        }
    }
    let count = prometheus.query(&lab.hub, "count({__name__=~\"spokeguard_.*\"})")?;
    let count = count.first().map_or(0.0, |(_, value)| *value);
    story.promise(
        "its series are bounded",
        count > 20.0 && count <= 150.0,
        format!("{count} series, at most 150"),
    );
    Ok(())
}

/// The event log from a moment on.
struct Events {
    path: std::path::PathBuf,
    from: usize,
}

impl Events {
    fn mark(state: &Path) -> Self {
        let path = state.join("events.jsonl");
        let from = std::fs::read_to_string(&path).map_or(0, |text| text.len());
        Self { path, from }
    }

    fn wait(&self, what: &str, wanted: impl Fn(&serde_json::Value) -> bool) -> Result<serde_json::Value> {
        wait_until(PATIENCE, what, || {
            let text = std::fs::read_to_string(&self.path).ok()?;
            let lines = text.get(self.from..)?.lines();
            lines.filter_map(|line| serde_json::from_str(line).ok()).find(|event| wanted(event))
        })
    }
}

fn told(event: &serde_json::Value) {
    let text = |key: &str| event[key].as_str().unwrap_or_default().to_owned();
    println!("    {} {} {}: {}", text("at"), text("kind"), text("code"), text("subject"));
    if let (Some(process), Some(pid)) = (event["by"]["process"].as_str(), event["by"]["pid"].as_u64()) {
        println!("    by {process} (pid {pid})");
    }
}

fn series(labels: &serde_json::Value) -> String {
    let name = labels["__name__"].as_str().unwrap_or_default();
    let rest: Vec<String> = labels
        .as_object()
        .into_iter()
        .flatten()
        .filter(|(key, _)| !["__name__", "job", "instance"].contains(&key.as_str()))
        .map(|(key, value)| match (key.as_str(), value.as_str().unwrap_or_default()) {
            // These say by themselves what they are, and eighty columns are few.
            ("direction" | "family" | "proto" | "scope", value) => value.to_owned(),
            (key, value) => format!("{key}={value}"),
        })
        .collect();
    format!("{}{{{}}}", name.trim_start_matches("spokeguard_"), rest.join(","))
}

fn show_policy(policy: &str) {
    println!("  policy.toml says:");
    let shown = policy.lines().skip_while(|line| !line.starts_with("[public]"));
    for line in shown {
        println!("    {line}");
    }
}

fn list(ports: &BTreeSet<u16>) -> String {
    if ports.is_empty() {
        return "none".into();
    }
    ports.iter().map(u16::to_string).collect::<Vec<_>>().join(", ")
}

fn code(code: Option<i32>) -> String {
    code.map_or("none".into(), |code| code.to_string())
}
