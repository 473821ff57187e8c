//! `plan`: what `apply` would change, as a person would want to read it.

use super::Global;
use crate::desired::{Desired, take_out_canaries};
use crate::ruleset::{Table, compare, render};
use crate::source::nft;
use crate::sys::clock;
use crate::terms::Scope;

pub fn run(global: &Global) -> anyhow::Result<u8> {
    let (_, desired) = super::policy::load(global, clock::now())?;
    let Some(table) = &desired.table else {
        let text = "[enforce] firewall = false: apply would change nothing\n";
        global.tell(text, serde_json::json!({ "version": 1, "changes": [] }))?;
        return Ok(0);
    };
    let mut found = nft::list_table()?;
    found.as_mut().into_iter().for_each(take_out_canaries);
    let changes = compare::changes(table, found.as_ref());
    let list: Vec<String> = changes.iter().map(ToString::to_string).collect();
    let text = match &found {
        _ if changes.is_empty() => "in force already: apply would change nothing\n".to_owned(),
        None => format!(
            "apply would add table inet {}{}; no other table is\ntouched. It lets in\n\n{}\nand drops the rest. \
             Its rules:\n\n{}",
            table.name,
            if desired.guard.is_some() { ", and the tc guard behind it" } else { "" },
            openings(&desired),
            rules(table)
        ),
        Some(_) => {
            format!("apply would change table inet {}:\n\n{}", table.name, compare::plan_text(&changes))
        }
    };
    global.tell(&text, serde_json::json!({ "version": 1, "changes": list }))?;
    Ok(u8::from(!changes.is_empty()))
}

/// One line for each port of the policy: what, from where, for whom.
fn openings(desired: &Desired) -> String {
    let row = |service: &crate::desired::Service| {
        let from = service.from.as_ref().map_or("anyone".to_owned(), |nets| {
            // A prefix that is one address reads better without its length.
            let short = |net: &ipnet::IpNet| net.to_string().replace("/32", "").replace("/128", "");
            let whole = nets.iter().any(|net| net.prefix_len() == 0);
            if whole { "anyone".to_owned() } else { nets.iter().map(short).collect::<Vec<_>>().join(", ") }
        });
        let local = service.local.and_then(|at| desired.policy.locals.get(at));
        let through = match (service.scope, local) {
            (Scope::Mesh, _) => format!("through {}", desired.policy.mesh.interface),
            (_, Some(local)) => format!("through {}", local.name),
            _ => String::new(),
        };
        let port = format!("{}/{}", service.proto, service.port);
        format!("  {port:<10} {:<16} from {from} {through}", service.name).trim_end().to_owned() + "\n"
    };
    desired.services.iter().map(row).collect()
}

/// The chains as nft writes them, less what only nft needs.
fn rules(table: &Table) -> String {
    let whole = render::table(table);
    let chains = whole.find("\tchain ").map_or("", |at| &whole[at..]);
    let lines = chains.lines().filter(|line| *line != "}");
    let line =
        |line: &str| line.split(" comment \"spokeguard:").next().unwrap_or(line).replace('\t', "  ") + "\n";
    lines.map(line).collect()
}
