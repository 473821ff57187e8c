//! Sweeps of a spoke from the outside in, beside a real nmap at the other end of the wire.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Instant;

use lab::{Lab, Mesh, Need, Node, SPOKE_PUBLIC, SPOKE_PUBLIC_V6, Shape, lacking};
use spokeguard::audit::{Fate, Sweep};
use spokeguard::observed::{Link, Listener};
use spokeguard::source::probe::{Mode, Request, sweep};
use spokeguard::source::{links, listeners, owners};
use spokeguard::terms::Proto;

fn request(lab: &Lab, addresses: &[IpAddr], protos: &[Proto]) -> Request {
    let link = link(&lab.spoke, "eth0");
    Request {
        link,
        addresses: addresses.to_vec(),
        protos: protos.to_vec(),
        ports: vec![1..=u16::MAX],
        source: None,
        named: Vec::new(),
        mode: Mode::Verdict,
        rate: None,
        run_dir: lab.dir.join("run"),
    }
}

fn link(node: &Node, name: &str) -> Link {
    let all = node.inside(links::read).unwrap();
    all.into_iter().find(|link| link.name == name).unwrap_or_else(|| panic!("{name} in {}", node.name))
}

fn swept(lab: &Lab, request: &Request) -> Vec<Sweep> {
    lab.spoke.inside(|| sweep(request, &mut |_| ())).unwrap()
}

fn listening(node: &Node) -> Vec<Listener> {
    node.inside(|| listeners::read(&mut owners::Owners::new())).unwrap()
}

/// As nmap would call it.
fn state(fate: &Fate, proto: Proto, listeners: &[Listener]) -> &'static str {
    match fate {
        Fate::Delivered { address, port } => {
            let open = listeners.iter().any(|l| l.proto == proto && l.port == *port && l.answers(*address));
            if open { "open" } else { "closed" }
        }
        // The lab's container listens wherever a test forwards to.
        Fate::Forwarded { .. } | Fate::Answered => "open",
        Fate::Reset => "closed",
        Fate::Unreachable { .. } | Fate::Dropped => "filtered",
        Fate::Lost => "lost",
    }
}

#[test]
fn smoke() {
    if lacking(&[Need::Lab, Need::Nmap]) {
        return;
    }
    let lab = Lab::shaped(Shape { mesh: Mesh::Plain, container: true });
    let _web = lab.spoke.web().unwrap();
    lab.publish(8080, 8000).unwrap();
    lab.spoke.nft("table inet t { chain i { type filter hook input priority 0; policy drop; tcp dport { 22, 80, 443 } accept; tcp dport 100-200 reject with tcp reset; udp dport 53 accept; tcp dport 300-310 reject; } ; }").unwrap();
    for _ in 0..2 {
        let started = Instant::now();
        let all = swept(&lab, &request(&lab, &[SPOKE_PUBLIC, SPOKE_PUBLIC_V6], &[Proto::Tcp, Proto::Udp]));
        eprintln!("all four {:?}", started.elapsed());
        for sweep in &all {
            let mut kinds: BTreeMap<String, Vec<u16>> = BTreeMap::new();
            for (port, fate) in &sweep.fates {
                let kind = match fate {
                    Fate::Delivered { address, .. } => format!("delivered {address}"),
                    other => format!("{other:?}"),
                };
                kinds.entry(kind).or_default().push(port.get());
            }
            eprintln!("{} {} from {}", sweep.address, sweep.proto, sweep.source);
            for (kind, ports) in kinds {
                eprintln!("  {kind}: {} {:?}", ports.len(), &ports[..ports.len().min(12)]);
            }
        }
        let started = Instant::now();
        swept(&lab, &request(&lab, &[SPOKE_PUBLIC], &[Proto::Tcp]));
        eprintln!("tcp v4 {:?}", started.elapsed());
    }
    let _ = (listening(&lab.spoke), state as fn(&Fate, Proto, &[Listener]) -> _, BTreeSet::<u8>::new());
    eprintln!(
        "{}",
        lab.spoke.sh("conntrack -C || cat /proc/sys/net/netfilter/nf_conntrack_count; ss -tan").unwrap()
    );
}
