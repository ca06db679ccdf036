//! The frames that wait in an outbox, and how much of its bounds they take.

use std::collections::VecDeque;
use std::collections::vec_deque::Drain;
use std::sync::Arc;

use crate::frame::{Frame, Role};
use crate::slow_policy::EvictionLane;
use crate::telling::Telling;

/// A queue of frames, the first of which may be partly sent. What it loses when it is full is `eviction.rs`'s.
#[derive(Debug, Default)]
pub struct Backlog {
    pub(crate) frames: VecDeque<Arc<Frame>>,
    /// Bytes of the first frame that are sent already.
    pub(crate) head_sent: usize,
    all: Load,
    /// Of these, frames of the past: they do not count against the bounds.
    replays: Load,
    /// Of these, what may be evicted: nothing of which a part is sent.
    pub(crate) evictable: Load,
    evictable_frames: usize,
    /// Of these frames, those of channels of which the latest counts.
    pub(crate) latest: usize,
    /// No two of them have the same key.
    pub(crate) is_conflated: bool,
    /// What the client was told of losses; absent while there were none.
    pub(crate) telling: Option<Box<Telling>>,
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

    /// Frames that count against the bounds; one of the past is a message, and a gap too.
    pub fn counted_frames(&self) -> usize {
        self.frames.len() - self.replays.messages - self.gaps().messages
    }

    /// Frames and bytes that wait for nobody: they may be evicted, or could have been before a part was sent.
    pub fn lossy(&self) -> (usize, usize) {
        let begun = self.frames.front().filter(|head| self.head_sent > 0 && matches!(head.role(), Role::Event(_)));
        let (frames, bytes) = begun.map_or((0, 0), |head| (1, head.len() - self.head_sent));
        (self.evictable_frames + frames, self.evictable.bytes + bytes)
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
        self.all.less(self.replays).less(self.gaps())
    }

    /// Unsent bytes of the past.
    pub fn replay_bytes(&self) -> usize {
        self.replays.bytes
    }

    /// Messages of the first frame that are sent completely.
    fn head_complete(&self) -> usize {
        self.frames.front().map_or(0, |head| head.messages() - head.messages_after(self.head_sent))
    }

    /// One more.
    pub fn push(&mut self, frame: Arc<Frame>) {
        self.count(&frame);
        self.frames.push_back(frame);
        if self.telling.as_ref().is_some_and(|telling| telling.open > 0) {
            self.follow_last();
        }
    }

    /// A writer has these in hand, taken from here.
    pub fn writing(&mut self, frames: &[Arc<Frame>]) {
        if let Some(telling) = &mut self.telling {
            telling.take(frames);
        }
    }

    /// Everything is sent.
    pub fn run_empty(&mut self) {
        self.made_progress();
        if self.telling.as_ref().is_some_and(|telling| telling.is_over()) {
            self.telling = None;
        }
    }

    /// Puts back what was taken: the first `sent` frames are sent, and `head_sent` bytes of the one after them.
    pub fn put_back(&mut self, taken: &[Arc<Frame>], sent: usize, head_sent: usize) {
        let unsent = &taken[sent..];
        for frame in unsent.iter().rev() {
            self.count(frame);
            self.frames.push_front(Arc::clone(frame));
        }
        self.begin_head(head_sent);
        if let Some(telling) = &mut self.telling {
            telling.put_back(&taken[..sent + usize::from(head_sent > 0)]);
            self.renew_first(unsent.len());
        }
    }

    /// Takes the first frame if a part of it is sent, with how much.
    pub fn take_begun(&mut self) -> (Option<Arc<Frame>>, usize) {
        let head_sent = std::mem::take(&mut self.head_sent);
        (if head_sent > 0 { self.frames.pop_front() } else { None }, head_sent)
    }

    /// Takes frames, at most so many. Called after [`Backlog::take_begun`]: no frame is partly sent.
    pub fn take(&mut self, most: usize) -> Drain<'_, Arc<Frame>> {
        let count = most.min(self.frames.len());
        self.forget_counts();
        for at in count..self.frames.len() {
            let frame = Arc::clone(&self.frames[at]);
            self.count(&frame);
        }
        self.frames.drain(..count)
    }

    /// Leaves only the message of which a part is sent; returns how many messages that drops.
    pub fn keep_begun(&mut self) -> usize {
        let before = self.unsent();
        let (begun, head_sent) = (self.frames.front().and_then(|head| head.begun(self.head_sent)), self.head_sent);
        *self = Self { frames: std::mem::take(&mut self.frames), ..Self::default() };
        self.frames.clear();
        if let Some(begun) = begun {
            self.push(begun);
            self.begin_head(head_sent);
        }
        before - self.unsent()
    }

    /// Messages that are not sent completely, without the gaps, which nobody published.
    pub fn unsent(&self) -> usize {
        self.all.messages - self.head_complete() - self.gap_count()
    }

    /// Gives back what is above this capacity.
    pub fn shrink_to(&mut self, capacity: usize) {
        self.frames.shrink_to(capacity);
    }

    /// How many frames at the front are partly sent.
    pub(crate) fn begun(&self) -> usize {
        usize::from(self.head_sent > 0)
    }

    /// How many gaps wait.
    pub(crate) fn gap_count(&self) -> usize {
        self.gaps().messages
    }

    /// Puts a frame at a place.
    pub(crate) fn insert(&mut self, at: usize, frame: Arc<Frame>) {
        self.count(&frame);
        self.frames.insert(at, frame);
    }

    /// Takes out a frame of which nothing is sent.
    pub(crate) fn remove(&mut self, at: usize) -> Option<Arc<Frame>> {
        let frame = self.frames.remove(at)?;
        self.all = self.all.less(Load::of(&frame));
        match frame.role() {
            Role::Event(_) => self.keep(&frame),
            Role::Gap(loss) => {
                let telling = self.telling.get_or_insert_default();
                telling.gaps = telling.gaps.less(Load::of(&frame));
                telling.open -= usize::from(loss.is_open());
            }
            Role::Plain | Role::Border(_) => {}
        }
        Some(frame)
    }

    /// Nothing is counted any more.
    pub(crate) fn forget_counts(&mut self) {
        (self.all, self.replays, self.evictable) = Default::default();
        (self.evictable_frames, self.latest, self.is_conflated) = Default::default();
        if let Some(telling) = &mut self.telling {
            (telling.gaps, telling.open) = Default::default();
        }
    }

    fn gaps(&self) -> Load {
        self.telling.as_ref().map_or(Load::default(), |telling| telling.gaps)
    }

    fn count(&mut self, frame: &Frame) {
        self.all.add(frame);
        if frame.is_replay {
            self.replays.add(frame);
        }
        match frame.role() {
            Role::Event(event) => {
                self.evictable.add(frame);
                self.evictable_frames += 1;
                if event.lane != EvictionLane::DropOldest {
                    self.latest += 1;
                    self.is_conflated = false;
                }
            }
            Role::Gap(loss) => {
                let telling = self.telling.get_or_insert_default();
                telling.gaps.add(frame);
                telling.open += usize::from(loss.is_open());
            }
            Role::Plain | Role::Border(_) => {}
        }
    }

    /// A frame that was counted may not be evicted any more.
    fn keep(&mut self, frame: &Frame) {
        if let Role::Event(event) = frame.role() {
            self.evictable = self.evictable.less(Load::of(frame));
            self.evictable_frames -= 1;
            self.latest -= usize::from(event.lane != EvictionLane::DropOldest);
        }
    }

    pub(crate) fn begin_head(&mut self, head_sent: usize) {
        self.head_sent = head_sent;
        let Some(head) = self.frames.front().filter(|_| head_sent > 0).cloned() else { return };
        self.all.bytes -= head_sent;
        if head.is_replay {
            self.replays.bytes -= head_sent;
        }
        if let (Role::Gap(_), Some(telling)) = (head.role(), &mut self.telling) {
            telling.gaps.bytes -= head_sent;
        }
        self.keep(&head);
    }
}

impl Load {
    /// That of one frame.
    pub fn of(frame: &Frame) -> Self {
        Self { messages: frame.messages(), bytes: frame.len() }
    }

    /// What is left without a part.
    #[must_use]
    pub fn less(self, part: Self) -> Self {
        Self { messages: self.messages - part.messages, bytes: self.bytes - part.bytes }
    }

    fn add(&mut self, frame: &Frame) {
        self.messages += frame.messages();
        self.bytes += frame.len();
    }
}
