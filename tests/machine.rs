//! A real systemd, in a container whose root is this machine's under an overlay.

use std::net::SocketAddr;
use std::os::unix::fs::DirBuilderExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use lab::{Answer, Lab, Outcome, Running, SPOKE_MESH, SPOKE_PUBLIC, wait_until};

pub const SHORT: Duration = Duration::from_millis(400);
/// A container boots in a second or two; a machine that does much else at the time needs its time.
pub const LONG: Duration = Duration::from_secs(60);
const MERGED: &str = "/mnt/merged";

/// Strangers' ports that must never answer, and the one that must.
pub const SHUT: [u16; 2] = [22, 5432];
pub const OPEN: u16 = 80;

/// Listeners without any daemon of theirs; the cables come in when the network may.
const OWN_UNITS: [(&str, &str); 5] = [
    (
        "cables.service",
        "[Unit]\nAfter=network-pre.target\nBefore=network.target\nDefaultDependencies=no\n\
         [Service]\nType=oneshot\nRemainAfterExit=yes\nExecStart=ip link set eth0 up\nExecStart=ip link set wg0 up\n",
    ),
    ("db.socket", "[Socket]\nListenStream=5432\nAccept=yes\n[Unit]\nDefaultDependencies=no\n"),
    ("db@.service", "[Service]\nExecStart=cat\nStandardInput=socket\n"),
    ("web.socket", "[Socket]\nListenStream=80\nAccept=yes\n[Unit]\nDefaultDependencies=no\n"),
    ("web@.service", "[Service]\nExecStart=cat\nStandardInput=socket\n"),
];
const WANTED: [&str; 4] = ["cables.service", "db.socket", "web.socket", "ssh.service"];

pub struct Machine<'a> {
    pub lab: &'a Lab,
    booted: Option<(Running, u32)>,
}

impl<'a> Machine<'a> {
    /// The root is in the node's own mounts, and goes with them.
    pub fn new(lab: &'a Lab) -> Self {
        lab.spoke
            .sh(&format!(
                "mount -t tmpfs tmpfs /mnt; mkdir /mnt/up /mnt/work {MERGED}
                 mount -t overlay overlay -o lowerdir=/,upperdir=/mnt/up,workdir=/mnt/work {MERGED}
                 cd {MERGED}; rm -rf etc/systemd/system/* var/lib/spokeguard etc/spokeguard run/*
                 mkdir -p etc/spokeguard run; rm -f usr/sbin/policy-rc.d
                 mkdir -p etc/ssh/sshd_config.d; rm -f etc/ssh/sshd_config.d/*
                 printf 'PasswordAuthentication no\nKbdInteractiveAuthentication no\n' > etc/ssh/sshd_config.d/lab.conf
                 ssh-keygen -q -A -f ."
            ))
            .unwrap();
        let machine = Machine { lab, booted: None };
        for (name, text) in OWN_UNITS {
            machine.write(&format!("etc/systemd/system/{name}"), text);
        }
        machine
    }

    pub fn path(&self, below: &str) -> PathBuf {
        self.lab.spoke.path(&format!("{MERGED}/{below}"))
    }

    pub fn write(&self, below: &str, text: &str) {
        std::fs::write(self.path(below), text).unwrap();
    }

    /// The same below folders that may not be there, for root alone.
    pub fn write_new(&self, below: &str, text: &str) {
        let path = self.path(below);
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }

    /// A kernel that knows nothing yet, cables that are out, and power.
    pub fn boot(&mut self) {
        self.lab
            .spoke
            .sh("ip link set eth0 down; ip link set wg0 down; nft flush ruleset; rm -rf /sys/fs/bpf/spokeguard")
            .unwrap();
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
        let wants = WANTED.map(|unit| format!("systemd.wants={unit}"));
        words.push(&bind);
        words.push("--boot");
        words.extend(wants.iter().map(String::as_str));
        words.push("systemd.unit=multi-user.target");
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
        self.booted = Some((running, init));
        wait_until(LONG, "systemd is up", || {
            let state = self.run(&["systemctl", "is-system-running"]).stdout;
            ["running", "degraded"].contains(&state.trim()).then_some(())
        })
        .unwrap_or_else(|error| {
            let jobs = self.run(&["systemctl", "list-jobs", "--no-pager"]).all();
            panic!("{error:#}\n{jobs}\n{}", self.booted.as_ref().unwrap().0.log())
        });
    }

    /// The plug is pulled.
    pub fn cut_power(&mut self) {
        let (running, init) = self.booted.take().unwrap();
        rustix::process::kill_process(
            rustix::process::Pid::from_raw(init as i32).unwrap(),
            lab::Signal::KILL,
        )
        .unwrap();
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
        let init = self.booted.as_ref().unwrap().1.to_string();
        let enter = ["nsenter", "--all", "--target", &init, "--"];
        let all: Vec<&str> = enter.into_iter().chain(words.iter().copied()).collect();
        // Not by way of the node: its mounts aren't the container's.
        self.lab.spoke.run_within(limit, &all).unwrap()
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
        self.run(&["journalctl", "--no-pager", "-n", "60", "-u", "spokeguard*"]).stdout
    }

    pub fn property(&self, unit: &str, name: &str) -> String {
        self.ok(&["systemctl", "show", "-p", name, "--value", unit]).trim().to_owned()
    }

    /// Everything in the file system that has our name in it, but for what dpkg logs.
    pub fn left(&self) -> String {
        let workspace = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().display();
        self.ok(&[
            "sh",
            "-c",
            &format!(
                "find / -xdev '(' -path /proc -o -path /sys -o -path /tmp -o -path /opt -o -path /root \
                   -o -path {workspace} -o -path /home -o -path /mnt -o -path /var/tmp ')' -prune \
                   -o -name '*spokeguard*' -print; \
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
    pub fn wait(&self, what: &str, mut seen: impl FnMut(&Self) -> bool) {
        wait_until(LONG, what, || seen(self).then_some(())).unwrap_or_else(|error| {
            let state =
                self.run(&["sh", "-c", "ip -br address; nft list ruleset; systemctl --failed --no-pager"]);
            panic!("{error:#}\n{:#}\n{}\n{}", self.status(), self.journal(), state.all())
        });
    }

    /// The hub's way in.
    pub fn hub_gets_in(&self) -> bool {
        self.lab.hub.connect(SocketAddr::new(SPOKE_MESH, 22), SHORT) == Answer::Open
    }

    pub fn answer(&self, port: u16) -> Answer {
        self.lab.internet.connect(SocketAddr::new(SPOKE_PUBLIC, port), SHORT)
    }

    /// Knocks at the ports that must stay shut while `work` goes on. What came back from
    /// them, resets too, is counted by the kernel of the stranger.
    #[track_caller]
    pub fn nobody_answers_while(&mut self, work: impl FnOnce(&mut Self)) {
        let [ssh, db] = SHUT;
        self.lab
            .internet
            .nft(&format!(
                "add table inet seen\ndelete table inet seen\ntable inet seen {{
                   counter shut {{ }}
                   counter knocks {{ }}
                   chain back {{ type filter hook input priority -300; tcp sport {{ {ssh}, {db} }} counter name shut; }}
                   chain forth {{ type filter hook output priority -300; tcp dport {{ {ssh}, {db} }} counter name knocks; }}
                 }}"
            ))
            .unwrap();
        let lab = self.lab;
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| lab.internet.inside(|| knock(&stop)).unwrap());
            let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| work(self)));
            stop.store(true, Ordering::Relaxed);
            done.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        });
        let count = |name: &str| -> u64 {
            let text = lab.internet.sh(&format!("nft list counter inet seen {name}")).unwrap();
            let mut words = text.split_whitespace().skip_while(|word| *word != "packets");
            words.nth(1).and_then(|word| word.parse().ok()).unwrap()
        };
        assert!(count("knocks") > 50, "{} knocks", count("knocks"));
        assert_eq!(count("shut"), 0, "answers from shut ports");
    }
}

/// A new connection to each shut port every 5 ms.
fn knock(stop: &AtomicBool) -> anyhow::Result<()> {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, connect, socket_with};
    while !stop.load(Ordering::Relaxed) {
        let mut begun = Vec::new();
        for _ in 0..20 {
            for port in SHUT {
                let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
                let socket = socket_with(AddressFamily::INET, SocketType::STREAM, flags, None)?;
                let _ = connect(&socket, &SocketAddr::new(SPOKE_PUBLIC, port));
                begun.push(socket);
            }
            std::thread::park_timeout(Duration::from_millis(5));
        }
    }
    Ok(())
}
