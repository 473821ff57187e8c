//! The eBPF counters: loading, attaching, configuring and reading them. Everything is
//! pinned below `PIN_DIR/abiN/{maps,programs,links}` and outlives this process; a new one
//! adopts what it finds and exchanges programs without missing a packet.
//!
//! Loading is the only step that needs aya's loader. It happens in a short-lived child
//! ([`spawn_loader`]), because the loader's memory would stay with the daemon.

mod attach;
pub mod bind;
mod carried;
pub(super) mod clsact;
mod config;
pub(super) mod events;
mod former;
pub mod guard;
mod pins;
mod tried;

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fs;
use std::io::{self, Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, bail};
use aya::EbpfLoader;
use aya::maps::lpm_trie::Key;
use aya::maps::{Array, LpmTrie, Map, MapData, PerCpuArray};
use aya::programs::{ProgramError, SchedClassifier, TestRun as _, TestRunOptions};
use sidecar_ebpf::{
    ABI, CLASSES_MAX, ClassEntry, NO_CLASS, PortClasses, RING_BYTES, Row, SourceKey, about, attempt_index,
    cell_index, maps, programs, row_index,
};

pub use attach::Hook;
pub use config::{CountedService, CounterConfig};
pub use events::{ListenEvents, Listening, ProgramLog};
pub use pins::{BPFFS, DIRECTORY, ensure_bpffs, find_bpffs, pin_dir};
pub use tried::{TestFrame, Tried};

use crate::observed::{AttemptKey, CountedProto, Counters, Direction, Link, Reading, TrafficKey};
use crate::sys;
use crate::terms::{Family, Scope};
use attach::Attachments;
use carried::{Carried, Store};
use config::{Classes, Tables, family_number, scope_number};
use pins::{are_ours, discard_strangers};

static OBJECT: &[u8] = aya::include_bytes_aligned!(env!("SPOKEGUARD_EBPF_OBJECT"));

/// Everything that is pinned for this ABI, opened.
pub struct Bpf {
    pin_dir: PathBuf,
    attachments: Attachments,
    ports: Array<MapData, PortClasses>,
    classes: Array<MapData, ClassEntry>,
    sources: LpmTrie<MapData, SourceKey, u8>,
    rows: PerCpuArray<MapData, Row>,
    carried: Carried,
    about: Array<MapData, u64>,
    /// As in the map; nobody else writes it while we live.
    in_use: Classes,
    memory_bytes: u64,
}

/// What a policy asks for and the maps can't hold.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Omitted {
    /// Services that are counted as "no service".
    pub services: usize,
    /// Some allowed sources show as refused.
    pub sources: bool,
}

/// Counters for `check` and the daemon's cycle: opens, reads, closes.
pub fn read(pin_dir: &Path, config: &CounterConfig) -> Reading<Counters> {
    match Bpf::open(pin_dir) {
        Ok(Some(bpf)) => bpf.read(config),
        Ok(None) => Reading::Seen(Counters::default()),
        Err(error) => Reading::blind(reason(&error)),
    }
}

impl Bpf {
    /// Opens the pins of this ABI. `None`: nothing (or not everything) is pinned.
    pub fn open(pin_dir: &Path) -> anyhow::Result<Option<Self>> {
        let root = root(pin_dir);
        // The last thing that a loader does is to write which build this is.
        let build = match sys::bpf::open_pin(&root.join("maps").join(maps::BUILD)) {
            Ok(build) => build,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => {
                return Err(error).with_context(|| format!("open of the pins in {}", root.display()));
            }
        };
        let about = Array::<_, u64>::try_from(Map::Array(MapData::from_fd(build)?))?;
        if about.get(&about::BUILD, 0)? == 0 {
            return Ok(None);
        }
        let classes = Array::try_from(Map::Array(map(&root, maps::CLASSES)?))?;
        let mut bpf = Self {
            pin_dir: pin_dir.to_path_buf(),
            ports: Array::try_from(Map::Array(map(&root, maps::PORTS)?))?,
            in_use: classes_in_use(&classes)?,
            classes,
            sources: LpmTrie::try_from(Map::LpmTrie(map(&root, maps::SOURCES)?))?,
            rows: PerCpuArray::try_from(Map::PerCpuArray(map(&root, maps::ROWS)?))?,
            carried: Carried::open(&root)?,
            about,
            attachments: attachments(pin_dir),
            memory_bytes: 0,
        };
        bpf.memory_bytes = bpf.measure_memory();
        Ok(Some(bpf))
    }

    /// For tests of the older hook on a kernel that has the newer one.
    pub fn with_hook(mut self, hook: Hook) -> Self {
        self.attachments.hook = hook;
        self
    }

    pub fn pin_dir(&self) -> &Path {
        &self.pin_dir
    }

    /// Counts on this device from now on, in this scope. Cheap where nothing is to do;
    /// `true`: something changed.
    pub fn attach(&mut self, link: &Link, scope: Scope) -> anyhow::Result<bool> {
        self.attachments.count(link, scope)
    }

    /// Counts no longer on this device.
    pub fn detach(&mut self, index: u32) -> anyhow::Result<()> {
        self.attachments.detach(index)
    }

    /// Counts on exactly these devices. A device that fails doesn't keep the others from
    /// being counted; the failures come back.
    pub fn sync(&mut self, wanted: &[(&Link, Scope)]) -> Vec<anyhow::Error> {
        let keep: Vec<u32> = wanted.iter().map(|(link, _)| link.index).collect();
        let failed = self.attachments.retain(&keep).err();
        let attached = wanted.iter().filter_map(|(link, scope)| self.attachments.count(link, *scope).err());
        let mut failed: Vec<anyhow::Error> = failed.into_iter().chain(attached).collect();
        failed.extend(self.take_over().err());
        failed
    }

    /// What was counted by programs of other ABIs, whose places ours have taken.
    fn take_over(&mut self) -> anyhow::Result<()> {
        if self.attachments.former.is_empty() {
            return Ok(());
        }
        sys::bpf::wait_for_running_programs();
        for former in std::mem::take(&mut self.attachments.former) {
            if !former::take_over(&former, &mut self.carried, &self.in_use)? {
                log::warn!("what was counted below {} can't be read by this version", former.display());
            }
        }
        self.memory_bytes = self.measure_memory();
        Ok(())
    }

    /// Makes the maps say what the policy says, changing only the difference.
    pub fn configure(&mut self, config: &CounterConfig) -> anyhow::Result<Omitted> {
        let tables = config.tables(&self.in_use);
        let omitted = Omitted { services: tables.omitted.len(), sources: tables.sources_omitted };
        let written = self.write(&tables);
        // After a failure the map says how far it went.
        self.in_use = if written.is_ok() { tables.classes } else { classes_in_use(&self.classes)? };
        self.memory_bytes = self.measure_memory();
        written.map(|()| omitted)
    }

    fn write(&mut self, tables: &Tables) -> anyhow::Result<()> {
        let old_ports: BTreeSet<u16> = self.in_use.values().map(|entry| entry.port).collect();
        // Ports first lose their class, then classes their meaning; the other way round
        // for new ones. A packet in between counts as "no service", never as another.
        for port in old_ports.iter().filter(|port| !tables.ports.contains_key(port)) {
            self.set_port(*port, PortClasses::default())?;
        }
        self.set_aside(tables)?;
        for (class, entry) in &tables.classes {
            if self.in_use.get(class) != Some(entry) {
                self.classes.set(u32::from(*class), entry, 0).context("write of a class")?;
            }
        }
        let before: BTreeSet<(u32, SourceKey)> = self
            .sources
            .keys()
            .map(|key| key.map(|key| (key.prefix_len(), key.data())))
            .collect::<Result<_, _>>()
            .context("list of allowed sources")?;
        // Away before in: the trie is bounded.
        for (bits, key) in before.difference(&tables.sources) {
            self.sources.remove(&Key::new(*bits, *key)).context("removal of an allowed source")?;
        }
        for (bits, key) in tables.sources.difference(&before) {
            self.sources.insert(&Key::new(*bits, *key), 1, 0).context("insertion of an allowed source")?;
        }
        for (port, classes) in &tables.ports {
            self.set_port(*port, *classes)?;
        }
        for class in self.in_use.keys().filter(|class| !tables.classes.contains_key(class)) {
            self.classes.set(u32::from(*class), ClassEntry::default(), 0).context("removal of a class")?;
        }
        Ok(())
    }

    /// What was counted for services that are gone counts as "no service" from now on. Their
    /// ports have lost their classes already, so that every free class begins at 0.
    fn set_aside(&mut self, tables: &Tables) -> anyhow::Result<()> {
        let gone = self.in_use.iter().filter(|(class, entry)| {
            tables.classes.get(class).is_none_or(|now| config::identity(now) != config::identity(entry))
        });
        let rows: Vec<(u32, u32)> = gone
            .map(|(class, entry)| (row_index(*class, 0), row_index(NO_CLASS, usize::from(entry.proto & 3))))
            .collect();
        if rows.is_empty() {
            return Ok(());
        }
        // One may have found the class a moment ago.
        sys::bpf::wait_for_running_programs();
        for mut store in Store::all(&self.attachments.root)? {
            rows.iter().try_for_each(|(from, to)| self.carried.take(&mut store, *from, *to))?;
        }
        Ok(())
    }

    pub fn read(&self, config: &CounterConfig) -> Reading<Counters> {
        match self.counters(config) {
            Ok(counters) => Reading::Seen(counters),
            Err(error) => Reading::blind(reason(&error)),
        }
    }

    /// Sums over all CPUs. `config` says which service of today's policy each class is;
    /// what was counted for a service that is gone shows as "no service".
    pub fn counters(&self, config: &CounterConfig) -> anyhow::Result<Counters> {
        let mut counters = Counters {
            loaded: true,
            attached: self.attachments.attached()?,
            memory_bytes: self.memory_bytes,
            created: self.about.get(&about::CREATED, 0).context("read of when counting began")?,
            ..Counters::default()
        };
        for (number, proto) in CountedProto::ALL.into_iter().enumerate() {
            add_row(&mut counters, &self.row(row_index(NO_CLASS, number))?, proto, None);
        }
        for (class, entry) in &self.in_use {
            let Some(proto) = CountedProto::ALL.get(usize::from(entry.proto)) else { continue };
            add_row(&mut counters, &self.row(row_index(*class, 0))?, *proto, config.service_of(entry));
        }
        Ok(counters)
    }

    fn set_port(&mut self, port: u16, classes: PortClasses) -> anyhow::Result<()> {
        let at = u32::from(port);
        if self.ports.get(&at, 0).context("read of a port's classes")? != classes {
            self.ports.set(at, classes, 0).context("write of a port's classes")?;
        }
        Ok(())
    }

    fn row(&self, at: u32) -> anyhow::Result<Row> {
        let per_cpu = self.rows.get(&at, 0).context("read of the counters")?;
        Ok(sum([sum(per_cpu.iter()), self.carried.row(at)?].iter()))
    }

    /// Writes down when counting began, if nobody has.
    fn begin(&mut self, former: &[PathBuf]) -> anyhow::Result<()> {
        if self.about.get(&about::CREATED, 0)? != 0 {
            return Ok(());
        }
        let now = former::created(&self.attachments.root);
        let began = former.iter().filter_map(|root| former::created(root)).chain(now).min();
        self.about.set(about::CREATED, began.unwrap_or_default(), 0).context("write of when counting began")
    }

    fn measure_memory(&self) -> u64 {
        let root = &self.attachments.root;
        let counters = programs::COUNTERS.iter().flatten().flatten();
        let programs = counters
            .chain([&programs::LISTEN, &programs::EMPTY])
            .map(|name| root.join("programs").join(name));
        let maps = maps::ALL.iter().map(|name| root.join("maps").join(name));
        programs
            .chain(maps)
            .filter_map(|pin| sys::bpf::memory_bytes(sys::bpf::open_pin(&pin).ok()?).ok())
            .sum()
    }
}

/// Loads the programs, pins them and configures the maps. What is pinned already stays:
/// maps are adopted, programs of the same build are kept, and those of another build make
/// way (their links are exchanged by the next [`Bpf::attach`]).
pub fn load_and_pin(pin_dir: &Path, config: &CounterConfig) -> anyhow::Result<Omitted> {
    let root = root(pin_dir);
    let dirs = ["maps", "programs", "links"].map(|name| root.join(name));
    for dir in &dirs {
        pins::make_dir(dir)?;
    }
    let [maps_dir, programs_dir, _] = &dirs;
    discard_strangers(pins::Kind::Map, maps_dir, &maps::ALL)?;
    discard_strangers(pins::Kind::Program, programs_dir, &[&counting()[..], &[programs::LISTEN]].concat())?;
    if !is_current(maps_dir, programs_dir) {
        load(maps_dir, programs_dir)?;
    }
    let mut bpf = Bpf::open(pin_dir)?.context("open of what was just pinned")?;
    let former = former::roots(pin_dir, former::STEM, ABI);
    bpf.carried.finish(&[&former[..], &[root]].concat())?;
    bpf.begin(&former)?;
    bpf.configure(config)
}

/// Takes everything away, also what a loader left half done: programs off the devices,
/// then every pin. `false`: there was nothing.
pub fn release(pin_dir: &Path) -> anyhow::Result<bool> {
    let attachments = attachments(pin_dir);
    let ours = &attachments.root;
    if !ours.try_exists().with_context(|| format!("look for {}", ours.display()))? {
        return Ok(false);
    }
    attachments.retain(&[])?;
    for root in attachments.former.iter().chain([ours]) {
        fs::remove_dir_all(root).with_context(|| format!("removal of {}", root.display()))?;
    }
    // Stays where the guards still have pins.
    let _ = fs::remove_dir(pin_dir);
    Ok(true)
}

/// For a process that does nothing but load: spares it the kernel's type information.
pub fn prepare_loader() {
    // Without the right to mount, loading merely needs more memory.
    if let Err(error) = sys::bpf::hide_kernel_btf() {
        log::debug!("the kernel's BTF will be parsed: {error}");
    }
}

/// The whole life of the loading child: the configuration comes as JSON on stdin.
pub fn load_from_stdin(pin_dir: &Path) -> anyhow::Result<Omitted> {
    let mut json = Vec::new();
    io::stdin().take(CONFIG_BYTES_MAX).read_to_end(&mut json).context("read of the configuration")?;
    let config = serde_json::from_slice(&json).context("decode of the configuration")?;
    load_and_pin(pin_dir, &config)
}

/// Runs this program again with `args`, which must lead to [`load_from_stdin`], and waits.
pub fn spawn_loader<S: AsRef<OsStr>>(args: &[S], config: &CounterConfig) -> anyhow::Result<()> {
    run_loader(args, &serde_json::to_vec(config).context("encode of the configuration")?)
}

/// The same with any input.
pub fn run_loader<S: AsRef<OsStr>>(args: &[S], input: &[u8]) -> anyhow::Result<()> {
    let mut child = Command::new("/proc/self/exe")
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .context("start of the eBPF loader")?;
    sys::memory::sacrifice(child.id());
    if let Some(mut stdin) = child.stdin.take()
        && let Err(error) = stdin.write_all(input)
        && error.kind() != io::ErrorKind::BrokenPipe
    {
        let _ = child.kill();
        let _ = child.wait();
        return Err(error).context("send of the configuration to the eBPF loader");
    }
    let mut stderr = Vec::new();
    if let Some(mut pipe) = child.stderr.take() {
        let _ = (&mut pipe).take(STDERR_BYTES_MAX).read_to_end(&mut stderr);
        // The rest is read and dropped, so that the child never waits for us.
        let _ = io::copy(&mut pipe, &mut io::sink());
    }
    let status = child.wait().context("wait for the eBPF loader")?;
    if !status.success() {
        bail!("the eBPF loader ended with {status}: {}", String::from_utf8_lossy(&stderr).trim());
    }
    Ok(())
}

/// Nanoseconds that a pinned program takes per packet, by BPF_PROG_TEST_RUN. The packet
/// starts with an Ethernet header, whichever program it is.
pub fn test_run(pin_dir: &Path, program: &str, packet: &[u8], repeat: u32) -> anyhow::Result<u64> {
    let pin = root(pin_dir).join("programs").join(program);
    let classifier = SchedClassifier::from_pin(&pin).with_context(|| format!("open of {}", pin.display()))?;
    let options = TestRunOptions { data_in: Some(packet), repeat, ..TestRunOptions::default() };
    let result = classifier.test_run(options).with_context(|| format!("test run of {program}"))?;
    Ok(u64::try_from(result.duration.as_nanos()).unwrap_or(u64::MAX))
}

const CONFIG_BYTES_MAX: u64 = 4 << 20;
const STDERR_BYTES_MAX: u64 = 16 << 10;

/// Everything of one ABI lies below this.
fn root(pin_dir: &Path) -> PathBuf {
    pin_dir.join(format!("abi{ABI}"))
}

fn attachments(pin_dir: &Path) -> Attachments {
    let root = root(pin_dir);
    Attachments {
        hook: Hook::of_this_kernel(),
        places: &attach::COUNTING,
        counted: root.join("links"),
        former: former::roots(pin_dir, former::STEM, ABI),
        root,
    }
}

/// The hash of the embedded object; never 0, which stands for "not complete".
fn build_number() -> u64 {
    env!("SPOKEGUARD_EBPF_BUILD").parse().unwrap_or(0).max(1)
}

/// The programs that there is no counting without.
fn counting() -> Vec<&'static str> {
    programs::COUNTERS.iter().flatten().flatten().chain([&programs::EMPTY]).copied().collect()
}

/// Whether the pins are what was pinned, by whichever build.
pub fn is_pinned(pin_dir: &Path) -> bool {
    let root = root(pin_dir);
    are_ours(pins::Kind::Map, &root.join("maps"), &maps::ALL)
        && are_ours(pins::Kind::Program, &root.join("programs"), &counting())
}

/// Whether everything is pinned and comes from this very object.
fn is_current(maps_dir: &Path, programs_dir: &Path) -> bool {
    are_ours(pins::Kind::Map, maps_dir, &maps::ALL)
        && are_ours(pins::Kind::Program, programs_dir, &counting())
        && MapData::from_pin(maps_dir.join(maps::BUILD))
            .ok()
            .and_then(|map| Array::<_, u64>::try_from(Map::Array(map)).ok())
            .and_then(|about| about.get(&about::BUILD, 0).ok())
            == Some(build_number())
}

fn load(maps_dir: &Path, programs_dir: &Path) -> anyhow::Result<()> {
    let mut object = EbpfLoader::new()
        .default_map_pin_directory(maps_dir)
        // aya-log's ring is neither pinned nor small by itself.
        .map_pin_path(maps::LOGS, maps_dir.join(maps::LOGS))
        .map_max_entries(maps::LOGS, RING_BYTES)
        .load(OBJECT)
        .map_err(|error| {
            let error = anyhow::Error::from(error);
            let needs = if is_denied(&error) { NEEDS } else { "" };
            error.context(format!("load of the eBPF object{needs}"))
        })?;
    for name in counting() {
        let program =
            object.program_mut(name).with_context(|| format!("the object has no program {name}"))?;
        let program: &mut SchedClassifier = program.try_into()?;
        program.load().map_err(|error| refused(name, &error))?;
        pin_over(&programs_dir.join(name), |pin| Ok(program.pin(pin)?))?;
    }
    // Counting works without it, on a kernel that was built without such programs.
    let program = object.program_mut(programs::LISTEN).context("the object has no program listen")?;
    let program: &mut aya::programs::RawTracePoint = program.try_into()?;
    match program.load() {
        Ok(()) => pin_over(&programs_dir.join(programs::LISTEN), |pin| Ok(program.pin(pin)?))?,
        Err(error) => log::warn!("{:#}", refused(programs::LISTEN, &error)),
    }
    let map = object.map_mut(maps::BUILD).context("the object has no map BUILD")?;
    Array::try_from(map)?.set(about::BUILD, build_number(), 0).context("write of the build number")
}

/// Why the kernel did not take a program, without the thousand lines of its reasoning.
fn refused(name: &str, error: &ProgramError) -> anyhow::Error {
    let ProgramError::LoadError { io_error, verifier_log } = error else {
        return anyhow::anyhow!("load of the program {name}: {error}");
    };
    let log = verifier_log.to_string();
    let statistics = ["processed ", "verification time ", "stack depth "];
    let verdict = (log.lines().rev().map(str::trim))
        .find(|line| !line.is_empty() && !statistics.iter().any(|start| line.starts_with(start)));
    let needs = if io_error.kind() == io::ErrorKind::PermissionDenied { NEEDS } else { "" };
    anyhow::anyhow!(
        "load of the program {name}: {io_error}{needs}; verifier: {}",
        verdict.unwrap_or("silent")
    )
}

/// Pins beside and renames over, so that at any moment there is one program or the other.
fn pin_over(path: &Path, pin: impl FnOnce(&Path) -> anyhow::Result<()>) -> anyhow::Result<()> {
    let beside = path
        .with_extension("")
        .with_file_name(format!("{}_new", path.file_name().and_then(OsStr::to_str).unwrap_or("program")));
    pins::remove(&beside)?;
    pin(&beside).with_context(|| format!("pin of {}", path.display()))?;
    fs::rename(&beside, path).with_context(|| format!("rename of the pin {}", path.display()))
}

fn map(root: &Path, name: &str) -> anyhow::Result<MapData> {
    MapData::from_pin(root.join("maps").join(name)).with_context(|| format!("open of the pinned map {name}"))
}

fn classes_in_use(classes: &Array<MapData, ClassEntry>) -> anyhow::Result<Classes> {
    let mut in_use = BTreeMap::new();
    for class in 1..=CLASSES_MAX as u8 {
        let entry = classes.get(&u32::from(class), 0).context("read of a class")?;
        if entry.used != 0 {
            in_use.insert(class, entry);
        }
    }
    Ok(in_use)
}

fn sum<'a>(per_cpu: impl Iterator<Item = &'a Row>) -> Row {
    per_cpu.fold(Row::default(), |mut total, row| {
        for (to, from) in total.traffic.iter_mut().zip(&row.traffic) {
            to.packets = to.packets.wrapping_add(from.packets);
            to.bytes = to.bytes.wrapping_add(from.bytes);
        }
        for (to, from) in total.attempts.iter_mut().zip(&row.attempts) {
            *to = to.wrapping_add(*from);
        }
        total
    })
}

/// Adds what is not zero.
fn add_row(counters: &mut Counters, row: &Row, proto: CountedProto, class: Option<u16>) {
    for family in Family::ALL {
        for scope in Scope::ALL {
            for (number, direction) in Direction::ALL.into_iter().enumerate() {
                let cell = row.traffic[cell_index(scope_number(scope), number, family_number(family))];
                if cell.packets != 0 {
                    let key = TrafficKey { scope, direction, family, proto, class };
                    let amount = counters.traffic.entry(key).or_default();
                    amount.packets = amount.packets.wrapping_add(cell.packets);
                    amount.bytes = amount.bytes.wrapping_add(cell.bytes);
                }
            }
        }
        for allowed in [false, true] {
            let attempts = row.attempts[attempt_index(family_number(family), allowed)];
            if attempts != 0 {
                *counters.attempts.entry(AttemptKey { class, family, allowed }).or_insert(0) += attempts;
            }
        }
    }
}

/// One sentence for the operator, with the capability where that is what is missing.
fn reason(error: &anyhow::Error) -> String {
    if is_denied(error) { format!("needs CAP_BPF: run as root ({error:#})") } else { format!("{error:#}") }
}

fn is_denied(error: &anyhow::Error) -> bool {
    let mut kinds = error.chain().filter_map(|cause| cause.downcast_ref::<io::Error>()).map(io::Error::kind);
    kinds.any(|kind| kind == io::ErrorKind::PermissionDenied)
}

/// To load. CAP_PERFMON, because the verifier else refuses harmless arithmetic.
const NEEDS: &str = " (needs CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON)";

#[cfg(test)]
mod tests {
    use super::*;
    use crate::observed::Amount;
    use sidecar_ebpf::{Cell, IN, IPV4, IPV6, OUT};

    #[test]
    fn rows_of_all_cpus_are_added_and_only_what_was_counted_shows() {
        let mut one = Row::default();
        one.traffic[cell_index(0, IN, IPV4)] = Cell { packets: 3, bytes: 180 };
        one.attempts[attempt_index(IPV4, false)] = 2;
        let mut two = Row::default();
        two.traffic[cell_index(0, IN, IPV4)] = Cell { packets: 4, bytes: 240 };
        two.traffic[cell_index(1, OUT, IPV6)] = Cell { packets: 1, bytes: 90 };
        let mut counters = Counters::default();
        add_row(&mut counters, &sum([one, two].iter()), CountedProto::Tcp, Some(5));
        let key = |scope, direction, family| TrafficKey {
            scope,
            direction,
            family,
            proto: CountedProto::Tcp,
            class: Some(5),
        };
        let expected = BTreeMap::from([
            (key(Scope::Public, Direction::In, Family::Ipv4), Amount { packets: 7, bytes: 420 }),
            (key(Scope::Mesh, Direction::Out, Family::Ipv6), Amount { packets: 1, bytes: 90 }),
        ]);
        assert_eq!(counters.traffic, expected);
        let refused = AttemptKey { class: Some(5), family: Family::Ipv4, allowed: false };
        assert_eq!(counters.attempts, BTreeMap::from([(refused, 2)]));
    }

    #[test]
    fn where_nothing_is_pinned_nothing_is_loaded_and_that_is_no_blindness() {
        let nowhere = read(Path::new("/proc/self/nothing-is-pinned-here"), &CounterConfig::default());
        assert_eq!(nowhere, Reading::Seen(Counters::default()));
    }

    #[test]
    fn a_missing_right_is_named() {
        let denied =
            anyhow::Error::from(io::Error::from(io::ErrorKind::PermissionDenied)).context("open of the pins");
        assert!(reason(&denied).starts_with("needs CAP_BPF"), "{}", reason(&denied));
        let other = anyhow::Error::from(io::Error::from(io::ErrorKind::NotFound)).context("open of the pins");
        assert!(!reason(&other).contains("CAP_BPF"), "{}", reason(&other));
    }

    #[test]
    fn the_embedded_object_is_an_elf_file_for_bpf() {
        assert_eq!(&OBJECT[..4], b"\x7fELF");
        assert_eq!(OBJECT[18..20], 247u16.to_le_bytes(), "EM_BPF");
        assert!(build_number() > 1);
    }
}
