//! Mistakes in a policy file, and how they are shown: what is wrong, where, and what to
//! write instead. The file's text is foreign input here: whatever is echoed is bounded,
//! printable, and free of what looks like a credential.

use std::fmt;
use std::ops::Range;

use serde::Serialize;

use crate::terms::printable;

/// How many mistakes one report shows. A file with more is not a policy.
pub const MISTAKES_MAX: usize = 100;
const WIDTH: usize = 80;

/// Everything that is wrong with one file, in the order of the file. Prints ready for a
/// terminal of 80 columns, without a trailing newline.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Mistakes {
    pub file: String,
    /// At most [`MISTAKES_MAX`]; at least one.
    pub list: Vec<Mistake>,
    /// How many more there are.
    pub more: usize,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Mistake {
    /// From 1; columns count characters.
    pub line: u32,
    pub column: u32,
    /// What is wrong.
    pub what: String,
    /// What to write instead. May be empty.
    pub help: String,
    /// The offending line as far as it is shown, and where in it the carets go.
    #[serde(skip)]
    shown: Option<Shown>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Shown {
    text: String,
    caret: usize,
    carets: usize,
}

impl std::error::Error for Mistakes {}

impl fmt::Display for Mistakes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for mistake in &self.list {
            mistake.render(&self.file, "error", f)?;
            f.write_str("\n")?;
        }
        let file = printable(&self.file, 200);
        match self.list.len() + self.more {
            1 => write!(f, "{file}: 1 mistake"),
            n if self.more == 0 => write!(f, "{file}: {n} mistakes"),
            n => write!(f, "{file}: {n} mistakes, the first {} shown", self.list.len()),
        }
    }
}

impl Mistake {
    /// As rustc shows an error; `level` is its first word ("error", "note").
    pub fn render(&self, file: &str, level: &str, f: &mut dyn fmt::Write) -> fmt::Result {
        let gutter = self.line.to_string().len();
        wrapped(&format!("{level}: "), level.len() + 2, &self.what, f)?;
        let (line, column) = (self.line, self.column);
        writeln!(f, "{:gutter$}--> {}:{line}:{column}", "", printable(file, 200))?;
        if let Some(Shown { text, caret, carets }) = &self.shown {
            writeln!(f, "{:gutter$} |", "")?;
            writeln!(f, "{line} | {text}")?;
            writeln!(f, "{:gutter$} | {:caret$}{}", "", "", "^".repeat(*carets))?;
        }
        if !self.help.is_empty() {
            wrapped(&format!("{:gutter$} = help: ", ""), gutter + 9, &self.help, f)?;
        }
        Ok(())
    }
}

/// The text of a policy file, able to say where a byte is.
pub(crate) struct Source<'t> {
    text: &'t str,
    /// Byte offsets at which lines start.
    starts: Vec<usize>,
}

impl<'t> Source<'t> {
    pub(crate) fn new(text: &'t str) -> Self {
        let starts = std::iter::once(0).chain(text.match_indices('\n').map(|(at, _)| at + 1)).collect();
        Self { text, starts }
    }

    pub(crate) fn text(&self) -> &'t str {
        self.text
    }

    /// Index of the line that holds a byte.
    pub(crate) fn line(&self, offset: usize) -> usize {
        self.starts.partition_point(|start| *start <= offset).saturating_sub(1)
    }

    /// Line and column from 1; columns count characters.
    pub(crate) fn place(&self, offset: usize) -> (u32, u32) {
        let line = self.line(offset);
        let column = self.count(self.starts[line], offset) + 1;
        (u32::try_from(line + 1).unwrap_or(u32::MAX), u32::try_from(column).unwrap_or(u32::MAX))
    }

    /// `at` is a range of bytes; an empty one at 0 stands for the file as a whole.
    pub(crate) fn mistake(&self, at: Range<usize>, what: &str, help: &str) -> Mistake {
        let (line, column) = self.place(at.start);
        let shown = if at == (0..0) { None } else { Some(self.shown(at)) };
        Mistake { line, column, what: printable(&without_keys(what), 600), help: printable(help, 600), shown }
    }

    fn count(&self, from: usize, to: usize) -> usize {
        let to = to.min(self.text.len());
        self.text.get(from..to).map_or(to.saturating_sub(from), |t| t.chars().count())
    }

    fn shown(&self, at: Range<usize>) -> Shown {
        let index = self.line(at.start);
        let start = self.starts[index];
        let end = self.starts.get(index + 1).map_or(self.text.len(), |next| next - 1);
        let line = self.text.get(start..end).unwrap_or_default();
        let caret = self.count(start, at.start);
        let carets = self.count(at.start, at.end.min(end).max(at.start)).max(1);
        // A window on a long line: one line may be the whole file.
        let room = WIDTH - 3 - (index + 1).to_string().len();
        let from = if caret + 1 > room { caret - room / 3 } else { 0 };
        let text: String = masked(line).into_iter().skip(from).take(room).collect();
        let caret = caret - from;
        Shown { text: printable(text.trim_end(), room), caret, carets: carets.min(room - caret).max(1) }
    }
}

/// A line without what may be a credential in it, character for character, so that the
/// carets stay where they belong: the rest of a URL, the value of a key that is named
/// like a secret.
fn masked(line: &str) -> Vec<char> {
    // A `public_key` is only shown when it is none: it may be the private one.
    const SECRETIVE: [&str; 8] =
        ["private", "preshared", "secret", "token", "passw", "kuma_url", "ntfy_url", "public_key"];
    let mut chars: Vec<char> = without_keys(line).chars().map(|c| if c == '\t' { ' ' } else { c }).collect();
    let lower = line.to_ascii_lowercase();
    let mask = |chars: &mut Vec<char>, from: usize| {
        for c in chars.iter_mut().skip(from).filter(|c| !" \"'[],=".contains(**c)) {
            *c = '*';
        }
    };
    if let Some((at, _)) = lower.match_indices("://").next() {
        mask(&mut chars, line[..at + 3].chars().count());
    }
    if let Some(at) = lower.find("tskey-") {
        mask(&mut chars, lower[..at].chars().count());
    }
    // A path to a secret is not one.
    for word in SECRETIVE {
        let Some(at) = lower.find(word) else { continue };
        let Some(equals) = lower[at..].find('=') else { continue };
        if !lower[at..at + equals].contains("_file") {
            mask(&mut chars, line[..at + equals].chars().count());
        }
    }
    chars
}

/// A text without what can only be a key, whatever it is called, character for character.
fn without_keys(text: &str) -> String {
    let is_digit = |c: char| c.is_ascii_alphanumeric() || c == '+' || c == '/';
    let chars: Vec<char> = text.chars().collect();
    let runs = chars.chunk_by(|a, b| is_digit(*a) == is_digit(*b));
    let run = |run: &[char]| match run {
        [first, ..] if run.len() >= 40 && is_digit(*first) => "*".repeat(run.len()),
        _ => run.iter().collect(),
    };
    runs.map(run).collect()
}

/// `text` after `head`, broken between words at 80 columns and indented under itself.
pub fn wrapped(head: &str, indent: usize, text: &str, f: &mut dyn fmt::Write) -> fmt::Result {
    f.write_str(head)?;
    let mut column = indent;
    for (i, word) in text.split(' ').enumerate() {
        let length = word.chars().count();
        if i > 0 && column + 1 + length > WIDTH {
            write!(f, "\n{:indent$}", "")?;
            column = indent;
        } else if i > 0 {
            f.write_str(" ")?;
            column += 1;
        }
        f.write_str(word)?;
        column += length;
    }
    f.write_str("\n")
}
