//! New connections a second to an allowed port: without any rules, with nothing but connection tracking (which
//! every stateful firewall needs), with spokeguard, and with the same rules written for iptables.

use std::io::Read;
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use lab::{HUB_MESH, Lab, Node, SPOKE_PUBLIC};

use crate::figures::{Goal, Row, Samples, Section, paired};
use crate::packets::clear;
use crate::policy;

const PATIENCE: Duration = Duration::from_secs(5);

/// Connections timed together: what else the machine does hits some of them, and the median none.
const BURST: u32 = 25;

/// The least that has the kernel track connections.
const CONNTRACK: &str = "table inet tracked {
    chain input {
        type filter hook input priority 0; policy accept;
        ct state invalid accept
    }
}";

#[derive(Clone, Copy)]
enum Load {
    Nothing,
    Conntrack,
    Spokeguard,
    Iptables,
}

pub fn measure(quick: bool) -> Result<Section> {
    let (rounds, window) = if quick { (3, Duration::from_secs(1)) } else { (15, Duration::from_secs(3)) };
    let lab = Lab::build(crate::PLAIN)?;
    let _web = lab.spoke.listen("web", &["tcp/[::]:80"])?;
    let folder = crate::folder(&lab, &policy::of_the_contracts_size(&lab)?)?;
    let pins = lab.spoke.path("/sys/fs/bpf/spokeguard");
    let loads = [Load::Nothing, Load::Conntrack, Load::Spokeguard, Load::Iptables];
    let mut rates = [const { Vec::new() }; 4];
    for round in 0..rounds {
        // Turn about, so that no load always follows the same other one.
        for step in 0..loads.len() {
            let at = (round + step) % loads.len();
            let rate = match loads[at] {
                Load::Nothing => rate(&lab.internet, window)?,
                Load::Conntrack => {
                    lab.spoke.nft(CONNTRACK)?;
                    let rate = rate(&lab.internet, window)?;
                    lab.spoke.nft("flush ruleset")?;
                    rate
                }
                Load::Spokeguard => {
                    let daemon = lab.spoke.daemon_in(&folder, &[])?;
                    ensure!(
                        lab.spoke.ok(&["nft", "list", "tables"])?.contains("inet spokeguard"),
                        "no rules"
                    );
                    settled(daemon.running.pid())?;
                    let rate = rate(&lab.internet, window)?;
                    clear(&lab.spoke, &pins, daemon)?;
                    rate
                }
                Load::Iptables => {
                    iptables(&lab.spoke, &rules())?;
                    let rate = rate(&lab.internet, window)?;
                    // Empty tables keep their hooks, and so their cost.
                    lab.spoke.nft("flush ruleset")?;
                    rate
                }
            };
            rates[at].push(rate);
        }
    }
    let ratio = |of: Load| {
        let spokeguard = &rates[Load::Spokeguard as usize];
        Ok::<_, anyhow::Error>(paired(spokeguard, &rates[of as usize])?.median())
    };
    let goals = vec![
        Goal::at_least("with spokeguard, of without", "x", ratio(Load::Nothing)?, 0.97),
        Goal::at_least("with spokeguard, of connection tracking alone", "x", ratio(Load::Conntrack)?, 0.97),
        Goal::at_least("with spokeguard, of iptables", "x", ratio(Load::Iptables)?, 0.97),
    ];
    let command = "connect to 198.51.100.7:80, read what it says, close; and again";
    let rows = ["with nothing", "with connection tracking", "with spokeguard", "with iptables"]
        .into_iter()
        .zip(rates)
        .map(|(what, rates)| Row::new(what, "/s", command, rates))
        .collect::<Result<_>>()?;
    let notes = vec![
        format!(
            "One client at a time, {} s each, told by the median of bursts of {BURST}; both ends share this \
             machine's CPUs.",
            window.as_secs()
        ),
        "\"With nothing\" has no connection tracking either; the row below it has one rule that asks for it and \
         lets everything pass. iptables: the INPUT chain that ufw users write \
         (established first, then lo, ssh for the hub, 80 and 443, policy DROP), by Debian's iptables-restore."
            .to_string(),
    ];
    Ok(Section { name: "connects", title: "New connections to an allowed port", rows, goals, notes })
}

/// Waits until a daemon that has just started has looked at everything and tried its controls once, by the CPU
/// time of it and its children.
fn settled(pid: u32) -> Result<()> {
    const CALM: Duration = Duration::from_millis(500);
    let used = || -> Result<u64> {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
        let (_, fields) = stat.rsplit_once(')').context("a process without a name")?;
        // utime, stime, cutime, cstime.
        fields.split_whitespace().skip(11).take(4).map(|field| Ok(field.parse::<u64>()?)).sum()
    };
    let begun = Instant::now();
    let mut before = used()?;
    while begun.elapsed() < Duration::from_secs(20) {
        std::thread::sleep(CALM);
        let now = used()?;
        if now <= before + 1 {
            return Ok(());
        }
        before = now;
    }
    anyhow::bail!("the daemon uses CPU for more than 20 s")
}

fn rate(node: &Node, window: Duration) -> Result<f64> {
    let to = SocketAddr::new(SPOKE_PUBLIC, 80);
    node.inside(|| {
        let (mut rates, begun) = (Vec::new(), Instant::now());
        while begun.elapsed() < window {
            let burst = Instant::now();
            for _ in 0..BURST {
                connect(to)?;
            }
            rates.push(f64::from(BURST) / burst.elapsed().as_secs_f64());
        }
        Ok(Samples::new(rates)?.median())
    })
}

fn connect(to: SocketAddr) -> Result<()> {
    let mut stream = TcpStream::connect_timeout(&to, PATIENCE).context("connect to 80")?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut said = [0; 16];
    let mut length = 0;
    loop {
        match stream.read(&mut said[length..])? {
            0 => break,
            more => length += more,
        }
    }
    ensure!(&said[..length] == b"web\n", "80 said something else");
    Ok(())
}

fn rules() -> String {
    format!(
        "*filter\n:INPUT DROP [0:0]\n:FORWARD DROP [0:0]\n:OUTPUT ACCEPT [0:0]\n\
         -A INPUT -i lo -j ACCEPT\n\
         -A INPUT -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT\n\
         -A INPUT -m conntrack --ctstate INVALID -j DROP\n\
         -A INPUT -p icmp -j ACCEPT\n\
         -A INPUT -i wg0 -s {HUB_MESH} -p tcp -m multiport --dports 22,{} -j ACCEPT\n\
         -A INPUT -i wg0 -s 10.84.0.0/24 -p tcp -m multiport --dports 19999,{} -j ACCEPT\n\
         -A INPUT -p udp --dport {} -j ACCEPT\n\
         -A INPUT -p tcp --dport 80 -j ACCEPT\n\
         -A INPUT -p tcp --dport 443 -j ACCEPT\n\
         COMMIT\n",
        policy::METRICS,
        policy::EXPORTER,
        lab::TUNNEL_PORT
    )
}

fn iptables(node: &Node, rules: &str) -> Result<()> {
    node.sh(&format!("iptables-restore <<'END'\n{rules}END"))?;
    Ok(())
}
