//! The two archives: a tar for every Linux and a package for Debian, from one folder of files.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use super::{Arch, Source, said};

/// What goes with a program by law and custom.
#[derive(Default)]
pub struct Papers {
    /// CycloneDX, as JSON.
    pub bill: String,
    pub licences: String,
}

/// Every file of both archives, laid out below `target/TRIPLE/release` as cargo-deb looks for them; the paths
/// within are said in [package.metadata.deb] of sidecar/Cargo.toml.
pub struct Stage {
    pub version: String,
    arch: Arch,
    epoch: u64,
    manifest: PathBuf,
    /// What cargo-deb takes for cargo's target folder.
    target: PathBuf,
    folder: PathBuf,
}

/// Completions by shell, under the names that the shells look for.
const SHELLS: [(&str, &str); 3] =
    [("bash", "spokeguard.bash"), ("zsh", "_spokeguard"), ("fish", "spokeguard.fish")];

/// Files of the tree that are shipped as they are.
const PLAIN: [&str; 5] = ["README.md", "CHANGELOG.md", "LICENSE-MIT", "LICENSE-APACHE", "examples"];

impl Stage {
    pub fn new(source: &Source, arch: Arch, program: &Path, papers: &Papers) -> Result<Stage> {
        let target = source.target.join(format!("package-{}", arch.name()));
        // What an earlier build had and this one hasn't must not be shipped.
        let _ = fs::remove_dir_all(&target);
        let release = target.join(arch.triple()).join("release");
        let stage = Stage {
            version: super::version_of(&source.tree)?,
            arch,
            epoch: source.epoch,
            manifest: source.tree.join("sidecar/Cargo.toml"),
            folder: release.join("package"),
            target,
        };
        let folder = &stage.folder;
        for name in ["man", "completions", "systemd", "debian"] {
            fs::create_dir_all(folder.join(name)).with_context(|| format!("create {name}"))?;
        }
        fs::copy(program, release.join("spokeguard")).context("copy the program")?;
        fs::copy(program, folder.join("spokeguard")).context("copy the program")?;

        // Nothing of this machine's environment gets into a page.
        let path = std::env::var_os("PATH").unwrap_or_default();
        let ask = |words: &[&str]| said(arch.run(program).args(words).env_clear().env("PATH", &path));
        ask(&["man", "--dir", &folder.join("man").display().to_string()])?;
        for (shell, name) in SHELLS {
            stage.write(&format!("completions/{name}"), &ask(&["completions", shell])?)?;
        }
        for name in PLAIN {
            copy(&source.tree.join(name), &folder.join(name))?;
        }
        copy(&source.tree.join("contrib/systemd"), &folder.join("systemd"))?;
        stage.write("sbom.cdx.json", &papers.bill)?;
        stage.write("LICENSES-THIRD-PARTY.txt", &papers.licences)?;
        stage.write("debian/changelog", &stage.changelog()?)?;
        copy(&folder.join("man"), &folder.join("debian/man"))?;
        // cargo-deb would do it, too, but not where it is to be quick.
        said(Command::new("gzip").args(["-9nr", "man", "changelog"]).current_dir(folder.join("debian")))?;
        stage.units()?;
        Ok(stage)
    }

    fn write(&self, name: &str, text: &str) -> Result<()> {
        fs::write(self.folder.join(name), text).with_context(|| format!("write {name}"))
    }

    /// The units of the package, which name programs by their full paths: another one of the same name in
    /// /usr/local is not meant.
    fn units(&self) -> Result<()> {
        let folder = self.folder.join("debian/systemd");
        copy(&self.folder.join("systemd"), &folder)?;
        for name in super::files(&folder)?.iter().filter(|name| name.ends_with(".service")) {
            let text = fs::read_to_string(folder.join(name)).with_context(|| format!("read {name}"))?;
            let text = text
                .replace("ExecStart=spokeguard ", "ExecStart=/usr/bin/spokeguard ")
                .replace("ExecStart=nft ", "ExecStart=/usr/sbin/nft ")
                .replace("ExecStart=-nft ", "ExecStart=-/usr/sbin/nft ");
            fs::write(folder.join(name), text).with_context(|| format!("write {name}"))?;
        }
        Ok(())
    }

    /// Debian wants one in its own form; what changed is in ours.
    fn changelog(&self) -> Result<String> {
        let at = said(
            Command::new("date").env("LC_ALL", "C").args(["-u", "-R", "-d"]).arg(format!("@{}", self.epoch)),
        )?;
        Ok(format!(
            "spokeguard ({}) unstable; urgency=medium\n\n  * See CHANGELOG.md beside this file.\n\n -- {MAINTAINER}  {at}",
            self.version
        ))
    }

    /// The tar, with folders and times that say nothing of this machine; quick ones are larger.
    pub fn tar(&self, out: &Path, quick: bool) -> Result<()> {
        let name = format!("spokeguard-{}-{}", self.version, self.arch.name());
        let file = std::path::absolute(out.join(format!("{name}.tar.gz"))).context("a folder's path")?;
        let mut tar = Command::new("tar");
        tar.current_dir(&self.folder).env("LC_ALL", "C");
        tar.args(["--sort=name", "--format=gnu", "--owner=0", "--group=0", "--numeric-owner"]);
        tar.args(["--mode=u+rw,go=rX", "--exclude=./debian"]);
        tar.arg(format!("--use-compress-program=gzip -{}n", if quick { 1 } else { 9 }));
        tar.arg(format!("--mtime=@{}", self.epoch)).arg(format!("--transform=s,^\\.,{name},"));
        tar.arg("--create").arg("--file").arg(&file).arg(".");
        said(&mut tar).map(|_| ())
    }

    /// The package for Debian; quick ones are larger.
    pub fn deb(&self, out: &Path, quick: bool) -> Result<PathBuf> {
        let name = format!("spokeguard_{}_{}.deb", self.version, self.arch.debian());
        let file = std::path::absolute(out.join(name)).context("a folder's path")?;
        let mut deb = Command::new(crate::setup::find("cargo-deb").context("cargo-deb is missing")?);
        super::clean(&mut deb);
        deb.env("CARGO", super::CARGO).env("SOURCE_DATE_EPOCH", self.epoch.to_string()).env("LC_ALL", "C");
        deb.args(["--no-build", "--no-strip", "--locked", "--target", self.arch.triple(), "--manifest-path"]);
        deb.arg(&self.manifest).arg("--output").arg(&file).env("CARGO_TARGET_DIR", &self.target);
        if quick {
            deb.arg("--fast");
        }
        said(&mut deb)?;
        ensure!(file.is_file(), "cargo-deb made no {}", file.display());
        Ok(file)
    }
}

/// As in [package.metadata.deb].
const MAINTAINER: &str = "The spokeguard authors <spokeguard@example.org>";

/// A file, or a folder with all that is in it.
pub fn copy(from: &Path, to: &Path) -> Result<()> {
    if !from.is_dir() {
        return fs::copy(from, to).map(|_| ()).with_context(|| format!("copy {}", from.display()));
    }
    fs::create_dir_all(to).with_context(|| format!("create {}", to.display()))?;
    super::files(from)?.iter().try_for_each(|name| copy(&from.join(name), &to.join(name)))
}
