//! Break-glass, and that what is closed is closed: on a real kernel, with and without a daemon.

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use lab::{
    Answer, CONTAINER, HUB_MESH, Lab, Mesh, Need, Node, OUTSIDER, SPOKE_MESH, SPOKE_PUBLIC, SPOKE_PUBLIC_V6,
    Shape, Signal, lacking, wait_until,
};
use serde_json::Value;

use crate::daemon::{Events, UNGUARDED, findings, plain_policy, status};
use crate::enforce::Guard;
use crate::guard::unguard;
use crate::metrics::{fresh, sum};

/// For an answer that must not come.
const SHORT: Duration = Duration::from_millis(250);
/// For one that must.
const LONG: Duration = Duration::from_secs(20);
const SET: &str = "break-glass-tcp-ipv4";

fn plain(container: bool) -> Lab {
    Lab::shaped(Shape { mesh: Mesh::Plain, container })
}

/// What a stranger with this address meets within the time.
fn from(node: &Node, source: &str, to: IpAddr, port: u16, limit: Duration) -> Answer {
    let source: IpAddr = source.parse().unwrap();
    let attempt = node.inside(|| {
        use rustix::net::{self, AddressFamily, SocketType};
        let family = if to.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
        let socket = net::socket(family, SocketType::STREAM, None)?;
        net::bind(&socket, &SocketAddr::new(source, 0))?;
        net::sockopt::set_socket_timeout(&socket, net::sockopt::Timeout::Send, Some(limit))?;
        Ok(match net::connect(&socket, &SocketAddr::new(to, port)) {
            Ok(()) => Answer::Open,
            Err(rustix::io::Errno::CONNREFUSED) => Answer::Refused,
            Err(rustix::io::Errno::INPROGRESS | rustix::io::Errno::AGAIN | rustix::io::Errno::TIMEDOUT) => {
                Answer::Silent
            }
            Err(other) => return Err(other.into()),
        })
    });
    attempt.unwrap_or_else(|error| panic!("{source} to {to}: {error:#}"))
}

/// Timeout and what is left of it, in seconds, of each element of the set that lives.
fn elements(node: &Node, set: &str) -> Vec<(u64, u64)> {
    let text = node.ok(&["nft", "-j", "list", "set", "inet", "spokeguard", set]).unwrap();
    let document: Value = serde_json::from_str(&text).unwrap();
    let set = document["nftables"].as_array().unwrap().iter().find_map(|object| object.get("set")).unwrap();
    let all = set["elem"].as_array().cloned().unwrap_or_default();
    let times = all
        .iter()
        .map(|element| &element["elem"])
        .map(|body| (body["timeout"].as_u64().unwrap(), body["expires"].as_u64().unwrap()));
    // One that is over may stay listed until the kernel sweeps, and lets nobody in.
    times.filter(|(_, left)| *left != 0).collect()
}

/// The same of the only one.
fn element(node: &Node, set: &str) -> Option<(u64, u64)> {
    let elements = elements(node, set);
    assert!(elements.len() <= 1, "{elements:?}");
    elements.first().copied()
}

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

#[test]
fn an_opening_lets_in_whom_it_names_and_ends_by_itself() {
    if lacking(&[Need::Lab, Need::Spokeguard]) {
        return;
    }
    let lab = plain(false);
    let guard = Guard::new(&lab, &lab.spoke);
    let policy = plain_policy(&lab);
    lab.internet.sh("ip addr add 198.51.100.98/24 dev eth0").unwrap_or_else(|_| {
        // The lab's internet may call its interface towards the spoke otherwise.
        let dev = lab.internet.sh("ip -o -4 addr show to 198.51.100.99").unwrap();
        let dev = dev.split_whitespace().nth(1).unwrap().to_owned();
        lab.internet.sh(&format!("ip addr add 198.51.100.98/24 dev {dev}")).unwrap()
    });
    let (near, far) = ("198.51.100.99", "198.51.100.98");
    let _listeners = lab.spoke.listen("sshd", &["tcp/[::]:2222", "tcp/[::]:2223", "tcp/[::]:2224"]).unwrap();
    guard.write(&policy);

    // One clear error each, and nothing opened.
    for (words, wanted) in [
        (&["2222", "--for", "15m", "--from", "0.0.0.0/0"][..], "--from any"),
        (&["2222", "--for", "15m", "--from", "::/0"], "--from any"),
        (&["2222", "--for", "15m"], "--from"),
        (&["2222", "--from", near], "--for"),
        (&["2222", "--for", "9s", "--from", near], "between 10s and 1 day"),
        (&["2222", "--for", "25h", "--from", near], "between 10s and 1 day"),
        (&["2222", "--for", "15m", "--from", "198.51.100.99/24"], "198.51.100.0/24"),
        (&["ssh", "--for", "15m", "--from", near], "a number from 1 to 65535"),
        (&["2222", "--for", "15m", "--from", near, "--reason", " "], "say why"),
        (&["2222", "--for", "15m", "--from", near], "there is no table inet spokeguard"),
    ] {
        let outcome = guard.run(&[&["break-glass", "open"], words].concat());
        assert_eq!(outcome.code, Some(2), "{words:?}: {}", outcome.all());
        assert!(outcome.stderr.contains(wanted), "{words:?}: {}", outcome.all());
    }
    assert_eq!(guard.says(0, &["break-glass", "list"]), "nothing is open\n");

    guard.enforce(&policy);
    let before = guard.run(&["check", "--format", "json"]);
    assert_eq!(from(&lab.internet, near, SPOKE_PUBLIC, 2222, SHORT), Answer::Silent);
    let open = |port: &str, time: &str, more: &[&str]| {
        guard.says(0, &[&["break-glass", "open", port, "--for", time], more].concat())
    };
    // The one that is to end during this test.
    open("2224", "10s", &["--from", near, "--reason", "short"]);
    let short_began = Instant::now();
    assert_eq!(from(&lab.internet, near, SPOKE_PUBLIC, 2224, LONG), Answer::Open);
    let said = open("2222", "15m", &["--from", near, "--reason", "the mesh is \"down\""]);
    assert!(said.starts_with("open: tcp/2222 from 198.51.100.99 until "), "{said}");
    assert!(said.contains("sshd") && said.contains("answers at ::"), "{said}");
    assert_eq!(from(&lab.internet, near, SPOKE_PUBLIC, 2222, LONG), Answer::Open);
    assert_eq!(from(&lab.internet, far, SPOKE_PUBLIC, 2222, SHORT), Answer::Silent, "another source");
    assert_eq!(from(&lab.internet, near, SPOKE_PUBLIC, 2223, SHORT), Answer::Silent, "another port");
    let six = SocketAddr::new(SPOKE_PUBLIC_V6, 2222);
    assert_eq!(lab.internet.connect(six, SHORT), Answer::Silent, "another family");

    // Told to people and to scripts, and no reason for another verdict.
    let list = json(&guard.says(0, &["break-glass", "list", "--format", "json"]));
    let mine = &list["openings"][0];
    assert_eq!(
        (&mine["port"], &mine["proto"], &mine["from"]),
        (&2222.into(), &"tcp".into(), &"198.51.100.99/32".into())
    );
    assert_eq!((&mine["reason"], &mine["lasts_seconds"]), (&"the mesh is 'down'".into(), &900.into()));
    let left = mine["left_seconds"].as_u64().unwrap();
    assert!((800..=900).contains(&left), "{left}");
    let after = guard.run(&["check", "--format", "json"]);
    assert_eq!(
        (after.code, &after.json().unwrap()["verdict"]),
        (before.code, &before.json().unwrap()["verdict"])
    );
    let told = findings(&after.json().unwrap(), "break-glass-open");
    assert_eq!(told.len(), 2, "{told:?}");
    assert!(told.iter().all(|f| f["accepted"] == true && f["severity"] == "info"), "{told:?}");
    assert!(told[0]["found"].as_str().unwrap().contains("the mesh is 'down'"), "{told:?}");
    assert!(guard.says(0, &["plan"]).contains("nothing"), "openings are no drift");

    // Neither lost nor lengthened by another policy, nor by its way back.
    wait_until(LONG, "the short one is closed by the kernel alone", || {
        (from(&lab.internet, near, SPOKE_PUBLIC, 2224, SHORT) == Answer::Silent).then_some(())
    })
    .unwrap();
    assert!(short_began.elapsed() > Duration::from_secs(9), "{:?}", short_began.elapsed());
    let (timeout, left) = element(&lab.spoke, SET).unwrap();
    assert!(timeout == 900 && left < 895, "{timeout} {left}");
    guard.enforce(&policy.replace("[80, 443]", "[443]"));
    let (again, less) = element(&lab.spoke, SET).unwrap();
    assert!(again == 900 && less <= left, "{again} {less} after {left}");
    assert_eq!(from(&lab.internet, near, SPOKE_PUBLIC, 2222, LONG), Answer::Open);

    // Put there by other means it is drift, and goes; ours stays.
    lab.spoke
        .nft(&format!("add element inet spokeguard {SET} {{ 2223 . 198.51.100.98 timeout 1h }}"))
        .unwrap();
    let slips = |port| from(&lab.internet, far, SPOKE_PUBLIC, port, SHORT);
    assert_eq!(slips(2223), Answer::Silent, "the second layer knows nothing of it");
    let planned = guard.says(1, &["plan"]);
    assert!(planned.contains("element") && planned.contains("2223"), "{planned}");
    guard.says(0, &["apply"]);
    guard.says(0, &["confirm"]);
    assert_eq!(from(&lab.internet, far, SPOKE_PUBLIC, 2223, SHORT), Answer::Silent);
    assert!(element(&lab.spoke, SET).unwrap().1 <= less);

    // Bounds, and what the kernel would not take.
    let overlaps = guard.run(&["break-glass", "open", "2222", "--for", "1m", "--from", "198.51.100.0/24"]);
    assert_eq!(overlaps.code, Some(2), "{}", overlaps.all());
    assert!(overlaps.stderr.contains("tcp/2222 from 198.51.100.99 is open already"), "{}", overlaps.all());
    let many: Vec<String> = (0..16).map(|n| format!("--from=10.0.{}.0/24", 2 * n)).collect();
    let words =
        ["break-glass", "open", "2222", "--for", "1m"].into_iter().chain(many.iter().map(String::as_str));
    let many = guard.run(&words.collect::<Vec<_>>());
    assert!(many.code == Some(2) && many.stderr.contains("16 is the most"), "{}", many.all());
    // The same hole again: from now on.
    open("2222", "10m", &["--from", near]);
    assert_eq!(element(&lab.spoke, SET).unwrap().0, 600);

    // A port of both families, for anyone, by name; then nobody.
    open("2223", "1m", &["--from", "any", "--reason", "all"]);
    for to in [SPOKE_PUBLIC, SPOKE_PUBLIC_V6] {
        assert_eq!(lab.internet.connect(SocketAddr::new(to, 2223), LONG), Answer::Open, "{to}");
    }
    let exposed = guard.run(&["check", "--format", "json"]).json().unwrap();
    assert!(!exposed.to_string().contains(":2223\""), "accepted: {exposed}");
    let closed = guard.says(0, &["break-glass", "close", "2222"]);
    assert_eq!(closed.lines().next(), Some("closed: tcp/2222 from 198.51.100.99"), "{closed}");
    assert_eq!(from(&lab.internet, near, SPOKE_PUBLIC, 2222, SHORT), Answer::Silent);
    assert_eq!(
        lab.internet.connect(SocketAddr::new(SPOKE_PUBLIC, 2223), LONG),
        Answer::Open,
        "the other one"
    );
    assert!(guard.says(0, &["break-glass", "close", "2222"]).contains("nothing changed"));
    let closed = json(&guard.says(0, &["break-glass", "close", "all", "--format", "json"]));
    assert_eq!((&closed["result"], closed["openings"].as_array().unwrap().len()), (&"closed".into(), 2));
    assert_eq!(lab.internet.connect(SocketAddr::new(SPOKE_PUBLIC, 2223), SHORT), Answer::Silent);

    // What will not help says so.
    let said = open("4444", "1m", &["--from", near]);
    assert!(said.contains("nobody listens on tcp/4444"), "{said}");
    let _mesh = lab.spoke.listen_tcp(SPOKE_MESH, 4445).unwrap();
    let said = open("4445", "1m", &["--from", near]);
    assert!(said.contains(&format!("listens at {SPOKE_MESH} only")), "{said}");
    lab.spoke.nft("add table ip other; add chain ip other c { type filter hook input priority 5; }; add rule ip other c tcp dport 2222 drop").unwrap();
    let said = open("2222", "1m", &["--from", near]);
    assert!(said.contains("table other chain c drops it all the same"), "{said}");

    // Nothing of it is written down: a kernel that starts anew knows of none.
    lab.spoke.sh("nft flush ruleset").unwrap();
    guard.enforce(&policy);
    assert_eq!(guard.says(0, &["break-glass", "list"]), "nothing is open\n");
    assert_eq!(from(&lab.internet, near, SPOKE_PUBLIC, 2222, SHORT), Answer::Silent);
}

#[test]
fn a_daemon_tells_of_openings_and_neither_lengthens_nor_revives_them() {
    if lacking(&[Need::Lab, Need::Spokeguard]) {
        return;
    }
    let lab = plain(false);
    let mut daemon = lab.spoke.daemon(&(plain_policy(&lab) + UNGUARDED)).unwrap();
    let _listeners = lab.spoke.listen("sshd", &["tcp/0.0.0.0:2222", "tcp/0.0.0.0:2224"]).unwrap();
    serve(&lab.spoke, SocketAddr::new(SPOKE_PUBLIC, 2225));
    let near = OUTSIDER.to_string();
    let run = |daemon: &lab::Daemon, words: &[&str]| {
        let outcome = lab.spoke.spokeguard(&daemon.arguments(&[&["break-glass"], words].concat())).unwrap();
        assert_eq!(outcome.code, Some(0), "{words:?}: {}", outcome.all());
        outcome.stdout
    };
    let within = |port, limit| lab.internet.connect(SocketAddr::new(SPOKE_PUBLIC, port), limit);
    let (opens, reaches) = (|port| within(port, LONG), |port| within(port, SHORT));
    let is = |kind: &'static str, port: &'static str| {
        move |event: &Value| event["kind"] == kind && event["subject"].as_str().unwrap().starts_with(port)
    };
    let events = Events::mark(&daemon);
    run(&daemon, &["open", "2222", "--for", "15m", "--from", &near, "--reason", "way in"]);
    let opened = events.wait(LONG, "told of", is("opened", "tcp/2222"));
    assert!(opened["found"].as_str().unwrap().contains("way in"), "{opened}");
    let told = findings(&status(&lab.spoke, &daemon), "break-glass-open");
    assert!(told.len() == 1 && told[0]["accepted"] == true, "{told:?}");
    assert_eq!(opens(2222), Answer::Open);

    // A rule is put back around it.
    lab.spoke.sh("nft flush chain inet spokeguard public").unwrap();
    events.wait(LONG, "a repair", |event| event["kind"] == "repaired");
    let (timeout, left) = element(&lab.spoke, SET).unwrap();
    assert!(timeout == 900 && left <= 900, "{timeout} {left}");

    // Killed and started again: the same opening, with less left of it.
    daemon.kill_9().unwrap();
    run(&daemon, &["open", "2224", "--for", "10s", "--from", &near]);
    assert_eq!(opens(2224), Answer::Open);
    // Silence alone may be a machine that is slow to answer.
    wait_until(LONG * 2, "closed with nobody alive", || {
        (elements(&lab.spoke, SET).len() == 1 && reaches(2224) == Answer::Silent).then_some(())
    })
    .unwrap();
    // What a version before this one leaves, and one that was killed while it tried whether it repairs its table.
    lab.spoke.sh("cd /sys/fs/bpf/spokeguard; mv guard1 guard7").unwrap();
    lab.spoke.nft("add chain inet spokeguard canary-00c0ffee").unwrap();
    let folder = daemon.folder().to_owned();
    let daemon = lab.spoke.daemon_in(&folder, &[]).unwrap();
    assert_eq!(lab.spoke.sh("ls /sys/fs/bpf/spokeguard | grep guard").unwrap().trim(), "guard1");
    assert!(!lab.spoke.ok(&["nft", "list", "table", "inet", "spokeguard"]).unwrap().contains("canary"));
    let (timeout, less) = element(&lab.spoke, SET).unwrap();
    assert!(timeout == 900 && less + 9 <= left, "{timeout} {less} after {left}");
    assert_eq!(opens(2222), Answer::Open);

    // The end comes while it is alive: told of, and what came in by it is cut.
    let events = Events::mark(&daemon);
    run(&daemon, &["open", "2225", "--for", "10s", "--from", &near]);
    let mut session = call(&lab.internet, SocketAddr::new(SPOKE_PUBLIC, 2225));
    assert_eq!(talks(&mut session, LONG), Ok(()));

    // Closed early; opened again, and gone with the table, which nothing brings back.
    run(&daemon, &["close", "2222"]);
    events.wait(LONG, "told of", is("closed", "tcp/2222"));
    run(&daemon, &["open", "2222", "--for", "15m", "--from", &near]);
    events.wait(LONG, "opened again", is("opened", "tcp/2222"));
    // The event is written before the text that scrapes get, and the other opening may have ended by now.
    wait_until(LONG, "counted", || (sum(&fresh(&lab.hub), "break_glass_open", &[]) >= 1.0).then_some(()))
        .unwrap();

    events.wait(LONG * 2, "told of", is("expired", "tcp/2225"));
    assert_eq!(session.read(&mut [0; 8]).map_err(|error| error.kind()), Err(ErrorKind::ConnectionReset));
    events.wait(LONG, "told of", |event| {
        event["kind"] == "cut"
            && event["found"].as_str().unwrap().contains("1 connections to this host, 0 other flows")
            && event["found"].as_str().unwrap().contains("-> 198.51.100.7:2225")
    });

    // Somebody opens both layers by other means, and comes in before they are put right.
    daemon.running.signal(Signal::STOP).unwrap();
    lab.spoke.sh("nft insert rule inet spokeguard input tcp dport 2225 accept").unwrap();
    assert_eq!(reaches(2225), Answer::Silent, "the second layer holds");
    unguard(&lab.spoke);
    // The kernel lets go of a program a moment after its pin.
    wait_until(LONG, "the second layer is gone", || (reaches(2225) == Answer::Open).then_some(())).unwrap();
    let mut slipped = call(&lab.internet, SocketAddr::new(SPOKE_PUBLIC, 2225));
    assert_eq!(talks(&mut slipped, LONG), Ok(()));
    daemon.running.signal(Signal::CONT).unwrap();
    assert_eq!(slipped.read(&mut [0; 8]).map_err(|error| error.kind()), Err(ErrorKind::ConnectionReset));
    assert_eq!(opens(2222), Answer::Open, "the repair took nothing from it");

    let events = Events::mark(&daemon);
    lab.spoke.sh("nft flush ruleset").unwrap();
    events.wait(LONG, "the table is back", |event| event["kind"] == "repaired");
    events.wait(LONG, "told of", is("closed", "tcp/2222"));
    assert_eq!(element(&lab.spoke, SET), None);
    assert_eq!(reaches(2222), Answer::Silent);
}

/// A connection whose far end waits for words and says them back.
fn echo(listener: TcpListener) {
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { return };
            std::thread::spawn(move || {
                let mut word = [0; 64];
                while let Ok(length @ 1..) = stream.read(&mut word) {
                    if stream.write_all(&word[..length]).is_err() {
                        return;
                    }
                }
            });
        }
    });
}

fn serve(node: &Node, at: SocketAddr) {
    echo(node.inside(|| Ok(TcpListener::bind(at)?)).unwrap());
}

fn call(node: &Node, to: SocketAddr) -> TcpStream {
    let stream = node.inside(|| Ok(TcpStream::connect_timeout(&to, LONG)?)).unwrap();
    stream.set_read_timeout(Some(LONG)).unwrap();
    stream
}

/// Whether a word comes back within the time.
fn talks(stream: &mut TcpStream, limit: Duration) -> Result<(), ErrorKind> {
    stream.set_read_timeout(Some(limit)).unwrap();
    stream.write_all(b"word").map_err(|error| error.kind())?;
    stream.read_exact(&mut [0; 4]).map_err(|error| error.kind())
}

#[test]
fn what_a_change_closes_is_cut_and_nothing_else() {
    if lacking(&[Need::Lab, Need::Spokeguard]) {
        return;
    }
    let lab = plain(true);
    let container = lab.container.as_ref().unwrap();
    let guard = Guard::new(&lab, &lab.spoke);
    let wide = plain_policy(&lab).replace("tcp = [80, 443]", "tcp = [443, 8080, 8443]\nudp = [5353]");
    lab.publish(8080, 80).unwrap();
    guard.enforce(&wide);

    let any = |port| SocketAddr::new("0.0.0.0".parse().unwrap(), port);
    for port in [443, 8443, 22] {
        serve(&lab.spoke, any(port));
    }
    serve(container, SocketAddr::new(CONTAINER, 80));
    // The same port elsewhere, which the spoke itself calls.
    serve(&lab.internet, SocketAddr::new(OUTSIDER, 8443));
    let udp = lab.spoke.inside(|| Ok(UdpSocket::bind(any(5353))?)).unwrap();

    let mut allowed = call(&lab.internet, SocketAddr::new(SPOKE_PUBLIC, 443));
    let mut closed = call(&lab.internet, SocketAddr::new(SPOKE_PUBLIC, 8443));
    let mut published = call(&lab.internet, SocketAddr::new(SPOKE_PUBLIC, 8080));
    let mut hub = call(&lab.hub, SocketAddr::new(SPOKE_MESH, 22));
    let mut own = call(&lab.spoke, SocketAddr::new(OUTSIDER, 8443));
    let mut inner = call(container, SocketAddr::new(OUTSIDER, 8443));
    assert_eq!(hub.peer_addr().unwrap().ip(), SPOKE_MESH, "{HUB_MESH}");
    for stream in [&mut allowed, &mut closed, &mut published, &mut hub, &mut own, &mut inner] {
        assert_eq!(talks(stream, LONG), Ok(()));
    }
    let client = lab.internet.inside(|| Ok(UdpSocket::bind(any(0))?)).unwrap();
    client.connect(SocketAddr::new(SPOKE_PUBLIC, 5353)).unwrap();
    let heard = |limit| {
        client.send(b"?").unwrap();
        udp.set_read_timeout(Some(limit)).unwrap();
        udp.recv_from(&mut [0; 8]).ok().map(|(_, peer)| peer)
    };
    let peer = heard(LONG).expect("UDP is open");
    udp.send_to(b"!", peer).unwrap();
    assert!(heard(LONG).is_some());

    // Before it is confirmed nothing is cut: it may be rolled back.
    guard.write(&plain_policy(&lab).replace("[80, 443]", "[443]"));
    guard.says(0, &["apply"]);
    assert!(heard(LONG).is_some(), "a flow of UDP is cut by nothing but us");
    let said = json(&guard.says(0, &["confirm", "--format", "json"]));
    let cut = &said["cut"];
    assert_eq!(
        (&cut["connections"], &cut["flows"], &cut["left"]),
        (&1.into(), &2.into(), &0.into()),
        "{said}"
    );

    // The host's own socket is gone at once, and both ends know.
    let gone = closed.read(&mut [0; 8]);
    assert_eq!(gone.map_err(|error| error.kind()), Err(ErrorKind::ConnectionReset));
    assert!(talks(&mut published, SHORT).is_err());
    assert!(heard(SHORT).is_none(), "UDP goes on after its port was closed");
    for stream in [&mut allowed, &mut hub, &mut own, &mut inner] {
        assert_eq!(talks(stream, LONG), Ok(()));
    }

    // Again there is nothing to cut, and audit mode cuts nothing at all.
    guard.enforce(&wide);
    let mut audited = call(&lab.internet, SocketAddr::new(SPOKE_PUBLIC, 8443));
    assert_eq!(talks(&mut audited, LONG), Ok(()));
    let audit = format!("{}[enforce]\nmode = \"audit\"\n", plain_policy(&lab));
    guard.write(&audit);
    // Nor is there anything to confirm.
    let said = json(&guard.says(0, &["apply", "--format", "json"]));
    assert_eq!((&said["cut"]["connections"], &said["cut"]["flows"]), (&0.into(), &0.into()), "{said}");
    assert_eq!(talks(&mut audited, LONG), Ok(()));

    // What came in by break-glass goes with it.
    guard.enforce(&plain_policy(&lab).replace("[80, 443]", "[443]"));
    guard.says(0, &["break-glass", "open", "8443", "--for", "5m", "--from", &OUTSIDER.to_string()]);
    let mut glass = call(&lab.internet, SocketAddr::new(SPOKE_PUBLIC, 8443));
    assert_eq!(talks(&mut glass, LONG), Ok(()));
    let said = guard.says(0, &["break-glass", "close", "8443"]);
    assert!(said.contains("cut: 1 connections to this host, 0 other flows"), "{said}");
    let gone = glass.read(&mut [0; 8]);
    assert_eq!(gone.map_err(|error| error.kind()), Err(ErrorKind::ConnectionReset));
    // The DNAT's original port counts here, too.
    guard.says(0, &["break-glass", "open", "8080", "--for", "5m", "--from", &OUTSIDER.to_string()]);
    let mut published = call(&lab.internet, SocketAddr::new(SPOKE_PUBLIC, 8080));
    assert_eq!(talks(&mut published, LONG), Ok(()));
    assert_eq!(lab.internet.connect(SocketAddr::new(SPOKE_PUBLIC, 80), SHORT), Answer::Silent);
    assert_eq!(talks(&mut hub, LONG), Ok(()));
}
