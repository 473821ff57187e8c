//! The Debian package: installed, upgraded, removed and purged.

use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use super::boots::{LATE, ON_MESH_ALONE};
use super::{LONG, Machine, OPEN, Power};
use crate::{Answer, SPOKE_MESH, packets_lost};

const SERVICE: &str = "spokeguard.service";
const BOOT: &str = "spokeguard-boot.service";
/// In the machine, across its boots.
const DEB: &str = "/opt/spokeguard.deb";
const PROGRAM: &str = "usr/bin/spokeguard";
const PROGRAM_AWAY: &str = "opt/spokeguard-away";
/// What had our name in it before the package came.
const LEFT_BEFORE: &str = "opt/left-before";

const EXPIRED: &str = "
[[exception]]
name = \"over\"
tcp = [2222]
from = [\"192.0.2.0/24\"]
reason = \"a test\"
owner = \"lab\"
until = \"2020-01-31\"
";

/// The package of a program of this machine's architecture, made in `out`.
pub fn debian_package(program: &Path, out: &Path) -> Result<PathBuf> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command.current_dir(env!("CARGO_MANIFEST_DIR")).args(["run", "--quiet", "--package", "xtask", "--"]);
    command.args(["dist", "--package-of"]).arg(program).arg("--out").arg(out);
    let made = command.output().context("start cargo")?;
    let text = String::from_utf8_lossy(&made.stdout);
    ensure!(made.status.success(), "make a package: {text}\n{}", String::from_utf8_lossy(&made.stderr));
    text.lines().last().map(PathBuf::from).context("no package was named")
}

impl Machine<'_> {
    /// On a host that runs without any of ours: the package asks nothing, breaks nothing, and is upgraded.
    /// `earlier`: a package of another version, which it goes back to and is upgraded from.
    /// At its next boot the host has the package's units, confirmed rules, and no program of ours.
    #[track_caller]
    pub fn stands_its_package(&mut self, package: &Path, earlier: Option<&Path>) {
        let (deb, later) = (DEB, "/opt/later.deb");
        let machine = self;
        machine.copy_in(package, deb.trim_start_matches('/'));
        assert_eq!(machine.answer(22), Answer::Open, "there is something to shut");
        machine.write(LEFT_BEFORE, &machine.left());

        // Without a policy the units are there, and nothing else happens.
        let sshd = machine.property("ssh.service", "MainPID");
        machine.write_new(LATE, "[Unit]\nAfter=network-online.target\n");
        let told = machine.dpkg("--install", deb);
        assert_eq!(told.matches("ATTENTION: nftables.service was changed").count(), 1, "{told}");
        std::fs::remove_file(machine.path(LATE)).unwrap();
        assert!(told.contains("spokeguard: not started, for want of a policy"), "{told}");
        assert_eq!([machine.enabled(SERVICE), machine.enabled(BOOT)], ["enabled", "enabled"]);
        machine.ok(&["systemctl", "start", SERVICE, BOOT]);
        assert_eq!(machine.property(SERVICE, "ActiveState"), "inactive", "also at the next boot");
        assert_eq!(machine.ok(&["nft", "list", "ruleset"]), "");
        assert_eq!(machine.answer(22), Answer::Open);
        assert_eq!(machine.property("ssh.service", "MainPID"), sshd);
        for file in [
            "/usr/share/man/man1/spokeguard.1.gz",
            "/usr/share/man/man1/spokeguard-policy-check.1.gz",
            "/usr/share/bash-completion/completions/spokeguard",
            "/usr/lib/spokeguard/shut.nft",
            "/usr/share/doc/spokeguard/copyright",
        ] {
            machine.ok(&["test", "-s", file]);
        }
        let completes = "source /usr/share/bash-completion/completions/spokeguard; complete -p spokeguard";
        machine.ok(&["bash", "-ec", completes]);
        let pages = "for page in /usr/share/man/man1/spokeguard*; do gzip -dc $page | grep -q '^.TH spokeguard'; done";
        machine.ok(&["sh", "-ec", pages]);
        // A policy with a mistake starts nothing, and the package is installed all the same.
        machine.dpkg("--purge", "spokeguard");
        machine.write_new("etc/spokeguard/policy.toml", "version = 1\n");
        let told = machine.dpkg("--install", deb);
        assert!(!told.contains("spokeguard: started") && !told.contains("ATTENTION"), "{told}");
        assert_eq!(machine.property(SERVICE, "ActiveState"), "inactive");

        // With one, what `spokeguard install` did is taken over while it runs.
        // An exception past its day is no reason to leave a daemon with its old program.
        machine.write("etc/spokeguard/policy.toml", &(machine.lab.plain_policy() + EXPIRED));
        machine.dpkg("--purge", "spokeguard");
        machine.ok(&["/opt/spokeguard", "install"]);
        machine.wait("the rules are on trial", |machine| machine.rules() == "on-trial");
        machine.ok(&["spokeguard", "confirm"]);
        machine.wait("confirmed", |machine| machine.rules() == "confirmed");
        assert_eq!(machine.program(), "/usr/local/sbin/spokeguard");
        machine.nobody_answers_while(|machine| machine.is_taken_over_by(deb));
        machine.is_hardened();
        // Whoever put the units there by itself leaves those of the package to it.
        let put = machine.left();
        for (verb, remedy) in [("install", "systemctl enable --now"), ("uninstall", "apt remove spokeguard")]
        {
            let refused = machine.run(&["spokeguard", verb]);
            assert!(refused.code == Some(2) && refused.stderr.contains(remedy), "{}", refused.all());
        }
        assert_eq!(machine.left(), put);
        assert_eq!([machine.enabled(SERVICE), machine.enabled(BOOT)], ["enabled", "enabled"]);

        if let Some(earlier) = earlier {
            let back = "/opt/earlier.deb";
            machine.copy_in(earlier, back.trim_start_matches('/'));
            let pid = machine.property(SERVICE, "MainPID");
            machine.nobody_answers_while(|machine| {
                machine.dpkg("--install", back);
                machine.wait("the earlier daemon", |machine| {
                    machine.property(SERVICE, "MainPID") != pid && machine.rules() == "confirmed"
                });
            });
        }
        // An upgrade changes the daemon; rules and counts go on, and so does who is logged in.
        machine.ok(&["sh", "-ec", &upgraded(deb, later)]);
        let ssh = SocketAddr::new(SPOKE_MESH, 22);
        let hub = machine.lab.hub.inside(|| Ok(std::net::TcpStream::connect_timeout(&ssh, LONG)?)).unwrap();
        let mut heard = vec![0; 1024];
        let greeted = machine.lab.hub.inside(|| {
            hub.set_read_timeout(Some(LONG))?;
            Ok((&hub).read(&mut heard)?)
        });
        assert!(heard[..greeted.unwrap()].starts_with(b"SSH-"));
        // The daemon's first, after which it rests: what an earlier version's does to others is not ours to say.
        machine.wait("an audit is over", |machine| machine.status()["daemon"]["audit"]["at"].is_string());
        let (before_it, table) = (machine.drops().unwrap(), machine.table());
        let dropped: f64 = before_it.values().sum();
        let lost = packets_lost();
        assert!(dropped > 0.0);
        let pid = machine.property(SERVICE, "MainPID");
        machine.ok(&["systemctl", "disable", "--quiet", BOOT]);
        // As `systemctl edit --full` makes it, of one that has a program of his own where `spokeguard install` has its.
        let edited = machine.path("etc/systemd/system/spokeguard.service");
        let text = machine.ok(&["cat", "/usr/lib/systemd/system/spokeguard.service"]);
        let (packaged, own) = ("ExecStart=/usr/bin/spokeguard ", "ExecStart=/usr/local/sbin/spokeguard ");
        assert!(text.contains(packaged), "{text}");
        let text = text.replace(packaged, own);
        std::fs::write(&edited, &text).unwrap();
        machine.ok(&["ln", "-s", "/usr/bin/spokeguard", "/usr/local/sbin/spokeguard"]);
        let knocked = machine.nobody_answers_while(|machine| {
            machine.dpkg("--install", later);
            machine.wait("the new daemon", |machine| {
                machine.property(SERVICE, "MainPID") != pid && machine.rules() == "confirmed"
            });
        });
        // An audit takes nobody's place. (Of a machine without a kernel of its own others fill that queue as well.)
        if matches!(machine.power, Power::Kernel) {
            assert_eq!(packets_lost() - lost, 0, "packets that found a full queue");
        }
        // Across the two daemons not one is lost or counted twice.
        let mut after_it = before_it.clone();
        let read = machine.until(LONG, "the counters are read", |machine| {
            after_it = machine.drops().unwrap();
            after_it.values().sum::<f64>() - dropped >= knocked.knocks as f64
        });
        let counted = after_it.values().sum::<f64>() - dropped;
        assert!(
            read.is_ok() && counted == knocked.knocks as f64,
            "{counted} counted of {knocked:?}\nbefore: {before_it:#?}\nafter: {after_it:#?}\n{}",
            machine.journal()
        );
        // Its number; the rules in it are put there once more when the daemon tries whether it repairs them.
        assert_eq!(machine.table().lines().next(), table.lines().next());
        // sshd goes on with what comes by that connection: it offers its algorithms.
        (&hub).write_all(b"SSH-2.0-lab\r\n").unwrap();
        assert!((&hub).read(&mut heard).unwrap() > 100, "what sshd says after the upgrade");
        assert_eq!(machine.enabled(BOOT), "disabled", "as its administrator wants it");
        assert_eq!(std::fs::read_to_string(&edited).unwrap(), text, "its administrator's");
        machine.ok(&["rm", "/usr/local/sbin/spokeguard"]);
        std::fs::remove_file(&edited).unwrap();
        machine.ok(&["systemctl", "daemon-reload"]);
        machine.ok(&["systemctl", "enable", "--quiet", BOOT]);
        std::fs::rename(machine.path(PROGRAM), machine.path(PROGRAM_AWAY)).unwrap();
    }

    /// That boot; then the program is there again, and the package goes, and leaves what it says.
    #[track_caller]
    pub fn boots_and_loses_its_package(&mut self) {
        let machine = self;
        machine.boots_shut();
        assert_ne!(
            machine.property(SERVICE, "ActiveState"),
            "active",
            "there is a daemon, so this proves nothing"
        );
        assert_eq!(machine.fragment(BOOT), "/lib/systemd/system/spokeguard-boot.service");
        machine.nobody_answers_while(|machine| {
            std::fs::rename(machine.path(PROGRAM_AWAY), machine.path(PROGRAM)).unwrap();
            machine.wait("the daemon is back", |machine| machine.rules() == "confirmed");
        });
        machine.sshd_has_our_drop_ins("/usr/lib/systemd/system/");

        // Removed, it leaves what is in force and says how to open the host.
        machine.nobody_answers_while(|machine| {
            let told = machine.dpkg("--remove", "spokeguard");
            assert!(told.contains("the rules in force stay until the next boot"), "{told}");
            assert!(told.contains("nft delete table inet spokeguard"), "{told}");
            // sshd is on every address, and nothing is on trial.
            assert!(!told.contains("ATTENTION") && !told.contains("on trial"), "{told}");
            assert_eq!(machine.answer(OPEN), Answer::Open);
            assert!(machine.hub_gets_in());
            assert_eq!(machine.run(&["systemctl", "is-active", SERVICE]).stdout, "inactive\n");
            // Installed again, it goes on where it was.
            machine.dpkg("--install", DEB);
            machine.wait("the daemon is back", |machine| machine.rules() == "confirmed");
            // Also where `spokeguard install` came in between: dpkg knows of an earlier version then.
            machine.dpkg("--remove", "spokeguard");
            machine.ok_within(LONG, &["/opt/spokeguard", "install"]);
            machine.wait("install's daemon", |machine| machine.rules() == "confirmed");
            assert_eq!(machine.program(), "/usr/local/sbin/spokeguard");
            machine.is_taken_over_by(DEB);
            let told = machine.dpkg("--purge", "spokeguard");
            assert!(told.contains("kept, since you wrote it: /etc/spokeguard/policy.toml"), "{told}");
        });
        assert_eq!(machine.left(), machine.left_before());

        // Purged in a panic, by who comes in by the mesh address alone.
        machine.write("etc/spokeguard/policy.toml", &machine.lab.plain_policy());
        machine.dpkg("--install", DEB);
        machine.wait("the daemon is back", |machine| machine.rules() == "confirmed");
        machine.has_ssh_on_mesh_alone();
        machine.goes_back_without_us(|machine| {
            let told = machine.dpkg("--purge", "spokeguard");
            assert!(told.contains("They are on trial, though"), "{told}");
            let attention = format!("ATTENTION: ssh.service listens on\n  {SPOKE_MESH}:22\n");
            assert!(told.contains(&attention) && told.contains("\n  Restart=always\n"), "{told}");
        });
        std::fs::remove_file(machine.path(ON_MESH_ALONE)).unwrap();
    }

    /// The boot after that: the host is as it was.
    #[track_caller]
    pub fn boots_without_its_package(&mut self) {
        self.boots_open();
        self.wait("sshd greets the hub", Self::sshd_greets);
        self.is_without_us(&self.left_before());
    }

    fn left_before(&self) -> String {
        std::fs::read_to_string(self.path(LEFT_BEFORE)).unwrap()
    }

    /// Where a unit lies, as Debian 12 calls it: Debian 13 says where /lib leads to.
    fn fragment(&self, unit: &str) -> String {
        let path = self.property(unit, "FragmentPath");
        path.strip_prefix("/usr").unwrap_or(&path).to_owned()
    }

    /// Units of `spokeguard install`, whose daemon runs, give way to the package's.
    #[track_caller]
    fn is_taken_over_by(&self, deb: &str) {
        let told = self.dpkg("--install", deb);
        assert!(told.contains("removed /etc/systemd/system/spokeguard.service of"), "{told}");
        assert_eq!(told.matches("spokeguard: removed ").count(), 7, "{told}");
        self.wait("the package's daemon", |machine| machine.rules() == "confirmed");
        assert_eq!(self.program(), "/usr/bin/spokeguard");
        assert_eq!(self.fragment(SERVICE), "/lib/systemd/system/spokeguard.service");
        assert_eq!(self.run(&["test", "-e", "/usr/local/sbin/spokeguard"]).code, Some(1));
        assert_eq!([self.enabled(SERVICE), self.enabled(BOOT)], ["enabled", "enabled"]);
    }

    /// Lets dpkg know of nftables alone, before a boot: it reads all that it knows every time, and this machine's
    /// developers have much installed.
    pub fn forget_packages(&self) {
        let known = Command::new("dpkg-query").args(["--status", "nftables"]).output().unwrap();
        let known = String::from_utf8(known.stdout).unwrap();
        let known: Vec<&str> = known.lines().filter(|line| !line.starts_with("Depends:")).collect();
        std::fs::remove_dir_all(self.path("var/lib/dpkg")).unwrap();
        for folder in ["info", "updates", "triggers"] {
            std::fs::create_dir_all(self.path(&format!("var/lib/dpkg/{folder}"))).unwrap();
        }
        self.write("var/lib/dpkg/status", &(known.join("\n") + "\n"));
        self.write("var/lib/dpkg/info/nftables.list", "/.\n");
    }

    pub fn dpkg(&self, action: &str, what: &str) -> String {
        self.ok_within(LONG, &["dpkg", "--force-unsafe-io", action, what])
    }

    pub fn enabled(&self, unit: &str) -> String {
        self.run(&["systemctl", "is-enabled", unit]).stdout.trim().to_owned()
    }

    /// What the daemon runs, as the kernel knows it.
    fn program(&self) -> String {
        let pid = self.property(SERVICE, "MainPID");
        self.ok(&["readlink", &format!("/proc/{pid}/exe")]).trim().to_owned()
    }

    /// Packets that strangers lost, as the hub reads it. What a daemon says that has just begun may be a second old.
    pub fn dropped(&self) -> Result<f64> {
        Ok(self.drops()?.values().sum())
    }

    /// The same by labels.
    fn drops(&self) -> Result<BTreeMap<String, f64>> {
        let metrics = self.lab.hub.http_get(SocketAddr::new(SPOKE_MESH, 9984), "/metrics", &[])?;
        let lines = metrics.body.lines();
        let dropped = lines.filter_map(|line| line.strip_prefix("spokeguard_dropped_packets_total{"));
        let split = dropped.filter_map(|line| line.rsplit_once("} "));
        let parsed = split.map(|(labels, value)| Ok((labels.to_owned(), value.parse()?)));
        parsed.collect::<Result<_>>().context("what was dropped")
    }
}

/// The same package under a later version.
fn upgraded(from: &str, to: &str) -> String {
    format!(
        "cd /tmp && rm -rf later && dpkg-deb -R {from} later && sed -i 's/^Version: .*/&+later/' later/DEBIAN/control \
         && dpkg-deb --root-owner-group -Znone -b later {to} && rm -rf later"
    )
}
