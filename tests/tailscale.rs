//! A node whose mesh is Tailscale's: what tailscaled says is held against the policy, and the
//! mesh range is refused on public interfaces as on every other node.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use lab::{Answer, Lab, Need, SPOKE_PUBLIC, SPOKE_PUBLIC_V6, Tailscaled, lacking};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde_json::{Value, json};

const POLICY: &str = "version = 1
[node]
name = \"singapore\"
role = \"device\"
[mesh]
kind = \"tailscale\"
address = [\"100.64.0.16\", \"fd7a:115c:a1e0::16\"]
tags = [\"tag:server\"]
[public]
tcp = [80]
[ssh]
from = \"mesh\"
[[mesh.service]]
name = \"netdata\"
tcp = [19999]
from = \"mesh\"
";

/// The codes of findings that are not accepted, the verdict and the blind facets.
fn check(lab: &Lab, policy: &str) -> (Vec<String>, String, Vec<String>) {
    let outcome =
        lab.spoke.spokeguard(&["check", "--no-probe", "--format", "json", "--policy", policy]).unwrap();
    let json: Value = outcome.json().unwrap_or_else(|error| panic!("{error:#}\n{}", outcome.all()));
    let texts = |key: &str, of: &str| -> Vec<String> {
        json[key].as_array().unwrap().iter().map(|one| one[of].as_str().unwrap().to_owned()).collect()
    };
    let found = json["findings"].as_array().unwrap().iter();
    let found = found.map(|f| format!("{} {}", f["code"].as_str().unwrap(), f["subject"].as_str().unwrap()));
    (found.collect(), json["verdict"].as_str().unwrap().to_owned(), texts("blind", "facet"))
}

#[test]
fn a_tailscale_node_is_held_to_its_policy_and_its_range_is_refused_elsewhere() {
    if lacking(&[Need::Lab, Need::Spokeguard]) {
        return;
    }
    let mut lab = Lab::plain();
    lab.spoke
        .sh("ip link add tailscale0 type veth peer name tailnet
            ip link set tailnet up; ip link set tailscale0 up
            ip address add 100.64.0.16/32 dev tailscale0
            ip address add fd7a:115c:a1e0::16/128 dev tailscale0 nodad")
        .unwrap();
    let _services = lab
        .spoke
        .listen("web", &["web/[::]:80", "tcp/100.64.0.16:19999", "tcp/[fd7a:115c:a1e0::16]:19999"])
        .unwrap();
    let _sshd = lab.spoke.listen("ssh-stub", &["tcp/100.64.0.16:22", "tcp/[fd7a:115c:a1e0::16]:22"]).unwrap();
    // A neighbour who knows the way to the mesh addresses, and has one of its own.
    lab.internet
        .sh(&format!(
            "ip address add 100.64.0.66/32 dev lo; ip address add fd7a:115c:a1e0::66/128 dev lo nodad
             ip route add 100.64.0.16/32 via {SPOKE_PUBLIC} src 198.51.100.99
             ip -6 route add fd7a:115c:a1e0::16/128 via {SPOKE_PUBLIC_V6} src 2001:db8:1::99"
        ))
        .unwrap();
    lab.spoke.sh("ip route add 100.64.0.66/32 via 198.51.100.99; ip -6 route add fd7a:115c:a1e0::66/128 via 2001:db8:1::99").unwrap();
    let mesh: [IpAddr; 2] = ["100.64.0.16".parse().unwrap(), "fd7a:115c:a1e0::16".parse().unwrap()];
    let outsider =
        |to: IpAddr, port| lab.internet.connect(SocketAddr::new(to, port), Duration::from_millis(300));
    let spoofed = |to: IpAddr| {
        let from: IpAddr = if to.is_ipv4() { "100.64.0.66" } else { "fd7a:115c:a1e0::66" }.parse().unwrap();
        lab.internet.inside(|| Ok(connects_from(from, SocketAddr::new(to, 80))?)).unwrap()
    };
    for to in mesh {
        assert_eq!(outsider(to, 19999), Answer::Open, "{to}: nothing refuses it yet");
    }
    for to in [SPOKE_PUBLIC, SPOKE_PUBLIC_V6] {
        assert!(spoofed(to), "{to}: nothing refuses it yet");
    }
    let policy = lab.dir.join("tailscale.toml");
    std::fs::write(&policy, POLICY).unwrap();
    let policy = policy.display().to_string();
    let (found, verdict, _) = check(&lab, &policy);
    let leaks = found.iter().filter(|text| text.starts_with("mesh-leak ")).count();
    assert!(leaks == 2 && verdict == "drift", "{verdict} {found:?}");

    let applied = lab.spoke.spokeguard(&["apply", "--policy", &policy]).unwrap();
    assert_eq!(applied.code, Some(0), "{}", applied.all());
    lab.spoke.spokeguard(&["confirm"]).unwrap();
    for to in mesh {
        assert_eq!(outsider(to, 19999), Answer::Silent, "{to} through a public interface");
        assert_eq!(outsider(to, 22), Answer::Silent, "{to} through a public interface");
    }
    for to in [SPOKE_PUBLIC, SPOKE_PUBLIC_V6] {
        assert!(!spoofed(to), "{to} from a mesh address through a public interface");
        assert_eq!(outsider(to, 80), Answer::Open, "{to}: strangers are welcome at what is public");
    }

    // The stub of the lab has other addresses, and no tags.
    let codes = |lab: &Lab| {
        let (found, verdict, blind) = check(lab, &policy);
        let about: Vec<String> = found
            .into_iter()
            .filter(|text| text.contains("tailscale") || text.starts_with("mesh-leak"))
            .collect();
        (about, verdict, blind.contains(&"tailscale".to_owned()))
    };
    let (about, verdict, blind) = codes(&lab);
    let expected = [
        "mesh-address tailscale address 100.64.0.16",
        "mesh-address tailscale address fd7a:115c:a1e0::16",
        "mesh-tags tailscale tags",
    ];
    assert_eq!((about, verdict.as_str(), blind), (expected.map(String::from).to_vec(), "drift", false));

    lab.tailscaled.stop();
    lab.tailscaled = Tailscaled::start(&lab.dir, &["100.64.0.16", "fd7a:115c:a1e0::16"]).unwrap();
    lab.tailscaled.change(|[status, ..]| status["Self"]["Tags"] = json!(["tag:server"]));
    let (about, _, blind) = codes(&lab);
    assert!(about.is_empty() && !blind, "as the policy says: {about:?}");

    // What was compiled for the node: as the policy, wider, and in a form that nobody knows.
    let rule = |from: &str, ports: (u16, u16)| {
        let ports = json!({ "First": ports.0, "Last": ports.1 });
        json!({ "SrcIPs": [from], "DstPorts": [{ "IP": "100.64.0.16/32", "Ports": ports }], "IPProto": [6, 17] })
    };
    let mesh = "100.64.0.0-100.127.255.255";
    let as_policy = json!([
        { "SrcIPs": [mesh], "IPProto": [6], "DstPorts": [{ "IP": "*", "Ports": { "First": 22, "Last": 22 } }] },
        { "SrcIPs": [mesh], "IPProto": [6], "DstPorts": [{ "IP": "*", "Ports": { "First": 19999, "Last": 19999 } }] },
    ]);
    for (filter, wanted) in [
        (as_policy, ""),
        (
            json!([rule(mesh, (19999, 20001))]),
            "it lets in tcp 20000-20001 from 100.64.0.0/10 and udp 19999-20001",
        ),
        (json!("\u{1b}[2Jrules"), "it can't be compared: "),
        (json!(null), ""),
    ] {
        lab.tailscaled.change(|[.., rules]| *rules = filter.clone());
        let (about, _, blind) = codes(&lab);
        let expected: &[&str] =
            if wanted.is_empty() { &[] } else { &["mesh-filter tailscale packet filter"] };
        assert!(about == expected && !blind, "{filter}: {about:?}");
        let json =
            lab.spoke.spokeguard(&["check", "--no-probe", "--format", "json", "--policy", &policy]).unwrap();
        assert!(json.stdout.contains(wanted), "{filter}: {}", json.all());
    }

    lab.tailscaled.change(|[status, prefs, _]| {
        status["BackendState"] = json!("NeedsLogin");
        status["Health"] = json!(["You are logged out."]);
        status["Self"]["KeyExpiry"] = json!("2020-01-01T00:00:00Z");
        prefs["RunSSH"] = json!(true);
    });
    let (about, verdict, _) = codes(&lab);
    let expected =
        ["mesh-missing tailscaled", "mesh-key-expiry tailscale node key", "tailscale-ssh tailscale ssh"];
    assert_eq!((about, verdict.as_str()), (expected.map(String::from).to_vec(), "drift"));

    // Nobody to ask: not known is not fine.
    lab.tailscaled.stop();
    let (about, verdict, blind) = codes(&lab);
    assert!(about.is_empty() && blind && verdict != "ok", "{about:?} {verdict}");
    let text = lab.spoke.spokeguard(&["check", "--no-probe", "--policy", &policy]).unwrap();
    assert!(text.stdout.contains("is tailscaled running?"), "{}", text.all());
}

/// Whether a connection from this address of the caller's is answered within 300 ms.
fn connects_from(from: IpAddr, to: SocketAddr) -> rustix::io::Result<bool> {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, connect, socket_with, sockopt};
    let family = if from.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let socket = socket_with(family, SocketType::STREAM, SocketFlags::NONBLOCK | SocketFlags::CLOEXEC, None)?;
    bind(&socket, &SocketAddr::new(from, 0))?;
    match connect(&socket, &to) {
        Ok(()) | Err(rustix::io::Errno::INPROGRESS) => {}
        Err(error) => return Err(error),
    }
    let mut polled = [PollFd::new(&socket, PollFlags::OUT)];
    let limit = Timespec { tv_sec: 0, tv_nsec: 300_000_000 };
    Ok(poll(&mut polled, Some(&limit))? == 1 && sockopt::socket_error(&socket)?.is_ok())
}
