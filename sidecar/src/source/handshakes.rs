//! When handshakes really were. WireGuard notes them by the wall's clock of that moment; when
//! that clock has been set since, their age reads as a year, or as none. What was seen earlier,
//! and how long ago by a clock that nobody sets, tells better.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::observed::Device;
use crate::terms::{PublicKey, Stamp};

/// Both clocks are read one after the other, and WireGuard's has whole seconds.
const STEADY_S: i64 = 3;

/// The last handshakes of a device's peers, kept between looks.
#[derive(Debug, Default)]
pub struct Handshakes {
    seen: BTreeMap<PublicKey, Seen>,
    looked: Option<Duration>,
}

#[derive(Clone, Copy, Debug)]
struct Seen {
    /// As the device says it.
    told: Option<Stamp>,
    /// How old it was, and when that was found.
    age: Duration,
    at: Duration,
}

impl Handshakes {
    /// Puts the handshakes of `device` right, where the clock was set since. `now` by the wall's
    /// clock, `awake` by one that is never set. The first look has to believe what it reads.
    pub fn correct(&mut self, device: &mut Device, now: Stamp, awake: Duration) {
        let earlier = std::mem::take(&mut self.seen);
        let since_last_look = self.looked.replace(awake).map(|looked| awake.saturating_sub(looked));
        for peer in &mut device.peers {
            let told = peer.last_handshake;
            let known = earlier.get(&peer.public_key);
            let seen = match known.filter(|seen| seen.told == told) {
                Some(seen) => *seen,
                None => {
                    let age = Duration::from_secs(told.map_or(0, |told| now.seconds_since(told)));
                    // One that was not there at the last look is no older than that.
                    let bound = since_last_look.filter(|_| known.is_some()).unwrap_or(Duration::MAX);
                    Seen { told, age: age.min(bound), at: awake }
                }
            };
            self.seen.insert(peer.public_key, seen);
            let Some(told) = told else { continue };
            let age = seen.age + awake.saturating_sub(seen.at);
            let second = now.0.as_second().saturating_sub(i64::try_from(age.as_secs()).unwrap_or(i64::MAX));
            if (told.0.as_second() - second).abs() > STEADY_S {
                peer.last_handshake = Some(Stamp::from_unix(second));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::observed::{Backend, Peer};

    const DAY: i64 = 86_400;

    /// What is made of a handshake that the device dates `told`: its age at `now`.
    fn age(handshakes: &mut Handshakes, told: Option<i64>, now: i64, awake: u64) -> Option<i64> {
        let peer = Peer {
            public_key: PublicKey([7; 32]),
            endpoint: None,
            keepalive: 25,
            last_handshake: told.map(Stamp::from_unix),
            rx_bytes: 0,
            tx_bytes: 0,
            allowed: Vec::new(),
        };
        let mut device = Device {
            name: "wg0".into(),
            backend: Backend::Kernel,
            public_key: None,
            listen_port: 0,
            peers: vec![peer],
        };
        handshakes.correct(&mut device, Stamp::from_unix(now), Duration::from_secs(awake));
        device.peers[0].last_handshake.map(|at| now - at.0.as_second())
    }

    #[test]
    fn a_clock_that_is_set_makes_no_handshake_older_or_younger() {
        let now = 1_800_000_000;
        for step in [365 * DAY, -DAY, 0] {
            let mut handshakes = Handshakes::default();
            assert_eq!(age(&mut handshakes, Some(now - 40), now, 1000), Some(40));
            assert_eq!(age(&mut handshakes, Some(now - 40), now + 10 + step, 1010), Some(50), "{step}");
            assert_eq!(age(&mut handshakes, Some(now - 40), now + 900 + step, 1900), Some(940), "{step}");
            // A new one, by the clock as it is now; and it ages.
            assert_eq!(
                age(&mut handshakes, Some(now + 905 + step), now + 910 + step, 1910),
                Some(5),
                "{step}"
            );
            assert_eq!(
                age(&mut handshakes, Some(now + 905 + step), now + 920 + step, 1920),
                Some(15),
                "{step}"
            );
            // One just before the clock was set, between two looks.
            let told = Some(now + 921 + step);
            assert_eq!(age(&mut handshakes, told, now + 930 + step + 7 * DAY, 1930), Some(10), "{step}");
        }
    }

    #[test]
    fn what_is_not_known_is_not_made_up() {
        let now = 1_800_000_000;
        let mut handshakes = Handshakes::default();
        assert_eq!(age(&mut handshakes, None, now, 1000), None);
        assert_eq!(age(&mut handshakes, None, now, 1010), None);
        assert_eq!(age(&mut handshakes, Some(now + 12), now + 15, 1015), Some(3), "the first one");
        // A day ahead at the first look: the clock was set back before that. A dead tunnel must
        // not look alive for all of that day.
        let mut handshakes = Handshakes::default();
        assert_eq!(age(&mut handshakes, Some(now + DAY), now, 1000), Some(0));
        assert_eq!(age(&mut handshakes, Some(now + DAY), now + 200, 1200), Some(200));
        assert_eq!(age(&mut handshakes, Some(now + 205), now + 210, 1210), Some(5));
    }
}
