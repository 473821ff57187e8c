//! `policy import`: another tool's access rules as a policy of ours, on stdout.

use std::fmt::Write as _;
use std::fs::File;
use std::io::Read as _;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use clap::{Args, Subcommand};
use serde_json::json;

use super::{Format, Global};
use crate::tailnet::{self, Difference, Filter, Heading, Mirror, Node, Outcome, Status, Trial, Wanted};
use crate::terms::{Port, Proto, printable};

#[derive(Subcommand)]
pub enum Verb {
    /// From a Tailscale policy file: what it lets into one node
    #[command(after_help = TAILSCALE)]
    Tailscale(Box<Tailscale>),
}

const TAILSCALE: &str = "\
Prints a policy with the file's rules for this node as [ssh] and
[[mesh.service]], each with the line it comes from. Nothing is widened: what
can't be resolved to addresses here is left out, and listed. The file's own
tests are run.

Examples:
  spokeguard policy import tailscale acl.hujson --tags tag:server
  tailscale status --json > status.json
  spokeguard policy import tailscale acl.hujson --status status.json \\
      --ports 22,19999 > /etc/spokeguard/policy.toml

Exit codes: 0 complete; 1 something was left out, a test failed or --netmap
differs; 2 could not.";

#[derive(Args)]
pub struct Tailscale {
    /// The policy file, as the Tailscale console has it (HuJSON)
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// The node's tags [default: as --status says]
    #[arg(long, value_delimiter = ',', value_name = "TAG")]
    tags: Vec<String>,
    /// Whose node it is, if it has no tags [default: as --status says]
    #[arg(long, value_name = "LOGIN", conflicts_with = "tags")]
    user: Option<String>,
    /// The node's Tailscale addresses [default: as --status says]
    #[arg(long, value_delimiter = ',', value_name = "IP")]
    address: Vec<IpAddr>,
    /// Its name in the policy [default: as --status says]
    #[arg(long, value_name = "NAME")]
    node_name: Option<String>,
    /// Output of `tailscale status --json` on the node: who tags and users are
    #[arg(long, value_name = "FILE")]
    status: Option<PathBuf>,
    /// Ports that the node serves (443, udp:53): what wide rules are cut to
    #[arg(long, value_delimiter = ',', value_name = "PORT", value_parser = served)]
    ports: Vec<Served>,
    /// The port of sshd
    #[arg(long, value_name = "PORT", default_value_t = 22, value_parser = clap::value_parser!(u16).range(1..))]
    ssh_port: u16,
    /// Output of `tailscale debug netmap`: compare with what is compiled for the node
    #[arg(long, value_name = "FILE")]
    netmap: Option<PathBuf>,
}

#[derive(Clone)]
struct Served(Vec<(Proto, Port)>);

/// "443" (both protocols), "tcp:443", "udp:53".
fn served(text: &str) -> Result<Served, String> {
    let (protos, port) = match text.split_once(':') {
        None => (&Proto::ALL[..], text),
        Some(("tcp", port)) => (&[Proto::Tcp][..], port),
        Some(("udp", port)) => (&[Proto::Udp][..], port),
        Some(_) => return Err("write 443, tcp:443 or udp:53".into()),
    };
    let port = port.parse().ok().and_then(Port::new).ok_or("write 443, tcp:443 or udp:53")?;
    Ok(Served(protos.iter().map(|proto| (*proto, port)).collect()))
}

pub fn run(global: &Global, verb: &Verb) -> anyhow::Result<u8> {
    match verb {
        Verb::Tailscale(options) => tailscale(global, options),
    }
}

fn tailscale(global: &Global, options: &Tailscale) -> anyhow::Result<u8> {
    let text = read_text(&options.file)?;
    let access = tailnet::read(&text, &options.file.to_string_lossy())?;
    let status = options.status.as_deref().map(read_status).transpose()?;
    let node = node(options, status.as_ref())?;
    let wanted = Wanted {
        ports: options.ports.iter().flat_map(|ports| ports.0.clone()).collect(),
        ssh: Port::new(options.ssh_port).context("port 0 is not a port")?,
    };
    let mirror = tailnet::mirror(&access, &node, status.as_ref(), &wanted);
    let trials = tailnet::trials(&access, &mirror, &node, status.as_ref());
    let differences = match &options.netmap {
        None => Vec::new(),
        Some(path) => {
            let filter = Filter::from_json(&read_text(path)?)
                .map_err(|why| anyhow::anyhow!("{}: no packet filter: {why}", path.display()))?;
            let only: Vec<(Proto, u16)> =
                wanted.ports.iter().map(|(proto, port)| (*proto, port.get())).collect();
            tailnet::compare(&mirror, &filter, &node, &only)
        }
    };
    let name = name(options, status.as_ref())?;
    let (file, of) = (file_name(&options.file), options.status.as_deref().map(file_name));
    let heading = Heading { file: &file, name: &name, status: of.as_deref() };
    let policy = mirror.policy(&node, &wanted, &heading);
    let no_way_in = !mirror.allowed.contains_key(&(Proto::Tcp, wanted.ssh.get()));
    match global.format {
        Format::Json => global.tell(
            "",
            json!({
                "version": 1, "policy": policy, "left_out": mirror.left_out, "tests": trials,
                "differences": differences,
                "notes": mirror.notes.iter().map(|(line, text)| json!({ "line": line, "text": text }))
                    .collect::<Vec<_>>(),
            }),
        )?,
        Format::Text | Format::Xml | Format::CloudInit => {
            global.print(&policy)?;
            let told = told(options, &mirror, &trials, &differences, no_way_in);
            if !global.quiet {
                eprint!("{told}");
            }
        }
    }
    let passed = trials.iter().all(|trial| trial.outcome == Outcome::Passed);
    let complete = mirror.left_out.is_empty() && differences.is_empty() && passed && !no_way_in;
    Ok(u8::from(!complete))
}

/// What the operator must know beside the policy.
fn told(
    options: &Tailscale,
    mirror: &Mirror,
    trials: &[Trial],
    differences: &[Difference],
    no_way_in: bool,
) -> String {
    let file = printable(&options.file.to_string_lossy(), 200);
    let mut out = String::new();
    for left in &mirror.left_out {
        let _ = writeln!(out, "{file}:{}: left out: {}: {}", left.line, left.what, left.why);
    }
    for (line, text) in &mirror.notes {
        let _ = writeln!(out, "{file}:{line}: note: {text}");
    }
    for trial in trials {
        let asked = if trial.accept { "accept" } else { "deny" };
        let _ = match &trial.outcome {
            Outcome::Passed => continue,
            Outcome::Failed(found) => {
                writeln!(out, "{file}:{}: test failed: {asked} {}: {found}", trial.line, trial.what)
            }
            Outcome::Unclear(why) => {
                writeln!(out, "{file}:{}: test not decided: {asked} {}: {why}", trial.line, trial.what)
            }
        };
    }
    for difference in differences {
        let ports = match (difference.first, difference.last) {
            (first, last) if first == last => first.to_string(),
            (first, last) => format!("{first}-{last}"),
        };
        for (nets, how) in [(&difference.wider, "wider"), (&difference.narrower, "narrower")] {
            let nets: tailnet::Addresses = nets.iter().copied().collect();
            if !nets.is_empty() {
                let _ =
                    writeln!(out, "{} {ports}: {how} than the compiled filter by {nets}", difference.proto);
            }
        }
    }
    if no_way_in {
        let _ = writeln!(out, "no rule lets anybody to sshd (tcp {}): see [ssh]", options.ssh_port);
    }
    let passed = trials.iter().filter(|trial| trial.outcome == Outcome::Passed).count();
    let _ = write!(out, "{} ports mirrored, {} left out", mirror.allowed.len(), mirror.left_out.len());
    if !trials.is_empty() {
        let _ = write!(out, ", {passed} of {} tests passed", trials.len());
    }
    if options.netmap.is_some() && differences.is_empty() {
        out.push_str(", as the compiled filter");
    }
    out.push('\n');
    out
}

fn node(options: &Tailscale, status: Option<&Status>) -> anyhow::Result<Node> {
    let own = status.and_then(|status| status.own.clone()).unwrap_or_default();
    let said = !options.tags.is_empty() || options.user.is_some();
    let tags = options.tags.iter().map(|tag| match tag.strip_prefix("tag:") {
        Some(_) => tag.clone(),
        None => format!("tag:{tag}"),
    });
    let node = Node {
        tags: if said { tags.collect() } else { own.tags },
        user: if said { options.user.clone() } else { own.user },
        addresses: if options.address.is_empty() { own.addresses } else { options.address.clone() },
        ..Node::default()
    };
    if node.tags.is_empty() && node.user.is_none() && node.addresses.is_empty() {
        bail!("whose rules? give the node's --tags tag:server, its --user, or --status FILE");
    }
    Ok(node)
}

/// A name that a policy takes: given, or the host name made one.
fn name(options: &Tailscale, status: Option<&Status>) -> anyhow::Result<String> {
    let label = |text: &str| {
        let fine = |c: char| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '-' };
        let text: String = text.chars().map(fine).take(63).collect();
        text.trim_matches('-').to_owned()
    };
    if let Some(given) = &options.node_name {
        if label(given) != given.to_ascii_lowercase() {
            bail!("--node-name {}: 1 to 63 letters, digits and hyphens", printable(given, 80));
        }
        return Ok(given.clone());
    }
    let own = status.and_then(|status| status.own.as_ref()).map(|own| label(&own.name));
    Ok(own.filter(|name| !name.is_empty()).unwrap_or_else(|| "node".into()))
}

fn read_status(path: &Path) -> anyhow::Result<Status> {
    Status::from_json(&read_text(path)?)
        .with_context(|| format!("{}: not what `tailscale status --json` prints", path.display()))
}

fn read_text(path: &Path) -> anyhow::Result<String> {
    let doing = || format!("read {}", path.display());
    let file = File::open(path).with_context(doing)?;
    let mut text = String::new();
    file.take(tailnet::BYTES_MAX + 1).read_to_string(&mut text).with_context(doing)?;
    if text.len() as u64 > tailnet::BYTES_MAX {
        bail!("{} is larger than {} bytes", path.display(), tailnet::BYTES_MAX);
    }
    Ok(text)
}

fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned()
}
