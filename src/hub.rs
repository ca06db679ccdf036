//! The hub: channel name to channel, in a sharded map, without an actor.
//!
//! Any task that holds a publication looks the channel up and walks its subscribers itself.
//! A shard lock is held only to clone an `Arc` out, or to insert or remove one; lock order is
//! shard, channel, outbox. No I/O, no await.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use dashmap::DashMap;
use parking_lot::Mutex;
use tokio::sync::Notify;

use crate::bundle::Gathering;
use crate::channel::{Channel, Join, Nature, Past, Wish};
use crate::cursor::Cursor;
use crate::fanout::{Fanout, Subscriber};
use crate::following::Followings;
use crate::frame::Frame;
use crate::history_memory::Memory;
use crate::outbox::Limits;
use crate::publication::Message;
use crate::rules::ChannelRules;
use crate::ticket::Ticket;
use crate::topology::Topology;
use crate::upstream::Upstream;

/// Shards of the channel map: 128 bytes each, and enough that 64 cores seldom meet.
const SHARDS: usize = 256;

/// All channels of this instance.
#[derive(Debug)]
pub struct Hub<S> {
    channels: DashMap<Arc<str>, Arc<Channel<S>>, foldhash::quality::RandomState>,
    /// How many they are: the map would have to ask all its shards.
    count: AtomicUsize,
    rules: ChannelRules,
    outbox: Limits,
    /// The gateway drains: publications do not wait for others any more.
    is_draining: AtomicBool,
    histories: Histories,
    upstream: Option<Upstreams<S>>,
}

/// The pasts of channels that have history.
#[derive(Debug)]
pub enum Histories {
    /// All of it.
    Memory(Memory),
    /// What is known of them at Redis.
    Redis(Followings),
}

/// The Redis servers, as far as the hub knows them: where a channel lives, and what has changed for each.
#[derive(Debug)]
struct Upstreams<S> {
    topology: Arc<Topology>,
    changes: Box<[Changes<S>]>,
}

/// Channels whose subscriptions at one Redis server may have to change. Each is listed at most once, so the
/// list is bounded by the number of channels.
#[derive(Debug)]
struct Changes<S> {
    list: Mutex<Vec<Arc<Channel<S>>>>,
    notify: Notify,
}

impl<S: Subscriber> Hub<S> {
    /// A hub without Redis: every channel is live at once.
    pub fn local(rules: ChannelRules, outbox: Limits) -> Arc<Self> {
        Self::new(rules, outbox, None)
    }

    /// A hub whose channels become live when a multiplexer confirms them.
    pub fn with_upstream(rules: ChannelRules, outbox: Limits, topology: Arc<Topology>) -> Arc<Self> {
        let changes = (0..topology.servers()).map(|_| Changes { list: Mutex::default(), notify: Notify::new() });
        let changes = changes.collect();
        Self::new(rules, outbox, Some(Upstreams { topology, changes }))
    }

    fn new(rules: ChannelRules, outbox: Limits, upstream: Option<Upstreams<S>>) -> Arc<Self> {
        let channels = DashMap::with_hasher_and_shard_amount(foldhash::quality::RandomState::default(), SHARDS);
        let histories = match upstream {
            Some(_) => Histories::Redis(Followings::default()),
            None => Histories::Memory(Memory::default()),
        };
        Arc::new(Self {
            channels,
            count: AtomicUsize::new(0),
            rules,
            outbox,
            is_draining: AtomicBool::new(false),
            histories,
            upstream,
        })
    }

    /// Puts a publication in the order of its channel, if anybody is in it. What has to be delivered for that is
    /// in `fanout`.
    pub fn gather(&self, channel: &str, message: Message<'_>, fanout: &mut Fanout<S>) {
        if let Some(channel) = self.channel(channel) {
            channel.gather(message, fanout);
            self.hurry(&channel, fanout);
        }
    }

    /// During a drain nothing waits.
    pub fn hurry(&self, channel: &Channel<S>, fanout: &mut Fanout<S>) {
        if self.is_draining.load(Ordering::Acquire) {
            channel.deliver(fanout);
        }
    }

    /// The pasts of channels that have history.
    pub fn histories(&self) -> &Histories {
        &self.histories
    }

    /// The rules of channels.
    pub fn rules(&self) -> &ChannelRules {
        &self.rules
    }

    /// Delivers what waits in channels that coalesce.
    pub fn deliver_held(&self, fanout: &mut Fanout<S>) {
        if self.rules.coalesces() {
            self.channels().iter().for_each(|channel| channel.deliver(fanout));
        }
    }

    /// From now on publications wait for nothing: who is closed after this has got all that were accepted before.
    pub fn start_draining(&self, fanout: &mut Fanout<S>) {
        self.is_draining.store(true, Ordering::Release);
        self.channels().iter().for_each(|channel| channel.deliver(fanout));
    }

    /// Whether the rule of a channel has presence, be anybody in it or not.
    pub fn has_presence(&self, name: &str) -> bool {
        self.rules.presence(name)
    }

    /// The channel of that name, if anybody is in it.
    pub fn channel(&self, name: &str) -> Option<Arc<Channel<S>>> {
        self.channels.get(name).map(|channel| Arc::clone(&channel))
    }

    /// Every channel at some moment during the call.
    pub fn channels(&self) -> Vec<Arc<Channel<S>>> {
        self.channels.iter().map(|channel| Arc::clone(&channel)).collect()
    }

    /// How many channels there are.
    pub fn len(&self) -> usize {
        self.count.load(Ordering::Relaxed)
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Joins a channel, creating it if need be.
    pub(crate) fn join(
        &self,
        name: &str,
        subscriber: &S,
        wish: Option<Wish<'_>>,
        fanout: &mut Fanout<S>,
    ) -> (Arc<Channel<S>>, Ticket) {
        loop {
            let channel = self.channel(name).unwrap_or_else(|| self.create(name));
            if let Join::Done(ticket, needs_upstream) = channel.join(subscriber, wish, fanout) {
                if needs_upstream {
                    self.list(&channel);
                }
                return (channel, ticket);
            }
        }
    }

    /// Leaves a channel, and drops it after its last subscriber. `reply` goes out after the removal.
    pub(crate) fn leave(
        &self,
        channel: &Arc<Channel<S>>,
        ticket: &Ticket,
        reply: Option<(&S, &Arc<Frame>)>,
        fanout: &mut Fanout<S>,
    ) {
        if channel.leave(ticket, reply, fanout) {
            match self.upstream {
                Some(_) => self.list(channel),
                None => self.forget(channel),
            }
        }
    }

    /// Drops a channel that nobody is in and Redis does not have.
    pub fn forget(&self, channel: &Channel<S>) {
        let removed = self.channels.remove_if(channel.name(), |_, current| {
            std::ptr::eq(Arc::as_ptr(current), channel) && current.remove_if_unused(self.upstream.is_some())
        });
        if removed.is_some() {
            self.count.fetch_sub(1, Ordering::Relaxed);
        }
    }

    /// Redis confirmed a SUBSCRIBE.
    pub fn confirm_subscribe(&self, channel: &Arc<Channel<S>>, fanout: &mut Fanout<S>) {
        channel.confirm_subscribe(fanout);
        // Everybody may have left meanwhile.
        self.list(channel);
    }

    /// Redis confirmed an UNSUBSCRIBE, or ended the subscription itself.
    pub fn confirm_unsubscribe(&self, channel: &Arc<Channel<S>>) {
        channel.confirm_unsubscribe();
        self.list(channel);
    }

    /// The link to a server is lost: its channels are absent there, and wanted as before.
    pub fn lose_upstream(&self, server: usize) {
        for channel in self.channels() {
            if channel.upstream_server() == Some(server) {
                channel.lose_upstream();
                self.list(&channel);
            }
        }
    }

    /// Has the multiplexer of a server look at every channel that is there or belongs there.
    pub fn list_all(&self, server: usize) {
        for channel in self.channels() {
            if self.upstream.as_ref().is_some_and(|upstream| upstream.server(&channel) == server) {
                self.list(&channel);
            }
        }
    }

    /// Has every channel looked at by the server that it belongs to.
    pub fn list_everything(&self) {
        self.channels().iter().for_each(|channel| self.list(channel));
    }

    /// Redis refused the SUBSCRIBE of one channel; the caller looks at it again later.
    pub fn refuse_upstream(&self, channel: &Channel<S>) {
        channel.lose_upstream();
    }

    /// Has the right multiplexer look at a channel.
    pub(crate) fn list(&self, channel: &Arc<Channel<S>>) {
        let Some(upstream) = &self.upstream else { return };
        if !channel.is_listed.swap(true, Ordering::AcqRel) {
            let changes = &upstream.changes[upstream.server(channel)];
            changes.list.lock().push(Arc::clone(channel));
            changes.notify.notify_one();
        }
    }

    /// Waits until a channel is listed for the server.
    pub async fn changed(&self, server: usize) {
        match &self.upstream {
            Some(upstream) => upstream.changes[server].notify.notified().await,
            None => std::future::pending().await,
        }
    }

    /// Takes the channels that are listed for the server. A change after this lists its channel anew.
    ///
    /// Some may belong to another server by now: [`Hub::pass_on`] takes care of them.
    pub fn take_changed(&self, server: usize) -> Vec<Arc<Channel<S>>> {
        let Some(upstream) = &self.upstream else { return Vec::new() };
        let listed = std::mem::take(&mut *upstream.changes[server].list.lock());
        for channel in &listed {
            channel.is_listed.swap(false, Ordering::AcqRel);
        }
        listed
    }

    /// Lists a channel for the server to which it belongs, if that is another one.
    pub fn pass_on(&self, channel: &Arc<Channel<S>>, from: usize) -> bool {
        let is_elsewhere = self.upstream.as_ref().is_some_and(|upstream| upstream.server(channel) != from);
        if is_elsewhere {
            self.list(channel);
        }
        is_elsewhere
    }

    fn create(&self, name: &str) -> Arc<Channel<S>> {
        let upstream = if self.upstream.is_some() { Upstream::Absent } else { Upstream::Live };
        let channel = Arc::new(Channel::new(name, upstream, self.nature(name)));
        let key = channel.shared_name();
        let created = self.channels.entry(key).or_insert_with(|| {
            self.count.fetch_add(1, Ordering::Relaxed);
            channel
        });
        Arc::clone(&created)
    }
}

impl<S: Subscriber> Hub<S> {
    fn nature(&self, name: &str) -> Nature {
        let is_cached = self.rules.cache(name);
        let past = self.rules.history(name).map(|retention| match &self.histories {
            Histories::Memory(memory) => Past::Memory(memory.past(name, &retention)),
            Histories::Redis(followings) => Past::Redis(followings.following(name, &retention, is_cached)),
        });
        Nature {
            gathering: Gathering::new(self.rules.coalesce(name), &self.outbox),
            has_presence: self.rules.presence(name),
            is_cached,
            past,
            slow: self.rules.slow(name),
        }
    }
}

impl<S: Subscriber> Upstreams<S> {
    /// The server that a channel is subscribed at, or else belongs to.
    fn server(&self, channel: &Channel<S>) -> usize {
        channel.upstream_server().unwrap_or_else(|| self.topology.server_of(channel.name()))
    }
}

/// The subscriptions of one subscriber; dropping it leaves every channel.
#[derive(Debug)]
pub struct Subscriptions<S: Subscriber> {
    hub: Arc<Hub<S>>,
    subscriber: S,
    joined: Vec<(Arc<Channel<S>>, Ticket)>,
    /// Channels of these on which it is behind and waits for what it missed.
    behind: Vec<(Arc<Channel<S>>, Ticket)>,
}

impl<S: Subscriber> Subscriptions<S> {
    /// No subscriptions yet.
    pub fn new(hub: Arc<Hub<S>>, subscriber: S) -> Self {
        Self { hub, subscriber, joined: Vec::new(), behind: Vec::new() }
    }

    /// How many there are, pending ones included.
    pub fn len(&self) -> usize {
        self.joined.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.joined.is_empty()
    }

    /// The names of the channels.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.joined.iter().map(|(channel, _)| channel.name())
    }

    /// Whether the channel is among them.
    pub fn contains(&self, name: &str) -> bool {
        self.position(name).is_some()
    }

    /// Subscribes; the wish is answered when the channel is live, before its first publication. Without one there is no
    /// reply. A repeated subscribe is answered and changes nothing. False: too many repeats wait already.
    pub fn subscribe(&mut self, name: &str, wish: Option<Wish<'_>>, fanout: &mut Fanout<S>) -> bool {
        match (self.position(name), wish) {
            (Some(at), Some(wish)) => {
                let (channel, ticket) = &self.joined[at];
                channel.repeat(ticket, &self.subscriber, wish, fanout)
            }
            (Some(_), None) => true,
            (None, wish) => {
                if self.joined.is_empty() {
                    // Most connections have one subscription: no spare capacity for them.
                    self.joined.reserve_exact(1);
                }
                self.joined.push(self.hub.join(name, &self.subscriber, wish, fanout));
                true
            }
        }
    }

    /// Unsubscribes, also a pending subscription; `reply` is pushed after the channel's last publication.
    /// True if there was a subscription.
    pub fn unsubscribe(&mut self, name: &str, reply: &Arc<Frame>, fanout: &mut Fanout<S>) -> bool {
        let Some(at) = self.position(name) else {
            fanout.push(&self.subscriber, reply);
            return false;
        };
        self.wait_no_more(name, fanout);
        let (channel, ticket) = self.joined.swap_remove(at);
        self.hub.leave(&channel, &ticket, Some((&self.subscriber, reply)), fanout);
        true
    }

    /// Has the subscriber, which is behind on a channel and stands `at`, told what it missed.
    pub fn catch_up(&mut self, name: &str, at: Cursor, fanout: &mut Fanout<S>) {
        self.wait_no_more(name, fanout);
        if let Some(index) = self.position(name) {
            let (channel, _) = &self.joined[index];
            let ticket = channel.catch_up(&self.subscriber, at, fanout);
            self.behind.extend(ticket.map(|ticket| (Arc::clone(channel), ticket)));
        }
    }

    fn wait_no_more(&mut self, name: &str, fanout: &mut Fanout<S>) {
        for (channel, ticket) in self.behind.extract_if(.., |(channel, _)| channel.name() == name) {
            channel.leave(&ticket, None, fanout);
        }
    }

    fn position(&self, name: &str) -> Option<usize> {
        self.joined.iter().position(|(channel, _)| channel.name() == name)
    }
}

impl<S: Subscriber> Drop for Subscriptions<S> {
    fn drop(&mut self) {
        // Leaving without a reply pushes nothing, so nothing can be scheduled.
        let mut fanout = Fanout::default();
        for (channel, ticket) in self.behind.drain(..) {
            channel.leave(&ticket, None, &mut fanout);
        }
        for (channel, ticket) in self.joined.drain(..) {
            self.hub.leave(&channel, &ticket, None, &mut fanout);
        }
    }
}
