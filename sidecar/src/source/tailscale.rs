//! What tailscaled says of itself, by its local API: HTTP over a unix socket, three requests a
//! look. The third, for the filter compiled for this node, is one that tailscaled makes no
//! promise about, so that it may refuse or have another form. Who answers must be root's process; what it says is foreign, bounded and cleaned.

use std::io::{self, Read as _, Write as _};
use std::net::IpAddr;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use serde::Deserialize;

use crate::observed::{FilterRule, MeshFilter, Tailscaled};
use crate::tailnet::{Entry, Filter};
use crate::terms::{Stamp, printable};

const SOCKET: &str = "/run/tailscale/tailscaled.sock";
/// Another place for it.
const SOCKET_VARIABLE: &str = "SPOKEGUARD_TAILSCALED";
/// For a whole look: a daemon that hangs must not hang us.
const TIMEOUT: Duration = Duration::from_secs(1);
const ANSWER_BYTES_MAX: u64 = 1 << 20;
const LIST_MAX: usize = 64;
const TEXT_MAX: usize = 200;
/// Rules of the compiled filter, of one source list, port range and address each.
const RULES_MAX: usize = 4096;
const STATUS: &str = "GET status?peers=false";
const PREFS: &str = "GET prefs";
const FILTER: &str = "POST debug-packet-filter-rules";

pub fn read() -> anyhow::Result<Tailscaled> {
    let path = std::env::var_os(SOCKET_VARIABLE).map_or_else(|| PathBuf::from(SOCKET), PathBuf::from);
    let deadline = Instant::now() + TIMEOUT;
    let ask = |what: &str| {
        ask(&path, what, deadline).with_context(|| format!("ask tailscaled to {what} on {}", path.display()))
    };
    let status = ask(STATUS)?.good()?;
    let prefs = ask(PREFS)?.good()?;
    let mut found = decode(&status, &prefs).context("tailscaled's answer")?;
    found.filter = match ask(FILTER) {
        Ok(Answer { code: 200, body }) => filter(&body),
        Ok(_) => MeshFilter::NotOffered,
        Err(error) => MeshFilter::Unread(printable(&format!("{error:#}"), TEXT_MAX)),
    };
    Ok(found)
}

/// The rules, or why they are not known.
fn filter(body: &[u8]) -> MeshFilter {
    let text = String::from_utf8_lossy(body);
    let rule = |entry: &Entry| FilterRule {
        from: entry.from.clone(),
        to: entry.to.clone(),
        protos: entry.protos.clone(),
        ports: entry.ports,
    };
    match Filter::from_json(&text) {
        Ok(filter) if filter.entries().len() > RULES_MAX => {
            MeshFilter::Unread(format!("it has more than {RULES_MAX} rules"))
        }
        Ok(filter) => MeshFilter::Rules(filter.entries().iter().map(rule).collect()),
        Err(why) => MeshFilter::Unread(printable(&why, TEXT_MAX)),
    }
}

struct Answer {
    code: u16,
    body: Vec<u8>,
}

impl Answer {
    fn good(self) -> anyhow::Result<Vec<u8>> {
        match self.code {
            200 => Ok(self.body),
            code => {
                bail!("it says {code}: {}", printable(String::from_utf8_lossy(&self.body).trim(), TEXT_MAX))
            }
        }
    }
}

/// `what`: a method and a path.
fn ask(path: &std::path::Path, what: &str, deadline: Instant) -> anyhow::Result<Answer> {
    let mut stream = match connect(path) {
        Ok(stream) => stream,
        Err(error) => {
            let hint = match error.kind() {
                io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => "is tailscaled running?",
                io::ErrorKind::PermissionDenied => "run as root",
                _ => "see what holds it up",
            };
            return Err(error).context(hint);
        }
    };
    let peer = rustix::net::sockopt::socket_peercred(&stream).context("who answers")?;
    if !peer.uid.is_root() {
        bail!("user {} answers there, who is not root: it may say anything", peer.uid.as_raw());
    }
    stream.set_nonblocking(false)?;
    // HTTP/1.0, so that the answer comes in one piece and ends with the connection.
    let (method, what) = what.split_once(' ').unwrap_or(("GET", what));
    let length = if method == "GET" { "" } else { "Content-Length: 0\r\n" };
    let request =
        format!("{method} /localapi/v0/{what} HTTP/1.0\r\nHost: local-tailscaled.sock\r\n{length}\r\n");
    stream.set_write_timeout(Some(left(deadline)?))?;
    stream.write_all(request.as_bytes())?;
    let mut answer = Vec::new();
    let mut chunk = [0; 8192];
    loop {
        stream.set_read_timeout(Some(left(deadline)?))?;
        match stream.read(&mut chunk) {
            Ok(0) => break,
            Ok(length) => answer.extend_from_slice(&chunk[..length]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => bail!("no answer within {TIMEOUT:?}"),
            Err(error) => return Err(error.into()),
        }
        if answer.len() as u64 > ANSWER_BYTES_MAX {
            bail!("it says more than {ANSWER_BYTES_MAX} bytes");
        }
    }
    parsed(&answer)
}

/// Without blocking: a queue that is full must not hang us.
fn connect(path: &std::path::Path) -> io::Result<UnixStream> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(UnixStream::from(socket))
}

fn left(deadline: Instant) -> anyhow::Result<Duration> {
    match deadline.checked_duration_since(Instant::now()) {
        Some(left) if !left.is_zero() => Ok(left),
        _ => bail!("no answer within {TIMEOUT:?}"),
    }
}

/// A whole answer, whatever it says.
fn parsed(answer: &[u8]) -> anyhow::Result<Answer> {
    let end = answer.windows(4).position(|window| window == b"\r\n\r\n").context("the answer has no head")?;
    let head = String::from_utf8_lossy(&answer[..end]);
    let body = &answer[end + 4..];
    let code = head.split(' ').nth(1).filter(|_| head.starts_with("HTTP/1."));
    let code = code.and_then(|code| code.parse().ok()).context("the answer is no HTTP")?;
    let length = head.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        name.eq_ignore_ascii_case("content-length").then(|| value.trim().parse::<usize>().ok())?
    });
    if length.is_some_and(|length| body.len() < length) {
        bail!("it ended before its answer was complete");
    }
    Ok(Answer { code, body: body.to_vec() })
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct RawStatus {
    backend_state: String,
    #[serde(rename = "TailscaleIPs", default)]
    addresses: Option<Vec<IpAddr>>,
    #[serde(rename = "Self", default)]
    own: Option<RawSelf>,
    #[serde(default)]
    health: Option<Vec<String>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct RawSelf {
    #[serde(default)]
    tags: Option<Vec<String>>,
    #[serde(default)]
    key_expiry: Option<String>,
    #[serde(default)]
    expired: bool,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct RawPrefs {
    #[serde(rename = "RunSSH", default)]
    ssh: bool,
    #[serde(default)]
    shields_up: bool,
}

pub(super) fn decode(status: &[u8], prefs: &[u8]) -> anyhow::Result<Tailscaled> {
    let status: RawStatus = serde_json::from_slice(status).context("its status")?;
    let prefs: RawPrefs = serde_json::from_slice(prefs).context("its preferences")?;
    let own = status.own;
    let (tags, expiry, expired) =
        own.map_or((None, None, false), |own| (own.tags, own.key_expiry, own.expired));
    let texts = |list: Option<Vec<String>>| -> Vec<String> {
        list.unwrap_or_default().iter().take(LIST_MAX).map(|text| printable(text, TEXT_MAX)).collect()
    };
    let expiry = match expiry.as_deref() {
        // Go's zero time: none.
        None | Some("" | "0001-01-01T00:00:00Z") => None,
        Some(text) => Some(
            text.parse()
                .map(Stamp)
                .with_context(|| format!("its key's expiry is no moment: {}", printable(text, 40)))?,
        ),
    };
    Ok(Tailscaled {
        state: printable(&status.backend_state, 40),
        addresses: status.addresses.unwrap_or_default().into_iter().take(LIST_MAX).collect(),
        tags: texts(tags),
        key_expiry: expiry,
        expired,
        ssh: prefs.ssh,
        shields_up: prefs.shields_up,
        health: texts(status.health),
        filter: MeshFilter::NotOffered,
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    const STATUS: &str = r#"{"Version":"1.86.2-t1","TUN":true,"BackendState":"Running","HaveNodeKey":true,
        "AuthURL":"","TailscaleIPs":["100.64.0.16","fd7a:115c:a1e0::16"],"Self":{"ID":"n16","PublicKey":"nodekey:00",
        "HostName":"singapore","DNSName":"singapore.tail1234.ts.net.","OS":"linux","UserID":10,
        "TailscaleIPs":["100.64.0.16","fd7a:115c:a1e0::16"],"Tags":["tag:server"],"Online":true,
        "KeyExpiry":"2027-02-01T12:00:00Z"},"Health":["not in map \u001b[2Jpoll"],"MagicDNSSuffix":"tail1234.ts.net",
        "CurrentTailnet":{"Name":"example.com"},"CertDomains":null,"Peer":null,"User":null,"ClientVersion":null}"#;
    const PREFS: &str = r#"{"ControlURL":"https://controlplane.tailscale.com","RouteAll":false,"RunSSH":true,
        "WantRunning":true,"ShieldsUp":false,"AdvertiseTags":["tag:server"],"NetfilterMode":2}"#;

    #[test]
    fn what_tailscaled_says_becomes_values() {
        let found = decode(STATUS.as_bytes(), PREFS.as_bytes()).expect("sound");
        assert_eq!(
            (found.state.as_str(), found.ssh, found.shields_up, found.expired),
            ("Running", true, false, false)
        );
        assert_eq!(found.addresses.len(), 2);
        assert_eq!(found.tags, ["tag:server"]);
        assert_eq!(found.key_expiry.expect("an expiry").to_string(), "2027-02-01T12:00:00.000Z");
        assert!(!found.health[0].contains('\x1b'), "{:?}", found.health);
        let bare = decode(br#"{"BackendState":"NeedsLogin"}"#, b"{}").expect("sound");
        assert_eq!((bare.state.as_str(), bare.addresses.len(), bare.key_expiry), ("NeedsLogin", 0, None));
        assert!(decode(b"{}", b"{}").is_err(), "without a state nothing is known");
        assert!(decode(br#"{"BackendState":"Running","Self":{"KeyExpiry":"soon"}}"#, b"{}").is_err());
    }

    #[test]
    fn only_a_whole_answer_that_says_ok_counts() {
        let good = b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\n{}";
        let body = |answer: &[u8]| parsed(answer).and_then(Answer::good);
        assert_eq!(body(good).expect("sound"), b"{}");
        assert!((0..good.len()).all(|length| body(&good[..length]).is_err()));
        let denied = body(b"HTTP/1.0 403 Forbidden\r\n\r\ninvalid localapi request\n").expect_err("denied");
        assert_eq!(denied.to_string(), "it says 403: invalid localapi request");
        assert!(body(b"SSH-2.0-OpenSSH_9.2\r\n\r\n").is_err());
    }

    #[test]
    fn the_compiled_filter_is_read_or_said_to_be_unread() {
        let rules = br#"[{"SrcIPs":["100.64.0.2","fd7a:115c:a1e0::2","cap:x"],"DstPorts":[{"IP":"100.64.0.16/32",
            "Bits":null,"Ports":{"First":22,"Last":22}},{"IP":"*","Ports":{"First":0,"Last":65535}}],"IPProto":[6]}]"#;
        let MeshFilter::Rules(found) = filter(rules) else { panic!("a form that is known") };
        assert_eq!(found.len(), 2);
        assert_eq!((found[0].ports, found[0].protos.as_slice()), ((22, 22), &[crate::terms::Proto::Tcp][..]));
        assert_eq!(found[0].from.to_string(), "100.64.0.2, fd7a:115c:a1e0::2");
        assert_eq!(filter(b"null\n"), MeshFilter::Rules(Vec::new()), "nobody gets in");
        let entry = r#"{"SrcIPs":["*"],"DstPorts":[{"IP":"*","Ports":{"First":1,"Last":2}}]}"#;
        let many = format!("[{}]", vec![entry; RULES_MAX + 1].join(","));
        for odd in [&b"<html>\x1b[2J"[..], b"[{\"SrcIPs\":7}]", b"", many.as_bytes()] {
            let MeshFilter::Unread(why) = filter(odd) else { panic!("{odd:?}") };
            assert!(!why.is_empty() && !why.contains('\x1b'), "{why:?}");
        }
    }

    /// Asks somebody who answers like this.
    fn asked(answer: impl FnOnce(UnixStream) + Send) -> String {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("tailscaled.sock");
        let listener = UnixListener::bind(&path).expect("a socket");
        std::thread::scope(|scope| {
            scope.spawn(|| answer(listener.accept().expect("a client").0));
            match ask(&path, "GET status", Instant::now() + Duration::from_millis(300)).and_then(Answer::good)
            {
                Ok(body) => String::from_utf8_lossy(&body).into_owned(),
                Err(error) => format!("error: {error:#}"),
            }
        })
    }

    #[test]
    fn whoever_hangs_resets_or_floods_is_given_up() {
        if !rustix::process::geteuid().is_root() {
            eprintln!("skipped: needs root");
            return;
        }
        let quick = |mut stream: UnixStream| {
            let mut request = [0; 512];
            let length = stream.read(&mut request).unwrap_or(0);
            assert!(
                request[..length]
                    .starts_with(b"GET /localapi/v0/status HTTP/1.0\r\nHost: local-tailscaled.sock\r\n")
            );
            let _ = stream.write_all(b"HTTP/1.0 200 OK\r\n\r\nhere");
        };
        assert_eq!(asked(quick), "here");
        // Whether the request was read decides what the kernel says.
        let left = asked(drop);
        assert!(left.starts_with("error: "), "{left}");
        let hangs = |mut stream: UnixStream| drop(stream.read_to_end(&mut Vec::new()));
        assert_eq!(asked(hangs), "error: no answer within 1s");
        let floods = |mut stream: UnixStream| {
            let _ = stream.write_all(b"HTTP/1.0 200 OK\r\n\r\n");
            while stream.write_all(&[b' '; 65536]).is_ok() {}
        };
        let flooded = asked(floods);
        assert!(flooded.contains("says more than") || flooded.contains("no answer within"), "{flooded}");
        let drips = |mut stream: UnixStream| {
            while stream.write_all(b"H").is_ok() {
                std::thread::sleep(Duration::from_millis(20));
            }
        };
        assert_eq!(asked(drips), "error: no answer within 1s");
    }
}
