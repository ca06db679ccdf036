//! Which server is the primary, as the sentinels say.
//!
//! They are asked once a second, and at once when a link was lost: a failover is noticed within a second of their
//! decision, also where the old primary keeps our connections.

use std::sync::Arc;
use std::time::Duration;

use redis::aio::MultiplexedConnection;
use redis::{AsyncConnectionConfig, RedisResult};
use tokio::sync::{Notify, watch};
use tokio::time::{sleep, timeout};
use tracing::{info, warn};

use crate::redis_link::{Access, CONNECT_TIMEOUT, Node};

/// How often the sentinels are asked.
const POLL: Duration = Duration::from_secs(1);

/// The least time between two questions.
const PAUSE: Duration = Duration::from_millis(100);

/// Looks for the primary called `name` until the runtime ends. User, password and database are those of the
/// server; a sentinel is given user and password only if it wants them.
pub async fn watch(sentinels: Vec<Access>, name: String, found: watch::Sender<Option<Node>>, doubt: Arc<Notify>) {
    let mut sentinels = sentinels.into_iter().map(|access| Sentinel { access, link: None }).collect::<Vec<_>>();
    let mut has_warned = false;
    loop {
        match primary(&mut sentinels, &name).await {
            Some(access) => {
                has_warned = false;
                let address = access.address();
                let is_new = found.send_if_modified(|node| {
                    let is_new = node.as_ref().is_none_or(|node| node.access.address() != address);
                    if is_new {
                        *node = Some(Node { access, must_be_primary: true });
                    }
                    is_new
                });
                if is_new {
                    info!(address, "the sentinels name the primary");
                }
            }
            None if !std::mem::replace(&mut has_warned, true) => warn!(name, "no sentinel names a primary, retrying"),
            None => {}
        }
        sleep(PAUSE).await;
        let _ = timeout(POLL, doubt.notified()).await;
    }
}

/// Asks one sentinel after the other. The one that answered goes first the next time.
async fn primary(sentinels: &mut [Sentinel], name: &str) -> Option<Access> {
    for at in 0..sentinels.len() {
        match sentinels[at].primary(name).await {
            Ok(Some((host, port))) => {
                sentinels.swap(0, at);
                return Some(sentinels[0].access.at(&host, port));
            }
            Ok(None) => warn!(sentinel = sentinels[at].access.address(), name, "the sentinel does not know this name"),
            Err(_) => sentinels[at].link = None,
        }
    }
    None
}

struct Sentinel {
    access: Access,
    link: Option<MultiplexedConnection>,
}

impl Sentinel {
    /// `SENTINEL get-master-addr-by-name`
    async fn primary(&mut self, name: &str) -> RedisResult<Option<(String, u16)>> {
        let link = match &mut self.link {
            Some(link) => link,
            empty => empty.insert(connect(&self.access).await?),
        };
        redis::cmd("SENTINEL").arg("get-master-addr-by-name").arg(name).query_async(link).await
    }
}

async fn connect(access: &Access) -> RedisResult<MultiplexedConnection> {
    let config = AsyncConnectionConfig::new()
        .set_connection_timeout(Some(CONNECT_TIMEOUT))
        .set_response_timeout(Some(CONNECT_TIMEOUT));
    match access.without_credentials().connect(&config).await {
        Err(error) if error.code() == Some("NOAUTH") => access.without_database().connect(&config).await,
        result => result,
    }
}
