//! The daemon: what it repairs, whom it names, and what it survives.

use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use lab::{
    Answer, Daemon, Lab, Need, Node, Outcome, SPOKE_MESH, SPOKE_MESH_V6, SPOKE_PUBLIC, SPOKE_PUBLIC_V6,
    Signal, lacking, wait_until,
};
use serde_json::Value;

pub const SHORT: Duration = Duration::from_millis(200);
/// For what comes within seconds; a busy machine of two processors takes many times as long.
pub const LONG: Duration = Duration::from_secs(60);
/// For what an event tells of; a machine of one emulated processor is given more.
const AT_ONCE: Duration = Duration::from_secs(1);
/// For tests that need a listener where the bind guard would refuse it.
pub const UNGUARDED: &str = "[enforce]\nbinds = false\n";
const TABLE: [&str; 6] = ["nft", "-s", "list", "table", "inet", "spokeguard"];

/// The event log of a daemon from a moment on.
pub struct Events {
    path: PathBuf,
    from: usize,
}

impl Events {
    pub fn mark(daemon: &Daemon) -> Self {
        let path = daemon.state_dir.join("events.jsonl");
        let from = fs::read_to_string(&path).map_or(0, |text| text.len());
        Self { path, from }
    }

    pub fn all(&self) -> Vec<Value> {
        let text = fs::read_to_string(&self.path).unwrap_or_default();
        let lines = text.get(self.from..).unwrap_or_default().lines();
        lines.filter_map(|line| serde_json::from_str(line).ok()).collect()
    }

    pub fn wait(&self, limit: Duration, what: &str, wanted: impl Fn(&Value) -> bool) -> Value {
        wait_until(limit, what, || self.all().into_iter().find(|event| wanted(event)))
            .unwrap_or_else(|error| panic!("{error:#}; there were {:#?}", self.all()))
    }
}

/// The status document, whatever the verdict. A slow machine's daemon, which has programs checked by the kernel, may
/// need longer than the command line waits.
pub fn status(node: &Node, daemon: &Daemon) -> Value {
    let ask = || node.spokeguard(&daemon.arguments(&["status", "--format", "json"])).unwrap();
    let mut outcome = ask();
    for _ in 1..lab::times("SPOKEGUARD_PATIENCE") {
        if outcome.all().contains("has not answered") {
            outcome = ask();
        }
    }
    outcome.json().unwrap_or_else(|error| panic!("{error:#}\n{}", daemon.running.log()))
}

pub fn findings(status: &Value, code: &str) -> Vec<Value> {
    let all = status["findings"].as_array().expect("findings");
    all.iter().filter(|finding| finding["code"] == code).cloned().collect()
}

/// Waits until the report has, or has not, a finding of this code.
fn await_finding(node: &Node, daemon: &Daemon, code: &str, there: bool, limit: Duration) -> Vec<Value> {
    wait_until(limit, &format!("{code} there: {there}"), || {
        let found = findings(&status(node, daemon), code);
        (found.is_empty() != there).then_some(found)
    })
    .unwrap_or_else(|error| panic!("{error:#}\n{}", daemon.running.log()))
}

/// Waits until the daemon has looked twice more: once may have been under way already.
fn await_looks(node: &Node, daemon: &Daemon) {
    let from = status(node, daemon)["daemon"]["cycle"].as_u64().unwrap();
    wait_until(Duration::from_secs(40), "two more looks", || {
        (status(node, daemon)["daemon"]["cycle"].as_u64()? >= from + 2).then_some(())
    })
    .unwrap();
}

/// The lab's policy for a mesh that is no WireGuard, as in a plain lab: without a device to
/// read, the verdict would always be "unknown".
pub fn plain_policy(lab: &Lab) -> String {
    lab.plain_policy()
}

/// One command of nft; gives its pid once it has ended well.
fn nft(node: &Node, words: &[&str]) -> u32 {
    let mut running = node.spawn(&[&["nft"], words].concat()).unwrap();
    let pid = running.pid();
    let status = running.wait(LONG).unwrap();
    assert!(status.success(), "nft {words:?}: {}", running.log());
    pid
}

/// nft under a name of its own, which is what the kernel then says of it.
fn nft_called(lab: &Lab, name: &str) -> String {
    let program = ["/usr/sbin/nft", "/sbin/nft", "/usr/bin/nft"]
        .into_iter()
        .find(|path| Path::new(path).exists())
        .unwrap();
    let link = lab.dir.join(name);
    std::os::unix::fs::symlink(program, &link).unwrap();
    link.display().to_string()
}

fn public(port: u16) -> SocketAddr {
    SocketAddr::new(SPOKE_PUBLIC, port)
}

fn new_folder(lab: &Lab, name: &str, policy: &str) -> PathBuf {
    let folder = lab.dir.join(name);
    fs::create_dir_all(&folder).unwrap();
    fs::write(folder.join("policy.toml"), policy).unwrap();
    folder
}

/// User and system time of a process and of the children it has waited for.
pub fn cpu(pid: u32) -> Duration {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
    let ticks: u64 = fields[11..15].iter().map(|field| field.parse::<u64>().unwrap()).sum();
    // USER_HZ is 100 on every Linux that we run on.
    Duration::from_millis(ticks * 10)
}

/// What the process has for itself; pages of its program come and go with what else the machine does.
pub fn own_memory_kib(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with("RssAnon:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// A span of time that has to pass because something is measured over it.
pub fn over(span: Duration) {
    let end = Instant::now() + span;
    wait_until(span * 2, "the span is over", || (Instant::now() >= end).then_some(())).unwrap();
}

#[test]
fn daemon_repairs_twenty_flushes_and_names_who_did_each() {
    if lacking(&[Need::Lab, Need::Spokeguard]) {
        return;
    }
    let lab = Lab::plain();
    let _database = lab.spoke.listen("postgres", &["tcp/0.0.0.0:5432", "tcp/0.0.0.0:80"]).unwrap();
    assert_eq!(lab.internet.connect(public(5432), SHORT), Answer::Open, "open before");
    let daemon = lab.spoke.daemon(&lab.policy()).unwrap();
    assert_eq!(lab.internet.connect(public(5432), SHORT), Answer::Silent);
    let wanted = lab.spoke.ok(&TABLE).unwrap();
    for round in 0..20 {
        let events = Events::mark(&daemon);
        let pid = nft(&lab.spoke, &["flush", "ruleset"]);
        let event = events.wait(LONG, "the flush is repaired", |e| e["kind"] == "repaired");
        assert_eq!(event["code"], "firewall-missing", "round {round}");
        assert_eq!(
            (&event["by"]["process"], event["by"]["pid"].as_u64()),
            (&"nft".into(), Some(pid.into())),
            "{event}"
        );
        assert_eq!(
            lab.internet.connect(public(5432), Duration::from_millis(60)),
            Answer::Silent,
            "round {round}"
        );
        assert_eq!(lab.spoke.ok(&TABLE).unwrap(), wanted);
    }
    assert_eq!(lab.internet.connect(public(80), LONG), Answer::Open);
    await_looks(&lab.spoke, &daemon);
    let status = status(&lab.spoke, &daemon);
    assert_eq!(status["daemon"]["repairs"], 20);
    assert_eq!(findings(&status, "firewall-missing"), [] as [Value; 0]);
}

#[test]
fn daemon_undoes_every_kind_of_change_to_its_table() {
    if lacking(&[Need::Lab, Need::Spokeguard]) {
        return;
    }
    let lab = Lab::plain();
    let _database = lab.spoke.listen("postgres", &["tcp/[::]:5432"]).unwrap();
    let daemon = lab.spoke.daemon(&lab.policy()).unwrap();
    // Without the chain of a canary, which comes once at the start.
    let wanted = wait_until(LONG, "our table alone", || {
        lab.spoke.ok(&TABLE).ok().filter(|table| !table.contains("canary-"))
    })
    .unwrap();
    let handle = || {
        let listing = lab.spoke.ok(&["nft", "-a", "list", "chain", "inet", "spokeguard", "public"]).unwrap();
        listing.lines().rev().find_map(|line| line.split("# handle ").nth(1)).unwrap().trim().to_owned()
    };
    const LAST: &str = "delete rule inet spokeguard public handle";
    let changes: [(&str, &str, &str); 8] = [
        ("delete table inet spokeguard", "firewall-missing", "the table is deleted"),
        (LAST, "firewall-changed", "the last rule is deleted"),
        ("insert rule inet spokeguard input tcp dport 5432 accept", "firewall-changed", "a rule is inserted"),
        ("add rule inet spokeguard mesh accept", "firewall-changed", "a rule is added"),
        ("flush chain inet spokeguard input", "firewall-changed", "a chain is emptied"),
        ("add table inet spokeguard { flags dormant; }", "firewall-changed", "the table sleeps"),
        (
            "add chain inet spokeguard door { type filter hook input priority -300; policy accept; }",
            "firewall-changed",
            "a chain is added",
        ),
        ("flush table inet spokeguard", "firewall-changed", "everything is emptied"),
    ];
    for (change, code, what) in changes {
        let events = Events::mark(&daemon);
        let change = if change == LAST { format!("{LAST} {}", handle()) } else { change.to_owned() };
        let pid = nft(&lab.spoke, &[&change]);
        let event = events.wait(LONG, what, |e| e["kind"] == "repaired");
        assert_eq!(event["code"], code, "{what}: {event}");
        assert_eq!(
            (&event["by"]["process"], event["by"]["pid"].as_u64()),
            (&"nft".into(), Some(pid.into())),
            "{what}: {event}"
        );
        wait_until(LONG, what, || (lab.spoke.ok(&TABLE).ok()? == wanted).then_some(())).unwrap();
        for address in [SPOKE_PUBLIC, SPOKE_PUBLIC_V6] {
            assert_eq!(lab.internet.connect(SocketAddr::new(address, 5432), SHORT), Answer::Silent, "{what}");
        }
    }
    // Our own commits are not drift: after the last repair nothing more is said of the table.
    let events = Events::mark(&daemon);
    await_looks(&lab.spoke, &daemon);
    assert!(events.all().iter().all(|event| event["kind"] != "repaired"), "{:#?}", events.all());
}

#[test]
fn daemon_reports_other_tables_and_leaves_them_alone() {
    if lacking(&[Need::Lab, Need::Spokeguard]) {
        return;
    }
    let lab = Lab::plain();
    let _web = lab.spoke.web().unwrap();
    let _database = lab.spoke.listen("postgres", &["tcp/0.0.0.0:5432"]).unwrap();
    let daemon = lab.spoke.daemon(&lab.policy()).unwrap();
    let own = lab.spoke.ok(&TABLE).unwrap();
    assert_eq!(findings(&status(&lab.spoke, &daemon), "firewall-blocked"), [] as [Value; 0]);
    // What a start has to do is over.
    await_looks(&lab.spoke, &daemon);

    let events = Events::mark(&daemon);
    let begun = Instant::now();
    let culprit = nft(
        &lab.spoke,
        &["add table inet theirs { chain in { type filter hook input priority 10; tcp dport 80 drop; }; }"],
    );
    let blocked = |e: &Value| e["kind"] == "drift-appeared" && e["code"] == "firewall-blocked";
    let event = events.wait(LONG, "the drop of 80 is reported", blocked);
    let took = begun.elapsed();
    assert_eq!(
        (&event["by"]["process"], event["by"]["pid"].as_u64()),
        (&"nft".into(), Some(culprit.into())),
        "{event}"
    );
    assert!(event["subject"].as_str().unwrap().contains("80"), "{event}");
    assert!(took < AT_ONCE * lab::times("SPOKEGUARD_PATIENCE"), "{took:?}");

    // An innocent commit by somebody else doesn't move the blame.
    let innocent = nft_called(&lab, "innocent");
    lab.spoke.ok(&[&innocent, "add table inet harmless"]).unwrap();
    await_looks(&lab.spoke, &daemon);
    for finding in findings(&status(&lab.spoke, &daemon), "firewall-blocked") {
        assert_eq!(finding["by"]["pid"].as_u64(), Some(culprit.into()), "{finding}");
    }

    let events = Events::mark(&daemon);
    let begun = Instant::now();
    let publish = "add table ip nat2 { chain pre { type nat hook prerouting priority dstnat; tcp dport 8432 dnat to 198.51.100.7:5432; }; }";
    let publisher = lab.spoke.spawn(&[&innocent, publish]).unwrap();
    let culprit = publisher.pid();
    let event = events
        .wait(LONG, "the DNAT is reported", |e| e["kind"] == "drift-appeared" && e["code"] == "dnat-exposed");
    let took = begun.elapsed();
    assert_eq!(
        (&event["by"]["process"], event["by"]["pid"].as_u64()),
        (&"innocent".into(), Some(culprit.into())),
        "{event}"
    );
    assert!(took < AT_ONCE * lab::times("SPOKEGUARD_PATIENCE"), "{took:?}");
    assert_eq!(lab.internet.connect(public(8432), SHORT), Answer::Silent, "and strangers don't get in by it");

    let theirs = |what: &str| {
        lab.spoke
            .ok(&[
                "nft",
                "-a",
                "list",
                "table",
                what.split(' ').next().unwrap(),
                what.split(' ').nth(1).unwrap(),
            ])
            .unwrap()
    };
    let before: Vec<String> = ["inet theirs", "ip nat2", "inet harmless"].map(theirs).into();
    let flushed = Events::mark(&daemon);
    nft(&lab.spoke, &["delete table inet spokeguard"]);
    flushed.wait(LONG, "our table comes back", |e| e["kind"] == "repaired");
    assert_eq!(lab.spoke.ok(&TABLE).unwrap(), own);
    // Handles included: they were not even made anew.
    assert_eq!(["inet theirs", "ip nat2", "inet harmless"].map(theirs).to_vec(), before);

    let events = Events::mark(&daemon);
    nft(&lab.spoke, &["delete table inet theirs"]);
    events
        .wait(LONG, "80 is free again", |e| e["kind"] == "drift-cleared" && e["code"] == "firewall-blocked");
    assert_eq!(lab.internet.connect(public(80), LONG), Answer::Open);
}

/// As nft 1.0.6 does now and then, which writes the flags of a table from memory that it has freed.
const HALF_A_LISTING: &str = r#"#!/bin/sh
PATH=${PATH#*:}
case "$*" in *-j*list*)
    case "$(nft list table inet spokeguard 2>&1)" in *"flags dormant"*)
        printf '{"nftables": [{"table": {"family": "inet", "name": "spokeguard", "handle": 2, "flags": \n'
        exit;;
    esac;;
esac
exec nft "$@"
"#;

#[test]
fn a_table_that_sleeps_is_woken_also_where_nft_cannot_list_it() {
    if lacking(&[Need::Lab, Need::Spokeguard]) {
        return;
    }
    let lab = Lab::plain();
    let (folder, bin) = (new_folder(&lab, "sleeps", &lab.plain_policy()), lab.dir.join("bin"));
    fs::create_dir(&bin).unwrap();
    fs::write(bin.join("nft"), HALF_A_LISTING).unwrap();
    lab.spoke.ok(&["chmod", "0755", &bin.join("nft").display().to_string()]).unwrap();
    let path = format!("PATH={}:{}", bin.display(), std::env::var("PATH").unwrap());
    let daemon = lab.spoke.daemon_under(&["env", &path], &folder, &[]).unwrap();
    let wanted = lab.spoke.ok(&TABLE).unwrap();
    let events = Events::mark(&daemon);
    let pid = nft(&lab.spoke, &["add table inet spokeguard { flags dormant; }"]);
    let event = events.wait(LONG, "the table sleeps", |e| e["kind"] == "repaired");
    assert_eq!((&event["code"], event["by"]["pid"].as_u64()), (&"firewall-changed".into(), Some(pid.into())));
    wait_until(LONG, "it is awake and whole", || (lab.spoke.ok(&TABLE).ok()? == wanted).then_some(()))
        .unwrap();
    assert_eq!(lab.internet.connect(public(5432), SHORT), Answer::Silent);
}

/// What it asks from outside at its start is no part of what comes later costs, or of how long it takes.
fn first_audit(lab: &Lab, daemon: &lab::Daemon) {
    wait_until(3 * LONG, "the first audit", || {
        (!status(&lab.spoke, daemon)["daemon"]["audit"].is_null()).then_some(())
    })
    .unwrap();
}

#[test]
fn daemon_does_not_fight_for_ever() {
    if lacking(&[Need::Lab, Need::Spokeguard]) {
        return;
    }
    let lab = Lab::plain();
    let daemon = lab.spoke.daemon(&lab.policy()).unwrap();
    let wanted = lab.spoke.ok(&TABLE).unwrap();
    first_audit(&lab, &daemon);
    let enemy = nft_called(&lab, "enemy");
    for (change, code) in [
        ("delete table inet spokeguard", "firewall-missing"),
        ("insert rule inet spokeguard input counter", "firewall-changed"),
    ] {
        let script = format!("while :; do {enemy} {change} 2>/dev/null || :; done");
        let mut fight = lab.spoke.spawn(&["sh", "-c", &script]).unwrap();
        let mut between = 0;
        let limit = lab::times("SPOKEGUARD_PATIENCE") * Duration::from_secs(60);
        let told = wait_until(limit, "the fight is told", || {
            let events = Events::mark(&daemon);
            let status = status(&lab.spoke, &daemon);
            between = between.max(events.all().len());
            let undone = findings(&status, code)
                .into_iter()
                .find(|f| f["found"].as_str().is_some_and(|t| t.contains("keeps undoing our repair")));
            // On an emulated processor nft may list for longer than the enemy needs to add a rule.
            let slow = lab::times("SPOKEGUARD_PATIENCE") > 1 && code == "firewall-changed";
            let unseen = findings(&status, "control-unproven").into_iter().find(|f| {
                f["subject"] == "control firewall"
                    && f["next"].as_str().unwrap().contains("faster than nft can list")
            });
            undone.or(unseen.filter(|_| slow))
        })
        .unwrap_or_else(|error| panic!("{error:#}\n{}", daemon.running.log()));
        // Whoever asks does not wait for the end of the fight.
        assert!(between < 40, "{between} events until status was answered");
        // Our own commits are between theirs, and are not blamed.
        assert_eq!(told["by"]["process"], "enemy", "{told}");
        let named = told["found"].as_str().unwrap().contains("enemy (pid ");
        assert!(named || told["code"] == "control-unproven", "{told}");
        let (before, begun) = (cpu(daemon.running.pid()), Instant::now());
        over(Duration::from_secs(3));
        let share = (cpu(daemon.running.pid()) - before).as_secs_f64() / begun.elapsed().as_secs_f64();
        eprintln!("{code}: {share:.3} of a core in a fight");
        assert!(share < 0.25, "{share} of a core in a fight");
        fight.signal(Signal::KILL).unwrap();
        fight.wait(LONG).unwrap();
        wait_until(LONG, "the declared state", || (lab.spoke.ok(&TABLE).ok()? == wanted).then_some(()))
            .unwrap();
        await_finding(&lab.spoke, &daemon, code, false, LONG);
    }
    let body = lab.hub.http_get(SocketAddr::new(SPOKE_MESH, 9984), "/metrics", &[]).unwrap().body;
    assert!(
        crate::metrics::sum(&body, "repairs_total", &[("action", "apply-table"), ("outcome", "withheld")])
            >= 1.0,
        "{body}"
    );
}

#[test]
fn daemon_keeps_the_keepalive_and_never_makes_a_peer() {
    if lacking(&[Need::Lab, Need::WireGuard, Need::Spokeguard]) {
        return;
    }
    let lab = Lab::new();
    let hub = lab.keys.hub.public.clone();
    let keepalive = || lab.spoke.ok(&["wg", "show", "wg0", "persistent-keepalive"]).unwrap();
    let off = || lab.spoke.ok(&["wg", "set", "wg0", "peer", &hub, "persistent-keepalive", "0"]).unwrap();

    let mut audit = lab.spoke.daemon(&(lab.policy() + "[enforce]\nmode = \"audit\"\n")).unwrap();
    off();
    await_finding(&lab.spoke, &audit, "mesh-keepalive", true, LONG);
    await_looks(&lab.spoke, &audit);
    assert!(keepalive().trim_end().ends_with("off"), "audit mode changes nothing: {}", keepalive());
    audit.running.stop().unwrap();

    let daemon = lab.spoke.daemon(&lab.policy()).unwrap();
    wait_until(LONG, "the keepalive is set at the start", || {
        keepalive().trim_end().ends_with("\t25").then_some(())
    })
    .unwrap();
    let (events, begun) = (Events::mark(&daemon), Instant::now());
    off();
    wait_until(LONG, "the keepalive is back", || keepalive().trim_end().ends_with("\t25").then_some(()))
        .unwrap();
    assert!(begun.elapsed() < Duration::from_secs(15), "{:?}", begun.elapsed());
    events.wait(LONG, "and it is told", |e| e["kind"] == "repaired" && e["code"] == "mesh-keepalive");

    lab.spoke.ok(&["wg", "set", "wg0", "peer", &hub, "remove"]).unwrap();
    let told = await_finding(&lab.spoke, &daemon, "mesh-peer", true, LONG);
    assert!(!told.is_empty());
    await_looks(&lab.spoke, &daemon);
    assert_eq!(
        lab.spoke.ok(&["wg", "show", "wg0", "peers"]).unwrap(),
        "",
        "a peer is for the operator to make"
    );
}

#[test]
fn daemon_tells_of_a_new_listener_at_once() {
    if lacking(&[Need::Lab, Need::Spokeguard]) {
        return;
    }
    let lab = Lab::plain();
    let daemon = lab.spoke.daemon(&(lab.policy() + UNGUARDED)).unwrap();
    // An emulated processor has none to spare for that at once, as long as it audits.
    if lab::times("SPOKEGUARD_PATIENCE") > 1 {
        first_audit(&lab, &daemon);
    }
    for (what, subject) in [("tcp/0.0.0.0:6379", "tcp/0.0.0.0:6379"), ("tcp/[::]:6380", "tcp/[::]:6380")] {
        let events = Events::mark(&daemon);
        let redis = lab.spoke.listen("redis", &[what]).unwrap();
        let begun = Instant::now();
        let event = events
            .wait(LONG, "the listener is told", |e| e["kind"] == "drift-appeared" && e["subject"] == subject);
        let took = begun.elapsed();
        assert_eq!(
            (&event["by"]["process"], event["by"]["pid"].as_u64()),
            (&"redis".into(), Some(redis.running.pid().into())),
            "{event}"
        );
        assert_eq!(event["code"], "listener-wide", "the firewall holds: {event}");
        assert!(took < AT_ONCE * lab::times("SPOKEGUARD_PATIENCE"), "{took:?}");
        let events = Events::mark(&daemon);
        drop(redis);
        events.wait(LONG, "its end is told", |e| e["kind"] == "drift-cleared" && e["subject"] == subject);
    }
    // What listens where it may is not worth a word.
    let events = Events::mark(&daemon);
    let _quiet = lab.spoke.listen("quiet", &["tcp/127.0.0.1:6379", "tcp/0.0.0.0:443"]).unwrap();
    let _loud = lab.spoke.listen("loud", &["tcp/0.0.0.0:6381"]).unwrap();
    events.wait(LONG, "the loud one is told", |e| e["by"]["process"] == "loud");
    assert!(events.all().iter().all(|event| event["by"]["process"] != "quiet"), "{:#?}", events.all());
}

/// The spoke's end of a wire of the lab, made once more under the same names.
fn rewire(lab: &Lab, interface: &str, node: &Node, far: &str, near: &[&str], far_addresses: &[&str]) {
    lab.spoke.ok(&["ip", "link", "del", interface]).unwrap();
    lab.spoke
        .sh(&format!("ip link add {interface} type veth peer name {far} netns {}", netns_pid(node)))
        .unwrap();
    node.sh(&format!("{} ip link set {far} up", add_addresses(far, far_addresses))).unwrap();
    lab.spoke.sh(&format!("{} ip link set {interface} up", add_addresses(interface, near))).unwrap();
}

fn netns_pid(node: &Node) -> String {
    node.net_path()
}

fn add_addresses(interface: &str, addresses: &[&str]) -> String {
    addresses.iter().map(|address| format!("ip addr add {address} dev {interface}; ")).collect()
}

#[test]
fn daemon_follows_interfaces_that_are_made_anew() {
    if lacking(&[Need::Lab, Need::Spokeguard]) {
        return;
    }
    let lab = Lab::plain();
    let _web = lab.spoke.web().unwrap();
    let _database = lab.spoke.listen("postgres", &["tcp/[::]:5432"]).unwrap();
    let daemon = lab.spoke.daemon(&lab.policy()).unwrap();
    let metrics = SocketAddr::new(SPOKE_MESH, 9984);
    let scrape = || lab.hub.http_get(metrics, "/metrics", &[]).ok().filter(|answer| answer.status == 200);
    assert!(scrape().is_some());

    rewire(&lab, "wg0", &lab.hub, "wg0", &["10.84.0.16/24", "fd84::16/64"], &["10.84.0.1/24", "fd84::1/64"]);
    let begun = Instant::now();
    wait_until(LONG, "metrics on the new wg0", || scrape().map(drop)).unwrap();
    assert!(begun.elapsed() < Duration::from_secs(2), "{:?}", begun.elapsed());
    for address in [SPOKE_MESH, SPOKE_MESH_V6] {
        assert_eq!(
            lab.hub.connect(SocketAddr::new(address, 5432), SHORT),
            Answer::Silent,
            "the mesh's rules hold on the new wg0"
        );
    }

    rewire(
        &lab,
        "eth0",
        &lab.internet,
        "spoke0",
        &["198.51.100.7/24", "2001:db8:1::7/64"],
        &["198.51.100.99/24", "2001:db8:1::99/64"],
    );
    for address in [SPOKE_PUBLIC, SPOKE_PUBLIC_V6] {
        let web = SocketAddr::new(address, 80);
        wait_until(LONG, "the new eth0 carries", || {
            (lab.internet.connect(web, SHORT) == Answer::Open).then_some(())
        })
        .unwrap();
        assert_eq!(lab.internet.connect(SocketAddr::new(address, 5432), SHORT), Answer::Silent);
    }
    // And counted again: each scope's packets grow with traffic on it.
    for (from, to, scope) in [(&lab.internet, SPOKE_PUBLIC, "public"), (&lab.hub, SPOKE_MESH, "mesh")] {
        let counted = || {
            scrape().map_or(0.0, |a| {
                crate::metrics::sum(
                    &a.body,
                    "packets_total",
                    &[("scope", scope), ("direction", "in"), ("proto", "udp")],
                )
            })
        };
        let before = counted();
        wait_until(LONG, &format!("counters on the new {scope} interface"), || {
            from.flood_udp(SocketAddr::new(to, 4000), 5).unwrap();
            (counted() > before).then_some(())
        })
        .unwrap();
    }
    let status = status(&lab.spoke, &daemon);
    for code in ["mesh-missing", "mesh-address", "firewall-changed"] {
        assert_eq!(findings(&status, code), [] as [Value; 0]);
    }
}

#[test]
fn daemon_works_before_the_mesh_does() {
    if lacking(&[Need::Lab, Need::Spokeguard]) {
        return;
    }
    let lab = Lab::plain();
    let _database = lab.spoke.listen("postgres", &["tcp/0.0.0.0:5432"]).unwrap();
    lab.spoke.ok(&["ip", "link", "del", "wg0"]).unwrap();
    let daemon = lab.spoke.daemon(&lab.policy()).unwrap();
    assert_eq!(lab.internet.connect(public(5432), SHORT), Answer::Silent, "enforced without a mesh");
    assert!(!findings(&status(&lab.spoke, &daemon), "mesh-missing").is_empty());
    for round in ["at last", "again"] {
        lab.spoke.sh(&format!("ip link add wg0 type veth peer name wg0 netns {}; ip addr add 10.84.0.16/24 dev wg0; ip link set wg0 up", lab.hub.net_path())).unwrap();
        lab.hub.sh("ip addr add 10.84.0.1/24 dev wg0; ip link set wg0 up").unwrap();
        let begun = Instant::now();
        wait_until(LONG, round, || {
            let answer = lab.hub.http_get(SocketAddr::new(SPOKE_MESH, 9984), "/metrics", &[]).ok()?;
            (answer.status == 200).then_some(())
        })
        .unwrap();
        assert!(begun.elapsed() <= Duration::from_secs(2), "{round}: {:?}", begun.elapsed());
        await_finding(&lab.spoke, &daemon, "mesh-missing", false, LONG);
        assert_eq!(lab.hub.connect(SocketAddr::new(SPOKE_MESH, 5432), SHORT), Answer::Silent);
        lab.spoke.ok(&["ip", "link", "del", "wg0"]).unwrap();
    }
}

#[test]
fn daemon_killed_at_any_moment_leaves_no_gap() {
    if lacking(&[Need::Lab, Need::Spokeguard]) {
        return;
    }
    let lab = Lab::plain();
    let _database = lab.spoke.listen("postgres", &["tcp/0.0.0.0:5432"]).unwrap();
    let mut daemon = lab.spoke.daemon(&lab.policy()).unwrap();
    let folder = daemon.folder().to_path_buf();
    let wanted = lab.spoke.ok(&TABLE).unwrap();
    daemon.kill_9().unwrap();
    let program = lab::spokeguard().unwrap().display().to_string();
    let run: Vec<String> = [program, "run".into()].into_iter().chain(daemon.flags.clone()).collect();
    let (stop, open, asked) = (AtomicBool::new(false), AtomicU32::new(0), AtomicU32::new(0));
    struct Stop<'a>(&'a AtomicBool);
    impl Drop for Stop<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }
    std::thread::scope(|scope| {
        // Also when an assertion fails: the scope waits for the thread.
        let _stop = Stop(&stop);
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                let answer = lab.internet.connect(public(5432), Duration::from_millis(20));
                open.fetch_add(u32::from(answer == Answer::Open), Ordering::Relaxed);
                asked.fetch_add(1, Ordering::Relaxed);
            }
        });
        // Changes that open nothing, each of which is repaired by flushing and adding anew.
        let enemy = "while :; do nft add rule inet spokeguard public counter; nft insert rule inet spokeguard mesh counter; done";
        let enemy = lab.spoke.spawn(&["sh", "-c", enemy]).unwrap();
        for round in 0..30u64 {
            let running = lab.spoke.spawn(&run).unwrap();
            // From before its first look to some seconds into the fight.
            over(Duration::from_millis(3 + round * round * 2));
            running.signal(Signal::KILL).unwrap();
            drop(running);
            // Where rules change faster than nft lists them, it lists them for ever.
            enemy.signal(Signal::STOP).unwrap();
            assert!(lab.spoke.ok(&TABLE).unwrap().contains("drop-public-tcp-ipv4"), "round {round}");
            enemy.signal(Signal::CONT).unwrap();
        }
    });
    assert!(asked.load(Ordering::Relaxed) > 100, "{asked:?}");
    assert_eq!(open.load(Ordering::Relaxed), 0, "of {asked:?} attempts");
    let _daemon = lab.spoke.daemon_in(&folder, &[]).unwrap();
    assert_eq!(lab.spoke.ok(&TABLE).unwrap(), wanted);
}

#[test]
fn daemon_is_the_only_one_says_what_it_knows_and_leaves_its_rules() {
    if lacking(&[Need::Lab, Need::Spokeguard]) {
        return;
    }
    let lab = Lab::plain();
    let _database = lab.spoke.listen("postgres", &["tcp/0.0.0.0:5432"]).unwrap();
    let folder = new_folder(&lab, "only", &plain_policy(&lab));
    let nobody =
        lab.spoke.spokeguard(&["status", "--run-dir", &folder.join("run").display().to_string()]).unwrap();
    assert_eq!(nobody.code, Some(2), "{}", nobody.all());
    assert!(
        nobody.stderr.contains("is `spokeguard run` running?") && nobody.stdout.is_empty(),
        "{}",
        nobody.all()
    );

    let mut daemon = lab.spoke.daemon_in(&folder, &[]).unwrap();
    // An apply of another policy would be undone at once, so it says so instead of "in force".
    let other = daemon.folder().join("other.toml");
    fs::write(&other, fs::read_to_string(&daemon.policy).unwrap().replace("[80, 443]", "[443]")).unwrap();
    let mut arguments = daemon.arguments(&["apply"]);
    let policy = daemon.policy.display().to_string();
    arguments.iter_mut().filter(|word| **word == policy).for_each(|word| *word = other.display().to_string());
    let before = lab.spoke.ok(&TABLE).unwrap();
    let applied = lab.spoke.spokeguard(&arguments).unwrap();
    assert_eq!(applied.code, Some(2), "{}", applied.all());
    assert!(applied.stderr.contains("enforces another policy"), "{}", applied.all());
    assert_eq!(lab.spoke.ok(&TABLE).unwrap(), before);
    let same = lab.spoke.spokeguard(&daemon.arguments(&["apply"])).unwrap();
    assert_eq!(same.code, Some(0), "{}", same.all());
    let second = lab.spoke.spokeguard(&daemon.arguments(&["run"])).unwrap();
    assert_eq!(second.code, Some(2), "{}", second.all());
    assert!(
        second.stderr.contains(&format!("another spokeguard daemon (pid {})", daemon.running.pid())),
        "{}",
        second.all()
    );
    assert!(!daemon.running.has_ended(), "the first one goes on");

    let text = lab.spoke.spokeguard(&daemon.arguments(&["status"])).unwrap();
    let json = lab.spoke.spokeguard(&daemon.arguments(&["status", "--format", "json"])).unwrap();
    assert_eq!((text.code, json.code), (Some(1), Some(1)), "drift: {}", text.all());
    for part in ["listener-wide", "tcp/0.0.0.0:5432", "postgres", &format!("Daemon {}", daemon.running.pid())]
    {
        assert!(text.stdout.contains(part), "{part} in {}", text.stdout);
    }
    let document = json.json().unwrap();
    assert_eq!(
        (&document["version"], &document["node"], &document["verdict"]),
        (&1.into(), &"singapore".into(), &"drift".into())
    );
    assert_eq!(document["daemon"]["pid"], daemon.running.pid());
    assert_eq!(lab.spoke.spokeguard(&daemon.arguments(&["status", "--quiet"])).unwrap().stdout, "");

    assert!(daemon.running.stop().unwrap().success(), "SIGTERM is an orderly end");
    assert_eq!(lab.internet.connect(public(5432), SHORT), Answer::Silent, "the rules stay");
    assert!(lab.spoke.ok(&TABLE).is_ok());
    let log = fs::read_to_string(daemon.state_dir.join("events.jsonl")).unwrap();
    let last: Value = serde_json::from_str(log.lines().last().unwrap()).unwrap();
    assert_eq!(last["kind"], "stopped");
    assert_eq!(
        lab.spoke.spokeguard(&daemon.arguments(&["status"])).unwrap().code,
        Some(2),
        "nobody answers now"
    );
}

#[test]
fn daemon_goes_on_without_a_place_to_write() {
    if lacking(&[Need::Lab, Need::Spokeguard]) {
        return;
    }
    let lab = Lab::plain();
    for (name, script) in [
        ("read-only", "mount -t tmpfs -o ro,size=64k none $0"),
        ("full", "mount -t tmpfs -o size=64k none $0; dd if=/dev/zero of=$0/ballast bs=1k 2>/dev/null || :"),
    ] {
        let folder = new_folder(&lab, name, &lab.policy());
        let state = folder.join("state");
        fs::create_dir_all(&state).unwrap();
        let script = format!("{script}; shift; exec \"$@\"").replace("$0", &state.display().to_string());
        let wrapper = ["unshare", "--mount", "sh", "-c", &script, "sh", "--"];
        let mut daemon = lab.spoke.daemon_under(&wrapper, &folder, &[]).unwrap();
        nft(&lab.spoke, &["delete table inet spokeguard"]);
        wait_until(LONG, name, || lab.spoke.ok(&TABLE).ok()).unwrap();
        let repairs = wait_until(LONG, "told in memory", || {
            let status = status(&lab.spoke, &daemon);
            let events = status["daemon"]["events"].as_array()?.clone();
            events.into_iter().find(|e| e["kind"] == "repaired" && e["by"]["process"] == "nft")
        });
        repairs.unwrap_or_else(|error| panic!("{name}: {error:#}\n{}", daemon.running.log()));
        assert!(daemon.running.log().contains("kept in memory"), "{name}: {}", daemon.running.log());
        assert!(!daemon.running.has_ended());
        daemon.running.stop().unwrap();
    }
}

#[test]
fn daemon_without_nft_says_so_and_puts_the_rules_in_force_when_it_comes_back() {
    if lacking(&[Need::Lab, Need::Spokeguard]) {
        return;
    }
    let lab = Lab::plain();
    let _database = lab.spoke.listen("postgres", &["tcp/0.0.0.0:5432"]).unwrap();
    let folder = new_folder(&lab, "no-nft", &(plain_policy(&lab) + UNGUARDED));
    let script =
        "for f in /usr/sbin/nft /sbin/nft; do mount --bind /dev/null $f 2>/dev/null || :; done; exec \"$@\"";
    let wrapper = ["unshare", "--mount", "sh", "-c", script, "sh"];
    let mut daemon = lab.spoke.daemon_under(&wrapper, &folder, &[]).unwrap();
    let told = status(&lab.spoke, &daemon);
    assert_eq!(told["verdict"], "unknown", "{told}");
    let unproven = findings(&told, "control-unproven");
    assert!(
        unproven
            .iter()
            .any(|f| f["subject"] == "control firewall"
                && f["found"].as_str().unwrap().contains("nft not found")),
        "{told}"
    );
    assert!(told["blind"].as_array().unwrap().iter().any(|b| b["facet"] == "nftables"), "{told}");
    assert_eq!(lab.spoke.spokeguard(&daemon.arguments(&["status"])).unwrap().code, Some(2));
    assert!(daemon.running.log().contains("the rules are NOT in force"), "{}", daemon.running.log());
    // The rest runs.
    let events = Events::mark(&daemon);
    let _redis = lab.spoke.listen("redis", &["tcp/0.0.0.0:6379"]).unwrap();
    events.wait(LONG, "listeners are still told", |e| {
        e["subject"] == "tcp/0.0.0.0:6379" && e["by"]["process"] == "redis"
    });
    let body = lab.hub.http_get(SocketAddr::new(SPOKE_MESH, 9984), "/metrics", &[]).unwrap().body;
    assert_eq!(crate::metrics::sum(&body, "control_enforced", &[("control", "firewall")]), 0.0);
    assert_eq!(crate::metrics::sum(&body, "blind", &[("facet", "nftables")]), 1.0);
    assert_eq!(crate::metrics::sum(&body, "verdict", &[]), 2.0);
    // What was never confirmed, and can't be tried, refuses nothing in the second layer either.
    assert_eq!(lab.internet.connect(public(5432), SHORT), Answer::Open);

    let pid = daemon.running.pid().to_string();
    lab.spoke.sh(&format!("nsenter --mount --target {pid} sh -c 'umount /usr/sbin/nft; umount /sbin/nft || :' 2>/dev/null || :")).unwrap();
    wait_until(LONG, "nft is back and the rules are in force", || lab.spoke.ok(&TABLE).ok())
        .unwrap_or_else(|error| panic!("{error:#}\n{}", daemon.running.log()));
    await_finding(&lab.spoke, &daemon, "control-unproven", false, LONG);

    // What was confirmed is in force in the second layer without nft: the daemon brings it in anew.
    assert_eq!(lab.spoke.spokeguard(&daemon.arguments(&["confirm"])).unwrap().code, Some(0));
    daemon.kill_9().unwrap();
    nft(&lab.spoke, &["flush ruleset"]);
    // Before Linux 6.6 it is tc that holds the program.
    lab.spoke
        .sh("rm -r /sys/fs/bpf/spokeguard/guard1; tc filter del dev eth0 ingress pref 8 2>/dev/null || :")
        .unwrap();
    wait_until(LONG, "both layers are gone", || {
        (lab.internet.connect(public(5432), SHORT) == Answer::Open).then_some(())
    })
    .unwrap();
    let _daemon = lab.spoke.daemon_under(&wrapper, &folder, &[]).unwrap();
    assert!(lab.spoke.ok(&TABLE).is_err(), "nft is away");
    assert_eq!(lab.internet.connect(public(5432), SHORT), Answer::Silent, "the second layer needs no nft");
}

#[test]
fn daemon_without_the_right_to_load_programs_says_so_and_does_the_rest() {
    if lacking(&[Need::Lab, Need::Spokeguard]) {
        return;
    }
    let lab = Lab::plain();
    let _database = lab.spoke.listen("postgres", &["tcp/0.0.0.0:5432"]).unwrap();
    let folder = new_folder(&lab, "no-bpf", &plain_policy(&lab));
    let wrapper =
        ["setpriv", "--bounding-set=-bpf,-sys_admin,-perfmon", "--inh-caps=-bpf,-sys_admin,-perfmon"];
    let daemon = lab.spoke.daemon_under(&wrapper, &folder, &[]).unwrap();
    // Our table is in force, but no packet can be sent to prove it.
    let told = wait_until(LONG, "a firewall that could not be tried", || {
        let told = status(&lab.spoke, &daemon);
        (findings(&told, "control-unproven").len() == 3).then_some(told)
    });
    let told = told.unwrap();
    let unproven = findings(&told, "control-unproven");
    let subjects: Vec<&str> = unproven.iter().map(|f| f["subject"].as_str().unwrap()).collect();
    assert_eq!(subjects, ["control counters", "control firewall", "control binds"], "{told}");
    assert!(unproven[1]["found"].as_str().unwrap().starts_with("could not be tried: "), "{told}");
    assert!(unproven.iter().all(|f| f["next"].as_str().unwrap().contains("CAP_BPF")), "{told}");
    assert_eq!(lab.spoke.spokeguard(&daemon.arguments(&["status"])).unwrap().code, Some(2), "{told}");
    assert_eq!(lab.internet.connect(public(5432), SHORT), Answer::Silent);
    let events = Events::mark(&daemon);
    nft(&lab.spoke, &["flush", "ruleset"]);
    events.wait(LONG, "repairs work", |e| e["kind"] == "repaired" && e["by"]["process"] == "nft");
    let body = lab.hub.http_get(SocketAddr::new(SPOKE_MESH, 9984), "/metrics", &[]).unwrap().body;
    assert_eq!(crate::metrics::sum(&body, "control_enforced", &[("control", "counters")]), 0.0);
    assert_eq!(crate::metrics::sum(&body, "control_enforced", &[("control", "firewall")]), 0.0);
    assert_eq!(crate::metrics::sum(&body, "control_enforced", &[("control", "repair")]), 1.0);
}

#[test]
fn daemons_of_two_namespaces_do_not_meet_with_the_default_places() {
    if lacking(&[Need::Lab, Need::Spokeguard]) {
        return;
    }
    let lab = Lab::plain();
    let policy = lab.dir.join("policy.toml");
    fs::write(&policy, lab.policy()).unwrap();
    let program = lab::spokeguard().unwrap().display().to_string();
    let words = |verb: &str| [program.clone(), verb.into(), "--policy".into(), policy.display().to_string()];
    let mut left = lab.spoke.spawn(&words("run")).unwrap();
    let mut right = lab.hub.spawn(&words("run")).unwrap();
    let pid = |node: &Node| -> Option<u64> {
        let json = [&words("status")[..], &["--format".into(), "json".into()]].concat();
        node.run(&json).ok()?.json().ok()?["daemon"]["pid"].as_u64()
    };
    for (node, running) in [(&lab.spoke, &left), (&lab.hub, &right)] {
        let seen = wait_until(LONG, "each answers", || pid(node))
            .unwrap_or_else(|e| panic!("{e:#}\n{}", running.log()));
        assert_eq!(seen, u64::from(running.pid()));
    }
    assert!(left.stop().unwrap().success());
    assert_eq!(pid(&lab.spoke), None);
    assert_eq!(pid(&lab.hub), Some(right.pid().into()), "one's end is not the other's");
    assert!(right.stop().unwrap().success());
}

#[test]
fn daemon_with_a_wrong_policy_changes_nothing() {
    if lacking(&[Need::Lab, Need::Spokeguard]) {
        return;
    }
    let lab = Lab::plain();
    let good = lab.policy();
    let wrong = [
        (good.replace("[public]", "[pubic]"), "pubic"),
        (good.replace("tcp = [80, 443]", "tcp = [80, 443, 99999]"), "99999"),
        (good.replace("version = 1", ""), "version"),
        ("".to_owned(), "version"),
    ];
    for (number, (policy, part)) in wrong.into_iter().enumerate() {
        let folder = new_folder(&lab, &format!("wrong{number}"), &policy);
        let run = |name: &str| folder.join(name).display().to_string();
        let outcome: Outcome = lab
            .spoke
            .spokeguard(&[
                "run",
                "--policy",
                &run("policy.toml"),
                "--state-dir",
                &run("state"),
                "--run-dir",
                &run("run"),
            ])
            .unwrap();
        assert_eq!(outcome.code, Some(2), "{}", outcome.all());
        assert!(
            outcome.stderr.contains("policy.toml") && outcome.stderr.contains(part),
            "{part}: {}",
            outcome.all()
        );
        assert_eq!(lab.spoke.ok(&["nft", "list", "ruleset"]).unwrap(), "", "nothing was applied");
        assert!(!folder.join("state").exists() && !folder.join("run").exists());
    }
    let missing = lab.spoke.spokeguard(&["run", "--policy", "/no/such/policy.toml"]).unwrap();
    assert_eq!(missing.code, Some(2));
    assert!(missing.stderr.contains("/no/such/policy.toml"), "{}", missing.all());
}

#[test]
fn daemon_tells_the_service_manager() {
    if lacking(&[Need::Lab, Need::Spokeguard]) {
        return;
    }
    // Of a machine that does other things, too.
    const WATCHDOG: Duration = Duration::from_secs(2);
    let lab = Lab::plain();
    let folder = new_folder(&lab, "notify", &plain_policy(&lab));
    let path = folder.join("manager");
    let socket = UnixDatagram::bind(&path).unwrap();
    socket.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
    let flag = |name: &str| folder.join(name).display().to_string();
    let program = lab::spokeguard().unwrap().display().to_string();
    let mut command = lab.spoke.command(&[
        &program,
        "run",
        "--policy",
        &flag("policy.toml"),
        "--state-dir",
        &flag("state"),
        "--run-dir",
        &flag("run"),
    ]);
    command.env("NOTIFY_SOCKET", &path).env("WATCHDOG_USEC", WATCHDOG.as_micros().to_string());
    let mut running = lab.spoke.start(command, "spokeguard run").unwrap();
    let mut said: Vec<(Instant, String)> = Vec::new();
    let hear = |what: &str, said: &mut Vec<(Instant, String)>, count: usize| {
        wait_until(LONG, what, || {
            let mut message = [0u8; 4096];
            while let Ok(length) = socket.recv(&mut message) {
                let text = String::from_utf8_lossy(&message[..length]).into_owned();
                said.extend(text.lines().map(|line| (Instant::now(), line.to_owned())));
            }
            (said.iter().filter(|(_, line)| line == what).count() >= count).then_some(())
        })
        .unwrap_or_else(|error| panic!("{error:#}: {said:?}\n{}", running.log()));
    };
    hear("READY=1", &mut said, 1);
    assert!(
        said.iter().any(|(_, line)| line.starts_with("STATUS=drift") || line.starts_with("STATUS=ok")),
        "{said:?}"
    );
    hear("WATCHDOG=1", &mut said, 8);
    let alive: Vec<Instant> =
        said.iter().filter(|(_, line)| line == "WATCHDOG=1").map(|(at, _)| *at).collect();
    assert!(alive.windows(2).all(|pair| pair[1] - pair[0] < WATCHDOG), "{said:?}");
    assert!(!said.iter().any(|(_, line)| line == "STOPPING=1"));
    running.signal(Signal::TERM).unwrap();
    hear("STOPPING=1", &mut said, 1);
    assert_eq!(said.iter().filter(|(_, line)| line == "READY=1").count(), 1, "{said:?}");
    assert!(running.wait(LONG).unwrap().success());
}

#[test]
fn daemon_remembers_since_when() {
    if lacking(&[Need::Lab, Need::Spokeguard]) {
        return;
    }
    let lab = Lab::plain();
    let _database = lab.spoke.listen("postgres", &["tcp/0.0.0.0:5432"]).unwrap();
    let mut daemon = lab.spoke.daemon(&lab.policy()).unwrap();
    let folder = daemon.folder().to_path_buf();
    let since = |daemon: &Daemon| {
        let found = findings(&status(&lab.spoke, daemon), "listener-wide");
        (found[0]["since"].as_str().expect("since").to_owned(), found.len())
    };
    let first = since(&daemon);
    let stamp = |daemon: &Daemon| status(&lab.spoke, daemon)["daemon"]["started"].clone();
    let started = stamp(&daemon);
    for kill in [true, false] {
        if kill {
            daemon.kill_9().unwrap()
        } else {
            assert!(daemon.running.stop().unwrap().success())
        }
        // Another second, so that a new beginning would show.
        over(Duration::from_millis(1100));
        daemon = lab.spoke.daemon_in(&folder, &[]).unwrap();
        assert_ne!(stamp(&daemon), started);
        assert_eq!(since(&daemon), first);
    }
    // Known drift does not appear once more.
    let log = fs::read_to_string(daemon.state_dir.join("events.jsonl")).unwrap();
    assert_eq!(
        log.lines().filter(|line| line.contains("drift-appeared") && line.contains(":5432")).count(),
        1,
        "{log}"
    );
    assert_eq!(log.lines().filter(|line| line.contains("\"started\"")).count(), 3, "{log}");
}

#[test]
fn daemon_bounds_its_event_log() {
    if lacking(&[Need::Lab, Need::Spokeguard]) {
        return;
    }
    let lab = Lab::plain();
    let folder = new_folder(&lab, "log", &lab.policy());
    let state = folder.join("state");
    fs::create_dir_all(&state).unwrap();
    // Almost full, with a torn end: the next events make it turn.
    let line = r#"{"at":"2026-01-01T00:00:00Z","kind":"started","subject":"singapore","found":"","cycle":0}"#;
    let old = format!("{line}\n").repeat(255 * 1024 / (line.len() + 1));
    fs::write(state.join("events.jsonl"), &old).unwrap();
    fs::set_permissions(state.join("events.jsonl"), fs::Permissions::from_mode(0o600)).unwrap();
    let daemon = lab.spoke.daemon_in(&folder, &[]).unwrap();
    for _ in 0..40 {
        let repairs = status(&lab.spoke, &daemon)["daemon"]["repairs"].as_u64().unwrap();
        nft(&lab.spoke, &["delete table inet spokeguard"]);
        wait_until(LONG, "a repair", || {
            (status(&lab.spoke, &daemon)["daemon"]["repairs"].as_u64()? > repairs).then_some(())
        })
        .unwrap();
    }
    let mut sizes = Vec::new();
    for entry in fs::read_dir(&state).unwrap().flatten() {
        let meta = entry.metadata().unwrap();
        assert_eq!(meta.permissions().mode() & 0o077, 0, "{:?}", entry.file_name());
        sizes.push((entry.file_name(), meta.len()));
    }
    assert!(sizes.iter().any(|(name, _)| name == "events.jsonl.1"), "it turned: {sizes:?}");
    // The log, its elder, what was first seen when, the confirmed policy, its rules and its tunnel.
    assert!(sizes.iter().all(|(_, size)| *size <= 256 * 1024) && sizes.len() <= 6, "{sizes:?}");
    let shown = status(&lab.spoke, &daemon)["daemon"]["events"].as_array().unwrap().len();
    assert_eq!(shown, 20);
}

#[test]
fn daemon_survives_ten_thousand_foreign_changes() {
    if lacking(&[Need::Lab, Need::Spokeguard]) {
        return;
    }
    let lab = Lab::plain();
    let _database = lab.spoke.listen("postgres", &["tcp/0.0.0.0:5432"]).unwrap();
    let daemon = lab.spoke.daemon(&lab.policy()).unwrap();
    let wanted = lab.spoke.ok(&TABLE).unwrap();
    let own = |event: &Value| event["kind"] == "repaired";
    let events = Events::mark(&daemon);
    // Half of it in transactions of ten, half in one.
    lab.spoke.sh("nft add table inet fw; nft 'add set inet fw blocked { type ipv4_addr; }'").unwrap();
    let mut script = String::from("set -e\n");
    for batch in 0..500 {
        let elements: Vec<String> =
            (0..10).map(|n| format!("10.1.{}.{}", batch / 25, (batch % 25) * 10 + n)).collect();
        script += &format!("nft add element inet fw blocked '{{ {} }}'\n", elements.join(", "));
    }
    lab.spoke.run_within(Duration::from_secs(120), &["sh", "-c", &script]).unwrap();
    let mut rules = String::from("add chain inet fw in { type filter hook input priority 5; }\n");
    for n in 0..5000 {
        rules += &format!("add rule inet fw in ip saddr 10.2.{}.{} counter drop\n", n / 250, n % 250);
    }
    rules += "add rule inet fw in tcp dport 443 drop\n";
    lab.spoke.nft(&rules).unwrap();
    let blocked = await_finding(&lab.spoke, &daemon, "firewall-blocked", true, Duration::from_secs(60));
    assert!(blocked.iter().all(|f| f["subject"].as_str().unwrap().contains("443")), "{blocked:?}");
    assert!(events.all().iter().all(|event| !own(event)), "{:#?}", events.all());
    assert_eq!(lab.spoke.ok(&TABLE).unwrap(), wanted);
    let pid = daemon.running.pid();
    // A last look may be under way; then it is quiet.
    wait_until(Duration::from_secs(60), "less than 5 % of a core over 3 s", || {
        let before = cpu(pid);
        over(Duration::from_secs(3));
        (cpu(pid) - before < Duration::from_millis(150)).then_some(())
    })
    .unwrap();
    // And it still watches.
    let events = Events::mark(&daemon);
    nft(&lab.spoke, &["delete table inet spokeguard"]);
    events.wait(LONG, "still repaired", own);
    assert_eq!(lab.internet.connect(public(5432), SHORT), Answer::Silent);
}

/// 500 looks and repairs, and no growth.
#[test]
fn daemon_does_not_grow() {
    if lacking(&[Need::Lab, Need::Spokeguard]) {
        return;
    }
    let lab = Lab::plain();
    let daemon = lab.spoke.daemon(&(lab.policy() + UNGUARDED)).unwrap();
    let pid = daemon.running.pid();
    let descriptors = || fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count();
    let scrape = || lab.hub.http_get(SocketAddr::new(SPOKE_MESH, 9984), "/metrics", &[]).unwrap();
    let rounds = |count: u32| {
        for round in 0..count {
            // Listeners wake it quickly and cheaply; a scrape and a change of links beside.
            let _listener = lab.spoke.listen_tcp(SPOKE_PUBLIC, 7000 + (round % 100) as u16).unwrap();
            scrape();
        }
    };
    rounds(100);
    let (memory, files) = (own_memory_kib(pid), descriptors());
    rounds(400);
    let cycles = status(&lab.spoke, &daemon)["daemon"]["cycle"].as_u64().unwrap();
    let (memory_now, files_now) = (own_memory_kib(pid), descriptors());
    eprintln!("{cycles} looks: {memory} -> {memory_now} KiB, {files} -> {files_now} descriptors");
    assert!(memory_now < memory + 1024, "{memory} -> {memory_now} KiB");
    assert!(files_now <= files + 3, "{files} -> {files_now} descriptors");
}
