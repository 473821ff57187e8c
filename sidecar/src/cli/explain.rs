//! `explain CODE`: what a finding means, why it matters, what to do.

use super::{Format, Global};
use crate::diff::{Code, catalogue, explain};

pub fn run(global: &Global, code: Option<&str>) -> anyhow::Result<u8> {
    let codes = match code {
        Some(text) => vec![text.parse::<Code>().map_err(anyhow::Error::msg)?],
        None => Code::ALL.to_vec(),
    };
    let text = match (global.format, code) {
        (Format::Json, _) => {
            let list: Vec<_> =
                codes.iter().map(|c| serde_json::json!({ "code": c.name(), "text": explain(*c) })).collect();
            format!("{}\n", serde_json::to_string_pretty(&list)?)
        }
        (_, Some(_)) => explain(codes[0]),
        (_, None) => {
            format!(
                "spokeguard explain CODE tells more. The severity is the worst it gets.\n\n{}",
                catalogue::list()
            )
        }
    };
    global.print(&text)?;
    Ok(0)
}
