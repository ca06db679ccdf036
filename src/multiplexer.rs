//! The one connection that listens to a Redis server, for all its channels.
//!
//! Each turn of its loop delivers what has arrived and has `listening.rs` reconcile the subscriptions with what the
//! hub wants. Lost links, races between last leave and first join, and the first start are one code path. Whoever
//! subscribes is told so only after the confirmation; after a loss, whoever stayed is told a gap.
//!
//! A reader that is behind holds up its own channels and nothing else: their messages are `parked.rs`'s until it has room.
//! Only where the server itself is late does the link wait.

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use redis::AsyncConnectionConfig;
use redis::aio::MultiplexedConnection;
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
use crate::listening::Listening;
use crate::metrics::{Drop as DropReason, Link};
use crate::parked::{Parcel, Parked};
use crate::redis_link::{self, Backoff, Endpoint};
use crate::servers::Servers;

/// A command that is not answered for this long means that the link is dead.
const RESPONSE_TIMEOUT: Duration = Duration::from_secs(5);

/// A link that held this long was good: the next pause starts small again.
const STABLE_TIME: Duration = Duration::from_secs(5);

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
    inbox: Arc<Inbox>,
    /// What has arrived for channels whose readers are behind.
    parked: Parked,
    context: &'a Context,
    broker: &'a Arc<Broker>,
    server: usize,
    listening: Listening<'a>,
    probe: Probe,
    /// When the other instances have followed to this server, too.
    followed: Option<Instant>,
}

impl<'a> Turn<'a> {
    fn new(connection: MultiplexedConnection, inbox: Arc<Inbox>, context: &'a Context, is_reconnect: bool) -> Self {
        let (broker, server) = (&context.broker, context.settings.server);
        let probe = Probe::new(server, context.settings.probe_interval);
        let listening = Listening::new(connection, broker, &context.servers.topology, server, is_reconnect);
        Self { inbox, parked: Parked::default(), context, broker, server, listening, probe, followed: None }
    }

    /// Serves until the link is lost; returns why.
    async fn serve(&mut self, endpoint: &mut Endpoint) -> &'static str {
        let (broker, control) = (self.broker, self.context.control[1].as_str());
        let fences = self.context.servers.fence(self.server);
        let inbox = Arc::clone(&self.inbox);
        broker.hub.list_all(self.server);
        loop {
            let mut progress = pin!(broker.shared.lanes.progress());
            self.release().await;
            self.take_arrivals().await;
            if let Some(why) = self.inbox.lost() {
                return why;
            }
            self.listening.reconcile();
            self.miss_stragglers().await;
            match self.probe.due() {
                Probing::Send(payload) => self.listening.publish(control, &payload),
                Probing::Rest => {}
                Probing::Dead => return "a probe did not come back",
            }
            let due = self.next_due();
            tokio::select! {
                () = inbox.arrived() => {}
                () = broker.hub.changed(self.server) => {}
                () = &mut progress, if !self.parked.is_empty() => {}
                () = tokio::time::sleep_until(due) => {}
                fence = fences.asked() => self.listening.publish(control, &control::fence(self.server, fence)),
                () = endpoint.moved() => return "the server is another one now",
                answered = self.listening.next_answer() => {
                    // What arrived before the answer tells what it means.
                    self.take_arrivals().await;
                    if let Some(why) = self.listening.answered(answered, endpoint) {
                        return why;
                    }
                }
            }
        }
    }

    /// Delivers what has arrived, with one flush for all of it unless somebody is late.
    async fn take_arrivals(&mut self) {
        let mut fanout = Fanout::default();
        for _ in 0..self.inbox.len() {
            let Some(arrival) = self.inbox.pop() else { break };
            self.take(arrival, &mut fanout);
            self.pause_if_needed(&mut fanout).await;
        }
        self.broker.deliver(&mut fanout);
        let dropped = self.inbox.take_dropped_count() + self.parked.take_dropped_count();
        self.broker.shared.metrics.dropped(DropReason::RedisQueueFull, dropped);
        for name in self.inbox.take_dropped() {
            if let Some(channel) = self.channel(&name) {
                self.miss(&channel, &name, &mut fanout);
            }
        }
        self.broker.flush(&mut fanout).await;
    }

    /// Goes on with channels whose readers have room again.
    async fn release(&mut self) {
        let mut fanout = Fanout::default();
        for name in self.parked.channels() {
            while self.release_next(&name, &mut fanout) {
                self.pause_if_needed(&mut fanout).await;
            }
        }
        self.broker.deliver(&mut fanout);
        self.broker.flush(&mut fanout).await;
        self.pass_fence();
    }

    /// What was published before a fence is delivered once nothing waits any more.
    fn pass_fence(&mut self) {
        if let Some(number) = self.parked.take_fence() {
            self.context.servers.fence(self.server).came_back(number);
        }
    }

    /// Delivers the next of what waits of a channel. False: it waits on, or there is no more.
    fn release_next(&mut self, redis_channel: &[u8], fanout: &mut Fanout<Arc<Connection>>) -> bool {
        let Some(channel) = self.channel(redis_channel) else {
            // Nobody is in it any more.
            self.parked.forget(redis_channel);
            return false;
        };
        if channel.is_held_up() {
            return false;
        }
        match self.parked.pop(redis_channel) {
            Some(Parcel::Message(payload)) => self.deliver(&channel, payload, fanout),
            Some(Parcel::Gap) => channel.miss(fanout),
            None => return false,
        }
        true
    }

    /// Has others have their turn while somebody is late, or after much at once.
    async fn pause_if_needed(&self, fanout: &mut Fanout<Arc<Connection>>) {
        if fanout.needs_pause() {
            self.broker.deliver(fanout);
            self.broker.flush(fanout).await;
            tokio::task::yield_now().await;
        }
    }

    /// What others published at the old primary, before they followed, is missing here.
    async fn miss_stragglers(&mut self) {
        if self.followed.take_if(|at| *at <= Instant::now()).is_none() {
            return;
        }
        let mut fanout = Fanout::default();
        for channel in self.broker.hub.channels() {
            if channel.upstream_server() == Some(self.server) {
                let name = self.context.servers.topology.redis_channel(channel.name());
                self.miss(&channel, name.as_bytes(), &mut fanout);
            }
            if fanout.needs_pause() {
                self.broker.flush(&mut fanout).await;
            }
        }
        self.broker.flush(&mut fanout).await;
    }

    fn take(&mut self, arrival: Arrival, fanout: &mut Fanout<Arc<Connection>>) {
        match arrival {
            Arrival::Message { channel, payload, .. } if self.context.is_control(&channel) => {
                // A fence stands for everything before it.
                self.broker.deliver(fanout);
                self.control(&payload);
            }
            Arrival::Message { channel, payload, after_gap } => {
                let Some(hub_channel) = self.channel(&channel) else { return };
                if self.parked.holds(&channel) || hub_channel.is_held_up() {
                    if after_gap {
                        self.parked.miss(channel.clone());
                    }
                    return self.parked.push(channel, payload);
                }
                if after_gap {
                    hub_channel.miss(fanout);
                }
                self.deliver(&hub_channel, payload, fanout);
            }
            Arrival::Subscribed(name) => {
                if let Some(channel) = self.own_channel(&name) {
                    self.broker.hub.confirm_subscribe(&channel, fanout);
                }
            }
            Arrival::Unsubscribed(name) => {
                // Whoever is in the channel yet is told a gap when it is live again.
                self.parked.forget(&name);
                if let Some(channel) = self.own_channel(&name) {
                    self.broker.hub.confirm_unsubscribe(&channel);
                }
            }
        }
    }

    /// Messages are missing behind what has arrived so far.
    fn miss(&mut self, channel: &HubChannel, redis_channel: &[u8], fanout: &mut Fanout<Arc<Connection>>) {
        match self.parked.holds(redis_channel) {
            true => self.parked.miss(redis_channel.to_vec()),
            false => channel.miss(fanout),
        }
    }

    fn deliver(&self, channel: &HubChannel, payload: Vec<u8>, fanout: &mut Fanout<Arc<Connection>>) {
        if !self.broker.tell_presence(channel.name(), &payload, fanout) {
            self.broker.take(channel, &payload.into(), fanout);
        }
    }

    /// The channel that this server says something about.
    fn channel(&self, redis_channel: &[u8]) -> Option<HubChannel> {
        self.broker.hub.channel(self.context.servers.topology.channel_name(redis_channel)?)
    }

    /// The same, if this server has, or was asked for, its subscription: not what is late from a former owner.
    fn own_channel(&self, redis_channel: &[u8]) -> Option<HubChannel> {
        self.channel(redis_channel).filter(|channel| channel.upstream_server() == Some(self.server))
    }

    /// An envelope arrived, or a probe or a fence came back.
    fn control(&mut self, payload: &[u8]) {
        match control::read(payload) {
            Some(Control::Envelope) => self.broker.cluster.arrived(payload, &self.broker.shared.instance_id),
            // In a cluster, those of all nodes come back on each.
            Some(Control::Fence { server, number }) if server == self.server => {
                self.parked.keep_fence(number);
                self.pass_fence();
            }
            Some(Control::Probe { server, sent_us }) if server == self.server => {
                self.probe.came_back();
                self.broker.shared.metrics.probe_lag_us.set(clock::now_us().saturating_sub(sent_us) as i64);
            }
            _ => {}
        }
    }

    fn next_due(&self) -> Instant {
        [self.listening.next_due(), self.followed].into_iter().flatten().fold(self.probe.next(), Instant::min)
    }

    /// Delivers what had arrived before the loss, but for what would have to wait, then marks every channel so that the
    /// next turn wants it back, and tells the gap.
    async fn lose(&mut self) {
        self.listening.abort();
        self.take_arrivals().await;
        self.parked.channels().iter().for_each(|channel| self.parked.forget(channel));
        self.broker.shared.metrics.dropped(DropReason::RedisQueueFull, self.parked.take_dropped_count());
        self.broker.hub.lose_upstream(self.server);
        self.listening.lose();
    }
}
