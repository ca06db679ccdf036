//! Joining a channel with history: where the client stands, what it missed, then what all are told.

use std::sync::Arc;

use crate::channel::{Channel, Join, Past, Wish};
use crate::continuity::Admission;
use crate::event;
use crate::fanout::{Fanout, Subscriber};
use crate::members::Position;
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
                Join::Done(Ticket::Joined(state.enter(self, subscriber.clone())), false)
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
