//! Samples, what is said of them, and the two ways to say it: a table of 80 columns and JSON.

use std::fmt::Write;

use anyhow::{Result, ensure};
use serde_json::{Value, json};

/// What one part of the run measured.
pub struct Section {
    pub name: &'static str,
    pub title: &'static str,
    pub rows: Vec<Row>,
    pub goals: Vec<Goal>,
    /// What a reader must know to read the rows right.
    pub notes: Vec<String>,
}

pub struct Row {
    pub what: String,
    pub unit: &'static str,
    /// As a person would type it; the rows before it may share it.
    pub command: String,
    pub samples: Samples,
}

/// A number of this run beside what was hoped for. Missing one is no failure of the run.
pub struct Goal {
    pub what: String,
    pub unit: &'static str,
    pub value: f64,
    pub limit: Limit,
}

#[derive(Clone, Copy)]
pub enum Limit {
    AtMost(f64),
    AtLeast(f64),
}

/// At least one number, in order.
pub struct Samples(Vec<f64>);

impl Samples {
    pub fn new(mut values: Vec<f64>) -> Result<Samples> {
        ensure!(!values.is_empty(), "nothing was measured");
        ensure!(values.iter().all(|value| value.is_finite()), "a measurement is not a number");
        values.sort_unstable_by(f64::total_cmp);
        Ok(Samples(values))
    }

    pub fn median(&self) -> f64 {
        let middle = self.0.len() / 2;
        if self.0.len() % 2 == 1 { self.0[middle] } else { (self.0[middle - 1] + self.0[middle]) / 2.0 }
    }

    /// The smallest sample that a share of `share` of all samples does not exceed.
    pub fn quantile(&self, share: f64) -> f64 {
        let rank = (share * self.0.len() as f64).ceil() as usize;
        self.0[rank.clamp(1, self.0.len()) - 1]
    }

    pub fn min(&self) -> f64 {
        self.0[0]
    }

    pub fn max(&self) -> f64 {
        self.0[self.0.len() - 1]
    }

    pub fn count(&self) -> usize {
        self.0.len()
    }

    /// With fewer, the p99 is the maximum under another name.
    fn has_tail(&self) -> bool {
        self.0.len() >= 100
    }
}

impl Row {
    pub fn new(
        what: impl Into<String>,
        unit: &'static str,
        command: impl Into<String>,
        values: Vec<f64>,
    ) -> Result<Row> {
        Ok(Row { what: what.into(), unit, command: command.into(), samples: Samples::new(values)? })
    }
}

impl Goal {
    pub fn at_most(what: impl Into<String>, unit: &'static str, value: f64, limit: f64) -> Goal {
        Goal { what: what.into(), unit, value, limit: Limit::AtMost(limit) }
    }

    pub fn at_least(what: impl Into<String>, unit: &'static str, value: f64, limit: f64) -> Goal {
        Goal { what: what.into(), unit, value, limit: Limit::AtLeast(limit) }
    }

    pub fn met(&self) -> bool {
        match self.limit {
            Limit::AtMost(limit) => self.value <= limit,
            Limit::AtLeast(limit) => self.value >= limit,
        }
    }
}

/// The median of what is left of each pair: neighbours' noise hits both of a pair.
pub fn paired(ours: &[f64], theirs: &[f64]) -> Result<Samples> {
    ensure!(ours.len() == theirs.len(), "{} samples beside {}", ours.len(), theirs.len());
    Samples::new(ours.iter().zip(theirs).map(|(ours, theirs)| ours / theirs).collect())
}

const WIDTH: usize = 80;

impl Section {
    pub fn text(&self) -> String {
        let mut out = format!("\n== {} {}\n", self.title, "=".repeat(WIDTH - 4 - self.title.len()));
        let _ = writeln!(out, "{:>51} {:>17} {:>6} {:>3}", "median", "(min-max)", "p99", "n");
        let mut said = "";
        for row in &self.rows {
            if row.command != said {
                wrapped(&mut out, "  $ ", &row.command);
                said = &row.command;
            }
            let s = &row.samples;
            let (what, median) = (&row.what, format!("{} {}", short(s.median()), row.unit));
            let (range, tail) = if s.count() > 1 {
                (format!("({}-{})", short(s.min()), short(s.max())), s.has_tail().then(|| s.quantile(0.99)))
            } else {
                (String::new(), None)
            };
            let tail = tail.map(short).unwrap_or_default();
            // A long name takes some of the space around its neighbours.
            let name = what.chars().count();
            let gap = 47_usize.saturating_sub(name).max(median.len() + 1);
            let room = 18_usize.saturating_sub((name + gap).saturating_sub(47));
            let _ = writeln!(out, "    {what}{median:>gap$}{range:>room$} {tail:>6} {:>3}", s.count());
        }
        for goal in &self.goals {
            let (sign, limit) = match goal.limit {
                Limit::AtMost(limit) => ("<=", limit),
                Limit::AtLeast(limit) => (">=", limit),
            };
            let mark = if goal.met() { "met   " } else { "MISSED" };
            let unit = if goal.unit.is_empty() { String::new() } else { format!(" {}", goal.unit) };
            let found = format!("{}{unit}", short(goal.value));
            let _ = writeln!(out, "  {mark} {:<46} {found:>10}  {sign} {}{unit}", goal.what, short(limit));
        }
        for note in &self.notes {
            wrapped(&mut out, "  . ", note);
        }
        out
    }

    pub fn json(&self) -> Value {
        let rows: Vec<Value> = self
            .rows
            .iter()
            .map(|row| {
                let s = &row.samples;
                json!({
                    "what": row.what, "unit": row.unit, "command": row.command, "n": s.count(),
                    "median": s.median(), "min": s.min(), "max": s.max(),
                    "p99": s.has_tail().then(|| s.quantile(0.99)),
                })
            })
            .collect();
        let goals: Vec<Value> = self
            .goals
            .iter()
            .map(|goal| {
                let (sign, limit) = match goal.limit {
                    Limit::AtMost(limit) => ("at most", limit),
                    Limit::AtLeast(limit) => ("at least", limit),
                };
                json!({
                    "what": goal.what, "unit": goal.unit, "value": goal.value,
                    "limit": limit, "sense": sign, "met": goal.met(),
                })
            })
            .collect();
        json!({ "name": self.name, "title": self.title, "rows": rows, "goals": goals, "notes": self.notes })
    }
}

/// Three figures that matter, no more.
pub fn short(value: f64) -> String {
    let digits = match value.abs() {
        size if size >= 99.95 || size == 0.0 => 0,
        size if size >= 9.995 => 1,
        size if size >= 0.9995 => 2,
        _ => 3,
    };
    format!("{value:.digits$}")
}

/// Words on lines of at most 80 columns; what follows the first line stands below its text.
fn wrapped(out: &mut String, start: &str, text: &str) {
    let mut line = start.to_string();
    let mut empty = true;
    for word in text.split_whitespace() {
        if !empty && line.chars().count() + 1 + word.chars().count() > WIDTH {
            let _ = writeln!(out, "{line}");
            line = " ".repeat(start.len());
            empty = true;
        }
        if !empty {
            line.push(' ');
        }
        line += word;
        empty = false;
    }
    let _ = writeln!(out, "{line}");
}

#[cfg(test)]
mod tests {
    use super::*;

    fn samples(values: &[f64]) -> Samples {
        Samples::new(values.to_vec()).unwrap()
    }

    #[test]
    fn medians_and_quantiles_are_samples_or_between_two() {
        assert_eq!(samples(&[3.0, 1.0, 2.0]).median(), 2.0);
        assert_eq!(samples(&[4.0, 1.0, 2.0, 3.0]).median(), 2.5);
        let hundred: Vec<f64> = (1..=200).map(f64::from).collect();
        assert_eq!(samples(&hundred).quantile(0.99), 198.0);
        assert_eq!(samples(&hundred).quantile(0.5), 100.0);
        assert_eq!(samples(&[7.0]).quantile(0.99), 7.0);
    }

    #[test]
    fn nothing_measured_is_an_error_and_so_is_no_number() {
        assert!(Samples::new(Vec::new()).is_err());
        assert!(Samples::new(vec![1.0, f64::NAN]).is_err());
        assert!(paired(&[1.0], &[]).is_err());
        assert!(paired(&[1.0], &[0.0]).is_err(), "a division by nothing");
    }

    #[test]
    fn a_goal_is_met_at_its_limit_and_missed_beyond() {
        assert!(Goal::at_most("", "", 5.0, 5.0).met() && !Goal::at_most("", "", 5.1, 5.0).met());
        assert!(Goal::at_least("", "", 5.0, 5.0).met() && !Goal::at_least("", "", 4.9, 5.0).met());
    }

    #[test]
    fn the_table_fits_eighty_columns_and_names_a_missed_goal() {
        let row = Row::new("a".repeat(41), "ms", "word ".repeat(60), vec![12_345.6; 300]).unwrap();
        let goals =
            vec![Goal::at_most("b".repeat(46), "ms", 12_345.6, 3.0), Goal::at_most("c", "", 1.0, 3.0)];
        let section = Section { name: "x", title: "X", rows: vec![row], goals, notes: vec!["n".into()] };
        let text = section.text();
        for line in text.lines() {
            assert!(line.chars().count() <= 80, "{} columns: {line}", line.chars().count());
        }
        assert_eq!(text.matches("MISSED").count(), 1, "{text}");
        assert_eq!(section.json()["goals"][1]["met"], true);
    }
}
