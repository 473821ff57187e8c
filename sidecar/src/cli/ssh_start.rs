//! sshd's next start: refused by the policy that is on trial, or too early without our drop-ins; and what to do about it.

use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use sidecar_ebpf::bind::Judgement;

use super::install::properties;
use crate::desired::Desired;
use crate::desired::binds::BindRules;
use crate::observed::{Link, Listener, Sshd};
use crate::policy::{Bind, Mode};
use crate::source::bpf::bind::surroundings;
use crate::source::owners::Owners;
use crate::source::{links, listeners, sshd};
use crate::terms::{Port, Proto};

const SERVICES: [&str; 2] = ["ssh.service", "sshd.service"];
const SOCKETS: [&str; 2] = ["ssh.socket", "sshd.socket"];
const PORT: u16 = 22;
const OWN: &str = "/run/sshd";

/// Who has sshd listen.
#[derive(Clone, Copy, PartialEq, Eq)]
enum By {
    Service,
    Socket,
}

/// What the bind guard makes of whoever begins to listen there; `Allow` where the policy wants none, or nobody can tell.
pub fn judged(desired: &Desired, links: &[Link], proto: Proto, at: SocketAddr, dual: bool) -> Judgement {
    let policy = &desired.policy;
    let mesh = links.iter().filter(|link| link.name == policy.mesh.interface);
    let found = mesh.flat_map(|link| &link.addresses).map(IpNet::addr).filter(|at| desired.in_mesh(*at));
    match surroundings(policy, Some(links)) {
        Ok(around) if policy.enforce.binds && policy.enforce.mode == Mode::Enforce => {
            BindRules::new(desired, &found.collect::<Vec<_>>()).judge_any(&around, proto, at, dual)
        }
        _ => Judgement::Allow,
    }
}

/// For whoever confirms a policy, or is about to: a trial is over before sshd has to start again, and doesn't tell.
pub fn refused(desired: &Desired) -> Option<String> {
    let policy = &desired.policy;
    let (links, all) = (links::read().ok()?, listeners::read(&mut Owners::new()).ok()?);
    let is_refused = |one: &&Listener| {
        let at = SocketAddr::new(one.address, one.port.get());
        judged(desired, &links, one.proto, at, !one.v6only) == Judgement::Refuse
    };
    let mut ssh = all.iter().filter(|one| one.proto == Proto::Tcp && one.port == policy.ssh.port);
    let at = ssh.find(is_refused).map(|one| SocketAddr::new(one.address, one.port.get()))?;
    let to = match (&policy.ssh.bind, policy.mesh.address.first()) {
        (Bind::Addresses(list), _) => list.first(),
        (Bind::Mesh, mesh) => mesh,
    };
    let to = to.map_or_else(|| "of the mesh".to_owned(), IpAddr::to_string);
    // Which found no address of the mesh to move it to.
    let moved = match policy.ssh.rebind {
        true => "",
        false => ", or write `rebind = true` under [ssh], which moves it there",
    };
    Some(format!(
        "ATTENTION: sshd listens on {at}. Under a confirmed policy the kernel refuses\n\
         sshd's next start there, and nobody gets in by ssh; no trial shows that. Have it\n\
         listen on the address {to} before (ListenAddress; with ssh.socket\n\
         ListenStream){moved}"
    ))
}

/// For whoever has just lost the drop-ins: `None` where nothing is lost by that, or sshd can't be asked.
pub fn advice() -> Option<String> {
    let states = properties("ActiveState", &SOCKETS);
    if let Some((unit, _)) = SOCKETS.into_iter().zip(states).find(|(_, state)| state == "active") {
        if property("FreeBind", unit) == "yes" {
            return None;
        }
        let shown = properties("Listen", &[unit]);
        let listen = shown.iter().filter_map(|line| line.strip_suffix(" (Stream)")?.parse().ok());
        return told(By::Socket, unit, true, &listen.collect::<Vec<_>>());
    }
    let all = listeners::read(&mut Owners::new()).ok()?;
    let mut units = all.iter().filter_map(|one| one.owner.as_ref()?.unit.as_deref());
    let (unit, sshd) = match units.find(|unit| SERVICES.contains(unit)) {
        Some(unit) => (unit, sshd::read(&all, Port::new(PORT)?)),
        // It has no address to listen on just now.
        None => {
            let states = properties("ActiveState", &SERVICES);
            let (unit, _) = SERVICES.into_iter().zip(states).find(|(_, state)| state != "inactive")?;
            (unit, installed())
        }
    };
    let [restart, never, pause] =
        ["Restart", "RestartPreventExitStatus", "RestartUSec"].map(|name| property(name, unit));
    // Debian's own is started again, but not where an address is missing (255).
    if ["always", "on-failure"].contains(&&*restart) && never.is_empty() && !pause.ends_with("ms") {
        return None;
    }
    told(By::Service, unit, property("ActiveState", unit) == "active", &sshd.ok()??.listen)
}

/// Of an sshd that has not come up. It says nothing without a folder of its own, which its unit takes away as it ends.
fn installed() -> anyhow::Result<Option<Sshd>> {
    let ask = || {
        // Left there: the unit may begin again at any time, and wants it then.
        let _ = std::fs::create_dir(OWN);
        sshd::read_installed()
    };
    // A unit that tries still ends once more just now, and without our drop-ins once after that.
    ask().or_else(|_| ask()).or_else(|_| ask())
}

fn property(name: &str, unit: &str) -> String {
    properties(name, &[unit]).pop().unwrap_or_default()
}

fn told(by: By, unit: &str, is_up: bool, listen: &[SocketAddr]) -> Option<String> {
    let late: Vec<String> = (listen.iter())
        .filter(|at| !at.ip().is_unspecified() && !at.ip().to_canonical().is_loopback())
        .map(SocketAddr::to_string)
        .collect();
    // One address that isn't there fails the whole of a socket; sshd is content with any one that is.
    if late.is_empty() || (by == By::Service && late.len() < listen.len()) {
        return None;
    }
    let settings = match by {
        By::Service => {
            "  [Unit]\n  StartLimitIntervalSec=0\n  [Service]\n  Restart=always\n  RestartSec=2\n  RestartPreventExitStatus="
        }
        By::Socket => "  [Socket]\n  FreeBind=yes",
    };
    let now = match is_up {
        true => String::new(),
        false => {
            format!("\nIt waits for it now, and isn't tried again: `systemctl restart {unit}`.")
        }
    };
    Some(format!(
        "ATTENTION: {unit} listens on\n  {}\n\
         and what had it wait for such an address went with spokeguard. If that comes\n\
         later at the next boot, as a tunnel's may, nobody gets in by ssh. Keep the way in\n\
         before you boot: run `systemctl edit {unit}`, and write\n{settings}{now}",
        late.join(" ")
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn says(by: By, listen: &[&str]) -> Option<String> {
        told(
            by,
            "ssh.service",
            by == By::Socket,
            &listen.iter().map(|at| at.parse().unwrap()).collect::<Vec<_>>(),
        )
    }

    #[test]
    fn only_who_waits_for_an_address_is_told() {
        for by in [By::Service, By::Socket] {
            for nothing in
                [&[][..], &["0.0.0.0:22", "[::]:22"], &["127.0.0.1:22", "[::1]:22", "[::ffff:127.0.0.1]:22"]]
            {
                assert_eq!(says(by, nothing), None, "{nothing:?}");
            }
            let text = says(by, &["10.84.0.16:22", "[fd84::16]:22"]).unwrap();
            assert!(text.contains("\n  10.84.0.16:22 [fd84::16]:22\n"), "{text}");
        }
        for mixed in [["0.0.0.0:22", "10.84.0.16:2222"], ["127.0.0.1:22", "10.84.0.16:22"]] {
            assert_eq!(says(By::Service, &mixed), None, "{mixed:?}: sshd starts, and isn't started again");
            assert!(says(By::Socket, &mixed).unwrap().contains("\n  10.84.0.16:"), "{mixed:?}");
        }
    }

    /// What we advise is what our own drop-ins do, and the package's removal says the same.
    #[test]
    fn the_advice_is_our_own_drop_in() {
        let package = include_str!("../../../contrib/debian/postrm");
        for (by, drop_in) in [
            (By::Service, include_str!("../../../contrib/systemd/ssh.service.d/spokeguard.conf")),
            (By::Socket, include_str!("../../../contrib/systemd/ssh.socket.d/spokeguard.conf")),
        ] {
            let text = says(by, &["10.84.0.16:22"]).unwrap();
            assert!(text.lines().all(|line| line.len() < 84), "{text}");
            let settings: Vec<&str> =
                text.lines().filter_map(|line| line.strip_prefix("  ")).skip(1).collect();
            let ours = drop_in.lines().filter(|line| !line.starts_with('#') && !line.is_empty());
            // Units of ours that are gone.
            assert_eq!(settings, ours.filter(|line| !line.starts_with("After=")).collect::<Vec<_>>());
            for line in text.lines() {
                let line = line.replace("ssh.service", "$unit").replace("10.84.0.16:22", "$(echo $late)");
                let line = line.replace('`', "\\`");
                assert!(package.contains(&format!("echo \"{line}\"\n")), "{line}");
            }
        }
    }
}
