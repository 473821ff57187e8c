//! The units under a real systemd: the boot that has none of our code, and the way back that systemd keeps.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use lab::machine::{LONG, OPEN, SHUT, SSH_BY, mesh_anew, shut_out};
use lab::{Answer, Lab, Machine, Need, SPOKE_MESH, lacking};

use crate::heartbeat::{Manner, SECRET, Stub};

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
    assert!(!told.contains("ATTENTION"), "{told}");
    assert!(told.contains("not started, for want of a policy"), "{told}");
    assert!(told.contains("wrote /etc/systemd/system/sshd.service.d/spokeguard.conf"), "{told}");
    assert_eq!(machine.answer(22), Answer::Open);
    machine.sshd_has_our_drop_ins("/etc/systemd/system/");
    // The credentials that it names come later.
    let beats = "[heartbeat]\nkuma_url_file = \"kuma-url\"\nntfy_url_file = \"ntfy-url\"\nevery = \"1s\"\n";
    machine.write("etc/spokeguard/policy.toml", &(lab.plain_policy() + beats));
    let elsewhere = machine.run(&["/opt/spokeguard", "install", "--policy", "/root/policy.toml"]);
    assert!(
        elsewhere.code == Some(2) && elsewhere.stderr.contains("copy the policy there"),
        "{}",
        elsewhere.all()
    );
    let told = machine.ok(&["/opt/spokeguard", "install"]);
    assert!(told.contains("is as it was: /etc/systemd/system/spokeguard.service"), "{told}");
    assert!(told.contains("started. Its rules are on trial"), "{told}");
    machine.wait("the daemon has a report", |machine| machine.rules() == "on-trial");
    // systemd itself keeps the way back.
    let timers = machine.ok(&["systemctl", "list-timers", "--all", "--no-pager"]);
    assert!(timers.contains("spokeguard-rollback-"), "{timers}\n{}", machine.journal());
    machine.hub_confirms();
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
    machine.is_hardened();

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

    // The daemon dies: its rules don't, and systemd brings it back, with the credentials that came.
    let kuma =
        Stub::start(&lab.hub, SocketAddr::new(lab::HUB_MESH, 3001), Manner::Kuma { any_method: false });
    std::fs::create_dir_all(machine.path("etc/credstore")).unwrap();
    machine.write("etc/credstore/kuma-url", &format!("http://{}/api/push/{SECRET}\n", kuma.address));
    let ntfy = Stub::start(&lab.hub, SocketAddr::new(lab::HUB_MESH, 2586), Manner::Ntfy);
    machine.write("etc/credstore/ntfy-url", &format!("http://{}/{SECRET}\n", ntfy.address));
    let pid =
        |machine: &Machine<'_>| machine.ok(&["systemctl", "show", "-p", "MainPID", "--value", "spokeguard"]);
    let before = pid(&machine);
    machine.ok(&["systemctl", "kill", "-s", "KILL", "spokeguard"]);
    assert_eq!(machine.answer(22), Answer::Silent);
    machine.wait("the daemon is back", |machine| pid(machine) != before && machine.rules() == "confirmed");
    machine.wait("a beat from within the sandbox", |_| kuma.count() > 0);
    machine.ok(&["nft", "flush", "ruleset"]);
    machine.wait("a notice of the repair", |_| {
        ntfy.all().iter().any(|asked| asked.body.contains("firewall-missing"))
    });
    assert!(!machine.journal().contains("process that sends"), "{}", machine.journal());
    drop((kuma, ntfy));

    // With no daemon there, systemd keeps the way back alone, whoever lets it read its units anew meanwhile.
    machine.ok(&["systemctl", "stop", "spokeguard"]);
    let wider = lab.plain_policy().replace("tcp = [80, 443]", "tcp = [80, 443, 5432]");
    machine.write("etc/spokeguard/wider.toml", &wider);
    let apply = ["spokeguard", "apply", "--confirm-within", "5s", "--policy", "/etc/spokeguard/wider.toml"];
    machine.ok(&apply);
    assert_eq!(machine.answer(SHUT[1]), Answer::Open);
    machine.ok(&["systemctl", "daemon-reload"]);
    machine.wait("the rules of before", |machine| machine.answer(SHUT[1]) == Answer::Silent);
    machine.ok(&["systemctl", "start", "spokeguard"]);
    machine.wait("the daemon is back", |machine| machine.rules() == "confirmed");

    // A boot without any of our code.
    machine.cut_power();
    machine.flushes_late();
    machine.has_cloud_init();
    std::fs::remove_file(machine.path("usr/local/sbin/spokeguard")).unwrap();
    machine.boots_shut();

    // One whose rules can't be read is shut, but for the tunnel.
    machine.cut_power();
    let sealed = machine.path("var/lib/spokeguard/sealed.nft");
    let text = std::fs::read_to_string(&sealed).unwrap();
    std::fs::write(&sealed, &text[..text.len() / 2]).unwrap();
    // By the policy's own name of it: the package doesn't know it, and it's no device of WireGuard's here.
    let shut = machine.path("usr/lib/spokeguard/shut.nft");
    let text = std::fs::read_to_string(&shut).unwrap();
    let (known, rest): (Vec<&str>, Vec<&str>) = text.lines().partition(|line| line.contains("iifname \"wg"));
    assert_eq!(known.len(), 2, "{text}");
    std::fs::write(&shut, rest.join("\n") + "\n").unwrap();
    let heard = machine.nobody_answers_while(|machine| {
        machine.boot();
        machine.wait("the hub gets in", Machine::hub_gets_in);
        assert_eq!(machine.answer(OPEN), Answer::Silent);
    });
    machine.sealed_before_early_networks("spokeguard-shut.service");
    assert_eq!(heard.open, [0, 0], "what can't be loaded shuts 80 as well");
    assert_eq!(machine.ok(&["systemctl", "is-active", "spokeguard-shut"]), "active\n");

    // With the program there again, the daemon puts the policy's rules in place of that.
    machine.nobody_answers_while(|machine| {
        let after = "[Unit]\nAfter=network-online.target\n";
        machine.write_new("etc/systemd/system/nftables.service.d/after.conf", after);
        let told = machine.ok(&["/opt/spokeguard", "install"]);
        assert!(told.contains("ATTENTION: sshd listens on 0.0.0.0:22. Under"), "{told}");
        assert_eq!(told.matches("ATTENTION: ").count(), 2, "{told}");
        assert!(told.contains("started. Its rules are confirmed"), "{told}");
        assert!(told.contains("ATTENTION: nftables.service was changed"), "{told}");
        machine.wait("the web answers again", |machine| machine.answer(OPEN) == Answer::Open);
        assert!(machine.hub_gets_in());
        // Taken away, it leaves what is in force.
        let told = machine.ok(&["/opt/spokeguard", "uninstall"]);
        assert!(told.contains("The rules in force stay until the next boot"), "{told}");
        assert!(told.contains("removed /usr/local/sbin/spokeguard"), "{told}");
        // sshd is on every address: it misses none.
        assert!(!told.contains("ATTENTION"), "{told}");
        assert_eq!(machine.answer(OPEN), Answer::Open);
    });
    let left =
        machine.run(&["sh", "-c", "find /etc/systemd /usr/lib/spokeguard -name '*spokeguard*'"]).stdout;
    assert_eq!(left, "");
}

/// A host whose rules were confirmed, and one of the two files that say so, or what loads them, is gone.
#[test]
fn a_boot_that_can_not_load_the_confirmed_rules_says_so() {
    if lacking(&[Need::Lab, Need::Spokeguard, Need::Sshd, Need::Nspawn]) {
        return;
    }
    let lab = Lab::plain();
    let mut machine = Machine::confirmed(&lab);
    let (program, nft) = ("usr/local/sbin/spokeguard", "usr/sbin/nft");
    let put = |machine: &Machine<'_>, from: &str, to: &str| {
        std::fs::rename(machine.path(from), machine.path(to)).unwrap();
    };

    machine.cut_power();
    std::fs::remove_file(machine.path("var/lib/spokeguard/sealed.nft")).unwrap();
    put(&machine, program, "root/away");
    machine.flushes_late();
    machine.has_dhcp();
    let heard = machine.nobody_answers_while(|machine| {
        machine.boot();
        machine.wait("the hub gets in", Machine::hub_gets_in);
        assert_eq!(machine.answer(OPEN), Answer::Silent);
    });
    assert_eq!(heard.open, [0, 0], "what can't be loaded shuts 80 as well");
    assert_eq!(machine.property("spokeguard-boot", "ActiveState"), "failed");
    assert_eq!(machine.property("spokeguard-shut", "ActiveState"), "active");
    machine.sealed_before_early_networks("spokeguard-shut.service");

    machine.cut_power();
    put(&machine, "root/away", program);
    put(&machine, nft, "root/nft");
    machine.boot();
    for unit in ["spokeguard-boot", "spokeguard-shut"] {
        let [state, why] = ["ActiveState", "ExecMainStatus"].map(|name| machine.property(unit, name));
        // systemd's word for a program that could not be started.
        let said = machine.run(&["journalctl", "--no-pager", "-b", "-o", "short-precise"]).stdout;
        assert_eq!((&*state, &*why), ("failed", "203"), "{unit} {said}");
    }
    machine.wait("the guard alone refuses strangers", |machine| {
        SHUT.iter().all(|port| machine.answer(*port) == Answer::Silent)
    });
    machine.wait("the hub gets in", Machine::hub_gets_in);
    machine.wait("the web answers", |machine| machine.answer(OPEN) == Answer::Open);
    let status = machine.run(&["spokeguard", "status"]);
    assert!(status.code == Some(2) && status.stdout.contains("nft"), "{}", status.all());

    // The daemon writes again what was lost, and the boot after that is one like any other.
    machine.cut_power();
    put(&machine, "root/nft", nft);
    machine.boot();
    machine.wait("the web answers", |machine| machine.answer(OPEN) == Answer::Open);
    machine
        .wait("the sealed rules are back", |machine| machine.path("var/lib/spokeguard/sealed.nft").exists());
    machine.cut_power();
    machine.boots_shut();

    // At a boot /tmp is emptied at the same time, where systemd 252 makes what a unit with PrivateDevices= sees of /dev:
    // one that asks for that fails now and then.
    let restarts = "(while :; do rm -rf /tmp/namespace-*; done) & trap \"kill $!\" EXIT
        for unit in spokeguard-boot spokeguard-shut; do
            for time in $(seq 25); do
                systemctl reset-failed $unit 2>/dev/null || true
                systemctl restart $unit
            done
        done";
    machine.ok_within(2 * LONG, &["sh", "-ec", restarts]);
    // The same for whatever else would have systemd make a view of the file system, however new it is.
    let views = "PrivateDevices,PrivateTmp,PrivateMounts,ProtectSystem,ProtectHome,ProtectControlGroups,\
                 ProtectKernelLogs,ProtectKernelModules,ProtectKernelTunables,ProtectHostname";
    for unit in ["spokeguard-boot", "spokeguard-shut"] {
        let shown = machine.ok(&["systemctl", "show", "-p", views, unit]);
        assert!(
            shown.lines().count() == 10 && shown.lines().all(|line| line.ends_with("=no")),
            "{unit}: {shown}"
        );
    }
}

/// By a power cut it is `vm lock-out-boot`; here all that runs is told to end, the timer of the way back as well.
#[test]
fn a_reboot_in_order_while_the_hub_is_shut_out_lets_it_in_again() {
    if lacking(&[Need::Lab, Need::Spokeguard, Need::Sshd, Need::Nspawn]) {
        return;
    }
    let lab = Lab::plain();
    let mut machine = Machine::confirmed(&lab);
    let window = Duration::from_secs(45);
    let policy = shut_out(&lab.plain_policy());
    let policy = format!("{policy}[enforce]\nconfirm_within = \"{}s\"\n", window.as_secs());
    let heard = machine.nobody_answers_while(|machine| {
        machine.write("etc/spokeguard/policy.toml", &policy);
        machine.wait("the rules are on trial", |machine| machine.rules() == "on-trial");
        let begun = Instant::now();
        let timers = ["systemctl", "list-timers", "--no-legend", "spokeguard-rollback*"];
        assert!(machine.ok(&timers).contains("spokeguard-rollback-"), "nothing is armed");
        assert!(!machine.hub_gets_in(), "the hub is not shut out, so this proves nothing");
        machine.shuts_down();
        let took = begun.elapsed();
        assert!(took + Duration::from_secs(10) < window, "it may have been rolled back by then: {took:?}");
        machine.boot();
        // It is tried once more, as nobody has said anything of it.
        machine.wait("the rules are rolled back", |machine| machine.rules() == "rolled-back");
        machine.wait("the hub gets in", Machine::hub_gets_in);
        assert_eq!(machine.answer(80), Answer::Open);
    });
    machine.wait("the hub scrapes", |machine| {
        let metrics = SocketAddr::new(SPOKE_MESH, 9984);
        machine.lab.hub.http_get(metrics, "/metrics", &[]).is_ok_and(|page| page.status == 200)
    });
    eprintln!("{heard:?}");
    let plan = machine.ok(&["spokeguard", "plan", "--policy", "/var/lib/spokeguard/confirmed.toml"]);
    assert!(plan.contains("in force"), "{plan}");
}

/// By each of the ways that README names, as it is written there, and for the boots after it as well.
#[test]
fn who_is_locked_out_gets_in_again_by_what_the_readme_says() {
    if lacking(&[Need::Lab, Need::Spokeguard, Need::Sshd, Need::Nspawn]) {
        return;
    }
    let readme = include_str!("../README.md").split("\n## If you are locked out\n").nth(1).unwrap();
    let readme = readme.split("\n## ").next().unwrap();
    let lines: Vec<&str> = readme.lines().filter_map(|line| line.strip_prefix("    ")).collect();
    let [stop, release, table, filters, files, sshd, rescue, masks] = lines[..] else { panic!("{lines:?}") };
    let lab = Lab::plain();
    let mut machine = Machine::confirmed(&lab);
    let is_shut = |machine: &Machine<'_>| {
        assert_eq!((machine.rules().as_str(), machine.answer(22)), ("confirmed", Answer::Silent));
    };
    let again = |machine: &Machine<'_>| {
        machine.ok(&["/opt/spokeguard", "install"]);
        machine.hub_confirms();
        is_shut(machine);
    };
    let opens = |machine: &mut Machine<'_>, lines: &[&str]| {
        let told: String = lines.iter().map(|line| machine.ok(&["sh", "-ec", line])).collect();
        // A program that nothing holds any more is let go by the kernel a moment later.
        machine.wait("sshd answers", |machine| machine.answer(22) == Answer::Open);
        machine.cut_power();
        machine.boots_open();
        told
    };
    // Its sshd was moved to the mesh address, and has to be started anew.
    let policy = machine.path("etc/spokeguard/policy.toml");
    std::fs::write(&policy, lab.plain_policy() + "rebind = true\n").unwrap();
    machine.wait("sshd would be moved", |machine| {
        machine.run(&["systemctl", "restart", "ssh"]);
        let sockets = machine.ok(&["ss", "-Hltn", "sport = :22"]);
        sockets.split_whitespace().nth(3) == Some(&format!("{SPOKE_MESH}:22"))
    });
    is_shut(&machine);
    let told = opens(&mut machine, &[stop, release, sshd]);
    assert!(told.contains("released: ") && !told.contains("is enabled"), "{told}");
    again(&machine);
    // None has such a filter where this kernel has what came with 6.6.
    let loops = format!("{filters} 2>/dev/null || true");
    opens(&mut machine, &[stop, table, &loops, files, sshd]);
    again(&machine);

    // Not by a program that its unit starts at the next boot all the same.
    assert_eq!(machine.run(&["spokeguard", "release"]).code, Some(2));
    machine.ok(&["systemctl", "stop", "spokeguard"]);
    let told = machine.ok(&["spokeguard", "release"]);
    assert!(told.contains("the next boot puts the policy on trial again"), "{told}");
    again(&machine);

    machine.cut_power();
    machine.boot_with(&masks.split(' ').collect::<Vec<_>>());
    machine.wait("sshd answers", |machine| machine.answer(22) == Answer::Open);
    // For that boot alone.
    machine.cut_power();
    machine.boot();
    machine.wait("the daemon holds it", |machine| machine.rules() == "confirmed");
    is_shut(&machine);
    machine.cut_power();
    lab.spoke.sh(&rescue.replace("/mnt", "/mnt/merged")).unwrap();
    machine.boots_open();
}

/// sshd listens on the mesh address alone, which comes late, goes with its interface, and comes again.
#[test]
fn sshd_is_there_within_five_seconds_of_its_address_and_nowhere_else() {
    if lacking(&[Need::Lab, Need::Spokeguard, Need::Sshd, Need::Nspawn]) {
        return;
    }
    let lab = Lab::plain();
    let mut machine = Machine::confirmed(&lab);
    machine.listen_on_mesh_alone();
    let late = Duration::from_secs(if std::env::var_os("SPOKEGUARD_ALL").is_some() { 60 } else { 4 });
    for by in SSH_BY {
        machine.cut_power();
        machine.ssh_follows_its_address(by, late);
        // Without the drop-ins it doesn't.
        let told = machine.ok(&["/opt/spokeguard", "uninstall"]);
        assert!(told.contains(&of_the_next_boot(by)) && !told.contains("isn't tried again"), "{told}");
        let told = machine.ok(&["/opt/spokeguard", "install"]);
        assert!(!told.contains("ATTENTION"), "{told}");
    }
    // Nor while it waits, which is when its operator may think it our fault.
    machine.ok(&["systemctl", "stop", "ssh.socket"]);
    lab.spoke.ok(&["ip", "link", "del", "wg0"]).unwrap();
    machine.write("root/postrm", include_str!("../contrib/debian/postrm"));
    // It may end while it is asked, and take along what it can't be asked without.
    for time in 0..12 {
        machine.run(&["systemctl", "restart", "ssh.service"]);
        machine.wait("sshd waits", |machine| machine.property("ssh.service", "ActiveState") == "activating");
        let told = if time % 2 == 0 {
            machine.ok(&["/opt/spokeguard", "uninstall"])
        } else {
            // dpkg has taken these away when it runs.
            for name in ["ssh", "sshd"] {
                let drop_in = format!("etc/systemd/system/{name}.service.d/spokeguard.conf");
                std::fs::remove_file(machine.path(&drop_in)).unwrap();
            }
            machine.ok(&["sh", "/root/postrm", "remove"])
        };
        let waits = "It waits for it now, and isn't tried again: `systemctl restart ssh.service`.\n";
        assert!(told.contains(&of_the_next_boot("ssh.service")) && told.ends_with(waits), "{time}: {told}");
        machine.ok(&["/opt/spokeguard", "install"]);
    }
    mesh_anew(&lab);
    machine.cut_power();
    machine.calls_ssh_sshd();
    machine.ssh_follows_its_address("sshd.service", late);
    machine.goes_back_without_us(|machine| {
        let told = machine.ok(&["/opt/spokeguard", "uninstall"]);
        assert!(told.contains("They are on trial, though"), "{told}");
        assert!(told.contains(&of_the_next_boot("sshd.service")), "{told}");
    });
}

fn of_the_next_boot(by: &str) -> String {
    format!("ATTENTION: {by} listens on\n  {SPOKE_MESH}:22\n")
}

/// Its root is this machine's, in which other tests put what theirs need.
#[test]
fn a_container_has_nothing_of_ours_from_its_host() {
    if lacking(&[Need::Lab, Need::Nspawn]) {
        return;
    }
    let lab = Lab::plain();
    let machine = Machine::new(&lab);
    let state = machine.path("var/lib/spokeguard");
    std::fs::create_dir(&state).unwrap();
    std::fs::remove_dir(&state).unwrap();
    // Where another test has made one already, that is as good; and it may need it still.
    let parent = std::path::Path::new("/var/lib/spokeguard");
    std::fs::create_dir_all(parent).unwrap();
    let _below = tempfile::tempdir_in(parent).unwrap();
    let names = std::fs::read_dir(machine.path("var/lib")).unwrap();
    let there = names.map(|entry| entry.unwrap().file_name()).any(|name| name == "spokeguard");
    let is_read = state.exists();
    assert!(!there && !is_read, "listed: {there}, found: {is_read}");
}
