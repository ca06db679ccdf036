//! What Redis knows of this instance: that it lives, and who is connected to it.
//!
//! One task with a link of its own (`registry_writer.rs`) writes what changed in batches; nothing waits for it. It is
//! level-triggered: whoever opens or closes a connection notes its number, and the task writes what is
//! the case when it looks. One instance at a time sweeps up what dead ones left.
//!
//! Keys, after `HUBCAST_REDIS_KEY_PREFIX`:
//! - `instance:{instance_id}`: JSON, for as long as the instance renews its lease;
//! - `conn:{connection_id}`: JSON, renewed for as long as the connection lives;
//! - `instances`: ids of all instances that may have left something;
//! - `connections:{instance_id}`: numbers of its connections, for whoever sweeps up after it;
//! - `sweeper`: the instance that sweeps now.

use std::time::Duration;

use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio::sync::Notify;
use tokio::time::timeout;
use tracing::warn;

use crate::commands::Commands;
use crate::connection::Shared;
use crate::metrics::Link;

/// Noted changes that can wait; beyond it they are dropped, and everything is written anew.
const CHANGES_MAX: usize = 1 << 20;

/// How long leaving may hold up the end of the process.
const LEAVE_TIMEOUT: Duration = Duration::from_secs(1);

/// A connection is renewed in so many parts, one each time.
pub(crate) const REFRESH_PARTS: u32 = 45;

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
    pub(crate) fn heartbeat(&self) -> Duration {
        self.lease / 3
    }

    /// How long a connection's entry lives without being renewed: 120 s.
    pub(crate) fn connection_ttl(&self) -> Duration {
        self.lease * 4
    }

    /// Every connection is renewed within one and a half leases.
    pub(crate) fn refresh(&self) -> Duration {
        self.lease * 3 / 2 / REFRESH_PARTS
    }

    pub(crate) fn sweep(&self) -> Duration {
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
    pub(crate) settings: Settings,
    changes: Mutex<Changes>,
    has_changed: Notify,
    link: Mutex<Option<Commands>>,
    leave: Notify,
    has_left: Notify,
}

/// Connections that were opened or closed.
#[derive(Debug, Default)]
pub(crate) struct Changes {
    /// Theirs.
    pub(crate) numbers: Vec<u64>,
    /// More changed than can be told: everything has to be written.
    pub(crate) is_overrun: bool,
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

/// For the task that writes.
impl Registry {
    /// The link is up, or lost.
    pub(crate) fn lend(&self, link: Option<Commands>) {
        *self.link.lock() = link;
    }

    /// Waits until something is noted.
    pub(crate) async fn changed(&self) {
        self.has_changed.notified().await;
    }

    /// Takes what is noted.
    pub(crate) fn take(&self) -> Changes {
        std::mem::take(&mut *self.changes.lock())
    }

    /// Waits until the instance is to be taken out.
    pub(crate) async fn asked_to_leave(&self) {
        self.leave.notified().await;
    }

    /// It is out.
    pub(crate) fn left(&self) {
        self.has_left.notify_one();
    }
}

impl From<redis::RedisError> for Unavailable {
    fn from(error: redis::RedisError) -> Self {
        warn!(%error, "redis did not answer a question");
        Self
    }
}

impl Settings {
    pub(crate) fn instance(&self, id: &str) -> String {
        format!("{}instance:{id}", self.key_prefix)
    }

    pub(crate) fn connection(&self, instance_id: &str, number: u64) -> String {
        format!("{}conn:{instance_id}-{number}", self.key_prefix)
    }

    pub(crate) fn connections(&self, instance_id: &str) -> String {
        format!("{}connections:{instance_id}", self.key_prefix)
    }

    pub(crate) fn instances(&self) -> String {
        format!("{}instances", self.key_prefix)
    }

    pub(crate) fn sweeper(&self) -> String {
        format!("{}sweeper", self.key_prefix)
    }
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
