//! Modes of the files that the policy names, by stat.

use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;

use anyhow::Context;

use crate::observed::FileMode;
use crate::policy::FileRule;

/// In the order of the policy. A symbolic link tells its target's mode, since that is what
/// a reader gets; a link to nothing is no file.
pub fn read(rules: &[FileRule]) -> anyhow::Result<Vec<FileMode>> {
    rules
        .iter()
        .map(|rule| {
            let path = rule.path.clone();
            match std::fs::metadata(&path) {
                Ok(meta) => Ok(FileMode { path, mode: Some(meta.mode() & 0o7777), uid: meta.uid() }),
                Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
                    Ok(FileMode { path, mode: None, uid: 0 })
                }
                Err(error) => Err(error).with_context(|| format!("read the mode of {}", path.display())),
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    #[test]
    fn modes_are_those_of_the_target_and_absence_is_not_an_error() {
        let folder = tempfile::tempdir().expect("a folder");
        let at = |name: &str| folder.path().join(name);
        std::fs::write(at("secret"), "x").expect("written");
        std::fs::set_permissions(at("secret"), PermissionsExt::from_mode(0o4640)).expect("chmod");
        symlink(at("secret"), at("link")).expect("a link");
        symlink(at("nowhere"), at("dangling")).expect("a link");
        symlink(at("loop"), at("loop")).expect("a link");
        let rule = |name: &str| FileRule { path: at(name), mode: 0o600 };

        let found = read(&[rule("link"), rule("secret"), rule("dangling"), rule("absent"), rule("secret/x")])
            .expect("read");
        let modes: Vec<_> = found.iter().map(|file| file.mode).collect();
        assert_eq!(modes, [Some(0o4640), Some(0o4640), None, None, None]);
        assert_eq!(found[0].path, at("link"));

        let error = format!("{:#}", read(&[rule("secret"), rule("loop")]).expect_err("a loop of links"));
        assert!(error.contains("loop") && error.contains("read the mode"), "{error}");
    }
}
