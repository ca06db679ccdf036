//! Walking subscribers: who they are to a channel, and what pushing to them sets in motion.

use std::sync::Arc;

use crate::behind::Backfill;
use crate::channel::Channel;
use crate::frame::Frame;
use crate::outbox::Push;
use crate::publication::Format;

/// Somebody a channel can deliver to.
pub trait Subscriber: Clone {
    /// Which encoding it takes.
    fn format(&self) -> Format;

    /// Queues a frame in its outbox. No I/O, no wait.
    fn push(&self, frame: &Arc<Frame>) -> Push;

    /// Queues frames of the past, which do not count against its bounds.
    fn replay(&self, frames: &[Arc<Frame>]) -> Push;

    /// Queues what it missed while it was behind; [`Push::Dropped`] if it stands elsewhere by now, or never was.
    fn backfill(&self, _backfill: &Backfill<'_>) -> Push {
        Push::Dropped
    }

    /// Whether publishers that found its outbox late may go on.
    fn has_room(&self) -> bool;

    /// Whether it was sent everything, and lost nothing.
    fn has_all(&self) -> bool;

    /// It is in a channel that has presence, and knows. No I/O, no wait: called under the channel's lock.
    fn entered(&self, _channel: &Arc<str>) {}

    /// It has left such a channel.
    fn left(&self, _channel: &Arc<str>) {}
}

/// What a run of pushes set in motion, to be acted on once all locks are released.
#[derive(Debug)]
pub struct Fanout<S> {
    /// Channels in which publications wait: they must be delivered.
    pub gathered: Vec<Arc<Channel<S>>>,
    /// Subscribers whose write right we took: they must be flushed. Grouped so that channels take turns.
    pub jobs: Vec<Vec<S>>,
    /// Subscribers that are behind through no fault of their own: publishing goes on when they have room.
    pub late: Vec<S>,
    /// Slow consumers to be closed.
    pub slow: Vec<S>,
    /// Frames pushed since the last pause.
    pushed: usize,
    /// What a publisher is told once what it published is delivered.
    pub answers: Vec<Arc<Frame>>,
    /// Messages put into outboxes, for the metrics.
    pub delivered: usize,
    /// How long each walk took, for the metrics.
    pub walks_us: Vec<u64>,
    /// Channels that were told a gap, for the metrics.
    pub gaps: usize,
    /// Subscriptions that could not, and that could, go on where the client stood; for the metrics.
    pub recoveries: [usize; 2],
}

/// Frames that a task pushes before others have their turn: some 3 ms.
const PUSHES_MAX: usize = 32_768;

impl<S> Default for Fanout<S> {
    fn default() -> Self {
        Self {
            gathered: Vec::new(),
            jobs: Vec::new(),
            late: Vec::new(),
            slow: Vec::new(),
            pushed: 0,
            answers: Vec::new(),
            delivered: 0,
            walks_us: Vec::new(),
            gaps: 0,
            recoveries: [0, 0],
        }
    }
}

impl<S: Subscriber> Fanout<S> {
    /// Up to this size, jobs of several channels are put together.
    const SMALL_JOB: usize = 64;

    /// Whether whoever pushes has to submit and pause: somebody is late, or it was much at once.
    pub fn needs_pause(&self) -> bool {
        !self.late.is_empty() || self.pushed >= PUSHES_MAX
    }

    /// Starts the count of [`Fanout::needs_pause`] anew.
    pub fn paused(&mut self) {
        self.pushed = 0;
    }

    /// Pushes a frame and keeps account of the consequences. True if it was queued.
    pub fn push(&mut self, subscriber: &S, frame: &Arc<Frame>) -> bool {
        self.pushed += 1;
        self.note(subscriber, subscriber.push(frame))
    }

    /// Pushes an answer, which may be one of the past.
    pub fn reply(&mut self, subscriber: &S, frame: &Arc<Frame>) {
        match frame.is_replay {
            true => self.replay(subscriber, std::slice::from_ref(frame)),
            false => self.push(subscriber, frame),
        };
    }

    /// Pushes frames of the past, and keeps account likewise.
    pub fn replay(&mut self, subscriber: &S, frames: &[Arc<Frame>]) -> bool {
        self.pushed += frames.len();
        self.note(subscriber, subscriber.replay(frames))
    }

    /// Pushes what a subscriber missed while it was behind, likewise.
    pub(crate) fn backfill(&mut self, subscriber: &S, backfill: &Backfill<'_>) {
        self.pushed += backfill.frames.len();
        self.note(subscriber, subscriber.backfill(backfill));
    }

    fn note(&mut self, subscriber: &S, push: Push) -> bool {
        match push {
            Push::Queued | Push::Evicted(_) => true,
            Push::Schedule => {
                self.schedule(subscriber.clone());
                true
            }
            Push::Late => {
                self.late.push(subscriber.clone());
                true
            }
            Push::Slow => {
                self.slow.push(subscriber.clone());
                false
            }
            Push::Dropped | Push::Closed => false,
        }
    }

    /// Has a subscriber flushed whose write right the caller took.
    pub fn schedule(&mut self, subscriber: S) {
        match self.jobs.last_mut() {
            Some(job) => job.push(subscriber),
            None => self.jobs.push(vec![subscriber]),
        }
    }

    /// Starts a new job unless the last one is still small.
    pub(crate) fn next_channel(&mut self) {
        if self.jobs.last().is_some_and(|job| job.len() >= Self::SMALL_JOB) {
            self.jobs.push(Vec::new());
        }
    }
}
