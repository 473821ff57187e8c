//! An audit for a person at a terminal: a table for each target, as nmap prints it, with
//! what the policy wants, who is there and why it is as it is.

use std::fmt::Write;

use super::{Audit, Effort, PortState, Protocol, State, Target, Vantage, Wanted};
use crate::report::Verdict;
use crate::terms::printable;

const BOLD: &str = "1";
const DIM: &str = "2";
const RED: &str = "1;31";
const YELLOW: &str = "33";
const CYAN: &str = "36";
const GREEN: &str = "1;32";

pub(super) fn render(audit: &Audit, width: usize, colour: bool) -> String {
    let mut page = Page { text: String::new(), width: width.clamp(40, 200), colour };
    for target in &audit.targets {
        page.target(target, audit.vantage);
    }
    page.summary(audit);
    page.text
}

struct Page {
    text: String,
    width: usize,
    colour: bool,
}

/// One line of the table, or several ports in a row that are all the same.
struct Row {
    cells: [String; 5],
    why: String,
    shade: Option<&'static str>,
    /// State and number of ports that nobody waits for, wants or reaches.
    dull: Option<(State, u32)>,
}

const DULL_MAX: usize = 12;
/// A path that loses less is an ordinary one.
const LOSS_MIN: f64 = 0.01;

const HEADS: [&str; 5] = ["PORT", "STATE", "SERVICE", "WANTED", "BY"];
/// No column but the last is wider than this.
const WIDEST: [usize; 5] = [15, 13, 16, 6, 22];

impl Page {
    fn target(&mut self, target: &Target, vantage: Vantage) {
        let mut head = match &target.name {
            Some(name) => format!("{} ({})", printable(name, 64), target.address),
            None => target.address.to_string(),
        };
        if let Some(interface) = &target.interface {
            let _ = write!(head, " on {}", printable(interface, 15));
        }
        let mut about = String::new();
        if let (Some(source), Vantage::OutsideIn) = (target.source, vantage) {
            let _ = write!(about, "as {source} would see it");
        }
        self.paint(&head, BOLD);
        if !about.is_empty() {
            let room = head.chars().count() + 2 + about.len() <= self.width;
            self.text.push_str(if room { ", " } else { ",\n  " });
            self.paint(&about, DIM);
        }
        self.text.push('\n');
        for protocol in &target.protocols {
            let Protocol { proto, scanned, others, unproven, effort, .. } = protocol;
            if others.count > 0 {
                let (n, state) = (thousands(others.count), others.state.name());
                let all = if others.count == *scanned { "All " } else { "" };
                let _ = writeln!(self.text, "{all}{n} {proto} ports {state}");
            }
            if *unproven > 0 {
                let n = thousands(*unproven);
                let _ = writeln!(self.text, "{n} {proto} ports not probed: as the rules say");
            }
            if let Some(Effort { passes, loss, .. }) = effort.filter(|effort| effort.loss >= LOSS_MIN) {
                let lost = loss * 100.0;
                let _ = writeln!(
                    self.text,
                    "{proto}: {lost:.0} of 100 packets got lost, silent ports were asked {passes} times"
                );
            }
        }
        let mut rows: Vec<Row> = Vec::new();
        for protocol in &target.protocols {
            let all = table_rows(protocol);
            // Some hundred ports that all say nothing, such as those of UDP that answered
            // before a limit of ICMP struck, would bury the few that do.
            let dull = all.iter().filter(|row| row.dull.is_some()).count();
            for state in State::ALL.into_iter().filter(|_| dull > DULL_MAX) {
                let ports: u32 =
                    all.iter().filter_map(|r| r.dull.filter(|(s, _)| *s == state)).map(|(_, n)| n).sum();
                if ports > 0 {
                    let _ =
                        writeln!(self.text, "{} {} ports {}", thousands(ports), protocol.proto, state.name());
                }
            }
            rows.extend(all.into_iter().filter(|row| dull <= DULL_MAX || row.dull.is_none()));
        }
        if !rows.is_empty() {
            self.table(&rows);
        }
        self.text.push('\n');
    }

    fn table(&mut self, rows: &[Row]) {
        // A column that says nothing is left out.
        let shown: Vec<usize> =
            (0..5).filter(|i| *i < 2 || rows.iter().any(|r| r.cells[*i] != "-")).collect();
        let widths: Vec<usize> = (shown.iter())
            .map(|i| {
                let cells = rows.iter().map(|r| r.cells[*i].chars().count());
                cells.chain([HEADS[*i].len()]).max().unwrap_or(0).min(WIDEST[*i])
            })
            .collect();
        let mut line = String::new();
        for (i, width) in shown.iter().zip(&widths) {
            let _ = write!(line, "{:<width$}  ", HEADS[*i], width = *width);
        }
        self.paint(&format!("{line}WHY"), DIM);
        self.text.push('\n');
        let indent: usize = widths.iter().map(|w| w + 2).sum();
        for row in rows {
            let mut line = String::new();
            for (i, width) in shown.iter().zip(&widths) {
                let cell: String = row.cells[*i].chars().take(*width).collect();
                let _ = write!(line, "{cell:<width$}  ", width = *width);
            }
            match row.shade {
                Some(shade) => self.paint(&line, shade),
                None => self.text.push_str(&line),
            }
            self.wrapped(indent, &row.why);
        }
    }

    /// Writes words from column `at`, where later lines begin as well.
    fn wrapped(&mut self, at: usize, text: &str) {
        // Where hardly anything is left beside the table, it goes below.
        let hang = if at + 16 > self.width { 6 } else { at };
        let mut column = at;
        if hang != at {
            self.break_line(hang);
            column = hang;
        }
        for word in text.split(' ') {
            let length = word.chars().count();
            if column > hang && column + length > self.width {
                self.break_line(hang);
                column = hang;
            }
            let mut word: Vec<char> = word.chars().collect();
            // What fits on no line is cut where the line ends.
            while column + word.len() > self.width.max(hang + 16) {
                let rest = word.split_off(self.width.max(hang + 16) - column);
                self.text.extend(&word);
                self.break_line(hang);
                (word, column) = (rest, hang);
            }
            self.text.extend(&word);
            column += word.len();
            if column < self.width {
                self.text.push(' ');
                column += 1;
            }
        }
        self.end_line();
    }

    fn break_line(&mut self, indent: usize) {
        self.end_line();
        self.text.push_str(&" ".repeat(indent));
    }

    fn end_line(&mut self) {
        self.text.truncate(self.text.trim_end_matches(' ').len());
        self.text.push('\n');
    }

    fn summary(&mut self, audit: &Audit) {
        for (list, what, shade) in
            [(&audit.exposed, "Exposed", RED), (&audit.missing, "Wanted but not open", YELLOW)]
        {
            if list.is_empty() {
                continue;
            }
            self.paint(&format!("{what}:"), shade);
            self.text.push(' ');
            let mut spots: Vec<String> = list.iter().take(20).map(ToString::to_string).collect();
            if list.len() > spots.len() {
                spots.push(format!("and {} more", list.len() - spots.len()));
            }
            self.wrapped(what.len() + 2, &spots.join(" "));
        }
        for blind in &audit.blind {
            self.paint("Could not tell:", YELLOW);
            self.text.push(' ');
            self.wrapped(16, &format!("{}: {}", printable(&blind.facet, 32), printable(&blind.reason, 600)));
        }
        let judged = |p: &PortState| p.wanted.is_some();
        let policy = audit.targets.iter().flat_map(|t| &t.protocols).flat_map(|p| &p.ports).any(judged);
        let (says, shade) = match audit.verdict {
            Verdict::Ok if policy => ("As the policy says", GREEN),
            Verdict::Ok => ("Not compared with a policy", BOLD),
            Verdict::Drift => ("Differs from the policy", RED),
            Verdict::Unknown => ("Could not tell all", YELLOW),
        };
        self.paint(says, shade);
        let ports: u64 = audit.targets.iter().flat_map(|t| &t.protocols).map(|p| u64::from(p.scanned)).sum();
        let addresses = match audit.targets.len() {
            1 => "1 address".to_owned(),
            n => format!("{n} addresses"),
        };
        let ports = thousands(u32::try_from(ports).unwrap_or(u32::MAX));
        self.text.push_str(&format!(". {ports} ports of {addresses} in {:.2} s.\n", audit.seconds));
    }

    fn paint(&mut self, text: &str, shade: &str) {
        if self.colour {
            let (ink, space) = text.split_at(text.trim_end().len());
            let _ = write!(self.text, "\x1b[{shade}m{ink}\x1b[0m{space}");
        } else {
            self.text.push_str(text);
        }
    }
}

fn table_rows(protocol: &Protocol) -> Vec<Row> {
    let alike = |a: &PortState, b: &PortState| {
        let same = (a.state, a.wanted, &a.by, &a.reason, &a.accepted)
            == (b.state, b.wanted, &b.by, &b.reason, &b.accepted);
        // What is open deserves a line of its own.
        same && a.state != State::Open && a.by.is_none() && a.wanted != Some(Wanted::Open)
    };
    let mut out = Vec::new();
    let mut rest = protocol.ports.as_slice();
    while let Some(first) = rest.first() {
        let next = |i: usize| rest[i - 1].port.get().checked_add(1) == Some(rest[i].port.get());
        let run = (1..rest.len()).take_while(|i| next(*i) && alike(first, &rest[*i])).count() + 1;
        // Two lines are as short as one that hides a service's name.
        let run = if run < 3 { 1 } else { run };
        out.push(row(protocol, first, &rest[run - 1], run == 1));
        rest = &rest[run..];
    }
    out
}

fn row(protocol: &Protocol, first: &PortState, last: &PortState, single: bool) -> Row {
    let proto = protocol.proto;
    let PortState { port, state, service, wanted, by, reason, accepted } = first;
    let ports = if single { format!("{port}/{proto}") } else { format!("{port}-{}/{proto}", last.port) };
    let service = service.as_ref().filter(|_| single).map_or("-".to_owned(), |name| printable(name, 64));
    let by = by
        .as_ref()
        .map_or("-".to_owned(), |actor| format!("{} ({})", printable(&actor.process, 15), actor.pid));
    // nmap's word alone, where we know nothing better.
    let mut why = reason.split_once("; ").map_or(reason.as_str(), |(_, more)| more).to_owned();
    if let Some(unit) = first.by.as_ref().and_then(|actor| actor.unit.as_ref()) {
        let _ = write!(why, ", {}", printable(unit, 64));
    }
    if let Some(exception) = accepted {
        let _ = write!(why, ", accepted: {}", printable(exception, 64));
    }
    let shade = match (state, wanted, accepted) {
        (State::Open, Some(Wanted::Closed), _) => Some(RED),
        (State::Open, _, Some(_)) => Some(CYAN),
        (State::Open, _, None) => Some(GREEN),
        (State::Closed | State::Filtered, Some(Wanted::Open), None) => Some(YELLOW),
        _ => None,
    };
    let is_dull = *state != State::Open && first.by.is_none() && *wanted != Some(Wanted::Open);
    let run = u32::from(last.port.get() - port.get()) + 1;
    Row {
        dull: is_dull.then_some((*state, run)),
        cells: [ports, state.name().to_owned(), service, wanted.map_or("-", |w| w.name()).to_owned(), by],
        why: printable(&why, 400),
        shade,
    }
}

/// 65532 as 65,532.
fn thousands(number: u32) -> String {
    let digits = number.to_string();
    let mut out = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}
