//! The publishing connection to a Redis server: one ordered queue, pipelined in batches.
//!
//! Jobs leave in the order in which they came, all that wait in one pipeline, one pipeline at a
//! time: publishes of one client to one channel keep their order also across a reconnect. While
//! Redis is away every job is answered `unavailable` at once; a pipeline whose answer does not come
//! within the publish timeout has an unknown outcome.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use redis::aio::MultiplexedConnection;
use redis::{
    AsyncConnectionConfig, ErrorKind, Pipeline, PushInfo, PushKind, RedisError, RedisResult, ServerErrorKind, Value,
};
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tracing::{info, warn};

use crate::broker::Broker;
use crate::clock::{self, micros};
use crate::connection::Connection;
use crate::cursor::Cursor;
use crate::event;
use crate::fanout::Fanout;
use crate::history_redis::{self, Place};
use crate::metrics::Link;
use crate::protocol::Refusal;
use crate::redis_link::{self, Backoff, Endpoint, is_about_slots};
use crate::servers::Servers;
use crate::topology::Topology;

/// Jobs that wait for their turn; when it is full, sockets are read no further and HTTP requests wait.
const QUEUE_JOBS_MAX: usize = 4096;

/// Payload bytes that may wait for Redis or its answer.
const QUEUE_BYTES_MAX: usize = 64 << 20;

/// Jobs of one pipeline.
const PIPELINE_JOBS_MAX: usize = 512;

/// A connection on which nothing was published for so long is asked whether it still answers: history is read on it, and a
/// read that fails does not end it.
const IDLE_TIME: Duration = Duration::from_secs(5);

/// The sending side of the queue.
#[derive(Debug)]
pub struct Publisher {
    jobs: mpsc::Sender<(Job, OwnedSemaphorePermit)>,
    bytes: Arc<Semaphore>,
    /// How long a job may wait for room, and then for its turn.
    timeout: Duration,
    link: Mutex<Option<MultiplexedConnection>>,
}

/// One message to publish.
#[derive(Debug)]
pub struct Job {
    channel: Box<str>,
    payload: Box<[u8]>,
    /// What makes it a repetition of an earlier one; on channels with history.
    key: Option<Box<str>>,
    reply: Reply,
    accepted_us: u64,
}

/// The cursor on a channel with history; or why it was not published, or may not have been.
pub type Outcome = Result<Option<Cursor>, Refusal>;

/// Who hears of the outcome.
#[derive(Debug)]
pub enum Reply {
    /// A client; `published` only if its command carried an id, errors always.
    Socket(Arc<Connection>, Option<Box<str>>),
    /// An HTTP request.
    Http(oneshot::Sender<Outcome>),
}

/// The receiving side, to be run by [`run`].
pub type Jobs = mpsc::Receiver<(Job, OwnedSemaphorePermit)>;

impl Job {
    /// A job; the payload is copied because it outlives the read buffer.
    pub fn new(channel: &str, payload: &[u8], key: Option<&str>, reply: Reply) -> Self {
        let key = key.map(Into::into);
        Self { channel: channel.into(), payload: payload.into(), key, reply, accepted_us: clock::now_us() }
    }

    /// The channel's name.
    pub fn channel(&self) -> &str {
        &self.channel
    }

    /// What it takes of the byte budget; one payload always fits.
    fn permits(&self) -> u32 {
        self.payload.len().min(QUEUE_BYTES_MAX) as u32
    }
}

impl Publisher {
    /// The queue's two ends; a job that was not sent to Redis within `timeout` is refused.
    pub fn new(timeout: Duration) -> (Self, Jobs) {
        let (jobs, receiver) = mpsc::channel(QUEUE_JOBS_MAX);
        let bytes = Arc::new(Semaphore::new(QUEUE_BYTES_MAX));
        (Self { jobs, bytes, timeout, link: Mutex::default() }, receiver)
    }

    /// Queues a job, waiting for room within the timeout.
    ///
    /// # Errors
    /// The job: nothing was sent.
    pub async fn send(&self, job: Job) -> Result<(), Job> {
        let room = async {
            let bytes = Arc::clone(&self.bytes).acquire_many_owned(job.permits()).await.ok()?;
            Some((bytes, self.jobs.reserve().await.ok()?))
        };
        match tokio::time::timeout(self.timeout, room).await {
            Ok(Some((bytes, place))) => {
                place.send((job, bytes));
                Ok(())
            }
            Ok(None) | Err(_) => Err(job),
        }
    }

    /// Queues a job, or gives it back when there is no room.
    ///
    /// # Errors
    /// The job.
    pub fn try_send(&self, job: Job) -> Result<(), Job> {
        match Arc::clone(&self.bytes).try_acquire_many_owned(job.permits()) {
            Ok(permit) => self.jobs.try_send((job, permit)).map_err(|error| error.into_inner().0),
            Err(_) => Err(job),
        }
    }

    /// The connection while there is one, for other commands.
    pub fn link(&self) -> Option<MultiplexedConnection> {
        self.link.lock().clone()
    }

    pub(crate) fn lend(&self, link: Option<MultiplexedConnection>) {
        *self.link.lock() = link;
    }
}

/// Publishes to one server until the runtime ends.
pub async fn run(
    mut endpoint: Endpoint,
    mut jobs: Jobs,
    broker: Arc<Broker>,
    servers: Arc<Servers>,
    server: usize,
    key_prefix: Box<str>,
    timeout: Duration,
) {
    let metrics = &broker.shared.metrics;
    let mut backoff = Backoff::default();
    let mut was_up = false;
    loop {
        let lost = Arc::new(Notify::new());
        let attempt = connect(&mut endpoint, timeout, Arc::clone(&lost));
        let connection = match answer_while(attempt, &mut jobs, &broker).await {
            Ok(connection) => connection,
            Err(error) => {
                if std::mem::take(&mut was_up) || backoff.is_first() {
                    warn!(server, %error, "cannot publish to redis, retrying");
                }
                answer_while(tokio::time::sleep(backoff.pause()), &mut jobs, &broker).await;
                continue;
            }
        };
        info!(server, "publishing to redis");
        backoff = Backoff::default();
        if was_up {
            metrics.reconnected(Link::Publish);
        }
        was_up = true;
        broker.note_link(server, Link::Publish, true);
        servers.lend(server, Some(connection.clone()));
        let mut turn = Turn {
            connection,
            broker: &broker,
            topology: &servers.topology,
            key_prefix: &key_prefix,
            timeout,
            has_script: false,
        };
        turn.publish_until_lost(&mut endpoint, &lost, &mut jobs).await;
        servers.lend(server, None);
        broker.note_link(server, Link::Publish, false);
        warn!(server, "lost the publishing connection to redis");
        endpoint.doubt();
        answer_while(tokio::time::sleep(backoff.pause()), &mut jobs, &broker).await;
    }
}

async fn connect(
    endpoint: &mut Endpoint,
    timeout: Duration,
    lost: Arc<Notify>,
) -> redis::RedisResult<MultiplexedConnection> {
    let config = AsyncConnectionConfig::new()
        .set_connection_timeout(Some(redis_link::CONNECT_TIMEOUT))
        .set_response_timeout(Some(timeout))
        .set_push_sender(move |push: PushInfo| {
            if push.kind == PushKind::Disconnection {
                lost.notify_one();
            }
            Ok::<(), ()>(())
        });
    endpoint.connect(&config).await
}

/// Answers jobs `unavailable` until `task` is done.
async fn answer_while<T>(task: impl Future<Output = T>, jobs: &mut Jobs, broker: &Broker) -> T {
    tokio::pin!(task);
    loop {
        tokio::select! {
            biased;
            result = &mut task => return result,
            Some((job, _)) = jobs.recv() => answer(vec![(job.reply, Err(Refusal::unavailable()))], broker),
        }
    }
}

/// One connection's time.
struct Turn<'a> {
    connection: MultiplexedConnection,
    broker: &'a Broker,
    topology: &'a Topology,
    key_prefix: &'a str,
    timeout: Duration,
    /// Redis knows the script that publishes to channels with history.
    has_script: bool,
}

impl Turn<'_> {
    async fn publish_until_lost(&mut self, endpoint: &mut Endpoint, lost: &Notify, jobs: &mut Jobs) {
        let mut batch = Vec::new();
        loop {
            tokio::select! {
                biased;
                () = lost.notified() => return,
                () = endpoint.moved() => return,
                _ = jobs.recv_many(&mut batch, PIPELINE_JOBS_MAX) => {}
                () = tokio::time::sleep(IDLE_TIME) => {
                    tokio::select! {
                        () = endpoint.moved() => return,
                        is_alive = self.is_alive() => if !is_alive { return },
                    }
                }
            }
            refuse_expired(&mut batch, self.broker, self.timeout);
            if !batch.is_empty() && !self.publish(&mut batch, endpoint).await {
                return;
            }
        }
    }

    async fn is_alive(&mut self) -> bool {
        redis::cmd("PING").exec_async(&mut self.connection).await.is_ok()
    }

    /// Publishes a batch in one pipeline; false if the connection is of no more use.
    async fn publish(&mut self, batch: &mut Vec<(Job, OwnedSemaphorePermit)>, endpoint: &Endpoint) -> bool {
        let pipeline = self.pipeline(batch);
        if self.needs_script(batch) && !self.load_script().await {
            answer(batch.drain(..).map(|(job, _)| (job.reply, Err(Refusal::unavailable()))), self.broker);
            return false;
        }
        let outcome: RedisResult<Vec<RedisResult<Value>>> = pipeline.query_async(&mut self.connection).await;
        let is_script = |job: &Job| self.broker.hub.rules().history(&job.channel).is_some();
        let replies: Vec<_> = batch.drain(..).map(|(job, _)| (is_script(&job), job.reply)).collect();
        match outcome {
            Ok(results) => {
                let is_any = |is: fn(&RedisError) -> bool| results.iter().any(|result| result.as_ref().is_err_and(is));
                if is_any(is_about_slots) {
                    endpoint.doubt();
                }
                self.has_script &= !is_any(is_about_script);
                let outcomes = replies.into_iter().zip(results);
                let outcomes = outcomes.map(|((is_script, reply), result)| (reply, outcome_of(result, is_script)));
                answer(outcomes, self.broker);
                true
            }
            Err(error) => {
                warn!(%error, "redis did not answer a publish");
                answer(replies.into_iter().map(|(_, reply)| (reply, Err(Refusal::outcome_unknown()))), self.broker);
                false
            }
        }
    }

    fn pipeline(&self, batch: &[(Job, OwnedSemaphorePermit)]) -> Pipeline {
        let mut pipeline = redis::pipe();
        pipeline.ignore_errors();
        for (job, _) in batch {
            match self.broker.hub.rules().history(&job.channel) {
                None => {
                    pipeline
                        .cmd(self.topology.publish_command())
                        .arg(self.topology.redis_channel(&job.channel))
                        .arg(&*job.payload);
                }
                Some(retention) => {
                    let place = Place::new(self.key_prefix, &job.channel, self.topology);
                    let call = place.publish(&job.payload, &retention, rand::random(), job.key.as_deref());
                    pipeline.invoke_script(&call);
                }
            }
        }
        pipeline
    }

    fn needs_script(&self, batch: &[(Job, OwnedSemaphorePermit)]) -> bool {
        !self.has_script && batch.iter().any(|(job, _)| self.broker.hub.rules().history(&job.channel).is_some())
    }

    async fn load_script(&mut self) -> bool {
        let loaded = history_redis::load_publish(&mut self.connection).await;
        self.has_script = loaded.inspect_err(|error| warn!(%error, "redis does not take the script")).is_ok();
        self.has_script
    }
}

/// What Redis answered to one message. On a channel with history, where a script published, that is its cursor.
fn outcome_of(result: RedisResult<Value>, is_script: bool) -> Outcome {
    match result {
        Ok(Value::Int(_)) => Ok(None),
        Ok(answer) => match history_redis::parse_published(&answer) {
            Some((cursor, _)) => Ok(Some(cursor)),
            None => Err(broken_off("its answer is no cursor")),
        },
        Err(error) if is_script && !history_redis::is_refused(&error) => Err(broken_off(&error.to_string())),
        Err(error) => Err(refusal(&error)),
    }
}

/// The script failed, perhaps after it had appended: not all of it is done, and not nothing.
fn broken_off(error: &str) -> Refusal {
    let message = format!("redis did not publish all of it, outcome unknown: {error}");
    Refusal { message: message.into(), ..Refusal::outcome_unknown() }
}

/// Redis forgot the script, and so ran nothing.
fn is_about_script(error: &RedisError) -> bool {
    error.kind() == ErrorKind::Server(ServerErrorKind::NoScript)
}

/// Why Redis did not take one message of a pipeline: certainly nothing was sent.
fn refusal(error: &RedisError) -> Refusal {
    if is_about_slots(error) || is_about_script(error) {
        Refusal::unavailable()
    } else {
        Refusal::redis_error(&error.to_string())
    }
}

/// Answers a job that was not queued.
pub fn refuse(job: Job, broker: &Broker) {
    answer([(job.reply, Err(Refusal::unavailable()))], broker);
}

/// Refuses what waited for its turn for longer than a publish may take.
fn refuse_expired(batch: &mut Vec<(Job, OwnedSemaphorePermit)>, broker: &Broker, timeout: Duration) {
    let oldest_us = clock::now_us().saturating_sub(micros(timeout));
    let expired = batch.extract_if(.., |(job, _)| job.accepted_us < oldest_us);
    answer(expired.map(|(job, _)| (job.reply, Err(Refusal::unavailable()))), broker);
}

/// Sends the outcomes on, with one flush for all of them.
fn answer(outcomes: impl IntoIterator<Item = (Reply, Outcome)>, broker: &Broker) {
    let mut fanout = Fanout::default();
    for (reply, outcome) in outcomes {
        match reply {
            Reply::Http(sender) => drop(sender.send(outcome)),
            Reply::Socket(connection, id) => {
                let frame = match (&outcome, id.as_deref()) {
                    (Ok(_), None) => continue,
                    (Ok(cursor), Some(id)) => event::published(id, *cursor),
                    (Err(refusal), id) => event::error(id, refusal, None),
                };
                fanout.push(&connection, &frame);
            }
        }
    }
    // Late repliers are not waited for: what they have outstanding is bounded by the queue.
    broker.shared.lanes.submit(&mut fanout);
    broker.shared.lanes.made_progress();
}
