//! What of a node can be reached from the hub: an echo through the tunnel, HTTPS and its
//! certificate, sshd where it should be and where it should not. Each try has a deadline for
//! all it does, and what a node sends is read no further than needed.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream, ToSocketAddrs};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use rustls::crypto::ring;
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};

use crate::diff::listed;
use crate::fleet::Node;
use crate::fleet::health::{Check, What, certificate};
use crate::policy::Bind;
use crate::source::hub;
use crate::source::ping::{NEEDS, Ping, TRIES};
use crate::sys::clock;
use crate::terms::printable;

/// For one connection and all that is said on it.
const PATIENCE: Duration = Duration::from_secs(5);
/// A port that stays silent for so long is shut to us.
const SHUT: Duration = Duration::from_secs(2);
const HTTPS: u16 = 443;
/// Of one node, asked side by side.
const ADDRESSES_MAX: usize = 8;
/// Where there was no page, and it is told why.
const UNSEEN: &str = "none was seen";
/// A status line or a banner is shorter.
const LINE_BYTES_MAX: usize = 512;

/// What to ask for, and how much is enough.
#[derive(Clone, Debug)]
pub struct Terms {
    pub wanted: Vec<What>,
    /// Of the page that has to answer 200.
    pub path: String,
    pub certificate_days: u32,
}

/// The checks of one node that need more than its word. `domain`: by which its certificate is
/// known; `trust`: see [`trust`].
pub fn checks(node: &Node, domain: Option<&str>, terms: &Terms, trust: &anyhow::Result<Trust>) -> Vec<Check> {
    let mut out = Vec::new();
    let wants = |what| terms.wanted.contains(&what);
    if wants(What::Ping) {
        out.push(ping(node));
    }
    let public = &node.policy.public.tcp;
    if public.iter().any(|port| port.get() == HTTPS) && (wants(What::Https) || wants(What::Certificate)) {
        out.extend(https(node, domain, terms, trust).into_iter().filter(|check| wants(check.what)));
    }
    if wants(What::Ssh) {
        out.push(ssh(node));
    }
    if wants(What::SshPublic) && !node.public_address.is_empty() {
        out.push(ssh_public(node));
    }
    out
}

fn ping(node: &Node) -> Check {
    let address = match mesh_addresses(node) {
        Ok(addresses) => addresses.into_iter().next(),
        Err(error) => return Check::unknown(What::Ping, format!("{error:#}")),
    };
    let Some(address) = address else { return Check::unknown(What::Ping, "it has no mesh address") };
    let ping = match Ping::open(address) {
        Ok(ping) => ping,
        Err(error) if error.kind() == ErrorKind::PermissionDenied => {
            return Check::unknown(What::Ping, NEEDS);
        }
        Err(error) => return Check::fail(What::Ping, format!("{address}: {error}")),
    };
    match ping.first_round_trip_ms() {
        Some(took) => Check::pass(What::Ping, format!("{took:.1} ms")),
        None => Check::fail(What::Ping, format!("no echo from {address} in {TRIES} tries")),
    }
}

/// Where the mesh has the node; by its hostname where the mesh assigns the address.
fn mesh_addresses(node: &Node) -> anyhow::Result<Vec<IpAddr>> {
    if !node.mesh_address.is_empty() {
        return Ok(node.mesh_address.clone());
    }
    resolve(&node.hostname)
}

fn resolve(name: &str) -> anyhow::Result<Vec<IpAddr>> {
    let found = (name, 0).to_socket_addrs().with_context(|| format!("find the addresses of {name}"))?;
    let mut found: Vec<IpAddr> = found.map(|address| address.ip()).collect();
    found.dedup();
    ensure!(!found.is_empty(), "{name} has no address");
    Ok(found)
}

/// Whom this host trusts to sign certificates.
pub type Trust = Arc<ClientConfig>;

/// The roots of this host, or those that SSL_CERT_FILE and SSL_CERT_DIR name.
pub fn trust() -> anyhow::Result<Trust> {
    let found = rustls_native_certs::load_native_certs();
    let mut roots = RootCertStore::empty();
    let (taken, _) = roots.add_parsable_certificates(found.certs);
    ensure!(taken > 0, "this host has no root certificates: install ca-certificates, or set SSL_CERT_FILE");
    let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .context("set TLS up")?;
    Ok(Arc::new(config.with_root_certificates(roots).with_no_client_auth()))
}

/// One page and its certificate, at each public address: the name alone would ask wherever DNS
/// leads, which may be another node.
fn https(node: &Node, domain: Option<&str>, terms: &Terms, trust: &anyhow::Result<Trust>) -> Vec<Check> {
    let unknown =
        |text: String| vec![Check::unknown(What::Https, text), Check::unknown(What::Certificate, UNSEEN)];
    let Some(domain) = domain else {
        return unknown("it has no name below the fleet's domain: give it one, or --skip".to_owned());
    };
    let trust = match trust {
        Ok(trust) => trust,
        Err(error) => return unknown(format!("{error:#}")),
    };
    let addresses = match node.public_address.is_empty() {
        true => resolve(domain),
        false => Ok(node.public_address.clone()),
    };
    let addresses = match addresses {
        Ok(addresses) => addresses,
        Err(error) => return unknown(format!("{error:#}")),
    };
    let mut ends: Vec<i64> = Vec::new();
    let mut failed = Vec::new();
    let mut untried = Vec::new();
    for address in &addresses {
        match page(SocketAddr::new(*address, HTTPS), domain, &terms.path, trust) {
            Ok((end, 200)) => ends.push(end),
            Ok((end, status)) => {
                ends.push(end);
                failed.push(format!("{address} answers {status} to {}", terms.path));
            }
            Err(error) if error.root_cause().downcast_ref::<io::Error>().is_some_and(is_no_way) => {
                untried.push(address.to_string());
            }
            Err(error) => failed.push(format!("{address}: {error:#}")),
        }
    }
    let asked = addresses.len() - untried.len();
    let page = match (failed.is_empty(), asked) {
        (false, _) => Check::fail(What::Https, failed.join("; ")),
        (true, 0) => Check::unknown(What::Https, no_way(&untried)),
        (true, asked) => Check::pass(What::Https, format!("200 at {asked} of {} addresses", addresses.len())),
    };
    let certificate = match ends.iter().min() {
        Some(end) => certificate(*end, clock::now(), terms.certificate_days),
        None => Check { what: What::Certificate, reason: UNSEEN.to_owned(), ..page.clone() },
    };
    vec![page, certificate]
}

/// Where a certificate ends (Unix time), and the status of a page.
fn page(at: SocketAddr, name: &str, path: &str, trust: &Trust) -> anyhow::Result<(i64, u16)> {
    let server =
        ServerName::try_from(name.to_owned()).with_context(|| format!("{name} as a server's name"))?;
    let connection = ClientConnection::new(trust.clone(), server).context("begin TLS")?;
    let mut stream = StreamOwned::new(connection, Timed::connect(at, PATIENCE)?);
    stream.conn.complete_io(&mut stream.sock).context("TLS")?;
    let chain = stream.conn.peer_certificates().and_then(|chain| chain.first()).context("no certificate")?;
    let (_, parsed) =
        x509_parser::parse_x509_certificate(chain).ok().context("its certificate is unreadable")?;
    let end = parsed.validity().not_after.timestamp();
    let agent = concat!("spokeguard/", env!("CARGO_PKG_VERSION"));
    let request =
        format!("GET {path} HTTP/1.1\r\nHost: {name}\r\nUser-Agent: {agent}\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).context("ask for the page")?;
    let line = line(&mut stream).context("read the answer")?;
    let status = line.strip_prefix("HTTP/1.").and_then(|rest| rest.get(2..5)?.parse::<u16>().ok());
    Ok((end, status.with_context(|| format!("answers {}", printable(&line, 80)))?))
}

/// sshd through the tunnel, or where the policy binds it.
fn ssh(node: &Node) -> Check {
    let addresses = match &node.policy.ssh.bind {
        Bind::Mesh => mesh_addresses(node),
        Bind::Addresses(addresses) => Ok(addresses.clone()),
    };
    let first = match addresses.as_deref() {
        Ok([first, ..]) => *first,
        Ok([]) => return Check::unknown(What::Ssh, "it has no address to try"),
        Err(error) => return Check::unknown(What::Ssh, format!("{error:#}")),
    };
    let at = SocketAddr::new(first, node.ssh_port().get());
    match banner(at) {
        Ok(text) if text.starts_with("SSH-") => Check::pass(What::Ssh, text),
        Ok(text) => {
            Check::fail(What::Ssh, format!("{at} says \"{}\", which is no sshd", printable(&text, 80)))
        }
        Err(error) => Check::fail(What::Ssh, format!("{at}: {error:#}")),
    }
}

fn banner(at: SocketAddr) -> anyhow::Result<String> {
    line(&mut Timed::connect(at, PATIENCE)?).context("read its banner")
}

/// Nobody may get to sshd from outside, but by what the policy declares.
fn ssh_public(node: &Node) -> Check {
    let port = node.ssh_port();
    let today = crate::cli::today(clock::now());
    let declared = node.policy.exceptions.iter().find(|e| e.tcp.contains(&port) && e.holds_on(today));
    let tries = hub::each(&node.public_address, ADDRESSES_MAX, |address| {
        let at = SocketAddr::new(*address, port.get());
        (at, Timed::connect(at, SHUT).map(drop))
    });
    let mut unknown = Vec::new();
    for (at, tried) in tries.into_iter().flatten() {
        match tried {
            Ok(()) if node.policy.public.tcp.contains(&port) => {}
            Ok(()) => match declared {
                Some(exception) => {
                    return Check::pass(What::SshPublic, format!("reached by exception {}", exception.name));
                }
                None => return Check::fail(What::SshPublic, format!("{at} lets this host in")),
            },
            Err(error) => match error.root_cause().downcast_ref::<io::Error>() {
                Some(error) if is_no_way(error) => unknown.push(at.ip().to_string()),
                _ => {}
            },
        }
    }
    match unknown.is_empty() {
        true => Check::pass(What::SshPublic, "nobody gets in from outside"),
        false => Check::unknown(What::SshPublic, no_way(&unknown)),
    }
}

fn no_way(addresses: &[String]) -> String {
    format!("this host has no way to {}", listed(addresses, ADDRESSES_MAX))
}

/// This host has no way there: that says nothing about the node.
fn is_no_way(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::NetworkUnreachable | ErrorKind::AddrNotAvailable)
}

/// A connection that as a whole has so much time, however slowly its bytes come.
struct Timed {
    stream: TcpStream,
    until: Instant,
}

impl Timed {
    fn connect(at: SocketAddr, patience: Duration) -> anyhow::Result<Self> {
        let until = Instant::now() + patience;
        let stream = TcpStream::connect_timeout(&at, patience).context("connect")?;
        Ok(Self { stream, until })
    }

    fn left(&self) -> io::Result<Option<Duration>> {
        let left = self.until.saturating_duration_since(Instant::now());
        if left.is_zero() { Err(io::Error::from(ErrorKind::TimedOut)) } else { Ok(Some(left)) }
    }
}

impl Read for Timed {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.stream.set_read_timeout(self.left()?)?;
        self.stream.read(buffer).map_err(in_time)
    }
}

impl Write for Timed {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.stream.set_write_timeout(self.left()?)?;
        self.stream.write(bytes).map_err(in_time)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.stream.flush()
    }
}

/// "Resource temporarily unavailable" is how the kernel says that the time is over.
fn in_time(error: io::Error) -> io::Error {
    if error.kind() == ErrorKind::WouldBlock { io::Error::from(ErrorKind::TimedOut) } else { error }
}

/// The first line, or what there is of it.
fn line(stream: &mut impl Read) -> anyhow::Result<String> {
    let mut bytes = Vec::new();
    let mut byte = [0u8; 1];
    while bytes.len() < LINE_BYTES_MAX {
        match stream.read(&mut byte) {
            Ok(0) => break,
            Ok(_) if byte[0] == b'\n' => break,
            Ok(_) => bytes.push(byte[0]),
            Err(error) if bytes.is_empty() => return Err(error.into()),
            Err(_) => break,
        }
    }
    ensure!(!bytes.is_empty(), "it ends without a word");
    Ok(printable(String::from_utf8_lossy(&bytes).trim_end(), LINE_BYTES_MAX))
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn a_line_is_read_no_further_than_its_bound() {
        assert_eq!(line(&mut &b"SSH-2.0-x\x1b[2J\r\nmore"[..]).unwrap(), "SSH-2.0-x\u{fffd}[2J");
        assert_eq!(line(&mut io::repeat(b'a')).unwrap().len(), LINE_BYTES_MAX);
        assert!(line(&mut io::empty()).is_err());
    }

    #[test]
    fn bytes_that_drip_do_not_stretch_the_time() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let at = listener.local_addr().unwrap();
        std::thread::spawn(move || {
            let Ok((mut client, _)) = listener.accept() else { return };
            while client.write_all(b"x").is_ok() {
                std::thread::sleep(Duration::from_millis(20));
            }
        });
        let started = Instant::now();
        let text = line(&mut Timed::connect(at, Duration::from_millis(300)).unwrap()).unwrap();
        assert!(started.elapsed() < Duration::from_secs(3), "{:?}", started.elapsed());
        assert!(!text.is_empty() && text.len() < 100, "{text}");
    }
}
