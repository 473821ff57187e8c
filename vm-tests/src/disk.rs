//! What outlives a machine's boots: an empty disk, or one with Debian as its packages install it, which is made once.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::foreign;
use crate::image::{Scratch, folder, forget, key};
use crate::packages::{self, Arch, NEWEST, STABLE, assert_program, said};

const RECIPE: &str = concat!(include_str!("disk.rs"), include_str!("foreign.rs"));

/// What a disk with systemd is installed from.
const INSTALLED: &[&str] = &[
    "dbus",
    "iproute2",
    "kmod",
    "nftables",
    "openssh-server",
    "procps",
    "systemd",
    "systemd-sysv",
    "udev",
    "wireguard-tools",
];
/// What mmdebstrap installs of its own accord, and none of the others needs.
const BASE: &[&str] = &[
    "apt",
    "base-files",
    "base-passwd",
    "bash",
    "bsdutils",
    "coreutils",
    "dash",
    "debianutils",
    "diffutils",
    "e2fsprogs",
    "findutils",
    "grep",
    "gzip",
    "hostname",
    "libc-bin",
    "login",
    "mawk",
    "ncurses-base",
    "ncurses-bin",
    "sed",
    "tzdata",
    "util-linux",
];
/// For who brings them to life, which nobody does by emulation: their Python takes half of the time there.
const FIREWALLS: [&str; 2] = ["firewalld", "ufw"];
/// Nobody's business in a test, and some of them take long.
const NOT_STARTED: &[&str] = &[
    "apt-daily-upgrade.timer",
    "apt-daily.timer",
    "dpkg-db-backup.timer",
    "e2scrub_all.timer",
    "e2scrub_reap.service",
    "fstrim.timer",
];

/// A disk with Debian as its packages install it, which every machine with systemd has a copy of: of this machine's
/// release, and for [`NEWEST`] of the one whose users get that kernel.
pub fn installed(arch: Arch, series: &str) -> Result<PathBuf> {
    let (release, codename) =
        if series == NEWEST { (STABLE, STABLE.to_owned()) } else { ("here", codename()?) };
    let firewalls = if arch == Arch::HOST { &FIREWALLS[..] } else { &[] };
    let packages = [INSTALLED, firewalls].concat();
    let listed = if release == STABLE { packages::of_stable } else { packages::with_dependencies };
    let listed = listed(arch, &[&*packages, BASE].concat())?;
    let name = format!("installed-{release}-{}-{}", arch.name(), key(RECIPE, &listed));
    let disk = folder().join(format!("{name}.ext4"));
    if disk.is_file() {
        return Ok(disk);
    }
    assert_program("mmdebstrap", "mmdebstrap")?;
    assert_program("mke2fs", "e2fsprogs")?;
    println!("vm: install Debian {codename} with systemd into a disk");
    let scratch = Scratch::new(&name)?;
    let root = scratch.0.join("root");
    let at = root.to_str().context("the workspace's path is not UTF-8")?;
    // It would ask a program of its own whether the other architecture's can be run, which they are about to be.
    let mut words = ["mmdebstrap", "--quiet", "--mode=root", "--variant=minbase", "--skip=check/qemu"]
        .map(str::to_owned)
        .to_vec();
    words.push(format!("--architectures={}", arch.name()));
    words.push(format!("--include={}", packages.join(",")));
    for folder in ["doc", "man", "locale", "info"] {
        words.push(format!("--dpkgopt=path-exclude=/usr/share/{folder}/*"));
    }
    words.extend(["--format=directory", &codename, at].map(str::to_owned));
    if release == STABLE {
        // What `listed` is of; of itself it would take more suites.
        words.push(packages::mirror()?);
    }
    foreign::done(arch, &words)?;
    // That was for its installation, and is not for what a test installs.
    fs::remove_file(root.join("etc/dpkg/dpkg.cfg.d/99mmdebstrap")).context("remove dpkg's options")?;
    // Without a name it would take each boot for its first, and enable all that it finds.
    fs::write(root.join("etc/machine-id"), "5b0c6f1d8f5e4c0e9d3a7b2c4e6f8a10\n").context("write its name")?;
    fs::write(root.join("etc/hostname"), "vm\n").context("write its host's name")?;
    let mut words = [&["chroot", at, "systemctl", "--quiet", "disable"], NOT_STARTED].concat();
    words.extend(firewalls.contains(&"firewalld").then_some("firewalld.service"));
    foreign::done(arch, &words)?;
    let half = disk.with_extension("half");
    said(Command::new("mke2fs").args(["-q", "-F", "-t", "ext4", "-d"]).arg(&root).arg(&half).arg("1G"))?;
    fs::rename(&half, &disk).with_context(|| format!("name {}", disk.display()))?;
    forget(&format!("installed-{release}-{}-", arch.name()), &name)?;
    Ok(disk)
}

/// Debian's release here.
fn codename() -> Result<String> {
    let text = fs::read_to_string("/etc/os-release").context("read /etc/os-release")?;
    let name = text.lines().find_map(|line| line.strip_prefix("VERSION_CODENAME="));
    name.map(|name| name.trim_matches('"').to_owned()).context("/etc/os-release has no VERSION_CODENAME")
}

/// A machine's own copy of a disk.
pub fn copy(disk: &Path, folder: &Path) -> Result<PathBuf> {
    let path = folder.join("disk.raw");
    said(Command::new("cp").args(["--sparse=always", "--reflink=auto"]).arg(disk).arg(&path))?;
    Ok(path)
}

/// An empty disk.
pub fn empty(folder: &Path) -> Result<PathBuf> {
    const BYTES: u64 = 64 << 20;
    assert_program("mke2fs", "e2fsprogs")?;
    let path = folder.join("disk.raw");
    let file = fs::File::create(&path).with_context(|| format!("create {}", path.display()))?;
    file.set_len(BYTES).with_context(|| format!("write {} (no space?)", path.display()))?;
    said(Command::new("mke2fs").args(["-q", "-t", "ext4"]).arg(&path))?;
    Ok(path)
}
