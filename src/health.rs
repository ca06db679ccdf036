//! Whether the gateway is ready, and what keeps it from being so.

use std::sync::atomic::{AtomicBool, Ordering};

/// The conditions of `/readyz`.
#[derive(Debug)]
pub struct Health {
    is_redis_up: AtomicBool,
    has_keys: AtomicBool,
    draining: AtomicBool,
}

impl Health {
    /// Not draining; with Redis, not ready before a server can be published to and listened to, and not before keys
    /// are there that have to be fetched.
    pub fn new(with_redis: bool, with_jwks: bool) -> Self {
        Self {
            is_redis_up: AtomicBool::new(!with_redis),
            has_keys: AtomicBool::new(!with_jwks),
            draining: AtomicBool::new(false),
        }
    }

    /// Notes that the keys of tokens were fetched: from now on some are known.
    pub fn keys_are_there(&self) {
        self.has_keys.store(true, Ordering::Relaxed);
    }

    /// Notes whether any Redis server is usable. Messages do not need the registry's link.
    pub fn redis(&self, is_up: bool) {
        self.is_redis_up.store(is_up, Ordering::Relaxed);
    }

    /// From now on the gateway drains.
    pub fn start_draining(&self) {
        self.draining.store(true, Ordering::Relaxed);
    }

    /// Whether the gateway drains.
    pub fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Relaxed)
    }

    /// What is not ready, by name.
    pub fn not_ready(&self) -> Vec<&'static str> {
        let conditions = [
            (!self.is_redis_up.load(Ordering::Relaxed), "redis"),
            (!self.has_keys.load(Ordering::Relaxed), "jwks"),
            (self.is_draining(), "draining"),
        ];
        conditions.into_iter().filter_map(|(is_missing, name)| is_missing.then_some(name)).collect()
    }
}
