//! Capabilities: everything that the daemon and its children don't need is dropped right
//! after start, from the bounding set too, so that no child gets it back by exec.

use caps::{CapSet, Capability, CapsHashSet};

/// What stays, and for what.
const KEPT: [Capability; 6] = [
    // nftables, WireGuard, tc, nfnetlink and rtnetlink groups.
    Capability::CAP_NET_ADMIN,
    // Maps, links and the loader child; PERFMON for the tracepoint.
    Capability::CAP_BPF,
    Capability::CAP_PERFMON,
    // Which process holds a socket: /proc/PID/fd of other users.
    Capability::CAP_SYS_PTRACE,
    Capability::CAP_DAC_READ_SEARCH,
    // `[metrics] port` may be below 1024.
    Capability::CAP_NET_BIND_SERVICE,
];

/// Drops all but [`KEPT`] and proves that what was dropped can't be raised again. A process
/// that has none to begin with passes: there is nothing to drop.
pub fn drop_needless() -> anyhow::Result<()> {
    let had = caps::read(None, CapSet::Permitted)?;
    let keep: CapsHashSet = KEPT.into_iter().filter(|c| had.contains(c)).collect();
    // The bounding set needs SETPCAP, so it goes first.
    if had.contains(&Capability::CAP_SETPCAP) {
        for capability in caps::read(None, CapSet::Bounding)? {
            if !KEPT.contains(&capability) {
                caps::drop(None, CapSet::Bounding, capability)?;
            }
        }
    }
    caps::clear(None, CapSet::Ambient).or_else(|error| if had.is_empty() { Ok(()) } else { Err(error) })?;
    caps::set(None, CapSet::Effective, &keep)?;
    caps::set(None, CapSet::Permitted, &keep)?;
    caps::set(None, CapSet::Inheritable, &CapsHashSet::new())?;
    rustix::thread::set_no_new_privs(true)?;
    if had.contains(&Capability::CAP_SYS_ADMIN)
        && caps::raise(None, CapSet::Effective, Capability::CAP_SYS_ADMIN).is_ok()
    {
        anyhow::bail!("CAP_SYS_ADMIN came back after it was dropped");
    }
    Ok(())
}
