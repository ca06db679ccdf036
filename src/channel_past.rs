//! Joining a channel with history, or coming back to it from behind: what the client missed, then what all are told.

use std::sync::Arc;

use crate::behind::Backfill;
use crate::channel::{Channel, Join, Past, State, Wish};
use crate::continuity::Admission;
use crate::cursor::Cursor;
use crate::event;
use crate::fanout::{Fanout, Subscriber};
use crate::frame::Frame;
use crate::history_store::Moment;
use crate::history_view::{Gap, GapReason, Start, Told};
use crate::members::Position;
use crate::pending::Wants;
use crate::publication::Format;
use crate::replay::Replays;
use crate::ticket::Ticket;
use crate::upstream::Upstream;

impl<S: Subscriber> Channel<S> {
    /// Joins: at once what is in memory here, after a read what is at Redis.
    pub(crate) fn join_past(
        self: &Arc<Self>,
        past: &Past,
        subscriber: &S,
        wish: Option<Wish<'_>>,
        fanout: &mut Fanout<S>,
    ) -> Join {
        match past {
            Past::Memory(past) => {
                let mut past = past.hold();
                let mut state = self.state.lock();
                if state.is_removed {
                    return Join::Removed;
                }
                let start = past.start(wish.and_then(|wish| wish.after), self.nature.is_cached);
                state.deliver(self, fanout);
                if let Some(wish) = wish {
                    let frames = Replays::new(self.name()).frames(&start.missed);
                    fanout.push(subscriber, &event::subscribed(wish.id, self.name(), Some(&start)));
                    state.replay(subscriber, &frames, fanout);
                }
                state.begin(&start, fanout);
                Join::Done(Ticket::Joined(state.enter(self, subscriber.clone(), Some(&start))), false)
            }
            Past::Redis(following) => following.with(Some(self), fanout, |follow, out, _| {
                let mut state = self.state.lock();
                if state.is_removed {
                    return Join::Removed;
                }
                let (ticket, position) = state.wait(subscriber, wish);
                follow.join(position, wish.and_then(|wish| wish.after), out);
                Join::Done(ticket, state.upstream == Upstream::Absent)
            }),
        }
    }

    /// A member that fell behind and stands `at` wants what it missed: at once from memory here, after a read from Redis.
    /// The ticket of one that waits.
    pub(crate) fn catch_up(self: &Arc<Self>, subscriber: &S, at: Cursor, fanout: &mut Fanout<S>) -> Option<Ticket> {
        match self.nature.past.as_ref()? {
            Past::Memory(past) => {
                let mut past = past.hold();
                let mut state = self.state.lock();
                let window = past.read(None, Moment::now());
                let start = window.catch_up(at, Some(&[]), window.top);
                state.deliver(self, fanout);
                let frames = Replays::new(self.name()).frames(&start.missed);
                self.backfill(subscriber, at, &start, &frames, fanout);
                None
            }
            Past::Redis(following) => following.with(Some(self), fanout, |follow, out, _| {
                let (ticket, position) = self.state.lock().wait_for(subscriber, Wants::Missed(at));
                follow.come_back(position, at, out);
                Some(ticket)
            }),
        }
    }

    /// Tells a member that fell behind, and stands `at`, what it missed. Called under the order lock.
    pub(crate) fn backfill(
        &self,
        subscriber: &S,
        at: Cursor,
        start: &Start,
        frames: &[Arc<Frame>],
        fanout: &mut Fanout<S>,
    ) {
        let next = start.missed.first().and_then(Told::cursor);
        let is_gap_there = matches!(start.missed.first(), Some(Told::Gap(_)));
        let gap = Gap { after: Some(at), next, reason: GapReason::Slow };
        let backfill = Backfill {
            channel: self.name(),
            at,
            gap: (!is_gap_there).then(|| event::gap(self.name(), &gap)),
            frames,
            events: start.missed.iter().filter_map(Told::cursor).count(),
            then: (!start.recovered).then_some(start.cursor),
        };
        fanout.backfill(subscriber, &backfill);
    }

    /// Lets in one that waited for a read.
    pub(crate) fn let_in(&self, admission: &Admission<Position>, replays: &mut Replays<'_>, fanout: &mut Fanout<S>) {
        let start = &admission.start;
        let frames = replays.frames(&start.missed);
        let mut state = self.state.lock();
        state.deliver(self, fanout);
        if let Some(pending) = state.pending.remove(admission.joiner) {
            state.begin(start, fanout);
            state.admit(self, pending, Some(start), &frames, fanout);
        }
    }
}

impl<S: Subscriber> State<S> {
    /// What the subscriber missed; raw ones get what is live and nothing else.
    pub(crate) fn replay(&self, subscriber: &S, missed: &[Arc<Frame>], fanout: &mut Fanout<S>) {
        if subscriber.format() == Format::Json && !missed.is_empty() {
            fanout.replay(subscriber, missed);
        }
    }

    /// A subscriber of a channel with history begins.
    pub(crate) fn begin(&mut self, start: &Start, fanout: &mut Fanout<S>) {
        self.position = Some(start.position);
        fanout.recoveries[usize::from(start.recovered)] += usize::from(start.is_resumed);
    }
}
