//! Where a subscription's subscriber is in its channel: among those who wait, or among the members.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::members::Position;

/// A place in a channel, kept by the subscription.
#[derive(Debug)]
pub enum Ticket {
    /// Joined at once.
    Joined(Position),
    /// Waited for the channel to become live.
    Pending(Arc<Seat>),
}

/// The position of one who waited, written under the channel's lock: among those who wait (its top bit is set),
/// among the members, or nowhere.
#[derive(Debug, Default)]
pub struct Seat(AtomicU64);

/// Marks a seat whose position is among those who wait.
const WAITING: u64 = 1 << 63;

/// It waited and does so no more, and is no member by that.
const NOWHERE: u64 = u64::MAX;

/// Where a subscriber is.
pub(crate) enum Place {
    Joined(Position),
    Waiting(Position),
    Nowhere,
}

impl Seat {
    pub(crate) fn wait_at(&self, position: Position) {
        self.0.store(WAITING | position.to_u64(), Ordering::Relaxed);
    }

    pub(crate) fn join_at(&self, position: Position) {
        self.0.store(position.to_u64(), Ordering::Relaxed);
    }

    pub(crate) fn leave(&self) {
        self.0.store(NOWHERE, Ordering::Relaxed);
    }
}

impl Ticket {
    /// Where the subscriber is now; to be asked under the channel's lock.
    pub(crate) fn place(&self) -> Place {
        match self {
            Self::Joined(position) => Place::Joined(*position),
            Self::Pending(seat) => match seat.0.load(Ordering::Relaxed) {
                NOWHERE => Place::Nowhere,
                seat if seat & WAITING == 0 => Place::Joined(Position::from_u64(seat)),
                seat => Place::Waiting(Position::from_u64(seat & !WAITING)),
            },
        }
    }
}
