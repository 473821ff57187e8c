//! Firewalls of others, as their packages put them on a host with a real systemd: enabled, told to open what the
//! policy refuses, reloaded and restarted, while a stranger knocks.

use super::{LONG, Machine, OPEN, Power};
use crate::{Answer, firewalld};

impl Machine<'_> {
    /// On a host whose rules are confirmed: both come, reload and go, and nothing opens.
    #[track_caller]
    pub fn stands_other_firewalls(&mut self) {
        let (table, repairs) = (self.table(), self.repairs());
        self.nobody_answers_while(|machine| {
            for words in [
                "ufw allow in on wg0",
                "ufw allow 80/tcp",
                "ufw allow 443/tcp",
                "ufw allow 22/tcp",
                "ufw allow 5432/tcp",
                "ufw --force enable",
                "ufw reload",
                "ufw reload",
            ] {
                machine.ok(&words.split(' ').collect::<Vec<_>>());
            }
            let theirs = machine.ok(&["nft", "list", "chain", "ip", "filter", "ufw-user-input"]);
            assert!(
                theirs.contains("dport 5432"),
                "ufw has no rule for it, so this proves nothing: {theirs}"
            );
            machine.is_as_declared();
            machine.ok(&["ufw", "disable"]);
            machine.is_as_declared();
        });
        assert_eq!(self.table(), table, "after ufw");
        self.nobody_answers_while(|machine| {
            machine.start_firewalld();
            for words in [
                "--permanent --zone=trusted --add-interface=wg0",
                "--permanent --zone=public --add-port=80/tcp",
                "--permanent --zone=public --add-port=443/tcp",
                "--permanent --zone=public --add-port=22/tcp",
                "--permanent --zone=public --add-port=5432/tcp",
                "--reload",
                "--complete-reload",
            ] {
                machine.ok(&[&["firewall-cmd"], &*words.split(' ').collect::<Vec<_>>()].concat());
            }
            let theirs = machine.ok(&["nft", "list", "tables"]);
            assert!(theirs.contains("firewalld"), "firewalld has no rules, so this proves nothing: {theirs}");
            machine.is_as_declared();
            machine.ok(&["systemctl", "restart", "firewalld"]);
            machine.is_as_declared();
            machine.ok(&["systemctl", "stop", "firewalld"]);
            machine.is_as_declared();
        });
        assert_eq!(self.table(), table, "after firewalld");
        assert_eq!(self.repairs(), repairs, "nobody touched what is ours");
    }

    /// Its package is on a whole machine's disk, and comes to a container now.
    fn start_firewalld(&self) {
        if let Power::Kernel = self.power {
            self.ok(&["systemctl", "enable", "--now", "firewalld"]);
        } else {
            self.copy_in(&firewalld(), "opt/firewalld");
            let install =
                "DEBIAN_FRONTEND=noninteractive dpkg --force-unsafe-io --install /opt/firewalld/*.deb";
            self.ok_within(LONG, &["sh", "-c", install]);
        }
        self.wait("firewalld runs", |machine| {
            machine.run(&["firewall-cmd", "--state"]).stdout.trim() == "running"
        });
    }

    /// The table as the kernel numbers it: another number, another table.
    pub fn table(&self) -> String {
        let listed = self.ok(&["nft", "--handle", "--stateless", "list", "table", "inet", "spokeguard"]);
        // Elements come and go.
        listed.lines().filter(|line| !line.contains("elements")).collect::<Vec<_>>().join("\n")
    }

    fn repairs(&self) -> usize {
        let log = self.run(&["cat", "/var/lib/spokeguard/events.jsonl"]).stdout;
        log.lines().filter(|line| line.contains("\"kind\":\"repaired\"")).count()
    }

    #[track_caller]
    fn is_as_declared(&self) {
        self.wait("the web answers", |machine| machine.answer(OPEN) == Answer::Open);
        self.wait("the hub gets in", Machine::hub_gets_in);
        let check = self.run(&["spokeguard", "check", "--no-probe", "--format", "json"]);
        let report = check.json().unwrap();
        let blind = report["blind"].as_array().unwrap();
        // Nobody has a mesh to ask here but a cable.
        assert!(blind.iter().all(|one| one["facet"] == "tailscale"), "{report:#}");
        let findings = report["findings"].clone();
        let wrong: Vec<&str> = (findings.as_array().unwrap().iter())
            .filter_map(|finding| finding["code"].as_str())
            .filter(|code| code.starts_with("firewall-") || code.ends_with("-exposed"))
            .collect();
        assert!(wrong.is_empty(), "{findings:#}");
    }
}
