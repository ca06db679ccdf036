//! Where publications enter: straight into the hub without Redis, through the publisher with it.

use std::sync::Arc;

use tokio::sync::oneshot;

use crate::channel::Fanout;
use crate::cluster::Cluster;
use crate::connection::{Connection, Shared};
use crate::fence::Fence;
use crate::health::Health;
use crate::hub::Hub;
use crate::metrics::{Link, Source};
use crate::protocol::Refusal;
use crate::publication::Payload;
use crate::publisher::{Job, Publisher, Reply};

/// The one way to publish, shared by sockets, the API and the multiplexer.
#[derive(Debug)]
pub struct Broker {
    /// The channels.
    pub hub: Arc<Hub<Arc<Connection>>>,
    /// What all connections share.
    pub shared: Arc<Shared>,
    /// Whether the gateway is ready.
    pub health: Arc<Health>,
    /// Fences through Redis, for the drain.
    pub fence: Fence,
    /// The way to other instances.
    pub cluster: Cluster,
    /// The way to Redis, where there is one.
    pub publisher: Option<Publisher>,
    /// `HUBCAST_PUBLISH_BYTES_MAX`
    pub publish_bytes_max: usize,
}

impl Broker {
    /// Puts a publication in the order of its channel on this instance. It may wait for others:
    /// see [`Broker::deliver`].
    pub fn gather(&self, channel: &str, payload: Payload<'_>, source: Source, fanout: &mut Fanout<Arc<Connection>>) {
        self.hub.gather(channel, payload, fanout);
        self.shared.metrics.publication(source);
    }

    /// Delivers what was gathered, but for channels that coalesce.
    pub fn deliver(&self, fanout: &mut Fanout<Arc<Connection>>) {
        for channel in std::mem::take(&mut fanout.gathered) {
            match channel.window().is_zero() {
                true => channel.deliver(fanout),
                false => fanout.gathered.push(channel),
            }
        }
    }

    /// Checks a payload's size.
    ///
    /// # Errors
    /// `too_large`.
    pub fn check_size(&self, payload: &[u8]) -> Result<(), Refusal> {
        if payload.len() > self.publish_bytes_max {
            return Err(Refusal::payload_too_large(self.publish_bytes_max));
        }
        Ok(())
    }

    /// Starts a publish of the HTTP API: what is started one after another is published in that order.
    /// Waits for subscribers that are late, and for room in the queue to Redis.
    ///
    /// # Errors
    /// `too_large`, or `unavailable` if there was no room in time.
    pub async fn start_publish(&self, channel: &str, payload: Payload<'_>) -> Result<Publishing, Refusal> {
        self.check_size(payload.bytes())?;
        let Some(publisher) = &self.publisher else {
            let mut fanout = Fanout::default();
            self.gather(channel, payload, Source::Http, &mut fanout);
            self.deliver(&mut fanout);
            self.settle(&mut fanout).await;
            return Ok(Publishing(None));
        };
        let (sender, outcome) = oneshot::channel();
        self.shared.metrics.publication(Source::Http);
        let job = Job::new(channel, payload.bytes(), Reply::Http(sender));
        publisher.send(job).await.map_err(|_| Refusal::unavailable())?;
        Ok(Publishing(Some(outcome)))
    }

    /// Has a fan-out flushed, and waits for subscribers that are late.
    pub async fn settle(&self, fanout: &mut Fanout<Arc<Connection>>) {
        let late = self.shared.submit(fanout);
        if !late.is_empty() {
            self.shared.lanes.room(late).await;
        }
        // A long batch gives others their turn.
        tokio::task::consume_budget().await;
    }

    /// Waits until everything that was answered as published is in the outboxes of this instance.
    pub async fn flush_upstream(&self) {
        if self.publisher.is_some() && self.health.is_redis_up() {
            self.fence.pass().await;
        }
    }

    /// Notes whether a Redis link is up, for readiness and metrics.
    pub fn note_link(&self, link: Link, is_up: bool) {
        self.health.redis(link, is_up);
        self.shared.metrics.link_up(link, is_up);
    }
}

/// A publish whose outcome may still be on its way from Redis.
#[derive(Debug)]
#[must_use]
pub struct Publishing(Option<oneshot::Receiver<Result<(), Refusal>>>);

impl Publishing {
    /// Waits for the outcome.
    ///
    /// # Errors
    /// `unavailable` if nothing was sent to Redis, or its outcome is unknown.
    pub async fn outcome(self) -> Result<(), Refusal> {
        match self.0 {
            None => Ok(()),
            Some(outcome) => outcome.await.unwrap_or_else(|_| Err(Refusal::unavailable())),
        }
    }
}
