//! What the configuration says about how much is allowed: rates, connections, memory.

use std::time::Duration;

use crate::config::{ConfigError, Values};
use crate::meter::Rate;

/// Handshakes a second of one worker thread. One costs 35 us of CPU without TLS (README, "Numbers"), so that
/// this is a third of a core, and a burst of it is over within a second.
const HANDSHAKES_PER_WORKER: usize = 10_000;

/// What may come at once: so many seconds' worth of a rate.
const BURST: Duration = Duration::from_secs(2);

const SECOND: Duration = Duration::from_secs(1);

const COUNT_ALLOWED: &str = "a number up to 1000000000, 0 for no limit";

/// The limits that are counted in time or over many connections.
#[derive(Clone, Copy, Debug)]
pub struct LimitsConfig {
    /// `HUBCAST_HANDSHAKES_PER_SECOND`
    pub handshakes: Count,
    /// `HUBCAST_HANDSHAKES_PENDING_MAX`
    pub handshakes_pending_max: usize,
    /// `HUBCAST_HANDSHAKES_PER_ADDRESS`
    pub handshakes_per_address: Count,
    /// `HUBCAST_CONNECTIONS_PER_ADDRESS`; 0: no limit.
    pub connections_per_address: usize,
    /// `HUBCAST_CONNECTIONS_PER_USER`; 0: no limit.
    pub connections_per_user: usize,
}

/// So many a second; 0: no limit.
#[derive(Clone, Copy, Debug)]
pub struct Count(pub usize);

impl Count {
    /// As a rate with the usual burst.
    pub fn rate(self) -> Rate {
        Rate::new(self.0, SECOND, BURST)
    }
}

impl LimitsConfig {
    pub(crate) fn parse(values: &Values, worker_threads: usize) -> Result<Self, ConfigError> {
        let count = |name| values.get(name, COUNT_ALLOWED, count);
        let handshakes = values.get("HUBCAST_HANDSHAKES_PER_SECOND", COUNT_ALLOWED, |text| match text {
            "" => Some(HANDSHAKES_PER_WORKER * worker_threads),
            text => self::count(text),
        })?;
        Ok(Self {
            handshakes: Count(handshakes),
            handshakes_pending_max: values.number("HUBCAST_HANDSHAKES_PENDING_MAX")?,
            handshakes_per_address: Count(count("HUBCAST_HANDSHAKES_PER_ADDRESS")?),
            connections_per_address: count("HUBCAST_CONNECTIONS_PER_ADDRESS")?,
            connections_per_user: count("HUBCAST_CONNECTIONS_PER_USER")?,
        })
    }

    /// The effective value of a variable of the limits.
    pub(crate) fn print(&self, name: &str) -> Option<String> {
        Some(match name {
            "HUBCAST_HANDSHAKES_PER_SECOND" => self.handshakes.0.to_string(),
            "HUBCAST_HANDSHAKES_PENDING_MAX" => self.handshakes_pending_max.to_string(),
            "HUBCAST_HANDSHAKES_PER_ADDRESS" => self.handshakes_per_address.0.to_string(),
            "HUBCAST_CONNECTIONS_PER_ADDRESS" => self.connections_per_address.to_string(),
            "HUBCAST_CONNECTIONS_PER_USER" => self.connections_per_user.to_string(),
            _ => return None,
        })
    }
}

fn count(text: &str) -> Option<usize> {
    text.parse().ok().filter(|number| *number <= 1_000_000_000)
}
