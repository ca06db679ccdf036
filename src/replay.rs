//! What subscribers are sent of the past, encoded once however many they are.

use std::collections::HashMap;
use std::sync::Arc;

use crate::cursor::Cursor;
use crate::event;
use crate::frame::Frame;
use crate::history_view::Told;
use crate::publication::{Message, Payload};

/// The frames made of one read, for one channel.
#[derive(Debug)]
pub struct Replays<'a> {
    channel: &'a str,
    events: HashMap<Cursor, Arc<Frame>>,
    /// Those who stood at the same place get the same: by the address of what they are told.
    lists: HashMap<*const Told, Frames>,
}

/// What is told, kept so that its address stays its own, and the frames of that.
type Frames = (Arc<[Told]>, Arc<[Arc<Frame>]>);

impl<'a> Replays<'a> {
    /// None yet.
    pub fn new(channel: &'a str) -> Self {
        Self { channel, events: HashMap::new(), lists: HashMap::new() }
    }

    /// The frames of what is told.
    pub fn frames(&mut self, told: &Arc<[Told]>) -> Arc<[Arc<Frame>]> {
        if told.is_empty() {
            return Arc::new([]);
        }
        if let Some((_, frames)) = self.lists.get(&told.as_ptr()) {
            return Arc::clone(frames);
        }
        let frames: Arc<[_]> = told.iter().map(|told| self.frame(told)).collect();
        self.lists.insert(told.as_ptr(), (Arc::clone(told), Arc::clone(&frames)));
        frames
    }

    fn frame(&mut self, told: &Told) -> Arc<Frame> {
        match told {
            Told::Gap(gap) => event::gap(self.channel, gap),
            Told::Event { cursor, payload } => {
                let message = Message { payload: Payload::Unchecked(payload), cursor: Some(*cursor) };
                let encode = || event::replayed(self.channel, &message);
                Arc::clone(self.events.entry(*cursor).or_insert_with(encode))
            }
        }
    }
}
