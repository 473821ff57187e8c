//! The units under a real systemd: the boot that has none of our code, and the way back that systemd keeps.

use std::io::Read as _;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use lab::{Answer, Lab, Need, Node, SPOKE_MESH, lacking, wait_until};

use crate::daemon::plain_policy;
use crate::heartbeat::{Manner, SECRET, Stub};
use crate::machine::{LONG, Machine, OPEN, SHORT, SHUT};

#[test]
fn units_hold_the_line_from_the_first_packet_of_a_boot() {
    if lacking(&[Need::Lab, Need::Spokeguard, Need::Sshd, Need::Nspawn]) {
        return;
    }
    let lab = Lab::plain();
    let mut machine = Machine::new(&lab);
    machine.boot();
    assert_eq!(machine.answer(22), Answer::Open, "there is something to shut");

    // Without a policy the units are there, and nothing else happens.
    let told = machine.ok(&["/opt/spokeguard", "install"]);
    assert!(told.contains("not started, for want of a policy"), "{told}");
    assert_eq!(machine.answer(22), Answer::Open);
    // The credential that it names comes later.
    let beats = "[heartbeat]\nkuma_url_file = \"kuma-url\"\nevery = \"1s\"\n";
    machine.write("etc/spokeguard/policy.toml", &(plain_policy(&lab) + beats));
    let told = machine.ok(&["/opt/spokeguard", "install"]);
    assert!(told.contains("is as it was: /etc/systemd/system/spokeguard.service"), "{told}");
    assert!(told.contains("started. Its rules are on trial"), "{told}");
    machine.wait("the daemon has a report", |machine| machine.rules() == "on-trial");
    // systemd itself keeps the way back.
    let timers = machine.ok(&["systemctl", "list-timers", "--all", "--no-pager"]);
    assert!(timers.contains("spokeguard-rollback-"), "{timers}\n{}", machine.journal());
    // The hub comes, and stays for a moment: that confirms.
    let ssh = SocketAddr::new(SPOKE_MESH, 22);
    let hub = lab.hub.inside(|| Ok(std::net::TcpStream::connect_timeout(&ssh, LONG)?)).unwrap();
    machine.wait("confirmed", |machine| machine.rules() == "confirmed");
    drop(hub);
    assert_eq!(
        machine.ok(&["systemctl", "show", "-p", "Type,ActiveState", "spokeguard"]),
        "Type=notify\nActiveState=active\n"
    );
    assert_eq!(machine.answer(22), Answer::Silent);
    // What the sandbox takes away, nothing of ours misses.
    let status = machine.status();
    assert_eq!(status["daemon"]["privileges"]["proven"], true, "{status:#}\n{}", machine.journal());
    let unproven: Vec<&str> = status["findings"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|finding| finding["code"] == "control-unproven")
        .filter_map(|finding| finding["subject"].as_str())
        .collect();
    assert!(unproven.is_empty(), "{status:#}");
    let exposure =
        machine.run(&["systemd-analyze", "security", "--no-pager", "--threshold=30", "spokeguard.service"]);
    assert_eq!(exposure.code, Some(0), "{}", exposure.stdout);

    // What happened is in the journal by its fields, and once.
    let entries = machine.ok(&["journalctl", "-o", "json", "SPOKEGUARD_EVENT=policy-confirmed"]);
    let entries: Vec<serde_json::Value> =
        entries.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let [entry] = &entries[..] else { panic!("{entries:#?}") };
    assert_eq!(entry["_SYSTEMD_UNIT"], "spokeguard.service", "{entry}");
    assert_eq!((&entry["SYSLOG_IDENTIFIER"], &entry["PRIORITY"]), (&"spokeguard".into(), &"6".into()));
    assert_eq!(entry["MESSAGE_ID"].as_str().map(str::len), Some(32), "{entry}");
    assert_eq!(machine.journal().matches(" policy-confirmed ").count(), 1, "{}", machine.journal());
    assert!(
        machine.journal().contains("no credential of this name")
            || machine.journal().contains("No such file")
    );

    // The daemon dies: its rules don't, and systemd brings it back, with the credential that came.
    let kuma =
        Stub::start(&lab.hub, SocketAddr::new(lab::HUB_MESH, 3001), Manner::Kuma { any_method: false });
    std::fs::create_dir_all(machine.path("etc/credstore")).unwrap();
    machine.write("etc/credstore/kuma-url", &format!("http://{}/api/push/{SECRET}\n", kuma.address));
    let pid =
        |machine: &Machine<'_>| machine.ok(&["systemctl", "show", "-p", "MainPID", "--value", "spokeguard"]);
    let before = pid(&machine);
    machine.ok(&["systemctl", "kill", "-s", "KILL", "spokeguard"]);
    assert_eq!(machine.answer(22), Answer::Silent);
    machine.wait("the daemon is back", |machine| pid(machine) != before && machine.rules() == "confirmed");
    machine.wait("a beat from within the sandbox", |_| kuma.count() > 0);
    assert!(!machine.journal().contains("process that sends"), "{}", machine.journal());
    drop(kuma);

    // With no daemon there, systemd keeps the way back alone, whoever lets it read its units anew meanwhile.
    machine.ok(&["systemctl", "stop", "spokeguard"]);
    let wider = plain_policy(&lab).replace("tcp = [80, 443]", "tcp = [80, 443, 5432]");
    machine.write("etc/spokeguard/wider.toml", &wider);
    let apply = ["spokeguard", "apply", "--confirm-within", "5s", "--policy", "/etc/spokeguard/wider.toml"];
    machine.ok(&apply);
    assert_eq!(machine.answer(SHUT[1]), Answer::Open);
    machine.ok(&["systemctl", "daemon-reload"]);
    machine.wait("the rules of before", |machine| machine.answer(SHUT[1]) == Answer::Silent);
    machine.ok(&["systemctl", "start", "spokeguard"]);
    machine.wait("the daemon is back", |machine| machine.rules() == "confirmed");

    // A boot without any of our code: the sealed rules are there before the cables.
    machine.cut_power();
    std::fs::remove_file(machine.path("usr/local/sbin/spokeguard")).unwrap();
    machine.nobody_answers_while(|machine| {
        machine.boot();
        machine.wait("the web answers", |machine| machine.answer(OPEN) == Answer::Open);
        machine.wait("the hub gets in", Machine::hub_gets_in);
    });
    assert_eq!(machine.ok(&["systemctl", "is-active", "spokeguard-boot"]), "active\n");

    // One whose rules can't be read is shut, but for the tunnel.
    machine.cut_power();
    let sealed = machine.path("var/lib/spokeguard/sealed.nft");
    let text = std::fs::read_to_string(&sealed).unwrap();
    std::fs::write(&sealed, &text[..text.len() / 2]).unwrap();
    machine.nobody_answers_while(|machine| {
        machine.boot();
        machine.wait("the hub gets in", Machine::hub_gets_in);
        assert_eq!(machine.answer(OPEN), Answer::Silent);
    });
    assert_eq!(machine.ok(&["systemctl", "is-active", "spokeguard-shut"]), "active\n");

    // With the program there again, the daemon puts the policy's rules in place of that.
    machine.nobody_answers_while(|machine| {
        machine.ok(&["/opt/spokeguard", "install"]);
        machine.wait("the web answers again", |machine| machine.answer(OPEN) == Answer::Open);
        assert!(machine.hub_gets_in());
        // Taken away, it leaves what is in force.
        let told = machine.ok(&["/opt/spokeguard", "uninstall"]);
        assert!(told.contains("The rules in force stay until the next boot"), "{told}");
        assert!(told.contains("removed /usr/local/sbin/spokeguard"), "{told}");
        assert_eq!(machine.answer(OPEN), Answer::Open);
    });
    let left =
        machine.run(&["sh", "-c", "find /etc/systemd /usr/lib/spokeguard -name '*spokeguard*'"]).stdout;
    assert_eq!(left, "");
}

/// sshd listens on the mesh address alone, which comes late, goes with its interface, and comes again.
#[test]
fn sshd_is_there_within_five_seconds_of_its_address_and_nowhere_else() {
    if lacking(&[Need::Lab, Need::Spokeguard, Need::Sshd, Need::Nspawn]) {
        return;
    }
    let lab = Lab::plain();
    let mut machine = Machine::new(&lab);
    machine.write("etc/spokeguard/policy.toml", &plain_policy(&lab));
    machine.write("etc/ssh/sshd_config.d/mesh.conf", &format!("ListenAddress {SPOKE_MESH}\n"));
    machine.boot();
    machine.ok(&["/opt/spokeguard", "install"]);
    machine.wait("the daemon has a report", |machine| machine.rules() == "on-trial");
    machine.wait("the hub's ssh confirms", |machine| {
        banner(&machine.lab.hub).is_some() && machine.rules() == "confirmed"
    });
    // From here on nobody puts in the mesh's cable.
    machine.write(
        "etc/systemd/system/cables.service",
        "[Unit]\nAfter=network-pre.target\nBefore=network.target\nDefaultDependencies=no\n\
         [Service]\nType=oneshot\nRemainAfterExit=yes\nExecStart=ip link set eth0 up\n",
    );
    let late = Duration::from_secs(if std::env::var_os("SPOKEGUARD_ALL").is_some() { 60 } else { 4 });
    for by in ["ssh.service", "ssh.socket"] {
        machine.cut_power();
        lab.spoke.sh("ip addr flush dev wg0").unwrap();
        if by == "ssh.socket" {
            let text = format!("[Socket]\nListenStream=\nListenStream={SPOKE_MESH}:22\n");
            machine.write("etc/systemd/system/ssh.socket.d/lab.conf", &text);
            let wants = machine.path("etc/systemd/system/sockets.target.wants");
            std::fs::create_dir_all(&wants).unwrap();
            std::os::unix::fs::symlink("/lib/systemd/system/ssh.socket", wants.join("ssh.socket")).unwrap();
        }
        machine.nobody_answers_while(|machine| {
            machine.boot();
            let booted = Instant::now();
            wait_until(2 * late, "the mesh is late", || (booted.elapsed() > late).then_some(())).unwrap();
            assert!(banner(&lab.hub).is_none(), "{by}: before there is an address");
            lab.spoke.sh(&format!("ip addr add {SPOKE_MESH}/24 dev wg0; ip link set wg0 up")).unwrap();
            machine.ssh_comes(by, "late");
            for round in ["made anew", "and again"] {
                lab.spoke.ok(&["ip", "link", "del", "wg0"]).unwrap();
                let anew = format!("ip link add wg0 type veth peer name wg0 netns {}", lab.hub.net_path());
                lab.spoke.sh(&anew).unwrap();
                lab.hub.sh("ip addr add 10.84.0.1/24 dev wg0; ip link set wg0 up").unwrap();
                lab.spoke.sh(&format!("ip addr add {SPOKE_MESH}/24 dev wg0; ip link set wg0 up")).unwrap();
                machine.ssh_comes(by, round);
            }
        });
        assert_eq!(machine.ok(&["systemctl", "is-active", by]), "active\n");
    }
}

impl Machine<'_> {
    #[track_caller]
    fn ssh_comes(&self, by: &str, what: &str) {
        let begun = Instant::now();
        self.wait(by, |machine| banner(&machine.lab.hub).is_some());
        eprintln!("{by}, {what}: sshd after {:?}", begun.elapsed());
        assert!(begun.elapsed() < Duration::from_secs(5), "{by}, {what}: {:?}", begun.elapsed());
    }
}

/// What sshd says to a new connection through the tunnel.
fn banner(hub: &Node) -> Option<String> {
    hub.inside(|| {
        let mut stream = std::net::TcpStream::connect_timeout(&SocketAddr::new(SPOKE_MESH, 22), SHORT)?;
        stream.set_read_timeout(Some(LONG))?;
        let mut heard = [0; 4];
        stream.read_exact(&mut heard)?;
        Ok(String::from_utf8_lossy(&heard).into_owned())
    })
    .ok()
    .filter(|heard| heard == "SSH-")
}
