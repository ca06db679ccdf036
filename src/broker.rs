//! Where publications enter: straight into the hub without Redis, through the publisher with it.

use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::{mpsc, oneshot};

use crate::authenticator::Authenticator;
use crate::channel::Channel;
use crate::cluster::Cluster;
use crate::connection::{Connection, Shared};
use crate::cursor::Cursor;
use crate::event;
use crate::fanout::Fanout;
use crate::following::Following;
use crate::health::Health;
use crate::history_reader;
use crate::history_redis;
use crate::history_store::{Content, Entry, Moment};
use crate::history_view::Gap;
use crate::hub::{Histories, Hub};
use crate::metrics::{Drop as DropReason, Limited, Link, Source};
use crate::presence_store::{self, Event};
use crate::protocol::{ErrorCode, Refusal};
use crate::publication::{Message, Payload};
use crate::publisher::{Job, Outcome, Reply};
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
    /// Who verifies tokens, with `HUBCAST_AUTH=jwt`.
    pub authenticator: Option<Arc<Authenticator>>,
    /// Questions for [`history_reader::run`].
    pub history: mpsc::Sender<history_reader::Question>,
    /// `HUBCAST_PUBLISH_BYTES_MAX`
    pub publish_bytes_max: usize,
}

impl Broker {
    /// Without Redis: puts a publication in the order of its channel, and in its history where there is one. It may wait
    /// for others: see [`Broker::deliver`]. Returns the cursor.
    pub fn gather(
        &self,
        channel: &str,
        payload: Payload<'_>,
        key: Option<&str>,
        source: Source,
        fanout: &mut Fanout<Arc<Connection>>,
    ) -> Option<Cursor> {
        self.shared.metrics.publication(source);
        let history = match self.hub.histories() {
            Histories::Memory(memory) => self.hub.rules().history(channel).map(|retention| (memory, retention)),
            Histories::Redis(_) => None,
        };
        let Some((memory, retention)) = history else {
            self.hub.gather(channel, payload.into(), fanout);
            return None;
        };
        let kept = Bytes::copy_from_slice(payload.bytes());
        let deliver = |entry: &Entry| {
            self.hub.gather(channel, Message { payload, cursor: Some(entry.id) }, fanout);
        };
        Some(memory.publish(channel, kept, &retention, key, Moment::now(), deliver).cursor())
    }

    /// From Redis: puts a message in the order of its channel, as an entry of its history if it is one.
    pub fn take(&self, channel: &Arc<Channel<Arc<Connection>>>, message: &Bytes, fanout: &mut Fanout<Arc<Connection>>) {
        self.shared.metrics.publication(Source::Redis);
        match (history_redis::parse_envelope(message), channel.following()) {
            (Some(entry), Some(following)) => {
                following.with(Some(channel), fanout, |follow, out, _| follow.message(entry, out));
            }
            // The rule has no history here: another instance's has.
            (Some(Entry { content: Content::Event(payload), .. }), None) => {
                channel.gather(Payload::Unchecked(&payload).into(), fanout);
            }
            (Some(Entry { content: Content::Marker(_), .. }), None) => {}
            // Another build's. Where there is history, Redis has it.
            (None, following) if is_reserved(message) => {
                self.shared.metrics.dropped(DropReason::RedisUnreadable, 1);
                following.into_iter().for_each(Following::check);
            }
            (None, _) if message.len() > self.publish_bytes_max => {
                self.shared.metrics.dropped(DropReason::RedisTooLarge, 1);
                channel.tell_gap(&Gap::upstream(None), fanout);
            }
            // A plain publish: where there is history, it is outside of it.
            (None, _) => channel.gather(Payload::Unchecked(message).into(), fanout),
        }
        self.hub.hurry(channel, fanout);
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
        if !payload.starts_with(presence_store::MAGIC) {
            return false;
        }
        match (Event::parse(payload), self.hub.channel(channel)) {
            (None, _) => self.shared.metrics.dropped(DropReason::RedisUnreadable, 1),
            (Some(event), Some(channel)) if self.hub.has_presence(channel.name()) => {
                channel.tell(&event::presence_event(channel.name(), &event), fanout);
                self.shared.metrics.presence_events.inc();
            }
            // Nobody is in it, or the rule has no presence here: another instance's has.
            (Some(_), _) => {}
        }
        true
    }

    /// Has a question about a channel's history answered.
    ///
    /// # Errors
    /// `forbidden` if the channel has none, `unavailable` if too many wait.
    pub fn ask_history(&self, question: history_reader::Question) -> Result<(), Refusal> {
        if self.hub.rules().history(&question.channel).is_none() {
            return Err(history_reader::no_history());
        }
        self.history.try_send(question).map_err(|_| history_reader::unavailable())
    }

    /// Checks a payload's size, and that it is not what only Hubcast itself says.
    ///
    /// # Errors
    /// `too_large` or `bad_request`.
    pub fn check_payload(&self, payload: &[u8]) -> Result<(), Refusal> {
        if is_reserved(payload) {
            return Err(Refusal::new(ErrorCode::BadRequest, "a payload cannot start like what only Hubcast says"));
        }
        if payload.len() > self.publish_bytes_max {
            return Err(Refusal::payload_too_large(self.publish_bytes_max));
        }
        Ok(())
    }

    /// Refuses a publication while memory is tight.
    ///
    /// # Errors
    /// `unavailable`
    pub fn check_memory(&self) -> Result<(), Refusal> {
        self.shared.memory.check().inspect_err(|_| self.shared.metrics.limited(Limited::Memory))
    }

    /// Starts a publish of the HTTP API: what is started one after another is published in that order.
    /// Waits for subscribers that are late, and for room in the queue to Redis. What is published with the `key` of an
    /// earlier publish within five minutes is that one.
    ///
    /// # Errors
    /// `too_large`, `bad_request`, or `unavailable` if there was no room in time.
    pub async fn start_publish(
        &self,
        channel: &str,
        payload: Payload<'_>,
        key: Option<&str>,
    ) -> Result<Publishing, Refusal> {
        self.check_payload(payload.bytes())?;
        self.check_memory()?;
        if key.is_some() && self.hub.rules().history(channel).is_none() {
            return Err(Refusal::new(ErrorCode::BadRequest, "Idempotency-Key needs a channel with history"));
        }
        let Some(servers) = &self.servers else {
            let mut fanout = Fanout::default();
            let cursor = self.gather(channel, payload, key, Source::Http, &mut fanout);
            self.deliver(&mut fanout);
            self.settle(&mut fanout).await;
            return Ok(Publishing::Done(cursor));
        };
        let (sender, outcome) = oneshot::channel();
        self.shared.metrics.publication(Source::Http);
        let job = Job::new(channel, payload.bytes(), key, Reply::Http(sender));
        servers.publisher(channel).send(job).await.map_err(|_| Refusal::unavailable())?;
        Ok(Publishing::Sent(outcome))
    }

    /// Has a fan-out flushed, and waits where the server is late, but for no reader: whoever serves many channels does so.
    pub async fn flush(&self, fanout: &mut Fanout<Arc<Connection>>) {
        let late = self.shared.submit(fanout);
        if !late.is_empty() {
            self.shared.lanes.written(late).await;
        }
        // A long batch gives others their turn.
        tokio::task::consume_budget().await;
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

/// Whether a message begins like what only Hubcast says, whatever its version: 0xFF, which no text has, and `hubcast/`
/// (`presence_store::MAGIC`) or a control character but for 0 (`history_redis::MAGIC`; versions begin at 1).
fn is_reserved(message: &[u8]) -> bool {
    message.strip_prefix(b"\xFF").is_some_and(|rest| {
        rest.starts_with(b"hubcast/") || rest.first().is_some_and(|version| (1..b' ').contains(version))
    })
}

/// A publish whose outcome may still be on its way from Redis.
#[derive(Debug)]
#[must_use]
pub enum Publishing {
    /// It is delivered here.
    Done(Option<Cursor>),
    /// Redis has yet to answer.
    Sent(oneshot::Receiver<Outcome>),
}

impl Publishing {
    /// Waits for the outcome.
    ///
    /// # Errors
    /// `unavailable` if nothing was sent to Redis, or its outcome is unknown.
    pub async fn outcome(self) -> Outcome {
        match self {
            Self::Done(cursor) => Ok(cursor),
            // Nobody answers where the gateway ended meanwhile: it may have been sent.
            Self::Sent(outcome) => outcome.await.unwrap_or_else(|_| Err(Refusal::outcome_unknown())),
        }
    }
}
