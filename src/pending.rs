//! Those who wait in a channel: until it is live, or until its past is read.

use std::sync::Arc;

use crate::channel::{Channel, State, Wish};
use crate::cursor::Cursor;
use crate::event;
use crate::fanout::{Fanout, Subscriber};
use crate::frame::Frame;
use crate::history_view::Start;
use crate::members::Position;
use crate::ticket::{Seat, Ticket};

/// Most replies that can wait for one pending subscription: repeats of the same command.
const REPLIES_MAX: usize = 16;

/// One that waits.
#[derive(Debug)]
pub(crate) struct Pending<S> {
    pub(crate) subscriber: S,
    pub(crate) seat: Arc<Seat>,
    pub(crate) wants: Wants,
}

/// What for.
#[derive(Debug)]
pub(crate) enum Wants {
    /// To be let in. The ids of the commands that are answered then.
    In(Vec<Option<Box<str>>>),
    /// A member that fell behind and stands there wants what it missed.
    Missed(Cursor),
}

impl<S> Pending<S> {
    /// One more command to answer. False: too many are waiting.
    pub(crate) fn repeat(&mut self, wish: Wish<'_>) -> bool {
        let Wants::In(replies) = &mut self.wants else { return false };
        let has_room = replies.len() < REPLIES_MAX;
        if has_room {
            replies.push(wish.id.map(Into::into));
        }
        has_room
    }
}

impl<S: Subscriber> State<S> {
    /// Lets a subscriber wait.
    pub(crate) fn wait(&mut self, subscriber: &S, wish: Option<Wish<'_>>) -> (Ticket, Position) {
        self.idle_since_us = None;
        let replies = wish.map(|wish| wish.id.map(Into::into)).into_iter().collect();
        self.wait_for(subscriber, Wants::In(replies))
    }

    pub(crate) fn wait_for(&mut self, subscriber: &S, wants: Wants) -> (Ticket, Position) {
        let seat = Arc::new(Seat::default());
        let position = self.pending.insert(Pending { subscriber: subscriber.clone(), seat: Arc::clone(&seat), wants });
        seat.wait_at(position);
        (Ticket::Pending(seat), position)
    }

    /// Those who wait to be let in.
    pub(crate) fn waiting(&self) -> impl Iterator<Item = &S> {
        let is_new = |pending: &&Pending<S>| matches!(pending.wants, Wants::In(_));
        self.pending.iter().filter(is_new).map(|pending| &pending.subscriber)
    }

    /// Gives one that waited what it wants, which `missed` has: its replies before that, or a gap.
    pub(crate) fn admit(
        &mut self,
        channel: &Channel<S>,
        pending: Pending<S>,
        start: Option<&Start>,
        missed: &[Arc<Frame>],
        fanout: &mut Fanout<S>,
    ) {
        let Pending { subscriber, seat, wants } = pending;
        match (wants, start) {
            (Wants::In(replies), _) => {
                for id in &replies {
                    fanout.push(&subscriber, &event::subscribed(id.as_deref(), channel.name(), start));
                }
                self.replay(&subscriber, missed, fanout);
                seat.join_at(self.enter(channel, subscriber, start));
            }
            (Wants::Missed(at), start) => {
                seat.leave();
                start.into_iter().for_each(|start| channel.backfill(&subscriber, at, start, missed, fanout));
            }
        }
    }
}
