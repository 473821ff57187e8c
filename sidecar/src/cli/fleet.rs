//! `fleet`: verbs over many nodes at once, all from one inventory.

use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};

use super::{Global, today};
use crate::fleet::{self, Filter, Inventory, Keys, Node};
use crate::policy::{Role, read_text};
use crate::sys::clock;

#[derive(Args)]
pub struct Options {
    /// The inventory
    #[arg(
        long,
        short,
        global = true,
        value_name = "FILE",
        env = "SPOKEGUARD_INVENTORY",
        default_value = "fleet.toml"
    )]
    pub inventory: PathBuf,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Check the inventory and every policy that follows from it
    Check,
}

pub const INVENTORY: &str = "";

/// Which nodes a verb is about.
#[derive(Args, Clone, Debug, Default)]
pub struct Selection {
    /// Names of nodes, or all [default: all]
    #[arg(value_name = "NODE")]
    nodes: Vec<String>,
    /// Only nodes of this role: spoke, hub or device
    #[arg(long, value_parser = role)]
    role: Option<Role>,
    /// Only nodes in this region
    #[arg(long)]
    region: Option<String>,
    /// Only nodes with this label; may be repeated
    #[arg(long = "label", value_name = "NAME=VALUE", value_parser = label)]
    labels: Vec<(String, String)>,
}

impl Selection {
    /// The nodes meant, in the order of the file; at least one.
    pub fn of<'i>(&self, inventory: &'i Inventory) -> anyhow::Result<Vec<&'i Node>> {
        let Self { nodes, role, region, labels } = self.clone();
        Ok(Filter { names: nodes, role, region, labels }.of(inventory)?)
    }
}

pub fn run(global: &Global, options: &Options) -> anyhow::Result<u8> {
    match &options.verb {
        Verb::Check => check(global, &options.inventory),
    }
}

/// The inventory in a file. Every mistake in it is in the error, ready to be shown.
pub fn load_inventory(file: &Path) -> anyhow::Result<Inventory> {
    load(file, Keys::Required).map(|(inventory, _)| inventory)
}

/// The same with the file's text.
fn load(file: &Path, keys: Keys) -> anyhow::Result<(Inventory, String)> {
    let text = read_text(file, "inventory", fleet::BYTES_MAX)?;
    let inventory = fleet::parse(&text, &file.to_string_lossy(), today(clock::now()), keys)?;
    Ok((inventory, text))
}

fn check(global: &Global, file: &Path) -> anyhow::Result<u8> {
    let inventory = load_inventory(file)?;
    notes(&inventory)?;
    let count = inventory.nodes.len();
    let text = format!("{}: right, for {count} nodes\n", file.display());
    global.tell(
        &text,
        serde_json::json!({ "version": 1, "fleet": inventory.name, "nodes": count, "right": true }),
    )?;
    Ok(0)
}

/// What the inventory's author will want to know, on stderr.
fn notes(inventory: &Inventory) -> anyhow::Result<()> {
    for note in &inventory.notes {
        let mut text = String::new();
        note.mistake.render(&inventory.file, "note", &mut text)?;
        eprintln!("{}", text.trim_end());
    }
    Ok(())
}

fn role(text: &str) -> Result<Role, String> {
    let roles = [Role::Spoke, Role::Hub, Role::Device];
    let found = roles.into_iter().find(|role| fleet::role_name(*role) == text);
    found.ok_or_else(|| "write spoke, hub or device".to_owned())
}

fn label(text: &str) -> Result<(String, String), String> {
    let (name, value) = text.split_once('=').ok_or("write NAME=VALUE")?;
    Ok((name.to_owned(), value.to_owned()))
}
