//! Firewalls of others, as their packages put them on a host with a real systemd: enabled, told to open what the
//! policy refuses, reloaded and restarted, while a stranger knocks.

use std::net::SocketAddr;
use std::process::Command;

use lab::{Answer, Lab, Need, SPOKE_MESH, lacking};

use crate::daemon::plain_policy;
use crate::machine::{LONG, Machine, OPEN};

impl Machine<'_> {
    /// The table as the kernel numbers it: another number, another table.
    fn table(&self) -> String {
        let listed = self.ok(&["nft", "--handle", "--stateless", "list", "table", "inet", "spokeguard"]);
        // Elements come and go.
        listed.lines().filter(|line| !line.contains("elements")).collect::<Vec<_>>().join("\n")
    }

    fn repairs(&self) -> usize {
        let log = self.run(&["cat", "/var/lib/spokeguard/events.jsonl"]).stdout;
        log.lines().filter(|line| line.contains("\"kind\":\"repaired\"")).count()
    }

    #[track_caller]
    fn is_as_declared(&mut self) {
        self.wait("the web answers", |machine| machine.answer(OPEN) == Answer::Open);
        self.wait("the hub gets in", Machine::hub_gets_in);
        let check = self.run(&["spokeguard", "check", "--no-probe", "--format", "json"]);
        let findings = check.json().unwrap()["findings"].clone();
        let wrong: Vec<&str> = (findings.as_array().unwrap().iter())
            .filter_map(|finding| finding["code"].as_str())
            .filter(|code| code.starts_with("firewall-") || code.ends_with("-exposed"))
            .collect();
        assert!(wrong.is_empty(), "{findings:#}");
    }
}

#[test]
fn other_firewalls_come_reload_and_go_and_nothing_opens() {
    if lacking(&[Need::Lab, Need::Spokeguard, Need::Sshd, Need::Nspawn, Need::Iptables, Need::Firewalld]) {
        return;
    }
    let lab = Lab::plain();
    let mut machine = Machine::new(&lab);
    machine.write("etc/spokeguard/policy.toml", &plain_policy(&lab));
    machine.boot();
    machine.ok(&["/opt/spokeguard", "install"]);
    machine.wait("the daemon has a report", |machine| machine.rules() == "on-trial");
    let ssh = SocketAddr::new(SPOKE_MESH, 22);
    let hub = lab.hub.inside(|| Ok(std::net::TcpStream::connect_timeout(&ssh, LONG)?)).unwrap();
    machine.wait("confirmed", |machine| machine.rules() == "confirmed");
    drop(hub);
    let (table, repairs) = (machine.table(), machine.repairs());

    machine.nobody_answers_while(|machine| {
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
        machine.is_as_declared();
        machine.ok(&["ufw", "disable"]);
        machine.is_as_declared();
    });
    assert_eq!(machine.table(), table, "after ufw");

    let inside = machine.path("opt/firewalld");
    let copied = Command::new("cp").arg("-r").arg(lab::firewalld()).arg(&inside).status().unwrap();
    assert!(copied.success());
    machine.nobody_answers_while(|machine| {
        machine.ok(&["sh", "-c", "DEBIAN_FRONTEND=noninteractive dpkg --install /opt/firewalld/*.deb"]);
        machine.wait("firewalld runs", |machine| {
            machine.run(&["firewall-cmd", "--state"]).stdout.trim() == "running"
        });
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
    assert_eq!(machine.table(), table, "after firewalld");
    assert_eq!(machine.repairs(), repairs, "nobody touched what is ours");
}
