//! What one link listens to at Redis: brings its subscriptions to the hub's channels.
//!
//! Level-triggered: each look compares what is wanted with what Redis has confirmed, and sends the difference in batches.
//! Commands that are outstanding are bounded, so that their confirmations fit into the inbox.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use redis::aio::MultiplexedConnection;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tracing::warn;

use crate::broker::Broker;
use crate::channel::Channel;
use crate::clock;
use crate::connection::Connection;
use crate::redis_link::{Endpoint, is_about_slots};
use crate::topology::Topology;
use crate::upstream::Step;

/// Channel names of one SUBSCRIBE or UNSUBSCRIBE.
const BATCH_NAMES: usize = 512;

/// Commands that may be outstanding.
const COMMANDS_MAX: usize = 64;

/// A channel that Redis refuses (a missing permission) is tried again after this (µs).
const REFUSED_RETRY_US: u64 = 5_000_000;

/// A cluster that did not take a SSUBSCRIBE is asked again after this (µs): a slot is moving, or its node failed.
const MOVED_RETRY_US: u64 = 100_000;

type HubChannel = Arc<Channel<Arc<Connection>>>;

/// The subscriptions of one connection.
pub(crate) struct Listening<'a> {
    connection: MultiplexedConnection,
    broker: &'a Broker,
    topology: &'a Topology,
    server: usize,
    is_reconnect: bool,
    /// SUBSCRIBEs and UNSUBSCRIBEs whose answer is awaited.
    commands: JoinSet<Answered>,
    /// Batches that wait until fewer commands are outstanding, and whether they are to be subscribed.
    waiting: VecDeque<(Vec<HubChannel>, bool)>,
    /// Channels to look at again, and when (µs), earliest first: they linger, or were refused.
    later: VecDeque<(u64, HubChannel)>,
}

/// An answered command.
pub(crate) struct Answered {
    is_subscribe: bool,
    channels: Vec<HubChannel>,
    answer: redis::RedisResult<()>,
}

impl<'a> Listening<'a> {
    /// Nothing is subscribed yet.
    pub(crate) fn new(
        connection: MultiplexedConnection,
        broker: &'a Broker,
        topology: &'a Topology,
        server: usize,
        is_reconnect: bool,
    ) -> Self {
        let (commands, waiting, later) = (JoinSet::new(), VecDeque::new(), VecDeque::new());
        Self { connection, broker, topology, server, is_reconnect, commands, waiting, later }
    }

    /// The next answer to a command.
    pub(crate) async fn next_answer(&mut self) -> Answered {
        loop {
            match self.commands.join_next().await {
                Some(Ok(answered)) => return answered,
                Some(Err(_)) => {}
                None => std::future::pending().await,
            }
        }
    }

    /// Acts on an answer; returns why the link is to be given up, if it is.
    pub(crate) fn answered(&mut self, answered: Answered, endpoint: &Endpoint) -> Option<&'static str> {
        let Answered { is_subscribe, channels, answer } = answered;
        match answer {
            Ok(()) => {}
            Err(error) if is_about_slots(&error) => {}
            Err(error) if is_subscribe && !error.is_unrecoverable_error() && !error.is_timeout() => {
                self.refused(channels, &error);
                self.send_waiting();
                return None;
            }
            Err(error) => {
                warn!(server = self.server, %error, channels = channels.len(), "redis did not carry out a command");
                return Some("a command was not carried out");
            }
        }
        if self.topology.is_cluster() {
            self.retry_unconfirmed(is_subscribe, channels, endpoint);
        }
        self.send_waiting();
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

    /// Sends what brings Redis' subscriptions to the hub's channels.
    pub(crate) fn reconcile(&mut self) {
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
        let names: Vec<_> = channels.iter().map(|channel| self.topology.redis_channel(channel.name())).collect();
        let is_cluster = self.topology.is_cluster();
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

    /// Publishes on the link itself, to a control channel.
    pub(crate) fn publish(&mut self, control: &str, payload: &str) {
        let mut connection = self.connection.clone();
        let mut publish = redis::cmd("PUBLISH");
        publish.arg(control).arg(payload);
        self.commands.spawn(async move {
            // An unsolicited `sunsubscribe` may be taken for the answer, so what it says does not count.
            let answer = publish.query_async::<redis::Value>(&mut connection).await.map(drop);
            Answered { is_subscribe: false, channels: Vec::new(), answer }
        });
    }

    /// When a channel is to be looked at again.
    pub(crate) fn next_due(&self) -> Option<Instant> {
        let (at_us, _) = self.later.front()?;
        Some(Instant::now() + Duration::from_micros(at_us.saturating_sub(clock::now_us())))
    }

    /// No answer matters any more.
    pub(crate) fn abort(&mut self) {
        self.commands.abort_all();
    }

    /// The link is lost: what was to be looked at later is looked at by the next one.
    pub(crate) fn lose(&mut self) {
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
