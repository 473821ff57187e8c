//! The lab itself: what a test stands on must be able to fail, too.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::time::Duration;

use lab::{
    Answer, CONTAINER, HUB_MESH, HUB_MESH_V6, Lab, Mesh, Need, OUTSIDER, SPOKE_MESH, SPOKE_MESH_V6,
    SPOKE_PUBLIC, SPOKE_PUBLIC_V6, Shape, lacking,
};

const SHORT: Duration = Duration::from_millis(250);
const LONG: Duration = Duration::from_secs(5);

#[test]
fn hub_and_spoke_talk_through_a_real_tunnel_and_not_without_it() {
    if lacking(&[Need::Lab, Need::WireGuard]) {
        return;
    }
    let lab = Lab::new();
    let _echo = lab.spoke.listen("echo", &["udp/[::]:7"]).unwrap();
    for spoke in [SPOKE_MESH, SPOKE_MESH_V6] {
        assert_eq!(lab.hub.ask_udp(SocketAddr::new(spoke, 7), LONG).unwrap().as_deref(), Some(&b"?"[..]));
    }
    assert_eq!(lab.spoke.connect(SocketAddr::new(HUB_MESH_V6, 9), LONG), Answer::Refused);
    let peers = lab.spoke.ok(&["wg", "show", "wg0", "dump"]).unwrap();
    let hub: Vec<&str> = peers.lines().nth(1).unwrap().split('\t').collect();
    assert_eq!(hub[0], lab.keys.hub.public);
    assert_eq!(hub[2], "203.0.113.47:51820");
    assert_ne!(hub[4], "0", "a handshake took place");
    assert_eq!(hub[7], "25", "keepalive");
    // What crosses the internet is the tunnel, not the mesh's own packets.
    lab.internet.nft("table inet t { chain f { type filter hook forward priority 0; udp dport 51820 drop; udp sport 51820 drop; }; }").unwrap();
    assert_eq!(lab.hub.connect(SocketAddr::new(SPOKE_MESH, 9), SHORT), Answer::Silent);
}

#[test]
fn an_outsider_sees_every_port_of_an_unprotected_spoke_and_no_other() {
    if lacking(&[Need::Lab, Need::Nmap]) {
        return;
    }
    let lab = Lab::shaped(Shape { mesh: Mesh::Plain, container: true });
    let _web = lab.spoke.web().unwrap();
    let _database = lab.spoke.listen("postgres", &["tcp/0.0.0.0:5432"]).unwrap();
    let _private = lab.spoke.listen("redis", &["tcp/127.0.0.1:6379"]).unwrap();
    let _in_container = lab.container.as_ref().unwrap().listen("app", &["tcp/[::]:8000"]).unwrap();
    lab.publish(8080, 8000).unwrap();
    let ports = "22,80,443,5432,6379,8000,8080";
    let v4 = lab.internet.nmap(SPOKE_PUBLIC, ports).unwrap();
    assert_eq!(v4.open(), BTreeSet::from([80, 443, 5432, 8080]), "{v4:?}");
    assert_eq!(lab.internet.nmap_open(SPOKE_PUBLIC_V6, ports).unwrap(), BTreeSet::from([80, 443, 8080]));
    assert_eq!(lab.internet.nmap_open(SPOKE_PUBLIC, "-").unwrap(), v4.open());
    // A firewall in the way reads as filtered and not as closed.
    lab.spoke
        .nft("table inet t { chain i { type filter hook input priority 0; tcp dport 5432 drop; }; }")
        .unwrap();
    let shut = lab.internet.nmap(SPOKE_PUBLIC, "443,5432").unwrap();
    assert_eq!((shut.ports[&443].as_str(), shut.ports[&5432].as_str()), ("open", "filtered"));
    assert_eq!(lab.internet.connect(SocketAddr::new(SPOKE_PUBLIC, 5432), SHORT), Answer::Silent);
    assert_eq!(lab.internet.connect(SocketAddr::new(SPOKE_PUBLIC, 6379), SHORT), Answer::Refused);
    assert_eq!(lab.internet.connect(SocketAddr::new(SPOKE_PUBLIC, 443), LONG), Answer::Open);
    assert_eq!(lab.internet.connect(SocketAddr::new(CONTAINER, 8000), SHORT), Answer::Unreachable);
}

#[test]
fn listeners_answer_under_the_name_they_were_given() {
    if lacking(&[Need::Lab]) {
        return;
    }
    let lab = Lab::plain();
    let database = lab.spoke.listen("postgres", &["tcp/127.0.0.1:20000+2"]).unwrap();
    let seen = lab.spoke.ok(&["ss", "-Hltnp"]).unwrap();
    let owner = format!("((\"postgres\",pid={},", database.running.pid());
    assert_eq!(seen.lines().filter(|line| line.contains(&owner)).count(), 3, "{seen}");
    let _dns = lab.spoke.listen_udp(SPOKE_PUBLIC, 53).unwrap();
    let dns = SocketAddr::new(SPOKE_PUBLIC, 53);
    assert_eq!(lab.internet.ask_udp(dns, LONG).unwrap().as_deref(), Some(&b"?"[..]));
    assert_eq!(lab.internet.ask_udp(SocketAddr::new(SPOKE_PUBLIC, 54), SHORT).unwrap(), None);
    let _web = lab.spoke.web().unwrap();
    let page = lab.internet.http_get(SocketAddr::new(SPOKE_PUBLIC_V6, 80), "/", &[]).unwrap();
    assert_eq!((page.status, page.body.as_str()), (200, "web\n"));
    // Bound to one address, not to all.
    assert_eq!(lab.hub.connect(SocketAddr::new(SPOKE_MESH, 20000), SHORT), Answer::Refused);
    let taken = lab.spoke.listen("second", &["tcp/[::]:80"]).err().unwrap().to_string();
    assert!(taken.contains("Address already in use"), "{taken}");
}

#[test]
fn ssh_reaches_the_spoke_through_the_mesh_only_when_it_listens_there() {
    if lacking(&[Need::Lab, Need::Sshd]) {
        return;
    }
    let lab = Lab::plain();
    let sshd = lab.spoke.sshd(22, &[&SPOKE_MESH.to_string(), &SPOKE_MESH_V6.to_string()], "").unwrap();
    for (from, to) in [(HUB_MESH, SPOKE_MESH), (HUB_MESH_V6, SPOKE_MESH_V6)] {
        let login = sshd.login(&lab.hub, to, "echo $SSH_CONNECTION").unwrap();
        assert_eq!(login.code, Some(0), "{}", login.all());
        assert!(login.stdout.starts_with(&from.to_string()), "{}", login.all());
    }
    assert_eq!(sshd.login(&lab.internet, SPOKE_PUBLIC, "true").unwrap().code, Some(255));
}

#[test]
fn a_real_prometheus_scrapes_and_answers() {
    if lacking(&[Need::Lab, Need::Prometheus]) {
        return;
    }
    let lab = Lab::plain();
    let nothing = SocketAddr::new(SPOKE_MESH, 9984);
    let itself: SocketAddr = "127.0.0.1:9090".parse().unwrap();
    let prometheus = lab.hub.prometheus(&[itself, nothing]).unwrap();
    let up = |target: &SocketAddr| {
        // It looks at its list of targets every 5 s, the first time too.
        lab::wait_until(4 * LONG, "the target was scraped", || {
            let series = prometheus.query(&lab.hub, &format!("up{{instance=\"{target}\"}}")).unwrap();
            series.first().map(|(_, value)| *value)
        })
    };
    assert_eq!(up(&itself).unwrap(), 1.0);
    assert_eq!(up(&nothing).unwrap(), 0.0);
    assert!(prometheus.query(&lab.hub, "up{").is_err());
}

#[test]
fn nodes_have_their_own_bpffs_and_sockets_but_the_machines_cgroups() {
    if lacking(&[Need::Lab]) {
        return;
    }
    let lab = Lab::plain();
    lab.spoke.sh("mkdir /sys/fs/bpf/here; touch /run/wireguard/here; test -e /sys/fs/cgroup/cgroup.procs -o -d /sys/fs/cgroup/unified").unwrap();
    assert!(lab.spoke.path("/sys/fs/bpf/here").exists());
    assert!(!lab.hub.path("/sys/fs/bpf/here").exists());
    assert!(!lab.hub.path("/run/wireguard/here").exists());
    assert!(!Path::new("/sys/fs/bpf/here").exists());
    // The policy is a file of this machine and can be read in there.
    let policy = lab.file("policy.toml", &lab.policy()).unwrap();
    assert_eq!(lab.spoke.ok(&["cat", &policy.display().to_string()]).unwrap(), lab.policy());
    let links = lab.spoke.ok(&["ip", "-br", "link"]).unwrap();
    assert_eq!(links.lines().count(), 3, "lo, eth0 and wg0: {links}");
}

#[test]
fn two_labs_at_once_do_not_meet() {
    if lacking(&[Need::Lab]) {
        return;
    }
    let (one, other) = (Lab::plain(), Lab::plain());
    assert_ne!(one.prefix(), other.prefix());
    let _web = one.spoke.web().unwrap();
    let web = SocketAddr::new(SPOKE_PUBLIC, 80);
    assert_eq!(one.internet.connect(web, LONG), Answer::Open);
    assert_eq!(other.internet.connect(web, SHORT), Answer::Refused);
}

#[test]
fn nothing_is_left_of_a_lab_that_was_dropped() {
    if lacking(&[Need::Lab, Need::WireGuard]) {
        return;
    }
    let lab = Lab::new();
    let (prefix, dir) = (lab.prefix().to_string(), lab.dir.clone());
    // Left to themselves on purpose: neither guard nor process group leads to them.
    lab.spoke
        .sh("setsid sleep 4242 >/dev/null 2>&1 & setsid sh -c 'trap \"\" TERM; sleep 4243' >/dev/null 2>&1 &")
        .unwrap();
    let web = lab.spoke.web().unwrap();
    let pids = residents(&prefix);
    // Without a WireGuard of the kernel's own each end of the tunnel is a process.
    let most = if lab::machine::is_tunnel() { 7 } else { 8 };
    assert!(pids.len() >= most, "keepers, tunnel ends, web server and sleepers: {pids:?}");
    drop(lab);
    assert_eq!(alive(&pids), Vec::<i32>::new());
    drop(web);
    assert!(!named(&prefix) && !dir.exists());
}

/// Ctrl-C, a panic that aborts and kill -9 are one to the reaper: its standard input ends.
#[test]
fn nothing_is_left_of_a_lab_whose_program_was_killed() {
    if lacking(&[Need::Lab]) {
        return;
    }
    let mut child = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "netns::a_lab_that_waits_to_be_killed", "--nocapture", "--test-threads=1"])
        .env("SG_LAB_WAIT", "1")
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    use std::io::{BufRead, BufReader};
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let prefix =
        lines.map_while(Result::ok).find_map(|line| Some(line.split_once("lab: ")?.1.to_string())).unwrap();
    // A process enters its control group before its network.
    let pids = lab::wait_until(Duration::from_secs(10), "keepers and a sleeper", || {
        Some(residents(&prefix)).filter(|pids| named(&prefix) && pids.len() >= 4)
    });
    child.kill().unwrap();
    child.wait().unwrap();
    let pids = pids.unwrap();
    lab::wait_until(Duration::from_secs(10), "the reaper cleans up", || {
        let dir = std::env::temp_dir().join(prefix.trim_end_matches('-'));
        (!named(&prefix) && !dir.exists()).then_some(())
    })
    .unwrap();
    assert_eq!(alive(&pids), Vec::<i32>::new());
}

/// The other half of the test above; on its own it has nothing to do.
#[test]
fn a_lab_that_waits_to_be_killed() {
    if std::env::var_os("SG_LAB_WAIT").is_none() {
        return;
    }
    let lab = Lab::plain();
    let _sleeper = lab.spoke.spawn(&["sleep", "4244"]).unwrap();
    println!("\nlab: {}", lab.prefix());
    loop {
        std::thread::park();
    }
}

#[test]
fn a_command_in_a_node_keeps_its_code_folder_and_address() {
    if lacking(&[Need::Lab]) {
        return;
    }
    let lab = Lab::plain();
    let outcome = lab.internet.run(&["sh", "-c", "pwd; exit 7"]).unwrap();
    assert_eq!(outcome.code, Some(7));
    assert_eq!(outcome.stdout.trim(), std::env::current_dir().unwrap().display().to_string());
    assert_eq!(lab.internet.run(&["no-such-program"]).unwrap().code, Some(127));
    assert!(lab.internet.ok(&["false"]).unwrap_err().to_string().contains("false in internet: exit Some(1)"));
    assert!(lab.spoke.nft("add rule inet nowhere x drop").is_err());
    let mine = lab.internet.ok(&["ip", "-br", "-4", "addr", "show", "spoke0"]).unwrap();
    assert!(mine.contains(&IpAddr::to_string(&OUTSIDER)), "{mine}");
}

fn named(prefix: &str) -> bool {
    let entries = std::fs::read_dir("/run/netns").into_iter().flatten().flatten();
    entries.into_iter().any(|entry| entry.file_name().to_string_lossy().starts_with(prefix))
}

/// Those that still run; one that has ended and whose parent has not noticed does not.
fn alive(pids: &[i32]) -> Vec<i32> {
    let runs = |pid: &i32| {
        let state = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        !state.is_empty() && !state.contains(") Z ")
    };
    pids.iter().copied().filter(runs).collect()
}

/// Processes in the lab's namespaces, found the way `ip` does it, not the way the reaper does.
fn residents(prefix: &str) -> Vec<i32> {
    let list = std::process::Command::new("ip").args(["netns", "list"]).output().unwrap();
    let list = String::from_utf8(list.stdout).unwrap();
    let names =
        list.lines().filter_map(|line| line.split(' ').next()).filter(|name| name.starts_with(prefix));
    names
        .flat_map(|name| {
            let pids = std::process::Command::new("ip").args(["netns", "pids", name]).output().unwrap();
            let pids = String::from_utf8(pids.stdout).unwrap();
            pids.lines().map(|line| line.trim().parse().unwrap()).collect::<Vec<i32>>()
        })
        .collect()
}
