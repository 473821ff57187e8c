//! A policy of the contract's size, with every section that the contract names.

use anyhow::Result;
use lab::Lab;

/// Where the exporter that is measured beside ours listens; the policy lets the mesh in.
pub const EXPORTER: u16 = 9100;
pub const METRICS: u16 = 9984;

pub fn of_the_contracts_size(lab: &Lab) -> Result<String> {
    let secret = lab.file("production.env", "TOKEN=none\n")?;
    std::fs::set_permissions(&secret, std::os::unix::fs::PermissionsExt::from_mode(0o600))?;
    Ok(format!(
        r#"{}
[[mesh.service]]
name = "netdata"
tcp = [19999]
from = "mesh"
[[mesh.service]]
name = "node-exporter"
tcp = [{EXPORTER}]
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
until = "2099-01-31"
[[file]]
path = "{}"
mode = "0600"
[enforce]
mode = "enforce"
firewall = true
binds = true
keepalive = true
confirm_within = "60s"
[metrics]
port = {METRICS}
"#,
        lab.policy(),
        secret.display()
    ))
}

/// The rules in a listing by nft: neither sets, chains nor counters.
pub fn rules_in(listing: &str) -> usize {
    let (mut rules, mut chain) = (0, false);
    for line in listing.lines().map(str::trim) {
        match line {
            "}" => chain = false,
            _ if line.starts_with("chain ") => chain = true,
            _ if line.is_empty() || line.starts_with("type ") => {}
            _ => rules += usize::from(chain),
        }
    }
    rules
}

#[cfg(test)]
mod tests {
    #[test]
    fn only_the_rules_of_chains_are_counted() {
        let listing = "table inet x {\n\tcounter c {\n\t\tpackets 0 bytes 0\n\t}\n\n\tchain in {\n\
                       \t\ttype filter hook input priority 0; policy accept;\n\t\tct state established accept\n\
                       \t\ttcp dport 22 drop\n\t}\n}\n";
        assert_eq!(super::rules_in(listing), 2);
    }
}
