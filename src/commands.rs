//! A link for commands on single keys, to one server or to a whole Redis Cluster.
//!
//! The registry's keys are spread over all slots. Redirections, topology and reconnects of a cluster are the redis
//! crate's matter here, because nothing on the message path waits for it.

use std::sync::Arc;

use futures_util::future::try_join_all;
use redis::aio::{ConnectionLike, MultiplexedConnection};
use redis::cluster::ClusterClient;
use redis::cluster_async::ClusterConnection;
use redis::{AsyncConnectionConfig, Cmd, Pipeline, RedisFuture, RedisResult, Value};

use crate::redis_link::{CONNECT_TIMEOUT, Endpoint, client_name};

/// Where a link goes.
#[derive(Clone)]
pub enum Place {
    /// To one server.
    Server(Endpoint),
    /// To all nodes of a cluster, by this name.
    Cluster(Box<ClusterClient>, Arc<str>),
}

/// The link.
#[derive(Clone)]
pub enum Commands {
    /// To one server.
    Server(MultiplexedConnection),
    /// To all nodes of a cluster.
    Cluster(ClusterConnection),
}

impl Place {
    /// Connects. An answer that takes longer than `response_timeout` means that the link is dead.
    ///
    /// # Errors
    /// Whatever kept it from connecting.
    pub async fn connect(&mut self, response_timeout: std::time::Duration) -> RedisResult<Commands> {
        match self {
            Self::Server(endpoint) => {
                let config = AsyncConnectionConfig::new()
                    .set_connection_timeout(Some(CONNECT_TIMEOUT))
                    .set_response_timeout(Some(response_timeout));
                Ok(Commands::Server(endpoint.connect(&config).await?))
            }
            Self::Cluster(client, name) => {
                let mut link = client.get_async_connection().await?;
                // To all nodes. Connections that the crate makes anew later have none.
                let _ = client_name(name).exec_async(&mut link).await;
                Ok(Commands::Cluster(link))
            }
        }
    }

    /// Waits until the server is another one.
    pub async fn moved(&mut self) {
        match self {
            Self::Server(endpoint) => endpoint.moved().await,
            Self::Cluster(..) => std::future::pending().await,
        }
    }
}

impl std::fmt::Debug for Commands {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(match self {
            Self::Server(_) => "Server",
            Self::Cluster(_) => "Cluster",
        })
    }
}

impl ConnectionLike for Commands {
    fn req_packed_command<'a>(&'a mut self, command: &'a Cmd) -> RedisFuture<'a, Value> {
        match self {
            Self::Server(link) => link.req_packed_command(command),
            Self::Cluster(link) => link.req_packed_command(command),
        }
    }

    /// In a cluster the commands of a pipeline go to the nodes of their keys, all at once.
    fn req_packed_commands<'a>(
        &'a mut self,
        pipeline: &'a Pipeline,
        offset: usize,
        count: usize,
    ) -> RedisFuture<'a, Vec<Value>> {
        let link = match self {
            Self::Server(link) => return link.req_packed_commands(pipeline, offset, count),
            Self::Cluster(link) => link,
        };
        let answers = pipeline.cmd_iter().map(|command| {
            let mut link = link.clone();
            async move { link.req_packed_command(command).await }
        });
        Box::pin(try_join_all(answers.collect::<Vec<_>>()))
    }

    fn get_db(&self) -> i64 {
        match self {
            Self::Server(link) => link.get_db(),
            Self::Cluster(_) => 0,
        }
    }
}
