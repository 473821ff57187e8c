//! What was sent is what is counted, and nothing is opened or reset, while the daemon is killed, started,
//! reloaded and upgraded under traffic.

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use aya::maps::{Array, Map, MapData, PerCpuArray, PerCpuValues};
use lab::{
    Daemon, Lab, Need, Node, SPOKE_MESH, SPOKE_MESH_V6, SPOKE_PUBLIC, SPOKE_PUBLIC_V6, Signal, Sshd,
    as_linux_6_1, lacking, wait_until,
};
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use crate::counters::{interface, quiet};
use crate::daemon::{LONG, status};
use crate::metrics::{fresh, scrape, sum};

const PINS: &str = "/sys/fs/bpf/spokeguard";
const PUBLIC: [IpAddr; 2] = [SPOKE_PUBLIC, SPOKE_PUBLIC_V6];
const MESH: [IpAddr; 2] = [SPOKE_MESH, SPOKE_MESH_V6];
/// A service that comes and goes by policy, and whose traffic never stops.
const ECHO: &str = "[[mesh.service]]\nname = \"echo\"\nudp = [4500]\nfrom = \"mesh\"\n";
const OTHERS: &str = "[[mesh.service]]\nname = \"cache\"\ntcp = [7000]\nudp = [7001]\nfrom = \"mesh\"\n";

#[test]
fn nothing_is_miscounted_opened_or_reset_whatever_becomes_of_the_daemon() {
    if lacking(&[Need::Lab, Need::Spokeguard, Need::Sshd]) {
        return;
    }
    nothing_is_miscounted(&Lab::plain(), &[], if is_long() { [20, 10, 8] } else { [6, 4, 2] });
}

/// With filters of clsact where there is no tcx, and an audit's table where there are no netfilter programs.
#[test]
fn nothing_is_miscounted_by_the_means_of_linux_6_1() {
    if lacking(&[Need::Lab, Need::Spokeguard, Need::Sshd, Need::Compiler]) {
        return;
    }
    let lab = Lab::plain();
    let older = as_linux_6_1(&lab.dir).unwrap();
    let older = older.each_ref().map(String::as_str);
    nothing_is_miscounted(&lab, &older, if is_long() { [10, 4, 8] } else { [2, 1, 3] });
    let filters = lab.spoke.ok(&["tc", "filter", "show", "dev", "eth0", "ingress"]).unwrap();
    assert!(filters.contains("in_eth_public"), "it knew better: {filters}");
}

/// `wrapper`: what the daemon is started below; then how often it is started anew, how often with another policy, and
/// how often it is killed in an audit.
fn nothing_is_miscounted(lab: &Lab, wrapper: &[&str], [restarts, reloads, audits]: [usize; 3]) {
    let _web = lab.spoke.listen("web", &["tcp/[::]:443", "tcp/[::]:5432"]).unwrap();
    quiet(lab);
    watch(&lab.internet);
    let sshd = lab.spoke.sshd(22, &[&SPOKE_MESH.to_string()], "").unwrap();
    let folder = lab.dir.join("guard");
    fs::create_dir(&folder).unwrap();
    let policy = lab.plain_policy() + ECHO;
    fs::write(folder.join("policy.toml"), &policy).unwrap();
    let start = || lab.spoke.daemon_under(wrapper, &folder, &[]).unwrap();
    let mut daemon = start();
    audited(lab);

    let interface = || ["rx_packets", "tx_packets"].map(|what| interface(&lab.spoke, "eth0", what));
    // Between the two nothing went by.
    let (kernel, before) = wait_until(LONG, "a moment of silence", || {
        let (kernel, before) = (interface(), fresh(&lab.hub));
        (interface() == kernel).then_some((kernel, before))
    })
    .unwrap();
    let stop = AtomicBool::new(false);
    let sent = std::thread::scope(|scope| {
        let sender = scope.spawn(|| send(lab, &sshd, &stop));
        // A failed assertion beside ends the traffic, too.
        let ended = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            for round in 0..restarts {
                if round % 2 == 0 {
                    daemon.kill_9().unwrap();
                } else {
                    assert!(daemon.running.stop().unwrap().success());
                }
                // First what ABI 1 left: no carried rows. Last, one that had carried some itself.
                if round == 0 || round == restarts - 1 {
                    as_of_another_abi(&lab.spoke, round == 0);
                }
                daemon = start();
                if round < reloads {
                    reload(lab, &mut daemon, &policy, round);
                }
            }
            for round in 0..audits {
                daemon.kill_9().unwrap();
                daemon = start();
                wait_until(LONG, "an audit", || is_locked(&folder.join("run/audit.lock")).then_some(()))
                    .unwrap();
                std::thread::sleep(AUDIT / audits as u32 * round as u32);
            }
            daemon.kill_9().unwrap();
            daemon = start();
        }));
        stop.store(true, Ordering::Relaxed);
        let sent = sender.join().unwrap();
        ended.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        sent
    })
    .unwrap();

    assert!(sent.refused > 1000 && sent.mesh > 1000 && sent.served > 500 && sent.probed > 20, "{sent:?}");
    audited(lab);
    let grown =
        |now: &str, name: &str, labels: &[(&str, &str)]| sum(now, name, labels) - sum(&before, name, labels);
    let counted = |now: &str| {
        let udp =
            |scope| grown(now, "packets_total", &[("scope", scope), ("direction", "in"), ("proto", "udp")]);
        let dropped = |rule| grown(now, "dropped_packets_total", &[("rule", rule)]);
        let denied = grown(now, "connection_attempts_total", &[("verdict", "denied")]);
        let served = grown(now, "connection_attempts_total", &[("verdict", "allowed"), ("service", "https")]);
        [udp("public"), udp("mesh"), dropped("public-udp"), dropped("public-tcp"), denied, served]
    };
    let expected =
        [sent.refused, sent.mesh, sent.refused, sent.probed, sent.probed, sent.served].map(|n| n as f64);
    // The last packets are on their way.
    let agreed = wait_until(LONG, "counts", || (counted(&fresh(&lab.hub)) == expected).then_some(()));
    let after = fresh(&lab.hub);
    assert!(agreed.is_ok(), "counted {:?}\n   sent {expected:?}", counted(&after));
    // And everything else that went by, both ways.
    let everything = || {
        let now = fresh(&lab.hub);
        let had = interface();
        let all = |direction| grown(&now, "packets_total", &[("scope", "public"), ("direction", direction)]);
        ([all("in"), all("out")], [had[0] - kernel[0], had[1] - kernel[1]])
    };
    wait_until(LONG, "as many as the interface had", || {
        let (counted, had) = everything();
        (counted == had).then_some(())
    })
    .unwrap_or_else(|error| panic!("{error}: counted in and out, and what it had: {:?}", everything()));
    let created = |body: &str| sum(body, "counters_created_seconds", &[]);
    assert!(created(&before) > 1e9, "{}", created(&before));
    assert_eq!(created(&after), created(&before), "counting began when it began");
    assert_eq!(seen(&lab.internet), BTreeMap::from([("answered".to_owned(), 0), ("resets".to_owned(), 0)]));

    interrupted_moves_count_once(lab, daemon, &start, &after);
}

/// As long as an audit takes here.
const AUDIT: Duration = Duration::from_millis(400);

/// One that was killed leaves the file.
fn is_locked(path: &Path) -> bool {
    let file = fs::File::open(path);
    file.is_ok_and(|file| flock(&file, FlockOperation::NonBlockingLockShared) == Err(Errno::WOULDBLOCK))
}

/// Everything at full length, as for a release.
fn is_long() -> bool {
    std::env::var_os("SPOKEGUARD_ALL").is_some_and(|all| !all.is_empty())
}

fn audited(lab: &Lab) {
    wait_until(3 * LONG, "an audit", || {
        fresh(&lab.hub).contains("spokeguard_audit_age_seconds").then_some(())
    })
    .unwrap();
}

/// An answer of 5432 to the stranger, and any reset of his connections: what reaches his host is counted
/// before anything of it can lose it.
fn watch(node: &Node) {
    node.nft(
        "add table inet watch
         add counter inet watch answered
         add counter inet watch resets
         add chain inet watch in { type filter hook input priority -300; }
         add rule inet watch in tcp sport 5432 tcp flags & (syn | ack) == syn | ack counter name answered
         add rule inet watch in tcp sport 443 tcp flags & rst == rst counter name resets",
    )
    .unwrap();
}

fn seen(node: &Node) -> BTreeMap<String, u64> {
    let text = node.ok(&["nft", "-j", "list", "counters", "table", "inet", "watch"]).unwrap();
    let document: serde_json::Value = serde_json::from_str(&text).unwrap();
    let counters = document["nftables"].as_array().unwrap().iter().map(|object| &object["counter"]);
    counters.filter_map(|c| Some((c["name"].as_str()?.to_owned(), c["packets"].as_u64()?))).collect()
}

/// What was sent, and not lost on the way out.
#[derive(Clone, Copy, Debug, Default)]
struct Sent {
    /// Datagrams that strangers sent to a port that is closed.
    refused: u64,
    /// Datagrams through the mesh, to a port that is open now and then.
    mesh: u64,
    /// Connections of strangers to 443, each with its answer.
    served: u64,
    /// First packets of strangers to 5432.
    probed: u64,
}

/// All traffic at once, until it is to stop. A connection that fails or is reset is an error.
fn send(lab: &Lab, sshd: &Sshd, stop: &AtomicBool) -> Result<Sent> {
    std::thread::scope(|scope| {
        let refused = scope.spawn(|| datagrams(&lab.internet, PUBLIC, 4000, stop));
        let mesh = scope.spawn(|| datagrams(&lab.hub, MESH, 4500, stop));
        let served = scope.spawn(|| connections(&lab.internet, stop).context("a connection to 443"));
        let probed = scope.spawn(|| probes(&lab.internet, stop));
        let held = scope.spawn(|| hold(sshd, &lab.hub, stop).context("the ssh connection that is held"));
        let failed = "a sender panicked";
        held.join().expect(failed)?;
        Ok(Sent {
            refused: refused.join().expect(failed)?,
            mesh: mesh.join().expect(failed)?,
            served: served.join().expect(failed)?,
            probed: probed.join().expect(failed)?,
        })
    })
}

/// Between two packets of a sender. A processor that is emulated would do nothing but send.
fn pause(ms: u64) -> Duration {
    Duration::from_millis(ms) * lab::times("SPOKEGUARD_PAUSES")
}

fn datagrams(node: &Node, to: [IpAddr; 2], port: u16, stop: &AtomicBool) -> Result<u64> {
    node.inside(|| {
        let sockets = [UdpSocket::bind("0.0.0.0:0")?, UdpSocket::bind("[::]:0")?];
        let mut sent = 0;
        while !stop.load(Ordering::Relaxed) {
            for (socket, to) in sockets.iter().zip(to) {
                for _ in 0..5 {
                    sent += u64::from(socket.send_to(b"count me", (to, port)).is_ok());
                }
            }
            std::thread::sleep(pause(3));
        }
        Ok(sent)
    })
}

/// A thousand new connections a second, as far as this machine gets.
fn connections(node: &Node, stop: &AtomicBool) -> Result<u64> {
    let each = pause(1);
    node.inside(|| {
        let mut due = Instant::now();
        let mut served = 0;
        while !stop.load(Ordering::Relaxed) {
            let to = SocketAddr::new(PUBLIC[served as usize % 2], 443);
            let mut stream = TcpStream::connect_timeout(&to, LONG)?;
            stream.set_read_timeout(Some(LONG))?;
            let mut said = String::new();
            stream.read_to_string(&mut said)?;
            ensure!(said == "web\n", "it said {said:?}");
            served += 1;
            due = (due + each).max(Instant::now() - 50 * each);
            std::thread::sleep(due.saturating_duration_since(Instant::now()));
        }
        Ok(served)
    })
}

/// Each gives up before it would send a second packet.
fn probes(node: &Node, stop: &AtomicBool) -> Result<u64> {
    node.inside(|| {
        let mut probed = 0;
        while !stop.load(Ordering::Relaxed) {
            let to = SocketAddr::new(PUBLIC[probed as usize % 2], 5432);
            let met = TcpStream::connect_timeout(&to, Duration::from_millis(20));
            ensure!(met.is_err(), "5432 let a stranger in");
            probed += 1;
        }
        Ok(probed)
    })
}

/// One login of the hub's at a real sshd, in use the whole time.
fn hold(sshd: &Sshd, hub: &Node, stop: &AtomicBool) -> Result<()> {
    let mut session = sshd.session(hub, SPOKE_MESH, "cat")?;
    let (mut into, mut out) = (session.stdin.take().unwrap(), session.stdout.take().unwrap());
    while !stop.load(Ordering::Relaxed) {
        let mut heard = [0u8; 1];
        into.write_all(b"x")?;
        out.read_exact(&mut heard)?;
        std::thread::sleep(pause(5));
    }
    drop(into);
    let ended = session.wait()?;
    ensure!(ended.success(), "it ended with {ended}");
    Ok(())
}

/// Another policy each time, on SIGHUP or by the change of the file alone: services come and go.
fn reload(lab: &Lab, daemon: &mut Daemon, policy: &str, round: usize) {
    let known = |daemon: &Daemon| status(&lab.spoke, daemon)["daemon"]["policy"].clone();
    let before = known(daemon);
    let text = match round % 3 {
        0 => policy.replace(ECHO, ""),
        1 => policy.replace(ECHO, OTHERS),
        _ => format!("{policy}{OTHERS}"),
    };
    let beside = daemon.policy.with_extension("new");
    fs::write(&beside, text).unwrap();
    fs::rename(&beside, &daemon.policy).unwrap();
    if round.is_multiple_of(2) {
        daemon.running.signal(Signal::HUP).unwrap();
    }
    wait_until(LONG, "the other policy", || (known(daemon) != before).then_some(()))
        .unwrap_or_else(|error| panic!("{error:#}, in round {round}\n{}", daemon.running.log()));
    // What is on trial is confirmed by the hub's next connection.
    wait_until(LONG, "the other policy confirmed", || {
        scrape(&lab.hub);
        (status(&lab.spoke, daemon)["daemon"]["rules"] == "confirmed").then_some(())
    })
    .unwrap();
}

/// The pins in force as they would lie there if a daemon of another ABI had left them: with programs and
/// maps of its own, which go on counting.
fn as_of_another_abi(node: &Node, first: bool) {
    let pins = node.path(PINS);
    fs::rename(own_pins(node), pins.join("abi1")).unwrap();
    if first {
        fs::remove_file(pins.join("abi1/maps/CARRIED")).unwrap();
        let about = MapData::from_pin(pins.join("abi1/maps/BUILD")).unwrap();
        Array::try_from(Map::Array(about)).unwrap().set(CREATED, 0u64, 0).unwrap();
    }
    fs::rename(pins.join("guard1"), pins.join("guard0")).unwrap();
}

/// The words of the map BUILD.
const MOVE: u32 = 1;
const CREATED: u32 = 2;

/// Where this version's counters are pinned.
fn own_pins(node: &Node) -> PathBuf {
    let entries = fs::read_dir(node.path(PINS)).unwrap().map(|entry| entry.unwrap().path());
    let mut abi: Vec<PathBuf> =
        entries.filter(|path| path.file_name().unwrap().to_str().unwrap().starts_with("abi")).collect();
    assert_eq!(abi.len(), 1, "what was taken over is gone: {abi:?}");
    abi.remove(0)
}

/// Killed while it moved counts from one row to another, in the two places that matter: after the note and
/// after the sum. The note is at the end of the carried rows and in the second word of BUILD.
fn interrupted_moves_count_once(lab: &Lab, mut daemon: Daemon, start: &dyn Fn() -> Daemon, after: &str) {
    const WORDS: usize = 28;
    const NOTE: u32 = 259;
    /// Of UDP without a service.
    const AT: u32 = 1;
    let udp = |body: &str| sum(body, "packets_total", &[("direction", "in"), ("proto", "udp")]);
    assert!(udp(after) > 1000.0);
    for summed in [false, true] {
        daemon.kill_9().unwrap();
        let maps = own_pins(&lab.spoke).join("maps");
        let map = |name: &str| MapData::from_pin(maps.join(name)).unwrap();
        let rows = map("ROWS");
        let id = u64::from(rows.info().unwrap().id());
        let mut rows: PerCpuArray<_, [u64; WORDS]> = PerCpuArray::try_from(Map::PerCpuArray(rows)).unwrap();
        let mut carried: Array<_, [u64; WORDS]> = Array::try_from(Map::Array(map("CARRIED"))).unwrap();
        let mut about: Array<_, u64> = Array::try_from(Map::Array(map("BUILD"))).unwrap();
        let counting = rows.get(&AT, 0).unwrap();
        if summed {
            // Something to lose again: the first round left nothing.
            let mut cpus: Vec<[u64; WORDS]> = counting.iter().copied().collect();
            cpus[0][0] += 1000;
            rows.set(AT, PerCpuValues::try_from(cpus).unwrap(), 0).unwrap();
        }
        let counting = rows.get(&AT, 0).unwrap();
        let mut whole = carried.get(&AT, 0).unwrap();
        for cpu in counting.iter() {
            whole.iter_mut().zip(cpu).for_each(|(sum, part)| *sum += part);
        }
        assert_ne!(whole, carried.get(&AT, 0).unwrap(), "there is something to move");
        carried.set(NOTE, whole, 0).unwrap();
        about.set(MOVE, id << 32 | u64::from(AT) << 16 | u64::from(AT), 0).unwrap();
        if summed {
            carried.set(AT, whole, 0).unwrap();
        }
        daemon = start();
        let expected = udp(after) + if summed { 1000.0 } else { 0.0 };
        assert_eq!(udp(&fresh(&lab.hub)), expected, "summed: {summed}");
        assert_eq!(about.get(&MOVE, 0).unwrap(), 0);
    }
}
