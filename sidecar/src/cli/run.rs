//! `run`: the daemon; and the children that load its eBPF programs and serve its metrics.

use std::path::Path;

use anyhow::Context;

use super::Global;
use crate::daemon::logging;
use crate::policy;
use crate::source::bpf;
use crate::sys::clock;

/// The hidden verb that the daemon starts itself with; reads its configuration on stdin.
pub const INTERNAL_LOAD: &str = "internal-load-bpf";
/// The same for the bind guard; reads nothing.
pub const INTERNAL_LOAD_BINDS: &str = "internal-load-binds";

/// The same for the metrics server, which is given a socket as stdin.
pub const INTERNAL_HTTP: &str = "internal-http";
/// Another: reads on stdin what to ask from outside, and writes what was met to stdout.
pub const INTERNAL_PROBE: &str = "internal-probe";
/// The same for the frames by which our controls are tried.
pub const INTERNAL_CANARY: &str = "internal-canary";

/// The same for a process that speaks to the hub.
pub const INTERNAL_SEND: &str = "internal-send";

pub fn run(global: &Global) -> anyhow::Result<u8> {
    crate::sys::memory::limit_arenas();
    logging::start(global.quiet);
    let (loaded, desired) = super::policy::load(global, clock::now())?;
    for note in &loaded.notes {
        log::warn!("{}:{}: {}", loaded.file, note.mistake.line, note.mistake.what);
    }
    let hash = policy::fingerprint(&loaded.policy);
    let file = std::path::absolute(&global.policy).unwrap_or_else(|_| global.policy.clone());
    let mut places = global.places()?;
    match bpf::pin_dir(global.pin_dir.as_deref(), true) {
        Ok(pin) => places.pin = pin.unwrap_or(places.pin),
        Err(error) => log::warn!("the counters need a bpffs: {error:#}"),
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(2)
        // Longer than a tick: the worker waits for the next look rather than being made anew.
        .thread_keep_alive(std::time::Duration::from_secs(15))
        .build()
        .context("start the event loop")?;
    runtime.block_on(crate::daemon::run(desired, hash, places, file))?;
    Ok(0)
}

pub fn load_binds(pin_dir: &Path, cgroup: Option<&Path>) -> anyhow::Result<u8> {
    bpf::bind::load_and_pin(pin_dir, cgroup)?;
    Ok(0)
}

pub fn serve_http() -> anyhow::Result<u8> {
    crate::daemon::server::run()?;
    Ok(0)
}

pub fn load_bpf(pin_dir: &Path, guard_only: bool) -> anyhow::Result<u8> {
    bpf::prepare_loader();
    if guard_only {
        bpf::guard::load(pin_dir)?;
        return Ok(0);
    }
    // One goes without the other; what failed is told of both.
    let guard = bpf::guard::load(pin_dir);
    let omitted = match (bpf::load_from_stdin(pin_dir), guard) {
        (Ok(omitted), Ok(())) => omitted,
        (Ok(_), Err(error)) | (Err(error), Ok(())) => return Err(error),
        (Err(error), Err(guard)) => anyhow::bail!("{error:#}; {guard:#}"),
    };
    if omitted != bpf::Omitted::default() {
        eprintln!("some services are not counted one by one: {omitted:?}");
    }
    Ok(0)
}

pub fn probe() -> anyhow::Result<u8> {
    crate::source::outside::run_from_stdin()?;
    Ok(0)
}

pub fn send() -> anyhow::Result<u8> {
    crate::daemon::sender::run_from_stdin()?;
    Ok(0)
}
