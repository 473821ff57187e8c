//! The command line: one file per verb. Data goes to stdout, talk to stderr; exit 0 as the
//! policy says, 1 it differs, 2 could not tell, could not act, or bad usage or policy.

use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context as _;
use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::source::bpf;

mod apply;
mod audit;
mod break_glass;
mod check;
mod explain;
mod fleet;
mod import;
mod install;
mod man;
mod plan;
mod policy;
mod release;
mod run;
mod screen;
mod ssh_start;
mod status;
mod top;

pub use policy::load_policy;
pub use run::{
    INTERNAL_CANARY, INTERNAL_HTTP, INTERNAL_LOAD, INTERNAL_LOAD_BINDS, INTERNAL_PROBE, INTERNAL_SEND,
};

/// Declares, enforces, observes and reports what this host exposes.
///
/// spokeguard keeps a spoke as its policy says: only the declared ports public, sshd
/// on the mesh address only, keepalive set on the tunnel. It never opens anything.
#[derive(Parser)]
#[command(name = "spokeguard", version, max_term_width = 80, after_help = EXAMPLES)]
pub struct Cli {
    #[command(flatten)]
    pub global: Global,
    #[command(subcommand)]
    pub command: Command,
}

const EXAMPLES: &str = "\
Examples:
  spokeguard policy check              is the policy file right?
  spokeguard check                     is this host as the policy says?
  spokeguard plan                      what would apply change?
  spokeguard audit                     what do strangers reach on this host?
  spokeguard run                       the daemon: watch, repair, report

Exit codes: 0 as the policy says, 1 it differs, 2 could not tell or not act.";

/// Over what all commands take, so that a command's own options stand together.
const EVERYWHERE: &str = "Options of every command";

#[derive(Args, Clone)]
pub struct Global {
    /// The policy file
    #[arg(
        long,
        global = true,
        help_heading = EVERYWHERE,
        value_name = "FILE",
        env = "SPOKEGUARD_POLICY",
        default_value = "/etc/spokeguard/policy.toml"
    )]
    pub policy: PathBuf,
    /// How to print the result
    #[arg(long, global = true, help_heading = EVERYWHERE, value_enum, default_value_t = Format::Text)]
    pub format: Format,
    /// Print nothing but errors; the exit code tells
    #[arg(long, short, global = true, help_heading = EVERYWHERE)]
    pub quiet: bool,
    /// No colours (also: NO_COLOR set to anything)
    #[arg(long, global = true, help_heading = EVERYWHERE)]
    pub no_color: bool,
    /// Where confirmed rules and drift history are kept [default: /var/lib/spokeguard]
    #[arg(long, global = true, help_heading = EVERYWHERE, value_name = "DIR")]
    pub state_dir: Option<PathBuf>,
    /// Where the socket and the lock live [default: /run/spokeguard]
    #[arg(long, global = true, help_heading = EVERYWHERE, value_name = "DIR")]
    pub run_dir: Option<PathBuf>,
    /// Where eBPF maps and links are pinned [default: /sys/fs/bpf/spokeguard]
    #[arg(long, global = true, help_heading = EVERYWHERE, value_name = "DIR")]
    pub pin_dir: Option<PathBuf>,
    /// The control group whose processes the bind guard watches [default: the root, all of them]
    #[arg(long, global = true, help_heading = EVERYWHERE, value_name = "DIR", env = "SPOKEGUARD_CGROUP", hide = true)]
    pub cgroup: Option<PathBuf>,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Format {
    Text,
    Json,
    // nmap's, for audit only. Said there: a word on one value makes every help page twice as long.
    Xml,
    // For fleet bundle only.
    #[value(hide = true)]
    CloudInit,
}

#[derive(Subcommand)]
pub enum Command {
    /// Look once and print what differs from the policy
    Check(check::Options),
    /// Show what apply would change; changes nothing
    Plan,
    /// Put the policy in force once, and read it back
    #[command(after_help = apply::ON_TRIAL)]
    Apply(apply::Options),
    /// Keep the rules that apply put in force: disarm the rollback
    Confirm,
    /// Take our rules away, after saying what that opens
    Release(release::Options),
    /// A way in for a while, which the kernel closes by itself
    #[command(subcommand)]
    BreakGlass(break_glass::Verb),
    /// The daemon: watch, repair what drifts, report
    #[command(after_help = apply::ON_TRIAL)]
    Run,
    /// The running daemon's last report
    Status,
    /// Live view: traffic, refused attempts, strangers, recent drift
    Top(top::Options),
    /// Probe this host as strangers would, or scan others from here
    Audit(Box<audit::Options>),
    /// What a finding means, why it matters, what to do
    Explain {
        /// A code such as listener-exposed; none lists them all
        code: Option<String>,
    },
    /// Check, show or import the policy file
    #[command(subcommand)]
    Policy(policy::Verb),
    /// Many nodes from one inventory: render, check, roll out
    #[command(after_help = fleet::INVENTORY)]
    Fleet(Box<fleet::Options>),
    /// Put the systemd units in place and start them
    Install(install::Options),
    /// Take the units away; the rules in force stay
    Uninstall(install::Removal),
    /// Completion script for a shell
    Completions { shell: clap_complete::Shell },
    /// The manual page, as roff
    Man(man::Options),
    /// Loads and pins the eBPF programs (run by the daemon itself)
    #[command(name = INTERNAL_LOAD, hide = true)]
    InternalLoad {
        pin_dir: PathBuf,
        #[arg(long)]
        guard_only: bool,
    },
    /// Loads, pins and attaches the bind guard (run by the daemon itself)
    #[command(name = INTERNAL_LOAD_BINDS, hide = true)]
    InternalLoadBinds { pin_dir: PathBuf, control_group: Option<PathBuf> },
    /// Serves the metrics (run by the daemon itself)
    #[command(name = INTERNAL_HTTP, hide = true)]
    InternalHttp,
    /// Ends what a killed audit began (run by the audit itself)
    #[command(name = crate::source::probe::keeper::VERB, hide = true)]
    InternalKeep { run_dir: PathBuf },
    /// Probes this host from outside (run by the daemon itself)
    #[command(name = INTERNAL_PROBE, hide = true)]
    InternalProbe,
    /// Tries whether our controls hold (run by the daemon itself)
    #[command(name = INTERNAL_CANARY, hide = true)]
    InternalCanary,
    /// Speaks to the hub (run by the daemon itself)
    #[command(name = INTERNAL_SEND, hide = true)]
    InternalSend,
}

/// The directories of this instance. In a network namespace other than the first one the
/// defaults get a subdirectory of its own, so that instances never meet.
#[derive(Clone, Debug)]
pub struct Places {
    pub state: PathBuf,
    pub run: PathBuf,
    pub pin: PathBuf,
    /// Of the bind guard; `None`: the root.
    pub cgroup: Option<PathBuf>,
}

impl Global {
    pub fn places(&self) -> anyhow::Result<Places> {
        let suffix = crate::sys::netns::instance_suffix();
        // The rollback's watchdog works in another directory, so a relative path would lead it astray.
        let place = |given: &Option<PathBuf>, default: &str| match (given, &suffix) {
            (Some(path), _) => std::path::absolute(path).with_context(|| path.display().to_string()),
            (None, Some(suffix)) => Ok(PathBuf::from(default).join(suffix)),
            (None, None) => Ok(PathBuf::from(default)),
        };
        // No bpffs is no error here: whoever needs it says so.
        let pin = bpf::pin_dir(self.pin_dir.as_deref(), false)?;
        Ok(Places {
            state: place(&self.state_dir, "/var/lib/spokeguard")?,
            run: place(&self.run_dir, "/run/spokeguard")?,
            pin: pin.unwrap_or_else(|| PathBuf::from(bpf::BPFFS).join(bpf::DIRECTORY)),
            cgroup: self.cgroup.clone(),
        })
    }

    pub fn colour(&self) -> bool {
        !self.no_color
            && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty())
            && std::io::stdout().is_terminal()
    }

    /// Columns to wrap text at: the terminal's, between 40 and 100; 80 when piped.
    pub fn width(&self) -> usize {
        rustix::termios::tcgetwinsize(std::io::stdout())
            .ok()
            .map(|size| usize::from(size.ws_col))
            .filter(|columns| *columns > 0)
            .map_or(80, |columns| columns.clamp(40, 100))
    }

    /// Prints the result of a verb that has a form for each format.
    pub fn tell(&self, text: &str, json: serde_json::Value) -> anyhow::Result<()> {
        match self.format {
            Format::Text | Format::Xml | Format::CloudInit => self.print(text),
            Format::Json => self.print(&format!("{}\n", serde_json::to_string_pretty(&json)?)),
        }
    }

    /// Prints the result of a verb. A closed pipe (`| head`) is not an error.
    pub fn print(&self, text: &str) -> anyhow::Result<()> {
        if self.quiet {
            return Ok(());
        }
        let mut out = std::io::stdout().lock();
        match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
            Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
            result => Ok(result?),
        }
    }
}

/// Could not tell, could not act, or bad usage or policy.
pub const FAILED: u8 = 2;

/// Runs one command line and gives its exit code. Errors go to stderr, once, as a chain.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            let code = if error.use_stderr() { FAILED } else { 0 };
            let _ = error.print();
            return ExitCode::from(code);
        }
    };
    let Cli { global, command } = cli;
    let result = match command {
        Command::Fleet(options) => fleet::run(&global, &options),
        _ if global.format == Format::CloudInit => Err(anyhow::anyhow!(fleet::CLOUD_INIT_ELSEWHERE)),
        Command::Audit(options) => audit::run(&global, &options),
        _ if global.format == Format::Xml => Err(anyhow::anyhow!("--format xml is for audit only")),
        Command::Check(options) => check::run(&global, &options),
        Command::Plan => plan::run(&global),
        Command::Apply(options) => apply::run(&global, &options),
        Command::Confirm => apply::confirm(&global),
        Command::Release(options) => release::run(&global, &options),
        Command::BreakGlass(verb) => break_glass::run(&global, &verb),
        Command::Run => run::run(&global),
        Command::Status => status::run(&global),
        Command::Top(options) => top::run(&global, &options),
        Command::Explain { code } => explain::run(&global, code.as_deref()),
        Command::Policy(verb) => policy::run(&global, &verb),
        Command::Install(options) => install::install(&global, &options),
        Command::Uninstall(options) => install::uninstall(&global, &options),
        Command::Completions { shell } => completions(&global, shell),
        Command::Man(options) => man::run(&global, &options),
        Command::InternalLoad { pin_dir, guard_only } => run::load_bpf(&pin_dir, guard_only),
        Command::InternalLoadBinds { pin_dir, control_group } => {
            run::load_binds(&pin_dir, control_group.as_deref())
        }
        Command::InternalHttp => run::serve_http(),
        Command::InternalKeep { run_dir } => crate::source::probe::keeper::keep(&run_dir).map(|()| 0),
        Command::InternalProbe => run::probe(),
        Command::InternalSend => run::send(),
        Command::InternalCanary => crate::daemon::canary::run_child().map(|()| 0),
    };
    match result {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            let text = format!("{error:#}");
            // Mistakes in a policy come rendered, with their own beginning.
            let beginning = if text.starts_with("error: ") { "" } else { "error: " };
            let _ = writeln!(std::io::stderr(), "{beginning}{text}");
            ExitCode::from(FAILED)
        }
    }
}

fn completions(global: &Global, shell: clap_complete::Shell) -> anyhow::Result<u8> {
    let mut text = Vec::new();
    clap_complete::generate(shell, &mut <Cli as clap::CommandFactory>::command(), "spokeguard", &mut text);
    global.print(&String::from_utf8_lossy(&text))?;
    Ok(0)
}

/// Today in UTC: the day by which exceptions are judged.
pub fn today(now: crate::terms::Stamp) -> jiff::civil::Date {
    now.0.to_zoned(jiff::tz::TimeZone::UTC).date()
}
