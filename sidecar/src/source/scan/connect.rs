//! Without the right to make packets: ordinary connections, many at a time. The kernel
//! hides which ICMP error it got, so that a port that rejects by "port unreachable" reads
//! as closed here, as in nmap's connect scan.

use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::Context;
use tokio::net::{TcpSocket, UdpSocket};
use tokio::task::JoinSet;
use tokio::time::{sleep_until, timeout};

use super::{Answers, Count, Found, Order};
use crate::audit::Answer;
use crate::terms::Proto;

/// Descriptors that are left for everything else.
const SPARE: u64 = 64;
const AT_ONCE_MAX: u64 = 4096;
const TRIES: u32 = 2;
const WAIT_MAX: Duration = Duration::from_millis(1000);
const WAIT_MIN: Duration = Duration::from_millis(250);

pub(super) fn run(
    proto: Proto,
    source: Option<IpAddr>,
    target: IpAddr,
    order: &Order,
    rate: Option<f64>,
    count: &Count,
) -> anyhow::Result<Found> {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().context("start a runtime")?;
    let total = order.first.len() + order.rest.len();
    count.expect(total * TRIES as usize);
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current.unwrap_or(1024);
    // Several targets share the descriptors.
    let at_once = (limit.saturating_sub(SPARE) / super::JOBS_MAX as u64).clamp(16, AT_ONCE_MAX) as usize;
    runtime.block_on(async {
        let mut answers = Answers::new();
        let mut trips = Vec::new();
        let started = Instant::now();
        let mut sent = 0u64;
        for _ in 0..TRIES {
            let mut asking = JoinSet::new();
            let all = order.first.iter().chain(&order.rest).copied();
            let todo: Vec<u16> = all.filter(|port| !answers.has(*port)).collect();
            for port in todo {
                if let Some(rate) = rate {
                    let due = started + Duration::from_secs_f64(sent as f64 / rate);
                    sleep_until(due.into()).await;
                }
                while asking.len() >= at_once {
                    take(asking.join_next().await, &mut answers, &mut trips)?;
                }
                asking.spawn(ask(proto, source, target, port, wait(&trips)));
                count.sent(1);
                sent += 1;
            }
            while let Some(done) = asking.join_next().await {
                take(Some(done), &mut answers, &mut trips)?;
            }
        }
        Ok(Found { answers, gap: None, effort: None })
    })
}

type Asked = anyhow::Result<(u16, Answer, Duration)>;

fn take(
    done: Option<Result<Asked, tokio::task::JoinError>>,
    answers: &mut Answers,
    trips: &mut Vec<Duration>,
) -> anyhow::Result<()> {
    let Some(done) = done else { return Ok(()) };
    let (port, answer, time) = done.context("ask a port")??;
    answers.put(port, answer);
    if matches!(answer, Answer::Connected | Answer::Reset) && trips.len() < 64 {
        trips.push(time);
    }
    Ok(())
}

/// Several times the slowest answer so far; a lost SYN is not sent again within it.
fn wait(trips: &[Duration]) -> Duration {
    match trips.iter().max() {
        Some(slowest) => (*slowest * 4).clamp(WAIT_MIN, WAIT_MAX),
        None => WAIT_MAX,
    }
}

async fn ask(proto: Proto, source: Option<IpAddr>, target: IpAddr, port: u16, wait: Duration) -> Asked {
    let to = SocketAddr::new(target, port);
    let started = Instant::now();
    let result = match proto {
        Proto::Tcp => {
            let socket = if target.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() };
            let socket = socket.context("open a socket")?;
            // Only where it was asked for: a bound socket takes a port of ours for itself alone.
            if let Some(source) = source {
                socket.bind(SocketAddr::new(source, 0)).with_context(|| format!("send from {source}"))?;
            }
            timeout(wait, socket.connect(to)).await.map(|done| done.map(|_| Answer::Connected))
        }
        Proto::Udp => {
            let any: IpAddr = if target.is_ipv4() { [0u8; 4].into() } else { [0u16; 8].into() };
            let socket =
                UdpSocket::bind(SocketAddr::new(source.unwrap_or(any), 0)).await.context("open a socket")?;
            timeout(wait, async {
                socket.connect(to).await?;
                socket.send(&[]).await?;
                socket.recv(&mut [0u8; 16]).await.map(|_| Answer::Datagram)
            })
            .await
        }
    };
    let icmp = |code: u8| Answer::Unreachable { icmp_type: if target.is_ipv4() { 3 } else { 1 }, code };
    let answer = match result {
        Err(_late) => Answer::Silent,
        Ok(Ok(answer)) => answer,
        Ok(Err(error)) => match (error.kind(), proto) {
            (ErrorKind::ConnectionRefused, Proto::Tcp) => Answer::Reset,
            (ErrorKind::ConnectionRefused, Proto::Udp) => icmp(if target.is_ipv4() { 3 } else { 4 }),
            (ErrorKind::HostUnreachable, _) => icmp(if target.is_ipv4() { 1 } else { 3 }),
            (ErrorKind::NetworkUnreachable, _) => icmp(0),
            (ErrorKind::PermissionDenied, _) => icmp(if target.is_ipv4() { 13 } else { 1 }),
            (ErrorKind::TimedOut, _) => Answer::Silent,
            _ => return Err(error).with_context(|| format!("connect to {to}")),
        },
    };
    Ok((port, answer, started.elapsed()))
}
