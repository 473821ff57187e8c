//! New connections a second to an allowed port: without any rules, with spokeguard, and with the same rules
//! written for iptables.

use std::io::Read;
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use lab::{HUB_MESH, Lab, Node, SPOKE_PUBLIC};

use crate::figures::{Goal, Row, Section, paired};
use crate::packets::clear;
use crate::policy;

const PATIENCE: Duration = Duration::from_secs(5);

#[derive(Clone, Copy)]
enum Load {
    Nothing,
    Spokeguard,
    Iptables,
}

pub fn measure(quick: bool) -> Result<Section> {
    let (rounds, window) = if quick { (3, Duration::from_secs(1)) } else { (15, Duration::from_secs(3)) };
    let lab = Lab::build(crate::PLAIN)?;
    let _web = lab.spoke.listen("web", &["tcp/[::]:80"])?;
    let folder = crate::folder(&lab, &policy::of_the_contracts_size(&lab)?)?;
    let pins = lab.spoke.path("/sys/fs/bpf/spokeguard");
    let loads = [Load::Nothing, Load::Spokeguard, Load::Iptables];
    let mut rates = [const { Vec::new() }; 3];
    for round in 0..rounds {
        // Turn about, so that no load always follows the same other one.
        for step in 0..loads.len() {
            let at = (round + step) % loads.len();
            let rate = match loads[at] {
                Load::Nothing => rate(&lab.internet, window)?,
                Load::Spokeguard => {
                    let daemon = lab.spoke.daemon_in(&folder, &[])?;
                    ensure!(
                        lab.spoke.ok(&["nft", "list", "tables"])?.contains("inet spokeguard"),
                        "no rules"
                    );
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
    let of_nothing = |load: Load| Ok::<_, anyhow::Error>(paired(&rates[load as usize], &rates[0])?.median());
    let goals = vec![
        Goal::at_least("with spokeguard, of without", "x", of_nothing(Load::Spokeguard)?, 0.97),
        Goal::at_least(
            "with spokeguard, of iptables",
            "x",
            paired(&rates[Load::Spokeguard as usize], &rates[Load::Iptables as usize])?.median(),
            0.97,
        ),
    ];
    let command = "connect to 198.51.100.7:80, read what it says, close; and again";
    let rows = ["with nothing", "with spokeguard", "with iptables"]
        .into_iter()
        .zip(rates)
        .map(|(what, rates)| Row::new(what, "/s", command, rates))
        .collect::<Result<_>>()?;
    let notes = vec![
        format!("One client at a time, {} s each; both ends share this machine's CPUs.", window.as_secs()),
        "\"With nothing\" has no connection tracking either. iptables: the INPUT chain that ufw users write \
         (established first, then lo, ssh for the hub, 80 and 443, policy DROP), by Debian's iptables-restore."
            .to_string(),
    ];
    Ok(Section { name: "connects", title: "New connections to an allowed port", rows, goals, notes })
}

fn rate(node: &Node, window: Duration) -> Result<f64> {
    let to = SocketAddr::new(SPOKE_PUBLIC, 80);
    node.inside(|| {
        let (mut served, begun) = (0u32, Instant::now());
        while begun.elapsed() < window {
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
            served += 1;
        }
        Ok(f64::from(served) / begun.elapsed().as_secs_f64())
    })
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
