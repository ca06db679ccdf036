//! When a client comes back after its connection ended: full jitter, short, and as the server asks.

use std::time::Duration;

use rand::RngExt as _;
use rand::rngs::StdRng;
use tokio::time::Instant;

/// The first delay is up to this; each further one up to twice as much.
const BASE: Duration = Duration::from_millis(50);

/// No delay is longer, but for those that a server asks for.
const CAP: Duration = Duration::from_secs(1);

/// At least this, for a server that asks for rest.
const REST: Duration = Duration::from_millis(500);

/// After the time that an announced close leaves, a client goes without being told.
const DRAIN_GRACE: Duration = Duration::from_secs(5);

#[derive(Default)]
pub(crate) struct Comeback {
    attempts: u32,
    /// The moment that was drawn when a close was announced.
    drain: Option<Instant>,
}

impl Comeback {
    /// A connection works.
    pub(crate) fn succeeded(&mut self) {
        self.attempts = 0;
    }

    /// A close was announced. Returns when it is time to go without one.
    pub(crate) fn draining(&mut self, retry_after: Duration, random: &mut StdRng) -> Instant {
        let now = Instant::now();
        self.drain = Some(now + retry_after.mul_f64(random.random()));
        now + retry_after + DRAIN_GRACE
    }

    /// How long to wait after a connection ended with this close code, or none.
    pub(crate) fn delay(&mut self, code: Option<u16>, random: &mut StdRng) -> Duration {
        if let Some(moment) = self.drain.take() {
            let left = moment.saturating_duration_since(Instant::now());
            return left.max(BASE.mul_f64(random.random()));
        }
        let longest = CAP.min(BASE * 2_u32.pow(self.attempts.min(10)));
        self.attempts += 1;
        // Overloaded, or this client was too slow.
        let rest = if matches!(code, Some(1013 | 4101)) { REST } else { Duration::ZERO };
        rest + longest.mul_f64(random.random())
    }
}
