//! Commit-confirm: what confirms a change, what does not, and what comes back.

use std::fs;
use std::io::Write;
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

use lab::{Answer, Daemon, HUB_MESH, Lab, Need, Node, SPOKE_MESH, SPOKE_PUBLIC, Signal, lacking, wait_until};
use serde_json::Value;

use crate::daemon::{Events, LONG, findings, over, plain_policy, status};
use crate::enforce::Guard;
use crate::killed::without_canary;

const SHORT: Duration = Duration::from_millis(250);
const TABLE: [&str; 6] = ["nft", "-s", "list", "table", "inet", "spokeguard"];

fn table(node: &Node) -> String {
    node.run(&TABLE).unwrap().stdout
}

/// A policy of the lab with these public ports and this much time to confirm.
fn policy(lab: &Lab, ports: &str, within: &str) -> String {
    plain_policy(lab).replace("[80, 443]", ports) + &format!("[enforce]\nconfirm_within = \"{within}\"\n")
}

fn folder(lab: &Lab, name: &str, policy: &str) -> std::path::PathBuf {
    let folder = lab.dir.join(name);
    fs::create_dir_all(&folder).unwrap();
    write(&folder, policy);
    folder
}

/// As editors and package managers do.
fn write(folder: &Path, policy: &str) {
    fs::write(folder.join("policy.new"), policy).unwrap();
    fs::rename(folder.join("policy.new"), folder.join("policy.toml")).unwrap();
}

fn rules(node: &Node, daemon: &Daemon) -> String {
    status(node, daemon)["daemon"]["rules"].as_str().unwrap_or_default().to_owned()
}

#[track_caller]
fn await_rules(node: &Node, daemon: &Daemon, wanted: &str) {
    wait_until(LONG, wanted, || (rules(node, daemon) == wanted).then_some(()))
        .unwrap_or_else(|error| panic!("{error:#}\n{}", daemon.running.log()));
}

/// Waits for a finding of this code, or until there is none.
#[track_caller]
fn await_finding(node: &Node, daemon: &Daemon, code: &str, there: bool) -> Option<Value> {
    wait_until(LONG, &format!("{code}: {there}"), || {
        let found = findings(&status(node, daemon), code).pop();
        (found.is_some() == there).then_some(found)
    })
    .unwrap_or_else(|error| panic!("{error:#}\n{}", daemon.running.log()))
}

fn public(lab: &Lab, port: u16) -> Answer {
    lab.internet.connect(SocketAddr::new(SPOKE_PUBLIC, port), SHORT)
}

/// A connection from an address of choice, kept open.
fn connect_from(node: &Node, from: &str, to: SocketAddr) -> anyhow::Result<TcpStream> {
    let from: IpAddr = from.parse().unwrap();
    node.inside(|| {
        use rustix::net::{AddressFamily, SocketType};
        let socket = rustix::net::socket(AddressFamily::INET, SocketType::STREAM, None)?;
        rustix::net::bind(&socket, &SocketAddr::new(from, 0))?;
        rustix::net::sockopt::set_socket_timeout(
            &socket,
            rustix::net::sockopt::Timeout::Send,
            Some(Duration::from_secs(5)),
        )?;
        rustix::net::connect(&socket, &to)?;
        Ok(TcpStream::from(socket))
    })
}

/// In sshd's place; takes connections and never ends one.
fn listen(node: &Node) -> TcpListener {
    node.inside(|| Ok(TcpListener::bind((SPOKE_MESH, 22))?)).unwrap()
}

#[test]
fn a_new_connection_of_the_hub_through_the_tunnel_confirms_and_no_other_does() {
    if lacking(&[Need::Lab, Need::Spokeguard, Need::WireGuard]) {
        return;
    }
    let lab = Lab::new();
    let sshd = SocketAddr::new(SPOKE_MESH, 22);
    let _web = lab.spoke.listen("web", &["tcp/0.0.0.0:80"]).unwrap();
    let _sshd = listen(&lab.spoke);
    // A second machine of the mesh that may reach sshd, too; behind the hub, as all of them are.
    lab.hub.sh("ip address add 10.84.0.9/32 dev wg0").unwrap();
    let base = lab.policy().replace("from = \"hub\"", "from = \"mesh\"");
    let with = |ports: &str, within: &str| {
        base.replace("[80, 443]", ports) + &format!("[enforce]\nconfirm_within = \"{within}\"\n")
    };
    let mut before = connect_from(&lab.hub, "10.84.0.1", sshd).unwrap();
    let folder = folder(&lab, "evidence", &with("[80, 443]", "60s"));
    let daemon = lab.spoke.daemon_on_trial(&[], &folder, &[]).unwrap();
    let events = Events::mark(&daemon);
    assert_eq!(rules(&lab.spoke, &daemon), "on-trial");
    assert!(!daemon.state_dir.join("sealed.nft").exists());
    let listed = lab.spoke.spokeguard(&daemon.arguments(&["status"])).unwrap().stdout;
    assert!(listed.contains("is on trial: unless confirmed it is rolled back at"), "{listed}");

    // What was there before the change goes on, a stranger comes, another machine of the mesh comes.
    before.write_all(b"still here").unwrap();
    assert_eq!(public(&lab, 80), Answer::Open);
    assert_eq!(public(&lab, 22), Answer::Silent);
    let other = connect_from(&lab.hub, "10.84.0.9", sshd).unwrap();
    let began = std::time::Instant::now();
    wait_until(LONG, "ten looks", || {
        assert_eq!(rules(&lab.spoke, &daemon), "on-trial", "{}", daemon.running.log());
        (began.elapsed() > Duration::from_millis(1500)).then_some(())
    })
    .unwrap();
    drop(other);

    // The hub: a handshake, and gone again.
    let hub = connect_from(&lab.hub, "10.84.0.1", sshd).unwrap();
    await_rules(&lab.spoke, &daemon, "confirmed");
    drop(hub);
    events.wait(LONG, "told", |event| event["kind"] == "policy-confirmed");
    let sealed = daemon.state_dir.join("sealed.nft");
    assert_eq!(fs::metadata(&sealed).unwrap().permissions().mode() & 0o777, 0o600);
    assert!(lab.spoke.spokeguard(&daemon.arguments(&["confirm"])).unwrap().stdout.contains("nothing waits"));

    // The policy file changes; the hub's next scrape confirms it, though it is over in milliseconds.
    let first = fs::read_to_string(&sealed).unwrap();
    write(&folder, &with("[443]", "60s"));
    await_rules(&lab.spoke, &daemon, "on-trial");
    assert_eq!(public(&lab, 80), Answer::Silent);
    let scrape = lab.hub.http_get(SocketAddr::new(SPOKE_MESH, 9984), "/metrics", &[]).unwrap();
    assert_eq!(scrape.status, 200);
    await_rules(&lab.spoke, &daemon, "confirmed");
    wait_until(LONG, "sealed anew", || (fs::read_to_string(&sealed).unwrap() != first).then_some(()))
        .unwrap();

    // `apply --wait` looks for itself: the daemon was killed.
    let mut daemon = daemon;
    daemon.kill_9().unwrap();
    write(&folder, &with("[80]", "60s"));
    let program = lab::spokeguard().unwrap().display().to_string();
    let words: Vec<String> = [program].into_iter().chain(daemon.arguments(&["apply", "--wait"])).collect();
    let mut cli = lab.spoke.spawn(&words).unwrap();
    cli.wait_for("a new connection of the hub through wg0", LONG).unwrap();
    let other = connect_from(&lab.hub, "10.84.0.9", sshd).unwrap();
    before.write_all(b"still here").unwrap();
    over(Duration::from_millis(500));
    assert!(!cli.has_ended(), "{}", cli.log());
    drop(other);
    let _hub = connect_from(&lab.hub, "10.84.0.1", sshd).unwrap();
    assert_eq!(cli.wait(LONG).unwrap().code(), Some(0), "{}", cli.log());
    assert!(cli.log().contains(&format!("{HUB_MESH} reached port 22")), "{}", cli.log());
}

#[test]
fn an_unconfirmed_change_goes_back_and_the_daemon_does_not_fight_it() {
    if lacking(&[Need::Lab, Need::Spokeguard]) {
        return;
    }
    let lab = Lab::plain();
    let _ssh = listen(&lab.spoke);
    let folder = folder(&lab, "back", &policy(&lab, "[80, 443]", "60s"));
    let mut daemon = lab.spoke.daemon_in(&folder, &[]).unwrap();
    await_rules(&lab.spoke, &daemon, "confirmed");
    let confirmed = table(&lab.spoke);
    let hash = |daemon: &Daemon| status(&lab.spoke, daemon)["daemon"]["policy"].clone();
    let first = hash(&daemon);
    let mut before = connect_from(&lab.hub, "10.84.0.1", SocketAddr::new(SPOKE_MESH, 22)).unwrap();

    // Two changes in one window, and an old connection that goes on.
    let events = Events::mark(&daemon);
    write(&folder, &policy(&lab, "[80]", "9s"));
    await_rules(&lab.spoke, &daemon, "on-trial");
    write(&folder, &policy(&lab, "[80, 5432]", "5s"));
    wait_until(LONG, "the second", || (public(&lab, 5432) == Answer::Refused).then_some(())).unwrap();
    before.write_all(b"still here").unwrap();
    // Meanwhile the rules on trial are those that are kept.
    let on_trial = table(&lab.spoke);
    lab.spoke.nft("delete table inet spokeguard").unwrap();
    wait_until(LONG, "repaired", || (table(&lab.spoke) == on_trial).then_some(())).unwrap();
    assert_ne!(on_trial, confirmed);
    await_rules(&lab.spoke, &daemon, "rolled-back");
    wait_until(LONG, "those confirmed before", || (table(&lab.spoke) == confirmed).then_some(())).unwrap();
    events.wait(LONG, "told", |event| event["kind"] == "policy-rolled-back");
    let repairs = events.all().iter().filter(|event| event["kind"] == "repaired").count();
    assert_eq!(repairs, 1, "it fought the way back: {:?}", events.all());
    let finding = await_finding(&lab.spoke, &daemon, "policy-rolled-back", true).unwrap();
    assert_eq!(finding["severity"], "high");
    assert_eq!(hash(&daemon), first);
    // It stays so: repaired, looked at, and after a restart, which tries the refused policy no more.
    lab.spoke.nft("delete table inet spokeguard").unwrap();
    wait_until(LONG, "repaired", || (table(&lab.spoke) == confirmed).then_some(())).unwrap();
    daemon.running.signal(Signal::HUP).unwrap();
    daemon.running.wait_for("`spokeguard apply` tries it again", LONG).unwrap();
    daemon.kill_9().unwrap();
    let mut daemon = lab.spoke.daemon_on_trial(&[], &folder, &[]).unwrap();
    assert_eq!(rules(&lab.spoke, &daemon), "rolled-back");
    assert_eq!(table(&lab.spoke), confirmed);
    let check = lab.spoke.spokeguard(&daemon.arguments(&["check"])).unwrap();
    assert!(check.stdout.contains("policy-rolled-back"), "{}", check.all());
    assert_eq!(public(&lab, 5432), Answer::Silent);

    // An operator who insists, and the hub that comes.
    let events = Events::mark(&daemon);
    let applied = lab.spoke.spokeguard(&daemon.arguments(&["apply", "--confirm-within", "60s"])).unwrap();
    assert_eq!(applied.code, Some(0), "{}", applied.all());
    assert!(applied.stdout.contains("a new connection of the hub"), "{}", applied.all());
    wait_until(LONG, "followed", || (hash(&daemon) != first).then_some(())).unwrap();
    await_rules(&lab.spoke, &daemon, "on-trial");
    assert_eq!(table(&lab.spoke), on_trial);
    assert!(!events.all().iter().any(|event| event["kind"] == "repaired"), "it fought: {:?}", events.all());
    let _hub = connect_from(&lab.hub, "10.84.0.1", SocketAddr::new(SPOKE_MESH, 22)).unwrap();
    await_rules(&lab.spoke, &daemon, "confirmed");
    await_finding(&lab.spoke, &daemon, "policy-rolled-back", false);
    // The same policy again arms nothing.
    daemon.running.stop().unwrap();
    let daemon = lab.spoke.daemon_on_trial(&[], &folder, &[]).unwrap();
    assert_eq!(rules(&lab.spoke, &daemon), "confirmed");
    assert_eq!(fs::read_dir(daemon.run_dir.join("rollback")).unwrap().count(), 1, "its lock only");
}

#[test]
fn what_was_never_confirmed_goes_away_though_everything_of_ours_is_killed() {
    if lacking(&[Need::Lab, Need::Spokeguard]) {
        return;
    }
    let lab = Lab::plain();
    let nothing = || (lab.spoke.ok(&["nft", "list", "tables"]).unwrap().trim().is_empty()).then_some(());
    let folder = folder(&lab, "first", &policy(&lab, "[80]", "3s"));
    let killed = || {
        let program = lab::spokeguard().unwrap().display().to_string();
        let guard = Guard { node: &lab.spoke, dir: folder.clone() };
        let words: Vec<String> = [program, "run".into()].into_iter().chain(guard.flags()).collect();
        let mut daemon = lab.spoke.spawn(&words).unwrap();
        daemon.wait_for("policy-on-trial", LONG).unwrap();
        assert_eq!(public(&lab, 22), Answer::Silent);
        // The second layer refuses TCP ahead of the rules and leaves them nothing to count.
        assert_eq!(lab.internet.ask_udp(SocketAddr::new(SPOKE_PUBLIC, 5353), SHORT).unwrap(), None);
        daemon.signal(Signal::KILL).unwrap();
        daemon.wait(LONG).unwrap();
    };
    killed();
    wait_until(LONG, "nothing of ours", nothing).unwrap();
    // The next start, and one after a boot, which empties the run directory.
    for boot in [false, true] {
        if boot {
            fs::remove_dir_all(folder.join("run")).unwrap();
        }
        let mut daemon = lab.spoke.daemon_on_trial(&[], &folder, &[]).unwrap();
        assert_eq!(rules(&lab.spoke, &daemon), "rolled-back");
        await_finding(&lab.spoke, &daemon, "policy-rolled-back", true);
        assert!(nothing().is_some(), "not tried again");
        let listed = lab.spoke.spokeguard(&daemon.arguments(&["status"])).unwrap().stdout;
        assert!(listed.contains("ROLLED BACK"), "{listed}");
        daemon.kill_9().unwrap();
    }
    // With a policy confirmed before: that one, though the daemon that brought the other in is dead.
    let guard = Guard { node: &lab.spoke, dir: folder.clone() };
    guard.enforce(&policy(&lab, "[80]", "60s"));
    let confirmed = table(&lab.spoke);
    guard.write(&policy(&lab, "[443]", "3s"));
    killed();
    assert_ne!(table(&lab.spoke), confirmed);
    // What was counted meanwhile is not lost by going back.
    // Also with the chain in it by which the dead daemon was trying its repairs: nothing leads there.
    let back = || without_canary(&table(&lab.spoke)) == confirmed;
    wait_until(LONG, "those confirmed before", || back().then_some(()))
        .unwrap_or_else(|error| panic!("{error:#}, but\n{}", table(&lab.spoke)));
    let counter =
        lab.spoke.ok(&["nft", "list", "counter", "inet", "spokeguard", "drop-public-udp-ipv4"]).unwrap();
    assert!(!counter.contains("packets 0"), "{counter}");
    // Released is released: no boot and no start finds anything to go back to.
    guard.says(0, &["release"]);
    for name in ["sealed.nft", "confirmed.toml", "refused.toml"] {
        assert!(!folder.join("state").join(name).exists(), "{name}");
    }
    assert!(nothing().is_some());
}

#[test]
fn a_trial_that_is_cut_short_ends_in_what_is_told() {
    if lacking(&[Need::Lab, Need::Spokeguard]) {
        return;
    }
    let lab = Lab::plain();
    let with = |ports: &str, within: &str, more: &str| policy(&lab, ports, within) + more;
    let folder = folder(&lab, "short", &with("[80, 443]", "60s", ""));
    let daemon = lab.spoke.daemon_on_trial(&[], &folder, &[]).unwrap();
    let events = Events::mark(&daemon);
    let rollback = daemon.run_dir.join("rollback");
    let tokens = || {
        let names = fs::read_dir(&rollback).into_iter().flatten().flatten();
        let names = names.filter_map(|entry| entry.file_name().into_string().ok());
        names.filter(|name| name != "lock").collect::<Vec<String>>()
    };
    let kinds = |kind: &str| events.all().iter().filter(|event| event["kind"] == kind).count();
    let is_back = |wanted: &str, table_then: &str| {
        wait_until(LONG, wanted, || (table(&lab.spoke) == table_then).then_some(()))
            .unwrap_or_else(|error| panic!("{error:#}\n{}", daemon.running.log()));
    };

    // Its token is taken away: nobody confirmed it, and nobody else will roll it back.
    let armed = tokens().into_iter().find(|name| name.starts_with("armed.")).unwrap();
    fs::remove_file(rollback.join(armed)).unwrap();
    await_rules(&lab.spoke, &daemon, "rolled-back");
    is_back("nothing of ours", "");
    await_finding(&lab.spoke, &daemon, "policy-rolled-back", true);
    let apply = |verb: &[&str]| {
        let outcome = lab.spoke.spokeguard(&daemon.arguments(verb)).unwrap();
        assert_eq!(outcome.code, Some(0), "{}", outcome.all());
        outcome.stdout
    };
    apply(&["apply"]);
    apply(&["confirm"]);
    await_rules(&lab.spoke, &daemon, "confirmed");
    let confirmed = table(&lab.spoke);
    let first = status(&lab.spoke, &daemon)["daemon"]["policy"].clone();
    events.wait(LONG, "told", |event| event["kind"] == "policy-confirmed");
    // The same with all that there is, on top of a confirmed policy.
    write(&folder, &with("[443]", "60s", ""));
    await_rules(&lab.spoke, &daemon, "on-trial");
    fs::remove_dir_all(&rollback).unwrap();
    await_rules(&lab.spoke, &daemon, "rolled-back");
    is_back("those confirmed before", &confirmed);
    assert_eq!(kinds("policy-confirmed"), 1, "{:?}", events.all());

    // A policy that wants no rules, while others are on trial: those before are back, at once, and it
    // stays in force when their time would have come.
    write(&folder, &with("[80]", "5s", ""));
    await_rules(&lab.spoke, &daemon, "on-trial");
    write(&folder, &with("[80]", "60s", "firewall = false\n"));
    await_rules(&lab.spoke, &daemon, "confirmed");
    is_back("those confirmed before", &confirmed);
    let without = status(&lab.spoke, &daemon)["daemon"]["policy"].clone();
    assert_ne!(without, first);
    events.wait(LONG, "told", |event| event["found"].as_str().unwrap_or_default().contains("taken back"));
    over(Duration::from_secs(6));
    assert_eq!(status(&lab.spoke, &daemon)["daemon"]["policy"], without, "{}", daemon.running.log());
    assert_eq!(rules(&lab.spoke, &daemon), "confirmed");
    assert_eq!(tokens(), [] as [String; 0]);
    await_finding(&lab.spoke, &daemon, "policy-rolled-back", false);

    // A mistake while another is on trial ends nothing: its time runs out, and both are told.
    // A slow machine first loads the guard again, for most of its time.
    let within = format!("{}s", 4 * lab::times("SPOKEGUARD_PATIENCE"));
    write(&folder, &with("[80, 5432]", &within, ""));
    events.wait(LONG, "on trial", |event| {
        event["kind"] == "policy-on-trial" && event["found"].as_str().unwrap_or_default().contains("confirm")
    });
    await_rules(&lab.spoke, &daemon, "on-trial");
    write(&folder, "version = 1\nnonsense = 2\n");
    await_finding(&lab.spoke, &daemon, "policy-not-loaded", true);
    await_rules(&lab.spoke, &daemon, "rolled-back");
    is_back("those confirmed before", &confirmed);
    await_finding(&lab.spoke, &daemon, "policy-rolled-back", true);
    await_finding(&lab.spoke, &daemon, "policy-not-loaded", true);
    assert_eq!(status(&lab.spoke, &daemon)["daemon"]["policy"], first);

    // What refuses nothing needs nobody's confirmation, also in place of a trial.
    write(&folder, &with("[443]", "60s", ""));
    await_rules(&lab.spoke, &daemon, "on-trial");
    write(&folder, &with("[443]", "60s", "mode = \"audit\"\n"));
    await_rules(&lab.spoke, &daemon, "confirmed");
    wait_until(LONG, "counted only", || (public(&lab, 22) == Answer::Refused).then_some(())).unwrap();
    assert_eq!(tokens(), [] as [String; 0]);
    let recorded = fs::read_to_string(daemon.state_dir.join("confirmed.toml")).unwrap();
    assert!(recorded.contains("audit"), "{recorded}");
    await_finding(&lab.spoke, &daemon, "policy-not-loaded", false);
}

#[test]
fn a_watchdog_that_is_killed_is_stood_in_for() {
    if lacking(&[Need::Lab, Need::Spokeguard]) {
        return;
    }
    let lab = Lab::plain();
    let folder = folder(&lab, "watchdog", &policy(&lab, "[80]", "60s"));
    let daemon = lab.spoke.daemon_in(&folder, &[]).unwrap();
    await_rules(&lab.spoke, &daemon, "confirmed");
    let confirmed = table(&lab.spoke);
    write(&folder, &policy(&lab, "[443]", "4s"));
    let ours = daemon.run_dir.display().to_string();
    let watchdogs = || {
        let processes = fs::read_dir("/proc").unwrap().flatten();
        let is_one = |path: &Path| {
            let line = fs::read_to_string(path.join("cmdline")).unwrap_or_default();
            line.contains("spokeguard-rollback") && line.contains(&ours)
        };
        let pids = processes.filter(|process| is_one(&process.path()));
        let pids: Vec<String> = pids.filter_map(|process| process.file_name().into_string().ok()).collect();
        (!pids.is_empty()).then_some(pids)
    };
    let pids = wait_until(LONG, "a watchdog", watchdogs).unwrap();
    lab.spoke.sh(&format!("kill -9 {}", pids.join(" "))).unwrap();
    await_rules(&lab.spoke, &daemon, "rolled-back");
    wait_until(LONG, "those confirmed before", || (table(&lab.spoke) == confirmed).then_some(())).unwrap();
}

#[test]
fn a_bad_policy_changes_nothing_and_a_good_one_keeps_the_counters() {
    if lacking(&[Need::Lab, Need::Spokeguard]) {
        return;
    }
    let lab = Lab::plain();
    let good = policy(&lab, "[80, 443]", "60s");
    // As on NixOS: /etc/policy.toml -> static/policy.toml -> the store.
    let folder = lab.dir.join("reload");
    for name in ["store1", "store2"] {
        fs::create_dir_all(folder.join(name)).unwrap();
    }
    let link = |target: &str| {
        let _ = fs::remove_file(folder.join("static.new"));
        std::os::unix::fs::symlink(target, folder.join("static.new")).unwrap();
        fs::rename(folder.join("static.new"), folder.join("static")).unwrap();
    };
    fs::write(folder.join("store1/policy.toml"), &good).unwrap();
    link("store1");
    std::os::unix::fs::symlink("static/policy.toml", folder.join("policy.toml")).unwrap();
    let daemon = lab.spoke.daemon_in(&folder, &[]).unwrap();
    let hub_scrape = || {
        let scrape = lab.hub.http_get(SocketAddr::new(SPOKE_MESH, 9984), "/metrics", &[]).unwrap();
        assert_eq!(scrape.status, 200, "{}", scrape.body);
        scrape.body
    };
    let value =
        |text: &str, start: &str| text.lines().find(|l| l.starts_with(start)).unwrap_or("").to_owned();
    await_rules(&lab.spoke, &daemon, "confirmed");
    let policy_info = value(&hub_scrape(), "spokeguard_policy_info");
    let before = table(&lab.spoke);
    let events = Events::mark(&daemon);

    // The store changes below two links.
    fs::write(folder.join("store2/policy.toml"), good.replace("[public]", "[pubic]")).unwrap();
    link("store2");
    let finding = await_finding(&lab.spoke, &daemon, "policy-not-loaded", true).unwrap();
    let found = finding["found"].as_str().unwrap();
    assert!(found.contains("policy.toml:") && found.contains("pubic"), "{found}");
    for _ in 0..2 {
        daemon.running.signal(Signal::HUP).unwrap();
    }
    assert_eq!(table(&lab.spoke), before);
    assert_eq!(value(&hub_scrape(), "spokeguard_policy_info"), policy_info);
    assert_eq!(rules(&lab.spoke, &daemon), "confirmed");
    // One that locks its operator out is bad as well.
    fs::write(folder.join("store2/policy.toml"), good.replace("from = \"hub\"", "from = [\"192.0.2.0/24\"]"))
        .unwrap();
    wait_until(LONG, "the other mistake", || {
        let found = findings(&status(&lab.spoke, &daemon), "policy-not-loaded").pop()?["found"].to_string();
        found.contains("ssh").then_some(())
    })
    .unwrap();
    assert_eq!(table(&lab.spoke), before);

    // A good one: other services, the same counts.
    assert_eq!(public(&lab, 22), Answer::Silent);
    let count = |body: &str| value(body, "spokeguard_dropped_packets_total{rule=\"ssh\",family=\"ipv4\"}");
    let counted = wait_until(LONG, "counted", || {
        let now = count(&hub_scrape());
        (!now.ends_with(" 0") && !now.is_empty()).then_some(now)
    })
    .unwrap();
    fs::write(folder.join("store1/policy.toml"), good.replace("[80, 443]", "[80, 8443]")).unwrap();
    link("store1");
    await_finding(&lab.spoke, &daemon, "policy-not-loaded", false);
    wait_until(LONG, "in force", || (public(&lab, 8443) == Answer::Refused).then_some(())).unwrap();
    // A scrape confirms it, too; the first may still get the text of a moment before.
    let body = wait_until(LONG, "the layout is the new policy's", || {
        Some(hub_scrape()).filter(|body| body.contains("service=\"tcp-8443\""))
    })
    .unwrap();
    assert_eq!(count(&body), counted);
    assert_ne!(value(&body, "spokeguard_policy_info"), policy_info);
    await_rules(&lab.spoke, &daemon, "confirmed");
    let rejected = events.all().iter().filter(|event| event["kind"] == "policy-rejected").count();
    assert_eq!(rejected, 2, "each mistake once, whoever asks: {:?}", events.all());
}

#[test]
fn the_sealed_rules_load_without_us_and_are_the_same() {
    if lacking(&[Need::Lab, Need::Spokeguard]) {
        return;
    }
    let lab = Lab::plain();
    let guard = Guard::new(&lab, &lab.spoke);
    guard.enforce(&lab.policy());
    let before = table(&lab.spoke);
    let _all =
        lab.spoke.listen("all", &["tcp/[::]:22", "tcp/[::]:80", "tcp/[::]:5432", "tcp/[::]:2222"]).unwrap();
    let ports = "22,80,443,2222,5432,9984";
    let scanned = lab.internet.nmap_states(SPOKE_PUBLIC, ports).unwrap();
    assert_eq!(lab.internet.ask_udp(SocketAddr::new(SPOKE_PUBLIC, 5353), SHORT).unwrap(), None);
    let state = guard.dir.join("state");
    let sealed = state.join("sealed.nft").display().to_string();
    let load = || lab.spoke.ok(&["nft", "-f", &sealed]).unwrap();
    // In a namespace without any interface but lo: a boot.
    let listed = lab
        .spoke
        .ok(&[
            "unshare",
            "--net",
            "sh",
            "-c",
            &format!("nft -f {sealed} && nft -f {sealed} && nft -s list ruleset"),
        ])
        .unwrap();
    assert_eq!(listed, before);
    lab.spoke.nft("flush ruleset").unwrap();
    load();
    assert_eq!(lab.internet.nmap_states(SPOKE_PUBLIC, ports).unwrap(), scanned);
    assert_eq!(lab.internet.ask_udp(SocketAddr::new(SPOKE_PUBLIC, 5353), SHORT).unwrap(), None);
    assert!(guard.says(0, &["plan"]).contains("nothing"));
    // Again, over itself: nothing is lost, what was counted neither.
    let counted = lab.spoke.ok(&["nft", "list", "counters", "table", "inet", "spokeguard"]).unwrap();
    assert!(counted.lines().any(|line| line.contains("packets") && !line.contains("packets 0")), "{counted}");
    load();
    assert_eq!(lab.spoke.ok(&["nft", "list", "counters", "table", "inet", "spokeguard"]).unwrap(), counted);
    // Changed by somebody: found out, and put right by the next one that can.
    fs::write(state.join("sealed.nft"), "table inet spokeguard { }\n").unwrap();
    let check = guard.run(&["check"]);
    assert!(check.stdout.contains("sealed-rules"), "{}", check.all());
    guard.says(0, &["apply"]);
    assert!(!guard.run(&["check"]).stdout.contains("sealed-rules"));

    // An exception is open until its last day by the kernel's clock, with nobody there to close it.
    let exception = |until: &str| {
        format!(
            "{}[[exception]]\nname = \"emergency\"\ntcp = [2222]\nfrom = [\"0.0.0.0/0\"]\n\
             reason = \"the mesh is down\"\nuntil = \"{until}\"\n",
            lab.policy()
        )
    };
    for (until, answer) in [("2099-12-31", Answer::Open), ("2001-01-01", Answer::Silent)] {
        guard.enforce(&exception(until));
        lab.spoke.nft("flush ruleset").unwrap();
        load();
        assert_eq!(public(&lab, 2222), answer, "{until}");
        assert_eq!(public(&lab, 5432), Answer::Silent);
    }
}

#[test]
fn without_a_place_to_write_a_change_is_confirmed_and_says_what_a_boot_will_not_know() {
    if lacking(&[Need::Lab, Need::Spokeguard]) {
        return;
    }
    let lab = Lab::plain();
    let _ssh = listen(&lab.spoke);
    let folder = folder(&lab, "full", &policy(&lab, "[80]", "60s"));
    let state = folder.join("state");
    fs::create_dir_all(&state).unwrap();
    let script = format!("mount -t tmpfs -o ro,size=64k none {}; exec \"$@\"", state.display());
    let wrapper = ["unshare", "--mount", "sh", "-c", &script, "sh"];
    let daemon = lab.spoke.daemon_on_trial(&wrapper, &folder, &[]).unwrap();
    assert_eq!(rules(&lab.spoke, &daemon), "on-trial");
    let _hub = connect_from(&lab.hub, "10.84.0.1", SocketAddr::new(SPOKE_MESH, 22)).unwrap();
    await_rules(&lab.spoke, &daemon, "confirmed");
    let finding = await_finding(&lab.spoke, &daemon, "sealed-rules", true).unwrap();
    assert!(finding["found"].to_string().contains("next boot"), "{finding}");
    assert_eq!(public(&lab, 443), Answer::Silent);
    // A change from there: tried, and back again to what was confirmed, which is known for as long as it runs.
    write(&folder, &policy(&lab, "[443]", "2s"));
    await_rules(&lab.spoke, &daemon, "rolled-back");
    wait_until(LONG, "as before", || {
        (public(&lab, 80) == Answer::Refused && public(&lab, 443) == Answer::Silent).then_some(())
    })
    .unwrap();
}

#[test]
fn a_reload_is_announced_to_the_service_manager() {
    if lacking(&[Need::Lab, Need::Spokeguard]) {
        return;
    }
    let lab = Lab::plain();
    let folder = folder(&lab, "manager", &policy(&lab, "[80]", "60s"));
    let daemon = lab.spoke.daemon_in(&folder, &[]).unwrap();
    // The daemon's own socket is bound by whoever started it; from here on by us.
    let path = folder.join("notify");
    fs::remove_file(&path).unwrap();
    let socket = std::os::unix::net::UnixDatagram::bind(&path).unwrap();
    socket.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
    daemon.running.signal(Signal::HUP).unwrap();
    let mut said = Vec::new();
    wait_until(LONG, "RELOADING and READY", || {
        let mut message = [0u8; 4096];
        while let Ok(length) = socket.recv(&mut message) {
            said.extend(String::from_utf8_lossy(&message[..length]).lines().map(str::to_owned));
        }
        let at = |wanted: &str| said.iter().position(|line| line.starts_with(wanted));
        let (reloading, when, ready) = (at("RELOADING=1")?, at("MONOTONIC_USEC=")?, at("READY=1")?);
        (reloading < ready && when < ready).then_some(())
    })
    .unwrap_or_else(|error| panic!("{error:#}: {said:?}"));
}
