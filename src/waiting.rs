//! What waits in the outboxes of those who are slow, added up by user and by address (`HUBCAST_MEMORY_PER_USER`,
//! `_ADDRESS`).
//!
//! The sweep does it, which looks at every connection anyway: a number that each push moves would be met by all cores on
//! the message path. Between two looks every connection has its own bounds.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::hash::Hash;
use std::net::IpAddr;
use std::sync::Arc;

use crate::close::CloseReason;
use crate::connection::Connection;
use crate::guests;
use crate::limits_config::LimitsConfig;
use crate::metrics::{Limit, Scope, Together};
use crate::tab::too_many;

/// Whoever has so many bytes waiting together with others.
#[derive(Debug)]
pub struct Waiting {
    users: Heaps<Box<str>>,
    addresses: Heaps<IpAddr>,
}

#[derive(Debug)]
struct Heaps<K> {
    scope: Scope,
    bytes_max: usize,
    heaps: HashMap<K, Heap>,
}

/// What waits for one user or address.
#[derive(Debug)]
struct Heap {
    bytes: usize,
    /// Whose socket has refused bytes for longest, and since when.
    slowest: (u64, Arc<Connection>),
}

impl Waiting {
    /// Limits as configured.
    pub fn new(limits: &LimitsConfig) -> Self {
        Self { users: Heaps::new(limits, Scope::User), addresses: Heaps::new(limits, Scope::Address) }
    }

    /// Looks at one connection.
    pub fn note(&mut self, connection: &Arc<Connection>) {
        if self.users.bytes_max == 0 && self.addresses.bytes_max == 0 {
            return;
        }
        let Some(since_us) = connection.refused_since_us() else { return };
        self.addresses.note(guests::network(connection.address()), connection, since_us);
        let identity = connection.holder().identity();
        if let Some(user) = identity.as_ref().and_then(|identity| identity.user.clone()) {
            self.users.note(user, connection, since_us);
        }
    }

    /// Of those who have too much waiting together, the slowest go; then all is forgotten until the next look.
    pub fn shed(&mut self) {
        self.users.shed();
        self.addresses.shed();
    }
}

impl<K: Eq + Hash> Heaps<K> {
    fn new(limits: &LimitsConfig, scope: Scope) -> Self {
        Self { scope, bytes_max: limits.bounds(scope).memory_max, heaps: HashMap::new() }
    }

    fn note(&mut self, key: K, connection: &Arc<Connection>, since_us: u64) {
        if self.bytes_max == 0 {
            return;
        }
        let (bytes, this) = (connection.depth().1, (since_us, Arc::clone(connection)));
        match self.heaps.entry(key) {
            Entry::Vacant(vacant) => drop(vacant.insert(Heap { bytes, slowest: this })),
            Entry::Occupied(mut occupied) => {
                let heap = occupied.get_mut();
                heap.bytes += bytes;
                if since_us < heap.slowest.0 {
                    heap.slowest = this;
                }
            }
        }
    }

    fn shed(&mut self) {
        for (_, Heap { bytes, slowest: (_, slowest) }) in self.heaps.drain() {
            if bytes > self.bytes_max {
                slowest.shared().metrics.limited(Limit::Shared(self.scope, Together::Memory));
                slowest.close(CloseReason::Overload(too_many(self.scope, Together::Memory)));
            }
        }
    }
}
