//! `/metrics` and `/healthz` for the hub, on the mesh addresses only. Runs in a process of
//! its own ([`super::server`]).
//!
//! Serves the text that the daemon leaves in a [`Face`]. A scrape rings for a fresh one, at
//! most every 250 ms, and takes the last one if the daemon has no time; so a client can make
//! this module busy and nothing else. Each connection is
//! for one request and has a deadline; when there are too many, the oldest goes, so that
//! clients that sit on theirs can't keep the hub's next scrape out.

use std::collections::{BTreeMap, VecDeque};
use std::convert::Infallible;
use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use http_body_util::Full;
use hyper::body::Bytes;
use hyper::header::{self, HeaderMap, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use ipnet::IpNet;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::Notify;
use tokio::task::{AbortHandle, JoinHandle};

use crate::metrics::to_prometheus_text;
use crate::sys::sockets::listen_freebind;

const CONNECTIONS_MAX: usize = 16;
const BACKLOG: u32 = 128;
const HEADER_TIMEOUT: Duration = Duration::from_secs(5);
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
/// Prometheus sends some 400 bytes. The smallest buffer hyper takes is 8 KiB.
const HEADER_BYTES_MAX: usize = 8 * 1024;
const HEADERS_MAX: usize = 64;
/// `/healthz` fails when the loop has not finished a cycle for this many periods.
const PERIODS_MAX: u32 = 3;
/// A text of this age is served as it is.
const FRESH: Duration = Duration::from_millis(250);
/// How long a scrape waits for the loop, which may be busy with a repair.
const PATIENCE: Duration = Duration::from_millis(500);

const OPENMETRICS: HeaderValue =
    HeaderValue::from_static("application/openmetrics-text; version=1.0.0; charset=utf-8");
const TEXT: HeaderValue = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
const PLAIN: HeaderValue = HeaderValue::from_static("text/plain; charset=utf-8");

/// What the server shows. Cheap to clone; every clone is the same face.
#[derive(Clone, Default)]
pub struct Face(Arc<Shared>);

#[derive(Default)]
struct Shared {
    openmetrics: Mutex<Option<Bytes>>,
    beat: Mutex<Option<Beat>>,
    rejects: AtomicU64,
    /// When the text was made, and who waits for the next.
    made: Mutex<Option<Instant>>,
    wanted: Notify,
    renewed: Notify,
    /// Open connections of all listeners, oldest first.
    open: Mutex<VecDeque<AbortHandle>>,
}

/// A finished cycle, and how long it may be until the next.
#[derive(Clone, Copy, Debug)]
pub struct Beat {
    pub at: Instant,
    pub period: Duration,
}

impl Face {
    /// Shows this OpenMetrics text from now on.
    pub fn set(&self, openmetrics: String) {
        *locked(&self.0.openmetrics) = Some(Bytes::from(openmetrics));
        *locked(&self.0.made) = Some(Instant::now());
        self.0.renewed.notify_waiters();
    }

    /// Waits until a scrape wants a text newer than the last one.
    pub async fn wanted(&self) {
        self.0.wanted.notified().await;
    }

    /// Rings for a fresh text where the last one is older than [`FRESH`], and waits for it
    /// no longer than [`PATIENCE`].
    async fn refresh(&self) {
        if locked(&self.0.made).is_some_and(|made| made.elapsed() < FRESH) {
            return;
        }
        let renewed = self.0.renewed.notified();
        self.0.wanted.notify_one();
        let _ = tokio::time::timeout(PATIENCE, renewed).await;
    }

    pub fn set_health(&self, beat: Beat) {
        *locked(&self.0.beat) = Some(beat);
    }

    /// Connections that were closed because they were not the hub's, or were too many.
    pub fn rejects(&self) -> u64 {
        self.0.rejects.load(Ordering::Relaxed)
    }

    fn reject(&self) {
        self.0.rejects.fetch_add(1, Ordering::Relaxed);
    }

    /// Why we are not healthy, if we are not.
    fn ailment(&self, now: Instant) -> Option<String> {
        let Some(beat) = *locked(&self.0.beat) else {
            return Some("the first cycle has not finished yet".to_owned());
        };
        let age = now.saturating_duration_since(beat.at);
        (age > beat.period.saturating_mul(PERIODS_MAX)).then(|| {
            format!("no cycle has finished for {} s; one is due every {:?}", age.as_secs(), beat.period)
        })
    }

    /// Takes a connection in, at the cost of the oldest where there are too many.
    fn admit(&self, connection: AbortHandle) {
        let mut open = locked(&self.0.open);
        open.retain(|handle| !handle.is_finished());
        if open.len() >= CONNECTIONS_MAX
            && let Some(oldest) = open.pop_front()
        {
            oldest.abort();
            self.reject();
        }
        open.push_back(connection);
    }
}

/// Nothing here panics while it holds a lock, and if it did, the values would still be whole.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The listeners, one for each mesh address. They outlive their address: IP_FREEBIND lets
/// them be made before it exists, and a socket stays bound while it is away.
pub struct Server {
    face: Face,
    /// Who is served: the hub's prefixes.
    clients: Arc<[IpNet]>,
    listening: BTreeMap<SocketAddr, JoinHandle<()>>,
}

impl Server {
    pub fn new(face: Face, clients: Vec<IpNet>) -> Self {
        Self { face, clients: clients.into(), listening: BTreeMap::new() }
    }

    /// Serves these clients on the listeners to come.
    pub fn set_clients(&mut self, clients: Vec<IpNet>) {
        self.clients = clients.into();
    }

    /// Answers at this listener, in place of an older one for the same address. Must be
    /// called inside a tokio runtime.
    pub fn serve(&mut self, address: SocketAddr, listener: TcpListener) -> io::Result<()> {
        let listener = tokio::net::TcpListener::from_std(listener)?;
        let task = tokio::spawn(accept(listener, self.face.clone(), Arc::clone(&self.clients)));
        if let Some(older) = self.listening.insert(address, task) {
            older.abort();
        }
        Ok(())
    }

    pub fn close(&mut self, address: SocketAddr) {
        if let Some(task) = self.listening.remove(&address) {
            task.abort();
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        for task in self.listening.values() {
            task.abort();
        }
    }
}

/// Never on a wildcard address: the public would be one firewall mistake away.
pub fn listen_at(address: SocketAddr) -> io::Result<TcpListener> {
    if address.ip().is_unspecified() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "refuse to listen on every address"));
    }
    listen_freebind(address, BACKLOG)
}

async fn accept(listener: tokio::net::TcpListener, face: Face, clients: Arc<[IpNet]>) {
    loop {
        match listener.accept().await {
            Ok((stream, peer)) if serves(&clients, peer.ip()) => {
                let connection = tokio::spawn(converse(stream, face.clone()));
                face.admit(connection.abort_handle());
            }
            Ok(_) => face.reject(),
            // Out of file descriptors, or the client has gone again. Without a pause the
            // former would spin.
            Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
        }
    }
}

fn serves(clients: &[IpNet], peer: IpAddr) -> bool {
    let peer = peer.to_canonical();
    clients.iter().any(|prefix| prefix.contains(&peer))
}

/// One request, one answer, within the deadline. How a client leaves is its own business.
pub async fn converse(stream: impl AsyncRead + AsyncWrite + Unpin, face: Face) {
    let service = service_fn(move |request: Request<hyper::body::Incoming>| {
        let face = face.clone();
        async move {
            if request.uri().path() == "/metrics" && request.method() == Method::GET {
                face.refresh().await;
            }
            let (method, path, headers) = (request.method(), request.uri().path(), request.headers());
            Ok::<_, Infallible>(respond(method, path, headers, &face))
        }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIMEOUT)
        .keep_alive(false)
        .max_headers(HEADERS_MAX)
        .max_header_size(HEADER_BYTES_MAX)
        .max_buf_size(HEADER_BYTES_MAX)
        .serve_connection(TokioIo::new(stream), service);
    let _ = tokio::time::timeout(REQUEST_TIMEOUT, connection).await;
}

fn respond(method: &Method, path: &str, headers: &HeaderMap, face: &Face) -> Response<Full<Bytes>> {
    let readable = matches!(*method, Method::GET | Method::HEAD);
    match path {
        "/metrics" | "/healthz" if !readable => {
            let mut response = answer(StatusCode::METHOD_NOT_ALLOWED, PLAIN, "GET and HEAD only\n");
            response.headers_mut().insert(header::ALLOW, HeaderValue::from_static("GET, HEAD"));
            response
        }
        "/metrics" => match locked(&face.0.openmetrics).clone() {
            None => answer(StatusCode::SERVICE_UNAVAILABLE, PLAIN, "the first cycle has not finished yet\n"),
            Some(body) if wants_openmetrics(headers) => answer(StatusCode::OK, OPENMETRICS, body),
            Some(body) => {
                let text = std::str::from_utf8(&body).map(to_prometheus_text).unwrap_or_default();
                answer(StatusCode::OK, TEXT, text)
            }
        },
        "/healthz" => match face.ailment(Instant::now()) {
            None => answer(StatusCode::OK, PLAIN, "ok\n"),
            Some(reason) => answer(StatusCode::SERVICE_UNAVAILABLE, PLAIN, reason + "\n"),
        },
        _ => answer(StatusCode::NOT_FOUND, PLAIN, "there are /metrics and /healthz\n"),
    }
}

fn answer(status: StatusCode, kind: HeaderValue, body: impl Into<Bytes>) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body.into()));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, kind);
    response
}

/// Whether the client asks for OpenMetrics by name, and likes it at least as much as text.
/// Everybody else gets text, whatever they ask for, as from other exporters.
fn wants_openmetrics(headers: &HeaderMap) -> bool {
    let (mut openmetrics, mut text) = (0.0f32, 0.0f32);
    let lines = headers.get_all(header::ACCEPT).iter().filter_map(|value| value.to_str().ok());
    for item in lines.flat_map(|line| line.split(',')) {
        let mut parts = item.split(';').map(str::trim);
        let kind = parts.next().unwrap_or_default().to_ascii_lowercase();
        let (mut quality, mut ours) = (Some(1.0), true);
        for (key, value) in parts.filter_map(|part| part.split_once('=')) {
            match (key.trim().to_ascii_lowercase().as_str(), value.trim().trim_matches('"')) {
                ("q", q) => quality = q.parse().ok().filter(|q| (0.0..=1.0).contains(q)),
                ("version", version) => ours = version == "1.0.0",
                _ => {}
            }
        }
        let Some(quality) = quality else { continue };
        match kind.as_str() {
            "application/openmetrics-text" if ours => openmetrics = openmetrics.max(quality),
            // Of the text versions we have 0.0.4 only, but a client that wants another one
            // gets it too: a preference among the two kinds is all that counts here.
            "text/plain" => text = text.max(quality),
            _ => {}
        }
    }
    openmetrics > 0.0 && openmetrics >= text
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::TcpStream;
    use std::process::{Child, Command, Stdio};

    use super::*;

    /// A server on loopback in a thread of its own, so that tests are plain blocking clients.
    struct Served {
        face: Face,
        address: SocketAddr,
        stop: Option<tokio::sync::oneshot::Sender<()>>,
        thread: Option<std::thread::JoinHandle<()>>,
    }

    impl Served {
        fn on(address: &str, clients: &[&str]) -> Self {
            let face = Face::default();
            face.set(crate::metrics::tests::example());
            face.set_health(Beat { at: Instant::now(), period: Duration::from_secs(3600) });
            let clients = clients.iter().map(|text| text.parse().expect("a prefix")).collect();
            let wanted: SocketAddr = address.parse().expect("an address");
            let (stop, stopped) = tokio::sync::oneshot::channel();
            let (tell, told) = std::sync::mpsc::channel();
            let inner = face.clone();
            let thread = std::thread::spawn(move || {
                let runtime =
                    tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
                runtime.block_on(async move {
                    let mut server = Server::new(inner, clients);
                    let listener = listen_at(wanted).expect("listen");
                    tell.send(listener.local_addr().expect("an address")).expect("tell");
                    server.serve(wanted, listener).expect("serve");
                    let _ = stopped.await;
                });
            });
            let address = told.recv().expect("the server starts");
            Self { face, address, stop: Some(stop), thread: Some(thread) }
        }

        fn new() -> Self {
            Self::on("127.0.0.1:0", &["127.0.0.1/32"])
        }

        fn connect(&self) -> TcpStream {
            let stream = TcpStream::connect(self.address).expect("connect");
            stream.set_read_timeout(Some(Duration::from_secs(20))).expect("a timeout");
            stream
        }

        /// Everything that comes back for these bytes.
        fn send(&self, request: &str) -> String {
            let mut stream = self.connect();
            // A server that has refused may close before it has read all of a large request.
            let _ = stream.write_all(request.as_bytes());
            let mut reply = Vec::new();
            let _ = stream.read_to_end(&mut reply);
            String::from_utf8(reply).expect("text")
        }

        fn get(&self, path: &str, accept: &str) -> String {
            self.send(&format!("GET {path} HTTP/1.1\r\nHost: spoke\r\nAccept: {accept}\r\n\r\n"))
        }
    }

    impl Drop for Served {
        fn drop(&mut self) {
            drop(self.stop.take());
            if let Some(thread) = self.thread.take() {
                let _ = thread.join();
            }
        }
    }

    const PROMETHEUS_2_42: &str = "application/openmetrics-text;version=1.0.0,\
        application/openmetrics-text;version=0.0.1;q=0.75,text/plain;version=0.0.4;q=0.5,*/*;q=0.1";

    fn body(reply: &str) -> &str {
        reply.split_once("\r\n\r\n").map(|(_, body)| body).unwrap_or_default()
    }

    #[test]
    fn each_client_gets_the_text_it_asks_for() {
        let served = Served::new();
        let open = served.get("/metrics", PROMETHEUS_2_42);
        assert!(open.starts_with("HTTP/1.1 200"), "{open}");
        assert!(
            open.contains("content-type: application/openmetrics-text; version=1.0.0; charset=utf-8\r\n")
        );
        assert!(open.contains("connection: close\r\n"), "{open}");
        assert!(body(&open).ends_with("# EOF\n"));
        let text = served.get("/metrics", "*/*");
        assert!(text.contains("content-type: text/plain; version=0.0.4; charset=utf-8\r\n"), "{text}");
        assert!(body(&text).contains("# TYPE spokeguard_repairs_total counter\n"));
        assert!(!text.contains("# EOF"));
    }

    #[test]
    fn accept_headers_are_weighed() {
        for (accept, openmetrics) in [
            (PROMETHEUS_2_42, true),
            ("application/openmetrics-text", true),
            ("application/openmetrics-text; version=\"1.0.0\"; q=0.5, text/plain; q=0.5", true),
            ("Application/OpenMetrics-Text;escaping=allow-utf-8;version=1.0.0;q=0.6,text/plain;q=0.5", true),
            ("application/openmetrics-text;q=0.4,text/plain;q=0.5", false),
            ("application/openmetrics-text;version=0.0.1", false),
            ("application/openmetrics-text;version=2.0.0,text/plain", false),
            ("application/openmetrics-text;q=0", false),
            ("application/openmetrics-text;q=nan", false),
            ("application/openmetrics-text;q=7", false),
            ("text/plain", false),
            ("*/*", false),
            ("", false),
            (";;=,,q=;", false),
        ] {
            let headers = HeaderMap::from_iter([(header::ACCEPT, accept.parse().expect("a value"))]);
            assert_eq!(wants_openmetrics(&headers), openmetrics, "{accept}");
        }
        assert!(!wants_openmetrics(&HeaderMap::new()));
    }

    #[test]
    fn other_methods_and_paths_are_refused() {
        let served = Served::new();
        let head = served.send("HEAD /metrics HTTP/1.1\r\nHost: spoke\r\n\r\n");
        assert!(head.starts_with("HTTP/1.1 200") && body(&head).is_empty(), "{head}");
        let post = served.send("POST /metrics HTTP/1.1\r\nHost: spoke\r\nContent-Length: 4\r\n\r\nbody");
        assert!(post.starts_with("HTTP/1.1 405") && post.contains("allow: GET, HEAD\r\n"), "{post}");
        assert!(served.get("/", "*/*").starts_with("HTTP/1.1 404"));
        assert!(served.get("/metrics/../metrics", "*/*").starts_with("HTTP/1.1 404"));
        assert!(served.send("nonsense\r\n\r\n").starts_with("HTTP/1.1 400"));
        assert_eq!(served.face.rejects(), 0);
    }

    #[test]
    fn health_follows_the_loop() {
        let served = Served::new();
        assert!(served.get("/healthz", "*/*").ends_with("\r\n\r\nok\n"));
        let now = Instant::now();
        let face = Face::default();
        assert_eq!(face.ailment(now).as_deref(), Some("the first cycle has not finished yet"));
        face.set_health(Beat { at: now, period: Duration::from_secs(10) });
        assert_eq!(face.ailment(now + Duration::from_secs(30)), None);
        let stale = face.ailment(now + Duration::from_secs(31)).expect("stale");
        assert!(stale.contains("31 s"), "{stale}");
        served.face.set_health(Beat { at: now, period: Duration::ZERO });
        let reply = served.get("/healthz", "*/*");
        assert!(reply.starts_with("HTTP/1.1 503") && reply.contains("no cycle has finished"), "{reply}");
        // Before the first cycle there are no numbers either.
        let empty = respond(&Method::GET, "/metrics", &HeaderMap::new(), &Face::default());
        assert_eq!(empty.status(), StatusCode::SERVICE_UNAVAILABLE);
    }

    #[test]
    fn strangers_are_closed_at_once_and_counted() {
        for (address, hub) in [("127.0.0.1:0", "127.0.0.2/32"), ("[::1]:0", "fd84::1/128")] {
            let served = Served::on(address, &[hub]);
            assert_eq!(served.get("/metrics", "*/*"), "");
            assert_eq!(served.face.rejects(), 1);
        }
        let served = Served::on("[::1]:0", &["fd84::1/128", "::1/128"]);
        assert!(served.get("/metrics", "*/*").starts_with("HTTP/1.1 200"));
        assert_eq!(served.face.rejects(), 0);
    }

    #[test]
    fn slow_and_many_clients_cannot_keep_the_hub_out() {
        let served = Served::new();
        let slow: Vec<TcpStream> = (0..200)
            .map(|_| {
                let mut stream = served.connect();
                let _ = stream.write_all(b"GET /metrics HTTP/1.1\r\nX-Slow: ");
                stream
            })
            .collect();
        for _ in 0..5 {
            let reply = served.get("/metrics", PROMETHEUS_2_42);
            assert!(reply.starts_with("HTTP/1.1 200") && reply.ends_with("# EOF\n"));
        }
        assert!(served.face.rejects() >= 200 - CONNECTIONS_MAX as u64, "{}", served.face.rejects());
        assert!(locked(&served.face.0.open).len() <= CONNECTIONS_MAX);
        // The ones that stayed are not waited for longer than the deadline.
        let began = Instant::now();
        for mut stream in slow {
            let _ = stream.read_to_end(&mut Vec::new());
        }
        assert!(began.elapsed() < REQUEST_TIMEOUT + Duration::from_secs(5), "{:?}", began.elapsed());
        let done = |open: &VecDeque<AbortHandle>| open.iter().all(AbortHandle::is_finished);
        while !done(&locked(&served.face.0.open)) {
            assert!(began.elapsed() < Duration::from_secs(30), "connections stay open");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    #[test]
    fn a_client_that_drips_its_headers_meets_the_deadline() {
        let served = Served::new();
        let mut stream = served.connect();
        stream.set_read_timeout(Some(Duration::from_millis(200))).expect("a timeout");
        stream.write_all(b"GET /metrics HTTP/1.1\r\n").expect("write");
        let began = Instant::now();
        loop {
            let drip = stream.write_all(b"X-A: b\r\n");
            match stream.read(&mut [0; 512]) {
                Err(error) if drip.is_ok() && error.kind() == io::ErrorKind::WouldBlock => {}
                // Closed, or told so first: both end it.
                _ => break,
            }
            assert!(began.elapsed() < REQUEST_TIMEOUT, "still open after {:?}", began.elapsed());
        }
        // By the deadline for headers, and not only by the one for the whole request.
        let took = began.elapsed();
        assert!(took >= HEADER_TIMEOUT / 2 && took < REQUEST_TIMEOUT * 9 / 10, "closed after {took:?}");
    }

    #[test]
    fn huge_headers_are_refused() {
        let served = Served::new();
        let huge = format!("GET /metrics HTTP/1.1\r\nHost: spoke\r\nX-Huge: {}\r\n\r\n", "a".repeat(1 << 20));
        let reply = served.send(&huge);
        assert!(!reply.contains("HTTP/1.1 200"), "{reply}");
        let many: String = (0..HEADERS_MAX + 1).map(|n| format!("X-{n}: y\r\n")).collect();
        let reply = served.send(&format!("GET /metrics HTTP/1.1\r\n{many}\r\n"));
        assert!(reply.starts_with("HTTP/1.1 431"), "{reply}");
        assert!(served.get("/metrics", "*/*").starts_with("HTTP/1.1 200"));
    }

    struct Killed(Child);

    impl Drop for Killed {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    /// The value of an instant query, or nothing yet.
    fn query(prometheus: SocketAddr, query: &str) -> Option<String> {
        let mut stream = TcpStream::connect(prometheus).ok()?;
        stream.set_read_timeout(Some(Duration::from_secs(5))).ok()?;
        let request = format!("GET /api/v1/query?query={query} HTTP/1.0\r\n\r\n");
        stream.write_all(request.as_bytes()).ok()?;
        let mut reply = String::new();
        stream.read_to_string(&mut reply).ok()?;
        let json: serde_json::Value = serde_json::from_str(body(&reply)).ok()?;
        Some(json.pointer("/data/result/0/value/1")?.as_str()?.to_owned())
    }

    #[test]
    fn a_real_prometheus_scrapes_every_series() {
        let served = Served::new();
        let series = crate::metrics::tests::example().lines().filter(|l| !l.starts_with('#')).count();
        let dir = tempfile::tempdir().expect("a directory");
        let config = format!(
            "global: {{scrape_interval: 1s}}\nscrape_configs: [{{job_name: spoke, static_configs: \
             [{{targets: ['{}']}}]}}]\n",
            served.address
        );
        std::fs::write(dir.path().join("prometheus.yml"), config).expect("write the configuration");
        let port = TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()).expect("a free port");
        let child = Command::new("prometheus")
            .arg(format!("--config.file={}", dir.path().join("prometheus.yml").display()))
            .arg(format!("--storage.tsdb.path={}", dir.path().join("data").display()))
            .arg(format!("--web.listen-address={port}"))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("prometheus must be installed for this test (Debian: apt-get install prometheus)");
        let _child = Killed(child);
        let deadline = Instant::now() + Duration::from_secs(60);
        while query(port, "up").as_deref() != Some("1") {
            assert!(Instant::now() < deadline, "not scraped: up is {:?}", query(port, "up"));
            std::thread::sleep(Duration::from_millis(20));
        }
        let stored = query(port, "count(%7B__name__=~%22spokeguard_.*%22%7D)");
        assert_eq!(stored, Some(series.to_string()));
        let never = query(port, "count(spokeguard_wireguard_handshake_age_seconds>86400)");
        assert_eq!(never.as_deref(), Some("1"), "a peer without a handshake is older than any bound");
    }
}
