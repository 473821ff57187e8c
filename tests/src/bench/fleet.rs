//! `spokeguard fleet status`, `report` and `audit` of 1,000 nodes: one process answers for all of them, some of them
//! not at all, and one namespace has all their public addresses.

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use lab::{Lab, Node};
use spokeguard::fleet::{Keys, parse};
use spokeguard::policy::fingerprint;
use spokeguard::terms::PublicKey;

use crate::figures::{Goal, Row, Section};
use crate::prefixes::{peak_mib, peak_mib_until};

const NODES: u16 = 1000;
/// Of those, what answers nothing at all, in the worse of both runs.
const LOST: u16 = 50;
const PORT: u16 = 9984;
/// Threads that answer; the hub asks 64 nodes at once.
const SERVING: usize = 64;

pub fn measure(quick: bool) -> Result<Section> {
    let rounds = if quick { 2 } else { 9 };
    let lab = Lab::build(crate::PLAIN)?;
    let node = &lab.internet;
    // Every address of the mesh is this node's own.
    node.sh("ip route add local 10.99.0.0/16 dev lo")?;
    let inventory = lab.file("fleet.toml", &inventory())?;
    serve(node, &inventory)?;

    let status = words(&inventory, &["status"])?;
    let html = lab.dir.join("fleet.html").display().to_string();
    let report = words(&inventory, &["report", "--html", &html])?;
    let (mut all, mut lost, mut page) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..rounds {
        all.push(seconds(node, &status, &[0, 2])?);
        page.push(seconds(node, &report, &[0, 2])?);
    }
    let memory = peak_mib(node, &status)?;
    let (audit, audit_memory) = audited(&lab, &inventory)?;
    let silent = (0..LOST).map(|n| address(n).to_string()).collect::<Vec<_>>().join(", ");
    node.nft(&format!(
        "table ip lost {{ chain in {{ type filter hook input priority 0; ip daddr {{ {silent} }} drop; }}; }}"
    ))?;
    for _ in 0..rounds.min(3) {
        lost.push(seconds(node, &status, &[2])?);
    }
    let check = words(&inventory, &["check"])?;
    let mut read = Vec::new();
    for _ in 0..rounds {
        read.push(seconds(node, &check, &[0, 2])?);
    }

    let of =
        |values: &[f64]| Ok::<f64, anyhow::Error>(crate::figures::Samples::new(values.to_vec())?.median());
    let goals = vec![
        Goal::at_most("status of 1,000 nodes", "s", of(&all)?, 5.0),
        Goal::at_most("the same with 50 that never answer", "s", of(&lost)?, 10.0),
        Goal::at_most("most memory of it", "MiB", memory, 128.0),
        Goal::at_most("audit of 1,000 nodes", "s", audit, 180.0),
        Goal::at_most("most memory of it", "MiB", audit_memory, 256.0),
    ];
    let rows = vec![
        Row::new("1,000 nodes, all fine", "s", "spokeguard fleet status", all)?,
        Row::new("1,000 nodes, 50 lost", "s", "spokeguard fleet status", lost)?,
        Row::new("of it, reading the inventory", "s", "spokeguard fleet check", read)?,
        Row::new("the page of 1,000 nodes", "s", "spokeguard fleet report", page)?,
        Row::new("most memory", "MiB", "spokeguard fleet status", vec![memory])?,
        Row::new("1,000 nodes from outside", "s", "spokeguard fleet audit", vec![audit])?,
        Row::new("most memory", "MiB", "spokeguard fleet audit", vec![audit_memory])?,
    ];
    let notes = vec![format!(
        "Each node gives {} KiB of metrics and its health in two connections; this process answers for all, \
         with {SERVING} threads on the same CPUs.",
        metrics("node-0", "0").len() >> 10
    )];
    Ok(Section { name: "fleet", title: "Looking at 1,000 nodes", rows, goals, notes })
}

/// Seconds and MiB. The spoke's namespace has every public address, and is as a spoke is: two ports open, the
/// others silent.
fn audited(lab: &Lab, inventory: &std::path::Path) -> Result<(f64, f64)> {
    lab.spoke.sh("ip route add local 10.98.0.0/16 dev lo")?;
    lab.spoke.nft(
        "table ip spoke { chain in { type filter hook input priority 0; iif lo accept; ct state established accept; \
         tcp dport { 80, 443 } accept; meta l4proto icmp accept; drop; }; }",
    )?;
    lab.internet.sh(&format!("ip route add 10.98.0.0/16 via {}", lab::SPOKE_PUBLIC))?;
    let _web = lab.spoke.listen("web", &["web/0.0.0.0:80", "web/0.0.0.0:443"])?;
    let audit = words(inventory, &["audit"])?;
    let started = std::time::Instant::now();
    // On a busy machine somebody's own audit may not be heard in time.
    let memory = peak_mib_until(&lab.internet, &audit, &[0, 2])?;
    Ok((started.elapsed().as_secs_f64(), memory))
}

fn address(number: u16) -> IpAddr {
    let [high, low] = (number + 256).to_be_bytes();
    Ipv4Addr::new(10, 99, high, low).into()
}

fn public_address(number: u16) -> IpAddr {
    let [high, low] = (number + 256).to_be_bytes();
    Ipv4Addr::new(10, 98, high, low).into()
}

fn inventory() -> String {
    let hub = PublicKey([255; 32]);
    let mut text = format!(
        "version = 1\n[fleet]\nname = \"thousand\"\n[mesh]\nprefix = [\"10.99.0.0/16\"]\nhub = \"node-0\"\n\
         [defaults.public]\ntcp = [80, 443]\n[[node]]\nname = \"node-0\"\nmesh_address = \"{}\"\n\
         public_address = \"{}\"\npublic_key = \"{hub}\"\n",
        address(0),
        public_address(0)
    );
    for number in 1..NODES {
        let mut key = [7u8; 32];
        key[..2].copy_from_slice(&number.to_be_bytes());
        text += &format!(
            "[[node]]\nname = \"node-{number}\"\nmesh_address = \"{}\"\npublic_address = \"{}\"\n\
             public_key = \"{}\"\nregion = \"r{}\"\n",
            address(number),
            public_address(number),
            PublicKey(key),
            number % 20
        );
    }
    text
}

/// As long as a daemon's own, and in good health.
fn metrics(name: &str, hash: &str) -> String {
    let mut text = format!(
        "spokeguard_build_info{{version=\"0.1.0\"}} 1\nspokeguard_verdict 0\n\
         spokeguard_policy_info{{node=\"{name}\",role=\"spoke\",mode=\"enforce\",hash=\"{hash}\"}} 1\n\
         spokeguard_audit_exposed_ports{{family=\"ipv4\",proto=\"tcp\"}} 0\nspokeguard_audit_age_seconds 9\n\
         spokeguard_wireguard_handshake_age_seconds{{peer=\"hub\"}} 30\n"
    );
    for n in 0..140 {
        text += &format!(
            "# HELP spokeguard_bytes_total Bytes of those packets\nspokeguard_bytes_total{{scope=\"public\",\
             direction=\"in\",family=\"ipv4\",proto=\"tcp\",service=\"tcp-{n}\"}} {n}\n"
        );
    }
    text
}

fn serve(node: &Node, inventory: &std::path::Path) -> Result<()> {
    let text = std::fs::read_to_string(inventory).context("read the inventory")?;
    let today = spokeguard::cli::today(spokeguard::sys::clock::now());
    let inventory = parse(&text, "fleet.toml", today, Keys::Required).map_err(|e| anyhow::anyhow!("{e}"))?;
    let answers = inventory.nodes.iter().map(|node| (node.name.clone(), fingerprint(&node.policy)));
    let answers: Arc<Vec<String>> = Arc::new(answers.map(|(name, hash)| metrics(&name, &hash)).collect());
    let listener = node.inside(|| {
        let listener = TcpListener::bind(SocketAddr::from(([0, 0, 0, 0], PORT)))?;
        // The default of 128 would be what is measured.
        rustix::net::listen(&listener, 4096)?;
        Ok(listener)
    })?;
    let listener = Arc::new(listener);
    for _ in 0..SERVING {
        let (listener, answers) = (listener.clone(), answers.clone());
        std::thread::spawn(move || {
            while let Ok((client, _)) = listener.accept() {
                let _ = answer(client, &answers);
            }
        });
    }
    Ok(())
}

/// Who was asked is told by the address.
fn answer(mut client: TcpStream, answers: &[String]) -> Result<()> {
    let IpAddr::V4(address) = client.local_addr()?.ip() else { return Ok(()) };
    let [_, _, high, low] = address.octets();
    let number = usize::from(u16::from_be_bytes([high, low])).checked_sub(256);
    let mut request = [0u8; 1024];
    let length = client.read(&mut request)?;
    let health = request[..length].starts_with(b"GET /healthz");
    let text = number.and_then(|number| answers.get(number)).context("nobody has that address")?;
    let body = if health { "ok\n" } else { text };
    client
        .write_all(format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{body}", body.len()).as_bytes())?;
    Ok(())
}

fn words(inventory: &std::path::Path, verb: &[&str]) -> Result<Vec<String>> {
    let program: PathBuf = lab::spokeguard()?;
    let before =
        [program.display().to_string(), "fleet".into(), "-i".into(), inventory.display().to_string()];
    Ok(before.into_iter().chain(verb.iter().map(|word| (*word).to_owned())).collect())
}

fn seconds(node: &Node, words: &[String], codes: &[i32]) -> Result<f64> {
    let started = std::time::Instant::now();
    let outcome = node.run_within(std::time::Duration::from_secs(120), words)?;
    let took = started.elapsed().as_secs_f64();
    ensure!(outcome.code.is_some_and(|code| codes.contains(&code)), "{}: {}", words.join(" "), outcome.all());
    Ok(took)
}
