//! The sealed rules: the last confirmed policy as one file for `nft -f`, for a boot that
//! has none of our code. It names no interface by number, so it loads before there are
//! any; loading it again changes nothing and keeps what counters counted.
//!
//! An [[exception]] is in it with its end, which the kernel itself judges by the clock: an
//! emergency way in is there when the daemon does not come up, and closes on its last day
//! (UTC) though nobody is left to close it.

use crate::desired::Desired;
use crate::policy::{self, Mesh};
use crate::ruleset::render;

/// Its name in the state directory.
pub const FILE: &str = "sealed.nft";

/// The name of [`tunnel`] there.
pub const TUNNEL_FILE: &str = "tunnel.nft";

/// The file; `None` where the policy wants no table. The same policy gives the same file,
/// whatever the day.
pub fn text(desired: &Desired) -> Option<String> {
    text_as(desired, &policy::fingerprint(&desired.policy))
}

/// The same where the policy's fingerprint is known.
pub(super) fn text_as(desired: &Desired, fingerprint: &str) -> Option<String> {
    let table = render::table(&desired.sealed()?);
    Some(format!(
        "# The last confirmed rules of spokeguard, for `nft -f`; needs nothing else of it.\n\
         # Written anew with every confirmation: changes belong into the policy.\n\
         # node {}\n# policy {fingerprint}\n# sum {}\n{table}",
        crate::terms::printable(&desired.policy.node.name, 64),
        policy::sum(&table)
    ))
}

/// What the rules that shut a host at boot (`contrib/systemd/shut.nft`), whose sealed ones can't be loaded,
/// need to let this host's own tunnel in. It only ever adds to them: cut off or lost, it opens nothing.
pub fn tunnel(mesh: &Mesh) -> String {
    let interface = format!("insert rule inet spokeguard shut iifname \"{}\" accept\n", mesh.interface);
    let port =
        mesh.listen_port.map(|port| format!("insert rule inet spokeguard shut udp dport {port} accept\n"));
    format!(
        "# This host's tunnel, for the rules of spokeguard-shut.service; written by spokeguard.\n\
         {interface}{}",
        port.unwrap_or_default()
    )
}

/// Whether the file is whole: its sum is that of its rules.
pub fn is_whole(text: &str) -> bool {
    let mut rest = text;
    let mut sum = None;
    while let Some((line, after)) = rest.split_once('\n').filter(|(line, _)| line.starts_with('#')) {
        sum = line.strip_prefix("# sum ").or(sum);
        rest = after;
    }
    sum == Some(policy::sum(rest).as_str())
}

/// The fingerprint of the policy that a whole file is of.
pub fn policy(text: &str) -> Option<&str> {
    let mut head = text.lines().take_while(|line| line.starts_with('#'));
    head.find_map(|line| line.strip_prefix("# policy "))
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;
    use crate::desired::samples;
    use crate::terms::Port;

    /// Of contrib: what `tunnel` adds to.
    const SHUT: &str = include_str!("../../../contrib/systemd/shut.nft");

    #[test]
    fn a_tunnel_is_let_in_by_its_name_and_port() {
        let mut mesh = samples::spoke().mesh;
        mesh.interface = "mesh7".to_owned();
        mesh.listen_port = None;
        let text = tunnel(&mesh);
        assert!(text.contains("shut iifname \"mesh7\" accept\n") && !text.contains("udp"), "{text}");
        mesh.listen_port = Port::new(4500);
        assert!(tunnel(&mesh).contains("shut udp dport 4500 accept\n"));
    }

    #[test]
    fn needs_root_a_tunnel_that_is_cut_off_anywhere_opens_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let (shut, cut) = (folder.path().join("shut.nft"), folder.path().join("tunnel.nft"));
        std::fs::write(&shut, SHUT).unwrap();
        let mut mesh = samples::spoke().mesh;
        (mesh.interface, mesh.listen_port) = ("mesh7".to_owned(), Port::new(4500));
        let whole = tunnel(&mesh);
        let script = "nft -f $1 && { nft -f $2; nft list chain inet spokeguard shut; }";
        let loaded = |text: &str| {
            std::fs::write(&cut, text).unwrap();
            let mut unshare = Command::new("unshare");
            unshare.args(["--net", "sh", "-c", script, "sh"]).args([&shut, &cut]);
            let output = unshare.output().unwrap();
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            String::from_utf8(output.stdout).unwrap()
        };
        let lines = |text: &str| text.lines().map(str::to_owned).collect::<Vec<_>>();
        let added = ["\t\tudp dport 4500 accept", "\t\tiifname \"mesh7\" accept"];
        let without = lines(&loaded(""));
        for length in 0..=whole.len() {
            let with = lines(&loaded(&whole[..length]));
            let more: Vec<_> = with.iter().filter(|line| !without.contains(line)).collect();
            let harmless = |line: &String| added.contains(&&**line) || !line.contains("accept");
            assert!(more.iter().all(|line| harmless(line)), "{length}: {more:?}");
            assert!(without.iter().all(|line| with.contains(line)), "{length}: {with:?}");
            if length == whole.len() {
                assert_eq!(more, added);
            }
        }
    }
}
