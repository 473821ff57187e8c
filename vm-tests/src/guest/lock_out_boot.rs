//! A host that `spokeguard install` has set up, and nothing but the units to bring it back: the power fails while a
//! policy that shuts the hub out is on trial, the daemon hangs, the sealed rules can't be loaded, and the program is
//! uninstalled.

use std::fs::{self, File};
use std::io::Write as _;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use lab::machine::{LONG, OPEN, SHORT, SHUT, shut_out};
use lab::{Answer, Lab, Machine, SPOKE_MESH, meanwhile};
use serde_json::Value;

use crate::lock_out::{WINDOW, hub_is_out, on_trial};
use crate::{Steps, systemd};

const UNIT: &str = "spokeguard.service";
/// What the hub confirms, beside the policy that may come to say something else.
const CONFIRMED: &str = "etc/spokeguard/confirmed-before.toml";
const POLICY: &str = "etc/spokeguard/policy.toml";
/// From systemd's start: the boot, the daemon's start, the trial's window and the way back.
const BACK_BY: Duration = Duration::from_secs(60);
const PROGRAM: &str = "usr/local/sbin/spokeguard";
/// In place of deleting it.
const AWAY: &str = "root/spokeguard-is-away";
const WATCHDOG: &str = "5s";
/// From the moment when the daemon hangs: what systemd waits for, RestartSec= and the start.
const RESTARTED_BY: Duration = Duration::from_secs(30);

/// The first boot ends with the power.
pub fn run(steps: &mut Steps, boot: &str) -> Result<()> {
    let lab = systemd::lab(steps)?;
    systemd::tunnel(&lab)?;
    let mut machine = Machine::whole(&lab, Path::new(systemd::DISK));
    match boot {
        "1" => {
            power_fails(steps, &mut machine)?;
            // Nothing of the lab may tidy up first.
            std::mem::forget(lab);
            Ok(())
        }
        "2" => {
            comes_back(steps, &mut machine)?;
            hangs(steps, &mut machine)?;
            rules_are_spoilt(steps, &machine)
        }
        "3" => {
            is_shut_but_for_the_tunnel(steps, &mut machine)?;
            daemon_returns(steps, &mut machine)?;
            uninstalled(steps, &mut machine)
        }
        "4" => is_as_before(steps, &mut machine),
        other => bail!("no boot {other} of this scenario"),
    }
}

fn power_fails(steps: &mut Steps, machine: &mut Machine) -> Result<()> {
    let policy = on_trial(&machine.lab.plain_policy());
    systemd::furnish(machine, &policy)?;
    machine.write(CONFIRMED, &policy);
    // A link that comes up has no route yet; the tunnel goes this way.
    let route = "[Service]\nExecStart=ip route replace default via 198.51.100.99\n";
    machine.write_new("etc/systemd/system/cables.service.d/route.conf", route);
    steps.step("systemd is up", || {
        machine.boot();
        systemd::took(machine)
    })?;
    systemd::installed(steps, machine)?;
    steps.step("a policy that shuts the hub out is on trial when the power fails", || {
        machine.nobody_answers_while(|machine| {
            save(&machine.path(POLICY), &shut_out(&policy)).unwrap();
            machine.wait("the rules are on trial", |machine| machine.rules() == "on-trial");
            hub_is_out(machine.lab).unwrap();
        });
        let rules = machine.rules();
        ensure!(rules == "on-trial", "when the power fails they are {rules}");
        Ok(format!("for {WINDOW}; the hub is out"))
    })
}

/// As an editor saves it: what its administrator wrote is on the disk before anybody tries it. Nothing that is
/// written later is.
fn save(path: &Path, text: &str) -> Result<()> {
    let mut file = File::create(path).with_context(|| format!("create {}", path.display()))?;
    file.write_all(text.as_bytes())?;
    file.sync_all().context("sync the policy")
}

fn comes_back(steps: &mut Steps, machine: &mut Machine) -> Result<()> {
    let confirmed = fs::read_to_string(machine.path(CONFIRMED)).context("read what was confirmed")?;
    steps.step("the disk has the policy that nobody confirmed, and nothing of a rollback", || {
        let text = fs::read_to_string(machine.path(POLICY))?;
        ensure!(text == shut_out(&confirmed), "{text}");
        let refused = machine.path("var/lib/spokeguard/refused.toml");
        ensure!(!refused.exists(), "{} is there, so this proves nothing", refused.display());
        Ok(String::new())
    })?;
    steps.step("by the units alone the hub gets in, and a stranger does not", || {
        let lab = machine.lab;
        let (begun, mut up) = (Instant::now(), Duration::ZERO);
        let (heard, ways) = while_the_hub_knocks(lab, || {
            machine.nobody_answers_while(|machine| {
                machine.boot();
                up = begun.elapsed();
                machine.wait("the rules are rolled back", |machine| machine.rules() == "rolled-back");
                machine.wait("the hub gets in", Machine::hub_gets_in);
            })
        });
        ensure!(heard.open.iter().all(|answers| *answers > 5), "{OPEN} has hardly answered: {heard:?}");
        let told: Vec<String> = (ways.iter())
            .map(|(at, is_in)| {
                format!("{} after {:.1} s", if *is_in { "in" } else { "out" }, at.as_secs_f64())
            })
            .collect();
        let told = told.join(", ");
        let last = ways.last().filter(|(at, is_in)| *is_in && *at < BACK_BY);
        ensure!(last.is_some(), "the hub is not in within {BACK_BY:?}: {told}");
        Ok(format!(
            "the hub is {told}, systemd up after {:.1} s; {} knocks of strangers",
            up.as_secs_f64(),
            heard.knocks
        ))
    })?;
    steps.step("what was confirmed before is in force, and status says what became of the other", || {
        // The report that tells of it comes a cycle after the state.
        let mut finding = Value::Null;
        machine.wait("status tells of the rollback", |machine| {
            let status = machine.status();
            let mut all = status["findings"].as_array().into_iter().flatten();
            finding = all.find(|one| one["code"] == "policy-rolled-back").cloned().unwrap_or_default();
            status["daemon"]["rules"] == "rolled-back" && !finding.is_null()
        });
        let plan = |policy| machine.run(&["spokeguard", "plan", "--policy", &format!("/{policy}")]);
        let (before, other) = (plan(CONFIRMED), plan(POLICY));
        ensure!(before.code == Some(0), "what was confirmed is not in force: {}", before.all());
        ensure!(other.code == Some(1), "both come to the same, so this proves nothing: {}", other.all());
        systemd::is_shut(machine)?;
        Ok(format!(
            "{}: {}",
            finding["subject"].as_str().unwrap_or_default(),
            finding["found"].as_str().unwrap_or_default()
        ))
    })
}

/// What `work` comes to, and when the hub's way in through the tunnel opened and shut meanwhile.
fn while_the_hub_knocks<T>(lab: &Lab, work: impl FnOnce() -> T) -> (T, Vec<(Duration, bool)>) {
    let begun = Instant::now();
    let hub = |stop: &AtomicBool| {
        let mut ways: Vec<(Duration, bool)> = Vec::new();
        loop {
            // The last look begins after all the work.
            let last = stop.load(Ordering::Relaxed);
            let is_in = lab.hub.connect(SocketAddr::new(SPOKE_MESH, 22), SHORT) == Answer::Open;
            if ways.last().is_none_or(|(_, before)| *before != is_in) {
                ways.push((begun.elapsed(), is_in));
            }
            if last {
                return ways;
            }
            // sshd has a process for each.
            std::thread::sleep(Duration::from_millis(500));
        }
    };
    meanwhile(hub, work)
}

fn hangs(steps: &mut Steps, machine: &mut Machine) -> Result<()> {
    steps.step("a daemon that hangs is killed and started again, and nothing opens", || {
        // Of this boot only.
        let folder = format!("/run/systemd/system/{UNIT}.d");
        let script =
            format!("mkdir {folder}; printf '[Service]\\nWatchdogSec={WATCHDOG}\\n' >{folder}/soon.conf");
        machine.ok(&["sh", "-ec", &script]);
        machine.ok(&["systemctl", "daemon-reload"]);
        machine.ok_within(LONG, &["systemctl", "restart", UNIT]);
        machine.wait("the daemon is back", |machine| machine.rules() == "rolled-back");
        let limit = machine.property(UNIT, "WatchdogUSec");
        let [pid, restarts] = ["MainPID", "NRestarts"].map(|name| machine.property(UNIT, name));
        let begun = Instant::now();
        let mut took = Duration::ZERO;
        let heard = machine.nobody_answers_while(|machine| {
            machine.ok(&["kill", "-STOP", &pid]);
            machine.wait("systemd starts another", |machine| {
                ![&*pid, "0"].contains(&&*machine.property(UNIT, "MainPID"))
                    && machine.property(UNIT, "ActiveState") == "active"
            });
            took = begun.elapsed();
            // It does not try again what was rolled back.
            machine.wait("the rules are rolled back", |machine| machine.rules() == "rolled-back");
            assert!(machine.hub_gets_in());
        });
        ensure!(heard.open.iter().all(|answers| *answers > 5), "{OPEN} has hardly answered: {heard:?}");
        // journald writes when it comes to that, and a file that it writes to may read as empty.
        for said in ["Watchdog timeout", "Failed with result 'watchdog'"] {
            machine.wait(&format!("systemd says {said}"), |machine| machine.journal().contains(said));
        }
        let journal = machine.journal();
        let [before, after] =
            [&restarts, &machine.property(UNIT, "NRestarts")].map(|count| count.parse::<u32>());
        let (before, after) = (before.context("NRestarts")?, after.context("NRestarts")?);
        ensure!(after == before + 1, "{before} restarts before, {after} after: {journal}");
        ensure!(took < RESTARTED_BY, "only after {took:?}: {journal}");
        Ok(format!("after {:.1} s, with WatchdogSec={limit}; {} knocks", took.as_secs_f64(), heard.knocks))
    })
}

/// What the next boot has: half of the sealed rules, no program of ours, and nothing that knows the tunnel by name.
fn rules_are_spoilt(steps: &mut Steps, machine: &Machine) -> Result<()> {
    steps.step("the sealed rules are cut off, and the program is away", || {
        machine.ok_within(LONG, &["systemctl", "stop", UNIT]);
        let sealed = machine.path("var/lib/spokeguard/sealed.nft");
        let text = fs::read_to_string(&sealed)?;
        fs::write(&sealed, &text[..text.len() / 2])?;
        fs::remove_file(machine.path("var/lib/spokeguard/tunnel.nft"))?;
        let shut = machine.path("usr/lib/spokeguard/shut.nft");
        let text = fs::read_to_string(&shut)?;
        let rest: Vec<&str> = text.lines().filter(|line| !line.contains("iifname \"wg")).collect();
        ensure!(rest.iter().any(|line| line.contains("iifkind \"wireguard\"")), "{text}");
        fs::write(&shut, rest.join("\n") + "\n")?;
        fs::rename(machine.path(PROGRAM), machine.path(AWAY))?;
        machine.ok(&["sync"]);
        Ok(format!("{} of {} lines of shut.nft", rest.len(), text.lines().count()))
    })
}

fn is_shut_but_for_the_tunnel(steps: &mut Steps, machine: &mut Machine) -> Result<()> {
    steps.step("rules that can't be loaded shut the host, but for what comes by WireGuard", || {
        let (heard, ways) = while_the_hub_knocks(machine.lab, || {
            machine.nobody_answers_while(|machine| {
                machine.boot();
                machine.wait("the hub gets in", Machine::hub_gets_in);
                machine.wait("sshd greets the hub", Machine::sshd_greets);
            })
        });
        ensure!(heard.open == [0, 0], "{OPEN} is open as well: {heard:?}");
        let states = [("spokeguard-boot", "failed"), ("spokeguard-shut", "active")];
        for (unit, wanted) in states {
            let state = machine.property(&format!("{unit}.service"), "ActiveState");
            ensure!(state == wanted, "{unit} is {state}: {}", machine.journal());
        }
        ensure!(
            machine.property(UNIT, "ActiveState") != "active",
            "there is a daemon, so this proves nothing"
        );
        let (at, _) = ways.iter().find(|(_, is_in)| *is_in).context("the hub was never in")?;
        Ok(format!("the hub is in after {:.1} s; {} knocks of strangers", at.as_secs_f64(), heard.knocks))
    })
}

fn daemon_returns(steps: &mut Steps, machine: &mut Machine) -> Result<()> {
    steps.step("with its program there again, the confirmed rules take that one's place", || {
        machine.nobody_answers_while(|machine| {
            fs::rename(machine.path(AWAY), machine.path(PROGRAM)).unwrap();
            machine.ok_within(LONG, &["systemctl", "restart", UNIT]);
            machine.wait("80 answers a stranger", |machine| machine.answer(OPEN) == Answer::Open);
            machine.wait("the hub gets in", Machine::hub_gets_in);
        });
        let before = machine.run(&["spokeguard", "plan", "--policy", &format!("/{CONFIRMED}")]);
        ensure!(before.code == Some(0), "what was confirmed is not in force: {}", before.all());
        Ok(String::new())
    })
}

fn uninstalled(steps: &mut Steps, machine: &mut Machine) -> Result<()> {
    steps.step("`spokeguard uninstall` opens nothing", || {
        machine.nobody_answers_while(|machine| {
            let told = machine.ok_within(LONG, &["spokeguard", "uninstall"]);
            assert!(told.contains("The rules in force stay until the next boot"), "{told}");
            assert!(machine.hub_gets_in());
            // Also gives those who knock some time.
            systemd::is_shut(machine).unwrap();
        });
        let state = machine.property(UNIT, "LoadState");
        ensure!(state == "not-found", "{UNIT} is {state}");
        Ok(String::new())
    })
}

fn is_as_before(steps: &mut Steps, machine: &mut Machine) -> Result<()> {
    steps.step("at the next boot whoever knocks is answered", || {
        machine.boot();
        for port in SHUT.into_iter().chain([OPEN]) {
            machine.wait(&format!("{port} answers"), |machine| machine.answer(port) == Answer::Open);
        }
        machine.wait("sshd greets the hub", Machine::sshd_greets);
        systemd::took(machine)
    })?;
    steps.step("nothing of ours is left but what `uninstall` keeps", || {
        let kept = "/etc/spokeguard\n/var/lib/spokeguard\n";
        machine.is_without_us(kept);
        let failed = machine.run(&["systemctl", "list-units", "--failed", "--plain", "--no-legend"]);
        ensure!(failed.code == Some(0) && failed.is_silent(), "failures: {}", failed.all());
        Ok(kept.trim().replace('\n', ", "))
    })
}
