//! The frames that wait in an outbox, and how much of its bounds they take.

use std::collections::VecDeque;
use std::collections::vec_deque::Drain;
use std::sync::Arc;

use crate::frame::Frame;

/// A queue of frames, the first of which may be partly sent.
#[derive(Debug, Default)]
pub struct Backlog {
    frames: VecDeque<Arc<Frame>>,
    /// Bytes of the first frame that are sent already.
    head_sent: usize,
    all: Load,
    /// Of these, frames of the past: they do not count against the bounds.
    replays: Load,
}

/// Messages, of which a bundle has several, and their unsent bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Load {
    /// How many messages.
    pub messages: usize,
    /// Their unsent bytes.
    pub bytes: usize,
}

impl Backlog {
    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.frames.is_empty()
    }

    /// How many frames wait.
    pub fn len(&self) -> usize {
        self.frames.len()
    }

    /// Frames that count against the bounds; one of the past is a message.
    pub fn counted_frames(&self) -> usize {
        self.frames.len() - self.replays.messages
    }

    /// The first frame, and how much of it is sent.
    pub fn head(&self) -> Option<(&Arc<Frame>, usize)> {
        self.frames.front().map(|head| (head, self.head_sent))
    }

    /// Everything.
    pub fn load(&self) -> Load {
        self.all
    }

    /// What counts against the bounds.
    pub fn counted(&self) -> Load {
        Load { messages: self.all.messages - self.replays.messages, bytes: self.all.bytes - self.replays.bytes }
    }

    /// Unsent bytes of the past.
    pub fn replay_bytes(&self) -> usize {
        self.replays.bytes
    }

    /// Messages of the first frame that are sent completely.
    pub fn head_complete(&self) -> usize {
        self.frames.front().map_or(0, |head| head.messages() - head.messages_after(self.head_sent))
    }

    /// One more.
    pub fn push(&mut self, frame: Arc<Frame>) {
        self.count(&frame);
        self.frames.push_back(frame);
    }

    /// Puts back what was taken and not sent; `head_sent` bytes of the first frame were.
    pub fn put_back(&mut self, unsent: &[Arc<Frame>], head_sent: usize) {
        for frame in unsent.iter().rev() {
            self.count(frame);
            self.frames.push_front(Arc::clone(frame));
        }
        self.begin_head(head_sent);
    }

    /// Takes the first frame if a part of it is sent, with how much.
    pub fn take_begun(&mut self) -> (Option<Arc<Frame>>, usize) {
        let head_sent = std::mem::take(&mut self.head_sent);
        (if head_sent > 0 { self.frames.pop_front() } else { None }, head_sent)
    }

    /// Takes frames, at most so many. Called after [`Backlog::take_begun`]: no frame is partly sent.
    pub fn take(&mut self, most: usize) -> Drain<'_, Arc<Frame>> {
        let count = most.min(self.frames.len());
        (self.all, self.replays) = Default::default();
        for at in count..self.frames.len() {
            let frame = Arc::clone(&self.frames[at]);
            self.count(&frame);
        }
        self.frames.drain(..count)
    }

    /// Leaves only the message of which a part is sent; returns how many messages that drops.
    pub fn keep_begun(&mut self) -> usize {
        let before = self.all.messages - self.head_complete();
        let (begun, head_sent) = (self.frames.front().and_then(|head| head.begun(self.head_sent)), self.head_sent);
        *self = Self { frames: std::mem::take(&mut self.frames), ..Self::default() };
        self.frames.clear();
        if let Some(begun) = begun {
            self.push(begun);
            self.begin_head(head_sent);
        }
        before - (self.all.messages - self.head_complete())
    }

    /// Gives back what is above this capacity.
    pub fn shrink_to(&mut self, capacity: usize) {
        self.frames.shrink_to(capacity);
    }

    fn count(&mut self, frame: &Frame) {
        self.all.add(frame);
        if frame.is_replay {
            self.replays.add(frame);
        }
    }

    fn begin_head(&mut self, head_sent: usize) {
        self.head_sent = head_sent;
        self.all.bytes -= head_sent;
        if self.frames.front().is_some_and(|head| head.is_replay) {
            self.replays.bytes -= head_sent;
        }
    }
}

impl Load {
    fn add(&mut self, frame: &Frame) {
        self.messages += frame.messages();
        self.bytes += frame.len();
    }
}
