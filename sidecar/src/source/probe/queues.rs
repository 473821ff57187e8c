//! Queues to programs in user space (NFQUEUE): what waits there is not decided yet, and a queue that is full drops
//! real packets as well.

use std::time::{Duration, Instant};

/// Probes at a time, where somebody reads a queue: his socket's buffer holds some hundred.
pub const CHUNK: usize = 32;
/// How long a reader may take for a chunk. What he has not decided by then counts as dropped, as it is to nmap.
const PATIENCE: Duration = Duration::from_millis(500);
/// After so many chunks that he left lying, nobody waits for him any more.
const STUCK_MAX: u32 = 4;

/// The queues of this network namespace.
#[derive(Default)]
pub struct Queues {
    stuck: u32,
}

impl Queues {
    /// `None`: no program reads any.
    pub fn open() -> Option<Self> {
        waiting().map(|_| Self::default())
    }

    /// Waits until all that was queued is decided.
    pub fn drain(&mut self) {
        if self.stuck >= STUCK_MAX {
            return;
        }
        let deadline = Instant::now() + PATIENCE;
        while waiting().is_some_and(|packets| packets > 0) {
            if Instant::now() >= deadline {
                self.stuck += 1;
                return;
            }
            std::thread::sleep(Duration::from_micros(100));
        }
    }
}

/// Packets in all queues; `None`: there are none.
fn waiting() -> Option<u64> {
    total(&std::fs::read_to_string("/proc/thread-self/net/netfilter/nfnetlink_queue").ok()?)
}

/// A line for each queue: its number, its reader, how many packets wait, and more.
fn total(text: &str) -> Option<u64> {
    let each = text.lines().filter_map(|line| line.split_whitespace().nth(2)?.parse::<u64>().ok());
    each.reduce(u64::saturating_add)
}

#[cfg(test)]
mod tests {
    use super::total;

    #[test]
    fn what_waits_is_the_sum_over_all_queues() {
        assert_eq!(total(""), None);
        let text = "    7  91823     3 2 65535     0     0       12  1\n    8   4711     0 2 65535     0     0        0  1\n";
        assert_eq!(total(text), Some(3));
        assert_eq!(total("nonsense\n1 2\n"), None);
    }
}
