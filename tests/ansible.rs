//! The Ansible role, run by a real Ansible on the hub against a spoke with a real systemd.

use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use lab::{Answer, Lab, Machine, Need, Outcome, Running, SPOKE_MESH, SPOKE_PUBLIC, Signal, lacking};
use serde_json::{Value, json};

/// A playbook on a machine that does much else.
const PATIENCE: Duration = Duration::from_secs(240);
const CONTRIB: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../contrib/ansible");
const SSH: &str = "-F none -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR";
const SECRET: &str = "https://kuma.example.org/api/push/s3cr3t-t0ken";

/// The hub, from which the fleet is run.
struct Controller<'a> {
    lab: &'a Lab,
    folder: PathBuf,
}

impl<'a> Controller<'a> {
    fn new(lab: &'a Lab, machine: &Machine<'_>, install: &str, policy: &Value) -> Self {
        let folder = lab.dir.join("controller");
        std::fs::create_dir_all(folder.join("home")).unwrap();
        // The tar lies beside it.
        let package = crate::debian::package();
        let name = package.file_name().unwrap().to_str().unwrap();
        let key = folder.join("key");
        lab.hub.ok(&["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key.to_str().unwrap()]).unwrap();
        machine.write_new(
            "root/.ssh/authorized_keys",
            &std::fs::read_to_string(key.with_extension("pub")).unwrap(),
        );
        let host = json!({
            "ansible_host": SPOKE_MESH, "ansible_user": "root", "ansible_python_interpreter": "/usr/bin/python3",
            "ansible_ssh_private_key_file": key, "ansible_ssh_common_args":
                SSH,
            "spokeguard_install": install, "spokeguard_dist": package.parent().unwrap(),
            "spokeguard_version": name.split('_').nth(1).unwrap(),
            "spokeguard_policy": policy, "spokeguard_confirm_timeout": 5,
        });
        let inventory = json!({ "all": { "hosts": { "singapore": host } } });
        std::fs::write(folder.join("inventory.json"), inventory.to_string()).unwrap();
        Controller { lab, folder }
    }

    /// Another host, to come after the first. It is the same machine: who gets there leaves its name in the policy.
    fn knows_another(&self, name: &str) {
        let file = self.folder.join("inventory.json");
        let mut inventory: Value = serde_json::from_str(&std::fs::read_to_string(&file).unwrap()).unwrap();
        let hosts = inventory["all"]["hosts"].as_object_mut().unwrap();
        let (before, host) = hosts.iter().next_back().unwrap();
        assert!(before.as_str() < name, "hosts are taken in the order of the inventory");
        let host = host.clone();
        hosts.insert(name.to_owned(), host);
        std::fs::write(file, inventory.to_string()).unwrap();
    }

    fn play(&self, flags: &[&str], more: &Value) -> Outcome {
        Self::end_of(self.start(flags, more))
    }

    fn start(&self, flags: &[&str], more: &Value) -> Running {
        let inventory = self.folder.join("inventory.json");
        let mut words = vec![lab::python(), "-m".into(), "ansible".into(), "playbook".into()];
        words.extend(["--inventory".into(), inventory, format!("{CONTRIB}/site.yml").into()]);
        words.extend(["--extra-vars".into(), more.to_string().into()]);
        words.extend(flags.iter().map(PathBuf::from));
        let mut command = self.lab.hub.command(&words);
        let home = self.folder.join("home");
        command.env("HOME", &home).env("ANSIBLE_HOME", home.join("ansible")).env("ANSIBLE_NOCOLOR", "1");
        command.env("ANSIBLE_CONFIG", format!("{CONTRIB}/ansible.cfg")).env("LC_ALL", "C.UTF-8");
        // Else root needn't become root.
        let becomes = more.get("ansible_become_method").is_some();
        command.env("ANSIBLE_BECOME_ALLOW_SAME_USER", becomes.to_string());
        self.lab.hub.start(command, "ansible-playbook").unwrap()
    }

    fn end_of(mut running: Running) -> Outcome {
        let status = running.wait(PATIENCE).unwrap_or_else(|error| panic!("{error:#}\n{}", running.log()));
        Outcome { code: status.code(), stdout: running.log(), stderr: String::new(), took: Duration::ZERO }
    }

    /// A run without a failure: its words, and how many tasks have changed or would change something.
    #[track_caller]
    fn changes(&self, flags: &[&str], more: &Value) -> (String, u32) {
        Self::changed(self.play(flags, more))
    }

    #[track_caller]
    fn changed(outcome: Outcome) -> (String, u32) {
        assert_eq!(outcome.code, Some(0), "{}", outcome.stdout);
        let recap = outcome.stdout.lines().last().unwrap_or_default().to_owned() + &outcome.stdout;
        let count =
            recap.split("changed=").nth(1).and_then(|rest| rest.split_whitespace().next()?.parse().ok());
        (outcome.stdout, count.unwrap())
    }
}

fn policy() -> Value {
    json!({
        "mesh": { "kind": "tailscale", "interface": "wg0", "address": [SPOKE_MESH],
                  "prefix": ["10.84.0.0/24", "fd84::/64"], "hub": { "address": lab::HUB_MESH } },
        "public": { "tcp": [80, 443] },
        "ssh": { "from": "hub" },
        "enforce": { "confirm_within": "60s" },
        "heartbeat": { "kuma_url_file": "/etc/spokeguard/secrets/kuma-url" },
    })
}

/// The example's policies, as the role writes them.
#[test]
fn every_host_of_the_example_gets_a_policy_that_is_right() {
    if lacking(&[Need::Spokeguard, Need::Ansible]) {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    // Imported and left out, the role gives its defaults all the same.
    let play = json!([{
        "hosts": "all", "gather_facts": false, "connection": "local",
        "vars": { "ansible_python_interpreter": lab::python() },
        "tasks": [
            { "import_role": { "name": "spokeguard", "tasks_from": "policy.yml" }, "when": false },
            { "template": { "src": format!("{CONTRIB}/roles/spokeguard/templates/policy.toml.j2"), "mode": "0644",
                            "dest": at("{{ inventory_hostname }}.toml") } },
        ],
    }]);
    std::fs::write(at("play.yml"), play.to_string()).unwrap();
    let mut command = Command::new(lab::python());
    command.args(["-m", "ansible", "playbook", "--inventory"]).arg(format!("{CONTRIB}/inventory.yml"));
    command.arg(at("play.yml")).env("ANSIBLE_CONFIG", format!("{CONTRIB}/ansible.cfg"));
    command.env("HOME", folder.path()).env("ANSIBLE_HOME", at("ansible")).env("LC_ALL", "C.UTF-8");
    let played = command.output().unwrap();
    let said = String::from_utf8_lossy(&played.stdout);
    assert!(played.status.success(), "{said}{}", String::from_utf8_lossy(&played.stderr));
    for (host, wanted) in [
        ("hetzner-hq", "name = \"emergency-ssh\"\ntcp = [2222]"),
        ("motoko", "interfaces = [\"podman*\"]"),
        ("laptop-hq", "kind = \"tailscale\""),
    ] {
        assert!(said.contains(&format!("changed: [{host}]")), "{said}");
        let file = at(&format!("{host}.toml"));
        let text = std::fs::read_to_string(&file).unwrap();
        assert!(text.contains(&format!("name = \"{host}\"")) && text.contains(wanted), "{text}");
        // The day on which the example's exception ends is none on which a test fails.
        std::fs::write(&file, text.replace("2027-01-31", "2099-01-31")).unwrap();
        let mut check = Command::new(lab::spokeguard().unwrap());
        let checked = check.args(["policy", "check", "--policy"]).arg(&file).output().unwrap();
        let errors = String::from_utf8_lossy(&checked.stderr);
        assert!(checked.status.success(), "{host}: {errors}\n{text}");
    }
    assert_eq!(said.matches("changed: [").count(), 3, "a host of which this test doesn't know: {said}");
}

#[test]
fn a_fleet_run_by_ansible_gets_policies_that_prove_themselves() {
    if lacking(&[Need::Lab, Need::Spokeguard, Need::Sshd, Need::Nspawn, Need::Debian, Need::Ansible]) {
        return;
    }
    let all = std::env::var_os("SPOKEGUARD_ALL").is_some();
    let lab = Lab::plain();
    let mut machine = Machine::new(&lab);
    let controller = Controller::new(&lab, &machine, "deb", &policy());
    std::fs::remove_dir_all(machine.path("etc/spokeguard")).unwrap();
    machine.forget_packages();
    machine.boot();
    let before = machine.left();
    let secret = json!({ "spokeguard_secrets": { "kuma-url": SECRET } });
    let on_disk = |machine: &Machine<'_>| std::fs::read_to_string(machine.path("etc/spokeguard/policy.toml"));

    // A check of a host that has nothing yet says what it would do, and does nothing.
    if all {
        let (said, changes) = controller.changes(&["--check", "--diff"], &secret);
        assert!(changes >= 3, "{said}");
        assert!(said.contains("+tcp = [80, 443]"), "{said}");
        assert!(!said.contains(SECRET), "{said}");
        assert_eq!(machine.left(), before);
    }

    // In one run from nothing to rules that a new connection has confirmed.
    let (said, _) = controller.changes(&["--diff", "-vvv"], &secret);
    assert!(!said.contains("s3cr3t"), "{said}");
    assert_eq!(machine.rules(), "confirmed", "{said}");
    assert_eq!(machine.answer(22), Answer::Silent);
    assert!(machine.hub_gets_in());
    let kept = machine.path("etc/spokeguard/secrets/kuma-url");
    assert_eq!(std::fs::read_to_string(&kept).unwrap(), SECRET);
    assert_eq!(std::fs::metadata(&kept).unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(std::fs::metadata(kept.parent().unwrap()).unwrap().permissions().mode() & 0o777, 0o700);

    // A check finds nothing to do, and does nothing.
    let seen = |machine: &Machine<'_>| {
        let pid = machine.property("spokeguard.service", "MainPID");
        (machine.left(), on_disk(machine).unwrap(), machine.table(), machine.rules(), pid)
    };
    let put = seen(&machine);
    let (said, changes) = controller.changes(&["--check", "--diff"], &secret);
    assert_eq!(changes, 0, "{said}");
    assert!(!said.contains("s3cr3t"), "{said}");
    assert_eq!(seen(&machine), put);
    // It fails for what a run would not put in place.
    let mut wrong = secret.clone();
    wrong["spokeguard_policy"] = policy();
    wrong["spokeguard_policy"]["public"]["tcp"] = json!([80, 4430000]);
    let refused = controller.play(&["--check"], &wrong);
    assert!(refused.code == Some(2) && refused.stdout.contains("4430000"), "{}", refused.stdout);
    assert_eq!(seen(&machine), put);
    // Nor does a second run.
    let (said, changes) = controller.changes(&[], &secret);
    assert_eq!(changes, 0, "{said}");
    if all {
        takes_up_what_changes(&controller, &machine, &secret);
    }

    // Taken away, it leaves what is in force alone, and twice is no more than once.
    let mut absent = secret;
    absent["spokeguard_state"] = json!("absent");
    if all {
        let put = seen(&machine);
        let (said, changes) = controller.changes(&["--check"], &absent);
        assert!(changes >= 2, "{said}");
        assert_eq!(seen(&machine), put);
    }
    // Said wrongly, it takes nothing away.
    for (by, why) in
        [("none", "takes away what this role installed"), ("tar", "spokeguard.service is still there")]
    {
        let put = seen(&machine);
        let mut other = absent.clone();
        other["spokeguard_install"] = json!(by);
        let refused = controller.play(&[], &other);
        assert!(refused.code != Some(0) && refused.stdout.contains(why), "{}", refused.stdout);
        assert_eq!(seen(&machine), put);
    }
    let (said, changes) = controller.changes(&["--diff"], &absent);
    assert!(changes >= 2 && !said.contains("s3cr3t"), "{said}");
    assert_eq!(machine.left(), before);
    assert_eq!(machine.answer(22), Answer::Silent);
    assert!(machine.hub_gets_in());
    let (said, changes) = controller.changes(&[], &absent);
    assert_eq!(changes, 0, "{said}");
}

/// A program of before this role: it knows fewer options.
const OLDER: &str = "#!/bin/sh
case \"$*\" in
*--help*) /usr/bin/spokeguard.real \"$@\" | grep -v allow-expired ;;
*allow-expired*) echo \"error: unexpected argument '--allow-expired' found\" >&2; exit 2 ;;
*) exec /usr/bin/spokeguard.real \"$@\" ;;
esac
";

#[test]
fn a_policy_that_shuts_ansible_out_goes_back_and_no_further() {
    if lacking(&[Need::Lab, Need::Spokeguard, Need::Sshd, Need::Nspawn, Need::Debian, Need::Ansible]) {
        return;
    }
    let lab = Lab::plain();
    let mut machine = Machine::new(&lab);
    let mut good = policy();
    good.as_object_mut().unwrap().remove("heartbeat").unwrap();
    let controller = Controller::new(&lab, &machine, "deb", &good);
    std::fs::remove_dir_all(machine.path("etc/spokeguard")).unwrap();
    machine.forget_packages();
    machine.boot();
    let on_disk = || std::fs::read_to_string(machine.path("etc/spokeguard/policy.toml")).unwrap();
    controller.changes(&[], &json!({}));
    let in_force = || (machine.hub_gets_in(), machine.answer(22), machine.table().contains("10.84.0.250"));
    let confirmed = (true, Answer::Silent, false);
    let file = on_disk();
    assert_eq!((machine.rules().as_str(), in_force()), ("confirmed", confirmed));

    // The spoke is told that its hub is another.
    controller.knows_another("tokyo");
    let mut bad = good.clone();
    bad["mesh"]["hub"]["address"] = json!("10.84.0.250");
    bad["enforce"]["confirm_within"] = json!("20s");
    let bad = json!({ "spokeguard_policy": bad });
    let playing = controller.start(&[], &bad);
    machine.wait("another hub's policy", |machine| machine.table().contains("10.84.0.250"));
    assert!(!machine.hub_gets_in(), "the hub is not shut out, so this proves nothing");
    let refused = |played: Outcome| {
        let said = played.stdout;
        assert_eq!(played.code, Some(2), "{said}");
        assert!(
            said.contains("unreachable=0") && said.contains("was rolled back: no new connection"),
            "{said}"
        );
        assert_eq!((machine.rules().as_str(), in_force()), ("rolled-back", confirmed), "{said}");
        // Neither the play nor what it brings came to the next host.
        assert!(!said.contains("tokyo") && on_disk().contains("name = \"singapore\""), "{said}");
        assert!(on_disk().contains("10.84.0.250"), "{said}");
        said
    };
    refused(Controller::end_of(playing));
    // It is no more right for being there already, and isn't tried again.
    let said = refused(controller.play(&[], &bad));
    assert!(said.contains("changed=0"), "{said}");

    // What was good before is so again, however long the daemon is held up and says "rolled back" of the other.
    hold_up(&machine);
    machine.ok(&["mv", "/usr/bin/spokeguard", "/usr/bin/spokeguard.real"]);
    machine.write("usr/bin/spokeguard", OLDER);
    machine.ok(&["chmod", "755", "/usr/bin/spokeguard"]);
    let mut playing = controller.start(&["--limit", "singapore"], &json!({}));
    playing.wait_for("RETRYING: [singapore]: Wait until the daemon has taken it up", PATIENCE).unwrap();
    machine.ok(&["systemctl", "stop", "held"]);
    let (said, changes) = Controller::changed(Controller::end_of(playing));
    assert!(changes >= 1, "{said}");
    assert_eq!((machine.rules(), on_disk(), in_force()), ("confirmed".to_owned(), file, confirmed), "{said}");
    machine.ok(&["mv", "/usr/bin/spokeguard.real", "/usr/bin/spokeguard"]);
    if std::env::var_os("SPOKEGUARD_ALL").is_some() {
        goes_back_however_ansible_is_connected(&controller, &machine, &good);
    }
}

/// On a host that has confirmed the good policy.
fn goes_back_however_ansible_is_connected(controller: &Controller<'_>, machine: &Machine<'_>, good: &Value) {
    let refused = |played: Outcome| {
        let said = played.stdout;
        assert_eq!(played.code, Some(2), "{said}");
        assert!(
            said.contains("unreachable=0") && said.contains("was rolled back: no new connection"),
            "{said}"
        );
        assert!(!said.contains("tokyo"), "{said}");
        said
    };
    // All that Ansible wants of sudo, which needn't be installed here.
    machine.write("usr/bin/sudo", "#!/bin/sh\nuntil [ \"$1\" = /bin/sh ]; do shift; done\nexec \"$@\"\n");
    machine.ok(&["chmod", "755", "/usr/bin/sudo"]);
    // Who has to become root gives up where others wait, and a keepalive ends the connection, long before the way back.
    let control = controller.folder.join("ssh");
    // What earlier plays have left open has none.
    let keepalive = format!(
        "{SSH} -o ServerAliveInterval=1 -o ServerAliveCountMax=3 -o ControlPath={}",
        control.display()
    );
    let mut bad = good.clone();
    bad["mesh"]["hub"]["address"] = json!("10.84.0.250");
    for (within, way) in [
        ("30s", json!({ "ansible_become_method": "sudo" })),
        ("31s", json!({ "ansible_ssh_common_args": keepalive })),
    ] {
        bad["enforce"]["confirm_within"] = json!(within);
        let mut more = way.clone();
        more["spokeguard_policy"] = bad.clone();
        // Between two tasks: one that has begun would only wait.
        hold_up(machine);
        let mut playing = controller.start(&["-vv"], &more);
        playing.wait_for("TASK [spokeguard : Service]", PATIENCE).unwrap();
        playing.signal(Signal::STOP).unwrap();
        machine.ok(&["systemctl", "stop", "held"]);
        machine.wait("another hub's policy", |machine| machine.table().contains("10.84.0.250"));
        playing.signal(Signal::CONT).unwrap();
        let said = refused(Controller::end_of(playing));
        assert!(said.contains("ssh_retry: attempt: 1"), "{way}: nothing was given up: {said}");
    }

    // With the old connection alive and no new one let in, it is the role that finds out.
    let mut other = good.clone();
    other["public"]["tcp"] = json!([80]);
    // Longer than the first try for a new connection, even where everything takes long.
    other["enforce"]["confirm_within"] = json!("60s");
    let mut playing = controller.start(&[], &json!({ "spokeguard_policy": &other }));
    playing.wait_for("TASK [spokeguard : Service]", PATIENCE).unwrap();
    let hub = &controller.lab.hub;
    hub.nft(&format!(
        "table inet stays {{ chain out {{ type filter hook output priority 0
           ip daddr {SPOKE_MESH} tcp flags & (syn | ack) == syn drop; }}
         }}"
    ))
    .unwrap();
    playing.wait_for("TASK [spokeguard : Wait for a new connection]", PATIENCE).unwrap();
    machine.wait("nobody confirms", |machine| machine.rules() == "rolled-back");
    hub.nft("delete table inet stays").unwrap();
    refused(Controller::end_of(playing));
    controller.changes(&["--limit", "singapore"], &json!({}));
    assert_eq!(machine.rules(), "confirmed");

    // Nor is it done where the daemon can't come to it.
    hold_up(machine);
    let late = controller.play(&[], &json!({ "spokeguard_policy": other }));
    assert_eq!(late.code, Some(2), "{}", late.stdout);
    let why = "The daemon has not taken up this policy";
    assert!(late.stdout.contains(why) && late.stdout.contains("says: rules not-in-force"), "{}", late.stdout);
    assert!(!late.stdout.contains("tokyo"), "{}", late.stdout);
}

/// The daemon can't change any rules until the unit `held` is stopped.
fn hold_up(machine: &Machine<'_>) {
    const LOCK: &str = "/run/spokeguard/rollback/lock";
    machine.ok(&["systemd-run", "--unit=held", "flock", LOCK, "sleep", "infinity"]);
    machine.wait("nobody else may change the rules", |machine| {
        machine.run(&["flock", "--nonblock", LOCK, "true"]).code == Some(1)
    });
}

/// On a host that the role has set up.
fn takes_up_what_changes(controller: &Controller<'_>, machine: &Machine<'_>, secret: &Value) {
    let on_disk = || std::fs::read_to_string(machine.path("etc/spokeguard/policy.toml")).unwrap();
    // What a changed policy would change is shown, and it isn't put there.
    let mut wider = policy();
    wider["public"]["tcp"] = json!([80, 443, 8080]);
    let wider = json!({ "spokeguard_policy": wider, "spokeguard_secrets": secret["spokeguard_secrets"] });
    let good = on_disk();
    let pid = machine.property("spokeguard.service", "MainPID");
    let (said, changes) = controller.changes(&["--check", "--diff"], &wider);
    assert!(changes >= 1 && said.contains("+tcp = [80, 443, 8080]"), "{said}");
    assert_eq!(on_disk(), good);
    let web = std::net::SocketAddr::new(SPOKE_PUBLIC, 8080);
    let knock = || machine.lab.internet.connect(web, Duration::from_millis(400));
    assert_eq!(knock(), Answer::Silent);

    // The daemon takes it up without a restart.
    controller.changes(&[], &wider);
    assert_eq!(machine.rules(), "confirmed");
    assert_eq!(machine.property("spokeguard.service", "MainPID"), pid);
    assert_eq!(knock(), Answer::Refused, "let in, and nothing listens");

    // One with a mistake is never put in place.
    let good = on_disk();
    let mut wrong = wider;
    wrong["spokeguard_policy"]["public"]["tcp"] = json!([80, 4430000]);
    let refused = controller.play(&[], &wrong);
    assert_eq!(refused.code, Some(2), "{}", refused.stdout);
    assert!(
        refused.stdout.contains("4430000") && refused.stdout.contains("failed to validate"),
        "{}",
        refused.stdout
    );
    assert_eq!(on_disk(), good);
}

#[test]
fn ansible_puts_the_tar_s_program_on_hosts_without_dpkg() {
    const PROGRAM: &str = "/usr/local/sbin/spokeguard";
    if lacking(&[Need::Lab, Need::Spokeguard, Need::Sshd, Need::Nspawn, Need::Debian, Need::Ansible]) {
        return;
    }
    if std::env::var_os("SPOKEGUARD_ALL").is_none() {
        eprintln!(
            "skipped: another machine set up by the role takes minutes; cargo xtask test --all does it"
        );
        return;
    }
    let lab = Lab::plain();
    let mut machine = Machine::new(&lab);
    // With no secrets: nobody has made a folder for them.
    let mut policy = policy();
    policy.as_object_mut().unwrap().remove("heartbeat").unwrap();
    let controller = Controller::new(&lab, &machine, "tar", &policy);
    std::fs::remove_dir_all(machine.path("etc/spokeguard")).unwrap();
    // Who would use either is told that there is none.
    for program in ["dpkg", "dpkg-query", "apt-get"] {
        std::fs::remove_file(machine.path(&format!("usr/bin/{program}"))).unwrap();
    }
    machine.boot();
    let before = machine.left();
    let nothing = json!({});
    let (said, changes) = controller.changes(&["--check", "--diff"], &nothing);
    assert!(changes >= 2 && said.contains("TASK [spokeguard : Bring the program]"), "{said}");
    assert_eq!(machine.left(), before);

    let (said, _) = controller.changes(&["--diff"], &nothing);
    assert_eq!(machine.rules(), "confirmed", "{said}");
    assert_eq!(machine.answer(22), Answer::Silent);
    assert!(machine.hub_gets_in());
    let pid = machine.property("spokeguard.service", "MainPID");
    let running = machine.ok(&["readlink", &format!("/proc/{pid}/exe")]);
    assert_eq!(running.trim(), PROGRAM);
    assert_eq!(machine.ok(&["stat", "-c", "%U:%G %a", PROGRAM]), "root:root 755\n");
    // The program alone, none of what else the tar has.
    assert!(!machine.path("usr/local/sbin/README.md").exists());

    let (said, changes) = controller.changes(&[], &nothing);
    assert_eq!(changes, 0, "{said}");
    assert_eq!(machine.property("spokeguard.service", "MainPID"), pid);
    let (said, changes) = controller.changes(&["--check"], &nothing);
    assert_eq!(changes, 0, "{said}");

    // One whose units were not put in place is gone on with.
    std::fs::remove_file(machine.path("etc/systemd/system/spokeguard-boot.service")).unwrap();
    machine.ok(&["systemctl", "daemon-reload"]);
    let (said, changes) = controller.changes(&[], &nothing);
    assert!(changes >= 1, "{said}");
    assert_eq!(machine.enabled("spokeguard-boot.service"), "enabled");
    let mut pid = machine.property("spokeguard.service", "MainPID");

    // So is one whose daemon still runs the program of before.
    machine.ok(&["sh", "-ec", &format!("cp -p {PROGRAM} /tmp/same; mv -f /tmp/same {PROGRAM}")]);
    let (said, changes) = controller.changes(&[], &nothing);
    assert!(changes >= 1, "{said}");
    let replaced = std::mem::replace(&mut pid, machine.property("spokeguard.service", "MainPID"));
    assert_ne!(pid, replaced);
    let (said, changes) = controller.changes(&[], &nothing);
    assert_eq!(changes, 0, "{said}");

    // Another version is replaced, and the daemon is restarted with nothing open meanwhile.
    let other = format!(
        "printf '#!/bin/sh\\necho spokeguard 0.0.1\\n' >/tmp/other; chmod 755 /tmp/other; mv -f /tmp/other {PROGRAM}"
    );
    machine.ok(&["sh", "-ec", &other]);
    machine.nobody_answers_while(|_| {
        let (said, changes) = controller.changes(&[], &nothing);
        assert!(changes >= 1, "{said}");
    });
    assert_eq!(machine.rules(), "confirmed");
    assert_ne!(machine.property("spokeguard.service", "MainPID"), pid);

    // Taken away, it leaves what is in force, and what a trial would need until the next boot.
    machine.write_new("etc/spokeguard/mine", "kept");
    let absent = json!({ "spokeguard_state": "absent" });
    let (said, changes) = controller.changes(&[], &absent);
    assert!(changes >= 2, "{said}");
    let kept = "/etc/spokeguard\n/run/spokeguard\n/run/spokeguard/spokeguard.lock\n";
    assert_eq!(machine.left(), before + kept);
    assert!(
        machine.path("etc/spokeguard/mine").exists() && !machine.path("etc/spokeguard/policy.toml").exists()
    );
    assert_eq!(machine.answer(22), Answer::Silent, "what is in force stays so");
    let (said, changes) = controller.changes(&[], &absent);
    assert_eq!(changes, 0, "{said}");
}
