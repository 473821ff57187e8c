//! What a restart must not cost: notices that wait, and which findings were last told as
//! wrong, so that somebody hears that they are over. No URL and no token is in it.

use serde::{Deserialize, Serialize};

use super::notice::Wrong;
use super::outbox::QUEUE_MAX;
use super::{Notice, Notices, Outbox};
use crate::terms::printable;

/// Longest subject and text, in characters: as in a message.
const TEXT_MAX: usize = 512;
/// Bounded lists of bounded texts stay below this; more is not ours.
pub const BYTES_MAX: u64 = 4 << 20;
const VERSION: u32 = 1;

/// One file, as it lies in the state directory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kept {
    version: u32,
    /// In the order in which they are to be sent.
    pub waiting: Vec<Notice>,
    pub wrong: Vec<Wrong>,
}

impl Default for Kept {
    fn default() -> Self {
        Self { version: VERSION, waiting: Vec::new(), wrong: Vec::new() }
    }
}

impl Kept {
    pub fn of(outbox: &Outbox, notices: &Notices) -> Self {
        let waiting = outbox.all().chain(notices.held()).take(QUEUE_MAX).cloned().map(bounded);
        let wrong =
            notices.wrong().map(|wrong| Wrong { subject: printable(&wrong.subject, TEXT_MAX), ..wrong });
        Self { version: VERSION, waiting: waiting.collect(), wrong: wrong.collect() }
    }

    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty() && self.wrong.is_empty()
    }

    pub fn to_json(&self) -> Vec<u8> {
        serde_json::to_vec(self).unwrap_or_default()
    }

    pub fn from_json(bytes: &[u8]) -> Result<Self, String> {
        if bytes.len() as u64 > BYTES_MAX {
            return Err(format!("it is larger than {BYTES_MAX} bytes"));
        }
        let mut kept: Self = serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
        if kept.version != VERSION {
            return Err(format!("its version is {}, not {VERSION}", kept.version));
        }
        kept.waiting.truncate(QUEUE_MAX);
        kept.waiting = kept.waiting.into_iter().map(bounded).collect();
        Ok(kept)
    }
}

fn bounded(mut notice: Notice) -> Notice {
    notice.subject = printable(&notice.subject, TEXT_MAX);
    notice.found = printable(&notice.found, TEXT_MAX);
    notice.by = notice.by.map(|by| by.bounded(TEXT_MAX));
    notice
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::NoticeKind::{Appeared, Recovered};
    use super::super::notice::tests::notice;
    use super::*;

    const NOW: Duration = Duration::from_secs(1000);

    fn told() -> (Outbox, Notices) {
        let (mut outbox, mut notices) = (Outbox::default(), Notices::default());
        for subject in ["a", "b"] {
            outbox.push(notices.note(notice(Appeared, subject), NOW).expect("news"), NOW);
        }
        (outbox, notices)
    }

    #[test]
    fn what_waits_comes_back_in_order_and_late() {
        let (outbox, mut notices) = told();
        // The third word of one finding is held, and no less waiting.
        assert!(notices.note(notice(Recovered, "b"), NOW).is_some());
        assert!(notices.note(notice(Appeared, "b"), NOW).is_none());
        let kept = Kept::of(&outbox, &notices);
        let back = Kept::from_json(&kept.to_json()).expect("sound");
        assert_eq!(back, kept);
        let mut outbox = Outbox::default();
        let hour = Duration::from_secs(3600);
        back.waiting.into_iter().for_each(|notice| outbox.restore(notice, hour, Duration::ZERO));
        let sent = outbox.take(Duration::from_secs(9), Duration::from_secs(60));
        let subjects: Vec<(&str, Option<Duration>)> =
            sent.iter().map(|(notice, late)| (notice.subject.as_str(), *late)).collect();
        let late = Some(hour + Duration::from_secs(9));
        assert_eq!(subjects, [("a", late), ("b", late), ("b", late)]);
    }

    #[test]
    fn who_was_told_that_it_is_wrong_is_told_that_it_is_over() {
        let (outbox, notices) = told();
        let back = Kept::from_json(&Kept::of(&outbox, &notices).to_json()).expect("sound");
        let mut notices = Notices::default();
        back.wrong.into_iter().for_each(|wrong| notices.restore(wrong, Duration::ZERO));
        assert!(notices.note(notice(Recovered, "a"), NOW).is_some());
        assert!(notices.note(notice(Recovered, "never told"), NOW).is_none());
        // And that it is wrong, only where that is worse than what was told.
        let mut notices = Notices::default();
        notices.restore(told().1.wrong().next().expect("one"), Duration::ZERO);
        assert!(notices.note(notice(Appeared, "a"), Duration::ZERO).is_none());
    }

    #[test]
    fn the_file_is_bounded_whatever_strangers_called_themselves() {
        let (mut outbox, mut notices) = (Outbox::default(), Notices::default());
        for n in 0..2000 {
            let odd = format!("{n}\u{1b}[2J{}", "\u{1f512}".repeat(3000));
            let odd = Notice { found: odd.clone(), ..notice(Appeared, &odd) };
            outbox.push(notices.note(odd, NOW).expect("news"), NOW);
        }
        let bytes = Kept::of(&outbox, &notices).to_json();
        assert!((bytes.len() as u64) < BYTES_MAX, "{}", bytes.len());
        assert!(!bytes.contains(&0x1b));
        let back = Kept::from_json(&bytes).expect("sound");
        assert_eq!(back.waiting.len(), QUEUE_MAX);
        assert!(Kept::default().is_empty() && !back.is_empty());
    }

    #[test]
    fn what_is_not_ours_is_refused_with_a_reason() {
        let version = br#"{"version":2,"waiting":[],"wrong":[]}"#;
        for bytes in [&b""[..], b"{", b"[]", b"\xff\xfe", version, &vec![b' '; 5 << 20]] {
            assert!(!Kept::from_json(bytes).expect_err("not ours").is_empty());
        }
        let half = Kept::of(&told().0, &told().1).to_json();
        assert!((0..half.len()).all(|length| Kept::from_json(&half[..length]).is_err()));
    }
}
