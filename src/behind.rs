//! Channels with history on which a slow consumer fell behind.
//!
//! Where such a channel's rule drops the oldest, the newer ones go with it: once there is room the client is told of a
//! gap, and then what it missed, piece by piece from the history, until it stands where all others do. So it loses only
//! what the history has not any more.

use std::sync::Arc;

use crate::backlog::Backlog;
use crate::cursor::Cursor;
use crate::eviction::{Border, Evictable};
use crate::frame::{Frame, Role};

/// One of them.
#[derive(Debug)]
pub(crate) struct Behind {
    channel: Arc<str>,
    /// The last cursor that the client has, or will have of what is queued.
    at: Cursor,
    /// It was told of the gap.
    is_told: bool,
    /// What it missed was asked for.
    is_asked: bool,
}

/// What is told next of a channel on which a client is behind.
#[derive(Debug)]
pub struct Backfill<'a> {
    /// The channel.
    pub channel: &'a str,
    /// Where the client stands: one that stands elsewhere by now has no use for this.
    pub at: Cursor,
    /// The gap that comes first if the client was told of none; absent where `frames` begin with one.
    pub gap: Option<Arc<Frame>>,
    /// What it missed, oldest first.
    pub frames: &'a [Arc<Frame>],
    /// How many of them are events.
    pub events: usize,
    /// Where it stands then, if it is still behind.
    pub then: Option<Cursor>,
}

impl Backlog {
    /// Whether the client is told nothing of this now.
    pub(crate) fn is_withheld(&self, frame: &Frame) -> bool {
        let Some(telling) = &self.telling else { return false };
        let Role::Event(event) = frame.role() else { return false };
        telling.behind.iter().any(|behind| behind.channel == event.channel)
    }

    /// Drops what waits of a channel from a place on, to be told later from the history. Returns how many messages that
    /// are; `None` if that cannot be.
    pub(crate) fn fall_behind(&mut self, from: usize, event: &Evictable) -> Option<usize> {
        let border = Border::of(&event.channel);
        let is_border = |frame: &Arc<Frame>| matches!(frame.role(), Role::Border(other) if *other == border);
        // What waits for a new subscription has nothing to do with this one.
        if !event.is_kept() || self.frames.iter().skip(from).any(is_border) {
            return None;
        }
        let at = self.position(from, event)?;
        let frames = std::mem::take(&mut self.frames);
        self.forget_counts();
        let mut dropped = 0;
        for (place, frame) in frames.into_iter().enumerate() {
            match frame.role() {
                Role::Event(other) if place >= from && other.channel == event.channel => dropped += frame.messages(),
                Role::Gap(loss) if place >= from && loss.channel == event.channel => {}
                _ => self.insert(self.frames.len(), frame),
            }
            if place == 0 {
                self.begin_head(self.head_sent);
            }
        }
        let telling = self.telling.get_or_insert_default();
        telling.behind.retain(|behind| behind.channel != event.channel);
        let channel = Arc::clone(&event.channel);
        telling.behind.push(Behind { channel, at, is_told: false, is_asked: false });
        telling.is_stalled = true;
        Some(dropped)
    }

    /// After this frame, a subscription that begins or ends with it is not behind any more.
    pub(crate) fn begin_anew(&mut self, frame: &Frame) {
        if let Some(telling) = &mut self.telling
            && let Role::Border(border) = frame.role()
        {
            telling.behind.retain(|behind| Border::of(&behind.channel) != *border);
        }
    }

    /// The socket took something.
    pub(crate) fn made_progress(&mut self) {
        if let Some(telling) = &mut self.telling {
            telling.is_stalled = false;
        }
    }

    /// The channels on which a client that reads is behind and what it missed was not asked for, and where it stands there.
    pub(crate) fn ask_missed(&mut self) -> Vec<(Arc<str>, Cursor)> {
        let telling = self.telling.as_mut().filter(|telling| !telling.is_stalled);
        let behind = telling.into_iter().flat_map(|telling| &mut telling.behind);
        let unasked = behind.filter(|behind| !behind.is_asked);
        unasked
            .map(|behind| {
                behind.is_asked = true;
                (Arc::clone(&behind.channel), behind.at)
            })
            .collect()
    }

    /// Whether the client is behind anywhere.
    pub(crate) fn is_behind(&self) -> bool {
        self.telling.as_ref().is_some_and(|telling| !telling.behind.is_empty())
    }

    /// Queues what a client missed. False if it stands elsewhere by now.
    pub(crate) fn backfill(&mut self, backfill: &Backfill<'_>) -> bool {
        let Some(telling) = &mut self.telling else { return false };
        let is_it = |behind: &Behind| *behind.channel == *backfill.channel;
        let Some(place) = telling.behind.iter().position(is_it) else { return false };
        let behind = &mut telling.behind[place];
        if behind.at != backfill.at {
            return false;
        }
        behind.is_asked = false;
        let is_told = std::mem::replace(&mut behind.is_told, true);
        match backfill.then {
            Some(then) => behind.at = then,
            None => drop(telling.behind.swap_remove(place)),
        }
        let gap = backfill.gap.iter().filter(|_| !is_told);
        gap.chain(backfill.frames).for_each(|frame| self.push(Arc::clone(frame)));
        true
    }
}
