//! `fleet roll`: a command on one node after another, a gate between, and a state file by which
//! it goes on where it stopped, however it stopped.

use std::fs::File;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use clap::{Args, ValueEnum};
use rustix::fs::{FlockOperation, flock};
use rustix::process::{Pid, Signal, kill_process};
use tokio::signal::unix::{SignalKind, signal};

use super::healthcheck::{AGAIN, Checks};
use super::{Format, Global, Selection, load_inventory, say};
use crate::fleet::health::Outcome;
use crate::fleet::roll::{Plan, Roll};
use crate::fleet::table::wrapped;
use crate::fleet::{Inventory, Node, role_name};
use crate::policy::read_text;
use crate::source::looks::replace;
use crate::sys::clock;

#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub struct Options {
    #[command(flatten)]
    selection: Selection,
    /// In which order: hub-last, or inventory
    #[arg(long, value_enum, default_value_t = Order::HubLast, hide_possible_values = true)]
    order: Order,
    /// How long a node may take to become healthy after the command
    #[arg(long, value_name = "TIME", default_value = "2m", value_parser = humantime::parse_duration)]
    wait: Duration,
    #[command(flatten)]
    checks: Checks,
    /// Where it is written how far it came [default: beside the inventory, .roll.json]
    #[arg(long, value_name = "FILE")]
    state: Option<PathBuf>,
    /// Begin anew, whatever the state file says
    #[arg(long)]
    restart: bool,
    /// Say what would be done, and do nothing
    #[arg(long)]
    dry_run: bool,
    /// The command, run here once for each node
    #[arg(last = true, required = true, value_name = "COMMAND")]
    command: Vec<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Order {
    HubLast,
    Inventory,
}

const EXAMPLES: &str = "\
The command finds in its environment: SPOKEGUARD_NODE, SPOKEGUARD_ADDRESS (of
the mesh), SPOKEGUARD_PUBLIC (addresses, by spaces), SPOKEGUARD_SSH_PORT,
SPOKEGUARD_HOSTNAME, SPOKEGUARD_ROLE, SPOKEGUARD_REGION.

Examples:
  spokeguard fleet roll -- sh -c \\
      'nixos-rebuild switch --flake .#$SPOKEGUARD_NODE \\
         --target-host root@$SPOKEGUARD_ADDRESS'
  spokeguard fleet roll --dry-run --label tier=edge -- ./deploy.sh

The first failure stops it; the same command line goes on with that node.

Exit codes: 0 all done, 1 a command or a gate failed, 2 it could not go on.";

/// How a node's turn ended.
enum Turn {
    Passed,
    Failed(String),
    Interrupted,
}

pub fn run(global: &Global, inventory_file: &Path, options: &Options) -> anyhow::Result<u8> {
    let inventory = load_inventory(inventory_file)?;
    let mut nodes = options.selection.of(&inventory)?;
    if options.order == Order::HubLast {
        nodes.sort_by_key(|node| node.is_hub());
    }
    let plan = Plan::new(&inventory.name, &nodes, &options.command);
    let state = options.state.clone().unwrap_or_else(|| inventory_file.with_extension("roll.json"));
    let before = match state.exists() && !options.restart {
        true => Some(read_text(&state, "state of a roll", 16 << 20)?),
        false => None,
    };
    let mut roll = match &before {
        Some(text) => match Roll::resume(text, &plan) {
            Ok(roll) => roll,
            Err(mismatch) => {
                bail!("{} {mismatch}\n  To begin anew, say --restart", state.display());
            }
        },
        None => Roll::new(plan),
    };
    if options.dry_run {
        global.print(&preview(&roll, options))?;
        return Ok(0);
    }
    // One roll of an inventory at a time, whatever its state file is called.
    let lock = File::open(inventory_file).with_context(|| format!("open {}", inventory_file.display()))?;
    let free = flock(&lock, FlockOperation::NonBlockingLockExclusive).is_ok();
    ensure!(free, "another roll of {} is under way", inventory_file.display());
    if let Some(stopped) = &roll.stopped {
        say(
            global,
            &format!("{}; going on with {}: {stopped}", roll.progress(), roll.next().unwrap_or("nobody")),
        );
    }
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().context("start a runtime")?;
    let code = runtime.block_on(turns(global, &inventory, &nodes, options, &state, &mut roll));
    // A gate that was interrupted may still wait for an answer; nobody waits for it.
    runtime.shutdown_background();
    code
}

async fn turns(
    global: &Global,
    inventory: &Inventory,
    nodes: &[&Node],
    options: &Options,
    state: &Path,
    roll: &mut Roll,
) -> anyhow::Result<u8> {
    let keep = |roll: &Roll| replace(state, roll.to_json().as_bytes(), 0o600);
    let mut interrupts = Interrupts::listen()?;
    while let Some(name) = roll.next().map(str::to_owned) {
        let node = nodes.iter().find(|node| node.name == name).context("the order names a stranger")?;
        roll.begin();
        keep(roll)?;
        say(global, &format!("{name} ({})", roll.progress()));
        match turn(inventory, node, options, global, &mut interrupts).await? {
            Turn::Passed => roll.pass(),
            Turn::Failed(reason) => {
                roll.fail(&reason);
                keep(roll)?;
                let mut text = wrapped(&format!("stopped at {name}: {reason}"), global.width(), 0);
                text += &format!("  {}; the same command goes on there\n", roll.progress());
                global.tell(&text, document(roll, Some(&name)))?;
                return Ok(1);
            }
            Turn::Interrupted => {
                let text =
                    format!("interrupted at {name}; {}, the same command goes on there", roll.progress());
                global.tell(&format!("{text}\n"), document(roll, Some(&name)))?;
                return Ok(super::FAILED);
            }
        }
        keep(roll)?;
    }
    std::fs::remove_file(state).with_context(|| format!("remove {}", state.display()))?;
    global.tell(&format!("all {} nodes are done and healthy\n", roll.done), document(roll, None))?;
    Ok(0)
}

/// From when on it listens, none is missed.
struct Interrupts {
    interrupt: tokio::signal::unix::Signal,
    terminate: tokio::signal::unix::Signal,
}

impl Interrupts {
    fn listen() -> anyhow::Result<Self> {
        let interrupt = signal(SignalKind::interrupt()).context("listen to SIGINT")?;
        Ok(Self { interrupt, terminate: signal(SignalKind::terminate()).context("listen to SIGTERM")? })
    }

    async fn next(&mut self) -> Signal {
        tokio::select! {
            _ = self.interrupt.recv() => Signal::INT,
            _ = self.terminate.recv() => Signal::TERM,
        }
    }
}

/// The command, and then the gate.
async fn turn(
    inventory: &Inventory,
    node: &Node,
    options: &Options,
    global: &Global,
    interrupts: &mut Interrupts,
) -> anyhow::Result<Turn> {
    let mut child = command(node, options, global)?;
    let ended: ExitStatus = tokio::select! {
        status = child.wait() => status.context("wait for the command")?,
        signal = interrupts.next() => return stop(child, signal).await,
    };
    if !ended.success() {
        return Ok(Turn::Failed(format!("the command ended with {ended}")));
    }
    let clock = clock::Uptime::start();
    let mut told = String::new();
    loop {
        let (checks, inventory, name) = (options.checks.clone(), inventory.clone(), node.name.clone());
        let examined = tokio::task::spawn_blocking(move || {
            let node = inventory.node(&name).context("the inventory has lost a node")?;
            checks.examine(&inventory, &[node])
        });
        let checkup = tokio::select! {
            checkup = examined => checkup.context("the gate ended early")??,
            _ = interrupts.next() => return Ok(Turn::Interrupted),
        };
        if checkup.outcome() == Outcome::Pass {
            return Ok(Turn::Passed);
        }
        let complaints = checkup.complaints();
        if clock.elapsed() + AGAIN > options.wait {
            return Ok(Turn::Failed(format!("not healthy: {complaints}")));
        }
        if complaints != told {
            say(global, &format!("not yet: {complaints}"));
            told = complaints;
        }
        tokio::select! {
            () = tokio::time::sleep(AGAIN) => {}
            _ = interrupts.next() => return Ok(Turn::Interrupted),
        }
    }
}

fn command(node: &Node, options: &Options, global: &Global) -> anyhow::Result<tokio::process::Child> {
    let (program, arguments) = options.command.split_first().context("no command")?;
    let spaced =
        |list: &[std::net::IpAddr]| list.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ");
    let address = node.mesh_address.first().map_or(node.hostname.clone(), ToString::to_string);
    // What the command prints is no part of a document.
    let output = match global.format {
        Format::Json => std::io::stderr().as_fd().try_clone_to_owned().context("share stderr")?.into(),
        Format::Text | Format::Xml | Format::CloudInit => Stdio::inherit(),
    };
    tokio::process::Command::new(program)
        .args(arguments)
        .stdout(output)
        .env("SPOKEGUARD_NODE", &node.name)
        .env("SPOKEGUARD_ADDRESS", address)
        .env("SPOKEGUARD_PUBLIC", spaced(&node.public_address))
        .env("SPOKEGUARD_SSH_PORT", node.ssh_port().to_string())
        .env("SPOKEGUARD_HOSTNAME", &node.hostname)
        .env("SPOKEGUARD_ROLE", role_name(node.role))
        .env("SPOKEGUARD_REGION", node.region.as_deref().unwrap_or_default())
        .spawn()
        .with_context(|| format!("start {program}"))
}

/// A command that was interrupted may end by itself; a terminal has told it already.
async fn stop(mut child: tokio::process::Child, signal: Signal) -> anyhow::Result<Turn> {
    if let Some(pid) = child.id().and_then(|id| Pid::from_raw(id.cast_signed())) {
        let _ = kill_process(pid, signal);
    }
    if tokio::time::timeout(Duration::from_secs(10), child.wait()).await.is_err() {
        let _ = child.kill().await;
    }
    Ok(Turn::Interrupted)
}

fn preview(roll: &Roll, options: &Options) -> String {
    let mut text = format!(
        "{}, then wait up to {} for each to be healthy:\n",
        options.command.join(" "),
        humantime::format_duration(options.wait)
    );
    for (at, name) in roll.plan.order.iter().enumerate() {
        let stands = match (at < roll.done, at == roll.done, &roll.stopped) {
            (true, _, _) => "  done".to_owned(),
            (_, true, Some(stopped)) => format!("  again: {stopped}"),
            _ => String::new(),
        };
        text.push_str(&format!("{:4}  {name}{stands}\n", at + 1));
    }
    text
}

fn document(roll: &Roll, at: Option<&str>) -> serde_json::Value {
    serde_json::json!({
        "version": 1, "fleet": roll.plan.fleet, "done": roll.plan.order[..roll.done], "stopped_at": at,
        "reason": roll.stopped, "left": roll.plan.order[roll.done..],
    })
}
