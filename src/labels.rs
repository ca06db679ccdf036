//! The labels of metrics: what is told apart, and by which names. None carries anything from outside.

/// Where a publication came from.
#[derive(Clone, Copy, Debug)]
pub enum Source {
    /// A client's `publish` command.
    Socket,
    /// The HTTP API.
    Http,
    /// A Redis channel; with Redis, what clients and the API publish comes back here too.
    Redis,
}

/// Why frames or messages were dropped.
#[derive(Clone, Copy, Debug)]
pub enum Drop {
    /// They waited for a slow consumer, or came for one.
    SlowConsumer,
    /// They waited for a connection that was lost or did not answer.
    ConnectionLost,
    /// The queue behind the Redis link was full; the channel is told a gap.
    RedisQueueFull,
    /// A Redis message above `HUBCAST_PUBLISH_BYTES_MAX`; the channel is told a gap.
    RedisTooLarge,
    /// A Redis message that begins like what only Hubcast says, and cannot be read: another build's.
    RedisUnreadable,
    /// The oldest that waited for a slow consumer, or came for one for which nothing else could go.
    DropOldest,
    /// They waited for a slow consumer, and a newer one of the same key came.
    Conflated,
}

/// A limit that somebody who is connected met.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Limited {
    /// `HUBCAST_COMMANDS_PER_SECOND`
    Commands,
    /// `HUBCAST_PUBLISHES_PER_SECOND`
    Publishes,
    /// `HUBCAST_PINGS_PER_SECOND`
    Pings,
    /// `HUBCAST_BAD_REQUESTS_PER_MINUTE`
    BadRequests,
    /// `HUBCAST_BYTES_PER_SECOND`
    Bytes,
    /// `HUBCAST_SUBSCRIPTIONS_MAX`
    Subscriptions,
    /// `HUBCAST_CHANNELS_MAX`
    Channels,
    /// `HUBCAST_MEMORY_MAX`
    Memory,
}

/// Whose connections share a limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// Those of one user who has shown a token.
    User,
    /// Those of one address; of IPv6, one /64.
    Address,
    /// All of this instance.
    Instance,
}

impl Scope {
    pub(crate) const LABELS: [&'static str; 3] = ["user", "address", "instance"];
}

/// What connections may do or hold only so much of together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Together {
    /// `HUBCAST_RATES_PER_...`
    Commands,
    /// `HUBCAST_RATES_PER_...`
    Publishes,
    /// `HUBCAST_RATES_PER_...`
    Bytes,
    /// `HUBCAST_SUBSCRIPTIONS_PER_...`
    Subscriptions,
    /// `HUBCAST_MEMORY_PER_...`
    Memory,
}

impl Together {
    pub(crate) const LABELS: [&'static str; 5] = ["commands", "publishes", "bytes", "subscriptions", "memory"];
}

/// A limit that somebody who is connected met: of the connection or of the instance, or one that he shares.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Limit {
    /// His own.
    Own(Limited),
    /// One that all connections of somebody share.
    Shared(Scope, Together),
}

impl From<Limited> for Limit {
    fn from(limited: Limited) -> Self {
        Self::Own(limited)
    }
}

impl Limited {
    pub(crate) const LABELS: [&'static str; 8] =
        ["commands", "publishes", "pings", "bad_requests", "bytes", "subscriptions", "channels", "memory"];
}

/// Why a connection was refused before the upgrade.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// `HUBCAST_CONNECTIONS_MAX` is reached.
    Limit,
    /// The gateway is draining.
    Draining,
    /// Not a WebSocket handshake that RFC 6455 §4.2.1 allows.
    Handshake,
    /// Nothing complete arrived within `HUBCAST_HANDSHAKE_TIMEOUT`.
    Timeout,
    /// A web page that `HUBCAST_ORIGINS` does not allow.
    Origin,
    /// `HUBCAST_HANDSHAKES_PER_SECOND` is reached.
    Rate,
    /// `HUBCAST_HANDSHAKES_PENDING_MAX` is reached.
    Pending,
    /// `HUBCAST_HANDSHAKES_PER_ADDRESS` is reached.
    AddressRate,
    /// `HUBCAST_CONNECTIONS_PER_ADDRESS` is reached.
    AddressConnections,
    /// `HUBCAST_HANDSHAKES_PER_USER` is reached.
    UserRate,
    /// `HUBCAST_CONNECTIONS_PER_USER` is reached.
    UserConnections,
    /// Not from a listed proxy, or without its header, and `HUBCAST_PROXY_PROTOCOL` is on.
    ProxyProtocol,
    /// The TLS handshake failed.
    Tls,
    /// Three quarters of `HUBCAST_MEMORY_MAX` are taken.
    Memory,
    /// Its token is not good, or there is none and no way to show one later.
    Unauthorized,
    /// Raw mode on a channel that its token does not grant.
    Forbidden,
}

impl Refused {
    pub(crate) const LABELS: [&'static str; 16] = [
        "limit",
        "draining",
        "handshake",
        "timeout",
        "origin",
        "rate",
        "pending",
        "address_rate",
        "address_connections",
        "user_rate",
        "user_connections",
        "proxy_protocol",
        "tls",
        "memory",
        "unauthorized",
        "forbidden",
    ];
}

/// Why an API request was refused.
#[derive(Clone, Copy, Debug)]
pub enum ApiRefused {
    /// It had no key, and one is needed.
    NoKey,
    /// Its key is none of `HUBCAST_API_KEYS`.
    WrongKey,
    /// Its key is not good for what it asked for.
    NoRight,
}

/// Files that are read again when they change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reloaded {
    /// Those of `HUBCAST_API_KEYS`.
    ApiKeys,
    /// `HUBCAST_TLS_CERT` and `HUBCAST_TLS_KEY`.
    Certificate,
    /// `HUBCAST_JWT_SECRET` and `HUBCAST_JWT_PUBLIC_KEY`.
    JwtKeys,
    /// What `HUBCAST_JWKS_URL` answers.
    Jwks,
}

impl Reloaded {
    pub(crate) const LABELS: [&'static str; 4] = ["api_keys", "certificate", "jwt_keys", "jwks"];

    /// The label.
    pub fn as_str(self) -> &'static str {
        Self::LABELS[self as usize]
    }
}

/// What an operator has said may be open to anybody.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Insecure {
    /// `HUBCAST_AUTH=none` on a listener off loopback.
    NoAuth,
    /// `HUBCAST_INSECURE_INTERNAL=true`, and nothing else keeps strangers out.
    Internal,
}

impl Insecure {
    pub(crate) const LABELS: [&'static str; 2] = ["no_auth", "internal"];
}

/// Which Redis connection.
#[derive(Clone, Copy, Debug)]
pub enum Link {
    /// The multiplexer's.
    Subscribe,
    /// The publisher's.
    Publish,
    /// The registry's.
    Registry,
}
