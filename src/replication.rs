//! Which history of writes a Redis server has: its replication id, which a failover, a restart and a resync change.
//!
//! A server can become a replica of another one, and take over an older state, without any connection being lost.

use std::sync::Arc;
use std::time::Duration;

use redis::RedisResult;

use crate::servers::Servers;

/// How often each server is asked: as often as it is probed.
pub const INTERVAL: Duration = Duration::from_secs(5);

/// What was last known of the servers.
#[derive(Debug)]
pub(crate) struct Replication {
    servers: Arc<Servers>,
    ids: Vec<Option<String>>,
}

impl Replication {
    /// Nothing is known yet.
    pub(crate) fn new(servers: Arc<Servers>) -> Self {
        let ids = vec![None; servers.topology.servers()];
        Self { servers, ids }
    }

    /// Asks all servers that can be reached, and gives those that have changed their id.
    pub(crate) async fn changed(mut self) -> (Self, Vec<usize>) {
        let mut changed = Vec::new();
        for server in 0..self.ids.len() {
            let Ok(Some(id)) = self.ask(server).await else { continue };
            let known = self.ids[server].replace(id);
            if known.is_some() && known != self.ids[server] {
                changed.push(server);
            }
        }
        (self, changed)
    }

    async fn ask(&self, server: usize) -> RedisResult<Option<String>> {
        let Some(mut link) = self.servers.link(server) else { return Ok(None) };
        let info: String = redis::cmd("INFO").arg("replication").query_async(&mut link).await?;
        Ok(info.lines().find_map(|line| line.strip_prefix("master_replid:")).map(|id| id.trim().to_owned()))
    }
}
