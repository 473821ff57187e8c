//! Ours goes: what is left of it, and what must still happen without it.

use super::Machine;

impl Machine<'_> {
    /// What a host is that never had any of ours, or lost all of it at a boot. `left` of files in their usual places.
    #[track_caller]
    pub fn is_without_us(&self, left: &str) {
        assert_eq!(self.left(), left);
        // But for what the kernel itself lists there.
        let pins = "find /sys/fs/bpf -mindepth 1 -not -name maps.debug -not -name progs.debug";
        let pins: Vec<&str> = pins.split(' ').collect();
        let sshd = ["ssh.service", "ssh.socket", "sshd.service", "sshd.socket"];
        for (what, words) in [
            ("rules", &["nft", "list", "ruleset"][..]),
            ("pins", &pins),
            ("units", &["systemctl", "list-unit-files", "--no-legend", "spokeguard*"]),
            ("drop-ins", &[&["systemctl", "show", "-p", "DropInPaths", "--value"], &sshd[..]].concat()),
        ] {
            let there = self.run(words);
            // systemctl may call it a failure that there is none.
            let ended = there.code == Some(0) || (what == "units" && there.code == Some(1));
            assert!(ended && there.is_silent(), "{what}: {}", there.all());
        }
    }

    /// sshd's units have our drop-ins, which came with the units in `folder`, and systemd reads all that is in either.
    #[track_caller]
    pub fn sshd_has_our_drop_ins(&self, folder: &str) {
        let read = |unit: &str| {
            let names = "After,DropInPaths,Restart,RestartUSec,FreeBind";
            self.ok(&["systemctl", "show", "-p", names, unit])
        };
        let (service, socket) = (read("ssh.service"), read("ssh.socket"));
        // One name of sshd's unit is the other's alias here, and systemd reads one of the two drop-ins.
        for shown in [&service, &socket] {
            let paths = shown.lines().find_map(|line| line.strip_prefix("DropInPaths=")).unwrap_or_default();
            let paths: Vec<&str> =
                paths.split_whitespace().filter(|path| path.ends_with("/spokeguard.conf")).collect();
            assert!(matches!(paths[..], [path] if path.starts_with(folder)), "not in {folder}: {shown}");
        }
        assert!(service.contains("Restart=always\n") && service.contains("RestartUSec=2s\n"), "{service}");
        assert!(service.contains("spokeguard-boot.service"), "{service}");
        assert_eq!(read("sshd.service"), service);
        assert!(socket.contains("FreeBind=yes\n"), "{socket}");
        // Sockets come before whatever has default dependencies: an nftables.service with those, as Fedora's has, comes
        // before our boot unit, and sshd's socket would be left out.
        assert!(!socket.contains("spokeguard-boot.service"), "{socket}");
        self.units_are_plain(&["ssh.service", "sshd.service", "ssh.socket"]);
    }
}
