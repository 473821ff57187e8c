//! Frames that must be refused, sent to see that they are, and by whom: sensors stand right
//! before and right behind the guard and our table. What gets behind the last chain ends
//! there, as in an audit, so that no socket and nobody outside ever knows.

use std::net::IpAddr;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use sidecar_ebpf::sweep::{Order, Trace, canary, ends, stages};

use super::frame::{self, Kind, NOBODY, Shape, length};
use super::lock::Lock;
use super::programs::{Place, Programs};
use super::route::{Device, Origin, Routes};
use super::tables::{Tables, Whose};
use super::{Means, Mode, btf, inject, is_unreachable, keeper, known, order, random};
use crate::desired::PRIORITY;
use crate::observed::{Counted, Crossing, Flight, Link};
use crate::source::bpf::{self, Bpf};
use crate::sys::probe::settle;
use crate::terms::{Family, Port, Proto};

/// What to try, and where.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Trial {
    pub targets: Vec<Target>,
    pub table: bool,
    pub guard: bool,
    pub counters: bool,
    /// Where guard and counters are pinned.
    pub pins: PathBuf,
    /// Where the lock lies that keeps audits apart, and where it is entered what has flown.
    pub run_dir: PathBuf,
}

/// A public interface, and ports there that the policy refuses and nobody uses.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Target {
    pub link: Link,
    /// One of each family that it has.
    pub addresses: Vec<IpAddr>,
    pub tcp: Port,
    pub udp: Port,
    /// Prefixes that rules name: the stranger comes from none of them.
    pub named: Vec<IpNet>,
}

/// More than one, so that a counter that counts only some is found out.
const COUNTED: u8 = 3;
/// A frame arrives within microseconds, unless the CPU is busy elsewhere.
const ARRIVAL: Duration = Duration::from_secs(1);

/// Tries it now, whoever else may do so, and by older means if so told. An address that no
/// stranger could be answered from is passed over.
pub fn fly(means: Means, trial: &Trial, flights: &mut Vec<Flight>) -> anyhow::Result<()> {
    let mut programs = Programs::load(1).context("load the canary's programs")?;
    let offsets = if means.programs { known(btf::read()) } else { None };
    let counters = if trial.counters { Bpf::open(&trial.pins)? } else { None };
    let mut routes = Routes::open()?;
    for target in &trial.targets {
        let Target { link, .. } = target;
        let device = routes.device(link.index)?;
        if !device.up {
            continue;
        }
        let guard = if trial.guard { bpf::guard::link(&trial.pins, link.index)? } else { None };
        let around = || format!("attach the canary's programs around {}", link.name);
        let _watch = programs.watch(link.index, link.ethernet, means.tcx).with_context(around)?;
        let _guard = match &guard {
            Some(guard) if means.tcx => {
                Some(programs.around_link(link.index, link.ethernet, guard.as_fd()).with_context(around)?)
            }
            _ => None,
        };
        for address in &target.addresses {
            let origin = match routes.origin(link, *address, &target.named, &mut random) {
                Err(error) if is_unreachable(&error) => continue,
                origin => origin?,
            };
            let family = Family::of(*address);
            let hooked = offsets.and_then(|_| known(programs.hook(family, Place::Verdict)));
            // Last attached and first gone: what they see is ended by the hooks above.
            let sensed = match &hooked {
                Some(_) => Some(programs.around_chains(family, PRIORITY)?),
                None => None,
            };
            let mut aim = Aim {
                trial,
                target,
                means,
                offsets: offsets.unwrap_or_default(),
                programs: &mut programs,
                device,
                origin,
                address: *address,
                guard: guard.as_ref(),
                counters: counters.as_ref(),
                sensed: sensed.is_some(),
            };
            aim.all(flights)?;
        }
    }
    Ok(())
}

/// One address.
struct Aim<'a> {
    trial: &'a Trial,
    target: &'a Target,
    means: Means,
    offsets: btf::Offsets,
    programs: &'a mut Programs,
    device: Device,
    origin: Origin,
    address: IpAddr,
    guard: Option<&'a OwnedFd>,
    counters: Option<&'a Bpf>,
    /// By programs, and not by a table.
    sensed: bool,
}

impl Aim<'_> {
    fn all(&mut self, flights: &mut Vec<Flight>) -> anyhow::Result<()> {
        if self.trial.guard || self.trial.counters {
            flights.push(if self.means.tcx { self.syn()? } else { self.test_runs()? });
        }
        if self.trial.table {
            // Where nothing can lead a SYN past the guard, a later segment gets past it.
            let (kind, bits) = if self.means.tcx { (Kind::Probe, canary::PAST_TC) } else { (Kind::Later, 0) };
            let (tcp, udp) = (self.target.tcp, self.target.udp);
            flights.push(Flight { past_guard: true, ..self.flight(Proto::Tcp, tcp, kind, bits, 1)? });
            // The guard leaves datagrams to the tables.
            flights.push(Flight { past_guard: true, ..self.flight(Proto::Udp, udp, Kind::Probe, 0, 1)? });
        }
        Ok(())
    }

    /// Past the counters to the guard.
    fn syn(&mut self) -> anyhow::Result<Flight> {
        let before = self.row()?;
        let flight = self.flight(Proto::Tcp, self.target.tcp, Kind::Probe, canary::COUNTED, COUNTED)?;
        let counted = self.row()?.zip(before).map(|(after, before)| {
            let length = self.length(Proto::Tcp) as u64;
            Counted {
                packets: after.packets.wrapping_sub(before.packets),
                bytes: after.bytes.wrapping_sub(before.bytes),
                attempts: after.attempts.wrapping_sub(before.attempts),
                bytes_wanted: length * u64::from(flight.arrived),
            }
        });
        let there = |bit| self.trace(self.target.tcp).stages & bit != 0;
        let guard = self
            .guard
            .map(|_| Crossing { reached: there(stages::TO_GUARD), passed: there(stages::PAST_GUARD) });
        Ok(Flight { guard, counted, ..flight })
    }

    /// Where no program can stand beside ours, they are run by themselves, as they are pinned
    /// and attached.
    fn test_runs(&mut self) -> anyhow::Result<Flight> {
        let order = self.order(Proto::Tcp, 0);
        let port = self.target.tcp;
        let shape = self.shape(order);
        let frame = frame::frame(&shape, port.get(), Kind::Probe);
        let packet = &frame.bytes[..length(&shape.order)];
        let link = &self.target.link;
        let run = bpf::TestFrame { index: link.index, ethernet: link.ethernet, packet };
        let before = self.row()?;
        if self.trial.counters {
            run.count(&self.trial.pins, COUNTED.into())?;
        }
        let counted = self.row()?.zip(before).map(|(after, before)| Counted {
            packets: after.packets.wrapping_sub(before.packets),
            bytes: after.bytes.wrapping_sub(before.bytes),
            attempts: after.attempts.wrapping_sub(before.attempts),
            bytes_wanted: packet.len() as u64 * u64::from(COUNTED),
        });
        let guard = match self.trial.guard && bpf::guard::is_on(&self.trial.pins, &link.name)? {
            true => Some(Crossing { reached: true, passed: !run.is_refused(&self.trial.pins)? }),
            false => None,
        };
        Ok(Flight { sent: COUNTED, arrived: COUNTED, guard, counted, ..self.blank(Proto::Tcp, port) })
    }

    fn flight(
        &mut self,
        proto: Proto,
        port: Port,
        kind: Kind,
        canary: u8,
        frames: u8,
    ) -> anyhow::Result<Flight> {
        let order = self.order(proto, canary);
        let shape = self.shape(order);
        self.programs.traces.set(u32::from(port.get()), Trace::default());
        self.programs.orders.set(0, shape.order);
        let tables = if self.sensed { None } else { Some(Tables::put(&shape.order, Whose::Trial)?) };
        inject(&mut self.programs.lanes[0], &shape, &vec![port; usize::from(frames)], kind)
            .with_context(|| format!("inject a canary into {}", self.target.link.name))?;
        let deadline = Instant::now() + ARRIVAL;
        while self.trace(port).arrivals < frames && Instant::now() < deadline {
            std::thread::sleep(Duration::from_micros(50));
        }
        // Seen on one CPU, and maybe still on its way there.
        settle();
        if let Some(tables) = &tables {
            tables.read(&shape.order, &mut self.programs.traces)?;
        }
        let trace = self.trace(port);
        let there = |bit| trace.stages & bit != 0;
        let through = matches!(trace.end, ends::LOCAL | ends::FORWARD | ends::ANSWERED | ends::TAKEN);
        let table = Crossing { reached: there(stages::TO_TABLE), passed: there(stages::PAST_TABLE) };
        Ok(Flight { sent: frames, arrived: trace.arrivals, table, through, ..self.blank(proto, port) })
    }

    fn blank(&self, proto: Proto, port: Port) -> Flight {
        Flight {
            interface: self.target.link.name.clone(),
            address: self.address,
            proto,
            port,
            past_guard: false,
            sent: 0,
            arrived: 0,
            guard: None,
            table: Crossing::default(),
            through: false,
            counted: None,
        }
    }

    fn order(&self, proto: Proto, canary: u8) -> Order {
        let index = self.target.link.index;
        Order { canary, ..order(index, Mode::Verdict, self.offsets, &self.origin, proto) }
    }

    fn shape(&self, order: Order) -> Shape {
        Shape { order, to: self.address, mac: self.device.mac, from: NOBODY }
    }

    fn trace(&self, port: Port) -> Trace {
        self.programs.traces.get(u32::from(port.get())).unwrap_or_default()
    }

    /// As a program on the device sees a frame.
    fn length(&self, proto: Proto) -> usize {
        const ETHERNET: usize = 14;
        let whole = length(&self.order(proto, 0));
        if self.target.link.ethernet { whole } else { whole - ETHERNET }
    }

    fn row(&self) -> anyhow::Result<Option<bpf::Tried>> {
        self.counters.map(Bpf::tried).transpose()
    }
}

/// Waits so long for another audit to end.
pub fn fly_when_free(trial: &Trial, patience: Duration) -> anyhow::Result<Vec<Flight>> {
    super::when_free(patience, || {
        let _lock = Lock::take(&trial.run_dir)?;
        keeper::finish_what_was_left(&trial.run_dir)?;
        let mut flights = Vec::new();
        fly(Means::of_this_kernel(), trial, &mut flights)?;
        Ok(flights)
    })
}

/// The interfaces that are tried; of a host with more of them, these stand for all.
pub const TARGETS_MAX: usize = 8;
