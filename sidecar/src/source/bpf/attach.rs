//! Programs onto devices: tcx links pinned in bpffs (Linux 6.6), or filters below a clsact
//! qdisc, which stay by themselves. Other people's programs, filters and qdiscs are never
//! touched.

use std::fs;
use std::io;
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use aya::programs::links::{FdLink, LinkOrder, PinnedLink};
use aya::programs::tc::{self, NlOptions, SchedClassifierLink, TcAttachOptions, TcHandle};
use aya::programs::{Link as _, ProgramInfo, SchedClassifier, TcAttachType};
use aya::util::KernelVersion;
use sidecar_ebpf::{DIRECTIONS, IN, OUT, gate, programs};

use super::clsact::{self, Filter};
use super::config::scope_number;
use super::{guard, pins};
use crate::observed::Link;
use crate::sys;
use crate::terms::Scope;

/// How programs are put on devices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hook {
    Tcx,
    Clsact,
}

impl Hook {
    /// What this kernel offers.
    pub fn of_this_kernel() -> Self {
        const TCX_SINCE: u32 = 6 << 16 | 6 << 8;
        if KernelVersion::current().is_ok_and(|here| here.code() >= TCX_SINCE) {
            Hook::Tcx
        } else {
            Hook::Clsact
        }
    }
}

/// Where one of our programs goes on a device, and how it is known again.
#[derive(Debug)]
pub(super) struct Place {
    direction: usize,
    /// What the name of its link's pin begins with; the number of the device follows.
    pin: &'static str,
    order: Order,
    /// Our place among the filters of a clsact qdisc. High, so that other tools' defaults
    /// (1, 49152) stay free.
    priority: u16,
    handle: TcHandle,
    is_ours: fn(&str) -> bool,
}

#[derive(Clone, Copy, Debug)]
enum Order {
    First,
    Last,
    /// Right behind the counter on the way in, which is to see what is refused; first
    /// where nothing is counted.
    BehindCounter,
}

/// Closest to the wire: first on the way in and last on the way out.
pub(super) static COUNTING: [Place; DIRECTIONS] = [
    Place {
        direction: IN,
        pin: "in-",
        order: Order::First,
        priority: 7,
        handle: TcHandle::new(0, 0x5347),
        is_ours: |name| programs::COUNTERS[IN].iter().flatten().any(|own| *own == name),
    },
    Place {
        direction: OUT,
        pin: "out-",
        order: Order::Last,
        priority: 7,
        handle: TcHandle::new(0, 0x5347),
        is_ours: |name| programs::COUNTERS[OUT].iter().flatten().any(|own| *own == name),
    },
];

pub(super) static GUARDING: [Place; 1] = [Place {
    direction: IN,
    pin: "in-",
    order: Order::BehindCounter,
    priority: guard::PRIORITY,
    handle: TcHandle::new(0, 0x5348),
    is_ours: |name| gate::PROGRAMS.contains(&name),
}];

/// Where the programs and links of one ABI are pinned, and where they go.
#[derive(Clone, Debug)]
pub(super) struct Attachments {
    pub(super) root: PathBuf,
    pub(super) hook: Hook,
    pub(super) places: &'static [Place],
    /// Pins of the counters' links, for who keeps behind them.
    pub(super) counted: PathBuf,
    /// Roots of other ABIs, whose links become ours.
    pub(super) former: Vec<PathBuf>,
}

impl Attachments {
    /// Both counters onto this device, or exchanged for the right ones. `true`: something
    /// changed.
    pub(super) fn count(&self, link: &Link, scope: Scope) -> anyhow::Result<bool> {
        let layer = if link.ethernet { 0 } else { 1 };
        self.attach(link, |place| programs::COUNTERS[place.direction][layer][scope_number(scope)])
    }

    /// The guard onto this device, or exchanged for the right one.
    pub(super) fn guard(&self, link: &Link) -> anyhow::Result<bool> {
        self.attach(link, |_| gate::PROGRAMS[if link.ethernet { 0 } else { 1 }])
    }

    fn attach(&self, link: &Link, program: impl Fn(&Place) -> &'static str) -> anyhow::Result<bool> {
        if link.loopback {
            bail!("nothing of ours goes on loopback ({})", link.name);
        }
        let mut changed = false;
        for place in self.places {
            let program = program(place);
            changed |= match self.hook {
                Hook::Tcx => self.attach_tcx(link, place, program),
                Hook::Clsact => self.attach_clsact(link, place, program),
            }
            .with_context(|| format!("attach {program} to {}", link.name))?;
        }
        Ok(changed)
    }

    /// Takes our programs off a device, also one that is gone.
    pub(super) fn detach(&self, index: u32) -> anyhow::Result<()> {
        match self.hook {
            Hook::Tcx => {
                self.places.iter().try_for_each(|place| self.detach_tcx(&self.link_pin(place, index)))
            }
            Hook::Clsact => clsact::names()?
                .into_iter()
                .filter(|(of, _)| *of == index)
                .try_for_each(|(index, name)| self.detach_clsact(index, &name)),
        }
    }

    /// Takes our programs off every device but these.
    pub(super) fn retain(&self, keep: &[u32]) -> anyhow::Result<()> {
        let stray = |index: &u32| !keep.contains(index);
        match self.hook {
            Hook::Tcx => {
                self.pinned_indexes()?.into_iter().filter(stray).try_for_each(|index| self.detach(index))
            }
            Hook::Clsact => clsact::names()?
                .into_iter()
                .filter(|(index, _)| stray(index))
                .try_for_each(|(index, name)| self.detach_clsact(index, &name)),
        }
    }

    /// Names of the devices that have all of our programs.
    pub(super) fn attached(&self) -> anyhow::Result<Vec<String>> {
        let mut names = Vec::new();
        match self.hook {
            Hook::Tcx => {
                for index in self.pinned_indexes()? {
                    let all = self.places.iter().all(|place| {
                        self.tcx(&self.link_pin(place, index))
                            .is_ok_and(|l| l.is_some_and(|l| l.index == index))
                    });
                    if all && let Some(name) = clsact::name_of(index) {
                        names.push(name);
                    }
                }
            }
            Hook::Clsact => {
                for (index, name) in clsact::names()? {
                    let there = |place| our_filters(index, place).is_ok_and(|filters| !filters.is_empty());
                    if self.places.iter().all(there) {
                        names.push(name);
                    }
                }
            }
        }
        names.sort_unstable();
        Ok(names)
    }

    fn attach_tcx(&self, link: &Link, place: &Place, name: &str) -> anyhow::Result<bool> {
        let pin = self.link_pin(place, link.index);
        let wanted = self.program_id(name)?;
        self.adopt(&pin)?;
        let there = match self.tcx(&pin) {
            Err(error) if is_stranger(&error) => {
                log::warn!("{error:#}: it goes");
                pins::discard(&pin)?;
                None
            }
            there => there?,
        };
        match there {
            Some(there) if there.index == link.index && there.program_id == wanted => return Ok(false),
            Some(there) if there.index == link.index => {
                // One BPF_LINK_UPDATE: every packet meets the old or the new program.
                let there = FdLink::from(PinnedLink::from_pin(&pin)?);
                let mut program = self.program(name)?;
                program.attach_to_link(there.try_into()?).context("exchange of the program in its link")?;
                return Ok(true);
            }
            // The device is gone, and its number went to another one.
            Some(_) => pins::remove(&pin)?,
            None => {}
        }
        let mut program = self.program(name)?;
        // Open until the program is attached: the order is told by its descriptor.
        let counter = self.counter(link);
        let order = match (place.order, &counter) {
            (Order::Last, _) => LinkOrder::last(),
            (Order::BehindCounter, Some(counter)) => LinkOrder::after_link(counter)?,
            (Order::First | Order::BehindCounter, _) => LinkOrder::first(),
        };
        let id = program.attach_with_options(
            &link.name,
            tc_direction(place.direction),
            TcAttachOptions::TcxOrder(order),
        )?;
        let attached: FdLink = program.take_link(id)?.try_into()?;
        // Dropped (and so detached) again unless it is the device that was meant: names
        // move between devices.
        let pinned = attached.pin(&pin).context("pin of the link")?;
        let there = self.tcx(&pin)?;
        if there.is_none_or(|there| there.index != link.index) {
            drop(pinned.unpin());
            bail!("{} is no longer device {}", link.name, link.index);
        }
        Ok(true)
    }

    /// Now: of a link that is only let go of the kernel takes the program off when it comes to that, and on a busy
    /// machine that is a second later.
    fn detach_tcx(&self, pin: &Path) -> anyhow::Result<()> {
        if let Ok(link) = sys::bpf::open_pin(pin)
            && let Ok(there) = sys::bpf::tcx_link(link.as_fd())
            && self.is_program(there.program_id)
            && let Err(error) = sys::bpf::detach_link(link.as_fd())
        {
            log::debug!("detach of {}: {error}", pin.display());
        }
        pins::discard(pin)
    }

    /// Whether it is one of those that are pinned here.
    fn is_program(&self, id: u32) -> bool {
        let pins = fs::read_dir(self.root.join("programs")).into_iter().flatten().flatten();
        pins.filter_map(|pin| ProgramInfo::from_pin(pin.path()).ok()).any(|program| program.id() == id)
    }

    /// Takes over another ABI's link, where we have none: it goes on running that one's
    /// program until it is exchanged.
    fn adopt(&self, pin: &Path) -> anyhow::Result<()> {
        let Some(name) = pin.file_name() else { return Ok(()) };
        for former in &self.former {
            let theirs = former.join("links").join(name);
            if theirs.exists() && !pin.exists() {
                fs::rename(&theirs, pin).with_context(|| format!("take-over of {}", theirs.display()))?;
            }
        }
        Ok(())
    }

    /// The link of the counter on the way in, where there is one.
    fn counter(&self, link: &Link) -> Option<SchedClassifierLink> {
        let pin = self.counted.join(format!("in-{}", link.index));
        let there = self.tcx(&pin).ok().flatten()?;
        let counter = (there.index == link.index).then(|| PinnedLink::from_pin(&pin).ok())??;
        FdLink::from(counter).try_into().ok()
    }

    fn attach_clsact(&self, link: &Link, place: &Place, name: &str) -> anyhow::Result<bool> {
        if clsact::name_of(link.index).as_deref() != Some(link.name.as_str()) {
            bail!("{} is no longer device {}", link.name, link.index);
        }
        match clsact::qdisc(link.index)?.as_deref() {
            Some("clsact") => {}
            // An ingress qdisc has one list of filters and would count both ways there.
            Some(other) => bail!("{} has a qdisc \"{other}\" where clsact would go", link.name),
            None => tc::qdisc_add_clsact(&link.name).context("add a clsact qdisc")?,
        }
        let Place { priority, handle, .. } = *place;
        let ours = our_filters(link.index, place)?;
        let there = ours.iter().find(|filter| filter.is_at(priority, handle));
        if there.is_some_and(|filter| filter.program_id == Some(self.program_id(name).unwrap_or(0))) {
            return Ok(false);
        }
        let mut program = self.program(name)?;
        let attach_type = tc_direction(place.direction);
        let id = if there.is_some() {
            let link = SchedClassifierLink::attached(&link.name, attach_type, priority, handle, None)?;
            program.attach_to_link(link)?
        } else {
            let options = NlOptions { priority, handle, classid: None };
            program.attach_with_options(&link.name, attach_type, TcAttachOptions::Netlink(options))?
        };
        // The filter is to outlive us; dropping the link would take it away.
        std::mem::forget(program.take_link(id)?);
        Ok(true)
    }

    fn program(&self, name: &str) -> anyhow::Result<SchedClassifier> {
        SchedClassifier::from_pin(self.root.join("programs").join(name))
            .with_context(|| format!("open of the pinned program {name}"))
    }

    pub(super) fn program_id(&self, name: &str) -> anyhow::Result<u32> {
        let info = ProgramInfo::from_pin(self.root.join("programs").join(name))
            .with_context(|| format!("open of the pinned program {name}"))?;
        Ok(info.id())
    }

    fn tcx(&self, pin: &Path) -> anyhow::Result<Option<sys::bpf::TcxLink>> {
        let link = match sys::bpf::open_pin(pin) {
            Ok(link) => link,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error).with_context(|| format!("open of {}", pin.display())),
        };
        sys::bpf::tcx_link(link.as_fd()).map(Some).with_context(|| format!("look at {}", pin.display()))
    }

    /// By number: bpffs refuses names with dots, and device names have them.
    fn link_pin(&self, place: &Place, index: u32) -> PathBuf {
        self.root.join("links").join(format!("{}{index}", place.pin))
    }

    fn detach_clsact(&self, index: u32, name: &str) -> anyhow::Result<()> {
        for place in self.places {
            for filter in our_filters(index, place)? {
                let direction = tc_direction(place.direction);
                SchedClassifierLink::attached(name, direction, filter.priority, filter.handle(), None)?
                    .detach()
                    .with_context(|| format!("detach {} from {name}", filter.name))?;
            }
        }
        Ok(())
    }

    fn pinned_indexes(&self) -> anyhow::Result<Vec<u32>> {
        let dir = self.root.join("links");
        let entries = match fs::read_dir(&dir) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(error).with_context(|| format!("list of {}", dir.display())),
        };
        let mut indexes: Vec<u32> =
            entries.filter_map(|entry| index_of_pin(entry.ok()?.file_name().to_str()?)).collect();
        indexes.sort_unstable();
        indexes.dedup();
        Ok(indexes)
    }
}

/// Whether what lies there is no link; not that we are forbidden to look.
fn is_stranger(error: &anyhow::Error) -> bool {
    let io = error.chain().find_map(|cause| cause.downcast_ref::<io::Error>());
    io.is_some_and(|error| matches!(error.raw_os_error(), None | Some(libc::EACCES | libc::EINVAL)))
}

fn index_of_pin(name: &str) -> Option<u32> {
    name.strip_prefix("in-").or_else(|| name.strip_prefix("out-"))?.parse().ok()
}

const fn tc_direction(direction: usize) -> TcAttachType {
    if direction == IN { TcAttachType::Ingress } else { TcAttachType::Egress }
}

fn our_filters(index: u32, place: &Place) -> anyhow::Result<Vec<Filter>> {
    let mut filters = clsact::filters(index, place.direction)?;
    filters.retain(|filter| (place.is_ours)(&filter.name));
    Ok(filters)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_our_own_pin_names_have_an_index() {
        assert_eq!(index_of_pin("in-7"), Some(7));
        assert_eq!(index_of_pin("out-4294967295"), Some(u32::MAX));
        for other in ["in-", "in-x", "out-4294967296", "7", "on-7", ""] {
            assert_eq!(index_of_pin(other), None, "{other}");
        }
    }
}
