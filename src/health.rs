//! Whether the gateway is ready, and what keeps it from being so.

use std::sync::atomic::{AtomicBool, Ordering};

use crate::metrics::Link;

/// The conditions of `/readyz`.
#[derive(Debug)]
pub struct Health {
    redis_up: [AtomicBool; 2],
    draining: AtomicBool,
}

impl Health {
    /// Not draining; with Redis, not ready before both of its links are up.
    pub fn new(with_redis: bool) -> Self {
        Self { redis_up: [(); 2].map(|()| AtomicBool::new(!with_redis)), draining: AtomicBool::new(false) }
    }

    /// Notes that one of the Redis links came up or was lost. Messages do not need the registry's.
    pub fn redis(&self, link: Link, is_up: bool) {
        if let Some(link) = self.redis_up.get(link as usize) {
            link.store(is_up, Ordering::Relaxed);
        }
    }

    /// Whether both Redis links are up; true without Redis.
    pub fn is_redis_up(&self) -> bool {
        self.redis_up.iter().all(|link| link.load(Ordering::Relaxed))
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
        let conditions = [(!self.is_redis_up(), "redis"), (self.is_draining(), "draining")];
        conditions.into_iter().filter_map(|(is_missing, name)| is_missing.then_some(name)).collect()
    }
}
