//! What a packet pays: the tc programs one by one in the kernel's own test bench, and a TCP stream
//! through veth with nothing, with the programs, and with programs and rules.

use std::net::IpAddr;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lab::{Daemon, HUB_MESH, Lab, Node, OUTSIDER, OUTSIDER_V6, SPOKE_MESH, SPOKE_PUBLIC, SPOKE_PUBLIC_V6};
use spokeguard::observed::Reading;
use spokeguard::source::bpf;

use crate::figures::{Goal, Row, Section, paired};
use crate::policy;

/// Averages over this many runs of the program; the kernel answers in whole nanoseconds.
const REPEAT: u32 = 500_000;
const TCP: u8 = 6;
const UDP: u8 = 17;
const ICMP: u8 = 1;
const SYN: u8 = 0x02;
const ACK: u8 = 0x10;

pub fn measure(quick: bool) -> Result<Section> {
    let mut section = programs(if quick { 3 } else { 21 })?;
    streams(&mut section, if quick { 2 } else { 9 })?;
    Ok(section)
}

struct Kind {
    what: &'static str,
    program: &'static str,
    packet: Vec<u8>,
    /// Rare on any host: the first of a connection, which is judged as well as counted, or one whose headers
    /// are not where the quick reader looks.
    rare: bool,
}

fn kinds() -> Vec<Kind> {
    let kind = |what, program, packet, rare| Kind { what, program, packet, rare };
    let (v4, v6) = ((OUTSIDER, SPOKE_PUBLIC), (OUTSIDER_V6, SPOKE_PUBLIC_V6));
    let back = |(a, b)| (b, a);
    let mesh = (HUB_MESH, SPOKE_MESH);
    vec![
        kind(
            "in, data to tcp/443, IPv4",
            "in_eth_public",
            ethernet(ip(v4, TCP, &tcp(50_000, 443, ACK))),
            false,
        ),
        kind(
            "in, data to tcp/443, IPv6",
            "in_eth_public",
            ethernet(ip(v6, TCP, &tcp(50_000, 443, ACK))),
            false,
        ),
        kind("in, udp/53, IPv4", "in_eth_public", ethernet(ip(v4, UDP, &udp(50_000, 53))), false),
        kind(
            "in, echo request, IPv4",
            "in_eth_public",
            ethernet(ip(v4, ICMP, &[8, 0, 0, 0, 0, 1, 0, 1])),
            false,
        ),
        kind(
            "in, data in a VLAN tag, IPv4",
            "in_eth_public",
            tagged(ip(v4, TCP, &tcp(50_000, 443, ACK))),
            true,
        ),
        kind(
            "out, data from tcp/443, IPv4",
            "out_eth_public",
            ethernet(ip(back(v4), TCP, &tcp(443, 50_000, ACK))),
            false,
        ),
        kind(
            "out, data from tcp/443, IPv6",
            "out_eth_public",
            ethernet(ip(back(v6), TCP, &tcp(443, 50_000, ACK))),
            false,
        ),
        kind("in, tunnel, data to tcp/22, IPv4", "in_ip_mesh", ip(mesh, TCP, &tcp(50_000, 22, ACK)), false),
        kind(
            "out, tunnel, data from tcp/22, IPv4",
            "out_ip_mesh",
            ip(back(mesh), TCP, &tcp(22, 50_000, ACK)),
            false,
        ),
        kind(
            "in, SYN to tcp/443, IPv4",
            "in_eth_public",
            ethernet(ip(v4, TCP, &tcp(50_000, 443, SYN))),
            true,
        ),
        kind(
            "in, SYN to tcp/443, IPv6",
            "in_eth_public",
            ethernet(ip(v6, TCP, &tcp(50_000, 443, SYN))),
            true,
        ),
        kind(
            "in, SYN to tcp/5432, IPv4",
            "in_eth_public",
            ethernet(ip(v4, TCP, &tcp(50_000, 5432, SYN))),
            true,
        ),
        kind(
            "in, tunnel, hub's SYN to tcp/22, IPv4",
            "in_ip_mesh",
            ip(mesh, TCP, &tcp(50_000, 22, SYN)),
            true,
        ),
    ]
}

/// Nanoseconds of each program over those of the empty one in the same round.
fn programs(rounds: usize) -> Result<Section> {
    let lab = Lab::build(crate::PLAIN)?;
    let mut daemon =
        lab.spoke.daemon_in(&crate::folder(&lab, &policy::of_the_contracts_size(&lab)?)?, &[])?;
    // What it pinned stays; its own looks would only be in the way.
    daemon.running.stop()?;
    let pins = lab.spoke.path("/sys/fs/bpf/spokeguard");
    let kinds = kinds();
    let mut empty = Vec::new();
    let mut more = vec![Vec::new(); kinds.len()];
    lab.spoke.inside(|| {
        for _ in 0..rounds {
            for (kind, more) in kinds.iter().zip(&mut more) {
                let nothing = bpf::test_run(&pins, "empty", &kind.packet, REPEAT)? as f64;
                let ours = bpf::test_run(&pins, kind.program, &kind.packet, REPEAT)? as f64;
                empty.push(nothing);
                more.push(ours - nothing);
            }
        }
        Ok(())
    })?;
    let mut rows =
        vec![Row::new("the empty program", "ns", "spokeguard::source::bpf::test_run: empty", empty)?];
    for (kind, more) in kinds.iter().zip(more) {
        rows.push(Row::new(
            kind.what,
            "ns",
            "... each packet's program, above the empty one beside it",
            more,
        )?);
    }
    let worst = |rare: bool| {
        let of = kinds.iter().zip(&rows[1..]).filter(move |(kind, _)| kind.rare == rare);
        of.map(|(_, row)| row.samples.median()).fold(f64::NEG_INFINITY, f64::max)
    };
    let goals = vec![
        Goal::at_most("dearest ordinary packet, above empty", "ns", worst(false), 10.0),
        Goal::at_most("dearest rare one (SYN, VLAN tag), above empty", "ns", worst(true), 10.0),
    ];
    Ok(Section { name: "packets", title: "What a packet pays", rows, goals, notes: Vec::new() })
}

#[derive(Clone, Copy, PartialEq)]
enum Load {
    Nothing,
    Programs,
    Everything,
}

fn streams(section: &mut Section, rounds: usize) -> Result<()> {
    let lab = Lab::build(crate::PLAIN)?;
    let all = policy::of_the_contracts_size(&lab)?;
    let counting = all.replace("firewall = true", "firewall = false");
    ensure!(counting != all, "the policy has no firewall to turn off");
    let (all, counting) = (crate::folder(&lab, &all)?, crate::folder(&lab, &counting)?);
    let pins = lab.spoke.path("/sys/fs/bpf/spokeguard");
    let loads = [(Load::Nothing, None), (Load::Programs, Some(&counting)), (Load::Everything, Some(&all))];
    let mut rates = [const { Vec::new() }; 3];
    let mut costs = [const { Vec::new() }; 3];
    for round in 0..rounds {
        // Turn about, so that no load always follows the same other one.
        for step in 0..loads.len() {
            let at = (round + step) % loads.len();
            let (load, folder) = loads[at];
            let daemon = folder.map(|folder| lab.spoke.daemon_in(folder, &[])).transpose()?;
            in_force(&lab.spoke, &pins, load)?;
            let (rate, cost) = stream(&lab).context("iperf3")?;
            rates[at].push(rate);
            costs[at].push(cost);
            if let Some(daemon) = daemon {
                clear(&lab.spoke, &pins, daemon)?;
            }
        }
    }
    let ratio =
        |load: Load, of: &[Vec<f64>; 3]| Ok::<_, anyhow::Error>(paired(&of[load as usize], &of[0])?.median());
    section.goals.extend([
        Goal::at_least("stream with the programs, of without", "x", ratio(Load::Programs, &rates)?, 0.98),
        Goal::at_least(
            "stream with programs and rules, of without",
            "x",
            ratio(Load::Everything, &rates)?,
            0.98,
        ),
        Goal::at_most(
            "CPU of a GB with programs and rules, of without",
            "x",
            ratio(Load::Everything, &costs)?,
            1.03,
        ),
    ]);
    for (unit, samples) in [("Gb/s", rates), ("ms/GB", costs)] {
        let what = if unit == "Gb/s" { "stream" } else { "CPU" };
        for (with, samples) in ["nothing", "the programs", "programs and rules"].into_iter().zip(samples) {
            let command = "iperf3 -c 198.51.100.7 -p 80 -t 3 -J (CPU of both ends)";
            section.rows.push(Row::new(format!("{what}, with {with}"), unit, command, samples)?);
        }
    }
    section
        .notes
        .push("Both ends of the stream share this machine's CPUs with everything else on it.".to_string());
    Ok(())
}

/// Proves that what is measured is there, and that what is not to be measured is not.
fn in_force(node: &Node, pins: &Path, load: Load) -> Result<()> {
    let counters = node.inside(|| Ok(bpf::read(pins, &bpf::CounterConfig::default())))?;
    let Reading::Seen(counters) = counters else { anyhow::bail!("the counters could not be read") };
    ensure!(
        counters.attached.is_empty() == (load == Load::Nothing),
        "the programs are on {} interfaces",
        counters.attached.len()
    );
    let tables = node.ok(&["nft", "list", "tables"])?;
    ensure!(tables.contains("spokeguard") == (load == Load::Everything), "wrong tables: {tables}");
    Ok(())
}

/// Everything that outlives the daemon on purpose.
pub fn clear(node: &Node, pins: &Path, mut daemon: Daemon) -> Result<()> {
    daemon.running.stop()?;
    node.inside(|| bpf::release(pins))?;
    node.inside(|| bpf::guard::release(pins))?;
    node.nft("table inet spokeguard\ndelete table inet spokeguard")
}

/// Gbit/s, and milliseconds of CPU that both ends use for a gigabyte.
fn stream(lab: &Lab) -> Result<(f64, f64)> {
    let mut server = lab.spoke.spawn(&["iperf3", "-s", "-1", "-p", "80", "--forceflush"])?;
    server.wait_for("Server listening on 80", Duration::from_secs(5))?;
    let to = SPOKE_PUBLIC.to_string();
    let answer = lab.internet.run(&["iperf3", "-c", &to, "-p", "80", "-t", "3", "-J"])?.json()?;
    let end = &answer["end"];
    let number = |value: &serde_json::Value, what: &str| {
        value.as_f64().with_context(|| format!("no {what} in iperf3's answer: {}", answer["error"]))
    };
    let received = &end["sum_received"];
    let bits = number(&received["bits_per_second"], "rate")?;
    let (seconds, bytes) = (number(&received["seconds"], "time")?, number(&received["bytes"], "amount")?);
    let cpu = &end["cpu_utilization_percent"];
    let percent = number(&cpu["host_total"], "CPU")? + number(&cpu["remote_total"], "CPU")?;
    ensure!(bytes > 0.0, "nothing arrived");
    Ok((bits / 1e9, percent / 100.0 * seconds * 1e3 / (bytes / 1e9)))
}

fn tcp(from: u16, to: u16, flags: u8) -> Vec<u8> {
    let mut segment = [from.to_be_bytes(), to.to_be_bytes()].concat();
    segment.extend([0; 8]);
    segment.extend([0x50, flags, 0xff, 0xff, 0, 0, 0, 0]);
    // Data follow in all but the first packet; how much of it costs nothing.
    segment.resize(if flags & SYN != 0 { 20 } else { 84 }, 0);
    segment
}

fn udp(from: u16, to: u16) -> Vec<u8> {
    let mut datagram = [from.to_be_bytes(), to.to_be_bytes(), 40u16.to_be_bytes(), [0, 0]].concat();
    datagram.resize(40, 0);
    datagram
}

fn ip((from, to): (IpAddr, IpAddr), proto: u8, body: &[u8]) -> Vec<u8> {
    let length = body.len() as u16;
    match (from, to) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            let [high, low] = (20 + length).to_be_bytes();
            let head = [0x45, 0, high, low, 0, 0, 0x40, 0, 64, proto, 0, 0];
            [&head[..], &from.octets(), &to.octets(), body].concat()
        }
        (from, to) => {
            let [high, low] = length.to_be_bytes();
            let sixteen = |address| match address {
                IpAddr::V4(address) => address.to_ipv6_mapped().octets(),
                IpAddr::V6(address) => address.octets(),
            };
            [&[0x60, 0, 0, 0, high, low, proto, 64][..], &sixteen(from), &sixteen(to), body].concat()
        }
    }
}

fn ethernet(packet: Vec<u8>) -> Vec<u8> {
    let kind: [u8; 2] = if packet[0] >> 4 == 4 { [0x08, 0x00] } else { [0x86, 0xdd] };
    [&[2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2], &kind[..], &packet].concat()
}

/// As a driver without VLAN offload hands it over.
fn tagged(packet: Vec<u8>) -> Vec<u8> {
    let plain = ethernet(packet);
    [&plain[..12], &[0x81, 0x00, 0, 7], &plain[12..]].concat()
}
