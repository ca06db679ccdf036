//! The process's one clock: monotonic, in microseconds since the first call.
//!
//! A plain `u64` fits into atomics and frames, and every age in the gateway is a
//! difference of two of these. Wall-clock jumps move nothing.

use std::sync::LazyLock;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

static START: LazyLock<Instant> = LazyLock::new(Instant::now);

/// Microseconds since the process started. Zero is never returned, so it can mean "not yet".
pub fn now_us() -> u64 {
    START.elapsed().as_micros() as u64 + 1
}

/// The wall clock at a moment of this one that is over, in milliseconds since 1970.
pub fn unix_ms(at_us: u64) -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    (now.as_micros() as u64).saturating_sub(now_us().saturating_sub(at_us)) / 1000
}

/// A duration in the clock's unit.
pub const fn micros(duration: Duration) -> u64 {
    duration.as_micros() as u64
}
