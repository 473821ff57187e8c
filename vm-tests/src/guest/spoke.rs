//! Hub, two spokes and an outsider on the kernel's own WireGuard: what the policy promises, and what it refuses.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use lab::{
    Answer, HUB_PUBLIC, Lab, Mesh, Node, SECOND_MESH, SPOKE_MESH, SPOKE_PUBLIC, SPOKE_PUBLIC_V6, Second,
    Shape, Signal, TUNNEL_PORT,
};
use serde_json::Value;

use crate::{LONG, SOON, Steps, blind, codes, found, patiently, patiently_within};

const METRICS: u16 = 9984;
/// Tunnels have no events, and are read every 10 s. The look, the repair and our own look at it take some of the next.
const REPAIRED_WITHIN: Duration = Duration::from_secs(11);
/// The policy lets no handshake be older, which is how long a session of WireGuard's lasts.
const OLDEST_S: u64 = 180;
/// The tunnel is read every 10 s, and we look every 2 s.
const TOLD_WITHIN_S: u64 = 15;
/// Reading twice takes time, and handshakes are told in whole seconds.
const SCRAPED_WITHIN_S: f64 = 3.0;
/// Every open port and its neighbours, those that must be shut, and some of nobody's.
const PORTS: &str = "21-23,79-81,442-444,5431-5433,8079-8081,9983-9985,51819-51821,60000-60050";

/// One that the policy opens, one that it does not, and the tunnel's.
const UDP_PORTS: &str = "443,5353,51820";

/// `quick` ends before it has to wait for handshakes to grow old.
pub fn run(steps: &mut Steps, quick: bool) -> Result<()> {
    let lab = steps.make("a lab of the kernel's WireGuard", || {
        let lab = Lab::build(Shape { mesh: Mesh::WireGuard, container: true })?;
        let link = lab.spoke.ok(&["ip", "-d", "link", "show", "wg0"])?;
        ensure!(link.contains("wireguard"), "wg0 is not the kernel's: {link}");
        Ok((lab, crate::release()?))
    })?;
    let second = steps.make("a second spoke, behind the same hub", || {
        let second = lab.second_spoke()?;
        let seen = patiently("one spoke reaches the other", || {
            let answer = second.node.connect(SocketAddr::new(SPOKE_MESH, 9), SOON);
            (answer == Answer::Refused).then_some(())
        });
        seen.map(|()| (second, format!("{SECOND_MESH} reaches {SPOKE_MESH} through the hub")))
    })?;
    // The kernel's WireGuard has no process: what a policy is wrong about must be found in the kernel.
    let sshd = lab.spoke.sshd(22, &["0.0.0.0", "::"], "KbdInteractiveAuthentication no")?;
    let _database = lab.spoke.listen("postgres", &["tcp/[::]:5432"])?;
    let _web = lab.spoke.web()?;
    let _datagrams = lab.spoke.listen("resolver", &["udp/[::]:443", "udp/[::]:5353"])?;
    let inside = lab.container.as_ref().context("the lab has a container")?;
    let _app = inside.listen("admin-panel", &["tcp/[::]:8000"])?;
    lab.publish(8080, 8000)?;
    let folder = lab.dir.join("guard");
    std::fs::create_dir_all(&folder)?;
    // A hub that moves to another port is a stranger's flow to the firewall, unless the policy names this end's port.
    lab.spoke.ok(&["wg", "set", "wg0", "listen-port", &TUNNEL_PORT.to_string()])?;
    let policy = lab.policy().replace("[mesh]\n", &format!("[mesh]\nlisten_port = {TUNNEL_PORT}\n"));
    let policy = policy.replace("[public]\n", "[public]\nudp = [443]\n");
    let policy = policy + "[[local]]\nname = \"containers\"\ninterfaces = [\"docker0\"]\n";
    let file = folder.join("policy.toml");
    std::fs::write(&file, &policy)?;
    let folders =
        ["--policy", &file.display().to_string(), "--state-dir", &lab.dir.join("look").display().to_string()]
            .map(str::to_owned);
    let look = |verb: &[&str]| -> Result<(Option<i32>, Value)> {
        let words: Vec<String> =
            verb.iter().map(|word| word.to_string()).chain(folders.iter().cloned()).collect();
        let words = [vec![lab::spokeguard()?.display().to_string()], words].concat();
        let outcome = lab.spoke.run_within(LONG, &words)?;
        let json = outcome.json()?;
        Ok((outcome.code, json))
    };

    steps.step("before: everything is open, for nmap and for us", || {
        lab.spoke.ok(&["wg", "set", "wg0", "peer", &lab.keys.hub.public, "persistent-keepalive", "0"])?;
        let open = lab.internet.nmap_open(SPOKE_PUBLIC, PORTS)?;
        ensure!(open == BTreeSet::from([22, 80, 443, 5432, 8080]), "nmap finds {open:?}");
        let answered = datagrams_answered(&lab, SPOKE_PUBLIC)?;
        ensure!(answered == [443, 5353], "datagrams are answered by {answered:?}");
        let (code, report) = look(&["check", "--format", "json", "--no-probe"])?;
        let found = codes(&report);
        for wanted in ["firewall-missing", "listener-exposed", "ssh-bind", "mesh-keepalive", "dnat-exposed"] {
            ensure!(found.contains(wanted), "no {wanted} among {found:?}");
        }
        ensure!(code == Some(1), "exit code {code:?}: {report:#}");
        ensure!(blind(&report).is_empty(), "blind: {:?}", blind(&report));
        Ok(format!("exit 1, {}", found.into_iter().collect::<Vec<_>>().join(" ")))
    })?;
    steps.step("an endpoint that is not the policy's is told, and one that is is not", || {
        let hub = &lab.keys.hub.public;
        let set = |endpoint: &str| lab.spoke.ok(&["wg", "set", "wg0", "peer", hub, "endpoint", endpoint]);
        // Whatever it says brings the kernel back to where that came from.
        let keepalive = |seconds: &str| {
            lab.hub.ok(&["wg", "set", "wg0", "peer", &lab.keys.spoke.public, "persistent-keepalive", seconds])
        };
        keepalive("0")?;
        set("203.0.113.47:51999")?;
        let (_, moved) = look(&["check", "--format", "json", "--no-probe"])?;
        ensure!(codes(&moved).contains("mesh-endpoint"), "{moved:#}");
        set(&format!("{HUB_PUBLIC}:51820"))?;
        let (_, back) = look(&["check", "--format", "json", "--no-probe"])?;
        keepalive("25")?;
        ensure!(!codes(&back).contains("mesh-endpoint"), "{back:#}");
        Ok("mesh-endpoint".to_owned())
    })?;

    let daemon = steps.make("the daemon starts", || {
        let daemon = lab.spoke.daemon_in(&folder, &[])?;
        let detail = format!("ready after {:.1} s", daemon.started_in.as_secs_f64());
        Ok((daemon, detail))
    })?;
    let status = || -> Result<Value> {
        lab.spoke.spokeguard(&daemon.arguments(&["status", "--format", "json"]))?.json()
    };
    steps.step("it holds every control, and is blind to nothing", || {
        let held = all_held(&lab.hub);
        let report = status()?;
        let held = held.with_context(|| format!("{report:#}\n{}", daemon.running.log()))?;
        ensure!(blind(&report).is_empty(), "blind: {:?}", blind(&report));
        Ok(held.join(" "))
    })?;
    steps.step("nmap finds 80 and 443, by IPv4 and IPv6, and no other", || {
        for address in [SPOKE_PUBLIC, SPOKE_PUBLIC_V6] {
            let open = lab.internet.nmap_open(address, PORTS)?;
            ensure!(open == BTreeSet::from([80, 443]), "{address}: {open:?}");
        }
        Ok(PORTS.to_owned())
    })?;
    steps.step("a stranger's datagrams are answered by 443 alone, for nmap and the audit as well", || {
        for address in [SPOKE_PUBLIC, SPOKE_PUBLIC_V6] {
            let answered = datagrams_answered(&lab, address)?;
            ensure!(answered == [443], "{address}: {answered:?}");
            let (ours, _) = audited(&lab, &daemon, address, "udp", UDP_PORTS)?;
            let theirs = lab.internet.nmap_udp_states(address, UDP_PORTS)?;
            let open = |states: &BTreeMap<u16, String>| -> Vec<u16> {
                states.iter().filter(|(_, state)| *state == "open").map(|(port, _)| *port).collect()
            };
            ensure!(open(&ours) == [443] && open(&theirs) == [443], "{address}: {ours:?}, nmap {theirs:?}");
        }
        Ok(UDP_PORTS.to_owned())
    })?;
    steps.step("the audit says of every such port what nmap says", || {
        Ok(format!("{} ports", audited_beside_nmap(&lab, &daemon)?))
    })?;
    steps.step("ssh for the hub through the tunnel, and for nobody else", || {
        let login = sshd.login(&lab.hub, SPOKE_MESH, "echo in")?;
        ensure!(login.stdout.trim() == "in", "{}", login.all());
        nobody_else(&lab, &second, 22)?;
        Ok("no answer for the other spoke, nor for the hub from its public address".to_owned())
    })?;
    steps.step("the hub scrapes through the tunnel, and nobody else does", || {
        let page = scrape(&lab.hub)?;
        let counted = page.lines().filter(|line| {
            line.starts_with("spokeguard_packets_total{") && line.contains("public") && !line.ends_with(" 0")
        });
        ensure!(counted.count() > 0, "no public packet was counted\n{page}");
        nobody_else(&lab, &second, METRICS)?;
        Ok("no answer for the others".to_owned())
    })?;
    if quick {
        return Ok(());
    }
    steps.step("a keepalive of 0 is found and set back by the next look", || {
        let hub = &lab.keys.hub.public;
        // The second comes right after a look, so that it waits for a whole round of them.
        let mut took = Vec::new();
        for _ in 0..2 {
            took.push(keepalive_comes_back(&lab)?);
        }
        let shown = lab.spoke.ok(&["wg", "show", "wg0", "peers"])?;
        ensure!(shown.trim() == hub, "the peers are now {shown}");
        endpoint_is(&lab, TUNNEL_PORT)?;
        Ok(format!("after {took:.1?}; same peer, same endpoint"))
    })?;
    steps.step("the handshake's age is the kernel's", || {
        let mut seen = Vec::new();
        // A new handshake is made after 120 s, so that there are ages such as these.
        for age_s in [40, 90] {
            patiently_within(4 * LONG, "a handshake of that age", || {
                (age_s..110).contains(&handshake_age_s(&lab).ok()?).then_some(())
            })?;
            seen.push(told_as_by_the_kernel(&lab)?);
        }
        Ok(format!("{seen:?} s"))
    })?;
    steps.step("a hub that is cut off is told once its handshake is too old, until it is back", || {
        let told = || Ok::<_, anyhow::Error>(found(&status()?, "mesh-handshake"));
        ensure!(told()?.is_none(), "it is told of a hub that is there");
        lab.internet.nft(
            "table inet cut { chain forward { type filter hook forward priority filter; policy drop; }; }",
        )?;
        let mut ages = Vec::new();
        for (minutes, due_s) in [(3, OLDEST_S + 1), (5, 300)] {
            let words = format!("last handshake: {minutes} min ago");
            let told =
                patiently_within(8 * LONG, &words, || told().ok()?.filter(|told| told.contains(&words)));
            let age_s = handshake_age_s(&lab)?;
            told.with_context(|| format!("the handshake is {age_s} s old"))?;
            ensure!((due_s..=due_s + TOLD_WITHIN_S).contains(&age_s), "{words}, at an age of {age_s} s");
            ages.push(format!("{minutes} min at {age_s} s"));
        }
        ensure!(scrape(&lab.hub).is_err(), "the hub is not cut off, so this proves nothing");
        lab.internet.nft("delete table inet cut")?;
        patiently("the hub scrapes again", || scrape(&lab.hub).ok())?;
        patiently("it is not told any more", || told().ok()?.is_none().then_some(()))?;
        // A scrape may show what was written for the one right before it.
        let mut age = Ok(f64::NAN);
        patiently("the scrape says how old the new handshake is", || {
            age = told_as_by_the_kernel(&lab);
            age.is_ok().then_some(())
        })
        .with_context(|| format!("{age:?}"))?;
        let age = age?;
        ensure!(age < LONG.as_secs_f64(), "the handshake is still {age} s old");
        Ok(format!("told: {}; then {age} s", ages.join(", ")))
    })?;
    steps.step("a hub that moves is followed and told, while ssh and scrape go on", || {
        let mut session = sshd.session(&lab.hub, SPOKE_MESH, "cat")?;
        let (into, out) = (session.stdin.take(), session.stdout.take());
        let (mut into, mut out) = (into.context("a pipe to ssh")?, out.context("a pipe from ssh")?);
        let mut answers = || -> Result<()> {
            into.write_all(b"x")?;
            out.read_exact(&mut [0])?;
            Ok(())
        };
        answers().context("a session before the move")?;
        for port in [TUNNEL_PORT + 1, TUNNEL_PORT] {
            ensure!(endpoint_is(&lab, port).is_err(), "the hub is at {port} already");
            lab.hub.ok(&["wg", "set", "wg0", "listen-port", &port.to_string()])?;
            // Whatever the hub sends, its peers follow.
            answers().with_context(|| format!("a session across the move to {port}"))?;
            endpoint_is(&lab, port)?;
            let login = sshd.login(&lab.hub, SPOKE_MESH, "echo in")?;
            ensure!(login.stdout.trim() == "in", "{}", login.all());
            let moved = port != TUNNEL_PORT;
            let line = "spokeguard_findings{code=\"mesh-endpoint\",severity=\"low\"} 1";
            patiently(&format!("the hub's scrape says of port {port} what is true"), || {
                (scrape(&lab.hub).ok()?.contains(line) == moved).then_some(())
            })?;
            let told = found(&status()?, "mesh-endpoint");
            let wanted = moved.then(|| format!("endpoint {HUB_PUBLIC}:{port}"));
            ensure!(told == wanted, "told {told:?}, wanted {wanted:?}");
        }
        let kinds = events(&daemon, "mesh-endpoint")?;
        ensure!(kinds == ["drift-appeared", "drift-cleared"], "events {kinds:?}");
        drop(into);
        let ended = session.wait()?;
        ensure!(ended.success(), "the session ended with {ended}");
        Ok(kinds.join(", "))
    })?;
    steps.step("a flush is repaired, and the guard refuses meanwhile", || {
        daemon.running.signal(Signal::STOP)?;
        lab.spoke.ok(&["nft", "flush", "ruleset"])?;
        for (address, port) in [(SPOKE_PUBLIC, 22), (SPOKE_PUBLIC, 5432), (SPOKE_PUBLIC_V6, 5432)] {
            let answer = lab.internet.connect(SocketAddr::new(address, port), SOON);
            ensure!(answer == Answer::Silent, "{address} {port} after a flush: {answer:?}");
        }
        let rules = lab.spoke.ok(&["nft", "list", "ruleset"])?;
        // An audit that is under way may have a table of its own.
        ensure!(
            !rules.contains("table inet spokeguard {"),
            "the rules are back, so this proves nothing: {rules}"
        );
        daemon.running.signal(Signal::CONT)?;
        patiently("the table is there again", || {
            lab.spoke.ok(&["nft", "list", "table", "inet", "spokeguard"]).ok()
        })
        .with_context(|| daemon.running.log())?;
        Ok("22 and 5432 did not answer while the daemon slept".to_owned())
    })?;
    steps.step("a bind of every address is refused", || {
        let refused =
            lab.spoke.listen("redis", &["tcp/0.0.0.0:6379"]).err().map(|error| format!("{error:#}"));
        let refused = refused.context("it was not refused")?;
        ensure!(refused.contains("Operation not permitted"), "{refused}");
        let _local = lab.spoke.listen("redis", &["tcp/127.0.0.1:6379"])?;
        Ok("127.0.0.1 is not".to_owned())
    })?;
    let mut daemon = daemon;
    steps.step("what holds outlives the daemon", || {
        daemon.kill_9()?;
        let open = lab.internet.nmap_open(SPOKE_PUBLIC, PORTS)?;
        ensure!(open == BTreeSet::from([80, 443]), "{open:?}");
        let login = sshd.login(&lab.hub, SPOKE_MESH, "echo in")?;
        ensure!(login.stdout.trim() == "in", "{}", login.all());
        Ok("kill -9".to_owned())
    })
}

/// The controls, once the spoke says of each that it is in force.
pub fn all_held(hub: &Node) -> Result<Vec<String>> {
    patiently("all controls are enforced", || {
        let page = scrape(hub).ok()?;
        let (all, held): (Vec<&str>, Vec<&str>) = (page.lines())
            .filter_map(|line| line.strip_prefix("spokeguard_control_enforced{control=")?.rsplit_once(' '))
            .unzip();
        let every = !held.is_empty() && held.iter().all(|value| *value == "1");
        every.then(|| all.into_iter().map(str::to_owned).collect())
    })
}

/// How long the daemon takes to set back a keepalive of 0.
pub fn keepalive_comes_back(lab: &Lab) -> Result<Duration> {
    lab.spoke.ok(&["wg", "set", "wg0", "peer", &lab.keys.hub.public, "persistent-keepalive", "0"])?;
    let begun = Instant::now();
    patiently("the keepalive is 25 s again", || {
        let shown = lab.spoke.ok(&["wg", "show", "wg0", "persistent-keepalive"]).ok()?;
        shown.trim_end().ends_with("\t25").then_some(())
    })?;
    let took = begun.elapsed();
    ensure!(took <= REPAIRED_WITHIN, "it took {took:?}");
    Ok(took)
}

pub fn scrape(hub: &Node) -> Result<String> {
    let answer = hub.http_get(SocketAddr::new(SPOKE_MESH, METRICS), "/metrics", &[])?;
    ensure!(answer.status == 200, "{}: {}", answer.status, answer.body);
    Ok(answer.body)
}

/// The tunnel is the only way in: also for the hub itself, when it comes by its public address.
fn nobody_else(lab: &Lab, second: &Second, port: u16) -> Result<()> {
    let ways = [
        (&lab.internet, SPOKE_PUBLIC),
        (&lab.internet, SPOKE_PUBLIC_V6),
        (&lab.hub, SPOKE_PUBLIC),
        (&lab.hub, SPOKE_PUBLIC_V6),
        (&second.node, SPOKE_MESH),
    ];
    for (from, to) in ways {
        let answer = from.connect(SocketAddr::new(to, port), SOON);
        ensure!(answer == Answer::Silent, "{} to {to} port {port}: {answer:?}", from.name);
    }
    Ok(())
}

/// Where the spoke's kernel sends what is for the hub.
fn endpoint_is(lab: &Lab, port: u16) -> Result<()> {
    let shown = lab.spoke.ok(&["wg", "show", "wg0", "endpoints"])?;
    ensure!(shown.trim_end().ends_with(&format!("\t{HUB_PUBLIC}:{port}")), "{shown}");
    Ok(())
}

/// By the kernel's own word, which is the second of the day's clock at which it was.
fn handshake_age_s(lab: &Lab) -> Result<u64> {
    let shown = lab.spoke.ok(&["wg", "show", "wg0", "latest-handshakes"])?;
    let at = shown.trim_end().rsplit('\t').next().and_then(|word| word.parse().ok());
    let at: u64 = at.filter(|at| *at > 0).with_context(|| format!("no handshake: {shown}"))?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).context("before 1970")?;
    Ok(now.as_secs().saturating_sub(at))
}

/// The age that the hub scrapes, which must be that of the kernel.
fn told_as_by_the_kernel(lab: &Lab) -> Result<f64> {
    let page = scrape(&lab.hub)?;
    let told = value(&page, "spokeguard_wireguard_handshake_age_seconds{peer=\"hub\"}");
    let (told, true_s) = (told.context("no handshake age")?, handshake_age_s(lab)?);
    ensure!((true_s as f64 - told).abs() <= SCRAPED_WITHIN_S, "{told} s, the kernel says {true_s} s");
    Ok(told)
}

/// The kinds of the events that tell of a code, oldest first.
fn events(daemon: &lab::Daemon, code: &str) -> Result<Vec<String>> {
    let log = std::fs::read_to_string(daemon.state_dir.join("events.jsonl")).context("read the event log")?;
    let events = log.lines().map(serde_json::from_str).collect::<Result<Vec<Value>, _>>()?;
    let of_it = events.iter().filter(|event| event["code"] == code);
    Ok(of_it.filter_map(|event| event["kind"].as_str().map(str::to_owned)).collect())
}

fn value(page: &str, name: &str) -> Option<f64> {
    page.lines().find(|line| line.starts_with(name))?.rsplit(' ').next()?.parse().ok()
}

/// How many ports the audit and nmap were asked for, and said the same of.
pub fn audited_beside_nmap(lab: &Lab, daemon: &lab::Daemon) -> Result<usize> {
    let mut compared = 0;
    for address in [SPOKE_PUBLIC, SPOKE_PUBLIC_V6] {
        let (ours, others) = audited(lab, daemon, address, "tcp", PORTS)?;
        let theirs = lab.internet.nmap_states(address, PORTS)?;
        for (port, state) in &theirs {
            let ours = ours.get(port).unwrap_or(&others);
            ensure!(ours == state, "{address} {port}: we say {ours}, nmap {state}");
        }
        compared += theirs.len();
    }
    Ok(compared)
}

/// Of [`UDP_PORTS`], those that answer a stranger.
fn datagrams_answered(lab: &Lab, address: IpAddr) -> Result<Vec<u16>> {
    let mut answered = Vec::new();
    for port in [443, 5353, TUNNEL_PORT] {
        if lab.internet.ask_udp(SocketAddr::new(address, port), SOON)?.is_some() {
            answered.push(port);
        }
    }
    Ok(answered)
}

/// State by port, and that of all the others that were asked.
fn audited(
    lab: &Lab,
    daemon: &lab::Daemon,
    address: IpAddr,
    proto: &str,
    ports: &str,
) -> Result<(BTreeMap<u16, String>, String)> {
    let (text, proto) = (address.to_string(), format!("--{proto}"));
    let words = daemon.arguments(&["audit", "--format", "json", &proto, "-p", ports, "--address", &text]);
    let outcome =
        lab.spoke.run_within(LONG, &[&[lab::spokeguard()?.display().to_string()], &*words].concat())?;
    let json = outcome.json()?;
    let targets = json["targets"].as_array().into_iter().flatten();
    let target = targets.into_iter().find(|target| target["address"] == *text);
    let of = &target.with_context(|| format!("{text} was not audited: {json:#}"))?["protocols"][0];
    let rest = of["others"]["state"].as_str().unwrap_or("none").to_owned();
    let mut states: BTreeMap<u16, String> = BTreeMap::new();
    for port in of["ports"].as_array().into_iter().flatten() {
        let number = port["port"].as_u64().and_then(|number| u16::try_from(number).ok()).context("a port")?;
        states.insert(number, port["state"].as_str().unwrap_or("none").to_owned());
    }
    Ok((states, rest))
}
