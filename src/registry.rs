//! What Redis knows of this instance: that it lives, and who is connected to it.
//!
//! One task with a link of its own writes what changed in batches; nothing waits for it. It is
//! level-triggered: whoever opens or closes a connection notes its number, and the task writes what is
//! the case when it looks. One instance at a time sweeps up what dead ones left.
//!
//! Keys, after `HUBCAST_REDIS_KEY_PREFIX`:
//! - `instance:{instance_id}`: JSON, for as long as the instance renews its lease;
//! - `conn:{connection_id}`: JSON, renewed for as long as the connection lives;
//! - `instances`: ids of all instances that may have left something;
//! - `connections:{instance_id}`: numbers of its connections, for whoever sweeps up after it;
//! - `sweeper`: the instance that sweeps now.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use redis::{Pipeline, RedisResult};
use serde_json::{Value, json};
use tokio::sync::Notify;
use tokio::time::{Instant, Interval, MissedTickBehavior, interval_at, timeout};
use tracing::{info, warn};

use crate::commands::{Commands, Place};
use crate::connection::Shared;
use crate::metrics::Link;
use crate::redis_link::Backoff;

/// Version of the JSON values, so that instances of different builds read each other's.
const RECORD_VERSION: u32 = 1;

/// Entries of one pipeline.
const BATCH_ENTRIES: usize = 500;

/// Changes are gathered for this long, so that a storm of connects is a few pipelines.
const BATCH_TIME: Duration = Duration::from_millis(20);

/// Noted changes that can wait; beyond it they are dropped, and everything is written anew.
const CHANGES_MAX: usize = 1 << 20;

/// An answer that takes longer means that the link is dead.
pub const RESPONSE_TIMEOUT: Duration = Duration::from_secs(2);

/// How long leaving may hold up the end of the process.
const LEAVE_TIMEOUT: Duration = Duration::from_secs(1);

/// A connection is renewed in so many parts, one each time.
const REFRESH_PARTS: u32 = 45;

/// What the registry needs to know.
#[derive(Clone, Debug)]
pub struct Settings {
    /// `HUBCAST_REDIS_KEY_PREFIX`
    pub key_prefix: Box<str>,
    /// An instance that has not renewed its lease for this long is dead: 30 s.
    pub lease: Duration,
}

impl Settings {
    /// Three tries to renew within a lease.
    fn heartbeat(&self) -> Duration {
        self.lease / 3
    }

    /// How long a connection's entry lives without being renewed: 120 s.
    fn connection_ttl(&self) -> Duration {
        self.lease * 4
    }

    /// Every connection is renewed within one and a half leases.
    fn refresh(&self) -> Duration {
        self.lease * 3 / 2 / REFRESH_PARTS
    }

    fn sweep(&self) -> Duration {
        self.lease / 6
    }
}

/// Who is to be registered.
pub trait Roll: Send + Sync + 'static {
    /// The instance.
    fn instance_id(&self) -> &str;

    /// Its record, without the version.
    fn instance(&self) -> Value;

    /// The record of a connection, without the version; `None` once it is closed.
    fn connection(&self, number: u64) -> Option<Value>;

    /// Hears whether the link to Redis is up, and whether it was before.
    fn note_link(&self, is_up: bool, was_up: bool);

    /// Hears that Redis may have lost what this instance wrote.
    fn note_loss(&self) {}

    /// Removes what else an instance has left, unless its key is back. False: a part has to stay for the next sweep.
    fn sweep_up(&self, _link: &mut Commands, _id: &str, _key: &str) -> impl Future<Output = bool> + Send {
        std::future::ready(true)
    }

    /// The numbers of open connections that `is_wanted`.
    fn connections(&self, is_wanted: impl Fn(u64) -> bool) -> Vec<u64>;
}

/// The local side: what has changed, and the way to ask.
#[derive(Debug)]
pub struct Registry {
    settings: Settings,
    changes: Mutex<Changes>,
    has_changed: Notify,
    link: Mutex<Option<Commands>>,
    leave: Notify,
    has_left: Notify,
}

#[derive(Debug, Default)]
struct Changes {
    numbers: Vec<u64>,
    /// More changed than can be told: everything has to be written.
    is_overrun: bool,
}

/// Redis could not be asked.
#[derive(Debug)]
pub struct Unavailable;

impl Registry {
    /// Nothing has changed yet, and there is no link.
    pub fn new(settings: Settings) -> Self {
        Self {
            settings,
            changes: Mutex::default(),
            has_changed: Notify::new(),
            link: Mutex::new(None),
            leave: Notify::new(),
            has_left: Notify::new(),
        }
    }

    /// Notes that a connection was opened or closed.
    pub fn note(&self, number: u64) {
        let mut changes = self.changes.lock();
        if changes.numbers.len() >= CHANGES_MAX {
            changes.numbers = Vec::new();
            changes.is_overrun = true;
        }
        changes.numbers.push(number);
        drop(changes);
        self.has_changed.notify_one();
    }

    /// The records of all live instances by id.
    ///
    /// # Errors
    /// Redis is not there.
    pub async fn instances(&self) -> Result<Vec<(String, Value)>, Unavailable> {
        let mut link = self.link.lock().clone().ok_or(Unavailable)?;
        let ids: Vec<String> = redis::cmd("SMEMBERS").arg(self.settings.instances()).query_async(&mut link).await?;
        let mut pipeline = redis::pipe();
        for id in &ids {
            pipeline.get(self.settings.instance(id));
        }
        let records: Vec<Option<String>> = pipeline.query_async(&mut link).await?;
        let parse = |record: Option<String>| serde_json::from_str(&record?).ok();
        Ok(ids.into_iter().zip(records).filter_map(|(id, record)| Some((id, parse(record)?))).collect())
    }

    /// Publishes to a control channel of other instances.
    ///
    /// # Errors
    /// Redis is not there.
    pub async fn publish(&self, channel: &str, message: &str) -> Result<(), Unavailable> {
        let mut link = self.link.lock().clone().ok_or(Unavailable)?;
        Ok(redis::cmd("PUBLISH").arg(channel).arg(message).exec_async(&mut link).await?)
    }

    /// The link, while there is one.
    pub(crate) fn link(&self) -> Option<Commands> {
        self.link.lock().clone()
    }

    /// Takes the instance and what is left of its connections out of Redis, within a second.
    pub async fn leave(&self) {
        self.leave.notify_one();
        let _ = timeout(LEAVE_TIMEOUT, self.has_left.notified()).await;
    }
}

impl From<redis::RedisError> for Unavailable {
    fn from(error: redis::RedisError) -> Self {
        warn!(%error, "redis did not answer a question");
        Self
    }
}

impl Settings {
    fn instance(&self, id: &str) -> String {
        format!("{}instance:{id}", self.key_prefix)
    }

    fn connection(&self, instance_id: &str, number: u64) -> String {
        format!("{}conn:{instance_id}-{number}", self.key_prefix)
    }

    fn connections(&self, instance_id: &str) -> String {
        format!("{}connections:{instance_id}", self.key_prefix)
    }

    fn instances(&self) -> String {
        format!("{}instances", self.key_prefix)
    }

    fn sweeper(&self) -> String {
        format!("{}sweeper", self.key_prefix)
    }
}

/// Keeps the registry until the runtime ends.
pub async fn run<R: Roll>(mut place: Place, registry: Arc<Registry>, roll: Arc<R>) {
    let mut backoff = Backoff::default();
    let mut was_up = false;
    loop {
        match place.connect(RESPONSE_TIMEOUT).await {
            Ok(link) => {
                *registry.link.lock() = Some(link.clone());
                roll.note_link(true, was_up);
                was_up = true;
                backoff = Backoff::default();
                let mut writer = Writer { link, settings: &registry.settings, registry: &registry, roll: &*roll };
                tokio::select! {
                    error = writer.serve() => warn!(%error, "lost the registry's connection to redis"),
                    () = place.moved() => info!("the registry moves to another redis server"),
                }
                *registry.link.lock() = None;
                roll.note_link(false, was_up);
            }
            Err(error) if backoff.is_first() => warn!(%error, "cannot reach redis for the registry, retrying"),
            Err(_) => {}
        }
        tokio::time::sleep(backoff.pause()).await;
    }
}

/// One connection's time.
struct Writer<'a, R> {
    link: Commands,
    settings: &'a Settings,
    registry: &'a Registry,
    roll: &'a R,
}

impl<R: Roll> Writer<'_, R> {
    /// Serves until the link is lost; returns why.
    async fn serve(&mut self) -> redis::RedisError {
        match self.try_serve().await {
            Err(error) => error,
            // It has left: nothing more is written.
            Ok(()) => std::future::pending().await,
        }
    }

    async fn try_serve(&mut self) -> RedisResult<()> {
        self.renew_lease().await?;
        self.write_all().await?;
        let mut heartbeat = ticks(self.settings.heartbeat());
        let mut refresh = ticks(self.settings.refresh());
        let mut sweep = ticks(self.settings.sweep());
        let mut part = 0;
        loop {
            tokio::select! {
                () = self.registry.leave.notified() => {
                    self.leave().await?;
                    self.registry.has_left.notify_one();
                    return Ok(());
                }
                _ = heartbeat.tick() => {
                    if self.renew_lease().await? {
                        info!("this instance was taken for dead, and registers anew");
                        self.write_all().await?;
                    }
                }
                () = self.registry.has_changed.notified() => {
                    tokio::time::sleep(BATCH_TIME).await;
                    self.write_changes().await?;
                }
                _ = refresh.tick() => {
                    part = (part + 1) % REFRESH_PARTS;
                    let numbers = self.roll.connections(|number| number % u64::from(REFRESH_PARTS) == u64::from(part));
                    self.write(&numbers, false).await?;
                }
                _ = sweep.tick() => self.sweep().await?,
            }
        }
    }

    /// True if Redis did not know the instance: it is new there, or was swept up.
    async fn renew_lease(&mut self) -> RedisResult<bool> {
        let id = self.roll.instance_id();
        let record = versioned(self.roll.instance());
        // The lease first: whoever is listed without one is taken for dead.
        let mut set = redis::cmd("SET");
        set.arg(self.settings.instance(id)).arg(record).arg("PX").arg(millis(self.settings.lease));
        set.exec_async(&mut self.link).await?;
        let (is_new,): (bool,) = redis::pipe()
            .sadd(self.settings.instances(), id)
            .cmd("PEXPIRE")
            .arg(self.settings.connections(id))
            .arg(millis(self.settings.connection_ttl()))
            .ignore()
            .query_async(&mut self.link)
            .await?;
        Ok(is_new)
    }

    /// Registers every connection, and nobody else.
    async fn write_all(&mut self) -> RedisResult<()> {
        *self.registry.changes.lock() = Changes::default();
        self.roll.note_loss();
        let index = self.settings.connections(self.roll.instance_id());
        redis::cmd("UNLINK").arg(index).exec_async(&mut self.link).await?;
        let numbers = self.roll.connections(|_| true);
        self.write(&numbers, true).await
    }

    async fn write_changes(&mut self) -> RedisResult<()> {
        let Changes { mut numbers, is_overrun } = std::mem::take(&mut *self.registry.changes.lock());
        if is_overrun {
            return self.write_all().await;
        }
        numbers.sort_unstable();
        numbers.dedup();
        self.write(&numbers, true).await
    }

    /// Writes what is the case: a record of each that is open, none of the others. The index only if `with_index`.
    async fn write(&mut self, numbers: &[u64], with_index: bool) -> RedisResult<()> {
        let id = self.roll.instance_id();
        let index = self.settings.connections(id);
        for batch in numbers.chunks(BATCH_ENTRIES) {
            let mut pipeline = redis::pipe();
            let (mut open, mut closed) = (Vec::new(), Vec::new());
            for number in batch {
                let key = self.settings.connection(id, *number);
                match self.roll.connection(*number) {
                    Some(record) => {
                        self.set(&mut pipeline, key, record);
                        open.push(*number);
                    }
                    None => {
                        pipeline.cmd("UNLINK").arg(key).ignore();
                        closed.push(*number);
                    }
                }
            }
            if with_index && !open.is_empty() {
                pipeline.sadd(&index, open).ignore();
                pipeline.cmd("PEXPIRE").arg(&index).arg(millis(self.settings.connection_ttl())).ignore();
            }
            if !closed.is_empty() {
                pipeline.srem(&index, closed).ignore();
            }
            pipeline.exec_async(&mut self.link).await?;
        }
        Ok(())
    }

    fn set(&self, pipeline: &mut Pipeline, key: String, record: Value) {
        let ttl = millis(self.settings.connection_ttl());
        pipeline.cmd("SET").arg(key).arg(versioned(record)).arg("PX").arg(ttl).ignore();
    }

    /// Removes what dead instances left, if it is this instance's turn.
    async fn sweep(&mut self) -> RedisResult<()> {
        let own = self.roll.instance_id();
        let lock = self.settings.sweeper();
        let (_, holder): (Option<String>, Option<String>) = redis::pipe()
            .cmd("SET")
            .arg(&lock)
            .arg(own)
            .arg("NX")
            .arg("PX")
            .arg(millis(self.settings.lease / 2))
            .get(&lock)
            .query_async(&mut self.link)
            .await?;
        if holder.as_deref() != Some(own) {
            return Ok(());
        }
        redis::cmd("PEXPIRE").arg(&lock).arg(millis(self.settings.lease / 2)).exec_async(&mut self.link).await?;
        let ids: Vec<String> =
            redis::cmd("SMEMBERS").arg(self.settings.instances()).query_async(&mut self.link).await?;
        let mut pipeline = redis::pipe();
        for id in &ids {
            pipeline.exists(self.settings.instance(id));
        }
        let live: Vec<bool> = pipeline.query_async(&mut self.link).await?;
        for (id, _) in ids.iter().zip(live).filter(|(_, is_live)| !is_live) {
            let connections = self.sweep_up(id).await?;
            info!(instance = id, connections, "removed what a dead instance left");
        }
        Ok(())
    }

    /// Removes an instance and its connections; returns how many those were.
    async fn sweep_up(&mut self, id: &str) -> RedisResult<usize> {
        let index = self.settings.connections(id);
        let mut count = 0;
        loop {
            let numbers: Vec<u64> =
                redis::cmd("SRANDMEMBER").arg(&index).arg(BATCH_ENTRIES).query_async(&mut self.link).await?;
            if numbers.is_empty() {
                break;
            }
            count += numbers.len();
            let mut pipeline = redis::pipe();
            for number in &numbers {
                pipeline.cmd("UNLINK").arg(self.settings.connection(id, *number)).ignore();
            }
            pipeline.srem(&index, numbers).ignore();
            pipeline.exec_async(&mut self.link).await?;
        }
        if self.roll.sweep_up(&mut self.link, id, &self.settings.instance(id)).await {
            redis::cmd("SREM").arg(self.settings.instances()).arg(id).exec_async(&mut self.link).await?;
        }
        Ok(count)
    }

    async fn leave(&mut self) -> RedisResult<()> {
        let id = self.roll.instance_id();
        redis::cmd("UNLINK").arg(self.settings.instance(id)).exec_async(&mut self.link).await?;
        self.sweep_up(id).await.map(drop)
    }
}

/// Ticks at a random phase, so that instances started together do not tick together.
fn ticks(period: Duration) -> Interval {
    let mut ticks = interval_at(Instant::now() + period.mul_f64(rand::random()), period);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    ticks
}

fn millis(duration: Duration) -> u64 {
    duration.as_millis() as u64
}

fn versioned(mut record: Value) -> String {
    record["v"] = RECORD_VERSION.into();
    record.to_string()
}

impl Roll for Shared {
    fn instance_id(&self) -> &str {
        &self.instance_id
    }

    fn instance(&self) -> Value {
        json!({
            "connections": self.connections.len(),
            "started_at_ms": self.started_at_ms,
            "version": env!("CARGO_PKG_VERSION"),
        })
    }

    fn connection(&self, number: u64) -> Option<Value> {
        let connection = self.connections.get(&number)?;
        Some(json!({
            "instance": self.instance_id,
            "user": connection.user(),
            "connected_at_ms": connection.connected_at_ms(),
            "remote": connection.remote(),
        }))
    }

    fn note_link(&self, is_up: bool, was_up: bool) {
        self.metrics.links_up(Link::Registry, usize::from(is_up));
        if is_up && was_up {
            self.metrics.reconnected(Link::Registry);
        }
    }

    fn note_loss(&self) {
        self.presence.rewrite();
    }

    async fn sweep_up(&self, link: &mut Commands, id: &str, key: &str) -> bool {
        self.presence.sweep_up(link, id, key).await
    }

    fn connections(&self, is_wanted: impl Fn(u64) -> bool) -> Vec<u64> {
        self.connections.iter().map(|connection| *connection.key()).filter(|number| is_wanted(*number)).collect()
    }
}
