//! The process that speaks to the hub: it is started for a few requests, told them on stdin,
//! and ends. TLS and what strangers answer have no business with netlink and bpf, so it
//! drops all that it has before the first byte comes in: it can open sockets to one port, read
//! what names are resolved by, and nothing else. Being new each time, it sees the host's
//! roots and name servers as they are now.

use std::io::{self, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use rustix::process::{DumpableBehavior, Resource, Rlimit, Signal, setrlimit};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{ClientConfig, ClientConnection, DigitallySignedStruct, SignatureScheme};
use serde::{Deserialize, Serialize};
use ureq::tls::{Certificate, RootCerts, TlsConfig, TlsProvider};

use super::privileges::{self, Confinement};
use crate::heartbeat::{Reply, certificate, kuma, ntfy};
use crate::source::outside::errand_from_stdin;
use crate::sys::memory;

/// What `ps` and findings call it.
const NAME: &std::ffi::CStr = c"spokeguard-send";
/// For one request, name and handshake included.
pub(super) const PATIENCE: Duration = Duration::from_secs(10);
/// An answer is some 50 bytes. Of another, the beginning says enough.
const ANSWER_BYTES_MAX: u64 = 4096;
const HEAD_BYTES_MAX: usize = 16 * 1024;
const DESCRIPTORS_MAX: u64 = 32;
const MEMORY_MAX: u64 = 64 << 20;

/// What to do. Holds secrets, and has no printable form.
#[derive(Serialize, Deserialize)]
pub(super) enum Errand {
    /// A beat for Uptime Kuma: the whole URL.
    Push { url: String },
    /// Notices for ntfy, in order, until one is not taken.
    Post { root: String, token: Option<String>, bodies: Vec<String> },
    /// When this chain ends, in PEM.
    Chain(String),
    /// When the certificate ends that is served there.
    Served { address: SocketAddr, name: Option<String> },
}

#[derive(Serialize, Deserialize)]
pub(super) struct Answer {
    pub confinement: Confinement,
    pub replies: Vec<Reply>,
    /// Of a certificate, in Unix time.
    pub ends: Option<i64>,
}

/// The whole life of this process.
pub fn run_from_stdin() -> anyhow::Result<()> {
    memory::limit_arenas();
    rustix::thread::set_name(NAME).context("name of the process")?;
    // Nobody waits for the answer of a daemon that was killed.
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL)).context("end with the daemon")?;
    // Neither a core nor a debugger of the same user gets at the URL.
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)
        .context("keep secrets out of cores")?;
    let errand: Errand = errand_from_stdin()?;
    let (port, roots) = match &errand {
        Errand::Push { url } | Errand::Post { root: url, .. } => (port_of(url), roots_for(url)),
        Errand::Served { address, .. } => (Some(address.port()), Vec::new()),
        Errand::Chain(_) => (None, Vec::new()),
    };
    let mut confinement = privileges::confine_sender(DESCRIPTORS_MAX, &names(), port);
    for (what, resource, most) in [("memory", Resource::Data, MEMORY_MAX), ("files", Resource::Fsize, 0)] {
        if let Err(error) = setrlimit(resource, Rlimit { current: Some(most), maximum: Some(most) }) {
            confinement.gaps.push(format!("limit of {what}: {error}"));
        }
    }
    let mut answer = Answer { confinement, replies: Vec::new(), ends: None };
    match errand {
        Errand::Push { url } => answer.replies.push(push(&agent(roots), &url)),
        Errand::Post { root, token, bodies } => {
            let agent = agent(roots);
            for body in bodies {
                let reply = post(&agent, &root, token.as_deref(), &body);
                answer.replies.push(reply);
                if reply != Reply::Accepted {
                    break;
                }
            }
        }
        Errand::Chain(pem) => answer.ends = certificate::end_of_pem(pem.as_bytes()),
        Errand::Served { address, name } => answer.ends = served(address, name).ok().flatten(),
    }
    let json = serde_json::to_vec(&answer).context("encode of the answer")?;
    io::stdout().write_all(&json).context("write of the answer")
}

/// By what names become addresses: as files where they are known, and the folders of the
/// libraries that a host may ask for more.
fn names() -> Vec<&'static Path> {
    let all = [
        "/etc/resolv.conf",
        "/etc/hosts",
        "/etc/nsswitch.conf",
        "/etc/host.conf",
        "/etc/gai.conf",
        "/etc/services",
        "/etc/ld.so.cache",
        "/lib",
        "/lib64",
        "/usr/lib",
        "/usr/lib64",
        "/nix/store",
    ];
    all.into_iter().map(Path::new).collect()
}

fn port_of(url: &str) -> Option<u16> {
    let uri: ureq::http::Uri = url.parse().ok()?;
    uri.port_u16().or_else(|| Some(if uri.scheme_str()? == "https" { 443 } else { 80 }))
}

/// The host's, or what SSL_CERT_FILE names: of no use where nothing is encrypted.
fn roots_for(url: &str) -> Vec<CertificateDer<'static>> {
    if url.starts_with("https:") { rustls_native_certs::load_native_certs().certs } else { Vec::new() }
}

fn agent(roots: Vec<CertificateDer<'static>>) -> ureq::Agent {
    let roots: Vec<Certificate<'static>> =
        roots.iter().map(|der| Certificate::from_der(der).to_owned()).collect();
    let tls = TlsConfig::builder()
        .provider(TlsProvider::Rustls)
        .root_certs(RootCerts::new_with_certs(&roots))
        .unversioned_rustls_crypto_provider(provider())
        .build();
    ureq::Agent::config_builder()
        .tls_config(tls)
        .http_status_as_error(false)
        // A redirect would carry the token to somewhere else.
        .max_redirects(0)
        .max_redirects_will_error(false)
        .proxy(None)
        .timeout_global(Some(PATIENCE))
        .max_response_header_size(HEAD_BYTES_MAX)
        .user_agent(concat!("spokeguard/", env!("CARGO_PKG_VERSION")))
        .build()
        .into()
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

fn push(agent: &ureq::Agent, url: &str) -> Reply {
    let mut response = match agent.get(url).call() {
        Ok(response) => response,
        Err(error) => return failed(&error),
    };
    let kind = response.headers().get("content-type").and_then(|value| value.to_str().ok());
    let (status, kind) = (response.status().as_u16(), kind.unwrap_or_default().to_owned());
    let mut body = Vec::new();
    match response.body_mut().as_reader().take(ANSWER_BYTES_MAX).read_to_end(&mut body) {
        Ok(_) => kuma::judge(status, &kind, &body),
        Err(error) => broken(&error),
    }
}

fn post(agent: &ureq::Agent, root: &str, token: Option<&str>, body: &str) -> Reply {
    let mut request = agent.post(root).header("content-type", "application/json");
    if let Some(token) = token {
        request = request.header("authorization", format!("Bearer {token}"));
    }
    match request.send(body) {
        Ok(response) => {
            let after =
                response.headers().get("retry-after").and_then(|value| value.to_str().ok()?.parse().ok());
            ntfy::judge(response.status().as_u16(), after)
        }
        Err(error) => failed(&error),
    }
}

fn failed(error: &ureq::Error) -> Reply {
    use ureq::Error;
    match error {
        Error::HostNotFound => Reply::Unresolved,
        Error::Timeout(_) => Reply::TimedOut,
        Error::ConnectionFailed => Reply::Unreachable,
        Error::Rustls(_) | Error::Tls(_) => Reply::Tls,
        Error::Io(error) => broken(error),
        _ => Reply::Broken,
    }
}

fn broken(error: &io::Error) -> Reply {
    use io::ErrorKind::*;
    if let Some(inner) = error.get_ref() {
        if inner.is::<rustls::Error>() {
            return Reply::Tls;
        }
        if let Some(inner) = inner.downcast_ref::<ureq::Error>()
            && !matches!(inner, ureq::Error::Io(_))
        {
            return failed(inner);
        }
    }
    match error.kind() {
        ConnectionRefused => Reply::Refused,
        TimedOut | WouldBlock => Reply::TimedOut,
        HostUnreachable | NetworkUnreachable | NetworkDown | AddrNotAvailable | PermissionDenied => {
            Reply::Unreachable
        }
        // std has no kind for what getaddrinfo says.
        _ if error.to_string().starts_with("failed to lookup address") => Reply::Unresolved,
        _ => Reply::Broken,
    }
}

/// When the certificate ends that is served there. It is read and trusted by nobody, so that one
/// that has ended is known as well.
fn served(address: SocketAddr, name: Option<String>) -> anyhow::Result<Option<i64>> {
    let name = match name {
        Some(name) => ServerName::try_from(name)?,
        None => ServerName::from(address.ip()),
    };
    let provider = provider();
    let config = ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Anybody(provider)))
        .with_no_client_auth();
    let mut connection = ClientConnection::new(Arc::new(config), name)?;
    let mut stream = TcpStream::connect_timeout(&address, PATIENCE / 2)?;
    stream.set_read_timeout(Some(PATIENCE / 2))?;
    stream.set_write_timeout(Some(PATIENCE / 2))?;
    while connection.is_handshaking() {
        connection.complete_io(&mut stream)?;
    }
    let first = connection.peer_certificates().and_then(<[_]>::first);
    Ok(first.and_then(|der| certificate::end_of_der(der)))
}

/// Only a date is wanted of whoever answers.
#[derive(Debug)]
struct Anybody(Arc<CryptoProvider>);

impl ServerCertVerifier for Anybody {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
