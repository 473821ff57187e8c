//! Prometheus text as a node serves it. The node may be anybody by now, so the text is
//! bounded in every direction, and one wrong line makes all of it worthless.

use std::collections::BTreeMap;
use std::fmt;

use crate::terms::printable;

/// More than any node of ours has; what is not ours is passed over without being kept.
const SAMPLES_MAX: usize = 1024;
const LABELS_MAX: usize = 16;
const LABEL_CHARS_MAX: usize = 128;
const PREFIX: &str = "spokeguard_";

/// The samples of ours that a text has, by name without the prefix.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Exposition(Vec<Sample>);

#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    name: String,
    labels: BTreeMap<String, String>,
    pub value: f64,
}

/// Why a text is none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Garbage {
    pub line: usize,
    pub what: &'static str,
}

impl fmt::Display for Garbage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "line {} of its metrics {}", self.line, self.what)
    }
}

impl Exposition {
    pub fn parse(text: &str) -> Result<Self, Garbage> {
        let mut samples = Vec::new();
        for (at, line) in text.lines().enumerate() {
            let garbage = |what| Garbage { line: at + 1, what };
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let sample = sample(line).map_err(garbage)?;
            if let Some(name) = sample.name.strip_prefix(PREFIX) {
                if samples.len() == SAMPLES_MAX {
                    return Err(garbage("is one sample too many"));
                }
                samples.push(Sample { name: name.to_owned(), ..sample });
            }
        }
        Ok(Self(samples))
    }

    /// The samples of a name.
    pub fn of(&self, name: &str) -> impl Iterator<Item = &Sample> {
        self.0.iter().filter(move |sample| sample.name == name)
    }

    /// The value of a name that has one sample.
    pub fn one(&self, name: &str) -> Option<f64> {
        self.of(name).next().map(|sample| sample.value)
    }

    /// The sum of whatever there is, in whole numbers; `None` where there is nothing.
    pub fn sum(&self, name: &str, labels: &[(&str, &str)]) -> Option<u64> {
        let matching = self.of(name).filter(|s| labels.iter().all(|(key, value)| s.label(key) == *value));
        matching.map(|sample| sample.count()).reduce(u64::saturating_add)
    }
}

impl Sample {
    /// Harmless text; empty where there is no such label.
    pub fn label(&self, key: &str) -> &str {
        self.labels.get(key).map_or("", String::as_str)
    }

    /// A whole number of something, never below 0.
    pub fn count(&self) -> u64 {
        count(self.value)
    }
}

/// As a number of things: not a number is 0, and too much is the most.
pub fn count(value: f64) -> u64 {
    value.max(0.0) as u64
}

/// `name{label="value",..} number [timestamp]`
fn sample(line: &str) -> Result<Sample, &'static str> {
    let end =
        line.find(|c: char| !(c.is_ascii_alphanumeric() || matches!(c, '_' | ':'))).unwrap_or(line.len());
    let (name, mut rest) = line.split_at(end);
    if name.is_empty() || name.starts_with(|c: char| c.is_ascii_digit()) {
        return Err("is no sample");
    }
    let mut labels = BTreeMap::new();
    if let Some(inside) = rest.strip_prefix('{') {
        rest = inside;
        loop {
            rest = rest.trim_start_matches([' ', ',']);
            if let Some(after) = rest.strip_prefix('}') {
                rest = after;
                break;
            }
            let (key, after) = rest.split_once("=\"").ok_or("has a label without a value")?;
            let (value, after) = quoted(after).ok_or("has a label that does not end")?;
            if labels.len() == LABELS_MAX {
                return Err("has too many labels");
            }
            labels.insert(printable(key.trim(), LABEL_CHARS_MAX), value);
            rest = after;
        }
    }
    let mut words = rest.split_ascii_whitespace();
    let value = words.next().and_then(|word| word.parse::<f64>().ok()).ok_or("has no number")?;
    let timestamp = words.next().is_none_or(|word| word.parse::<f64>().is_ok());
    if !timestamp || words.next().is_some() {
        return Err("goes on after its number");
    }
    Ok(Sample { name: name.to_owned(), labels, value })
}

/// A label's value up to its closing quote, made harmless, and what follows the quote.
fn quoted(text: &str) -> Option<(String, &str)> {
    let mut value = String::new();
    let mut kept = 0;
    let mut chars = text.char_indices();
    while let Some((at, c)) = chars.next() {
        let c = match c {
            '"' => return Some((printable(&value, LABEL_CHARS_MAX), &text[at + 1..])),
            '\\' => match chars.next()?.1 {
                'n' => '\n',
                other => other,
            },
            other => other,
        };
        if kept < LABEL_CHARS_MAX {
            value.push(c);
            kept += 1;
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_of_ours_are_read_and_others_passed_over() {
        let text = "# HELP x y\n# TYPE x gauge\nup 1\ngo_info{version=\"go1\"} 1\n\
                    spokeguard_verdict 2\nspokeguard_findings{code=\"ssh-bind\", severity=\"high\",} 3 1700000000\n\
                    spokeguard_wireguard_handshake_age_seconds{peer=\"hub\"} +Inf\n";
        let read = Exposition::parse(text).unwrap();
        assert_eq!(read.0.len(), 3);
        assert_eq!(read.one("verdict"), Some(2.0));
        assert_eq!(read.one("up"), None);
        let finding = read.of("findings").next().unwrap();
        assert_eq!(
            (finding.label("code"), finding.label("severity"), finding.count()),
            ("ssh-bind", "high", 3)
        );
        assert_eq!(finding.label("facet"), "");
        assert_eq!(read.one("wireguard_handshake_age_seconds"), Some(f64::INFINITY));
        assert_eq!(read.sum("findings", &[("severity", "high")]), Some(3));
        assert_eq!(read.sum("findings", &[("severity", "low")]), None, "nothing is not 0");
    }

    #[test]
    fn labels_are_made_harmless() {
        let text = "spokeguard_findings{code=\"\\\\\\\"a\\nb\x1b[2J\u{202e}<script>\"} 1";
        let read = Exposition::parse(text).unwrap();
        assert_eq!(read.0[0].label("code"), "\\\"a\u{fffd}b\u{fffd}[2J\u{fffd}<script>");
        let long = format!("spokeguard_x{{a=\"{}\"}} 1", "y".repeat(100_000));
        assert_eq!(Exposition::parse(&long).unwrap().0[0].label("a").len(), LABEL_CHARS_MAX);
    }

    #[test]
    fn one_wrong_line_makes_all_of_it_worthless() {
        for (text, what) in [
            ("<html>", "is no sample"),
            ("spokeguard_verdict", "has no number"),
            ("spokeguard_verdict fine", "has no number"),
            ("spokeguard_verdict 0 1 2", "goes on after its number"),
            ("spokeguard_verdict 0 x", "goes on after its number"),
            ("spokeguard_x{a=\"b} 1", "has a label that does not end"),
            ("spokeguard_x{a=b} 1", "has a label without a value"),
            ("spokeguard_x{a", "has a label without a value"),
            ("spokeguard_x{a=\"\\", "has a label that does not end"),
        ] {
            let all = format!("spokeguard_verdict 0\n{text}\n");
            assert_eq!(Exposition::parse(&all), Err(Garbage { line: 2, what }), "{text}");
        }
        let many = "spokeguard_x 1\n".repeat(SAMPLES_MAX + 1);
        assert_eq!(Exposition::parse(&many).unwrap_err().line, SAMPLES_MAX + 1);
        let labels: String = (0..=LABELS_MAX).map(|n| format!("l{n}=\"\",")).collect();
        assert!(Exposition::parse(&format!("spokeguard_x{{{labels}}} 1")).is_err());
    }

    #[test]
    fn numbers_that_are_none_count_nothing() {
        assert_eq!([f64::NAN, -1.0, 2.9, f64::INFINITY].map(count), [0, 0, 2, u64::MAX]);
    }
}
