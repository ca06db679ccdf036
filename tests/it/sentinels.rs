//! A primary, its replica, and three sentinels that put the one in the other's place.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::process::{Command, Stdio};

use futures_util::future::join_all;
use tempfile::TempDir;

use crate::harness::{Port, Process, Redis, eventually};

/// What the sentinels call the primary.
pub const MASTER: &str = "hubcast";
const QUORUM: usize = 2;
const SENTINELS: usize = 3;
/// Each has its own: sentinels that see the loss at once all vote for themselves, and try again seconds later.
const DOWN_AFTER_MS: [u32; SENTINELS] = [600, 800, 1000];

/// How often sentinels look and talk. Their own values make a test wait for ten seconds, a first ping after
/// [`DOWN_AFTER_MS`] takes every new primary for dead, and a machine that stands still for two seconds makes them
/// sit back for thirty ("tilt").
const PERIODS_MS: [(&str, u32); 7] = [
    ("info-period", 200),
    ("publish-period", 200),
    ("ask-period", 100),
    // Five of them must be more than a second: what they know of a replica counts for so long, and they ask it
    // once a second while its primary is down.
    ("ping-period", 300),
    ("election-timeout", 2_000),
    ("slave-reconf-timeout", 1_000),
    ("tilt-trigger", 30_000),
];

/// Two nodes and three sentinels. Dropping it ends them all.
pub struct Sentinels {
    nodes: [Redis; 2],
    sentinels: Vec<Sentinel>,
    _dir: TempDir,
}

struct Sentinel {
    port: Port,
    _process: Process,
}

impl Sentinels {
    pub async fn start() -> Self {
        Self::start_with(None).await
    }

    /// Nodes that want this password; the sentinels want none.
    pub async fn start_with_password(password: &str) -> Self {
        Self::start_with(Some(password)).await
    }

    async fn start_with(password: Option<&str>) -> Self {
        let dir = TempDir::new().expect("a directory");
        let mut nodes = ["a", "b"].map(|name| node(&dir, name, password));
        let [primary, replica] = &mut nodes;
        tokio::join!(primary.restart(), replica.restart());
        let (host, port) = (primary.addr().ip().to_string(), primary.addr().port().to_string());
        replica.command(&["REPLICAOF", &host, &port]).await;
        eventually("the replica to follow", async || {
            let info: String = primary.query(&["INFO", "replication"]).await.ok()?;
            info.contains("state=online").then_some(())
        })
        .await;
        let sentinels = (0..SENTINELS).map(|index| Sentinel::spawn(&dir, index, primary.addr(), password)).collect();
        let started = Self { nodes, sentinels, _dir: dir };
        started.await_acquaintance().await;
        started
    }

    /// Waits until every sentinel knows the replica and all other sentinels.
    async fn await_acquaintance(&self) {
        for sentinel in &self.sentinels {
            sentinel.hurry().await;
        }
        for sentinel in &self.sentinels {
            eventually("the sentinels to know each other", async || {
                let primary: HashMap<String, String> = sentinel.query(&["SENTINEL", "MASTER", MASTER]).await?;
                let others = (SENTINELS - 1).to_string();
                (primary["flags"] == "master"
                    && primary["num-slaves"] == "1"
                    && primary["num-other-sentinels"] == others)
                    .then_some(())
            })
            .await;
        }
    }

    /// The URLs of all sentinels, with commas in between.
    pub fn urls(&self) -> String {
        let urls: Vec<_> = self.sentinels.iter().map(|sentinel| format!("redis://{}", sentinel.port.addr())).collect();
        urls.join(",")
    }

    /// `CLIENT LIST` of all sentinels.
    pub async fn clients(&self) -> String {
        let lists = self.sentinels.iter().map(|sentinel| sentinel.query::<String>(&["CLIENT", "LIST"]));
        join_all(lists).await.into_iter().flatten().collect()
    }

    /// The primary, as most sentinels say.
    pub async fn primary_addr(&self) -> SocketAddr {
        eventually("the sentinels to name a primary", async || self.agreed(QUORUM).await).await
    }

    /// What at least so many sentinels take for the primary.
    async fn agreed(&self, at_least: usize) -> Option<SocketAddr> {
        let said = join_all(self.sentinels.iter().map(Sentinel::primary)).await;
        let said: Vec<_> = said.into_iter().flatten().collect();
        said.iter().copied().find(|addr| said.iter().filter(|other| *other == addr).count() >= at_least)
    }

    pub fn node(&mut self, addr: SocketAddr) -> &mut Redis {
        self.nodes.iter_mut().find(|node| node.addr() == addr).expect("an address of a node")
    }

    /// Ends the primary as `kill -9` does; gives its address, to start it again with `node(addr).restart()`.
    pub async fn kill_primary(&mut self) -> SocketAddr {
        let primary = self.primary_addr().await;
        self.node(primary).kill();
        primary
    }

    /// The primary stands still with all its connections; gives its address, for `node(addr).thaw()`.
    pub async fn freeze_primary(&mut self) -> SocketAddr {
        let primary = self.primary_addr().await;
        self.node(primary).freeze();
        primary
    }

    /// Waits until all sentinels name another primary than `old`, and it takes writes; gives its address.
    pub async fn await_failover(&mut self, old: SocketAddr) -> SocketAddr {
        let new =
            eventually("another primary", async || self.agreed(SENTINELS).await.filter(|primary| *primary != old))
                .await;
        self.await_role(new, "master").await;
        new
    }

    /// Waits until a node is what the sentinels want it to be.
    pub async fn await_role(&mut self, addr: SocketAddr, role: &str) {
        let node = self.node(addr);
        eventually(&format!("{addr} to be a {role}"), async || {
            let info: String = node.query(&["INFO", "replication"]).await.ok()?;
            info.contains(&format!("role:{role}\r\n")).then_some(())
        })
        .await;
    }
}

fn node(dir: &TempDir, name: &str, password: Option<&str>) -> Redis {
    let dir = dir.path().join(name);
    std::fs::create_dir(&dir).expect("a directory");
    let dir = dir.to_str().expect("a name of ours");
    let mut arguments = vec!["--dir", dir, "--repl-diskless-sync-delay", "0"];
    let mut credentials = String::new();
    if let Some(password) = password {
        arguments.extend(["--requirepass", password, "--masterauth", password]);
        credentials = format!(":{password}@");
    }
    Redis::reserve_with(&credentials, &arguments)
}

impl Sentinel {
    fn spawn(dir: &TempDir, index: usize, primary: SocketAddr, password: Option<&str>) -> Self {
        let port = Port::claim();
        let dir = dir.path().join(format!("sentinel{index}"));
        std::fs::create_dir(&dir).expect("a directory");
        let auth = password.map(|password| format!("sentinel auth-pass {MASTER} {password}")).unwrap_or_default();
        // A sentinel insists on a file, because it writes there what it has learnt.
        let config = format!(
            "port {}\nbind 127.0.0.1\ndir {}\n\
             sentinel monitor {MASTER} {} {} {QUORUM}\n\
             sentinel down-after-milliseconds {MASTER} {}\n\
             sentinel failover-timeout {MASTER} 2000\n\
             {auth}\n",
            port.addr().port(),
            dir.display(),
            primary.ip(),
            primary.port(),
            DOWN_AFTER_MS[index],
        );
        let file = dir.join("sentinel.conf");
        std::fs::write(&file, config).expect("the directory is ours");
        let child = Command::new("redis-server")
            .arg(file)
            .arg("--sentinel")
            .stdout(Stdio::null())
            .spawn()
            .expect("redis-server is installed (.ci/run installs it)");
        Self { port, _process: Process(child) }
    }

    /// Sets [`PERIODS_MS`], as soon as it answers.
    async fn hurry(&self) {
        let mut command = vec!["SENTINEL".to_owned(), "DEBUG".to_owned()];
        command.extend(PERIODS_MS.iter().flat_map(|(name, ms)| [(*name).to_owned(), ms.to_string()]));
        let command: Vec<_> = command.iter().map(String::as_str).collect();
        eventually("a sentinel to answer", async || self.query::<()>(&command).await).await;
    }

    async fn primary(&self) -> Option<SocketAddr> {
        let (host, port): (String, u16) = self.query(&["SENTINEL", "GET-MASTER-ADDR-BY-NAME", MASTER]).await?;
        Some(SocketAddr::new(host.parse().ok()?, port))
    }

    async fn query<T: redis::FromRedisValue>(&self, arguments: &[&str]) -> Option<T> {
        let client = redis::Client::open(format!("redis://{}", self.port.addr())).ok()?;
        let mut connection = client.get_multiplexed_async_connection().await.ok()?;
        redis::cmd(arguments[0]).arg(&arguments[1..]).query_async(&mut connection).await.ok()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_replica_takes_the_place_of_a_killed_primary_which_comes_back_as_a_replica() {
    let mut sentinels = Sentinels::start_with_password("secret").await;
    assert_eq!(sentinels.urls().split(',').count(), SENTINELS);
    let killed = sentinels.kill_primary().await;
    let new = sentinels.await_failover(killed).await;
    sentinels.node(new).command(&["SET", "k", "v"]).await;
    sentinels.node(killed).restart().await;
    sentinels.await_role(killed, "slave").await;
    let copied = sentinels.node(killed);
    eventually("its copy", async || copied.query::<Option<String>>(&["GET", "k"]).await.ok().flatten()).await;
    assert_eq!(sentinels.primary_addr().await, new);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_replica_takes_the_place_of_a_frozen_primary() {
    let mut sentinels = Sentinels::start().await;
    let frozen = sentinels.freeze_primary().await;
    let new = sentinels.await_failover(frozen).await;
    assert_ne!(new, frozen);
    sentinels.node(frozen).thaw();
    sentinels.await_role(frozen, "slave").await;
}
