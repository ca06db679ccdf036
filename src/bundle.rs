//! Publications to one channel that arrive in a row, gathered to be pushed together.
//!
//! A subscriber's lock is taken once for all of them, and its outbox holds one entry: what a publication in
//! a burst costs each subscriber is the copy into the socket. A bundle waits for nothing: it is delivered
//! before anything else happens, at the latest when what was read is carried out.

use std::sync::Arc;

use arrayvec::ArrayVec;

use crate::frame::Frame;
use crate::outbox::Limits;
use crate::publication::{Payload, Publication};

/// Most publications of a bundle.
const PUBLICATIONS_MAX: usize = 64;

/// Most payload bytes of a bundle: pings and closes wait until a bundle that was begun is out.
const BYTES_MAX: usize = 16 << 10;

/// Larger payloads (bytes) go alone: copying them costs more than the lock.
const PAYLOAD_BYTES_MAX: usize = 4 << 10;

/// An outbox may be above its bounds by a bundle, so a bundle is at most this part of them.
const PART_OF_LIMITS: usize = 8;

/// Publications to one channel that wait to be delivered.
#[derive(Debug, Default)]
pub struct Bundle {
    channel: String,
    payloads: Vec<u8>,
    /// Where each payload ends, and whether it is JSON that a parser has accepted.
    ends: Vec<(usize, bool)>,
    /// What their publisher is told after they are delivered.
    pub answers: Vec<Arc<Frame>>,
}

impl Bundle {
    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// Whether a payload is small enough to be bundled.
    pub fn is_for(payload: Payload<'_>) -> bool {
        payload.bytes().len() <= PAYLOAD_BYTES_MAX
    }

    /// Whether a publication can join those that wait.
    pub fn has_room(&self, channel: &str, payload: Payload<'_>, limits: &Limits) -> bool {
        let bytes = self.payloads.len() + payload.bytes().len();
        self.is_empty()
            || self.channel == channel
                && self.ends.len() < PUBLICATIONS_MAX.min(limits.messages / PART_OF_LIMITS)
                && bytes <= BYTES_MAX.min(limits.bytes / PART_OF_LIMITS)
    }

    /// Adds a publication that it has room for.
    pub fn add(&mut self, channel: &str, payload: Payload<'_>) {
        if self.is_empty() {
            self.channel.push_str(channel);
        }
        self.payloads.extend_from_slice(payload.bytes());
        self.ends.push((self.payloads.len(), matches!(payload, Payload::Json(_))));
    }

    /// Hands over what waits, if anything does, and is empty afterwards.
    pub fn deliver(&mut self, deliver: impl FnOnce(&Publication<'_>)) {
        if self.is_empty() {
            return;
        }
        let mut start = 0;
        let payloads: ArrayVec<_, PUBLICATIONS_MAX> = self
            .ends
            .iter()
            .map(|(end, is_json)| {
                let bytes = &self.payloads[std::mem::replace(&mut start, *end)..*end];
                match str::from_utf8(bytes) {
                    Ok(text) if *is_json => Payload::Json(text),
                    _ => Payload::Unchecked(bytes),
                }
            })
            .collect();
        deliver(&Publication::new(&self.channel, &payloads));
        drop(payloads);
        self.channel.clear();
        self.payloads.clear();
        self.ends.clear();
    }
}
