//! A Redis and a standby, with what befalls them: killed in the middle of writes that are logged, brought back as they
//! were or older, replaced by a replica that lacks what was acknowledged.

use std::time::Duration;

use tempfile::TempDir;
use tokio::time::sleep;

use crate::harness::Redis;
use crate::proxy::Proxy;

/// What a server says of itself, in its directory.
const LOG: &str = "redis.log";

/// The one that is written to, and the one that may follow it. Dropping it ends both.
pub struct Pair {
    primary: Node,
    /// Runs only from a copy on.
    standby: Node,
}

struct Node {
    redis: Redis,
    dir: TempDir,
}

impl Node {
    fn reserve() -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().to_str().expect("UTF-8");
        let redis = Redis::reserve_with("", &["--dir", path, "--logfile", LOG, "--repl-diskless-sync-delay", "0"]);
        Self { redis, dir }
    }
}

impl Pair {
    pub async fn start() -> Self {
        let mut primary = Node::reserve();
        primary.redis.restart().await;
        Self { primary, standby: Node::reserve() }
    }

    /// The one that is written to.
    pub fn redis(&self) -> &Redis {
        &self.primary.redis
    }

    /// Killed; it comes back as it was when it was saved last.
    pub async fn rewind(&mut self, away: Duration) {
        self.primary.redis.kill();
        sleep(away).await;
        self.primary.redis.restart().await;
    }

    /// From now on each write is in a file before it is answered.
    pub async fn log_writes(&self) {
        let redis = self.redis();
        redis.command(&["CONFIG", "SET", "appendfsync", "always", "appendonly", "yes"]).await;
        for (field, expected) in
            [("aof_enabled", "1"), ("aof_rewrite_scheduled", "0"), ("aof_rewrite_in_progress", "0")]
        {
            redis.await_info("persistence", field, expected).await;
        }
        redis.await_info("persistence", "aof_last_bgrewrite_status", "ok").await;
    }

    /// Killed, with whatever it is doing; it comes back from its log of writes, and keeps none from then on.
    pub async fn kill_logged(&mut self, away: Duration) {
        let log = self.primary.dir.path().join("appendonlydir");
        assert!(log.is_dir(), "there is no log");
        self.primary.redis.kill();
        sleep(away).await;
        let logged = ["--appendonly", "yes", "--appendfsync", "always"];
        self.primary.redis.restart_with(&logged).await;
        assert_ne!(self.redis().query::<u64>(&["DBSIZE"]).await.ok(), Some(0), "nothing of the log was read");
        self.redis().command(&["CONFIG", "SET", "appendonly", "no"]).await;
        std::fs::remove_dir_all(log).expect("it is ours");
    }

    /// The standby becomes a replica that has all, and hears nothing more once this returns. Dropping the link ends it.
    pub async fn copy_and_part(&mut self) -> Proxy {
        let link = Proxy::start(self.redis().addr()).await;
        let standby = &mut self.standby.redis;
        standby.restart().await;
        standby.command(&["REPLICAOF", "127.0.0.1", &link.addr().port().to_string()]).await;
        standby.await_info("replication", "master_link_status", "up").await;
        link.freeze();
        link
    }

    /// The standby takes writes from now on, as it is; it is the primary, and who that was runs on until it is killed.
    pub async fn promote(&mut self) {
        self.standby.redis.command(&["REPLICAOF", "NO", "ONE"]).await;
        std::mem::swap(&mut self.primary, &mut self.standby);
    }

    /// Ends who was the primary.
    pub fn kill_standby(&mut self) {
        self.standby.redis.kill();
    }

    /// The primary takes over the state of the standby, and no connection to it is lost.
    pub async fn take_over_standby(&mut self) {
        self.standby.redis.command(&["REPLICAOF", "NO", "ONE"]).await;
        let port = self.standby.redis.addr().port().to_string();
        let redis = self.redis();
        redis.command(&["REPLICAOF", "127.0.0.1", &port]).await;
        // What waits is refused.
        redis.command(&["CLIENT", "UNPAUSE"]).await;
        redis.await_info("replication", "master_link_status", "up").await;
        redis.command(&["REPLICAOF", "NO", "ONE"]).await;
        self.kill_standby();
    }

    /// Publishes to a channel until Redis ends the connection of a listener that takes nothing.
    pub async fn overflow(&self, channel: &str) {
        const LIMIT: [&str; 3] = ["CONFIG", "SET", "client-output-buffer-limit"];
        const OVERFLOW: &str = "scheduled to be closed ASAP for overcoming of output buffer limits.";
        const FLOOD_MAX: usize = 1000;
        let redis = self.redis();
        let limited = async |limit| redis.command(&[&LIMIT[..], &[limit]].concat()).await;
        let log = self.primary.dir.path().join(LOG);
        let ended = || {
            let log = std::fs::read_to_string(&log).expect("it writes one");
            log.lines().filter(|line| line.contains("name=hubcast-") && line.ends_with(OVERFLOW)).count()
        };
        let (before, payload) = (ended(), "x".repeat(100_000));
        limited("pubsub 1mb 512kb 1").await;
        // The kernel takes megabytes first.
        let mut flooded = 0;
        while ended() == before {
            assert!(flooded < FLOOD_MAX, "redis takes it all");
            redis.command(&["PUBLISH", channel, &payload]).await;
            flooded += 1;
        }
        limited("pubsub 32mb 8mb 60").await;
    }
}
