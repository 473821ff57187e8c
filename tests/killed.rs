//! What stands when anything of ours is killed, at any moment, and what the next start makes of it.

use std::collections::{BTreeSet, VecDeque};
use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use lab::{
    Answer, Daemon, Lab, Need, Node, Running, SPOKE_MESH, SPOKE_PUBLIC, SPOKE_PUBLIC_V6, Signal, Sshd,
    lacking, wait_until,
};
use rustix::process::{Pid, PidfdFlags, pidfd_open, pidfd_send_signal};

use crate::daemon::{LONG, over, plain_policy, status};

const PINS: &str = "/sys/fs/bpf/spokeguard";
/// What may lie in the state directory of a daemon that wants nothing.
const STATE_FILES: [&str; 7] = [
    "confirmed.toml",
    "sealed.nft",
    "tunnel.nft",
    "refused.toml",
    "events.jsonl",
    "first-seen.json",
    "probes.json",
];
const RUN_FILES: [&str; 5] = ["settled", "rollback", "audit.lock", "spokeguard.lock", "spokeguard.sock"];

/// A chain that nothing leads to, by which a daemon tries its repairs. One that was killed leaves it to
/// the next.
pub fn without_canary(table: &str) -> String {
    let Some(begin) = table.find("\n\tchain canary-") else { return table.to_owned() };
    let end = table[begin..].find("\n\t}\n").map_or(table.len(), |at| begin + at + "\n\t}\n".len());
    assert!(!table[begin..end].contains("hook"), "{table}");
    format!("{}{}", &table[..begin], &table[end..])
}

/// The same numbers for the same seed, which is printed and can be given.
struct Dice(u64);

impl Dice {
    fn new() -> Dice {
        let given = std::env::var("SPOKEGUARD_SEED").ok().and_then(|text| text.parse().ok());
        let clock = || std::time::UNIX_EPOCH.elapsed().map_or(1, |since| since.as_nanos() as u64);
        let seed: u64 = given.unwrap_or_else(clock);
        println!("SPOKEGUARD_SEED={seed}");
        Dice(seed | 1)
    }

    fn below(&mut self, end: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) as usize % end.max(1)
    }

    fn one_of<T: Copy>(&mut self, all: &[T]) -> T {
        all[self.below(all.len())]
    }

    /// Some time within this span.
    fn within(&mut self, span: Duration) -> Duration {
        Duration::from_micros(self.below(span.as_micros() as usize) as u64)
    }
}

/// A stranger who tries port 5432 some hundred times a second. Nobody listens there, so that a
/// packet that is let in is answered by a reset.
#[derive(Default)]
struct Stranger {
    stop: AtomicBool,
    asked: AtomicU32,
    answered: AtomicU32,
}

impl Stranger {
    const PACE: Duration = Duration::from_millis(3);
    /// An answer takes microseconds; this is for a machine that does something else.
    const WAIT: Duration = Duration::from_millis(40);

    fn knock(&self, node: &Node) {
        use rustix::event::{PollFd, PollFlags, poll};
        use rustix::net::{AddressFamily, SocketFlags, SocketType, connect, socket_with};
        let knocked = node.inside(|| {
            let mut open = VecDeque::new();
            while !self.stop.load(Ordering::Relaxed) {
                for (family, to) in
                    [(AddressFamily::INET, SPOKE_PUBLIC), (AddressFamily::INET6, SPOKE_PUBLIC_V6)]
                {
                    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
                    let socket = socket_with(family, SocketType::STREAM, flags, None)?;
                    match connect(&socket, &SocketAddr::new(to, 5432)) {
                        Err(rustix::io::Errno::INPROGRESS) => open.push_back((Instant::now(), socket)),
                        _ => drop(self.answered.fetch_add(1, Ordering::Relaxed)),
                    }
                    self.asked.fetch_add(1, Ordering::Relaxed);
                }
                std::thread::sleep(Self::PACE);
                let mut polled: Vec<_> = open.iter().map(|(_, s)| PollFd::new(s, PollFlags::OUT)).collect();
                poll(&mut polled, Some(&Default::default()))?;
                let ready: Vec<bool> = polled.iter().map(|p| !p.revents().is_empty()).collect();
                self.answered
                    .fetch_add(ready.iter().filter(|ready| **ready).count() as u32, Ordering::Relaxed);
                let mut ready = ready.into_iter();
                open.retain(|(begun, _)| ready.next() != Some(true) && begun.elapsed() < Self::WAIT);
            }
            Ok(())
        });
        knocked.unwrap();
    }

    /// Answers so far, once all that was asked until now is over.
    fn answers(&self) -> u32 {
        let asked = self.asked.load(Ordering::Relaxed);
        let rounds = 4 + 2 * (Self::WAIT.as_millis() / Self::PACE.as_millis()) as u32;
        wait_until(LONG, "the stranger goes on", || {
            (self.asked.load(Ordering::Relaxed) > asked + rounds).then_some(())
        })
        .unwrap();
        self.answered.load(Ordering::Relaxed)
    }
}

/// Also when an assertion fails: a scope waits for its threads.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// What is going on when something is killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Act {
    Apply,
    Start,
    Reload,
    Flushed,
    Changed,
    Rollback,
    Confirm,
    Upgrade,
    Release,
}

const ACTS: [Act; 9] = [
    Act::Apply,
    Act::Start,
    Act::Reload,
    Act::Flushed,
    Act::Changed,
    Act::Rollback,
    Act::Confirm,
    Act::Upgrade,
    Act::Release,
];

#[derive(Clone, Copy, Debug)]
enum Victim {
    /// The command or the daemon; what it started goes on.
    Main,
    /// One of those that it started: nft, the watchdog's shell, the metrics server, a loader.
    Other,
    /// All of ours.
    All,
}

struct Spoke<'a> {
    lab: &'a Lab,
    folder: PathBuf,
    /// The same program, installed twice.
    programs: [String; 2],
    policies: [String; 2],
    tables: [String; 2],
    /// Which of the two policies was confirmed last.
    stands: usize,
    /// Which one the file says.
    written: usize,
    /// Nothing is confirmed.
    released: bool,
    pins: BTreeSet<String>,
    /// How long an apply and the start of a daemon take here.
    apply: Duration,
    start: Duration,
    _sshd: Sshd,
}

impl<'a> Spoke<'a> {
    fn new(lab: &'a Lab) -> Self {
        let folder = lab.dir.join("killed");
        fs::create_dir_all(&folder).unwrap();
        let program = lab::spokeguard().unwrap();
        let newer = lab.dir.join("spokeguard-newer");
        fs::copy(&program, &newer).unwrap();
        let base = plain_policy(lab) + "[enforce]\nconfirm_within = \"25s\"\n";
        let sshd = lab.spoke.sshd(
            22,
            &["10.84.0.16", "fd84::16"],
            "MaxStartups 200\nKbdInteractiveAuthentication no",
        );
        let mut this = Self {
            lab,
            folder,
            programs: [program, newer].map(|path| path.display().to_string()),
            policies: [base.clone(), base.replace("[80, 443]", "[80, 443, 8443]\nudp = [8443]")],
            tables: Default::default(),
            stands: 0,
            written: 0,
            released: true,
            pins: BTreeSet::new(),
            apply: Duration::ZERO,
            start: Duration::ZERO,
            _sshd: sshd.unwrap(),
        };
        for which in [1, 0] {
            this.write(which);
            let begun = Instant::now();
            this.says("apply", 0);
            this.apply = begun.elapsed();
            this.tables[which] = this.table();
            let mut daemon = this.follow();
            this.start = daemon.started_in;
            this.pins = this.pins();
            daemon.running.stop().unwrap();
        }
        assert_ne!(this.tables[0], this.tables[1]);
        this
    }

    /// As editors and package managers do.
    fn write(&mut self, which: usize) {
        fs::write(self.folder.join("policy.new"), &self.policies[which]).unwrap();
        fs::rename(self.folder.join("policy.new"), self.folder.join("policy.toml")).unwrap();
        self.written = which;
    }

    fn words(&self, program: usize, verb: &[&str]) -> Vec<String> {
        let path = |name: &str| self.folder.join(name).display().to_string();
        let verb =
            std::iter::once(self.programs[program].clone()).chain(verb.iter().map(|word| word.to_string()));
        let flags =
            [("--policy", path("policy.toml")), ("--state-dir", path("state")), ("--run-dir", path("run"))];
        let flags = flags.into_iter().chain([("--pin-dir", PINS.to_string())]);
        verb.chain(flags.flat_map(|(flag, value)| [flag.to_string(), value])).collect()
    }

    fn begin(&self, program: usize, verb: &[&str]) -> Running {
        self.lab.spoke.spawn(&self.words(program, verb)).unwrap()
    }

    #[track_caller]
    fn says(&self, verb: &str, code: i32) -> String {
        let verb: Vec<&str> = verb.split(' ').collect();
        let outcome = self.lab.spoke.run(&self.words(0, &verb)).unwrap();
        assert_eq!(outcome.code, Some(code), "{verb:?}: {}", outcome.all());
        outcome.stdout
    }

    /// Ours as nft prints it; empty where there is none.
    fn table(&self) -> String {
        let text = self.lab.spoke.run(&["nft", "-s", "list", "table", "inet", "spokeguard"]).unwrap().stdout;
        without_canary(&text)
    }

    fn pins(&self) -> BTreeSet<String> {
        let listed = self.lab.spoke.sh(&format!("find {PINS}")).unwrap();
        listed.lines().map(str::to_owned).collect()
    }

    /// Every process of ours in the spoke's network, with its command line.
    fn residents(&self) -> Vec<(i32, String)> {
        let spoke = fs::metadata(self.lab.spoke.net_path()).unwrap().ino();
        let pids = fs::read_dir("/proc").unwrap().flatten();
        let pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
        pids.filter(|pid| fs::metadata(format!("/proc/{pid}/ns/net")).is_ok_and(|ns| ns.ino() == spoke))
            .filter_map(|pid| {
                let line = fs::read_to_string(format!("/proc/{pid}/cmdline")).ok()?.replace('\0', " ");
                let others = ["sg-lab-helper", "sshd"];
                let program = line.split(' ').next()?.trim_end_matches(':');
                let is_other = others.iter().any(|other| program.ends_with(other));
                (!is_other && !line.is_empty()).then_some((pid, line))
            })
            .collect()
    }

    fn kill(&self, victim: Victim, main: Option<&Running>, dice: &mut Dice) -> String {
        let kill = |pid: i32| {
            let Ok(handle) = pidfd_open(Pid::from_raw(pid).unwrap(), PidfdFlags::empty()) else { return };
            // Its number may be another's by now.
            if self.residents().iter().any(|(of, _)| *of == pid) {
                let _ = pidfd_send_signal(&handle, Signal::KILL);
            }
        };
        let main_pid = main.map(|main| main.pid() as i32);
        match victim {
            Victim::Main => {}
            Victim::Other => {
                let mut others = self.residents();
                others.retain(|(pid, _)| Some(*pid) != main_pid);
                if others.is_empty() {
                    return "nobody else was there".into();
                }
                let (pid, line) = others.swap_remove(dice.below(others.len()));
                kill(pid);
                return line.chars().take(120).collect();
            }
            Victim::All => {}
        }
        if let Some(main) = main {
            main.signal(Signal::KILL).unwrap();
        }
        if let Victim::All = victim {
            wait_until(LONG, "nobody of ours is alive", || {
                let left = self.residents();
                left.iter().for_each(|(pid, _)| kill(*pid));
                left.is_empty().then_some(())
            })
            .unwrap();
        }
        String::new()
    }

    /// Those that have nothing to do without the one that was killed end by themselves. A watchdog stays.
    #[track_caller]
    fn await_orphans(&self) {
        let is_watchdog = |line: &str| line.contains("spokeguard-rollback") || line.starts_with("sleep ");
        wait_until(LONG, "nobody is left but watchdogs", || {
            self.residents().iter().all(|(_, line)| is_watchdog(line)).then_some(())
        })
        .unwrap_or_else(|error| panic!("{error:#}: {:#?}", self.residents()));
    }

    #[track_caller]
    fn hub_comes_in(&self, what: &str) {
        let ssh = self.lab.hub.connect(SocketAddr::new(SPOKE_MESH, 22), LONG);
        assert_eq!(ssh, Answer::Open, "ssh, {what}");
        // Nobody may serve it, but nothing is in the way.
        let metrics = self.lab.hub.connect(SocketAddr::new(SPOKE_MESH, 9984), LONG);
        assert!(matches!(metrics, Answer::Open | Answer::Refused), "metrics, {what}: {metrics:?}");
    }

    /// A start of the daemon, whatever there was before, ends in the declared state.
    #[track_caller]
    fn follow(&mut self) -> Daemon {
        let daemon = self.lab.spoke.daemon_on_trial(&[], &self.folder, &[]).unwrap();
        let rules = self.await_verdict(&daemon);
        if rules == "rolled-back" {
            self.stands = 1 - self.written;
            let table = self.table();
            assert!(
                table == self.tables[self.stands] || self.released && table.is_empty(),
                "those confirmed before\n{table}\n{}",
                daemon.running.log()
            );
            self.write(self.stands);
            wait_until(LONG, "the policy confirmed before", || {
                (self.await_verdict(&daemon) == "confirmed").then_some(())
            })
            .unwrap_or_else(|error| panic!("{error:#}\n{}", daemon.running.log()));
        }
        self.released = false;
        self.stands = self.written;
        if !self.tables[self.stands].is_empty() {
            assert_eq!(self.table(), self.tables[self.stands], "{}", daemon.running.log());
        }
        daemon
    }

    /// The hub comes until nothing waits for it any more.
    #[track_caller]
    fn await_verdict(&self, daemon: &Daemon) -> String {
        wait_until(LONG, "a verdict on the rules", || {
            let rules = status(&self.lab.spoke, daemon)["daemon"]["rules"].as_str()?.to_owned();
            if rules == "on-trial" {
                self.hub_comes_in("on trial");
            }
            ["confirmed", "rolled-back"].contains(&&*rules).then_some(rules)
        })
        .unwrap_or_else(|error| panic!("{error:#}\n{}", daemon.running.log()))
    }

    /// After a daemon that found its rules confirmed has looked around.
    #[track_caller]
    fn nothing_is_left_over(&self, log: &str) {
        let names = |path: &Path| -> BTreeSet<String> {
            let entries = fs::read_dir(path).unwrap().flatten();
            entries.filter_map(|entry| entry.file_name().into_string().ok()).collect()
        };
        let (state, run) = (self.folder.join("state"), self.folder.join("run"));
        let strange = |path: &Path, known: &[&str]| -> Vec<String> {
            names(path).into_iter().filter(|name| !known.contains(&&**name)).collect()
        };
        assert_eq!(strange(&state, &STATE_FILES), [""; 0], "in the state directory\n{log}");
        assert_eq!(strange(&run, &RUN_FILES), [""; 0], "in the run directory\n{log}");
        assert_eq!(strange(&run.join("rollback"), &["lock"]), [""; 0], "of trials\n{log}");
        assert_eq!(self.pins(), self.pins, "{log}");
    }

    /// One thing is begun and something is killed on the way, up to three times; then a daemon is
    /// started. Gives the number of kills.
    fn round(&mut self, act: Act, dice: &mut Dice) -> usize {
        let kills = match act {
            Act::Apply | Act::Start | Act::Confirm | Act::Upgrade | Act::Release => 3,
            Act::Reload | Act::Flushed | Act::Changed | Act::Rollback => 1,
        };
        let mut said = String::new();
        for number in 0..kills {
            said += &self.strike(act, number == 0, dice);
        }
        let mut daemon = self.follow();
        let log = format!("{said}--- the next\n{}", daemon.running.log());
        let check = self.lab.spoke.run(&self.words(0, &["check", "--no-probe"])).unwrap();
        assert_eq!(check.code, Some(0), "{}\n{log}", check.all());
        self.nothing_is_left_over(&log);
        if dice.below(2) == 0 {
            assert!(daemon.running.stop().unwrap().success(), "{log}");
        } else {
            daemon.kill_9().unwrap();
        }
        self.await_orphans();
        kills
    }

    /// Begins it, kills at some moment, and looks. Gives what was said meanwhile.
    fn strike(&mut self, act: Act, first: bool, dice: &mut Dice) -> String {
        let victim = dice.one_of(&[Victim::Main, Victim::Other, Victim::All]);
        let which = if first { 1 - self.stands } else { dice.below(2) };
        let moment;
        let mut allowed = BTreeSet::from(self.tables.clone());
        if self.released {
            allowed.insert(String::new());
        }
        let mut main = match act {
            Act::Apply | Act::Start => {
                self.write(which);
                let (verb, span) = match act {
                    Act::Apply => ("apply", self.apply),
                    _ => ("run", self.start),
                };
                moment = dice.within(span * 5 / 4);
                Some(self.begin(0, &[verb]))
            }
            Act::Reload => {
                let daemon = self.follow();
                self.write(1 - self.stands);
                if dice.below(2) == 0 {
                    daemon.running.signal(Signal::HUP).unwrap();
                }
                moment = dice.within(self.start);
                Some(daemon.running)
            }
            Act::Flushed | Act::Changed => {
                let daemon = self.follow();
                // What somebody else made of the rules stays where nobody is left who could put it right.
                if act == Act::Flushed {
                    allowed.insert(String::new());
                    self.lab.spoke.sh("nft flush ruleset").unwrap();
                } else {
                    let (chain, rule) = ("\tchain public {\n", "\t\tcounter comment \"not ours\"\n");
                    allowed.insert(self.table().replacen(chain, &[chain, rule].concat(), 1));
                    let rule = "insert rule inet spokeguard public counter comment \"not ours\"";
                    self.lab.spoke.nft(rule).unwrap();
                }
                moment = dice.within(Duration::from_millis(40));
                Some(daemon.running)
            }
            Act::Rollback => {
                self.write(which);
                self.says("apply --confirm-within 1s", 0);
                moment = Duration::from_millis(900) + dice.within(Duration::from_millis(250));
                None
            }
            Act::Confirm => {
                self.write(which);
                self.says("apply", 0);
                moment = dice.within(self.apply);
                Some(self.begin(0, &["confirm"]))
            }
            Act::Upgrade => {
                if first {
                    let mut daemon = self.follow();
                    daemon.kill_9().unwrap();
                }
                self.age_pins();
                self.write(dice.below(2));
                moment = dice.within(self.start * 5 / 4);
                Some(self.begin(1, &["run"]))
            }
            Act::Release => {
                self.released = true;
                allowed = BTreeSet::from([self.table(), String::new()]);
                moment = dice.within(self.apply);
                Some(self.begin(0, &["release"]))
            }
        };
        over(moment);
        let what = format!("{act:?}, {victim:?} killed after {moment:?}");
        let mut said = self.kill(victim, main.as_ref(), dice);
        let look = |this: &Self, when: &str| {
            let table = this.table();
            assert!(allowed.contains(&table), "{what} ({said}), {when}: half of something:\n{table}");
            this.hub_comes_in(&format!("{what}, {when}"));
        };
        look(self, "at once");
        if let (Victim::Other, Some(main)) = (victim, &mut main)
            && !main.has_ended()
        {
            over(dice.within(self.start));
            look(self, "the rest goes on");
            main.signal(Signal::KILL).unwrap();
        }
        if let Some(mut main) = main {
            main.wait(LONG).unwrap();
            said += &main.log();
        }
        self.await_orphans();
        let table = self.table();
        assert!(allowed.contains(&table), "{what} ({said}): half of something:\n{table}");
        format!("{what}\n{said}\n")
    }

    /// As if another build had pinned them: the next start exchanges all programs.
    fn age_pins(&self) {
        use aya::maps::{Array, Map, MapData};
        for build in ["abi2/maps/BUILD", "guard1/maps/GUARD_BUILD", "binds1/maps/BUILD"] {
            let pin = self.lab.spoke.path(&format!("{PINS}/{build}"));
            let map = MapData::from_pin(&pin).unwrap();
            Array::<_, u64>::try_from(Map::Array(map)).unwrap().set(0, 7, 0).unwrap();
        }
    }
}

/// How often something is killed: `cargo xtask test --all` asks for more.
fn moments() -> usize {
    std::env::var("SPOKEGUARD_MOMENTS").ok().and_then(|text| text.parse().ok()).unwrap_or(18)
}

/// All of them where there is time, else a few that the dice choose.
fn some<T>(mut all: Vec<T>, few: usize) -> Vec<T> {
    let mut dice = Dice::new();
    while moments() < 500 && all.len() > few {
        all.remove(dice.below(all.len()));
    }
    all
}

/// A spoke whose first policy is confirmed, and the stranger who tries it all the time. The lab is its own, so that
/// nobody else's processes are among those that live there.
fn staged(work: impl FnOnce(&Lab, &Stranger, Spoke)) {
    if lacking(&[Need::Lab, Need::Spokeguard, Need::Sshd, Need::Cgroup2]) {
        return;
    }
    let lab = Lab::plain();
    let stranger = Stranger::default();
    std::thread::scope(|scope| {
        let _stop = Stop(&stranger.stop);
        scope.spawn(|| stranger.knock(&lab.internet));
        assert!(stranger.answers() > 0, "without rules of ours it gets through");
        work(&lab, &stranger, Spoke::new(&lab));
    });
}

#[test]
fn killed_at_any_moment_the_rules_are_the_old_or_the_new_and_the_next_start_is_whole() {
    staged(|_, stranger, mut spoke| {
        let mut dice = Dice::new();
        let (mut killed, mut acts) = (0, ACTS.iter().cycle());
        while killed < moments() {
            let Some(act) = acts.next() else { break };
            let before = stranger.answers();
            killed += spoke.round(*act, &mut dice);
            let answers = stranger.answers() - before;
            // Released is open, and the start after it has to begin anew.
            assert!(*act == Act::Release || answers == 0, "{act:?}: the stranger got {answers} answers");
        }
        // What a start makes of it also holds seen from outside.
        let mut daemon = spoke.follow();
        spoke.says("check", 0);
        daemon.running.stop().unwrap();
        // And a confirmed trial's watchdog ends in its time.
        let short = spoke.policies[1 - spoke.stands].replace("25s", "1s");
        fs::write(spoke.folder.join("policy.toml"), short).unwrap();
        spoke.says("apply", 0);
        spoke.says("confirm", 0);
        let ours = |line: &str| line.contains("spokeguard-rollback 1 ");
        wait_until(LONG, "no watchdog of it", || {
            spoke.residents().iter().all(|(_, line)| !ours(line)).then_some(())
        })
        .unwrap();
    });
}

#[test]
fn of_two_at_once_one_wins_and_the_other_says_so() {
    staged(|lab, stranger, mut spoke| {
        let before = stranger.answers();
        let both = |spoke: &Spoke, verb: &[&str], other: usize| -> [Running; 2] {
            let policy = spoke.folder.join("other.toml");
            fs::write(&policy, &spoke.policies[other]).unwrap();
            let mut words = spoke.words(1, verb);
            let own = spoke.folder.join("policy.toml").display().to_string();
            words
                .iter_mut()
                .filter(|word| **word == own)
                .for_each(|word| *word = policy.display().to_string());
            [spoke.begin(0, verb), lab.spoke.spawn(&words).unwrap()]
        };
        for other in [spoke.stands, 1 - spoke.stands] {
            let mut daemons = both(&spoke, &["run"], other);
            let loser = wait_until(LONG, "one of them ends", || {
                daemons.iter_mut().position(|daemon| daemon.has_ended())
            })
            .unwrap();
            assert_eq!(daemons[loser].wait(LONG).unwrap().code(), Some(2));
            let said = daemons[loser].log();
            let winner = &mut daemons[1 - loser];
            let named = format!("another spokeguard daemon (pid {})", winner.pid());
            assert!(said.contains(&named), "{said}");
            let which = if loser == 0 { other } else { spoke.written };
            wait_until(LONG, "the winner's rules", || (spoke.table() == spoke.tables[which]).then_some(()))
                .unwrap_or_else(|error| panic!("{error:#}\n{}", winner.log()));
            spoke.hub_comes_in("two daemons");
            assert!(!winner.has_ended(), "{}", winner.log());
            winner.stop().unwrap();
            spoke.says("confirm", 0);
            spoke.stands = which;
            spoke.write(which);
        }
        // An apply that had to wait for another one's change does not take its place unasked.
        let mut told = None;
        for _ in 0..8 {
            spoke.policies[0] = spoke.policies[0].replace("25s", "26s");
            let verb = ["apply", "--format", "json"];
            spoke.write(1 - spoke.stands);
            // Both change something: a third policy beside the two.
            let third = spoke.policies[0].replace("[80, 443", "[80, 443, 9443");
            let kept = std::mem::replace(&mut spoke.policies[spoke.stands], third);
            let applies = both(&spoke, &verb, spoke.stands);
            spoke.policies[spoke.stands] = kept;
            let mut codes: Vec<_> =
                applies.into_iter().map(|mut cli| (cli.wait(LONG).unwrap().code(), cli.log())).collect();
            codes.sort();
            let trials = fs::read_dir(spoke.folder.join("run/rollback")).unwrap().flatten();
            let armed =
                trials.filter(|entry| entry.file_name().to_string_lossy().starts_with("armed.")).count();
            assert_eq!(armed, 1, "{codes:?}");
            assert_eq!(codes[0].0, Some(0), "{codes:?}");
            spoke.hub_comes_in("two applies");
            // Back to what was confirmed needs no confirmation.
            spoke.write(spoke.stands);
            spoke.says("apply", 0);
            assert_eq!(spoke.table(), spoke.tables[spoke.stands]);
            if codes[1].0 != Some(0) {
                told = Some(codes.swap_remove(1));
                break;
            }
        }
        let (code, said) = told.expect("of two applies at once one is told");
        assert_eq!(code, Some(2), "{said}");
        assert!(said.contains("went in while this one waited"), "{said}");
        assert_eq!(stranger.answers(), before);
    });
}

#[test]
fn pins_that_somebody_took_away_or_exchanged_come_back() {
    staged(|lab, stranger, mut spoke| {
        let before = stranger.answers();
        let port =
            |port: u16| lab.internet.connect(SocketAddr::new(SPOKE_PUBLIC, port), Duration::from_millis(300));
        // Between two runs; the guard alone is what refuses.
        let faults = vec![
            "rm -r guard1",
            "rm -r guard1/maps",
            "rm guard1/links/*; rm binds1/links/bind4",
            "mv abi2/programs/in_eth_public guard1/programs/guard_eth",
            "mv guard1/maps/GUARD_BUILD guard1/maps/GUARD_STATE; mv abi2/maps/ROWS abi2/maps/PORTS",
            "mv guard1/maps/GUARD_STATE guard1/links/in-10; mv binds1/maps/KINDS binds1/maps/GUARD",
            "rm guard1/programs/guard_eth; mkdir guard1/programs/guard_eth; rm -r binds1; ln -s /tmp binds1",
            // Those of a version to come.
            "mv guard1 guard2; mv binds1 binds7",
        ];
        for (number, fault) in some(faults, 4).into_iter().enumerate() {
            lab.spoke.sh(&format!("cd {PINS}; {fault}")).unwrap();
            spoke.write(number % 2);
            let mut daemon = spoke.follow();
            let log = daemon.running.log();
            spoke.says("check --no-probe", 0);
            assert_eq!(spoke.pins(), spoke.pins, "{fault}\n{log}");
            lab.spoke.sh("nft flush ruleset").unwrap();
            // 8443 is in the second policy only, and nothing listens there.
            let allowed = if number % 2 == 0 { Answer::Silent } else { Answer::Refused };
            daemon.kill_9().unwrap();
            lab.spoke.run(&["nft", "flush", "ruleset"]).unwrap();
            assert_eq!((port(80), port(8443)), (Answer::Refused, allowed), "{fault}\n{log}");
            assert_eq!(stranger.answers(), before, "{fault}\n{log}");
            // The next fault may take the guard away.
            lab.spoke.sh(&format!("nft -f {}/state/sealed.nft", spoke.folder.display())).unwrap();
        }
        // While it runs: all of them at once.
        let daemon = spoke.follow();
        lab.spoke.sh(&format!("rm -r {PINS}/*")).unwrap();
        wait_until(2 * LONG, "all is pinned again", || (spoke.pins() == spoke.pins).then_some(()))
            .unwrap_or_else(|error| panic!("{error:#}: {:?}\n{}", spoke.pins(), daemon.running.log()));
        wait_until(LONG, "told", || daemon.running.log().contains("guard-missing").then_some(())).unwrap();
        wait_until(LONG, "it holds", || {
            let status = status(&lab.spoke, &daemon);
            (status["verdict"] == "ok" && status["daemon"]["guard"] == "on eth0").then_some(())
        })
        .unwrap_or_else(|error| panic!("{error:#}\n{}", status(&lab.spoke, &daemon)));
        drop(daemon);
        lab.spoke.sh("nft flush ruleset").unwrap();
        assert_eq!(stranger.answers(), before);

        // No bpffs at all: one of its own is mounted; where that is forbidden, the rules hold alone
        // and it is told. The machine's lies below the lab's, and is PID 1's as well.
        let forbidden = "setpriv --bounding-set=-sys_admin --inh-caps=-sys_admin";
        for (under, guard) in [("", "on eth0"), (forbidden, "not active: ")] {
            let script = &format!("while umount -l /sys/fs/bpf 2>/dev/null; do :; done; exec {under} \"$@\"");
            let wrapper = [
                "unshare",
                "--mount",
                "--pid",
                "--fork",
                "--kill-child",
                "--mount-proc",
                "sh",
                "-c",
                script,
                "sh",
            ];
            let daemon = lab.spoke.daemon_under(&wrapper, &spoke.folder, &[]).unwrap();
            let status = status(&lab.spoke, &daemon);
            assert!(status["daemon"]["guard"].to_string().contains(guard), "{status}");
            assert_eq!(spoke.table(), spoke.tables[spoke.stands], "{}", daemon.running.log());
            assert_eq!(stranger.answers(), before);
        }
    });
}

#[test]
fn what_lies_broken_in_the_state_and_run_directories_opens_nothing_and_is_told() {
    staged(|lab, stranger, mut spoke| {
        let state = spoke.folder.join("state");
        let trials = spoke.folder.join("run/rollback");
        let before = stranger.answers();
        let broken = vec![
            ("random", "head -c 3000 /dev/urandom > $f"),
            ("empty", ": > $f"),
            ("cut off", "truncate -s -40 $f 2>/dev/null || truncate -s 5 $f"),
            ("a link", "cp $f $f.real; ln -sf $f.real $f"),
            ("anybody's", "touch $f; chmod 0666 $f"),
            ("nobody's", "touch $f; chown nobody $f"),
        ];
        for (how, script) in some(broken, 3) {
            let files = STATE_FILES.map(|name| state.join(name).display().to_string()).join(" ");
            let tokens = ["armed.x", "firing.y", "confirmed.z", "fired.w", "last.toml"];
            let tokens = tokens.map(|name| trials.join(name).display().to_string()).join(" ");
            let script = format!("test -e $f || echo some thing > $f; {script}");
            fs::create_dir_all(&trials).unwrap();
            lab.spoke.sh(&format!("umask 077; for f in {files} {tokens}; do {script}; done")).unwrap();
            let told = lab.spoke.run(&spoke.words(0, &["check", "--no-probe"])).unwrap();
            assert!(
                told.stdout.contains("sealed-rules") && told.stdout.contains("confirmed"),
                "{how}: {}",
                told.all()
            );
            let daemon = spoke.follow();
            let log = daemon.running.log();
            assert!(log.contains("confirmed.toml") && log.contains("last confirmed policy"), "{how}: {log}");
            wait_until(LONG, "it is as declared again", || {
                let check = lab.spoke.run(&spoke.words(0, &["check", "--no-probe"])).unwrap();
                (check.code == Some(0)).then_some(())
            })
            .unwrap_or_else(|error| panic!("{how}: {error:#}\n{}", daemon.running.log()));
            drop(daemon);
            lab.spoke.sh(&format!("rm -f {}/*.real {}/*.real", state.display(), trials.display())).unwrap();
            spoke.nothing_is_left_over(&format!("{how}: {log}"));
            assert_eq!(stranger.answers(), before, "{how}: {log}");
        }

        // A boot, with a policy that can't be read: the sealed rules say that it is the one of the file.
        let boot = || {
            lab.spoke.sh("nft flush ruleset").unwrap();
            fs::remove_dir_all(spoke.folder.join("run")).unwrap();
            fs::write(state.join("confirmed.toml"), "version = 1\n").unwrap();
        };
        boot();
        let daemon = lab.spoke.daemon_on_trial(&[], &spoke.folder, &[]).unwrap();
        assert_eq!(status(&lab.spoke, &daemon)["daemon"]["rules"], "confirmed", "{}", daemon.running.log());
        assert_eq!(spoke.table(), spoke.tables[spoke.stands]);
        drop(daemon);
        // Of another one: that goes on trial, and the way back are the sealed rules.
        boot();
        let other = spoke.policies[1 - spoke.stands].replace("25s", "1s");
        fs::write(spoke.folder.join("policy.toml"), other).unwrap();
        let daemon = lab.spoke.daemon_on_trial(&[], &spoke.folder, &[]).unwrap();
        wait_until(LONG, "rolled back", || {
            (status(&lab.spoke, &daemon)["daemon"]["rules"] == "rolled-back").then_some(())
        })
        .unwrap_or_else(|error| panic!("{error:#}\n{}", daemon.running.log()));
        assert_eq!(spoke.table(), spoke.tables[spoke.stands], "{}", daemon.running.log());
        drop(daemon);
        // And once more, with the policy that was rolled back in the file.
        boot();
        let daemon = lab.spoke.daemon_on_trial(&[], &spoke.folder, &[]).unwrap();
        assert_eq!(spoke.table(), spoke.tables[spoke.stands], "{}", daemon.running.log());
        let found = crate::daemon::findings(&status(&lab.spoke, &daemon), "sealed-rules");
        assert!(found.iter().any(|f| f["found"].to_string().contains("confirmed.toml")), "{found:?}");
        drop(daemon);
        lab.spoke.sh("nft flush ruleset").unwrap();
        assert_eq!(stranger.answers(), before, "the second layer stays");
    });
}

#[test]
fn an_nft_that_fails_or_raves_leaves_the_old_rules_or_the_new() {
    staged(|lab, stranger, mut spoke| {
        let before = stranger.answers();
        // Beside the real one, by its full name: with each fault in the place of the changing call.
        let mut faults = vec![
            ("late", "/usr/sbin/nft \"$@\"; exit 1"),
            ("killed", "kill -9 $$"),
            ("half", "head -c 900 | /usr/sbin/nft \"$@\""),
            ("raving", "head -c 100000 /dev/urandom; exit 0"),
        ];
        if moments() < 500 {
            faults = some(faults, 2);
        } else {
            // Takes half a minute each.
            faults.push(("hanging", "exec sleep 1000"));
        }
        for (name, fault) in faults {
            let folder = lab.dir.join(format!("nft-{name}"));
            fs::create_dir_all(&folder).unwrap();
            let script =
                format!("#!/bin/sh\ncase \"$*\" in *list*) exec /usr/sbin/nft \"$@\";; esac\n{fault}\n");
            fs::write(folder.join("nft"), script).unwrap();
            lab.spoke.sh(&format!("chmod 0755 {}/nft", folder.display())).unwrap();
            spoke.write(1 - spoke.stands);
            let path = format!("PATH={}:/usr/sbin:/usr/bin:/sbin:/bin", folder.display());
            let words: Vec<String> =
                ["env".to_string(), path.clone()].into_iter().chain(spoke.words(0, &["apply"])).collect();
            let applied = lab.spoke.run_within(3 * LONG, &words).unwrap();
            if name == "late" {
                // All of it is there, whatever nft says: it was read back.
                assert_eq!(applied.code, Some(0), "{name}: {}", applied.all());
                assert_eq!(spoke.table(), spoke.tables[1 - spoke.stands], "{name}");
            } else {
                assert_eq!(applied.code, Some(2), "{name}: {}", applied.all());
                assert!(applied.stderr.contains("table inet spokeguard"), "{name}: {}", applied.all());
            }
            assert!(spoke.tables.contains(&spoke.table()), "{name}: {}", spoke.table());
            spoke.hub_comes_in(name);
            if name != "hanging" {
                // A daemon with such an nft holds what is there.
                let mut daemon = lab.spoke.daemon_on_trial(&["env", &path], &spoke.folder, &[]).unwrap();
                assert!(spoke.tables.contains(&spoke.table()), "{name}: {}", spoke.table());
                spoke.hub_comes_in(name);
                daemon.kill_9().unwrap();
            }
            let mut daemon = spoke.follow();
            spoke.says("check --no-probe", 0);
            spoke.nothing_is_left_over(&daemon.running.log());
            daemon.running.stop().unwrap();
            assert_eq!(stranger.answers(), before, "{name}");
        }
    });
}
