//! What all connections to Redis have in common: where they connect to, how, and how long they wait before the
//! next try.

use std::sync::Arc;
use std::time::Duration;

use redis::aio::MultiplexedConnection;
use redis::io::tcp::TcpSettings;
use redis::io::tcp::socket2::TcpKeepalive;
use redis::{
    AsyncConnectionConfig, Client, ConnectionAddr, ConnectionInfo, ErrorKind, ProtocolVersion, RedisError, RedisResult,
};
use tokio::sync::{Notify, watch};

/// Longest time for connect and HELLO.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);

/// Longest pause between two tries: every channel is to be live again within 2 s of Redis being back.
const BACKOFF_MAX: Duration = Duration::from_millis(500);

const BACKOFF_FIRST: Duration = Duration::from_millis(20);

/// A link that says nothing is asked whether it lives after this.
const KEEPALIVE: Duration = Duration::from_secs(5);

/// A half-open link is given up by the kernel after this.
const TCP_USER_TIMEOUT: Duration = Duration::from_secs(10);

/// How a server is reached, but for its address.
#[derive(Clone, Debug)]
pub struct Access {
    info: ConnectionInfo,
    client_name: Arc<str>,
}

impl Access {
    /// What a URL says: user, password, database, and whether TLS is spoken; and the name for `CLIENT LIST`.
    pub fn new(info: ConnectionInfo, client_name: &Arc<str>) -> Self {
        // RESP3, which pushes need.
        let redis = info.redis_settings().clone().set_protocol(ProtocolVersion::RESP3);
        let tcp = TcpSettings::default()
            .set_nodelay(true)
            .set_keepalive(TcpKeepalive::new().with_time(KEEPALIVE).with_interval(KEEPALIVE))
            .set_user_timeout(TCP_USER_TIMEOUT);
        let info = info.set_redis_settings(redis).set_tcp_settings(tcp);
        Self { info, client_name: Arc::clone(client_name) }
    }

    /// The same way to another address.
    #[must_use]
    pub fn at(&self, host: &str, port: u16) -> Self {
        let addr = match self.info.addr().clone() {
            ConnectionAddr::TcpTls { insecure, tls_params, .. } => {
                ConnectionAddr::TcpTls { host: host.to_owned(), port, insecure, tls_params }
            }
            _ => ConnectionAddr::Tcp(host.to_owned(), port),
        };
        self.with(self.info.clone().set_addr(addr))
    }

    /// The same without user and password.
    #[must_use]
    pub fn without_credentials(&self) -> Self {
        let redis = redis::RedisConnectionInfo::default().set_protocol(ProtocolVersion::RESP3);
        self.with(self.info.clone().set_redis_settings(redis))
    }

    /// The same at database 0, the only one that sentinels have.
    #[must_use]
    pub fn without_database(&self) -> Self {
        let redis = self.info.redis_settings().clone().set_db(0);
        self.with(self.info.clone().set_redis_settings(redis))
    }

    fn with(&self, info: ConnectionInfo) -> Self {
        Self { info, client_name: Arc::clone(&self.client_name) }
    }

    /// `host:port`.
    pub fn address(&self) -> String {
        self.info.addr().to_string()
    }

    /// The host.
    pub fn host(&self) -> &str {
        match self.info.addr() {
            ConnectionAddr::Tcp(host, _) | ConnectionAddr::TcpTls { host, .. } => host,
            _ => "",
        }
    }

    /// Connects, HELLO included, within [`CONNECT_TIMEOUT`].
    ///
    /// # Errors
    /// Whatever kept it from connecting.
    pub async fn connect(&self, config: &AsyncConnectionConfig) -> RedisResult<MultiplexedConnection> {
        let client = Client::open(self.info.clone())?;
        let attempt = client.get_multiplexed_async_connection_with_config(config);
        let Ok(result) = tokio::time::timeout(CONNECT_TIMEOUT, attempt).await else {
            return Err(std::io::Error::from(std::io::ErrorKind::TimedOut).into());
        };
        let mut connection = result?;
        let _ = client_name(&self.client_name).exec_async(&mut connection).await;
        Ok(connection)
    }
}

/// Says whose a connection is, for `CLIENT LIST`, where it is allowed.
pub(crate) fn client_name(name: &str) -> redis::Cmd {
    let mut command = redis::cmd("CLIENT");
    command.arg("SETNAME").arg(name);
    command
}

/// A server to connect to.
#[derive(Clone, Debug)]
pub struct Node {
    /// How.
    pub access: Access,
    /// It was named as the primary, and is of no use if it is not (any more).
    pub must_be_primary: bool,
}

/// Where a link connects to. After a failover that is another server; for a time it may be none.
#[derive(Clone, Debug)]
pub struct Endpoint {
    node: watch::Receiver<Option<Node>>,
    doubt: Arc<Notify>,
    /// The address of the last connection.
    last: Option<String>,
    has_moved: bool,
}

impl Endpoint {
    /// A server that is always the same.
    pub fn fixed(access: Access) -> Self {
        let (_, node) = watch::channel(Some(Node { access, must_be_primary: false }));
        Self { node, doubt: Arc::default(), last: None, has_moved: false }
    }

    /// A server that somebody else looks for; whoever has trouble with it notifies `doubt`.
    pub fn found(node: watch::Receiver<Option<Node>>, doubt: &Arc<Notify>) -> Self {
        Self { node, doubt: Arc::clone(doubt), last: None, has_moved: false }
    }

    /// Waits until there is a server.
    pub async fn server(&mut self) -> Node {
        // Without a sender the node stays what it is.
        match self.node.wait_for(Option::is_some).await.ok().and_then(|node| node.clone()) {
            Some(node) => node,
            None => std::future::pending().await,
        }
    }

    /// Waits until there is a server, and connects to it.
    ///
    /// # Errors
    /// Whatever kept it from connecting, or that the server is not the primary.
    pub async fn connect(&mut self, config: &AsyncConnectionConfig) -> RedisResult<MultiplexedConnection> {
        let node = self.server().await;
        let connection = try_connect(&node, config).await.inspect_err(|_| self.doubt())?;
        let last = self.last.replace(node.access.address());
        self.has_moved = node.must_be_primary && last.is_some() && last != self.last;
        Ok(connection)
    }

    /// Waits until the server that the last connect was to is not the right one any more.
    pub async fn moved(&mut self) {
        if self.node.changed().await.is_err() {
            std::future::pending().await
        }
    }

    /// Whether the last connection is to another primary than the one before.
    pub fn has_moved(&self) -> bool {
        self.has_moved
    }

    /// Something suggests that the server is not the right one: whoever looks for it looks again.
    pub fn doubt(&self) {
        self.doubt.notify_one();
    }
}

async fn try_connect(node: &Node, config: &AsyncConnectionConfig) -> RedisResult<MultiplexedConnection> {
    let mut connection = node.access.connect(config).await?;
    if node.must_be_primary {
        let role: Vec<redis::Value> = redis::cmd("ROLE").query_async(&mut connection).await?;
        if role.first() != Some(&redis::Value::BulkString(b"master".to_vec())) {
            return Err((ErrorKind::Client, "the server is not the primary").into());
        }
    }
    Ok(connection)
}

/// Whether a cluster says that a key or channel is at another node, or at none at this moment.
pub fn is_about_slots(error: &RedisError) -> bool {
    matches!(error.code(), Some("MOVED" | "ASK" | "TRYAGAIN" | "CLUSTERDOWN"))
}

/// Exponential pauses with full jitter, so that many instances do not come back at the same moment.
#[derive(Clone, Copy, Debug)]
pub struct Backoff {
    ceiling: Duration,
}

impl Default for Backoff {
    fn default() -> Self {
        Self { ceiling: BACKOFF_FIRST }
    }
}

impl Backoff {
    /// Whether no pause was taken yet.
    pub fn is_first(&self) -> bool {
        self.ceiling == BACKOFF_FIRST
    }

    /// The next pause.
    pub fn pause(&mut self) -> Duration {
        let pause = self.ceiling.mul_f64(rand::random());
        self.ceiling = (self.ceiling * 2).min(BACKOFF_MAX);
        pause
    }
}
