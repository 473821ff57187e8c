//! Who did it: process, unit and whoever logged in, in findings, events and in words.

use std::fs;
use std::path::Path;

use lab::{Lab, Need, Node, Running, lacking};
use serde_json::Value;

use crate::daemon::{Events, LONG, UNGUARDED, findings, plain_policy, status};

/// In /etc/passwd of every Debian.
const NOBODY: &str = "65534";

/// As somebody who logged in, in a unit, with its control group given.
fn as_somebody(node: &Node, unit: &Path, script: &str) -> Running {
    let group = unit.join("cgroup.procs").display().to_string();
    let script = format!("echo $$ > {group}; echo {NOBODY} > /proc/self/loginuid; {script}");
    node.spawn(&["sh", "-c", &script]).unwrap()
}

fn who(by: &Value) -> [Option<&str>; 3] {
    ["process", "unit", "user"].map(|key| by[key].as_str())
}

#[test]
fn whoever_logged_in_is_named_with_what_he_started() {
    if lacking(&[Need::Lab, Need::Spokeguard, Need::Cgroup2]) {
        return;
    }
    if !Path::new("/proc/self/loginuid").exists() {
        return println!("skipped: this kernel has no audit, and so no login users");
    }
    let lab = Lab::plain();
    let spoke = &lab.spoke;
    let unit = spoke.cgroup.as_ref().unwrap().join("session-7.scope");
    fs::create_dir(&unit).unwrap();
    let daemon = spoke.daemon(&(plain_policy(&lab) + UNGUARDED)).unwrap();
    let events = Events::mark(&daemon);

    // A service, which nobody logged in for, and a listener of somebody's.
    let _service = spoke.listen("redis", &["tcp/0.0.0.0:6379"]).unwrap();
    let helper = lab::helper().unwrap().display().to_string();
    let crypto = as_somebody(spoke, &unit, &format!("exec {helper} listen miner tcp/0.0.0.0:3333"));
    let seen = |port: &'static str| move |e: &Value| e["subject"] == port && e["kind"] == "drift-appeared";
    let event = events.wait(LONG, "the listener", seen("tcp/0.0.0.0:3333"));
    assert_eq!(event["by"]["pid"].as_u64(), Some(crypto.pid().into()), "{event}");
    assert_eq!(who(&event["by"]), [Some("miner"), Some("session-7.scope"), Some("nobody")]);
    let event = events.wait(LONG, "the service", seen("tcp/0.0.0.0:6379"));
    assert!(who(&event["by"])[0] == Some("redis") && event["by"].get("user").is_none(), "{event}");
    let look = status(spoke, &daemon);
    let mut found = findings(&look, "listener-wide").into_iter().chain(findings(&look, "listener-exposed"));
    let found = found.find(|f| f["subject"] == "tcp/0.0.0.0:3333").expect("a finding");
    assert_eq!(who(&found["by"]), [Some("miner"), Some("session-7.scope"), Some("nobody")]);
    let told = spoke.spokeguard(&daemon.arguments(&["status"])).unwrap().stdout;
    let told = told.split_whitespace().collect::<Vec<_>>().join(" ");
    assert!(told.contains("session-7.scope, login nobody)"), "{told}");

    // Whoever changes the rules, and stays a while.
    let events = Events::mark(&daemon);
    let _nft = as_somebody(spoke, &unit, "(echo delete table inet spokeguard; exec sleep 20) | nft -i");
    let event = events.wait(LONG, "the repair", |e| e["kind"] == "repaired");
    assert_eq!(who(&event["by"]), [Some("nft"), Some("session-7.scope"), Some("nobody")], "{event}");
    let tail = fs::read_to_string(daemon.state_dir.join("events.jsonl")).unwrap();
    assert!(tail.contains("\"user\":\"nobody\""), "{tail}");
}
