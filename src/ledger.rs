//! What waits in this process, in bytes: one number for all frames, one for what is arriving.
//!
//! A frame is counted when it is made and when its last holder lets it go, however many outboxes share it: two
//! additions a publication, on counters that cores do not share. It is the process's, as its memory is.

use std::ops::Deref;
use std::sync::atomic::{AtomicUsize, Ordering};

use prometheus_client::metrics::counter::Atomic as _;

use crate::sharded::Sharded;

/// What a frame takes beside its bytes: itself, its counts, and what the allocator rounds up.
const FRAME_BYTES: u64 = 128;

static FRAMES: Sharded = Sharded::new();

static ARRIVING: AtomicUsize = AtomicUsize::new(0);

/// Bytes of frames that somebody holds.
pub fn frame_bytes() -> usize {
    // A shard that only saw frames go is below zero; together they are not, but for a moment.
    (FRAMES.get() as i64).max(0) as usize
}

/// Bytes that came from clients and are not carried out yet: parts of messages, and what waits.
pub fn arriving_bytes() -> usize {
    ARRIVING.load(Ordering::Relaxed)
}

/// Bytes of a frame, counted as long as they are kept.
#[derive(Debug)]
pub struct Kept(Box<[u8]>);

impl From<Vec<u8>> for Kept {
    fn from(bytes: Vec<u8>) -> Self {
        FRAMES.inc_by(bytes.len() as u64 + FRAME_BYTES);
        Self(bytes.into_boxed_slice())
    }
}

impl Deref for Kept {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        FRAMES.inc_by((self.0.len() as u64 + FRAME_BYTES).wrapping_neg());
    }
}

/// What one connection has among the bytes that arrive.
#[derive(Debug, Default)]
pub struct Arriving(usize);

impl Arriving {
    /// It is so much now. True: that is more than before.
    pub fn set(&mut self, bytes: usize) -> bool {
        let before = std::mem::replace(&mut self.0, bytes);
        match bytes.checked_sub(before) {
            Some(0) => {}
            Some(more) => drop(ARRIVING.fetch_add(more, Ordering::Relaxed)),
            None => drop(ARRIVING.fetch_sub(before - bytes, Ordering::Relaxed)),
        }
        bytes > before
    }
}

impl Drop for Arriving {
    fn drop(&mut self) {
        self.set(0);
    }
}
