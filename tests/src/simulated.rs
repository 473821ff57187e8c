//! Spokes without daemons: the real text, with numbers that grow, each behind an address of its own.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, SocketAddr};
use std::rc::Rc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use spokeguard::desired::Desired;
use spokeguard::diff::Proof;
use spokeguard::heartbeat::Tally;
use spokeguard::metrics::{Audit, Control, Layout, State, render};
use spokeguard::observed::{
    Amount, AttemptKey, BindTally, CountedProto, Counters, Direction, Peer, TrafficKey,
};
use spokeguard::policy::{Mode, Role};
use spokeguard::report::Verdict;
use spokeguard::terms::{Family, PublicKey, Scope, Stamp};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

/// A spoke with public services, LAN, netdata and an exception; as many series as a policy can bring about.
const POLICY: &str = r#"version = 1
[node]
name = "spoke"
role = "spoke"
[mesh]
kind = "wireguard"
address = ["10.84.0.16", "fd84::16"]
prefix = ["10.84.0.0/24", "fd84::/64"]
keepalive = "25s"
[mesh.hub]
address = "10.84.0.1"
public_key = "xTIBA5rboUvnH4htodjb6e697QjLERt1NAB4mZqp8Dg="
endpoint = "203.0.113.47:51820"
[public]
tcp = [80, 443]
[ssh]
bind = "mesh"
from = "hub"
[[mesh.service]]
name = "netdata"
tcp = [19999]
from = "mesh"
[[local]]
name = "lan"
interfaces = ["vmbr0"]
tcp = [53]
udp = [53]
[[exception]]
name = "emergency-ssh"
tcp = [2222]
from = ["0.0.0.0/0"]
reason = "way in when the mesh is down"
owner = "ops"
until = "2099-01-31"
"#;

/// Spokes that share a policy, and whose texts need no daemon.
pub struct Simulated {
    desired: Desired,
    layout: Layout,
}

impl Simulated {
    pub fn new() -> Result<Simulated> {
        let today = jiff::civil::date(2026, 11, 21);
        let loaded = spokeguard::policy::parse(POLICY, "policy.toml", today)
            .map_err(|mistakes| anyhow::anyhow!("the simulated policy: {mistakes}"))?;
        let desired =
            Desired::new(loaded.policy, today).ok().context("the simulated policy has no way in")?;
        let layout = Layout::new(&desired);
        Ok(Simulated { desired, layout })
    }

    /// OpenMetrics text of spoke `number` after `seconds` of work: packets come in at a pace of its own.
    pub fn text(&self, number: u64, seconds: u64) -> String {
        let n = (number % 97 + 1) * seconds;
        let mut counters =
            Counters { loaded: true, memory_bytes: 400_000, created: 1, ..Counters::default() };
        for scope in Scope::ALL {
            for direction in Direction::ALL {
                for family in Family::ALL {
                    for class in [None, Some(0), Some(1), Some(2), Some(3)] {
                        let key = TrafficKey { scope, direction, family, proto: CountedProto::Tcp, class };
                        counters.traffic.insert(key, Amount { packets: n * 3, bytes: n * 1500 });
                        counters.attempts.insert(AttemptKey { class, family, allowed: class.is_some() }, n);
                    }
                }
            }
        }
        let table = self.desired.table.iter().flat_map(|table| table.counters.keys());
        let drops: BTreeMap<String, Amount> =
            table.map(|name| (name.clone(), Amount { packets: n, bytes: n * 60 })).collect();
        let now = Stamp::from_unix(1_795_000_000 + seconds as i64);
        let peer = Peer {
            public_key: PublicKey([number as u8; 32]),
            endpoint: None,
            keepalive: 25,
            last_handshake: Some(Stamp::from_unix(1_795_000_000 + (seconds / 120 * 120) as i64)),
            rx_bytes: n,
            tx_bytes: n,
            allowed: Vec::new(),
        };
        let audit = Audit { age: Duration::from_secs(seconds % 3600), proof: Proof::default() };
        render(
            &State {
                now,
                started: Stamp::from_unix(1_795_000_000),
                version: env!("CARGO_PKG_VERSION"),
                abi: 1,
                node: &format!("spoke{number:04}"),
                role: Role::Spoke,
                mode: Mode::Enforce,
                policy_hash: "8f1c0e7a55d2b3c4",
                verdict: Verdict::Ok,
                findings: &[],
                blind: &[],
                enforced: &BTreeSet::from(Control::ALL),
                drift: &BTreeMap::new(),
                repairs: &BTreeMap::new(),
                counters: Some(&counters),
                drops: Some(&drops),
                binds: Some(BindTally::default()),
                peers: Some(&[peer]),
                audit: Some(&audit),
                openings: 0,
                openings_end: None,
                on_trial: false,
                cycles: seconds / 10 + 1,
                cycle_seconds: 0.003,
                resident_bytes: Some(5_000_000 + number % 7 * 65_536),
                http_rejects: 0,
                heartbeat: &Tally::default(),
            },
            &self.layout,
        )
    }
}

/// Where spoke `number` answers: 127.1.0.1 and on, a /16 of them at most.
pub fn simulated_address(number: u16) -> SocketAddr {
    let [high, low] = number.to_be_bytes();
    SocketAddr::new(Ipv4Addr::new(127, 1, high, low).into(), 9984)
}

/// Serves that many spokes until this process is ended, after saying [`crate::BOUND`].
pub fn serve_simulated(count: u16) -> Result<()> {
    let spokes = Rc::new(Simulated::new()?);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    tokio::task::LocalSet::new().block_on(&runtime, async {
        let begun = Instant::now();
        for number in 1..=count {
            let address = simulated_address(number);
            let listener = TcpListener::bind(address).await.with_context(|| format!("bind {address}"))?;
            let spokes = Rc::clone(&spokes);
            tokio::task::spawn_local(async move {
                while let Ok((stream, _)) = listener.accept().await {
                    // Whoever goes away goes away.
                    let spokes = Rc::clone(&spokes);
                    tokio::task::spawn_local(async move { answer(stream, &spokes, number, begun).await });
                }
            });
        }
        println!("{}", crate::BOUND);
        std::future::pending::<()>().await;
        Ok(())
    })
}

/// HTTP/1.1 with connections that stay, as Prometheus holds one to each target.
async fn answer(
    mut stream: TcpStream,
    spokes: &Simulated,
    number: u16,
    begun: Instant,
) -> std::io::Result<()> {
    let mut request = Vec::new();
    loop {
        while !request.ends_with(b"\r\n\r\n") {
            if request.len() > 8192 || stream.read_buf(&mut request).await? == 0 {
                return Ok(());
            }
        }
        request.clear();
        let text = spokes.text(number.into(), begun.elapsed().as_secs());
        let head = format!(
            "HTTP/1.1 200 OK\r\nContent-Type: application/openmetrics-text; version=1.0.0; charset=utf-8\r\n\
             Content-Length: {}\r\n\r\n",
            text.len()
        );
        stream.write_all(head.as_bytes()).await?;
        stream.write_all(text.as_bytes()).await?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_simulated_spoke_says_as_much_as_a_real_one_and_its_numbers_grow() {
        let spokes = Simulated::new().unwrap();
        let lines = |text: String| -> Vec<String> {
            text.lines().filter(|line| !line.starts_with('#')).map(str::to_owned).collect()
        };
        let (first, later) = (lines(spokes.text(7, 60)), lines(spokes.text(7, 75)));
        assert!((120..=150).contains(&first.len()), "{} series", first.len());
        assert_eq!(first.len(), later.len());
        let changed = first.iter().zip(&later).filter(|(first, later)| first != later).count();
        assert!(changed > first.len() / 3, "{changed} of {} changed", first.len());
        assert_ne!(lines(spokes.text(8, 60)), first);
    }
}
