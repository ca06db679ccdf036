//! One node of a Redis Cluster, and what it thinks of the others.

use std::net::SocketAddr;

use redis::RedisResult;
use tempfile::TempDir;

use crate::harness::{Port, Redis};

/// A node that is silent for so long is dead to the others.
const NODE_TIMEOUT_MS: &str = "1000";

/// One node, which may be dead.
pub struct Node {
    pub redis: Redis,
    pub id: String,
    /// On which nodes talk to each other.
    pub bus: Port,
}

/// A line of `CLUSTER NODES`: what one node thinks of another.
pub struct Opinion {
    pub id: String,
    pub addr: SocketAddr,
    pub flags: String,
    slots: Vec<(u16, u16)>,
}

impl Node {
    pub async fn start(dir: &TempDir, index: usize) -> Self {
        let dir = dir.path().join(index.to_string());
        std::fs::create_dir(&dir).expect("a directory");
        let bus = Port::claim();
        let mut redis = Redis::reserve_with(
            "",
            &[
                ["--dir", dir.to_str().expect("a name of ours")],
                ["--cluster-enabled", "yes"],
                ["--cluster-port", &bus.addr().port().to_string()],
                ["--cluster-announce-ip", "127.0.0.1"],
                ["--cluster-node-timeout", NODE_TIMEOUT_MS],
                // However long it was away from its primary, a replica may take its place.
                ["--cluster-replica-validity-factor", "0"],
                // Replicas stay with the primary that a story gave them.
                ["--cluster-allow-replica-migration", "no"],
                ["--repl-diskless-sync-delay", "0"],
            ]
            .concat(),
        );
        redis.restart().await;
        let id = redis.query(&["CLUSTER", "MYID"]).await.expect("it answers");
        Self { redis, id, bus }
    }

    /// What it thinks of everybody, or `None` if it is dead.
    pub async fn opinions(&self) -> Option<Vec<Opinion>> {
        let lines: String = self.redis.query(&["CLUSTER", "NODES"]).await.ok()?;
        lines.lines().map(Opinion::parse).collect()
    }

    /// Whether it serves, and sees no slot without an owner.
    pub async fn is_content(&self) -> bool {
        let info: RedisResult<String> = self.redis.query(&["CLUSTER", "INFO"]).await;
        info.is_ok_and(|info| info.contains("cluster_state:ok"))
    }

    pub async fn is_primary(&self) -> bool {
        let opinions = self.opinions().await.unwrap_or_default();
        opinions.iter().any(|own| own.id == self.id && own.flags.contains("master"))
    }
}

impl Opinion {
    /// `<id> <ip:port@bus[,hostname]> <flags> <primary> <ping> <pong> <epoch> <link> <slot>...`
    fn parse(line: &str) -> Option<Self> {
        let mut words = line.split(' ');
        let id = words.next()?.to_owned();
        let addr = words.next()?.split('@').next()?.parse().ok()?;
        let flags = words.next()?.to_owned();
        // Slots on the move are in brackets, and no numbers.
        let slots = words.skip(5).filter_map(|slots| {
            let (first, last) = slots.split_once('-').unwrap_or((slots, slots));
            Some((first.parse().ok()?, last.parse().ok()?))
        });
        Some(Self { id, addr, flags, slots: slots.collect() })
    }

    pub fn owns(&self, slot: u16) -> bool {
        self.slots.iter().any(|(first, last)| (*first..=*last).contains(&slot))
    }
}
