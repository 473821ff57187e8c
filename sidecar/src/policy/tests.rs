//! The policy file from the outside: text in, values or rendered mistakes out.

use std::time::Duration;

use expect_test::{Expect, expect};
use jiff::civil::date;
use proptest::prelude::*;

use super::*;

/// The example of the documentation, with every key.
const FULL: &str = r#"
version = 1
[node]
name = "singapore"
role = "spoke"                  # spoke | hub | device
[mesh]
kind = "wireguard"              # wireguard | tailscale
interface = "wg0"               # default wg0 / tailscale0
address = ["10.84.0.16"]        # this node's mesh addresses
prefix = ["10.84.0.0/24"]       # the mesh
keepalive = "25s"               # every peer (spoke: the hub)
handshake_max_age = "3m"
listen_port = 51820             # hub: the tunnel's own UDP port, open to the public
[mesh.hub]
address = "10.84.0.1"
public_key = "xTIBA5rboUvnH4htodjb6e697QjLERt1NAB4mZqp8Dg="
endpoint = "203.0.113.47:51820"
[public]                        # what anyone may reach; nothing else
tcp = [80, 443]
udp = []
interfaces = ["eth0"]
[ssh]
port = 22
bind = "mesh"                   # "mesh" or a list of addresses
rebind = false
from = "hub"                    # "hub", "mesh" or a list of prefixes
[[mesh.service]]
name = "netdata"
tcp = [19999]
from = "mesh"
[[local]]
name = "lan"
interfaces = ["vmbr0", "docker*"]
tcp = [53]
udp = [53]
[[exception]]
name = "emergency-ssh"
tcp = [2222]
from = ["0.0.0.0/0", "::/0"]
reason = "way in when the mesh is down"
owner = "ops"
until = "2027-01-31"
[[file]]
path = "/etc/vault/production.env"
mode = "0600"
[enforce]
mode = "enforce"
firewall = true
binds = true
keepalive = true
confirm_within = "60s"
allow_no_admin_path = false
[metrics]
port = 9984
[heartbeat]
kuma_url_file = "/run/credentials/kuma-url"
ntfy_url_file = "ntfy-url"
every = "30s"
status_file = "/space/devices/oslo/_status.json"
app_file = "/run/vault/app.json"
certificate_file = "/etc/letsencrypt/live/oslo/fullchain.pem"
certificate_name = "oslo.example.org"
database_file = "/var/lib/vault/vault.db"
"#;

/// The shortest policy of a spoke, to which cases add.
const SPOKE: &str = r#"version = 1
[node]
name = "oslo"
[mesh]
address = ["10.84.0.16", "fd84::16"]
prefix = ["10.84.0.0/24", "fd84::/64"]
[mesh.hub]
address = "10.84.0.1"
"#;

const TAILSCALE: &str = "version = 1\nnode.name = \"lima\"\nmesh.kind = \"tailscale\"\n";

fn today() -> jiff::civil::Date {
    date(2026, 8, 1)
}

fn read(text: &str) -> Loaded {
    parse(text, "policy.toml", today()).unwrap_or_else(|mistakes| panic!("{mistakes}"))
}

/// What is printed about a policy that is wrong; it must fit a terminal.
fn mistakes(text: &str) -> Mistakes {
    match parse(text, "policy.toml", today()) {
        Ok(loaded) => panic!("was taken: {:?}", loaded.policy),
        Err(mistakes) => {
            for line in mistakes.to_string().lines() {
                assert!(line.chars().count() <= 80, "wider than 80 columns: {line}");
                assert!(!line.chars().any(char::is_control), "control character in {line:?}");
            }
            mistakes
        }
    }
}

fn check(text: &str, expected: Expect) {
    expected.assert_eq(&mistakes(text).to_string());
}

/// One line for each mistake, for the many small cases: `line:column what (help)`.
fn brief(text: &str, expected: Expect) {
    let list = mistakes(text).list;
    let lines: Vec<String> =
        list.iter().map(|m| format!("{}:{} {} ({})\n", m.line, m.column, m.what, m.help)).collect();
    expected.assert_eq(&lines.concat());
}

/// A case is lines added to [`SPOKE`]; line numbers are as if nothing stood before them.
fn cases(list: &[&str], expected: Expect) {
    let before = SPOKE.lines().count() as u32;
    let mut out = String::new();
    for added in list {
        let found = mistakes(&format!("{SPOKE}{added}\n"));
        for m in &found.list {
            // Mistakes above the added lines are at tables of SPOKE.
            let line = i64::from(m.line) - i64::from(before);
            out.push_str(&format!("{line}:{} {} ({})\n", m.column, m.what, m.help));
        }
    }
    expected.assert_eq(&out);
}

#[test]
fn what_is_said_of_tailscaled_is_read_and_shown_again() {
    let text = format!("{TAILSCALE}mesh.tags = [\"tag:server\", \"tag:eu-1\"]\nmesh.tailscale_ssh = true\n");
    let policy = read(&text).policy;
    assert_eq!((policy.mesh.tags.join(" "), policy.mesh.tailscale_ssh), ("tag:server tag:eu-1".into(), true));
    assert_eq!(read(&show(&policy)).policy, policy);
    assert!(!show(&read(TAILSCALE).policy).contains("tailscale_ssh"), "a fingerprint stays what it was");
    for bad in ["server", "tag:", "tag:1a", "tag:a b"] {
        let found = mistakes(&format!("{TAILSCALE}mesh.tags = [\"{bad}\"]\n"));
        assert_eq!(found.list[0].what, format!("\"{bad}\" is no tag"));
    }
    let noted = read(&SPOKE.replace("[mesh]", "[mesh]\ntailscale_ssh = true")).notes;
    assert_eq!((noted[0].key.as_str(), noted[0].kind), ("mesh.tailscale_ssh", NoteKind::NoEffect));
}

#[test]
fn the_documented_example_is_read_key_by_key() {
    let loaded = read(FULL);
    let port = |n| Port::new(n).expect("a port");
    let iface = |n| IfacePattern::new(n).expect("a pattern");
    let expected = Policy {
        node: Node { name: "singapore".into(), role: Role::Spoke },
        mesh: Mesh {
            kind: MeshKind::Wireguard,
            interface: "wg0".into(),
            address: vec!["10.84.0.16".parse().expect("an address")],
            prefix: vec!["10.84.0.0/24".parse().expect("a prefix")],
            keepalive: Some(Duration::from_secs(25)),
            handshake_max_age: Duration::from_secs(180),
            listen_port: Some(port(51820)),
            tags: Vec::new(),
            tailscale_ssh: false,
            hub: Some(Hub {
                address: vec!["10.84.0.1".parse().expect("an address")],
                public_key: PublicKey::from_base64("xTIBA5rboUvnH4htodjb6e697QjLERt1NAB4mZqp8Dg="),
                endpoint: Some("203.0.113.47:51820".parse().expect("an endpoint")),
            }),
        },
        public: Public { tcp: vec![port(80), port(443)], udp: vec![], interfaces: Some(vec![iface("eth0")]) },
        ssh: Ssh { port: port(22), bind: Bind::Mesh, rebind: false, from: Sources::Hub },
        services: vec![MeshService {
            name: "netdata".into(),
            tcp: vec![port(19999)],
            udp: vec![],
            from: Sources::Mesh,
        }],
        locals: vec![Local {
            name: "lan".into(),
            interfaces: vec![iface("vmbr0"), iface("docker*")],
            tcp: vec![port(53)],
            udp: vec![port(53)],
        }],
        exceptions: vec![Exception {
            name: "emergency-ssh".into(),
            tcp: vec![port(2222)],
            udp: vec![],
            from: vec!["0.0.0.0/0".parse().expect("a prefix"), "::/0".parse().expect("a prefix")],
            reason: "way in when the mesh is down".into(),
            owner: Some("ops".into()),
            until: date(2027, 1, 31),
        }],
        files: vec![FileRule { path: "/etc/vault/production.env".into(), mode: 0o600 }],
        enforce: Enforce {
            mode: Mode::Enforce,
            firewall: true,
            binds: true,
            keepalive: true,
            confirm_within: Duration::from_secs(60),
            allow_no_admin_path: false,
        },
        metrics: Metrics { port: port(9984) },
        heartbeat: Heartbeat {
            kuma_url_file: Some("/run/credentials/kuma-url".into()),
            ntfy_url_file: Some("ntfy-url".into()),
            every: Duration::from_secs(30),
            status_file: Some("/space/devices/oslo/_status.json".into()),
            app_file: Some("/run/vault/app.json".into()),
            certificate_file: Some("/etc/letsencrypt/live/oslo/fullchain.pem".into()),
            certificate_name: Some("oslo.example.org".into()),
            database_file: Some("/var/lib/vault/vault.db".into()),
        },
    };
    assert_eq!(loaded.policy, expected);
    assert_eq!(loaded.notes, []);
}

#[test]
fn defaults_are_filled_in_and_shown() {
    let loaded = read(SPOKE);
    assert_eq!(loaded.notes, [], "nothing is set that has no effect");
    expect![[r#"
        version = 1

        [node]
        name = "oslo"
        role = "spoke"

        [mesh]
        kind = "wireguard"
        interface = "wg0"
        address = ["10.84.0.16", "fd84::16"]
        prefix = ["10.84.0.0/24", "fd84::/64"]
        keepalive = "25s"
        handshake_max_age = "3m"

        [mesh.hub]
        address = ["10.84.0.1"]

        [public]
        tcp = []
        udp = []

        [ssh]
        port = 22
        bind = "mesh"
        rebind = false
        from = "hub"

        [enforce]
        mode = "enforce"
        firewall = true
        binds = true
        keepalive = true
        confirm_within = "1m"
        allow_no_admin_path = false

        [metrics]
        port = 9984

        [heartbeat]
        every = "30s"
    "#]]
    .assert_eq(&show(&loaded.policy));

    let tailscale = read(TAILSCALE).policy;
    assert_eq!(tailscale.mesh.interface, "tailscale0");
    assert_eq!(
        tailscale.mesh.prefix.iter().map(ToString::to_string).collect::<Vec<_>>(),
        ["100.64.0.0/10", "fd7a:115c:a1e0::/48"]
    );
    assert_eq!((tailscale.mesh.keepalive, tailscale.mesh.listen_port), (None, None));
    assert_eq!(tailscale.ssh.from, Sources::Mesh, "no hub is named");

    let hub = "version = 1\nnode = { name = \"hub\", role = \"hub\" }\n[mesh]\n\
               address = [\"10.84.0.1\"]\nprefix = [\"10.84.0.0/24\"]\n";
    let hub = read(hub).policy;
    assert_eq!((hub.mesh.keepalive, hub.mesh.listen_port), (None, Port::new(51820)));
    let hub = read(&format!("{TAILSCALE}node.role = \"hub\"\n")).policy;
    assert_eq!(hub.mesh.listen_port, Port::new(41641));
}

#[test]
fn what_is_shown_reads_back_as_the_same_policy() {
    let hub = "version=1\nnode.name='h'\nnode.role='hub'\nmesh.address=['10.84.0.1']\n\
               mesh.prefix=['10.84.0.0/24']\nmesh.keepalive='1h 1s'\nssh.from=['10.84.0.7/32']\n";
    let odd = format!(
        "{SPOKE}[[mesh.service]]\nname='n'\nudp=[0x35]\nfrom='hub'\n\
         [[exception]]\nname='x'\nudp=[1]\nfrom=['::/0']\nuntil=2026-08-02\n\
         reason='''\\ \"quoted\" 'and' \u{e9}'''\n[[file]]\npath='/a \"b\\c'\nmode='640'\n\
         [ssh]\nbind=['fd84::16', '::1']\nfrom='mesh'\n"
    );
    for text in [FULL, SPOKE, TAILSCALE, hub, &odd] {
        let policy = read(text).policy;
        let shown = show(&policy);
        assert_eq!(read(&shown).policy, policy, "{shown}");
        assert_eq!(show(&read(&shown).policy), shown);
    }
    let off = SPOKE.replace("[mesh]\n", "[mesh]\nkeepalive = \"off\"\n");
    assert_eq!(read(&off).policy.mesh.keepalive, None);
    assert_eq!(read(&show(&read(&off).policy)).policy.mesh.keepalive, None, "not the default of 25s");
}

#[test]
fn six_mistakes_are_reported_as_six() {
    check(
        r#"version = 1
[node]
name = "oslo"
rolle = "spoke"
[mesh]
address = ["10.84.1.16"]
prefix = ["10.84.0.0/24"]
keepalive = 25
[mesh.hub]
address = "10.84.0.1"
endpoint = "hub.example.org:51820"
[public]
tcp = [80, 443, 22, 70000]
"#,
        expect![[r#"
            error: unknown key `rolle` in [node]
             --> policy.toml:4:1
              |
            4 | rolle = "spoke"
              | ^^^^^
              = help: did you mean `role`?

            error: this node's address 10.84.1.16 is outside the mesh (10.84.0.0/24)
             --> policy.toml:6:12
              |
            6 | address = ["10.84.1.16"]
              |            ^^^^^^^^^^^^
              = help: correct the address, or add its network to mesh.prefix

            error: a duration needs its unit
             --> policy.toml:8:13
              |
            8 | keepalive = 25
              |             ^^
              = help: write "25s" if seconds are meant

            error: "hub.example.org:51820" is a name, and spokeguard does not resolve names
              --> policy.toml:11:12
               |
            11 | endpoint = "hub.example.org:51820"
               |            ^^^^^^^^^^^^^^^^^^^^^^^
               = help: whoever answers DNS would choose the hub; write "203.0.113.47:51820"
                       or "[2001:db8::1]:51820"

            error: tcp 22 is public, and ssh is for the mesh only
              --> policy.toml:13:17
               |
            13 | tcp = [80, 443, 22, 70000]
               |                 ^^
               = help: remove it here; a dated [[exception]] is the way to open ssh to
                       others

            error: 70000 is not a port
              --> policy.toml:13:21
               |
            13 | tcp = [80, 443, 22, 70000]
               |                     ^^^^^
               = help: a port is a number from 1 to 65535

            policy.toml: 6 mistakes"#]],
    );
}

#[test]
fn text_that_is_not_toml() {
    check(
        &format!("{SPOKE}[public]\ntcp = [80, 443\n[ssh]\nport = \nfrom = \"hub\n[metrics\nport = 9984\n"),
        expect![[r#"
            error: not TOML: missing comma between array elements, expected `,`
              --> policy.toml:11:1
               |
            11 | [ssh]
               | ^
               = help: does the list have its commas, and its closing bracket?

            policy.toml: 1 mistake"#]],
    );
    check(
        &format!(
            "{SPOKE}[public]\ntcp = [80 443]\nudp =\n[ssh]\nfrom = \"hub\nprot = 22\n[metrics\nport = 0\n"
        ),
        expect![[r#"
            error: not TOML: `80 443` is not a value
              --> policy.toml:10:8
               |
            10 | tcp = [80 443]
               |        ^^^^^^
               = help: put text in quotes, and commas between values

            error: not TOML: a value is missing
              --> policy.toml:11:6
               |
            11 | udp =
               |      ^

            error: not TOML: invalid basic string, expected `"`
              --> policy.toml:13:12
               |
            13 | from = "hub
               |            ^

            error: unknown key `prot` in [ssh]
              --> policy.toml:14:1
               |
            14 | prot = 22
               | ^^^^
               = help: did you mean `port`?

            error: not TOML: unclosed table, expected `]`
              --> policy.toml:15:9
               |
            15 | [metrics
               |         ^

            policy.toml: 5 mistakes"#]],
    );
    // What is missing may be missing only because of it.
    brief(
        "version = 1\n[node\nname = \"a\"\n",
        expect![[r#"
        2:6 not TOML: unclosed table, expected `]` ()
    "#]],
    );
    check(
        "",
        expect![[r#"
        error: `version` is missing
         --> policy.toml:1:1
          = help: write `version = 1`

        error: [node] with its `name` is missing
         --> policy.toml:1:1
          = help: write [node] and below it `name = "singapore"`

        error: [mesh] with its `address` is missing
         --> policy.toml:1:1
          = help: write [mesh] and below it `address = ["10.84.0.16"]`

        error: [mesh] with its `prefix` is missing
         --> policy.toml:1:1
          = help: write [mesh] and below it `prefix = ["10.84.0.0/24"]`

        policy.toml: 4 mistakes"#]],
    );
    check(
        &format!("{SPOKE}[ssh]\nport = 22\nport = 23\n[ssh]\nbind = \"mesh\"\n"),
        expect![[r#"
        error: `port` is written twice
          --> policy.toml:11:1
           |
        11 | port = 23
           | ^^^^
           = help: keep one of them

        error: `ssh` is written twice
          --> policy.toml:12:2
           |
        12 | [ssh]
           |  ^^^
           = help: keep one of them

        policy.toml: 2 mistakes"#]],
    );
}

#[test]
fn another_version_is_refused_without_guessing_at_its_keys() {
    brief(
        "version = 2\nsurprise = 1\n",
        expect![[r#"
        1:11 this spokeguard reads policies of version 1 only (write `version = 1`, or install the spokeguard that this file was written for)
    "#]],
    );
    brief(
        "version = \"1\"\nnode.name = \"a\"\nmesh.kind = \"tailscale\"\n",
        expect![[r#"
        1:11 `version` is the number 1, not a string (write version = 1)
    "#]],
    );
}

#[test]
fn unknown_keys_come_with_what_was_probably_meant() {
    cases(
        &[
            "[publc]\ntcp = [80]",
            "[public]\ntpc = [80]\nports = [443]",
            "[[service]]\nname = \"a\"",
            "[[exceptions]]\nname = \"a\"",
            "[ssh]\nkeepalive = \"25s\"\nlisten-address = \"::\"",
            "[enforce]\nconfirm-within = \"60s\"",
            "[heartbeat]\nkuma_url = \"https://kuma.example.org/api/push/s3cr3t\"",
            "[mesh.service]\nname = \"a\"\ntcp = [1]",
            "[[ssh]]\nport = 22",
            "[[metrics]]\nprot = 22",
            "[\"\\u001b[31m\"]\na = 1",
        ],
        expect![[r#"
            1:2 unknown key `publc` (did you mean [public]?)
            2:1 unknown key `tpc` in [public] (did you mean `tcp`?)
            3:1 unknown key `ports` in [public] ([public] knows tcp, udp, interfaces)
            1:3 unknown key `service` (did you mean [[mesh.service]]?)
            1:3 unknown key `exceptions` (did you mean [[exception]]?)
            2:1 unknown key `keepalive` in [ssh] (`keepalive` belongs in [mesh] or [enforce])
            3:1 unknown key `listen-address` in [ssh] ([ssh] knows port, bind, rebind, from)
            2:1 unknown key `confirm-within` in [enforce] (did you mean `confirm_within`?)
            2:1 unknown key `kuma_url` in [heartbeat] (a policy may be read by anyone, a push URL may not: put it in a file of its own and write kuma_url_file)
            1:1 `mesh.service` is a list of tables, not a table (write [[mesh.service]] above each one)
            1:1 there is one [ssh], so it is not a list (write [ssh], once)
            1:1 there is one [metrics], so it is not a list (write [metrics], once)
            2:1 unknown key `prot` in [metrics] (did you mean `port`?)
            1:2 unknown key `�[31m` (the top of the file knows version, node, mesh, public, ssh, local, exception, file, enforce, metrics, heartbeat)
        "#]],
    );
}

#[test]
fn values_of_the_wrong_kind() {
    cases(
        &[
            "[public]\ntcp = 80",
            "[public]\ntcp = [\"80\", \"8000-8080\", 0, -1, 65536, 80, 80, 1.5, 99999999999999999999]",
            "[public]\ntcp = \"http\"",
            "[public]\ninterfaces = []",
            "[public]\ninterfaces = [\"eth0\", \"*\", \"a b\", \"interface-too-long\"]",
            "[ssh]\nport = \"22\"\nrebind = \"false\"\nfrom = \"hubb\"",
            "[ssh]\nfrom = \"10.84.0.0/24\"",
            "[ssh]\nfrom = []",
            "[ssh]\nbind = \"0.0.0.0\"",
            "[enforce]\nmode = \"observe\"\nfirewall = 1\nconfirm_within = 60",
            "[enforce]\nconfirm_within = \"500ms\"",
            "[enforce]\nconfirm_within = \"2days\"",
            "[enforce]\nconfirm_within = \"soon\"",
            "ssh = \"yes\"",
            "[[file]]\npath = \"secret.env\"\nmode = 600",
            "[[file]]\npath = \"/etc/../x\"\nmode = \"4755\"",
            "[[file]]\npath = \"/x\"\nmode = \"rw\"",
            "[[file]]\nmode = \"0600\"\n[[file]]\nmode = \"0600\"",
            "[[file]]\npath = \"/x\"\nmode = \"0600\"\n[[file]]\npath = \"/x\"\nmode = \"0400\"",
            "[heartbeat]\nkuma_url_file = \"https://kuma.example.org/api/push/s3cr3t\"",
            "[heartbeat]\nkuma_url_file = \"secrets/kuma\"\nstatus_file = \"_status.json\"",
            "[heartbeat]\ncertificate_name = \"https://oslo.example.org\"\nevery = 30",
        ],
        expect![[r#"
            2:7 `tcp` is a list of ports, not a number (put it in brackets, also when it is the only one)
            2:8 expected a port, found a string (write 80 without quotes)
            2:14 ranges of ports are not understood (list each port)
            2:27 0 is not a port (a port is a number from 1 to 65535)
            2:30 -1 is not a port (a port is a number from 1 to 65535)
            2:34 65536 is not a port (a port is a number from 1 to 65535)
            2:45 `tcp` lists 80 twice (keep one of them)
            2:49 expected a port, found a number (a port is a number from 1 to 65535)
            2:54 99999999999999999999 is not a port (a port is a number from 1 to 65535)
            2:7 `tcp` is a list of ports, not a string (write a list of ports in brackets)
            2:14 `interfaces` is empty (leave `interfaces` out to mean every interface but lo, the mesh and [[local]] ones)
            2:23 "*" alone would match every interface; name them (a name as `ip link` shows it, or the start of one and a star: "docker*")
            2:28 interface name "a b" can't hold ' ' (a name as `ip link` shows it, or the start of one and a star: "docker*")
            2:35 interface name "interface-too-long" is longer than 15 characters (a name as `ip link` shows it, or the start of one and a star: "docker*")
            2:8 expected a port, found a string (write 22 without quotes)
            3:10 expected true or false, found a string (write false without quotes)
            4:8 `from` can't be "hubb" (did you mean "hub"?)
            2:8 `from` is "hub", "mesh" or a list of prefixes (write from = ["10.84.0.0/24"])
            2:8 `from` is empty (an empty list lets nobody in: write "hub", "mesh" or the prefixes meant)
            2:8 `bind` can't be "0.0.0.0" (write "mesh" or a list of addresses)
            2:8 `mode` can't be "observe" (write "enforce" or "audit")
            3:12 expected true or false, found a number (write true or false)
            4:18 a duration needs its unit (write "60s" if seconds are meant)
            2:18 "500ms" is not one or more whole seconds (write a number and a unit, such as "25s" or "3m")
            2:18 "2days" is longer than a day (write less)
            2:18 "soon" is not a duration (write a number and a unit, such as "25s" or "3m")
            1:1 unknown key `ssh` in [mesh.hub] (did you mean [ssh]?)
            2:8 "secret.env" is not the absolute path of a file (begin it with / and leave out "..")
            3:8 `mode` is a string of octal digits, not a number (write it as chmod takes it, in quotes: "0600")
            2:8 "/etc/../x" is not the absolute path of a file (begin it with / and leave out "..")
            3:8 mode "4755" has a set-user-id, set-group-id or sticky bit (those grant rights instead of limiting them: leave the first digit 0)
            3:8 "rw" is not a mode (write it as chmod takes it, in quotes: "0600")
            1:1 `path` is missing in [[file]] (write `path = "/etc/vault/production.env"`)
            3:1 `path` is missing in [[file]] (write `path = "/etc/vault/production.env"`)
            5:8 two [[file]] have the path "/x" (keep one of them)
            2:17 this is a URL, not the path of a file that holds it (a policy may be read by anyone, a push URL may not: put it in a file and write its path)
            2:17 "secrets/kuma" is not the absolute path of a file (begin it with / and leave out "..")
            3:15 "_status.json" is not the absolute path of a file (begin it with / and leave out "..")
            2:20 "https://oslo.example.org" is not a host's name (write it as in "www.example.org")
            3:9 a duration needs its unit (write "30s" if seconds are meant)
        "#]],
    );
}

#[test]
fn addresses_and_prefixes() {
    let mesh = |line: &str| {
        let key = line.split(' ').next().unwrap_or_default();
        let kept: Vec<&str> = SPOKE.lines().filter(|l| !l.starts_with(key)).collect();
        kept.join("\n").replace("[mesh]", &format!("[mesh]\n{line}")) + "\n"
    };
    for (line, expected) in [
        (
            "address = [\"::ffff:10.84.0.16\"]",
            expect![[r#"
                5:12 "::ffff:10.84.0.16" is IPv4 mapped into IPv6 (no packet carries it: write "10.84.0.16")
                7:1 `address` is missing in [mesh.hub] (write `address = "10.84.0.1"`)
            "#]],
        ),
        (
            "prefix = [\"10.84.0.16/24\", \"::ffff:10.84.0.0/120\"]",
            expect![[r#"
                5:11 10.84.0.16/24 has bits set outside its 24-bit prefix (write the network "10.84.0.0/24")
                5:28 "::ffff:10.84.0.0/120" is IPv4 mapped into IPv6 (no packet carries it: write "10.84.0.0/24")
                7:1 `address` is missing in [mesh.hub] (write `address = "10.84.0.1"`)
            "#]],
        ),
        (
            "prefix = [\"0.0.0.0/0\", \"224.0.0.0/4\", \"10.84.0.1\", \"mesh\"]",
            expect![[r#"
                5:11 0.0.0.0/0 is the whole internet, not a mesh (write the prefix that the mesh's own addresses are in)
                5:24 224.0.0.0/4 holds no address that a host in a mesh could have (write the prefix that the mesh's own addresses are in)
                5:39 "10.84.0.1" is not a prefix (write "10.84.0.1/32" for this one address)
                5:52 "mesh" is not a prefix (write address/length, such as "10.84.0.0/24" or "fd00::/64")
                7:1 `address` is missing in [mesh.hub] (write `address = "10.84.0.1"`)
            "#]],
        ),
        (
            "prefix = [\"10.84.0.0/28\"]",
            expect![[r#"
            6:12 this node's address 10.84.0.16 is outside the mesh (10.84.0.0/28) (correct the address, or add its network to mesh.prefix)
            6:26 this node's address fd84::16 is outside the mesh (10.84.0.0/28) (correct the address, or add its network to mesh.prefix)
            7:1 `address` is missing in [mesh.hub] (write `address = "10.84.0.1"`)
        "#]],
        ),
    ] {
        brief(&mesh(line).replace("address = \"10.84.0.1\"\n", ""), expected);
    }
    let text =
        SPOKE.replace("\"fd84::16\"", "\"0.0.0.0\", \"127.0.0.1\", \"ff02::1\", \"fd84::16/64\", \"x\"");
    brief(
        &text,
        expect![[r#"
        5:26 0.0.0.0 is the unspecified address, which no host in a mesh has (write the address that the tunnel's interface has)
        5:37 127.0.0.1 is a loopback address, which no host in a mesh has (write the address that the tunnel's interface has)
        5:50 ff02::1 is a multicast address, which no host in a mesh has (write the address that the tunnel's interface has)
        5:61 "fd84::16/64" is not an address (write the address alone: "fd84::16")
        5:76 "x" is not an address (write an IPv4 or IPv6 address, such as "10.84.0.16")
    "#]],
    );
    let text = SPOKE.replace("[mesh]", "[mesh]\nkeepalive = \"0s\"\ninterface = \"wg*\"\nlisten_port = 0");
    brief(
        &text,
        expect![[r#"
        5:13 a keepalive of no time (write keepalive = "off" to ask for none)
        6:13 the mesh has one interface, not a pattern (write its whole name)
        7:15 0 is not a port (a port is a number from 1 to 65535)
    "#]],
    );
    let text = SPOKE.replace("[mesh]", "[mesh]\nkeepalive = \"65536s\"\ninterface = \"lo\"");
    brief(
        &text,
        expect![[r#"
        5:13 "65536s" is longer than 65535 seconds (write less)
        6:13 the mesh can't be on lo (name the tunnel's interface)
    "#]],
    );
    cases(
        &[
            "endpoint = \"203.0.113.47\"\npublic_key = \"abc=\"",
            "endpoint = \"hub.example.org:51820\"",
            "endpoint = \"2001:db8::1:51820x\"",
            "endpoint = \"[::ffff:192.0.2.1]:51820\"",
            "endpoint = \"0.0.0.0:51820\"",
            "endpoint = \"192.0.2.1:0\"",
        ],
        expect![[r#"
            1:12 "203.0.113.47" is not an address and a port (add the port: "203.0.113.47:51820")
            2:14 this is not a WireGuard public key (write the 44 characters that `wg show` prints)
            1:12 "hub.example.org:51820" is a name, and spokeguard does not resolve names (whoever answers DNS would choose the hub; write "203.0.113.47:51820" or "[2001:db8::1]:51820")
            1:12 "2001:db8::1:51820x" is not an address and a port (write "203.0.113.47:51820" or "[2001:db8::1]:51820")
            1:12 "[::ffff:192.0.2.1]:51820" is IPv4 mapped into IPv6 (no packet carries it: write "192.0.2.1:51820")
            1:12 "0.0.0.0:51820" is not an address and a port (write "203.0.113.47:51820" or "[2001:db8::1]:51820")
            1:12 0 is not a port (write "203.0.113.47:51820" or "[2001:db8::1]:51820")
        "#]],
    );
    read(&format!("{SPOKE}endpoint = \"[2001:db8::1]:51820\"\n"));
}

#[test]
fn the_hub_is_named_and_is_somebody_else() {
    let lonely = SPOKE.replace("[mesh.hub]\naddress = \"10.84.0.1\"\n", "");
    brief(
        &format!(
            "{lonely}[ssh]\nfrom = \"hub\"\n[[mesh.service]]\nname = \"a\"\ntcp = [1]\nfrom = \"hub\"\n"
        ),
        expect![[r#"
            8:8 from = "hub", and no hub is named (write [mesh.hub] with its `address`, or from = "mesh")
            12:8 from = "hub", and no hub is named (write [mesh.hub] with its `address`, or from = "mesh")
        "#]],
    );
    read(&lonely);
    brief(
        &SPOKE.replace("\"10.84.0.1\"", "\"10.84.0.16\""),
        expect![[r#"
        8:11 the hub has this node's own address 10.84.0.16 (write the hub's address, or role = "hub" if this node is the hub)
    "#]],
    );
    brief(
        &SPOKE.replace("\"10.84.0.1\"", "[\"10.84.0.1\", \"10.85.0.1\"]"),
        expect![[r#"
        8:25 the hub's address 10.85.0.1 is outside the mesh (10.84.0.0/24, fd84::/64) (correct the address, or add its network to mesh.prefix)
    "#]],
    );
    brief(
        &SPOKE.replace("\"10.84.0.1\"", "[]"),
        expect![[r#"
        8:11 `address` is empty (write the hub's address in the mesh)
    "#]],
    );
    let hub = SPOKE.replace("[mesh]", "role = \"hub\"\n[mesh]");
    brief(
        &format!("{hub}[ssh]\nfrom = \"hub\"\n"),
        expect![[r#"
        9:11 this node is the hub, and 10.84.0.1 is not its address (leave [mesh.hub] out, or write role = "spoke")
        11:8 from = "hub" on the hub itself lets nobody in (write "mesh", or the prefixes of those who may come in)
    "#]],
    );
    assert_eq!(read(&hub.replace("10.84.0.1\"", "10.84.0.16\"")).policy.ssh.from, Sources::Mesh);
}

#[test]
fn a_port_has_one_meaning() {
    cases(
        &[
            "[public]\ntcp = [80, 22, 9984]",
            "[public]\ntcp = [19999]\n[[mesh.service]]\nname = \"netdata\"\ntcp = [19999]",
            "[[mesh.service]]\nname = \"a\"\ntcp = [1, 22]\n[[mesh.service]]\nname = \"b\"\ntcp = [1, 9984]",
            "[ssh]\nport = 9984",
            "[[mesh.service]]\nname = \"a\"",
            "[[mesh.service]]\nname = \"ssh\"\ntcp = [1]\n[[mesh.service]]\nname = \"ssh\"\ntcp = [2]",
        ],
        expect![[r#"
            2:12 tcp 22 is public, and ssh is for the mesh only (remove it here; a dated [[exception]] is the way to open ssh to others)
            2:16 tcp 9984 is public, and metrics is for the mesh only (remove it here, or from metrics)
            2:8 tcp 19999 is public, and mesh service "netdata" is for the mesh only (remove it here, or from mesh service "netdata")
            3:11 tcp 22 of mesh service "a" is taken by ssh (give each port to one of them)
            6:8 tcp 1 of mesh service "b" is taken by mesh service "a" (give each port to one of them)
            6:11 tcp 9984 of mesh service "b" is taken by metrics (give each port to one of them)
            2:8 tcp 9984 of metrics is taken by ssh (give each port to one of them)
            1:1 mesh service "a" has no port (write tcp = [...] or udp = [...])
            2:8 "ssh" means something else in metrics (choose another name for this service)
            5:8 two [[mesh.service]] are named "ssh" (give each a name of its own)
            5:8 "ssh" means something else in metrics (choose another name for this service)
        "#]],
    );
    // The same number of another protocol is another port.
    read(&format!("{SPOKE}[public]\nudp = [22]\n[[mesh.service]]\nname = \"dns\"\ntcp = [53]\nudp = [53]\n"));
    read(&format!("{SPOKE}[public]\ntcp = [22]\n[ssh]\nport = 2200\n"));
    let hub = "version=1\nnode={name='h',role='hub'}\n[mesh]\naddress=['10.84.0.1']\n\
               prefix=['10.84.0.0/24']\n[[mesh.service]]\nname='x'\nudp=[51820]\n";
    brief(
        hub,
        expect![[r#"
        8:6 udp 51820 of mesh service "x" is taken by the tunnel itself (give each port to one of them)
    "#]],
    );
    read(&hub.replace("[[mesh", "listen_port=51821\n[[mesh"));
}

#[test]
fn exceptions_say_what_why_and_until_when() {
    cases(
        &[
            "[[exception]]\nname = \"a\"\ntcp = [1]",
            "[[exception]]\nname = \"a\"\nfrom = []\nreason = \" \"\nuntil = \"2027-02-30\"",
            "[public]\ntcp = [80]\n[[exception]]\nname = \"a\"\ntcp = [80]\nfrom = [\"::/0\"]\nreason = \"r\"\n\
             until = 2027-01-31T00:00:00Z",
            "[[exception]]\nname = \"a b\"\nudp = [1]\nfrom = [\"::/0\"]\nreason = \"r\\u0007\"\n\
             until = \"2027-01-31T00:00\"",
        ],
        expect![[r#"
            1:1 `from` is missing in [[exception]] (write `from = ["192.0.2.0/24"]`)
            1:1 `reason` is missing in [[exception]] (write `reason = "way in when the mesh is down"`)
            1:1 `until` is missing in [[exception]] (write `until = "2027-01-31"`)
            1:1 exception "a" has no port (write tcp = [...] or udp = [...])
            3:8 `from` is empty (write the prefixes that may come in; ["0.0.0.0/0", "::/0"] is anyone)
            4:10 `reason` is empty (write it for whoever reads the report)
            5:9 "2027-02-30" is not a day of the calendar (write it as "2027-01-31")
            5:8 tcp 80 is public already, so it is no exception (remove it here or from [public])
            8:9 `until` is a day, without a time (write "2027-01-31": it ends with that day, UTC)
            2:8 "a b" can't be a name (1 to 63 letters, digits and hyphens, with a letter or digit at both ends)
            5:10 the control character '\u{7}' can't be in a policy's text (remove it)
            6:9 "2027-01-31T00:00" is not a day of the calendar (write it as "2027-01-31")
        "#]],
    );
}

#[test]
fn an_expired_exception_is_noted_and_does_not_stop_anything() {
    let text = |until: &str| {
        format!("{SPOKE}[[exception]]\nname='a'\ntcp=[1]\nfrom=['::/0']\nreason='r'\nuntil='{until}'\n")
    };
    assert!(read(&text("2026-08-01")).expired().is_none(), "it holds on its last day");
    let loaded = read(&text("2026-07-31"));
    assert_eq!(loaded.policy.exceptions.len(), 1);
    assert_eq!(loaded.notes.iter().map(|n| n.kind).collect::<Vec<_>>(), [NoteKind::Expired]);
    expect![[r#"
        error: exception "a" expired: its last day was 2026-07-31
          --> policy.toml:14:7
           |
        14 | until='2026-07-31'
           |       ^^^^^^^^^^^^
           = help: remove it, or agree on a new `until`; until then it opens nothing

        policy.toml: 1 mistake"#]]
    .assert_eq(&loaded.expired().map(|m| m.to_string()).unwrap_or_default());
}

#[test]
fn interfaces_have_one_scope() {
    let local = |public: &str, first: &str, second: &str| {
        format!(
            "[public]\n{public}\n[[local]]\nname = \"lan\"\ninterfaces = [{first}]\n\
             [[local]]\nname = \"vms\"\ninterfaces = [{second}]"
        )
    };
    cases(
        &[
            &local("interfaces = [\"eth0\"]", "\"eth*\"", "\"vmbr0\""),
            &local("interfaces = [\"wg0\", \"lo\"]", "\"wg*\"", "\"l*\""),
            &local("", "\"docker*\"", "\"docker0\""),
            "[[local]]\nname = \"lan\"\ninterfaces = []",
            "[[local]]\ninterfaces = [\"a\"]",
        ],
        expect![[r#"
            2:15 "eth0" is public, and "eth*" of local "lan" takes it away (an interface is public or local: remove it from one)
            2:15 "wg0" matches wg0, which is the mesh (leave it out: [mesh] and [[mesh.service]] speak for it)
            2:22 "lo" matches lo, which has no list of its own (name the other interfaces in full)
            5:15 "wg*" matches wg0, which is the mesh (leave it out: [mesh] and [[mesh.service]] speak for it)
            8:15 "l*" matches lo, which has no list of its own (name the other interfaces in full)
            8:15 "docker0" and "docker*" of local "lan" mean the same interface (give each interface to one [[local]])
            3:14 `interfaces` is empty (write `interfaces = ["vmbr0"]`)
            1:1 `name` is missing in [[local]] (write `name = "lan"`)
        "#]],
    );
    read(&format!("{SPOKE}{}\n", local("interfaces = [\"eth*\"]", "\"eth1\"", "\"docker*\"")));
}

#[test]
fn sshd_listens_where_its_clients_come_from() {
    cases(
        &[
            "[ssh]\nbind = [\"0.0.0.0\", \"::\"]",
            "[ssh]\nbind = [\"10.84.0.16\", \"192.0.2.7\"]",
            "[ssh]\nbind = [\"127.0.0.1\"]",
            "[ssh]\nbind = []",
        ],
        expect![[r#"
            2:9 0.0.0.0 would have sshd listen everywhere (write bind = "mesh")
            2:20 :: would have sshd listen everywhere (write bind = "mesh")
            2:23 sshd is for the mesh, and 192.0.2.7 is not this node's mesh address (write bind = "mesh")
            2:8 sshd is for the mesh, and listens on this host's loopback only (write bind = "mesh")
            2:8 `bind` is empty (write bind = "mesh")
        "#]],
    );
    read(&format!("{SPOKE}[ssh]\nbind = [\"10.84.0.16\", \"127.0.0.1\"]\n"));
    read(&format!("{SPOKE}[ssh]\nbind = [\"192.0.2.7\"]\nfrom = [\"192.0.2.0/24\"]\n"));
    read(&format!("{TAILSCALE}ssh.bind = [\"100.101.102.103\"]\n"));
}

#[test]
fn lists_and_tables_are_bounded() {
    let many = |n: usize, entry: &dyn Fn(usize) -> String| (0..n).map(entry).collect::<String>();
    let ports = |n| many(n, &|i| format!("{},", i + 10_000));
    read(&format!("{SPOKE}[public]\ntcp = [{}]\n", ports(1024)));
    let service = |i| format!("[[mesh.service]]\nname = \"s{i}\"\ntcp = [{}]\n", i + 100);
    let local = |i| format!("[[local]]\nname = \"l{i}\"\ninterfaces = [\"veth{i}\"]\n");
    let file = |i| format!("[[file]]\npath = \"/f{i}\"\nmode = \"0600\"\n");
    let exception = |i| {
        format!(
            "[[exception]]\nname = \"e{i}\"\ntcp = [1]\nfrom = [\"::/0\"]\nreason = \"r\"\nuntil = 2027-01-01\n"
        )
    };
    let all = [many(64, &service), many(16, &local), many(256, &file), many(64, &exception)].concat();
    read(&format!("{SPOKE}{all}"));
    let nets = many(4097, &|i| format!("\"10.{}.{}.0/24\",", i / 256, i % 256));
    cases(
        &[
            &format!("[public]\ntcp = [{}]", ports(1025)),
            &format!("[ssh]\nfrom = [{nets}]"),
            &many(65, &service),
            &many(17, &local),
            &many(257, &file),
            &many(65, &exception),
        ],
        expect![[r#"
            2:7 `tcp` has 1025 ports; the most is 1024 ()
            2:8 `from` has 4097 prefixes; the most is 4096 ()
            1:1 there are 65 [[mesh.service]]; the most is 64 ()
            1:1 there are 17 [[local]]; the most is 16 ()
            1:1 there are 257 [[file]]; the most is 256 ()
            1:1 there are 65 [[exception]]; the most is 64 ()
        "#]],
    );
    let garbage = mistakes(&format!("version = 1\n{}", many(1000, &|i| format!("k{i} = 1\n"))));
    assert_eq!((garbage.list.len(), garbage.more), (MISTAKES_MAX, 903));
}

#[test]
fn what_is_echoed_is_harmless() {
    // Neither escape sequences nor secrets of the file reach the terminal, and a long
    // line is shown around the mistake.
    let long = " ".repeat(300);
    check(
        &format!(
            "{SPOKE}[heartbeat]\nkuma_url = \"https://kuma.example.org/api/push/s3cr3t\"\n\
             ntfy_url_file = \"https://ntfy.example.org/s3cr3t\" # \u{202e}\u{9b}31m\n\
             [mesh2]\nprivate_key = \"s3cr3t\"\n[ssh]\n{long}prot = 22{long}# x\n"
        ),
        expect![[r#"
            error: unknown key `kuma_url` in [heartbeat]
              --> policy.toml:10:1
               |
            10 | kuma_url = "****************************************"
               | ^^^^^^^^
               = help: a policy may be read by anyone, a push URL may not: put it in a file
                       of its own and write kuma_url_file

            error: this is a URL, not the path of a file that holds it
              --> policy.toml:11:17
               |
            11 | ntfy_url_file = "https://***********************" * *****
               |                 ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^
               = help: a policy may be read by anyone, a push URL may not: put it in a file
                       and write its path

            error: unknown key `mesh2`
              --> policy.toml:12:2
               |
            12 | [mesh2]
               |  ^^^^^
               = help: did you mean [mesh]?

            error: unknown key `prot` in [ssh]
              --> policy.toml:15:301
               |
            15 |                          prot = 22
               |                          ^^^^
               = help: did you mean `port`?

            policy.toml: 4 mistakes"#]],
    );
}

#[test]
fn keys_are_found_in_the_file_for_later_checks() {
    let loaded = read(FULL);
    let line = |start: &str| {
        let line = FULL.lines().position(|l| l.starts_with(start)).expect("such a line");
        line as u32 + 1
    };
    assert_eq!(loaded.place("ssh.from"), Some((line("from = \"hub\""), 8)));
    assert_eq!(loaded.place("ssh.nothing"), Some((line("[ssh]"), 1)), "the table around it");
    assert_eq!(loaded.place("exception[0].until"), Some((line("until"), 9)));
    assert_eq!(loaded.place("exception[0].nothing"), Some((line("[[exception]]"), 1)));
    assert_eq!(loaded.place("mesh.hub"), Some((line("[mesh.hub]"), 1)));
    assert_eq!(loaded.place("nothing"), None);
    expect![[r#"
        error: nobody could get in
          --> policy.toml:26:8
           |
        26 | from = "hub"                    # "hub", "mesh" or a list of prefixes
           |        ^^^^^
           = help: say who may

        policy.toml: 1 mistake"#]]
    .assert_eq(&loaded.mistake("ssh.from", "nobody could get in", "say who may").to_string());
    let bare = read(SPOKE).mistake("enforce.allow_no_admin_path", "nobody could get in", "").to_string();
    assert!(bare.starts_with("error: nobody could get in\n --> policy.toml:1:1\n"), "{bare}");
}

#[test]
fn a_file_that_cannot_be_a_policy_is_refused_at_once() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = |name: &str| dir.path().join(name);
    let refusal = |name: &str| {
        let error = load(&path(name), today()).expect_err(name);
        error.to_string().replace(&dir.path().display().to_string(), "DIR")
    };
    std::fs::write(path("good"), SPOKE).expect("write");
    assert_eq!(load(&path("good"), today()).expect("a policy").policy, read(SPOKE).policy);

    // Opening a FIFO without a writer would wait for ever.
    rustix::fs::mknodat(rustix::fs::CWD, path("fifo"), rustix::fs::FileType::Fifo, 0o600.into(), 0)
        .expect("a fifo");
    assert_eq!(refusal("fifo"), "policy DIR/fifo is not a regular file");
    assert_eq!(refusal("."), "policy DIR/. is not a regular file");
    assert_eq!(
        refusal("none"),
        "there is no policy DIR/none: write one (README.md has a small one), or name another with --policy"
    );
    assert_eq!(refusal("good/none"), "cannot open policy DIR/good/none");

    std::fs::write(path("latin"), b"version = 1\n# caf\xe9\n").expect("write");
    assert_eq!(refusal("latin"), "policy DIR/latin is not UTF-8: line 2 holds the byte 0xe9");

    let filler = |n: usize| format!("{SPOKE}#{}", "x".repeat(n - SPOKE.len() - 1));
    std::fs::write(path("full"), filler(BYTES_MAX as usize)).expect("write");
    assert!(load(&path("full"), today()).is_ok());
    std::fs::write(path("large"), filler(BYTES_MAX as usize + 1)).expect("write");
    assert_eq!(refusal("large"), "policy DIR/large is larger than 1048576 bytes");

    std::fs::write(path("wrong"), "version = 1\n").expect("write");
    assert!(matches!(load(&path("wrong"), today()), Err(LoadError::Mistakes(m)) if m.list.len() == 3));
}

#[test]
fn a_large_file_of_garbage_is_refused_without_hoarding_its_errors() {
    let small = mistakes(&format!("version = 1\n{}", "a = =\n".repeat(2_000)));
    assert!(small.list.len() == MISTAKES_MAX && small.more > 1_000);
    let large = mistakes(&format!("version = 1\n{}", "a = =\n".repeat(100_000)));
    assert_eq!((large.list.len(), large.more), (1, 0));
}

/// Pieces that policies are made of, so that nonsense gets past the TOML parser.
fn fragment() -> impl Strategy<Value = String> {
    let lines: Vec<String> = FULL.lines().chain(SPOKE.lines()).map(str::to_owned).collect();
    let values =
        ["[]", "[[]]", "{}", "1", "-0", "0x16", "true", "\"\"", "\"10.84.0.0/24\"", "2027-01-31", "nan"];
    let values = proptest::sample::select(values.to_vec());
    let line = proptest::sample::select(lines);
    prop_oneof![
        4 => line.clone(),
        2 => (line, values).prop_map(|(line, value)| match line.split_once('=') {
            Some((key, _)) => format!("{key}= {value}"),
            None => line.replace("[[", "["),
        }),
        1 => "\\PC{0,30}",
    ]
}

/// Whatever the text: no panic, mistakes in order and in the file, or a policy that
/// [`show`] can say.
fn survives(text: &str) -> Result<(), TestCaseError> {
    match parse(text, "p", today()) {
        Ok(loaded) => {
            let shown = show(&loaded.policy);
            let again =
                parse(&shown, "p", today()).map_err(|m| TestCaseError::fail(format!("{shown}\n{m}")))?;
            prop_assert_eq!(again.policy, loaded.policy);
        }
        Err(mistakes) => {
            prop_assert!(!mistakes.list.is_empty(), "refused without a mistake");
            let lines = text.split('\n').count() as u32;
            prop_assert!(mistakes.list.iter().all(|m| (1..=lines).contains(&m.line)));
            prop_assert!(mistakes.list.windows(2).all(|w| w[0].line <= w[1].line));
            prop_assert!(!mistakes.to_string().chars().any(|c| c.is_control() && c != '\n'));
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(256) })]

    #[test]
    fn any_text_is_read_or_refused(text in "(?s).{0,200}") {
        survives(&text)?;
    }

    #[test]
    fn any_mixture_of_policies_is_read_or_refused(lines in proptest::collection::vec(fragment(), 0..40)) {
        survives(&lines.join("\n"))?;
        survives(&format!("{SPOKE}{}", lines.join("\n")))?;
    }

    #[test]
    fn any_mutation_of_a_policy_is_read_or_refused(
        edits in proptest::collection::vec((any::<prop::sample::Index>(), any::<char>(), 0..3u8), 1..6)
    ) {
        let mut text: Vec<char> = FULL.chars().collect();
        for (at, c, edit) in edits {
            let at = at.index(text.len());
            match edit {
                0 => text[at] = c,
                1 => { text.remove(at); }
                _ => text.insert(at, c),
            }
        }
        survives(&text.into_iter().collect::<String>())?;
    }
}
