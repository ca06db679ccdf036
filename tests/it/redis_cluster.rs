//! A Redis Cluster: three primaries with a replica each, whose slots move and whose nodes die.

use std::net::SocketAddr;

use futures_util::future::join_all;
use redis::{RedisError, RedisResult};
use tempfile::TempDir;

use crate::harness::{Redis, eventually};
use crate::redis_node::Node;

/// Which slots each primary has at the start, as `redis-cli --cluster create` shares them out.
const SHARES: [(u16, u16); 3] = [(0, 5460), (5461, 10922), (10923, 16383)];
const NODES: usize = 2 * SHARES.len();

/// Six nodes; the first three start as primaries. Dropping it ends them all.
pub struct RedisCluster {
    nodes: Vec<Node>,
    _dir: TempDir,
}

impl RedisCluster {
    pub async fn start() -> Self {
        let dir = TempDir::new().expect("a directory");
        let nodes = join_all((0..NODES).map(|index| Node::start(&dir, index))).await;
        let cluster = Self { nodes, _dir: dir };
        cluster.share_slots().await;
        cluster.introduce().await;
        cluster.follow().await;
        cluster
    }

    async fn share_slots(&self) {
        for (node, (first, last)) in self.nodes.iter().zip(SHARES) {
            node.redis.command(&["CLUSTER", "ADDSLOTSRANGE", &first.to_string(), &last.to_string()]).await;
        }
        // Nodes of one epoch would take turns to resolve that.
        for (node, epoch) in self.nodes.iter().zip(1..) {
            node.redis.command(&["CLUSTER", "SET-CONFIG-EPOCH", &epoch.to_string()]).await;
        }
    }

    /// Everybody to everybody: gossip would take seconds.
    async fn introduce(&self) {
        join_all(self.nodes.iter().map(async |node| {
            for other in &self.nodes {
                let (addr, bus) = (other.redis.addr(), other.bus.addr().port().to_string());
                let meet = ["CLUSTER", "MEET", &addr.ip().to_string(), &addr.port().to_string(), &bus];
                node.redis.command(&meet).await;
            }
        }))
        .await;
        eventually("everybody to know everybody", async || {
            for node in &self.nodes {
                let opinions = node.opinions().await?;
                let strangers = opinions.iter().filter(|other| other.flags.contains("handshake")).count();
                (opinions.len() == NODES && strangers == 0).then_some(())?;
            }
            Some(())
        })
        .await;
    }

    /// The second half of the nodes follows the first.
    async fn follow(&self) {
        let (primaries, replicas) = self.nodes.split_at(SHARES.len());
        for (replica, primary) in replicas.iter().zip(primaries) {
            replica.redis.command(&["CLUSTER", "REPLICATE", &primary.id]).await;
        }
        eventually("the cluster to be complete", async || {
            for node in &self.nodes {
                node.is_content().await.then_some(())?;
                let replicas = node.opinions().await?.iter().filter(|other| other.flags.contains("slave")).count();
                (replicas == SHARES.len()).then_some(())?;
            }
            for replica in replicas {
                let info: String = replica.redis.query(&["INFO", "replication"]).await.ok()?;
                info.contains("master_link_status:up").then_some(())?;
            }
            Some(())
        })
        .await;
    }

    /// The URLs of all nodes, with commas in between.
    pub fn urls(&self) -> String {
        let urls: Vec<_> = self.nodes.iter().map(|node| format!("redis://{}", node.redis.addr())).collect();
        urls.join(",")
    }

    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    pub fn node(&mut self, addr: SocketAddr) -> &mut Redis {
        let node = self.nodes.iter_mut().find(|node| node.redis.addr() == addr);
        &mut node.expect("an address of a node").redis
    }

    /// The slot of a key or of a shard channel.
    pub async fn slot_of(&self, key: &str) -> u16 {
        let asked = async || self.first_answer(&["CLUSTER", "KEYSLOT", key]).await;
        eventually("a node to answer", asked).await
    }

    async fn first_answer<T: redis::FromRedisValue>(&self, command: &[&str]) -> Option<T> {
        for node in &self.nodes {
            if let Ok(answer) = node.redis.query(command).await {
                return Some(answer);
            }
        }
        None
    }

    /// The primary of a slot, once all living nodes agree and serve.
    pub async fn primary_of(&self, slot: u16) -> SocketAddr {
        eventually("agreement on a primary", async || self.agreed_primary_of(slot).await).await
    }

    /// Ends the primary as `kill -9` does; gives its address, to start it again with `node(addr).restart()`.
    pub async fn kill_primary_of(&mut self, slot: u16) -> SocketAddr {
        let primary = self.primary_of(slot).await;
        self.node(primary).kill();
        primary
    }

    /// Waits until all living nodes agree on another primary than `old`, and serve; gives its address.
    pub async fn await_new_primary_of(&self, slot: u16, old: SocketAddr) -> SocketAddr {
        eventually("another primary", async || self.agreed_primary_of(slot).await.filter(|primary| *primary != old))
            .await
    }

    async fn agreed_primary_of(&self, slot: u16) -> Option<SocketAddr> {
        let mut agreed = None;
        for node in &self.nodes {
            let Some(opinions) = node.opinions().await else { continue };
            let primary = opinions.into_iter().find(|other| other.owns(slot))?.addr;
            node.is_content().await.then_some(())?;
            (*agreed.get_or_insert(primary) == primary).then_some(())?;
        }
        agreed
    }

    /// Moves a slot with its keys while it is in use, as `redis-cli --cluster reshard` does.
    pub async fn migrate_slot(&self, slot: u16, to: SocketAddr) {
        let from = self.begin_migration(slot, to).await;
        self.move_keys(slot, from, to).await;
        self.end_migration(slot, from, to).await;
    }

    /// The first step: both sides know of the move; gives the address it moves from.
    pub async fn begin_migration(&self, slot: u16, to: SocketAddr) -> SocketAddr {
        let from = self.primary_of(slot).await;
        let (source, target) = (self.at(from), self.at(to));
        let slot = slot.to_string();
        target.redis.command(&["CLUSTER", "SETSLOT", &slot, "IMPORTING", &source.id]).await;
        source.redis.command(&["CLUSTER", "SETSLOT", &slot, "MIGRATING", &target.id]).await;
        from
    }

    /// The second: key by key, the target has what the source had.
    pub async fn move_keys(&self, slot: u16, from: SocketAddr, to: SocketAddr) {
        let source = &self.at(from).redis;
        let (slot, host, port) = (slot.to_string(), to.ip().to_string(), to.port().to_string());
        loop {
            let keys: Vec<String> =
                source.query(&["CLUSTER", "GETKEYSINSLOT", &slot, "100"]).await.expect("the source is there");
            if keys.is_empty() {
                return;
            }
            let mut migrate = vec!["MIGRATE", &host, &port, "", "0", "5000", "KEYS"];
            migrate.extend(keys.iter().map(String::as_str));
            source.command(&migrate).await;
        }
    }

    /// The last: the target owns the slot, and everybody hears of it; the target first, that it is never without owner.
    pub async fn end_migration(&self, slot: u16, from: SocketAddr, to: SocketAddr) {
        let target = self.at(to).id.as_str();
        let mut others = Vec::new();
        for node in &self.nodes {
            let addr = node.redis.addr();
            if addr != to && addr != from && node.is_primary().await {
                others.push(addr);
            }
        }
        for addr in [to, from].into_iter().chain(others) {
            self.at(addr).redis.command(&["CLUSTER", "SETSLOT", &slot.to_string(), "NODE", target]).await;
        }
        self.primary_of(slot).await;
    }

    fn at(&self, addr: SocketAddr) -> &Node {
        self.nodes.iter().find(|node| node.redis.addr() == addr).expect("an address of a node")
    }

    /// How many clients are subscribed to a shard channel, wherever they are connected.
    pub async fn numsub(&self, channel: &str) -> i64 {
        let mut sum = 0;
        for node in &self.nodes {
            let reply: RedisResult<(String, i64)> = node.redis.query(&["PUBSUB", "SHARDNUMSUB", channel]).await;
            sum += reply.map_or(0, |(_, number)| number);
        }
        sum
    }

    /// Publishes to a shard channel at the primary that owns it; gives how many clients of that node received it.
    ///
    /// It tries until it succeeds: a primary that stands still has the message more than once when it goes on.
    pub async fn spublish(&self, channel: &str, payload: &str) -> i64 {
        let command = ["SPUBLISH", channel, payload];
        eventually("a primary to take the message", async || {
            for node in &self.nodes {
                // A replica would take it too, and count its own clients.
                if !node.is_primary().await {
                    continue;
                }
                match node.redis.query(&command).await {
                    Ok(received) => return Some(received),
                    Err(error) => {
                        let Some(owner) = moved_to(&error) else { continue };
                        return self.at(owner).redis.query(&command).await.ok();
                    }
                }
            }
            None
        })
        .await
    }
}

/// Where a node says that the slot is.
fn moved_to(error: &RedisError) -> Option<SocketAddr> {
    error.redirect_node()?.0.parse().ok()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slot_moves_with_its_keys_and_its_channels_are_found() {
    let cluster = RedisCluster::start().await;
    assert_eq!(cluster.urls().split(',').count(), cluster.nodes().len());
    let slot = cluster.slot_of("{c}:k").await;
    let from = cluster.primary_of(slot).await;
    let to = cluster.nodes().iter().map(|node| node.redis.addr()).find(|addr| *addr != from).unwrap();
    for n in 0..250 {
        cluster.at(from).redis.command(&["SET", &format!("{{c}}:{n}"), "v"]).await;
    }
    for owner in [from, to] {
        let client = redis::Client::open(format!("redis://{owner}/?protocol=resp3")).unwrap();
        let mut subscriber = client.get_multiplexed_async_connection().await.unwrap();
        redis::cmd("SSUBSCRIBE").arg("{c}").exec_async(&mut subscriber).await.unwrap();
        assert_eq!(cluster.numsub("{c}").await, 1);
        assert_eq!(cluster.spublish("{c}", "hello").await, 1);
        if owner == from {
            cluster.migrate_slot(slot, to).await;
            assert_eq!(cluster.numsub("{c}").await, 0, "the old owner let its subscribers go");
        }
    }
    assert_eq!(cluster.primary_of(slot).await, to);
    let moved: Option<String> = cluster.at(to).redis.query(&["GET", "{c}:249"]).await.unwrap();
    assert_eq!(moved.as_deref(), Some("v"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_takes_the_slots_of_a_killed_primary_which_comes_back_as_a_replica() {
    let mut cluster = RedisCluster::start().await;
    let slot = cluster.slot_of("c").await;
    let killed = cluster.kill_primary_of(slot).await;
    let new = cluster.await_new_primary_of(slot, killed).await;
    assert_eq!(cluster.spublish("c", "hello").await, 0);
    cluster.node(killed).restart().await;
    eventually("it to be a replica", async || (!cluster.at(killed).is_primary().await).then_some(())).await;
    assert_eq!(cluster.primary_of(slot).await, new);
}
