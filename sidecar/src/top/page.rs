//! A frame as lines of a terminal: the title, traffic, who is refused beside who knocks,
//! and what drifted. What doesn't fit into the height is left out from below.

use ratatui::style::{Color, Modifier, Style};
use ratatui::text::{Line, Span};

use super::{Flow, Frame};
use crate::policy::Mode;
use crate::report::Verdict;
use crate::terms::{Stamp, printable};

const RATES: usize = 48;
const PORTS: usize = 34;
const GAP: usize = 2;

/// At most `height` lines of at most `width` columns, or 34 where there are fewer.
pub fn page(frame: &Frame, width: usize, height: usize) -> Vec<Line<'static>> {
    let width = width.max(PORTS);
    let wide = width >= 72;
    let notes: Vec<String> =
        frame.notes.iter().take(3).map(|note| cut(&printable(note, 400), width)).collect();
    // Title, four headings, three scopes, the drops, three gaps, the footer.
    let fixed = 10 + notes.len() + 1;
    let people = |rows: usize| if wide { rows } else { rows * 2 + 1 };
    let mut rows = [
        frame.services.len().min(8),
        frame.refused.len().max(frame.strangers.len()).clamp(1, 10),
        frame.drift.len().clamp(1, 10),
    ];
    while fixed + rows[0] + people(rows[1]) + rows[2] > height {
        let largest = (0..3).rev().max_by_key(|at| rows[*at]).unwrap_or(0);
        if rows[largest] <= 1 {
            break;
        }
        rows[largest] -= 1;
    }
    let mut out = vec![title(frame, width)];
    out.extend(notes.into_iter().map(|note| Line::styled(note, Style::new().fg(Color::Yellow))));
    traffic(frame, width, rows[0], &mut out);
    out.push(Line::default());
    out.push(dropped(frame, width));
    let ports = refused(frame, rows[1]);
    let strangers = strangers(frame, if wide { width - PORTS - GAP } else { width }, rows[1]);
    if wide {
        beside(ports, strangers, &mut out);
    } else {
        out.extend(ports.into_iter().chain(strangers));
    }
    out.push(Line::default());
    drift(frame, width, rows[2], &mut out);
    out.truncate(height.saturating_sub(1));
    out.push(footer(frame, width));
    out
}

/// The same without a terminal: as long as it needs to be, without colours.
pub fn to_text(frame: &Frame, width: usize) -> String {
    let mut out = String::new();
    for line in page(frame, width, 60) {
        let text: String = line.spans.iter().map(|span| span.content.as_ref()).collect();
        out.push_str(text.trim_end());
        out.push('\n');
    }
    out
}

fn title(frame: &Frame, width: usize) -> Line<'static> {
    let (says, colour) = match frame.verdict {
        Verdict::Ok => ("as the policy says".to_owned(), Color::Green),
        Verdict::Drift => (format!("differs from the policy ({})", frame.findings), Color::Red),
        Verdict::Unknown => (format!("could not tell all ({} blind)", frame.blind), Color::Yellow),
    };
    let audit = if frame.mode == Mode::Audit { ", audit mode: refuses nothing" } else { "" };
    let node = printable(&frame.node, 63);
    let clock = format!("{} UTC", clock(frame.at));
    let left = format!("{node}: {says}{audit}");
    let room = width.saturating_sub(clock.len() + 1);
    let left = cut(&left, room);
    let says = left.strip_prefix(&node).unwrap_or_default().to_owned();
    let node: String = left.chars().take(node.chars().count()).collect();
    Line::from(vec![
        Span::styled(node, bold()),
        Span::styled(
            format!("{says:<fill$}", fill = room + 1 - left.chars().count() + says.chars().count()),
            Style::new().fg(colour),
        ),
        Span::raw(clock),
    ])
}

fn traffic(frame: &Frame, width: usize, services: usize, out: &mut Vec<Line<'static>>) {
    let name = width.saturating_sub(RATES).max(12);
    let heads = ["in pkt/s", "in B/s", "out pkt/s", "out B/s"].map(|head| format!("{head:>12}"));
    out.push(Line::styled(cut(&format!("{:<name$}{}", "TRAFFIC", heads.concat()), width), heading()));
    let row = |flow: &Flow, indent: &str| {
        let rates = [flow.inward.packets, flow.inward.bytes, flow.out.packets, flow.out.bytes];
        let rates = rates.map(|rate| format!("{:>12}", short(rate)));
        let quiet = flow.inward.packets + flow.out.packets == 0.0;
        let label = fit(&format!("{indent}{}", printable(&flow.name, 80)), name);
        let style = if quiet { Style::new().add_modifier(Modifier::DIM) } else { Style::new() };
        Line::styled(cut(&format!("{label}{}", rates.concat()), width), style)
    };
    out.extend(frame.scopes.iter().map(|flow| row(flow, "")));
    out.extend(frame.services.iter().take(services).map(|flow| row(flow, "  ")));
}

/// The exact sums, by reason.
fn dropped(frame: &Frame, width: usize) -> Line<'static> {
    let word = if frame.mode == Mode::Audit { "WOULD DROP" } else { "DROPPED" };
    let one = |d: &super::Dropped| match d.per_second {
        0.0 => format!("{} {}", d.reason, short(d.packets as f64)),
        rate => format!("{} {} ({}/s)", d.reason, short(d.packets as f64), short(rate)),
    };
    let all: Vec<String> = frame.dropped.iter().map(one).collect();
    let all = if all.is_empty() { "nothing".to_owned() } else { all.join(", ") };
    let text = cut(&format!("{word} packets: {all}"), width);
    let (head, rest) = text.split_at(text.len().min(word.len()));
    Line::from(vec![Span::styled(head.to_owned(), heading()), Span::raw(rest.to_owned())])
}

fn refused(frame: &Frame, rows: usize) -> Vec<Line<'static>> {
    let mut out = vec![Line::styled(format!("{:<20}{:>7}{:>7}", "REFUSED PORT", "tries", "/s"), heading())];
    if frame.refused.is_empty() {
        out.push(Line::raw(fit("none yet", PORTS)));
    }
    out.extend(frame.refused.iter().take(rows).map(|port| {
        let name = port.name.as_deref().map(|name| printable(name, 40)).unwrap_or_default();
        let name = if name.chars().count() > 9 { cut(&name, 8) + "\u{2026}" } else { name };
        let label = fit(&format!("{:>5}/{} {name}", port.port, port.proto), 20);
        Line::raw(format!("{label}{:>7}{:>7}", short(port.tries as f64), short(port.per_second)))
    }));
    out
}

fn strangers(frame: &Frame, width: usize, rows: usize) -> Vec<Line<'static>> {
    let name = width.saturating_sub(22);
    let head = format!("{}{:>7}{:>7}{:>8}", fit("BUSIEST STRANGERS", name), "tries", "/s", "ports");
    let mut out = vec![Line::styled(cut(&head, width), heading())];
    if frame.strangers.is_empty() {
        out.push(Line::raw("none yet"));
    }
    out.extend(frame.strangers.iter().take(rows).map(|stranger| {
        let ports = match stranger.ports {
            1 => format!(":{}", stranger.last_port),
            n if n >= super::PORTS_MAX => format!("{n}+"),
            n => n.to_string(),
        };
        let label = fit(&stranger.address.to_string(), name);
        let (tries, rate) = (short(stranger.tries as f64), short(stranger.per_second));
        Line::raw(cut(&format!("{label}{tries:>7}{rate:>7}{ports:>8}"), width))
    }));
    out
}

fn drift(frame: &Frame, width: usize, rows: usize, out: &mut Vec<Line<'static>>) {
    out.push(Line::styled("RECENT DRIFT", heading()));
    if frame.drift.is_empty() {
        out.push(Line::raw("none that the daemon remembers"));
    }
    out.extend(
        frame.drift.iter().take(rows).map(|drift| {
            Line::raw(cut(&format!("{} {}", clock(drift.at), printable(&drift.text, 400)), width))
        }),
    );
}

fn footer(frame: &Frame, width: usize) -> Line<'static> {
    let missed = match frame.missed {
        0 => String::new(),
        n => format!(", {} more came too fast to look at", short(n as f64)),
    };
    let text = format!("q quits; tries since {}{missed}", clock(frame.since));
    Line::styled(cut(&text, width), Style::new().add_modifier(Modifier::DIM))
}

fn beside(left: Vec<Line<'static>>, right: Vec<Line<'static>>, out: &mut Vec<Line<'static>>) {
    let count = left.len().max(right.len());
    let (mut left, mut right) = (left.into_iter(), right.into_iter());
    for _ in 0..count {
        let mut line = left.next().unwrap_or_else(|| Line::raw(" ".repeat(PORTS)));
        // A line's own style would colour the whole of it.
        line.spans.iter_mut().for_each(|span| span.style = line.style.patch(span.style));
        line.style = Style::new();
        line.spans.push(Span::raw(" ".repeat(GAP)));
        let other = right.next().unwrap_or_default();
        line.spans.extend(other.spans.into_iter().map(|span| {
            let style = other.style.patch(span.style);
            Span { style, ..span }
        }));
        out.push(line);
    }
}

fn heading() -> Style {
    Style::new().fg(Color::Cyan).add_modifier(Modifier::BOLD)
}

fn bold() -> Style {
    Style::new().add_modifier(Modifier::BOLD)
}

/// "18:32:01".
fn clock(at: Stamp) -> String {
    at.to_string().get(11..19).unwrap_or_default().to_owned()
}

/// At most six characters: "0", "0.5", "950", "1.2k", "34M".
fn short(number: f64) -> String {
    let (mut number, mut unit) = (number.max(0.0), "");
    for next in ["k", "M", "G", "T", "P"] {
        if number < 999.5 {
            break;
        }
        number /= 1000.0;
        unit = next;
    }
    match number {
        0.0 => "0".into(),
        n if n < 9.95 && (!unit.is_empty() || n.fract() != 0.0) => format!("{n:.1}{unit}"),
        n => format!("{n:.0}{unit}"),
    }
}

fn cut(text: &str, width: usize) -> String {
    text.chars().take(width).collect()
}

/// Exactly `width` characters; what is too long loses its middle, and a space stays behind.
fn fit(text: &str, width: usize) -> String {
    let length = text.chars().count();
    if length < width {
        return format!("{text:<width$}");
    }
    let room = width.saturating_sub(2);
    let head: String = text.chars().take(room - room / 2).collect();
    let tail: String = text.chars().skip(length - room / 2).collect();
    format!("{head}\u{2026}{tail} ")
}
