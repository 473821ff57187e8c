//! How often we repair: a token bucket per kind of action, on a monotonic clock. A tool
//! that undoes our repairs can make us slow, and never make us spin.

use std::time::Duration;

use super::ActionKind;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Budget {
    buckets: [Bucket; ActionKind::ALL.len()],
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Bucket {
    burst: u32,
    /// A token comes back this often.
    every: Duration,
    tokens: u32,
    /// When the last token came back; `None` before the first use.
    refilled: Option<Duration>,
    /// Tokens taken in each of the last 60 seconds, by second modulo 60.
    taken: [u32; 60],
    /// The second that `taken` was written for last.
    second: u64,
}

impl Default for Budget {
    /// Rules: 120 at once (one flush after the other, for as long as an operator plays with
    /// them), then one a second. Keepalive: 10, then one in 10 s, which is how often it is read.
    fn default() -> Self {
        Self { buckets: [Bucket::new(120, Duration::from_secs(1)), Bucket::new(10, Duration::from_secs(10))] }
    }
}

impl Budget {
    /// Takes a token if there is one.
    pub fn take(&mut self, kind: ActionKind, now: Duration) -> bool {
        let bucket = &mut self.buckets[index(kind)];
        bucket.refill(now);
        if bucket.tokens == 0 {
            return false;
        }
        bucket.tokens -= 1;
        bucket.forget(now);
        bucket.taken[(now.as_secs() % 60) as usize] += 1;
        true
    }

    /// When the next token comes, if there is none now: when to try again.
    pub fn wait(&self, kind: ActionKind, now: Duration) -> Option<Duration> {
        let mut bucket = self.buckets[index(kind)].clone();
        bucket.refill(now);
        let due = bucket.refilled.unwrap_or(now) + bucket.every;
        (bucket.tokens == 0).then(|| due.saturating_sub(now))
    }

    /// Tokens taken in the last 60 seconds.
    pub fn in_last_minute(&self, kind: ActionKind, now: Duration) -> u32 {
        let mut bucket = self.buckets[index(kind)].clone();
        bucket.forget(now);
        bucket.taken.iter().sum()
    }
}

const fn index(kind: ActionKind) -> usize {
    match kind {
        ActionKind::ApplyTable => 0,
        ActionKind::SetKeepalive => 1,
    }
}

impl Bucket {
    const fn new(burst: u32, every: Duration) -> Self {
        Self { burst, every, tokens: burst, refilled: None, taken: [0; 60], second: 0 }
    }

    fn refill(&mut self, now: Duration) {
        let since = *self.refilled.get_or_insert(now);
        let back = now.saturating_sub(since).as_nanos() / self.every.as_nanos().max(1);
        let back = u32::try_from(back).unwrap_or(u32::MAX);
        if back >= self.burst - self.tokens {
            // Full: time spent full is not saved up.
            self.tokens = self.burst;
            self.refilled = Some(now.max(since));
        } else {
            self.tokens += back;
            self.refilled = Some(since + self.every * back);
        }
    }

    /// Clears the seconds that are more than a minute old.
    fn forget(&mut self, now: Duration) {
        let now_s = now.as_secs();
        let passed = now_s.saturating_sub(self.second).min(60);
        for back in 0..passed {
            self.taken[((now_s - back) % 60) as usize] = 0;
        }
        self.second = self.second.max(now_s);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: fn(u64) -> Duration = Duration::from_secs;

    /// How many of `tries` at this moment get a token.
    fn taken(budget: &mut Budget, kind: ActionKind, tries: u32, now: Duration) -> u32 {
        (0..tries).filter(|_| budget.take(kind, now)).count() as u32
    }

    #[test]
    fn a_burst_is_allowed_and_then_one_a_second() {
        let mut budget = Budget::default();
        let kind = ActionKind::ApplyTable;
        assert_eq!(taken(&mut budget, kind, 500, S(1000)), 120);
        assert_eq!(budget.wait(kind, S(1000)), Some(S(1)));
        assert_eq!(taken(&mut budget, kind, 5, Duration::from_millis(1_000_999)), 0);
        assert_eq!(taken(&mut budget, kind, 5, S(1001)), 1);
        assert_eq!(taken(&mut budget, kind, 5, S(1004)), 3);
        assert_eq!(taken(&mut budget, kind, 500, S(5000)), 120, "an idle hour saves up a burst, no more");
        assert_eq!(budget.wait(ActionKind::SetKeepalive, S(5000)), None);
        assert_eq!(taken(&mut budget, ActionKind::SetKeepalive, 50, S(5000)), 10, "kinds do not share");
        assert_eq!(taken(&mut budget, ActionKind::SetKeepalive, 50, S(5009)), 0);
        assert_eq!(taken(&mut budget, ActionKind::SetKeepalive, 50, S(5010)), 1);
    }

    #[test]
    fn fractions_of_a_second_are_not_lost_between_tries() {
        let mut budget = Budget::default();
        taken(&mut budget, ActionKind::ApplyTable, 120, S(10));
        let half = Duration::from_millis(10_600);
        assert_eq!(taken(&mut budget, ActionKind::ApplyTable, 1, half), 0);
        assert_eq!(taken(&mut budget, ActionKind::ApplyTable, 1, S(11)), 1);
    }

    #[test]
    fn a_minute_is_remembered_and_no_more() {
        let mut budget = Budget::default();
        let kind = ActionKind::ApplyTable;
        taken(&mut budget, kind, 3, S(100));
        taken(&mut budget, kind, 2, S(130));
        assert_eq!(budget.in_last_minute(kind, S(159)), 5);
        assert_eq!(budget.in_last_minute(kind, S(160)), 2);
        assert_eq!(budget.in_last_minute(kind, S(189)), 2);
        assert_eq!(budget.in_last_minute(kind, S(190)), 0);
        assert_eq!(budget.in_last_minute(kind, S(100_000)), 0);
    }

    #[test]
    fn a_clock_that_goes_back_gives_nothing_and_breaks_nothing() {
        let mut budget = Budget::default();
        assert_eq!(taken(&mut budget, ActionKind::ApplyTable, 500, S(1000)), 120);
        assert_eq!(taken(&mut budget, ActionKind::ApplyTable, 500, S(10)), 0);
        assert_eq!(taken(&mut budget, ActionKind::ApplyTable, 500, S(1001)), 1);
    }
}
