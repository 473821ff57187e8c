//! Findings about open doors -> labels that an alert can name: protocol, port and process.
//! All three are bounded in form and number, whatever a process calls itself.

use std::collections::BTreeSet;

use super::{Labels, OTHER};
use crate::diff::{Code, Finding, Severity};
use crate::terms::{Port, Proto};

/// Longest `comm` of the kernel.
const PROCESS_MAX: usize = 15;

/// Where no process was seen: a published port, or an owner that has gone.
const NOBODY: &str = "unknown";

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Row {
    port: u16,
    proto: Proto,
    process: String,
}

impl Row {
    pub(super) fn labels(&self) -> Labels {
        vec![
            ("proto", self.proto.name().to_owned()),
            ("port", self.port.to_string()),
            ("process", self.process.clone()),
        ]
    }
}

/// What strangers get in at, the lowest ports first. IPv4 and IPv6, socket and probe share a row.
pub(super) fn rows(findings: &[Finding]) -> BTreeSet<Row> {
    findings.iter().filter(|finding| !finding.accepted && is_open(finding)).filter_map(row).collect()
}

/// The milder ones of these codes are held by a firewall.
fn is_open(finding: &Finding) -> bool {
    let doors = [Code::ListenerExposed, Code::AuditExposed, Code::DnatExposed, Code::SshBind];
    doors.contains(&finding.code) && finding.severity <= Severity::High
}

/// From subjects as `diff` words them: "tcp/[::]:5432", "udp/198.51.100.7:53-99" and
/// "tcp/8080 -> 172.17.0.2:80". Of a range, the first port.
fn row(finding: &Finding) -> Option<Row> {
    let (proto, rest) = finding.subject.split_once('/')?;
    let proto = Proto::ALL.into_iter().find(|known| known.name() == proto)?;
    let asked = rest.split_once(" -> ").map_or(rest, |(asked, _)| asked);
    let ports = asked.rsplit_once(':').map_or(asked, |(_, ports)| ports);
    let first = ports.split_once('-').map_or(ports, |(first, _)| first);
    let port = Port::new(first.parse().ok()?)?.get();
    let process = finding.by.as_ref().map_or(NOBODY, |by| tame(&by.process)).to_owned();
    Some(Row { port, proto, process })
}

fn tame(process: &str) -> &str {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    let fits = (1..=PROCESS_MAX).contains(&process.len()) && process.bytes().all(plain);
    if fits { process } else { OTHER }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::terms::Actor;

    fn finding(code: Code, severity: Severity, subject: &str, process: Option<&str>) -> Finding {
        let by = process.map(|process| Actor { pid: 812, process: process.into(), unit: None, user: None });
        Finding::new(code, severity, subject, "closed", "open", "Close it.").held_by(by.as_ref())
    }

    fn told(findings: &[Finding]) -> Vec<String> {
        rows(findings)
            .iter()
            .map(|row| format!("{} {} {}", row.proto.name(), row.port, row.process))
            .collect()
    }

    #[test]
    fn every_wording_of_an_open_door_gives_its_port() {
        use Code::{AuditExposed, DnatExposed, ListenerExposed, SshBind};
        use Severity::{Critical, High};
        let findings = [
            finding(ListenerExposed, Critical, "tcp/0.0.0.0:5432", Some("postgres")),
            finding(ListenerExposed, Critical, "tcp/[::]:5432", Some("postgres")),
            finding(AuditExposed, Critical, "udp/[2001:db8::7]:53-99", Some("evil\u{1b}[2J")),
            finding(DnatExposed, Critical, "tcp/8080 -> 172.17.0.2:8000", None),
            finding(DnatExposed, Critical, "tcp/9000-9010 -> 172.17.0.2:8000", None),
            finding(SshBind, High, "tcp/0.0.0.0:22", Some("sshd")),
        ];
        let expected =
            ["tcp 22 sshd", "udp 53 other", "tcp 5432 postgres", "tcp 8080 unknown", "tcp 9000 unknown"];
        assert_eq!(told(&findings), expected);
    }

    #[test]
    fn what_a_firewall_holds_or_the_policy_declares_is_not_exposed() {
        let mut declared =
            finding(Code::ListenerExposed, Severity::Critical, "tcp/0.0.0.0:2222", Some("sshd"));
        declared.accepted = true;
        let findings = [
            declared,
            finding(Code::DnatExposed, Severity::Low, "tcp/8080 -> 172.17.0.2:80", None),
            finding(Code::SshBind, Severity::Medium, "tcp/0.0.0.0:22", Some("sshd")),
            finding(Code::ListenerWide, Severity::High, "tcp/0.0.0.0:5432", Some("postgres")),
            finding(Code::ListenerExposed, Severity::Critical, "tcp/0.0.0.0:0", Some("x")),
            finding(Code::ListenerExposed, Severity::Critical, "tcp/0.0.0.0:70000", Some("x")),
            finding(Code::ListenerExposed, Severity::Critical, "sctp/0.0.0.0:80", Some("x")),
            finding(Code::ListenerExposed, Severity::Critical, "", Some("x")),
        ];
        assert_eq!(told(&findings), [""; 0]);
    }

    #[test]
    fn a_process_is_called_by_its_name_if_that_is_a_plain_one() {
        let names = ["", "a name", "sixteen-letters-", "fifteen.letters", "\u{e9}"];
        let expected = ["tcp 1 other", "tcp 2 other", "tcp 3 other", "tcp 4 fifteen.letters", "tcp 5 other"];
        let door = |(port, name): (u16, &str)| {
            let subject = format!("tcp/0.0.0.0:{port}");
            finding(Code::ListenerExposed, Severity::Critical, &subject, Some(name))
        };
        let odd: Vec<Finding> = (1..).zip(names).map(door).collect();
        assert_eq!(told(&odd), expected);
    }
}
