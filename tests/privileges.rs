//! What the daemon and its metrics server may do, as the kernel tells it of each of their threads, and that
//! everything still works with so little.

use std::collections::BTreeMap;
use std::fs;
use std::io::ErrorKind;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use aya::util::KernelVersion;
use lab::{Lab, Need, SPOKE_MESH, SPOKE_MESH_V6, SPOKE_PUBLIC, lacking, wait_until};
use serde_json::Value;
use spokeguard::source::probe::Means;

use crate::daemon::{Events, LONG, findings, status};
use crate::metrics::{fresh, scrape, sum};

/// CAP_DAC_READ_SEARCH, NET_BIND_SERVICE, NET_ADMIN, SYS_PTRACE, PERFMON, BPF.
const KEPT: &str = "000000c000081404";
/// Before Linux 6.6 also NET_RAW.
const KEPT_ONCE: &str = "000000c000083404";
const NOTHING: &str = "0000000000000000";

/// The fields of one `/proc/PID/status`.
fn fields(path: &str) -> BTreeMap<String, String> {
    let text = fs::read_to_string(path).unwrap_or_default();
    let pair =
        |line: &str| line.split_once(':').map(|(key, value)| (key.to_owned(), value.trim().to_owned()));
    text.lines().filter_map(pair).collect()
}

/// Those of each thread of a process.
fn threads(pid: u32) -> Vec<BTreeMap<String, String>> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let paths = tasks.map(|task| format!("{}/status", task.unwrap().path().display()));
    // A thread may have ended meanwhile.
    paths.map(|path| fields(&path)).filter(|fields| !fields.is_empty()).collect()
}

/// The process that serves the metrics of this daemon.
fn server(daemon: u32) -> Option<u32> {
    let children = fs::read_to_string(format!("/proc/{daemon}/task/{daemon}/children")).ok()?;
    let mut pids = children.split_whitespace().filter_map(|pid| pid.parse().ok());
    pids.find(|pid| {
        fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|comm| comm.trim() == "spokeguard-http")
    })
}

fn assert_all(threads: &[BTreeMap<String, String>], wanted: &[(&str, &str)]) {
    assert!(!threads.is_empty());
    for thread in threads {
        for (field, value) in wanted {
            assert_eq!(thread.get(*field).map(String::as_str), Some(*value), "{field} of {thread:#?}");
        }
    }
}

#[test]
fn privileges_are_few_and_everything_works_with_them() {
    if lacking(&[Need::Lab, Need::WireGuard, Need::Sshd, Need::Spokeguard]) {
        return;
    }
    let lab = Lab::new();
    let _sshd = lab.spoke.sshd(22, &[&SPOKE_MESH.to_string(), &SPOKE_MESH_V6.to_string()], "").unwrap();
    let _web = lab.spoke.web().unwrap();
    let daemon = lab.spoke.daemon(&lab.policy()).unwrap();
    let pid = daemon.running.pid();

    // Proven at start, and told.
    let told = wait_until(LONG, "the server has said how it is held", || {
        Some(status(&lab.spoke, &daemon)["daemon"]["privileges"].clone())
            .filter(|told| !told["http"].is_null())
    })
    .unwrap();
    assert_eq!((&told["proven"], &told["gaps"]), (&Value::Bool(true), &Value::Array(Vec::new())), "{told}");
    // Of TCP, Landlock knows since Linux 6.7.
    let here = KernelVersion::current().unwrap();
    let landlock = if here >= KernelVersion::new(6, 7, 0) { "full" } else { "partial" };
    assert_eq!(told["http"], serde_json::json!({ "landlock": landlock, "gaps": [] }), "{told}");
    let (kept, count) = if Means::of_this_kernel().tcx { (KEPT, 6) } else { (KEPT_ONCE, 7) };
    assert_eq!(told["capabilities"].as_array().unwrap().len(), count, "{told}");
    assert_eq!(sum(&scrape(&lab.hub), "control_enforced", &[("control", "privileges")]), 1.0);
    assert!(!daemon.running.log().contains("privileges:"), "{}", daemon.running.log());

    // And the kernel says so too, of every thread.
    let own = threads(pid);
    assert!(own.len() > 1, "the looks have a thread of their own: {own:#?}");
    let capped =
        |set| [("CapEff", set), ("CapPrm", set), ("CapInh", NOTHING), ("CapAmb", NOTHING), ("CapBnd", kept)];
    assert_all(&own, &capped(kept));
    assert_all(&own, &[("NoNewPrivs", "1"), ("Seccomp", "2")]);
    let http = server(pid).expect("a server");
    let its = threads(http);
    assert_eq!(its.len(), 1, "{its:#?}");
    assert_all(&its, &capped(NOTHING));
    assert_all(&its, &[("NoNewPrivs", "1"), ("Seccomp", "2")]);
    // It has the daemon's filters and its own.
    let filters = |thread: &BTreeMap<String, String>| thread["Seccomp_filters"].parse::<u32>().unwrap();
    assert!(filters(&its[0]) > filters(&own[0]), "{its:#?} {own:#?}");
    // Nothing but sockets and its event loop, beside what it writes its last words to.
    for entry in fs::read_dir(format!("/proc/{http}/fd")).unwrap() {
        let entry = entry.unwrap();
        // One that is closed meanwhile is none that it has.
        let to = match fs::read_link(entry.path()) {
            Err(error) if error.kind() == ErrorKind::NotFound => continue,
            to => to.unwrap().display().to_string(),
        };
        let kinds = ["socket:", "anon_inode:[event"];
        let output = entry.file_name() == "1" && to == "/dev/null" || entry.file_name() == "2";
        assert!(output || kinds.iter().any(|kind| to.starts_with(kind)), "the server has {to}");
    }

    // Looks: everything is seen, sshd's own words included, with whoever holds it.
    fs::set_permissions(&lab.dir, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let helper = lab::helper().unwrap().display().to_string();
    let nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"];
    let listen = [&helper, "listen", "stranger", "tcp/0.0.0.0:6379"];
    let events = Events::mark(&daemon);
    let stranger = lab.spoke.spawn(&[&nobody[..], &listen[..]].concat()).unwrap();
    let seen = |e: &Value| e["subject"] == "tcp/0.0.0.0:6379" && e["kind"] == "drift-appeared";
    let event = events.wait(LONG, "another user's listener", seen);
    assert_eq!(
        (&event["by"]["process"], event["by"]["pid"].as_u64()),
        (&"stranger".into(), Some(stranger.pid().into()))
    );
    let report = status(&lab.spoke, &daemon);
    assert_eq!(report["blind"], serde_json::json!([]), "{report}");
    assert!(findings(&report, "ssh-unreachable").is_empty(), "{report}");

    // Repairs: in the kernel's own words, and by way of nft; and the tunnel's keepalive.
    for (change, code) in
        [("flush ruleset", "firewall-missing"), ("flush chain inet spokeguard input", "firewall-changed")]
    {
        let events = Events::mark(&daemon);
        lab.spoke.ok(&["nft", change]).unwrap();
        events.wait(LONG, change, |e| e["kind"] == "repaired" && e["code"] == code);
    }
    let peer = &lab.keys.hub.public;
    lab.spoke.sh(&format!("wg set wg0 peer {peer} persistent-keepalive off")).unwrap();
    wait_until(LONG, "the keepalive is set again", || {
        let shown = lab.spoke.sh("wg show wg0 persistent-keepalive").ok()?;
        shown.contains("25").then_some(())
    })
    .unwrap();

    // Counters: on an interface that comes later.
    lab.spoke.sh("ip link add late0 type veth peer name late1; ip link set late0 up; ip link set late1 up; ip addr add 203.0.113.200/30 dev late0").unwrap();
    let counted = |body: &str| sum(body, "packets_total", &[("scope", "public")]);
    let before = counted(&scrape(&lab.hub));
    lab.internet.connect(SocketAddr::new(SPOKE_PUBLIC, 80), LONG);
    wait_until(LONG, "a connection is counted", || (counted(&scrape(&lab.hub)) > before).then_some(()))
        .unwrap();
    let shown = lab.spoke.sh("ip -o link show late0").unwrap();
    let pin = format!("/sys/fs/bpf/spokeguard/abi*/links/in-{}", shown.split(':').next().unwrap());
    // By a filter where there are no links.
    let there = format!("test -e {pin} || tc filter show dev late0 ingress | grep -q in_eth_public");
    wait_until(LONG, "the new interface is counted on", || lab.spoke.sh(&there).ok()).unwrap();
    assert_eq!(status(&lab.spoke, &daemon)["daemon"]["privileges"]["proven"], true);
}

#[test]
fn privileges_of_the_server_end_with_it_and_it_ends_alone() {
    if lacking(&[Need::Lab, Need::Spokeguard]) {
        return;
    }
    let lab = Lab::plain();
    let mut daemon = lab.spoke.daemon(&lab.policy()).unwrap();
    let pid = daemon.running.pid();
    let first = server(pid).expect("a server");
    assert!(scrape(&lab.hub).contains("spokeguard_verdict"));

    // The server falls over: another takes its place, and the daemon goes on.
    lab.spoke.sh(&format!("kill -9 {first}")).unwrap();
    let at = SocketAddr::new(SPOKE_MESH, crate::metrics::PORT);
    let body =
        wait_until(LONG, "metrics again", || Some(lab.hub.http_get(at, "/metrics", &[]).ok()?.body)).unwrap();
    assert!(body.contains("spokeguard_verdict"), "{body}");
    let second = server(pid).expect("another server");
    assert_ne!(second, first);
    assert!(daemon.running.log().contains("the metrics server is started again"));
    wait_until(LONG, "it is held in as well", || {
        (status(&lab.spoke, &daemon)["daemon"]["privileges"]["proven"] == true).then_some(())
    })
    .unwrap();

    // The daemon falls over: nobody listens in its name, and the next one has its address at once.
    let folder = daemon.folder().to_path_buf();
    daemon.kill_9().unwrap();
    let gone = || fs::metadata(format!("/proc/{second}")).is_err();
    wait_until(LONG, "the server has ended with its daemon", || gone().then_some(())).unwrap();
    let daemon = lab.spoke.daemon_in(&folder, &[]).unwrap();
    let begun = Instant::now();
    wait_until(LONG, "metrics of the next daemon", || lab.hub.http_get(at, "/healthz", &[]).ok()).unwrap();
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    assert!(fresh(&lab.hub).contains("spokeguard_verdict"));
    drop(daemon);
}
