//! The busiest of very many, in bounded memory (space saving: Metwally et al., 2005): who is
//! busier than a share of all can't be missed, and counts err on the high side only.

use std::collections::HashMap;
use std::hash::Hash;

#[derive(Clone, Debug)]
pub struct Tally<K, T> {
    most: usize,
    rows: HashMap<K, (Count, T)>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Count {
    pub times: u64,
    /// Between the last two turns.
    pub per_second: f64,
    recent: u64,
    /// What it took over from whom it pushed out: so much too high it may be.
    taken_over: u64,
}

impl<K: Copy + Eq + Hash + Ord, T: Default> Tally<K, T> {
    pub fn new(most: usize) -> Self {
        Self { most, rows: HashMap::with_capacity(most) }
    }

    /// Counts one more, and gives what is kept about it.
    pub fn add(&mut self, key: K) -> &mut T {
        let mut taken_over = 0;
        if self.rows.len() >= self.most && !self.rows.contains_key(&key) {
            let least = self.rows.iter().min_by_key(|(key, (count, _))| (count.times, **key));
            if let Some((key, times)) = least.map(|(key, (count, _))| (*key, count.times)) {
                self.rows.remove(&key);
                taken_over = times;
            }
        }
        let new = Count { times: taken_over, taken_over, ..Count::default() };
        let (count, value) = self.rows.entry(key).or_insert_with(|| (new, T::default()));
        count.times += 1;
        count.recent += 1;
        value
    }

    /// Rates from now on are of what was counted since the last turn.
    pub fn turn(&mut self, seconds: f64) {
        for (count, _) in self.rows.values_mut() {
            count.per_second = if seconds > 0.0 { count.recent as f64 / seconds } else { 0.0 };
            count.recent = 0;
        }
    }

    /// By what is certain, so that nobody is called busy for what others did.
    pub fn busiest(&self, most: usize) -> Vec<(&K, Count, &T)> {
        let certain = |count: &Count| Count { times: count.times - count.taken_over, ..*count };
        let mut all: Vec<_> =
            self.rows.iter().map(|(key, (count, value))| (key, certain(count), value)).collect();
        all.sort_by_key(|(key, count, _)| (std::cmp::Reverse(count.times), **key));
        all.truncate(most);
        all
    }
}
