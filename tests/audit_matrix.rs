//! `spokeguard audit` beside a real nmap at the other end of the wire, over the cases in `audit-cases/`.
//!
//! To add a case, write `audit-cases/NAME.toml` with what is different about this host; what must come out, nmap
//! says. `about` is required and says what the case is for. All else is optional: `setup`, a script for the spoke;
//! `rules`, in nft's words; `listeners`, as for the lab's `listen`; `addresses` that are compared (the spoke's two
//! public ones); `options` of the audit; `udp`, ports that are compared with `nmap -sU`; `spawn`, a command that
//! stays; `full = true`, to compare all 65,535 ports in each run and not only under `cargo xtask test --all` (else:
//! the lower 256, all that the rules name with their neighbours, and a sample); `thorough = true`, for one that is
//! run there alone, or by its name (SPOKEGUARD_AUDIT_CASE, or a part of some); `needs`, a command without whose
//! success the case is skipped, with what is missing (or fails, where SPOKEGUARD_AUDIT_SKIPS lists the cases that
//! may be skipped and this is none of them). Where our answer is not nmap's, `[[differs]]` says for which `ports`
//! (of `proto`, at `address`), what `ours` is, what `nmap` says (may be left out where that changes from run to
//! run), and `why` ours is right.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::net::IpAddr;
use std::path::Path;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use lab::{
    Lab, Listening, Mesh, Need, SPOKE_MESH, SPOKE_PUBLIC, SPOKE_PUBLIC_V6, Shape, lacking, spokeguard,
};
use serde::Deserialize;
use serde_json::Value;

/// How many labs side by side: nmap spends most of its time waiting. On the only processor of a machine with a kernel
/// before 6.4, whose packets wait for a thread like any other, five audits and their nmaps leave none of them a second.
fn labs() -> usize {
    if std::thread::available_parallelism().is_ok_and(|count| count.get() == 1) { 1 } else { 5 }
}
const LIMIT: Duration = Duration::from_secs(120);

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Case {
    #[serde(skip)]
    name: String,
    about: String,
    #[serde(default)]
    needs: Option<Requirement>,
    #[serde(default)]
    setup: String,
    #[serde(default)]
    rules: String,
    #[serde(default)]
    listeners: Vec<String>,
    #[serde(default)]
    spawn: Vec<String>,
    addresses: Option<Vec<IpAddr>>,
    #[serde(default)]
    options: Vec<String>,
    udp: Option<String>,
    #[serde(default)]
    full: bool,
    #[serde(default)]
    thorough: bool,
    #[serde(default)]
    differs: Vec<Differs>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Requirement {
    command: String,
    missing: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Differs {
    ports: String,
    #[serde(default = "tcp")]
    proto: String,
    address: Option<IpAddr>,
    ours: String,
    nmap: Option<String>,
    why: String,
}

fn tcp() -> String {
    "tcp".into()
}

#[test]
fn every_case_is_what_a_real_nmap_says_or_explained() {
    if lacking(&[Need::Lab, Need::Nmap, Need::Spokeguard]) {
        return;
    }
    let only = std::env::var("SPOKEGUARD_AUDIT_CASE").unwrap_or_default();
    let extent = Extent::wanted();
    let all = extent == Extent::All;
    let mut cases = cases();
    assert!(cases.len() > 20, "the cases were not found");
    let is_name = cases.iter().any(|case| case.name == only);
    let chosen = |name: &str| if is_name { name == only } else { name.contains(&only) };
    cases.retain(|case| chosen(&case.name) && (!case.thorough || all || !only.is_empty()));
    let skips = std::env::var("SPOKEGUARD_AUDIT_SKIPS").ok();
    let report = Mutex::new(Report { skips, ..Report::default() });
    let (full, dense): (Vec<Case>, Vec<Case>) = cases.into_iter().partition(|case| case.all_ports(extent));
    // A scan of all ports takes all that two cores have to give.
    for (waiting, labs) in [(Mutex::new(full), 1), (Mutex::new(dense), labs())] {
        std::thread::scope(|scope| {
            for _ in 0..labs {
                scope.spawn(|| {
                    loop {
                        let Some(case) = waiting.lock().unwrap().pop() else { break };
                        let started = Instant::now();
                        let done = case.run(extent);
                        report.lock().unwrap().note(&case, done, started.elapsed());
                    }
                });
            }
        });
    }
    let mut report = report.into_inner().unwrap();
    report.times.sort_by(|a, b| b.0.total_cmp(&a.0));
    println!("{} cases; the slowest: {:.1?}", report.same, &report.times[..report.times.len().min(8)]);
    assert!(report.wrong.is_empty(), "\n{}", report.wrong);
}

/// How many ports are compared, by SPOKEGUARD_AUDIT_CASES.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Extent {
    /// `all`: every port of every case, and the thorough cases as well.
    All,
    /// A sample, where a case does not ask for all.
    Usual,
    /// `sampled`: a sample of every case, where nmap is slow.
    Sampled,
}

impl Extent {
    fn wanted() -> Extent {
        match std::env::var("SPOKEGUARD_AUDIT_CASES").as_deref() {
            Ok("all") => Extent::All,
            Ok("sampled") => Extent::Sampled,
            Ok(other) => panic!("SPOKEGUARD_AUDIT_CASES={other} is neither all nor sampled"),
            Err(_) => Extent::Usual,
        }
    }
}

#[derive(Default)]
struct Report {
    /// The cases that may be skipped, where that is known.
    skips: Option<String>,
    same: usize,
    wrong: String,
    times: Vec<(f64, String)>,
}

impl Report {
    fn must_not_skip(&self, case: &str) -> bool {
        self.skips.as_ref().is_some_and(|may| may.split(' ').all(|name| name != case))
    }

    fn note(&mut self, case: &Case, done: anyhow::Result<Done>, took: Duration) {
        let before = self.wrong.len();
        match done {
            Ok(Done::Same) => self.same += 1,
            Ok(Done::Skipped(why)) if self.must_not_skip(&case.name) => {
                self.wrong += &format!("{}: may not be skipped here, and lacks {why}\n", case.name);
            }
            Ok(Done::Skipped(why)) => eprintln!("skipped: the case {}: {why}", case.name),
            Ok(Done::Wrong(text)) => self.wrong += &format!("{}: {}\n{text}", case.name, case.about),
            Err(error) => self.wrong += &format!("{}: {error:#}\n", case.name),
        }
        // At once, for whoever waits.
        eprint!("{}", &self.wrong[before..]);
        self.times.push((took.as_secs_f64(), case.name.clone()));
        eprintln!("{:>3} {:<28} {:.1} s", self.times.len(), case.name, took.as_secs_f64());
    }
}

enum Done {
    Same,
    Wrong(String),
    Skipped(String),
}

fn cases() -> Vec<Case> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("audit-cases");
    let mut out: Vec<Case> = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let text = std::fs::read_to_string(&path).unwrap();
        let mut case: Case =
            toml::from_str(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        case.name = path.file_stem().unwrap().to_string_lossy().into_owned();
        assert!(case.differs.iter().all(|d| d.why.len() > 8), "{}: a difference needs its reason", case.name);
        out.push(case);
    }
    out.sort_by(|a, b| b.name.cmp(&a.name));
    out
}

impl Case {
    fn all_ports(&self, extent: Extent) -> bool {
        extent == Extent::All || self.full && extent == Extent::Usual
    }

    fn run(&self, extent: Extent) -> anyhow::Result<Done> {
        let lab = Lab::build(Shape { mesh: Mesh::Plain, container: true })?;
        if let Some(Requirement { command, missing }) = &self.needs
            && lab.spoke.run(&["sh", "-c", command])?.code != Some(0)
        {
            return Ok(Done::Skipped(missing.clone()));
        }
        // The mesh address is asked for at the public door, and others as well; nmap needs to know the way.
        let near = ["198.51.100.", "2001:db8:1:"];
        for address in self.addresses.iter().flatten().chain([&SPOKE_MESH]) {
            let text = address.to_string();
            if !near.iter().any(|net| text.starts_with(net)) {
                let by = if address.is_ipv4() { SPOKE_PUBLIC } else { SPOKE_PUBLIC_V6 };
                lab.internet.sh(&format!("ip route replace {text} via {by}"))?;
            }
        }
        lab.spoke
            .sh(&format!("sysctl -qw net.ipv4.icmp_ratelimit=0 net.ipv6.icmp.ratelimit=0\n{}", self.setup))?;
        let _all = self.listeners(&lab)?;
        let _stays = match self.spawn.as_slice() {
            [] => None,
            words => {
                let mut running = lab.spoke.spawn(words)?;
                running.wait_for("ready", Duration::from_secs(10))?;
                Some(running)
            }
        };
        let reached = self.addresses.clone().unwrap_or(vec![SPOKE_PUBLIC, SPOKE_PUBLIC_V6]);
        let full = self.all_ports(extent);
        let dense = self.dense();
        lab.spoke.nft(&self.rules)?;
        let wrong = std::thread::scope(|scope| {
            let compared: Vec<_> = (reached.iter())
                .map(|address| {
                    let (lab, dense) = (&lab, &dense);
                    scope.spawn(move || self.compare(lab, *address, full, dense))
                })
                .collect();
            let (mut wrong, mut open) = (String::new(), 0);
            for one in compared {
                let (text, ports) = one.join().expect("a comparison panicked")?;
                wrong += &text;
                open += ports;
            }
            if open == 0 {
                wrong += "  a case in which nothing is open proves little\n";
            }
            anyhow::Ok(wrong)
        })?;
        Ok(if wrong.is_empty() { Done::Same } else { Done::Wrong(wrong) })
    }

    fn listeners(&self, lab: &Lab) -> anyhow::Result<Vec<Listening>> {
        let mesh = format!("tcp/{SPOKE_MESH}:7000");
        let v6 = format!("tcp/[{SPOKE_PUBLIC_V6}]:6000");
        let own: Vec<&str> = self.listeners.iter().map(String::as_str).collect();
        let usual = ["tcp/127.0.0.1:6379", "tcp/[::1]:6380", &mesh];
        let mut all = vec![lab.spoke.web()?, lab.spoke.listen("usual", &usual)?];
        if lab.spoke.sh("ip -4 addr show dev eth0")?.contains("198.51.100.7") {
            all.push(lab.spoke.listen("database", &["tcp/0.0.0.0:5432", &v6])?);
        }
        if !own.is_empty() {
            all.push(lab.spoke.listen("app", &own)?);
        }
        if let Some(container) = &lab.container {
            all.push(container.listen("inside", &["tcp/[::]:8000+1", "udp/[::]:8000"])?);
        }
        Ok(all)
    }

    /// Ports worth a look, if not all: low ones, those that anything names with their neighbours, and a sample.
    fn dense(&self) -> BTreeSet<u16> {
        let mut out: BTreeSet<u16> = (1..=256).chain((257..=u16::MAX).step_by(331)).collect();
        let texts = self.listeners.iter().chain(&self.spawn).chain([&self.rules, &self.setup]);
        for number in texts.flat_map(|text| text.split(|c: char| !c.is_ascii_digit())) {
            if let Ok(port) = number.parse::<u16>() {
                out.extend((port.saturating_sub(2)..=port.saturating_add(2)).filter(|port| *port > 0));
            }
        }
        out.extend([5432, 6000, 6379, 6380, 7000, 8000, 8001, u16::MAX]);
        out
    }

    /// What is wrong at one address, nothing if all is right; and how many ports are open.
    fn compare(
        &self,
        lab: &Lab,
        address: IpAddr,
        full: bool,
        dense: &BTreeSet<u16>,
    ) -> anyhow::Result<(String, usize)> {
        let mut wrong = String::new();
        let ours = self.audited(lab, address, "tcp")?;
        anyhow::ensure!(ours.len() == 65_535, "{address}: {} ports judged", ours.len());
        let list = if full { "1-65535".to_owned() } else { ranges(dense) };
        let mut theirs = lab.internet.nmap_states(address, &list)?;
        // At that pace nmap itself loses some; it gets another look at what is in dispute.
        for again in 0..3 {
            let disputed: BTreeSet<u16> = (theirs.iter())
                .filter(|(port, state)| {
                    ours[port] != **state && self.explained("tcp", address, **port).is_none()
                })
                .map(|(port, _)| *port)
                .collect();
            if disputed.is_empty() {
                break;
            }
            let slowly = again > 0 && disputed.len() < 300;
            theirs.extend(match slowly {
                true => lab.internet.nmap_states_slowly(address, &ranges(&disputed))?,
                false => lab.internet.nmap_states(address, &ranges(&disputed))?,
            });
        }
        self.judge(&mut wrong, "tcp", address, &ours, &theirs);
        let open = ours.values().filter(|state| *state == "open").count();
        if let Some(udp) = &self.udp {
            let ours = self.audited(lab, address, "udp")?;
            let theirs = lab.internet.nmap_udp_states(address, udp)?;
            self.judge(&mut wrong, "udp", address, &ours, &theirs);
        }
        Ok((wrong, open))
    }

    fn judge(
        &self,
        wrong: &mut String,
        proto: &str,
        address: IpAddr,
        ours: &BTreeMap<u16, String>,
        theirs: &BTreeMap<u16, String>,
    ) {
        let mut lines = 0;
        for (port, nmap) in theirs {
            let mine = &*ours[port];
            // Silence is all that nmap hears of a datagram that nobody answers.
            let same = mine == nmap || proto == "udp" && nmap == "open|filtered" && mine != "closed";
            let right = match self.explained(proto, address, *port) {
                Some(known) => known.ours == mine && known.nmap.as_ref().is_none_or(|known| known == nmap),
                None => same,
            };
            if !right {
                lines += 1;
                if lines <= 12 {
                    let _ = writeln!(wrong, "  {address} {port}/{proto}: {mine}, nmap {nmap}");
                }
            }
        }
        if lines > 12 {
            let _ = writeln!(wrong, "  {address}: {lines} {proto} ports in all");
        }
    }

    fn explained(&self, proto: &str, address: IpAddr, port: u16) -> Option<&Differs> {
        self.differs
            .iter()
            .find(|d| d.proto == proto && d.address.is_none_or(|of| of == address) && holds(&d.ports, port))
    }

    /// Every port's state by the program's own document.
    fn audited(&self, lab: &Lab, address: IpAddr, proto: &str) -> anyhow::Result<BTreeMap<u16, String>> {
        let program = spokeguard()?.display().to_string();
        // Each at the same time as others, so each with a lock of its own.
        let run_dir = lab.dir.join(format!("run-{address}")).display().to_string();
        let (proto_flag, address_text) = (format!("--{proto}"), address.to_string());
        let mut words = vec![&*program, "--run-dir", &run_dir, "--format", "json", "audit", "--no-policy"];
        words.extend([&*proto_flag, "--address", &address_text]);
        words.extend(self.options.iter().map(String::as_str));
        let outcome = lab.spoke.run_within(LIMIT, &words)?;
        anyhow::ensure!(outcome.code == Some(0), "{address}: {}", outcome.all());
        let json = outcome.json()?;
        let target =
            json["targets"].as_array().and_then(|all| all.iter().find(|t| t["address"] == address_text));
        let of = target.map(|t| &t["protocols"][0]).unwrap_or(&Value::Null);
        let rest = of["others"]["state"].as_str().unwrap_or("none");
        let mut out: BTreeMap<u16, String> = (1..=u16::MAX).map(|port| (port, rest.to_owned())).collect();
        let listed = of["ports"].as_array().map(Vec::as_slice).unwrap_or_default();
        let count = of["others"]["count"].as_u64().unwrap_or(0) + listed.len() as u64;
        anyhow::ensure!(count == 65_535, "{address}: {count} ports in the document");
        for port in listed {
            let number = port["port"].as_u64().and_then(|n| u16::try_from(n).ok()).unwrap_or(0);
            out.insert(number, port["state"].as_str().unwrap_or("none").to_owned());
        }
        Ok(out)
    }
}

/// As for nmap's `-p`.
fn ranges(ports: &BTreeSet<u16>) -> String {
    let mut out: Vec<(u16, u16)> = Vec::new();
    for port in ports {
        match out.last_mut() {
            Some((_, last)) if last.checked_add(1) == Some(*port) => *last = *port,
            _ => out.push((*port, *port)),
        }
    }
    out.iter().map(|(first, last)| format!("{first}-{last}")).collect::<Vec<_>>().join(",")
}

fn holds(list: &str, port: u16) -> bool {
    list.split(',').any(|word| {
        let (first, last) = word.split_once('-').unwrap_or((word, word));
        let number = |text: &str| text.trim().parse::<u16>().unwrap_or(0);
        (number(first)..=number(last)).contains(&port)
    })
}
