//! Boots: the first packets of one, and a mesh that comes after it.

use std::collections::BTreeSet;
use std::io::Read as _;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::{CABLES, FEW, LONG, Machine, OPEN, Power, SHORT, SHUT, SSHD};
use crate::{Answer, Lab, SPOKE_MESH, SPOKE_PUBLIC, SPOKE_PUBLIC_V6, meanwhile, tunnel};

/// Who has sshd listen, and on an address that comes late.
pub const SSH_BY: [&str; 2] = ["ssh.service", "ssh.socket"];

/// The mesh's device, made anew: a real tunnel where this kernel has WireGuard, else a cable to the hub.
pub fn mesh_anew(lab: &Lab) {
    if is_tunnel() {
        lab.hub.sh("ip link del wg0 2>/dev/null || true").unwrap();
        // Of a link that was down; the tunnel goes this way.
        lab.spoke.sh("ip route replace default via 198.51.100.99").unwrap();
        assert!(tunnel::raise(lab).unwrap().is_empty(), "the kernel's own");
        return;
    }
    let made = format!("ip link add wg0 type veth peer name wg0 netns {}", lab.hub.net_path());
    lab.spoke.sh(&made).unwrap();
    lab.hub.sh("ip addr add 10.84.0.1/24 dev wg0; ip link set wg0 up").unwrap();
    lab.spoke.sh(&format!("ip addr add {SPOKE_MESH}/24 dev wg0; ip link set wg0 up")).unwrap();
}

/// Whether [`mesh_anew`] makes a WireGuard tunnel.
pub fn is_tunnel() -> bool {
    tunnel::kernel_has_it()
}

/// In a cloud: asks for an address of its own before everybody else, to read there what the machine is to be.
const CLOUD_INIT: &str = "cloud-init-local.service";

/// Asks for an address without having waited for network-pre.target. NixOS has it by default.
const DHCP: &str = "dhcpcd.service";

fn own_unit(name: &str) -> String {
    format!("etc/systemd/system/{name}")
}

/// Of sshd's settings.
pub(super) const ON_MESH_ALONE: &str = "etc/ssh/sshd_config.d/mesh.conf";

/// Of what flushes all rules at a boot.
pub(super) const LATE: &str = "etc/systemd/system/nftables.service.d/late.conf";

impl<'a> Machine<'a> {
    /// A container that runs, with our units installed and rules that the hub has confirmed.
    #[track_caller]
    pub fn confirmed(lab: &'a Lab) -> Self {
        let mut machine = Self::new(lab);
        machine.write("etc/spokeguard/policy.toml", &lab.plain_policy());
        machine.boot();
        let told = machine.ok(&["/opt/spokeguard", "install"]);
        assert!(told.contains("ATTENTION: sshd listens on 0.0.0.0:22. Under a confirmed"), "{told}");
        machine.hub_confirms();
        machine
    }
}

impl Machine<'_> {
    /// The daemon has begun, the hub comes and stays for a moment: that confirms.
    #[track_caller]
    pub fn hub_confirms(&self) {
        self.wait("the rules are on trial", |machine| machine.rules() == "on-trial");
        let ssh = SocketAddr::new(SPOKE_MESH, 22);
        let hub = self.lab.hub.inside(|| Ok(std::net::TcpStream::connect_timeout(&ssh, LONG)?)).unwrap();
        self.wait("confirmed", |machine| machine.rules() == "confirmed");
        drop(hub);
    }

    /// A boot of a host whose rules were confirmed: the sealed rules are there before the cables.
    #[track_caller]
    pub fn boots_shut(&mut self) {
        let heard = self.nobody_answers_while(|machine| {
            machine.boot();
            for address in [SPOKE_PUBLIC, SPOKE_PUBLIC_V6] {
                let web = SocketAddr::new(address, OPEN);
                machine.wait(&format!("{web} answers"), |machine| {
                    machine.lab.internet.connect(web, SHORT) == Answer::Open
                });
            }
            machine.wait("the hub gets in", Machine::hub_gets_in);
            machine.is_heard_open();
        });
        assert!(heard.open.iter().all(|answers| *answers > FEW), "{OPEN} has hardly answered: {heard:?}");
        assert_eq!(self.ok(&["systemctl", "is-active", "spokeguard-boot"]), "active\n");
        self.is_before("spokeguard-boot.service", CABLES);
        self.sealed_before_early_networks("spokeguard-boot.service");
        if self.path(LATE).exists() {
            let flushed = self.property("nftables.service", "ActiveState");
            assert_eq!(flushed, "active", "nobody flushed, so this proves nothing");
        }
    }

    /// From its next boot on Debian's service for nftables loads rules that flush all others, and takes its time.
    pub fn flushes_late(&self) {
        self.write("etc/nftables.conf", "flush ruleset\n");
        self.write_new(LATE, "[Service]\nExecStartPre=sleep 2\n");
        self.want("sysinit.target", "/lib/systemd/system/nftables.service");
    }

    /// That what `by` loads was in force when cloud-init or dhcpcd, where the host has them, raised a cable, and that
    /// systemd left out none.
    #[track_caller]
    pub fn sealed_before_early_networks(&self, by: &str) {
        let mut those =
            [CLOUD_INIT, DHCP].into_iter().filter(|unit| self.path(&own_unit(unit)).exists()).peekable();
        if those.peek().is_none() {
            return;
        }
        for early in those {
            assert_eq!(self.property(early, "ActiveState"), "active", "{early} raised no cable");
            self.is_before(by, early);
        }
        // systemd finds them before there is a journal, and what it has no kernel's log for it says on the console alone.
        let said = match &self.power {
            Power::Container(running, _) => running.log(),
            _ => self.ok(&["journalctl", "--no-pager", "-b"]),
        };
        assert!(said.contains("running in system mode"), "{said}");
        assert!(!said.contains("ordering cycle"), "{said}");
    }

    /// That one unit had done its work when the other began.
    #[track_caller]
    fn is_before(&self, first: &str, second: &str) {
        let stamp = |unit: &str, name: &str| self.property(unit, name).parse::<u64>().unwrap();
        let done_us = stamp(first, "ActiveEnterTimestampMonotonic");
        let begun_us = stamp(second, "InactiveExitTimestampMonotonic");
        assert!(0 < done_us && done_us <= begun_us, "{first} at {done_us} us, {second} at {begun_us} us");
    }

    /// From its next boot on a stand-in of cloud-init's first stage raises a cable, ordered as by Ubuntu 24.04.
    pub fn has_cloud_init(&self) {
        self.has_early_network(
            CLOUD_INIT,
            "[Unit]\nDefaultDependencies=no\nWants=network-pre.target\n\
             After=hv_kvp_daemon.service systemd-remount-fs.service\n\
             Before=NetworkManager.service network-pre.target shutdown.target sysinit.target\n\
             Conflicts=shutdown.target\nRequiresMountsFor=/var/lib/cloud\n\
             [Service]\nType=oneshot\nRemainAfterExit=yes\nExecStart=ip link set eth0 up\n",
        );
    }

    /// The same of dhcpcd, ordered as by itself. Not beside cloud-init's, for which it has to wait.
    pub fn has_dhcp(&self) {
        self.has_early_network(
            DHCP,
            "[Unit]\nWants=network.target\nBefore=network.target\n\
             [Service]\nType=oneshot\nRemainAfterExit=yes\nExecStart=ip link set eth0 up\n",
        );
    }

    fn has_early_network(&self, unit: &str, text: &str) {
        self.write(&own_unit(unit), text);
        self.want("multi-user.target", &format!("/{}", own_unit(unit)));
    }

    /// A boot with nothing of ours in the way: whoever knocks is answered, or an empty count would prove nothing.
    #[track_caller]
    pub fn boots_open(&mut self) {
        let heard = self.knocked_at_while(|machine| {
            machine.boot();
            machine.wait("sshd answers", |machine| machine.answer(22) == Answer::Open);
        });
        assert!(heard.shut > 0, "no answer was counted, so there is nothing to shut: {heard:?}");
        for address in [SPOKE_PUBLIC, SPOKE_PUBLIC_V6] {
            let ssh = SocketAddr::new(address, SHUT[0]);
            self.wait(&format!("{ssh} answers"), |machine| {
                machine.lab.internet.connect(ssh, SHORT) == Answer::Open
            });
        }
        // So many come that systemd may have closed this one again by now.
        let accepted = self.property("db.socket", "NAccepted");
        assert!(accepted.parse::<u64>().unwrap() > 0, "nobody got in at {}", SHUT[1]);
    }

    /// From now on, if the hub gets in.
    #[track_caller]
    pub(super) fn has_ssh_on_mesh_alone(&self) {
        self.write(ON_MESH_ALONE, &format!("ListenAddress {SPOKE_MESH}\n"));
        self.ok(&["systemctl", "restart", "ssh.service"]);
        self.wait("sshd on the mesh", Self::sshd_greets);
    }

    /// A host that runs, with confirmed rules and a sshd for the mesh address alone: from its next boot on nobody
    /// puts in the mesh's cable.
    #[track_caller]
    pub fn listen_on_mesh_alone(&mut self) {
        self.has_ssh_on_mesh_alone();
        self.write(
            &format!("etc/systemd/system/{CABLES}"),
            "[Unit]\nAfter=network-pre.target\nBefore=network.target\nDefaultDependencies=no\n\
             [Service]\nType=oneshot\nRemainAfterExit=yes\nExecStart=ip link set eth0 up\n",
        );
    }

    /// From the next reload of its units, or its next boot, on sshd's are called as by Fedora, Arch and openSUSE, and no
    /// other name leads to them.
    pub fn calls_ssh_sshd(&self) {
        std::fs::remove_file(self.path(SSHD)).unwrap();
        for kind in ["service", "socket"] {
            let theirs = self.path(&format!("lib/systemd/system/ssh.{kind}"));
            let text = std::fs::read_to_string(&theirs).unwrap();
            let own: Vec<&str> = text.lines().filter(|line| !line.starts_with("Alias=")).collect();
            self.write(&format!("etc/systemd/system/sshd.{kind}"), &(own.join("\n") + "\n"));
            std::fs::remove_file(theirs).unwrap();
        }
        for wants in ["multi-user.target.wants/ssh.service", "sockets.target.wants/ssh.socket"] {
            let _ = std::fs::remove_file(self.path(&format!("etc/systemd/system/{wants}")));
        }
        self.want("multi-user.target", "/etc/systemd/system/sshd.service");
    }

    /// That host's boot with the mesh `late`; then its device is deleted and made anew, twice. sshd is there
    /// within five seconds of each, and nowhere else.
    #[track_caller]
    pub fn ssh_follows_its_address(&mut self, by: &str, late: Duration) {
        let lab = self.lab;
        lab.spoke.ok(&["ip", "link", "del", "wg0"]).unwrap();
        if by == "ssh.socket" {
            let text = format!("[Socket]\nListenStream=\nListenStream={SPOKE_MESH}:22\n");
            std::fs::create_dir_all(self.path("etc/systemd/system/ssh.socket.d")).unwrap();
            self.write("etc/systemd/system/ssh.socket.d/lab.conf", &text);
            self.want("sockets.target", "/lib/systemd/system/ssh.socket");
        }
        // That strangers hear nothing would be so with rules alone.
        let ((), bound) = meanwhile(
            |stop| lab.spoke.inside(|| Ok(listening(22, stop)?)).unwrap(),
            || {
                self.nobody_answers_while(|machine| {
                    machine.boot();
                    let booted = Instant::now();
                    machine.until(2 * late, "the mesh is late", |_| booted.elapsed() > late).unwrap();
                    assert!(!machine.sshd_greets(), "{by}: before there is a mesh");
                    mesh_anew(lab);
                    machine.ssh_comes(by, "late");
                    for round in ["made anew", "and again"] {
                        lab.spoke.ok(&["ip", "link", "del", "wg0"]).unwrap();
                        mesh_anew(lab);
                        machine.ssh_comes(by, round);
                    }
                });
            },
        );
        assert_eq!(bound, BTreeSet::from([as_the_kernel_writes(SPOKE_MESH)]), "{by}: where sshd listened");
        assert_eq!(self.ok(&["systemctl", "is-active", by]), "active\n");
    }

    /// Whether sshd says who it is to a new connection through the tunnel.
    pub fn sshd_greets(&self) -> bool {
        let heard = self.lab.hub.inside(|| {
            let mut stream = std::net::TcpStream::connect_timeout(&SocketAddr::new(SPOKE_MESH, 22), SHORT)?;
            stream.set_read_timeout(Some(LONG))?;
            let mut heard = [0; 4];
            stream.read_exact(&mut heard)?;
            Ok(heard)
        });
        heard.is_ok_and(|heard| heard == *b"SSH-")
    }

    #[track_caller]
    fn ssh_comes(&self, by: &str, what: &str) {
        let begun = Instant::now();
        self.wait(by, Self::sshd_greets);
        eprintln!("{by}, {what}: sshd after {:?}", begun.elapsed());
        assert!(begun.elapsed() < Duration::from_secs(5), "{by}, {what}: {:?}", begun.elapsed());
        let sockets = self.ok(&["ss", "-Hltn", "sport = :22"]);
        let addresses: Vec<&str> =
            sockets.lines().filter_map(|line| line.split_whitespace().nth(3)).collect();
        assert_eq!(addresses, [format!("{SPOKE_MESH}:22")], "{by}, {what}: {sockets}");
    }
}

/// Every address that somebody was seen listening on at this port, looked at every 10 ms and as the kernel writes it.
fn listening(port: u16, stop: &AtomicBool) -> std::io::Result<BTreeSet<String>> {
    const LISTENS: &str = "0A";
    let port = format!("{port:04X}");
    let mut all = BTreeSet::new();
    while !stop.load(Ordering::Relaxed) {
        for table in ["tcp", "tcp6"] {
            let text = std::fs::read_to_string(format!("/proc/thread-self/net/{table}"))?;
            for line in text.lines() {
                let words: Vec<&str> = line.split_whitespace().collect();
                let [_, local, _, LISTENS, ..] = words[..] else { continue };
                all.extend(local.strip_suffix(&*port).and_then(|at| at.strip_suffix(':')).map(str::to_owned));
            }
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(all)
}

/// Four bytes as one number of this processor, which has the last of them first.
fn as_the_kernel_writes(address: std::net::IpAddr) -> String {
    let std::net::IpAddr::V4(address) = address else { panic!("{address} is not of IPv4") };
    format!("{:08X}", u32::from_ne_bytes(address.octets()))
}
