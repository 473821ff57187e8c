//! `explain CODE`: what a finding means, why it matters, what to do.

use super::{Format, Global};
use crate::diff::{Code, explain};

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
        (Format::Text, Some(_)) => explain(codes[0]),
        (Format::Text, None) => {
            let mut text = String::from("spokeguard explain CODE tells what each of these means:\n\n");
            for code in codes {
                let first = explain(code);
                let summary = first.lines().next().unwrap_or_default();
                text.push_str(&format!("  {summary}\n"));
            }
            text
        }
    };
    global.print(&text)?;
    Ok(0)
}
