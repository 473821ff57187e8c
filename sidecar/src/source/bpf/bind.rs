//! The bind guard: two programs on a control group, by default the root of all, pinned with
//! their maps below `PIN_DIR/bindsN`. They outlive us; another daemon adopts them, and those
//! of another build are put beside the old ones before these go, so that no bind goes
//! unjudged. What they hold is the policy's, in maps that only [`Guard::configure`] writes.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::net::{IpAddr, Ipv6Addr};
use std::os::fd::AsFd as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use aya::EbpfLoader;
use aya::maps::lpm_trie::Key;
use aya::maps::{Array, HashMap, LpmTrie, Map, MapData, PerCpuArray, RingBuf};
use aya::programs::links::FdLink;
use aya::programs::{CgroupAttachMode, CgroupSockAddr, ProgramInfo};
use sidecar_ebpf::bind::{self, PlaceKey, Refusal, RefusalKey, Wake, list, maps, outcome, programs};
use tokio::io::unix::AsyncFd;

use super::{is_denied, pin_over, pins, refused};
use crate::desired::binds::{BindRules, Surroundings};
use crate::observed::{BindTally, Binds, Link, Reading, RefusedBind};
use crate::policy::Policy;
use crate::source::owners;
use crate::sys;
use crate::terms::{Actor, Port, Proto, Scope, Stamp, printable};

static OBJECT: &[u8] = aya::include_bytes_aligned!(env!("SPOKEGUARD_BIND_OBJECT"));

/// The pinned maps, opened.
pub struct Guard {
    root: PathBuf,
    guard: Array<MapData, bind::Guard>,
    kinds: Array<MapData, u64>,
    places: LpmTrie<MapData, PlaceKey, u8>,
    refusals: HashMap<MapData, RefusalKey, Refusal>,
    tally: PerCpuArray<MapData, u64>,
}

/// The guard for `check` and the daemon's cycle: opens, reads, closes.
pub fn read(pin_dir: &Path, now: Stamp) -> Reading<Binds> {
    match Guard::open(pin_dir) {
        Ok(Some(guard)) => Reading::from_result(guard.read(now)),
        Ok(None) => Reading::Seen(Binds::default()),
        Err(error) if is_denied(&error) => Reading::blind(format!("needs CAP_BPF: run as root ({error:#})")),
        Err(error) => Reading::blind(format!("{error:#}")),
    }
}

impl Guard {
    /// Opens the pins of this ABI. `None`: nothing (or not everything) is pinned.
    pub fn open(pin_dir: &Path) -> anyhow::Result<Option<Self>> {
        let root = root(pin_dir);
        match sys::bpf::open_pin(&root.join("maps").join(maps::BUILD)) {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => {
                return Err(error).with_context(|| format!("open of the pins in {}", root.display()));
            }
        }
        if pinned_build(&root) == Some(0) {
            return Ok(None);
        }
        let map = |name: &str| {
            MapData::from_pin(root.join("maps").join(name))
                .with_context(|| format!("open of the pinned map {name}"))
        };
        Ok(Some(Self {
            guard: Array::try_from(Map::Array(map(maps::GUARD)?))?,
            kinds: Array::try_from(Map::Array(map(maps::KINDS)?))?,
            places: LpmTrie::try_from(Map::LpmTrie(map(maps::PLACES)?))?,
            refusals: HashMap::try_from(Map::LruHashMap(map(maps::REFUSALS)?))?,
            tally: PerCpuArray::try_from(Map::PerCpuArray(map(maps::TALLY)?))?,
            root,
        }))
    }

    /// Makes the maps say what the policy says. What both the old and the new one allow is
    /// never refused in between. `prover`: the mark of this daemon's own trials.
    /// `with_public` is false where the interfaces have not been read yet: then what is known
    /// of them stays.
    pub fn configure(
        &mut self,
        rules: &BindRules,
        around: &Surroundings,
        prover: u32,
        with_public: bool,
    ) -> anyhow::Result<()> {
        let known = self.guard.get(&0, 0).context("read of the guard")?;
        let mut guard =
            bind::Guard { lifted: known.lifted, nonlocal: known.nonlocal, prover, ..rules.guard(around) };
        if rules.moves != [None; 3] && rules.mode.is_some() {
            // Written down before it is done: whoever is killed in between leaves a note of it.
            let off = nonlocal_off();
            guard.nonlocal |= off;
            if guard.nonlocal != known.nonlocal {
                let noted = bind::Guard { nonlocal: guard.nonlocal, ..known };
                self.guard.set(0, noted, 0).context("write of the guard")?;
            }
            set_nonlocal(off, true);
        } else {
            set_nonlocal(known.nonlocal, false);
            guard.nonlocal = 0;
        }
        let wanted = rules.places(around);
        let before: BTreeSet<(u32, PlaceKey)> = self
            .places
            .keys()
            .map(|key| key.map(|key| (key.prefix_len(), key.data())))
            .collect::<Result<_, _>>()
            .context("list of the guard's places")?;
        let widens = |(_, key): &&(u32, PlaceKey)| matches!(key.list, list::MESH | list::SSH);
        let (widening, narrowing): (Vec<_>, Vec<_>) = wanted.difference(&before).partition(widens);
        let stale = before.difference(&wanted).filter(|(_, key)| with_public || widens(&&(0, *key)));
        let (unwiden, unnarrow): (Vec<_>, Vec<_>) = stale.partition(widens);
        // First everything that allows more, last everything that allows less.
        for (bits, key) in &unnarrow {
            self.places.remove(&Key::new(*bits, *key)).context("removal of a place")?;
        }
        for (bits, key) in &widening {
            self.places.insert(&Key::new(*bits, *key), 1, 0).context("insertion of a place")?;
        }
        let mut words = (0..).zip(rules.words());
        words
            .try_for_each(
                |(at, word)| {
                    if self.kinds.get(&at, 0)? == word { Ok(()) } else { self.kinds.set(at, word, 0) }
                },
            )
            .context("write of the kinds of ports")?;
        if known != guard {
            self.guard.set(0, guard, 0).context("write of the guard")?;
        }
        for (bits, key) in &narrowing {
            self.places.insert(&Key::new(*bits, *key), 1, 0).context("insertion of a place")?;
        }
        for (bits, key) in &unwiden {
            self.places.remove(&Key::new(*bits, *key)).context("removal of a place")?;
        }
        Ok(())
    }

    /// Puts the guard aside, or takes it up again. `true`: that changed something.
    pub fn lift(&mut self, lifted: bool) -> anyhow::Result<bool> {
        let mut guard = self.guard.get(&0, 0).context("read of the guard")?;
        let changed = (guard.lifted != 0) != lifted;
        guard.lifted = u32::from(lifted);
        if changed {
            self.guard.set(0, guard, 0).context("write of the guard")?;
        }
        Ok(changed)
    }

    pub fn is_lifted(&self) -> anyhow::Result<bool> {
        Ok(self.guard.get(&0, 0).context("read of the guard")?.lifted != 0)
    }

    pub fn tally(&self) -> anyhow::Result<BindTally> {
        let sum = |what: u8| {
            let per_cpu = self.tally.get(&u32::from(what), 0).context("read of the guard's tally")?;
            Ok::<u64, anyhow::Error>(per_cpu.iter().fold(0, |sum: u64, n| sum.wrapping_add(*n)))
        };
        Ok(BindTally {
            refused: sum(outcome::REFUSED)?,
            audited: sum(outcome::AUDITED)?,
            moved: sum(outcome::MOVED)?,
        })
    }

    /// Whether both programs are on a control group that exists, and the pins are what was pinned.
    pub fn is_whole(&self) -> bool {
        self.attached() && are_pinned(&self.root)
    }

    /// Whether both programs are on a control group that exists.
    pub fn attached(&self) -> bool {
        programs::ALL.iter().all(|name| link(&self.root, name).is_some_and(|link| link.cgroup != 0))
    }

    fn read(&self, now: Stamp) -> anyhow::Result<Binds> {
        let guard = self.guard.get(&0, 0).context("read of the guard")?;
        // The list changes while it is walked: an entry may come twice, and never without end.
        let entries = self.refusals.iter().take(2 * bind::REFUSALS_MAX as usize).filter_map(Result::ok);
        let awake = sys::clock::since_boot();
        let at = |nanoseconds: u64| {
            let ago = awake.saturating_sub(std::time::Duration::from_nanos(nanoseconds));
            Stamp(now.0.checked_sub(ago).unwrap_or(now.0))
        };
        let refusals = entries.filter_map(|(key, value)| {
            let what = Attempt::decode(&key)?;
            let by = who(value.pid, &what.process, value.cgroup);
            Some(RefusedBind {
                proto: what.proto,
                address: what.address,
                port: what.port,
                audited: what.audited,
                by,
                uid: value.uid,
                count: value.count,
                first: at(value.first_ns),
                last: at(value.last_ns),
            })
        });
        Ok(Binds {
            loaded: true,
            attached: self.attached(),
            lifted: guard.lifted != 0,
            refusals: refusals.collect(),
            tally: self.tally()?,
            memory_bytes: self.memory_bytes(),
        })
    }

    fn memory_bytes(&self) -> u64 {
        let maps = maps::ALL.iter().map(|name| self.root.join("maps").join(name));
        let programs = programs::ALL.iter().map(|name| self.root.join("programs").join(name));
        maps.chain(programs)
            .filter_map(|pin| sys::bpf::memory_bytes(sys::bpf::open_pin(&pin).ok()?).ok())
            .sum()
    }
}

/// Loads the programs, pins them and puts them on this control group, or on the root of the
/// hierarchy. What stands already stays; on a fresh one nothing is refused before
/// [`Guard::configure`].
pub fn load_and_pin(pin_dir: &Path, cgroup: Option<&Path>) -> anyhow::Result<()> {
    // Without the right to mount, loading merely needs more memory.
    if let Err(error) = sys::bpf::hide_kernel_btf() {
        log::debug!("the kernel's BTF will be parsed: {error}");
    }
    let root = root(pin_dir);
    let dirs = ["maps", "programs", "links"].map(|name| root.join(name));
    dirs.iter().try_for_each(|dir| pins::make_dir(dir))?;
    let [maps_dir, programs_dir, links_dir] = &dirs;
    pins::discard_strangers(pins::Kind::Map, maps_dir, &maps::ALL)?;
    pins::discard_strangers(pins::Kind::Program, programs_dir, &programs::ALL)?;
    // A map that is missing will be made anew, and programs that are there know the one before.
    let current = pinned_build(&root) == Some(build_number()) && are_pinned(&root);
    let mut object = EbpfLoader::new();
    let mut object =
        object.default_map_pin_directory(maps_dir).load(OBJECT).context("load of the eBPF object")?;
    let shown = cgroup.map_or_else(|| "the root control group".into(), Path::to_string_lossy);
    let directory = match cgroup {
        Some(path) => File::open(path),
        None => unmounted_root(),
    };
    let directory = directory.with_context(|| format!("open of {shown}"))?;
    let id = directory.metadata().with_context(|| format!("look at {shown}"))?.ino();
    for name in programs::ALL {
        let pin = programs_dir.join(name);
        let there = link(&root, name).filter(|link| link.cgroup == id);
        if current && there.is_some_and(|link| program_id(&pin).is_ok_and(|wanted| link.program_id == wanted))
        {
            continue;
        }
        let program =
            object.program_mut(name).with_context(|| format!("the object has no program {name}"))?;
        let program: &mut CgroupSockAddr = program.try_into()?;
        program.load().map_err(|error| refused(name, &error))?;
        // Beside what is there, which goes with the pin that is renamed over: for a moment
        // both judge, and both say the same.
        let attached = program
            .attach(&directory, CgroupAttachMode::Single)
            .with_context(|| format!("attach {name} to {shown}"))?;
        let attached: FdLink = program.take_link(attached)?.try_into()?;
        pin_over(&links_dir.join(name), |pin| attached.pin(pin).map(drop).map_err(Into::into))?;
        pin_over(&pin, |pin| Ok(program.pin(pin)?))?;
    }
    let map = object.map_mut(maps::BUILD).context("the object has no map BUILD")?;
    Array::try_from(map)?.set(0, build_number(), 0).context("write of the build number")?;
    pins::remove_others(&root)
}

/// Takes the guard away, also what a loader left half done or another version made.
/// `false`: there was nothing.
pub fn release(pin_dir: &Path) -> anyhow::Result<bool> {
    if let Ok(Some(guard)) = Guard::open(pin_dir)
        && let Ok(known) = guard.guard.get(&0, 0)
    {
        set_nonlocal(known.nonlocal, false);
    }
    let own = root(pin_dir);
    let mut found = pins::others(&own)?;
    found.extend(Some(own).filter(|own| own.exists()));
    for root in &found {
        fs::remove_dir_all(root).with_context(|| format!("removal of {}", root.display()))?;
    }
    // Stays where the counters still have pins.
    let _ = fs::remove_dir(pin_dir);
    Ok(!found.is_empty())
}

/// The control group that the guard is put on: the given one, or the root of the unified
/// hierarchy as far as we see it. `None`: it is mounted nowhere that we see, which is no
/// reason to be without it.
///
/// # Errors
/// The given one is none of version 2.
pub fn cgroup(given: Option<&Path>) -> anyhow::Result<Option<PathBuf>> {
    const CGROUP2_MAGIC: u64 = 0x6367_7270;
    let unified = |path: &Path| {
        rustix::fs::statfs(path).is_ok_and(|stat| stat.f_type as u64 & 0xffff_ffff == CGROUP2_MAGIC)
    };
    match given {
        Some(path) if unified(path) => Ok(Some(path.to_path_buf())),
        Some(path) => bail!("{} is no control group of version 2", path.display()),
        // `ip netns exec` mounts a /sys of its own, without control groups.
        None => Ok(["", "/proc/1/root"]
            .iter()
            .flat_map(|root| ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"].map(|path| format!("{root}{path}")))
            .map(PathBuf::from)
            .find(|path| unified(path))),
    }
}

/// The hierarchy's root without a mount point: there is one hierarchy of version 2 in a
/// kernel, wherever it is mounted. Linux 5.2, CAP_SYS_ADMIN.
fn unmounted_root() -> io::Result<File> {
    use rustix::fs::{Mode, OFlags, openat};
    use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsmount, fsopen};
    let context = fsopen(c"cgroup2", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_create(context.as_fd())?;
    let mount = fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty())?;
    Ok(openat(mount, c".", OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?.into())
}

/// What this host looks like to the guard. `links`: `None` where they were not read yet.
pub fn surroundings(policy: &Policy, links: Option<&[Link]>) -> anyhow::Result<Surroundings> {
    let netns = sys::netns::cookie().context("this kernel tells no network namespace apart (5.14 does)")?;
    let path = "/proc/sys/net/ipv4/ip_local_port_range";
    let range = fs::read_to_string(path).with_context(|| format!("read of {path}"))?;
    let mut numbers = range.split_whitespace().map(str::parse::<u16>);
    let (Some(Ok(first)), Some(Ok(last))) = (numbers.next(), numbers.next()) else {
        bail!("{path} is no range of ports");
    };
    let doors = || {
        let links = links.unwrap_or_default().iter();
        links.filter(|link| !link.loopback && policy.scope_of(&link.name) == Some(Scope::Public))
    };
    let public = doors().flat_map(|link| link.addresses.iter().map(|net| net.addr()));
    Ok(Surroundings {
        netns,
        ephemeral: [first, last],
        public: public.filter(|address| !policy.mesh.address.contains(address)).collect(),
        doors: doors().map(|link| link.index).collect(),
    })
}

/// Refused binds as they come. Opening attaches nothing; a full ring loses wakes only.
pub struct BindEvents {
    ring: AsyncFd<RingBuf<MapData>>,
}

impl BindEvents {
    /// From the pins below this directory, inside a tokio runtime.
    pub fn open(pin_dir: &Path) -> anyhow::Result<Self> {
        let pin = root(pin_dir).join("maps").join(maps::WAKES);
        let mut ring =
            RingBuf::try_from(Map::RingBuf(MapData::from_pin(&pin)?)).context("map of bind events")?;
        // Left over from another daemon; whoever opens this is about to look anyway.
        while ring.next().is_some() {}
        Ok(Self { ring: sys::bpf::poll_ring(ring).context("poll of the bind events")? })
    }

    /// Waits for at least one; says who each was, while the process may still be asked.
    /// Cancelling loses none.
    pub async fn next(&mut self) -> io::Result<Vec<Actor>> {
        let mut ready = self.ring.readable_mut().await?;
        let ring = ready.get_inner_mut();
        let (mut actors, mut taken) = (Vec::<Actor>::new(), 0);
        while taken < WAKES_AT_ONCE {
            let Some(item) = ring.next() else { break };
            taken += 1;
            let Some((attempt, pid, cgroup)) = decode_wake(&item) else { continue };
            if !actors.iter().any(|known| known.pid == pid) {
                actors.push(who(pid, &attempt.process, cgroup));
            }
        }
        if taken < WAKES_AT_ONCE {
            ready.clear_ready();
        }
        Ok(actors)
    }
}

const WAKES_AT_ONCE: usize = 64;

/// What somebody wanted to bind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::source) struct Attempt {
    proto: Proto,
    address: IpAddr,
    port: Port,
    audited: bool,
    process: String,
}

impl Attempt {
    fn decode(key: &RefusalKey) -> Option<Self> {
        let comm = key.comm.split(|byte| *byte == 0).next().unwrap_or_default();
        Some(Self {
            proto: match key.proto {
                bind::TCP => Proto::Tcp,
                bind::UDP => Proto::Udp,
                _ => return None,
            },
            address: Ipv6Addr::from(key.address).to_canonical(),
            port: Port::new(key.port)?,
            audited: match key.outcome {
                outcome::REFUSED => false,
                outcome::AUDITED => true,
                _ => return None,
            },
            process: printable(&String::from_utf8_lossy(comm), 16),
        })
    }
}

pub(in crate::source) fn decode_wake(bytes: &[u8]) -> Option<(Attempt, u32, u64)> {
    if bytes.len() < size_of::<Wake>() {
        return None;
    }
    let key = RefusalKey {
        address: bytes.get(..16)?.try_into().ok()?,
        comm: bytes.get(16..32)?.try_into().ok()?,
        port: u16::from_ne_bytes(bytes.get(32..34)?.try_into().ok()?),
        proto: *bytes.get(34)?,
        outcome: *bytes.get(35)?,
    };
    let pid = u32::from_ne_bytes(bytes.get(36..40)?.try_into().ok()?);
    let cgroup = u64::from_ne_bytes(bytes.get(40..48)?.try_into().ok()?);
    Some((Attempt::decode(&key)?, pid, cgroup))
}

/// The process with its unit and login user: its own while it lives (its number may be another's by now),
/// else that of the control group that it was in, if that still stands.
fn who(pid: u32, process: &str, cgroup: u64) -> Actor {
    let comm = fs::read(format!("/proc/{pid}/comm")).unwrap_or_default();
    let comm = String::from_utf8_lossy(comm.strip_suffix(b"\n").unwrap_or(&comm)).into_owned();
    let lives = printable(&comm, 16) == process;
    let known = if lives { owners::actor(pid, process) } else { owners::stranger(pid, process) };
    let unit = known.unit.or_else(|| owners::unit_in_cgroup(&cgroup_path(cgroup)?));
    Actor { unit, ..known }
}

/// Where the control group of this inode is, below the root. Looks at a bounded number.
fn cgroup_path(inode: u64) -> Option<String> {
    const GROUPS_MAX: usize = 4096;
    let root = cgroup(None).ok()??;
    let mut waiting = vec![root.clone()];
    for _ in 0..GROUPS_MAX {
        let group = waiting.pop()?;
        if fs::metadata(&group).is_ok_and(|meta| meta.ino() == inode) {
            return Some(format!("/{}", group.strip_prefix(&root).ok()?.display()));
        }
        let inner = fs::read_dir(&group).into_iter().flatten().flatten();
        waiting.extend(inner.filter(|e| e.file_type().is_ok_and(|kind| kind.is_dir())).map(|e| e.path()));
    }
    None
}

/// sshd may start before the tunnel has its address: then the address that it is moved to is
/// not there yet, binding it would fail, and sshd give up. Each switch has a bit.
const NONLOCAL: [(u32, &str); 2] =
    [(1, "/proc/sys/net/ipv4/ip_nonlocal_bind"), (2, "/proc/sys/net/ipv6/ip_nonlocal_bind")];

/// The bits of those that are off. Others are on already, or there is no such family here.
fn nonlocal_off() -> u32 {
    let is_off = |path| fs::read_to_string(path).is_ok_and(|text| text.trim() == "0");
    NONLOCAL.iter().filter(|(_, path)| is_off(path)).fold(0, |bits, (bit, _)| bits | bit)
}

/// A switch that can't be moved is no reason to leave the rest undone.
fn set_nonlocal(bits: u32, on: bool) {
    for (_, path) in NONLOCAL.iter().filter(|(bit, _)| bits & bit != 0) {
        if let Err(error) = fs::write(path, if on { "1" } else { "0" }) {
            log::warn!("write of {path}: {error}");
        }
    }
}

/// Everything of one ABI lies below this.
fn root(pin_dir: &Path) -> PathBuf {
    pin_dir.join(format!("binds{}", bind::ABI))
}

/// The hash of the embedded object; never 0, which stands for "not complete".
fn build_number() -> u64 {
    env!("SPOKEGUARD_BIND_BUILD").parse().unwrap_or(0).max(1)
}

fn are_pinned(root: &Path) -> bool {
    pins::are_ours(pins::Kind::Map, &root.join("maps"), &maps::ALL)
        && pins::are_ours(pins::Kind::Program, &root.join("programs"), &programs::ALL)
}

fn pinned_build(root: &Path) -> Option<u64> {
    let map = MapData::from_pin(root.join("maps").join(maps::BUILD)).ok()?;
    Array::<_, u64>::try_from(Map::Array(map)).ok()?.get(&0, 0).ok()
}

fn program_id(pin: &Path) -> anyhow::Result<u32> {
    Ok(ProgramInfo::from_pin(pin).with_context(|| format!("open of {}", pin.display()))?.id())
}

fn link(root: &Path, name: &str) -> Option<sys::bpf::CgroupLink> {
    let link = sys::bpf::open_pin(&root.join("links").join(name)).ok()?;
    sys::bpf::cgroup_link(link.as_fd()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wake_is_decoded_and_nonsense_is_not() {
        let mut bytes = Vec::new();
        bytes.extend(bind::mapped([203, 0, 113, 7]));
        bytes.extend(b"post\x1b[2Jgres\0\0\0\0\0");
        bytes.truncate(32);
        bytes.extend(5432u16.to_ne_bytes());
        bytes.extend([bind::TCP, outcome::REFUSED]);
        bytes.extend(812u32.to_ne_bytes());
        bytes.extend(77u64.to_ne_bytes());
        let (attempt, pid, cgroup) = decode_wake(&bytes).expect("a wake");
        assert_eq!((pid, cgroup, attempt.port.get()), (812, 77, 5432));
        assert_eq!(attempt.address.to_string(), "203.0.113.7");
        assert_eq!(attempt.process, "post\u{fffd}[2Jgres");
        for (at, byte) in [(34, 2), (35, outcome::MOVED), (35, 9)] {
            let mut bytes = bytes.clone();
            bytes[at] = byte;
            assert_eq!(decode_wake(&bytes), None, "byte {at} is {byte}");
        }
        assert_eq!(decode_wake(&bytes[..47]), None);
    }

    #[test]
    fn where_nothing_is_pinned_there_is_no_guard_and_that_is_no_blindness() {
        let nowhere = Path::new("/proc/self/nothing-is-pinned-here");
        assert_eq!(read(nowhere, sys::clock::now()), Reading::Seen(Binds::default()));
        assert!(!release(nowhere).expect("nothing to do"));
    }

    #[test]
    fn only_a_control_group_of_version_2_will_do() {
        assert!(cgroup(Some(Path::new("/proc"))).is_err() && cgroup(Some(Path::new("/no/such"))).is_err());
    }
}
