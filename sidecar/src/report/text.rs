//! A report for a person at a terminal: the verdict first, the worst first, one finding a
//! paragraph, and at the end what was accepted and what could not be looked at.

use super::{Report, Verdict};
use crate::diff::{Code, Finding, Severity, lasting, listed};
use crate::terms::{Stamp, printable};

const BOLD: &str = "1";
const DIM: &str = "2";
const RED: &str = "1;31";
const YELLOW: &str = "33";
const CYAN: &str = "36";
const GREEN: &str = "1;32";

pub(super) fn render(report: &Report, width: usize, colour: bool) -> String {
    let mut page = Page { text: String::new(), width: width.clamp(40, 200), colour };
    headline(report, &mut page);
    let (accepted, open): (Vec<&Finding>, Vec<&Finding>) = report.findings.iter().partition(|f| f.accepted);
    for severity in Severity::ALL {
        let group: Vec<&&Finding> = open.iter().filter(|f| f.severity == severity).collect();
        if group.is_empty() {
            continue;
        }
        page.heading(&severity.name().to_uppercase(), shade(severity));
        for finding in group {
            page.finding(finding, report.at);
        }
    }
    if !accepted.is_empty() {
        page.heading("ACCEPTED RISKS, declared by the policy", CYAN);
        for finding in &accepted {
            page.finding(finding, report.at);
        }
    }
    if !report.blind.is_empty() {
        page.heading("COULD NOT TELL", YELLOW);
        for blind in &report.blind {
            page.field(2, &format!("{:<11}", blind.facet.name()), None, &blind.reason);
        }
    }
    closing(report, &accepted, &open, &mut page);
    page.text
}

fn headline(report: &Report, page: &mut Page) {
    let drift = report.findings.iter().any(|f| f.is_drift() && f.code != Code::ControlUnproven);
    let (says, shade) = match (report.verdict, drift) {
        (Verdict::Ok, _) => ("as the policy says", GREEN),
        (Verdict::Drift, _) => ("differs from the policy", RED),
        (Verdict::Unknown, true) => ("differs, and could not tell all", RED),
        (Verdict::Unknown, false) => ("could not tell", YELLOW),
    };
    let node = printable(&report.node, page.width - 1);
    let at = report.at.to_the_second();
    let mut used = node.chars().count() + 1;
    page.paint(&node, BOLD);
    page.text.push(':');
    for (text, shade) in [(says, shade), (at.as_str(), DIM)] {
        // On the same line where there is room, the moment at its right end.
        if used + 1 + text.len() > page.width {
            page.new_line(2);
            used = 2;
        } else {
            let gap = if text == at { page.width - used - text.len() } else { 1 };
            page.text.push_str(&" ".repeat(gap));
            used += gap;
        }
        page.paint(text, shade);
        used += text.len();
    }
    page.text.push('\n');
}

fn closing(report: &Report, accepted: &[&Finding], open: &[&Finding], page: &mut Page) {
    let mut counts: Vec<String> = Severity::ALL
        .into_iter()
        .map(|severity| (open.iter().filter(|f| f.severity == severity).count(), severity.name()))
        .filter(|(n, _)| *n > 0)
        .map(|(n, name)| format!("{n} {name}"))
        .collect();
    if open.is_empty() {
        counts.push("No findings".to_owned());
    }
    if !accepted.is_empty() {
        counts.push(format!("{} accepted", accepted.len()));
    }
    if !report.blind.is_empty() {
        counts.push(format!("{} not answered", report.blind.len()));
    }
    page.text.push('\n');
    page.wrapped(0, 0, &format!("{}.", listed(&counts, usize::MAX)));
    if let Some(finding) = open.first() {
        page.wrapped(0, 0, &format!("`spokeguard explain {}` tells more.", finding.code));
    }
}

fn shade(severity: Severity) -> &'static str {
    match severity {
        Severity::Critical | Severity::High => RED,
        Severity::Medium => YELLOW,
        Severity::Low | Severity::Info => CYAN,
    }
}

struct Page {
    text: String,
    width: usize,
    colour: bool,
}

impl Page {
    fn heading(&mut self, text: &str, shade: &str) {
        self.text.push('\n');
        self.paint(text, shade);
        self.text.push('\n');
    }

    fn finding(&mut self, finding: &Finding, at: Stamp) {
        let title = format!("{}  ", finding.code);
        self.field(2, &title, Some(BOLD), &finding.subject);
        self.field(6, "wanted  ", Some(DIM), &finding.wanted);
        self.field(6, "found   ", Some(DIM), &finding.found);
        if let Some(actor) = &finding.by {
            self.field(6, "by      ", Some(DIM), &actor.to_string());
        }
        if let Some(since) = finding.since {
            let text = match at.seconds_since(since) {
                0 => "just now".to_owned(),
                seconds => format!("{}, {} ago", since.to_the_second(), lasting(seconds)),
            };
            self.field(6, "since   ", Some(DIM), &text);
        }
        self.field(6, "next    ", Some(DIM), &finding.next);
    }

    /// A label, and text that hangs beside it.
    fn field(&mut self, indent: usize, label: &str, shade: Option<&str>, text: &str) {
        self.text.push_str(&" ".repeat(indent));
        match shade {
            Some(shade) => self.paint(label, shade),
            None => self.text.push_str(label),
        }
        let hang = indent + label.chars().count();
        // A title too long to hang anything beside it.
        let hang = if hang * 2 > self.width { indent + 4 } else { hang };
        self.wrapped(indent + label.chars().count(), hang, text);
    }

    /// Writes words from column `at`, and later lines from column `hang`.
    fn wrapped(&mut self, at: usize, hang: usize, text: &str) {
        let (mut column, mut fresh) = (at, true);
        for word in printable(text, 4096).split_whitespace() {
            let mut word: Vec<char> = word.chars().collect();
            let fits = column + usize::from(!fresh) + word.len() <= self.width;
            if fits && !fresh {
                self.text.push(' ');
                column += 1;
            } else if !fits && column > hang {
                self.new_line(hang);
                column = hang;
            }
            // What fits on no line is cut where the line ends: a path, a key, an attack.
            while column + word.len() > self.width {
                let rest = word.split_off((self.width - column).max(1));
                self.text.extend(&word);
                self.new_line(hang);
                (word, column) = (rest, hang);
            }
            self.text.extend(&word);
            column += word.len();
            fresh = false;
        }
        self.text.push('\n');
    }

    fn new_line(&mut self, hang: usize) {
        self.text.push('\n');
        self.text.push_str(&" ".repeat(hang));
    }

    fn paint(&mut self, text: &str, shade: &str) {
        if self.colour {
            let end = text.trim_end().len();
            let (ink, space) = text.split_at(end);
            self.text.push_str(&format!("\x1b[{shade}m{ink}\x1b[0m{space}"));
        } else {
            self.text.push_str(text);
        }
    }
}
