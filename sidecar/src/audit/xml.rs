//! nmap's `-oX` (its DTD, version 1.05), for what reads that. The DTD knows one scanner by
//! name, so this names itself in `args` and in a script element for what nmap has no word for.

use std::fmt::Write;

use super::{Audit, PortState, Ports, Protocol, State, Target, Vantage};
use crate::terms::{Proto, printable};

pub(super) fn render(audit: &Audit, arguments: &str, asked: &Ports) -> String {
    let mut out = String::new();
    // Writing to a String can't fail.
    let _ = write(audit, arguments, asked, &mut out);
    out
}

fn write(audit: &Audit, arguments: &str, asked: &Ports, out: &mut String) -> std::fmt::Result {
    let start = audit.started.0.as_second();
    let end = start.saturating_add(audit.seconds.ceil() as i64);
    writeln!(out, r#"<?xml version="1.0" encoding="UTF-8"?>"#)?;
    writeln!(out, "<!DOCTYPE nmaprun>")?;
    writeln!(
        out,
        r#"<nmaprun scanner="nmap" args="{}" start="{start}" startstr="{}" version="{}" xmloutputversion="1.05">"#,
        escaped(arguments),
        audit.started.to_the_second(),
        env!("CARGO_PKG_VERSION"),
    )?;
    for proto in Proto::ALL {
        let all = audit.targets.iter().flat_map(|t| &t.protocols).filter(|p| p.proto == proto);
        let Some(most) = all.max_by_key(|p| p.scanned) else { continue };
        let kind = match proto {
            Proto::Tcp => "syn",
            Proto::Udp => "udp",
        };
        writeln!(
            out,
            r#"<scaninfo type="{kind}" protocol="{proto}" numservices="{}" services="{asked}"/>"#,
            most.scanned
        )?;
    }
    writeln!(out, r#"<verbose level="0"/>"#)?;
    writeln!(out, r#"<debugging level="0"/>"#)?;
    for target in &audit.targets {
        host(audit, target, start, end, out)?;
    }
    let hosts = audit.targets.len();
    writeln!(
        out,
        r#"<runstats><finished time="{end}" timestr="{}" elapsed="{:.2}" summary="{}" exit="success"/><hosts up="{hosts}" down="0" total="{hosts}"/></runstats>"#,
        audit.started.to_the_second(),
        audit.seconds,
        escaped(&summary(audit)),
    )?;
    writeln!(out, "</nmaprun>")
}

fn host(audit: &Audit, target: &Target, start: i64, end: i64, out: &mut String) -> std::fmt::Result {
    let kind = if target.address.is_ipv4() { "ipv4" } else { "ipv6" };
    writeln!(out, r#"<host starttime="{start}" endtime="{end}">"#)?;
    writeln!(out, r#"<status state="up" reason="user-set" reason_ttl="0"/>"#)?;
    writeln!(out, r#"<address addr="{}" addrtype="{kind}"/>"#, target.address)?;
    if let Some(name) = &target.name {
        writeln!(out, r#"<hostnames><hostname name="{}" type="user"/></hostnames>"#, escaped(name))?;
    }
    out.push_str("<ports>");
    for Protocol { proto, others, .. } in &target.protocols {
        if others.count > 0 {
            let (state, count) = (others.state.name(), others.count);
            let reason = usual(*proto, others.state);
            writeln!(
                out,
                r#"<extraports state="{state}" count="{count}"><extrareasons reason="{reason}" count="{count}" proto="{proto}"/></extraports>"#
            )?;
        }
    }
    for protocol in &target.protocols {
        for port in &protocol.ports {
            port_element(audit, target, protocol.proto, port, out)?;
        }
    }
    writeln!(out, "</ports>")?;
    writeln!(out, "</host>")
}

fn port_element(
    audit: &Audit,
    target: &Target,
    proto: Proto,
    port: &PortState,
    out: &mut String,
) -> std::fmt::Result {
    let PortState { port: number, state, service, wanted, by, reason, accepted } = port;
    let word = reason.split("; ").next().filter(|w| !w.contains(' ')).unwrap_or(usual(proto, *state));
    write!(
        out,
        r#"<port protocol="{proto}" portid="{number}"><state state="{}" reason="{}" reason_ttl="0"/>"#,
        state.name(),
        escaped(word)
    )?;
    if let Some(actor) = by {
        write!(out, r#"<owner name="{}"/>"#, escaped(&actor.process))?;
    }
    if let Some(name) = service {
        write!(out, r#"<service name="{}" method="table" conf="3"/>"#, escaped(name))?;
    }
    let mut facts = vec![("reason", reason.clone())];
    facts.extend(wanted.map(|w| ("wanted", w.name().to_owned())));
    facts.extend(accepted.clone().map(|name| ("accepted", name)));
    if let Some(actor) = by {
        facts.push(("pid", actor.pid.to_string()));
        facts.extend(actor.unit.clone().map(|unit| ("unit", unit)));
    }
    if let (Some(interface), Vantage::OutsideIn) = (&target.interface, audit.vantage) {
        facts.push(("interface", interface.clone()));
    }
    let output: Vec<String> = facts.iter().map(|(key, value)| format!("{key}: {value}")).collect();
    write!(out, r#"<script id="spokeguard" output="{}">"#, escaped(&output.join(", ")))?;
    for (key, value) in &facts {
        write!(out, r#"<elem key="{key}">{}</elem>"#, escaped(value))?;
    }
    writeln!(out, "</script></port>")
}

/// nmap's word for why a port has this state, where nothing better is known.
const fn usual(proto: Proto, state: State) -> &'static str {
    match (proto, state) {
        (Proto::Tcp, State::Open) => "syn-ack",
        (Proto::Udp, State::Open) => "udp-response",
        (Proto::Tcp, State::Closed) => "reset",
        (Proto::Udp, State::Closed) => "port-unreach",
        (_, State::Filtered | State::OpenFiltered | State::Unknown) => "no-response",
    }
}

fn summary(audit: &Audit) -> String {
    format!(
        "spokeguard: verdict {}, {} exposed, {} missing, {} addresses in {:.2} seconds",
        audit.verdict.name(),
        audit.exposed.len(),
        audit.missing.len(),
        audit.targets.len(),
        audit.seconds
    )
}

/// For an attribute or text. What XML 1.0 has no way to write is replaced.
fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in printable(text, 4096).chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&apos;"),
            '\u{fffe}' | '\u{ffff}' => out.push('\u{fffd}'),
            c => out.push(c),
        }
    }
    out
}
