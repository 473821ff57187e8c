use std::collections::BTreeSet;

use expect_test::{Expect, expect};

use super::*;

/// Valid; a case adds lines to it, or replaces some.
const FLEET: &str = r#"version = 1

[fleet]
name = "vault"
domain = "vault.example"

[mesh]
prefix = ["10.84.0.0/24"]
hub = "zurich"

[defaults.public]
tcp = [80, 443]

[[defaults.file]]
path = "/etc/vault/production.env"
mode = "0600"

[[node]]
name = "zurich"
mesh_address = "10.84.0.1"
public_address = "203.0.113.47"
public_key = "xTIBA5rboUvnH4htodjb6e697QjLERt1NAB4mZqp8Dg="
subdomain = ["noc", "soc"]
file = []

[[node.mesh.service]]
name = "kuma"
tcp = [3001]

[[node]]
name = "virginia"
mesh_address = "10.84.0.2"
public_address = ["198.51.100.2", "2001:db8::2"]
public_key = "OJmUDn1Un9+kq0TYb5Qm7Uo3ZwjWbjio7hJdhKP3Uiw="
region = "us-east-1"
labels = { provider = "aws" }

[[node]]
name = "singapore"
mesh_address = ["10.84.0.16"]
public_key = "yI2I0ZVLFN2yK45m/5sOH61rUA3mBGQhQd85oD8ynH8="

[node.ssh]
port = 2022
"#;

fn today() -> jiff::civil::Date {
    jiff::civil::date(2026, 11, 1)
}

fn read(text: &str) -> Inventory {
    parse(text, "fleet.toml", today(), Keys::Required).unwrap_or_else(|mistakes| panic!("{mistakes}"))
}

fn refused(text: &str) -> crate::policy::Mistakes {
    let mistakes = parse(text, "fleet.toml", today(), Keys::Required).expect_err("was taken");
    for line in mistakes.to_string().lines() {
        assert!(line.chars().count() <= 80, "wider than 80 columns: {line}");
        assert!(!line.chars().any(char::is_control), "control character in {line:?}");
    }
    mistakes
}

/// Each case is a text of [`FLEET`] and what stands there instead; one line for each mistake,
/// `line:column what (help)`.
fn cases(list: &[(&str, &str)], expected: Expect) {
    let mut out = String::new();
    for (old, new) in list {
        assert_eq!(FLEET.matches(old).count(), 1, "{old}");
        for m in refused(&FLEET.replace(old, new)).list {
            out.push_str(&format!("{}:{} {} ({})\n", m.line, m.column, m.what, m.help));
        }
        out.push('\n');
    }
    expected.assert_eq(&out);
}

#[test]
fn defaults_overrides_and_the_mesh_make_each_nodes_policy() {
    // One key of a table from the defaults, one from the node.
    let fleet =
        read(&FLEET.replace("[[defaults.file]]", "[defaults.ssh]\nrebind = true\n\n[[defaults.file]]"));
    let policy = |name: &str| crate::policy::show(&fleet.node(name).expect("a node").policy);
    let read_alone = |text: &str| {
        let loaded = crate::policy::parse(text, "policy.toml", today()).unwrap_or_else(|m| panic!("{m}"));
        crate::policy::show(&loaded.policy)
    };
    assert_eq!(
        policy("singapore"),
        read_alone(
            r#"version = 1
            node = { name = "singapore", role = "spoke" }
            public = { tcp = [80, 443] }
            ssh = { port = 2022, rebind = true, from = "hub" }
            file = [{ path = "/etc/vault/production.env", mode = "0600" }]
            [mesh]
            address = ["10.84.0.16"]
            prefix = ["10.84.0.0/24"]
            [mesh.hub]
            address = "10.84.0.1"
            public_key = "xTIBA5rboUvnH4htodjb6e697QjLERt1NAB4mZqp8Dg="
            endpoint = "203.0.113.47:51820""#
        )
    );
    assert_eq!(
        policy("zurich"),
        read_alone(
            r#"version = 1
            node = { name = "zurich", role = "hub" }
            ssh = { rebind = true }
            public = { tcp = [80, 443] }
            [mesh]
            address = ["10.84.0.1"]
            prefix = ["10.84.0.0/24"]
            listen_port = 51820
            service = [{ name = "kuma", tcp = [3001], from = "mesh" }]"#
        )
    );
    let names: Vec<Vec<String>> = fleet.nodes.iter().map(|node| fleet.domains(node)).collect();
    assert_eq!(
        names,
        [vec!["noc.vault.example", "soc.vault.example"], vec!["virginia.vault.example"], vec![]]
    );
    let targets: Vec<String> = fleet.nodes.iter().map(Node::metrics_target).collect();
    assert_eq!(targets, ["10.84.0.1:9984", "10.84.0.2:9984", "10.84.0.16:9984"]);
    assert_eq!(
        fleet.hub().map(|hub| hub.endpoint.map(|e| e.to_string())),
        Some(Some("203.0.113.47:51820".into()))
    );
    assert_eq!(fleet.nodes[1].endpoint, None, "only the hub is dialled");
    assert_eq!(fleet.nodes.iter().map(|node| node.line).collect::<Vec<_>>(), [21, 33, 41]);
    assert!(fleet.notes.is_empty(), "{:?}", fleet.notes);
}

#[test]
fn whatever_a_policy_may_say_an_inventory_may_say_for_it() {
    let said = ["version", "node"].into_iter().chain(merge::OVERRIDES);
    let known = crate::policy::read::POLICY.keys("").iter().copied();
    assert_eq!(said.collect::<BTreeSet<_>>(), known.collect::<BTreeSet<_>>());
}

#[test]
fn what_two_nodes_have_in_common_is_a_mistake() {
    cases(
        &[
            ("name = \"singapore\"", "name = \"Virginia\""),
            ("[\"10.84.0.16\"]", "\"10.84.0.2\""),
            ("[\"10.84.0.16\"]", "\"10.84.0.16\"\npublic_address = \"2001:db8:0::2\""),
            ("yI2I0ZVLFN2yK45m/5sOH61rUA3mBGQhQd85oD8ynH8=", "OJmUDn1Un9+kq0TYb5Qm7Uo3ZwjWbjio7hJdhKP3Uiw="),
            ("[\"10.84.0.16\"]", "\"10.84.0.16\"\nhostname = \"virginia\"\nsubdomain = [\"soc\", \"noc\"]"),
            ("[\"10.84.0.16\"]", "\"10.84.0.16\"\nsubdomain = \"noc\""),
        ],
        expect![[r#"
            39:8 the name Virginia is that of virginia (line 30) too (give each node a name of its own)

            40:16 the mesh address 10.84.0.2 is that of virginia (line 30) too (give each node an address of its own)

            41:18 the public address 2001:db8::2 is that of virginia (line 30) too (leave it to the node that has it)

            41:14 the public key is that of virginia (line 30) too (make another pair for one: spokeguard fleet keygen NODE --replace)

            41:12 the hostname virginia is that of virginia (line 30) too (give each node a hostname of its own)

            41:13 the first name in DNS noc is that of zurich (line 18) too (give each node one of its own; those after it may be shared)

        "#]],
    );
}

#[test]
fn mistakes_of_the_inventory_are_said_all_at_once() {
    cases(
        &[
            ("hub = \"zurich\"", "hub = \"zurch\""),
            ("hub = \"zurich\"", ""),
            ("prefix = [\"10.84.0.0/24\"]", ""),
            ("prefix = [\"10.84.0.0/24\"]", "prefix = [\"10.84.1.0/24\"]"),
            ("public_address = \"203.0.113.47\"", ""),
            (
                "mesh_address = [\"10.84.0.16\"]\npublic_key = \"yI2I0ZVLFN2yK45m/5sOH61rUA3mBGQhQd85oD8ynH8=\"",
                "",
            ),
            ("labels = { provider = \"aws\" }", "labels = { node = \"x\" }"),
            ("labels = { provider = \"aws\" }", "labels = { kuma_push_token = \"abcdef\" }"),
            (
                "labels = { provider = \"aws\" }",
                "role = \"hub\"\nkeepalive = \"25s\"\naddress = \"10.84.0.2\"",
            ),
            ("[\"10.84.0.16\"]", "\"10.84.0.16\"\nmesh = { hub = 1, address = 2, keepalive = 3 }"),
            ("domain = \"vault.example\"", "domain = \"vault.example.\""),
            ("domain = \"vault.example\"", ""),
            (
                "public_address = [\"198.51.100.2\", \"2001:db8::2\"]",
                "public_address = [\"10.84.0.77\", \"::\"]",
            ),
            ("[defaults.public]", "[public]"),
            ("version = 1", "version = 2"),
        ],
        expect![[r#"
            9:7 no [[node]] is named "zurch" (did you mean "zurich"?)

            7:1 `hub` is missing in [mesh] (write `hub = "zurich"`)

            7:1 `prefix` is missing in [mesh] (write `prefix = ["10.84.0.0/24"]`)

            20:16 this node's address 10.84.0.1 is outside the mesh (10.84.1.0/24) (correct the address, or add its network to mesh.prefix)
            32:16 this node's address 10.84.0.2 is outside the mesh (10.84.1.0/24) (correct the address, or add its network to mesh.prefix)
            40:17 this node's address 10.84.0.16 is outside the mesh (10.84.1.0/24) (correct the address, or add its network to mesh.prefix)

            18:1 the hub zurich has no address at which the others reach its tunnel (write its `public_address`, or `endpoint` with address and port)

            38:1 singapore has no `mesh_address` (write its address in the mesh: `mesh_address = "10.84.0.16"`)
            38:1 singapore has no `public_key` (run `spokeguard fleet keygen singapore --private-key FILE`, which writes it here)

            36:10 every target has a label `node` already (choose another name)

            36:10 the label `kuma_push_token` looks like a credential (take it out: this file may be read by anyone. What was in it is known now, so make another)

            36:8 the hub of [mesh] is zurich, and a fleet has one (write role = "spoke" or "device", or change `hub` in [mesh])
            37:1 unknown key `keepalive` in [[node]] ([[node]] knows name, role, mesh_address, public_address, public_key, endpoint, region, hostname, subdomain, labels, mesh, public, ssh, local, exception, file, enforce, metrics, heartbeat)
            38:1 unknown key `address` in [[node]] (write `mesh_address`, or `public_address`)

            41:10 `hub` can't be overridden (write hub = "NAME" in [mesh]; the rest is taken from that node)
            41:19 `address` can't be overridden (write `mesh_address` in [[node]])
            41:44 a duration needs its unit (write "3s" if seconds are meant)

            5:10 "vault.example." can't be a name in DNS (letters, digits and hyphens between dots, without a dot at the end)

            23:13 `subdomain` is below no domain (write `domain` in [fleet], or leave `subdomain` out)

            33:19 the public address 10.84.0.77 is one of the mesh (write what the internet reaches it at, or `mesh_address`)
            33:33 nobody reaches a node at :: (write the address that the internet knows)

            11:2 unknown key `public` (write [defaults.public], or [node.public] of one node)

            1:11 this spokeguard reads inventories of version 1 only (write `version = 1`, or install the spokeguard that this file was written for)

        "#]],
    );
}

#[test]
fn a_policys_mistake_is_shown_where_the_inventory_makes_it_and_once() {
    cases(
        &[
            // In the defaults, of all that share it.
            ("tcp = [80, 443]", "tcp = [22, 80, 443]"),
            ("tcp = [80, 443]", "tcp = [80, \"x\"]"),
            ("tcp = [80, 443]", "tpc = [80, 443]"),
            ("[defaults.public]", "[defaults.ssh]\nfrom = \"hub\"\n\n[defaults.public]"),
            // In a node, of that one.
            ("port = 2022", "port = 443"),
            ("port = 2022", "prt = 2022"),
            ("port = 2022", "from = [\"10.84.0.9/32\"]"),
            ("tcp = [3001]", "tcp = [443]"),
            ("[[node.mesh.service]]", "ssh = { from = \"hub\" }\n[[node.mesh.service]]"),
        ],
        expect![[r#"
            12:8 tcp 22 is public, and ssh is for the mesh only (in the policy of zurich, virginia) (remove it here; a dated [[exception]] is the way to open ssh to others)

            12:12 expected a port, found a string (a port is a number from 1 to 65535)

            12:1 unknown key `tpc` in [public] (did you mean `tcp`?)

            12:8 from = "hub" on the hub itself lets nobody in (in the policy of zurich) (leave it, and write below the hub's [[node]] who may come in there)

            12:12 tcp 443 is public, and ssh is for the mesh only (in the policy of singapore) (remove it here; a dated [[exception]] is the way to open ssh to others)

            44:1 unknown key `prt` in [ssh] (did you mean `port`?)

            44:8 the hub (10.84.0.1) is in none of its prefixes, so it can't administer this spoke (add 10.84.0.1/32, or set allow_no_admin_path = true in [enforce])

            12:12 tcp 443 is public, and mesh service "kuma" is for the mesh only (in the policy of zurich) (remove it here, or from mesh service "kuma")

            26:16 from = "hub" on the hub itself lets nobody in (write "mesh", or the prefixes of those who may come in)

        "#]],
    );
}

#[test]
fn private_keys_are_refused_and_never_shown() {
    let private = "eEQtZGMY5p8MMvYSk6MlwcGUHGPpU+kyjoVKUjTV4mk=";
    for (line, places) in [
        (format!("private_key = \"{private}\""), 2),
        (format!("# was {private}"), 1),
        (format!("region = \"{private}\""), 2),
        (format!("labels = {{ note = \"{private}\" }}"), 1),
    ] {
        let mistakes = refused(&FLEET.replace("[node.ssh]", &format!("{line}\n[node.ssh]")));
        let shown = mistakes.to_string();
        assert!(!shown.contains("eEQtZGMY5p8MMvYSk6MlwcGUH"), "{shown}");
        assert!(shown.contains("looks like a private"), "{shown}");
        assert_eq!(mistakes.list.len(), places, "{shown}");
    }
}

#[test]
fn a_fleet_on_tailscale_needs_neither_addresses_nor_keys_nor_a_hub() {
    let fleet = read(
        r#"version = 1
        fleet = { name = "home" }
        mesh = { kind = "tailscale" }
        defaults = { ssh = { from = "mesh" } }
        node = [{ name = "motoko", role = "device", hostname = "motoko.example.ts.net" }, { name = "atom" }]"#,
    );
    assert_eq!(fleet.nodes[0].metrics_target(), "motoko.example.ts.net:9984");
    assert_eq!((fleet.hub(), fleet.mesh.port), (None, None));
    assert_eq!(fleet.nodes[1].role, Role::Spoke);
}

#[test]
fn an_expired_exception_is_a_note_for_all_that_share_it() {
    let exception = "[[defaults.exception]]\nname = \"old\"\ntcp = [2222]\nfrom = [\"0.0.0.0/0\"]\nreason = \"once\"\nuntil = \"2026-01-31\"\n";
    let fleet = read(&FLEET.replace("[[defaults.file]]", &format!("{exception}[[defaults.file]]")));
    let notes: Vec<&str> = fleet.expired().map(|note| note.mistake.what.as_str()).collect();
    assert_eq!(
        notes,
        [
            "exception \"old\" expired: its last day was 2026-01-31 (in the policy of zurich, virginia, singapore)"
        ]
    );
}

/// [`FLEET`]'s parts, in another order: tables, keys within them, elements of lists that are sets.
fn shuffled(order: &[usize]) -> String {
    let mut lines: Vec<Vec<&str>> = Vec::new();
    for line in FLEET.lines().filter(|line| !line.is_empty()) {
        match lines.last_mut() {
            Some(part) if !line.starts_with('[') => part.push(line),
            _ => lines.push(vec![line]),
        }
    }
    // What is below a [[node]] stays with it.
    let mut parts: Vec<Vec<Vec<&str>>> = Vec::new();
    for part in lines.drain(1..) {
        match parts.last_mut() {
            Some(node) if part[0].starts_with("[node.") || part[0].starts_with("[[node.") => node.push(part),
            _ => parts.push(vec![part]),
        }
    }
    let mut next = order.iter().cycle();
    let mut turn = |length: usize| next.next().map_or(0, |n| n % length);
    let mut out = vec!["version = 1"];
    while !parts.is_empty() {
        for mut table in parts.remove(turn(parts.len())) {
            out.push(table.remove(0));
            while !table.is_empty() {
                out.push(table.remove(turn(table.len())));
            }
        }
    }
    out.join("\n").replace("[80, 443]", ["[443, 80]", "[80, 443]"][turn(2)])
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig::with_cases(64))]
    #[test]
    fn what_is_rendered_depends_on_what_is_said_and_not_on_the_order(
        order in proptest::collection::vec(0usize..1000, 40),
    ) {
        proptest::prop_assert_eq!(render::all(&read(&shuffled(&order))), render::all(&read(FLEET)));
    }

    #[test]
    fn no_text_is_too_strange_to_be_read(
        at in 0usize..1200, length in 0usize..60, with in "\\PC{0,20}|[\\[\\]{}=\"\n#.]{0,8}",
    ) {
        let mut text: Vec<char> = FLEET.chars().collect();
        let from = at.min(text.len());
        text.splice(from..(from + length).min(text.len()), with.chars());
        // Whatever it says, it ends, and does not panic.
        let _ = parse(&text.into_iter().collect::<String>(), "fleet.toml", today(), Keys::Required);
    }
}

#[test]
fn everything_that_is_rendered_carries_the_mark_and_no_secret() {
    let fleet = read(FLEET);
    let known: BTreeSet<PublicKey> = fleet.nodes.iter().filter_map(|node| node.public_key).collect();
    let hub = *known.iter().max().expect("keys");
    let others: BTreeSet<PublicKey> = known.iter().copied().filter(|key| *key != hub).collect();
    let files = render::all(&fleet);
    assert_eq!(files.len(), 3 * 5 + 4, "{:?}", files.keys());
    for (path, text) in &files {
        let head = &text.as_bytes()[..text.len().min(render::MARK_WITHIN)];
        assert!(String::from_utf8_lossy(head).contains(render::MARK), "{path}\n{text}");
        assert_eq!(secrets::find(text, &known), [], "{path}");
        assert_eq!(secrets::find(text, &others).is_empty(), !text.contains(&hub.to_string()), "{path}");
    }
    for node in &fleet.nodes {
        let text = &files[&format!("nodes/{}/policy.toml", node.name)];
        let loaded = crate::policy::parse(text, "policy.toml", today()).unwrap_or_else(|m| panic!("{m}"));
        assert!(loaded.notes.is_empty(), "{:?}", loaded.notes);
        assert_eq!(crate::policy::fingerprint(&loaded.policy), crate::policy::fingerprint(&node.policy));
    }
    // A node without a public address has no name to expect.
    let names: Vec<String> =
        render::records(&fleet).into_iter().map(|r| format!("{} {}", r.name, r.sort)).collect();
    let wanted = [
        "noc.vault.example A",
        "soc.vault.example A",
        "virginia.vault.example A",
        "virginia.vault.example AAAA",
    ];
    assert_eq!(names, wanted);
}

#[test]
fn a_spoke_gets_the_hub_as_its_peer_and_the_hub_gets_all() {
    let fleet = read(FLEET);
    let files = render::all(&fleet);
    expect![[r#"
        # Written by `spokeguard fleet render` from the inventory of vault: change that, not this.

        [Interface]
        Address = 10.84.0.2/24
        # The private half never leaves the node.
        PostUp = wg set %i private-key /etc/wireguard/%i.key

        # zurich
        [Peer]
        PublicKey = xTIBA5rboUvnH4htodjb6e697QjLERt1NAB4mZqp8Dg=
        AllowedIPs = 10.84.0.0/24
        Endpoint = 203.0.113.47:51820
        PersistentKeepalive = 25
    "#]]
    .assert_eq(&files["nodes/virginia/wireguard.conf"]);
    expect![[r#"
        # Written by `spokeguard fleet render` from the inventory of vault: change that, not this.

        [NetDev]
        Name=wg0
        Kind=wireguard

        [WireGuard]
        PrivateKeyFile=/etc/wireguard/wg0.key
        ListenPort=51820

        # singapore
        [WireGuardPeer]
        PublicKey=yI2I0ZVLFN2yK45m/5sOH61rUA3mBGQhQd85oD8ynH8=
        AllowedIPs=10.84.0.16/32

        # virginia
        [WireGuardPeer]
        PublicKey=OJmUDn1Un9+kq0TYb5Qm7Uo3ZwjWbjio7hJdhKP3Uiw=
        AllowedIPs=10.84.0.2/32
    "#]]
    .assert_eq(&files["nodes/zurich/wireguard.netdev"]);
}

/// Half of a key in the place of a public one: its own public half is in the file.
#[test]
fn a_private_key_in_the_place_of_a_public_one_is_known_by_its_other_half() {
    let private: [u8; 32] = std::array::from_fn(|i| if i == 0 { 0x40 } else { 0x41 });
    let public = PublicKey(x25519_dalek::x25519(private, x25519_dalek::X25519_BASEPOINT_BYTES)).to_string();
    let text = FLEET.replace("OJmUDn1Un9+kq0TYb5Qm7Uo3ZwjWbjio7hJdhKP3Uiw=", &public);
    read(&text);
    let text = text.replace("yI2I0ZVLFN2yK45m/5sOH61rUA3mBGQhQd85oD8ynH8=", &PublicKey(private).to_string());
    let mistakes = refused(&text);
    assert_eq!(mistakes.list.len(), 1, "{mistakes}");
    assert!(mistakes.list[0].what.contains("private half"), "{mistakes}");
}

#[test]
fn a_bundle_is_refused_for_what_policy_check_refuses() {
    let exception = "[[node.exception]]\nname = \"old\"\ntcp = [2222]\nfrom = [\"0.0.0.0/0\"]\nreason = \"once\"\nuntil = \"2026-01-31\"\n";
    let fleet = read(&format!("{FLEET}\n{exception}"));
    let bundle = |name: &str| bundle::bundle(&fleet, fleet.node(name).expect("a node"), &[], today());
    let refused = bundle("singapore").expect_err("an expired exception").to_string();
    assert!(refused.contains("\"old\" expired"), "{refused}");
    let virginia = bundle("virginia").expect("a bundle");
    assert_eq!(bundle::way_in(virginia.admin.as_ref()), "10.84.0.1 to 10.84.0.2, tcp 22");
    assert!(virginia.entries.is_sorted_by(|a, b| a.path < b.path), "{:?}", virginia.entries);
    // A unit that somebody put a key into.
    let key = "PrivateKey = eEQtZGMY5p8MMvYSk6MlwcGUHGPpU+kyjoVKUjTV4mk=\n";
    let secret = bundle::bundle(&fleet, &fleet.nodes[1], &[("etc/x", key)], today())
        .expect_err("a secret")
        .to_string();
    assert_eq!(secret, "etc/x of the bundle is not for others: this looks like a private key");
}

#[test]
fn a_thousand_nodes_are_rendered_within_a_second_of_processor_time() {
    let mut text = FLEET.split("[[node]]\nname = \"virginia\"").next().expect("the hub").to_owned();
    for i in 0..1000u32 {
        let mut key = [7; 32];
        key[..4].copy_from_slice(&i.to_be_bytes());
        text += &format!(
            "[[node]]\nname = \"node-{i}\"\nmesh_address = \"10.85.{}.{}\"\npublic_address = \"2001:db8::{i:x}\"\n\
             public_key = \"{}\"\nregion = \"r{}\"\n[node.metrics]\nport = {}\n",
            i / 250,
            i % 250 + 1,
            PublicKey(key),
            i % 20,
            9000 + i
        );
    }
    let text = text.replace("[\"10.84.0.0/24\"]", "[\"10.84.0.0/15\"]");
    let spent = || rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    let before = spent();
    let fleet = read(&text);
    let files = render::all(&fleet);
    let took_ms = (spent().tv_sec - before.tv_sec) * 1000 + (spent().tv_nsec - before.tv_nsec) / 1_000_000;
    assert_eq!((fleet.nodes.len(), files.len()), (1001, 5009));
    assert!(took_ms < 1000, "{took_ms} ms");
}

#[test]
fn a_selection_takes_who_fits_all_of_it() {
    let fleet = read(FLEET);
    let names = |filter: Filter| match filter.of(&fleet) {
        Ok(nodes) => nodes.iter().map(|node| node.name.as_str()).collect::<Vec<_>>().join(" "),
        Err(error) => error.to_string(),
    };
    let named =
        |names: &[&str]| Filter { names: names.iter().map(|n| n.to_string()).collect(), ..Filter::default() };
    assert_eq!(names(Filter::default()), "zurich virginia singapore");
    assert_eq!(names(named(&["all"])), "zurich virginia singapore");
    assert_eq!(names(named(&["singapore", "zurich"])), "zurich singapore");
    assert_eq!(names(Filter { role: Some(Role::Spoke), ..Filter::default() }), "virginia singapore");
    let aws = Filter { labels: vec![("provider".into(), "aws".into())], ..Filter::default() };
    assert_eq!(names(aws), "virginia");
    assert_eq!(names(named(&["virgina"])), "no node \"virgina\" in fleet.toml; did you mean virginia?");
    let nobody = Filter { region: Some("us-east-1".into()), role: Some(Role::Hub), ..Filter::default() };
    assert_eq!(names(nobody), "no node of fleet.toml is meant by this role, region and labels");
}
