//! What the hub sees of its nodes: one real spoke behind a real tunnel, and nodes that hang, break
//! off, lie, and send garbage and gigabytes.

use std::fs;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use lab::{
    HUB_PUBLIC, Lab, Need, Node, OUTSIDER, Outcome, SPOKE_MESH, SPOKE_PUBLIC, SPOKE_PUBLIC_V6, Signal,
    lacking, wait_until,
};
use serde_json::Value;
use spokeguard::fleet::{Keys, parse};
use spokeguard::policy::fingerprint;
use spokeguard::terms::PublicKey;

use crate::daemon::LONG;
use crate::top::{SANE, Terminal};

/// How a stub behaves to whoever connects.
#[derive(Clone)]
enum Stub {
    Hangs,
    Drips,
    Resets,
    Garbage,
    Gigabytes,
    /// Good health, with these further lines.
    Says(Arc<Mutex<String>>),
    Stuck(Arc<Mutex<String>>),
}

/// Stubs have these mesh addresses, in the hub's own namespace.
const fn stub_address(number: u8) -> IpAddr {
    IpAddr::V4(Ipv4Addr::new(10, 84, 0, 100 + number))
}

const NAMES: [&str; 8] = ["hangs", "drips", "resets", "garbage", "gigabytes", "poison", "stuck", "liar"];

struct Fleet {
    inventory: PathBuf,
    text: String,
}

impl Fleet {
    fn new(lab: &Lab) -> Fleet {
        let key = |number: u8| PublicKey([number; 32]).to_string();
        let (hub, spoke) = (&lab.keys.hub.public, &lab.keys.spoke.public);
        let mut text = format!(
            "version = 1\n[fleet]\nname = \"vault\"\ndomain = \"vault.example\"\n\
             [mesh]\nprefix = [\"10.84.0.0/24\", \"fd84::/64\"]\nhub = \"hub\"\n\
             [defaults.public]\ntcp = [80, 443]\n[defaults.enforce]\nbinds = false\n\
             [[node]]\nname = \"hub\"\nmesh_address = \"10.84.0.1\"\npublic_address = \"{HUB_PUBLIC}\"\n\
             public_key = \"{hub}\"\n\
             [[node]]\nname = \"singapore\"\nmesh_address = [\"10.84.0.16\", \"fd84::16\"]\nregion = \"asia\"\n\
             public_address = [\"{SPOKE_PUBLIC}\", \"{SPOKE_PUBLIC_V6}\"]\npublic_key = \"{spoke}\"\n"
        );
        for (number, name) in (0u8..).zip(NAMES) {
            text += &format!(
                "[[node]]\nname = \"{name}\"\nmesh_address = \"{}\"\npublic_key = \"{}\"\nlabels = {{ stub = \"yes\" }}\n",
                stub_address(number),
                key(number + 1)
            );
            // Somebody on the internet, who is not what he says.
            text +=
                &if name == "liar" { format!("public_address = \"{OUTSIDER}\"\n") } else { String::new() };
        }
        Fleet { inventory: lab.file("fleet.toml", &text).unwrap(), text }
    }

    /// The policy that the inventory gives a node, and its fingerprint.
    fn policy(&self, name: &str) -> (String, String) {
        let today = spokeguard::cli::today(spokeguard::sys::clock::now());
        let inventory =
            parse(&self.text, "fleet.toml", today, Keys::Required).unwrap_or_else(|e| panic!("{e}"));
        let policy = &inventory.node(name).unwrap().policy;
        (spokeguard::policy::show(policy), fingerprint(policy))
    }

    fn run(&self, lab: &Lab, words: &[&str]) -> Outcome {
        self.run_after(lab, &[], words)
    }

    /// The same below a command that changes what it finds.
    fn run_after(&self, lab: &Lab, before: &[&str], words: &[&str]) -> Outcome {
        let program = lab::spokeguard().unwrap().display().to_string();
        let inventory = self.inventory.display().to_string();
        let all: Vec<&str> = before
            .iter()
            .copied()
            .chain([program.as_str(), "fleet", "--inventory", &inventory])
            .chain(words.iter().copied())
            .collect();
        lab.hub.run_within(Duration::from_secs(60), &all).unwrap()
    }

    fn json(&self, lab: &Lab, words: &[&str]) -> (Value, Option<i32>) {
        let outcome = self.run(lab, &[words, &["--format", "json"]].concat());
        let json = outcome.json().unwrap_or_else(|error| panic!("{error:#}: {}", outcome.all()));
        (json, outcome.code)
    }
}

/// Metrics of a node in good health.
fn metrics(name: &str, hash: &str, more: &str) -> String {
    format!(
        "spokeguard_build_info{{version=\"0.1.0\"}} 1\nspokeguard_verdict 0\n\
         spokeguard_policy_info{{node=\"{name}\",role=\"spoke\",mode=\"enforce\",hash=\"{hash}\"}} 1\n\
         spokeguard_audit_exposed_ports{{family=\"ipv4\",proto=\"tcp\"}} 0\nspokeguard_audit_age_seconds 9\n{more}"
    )
}

fn serve(hub: &Node, number: u8, stub: Stub) {
    let at = SocketAddr::new(stub_address(number), crate::metrics::PORT);
    let listener = hub.inside(|| Ok(TcpListener::bind(at)?)).unwrap();
    std::thread::spawn(move || {
        for client in listener.incoming() {
            let (Ok(client), stub) = (client, stub.clone()) else { return };
            std::thread::spawn(move || answer(client, &stub));
        }
    });
}

fn answer(mut client: TcpStream, stub: &Stub) {
    let mut request = [0u8; 1024];
    let length = client.read(&mut request).unwrap_or(0);
    let health = request[..length].starts_with(b"GET /healthz");
    let ok = |body: &str| format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{body}", body.len());
    let said =
        |text: &Mutex<String>| ok(&if health { "ok\n".to_owned() } else { text.lock().unwrap().clone() });
    let _ = match stub {
        Stub::Hangs => client.read(&mut request).map(drop),
        Stub::Drips => {
            let mut sent = client.write_all(b"HTTP/1.1 200 OK\r\n\r\n");
            while sent.is_ok() {
                std::thread::sleep(Duration::from_millis(100));
                sent = client.write_all(b"#");
            }
            sent
        }
        Stub::Resets => {
            rustix::net::sockopt::set_socket_linger(&client, Some(Duration::ZERO)).map_err(Into::into)
        }
        Stub::Garbage => client.write_all(&[0xff, 0x1b, b'[', b'2', b'J', 0].repeat(1000)),
        Stub::Gigabytes => {
            let _ = client.write_all(b"HTTP/1.1 200 OK\r\n\r\n");
            let chunk = vec![b'#'; 1 << 16];
            while client.write_all(&chunk).is_ok() {}
            Ok(())
        }
        Stub::Says(text) => client.write_all(said(text).as_bytes()),
        Stub::Stuck(_) if health => {
            client.write_all(b"HTTP/1.1 503 No\r\nContent-Length: 26\r\n\r\nno cycle has finished for9")
        }
        Stub::Stuck(text) => client.write_all(said(text).as_bytes()),
    };
}

fn node<'a>(json: &'a Value, name: &str) -> &'a Value {
    let nodes = json["nodes"].as_array().unwrap_or_else(|| panic!("no nodes in {json:#}"));
    nodes
        .iter()
        .find(|node| node["name"] == name || node["node"] == name)
        .unwrap_or_else(|| panic!("{name}: {json:#}"))
}

fn reasons(node: &Value) -> String {
    node["reasons"]
        .as_array()
        .map(|list| list.iter().filter_map(Value::as_str).collect::<Vec<_>>().join("; "))
        .unwrap_or_default()
}

/// A private authority and a certificate of that name, and a page served by it on the node's 443.
fn page(lab: &Lab, name: &str) -> (lab::Running, PathBuf) {
    let dir = lab.dir.display();
    let certificate = format!(
        "cd {dir}\n\
         openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -keyout ca.key -out ca.pem \
           -days 90 -subj /CN=lab 2>/dev/null\n\
         openssl req -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -keyout web.key -out web.csr \
           -subj /CN={name} 2>/dev/null\n\
         echo subjectAltName=DNS:{name} >web.ext\n\
         openssl x509 -req -in web.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 63 -extfile web.ext \
           -out web.pem 2>/dev/null\n"
    );
    lab.spoke.sh(&certificate).unwrap();
    let file = |name: &str| lab.dir.join(name).display().to_string();
    let words = [
        "openssl",
        "s_server",
        "-quiet",
        "-www",
        "-accept",
        "443",
        "-cert",
        &file("web.pem"),
        "-key",
        &file("web.key"),
    ];
    let server = lab.spoke.spawn(&words).unwrap();
    wait_until(LONG, "the page is served", || {
        let open = lab.spoke.connect(SocketAddr::new(SPOKE_PUBLIC, 443), Duration::from_millis(200));
        (open == lab::Answer::Open).then_some(())
    })
    .unwrap_or_else(|error| panic!("{error:#}: {}", server.log()));
    (server, lab.dir.join("ca.pem"))
}

#[test]
fn fleet_view_of_good_and_of_bad_nodes() {
    if lacking(&[Need::Lab, Need::WireGuard, Need::Sshd, Need::Openssl, Need::Faketime, Need::Spokeguard]) {
        return;
    }
    let lab = Lab::new();
    let fleet = Fleet::new(&lab);
    let _ssh = lab.spoke.sshd(22, &[&SPOKE_MESH.to_string(), "fd84::16"], "").unwrap();
    let _web = lab.spoke.listen("web", &["web/[::]:80"]).unwrap();
    let (_page, authority) = page(&lab, "singapore.vault.example");
    let _daemon = lab.spoke.daemon(&fleet.policy("singapore").0).unwrap();
    let said = |name: &str, more: &str| Arc::new(Mutex::new(metrics(name, &fleet.policy(name).1, more)));
    let poison = "spokeguard_findings{code=\"\x1b]0;own\x07<script>alert(1)</script>\",severity=\"\x1b[31m\"} 1\n\
                  spokeguard_wireguard_handshake_age_seconds{peer=\"hub\"} 900\n\
                  spokeguard_blind{facet=\"</td><img src=x onerror=alert(1)>\"} 1\n";
    let stubs = [
        Stub::Hangs,
        Stub::Drips,
        Stub::Resets,
        Stub::Garbage,
        Stub::Gigabytes,
        Stub::Says(said("poison", poison)),
        Stub::Stuck(said("stuck", "")),
        Stub::Says(said("liar", "")),
    ];
    for (number, stub) in (0u8..).zip(stubs) {
        lab.hub.sh(&format!("ip addr add {}/32 dev lo", stub_address(number))).unwrap();
        serve(&lab.hub, number, stub);
    }
    status(&lab, &fleet);
    health(&lab, &fleet, &authority);
    audit(&lab, &fleet);
    roll(&lab, &fleet, &authority);
    report(&lab, &fleet);
    drift(&lab, &fleet);
}

fn status(lab: &Lab, fleet: &Fleet) {
    // The audit at the daemon's start, and what comes of it, take a moment; one that fails is tried again after a minute.
    wait_until(LONG * 6, "the spoke is fine", || {
        let (json, code) = fleet.json(lab, &["status", "singapore"]);
        let spoke = node(&json, "singapore");
        (code == Some(0) && spoke["state"] == "fine" && spoke["vitals"]["audit_age"].is_u64()).then_some(())
    })
    .unwrap_or_else(|error| panic!("{error:#}: {}", fleet.run(lab, &["status", "singapore"]).all()));
    let started = Instant::now();
    let (json, code) = fleet.json(lab, &["status"]);
    let took = started.elapsed();
    assert_eq!(code, Some(2), "not everybody was seen: {json:#}");
    assert!(took < Duration::from_secs(15), "{took:?}");
    let state =
        |name: &str| (node(&json, name)["state"].as_str().unwrap().to_owned(), reasons(node(&json, name)));
    let is = |name: &str, wanted: &str, why: &str| {
        let (state, reasons) = state(name);
        assert!(state == wanted && reasons.contains(why), "{name}: {state}: {reasons}");
    };
    is("singapore", "fine", "");
    is("liar", "fine", "");
    is("hangs", "silent", "no whole answer within 3 s");
    is("drips", "silent", "no whole answer within 3 s");
    is("resets", "silent", "");
    is("garbage", "blind", "");
    is("gigabytes", "blind", "sends more than 1024 KiB");
    is("poison", "drifting", "");
    is("stuck", "blind", "its loop is stuck: no cycle has finished for9");
    // No daemon runs on this hub.
    is("hub", "silent", "nothing listens at 10.84.0.1:9984");
    let spoke = node(&json, "singapore");
    assert!(spoke["vitals"]["handshake_age"].as_u64().is_some_and(|age| age < 180), "{spoke:#}");
    assert!(spoke["tunnel_handshake_seconds"].as_u64().is_some_and(|age| age < 180), "by the hub's own end");
    assert!(spoke["clock_ahead_seconds"].as_i64().is_some_and(|skew| skew.abs() < 5), "{spoke:#}");

    let document = fleet.run(lab, &["status", "poison", "--format", "json"]);
    assert!(document.stdout.contains("own") && !document.all().contains(['\x1b', '\x07']), "{document:?}");
    let text = fleet.run(lab, &["status", "--label", "stub=yes", "--role", "spoke"]);
    assert!(!text.all().contains(['\x1b', '\x07', '\0']), "{:?}", text.all());
    assert!(text.stdout.lines().all(|line| line.chars().count() <= 80), "{}", text.stdout);
    let first = text.stdout.lines().nth(3).unwrap();
    assert!(first.starts_with("poison ") && first.contains(" drifting "), "the worst first: {}", text.stdout);
    // Only those who are asked for, and nobody where nobody is.
    assert!(
        text.stdout.starts_with("vault, 8 nodes: ") && !text.stdout.contains("singapore"),
        "{}",
        text.stdout
    );
    let nobody = fleet.run(lab, &["status", "--region", "mars"]);
    assert_eq!((nobody.code, nobody.stdout.as_str()), (Some(2), ""), "{}", nobody.all());

    // A hub whose clock is an hour off takes nobody for dead.
    for by in ["+1h", "-1h"] {
        let faked =
            fleet.run_after(lab, &["faketime", "-f", by], &["status", "singapore", "--format", "json"]);
        let json = faked.json().unwrap_or_else(|error| panic!("{error:#}: {}", faked.all()));
        let spoke = node(&json, "singapore");
        assert_eq!((faked.code, spoke["state"].as_str()), (Some(0), Some("fine")), "{json:#}");
        let skew = spoke["clock_ahead_seconds"].as_i64().unwrap();
        assert!((3590..=3610).contains(&skew.abs()), "{skew}");
        assert!(reasons(spoke).contains("its clock is 60 min"), "{json:#}");
    }
}

fn outcome(json: &Value, name: &str, check: &str) -> String {
    let checks = node(json, name)["checks"].as_array().unwrap();
    let check = checks.iter().find(|one| one["what"] == check);
    check.map_or("none".to_owned(), |check| check["outcome"].as_str().unwrap_or_default().to_owned())
}

fn health(lab: &Lab, fleet: &Fleet, authority: &Path) {
    let trust = format!("SSL_CERT_FILE={}", authority.display());
    let checked = |words: &[&str]| {
        let all = [&["healthcheck"], words, &["--format", "json"]].concat();
        let outcome = fleet.run_after(lab, &["env", &trust], &all);
        (outcome.json().unwrap_or_else(|error| panic!("{error:#}: {}", outcome.all())), outcome.code)
    };
    let (json, code) = checked(&["singapore"]);
    let checks = ["ping", "handshake", "metrics", "policy", "https", "certificate", "ssh", "ssh-public"];
    for check in checks {
        assert_eq!(outcome(&json, "singapore", check), "pass", "{check}: {json:#}");
    }
    assert_eq!((code, outcome(&json, "singapore", "heartbeat").as_str()), (Some(0), "none"), "{json:#}");
    let certificate = json.to_string();
    assert!(certificate.contains("62 d left") || certificate.contains("63 d left"), "{json:#}");
    // A certificate that is near its end, or of somebody whom this host does not trust, is no pass.
    let (json, code) = checked(&["singapore", "--certificate-days", "70", "--skip", "ssh-public"]);
    assert_eq!((code, outcome(&json, "singapore", "certificate").as_str()), (Some(1), "fail"));
    let distrusted = fleet
        .run(lab, &["healthcheck", "singapore", "--skip", "ssh-public", "--format", "json"])
        .json()
        .unwrap();
    assert_ne!(outcome(&distrusted, "singapore", "https"), "pass", "{distrusted:#}");
    // What can't be tried is unknown, and what is left out is not there.
    let (json, code) = checked(&["liar", "stuck"]);
    assert_eq!(code, Some(1));
    assert_eq!(outcome(&json, "liar", "https"), "fail");
    assert_eq!(outcome(&json, "stuck", "metrics"), "fail");
    assert_eq!(outcome(&json, "stuck", "ping"), "pass", "its address is there: {json:#}");
    assert_eq!(outcome(&json, "stuck", "handshake"), "unknown");
    assert_eq!(outcome(&json, "stuck", "https"), "unknown", "its name leads nowhere: {json:#}");
    let skipped: Vec<&str> = ["ssh", "https", "certificate", "handshake", "metrics", "policy"]
        .into_iter()
        .flat_map(|check| ["--skip", check])
        .collect();
    let (json, code) = checked(&[&["stuck"], &skipped[..]].concat());
    assert_eq!((code, outcome(&json, "stuck", "ssh").as_str()), (Some(0), "none"), "{json:#}");
    // A handshake that is too old, and a node that no echo comes from.
    let gone = format!("{}/32 dev lo", stub_address(2));
    lab.hub.sh(&format!("ip addr del {gone}")).unwrap();
    let (json, code) = checked(&["poison", "resets"]);
    lab.hub.sh(&format!("ip addr add {gone}")).unwrap();
    let failed = [("poison", "ping", "pass"), ("poison", "handshake", "fail"), ("resets", "ping", "fail")];
    for (name, check, wanted) in failed {
        assert_eq!(outcome(&json, name, check), wanted, "{check} of {name}: {json:#}");
    }
    assert_eq!(code, Some(1));

    // A banner moves no cursor, as text and in a document.
    let sshd = lab.hub.inside(|| Ok(TcpListener::bind((stub_address(7), 22))?)).unwrap();
    std::thread::spawn(move || {
        for client in sshd.incoming() {
            let _ = client.and_then(|mut client| client.write_all(b"HTTP/1.1 \x1b[2J\x1b]0;own\x07\r\n"));
        }
    });
    for format in ["text", "json"] {
        let told = fleet.run(lab, &["healthcheck", "liar", "--format", format]);
        assert!(told.stdout.contains("\u{fffd}[2J") && !told.all().contains(['\x1b', '\x07']), "{told:?}");
        if format == "json" {
            assert_eq!(outcome(&told.json().unwrap(), "liar", "ssh"), "fail", "no sshd: {told:?}");
        }
    }

    // sshd that a stranger reaches.
    let _ssh = lab.internet.listen("sshd", &[&format!("tcp/{OUTSIDER}:22")]).unwrap();
    let (json, _) = checked(&["liar"]);
    assert_eq!(outcome(&json, "liar", "ssh-public"), "fail", "{json:#}");

    let gate = |words: &[&str]| fleet.run_after(lab, &["env", &trust], &[&["gate"], words].concat());
    let open = gate(&["singapore", "--skip", "ssh-public"]);
    assert_eq!(open.code, Some(0), "{}", open.all());
    let shut = gate(&["liar", "--wait", "6s"]);
    assert!(shut.code == Some(1) && shut.stderr.contains("not yet: "), "{}", shut.all());
    assert_eq!(gate(&["nobody"]).code, Some(2));
}

fn audit(lab: &Lab, fleet: &Fleet) {
    let (json, code) = fleet.json(lab, &["audit", "singapore", "--tcp"]);
    assert_eq!((code, json["verdict"].as_str()), (Some(0), Some("ok")), "{json:#}");
    // Its own audit says that nothing is exposed, and this host gets in.
    let _database = lab.internet.listen("postgres", &[&format!("tcp/{OUTSIDER}:5432")]).unwrap();
    let (json, code) = fleet.json(lab, &["audit", "liar", "singapore", "hub", "--tcp"]);
    assert_eq!(code, Some(2), "the hub's own audit is not known: {json:#}");
    let nodes = json["nodes"].as_array().unwrap();
    assert_eq!(
        (nodes[0]["node"].as_str(), nodes[0]["stand"].as_str()),
        (Some("liar"), Some("disagrees")),
        "{json:#}"
    );
    assert!(reasons(&nodes[0]).contains("tcp/198.51.100.99:5432"), "{json:#}");
    assert_eq!(node(&json, "singapore")["stand"], "agrees");
    assert_eq!(node(&json, "hub")["stand"], "unknown");
    assert!(reasons(node(&json, "hub")).contains("it is this host"), "{json:#}");
}

fn roll(lab: &Lab, fleet: &Fleet, authority: &Path) {
    let trust = format!("SSL_CERT_FILE={}", authority.display());
    let log = lab.dir.join("rolled");
    let script = format!("echo $SPOKEGUARD_NODE $SPOKEGUARD_ADDRESS $SPOKEGUARD_REGION >>{}", log.display());
    let roll = |more: &[&str], command: &[&str]| {
        let words =
            [&["roll", "--wait", "3s", "--skip", "ssh-public", "singapore", "liar"], more, &["--"], command]
                .concat();
        fleet.run_after(lab, &["env", &trust], &words)
    };
    let command = ["sh", "-c", script.as_str()];
    let state = fleet.inventory.with_extension("roll.json");
    let rolled = || fs::read_to_string(&log).unwrap_or_default();

    let dry = roll(&["--dry-run"], &command);
    assert!(dry.code == Some(0) && dry.stdout.contains("1  singapore"), "{}", dry.all());
    assert!(!state.exists() && rolled().is_empty(), "a dry run does nothing");

    let stopped = roll(&[], &command);
    assert_eq!(stopped.code, Some(1), "{}", stopped.all());
    assert!(stopped.stdout.contains("stopped at liar: not healthy: "), "{}", stopped.all());
    assert_eq!(rolled(), "singapore 10.84.0.16 asia\nliar 10.84.0.107\n");
    // What is done stays done, and the same command goes on where it stopped.
    let again = roll(&[], &command);
    assert!(
        again.code == Some(1) && again.stderr.contains("1 of 2 done; going on with liar"),
        "{}",
        again.all()
    );
    assert_eq!(rolled().lines().filter(|line| line.starts_with("singapore")).count(), 1);
    // Another command is another roll.
    let other = roll(&[], &["true"]);
    assert!(
        other.code == Some(2) && other.stderr.contains("is of another command: sh -c"),
        "{}",
        other.all()
    );
    let changed = fleet.text.replace("region = \"asia\"", "region = \"apac\"");
    fs::write(&fleet.inventory, &changed).unwrap();
    let moved = roll(&[], &command);
    assert!(moved.code == Some(2) && moved.stderr.contains("another inventory"), "{}", moved.all());
    fs::write(&fleet.inventory, &fleet.text).unwrap();
    // A command that fails stops it before anybody else is touched.
    let failed = roll(&["--restart"], &["false"]);
    assert!(failed.code == Some(1) && failed.stdout.contains("stopped at singapore"), "{}", failed.all());

    // SIGINT: the state says where it was, the command is told, and a second roll is kept out meanwhile.
    let program = lab::spokeguard().unwrap().display().to_string();
    let inventory = fleet.inventory.display().to_string();
    let (begun, told) = (lab.dir.join("begun"), lab.dir.join("told"));
    let long = format!(
        "trap 'echo told >{}; exit 1' INT; touch {}; while :; do sleep 0.05; done",
        told.display(),
        begun.display()
    );
    let words =
        [&program, "fleet", "-i", &inventory, "roll", "--restart", "singapore", "--", "sh", "-c", &long];
    let mut running = lab.hub.spawn(&words).unwrap();
    wait_until(LONG, "the command runs", || begun.exists().then_some(())).unwrap();
    let second = roll(&["--restart"], &command);
    assert!(second.code == Some(2) && second.stderr.contains("another roll"), "{}", second.all());
    running.signal(Signal::INT).unwrap();
    let ended = running.wait(LONG).unwrap();
    assert_eq!(ended.code(), Some(2), "{}", running.log());
    assert!(told.exists(), "the command was told");
    let left: Value = serde_json::from_str(&fs::read_to_string(&state).unwrap()).unwrap();
    assert_eq!((left["done"].as_u64(), left["stopped"].as_str()), (Some(0), Some("it was interrupted")));

    // Of what a command prints nothing gets into the document.
    let words =
        ["roll", "--restart", "--skip", "ssh-public", "--format", "json", "singapore", "--", "echo", "hello"];
    let done = fleet.run_after(lab, &["env", &trust], &words);
    let document = done.json().unwrap_or_else(|error| panic!("{error:#}: {}", done.all()));
    assert_eq!(document["done"], serde_json::json!(["singapore"]), "{}", done.all());
    assert!(done.stderr.contains("hello"), "{}", done.all());
    // All done: nothing is left to go on with.
    let done = fleet.run_after(
        lab,
        &["env", &trust],
        &["roll", "--restart", "--skip", "ssh-public", "singapore", "--", "true"],
    );
    assert!(done.code == Some(0) && done.stdout.contains("all 1 nodes are done"), "{}", done.all());
    assert!(!state.exists());
}

fn report(lab: &Lab, fleet: &Fleet) {
    let (file, looks) = (lab.dir.join("fleet.html"), lab.dir.join("looks"));
    let (shown, kept) = (file.display().to_string(), looks.display().to_string());
    let some = ["poison", "stuck", "resets", "singapore", "hub"];
    let report = fleet.run(lab, &[&["report", "--html", &shown, "--history", &kept], &some[..]].concat());
    assert_eq!(report.code, Some(2), "as status: {}", report.all());
    let page = fs::read_to_string(&file).unwrap();
    for bad in ["<script", "<img", "\x1b", "\x07", "http://", "https://"] {
        assert!(!page.contains(bad), "{bad} is in the page");
    }
    assert!(page.contains("&lt;script&gt;alert(1)"), "it is told as text");
    for name in some {
        assert!(page.contains(&format!("<td class=\"name\">{name}")), "{name}");
    }
    let count = || fs::read_dir(&looks).unwrap().count();
    assert_eq!(count(), 1);
    assert!(page.contains("from looks that were kept"), "{page}");
    // The next look is kept beside it, and knows of one that is silent when it was last heard.
    let poison = format!("{}/32 dev lo", stub_address(5));
    lab.hub.sh(&format!("ip addr del {poison}")).unwrap();
    let silent = wait_until(LONG, "a look of another second", || {
        let silent = fleet.run(lab, &["status", "poison", "--history", &kept]);
        (count() >= 2).then_some(silent)
    });
    let silent = silent.unwrap();
    assert!(silent.code == Some(2) && silent.stdout.contains("last heard "), "{}", silent.all());
    let report = fleet.run(lab, &["report", "--html", "-", "--history", &kept, "poison"]);
    lab.hub.sh(&format!("ip addr add {poison}")).unwrap();
    let row = report.stdout.split("<td class=\"name\">poison").nth(1).unwrap();
    assert!(row.contains("drifting in 1"), "as it was before: {row}");
    let unwritten = fleet.run(lab, &["report", "liar", "--html", "/no/such/folder/x.html"]);
    assert!(
        unwritten.code == Some(2) && unwritten.stderr.contains("/no/such/folder/x.html"),
        "{}",
        unwritten.all()
    );
    let nowhere = fleet.run(lab, &["report", "liar", "--html", &shown, "--prometheus", "http://127.0.0.1:9"]);
    assert!(nowhere.code == Some(2) && nowhere.stderr.contains("ask Prometheus"), "{}", nowhere.all());
}

fn drift(lab: &Lab, fleet: &Fleet) {
    let _wide = lab.spoke.listen("postgres", &["tcp/0.0.0.0:5432"]).unwrap();
    let found = wait_until(LONG, "the drift is seen", || {
        let (json, code) = fleet.json(lab, &["status", "singapore"]);
        (code == Some(1)).then_some(json)
    })
    .unwrap();
    let spoke = node(&found, "singapore");
    assert_eq!(spoke["state"], "drifting");
    assert!(reasons(spoke).contains("listener-wide"), "{spoke:#}");
}

#[test]
fn fleet_report_takes_its_timelines_from_prometheus() {
    if lacking(&[Need::Lab, Need::Prometheus, Need::Spokeguard]) {
        return;
    }
    let lab = Lab::plain();
    let fleet = Fleet::new(&lab);
    let at = SocketAddr::new(stub_address(7), crate::metrics::PORT);
    lab.hub.sh(&format!("ip addr add {}/32 dev lo", at.ip())).unwrap();
    let hash = fleet.policy("liar").1;
    let bytes = |n: u64| {
        let labels = |d: &str| format!("spokeguard_bytes_total{{scope=\"public\",direction=\"{d}\"}} {n}\n");
        labels("in") + &labels("out")
    };
    let said = Arc::new(Mutex::new(metrics("liar", &hash, &bytes(1000))));
    serve(&lab.hub, 7, Stub::Says(said.clone()));
    let prometheus = lab.hub.prometheus(&[at]).unwrap();
    let ask = || {
        let words =
            ["report", "--html", "-", "liar", "--prometheus", "http://127.0.0.1:9090", "--hours", "1"];
        fleet.run(&lab, &words)
    };
    let mut sent = 1000;
    let page = wait_until(LONG, "there is a timeline with traffic", || {
        sent += 5000;
        *said.lock().unwrap() = metrics("liar", &hash, &bytes(sent));
        let page = ask();
        assert_eq!(page.code, Some(0), "{}", page.all());
        (page.stdout.contains("fine in all of") && page.stdout.contains("traffic, at most"))
            .then_some(page.stdout)
    })
    .unwrap_or_else(|error| panic!("{error:#}\n{}\n{}", prometheus.running.log(), ask().stdout));
    assert!(page.contains("from Prometheus of vault"), "{page}");
}

#[test]
fn fleet_status_watches_in_a_terminal_and_gives_it_back() {
    if lacking(&[Need::Lab, Need::Tmux, Need::Spokeguard]) {
        return;
    }
    let lab = Lab::plain();
    let fleet = Fleet::new(&lab);
    let poison = "spokeguard_findings{code=\"\x1b]2;own\x07\x1b[2J\",severity=\"high\"} 1\n";
    let said = |name: &str, more: &str| Arc::new(Mutex::new(metrics(name, &fleet.policy(name).1, more)));
    let liar = said("liar", "");
    for (number, stub) in [(5, Stub::Says(said("poison", poison))), (7, Stub::Says(liar.clone()))] {
        lab.hub.sh(&format!("ip addr add {}/32 dev lo", stub_address(number))).unwrap();
        serve(&lab.hub, number, stub);
    }
    let terminal = Terminal::open(&lab, &lab.hub, "sh");
    let program = lab::spokeguard().unwrap().display().to_string();
    let inventory = fleet.inventory.display().to_string();
    let command = format!("{program} fleet -i {inventory} status poison liar --watch=1");
    terminal.type_line("PS1='ready> '; clear; echo kept before");
    terminal.await_screen("a shell", |screen| screen.contains("\nready>"));
    terminal.type_line(&format!("clear; echo kept before; {command}; echo CODE=$?; {SANE}"));
    let row = |screen: &str, name: &str, state: &str| {
        screen.lines().any(|line| line.starts_with(name) && line.contains(state))
    };
    let fine = |screen: &str| row(screen, "poison ", " drifting ") && row(screen, "liar ", " fine ");
    let first = terminal.await_screen("a first look", fine);
    assert!(first.contains("(q ends)") && !first.contains("kept before"), "a screen of its own:\n{first}");
    assert!(first.contains("[2J"), "what it is called is told as text:\n{first}");
    assert_ne!(terminal.tmux(&["display-message", "-p", "#{pane_title}"]).trim(), "own");
    assert!(terminal.tmux(&["capture-pane", "-p", "-e"]).contains("31mdrifting"), "in colour");
    let stamp = |screen: &str| screen.lines().next().unwrap_or_default().to_owned();
    terminal.await_screen("another look", |screen| fine(screen) && stamp(screen) != stamp(&first));

    // One changes its mind, dies between two looks, and comes back.
    *liar.lock().unwrap() = metrics("liar", "0000", "");
    terminal.await_screen("another policy", |screen| row(screen, "liar ", " drifting "));
    lab.hub.sh(&format!("ip addr del {}/32 dev lo", stub_address(7))).unwrap();
    let dead = terminal.await_screen("it is silent", |screen| row(screen, "liar ", " silent "));
    assert!(dead.contains("last heard ") && row(&dead, "poison ", " drifting "), "{dead}");
    *liar.lock().unwrap() = metrics("liar", &fleet.policy("liar").1, "");
    lab.hub.sh(&format!("ip addr add {}/32 dev lo", stub_address(7))).unwrap();
    let back = terminal.await_screen("it is back", fine);
    assert!(!back.contains("last heard") && !back.contains("silent"), "nothing of the last look:\n{back}");

    let ended = |what: &str, code: &str| {
        let after = terminal.await_screen(what, |screen| screen.contains("TERMINAL="));
        let shell = ["kept before", "TERMINAL=sane", code].iter().all(|text| after.contains(text));
        assert!(shell && !after.contains("vault, 2 nodes"), "{after}");
    };
    terminal.tmux(&["send-keys", "q"]);
    ended("the shell after q", "CODE=1");
    // A smaller window is filled and no more; a larger one shows all again; both at once, and not at the next look.
    let rarely = command.replace("--watch=1", "--watch=600");
    terminal.type_line(&format!("clear; echo kept before; {rarely}; echo CODE=$?; {SANE}"));
    terminal.await_screen("a look", fine);
    terminal.tmux(&["resize-window", "-x", "50", "-y", "6"]);
    let small = terminal.await_screen("a smaller view", |screen| {
        screen.lines().count() <= 6
            && screen.lines().all(|line| line.chars().count() <= 50)
            && screen.contains(" lines more")
    });
    assert!(small.contains("vault, 2 nodes") && small.contains("poison "), "{small}");
    terminal.tmux(&["resize-window", "-x", "80", "-y", "24"]);
    let large = terminal.await_screen("all of it", |screen| fine(screen) && !screen.contains(" lines more"));
    assert!(large.contains("(q ends)"), "{large}");
    terminal.tmux(&["send-keys", "Escape"]);
    ended("the shell after Esc", "CODE=1");

    // Ctrl-C, while a node that hangs holds up the look.
    lab.hub.sh(&format!("ip addr add {}/32 dev lo", stub_address(0))).unwrap();
    serve(&lab.hub, 0, Stub::Hangs);
    let all = command.replace("poison liar", "hangs");
    terminal.type_line(&format!("clear; echo kept before; NO_COLOR=1 {all}; echo CODE=$?; {SANE}"));
    terminal.await_screen("a look under way", |screen| screen.starts_with("looking"));
    terminal.tmux(&["send-keys", "C-c"]);
    ended("the shell after Ctrl-C", "CODE=2");
    // Elsewhere than on a terminal: one after the other, without colours or movements.
    let piped = lab.hub.spawn(&["sh", "-c", &command]).unwrap();
    wait_until(LONG, "two looks", || (piped.log().matches("vault, 2 nodes: ").count() >= 2).then_some(()))
        .unwrap_or_else(|error| panic!("{error:#}\n{}", piped.log()));
    assert!(!piped.log().contains('\x1b'), "{}", piped.log());
}
