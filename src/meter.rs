//! How often something may happen: a token bucket in one number. Pure, and no timer.
//!
//! It is the generic cell rate algorithm (ITU-T I.371): kept is only the moment at which everything
//! taken so far would have been due at the allowed rate.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::clock::micros;

/// How often something may happen, and how much of it at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    /// Nanoseconds from one to the next; 0: no limit.
    interval_ns: u64,
    /// How far (ns) what happens may be ahead of the rate.
    burst_ns: u64,
}

/// What a bucket says to one that was taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Verdict {
    /// It may happen.
    Within,
    /// It may not; asking again makes sense after this time.
    Over(Duration),
    /// As much again as a burst was tried although it was over: whoever does so does not listen.
    Abuse,
}

/// One bucket.
#[derive(Clone, Copy, Debug, Default)]
pub struct Meter {
    due_ns: u64,
}

/// A bucket that many take from at once.
#[derive(Debug, Default)]
pub struct SharedMeter(AtomicU64);

impl Rate {
    /// No limit.
    pub const UNLIMITED: Self = Self { interval_ns: 0, burst_ns: 0 };

    /// `number` in `period`, and as much at once as `burst` allows in the long run. Zero: no limit.
    pub fn new(number: usize, period: Duration, burst: Duration) -> Self {
        if number == 0 {
            return Self::UNLIMITED;
        }
        let interval_ns = (micros(period) * 1000 / number as u64).max(1);
        Self { interval_ns, burst_ns: (micros(burst) * 1000).max(interval_ns) }
    }

    /// In what time so many are due: never more than a burst takes.
    pub fn time_of(&self, count: usize) -> Duration {
        Duration::from_nanos(self.cost_ns(count))
    }

    /// A count above a burst is as good as a burst, or it could never be taken.
    fn cost_ns(&self, count: usize) -> u64 {
        self.interval_ns.saturating_mul(count as u64).min(self.burst_ns)
    }

    /// How far what happens may be ahead of the rate.
    pub fn burst(&self) -> Duration {
        Duration::from_nanos(self.burst_ns)
    }

    /// Whether there is a limit.
    pub fn is_limited(&self) -> bool {
        self.interval_ns > 0
    }
}

impl Meter {
    /// Takes `count`, also if that is too much: whoever does not wait stays above the limit.
    pub fn take(&mut self, rate: &Rate, count: usize, now_us: u64) -> Verdict {
        if !rate.is_limited() {
            return Verdict::Within;
        }
        let cost_ns = rate.cost_ns(count);
        self.due_ns = self.due_ns.max(now_us * 1000).saturating_add(cost_ns);
        match (self.due_ns - now_us * 1000).saturating_sub(rate.burst_ns) {
            0 => Verdict::Within,
            over_ns if over_ns > rate.burst_ns => Verdict::Abuse,
            // It costs as much again.
            over_ns => Verdict::Over(Duration::from_nanos(over_ns + cost_ns)),
        }
    }

    /// Takes `count` if that is not too much: whoever is refused costs the others nothing.
    ///
    /// # Errors
    /// How long until there are as many.
    pub fn try_take(&mut self, rate: &Rate, count: usize, now_us: u64) -> Result<(), Duration> {
        let due_ns = self.due_ns.max(now_us * 1000) + rate.cost_ns(count);
        match (due_ns - now_us * 1000).saturating_sub(rate.burst_ns) {
            over_ns if over_ns > 0 && rate.is_limited() => Err(Duration::from_nanos(over_ns)),
            _ => {
                self.due_ns = due_ns;
                Ok(())
            }
        }
    }

    /// How far what was taken is ahead of the rate.
    pub fn ahead(&self, now_us: u64) -> Duration {
        Duration::from_nanos(self.due_ns.saturating_sub(now_us * 1000))
    }
}

impl SharedMeter {
    /// As [`Meter::try_take`].
    ///
    /// # Errors
    /// How long until there are as many.
    pub fn try_take(&self, rate: &Rate, count: usize, now_us: u64) -> Result<(), Duration> {
        match rate.is_limited() {
            true => self.update(|meter| meter.try_take(rate, count, now_us)),
            false => Ok(()),
        }
    }

    /// As [`Meter::take`]; returns how far what was taken is ahead of the rate.
    pub fn take(&self, rate: &Rate, count: usize, now_us: u64) -> Duration {
        if !rate.is_limited() {
            return Duration::ZERO;
        }
        self.update(|meter| {
            let _ = meter.take(rate, count, now_us);
            meter.ahead(now_us)
        })
    }

    /// As [`Meter::ahead`].
    pub fn ahead(&self, now_us: u64) -> Duration {
        Meter { due_ns: self.0.load(Ordering::Relaxed) }.ahead(now_us)
    }

    fn update<T>(&self, change: impl Fn(&mut Meter) -> T) -> T {
        let mut before = self.0.load(Ordering::Relaxed);
        loop {
            let mut meter = Meter { due_ns: before };
            let outcome = change(&mut meter);
            match self.0.compare_exchange_weak(before, meter.due_ns, Ordering::Relaxed, Ordering::Relaxed) {
                Ok(_) => return outcome,
                Err(now) => before = now,
            }
        }
    }
}
