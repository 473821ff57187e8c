//! What the programs say of their own accord: a socket began to listen; a line for the
//! log. Both wake the daemon, neither is believed.

use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use anyhow::Context as _;
use aya::maps::{Map, MapData, RingBuf};
use aya::programs::RawTracePoint;
use aya_log::EbpfLogger;
use sidecar_ebpf::{ListenEvent, maps, programs};
use tokio::io::unix::AsyncFd;

use super::{Bpf, root};
use crate::sys;
use crate::terms::printable;

/// Sockets that begin to listen in this network namespace. The tracepoint is attached for
/// as long as this value lives. It sees every namespace of the machine; a host full of
/// containers would otherwise be looked at for each of theirs.
pub struct ListenEvents {
    ring: AsyncFd<RingBuf<MapData>>,
    here: Option<Namespace>,
    _program: RawTracePoint,
}

/// Device and inode of a network namespace.
type Namespace = (u64, u64);

/// Who called listen().
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listening {
    pub pid: u32,
    pub process: String,
}

impl ListenEvents {
    /// From the pins below this directory, inside a tokio runtime.
    pub fn open(pin_dir: &Path) -> anyhow::Result<Self> {
        let root = root(pin_dir);
        let map =
            MapData::from_pin(root.join("maps").join(maps::LISTENS)).context("open of the listen events")?;
        let mut ring = RingBuf::try_from(Map::RingBuf(map)).context("map of the listen events")?;
        // Left over from another daemon; whoever opens this is about to look anyway.
        while ring.next().is_some() {}
        let ring = sys::bpf::poll_ring(ring).context("poll of the listen events")?;
        let mut program = RawTracePoint::from_pin(root.join("programs").join(programs::LISTEN))
            .context("open of the pinned program listen")?;
        program
            .attach(programs::LISTEN_TRACEPOINT)
            .with_context(|| format!("attach to the tracepoint {}", programs::LISTEN_TRACEPOINT))?;
        Ok(Self { ring, here: namespace("thread-self"), _program: program })
    }

    /// Waits for at least one. Cancelling loses none. A burst beyond the ring's size
    /// comes back shorter.
    pub async fn next(&mut self) -> io::Result<Vec<Listening>> {
        loop {
            let mut ready = self.ring.readable_mut().await?;
            let ring = ready.get_inner_mut();
            let (mut events, mut taken) = (Vec::new(), 0);
            while taken < LISTENS_PER_WAKE {
                let Some(item) = ring.next() else { break };
                taken += 1;
                events.extend(decode(&item).filter(|event| !is_elsewhere(self.here, event.pid)));
            }
            if taken < LISTENS_PER_WAKE {
                ready.clear_ready();
            }
            if !events.is_empty() {
                return Ok(events);
            }
        }
    }
}

const LISTENS_PER_WAKE: usize = 128;

/// Whether this process is known to be in another network namespace. One that has ended, or
/// may not be looked at, may have been in ours. A socket that a process took along into
/// another namespace is found as late as anything that sends no event.
fn is_elsewhere(here: Option<Namespace>, pid: u32) -> bool {
    here.zip(namespace(&pid.to_string())).is_some_and(|(here, there)| here != there)
}

fn namespace(process: &str) -> Option<Namespace> {
    let meta = std::fs::metadata(format!("/proc/{process}/ns/net")).ok()?;
    Some((meta.dev(), meta.ino()))
}

pub(in crate::source) fn decode(bytes: &[u8]) -> Option<Listening> {
    if bytes.len() < size_of::<ListenEvent>() {
        return None;
    }
    let pid = u32::from_ne_bytes(bytes.get(..4)?.try_into().ok()?);
    let comm = bytes.get(4..20)?;
    let comm = comm.split(|byte| *byte == 0).next().unwrap_or_default();
    Some(Listening { pid, process: printable(&String::from_utf8_lossy(comm), 16) })
}

/// Hands the programs' own messages (aya-log) to the `log` crate.
pub struct ProgramLog {
    logger: AsyncFd<sys::bpf::ProgramLogger>,
}

impl ProgramLog {
    /// Inside a tokio runtime. aya-log finds its ring by walking all programs, which needs
    /// CAP_SYS_ADMIN; without it the messages stay unread, and nothing else is lost.
    pub fn open(bpf: &Bpf) -> anyhow::Result<Self> {
        let id = bpf.attachments.program_id(programs::COUNTERS[0][0][0])?;
        let logger =
            EbpfLogger::init_from_id(id).context("open of the programs' log (needs CAP_SYS_ADMIN)")?;
        let logger = sys::bpf::poll_log(logger).context("poll of the programs' log")?;
        Ok(Self { logger })
    }

    /// Forwards until it fails or is dropped.
    pub async fn forward(mut self) -> io::Result<()> {
        loop {
            let mut ready = self.logger.readable_mut().await?;
            ready.get_inner_mut().flush();
            ready.clear_ready();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_process_that_is_known_to_be_elsewhere_is_passed_over() {
        let (here, me) = (namespace("thread-self"), std::process::id());
        assert!(here.is_some(), "a thread may always look at itself");
        assert!(!is_elsewhere(here, me), "this process is here");
        assert!(is_elsewhere(here.map(|(device, inode)| (device, inode + 1)), me));
        assert!(!is_elsewhere(here, u32::MAX), "a process that has ended");
        assert!(!is_elsewhere(None, me), "nothing is known of ourselves");
    }

    #[test]
    fn a_listen_event_is_decoded_and_its_name_made_harmless() {
        let mut bytes = 812u32.to_ne_bytes().to_vec();
        bytes.extend(b"post\x1b[2Jgres\0\0\0\0");
        let event = decode(&bytes).expect("an event");
        assert_eq!((event.pid, event.process.as_str()), (812, "post\u{fffd}[2Jgres"));
        bytes[4..].fill(b'x');
        assert_eq!(decode(&bytes).expect("no terminator").process, "x".repeat(16));
        assert_eq!(decode(&bytes[..19]), None);
        assert_eq!(decode(&[]), None);
    }
}
