//! Files put in place as a whole: a reader, and whoever comes back after a power cut, finds
//! either the old content or the new.

use std::ffi::OsString;
use std::fs::{self, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// By one rename in a folder that is there; a new file has this mode, less the process's mask.
pub fn replace(path: &Path, content: &[u8], mode: u32) -> io::Result<()> {
    let (Some(folder), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(io::Error::new(ErrorKind::InvalidInput, format!("{} is not a file", path.display())));
    };
    // With the process's number in it, so that the daemon and a command never share one.
    let mut temporary = OsString::from(".");
    temporary.push(name);
    temporary.push(format!(".{}", std::process::id()));
    let temporary = folder.join(temporary);
    let written = (|| {
        let mut file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(mode)
            .custom_flags(libc::O_NOFOLLOW)
            .open(&temporary)?;
        file.write_all(content)?;
        // Without it, some file systems order the rename before the content.
        file.sync_data()?;
        fs::rename(&temporary, path)
    })();
    written.inspect_err(|_| {
        let _ = fs::remove_file(&temporary);
    })
}

/// For the owner alone, in a folder that is made where there is none.
pub fn replace_private(path: &Path, content: &[u8]) -> io::Result<()> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder)?;
    }
    replace(path, content, 0o600)
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Read;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_state_file_is_replaced_as_a_whole() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("deep/first-seen.json");
        replace(&path, b"none", 0o600).expect_err("no folder is there");
        replace_private(&path, b"one").expect("write");
        let mut held = File::open(&path).expect("open");
        replace_private(&path, b"two").expect("write");
        // Whoever read the old one goes on reading the old one.
        let mut old = String::new();
        held.read_to_string(&mut old).expect("read");
        assert_eq!((old.as_str(), fs::read(&path).expect("read").as_slice()), ("one", &b"two"[..]));
        assert_eq!(fs::metadata(&path).expect("metadata").permissions().mode() & 0o777, 0o600);
        // A failure leaves neither a new file nor a temporary one.
        fs::create_dir(dir.path().join("deep/taken")).expect("create");
        replace_private(&dir.path().join("deep/taken"), b"x").expect_err("a directory is there");
        assert_eq!(fs::read_dir(dir.path().join("deep")).expect("list").count(), 2);
        replace_private(Path::new("/"), b"x").expect_err("not a file");
    }
}
