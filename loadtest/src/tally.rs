//! What was delivered, when, and what was not.

use std::collections::BTreeMap;

use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};

/// Significant digits of all latencies.
const DIGITS: u8 = 3;

/// The deliveries of one run.
#[derive(Debug)]
pub(crate) struct Tally {
    /// One entry for each interval since the start.
    pub intervals: Vec<Histogram<u64>>,
    pub deliveries: u64,
    /// Missing deliveries: gaps in a subscription's sequence.
    pub lost: u64,
    /// Deliveries that came again, or after a later one.
    pub repeated: u64,
    /// Connections that ended, by what was said.
    pub ended: BTreeMap<String, u64>,
    started_us: u64,
    interval_us: u64,
}

/// A tally as one process tells it to another: histograms as pairs of value and count.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Told {
    intervals: Vec<Vec<(u64, u64)>>,
    deliveries: u64,
    lost: u64,
    repeated: u64,
    ended: BTreeMap<String, u64>,
}

impl Tally {
    /// An empty tally that starts now and keeps a histogram for each interval.
    pub(crate) fn new(started_us: u64, interval_us: u64) -> Self {
        let ended = BTreeMap::new();
        Self { intervals: Vec::new(), deliveries: 0, lost: 0, repeated: 0, ended, started_us, interval_us }
    }

    /// Counts one delivery.
    pub(crate) fn deliver(&mut self, now_us: u64, due_us: u64) {
        let at = (now_us.saturating_sub(self.started_us) / self.interval_us) as usize;
        self.deliveries += 1;
        // It grows by itself: no value is out of range.
        let _ = self.interval(at).record(now_us.saturating_sub(due_us));
    }

    fn interval(&mut self, at: usize) -> &mut Histogram<u64> {
        while self.intervals.len() <= at {
            self.intervals.push(histogram());
        }
        &mut self.intervals[at]
    }

    /// All latencies, in microseconds.
    pub(crate) fn latency_us(&self) -> Histogram<u64> {
        let mut all = histogram();
        for interval in &self.intervals {
            let _ = all.add(interval);
        }
        all
    }

    /// The tally in a form that can be sent.
    pub(crate) fn tell(&self) -> Told {
        let pairs = |histogram: &Histogram<u64>| {
            histogram.iter_recorded().map(|at| (at.value_iterated_to(), at.count_at_value())).collect()
        };
        Told {
            intervals: self.intervals.iter().map(pairs).collect(),
            deliveries: self.deliveries,
            lost: self.lost,
            repeated: self.repeated,
            ended: self.ended.clone(),
        }
    }

    /// Adds what another process told.
    pub(crate) fn add(&mut self, told: Told) {
        for (at, pairs) in told.intervals.into_iter().enumerate() {
            for (value, count) in pairs {
                let _ = self.interval(at).record_n(value, count);
            }
        }
        self.deliveries += told.deliveries;
        self.lost += told.lost;
        self.repeated += told.repeated;
        for (reason, count) in told.ended {
            *self.ended.entry(reason).or_default() += count;
        }
    }
}

pub(crate) fn histogram() -> Histogram<u64> {
    Histogram::new(DIGITS).expect("three digits are allowed")
}
