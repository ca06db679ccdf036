//! The one connection that listens to a Redis server, for all its channels.
//!
//! Level-triggered: the hub's channels are what is wanted, Redis' confirmations what is there, and
//! each turn of the loop reconciles the two in batches. Lost links, races between last leave and
//! first join, and the first start are one code path. Whoever subscribes is told so only after the
//! confirmation; after a loss, whoever stayed is told a gap.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use redis::AsyncConnectionConfig;
use redis::aio::MultiplexedConnection;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tracing::{info, warn};

use crate::broker::Broker;
use crate::channel::Channel;
use crate::clock;
use crate::cluster::Cluster;
use crate::connection::Connection;
use crate::control::{self, Control, Probe, Probing};
use crate::fanout::Fanout;
use crate::inbox::{Arrival, Inbox};
use crate::metrics::{Drop as DropReason, Link};
use crate::redis_link::{self, Backoff, Endpoint, is_about_slots};
use crate::servers::Servers;
use crate::upstream::Step;

/// Channel names of one SUBSCRIBE or UNSUBSCRIBE.
const BATCH_NAMES: usize = 512;

/// Commands that may be outstanding.
const COMMANDS_MAX: usize = 64;

/// A command that is not answered for this long means that the link is dead.
const RESPONSE_TIMEOUT: Duration = Duration::from_secs(5);

/// A channel that Redis refuses (a missing permission) is tried again after this (µs).
const REFUSED_RETRY_US: u64 = 5_000_000;

/// A link that held this long was good: the next pause starts small again.
const STABLE_TIME: Duration = Duration::from_secs(5);

/// A cluster that did not take a SSUBSCRIBE is asked again after this (µs): a slot is moving, or its node failed.
const MOVED_RETRY_US: u64 = 100_000;

/// When every instance has followed to a new primary: sentinels tell each other within 2 s, and are asked each second.
const FOLLOW_TIME: Duration = Duration::from_secs(5);

type HubChannel = Arc<Channel<Arc<Connection>>>;

/// What a multiplexer needs to know.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The place of its server in the topology.
    pub server: usize,
    /// `HUBCAST_REDIS_CHANNEL_PREFIX`
    pub channel_prefix: Box<str>,
    /// How often a probe goes through Redis and back.
    pub probe_interval: Duration,
}

/// Listens until the runtime ends.
pub async fn run(mut endpoint: Endpoint, settings: Settings, broker: Arc<Broker>, servers: Arc<Servers>) {
    let control = Cluster::control_channels(&settings.channel_prefix, &broker.shared.instance_id);
    let context = Context { settings, control, broker, servers };
    let (broker, server) = (&context.broker, context.settings.server);
    let mut backoff = Backoff::default();
    let mut was_up = false;
    loop {
        // Most places of a cluster have no server: an inbox takes megabytes.
        context.forgetting(endpoint.server()).await;
        let inbox = Arc::new(Inbox::new(&context.control));
        match context.forgetting(connect(&mut endpoint, &inbox, &context.control)).await {
            Ok(connection) => {
                info!(server, "listening to redis");
                if was_up {
                    broker.shared.metrics.reconnected(Link::Subscribe);
                }
                broker.note_link(server, Link::Subscribe, true);
                let since = Instant::now();
                let mut turn = Turn::new(connection, inbox, &context, was_up);
                turn.followed = endpoint.has_moved().then(|| since + FOLLOW_TIME);
                let why = turn.serve(&mut endpoint).await;
                warn!(server, why, "lost the listening connection to redis");
                broker.note_link(server, Link::Subscribe, false);
                endpoint.doubt();
                turn.lose().await;
                was_up = true;
                if since.elapsed() > STABLE_TIME {
                    backoff = Backoff::default();
                }
            }
            Err(error) => {
                if backoff.is_first() {
                    warn!(server, %error, "cannot listen to redis, retrying");
                }
            }
        }
        context.forgetting(tokio::time::sleep(backoff.pause())).await;
    }
}

/// What outlives a connection.
struct Context {
    settings: Settings,
    /// The control channel of all instances, and our own.
    control: [String; 2],
    broker: Arc<Broker>,
    servers: Arc<Servers>,
}

impl Context {
    fn is_control(&self, redis_channel: &[u8]) -> bool {
        self.control.iter().any(|control| control.as_bytes() == redis_channel)
    }

    /// Awaits `task` while there is no link. Channels that come and go meanwhile are dropped at once, so
    /// they cannot pile up; those that stay are listed again by the next turn.
    async fn forgetting<T>(&self, task: impl Future<Output = T>) -> T {
        let (hub, server) = (&self.broker.hub, self.settings.server);
        tokio::pin!(task);
        loop {
            tokio::select! {
                biased;
                result = &mut task => return result,
                () = hub.changed(server) => {
                    for channel in hub.take_changed(server) {
                        if !hub.pass_on(&channel, server) {
                            hub.forget(&channel);
                        }
                    }
                }
            }
        }
    }
}

/// Connects and subscribes to the control channels, which proves that the link listens.
async fn connect(
    endpoint: &mut Endpoint,
    inbox: &Arc<Inbox>,
    control: &[String; 2],
) -> redis::RedisResult<MultiplexedConnection> {
    let pushed = Arc::clone(inbox);
    let config = AsyncConnectionConfig::new()
        .set_connection_timeout(Some(redis_link::CONNECT_TIMEOUT))
        .set_response_timeout(Some(RESPONSE_TIMEOUT))
        .set_push_sender(move |push| {
            pushed.push(push);
            Ok::<(), ()>(())
        });
    let mut connection = endpoint.connect(&config).await?;
    connection.subscribe(control).await?;
    Ok(connection)
}

/// One connection's time.
struct Turn<'a> {
    connection: MultiplexedConnection,
    inbox: Arc<Inbox>,
    context: &'a Context,
    broker: &'a Arc<Broker>,
    server: usize,
    is_reconnect: bool,
    /// SUBSCRIBEs and UNSUBSCRIBEs whose answer is awaited.
    commands: JoinSet<Answered>,
    /// Batches that wait until fewer commands are outstanding, and whether they are to be subscribed.
    waiting: VecDeque<(Vec<HubChannel>, bool)>,
    /// Channels to look at again, and when (µs), earliest first: they linger, or were refused.
    later: VecDeque<(u64, HubChannel)>,
    probe: Probe,
    /// When the other instances have followed to this server, too.
    followed: Option<Instant>,
}

/// An answered command.
struct Answered {
    is_subscribe: bool,
    channels: Vec<HubChannel>,
    answer: redis::RedisResult<()>,
}

impl<'a> Turn<'a> {
    fn new(connection: MultiplexedConnection, inbox: Arc<Inbox>, context: &'a Context, is_reconnect: bool) -> Self {
        let (broker, server) = (&context.broker, context.settings.server);
        let probe = Probe::new(server, context.settings.probe_interval);
        let (commands, waiting, later) = (JoinSet::new(), VecDeque::new(), VecDeque::new());
        let followed = None;
        Self { connection, inbox, context, broker, server, is_reconnect, commands, waiting, later, probe, followed }
    }

    /// Serves until the link is lost; returns why.
    async fn serve(&mut self, endpoint: &mut Endpoint) -> &'static str {
        let broker = self.broker;
        let fences = self.context.servers.fence(self.server);
        let inbox = Arc::clone(&self.inbox);
        broker.hub.list_all(self.server);
        loop {
            self.take_arrivals().await;
            if let Some(why) = self.inbox.lost() {
                return why;
            }
            self.reconcile();
            self.miss_stragglers().await;
            match self.probe.due() {
                Probing::Send(payload) => self.send_control(&payload),
                Probing::Rest => {}
                Probing::Dead => return "a probe did not come back",
            }
            let due = self.next_due();
            tokio::select! {
                () = inbox.arrived() => {}
                () = broker.hub.changed(self.server) => {}
                () = tokio::time::sleep_until(due) => {}
                fence = fences.asked() => self.send_control(&control::fence(self.server, fence)),
                () = endpoint.moved() => return "the server is another one now",
                Some(Ok(answered)) = self.commands.join_next() => {
                    // What arrived before the answer tells what it means.
                    self.take_arrivals().await;
                    if let Some(why) = self.answered(answered, endpoint) {
                        return why;
                    }
                    self.send_waiting();
                }
            }
        }
    }

    /// Acts on an answer; returns why the link is to be given up, if it is.
    fn answered(&mut self, answered: Answered, endpoint: &Endpoint) -> Option<&'static str> {
        let Answered { is_subscribe, channels, answer } = answered;
        match answer {
            Ok(()) => {}
            Err(error) if is_about_slots(&error) => {}
            Err(error) if is_subscribe && !error.is_unrecoverable_error() && !error.is_timeout() => {
                self.refused(channels, &error);
                return None;
            }
            Err(error) => {
                warn!(server = self.server, %error, channels = channels.len(), "redis did not carry out a command");
                return Some("a command was not carried out");
            }
        }
        if self.context.servers.topology.is_cluster() {
            self.retry_unconfirmed(is_subscribe, channels, endpoint);
        }
        None
    }

    /// Every confirmation comes before the answer to the whole. Who has none is on another node by now, or on none.
    fn retry_unconfirmed(&mut self, is_subscribe: bool, channels: Vec<HubChannel>, endpoint: &Endpoint) {
        for channel in channels {
            let is_unconfirmed = match is_subscribe {
                true => channel.is_subscribing_at(self.server),
                false => channel.keep_at(self.server),
            };
            if !is_unconfirmed {
                continue;
            }
            if is_subscribe {
                self.broker.hub.refuse_upstream(&channel);
            }
            self.look_again(clock::now_us() + MOVED_RETRY_US, channel);
            endpoint.doubt();
        }
    }

    /// Delivers what has arrived, with one flush for all of it unless a subscriber is late.
    async fn take_arrivals(&mut self) {
        let mut fanout = Fanout::default();
        for _ in 0..self.inbox.len() {
            let Some(arrival) = self.inbox.pop() else { break };
            self.take(arrival, &mut fanout);
            if fanout.needs_pause() {
                self.broker.deliver(&mut fanout);
                self.broker.settle(&mut fanout).await;
                tokio::task::yield_now().await;
            }
        }
        self.broker.deliver(&mut fanout);
        self.broker.shared.metrics.dropped(DropReason::RedisQueueFull, self.inbox.take_dropped_count());
        for name in self.inbox.take_dropped() {
            if let Some(channel) = self.channel(&name) {
                channel.miss(&mut fanout);
            }
        }
        self.broker.settle(&mut fanout).await;
    }

    /// What others published at the old primary, before they followed, is missing here.
    async fn miss_stragglers(&mut self) {
        if self.followed.take_if(|at| *at <= Instant::now()).is_none() {
            return;
        }
        let mut fanout = Fanout::default();
        for channel in self.broker.hub.channels() {
            if channel.upstream_server() == Some(self.server) {
                channel.miss(&mut fanout);
            }
            if fanout.needs_pause() {
                self.broker.settle(&mut fanout).await;
            }
        }
        self.broker.settle(&mut fanout).await;
    }

    fn take(&mut self, arrival: Arrival, fanout: &mut Fanout<Arc<Connection>>) {
        match arrival {
            Arrival::Message { channel, payload, .. } if self.context.is_control(&channel) => {
                // A fence stands for everything before it.
                self.broker.deliver(fanout);
                self.control(&payload);
            }
            Arrival::Message { channel, payload, after_gap } => {
                let Some(name) = self.context.servers.topology.channel_name(&channel) else { return };
                let Some(hub_channel) = self.broker.hub.channel(name) else { return };
                if after_gap {
                    hub_channel.miss(fanout);
                }
                if self.broker.tell_presence(name, &payload, fanout) {
                    return;
                }
                self.broker.take(&hub_channel, &payload.into(), fanout);
            }
            Arrival::Subscribed(name) => {
                if let Some(channel) = self.own_channel(&name) {
                    self.broker.hub.confirm_subscribe(&channel, fanout);
                }
            }
            Arrival::Unsubscribed(name) => {
                if let Some(channel) = self.own_channel(&name) {
                    self.broker.hub.confirm_unsubscribe(&channel);
                }
            }
        }
    }

    /// The channel that this server confirms something about.
    fn channel(&self, redis_channel: &[u8]) -> Option<HubChannel> {
        self.broker.hub.channel(self.context.servers.topology.channel_name(redis_channel)?)
    }

    /// The same, if this server has, or was asked for, its subscription: not what is late from a former owner.
    fn own_channel(&self, redis_channel: &[u8]) -> Option<HubChannel> {
        self.channel(redis_channel).filter(|channel| channel.upstream_server() == Some(self.server))
    }

    /// Sends what brings Redis' subscriptions to the hub's channels.
    fn reconcile(&mut self) {
        let now_us = clock::now_us();
        let mut changed = self.broker.hub.take_changed(self.server);
        while self.later.front().is_some_and(|(at_us, _)| *at_us <= now_us) {
            changed.extend(self.later.pop_front().map(|(_, channel)| channel));
            changed.last().inspect(|channel| channel.is_awaited.store(false, Ordering::Release));
        }
        let (mut subscribe, mut unsubscribe) = (Vec::new(), Vec::new());
        for channel in changed {
            if self.broker.hub.pass_on(&channel, self.server) {
                continue;
            }
            match channel.reconcile(self.server, now_us) {
                Step::Rest => {}
                Step::Subscribe => subscribe.push(channel),
                Step::Unsubscribe => unsubscribe.push(channel),
                Step::LookAgainAt(at_us) => self.look_again(at_us, channel),
                Step::Forget => self.broker.hub.forget(&channel),
            }
        }
        if self.is_reconnect {
            self.broker.shared.metrics.resubscribes.inc_by(subscribe.len() as u64);
            self.is_reconnect = subscribe.is_empty();
        }
        for batch in subscribe.chunks(BATCH_NAMES) {
            self.send(batch, true);
        }
        for batch in unsubscribe.chunks(BATCH_NAMES) {
            self.send(batch, false);
        }
    }

    /// Looks at the channel once more; one that is looked at later anyhow has its turn then.
    fn look_again(&mut self, at_us: u64, channel: HubChannel) {
        if channel.is_awaited.swap(true, Ordering::AcqRel) {
            return;
        }
        let at = self.later.partition_point(|(other_us, _)| *other_us <= at_us);
        self.later.insert(at, (at_us, channel));
    }

    /// Has a batch sent when it is its turn: what is outstanding fits into the inbox as confirmations.
    fn send(&mut self, batch: &[HubChannel], is_subscribe: bool) {
        self.waiting.push_back((batch.to_vec(), is_subscribe));
        self.send_waiting();
    }

    fn send_waiting(&mut self) {
        while self.commands.len() < COMMANDS_MAX
            && let Some((channels, is_subscribe)) = self.waiting.pop_front()
        {
            self.send_batch(channels, is_subscribe);
        }
    }

    /// Sends one batch; the confirmations arrive as pushes, in order with the messages.
    fn send_batch(&mut self, channels: Vec<HubChannel>, is_subscribe: bool) {
        let topology = &self.context.servers.topology;
        let names: Vec<_> = channels.iter().map(|channel| topology.redis_channel(channel.name())).collect();
        let is_cluster = topology.is_cluster();
        let mut connection = self.connection.clone();
        self.commands.spawn(async move {
            let answer = match (is_cluster, is_subscribe) {
                (true, _) => {
                    each(&mut connection, if is_subscribe { "SSUBSCRIBE" } else { "SUNSUBSCRIBE" }, &names).await
                }
                (false, true) => connection.subscribe(&names).await,
                (false, false) => connection.unsubscribe(&names).await,
            };
            Answered { is_subscribe, channels, answer }
        });
    }

    /// Redis refused a SUBSCRIBE. In a batch one name may spoil it for the rest: each is tried alone.
    fn refused(&mut self, mut channels: Vec<HubChannel>, error: &redis::RedisError) {
        channels.retain(|channel| channel.is_subscribing_at(self.server));
        if let [channel] = channels.as_slice() {
            warn!(%error, channel = channel.name(), "redis refuses the channel, its subscribers wait");
            self.broker.hub.refuse_upstream(channel);
            self.look_again(clock::now_us() + REFUSED_RETRY_US, Arc::clone(channel));
            return;
        }
        for channel in channels {
            self.send(&[channel], true);
        }
    }

    /// Publishes to our own control channel.
    fn send_control(&mut self, payload: &str) {
        let mut connection = self.connection.clone();
        let mut publish = redis::cmd("PUBLISH");
        publish.arg(&self.context.control[1]).arg(payload);
        self.commands.spawn(async move {
            // An unsolicited `sunsubscribe` may be taken for the answer, so what it says does not count.
            let answer = publish.query_async::<redis::Value>(&mut connection).await.map(drop);
            Answered { is_subscribe: false, channels: Vec::new(), answer }
        });
    }

    /// An envelope arrived, or a probe or a fence came back.
    fn control(&mut self, payload: &[u8]) {
        match control::read(payload) {
            Some(Control::Envelope) => self.broker.cluster.arrived(payload, &self.broker.shared.instance_id),
            // In a cluster, those of all nodes come back on each.
            Some(Control::Fence { server, number }) if server == self.server => {
                self.context.servers.fence(server).came_back(number);
            }
            Some(Control::Probe { server, sent_us }) if server == self.server => {
                self.probe.came_back();
                self.broker.shared.metrics.probe_lag_us.set(clock::now_us().saturating_sub(sent_us) as i64);
            }
            _ => {}
        }
    }

    fn next_due(&self) -> Instant {
        let later = self
            .later
            .front()
            .map(|(at_us, _)| Instant::now() + Duration::from_micros(at_us.saturating_sub(clock::now_us())));
        [later, self.followed].into_iter().flatten().fold(self.probe.next(), Instant::min)
    }

    /// Delivers what had arrived before the loss, then marks every channel so that the next turn wants it back.
    async fn lose(&mut self) {
        self.commands.abort_all();
        self.take_arrivals().await;
        self.broker.hub.lose_upstream(self.server);
        for (_, channel) in self.later.drain(..) {
            channel.is_awaited.store(false, Ordering::Release);
            // It may belong to another server by now.
            self.broker.hub.list(&channel);
        }
    }
}

/// One command each, in one write: in a cluster, channels of one node may be in different slots. Fails with the
/// first refusal that is not about slots.
async fn each(connection: &mut MultiplexedConnection, command: &str, names: &[String]) -> redis::RedisResult<()> {
    let mut pipeline = redis::pipe();
    pipeline.ignore_errors();
    for name in names {
        pipeline.cmd(command).arg(name);
    }
    let answers: Vec<redis::RedisResult<redis::Value>> = pipeline.query_async(connection).await?;
    let refusal = answers.into_iter().filter_map(Result::err).find(|error| !is_about_slots(error));
    refusal.map_or(Ok(()), Err)
}
