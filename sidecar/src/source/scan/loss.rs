//! What gets lost on the way, and what a scan misses by that.

/// Questions there and answers back that a scan could follow.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Loss {
    pub asked: u64,
    /// How many of them got no answer, or only when asked again.
    pub lost: u64,
    /// Ports that answered, whenever they did.
    pub answered: u64,
}

/// How many open ports of a host a scan may expect to miss on a path that loses packets.
const MISSED_MAX: f64 = 0.0001;
/// A silent port that is more likely than this one whose packets were lost is not called filtered.
const DOUBT: f64 = 0.01;

impl Loss {
    /// From 0 to 1.
    pub fn share(self) -> f64 {
        self.lost as f64 / (self.asked.max(1) as f64)
    }

    /// Few were counted: the path may well be worse than it looked.
    fn feared(self) -> f64 {
        let lost = self.lost as f64;
        ((lost + lost.sqrt() + 1.0) / (self.asked as f64 + 1.0)).clamp(0.02, 0.9)
    }

    /// How many ports that answer were not heard in so many passes, if as many answer as did so far.
    fn missed(self, passes: u32) -> f64 {
        let each = self.feared().powi(i32::try_from(passes).unwrap_or(i32::MAX));
        self.answered.max(10) as f64 * each
    }

    /// Whether silence after so many passes may still be loss.
    pub fn may_miss(self, passes: u32) -> bool {
        self.missed(passes) > MISSED_MAX
    }

    /// Whether that is so likely that those who stayed silent can't be called filtered.
    pub fn leaves_doubt(self, passes: u32, silent: usize) -> bool {
        self.missed(passes) > silent as f64 * DOUBT
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn silence_counts_after_more_passes_where_more_gets_lost() {
        let passes = |lost, asked, answered| {
            let loss = Loss { asked, lost, answered };
            (1..=40).find(|passes| !loss.may_miss(*passes))
        };
        // Hardly anything, a tenth, a third, half: of a host that closes all ports, then of one that drops.
        let all = [650, 6_500, 21_600, 32_700].map(|lost| passes(lost, 65_535, 65_535));
        assert_eq!(all, [Some(6), Some(9), Some(19), Some(30)]);
        let guarded = [2, 20, 66, 100].map(|lost| passes(lost, 200, 7));
        assert_eq!(guarded, [Some(4), Some(6), Some(12), Some(20)]);
        // Three ports of which one had to be asked twice say little yet.
        assert_eq!(passes(1, 4, 3), Some(23));
        assert_eq!(passes(1, 40, 3), Some(5));
    }

    #[test]
    fn a_few_silent_ports_of_many_that_answer_are_doubtful_on_a_bad_path() {
        let bad = Loss { asked: 130_000, lost: 65_000, answered: 65_000 };
        assert!(bad.leaves_doubt(10, 200) && !bad.leaves_doubt(30, 200));
        // Two open ports, all others silent: that silence is the rules' doing.
        let guarded = Loss { asked: 200, lost: 100, answered: 2 };
        assert!(guarded.may_miss(10) && !guarded.leaves_doubt(10, 65_533));
        assert!((guarded.share() - 0.5).abs() < 1e-9);
        assert_eq!(Loss::default().share(), 0.0);
    }
}
