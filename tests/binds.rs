//! The bind guard: who may bind what, in the words of the kernel, and how one gets out of it.

use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use lab::{
    Answer, Daemon, HUB_MESH, Lab, Need, Node, SPOKE_MESH, SPOKE_MESH_V6, SPOKE_PUBLIC, SPOKE_PUBLIC_V6,
    Signal, lacking, wait_until,
};
use spokeguard::desired::Desired;
use spokeguard::desired::binds::{BindRules, Surroundings};
use spokeguard::policy;
use spokeguard::terms::Proto;

use crate::daemon::{Events, LONG, SHORT, findings, plain_policy, status};

const REFUSED: &str = "errno 1";
const NEEDS: [Need; 3] = [Need::Lab, Need::Cgroup2, Need::Spokeguard];

fn helper() -> String {
    let me = std::env::current_exe().unwrap();
    let mut beside = me.ancestors().skip(1).take(2).map(|dir| dir.join("sg-lab-helper"));
    beside.find(|path| path.is_file()).unwrap().display().to_string()
}

/// Tries these binds in one process, one after the other; what each came to.
fn try_binds(node: &Node, what: &[String]) -> Vec<String> {
    let helper = helper();
    let words: Vec<&str> = [&*helper, "bind"].into_iter().chain(what.iter().map(String::as_str)).collect();
    let said: Vec<String> = node.ok(&words).unwrap().lines().map(str::to_owned).collect();
    assert_eq!(said.len(), what.len(), "{said:?}");
    said
}

fn try_bind(node: &Node, what: &str) -> String {
    try_binds(node, &[what.to_owned()]).remove(0)
}

fn await_refused(node: &Node, daemon: &Daemon, what: &str) {
    wait_until(2 * LONG, &format!("{what} is refused"), || (try_bind(node, what) == REFUSED).then_some(()))
        .unwrap_or_else(|error| panic!("{error:#}\n{}", daemon.running.log()));
}

fn service_policy(lab: &Lab) -> String {
    plain_policy(lab) + "[[mesh.service]]\nname = \"netdata\"\ntcp = [19999]\nudp = [161]\nfrom = \"mesh\"\n"
}

fn metric(lab: &Lab, name: &str) -> Option<u64> {
    let page = lab.hub.http_get(SocketAddr::new(SPOKE_MESH, 9984), "/metrics", &[]).ok()?.body;
    page.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok())
}

fn await_metric(lab: &Lab, name: &str, value: u64) {
    wait_until(LONG, &format!("{name} {value}"), || (metric(lab, name) == Some(value)).then_some(()))
        .unwrap_or_else(|error| panic!("{error:#}; it is {:?}", metric(lab, name)));
}

const TOTAL: &str = "spokeguard_refused_binds_total";
const HELD: &str = "spokeguard_control_enforced{control=\"binds\"}";

/// Every kind of address with every kind of port, as the rules judge it.
fn predicted(text: &str) -> Vec<(String, bool)> {
    let today = "2026-11-21".parse().unwrap();
    let policy = policy::parse(text, "policy.toml", today).unwrap().policy;
    let rules = BindRules::new(&Desired::new(policy, today).unwrap(), &[]);
    let range = fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").unwrap();
    let range: Vec<u16> = range.split_whitespace().map(|n| n.parse().unwrap()).collect();
    let around = Surroundings {
        netns: 1,
        ephemeral: [range[0], range[1]],
        public: [SPOKE_PUBLIC, SPOKE_PUBLIC_V6].into(),
        doors: Default::default(),
    };
    let mapped = |address: IpAddr| match address {
        IpAddr::V4(v4) => IpAddr::V6(v4.to_ipv6_mapped()),
        v6 => v6,
    };
    let any: IpAddr = "0.0.0.0".parse().unwrap();
    let fixed = ["0.0.0.0", "127.0.0.1", "::", "::1"].map(|text| text.parse::<IpAddr>().unwrap());
    let own = [SPOKE_PUBLIC, SPOKE_MESH, SPOKE_PUBLIC_V6, SPOKE_MESH_V6];
    let addresses = fixed.into_iter().chain(own).map(|address| (address, false));
    let both = ["::".parse().unwrap(), mapped(any), mapped(SPOKE_PUBLIC), mapped(SPOKE_MESH)];
    let addresses: Vec<(IpAddr, bool)> = addresses.chain(both.map(|address| (address, true))).collect();
    let ports = [0, 20, 22, 80, 161, 443, 599, 600, 700, 1023, 1024, 5432, 9984, 19_999];
    let ports = ports.into_iter().chain([range[0] - 1, range[0], range[1], range[1] + 1]);
    let mut out = Vec::new();
    for port in ports {
        for (address, dual) in &addresses {
            for proto in Proto::ALL {
                let at = SocketAddr::new(*address, port);
                let how = if *dual { "/dual" } else { "" };
                out.push((format!("{proto}/{at}{how}"), rules.refuses(&around, proto, at, *dual)));
            }
        }
    }
    out
}

/// Tries them all; gives how many were refused.
fn all_as_predicted(node: &Node, expected: &[(String, bool)]) -> u64 {
    let what: Vec<String> = expected.iter().map(|(what, _)| what.clone()).collect();
    let wrong: Vec<String> = (expected.iter().zip(try_binds(node, &what)))
        .filter(|((_, refused), said)| *refused != (said == REFUSED))
        .map(|((what, refused), said)| format!("{what}: {said}, refused: {refused}"))
        .collect();
    assert!(wrong.is_empty(), "{wrong:#?}");
    expected.iter().filter(|(_, refused)| *refused).count() as u64
}

fn finding_of(node: &Node, daemon: &Daemon, subject: &str) -> serde_json::Value {
    wait_until(LONG, subject, || {
        findings(&status(node, daemon), "bind-refused").into_iter().find(|f| f["subject"] == subject)
    })
    .unwrap_or_else(|error| panic!("{error:#}\n{}", daemon.running.log()))
}

#[test]
fn binds_are_refused_by_port_and_address_and_whoever_tried_is_named() {
    if lacking(&NEEDS) {
        return;
    }
    let lab = Lab::plain();
    let spoke = &lab.spoke;
    let policy = service_policy(&lab);
    let expected = predicted(&policy);
    let refused = |what: &str| expected.iter().any(|(known, refused)| known == what && *refused);
    // The prediction itself, where it matters most.
    for wide in
        ["tcp/0.0.0.0:22", "tcp/[::]:22/dual", "tcp/0.0.0.0:5432", "udp/0.0.0.0:161", "tcp/[::]:19999"]
    {
        assert!(refused(wide), "{wide}");
    }
    for narrow in
        ["tcp/10.84.0.16:22", "tcp/127.0.0.1:5432", "tcp/0.0.0.0:443", "tcp/198.51.100.7:0", "udp/[::]:5432"]
    {
        assert!(!refused(narrow), "{narrow}");
    }
    assert!(
        all_as_predicted(spoke, &expected.iter().map(|(what, _)| (what.clone(), false)).collect::<Vec<_>>())
            == 0
    );

    let daemon = spoke.daemon(&policy).unwrap();
    let events = Events::mark(&daemon);
    // The interfaces are known with the first look, which was before READY=1.
    let mut count = all_as_predicted(spoke, &expected);
    await_metric(&lab, TOTAL, count);
    await_metric(&lab, HELD, 1);
    // Containers and other instances: the same control group, another namespace.
    assert_eq!(try_bind(&lab.hub, "tcp/0.0.0.0:5432"), "0.0.0.0:5432");

    // Named in status, in `check`, and in the event log.
    let denied = spoke.listen("postgres", &["tcp/[::]:5433"]).err().unwrap().to_string();
    assert!(denied.contains("Operation not permitted"), "{denied}");
    count += 1;
    let finding = finding_of(spoke, &daemon, "tcp/[::]:5433");
    assert_eq!(
        (finding["severity"].as_str(), finding["by"]["process"].as_str()),
        (Some("medium"), Some("postgres"))
    );
    let found = finding["found"].as_str().unwrap();
    assert!(found.starts_with("refused once, last "), "{found}");
    let look = spoke.spokeguard(&daemon.arguments(&["check", "--format", "json"])).unwrap().json().unwrap();
    let seen = findings(&look, "bind-refused");
    assert!(
        seen.iter().any(|f| f["subject"] == "tcp/[::]:5433" && f["by"]["process"] == "postgres"),
        "{seen:#?}"
    );
    events.wait(LONG, "the refusal in the event log", |event| {
        event["code"] == "bind-refused" && event["subject"] == "tcp/[::]:5433"
    });

    // The unit, although the process has ended by now: it is asked while it may be.
    let unit = spoke.cgroup.as_ref().unwrap().join("redis.service");
    fs::create_dir(&unit).unwrap();
    let mut redis = spoke.command(&[&*helper(), "listen", "redis", "tcp/0.0.0.0:6379"]);
    redis.env("SPOKEGUARD_CGROUP", &unit);
    spoke.start(redis, "redis in a unit").unwrap().wait(LONG).unwrap();
    count += 1;
    let by = &finding_of(spoke, &daemon, "tcp/0.0.0.0:6379")["by"];
    assert_eq!((by["process"].as_str(), by["unit"].as_str()), (Some("redis"), Some("redis.service")));

    // A burst costs a bounded number of findings, and is counted to the last one.
    let burst: Vec<String> = (0..1000).map(|n| format!("tcp/0.0.0.0:{}", 2000 + n)).collect();
    assert!(try_binds(spoke, &burst).iter().all(|said| said == REFUSED));
    count += 1000;
    await_metric(&lab, TOTAL, count);
    let told = wait_until(LONG, "the rest summed up", || {
        let told = findings(&status(spoke, &daemon), "bind-refused");
        told.iter().any(|f| f["subject"] == "further binds").then_some(told)
    });
    assert!(told.unwrap().len() <= 17);

    // A public address that comes later is guarded as soon as it is known.
    spoke.ok(&["ip", "address", "add", "198.51.100.8/24", "dev", "eth0"]).unwrap();
    await_refused(spoke, &daemon, "tcp/198.51.100.8:5432");
}

/// What a mistaken policy keeps from starting may be the way in.
#[test]
fn rules_on_trial_count_what_they_will_refuse() {
    if lacking(&NEEDS) {
        return;
    }
    let lab = Lab::plain();
    let folder = lab.dir.join("on-trial");
    std::fs::create_dir_all(&folder).unwrap();
    std::fs::write(folder.join("policy.toml"), service_policy(&lab)).unwrap();
    let daemon = lab.spoke.daemon_on_trial(&[], &folder, &[]).unwrap();
    const WIDE: &str = "tcp/0.0.0.0:5432";
    assert_eq!(try_bind(&lab.spoke, WIDE), "0.0.0.0:5432");
    assert_eq!(lab.spoke.spokeguard(&daemon.arguments(&["confirm"])).unwrap().code, Some(0));
    await_refused(&lab.spoke, &daemon, WIDE);
}

#[test]
fn the_guard_outlives_its_daemon_and_can_be_put_aside() {
    if lacking(&NEEDS) {
        return;
    }
    let lab = Lab::plain();
    let spoke = &lab.spoke;
    let policy = service_policy(&lab);
    const WIDE: &str = "tcp/0.0.0.0:5432";
    let mut daemon = spoke.daemon(&policy).unwrap();
    let folder = daemon.folder().to_path_buf();
    assert_eq!(try_bind(spoke, WIDE), REFUSED);
    daemon.kill_9().unwrap();
    assert_eq!(try_bind(spoke, WIDE), REFUSED, "the guard died with its daemon");

    // Adopted, with its count; and the refusals from before are still told.
    let daemon = spoke.daemon_in(&folder, &[]).unwrap();
    assert_eq!(try_bind(spoke, WIDE), REFUSED);
    await_metric(&lab, TOTAL, 3);
    finding_of(spoke, &daemon, WIDE);

    // Taken off behind its back, it comes back.
    let links = spoke.path("/sys/fs/bpf/spokeguard/binds1/links");
    for name in ["bind4", "bind6"] {
        fs::remove_file(links.join(name)).unwrap();
    }
    wait_until(2 * LONG, "the guard is back", || links.join("bind6").exists().then_some(()))
        .unwrap_or_else(|error| panic!("{error:#}\n{}", daemon.running.log()));
    await_refused(spoke, &daemon, WIDE);

    // The emergency exit, beside a running daemon, until that starts again.
    let lifted = spoke.spokeguard(&daemon.arguments(&["release", "--binds"])).unwrap();
    assert_eq!(lifted.code, Some(0), "{}", lifted.all());
    assert_ne!(try_bind(spoke, WIDE), REFUSED);
    await_metric(&lab, HELD, 0);
    let told = wait_until(LONG, "a finding of the lifted guard", || {
        let found = findings(&status(spoke, &daemon), "control-unproven");
        found.into_iter().find(|f| f["subject"] == "control binds")
    });
    assert_eq!(told.unwrap()["severity"], "low");
    assert_ne!(try_bind(spoke, WIDE), REFUSED, "put back by the daemon");
    drop(daemon);
    let mut daemon = spoke.daemon_in(&folder, &[]).unwrap();
    assert_eq!(try_bind(spoke, WIDE), REFUSED);

    // Without daemon: `release` takes all of it away.
    daemon.running.signal(Signal::TERM).unwrap();
    daemon.running.wait(LONG).unwrap();
    assert_eq!(try_bind(spoke, WIDE), REFUSED, "stopping opens nothing");
    let released = spoke.spokeguard(&daemon.arguments(&["release"])).unwrap();
    assert_eq!(released.code, Some(0), "{}", released.all());
    assert_ne!(try_bind(spoke, WIDE), REFUSED);
    assert!(!spoke.path("/sys/fs/bpf/spokeguard/binds1").exists());

    // Audit mode counts and refuses nothing, and says what it would have refused.
    let expected = predicted(&policy);
    let audited = expected.iter().filter(|(_, refused)| *refused).count() as u64;
    let audit = format!("{policy}[enforce]\nmode = \"audit\"\n");
    fs::write(folder.join("policy.toml"), &audit).unwrap();
    let daemon = spoke.daemon_in(&folder, &[]).unwrap();
    all_as_predicted(spoke, &expected.iter().map(|(what, _)| (what.clone(), false)).collect::<Vec<_>>());
    await_metric(&lab, TOTAL, audited);
    assert_eq!(metric(&lab, HELD), Some(0));
    let told = wait_until(LONG, "a prediction", || findings(&status(spoke, &daemon), "bind-refused").pop());
    let finding = told.unwrap();
    assert!(finding["found"].as_str().unwrap().starts_with("would have been refused"), "{finding:#}");
    assert_eq!(finding["severity"], "low");
    drop(daemon);

    // Not wanted: what is there from before goes.
    fs::write(folder.join("policy.toml"), format!("{policy}[enforce]\nbinds = false\n")).unwrap();
    let _daemon = spoke.daemon_in(&folder, &[]).unwrap();
    assert_ne!(try_bind(spoke, WIDE), REFUSED);
    assert!(!spoke.path("/sys/fs/bpf/spokeguard/binds1").exists());
}

#[test]
fn sshd_is_moved_to_the_mesh_address_even_before_that_is_there() {
    if lacking(&[Need::Lab, Need::Cgroup2, Need::Sshd, Need::Spokeguard]) {
        return;
    }
    let lab = Lab::plain();
    let spoke = &lab.spoke;
    // Without our firewall, so that nothing but the binding keeps strangers out.
    let policy = plain_policy(&lab).replace("bind = \"mesh\"", "bind = \"mesh\"\nrebind = true")
        + "[enforce]\nfirewall = false\n";
    let nonlocal =
        || spoke.sh("cat /proc/sys/net/ipv4/ip_nonlocal_bind /proc/sys/net/ipv6/ip_nonlocal_bind").unwrap();
    assert_eq!(nonlocal(), "0\n0\n");
    let open = |lab: &Lab| lab.internet.connect(SocketAddr::new(SPOKE_PUBLIC, 22), LONG) == Answer::Open;
    let wide = spoke.sshd(22, &["0.0.0.0", "::"], "").unwrap();
    assert!(open(&lab), "without the guard a stranger gets to sshd");
    drop(wide);

    let mut daemon = spoke.daemon(&policy).unwrap();
    // One socket for both families goes where the hub comes from.
    let both = try_bind(spoke, "tcp/[::]:22/dual");
    assert_eq!(both, format!("[::ffff:{SPOKE_MESH}]:22"));
    // The tunnel is late: its address comes after sshd.
    spoke.ok(&["ip", "address", "del", &format!("{SPOKE_MESH}/24"), "dev", "wg0"]).unwrap();
    let sshd = spoke.sshd(22, &["0.0.0.0", "::"], "").unwrap();
    let listening = spoke.ok(&["ss", "-Hltn", "sport", "=", ":22"]).unwrap();
    let mut listening: Vec<&str> =
        listening.lines().filter_map(|line| line.split_whitespace().nth(3)).collect();
    listening.sort_unstable();
    assert_eq!(listening, [format!("{SPOKE_MESH}:22"), format!("[{SPOKE_MESH_V6}]:22")]);
    for public in [SPOKE_PUBLIC, SPOKE_PUBLIC_V6] {
        assert_eq!(lab.internet.connect(SocketAddr::new(public, 22), LONG), Answer::Refused);
    }
    assert_ne!(lab.hub.connect(SocketAddr::new(SPOKE_MESH, 22), SHORT), Answer::Open, "not there yet");
    spoke.ok(&["ip", "address", "add", &format!("{SPOKE_MESH}/24"), "dev", "wg0"]).unwrap();
    wait_until(LONG, "the hub gets in", || {
        let login = sshd.login(&lab.hub, SPOKE_MESH, "echo $SSH_CONNECTION").unwrap();
        login.stdout.starts_with(&HUB_MESH.to_string()).then_some(())
    })
    .unwrap();
    drop(sshd);
    // Another port is not sshd's, and is refused rather than moved.
    assert_eq!(try_bind(spoke, "tcp/0.0.0.0:2222"), REFUSED);

    daemon.running.signal(Signal::TERM).unwrap();
    daemon.running.wait(LONG).unwrap();
    let released = spoke.spokeguard(&daemon.arguments(&["release"])).unwrap();
    assert_eq!(released.code, Some(0), "{}", released.all());
    assert_eq!(nonlocal(), "0\n0\n", "what we switched on is off again");

    // With no IPv6 in the mesh. systemd would give up an ssh.socket one of whose two binds is refused.
    let four = policy.replace(
        &format!("address = [\"{SPOKE_MESH}\", \"{SPOKE_MESH_V6}\"]"),
        &format!("address = [\"{SPOKE_MESH}\"]"),
    );
    assert_ne!(four, policy);
    let mut daemon = spoke.daemon(&four).unwrap();
    wait_until(LONG, "both are moved", || {
        let moved = try_binds(spoke, &["tcp/0.0.0.0:22".to_owned(), "tcp/[::]:22".to_owned()]);
        (moved == [format!("{SPOKE_MESH}:22"), "[::1]:22".to_owned()]).then_some(())
    })
    .unwrap();
    daemon.running.signal(Signal::TERM).unwrap();
    daemon.running.wait(LONG).unwrap();
    assert_eq!(spoke.spokeguard(&daemon.arguments(&["release"])).unwrap().code, Some(0));

    let _wide = spoke.sshd(22, &["0.0.0.0", "::"], "").unwrap();
    wait_until(Duration::from_secs(5), "released", || open(&lab).then_some(())).unwrap();
}
