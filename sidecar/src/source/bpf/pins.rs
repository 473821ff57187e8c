//! Where things are pinned: finding or mounting a bpffs, and the directory of this
//! instance below it.

use std::io;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use aya::maps::MapInfo;
use aya::programs::ProgramInfo;

use crate::sys;

pub const BPFFS: &str = "/sys/fs/bpf";
/// The directory below bpffs in the initial network namespace; others add a suffix.
pub const DIRECTORY: &str = "spokeguard";

const BPF_FS_MAGIC: u64 = 0xcafe_4a11;

/// The pin directory of this instance: the given one, or the default with a suffix where
/// this is not the initial network namespace. `mount`: mounts a bpffs if there is none.
/// `Ok(None)`: there is none and none was to be mounted.
pub fn pin_dir(given: Option<&Path>, mount: bool) -> anyhow::Result<Option<PathBuf>> {
    let below = match given {
        Some(path) => match path.strip_prefix(BPFFS) {
            Ok(below) => below.to_path_buf(),
            Err(_) => return Ok(Some(path.to_path_buf())),
        },
        None => PathBuf::from(match sys::netns::instance_suffix() {
            Some(suffix) => format!("{DIRECTORY}-{suffix}"),
            None => DIRECTORY.to_owned(),
        }),
    };
    let root = if mount { Some(ensure_bpffs()?) } else { find_bpffs() };
    Ok(root.map(|root| root.join(below)))
}

/// A bpffs, mounted if need be.
pub fn ensure_bpffs() -> anyhow::Result<PathBuf> {
    if let Some(found) = find_bpffs() {
        return Ok(found);
    }
    sys::bpf::mount_bpffs().with_context(|| format!("mount of a bpffs at {BPFFS} (needs CAP_SYS_ADMIN)"))?;
    find_bpffs().with_context(|| format!("a bpffs was mounted at {BPFFS} but can't be seen from here"))
}

/// The bpffs at its usual place, or at PID 1's: `ip netns exec` mounts a /sys of its own,
/// and pins in a private bpffs would be gone with the process.
pub fn find_bpffs() -> Option<PathBuf> {
    [PathBuf::from(BPFFS), Path::new("/proc/1/root").join(&BPFFS[1..])]
        .into_iter()
        .find(|path| is_bpffs(path))
}

fn is_bpffs(path: &Path) -> bool {
    // The type's width and sign differ by architecture; the magic is 32 bits.
    rustix::fs::statfs(path).is_ok_and(|stat| stat.f_type as u64 & 0xffff_ffff == BPF_FS_MAGIC)
}

/// Makes a directory and those above it, for root only; in place of a link or file of its name.
pub(super) fn make_dir(path: &Path) -> anyhow::Result<()> {
    use std::os::unix::fs::DirBuilderExt as _;
    for step in path.parent().into_iter().chain([path]) {
        if step.symlink_metadata().is_ok_and(|meta| !meta.is_dir()) {
            remove(step)?;
        }
    }
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .with_context(|| format!("directory {}", path.display()))
}

/// What other versions pinned beside this root: directories whose names differ in the number
/// at their end only.
pub(super) fn others(ours: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let name = |path: &Path| path.file_name().and_then(|name| name.to_str()).unwrap_or_default().to_owned();
    let (Some(dir), own) = (ours.parent(), name(ours)) else { return Ok(Vec::new()) };
    let kind = own.trim_end_matches(|c: char| c.is_ascii_digit());
    let entries = match std::fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error).with_context(|| format!("list of {}", dir.display())),
    };
    let is_another = |path: &PathBuf| {
        let number = name(path).strip_prefix(kind).map(str::parse::<u32>);
        matches!(number, Some(Ok(_))) && path != ours
    };
    Ok(entries.flatten().map(|entry| entry.path()).filter(is_another).collect())
}

/// Unpins; what isn't there needs no unpinning.
pub(super) fn remove(path: &Path) -> anyhow::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("unpin {}", path.display()))
        }
        _ => Ok(()),
    }
}

/// What is pinned, by the kernel's own name for it, which is the name that it was loaded by.
#[derive(Clone, Copy, Debug)]
pub(super) enum Kind {
    Map,
    Program,
}

/// Whether everything of these names is pinned there, and is what its name says, as far as we may look.
pub(super) fn are_ours(kind: Kind, dir: &Path, names: &[&str]) -> bool {
    names.iter().all(|name| is_ours(kind, &dir.join(name), name).unwrap_or(true))
}

/// Removes what lies under these names and is something else: another program's pin, a link, a
/// directory. What can't be looked at stays.
pub(super) fn discard_strangers(kind: Kind, dir: &Path, names: &[&str]) -> anyhow::Result<()> {
    for name in names {
        let pin = dir.join(name);
        if is_ours(kind, &pin, name) == Some(false) && pin.symlink_metadata().is_ok() {
            log::warn!("{} is not what we pinned there, and goes", pin.display());
            discard(&pin)?;
        }
    }
    Ok(())
}

/// Removes whatever lies there.
pub(super) fn discard(path: &Path) -> anyhow::Result<()> {
    if path.symlink_metadata().is_ok_and(|meta| meta.is_dir()) {
        return std::fs::remove_dir_all(path).with_context(|| format!("removal of {}", path.display()));
    }
    remove(path)
}

/// `None`: we are not allowed to look.
fn is_ours(kind: Kind, pin: &Path, name: &str) -> Option<bool> {
    match sys::bpf::open_pin(pin) {
        // EACCES says that it is nothing that can be pinned.
        Err(error) if error.raw_os_error() == Some(libc::EPERM) => return None,
        Err(_) => return Some(false),
        Ok(_) => {}
    }
    Some(match kind {
        Kind::Map => MapInfo::from_pin(pin).is_ok_and(|info| info.name_as_str() == Some(name)),
        Kind::Program => ProgramInfo::from_pin(pin).is_ok_and(|info| info.name_as_str() == Some(name)),
    })
}

/// Takes away what other versions pinned.
pub(super) fn remove_others(ours: &Path) -> anyhow::Result<()> {
    others(ours)?.iter().try_for_each(|other| {
        std::fs::remove_dir_all(other).with_context(|| format!("removal of {}", other.display()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_elsewhere_is_taken_as_it_is() {
        let given = Path::new("/mnt/bpf/mine");
        assert_eq!(pin_dir(Some(given), false).expect("no look-up"), Some(given.to_path_buf()));
    }

    #[test]
    fn of_other_versions_is_what_differs_in_its_number_alone() {
        let dir = tempfile::tempdir().expect("a directory");
        for name in ["guard1", "guard2", "guard17", "guards1", "guard", "guardx", "binds2"] {
            std::fs::create_dir(dir.path().join(name)).expect("create");
        }
        let ours = dir.path().join("guard1");
        let mut found = others(&ours).expect("a list");
        found.sort();
        assert_eq!(found, ["guard17", "guard2"].map(|name| dir.path().join(name)));
        remove_others(&ours).expect("removed");
        assert_eq!(std::fs::read_dir(dir.path()).expect("a list").count(), 5);
        assert!(others(Path::new("/no/such/guard1")).expect("nothing").is_empty());
    }

    #[test]
    fn what_lies_under_our_name_and_is_no_pin_goes() {
        let dir = tempfile::tempdir().expect("a directory");
        let at = |name: &str| dir.path().join(name);
        std::fs::create_dir(at("A")).expect("create");
        std::os::unix::fs::symlink("/", at("B")).expect("link");
        std::fs::write(at("other"), "").expect("write");
        // Not to be looked at without the right to: then all of it stays.
        if sys::bpf::open_pin(&at("A")).is_err_and(|error| error.raw_os_error() == Some(libc::EPERM)) {
            return;
        }
        assert!(!are_ours(Kind::Map, dir.path(), &["A"]));
        discard_strangers(Kind::Map, dir.path(), &["A", "B", "C"]).expect("gone");
        assert_eq!(std::fs::read_dir(dir.path()).expect("a list").count(), 1);
        // A directory is made in place of a link.
        std::os::unix::fs::symlink("/", at("guard1")).expect("link");
        make_dir(&at("guard1/maps")).expect("made");
        assert!(at("guard1").symlink_metadata().expect("there").is_dir());
    }

    #[test]
    fn an_ordinary_file_system_is_no_bpffs() {
        assert!(!is_bpffs(Path::new("/proc")) && !is_bpffs(Path::new("/no/such/place")));
    }

    #[test]
    fn the_default_differs_from_one_namespace_to_the_next() {
        let Some(found) = find_bpffs() else { return };
        let dir = pin_dir(None, false).expect("a look").expect("the bpffs just found");
        let name = match sys::netns::instance_suffix() {
            Some(suffix) => format!("spokeguard-{suffix}"),
            None => "spokeguard".to_owned(),
        };
        assert_eq!(dir, found.join(name));
    }
}
