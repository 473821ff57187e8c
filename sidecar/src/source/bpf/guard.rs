//! The guard: loading, attaching and telling it what may come in. Pinned below
//! `PIN_DIR/guardN/{maps,programs,links}`; it stays in force when this process ends,
//! however it ends, and a new one adopts it.
//!
//! Changes are made in two steps. [`Guard::relax`] puts new rules in force beside those
//! that are: a connection passes that either lets in. [`Guard::settle`] leaves only the new
//! ones. Between the two lies whatever else has to succeed: nftables, a confirmation.
//! Where nothing was in force before, it stays so until the second step.

use std::collections::BTreeMap;
use std::fs;
use std::net::IpAddr;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail, ensure};
use aya::EbpfLoader;
use aya::maps::lpm_trie::Key;
use aya::maps::{Array, HashMap, LpmTrie, Map, MapData, PerCpuArray};
use aya::programs::{SchedClassifier, TestRun as _, TestRunOptions};
use ipnet::IpNet;
use sidecar_ebpf::gate::{
    ABI, BANKS, PREFIX_HEAD_BITS, PREFIXES_MAX, PROGRAMS, PrefixKey, REFUSED, Rules, SIDES_MAX, Sides,
    TIMED_HEAD_BITS, TIMED_MAX, TimedKey, WORDS, kinds, maps, open, reasons, refused_index, sides, state,
    word_index,
};

use super::attach::{self, Attachments, Hook};
use super::config::family_number;
use super::{NEEDS, former, is_denied, pin_over, pins, refused as not_loaded};
use crate::desired::guard::{Boot, Side, Timed};
use crate::desired::{DropReason, GuardRules};
use crate::observed::{self, GuardState, Link};
use crate::sys;
use crate::terms::{Family, Port};

static OBJECT: &[u8] = aya::include_bytes_aligned!(env!("SPOKEGUARD_GUARD_OBJECT"));

/// Everything that is pinned for this ABI, opened.
pub struct Guard {
    attachments: Attachments,
    state: Array<MapData, u64>,
    rules: Array<MapData, Rules>,
    ports: Array<MapData, u64>,
    prefixes: LpmTrie<MapData, PrefixKey, u8>,
    /// The same, for what aya has no call for.
    prefixes_map: MapData,
    ports_map: MapData,
    timed: LpmTrie<MapData, TimedKey, u64>,
    sides: HashMap<MapData, u32, Sides>,
    refused: PerCpuArray<MapData, u64>,
    /// What was last found of the bank that was written last.
    known: Option<Known>,
}

/// That a bank holds certain rules, from a moment ago.
#[derive(Clone, Copy, Debug)]
pub struct Known {
    /// As `state::NEWEST` names it. Others are written before this one is written again.
    bank: u64,
    /// Other banks have prefixes as well.
    others: bool,
}

/// What is in force.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Force {
    /// Everything passes.
    Nothing,
    /// Only the rules that were written last.
    Newest,
    /// Those, and the ones before them.
    Both,
}

/// What the guard refused, or in audit mode would have, since it was first pinned.
pub type Refused = BTreeMap<(DropReason, Family), u64>;

/// For `check` and the daemon's cycle: opens, compares, closes.
pub fn read(pin_dir: &Path, rules: Option<&GuardRules>) -> observed::Guard {
    let look = || {
        let Some(guard) = Guard::open(pin_dir)? else { return Ok(observed::Guard::Absent) };
        let state = match (guard.force()?, rules) {
            (Force::Nothing, None) => GuardState::Idle,
            (_, None) => GuardState::Other,
            (force, Some(rules)) if !guard.is_as(rules)? => {
                if force == Force::Nothing {
                    GuardState::Idle
                } else {
                    GuardState::Other
                }
            }
            (Force::Newest, _) => GuardState::Declared,
            // A first change that waits is ready, and lets everything pass till then.
            (Force::Both | Force::Nothing, _) => GuardState::Unconfirmed,
        };
        anyhow::Ok(observed::Guard::There { rules: state, attached: guard.attached()? })
    };
    match look() {
        // Without a bpffs there is nowhere to look; the default directory lies below it.
        Ok(observed::Guard::Absent) if pins::find_bpffs().is_none() => {
            observed::Guard::Unavailable(format!("no bpffs is mounted at {}", pins::BPFFS))
        }
        Ok(guard) => guard,
        Err(error) => observed::Guard::Unavailable(super::reason(&error)),
    }
}

impl Guard {
    /// Opens the pins of this ABI. `None`: nothing (or not everything) is pinned.
    pub fn open(pin_dir: &Path) -> anyhow::Result<Option<Self>> {
        let root = root(pin_dir);
        // The last thing that loading does is to write which build this is.
        let build = match sys::bpf::open_pin(&root.join("maps").join(maps::BUILD)) {
            Ok(build) => build,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => {
                return Err(error).with_context(|| format!("open of the pins in {}", root.display()));
            }
        };
        let build = MapData::from_fd(build)?;
        if Array::<_, u64>::try_from(Map::Array(build))?.get(&0, 0)? == 0 {
            return Ok(None);
        }
        let map = |name: &str| super::map(&root, name);
        Ok(Some(Self {
            state: Array::try_from(Map::Array(map(maps::STATE)?))?,
            rules: Array::try_from(Map::Array(map(maps::RULES)?))?,
            ports: Array::try_from(Map::Array(map(maps::PORTS)?))?,
            ports_map: map(maps::PORTS)?,
            prefixes: LpmTrie::try_from(Map::LpmTrie(map(maps::PREFIXES)?))?,
            prefixes_map: map(maps::PREFIXES)?,
            timed: LpmTrie::try_from(Map::LpmTrie(map(maps::TIMED)?))?,
            sides: HashMap::try_from(Map::HashMap(map(maps::SIDES)?))?,
            refused: PerCpuArray::try_from(Map::PerCpuArray(map(maps::REFUSED)?))?,
            attachments: attachments(pin_dir),
            known: None,
        }))
    }

    /// For tests of the older hook on a kernel that has the newer one.
    pub fn with_hook(mut self, hook: Hook) -> Self {
        self.attachments.hook = hook;
        self
    }

    /// These rules alone, on the public ones of these interfaces. What was known of these rules by an earlier
    /// [`Guard::relax`] need not be read again.
    pub fn install(
        &mut self,
        rules: &GuardRules,
        links: &[Link],
        known: Option<Known>,
    ) -> anyhow::Result<()> {
        self.relax_knowing(rules, links, known)?;
        self.settle()?;
        self.sync(rules, links)
    }

    /// These rules beside those that are in force: never refuses what either lets in. Also
    /// takes the place of an earlier change that was not settled.
    pub fn relax(&mut self, rules: &GuardRules, links: &[Link]) -> anyhow::Result<Option<Known>> {
        self.relax_knowing(rules, links, None)
    }

    fn relax_knowing(
        &mut self,
        rules: &GuardRules,
        links: &[Link],
        known: Option<Known>,
    ) -> anyhow::Result<Option<Known>> {
        let (in_force, newest) = (self.word(state::IN_FORCE)?, self.word(state::NEWEST)?);
        // What was known of other rules tells nothing of these.
        self.known = match known {
            Some(known) if known.bank == newest => Some(known),
            _ if newest == 0 => None,
            _ => self.held(newest, rules)?,
        };
        if self.known.is_none() {
            // What an unsettled change came on top of; an unsettled first one on nothing.
            let before = if in_force == newest { in_force } else { in_force & !newest };
            let Some(bank) = (0..BANKS).find(|bank| (in_force | newest) >> bank & 1 == 0) else {
                bail!("the guard's state is damaged: {in_force:#b} in force, {newest:#b} newest");
            };
            self.write(bank, rules, links)?;
            let bit = 1 << bank;
            self.set_word(state::NEWEST, bit)?;
            self.set_word(state::IN_FORCE, if before == 0 { 0 } else { before | bit })?;
        } else if in_force != 0 && in_force & newest == 0 {
            // Whoever wrote them was killed before they were in force.
            self.set_word(state::IN_FORCE, in_force | newest)?;
        }
        self.attach(rules, links)?;
        Ok(self.known)
    }

    /// Only the rules that were written last, from now on. Nothing, where none were.
    pub fn settle(&mut self) -> anyhow::Result<()> {
        let newest = self.word(state::NEWEST)?;
        if self.word(state::IN_FORCE)? != newest {
            self.set_word(state::IN_FORCE, newest)?;
        } else if self.known.is_some_and(|known| known.bank == newest && !known.others) {
            return Ok(());
        }
        self.forget(newest)
    }

    /// What interfaces are now, and the guard on the public ones and no others.
    pub fn sync(&mut self, rules: &GuardRules, links: &[Link]) -> anyhow::Result<()> {
        let newest = self.word(state::NEWEST)?;
        if newest != 0 {
            self.write_sides(newest.trailing_zeros() as usize, rules, links)?;
        }
        // A change that is not settled may be taken back, and with it what is public.
        if self.force()? != Force::Both {
            let keep: Vec<u32> = public(rules, links).map(|link| link.index).collect();
            self.attachments.retain(&keep)?;
        }
        self.attach(rules, links)?;
        // That of another version goes when this one has taken over its links: it would judge by
        // the rules of its day for ever.
        if self.force()? == Force::Newest {
            self.attachments.former.clear();
            pins::remove_others(&self.attachments.root)?;
        }
        Ok(())
    }

    pub fn force(&self) -> anyhow::Result<Force> {
        let (in_force, newest) = (self.word(state::IN_FORCE)?, self.word(state::NEWEST)?);
        Ok(match in_force {
            0 => Force::Nothing,
            _ if in_force == newest => Force::Newest,
            _ => Force::Both,
        })
    }

    /// Whether the rules that were written last are these.
    pub fn is_as(&self, rules: &GuardRules) -> anyhow::Result<bool> {
        let newest = self.word(state::NEWEST)?;
        Ok(newest != 0 && self.held(newest, rules)?.is_some())
    }

    /// Whether its pins are what was pinned, by whichever build.
    pub fn is_pinned(&self) -> bool {
        are_pinned(&self.attachments.root.join("maps"), &self.attachments.root.join("programs"))
    }

    /// Names of the interfaces that it is on.
    pub fn attached(&self) -> anyhow::Result<Vec<String>> {
        self.attachments.attached()
    }

    /// What it refused, and what it only counted as refused.
    pub fn refused(&self) -> anyhow::Result<[Refused; 2]> {
        let mut both = [Refused::new(), Refused::new()];
        for (audit, counts) in [false, true].into_iter().zip(&mut both) {
            for reason in 1..reasons::COUNT {
                for family in Family::ALL {
                    let at = refused_index(reason, family_number(family), audit);
                    let per_cpu = self.refused.get(&at, 0).context("read of the guard's counts")?;
                    let sum = per_cpu.iter().fold(0u64, |sum, n| sum.wrapping_add(*n));
                    if let (Some(reason), true) = (reason_of(reason), sum != 0) {
                        *counts.entry((reason, family)).or_insert(0) += sum;
                    }
                }
            }
        }
        Ok(both)
    }

    /// Exactly these openings of this port that end by themselves, whatever the policy and
    /// with nobody alive. Adds before it takes away.
    pub fn set_timed(&mut self, port: Port, openings: &[Timed]) -> anyhow::Result<()> {
        let wanted = timed_entries(openings.iter().filter(|timed| timed.port == port));
        let there = self.timed_of(Some(port))?;
        let others = self.timed_of(None)?.len() - there.len();
        if others + wanted.len() > TIMED_MAX as usize {
            bail!("more than {TIMED_MAX} prefixes with an end");
        }
        for ((bits, key), until) in &wanted {
            if there.get(&(*bits, *key)) != Some(until) {
                self.timed
                    .insert(&Key::new(*bits, *key), until, 0)
                    .context("insertion of a timed opening")?;
            }
        }
        self.set_word(state::TIMED, (others + wanted.len()).max(there.len()) as u64)?;
        for (bits, key) in there.keys().filter(|key| !wanted.contains_key(key)) {
            self.timed.remove(&Key::new(*bits, *key)).context("removal of a timed opening")?;
        }
        self.set_word(state::TIMED, (others + wanted.len()) as u64)
    }

    /// The openings with an end that are there, ended ones included.
    pub fn timed(&self) -> anyhow::Result<Vec<Timed>> {
        let entries = self.timed_of(None)?;
        Ok(entries
            .into_iter()
            .filter_map(|((bits, key), until)| {
                let from = net_of(key.family.into(), &key.address, bits.checked_sub(TIMED_HEAD_BITS)?)?;
                Some(Timed { port: Port::new(key.port)?, from: vec![from], until: Boot(until) })
            })
            .collect())
    }

    fn timed_of(&self, port: Option<Port>) -> anyhow::Result<BTreeMap<(u32, TimedKey), u64>> {
        let mut entries = BTreeMap::new();
        for entry in self.timed.iter().take(TIMED_MAX as usize) {
            let (key, until) = entry.context("list of timed openings")?;
            if port.is_none_or(|port| port.get() == key.data().port) {
                entries.insert((key.prefix_len(), key.data()), until);
            }
        }
        Ok(entries)
    }

    fn attach(&self, rules: &GuardRules, links: &[Link]) -> anyhow::Result<()> {
        // A guard of another ABI refuses by its own rules until ours do.
        if !self.attachments.former.is_empty() && self.force()? == Force::Nothing {
            return Ok(());
        }
        // A device that fails doesn't keep the others from being guarded.
        let failed: Vec<String> = public(rules, links)
            .filter_map(|link| Some(format!("{:#}", self.attachments.guard(link).err()?)))
            .collect();
        if failed.is_empty() { Ok(()) } else { bail!("{}", failed.join("; ")) }
    }

    /// A bank that is not in force.
    fn write(&mut self, bank: usize, rules: &GuardRules, links: &[Link]) -> anyhow::Result<()> {
        let wanted = Bank::new(bank, rules)?;
        // It may have been in force a moment ago.
        sys::bpf::wait_for_running_programs();
        self.clear_prefixes(|bits, key| {
            let found = wanted.prefixes.binary_search_by_key(&(bits, *key), |(key, _)| *key);
            usize::from(key.bank) == bank && found.is_err()
        })?;
        for ((bits, key), value) in &wanted.prefixes {
            self.prefixes.insert(&Key::new(*bits, *key), value, 0).context("insertion of a prefix")?;
        }
        for (at, (word, there)) in wanted.words.iter().zip(self.words(bank)?).enumerate() {
            if *word != there {
                let at = word_index(bank, 0) + at as u32;
                self.ports.set(at, word, 0).context("write of the guard's ports")?;
            }
        }
        self.rules.set(bank as u32, wanted.rules, 0).context("write of the guard's rules")?;
        self.write_sides(bank, rules, links)
    }

    fn write_sides(&mut self, bank: usize, rules: &GuardRules, links: &[Link]) -> anyhow::Result<()> {
        let there: BTreeMap<u32, Sides> =
            self.sides.iter().collect::<Result<_, _>>().context("list of the guard's interfaces")?;
        let by_index: BTreeMap<u32, u8> =
            links.iter().map(|link| (link.index, side_number(rules.side(&link.name)))).collect();
        for index in there.keys().filter(|index| !by_index.contains_key(index)) {
            self.sides.remove(index).context("removal of an interface")?;
        }
        for (index, side) in by_index {
            let before = there.get(&index).copied();
            let mut after = before.unwrap_or_default();
            after.by_bank[bank] = side;
            if before != Some(after) && (before.is_some() || after != Sides::default()) {
                if before.is_none() && there.len() >= SIDES_MAX as usize {
                    bail!("more than {SIDES_MAX} interfaces that are not public");
                }
                self.sides.insert(index, after, 0).context("write of an interface")?;
            }
        }
        Ok(())
    }

    /// Prefixes of banks that are not in force are memory for nothing.
    fn forget(&mut self, newest: u64) -> anyhow::Result<()> {
        self.clear_prefixes(|_, key| newest >> key.bank & 1 == 0)
    }

    fn clear_prefixes(&mut self, is_away: impl Fn(u32, &PrefixKey) -> bool) -> anyhow::Result<()> {
        for (key, _) in self.entries()? {
            if is_away(key.prefix_len(), &key.data()) {
                self.prefixes.remove(&key).context("removal of a prefix")?;
            }
        }
        Ok(())
    }

    fn entries(&self) -> anyhow::Result<Vec<(Key<PrefixKey>, u8)>> {
        let most = PREFIXES_MAX as usize;
        let listed = sys::bpf::entries(&self.prefixes_map, most).context("list of prefixes")?;
        match listed {
            Some(entries) => Ok(entries),
            // Two calls for each.
            None => self.prefixes.iter().take(most).collect::<Result<_, _>>().context("list of prefixes"),
        }
    }

    /// `None`: it holds others.
    fn held(&self, bit: u64, rules: &GuardRules) -> anyhow::Result<Option<Known>> {
        let bank = bit.trailing_zeros() as usize;
        let wanted = Bank::new(bank, rules)?;
        if bank >= BANKS
            || self.rules.get(&(bank as u32), 0).context("read of the guard's rules")? != wanted.rules
        {
            return Ok(None);
        }
        if self.words(bank)? != wanted.words {
            return Ok(None);
        }
        let entries = self.entries()?;
        let all = entries.len();
        let mut there: Vec<((u32, PrefixKey), u8)> = (entries.into_iter())
            .map(|(key, value)| ((key.prefix_len(), key.data()), value))
            .filter(|((_, key), _)| usize::from(key.bank) == bank)
            .collect();
        let others = there.len() < all;
        there.sort_unstable();
        there.dedup();
        Ok(there.into_iter().eq(wanted.prefixes).then_some(Known { bank: bit, others }))
    }

    /// The ports of a bank. One by one they would be a thousand calls, at every tick.
    fn words(&self, bank: usize) -> anyhow::Result<Vec<u64>> {
        const READ: &str = "read of the guard's ports";
        let first = word_index(bank, 0);
        let of_bank = first..first + WORDS as u32;
        match sys::bpf::entries(&self.ports_map, BANKS * WORDS).context(READ)? {
            Some(entries) => {
                let mut words: Vec<(u32, u64)> =
                    entries.into_iter().filter(|(at, _)| of_bank.contains(at)).collect();
                words.sort_unstable();
                ensure!(words.len() == WORDS, "{READ}: {} of {WORDS}", words.len());
                Ok(words.into_iter().map(|(_, word)| word).collect())
            }
            None => of_bank.map(|at| self.ports.get(&at, 0)).collect::<Result<_, _>>().context(READ),
        }
    }

    fn word(&self, at: u32) -> anyhow::Result<u64> {
        self.state.get(&at, 0).context("read of the guard's state")
    }

    fn set_word(&mut self, at: u32, word: u64) -> anyhow::Result<()> {
        self.state.set(at, word, 0).context("write of the guard's state")
    }
}

/// Loads the programs and pins them. What is pinned already stays: maps are adopted,
/// programs of the same build are kept, and those of another build make way (their links
/// are exchanged by the next [`Guard::sync`]).
pub fn load(pin_dir: &Path) -> anyhow::Result<()> {
    let root = root(pin_dir);
    let dirs = ["maps", "programs", "links"].map(|name| root.join(name));
    for dir in &dirs {
        pins::make_dir(dir)?;
    }
    let [maps_dir, programs_dir, _] = &dirs;
    pins::discard_strangers(pins::Kind::Map, maps_dir, &maps::ALL)?;
    pins::discard_strangers(pins::Kind::Program, programs_dir, &PROGRAMS)?;
    if is_current(maps_dir, programs_dir) {
        return Ok(());
    }
    share_counts(&former::roots(pin_dir, STEM, ABI), maps_dir)?;
    let mut object = EbpfLoader::new().default_map_pin_directory(maps_dir).load(OBJECT).map_err(|error| {
        let error = anyhow::Error::from(error);
        let needs = if is_denied(&error) { NEEDS } else { "" };
        error.context(format!("load of the guard{needs}"))
    })?;
    for name in PROGRAMS {
        let program =
            object.program_mut(name).with_context(|| format!("the object has no program {name}"))?;
        let program: &mut SchedClassifier = program.try_into()?;
        program.load().map_err(|error| not_loaded(name, &error))?;
        pin_over(&programs_dir.join(name), |pin| Ok(program.pin(pin)?))?;
    }
    let map = object.map_mut(maps::BUILD).context("the object has no map for its build")?;
    Array::try_from(map)?.set(0, build_number(), 0).context("write of the build number")
}

/// Both guards count what they refuse in one map for as long as there are two, so that none
/// of it is lost or told twice. Where it has another layout by now, counting begins anew.
fn share_counts(former: &[PathBuf], maps_dir: &Path) -> anyhow::Result<()> {
    let ours = maps_dir.join(maps::REFUSED);
    for theirs in former.iter().map(|root| root.join("maps").join(maps::REFUSED)) {
        let Ok(map) = MapData::from_pin(&theirs) else { continue };
        let info = map.info()?;
        if (info.value_size() as usize, info.max_entries()) == (size_of::<u64>(), REFUSED) && !ours.exists() {
            map.pin(&ours).with_context(|| format!("take-over of {}", theirs.display()))?;
        }
    }
    Ok(())
}

/// Loads it in a process of its own, whose memory ends with it. Cheap where it is loaded.
pub fn spawn_loader(pin_dir: &Path) -> anyhow::Result<()> {
    let root = root(pin_dir);
    if is_current(&root.join("maps"), &root.join("programs")) {
        return Ok(());
    }
    let verb = [crate::cli::INTERNAL_LOAD.into(), pin_dir.as_os_str().to_owned(), "--guard-only".into()];
    super::spawn_loader(&verb, &super::CounterConfig::default())
}

/// Takes the guard away, also what a loader left half done or another version made.
/// `false`: there was none.
pub fn release(pin_dir: &Path) -> anyhow::Result<bool> {
    let ours = attachments(pin_dir);
    let mut found = pins::others(&ours.root)?;
    if ours.root.try_exists().with_context(|| format!("look for {}", ours.root.display()))? {
        found.push(ours.root.clone());
    }
    found.iter().try_for_each(|root| take_away(&ours, root))?;
    let _ = fs::remove_dir(pin_dir);
    Ok(!found.is_empty())
}

fn take_away(ours: &Attachments, root: &Path) -> anyhow::Result<()> {
    Attachments { root: root.to_path_buf(), ..ours.clone() }.retain(&[])?;
    fs::remove_dir_all(root).with_context(|| format!("removal of {}", root.display()))
}

/// What a pinned program says of a packet (TC_ACT_UNSPEC or TC_ACT_SHOT), and nanoseconds
/// that it takes, by BPF_PROG_TEST_RUN. The packet starts with an Ethernet header and
/// arrives on this device of the caller's network namespace; it is counted as any other.
pub fn test_run(
    pin_dir: &Path,
    program: &str,
    (index, packet): (u32, &[u8]),
    repeat: u32,
) -> anyhow::Result<(i32, u64)> {
    // Of struct __sk_buff, up to the only field that says something.
    const INDEX_AT: usize = 40;
    let mut context = [0; INDEX_AT + 4];
    context[INDEX_AT..].copy_from_slice(&index.to_ne_bytes());
    let pin = root(pin_dir).join("programs").join(program);
    let classifier = SchedClassifier::from_pin(&pin).with_context(|| format!("open of {}", pin.display()))?;
    let options =
        TestRunOptions { data_in: Some(packet), ctx_in: Some(&context), repeat, ..TestRunOptions::default() };
    let result = classifier.test_run(options).with_context(|| format!("test run of {program}"))?;
    Ok((result.return_value as i32, u64::try_from(result.duration.as_nanos()).unwrap_or(u64::MAX)))
}

/// The link that holds it on this device; `None`: it is not there, or held by other means
/// (before Linux 6.6).
pub fn link(pin_dir: &Path, index: u32) -> anyhow::Result<Option<OwnedFd>> {
    let pin = root(pin_dir).join("links").join(format!("in-{index}"));
    let link = match sys::bpf::open_pin(&pin) {
        Ok(link) => link,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error).with_context(|| format!("open of {}", pin.display())),
    };
    let there = sys::bpf::tcx_link(link.as_fd()).with_context(|| format!("look at {}", pin.display()))?;
    Ok((there.index == index).then_some(link))
}

/// Whether it is on the interface of this name, by whatever means.
pub fn is_on(pin_dir: &Path, interface: &str) -> anyhow::Result<bool> {
    Ok(attachments(pin_dir).attached()?.iter().any(|name| name == interface))
}

pub(super) fn root(pin_dir: &Path) -> PathBuf {
    pin_dir.join(format!("{STEM}{ABI}"))
}

/// Directories of the guard are called this and a number.
const STEM: &str = "guard";
/// Of its filter, where there is no tcx.
pub const PRIORITY: u16 = 8;

fn attachments(pin_dir: &Path) -> Attachments {
    Attachments {
        root: root(pin_dir),
        hook: Hook::of_this_kernel(),
        places: &attach::GUARDING,
        counted: super::root(pin_dir).join("links"),
        former: former::roots(pin_dir, STEM, ABI),
    }
}

fn build_number() -> u64 {
    env!("SPOKEGUARD_GUARD_BUILD").parse().unwrap_or(0).max(1)
}

fn are_pinned(maps_dir: &Path, programs_dir: &Path) -> bool {
    pins::are_ours(pins::Kind::Map, maps_dir, &maps::ALL)
        && pins::are_ours(pins::Kind::Program, programs_dir, &PROGRAMS)
}

fn is_current(maps_dir: &Path, programs_dir: &Path) -> bool {
    are_pinned(maps_dir, programs_dir)
        && MapData::from_pin(maps_dir.join(maps::BUILD))
            .ok()
            .and_then(|map| Array::<_, u64>::try_from(Map::Array(map)).ok())
            .and_then(|build| build.get(&0, 0).ok())
            == Some(build_number())
}

/// The interfaces that the guard belongs on. Packets of a bridge's or bond's ports arrive
/// on that one, too.
fn public<'a>(rules: &'a GuardRules, links: &'a [Link]) -> impl Iterator<Item = &'a Link> {
    links.iter().filter(|l| !l.loopback && l.master.is_none() && rules.side(&l.name) == Side::Public)
}

const fn side_number(side: Side) -> u8 {
    match side {
        Side::Public => sides::PUBLIC,
        Side::Mesh => sides::MESH,
        Side::Local => sides::LOCAL,
        Side::Other => sides::OTHER,
    }
}

/// As our table's counters name it.
fn reason_of(number: u32) -> Option<DropReason> {
    match number {
        reasons::SSH => Some(DropReason::Ssh),
        reasons::PUBLIC_TCP => Some(DropReason::PublicTcp),
        reasons::WEAK_HOST => Some(DropReason::WeakHost),
        reasons::SPOOFED_MESH => Some(DropReason::SpoofedMesh),
        reasons::FORWARD => Some(DropReason::Forward),
        reasons::UNREADABLE => Some(DropReason::PublicOther),
        _ => None,
    }
}

/// One bank as the maps should hold it.
#[derive(Debug, PartialEq)]
struct Bank {
    rules: Rules,
    words: Vec<u64>,
    /// Sorted, each once.
    prefixes: Vec<((u32, PrefixKey), u8)>,
}

impl Bank {
    fn new(bank: usize, rules: &GuardRules) -> anyhow::Result<Self> {
        let mut words = vec![0u64; WORDS];
        for port in &rules.anyone {
            words[usize::from(port.get() / 64)] |= 1 << (port.get() % 64);
        }
        let mut prefixes = Vec::new();
        let key = |kind, port, net: &IpNet| {
            let (family, address, bits) = parts_of(net);
            let key = PrefixKey { bank: bank as u8, kind, port, family, address };
            (PREFIX_HEAD_BITS + bits, key)
        };
        prefixes.extend(rules.mesh.iter().map(|net| (key(kinds::MESH, 0, net), 1)));
        let mut sources: BTreeMap<Port, Vec<(IpNet, u8)>> = BTreeMap::new();
        for listed in &rules.listed {
            let how = if listed.to.is_empty() { open::EVERYWHERE } else { open::AT_ADDRESSES };
            sources.entry(listed.port).or_default().extend(listed.from.iter().map(|net| (net.trunc(), how)));
            prefixes
                .extend(listed.to.iter().map(|to| (key(kinds::TO, listed.port.get(), &IpNet::from(*to)), 1)));
        }
        for (port, nets) in sources {
            let with_wider = inherited(nets, |own, wider| own | wider);
            prefixes.extend(with_wider.iter().map(|(net, how)| (key(kinds::FROM, port.get(), net), *how)));
        }
        prefixes.sort_unstable();
        prefixes.dedup();
        let most = PREFIXES_MAX as usize / BANKS;
        if prefixes.len() > most {
            bail!("the policy has {} prefixes for public ports; the guard holds {most}", prefixes.len());
        }
        let rules = Rules { ssh: rules.ssh.get(), audit: rules.audit.into(), pad: 0 };
        Ok(Self { rules, words, prefixes })
    }
}

fn timed_entries<'a>(openings: impl Iterator<Item = &'a Timed>) -> BTreeMap<(u32, TimedKey), u64> {
    let mut by_port: BTreeMap<Port, Vec<(IpNet, u64)>> = BTreeMap::new();
    for Timed { port, from, until } in openings {
        by_port.entry(*port).or_default().extend(from.iter().map(|net| (net.trunc(), until.0)));
    }
    let mut entries = BTreeMap::new();
    for (port, nets) in by_port {
        for (net, until) in inherited(nets, u64::max) {
            let (family, address, bits) = parts_of(&net);
            entries.insert(
                (TIMED_HEAD_BITS + bits, TimedKey { port: port.get(), family: family as u16, address }),
                until,
            );
        }
    }
    entries
}

/// A trie tells the longest prefix only, so each is given what the wider ones around it have. Each once.
fn inherited<T: Copy>(mut nets: Vec<(IpNet, T)>, join: impl Fn(T, T) -> T) -> Vec<(IpNet, T)> {
    nets.sort_by_key(|(net, _)| (net.network(), net.prefix_len()));
    nets.dedup_by(|again, first| {
        let same = again.0 == first.0;
        if same {
            first.1 = join(again.1, first.1);
        }
        same
    });
    let (mut around, mut out): (Vec<(IpNet, T)>, _) = (Vec::new(), Vec::with_capacity(nets.len()));
    for (net, own) in nets {
        while around.last().is_some_and(|(wider, _)| !wider.contains(&net)) {
            around.pop();
        }
        let value = around.last().map_or(own, |(_, wider)| join(own, *wider));
        around.push((net, value));
        out.push((net, value));
    }
    out
}

/// Family, address in network order, length.
fn parts_of(net: &IpNet) -> (u32, [u8; 16], u32) {
    let mut address = [0; 16];
    match net.network() {
        IpAddr::V4(v4) => address[..4].copy_from_slice(&v4.octets()),
        IpAddr::V6(v6) => address = v6.octets(),
    }
    (family_number(Family::of_net(net)) as u32, address, u32::from(net.prefix_len()))
}

fn net_of(family: u32, address: &[u8; 16], bits: u32) -> Option<IpNet> {
    let [a, b, c, d, ..] = *address;
    let ip: IpAddr =
        if family as usize == sidecar_ebpf::IPV4 { [a, b, c, d].into() } else { (*address).into() };
    IpNet::new(ip, u8::try_from(bits).ok()?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn net(text: &str) -> IpNet {
        text.parse().expect("a prefix")
    }

    #[test]
    fn a_longer_prefix_has_what_the_wider_ones_around_it_have() {
        let nets =
            [("10.0.0.0/8", 1u8), ("10.1.0.0/16", 2), ("10.1.2.0/24", 4), ("10.2.0.0/16", 8), ("::/0", 16)];
        let all = nets.into_iter().map(|(text, value)| (net(text), value)).collect();
        let got = inherited(all, |own, wider| own | wider);
        let wanted =
            [("10.0.0.0/8", 1), ("10.1.0.0/16", 3), ("10.1.2.0/24", 7), ("10.2.0.0/16", 9), ("::/0", 16)];
        assert_eq!(got, wanted.into_iter().map(|(text, value)| (net(text), value)).collect::<Vec<_>>());
    }

    #[test]
    fn a_timed_opening_is_written_with_its_latest_end_and_read_back() {
        let port = Port::new(2222).expect("a port");
        let timed = |from: &str, until| Timed { port, from: vec![net(from)], until: Boot(until) };
        let list = [timed("192.0.2.0/24", 500), timed("192.0.2.9/32", 100), timed("fd00::/8", 7)];
        let entries = timed_entries(list.iter());
        let mut ends: Vec<u64> = entries.values().copied().collect();
        ends.sort_unstable();
        assert_eq!(ends, [7, 500, 500]);
        for (bits, key) in entries.keys() {
            let net = net_of(key.family.into(), &key.address, bits - TIMED_HEAD_BITS).expect("a prefix");
            assert!(list.iter().any(|timed| timed.from == [net]), "{net}");
        }
    }

    #[test]
    fn the_embedded_object_is_another_than_the_counters() {
        assert_eq!(&OBJECT[..4], b"\x7fELF");
        assert!(build_number() > 1 && build_number() != super::super::build_number());
    }
}
