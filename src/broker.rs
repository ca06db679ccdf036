//! Where publications enter: straight into the hub without Redis, through the publisher with it.

use std::sync::Arc;

use tokio::sync::oneshot;

use crate::cluster::Cluster;
use crate::connection::{Connection, Shared};
use crate::event;
use crate::fanout::Fanout;
use crate::health::Health;
use crate::hub::Hub;
use crate::metrics::{Drop as DropReason, Link, Source};
use crate::presence_store::{self, Event};
use crate::protocol::{ErrorCode, Refusal};
use crate::publication::Payload;
use crate::publisher::{Job, Reply};
use crate::servers::Servers;

/// The one way to publish, shared by sockets, the API and the multiplexer.
#[derive(Debug)]
pub struct Broker {
    /// The channels.
    pub hub: Arc<Hub<Arc<Connection>>>,
    /// What all connections share.
    pub shared: Arc<Shared>,
    /// Whether the gateway is ready.
    pub health: Arc<Health>,
    /// The way to other instances.
    pub cluster: Cluster,
    /// The Redis servers, where there are any.
    pub servers: Option<Arc<Servers>>,
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

    /// Tells a channel who came or went, if `payload` is that. False: it is a publication.
    pub fn tell_presence(&self, channel: &str, payload: &[u8], fanout: &mut Fanout<Arc<Connection>>) -> bool {
        if !payload.starts_with(presence_store::MAGIC) || !self.hub.has_presence(channel) {
            return false;
        }
        match (Event::parse(payload), self.hub.channel(channel)) {
            (None, _) => self.shared.metrics.dropped(DropReason::PresenceUnreadable, 1),
            (Some(event), Some(channel)) => {
                channel.tell(&event::presence_event(channel.name(), &event), fanout);
                self.shared.metrics.presence_events.inc();
            }
            (Some(_), None) => {}
        }
        true
    }

    /// Checks a payload's size, and that it is not what only Hubcast itself says.
    ///
    /// # Errors
    /// `too_large` or `bad_request`.
    pub fn check_payload(&self, payload: &[u8]) -> Result<(), Refusal> {
        if payload.starts_with(presence_store::MAGIC) {
            return Err(Refusal::new(ErrorCode::BadRequest, "a payload cannot start like an event of presence"));
        }
        if payload.len() > self.publish_bytes_max {
            return Err(Refusal::payload_too_large(self.publish_bytes_max));
        }
        Ok(())
    }

    /// Starts a publish of the HTTP API: what is started one after another is published in that order.
    /// Waits for subscribers that are late, and for room in the queue to Redis.
    ///
    /// # Errors
    /// `too_large`, `bad_request`, or `unavailable` if there was no room in time.
    pub async fn start_publish(&self, channel: &str, payload: Payload<'_>) -> Result<Publishing, Refusal> {
        self.check_payload(payload.bytes())?;
        let Some(servers) = &self.servers else {
            let mut fanout = Fanout::default();
            self.gather(channel, payload, Source::Http, &mut fanout);
            self.deliver(&mut fanout);
            self.settle(&mut fanout).await;
            return Ok(Publishing(None));
        };
        let (sender, outcome) = oneshot::channel();
        self.shared.metrics.publication(Source::Http);
        let job = Job::new(channel, payload.bytes(), Reply::Http(sender));
        servers.publisher(channel).send(job).await.map_err(|_| Refusal::unavailable())?;
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
        if let Some(servers) = &self.servers {
            servers.pass_fences().await;
        }
    }

    /// Notes whether a link to a server is up, for readiness and metrics.
    pub fn note_link(&self, server: usize, link: Link, is_up: bool) {
        if let Some(servers) = &self.servers {
            self.shared.metrics.links_up(link, servers.note_link(server, link, is_up));
            self.health.redis(servers.is_any_usable());
        }
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
