//! `break-glass`: a way in for a while, that the kernel closes by itself.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use clap::{Args, Subcommand};
use ipnet::IpNet;

use super::{Global, ssh_start};
use crate::apply::cut::{self, Cut};
use crate::apply::glass::{self as kernel, Which};
use crate::apply::guard;
use crate::desired::{Desired, TABLE};
use crate::diff::glass::seconds;
use crate::observed::{Link, Listener};
use crate::policy::Mode;
use crate::ruleset::glass::{self, Opening};
use crate::ruleset::{Packet, Ruleset, TableFamily, Verdict, judge, published};
use crate::source::owners::{self, Owners};
use crate::source::{links, listeners, nft};
use crate::sys::clock;
use crate::terms::{Family, Port, Proto, Scope, Stamp};
use sidecar_ebpf::bind::Judgement;

#[derive(Subcommand)]
pub enum Verb {
    /// Let somebody in for a while; the kernel closes it, whatever runs or does not
    #[command(after_help = EXAMPLES)]
    Open(Open),
    /// What is open, for whom, and until when
    List,
    /// Close it before its time, and cut what came in by it
    Close {
        /// A port such as 2222 or 53/udp, or `all`
        #[arg(value_name = "PORT|all", value_parser = which)]
        which: Which,
    },
}

const EXAMPLES: &str = "\
It lets in, and starts nothing. Where sshd is on the mesh address alone, a
second one has to be started, which the bind guard refuses elsewhere:
  spokeguard release --binds
  mkdir -p /run/sshd
  /usr/sbin/sshd -p 2222 -o ListenAddress=0.0.0.0

Example:
  spokeguard break-glass open 2222 --for 15m --from 192.0.2.0/24 \\
      --reason \"the mesh is down\"";

#[derive(Args)]
pub struct Open {
    /// The port that they will ask for, such as 2222 or 53/udp
    #[arg(value_name = "PORT[/udp]", value_parser = port)]
    port: (Proto, Port),
    /// How long: 10s to 1d
    #[arg(long = "for", value_name = "TIME", value_parser = lasts)]
    lasts: u32,
    /// Who: a prefix or an address, more than once if need be; `any` is everybody
    #[arg(long, value_name = "CIDR", required = true, value_parser = from)]
    from: Vec<From>,
    /// Why, for those who find it open
    #[arg(long, value_name = "TEXT", default_value = "no reason given", value_parser = reason)]
    reason: String,
}

#[derive(Clone, Copy)]
pub enum From {
    Prefix(IpNet),
    Any,
}

fn port(text: &str) -> Result<(Proto, Port), String> {
    let (number, proto) = match text.split_once('/') {
        None | Some((_, "tcp")) => (text.trim_end_matches("/tcp"), Proto::Tcp),
        Some((number, "udp")) => (number, Proto::Udp),
        Some(_) => return Err("a protocol is tcp or udp".into()),
    };
    let port = number.parse().ok().and_then(Port::new).ok_or("a port is a number from 1 to 65535")?;
    Ok((proto, port))
}

fn which(text: &str) -> Result<Which, String> {
    if text == "all" {
        return Ok(Which::All);
    }
    port(text).map(|(proto, port)| Which::One(proto, port)).map_err(|error| format!("{error}, or `all`"))
}

fn lasts(text: &str) -> Result<u32, String> {
    let time =
        humantime::parse_duration(text).map_err(|_| "write a number and its unit, such as 15m or 2h")?;
    let seconds = u32::try_from(time.as_secs()).unwrap_or(u32::MAX);
    if (glass::LASTS_MIN_S..=glass::LASTS_MAX_S).contains(&seconds) {
        Ok(seconds)
    } else {
        Err("between 10s and 1 day".into())
    }
}

fn from(text: &str) -> Result<From, String> {
    if text == "any" {
        return Ok(From::Any);
    }
    let net: IpNet = match text.parse::<IpAddr>() {
        Ok(address) => address.to_canonical().into(),
        Err(_) => text.parse().map_err(|_| "write a prefix such as 192.0.2.0/24, an address, or any")?,
    };
    if glass::is_anyone(&net) {
        return Err("that is everybody: write `--from any` if it is meant".into());
    }
    if net != net.trunc() {
        return Err(format!("the prefix of that length is {}", net.trunc()));
    }
    if net.addr().is_loopback() || net.addr().is_unspecified() || net.addr().is_multicast() {
        return Err("nobody comes from there".into());
    }
    Ok(From::Prefix(net))
}

fn reason(text: &str) -> Result<String, String> {
    let text = text.trim();
    if text.is_empty() {
        return Err("say why".into());
    }
    if text.chars().any(char::is_control) {
        return Err("one line of text".into());
    }
    if text.len() > glass::REASON_MAX {
        return Err(format!(
            "{} bytes, and the kernel keeps {} of them beside the rest",
            text.len(),
            glass::REASON_MAX
        ));
    }
    Ok(text.to_owned())
}

pub fn run(global: &Global, verb: &Verb) -> anyhow::Result<u8> {
    match verb {
        Verb::Open(options) => open(global, options),
        Verb::List => list(global),
        Verb::Close { which } => close(global, *which),
    }
}

fn open(global: &Global, options: &Open) -> anyhow::Result<u8> {
    let now = clock::now();
    let nets: Vec<IpNet> = (options.from.iter())
        .flat_map(|from| match from {
            From::Prefix(net) => vec![*net],
            From::Any => glass::anyone().to_vec(),
        })
        .collect();
    let (proto, port) = options.port;
    let opening = |from: IpNet| Opening {
        proto,
        port,
        from,
        owner: owner(),
        reason: options.reason.clone(),
        began: now,
        lasts_s: options.lasts,
        left_s: options.lasts,
    };
    // Of prefixes that hold each other the wider one; neighbours become one.
    let wanted: Vec<Opening> = IpNet::aggregate(&nets).into_iter().map(opening).collect();
    let opened = kernel::open(&wanted)?;
    guard::warn(guard::follow_glass(&global.places()?.pin));
    // The policy is a help here and no condition: a broken one must not keep anybody out.
    let desired = super::policy::load(global, now).ok().map(|(_, desired)| desired);
    let notes = match Sight::look() {
        Ok(sight) => opened.iter().flat_map(|one| notes(one, &sight, desired.as_ref())).collect(),
        Err(error) => vec![format!("can't tell whether anybody answers: {error:#}")],
    };
    let mut notes: Vec<String> = notes;
    notes.dedup();
    let mut text = String::new();
    for one in &opened {
        let time = humantime::format_duration(Duration::from_secs(one.lasts_s.into()));
        text +=
            &format!("open: {one} until {} ({time}); then the kernel closes it\n", seconds(one.ends(now)));
    }
    for note in &notes {
        text += &format!("note: {note}\n");
    }
    global.tell(
        &text,
        serde_json::json!({ "version": 1, "result": "opened", "openings": told(&opened, now), "notes": notes }),
    )?;
    Ok(0)
}

fn list(global: &Global) -> anyhow::Result<u8> {
    let now = clock::now();
    let openings = kernel::list()?;
    let mut text = String::new();
    for one in &openings {
        let left = humantime::format_duration(Duration::from_secs(one.left_s.into()));
        let (ends, began) = (seconds(one.ends(now)), seconds(one.began));
        text +=
            &format!("{one}\n  until {ends} ({left} left), by {} since {began}: {}\n", one.owner, one.reason);
    }
    if openings.is_empty() {
        text = "nothing is open\n".to_owned();
    }
    global.tell(&text, serde_json::json!({ "version": 1, "openings": told(&openings, now) }))?;
    Ok(0)
}

fn close(global: &Global, which: Which) -> anyhow::Result<u8> {
    let now = clock::now();
    let closed = kernel::close(which)?;
    guard::warn(guard::follow_glass(&global.places()?.pin));
    if closed.is_empty() {
        let text = "nothing is open there: nothing changed\n";
        global.tell(
            text,
            serde_json::json!({ "version": 1, "result": "nothing-to-close", "openings": [], "cut": Cut::default() }),
        )?;
        return Ok(0);
    }
    let mut text: String = closed.iter().map(|one| format!("closed: {one}\n")).collect();
    let desired = super::policy::load(global, now).ok().map(|(_, desired)| desired);
    let (line, cut) = cut_what_is_closed(desired.as_ref());
    text += &line;
    global.tell(
        &text,
        serde_json::json!({
            "version": 1, "result": "closed", "openings": told(&closed, now), "cut": cut,
        }),
    )?;
    Ok(0)
}

/// After a change that is certain to stay: a line for people, and the same for scripts.
pub(super) fn cut_what_is_closed(desired: Option<&Desired>) -> (String, Option<Cut>) {
    match cut::flows(desired) {
        Ok(cut) if cut.is_nothing() => (String::new(), Some(cut)),
        Ok(cut) => (format!("cut: {cut}\n"), Some(cut)),
        // Closed it is all the same: our rules judge TCP packet by packet.
        Err(error) => {
            eprintln!("warning: what came in before could not be cut: {error:#}");
            (String::new(), None)
        }
    }
}

fn told(openings: &[Opening], now: Stamp) -> Vec<serde_json::Value> {
    let one = |opening: &Opening| {
        serde_json::json!({
            "proto": opening.proto.name(),
            "port": opening.port.get(),
            "from": opening.from.to_string(),
            "owner": opening.owner,
            "reason": opening.reason,
            "since": seconds(opening.began),
            "until": seconds(opening.ends(now)),
            "lasts_seconds": opening.lasts_s,
            "left_seconds": opening.left_s,
        })
    };
    openings.iter().map(one).collect()
}

/// Who asks: whoever called sudo, else whoever logged in, else root.
fn owner() -> String {
    let sudo = std::env::var("SUDO_USER").ok().filter(|name| !name.is_empty());
    sudo.or_else(|| owners::user_of(std::process::id()))
        .map_or_else(|| "root".to_owned(), |name| glass::word(&name))
}

/// What decides whether an opening is of use.
struct Sight {
    rules: Ruleset,
    links: Vec<Link>,
    listeners: Vec<Listener>,
}

impl Sight {
    fn look() -> anyhow::Result<Self> {
        let (rules, links) = (nft::list_ruleset()?, links::read()?);
        Ok(Self { rules, links, listeners: listeners::read(&mut Owners::new())? })
    }
}

/// What the operator will want to know: an opened port of which nobody hears is no way in.
fn notes(opening: &Opening, sight: &Sight, desired: Option<&Desired>) -> Vec<String> {
    let Opening { proto, port, from, .. } = opening;
    let family = Family::of_net(from);
    let is_public = |link: &&Link| {
        let scope = desired.map_or(Some(Scope::Public), |d| d.policy.scope_of(&link.name));
        !link.loopback && link.master.is_none() && scope == Some(Scope::Public)
    };
    let doors: Vec<(&Link, IpAddr)> = (sight.links.iter().filter(is_public))
        .flat_map(|link| link.addresses.iter().map(move |net| (link, net.addr())))
        .filter(|(_, address)| Family::of(*address) == family)
        .collect();
    let mut notes = Vec::new();
    if desired.is_some_and(|desired| desired.policy.enforce.mode == Mode::Audit) {
        notes.push("mode audit drops nothing, with or without this".to_owned());
    }
    if let Some(name) = desired.and_then(|d| d.public(*proto, *port)).map(|service| &service.name) {
        notes.push(format!("the policy has {proto}/{port} open to anyone already ({name})"));
    }
    let redirected = published(&sight.rules).into_iter().find(|p| {
        p.proto == *proto && (p.first..=p.last).contains(port) && p.family.is_none_or(|f| f == family)
    });
    let here: Vec<&Listener> =
        sight.listeners.iter().filter(|l| (l.proto, l.port) == (*proto, *port)).collect();
    let answers = |listener: &&&Listener| {
        let address = listener.address.to_canonical();
        let any = address.is_unspecified()
            && (Family::of(address) == family || (address.is_ipv6() && !listener.v6only));
        any || doors.iter().any(|(_, own)| *own == address)
    };
    let by = |l: &Listener| l.owner.as_ref().map_or_else(|| "the kernel".to_owned(), ToString::to_string);
    let kept_out = || match desired.is_some_and(|desired| is_kept_out(opening, sight, desired)) {
        true => "; the bind guard lets nobody begin to before `spokeguard release --binds`",
        false => "",
    };
    match (&redirected, here.iter().find(answers), here.first()) {
        (Some(to), ..) => notes.push(format!("it leads to {}", to.target)),
        (None, Some(l), _) => notes.push(format!("{} answers at {}", by(l), l.address)),
        (None, None, Some(l)) => notes.push(format!(
            "nobody answers on a public {family} address: {} listens at {} only, and does not hear of it there{}",
            by(l),
            l.address,
            kept_out()
        )),
        (None, None, None) => {
            notes.push(format!("nobody listens on {proto}/{port}: start what should answer{}", kept_out()));
        }
    }
    if let Some(stopped) = stopped(opening, sight, &doors) {
        notes.push(stopped);
    }
    notes
}

/// Whether the kernel lets nobody begin to listen there for a stranger.
fn is_kept_out(opening: &Opening, sight: &Sight, desired: &Desired) -> bool {
    let any: IpAddr = match Family::of_net(&opening.from) {
        Family::Ipv4 => Ipv4Addr::UNSPECIFIED.into(),
        Family::Ipv6 => Ipv6Addr::UNSPECIFIED.into(),
    };
    let at = SocketAddr::new(any, opening.port.get());
    ssh_start::judged(desired, &sight.links, opening.proto, at, false) != Judgement::Allow
}

/// Another table that has them dropped all the same, on every way in.
fn stopped(opening: &Opening, sight: &Sight, doors: &[(&Link, IpAddr)]) -> Option<String> {
    let source = match opening.from {
        net if glass::is_anyone(&net) => return None,
        net => net.hosts().next()?,
    };
    let own: Vec<IpAddr> = sight.links.iter().flat_map(|l| l.addresses.iter().map(IpNet::addr)).collect();
    let mut by = None;
    for (door, address) in doors {
        let packet = Packet {
            iifname: door.name.clone(),
            source,
            destination: *address,
            proto: opening.proto,
            source_port: Port::new(40_000)?,
            port: opening.port,
        };
        let judgement = judge(&sight.rules, &packet, &|address| own.contains(&address));
        match judgement.verdict {
            Verdict::Drop | Verdict::Reject => by = judgement.by.or(by),
            Verdict::Accept | Verdict::Unknown(_) => return None,
        }
    }
    let by = by?;
    let ours = by.family == TableFamily::Inet && by.table == TABLE;
    (!ours).then(|| format!("table {} chain {} drops it all the same", by.table, by.chain))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_times_and_sources_are_read_as_people_write_them() {
        let tcp = |number| (Proto::Tcp, Port::new(number).expect("a port"));
        assert_eq!(port("2222"), Ok(tcp(2222)));
        assert_eq!(port("2222/tcp"), Ok(tcp(2222)));
        assert_eq!(port("53/udp").map(|(proto, _)| proto), Ok(Proto::Udp));
        for bad in ["0", "65536", "ssh", "22/sctp", "", "/udp", "22/tcp/tcp"] {
            assert!(port(bad).is_err(), "{bad}");
        }
        assert_eq!([lasts("15m"), lasts("10s"), lasts("1d")], [Ok(900), Ok(10), Ok(86_400)]);
        for bad in ["9s", "25h", "15", "soon", "-1m"] {
            assert!(lasts(bad).is_err(), "{bad}");
        }
        let net = |text| match from(text) {
            Ok(From::Prefix(net)) => net.to_string(),
            Ok(From::Any) => "any".to_owned(),
            Err(error) => error,
        };
        assert_eq!(
            ["192.0.2.0/24", "192.0.2.7", "2001:db8::1", "any"].map(net),
            ["192.0.2.0/24", "192.0.2.7/32", "2001:db8::1/128", "any"]
        );
        assert_eq!(net("::ffff:192.0.2.7"), "192.0.2.7/32");
        for everybody in ["0.0.0.0/0", "::/0"] {
            assert_eq!(net(everybody), "that is everybody: write `--from any` if it is meant");
        }
        assert_eq!(net("192.0.2.7/24"), "the prefix of that length is 192.0.2.0/24");
        assert!(from("everywhere").is_err() && from("127.0.0.1").is_err());
        assert!(reason("  ").is_err() && reason("a\nb").is_err() && reason(&"x".repeat(200)).is_err());
        assert_eq!(reason(" the mesh is down ").as_deref(), Ok("the mesh is down"));
    }
}
