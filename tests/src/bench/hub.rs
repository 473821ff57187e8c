//! A hub with a thousand spokes: the shipped scrape job, rules and dashboard on a real Prometheus.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use lab::{Lab, Node, Prometheus, Signal, simulated_address};
use serde_json::{Value, json};

use crate::figures::{Goal, Row, Section};

const SPOKES: u16 = 1000;
/// As prometheus.yml says: one cycle.
const EVERY: Duration = Duration::from_secs(15);
/// Until SpokeguardNodeMissed and SpokeguardFleetDark fire.
const MISSED: Duration = Duration::from_secs(90);

pub fn measure(quick: bool) -> Result<Section> {
    let cycles = if quick { 4 } else { 20 };
    let lab = Lab::build(crate::PLAIN)?;
    let folder = lab.dir.join("hub");
    install(&folder)?;
    let helper = lab::helper()?.display().to_string();
    let mut spokes = lab.hub.spawn(&[&*helper, "spokes", &SPOKES.to_string()])?;
    spokes.wait_for(lab::BOUND, Duration::from_secs(10))?;
    let prometheus = lab.hub.prometheus_by(&folder.join("prometheus.yml"))?;
    let hub = Hub { node: &lab.hub, prometheus: &prometheus };
    let all = lab::wait_until(EVERY * 6, "all spokes are scraped", || {
        (hub.number("count(up == 1)").ok()? == f64::from(SPOKES)).then(Instant::now)
    });
    all.with_context(|| prometheus.running.log())?;

    let mut seen: BTreeMap<&'static str, Vec<f64>> = BTreeMap::new();
    let mut before = hub.own()?;
    let mut next = Instant::now() + EVERY;
    for _ in 0..cycles {
        std::thread::sleep(next.saturating_duration_since(Instant::now()));
        next += EVERY;
        let now = hub.own()?;
        hub.look(&mut seen, &now, &before)?;
        before = now;
    }
    let panels = questions(&hub)?;

    // Every spoke hangs: each scrape takes its whole time.
    spokes.signal(Signal::STOP)?;
    let dark = Instant::now();
    let firing = |name: &str| {
        hub.number(&format!("count(ALERTS{{alertname=\"{name}\", alertstate=\"firing\"}}) or vector(0)"))
    };
    lab::wait_until(MISSED, "the outage is told", || {
        std::thread::sleep(Duration::from_millis(500));
        (firing("SpokeguardFleetDark").ok()? == 1.0).then_some(())
    })?;
    let told = dark.elapsed().as_secs_f64();
    let now = hub.own()?;
    let mut outage = BTreeMap::new();
    hub.look(&mut outage, &now, &before)?;
    let missed = firing("SpokeguardNodeMissed")?;
    spokes.signal(Signal::CONT)?;

    section(seen, outage, panels, told, missed, cycles)
}

fn section(
    mut seen: BTreeMap<&'static str, Vec<f64>>,
    mut outage: BTreeMap<&'static str, Vec<f64>>,
    panels: Vec<f64>,
    told: f64,
    missed: f64,
    cycles: u32,
) -> Result<Section> {
    let mut section = Section {
        name: "hub",
        title: "A hub with 1,000 spokes",
        rows: Vec::new(),
        goals: Vec::new(),
        notes: vec![format!(
            "{cycles} cycles of {} s by contrib/prometheus as it stands; the spokes are one process with an \
             address each and texts of the real form that change. Both share this machine. A question that takes \
             more than {} s is given up.",
            EVERY.as_secs(),
            lab::HTTP_PATIENCE.as_secs()
        )],
    };
    let job = "prometheus --config.file=contrib/prometheus/prometheus.yml";
    for (what, unit, key) in [
        ("spokes that answered", "", "up"),
        ("series in the head", "", "series"),
        ("samples a second", "", "samples"),
        ("resident memory", "MiB", "resident"),
        ("CPU of one core", "%", "cpu"),
        ("a scrape, mean", "ms", "scrape mean"),
        ("a scrape, slowest of 1,000", "ms", "scrape slowest"),
        ("between two scrapes of a spoke, p99", "s", "interval"),
        ("all rules once", "ms", "rules"),
    ] {
        section.rows.push(Row::new(what, unit, job, seen.remove(key).context(key)?)?);
    }
    section.rows.push(Row::new("a panel's question", "ms", "each expression of the dashboard", panels)?);
    let dark = "every spoke hangs";
    section.rows.push(Row::new("until SpokeguardFleetDark fires", "s", dark, vec![told])?);
    section.rows.push(Row::new("nodes told as missed by then", "", dark, vec![missed])?);
    for (what, unit, key) in [("all rules once", "ms", "rules"), ("resident memory", "MiB", "resident")] {
        section.rows.push(Row::new(what, unit, dark, outage.remove(key).context(key)?)?);
    }
    let median = |what: &str| {
        let row = section.rows.iter().find(|row| row.what == what).context("a row")?;
        Ok::<_, anyhow::Error>(row.samples.median())
    };
    section.goals = vec![
        Goal::at_least("spokes that answered", "", median("spokes that answered")?, f64::from(SPOKES)),
        // Rules and scrapes together. What the clock says depends on who else is at work.
        Goal::at_most("CPU of one core", "%", median("CPU of one core")?, 25.0),
        Goal::at_most(
            "series for each spoke, rules included",
            "",
            median("series in the head")? / 1000.0,
            185.0,
        ),
        Goal::at_most("a panel's question", "ms", median("a panel's question")?, 250.0),
    ];
    Ok(section)
}

/// The shipped files, and a target for each spoke.
fn install(folder: &Path) -> Result<()> {
    let contrib = Path::new(env!("CARGO_MANIFEST_DIR")).join("../contrib/prometheus");
    for part in ["spokeguard/rules", "spokeguard/targets"] {
        fs::create_dir_all(folder.join(part)).with_context(|| format!("create {part}"))?;
    }
    fs::copy(contrib.join("prometheus.yml"), folder.join("prometheus.yml")).context("copy prometheus.yml")?;
    for name in ["spokeguard-alerts.yml", "spokeguard-recording.yml"] {
        fs::copy(contrib.join("rules").join(name), folder.join("spokeguard/rules").join(name))
            .with_context(|| format!("copy {name}"))?;
    }
    let targets: Vec<Value> = (1..=SPOKES)
        .map(|number| {
            json!({
                "targets": [simulated_address(number).to_string()],
                "labels": { "node": format!("spoke{number:04}"), "role": "spoke", "region": format!("r{}", number % 9) },
            })
        })
        .collect();
    fs::write(folder.join("spokeguard/targets/fleet.json"), Value::Array(targets).to_string())
        .context("write the targets")
}

struct Hub<'a> {
    node: &'a Node,
    prometheus: &'a Prometheus,
}

/// Prometheus's metrics of itself, summed up by name.
struct Own {
    at: Instant,
    values: BTreeMap<String, f64>,
    interval: f64,
}

impl Hub<'_> {
    fn number(&self, expression: &str) -> Result<f64> {
        let answer = self.prometheus.query(self.node, expression)?;
        answer.first().map(|(_, value)| *value).with_context(|| format!("`{expression}` has no value"))
    }

    fn own(&self) -> Result<Own> {
        let text = self.prometheus.metrics(self.node)?;
        let mut own = Own { at: Instant::now(), values: BTreeMap::new(), interval: 0.0 };
        for line in text.lines().filter(|line| !line.starts_with('#')) {
            let Some((series, value)) = line.rsplit_once(' ') else { continue };
            let Ok(value) = value.parse::<f64>() else { continue };
            let name = series.split('{').next().unwrap_or(series);
            if name == "prometheus_target_interval_length_seconds" && series.contains("quantile=\"0.99\"") {
                own.interval = value;
            }
            *own.values.entry(name.to_string()).or_default() += value;
        }
        Ok(own)
    }

    fn look(&self, seen: &mut BTreeMap<&'static str, Vec<f64>>, now: &Own, before: &Own) -> Result<()> {
        let seconds = (now.at - before.at).as_secs_f64();
        let value =
            |own: &Own, name: &str| own.values.get(name).copied().with_context(|| format!("no {name}"));
        let grown = |name: &str| Ok::<_, anyhow::Error>((value(now, name)? - value(before, name)?) / seconds);
        let mut add = |key, number: f64| seen.entry(key).or_default().push(number);
        add("up", self.number("count(up == 1) or vector(0)")?);
        add("series", value(now, "prometheus_tsdb_head_series")?);
        add("samples", grown("prometheus_tsdb_head_samples_appended_total")?);
        add("resident", value(now, "process_resident_memory_bytes")? / f64::from(1 << 20));
        add("cpu", grown("process_cpu_seconds_total")? * 100.0);
        add("scrape mean", self.number("avg(scrape_duration_seconds)")? * 1e3);
        add("scrape slowest", self.number("max(scrape_duration_seconds)")? * 1e3);
        add("interval", now.interval);
        add("rules", value(now, "prometheus_rule_group_last_duration_seconds")? * 1e3);
        Ok(())
    }
}

/// How long each expression of the dashboard takes, for the whole fleet.
fn questions(hub: &Hub) -> Result<Vec<f64>> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../contrib/grafana/spokeguard.json");
    let dashboard: Value = serde_json::from_str(
        &fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?,
    )?;
    let mut times = Vec::new();
    let panels = dashboard["panels"].as_array().context("the dashboard has no panels")?;
    for target in panels.iter().filter_map(|panel| panel["targets"].as_array()).flatten() {
        let expression = target["expr"].as_str().context("a target has no expression")?;
        let expression =
            expression.replace("$__rate_interval", "1m").replace("$node", ".*").replace("$role", ".*");
        let started = Instant::now();
        let answer = hub.prometheus.query(hub.node, &expression);
        let took = started.elapsed();
        // One that was given up counts with the time that it had.
        if took < lab::HTTP_PATIENCE {
            answer?;
        }
        times.push(took.as_secs_f64() * 1e3);
    }
    ensure!(times.len() > 30, "the dashboard asks {} questions", times.len());
    Ok(times)
}
