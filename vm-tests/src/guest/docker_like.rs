//! Whoever else writes rules: published container ports, a firewall that is deleted and made anew at each rebuild, one
//! that flushes everything first, and one that restores by iptables. Nothing that the policy refuses is open meanwhile.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use anyhow::{Context, Result, ensure};
use lab::{Answer, CONTAINER, Lab, Mesh, SPOKE_MESH, SPOKE_PUBLIC, SPOKE_PUBLIC_V6, Shape};

use crate::{SOON, Steps, patiently};

const PORTS: &str = "22,80,443,5432,8080-8082";

pub fn run(steps: &mut Steps) -> Result<()> {
    let lab = steps.make("a lab with a container behind a bridge", || {
        Ok((Lab::build(Shape { mesh: Mesh::WireGuard, container: true })?, crate::release()?))
    })?;
    let sshd = lab.spoke.sshd(22, &[&SPOKE_MESH.to_string()], "")?;
    let _database = lab.spoke.listen("postgres", &["tcp/[::]:5432"])?;
    let _web = lab.spoke.web()?;
    let inside = lab.container.as_ref().context("the lab has a container")?;
    let _app = inside.listen("admin-panel", &["tcp/[::]:8000"])?;
    let policy = lab.policy() + "[[local]]\nname = \"containers\"\ninterfaces = [\"docker0\"]\n";
    let daemon = steps.make("the daemon starts", || {
        let daemon = lab.spoke.daemon(&policy)?;
        Ok((daemon, String::new()))
    })?;
    let ours = || lab.spoke.ok(&["nft", "list", "table", "inet", "spokeguard"]);
    let only_the_web = || {
        for address in [SPOKE_PUBLIC, SPOKE_PUBLIC_V6] {
            let open = lab.internet.nmap_open(address, PORTS)?;
            ensure!(open == BTreeSet::from([80, 443]), "{address}: {open:?}");
        }
        let login = sshd.login(&lab.hub, SPOKE_MESH, "echo in")?;
        ensure!(login.stdout.trim() == "in", "{}", login.all());
        Ok(())
    };
    let has_events = |kind: &str| -> Result<usize> {
        let log = std::fs::read_to_string(daemon.state_dir.join("events.jsonl")).unwrap_or_default();
        Ok(log.lines().filter(|line| line.contains(&format!("\"kind\":\"{kind}\""))).count())
    };
    // While somebody else works, a stranger asks for what nobody may have.
    let knocked_at = |work: &dyn Fn() -> Result<()>| -> Result<u32> {
        let (stop, knocks) = (AtomicBool::new(false), AtomicU32::new(0));
        std::thread::scope(|scope| {
            let stranger = scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    for port in [22, 5432, 8080] {
                        let answer = lab.internet.connect(SocketAddr::new(SPOKE_PUBLIC, port), SOON / 4);
                        ensure!(answer == Answer::Silent, "a stranger asks {port}: {answer:?}");
                        knocks.fetch_add(1, Ordering::Relaxed);
                    }
                }
                Ok(())
            });
            let done = work();
            stop.store(true, Ordering::Relaxed);
            stranger.join().expect("the stranger panicked")?;
            let knocks = knocks.load(Ordering::Relaxed);
            ensure!(knocks > 0, "nobody knocked");
            done.map(|()| knocks)
        })
    };

    steps.step("a container's port that is published after our rules stays shut", || {
        let before = ours()?;
        lab.publish(8080, 8000)?;
        // What it is about: without us it would be open.
        let direct = lab.spoke.connect(SocketAddr::new(CONTAINER, 8000), SOON);
        ensure!(direct == Answer::Open, "the container does not listen: {direct:?}");
        only_the_web()?;
        ensure!(ours()? == before, "our table has changed");
        Ok("8080 to the container's 8000".to_owned())
    })?;
    steps.step("one that the policy names is open through the same means", || {
        lab.spoke.nft(&format!(
            "insert rule ip docker_like prerouting fib daddr type local tcp dport 443 dnat to {CONTAINER}:8000"
        ))?;
        let answer = lab.internet.connect(SocketAddr::new(SPOKE_PUBLIC, 443), SOON);
        ensure!(answer == Answer::Open, "443 of the container: {answer:?}");
        Ok("443 to the container's 8000".to_owned())
    })?;
    steps.step("the same by iptables, as dockerd writes it", || {
        lab.spoke.sh(&format!(
            "iptables -t nat -N DOCKER && iptables -t nat -A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER
             iptables -t nat -A DOCKER ! -i docker0 -p tcp --dport 8081 -j DNAT --to-destination {CONTAINER}:8000
             iptables -P FORWARD DROP
             iptables -A FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
             iptables -A FORWARD -d {CONTAINER}/32 ! -i docker0 -o docker0 -p tcp --dport 8000 -j ACCEPT"
        ))?;
        only_the_web()?;
        Ok("8081 to the container's 8000".to_owned())
    })?;
    steps.step("a firewall that is deleted and made anew 20 times, as NixOS does it", || {
        let (before, repairs) = (ours()?, has_events("repaired")?);
        let knocks = knocked_at(&|| {
            for _ in 0..20 {
                lab.spoke.nft(
                    "table inet nixos-fw
                     delete table inet nixos-fw
                     table inet nixos-fw {
                       chain input { type filter hook input priority filter; policy drop;
                         ct state established,related accept
                         iifname { lo, wg0 } accept
                         icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert } accept
                         tcp dport { 22, 80, 443, 5432 } accept
                         udp dport 51820 accept
                       }
                     }",
                )?;
            }
            only_the_web()
        })?;
        ensure!(ours()? == before, "our table has changed");
        let repaired = has_events("repaired")? - repairs;
        ensure!(repaired == 0, "{repaired} repairs of what was not ours");
        Ok(format!("{knocks} knocks, nothing repaired"))
    })?;
    steps.step("one that flushes everything first, ours with it, 10 times", || {
        let knocks = knocked_at(&|| {
            for _ in 0..10 {
                lab.spoke.nft(
                    "flush ruleset
                     table inet nixos-fw {
                       chain input { type filter hook input priority filter; policy accept; }
                     }",
                )?;
                patiently("our table is there again", || ours().ok())?;
            }
            Ok(())
        })?;
        // What it flushed of others is not ours to bring back.
        only_the_web()?;
        Ok(format!("{knocks} knocks; each was repaired"))
    })?;
    steps.step("one that restores all of its tables by iptables, 10 times", || {
        let knocks = knocked_at(&|| {
            for _ in 0..10 {
                lab.spoke.sh(
                    "printf '%s\\n' '*filter' ':INPUT ACCEPT [0:0]' ':FORWARD ACCEPT [0:0]' ':OUTPUT ACCEPT [0:0]' \
                       ':ufw-user-input - [0:0]' '-A INPUT -j ufw-user-input' \
                       '-A ufw-user-input -p tcp --dport 5432 -j ACCEPT' COMMIT | iptables-nft-restore",
                )?;
            }
            only_the_web()
        })?;
        Ok(format!("{knocks} knocks"))
    })?;
    steps.step("and whoever looks finds nothing that differs", || {
        let check = lab.spoke.run_within(
            crate::LONG,
            &[&[lab::spokeguard()?.display().to_string()], &*daemon.arguments(&["check", "--no-probe"])]
                .concat(),
        )?;
        // One that could not look finds nothing either.
        ensure!(matches!(check.code, Some(0 | 1)), "exit {:?}: {}", check.code, check.all());
        ensure!(!check.stdout.contains("firewall-"), "{}", check.all());
        ensure!(
            !check.stdout.contains("listener-exposed") && !check.stdout.contains("dnat-exposed"),
            "{}",
            check.all()
        );
        Ok(format!("exit {:?}", check.code))
    })
}
