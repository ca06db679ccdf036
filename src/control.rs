//! What goes through our own control channel at a Redis server: probes and fences of the multiplexer, and
//! envelopes of other instances (`cluster.rs`).

use std::time::Duration;

use tokio::time::Instant;

use crate::clock;

/// Probes that may be missing before the link is dead.
const PROBES_MISSED_MAX: u32 = 2;

/// What came back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Control {
    /// JSON of another instance.
    Envelope,
    /// A fence of one server.
    Fence {
        /// The place of the server.
        server: usize,
        /// The fence's number.
        number: u64,
    },
    /// A probe of one server.
    Probe {
        /// The place of the server.
        server: usize,
        /// When it left (us, [`clock::now_us`]).
        sent_us: u64,
    },
}

/// A fence's payload.
pub fn fence(server: usize, number: u64) -> String {
    format!("fence:{server}:{number}")
}

/// Reads a payload of a control channel.
pub fn read(payload: &[u8]) -> Option<Control> {
    if payload.starts_with(b"{") {
        return Some(Control::Envelope);
    }
    let mut parts = str::from_utf8(payload).ok()?.split(':');
    let (kind, server, number) = (parts.next()?, parts.next()?.parse().ok()?, parts.next()?.parse().ok()?);
    match kind {
        "fence" => Some(Control::Fence { server, number }),
        "probe" => Some(Control::Probe { server, sent_us: number }),
        _ => None,
    }
}

/// The end-to-end health check of one link: what it publishes to itself comes back, or the link is dead.
#[derive(Debug)]
pub struct Probe {
    server: usize,
    interval: Duration,
    next: Instant,
    is_outstanding: bool,
    missed: u32,
}

/// What is to be done about the probe now.
#[derive(Debug, PartialEq, Eq)]
pub enum Probing {
    /// Nothing yet.
    Rest,
    /// Publish this.
    Send(String),
    /// Too many are missing.
    Dead,
}

impl Probe {
    /// The first one is due at once.
    pub fn new(server: usize, interval: Duration) -> Self {
        Self { server, interval, next: Instant::now(), is_outstanding: false, missed: 0 }
    }

    /// When the next one is due.
    pub fn next(&self) -> Instant {
        self.next
    }

    /// Looks whether one is due, and counts it as sent.
    pub fn due(&mut self) -> Probing {
        if Instant::now() < self.next {
            return Probing::Rest;
        }
        self.missed += u32::from(self.is_outstanding);
        if self.missed >= PROBES_MISSED_MAX {
            return Probing::Dead;
        }
        self.is_outstanding = true;
        self.next = Instant::now() + self.interval;
        Probing::Send(format!("probe:{}:{}", self.server, clock::now_us()))
    }

    /// One came back: the link lives.
    pub fn came_back(&mut self) {
        self.is_outstanding = false;
        self.missed = 0;
    }
}
