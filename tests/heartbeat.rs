//! Telling the hub: what Uptime Kuma, ntfy and a share get to see, from servers that are well, ill, away and
//! hostile; and what nobody gets to see.

use std::fs;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use lab::{Daemon, HUB_MESH, Lab, Need, Node, Signal, lacking, wait_until};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use serde_json::Value;

use crate::daemon::{Events, LONG, UNGUARDED, plain_policy};
use crate::metrics::{fresh, sum};

pub const SECRET: &str = "s3cr3tT0ken";
const TOKEN: &str = "tk_v3rys3cr3t";
const EVERY: &str = "1s";

/// How the server answers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Manner {
    /// Uptime Kuma; 1.x knows GET only.
    Kuma {
        any_method: bool,
    },
    /// ntfy takes JSON at its root.
    Ntfy,
    /// 200 and a page.
    Page,
    NoMonitor,
    Bad,
    Busy,
    Hang,
    Reset,
    Flood,
    Garbage,
    Redirect(SocketAddr),
}

/// One request as it came.
#[derive(Clone, Debug)]
pub struct Asked {
    method: String,
    target: String,
    head: String,
    pub body: String,
}

impl Asked {
    /// A value of the query, decoded.
    fn query(&self, key: &str) -> Option<String> {
        let pairs = self.target.split_once('?')?.1.split('&').filter_map(|pair| pair.split_once('='));
        pairs.into_iter().find(|(name, _)| *name == key).map(|(_, value)| decoded(value))
    }

    /// The figures at the end of a beat's message.
    fn payload(&self) -> Value {
        let message = self.query("msg").unwrap_or_default();
        let at = message.find(" {").unwrap_or_else(|| panic!("no payload in {message}"));
        serde_json::from_str(&message[at..]).unwrap_or_else(|error| panic!("{error} in {message}"))
    }
}

fn decoded(text: &str) -> String {
    let mut bytes = Vec::new();
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        let mut digit = || char::from(rest.next().unwrap()).to_digit(16).unwrap() as u8;
        bytes.push(if byte == b'%' { (digit() << 4) | digit() } else { byte });
    }
    String::from_utf8(bytes).unwrap()
}

/// A web server of the test's own in a node.
pub struct Stub {
    pub address: SocketAddr,
    manner: Arc<Mutex<Manner>>,
    asked: Arc<Mutex<Vec<Asked>>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Stub {
    pub fn start(node: &Node, address: SocketAddr, manner: Manner) -> Self {
        Self::with(node, address, manner, None)
    }

    fn with(
        node: &Node,
        address: SocketAddr,
        manner: Manner,
        tls: Option<Arc<rustls::ServerConfig>>,
    ) -> Self {
        let listener = wait_until(LONG, "the server's port is free", || {
            node.inside(|| Ok(TcpListener::bind(address)?)).ok()
        })
        .unwrap();
        listener.set_nonblocking(true).unwrap();
        let (manner, asked) = (Arc::new(Mutex::new(manner)), Arc::new(Mutex::new(Vec::new())));
        let stop = Arc::new(AtomicBool::new(false));
        let shared = (Arc::clone(&manner), Arc::clone(&asked), Arc::clone(&stop));
        let thread = std::thread::spawn(move || {
            let (manner, asked, stop) = shared;
            while !stop.load(Ordering::Relaxed) {
                let Ok((stream, _)) = listener.accept() else {
                    std::thread::sleep(Duration::from_millis(5));
                    continue;
                };
                let (manner, asked, stop) = (Arc::clone(&manner), Arc::clone(&asked), Arc::clone(&stop));
                let tls = tls.clone();
                std::thread::spawn(move || {
                    let _ = stream.set_nonblocking(false);
                    let _ = stream.set_read_timeout(Some(LONG));
                    let _ = stream.set_write_timeout(Some(LONG));
                    // How a client leaves is its own business.
                    let _ = match tls {
                        None => converse(stream, &manner, &asked, &stop),
                        Some(config) => {
                            let connection = rustls::ServerConnection::new(config).unwrap();
                            converse(rustls::StreamOwned::new(connection, stream), &manner, &asked, &stop)
                        }
                    };
                });
            }
        });
        Self { address, manner, asked, stop, thread: Some(thread) }
    }

    fn is(&self, manner: Manner) {
        *self.manner.lock().unwrap() = manner;
    }

    pub fn count(&self) -> usize {
        self.asked.lock().unwrap().len()
    }

    pub fn all(&self) -> Vec<Asked> {
        self.asked.lock().unwrap().clone()
    }

    /// The first request after `from` that is wanted.
    fn wait(&self, from: usize, what: &str, daemon: &Daemon, wanted: impl Fn(&Asked) -> bool) -> Asked {
        wait_until(LONG, what, || self.all().into_iter().skip(from).find(|asked| wanted(asked)))
            .unwrap_or_else(|error| panic!("{error:#}\n{:#?}\n{}", self.all(), daemon.running.log()))
    }
}

impl Drop for Stub {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn converse(
    mut stream: impl Read + Write,
    manner: &Mutex<Manner>,
    asked: &Mutex<Vec<Asked>>,
    stop: &AtomicBool,
) -> std::io::Result<()> {
    let mut text = Vec::new();
    let mut buffer = [0; 4096];
    let request = loop {
        let length = stream.read(&mut buffer)?;
        if length == 0 || text.len() > 64 * 1024 {
            return Ok(());
        }
        text.extend(&buffer[..length]);
        if let Some(request) = parsed(&text) {
            break request;
        }
    };
    let manner = *manner.lock().unwrap();
    let get = request.method == "GET";
    let is_push = request.target.starts_with(&format!("/api/push/{SECRET}?"));
    let json: Option<Value> = serde_json::from_str(&request.body).ok();
    let is_notice =
        request.method == "POST" && request.target == "/" && json.is_some_and(|json| json["topic"] == SECRET);
    asked.lock().unwrap().push(request);
    let kind_json = "application/json; charset=utf-8";
    let (status, kind, body) = match manner {
        Manner::Kuma { any_method } if !get && !any_method => ("404 Not Found", "text/html", "Cannot POST"),
        Manner::Kuma { .. } if is_push => ("200 OK", kind_json, r#"{"ok":true}"#),
        Manner::Kuma { .. } | Manner::Page => {
            ("200 OK", "text/html", "<!DOCTYPE html><title>Uptime Kuma</title>")
        }
        Manner::Ntfy if is_notice => ("200 OK", kind_json, r#"{"id":"x"}"#),
        Manner::Ntfy => ("404 Not Found", kind_json, r#"{"code":40401}"#),
        Manner::NoMonitor => {
            ("404 Not Found", kind_json, r#"{"ok":false,"msg":"Monitor not found or not active."}"#)
        }
        Manner::Bad => ("400 Bad Request", kind_json, r#"{"ok":true}"#),
        Manner::Busy => ("429 Too Many Requests\r\nRetry-After: 1", kind_json, r#"{"code":42901}"#),
        Manner::Hang => {
            while !stop.load(Ordering::Relaxed) && stream.write_all(b"").is_ok() {
                std::thread::sleep(Duration::from_millis(20));
            }
            return Ok(());
        }
        Manner::Reset => return Ok(()),
        Manner::Flood => {
            stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n")?;
            let block = [b'['; 65_536];
            // Until the client has had enough.
            while !stop.load(Ordering::Relaxed) {
                stream.write_all(&block)?;
            }
            return Ok(());
        }
        Manner::Garbage => return stream.write_all(&[0xff; 300]),
        Manner::Redirect(to) => {
            let head =
                format!("HTTP/1.1 302 Found\r\nLocation: http://{to}/elsewhere\r\nContent-Length: 0\r\n\r\n");
            return stream.write_all(head.as_bytes());
        }
    };
    let head = format!("HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {}\r\n\r\n", body.len());
    stream.write_all(head.as_bytes())?;
    stream.write_all(body.as_bytes())?;
    stream.flush()
}

/// The request, once it is whole.
fn parsed(text: &[u8]) -> Option<Asked> {
    let text = String::from_utf8_lossy(text);
    let (head, body) = text.split_once("\r\n\r\n")?;
    let length = head.lines().find_map(|line| {
        line.to_ascii_lowercase().strip_prefix("content-length:")?.trim().parse::<usize>().ok()
    });
    if body.len() < length.unwrap_or(0) {
        return None;
    }
    let mut words = head.split(' ');
    let (method, target) = (words.next()?.to_owned(), words.next()?.to_owned());
    Some(Asked { method, target, head: head.to_owned(), body: body.to_owned() })
}

fn on_hub(port: u16) -> SocketAddr {
    SocketAddr::new(HUB_MESH, port)
}

/// On the mesh, as the policy says.
fn sshd(lab: &Lab) -> lab::Sshd {
    lab.spoke.sshd(22, &["10.84.0.16", "fd84::16"], "KbdInteractiveAuthentication no").unwrap()
}

/// A file that only root reads.
fn secret_file(lab: &Lab, name: &str, text: &str) -> String {
    let path = lab.file(name, text).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    path.display().to_string()
}

/// Nothing that was written or can be looked at has a secret in it.
fn assert_secret(lab: &Lab, daemon: &Daemon) {
    let status = lab.spoke.spokeguard(&daemon.arguments(&["status", "--format", "json"])).unwrap();
    let mut places = vec![("log", daemon.running.log()), ("status", status.stdout)];
    places.push(("metrics", fresh(&lab.hub)));
    for folder in [&daemon.state_dir, &daemon.run_dir] {
        for entry in fs::read_dir(folder).unwrap().flatten() {
            places.push(("a file", fs::read_to_string(entry.path()).unwrap_or_default()));
        }
    }
    for (place, text) in places {
        for secret in [SECRET, TOKEN] {
            assert!(!text.contains(secret), "{place} tells a secret:\n{text}");
        }
    }
}

/// The process that sends for this daemon, while there is one.
fn sender(daemon: &Daemon) -> Option<u32> {
    let pid = daemon.running.pid();
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).ok()?;
    let children = tasks.flatten().filter_map(|task| fs::read_to_string(task.path().join("children")).ok());
    let pids: Vec<u32> =
        children.flat_map(|text| text.split_whitespace().flat_map(str::parse).collect::<Vec<_>>()).collect();
    let named = |pid: &u32| {
        fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|comm| comm == "spokeguard-send\n")
    };
    pids.into_iter().find(named)
}

#[test]
fn heartbeats_carry_what_is_known_and_no_server_delays_what_enforces() {
    if lacking(&[Need::Lab, Need::Sshd, Need::Faketime, Need::Spokeguard]) {
        return;
    }
    let lab = Lab::plain();
    let _sshd = sshd(&lab);
    let kuma = Stub::start(&lab.hub, on_hub(3001), Manner::Kuma { any_method: false });
    let elsewhere = Stub::start(&lab.hub, on_hub(3002), Manner::Kuma { any_method: true });
    let url = format!("http://{}/api/push/{SECRET}?status=up&msg=OK&ping=\n", kuma.address);
    let url_file = secret_file(&lab, "kuma-url", &url);
    let app = lab
        .file("app.json", r#"{"req_1h": 1200, "err_1h": 3, "db_integrity": "ok", "active_sessions": "no"}"#)
        .unwrap();
    let database = lab.file("vault.db", &"x".repeat(3 << 20)).unwrap();
    let status_file = lab.dir.join("_status.json");
    let policy = plain_policy(&lab)
        + UNGUARDED
        + &format!(
            "[heartbeat]\nkuma_url_file = \"{url_file}\"\nevery = \"{EVERY}\"\nstatus_file = \"{}\"\n\
             app_file = \"{}\"\ndatabase_file = \"{}\"\n",
            status_file.display(),
            app.display(),
            database.display()
        );
    let clock = lab.file("clock", "+0").unwrap();
    let library = lab.spoke.sh("ls /usr/lib/*/faketime/libfaketimeMT.so.1").unwrap();
    let wrapper = [
        "env",
        &format!("LD_PRELOAD={}", library.trim()),
        &format!("FAKETIME_TIMESTAMP_FILE={}", clock.display()),
        "FAKETIME_NO_CACHE=1",
        "FAKETIME_DONT_FAKE_MONOTONIC=1",
    ];
    let folder = lab.dir.join("guard");
    fs::create_dir_all(&folder).unwrap();
    fs::write(folder.join("policy.toml"), policy).unwrap();
    let daemon = lab.spoke.daemon_under(&wrapper, &folder, &[]).unwrap();

    // A beat as Kuma takes it, with figures of the host and of the application.
    let known = |asked: &Asked| {
        asked.query("status").as_deref() == Some("up") && asked.payload()["cpu_pct"].is_number()
    };
    let beat = kuma.wait(0, "a beat that says up", &daemon, known);
    assert_eq!((beat.method.as_str(), beat.body.as_str()), ("GET", ""));
    let message = beat.query("msg").unwrap();
    assert!(
        message.starts_with("ok: 0 findings; active_sessions in app_file is not a whole number {"),
        "{message}"
    );
    let ping: f64 = beat.query("ping").expect("the hub answers an echo").parse().unwrap();
    assert!((0.0..5000.0).contains(&ping), "{ping}");
    let payload = beat.payload();
    assert_eq!(
        (&payload["node"], &payload["req_1h"], &payload["err_1h"]),
        (&"singapore".into(), &1200.into(), &3.into())
    );
    assert_eq!((&payload["db_size_mb"], &payload["db_integrity"]), (&3.0.into(), &"ok".into()));
    for figure in ["ram_mb", "disk_pct", "cpu_pct", "uptime_s"] {
        assert!(payload[figure].is_number(), "{figure} in {payload}");
    }
    for unknown in ["active_sessions", "cert_days_remaining", "nix_gen"] {
        assert!(payload.get(unknown).is_none(), "{unknown} in {payload}");
    }
    let status: Value = serde_json::from_str(&fs::read_to_string(&status_file).unwrap()).unwrap();
    assert_eq!((&status["ok"], &status["node"]), (&true.into(), &"singapore".into()), "{status}");

    // A clock that is set makes files old or of the future, and beats neither rare nor many.
    for (jump, said) in [("+2h", "app_file is 1"), ("-1d", "app_file was written in the future")] {
        let (from, begun) = (kuma.count(), Instant::now());
        fs::write(&clock, jump).unwrap();
        let told = |asked: &Asked| asked.query("msg").is_some_and(|msg| msg.contains(said));
        let beat = kuma.wait(from, said, &daemon, told);
        assert!(beat.payload().get("req_1h").is_none(), "{beat:?}");
        assert!((kuma.count() - from) as f64 <= begun.elapsed().as_secs_f64() + 2.0, "{:?}", kuma.all());
    }
    fs::write(&clock, "+0").unwrap();
    let from = kuma.count();
    kuma.wait(from, "a beat of now", &daemon, known);

    // While a request hangs, what sends is held in, and has the URL where nobody else sees it.
    kuma.is(Manner::Hang);
    // One of the beat before may be at its end: it is looked for anew each time.
    let pid = wait_until(LONG, "a process that sends, and has dropped what it had", || {
        let pid = sender(&daemon)?;
        let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
        let none = ["CapEff", "CapPrm", "CapInh", "CapAmb"]
            .iter()
            .all(|set| status.contains(&format!("{set}:\t0000000000000000")));
        (none && status.contains("Seccomp:\t2") && status.contains("NoNewPrivs:\t1")).then_some(pid)
    })
    .unwrap();
    for file in ["cmdline", "environ"] {
        let text = fs::read(format!("/proc/{pid}/{file}")).unwrap_or_default();
        assert!(!String::from_utf8_lossy(&text).contains(SECRET), "{file} tells the URL");
    }
    // Enforcement goes on meanwhile.
    let events = Events::mark(&daemon);
    lab.spoke.ok(&["nft", "flush", "ruleset"]).unwrap();
    let repaired = events.wait(LONG, "a repair while the hub hangs", |e| e["kind"] == "repaired");
    assert!(repaired["took_ms"].as_u64().is_some_and(|ms| ms < 5000), "{repaired}");

    wait_until(LONG, "patience ends", || {
        daemon.running.log().contains("kuma: no answer in time").then_some(())
    })
    .unwrap_or_else(|error| panic!("{error:#}\n{}", daemon.running.log()));

    // Every way not to say yes is one warning and no beat.
    let troubles = [
        (Manner::Page, "not the service's"),
        (Manner::NoMonitor, "no such monitor, or it is paused"),
        (Manner::Bad, "HTTP 400"),
        (Manner::Reset, "broke off"),
        (Manner::Redirect(elsewhere.address), "a redirect"),
        (Manner::Flood, "not the service's"),
        (Manner::Garbage, "broke off"),
    ];
    for (manner, said) in troubles {
        // Where the log ends before: the next beat may come at once.
        let from = daemon.running.log().len();
        kuma.is(Manner::Kuma { any_method: true });
        let log = |wanted: &str| {
            wait_until(LONG, &format!("`{wanted}` after {manner:?}"), || {
                daemon.running.log().get(from..)?.contains(wanted).then_some(())
            })
            .unwrap_or_else(|error| panic!("{error:#}\n{}", daemon.running.log()))
        };
        log("kuma: as it should be again");
        kuma.is(manner);
        log(said);
    }
    assert_eq!(elsewhere.count(), 0, "a redirect was followed: {:?}", elsewhere.all());
    let before = kuma.count();
    wait_until(LONG, "more of the same", || (kuma.count() > before + 1).then_some(())).unwrap();
    assert!(daemon.running.log().matches("broke off").count() <= 3, "{}", daemon.running.log());
    let metrics = fresh(&lab.hub);
    let sent = |outcome| sum(&metrics, "heartbeat_total", &[("target", "kuma"), ("outcome", outcome)]);
    assert!(sent("accepted") > 3.0 && sent("refused") > 4.0 && sent("unreachable") > 1.0, "{metrics}");
    assert_secret(&lab, &daemon);

    // Silent when it is stuck, and back when it is not.
    kuma.is(Manner::Kuma { any_method: false });
    daemon.running.signal(Signal::STOP).unwrap();
    let (mut last, mut since) = (kuma.count(), Instant::now());
    wait_until(LONG, "silence", || {
        if kuma.count() != last {
            (last, since) = (kuma.count(), Instant::now());
        }
        (since.elapsed() > Duration::from_secs(3)).then_some(())
    })
    .unwrap();
    daemon.running.signal(Signal::CONT).unwrap();
    kuma.wait(last, "a beat again", &daemon, known);

    // Strangers get in: the node is down, and it says why.
    let _database = lab.spoke.listen("postgres", &["tcp/0.0.0.0:5432"]).unwrap();
    lab.spoke.nft("add table inet other").unwrap();
    let from = kuma.count();
    let told = |asked: &Asked| {
        asked.query("msg").is_some_and(|msg| msg.contains("tcp/0.0.0.0:5432") && msg.contains("postgres"))
    };
    let wide = kuma.wait(from, "a beat that tells of the listener", &daemon, told);
    assert!(wide.query("msg").unwrap().starts_with("drift: 1 finding; "), "{wide:?}");
}

#[test]
fn heartbeats_over_tls_trust_what_the_host_trusts_and_know_the_hosts_own_certificate() {
    if lacking(&[Need::Lab, Need::Openssl, Need::Spokeguard]) {
        return;
    }
    let lab = Lab::plain();
    let authority = |name: &str| {
        lab.spoke
            .sh(&format!(
                "cd {0}; openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 9 -subj /CN={name} \
                 -keyout {name}.key -out {name}.pem 2>&1",
                lab.dir.display()
            ))
            .unwrap();
    };
    let certificate = |authority: &str, host: &str, days: u32| {
        let dir = lab.dir.display();
        lab.spoke
            .sh(&format!(
                "cd {dir}; openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN={host} \
                 -keyout {host}-{authority}.key -out {host}.csr 2>&1
                 printf 'subjectAltName=DNS:{host}' > {host}.ext
                 openssl x509 -req -in {host}.csr -CA {authority}.pem -CAkey {authority}.key -CAcreateserial \
                 -days {days} -extfile {host}.ext -out {host}-{authority}.pem 2>&1"
            ))
            .unwrap();
        let path = |end: &str| lab.dir.join(format!("{host}-{authority}.{end}"));
        let chain = CertificateDer::pem_file_iter(path("pem")).unwrap().collect::<Result<_, _>>().unwrap();
        let key = PrivateKeyDer::from_pem_file(path("key")).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(chain, key);
        Arc::new(config.unwrap())
    };
    authority("ours");
    authority("theirs");
    let address = on_hub(3443);
    let well = Manner::Kuma { any_method: true };
    let kuma = Stub::with(&lab.hub, address, well, Some(certificate("ours", "kuma.example.org", 9)));
    // On port 443 of the spoke somebody serves a certificate that nobody has to trust.
    let own = SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), 443);
    let _own = Stub::with(&lab.spoke, own, Manner::Page, Some(certificate("theirs", "oslo.example.org", 40)));
    // A name, resolved as the host resolves names.
    let hosts = lab.file("hosts", &format!("127.0.0.1 localhost\n{HUB_MESH} kuma.example.org\n")).unwrap();
    lab.spoke.sh(&format!("mount --bind {} /etc/hosts", hosts.display())).unwrap();
    let url = format!("https://kuma.example.org:{}/api/push/{SECRET}\n", address.port());
    let url_file = secret_file(&lab, "kuma-url", &url);
    let policy = plain_policy(&lab)
        + &format!(
            "[heartbeat]\nkuma_url_file = \"kuma-url\"\nevery = \"{EVERY}\"\ncertificate_name = \"oslo.example.org\"\n"
        );
    // The file is a credential of the service.
    let credentials = Path::new(&url_file).parent().unwrap().display();
    let wrapper = [
        "env",
        &format!("SSL_CERT_FILE={}/ours.pem", lab.dir.display()),
        &format!("CREDENTIALS_DIRECTORY={credentials}"),
    ];
    let folder = lab.dir.join("guard");
    fs::create_dir_all(&folder).unwrap();
    fs::write(folder.join("policy.toml"), policy).unwrap();
    let daemon = lab.spoke.daemon_under(&wrapper, &folder, &[]).unwrap();
    let certified = |asked: &Asked| asked.payload()["cert_days_remaining"].is_number();
    let beat = kuma.wait(0, "a beat by TLS that knows the certificate", &daemon, certified);
    assert_eq!(beat.payload()["cert_days_remaining"], 39, "{beat:?}");
    assert!(beat.head.to_ascii_lowercase().contains("host: kuma.example.org"), "{}", beat.head);
    assert!(!daemon.running.log().contains("process that sends"), "{}", daemon.running.log());
    drop(kuma);

    // The same server by somebody else's authority gets nothing.
    let kuma = Stub::with(&lab.hub, address, well, Some(certificate("theirs", "kuma.example.org", 9)));
    wait_until(LONG, "no trust in it", || {
        daemon.running.log().contains("kuma: TLS: its certificate").then_some(())
    })
    .unwrap_or_else(|error| panic!("{error:#}\n{}", daemon.running.log()));
    assert_eq!(kuma.count(), 0, "{:?}", kuma.all());
    drop(kuma);
    // And one for another name.
    let kuma = Stub::with(&lab.hub, address, well, Some(certificate("ours", "oslo.example.org", 9)));
    let refused = || sum(&fresh(&lab.hub), "heartbeat_total", &[("outcome", "unreachable")]);
    let before = refused();
    wait_until(LONG, "another name", || (refused() >= before + 2.0).then_some(())).unwrap();
    assert_eq!(kuma.count(), 0, "{:?}", kuma.all());
    assert_secret(&lab, &daemon);
}

#[test]
fn notices_tell_each_finding_once_and_after_an_outage_late_and_in_order() {
    if lacking(&[Need::Lab, Need::Sshd, Need::Spokeguard]) {
        return;
    }
    let lab = Lab::plain();
    let _sshd = sshd(&lab);
    let address = on_hub(2586);
    let ntfy = Stub::start(&lab.hub, address, Manner::Busy);
    let url_file = secret_file(&lab, "ntfy-url", &format!("http://{address}/{SECRET}\n{TOKEN}\n"));
    let policy = plain_policy(&lab)
        + UNGUARDED
        + &format!("[heartbeat]\nntfy_url_file = \"{url_file}\"\nevery = \"{EVERY}\"\n");
    let daemon = lab.spoke.daemon(&policy).unwrap();
    let notice = |asked: &Asked| serde_json::from_str::<Value>(&asked.body).unwrap();
    let about = |text: &'static str| move |asked: &Asked| asked.body.contains(text);

    // Asked for patience, it comes again with the same.
    let events = Events::mark(&daemon);
    let redis = lab.spoke.listen("redis", &["tcp/0.0.0.0:6379"]).unwrap();
    events.wait(LONG, "drift", |e| e["subject"] == "tcp/0.0.0.0:6379");
    ntfy.wait(0, "a notice", &daemon, about("tcp/0.0.0.0:6379"));
    ntfy.is(Manner::Ntfy);
    let from = ntfy.count();
    let told = ntfy.wait(from, "the notice again", &daemon, about("tcp/0.0.0.0:6379"));
    let json = notice(&told);
    assert_eq!((told.method.as_str(), told.target.as_str()), ("POST", "/"));
    assert!(
        told.head
            .to_ascii_lowercase()
            .contains(&format!("authorization: bearer {}", TOKEN.to_ascii_lowercase()))
    );
    assert!(json["title"].as_str().unwrap().ends_with("singapore: drift listener-wide"), "{json}");
    assert!(json["message"].as_str().unwrap().contains("redis"), "{json}");
    let priority = json["priority"].as_u64().unwrap();
    assert!((3..=5).contains(&priority), "{json}");
    drop(redis);
    let over = ntfy.wait(from, "that it is over", &daemon, about("recovered"));
    assert_eq!(notice(&over)["priority"], 2);

    // A table that is flushed again and again is one finding.
    let from = ntfy.count();
    for _ in 0..8 {
        let events = Events::mark(&daemon);
        lab.spoke.ok(&["nft", "flush", "ruleset"]).unwrap();
        events.wait(LONG, "a repair", |e| e["kind"] == "repaired");
    }
    ntfy.wait(from, "a repair is told", &daemon, about("firewall-missing"));
    let repairs =
        ntfy.all().iter().skip(from).filter(|asked| asked.body.contains("firewall-missing")).count();
    // Once that it was repaired, and once that it was gone, if a look came in between.
    assert!(repairs <= 2, "{:#?}", ntfy.all());

    // The hub goes away; what happens meanwhile is enforced, queued, and told afterwards.
    drop(ntfy);
    let events = Events::mark(&daemon);
    lab.spoke.ok(&["nft", "flush", "ruleset"]).unwrap();
    events.wait(LONG, "a repair while the hub is away", |e| e["kind"] == "repaired");
    // Not before: a look at the moment without a table would tell of them as exposed.
    let mut listening = Vec::new();
    for (port, subject) in
        [("5001", "tcp/0.0.0.0:5001"), ("5002", "tcp/0.0.0.0:5002"), ("5003", "tcp/0.0.0.0:5003")]
    {
        let events = Events::mark(&daemon);
        listening.push(lab.spoke.listen("late", &[&format!("tcp/0.0.0.0:{port}")]).unwrap());
        events.wait(LONG, "drift while the hub is away", |e| e["subject"] == subject);
    }
    wait_until(LONG, "they wait", || {
        let metrics = fresh(&lab.hub);
        let away = sum(&metrics, "heartbeat_total", &[("target", "ntfy"), ("outcome", "unreachable")]);
        (sum(&metrics, "heartbeat_queue", &[]) >= 3.0 && away >= 1.0).then_some(())
    })
    .unwrap_or_else(|error| panic!("{error:#}\n{}", fresh(&lab.hub)));
    let begun = Instant::now();
    // Late is what waited for two beats; the last one may have come right before the next try.
    wait_until(LONG, "the last one is late", || {
        (begun.elapsed() > Duration::from_millis(2500)).then_some(())
    })
    .unwrap();
    let ntfy = Stub::start(&lab.hub, address, Manner::Ntfy);
    ntfy.wait(0, "the last of them", &daemon, about("tcp/0.0.0.0:5003"));
    let late: Vec<Value> =
        ntfy.all().iter().filter(|asked| asked.body.contains(" by late (")).map(notice).collect();
    assert_eq!(late.len(), 3, "{late:#?} of {:#?}", ntfy.all());
    for (notice, port) in late.iter().zip([5001, 5002, 5003]) {
        assert!(notice["title"].as_str().unwrap().starts_with("[late "), "{late:#?}");
        assert!(
            notice["message"].as_str().unwrap().starts_with(&format!("tcp/0.0.0.0:{port} ")),
            "{late:#?}"
        );
    }
    assert_secret(&lab, &daemon);
    over_restarts(&lab, daemon, ntfy, listening);
}

/// What waits when the daemon is killed is told by the next one, late and in order; so is that something is over of
/// which only the one before knew that it had been told.
fn over_restarts(lab: &Lab, mut daemon: Daemon, ntfy: Stub, mut listening: Vec<lab::Listening>) {
    let (address, folder) = (ntfy.address, daemon.policy.parent().unwrap().to_owned());
    let file = daemon.state_dir.join("notices.json");
    let kept = || fs::read_to_string(&file).unwrap_or_default();
    let waiting = |text: &str| text.split("\"wrong\"").next().unwrap_or_default().to_owned();
    let await_kept = |what: &str, is: &dyn Fn(&str) -> bool| {
        wait_until(LONG, what, || is(&kept()).then_some(()))
            .unwrap_or_else(|error| panic!("{error:#}\n{}", kept()))
    };
    await_kept("none of them waits", &|text| !waiting(text).contains("tcp/"));
    drop(ntfy);
    for port in ["5004", "5005"] {
        listening.push(lab.spoke.listen("late", &[&format!("tcp/0.0.0.0:{port}")]).unwrap());
        await_kept("it is on the disk", &|text| waiting(text).contains(port));
    }
    let mode = fs::metadata(&file).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600, "{mode:o}");
    assert_secret(lab, &daemon);
    daemon.running.signal(Signal::KILL).unwrap();
    daemon.running.wait(LONG).unwrap();
    drop(listening.remove(0));
    let mut daemon = lab.spoke.daemon_in(&folder, &[]).unwrap();
    await_kept("what is over waits behind them", &|text| waiting(text).contains("\"recovered\""));
    daemon.running.stop().unwrap();

    // The hub is back already, so that nothing waits any longer than that.
    let ntfy = Stub::start(&lab.hub, address, Manner::Ntfy);
    let daemon = lab.spoke.daemon_in(&folder, &[]).unwrap();
    ntfy.wait(0, "the last of them", &daemon, |asked| asked.body.contains("recovered"));
    let told: Vec<(String, String)> = ntfy
        .all()
        .iter()
        .filter_map(|asked| serde_json::from_str::<Value>(&asked.body).ok())
        .map(|json| ["title", "message"].map(|key| json[key].as_str().unwrap_or_default().to_owned()))
        .filter(|[_, message]| message.starts_with("tcp/"))
        .map(|[title, message]| (title, message))
        .collect();
    let begins = ["tcp/0.0.0.0:5004 ", "tcp/0.0.0.0:5005 ", "tcp/0.0.0.0:5001 "];
    assert_eq!(told.len(), begins.len(), "{told:#?}");
    for ((title, message), begin) in told.iter().zip(begins) {
        assert!(title.starts_with("[late ") && message.starts_with(begin), "{told:#?}");
    }
    await_kept("none of them waits", &|text| !waiting(text).contains("tcp/"));

    // A file that makes no sense is set aside and said to be; what happens from then on is told.
    let mut daemon = daemon;
    daemon.running.stop().unwrap();
    fs::write(&file, "{\"version\":1,\"waiting\":[{\u{1b}").unwrap();
    let daemon = lab.spoke.daemon_in(&folder, &[]).unwrap();
    let aside = file.with_file_name("notices.json.unreadable");
    assert!(fs::read_to_string(&aside).unwrap().ends_with("[{\u{1b}"));
    let log = daemon.running.log();
    let line = log
        .lines()
        .find(|line| line.contains("notices that waited are lost"))
        .unwrap_or_else(|| panic!("{log}"));
    assert!(line.contains("set aside as ") && !line.contains('\u{1b}'), "{line}");
    let from = ntfy.count();
    listening.push(lab.spoke.listen("late", &["tcp/0.0.0.0:5006"]).unwrap());
    let told = ntfy.wait(from, "one that is not late", &daemon, |asked| asked.body.contains(":5006 "));
    assert!(!told.body.contains("[late "), "{told:?}");
    assert_secret(lab, &daemon);
}
