//! The operator's way in: sshd answers on the mesh address, and asks for keys.
//! Where else it listens is judged with the other listeners.

use std::net::{IpAddr, SocketAddr};

use super::sight::Sight;
use super::{Assessment, Code, Finding, Severity, listed};
use crate::observed::{Listener, Snapshot};
use crate::policy::{Bind, MeshKind};
use crate::terms::Proto;

pub(super) fn compare(sight: &Sight, snapshot: &Snapshot, out: &mut Assessment) {
    if let Some(listeners) = snapshot.listeners.seen() {
        unreachable(sight, listeners, out);
    }
    if let Some(Some(sshd)) = snapshot.sshd.seen() {
        let ways = [
            (sshd.password_authentication, "PasswordAuthentication yes"),
            (sshd.keyboard_interactive, "KbdInteractiveAuthentication yes"),
        ];
        let on: Vec<&str> = ways.into_iter().filter_map(|(on, text)| on.then_some(text)).collect();
        if !on.is_empty() {
            out.add(Finding::new(
                Code::SshPassword,
                Severity::Medium,
                "sshd",
                "keys only",
                listed(&on, 2),
                "Set PasswordAuthentication and KbdInteractiveAuthentication to no in sshd_config and \
                 reload sshd.",
            ));
        }
    }
}

fn unreachable(sight: &Sight, listeners: &[Listener], out: &mut Assessment) {
    let policy = sight.policy;
    let port = policy.ssh.port;
    let mesh_index = sight.link(&policy.mesh.interface).map(|l| l.index);
    let addresses: Vec<IpAddr> = match &policy.ssh.bind {
        Bind::Mesh => sight.mesh_addresses(),
        Bind::Addresses(list) => list.clone(),
    };
    for address in addresses.iter().copied().filter(|a| !a.is_loopback()) {
        let on_port = || listeners.iter().filter(|l| l.proto == Proto::Tcp && l.port == port);
        let answers = on_port().any(|l| {
            // A socket held to another device does not hear the mesh.
            let hears = l.device.is_none() || l.device == mesh_index || policy.ssh.bind != Bind::Mesh;
            hears && l.answers(address)
        });
        if answers {
            continue;
        }
        let elsewhere: Vec<String> = on_port().map(super::listeners::subject).collect();
        let found = match elsewhere.as_slice() {
            [] => format!("nothing listens on tcp/{port}"),
            some => format!("nothing listens there, only on {}", listed(some, 3)),
        };
        let next = match policy.mesh.kind {
            MeshKind::Wireguard => {
                "Start sshd once the tunnel has its address (or with FreeBind in ssh.socket), and check \
                 it from the hub."
            }
            MeshKind::Tailscale => {
                "Start sshd once tailscaled has its address; Tailscale SSH answers inside tailscaled and \
                 can't be seen here."
            }
        };
        out.add(Finding::new(
            Code::SshUnreachable,
            Severity::High,
            format!("tcp/{}", SocketAddr::new(address, port.get())),
            "sshd answers here",
            found,
            next,
        ));
    }
}

#[cfg(test)]
mod tests {
    use expect_test::expect;

    use crate::diff::stage::Stage;
    use crate::observed::Reading;

    #[test]
    fn a_mesh_address_without_sshd_is_reported_for_each_family() {
        let mut stage = Stage::spoke().listens("tcp 127.0.0.1:22 sshd");
        stage.listeners().retain(|l| l.port.get() != 22 || l.is_loopback());
        expect![[r#"
            high ssh-unreachable tcp/10.84.0.16:22
                wanted sshd answers here
                found nothing listens there, only on tcp/127.0.0.1:22
            high ssh-unreachable tcp/[fd84::16]:22
                wanted sshd answers here
                found nothing listens there, only on tcp/127.0.0.1:22
        "#]]
        .assert_eq(&stage.show());
        let mut stage = Stage::spoke();
        stage.listeners().retain(|l| l.port.get() != 22 || l.address.is_ipv4());
        assert_eq!(stage.codes(), ["high ssh-unreachable tcp/[fd84::16]:22"]);
    }

    #[test]
    fn a_wildcard_answers_unless_it_is_held_to_another_device() {
        let with = |text: &str| {
            let mut stage = Stage::spoke();
            stage.listeners().retain(|l| l.port.get() != 22);
            stage.listens(text).codes().iter().filter(|line| line.contains("ssh-unreachable")).count()
        };
        assert_eq!(with("tcp [::]:22 sshd"), 0);
        assert_eq!(with("tcp [::]:22 sshd v6only"), 1);
        assert_eq!(with("tcp [::]:22 sshd dev=3"), 0);
        assert_eq!(with("tcp [::]:22 sshd dev=2"), 2);
    }

    #[test]
    fn passwords_are_reported_and_no_sshd_is_no_password() {
        let mut stage = Stage::spoke();
        if let Reading::Seen(Some(sshd)) = &mut stage.snapshot.sshd {
            sshd.keyboard_interactive = true;
        }
        expect![[r#"
            medium ssh-password sshd
                wanted keys only
                found KbdInteractiveAuthentication yes
        "#]]
        .assert_eq(&stage.show());
        let mut stage = Stage::spoke();
        stage.snapshot.sshd = Reading::Seen(None);
        assert_eq!(stage.codes(), [""; 0]);
    }
}
