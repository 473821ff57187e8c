//! Scenarios with the disk's systemd as the first process of this kernel. Hub and stranger were there before it, and
//! the machine itself is the spoke.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use lab::machine::{LONG, OPEN, SHUT, SSH_BY, is_tunnel, mesh_anew};
use lab::{Answer, Lab, Machine};

use crate::Steps;

/// The disk, as seen from here before and after it has become the machine's root.
pub(crate) const DISK: &str = "/mnt";
const PACKAGE: &str = "/opt/sg/spokeguard.deb";
/// Of another version, where one was given.
const EARLIER: &str = "/opt/sg/earlier.deb";
const LATE: Duration = Duration::from_secs(60);

pub fn boot_window(steps: &mut Steps, boot: &str) -> Result<()> {
    let lab = lab(steps)?;
    let mut machine = Machine::whole(&lab, Path::new(DISK));
    match boot {
        "1" => {
            furnish(&machine, &lab.plain_policy())?;
            steps.step("without any of ours: whoever knocks is answered", || {
                machine.boots_open();
                took(&machine)
            })?;
            // Of what flushes all rules at a boot.
            machine.flushes_late();
            installed(steps, &machine)
        }
        "2" => {
            steps.step("from the first packet of a boot only 80 answers a stranger", || {
                machine.boots_shut();
                machine.wait("the daemon holds it", |machine| machine.rules() == "confirmed");
                took(&machine)
            })?;
            // For the next boot.
            fs::remove_file(machine.path("usr/local/sbin/spokeguard")).context("delete the daemon's program")
        }
        "3" => steps.step("the same with the daemon's program deleted", || {
            machine.boots_shut();
            let state = machine.property("spokeguard.service", "ActiveState");
            anyhow::ensure!(state != "active", "there is a daemon, so this proves nothing");
            Ok(format!("spokeguard.service is {state}"))
        }),
        other => bail!("no boot {other} of this scenario"),
    }
}

pub fn ssh_race(steps: &mut Steps, boot: &str) -> Result<()> {
    let lab = lab(steps)?;
    let mut machine = Machine::whole(&lab, Path::new(DISK));
    if boot == "1" {
        confirmed(steps, &mut machine, &lab)?;
        return steps.step("sshd listens on the mesh alone", || {
            machine.listen_on_mesh_alone();
            is_shut(&machine)
        });
    }
    let number: usize = boot.parse().context("the boot's number")?;
    let by = SSH_BY.get(number - 2).with_context(|| format!("no boot {boot} of this scenario"))?;
    steps.step(&format!("{by}: within 5 s of its address, and nowhere else"), || {
        // A kernel without it would have ssh go by a cable instead.
        anyhow::ensure!(is_tunnel(), "this kernel has no WireGuard");
        machine.ssh_follows_its_address(by, LATE);
        Ok(format!("the mesh came {} s late, then went and came twice", LATE.as_secs()))
    })
}

pub fn package(steps: &mut Steps, boot: &str) -> Result<()> {
    let lab = lab(steps)?;
    let mut machine = Machine::whole(&lab, Path::new(DISK));
    match boot {
        "1" => {
            furnish(&machine, &lab.plain_policy())?;
            fs::remove_file(machine.path("etc/spokeguard/policy.toml")).context("remove the policy")?;
            steps.step("systemd is up", || {
                machine.boot();
                took(&machine)
            })?;
            steps.step("installed, taken over and upgraded", || {
                let earlier = Some(Path::new(EARLIER)).filter(|path| path.exists());
                machine.stands_its_package(Path::new(PACKAGE), earlier);
                let from = if earlier.is_some() { "from another version" } else { "from the same program" };
                Ok(format!("upgraded {from}"))
            })
        }
        "2" => {
            steps.step("shut by its units alone from the first packet of a boot; removed and purged", || {
                machine.boots_and_loses_its_package();
                Ok("nothing of ours is left".to_owned())
            })
        }
        "3" => steps.step("the boot after that is as if it had never been there", || {
            machine.boots_without_its_package();
            took(&machine)
        }),
        other => bail!("no boot {other} of this scenario"),
    }
}

pub fn neighbours(steps: &mut Steps) -> Result<()> {
    let lab = lab(steps)?;
    let mut machine = Machine::whole(&lab, Path::new(DISK));
    confirmed(steps, &mut machine, &lab)?;
    steps.step("ufw and firewalld come, reload and go, and nothing opens", || {
        machine.stands_other_firewalls();
        is_shut(&machine)
    })
}

pub(crate) fn lab(steps: &mut Steps) -> Result<Lab> {
    steps.make("a lab around this machine", || Ok((Lab::around_this_machine()?, crate::release()?)))
}

/// A tunnel of the kernel's in place of the mesh's cable.
pub(crate) fn tunnel(lab: &Lab) -> Result<()> {
    anyhow::ensure!(is_tunnel(), "this kernel has no WireGuard");
    lab.spoke.ok(&["ip", "link", "del", "wg0"])?;
    mesh_anew(lab);
    Ok(())
}

/// The disk's first boot: what every machine of the tests has, our program and a policy.
pub(crate) fn furnish(machine: &Machine, policy: &str) -> Result<()> {
    machine.furnish();
    machine.copy_in(Path::new("/opt/sg/spokeguard"), "opt/spokeguard");
    machine.write("etc/spokeguard/policy.toml", policy);
    Ok(())
}

fn confirmed(steps: &mut Steps, machine: &mut Machine, lab: &Lab) -> Result<()> {
    furnish(machine, &lab.plain_policy())?;
    steps.step("systemd is up", || {
        machine.boot();
        took(machine)
    })?;
    installed(steps, machine)
}

pub(crate) fn installed(steps: &mut Steps, machine: &Machine) -> Result<()> {
    steps.step("`spokeguard install`, and the hub's ssh confirms", || {
        // A build for debugging, on an emulated processor.
        machine.ok_within(LONG, &["/opt/spokeguard", "install"]);
        machine.hub_confirms();
        is_shut(machine)
    })
}

pub(crate) fn is_shut(machine: &Machine) -> Result<String> {
    others_are_silent(machine)?;
    machine.wait("80 answers a stranger", |machine| machine.answer(OPEN) == Answer::Open);
    Ok("22 and 5432 are silent, 80 is open".to_owned())
}

/// All but the web.
pub(crate) fn others_are_silent(machine: &Machine) -> Result<()> {
    for port in SHUT {
        let answer = machine.answer(port);
        anyhow::ensure!(answer == Answer::Silent, "{port} is {answer:?} for a stranger");
    }
    Ok(())
}

/// How long the boot was, in systemd's words.
pub(crate) fn took(machine: &Machine) -> Result<String> {
    let text = machine.run(&["systemd-analyze", "time"]).stdout;
    Ok(text.lines().next().unwrap_or_default().to_owned())
}
