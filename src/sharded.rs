//! Numbers that many threads count on at once: a counter and a histogram.
//!
//! Each is kept in as many parts as threads are likely to meet, every part on cache lines of its own,
//! so that cores do not contend. A scrape adds the parts up.

use std::cell::Cell;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use crossbeam_utils::CachePadded;
use prometheus_client::encoding::{EncodeMetric, MetricEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::{Atomic, Counter};

/// A counter that many threads can count on at once.
pub type Count = Counter<u64, Sharded>;

const SHARDS: usize = 16;

static NEXT_SHARD: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    static SHARD: Cell<usize> = Cell::new(NEXT_SHARD.fetch_add(1, Ordering::Relaxed) % SHARDS);
}

/// An atomic number in parts.
#[derive(Debug, Default)]
pub struct Sharded([CachePadded<AtomicU64>; SHARDS]);

impl Sharded {
    /// Zero.
    pub const fn new() -> Self {
        Self([const { CachePadded::new(AtomicU64::new(0)) }; SHARDS])
    }
}

impl Atomic<u64> for Sharded {
    fn inc(&self) -> u64 {
        self.inc_by(1)
    }

    fn inc_by(&self, by: u64) -> u64 {
        self.0[SHARD.get()].fetch_add(by, Ordering::Relaxed)
    }

    fn get(&self) -> u64 {
        // Wrapping: of what comes and goes, a part may only have seen what goes.
        self.0.iter().fold(0, |sum, part| sum.wrapping_add(part.load(Ordering::Relaxed)))
    }
}

/// Bucket `i` goes up to `2^i` µs, 8.4 s at most; the last one takes the rest.
const BUCKETS: usize = 25;

/// A histogram of durations, in seconds for Prometheus and in microseconds inside.
///
/// That of `prometheus-client` takes one mutex for all cores at every observation.
#[derive(Clone, Debug, Default)]
pub struct Histogram(Arc<[CachePadded<Part>; SHARDS]>);

#[derive(Debug, Default)]
struct Part {
    buckets: [AtomicU64; BUCKETS],
    sum_us: AtomicU64,
}

impl Histogram {
    /// Counts one duration: two additions, no lock and no float.
    pub fn observe_us(&self, duration_us: u64) {
        let part = &self.0[SHARD.get()];
        part.buckets[bucket(duration_us)].fetch_add(1, Ordering::Relaxed);
        part.sum_us.fetch_add(duration_us, Ordering::Relaxed);
    }

    fn sum(&self, number: impl Fn(&Part) -> &AtomicU64) -> u64 {
        self.0.iter().map(|part| number(part).load(Ordering::Relaxed)).sum()
    }
}

/// The first bucket whose bound is not below the duration, as `le` means it.
fn bucket(duration_us: u64) -> usize {
    let bits = u64::BITS - duration_us.saturating_sub(1).leading_zeros();
    (bits as usize).min(BUCKETS - 1)
}

impl EncodeMetric for Histogram {
    fn encode(&self, mut encoder: MetricEncoder<'_>) -> fmt::Result {
        let bound = |index| if index + 1 < BUCKETS { (1_u64 << index) as f64 / 1e6 } else { f64::INFINITY };
        let buckets: [_; BUCKETS] = std::array::from_fn(|index| (bound(index), self.sum(|part| &part.buckets[index])));
        // The count is that of these buckets, so that a scrape during an observation agrees with itself.
        let count = buckets.iter().map(|(_, number)| number).sum();
        let sum_us = self.sum(|part| &part.sum_us);
        encoder.encode_histogram::<NoLabelSet>(sum_us as f64 / 1e6, count, &buckets, None)
    }

    fn metric_type(&self) -> MetricType {
        MetricType::Histogram
    }
}
