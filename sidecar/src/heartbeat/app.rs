//! The application's own file: a JSON object, written by somebody else's program and believed
//! no further than its types and its age go.

use std::time::Duration;

use serde_json::{Map, Value};

use crate::terms::printable;

/// A file of this size holds something else.
pub const BYTES_MAX: usize = 64 * 1024;
/// What was true so long ago is not known to be.
pub const AGE_MAX: Duration = Duration::from_secs(300);
const TEXT_CHARS_MAX: usize = 64;

#[derive(Clone, Debug, Default, PartialEq)]
pub struct App {
    pub db_size_mb: Option<f64>,
    pub db_integrity: Option<String>,
    pub active_sessions: Option<u64>,
    pub req_1h: Option<u64>,
    pub err_1h: Option<u64>,
    pub cert_days_remaining: Option<i64>,
}

/// Takes it apart. What is of another type is left out, and told in the second value; keys
/// that nobody asked for are the application's own affair.
pub fn decode(bytes: &[u8]) -> (App, Vec<String>) {
    if bytes.len() > BYTES_MAX {
        return (App::default(), vec![format!("app_file is larger than {} KiB", BYTES_MAX / 1024)]);
    }
    let Ok(Value::Object(fields)) = serde_json::from_slice(bytes) else {
        return (App::default(), vec!["app_file is no JSON object".to_owned()]);
    };
    let mut gaps = Vec::new();
    let app = App {
        db_size_mb: field(&fields, "db_size_mb", "a number", &mut gaps, |v| v.as_f64().filter(|n| *n >= 0.0)),
        db_integrity: field(&fields, "db_integrity", "a text, true or false", &mut gaps, |v| match v {
            Value::Bool(whole) => Some(if *whole { "ok" } else { "failed" }.to_owned()),
            Value::String(text) => Some(printable(text, TEXT_CHARS_MAX)),
            _ => None,
        }),
        active_sessions: field(&fields, "active_sessions", "a whole number", &mut gaps, Value::as_u64),
        req_1h: field(&fields, "req_1h", "a whole number", &mut gaps, Value::as_u64),
        err_1h: field(&fields, "err_1h", "a whole number", &mut gaps, Value::as_u64),
        cert_days_remaining: field(
            &fields,
            "cert_days_remaining",
            "a whole number",
            &mut gaps,
            Value::as_i64,
        ),
    };
    (app, gaps)
}

/// Why a file of this age is not believed. `age`: `None` where its time is yet to come.
pub fn stale(age: Option<Duration>) -> Option<String> {
    match age {
        Some(age) if age <= AGE_MAX => None,
        Some(age) => Some(format!("app_file is {} min old", age.as_secs() / 60)),
        None => Some("app_file was written in the future".to_owned()),
    }
}

fn field<T>(
    fields: &Map<String, Value>,
    key: &str,
    wanted: &str,
    gaps: &mut Vec<String>,
    take: impl Fn(&Value) -> Option<T>,
) -> Option<T> {
    let value = fields.get(key).filter(|value| !value.is_null())?;
    let taken = take(value);
    if taken.is_none() {
        gaps.push(format!("{key} in app_file is not {wanted}"));
    }
    taken
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_has_its_type_is_taken_and_the_rest_is_told() {
        let text = br#"{"db_size_mb": 14.25, "db_integrity": true, "active_sessions": 3, "req_1h": 1200, "err_1h": 0,
                        "cert_days_remaining": -2, "password": "s3cr3t", "node": "another"}"#;
        let app = App {
            db_size_mb: Some(14.25),
            db_integrity: Some("ok".into()),
            active_sessions: Some(3),
            req_1h: Some(1200),
            err_1h: Some(0),
            cert_days_remaining: Some(-2),
        };
        assert_eq!(decode(text), (app, vec![]));
        let odd = br#"{"db_size_mb": -1, "db_integrity": "\u001b[31mno", "req_1h": "many", "err_1h": 1.5, "active_sessions": null}"#;
        let (app, gaps) = decode(odd);
        assert_eq!(app, App { db_integrity: Some("\u{fffd}[31mno".into()), ..App::default() });
        assert_eq!(
            gaps,
            [
                "db_size_mb in app_file is not a number",
                "req_1h in app_file is not a whole number",
                "err_1h in app_file is not a whole number"
            ]
        );
    }

    #[test]
    fn what_is_no_object_is_nothing_and_said() {
        for bytes in [&b""[..], b"[]", b"{\"req_1h\": 1", b"\xff\xfe", &b"[".repeat(BYTES_MAX)[..]] {
            assert_eq!(decode(bytes), (App::default(), vec!["app_file is no JSON object".to_owned()]));
        }
        let huge = [&b"{}"[..], &b" ".repeat(BYTES_MAX)].concat();
        assert_eq!(decode(&huge), (App::default(), vec!["app_file is larger than 64 KiB".to_owned()]));
        assert_eq!(stale(Some(AGE_MAX)), None);
        assert_eq!(stale(Some(Duration::from_secs(750))).as_deref(), Some("app_file is 12 min old"));
        assert_eq!(stale(None).as_deref(), Some("app_file was written in the future"));
    }
}
