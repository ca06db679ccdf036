//! How far a client that lost something was told: what the queue alone does not show any more.
//!
//! Where it stands on a channel is not where the channel stood before the event that comes next, if that was lost.

use std::sync::Arc;

use crate::backlog::Load;
use crate::behind::Behind;
use crate::cursor::Cursor;
use crate::eviction::Border;
use crate::frame::{Frame, Role};

/// Kept beside a queue from the first loss on: on channels with history as long as the subscription.
#[derive(Debug, Default)]
pub struct Telling {
    /// Gaps in the queue.
    pub(crate) gaps: Load,
    /// Of these, those on channels with history behind which no event has come yet.
    pub(crate) open: usize,
    /// The channels on which the client was told a gap.
    told: Vec<Told>,
    /// The same before what a writer has in hand.
    before_write: Vec<Told>,
    /// The channels on which it is behind, and told nothing.
    pub(crate) behind: Vec<Behind>,
    /// It has taken nothing since it fell behind.
    pub(crate) is_stalled: bool,
}

/// One channel with history on which a gap is sent, or begun.
#[derive(Clone, Debug)]
struct Told {
    channel: Arc<str>,
    /// The last cursor that the client has.
    at: Option<Cursor>,
    /// The event that the gap names: it has to follow.
    next: Option<Cursor>,
}

impl Telling {
    /// Where the client stands on a channel by what left the queue, if that is not where the channel stood.
    pub(crate) fn position(&self, channel: &str) -> Option<Cursor> {
        self.told.iter().find(|told| *told.channel == *channel)?.at
    }

    /// The events that gaps have promised.
    pub(crate) fn promised(&self) -> impl Iterator<Item = (&Arc<str>, Cursor)> {
        self.told.iter().filter_map(|told| Some((&told.channel, told.next?)))
    }

    /// A writer takes these: most likely it sends them.
    pub(crate) fn take(&mut self, frames: &[Arc<Frame>]) {
        self.before_write.clone_from(&self.told);
        self.pass(frames);
    }

    /// The writer sent, or began, no more than these.
    pub(crate) fn put_back(&mut self, sent: &[Arc<Frame>]) {
        self.told = std::mem::take(&mut self.before_write);
        self.pass(sent);
    }

    /// Whether nothing is left to know once everything is sent.
    pub(crate) fn is_over(&self) -> bool {
        self.told.is_empty() && self.behind.is_empty()
    }

    fn pass(&mut self, frames: &[Arc<Frame>]) {
        for frame in frames {
            match frame.role() {
                Role::Gap(loss) => {
                    self.told.retain(|told| told.channel != loss.channel);
                    let (at, next) = (loss.gap.after, loss.gap.next);
                    if at.is_some() || next.is_some() {
                        self.told.push(Told { channel: Arc::clone(&loss.channel), at, next });
                    }
                }
                Role::Event(event) => {
                    if let Some(told) = self.told.iter_mut().find(|told| told.channel == event.channel) {
                        told.at = event.last.or(told.at);
                        told.next = None;
                    }
                }
                Role::Border(border) => self.told.retain(|told| *border != Border::of(&told.channel)),
                Role::Plain => {}
            }
        }
    }
}
