//! Records what a kernel, our own daemon and its files say in a lab, as seeds for the fuzzers. Nothing of the
//! machine itself is in there: all of it is of the lab's namespaces.
//!
//! Writes to `tests/fuzz/seeds/DECODER/recorded`: `cargo run --package spokeguard-tests --bin seeds`, as root.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use lab::{CONTAINER, Lab, Mesh, SPOKE_MESH, SPOKE_PUBLIC, Shape};
use spokeguard::source::netlink::Netlink;

/// From linux/netlink.h.
const ROUTE: isize = 0;
const SOCK_DIAG: isize = 4;
const NETFILTER: isize = 12;
const GENERIC: isize = 16;
const DONE: u16 = 3;
const SEQUENCE: u32 = 7;

fn main() -> Result<()> {
    let lab = Lab::shaped(Shape { mesh: Mesh::Plain, container: true });
    let inside = lab.container.as_ref().context("a container")?;
    let _web = inside.listen("web", &["tcp/[::]:80", "udp/[::]:53"])?;
    let _own = lab.spoke.listen("own", &["tcp/0.0.0.0:443", "tcp/[::]:8443", "udp/[::]:53"])?;
    lab.publish(8080, 80)?;
    let policy = lab.policy().replace("kind = \"wireguard\"", "kind = \"tailscale\"");
    let policy = policy.replace("keepalive = \"25s\"\n", "").replace("[80, 443]", "[80, 443, 8080, 8443]");
    let daemon = lab.spoke.daemon(&policy)?;
    let mut open = Vec::new();
    for to in [SocketAddr::new(SPOKE_PUBLIC, 443), SocketAddr::new(SPOKE_PUBLIC, 8080)] {
        open.push(
            lab.internet.inside(|| TcpStream::connect(to).with_context(|| format!("connect to {to}")))?,
        );
    }
    lab.hub.connect(SocketAddr::new(SPOKE_MESH, 443), std::time::Duration::from_secs(1));
    lab.spoke.ask_udp(SocketAddr::new(CONTAINER, 53), std::time::Duration::from_millis(50))?;
    lab.spoke.sh("tc qdisc add dev docker0 clsact")?;

    let index = lab.spoke.sh("ip -o link show docker0")?;
    let index: u32 = index.split(':').next().unwrap_or_default().parse().context("an index")?;
    // struct tcmsg: family, device, handle, parent, info.
    let tc = [&[0; 4][..], &index.to_ne_bytes(), &[0; 12]].concat();
    // struct inet_diag_req_v2: family, protocol, extensions, states, id.
    let sockets = |family: u8, proto: u8, states: u32| {
        [&[family, proto, 0, 0][..], &states.to_ne_bytes(), &[0; 48]].concat()
    };
    let (listening, closed, flowing) = (1 << 10, 1 << 7, 1 << 1 | 1 << 8 | 1 << 10);
    for (name, protocol, kind, request) in [
        ("links", ROUTE, 18, vec![0; 16]),
        ("addresses", ROUTE, 22, vec![0; 8]),
        ("device", ROUTE, 18, vec![0; 16]),
        ("neighbours", ROUTE, 30, vec![0; 12]),
        ("route", ROUTE, 26, vec![0; 12]),
        ("tc", ROUTE, 38, tc),
        ("listeners-tcp", SOCK_DIAG, 20, sockets(10, 6, listening)),
        ("listeners-udp", SOCK_DIAG, 20, sockets(10, 17, closed)),
        ("streams", SOCK_DIAG, 20, sockets(2, 6, flowing)),
        ("connections", SOCK_DIAG, 20, sockets(2, 6, flowing)),
        ("conntrack", NETFILTER, 1 << 8 | 1, vec![0; 4]),
        ("counters", NETFILTER, 10 << 8 | 19, vec![1, 0, 0, 0]),
        // Every family that there is.
        ("wireguard-family", GENERIC, 16, vec![3, 1, 0, 0]),
    ] {
        let reply = lab.spoke.inside(|| dump(protocol, kind, &request))?;
        write(name, &whole(kind, &reply))?;
    }
    // One rule without its header.
    let rules = lab.spoke.inside(|| dump(NETFILTER, 10 << 8 | 7, &[1, 0, 0, 0]))?;
    write("nft-objects", rules.last().and_then(|rule| rule.get(4..)).context("a rule")?)?;
    write("nft-listing", lab.spoke.ok(&["nft", "-j", "list", "ruleset"])?.as_bytes())?;

    write("policy", policy.as_bytes())?;
    let scrape = lab.hub.http_get(SocketAddr::new(SPOKE_MESH, 9984), "/metrics", &[])?;
    write("exposition", scrape.body.as_bytes())?;
    write("sealed", &std::fs::read(daemon.state_dir.join("sealed.nft")).context("the sealed rules")?)?;
    let log = std::fs::read_to_string(daemon.state_dir.join("events.jsonl")).context("the event log")?;
    write("event-log", log.lines().next().context("an event")?.as_bytes())?;
    let mut status = UnixStream::connect(daemon.run_dir.join("spokeguard.sock")).context("ask the daemon")?;
    status.write_all(b"status\n")?;
    let mut answer = String::new();
    status.read_to_string(&mut answer)?;
    write("status", answer.as_bytes())?;
    if let Ok(text) = std::fs::read(daemon.state_dir.join("first-seen.json")) {
        write("first-seen", &text)?;
    }
    Ok(())
}

/// The payloads of a dump.
fn dump(protocol: isize, kind: u16, request: &[u8]) -> Result<Vec<Vec<u8>>> {
    let found = Netlink::open(protocol)?.dump(kind, request, |payload, out| {
        out.push(payload.to_vec());
        Ok(())
    })?;
    ensure!(!found.is_empty(), "a dump of {kind} by protocol {protocol} is empty");
    Ok(found)
}

/// As one datagram, with the end.
fn whole(kind: u16, payloads: &[Vec<u8>]) -> Vec<u8> {
    const MULTI: u16 = 2;
    let message = |kind: u16, payload: &[u8]| {
        let mut out = (16 + payload.len() as u32).to_ne_bytes().to_vec();
        out.extend(kind.to_ne_bytes());
        out.extend(MULTI.to_ne_bytes());
        out.extend(SEQUENCE.to_ne_bytes());
        out.extend([0; 4]);
        out.extend(payload);
        out.resize(out.len().next_multiple_of(4), 0);
        out
    };
    // What counts is in the first ones, and seeds should be small.
    let objects = payloads.iter().take(12).flat_map(|payload| message(kind, payload));
    objects.chain(message(DONE, &[0; 4])).collect()
}

fn write(decoder: &str, bytes: &[u8]) -> Result<()> {
    let folder = folder().join(decoder);
    std::fs::create_dir_all(&folder).with_context(|| format!("create {}", folder.display()))?;
    let path = folder.join("recorded");
    std::fs::write(&path, bytes).with_context(|| format!("write {}", path.display()))?;
    println!("{} bytes  {decoder}", bytes.len());
    Ok(())
}

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/seeds")
}
