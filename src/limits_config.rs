//! What the configuration says about how much is allowed: rates, connections, memory.

use std::fs;
use std::time::Duration;

use bytesize::ByteSize;

use crate::allowance::Allowances;
use crate::config::{ConfigError, Values, size};
use crate::meter::Rate;
use crate::metrics::Scope;
use crate::session::READ_BYTES;
use crate::tab::Bounds;

/// Handshakes a second of one worker thread. One costs 35 us of CPU without TLS (README, "Numbers"), so that
/// this is a third of a core, and a burst of it is over within a second.
const HANDSHAKES_PER_WORKER: usize = 10_000;

/// The same where the listener speaks TLS: 280 us each.
const TLS_HANDSHAKES_PER_WORKER: usize = 1200;

/// What may come at once: so many seconds' worth of a rate.
const BURST: Duration = Duration::from_secs(2);

const SECOND: Duration = Duration::from_secs(1);

/// As many seconds' worth of pings may come at once: a client that wakes up may have some to send.
const PINGS_BURST: Duration = Duration::from_secs(20);

/// What a channel with a subscriber takes, and how many there are at most where nobody says it: a quarter of the memory.
const CHANNEL_BYTES: usize = 1 << 10;
const CHANNELS_MAX: usize = 1_000_000;

const BYTES_ALLOWED: &str = "a size of at least 1KiB such as 64KiB, 0 for no limit";
const BYTES_MIN: u64 = 1 << 10;
const MEMORY_ALLOWED: &str = "a size of at least 8MiB such as 512MiB or 4GiB";
const MEMORY_BYTES_MIN: u64 = 8 << 20;

const COUNT_ALLOWED: &str = "a number up to 1000000000, 0 for no limit";
const FACTOR_ALLOWED: &str = "a number up to 1000000, 0 for no limit";

/// The limits that are counted in time or over many connections.
#[derive(Clone, Copy, Debug)]
pub struct LimitsConfig {
    /// `HUBCAST_HANDSHAKES_PER_SECOND`
    pub handshakes: Count,
    /// `HUBCAST_HANDSHAKES_PENDING_MAX`
    pub handshakes_pending_max: usize,
    /// `HUBCAST_HANDSHAKES_PER_ADDRESS`
    pub handshakes_per_address: Count,
    /// `HUBCAST_HANDSHAKES_PER_USER`
    pub handshakes_per_user: Count,
    /// `HUBCAST_CONNECTIONS_PER_ADDRESS`; 0: no limit.
    pub connections_per_address: usize,
    /// `HUBCAST_CONNECTIONS_PER_USER`; 0: no limit.
    pub connections_per_user: usize,
    /// `HUBCAST_COMMANDS_PER_SECOND`
    pub commands: Count,
    /// `HUBCAST_PUBLISHES_PER_SECOND`
    pub publishes: Count,
    /// `HUBCAST_PINGS_PER_SECOND`
    pub pings: Count,
    /// `HUBCAST_BAD_REQUESTS_PER_MINUTE`; 0: no limit.
    pub bad_requests_per_minute: usize,
    /// `HUBCAST_BYTES_PER_SECOND`; 0: no limit.
    pub bytes_per_second: usize,
    /// `HUBCAST_CHANNELS_MAX`; 0: no limit.
    pub channels_max: usize,
    /// `HUBCAST_MEMORY_MAX`
    pub memory_max: usize,
    /// What those of a user, of an address and of the instance may do together, by [`Scope`].
    pub together: [Limits; 3],
}

/// What connections may do together; 0: no limit.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// `HUBCAST_RATES_PER_USER`, `_ADDRESS`, `_INSTANCE`: as much as so many connections.
    pub rates: usize,
    /// `HUBCAST_SUBSCRIPTIONS_PER_USER`, `_ADDRESS`, `_INSTANCE`
    pub subscriptions: usize,
    /// `HUBCAST_MEMORY_PER_USER`, `_ADDRESS`; of the instance it is the ledger's.
    pub memory: usize,
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
    /// What each connection may do.
    pub fn allowances(&self) -> Allowances {
        let read_bytes = if self.bytes_per_second == 0 { READ_BYTES } else { self.bytes_per_second / 4 };
        Allowances {
            commands: self.commands.rate(),
            publishes: self.publishes.rate(),
            pings: Rate::new(self.pings.0, SECOND, PINGS_BURST),
            bad_requests: Rate::new(self.bad_requests_per_minute, SECOND * 60, SECOND * 60),
            bytes: Rate::new(self.bytes_per_second, SECOND, SECOND),
            read_bytes: read_bytes.clamp(1, READ_BYTES),
            channels_max: self.channels_max,
        }
    }

    /// What all connections of one user, of one address, or of this instance may do together.
    pub fn bounds(&self, scope: Scope) -> Bounds {
        let Limits { rates, subscriptions, memory } = self.together[scope as usize];
        Bounds {
            scope,
            commands: Count(self.commands.0 * rates).rate(),
            publishes: Count(self.publishes.0 * rates).rate(),
            bytes: Rate::new(self.bytes_per_second * rates, SECOND, SECOND),
            subscriptions_max: subscriptions,
            memory_max: memory,
        }
    }

    pub(crate) fn parse(values: &Values, worker_threads: usize) -> Result<Self, ConfigError> {
        let count = |name| values.get(name, COUNT_ALLOWED, count);
        let factor = |name| values.get(name, FACTOR_ALLOWED, factor);
        let bytes = |name| values.get(name, BYTES_ALLOWED, bytes_or_none);
        let handshakes = values.get("HUBCAST_HANDSHAKES_PER_SECOND", COUNT_ALLOWED, |text| match text {
            "" if values.text("HUBCAST_TLS_CERT").is_empty() => Some(HANDSHAKES_PER_WORKER * worker_threads),
            "" => Some(TLS_HANDSHAKES_PER_WORKER * worker_threads),
            text => self::count(text),
        })?;
        Ok(Self {
            handshakes: Count(handshakes),
            handshakes_pending_max: values.number("HUBCAST_HANDSHAKES_PENDING_MAX")?,
            handshakes_per_address: Count(count("HUBCAST_HANDSHAKES_PER_ADDRESS")?),
            handshakes_per_user: Count(count("HUBCAST_HANDSHAKES_PER_USER")?),
            connections_per_address: count("HUBCAST_CONNECTIONS_PER_ADDRESS")?,
            connections_per_user: count("HUBCAST_CONNECTIONS_PER_USER")?,
            commands: Count(count("HUBCAST_COMMANDS_PER_SECOND")?),
            publishes: Count(count("HUBCAST_PUBLISHES_PER_SECOND")?),
            pings: Count(count("HUBCAST_PINGS_PER_SECOND")?),
            bad_requests_per_minute: count("HUBCAST_BAD_REQUESTS_PER_MINUTE")?,
            bytes_per_second: values.get("HUBCAST_BYTES_PER_SECOND", BYTES_ALLOWED, bytes_or_none)?,
            channels_max: values.get("HUBCAST_CHANNELS_MAX", COUNT_ALLOWED, channels_max)?,
            memory_max: values.get("HUBCAST_MEMORY_MAX", MEMORY_ALLOWED, memory_max)?,
            together: [
                Limits {
                    rates: factor("HUBCAST_RATES_PER_USER")?,
                    subscriptions: count("HUBCAST_SUBSCRIPTIONS_PER_USER")?,
                    memory: bytes("HUBCAST_MEMORY_PER_USER")?,
                },
                Limits {
                    rates: factor("HUBCAST_RATES_PER_ADDRESS")?,
                    subscriptions: count("HUBCAST_SUBSCRIPTIONS_PER_ADDRESS")?,
                    memory: bytes("HUBCAST_MEMORY_PER_ADDRESS")?,
                },
                Limits {
                    rates: factor("HUBCAST_RATES_PER_INSTANCE")?,
                    subscriptions: count("HUBCAST_SUBSCRIPTIONS_PER_INSTANCE")?,
                    memory: 0,
                },
            ],
        })
    }

    /// The effective value of a variable of the limits.
    pub(crate) fn print(&self, name: &str) -> Option<String> {
        Some(match name {
            "HUBCAST_HANDSHAKES_PER_SECOND" => self.handshakes.0.to_string(),
            "HUBCAST_HANDSHAKES_PENDING_MAX" => self.handshakes_pending_max.to_string(),
            "HUBCAST_HANDSHAKES_PER_ADDRESS" => self.handshakes_per_address.0.to_string(),
            "HUBCAST_HANDSHAKES_PER_USER" => self.handshakes_per_user.0.to_string(),
            "HUBCAST_CONNECTIONS_PER_ADDRESS" => self.connections_per_address.to_string(),
            "HUBCAST_CONNECTIONS_PER_USER" => self.connections_per_user.to_string(),
            "HUBCAST_COMMANDS_PER_SECOND" => self.commands.0.to_string(),
            "HUBCAST_PUBLISHES_PER_SECOND" => self.publishes.0.to_string(),
            "HUBCAST_PINGS_PER_SECOND" => self.pings.0.to_string(),
            "HUBCAST_BAD_REQUESTS_PER_MINUTE" => self.bad_requests_per_minute.to_string(),
            "HUBCAST_BYTES_PER_SECOND" => size_or_none(self.bytes_per_second),
            "HUBCAST_CHANNELS_MAX" => self.channels_max.to_string(),
            "HUBCAST_MEMORY_MAX" => size(self.memory_max),
            name => return self.print_together(name),
        })
    }

    fn print_together(&self, name: &str) -> Option<String> {
        let (what, scope) = name.strip_prefix("HUBCAST_")?.split_once("_PER_")?;
        let scope = Scope::LABELS.iter().position(|label| label.eq_ignore_ascii_case(scope))?;
        let limits = &self.together[scope];
        Some(match what {
            "RATES" => limits.rates.to_string(),
            "SUBSCRIPTIONS" => limits.subscriptions.to_string(),
            "MEMORY" => size_or_none(limits.memory),
            _ => return None,
        })
    }
}

fn size_or_none(bytes: usize) -> String {
    if bytes == 0 { "0".to_owned() } else { size(bytes) }
}

fn bytes_or_none(text: &str) -> Option<usize> {
    let bytes = text.parse::<ByteSize>().ok()?.0;
    (bytes == 0 || bytes >= BYTES_MIN).then_some(bytes as usize)
}

/// How many channels may have a subscriber where nobody says it, on a machine with so much memory.
pub fn channels_of(machine_bytes: usize) -> usize {
    (machine_bytes / 4 / CHANNEL_BYTES).min(CHANNELS_MAX)
}

fn channels_max(text: &str) -> Option<usize> {
    match text {
        "" => Some(channels_of(machine_bytes())),
        text => count(text),
    }
}

fn memory_max(text: &str) -> Option<usize> {
    if text.is_empty() {
        return Some(machine_bytes() / 2);
    }
    let bytes = text.parse::<ByteSize>().ok()?.0;
    (bytes >= MEMORY_BYTES_MIN).then_some(bytes as usize)
}

/// The memory of the machine, or of the container (cgroup v2 or v1) if that has less; 2 GiB where nothing says so.
pub(crate) fn machine_bytes() -> usize {
    let machine = fs::read_to_string("/proc/meminfo").ok().and_then(|text| {
        let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
        Some(line.trim().strip_suffix("kB")?.trim().parse::<usize>().ok()? << 10)
    });
    let cgroups = ["/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"];
    let cgroup = |path: &&str| fs::read_to_string(path).ok()?.trim().parse::<usize>().ok();
    machine.into_iter().chain(cgroups.iter().filter_map(cgroup)).min().unwrap_or(2 << 30)
}

fn factor(text: &str) -> Option<usize> {
    count(text).filter(|number| *number <= 1_000_000)
}

fn count(text: &str) -> Option<usize> {
    text.parse().ok().filter(|number| *number <= 1_000_000_000)
}
