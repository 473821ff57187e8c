//! ntfy's JSON form: posted to the server's root, so that no header has to carry what is not ASCII.

use std::time::Duration;

use serde::Serialize;

use super::Reply;
use super::notice::{Notice, NoticeKind};
use super::url::{UrlError, parse};
use crate::terms::{Secret, printable};

/// What is longer becomes an attachment.
pub const MESSAGE_BYTES_MAX: usize = 4096;
const TOPIC_CHARS_MAX: usize = 64;
const TITLE_CHARS_MAX: usize = 200;

/// Where to post, what the topic is called, and who we are, if the server asks.
#[derive(Clone, Debug)]
pub struct Topic {
    pub root: Secret,
    topic: Secret,
    pub token: Option<Secret>,
}

impl Topic {
    /// From the text of its file: `https://ntfy.example.org/topic`, and on a second line
    /// perhaps an access token.
    pub fn parse(text: &str) -> Result<Self, UrlError> {
        let (url, token) = parse(text)?;
        let (folder, topic) = url.path.rsplit_once('/').ok_or(UrlError::Topic)?;
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_');
        if topic.is_empty() || topic.len() > TOPIC_CHARS_MAX || !topic.bytes().all(plain) {
            return Err(UrlError::Topic);
        }
        let sound = |token: &Secret| {
            let rest = token.expose().strip_prefix("tk_");
            rest.is_some_and(|rest| !rest.is_empty() && rest.len() <= 256 && rest.bytes().all(plain))
        };
        if !token.as_ref().is_none_or(sound) {
            return Err(UrlError::Token);
        }
        let root = Secret::new(format!("{}{folder}/", url.origin));
        Ok(Self { root, topic: Secret::new(topic.to_owned()), token })
    }

    /// The body of one notice from this node. `late`: how long it had to wait, if that was long.
    pub fn post(&self, node: &str, notice: &Notice, late: Option<Duration>) -> Secret {
        #[derive(Serialize)]
        struct Post<'a> {
            topic: &'a str,
            title: String,
            message: String,
            priority: u8,
            tags: [&'a str; 2],
        }
        let mark = late.map(|late| format!("[late {}] ", minutes(late))).unwrap_or_default();
        let title = format!("{mark}{node}: {} {}", notice.kind.name(), notice.code.name());
        let mut message = format!("{} {}", notice.subject, notice.found);
        if let Some(actor) = &notice.by {
            message.push_str(&format!(" by {actor}"));
        }
        if notice.unspoken > 0 {
            message.push_str(&format!("; changed {} times since it was last told", notice.unspoken));
        }
        // The time stays, whatever was written before it.
        let message = printable(&message, MESSAGE_BYTES_MAX / 4 - 64);
        let post = Post {
            topic: self.topic.expose(),
            title: printable(&title, TITLE_CHARS_MAX),
            message: format!("{message}; at {}", notice.at),
            priority: notice.priority(),
            tags: [tag(notice), notice.code.name()],
        };
        Secret::new(serde_json::to_string(&post).unwrap_or_default())
    }
}

pub fn judge(status: u16, retry_after: Option<u32>) -> Reply {
    match status {
        200 => Reply::Accepted,
        // 507: its disk is full.
        429 | 507 => Reply::TooMany(retry_after),
        201..300 => Reply::NotTheService,
        status => Reply::Status(status),
    }
}

fn tag(notice: &Notice) -> &'static str {
    match (notice.kind, notice.priority()) {
        (NoticeKind::Recovered, _) => "white_check_mark",
        (NoticeKind::Repaired, _) => "wrench",
        (_, 5) => "rotating_light",
        _ => "warning",
    }
}

fn minutes(late: Duration) -> String {
    match late.as_secs() {
        seconds @ 0..120 => format!("{seconds} s"),
        seconds @ 120..7200 => format!("{} min", seconds / 60),
        seconds => format!("{} h", seconds / 3600),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::super::notice::tests::notice;
    use super::*;
    use crate::diff::Severity;

    fn topic() -> Topic {
        Topic::parse("https://ntfy.example.org/s3cr3t-alerts\ntk_abc123\n").expect("a topic")
    }

    fn post(notice: &Notice, late: Option<Duration>) -> Value {
        serde_json::from_str(topic().post("oslo", notice, late).expose()).expect("JSON")
    }

    #[test]
    fn a_notice_goes_to_the_root_with_everything_in_json() {
        assert_eq!(topic().root.expose(), "https://ntfy.example.org/");
        assert_eq!(
            post(&notice(NoticeKind::Appeared, "tcp/0.0.0.0:5432"), None),
            json!({
                "topic": "s3cr3t-alerts",
                "title": "oslo: drift listener-exposed",
                "message": "tcp/0.0.0.0:5432 anyone gets in by postgres (pid 812); at 2026-11-18T11:06:40.000Z",
                "priority": 5,
                "tags": ["rotating_light", "listener-exposed"],
            })
        );
        assert!(!format!("{:?}", topic()).contains("s3cr3t") && !format!("{:?}", topic()).contains("abc123"));
        let below = Topic::parse("http://10.84.0.1:2586/push/alerts").expect("a topic");
        assert_eq!((below.root.expose(), below.token.is_none()), ("http://10.84.0.1:2586/push/", true));
    }

    #[test]
    fn late_and_repeated_ones_say_so() {
        let again = Notice { unspoken: 41, ..notice(NoticeKind::Repaired, "table inet spokeguard") };
        let late = post(&again, Some(Duration::from_secs(750)));
        assert_eq!(late["title"], "[late 12 min] oslo: repaired listener-exposed");
        assert_eq!((&late["priority"], &late["tags"][0]), (&json!(3), &json!("wrench")));
        assert!(late["message"].as_str().is_some_and(|m| m.contains("changed 41 times since")), "{late}");
        assert_eq!(
            (minutes(Duration::from_secs(61)), minutes(Duration::from_secs(9000))),
            ("61 s".into(), "2 h".into())
        );
        let over = post(&notice(NoticeKind::Recovered, "x"), None);
        assert_eq!((&over["priority"], &over["tags"][0]), (&json!(2), &json!("white_check_mark")));
        let high = Notice { severity: Severity::High, ..notice(NoticeKind::Appeared, "x") };
        assert_eq!(
            (&post(&high, None)["priority"], &post(&high, None)["tags"][0]),
            (&json!(4), &json!("warning"))
        );
    }

    #[test]
    fn what_strangers_wrote_neither_grows_nor_breaks_a_notice() {
        let text = "\u{1f512}\"\\\u{1b}[31m\n".repeat(2000);
        let odd = Notice { found: text.clone(), ..notice(NoticeKind::Appeared, &text) };
        let post = post(&odd, Some(Duration::from_secs(9000)));
        let message = post["message"].as_str().expect("a message");
        assert!(message.len() <= MESSAGE_BYTES_MAX, "{}", message.len());
        assert!(!message.contains(['\u{1b}', '\n']) && message.ends_with("Z"), "{message}");
    }

    #[test]
    fn a_file_that_holds_no_topic_is_refused() {
        let long = format!("https://ntfy.example.org/{}", "a".repeat(65));
        for (text, wanted) in [
            ("https://ntfy.example.org", UrlError::Topic),
            ("https://ntfy.example.org/", UrlError::Topic),
            ("https://ntfy.example.org/a.b", UrlError::Topic),
            (long.as_str(), UrlError::Topic),
            ("https://ntfy.example.org/alerts\nhunter2", UrlError::Token),
            ("https://ntfy.example.org/alerts\ntk_a\u{7f}b", UrlError::Token),
            ("ntfy://example.org/alerts", UrlError::Scheme),
        ] {
            assert_eq!(Topic::parse(text).expect_err(text), wanted);
        }
        assert_eq!(judge(200, None), Reply::Accepted);
        assert_eq!(judge(429, Some(9)), Reply::TooMany(Some(9)));
        assert_eq!((judge(404, None), judge(204, None)), (Reply::Status(404), Reply::NotTheService));
    }
}
