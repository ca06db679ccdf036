//! The bounded queue in front of one socket, and the right to write to it.
//!
//! Publishers only push. Whoever moves the outbox out of [`Phase::Idle`] owns the write side,
//! the unsent remainder included, and gives it back in the same critical section in which it
//! sees the queue empty. When the socket refuses bytes the right passes to the connection's own
//! task, which waits until the socket is writable. `tests/it/outbox_model.rs` proves with loom
//! that nothing is stranded.
//!
//! **Who is slow.** An outbox is slow only because its own socket refused bytes. A full outbox
//! that was not refused is *late*: it is the server that is behind, so publishers wait. A full and
//! refused one holds publishers up as well, so that a burst closes nobody who reads, but only for
//! [`crate::outbox_state::STALL_US_MAX`] without progress and for [`crate::outbox_state::HOLD_US_MAX`] in all; then it is slow, and closed.
//! Channels whose rule says so hold nobody up there: their publications give way (`eviction.rs`).

use std::io;
use std::sync::Arc;

use parking_lot::Mutex;

use crate::backlog::Load;
use crate::behind::Backfill;
use crate::cursor::Cursor;
use crate::eviction::Evicted;
use crate::frame::Frame;
use crate::outbox_state::State;
use crate::writer::{Transport, Writer};

/// Pongs that can wait; beyond it the newest replaces the last (RFC 6455 §5.5.3 allows to answer only that).
const PONGS_MAX: usize = 16;

/// A short critical section. Production uses [`Mutex`]; the model test explores every interleaving with loom's.
pub trait Lock<T> {
    /// Runs `section` alone.
    fn with<R>(&self, section: impl FnOnce(&mut T) -> R) -> R;
}

impl<T> Lock<T> for Mutex<T> {
    fn with<R>(&self, section: impl FnOnce(&mut T) -> R) -> R {
        section(&mut self.lock())
    }
}

/// Bounds of one outbox.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// `HUBCAST_OUTBOX_MESSAGES`
    pub messages: usize,
    /// `HUBCAST_OUTBOX_BYTES`
    pub bytes: usize,
}

impl Limits {
    /// Whether a frame fits to what waits; an empty outbox takes any one.
    pub fn admit(&self, load: Load, frame: &Frame) -> bool {
        load.messages == 0
            || load.messages + frame.messages() <= self.messages && load.bytes + frame.len() <= self.bytes
    }
}

/// What became of a pushed frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Push {
    /// Queued; whoever has the write right will send it.
    Queued,
    /// Queued, and the caller now has the write right: it flushes the outbox or hands it to a lane.
    Schedule,
    /// Queued above the bounds; the caller must wait for room before it publishes more.
    Late,
    /// Queued, and others are dropped for it.
    Evicted(Evicted),
    /// Not queued, as its channel's rule allows; the client will be told.
    Dropped,
    /// Not queued: the connection is a slow consumer and has to be closed.
    Slow,
    /// Not queued: the connection is closing.
    Closed,
}

/// Who has the write right.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Nobody; the queue is empty.
    Idle,
    /// Whoever pushed into the idle outbox, or the lane it was handed to.
    Scheduled,
    /// The connection's own task, once the socket is writable.
    Blocked,
    /// Nobody any more: the close frame is sent.
    Finished,
    /// Nobody any more: the socket failed, or was given up.
    Failed,
}

/// How a flush ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Flushed {
    /// Everything is sent and the write right given back.
    Idle,
    /// The socket refused bytes: the connection's own task has the right now and must be woken.
    Blocked,
    /// The close frame is sent; the connection's own task must be woken.
    Finished,
    /// The socket failed; the connection's own task must be woken.
    Failed,
}

/// The outbox of one connection.
#[derive(Debug, Default)]
pub struct Outbox<L = Mutex<State>> {
    state: L,
}

impl<L: Lock<State>> Outbox<L> {
    /// An outbox around a lock that holds a default state.
    pub fn new(state: L) -> Self {
        Self { state }
    }

    /// Queues a frame.
    pub fn push(&self, frame: &Arc<Frame>, limits: &Limits) -> Push {
        self.state.with(|state| state.push(frame, limits))
    }

    /// Queues frames of the past, which do not count against the bounds: whoever asks for it bounds it.
    pub fn replay(&self, frames: &[Arc<Frame>]) -> Push {
        self.state.with(|state| state.replay(frames))
    }

    /// Where the client is behind on channels with history and may be told what it missed now, each once until
    /// [`Outbox::backfill`] brings that.
    pub fn ask_missed(&self, limits: &Limits) -> Vec<(Arc<str>, Cursor)> {
        self.state.with(|state| state.ask_missed(limits))
    }

    /// Whether the client is behind anywhere.
    pub fn is_behind(&self) -> bool {
        self.state.with(|state| state.queue.is_behind())
    }

    /// Queues what the client missed, as [`Outbox::replay`] does; [`Push::Dropped`] if it stands elsewhere by now.
    pub fn backfill(&self, backfill: &Backfill<'_>) -> Push {
        self.state.with(|state| state.backfill(backfill))
    }

    /// Requests a ping frame at the next frame border. True: the caller has the write right now.
    pub fn ping(&self, frame: Arc<Frame>) -> bool {
        self.state.with(|state| state.control(|slots| slots.ping = Some(frame)))
    }

    /// Requests a pong frame at the next frame border. True: the caller has the write right now.
    pub fn pong(&self, frame: Arc<Frame>) -> bool {
        self.state.with(|state| {
            state.control(|slots| {
                slots.pongs.truncate(PONGS_MAX - 1);
                slots.pongs.push(frame);
            })
        })
    }

    /// Lets `frame` be the last one; nothing is taken any more. With `keep_queue` what is queued goes first,
    /// otherwise only the message that was begun. Returns how many messages that drops. Afterwards the
    /// connection's own task must be woken.
    pub fn close(&self, frame: Arc<Frame>, keep_queue: bool) -> usize {
        self.state.with(|state| state.close(frame, keep_queue))
    }

    /// Writes everything pending. Only the owner of the write right may call this.
    pub fn flush(&self, transport: &impl Transport, writer: &mut Writer, limits: &Limits, now_us: u64) -> Flushed {
        writer.batch.clear();
        writer.batch.progress = false;
        loop {
            // What the transport still holds is not sent: as long as the socket refuses it nobody is idle.
            match transport.flush(&mut writer.batch.progress) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    let progress = writer.batch.progress;
                    return self.state.with(|state| state.hold_back(progress, limits, now_us));
                }
                Err(_) => return self.fail_writing(writer),
            }
            if let Some(end) = self.state.with(|state| state.take(&mut writer.batch, now_us)) {
                return end;
            }
            writer.oldest_us = writer.batch.frames.first().map_or(0, |frame| frame.created_us);
            match writer.write(transport) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    let (end, dropped) = self.state.with(|state| state.refuse(&mut writer.batch, limits, now_us));
                    writer.frames_dropped += dropped as u64;
                    return end;
                }
                Err(_) => return self.fail_writing(writer),
            }
        }
    }

    fn fail_writing(&self, writer: &mut Writer) -> Flushed {
        writer.frames_dropped += (writer.batch.dropped() + self.state.with(State::fail)) as u64;
        writer.batch.clear();
        Flushed::Failed
    }

    /// Ends the outbox without a close frame; returns how many messages that drops.
    pub fn fail(&self) -> usize {
        self.state.with(State::fail)
    }

    /// Who has the write right.
    pub fn phase(&self) -> Phase {
        self.state.with(|state| state.phase)
    }

    /// Whether a publisher that found the outbox late may go on.
    pub fn has_room(&self, limits: &Limits) -> bool {
        self.state.with(|state| state.is_closing() || state.is_at_most_half(limits))
    }

    /// Whether everything is sent, and nothing was lost that makes the client stand elsewhere than others.
    pub fn has_all(&self) -> bool {
        self.state.with(|state| state.phase == Phase::Idle && state.queue.telling.is_none())
    }

    /// One look of the sweep: gives back what a burst before the last look needed, and says whether the
    /// peer has been too slow at `now_us`: the oldest unsent frame is older than `age_us_max`, or the
    /// outbox stayed full. Both count from when the socket began to refuse.
    pub fn sweep(&self, now_us: u64, age_us_max: u64) -> bool {
        self.state.with(|state| {
            state.trim();
            state.is_overdue(now_us, age_us_max)
        })
    }

    /// Since when its socket refuses bytes, if it does and the outbox is not closing.
    pub fn refused_since_us(&self) -> Option<u64> {
        self.state.with(|state| state.refused_since_us())
    }

    /// Messages and bytes that wait.
    pub fn depth(&self) -> (usize, usize) {
        self.state.with(|state| {
            let load = state.queue.load();
            (load.messages, load.bytes)
        })
    }

    /// Bytes of the past that wait.
    pub fn replay_bytes(&self) -> usize {
        self.state.with(|state| state.queue.replay_bytes())
    }
}
