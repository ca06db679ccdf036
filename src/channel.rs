//! One channel: its subscribers, those who wait for it to become live, and its order lock.
//!
//! **One order per channel**: every push that a client can see in relation to others on the
//! channel (publications, `subscribed`, `unsubscribed`, `gap`) happens under the order lock, with
//! no I/O and no await. Lock order: channel, then outbox. Connections that overflow are only
//! marked; they are closed after the lock is released.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use parking_lot::Mutex;

use crate::bundle::{Bundle, Gathering};
use crate::clock;
use crate::cursor::Cursor;
use crate::event;
use crate::fanout::{Fanout, Subscriber};
use crate::following::Following;
use crate::frame::Frame;
use crate::history_memory;
use crate::history_view::{Gap, Start};
use crate::members::{Members, Position};
use crate::pending::Pending;
use crate::publication::{Format, Message, Origin, Publication};
use crate::slow_policy::SlowPolicy;
use crate::ticket::{Place, Ticket};
use crate::upstream::{Step, Upstream};

/// What a channel is like, by its rule.
#[derive(Debug)]
pub(crate) struct Nature {
    pub gathering: Gathering,
    pub has_presence: bool,
    /// Subscribers begin with the last event.
    pub is_cached: bool,
    pub past: Option<Past>,
    pub slow: SlowPolicy,
}

/// Where the past of a channel with history is.
#[derive(Debug)]
pub(crate) enum Past {
    /// Here.
    Memory(Arc<history_memory::Past>),
    /// At Redis: what this instance knows of it.
    Redis(Arc<Following>),
}

/// A subscription that a client asks for.
#[derive(Clone, Copy, Debug, Default)]
pub struct Wish<'a> {
    /// The command's id, for the reply.
    pub id: Option<&'a str>,
    /// Where the client stands already.
    pub after: Option<Cursor>,
}

/// A channel of the hub.
#[derive(Debug)]
pub struct Channel<S> {
    name: Arc<str>,
    pub(crate) nature: Nature,
    pub(crate) state: Mutex<State<S>>,
    /// The channel waits in the hub's list of changed ones.
    pub(crate) is_listed: AtomicBool,
    /// A multiplexer will look at it at some later time.
    pub(crate) is_awaited: AtomicBool,
    /// The Redis server that has, or was asked for, its subscription; written under the lock. [`NOWHERE`]: none.
    server: AtomicUsize,
}

/// No Redis server.
const NOWHERE: usize = usize::MAX;

/// What the order lock guards.
#[derive(Debug)]
pub(crate) struct State<S> {
    members: Members<S>,
    /// Publications that are in the channel's order, but not pushed yet.
    gathered: Bundle,
    /// Subscribers that were late at the last delivery: whoever publishes next waits for them.
    late: Vec<S>,
    /// Subscriptions that are confirmed to the client once the channel is live.
    pub(crate) pending: Members<Pending<S>>,
    pub(crate) upstream: Upstream,
    /// Where the channel stands, if it has history.
    pub(crate) position: Option<Cursor>,
    /// The last cursor that its members were told; `None` while they were told different ones, as by entries that are no
    /// events.
    told: Option<Cursor>,
    /// When the last subscriber left (µs); `None` while there is one.
    pub(crate) idle_since_us: Option<u64>,
    /// The link was lost while there were members: they are told when it is back.
    owes_gap: bool,
    /// Taken out of the hub; whoever still holds it must look the name up again.
    pub(crate) is_removed: bool,
}

/// What joining came to.
pub(crate) enum Join {
    /// The ticket, and whether the multiplexer must be told.
    Done(Ticket, bool),
    /// The channel was removed in the meantime.
    Removed,
}

impl<S: Subscriber> Channel<S> {
    pub(crate) fn new(name: &str, upstream: Upstream, nature: Nature) -> Self {
        let state = State {
            members: Members::default(),
            gathered: Bundle::default(),
            late: Vec::new(),
            pending: Members::default(),
            upstream,
            position: None,
            told: None,
            idle_since_us: Some(clock::now_us()),
            owes_gap: false,
            is_removed: false,
        };
        Self {
            name: name.into(),
            nature,
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
        self.nature.has_presence
    }

    /// Subscribers that are joined, and those that wait for the channel to become live.
    pub fn counts(&self) -> (usize, usize) {
        let state = self.state.lock();
        (state.members.len(), state.waiting().count())
    }

    /// The joined and the waiting subscribers.
    pub fn subscribers(&self) -> Vec<S> {
        let state = self.state.lock();
        state.members.iter().chain(state.waiting()).cloned().collect()
    }

    /// How long publications may wait for others.
    pub fn window(&self) -> Duration {
        self.nature.gathering.window
    }

    /// Puts a publication in the channel's order. It is pushed together with those that follow, at the latest
    /// when whoever finds the channel in `fanout` has it delivered.
    pub fn gather(self: &Arc<Self>, message: Message<'_>, fanout: &mut Fanout<S>) {
        let mut state = self.state.lock();
        state.tell_late(fanout);
        let before = state.standing();
        if message.cursor.is_some() {
            (state.position, state.told) = (message.cursor, message.cursor);
        }
        if !Bundle::is_for(message.payload) || self.nature.slow.is_latest() {
            state.deliver(self, fanout);
            return state.push(&Publication::of(self.origin(before), &[message]), fanout);
        }
        if !state.gathered.has_room(message.payload, &self.nature.gathering) {
            state.deliver(self, fanout);
        }
        let is_known = fanout.gathered.last().is_some_and(|last| Arc::ptr_eq(last, self));
        // A window has one timer; otherwise everybody who publishes can have it delivered.
        if !is_known && (state.gathered.is_empty() || self.window().is_zero()) {
            fanout.gathered.push(Arc::clone(self));
        }
        state.gathered.add(message, before);
    }

    fn origin(&self, before: Option<Cursor>) -> Origin<'_> {
        Origin { channel: &self.name, slow: &self.nature.slow, before }
    }

    /// Whether somebody who was late at the last delivery has no room yet: what comes now waits.
    pub fn is_held_up(&self) -> bool {
        self.state.lock().is_held_up()
    }

    /// Pushes what was gathered to every member.
    pub fn deliver(&self, fanout: &mut Fanout<S>) {
        self.state.lock().deliver(self, fanout);
    }

    /// Joins now if the channel is live (the reply goes first), or as soon as it is. Without a wish there is no reply.
    pub(crate) fn join(self: &Arc<Self>, subscriber: &S, wish: Option<Wish<'_>>, fanout: &mut Fanout<S>) -> Join {
        if let Some(past) = &self.nature.past {
            return self.join_past(past, subscriber, wish, fanout);
        }
        let mut state = self.state.lock();
        if state.is_removed {
            return Join::Removed;
        }
        state.deliver(self, fanout);
        state.idle_since_us = None;
        if state.upstream == Upstream::Live {
            if let Some(wish) = wish {
                fanout.push(subscriber, &event::subscribed(wish.id, &self.name, None));
            }
            return Join::Done(Ticket::Joined(state.enter(self, subscriber.clone(), None)), false);
        }
        let (ticket, _) = state.wait(subscriber, wish);
        Join::Done(ticket, state.upstream == Upstream::Absent)
    }

    /// Answers a repeated subscribe: at once if joined, else together with the first. False: too many wait already.
    pub(crate) fn repeat(&self, ticket: &Ticket, subscriber: &S, wish: Wish<'_>, fanout: &mut Fanout<S>) -> bool {
        let mut state = self.state.lock();
        state.deliver(self, fanout);
        let standing = state.standing();
        let pending = match ticket.place() {
            Place::Waiting(position) => state.pending.get_mut(position),
            Place::Joined(_) | Place::Nowhere => None,
        };
        let Some(pending) = pending else {
            let start = standing.map(Start::at);
            fanout.push(subscriber, &event::subscribed(wish.id, &self.name, start.as_ref()));
            return true;
        };
        pending.repeat(wish)
    }

    /// Removes a subscriber, then pushes `reply` to it. Returns true when nobody is left.
    pub(crate) fn leave(&self, ticket: &Ticket, reply: Option<(&S, &Arc<Frame>)>, fanout: &mut Fanout<S>) -> bool {
        // Whoever waits for a read does so no more.
        let mut following = self.following().map(Following::hold);
        let mut state = self.state.lock();
        if reply.is_some() {
            state.deliver(self, fanout);
        }
        match ticket.place() {
            Place::Joined(position) => {
                let member = state.members.remove(position);
                member.iter().filter(|_| self.has_presence()).for_each(|member| member.left(&self.name));
            }
            Place::Waiting(position) => {
                state.pending.remove(position);
                if let Some(following) = &mut following {
                    following.leave(&position);
                }
            }
            Place::Nowhere => {}
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
        let mut following = self.following().map(Following::hold);
        let mut state = self.state.lock();
        let idle_since_us = state.idle_since_us;
        let step = state.upstream.reconcile(idle_since_us, now_us);
        match (step, &mut following) {
            (Step::Subscribe, _) => self.server.store(server, Ordering::Release),
            // Whoever comes from now on waits for the next SUBSCRIBE.
            (Step::Unsubscribe, Some(following)) => following.unconfirmed(),
            _ => {}
        }
        step
    }

    /// The Redis server that has, or was asked for, the channel's subscription.
    pub(crate) fn upstream_server(&self) -> Option<usize> {
        Some(self.server.load(Ordering::Acquire)).filter(|server| *server != NOWHERE)
    }

    /// An UNSUBSCRIBE was answered without a confirmation: the channel is as live as before. True if it was so.
    pub(crate) fn keep_at(&self, server: usize) -> bool {
        let keep = || {
            let mut state = self.state.lock();
            self.upstream_server() == Some(server) && state.upstream.keep()
        };
        match self.following() {
            None => keep(),
            Some(following) => following.ask(|follow, out| {
                let is_kept = keep();
                if is_kept {
                    follow.confirmed(out);
                }
                is_kept
            }),
        }
    }

    /// Whether a SUBSCRIBE is sent to the server and not confirmed.
    pub(crate) fn is_subscribing_at(&self, server: usize) -> bool {
        let state = self.state.lock();
        state.upstream == Upstream::Subscribing && self.upstream_server() == Some(server)
    }

    /// Redis confirmed the SUBSCRIBE: tells members of the gap they are owed, then lets those who waited in, or has the
    /// past looked at first.
    pub(crate) fn confirm_subscribe(self: &Arc<Self>, fanout: &mut Fanout<S>) {
        match self.following() {
            None => drop(self.become_live(fanout)),
            Some(following) => following.with(Some(self), fanout, |follow, out, fanout| {
                if self.become_live(fanout) {
                    follow.confirmed(out);
                }
            }),
        }
    }

    /// True if it was not live before.
    fn become_live(&self, fanout: &mut Fanout<S>) -> bool {
        let mut state = self.state.lock();
        if !state.upstream.confirm_subscribe() {
            return false;
        }
        state.deliver(self, fanout);
        if std::mem::take(&mut state.owes_gap) {
            state.tell_gap(self, &Gap::upstream(None), fanout);
        }
        if self.nature.past.is_none() {
            for pending in state.pending.take_all() {
                state.admit(self, pending, None, &[], fanout);
            }
        }
        true
    }

    /// Redis confirmed the UNSUBSCRIBE, or ended the subscription itself.
    pub(crate) fn confirm_unsubscribe(&self) {
        let mut following = self.following().map(Following::hold);
        let mut state = self.state.lock();
        let was_live = state.upstream.confirm_unsubscribe();
        self.note_loss(&mut state, was_live);
        if state.upstream == Upstream::Absent {
            self.server.store(NOWHERE, Ordering::Release);
            if let Some(following) = &mut following {
                following.unconfirmed();
            }
        }
    }

    /// The link is lost, or Redis refused the SUBSCRIBE.
    pub(crate) fn lose_upstream(&self) {
        let mut following = self.following().map(Following::hold);
        let mut state = self.state.lock();
        state.upstream.lose();
        self.server.store(NOWHERE, Ordering::Release);
        self.note_loss(&mut state, true);
        if let Some(following) = &mut following {
            following.unconfirmed();
        }
    }

    /// Members may have missed something. A past makes up for it, but for joins and leaves.
    fn note_loss(&self, state: &mut State<S>, is_lost: bool) {
        let is_made_up_for = self.nature.past.is_some() && !self.has_presence();
        state.owes_gap |= is_lost && !is_made_up_for && !state.members.is_empty();
    }

    /// A message of the channel was dropped on its way here: has the past looked at, or tells the members now.
    pub fn miss(self: &Arc<Self>, fanout: &mut Fanout<S>) {
        match self.following() {
            Some(following) => following.with(Some(self), fanout, |follow, out, _| follow.check(out)),
            None => self.tell_gap(&Gap::upstream(None), fanout),
        }
    }

    /// Continuity broke here: tells the members.
    pub(crate) fn tell_gap(&self, gap: &Gap, fanout: &mut Fanout<S>) {
        let mut state = self.state.lock();
        state.deliver(self, fanout);
        state.tell_gap(self, gap, fanout);
    }

    /// What this instance knows of the past at Redis.
    pub(crate) fn following(&self) -> Option<&Arc<Following>> {
        match &self.nature.past {
            Some(Past::Redis(following)) => Some(following),
            Some(Past::Memory(_)) | None => None,
        }
    }

    /// Tells the members who came or went, in the channel's order.
    pub fn tell(&self, frame: &Arc<Frame>, fanout: &mut Fanout<S>) {
        let mut state = self.state.lock();
        state.deliver(self, fanout);
        state.tell(frame, fanout);
    }
}

impl<S: Subscriber> State<S> {
    /// Where its members stand if all stand at one place, else where the channel does.
    fn standing(&self) -> Option<Cursor> {
        self.told.or(self.position)
    }

    pub(crate) fn deliver(&mut self, channel: &Channel<S>, fanout: &mut Fanout<S>) {
        if !self.gathered.is_empty() {
            let gathered = std::mem::take(&mut self.gathered);
            self.push(&Publication::of(channel.origin(gathered.before), &gathered.messages()), fanout);
        }
    }

    /// From here on the subscriber is told what all are told; it was told of its start.
    pub(crate) fn enter(&mut self, channel: &Channel<S>, subscriber: S, start: Option<&Start>) -> Position {
        let told = start.map(Start::told);
        if self.members.is_empty() {
            self.told = told;
        } else if self.told != told {
            self.told = None;
        }
        if channel.has_presence() {
            subscriber.entered(&channel.name);
        }
        self.idle_since_us = None;
        self.members.insert(subscriber)
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
        if self.is_held_up() {
            fanout.late.extend_from_slice(&self.late);
        }
    }

    fn is_held_up(&mut self) -> bool {
        self.late.retain(|subscriber| !subscriber.has_room());
        !self.late.is_empty()
    }

    /// Raw subscribers get payloads and nothing else: for them a gap is only counted. It names no cursors to those whose
    /// queue may lose, or has lost, the events beside it.
    fn tell_gap(&mut self, channel: &Channel<S>, gap: &Gap, fanout: &mut Fanout<S>) {
        fanout.gaps += 1;
        let gap = Gap { after: self.told, ..*gap };
        let exact = event::gap(&channel.name, &gap);
        if !channel.nature.slow.is_lossy() {
            return self.tell(&exact, fanout);
        }
        let vague = event::gap(&channel.name, &Gap { after: None, next: None, ..gap });
        self.tell_each(|member| if member.has_all() { &exact } else { &vague }, fanout);
    }

    fn tell(&mut self, frame: &Arc<Frame>, fanout: &mut Fanout<S>) {
        self.tell_each(|_| frame, fanout);
    }

    fn tell_each<'a>(&mut self, frame: impl Fn(&S) -> &'a Arc<Frame>, fanout: &mut Fanout<S>) {
        let late = fanout.late.len();
        for member in self.members.iter().filter(|member| member.format() == Format::Json) {
            fanout.push(member, frame(member));
        }
        if self.late.is_empty() {
            self.late = fanout.late[late..].to_vec();
        }
    }
}
