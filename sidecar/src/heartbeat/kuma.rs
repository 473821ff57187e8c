//! Uptime Kuma's push monitors, as they really are: a GET whose query is all that is read (a
//! body is thrown away, and 1.x has no other method), and a yes only where JSON says so,
//! since a wrong path is answered by 200 and a page.

use std::fmt::Write as _;

use super::url::{UrlError, parse};
use super::{Payload, Reply};
use crate::diff::{Finding, Severity};
use crate::report::{Report, Verdict};
use crate::terms::{Secret, printable};

/// What Kuma's column takes whole.
pub const MESSAGE_CHARS_MAX: usize = 6000;
/// Node reads 16 KiB of request head, and some of it is headers.
pub const URL_BYTES_MAX: usize = 15 * 1024;
const FINDINGS_MAX: usize = 12;
const TEXT_CHARS_MAX: usize = 160;

/// Where to push to. Holds a token.
#[derive(Clone, Debug)]
pub struct Monitor(Secret);

impl Monitor {
    /// From the text of its file: the URL as Kuma shows it, with or without its query.
    pub fn parse(text: &str) -> Result<Self, UrlError> {
        let (url, _) = parse(text)?;
        if url.path.len() < 2 {
            return Err(UrlError::Path);
        }
        Ok(Self(Secret::new(format!("{}{}", url.origin, url.path))))
    }

    /// The whole request. `ping_ms`: round trip through the tunnel, left out where unknown.
    pub fn push(&self, report: &Report, payload: &Payload, gaps: &[String], ping_ms: Option<f64>) -> Secret {
        let word = if is_up(report) { "up" } else { "down" };
        let mut url = format!("{}?status={word}", self.0.expose());
        if let Some(ping) = ping_ms.filter(|ping| (0.0..1e6).contains(ping)) {
            let _ = write!(url, "&ping={ping:.2}");
        }
        url.push_str("&msg=");
        let json = payload.to_json();
        let mut tail = String::new();
        encode(&json, &mut tail);
        // The payload goes whole; of the words before it, what there is room for.
        let mut chars = MESSAGE_CHARS_MAX.saturating_sub(json.chars().count() + 1);
        let mut bytes = URL_BYTES_MAX.saturating_sub(url.len() + tail.len() + 3);
        let mut one = String::new();
        for c in headline(report, gaps).chars() {
            one.clear();
            encode(c.encode_utf8(&mut [0; 4]), &mut one);
            if chars == 0 || bytes < one.len() {
                break;
            }
            (chars, bytes) = (chars - 1, bytes - one.len());
            url.push_str(&one);
        }
        url.push_str("%20");
        url.push_str(&tail);
        Secret::new(url)
    }
}

/// Whether Kuma shows this node as up. A difference of low or medium severity wakes nobody; what
/// could not be looked at is not called fine.
pub fn is_up(report: &Report) -> bool {
    let grave = |finding: &Finding| finding.is_drift() && finding.severity <= Severity::High;
    report.verdict != Verdict::Unknown && !report.findings.iter().any(grave)
}

/// The verdict in one line, worst first. Alerts show it.
pub fn headline(report: &Report, gaps: &[String]) -> String {
    let open: Vec<&Finding> = report.findings.iter().filter(|finding| finding.is_drift()).collect();
    let plural = if open.len() == 1 { "" } else { "s" };
    let mut text = format!("{}: {} finding{plural}", report.verdict.name(), open.len());
    for finding in open.iter().take(FINDINGS_MAX) {
        let _ = write!(text, "; {} {} {}", finding.severity.name(), finding.code.name(), finding.subject);
        if let Some(actor) = &finding.by {
            let _ = write!(text, " by {actor}");
        }
    }
    if open.len() > FINDINGS_MAX {
        let _ = write!(text, "; and {} more", open.len() - FINDINGS_MAX);
    }
    for blind in &report.blind {
        let _ = write!(text, "; blind {}: {}", blind.facet.name(), printable(&blind.reason, TEXT_CHARS_MAX));
    }
    for gap in gaps {
        let _ = write!(text, "; {gap}");
    }
    printable(&text, MESSAGE_CHARS_MAX)
}

/// What an answer says. Of the body, the first few KiB are enough.
pub fn judge(status: u16, content_type: &str, body: &[u8]) -> Reply {
    #[derive(serde::Deserialize)]
    struct Answer {
        ok: bool,
    }
    let json = content_type
        .split(';')
        .next()
        .is_some_and(|kind| kind.trim().eq_ignore_ascii_case("application/json"));
    let answer = json.then(|| serde_json::from_slice::<Answer>(body).ok()).flatten();
    match (status, answer) {
        (200, Some(Answer { ok: true })) => Reply::Accepted,
        (404, Some(Answer { ok: false })) => Reply::NoMonitor,
        (429, _) => Reply::TooMany(None),
        (200..300, _) => Reply::NotTheService,
        (status, _) => Reply::Status(status),
    }
}

/// Percent-encoding of everything that a query could take for its own.
fn encode(text: &str, out: &mut String) {
    for byte in text.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => out.push(char::from(byte)),
            _ => {
                let _ = write!(out, "%{byte:02X}");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{finding, report};
    use super::*;
    use crate::diff::Code;
    use crate::observed::Facet;
    use crate::report::Blind;

    const URL: &str = "https://kuma.example.org/api/push/s3cr3t?status=up&msg=OK&ping=\n";

    fn decoded(url: &str) -> String {
        let query = url.split_once("msg=").expect("a message").1;
        let mut bytes = Vec::new();
        let mut rest = query.bytes();
        while let Some(byte) = rest.next() {
            let mut digit =
                || char::from(rest.next().expect("a digit")).to_digit(16).expect("hexadecimal") as u8;
            bytes.push(if byte == b'%' { digit() << 4 | digit() } else { byte });
        }
        String::from_utf8(bytes).expect("text")
    }

    #[test]
    fn a_push_has_status_ping_and_the_payload_in_its_message() {
        let monitor = Monitor::parse(URL).expect("a monitor");
        let payload = Payload { node: "oslo".into(), ram_mb: Some(120), ..Payload::default() };
        let url = monitor.push(&report(&[]), &payload, &[], Some(12.345));
        let start =
            "https://kuma.example.org/api/push/s3cr3t?status=up&ping=12.35&msg=ok%3A%200%20findings%20%7B";
        assert!(url.expose().starts_with(start), "{}", url.expose());
        assert_eq!(decoded(url.expose()), r#"ok: 0 findings {"node":"oslo","ram_mb":120}"#);
        // Unknown is left out, and what is no number is unknown.
        for ping in [None, Some(f64::NAN), Some(-1.0)] {
            let url = monitor.push(&report(&[]), &payload, &[], ping);
            assert!(!url.expose().contains("ping"), "{}", url.expose());
        }
        assert!(!format!("{monitor:?}").contains("s3cr3t"));
    }

    #[test]
    fn what_is_grave_or_unseen_is_down_and_the_rest_only_told() {
        let exposed = finding(Code::ListenerExposed, Severity::Critical, "tcp/0.0.0.0:5432");
        let mode = finding(Code::FileMode, Severity::Medium, "/etc/vault.env");
        assert!(is_up(&report(&[])) && is_up(&report(std::slice::from_ref(&mode))));
        assert!(!is_up(&report(&[mode.clone(), exposed.clone()])));
        let accepted = Finding { accepted: true, ..exposed.clone() };
        assert!(is_up(&report(&[accepted])));
        let mut blind = report(&[]);
        blind.verdict = Verdict::Unknown;
        blind.blind = vec![Blind { facet: Facet::Wireguard, reason: "no such device".into() }];
        assert!(!is_up(&blind));
        let gaps = ["app_file is 12 min old".to_owned()];
        assert_eq!(
            headline(&blind, &gaps),
            "unknown: 0 findings; blind wireguard: no such device; app_file is 12 min old"
        );
        assert_eq!(
            headline(&report(&[exposed, mode]), &[]),
            "drift: 2 findings; critical listener-exposed tcp/0.0.0.0:5432 by postgres (pid 812); \
             medium file-mode /etc/vault.env by postgres (pid 812)"
        );
    }

    #[test]
    fn however_much_there_is_to_say_the_url_stays_short_and_the_payload_whole() {
        let monitor = Monitor::parse(URL).expect("a monitor");
        let payload = Payload {
            node: "node\"{%&#".repeat(7),
            db_integrity: Some("é".repeat(64)),
            ..Payload::default()
        };
        for text in ["x".repeat(200), "\u{1f512}".repeat(200)] {
            let many = vec![finding(Code::ListenerExposed, Severity::Critical, &text); 900];
            let gaps = vec![text.clone(); 90];
            let url = monitor.push(&report(&many), &payload, &gaps, Some(1.0));
            assert!(url.expose().len() <= URL_BYTES_MAX, "{}", url.expose().len());
            let message = decoded(url.expose());
            assert!(message.chars().count() <= MESSAGE_CHARS_MAX, "{}", message.chars().count());
            assert!(message.ends_with(&format!(" {}", payload.to_json())), "{message}");
            assert!(message.starts_with("drift: 900 findings; critical"), "{message}");
        }
    }

    #[test]
    fn only_json_that_says_ok_is_a_yes() {
        let json = "application/json; charset=utf-8";
        let yes = br#"{"ok":true}"#;
        let cases: [(u16, &str, &[u8], Reply); 12] = [
            (200, json, yes, Reply::Accepted),
            (200, "Application/JSON", yes, Reply::Accepted),
            (200, "text/html", b"<!DOCTYPE html>", Reply::NotTheService),
            (200, "text/html", yes, Reply::NotTheService),
            (200, json, br#"{"ok":false}"#, Reply::NotTheService),
            (200, json, br#"{"ok":"true"}"#, Reply::NotTheService),
            (200, json, br#"[[[[[[[["#, Reply::NotTheService),
            (404, json, br#"{"ok":false,"msg":"Monitor not found or not active."}"#, Reply::NoMonitor),
            (404, "text/html", b"Cannot POST", Reply::Status(404)),
            (302, json, yes, Reply::Status(302)),
            (429, "", b"", Reply::TooMany(None)),
            (500, json, yes, Reply::Status(500)),
        ];
        for (status, kind, body, wanted) in cases {
            assert_eq!(judge(status, kind, body), wanted, "{status} {kind} {body:?}");
        }
    }

    #[test]
    fn a_file_that_holds_no_push_url_is_refused_without_being_quoted() {
        for (text, wanted) in [
            ("", UrlError::Empty),
            ("\n \n", UrlError::Empty),
            ("kuma.example.org/api/push/s3cr3t", UrlError::Scheme),
            ("file:///etc/shadow", UrlError::Scheme),
            ("https://", UrlError::Host),
            ("https://:443/api/push/s3cr3t", UrlError::Host),
            ("https://ops:s3cr3t@kuma/api/push/x", UrlError::User),
            ("https://kuma.example.org", UrlError::Path),
            ("https://kuma.example.org/?s3cr3t", UrlError::Path),
            ("https://kuma.example.org/api/push/s3c r3t", UrlError::Character),
            ("https://kuma.example.org/api\u{7}/s3cr3t", UrlError::Character),
        ] {
            let error = Monitor::parse(text).expect_err(text);
            assert_eq!(error, wanted, "{text}");
            assert!(!format!("{error} {error:?}").contains("s3cr3t"));
        }
        assert_eq!(
            Monitor::parse(&format!("https://{}/x", "k".repeat(3000))).expect_err("long"),
            UrlError::TooLong
        );
        assert!(Monitor::parse("http://[fd84::1]:3001/api/push/x").is_ok());
    }
}
