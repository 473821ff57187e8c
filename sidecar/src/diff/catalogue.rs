//! Every kind of finding: its name, how grave it is at worst, what it leans on, and what
//! `explain` says of it. One entry per code, in one place; the gravest come first.

use std::fmt;
use std::str::FromStr;

use super::{Code, Severity};
use crate::observed::Facet;
use crate::policy::mistake::wrapped;

/// What a finding means, why it matters and what to do, with an example.
pub fn explain(code: Code) -> String {
    let Entry { name, severity, meaning, why, remedy, example, .. } = code.entry();
    let severity = severity.name();
    let [meaning, why, remedy] = [meaning, why, remedy].map(in_80_columns);
    format!(
        "{name} ({severity} at worst)\n\n{meaning}\nWhy it matters:\n{why}\nWhat to \
         do:\n{remedy}\nExample:\n{example}\n"
    )
}

fn in_80_columns(text: &str) -> String {
    let mut out = String::new();
    // A string takes all that it is given.
    let _ = wrapped("", 0, &text.replace('\n', " "), &mut out);
    out
}

/// All codes, as `explain` without a code prints them.
pub fn list() -> String {
    Code::ALL.into_iter().map(Code::entry).fold(String::new(), |mut text, entry| {
        // A full stop ends a sentence where a space follows; [mesh.hub] has one inside.
        let meaning = entry.meaning.replace('\n', " ");
        let summary = meaning.find(". ").map_or(meaning.as_str(), |end| &meaning[..=end]);
        let head = format!("{:<19} {:<9} ", entry.name, entry.severity.name());
        let _ = wrapped(&head, head.len(), summary, &mut text);
        text
    })
}

#[derive(Clone, Copy)]
struct Entry {
    name: &'static str,
    /// The gravest it gets; a finding itself may be milder.
    severity: Severity,
    /// What it was read from: while one of these is blind, it can't be called over.
    facets: &'static [Facet],
    meaning: &'static str,
    why: &'static str,
    remedy: &'static str,
    example: &'static str,
}

impl Code {
    /// In the order of the catalogue: by severity, then as declared.
    pub const ALL: [Code; 32] = [
        Code::FirewallMissing,
        Code::ListenerExposed,
        Code::DnatExposed,
        Code::AuditExposed,
        Code::FirewallChanged,
        Code::FirewallBlocked,
        Code::SshBind,
        Code::SshUnreachable,
        Code::MeshMissing,
        Code::MeshAddress,
        Code::MeshHandshake,
        Code::MeshPeer,
        Code::MeshLeak,
        Code::MeshKeyExpiry,
        Code::ControlUnproven,
        Code::BindRefused,
        Code::PolicyRolledBack,
        Code::PolicyNotLoaded,
        Code::ProofDisagrees,
        Code::GuardMissing,
        Code::ListenerWide,
        Code::SshPassword,
        Code::MeshKeepalive,
        Code::MeshTags,
        Code::TailscaleSsh,
        Code::MeshFilter,
        Code::ExceptionExpired,
        Code::FileMode,
        Code::SealedRules,
        Code::MeshEndpoint,
        Code::ExceptionOpen,
        Code::BreakGlassOpen,
    ];

    /// The stable name: "listener-exposed".
    pub const fn name(self) -> &'static str {
        self.entry().name
    }

    /// The gravest that findings of this code get.
    pub const fn severity(self) -> Severity {
        self.entry().severity
    }

    /// The facets that it is read from. While one is blind, a finding that is not there
    /// any more is not over: it was only not looked at.
    pub const fn facets(self) -> &'static [Facet] {
        self.entry().facets
    }

    const fn entry(self) -> Entry {
        use Facet::{Audit, Binds, Counters, Files, Links, Listeners, Nftables, Sshd, Tailscale, Wireguard};
        match self {
            Code::FirewallMissing => Entry {
                name: "firewall-missing",
                severity: Severity::Critical,
                facets: &[Nftables],
                meaning: "The table `inet spokeguard` is not in the kernel. Nothing of the policy's\n\
                          firewall is in force.",
                why: "Whatever listens on this host is reachable as far as other tables let it be.\n\
                      Usually another tool's reload ran `nft flush ruleset`.",
                remedy: "Run `spokeguard apply`, or start the daemon, which puts the table back within\n\
                         milliseconds. Then look at `by`: the tool named there flushes what it does not\n\
                         own, and should be told to reload its own table only.",
                example: "  wanted  the policy's table, in force\n  found   there is no such table\n  \
                          by      nft (pid 4211, nftables.service)",
            },
            Code::FirewallChanged => Entry {
                name: "firewall-changed",
                severity: Severity::High,
                facets: &[Nftables],
                meaning: "The table `inet spokeguard` is there, and is not as the policy says: rules are\n\
                          missing, foreign, in another order, or the table is dormant.",
                why: "One rule less, or one `accept` too early, can open a port while everything still\n\
                      looks protected.",
                remedy: "`spokeguard plan` shows every difference; `spokeguard apply` or the daemon puts\n\
                         the table right in one transaction and keeps its counters. To allow something\n\
                         for good, write it into the policy, not into the table.",
                example: "  found   chain input: a foreign rule `tcp dport 5432 accept`",
            },
            Code::FirewallBlocked => Entry {
                name: "firewall-blocked",
                severity: Severity::High,
                facets: &[Nftables, Links],
                meaning: "A port that the policy wants reachable is dropped or rejected by a table that\n\
                          is not ours. High if it is the hub's way to sshd, medium otherwise.",
                why: "In nftables a drop anywhere is final: our table can take exposure away, and can\n\
                      never give it back. The service is down for those it is meant for.",
                remedy: "Allow the port in the tool that owns the table named in `found` (ufw, firewalld,\n\
                         networking.firewall), or take it out of the policy if nobody should reach it.",
                example: "  https tcp/443 ipv4\n  wanted  reachable by anyone at 203.0.113.7 on eth0\n  \
                          found   dropped by table inet filter chain input",
            },
            Code::PolicyRolledBack => Entry {
                name: "policy-rolled-back",
                severity: Severity::High,
                facets: &[],
                meaning: "The policy of the file was in force on trial, and nobody confirmed it in time. The\n\
                          rules confirmed before it are back.",
                why: "No new connection of the hub came through the tunnel while it was in force, so it\n\
                      may have locked the operator out. It is not tried again by itself.",
                remedy: "Look whether the hub could connect to sshd or the metrics through the tunnel at all.\n\
                         Then correct the policy, which is taken up when the file changes, or try the same\n\
                         once more with `spokeguard apply`, and `spokeguard confirm` it by hand if need be.",
                example: "  policy 8f1c0e7a55d2b3c4\n  found   nobody confirmed it in time, and the rules before it \
                          are back",
            },
            Code::PolicyNotLoaded => Entry {
                name: "policy-not-loaded",
                severity: Severity::High,
                facets: &[],
                meaning: "The policy file was changed, and what it says now is not in force: it has a mistake,\n\
                          or the way back could not be armed.",
                why: "What is enforced is not what the file says. The policy before it goes on as it was.",
                remedy: "`spokeguard policy check` shows every mistake with its place. A corrected file is\n\
                         taken up when it is written; a full disk or a missing nft is tried again every 10 s.",
                example: "  policy file /etc/spokeguard/policy.toml\n  found   policy.toml:7:1: unknown key `pubic`",
            },
            Code::SealedRules => Entry {
                name: "sealed-rules",
                severity: Severity::Medium,
                facets: &[],
                meaning: "The file sealed.nft in the state directory does not hold the rules of the last\n\
                          confirmed policy: it is missing, was changed, or can't be written. Or that\n\
                          policy itself, confirmed.toml, can't be read, or tunnel.nft beside it names\n\
                          another tunnel: then it says so.",
                why: "A boot loads it before the daemon is there. Until the daemon comes up, other rules\n\
                      than the confirmed ones are in force, or none.",
                remedy: "Make the state directory writable. The daemon writes the file anew when it finds\n\
                         it changed, as do `apply` and `confirm`. Changes belong into the policy.",
                example: "  file sealed.nft\n  found   it was changed, or cut off",
            },
            Code::ListenerExposed => Entry {
                name: "listener-exposed",
                severity: Severity::Critical,
                facets: &[Listeners, Nftables, Links],
                meaning: "A process listens on a port that the policy does not open to the public, and a\n\
                          stranger's packet gets to it after every table on this host has had its say.",
                why: "This is an open door now, over the family and interface that `found` names. A\n\
                      socket on [::] often answers over IPv4 too, and a socket on the mesh address can\n\
                      be reached by neighbours on a public interface.",
                remedy: "Put the firewall in force (`spokeguard apply`); then bind the process named in\n\
                         `by` to the mesh or loopback address, so that it needs no firewall to be safe.\n\
                         If it is meant to be public, declare it under [public] or as an [[exception]].",
                example: "  tcp/0.0.0.0:5432\n  wanted  closed to the public: the policy names no such \
                    port\n  \
                          found   a stranger gets in through eth0 over ipv4\n  \
                          by      postgres (pid 812, postgresql.service)",
            },
            Code::ListenerWide => Entry {
                name: "listener-wide",
                severity: Severity::Medium,
                facets: &[Listeners, Nftables, Links],
                meaning: "A process listens on more addresses than the policy lets it, and only a firewall\n\
                          keeps strangers out. Medium where we cannot tell whether it does; info, and no drift,\n\
                          for clients that hold UDP 123, 323, 5353 or 5355 open (time and local names).",
                why: "One layer holds. The day the firewall is reloaded, the port is open. `found` says\n\
                      who holds it now.",
                remedy: "Bind the process to the addresses named in `wanted`, or declare the port.\n\
                         Nothing is on fire.",
                example: "  tcp/[::]:19999\n  wanted  mesh only: 10.84.0.16\n  \
                          found   listens on every address; held by table inet spokeguard chain input",
            },
            Code::DnatExposed => Entry {
                name: "dnat-exposed",
                severity: Severity::Critical,
                facets: &[Nftables, Links],
                meaning: "A rule of some table sends a public port to another address, most often into a\n\
                          container, and the policy does not open that port. Critical if strangers get\n\
                          through, low if our table or another one holds it.",
                why: "Published ports take the forward path. Input rules, and with them most host\n\
                      firewalls, never see them, and no socket of the host shows them.",
                remedy: "Publish on a mesh or loopback address (`docker run -p 10.84.0.16:5432:5432`), or\n\
                         declare the port. `spokeguard apply` closes it meanwhile: our table judges the\n\
                         port that the stranger asked for, in both paths.",
                example: "  tcp/5432 -> 172.17.0.2:5432\n  found   table ip nat chain DOCKER sends it to \
                          172.17.0.2:5432; a\n          stranger gets in through eth0 over ipv4",
            },
            Code::SshBind => Entry {
                name: "ssh-bind",
                severity: Severity::High,
                facets: &[Listeners, Nftables, Links],
                meaning: "sshd's port is bound to addresses beyond [ssh] bind: usually a wildcard. High if\n\
                          a stranger gets in, medium if a firewall keeps him out.",
                why: "ssh on the public address is tried within minutes by everybody. With socket\n\
                      activation, ListenAddress in sshd_config has no effect at all, so a correct\n\
                      configuration file proves nothing; this is read from the kernel's sockets.",
                remedy: "Set ListenAddress (sshd_config) or ListenStream (ssh.socket; an empty one first\n\
                         clears the default) to the mesh address. Keep a session open while you do, and\n\
                         try a new one through the tunnel.",
                example: "  tcp/0.0.0.0:22\n  wanted  mesh only: 10.84.0.16\n  \
                          found   a stranger gets in through eth0 over ipv4\n  \
                          by      systemd (pid 1, ssh.socket)",
            },
            Code::SshUnreachable => Entry {
                name: "ssh-unreachable",
                severity: Severity::High,
                facets: &[Listeners, Links],
                meaning: "No socket answers on the mesh address at sshd's port.",
                why: "It is the operator's way in. Often sshd started before the tunnel had its address,\n\
                      failed to bind, and gave up.",
                remedy: "Start sshd after the tunnel, or let it bind early (ssh.socket with FreeBind=yes).\n\
                         Check from the hub before you close any other way in.",
                example: "  tcp/10.84.0.16:22\n  wanted  sshd answers here\n  found   nothing listens on \
                    tcp/22",
            },
            Code::SshPassword => Entry {
                name: "ssh-password",
                severity: Severity::Medium,
                facets: &[Sshd],
                meaning: "sshd accepts passwords, or keyboard-interactive logins, which are passwords too.",
                why: "Passwords can be guessed from every machine of the mesh; keys can't.",
                remedy: "Set PasswordAuthentication no and KbdInteractiveAuthentication no, check with\n\
                         `sshd -T`, and reload. Make sure a key works first.",
                example: "  sshd\n  wanted  keys only\n  found   PasswordAuthentication yes",
            },
            Code::MeshMissing => Entry {
                name: "mesh-missing",
                severity: Severity::High,
                facets: &[Links, Wireguard],
                meaning: "The mesh interface is absent, down, or not a WireGuard device.",
                why: "No tunnel, no way in, no metrics; and everything that must be reachable through the\n\
                      mesh only is reachable by nobody.",
                remedy: "Bring the tunnel up and read its log. If it has another name, set [mesh] interface.",
                example: "  interface wg0\n  wanted  there and up\n  found   there is no such interface",
            },
            Code::MeshAddress => Entry {
                name: "mesh-address",
                severity: Severity::High,
                facets: &[Links],
                meaning: "An address of [mesh] address is not on the mesh interface.",
                why: "sshd and the metrics wait on that address, and our rules are written for it.",
                remedy: "Give the interface its address, or correct the policy. After a rename or a new\n\
                         allocation both usually need the change.",
                example: "  address 10.84.0.16\n  wanted  on wg0\n  found   wg0 has 10.84.0.61",
            },
            Code::MeshKeepalive => Entry {
                name: "mesh-keepalive",
                severity: Severity::Medium,
                facets: &[Wireguard],
                meaning: "A peer's persistent keepalive is off, or not what the policy says.",
                why: "Without it a NAT on the way forgets the tunnel after a minute or two of silence, and\n\
                      the hub can't reach this node until it speaks first.",
                remedy: "With [enforce] keepalive the daemon sets it again. Put PersistentKeepalive into\n\
                         the tunnel's own configuration too, or it is lost at the next reload.",
                example: "  peer hub\n  wanted  keepalive 25 s\n  found   keepalive off",
            },
            Code::MeshHandshake => Entry {
                name: "mesh-handshake",
                severity: Severity::High,
                facets: &[Wireguard],
                meaning: "The last handshake with a peer is older than [mesh] handshake_max_age, or there\n\
                          never was one (high on a spoke: it has no tunnel).",
                why: "With keepalive on, a living tunnel renews its keys every two minutes or so. An old\n\
                      handshake means that nothing gets through.",
                remedy: "Is the other side up? Is its UDP port open on the way? Do both have each other's\n\
                         public key? Is the clock right? On a hub, a node that is switched off shows here.",
                example: "  peer hub\n  wanted  a handshake in the last 3 min\n  \
                          found   last handshake: 14 min ago (endpoint 203.0.113.47:51820)",
            },
            Code::MeshPeer => Entry {
                name: "mesh-peer",
                severity: Severity::High,
                facets: &[Wireguard],
                meaning: "The hub is not among the peers, its address is not routed to it, or (medium) a\n\
                          spoke has a peer that the policy does not name.",
                why: "Without the hub's peer there is no way in. A peer too many is a machine inside the\n\
                      mesh that nobody declared.",
                remedy: "Compare [mesh.hub] with the tunnel's configuration. Remove an unknown peer with\n\
                         `wg set wg0 peer KEY remove` once you know who added it.",
                example: "  peer hub\n  wanted  10.84.0.1 in its allowed IPs\n  found   allowed IPs \
                    10.84.0.2/32",
            },
            Code::MeshEndpoint => Entry {
                name: "mesh-endpoint",
                severity: Severity::Low,
                facets: &[Wireguard],
                meaning: "The hub's peer talks to another address than [mesh.hub] endpoint.",
                why: "WireGuard follows a peer that moves, so this can be right; after a move of the hub\n\
                      the old address also comes back with the next reload.",
                remedy: "If the hub moved, change the policy and the tunnel's configuration. If it did\n\
                         not, find out who holds the new address.",
                example: "  peer hub\n  wanted  endpoint 203.0.113.47:51820\n  found   endpoint \
                    198.51.100.9:51820",
            },
            Code::MeshLeak => Entry {
                name: "mesh-leak",
                severity: Severity::High,
                facets: &[Nftables, Links],
                meaning: "The mesh address answers on a public interface. Linux accepts a packet for any of\n\
                          its addresses on every interface (the weak host model), so a neighbour who\n\
                          routes the mesh address to this host gets to it without any tunnel.",
                why: "\"sshd listens on the mesh address only\" is then no protection against the machines\n\
                      on the same link or hosting segment. Reverse-path filters do not stop it.",
                remedy: "`spokeguard apply`: our table drops what is sent to a mesh address and does not\n\
                         come through the mesh interface.",
                example: "  10.84.0.16 through eth0\n  wanted  10.84.0.16 answers on wg0 only\n  \
                          found   a neighbour on eth0 gets to 10.84.0.16 at tcp/22",
            },
            Code::MeshTags => Entry {
                name: "mesh-tags",
                severity: Severity::Medium,
                facets: &[Tailscale],
                meaning: "The node's Tailscale tags are not those of [mesh] tags.",
                why: "The tailnet's policy file lets people in by tags: with another tag this node is\n\
                      reachable for others, or for nobody.",
                remedy: "Set the tags in the Tailscale console (`tailscale up --advertise-tags` asks for\n\
                         them), or correct the policy.",
                example: "  tailscale tags\n  wanted  tag:server\n  found   no tags",
            },
            Code::MeshKeyExpiry => Entry {
                name: "mesh-key-expiry",
                severity: Severity::High,
                facets: &[Tailscale],
                meaning: "The key by which this node is in the tailnet ends within 14 days, or has ended.",
                why: "When it ends, the tunnel ends, and with it the only way to sshd.",
                remedy: "Log in again (`tailscale up --force-reauth`, from a way in that does not need the\n\
                         tunnel), or turn key expiry off for this node; tagged nodes have none.",
                example: "  tailscale node key\n  wanted  a key that lasts\n  found   it expires in 3 days",
            },
            Code::TailscaleSsh => Entry {
                name: "tailscale-ssh",
                severity: Severity::Medium,
                facets: &[Tailscale],
                meaning: "tailscaled serves ssh itself, and the policy does not say that it may.",
                why: "It answers inside its own process: no socket shows it, no rule of this host stops it,\n\
                      and sshd's settings don't hold there. Who gets in is up to the tailnet's policy file.",
                remedy: "Turn it off with `tailscale set --ssh=false`, or say tailscale_ssh = true in [mesh].",
                example: "  tailscale ssh\n  wanted  off: sshd alone lets people in\n  found   tailscaled serves ssh itself",
            },
            Code::MeshFilter => Entry {
                name: "mesh-filter",
                severity: Severity::Medium,
                facets: &[Tailscale],
                meaning: "The packet filter that Tailscale compiled for this node lets in more than the\n\
                          policy opens to the mesh, or can't be compared with it (info).",
                why: "The tailnet's policy file and ours have parted. While our table refuses the\n\
                      rest, this is worth knowing and no more (info); in audit mode, or without it,\n\
                      they get in.",
                remedy: "Narrow the tailnet's policy file, or open the ports in [[mesh.service]];\n\
                         `spokeguard policy import tailscale` writes a policy from that file.",
                example: "  tailscale packet filter\n  wanted  no more than the policy opens to the mesh\n  \
                          found   it lets in tcp 1-21 from 100.64.0.0/10",
            },
            Code::ExceptionExpired => Entry {
                name: "exception-expired",
                severity: Severity::Medium,
                facets: &[],
                meaning: "An [[exception]] is past its `until`. It opens nothing any more.",
                why: "Either somebody still counts on that hole and will find it shut, or the policy has\n\
                      a line that says nothing. Both want a decision.",
                remedy: "Remove it, or give it a new date together with its owner.",
                example: "  exception emergency-ssh\n  wanted  held until 2027-01-31: way in when the \
                    mesh is down\n  \
                          found   over; tcp/2222 is closed to 0.0.0.0/0 again",
            },
            Code::ExceptionOpen => Entry {
                name: "exception-open",
                severity: Severity::Info,
                facets: &[],
                meaning: "A declared hole is open. It is an accepted risk: always listed, and never a\n\
                          reason for another verdict or exit code.",
                why: "A hole that nobody sees any more is how a temporary one becomes permanent.",
                remedy: "Nothing, until its date; then it closes by itself. Close it earlier by taking it\n\
                         out of the policy.",
                example: "  exception emergency-ssh\n  wanted  declared until 2027-01-31: way in when the \
                    mesh is down\n  \
                          found   tcp/2222 is open to 0.0.0.0/0 and ::/0",
            },
            Code::BreakGlassOpen => Entry {
                name: "break-glass-open",
                severity: Severity::Info,
                facets: &[Nftables],
                meaning: "`spokeguard break-glass open` let somebody in for a while. It is an accepted risk:\n\
                          always listed, and never a reason for another verdict or exit code.",
                why: "Somebody needed a way in that the policy does not have. The kernel ends it on\n\
                      time with nobody's help, and it does not outlive a reboot.",
                remedy: "Nothing, until its end. Close it earlier with `spokeguard break-glass close\n\
                         PORT`. What is needed again and again belongs into the policy.",
                example: "  tcp/2222 from 192.0.2.0/24\n  wanted  closed by the policy\n  found   open until \
                          2026-11-21T12:15:00Z by alice,\n          since 2026-11-21T12:00:00Z: the mesh is down",
            },
            Code::FileMode => Entry {
                name: "file-mode",
                severity: Severity::Medium,
                facets: &[Files],
                meaning: "A [[file]] may be read, changed or run by more people than the policy says, or it\n\
                          is not there. Medium if everyone on the host is among them, else low.",
                why: "Secrets in files are as safe as their mode: any process on the host can read a\n\
                      world-readable one.",
                remedy: "chmod it, and correct what creates it (a umask, a deploy script). If other people\n\
                         or services had access meanwhile, treat the secret as known and renew it.",
                example: "  file /etc/vault/production.env\n  wanted  mode 0600 or stricter\n  \
                          found   mode 0644, owned by uid 0: too open, to everyone",
            },
            Code::GuardMissing => Entry {
                name: "guard-missing",
                severity: Severity::Medium,
                facets: &[Counters, Links],
                meaning: "The second layer is not in force as the policy says: the tc programs on public\n\
                          interfaces that refuse new TCP connections which the policy doesn't let in.",
                why: "nftables still holds the line, but alone: from `nft flush ruleset` to the repair\n\
                      whatever listens can be reached.",
                remedy: "The daemon puts it right within ten seconds, `spokeguard apply` at once. If it comes\n\
                         back, some tool removes our programs from the interface, or our pins from bpffs.",
                example: "  tc guard\n  wanted  on every public interface\n  found   not on eth1",
            },
            Code::ControlUnproven => Entry {
                name: "control-unproven",
                severity: Severity::High,
                facets: &[],
                meaning: "A control that the policy asks for could not be seen working. Each is tried at start\n\
                          and hourly: by packets that must be refused or counted, a bind that must fail, a\n\
                          harmless change of our table. It was in vain, or it could not be tried: we lack\n\
                          a right, a program or a kernel feature, or the rules change faster than nft\n\
                          can list them.",
                why: "A control that silently does nothing is worse than none, because people rely on it.\n\
                      The verdict is \"unknown\" while one can't be tried (\"drift\" for the bind guard,\n\
                      behind which the firewall holds), and \"drift\" where it was tried in vain.",
                remedy: "`found` says what was missing, or what got through. Give the unit the capability,\n\
                         install the program, stop what changes the rules all the time, take away what\n\
                         leads around the control, or switch it off in [enforce] so that the policy does\n\
                         not promise it.",
                example: "  control firewall\n  wanted  our table in force\n  \
                          found   could not be seen: needs CAP_NET_ADMIN: run as root",
            },
            Code::BindRefused => Entry {
                name: "bind-refused",
                severity: Severity::High,
                facets: &[Binds],
                meaning: "A process wanted to listen on an address that the policy does not let the port have,\n\
                          and the kernel said no (EPERM). High for sshd's port, else medium; low where mode\n\
                          is audit, which lets it be and says what it would refuse. Goes an hour after the\n\
                          last try. Ports that the policy names are held to their addresses, TCP and UDP.\n\
                          Of others, TCP is refused on wildcard and public addresses, but for what clients\n\
                          bind as well: the kernel's own range of ports, 20, and 600 to 1023.",
                why: "The service did not start, or not where it wanted to.",
                remedy: "Bind the process named in `by` to the mesh or loopback, or declare the port. sshd:\n\
                         set ListenAddress, or [ssh] rebind = true, which moves it to the mesh address.\n\
                         In an emergency `spokeguard release --binds` puts the guard aside until the daemon\n\
                         starts again. For good: [enforce] binds = false. Without our program: stop the\n\
                         daemon, then remove the folder binds1 below /sys/fs/bpf/spokeguard.",
                example: "  tcp/0.0.0.0:5432\n  wanted  on loopback or the mesh: the policy names no such port\n  \
                          found   refused 3 times, last 12 s ago\n  \
                          by      postgres (pid 812, postgresql.service)",
            },
            Code::AuditExposed => Entry {
                name: "audit-exposed",
                severity: Severity::Critical,
                facets: &[Audit, Listeners],
                meaning: "A probe from outside got to something that the policy does not open, and no other\n\
                          finding says so: the rules, as far as we can read them, hold it or can't be judged.",
                why: "This is not a conclusion from rules and sockets but what a packet met, so nothing on\n\
                      the host explains it away.",
                remedy: "`found` puts the three opinions side by side: who listens, what the rules say, and\n\
                         where the probe came to. Close what it came to; then look for what took it past the\n\
                         rules. `spokeguard audit` shows all ports at once.",
                example: "  tcp/198.51.100.7:8443\n  wanted  closed to strangers\n  \
                          found   sockets: none of this host's; rules: cannot tell, it depends on xt;\n          \
                          probe: is sent on to 172.17.0.2:443 through eth0 as 73.9.1.4",
            },
            Code::ProofDisagrees => Entry {
                name: "proof-disagrees",
                severity: Severity::High,
                facets: &[Audit, Listeners, Nftables],
                meaning: "Sockets and rules say one thing of a port, and a probe from outside met another: high\n\
                          where a wanted port is shut, low where the policy is kept all the same.",
                why: "Something decides about packets that is not in the rules: a tc or XDP program, a\n\
                      flowtable, policy routing. What it does today to one port it can do to any.",
                remedy: "`found` has all three opinions. Look at `tc filter show dev eth0 ingress`, `ip link`\n\
                         (XDP), `ip rule` and `nft list flowtables`. The port was asked twice, so it is no\n\
                         accident of the moment.",
                example: "  tcp/198.51.100.7:80\n  wanted  open to anyone\n  \
                          found   sockets: nginx listens on 0.0.0.0:80; rules: let it in;\n          \
                          probe: is dropped through eth0 as 73.9.1.4",
            },
        }
    }
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// No finding has this name; says which one may have been meant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnknownCode {
    pub text: String,
    pub nearest: Option<Code>,
}

impl fmt::Display for UnknownCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "no finding is called \"{}\"", crate::terms::printable(&self.text, 64))?;
        match self.nearest {
            Some(code) => write!(f, "; did you mean \"{code}\"?"),
            None => f.write_str("; `spokeguard explain` lists them all"),
        }
    }
}

impl std::error::Error for UnknownCode {}

impl FromStr for Code {
    type Err = UnknownCode;

    fn from_str(text: &str) -> Result<Self, UnknownCode> {
        let asked: String = text.trim().to_lowercase().replace(['_', ' '], "-");
        if let Some(code) = Code::ALL.into_iter().find(|code| code.name() == asked) {
            return Ok(code);
        }
        // Nobody's typing slip is longer than any name; the distance of long texts is slow.
        let near = asked.chars().take(64).collect::<String>();
        let nearest = Code::ALL
            .into_iter()
            .map(|code| (strsim::damerau_levenshtein(&near, code.name()), code))
            .min_by_key(|(distance, _)| *distance)
            .filter(|(distance, _)| *distance <= 4)
            .map(|(_, code)| code)
            .or_else(|| {
                Code::ALL.into_iter().find(|code| !near.is_empty() && code.name().starts_with(&near))
            });
        Err(UnknownCode { text: text.to_owned(), nearest })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_catalogue_has_every_code_once_and_the_gravest_first() {
        let mut names: Vec<&str> = Code::ALL.iter().map(|code| code.name()).collect();
        assert!(Code::ALL.windows(2).all(|pair| pair[0].severity() <= pair[1].severity()));
        names.sort_unstable();
        names.dedup();
        // ProofDisagrees is the last variant declared.
        assert_eq!(names.len(), Code::ProofDisagrees as usize + 1);
        for code in Code::ALL {
            // The name in JSON, the name in text and the name that is parsed are one.
            let json = serde_json::to_value(code).expect("a code");
            assert_eq!(json, code.name());
            assert_eq!(code.name().parse(), Ok(code));
        }
    }

    #[test]
    fn every_code_is_explained_within_a_terminal() {
        for code in Code::ALL {
            let text = explain(code);
            assert!(text.starts_with(code.name()), "{text}");
            for part in ["Why it matters:", "What to do:", "Example:"] {
                assert!(text.contains(part), "{code} lacks {part}");
            }
            for line in text.lines() {
                assert!(line.chars().count() <= 80, "{code}: {line}");
            }
            assert!((12..=26).contains(&text.lines().count()), "{code}: {} lines", text.lines().count());
        }
        let list = list();
        assert_eq!(list.lines().filter(|line| !line.starts_with(' ')).count(), Code::ALL.len());
        assert!(list.lines().all(|line| line.chars().count() <= 80), "{list}");
    }

    #[test]
    fn a_slip_of_the_fingers_is_understood() {
        let nearest = |text: &str| text.parse::<Code>().expect_err("not a code").nearest;
        assert_eq!(nearest("listner-exposed"), Some(Code::ListenerExposed));
        assert_eq!(nearest("dnat"), Some(Code::DnatExposed));
        assert_eq!(nearest("something quite else"), None);
        assert_eq!(nearest(""), None);
        assert_eq!("Listener_Exposed".parse(), Ok(Code::ListenerExposed));
        let text = "ssh-bound".parse::<Code>().expect_err("not a code").to_string();
        assert_eq!(text, "no finding is called \"ssh-bound\"; did you mean \"ssh-bind\"?");
    }
}
