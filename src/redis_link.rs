//! What the two Redis connections have in common: how to connect, and how long to wait before the next try.

use std::time::Duration;

use redis::aio::MultiplexedConnection;
use redis::io::tcp::TcpSettings;
use redis::{AsyncConnectionConfig, Client, IntoConnectionInfo, ProtocolVersion, RedisResult};

/// Longest time for connect and HELLO.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);

/// Longest pause between two tries: every channel is to be live again within 2 s of Redis being back.
const BACKOFF_MAX: Duration = Duration::from_millis(500);

const BACKOFF_FIRST: Duration = Duration::from_millis(20);

/// A half-open link is given up by the kernel after this.
const TCP_USER_TIMEOUT: Duration = Duration::from_secs(10);

/// Opens a client that speaks RESP3, which pushes need.
///
/// # Errors
/// What is wrong with the URL.
pub fn client(url: &str) -> RedisResult<Client> {
    let info = url.into_connection_info()?;
    let redis = info.redis_settings().clone().set_protocol(ProtocolVersion::RESP3);
    let tcp = TcpSettings::default().set_nodelay(true).set_user_timeout(TCP_USER_TIMEOUT);
    Client::open(info.set_redis_settings(redis).set_tcp_settings(tcp))
}

/// Connects, HELLO included, within [`CONNECT_TIMEOUT`].
///
/// # Errors
/// Whatever kept it from connecting.
pub async fn connect(client: &Client, config: &AsyncConnectionConfig) -> RedisResult<MultiplexedConnection> {
    let attempt = client.get_multiplexed_async_connection_with_config(config);
    match tokio::time::timeout(CONNECT_TIMEOUT, attempt).await {
        Ok(result) => result,
        Err(_) => Err(std::io::Error::from(std::io::ErrorKind::TimedOut).into()),
    }
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
