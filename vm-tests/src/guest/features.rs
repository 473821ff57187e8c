//! Kernels and systems that lack something: the product says what, does the rest, and never says "fine".

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use lab::{Answer, Daemon, Lab, SPOKE_MESH, SPOKE_PUBLIC};

use crate::{LONG, SOON, Steps, blind, codes, patiently};

/// `quick` ends with the first of them.
pub fn run(steps: &mut Steps, quick: bool) -> Result<()> {
    // First: a module that is in use can't be taken away.
    let module = steps.make("a kernel without nf_tables", || {
        let module = hide_module("nf_tables.ko")?;
        let tried = Command::new("nft").args(["list", "ruleset"]).output().context("start nft")?;
        ensure!(!tried.status.success(), "nft works all the same");
        Ok((module, String::from_utf8_lossy(&tried.stderr).lines().next().unwrap_or_default().to_owned()))
    })?;
    without_nf_tables(steps)?;
    if quick {
        return Ok(());
    }
    let (there, hidden) = module;
    fs::rename(&hidden, &there).with_context(|| format!("put {} back", there.display()))?;
    steps.step("a kernel without BTF, where nobody mounted cgroup2", || {
        mount(&["-t", "tmpfs", "tmpfs", "/sys/kernel/btf"])?;
        let done = Command::new("umount").arg("/sys/fs/cgroup").status().context("start umount")?;
        ensure!(done.success() && !Path::new("/sys/fs/cgroup/cgroup.procs").exists(), "umount: {done}");
        ensure!(!Path::new("/sys/kernel/btf/vmlinux").exists(), "BTF is still there");
        crate::release()
    })?;
    without_btf_and_cgroup2(steps)
}

fn without_nf_tables(steps: &mut Steps) -> Result<()> {
    let lab = Lab::new();
    let _web = lab.spoke.web()?;
    let folder = folder(&lab)?;
    let flags = [
        "--policy",
        &folder.join("policy.toml").display().to_string(),
        "--state-dir",
        &lab.dir.join("look").display().to_string(),
    ]
    .map(str::to_owned);
    let spokeguard = |verb: &[&str]| {
        let own = [lab::spokeguard()?.display().to_string()];
        let words: Vec<String> =
            own.into_iter().chain(verb.iter().map(|word| word.to_string())).chain(flags.clone()).collect();
        lab.spoke.run_within(LONG, &words)
    };
    steps.step("check says so, looks at the rest, and exits with 2", || {
        lab.spoke.ok(&["wg", "set", "wg0", "peer", &lab.keys.hub.public, "persistent-keepalive", "0"])?;
        let outcome = spokeguard(&["check", "--format", "json"])?;
        let report = outcome.json()?;
        ensure!(
            outcome.code == Some(2) && report["verdict"] == "unknown",
            "exit code {:?}: {report:#}",
            outcome.code
        );
        let blind = blind(&report).join("\n");
        ensure!(blind.contains("nftables") && blind.contains("nf_tables"), "blind: {blind}");
        ensure!(codes(&report).contains("mesh-keepalive"), "{report:#}");
        Ok(blind)
    })?;
    steps.step("apply says that it could not, and exits with 2", || {
        let outcome = spokeguard(&["apply"])?;
        ensure!(
            outcome.code == Some(2) && outcome.stderr.contains("nf_tables"),
            "{:?} {}",
            outcome.code,
            outcome.all()
        );
        Ok(outcome.stderr.lines().next().unwrap_or_default().to_owned())
    })?;
    steps.step("the daemon runs, repairs what it can, and never says ok", || {
        let daemon = lab.spoke.daemon_on_trial(&[], &folder, &[])?;
        patiently("the keepalive is 25 s again", || {
            let shown = lab.spoke.ok(&["wg", "show", "wg0", "persistent-keepalive"]).ok()?;
            shown.trim_end().ends_with("\t25").then_some(())
        })
        .with_context(|| daemon.running.log())?;
        let outcome = lab.spoke.spokeguard(&daemon.arguments(&["status", "--format", "json"]))?;
        let report = outcome.json()?;
        ensure!(
            outcome.code == Some(2) && report["verdict"] == "unknown",
            "exit code {:?}: {report:#}",
            outcome.code
        );
        let page = lab.hub.http_get(SocketAddr::new(SPOKE_MESH, 9984), "/metrics", &[])?.body;
        for line in
            ["spokeguard_blind{facet=\"nftables\"} 1", "spokeguard_control_enforced{control=\"firewall\"} 0"]
        {
            ensure!(page.contains(line), "no {line} in\n{page}");
        }
        Ok("keepalive set; blind{nftables} 1, control_enforced{firewall} 0".to_owned())
    })
}

fn without_btf_and_cgroup2(steps: &mut Steps) -> Result<()> {
    let lab = Lab::new();
    ensure!(lab.spoke.cgroup.is_none(), "the lab found a control group");
    let _web = lab.spoke.web()?;
    let _sshd = lab.spoke.sshd(22, &[&SPOKE_MESH.to_string()], "KbdInteractiveAuthentication no")?;
    let daemon =
        steps.make("the daemon starts", || Ok((lab.spoke.daemon_in(&folder(&lab)?, &[])?, String::new())))?;
    steps.step("binds are refused, strangers are, and what is counted is counted", || {
        let refused =
            lab.spoke.listen("redis", &["tcp/0.0.0.0:6379"]).err().map(|error| format!("{error:#}"));
        let refused = refused.context("the bind was not refused")?;
        ensure!(refused.contains("Operation not permitted"), "{refused}");
        ensure!(
            lab.internet.connect(SocketAddr::new(SPOKE_PUBLIC, 80), SOON) == Answer::Open,
            "80 is not open"
        );
        ensure!(
            lab.internet.connect(SocketAddr::new(SPOKE_PUBLIC, 22), SOON) == Answer::Silent,
            "22 answers"
        );
        let counted = "spokeguard_packets_total{scope=\"public\",direction=\"in\"";
        patiently("public packets are counted", || {
            let page = lab.hub.http_get(SocketAddr::new(SPOKE_MESH, 9984), "/metrics", &[]).ok()?.body;
            page.lines().any(|line| line.starts_with(counted) && !line.ends_with(" 0")).then_some(())
        })?;
        Ok("neither is needed".to_owned())
    })?;
    steps.step("check proves it from outside, and is blind to nothing", || {
        let outcome = checked(&lab, &daemon)?;
        let report = outcome.json()?;
        ensure!(blind(&report).is_empty(), "blind: {:?}", blind(&report));
        ensure!(
            outcome.code == Some(0) || outcome.code == Some(1),
            "exit code {:?}: {report:#}",
            outcome.code
        );
        ensure!(!codes(&report).iter().any(|code| code.contains("exposed")), "{report:#}");
        Ok(format!("exit code {:?}, {:?}", outcome.code, codes(&report)))
    })
}

fn checked(lab: &Lab, daemon: &Daemon) -> Result<lab::Outcome> {
    let words = daemon.arguments(&["check", "--format", "json"]);
    lab.spoke.run_within(LONG, &[&[lab::spokeguard()?.display().to_string()], &*words].concat())
}

fn folder(lab: &Lab) -> Result<PathBuf> {
    let folder = lab.dir.join("guard");
    fs::create_dir_all(&folder)?;
    fs::write(folder.join("policy.toml"), lab.policy())?;
    Ok(folder)
}

fn mount(words: &[&str]) -> Result<()> {
    let done = Command::new("mount").args(words).status().context("start mount")?;
    ensure!(done.success(), "mount {words:?}: {done}");
    Ok(())
}

/// Where it was, and where it is now.
fn hide_module(name: &str) -> Result<(PathBuf, PathBuf)> {
    let all = PathBuf::from("/lib/modules").join(crate::release()?);
    let there = all.join("kernel/net/netfilter").join(name);
    let hidden = PathBuf::from("/root").join(name);
    fs::rename(&there, &hidden).with_context(|| format!("take {} away", there.display()))?;
    Ok((there, hidden))
}
