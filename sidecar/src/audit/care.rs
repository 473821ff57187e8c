//! Ports behind a limit that holds for all sources together: each probe uses up what real
//! traffic then lacks, so they are probed slowly, and only where anything can answer.

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use super::join::{Site, View};
use super::{Fate, Ports};
use crate::ruleset::evaluate::has_limits;
use crate::terms::{Port, Proto};

/// Probes take at most this share of what a limit lets pass.
const SHARE: f64 = 0.5;
/// Limits slower than so many packets a second are left alone.
const SLOWEST: f64 = 2.0;
/// How long the slow probes of one address and protocol may take, in seconds.
const SECONDS_MAX: u32 = 10;

/// How one address and protocol is to be swept.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Care {
    pub address: IpAddr,
    pub proto: Proto,
    /// Ports to be probed slowly.
    pub paced: Vec<Port>,
    /// Probes to those a second, at most.
    pub per_second: u32,
    /// Ports not to be probed, with what the rules say of a packet that comes alone.
    pub spared: Vec<(Port, Fate)>,
    /// Spared ports of which the rules leave open what they do, each with a paced one that no rule
    /// tells from it; in order.
    #[serde(default)]
    pub alike: Vec<(Port, Port)>,
}

impl View<'_> {
    /// `None`: no rule has such a limit for these ports.
    pub fn care(
        &self,
        interface: &str,
        address: IpAddr,
        source: IpAddr,
        proto: Proto,
        asked: &Ports,
    ) -> Option<Care> {
        self.rules.seen().filter(|rules| has_limits(rules))?;
        let site = Site::new(self, interface, address, source, proto);
        let mut slowest: HashMap<usize, Option<f64>> = HashMap::new();
        let mut rate = |port: Port| {
            // It comes before every rule, and tells ports apart by itself.
            if site.guarded(port).is_some() {
                return None;
            }
            *slowest.entry(site.group(port)).or_insert_with(|| site.limited(port))
        };
        let behind: Vec<(Port, f64)> =
            asked.to_vec().into_iter().filter_map(|port| Some((port, rate(port)?))).collect();
        let likely: HashSet<Port> = self.likely(proto, asked).into_iter().collect();
        let worth = |(port, rate): &&(Port, f64)| likely.contains(port) && *rate >= SLOWEST;
        let slowest = behind.iter().filter(worth).map(|(_, rate)| *rate).fold(f64::INFINITY, f64::min);
        // At least 1, as every rate is SLOWEST or more.
        let per_second = (slowest * SHARE).clamp(1.0, 100_000.0) as u32;
        let most = per_second.saturating_mul(SECONDS_MAX) as usize;
        let mut paced: Vec<Port> = behind.iter().filter(worth).map(|(port, _)| *port).take(most).collect();
        let left = behind.iter().map(|(port, _)| *port).filter(|port| paced.binary_search(port).is_err());
        let mut spared = site.alone(left);
        // One of each group is asked in place of all, if time is left for it.
        let mut first: HashMap<usize, Port> = HashMap::new();
        let (mut alike, mut per_second) = (Vec::new(), per_second);
        for (port, _) in spared.iter().filter(|(_, fate)| *fate == Fate::Lost) {
            match first.get(&site.group(*port)) {
                Some(asked) => alike.push((*port, *asked)),
                None => {
                    let Some(rate) = rate(*port).filter(|rate| *rate >= SLOWEST) else { continue };
                    let slower = per_second.min((rate * SHARE) as u32).max(1);
                    if paced.len() < slower.saturating_mul(SECONDS_MAX) as usize {
                        first.insert(site.group(*port), *port);
                        paced.push(*port);
                        per_second = slower;
                    }
                }
            }
        }
        paced.sort_unstable();
        spared.retain(|(port, _)| paced.binary_search(port).is_err());
        (!behind.is_empty()).then_some(Care { address, proto, paced, per_second, spared, alike })
    }
}
