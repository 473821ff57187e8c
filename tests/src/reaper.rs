//! Ends a lab: every process in its namespaces, the namespaces, its folder.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::mount::{UnmountFlags, unmount};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

#[cfg(feature = "product")]
use crate::node::inside;

const NAMED: &str = "/run/netns";

/// Device and inode name a namespace: a process belongs to the lab when its network namespace does.
type Namespace = (u64, u64);

/// Ends everything whose namespace name starts with `prefix`, then removes `dir`.
pub fn reap(prefix: &str, dir: &Path) {
    let names = named(prefix);
    let mut namespaces: BTreeSet<Namespace> =
        names.iter().filter_map(|name| identity(&format!("{NAMED}/{name}"))).collect();
    // A name whose mount has gone is an ordinary file; one that leads here must never be reaped.
    if let Some(own) = identity("/proc/self/ns/net") {
        namespaces.remove(&own);
    }
    let deadline = Instant::now() + Duration::from_secs(5);
    while !namespaces.is_empty() && end_residents(&namespaces) > 0 {
        if Instant::now() > deadline {
            eprintln!("lab {prefix}: processes are left after 5 s");
            break;
        }
    }
    for name in names {
        let path = format!("{NAMED}/{name}");
        #[cfg(feature = "product")]
        forget_instance(Path::new(&path));
        if let Err(error) = unmount(&path, UnmountFlags::DETACH) {
            eprintln!("lab {prefix}: unmount {path}: {error}");
        }
        if let Err(error) = fs::remove_file(&path) {
            eprintln!("lab {prefix}: remove {path}: {error}");
        }
    }
    // A container's init makes itself one in systemd's old hierarchy as well, where there is that.
    let old = Path::new("/sys/fs/cgroup/systemd").join(prefix.trim_end_matches('-'));
    let groups = [cgroup(prefix), memory_group(prefix), Some(old)];
    for group in groups.into_iter().flatten().filter(|group| group.exists()) {
        if let Err(error) = remove_cgroup(&group) {
            eprintln!("lab {prefix}: remove {}: {error}", group.display());
        }
    }
    if dir.exists()
        && let Err(error) = fs::remove_dir_all(dir)
    {
        eprintln!("lab {prefix}: remove {}: {error}", dir.display());
    }
}

/// Folders of the program where it was told of no others carry the number of the namespace, which none will ever have
/// again.
#[cfg(feature = "product")]
fn forget_instance(namespace: &Path) {
    let Ok(Some(instance)) = inside(namespace, || Ok(spokeguard::sys::netns::instance_suffix())) else {
        return;
    };
    for parent in ["/run/spokeguard", "/var/lib/spokeguard"].map(Path::new) {
        // Its parent stays: another lab may be about to make one in it.
        let _ = fs::remove_dir_all(parent.join(&instance));
    }
}

/// With the groups that a test made in it. Whoever was killed in it may take a while to be gone.
fn remove_cgroup(group: &Path) -> std::io::Result<()> {
    let deadline = Instant::now() + Duration::from_secs(2);
    loop {
        match remove_empty(group) {
            Err(error) if error.kind() == std::io::ErrorKind::ResourceBusy && Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(10));
            }
            done => return done,
        }
    }
}

fn remove_empty(group: &Path) -> std::io::Result<()> {
    for inner in fs::read_dir(group)?.flatten().filter(|entry| entry.path().is_dir()) {
        remove_empty(&inner.path())?;
    }
    fs::remove_dir(group)
}

/// Where a lab's control group is, or will be: below the root of the unified hierarchy.
pub(crate) fn cgroup(prefix: &str) -> Option<PathBuf> {
    let roots = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"];
    let root = roots
        .iter()
        .map(Path::new)
        .find(|root| root.join("cgroup.procs").is_file() && root.join("cgroup.controllers").is_file())?;
    Some(root.join(prefix.trim_end_matches('-')))
}

/// Where a group of the lab's with a bound on its memory may be; none where the machine has no such groups, or
/// does not hand them on.
pub(crate) fn memory_group(prefix: &str) -> Option<PathBuf> {
    let first = Path::new("/sys/fs/cgroup/memory");
    if first.join("memory.limit_in_bytes").is_file() {
        return Some(first.join(format!("{prefix}memory")));
    }
    let handed_on = fs::read_to_string("/sys/fs/cgroup/cgroup.subtree_control").ok()?;
    let has = handed_on.split_whitespace().any(|controller| controller == "memory");
    has.then(|| PathBuf::from(format!("/sys/fs/cgroup/{prefix}memory")))
}

/// Labs of programs that are no longer there, whose reaper was killed as well.
pub(crate) fn sweep() {
    let mut prefixes: BTreeSet<String> = named("sg-").iter().filter_map(|name| orphaned(name)).collect();
    let folders = fs::read_dir(std::env::temp_dir()).into_iter().flatten().flatten();
    prefixes.extend(folders.filter_map(|entry| orphaned(&format!("{}-", entry.file_name().to_str()?))));
    for prefix in prefixes {
        reap(&prefix, &std::env::temp_dir().join(prefix.trim_end_matches('-')));
    }
    for root in [cgroup(""), memory_group("").and_then(|group| Some(group.parent()?.to_path_buf()))] {
        for entry in root.into_iter().flat_map(fs::read_dir).flatten().flatten() {
            let name = entry.file_name();
            if name.to_str().is_some_and(|name| orphaned(&format!("{name}-")).is_some()) {
                // Fails while somebody is in it, such as a rollback's watchdog; then the next one removes it.
                let _ = fs::remove_dir(entry.path());
            }
        }
    }
}

/// The `sg-PID-N-` of a name, when PID is no longer running. Names of any other shape are not ours.
fn orphaned(name: &str) -> Option<String> {
    let mut parts = name.strip_prefix("sg-")?.splitn(3, '-');
    let pid: u32 = parts.next()?.parse().ok()?;
    let number: u32 = parts.next()?.parse().ok()?;
    parts.next()?;
    (!Path::new(&format!("/proc/{pid}")).exists()).then(|| format!("sg-{pid}-{number}-"))
}

fn named(prefix: &str) -> Vec<String> {
    let entries = fs::read_dir(NAMED).into_iter().flatten().flatten();
    entries
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|n| n.starts_with(prefix))
        .collect()
}

fn identity(path: &str) -> Option<Namespace> {
    fs::metadata(path).ok().map(|meta| (meta.dev(), meta.ino()))
}

/// Kills who lives there and waits for them; the number of those found. A pidfd is taken before the
/// second look, so that a number that was given to somebody else in between is never signalled.
fn end_residents(namespaces: &BTreeSet<Namespace>) -> usize {
    let lives_there =
        |pid: i32| identity(&format!("/proc/{pid}/ns/net")).is_some_and(|ns| namespaces.contains(&ns));
    let pids = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    let killed: Vec<_> = pids
        .filter(|pid| lives_there(*pid))
        .filter_map(|pid| {
            let handle = pidfd_open(Pid::from_raw(pid)?, PidfdFlags::empty()).ok()?;
            (lives_there(pid) && pidfd_send_signal(&handle, Signal::KILL).is_ok()).then_some(handle)
        })
        .collect();
    for handle in &killed {
        let limit = Timespec { tv_sec: 1, tv_nsec: 0 };
        let _ = poll(&mut [PollFd::new(handle, PollFlags::IN)], Some(&limit));
    }
    killed.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_of_programs_that_ended_are_orphans() {
        // Above the kernel's largest process number, so it cannot be running.
        assert_eq!(orphaned("sg-4194305-3-hub").as_deref(), Some("sg-4194305-3-"));
        assert_eq!(orphaned(&format!("sg-{}-3-hub", std::process::id())), None);
        for other in ["sg-4194305", "sg-lab-a", "sg-4194305-x-hub", "docker-4194305-3-hub"] {
            assert_eq!(orphaned(other), None, "{other}");
        }
    }
}
