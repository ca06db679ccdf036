//! The task that writes the registry: the lease, every connection in time, and what dead instances left.
//!
//! What is written and where stands in `registry.rs`. A link of its own; after each loss of it everything is written
//! again, and so it is when the instance was taken for dead.
//!
//! A lease says nothing of an instance that could not renew it because Redis was away. So nobody sweeps before everybody
//! had the time to come back, and whatever takes long is interrupted to renew one's own.

use std::sync::Arc;
use std::time::Duration;

use redis::{Pipeline, RedisResult};
use serde_json::Value;
use tokio::time::{Instant, Interval, MissedTickBehavior, interval_at};
use tracing::{info, warn};

use crate::commands::{Commands, Place};
use crate::redis_link::Backoff;
use crate::registry::{Changes, REFRESH_PARTS, Registry, Roll, Settings};

/// Version of the JSON values, so that instances of different builds read each other's.
const RECORD_VERSION: u32 = 1;

/// Entries of one pipeline.
const BATCH_ENTRIES: usize = 500;

/// Changes are gathered for this long, so that a storm of connects is a few pipelines.
const BATCH_TIME: Duration = Duration::from_millis(20);

/// How long the list of instances lives without any: nothing that it stands for lives longer than a day.
const INSTANCES_TTL: Duration = Duration::from_secs(24 * 60 * 60);

/// An answer that takes longer means that the link is dead.
pub const RESPONSE_TIMEOUT: Duration = Duration::from_secs(2);

/// Keeps the registry until the runtime ends.
pub async fn run<R: Roll>(mut place: Place, registry: Arc<Registry>, roll: Arc<R>) {
    let mut backoff = Backoff::default();
    let mut was_up = false;
    loop {
        match place.connect(RESPONSE_TIMEOUT).await {
            Ok(link) => {
                registry.lend(Some(link.clone()));
                roll.note_link(true, was_up);
                was_up = true;
                backoff = Backoff::default();
                let mut writer = Writer::new(link, &registry, &*roll);
                tokio::select! {
                    error = writer.serve() => warn!(%error, "lost the registry's connection to redis"),
                    () = place.moved() => info!("the registry moves to another redis server"),
                }
                registry.lend(None);
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
    /// When the lease was last renewed.
    renewed: Instant,
    /// Redis did not know the instance any more: everything has to be written.
    is_forgotten: bool,
}

impl<'a, R: Roll> Writer<'a, R> {
    fn new(link: Commands, registry: &'a Registry, roll: &'a R) -> Self {
        Self { link, settings: &registry.settings, registry, roll, renewed: Instant::now(), is_forgotten: false }
    }

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
        // It is written now, be it known or not.
        self.is_forgotten = false;
        self.write_all().await?;
        let mut heartbeat = ticks(Duration::ZERO, self.settings.heartbeat());
        let mut refresh = ticks(Duration::ZERO, self.settings.refresh());
        // If Redis was away, all leases ended with it: the others need longer than this to come back.
        let mut sweep = ticks(self.settings.heartbeat(), self.settings.sweep());
        let mut part = 0;
        loop {
            tokio::select! {
                () = self.registry.asked_to_leave() => {
                    self.leave().await?;
                    self.registry.left();
                    return Ok(());
                }
                _ = heartbeat.tick() => self.renew_lease().await?,
                () = self.registry.changed() => {
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
            if std::mem::take(&mut self.is_forgotten) {
                info!("this instance was taken for dead, and registers anew");
                self.write_all().await?;
            }
        }
    }

    /// Renews the lease, and notes whether Redis knew the instance no more: its lease had ended, or it was swept up.
    async fn renew_lease(&mut self) -> RedisResult<()> {
        let (id, instances) = (self.roll.instance_id(), self.settings.instances());
        let record = versioned(self.roll.instance());
        // The lease first: whoever is listed without one is taken for dead.
        let mut set = redis::cmd("SET");
        set.arg(self.settings.instance(id)).arg(record).arg("PX").arg(millis(self.settings.lease)).arg("GET");
        let before: Option<String> = set.query_async(&mut self.link).await?;
        let (is_new,): (bool,) = redis::pipe()
            .sadd(&instances, id)
            .cmd("PEXPIRE")
            .arg(&instances)
            .arg(millis(INSTANCES_TTL))
            .ignore()
            .cmd("PEXPIRE")
            .arg(self.settings.connections(id))
            .arg(millis(self.settings.connection_ttl()))
            .ignore()
            .query_async(&mut self.link)
            .await?;
        self.renewed = Instant::now();
        self.is_forgotten |= is_new || before.is_none();
        Ok(())
    }

    /// Between the parts of what may take longer than a lease.
    async fn keep_lease(&mut self) -> RedisResult<()> {
        if self.renewed.elapsed() < self.settings.heartbeat() { Ok(()) } else { self.renew_lease().await }
    }

    /// Registers every connection, and nobody else.
    async fn write_all(&mut self) -> RedisResult<()> {
        drop(self.registry.take());
        self.roll.note_loss();
        // Who was closed meanwhile is in the index alone.
        let mut numbers = self.indexed().await?;
        numbers.extend(self.roll.connections(|_| true));
        self.write_each(numbers).await
    }

    /// The numbers that the index has.
    async fn indexed(&mut self) -> RedisResult<Vec<u64>> {
        let index = self.settings.connections(self.roll.instance_id());
        let (mut numbers, mut cursor) = (Vec::new(), 0);
        loop {
            let mut scan = redis::cmd("SSCAN");
            scan.arg(&index).arg(cursor).arg("COUNT").arg(BATCH_ENTRIES);
            let (next, found): (u64, Vec<u64>) = scan.query_async(&mut self.link).await?;
            numbers.extend(found);
            self.keep_lease().await?;
            cursor = next;
            if cursor == 0 {
                return Ok(numbers);
            }
        }
    }

    async fn write_changes(&mut self) -> RedisResult<()> {
        let Changes { numbers, is_overrun } = self.registry.take();
        if is_overrun { self.write_all().await } else { self.write_each(numbers).await }
    }

    async fn write_each(&mut self, mut numbers: Vec<u64>) -> RedisResult<()> {
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
            self.keep_lease().await?;
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
        // It lives itself, whatever became of its lease.
        for (id, _) in ids.iter().zip(live).filter(|(id, is_live)| !is_live && *id != own) {
            let connections = self.sweep_up(id).await?;
            info!(instance = id, connections, "removed what a dead instance left");
            self.keep_lease().await?;
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

/// Ticks after a pause and at a random phase, so that instances started together do not tick together.
fn ticks(pause: Duration, period: Duration) -> Interval {
    let mut ticks = interval_at(Instant::now() + pause + period.mul_f64(rand::random()), period);
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
