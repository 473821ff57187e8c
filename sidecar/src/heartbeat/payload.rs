//! The figures of a beat, under the names that the fleet's dashboards know. What is unknown is
//! left out: a 0 would be a claim.

use serde::Serialize;

use super::app::App;

#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Payload {
    pub node: String,
    /// Memory in use: all but what programs could still have, in MiB.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ram_mb: Option<u64>,
    /// Of the root file system, as `df` counts.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disk_pct: Option<f64>,
    /// Of all processors, since the beat before.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu_pct: Option<f64>,
    /// In MiB.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub db_size_mb: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub db_integrity: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub active_sessions: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub req_1h: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub err_1h: Option<u64>,
    /// Whole days; negative once it has ended.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cert_days_remaining: Option<i64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub nix_gen: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub uptime_s: Option<u64>,
}

impl Payload {
    /// On one line.
    pub fn to_json(&self) -> String {
        // Only maps with odd keys could fail, and there is none.
        serde_json::to_string(self).unwrap_or_default()
    }

    /// With what the application says, where the host has not measured it itself.
    pub fn with(self, app: App) -> Self {
        Self {
            db_size_mb: self.db_size_mb.or(app.db_size_mb),
            db_integrity: self.db_integrity.or(app.db_integrity),
            active_sessions: self.active_sessions.or(app.active_sessions),
            req_1h: self.req_1h.or(app.req_1h),
            err_1h: self.err_1h.or(app.err_1h),
            cert_days_remaining: self.cert_days_remaining.or(app.cert_days_remaining),
            ..self
        }
    }
}

/// To one decimal, which is all that anybody reads.
pub fn tenths(value: f64) -> f64 {
    (value * 10.0).round() / 10.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_unknown_is_left_out_and_what_is_measured_comes_first() {
        let bare = Payload { node: "oslo".into(), ..Payload::default() };
        assert_eq!(bare.to_json(), r#"{"node":"oslo"}"#);
        let app =
            App { db_size_mb: Some(9.0), req_1h: Some(4), db_integrity: Some("ok".into()), ..App::default() };
        let measured = Payload {
            ram_mb: Some(212),
            disk_pct: Some(tenths(41.27)),
            cpu_pct: Some(0.0),
            db_size_mb: Some(14.5),
            cert_days_remaining: Some(-1),
            nix_gen: Some(42),
            uptime_s: Some(86_400),
            ..bare
        };
        assert_eq!(
            measured.with(app).to_json(),
            r#"{"node":"oslo","ram_mb":212,"disk_pct":41.3,"cpu_pct":0.0,"db_size_mb":14.5,"db_integrity":"ok","req_1h":4,"cert_days_remaining":-1,"nix_gen":42,"uptime_s":86400}"#
        );
    }
}
