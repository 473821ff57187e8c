//! Events for journald by its own protocol, with fields that a query can name: one datagram,
//! `KEY=value` a line. Few of them, and none that a stranger could make a thousand of but the subject.

use std::io;
use std::os::unix::net::UnixDatagram;
use std::path::Path;

use super::eventlog::{Event, EventKind};
use crate::diff::{Code, Severity};

const SOCKET: &str = "/run/systemd/journal/socket";

/// Gives it to the journal, where that is where our log goes. `false`: it is not, or it could not.
pub(super) fn tell(event: &Event) -> bool {
    std::env::var_os("JOURNAL_STREAM").is_some() && send(Path::new(SOCKET), &entry(event)).is_ok()
}

/// A journal that is full or gone is not waited for.
fn send(socket: &Path, entry: &[u8]) -> io::Result<()> {
    let journal = UnixDatagram::unbound()?;
    journal.set_nonblocking(true)?;
    journal.send_to(entry, socket).map(drop)
}

fn entry(event: &Event) -> Vec<u8> {
    let mut out = Vec::new();
    let mut field = |key: &str, value: &str| {
        if value.contains('\n') {
            // The other form: a length, and then whatever it may be.
            out.extend(key.bytes());
            out.push(b'\n');
            out.extend((value.len() as u64).to_le_bytes());
        } else {
            out.extend(format!("{key}=").bytes());
        }
        out.extend(value.bytes());
        out.push(b'\n');
    };
    field("MESSAGE", &event.to_line());
    field("MESSAGE_ID", message_id(event.kind));
    field("PRIORITY", priority(event));
    field("SYSLOG_IDENTIFIER", "spokeguard");
    field("SPOKEGUARD_EVENT", event.kind.name());
    if let Some(code) = event.code {
        field("SPOKEGUARD_CODE", code.name());
    }
    field("SPOKEGUARD_SUBJECT", &event.subject);
    out
}

fn priority(event: &Event) -> &'static str {
    match (event.kind, event.code.map(Code::severity)) {
        (EventKind::DriftAppeared | EventKind::RepairFailed, Some(Severity::Critical)) => "2",
        (EventKind::DriftAppeared, Some(Severity::High)) | (EventKind::RepairFailed, _) => "3",
        (EventKind::DriftAppeared, Some(Severity::Medium)) => "4",
        (EventKind::PolicyRejected | EventKind::PolicyRolledBack, _) => "4",
        (EventKind::DriftAppeared | EventKind::Repaired | EventKind::Opened, _) => "5",
        _ => "6",
    }
}

/// Random once, and the same for ever: what `journalctl MESSAGE_ID=` and catalogues go by.
const fn message_id(kind: EventKind) -> &'static str {
    match kind {
        EventKind::DriftAppeared => "2f1c0c5b6f0f4c1e9c0a7a3d5e8b1d01",
        EventKind::DriftCleared => "8d3e2b7c94a14f5f8a6d0c1b7e2f4d02",
        EventKind::Repaired => "b6a9d4e03c5748f29e1f7b8c2d0a6e03",
        EventKind::RepairFailed => "5c7f1e8a2b9d4036a4c8e5d7f0b3a904",
        EventKind::Opened => "e1b8c6d27f3a4950b2d9f4a8c6e70105",
        EventKind::Closed => "94d2a7f1c8b64e3db5f0e9a3c7d81206",
        EventKind::Expired => "3a6e9c0f5d1b4872a8e4c7b2f9d02307",
        EventKind::Cut => "c8f5b2e9a0d743618b3f6e1d9c4a5708",
        EventKind::Started => "71e4d9b8c3f2406a95d7a2f8e0b6c109",
        EventKind::Stopped => "d0a7c4f6e9b1423785e2d8c9f3b0a610",
        EventKind::PolicyLoaded => "46b9e2d7f8c04a1ba3f5d6e0c7921811",
        EventKind::PolicyOnTrial => "a9c3f0d8e7b5461290d4b7e6f1a83c12",
        EventKind::PolicyConfirmed => "1d8f6a3c9e0b4725b6c1f2d4a7e95813",
        EventKind::PolicyRolledBack => "f7e0b5d2c6a8493184a9d3e7b0c2f614",
        EventKind::PolicyRejected => "68c2d1e5a4f74b0cb9f3e8a0d5719c15",
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::terms::{Actor, Stamp};

    fn event(kind: EventKind, code: Option<Code>) -> Event {
        Event {
            at: Stamp::from_unix(1_795_000_000),
            kind,
            code,
            subject: "tcp/0.0.0.0:5432".into(),
            found: "anyone gets in\nPRIORITY=0".into(),
            by: Some(Actor { pid: 812, process: "postgres".into(), unit: None, user: None }),
            took_ms: None,
            cycle: 9,
        }
    }

    #[test]
    fn an_event_is_fields_and_no_stranger_adds_one() {
        let dir = tempfile::tempdir().expect("a folder");
        let path = dir.path().join("socket");
        assert!(send(&path, b"x").is_err(), "there is no journal");
        let journal = UnixDatagram::bind(&path).expect("bind");
        let odd = Event {
            subject: "a\nPRIORITY=0".into(),
            ..event(EventKind::DriftAppeared, Some(Code::ListenerExposed))
        };
        send(&path, &entry(&odd)).expect("sent");
        let mut buffer = [0; 4096];
        let length = journal.recv(&mut buffer).expect("a datagram");
        let text = String::from_utf8_lossy(&buffer[..length]).into_owned();
        let expected = "MESSAGE=2026-11-18T11:06:40.000Z drift-appeared listener-exposed a\u{fffd}PRIORITY=0: \
                        anyone gets in\u{fffd}PRIORITY=0, by postgres (pid 812)\n\
                        MESSAGE_ID=2f1c0c5b6f0f4c1e9c0a7a3d5e8b1d01\n\
                        PRIORITY=2\nSYSLOG_IDENTIFIER=spokeguard\nSPOKEGUARD_EVENT=drift-appeared\n\
                        SPOKEGUARD_CODE=listener-exposed\n\
                        SPOKEGUARD_SUBJECT\n\u{c}\0\0\0\0\0\0\0a\nPRIORITY=0\n";
        assert_eq!(text, expected);
    }

    #[test]
    fn each_kind_has_an_identity_of_its_own() {
        use EventKind::*;
        let kinds = [
            DriftAppeared,
            DriftCleared,
            Repaired,
            RepairFailed,
            Opened,
            Closed,
            Expired,
            Cut,
            Started,
            Stopped,
            PolicyLoaded,
            PolicyOnTrial,
            PolicyConfirmed,
            PolicyRolledBack,
            PolicyRejected,
        ];
        let ids: BTreeSet<&str> = kinds.into_iter().map(message_id).collect();
        assert_eq!(ids.len(), kinds.len());
        assert!(ids.iter().all(|id| id.len() == 32 && id.bytes().all(|b| b.is_ascii_hexdigit())), "{ids:?}");
        let of = |kind, code| priority(&event(kind, code)).to_owned();
        assert_eq!(of(DriftAppeared, Some(Code::ListenerExposed)), "2");
        assert_eq!(of(DriftCleared, Some(Code::ListenerExposed)), "6");
        assert_eq!((of(Started, None), of(Repaired, Some(Code::FirewallMissing))), ("6".into(), "5".into()));
    }
}
