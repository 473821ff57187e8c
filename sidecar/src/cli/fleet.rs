//! `fleet`: verbs over many nodes at once, all from one inventory.

mod audit;
mod bundle;
mod healthcheck;
mod keygen;
mod render;
mod report;
mod roll;
mod status;
mod tree;

use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};

use super::{FAILED, Format, Global, today};
use crate::fleet::table::wrapped;
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
    /// Write each node's policy and peers, and what Prometheus, Nix and DNS need
    #[command(after_help = render::FILES)]
    Render(render::Options),
    /// Pack all that one node needs, checked first
    #[command(after_help = bundle::CONTENTS)]
    Bundle(bundle::Options),
    /// Make a key pair; only the public half goes into the inventory
    #[command(after_help = keygen::EXAMPLE)]
    Keygen(keygen::Options),
    /// Who is fine, drifting, blind or silent
    Status(status::Options),
    /// What this host reaches on every node from outside, beside what they say
    Audit(audit::Options),
    /// Whether nodes may be built upon: tunnel, HTTPS, certificate, ssh, metrics
    Healthcheck(healthcheck::Options),
    /// Wait until a node is healthy; non-zero stops a roll
    Gate(healthcheck::Gate),
    /// A command on one node after another, a gate between
    Roll(roll::Options),
    /// The fleet as one self-contained page
    Report(report::Options),
}

pub const CLOUD_INIT_ELSEWHERE: &str = "--format cloud-init is for fleet bundle only";

pub const INVENTORY: &str = "\
The inventory (TOML; a * must be there):
  version = 1                        *
  [fleet]  name *, domain            nodes' names in DNS are below the domain
  [mesh]   kind                      wireguard (default) or tailscale
           prefix *, hub *           the mesh; the node that is its hub
           port                      of the hub's tunnel, 51820
  [defaults]                         what all policies share, as in policy.toml:
           [defaults.public], [defaults.ssh], [[defaults.file]] ...
  [[node]] name *, role              spoke or device; the one in [mesh]: hub
           mesh_address *            one or a list
           public_address            one or a list
           public_key *              made by fleet keygen; never a private one
           endpoint                  of its tunnel, address:port
           region, labels            labels = { provider = \"aws\" }
           hostname, subdomain       its name; \"@\" is the domain itself
           and, as in policy.toml:   [node.public], [[node.mesh.service]] ...
A node's keys go over the defaults: tables are merged key by key, lists and all
else replaced (file = [] takes the defaults' files away). With Tailscale only
names must be there, and the mesh_address of a hub.";

/// The node of this name.
fn one<'i>(inventory: &'i Inventory, name: &str) -> anyhow::Result<&'i Node> {
    let filter = Filter { names: vec![name.to_owned()], ..Filter::default() };
    match filter.of(inventory)?.as_slice() {
        [node] => Ok(node),
        _ => anyhow::bail!("name one node of {}", inventory.file),
    }
}

/// A word on the way, to stderr.
fn say(global: &Global, text: &str) {
    if !global.quiet {
        eprint!("{}", wrapped(text, global.width(), 0));
    }
}

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
    /// Whether nothing was chosen, so that it is about the whole fleet.
    pub fn is_everyone(&self) -> bool {
        let Self { nodes, role, region, labels } = self;
        nodes.is_empty() && role.is_none() && region.is_none() && labels.is_empty()
    }

    /// The nodes meant, in the order of the file; at least one.
    pub fn of<'i>(&self, inventory: &'i Inventory) -> anyhow::Result<Vec<&'i Node>> {
        let Self { nodes, role, region, labels } = self.clone();
        Ok(Filter { names: nodes, role, region, labels }.of(inventory)?)
    }
}

pub fn run(global: &Global, options: &Options) -> anyhow::Result<u8> {
    let file = &options.inventory;
    let bundles = matches!(options.verb, Verb::Bundle(_));
    anyhow::ensure!(global.format != Format::CloudInit || bundles, CLOUD_INIT_ELSEWHERE);
    anyhow::ensure!(global.format != Format::Xml, "--format xml is for audit only");
    match &options.verb {
        Verb::Check => check(global, file),
        Verb::Render(options) => render::run(global, file, options),
        Verb::Bundle(options) => bundle::run(global, file, options),
        Verb::Keygen(options) => keygen::run(global, file, options),
        Verb::Status(more) => status::run(global, file, more),
        Verb::Audit(more) => audit::run(global, file, more),
        Verb::Healthcheck(more) => healthcheck::run(global, file, more),
        Verb::Gate(more) => healthcheck::gate(global, file, more),
        Verb::Roll(more) => roll::run(global, file, more),
        Verb::Report(more) => report::run(global, file, more),
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
    let nodes = if count == 1 { "node" } else { "nodes" };
    let text = format!("{}: right, for {count} {nodes}\n", file.display());
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
