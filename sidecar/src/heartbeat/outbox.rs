//! Notices that wait to be sent: in order, bounded, no faster than the server takes them, and
//! marked where they had to wait long.

use std::collections::VecDeque;
use std::time::Duration;

use super::{Notice, Outcome, Reply};

/// The oldest makes room, and is counted.
pub const QUEUE_MAX: usize = 256;
/// Sent by one process.
pub const BATCH_MAX: usize = 8;
/// ntfy takes 60 at once and then one in 5 s; others may share our address.
const BURST: u32 = 30;
const REFILL: Duration = Duration::from_secs(5);
const PAUSE: Duration = Duration::from_secs(5);
const PAUSE_MAX: Duration = Duration::from_secs(60);
/// Where the server asks for more patience than this, it is asked again anyway.
const PATIENCE_MAX: Duration = Duration::from_secs(600);

/// All times are by one clock that nobody sets.
#[derive(Clone, Debug)]
pub struct Outbox {
    queue: VecDeque<Waiting>,
    dropped: u64,
    /// So many of the first are on their way.
    sending: usize,
    tokens: u32,
    filled: Duration,
    rest_until: Duration,
    pause: Duration,
}

#[derive(Clone, Debug)]
struct Waiting {
    notice: Notice,
    since: Duration,
    /// How long it had waited before this process, if it is older.
    before: Option<Duration>,
}

impl Waiting {
    /// If it waited longer than `late`, or over a restart.
    fn late(&self, now: Duration, late: Duration) -> Option<Duration> {
        let waited = now.saturating_sub(self.since);
        match self.before {
            Some(before) => Some(before.saturating_add(waited)),
            None => Some(waited).filter(|waited| *waited > late),
        }
    }
}

impl Default for Outbox {
    fn default() -> Self {
        Self {
            queue: VecDeque::new(),
            dropped: 0,
            sending: 0,
            tokens: BURST,
            filled: Duration::ZERO,
            rest_until: Duration::ZERO,
            pause: PAUSE,
        }
    }
}

impl Outbox {
    pub fn push(&mut self, notice: Notice, now: Duration) {
        self.add(Waiting { notice, since: now, before: None });
    }

    /// One that an earlier process left, which is late whenever it goes.
    pub fn restore(&mut self, notice: Notice, waited: Duration, now: Duration) {
        self.add(Waiting { notice, since: now, before: Some(waited) });
    }

    fn add(&mut self, waiting: Waiting) {
        if self.queue.len() >= QUEUE_MAX {
            // Those on their way are as good as gone already.
            self.queue.remove(self.sending);
            self.dropped += 1;
        }
        self.queue.push_back(waiting);
    }

    /// In their order, those on their way included.
    pub fn all(&self) -> impl Iterator<Item = &Notice> {
        self.queue.iter().map(|waiting| &waiting.notice)
    }

    pub fn waiting(&self) -> usize {
        self.queue.len()
    }

    pub fn dropped(&self) -> u64 {
        self.dropped
    }

    /// When there is something to send. `None`: nothing waits, or some are on their way.
    pub fn due(&self) -> Option<Duration> {
        let token = if self.tokens > 0 { Duration::ZERO } else { self.filled + REFILL };
        (self.sending == 0 && !self.queue.is_empty()).then(|| self.rest_until.max(token))
    }

    /// The next ones, and how late each is, if it waited longer than `late` or over a restart. Until [`Self::told`]
    /// they are on their way.
    pub fn take(&mut self, now: Duration, late: Duration) -> Vec<(Notice, Option<Duration>)> {
        let gained = now.saturating_sub(self.filled).as_secs() / REFILL.as_secs();
        if gained > 0 {
            self.tokens = self.tokens.saturating_add(u32::try_from(gained).unwrap_or(u32::MAX)).min(BURST);
            self.filled = now;
        }
        if self.due().is_none_or(|due| due > now) {
            return Vec::new();
        }
        self.sending = self.queue.len().min(BATCH_MAX).min(self.tokens as usize);
        self.tokens -= self.sending as u32;
        let first = self.queue.iter().take(self.sending);
        first.map(|waiting| (waiting.notice.clone(), waiting.late(now, late))).collect()
    }

    /// What became of those on their way, in order; what has no reply was not tried.
    pub fn told(&mut self, replies: &[Reply], now: Duration) {
        let on_their_way = std::mem::take(&mut self.sending);
        for reply in replies.iter().take(on_their_way) {
            match reply {
                Reply::Accepted => self.pause = PAUSE,
                // The server is fine, and this one will never do.
                Reply::Status(400 | 413 | 414 | 422) => self.dropped += 1,
                reply => return self.rest(*reply, now),
            }
            self.queue.pop_front();
        }
        if replies.len() < on_their_way {
            self.rest(Reply::Broken, now);
        }
    }

    fn rest(&mut self, reply: Reply, now: Duration) {
        let asked = match reply {
            Reply::TooMany(seconds) => {
                seconds.map_or(PAUSE_MAX, |seconds| Duration::from_secs(seconds.into()))
            }
            _ => Duration::ZERO,
        };
        // A server that refuses us is asked no more often than one that is away.
        let pause = if reply.outcome() == Outcome::Refused { PAUSE_MAX.max(self.pause) } else { self.pause };
        self.rest_until = now + asked.min(PATIENCE_MAX).max(if asked.is_zero() { pause } else { PAUSE });
        self.pause = (self.pause * 2).min(PAUSE_MAX);
    }
}

#[cfg(test)]
mod tests {
    use super::super::NoticeKind;
    use super::super::notice::tests::notice;
    use super::*;

    const LATE: Duration = Duration::from_secs(60);

    fn numbered(n: usize) -> Notice {
        notice(NoticeKind::Appeared, &n.to_string())
    }

    fn at(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    /// Sends all that can be sent from second to second; the server says `reply`.
    fn sent(
        outbox: &mut Outbox,
        seconds: std::ops::Range<u64>,
        reply: impl Fn(u64) -> Reply,
    ) -> Vec<(u64, String, bool)> {
        let mut out = Vec::new();
        for second in seconds {
            for _ in 0..100 {
                if outbox.due().is_none_or(|due| due > at(second)) {
                    break;
                }
                let batch = outbox.take(at(second), LATE);
                assert!(batch.len() <= BATCH_MAX && outbox.due().is_none());
                if batch.is_empty() {
                    break;
                }
                let replies: Vec<Reply> = batch.iter().map(|_| reply(second)).collect();
                out.extend(
                    batch
                        .into_iter()
                        .filter(|_| reply(second) == Reply::Accepted)
                        .map(|(n, late)| (second, n.subject, late.is_some())),
                );
                outbox.told(&replies, at(second));
            }
        }
        out
    }

    #[test]
    fn after_an_outage_all_come_in_order_and_marked_late() {
        let mut outbox = Outbox::default();
        for n in 0..20 {
            outbox.push(numbered(n), at(0));
        }
        let away = |second| if second < 300 { Reply::Unreachable } else { Reply::Accepted };
        let sent = sent(&mut outbox, 0..400, away);
        let order: Vec<String> = sent.iter().map(|(_, subject, _)| subject.clone()).collect();
        assert_eq!(order, (0..20).map(|n| n.to_string()).collect::<Vec<_>>());
        assert!(sent.iter().all(|(second, _, late)| *late && (300..=360).contains(second)), "{sent:?}");
        assert_eq!((outbox.waiting(), outbox.dropped()), (0, 0));
        // Back in peace, a new one goes at once and is not late.
        outbox.push(numbered(99), at(500));
        assert_eq!(self::sent(&mut outbox, 500..501, away), [(500, "99".into(), false)]);
    }

    #[test]
    fn the_queue_is_bounded_and_what_it_lost_is_counted() {
        let mut outbox = Outbox::default();
        for n in 0..1000 {
            outbox.push(numbered(n), at(0));
        }
        assert_eq!((outbox.waiting(), outbox.dropped()), (QUEUE_MAX, 744));
        let batch = outbox.take(at(1), LATE);
        assert_eq!(batch[0].0.subject, "744");
        // More come while those are on their way: they are not the ones to go.
        for n in 1000..1010 {
            outbox.push(numbered(n), at(1));
        }
        outbox.told(&[Reply::Accepted, Reply::Accepted, Reply::Unreachable], at(2));
        assert_eq!(outbox.take(at(30), LATE)[0].0.subject, "746");
    }

    #[test]
    fn a_flood_is_sent_no_faster_than_the_server_takes_it() {
        let mut outbox = Outbox::default();
        for n in 0..200 {
            outbox.push(numbered(n), at(0));
        }
        let sent = sent(&mut outbox, 0..100, |_| Reply::Accepted);
        assert!((BURST as usize + 15..=BURST as usize + 21).contains(&sent.len()), "{}", sent.len());
    }

    #[test]
    fn too_many_requests_are_answered_by_patience_within_bounds() {
        for (said, wait) in [(Some(30), 30), (None, 60), (Some(1_000_000), 600), (Some(0), 60)] {
            let mut outbox = Outbox::default();
            outbox.push(numbered(0), at(0));
            outbox.take(at(0), LATE);
            outbox.told(&[Reply::TooMany(said)], at(0));
            assert_eq!(outbox.due(), Some(at(wait)), "{said:?}");
            assert_eq!(outbox.waiting(), 1);
        }
    }

    #[test]
    fn one_that_the_server_will_never_take_holds_up_no_other() {
        let mut outbox = Outbox::default();
        for n in 0..3 {
            outbox.push(numbered(n), at(0));
        }
        outbox.take(at(0), LATE);
        outbox.told(&[Reply::Accepted, Reply::Status(400), Reply::Unreachable], at(0));
        assert_eq!((outbox.waiting(), outbox.dropped()), (1, 1));
        assert_eq!(outbox.due(), Some(at(5)));
        // A process that ended before it said anything changes nothing.
        assert_eq!(outbox.take(at(5), LATE).len(), 1);
        outbox.told(&[], at(6));
        assert_eq!((outbox.waiting(), outbox.due()), (1, Some(at(16))));
    }
}
