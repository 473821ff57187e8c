//! One machine: its start, what it says, and its end, whether it wants to or not.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::packages::{self, Arch};
use crate::step::{Line, Verdict, verdict};

/// What to boot, and how long it may take.
#[derive(Debug)]
pub struct Machine<'a> {
    pub arch: Arch,
    pub vmlinuz: &'a Path,
    /// Archives, in this order.
    pub initrd: Vec<&'a Path>,
    pub memory_mib: u32,
    pub disk: Option<&'a Path>,
    /// Whether time goes on while it is idle, as it does here.
    pub waits: bool,
    /// Of the emulator's own time; by the clock four times that.
    pub limit: Duration,
    /// For its files.
    pub folder: &'a Path,
    /// Which of its boots this is, from 1: each has a console of its own.
    pub boot: u32,
}

/// How often an emulator hears of something.
///
/// With `sleep=on` that of QEMU 7.2 and an idle processor of it wait for each other now and then, and for ever: the
/// timer that ends the idle time is set by its main loop, which nobody has woken. Any event does that.
const NUDGE: Duration = Duration::from_secs(1);

/// Package and program that machines of an architecture need.
pub fn emulator(arch: Arch) -> (&'static str, &'static str) {
    match arch {
        Arch::Amd64 => ("qemu-system-x86", "qemu-system-x86_64"),
        Arch::Arm64 => ("qemu-system-arm", "qemu-system-aarch64"),
    }
}

/// What came of a machine, and what it took of this one's processors.
#[derive(Debug)]
pub struct Ran {
    pub verdict: Verdict,
    pub cpu: Duration,
    /// By the clock.
    pub wall: Duration,
}

/// Boots, calls `heard` with each line as it comes, and gives what came of it.
pub fn run(machine: &Machine, mut heard: impl FnMut(&Line)) -> Result<Ran> {
    let folder = machine.folder;
    fs::create_dir_all(folder).with_context(|| format!("create {}", folder.display()))?;
    let (steps, serial) = (folder.join("steps"), serial(folder, machine.boot));
    let initrd = folder.join("initrd");
    let mut whole = File::create(&initrd).with_context(|| format!("create {}", initrd.display()))?;
    for part in &machine.initrd {
        let mut part = File::open(part).with_context(|| format!("open {}", part.display()))?;
        std::io::copy(&mut part, &mut whole).context("write the initrd (no space?)")?;
    }
    drop(whole);
    File::create(&steps).context("create the file of steps")?;
    let child = Guarded(start(machine, &initrd, &steps, &serial)?);
    let ran = follow(child, &steps, machine.limit, &mut heard).with_context(|| {
        let complaint = fs::read_to_string(folder.join("emulator.log")).unwrap_or_default();
        format!("the emulator said: {}", complaint.trim_end())
    })?;
    // Made anew for each run.
    fs::remove_file(&initrd).with_context(|| format!("remove {}", initrd.display()))?;
    Ok(ran)
}

/// Reads the steps until the process ends; kills it when its time is over.
fn follow(mut child: Guarded, steps: &Path, limit: Duration, heard: &mut dyn FnMut(&Line)) -> Result<Ran> {
    let (begun, mut lines) = (Instant::now(), Vec::new());
    let mut reader = Reader::open(steps)?;
    let (mut cpu, mut nudged) = (Duration::ZERO, Instant::now());
    loop {
        // What has ended has no time any more.
        cpu = cpu.max(cpu_time(child.0.id()));
        // In this order: what was written before the end is read after it.
        let ended = child.0.try_wait().context("wait for the emulator")?;
        for line in reader.lines()? {
            heard(&line);
            lines.push(line);
        }
        if let Some(status) = ended {
            ensure!(status.success(), "the emulator ended with {status}");
            return Ok(Ran { verdict: verdict(&lines), cpu, wall: begun.elapsed() });
        }
        let wall = begun.elapsed();
        if cpu > limit || wall > 4 * limit {
            let why = format!(
                "killed: it may take {} s of a processor, and by the clock four times that",
                limit.as_secs()
            );
            return Ok(Ran { verdict: Verdict::Failed(why), cpu, wall });
        }
        if nudged.elapsed() > NUDGE {
            nudged = Instant::now();
            // An empty line for its monitor. What has ended hears nothing, which the next round sees.
            let _ = child.0.stdin.as_mut().map(|monitor| monitor.write_all(b"\n"));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn start(machine: &Machine, initrd: &Path, steps: &Path, serial: &Path) -> Result<Child> {
    let (package, program) = emulator(machine.arch);
    let console = match machine.arch {
        Arch::Amd64 => "ttyS0",
        Arch::Arm64 => "ttyAMA0",
    };
    // Nobody else would end it, if this harness is killed.
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", program]);
    match machine.arch {
        Arch::Amd64 => command.args(["-cpu", "max"]),
        // The processor of the fleet's small machines.
        Arch::Arm64 => command.args(["-M", "virt", "-cpu", "neoverse-n1"]),
    };
    // Time inside goes by instructions, 2 ns each: however busy this machine is, nothing in there is late. What is
    // idle it skips, so that nobody waits for a timer; but not where a disk is read all the time, whose answers
    // take this machine's time, and would seem to take minutes.
    command.args([
        "-accel",
        "tcg,thread=single",
        "-icount",
        if machine.waits { "shift=1,sleep=on" } else { "shift=1,sleep=off" },
        "-rtc",
        "clock=vm",
    ]);
    // The fleet's small machines have two.
    command.args(["-smp", if machine.arch == Arch::Arm64 { "2" } else { "1" }]);
    command.args(["-no-reboot", "-nic", "none", "-display", "none"]);
    command.args(["-monitor", "stdio", "-m", &machine.memory_mib.to_string()]);
    command.arg("-kernel").arg(machine.vmlinuz).arg("-initrd").arg(initrd);
    command.args(["-append", &format!("console={console} quiet loglevel=4 panic=-1")]);
    command.args(["-device", "virtio-serial-pci", "-device", "virtserialport,chardev=steps,name=steps"]);
    command.args(["-chardev", &format!("file,id=steps,path={}", quoted(steps))]);
    command.args(["-serial", &format!("file:{}", quoted(serial))]);
    if let Some(disk) = machine.disk {
        // What the machine has flushed is safe from the machine's end; this one's end is no test's. When there is no
        // space the machine is told, where QEMU alone would stop it until somebody makes room.
        let ways = "format=raw,if=virtio,cache=unsafe,werror=report,rerror=report";
        command.args(["-drive", &format!("file={},{ways}", quoted(disk))]);
    }
    let log = File::create(machine.folder.join("emulator.log")).context("create the emulator's log")?;
    command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(log);
    command.spawn().with_context(|| format!("start {program} (apt-get install {package} util-linux)"))
}

/// Ticks a second in /proc, on all of our architectures.
const USER_HZ: f64 = 100.0;

/// What a process has used, in user space and in the kernel; nothing when there is no such process.
fn cpu_time(pid: u32) -> Duration {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // Behind the name, which may hold anything: state is the first word, and these are the 12th and 13th.
    let words = text.rsplit(')').next().unwrap_or_default().split_whitespace();
    let ticks: u64 = words.skip(11).take(2).filter_map(|word| word.parse::<u64>().ok()).sum();
    Duration::from_secs_f64(ticks as f64 / USER_HZ)
}

/// Says what is missing before anything is built for it.
pub fn assert_emulator(arch: Arch) -> Result<()> {
    let (package, program) = emulator(arch);
    packages::assert_program(program, package)
}

/// A comma would begin another option.
fn quoted(path: &Path) -> String {
    path.display().to_string().replace(',', ",,")
}

/// Ends with us, whatever happens.
struct Guarded(Child);

impl Drop for Guarded {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The lines of a growing file.
struct Reader {
    file: File,
    read: u64,
    rest: Vec<u8>,
}

impl Reader {
    fn open(path: &Path) -> Result<Reader> {
        let file = File::open(path).with_context(|| format!("open {}", path.display()))?;
        Ok(Reader { file, read: 0, rest: Vec::new() })
    }

    fn lines(&mut self) -> Result<Vec<Line>> {
        self.file.seek(SeekFrom::Start(self.read)).context("read the steps")?;
        self.read += self.file.read_to_end(&mut self.rest).context("read the steps")? as u64;
        let Some(end) = self.rest.iter().rposition(|byte| *byte == b'\n') else { return Ok(Vec::new()) };
        let rest = self.rest.split_off(end + 1);
        let whole = std::mem::replace(&mut self.rest, rest);
        let lines = whole.split(|byte| *byte == b'\n').filter(|line| !line.is_empty());
        lines
            .map(|line| {
                serde_json::from_slice(line)
                    .with_context(|| format!("understand the step {}", String::from_utf8_lossy(line)))
            })
            .collect()
    }
}

fn serial(folder: &Path, boot: u32) -> PathBuf {
    folder.join(format!("serial-{boot}.log"))
}

/// Where what the console showed at the last boot is, and the last of it; nothing where there was no boot.
pub fn console(folder: &Path, boots: u32, lines: usize) -> Option<(PathBuf, String)> {
    let path = (1..=boots).rev().map(|boot| serial(folder, boot)).find(|path| path.exists())?;
    let text = fs::read(&path).unwrap_or_default();
    let text = String::from_utf8_lossy(&text).replace('\r', "");
    let all: Vec<&str> = text.lines().collect();
    let last = &all[all.len().saturating_sub(lines)..];
    Some((path, last.iter().map(|line| format!("    | {line}\n")).collect()))
}

pub fn folder(name: &str) -> PathBuf {
    crate::target().join("vm/runs").join(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What becomes of a machine that does this; how many lines were heard, and how long it took.
    fn followed(script: &str, limit: Duration) -> (Result<Verdict>, usize, Duration) {
        let folder = tempfile::tempdir().unwrap();
        let steps = folder.path().join("steps");
        File::create(&steps).unwrap();
        let mut shell = Command::new("sh");
        shell.args(["-c", script]).env("STEPS", &steps).stdin(Stdio::piped());
        let (begun, mut heard) = (Instant::now(), 0);
        let child = Guarded(shell.spawn().unwrap());
        let ran = follow(child, &steps, limit, &mut |_| heard += 1);
        (ran.map(|ran| ran.verdict), heard, begun.elapsed())
    }

    const STEP: &str = r#"echo '{"step":{"name":"a","ok":true,"seconds":1,"detail":""}}' >>$STEPS;"#;
    const END: &str = r#"echo '{"end":{"steps":1}}' >>$STEPS;"#;
    const LONG: Duration = Duration::from_secs(60);

    #[test]
    fn only_a_machine_that_says_everything_and_ends_well_has_passed() {
        assert_eq!(followed(&format!("{STEP}{END}"), LONG).0.unwrap(), Verdict::Ok);
        for silent in ["true".to_owned(), STEP.to_owned(), END.to_owned()] {
            assert!(matches!(followed(&silent, LONG).0.unwrap(), Verdict::Failed(_)), "{silent}");
        }
        for broken in [format!("{STEP}{END} exit 3"), format!("echo nonsense >>$STEPS; {STEP}{END}")] {
            assert!(followed(&broken, LONG).0.is_err(), "{broken}");
        }
    }

    #[test]
    fn an_emulator_hears_of_something_every_second() {
        let (verdict, _, took) = followed(&format!("read a; read b; {STEP}{END}"), LONG / 6);
        assert_eq!(verdict.unwrap(), Verdict::Ok, "{took:?}");
        assert!(took > NUDGE);
    }

    #[test]
    fn a_machine_that_hangs_or_spins_is_killed_and_what_it_said_is_kept() {
        for script in ["exec sleep 987", "while :; do :; done"] {
            let (verdict, heard, took) = followed(&format!("{STEP} {script}"), Duration::from_millis(500));
            let Verdict::Failed(why) = verdict.unwrap() else { panic!("{script} has passed") };
            assert!(
                why.starts_with("killed: ") && heard == 1 && took < LONG,
                "{why}: {heard} lines, {took:?}"
            );
        }
    }

    #[test]
    fn a_process_that_computes_takes_time_and_one_that_waits_does_not() {
        let me = std::process::id();
        let begun = Instant::now();
        while cpu_time(me) < Duration::from_millis(30) {
            assert!(begun.elapsed() < LONG);
        }
        assert_eq!(cpu_time(u32::MAX), Duration::ZERO);
    }
}
