//! What happens before memory ends (`HUBCAST_MEMORY_MAX`): first nobody new comes in and nothing is published here,
//! then those go whose sockets have refused bytes for longest.
//!
//! What is held is the ledger's; one task looks at it, so that the message path only ever reads a flag.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tracing::warn;

use crate::clock;
use crate::close::CloseReason;
use crate::connection::{Connection, Shared};
use crate::ledger;
use crate::protocol::{ErrorCode, Refusal};

/// How often the ledger is looked at: at 1 GB/s that is 20 MB.
const INTERVAL: Duration = Duration::from_millis(20);

/// How long (µs) it may be tight without getting worse before somebody has to go.
const TIGHT_US_MAX: u64 = 1_000_000;

/// The memory that frames and what is arriving may take.
#[derive(Debug)]
pub struct Memory {
    bytes_max: usize,
    is_tight: AtomicBool,
}

impl Memory {
    /// At most so many bytes.
    pub fn new(bytes_max: usize) -> Self {
        Self { bytes_max, is_tight: AtomicBool::new(false) }
    }

    /// Whether three quarters of it are taken.
    pub fn is_tight(&self) -> bool {
        self.is_tight.load(Ordering::Relaxed)
    }

    /// Whether what arrives from clients takes more than a quarter: whoever adds to it has to go.
    pub fn is_arriving_too_much(&self) -> bool {
        ledger::arriving_bytes() > self.bytes_max / 4
    }

    /// Refuses a publication while memory is tight.
    ///
    /// # Errors
    /// `unavailable`
    pub fn check(&self) -> Result<(), Refusal> {
        if !self.is_tight() {
            return Ok(());
        }
        let message = "too much waits for slow clients, nothing was sent";
        Err(Refusal { retry_after_ms: Some(1000), ..Refusal::new(ErrorCode::Unavailable, message) })
    }

    fn soft(&self) -> usize {
        self.bytes_max / 4 * 3
    }

    fn hard(&self) -> usize {
        self.bytes_max / 8 * 7
    }
}

/// Looks at the ledger for ever, and sheds when it must.
pub async fn watch(shared: Arc<Shared>) {
    let memory = &shared.memory;
    let mut tight_since_us = None;
    loop {
        tokio::time::sleep(INTERVAL).await;
        let used = ledger::frame_bytes() + ledger::arriving_bytes();
        let is_tight = used > memory.soft();
        if is_tight != memory.is_tight.swap(is_tight, Ordering::Relaxed) {
            warn!(used, bytes_max = memory.bytes_max, is_tight, "memory for what waits");
        }
        let now_us = clock::now_us();
        let since_us = *tight_since_us.get_or_insert(now_us);
        if !is_tight {
            tight_since_us = None;
        } else if used > memory.hard() || now_us - since_us > TIGHT_US_MAX {
            // Somewhat below the limit, or the next publication would be refused again.
            shed(&shared, used - memory.soft() / 8 * 7);
        }
    }
}

/// Closes those whose sockets have refused bytes for longest, until what waits for them alone would free this much.
/// Frames that others hold too are freed with the last of them: then the next look closes more.
fn shed(shared: &Shared, excess: usize) {
    let refused = |connection: &Arc<Connection>| Some((connection.refused_since_us()?, Arc::clone(connection)));
    let mut slow: Vec<_> = shared.connections.iter().filter_map(|connection| refused(&connection)).collect();
    slow.sort_unstable_by_key(|(since_us, _)| *since_us);
    let mut freed = 0;
    for (_, connection) in slow {
        if freed >= excess {
            return;
        }
        freed += connection.depth().1;
        connection.close(CloseReason::Overload("out of memory for slow clients, come back later"));
    }
}
