//! How often we look. A look that somebody asks for once is had at once; looks that are
//! asked for all the time cost at most a twentieth of a core.

use std::time::Duration;

use tokio::time::Instant;

/// Work is paid for with this many times as much rest.
const REST: u32 = 20;
/// Work that may be had on credit.
const CREDIT: Duration = Duration::from_millis(500);
const REST_MIN: Duration = Duration::from_millis(50);
const REST_MAX: Duration = Duration::from_secs(5);

#[derive(Clone, Copy, Debug)]
pub struct Pace {
    owed: Duration,
    at: Instant,
}

impl Pace {
    pub fn new(now: Instant) -> Self {
        Self { owed: Duration::ZERO, at: now }
    }

    /// Counts work that has just been done; says until when to rest.
    pub fn pay(&mut self, took: Duration, now: Instant) -> Instant {
        let rested = now.saturating_duration_since(self.at) / REST;
        // More than the longest rest is never owed, or a storm would be felt long after it.
        self.owed = (self.owed.saturating_sub(rested) + took).min(CREDIT + REST_MAX / REST);
        self.at = now;
        self.calm_at().max(now + REST_MIN)
    }

    /// From when on there is credit again, if nobody does any more work: [`REST_MAX`] after the last at most.
    pub fn calm_at(&self) -> Instant {
        self.at + self.owed.saturating_sub(CREDIT) * REST
    }

    /// There is no credit left.
    pub fn is_spent(&self, now: Instant) -> bool {
        now < self.calm_at()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: fn(u64) -> Duration = Duration::from_millis;

    #[test]
    fn a_look_now_and_then_never_waits_and_a_storm_costs_a_twentieth() {
        let mut now = Instant::now();
        let mut pace = Pace::new(now);
        for _ in 0..20 {
            assert_eq!(pace.pay(MS(100), now) - now, REST_MIN);
            now += Duration::from_secs(2);
        }
        let (begun, mut work) = (now, Duration::ZERO);
        while now - begun < Duration::from_secs(600) {
            now += MS(100);
            work += MS(100);
            now = pace.pay(MS(100), now);
        }
        assert!(work > Duration::from_secs(25) && work < Duration::from_secs(32), "{work:?} in ten minutes");
    }

    #[test]
    fn a_storm_is_over_soon_after_its_end() {
        let mut now = Instant::now();
        let mut pace = Pace::new(now);
        for _ in 0..100 {
            now += Duration::from_secs(2);
            assert!(pace.pay(Duration::from_secs(2), now) - now <= REST_MAX);
        }
        assert!(pace.is_spent(now));
        now += Duration::from_secs(15);
        assert_eq!(pace.pay(MS(10), now) - now, REST_MIN);
        assert!(!pace.is_spent(now));
    }

    #[test]
    fn who_looks_slowly_rests_and_is_calm_after_it() {
        let mut now = Instant::now();
        let mut pace = Pace::new(now);
        for _ in 0..100 {
            now += Duration::from_secs(8);
            let rested = pace.pay(Duration::from_secs(2), now);
            assert!(pace.calm_at() == rested && rested <= now + REST_MAX);
            assert!(pace.is_spent(now) || now == rested);
            assert!(!pace.is_spent(rested), "nothing else would ever be begun between the looks");
        }
        assert!(pace.is_spent(now));
    }
}
