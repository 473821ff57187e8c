//! Whoever else writes rules: published container ports, a firewall that is deleted and made anew at each rebuild, one
//! that flushes everything first, and one that restores by iptables. Nothing that the policy refuses is open meanwhile.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use anyhow::{Context, Result, ensure};
use lab::{Answer, CONTAINER, Lab, Mesh, SPOKE_MESH, SPOKE_PUBLIC, SPOKE_PUBLIC_V6, Shape, meanwhile};

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
    let _app = inside.listen("admin-panel", &["tcp/[::]:8000", "udp/[::]:5353"])?;
    let publish = || {
        lab.publish(8080, 8000)?;
        lab.publish_udp(5353, 5353)
    };
    let answers_udp = |address| -> Result<bool> {
        Ok(lab.internet.ask_udp(SocketAddr::new(address, 5353), SOON)?.is_some())
    };
    steps.step("without us a container's published ports are a stranger's", || {
        publish()?;
        for address in [SPOKE_PUBLIC, SPOKE_PUBLIC_V6] {
            let answer = lab.internet.connect(SocketAddr::new(address, 8080), SOON);
            ensure!(answer == Answer::Open, "{address}: tcp 8080 is not open: {answer:?}");
            ensure!(answers_udp(address)?, "{address}: udp 5353 does not answer");
        }
        lab.spoke.nft("delete table ip docker_like\ndelete table ip6 docker_like")?;
        Ok("tcp 8080 and udp 5353, by IPv4 and IPv6".to_owned())
    })?;
    let policy = lab.policy() + "[[local]]\nname = \"containers\"\ninterfaces = [\"docker0\"]\n";
    let daemon = steps.make("the daemon starts", || {
        let daemon = lab.spoke.daemon(&policy)?;
        Ok((daemon, String::new()))
    })?;
    // Without what its counters say.
    let ours = || lab.spoke.ok(&["nft", "--stateless", "list", "table", "inet", "spokeguard"]);
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
    let turn = AtomicUsize::new(0);
    let knock = || -> Result<u32> {
        let ports = [22, 5432, 8080];
        let address = [SPOKE_PUBLIC, SPOKE_PUBLIC_V6][turn.fetch_add(1, Ordering::Relaxed) % 2];
        for port in ports {
            let answer = lab.internet.connect(SocketAddr::new(address, port), SOON / 4);
            ensure!(answer == Answer::Silent, "a stranger asks {address} {port}: {answer:?}");
        }
        Ok(ports.len() as u32)
    };
    // A knock at what is not published proves nothing.
    let container_is_shut = || {
        for family in ["ip", "ip6"] {
            let published = lab.spoke.ok(&["nft", "list", "table", family, "docker_like"])?;
            ensure!(
                published.contains("tcp dport 8080") && published.contains("udp dport 5353"),
                "{published}"
            );
        }
        let direct = lab.spoke.connect(SocketAddr::new(CONTAINER, 8000), SOON);
        ensure!(direct == Answer::Open, "the container does not listen: {direct:?}");
        knock()?;
        for address in [SPOKE_PUBLIC, SPOKE_PUBLIC_V6] {
            ensure!(!answers_udp(address)?, "{address}: udp 5353 answers a stranger");
        }
        Ok(())
    };
    // While somebody else works, a stranger asks for what nobody may have.
    let knocked_at = |work: &dyn Fn() -> Result<()>| -> Result<u32> {
        let stranger = |stop: &AtomicBool| -> Result<u32> {
            let mut knocks = 0;
            while !stop.load(Ordering::Relaxed) {
                knocks += knock()?;
            }
            Ok(knocks)
        };
        let (done, knocks) = meanwhile(stranger, work);
        let knocks = knocks?;
        ensure!(knocks > 0, "nobody knocked");
        done.map(|()| knocks)
    };

    steps.step("a container's ports that are published after our rules stay shut", || {
        let before = ours()?;
        let knocks = knocked_at(&|| {
            publish()?;
            container_is_shut()
        })?;
        only_the_web()?;
        ensure!(ours()? == before, "our table has changed");
        Ok(format!("{knocks} knocks, of which some right at that moment"))
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
    steps.step("one that flushes everything, ours and the containers' with it, 10 times", || {
        let knocks = knocked_at(&|| {
            for _ in 0..10 {
                lab.spoke.nft(
                    "flush ruleset
                     table inet nixos-fw {
                       chain input { type filter hook input priority filter; policy accept; }
                     }",
                )?;
                publish()?;
                knock()?;
                // The second layer is for TCP: until the table is back, datagrams are nobody's to refuse.
                patiently("our table is there again", || ours().ok())?;
                container_is_shut()?;
            }
            Ok(())
        })?;
        only_the_web()?;
        Ok(format!("{knocks} knocks; each was repaired, and each time the containers were published again"))
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
    steps.step("and whoever looks finds what is published, and that our table holds it", || {
        let check = daemon.arguments(&["check", "--no-probe", "--format", "json"]);
        let check = lab
            .spoke
            .run_within(crate::LONG, &[&[lab::spokeguard()?.display().to_string()], &*check].concat())?;
        let report = check.json()?;
        ensure!(check.code == Some(1), "exit {:?}: {report:#}", check.code);
        let codes = crate::codes(&report);
        ensure!(!codes.contains("listener-exposed"), "{report:#}");
        ensure!(!codes.iter().any(|code| code.starts_with("firewall-")), "{report:#}");
        let findings = report["findings"].as_array().context("no findings")?;
        let published = findings.iter().filter(|finding| finding["code"] == "dnat-exposed");
        let mut subjects = Vec::new();
        for finding in published {
            let held = finding["found"]
                .as_str()
                .is_some_and(|found| found.contains("held by table inet spokeguard"));
            ensure!(held && finding["severity"] == "low", "{finding:#}");
            subjects.push(finding["subject"].as_str().unwrap_or_default());
        }
        for port in ["tcp/8080 ", "udp/5353 "] {
            ensure!(subjects.iter().any(|subject| subject.starts_with(port)), "no {port}among {subjects:?}");
        }
        Ok(format!("exit 1; {}", subjects.join(", ")))
    })
}
