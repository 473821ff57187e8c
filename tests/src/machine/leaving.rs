//! Ours goes: what is left of it, and what must still happen without it.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use super::{Machine, OPEN, Power};
use crate::{Answer, HUB_MESH};

/// Nobody's on the mesh.
const NO_HUB: &str = "10.84.0.250";
/// Long enough for dpkg to take the package away meanwhile, on an emulated processor as well.
const WINDOW: Duration = Duration::from_secs(30);
const WINDOW_EMULATED: Duration = Duration::from_secs(50);
/// For a slow processor, and for a look.
const SLACK: Duration = Duration::from_secs(10);
/// Outside of containers, where systemd's being told to read its units anew moves no time: dpkg has done it by then.
const SLACK_KERNEL: Duration = Duration::from_secs(4);
const RULES: [&str; 6] = ["nft", "--stateless", "list", "table", "inet", "spokeguard"];

/// The same policy; its hub is nobody.
pub fn shut_out(policy: &str) -> String {
    policy.replace(&format!("address = \"{HUB_MESH}\""), &format!("address = \"{NO_HUB}\""))
}

impl Machine<'_> {
    /// On a host whose daemon runs with confirmed rules: its operator sees himself shut out by a policy on trial and has
    /// `take_away` take all of ours off the host. The rules before it come back all the same, and open nothing.
    #[track_caller]
    pub fn goes_back_without_us(&mut self, take_away: impl FnOnce(&Self)) {
        self.wait("the daemon holds it", |machine| machine.rules() == "confirmed");
        self.wait("there is somebody to shut out", Machine::hub_gets_in);
        let policy = shut_out(&self.lab.plain_policy());
        let (window, slack) = match self.power {
            Power::Kernel => (WINDOW_EMULATED, SLACK_KERNEL),
            _ => (WINDOW, SLACK),
        };
        let policy = format!("{policy}[enforce]\nconfirm_within = \"{}s\"\n", window.as_secs());
        self.nobody_answers_while(|machine| {
            machine.write("etc/spokeguard/policy.toml", &policy);
            machine.wait("the rules are on trial", |machine| machine.rules() == "on-trial");
            let begun = Instant::now();
            let on_trial = machine.ok(&RULES);
            assert!(on_trial.contains(NO_HUB), "{on_trial}");
            assert!(!machine.hub_gets_in(), "the hub is not shut out, so this proves nothing");
            take_away(machine);
            let gone = begun.elapsed();
            assert!(!machine.hub_gets_in(), "the hub was in before ours was gone, which took {gone:?}");
            machine.wait("the hub gets in", Machine::hub_gets_in);
            let back = begun.elapsed();
            eprintln!("ours was gone after {gone:?}, the hub in after {back:?}");
            assert!(back < window + slack, "{back:?}");
            let rules = machine.ok(&RULES);
            assert!(!rules.contains(NO_HUB), "{rules}");
            assert_eq!(machine.answer(OPEN), Answer::Open);
        });
    }

    /// What a host is that never had any of ours, or lost all of it at a boot. `left` of files in their usual places.
    #[track_caller]
    pub fn is_without_us(&self, left: &str) {
        let inside = self.run(&["find", "/etc/spokeguard", "/var/lib/spokeguard", "-printf", "%p %t\n"]);
        assert_eq!(self.left(), left, "{}", inside.stdout);
        // But for what the kernel itself lists there.
        let pins = "find /sys/fs/bpf -mindepth 1 -not -name maps.debug -not -name progs.debug";
        let pins: Vec<&str> = pins.split(' ').collect();
        let sshd = ["ssh.service", "ssh.socket", "sshd.service", "sshd.socket"];
        for (what, words) in [
            ("rules", &["nft", "list", "ruleset"][..]),
            ("pins", &pins),
            ("units", &["systemctl", "list-unit-files", "--no-legend", "spokeguard*"]),
            ("drop-ins", &[&["systemctl", "show", "-p", "DropInPaths", "--value"], &sshd[..]].concat()),
        ] {
            let there = self.run(words);
            // systemctl may call it a failure that there is none.
            let ended = there.code == Some(0) || (what == "units" && there.code == Some(1));
            assert!(ended && there.is_silent(), "{what}: {}", there.all());
        }
    }

    /// sshd's units have our drop-ins, which came with the units in `folder`, and systemd reads all that is in either.
    #[track_caller]
    pub fn sshd_has_our_drop_ins(&self, folder: &str) {
        let read = |unit: &str| {
            let names = "After,DropInPaths,Restart,RestartUSec,FreeBind";
            self.ok(&["systemctl", "show", "-p", names, unit])
        };
        // systemd names what a unit comes after in any order, and not the same at each question.
        let sorted = |shown: &str| {
            let words = |line: &str| line.split(['=', ' ']).map(str::to_owned).collect::<BTreeSet<_>>();
            shown.lines().map(words).collect::<Vec<_>>()
        };
        let (service, socket) = (read("ssh.service"), read("ssh.socket"));
        // One name of sshd's unit is the other's alias here, and systemd reads one of the two drop-ins.
        for shown in [&service, &socket] {
            let paths = shown.lines().find_map(|line| line.strip_prefix("DropInPaths=")).unwrap_or_default();
            let paths: Vec<&str> =
                paths.split_whitespace().filter(|path| path.ends_with("/spokeguard.conf")).collect();
            assert!(matches!(paths[..], [path] if path.starts_with(folder)), "not in {folder}: {shown}");
        }
        assert!(service.contains("Restart=always\n") && service.contains("RestartUSec=2s\n"), "{service}");
        assert!(service.contains("spokeguard-boot.service"), "{service}");
        assert_eq!(sorted(&read("sshd.service")), sorted(&service));
        assert!(socket.contains("FreeBind=yes\n"), "{socket}");
        // Sockets come before whatever has default dependencies: an nftables.service with those, as Fedora's has, comes
        // before our boot unit, and sshd's socket would be left out.
        assert!(!socket.contains("spokeguard-boot.service"), "{socket}");
        self.units_are_plain(&["ssh.service", "sshd.service", "ssh.socket"]);
    }
}
