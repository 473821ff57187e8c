//! The audit's programs in the kernel: loaded for one audit, attached by links that are
//! never pinned, so that the end of this process takes everything away.

use std::collections::{HashMap, HashSet};
use std::io;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};

use anyhow::Context as _;
use aya_obj::Object;
use aya_obj::generated::bpf_insn;
use sidecar_ebpf::sweep::{CHUNK, Frame, Order, Progress, Trace, maps, programs};

use crate::sys::probe::{
    Direction, Hook, Kind, Layer, Mapped, Rank, attach_netfilter, attach_tcx, load, tap,
};
use crate::terms::Family;

static OBJECT: &[u8] = aya::include_bytes_aligned!(env!("SPOKEGUARD_PROBE_OBJECT"));

/// Behind every chain that anyone writes, and before conntrack confirms what passed
/// (`INT_MAX`, and one less for IPv6). Two programs can't share a number, so there are
/// some to choose from.
const PRIORITY: i32 = i32::MAX - 2;
const PRIORITIES: i32 = 16;

type Code = HashMap<&'static str, Vec<bpf_insn>>;

pub struct Programs {
    pub orders: Mapped<Order>,
    pub traces: Mapped<Trace>,
    /// At least one.
    pub lanes: Vec<Lane>,
    code: Code,
}

/// An injector and what it works from, for one thread.
pub struct Lane {
    pub frames: Mapped<Frame>,
    pub progress: Mapped<Progress>,
    pub inject: OwnedFd,
}

/// Which of a family's hooks a process needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Probes end behind the last chain, and so do answers.
    Verdict,
    /// Probes go on to sockets, and only the answers are caught.
    Answers,
    /// The same, after another process that does it.
    Behind,
}

/// What is attached for the sweeps of one family; leaves when dropped.
pub struct Attached(#[allow(dead_code, reason = "held for its descriptors")] Vec<OwnedFd>);

impl Programs {
    /// So many threads can inject at a time.
    pub fn load(lanes: usize) -> anyhow::Result<Self> {
        let orders = Mapped::create(1).map_err(denied).context("create a BPF map")?;
        let traces = Mapped::create(1 << 16).context("create a BPF map")?;
        let parsed = Object::parse(OBJECT).context("parse the audit's programs")?;
        let mut out = Self { orders, traces, lanes: Vec::new(), code: HashMap::new() };
        for _ in 0..lanes.max(1) {
            let frames = Mapped::create(CHUNK).context("create a BPF map")?;
            let progress = Mapped::create(1).context("create a BPF map")?;
            // All but the injector use what all lanes share, so that any lane's copy will do.
            out.code = out.wired(parsed.clone(), &frames, &progress)?;
            let inject = program(&out.code, programs::INJECT, Kind::Classifier)?;
            out.lanes.push(Lane { frames, progress, inject });
        }
        Ok(out)
    }

    fn wired(
        &self,
        mut object: Object,
        frames: &Mapped<Frame>,
        progress: &Mapped<Progress>,
    ) -> anyhow::Result<Code> {
        let descriptors = [
            (maps::ORDERS, self.orders.as_fd()),
            (maps::FRAMES, frames.as_fd()),
            (maps::PROGRESS, progress.as_fd()),
            (maps::TRACES, self.traces.as_fd()),
        ];
        let text: HashSet<usize> = object.functions.keys().map(|(section, _)| *section).collect();
        let known = std::mem::take(&mut object.maps);
        let mut wired = Vec::new();
        for (name, descriptor) in descriptors {
            let map = known.get(name).with_context(|| format!("the object has no map {name}"))?;
            wired.push((name, descriptor.as_raw_fd(), map));
        }
        object.relocate_maps(wired.into_iter(), &text).context("wire the audit's programs to their maps")?;
        object.relocate_calls(&text).context("link the audit's programs")?;
        let mut code = HashMap::new();
        let names = [programs::INJECT, programs::LOCAL, programs::FORWARD, programs::REPLY];
        let around = programs::AROUND_GUARD.into_iter().flatten().chain(programs::AROUND_TABLE);
        let devices = programs::ARRIVE.into_iter().chain(programs::TAP).chain(programs::CAUGHT);
        for name in names.into_iter().chain(devices).chain(around) {
            let program =
                object.programs.get(name).with_context(|| format!("the object has no program {name}"))?;
            let function = object.functions.remove(&program.function_key());
            code.insert(name, function.with_context(|| format!("{name} has no code"))?.instructions);
        }
        Ok(code)
    }

    /// Into a family's netfilter hooks.
    pub fn hook(&self, family: Family, place: Place) -> anyhow::Result<Attached> {
        // What keeps things in comes before what lets them know.
        let mut hooks = vec![(programs::REPLY, Hook::PostRouting)];
        if place == Place::Verdict {
            hooks.extend([(programs::LOCAL, Hook::LocalIn), (programs::FORWARD, Hook::Forward)]);
        }
        // The last number of all is the keeper's.
        let priority = if place == Place::Behind { PRIORITY } else { PRIORITY - 1 };
        let attach = |(name, hook)| {
            attach_near(&program(&self.code, name, Kind::Netfilter)?, family, hook, priority, -1)
        };
        Ok(Attached(hooks.into_iter().map(attach).collect::<anyhow::Result<_>>()?))
    }

    /// Sensors on both sides of the chains of this priority in the hooks `input` and `forward`.
    pub fn around_chains(&self, family: Family, priority: i32) -> anyhow::Result<Attached> {
        let sides = programs::AROUND_TABLE.into_iter().zip([-1, 1]);
        let places = sides.flat_map(|side| [Hook::LocalIn, Hook::Forward].map(|hook| (side, hook)));
        let attach = |((name, step), hook)| {
            let program = program(&self.code, name, Kind::Netfilter)?;
            attach_near(&program, family, hook, priority + step, step)
        };
        Ok(Attached(places.map(attach).collect::<anyhow::Result<_>>()?))
    }

    /// Sensors on both sides of a tcx link of a device.
    pub fn around_link(&self, index: u32, ethernet: bool, link: BorrowedFd<'_>) -> anyhow::Result<Attached> {
        let layer = if ethernet { 0 } else { 1 };
        let sides = programs::AROUND_GUARD.into_iter().zip([Rank::Before(link), Rank::Behind(link)]);
        let attach = |(names, rank): ([&str; 2], _)| {
            let program = program(&self.code, names[layer], Kind::Classifier)?;
            attach_tcx(program.as_fd(), index, Direction::In, rank)
                .map_err(denied)
                .with_context(|| format!("attach {} to device {index}", names[layer]))
        };
        Ok(Attached(sides.map(attach).collect::<anyhow::Result<_>>()?))
    }

    /// Around a device.
    pub fn watch(&self, index: u32, ethernet: bool, tcx: bool) -> anyhow::Result<Attached> {
        let layer = if ethernet { 0 } else { 1 };
        if !tcx {
            let filter = program(&self.code, programs::TAP[layer], Kind::SocketFilter)?;
            let tap = tap(filter.as_fd(), index, Layer::Link).map_err(|error| lacking(error, "CAP_NET_RAW"));
            return Ok(Attached(vec![tap.with_context(|| format!("listen on device {index}"))?]));
        }
        let ways = [(programs::CAUGHT[layer], Direction::Out), (programs::ARRIVE[layer], Direction::In)];
        let attach = |(name, direction)| {
            let program = program(&self.code, name, Kind::Classifier)?;
            attach_tcx(program.as_fd(), index, direction, Rank::First)
                .map_err(denied)
                .with_context(|| format!("attach {name} to device {index}"))
        };
        Ok(Attached(ways.into_iter().map(attach).collect::<anyhow::Result<_>>()?))
    }
}

/// At this priority, or at the next free one in steps of `step`.
fn attach_near(
    program: &OwnedFd,
    family: Family,
    hook: Hook,
    wanted: i32,
    step: i32,
) -> anyhow::Result<OwnedFd> {
    let mut priority = wanted;
    loop {
        match attach_netfilter(program.as_fd(), family, hook, priority) {
            Err(error)
                if error.kind() == io::ErrorKind::ResourceBusy
                    && priority.abs_diff(wanted) < PRIORITIES.unsigned_abs() =>
            {
                priority += step;
            }
            other => {
                return other
                    .map_err(denied)
                    .with_context(|| format!("attach to netfilter's hook {hook:?} of {family}"));
            }
        }
    }
}

fn program(code: &Code, name: &str, kind: Kind) -> anyhow::Result<OwnedFd> {
    let code = code.get(name).with_context(|| format!("no program {name}"))?;
    let mut log = vec![0; 64 << 10];
    load(kind, code, &mut log).map_err(|error| {
        let text = String::from_utf8_lossy(&log);
        let text = text.trim_end_matches('\0');
        log::debug!("verifier on {name}: {text}");
        let last = text.lines().rev().find(|line| !line.is_empty() && !line.starts_with("processed "));
        let said = last.map(|line| format!("; verifier: {line}")).unwrap_or_default();
        // The verifier takes what root may do, such as reading kernel memory, for mistakes.
        let needs = if error.raw_os_error() == Some(libc::EACCES) { " (needs CAP_PERFMON)" } else { "" };
        anyhow::Error::new(denied(error)).context(format!("load of {name}{needs}{said}"))
    })
}

fn denied(error: io::Error) -> io::Error {
    lacking(error, "CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON")
}

/// Says what is missing where the kernel only says no.
fn lacking(error: io::Error, what: &str) -> io::Error {
    // EACCES is the verifier's own.
    if error.raw_os_error() == Some(libc::EPERM) {
        io::Error::new(error.kind(), format!("needs {what}: run as root"))
    } else {
        error
    }
}
