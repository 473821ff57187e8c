//! The nodes as the hub meets them through the mesh. Whoever answers there may be anybody:
//! time, bytes and connections are bounded, and what one node does is that node's alone.

use std::net::{IpAddr, SocketAddr};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use ureq::config::Config;
use ureq::http::{Uri, header};
use ureq::unversioned::resolver::{DefaultResolver, ResolvedSocketAddrs, Resolver};
use ureq::unversioned::transport::{DefaultConnector, NextTimeout};
use ureq::{Agent, Error};

use crate::fleet::exposition::Exposition;
use crate::fleet::view::{Heard, Place, Said};
use crate::fleet::vitals::Vitals;
use crate::sys::clock;
use crate::terms::printable;

/// For one node, all its answers together.
pub const PATIENCE: Duration = Duration::from_secs(3);
/// Nodes asked side by side; each may hold an answer of [`BYTES_MAX`].
pub const SIDE_BY_SIDE: usize = 64;
/// A daemon's metrics are 20 KB.
pub const BYTES_MAX: u64 = 1 << 20;
const STACK_BYTES: usize = 512 * 1024;

/// Asks every place for its metrics, and whether they are those of a loop that runs.
/// In the order of the places.
pub fn ask(places: &[Place]) -> Vec<Heard> {
    let agent = agent();
    each(places, SIDE_BY_SIDE, |place| match metrics(&agent, &place.at) {
        Ok(said) => Heard::Said(Box::new(said)),
        Err(Failure::Silent(reason)) => Heard::Silent(reason),
        Err(Failure::Garbled(reason)) => Heard::Garbled(reason),
    })
    .into_iter()
    .map(|heard| heard.unwrap_or_else(|| Heard::Silent("could not be asked: no thread to do it".to_owned())))
    .collect()
}

/// Does something with each item, so many side by side, in the items' order. `None` where the
/// machine had no thread left, or the work ended early.
pub fn each<I: Sync, O: Send>(
    items: &[I],
    side_by_side: usize,
    work: impl Fn(&I) -> O + Sync,
) -> Vec<Option<O>> {
    let next = AtomicUsize::new(0);
    let done: Mutex<Vec<Option<O>>> = Mutex::new(items.iter().map(|_| None).collect());
    let serve = || {
        while let Some(at) = Some(next.fetch_add(1, Ordering::Relaxed)).filter(|at| *at < items.len()) {
            let out = work(&items[at]);
            if let Ok(mut done) = done.lock() {
                done[at] = Some(out);
            }
        }
    };
    std::thread::scope(|scope| {
        let mut started = false;
        for _ in 0..side_by_side.min(items.len()) {
            let thread = std::thread::Builder::new().stack_size(STACK_BYTES);
            started |= thread.spawn_scoped(scope, serve).is_ok();
        }
        if !started {
            serve();
        }
    });
    done.into_inner().unwrap_or_default()
}

/// Why a node has not said what it was asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Failure {
    Silent(String),
    Garbled(String),
}

struct Answer {
    status: u16,
    date: Option<i64>,
    body: String,
}

/// Follows nobody anywhere.
fn agent() -> Agent {
    let config = Agent::config_builder()
        .proxy(None)
        .max_redirects(0)
        .http_status_as_error(false)
        .max_idle_connections(0)
        .user_agent(concat!("spokeguard/", env!("CARGO_PKG_VERSION")))
        .build();
    Agent::with_parts(config, DefaultConnector::default(), Addresses(DefaultResolver::default()))
}

/// Asks a name server for names only: addresses need no thread of their own.
#[derive(Debug)]
struct Addresses(DefaultResolver);

impl Resolver for Addresses {
    fn resolve(
        &self,
        uri: &Uri,
        config: &Config,
        timeout: NextTimeout,
    ) -> Result<ResolvedSocketAddrs, Error> {
        let host = uri.host().map(|host| host.trim_matches(['[', ']']));
        let Some(address) = host.and_then(|host| host.parse::<IpAddr>().ok()) else {
            return self.0.resolve(uri, config, timeout);
        };
        let mut out = self.empty();
        out.push(SocketAddr::new(address, uri.port_u16().unwrap_or(80)));
        Ok(out)
    }
}

fn metrics(agent: &Agent, at: &str) -> Result<Said, Failure> {
    let started = Instant::now();
    let answer = get(agent, at, "/metrics", PATIENCE)?;
    let now = clock::now();
    if answer.status != 200 {
        return Err(Failure::Garbled(format!("answers HTTP {} for its metrics", answer.status)));
    }
    let text = Exposition::parse(&answer.body).map_err(|garbage| Failure::Garbled(garbage.to_string()))?;
    let vitals = Vitals::of(&text).map_err(|what| Failure::Garbled(what.to_owned()))?;
    let left = PATIENCE.saturating_sub(started.elapsed());
    let stale = match get(agent, at, "/healthz", left) {
        Ok(Answer { status: 200, .. }) => None,
        Ok(Answer { body, .. }) => Some(format!("its loop is stuck: {}", printable(body.trim(), 120))),
        Err(Failure::Silent(why) | Failure::Garbled(why)) => {
            Some(format!("whether its loop runs is not known: {why}"))
        }
    };
    let skew = answer.date.map(|date| date.saturating_sub(now.0.as_second()));
    Ok(Said { vitals, stale, date: answer.date, skew, took: started.elapsed() })
}

fn get(agent: &Agent, at: &str, path: &str, left: Duration) -> Result<Answer, Failure> {
    if left.is_zero() {
        return Err(Failure::Silent(late()));
    }
    let request = agent.get(format!("http://{at}{path}")).header(header::ACCEPT, "text/plain;version=0.0.4");
    let failed = |error: Error| failure(at, &error);
    let mut response = request.config().timeout_global(Some(left)).build().call().map_err(failed)?;
    let date = response.headers().get(header::DATE).and_then(|date| moment(date.to_str().ok()?));
    let bytes = response.body_mut().with_config().limit(BYTES_MAX).read_to_vec().map_err(failed)?;
    let body = String::from_utf8(bytes)
        .map_err(|_| Failure::Garbled("answers something that is no text".to_owned()))?;
    Ok(Answer { status: response.status().as_u16(), date, body })
}

fn late() -> String {
    format!("no whole answer within {} s", PATIENCE.as_secs())
}

fn failure(at: &str, error: &Error) -> Failure {
    use std::io::ErrorKind;
    match error {
        Error::Timeout(ureq::Timeout::Connect) => Failure::Silent(format!("no answer from {at}")),
        Error::Timeout(_) => Failure::Silent(late()),
        Error::HostNotFound => Failure::Silent(format!("{at} has no address")),
        Error::BodyExceedsLimit(_) => Failure::Garbled(format!("sends more than {} KiB", BYTES_MAX >> 10)),
        Error::Io(error) => match error.kind() {
            ErrorKind::ConnectionRefused => Failure::Silent(format!("nothing listens at {at}")),
            ErrorKind::ConnectionReset | ErrorKind::BrokenPipe | ErrorKind::UnexpectedEof => {
                Failure::Silent("breaks the connection off".to_owned())
            }
            ErrorKind::TimedOut | ErrorKind::WouldBlock => Failure::Silent(format!("no answer from {at}")),
            _ => Failure::Silent(printable(&format!("{at} can't be reached: {error}"), 200)),
        },
        // What the parser of HTTP says quotes what it was given.
        other => Failure::Garbled(printable(&format!("answers no HTTP: {other}"), 200)),
    }
}

/// Unix time of a date as HTTP writes it.
fn moment(date: &str) -> Option<i64> {
    let date = date.get(..date.len().min(64))?;
    Some(jiff::fmt::rfc2822::DateTimeParser::new().parse_timestamp(date).ok()?.as_second())
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::TcpListener;

    use super::*;

    /// Serves each connection with the next of these, and then closes it.
    fn stub(answers: Vec<Vec<u8>>) -> Place {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let at = listener.local_addr().unwrap().to_string();
        std::thread::spawn(move || {
            for answer in answers {
                let Ok((mut client, _)) = listener.accept() else { return };
                let _ = client.read(&mut [0u8; 2048]);
                let _ = client.write_all(&answer);
            }
        });
        Place { name: "oslo".into(), role: "spoke".into(), region: None, at, policy: None }
    }

    fn ok(body: &str) -> Vec<u8> {
        let date = "Date: Sat, 21 Nov 2026 18:00:00 GMT";
        format!("HTTP/1.1 200 OK\r\n{date}\r\nContent-Length: {}\r\n\r\n{body}", body.len()).into_bytes()
    }

    #[test]
    fn a_date_is_read_and_nonsense_is_none() {
        assert_eq!(moment("Sat, 21 Nov 2026 18:00:00 GMT"), Some(1_795_284_000));
        assert_eq!(moment("yesterday"), None);
        assert_eq!(moment(&"é".repeat(100)), None);
    }

    #[test]
    fn each_node_is_judged_by_its_own_answer() {
        let good = "spokeguard_verdict 0\n";
        let places = [
            stub(vec![ok(good), ok("ok\n")]),
            stub(vec![ok(good), b"HTTP/1.1 503 No\r\nContent-Length: 5\r\n\r\nst\x1bck".to_vec()]),
            stub(vec![ok("<html>")]),
            stub(vec![b"SSH-2.0-OpenSSH\r\n".to_vec()]),
            stub(vec![
                b"HTTP/1.1 302 Moved\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n".to_vec(),
            ]),
            stub(vec![Vec::new()]),
        ];
        let heard = ask(&places);
        let Heard::Said(said) = &heard[0] else { panic!("{heard:?}") };
        assert_eq!((said.date, &said.stale), (Some(1_795_284_000), &None));
        let Heard::Said(stuck) = &heard[1] else { panic!("{heard:?}") };
        assert_eq!(stuck.stale.as_deref(), Some("its loop is stuck: st\u{fffd}ck"));
        let garbled = |at: usize| matches!(&heard[at], Heard::Garbled(_));
        assert!(garbled(2) && garbled(3) && garbled(4), "{heard:?}");
        assert!(matches!(&heard[5], Heard::Silent(_) | Heard::Garbled(_)), "{heard:?}");
    }

    #[test]
    fn work_is_done_once_for_each_and_in_order() {
        let items: Vec<usize> = (0..500).collect();
        let out: Vec<usize> = each(&items, 8, |n| n * 2).into_iter().flatten().collect();
        assert_eq!(out, items.iter().map(|n| n * 2).collect::<Vec<_>>());
    }
}
