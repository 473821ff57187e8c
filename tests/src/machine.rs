//! A real systemd: in a container whose root is this machine's under an overlay, or, where this is a virtual machine
//! that has one on its disk, as the first process of the kernel that we are in.

mod boots;
mod firewalls;
mod leaving;
mod package;

use std::net::SocketAddr;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::{
    Answer, Lab, OUTSIDER, OUTSIDER_V6, Outcome, Running, SPOKE_MESH, SPOKE_PUBLIC, SPOKE_PUBLIC_V6,
    meanwhile, wait_until, wire,
};

pub use boots::{SSH_BY, is_tunnel, mesh_anew};
pub use leaving::shut_out;
pub use package::debian_package;

pub const SHORT: Duration = Duration::from_millis(400);
/// A container boots in a second or two; a machine that does much else at the time needs its time.
pub const LONG: Duration = Duration::from_secs(60);
const MERGED: &str = "/mnt/merged";

/// Strangers' ports that must never answer, and the one that must.
pub const SHUT: [u16; 2] = [22, 5432];
pub const OPEN: u16 = 80;

/// Whoever writes to it has the first process of a virtual machine become systemd.
pub const BOOT: &str = "/run/boot";

/// Listeners without any daemon of theirs; the cables come in when the network may.
const OWN_UNITS: [(&str, &str); 5] = [
    (
        CABLES,
        "[Unit]\nAfter=network-pre.target\nBefore=network.target\nDefaultDependencies=no\n\
         [Service]\nType=oneshot\nRemainAfterExit=yes\nExecStart=ip link set eth0 up\nExecStart=ip link set wg0 up\n",
    ),
    ("db.socket", "[Socket]\nListenStream=5432\nAccept=yes\n[Unit]\nDefaultDependencies=no\n"),
    ("db@.service", "[Service]\nExecStart=cat\nStandardInput=socket\n"),
    ("web.socket", "[Socket]\nListenStream=80\nAccept=yes\n[Unit]\nDefaultDependencies=no\n"),
    ("web@.service", "[Service]\nExecStart=cat\nStandardInput=socket\n"),
];
const CABLES: &str = "cables.service";
const OWN_WANTED: [&str; 3] = [CABLES, "db.socket", "web.socket"];
/// sshd's unit as Fedora, Arch and openSUSE call it; on Debian an alias of ssh.service.
const SSHD: &str = "etc/systemd/system/sshd.service";
/// udev gives what has no hardware another address soon after it is made; a tunnel has none.
const LINKS: &str = "[Match]\nOriginalName=eth0 wg0\n[Link]\nMACAddressPolicy=none\n";

pub struct Machine<'a> {
    pub lab: &'a Lab,
    /// Its root as seen from here, whether it runs or not.
    root: PathBuf,
    power: Power,
}

enum Power {
    Off,
    /// The program that is the container, and its init.
    Container(Running, u32),
    /// This kernel's first process is, or is to become, systemd.
    Kernel,
}

impl<'a> Machine<'a> {
    /// A container. The root is in the node's own mounts, and goes with them.
    pub fn new(lab: &'a Lab) -> Self {
        // What other tests may make in the root below at any time has to be masked: removed from above, it would be back
        // as soon as they make it.
        lab.spoke
            .sh(&format!(
                "mount -t tmpfs tmpfs /mnt; mkdir -p /mnt/up /mnt/work /mnt/mask/var/lib /mnt/mask/etc {MERGED}
                 for none in var/lib/spokeguard etc/spokeguard; do mknod /mnt/mask/$none c 0 0; done
                 mount -t overlay overlay -o lowerdir=/mnt/mask:/,upperdir=/mnt/up,workdir=/mnt/work {MERGED}
                 cd {MERGED}; rm -rf etc/systemd/system/* run/*; rm -f usr/sbin/policy-rc.d"
            ))
            .unwrap();
        let machine = Machine { lab, root: lab.spoke.path(MERGED), power: Power::Off };
        machine.furnish();
        machine
    }

    /// The whole of the machine that we are in, whose disk is at `root`; it has been furnished before, and its cables
    /// are out until it boots.
    pub fn whole(lab: &'a Lab, root: &Path) -> Self {
        let machine = Machine { lab, root: root.to_path_buf(), power: Power::Kernel };
        machine.unplug();
        machine
    }

    /// What every one of them has, before its first boot.
    pub fn furnish(&self) {
        let script = "rm -rf etc/spokeguard; mkdir -p etc/spokeguard run etc/ssh/sshd_config.d etc/systemd/network
             rm -f etc/ssh/sshd_config.d/*
             printf 'PasswordAuthentication no\nKbdInteractiveAuthentication no\n' > etc/ssh/sshd_config.d/lab.conf
             ssh-keygen -q -A -f .";
        let mut shell = std::process::Command::new("sh");
        let done = shell.args(["-ec", script]).current_dir(&self.root).status().unwrap();
        assert!(done.success(), "furnish the machine: {done}");
        self.write("etc/systemd/network/10-lab.link", LINKS);
        for (name, text) in OWN_UNITS {
            self.write(&format!("etc/systemd/system/{name}"), text);
        }
        for name in OWN_WANTED {
            self.want("multi-user.target", &format!("/etc/systemd/system/{name}"));
        }
        self.want("multi-user.target", "/lib/systemd/system/ssh.service");
        // Who enables it on Debian has made its alias, too.
        let alias = self.path(SSHD);
        let _ = std::fs::remove_file(&alias);
        std::os::unix::fs::symlink("/lib/systemd/system/ssh.service", alias).unwrap();
    }

    pub fn path(&self, below: &str) -> PathBuf {
        self.root.join(below)
    }

    pub fn write(&self, below: &str, text: &str) {
        std::fs::write(self.path(below), text).unwrap();
    }

    /// A file or folder of this machine.
    pub fn copy_in(&self, from: &Path, below: &str) {
        let copied = std::process::Command::new("cp").arg("-r").arg(from).arg(self.path(below)).status();
        assert!(copied.unwrap().success(), "copy {}", from.display());
    }

    /// What a target wants, as if its administrator had enabled it.
    pub fn want(&self, target: &str, unit: &str) {
        let wants = self.path(&format!("etc/systemd/system/{target}.wants"));
        std::fs::create_dir_all(&wants).unwrap();
        let link = wants.join(Path::new(unit).file_name().unwrap());
        match std::os::unix::fs::symlink(unit, &link) {
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
            made => made.unwrap_or_else(|error| panic!("link {}: {error}", link.display())),
        }
    }

    /// A file below folders that may not be there, for root alone.
    pub fn write_new(&self, below: &str, text: &str) {
        let path = self.path(below);
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }

    /// A kernel that knows nothing yet, cables that are out, and power.
    pub fn boot(&mut self) {
        self.boot_with(&[]);
    }

    /// The same; a container may be given more words for what stands for its kernel's command line.
    pub fn boot_with(&mut self, words: &[&str]) {
        self.unplug();
        self.lab.spoke.sh("nft flush ruleset").unwrap();
        match self.power {
            Power::Kernel => self.let_systemd_start(),
            _ => self.start_container(words),
        }
        self.until(LONG, "systemd is up", |machine| {
            let state = machine.try_within(LONG, &["systemctl", "is-system-running", "--wait"]);
            state.is_ok_and(|state| ["running", "degraded"].contains(&state.stdout.trim()))
        })
        .unwrap_or_else(|error| {
            let log =
                if let Power::Container(running, _) = &self.power { running.log() } else { String::new() };
            panic!("{error:#}\n{}\n{log}", self.what_it_waits_for())
        });
    }

    /// For whoever reads of a boot that did not end; a machine that can't be asked says that.
    fn what_it_waits_for(&self) -> String {
        [
            &["systemctl", "list-jobs", "--no-pager"][..],
            &["journalctl", "--no-pager", "-b", "-n", "120", "-o", "short-monotonic"],
            &["ps", "-eo", "pid,stat,etimes,time,wchan:24,args"],
        ]
        .map(|words| match self.try_within(LONG, words) {
            Ok(outcome) => format!("{}:\n{}", words[0], outcome.all()),
            Err(error) => format!("{}: {error:#}\n", words[0]),
        })
        .concat()
    }

    fn unplug(&self) {
        // A cable that is out takes addresses of IPv6 with it, unless they are to stay.
        let script = "for link in eth0 wg0; do
                 ip link show dev $link >/dev/null 2>&1 || continue
                 echo 1 >/proc/sys/net/ipv6/conf/$link/keep_addr_on_down
                 ip link set $link down
             done";
        self.lab.spoke.sh(script).unwrap();
    }

    fn let_systemd_start(&self) {
        std::fs::write(BOOT, "now\n").unwrap();
        wait_until(LONG, "systemd is the first process", || {
            (std::fs::read_to_string("/proc/1/comm").ok()?.trim() == "systemd").then_some(())
        })
        .unwrap();
        // Before that nobody can be asked, and then one question is enough.
        self.until(LONG, "systemd listens", |_| Path::new("/proc/1/root/run/systemd/private").exists())
            .unwrap();
    }

    fn start_container(&mut self, more: &[&str]) {
        self.lab.spoke.sh("rm -rf /sys/fs/bpf/spokeguard").unwrap();
        let program = std::env::var("SPOKEGUARD_BIN").unwrap();
        let mut words = vec![
            "systemd-nspawn",
            "--quiet",
            "--register=no",
            "--keep-unit",
            "--capability=all",
            "--system-call-filter=bpf perf_event_open",
            "--bind=/sys/fs/bpf",
            "--link-journal=no",
            "--directory",
            MERGED,
        ];
        let bind = format!("--bind-ro={program}:/opt/spokeguard");
        words.extend([&bind, "--boot", "systemd.unit=multi-user.target"]);
        words.extend(more);
        let mut command = self.lab.spoke.command(&words);
        command.env("SYSTEMD_NSPAWN_UNIFIED_HIERARCHY", "1");
        let running = self.lab.spoke.start(command, "systemd-nspawn").unwrap();
        let pid = running.pid();
        let log = running.log();
        let init = wait_until(LONG, "the container's init", || {
            let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).ok()?;
            // Before init there is a helper of nspawn's.
            let is_init = |child: &&str| {
                let status = std::fs::read_to_string(format!("/proc/{child}/status")).unwrap_or_default();
                let named = status.lines().find_map(|line| line.strip_prefix("NSpid:"));
                named.is_some_and(|line| line.split_whitespace().last() == Some("1"))
            };
            children.split_whitespace().find(is_init)?.parse().ok()
        })
        .unwrap_or_else(|error| panic!("{error:#}\n{log}"));
        self.power = Power::Container(running, init);
    }

    /// The plug is pulled. That of a whole machine is its harness's.
    pub fn cut_power(&mut self) {
        self.ends_by(|init| {
            let init = rustix::process::Pid::from_raw(init as i32).unwrap();
            rustix::process::kill_process(init, crate::Signal::KILL).unwrap();
        });
    }

    /// All that runs is told to end, one after another.
    pub fn shuts_down(&mut self) {
        self.ok(&["systemctl", "--no-block", "poweroff"]);
        self.ends_by(|_| ());
    }

    fn ends_by(&mut self, end: impl FnOnce(u32)) {
        let Power::Container(running, init) = std::mem::replace(&mut self.power, Power::Off) else {
            panic!("only a container that runs can be cut off")
        };
        end(init);
        wait_until(LONG, "the container is gone", || {
            (!std::path::Path::new(&format!("/proc/{init}")).exists()).then_some(())
        })
        .unwrap();
        drop(running);
    }

    pub fn run(&self, words: &[&str]) -> Outcome {
        self.run_within(Duration::from_secs(20), words)
    }

    pub fn run_within(&self, limit: Duration, words: &[&str]) -> Outcome {
        self.try_within(limit, words).unwrap()
    }

    fn try_within(&self, limit: Duration, words: &[&str]) -> anyhow::Result<Outcome> {
        let init = match &self.power {
            Power::Off => panic!("{words:?} on a machine without power"),
            Power::Container(_, init) => init.to_string(),
            Power::Kernel => "1".to_owned(),
        };
        let enter = ["nsenter", "--all", "--target", &init, "--"];
        let all: Vec<&str> = enter.into_iter().chain(words.iter().copied()).collect();
        // Not by way of the node: its mounts aren't the container's.
        self.lab.spoke.run_within(limit, &all)
    }

    #[track_caller]
    pub fn ok(&self, words: &[&str]) -> String {
        self.ok_within(Duration::from_secs(20), words)
    }

    #[track_caller]
    pub fn ok_within(&self, limit: Duration, words: &[&str]) -> String {
        let outcome = self.run_within(limit, words);
        assert_eq!(outcome.code, Some(0), "{words:?}: {}\n{}", outcome.all(), self.journal());
        outcome.stdout
    }

    pub fn journal(&self) -> String {
        // On a disk that has lost its power what journald has not put there yet may read as nothing at all (Linux 7.2).
        let synced = self.run(&["journalctl", "--sync"]);
        let read = self.run(&["journalctl", "--no-pager", "-n", "60", "-u", "spokeguard*"]);
        if read.stdout.contains("spokeguard") {
            return read.stdout;
        }
        let why = "journalctl --no-pager -n 20; ls -la /var/log/journal/* /run/log/journal/*
             systemctl status --no-pager systemd-journald; df /var/log; dmesg | tail -n 30";
        format!("{}{}{}", synced.all(), read.all(), self.run(&["sh", "-c", why]).all())
    }

    pub fn property(&self, unit: &str, name: &str) -> String {
        self.ok(&["systemctl", "show", "-p", name, "--value", unit]).trim().to_owned()
    }

    /// As systemd judges the daemon's unit, from 0 (nothing to lose) to 10.
    #[track_caller]
    pub fn is_hardened(&self) {
        let words = ["systemd-analyze", "security", "--no-pager", "--threshold=30", "spokeguard.service"];
        let exposure = self.run(&words);
        assert_eq!(exposure.code, Some(0), "{}", exposure.stdout);
    }

    /// As systemd reads our units and those: for a key that it doesn't know it prints a line, and is content.
    #[track_caller]
    pub fn units_are_plain(&self, more: &[&str]) {
        let ours = ["spokeguard.service", "spokeguard-boot.service", "spokeguard-shut.service"];
        let words = [&["systemd-analyze", "verify", "--man=no"], &ours[..], more].concat();
        let read = self.run(&words);
        assert!(read.code == Some(0) && read.is_silent(), "{}", read.all());
    }

    /// Everything that has our name in it, wherever a program may be put, but for what dpkg logs.
    pub fn left(&self) -> String {
        // What else the host's root has may be large, and nothing is ever installed there.
        let places = "/etc /usr /var /boot /srv";
        self.ok(&[
            "sh",
            "-c",
            &format!(
                "for at in {places}; do ! test -d $at || find $at -xdev -path /var/tmp -prune \
                   -o -name '*spokeguard*' -print; done; \
                 find /run -name '*spokeguard*' -not -path '/run/systemd/*'"
            ),
        ])
    }

    pub fn status(&self) -> serde_json::Value {
        self.run(&["spokeguard", "status", "--format", "json"]).json().unwrap_or_default()
    }

    pub fn rules(&self) -> String {
        self.status()["daemon"]["rules"].as_str().unwrap_or_default().to_owned()
    }

    #[track_caller]
    pub fn wait(&self, what: &str, seen: impl FnMut(&Self) -> bool) {
        self.until(LONG, what, seen).unwrap_or_else(|error| {
            let state =
                self.run(&["sh", "-c", "ip -br address; nft list ruleset; systemctl --failed --no-pager"]);
            panic!("{error:#}\n{:#}\n{}\n{}", self.status(), self.journal(), state.all())
        });
    }

    fn until(&self, limit: Duration, what: &str, mut seen: impl FnMut(&Self) -> bool) -> anyhow::Result<()> {
        wait_until(limit, what, || {
            let seen = seen(self);
            if !seen && matches!(self.power, Power::Kernel) {
                // Under emulation looking takes long, and time that is slept through nothing.
                std::thread::sleep(Duration::from_millis(250));
            }
            seen.then_some(())
        })
    }

    /// The hub's way in.
    pub fn hub_gets_in(&self) -> bool {
        self.lab.hub.connect(SocketAddr::new(SPOKE_MESH, 22), SHORT) == Answer::Open
    }

    pub fn answer(&self, port: u16) -> Answer {
        self.lab.internet.connect(SocketAddr::new(SPOKE_PUBLIC, port), SHORT)
    }

    /// Knocks at the ports that must stay shut while `work` goes on, and at the open one. What began a connection at
    /// the shut ones, or refused one, is counted by the kernel of the stranger; a FIN is of one from before, which the
    /// rules took away. An ICMP error quotes the packet it is about, and with it the port (RFC 792; RFC 4443): another
    /// firewall may well refuse what ours lets by.
    #[track_caller]
    pub fn nobody_answers_while(&mut self, work: impl FnOnce(&mut Self)) -> Heard {
        let heard = self.knocked_at_while(work);
        assert!(
            heard.knocks > 50 && heard.per_second() > SELDOM,
            "{:.0} a second: {heard:?}",
            heard.per_second()
        );
        assert!(heard.rest < REST, "nobody knocked for {:?}", heard.rest);
        assert_eq!(heard.shut, 0, "answers from shut ports");
        heard
    }

    /// What a stranger heard who knocked at those ports meanwhile.
    pub fn knocked_at_while(&mut self, work: impl FnOnce(&mut Self)) -> Heard {
        let [ssh, db] = SHUT;
        self.lab
            .internet
            .nft(&format!(
                "add table inet seen\ndelete table inet seen\ntable inet seen {{
                   counter shut {{ }}
                   counter open4 {{ }}
                   counter open6 {{ }}
                   counter knocks {{ }}
                   chain back {{ type filter hook input priority -300
                     tcp sport {{ {ssh}, {db} }} tcp flags & (syn | rst) != 0 counter name shut
                     ip saddr {SPOKE_PUBLIC} icmp type destination-unreachable @th,240,16 {{ {ssh}, {db} }} counter name shut
                     ip6 saddr {SPOKE_PUBLIC_V6} icmpv6 type destination-unreachable @th,400,16 {{ {ssh}, {db} }} counter name shut
                     meta nfproto ipv4 tcp sport {OPEN} tcp flags & (syn | ack) == syn | ack counter name open4
                     meta nfproto ipv6 tcp sport {OPEN} tcp flags & (syn | ack) == syn | ack counter name open6
                   }}
                   chain forth {{ type filter hook output priority -300; tcp dport {{ {ssh}, {db} }} counter name knocks; }}
                 }}"
            ))
            .unwrap();
        let lab = self.lab;
        // What knocks while nobody answers for an address waits for the next second to be sent.
        let shown = lab.spoke.sh("ip -br link show dev eth0").unwrap();
        let mac = shown.split_whitespace().nth(2).unwrap();
        for address in [SPOKE_PUBLIC, SPOKE_PUBLIC_V6] {
            let known = format!("ip neigh replace {address} lladdr {mac} nud permanent dev spoke0");
            lab.internet.sh(&known).unwrap();
        }
        let begun = Instant::now();
        let ((), rest) = meanwhile(|stop| lab.internet.inside(|| knock(stop)).unwrap(), || work(self));
        let lasted = begun.elapsed();
        let heard = Heard {
            knocks: self.counted("knocks"),
            shut: self.counted("shut"),
            open: OPENED.map(|name| self.counted(name)),
            lasted,
            rest,
        };
        eprintln!("{:.0} knocks a second: {heard:?}", heard.per_second());
        heard
    }

    /// While knocks go on: until the open port has answered some of them, by IPv4 and by IPv6.
    #[track_caller]
    pub fn is_heard_open(&self) {
        self.wait(&format!("{OPEN} answers who knocks"), |machine| {
            OPENED.iter().all(|name| machine.counted(name) > FEW)
        });
    }

    /// By the kernel of the stranger who knocks.
    fn counted(&self, name: &str) -> u64 {
        let text = self.lab.internet.sh(&format!("nft list counter inet seen {name}")).unwrap();
        let mut words = text.split_whitespace().skip_while(|word| *word != "packets");
        words.nth(1).and_then(|word| word.parse().ok()).unwrap()
    }
}

const OPENED: [&str; 2] = ["open4", "open6"];
/// Answers that may have been by chance.
pub const FEW: u64 = 5;
/// Knocks a second that are too few: two ports every 5 ms are 400, and on a processor that boots as well some are late.
const SELDOM: f64 = 100.0;
/// What may be there for less, and is not seen.
const REST: Duration = Duration::from_secs(1);

/// In packets.
#[derive(Debug)]
pub struct Heard {
    /// Sent to the ports that must stay shut.
    pub knocks: u64,
    /// Of them, answered.
    pub shut: u64,
    /// That the open port took a connection, by IPv4 and by IPv6.
    pub open: [u64; 2],
    pub lasted: Duration,
    /// The longest that nobody knocked.
    pub rest: Duration,
}

impl Heard {
    fn per_second(&self) -> f64 {
        self.knocks as f64 / self.lasted.as_secs_f64()
    }
}

/// A new connection to each port every 5 ms, by IPv4 and IPv6 in turn. What the open one takes is ended before its
/// server knows: systemd would have a process for each.
/// Gives the longest time between two rounds.
fn knock(stop: &AtomicBool) -> anyhow::Result<Duration> {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, connect, socket_with};
    let families =
        [(AddressFamily::INET, OUTSIDER, SPOKE_PUBLIC), (AddressFamily::INET6, OUTSIDER_V6, SPOKE_PUBLIC_V6)];
    let sender = wire::Sender::open()?;
    let mut ports = (20_000..30_000).cycle();
    let (mut last, mut longest) = (Instant::now(), Duration::ZERO);
    while !stop.load(Ordering::Relaxed) {
        let mut begun = Vec::new();
        for (family, from, address) in families.iter().cycle().take(20) {
            for port in SHUT {
                let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
                let socket = socket_with(*family, SocketType::STREAM, flags, None)?;
                let _ = connect(&socket, &SocketAddr::new(*address, port));
                begun.push(socket);
            }
            let way = (*from, *address);
            let syn = wire::tcp(way, (ports.next().unwrap_or_default(), OPEN), wire::SYN);
            sender.send_or_lose(&wire::ip(way, wire::TCP, &syn), *address);
            longest = longest.max(last.elapsed());
            last = Instant::now();
            std::thread::sleep(Duration::from_millis(5));
        }
    }
    Ok(longest)
}
