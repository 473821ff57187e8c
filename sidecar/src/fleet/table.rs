//! A table for a terminal: a row for each node, and below it, indented, why it stands there.

use crate::terms::printable;

pub const BOLD: &str = "1";
pub const DIM: &str = "2";
pub const RED: &str = "1;31";
pub const YELLOW: &str = "33";
pub const GREEN: &str = "32";

const GAP: usize = 2;
const INDENT: usize = 4;
/// A cell longer than this loses its middle.
const CELL_MAX: usize = 32;
/// Names are cut to no less than this, however narrow the terminal.
const NAME_MIN: usize = 12;

#[derive(Clone, Debug, Default)]
pub struct Table {
    pub heads: Vec<&'static str>,
    pub rows: Vec<Row>,
}

#[derive(Clone, Debug, Default)]
pub struct Row {
    pub cells: Vec<String>,
    /// The cell in colour, and which.
    pub shade: Option<(usize, &'static str)>,
    /// Behind the last cell, as far as the line goes.
    pub tail: String,
    pub notes: Vec<String>,
}

impl Table {
    /// Columns as wide as their longest cell. What is numbers stands at the right.
    pub fn render(&self, width: usize, colour: bool) -> String {
        let width = width.clamp(40, 200);
        let mut cells: Vec<Vec<String>> =
            self.rows.iter().map(|row| row.cells.iter().map(|c| shortened(c, CELL_MAX)).collect()).collect();
        let longest = |cells: &[Vec<String>], at: usize| {
            let of_cells = cells.iter().filter_map(|row| row.get(at)).map(|cell| cell.chars().count());
            of_cells.max().unwrap_or(0).max(self.heads[at].len())
        };
        let mut widths: Vec<usize> = (0..self.heads.len()).map(|at| longest(&cells, at)).collect();
        // Names give way where the line would be too long.
        let whole = widths.iter().sum::<usize>() + GAP * widths.len().saturating_sub(1);
        if let (true, Some(first)) = (whole > width, widths.first_mut()) {
            let most = first.saturating_sub(whole - width).max(NAME_MIN);
            cells.iter_mut().filter_map(|row| row.first_mut()).for_each(|name| *name = shortened(name, most));
            *first = longest(&cells, 0);
        }
        let numbers: Vec<bool> = (0..self.heads.len())
            .map(|at| {
                let digits = |c: &String| c == "-" || c.starts_with(|c: char| c.is_ascii_digit());
                at > 0 && cells.iter().filter_map(|row| row.get(at)).all(digits)
            })
            .collect();
        let line = |cells: &[String], shade: Option<(usize, &str)>| {
            let mut out = String::new();
            for (at, cell) in cells.iter().enumerate().take(widths.len()) {
                let space = " ".repeat(widths[at].saturating_sub(cell.chars().count()));
                let cell = match shade {
                    Some((shaded, shade)) if shaded == at => paint(cell, shade, colour),
                    _ => cell.clone(),
                };
                let (before, after) =
                    if numbers[at] { (space, String::new()) } else { (String::new(), space) };
                out.push_str(&format!("{before}{cell}{after}{}", " ".repeat(GAP)));
            }
            format!("{}\n", out.trim_end())
        };
        let heads: Vec<String> = self.heads.iter().map(|head| (*head).to_owned()).collect();
        let mut out = paint(&line(&heads, None), DIM, colour);
        for (row, cells) in self.rows.iter().zip(&cells) {
            let plain = line(cells, None);
            let plain = plain.trim_end();
            let cells = line(cells, row.shade);
            if row.tail.is_empty() {
                out.push_str(&cells);
            } else {
                let used: usize = widths.iter().map(|width| width + GAP).sum();
                let space = " ".repeat(used.saturating_sub(plain.chars().count()));
                let tail: String = printable(&row.tail, width.saturating_sub(used));
                out.push_str(&format!("{}{space}{tail}\n", cells.trim_end()));
            }
            row.notes.iter().for_each(|note| out.push_str(&wrapped(note, width, INDENT)));
        }
        out
    }
}

/// Of what is too long the middle goes: names of one fleet often begin alike, and end with a number.
fn shortened(text: &str, most: usize) -> String {
    let text: Vec<char> = printable(text, 400).chars().collect();
    if text.len() <= most {
        return text.into_iter().collect();
    }
    let (head, tail) = ((most - 1).div_ceil(2), (most - 1) / 2);
    let ends = text[..head].iter().chain(['\u{2026}'].iter()).chain(&text[text.len() - tail..]);
    ends.collect()
}

pub fn paint(text: &str, shade: &str, colour: bool) -> String {
    match colour {
        true => {
            let (ink, space) = text.split_at(text.trim_end().len());
            format!("\x1b[{shade}m{ink}\x1b[0m{space}")
        }
        false => text.to_owned(),
    }
}

/// A paragraph, indented, its later lines a little more. No line is longer than the width.
pub fn wrapped(text: &str, width: usize, indent: usize) -> String {
    let mut out = " ".repeat(indent);
    let mut column = indent;
    let mut fresh = true;
    for word in printable(text, 2000).split_whitespace() {
        let mut word: Vec<char> = word.chars().collect();
        if !fresh && column + 1 + word.len() > width {
            column = indent + 2;
            out.push_str(&format!("\n{}", " ".repeat(column)));
        } else if !fresh {
            out.push(' ');
            column += 1;
        }
        // What fits on no line is cut where the line ends.
        while column + word.len() > width {
            let rest = word.split_off(width.saturating_sub(column).max(1));
            out.extend(&word);
            column = indent + 2;
            out.push_str(&format!("\n{}", " ".repeat(column)));
            word = rest;
        }
        out.extend(&word);
        column += word.len();
        fresh = false;
    }
    out.push('\n');
    out
}

#[cfg(test)]
mod tests {
    use expect_test::expect;

    use super::*;

    #[test]
    fn long_names_lose_their_middle_and_no_line_is_too_long() {
        let row = |name: &str| Row {
            cells: vec![name.to_owned(), "spoke".into(), "drifting".into(), "12 critical".into()],
            ..Row::default()
        };
        let name = |number: u32| format!("a-node-of-the-far-north-by-the-old-harbour-{number}");
        let table = |names: &[String]| Table {
            heads: vec!["NODE", "ROLE", "STATE", "FINDINGS"],
            rows: names.iter().map(|name| row(name)).collect(),
        };
        expect![[r#"
            NODE           ROLE   STATE        FINDINGS
            a-node…bour-7  spoke  drifting  12 critical
            a-node…our-19  spoke  drifting  12 critical
            oslo           spoke  drifting  12 critical
        "#]]
        .assert_eq(&table(&[name(7), name(19), "oslo".into()]).render(43, false));
        let wide = table(&[name(7), name(19)]).render(200, false);
        assert!(wide.contains("a-node-of-the-fa\u{2026}-old-harbour-19 "), "{wide}");
    }

    #[test]
    fn columns_fit_their_cells_and_notes_their_width() {
        let row = |cells: [&str; 3], notes: &[&str]| Row {
            cells: cells.map(str::to_owned).to_vec(),
            shade: Some((1, RED)),
            tail: String::new(),
            notes: notes.iter().map(|note| (*note).to_owned()).collect(),
        };
        let long = format!("because {} and so on", "x".repeat(50));
        let table = Table {
            heads: vec!["NODE", "STATE", "EXPOSED"],
            rows: vec![
                row(["oslo", "drifting", "12"], &[&long]),
                row(["frankfurt", "fine\x1b[2J", "-"], &[]),
            ],
        };
        expect![[r#"
            NODE       STATE     EXPOSED
            oslo       drifting       12
                because
                  xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx
                  xxxxxxxxxxxxxxxx and so on
            frankfurt  fine�[2J        -
        "#]]
        .assert_eq(&table.render(40, false));
        let coloured = table.render(40, true);
        assert!(
            coloured.contains("\x1b[1;31mdrifting\x1b[0m") && !coloured.contains("\x1b[2J"),
            "{coloured:?}"
        );
    }
}
