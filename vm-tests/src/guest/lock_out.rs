//! A policy that would shut its operator out, and every way in which it could stay: it goes back by itself, whoever
//! is killed meanwhile, and also when the power fails in the middle. Strangers get in at no time.

use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use lab::machine::shut_out;
use lab::{Answer, Daemon, Lab, Listening, Mesh, SPOKE_MESH, SPOKE_PUBLIC, Shape, Signal, Sshd, meanwhile};

use crate::{LONG, SOON, Steps, patiently, run_to_end};

/// What outlives the machine.
const DISK: &str = "/mnt";
pub(crate) const WINDOW: &str = "20s";
/// From the trial's begin until the hub has logged in again: the window, and a slow processor's time for the way back
/// and for a login.
const BACK: Duration = Duration::from_secs(20 + 10);

/// The first boot ends with the power.
pub fn run(steps: &mut Steps, boot: &str) -> Result<()> {
    steps.make("a disk", || {
        run_to_end(Command::new("mount").args(["-t", "ext4", "/dev/vda", DISK]))?;
        Ok(((), crate::release()?))
    })?;
    match boot {
        "1" => before(steps),
        "2" => after(steps),
        other => bail!("no boot {other} of this scenario"),
    }
}

struct Spoke {
    lab: Lab,
    sshd: Sshd,
    _database: Listening,
}

impl Spoke {
    fn new() -> Result<(Self, String)> {
        let lab = Lab::build(Shape { mesh: Mesh::WireGuard, container: false })?;
        let sshd = lab.spoke.sshd(22, &[&SPOKE_MESH.to_string()], "")?;
        let _database = lab.spoke.listen("postgres", &["tcp/0.0.0.0:5432"])?;
        Ok((Self { lab, sshd, _database }, String::new()))
    }

    fn policy(&self, ports: &str) -> String {
        on_trial(&self.lab.policy().replace("tcp = [80, 443]", &format!("tcp = {ports}")))
    }

    fn shut_out(&self) -> String {
        shut_out(&self.policy("[80]"))
    }

    fn rules(&self, daemon: &Daemon) -> Result<String> {
        let status = self.lab.spoke.spokeguard(&daemon.arguments(&["status", "--format", "json"]))?;
        Ok(status.json()?["daemon"]["rules"].as_str().unwrap_or_default().to_owned())
    }

    fn await_rules(&self, daemon: &Daemon, wanted: &str) -> Result<()> {
        patiently(&format!("the rules are {wanted}"), || (self.rules(daemon).ok()? == wanted).then_some(()))
            .with_context(|| daemon.running.log())
    }

    /// The rules are on trial since then: the hub is out, and in again when the window has passed.
    fn hub_comes_back(&self, begun: Instant) -> Result<String> {
        hub_is_out(&self.lab)?;
        self.hub_gets_in()?;
        let took = begun.elapsed();
        ensure!(took <= BACK, "the hub was out for {took:?} with a window of {WINDOW}");
        Ok(format!("the hub was out for {:.1} s, with a window of {WINDOW}", took.as_secs_f64()))
    }

    fn hub_gets_in(&self) -> Result<()> {
        patiently("the hub logs in", || {
            let login = self.sshd.login(&self.lab.hub, SPOKE_MESH, "echo in").ok()?;
            (login.stdout.trim() == "in").then_some(())
        })
    }

    /// Does something while a stranger knocks.
    fn knocked_at<T>(&self, work: impl FnOnce() -> Result<T>) -> Result<T> {
        let stranger = |stop: &AtomicBool| {
            let mut knocks = 0;
            while !stop.load(Ordering::Relaxed) {
                for port in [22, 5432] {
                    let answer = self.lab.internet.connect(SocketAddr::new(SPOKE_PUBLIC, port), SOON / 3);
                    ensure!(answer == Answer::Silent, "a stranger asks {port}: {answer:?}");
                    knocks += 1;
                }
            }
            Ok(knocks)
        };
        let (done, knocks) = meanwhile(stranger, work);
        ensure!(knocks? > 0, "nobody knocked");
        done
    }
}

/// A policy that waits for the hub as long as this scenario does.
pub(crate) fn on_trial(policy: &str) -> String {
    format!("{policy}[enforce]\nconfirm_within = \"{WINDOW}\"\n")
}

pub(crate) fn hub_is_out(lab: &Lab) -> Result<()> {
    let answer = lab.hub.connect(SocketAddr::new(SPOKE_MESH, 22), SOON);
    ensure!(answer == Answer::Silent, "the hub is not shut out, so this proves nothing: {answer:?}");
    Ok(())
}

fn before(steps: &mut Steps) -> Result<()> {
    let spoke = steps.make("a lab of the kernel's WireGuard", Spoke::new)?;
    let folder = Path::new(DISK).join("guard");
    fs::create_dir_all(&folder).context("make a folder on the disk")?;
    let file = folder.join("policy.toml");
    fs::write(&file, spoke.policy("[80, 443]"))?;
    let mut daemon = steps.make("the hub's ssh confirms the first policy", || {
        let daemon = spoke.lab.spoke.daemon_on_trial(&[], &folder, &[])?;
        spoke.hub_gets_in()?;
        spoke.await_rules(&daemon, "confirmed")?;
        Ok((daemon, String::new()))
    })?;
    steps.step("a policy with another hub goes back by itself", || {
        spoke.knocked_at(|| {
            fs::write(&file, spoke.shut_out())?;
            spoke.await_rules(&daemon, "on-trial")?;
            let took = spoke.hub_comes_back(Instant::now())?;
            spoke.await_rules(&daemon, "rolled-back")?;
            Ok(took)
        })
    })?;
    steps.step("also when daemon and command line are killed", || {
        spoke.knocked_at(|| {
            let wait = daemon.arguments(&["apply", "--wait", "--confirm-within", WINDOW]);
            let mut command =
                spoke.lab.spoke.spawn(&[&[lab::spokeguard()?.display().to_string()], &*wait].concat())?;
            spoke.await_rules(&daemon, "on-trial")?;
            let begun = Instant::now();
            daemon.kill_9()?;
            command.signal(Signal::KILL)?;
            command.wait(LONG)?;
            spoke.hub_comes_back(begun)
        })
    })?;
    let daemon = steps.make("a new daemon does not try it again", || {
        spoke.knocked_at(|| {
            let daemon = spoke.lab.spoke.daemon_on_trial(&[], &folder, &[])?;
            spoke.await_rules(&daemon, "rolled-back")?;
            spoke.hub_gets_in()?;
            Ok((daemon, String::new()))
        })
    })?;
    steps.step("another such policy is on trial when the power fails", || {
        fs::write(&file, spoke.shut_out().replace("tcp = [80]", "tcp = [443]"))?;
        spoke.await_rules(&daemon, "on-trial")?;
        hub_is_out(&spoke.lab)?;
        Ok(String::new())
    })?;
    // Nothing of the lab may tidy up first.
    std::mem::forget((spoke, daemon));
    Ok(())
}

fn after(steps: &mut Steps) -> Result<()> {
    let folder = Path::new(DISK).join("guard");
    let sealed = folder.join("state/sealed.nft").display().to_string();
    // Of a file system in memory.
    fs::remove_dir_all(folder.join("run")).context("empty the run directory, as a boot does")?;
    let spoke = steps.make("the same lab after a boot", Spoke::new)?;
    steps.step("the sealed rules, by nft alone: the hub gets in, strangers don't", || {
        let answer = spoke.lab.internet.connect(SocketAddr::new(SPOKE_PUBLIC, 5432), SOON);
        ensure!(answer == Answer::Open, "5432 is not open without them, so this proves nothing: {answer:?}");
        spoke.lab.spoke.ok(&["nft", "-f", &sealed])?;
        spoke.knocked_at(|| spoke.hub_gets_in())?;
        Ok(sealed.clone())
    })?;
    steps.step("the policy that nobody confirmed goes back by itself", || {
        spoke.knocked_at(|| {
            let daemon = spoke.lab.spoke.daemon_on_trial(&[], &folder, &[])?;
            spoke.await_rules(&daemon, "on-trial")?;
            let took = spoke.hub_comes_back(Instant::now())?;
            spoke.await_rules(&daemon, "rolled-back")?;
            Ok(took)
        })
    })
}
