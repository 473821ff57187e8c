//! Debian's packages, downloaded and unpacked but never installed: this machine stays as it is.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};

/// As Debian calls them.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Arch {
    Amd64,
    Arm64,
}

impl Arch {
    pub const ALL: [Arch; 2] = [Arch::Amd64, Arch::Arm64];
    /// This machine's.
    pub const HOST: Arch = if cfg!(target_arch = "aarch64") { Arch::Arm64 } else { Arch::Amd64 };

    pub fn name(self) -> &'static str {
        match self {
            Arch::Amd64 => "amd64",
            Arch::Arm64 => "arm64",
        }
    }

    /// The folder of its libraries.
    pub fn triple(self) -> &'static str {
        match self {
            Arch::Amd64 => "x86_64-linux-gnu",
            Arch::Arm64 => "aarch64-linux-gnu",
        }
    }
}

/// A package in the version that apt would install now.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Package {
    /// The file's name, as apt writes it: NAME_VERSION_ARCH.deb, with a version's colon as `%3a`.
    pub file: String,
    /// Of the file, where apt says it.
    pub checksum: String,
    size: u64,
}

impl Package {
    pub fn name(&self) -> &str {
        self.file.split('_').next().unwrap_or_default()
    }

    /// As `apt-get download` wants it.
    fn exact(&self) -> Result<String> {
        let mut words = self.file.trim_end_matches(".deb").split('_');
        let (Some(name), Some(version), Some(arch)) = (words.next(), words.next(), words.next()) else {
            bail!("{} is no package's file", self.file)
        };
        Ok(format!("{name}:{arch}={}", version.replace("%3a", ":")))
    }
}

/// These packages and all that they depend on, as on a machine where nothing is installed yet.
pub fn with_dependencies(arch: Arch, names: &[&str]) -> Result<Vec<Package>> {
    Archive::default().with_dependencies(arch, names)
}

/// The same of [`STABLE`], whatever release this machine has.
pub fn of_stable(arch: Arch, names: &[&str]) -> Result<Vec<Package>> {
    Archive::suite(arch, STABLE)?.with_dependencies(arch, names)
}

/// In place of a series: the newest kernel that Debian gives to users of its stable release, whatever its number.
pub const NEWEST: &str = "newest";
/// Debian's name for where that is, which moves on with its releases.
const NEWEST_SUITE: &str = "stable-backports";
/// And for the release whose users get that kernel.
pub const STABLE: &str = "stable";

/// A kernel on offer.
pub struct Offer {
    /// As `uname -r` says it: `6.12.117+deb12-cloud-amd64`.
    pub release: String,
    /// Its files are in one package, or in several (since 6.18).
    pub packages: Vec<Package>,
    archive: Archive,
}

impl Offer {
    /// Downloads what is not in `folder` yet.
    pub fn download(&self, arch: Arch, folder: &Path) -> Result<Vec<PathBuf>> {
        download_from(&self.archive, &self.packages, arch, folder)
    }
}

/// Debian's kernel of a series for virtual machines, such as `6.12`, or [`NEWEST`]. The package that stands for the
/// newest of a series changes its dependency with each update.
pub fn kernel(arch: Arch, series: &str) -> Result<Offer> {
    // Where it can't be started, every package looks as if there were none.
    assert_program("apt-cache", "apt")?;
    let arch_name = arch.name();
    let newest = series == NEWEST;
    let archive = if newest { Archive::suite(arch, NEWEST_SUITE)? } else { Archive::default() };
    for meta in [format!("linux-image-{series}-cloud-{arch_name}"), format!("linux-image-cloud-{arch_name}")]
    {
        let image = archive
            .needs(arch, &meta)
            .into_iter()
            .find(|name| name.strip_prefix("linux-image-").is_some_and(|rest| newest || is_of(rest, series)));
        let Some(image) = image else { continue };
        let release = image.trim_start_matches("linux-image-").to_owned();
        let mut names = archive.needs(arch, &image);
        names.retain(|name| name.ends_with(&format!("-{release}")));
        names.push(image);
        let mut command = archive.apt_get(arch);
        command.args(["--print-uris", "-qq", "download"]);
        command.args(names.iter().map(|name| format!("{name}:{arch_name}")));
        let packages: Vec<Package> = said(&mut command)?.lines().filter_map(listed).collect();
        ensure!(packages.len() == names.len(), "apt-get lists no file for one of {}", names.join(", "));
        return Ok(Offer { release, packages, archive });
    }
    ensure!(!newest, "{NEWEST_SUITE} of Debian has no linux-image-cloud-{arch_name}");
    let foreign = if arch == Arch::HOST { "" } else { "dpkg --add-architecture arm64; " };
    bail!(
        "apt offers no kernel {series} for {arch_name}, which would be linux-image-{series}-cloud-{arch_name} \
         ({foreign}apt-get update?)"
    )
}

/// The mirror of Debian that this machine uses.
pub fn mirror() -> Result<String> {
    let asked = "$(ORIGIN) $(COMPONENT) $(LABEL) $(REPO_URI)";
    let listed = said(Command::new("apt-get").args(["indextargets", "--format", asked]))?;
    let mirror = listed.lines().find_map(|line| line.strip_prefix("Debian main Debian "));
    mirror.map(str::to_owned).context("apt has no lists of Debian's main archive (apt-get update?)")
}

/// Where apt looks: as this machine is set up, or with lists of our own.
#[derive(Default)]
struct Archive {
    options: Vec<String>,
}

impl Archive {
    /// The same mirror of Debian that this machine uses, for one suite that it does not.
    fn suite(arch: Arch, suite: &str) -> Result<Archive> {
        Archive::of(&mirror()?, suite, arch, &crate::target().join("vm").join(suite).join(arch.name()))
    }

    /// A suite of a mirror, whose lists are renewed in `folder`. Where it can't be reached those at hand do.
    fn of(mirror: &str, suite: &str, arch: Arch, folder: &Path) -> Result<Archive> {
        for part in ["lists/partial", "cache/archives/partial"] {
            let path = folder.join(part);
            fs::create_dir_all(&path).with_context(|| format!("create {}", path.display()))?;
        }
        let sources = folder.join("sources.list");
        let keys = "/usr/share/keyrings/debian-archive-keyring.gpg";
        let line = format!("deb [arch={} signed-by={keys}] {mirror} {suite} main\n", arch.name());
        fs::write(&sources, line).with_context(|| format!("write {}", sources.display()))?;
        let here = |option: &str, part: &str| format!("{option}={}", folder.join(part).display());
        let options = vec![
            here("Dir::Etc::sourcelist", "sources.list"),
            "Dir::Etc::sourceparts=-".to_owned(),
            here("Dir::State::lists", "lists"),
            here("Dir::Cache", "cache"),
            "Dir::State::status=/dev/null".to_owned(),
            format!("APT::Architectures={}", arch.name()),
        ];
        let archive = Archive { options };
        // By itself apt calls it done where nothing could be fetched.
        let mut update = archive.apt_get(arch);
        update.args(["-o", "APT::Update::Error-Mode=any", "-qq", "update"]);
        if let Err(error) = said(&mut update) {
            let lists = fs::read_dir(folder.join("lists")).context("list what apt knows")?.flatten();
            let known =
                lists.filter(|entry| entry.file_name().to_string_lossy().contains("_Packages")).count();
            ensure!(known > 0, "what {suite} of {mirror} offers is not known: {error:#}");
            println!("vm: {suite} as it was when it could be reached last: {error:#}");
        }
        Ok(archive)
    }

    /// These packages and all that they depend on, as on a machine where nothing is installed yet.
    fn with_dependencies(&self, arch: Arch, names: &[&str]) -> Result<Vec<Package>> {
        let mut command = self.apt_get(arch);
        command.args(["-o", "Dir::State::status=/dev/null", "-o", "APT::Install-Recommends=false"]);
        // What apt has lying about is not listed.
        command.args(["-o", "Dir::Cache::archives=/nonexistent"]);
        command.args(["--print-uris", "-qq", "install"]).args(names);
        let packages: Vec<Package> = said(&mut command)?.lines().filter_map(listed).collect();
        for name in names {
            ensure!(
                packages.iter().any(|package| package.name() == *name),
                "apt-get lists no package {name}"
            );
        }
        Ok(packages)
    }

    fn apt_get(&self, arch: Arch) -> Command {
        let mut command = apt_get(arch);
        command.args(self.options.iter().flat_map(|option| ["-o", option]));
        command
    }

    /// What a package depends on, by name; nothing where there is no such package.
    fn needs(&self, arch: Arch, name: &str) -> Vec<String> {
        let mut command = Command::new("apt-cache");
        command.args(self.options.iter().flat_map(|option| ["-o", option]));
        command.args(["depends", "--important", &format!("{name}:{}", arch.name())]);
        let text = said(&mut command).unwrap_or_default();
        let names = text.lines().filter_map(|line| line.trim().strip_prefix("Depends: "));
        names.map(|name| name.split(':').next().unwrap_or(name).to_owned()).collect()
    }
}

fn is_of(version: &str, series: &str) -> bool {
    version.strip_prefix(series).is_some_and(|rest| rest.starts_with(['.', '-', '+']))
}

/// A line of `--print-uris`: 'URI' FILE SIZE CHECKSUM, where the last is missing for some archives.
pub(crate) fn listed(line: &str) -> Option<Package> {
    let mut words = line.strip_prefix('\'')?.split_whitespace().skip(1);
    let (file, size) = (words.next()?, words.next()?.parse().ok()?);
    let checksum = words.next().unwrap_or_default().to_owned();
    let plain = file.ends_with(".deb") && !file.contains('/') && file.split('_').count() == 3;
    plain.then(|| Package { file: file.to_owned(), checksum, size })
}

/// Downloads what is not in `folder` yet.
pub fn download(packages: &[Package], arch: Arch, folder: &Path) -> Result<Vec<PathBuf>> {
    download_from(&Archive::default(), packages, arch, folder)
}

fn download_from(from: &Archive, packages: &[Package], arch: Arch, folder: &Path) -> Result<Vec<PathBuf>> {
    fs::create_dir_all(folder).with_context(|| format!("create {}", folder.display()))?;
    let path = |package: &Package| folder.join(&package.file);
    let there = |package: &Package| fs::metadata(path(package)).is_ok_and(|meta| meta.len() == package.size);
    let missing: Vec<&Package> = packages.iter().filter(|package| !there(package)).collect();
    if !missing.is_empty() {
        let megabytes = missing.iter().map(|package| package.size).sum::<u64>() / 1_000_000;
        println!("vm: download of {} packages, {megabytes} MB", missing.len());
        let mut command = from.apt_get(arch);
        command.current_dir(folder).args(["-qq", "download"]);
        for package in &missing {
            command.arg(package.exact()?);
        }
        said(&mut command)?;
    }
    for package in missing {
        ensure!(there(package), "apt-get downloaded no {} of {} bytes", package.file, package.size);
    }
    Ok(packages.iter().map(path).collect())
}

/// The files of a package into a folder.
pub fn unpack(package: &Path, folder: &Path) -> Result<()> {
    said(Command::new("dpkg-deb").arg("--extract").arg(package).arg(folder)).map(|_| ())
}

fn apt_get(arch: Arch) -> Command {
    let mut command = Command::new("apt-get");
    command.args(["-o", "Acquire::Retries=3", "-o", "APT::Sandbox::User=root"]);
    if arch != Arch::HOST {
        command.args(["-o", &format!("APT::Architecture={}", arch.name())]);
    }
    command
}

/// Runs a command to its end; its output, or its last words.
pub(crate) fn said(command: &mut Command) -> Result<String> {
    let program = command.get_program().to_string_lossy().into_owned();
    let shown: Vec<_> = command.get_args().take(12).map(|word| word.to_string_lossy().into_owned()).collect();
    let shown = format!("{program} {}", shown.join(" "));
    let output = command.env("LC_ALL", "C").stdin(Stdio::null()).output();
    let output = output.with_context(|| format!("start {program} (is it installed?)"))?;
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "`{shown}`: {}\n{}", output.status, errors.trim_end());
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Says which package has a program that is not there.
pub(crate) fn assert_program(program: &str, package: &str) -> Result<()> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let there = std::env::split_paths(&path).any(|folder| folder.join(program).is_file());
    ensure!(there, "no {program} on PATH: apt-get install {package}");
    Ok(())
}

/// What a machine writes at most: a copy of a disk, and what it is booted from.
pub const ROOM_BYTES: u64 = 2 << 30;

/// Says so when a folder's file system has less than `wanted` bytes free, before anything is half written.
pub fn assert_space(folder: &Path, wanted: u64) -> Result<()> {
    let here = rustix::fs::statvfs(folder).with_context(|| format!("look at {}", folder.display()))?;
    let free = here.f_bavail.saturating_mul(here.f_frsize);
    ensure!(
        free >= wanted,
        "no space in {}: {} MiB are free, and a machine wants {}",
        folder.display(),
        free >> 20,
        wanted >> 20
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_that_is_missing_is_told_with_its_package() {
        assert_program("sh", "dash").unwrap();
        let missing = assert_program("qemu-system-nothing", "qemu-system-misc").unwrap_err().to_string();
        assert_eq!(missing, "no qemu-system-nothing on PATH: apt-get install qemu-system-misc");
    }

    #[test]
    fn too_little_space_is_told_before_anything_is_written() {
        let here = std::env::temp_dir();
        assert_space(&here, 1).unwrap();
        let full = assert_space(&here, u64::MAX).unwrap_err().to_string();
        assert!(full.starts_with(&format!("no space in {}: ", here.display())), "{full}");
    }

    #[test]
    fn a_series_that_debian_does_not_have_is_told_by_its_package() {
        let missing = kernel(Arch::HOST, "9.99").err().expect("no such series").to_string();
        let package = format!("linux-image-9.99-cloud-{}", Arch::HOST.name());
        assert!(missing.contains(&package) && missing.contains("apt-get update"), "{missing}");
    }

    #[test]
    fn a_line_of_apt_is_a_package_and_anything_else_is_not() {
        let line = "'http://host/pool/t/tar_1.34_amd64.deb' tar_1%3a1.34_amd64.deb 42 SHA256:ab";
        let package = listed(line).unwrap();
        assert_eq!((package.name(), package.size, &*package.checksum), ("tar", 42, "SHA256:ab"));
        assert_eq!(package.exact().unwrap(), "tar:amd64=1:1.34");
        let bare = listed("'u' x_1_amd64.deb 7 ").unwrap();
        assert_eq!((bare.size, &*bare.checksum), (7, ""));
        for other in [
            "",
            "'u' x_1_amd64.deb many MD5Sum:ab",
            "Reading package lists...",
            "'http://host/x' ../x_1_amd64.deb 1 a",
            "'u' x.deb 1 a",
        ] {
            assert_eq!(listed(other), None, "{other}");
        }
    }

    #[test]
    fn a_series_is_not_another_that_begins_like_it() {
        assert!(is_of("6.1.0-56-cloud-amd64", "6.1") && is_of("6.12.117+deb12-cloud-amd64", "6.12"));
        assert!(!is_of("6.12.117+deb12-cloud-amd64", "6.1") && !is_of("6.1.0-56-cloud-amd64", "6.12"));
    }

    #[test]
    fn a_mirror_that_can_not_be_reached_is_not_one_without_kernels() {
        if let Err(error) = assert_program("apt-get", "apt") {
            assert!(std::env::var_os("CI").is_none(), "{error}");
            println!("skipped: {error}");
            return;
        }
        let folder = tempfile::tempdir().unwrap();
        // Port 9 of this host: nobody listens there.
        let refused = Archive::of("http://127.0.0.1:9/nobody", NEWEST_SUITE, Arch::HOST, folder.path()).err();
        let refused = format!("{:#}", refused.expect("nothing is there"));
        assert!(refused.contains("is not known") && refused.contains("127.0.0.1:9"), "{refused}");
        fs::write(folder.path().join("lists/mirror_dists_main_Packages"), "").unwrap();
        assert!(
            Archive::of("file:/nonexistent", NEWEST_SUITE, Arch::HOST, folder.path()).is_ok(),
            "older lists do"
        );
    }
}
