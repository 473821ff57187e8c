//! What a machine boots: a kernel with its modules, and a root. Each is made once and kept under a name that changes
//! with whatever it is made of.

use std::collections::{BTreeMap, BTreeSet, hash_map::DefaultHasher};
use std::fs;
use std::hash::{Hash, Hasher};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::cpio::Tree;
use crate::packages::{self, Arch, Package, said};

/// The recipe is part of the name, too.
const RECIPE: &str = concat!(include_str!("image.rs"), include_str!("cpio.rs"), include_str!("init.sh"));

/// What is run inside. What these need comes with them.
const PACKAGES: &[&str] = &[
    "busybox-static",
    "conntrack",
    "dash",
    "iproute2",
    "iptables",
    "kmod",
    "libgcc-s1",
    "nftables",
    "nmap",
    "openssh-client",
    "openssh-server",
    "procps",
    "tcpdump",
    "util-linux",
    "wireguard-tools",
];

/// And by the integration tests: a program of its own kind in user space is a case of the audit's matrix.
const MORE_PACKAGES: &[&str] = &["python3-minimal", "libpython3-stdlib", "curl"];

/// Only the scripts of an installation use these.
const LEFT_OUT: &[&str] = &[
    "adduser",
    "base-files",
    "bash",
    "coreutils",
    "debconf",
    "debianutils",
    "dpkg",
    "init-system-helpers",
    "libdb5.3",
    "libfile-find-rule-perl",
    "libgdbm-compat4",
    "libgdbm6",
    "libnumber-compare-perl",
    "libpam-modules",
    "libpam-modules-bin",
    "libpam-runtime",
    "libperl5.36",
    "libsemanage-common",
    "libsemanage2",
    "libtext-glob-perl",
    "lsb-base",
    "mawk",
    "openssh-sftp-server",
    "passwd",
    "perl",
    "perl-base",
    "perl-modules-5.36",
    "runit-helper",
    "sensible-utils",
    "sysvinit-utils",
    "tar",
    "ucf",
    "usrmerge",
    "util-linux-extra",
];

/// By busybox, where no package brought it.
const BUSYBOX: &[&str] = &[
    "[", "awk", "basename", "cat", "chmod", "chown", "chroot", "cp", "cut", "date", "dd", "dirname", "du",
    "echo", "env", "expr", "false", "find", "grep", "head", "hostname", "id", "install", "kill", "ln", "ls",
    "mkdir", "mkfifo", "mknod", "mktemp", "mount", "mv", "nc", "od", "pgrep", "poweroff", "printf", "ps",
    "pwd", "readlink", "realpath", "rm", "rmdir", "sed", "seq", "sleep", "sort", "stat", "sync", "tail",
    "tee", "test", "timeout", "touch", "tr", "true", "umount", "uname", "uniq", "wc", "which", "xargs",
    "yes",
];

/// Folders of modules that are taken whole, with all that they depend on.
const MODULES: &[&str] = &[
    "kernel/arch/",
    "kernel/crypto/",
    "kernel/drivers/block/virtio_blk",
    "kernel/drivers/char/hw_random/",
    "kernel/drivers/char/virtio_console",
    "kernel/drivers/net/dummy",
    "kernel/drivers/net/ifb",
    "kernel/drivers/net/macvlan",
    "kernel/drivers/net/tun",
    "kernel/drivers/net/veth",
    "kernel/drivers/net/virtio_net",
    "kernel/drivers/net/vrf",
    "kernel/drivers/net/wireguard/",
    "kernel/drivers/virtio/",
    "kernel/fs/autofs/",
    "kernel/fs/binfmt_misc",
    "kernel/fs/ext4/",
    "kernel/lib/",
    "kernel/net/802/",
    "kernel/net/8021q/",
    "kernel/net/bridge/",
    "kernel/net/core/",
    "kernel/net/ipv4/",
    "kernel/net/ipv6/",
    "kernel/net/llc/",
    "kernel/net/mptcp/",
    "kernel/net/netfilter/",
    "kernel/net/netlink/",
    "kernel/net/packet/",
    "kernel/net/sched/",
    "kernel/net/unix/",
    "kernel/net/xfrm/",
];
const NOT_MODULES: &[&str] =
    &["kernel/arch/x86/kvm/", "kernel/arch/x86/events/", "kernel/net/netfilter/ipvs/"];

#[derive(Debug)]
pub struct Kernel {
    pub vmlinuz: PathBuf,
    pub modules: PathBuf,
    /// As `uname -r` says it: `6.12.117+deb12-cloud-amd64`.
    pub release: String,
}

/// Where all of it is kept.
pub(crate) fn folder() -> PathBuf {
    crate::target().join("vm")
}

/// A kernel and its modules, downloaded and prepared when they are not there yet.
pub fn kernel(arch: Arch, series: &str) -> Result<Kernel> {
    let offer = packages::kernel(arch, series)?;
    let name = format!("kernel-{}-{series}-{}", arch.name(), key(RECIPE, &offer.packages));
    let (vmlinuz, modules) =
        (folder().join(format!("{name}.vmlinuz")), folder().join(format!("{name}.cpio")));
    if !vmlinuz.is_file() || !modules.is_file() {
        println!("vm: prepare the kernel {}", offer.release);
        let scratch = Scratch::new(&name)?;
        let unpacked = scratch.0.join("package");
        for file in offer.download(arch, &folder().join("packages"))? {
            packages::unpack(&file, &unpacked)?;
        }
        // Also where a kernel's package has followed the move to /usr.
        let folder = ["lib", "usr/lib"].map(|lib| unpacked.join(lib).join("modules").join(&offer.release));
        let folder = folder.into_iter().find(|path| path.is_dir());
        let folder = folder.with_context(|| format!("no modules of {} in its packages", offer.release))?;
        write(&chosen_modules(&folder, &scratch.0.join("modules"), &offer.release)?, &modules)?;
        let images = [unpacked.join(format!("boot/vmlinuz-{}", offer.release)), folder.join("vmlinuz")];
        let image = images.iter().find(|path| path.is_file());
        let image = image.with_context(|| format!("no kernel in the packages of {}", offer.release))?;
        // At once, and only when all of it is there.
        let half = vmlinuz.with_extension("half");
        fs::copy(image, &half).with_context(|| format!("copy {}", image.display()))?;
        fs::rename(&half, &vmlinuz).with_context(|| format!("name {}", vmlinuz.display()))?;
        forget(&format!("kernel-{}-{series}-", arch.name()), &name)?;
    }
    Ok(Kernel { vmlinuz, modules, release: offer.release })
}

/// The root that all machines of an architecture share.
pub fn root(arch: Arch) -> Result<PathBuf> {
    prepare(arch, "root", &wanted(arch, PACKAGES)?, |tree| furnish(tree, arch))
}

/// What the integration tests want besides.
pub fn more(arch: Arch) -> Result<PathBuf> {
    let there = wanted(arch, PACKAGES)?;
    let mut more = wanted(arch, MORE_PACKAGES)?;
    more.retain(|package| there.iter().all(|known| known.name() != package.name()));
    prepare(arch, "more", &more, |_| ())
}

fn wanted(arch: Arch, names: &[&str]) -> Result<Vec<Package>> {
    let mut all = packages::with_dependencies(arch, names)?;
    all.retain(|package| !LEFT_OUT.contains(&package.name()));
    Ok(all)
}

/// A part of a root, of packages and what `furnish` adds.
fn prepare(arch: Arch, kind: &str, wanted: &[Package], furnish: impl FnOnce(&mut Tree)) -> Result<PathBuf> {
    let name = format!("{kind}-{}-{}", arch.name(), key(RECIPE, wanted));
    let root = folder().join(format!("{name}.cpio"));
    if !root.is_file() {
        let files = packages::download(wanted, arch, &folder().join("packages"))?;
        println!("vm: prepare the {kind} of {} packages", files.len());
        let scratch = Scratch::new(&name)?;
        let mut tree = Tree::default();
        for file in &files {
            packages::unpack(file, &scratch.0)?;
        }
        tree.below("", &scratch.0, &worth_it)?;
        furnish(&mut tree);
        write(&tree, &root)?;
        forget(&format!("{kind}-{}-", arch.name()), &name)?;
    }
    Ok(root)
}

/// Documentation, translations and what a package manager wants are half of what is unpacked.
fn worth_it(path: &str) -> bool {
    const NOT: [&str; 12] = [
        "usr/share/doc",
        "usr/share/man",
        "usr/share/locale",
        "usr/share/info",
        "usr/share/bash-completion",
        "usr/share/lintian",
        "usr/share/bug",
        "usr/share/zenmap",
        "usr/share/nmap/scripts",
        "usr/share/nmap/nmap-os-db",
        "lib/systemd",
        "usr/lib/systemd",
    ];
    let gconv = path.ends_with("/gconv") || path.ends_with("/nselib");
    !NOT.contains(&path) && !gconv
}

/// What an installation would have made.
fn furnish(tree: &mut Tree, arch: Arch) {
    for (path, to) in [("bin", "usr/bin"), ("sbin", "usr/sbin"), ("lib", "usr/lib"), ("lib64", "usr/lib64")] {
        tree.link(path, to);
    }
    let libraries = format!("usr/lib/{}", arch.triple());
    for (path, to) in [
        ("usr/bin/sh", "dash"),
        ("usr/sbin/iptables", "iptables-nft"),
        ("usr/sbin/ip6tables", "ip6tables-nft"),
        (&format!("{libraries}/libblas.so.3"), "blas/libblas.so.3"),
        ("var/run", "/run"),
    ] {
        tree.link(path, to);
    }
    for name in BUSYBOX {
        if !tree.has(&format!("usr/bin/{name}")) && !tree.has(&format!("usr/sbin/{name}")) {
            tree.link(&format!("usr/bin/{name}"), "busybox");
        }
    }
    for folder in ["dev", "proc", "sys", "run", "root", "var/lib", "var/empty", "etc/ssh", "mnt"] {
        tree.folder(folder, 0o755);
    }
    tree.folder("tmp", 0o1777);
    tree.file("init", 0o755, include_str!("init.sh"));
    tree.file(
        "etc/passwd",
        0o644,
        "root:x:0:0:root:/root:/bin/sh\nsshd:x:100:65534::/run/sshd:/usr/sbin/nologin\n\
         tcpdump:x:101:65534::/nonexistent:/usr/sbin/nologin\n\
         nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n",
    );
    tree.file("etc/group", 0o644, "root:x:0:\nnogroup:x:65534:\n");
    tree.file("etc/nsswitch.conf", 0o644, "passwd: files\ngroup: files\nhosts: files\nservices: files\n");
    tree.file("etc/hosts", 0o644, "127.0.0.1 localhost\n::1 localhost\n");
}

/// The wanted modules with all that they need, as plain files: unpacking them is quicker here than inside.
fn chosen_modules(from: &Path, scratch: &Path, release: &str) -> Result<Tree> {
    said(Command::new("depmod").arg("-b").arg(from.ancestors().nth(3).unwrap_or(from)).arg(release))?;
    let dependencies = fs::read_to_string(from.join("modules.dep")).context("read modules.dep")?;
    let needs: BTreeMap<&str, Vec<&str>> = (dependencies.lines())
        .filter_map(|line| line.split_once(':'))
        .map(|(module, needs)| (module, needs.split_whitespace().collect()))
        .collect();
    let begins = |path: &str, list: &[&str]| list.iter().any(|begin| path.starts_with(begin));
    let wanted = needs.keys().filter(|path| begins(path, MODULES) && !begins(path, NOT_MODULES));
    let all: BTreeSet<&str> = wanted.flat_map(|path| needs[path].iter().chain([path])).copied().collect();
    ensure!(all.len() > 100, "only {} modules of {release} were chosen", all.len());
    let to = scratch.join("lib/modules").join(release);
    let mut packed = Vec::new();
    for path in all {
        let copy = to.join(path);
        fs::create_dir_all(copy.parent().unwrap_or(&to))?;
        fs::copy(from.join(path), &copy).with_context(|| format!("copy {path}"))?;
        if path.ends_with(".xz") {
            packed.push(copy);
        }
    }
    if !packed.is_empty() {
        said(Command::new("xz").arg("--decompress").args(&packed))?;
    }
    for list in ["modules.order", "modules.builtin", "modules.builtin.modinfo"] {
        fs::copy(from.join(list), to.join(list)).with_context(|| format!("copy {list}"))?;
    }
    said(Command::new("depmod").arg("-b").arg(scratch).arg(release))?;
    let mut tree = Tree::default();
    tree.below("", scratch, &|_| true)?;
    Ok(tree)
}

fn write(tree: &Tree, path: &Path) -> Result<()> {
    // Under its name only once it is whole.
    let half = path.with_extension("half");
    let file = fs::File::create(&half).with_context(|| format!("create {}", half.display()))?;
    let mut file = BufWriter::new(file);
    tree.write(&mut file)?;
    file.flush().with_context(|| format!("write {} (no space?)", half.display()))?;
    fs::rename(&half, path).with_context(|| format!("name {}", path.display()))
}

pub(crate) fn key(recipe: &str, packages: &[Package]) -> String {
    let mut hasher = DefaultHasher::new();
    recipe.hash(&mut hasher);
    for package in packages {
        (&package.file, &package.checksum).hash(&mut hasher);
    }
    format!("{:016x}", hasher.finish())
}

/// Removes what was made of older packages.
pub(crate) fn forget(kind: &str, but: &str) -> Result<()> {
    forget_in(&folder(), kind, but)
}

fn forget_in(folder: &Path, kind: &str, but: &str) -> Result<()> {
    let old = fs::read_dir(folder).with_context(|| format!("list {}", folder.display()))?.flatten();
    for entry in old {
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.starts_with(kind) && !name.starts_with(but) && entry.path().is_file() {
            fs::remove_file(entry.path()).with_context(|| format!("remove {name}"))?;
        }
    }
    Ok(())
}

/// A folder for the time of preparing.
pub(crate) struct Scratch(pub(crate) PathBuf);

impl Scratch {
    pub(crate) fn new(name: &str) -> Result<Scratch> {
        let path = folder().join(format!("{name}.scratch"));
        if path.exists() {
            fs::remove_dir_all(&path).with_context(|| format!("remove {}", path.display()))?;
        }
        fs::create_dir_all(&path).with_context(|| format!("create {}", path.display()))?;
        Ok(Scratch(path))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.0) {
            eprintln!("vm: remove {}: {error}", self.0.display());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn package(file: &str, checksum: &str) -> Package {
        packages::listed(&format!("'uri' {file} 1 {checksum}")).unwrap()
    }

    #[test]
    fn what_is_made_of_something_else_has_another_name() {
        let (nft, wg) =
            (package("nftables_1.0.6-2_amd64.deb", "SHA256:1"), package("wg_1_amd64.deb", "SHA256:2"));
        let made = key("recipe", &[nft, wg]);
        let again =
            |recipe, nft: &str, sum, wg: &str| key(recipe, &[package(nft, sum), package(wg, "SHA256:2")]);
        let (nft, wg) = ("nftables_1.0.6-2_amd64.deb", "wg_1_amd64.deb");
        assert_eq!(made, again("recipe", nft, "SHA256:1", wg));
        for other in [
            again("another", nft, "SHA256:1", wg),
            again("recipe", "nftables_1.0.6-3_amd64.deb", "SHA256:1", wg),
            again("recipe", nft, "SHA256:3", wg),
            again("recipe", nft, "SHA256:1", "wg_2_amd64.deb"),
            key("recipe", &[package(nft, "SHA256:1")]),
        ] {
            assert_ne!(made, other);
        }
    }

    #[test]
    fn what_is_older_goes_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let names = [
            "kernel-amd64-6.1-old.vmlinuz",
            "kernel-amd64-6.1-new.vmlinuz",
            "kernel-amd64-6.1-new.cpio",
            "kernel-amd64-6.12-old.cpio",
            "kernel-arm64-6.1-old.cpio",
            "root-amd64-old.cpio",
        ];
        for name in names {
            fs::write(folder.path().join(name), "").unwrap();
        }
        fs::create_dir(folder.path().join("kernel-amd64-6.1-old.scratch")).unwrap();
        forget_in(folder.path(), "kernel-amd64-6.1-", "kernel-amd64-6.1-new").unwrap();
        let left = names.map(|name| folder.path().join(name).exists());
        assert_eq!(left, [false, true, true, true, true, true]);
        assert!(folder.path().join("kernel-amd64-6.1-old.scratch").exists());
    }
}
