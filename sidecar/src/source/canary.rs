//! Trials of our controls for the daemon: what to try is a value ([`trial`]), trying is left
//! to a child whose memory ends with it; and the change of our own table by which the repair
//! is tried.

use std::io::Write as _;
use std::process::Stdio;
use std::time::Duration;

use anyhow::Context as _;
use serde::{Deserialize, Serialize};
use tokio::process::{Child, Command};
use tokio::time::Instant;

use super::probe::canary::{TARGETS_MAX, Target, Trial, fly_when_free};
use super::{nft, outside, probe};
use crate::audit::{Ports, View, aims, by_link};
use crate::cli::Places;
use crate::desired::TABLE;
use crate::observed::Flight;
use crate::sys::clock;
use crate::terms::{Family, Port, Proto, printable};

/// Ports that nobody is given by a kernel and hardly any program uses, the first choice first.
const FIRST: u16 = 29_999;
const LAST: u16 = 20_000;

/// Where strangers come in, and what must be refused there. No targets: they come in nowhere.
pub fn trial(view: &View, places: &Places) -> Trial {
    let named = view.named();
    let port = |proto| {
        let likely = view.likely(proto, &Ports::all());
        (LAST..=FIRST).rev().filter_map(Port::new).find(|port| !likely.contains(port))
    };
    let mut targets = Vec::new();
    if let (Some(tcp), Some(udp)) = (port(Proto::Tcp), port(Proto::Udp)) {
        let aims = aims(view, None, None);
        for (link, aims) in by_link(&aims).into_iter().take(TARGETS_MAX) {
            let own = || aims.iter().filter(|aim| !aim.must_not_answer).map(|aim| aim.address);
            let first = |family| own().find(|address| Family::of(*address) == family);
            let addresses: Vec<_> = Family::ALL.into_iter().filter_map(first).collect();
            if !addresses.is_empty() {
                targets.push(Target { link: link.clone(), addresses, tcp, udp, named: named.clone() });
            }
        }
    }
    let Places { run, pin, .. } = places.clone();
    Trial { targets, table: false, guard: false, counters: false, pins: pin, run_dir: run }
}

/// What the child says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Answer {
    Flown {
        flights: Vec<Flight>,
        /// CPU time of the whole child.
        cost: Duration,
    },
    /// An audit was under way all the time.
    Busy,
    Failed(String),
}

/// Another audit is waited for.
const PATIENCE: Duration = Duration::from_secs(3);
/// A trial takes a quarter of a second; this is for a machine that swaps.
const DEADLINE: Duration = Duration::from_secs(30);

/// The whole life of the child: the trial comes as JSON on stdin, the answer goes to stdout.
pub fn run_from_stdin() -> anyhow::Result<()> {
    let trial: Trial = outside::errand_from_stdin()?;
    let answer = match fly_when_free(&trial, PATIENCE) {
        Ok(flights) => Answer::Flown { flights, cost: clock::cpu_time() },
        Err(error) if probe::is_busy(&error) => Answer::Busy,
        Err(error) => Answer::Failed(printable(&format!("{error:#}"), 500)),
    };
    let json = serde_json::to_vec(&answer).context("encode of the answer")?;
    std::io::stdout().write_all(&json).context("write of the answer")
}

/// Runs it in a child of this program, `verb` of which must lead to [`run_from_stdin`].
pub async fn run_in_child(verb: &str, trial: &Trial) -> anyhow::Result<Answer> {
    let json = serde_json::to_vec(trial).context("encode of the trial")?;
    outside::ask_child(verb, "audit", json, DEADLINE, outside::Dropped::GoesOn).await
}

/// How long a repair may take: whoever missed the event looks at the next tick.
const REPAIR: Duration = Duration::from_secs(15);
const NFT: Duration = Duration::from_secs(5);
const LISTING_BYTES_MAX: u64 = 4 << 20;

/// A change of our table that lets nothing in and keeps nothing out: a chain that no rule
/// leads to. Begun, so that its process is known before its commit is announced.
pub struct Disturbance {
    name: String,
    child: Child,
}

impl Disturbance {
    /// `name`: of a chain that is not there. Needs a tokio runtime.
    pub fn begin(name: &str) -> anyhow::Result<Self> {
        let child = command(&["add", "chain", "inet", TABLE, name])?
            .stdout(Stdio::null())
            .spawn()
            .context("start nft")?;
        Ok(Self { name: name.to_owned(), child })
    }

    /// The process that commits it.
    pub fn pid(&self) -> Option<u32> {
        self.child.id()
    }

    /// How long it stood; `None`: it was not undone in time, and we have done it ourselves.
    /// An error: it could not be made, or not be looked at.
    pub async fn outlasted(mut self) -> anyhow::Result<Option<Duration>> {
        let ended = tokio::time::timeout(NFT, self.child.wait()).await;
        let ended = ended.context("nft does not end")?.context("wait for nft")?;
        anyhow::ensure!(ended.success(), "nft did not add a chain to our table: {ended}");
        let begun = Instant::now();
        let mut pause = Duration::from_millis(5);
        while begun.elapsed() < REPAIR {
            tokio::time::sleep(pause).await;
            if !is_there(&self.name).await? {
                return Ok(Some(begun.elapsed()));
            }
            pause = (pause * 2).min(Duration::from_secs(1));
        }
        let mut undo = command(&["delete", "chain", "inet", TABLE, &self.name])?;
        let undone = tokio::time::timeout(NFT, undo.stdout(Stdio::null()).status()).await;
        if !matches!(undone, Ok(Ok(status)) if status.success()) {
            log::debug!("chain {} stays in our table until the next repair", self.name);
        }
        Ok(None)
    }
}

async fn is_there(name: &str) -> anyhow::Result<bool> {
    use tokio::io::AsyncReadExt as _;
    let mut child =
        command(&["list", "chains", "inet"])?.stdout(Stdio::piped()).spawn().context("start nft")?;
    let mut listing = Vec::new();
    let read = async {
        if let Some(stdout) = child.stdout.take() {
            stdout
                .take(LISTING_BYTES_MAX)
                .read_to_end(&mut listing)
                .await
                .context("read of nft's listing")?;
        }
        child.wait().await.context("wait for nft")
    };
    let ended = tokio::time::timeout(NFT, read).await.context("nft does not end")??;
    anyhow::ensure!(ended.success(), "nft can't list the chains: {ended}");
    let listing = String::from_utf8_lossy(&listing);
    Ok(listing
        .lines()
        .any(|line| line.trim().strip_prefix("chain ").is_some_and(|rest| rest.starts_with(name))))
}

fn command(args: &[&str]) -> anyhow::Result<Command> {
    let mut command = Command::new(nft::program()?);
    command.args(args).stdin(Stdio::null()).stderr(Stdio::null()).kill_on_drop(true);
    Ok(command)
}
