//! A fence through Redis: everything that was published before it has been delivered here after it.
//!
//! A publish is answered when Redis has it, which may be a moment before it arrives on the listening
//! link. A drain must not close a reader in that moment.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::{Notify, watch};

/// A fence that takes longer than this is given up: Redis is not there, and nothing more will come.
const FENCE_TIMEOUT: Duration = Duration::from_millis(500);

/// Asks the multiplexer for fences.
#[derive(Debug, Default)]
pub struct Fence {
    asked: AtomicU64,
    ask: Notify,
    passed: watch::Sender<u64>,
}

impl Fence {
    /// Waits until what was published before this call is in the outboxes, within half a second.
    pub async fn pass(&self) {
        let number = self.asked.fetch_add(1, Ordering::AcqRel) + 1;
        let mut passed = self.passed.subscribe();
        self.ask.notify_one();
        let _ = tokio::time::timeout(FENCE_TIMEOUT, passed.wait_for(|passed| *passed >= number)).await;
    }

    /// For the multiplexer: waits until a fence is asked for; the number to send through Redis.
    pub async fn asked(&self) -> u64 {
        self.ask.notified().await;
        self.asked.load(Ordering::Acquire)
    }

    /// For the multiplexer: the number came back, after everything before it.
    pub fn came_back(&self, number: u64) {
        self.passed.send_if_modified(|passed| {
            let is_newer = number > *passed;
            *passed = number.max(*passed);
            is_newer
        });
    }
}
