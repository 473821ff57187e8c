//! Keeps audits apart that share a run directory, and leaves that directory as it was.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use rustix::fs::FlockOperation;

use super::SweepError;

/// The right to sweep; given back when dropped, or by the kernel.
pub struct Lock {
    path: PathBuf,
    _file: File,
    /// Made for the lock's sake, so it goes with it.
    folder: Option<PathBuf>,
}

impl Lock {
    pub fn take(run_dir: &Path) -> anyhow::Result<Self> {
        let create = || format!("create {}", run_dir.display());
        if let Some(above) = run_dir.parent() {
            std::fs::create_dir_all(above).with_context(create)?;
        }
        let folder = match std::fs::create_dir(run_dir) {
            Ok(()) => Some(run_dir.to_owned()),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => None,
            Err(error) => return Err(error).with_context(create),
        };
        let path = run_dir.join("audit.lock");
        loop {
            let file = File::options().create(true).truncate(false).write(true).open(&path);
            let file = file.with_context(|| format!("open {}", path.display()))?;
            match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
                // Its last holder may have removed it since it was opened.
                Ok(()) if is_there(&path, &file) => return Ok(Self { path, _file: file, folder }),
                Ok(()) => {}
                Err(rustix::io::Errno::WOULDBLOCK) => bail!(SweepError::Busy(path)),
                Err(error) => {
                    return Err(io::Error::from(error)).with_context(|| format!("lock {}", path.display()));
                }
            }
        }
    }
}

fn is_there(path: &Path, file: &File) -> bool {
    match (std::fs::metadata(path), file.metadata()) {
        (Ok(named), Ok(held)) => (named.dev(), named.ino()) == (held.dev(), held.ino()),
        _ => false,
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        // While it is still held: whoever has opened it meanwhile looks again.
        let _ = std::fs::remove_file(&self.path);
        if let Some(folder) = &self.folder {
            // Unless somebody else has put something there.
            let _ = std::fs::remove_dir(folder);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_at_a_time_and_nothing_stays() {
        let above = tempfile::tempdir().expect("a folder");
        let run_dir = above.path().join("run");
        let first = Lock::take(&run_dir).expect("the lock");
        let error = Lock::take(&run_dir).err().expect("busy");
        assert!(matches!(error.downcast_ref(), Some(SweepError::Busy(_))), "{error:#}");
        drop(first);
        assert!(!run_dir.exists());
        std::fs::create_dir(&run_dir).expect("a folder of somebody else");
        drop(Lock::take(&run_dir).expect("the lock"));
        assert!(run_dir.exists() && !run_dir.join("audit.lock").exists());
    }

    #[test]
    fn no_two_hold_it_however_they_hurry() {
        use std::sync::atomic::{AtomicU32, Ordering};
        let above = tempfile::tempdir().expect("a folder");
        let run_dir = above.path().join("run");
        std::fs::create_dir(&run_dir).expect("a folder");
        let (inside, taken) = (AtomicU32::new(0), AtomicU32::new(0));
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..500 {
                        if let Ok(lock) = Lock::take(&run_dir) {
                            assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0);
                            taken.fetch_add(1, Ordering::SeqCst);
                            inside.fetch_sub(1, Ordering::SeqCst);
                            drop(lock);
                        }
                    }
                });
            }
        });
        assert!(taken.load(Ordering::SeqCst) > 0);
    }
}
