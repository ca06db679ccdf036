//! One channel: its subscribers, those who wait for it to become live, and its order lock.
//!
//! **One order per channel**: every push that a client can see in relation to others on the
//! channel (publications, `subscribed`, `unsubscribed`, `gap`) happens under the order lock, with
//! no I/O and no await. Lock order: channel, then outbox. Connections that overflow are only
//! marked; they are closed after the lock is released.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use parking_lot::Mutex;

use crate::bundle::{Bundle, Gathering};
use crate::clock;
use crate::event;
use crate::fanout::{Fanout, Subscriber};
use crate::frame::Frame;
use crate::members::{Members, Position};
use crate::publication::{Format, Payload, Publication};
use crate::upstream::{Step, Upstream};

/// Most replies that can wait for one pending subscription: repeats of the same command.
const PENDING_REPLIES_MAX: usize = 16;

/// A channel of the hub.
#[derive(Debug)]
pub struct Channel<S> {
    name: Arc<str>,
    gathering: Gathering,
    has_presence: bool,
    state: Mutex<State<S>>,
    /// The channel waits in the hub's list of changed ones.
    pub(crate) is_listed: AtomicBool,
    /// A multiplexer will look at it at some later time.
    pub(crate) is_awaited: AtomicBool,
    /// The Redis server that has, or was asked for, its subscription; written under the lock. [`NOWHERE`]: none.
    server: AtomicUsize,
}

/// No Redis server.
const NOWHERE: usize = usize::MAX;

#[derive(Debug)]
struct State<S> {
    members: Members<S>,
    /// Publications that are in the channel's order, but not pushed yet.
    gathered: Bundle,
    /// Subscribers that were late at the last delivery: whoever publishes next waits for them.
    late: Vec<S>,
    /// Subscriptions that are confirmed to the client once the channel is live.
    pending: Members<Pending<S>>,
    upstream: Upstream,
    /// When the last subscriber left (µs); `None` while there is one.
    idle_since_us: Option<u64>,
    /// The link was lost while there were members: they are told when it is back.
    owes_gap: bool,
    /// Taken out of the hub; whoever still holds it must look the name up again.
    is_removed: bool,
}

#[derive(Debug)]
struct Pending<S> {
    subscriber: S,
    replies: Vec<Arc<Frame>>,
    seat: Arc<AtomicU64>,
}

/// A place in a channel, kept by the subscription.
#[derive(Debug)]
pub enum Ticket {
    /// Joined at once.
    Joined(Position),
    /// Waited for the channel to become live; the seat holds the position, among those who wait
    /// (its top bit is set) or among the members.
    Pending(Arc<AtomicU64>),
}

/// Marks a seat whose position is among those who wait.
const WAITING: u64 = 1 << 63;

/// What joining came to.
pub(crate) enum Join {
    /// The ticket, and whether the multiplexer must be told.
    Done(Ticket, bool),
    /// The channel was removed in the meantime.
    Removed,
}

impl<S: Subscriber> Channel<S> {
    pub(crate) fn new(name: &str, upstream: Upstream, gathering: Gathering, has_presence: bool) -> Self {
        let state = State {
            members: Members::default(),
            gathered: Bundle::default(),
            late: Vec::new(),
            pending: Members::default(),
            upstream,
            idle_since_us: Some(clock::now_us()),
            owes_gap: false,
            is_removed: false,
        };
        Self {
            name: name.into(),
            gathering,
            has_presence,
            state: Mutex::new(state),
            is_listed: AtomicBool::new(false),
            is_awaited: AtomicBool::new(false),
            server: AtomicUsize::new(NOWHERE),
        }
    }

    /// The channel's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The name as the hub's map keys it.
    pub(crate) fn shared_name(&self) -> Arc<str> {
        Arc::clone(&self.name)
    }

    /// Whether it is known who is here.
    pub fn has_presence(&self) -> bool {
        self.has_presence
    }

    /// Subscribers that are joined, and those that wait for the channel to become live.
    pub fn counts(&self) -> (usize, usize) {
        let state = self.state.lock();
        (state.members.len(), state.pending.len())
    }

    /// The joined and the waiting subscribers.
    pub fn subscribers(&self) -> Vec<S> {
        let state = self.state.lock();
        state.members.iter().chain(state.pending.iter().map(|pending| &pending.subscriber)).cloned().collect()
    }

    /// How long publications may wait for others.
    pub fn window(&self) -> Duration {
        self.gathering.window
    }

    /// Puts a publication in the channel's order. It is pushed together with those that follow, at the latest
    /// when whoever finds the channel in `fanout` has it delivered.
    pub fn gather(self: &Arc<Self>, payload: Payload<'_>, fanout: &mut Fanout<S>) {
        let mut state = self.state.lock();
        state.tell_late(fanout);
        if !Bundle::is_for(payload) {
            state.deliver(&self.name, fanout);
            return state.push(&Publication::new(&self.name, &[payload]), fanout);
        }
        if !state.gathered.has_room(payload, &self.gathering) {
            state.deliver(&self.name, fanout);
        }
        let is_known = fanout.gathered.last().is_some_and(|last| Arc::ptr_eq(last, self));
        // A window has one timer; otherwise everybody who publishes can have it delivered.
        if !is_known && (state.gathered.is_empty() || self.window().is_zero()) {
            fanout.gathered.push(Arc::clone(self));
        }
        state.gathered.add(payload);
    }

    /// Pushes what was gathered to every member.
    pub fn deliver(&self, fanout: &mut Fanout<S>) {
        self.state.lock().deliver(&self.name, fanout);
    }

    /// Joins now if the channel is live (`reply` goes first), or as soon as it is.
    pub(crate) fn join(&self, subscriber: &S, reply: Option<&Arc<Frame>>, fanout: &mut Fanout<S>) -> Join {
        let mut state = self.state.lock();
        if state.is_removed {
            return Join::Removed;
        }
        state.deliver(&self.name, fanout);
        state.idle_since_us = None;
        if state.upstream == Upstream::Live {
            reply.inspect(|reply| {
                fanout.push(subscriber, reply);
            });
            if self.has_presence {
                subscriber.entered(&self.name);
            }
            return Join::Done(Ticket::Joined(state.members.insert(subscriber.clone())), false);
        }
        let seat = Arc::new(AtomicU64::new(WAITING));
        let replies = reply.cloned().into_iter().collect();
        let pending = Pending { subscriber: subscriber.clone(), replies, seat: Arc::clone(&seat) };
        let position = state.pending.insert(pending);
        seat.store(WAITING | position.to_u64(), Ordering::Relaxed);
        Join::Done(Ticket::Pending(seat), state.upstream == Upstream::Absent)
    }

    /// Answers a repeated subscribe: at once if joined, else together with the first. False: too many wait already.
    pub(crate) fn repeat(&self, ticket: &Ticket, subscriber: &S, reply: &Arc<Frame>, fanout: &mut Fanout<S>) -> bool {
        let mut state = self.state.lock();
        state.deliver(&self.name, fanout);
        let pending = match ticket.place() {
            Place::Waiting(position) => state.pending.get_mut(position),
            Place::Joined(_) => None,
        };
        let Some(pending) = pending else {
            fanout.push(subscriber, reply);
            return true;
        };
        let has_room = pending.replies.len() < PENDING_REPLIES_MAX;
        if has_room {
            pending.replies.push(Arc::clone(reply));
        }
        has_room
    }

    /// Removes a subscriber, then pushes `reply` to it. Returns true when nobody is left.
    pub(crate) fn leave(&self, ticket: &Ticket, reply: Option<(&S, &Arc<Frame>)>, fanout: &mut Fanout<S>) -> bool {
        let mut state = self.state.lock();
        if reply.is_some() {
            state.deliver(&self.name, fanout);
        }
        match ticket.place() {
            Place::Joined(position) => {
                let member = state.members.remove(position);
                member.iter().filter(|_| self.has_presence).for_each(|member| member.left(&self.name));
            }
            Place::Waiting(position) => drop(state.pending.remove(position)),
        }
        state.late.retain(|subscriber| !subscriber.has_room());
        if let Some((subscriber, reply)) = reply {
            fanout.push(subscriber, reply);
        }
        let is_last = state.members.is_empty() && state.pending.is_empty();
        if is_last {
            state.idle_since_us = Some(clock::now_us());
        }
        is_last
    }

    /// Marks the channel as removed if nobody is in it and Redis does not have it either.
    /// Called under the map's shard lock.
    pub(crate) fn remove_if_unused(&self, is_upstream_on: bool) -> bool {
        let mut state = self.state.lock();
        let at_redis = is_upstream_on && state.upstream != Upstream::Absent;
        state.is_removed = state.members.is_empty() && state.pending.is_empty() && !at_redis;
        state.is_removed
    }

    /// The next step of a server's multiplexer for this channel, which is subscribed there or nowhere.
    pub fn reconcile(&self, server: usize, now_us: u64) -> Step {
        let mut state = self.state.lock();
        let idle_since_us = state.idle_since_us;
        let step = state.upstream.reconcile(idle_since_us, now_us);
        if step == Step::Subscribe {
            self.server.store(server, Ordering::Release);
        }
        step
    }

    /// The Redis server that has, or was asked for, the channel's subscription.
    pub(crate) fn upstream_server(&self) -> Option<usize> {
        Some(self.server.load(Ordering::Acquire)).filter(|server| *server != NOWHERE)
    }

    /// An UNSUBSCRIBE was answered without a confirmation: the channel is as live as before. True if it was so.
    pub(crate) fn keep_at(&self, server: usize) -> bool {
        let mut state = self.state.lock();
        self.upstream_server() == Some(server) && state.upstream.keep()
    }

    /// Whether a SUBSCRIBE is sent to the server and not confirmed.
    pub(crate) fn is_subscribing_at(&self, server: usize) -> bool {
        let state = self.state.lock();
        state.upstream == Upstream::Subscribing && self.upstream_server() == Some(server)
    }

    /// Redis confirmed the SUBSCRIBE: tells members of the gap they are owed, then lets those who waited in.
    /// True if there was a gap to tell.
    pub(crate) fn confirm_subscribe(&self, fanout: &mut Fanout<S>) -> bool {
        let mut state = self.state.lock();
        if !state.upstream.confirm_subscribe() {
            return false;
        }
        state.deliver(&self.name, fanout);
        let had_gap = std::mem::take(&mut state.owes_gap);
        if had_gap {
            state.tell_gap(&self.name, fanout);
        }
        for pending in state.pending.take_all() {
            for reply in &pending.replies {
                fanout.push(&pending.subscriber, reply);
            }
            if self.has_presence {
                pending.subscriber.entered(&self.name);
            }
            let position = state.members.insert(pending.subscriber);
            pending.seat.store(position.to_u64(), Ordering::Relaxed);
        }
        had_gap
    }

    /// Redis confirmed the UNSUBSCRIBE, or ended the subscription itself.
    pub(crate) fn confirm_unsubscribe(&self) {
        let mut state = self.state.lock();
        let was_live = state.upstream.confirm_unsubscribe();
        state.owes_gap |= was_live && !state.members.is_empty();
        if state.upstream == Upstream::Absent {
            self.server.store(NOWHERE, Ordering::Release);
        }
    }

    /// The link is lost, or Redis refused the SUBSCRIBE.
    pub(crate) fn lose_upstream(&self) {
        let mut state = self.state.lock();
        state.upstream.lose();
        self.server.store(NOWHERE, Ordering::Release);
        state.owes_gap |= !state.members.is_empty();
    }

    /// A message of the channel was dropped on its way here: tells the members now.
    pub fn tell_gap(&self, fanout: &mut Fanout<S>) {
        let mut state = self.state.lock();
        state.deliver(&self.name, fanout);
        state.tell_gap(&self.name, fanout);
    }

    /// Tells the members who came or went, in the channel's order.
    pub fn tell(&self, frame: &Arc<Frame>, fanout: &mut Fanout<S>) {
        let mut state = self.state.lock();
        state.deliver(&self.name, fanout);
        state.tell(frame, fanout);
    }
}

impl<S: Subscriber> State<S> {
    fn deliver(&mut self, name: &str, fanout: &mut Fanout<S>) {
        if !self.gathered.is_empty() {
            let gathered = std::mem::take(&mut self.gathered);
            self.push(&Publication::new(name, &gathered.payloads()), fanout);
        }
    }

    /// The walk: pushes a publication to every member, in one go.
    fn push(&mut self, publication: &Publication<'_>, fanout: &mut Fanout<S>) {
        let started_us = clock::now_us();
        let (late, messages) = (fanout.late.len(), publication.messages());
        fanout.next_channel();
        let took = |member: &&S| fanout.push(member, publication.frame(member.format()));
        let count = self.members.iter().filter(took).count();
        self.late = fanout.late[late..].to_vec();
        fanout.delivered += count * messages;
        fanout.walks_us.push(clock::now_us() - started_us);
    }

    /// Whoever publishes has to wait for those that are still late.
    fn tell_late(&mut self, fanout: &mut Fanout<S>) {
        self.late.retain(|subscriber| !subscriber.has_room());
        fanout.late.extend_from_slice(&self.late);
    }

    /// Raw subscribers get payloads and nothing else: for them a gap is only counted.
    fn tell_gap(&self, name: &str, fanout: &mut Fanout<S>) {
        self.tell(&event::upstream_gap(name), fanout);
    }

    fn tell(&self, frame: &Arc<Frame>, fanout: &mut Fanout<S>) {
        for member in self.members.iter().filter(|member| member.format() == Format::Json) {
            fanout.push(member, frame);
        }
    }
}

enum Place {
    Joined(Position),
    Waiting(Position),
}

impl Ticket {
    /// Where the subscriber is now; to be asked under the channel's lock.
    fn place(&self) -> Place {
        match self {
            Self::Joined(position) => Place::Joined(*position),
            Self::Pending(seat) => match seat.load(Ordering::Relaxed) {
                seat if seat & WAITING == 0 => Place::Joined(Position::from_u64(seat)),
                seat => Place::Waiting(Position::from_u64(seat & !WAITING)),
            },
        }
    }
}
