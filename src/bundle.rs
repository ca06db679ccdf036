//! Publications to one channel that wait to be pushed together.
//!
//! A subscriber's lock is taken once for all of them, and its outbox holds one entry: what a publication in
//! a burst costs each subscriber is the copy into the socket. How long they wait is `channel.rs`'s.

use std::time::Duration;

use crate::cursor::Cursor;
use crate::outbox::Limits;
use crate::publication::{Message, Payload};

/// Most publications of a bundle, and most payload bytes: pings and closes wait until one that was begun is out.
const PUBLICATIONS_MAX: usize = 64;
const BYTES_MAX: usize = 16 << 10;

/// Larger payloads (bytes) go alone: copying them costs more than the lock.
const PAYLOAD_BYTES_MAX: usize = 4 << 10;

/// How long publications of a channel wait for others, and how many.
#[derive(Clone, Copy, Debug)]
pub struct Gathering {
    /// Zero: only until whoever is ready to publish has done so.
    pub window: Duration,
    publications_max: usize,
    bytes_max: usize,
}

impl Gathering {
    /// Bounds that fit an outbox: it may be above its own by one bundle. A channel that coalesces gathers what
    /// the window brings, up to half an outbox.
    pub fn new(window: Duration, outbox: &Limits) -> Self {
        match window.is_zero() {
            true => Self {
                window,
                publications_max: PUBLICATIONS_MAX.min(outbox.messages / 8),
                bytes_max: BYTES_MAX.min(outbox.bytes / 8),
            },
            false => Self { window, publications_max: outbox.messages / 2, bytes_max: outbox.bytes / 2 },
        }
    }
}

/// Publications that wait.
#[derive(Debug, Default)]
pub struct Bundle {
    bytes: Vec<u8>,
    parts: Vec<Part>,
    /// Where the channel stood before the first of them.
    pub before: Option<Cursor>,
}

/// One of them.
#[derive(Debug)]
struct Part {
    /// Where its payload ends.
    end: usize,
    /// Whether that is JSON that a parser has accepted.
    is_json: bool,
    cursor: Option<Cursor>,
}

impl Bundle {
    /// Whether a payload is small enough to wait for others.
    pub fn is_for(payload: Payload<'_>) -> bool {
        payload.bytes().len() <= PAYLOAD_BYTES_MAX
    }

    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.parts.is_empty()
    }

    /// Whether a publication can join those that wait.
    pub fn has_room(&self, payload: Payload<'_>, gathering: &Gathering) -> bool {
        self.is_empty()
            || self.parts.len() < gathering.publications_max
                && self.bytes.len() + payload.bytes().len() <= gathering.bytes_max
    }

    /// Adds a publication to a channel that stood there before.
    pub fn add(&mut self, message: Message<'_>, before: Option<Cursor>) {
        if self.is_empty() {
            self.before = before;
        }
        let Message { payload, cursor } = message;
        self.bytes.extend_from_slice(payload.bytes());
        self.parts.push(Part { end: self.bytes.len(), is_json: matches!(payload, Payload::Json(_)), cursor });
    }

    /// The publications in their order.
    pub fn messages(&self) -> Vec<Message<'_>> {
        let mut start = 0;
        let message = |part: &Part| {
            let bytes = &self.bytes[std::mem::replace(&mut start, part.end)..part.end];
            let payload = match str::from_utf8(bytes) {
                Ok(text) if part.is_json => Payload::Json(text),
                _ => Payload::Unchecked(bytes),
            };
            Message { payload, cursor: part.cursor }
        };
        self.parts.iter().map(message).collect()
    }
}
