//! Commit-confirm: rules that enforce something new are on trial. Before they go in, the
//! way back to the last confirmed ones is armed outside our process; only a confirmation
//! disarms it, and `kill -9` of everything of ours does not.
//!
//! In `RUN/rollback` lies one token for each trial, and its name tells how it stands:
//!
//! ```text
//! armed.ID --+--> confirmed.ID --> (gone)    confirmed, and recorded in the state directory
//!            +--> firing.ID --> fired.ID     the time ran out; the old rules are back
//! ```
//!
//! Every step is one rename, so whoever comes first has won: a confirmation and the
//! watchdog can't both act, whatever is killed in between. The daemon, commands and the
//! watchdog agree on what is in force by these names and by nothing else. In the state
//! directory lie the last confirmed policy, its rules as a file for `nft -f`, and a policy
//! that was rolled back, so that neither a restart nor a boot tries that one again.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::Context;
use jiff::civil::Date;
use rustix::fs::{FlockOperation, flock};

use super::{ApplyError, Found, put_in_place, sealed};
use crate::cli::Places;
use crate::desired::{Desired, TABLE, take_out_canaries};
use crate::policy::{self, Policy};
use crate::ruleset::{Change, NamedSet, Statement, Table, compare, render};
use crate::source::child;
use crate::source::evidence::{self, Sought};
use crate::source::nft;
use crate::sys::file::replace_private;
use crate::sys::{clock, netns};
use crate::terms::printable;

/// The last confirmed policy, in its normal form.
const CONFIRMED: &str = "confirmed.toml";
/// The policy that was rolled back last, until another one comes.
const REFUSED: &str = "refused.toml";
/// The last confirmed policy, in the run directory, while the state directory can't take it.
const UNRECORDED: &str = "last.toml";
/// The id of the trial that was confirmed last.
const SETTLED: &str = "settled";
/// At the head of either.
const SUM: &str = "# sum ";
const DIRECTORY: &str = "rollback";
const LOCK: &str = "lock";
/// Our own files stay far below this; more is not ours.
const FILE_MAX: u64 = 16 << 20;
/// How long another command may take with its change.
const LOCK_PATIENCE: Duration = Duration::from_secs(40);
/// A watchdog that is this late is gone, or its nft fails: we do its work.
const OVERDUE: Duration = Duration::from_secs(3);
/// How long a service manager may take to start the timer.
const TIMER_PATIENCE: Duration = Duration::from_secs(10);

/// How a trial stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// The new rules are in force, and the way back is armed.
    Armed,
    /// The old rules are being put back.
    Firing,
    /// Confirmed, but not recorded in the state directory yet.
    Confirmed,
    /// Time ran out, and the old rules are back.
    Fired,
}

impl Phase {
    const ALL: [Phase; 4] = [Phase::Armed, Phase::Firing, Phase::Confirmed, Phase::Fired];

    const fn name(self) -> &'static str {
        match self {
            Phase::Armed => "armed",
            Phase::Firing => "firing",
            Phase::Confirmed => "confirmed",
            Phase::Fired => "fired",
        }
    }
}

/// Which trial there is and how it stands: cheap to ask for.
pub type Glance = Option<(Phase, String)>;

/// A policy whose rules are, or were, on trial.
#[derive(Clone, Debug, PartialEq)]
pub struct Trial {
    pub id: String,
    /// [`policy::fingerprint`] of the policy.
    pub fingerprint: String,
    /// When the rules before come back, by the monotonic clock.
    pub deadline: Duration,
    /// The policy in its normal form.
    pub text: String,
}

/// A policy that nobody confirmed in time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refused {
    pub fingerprint: String,
}

/// What came of bringing a policy's rules in.
#[derive(Debug)]
pub enum Brought {
    /// In force and confirmed: there was nothing to confirm. `unrecorded` says why a boot
    /// would not know of it.
    Confirmed { changes: Vec<Change>, unrecorded: Option<anyhow::Error> },
    /// In force and on trial. `again`: it was before.
    OnTrial { changes: Vec<Change>, again: bool },
    /// `[enforce] firewall = false`. `taken_back`: the policy that was on trial till now;
    /// the rules before it are back.
    NotWanted { taken_back: Option<String> },
}

/// What became of a trial whose token is gone.
#[derive(Debug)]
pub enum End {
    Confirmed,
    /// Rules that needed no trial took its place.
    Replaced(Box<Desired>),
    /// Somebody took its files away. Nobody confirmed it.
    Lost,
}

#[derive(Debug, thiserror::Error)]
pub enum BringError {
    /// Nothing was changed.
    #[error("nothing was changed")]
    Before(#[source] anyhow::Error),
    /// The way back is armed; how far the change came is not known.
    #[error("the rules are on trial and did not go in whole")]
    Half(#[source] ApplyError),
}

/// The rules of the armed trial were looked for, and are in force: what a confirmation asks for.
#[derive(Debug)]
pub struct InForce {
    id: String,
}

/// The right to change which rules stand, for as long as it is held.
pub struct Lock {
    _file: File,
}

/// The files of one instance.
#[derive(Clone, Debug)]
pub struct Ledger {
    state: PathBuf,
    run: PathBuf,
    dir: PathBuf,
}

/// The script gets: seconds, directory, ID, nft, state directory. SIGHUP, SIGINT and SIGTERM
/// are ignored, since a closed session must not cancel the way back. It goes ahead when
/// the token is its own, or when the whole directory is gone, as a service manager removes
/// a run directory; the copy of the rules in the state directory is gone only if somebody
/// confirmed or released. It has fired when the old rules are back, and not before.
/// Its standard error is locked for as long as it lives, so `sleep`, which may outlive it, has another.
const SCRIPT: &str = r#"trap "" HUP INT TERM
sleep "$1" 2>/dev/null
mv "$2/armed.$3" "$2/firing.$3" 2>/dev/null || test -e "$2/armed.$3" || test ! -d "$2" || exit 0
done=no
for rules in "$2/keep.$3.nft" "$2/whole.$3.nft" "$5/rollback.$3.nft"; do
  test "$done" = yes || { test -e "$rules" && "$4" -f "$rules" && done=yes; }
done
test "$done" = yes || exit 1
cp "$2/firing.$3" "$5/.refused.$3" && mv "$5/.refused.$3" "$5/refused.toml" || rm -f "$5/.refused.$3"
mv "$2/firing.$3" "$2/fired.$3" || mv "$2/armed.$3" "$2/fired.$3"
rm -f "$5/rollback.$3.nft"
"#;

/// The watchdog's command line in words that systemd leaves alone. It puts variables of its own in place of `$`, and
/// at every daemon-reload reads its own file of a transient unit anew, where it has written `$`, `;` and "`" in
/// a way that it doesn't read (252): the script would be another one. So it goes through printf.
fn plain_words(watchdog: &[OsString]) -> anyhow::Result<[OsString; 3]> {
    let [shell, option, script, rest @ ..] = watchdog else { anyhow::bail!("the watchdog has no script") };
    let quoted: String = script.to_string_lossy().chars().fold(String::new(), |mut out, letter| {
        match letter {
            ' ' | '/' | '.' | '-' | '=' => out.push(letter),
            letter if letter.is_ascii_alphanumeric() => out.push(letter),
            letter => out.push_str(&format!("\\{:03o}", u32::from(letter))),
        }
        out
    });
    let mut line = format!("printf '{quoted}' | {} -s", shell.to_string_lossy());
    // The first of them names the script.
    for word in rest.get(1..).unwrap_or_default() {
        let word = word.to_str().filter(|word| !word.contains(['$', ';', '`', '\'', '"', '\\', '\n']));
        let word = word.context("a path that systemd would change")?;
        line += &format!(" '{word}'");
    }
    Ok([shell.clone(), option.clone(), line.into()])
}

impl Ledger {
    pub fn new(places: &Places) -> Self {
        let (state, run) = (places.state.clone(), places.run.clone());
        Self { state, dir: run.join(DIRECTORY), run }
    }

    /// Which trial there is, the live one first.
    pub fn glance(&self) -> anyhow::Result<Glance> {
        let doing = || format!("look for a trial in {}", self.dir.display());
        let entries = match fs::read_dir(&self.dir) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error).with_context(doing),
        };
        let mut found: Glance = None;
        for entry in entries {
            let name = entry.with_context(doing)?.file_name();
            let Some((phase, id)) = name.to_str().and_then(|name| name.split_once('.')) else { continue };
            let Some(phase) = Phase::ALL.into_iter().find(|p| p.name() == phase) else { continue };
            if found.as_ref().is_none_or(|(before, _)| phase < *before) {
                found = Some((phase, id.to_owned()));
            }
        }
        Ok(found)
    }

    /// The trial itself. It may have gone on to another phase by now.
    pub fn read(&self, glance: &Glance) -> Option<Trial> {
        let (phase, id) = glance.as_ref()?;
        Trial::parse(id, &read_text(&self.token(*phase, id)).ok()?)
    }

    /// What the last confirmed policy comes to today; `None` where none was confirmed, or it can't
    /// be read ([`Ledger::unsealed`] says why).
    pub fn confirmed(&self, today: Date) -> Option<Desired> {
        self.last(today).ok().flatten()
    }

    /// The same, where what can't be read is an error and not nothing.
    fn last(&self, today: Date) -> anyhow::Result<Option<Desired>> {
        Ok(self.last_or(today, None)?.map(Cow::into_owned))
    }

    /// The same beside a policy of today in its normal form, which as a rule is that one: it isn't read twice.
    fn last_or<'a>(
        &self,
        today: Date,
        known: Option<(&str, &'a Desired)>,
    ) -> anyhow::Result<Option<Cow<'a, Desired>>> {
        let mut errors = Vec::new();
        for path in [self.dir.join(UNRECORDED), self.state.join(CONFIRMED)] {
            let read = match read_text(&path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                read => read.map_err(anyhow::Error::from),
            };
            let desired = read.and_then(|text| {
                anyhow::ensure!(is_whole(&text), "it was changed, or cut off");
                if let Some((_, known)) = known.filter(|(normal, _)| without_sum(&text) == *normal) {
                    return Ok(Cow::Borrowed(known));
                }
                let loaded = policy::parse(&text, CONFIRMED, today).map_err(|error| {
                    log::debug!("{error}");
                    anyhow::anyhow!("it is no policy for this version")
                })?;
                Ok(Cow::Owned(Desired::new(loaded.policy, today)?))
            });
            match desired {
                Ok(desired) => return Ok(Some(desired)),
                Err(error) => errors.push(format!("{}: {error:#}", path.display())),
            }
        }
        anyhow::ensure!(errors.is_empty(), "the last confirmed policy, {}", errors.join("; "));
        Ok(None)
    }

    /// The sealed rules, unless somebody changed them.
    fn sealed(&self) -> Option<String> {
        read_text(&self.state.join(sealed::FILE)).ok().filter(|text| sealed::is_whole(text))
    }

    /// Puts the sealed rules in force where the last confirmed policy can't be read and there is
    /// no table of ours. `true`: that was so.
    pub fn restore(&self, _lock: &Lock, today: Date) -> anyhow::Result<bool> {
        if self.last(today).is_ok() || self.sealed().is_none() || nft::list_table()?.is_some() {
            return Ok(false);
        }
        nft::run_file(&self.state.join(sealed::FILE)).map(|()| true)
    }

    /// The state directory has not taken the last confirmed policy yet.
    pub fn is_unrecorded(&self) -> bool {
        self.dir.join(UNRECORDED).exists()
    }

    /// The policy that was rolled back last, unless another one came since.
    pub fn refused(&self) -> Option<Refused> {
        let of = |text: io::Result<String>| {
            Some(Refused { fingerprint: Trial::parse("", &text.ok()?)?.fingerprint })
        };
        match self.glance() {
            Ok(Some((phase @ (Phase::Fired | Phase::Firing), id))) => of(read_text(&self.token(phase, &id))),
            Ok(Some(_)) => None,
            _ => of(read_text(&self.state.join(REFUSED))),
        }
    }

    /// Waits while another command or the daemon brings rules in.
    pub fn lock(&self) -> anyhow::Result<Lock> {
        let started = clock::Uptime::start();
        loop {
            if let Some(lock) = self.try_lock()? {
                return Ok(lock);
            }
            anyhow::ensure!(
                started.elapsed() < LOCK_PATIENCE,
                "another spokeguard has been changing the rules for {} s",
                LOCK_PATIENCE.as_secs()
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// `None`: another one has it.
    pub fn try_lock(&self) -> anyhow::Result<Option<Lock>> {
        fs::create_dir_all(&self.run).with_context(|| format!("create {}", self.run.display()))?;
        // Who can write here can choose what root's nft will be given.
        let meta = fs::metadata(&self.run).with_context(|| format!("look at {}", self.run.display()))?;
        anyhow::ensure!(
            meta.mode() & 0o022 == 0,
            "{} can be written by others (mode {:04o}): the way back is not safe there; use a --run-dir of root's",
            self.run.display(),
            meta.mode() & 0o7777
        );
        match DirBuilder::new().mode(0o700).create(&self.dir) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(error).with_context(|| format!("create {}", self.dir.display()));
            }
            _ => {}
        }
        let path = self.dir.join(LOCK);
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW)
            .open(&path)
            .with_context(|| format!("open {}", path.display()))?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Some(Lock { _file: file })),
            Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
            Err(error) => Err(error).with_context(|| format!("lock {}", path.display())),
        }
    }

    /// Puts a policy's rules in force: on trial, unless they change nothing that enforces.
    pub fn bring_in(&self, lock: &Lock, desired: &Desired, within: Duration) -> Result<Brought, BringError> {
        let before = BringError::Before;
        let Some(table) = &desired.table else {
            let taken_back = self.take_back(lock, desired.today).map_err(before)?;
            return Ok(Brought::NotWanted { taken_back });
        };
        if let Err(error) = self.settle(lock, desired.today) {
            log::warn!("{error:#}");
        }
        if let Ok(Some((Phase::Firing, id))) = self.glance() {
            self.outwait(&id);
        }
        let found = Found::look().map_err(before)?;
        // As `plan` tells of them; what a canary left goes all the same.
        let mut told = found.table.clone();
        told.as_mut().into_iter().for_each(take_out_canaries);
        let changes = compare::changes(table, told.as_ref());
        let normal = policy::show(&desired.policy);
        let fingerprint = policy::sum(&normal);
        let glance = self.glance().map_err(before)?;
        let trial = self.read(&glance).filter(|_| matches!(glance, Some((Phase::Armed, _))));
        let confirmed = self.last_or(desired.today, Some((&normal, desired))).unwrap_or_else(|error| {
            log::warn!("{error:#}");
            None
        });
        if let Some(trial) = trial.as_ref().filter(|trial| trial.fingerprint == fingerprint) {
            put_in_place(desired, found).map_err(BringError::Half)?;
            if self.old(trial).is_none() {
                self.note_old(trial, desired);
            }
            // Whoever armed it may have come no further, or the watchdog was killed as well.
            if !self.is_watched(&trial.id) {
                let nft = nft::program().context("arm the way back").map_err(before)?;
                self.watch_over(trial, trial.left(), &nft).map_err(before)?;
            }
            return Ok(Brought::OnTrial { changes, again: true });
        }
        let stood = confirmed.as_ref().and_then(|confirmed| confirmed.table.as_ref());
        let nothing_new = match stood {
            Some(stood) => compare::changes(table, Some(stood)).is_empty(),
            None if self.sealed().is_some_and(|text| sealed::policy(&text) == Some(&*fingerprint)) => true,
            None => changes.is_empty() && trial.is_none() && self.copies().is_empty(),
        };
        // What drops nothing can't lock anybody out.
        if nothing_new || !drops(table) {
            put_in_place(desired, found).map_err(|error| before(error.into()))?;
            // A rollback that had begun may have come after these rules.
            if self.withdraw() {
                super::apply_table(desired).map_err(|error| before(error.into()))?;
            }
            let unrecorded = self.record_as(desired, &normal).err();
            return Ok(Brought::Confirmed { changes, unrecorded });
        }
        let trial = self
            .arm(lock, desired, found.table.as_ref(), confirmed.as_deref(), within)
            .context("arm the way back")
            .map_err(before)?;
        put_in_place(desired, found).map_err(BringError::Half)?;
        self.note_old(&trial, desired);
        Ok(Brought::OnTrial { changes, again: false })
    }

    /// Looks whether the rules on trial are what the kernel holds: whoever put them on trial may have been
    /// killed before they went in, or nft may have failed. What is missing, where they are not; `None`: no
    /// trial is armed.
    pub fn look(&self, _lock: &Lock, today: Date) -> anyhow::Result<Option<Result<InForce, Vec<Change>>>> {
        let glance = self.glance()?;
        let Some((Phase::Armed, id)) = &glance else { return Ok(None) };
        // One that can't be read is for whoever settles.
        let Some(trial) = self.read(&glance) else { return Ok(None) };
        let policy = policy::parse(&trial.text, "the policy on trial", today)?.policy;
        let mut found = nft::list_table()?;
        found.as_mut().into_iter().for_each(take_out_canaries);
        // The day may have changed since, and with it what an exception comes to.
        let days = [Some(today), today.yesterday().ok()];
        let mut missing = None;
        for day in days.into_iter().flatten() {
            let table = Desired::new(policy.clone(), day)?.table;
            let changes = table.map_or_else(Vec::new, |table| compare::changes(&table, found.as_ref()));
            if changes.is_empty() {
                return Ok(Some(Ok(InForce { id: id.clone() })));
            }
            missing.get_or_insert(changes);
        }
        Ok(missing.map(Err))
    }

    /// Confirms: the rules in force stay. `false`: nothing is armed any more. An error after that
    /// says that a boot will not know of it; the rules stay all the same.
    pub fn confirm(&self, lock: &Lock, in_force: &InForce, today: Date) -> anyhow::Result<bool> {
        let InForce { id } = in_force;
        let (from, to) = (self.token(Phase::Armed, id), self.token(Phase::Confirmed, id));
        match fs::rename(&from, &to) {
            Ok(()) => self.settle(lock, today).map(|()| true),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error).with_context(|| format!("rename {}", from.display())),
        }
    }

    /// Ends the armed trial now, as if its time had run out.
    pub fn roll_back(&self, lock: &Lock, today: Date) -> anyhow::Result<()> {
        let Some((Phase::Armed, id)) = self.glance()? else { return Ok(()) };
        if let Err(error) = self.fire(Phase::Armed, &id) {
            // Its watchdog tries again, in its time.
            let _ = fs::rename(self.token(Phase::Firing, &id), self.token(Phase::Armed, &id));
            return Err(error);
        }
        self.settle(lock, today)
    }

    /// Whether anything was ever on trial since the run directory is there.
    pub fn is_empty(&self) -> bool {
        !self.dir.exists()
    }

    /// Why a boot would not come up with the last confirmed rules; `None`: it would.
    pub fn unsealed(&self, today: Date) -> Option<String> {
        let confirmed = match self.last(today) {
            Ok(confirmed) => confirmed,
            Err(error) => return Some(format!("{error:#}")),
        };
        let wanted = confirmed.as_ref().and_then(sealed::text);
        let tunnel = || {
            let wanted = sealed::tunnel(&confirmed.as_ref()?.policy.mesh);
            let is_other = match read_text(&self.state.join(sealed::TUNNEL_FILE)) {
                Ok(found) => found != wanted,
                // Of a version that had none: `complete` writes it.
                Err(error) => error.kind() != io::ErrorKind::NotFound,
            };
            is_other.then(|| format!("{} beside it is not of its tunnel", sealed::TUNNEL_FILE))
        };
        match (wanted, read_text(&self.state.join(sealed::FILE))) {
            (None, Ok(text)) if !sealed::is_whole(&text) => Some("it was changed, or cut off".to_owned()),
            (None, _) => None,
            (Some(wanted), Ok(text)) if wanted == text => tunnel(),
            (Some(_), Ok(text)) if !sealed::is_whole(&text) => Some("it was changed, or cut off".to_owned()),
            (Some(_), Ok(_)) => Some("it is of another policy or version".to_owned()),
            (Some(_), Err(error)) => Some(format!("it can't be read: {error}")),
        }
    }

    /// Finishes what was begun by somebody who came no further: records a confirmation, and
    /// does the work of a watchdog that is gone.
    pub fn settle(&self, _lock: &Lock, today: Date) -> anyhow::Result<()> {
        if self.is_unrecorded()
            && let Some(last) = self.confirmed(today)
        {
            self.record(&last.policy, today)?;
        }
        self.sweep();
        let glance = self.glance()?;
        let Some((phase, id)) = &glance else { return Ok(()) };
        let Some(trial) = self.read(&glance) else {
            return if self.token(*phase, id).exists() { self.settle_unreadable(*phase, id) } else { Ok(()) };
        };
        match glance {
            Some((Phase::Confirmed, id)) => {
                let policy = policy::parse(&trial.text, "the confirmed policy", today)?.policy;
                let recorded = self.record(&policy, today);
                // Where not even that could be noted, the token goes on saying it.
                if recorded.is_ok() || self.is_unrecorded() {
                    // For a daemon that sees another state directory, or none.
                    let _ = write_private(&self.run.join(SETTLED), &id);
                    self.clear(&id);
                }
                recorded?;
            }
            Some((Phase::Fired, id)) => {
                let path = self.state.join(REFUSED);
                let text = read_text(&self.token(Phase::Fired, &id));
                if let Ok(text) = text
                    && read_text(&path).ok().as_ref() != Some(&text)
                {
                    replace_private(&path, text.as_bytes())
                        .with_context(|| format!("write {}", path.display()))?;
                }
                let _ = fs::remove_file(self.copy(&id));
            }
            Some((phase @ (Phase::Armed | Phase::Firing), id))
                if clock::monotonic() > trial.deadline + OVERDUE =>
            {
                log::error!("the watchdog of a rollback is gone: putting the rules back instead of it");
                self.fire(phase, &id)?;
            }
            _ => {}
        }
        Ok(())
    }

    /// A token that says nothing, or that others could write. What was there before comes back, where
    /// that is known and no watchdog is about to see to it.
    fn settle_unreadable(&self, phase: Phase, id: &str) -> anyhow::Result<()> {
        let token = self.token(phase, id);
        if matches!(phase, Phase::Armed | Phase::Firing) {
            if self.is_watched(id) {
                return Ok(());
            }
            if self.ways_back(id).iter().any(|file| file.exists()) {
                return self.fire(phase, id);
            }
        }
        log::error!("{} can't be read, and goes: nothing hangs on it", token.display());
        self.clear(id);
        Ok(())
    }

    /// Removes the files of trials that are over, and those that somebody was killed over writing.
    fn sweep(&self) {
        let live = |id: &str| {
            [Phase::Armed, Phase::Firing, Phase::Confirmed]
                .iter()
                .any(|phase| self.token(*phase, id).exists())
        };
        let names = |dir: &Path| {
            let entries = fs::read_dir(dir).into_iter().flatten().flatten();
            entries.filter_map(|entry| entry.file_name().into_string().ok()).collect::<Vec<_>>()
        };
        let of_trial = |name: &str| {
            let (kind, id) = name.split_once('.')?;
            let known = ["keep", "whole", "old", "watch"].contains(&kind);
            known.then(|| id.strip_suffix(".nft").unwrap_or(id).to_owned())
        };
        for name in names(&self.dir) {
            if is_abandoned(&name) || of_trial(&name).is_some_and(|id| !live(&id)) {
                let _ = fs::remove_file(self.dir.join(name));
            }
        }
        for name in names(&self.run).into_iter().filter(|name| is_abandoned(name)) {
            let _ = fs::remove_file(self.run.join(name));
        }
        for name in names(&self.state) {
            // The watchdog's own, which has the trial's name and no process's.
            if is_abandoned(&name) || name.strip_prefix(".refused.").is_some_and(|id| !live(id)) {
                let _ = fs::remove_file(self.state.join(name));
            }
        }
    }

    /// Connections that were there when the rules went in; `None` if nobody has looked yet.
    pub fn old(&self, trial: &Trial) -> Option<BTreeSet<u64>> {
        let text = read_text(&self.dir.join(format!("old.{}", trial.id))).ok()?;
        text.lines().map(|line| line.parse().ok()).collect()
    }

    /// Notes them. Whatever goes wrong here costs a confirmation and never makes one.
    pub fn note_old(&self, trial: &Trial, desired: &Desired) -> BTreeSet<u64> {
        let Some(sought) = Sought::new(desired) else { return BTreeSet::new() };
        match evidence::connections(&sought) {
            Ok(list) => {
                let old: BTreeSet<u64> = list.into_iter().map(|connection| connection.cookie).collect();
                let text: String = old.iter().map(|cookie| format!("{cookie}\n")).collect();
                if let Err(error) = write_private(&self.dir.join(format!("old.{}", trial.id)), &text) {
                    log::warn!("{error:#}");
                }
                old
            }
            Err(error) => {
                log::warn!("no connection will confirm this: {error:#}");
                BTreeSet::new()
            }
        }
    }

    /// Makes this the last confirmed policy, and its rules the sealed ones. After an error
    /// it is that all the same, until the next boot.
    pub fn record(&self, policy: &Policy, today: Date) -> anyhow::Result<()> {
        let desired = Desired::new(policy.clone(), today).context("the confirmed policy")?;
        self.record_as(&desired, &policy::show(policy))
    }

    /// The same where its normal form is at hand.
    fn record_as(&self, desired: &Desired, normal: &str) -> anyhow::Result<()> {
        let unrecorded = self.dir.join(UNRECORDED);
        let recorded = self.record_in_state(desired, normal);
        match &recorded {
            Ok(()) => drop(fs::remove_file(unrecorded)),
            Err(_) => {
                if let Err(error) = write_private(&unrecorded, &summed(normal)) {
                    log::warn!("{error:#}");
                }
            }
        }
        recorded.with_context(|| {
            let state = self.state.display();
            format!(
                "the rules in force stay, but {state} can't be written: the next boot comes up with those \
                 confirmed before"
            )
        })
    }

    /// Writes the tunnel of the last confirmed policy where no version had done so yet.
    pub fn complete(&self, today: Date) -> anyhow::Result<()> {
        if self.state.join(sealed::TUNNEL_FILE).exists() || !self.state.join(sealed::FILE).exists() {
            return Ok(());
        }
        let Some(confirmed) = self.last(today)? else { return Ok(()) };
        self.write_in_state(sealed::TUNNEL_FILE, &sealed::tunnel(&confirmed.policy.mesh))
    }

    fn write_in_state(&self, name: &str, text: &str) -> anyhow::Result<()> {
        let path = self.state.join(name);
        // Written only where it says something else: nothing wears out a quiet host's flash.
        if read_text(&path).is_ok_and(|found| found == text) {
            return Ok(());
        }
        replace_private(&path, text.as_bytes()).with_context(|| format!("write {}", path.display()))?;
        File::open(&self.state).and_then(|dir| dir.sync_all()).context("sync the state directory")
    }

    fn record_in_state(&self, desired: &Desired, normal: &str) -> anyhow::Result<()> {
        if let Some(text) = sealed::text_as(desired, &policy::sum(normal)) {
            self.write_in_state(sealed::FILE, &text)?;
            self.write_in_state(sealed::TUNNEL_FILE, &sealed::tunnel(&desired.policy.mesh))?;
        }
        self.write_in_state(CONFIRMED, &summed(normal))?;
        match fs::remove_file(self.state.join(REFUSED)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(error).context("forget the policy that was rolled back")
            }
            _ => Ok(()),
        }
    }

    /// Forgets everything, for `release`: no way back, no confirmed rules, nothing that a
    /// boot would load.
    pub fn forget(&self, _lock: &Lock) -> anyhow::Result<()> {
        self.withdraw();
        let _ = fs::remove_file(self.dir.join(UNRECORDED));
        for name in [sealed::FILE, sealed::TUNNEL_FILE, CONFIRMED, REFUSED] {
            let path = self.state.join(name);
            match fs::remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(error).with_context(|| format!("remove {}", path.display()));
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// The trial is over without a verdict: other rules took the place of those on trial.
    /// `true`: a rollback had begun, and has ended.
    fn withdraw(&self) -> bool {
        let mut fired = false;
        while let Ok(Some((phase, id))) = self.glance() {
            fired |= self.retire(phase, &id);
            if Phase::ALL.into_iter().any(|phase| self.token(phase, &id).exists()) {
                break;
            }
        }
        for copy in self.copies() {
            let _ = fs::remove_file(copy);
        }
        fired
    }

    /// Ends a trial before its time, for a policy that wants no rules: those before it are
    /// back. The policy that was on trial.
    fn take_back(&self, lock: &Lock, today: Date) -> anyhow::Result<Option<String>> {
        if let Err(error) = self.settle(lock, today) {
            log::warn!("{error:#}");
        }
        let glance = self.glance()?;
        let Some((phase @ (Phase::Armed | Phase::Firing), id)) = &glance else { return Ok(None) };
        let fingerprint = self.read(&glance).map_or_else(|| "?".to_owned(), |trial| trial.fingerprint);
        self.fire(*phase, id)?;
        self.withdraw();
        Ok(Some(fingerprint))
    }

    /// What became of this trial, now that its token is gone. To be asked under the lock:
    /// whoever holds it may be between two steps.
    pub fn end_of(&self, _lock: &Lock, trial: &Trial, today: Date) -> End {
        if read_text(&self.run.join(SETTLED)).is_ok_and(|id| id == trial.id) {
            return End::Confirmed;
        }
        match self.confirmed(today) {
            Some(last) if policy::fingerprint(&last.policy) == trial.fingerprint => End::Confirmed,
            // Who confirms, replaces or releases takes the copy away as well.
            Some(last) if !self.copy(&trial.id).exists() => End::Replaced(Box::new(last)),
            _ => End::Lost,
        }
    }

    /// A trial whose files were taken away is rolled back at once: nobody else would.
    pub fn fall_back(&self, _lock: &Lock, trial: &Trial, today: Date) -> anyhow::Result<()> {
        let whole = read_text(&self.copy(&trial.id)).unwrap_or_else(|_| {
            let last = self.confirmed(today).and_then(|last| last.table);
            anew(&last.as_ref().map(render::table).unwrap_or_default())
        });
        write_private(&self.dir.join(format!("whole.{}.nft", trial.id)), &whole)?;
        write_private(&self.token(Phase::Firing, &trial.id), &trial.to_text())?;
        self.fire(Phase::Firing, &trial.id)
    }

    fn arm(
        &self,
        _lock: &Lock,
        desired: &Desired,
        found: Option<&Table>,
        confirmed: Option<&Desired>,
        within: Duration,
    ) -> anyhow::Result<Trial> {
        let nft = nft::program()?;
        let earlier = self.glance()?;
        let fingerprint = policy::fingerprint(&desired.policy);
        let armed_at = clock::monotonic();
        let id = format!("{fingerprint}-{}-{}", std::process::id(), armed_at.as_nanos());
        let trial = Trial {
            id: id.clone(),
            fingerprint,
            deadline: armed_at + within,
            text: policy::show(&desired.policy),
        };
        let on_the_way = match &earlier {
            Some((Phase::Armed | Phase::Firing, id)) => {
                read_text(&self.dir.join(format!("whole.{id}.nft"))).ok()
            }
            // A trial whose run directory went away without a verdict.
            _ => self.copies().iter().find_map(|copy| read_text(copy).ok()),
        };
        let stood = confirmed.and_then(|confirmed| confirmed.table.as_ref());
        let (keep, whole) = match stood {
            Some(stood) => {
                (Some(keeping(stood, [found, desired.table.as_ref()])), anew(&render::table(stood)))
            }
            // Nothing was ever confirmed: what was there before the first trial.
            None => match on_the_way {
                Some(whole) => (None, whole),
                None => {
                    // Sealed rules without a confirmed policy: that one can't be read any more.
                    let before = match found {
                        Some(_) => nft::list_table_text()?,
                        None => self.sealed().unwrap_or_default(),
                    };
                    (None, anew(&before))
                }
            },
        };
        let prepared = (|| {
            if let Some(keep) = keep {
                write_private(&self.dir.join(format!("keep.{id}.nft")), &keep)?;
            }
            write_private(&self.dir.join(format!("whole.{id}.nft")), &whole)?;
            write_private(&self.token(Phase::Armed, &id), &trial.to_text())?;
            // For a run directory that goes away with its service. The state directory may
            // be full or read-only: then that is not promised.
            let copy = self.copy(&id);
            if let Err(error) = replace_private(&copy, whole.as_bytes()) {
                log::warn!("{}: {error}; the way back lies in {} only", copy.display(), self.dir.display());
            }
            self.watch_over(&trial, within, &nft)
        })();
        if let Err(error) = prepared {
            self.clear(&id);
            return Err(error);
        }
        // From here on the new way back is armed, and the earlier one is no longer needed.
        if let Some((phase, old)) = &earlier {
            self.retire(*phase, old);
        }
        for copy in self.copies().into_iter().filter(|copy| *copy != self.copy(&id)) {
            let _ = fs::remove_file(copy);
        }
        Ok(trial)
    }

    /// Ends an earlier trial. One that is firing is waited for, so that its rules don't come
    /// after ours. `true`: it was.
    fn retire(&self, phase: Phase, id: &str) -> bool {
        let disarmed = phase != Phase::Firing && fs::remove_file(self.token(phase, id)).is_ok();
        if !disarmed {
            self.outwait(id);
        }
        self.clear(id);
        !disarmed
    }

    /// Waits for a watchdog that is putting rules back, for as long as that may take.
    fn outwait(&self, id: &str) {
        let started = clock::Uptime::start();
        while self.token(Phase::Firing, id).exists() && self.is_watched(id) && started.elapsed() < OVERDUE {
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Starts what puts the old rules back: a timer of systemd's, or a process of its own.
    fn watch_over(&self, trial: &Trial, within: Duration, nft: &Path) -> anyhow::Result<()> {
        // systemd's services live in the first network namespace.
        if Path::new("/run/systemd/system").is_dir() && netns::is_initial() {
            match self.by_timer(Path::new("systemd-run"), trial, within, nft) {
                Ok(()) => return Ok(()),
                Err(error) => log::warn!("{error:#}; a process of ours keeps the way back"),
            }
        }
        let path = self.dir.join(format!("watch.{}", trial.id));
        let held = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW)
            .open(&path)
            .with_context(|| format!("open {}", path.display()))?;
        flock(&held, FlockOperation::NonBlockingLockExclusive)
            .with_context(|| format!("lock {}", path.display()))?;
        // A shell starts it and ends, so that whoever outlives it has no zombie of it.
        let status = Command::new("/bin/sh")
            .args(["-c", "\"$@\" &", "sh"])
            .args(self.watchdog(&seconds(within), trial, nft))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(held)
            .current_dir("/")
            .process_group(0)
            .status()
            .context("start the rollback's watchdog (/bin/sh)")?;
        anyhow::ensure!(status.success(), "start the rollback's watchdog (/bin/sh): {status}");
        Ok(())
    }

    /// A transient timer of systemd's, which asks of who comes nothing but root's number
    /// (SO_PEERCRED): a daemon that has dropped its capabilities gets one as well.
    fn by_timer(&self, program: &Path, trial: &Trial, within: Duration, nft: &Path) -> anyhow::Result<()> {
        // Where the shell finds mv and cp is not the same on every distribution.
        let path = std::env::var("PATH").ok().filter(|path| !path.is_empty());
        let path = path.unwrap_or_else(|| "/usr/sbin:/usr/bin:/sbin:/bin".to_owned());
        let mut child = Command::new(program)
            .args(["--quiet", "--collect", "--timer-property=AccuracySec=100ms"])
            .arg(format!("--unit={}", unit(&trial.id)))
            .arg("--description=Back to the rules before, unless these are confirmed (spokeguard)")
            .arg(format!("--on-active={}s", seconds(within)))
            // Whoever has systemd read its units anew starts that one anew, and never this one, but in containers.
            .arg(format!("--on-boot={}s", seconds(clock::monotonic() + within)))
            .arg(format!("--setenv=PATH={path}"))
            .args(plain_words(&self.watchdog("0", trial, nft))?)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("start {}", program.display()))?;
        let ended = child::ended_within(&mut child, TIMER_PATIENCE);
        if !matches!(ended, Ok(Some(_))) {
            // Fails only if it has ended already.
            let _ = child.kill();
            let _ = child.wait();
        }
        let status = ended
            .context("wait for systemd-run")?
            .with_context(|| format!("systemd-run has not answered for {} s", TIMER_PATIENCE.as_secs()))?;
        let mut said = Vec::new();
        if let (false, Some(stderr)) = (status.success(), child.stderr.take()) {
            let _ = stderr.take(1024).read_to_end(&mut said);
        }
        let said = String::from_utf8_lossy(&said);
        let why = said.lines().next().map_or_else(|| status.to_string(), |line| printable(line, 200));
        anyhow::ensure!(status.success(), "systemd-run: {why}");
        Ok(())
    }

    /// The command line of the watchdog, which first sleeps for so many seconds.
    fn watchdog(&self, seconds: &str, trial: &Trial, nft: &Path) -> Vec<OsString> {
        let words = ["/bin/sh", "-c", SCRIPT, "spokeguard-rollback", seconds].map(OsString::from);
        let files = [self.dir.as_os_str(), trial.id.as_ref(), nft.as_os_str(), self.state.as_os_str()];
        words.into_iter().chain(files.map(OsString::from)).collect()
    }

    /// Whether a watchdog lives that will see to this trial.
    fn is_watched(&self, id: &str) -> bool {
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NOFOLLOW)
            .open(self.dir.join(format!("watch.{id}")));
        match file {
            Ok(file) => {
                let taken = flock(&file, FlockOperation::NonBlockingLockExclusive);
                taken == Err(rustix::io::Errno::WOULDBLOCK)
            }
            Err(_) if Path::new("/run/systemd/system").is_dir() => Command::new("systemctl")
                .args(["--quiet", "is-active", &format!("{}.timer", unit(id))])
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .status()
                .is_ok_and(|status| status.success()),
            Err(_) => false,
        }
    }

    /// The watchdog's work, by ourselves.
    fn fire(&self, phase: Phase, id: &str) -> anyhow::Result<()> {
        let firing = self.token(Phase::Firing, id);
        if phase == Phase::Armed {
            match fs::rename(self.token(phase, id), &firing) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
                result => result.with_context(|| format!("rename to {}", firing.display()))?,
            }
        }
        let mut last = anyhow::anyhow!("no rules to go back to");
        for file in self.ways_back(id).iter().filter(|file| file.exists()) {
            match nft::run_file(file) {
                Ok(()) => {
                    fs::rename(&firing, self.token(Phase::Fired, id))
                        .with_context(|| format!("rename {}", firing.display()))?;
                    let _ = fs::remove_file(self.copy(id));
                    return Ok(());
                }
                Err(error) => last = error,
            }
        }
        Err(last.context("put the last confirmed rules back"))
    }

    /// Files for nft that put back what was there before a trial, the best first.
    fn ways_back(&self, id: &str) -> [PathBuf; 3] {
        [self.dir.join(format!("keep.{id}.nft")), self.dir.join(format!("whole.{id}.nft")), self.copy(id)]
    }

    /// Removes every file of a trial, the token first.
    fn clear(&self, id: &str) {
        for phase in Phase::ALL {
            let _ = fs::remove_file(self.token(phase, id));
        }
        let rest = [format!("old.{id}"), format!("watch.{id}")].map(|name| self.dir.join(name));
        let half = self.state.join(format!(".refused.{id}"));
        for path in self.ways_back(id).into_iter().chain(rest).chain([half]) {
            let _ = fs::remove_file(path);
        }
    }

    /// The way back in the state directory.
    fn copy(&self, id: &str) -> PathBuf {
        self.state.join(format!("rollback.{id}.nft"))
    }

    /// All of them: more than the live trial's own are of trials that got no verdict.
    fn copies(&self) -> Vec<PathBuf> {
        let entries = fs::read_dir(&self.state).into_iter().flatten().flatten();
        let is_copy = |path: &PathBuf| {
            let name = path.file_name().and_then(|name| name.to_str());
            name.is_some_and(|name| name.starts_with("rollback.") && name.ends_with(".nft"))
        };
        entries.map(|entry| entry.path()).filter(is_copy).collect()
    }

    fn token(&self, phase: Phase, id: &str) -> PathBuf {
        self.dir.join(format!("{}.{id}", phase.name()))
    }
}

impl Trial {
    fn to_text(&self) -> String {
        let Self { id: _, fingerprint, deadline, text } = self;
        format!("# fingerprint {fingerprint}\n# deadline {}\n{text}", deadline.as_millis())
    }

    /// From the text of its token.
    pub fn parse(id: &str, text: &str) -> Option<Self> {
        let (first, rest) = text.split_once('\n')?;
        let (second, policy) = rest.split_once('\n')?;
        Some(Self {
            id: id.to_owned(),
            fingerprint: first.strip_prefix("# fingerprint ")?.to_owned(),
            deadline: Duration::from_millis(second.strip_prefix("# deadline ")?.parse().ok()?),
            text: policy.to_owned(),
        })
    }

    /// How long it still has.
    pub fn left(&self) -> Duration {
        self.deadline.saturating_sub(clock::monotonic())
    }
}

fn seconds(within: Duration) -> String {
    within.as_secs_f64().ceil().max(1.0).to_string()
}

/// Whether a table refuses anything; one in audit mode counts only.
fn drops(table: &Table) -> bool {
    let refuses = |statement: &Statement| matches!(statement, Statement::Drop | Statement::Reject { .. });
    table.chains.iter().any(|chain| {
        chain.base.as_ref().is_some_and(|base| base.drops)
            || chain.rules.iter().flat_map(|rule| &rule.statements).any(refuses)
    })
}

/// `table` in place of whatever is there, less what only the others have. What its counters
/// counted stays. Fails as a whole where a chain has another hook now.
fn keeping(table: &Table, others: [Option<&Table>; 2]) -> String {
    let name = format!("inet {TABLE}");
    let extra = |of: &dyn Fn(&Table) -> Vec<String>| -> BTreeSet<String> {
        let wanted = of(table);
        others.iter().flatten().flat_map(|other| of(other)).filter(|name| !wanted.contains(name)).collect()
    };
    let chains = extra(&|table| table.chains.iter().map(|chain| chain.name.clone()).collect());
    let counters = extra(&|table| table.counters.keys().cloned().collect());
    let mut text = format!("table {name} {{\n}}\nflush table {name}\n");
    for (kind, names) in [("chain", chains), ("counter", counters)] {
        for one in names {
            // Declared first: deleting what is not there would fail it all.
            text += &format!("table {name} {{\n\t{kind} {one} {{\n\t}}\n}}\ndelete {kind} {name} {one}\n");
        }
    }
    // Sets may be declared again, and what is declared can be deleted.
    let gone = |set: &&NamedSet| !set.map && !table.sets.iter().any(|wanted| wanted.name == set.name);
    let sets: BTreeMap<&str, &NamedSet> = others
        .iter()
        .flatten()
        .flat_map(|other| &other.sets)
        .filter(gone)
        .map(|set| (&*set.name, set))
        .collect();
    for (set, NamedSet { kind, flags, .. }) in sets {
        let flags = if flags.is_empty() { String::new() } else { format!("\t\tflags {}\n", flags.join(",")) };
        text += &format!(
            "table {name} {{\n\tset {set} {{\n\t\ttype {kind}\n{flags}\t}}\n}}\ndelete set {name} {set}\n"
        );
    }
    text + &render::table(table)
}

/// The table deleted and made again.
fn anew(table: &str) -> String {
    format!("table inet {TABLE} {{\n}}\ndelete table inet {TABLE}\n{table}")
}

/// What a file of ours says. A link, or what others could have written, is none.
fn read_text(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(path)?;
    let meta = file.metadata()?;
    let is_own = meta.uid() == 0 || meta.uid() == rustix::process::geteuid().as_raw();
    if !is_own || meta.mode() & 0o022 != 0 {
        let (owner, mode) = (meta.uid(), meta.mode() & 0o7777);
        let text = format!("others can write it (owner {owner}, mode {mode:04o})");
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, text));
    }
    file.take(FILE_MAX).read_to_string(&mut text)?;
    Ok(text)
}

/// The last confirmed policy lies there with its sum: half of a policy may be a policy as well.
fn summed(policy: &str) -> String {
    format!("{SUM}{}\n{policy}", policy::sum(policy))
}

/// The policy in a file of [`summed`].
fn without_sum(text: &str) -> &str {
    text.strip_prefix(SUM).and_then(|rest| rest.split_once('\n')).map_or(text, |(_, policy)| policy)
}

fn is_whole(text: &str) -> bool {
    let sum = text.strip_prefix(SUM).and_then(|rest| rest.split_once('\n'));
    // One that an earlier version wrote has none.
    sum.is_none_or(|(sum, policy)| sum == policy::sum(policy))
}

/// Whether a name is that of a file which [`replace_private`] began, by a process that is gone.
fn is_abandoned(name: &str) -> bool {
    let writer = name.strip_prefix('.').and_then(|rest| rest.rsplit_once('.')?.1.parse::<u32>().ok());
    writer.is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists())
}

/// Of the timer and the service that watch over a trial, where systemd does.
fn unit(id: &str) -> String {
    format!("spokeguard-rollback-{id}")
}

/// Always a file of our own making, and whole or not at all.
fn write_private(path: &Path, text: &str) -> anyhow::Result<()> {
    replace_private(path, text.as_bytes()).with_context(|| format!("write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::desired::samples;

    struct Place {
        dir: tempfile::TempDir,
        ledger: Ledger,
    }

    impl Place {
        fn new() -> Self {
            let dir = tempfile::tempdir().expect("a directory");
            let at = |name: &str| dir.path().join(name);
            let places = Places { state: at("state"), run: at("run"), pin: at("pin"), cgroup: None };
            // Stands for nft: appends the file it is given to the log.
            let nft = at("nft");
            fs::write(
                &nft,
                format!(
                    "#!/bin/sh\ntest ! -e {0}/broken || exit 1\ncat \"$2\" >> {0}/log\n",
                    dir.path().display()
                ),
            )
            .expect("write");
            fs::set_permissions(&nft, fs::Permissions::from_mode(0o755)).expect("chmod");
            fs::create_dir(at("state")).expect("create");
            Self { ledger: Ledger::new(&places), dir }
        }

        /// Arms a trial of the sample policy as [`Ledger::arm`] does, with this way back.
        fn arm(&self, id: &str, way_back: &str, within: Duration) -> Lock {
            let lock = self.ledger.lock().expect("a lock");
            let policy = samples::spoke();
            let trial = Trial {
                id: id.into(),
                fingerprint: policy::fingerprint(&policy),
                deadline: clock::monotonic() + within,
                text: policy::show(&policy),
            };
            write_private(&self.ledger.dir.join(format!("whole.{id}.nft")), way_back).expect("write");
            write_private(&self.ledger.state.join(format!("rollback.{id}.nft")), way_back).expect("write");
            write_private(&self.ledger.token(Phase::Armed, id), &trial.to_text()).expect("write");
            self.ledger.watch_over(&trial, within, &self.dir.path().join("nft")).expect("armed");
            lock
        }

        fn confirm(&self, lock: &Lock, id: &str) -> anyhow::Result<bool> {
            self.ledger.confirm(lock, &InForce { id: id.into() }, samples::TODAY)
        }

        fn phase(&self) -> Option<Phase> {
            self.ledger.glance().expect("a glance").map(|(phase, _)| phase)
        }

        fn log(&self) -> String {
            fs::read_to_string(self.dir.path().join("log")).unwrap_or_default()
        }

        fn await_log(&self, text: &str) {
            let deadline = std::time::Instant::now() + Duration::from_secs(20);
            while !self.log().contains(text) {
                assert!(std::time::Instant::now() < deadline, "no {text:?} in {:?}", self.log());
                std::thread::sleep(Duration::from_millis(10));
            }
        }
    }

    #[test]
    fn without_a_confirmation_the_old_rules_come_back_and_the_policy_is_remembered() {
        let place = Place::new();
        drop(place.arm("a", "the old rules", Duration::from_secs(1)));
        assert_eq!(place.phase(), Some(Phase::Armed));
        assert_eq!(place.ledger.refused(), None);
        place.await_log("the old rules");
        let refused = || place.ledger.refused().map(|refused| refused.fingerprint);
        let deadline = std::time::Instant::now() + Duration::from_secs(20);
        while place.phase() != Some(Phase::Fired) {
            assert!(std::time::Instant::now() < deadline);
            std::thread::yield_now();
        }
        let fingerprint = policy::fingerprint(&samples::spoke());
        assert_eq!(refused().as_ref(), Some(&fingerprint));
        let lock = place.ledger.lock().expect("a lock");
        assert!(!place.confirm(&lock, "a").expect("too late"), "a rollback that fired");
        // After a boot the run directory is empty.
        fs::remove_dir_all(place.dir.path().join("run")).expect("remove");
        assert_eq!(refused(), Some(fingerprint));
        place.ledger.record(&samples::everything(), samples::TODAY).expect("recorded");
        assert_eq!(refused(), None, "another policy was confirmed since");
    }

    #[test]
    fn a_confirmation_disarms_and_records() {
        let place = Place::new();
        let lock = place.arm("a", "the old rules", Duration::from_secs(1));
        assert_eq!(place.ledger.confirmed(samples::TODAY), None);
        assert!(place.confirm(&lock, "a").expect("confirmed"));
        assert_eq!(place.phase(), None);
        assert_eq!(place.ledger.confirmed(samples::TODAY).map(|d| d.policy), Some(samples::spoke()));
        assert_eq!(place.ledger.unsealed(samples::TODAY), None);
        assert!(!place.confirm(&lock, "a").expect("again"));
        // The directory goes with its service; the watchdog must not take that for a reason to act.
        fs::remove_dir_all(place.dir.path().join("run")).expect("remove");
        place.arm("b", "of a later trial", Duration::from_secs(2));
        place.await_log("of a later trial");
        assert!(!place.log().contains("the old rules"), "the watchdog acted after a confirmation");
    }

    #[test]
    fn a_run_directory_that_goes_away_confirms_nothing() {
        let place = Place::new();
        drop(place.arm("a", "the old rules", Duration::from_secs(1)));
        fs::remove_dir_all(place.dir.path().join("run")).expect("remove");
        place.await_log("the old rules");
    }

    #[test]
    fn a_trial_whose_directory_went_away_still_knows_the_way_back() {
        let place = Place::new();
        drop(place.arm("a", "before the first", Duration::from_secs(60)));
        fs::remove_dir_all(place.dir.path().join("run")).expect("remove");
        let copies = place.ledger.copies();
        assert_eq!(copies, [place.ledger.copy("a")]);
        assert_eq!(read_text(&copies[0]).expect("read"), "before the first");
        let lock = place.ledger.lock().expect("a lock");
        place.ledger.forget(&lock).expect("forgotten");
        assert!(place.ledger.copies().is_empty());
    }

    #[test]
    fn what_cannot_be_recorded_is_confirmed_all_the_same_and_recorded_later() {
        let place = Place::new();
        let lock = place.arm("a", "the old rules", Duration::from_secs(60));
        let state = place.dir.path().join("state");
        fs::remove_dir_all(&state).expect("remove");
        fs::write(&state, "a file in its place").expect("write");
        let error = place.confirm(&lock, "a").expect_err("not recorded");
        assert!(
            error.to_string().contains("the next boot comes up with those confirmed before"),
            "{error:#}"
        );
        assert_eq!(place.phase(), None);
        assert!(place.ledger.is_unrecorded());
        assert_eq!(place.ledger.confirmed(samples::TODAY).map(|d| d.policy), Some(samples::spoke()));
        fs::remove_file(&state).expect("remove");
        place.ledger.settle(&lock, samples::TODAY).expect("recorded");
        assert!(!place.ledger.is_unrecorded());
        assert!(place.ledger.confirmed(samples::TODAY).is_some());
    }

    #[test]
    fn a_watchdog_whose_nft_fails_has_not_fired() {
        let place = Place::new();
        fs::write(place.dir.path().join("broken"), "").expect("write");
        drop(place.arm("a", "the old rules", Duration::from_secs(1)));
        let deadline = std::time::Instant::now() + Duration::from_secs(20);
        while place.phase() != Some(Phase::Firing) {
            assert!(std::time::Instant::now() < deadline);
            std::thread::yield_now();
        }
        assert_eq!(place.log(), "");
    }

    /// As the daemon is held: six capabilities, no new ones, the filter of system calls.
    fn confined<T: Send>(work: impl FnOnce() -> T + Send) -> T {
        std::thread::scope(|scope| {
            let held = scope.spawn(|| {
                crate::daemon::privileges::confine_daemon();
                work()
            });
            held.join().expect("a thread")
        })
    }

    #[test]
    fn a_confined_daemon_gets_a_timer_of_systemds_and_that_does_the_rollback() {
        let place = Place::new();
        let socket = place.dir.path().join("private");
        let manager = std::os::unix::net::UnixListener::bind(&socket).expect("a socket");
        // Stands for systemd-run: tells the manager what to run, over its socket, and waits for the answer.
        let program = place.dir.path().join("systemd-run");
        let script = format!(
            "#!/usr/bin/perl\nuse IO::Socket::UNIX;\n\
             my $s = IO::Socket::UNIX->new(Peer => '{}') or die \"Failed to connect: $!\\n\";\n\
             print $s join(\"\\0\", @ARGV); shutdown($s, 1);\n\
             exit(<$s> eq 'ok' ? 0 : 1);\n",
            socket.display()
        );
        fs::write(&program, script).expect("write");
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).expect("chmod");
        let lock = place.arm("a", "the old rules", Duration::from_secs(600));
        let trial = place.ledger.read(&place.ledger.glance().expect("a glance")).expect("a trial");
        let nft = place.dir.path().join("nft");
        let start = || confined(|| place.ledger.by_timer(&program, &trial, Duration::from_secs(60), &nft));
        let (asked, started) = std::thread::scope(|scope| {
            let manager = scope.spawn(|| {
                let (mut client, _) = manager.accept().expect("a client");
                let who = rustix::net::sockopt::socket_peercred(&client).expect("who it is");
                assert_eq!(who.uid, rustix::process::getuid());
                let mut words = String::new();
                client.read_to_string(&mut words).expect("words");
                io::Write::write_all(&mut client, b"ok").expect("an answer");
                words.split('\0').map(str::to_owned).collect::<Vec<_>>()
            });
            let started = start();
            if started.is_err() {
                // Nobody came: whoever waits for it is let go.
                drop(std::os::unix::net::UnixStream::connect(&socket));
            }
            (manager.join().expect("a manager"), started)
        });
        started.expect("a timer");
        assert!(asked.contains(&"--on-active=60s".to_owned()) && asked.contains(&"--collect".to_owned()));
        let by_boot = asked.iter().find_map(|word| word.strip_prefix("--on-boot=")?.strip_suffix('s'));
        let left = by_boot.and_then(|text| text.parse::<f64>().ok()).expect("seconds")
            - clock::monotonic().as_secs_f64();
        assert!((50.0..=61.0).contains(&left), "{left} s: {asked:?}");
        assert!(asked.contains(&"--unit=spokeguard-rollback-a".to_owned()), "{asked:?}");
        assert!(asked.iter().any(|word| word.starts_with("--setenv=PATH=/")), "{asked:?}");
        // What systemd would take for variables of its own, or doesn't read as it wrote it.
        assert!(!asked.iter().any(|word| word.contains(['$', ';', '`', '\n'])), "{asked:?}");
        let command = asked.iter().position(|word| word == "/bin/sh").expect("a command");
        let status = Command::new(&asked[command]).args(&asked[command + 1..]).status().expect("the command");
        assert!(status.success());
        assert_eq!((place.log().as_str(), place.phase()), ("the old rules", Some(Phase::Fired)));
        drop(lock);

        // Whoever refuses is quoted.
        drop(manager);
        let error = start().expect_err("nobody listens").to_string();
        assert!(error.contains("systemd-run: Failed to connect: Connection refused"), "{error}");
    }

    #[test]
    fn a_trial_without_a_token_was_confirmed_replaced_or_robbed_of_it() {
        let place = Place::new();
        let lock = place.arm("a", "the old rules", Duration::from_secs(600));
        let glance = place.ledger.glance().expect("a glance");
        let trial = place.ledger.read(&glance).expect("a trial");
        // Its files are there: it is not over.
        assert!(matches!(place.ledger.end_of(&lock, &trial, samples::TODAY), End::Lost));
        place.ledger.record(&samples::everything(), samples::TODAY).expect("recorded");
        assert!(matches!(place.ledger.end_of(&lock, &trial, samples::TODAY), End::Lost));
        place.ledger.withdraw();
        let end = place.ledger.end_of(&lock, &trial, samples::TODAY);
        assert!(matches!(end, End::Replaced(by) if by.policy == samples::everything()));
        place.ledger.record(&samples::spoke(), samples::TODAY).expect("recorded");
        assert!(matches!(place.ledger.end_of(&lock, &trial, samples::TODAY), End::Confirmed));
        assert_eq!(place.log(), "");
    }

    #[test]
    fn a_confirmed_policy_that_is_not_whole_or_not_ours_is_told_and_is_none() {
        let place = Place::new();
        let lock = place.ledger.lock().expect("a lock");
        place.ledger.record(&samples::spoke(), samples::TODAY).expect("recorded");
        let path = place.ledger.state.join(CONFIRMED);
        let text = fs::read_to_string(&path).expect("read");
        let confirmed = || place.ledger.confirmed(samples::TODAY).map(|desired| desired.policy);
        // As an earlier version wrote it.
        fs::write(&path, policy::show(&samples::spoke())).expect("write");
        assert_eq!(confirmed(), Some(samples::spoke()));
        let cut = text.rfind("\n[").expect("a last section");
        for broken in [&text[..cut], "", "\u{1}\u{2}", &text.replace("80", "81")] {
            fs::write(&path, broken).expect("write");
            assert_eq!(confirmed(), None);
            let why = place.ledger.unsealed(samples::TODAY).expect("told");
            assert!(why.contains("confirmed.toml") && !why.contains('\n'), "{why}");
        }
        fs::write(&path, &text).expect("write");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o622)).expect("chmod");
        assert_eq!(confirmed(), None);
        let why = place.ledger.unsealed(samples::TODAY).expect("told");
        assert!(why.contains("others can write it (owner ") && why.contains("mode 0622"), "{why}");
        // What is confirmed next takes its place.
        place.ledger.record(&samples::spoke(), samples::TODAY).expect("recorded");
        place.ledger.settle(&lock, samples::TODAY).expect("settled");
        assert_eq!((confirmed(), place.ledger.unsealed(samples::TODAY)), (Some(samples::spoke()), None));
    }

    #[test]
    fn what_was_killed_half_way_is_swept_and_what_lives_is_not() {
        let place = Place::new();
        let lock = place.arm("a", "the old rules", Duration::from_secs(60));
        let (dir, state, run) = (&place.ledger.dir, &place.ledger.state, &place.ledger.run);
        assert!(place.ledger.is_watched("a") && !place.ledger.is_watched("b"));
        let mut ended = Command::new("true").spawn().expect("a process");
        ended.wait().expect("its end");
        let (gone, ours) = (ended.id(), std::process::id());
        let swept = [
            dir.join("keep.b.nft"),
            dir.join("whole.b.nft"),
            dir.join("watch.b"),
            dir.join(format!(".armed.b.{gone}")),
            state.join(format!(".sealed.nft.{gone}")),
            state.join(".refused.b"),
            run.join(format!(".settled.{gone}")),
        ];
        let kept = [
            dir.join("whole.a.nft"),
            dir.join("watch.a"),
            dir.join(LOCK),
            state.join(".refused.a"),
            state.join(format!(".events.jsonl.{ours}")),
            state.join("rollback.b.nft"),
            state.join("somebody's own"),
            run.join(format!(".settled.{ours}")),
            run.join("spokeguard.lock"),
        ];
        for path in swept.iter().chain(&kept) {
            OpenOptions::new().create(true).append(true).open(path).expect("a file");
        }
        place.ledger.settle(&lock, samples::TODAY).expect("settled");
        assert!(swept.iter().all(|path| !path.exists()), "{swept:?}");
        assert!(kept.iter().all(|path| path.exists()), "{kept:?}");
    }

    #[test]
    fn a_token_that_cannot_be_read_ends_with_what_was_there_before_or_with_nothing() {
        let place = Place::new();
        let lock = place.ledger.lock().expect("a lock");
        for phase in Phase::ALL {
            fs::write(place.ledger.token(phase, "a"), "?").expect("write");
            place.ledger.settle(&lock, samples::TODAY).expect("settled");
            assert_eq!(place.phase(), None, "{phase:?}");
        }
        // While its watchdog lives, it is the watchdog's.
        let lock = {
            drop(lock);
            place.arm("a", "the old rules", Duration::from_secs(2))
        };
        fs::write(place.ledger.token(Phase::Armed, "a"), "").expect("write");
        place.ledger.settle(&lock, samples::TODAY).expect("settled");
        assert_eq!(place.log(), "");
        place.await_log("the old rules");
    }

    #[test]
    fn what_others_can_write_is_not_given_to_nft() {
        let place = Place::new();
        let run = place.dir.path().join("run");
        fs::create_dir(&run).expect("create");
        fs::set_permissions(&run, fs::Permissions::from_mode(0o1777)).expect("chmod");
        let error = place.ledger.lock().err().expect("anyone may write there");
        assert!(error.to_string().contains("mode 1777"), "{error:#}");
        fs::set_permissions(&run, fs::Permissions::from_mode(0o755)).expect("chmod");
        drop(place.ledger.lock().expect("a lock"));
        let mode = fs::metadata(&place.ledger.dir).expect("a directory").mode();
        assert_eq!(mode & 0o777, 0o700);
        assert!(
            place
                .ledger
                .try_lock()
                .expect("works")
                .is_some_and(|_held| { place.ledger.try_lock().expect("works").is_none() })
        );
    }

    #[test]
    fn the_sealed_rules_are_whole_or_said_not_to_be() {
        let place = Place::new();
        assert_eq!(place.ledger.unsealed(samples::TODAY), None, "nothing was ever confirmed");
        place.ledger.record(&samples::everything(), samples::TODAY).expect("recorded");
        assert_eq!(place.ledger.unsealed(samples::TODAY), None);
        let file = place.ledger.state.join(sealed::FILE);
        assert_eq!(fs::metadata(&file).expect("a file").mode() & 0o777, 0o600);
        let text = fs::read_to_string(&file).expect("read");
        // Whatever the day.
        assert_eq!(place.ledger.unsealed(jiff::civil::date(2029, 1, 1)), None);
        fs::write(&file, text.replace("accept", "drop")).expect("write");
        assert!(place.ledger.unsealed(samples::TODAY).expect("a gap").contains("changed"));
        fs::write(&file, &text[..text.len() - 10]).expect("write");
        assert!(place.ledger.unsealed(samples::TODAY).expect("a gap").contains("cut off"));
        let other = sealed::text(&Desired::new(samples::spoke(), samples::TODAY).expect("a path"));
        fs::write(&file, other.expect("a table")).expect("write");
        assert!(place.ledger.unsealed(samples::TODAY).expect("a gap").contains("another policy"));
        fs::remove_file(&file).expect("remove");
        assert!(place.ledger.unsealed(samples::TODAY).expect("a gap").contains("can't be read"));
        place.ledger.record(&samples::everything(), samples::TODAY).expect("recorded");
        let tunnel = place.ledger.state.join(sealed::TUNNEL_FILE);
        fs::write(&tunnel, "").expect("write");
        assert!(place.ledger.unsealed(samples::TODAY).expect("a gap").contains("tunnel.nft"));
        // Versions before this one left none.
        fs::remove_file(&tunnel).expect("remove");
        assert_eq!(place.ledger.unsealed(samples::TODAY), None);
        place.ledger.complete(samples::TODAY).expect("written");
        assert!(fs::read_to_string(&tunnel).expect("a file").contains("iifname \"wg0\""));
        let lock = place.ledger.lock().expect("a lock");
        place.ledger.forget(&lock).expect("forgotten");
        assert_eq!(place.ledger.unsealed(samples::TODAY), None);
    }
}
