//! `plan`: what `apply` would change, as a person would want to read it.

use super::{Format, Global};
use crate::ruleset::compare;
use crate::source::nft;
use crate::sys::clock;

pub fn run(global: &Global) -> anyhow::Result<u8> {
    let (_, desired) = super::policy::load(global, clock::now())?;
    let Some(table) = &desired.table else {
        global.print("[enforce] firewall = false: apply would change nothing\n")?;
        return Ok(0);
    };
    let found = nft::list_table()?;
    let changes = compare::changes(table, found.as_ref());
    match global.format {
        Format::Json => {
            let list: Vec<String> = changes.iter().map(ToString::to_string).collect();
            global.print(&format!(
                "{}\n",
                serde_json::to_string_pretty(&serde_json::json!({ "version": 1, "changes": list }))?
            ))?;
        }
        Format::Text if changes.is_empty() => {
            global.print("in force already: apply would change nothing\n")?
        }
        Format::Text if found.is_none() => {
            global.print(&format!(
                "apply would add this table; nothing else is touched\n\n{}",
                crate::ruleset::render::table(table)
            ))?;
        }
        Format::Text => global.print(&compare::plan_text(&changes))?,
    }
    Ok(u8::from(!changes.is_empty()))
}
