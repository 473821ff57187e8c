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
use sidecar_ebpf::{DIRECTIONS, IN, OUT, programs};

use super::clsact::{self, Filter};
use super::config::scope_number;
use super::pins;
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

/// Our place among the filters of a clsact qdisc. High, so that other tools' defaults
/// (1, 49152) stay free.
const PRIORITY: u16 = 7;
const HANDLE: TcHandle = TcHandle::new(0, 0x5347);

/// Where the programs and links of one ABI are pinned.
#[derive(Clone, Debug)]
pub(super) struct Attachments {
    pub(super) root: PathBuf,
    pub(super) hook: Hook,
}

impl Attachments {
    /// Both counters onto this device, or exchanged for the right ones. `true`: something
    /// changed.
    pub(super) fn attach(&self, link: &Link, scope: Scope) -> anyhow::Result<bool> {
        if link.loopback {
            bail!("nothing is counted on loopback ({})", link.name);
        }
        let mut changed = false;
        for direction in [IN, OUT] {
            let layer = if link.ethernet { 0 } else { 1 };
            let program = programs::COUNTERS[direction][layer][scope_number(scope)];
            changed |= match self.hook {
                Hook::Tcx => self.attach_tcx(link, direction, program),
                Hook::Clsact => self.attach_clsact(link, direction, program),
            }
            .with_context(|| format!("attach {program} to {}", link.name))?;
        }
        Ok(changed)
    }

    /// Takes our programs off a device, also one that is gone.
    pub(super) fn detach(&self, index: u32) -> anyhow::Result<()> {
        match self.hook {
            Hook::Tcx => {
                [IN, OUT].iter().try_for_each(|direction| pins::remove(&self.link_pin(*direction, index)))
            }
            Hook::Clsact => clsact::names()?
                .into_iter()
                .filter(|(of, _)| *of == index)
                .try_for_each(|(index, name)| detach_clsact(index, &name)),
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
                .try_for_each(|(index, name)| detach_clsact(index, &name)),
        }
    }

    /// Names of the devices that have both programs.
    pub(super) fn attached(&self) -> anyhow::Result<Vec<String>> {
        let mut names = Vec::new();
        match self.hook {
            Hook::Tcx => {
                for index in self.pinned_indexes()? {
                    let both = [IN, OUT].iter().all(|direction| {
                        self.tcx(&self.link_pin(*direction, index))
                            .is_ok_and(|l| l.is_some_and(|l| l.index == index))
                    });
                    if both && let Some(name) = clsact::name_of(index) {
                        names.push(name);
                    }
                }
            }
            Hook::Clsact => {
                for (index, name) in clsact::names()? {
                    if (0..DIRECTIONS).all(|d| our_filters(index, d).is_ok_and(|filters| !filters.is_empty()))
                    {
                        names.push(name);
                    }
                }
            }
        }
        names.sort_unstable();
        Ok(names)
    }

    fn attach_tcx(&self, link: &Link, direction: usize, name: &str) -> anyhow::Result<bool> {
        let pin = self.link_pin(direction, link.index);
        let wanted = self.program_id(name)?;
        match self.tcx(&pin)? {
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
        // First on the way in and last on the way out: closest to the wire.
        let order = if direction == IN { LinkOrder::first() } else { LinkOrder::last() };
        let id = program.attach_with_options(
            &link.name,
            tc_direction(direction),
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

    fn attach_clsact(&self, link: &Link, direction: usize, name: &str) -> anyhow::Result<bool> {
        if clsact::name_of(link.index).as_deref() != Some(link.name.as_str()) {
            bail!("{} is no longer device {}", link.name, link.index);
        }
        match clsact::qdisc(link.index)?.as_deref() {
            Some("clsact") => {}
            // An ingress qdisc has one list of filters and would count both ways there.
            Some(other) => bail!("{} has a qdisc \"{other}\" where clsact would go", link.name),
            None => tc::qdisc_add_clsact(&link.name).context("add a clsact qdisc")?,
        }
        let ours = our_filters(link.index, direction)?;
        let there = ours.iter().find(|filter| filter.is_at(PRIORITY, HANDLE));
        if there.is_some_and(|filter| filter.program_id == Some(self.program_id(name).unwrap_or(0))) {
            return Ok(false);
        }
        let mut program = self.program(name)?;
        let attach_type = tc_direction(direction);
        let id = if there.is_some() {
            let link = SchedClassifierLink::attached(&link.name, attach_type, PRIORITY, HANDLE, None)?;
            program.attach_to_link(link)?
        } else {
            let options = NlOptions { priority: PRIORITY, handle: HANDLE, classid: None };
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
    fn link_pin(&self, direction: usize, index: u32) -> PathBuf {
        let direction = if direction == IN { "in" } else { "out" };
        self.root.join("links").join(format!("{direction}-{index}"))
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

fn index_of_pin(name: &str) -> Option<u32> {
    name.strip_prefix("in-").or_else(|| name.strip_prefix("out-"))?.parse().ok()
}

const fn tc_direction(direction: usize) -> TcAttachType {
    if direction == IN { TcAttachType::Ingress } else { TcAttachType::Egress }
}

fn our_filters(index: u32, direction: usize) -> anyhow::Result<Vec<Filter>> {
    let mut filters = clsact::filters(index, direction)?;
    filters.retain(|filter| programs::COUNTERS[direction].iter().flatten().any(|name| *name == filter.name));
    Ok(filters)
}

fn detach_clsact(index: u32, name: &str) -> anyhow::Result<()> {
    for direction in [IN, OUT] {
        for filter in our_filters(index, direction)? {
            SchedClassifierLink::attached(
                name,
                tc_direction(direction),
                filter.priority,
                filter.handle(),
                None,
            )?
            .detach()
            .with_context(|| format!("detach {} from {name}", filter.name))?;
        }
    }
    Ok(())
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
