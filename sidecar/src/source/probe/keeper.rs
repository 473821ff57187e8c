//! What the reply mode begins and must not leave behind, should this process be killed:
//! half-open sockets, conntrack's entries, and answers that come later.
//!
//! A sweep writes down what it begins before its first probe and strikes it out at its
//! end. A second process, the keeper, holds the program that catches answers and waits for
//! the first to end; where that came too early, it ends what was begun. Where both were
//! killed, the next sweep does it, from what was written down.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::IpAddr;
use std::os::unix::fs::OpenOptionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context as _, bail};
use serde::{Deserialize, Serialize};
use sidecar_ebpf::sweep::{CHUNK, Order};

use super::frame::{self, Kind, Shape};
use super::programs::{Attached, Place, Programs};
use super::tables::{Tables, Whose};
use super::{ANSWER, RETRANSMISSION, btf, conntrack, inject};
use crate::terms::{Family, Port, Proto};

/// The hidden verb of the keeper: PROGRAM VERB RUN_DIR.
pub const VERB: &str = "internal-keep-audit";
const HELD: &str = "held";
const DONE: u8 = b'.';
const FILE: &str = "audit.unfinished";
/// A list of all ports, written badly.
const BYTES_MAX: u64 = 1 << 20;

/// All that is needed to end what the probes of one sweep began.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub struct Unfinished {
    to: IpAddr,
    mac: [u8; 6],
    from: [u8; 6],
    index: u32,
    head: u32,
    token: u32,
    source: [u32; 4],
    source_port: u16,
    spread_mask: u16,
    proto: u8,
    /// First and last.
    ports: Vec<(Port, Port)>,
}

impl Unfinished {
    pub fn new(shape: &Shape, ports: &[Port]) -> Self {
        let Order { head, token, index, source, source_port, spread_mask, proto, .. } = shape.order;
        let mut ranges: Vec<(Port, Port)> = Vec::new();
        for port in ports {
            match ranges.last_mut() {
                Some((_, last)) if last.get().checked_add(1) == Some(port.get()) => *last = *port,
                _ => ranges.push((*port, *port)),
            }
        }
        let Shape { to, mac, from, .. } = *shape;
        Self { to, mac, from, index, head, token, source, source_port, spread_mask, proto, ports: ranges }
    }

    fn shape(&self) -> Shape {
        let Self { to, mac, from, index, head, token, source, source_port, spread_mask, proto, .. } = *self;
        let family = if to.is_ipv4() { sidecar_ebpf::IPV4 } else { sidecar_ebpf::IPV6 } as u8;
        let mut order = Order {
            head,
            token,
            index,
            source,
            source_port,
            spread_mask,
            family,
            proto,
            reply: 1,
            ..Order::default()
        };
        order.frame_bytes = frame::length(&order) as u32;
        Shape { order, to, mac, from }
    }

    fn ports(&self) -> Vec<Port> {
        let all = self.ports.iter().flat_map(|(first, last)| first.get()..=last.get());
        all.filter_map(Port::new).take(usize::from(u16::MAX)).collect()
    }

    fn is_tcp(&self) -> bool {
        self.proto == Proto::Tcp.number()
    }

    /// Catches what is still answered, resets what is half open, outlives retransmissions,
    /// and takes conntrack's entries away.
    fn end(&self, programs: &mut Programs) -> anyhow::Result<()> {
        let (shape, ports) = (self.shape(), self.ports());
        let mut first = Ok(());
        if self.is_tcp() {
            for chunk in ports.chunks(CHUNK as usize) {
                first = first.and(inject(&mut programs.lanes[0], &shape, chunk, Kind::Reset));
            }
        }
        std::thread::sleep(if self.is_tcp() { RETRANSMISSION } else { ANSWER });
        conntrack::forget(&shape, &ports)?;
        first.context("inject resets")
    }

    /// Keeps the answers in for as long as the second and the third live: before Linux 6.4 by a table.
    fn hold(
        &self,
        place: Place,
        whose: Whose,
    ) -> anyhow::Result<(Programs, Option<Attached>, Option<Tables>)> {
        let mut programs = Programs::load(1).context("load the audit's programs")?;
        let mut order = self.shape().order;
        let offsets = super::known(btf::read());
        let btf::Offsets { head, network_header, .. } = offsets.unwrap_or_default();
        (order.skb_head, order.skb_network_header) = (head, network_header);
        programs.orders.set(0, order);
        let hooked = offsets.and_then(|_| super::known(programs.hook(Family::of(self.to), place)));
        let tables = if hooked.is_some() { None } else { Some(Tables::put(&order, whose)?) };
        Ok((programs, hooked, tables))
    }
}

/// For as long as a sweep has begun things.
pub struct Keeper {
    path: PathBuf,
    child: Option<Child>,
}

impl Keeper {
    /// Returns when all is written down and the keeper holds the answers back.
    pub fn begin(run_dir: &Path, program: Option<&Path>, what: &Unfinished) -> anyhow::Result<Self> {
        let mut keeper = Self { path: run_dir.join(FILE), child: None };
        let Some(program) = program else {
            write_down(run_dir, what)?;
            return Ok(keeper);
        };
        let child = Command::new(program)
            .arg(VERB)
            .arg(run_dir)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            // What ends a terminal's command must not end what cleans up after it.
            .process_group(0)
            .spawn()
            .context("start the keeper")?;
        let child = keeper.child.insert(child);
        let mut text = serde_json::to_vec(what).context("write down what a sweep begins")?;
        text.push(b'\n');
        let stdin = child.stdin.as_mut().context("the keeper has no standard input")?;
        stdin.write_all(&text).context("tell the keeper what a sweep begins")?;
        let mut said = String::new();
        let stdout = child.stdout.take().context("the keeper has no standard output")?;
        BufReader::new(stdout.take(64)).read_line(&mut said).context("hear from the keeper")?;
        if said.trim() != HELD {
            bail!("the keeper of the audit did not start");
        }
        Ok(keeper)
    }

    /// All is cleaned up.
    pub fn end(mut self) {
        let _ = std::fs::remove_file(&self.path);
        if let Some(mut child) = self.child.take() {
            if let Some(mut stdin) = child.stdin.take() {
                let _ = stdin.write_all(&[DONE]);
            }
            let _ = child.wait();
        }
    }
}

impl Drop for Keeper {
    /// The sweep failed half way: the keeper does what is left, which takes it a while.
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            drop(child.stdin.take());
            let _ = child.wait();
        } else if let Some(run_dir) = self.path.parent() {
            let _ = finish_what_was_left(run_dir);
        }
    }
}

/// The keeper itself. It also does the writing down: the audit may be killed before there
/// is a keeper, and then nothing is begun and nothing written.
pub fn keep(run_dir: &Path) -> anyhow::Result<()> {
    let mut stdin = BufReader::new(std::io::stdin()).take(BYTES_MAX);
    let mut text = Vec::new();
    stdin.read_until(b'\n', &mut text).context("hear what the audit begins")?;
    if text.last() != Some(&b'\n') {
        return Ok(());
    }
    let what: Unfinished = serde_json::from_slice(&text).context("read what the audit begins")?;
    // Behind the sweep's own programs, which are to see the answers first.
    let (mut programs, _hooked, _tables) = what.hold(Place::Behind, Whose::Keeper)?;
    write_down(run_dir, &what)?;
    // Nobody may be left to hear it.
    let _ = writeln!(std::io::stdout(), "{HELD}");
    let mut word = [0];
    if stdin.read(&mut word).context("wait for the audit's end")? == 1 && word[0] == DONE {
        return Ok(());
    }
    let ended = what.end(&mut programs);
    // Unless the next sweep has begun something of its own.
    if read(run_dir).ok().flatten().is_some_and(|now| now == what) {
        let _ = std::fs::remove_file(run_dir.join(FILE));
    }
    ended
}

/// Before a sweep: what an earlier one did not live to end, nor its keeper.
pub fn finish_what_was_left(run_dir: &Path) -> anyhow::Result<()> {
    let path = run_dir.join(FILE);
    match read(run_dir) {
        Ok(None) => return Ok(()),
        Ok(Some(what)) => {
            let (mut programs, _hooked, _tables) = what.hold(Place::Answers, Whose::Next)?;
            // Its device may be gone, and with it the way in; conntrack's entries time out.
            if let Err(error) = what.end(&mut programs) {
                log::warn!("what a killed audit left could not be ended: {error:#}");
            }
        }
        Err(error) => log::warn!("what a killed audit left is not readable: {error:#}"),
    }
    let _ = std::fs::remove_file(path);
    Ok(())
}

fn write_down(run_dir: &Path, what: &Unfinished) -> anyhow::Result<()> {
    let path = run_dir.join(FILE);
    let text = serde_json::to_vec(what).context("write down what a sweep begins")?;
    // Whoever can read it could forge an answer.
    let file = std::fs::File::options().create(true).truncate(true).write(true).mode(0o600).open(&path);
    file.and_then(|mut file| file.write_all(&text)).with_context(|| format!("write {}", path.display()))
}

fn read(run_dir: &Path) -> anyhow::Result<Option<Unfinished>> {
    let path = run_dir.join(FILE);
    let file = match std::fs::File::open(&path) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error).with_context(|| format!("open {}", path.display())),
    };
    let mut text = Vec::new();
    file.take(BYTES_MAX).read_to_end(&mut text).with_context(|| format!("read {}", path.display()))?;
    serde_json::from_slice(&text).map(Some).with_context(|| format!("read {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_down_makes_the_same_resets() {
        for to in ["198.51.100.7", "2001:db8::7"] {
            let to: IpAddr = to.parse().expect("an address");
            let order = Order {
                head: 0x1234_ffff,
                token: 0x9abc_def0,
                index: 3,
                source: [0x0c22_0102, 5, 9, 10],
                source_port: 40000,
                spread_mask: 0xffff,
                family: u8::from(to.is_ipv6()),
                proto: 6,
                reply: 1,
                ..Order::default()
            };
            let shape = Shape { order, to, mac: [2, 1, 2, 3, 4, 5], from: [2, 0, 0, 0, 0, 9] };
            let ports: Vec<Port> = [22, 80, 81, 65535].into_iter().filter_map(Port::new).collect();
            let what = Unfinished::new(&shape, &ports);
            let text = serde_json::to_string(&what).expect("text");
            let again: Unfinished = serde_json::from_str(&text).expect("the same");
            assert_eq!(again.ports(), ports);
            for port in &ports {
                let frame = |shape: &Shape| super::super::frame(shape, port.get(), Kind::Reset).bytes;
                assert_eq!(frame(&again.shape()), frame(&shape));
            }
        }
    }

    #[test]
    fn a_file_that_is_none_of_ours_is_an_error_and_no_panic() {
        let folder = tempfile::tempdir().expect("a folder");
        assert_eq!(read(folder.path()).expect("nothing there"), None);
        for text in ["", "{}", r#"{"to": 5}"#, "[0]"] {
            std::fs::write(folder.path().join(FILE), text).expect("written");
            assert!(read(folder.path()).is_err(), "{text}");
        }
    }
}
