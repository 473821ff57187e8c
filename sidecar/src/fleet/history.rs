//! How the fleet was: looks that were kept, or what Prometheus has kept, as rows of equal slots.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::view::{Overview, State};
use crate::terms::{Stamp, printable};

/// Slots of a row, each as wide as any other.
pub const SLOTS: usize = 96;
/// Looks that are kept at most; the oldest goes first.
pub const SNAPSHOTS_MAX: usize = 288;
/// A longer answer of Prometheus is not read: 10,000 nodes have a quarter of it.
pub const ANSWER_BYTES_MAX: u64 = 64 << 20;

/// One look at the fleet, kept.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Snapshot {
    pub version: u32,
    pub fleet: String,
    /// Unix time, by the hub's clock.
    pub at: i64,
    pub nodes: BTreeMap<String, Mark>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Mark {
    pub state: State,
    /// Bytes of strangers so far, in and out; `None`: not told.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes: Option<(u64, u64)>,
}

impl Snapshot {
    pub fn of(overview: &Overview) -> Self {
        let mark = |judged: &super::view::Judged| {
            let bytes = judged.look.vitals().and_then(|vitals| {
                let bytes = |key: &str| vitals.bytes.get(key).copied();
                bytes("public in").zip(bytes("public out"))
            });
            (judged.look.place.name.clone(), Mark { state: judged.state, bytes })
        };
        let nodes = overview.looks.iter().map(mark).collect();
        Self { version: 1, fleet: overview.fleet.clone(), at: overview.at.0.as_second(), nodes }
    }

    /// Seconds since each node last said something in one of these looks.
    pub fn last_heard(snapshots: &[Snapshot], now: Stamp) -> BTreeMap<String, u64> {
        let mut out = BTreeMap::new();
        for snapshot in snapshots {
            let heard = snapshot.nodes.iter().filter(|(_, mark)| mark.state != State::Silent);
            for (name, _) in heard {
                let age = now.seconds_since(Stamp::from_unix(snapshot.at));
                out.entry(name.clone())
                    .and_modify(|before: &mut u64| *before = age.min(*before))
                    .or_insert(age);
            }
        }
        out
    }
}

/// A span of time in slots, and what happened to each node in each.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Trends {
    /// Unix time.
    pub from: i64,
    pub to: i64,
    pub nodes: BTreeMap<String, Trend>,
    /// Where it is from, for people.
    pub source: String,
}

/// One node's row.
#[derive(Clone, Debug, PartialEq)]
pub struct Trend {
    /// The worst of each slot.
    pub states: Vec<Option<State>>,
    /// Bytes a second of strangers, in and out, the most of each slot.
    pub inward: Vec<Option<f64>>,
    pub outward: Vec<Option<f64>>,
}

impl Default for Trend {
    fn default() -> Self {
        Self { states: vec![None; SLOTS], inward: vec![None; SLOTS], outward: vec![None; SLOTS] }
    }
}

/// Values over time by node, as Prometheus gives them.
pub type Series = BTreeMap<String, Vec<(i64, f64)>>;

impl Trends {
    pub fn new(from: i64, to: i64, source: &str) -> Self {
        Self { from, to: to.max(from + 1), nodes: BTreeMap::new(), source: source.to_owned() }
    }

    /// From kept looks.
    pub fn of_snapshots(snapshots: &[Snapshot], now: Stamp, seconds: i64) -> Self {
        let to = now.0.as_second();
        let mut out = Self::new(to - seconds, to, "looks that were kept");
        let mut before: BTreeMap<&str, (i64, (u64, u64))> = BTreeMap::new();
        let mut ordered: Vec<&Snapshot> = snapshots.iter().collect();
        ordered.sort_by_key(|snapshot| snapshot.at);
        for snapshot in ordered {
            for (name, mark) in &snapshot.nodes {
                out.state(name, snapshot.at, mark.state);
                let Some(bytes) = mark.bytes else { continue };
                let earlier = before.insert(name, (snapshot.at, bytes));
                let Some((at, (inward, outward))) = earlier.filter(|(at, _)| *at < snapshot.at) else {
                    continue;
                };
                let seconds = (snapshot.at - at) as f64;
                // A counter that fell was counted anew.
                let rate = |now: u64, then: u64| now.checked_sub(then).map(|bytes| bytes as f64 / seconds);
                out.traffic(name, snapshot.at, rate(bytes.0, inward), rate(bytes.1, outward));
            }
        }
        out
    }

    /// From verdicts (0, 1, 2) and rates; where a verdict is missing between others it was silent.
    pub fn of_series(mut self, verdicts: &Series, inward: &Series, outward: &Series) -> Self {
        for (name, values) in verdicts {
            for (at, value) in values {
                let state = match *value {
                    0.0 => State::Fine,
                    1.0 => State::Drifting,
                    _ => State::Blind,
                };
                self.state(name, *at, state);
            }
            if let Some(trend) = self.nodes.get_mut(name) {
                let known: Vec<usize> = (0..SLOTS).filter(|at| trend.states[*at].is_some()).collect();
                let first = known.first().copied().unwrap_or(SLOTS);
                // The newest slot may not have had its scrape yet.
                let gaps = trend.states[first..SLOTS - 1].iter_mut().filter(|state| state.is_none());
                gaps.for_each(|state| *state = Some(State::Silent));
            }
        }
        for (name, values) in inward {
            values.iter().for_each(|(at, rate)| self.traffic(name, *at, Some(*rate), None));
        }
        for (name, values) in outward {
            values.iter().for_each(|(at, rate)| self.traffic(name, *at, None, Some(*rate)));
        }
        self
    }

    fn slot(&self, at: i64) -> Option<usize> {
        let inside = (self.from..=self.to).contains(&at);
        let slot =
            inside.then(|| (at - self.from) as i128 * SLOTS as i128 / (self.to - self.from) as i128)?;
        usize::try_from(slot).ok().map(|slot| slot.min(SLOTS - 1))
    }

    fn state(&mut self, name: &str, at: i64, state: State) {
        let Some(slot) = self.slot(at) else { return };
        let before = &mut self.nodes.entry(name.to_owned()).or_default().states[slot];
        *before = Some(before.map_or(state, |before| before.min(state)));
    }

    fn traffic(&mut self, name: &str, at: i64, inward: Option<f64>, outward: Option<f64>) {
        let Some(slot) = self.slot(at) else { return };
        let trend = self.nodes.entry(name.to_owned()).or_default();
        for (row, rate) in [(&mut trend.inward, inward), (&mut trend.outward, outward)] {
            if let Some(rate) = rate.filter(|rate| rate.is_finite() && *rate >= 0.0) {
                row[slot] = Some(row[slot].map_or(rate, |before: f64| before.max(rate)));
            }
        }
    }
}

/// The answer of Prometheus' `query_range`, by the nodes' names. `instances`: which node is meant by
/// an `instance` label; a `node` label that is a name goes before it.
pub fn series(answer: &str, instances: &BTreeMap<String, String>) -> Result<Series, String> {
    let unlike = |what: &str| format!("Prometheus answers {what}");
    let json: serde_json::Value =
        serde_json::from_str(answer).map_err(|_| unlike("something that is no JSON"))?;
    if json["status"] != "success" {
        let error = json["error"].as_str().unwrap_or("without a reason");
        return Err(unlike(&format!("that it can't: {}", printable(error, 200))));
    }
    let result = json["data"]["result"].as_array().ok_or_else(|| unlike("without a result"))?;
    let mut out = Series::new();
    for row in result {
        let label = |name: &str| row["metric"][name].as_str();
        let known = |name: &&str| instances.values().any(|node| node == name);
        let name = label("node").filter(known);
        let Some(name) = name.or_else(|| instances.get(label("instance")?).map(String::as_str)) else {
            continue;
        };
        let values = row["values"].as_array().map(Vec::as_slice).unwrap_or_default();
        let value = |pair: &serde_json::Value| {
            let at = pair.get(0)?.as_f64()?;
            Some((at as i64, pair.get(1)?.as_str()?.parse::<f64>().ok()?))
        };
        out.entry(name.to_owned()).or_default().extend(values.iter().filter_map(value));
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn snapshot(at: i64, state: State, bytes: Option<(u64, u64)>) -> Snapshot {
        let nodes = [("oslo".to_owned(), Mark { state, bytes })].into();
        Snapshot { version: 1, fleet: "f".into(), at, nodes }
    }

    #[test]
    fn kept_looks_become_slots() {
        let now = Stamp::from_unix(96_000);
        let looks = [
            snapshot(0, State::Fine, Some((0, 0))),
            snapshot(500, State::Drifting, Some((1000, 500))),
            snapshot(900, State::Fine, Some((5000, 100))),
            snapshot(95_999, State::Silent, None),
            snapshot(200_000, State::Fine, None),
        ];
        let trends = Trends::of_snapshots(&looks, now, 96_000);
        let oslo = &trends.nodes["oslo"];
        assert_eq!(oslo.states[0], Some(State::Drifting), "the worst of a slot");
        assert_eq!((oslo.states[1], oslo.states[95]), (None, Some(State::Silent)));
        assert_eq!((oslo.inward[0], oslo.outward[0]), (Some(10.0), Some(1.0)), "a fall is no rate");
        assert_eq!(Snapshot::last_heard(&looks[..4], now)["oslo"], 96_000 - 900);
        let text = serde_json::to_string(&looks[1]).unwrap();
        assert_eq!(serde_json::from_str::<Snapshot>(&text).unwrap(), looks[1]);
    }

    #[test]
    fn what_prometheus_answers_is_read_with_care() {
        let instances: BTreeMap<String, String> = [("10.84.0.16:9984".into(), "oslo".into())].into();
        let row = |metric: &str, values: &str| format!("{{\"metric\":{{{metric}}},\"values\":[{values}]}}");
        let answer = |rows: &str| {
            format!("{{\"status\":\"success\",\"data\":{{\"resultType\":\"matrix\",\"result\":[{rows}]}}}}")
        };
        let by_instance = row("\"instance\":\"10.84.0.16:9984\"", "[1000,\"0\"],[1060.5,\"NaN\"],[1,2],[],7");
        let read = series(&answer(&by_instance), &instances).unwrap();
        assert_eq!(read["oslo"].len(), 2);
        assert_eq!(read["oslo"][0], (1000, 0.0));
        let by_name = row("\"node\":\"oslo\",\"instance\":\"x:1\"", "[1,\"1\"]");
        assert_eq!(series(&answer(&by_name), &instances).unwrap()["oslo"], [(1, 1.0)]);
        let stranger = row("\"node\":\"<script>\"", "[1,\"1\"]");
        assert!(series(&answer(&stranger), &instances).unwrap().is_empty());
        assert!(series("<html>", &instances).unwrap_err().contains("no JSON"));
        let refused = "{\"status\":\"error\",\"error\":\"bad \\u001b[2J\"}";
        assert!(series(refused, &instances).unwrap_err().ends_with("it can't: bad \u{fffd}[2J"));
    }

    #[test]
    fn a_gap_between_verdicts_is_silence() {
        let verdicts: Series = [("oslo".to_owned(), vec![(150, 0.0), (350, 1.0)])].into();
        let rates: Series = [("oslo".to_owned(), vec![(150, 5.0), (151, f64::NAN), (152, 7.0)])].into();
        let trends = Trends::new(0, 9600, "Prometheus").of_series(&verdicts, &rates, &Series::new());
        let oslo = &trends.nodes["oslo"];
        assert_eq!(oslo.states[..4], [None, Some(State::Fine), Some(State::Silent), Some(State::Drifting)]);
        assert_eq!((oslo.states[94], oslo.states[95]), (Some(State::Silent), None));
        assert_eq!((oslo.inward[1], oslo.outward[1]), (Some(7.0), None));
    }
}
