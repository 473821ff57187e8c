//! The bind guard as the daemon keeps it: loaded at start, told of every change of policy and
//! interfaces, put back where somebody took it off, and tried: a bind that must be refused is
//! refused.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context as _;
use tokio::time::Instant;

use crate::cli::{INTERNAL_LOAD_BINDS, Places};
use crate::desired::Desired;
use crate::desired::binds::{BindRules, Surroundings};
use crate::diff::{Code, Finding};
use crate::observed::{BindTally, Link};
use crate::policy::Mode;
use crate::source::bpf::bind::{self, BindEvents, Guard};
use crate::source::bpf::run_loader;
use crate::sys::sockets::try_bind;
use crate::terms::{Actor, Proto};

/// Whoever takes the guard off again and again is answered this often.
const RELOAD: Duration = Duration::from_secs(5);
/// Refused processes whose unit is remembered.
const TRIED_MAX: usize = 256;

#[derive(Default)]
pub(super) struct Keeper {
    pins: PathBuf,
    cgroup: Option<PathBuf>,
    guard: Option<Guard>,
    rules: Option<BindRules>,
    around: Surroundings,
    /// On the sockets of our own trials; a number that nobody else knows.
    mark: u32,
    loaded: Option<Instant>,
    /// The rules wait for a confirmation: what they refuse is counted only, since a service
    /// that a mistake keeps from starting may be the way in.
    pub waits: bool,
    /// The last trial went as it must.
    proven: bool,
    /// Why binds are not refused as they should be.
    pub gap: Option<String>,
    /// A process that is refused often ends at once: its unit and login are asked when it is announced.
    tried: BTreeMap<(u32, String), Actor>,
}

impl Keeper {
    /// Takes the guard away where the policy wants none. An error: the guard does not run.
    pub fn start(&mut self, desired: &Desired, places: &Places) -> anyhow::Result<()> {
        (self.pins, self.cgroup) = (places.pin.clone(), places.cgroup.clone());
        if !desired.policy.enforce.binds {
            if bind::release(&self.pins)? {
                log::info!("[enforce] binds = false: the bind guard was taken away");
            }
            (self.guard, self.rules, self.proven) = (None, None, false);
            return Ok(());
        }
        let mut mark = [0; 4];
        rustix::rand::getrandom(&mut mark, rustix::rand::GetRandomFlags::empty())
            .context("a random number")?;
        // 0 would be every socket's.
        self.mark = u32::from_ne_bytes(mark) | 1;
        self.load()?;
        self.configure(desired, None)?;
        if let Some(guard) = &mut self.guard
            && guard.lift(false)?
        {
            log::info!("the bind guard had been put aside, and is in force again");
        }
        Ok(())
    }

    /// The loader child attaches; this process only opens what it pinned.
    fn load(&mut self) -> anyhow::Result<()> {
        self.loaded = Some(Instant::now());
        let cgroup = bind::cgroup(self.cgroup.as_deref())?;
        let verb = [Some(INTERNAL_LOAD_BINDS.as_ref()), Some(self.pins.as_os_str())];
        let verb = verb.into_iter().chain([cgroup.as_ref().map(|path| path.as_os_str())]);
        run_loader(&verb.flatten().collect::<Vec<_>>(), b"")?;
        if cgroup.is_none() {
            log::info!("cgroup2 is mounted nowhere: the bind guard is at its root without a mount point");
        }
        self.guard = Some(Guard::open(&self.pins)?.context("the loader pinned no bind guard")?);
        Ok(())
    }

    pub fn events(&self) -> Option<BindEvents> {
        self.guard.as_ref()?;
        BindEvents::open(&self.pins).map_err(|error| super::warn("bind events", error)).ok()
    }

    /// Tells the guard what the policy says, and where strangers come in. `links`: `None`
    /// where they have not been read yet.
    pub fn configure(&mut self, desired: &Desired, links: Option<&[Link]>) -> anyhow::Result<()> {
        let Some(guard) = &mut self.guard else { return Ok(()) };
        let policy = &desired.policy;
        let mesh = links.unwrap_or_default().iter().filter(|link| link.name == policy.mesh.interface);
        let found: Vec<IpAddr> = mesh
            .flat_map(|link| link.addresses.iter().map(|net| net.addr()))
            .filter(|address| desired.in_mesh(*address))
            .collect();
        let mut rules = BindRules::new(desired, &found);
        // A policy that was rolled back to nothing refuses nothing.
        if policy.enforce.firewall && desired.table.is_none() {
            rules.mode = None;
        } else if self.waits && rules.mode == Some(Mode::Enforce) {
            rules.mode = Some(Mode::Audit);
        }
        self.around = bind::surroundings(policy, links)?;
        guard.configure(&rules, &self.around, self.mark, links.is_some())?;
        self.rules = Some(rules);
        Ok(())
    }

    /// Whether there is a guard to keep: the policy asks for it, and it could be loaded.
    pub fn runs(&self) -> bool {
        self.guard.is_some()
    }

    /// After a look: puts the guard back where its programs were taken off, and tries it.
    /// An error is why it does not hold. `true`: it was put back.
    pub fn keep(&mut self) -> anyhow::Result<bool> {
        self.proven = false;
        let Some(guard) = &self.guard else { return Ok(false) };
        if guard.is_lifted()? {
            return Ok(false);
        }
        let due = self.loaded.is_none_or(|at| at.elapsed() >= RELOAD);
        let gone = !guard.is_whole();
        if gone && due {
            let rules = self.rules.clone();
            self.load()?;
            // Its maps may be new ones, in which nothing is written yet.
            if let (Some(guard), Some(rules)) = (&mut self.guard, rules) {
                guard.configure(&rules, &self.around, self.mark, true)?;
            }
        }
        self.prove()?;
        Ok(gone && due)
    }

    /// Nothing is ever listened on. In audit mode our own trials are refused all the same; they
    /// prove that the guard judges, and not that it refuses anybody.
    fn prove(&mut self) -> anyhow::Result<()> {
        let Some(rules) = self.rules.as_ref().filter(|rules| rules.mode.is_some()) else { return Ok(()) };
        let mut refused = 0;
        for at in trials(rules, &self.around) {
            match try_bind(at, self.mark) {
                Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => refused += 1,
                // There is nothing of this family to be bound here.
                Err(error) if error.raw_os_error() == Some(libc::EAFNOSUPPORT) => {}
                Err(error) => return Err(error).context("trial of the bind guard"),
                Ok(()) => anyhow::bail!(
                    "the bind guard is configured but does not refuse: tcp/{at} could be bound by the daemon \
                     itself; is it outside the guarded control group?"
                ),
            }
        }
        self.proven = refused > 0 && rules.mode == Some(Mode::Enforce);
        Ok(())
    }

    /// Whether binds are refused right now, proven by trial.
    pub fn holds(&self) -> bool {
        self.proven
    }

    pub fn tally(&self) -> Option<BindTally> {
        self.guard.as_ref()?.tally().ok()
    }

    /// Who was refused, while it may still be asked.
    pub fn remember(&mut self, actors: Vec<Actor>) {
        for actor in actors.into_iter().filter(|actor| actor.unit.is_some() || actor.user.is_some()) {
            if self.tried.len() >= TRIED_MAX {
                self.tried.clear();
            }
            self.tried.insert((actor.pid, actor.process.clone()), actor);
        }
    }

    /// Fills in the units and login users of those that have ended meanwhile.
    pub fn name(&self, findings: &mut [Finding]) {
        for finding in findings.iter_mut().filter(|finding| finding.code == Code::BindRefused) {
            let Some(actor) = &mut finding.by else { continue };
            if let Some(known) = self.tried.get(&(actor.pid, actor.process.clone())) {
                actor.unit = actor.unit.take().or_else(|| known.unit.clone());
                actor.user = actor.user.take().or_else(|| known.user.clone());
            }
        }
    }
}

/// Binds that these rules refuse, for each of the two programs one: of ports that need no right
/// of their own.
fn trials(rules: &BindRules, around: &Surroundings) -> impl Iterator<Item = SocketAddr> {
    let anywhere: [IpAddr; 2] = [Ipv4Addr::UNSPECIFIED.into(), Ipv6Addr::UNSPECIFIED.into()];
    anywhere.into_iter().filter_map(|address| {
        let mut wide = (1024..=u16::MAX).map(|port| SocketAddr::new(address, port));
        wide.find(|at| rules.refuses(around, Proto::Tcp, *at, false))
    })
}

#[cfg(test)]
mod tests {
    use crate::cli::Places;
    use crate::daemon::Daemon;
    use crate::desired::Desired;
    use crate::desired::samples;

    #[test]
    fn why_binds_are_not_refused_is_not_forgotten_while_a_look_is_under_way() {
        let dir = tempfile::tempdir().expect("a directory");
        let at = |name: &str| dir.path().join(name);
        let places = Places { state: at("state"), run: at("run"), pin: at("pin"), cgroup: None };
        let desired = Desired::new(samples::spoke(), samples::TODAY).expect("a way in");
        let mut daemon = Daemon::new(desired, "hash".into(), places, at("policy.toml"));
        let eyes = daemon.eyes.take();
        daemon.gap_of_binds(Some("the loader failed".into()));
        assert!(daemon.wanted.contains(&crate::observed::Facet::Binds), "looked at again");
        daemon.eyes = eyes;
        daemon.tell_eyes();
        assert_eq!(daemon.eyes.and_then(|eyes| eyes.binds_gap).as_deref(), Some("the loader failed"));
    }
}
