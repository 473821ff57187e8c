//! Kernels and systems that lack something: the product says what, does the rest, and never says "fine".

use std::collections::BTreeSet;
use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use lab::{Answer, Lab, SPOKE_MESH, SPOKE_MESH_V6, SPOKE_PUBLIC};

use crate::{LONG, SOON, Steps, blind, codes, found, patiently, run_to_end};

/// `quick` ends with the first of them.
pub fn run(steps: &mut Steps, quick: bool) -> Result<()> {
    // First: a module that is in use can't be taken away.
    let hidden = steps.make("a kernel without nf_tables", NfTables::hide)?;
    without_nf_tables(steps, "nf_tables")?;
    if quick {
        return Ok(());
    }
    hidden.put_back()?;
    without_nf_tables_any_more(steps)?;
    steps.step("a kernel without BTF, where nobody mounted cgroup2", || {
        run_to_end(Command::new("mount").args(["-t", "tmpfs", "tmpfs", "/sys/kernel/btf"]))?;
        run_to_end(Command::new("umount").arg("/sys/fs/cgroup"))?;
        ensure!(!Path::new("/sys/fs/cgroup/cgroup.procs").exists(), "cgroup2 is still there");
        ensure!(!Path::new("/sys/kernel/btf/vmlinux").exists(), "BTF is still there");
        crate::release()
    })?;
    without_btf_and_cgroup2(steps)?;
    without_any_cgroup2(steps)?;
    let hidden = steps.make("and without nf_tables as well", || {
        // The kernel takes a namespace apart some time after its end, and its tables with it.
        patiently("nobody uses nf_tables any more", || unload("nf_tables").ok())?;
        NfTables::hide()
    })?;
    without_nf_tables(steps, "nf_tables, BTF and cgroup2")?;
    hidden.put_back()
}

/// `lacks` is for the eyes.
fn without_nf_tables(steps: &mut Steps, lacks: &str) -> Result<()> {
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
    steps.step(&format!("without {lacks} check says so, looks at the rest, and exits with 2"), || {
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
    let _database = lab.spoke.listen("postgres", &["tcp/0.0.0.0:5432"])?;
    let daemon = steps.make("the daemon starts", || {
        let daemon = lab.spoke.daemon_on_trial(&[], &folder, &[])?;
        Ok((daemon, String::new()))
    })?;
    let status = || lab.spoke.spokeguard(&daemon.arguments(&["status", "--format", "json"]));
    steps.step("it repairs what it can, and never says ok", || {
        patiently("the keepalive is 25 s again", || {
            let shown = lab.spoke.ok(&["wg", "show", "wg0", "persistent-keepalive"]).ok()?;
            shown.trim_end().ends_with("\t25").then_some(())
        })
        .with_context(|| daemon.running.log())?;
        let outcome = status()?;
        let report = outcome.json()?;
        ensure!(
            outcome.code == Some(2) && report["verdict"] == "unknown",
            "exit code {:?}: {report:#}",
            outcome.code
        );
        let page = scrape(&lab)?;
        ensure!(page.contains("spokeguard_blind{facet=\"nftables\"} 1"), "{page}");
        Ok(format!("keepalive set; blind{{nftables}} 1, {}", tells(&page, &[("firewall", 0)])?))
    })?;
    // Rules that can't be tried can't be confirmed, and the two guards refuse only what is confirmed.
    steps.step("the other layers refuse nothing, and are not said to", || {
        let answer = lab.internet.connect(SocketAddr::new(SPOKE_PUBLIC, 5432), SOON);
        ensure!(answer == Answer::Open, "5432: {answer:?}");
        let _bound = lab.spoke.listen("redis", &["tcp/0.0.0.0:6379"]).context("a bind of every address")?;
        let confirm = lab.spoke.spokeguard(&daemon.arguments(&["confirm"]))?;
        ensure!(confirm.stdout.starts_with("nothing waits for a confirmation"), "{}", confirm.all());
        let report = status()?.json()?;
        ensure!(report["daemon"]["guard"] == "off", "the tc guard: {}", report["daemon"]["guard"]);
        let told = tells(&scrape(&lab)?, &[("guard", 0), ("binds", 0)])?;
        Ok(format!("5432 answers, 0.0.0.0:6379 can be bound; {told}"))
    })
}

/// What was confirmed while there were rules outlives them.
fn without_nf_tables_any_more(steps: &mut Steps) -> Result<()> {
    let lab = Lab::new();
    let _web = lab.spoke.web()?;
    let _database = lab.spoke.listen("postgres", &["tcp/0.0.0.0:5432"])?;
    let folder = folder(&lab)?;
    let hidden = steps.make("rules are confirmed, and then the kernel loses nf_tables", || {
        lab.spoke.daemon_in(&folder, &[])?.kill_9()?;
        lab.spoke.nft("flush ruleset")?;
        unload("nf_tables")?;
        NfTables::hide()
    })?;
    let others_hold = || {
        for (port, wanted) in [(80, Answer::Open), (5432, Answer::Silent)] {
            let answer = lab.internet.connect(SocketAddr::new(SPOKE_PUBLIC, port), SOON);
            ensure!(answer == wanted, "{port}: {answer:?}");
        }
        bind_is_refused(&lab)
    };
    steps.step("the other layers hold with no daemon alive", || {
        others_hold()?;
        Ok("5432 does not answer, and 0.0.0.0:6379 can't be bound".to_owned())
    })?;
    let daemon = steps.make("a daemon starts", || {
        let daemon = lab.spoke.daemon_on_trial(&[], &folder, &[])?;
        Ok((daemon, String::new()))
    })?;
    steps.step("it keeps them, and says what it can prove of them", || {
        // What the tc guard lets through is stopped by a program of the kernel's own since 6.4, and by a table before.
        let proven = u8::from(is_at_least(6, 4)?);
        let told = patiently("each control is told as it is", || {
            tells(&scrape(&lab).ok()?, &[("firewall", 0), ("guard", proven), ("binds", 1)]).ok()
        })
        .with_context(|| daemon.running.log())?;
        others_hold()?;
        let outcome = lab.spoke.spokeguard(&daemon.arguments(&["status"]))?;
        ensure!(outcome.code == Some(2), "exit code {:?}: {}", outcome.code, outcome.all());
        ensure!(outcome.stdout.contains("Second layer (tc guard): on eth0"), "{}", outcome.all());
        let unproven = outcome.stdout.contains("control-unproven  control guard");
        ensure!(unproven == (proven == 0), "{}", outcome.all());
        Ok(format!("exit 2, {told}"))
    })?;
    drop(daemon);
    hidden.put_back()
}

fn without_btf_and_cgroup2(steps: &mut Steps) -> Result<()> {
    let lab = Lab::new();
    ensure!(lab.spoke.cgroup.is_none(), "the lab found a control group");
    let _web = lab.spoke.web()?;
    let _sshd = sshd(&lab)?;
    let daemon =
        steps.make("the daemon starts", || Ok((lab.spoke.daemon_in(&folder(&lab)?, &[])?, String::new())))?;
    // Without types a table of nft's stops the probes, as on every kernel before 6.4: the same sight.
    steps.step("check proves it from outside, and misses nothing: exit 0", || {
        let words = daemon.arguments(&["check", "--format", "json"]);
        let program = lab::spokeguard()?.display().to_string();
        let outcome = lab.spoke.run_within(LONG, &[&[program], &*words].concat())?;
        let report = outcome.json()?;
        ensure!(outcome.code == Some(0), "exit code {:?}: {report:#}", outcome.code);
        ensure!(blind(&report).is_empty() && codes(&report).is_empty(), "{report:#}");
        Ok(String::new())
    })?;
    steps.step("and the daemon says by what it does without them", || {
        let types = if is_at_least(6, 4)? { "no BTF" } else { "no netfilter programs before Linux 6.4" };
        let log = daemon.running.log();
        for said in [types, "cgroup2 is mounted nowhere"] {
            ensure!(log.contains(said), "it does not say {said}: {log}");
        }
        Ok(types.to_owned())
    })?;
    steps.step("binds are refused, strangers are, and what is counted is counted", || {
        bind_is_refused(&lab)?;
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
            let page = scrape(&lab).ok()?;
            page.lines().any(|line| line.starts_with(counted) && !line.ends_with(" 0")).then_some(())
        })?;
        Ok("neither is needed".to_owned())
    })?;
    steps.step("the audit says of every port what nmap says", || {
        Ok(format!("{} ports", crate::spoke::audited_beside_nmap(&lab, &daemon)?))
    })
}

/// The guard needs the hierarchy and not its mount point; but to get at it without one takes the right to mount.
fn without_any_cgroup2(steps: &mut Steps) -> Result<()> {
    let lab = Lab::new();
    let _web = lab.spoke.web()?;
    let _sshd = sshd(&lab)?;
    let daemon = steps.make("the daemon starts where nobody may mount cgroup2", || {
        let wrapper = ["setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin"];
        Ok((lab.spoke.daemon_under(&wrapper, &folder(&lab)?, &[])?, String::new()))
    })?;
    // Behind it the firewall holds: what `explain control-unproven` calls a difference, and no blindness.
    steps.step("it says that binds are not guarded and why, does the rest, and exits with 1", || {
        let told = patiently("each control is told as it is", || {
            tells(&scrape(&lab).ok()?, &[("firewall", 1), ("guard", 1), ("counters", 1), ("binds", 0)]).ok()
        })
        .with_context(|| daemon.running.log())?;
        let outcome = lab.spoke.spokeguard(&daemon.arguments(&["status", "--format", "json"]))?;
        let report = outcome.json()?;
        ensure!(outcome.code == Some(1), "exit code {:?}: {report:#}", outcome.code);
        ensure!(codes(&report) == BTreeSet::from(["control-unproven".to_owned()]), "{report:#}");
        let why = found(&report, "control-unproven").unwrap_or_default();
        ensure!(why.contains("the bind guard does not run") && why.contains("control group"), "{why}");
        let _bound = lab.spoke.listen("redis", &["tcp/0.0.0.0:6379"]).context("a bind of every address")?;
        for (port, wanted) in [(80, Answer::Open), (22, Answer::Silent), (6379, Answer::Silent)] {
            let answer = lab.internet.connect(SocketAddr::new(SPOKE_PUBLIC, port), SOON);
            ensure!(answer == wanted, "{port}: {answer:?}");
        }
        Ok(format!("{told}; {why}"))
    })
}

/// As the policy wants it.
fn sshd(lab: &Lab) -> Result<lab::Sshd> {
    let listen = [SPOKE_MESH, SPOKE_MESH_V6].map(|address| address.to_string());
    lab.spoke.sshd(22, &listen.each_ref().map(String::as_str), "KbdInteractiveAuthentication no")
}

/// Whether each control is told as enforced (1) or not (0).
fn tells(page: &str, controls: &[(&str, u8)]) -> Result<String> {
    for (control, value) in controls {
        let line = format!("spokeguard_control_enforced{{control=\"{control}\"}} {value}");
        ensure!(page.lines().any(|told| told == line), "no {line} in\n{page}");
    }
    Ok(format!("control_enforced {controls:?}"))
}

fn scrape(lab: &Lab) -> Result<String> {
    Ok(lab.hub.http_get(SocketAddr::new(SPOKE_MESH, 9984), "/metrics", &[])?.body)
}

fn folder(lab: &Lab) -> Result<PathBuf> {
    let folder = lab.dir.join("guard");
    fs::create_dir_all(&folder)?;
    fs::write(folder.join("policy.toml"), lab.policy())?;
    Ok(folder)
}

fn bind_is_refused(lab: &Lab) -> Result<()> {
    let refused = lab.spoke.listen("redis", &["tcp/0.0.0.0:6379"]).err().map(|error| format!("{error:#}"));
    let refused = refused.context("the bind was not refused")?;
    ensure!(refused.contains("Operation not permitted"), "{refused}");
    Ok(())
}

/// The module's file: where it was, and where it is now.
struct NfTables {
    there: PathBuf,
    hidden: PathBuf,
}

impl NfTables {
    /// With what nft says of it.
    fn hide() -> Result<(Self, String)> {
        let all = PathBuf::from("/lib/modules").join(crate::release()?);
        let there = all.join("kernel/net/netfilter/nf_tables.ko");
        let hidden = PathBuf::from("/root/nf_tables.ko");
        fs::rename(&there, &hidden).with_context(|| format!("take {} away", there.display()))?;
        let tried = Command::new("nft").args(["list", "ruleset"]).output().context("start nft")?;
        ensure!(!tried.status.success(), "nft works all the same");
        let said = String::from_utf8_lossy(&tried.stderr).lines().next().unwrap_or_default().to_owned();
        Ok((Self { there, hidden }, said))
    }

    fn put_back(self) -> Result<()> {
        let Self { there, hidden } = self;
        fs::rename(&hidden, &there).with_context(|| format!("put {} back", there.display()))
    }
}

pub fn is_at_least(major: u32, minor: u32) -> Result<bool> {
    let release = crate::release()?;
    let mut numbers = release.split(['.', '-']).map(str::parse::<u32>);
    let (Some(Ok(this)), Some(Ok(part))) = (numbers.next(), numbers.next()) else {
        bail!("{release} is no kernel's number")
    };
    Ok((this, part) >= (major, minor))
}

/// Takes a module out of the kernel, after those that use it.
fn unload(name: &str) -> Result<()> {
    let modules = fs::read_to_string("/proc/modules").context("read the modules")?;
    let mut lines = modules.lines().map(|line| line.split(' ').collect::<Vec<_>>());
    let Some(line) = lines.find(|line| line[0] == name) else { return Ok(()) };
    for user in line[3].split(',').filter(|user| !matches!(*user, "" | "-")) {
        unload(user)?;
    }
    run_to_end(Command::new("rmmod").arg(name))
}
