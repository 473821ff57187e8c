//! `install` and `uninstall`: the units of a host with systemd.

use std::ffi::OsStr;
use std::fs;
use std::io::{ErrorKind, Read as _, Write as _};
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use clap::Args;
use rustix::fs::{Mode, OFlags, ResolveFlags};

use super::Global;
use crate::apply::trial::{Ledger, Phase};
use crate::daemon::socket::{self, Rules, Status};
use crate::fleet::bundle::PACKAGED;
use crate::sys::clock::Uptime;
use crate::terms::Port;

#[derive(Args)]
pub struct Options {
    /// Write the files only, below this directory (an image that is being built)
    #[arg(long, value_name = "DIR")]
    root: Option<PathBuf>,
}

#[derive(Args)]
pub struct Removal {
    /// Remove the files only, below this directory (an image that is being built)
    #[arg(long, value_name = "DIR")]
    root: Option<PathBuf>,
}

/// Every file of ours says so in its first line: nothing else is replaced or removed.
const MARK: &str = "# Of spokeguard: ";
const UNITS: &str = "etc/systemd/system";
pub(super) const SERVICE: &str = "spokeguard.service";
const BOOT: &str = "spokeguard-boot.service";
/// Where the binary goes, if it isn't where the system keeps programs already.
const PROGRAM: &str = "/usr/local/sbin/spokeguard";
const PROGRAM_FOLDERS: [&str; 6] =
    ["/usr/bin", "/usr/sbin", "/usr/local/bin", "/usr/local/sbin", "/bin", "/sbin"];

/// What the units' daemon reads and writes: they give it no options.
const POLICY: &str = "/etc/spokeguard/policy.toml";

/// What is not in force so long after the daemon's start is told as it is.
const SETTLED: Duration = Duration::from_secs(5);
const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// Of shut.nft, before the lines that a mesh interface of another name and a tunnel's other port get.
const TUNNEL: &str = "iifname \"tailscale*\" accept";
const OUTSIDE: &str = "udp dport { 41641, 51820 } accept";

/// How to do without a program of ours what `release` does. Filters outlive their pins; links (Linux 6.6) don't.
const TO_OPEN: &str = "To open the host now:
  nft delete table inet spokeguard; rm -r /sys/fs/bpf/spokeguard
and before Linux 6.6, for each interface:
  tc filter del dev NAME ingress pref 8";

const ON_TRIAL: &str = "They are on trial, though: those before them come back by themselves when their
time is over. Wait for that before you open the host: it would shut it again.";

const SSHD: &str = include_str!("../../../contrib/systemd/ssh.service.d/spokeguard.conf");
const SSHD_SOCKET: &str = include_str!("../../../contrib/systemd/ssh.socket.d/spokeguard.conf");

/// Path below the root, and text. sshd's units are called ssh by Debian and sshd by Fedora, Arch and openSUSE; where
/// one name is the other's alias systemd reads one drop-in of the two, as they are called the same.
const FILES: [(&str, &str); 8] = [
    ("usr/lib/spokeguard/shut.nft", include_str!("../../../contrib/systemd/shut.nft")),
    (
        "etc/systemd/system/spokeguard-shut.service",
        include_str!("../../../contrib/systemd/spokeguard-shut.service"),
    ),
    (
        "etc/systemd/system/spokeguard-boot.service",
        include_str!("../../../contrib/systemd/spokeguard-boot.service"),
    ),
    ("etc/systemd/system/spokeguard.service", include_str!("../../../contrib/systemd/spokeguard.service")),
    ("etc/systemd/system/ssh.service.d/spokeguard.conf", SSHD),
    ("etc/systemd/system/ssh.socket.d/spokeguard.conf", SSHD_SOCKET),
    ("etc/systemd/system/sshd.service.d/spokeguard.conf", SSHD),
    ("etc/systemd/system/sshd.socket.d/spokeguard.conf", SSHD_SOCKET),
];

/// By path below the root: what makes sshd wait for the mesh address it binds.
pub fn drop_ins() -> Vec<(&'static str, &'static str)> {
    FILES.into_iter().filter(|(_, text)| [SSHD, SSHD_SOCKET].contains(text)).collect()
}

/// Puts the program and its units in place and, on a running host with a policy, starts
/// them. What is there already stays as it is.
pub fn install(global: &Global, options: &Options) -> anyhow::Result<u8> {
    let root = Root::new(options.root.as_deref())?;
    ensure!(
        !root.path("etc/NIXOS").exists(),
        "this is NixOS, which makes its units itself: use the NixOS module (services.spokeguard)"
    );
    if let Some(unit) = root.packaged() {
        // Not --now for the boot unit: it would load the confirmed rules over those on trial.
        let remedy = match root.0 == Path::new("/") {
            true => format!("systemctl enable {BOOT} && systemctl enable --now {SERVICE}"),
            false => format!("systemctl --root={} enable {BOOT} {SERVICE}", root.0.display()),
        };
        bail!("{}: the Debian package has put the units in place already: {remedy}", unit.display());
    }
    if root.0 == Path::new("/") {
        is_as_the_units_say(global)?;
    }
    let (nft, without_nft) = match root.find("nft") {
        Some(nft) => (nft, None),
        // An image may get its packages later.
        None if root.0 != Path::new("/") => {
            let nft = Path::new("/usr/sbin/nft");
            let told = format!(
                "{} has no nft yet: the units are written for {}; install nftables there",
                root.0.display(),
                nft.display()
            );
            (nft.to_owned(), Some(told))
        }
        None => bail!("nft is missing: install nftables first (apt install nftables)"),
    };
    root.all_ours_or_absent()?;
    let mut staged = Staged::default();
    let program = root.program(&mut staged)?;
    // An image's policy is not this host's.
    let mut of_root = global.clone();
    if let Ok(below) = global.policy.strip_prefix("/") {
        of_root.policy = root.0.join(below);
    }
    let policy = super::policy::load(&of_root, crate::sys::clock::now());
    let mesh = policy.as_ref().ok().map(|(loaded, _)| &loaded.policy.mesh);
    let mut told = root.put(staged, &program, &nft, mesh.map(|mesh| (&*mesh.interface, mesh.listen_port)))?;
    told.extend(without_nft);
    if !root.is_running() {
        let wants = |target: &str, unit: &str| root.link(&format!("{UNITS}/{target}.wants/{unit}"), unit);
        wants("sysinit.target", BOOT)?;
        wants("multi-user.target", SERVICE)?;
        if let Err(error) = policy.as_ref()
            && of_root.policy.exists()
        {
            told.push(format!(
                "what is loaded when the confirmed rules can't be lets tunnels in by their usual names and ports\n\
                 alone, since the policy has mistakes; install again without them:\n{error:#}"
            ));
        }
        told.push("enabled for the next boot; nothing was started".to_owned());
        global.print(&(told.join("\n") + "\n"))?;
        return Ok(0);
    }
    systemctl(&["daemon-reload"])?;
    systemctl(&["enable", "--quiet", BOOT, SERVICE])?;
    let cloud_init = properties("Before", &["cloud-init-local.service"]);
    for (unit, after) in FLUSHING.into_iter().zip(properties("After", &FLUSHING)) {
        told.extend(match late(&after, cloud_init.first().map_or("", String::as_str)) {
            Some(Late::Network) => Some(format!(
                "ATTENTION: {unit} was changed to start after the\n\
                 network, but {BOOT} has to come after it and before the\n\
                 network: systemd leaves out one of the two, and the host may be open until the\n\
                 daemon is up. Take the network out of that unit's After= (systemctl edit)."
            )),
            Some(Late::CloudInit) => Some(format!(
                "ATTENTION: {unit} starts after sysinit.target, but\n\
                 {BOOT} has to come after it and before cloud-init, which is\n\
                 here before that target: systemd leaves out one of them, and the host may be\n\
                 open until the daemon is up. Give that unit DefaultDependencies=no and\n\
                 Before=network-pre.target shutdown.target (systemctl edit --full)."
            )),
            None => None,
        });
    }
    match policy {
        Ok((_, desired)) => {
            systemctl(&["restart", SERVICE])?;
            let state = properties("ActiveState", &[SERVICE]).concat();
            ensure!(state == "active", "{SERVICE} did not start, it is {state}: systemctl status {SERVICE}");
            told.push(started(rules(global)));
            told.extend(super::ssh_start::refused(&desired));
        }
        Err(error) => told.push(format!(
            "not started, for want of a policy:\n{error:#}\n\
             then: spokeguard policy check && systemctl start spokeguard"
        )),
    }
    global.print(&(told.join("\n") + "\n"))?;
    Ok(0)
}

/// The policy is the one that the daemon will read, and so are the folders.
fn is_as_the_units_say(global: &Global) -> anyhow::Result<()> {
    let policy = &global.policy;
    ensure!(
        std::path::absolute(policy).is_ok_and(|path| path == Path::new(POLICY)),
        "{}: the units read {POLICY} alone: copy the policy there, and leave out --policy and SPOKEGUARD_POLICY",
        policy.display()
    );
    for (option, given, default) in [
        ("--state-dir", &global.state_dir, "/var/lib/spokeguard"),
        ("--run-dir", &global.run_dir, "/run/spokeguard"),
        ("--pin-dir", &global.pin_dir, "/sys/fs/bpf/spokeguard"),
    ] {
        ensure!(
            given.as_deref().is_none_or(|given| given == Path::new(default)),
            "the units know {option} {default} alone: leave it out"
        );
    }
    Ok(())
}

/// What the daemon says of its rules, which it may not have put in force yet.
fn rules(global: &Global) -> anyhow::Result<Rules> {
    let run = global.places()?.run;
    let begun = Uptime::start();
    loop {
        let status = socket::ask(&run, "status").and_then(|text| Ok(serde_json::from_str::<Status>(&text)?));
        match status.map(|status| status.daemon.rules) {
            // Neither a socket that is not there yet nor rules tell us when they come.
            Err(_) | Ok(Rules::NotInForce) if begun.elapsed() < SETTLED => std::thread::sleep(LOOK_AGAIN),
            rules => return rules,
        }
    }
}

fn started(rules: anyhow::Result<Rules>) -> String {
    match rules {
        Ok(Rules::OnTrial) => {
            "started. Its rules are on trial: connect anew from the hub through the tunnel, or run\n\
             `spokeguard confirm`; else they go away again (`spokeguard status` says when)"
                .to_owned()
        }
        Ok(Rules::Confirmed) => "started. Its rules are confirmed".to_owned(),
        Ok(Rules::RolledBack) => {
            "started, but this policy was rolled back and is not tried again by itself: correct it,\n\
             or run `spokeguard apply --wait`"
                .to_owned()
        }
        Ok(Rules::NotInForce) => {
            "started, but what the policy says is not in force: `spokeguard status` says why".to_owned()
        }
        Err(error) => {
            format!(
                "started, but it doesn't say yet what became of its rules: `spokeguard status`\n{error:#}"
            )
        }
    }
}

/// Takes program and units away. The rules in force stay, and policy and state are kept.
pub fn uninstall(global: &Global, options: &Removal) -> anyhow::Result<u8> {
    let root = Root::new(options.root.as_deref())?;
    if let Some(unit) = root.packaged() {
        bail!("{}: installed by the Debian package: apt remove spokeguard", unit.display());
    }
    root.all_ours_or_absent()?;
    if root.is_running() && root.path(&format!("{UNITS}/{SERVICE}")).exists() {
        systemctl(&["disable", "--quiet", "--now", SERVICE])?;
        systemctl(&["disable", "--quiet", BOOT])?;
    }
    for (target, unit) in [("sysinit.target", BOOT), ("multi-user.target", SERVICE)] {
        remove(&root.path(&format!("{UNITS}/{target}.wants/{unit}")))?;
    }
    let mut told = root.take()?;
    let program = root.path(PROGRAM.trim_start_matches('/'));
    if remove(&program)? {
        told.push(format!("removed {}", program.display()));
    }
    if root.is_running() {
        systemctl(&["daemon-reload"])?;
    }
    if told.is_empty() {
        told.push("there was nothing of ours".to_owned());
    } else {
        told.push("/etc/spokeguard and /var/lib/spokeguard are kept.".to_owned());
        told.push("The rules in force stay until the next boot.".to_owned());
        if root.is_running() && is_on_trial(global) {
            told.push(ON_TRIAL.to_owned());
        }
        told.push(TO_OPEN.to_owned());
        // Only now, when systemd has read its units without ours.
        told.extend(root.is_running().then(super::ssh_start::advice).flatten());
    }
    global.print(&(told.join("\n") + "\n"))?;
    Ok(0)
}

/// What can't be asked is left out of what is told.
fn is_on_trial(global: &Global) -> bool {
    let glance = global.places().and_then(|places| Ledger::new(&places).glance());
    matches!(glance, Ok(Some((Phase::Armed | Phase::Firing, _))))
}

/// What flushes all rules when it starts; the boot units come after it.
const FLUSHING: [&str; 2] = ["nftables.service", "netfilter-persistent.service"];

/// What systemd says of units: the value of a property of each.
pub(super) fn properties(name: &str, units: &[&str]) -> Vec<String> {
    let output = Command::new("systemctl").arg("show").arg(format!("--property={name}")).args(units).output();
    let shown = output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
    // A property a line, and an empty line between two units.
    let values = shown.lines().filter_map(|line| line.strip_prefix(name)?.strip_prefix('='));
    values.map(str::to_owned).collect()
}

/// What a unit that flushes the rules waits for, and the boot units have to come before.
#[derive(Debug, PartialEq, Eq)]
enum Late {
    Network,
    /// By way of sysinit.target, which on some hosts waits for cloud-init's first stage.
    CloudInit,
}

/// `after`: of such a unit; `cloud_init`: what cloud-init's first stage comes before. By names, as systemd gives them.
fn late(after: &str, cloud_init: &str) -> Option<Late> {
    let is_network = |unit: &str| unit.starts_with("network") && unit.ends_with(".target");
    // Ubuntu's says the target; since 25.2 it says auditd, which Fedora has before the target.
    let early =
        cloud_init.split_whitespace().any(|unit| ["sysinit.target", "auditd.service"].contains(&unit));
    if after.split_whitespace().any(is_network) {
        Some(Late::Network)
    } else if early && after.split_whitespace().any(|unit| ["sysinit.target", "basic.target"].contains(&unit))
    {
        Some(Late::CloudInit)
    } else {
        None
    }
}

struct Root(PathBuf);

impl Root {
    fn new(below: Option<&Path>) -> anyhow::Result<Self> {
        let root = below.unwrap_or(Path::new("/"));
        ensure!(root.is_dir(), "{}: not a directory", root.display());
        Ok(Self(root.to_owned()))
    }

    fn path(&self, below: &str) -> PathBuf {
        self.0.join(below)
    }

    /// Whether this is the host itself, with systemd running.
    fn is_running(&self) -> bool {
        self.0 == Path::new("/") && Path::new("/run/systemd/system").is_dir()
    }

    /// The daemon's unit of Debian's package, where that is installed.
    fn packaged(&self) -> Option<PathBuf> {
        // Where /lib is a link, it is one to /usr/lib; an image's may lead out of the image.
        let lib = (!self.path("lib").is_symlink()).then_some(PACKAGED.trim_start_matches("usr/"));
        let mut units = [PACKAGED].into_iter().chain(lib).map(|below| self.path(below));
        units.find(|unit| fs::symlink_metadata(unit).is_ok())
    }

    /// Asked first, so that nothing is done by halves.
    fn all_ours_or_absent(&self) -> anyhow::Result<()> {
        for (path, _) in FILES {
            let path = self.path(path);
            match fs::read_to_string(&path) {
                Ok(text) if text.starts_with(MARK) => (),
                Ok(_) => bail!("{}: not written by spokeguard install; move it away first", path.display()),
                Err(error) if error.kind() == ErrorKind::NotFound => (),
                Err(error) => return Err(error).with_context(|| path.display().to_string()),
            }
        }
        Ok(())
    }

    /// Writes every file that isn't there yet, and says what became of each.
    /// Through the interface `mesh` its operator gets in when the sealed rules can't be loaded; the port is its tunnel's.
    fn put(
        &self,
        mut staged: Staged,
        program: &Path,
        nft: &Path,
        mesh: Option<(&str, Option<Port>)>,
    ) -> anyhow::Result<Vec<String>> {
        self.all_ours_or_absent()?;
        let mut told = Vec::new();
        for (path, text) in FILES {
            let text = text
                .replace("ExecStart=spokeguard ", &format!("ExecStart={} ", program.display()))
                .replace("ExecStart=nft ", &format!("ExecStart={} ", nft.display()))
                .replace("ExecStart=-nft ", &format!("ExecStart=-{} ", nft.display()));
            let text = match mesh {
                Some((mesh, _)) => text.replace(TUNNEL, &format!("{TUNNEL}\n\t\tiifname \"{mesh}\" accept")),
                None => text,
            };
            let text = match mesh.and_then(|(_, port)| port) {
                Some(port) => text.replace(OUTSIDE, &format!("{OUTSIDE}\n\t\tudp dport {port} accept")),
                None => text,
            };
            let verb = if self.stage(&mut staged, path, &text)? { "wrote" } else { "is as it was:" };
            told.push(format!("{verb} {}", self.path(path).display()));
        }
        staged.rename()?;
        Ok(told)
    }

    /// Removes every file of ours, and the folders that were for them alone.
    fn take(&self) -> anyhow::Result<Vec<String>> {
        self.all_ours_or_absent()?;
        let mut told = Vec::new();
        for (path, _) in FILES {
            let path = self.path(path);
            if remove(&path)? {
                told.push(format!("removed {}", path.display()));
            }
            let own = |f: &&Path| f.ends_with("spokeguard") || f.extension() == Some(OsStr::new("d"));
            if let Some(folder) = path.parent().filter(own) {
                // Unless somebody else keeps something there.
                let _ = fs::remove_dir(folder);
            }
        }
        Ok(told)
    }

    /// Writes a file of ours beside its place; `false`: it was like that already.
    fn stage(&self, staged: &mut Staged, below: &str, text: &str) -> anyhow::Result<bool> {
        let path = self.path(below);
        if fs::read_to_string(&path).is_ok_and(|there| there == text) {
            return Ok(false);
        }
        staged.write(path, text.as_bytes(), 0o644)?;
        Ok(true)
    }

    fn link(&self, below: &str, unit: &str) -> anyhow::Result<()> {
        let path = self.path(below);
        let folder = path.parent().context("a link has a folder")?;
        fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
        match std::os::unix::fs::symlink(format!("../{unit}"), &path) {
            Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(()),
            result => result.with_context(|| path.display().to_string()),
        }
    }

    /// Where a program is that is found below the root, as its own processes will see it.
    fn find(&self, program: &str) -> Option<PathBuf> {
        let mut places = PROGRAM_FOLDERS.iter().map(|folder| Path::new(folder).join(program));
        // An image's link leads elsewhere from here.
        let is_there = |path: PathBuf| path.is_file() || (self.0 != Path::new("/") && path.is_symlink());
        places.find(|place| place.strip_prefix("/").is_ok_and(|below| is_there(self.0.join(below))))
    }

    /// Refuses a program for another processor than this image's, where that can be told.
    fn is_for(&self, program: &[u8]) -> anyhow::Result<()> {
        let Some(ours) = processor(program) else { return Ok(()) };
        let known = self.find("nft").into_iter().chain(["/bin/sh".into(), "/usr/bin/sh".into()]);
        let theirs = known.into_iter().find_map(|path| Some((processor(&self.head(&path).ok()?)?, path)));
        if let Some((theirs, path)) = theirs.filter(|(theirs, _)| *theirs != ours) {
            bail!(
                "{} is for {}, as its {} says, and this program for {}: run that processor's there, or at its first boot",
                self.0.display(),
                processor_name(theirs),
                path.display(),
                processor_name(ours)
            );
        }
        Ok(())
    }

    /// The beginning of a file, by the image's own links, which lead elsewhere from here.
    fn head(&self, path: &Path) -> std::io::Result<[u8; 20]> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let root = fs::File::open(&self.0)?;
        let file = rustix::fs::openat2(root, path, flags, Mode::empty(), ResolveFlags::IN_ROOT)?;
        let mut head = [0; 20];
        fs::File::from(file).read_exact(&mut head)?;
        Ok(head)
    }

    /// Where the program is to be started from; written beside that place where it isn't there yet.
    fn program(&self, staged: &mut Staged) -> anyhow::Result<PathBuf> {
        let running = std::env::current_exe().context("this program's own path")?;
        let kept =
            running.parent().is_some_and(|folder| PROGRAM_FOLDERS.iter().any(|f| folder == Path::new(f)));
        if kept && self.0 == Path::new("/") {
            return Ok(running);
        }
        let target = self.path(PROGRAM.trim_start_matches('/'));
        let bytes = fs::read(&running).with_context(|| running.display().to_string())?;
        if self.0 != Path::new("/") {
            self.is_for(&bytes)?;
        }
        if !fs::read(&target).is_ok_and(|there| there == bytes) {
            staged.write(target, &bytes, 0o755)?;
        }
        Ok(PathBuf::from(PROGRAM))
    }
}

/// Whose machine code it is: `e_machine` of an ELF file.
fn processor(file: &[u8]) -> Option<u16> {
    let bytes = file.get(18..20)?.try_into().ok()?;
    match file.get(..6)? {
        [0x7f, b'E', b'L', b'F', _, 1] => Some(u16::from_le_bytes(bytes)),
        [0x7f, b'E', b'L', b'F', _, 2] => Some(u16::from_be_bytes(bytes)),
        _ => None,
    }
}

fn processor_name(machine: u16) -> String {
    match machine {
        3 => "i386".to_owned(),
        40 => "arm".to_owned(),
        62 => "x86_64".to_owned(),
        183 => "aarch64".to_owned(),
        243 => "riscv".to_owned(),
        other => format!("the processor of ELF's number {other}"),
    }
}

/// New files beside their places: none is put there before all are written, so that a full disk or a read-only /etc
/// leaves everything as it was.
#[derive(Default)]
struct Staged(Vec<(PathBuf, PathBuf)>);

impl Staged {
    fn write(&mut self, path: PathBuf, bytes: &[u8], mode: u32) -> anyhow::Result<()> {
        let folder = path.parent().context("a file has a folder")?;
        fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
        let mut new = path.clone().into_os_string();
        new.push(".new");
        let new = PathBuf::from(new);
        self.0.push((new.clone(), path));
        let write = || -> std::io::Result<()> {
            let mut file =
                fs::OpenOptions::new().write(true).create(true).truncate(true).mode(mode).open(&new)?;
            // Whatever the umask.
            file.set_permissions(fs::Permissions::from_mode(mode))?;
            file.write_all(bytes)?;
            file.sync_all()
        };
        write().with_context(|| format!("write {}; nothing was changed", new.display()))
    }

    /// Each is the old file or the new one, whenever the power fails.
    fn rename(mut self) -> anyhow::Result<()> {
        while let Some((new, path)) = self.0.first() {
            fs::rename(new, path).with_context(|| format!("put {} in place", path.display()))?;
            self.0.remove(0);
        }
        Ok(())
    }
}

impl Drop for Staged {
    fn drop(&mut self) {
        for (new, _) in &self.0 {
            let _ = fs::remove_file(new);
        }
    }
}

/// `false`: it was not there.
fn remove(path: &Path) -> anyhow::Result<bool> {
    match fs::remove_file(path) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error).with_context(|| format!("remove {}", path.display())),
    }
}

fn systemctl(arguments: &[&str]) -> anyhow::Result<()> {
    let doing = || format!("systemctl {}", arguments.join(" "));
    let output =
        Command::new("systemctl").args(arguments).stdin(Stdio::null()).output().with_context(doing)?;
    if output.status.success() {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&output.stderr);
    bail!("{}: {}", doing(), crate::terms::printable(text.trim(), 400))
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;
    use crate::cli::{Cli, Command};
    use crate::source::bpf::guard;

    fn relative(root: &Path) -> Vec<String> {
        let mut out = Vec::new();
        let mut waiting = vec![root.to_path_buf()];
        while let Some(folder) = waiting.pop() {
            for entry in fs::read_dir(folder).unwrap().flatten() {
                match entry.file_type().unwrap().is_dir() {
                    true => waiting.push(entry.path()),
                    false => out.push(entry.path().strip_prefix(root).unwrap().display().to_string()),
                }
            }
        }
        out.sort();
        out
    }

    #[track_caller]
    fn refused(words: &[&str]) -> String {
        let Cli { global, command } = Cli::try_parse_from(words).unwrap();
        let done = match command {
            Command::Install(options) => install(&global, &options),
            Command::Uninstall(options) => uninstall(&global, &options),
            _ => panic!("{words:?}"),
        };
        format!("{:#}", done.unwrap_err())
    }

    /// Debian's own, one that somebody changed, and Fedora's own, on hosts with and without cloud-init.
    #[test]
    fn a_unit_that_makes_a_cycle_with_ours_is_told() {
        let (ubuntu, rhel) =
            ("sysinit.target network-pre.target", "network-pre.target NetworkManager.service");
        for (after, cloud_init, wanted) in [
            ("system.slice systemd-journald.socket", ubuntu, None),
            ("system.slice network-online.target", "", Some(Late::Network)),
            ("sysinit.target basic.target system.slice", "", None),
            ("sysinit.target basic.target system.slice", rhel, None),
            ("sysinit.target basic.target system.slice", ubuntu, Some(Late::CloudInit)),
            ("basic.target", "auditd.service network-pre.target", Some(Late::CloudInit)),
        ] {
            assert_eq!(late(after, cloud_init), wanted, "{after}; {cloud_init}");
        }
    }

    #[test]
    fn an_image_gets_everything_once_and_loses_it_again() {
        let folder = tempfile::tempdir().unwrap();
        let root = Root(folder.path().to_owned());
        let nft = Path::new("/usr/sbin/nft");
        assert!(
            root.put(Staged::default(), Path::new(PROGRAM), nft, Some(("mesh0", Port::new(40000))))
                .unwrap()
                .iter()
                .all(|line| line.starts_with("wrote "))
        );
        let files = relative(folder.path());
        assert_eq!(files.len(), FILES.len());
        for path in &files {
            let text = fs::read_to_string(root.path(path)).unwrap();
            assert!(text.starts_with(MARK), "{path}");
            assert!(
                !text.contains("ExecStart=nft")
                    && !text.contains("=-nft")
                    && !text.contains("ExecStart=spokeguard"),
                "{path}"
            );
        }
        assert!(
            root.put(Staged::default(), Path::new(PROGRAM), nft, Some(("mesh0", Port::new(40000))))
                .unwrap()
                .iter()
                .all(|line| line.starts_with("is as it was:"))
        );
        let shut = fs::read_to_string(root.path("usr/lib/spokeguard/shut.nft")).unwrap();
        assert_eq!(shut.matches("\t\tiifname \"mesh0\" accept\n").count(), 1, "{shut}");
        assert_eq!(shut.matches("\t\tudp dport 40000 accept\n").count(), 1, "{shut}");
        // Nobody else's drop-in goes with ours.
        let other = root.path("etc/systemd/system/ssh.service.d/other.conf");
        fs::write(&other, "[Service]\n").unwrap();
        assert_eq!(root.take().unwrap().len(), FILES.len());
        assert_eq!(relative(folder.path()), ["etc/systemd/system/ssh.service.d/other.conf"]);
        for folder in
            ["usr/lib/spokeguard", "etc/systemd/system/ssh.socket.d", "etc/systemd/system/sshd.service.d"]
        {
            assert!(!root.path(folder).exists(), "{folder}");
        }
    }

    #[test]
    fn an_image_starts_the_nft_that_it_has_itself() {
        let folder = tempfile::tempdir().unwrap();
        let root = Root(folder.path().to_owned());
        assert_eq!(root.find("nft"), None);
        fs::create_dir_all(root.path("usr/local/bin")).unwrap();
        std::os::unix::fs::symlink("/nix/store/nft", root.path("usr/local/bin/nft")).unwrap();
        assert_eq!(root.find("nft"), Some(PathBuf::from("/usr/local/bin/nft")));
        fs::create_dir_all(root.path("sbin")).unwrap();
        fs::create_dir_all(root.path("usr/sbin/nft")).unwrap();
        assert_eq!(root.find("nft"), Some(PathBuf::from("/usr/local/bin/nft")), "a folder is no program");
    }

    #[test]
    fn who_removed_the_program_is_told_all_that_it_takes_to_open_the_host() {
        assert!(TO_OPEN.ends_with(&format!(" ingress pref {}", guard::PRIORITY)));
        assert!(TO_OPEN.contains(crate::desired::TABLE));
        assert!(TO_OPEN.lines().all(|line| line.len() < 80), "{TO_OPEN}");
        let package = include_str!("../../../contrib/debian/postrm");
        for line in TO_OPEN.lines().chain(ON_TRIAL.lines()) {
            assert!(package.contains(&format!("echo \"{line}\"\n")), "{line}");
        }
    }

    #[test]
    fn what_the_debian_package_installed_is_left_to_it() {
        for (unit, is_packages) in [
            ("usr/lib/systemd/system/spokeguard.service", true),
            ("lib/systemd/system/spokeguard.service", true),
            ("etc/systemd/system/spokeguard.service", false),
            ("usr/lib/systemd/system/ssh.service", false),
        ] {
            let folder = tempfile::tempdir().unwrap();
            let root = Root(folder.path().to_owned());
            fs::create_dir_all(root.path(unit).parent().unwrap()).unwrap();
            fs::write(root.path(unit), MARK).unwrap();
            assert_eq!(root.packaged(), is_packages.then(|| root.path(unit)), "{unit}");
            let below = folder.path().to_str().unwrap();
            if is_packages {
                for (verb, remedy) in [
                    ("install", format!("systemctl --root={below} enable spokeguard-boot.service")),
                    ("uninstall", "installed by the Debian package: apt remove spokeguard".to_owned()),
                ] {
                    let text = refused(&["spokeguard", verb, "--root", below]);
                    assert!(text.contains(unit) && text.contains(&remedy), "{text}");
                }
                assert_eq!(relative(folder.path()), [unit], "nothing else was written or removed");
            }
        }
        // An image's /lib that leads to this host's, which may have the package.
        let (folder, host) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        fs::create_dir_all(host.path().join("systemd/system")).unwrap();
        fs::write(host.path().join("systemd/system/spokeguard.service"), MARK).unwrap();
        std::os::unix::fs::symlink(host.path(), folder.path().join("lib")).unwrap();
        assert_eq!(Root(folder.path().to_owned()).packaged(), None);
    }

    #[test]
    fn an_image_for_another_processor_gets_no_program_of_ours() {
        let elf = |machine: u16| {
            let mut head = vec![0; 20];
            head[..6].copy_from_slice(b"\x7fELF\x02\x01");
            head[18..].copy_from_slice(&machine.to_le_bytes());
            head
        };
        let folder = tempfile::tempdir().unwrap();
        let root = Root(folder.path().to_owned());
        root.is_for(&elf(62)).expect("nothing is known");
        // By the image's own link: this host has no such file, or one of its own.
        fs::create_dir_all(root.path("bin")).unwrap();
        std::os::unix::fs::symlink("/bin/busybox", root.path("bin/sh")).unwrap();
        fs::write(root.path("bin/busybox"), elf(183)).unwrap();
        root.is_for(&elf(183)).unwrap();
        let text = root.is_for(&elf(62)).unwrap_err().to_string();
        assert!(
            text.contains(" is for aarch64, as its /bin/sh says, and this program for x86_64: "),
            "{text}"
        );
        // A wrapper says nothing; an nft that does comes first.
        fs::create_dir_all(root.path("usr/sbin")).unwrap();
        fs::write(root.path("usr/sbin/nft"), "#!/bin/sh\nexec /opt/nft\n").unwrap();
        assert!(root.is_for(&elf(62)).unwrap_err().to_string().contains("/bin/sh"));
        fs::write(root.path("usr/sbin/nft"), elf(62)).unwrap();
        root.is_for(&elf(62)).unwrap();
        // So is the whole of it refused, before anything is written.
        fs::write(root.path("usr/sbin/nft"), elf(999)).unwrap();
        let text = refused(&["spokeguard", "install", "--root", folder.path().to_str().unwrap()]);
        assert!(text.contains("number 999"), "{text}");
        assert_eq!(relative(folder.path()), ["bin/busybox", "bin/sh", "usr/sbin/nft"]);
    }

    #[test]
    fn nixos_makes_its_units_itself() {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("etc")).unwrap();
        fs::write(folder.path().join("etc/NIXOS"), "").unwrap();
        let text = refused(&["spokeguard", "install", "--root", folder.path().to_str().unwrap()]);
        assert!(text.contains("use the NixOS module (services.spokeguard)"), "{text}");
        assert_eq!(relative(folder.path()), ["etc/NIXOS"], "nothing else was written");
    }

    #[test]
    fn what_the_units_will_not_read_is_refused() {
        let refusal = |more: &[&str]| {
            let words = [&["spokeguard", "install"], more].concat();
            let Cli { global, .. } = Cli::try_parse_from(words).unwrap();
            is_as_the_units_say(&global).err().map(|error| error.to_string()).unwrap_or_default()
        };
        let policy = ["--policy", POLICY];
        assert_eq!(refusal(&policy), "");
        assert_eq!(
            refusal(&["--policy", "/root/new.toml"]),
            "/root/new.toml: the units read /etc/spokeguard/policy.toml alone: copy the policy there, and leave out \
             --policy and SPOKEGUARD_POLICY"
        );
        for (option, default) in [
            ("--state-dir", "/var/lib/spokeguard"),
            ("--run-dir", "/run/spokeguard"),
            ("--pin-dir", "/sys/fs/bpf/spokeguard"),
        ] {
            assert_eq!(refusal(&[&policy[..], &[option, default]].concat()), "");
            let text = refusal(&[&policy[..], &[option, "/srv"]].concat());
            assert_eq!(text, format!("the units know {option} {default} alone: leave it out"));
        }
    }

    #[test]
    fn only_rules_on_trial_are_called_so() {
        for rules in [Rules::Confirmed, Rules::OnTrial, Rules::RolledBack, Rules::NotInForce] {
            let text = started(Ok(rules));
            assert_eq!(text.contains("on trial"), rules == Rules::OnTrial, "{text}");
            assert_eq!(text.contains("are confirmed"), rules == Rules::Confirmed, "{text}");
        }
        let text = started(Err(anyhow::anyhow!("no daemon answers")));
        assert!(text.contains("no daemon answers") && !text.contains("on trial"), "{text}");
    }

    #[test]
    fn what_cannot_be_written_as_a_whole_is_not_begun() {
        let folder = tempfile::tempdir().unwrap();
        let root = Root(folder.path().to_owned());
        // The last of all files.
        let (last, _) = FILES[FILES.len() - 1];
        let obstacle = root.path(&format!("{last}.new"));
        fs::create_dir_all(&obstacle).unwrap();
        let put = || {
            let mut staged = Staged::default();
            root.program(&mut staged)?;
            root.put(staged, Path::new(PROGRAM), Path::new("/usr/sbin/nft"), None)
        };
        let text = format!("{:#}", put().unwrap_err());
        assert!(text.contains(last) && text.contains("nothing was changed"), "{text}");
        assert_eq!(relative(folder.path()), [""; 0], "neither a file nor what was written beside its place");
        fs::remove_dir(obstacle).unwrap();
        put().unwrap();
        assert_eq!(relative(folder.path()).len(), FILES.len() + 1, "{:?}", relative(folder.path()));
    }

    #[test]
    fn what_others_wrote_is_neither_replaced_nor_removed() {
        let folder = tempfile::tempdir().unwrap();
        let root = Root(folder.path().to_owned());
        let unit = root.path("etc/systemd/system/spokeguard.service");
        fs::create_dir_all(unit.parent().unwrap()).unwrap();
        fs::write(&unit, "[Service]\n").unwrap();
        for done in
            [root.put(Staged::default(), Path::new(PROGRAM), Path::new("/usr/sbin/nft"), None), root.take()]
        {
            let text = format!("{:#}", done.unwrap_err());
            assert!(
                text.ends_with("spokeguard.service: not written by spokeguard install; move it away first"),
                "{text}"
            );
        }
        assert_eq!(relative(folder.path()), ["etc/systemd/system/spokeguard.service"], "nothing by halves");
    }
}
