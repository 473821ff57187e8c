//! Bad weather: floods, bursts, little memory, full disks, clocks that jump, interfaces that come and go.
//! What must hold is the same throughout: strangers stay out, the hub gets in, nothing grows, and the daemon
//! knows what is true soon after it is over.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use lab::{
    Answer, Daemon, Lab, MemoryGroup, Need, SPOKE_MESH, SPOKE_MESH_V6, SPOKE_PUBLIC, SPOKE_PUBLIC_V6, Signal,
    lacking, wait_until,
};

use crate::counters::{interface, quiet, started};
use crate::daemon::{
    Events, LONG, SHORT, UNGUARDED, cpu, findings, over, own_memory_kib, plain_policy, status,
};
use crate::metrics::{PORT, fresh, scrape, sum};

/// Whether there is time for all of it (`cargo xtask test --all`).
fn all() -> bool {
    std::env::var_os("SPOKEGUARD_ALL").is_some()
}

fn lasting(quick: u64, long: u64) -> Duration {
    Duration::from_secs(if all() { long } else { quick })
}

/// The daemon's and its metrics server's own memory.
fn memory_kib(daemon: &Daemon) -> u64 {
    let pid = daemon.running.pid();
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    children.split_whitespace().filter_map(|child| child.parse().ok()).fold(
        own_memory_kib(pid),
        |sum, child| {
            // A child of a moment, such as an audit, is no growth; and it may be gone by now.
            let words = fs::read_to_string(format!("/proc/{child}/cmdline")).unwrap_or_default();
            sum + if words.contains("internal-http") { own_memory_kib(child) } else { 0 }
        },
    )
}

#[test]
fn a_flood_of_strangers_costs_no_memory_no_scrape_and_no_count() {
    if lacking(&[Need::Lab, Need::Spokeguard]) {
        return;
    }
    let lab = Lab::plain();
    let _all = lab.spoke.listen("all", &["tcp/[::]:80", "tcp/[::]:443", "tcp/[::]:5432"]).unwrap();
    quiet(&lab);
    // Nothing comes back to strangers who don't exist: neither errors nor what would be counted beside.
    lab.internet.sh("ip route add blackhole 11.0.0.0/8; ip route add blackhole 2a00::/16").unwrap();
    let daemon = started(&lab, UNGUARDED);
    let names = |body: &str| -> Vec<String> {
        let lines = body.lines().filter(|line| !line.starts_with('#'));
        lines.filter_map(|line| Some(line.rsplit_once(' ')?.0.to_owned())).collect()
    };
    let before = status(&lab.spoke, &daemon);
    // What the first attempts of each kind bring into memory is no growth.
    for address in [SPOKE_PUBLIC, SPOKE_PUBLIC_V6] {
        assert_eq!(lab.internet.connect(SocketAddr::new(address, 5432), SHORT), Answer::Silent);
    }
    let (series, memory) = (names(&fresh(&lab.hub)), memory_kib(&daemon));
    let phase = lasting(5, 30) / 4;
    for (to, family, ports, allowed) in [
        (SPOKE_PUBLIC, "ipv4", [80, 443], true),
        (SPOKE_PUBLIC, "ipv4", [5432, 6379], false),
        (SPOKE_PUBLIC_V6, "ipv6", [80, 443], true),
        (SPOKE_PUBLIC_V6, "ipv6", [5432, 6379], false),
    ] {
        let first = fresh(&lab.hub);
        let arrived = || interface(&lab.spoke, "eth0", "rx_packets");
        let arrived_before = arrived();
        let stop = AtomicBool::new(false);
        let (sent, took) = std::thread::scope(|scope| {
            let flood = scope.spawn(|| lab.internet.flood_syn(to, &ports, &stop));
            let (begun, mut took) = (Instant::now(), Vec::new());
            while begun.elapsed() < phase {
                let asked = Instant::now();
                let answer = lab.hub.http_get(SocketAddr::new(SPOKE_MESH, PORT), "/metrics", &[]);
                took.push(answer.map(|_| asked.elapsed()));
                over(Duration::from_millis(50));
            }
            stop.store(true, Ordering::Relaxed);
            (flood.join().unwrap().unwrap(), took)
        });
        let mut took: Vec<Duration> =
            took.into_iter().map(|took| took.expect("a scrape in the flood")).collect();
        took.sort_unstable();
        let (usual, slowest) = (took[took.len() / 2], took[took.len() - 1]);
        // Beside a flood, on two cores that others use as well, one may wait for its turn.
        assert!(
            usual < Duration::from_secs(1) && slowest < Duration::from_secs(5),
            "{family} {ports:?}: {took:?}"
        );
        let mut last = 0.0;
        wait_until(LONG, "everything sent has arrived", || {
            (std::mem::replace(&mut last, arrived()) == arrived()).then_some(())
        })
        .unwrap();
        let after = fresh(&lab.hub);
        let grown =
            |name: &str, labels: &[(&str, &str)]| sum(&after, name, labels) - sum(&first, name, labels);
        let arrived = arrived() - arrived_before;
        eprintln!(
            "{family} {ports:?}: {sent} sent, {arrived} arrived in {phase:?}, of {} scrapes the median {usual:?}, the slowest {slowest:?}",
            took.len()
        );
        assert!(arrived > 5000.0 && arrived <= sent as f64 + 20.0, "{arrived} of {sent}");
        assert_eq!(grown("packets_total", &[("scope", "public"), ("direction", "in")]), arrived);
        let tcp = grown(
            "packets_total",
            &[("scope", "public"), ("direction", "in"), ("family", family), ("proto", "tcp")],
        );
        // The rest is neighbours and their like.
        assert!(tcp <= arrived && arrived - tcp < 20.0, "{tcp} of {arrived}");
        let attempts = |service, verdict| {
            grown(
                "connection_attempts_total",
                &[("service", service), ("family", family), ("verdict", verdict)],
            )
        };
        let let_in = attempts("http", "allowed") + attempts("https", "allowed");
        let denied = grown("connection_attempts_total", &[("family", family), ("verdict", "denied")]);
        let dropped = grown("dropped_packets_total", &[("family", family)]);
        let expected = if allowed { (tcp, 0.0, 0.0) } else { (0.0, tcp, tcp) };
        assert_eq!((let_in, denied, dropped), expected, "{family} {ports:?}");
    }
    let now = status(&lab.spoke, &daemon);
    assert_eq!(
        now["findings"].as_array().unwrap().len(),
        before["findings"].as_array().unwrap().len(),
        "{now}"
    );
    let new: Vec<String> =
        names(&scrape(&lab.hub)).into_iter().filter(|name| !series.contains(name)).collect();
    assert_eq!(new, [] as [String; 0]);
    assert!(series.len() <= 150, "{}", series.len());
    let memory_now = memory_kib(&daemon);
    eprintln!("memory {memory} -> {memory_now} KiB");
    assert!(memory_now < memory + 1024, "{memory} -> {memory_now} KiB");
}

/// Asleep, then awake: everything at once changes meanwhile, more than any queue holds.
#[test]
fn a_daemon_that_was_asleep_or_overrun_finds_what_is_true_and_blames_no_innocent() {
    if lacking(&[Need::Lab, Need::Spokeguard]) {
        return;
    }
    let lab = Lab::plain();
    let spoke = &lab.spoke;
    let _web = spoke.web().unwrap();
    let _database = spoke.listen("postgres", &["tcp/[::]:5432"]).unwrap();
    let daemon = started(&lab, UNGUARDED);
    let wanted = spoke.ok(&TABLE).unwrap();
    let innocent = called(&lab, "innocent");
    spoke.nft("add table inet fw; add set inet fw blocked { type ipv4_addr; }").unwrap();
    let memory = memory_kib(&daemon);
    for asleep in [true, false] {
        let events = Events::mark(&daemon);
        let begun = Instant::now();
        if asleep {
            daemon.running.signal(Signal::STOP).unwrap();
        }
        let redis = burst(&lab, &innocent, if asleep || all() { 10 } else { 1 }, asleep);
        let took = begun.elapsed();
        if asleep {
            for address in [SPOKE_PUBLIC, SPOKE_PUBLIC_V6] {
                let stranger = lab.internet.connect(SocketAddr::new(address, 5432), SHORT);
                assert_eq!(stranger, Answer::Silent, "the other layer holds meanwhile");
            }
            let asleep = lasting(5, 20);
            over(asleep.saturating_sub(begun.elapsed()));
            daemon.running.signal(Signal::CONT).unwrap();
        }
        let awake = Instant::now();
        wait_until(LONG, "our table as it should be", || (spoke.ok(&TABLE).ok()? == wanted).then_some(()))
            .unwrap_or_else(|error| panic!("{error:#}\n{}", daemon.running.log()));
        let repaired = events.wait(LONG, "the repair is told", |event| event["kind"] == "repaired");
        let by = &repaired["by"]["process"];
        assert!(by == "nft" || by.is_null(), "{repaired}");
        let told = wait_until(LONG, "all of it is known", || {
            let status = status(spoke, &daemon);
            let redis = findings(&status, "listener-wide").iter().any(|f| f["subject"] == "tcp/0.0.0.0:6379");
            let blocked = findings(&status, "firewall-blocked");
            (redis && !blocked.is_empty() && findings(&status, "firewall-changed").is_empty())
                .then_some(blocked)
        })
        .unwrap_or_else(|error| panic!("{error:#}\n{}", daemon.running.log()));
        for finding in &told {
            eprintln!("  told by {}", finding["by"]);
            assert!(finding["subject"].as_str().unwrap().contains("443"), "{finding}");
            let by = &finding["by"]["process"];
            assert!(by == "nft" || by.is_null(), "{finding}");
        }
        // The interface that came meanwhile is guarded, and counted.
        let late = |port| SocketAddr::new("192.0.2.7".parse().unwrap(), port);
        assert_eq!(lab.internet.connect(late(80), LONG), Answer::Open);
        assert_eq!(lab.internet.connect(late(5432), SHORT), Answer::Silent);
        let counted = |body: &str| sum(body, "packets_total", &[("scope", "public"), ("proto", "udp")]);
        let first = counted(&fresh(&lab.hub));
        wait_until(LONG, "packets on the new interface are counted", || {
            lab.internet.flood_udp(late(4000), 10).unwrap();
            (counted(&fresh(&lab.hub)) >= first + 10.0).then_some(())
        })
        .unwrap();
        eprintln!("asleep {asleep}: a burst of {took:?}, true {:?} after, by {by}", awake.elapsed());
        let pid = daemon.running.pid();
        // A last look and an audit may be under way; then it is quiet.
        wait_until(Duration::from_secs(90), "less than 5 % of a core over 3 s", || {
            let before = cpu(pid);
            over(Duration::from_secs(3));
            let spent = cpu(pid) - before;
            eprintln!("  {spent:?} in 3 s");
            (spent < Duration::from_millis(150)).then_some(())
        })
        .unwrap();
        drop(redis);
        calm(&lab);
        wait_until(LONG, "it is over", || {
            let status = status(spoke, &daemon);
            let gone = |code| findings(&status, code).is_empty();
            let redis = findings(&status, "listener-wide").iter().any(|f| f["subject"] == "tcp/0.0.0.0:6379");
            (gone("firewall-blocked") && !redis).then_some(())
        })
        .unwrap_or_else(|error| panic!("{error:#}\n{}", daemon.running.log()));
    }
    let memory_now = memory_kib(&daemon);
    eprintln!("memory {memory} -> {memory_now} KiB");
    assert!(memory_now < memory + 4096, "{memory} -> {memory_now} KiB");
}

const TABLE: [&str; 6] = ["nft", "-s", "list", "table", "inet", "spokeguard"];

/// nft under another name, which is what the kernel then says of it.
fn called(lab: &Lab, name: &str) -> String {
    let paths = ["/usr/sbin/nft", "/sbin/nft", "/usr/bin/nft"];
    let program = paths.into_iter().find(|path| Path::new(path).exists()).unwrap();
    let link = lab.dir.join(name);
    std::os::unix::fs::symlink(program, &link).unwrap();
    link.display().to_string()
}

/// For each thousand: a thousand commits to nftables by one who means no harm, and among them two changes that
/// matter; two hundred changes of addresses and ten interfaces that come and go, and one that stays; three hundred
/// listeners that come and go, and one that stays.
fn burst(lab: &Lab, innocent: &str, thousands: u32, opens: bool) -> lab::Listening {
    let spoke = &lab.spoke;
    let commit = |half: u32| {
        let add = |n| format!("add element inet fw blocked {{ 10.{half}.{}.{} }}\n", n / 250, n % 250);
        let adds: String = (0..500 * thousands).map(add).collect();
        let file = lab.file(&format!("commits-{half}"), &adds).unwrap();
        let script = format!("{innocent} -i < {} > /dev/null", file.display());
        // Each waits until every processor has seen the one before: milliseconds, or tens on a busy machine.
        let limit = LONG + thousands * Duration::from_secs(30);
        let outcome = spoke.run_within(limit, &["sh", "-ec", &script]).unwrap();
        assert_eq!(outcome.code, Some(0), "{}", outcome.all());
    };
    std::thread::scope(|scope| {
        scope.spawn(|| {
            commit(1);
            let change = if opens { "accept" } else { "counter" };
            spoke.ok(&["nft", "insert", "rule", "inet", "spokeguard", "input", change]).unwrap();
            spoke.ok(&["nft", "add chain inet fw in { type filter hook input priority 5; }; add rule inet fw in tcp dport 443 drop"]).unwrap();
            commit(2);
        });
        scope.spawn(|| {
            let mut batch = String::new();
            for n in 0..100 * thousands {
                batch += &format!("addr add 10.9.{}.{}/32 dev eth0\n", n / 250, n % 250);
            }
            batch += &batch.replace("add", "del").replace("delr", "addr");
            for n in 0..10 * thousands {
                batch += &format!("link add v{n} type veth peer name w{n}\nlink del v{n}\n");
            }
            batch += &format!("link add late0 type veth peer name late1 netns {}\n", lab.internet.netns);
            batch += "addr add 192.0.2.7/24 dev late0\nlink set late0 up\n";
            let file = lab.file("links", &batch).unwrap();
            spoke.ok(&["ip", "-batch", &file.display().to_string()]).unwrap();
            lab.internet.sh("ip addr add 192.0.2.99/24 dev late1; ip link set late1 up").unwrap();
        });
        scope.spawn(|| {
            for first in [10_000, 12_000, 14_000] {
                let ports = format!("tcp/0.0.0.0:{first}+{}", 100 * thousands - 1);
                drop(spoke.listen("crowd", &[&ports]).unwrap());
            }
        });
    });
    spoke.listen("redis", &["tcp/0.0.0.0:6379"]).unwrap()
}

/// Takes away what a burst left.
fn calm(lab: &Lab) {
    lab.spoke.nft("delete chain inet fw in; flush set inet fw blocked").unwrap();
    lab.spoke.ok(&["ip", "link", "del", "late0"]).unwrap();
}

/// Exceptions for so many prefixes.
fn many(prefixes: u32) -> String {
    let part = |part: u32| {
        let listed = (0..prefixes / 4).map(|n| format!("\"{}.{}.{}.0/24\"", 20 + part, n / 10, (n % 10) * 2));
        format!(
            "[[exception]]\nname = \"customers-{part}\"\ntcp = [{}]\nfrom = [{}]\nreason = \"many\"\n\
             owner = \"ops\"\nuntil = \"2099-01-31\"\n",
            8443 + part,
            listed.collect::<Vec<_>>().join(", ")
        )
    };
    (0..4).map(part).collect()
}

fn folder(lab: &Lab, name: &str, policy: &str) -> PathBuf {
    let folder = lab.dir.join(name);
    fs::create_dir_all(&folder).unwrap();
    fs::write(folder.join("policy.toml"), policy).unwrap();
    folder
}

/// A policy of a thousand prefixes, the first audit, a burst of changes, a reload: all in 32 MB with all that the
/// daemon starts, and then one of ten thousand and one of twenty. Where memory does not suffice for more, what is in
/// force stays.
#[test]
fn thirty_two_megabytes_are_enough_and_what_is_too_much_opens_nothing() {
    if lacking(&[Need::Lab, Need::MemoryGroup, Need::Spokeguard]) {
        return;
    }
    let lab = Lab::plain();
    let spoke = &lab.spoke;
    let _web = spoke.web().unwrap();
    let _database = spoke.listen("postgres", &["tcp/[::]:5432"]).unwrap();
    let policy = plain_policy(&lab) + UNGUARDED + &many(1000);
    let folder = folder(&lab, "little", &policy);
    let group = MemoryGroup::new(&lab, 32 << 20).unwrap();
    let wrapper = group.wrapper();
    let wrapper: Vec<&str> = wrapper.iter().map(String::as_str).collect();
    let say = |when: &str| {
        let own = group.stat("rss").or_else(|_| group.stat("anon")).unwrap();
        eprintln!("{when}: peak {} KiB, now {} KiB without files", group.peak().unwrap() >> 10, own >> 10);
    };
    let daemon = spoke.daemon_under(&wrapper, &folder, &[]).unwrap_or_else(|error| {
        panic!("{error:#}; {} killed, peak {}", group.killed().unwrap(), group.peak().unwrap())
    });
    say("started");
    wait_until(3 * LONG, "the first audit", || {
        (!status(spoke, &daemon)["daemon"]["audit"].is_null()).then_some(())
    })
    .unwrap_or_else(|error| panic!("{error:#}\n{}", daemon.running.log()));
    say("audited");
    let wanted = spoke.ok(&TABLE).unwrap();
    assert!(wanted.contains("20.0.0.0/24") && wanted.contains("23.24.18.0/24"));
    spoke.nft("add table inet fw; add set inet fw blocked { type ipv4_addr; }").unwrap();
    let redis = burst(&lab, &called(&lab, "innocent"), 1, false);
    wait_until(LONG, "our table as it should be", || (spoke.ok(&TABLE).ok()? == wanted).then_some(()))
        .unwrap_or_else(|error| panic!("{error:#}\n{}", daemon.running.log()));
    wait_until(LONG, "the drop of 443 is told", || {
        (!findings(&status(spoke, &daemon), "firewall-blocked").is_empty()).then_some(())
    })
    .unwrap_or_else(|error| panic!("{error:#}\n{}", daemon.running.log()));
    drop(redis);
    calm(&lab);
    say("after the burst");
    spoke.ok(&["nft", "delete", "table", "inet", "spokeguard"]).unwrap();
    wait_until(LONG, "repaired", || (spoke.ok(&TABLE).ok()? == wanted).then_some(())).unwrap();
    fs::write(&daemon.policy, policy.replace("[8443]", "[8444]")).unwrap();
    wait_until(LONG, "the changed policy on trial", || {
        (status(spoke, &daemon)["daemon"]["rules"] == "on-trial").then_some(())
    })
    .unwrap_or_else(|error| panic!("{error:#}\n{}", daemon.running.log()));
    say("at the end");
    assert_eq!(group.killed().unwrap(), 0, "{}", daemon.running.log());

    let policy = plain_policy(&lab) + UNGUARDED + &many(10_000);
    fs::write(&daemon.policy, &policy).unwrap();
    wait_until(3 * LONG, "ten thousand", || spoke.ok(&TABLE).ok()?.contains("23.249.18.0/24").then_some(()))
        .unwrap_or_else(|error| panic!("{error:#}\n{}", daemon.running.log()));
    say("ten thousand");
    assert_eq!(group.killed().unwrap(), 0, "{}", daemon.running.log());

    let others = many(10_000).replace("customers-", "others-").replace("\"2", "\"3");
    let policy = policy + &others;
    fs::write(&daemon.policy, &policy).unwrap();
    wait_until(3 * LONG, "twenty thousand", || {
        spoke.ok(&TABLE).ok()?.contains("33.249.18.0/24").then_some(())
    })
    .unwrap_or_else(|error| panic!("{error:#}\n{}", daemon.running.log()));
    say("twenty thousand");
    assert_eq!(group.killed().unwrap(), 0, "{}", daemon.running.log());

    group.tighten(1 << 20).unwrap();
    fs::write(&daemon.policy, policy + &others.replace("others-", "more-").replace("\"3", "\"4")).unwrap();
    // nft or the daemon: whoever it is, what was in force stays.
    wait_until(3 * LONG, "too much", || (group.killed().unwrap() > 0).then_some(())).unwrap();
    for address in [SPOKE_PUBLIC, SPOKE_PUBLIC_V6] {
        assert_eq!(lab.internet.connect(SocketAddr::new(address, 5432), SHORT), Answer::Silent);
        assert_eq!(lab.internet.connect(SocketAddr::new(address, 443), LONG), Answer::Open);
    }
    say("too much");
}

/// The state directory fills up, or turns read-only, at every step; then there is room again.
#[test]
fn a_state_directory_that_takes_nothing_costs_no_rule_and_is_caught_up_with() {
    if lacking(&[Need::Lab, Need::Spokeguard]) {
        return;
    }
    let lab = Lab::plain();
    let spoke = &lab.spoke;
    let _all = spoke.listen("all", &["tcp/[::]:80", "tcp/[::]:443", "tcp/[::]:5432"]).unwrap();
    let policy = |ports: &str, within: &str| {
        plain_policy(&lab).replace("[80, 443]", ports)
            + &format!("[enforce]\nbinds = false\nconfirm_within = \"{within}\"\n")
    };
    let folder = folder(&lab, "full", &policy("[80]", "60s"));
    let state = folder.join("state");
    fs::create_dir_all(&state).unwrap();
    let at = state.display().to_string();
    // In the node's own mounts, which the daemon shares.
    spoke.ok(&["mount", "-t", "tmpfs", "-o", "size=1m,mode=0700", "none", &at]).unwrap();
    let seen = |name: &str| fs::read(spoke.path(&format!("{at}/{name}"))).ok();
    // A file that is left of a write that found no room may take the last of it.
    let fill =
        || spoke.sh(&format!("dd if=/dev/zero of={at}/ballast bs=4k 2>/dev/null || :")).map(drop).unwrap();
    let free = || spoke.sh(&format!("rm -f {at}/ballast")).map(drop).unwrap();
    let remount = |how: &str| spoke.ok(&["mount", "-o", &format!("remount,{how}"), &at]).map(drop).unwrap();
    let open = |port: u16| lab.internet.connect(SocketAddr::new(SPOKE_PUBLIC, port), SHORT) == Answer::Open;
    let in_force = |what: &str, port: u16, other: u16| {
        wait_until(LONG, what, || (open(port) && !open(other) && !open(5432)).then_some(()))
            .unwrap_or_else(|error| panic!("{error:#}: {} {} {}", open(port), open(other), open(5432)));
    };
    let told = |daemon: &Daemon, there: bool| {
        wait_until(LONG, &format!("sealed-rules is told: {there}"), || {
            let found = findings(&status(spoke, daemon), "sealed-rules");
            (found.is_empty() != there).then_some(found)
        })
        .unwrap_or_else(|error| panic!("{error:#}\n{}", daemon.running.log()))
    };
    let rules = |daemon: &Daemon, wanted: &str| {
        wait_until(LONG, wanted, || (status(spoke, daemon)["daemon"]["rules"] == wanted).then_some(()))
            .unwrap_or_else(|error| panic!("{error:#}: {}\n{}", status(spoke, daemon), daemon.running.log()));
    };
    let confirm = |daemon: &Daemon| spoke.spokeguard(&daemon.arguments(&["confirm"])).unwrap();

    fill();
    let mut daemon = spoke.daemon_on_trial(&[], &folder, &[]).unwrap();
    in_force("enforced without a place to write", 80, 443);
    let said = confirm(&daemon);
    assert!(said.all().contains("next boot"), "{}", said.all());
    rules(&daemon, "confirmed");
    told(&daemon, true);
    assert_eq!(seen("sealed.nft"), None, "nothing half");
    // Killed and started again while there is no room: what was confirmed is not tried anew.
    daemon.kill_9().unwrap();
    in_force("the rules stay", 80, 443);
    daemon = spoke.daemon_on_trial(&[], &folder, &[]).unwrap();
    rules(&daemon, "confirmed");
    free();
    told(&daemon, false);
    let (sealed, confirmed) = (seen("sealed.nft").unwrap(), seen("confirmed.toml").unwrap());
    assert!(String::from_utf8_lossy(&confirmed).contains("tcp = [80]"));
    wait_until(LONG, "events are caught up with", || {
        let log = String::from_utf8(seen("events.jsonl")?).ok()?;
        log.lines().all(|line| serde_json::from_str::<serde_json::Value>(line).is_ok()).then_some(())?;
        log.contains("started").then_some(())
    })
    .unwrap();

    // A reload on a read-only directory, confirmed there.
    remount("ro");
    fs::write(&daemon.policy, policy("[443]", "60s")).unwrap();
    rules(&daemon, "on-trial");
    in_force("the new rules", 443, 80);
    let said = confirm(&daemon);
    assert!(said.all().contains("next boot"), "{}", said.all());
    told(&daemon, true);
    in_force("they stay", 443, 80);
    assert_eq!(seen("sealed.nft").unwrap(), sealed, "the old ones, whole");
    remount("rw");
    told(&daemon, false);
    assert_ne!(seen("sealed.nft").unwrap(), sealed);
    assert!(String::from_utf8_lossy(&seen("confirmed.toml").unwrap()).contains("tcp = [443]"));

    // A rollback on a full one; the policy that was refused is not tried again by a start either.
    fill();
    fs::write(&daemon.policy, policy("[80]", "2s")).unwrap();
    rules(&daemon, "on-trial");
    rules(&daemon, "rolled-back");
    in_force("the confirmed rules are back", 443, 80);
    daemon.kill_9().unwrap();
    daemon = spoke.daemon_on_trial(&[], &folder, &[]).unwrap();
    rules(&daemon, "rolled-back");
    in_force("they stay over a start", 443, 80);
    free();
    wait_until(LONG, "the refusal is recorded", || seen("refused.toml")).unwrap();
    let left: Vec<String> = fs::read_dir(spoke.path(&at))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.starts_with('.'))
        .collect();
    assert_eq!(left, [] as [String; 0], "no halves of files");
}

/// The tunnel's address comes late, goes with its interface, and comes again.
#[test]
fn a_late_mesh_address_is_served_within_two_seconds_and_nothing_is_open_before() {
    if lacking(&[Need::Lab, Need::Cgroup2, Need::Sshd, Need::Spokeguard]) {
        return;
    }
    let lab = Lab::plain();
    let spoke = &lab.spoke;
    let _database = spoke.listen("postgres", &["tcp/[::]:5432"]).unwrap();
    let _web = spoke.web().unwrap();
    let addresses = "ip addr add 10.84.0.16/24 dev wg0; ip addr add fd84::16/64 dev wg0";
    spoke.sh("ip addr flush dev wg0").unwrap();
    let policy = plain_policy(&lab).replace("bind = \"mesh\"", "bind = \"mesh\"\nrebind = true");
    let daemon = spoke.daemon(&policy).unwrap();
    let sshd = spoke.sshd(22, &["0.0.0.0", "::"], "").unwrap();
    let late = lasting(10, 60);
    let begun = Instant::now();
    while begun.elapsed() < late {
        for address in [SPOKE_PUBLIC, SPOKE_PUBLIC_V6] {
            for port in [22, 5432] {
                let answer = lab.internet.connect(SocketAddr::new(address, port), SHORT);
                assert_eq!(answer, Answer::Silent, "{address} {port} after {:?}", begun.elapsed());
            }
            assert_eq!(lab.internet.connect(SocketAddr::new(address, 443), LONG), Answer::Open);
        }
    }
    assert!(!findings(&status(spoke, &daemon), "mesh-address").is_empty());
    let served = |what: &str| {
        let begun = Instant::now();
        wait_until(LONG, what, || {
            let answer = lab.hub.http_get(SocketAddr::new(SPOKE_MESH, PORT), "/metrics", &[]).ok()?;
            (answer.status == 200).then_some(())
        })
        .unwrap_or_else(|error| panic!("{error:#}\n{}", daemon.running.log()));
        let scraped = begun.elapsed();
        wait_until(LONG, what, || {
            (lab.hub.connect(SocketAddr::new(SPOKE_MESH, 22), SHORT) == Answer::Open).then_some(())
        })
        .unwrap_or_else(|error| panic!("{error:#}\n{}", sshd.running.log()));
        eprintln!("{what}: a scrape after {scraped:?}, sshd after {:?}", begun.elapsed());
        assert!(begun.elapsed() < Duration::from_secs(2), "{what}: {scraped:?}, {:?}", begun.elapsed());
        // How long sshd takes for the rest is not ours.
        let login = sshd.login(&lab.hub, SPOKE_MESH, "echo in").unwrap();
        assert_eq!(login.stdout, "in\n", "{}\n{}", login.all(), sshd.running.log());
        for address in [SPOKE_MESH, SPOKE_MESH_V6] {
            assert_eq!(lab.hub.connect(SocketAddr::new(address, 5432), SHORT), Answer::Silent);
        }
    };
    spoke.sh(addresses).unwrap();
    served("the address is there at last");
    for round in ["made anew", "and again"] {
        spoke.ok(&["ip", "link", "del", "wg0"]).unwrap();
        // The public side does not notice.
        assert_eq!(lab.internet.connect(SocketAddr::new(SPOKE_PUBLIC, 443), LONG), Answer::Open);
        assert_eq!(lab.internet.connect(SocketAddr::new(SPOKE_PUBLIC, 22), SHORT), Answer::Silent);
        spoke.sh(&format!("ip link add wg0 type veth peer name wg0 netns {}", lab.hub.net_path())).unwrap();
        lab.hub
            .sh("ip addr add 10.84.0.1/24 dev wg0; ip addr add fd84::1/64 dev wg0; ip link set wg0 up")
            .unwrap();
        spoke.sh(&format!("{addresses}; ip link set wg0 up")).unwrap();
        served(round);
    }
}

/// Somebody else commits all the time: to tables of theirs, then to ours.
#[test]
fn an_apply_among_other_writers_is_whole_or_says_that_it_is_not() {
    if lacking(&[Need::Lab, Need::Spokeguard]) {
        return;
    }
    let lab = Lab::plain();
    let spoke = &lab.spoke;
    let _all = spoke.listen("all", &["tcp/[::]:80", "tcp/[::]:443", "tcp/[::]:5432"]).unwrap();
    let folder = folder(&lab, "apply", "");
    let words = |verb: &str| -> Vec<String> {
        let at = |name: &str| folder.join(name).display().to_string();
        [verb, "--policy", &at("policy.toml"), "--state-dir", &at("state"), "--run-dir", &at("run")]
            .map(str::to_owned)
            .into()
    };
    let write = |ports: &str| {
        let policy = plain_policy(&lab).replace("[80, 443]", ports) + "[enforce]\nbinds = false\n";
        fs::write(folder.join("policy.toml"), policy).unwrap();
    };
    let apply = |ports: &str| {
        write(ports);
        let applied = spoke.spokeguard(&words("apply")).unwrap();
        if applied.code != Some(0) {
            return applied;
        }
        let confirmed = spoke.spokeguard(&words("confirm")).unwrap();
        // What somebody changed in between is not confirmed, and what was before is back.
        let told =
            confirmed.code == Some(2) && confirmed.stderr.contains("the rules on trial are not in force");
        assert!(confirmed.code == Some(0) || told, "{}", confirmed.all());
        if told { confirmed } else { applied }
    };
    let tables = ["[80]", "[443]"].map(|ports| {
        assert_eq!(apply(ports).code, Some(0));
        spoke.ok(&TABLE).unwrap()
    });
    assert_ne!(tables[0], tables[1]);
    for (writer, foreign) in [
        ("add table inet fw; add chain inet fw in; delete chain inet fw in", true),
        (
            "add chain inet spokeguard x; add rule inet spokeguard public counter; delete chain inet spokeguard x",
            false,
        ),
    ] {
        let script = format!("while :; do nft '{writer}' 2>/dev/null || :; done");
        let running = spoke.spawn(&["sh", "-c", &script]).unwrap();
        let (mut whole, rounds) = (0, if foreign { 8 } else { 6 });
        for round in 0..rounds {
            let which = round % 2;
            let (ports, port, other) = [("[80]", 80, 443), ("[443]", 443, 80)][which];
            let applied = apply(ports);
            let said = applied.all();
            match applied.code {
                Some(0) => whole += 1,
                // Whoever commits to our own table between our commit and our look.
                Some(2) if !foreign => {
                    assert!(
                        ["still differs", "nft", "are not in force"]
                            .iter()
                            .any(|why| applied.stderr.contains(why)),
                        "{said}"
                    );
                }
                _ => panic!("{said}"),
            }
            if foreign {
                assert_eq!(spoke.ok(&TABLE).unwrap(), tables[which], "{said}");
            }
            let answer = |port, limit| lab.internet.connect(SocketAddr::new(SPOKE_PUBLIC, port), limit);
            assert_eq!(answer(5432, SHORT), Answer::Silent);
            if applied.code == Some(0) {
                assert_eq!((answer(port, LONG), answer(other, SHORT)), (Answer::Open, Answer::Silent));
            }
        }
        eprintln!("{writer}: {whole} of {rounds} were whole");
        assert!(!foreign || whole == rounds);
        drop(running);
        assert_eq!(apply("[443]").code, Some(0));
        assert_eq!(spoke.ok(&TABLE).unwrap(), tables[1], "in peace it is right again");
    }
}

/// The time of day jumps by a year and back, in the middle of a trial and of an opening. Only dates follow it:
/// what lasts so many seconds lasts that long.
#[test]
fn a_clock_that_is_set_moves_dates_and_no_durations() {
    let needs = [Need::Lab, Need::WireGuard, Need::Faketime, Need::Spokeguard];
    if lacking(&needs) {
        return;
    }
    let program = fs::read(lab::spokeguard().unwrap()).unwrap();
    if !program.windows(8).any(|bytes| bytes == b"ld-linux") {
        eprintln!("skipped: nothing sets the clock that a static program sees");
        return;
    }
    let lab = Lab::new();
    let spoke = &lab.spoke;
    let _all =
        spoke.listen("all", &["tcp/[::]:80", "tcp/[::]:443", "tcp/[::]:2222", "tcp/[::]:3333"]).unwrap();
    let until = spoke.ok(&["date", "-u", "-d", "+40 days", "+%F"]).unwrap();
    let policy = |ports: &str, within: &str| {
        lab.policy().replace("[80, 443]", ports)
            + &format!(
                "[[exception]]\nname = \"way-in\"\ntcp = [2222]\nfrom = [\"0.0.0.0/0\"]\nreason = \"r\"\nowner = \"ops\"\n\
                 until = \"{}\"\n[enforce]\nbinds = false\nconfirm_within = \"{within}\"\n",
                until.trim()
            )
    };
    let library = spoke.sh("ls /usr/lib/*/faketime/libfaketimeMT.so.1").unwrap();
    let clock = lab.file("clock", "+0").unwrap();
    let set = |to: &str| fs::write(&clock, to).unwrap();
    let wrapper = [
        "env".to_owned(),
        format!("LD_PRELOAD={}", library.trim()),
        format!("FAKETIME_TIMESTAMP_FILE={}", clock.display()),
        "FAKETIME_NO_CACHE=1".to_owned(),
        "FAKETIME_DONT_FAKE_MONOTONIC=1".to_owned(),
    ];
    let wrapper: Vec<&str> = wrapper.iter().map(String::as_str).collect();
    let folder = folder(&lab, "clocks", &policy("[80]", "60s"));
    let daemon = spoke.daemon_under(&wrapper, &folder, &[]).unwrap();
    let year = |status: &serde_json::Value| status["at"].as_str().unwrap()[..4].parse::<i32>().unwrap();
    let first = year(&status(spoke, &daemon));
    let answer = |port, limit| lab.internet.connect(SocketAddr::new(SPOKE_PUBLIC, port), limit);
    let (open, shut) =
        (|port| answer(port, LONG) == Answer::Open, |port| answer(port, SHORT) == Answer::Silent);
    let rules = |wanted: &str| {
        wait_until(LONG, wanted, || (status(spoke, &daemon)["daemon"]["rules"] == wanted).then_some(()))
            .unwrap_or_else(|error| {
                panic!("{error:#}: {}\n{}", status(spoke, &daemon), daemon.running.log())
            });
    };
    wait_until(3 * LONG, "the first audit", || {
        (!status(spoke, &daemon)["daemon"]["audit"].is_null()).then_some(())
    })
    .unwrap();
    assert!(open(80) && open(2222) && shut(443) && shut(3333));

    for (jump, years, exception) in [("+365d", 1, false), ("-1d", 0, true)] {
        let glass =
            ["break-glass", "open", "3333", "--for", "10s", "--from", "198.51.100.99", "--reason", "r"];
        let glass_began = Instant::now();
        let opened = spoke.spokeguard(&daemon.arguments(&glass)).unwrap();
        assert_eq!(opened.code, Some(0), "{}", opened.all());
        // A policy that was rolled back is not tried again, so each time another one.
        let ports = if exception { "[443]" } else { "[80, 443]" };
        fs::write(&daemon.policy, policy(ports, "5s")).unwrap();
        rules("on-trial");
        let (trial_began, events) = (Instant::now(), Events::mark(&daemon));
        set(jump);
        assert!(open(443), "{jump}: the rules on trial");
        rules("rolled-back");
        let took = trial_began.elapsed();
        assert!(
            took > Duration::from_secs(3) && took < Duration::from_secs(10),
            "{jump}: a trial of {took:?}"
        );
        assert!(open(80) && shut(443));
        while glass_began.elapsed() < Duration::from_secs(8) {
            assert!(open(3333), "{jump}: closed after {:?}", glass_began.elapsed());
            over(Duration::from_millis(100));
        }
        wait_until(Duration::from_secs(6), "the opening ends", || shut(3333).then_some(())).unwrap();
        wait_until(LONG, "the exception by its date", || {
            (answer(2222, SHORT) == if exception { Answer::Open } else { Answer::Silent }).then_some(())
        })
        .unwrap_or_else(|error| panic!("{jump}: {error:#}\n{}", daemon.running.log()));
        let now = wait_until(LONG, "the daemon sees the other time", || {
            let now = status(spoke, &daemon);
            (year(&now) - first >= years && !now["at"].is_null()).then_some(now)
        })
        .unwrap();
        for code in ["mesh-handshake", "mesh-keepalive"] {
            assert_eq!(findings(&now, code), [] as [serde_json::Value; 0], "{jump}");
        }
        wait_until(LONG, "no drift of rules is left", || {
            findings(&status(spoke, &daemon), "firewall-changed").is_empty().then_some(())
        })
        .unwrap_or_else(|error| panic!("{jump}: {error:#}\n{}", daemon.running.log()));
        let body = fresh(&lab.hub);
        for age in ["audit_age_seconds", "wireguard_handshake_age_seconds"] {
            let age = (age, sum(&body, age, &[]));
            assert!(age.1 < 180.0, "{jump}: {age:?}");
        }
        // It ended in time, whatever the calendar says.
        let end = events.wait(LONG, "the end of the opening is told", |event| {
            event["code"] == "break-glass-open" && event["kind"] != "opened"
        });
        assert_eq!(end["kind"], "expired", "{jump}: {end}");
        eprintln!("{jump}: a trial of {took:?}");
        assert!(!daemon.running.log().contains("panicked"), "{}", daemon.running.log());
    }

    // Set back by a week while nothing else happens: no look between tells the daemon when it ends by the new time.
    let events = Events::mark(&daemon);
    let words =
        ["break-glass", "open", "3333", "--for", "10s", "--from", "198.51.100.99", "--reason", "quiet"];
    let opened = spoke.spokeguard(&daemon.arguments(&words)).unwrap();
    assert_eq!(opened.code, Some(0), "{}", opened.all());
    events.wait(LONG, "told of", |event| event["kind"] == "opened");
    let looks = || status(spoke, &daemon)["daemon"]["cycle"].as_u64().unwrap();
    wait_until(LONG, "a quiet moment", || {
        let before = looks();
        over(Duration::from_millis(700));
        (looks() == before).then_some(())
    })
    .unwrap();
    set("-8d");
    let end = events.wait(LONG, "the end of the opening is told", |event| {
        event["code"] == "break-glass-open" && event["kind"] != "opened"
    });
    assert_eq!(end["kind"], "expired", "{end}");
    assert!(shut(3333));
}
