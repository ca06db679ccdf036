//! Messages of channels whose readers are behind: they wait here, so that the link and its other channels go on.
//!
//! A channel is parked when a message comes while one of its subscribers has no room, until all have room again or are
//! closed: as long as one connection may hold publishers up (`outbox_state.rs`). Policy when full: a message is
//! dropped, counted, and its channel told a gap exactly where it was; other channels lose nothing by it.

use std::collections::{HashMap, VecDeque};

/// Messages of all channels that can wait, and their bytes: as many as in the inbox.
const MESSAGES_MAX: usize = 1 << 16;
const BYTES_MAX: usize = 64 << 20;

/// What waits of one link.
#[derive(Debug, Default)]
pub struct Parked {
    channels: HashMap<Vec<u8>, VecDeque<Parcel>>,
    messages: usize,
    bytes: usize,
    dropped: usize,
    fence: Option<u64>,
}

/// Something that waits.
#[derive(Debug, PartialEq, Eq)]
pub enum Parcel {
    /// A message.
    Message(Vec<u8>),
    /// Messages are missing here.
    Gap,
}

impl Parked {
    /// Whether no channel is parked.
    pub fn is_empty(&self) -> bool {
        self.channels.is_empty()
    }

    /// Whether a Redis channel is parked: what comes for it waits behind what is here.
    pub fn holds(&self, channel: &[u8]) -> bool {
        !self.is_empty() && self.channels.contains_key(channel)
    }

    /// The channels that are parked.
    pub fn channels(&self) -> Vec<Vec<u8>> {
        self.channels.keys().cloned().collect()
    }

    /// Has a message wait, behind those of its channel that do.
    pub fn push(&mut self, channel: Vec<u8>, message: Vec<u8>) {
        if self.messages >= MESSAGES_MAX || self.bytes + message.len() > BYTES_MAX {
            self.dropped += 1;
            return self.miss(channel);
        }
        self.messages += 1;
        self.bytes += message.len();
        self.channels.entry(channel).or_default().push_back(Parcel::Message(message));
    }

    /// Something is missing behind what waits of a channel.
    pub fn miss(&mut self, channel: Vec<u8>) {
        let waiting = self.channels.entry(channel).or_default();
        if waiting.back() != Some(&Parcel::Gap) {
            waiting.push_back(Parcel::Gap);
        }
    }

    /// What is next of a channel. After the last it is parked no more.
    pub fn pop(&mut self, channel: &[u8]) -> Option<Parcel> {
        let waiting = self.channels.get_mut(channel)?;
        let parcel = waiting.pop_front();
        if waiting.is_empty() {
            self.channels.remove(channel);
        }
        if let Some(Parcel::Message(message)) = &parcel {
            self.messages -= 1;
            self.bytes -= message.len();
        }
        parcel
    }

    /// Drops what waits of a channel.
    pub fn forget(&mut self, channel: &[u8]) {
        while let Some(parcel) = self.pop(channel) {
            self.dropped += usize::from(parcel != Parcel::Gap);
        }
    }

    /// How many messages were dropped since the last call.
    pub fn take_dropped_count(&mut self) -> usize {
        std::mem::take(&mut self.dropped)
    }

    /// A fence came back: it stands for what waits, too.
    pub fn keep_fence(&mut self, number: u64) {
        self.fence = Some(number);
    }

    /// The fence that has passed, once nothing waits.
    pub fn take_fence(&mut self) -> Option<u64> {
        self.fence.take_if(|_| self.channels.is_empty())
    }
}
