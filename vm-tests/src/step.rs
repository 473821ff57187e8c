//! What a machine says while it runs: a line of JSON for each step, and one more at the end.

use serde::{Deserialize, Serialize};

#[derive(Serialize, Deserialize, Debug, Clone, PartialEq)]
#[serde(rename_all = "kebab-case")]
pub enum Line {
    Step {
        name: String,
        ok: bool,
        seconds: f64,
        detail: String,
    },
    /// How many steps there were. Whoever does not say this did not get to the end.
    End {
        steps: usize,
    },
}

/// What came of a machine.
#[derive(Debug, Clone, PartialEq)]
pub enum Verdict {
    Ok,
    Failed(String),
}

/// No step, a step that failed, an end that never came or another number of steps: all of them are failures.
pub fn verdict(lines: &[Line]) -> Verdict {
    let failed = lines.iter().filter(|line| matches!(line, Line::Step { ok: false, .. })).count();
    let steps = lines.iter().filter(|line| matches!(line, Line::Step { .. })).count();
    match lines.last() {
        Some(Line::End { .. }) if failed > 0 => Verdict::Failed(format!("{failed} of {steps} steps failed")),
        Some(Line::End { steps: said }) if *said == steps && steps > 0 => Verdict::Ok,
        Some(Line::End { steps: said }) => {
            Verdict::Failed(format!("{steps} steps arrived, {said} were made"))
        }
        _ => Verdict::Failed(format!("it never got to its end ({steps} steps)")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(ok: bool) -> Line {
        Line::Step { name: "a".into(), ok, seconds: 0.5, detail: "b\nc".into() }
    }

    #[test]
    fn nothing_but_a_full_set_of_good_steps_is_a_pass() {
        assert_eq!(verdict(&[step(true), Line::End { steps: 1 }]), Verdict::Ok);
        for lines in [
            vec![],
            vec![step(true)],
            vec![Line::End { steps: 0 }],
            vec![step(true), Line::End { steps: 2 }],
            vec![step(true), step(false), Line::End { steps: 2 }],
            vec![Line::End { steps: 1 }, step(true)],
        ] {
            assert!(matches!(verdict(&lines), Verdict::Failed(_)), "{lines:?}");
        }
    }

    #[test]
    fn a_line_is_one_line_whatever_is_in_it() {
        let text = serde_json::to_string(&step(true)).unwrap();
        assert!(!text.contains('\n'));
        assert_eq!(serde_json::from_str::<Line>(&text).unwrap(), step(true));
    }
}
