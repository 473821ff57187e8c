//! The file of what a restart must not cost ([`Kept`]): read once, written whole whenever it
//! changes, by a thread that nobody waits for.

use std::fs::{self, OpenOptions};
use std::io::{self, Read as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::Instant;

use crate::heartbeat::{Kept, kept};
use crate::sys::file;

const FILE: &str = "notices.json";
/// Where the last one lies that could not be read.
const ASIDE: &str = "notices.json.unreadable";
/// A disk that took nothing is tried again after this.
const AGAIN: Duration = Duration::from_secs(10);

type Written = io::Result<()>;

/// What lies on the disk, as far as is known.
pub(super) struct Keeping {
    file: PathBuf,
    /// `None`: not known, or out of date.
    written: Option<Kept>,
    writing: Option<oneshot::Receiver<Written>>,
    rest_until: Instant,
}

impl Keeping {
    pub fn new(state: &Path) -> Self {
        let file = state.join(FILE);
        Self { file, written: Some(Kept::default()), writing: None, rest_until: Instant::now() }
    }

    /// What an earlier process left; nothing where there is no file. One that makes no sense is
    /// set aside: the error says where, and the next write begins anew.
    pub fn read(&mut self) -> Result<Kept, String> {
        let mut bytes = Vec::new();
        let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
        let read = OpenOptions::new().read(true).custom_flags(flags).open(&self.file);
        let read = read.and_then(|file| file.take(kept::BYTES_MAX + 1).read_to_end(&mut bytes));
        let found = match read {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Kept::default()),
            Err(error) => Err(error.to_string()),
            Ok(_) => Kept::from_json(&bytes),
        };
        match found {
            Ok(kept) => {
                self.written = Some(kept.clone());
                Ok(kept)
            }
            Err(why) => {
                self.written = None;
                let aside = self.file.with_file_name(ASIDE);
                let file = self.file.display();
                Err(match fs::rename(&self.file, &aside) {
                    Ok(()) => format!("{file}: {why}; set aside as {}", aside.display()),
                    Err(error) => format!("{file}: {why}; it can't be set aside: {error}"),
                })
            }
        }
    }

    /// Nobody is to be told any more.
    pub fn forget(&self) {
        let _ = fs::remove_file(&self.file);
    }

    /// Begins to write this, unless it lies there already or another write is under way.
    pub fn keep(&mut self, kept: Kept) {
        if self.writing.is_some() || self.written.as_ref() == Some(&kept) || Instant::now() < self.rest_until
        {
            return;
        }
        let (tell, told) = oneshot::channel();
        let (file, content) = (self.file.clone(), kept.clone());
        self.written = Some(kept);
        let write = move || drop(tell.send(write(&file, &content)));
        match std::thread::Builder::new().name("notices".into()).spawn(write) {
            Ok(_) => self.writing = Some(told),
            Err(error) => drop(self.ended(Err(error))),
        }
    }

    /// The end of what [`Self::keep`] began; never, where nothing is under way. Cancel safe.
    pub async fn done(&mut self) -> Written {
        match &mut self.writing {
            Some(writing) => writing.await.unwrap_or_else(|_| Err(io::Error::other("its thread is gone"))),
            None => std::future::pending().await,
        }
    }

    /// Takes note of it. The error names the file.
    pub fn ended(&mut self, written: Written) -> Result<(), String> {
        self.writing = None;
        written.map_err(|error| {
            self.written = None;
            self.rest_until = Instant::now() + AGAIN;
            format!("notices that wait are not kept over a restart: {}: {error}", self.file.display())
        })
    }
}

fn write(path: &Path, kept: &Kept) -> Written {
    if !kept.is_empty() {
        return file::replace_private(path, &kept.to_json());
    }
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}
