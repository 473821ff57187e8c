//! All ports of a spoke from the outside in, beside the scanners that stand outside; the cases in which those
//! are wrong; and a scan of another host beside nmap on the same path.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use lab::{Lab, Need, Node, SPOKE_PUBLIC};
use serde_json::Value;

use crate::figures::{Goal, Row, Section};

const PATIENCE: Duration = Duration::from_secs(600);
const DROP: &str = "table inet t { chain i { type filter hook input priority filter; policy drop;
  ct state established,related accept; icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert } accept;
  tcp dport { 80, 443 } accept; udp dport 53 accept; }; }";
const OPEN: [u16; 2] = [80, 443];

type States = BTreeMap<u16, String>;

pub fn measure(quick: bool) -> Result<Section> {
    let missing = lab::missing(&[Need::Nmap, Need::Masscan]);
    ensure!(missing.is_empty(), "{}", missing.join("; "));
    let mut out = Section { name: "audit", title: "Audit", rows: vec![], goals: vec![], notes: vec![] };
    out.notes.push(
        "Wrong: ports whose state is not what rules and sockets make it. masscan reports open ports only."
            .into(),
    );
    outside_in(quick, &mut out)?;
    everything(quick, &mut out)?;
    misled(quick, &mut out)?;
    remote(quick, &mut out)?;
    Ok(out)
}

/// All TCP ports of one address.
fn outside_in(quick: bool, out: &mut Section) -> Result<()> {
    let lab = Lab::build(crate::PLAIN)?;
    let _web = lab.spoke.web()?;
    let address = SPOKE_PUBLIC.to_string();
    let gateway = lab.spoke.sh("ip -br link show eth0")?;
    let mac = gateway.split_whitespace().find(|word| word.matches(':').count() == 5).context("a MAC")?;
    let mac = mac.to_owned();
    let (own, theirs) = (if quick { 3 } else { 15 }, if quick { 1 } else { 3 });
    let ours = ["audit", "--no-policy", "--tcp", "--address", &address];
    let fast = ["nmap", "-sS", "-p-", "-n", "-Pn", "-T5", "--min-rate", "50000", "-oX", "-", &address];
    let careful = ["nmap", "-sS", "-p-", "-n", "-Pn", "-T4", "-oX", "-", &address];
    let mass = [
        "masscan",
        "-p1-65535",
        "--rate",
        "50000",
        "--wait",
        "2",
        "--interface",
        "spoke0",
        "--router-mac",
        &mac,
        "-oL",
        "-",
        &address,
    ];
    for (rules, case, silent) in [(DROP, "default drop", "filtered"), ("", "all closed", "closed")] {
        lab.spoke.nft(&format!("flush ruleset\n{rules}"))?;
        let truth: States = (1..=u16::MAX)
            .map(|port| (port, if OPEN.contains(&port) { "open" } else { silent }.to_owned()))
            .collect();
        let (mut times, mut wrongs) = (vec![], vec![]);
        for _ in 0..own {
            let (seconds, states) = audited(&lab.spoke, &ours, "tcp")?;
            times.push(seconds);
            wrongs.push(wrong(&truth, &states) as f64);
        }
        let command = "spokeguard audit --tcp --address ADDRESS";
        out.rows.push(Row::new(format!("{case}, ours"), "s", command, times)?);
        out.rows.push(Row::new(format!("{case}, ours, wrong"), "ports", command, wrongs)?);
        let ours_at = out.rows.len() - 2;
        let scanned = |words: &[&str], rounds: usize| -> Result<(Vec<f64>, Vec<f64>)> {
            let (mut times, mut wrongs) = (vec![], vec![]);
            for _ in 0..rounds {
                let started = Instant::now();
                let outcome = lab.internet.run_within(PATIENCE, words)?;
                times.push(started.elapsed().as_secs_f64());
                ensure!(outcome.code == Some(0), "{}", outcome.all());
                let states = lab::states(&outcome.stdout)?;
                wrongs.push(wrong(&truth, &states) as f64);
            }
            Ok((times, wrongs))
        };
        let (times, wrongs) = scanned(&fast, theirs)?;
        let command = "nmap -sS -p- -n -Pn -T5 --min-rate 50000 ADDRESS";
        out.rows.push(Row::new(format!("{case}, nmap at its fastest"), "s", command, times)?);
        out.rows.push(Row::new(format!("{case}, nmap at its fastest, wrong"), "ports", command, wrongs)?);
        let nmap_at = out.rows.len() - 2;
        if !quick {
            let (times, wrongs) = scanned(&careful, 1)?;
            let command = "nmap -sS -p- -n -Pn -T4 ADDRESS";
            out.rows.push(Row::new(format!("{case}, nmap -T4"), "s", command, times)?);
            out.rows.push(Row::new(format!("{case}, nmap -T4, wrong"), "ports", command, wrongs)?);
        }
        let (mut times, mut missed) = (vec![], vec![]);
        for _ in 0..theirs {
            let started = Instant::now();
            let outcome = lab.internet.run_within(PATIENCE, &mass)?;
            times.push(started.elapsed().as_secs_f64());
            ensure!(outcome.code == Some(0), "{}", outcome.all());
            let found = |port: &&u16| outcome.stdout.contains(&format!("open tcp {port} "));
            missed.push(OPEN.iter().filter(|port| !found(port)).count() as f64);
        }
        let command = "masscan -p1-65535 --rate 50000 --wait 2 ADDRESS";
        out.rows.push(Row::new(format!("{case}, masscan"), "s", command, times)?);
        out.rows.push(Row::new(format!("{case}, masscan, open missed"), "ports", command, missed)?);
        let (ours, nmap) = (&out.rows[ours_at].samples, &out.rows[nmap_at].samples);
        out.goals.push(Goal::at_most(format!("{case}: all TCP ports"), "s", ours.median(), 0.25));
        out.goals.push(Goal::at_least(
            format!("{case}: times faster than nmap"),
            "x",
            nmap.median() / ours.median(),
            15.0,
        ));
        out.goals.push(Goal::at_most(
            format!("{case}: ports wrong"),
            "",
            out.rows[ours_at + 1].samples.max(),
            0.0,
        ));
    }
    Ok(())
}

/// TCP and UDP, both families, one interface.
fn everything(quick: bool, out: &mut Section) -> Result<()> {
    let lab = Lab::build(crate::PLAIN)?;
    let _web = lab.spoke.web()?;
    lab.spoke.nft(DROP)?;
    let (mut times, mut memory, mut undecided) = (vec![], vec![], vec![]);
    for _ in 0..if quick { 3 } else { 15 } {
        let program = lab::spokeguard()?.display().to_string();
        let words = [&*program, "audit", "--no-policy", "--interface", "eth0", "--format", "json"];
        let started = Instant::now();
        let mut running = lab.spoke.spawn(&words)?;
        let mut peak = 0.0f64;
        while !running.has_ended() {
            let status =
                std::fs::read_to_string(format!("/proc/{}/status", running.pid())).unwrap_or_default();
            let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
            let kib = line.and_then(|text| text.trim().split(' ').next()?.parse::<f64>().ok());
            peak = kib.unwrap_or(peak);
            std::thread::sleep(Duration::from_millis(1));
        }
        times.push(started.elapsed().as_secs_f64());
        memory.push(peak / 1024.0);
        let json: Value = serde_json::from_str(&running.log()).context("read the audit")?;
        let targets = json["targets"].as_array().map(Vec::as_slice).unwrap_or_default();
        let protocols = targets.iter().flat_map(|t| t["protocols"].as_array().into_iter().flatten());
        let (mut asked, mut unknown) = (0, 0);
        for protocol in protocols {
            asked += protocol["scanned"].as_u64().unwrap_or(0);
            let listed = protocol["ports"].as_array().into_iter().flatten();
            unknown += listed.filter(|p| p["state"] == "unknown" || p["state"] == "open|filtered").count();
            if protocol["others"]["state"] == "unknown" {
                unknown += protocol["others"]["count"].as_u64().unwrap_or(0) as usize;
            }
        }
        ensure!(asked == 4 * 65_535, "{asked} ports were asked");
        undecided.push(unknown as f64);
    }
    let command = "spokeguard audit --interface eth0";
    out.rows.push(Row::new("TCP and UDP, v4 and v6", "s", command, times)?);
    out.rows.push(Row::new("its memory, at most", "MiB", command, memory)?);
    out.rows.push(Row::new("262,140 ports: undecided", "ports", command, undecided)?);
    let [.., time, memory, undecided] = out.rows.as_slice() else { return Ok(()) };
    let goals = [
        Goal::at_most("TCP and UDP, v4 and v6", "s", time.samples.median(), 1.0),
        Goal::at_most("its memory", "MiB", memory.samples.max(), 24.0),
        Goal::at_most("undecided", "ports", undecided.samples.max(), 0.0),
    ];
    out.goals.extend(goals);
    Ok(())
}

/// Rules that see a scan in one source's haste.
fn misled(quick: bool, out: &mut Section) -> Result<()> {
    let lab = Lab::build(crate::PLAIN)?;
    let _web = lab.spoke.web()?;
    let limits =
        "table inet t { set slow { type ipv4_addr; flags dynamic, timeout; timeout 1m; size 200000; };
      chain i { type filter hook input priority filter; ct state established accept;
        tcp flags syn add @slow { ip saddr limit rate over 2/minute burst 2 packets } drop;
        tcp dport != { 80, 443 } drop; }; }";
    let blocker =
        "table inet t { set bad { type ipv4_addr; flags dynamic, timeout; timeout 1h; size 200000; };
      chain i { type filter hook input priority filter; policy drop; ct state established accept;
        ip saddr @bad drop; tcp dport != { 80, 443 } add @bad { ip saddr } drop; accept; }; }";
    let rounds = if quick { 10 } else { 100 };
    let address = SPOKE_PUBLIC.to_string();
    for (rules, case) in [(limits, "a limit for each source"), (blocker, "a set that blocks scanners")] {
        let mut right = 0;
        let mut found = Vec::new();
        for round in 0..rounds {
            lab.spoke.nft(&format!("flush ruleset\n{rules}"))?;
            let (_, states) =
                audited(&lab.spoke, &["audit", "--no-policy", "--tcp", "--address", &address], "tcp")?;
            let open: Vec<u16> = states.iter().filter(|(_, s)| *s == "open").map(|(port, _)| *port).collect();
            right += usize::from(open == OPEN);
            if round < 3 {
                lab.spoke.nft(&format!("flush ruleset\n{rules}"))?;
                let words =
                    ["nmap", "-sS", "-p-", "-n", "-Pn", "-T5", "--min-rate", "50000", "-oX", "-", &address];
                let outcome = lab.internet.run_within(PATIENCE, &words)?;
                let states = lab::states(&outcome.stdout)?;
                found.push(states.values().filter(|state| *state == "open").count() as f64);
            }
        }
        let share = right as f64 * 100.0 / f64::from(rounds);
        let command = "spokeguard audit --tcp --address ADDRESS";
        out.rows.push(Row::new(format!("{case}: right"), "%", command, vec![share])?);
        let command = "nmap -sS -p- -n -Pn -T5 --min-rate 50000 ADDRESS";
        out.rows.push(Row::new(format!("{case}: nmap finds, of 2"), "ports", command, found)?);
        out.goals.push(Goal::at_least(format!("{case}: right"), "%", share, 100.0));
    }
    Ok(())
}

/// Another host, on a good path and on one that loses 5 % both ways.
fn remote(quick: bool, out: &mut Section) -> Result<()> {
    let lab = Lab::build(crate::PLAIN)?;
    let _web = lab.spoke.web()?;
    let _more = lab.spoke.listen("more", &["tcp/[::]:40000+7"])?;
    let expected = 10;
    let address = SPOKE_PUBLIC.to_string();
    lab.spoke.nft(
        "table inet t { chain i { type filter hook input priority filter; policy drop; ct state established accept;
         tcp dport { 80, 443, 40000-40007 } accept; }; }",
    )?;
    for loss in [0, 5] {
        for (node, device) in [(&lab.spoke, "eth0"), (&lab.internet, "spoke0")] {
            node.nft(&format!(
                "add table netdev lossy\ndelete table netdev lossy
                 table netdev lossy {{ chain l {{ type filter hook ingress device {device} priority 0;
                 numgen random mod 100 < {loss} drop; }}; }}"
            ))?;
        }
        let rounds = if quick { 1 } else { 3 };
        let (mut times, mut found) = (vec![], vec![]);
        let (mut nmap_times, mut nmap_found) = (vec![], vec![]);
        for _ in 0..rounds {
            let (seconds, states) = audited(&lab.internet, &["audit", "--tcp", &address], "tcp")?;
            times.push(seconds);
            found.push(states.values().filter(|state| *state == "open").count() as f64);
            let words =
                ["nmap", "-sS", "-p-", "-n", "-Pn", "-T4", "--min-rate", "5000", "-oX", "-", &address];
            let started = Instant::now();
            let outcome = lab.internet.run_within(PATIENCE, &words)?;
            nmap_times.push(started.elapsed().as_secs_f64());
            let states = lab::states(&outcome.stdout)?;
            nmap_found.push(states.values().filter(|state| *state == "open").count() as f64);
        }
        let command = "spokeguard audit --tcp ADDRESS";
        let what = format!("another host, {loss} % lost");
        out.rows.push(Row::new(format!("{what}, ours"), "s", command, times)?);
        out.rows.push(Row::new(format!("{what}, open of {expected}"), "ports", command, found)?);
        let command = "nmap -sS -p- -n -Pn -T4 --min-rate 5000 ADDRESS";
        out.rows.push(Row::new(format!("{what}, nmap"), "s", command, nmap_times)?);
        out.rows.push(Row::new(format!("{what}, open of {expected}"), "ports", command, nmap_found)?);
        let [.., ours, open, nmap, _] = out.rows.as_slice() else { return Ok(()) };
        let goals = [
            Goal::at_most(
                format!("{what}: as fast as nmap"),
                "x",
                ours.samples.median() / nmap.samples.median(),
                1.0,
            ),
            Goal::at_least(format!("{what}: open found"), "ports", open.samples.min(), f64::from(expected)),
        ];
        out.goals.extend(goals);
    }
    Ok(())
}

/// Seconds, and every port's state.
fn audited(node: &Node, words: &[&str], proto: &str) -> Result<(f64, States)> {
    let started = Instant::now();
    let program = lab::spokeguard()?.display().to_string();
    let words: Vec<&str> = [&*program, "--format", "json"].into_iter().chain(words.iter().copied()).collect();
    let outcome = node.run_within(PATIENCE, &words)?;
    let seconds = started.elapsed().as_secs_f64();
    let json = outcome.json()?;
    let protocols = json["targets"][0]["protocols"].as_array().context("no target")?;
    let of = protocols.iter().find(|p| p["proto"] == proto).context("no such protocol")?;
    let rest = of["others"]["state"].as_str().unwrap_or_default();
    let mut states: States = (1..=u16::MAX).map(|port| (port, rest.to_owned())).collect();
    for port in of["ports"].as_array().into_iter().flatten() {
        let number = port["port"].as_u64().and_then(|n| u16::try_from(n).ok()).context("a port")?;
        states.insert(number, port["state"].as_str().unwrap_or_default().to_owned());
    }
    Ok((seconds, states))
}

fn wrong(truth: &States, states: &States) -> usize {
    truth.iter().filter(|(port, state)| states.get(port) != Some(state)).count()
}
