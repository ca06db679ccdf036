//! Which nodes of a Redis Cluster own the partitions, as the cluster says.
//!
//! A node is asked every few seconds, and at once when a link was lost, a slot has moved or a channel was refused.
//! Each primary that owns a partition has a place, with a multiplexer and a publisher of its own; the places of
//! those that own none any more are given to others.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use redis::aio::MultiplexedConnection;
use redis::{AsyncConnectionConfig, ErrorKind, RedisResult, Value};
use tokio::sync::{Notify, watch};
use tokio::time::{sleep, timeout};
use tracing::{info, warn};

use crate::broker::Broker;
use crate::redis_link::{Access, CONNECT_TIMEOUT, Node};
use crate::topology::{NODES_MAX, Topology};

/// How often the cluster is asked when nothing happens.
const POLL: Duration = Duration::from_secs(5);

/// The least time between two questions.
const PAUSE: Duration = Duration::from_millis(100);

/// Watches the cluster until the runtime ends. `places` are the nodes of all places but the last.
pub async fn watch(
    seeds: Vec<Access>,
    topology: Arc<Topology>,
    places: Vec<watch::Sender<Option<Node>>>,
    doubt: Arc<Notify>,
    broker: Arc<Broker>,
) {
    let mut watcher = Watcher { known: seeds.clone(), seeds, link: None, epoch: 0, nodes: vec![None; NODES_MAX] };
    loop {
        if let Some(owners) = watcher.owners().await
            && watcher.place(&owners, &topology, &places)
        {
            let nodes: Vec<_> = watcher.nodes.iter().flatten().collect();
            info!(epoch = watcher.epoch, ?nodes, "the partitions have other owners");
            broker.shared.metrics.redis_servers.set(nodes.len() as i64);
            broker.hub.list_everything();
        }
        sleep(PAUSE).await;
        let _ = timeout(POLL, doubt.notified()).await;
    }
}

struct Watcher {
    seeds: Vec<Access>,
    /// Whom to ask, the one after the other.
    known: Vec<Access>,
    link: Option<(Access, MultiplexedConnection)>,
    /// The newest epoch of the cluster that was seen: a node that was cut off knows an older one.
    epoch: u64,
    /// The addresses of the places.
    nodes: Vec<Option<String>>,
}

/// The first and last slot of a range, and its primary.
struct Range {
    first: u16,
    last: u16,
    primary: Access,
}

impl Watcher {
    /// The owners of the slots, from the first node that answers and is not behind. If all answer and are behind, the
    /// cluster was built anew.
    async fn owners(&mut self) -> Option<Vec<Range>> {
        let (mut behind, mut failed) = (None, 0);
        for _ in 0..=self.known.len() {
            match self.ask().await {
                Ok((epoch, ranges)) if epoch >= self.epoch && !ranges.is_empty() => {
                    return Some(self.learn(epoch, ranges));
                }
                // Cut off, or not a member of the cluster yet.
                Ok((epoch, ranges)) => {
                    if !ranges.is_empty() && behind.as_ref().is_none_or(|(newest, _)| epoch > *newest) {
                        behind = Some((epoch, ranges));
                    }
                }
                Err(error) => {
                    failed += 1;
                    warn!(%error, "a node of the cluster does not answer");
                }
            }
            self.link = None;
            self.known.rotate_left(1);
        }
        let (epoch, ranges) = behind.filter(|_| failed == 0)?;
        warn!(epoch, before = self.epoch, "all nodes of the cluster are at an older epoch: it was built anew");
        Some(self.learn(epoch, ranges))
    }

    fn learn(&mut self, epoch: u64, ranges: Vec<Range>) -> Vec<Range> {
        self.epoch = epoch;
        self.known = ranges.iter().map(|range| range.primary.clone()).chain(self.seeds.clone()).collect();
        ranges
    }

    /// `CLUSTER INFO` and `CLUSTER SLOTS` of one node.
    async fn ask(&mut self) -> RedisResult<(u64, Vec<Range>)> {
        let (access, link) = match &mut self.link {
            Some(link) => link,
            empty => {
                let config = AsyncConnectionConfig::new()
                    .set_connection_timeout(Some(CONNECT_TIMEOUT))
                    .set_response_timeout(Some(CONNECT_TIMEOUT));
                let access = self.known.first().ok_or((ErrorKind::Client, "no node is known"))?;
                empty.insert((access.clone(), access.connect(&config).await?))
            }
        };
        let mut pipeline = redis::pipe();
        pipeline.cmd("CLUSTER").arg("INFO").cmd("CLUSTER").arg("SLOTS");
        let (info, slots): (String, Vec<Vec<Value>>) = pipeline.query_async(link).await?;
        let epoch = info.lines().find_map(|line| line.trim().strip_prefix("cluster_current_epoch:")?.parse().ok());
        let ranges = slots.iter().map(|range| read_range(range, access)).collect::<RedisResult<_>>()?;
        Ok((epoch.unwrap_or(0), ranges))
    }

    /// Gives every primary of a partition a place; true if anything has changed.
    fn place(&mut self, ranges: &[Range], topology: &Topology, places: &[watch::Sender<Option<Node>>]) -> bool {
        let owner = |slot| ranges.iter().find(|range| (range.first..=range.last).contains(&slot));
        let primaries: BTreeMap<_, _> = topology
            .slots()
            .filter_map(|slot| Some(&owner(slot)?.primary))
            .map(|node| (node.address(), node))
            .collect();
        for (address, access) in &primaries {
            if self.nodes.contains(&Some(address.clone())) {
                continue;
            }
            let Some(free) = self.nodes.iter().position(Option::is_none) else {
                warn!(address, "no place is left for this node of the cluster");
                continue;
            };
            self.nodes[free] = Some(address.clone());
            places[free].send_replace(Some(Node { access: (*access).clone(), must_be_primary: false }));
        }
        let place_of = |slot| {
            let address = owner(slot)?.primary.address();
            self.nodes.iter().position(|node| node.as_ref() == Some(&address))
        };
        let has_changed = topology.place(place_of);
        for (place, node) in self.nodes.iter_mut().enumerate() {
            if node.as_ref().is_some_and(|address| !primaries.contains_key(address)) {
                *node = None;
                places[place].send_replace(None);
            }
        }
        has_changed
    }
}

/// One element of `CLUSTER SLOTS`. An empty host means the one that was asked.
fn read_range(range: &[Value], asked: &Access) -> RedisResult<Range> {
    let unreadable = || (ErrorKind::Parse, "CLUSTER SLOTS cannot be read").into();
    let [Value::Int(first), Value::Int(last), Value::Array(primary), ..] = range else { return Err(unreadable()) };
    let [host, Value::Int(port), ..] = primary.as_slice() else { return Err(unreadable()) };
    let host = match host {
        Value::BulkString(host) if !host.is_empty() => String::from_utf8_lossy(host).into_owned(),
        _ => asked.host().to_owned(),
    };
    let number = |number: &i64| u16::try_from(*number).map_err(|_| unreadable());
    Ok(Range { first: number(first)?, last: number(last)?, primary: asked.at(&host, number(port)?) })
}
