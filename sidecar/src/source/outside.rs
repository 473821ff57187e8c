//! This host as strangers meet it, for the cycle: what to ask is a value ([`errand`]), and
//! asking is left to this process, or to a child of it whose memory ends with it.

use std::collections::BTreeSet;
use std::io::{Read as _, Write as _};
use std::net::IpAddr;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, bail};
use rustix::process::{Signal, set_parent_process_death_signal};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::probe::{self, Mode, Request};
use crate::audit::{Ports, View, aims, by_link, ranges, stranger};
use crate::observed::{Dispute, Probe, Probed, Reading, Sweep};
use crate::sys::{clock, memory};
use crate::terms::{Port, Proto, printable};

/// What to ask from outside. Nothing at all where no public interface is up.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Errand {
    pub requests: Vec<Request>,
    /// How long to wait for another audit to end.
    pub patience: Duration,
}

/// Which ports to ask about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Extent {
    /// All of them.
    All,
    /// Where anything could answer: see [`View::likely`].
    Likely,
    /// What a look has left in doubt.
    Doubts(Vec<Dispute>),
}

/// A sweep of all ports takes 0.1 s; a host with hundreds of addresses is asked about the
/// likely ports of those that come later.
const WHOLE_MAX: usize = 16;
const ADDRESSES_MAX: usize = 256;
/// A sweep that is in nobody's way waits this long.
const PATIENCE: Duration = Duration::from_secs(3);

pub fn errand(view: &View, run_dir: &Path, extent: &Extent) -> Errand {
    let (named, plain) = (view.named(), view.asks_for_priority());
    let request =
        |link: &crate::observed::Link, addresses: Vec<IpAddr>, protos: Vec<Proto>, ports: &[Port]| {
            let asked = Ports::of(ports);
            let ways =
                addresses.iter().flat_map(|address| protos.iter().map(move |proto| (*address, *proto)));
            let care = ways.filter_map(|(address, proto)| {
                view.care(&link.name, address, stranger(view, address), proto, &asked)
            });
            Request {
                care: care.collect(),
                // What it leaves when it is killed, the next one takes away.
                keeper: None,
                link: link.clone(),
                addresses,
                protos,
                ports: ranges(ports),
                source: None,
                named: named.clone(),
                plain,
                mode: Mode::Verdict,
                rate: None,
                // The host has better things to do with its other CPUs.
                threads: 1,
                run_dir: run_dir.to_owned(),
            }
        };
    let aims = aims(view, None, None);
    let aims = &aims[..aims.len().min(ADDRESSES_MAX)];
    let mut requests = Vec::new();
    let mut whole = WHOLE_MAX;
    for (link, aims) in by_link(aims) {
        if let Extent::Doubts(doubts) = extent {
            // Programs are loaded anew for each request, so that one probe more costs less.
            for proto in Proto::ALL {
                let known = |doubt: &&Probe| aims.iter().any(|aim| aim.address == doubt.address);
                let doubts = doubts.iter().map(|doubt| &doubt.probe);
                let mine = doubts.filter(|doubt| doubt.interface == link.name && doubt.proto == proto);
                let mine: Vec<&Probe> = mine.filter(known).collect();
                let addresses: BTreeSet<IpAddr> = mine.iter().map(|doubt| doubt.address).collect();
                let ports: BTreeSet<Port> = mine.iter().map(|doubt| doubt.port).collect();
                if !ports.is_empty() {
                    let addresses = addresses.into_iter().collect();
                    let ports: Vec<Port> = ports.into_iter().collect();
                    requests.push(request(link, addresses, vec![proto], &ports));
                }
            }
            continue;
        }
        let (mut all, mut some) = (Vec::new(), Vec::new());
        for aim in aims {
            if *extent == Extent::All && !aim.must_not_answer && whole > 0 {
                whole -= 1;
                all.push(aim.address);
            } else {
                some.push(aim.address);
            }
        }
        if !all.is_empty() {
            requests.push(request(link, all, Proto::ALL.to_vec(), &Ports::all().to_vec()));
        }
        let ports: BTreeSet<Port> =
            Proto::ALL.into_iter().flat_map(|proto| view.likely(proto, &Ports::all())).collect();
        if !some.is_empty() && !ports.is_empty() {
            let ports: Vec<Port> = ports.into_iter().collect();
            requests.push(request(link, some, Proto::ALL.to_vec(), &ports));
        }
    }
    Errand { requests, patience: PATIENCE }
}

/// Runs it in this process. The first sweep that fails fails all: half a look is none. But
/// an address that no stranger can be answered from, or whose interface is down, is passed over.
pub fn run(errand: &Errand) -> anyhow::Result<Vec<Sweep>> {
    let mut sweeps = Vec::new();
    let mut silent = None;
    for request in &errand.requests {
        match probe::sweep_when_free(request, errand.patience, &mut |_| {}) {
            Err(error) if probe::is_unreachable(&error) => silent = Some(error),
            found => {
                sweeps.extend(found?);
                continue;
            }
        }
        // One address without a way back to strangers says nothing of the others.
        for address in &request.addresses {
            let alone = Request { addresses: vec![*address], ..request.clone() };
            match probe::sweep_when_free(&alone, errand.patience, &mut |_| {}) {
                Err(error) if probe::is_unreachable(&error) => silent = Some(error),
                found => sweeps.extend(found?),
            }
        }
    }
    match silent {
        Some(error) if sweeps.is_empty() => Err(error),
        _ => Ok(sweeps),
    }
}

/// What was found, or why nothing could be and what is believed instead.
pub fn reading(found: anyhow::Result<Probed>) -> Reading<Probed> {
    match found {
        Ok(probed) => Reading::Seen(probed),
        Err(error) => {
            Reading::blind(format!("{error:#}; what is said of strangers is what the rules say, unproven"))
        }
    }
}

/// The whole life of the child: the errand comes as JSON on stdin, the answer goes to stdout.
pub fn run_from_stdin() -> anyhow::Result<()> {
    // Nobody waits for the answer of a daemon that was killed.
    set_parent_process_death_signal(Some(Signal::KILL)).context("tie the audit to the daemon")?;
    let errand: Errand = errand_from_stdin()?;
    let answer = match run(&errand) {
        Ok(sweeps) => Answer::Probed { probed: Probed::new(&sweeps), cost: clock::cpu_time() },
        Err(error) if probe::is_busy(&error) => Answer::Busy,
        Err(error) => Answer::Failed(printable(&format!("{error:#}"), 600)),
    };
    let json = serde_json::to_vec(&answer).context("encode of the answer")?;
    std::io::stdout().write_all(&json).context("write of the answer")
}

/// What a child is to do.
pub(crate) fn errand_from_stdin<T: DeserializeOwned>() -> anyhow::Result<T> {
    let mut json = Vec::new();
    std::io::stdin().take(ERRAND_BYTES_MAX).read_to_end(&mut json).context("read of the errand")?;
    serde_json::from_slice(&json).context("decode of the errand")
}

/// What the child says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Answer {
    Probed {
        probed: Probed,
        /// CPU time of the whole child. On a busy host the clock on the wall says more than that.
        cost: Duration,
    },
    /// Another audit was under way all the time.
    Busy,
    Failed(String),
}

const ERRAND_BYTES_MAX: u64 = 4 << 20;
/// The answer for a host with few rules is one of some hundred bytes. The largest that
/// rules can bring about is refused, since it would stay in memory.
const ANSWER_BYTES_MAX: u64 = 1 << 20;
const STDERR_BYTES_MAX: u64 = 4096;
/// A whole look takes half a second; this is for a machine that swaps.
const DEADLINE: Duration = Duration::from_secs(60);

/// Runs it in a child of this program, `verb` of which must lead to [`run_from_stdin`]. The
/// child ends with the future.
pub async fn run_in_child(verb: &str, errand: &Errand) -> anyhow::Result<Answer> {
    let json = serde_json::to_vec(errand).context("encode of the errand")?;
    ask_child(verb, "audit", json, DEADLINE, Dropped::Ends).await
}

/// What becomes of a child whose answer nobody waits for any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Dropped {
    Ends,
    /// It has something to finish, and soon will have.
    GoesOn,
}

/// Runs this program's `verb` with an errand on stdin, and waits so long for its answer.
/// Errors call it by `name`.
pub(crate) async fn ask_child<T: DeserializeOwned>(
    verb: &str,
    name: &str,
    errand: Vec<u8>,
    deadline: Duration,
    dropped: Dropped,
) -> anyhow::Result<T> {
    match tokio::time::timeout(deadline, converse(verb, name, errand, dropped)).await {
        Ok(answer) => answer,
        Err(_) => bail!("the {name} took more than {} s", deadline.as_secs()),
    }
}

async fn converse<T: DeserializeOwned>(
    verb: &str,
    name: &str,
    errand: Vec<u8>,
    dropped: Dropped,
) -> anyhow::Result<T> {
    let mut child = tokio::process::Command::new("/proc/self/exe")
        .arg(verb)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(dropped == Dropped::Ends)
        .spawn()
        .with_context(|| format!("start of the {name}"))?;
    child.id().into_iter().for_each(memory::sacrifice);
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(&errand).await.with_context(|| format!("send of the errand to the {name}"))?;
    }
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    let (mut said, mut complaints) = (Vec::new(), Vec::new());
    let answer = async {
        match stdout {
            Some(stdout) => stdout.take(ANSWER_BYTES_MAX + 1).read_to_end(&mut said).await,
            None => Ok(0),
        }
    };
    let complaint = async {
        match stderr {
            Some(stderr) => stderr.take(STDERR_BYTES_MAX).read_to_end(&mut complaints).await,
            None => Ok(0),
        }
    };
    let (answer, _) = tokio::join!(answer, complaint);
    answer.with_context(|| format!("read of the {name}'s answer"))?;
    anyhow::ensure!(
        said.len() as u64 <= ANSWER_BYTES_MAX,
        "the rules make too many differences between ports to remember them all"
    );
    let status = child.wait().await.with_context(|| format!("wait for the {name}"))?;
    if !status.success() {
        bail!(
            "the {name} ended with {status}: {}",
            printable(String::from_utf8_lossy(&complaints).trim(), 300)
        );
    }
    serde_json::from_slice(&said).with_context(|| format!("decode of the {name}'s answer"))
}
