//! The one Redis connection that listens, for all channels of this instance.
//!
//! Level-triggered: the hub's channels are what is wanted, Redis' confirmations what is there, and
//! each turn of the loop reconciles the two in batches. Lost links, races between last leave and
//! first join, and the first start are one code path. Whoever subscribes is told so only after the
//! confirmation; after a loss, whoever stayed is told a gap.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use redis::aio::MultiplexedConnection;
use redis::{AsyncConnectionConfig, Client};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tracing::{info, warn};

use crate::broker::Broker;
use crate::channel::{Channel, Fanout};
use crate::clock;
use crate::cluster::Cluster;
use crate::connection::Connection;
use crate::inbox::{Arrival, Inbox};
use crate::metrics::{Drop as DropReason, Link, Source};
use crate::publication::Payload;
use crate::redis_link::{self, Backoff};
use crate::upstream::Step;

/// Channel names of one SUBSCRIBE or UNSUBSCRIBE.
const BATCH_NAMES: usize = 512;

/// A command that is not answered for this long means that the link is dead.
const RESPONSE_TIMEOUT: Duration = Duration::from_secs(5);

/// A channel that Redis refuses (a missing permission) is tried again after this (µs).
const REFUSED_RETRY_US: u64 = 5_000_000;

/// A link that held this long was good: the next pause starts small again.
const STABLE_TIME: Duration = Duration::from_secs(5);

/// Probes that may be missing before the link is dead.
const PROBES_MISSED_MAX: u32 = 2;

/// What a fence's payload starts with; a probe's is a time.
const FENCE: &str = "fence:";

type HubChannel = Arc<Channel<Arc<Connection>>>;

/// What the multiplexer needs to know.
#[derive(Debug)]
pub struct Settings {
    /// `HUBCAST_REDIS_CHANNEL_PREFIX`
    pub channel_prefix: Box<str>,
    /// How often a probe goes through Redis and back.
    pub probe_interval: Duration,
}

impl Settings {
    /// The hub's name of a Redis channel, if it is one of the hub's.
    pub fn channel_name<'a>(&self, redis_channel: &'a [u8]) -> Option<&'a str> {
        str::from_utf8(redis_channel.strip_prefix(self.channel_prefix.as_bytes())?).ok()
    }
}

/// Listens until the runtime ends.
pub async fn run(client: Client, settings: Settings, broker: Arc<Broker>) {
    let control = Cluster::control_channels(&settings.channel_prefix, &broker.shared.instance_id);
    let mut backoff = Backoff::default();
    let mut was_up = false;
    loop {
        let inbox = Arc::new(Inbox::new());
        match forgetting(&broker, connect(&client, &inbox, &control)).await {
            Ok(connection) => {
                info!("listening to redis");
                if was_up {
                    broker.shared.metrics.reconnected(Link::Subscribe);
                }
                broker.note_link(Link::Subscribe, true);
                let since = Instant::now();
                let mut turn = Turn::new(connection, inbox, &settings, &control, &broker, was_up);
                let why = turn.serve().await;
                warn!(why, "lost the listening connection to redis");
                broker.note_link(Link::Subscribe, false);
                turn.lose().await;
                was_up = true;
                if since.elapsed() > STABLE_TIME {
                    backoff = Backoff::default();
                }
            }
            Err(error) => {
                if backoff.is_first() {
                    warn!(%error, "cannot listen to redis, retrying");
                }
            }
        }
        forgetting(&broker, tokio::time::sleep(backoff.pause())).await;
    }
}

/// Awaits `task` while there is no link. Channels that come and go meanwhile are dropped at once, so
/// they cannot pile up; those that stay are listed again by the next turn.
async fn forgetting<T>(broker: &Broker, task: impl Future<Output = T>) -> T {
    tokio::pin!(task);
    loop {
        tokio::select! {
            biased;
            result = &mut task => return result,
            () = broker.hub.changed() => {
                for channel in broker.hub.take_changed() {
                    broker.hub.forget(&channel);
                }
            }
        }
    }
}

/// Connects and subscribes to the control channels, which proves that the link listens.
async fn connect(
    client: &Client,
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
    let mut connection = redis_link::connect(client, &config).await?;
    connection.subscribe(control).await?;
    Ok(connection)
}

/// One connection's time.
struct Turn<'a> {
    connection: MultiplexedConnection,
    inbox: Arc<Inbox>,
    settings: &'a Settings,
    /// The control channel of all instances, and our own.
    control: &'a [String; 2],
    broker: &'a Arc<Broker>,
    is_reconnect: bool,
    /// SUBSCRIBEs and UNSUBSCRIBEs whose answer is awaited.
    commands: JoinSet<Answered>,
    /// Channels to look at again, and when (µs), earliest first: they linger, or were refused.
    later: VecDeque<(u64, HubChannel)>,
    probe: Probe,
}

/// An answered command.
struct Answered {
    is_subscribe: bool,
    channels: Vec<HubChannel>,
    answer: redis::RedisResult<()>,
}

struct Probe {
    next: Instant,
    is_outstanding: bool,
    missed: u32,
}

impl<'a> Turn<'a> {
    fn new(
        connection: MultiplexedConnection,
        inbox: Arc<Inbox>,
        settings: &'a Settings,
        control: &'a [String; 2],
        broker: &'a Arc<Broker>,
        is_reconnect: bool,
    ) -> Self {
        let probe = Probe { next: Instant::now(), is_outstanding: false, missed: 0 };
        let (commands, later) = (JoinSet::new(), VecDeque::new());
        Self { connection, inbox, settings, control, broker, is_reconnect, commands, later, probe }
    }

    /// Serves until the link is lost; returns why.
    async fn serve(&mut self) -> &'static str {
        let broker = self.broker;
        let inbox = Arc::clone(&self.inbox);
        broker.hub.list_all();
        loop {
            self.take_arrivals().await;
            if let Some(why) = self.inbox.lost() {
                return why;
            }
            self.reconcile();
            if !self.send_due_probe() {
                return "a probe did not come back";
            }
            let due = self.next_due();
            tokio::select! {
                () = inbox.arrived() => {}
                () = broker.hub.changed() => {}
                () = tokio::time::sleep_until(due) => {}
                fence = broker.fence.asked() => self.send_control(&format!("{FENCE}{fence}")),
                Some(Ok(answered)) = self.commands.join_next() => {
                    if let Some(why) = self.answered(answered) {
                        return why;
                    }
                }
            }
        }
    }

    /// Acts on an answer; returns why the link is to be given up, if it is.
    fn answered(&mut self, answered: Answered) -> Option<&'static str> {
        let Answered { is_subscribe, channels, answer } = answered;
        let Err(error) = answer else { return None };
        if is_subscribe && !error.is_unrecoverable_error() && !error.is_timeout() {
            self.refused(channels, &error);
            return None;
        }
        warn!(%error, channels = channels.len(), "redis did not carry out a command");
        Some("a command was not carried out")
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
                self.tell_gap(&channel, &mut fanout);
            }
        }
        self.broker.settle(&mut fanout).await;
    }

    fn take(&mut self, arrival: Arrival, fanout: &mut Fanout<Arc<Connection>>) {
        match arrival {
            Arrival::Message { channel, payload, .. } if self.control.iter().any(|c| c.as_bytes() == channel) => {
                // A fence stands for everything before it.
                self.broker.deliver(fanout);
                self.control(&payload);
            }
            Arrival::Message { channel, payload, after_gap } => {
                let Some(name) = self.settings.channel_name(&channel) else { return };
                if after_gap && let Some(channel) = self.broker.hub.channel(name) {
                    self.tell_gap(&channel, fanout);
                }
                if payload.len() <= self.broker.publish_bytes_max {
                    self.broker.gather(name, Payload::Unchecked(&payload), Source::Redis, fanout);
                } else if let Some(channel) = self.broker.hub.channel(name) {
                    self.broker.shared.metrics.dropped(DropReason::RedisTooLarge, 1);
                    self.tell_gap(&channel, fanout);
                }
            }
            Arrival::Subscribed(name) => {
                if let Some(channel) = self.channel(&name)
                    && self.broker.hub.confirm_subscribe(&channel, fanout)
                {
                    self.broker.shared.metrics.gaps.inc();
                }
            }
            Arrival::Unsubscribed(name) => {
                if let Some(channel) = self.channel(&name) {
                    self.broker.hub.confirm_unsubscribe(&channel);
                }
            }
        }
    }

    fn tell_gap(&self, channel: &Channel<Arc<Connection>>, fanout: &mut Fanout<Arc<Connection>>) {
        channel.tell_gap(fanout);
        self.broker.shared.metrics.gaps.inc();
    }

    fn channel(&self, redis_channel: &[u8]) -> Option<HubChannel> {
        self.broker.hub.channel(self.settings.channel_name(redis_channel)?)
    }

    /// Sends what brings Redis' subscriptions to the hub's channels.
    fn reconcile(&mut self) {
        let now_us = clock::now_us();
        let mut changed = self.broker.hub.take_changed();
        while self.later.front().is_some_and(|(at_us, _)| *at_us <= now_us) {
            changed.extend(self.later.pop_front().map(|(_, channel)| channel));
        }
        let (mut subscribe, mut unsubscribe) = (Vec::new(), Vec::new());
        for channel in changed {
            match channel.reconcile(now_us) {
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

    fn look_again(&mut self, at_us: u64, channel: HubChannel) {
        let at = self.later.partition_point(|(other_us, _)| *other_us <= at_us);
        self.later.insert(at, (at_us, channel));
    }

    /// Sends one command; the confirmations arrive as pushes, in order with the messages.
    fn send(&mut self, batch: &[HubChannel], is_subscribe: bool) {
        let prefix = &self.settings.channel_prefix;
        let names: Vec<_> = batch.iter().map(|channel| format!("{prefix}{}", channel.name())).collect();
        let channels = batch.to_vec();
        let mut connection = self.connection.clone();
        self.commands.spawn(async move {
            let answer =
                if is_subscribe { connection.subscribe(&names).await } else { connection.unsubscribe(&names).await };
            Answered { is_subscribe, channels, answer }
        });
    }

    /// Redis refused a SUBSCRIBE. In a batch one name may spoil it for the rest: each is tried alone.
    fn refused(&mut self, channels: Vec<HubChannel>, error: &redis::RedisError) {
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

    /// Sends a probe when one is due. False: too many are missing.
    fn send_due_probe(&mut self) -> bool {
        if Instant::now() < self.probe.next {
            return true;
        }
        if self.probe.is_outstanding {
            self.probe.missed += 1;
            if self.probe.missed >= PROBES_MISSED_MAX {
                return false;
            }
        }
        self.probe.is_outstanding = true;
        self.probe.next = Instant::now() + self.settings.probe_interval;
        self.send_control(&clock::now_us().to_string());
        true
    }

    /// Publishes to our own control channel.
    fn send_control(&mut self, payload: &str) {
        let mut connection = self.connection.clone();
        let mut publish = redis::cmd("PUBLISH");
        publish.arg(&self.control[1]).arg(payload);
        self.commands.spawn(async move {
            let answer = publish.query_async::<i64>(&mut connection).await.map(drop);
            Answered { is_subscribe: false, channels: Vec::new(), answer }
        });
    }

    /// An envelope arrived, or a probe or a fence came back.
    fn control(&mut self, payload: &[u8]) {
        if payload.starts_with(b"{") {
            return self.broker.cluster.arrived(payload, &self.broker.shared.instance_id);
        }
        let Ok(text) = str::from_utf8(payload) else { return };
        match text.strip_prefix(FENCE).map(str::parse) {
            Some(Ok(number)) => self.broker.fence.came_back(number),
            Some(Err(_)) => {}
            None => {
                self.probe.is_outstanding = false;
                self.probe.missed = 0;
                let sent_us = text.parse().unwrap_or(0);
                self.broker.shared.metrics.probe_lag_us.set(clock::now_us().saturating_sub(sent_us) as i64);
            }
        }
    }

    fn next_due(&self) -> Instant {
        let later = self
            .later
            .front()
            .map(|(at_us, _)| Instant::now() + Duration::from_micros(at_us.saturating_sub(clock::now_us())));
        later.map_or(self.probe.next, |later| later.min(self.probe.next))
    }

    /// Delivers what had arrived before the loss, then marks every channel so that the next turn wants it back.
    async fn lose(&mut self) {
        self.commands.abort_all();
        self.take_arrivals().await;
        self.broker.hub.lose_upstream();
    }
}
