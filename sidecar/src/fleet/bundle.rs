//! All that one node needs, as the files of an archive, and the proof that it may be handed
//! over: the policy reads as it was meant, somebody gets in, and nothing in it is secret.

use std::collections::BTreeSet;
use std::fmt::Write;

use ipnet::IpNet;
use jiff::civil::Date;

use super::{Inventory, Node, render, secrets};
use crate::desired::{AdminPath, Desired, NoAdminPath};
use crate::policy::{self, MeshKind, Mistakes};
use crate::terms::PublicKey;

/// The daemon's unit where Debian's package puts it.
pub const PACKAGED: &str = "usr/lib/systemd/system/spokeguard.service";

/// One file of a bundle.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Below the bundle's own directory; what follows `etc/` is where it goes on the node.
    pub path: String,
    /// As `chmod` takes it.
    pub mode: u32,
    pub text: String,
    /// Whether every node gets it at its place; else it is one of several ways, or read here.
    pub placed: bool,
}

/// A bundle that passed.
#[derive(Clone, Debug, PartialEq)]
pub struct Bundle {
    /// The node's name, which is that of the directory in the archive.
    pub name: String,
    /// Sorted by path.
    pub entries: Vec<Entry>,
    /// Who reaches sshd; `None` where the policy says that nobody has to.
    pub admin: Option<AdminPath>,
}

/// Why there is no bundle.
#[derive(Debug, thiserror::Error)]
pub enum Refused {
    #[error(transparent)]
    Policy(#[from] Mistakes),
    #[error("the policy of {node} reads back as another one: this is a bug, please report it")]
    Changed { node: String },
    #[error("{node}: {source}")]
    NoAdminPath { node: String, source: NoAdminPath },
    #[error("{path} of the bundle is not for others: {what}")]
    Secret { path: String, what: &'static str },
}

/// `units` are the drop-ins that every node gets, by path below `/`.
pub fn bundle(
    inventory: &Inventory,
    node: &Node,
    units: &[(&str, &str)],
    today: Date,
) -> Result<Bundle, Refused> {
    let name = node.name.clone();
    let files = render::of_node(inventory, node);
    let file = |last: &str| files.get(&format!("nodes/{name}/{last}")).cloned().unwrap_or_default();
    let text = file("policy.toml");
    let loaded = policy::parse(&text, &format!("nodes/{name}/policy.toml"), today)?;
    if let Some(expired) = loaded.expired() {
        return Err(expired.into());
    }
    if render::policy_text(&loaded.policy) != render::policy_text(&node.policy) {
        return Err(Refused::Changed { node: name });
    }
    let admin = Desired::new(loaded.policy, today)
        .map_err(|source| Refused::NoAdminPath { node: name.clone(), source })?
        .admin;
    let entry = |path: String, mode, text, placed| Entry { path, mode, text, placed };
    let mut entries = vec![
        entry("README.txt".into(), 0o644, readme(inventory, node, admin.as_ref()), false),
        entry("etc/spokeguard/policy.toml".into(), 0o644, text, true),
    ];
    entries
        .extend(units.iter().map(|(path, text)| entry((*path).to_owned(), 0o644, (*text).to_owned(), true)));
    if inventory.mesh.kind == MeshKind::Wireguard {
        let interface = &node.policy.mesh.interface;
        // wg-quick warns of one that others can read.
        entries.push(entry(
            format!("wg-quick/etc/wireguard/{interface}.conf"),
            0o600,
            file("wireguard.conf"),
            false,
        ));
        for end in ["netdev", "network"] {
            let path = format!("networkd/etc/systemd/network/60-{interface}.{end}");
            entries.push(entry(path, 0o644, file(&format!("wireguard.{end}")), false));
        }
        entries.push(entry("nix/wireguard.json".into(), 0o644, file("wireguard.json"), false));
    }
    entries.push(entry("nix/node.json".into(), 0o644, render::nix_node(inventory, node), false));
    entries.sort_by(|a, b| a.path.cmp(&b.path));
    let known: BTreeSet<PublicKey> = inventory.nodes.iter().filter_map(|node| node.public_key).collect();
    for Entry { path, text, .. } in &entries {
        if let Some(secret) = secrets::find(text, &known).first() {
            return Err(Refused::Secret { path: path.clone(), what: secret.what });
        }
    }
    Ok(Bundle { name, entries, admin })
}

/// The way in, for people: "10.84.0.1 to 10.84.0.2, tcp 22".
pub fn way_in(admin: Option<&AdminPath>) -> String {
    let Some(AdminPath { from, to, within, port }) = admin else {
        return "none, as its policy allows".to_owned();
    };
    let short = |net: &IpNet| net.to_string().replace("/32", "").replace("/128", "");
    let from: Vec<String> = from.iter().map(short).collect();
    let to =
        to.iter().map(|to| to.to_string()).chain(within.iter().map(|net| format!("its address in {net}")));
    format!("{} to {}, tcp {port}", from.join(", "), to.collect::<Vec<_>>().join(", "))
}

fn readme(inventory: &Inventory, node: &Node, admin: Option<&AdminPath>) -> String {
    let Node { name, policy, .. } = node;
    let mut out = format!(
        "{name}, of the fleet {}: what its machine needs. Nothing in here is secret.\n\n\
         Way in by this policy: {}\n\n\
         etc/             copy onto /etc: the policy, and drop-ins by which sshd waits for\n                 \
         the mesh address\n",
        inventory.name,
        way_in(admin)
    );
    if inventory.mesh.kind == MeshKind::Wireguard {
        let (interface, key) = (&policy.mesh.interface, render::private_key_path(policy));
        let _ = write!(
            out,
            "wg-quick/etc/    the tunnel for wg-quick@{interface}.service, or\n\
             networkd/etc/    the tunnel for systemd-networkd (not both)\n\
             nix/             the same for NixOS:\n                   \
             networking.wireguard.interfaces = (builtins.fromJSON\n                     \
             (builtins.readFile ./nix/wireguard.json)).interfaces;\n\n\
             The private key is not in here. Put it on the node as {key},\n\
             mode 0600 (`spokeguard fleet keygen {name} --private-key FILE` makes one).\n",
        );
    } else {
        out.push_str("nix/             variables of the node\n\nTailscale keeps its own keys: run `tailscale up` on the node.\n");
    }
    let _ = write!(
        out,
        "\nThen, on the node (not on NixOS, whose module does it):\n  \
         spokeguard policy check && spokeguard install\n\
         or, with the Debian package, whose units are there already:\n  \
         spokeguard policy check && systemctl restart spokeguard\n\
         Its rules are on trial until somebody comes in anew through the tunnel, or says\n  \
         spokeguard confirm\n"
    );
    out
}

/// As user data of cloud-init: the files that every node gets, the tunnel for wg-quick, and
/// the start.
pub fn cloud_init(bundle: &Bundle) -> String {
    let mut out = format!(
        "#cloud-config\n# {}, by `spokeguard fleet bundle`. Nothing in here is secret.\nwrite_files:\n",
        bundle.name
    );
    let mut tunnel = None;
    for Entry { path, mode, text, placed } in &bundle.entries {
        let place = path.strip_prefix("wg-quick/");
        tunnel =
            tunnel.or(place.and_then(|place| place.strip_prefix("etc/wireguard/")?.strip_suffix(".conf")));
        let Some(place) = place.or(placed.then_some(path.as_str())) else { continue };
        let _ = write!(
            out,
            "  - path: /{place}\n    owner: root:root\n    permissions: \"{mode:04o}\"\n    content: "
        );
        out.push_str(&scalar(text));
    }
    out.push_str("runcmd:\n  - [systemctl, daemon-reload]\n");
    if let Some(interface) = tunnel {
        let _ = write!(
            out,
            "  # Comes up by `systemctl start`, or at the next boot, once its private key is there, by the secrets of your choice.\n  \
             - [systemctl, enable, \"wg-quick@{interface}.service\"]\n"
        );
    }
    // `install` refuses where the Debian package has put the units in place.
    let _ = writeln!(
        out,
        "  # On trial: where nobody comes through the tunnel in time, as none does before it is up, the rules go back and are\n  \
         # not tried again by themselves. Then, with the tunnel up: spokeguard apply --wait\n  \
         - [sh, -c, \"if [ -e /{} ]; then spokeguard policy check && systemctl restart spokeguard; \
         elif command -v spokeguard; then spokeguard policy check && spokeguard install; \
         else echo 'spokeguard is not in this image' >&2; exit 1; fi\"]",
        PACKAGED
    );
    out
}

/// A text in YAML: a block where it is plain, in quotes where a line break may hide in it.
fn scalar(text: &str) -> String {
    let plain = text.ends_with('\n')
        && !text.ends_with("\n\n")
        && !text.starts_with([' ', '\n'])
        && text.chars().all(|c| c == '\n' || (' '..='~').contains(&c));
    if plain {
        let lines = text
            .lines()
            .map(|line| if line.is_empty() { "\n".to_owned() } else { format!("      {line}\n") });
        return "|\n".to_owned() + &lines.collect::<String>();
    }
    let mut out = String::from("\"");
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            ' '..='~' => out.push(c),
            other => {
                let _ = write!(out, "\\U{:08x}", u32::from(other));
            }
        }
    }
    out + "\"\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_that_could_end_its_block_is_quoted() {
        assert_eq!(scalar("a: b\n\n# c\n"), "|\n      a: b\n\n      # c\n");
        for strange in
            ["no end", "two ends\n\n", " indented\n", "a\u{2028}b: c\n", "t\tab\n", "\u{1f600}\n", ""]
        {
            let text = scalar(strange);
            assert!(text.starts_with('"') && text.ends_with("\"\n") && text.is_ascii(), "{text}");
        }
        assert_eq!(scalar("a\u{2028}\"\\\n"), "\"a\\U00002028\\\"\\\\\\n\"\n");
    }
}
