//! What all connections of a gateway share.

use std::sync::Arc;

use dashmap::DashMap;

use crate::connection::Connection;
use crate::fanout::Fanout;
use crate::lanes::Lanes;
use crate::memory::Memory;
use crate::metrics::Metrics;
use crate::outbox;
use crate::presence::Presence;
use crate::registry::Registry;

/// What all connections share.
#[derive(Debug)]
pub struct Shared {
    /// Bounds of every outbox.
    pub outbox: outbox::Limits,
    /// Who flushes.
    pub lanes: Arc<Lanes>,
    /// The metrics.
    pub metrics: Metrics,
    /// What may wait in all.
    pub memory: Memory,
    /// All open connections.
    pub connections: Connections,
    /// This boot of this instance: 16 hexadecimal digits.
    pub instance_id: Box<str>,
    /// When it booted, in milliseconds since 1970.
    pub started_at_ms: u64,
    /// Where connections are known to other instances; with Redis only.
    pub registry: Option<Arc<Registry>>,
    /// Who is in channels that have presence.
    pub presence: Presence,
}

impl Shared {
    /// Has the registry look at a connection.
    pub(crate) fn register(&self, number: u64) {
        if let Some(registry) = &self.registry {
            registry.note(number);
        }
    }

    /// Sets in motion what a fan-out came to; returns the connections that were late: the caller publishes no
    /// more until [`Lanes::room`] returns.
    pub fn submit(&self, fanout: &mut Fanout<Arc<Connection>>) -> Vec<Arc<Connection>> {
        self.metrics.fanned_out(fanout);
        self.lanes.submit(fanout)
    }
}

/// All open connections by number.
pub type Connections = DashMap<u64, Arc<Connection>>;
