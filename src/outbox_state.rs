//! The state of an outbox: who may write, what waits, and who is slow. What each of it means is `outbox.rs`'s.

use std::sync::Arc;

use crate::backlog::Backlog;
use crate::behind::Backfill;
use crate::cursor::Cursor;
use crate::frame::Frame;
use crate::outbox::{Flushed, Limits, Phase, Push};
use crate::writer::{Batch, WRITE_FRAMES_MAX};

/// A full outbox whose socket took no byte for this long (µs) is slow: a reader that only waits for a
/// processor comes back sooner. One that stalled before it was full holds nobody up at all.
pub const STALL_US_MAX: u64 = 250_000;

/// How long (µs) one connection may hold publishers up in all, however much it trickles.
pub const HOLD_US_MAX: u64 = 3_000_000;

/// After this long (µs) without holding anybody up, a connection starts anew.
const HOLD_FORGIVEN_US: u64 = 60_000_000;

/// A queue keeps at most this capacity once bursts have ended, so that they leave no memory behind.
const IDLE_CAPACITY_MAX: usize = 32;

/// What the lock of an outbox guards.
#[derive(Debug)]
pub struct State {
    pub(crate) queue: Backlog,
    pub(crate) phase: Phase,
    /// A close frame is queued; nothing follows it.
    closing: bool,
    /// Closing, and only the frame that was begun may precede the close frame.
    discarding: bool,
    /// More than [`IDLE_CAPACITY_MAX`] frames waited since the last sweep: the next burst may do so too.
    was_deep: bool,
    /// Control frames that wait for a frame border; absent while there are none.
    slots: Option<Box<Slots>>,
    /// First refusal since the outbox was last empty (0: none).
    refused_us: u64,
    /// Last time the socket took bytes since then.
    progress_us: u64,
    /// Last time it was written with frames of the past in it, or such as may give way.
    excused_us: u64,
    /// Publishers were told that it is late, and it has had no room since.
    is_awaited: bool,
    /// Since when it is full and holds publishers up (0: it does not).
    full_us: u64,
    /// How long it held them up before that, and until when.
    held_us: u64,
    held_until_us: u64,
}

#[derive(Debug, Default)]
pub(crate) struct Slots {
    pub(crate) ping: Option<Arc<Frame>>,
    pub(crate) pongs: Vec<Arc<Frame>>,
}

impl Default for State {
    fn default() -> Self {
        Self {
            queue: Backlog::default(),
            phase: Phase::Idle,
            closing: false,
            discarding: false,
            was_deep: false,
            slots: None,
            refused_us: 0,
            progress_us: 0,
            excused_us: 0,
            is_awaited: false,
            full_us: 0,
            held_us: 0,
            held_until_us: 0,
        }
    }
}

impl State {
    pub(crate) fn push(&mut self, frame: &Arc<Frame>, limits: &Limits) -> Push {
        if self.is_closing() {
            return Push::Closed;
        }
        if self.queue.is_withheld(frame) {
            return Push::Dropped;
        }
        let push = self.push_told(frame, limits);
        self.queue.begin_anew(frame);
        push
    }

    fn push_told(&mut self, frame: &Arc<Frame>, limits: &Limits) -> Push {
        let is_full = !limits.admit(self.queue.counted(), frame);
        if is_full && self.phase == Phase::Blocked {
            if let Some(evicted) = self.queue.push_evicting(frame, limits) {
                return Push::Evicted(evicted);
            }
            if self.queue.lose(frame) {
                return Push::Dropped;
            }
            self.hold(frame.created_us);
            if self.is_slow(frame.created_us) {
                return Push::Slow;
            }
        }
        self.queue.push(Arc::clone(frame));
        self.is_awaited |= is_full;
        if is_full {
            Push::Late
        } else if self.claim() {
            Push::Schedule
        } else {
            Push::Queued
        }
    }

    pub(crate) fn replay(&mut self, frames: &[Arc<Frame>]) -> Push {
        if self.is_closing() {
            return Push::Closed;
        }
        frames.iter().for_each(|frame| self.queue.push(Arc::clone(frame)));
        if self.claim() { Push::Schedule } else { Push::Queued }
    }

    /// What the client missed can be asked for: while there is room, and nothing of the past waits.
    pub(crate) fn ask_missed(&mut self, limits: &Limits) -> Vec<(Arc<str>, Cursor)> {
        let counted = self.queue.counted();
        let has_room = counted.messages <= limits.messages / 2 && counted.bytes <= limits.bytes / 2;
        match has_room && self.queue.replay_bytes() == 0 && !self.is_closing() {
            true => self.queue.ask_missed(),
            false => Vec::new(),
        }
    }

    pub(crate) fn backfill(&mut self, backfill: &Backfill<'_>) -> Push {
        if self.is_closing() {
            return Push::Closed;
        }
        if !self.queue.backfill(backfill) {
            return Push::Dropped;
        }
        // It may have been nothing at all.
        if !self.queue.is_empty() && self.claim() { Push::Schedule } else { Push::Queued }
    }

    pub(crate) fn refused_since_us(&self) -> Option<u64> {
        (self.phase == Phase::Blocked && !self.closing && self.refused_us > 0).then_some(self.refused_us)
    }

    pub(crate) fn is_closing(&self) -> bool {
        self.closing || self.phase == Phase::Failed
    }

    /// Takes the write right if nobody has it.
    fn claim(&mut self) -> bool {
        let is_idle = self.phase == Phase::Idle;
        if is_idle {
            self.phase = Phase::Scheduled;
        }
        is_idle
    }

    pub(crate) fn control(&mut self, fill: impl FnOnce(&mut Slots)) -> bool {
        if self.is_closing() {
            return false;
        }
        fill(self.slots.get_or_insert_default());
        self.claim()
    }

    pub(crate) fn close(&mut self, frame: Arc<Frame>, keep_queue: bool) -> usize {
        if self.is_closing() {
            return 0;
        }
        self.closing = true;
        self.discarding = !keep_queue;
        self.slots = None;
        let dropped = if self.discarding { self.queue.keep_begun() } else { 0 };
        self.queue.push(frame);
        if self.phase == Phase::Idle {
            self.phase = Phase::Blocked;
        }
        dropped
    }

    /// Moves what is pending into `batch`, or gives the write right back and says how it ended.
    pub(crate) fn take(&mut self, batch: &mut Batch, now_us: u64) -> Option<Flushed> {
        if self.phase == Phase::Failed {
            return Some(Flushed::Failed);
        }
        if self.queue.is_empty() && self.slots.is_none() {
            self.refused_us = 0;
            self.queue.run_empty();
            self.release(now_us);
            self.phase = if self.closing { Phase::Finished } else { Phase::Idle };
            return Some(if self.closing { Flushed::Finished } else { Flushed::Idle });
        }
        self.was_deep |= self.queue.len() > IDLE_CAPACITY_MAX;
        batch.clear();
        batch.has_close = self.closing;
        if self.queue.replay_bytes() > 0 || self.queue.lossy().0 > 0 {
            self.excused_us = now_us;
        }
        let (begun, head_sent) = self.queue.take_begun();
        batch.head_sent = head_sent;
        batch.frames.extend(begun);
        if let Some(slots) = self.slots.take() {
            batch.frames.extend(slots.pongs);
            batch.frames.extend(slots.ping);
        }
        let room = WRITE_FRAMES_MAX - batch.frames.len();
        batch.frames.extend(self.queue.take(room));
        self.queue.writing(&batch.frames);
        None
    }

    /// Takes back what the socket refused and passes the write right to the connection's own task.
    /// Also returns how many messages that drops.
    pub(crate) fn refuse(&mut self, batch: &mut Batch, limits: &Limits, now_us: u64) -> (Flushed, usize) {
        if self.phase == Phase::Failed {
            let dropped = batch.dropped();
            batch.clear();
            return (Flushed::Failed, dropped);
        }
        // A close without the queue may have come during the write: then only what was begun goes before it.
        let dropped = if self.discarding && !batch.has_close { batch.keep_begun() } else { 0 };
        self.queue.put_back(&batch.frames, batch.sent(), batch.head_sent);
        self.block(batch.progress, limits, now_us);
        batch.clear();
        (Flushed::Blocked, dropped)
    }

    /// The same where all frames are written, but the transport holds something back that the socket refused.
    pub(crate) fn hold_back(&mut self, progress: bool, limits: &Limits, now_us: u64) -> Flushed {
        if self.phase == Phase::Failed {
            return Flushed::Failed;
        }
        self.block(progress, limits, now_us);
        Flushed::Blocked
    }

    fn block(&mut self, progress: bool, limits: &Limits, now_us: u64) {
        self.phase = Phase::Blocked;
        if self.refused_us == 0 {
            self.refused_us = now_us;
            self.progress_us = now_us;
        }
        if progress {
            self.progress_us = now_us;
            self.queue.made_progress();
        }
        if self.is_at_most_half(limits) {
            self.release(now_us);
        } else if self.is_awaited {
            self.hold(now_us);
        }
    }

    /// Not whenever the queue empties: bursts that follow each other would allocate at every one.
    pub(crate) fn trim(&mut self) {
        if !std::mem::take(&mut self.was_deep) && self.queue.is_empty() {
            self.queue.shrink_to(IDLE_CAPACITY_MAX);
        }
    }

    pub(crate) fn fail(&mut self) -> usize {
        // The close frame is nothing that anybody published.
        let closes = usize::from(self.closing && !self.queue.is_empty());
        let dropped = self.queue.unsent() - closes;
        self.phase = Phase::Failed;
        self.queue = Backlog::default();
        self.slots = None;
        dropped
    }

    /// From now on publishers wait for this outbox.
    fn hold(&mut self, now_us: u64) {
        if self.full_us == 0 {
            self.full_us = now_us;
            if now_us.saturating_sub(self.held_until_us) > HOLD_FORGIVEN_US {
                self.held_us = 0;
            }
        }
    }

    /// There is room again.
    fn release(&mut self, now_us: u64) {
        self.is_awaited = false;
        if self.full_us > 0 {
            self.held_us += now_us.saturating_sub(self.full_us);
            self.held_until_us = now_us;
            self.full_us = 0;
        }
    }

    fn is_slow(&self, now_us: u64) -> bool {
        self.phase == Phase::Blocked
            && self.full_us > 0
            && (now_us.saturating_sub(self.progress_us) > STALL_US_MAX
                || self.held_us + now_us.saturating_sub(self.full_us) > HOLD_US_MAX)
    }

    /// Once the socket refuses, what may give way is as good as room.
    pub(crate) fn is_at_most_half(&self, limits: &Limits) -> bool {
        let (frames, bytes) = match self.phase {
            Phase::Blocked => self.queue.lossy(),
            _ => (0, 0),
        };
        self.queue.counted_frames() - frames <= limits.messages / 2
            && self.queue.counted().bytes - bytes <= limits.bytes / 2
    }

    pub(crate) fn is_overdue(&self, now_us: u64, age_us_max: u64) -> bool {
        if self.phase != Phase::Blocked || self.closing || self.refused_us == 0 {
            return false;
        }
        let waits_since_us = match self.queue.head() {
            // The transport holds the last bytes back.
            None => self.progress_us,
            // Whoever comes back has much to read, and whoever may lose some is behind: that takes its time as long
            // as it gets on.
            Some((head, _)) if head.is_replay || head.is_lossy() => self.progress_us,
            Some((head, _)) => self.refused_us.max(head.created_us).max(self.excused_us),
        };
        self.is_slow(now_us) || now_us.saturating_sub(waits_since_us) > age_us_max
    }
}
