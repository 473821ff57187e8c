//! Audits that lack something, that are killed, that others try to fool, and that must not be felt.

use std::collections::BTreeMap;
use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use lab::{
    Answer, Lab, Mesh, Need, Node, Outcome, Running, SPOKE_PUBLIC, SPOKE_PUBLIC_V6, Shape, Signal, lacking,
    spokeguard, wait_until,
};
use serde_json::Value;
use spokeguard::source::probe::Means;

const SOON: Duration = Duration::from_secs(15);

fn audit(node: &Node, run_dir: &Path, before: &[&str], words: &[&str]) -> Outcome {
    let (program, run_dir) = (spokeguard().unwrap().display().to_string(), run_dir.display().to_string());
    let all = before.iter().copied().chain([&*program, "--run-dir", &run_dir, "audit", "--no-policy"]);
    let all: Vec<&str> = all.chain(words.iter().copied()).collect();
    node.run_within(Duration::from_secs(60), &all).unwrap()
}

fn started(node: &Node, run_dir: &Path, words: &[&str]) -> Running {
    let (program, run_dir) = (spokeguard().unwrap().display().to_string(), run_dir.display().to_string());
    let all = [&*program, "--run-dir", &run_dir, "audit", "--no-policy"].into_iter();
    node.spawn(&all.chain(words.iter().copied()).collect::<Vec<_>>()).unwrap()
}

/// On a small machine the daemon's first one takes ten seconds.
#[test]
fn who_asks_while_another_audit_is_under_way_waits_for_its_end() {
    if lacking(&[Need::Lab, Need::Spokeguard]) {
        return;
    }
    let lab = Lab::plain();
    let run_dir = lab.dir.join("run");
    std::fs::create_dir(&run_dir).unwrap();
    let lock = run_dir.join("audit.lock").display().to_string();
    let mut other = lab.spoke.spawn(&["flock", &lock, "sleep", "5"]).unwrap();
    wait_until(SOON, "it is held", || {
        (lab.spoke.run(&["flock", "-n", &lock, "true"]).unwrap().code == Some(1)).then_some(())
    })
    .unwrap();
    let asked = audit(&lab.spoke, &run_dir, &[], &["--address", V4, "--tcp", "-p", "80"]);
    assert_eq!((asked.code, other.has_ended()), (Some(0), true), "{}", asked.all());
}

/// State and reason by port, of one protocol of the first target.
fn ports(found: &Value, proto: &str) -> BTreeMap<u16, (String, String)> {
    let protocols = found["targets"][0]["protocols"].as_array().unwrap();
    let of = protocols.iter().find(|p| p["proto"] == proto).expect("the protocol");
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    let line = |p: &Value| (p["port"].as_u64().unwrap() as u16, (text(&p["state"]), text(&p["reason"])));
    of["ports"].as_array().unwrap().iter().map(line).collect()
}

const V4: &str = "198.51.100.7";

#[test]
fn whoever_may_less_sees_the_same_or_says_what_is_missing() {
    if lacking(&[Need::Lab, Need::Spokeguard]) {
        return;
    }
    let lab = Lab::plain();
    let _web = lab.spoke.web().unwrap();
    lab.spoke.drop_all_but("tcp dport { 80, 81 } accept; tcp dport 90 reject with tcp reset;").unwrap();
    let run_dir = lab.dir.join("run");
    // A hardened unit's, but for some; CAP_SYS_ADMIN would stand for most of them.
    let with = |less: &str| {
        let set = "-all,+net_admin,+bpf,+perfmon,+net_raw,+dac_override,+dac_read_search,+sys_ptrace";
        let set = format!("--bounding-set={set}{less}");
        let words = ["--address", V4, "-p", "79-81,90,5000", "--format", "json"];
        audit(&lab.spoke, &run_dir, &["setpriv", &set], &words)
    };
    let states = |outcome: &Outcome| -> Vec<(u16, String)> {
        ports(&outcome.json().unwrap(), "tcp").into_iter().map(|(port, (state, _))| (port, state)).collect()
    };
    let right = [(79, "filtered"), (80, "open"), (81, "closed"), (90, "closed"), (5000, "filtered")];
    let right = right.map(|(port, state)| (port, state.to_owned()));
    // Before Linux 6.6 what arrives is seen by a socket, which is a right of its own.
    let (enough, refused): (&[_], &[_]) = if Means::of_this_kernel().tcx {
        (&["", ",-perfmon", ",-perfmon,-net_raw"], &[(",-bpf", "CAP_BPF")])
    } else {
        (&["", ",-perfmon"], &[(",-bpf", "CAP_BPF"), (",-net_raw", "CAP_NET_RAW")])
    };
    for less in enough {
        let outcome = with(less);
        assert_eq!((outcome.code, states(&outcome)), (Some(0), right.to_vec()), "{less}: {}", outcome.all());
        assert!(outcome.json().unwrap()["blind"].as_array().unwrap().is_empty(), "{}", outcome.all());
    }
    // The rules can be read, and are what the answer then comes from.
    for (less, says) in refused {
        let outcome = with(less);
        let json = outcome.json().unwrap();
        assert_eq!((outcome.code, json["verdict"].as_str()), (Some(2), Some("unknown")), "{}", outcome.all());
        let found = ports(&json, "tcp");
        assert_eq!((&*found[&80].0, &*found[&79].0), ("open", "filtered"), "{}", outcome.all());
        assert!(found.values().all(|(_, reason)| reason.ends_with("unproven")), "{found:?}");
        assert!(json["blind"].to_string().contains(says), "{}", outcome.all());
    }
    let outcome = with(",-net_admin");
    let json = outcome.json().unwrap();
    assert_eq!((outcome.code, json["verdict"].as_str()), (Some(2), Some("unknown")), "{}", outcome.all());
    assert!(ports(&json, "tcp").values().all(|(state, _)| state == "unknown"), "{}", outcome.all());
    assert!(json["blind"].to_string().contains("CAP_NET_ADMIN"), "{}", outcome.all());

    // No way in, and no way back.
    for (script, says) in [
        ("ip route del default; ip route flush dev eth0; ip rule add blackhole", "no route back"),
        ("ip rule del blackhole; ip link set eth0 down", "eth0 is down"),
    ] {
        lab.spoke.sh(script).unwrap();
        let words = ["--interface", "eth0", "--tcp", "-p", "79-81", "--format", "json"];
        let outcome = audit(&lab.spoke, &run_dir, &[], &words);
        let json = outcome.json().unwrap();
        assert_eq!((outcome.code, json["verdict"].as_str()), (Some(2), Some("unknown")), "{}", outcome.all());
        assert!(json["blind"].to_string().contains(says), "{says}: {}", outcome.all());
        let found = ports(&json, "tcp");
        assert_eq!(&*found[&79].0, "filtered", "{}", outcome.all());
        assert!(found[&79].1.ends_with("unproven"), "{found:?}");
    }
    assert!(!run_dir.exists(), "an audit leaves the run directory as it was");
}

#[test]
fn killed_at_any_moment_nothing_is_left() {
    if lacking(&[Need::Lab, Need::Spokeguard]) {
        return;
    }
    let lab = Lab::shaped(Shape { mesh: Mesh::Plain, container: true });
    let _many = lab.spoke.listen("many", &["tcp/[::]:20000+299", "udp/[::]:20000+299"]).unwrap();
    let _contained = lab.container.as_ref().unwrap().listen("app", &["tcp/[::]:8000"]).unwrap();
    lab.publish(20300, 8000).unwrap();
    // Conntrack is at work, and one port never answers, which makes the others wait half open.
    lab.spoke
        .nft(
            "table inet t { chain i { type filter hook input priority filter; ct state established accept;
              tcp dport 20305 drop; }; }",
        )
        .unwrap();
    let run_dir = lab.dir.join("run");
    let unfinished = run_dir.join("audit.unfinished");
    let wire = capture(&lab.internet);
    let nothing_is_left = |moment: &str| {
        let started = Instant::now();
        loop {
            let half = lab.spoke.sh("ss -Htan state syn-recv").unwrap();
            let tables = lab.spoke.sh("nft list tables").unwrap();
            let entries = conntrack(&lab.spoke);
            let (links, file) = (links(&lab.spoke), unfinished.exists());
            if half.is_empty() && entries.is_empty() && !tables.contains("spokeguard") && links == 0 && !file
            {
                break;
            }
            assert!(
                started.elapsed() < SOON,
                "killed {moment}: {links} programs, file {file}, {tables}{half}{entries}"
            );
            std::thread::sleep(Duration::from_millis(5));
        }
    };
    for (mode, begun, delays) in [
        (None, "audit.lock", &[0, 1, 5, 20, 60, 150, 400][..]),
        // Each of these takes what a retransmission does.
        (Some("--reply"), "audit.unfinished", &[0, 5, 60, 400]),
    ] {
        for delay in delays {
            let words = ["--address", V4, "-p", "20000-20310"];
            let mut running = started(&lab.spoke, &run_dir, &[&words[..], mode.as_slice()].concat());
            wait_until(SOON, "the audit begins", || {
                (run_dir.join(begun).exists() || running.has_ended()).then_some(())
            })
            .unwrap();
            // The moments are the point here, and each is as good as any other.
            std::thread::sleep(Duration::from_millis(*delay));
            let _ = running.signal(Signal::KILL);
            running.wait(SOON).unwrap();
            nothing_is_left(&format!("{delay} ms after it began, mode {mode:?}"));
        }
    }
    assert_eq!(lab.internet.connect(SocketAddr::new(SPOKE_PUBLIC, 20000), SOON), Answer::Open);
    let foreign = foreign(wire, ".20000: Flags [S]");
    assert!(foreign.is_empty(), "{foreign:#?}");

    // Killed together with its keeper, it is the next audit that cleans up.
    let words = ["--address", V4, "--tcp", "-p", "20000-20310", "--reply"];
    let mut running = started(&lab.spoke, &run_dir, &words);
    let child = wait_until(SOON, "a keeper", || {
        let children = std::fs::read_to_string(format!("/proc/{0}/task/{0}/children", running.pid())).ok()?;
        let half = || lab.spoke.sh("ss -Htan state syn-recv").unwrap();
        children.split_whitespace().next().filter(|_| !half().is_empty()).map(str::to_owned)
    })
    .unwrap();
    lab.spoke.sh(&format!("kill -9 {} {child}", running.pid())).unwrap();
    running.wait(SOON).unwrap();
    assert!(unfinished.exists(), "it was killed before it could clean up");
    let next = audit(&lab.spoke, &run_dir, &[], &["--address", V4, "--tcp", "-p", "1-2"]);
    assert_eq!(next.code, Some(0), "{}", next.all());
    nothing_is_left("with its keeper");
}

#[test]
fn packets_from_outside_that_look_like_probes_forge_nothing() {
    if lacking(&[Need::Lab, Need::Spokeguard]) {
        return;
    }
    let lab = Lab::plain();
    let _web = lab.spoke.web().unwrap();
    lab.spoke.drop_all_but("tcp dport 80 accept;").unwrap();
    let run_dir = lab.dir.join("run");
    let source = "198.51.100.99";
    let over = AtomicBool::new(false);
    let sent = AtomicU64::new(0);
    let outcomes: Vec<Outcome> = std::thread::scope(|scope| {
        scope.spawn(|| {
            lab.internet.inside(|| {
                flood(&over, &sent);
                Ok(())
            })
        });
        wait_until(SOON, "a flood", || (sent.load(Ordering::Relaxed) > 10_000).then_some(())).unwrap();
        let outcomes = (0..4)
            .map(|round| {
                // The guesser knows the source where the operator says it.
                let with: &[&str] = if round % 2 == 0 { &[] } else { &["--source", source] };
                audit(&lab.spoke, &run_dir, &[], &[&["--address", V4, "--format", "json"][..], with].concat())
            })
            .collect();
        over.store(true, Ordering::Relaxed);
        outcomes
    });
    assert!(sent.load(Ordering::Relaxed) > 50_000, "a flood that is worth the name");
    for outcome in outcomes {
        assert_eq!(outcome.code, Some(0), "{}", outcome.all());
        let json = outcome.json().unwrap();
        let open: Vec<u16> =
            ports(&json, "tcp").into_iter().filter(|p| p.1.0 == "open").map(|p| p.0).collect();
        assert_eq!(open, [80], "{}", outcome.all());
        for protocol in json["targets"][0]["protocols"].as_array().unwrap() {
            let others = &protocol["others"];
            let expected = if protocol["proto"] == "tcp" { 65_534 } else { 65_535 };
            let listed = protocol["ports"].as_array().unwrap().len() as u64;
            assert_eq!(others["state"], "filtered");
            assert!(others["count"].as_u64().unwrap() + listed >= expected, "{protocol}");
        }
    }
}

/// SYNs, SYN-ACKs, resets and datagrams with every port, many sequence numbers and the marks of the audit's
/// frames, as fast as one thread can.
fn flood(over: &AtomicBool, sent: &AtomicU64) {
    use rustix::net::{AddressFamily, SendFlags, SocketAddrV4, SocketType, ipproto, sendto, socket};
    let Ok(raw) = socket(AddressFamily::INET, SocketType::RAW, Some(ipproto::RAW)) else { return };
    let (from, to) = ([198, 51, 100, 99], [198, 51, 100, 7]);
    let mut seed = 0x1234_5678_u64;
    while !over.load(Ordering::Relaxed) {
        // xorshift: anything that is fast and hits all ports.
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        let port = (seed >> 8) as u16;
        let mut packet = vec![0x45, 0, 0, 60, 0, 0, 0x40, 0, 55, 6, 0, 0];
        packet.extend(from);
        packet.extend(to);
        let mut tcp = [0u8; 40];
        tcp[..2].copy_from_slice(&(32768 + (seed >> 24) as u16 % 28000).to_be_bytes());
        tcp[2..4].copy_from_slice(&port.to_be_bytes());
        tcp[4..8].copy_from_slice(&((seed >> 32) as u32).to_be_bytes());
        tcp[8..12].copy_from_slice(&(seed as u32).to_be_bytes());
        let flags = [2, 2, 0x12, 0x14][seed as usize % 4];
        tcp[12..16].copy_from_slice(&[10 << 4, flags, 0xfa, 0xf0]);
        tcp[20..28].copy_from_slice(&[2, 4, 5, 0xb4, 4, 2, 8, 10]);
        tcp[28..32].copy_from_slice(&((seed >> 16) as u32).to_be_bytes());
        tcp[36..40].copy_from_slice(&[1, 3, 3, 7]);
        let pseudo = [&from[..], &to[..], &[0, 6, 0, 40]].concat();
        let mut sum: u32 = pseudo
            .chunks(2)
            .chain(tcp.chunks(2))
            .map(|word| u32::from(u16::from_be_bytes([word[0], word[1]])))
            .sum();
        while sum >> 16 != 0 {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        tcp[16..18].copy_from_slice(&(!(sum as u16)).to_be_bytes());
        packet.extend(tcp);
        let to = SocketAddrV4::new(to.into(), 0);
        if sendto(&raw, &packet, SendFlags::empty(), &to).is_ok() {
            sent.fetch_add(1, Ordering::Relaxed);
        }
    }
}

#[test]
fn a_limit_that_real_traffic_needs_is_not_used_up() {
    if lacking(&[Need::Lab, Need::Spokeguard]) {
        return;
    }
    let lab = Lab::plain();
    let _web = lab.spoke.web().unwrap();
    lab.spoke
        .nft(
            "table inet t {
               chain i { type filter hook input priority filter; policy drop; iif lo accept;
               ct state established accept; icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert } accept;
               tcp dport 7000-7099 limit rate 1/minute burst 1 packets log prefix \"seen\" counter
               tcp dport 443 limit rate 1/minute burst 3 packets counter name slow accept
               tcp dport { 22, 80, 81, 9000-9999 } limit rate 40/second burst 4 packets accept
               tcp dport 80 counter name lost drop; };
               counter slow { }; counter lost { }; }",
        )
        .unwrap();
    let run_dir = lab.dir.join("run");
    let over = AtomicBool::new(false);
    let made = AtomicU64::new(0);
    let found = std::thread::scope(|scope| {
        // A client who needs an eighth of the limit, and must not wait for it.
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                let answer = lab.internet.connect(SocketAddr::new(SPOKE_PUBLIC, 80), Duration::from_secs(1));
                assert_eq!(answer, Answer::Open, "a client lacked what the audit had used up");
                made.fetch_add(1, Ordering::Relaxed);
                std::thread::sleep(Duration::from_millis(200));
            }
        });
        let words = ["--address", V4, "--tcp", "--format", "json"];
        let found: Vec<Outcome> = (0..2).map(|_| audit(&lab.spoke, &run_dir, &[], &words)).collect();
        wait_until(SOON, "some clients", || (made.load(Ordering::Relaxed) > 5).then_some(())).unwrap();
        over.store(true, Ordering::Relaxed);
        found
    });
    for outcome in found {
        assert_eq!(outcome.code, Some(0), "{}", outcome.all());
        let json = outcome.json().unwrap();
        let all = ports(&json, "tcp");
        assert_eq!(all[&80], ("open".into(), "syn-ack".into()), "probed, slowly: {}", outcome.all());
        assert_eq!(all[&443], ("open".into(), "syn-ack; unproven".into()), "too slow to be probed");
        let protocol = &json["targets"][0]["protocols"][0];
        // 443, 22, 81 and 9000-9999, at which nobody listens.
        assert_eq!(protocol["unproven"], 1003, "{}", outcome.all());
        assert_eq!(all.values().filter(|(state, _)| state == "closed").count() as u64, 1002);
        assert_eq!(protocol["others"]["count"], 65_535 - 1002 - 2);
    }
    let counters = lab.spoke.sh("nft list counters").unwrap();
    assert!(counters.matches("packets 0 ").count() == 2, "{counters}");
}

#[test]
fn a_thousand_connections_a_second_are_not_disturbed() {
    if lacking(&[Need::Lab, Need::Spokeguard]) {
        return;
    }
    let lab = Lab::plain();
    // An application that notes whatever comes, and would note an empty connection.
    let listener = lab.spoke.inside(|| Ok(TcpListener::bind(SocketAddr::new(SPOKE_PUBLIC, 443))?)).unwrap();
    lab.spoke.drop_all_but("ct state established accept; tcp dport 443 accept;").unwrap();
    let run_dir = lab.dir.join("run");
    let (over, all_made) = (AtomicBool::new(false), AtomicBool::new(false));
    let (noted, strange, failed, made) =
        (AtomicU64::new(0), AtomicU64::new(0), AtomicU64::new(0), AtomicU64::new(0));
    let to = SocketAddr::new(SPOKE_PUBLIC, 443);
    let (seconds, audits) = std::thread::scope(|scope| {
        scope.spawn(|| {
            listener.set_nonblocking(true).unwrap();
            while !all_made.load(Ordering::Relaxed)
                || noted.load(Ordering::Relaxed) < made.load(Ordering::Relaxed)
            {
                match listener.accept() {
                    Ok((_, from)) => {
                        noted.fetch_add(1, Ordering::Relaxed);
                        if from.ip() != lab::OUTSIDER {
                            strange.fetch_add(1, Ordering::Relaxed);
                        }
                    }
                    Err(_) => std::thread::sleep(Duration::from_micros(200)),
                }
            }
        });
        let start = Instant::now();
        let strangers = [0, 1].map(|part| {
            let (over, failed, made, lab) = (&over, &failed, &made, &lab);
            scope.spawn(move || {
                lab.internet.inside(|| {
                    let mut next = Instant::now() + Duration::from_millis(part);
                    while !over.load(Ordering::Relaxed) {
                        match std::net::TcpStream::connect_timeout(&to, Duration::from_secs(5)) {
                            Ok(_) => made.fetch_add(1, Ordering::Relaxed),
                            Err(_) => failed.fetch_add(1, Ordering::Relaxed),
                        };
                        // Two of them make a thousand a second; what was missed is made up for.
                        next += Duration::from_millis(2);
                        std::thread::sleep(next.saturating_duration_since(Instant::now()));
                    }
                    Ok(())
                })
            })
        });
        let mut audits = 0;
        // A busy machine takes longer over as many.
        let [made_so_far, failed_so_far] = [&made, &failed].map(|n| || n.load(Ordering::Relaxed));
        while audits < 3 || (made_so_far() < 2000 && failed_so_far() == 0) {
            let words = ["--address", V4, "--format", "json"];
            let outcome = audit(&lab.spoke, &run_dir, &[], &words);
            assert_eq!(outcome.code, Some(0), "{}", outcome.all());
            let json = outcome.json().unwrap();
            let open = ports(&json, "tcp");
            assert_eq!(open.get(&443).map(|p| &*p.0), Some("open"), "{}", outcome.all());
            // Nor does real traffic disturb the audit.
            let others = &json["targets"][0]["protocols"][0]["others"];
            assert_eq!((&others["state"], &others["count"]), (&"filtered".into(), &65_534.into()));
            audits += 1;
        }
        let seconds = start.elapsed().as_secs_f64();
        over.store(true, Ordering::Relaxed);
        for stranger in strangers {
            stranger.join().unwrap().unwrap();
        }
        all_made.store(true, Ordering::Relaxed);
        (seconds, audits)
    });
    let made = made.into_inner();
    let rate = made as f64 / seconds;
    println!("{audits} audits beside {rate:.0} connections a second");
    assert_eq!((failed.into_inner(), strange.into_inner()), (0, 0), "failed, or from nobody");
    assert_eq!(noted.into_inner(), made, "entries in the application's log");
    assert!(made >= 2000, "{made} connections are too few to prove anything");
}

#[test]
fn what_the_kernel_does_not_say_by_icmp_is_still_a_reject() {
    if lacking(&[Need::Lab, Need::Spokeguard]) {
        return;
    }
    let lab = Lab::plain();
    lab.spoke
        .drop_all_but(
            "icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert } accept; \
             udp dport 1-60000 reject; udp dport 60001-61000 drop;",
        )
        .unwrap();
    for (address, word) in [(SPOKE_PUBLIC, "port-unreach"), (SPOKE_PUBLIC_V6, "port-unreach")] {
        let address = address.to_string();
        let words = ["--udp", "--address", &address, "--format", "json"];
        let outcome = audit(&lab.spoke, &lab.dir.join("run"), &[], &words);
        let json = outcome.json().unwrap();
        let protocol = &json["targets"][0]["protocols"][0];
        assert_eq!(protocol["others"]["state"], "closed", "{address} {word}: {}", outcome.all());
        assert_eq!(protocol["others"]["count"], 60_000, "{address}: {}", outcome.stdout.len());
        assert!(ports(&json, "udp").values().all(|(state, _)| state == "filtered"));
    }
}

/// Programs in netfilter's hooks and around devices that belong to an audit.
fn links(node: &Node) -> usize {
    use aya::programs::{SchedClassifier, TcAttachType};
    node.inside(|| {
        let both = [TcAttachType::Ingress, TcAttachType::Egress];
        Ok(both.map(|way| SchedClassifier::query_tcx("eth0", way).map_or(0, |all| all.1.len())).iter().sum())
    })
    .unwrap()
}

fn conntrack(node: &Node) -> String {
    node.sh("grep -E ' (tcp|udp) ' /proc/thread-self/net/nf_conntrack || true").unwrap()
}

fn capture(node: &Node) -> Running {
    let filter = "(ip and not igmp) or (ip6 and (tcp or udp or (icmp6 and ip6[40] < 128)))";
    let words = ["tcpdump", "-n", "-l", "--immediate-mode", "-i", "spoke0", filter];
    let mut running = node.spawn(&words).unwrap();
    running.wait_for("listening on", SOON).unwrap();
    running
}

/// What neither comes from the outsider nor goes there, up to a packet that the test sent last.
fn foreign(mut capture: Running, last: &str) -> Vec<String> {
    capture.wait_for(last, SOON).unwrap();
    let seen = capture.log();
    capture.stop().unwrap();
    let strange = seen.lines().filter(|line| line.contains(" > ") && !line.contains("198.51.100.99"));
    strange.map(str::to_owned).collect()
}
