//! The `HUBCAST_` variables as one sees them from outside: names, defaults, and why those.

/// A variable, as `--help`, the README and the parser see it.
#[derive(Debug)]
pub struct Variable {
    /// The name.
    pub name: &'static str,
    /// The default as one would write it; empty where there is none.
    pub default: &'static str,
    /// What it is, and why the default.
    pub help: &'static str,
}

const fn variable(name: &'static str, default: &'static str, help: &'static str) -> Variable {
    Variable { name, default, help }
}

/// All variables.
pub const VARIABLES: &[Variable] = &[
    variable(
        "HUBCAST_LISTEN",
        "127.0.0.1:8080",
        "Public listener (WebSocket). Loopback: nothing is exposed by accident.",
    ),
    variable("HUBCAST_INTERNAL_LISTEN", "127.0.0.1:8081", "Internal listener (API, health, metrics). Never expose it."),
    variable("HUBCAST_INSECURE_INTERNAL", "false", "Allows an internal listener off loopback without API keys."),
    variable(
        "HUBCAST_API_KEYS",
        "",
        "Comma list of keys for /api, or of files with keys (an absolute path, or file:PATH), which are read again when they change. Without any, none is needed.",
    ),
    variable(
        "HUBCAST_AUTH",
        "none",
        "none or jwt: whether clients have to show a token. Off loopback none must be written: nobody is let in by oversight.",
    ),
    variable(
        "HUBCAST_JWT_SECRET",
        "",
        "Secret of at least 32 bytes by which your backend signs tokens (HMAC), or a file with it (/path or file:PATH), which is read again when it changes.",
    ),
    variable(
        "HUBCAST_JWT_PUBLIC_KEY",
        "",
        "Public key of your issuer in PEM (RSA, P-256, P-384 or Ed25519), or a file with it, as above.",
    ),
    variable(
        "HUBCAST_JWKS_URL",
        "",
        "Address of your issuer's keys (JWK Set). Fetched every 5 minutes, and when a token names a new one.",
    ),
    variable(
        "HUBCAST_JWT_ALGORITHM",
        "",
        "The one algorithm of the secret or public key. Default: HS256, RS256, ES256 or ES384, EdDSA, as the key is; those of a JWK Set say it themselves.",
    ),
    variable("HUBCAST_JWT_ISSUER", "", "What a token's iss has to be. Default: anything."),
    variable("HUBCAST_JWT_AUDIENCE", "", "What a token's aud has to be, or have among others. Default: anything."),
    variable(
        "HUBCAST_JWT_LIFE_MAX",
        "1day",
        "Tokens that are valid for longer are refused, and so long a revocation is remembered. A day: sessions are renewed by then.",
    ),
    variable(
        "HUBCAST_ORIGINS",
        "",
        "Comma list of the web pages that may connect: https://app.example.org, https://*.example.org for all subdomains, * for any. Without a list, pages of other hosts may connect only without cookies.",
    ),
    variable(
        "HUBCAST_TRUSTED_PROXIES",
        "",
        "Comma list of addresses and networks, such as 10.0.0.0/8, of proxies in front: only they are believed whom they speak for. None: whoever connects is the client.",
    ),
    variable(
        "HUBCAST_FORWARDING_HEADER",
        "x-forwarded-for",
        "The header that those proxies write: x-forwarded-for or forwarded. The other one may be the client's own, so it is never read.",
    ),
    variable(
        "HUBCAST_PROXY_PROTOCOL",
        "off",
        "on: every public connection comes from a trusted proxy and begins with the PROXY protocol, version 1 or 2; others are closed.",
    ),
    variable(
        "HUBCAST_TLS_CERT",
        "",
        "PEM file of the public listener's certificate and its chain; with it clients speak TLS. Read again when it changes.",
    ),
    variable("HUBCAST_TLS_KEY", "", "PEM file of its private key."),
    variable(
        "HUBCAST_REDIS_URL",
        "",
        "redis://[user:password@]host:port[/db], rediss:// for TLS; a comma list as the mode says. Without it the instance is complete on its own.",
    ),
    variable(
        "HUBCAST_REDIS_MODE",
        "standalone",
        "What the list names: standalone, independent servers that share the channels; sentinel, its sentinels; cluster, some of its nodes.",
    ),
    variable(
        "HUBCAST_REDIS_SENTINEL_MASTER",
        "mymaster",
        "The primary's name at the sentinels: what Redis' own sample configuration calls it.",
    ),
    variable(
        "HUBCAST_REDIS_PARTITIONS",
        "64",
        "Partitions of the channels in cluster mode, the same on all instances: 64 spread evenly over 3 or 4 nodes.",
    ),
    variable(
        "HUBCAST_REDIS_CHANNEL_PREFIX",
        "hub:",
        "Goes before every channel name at Redis, so that other users of it do not collide.",
    ),
    variable(
        "HUBCAST_REDIS_KEY_PREFIX",
        "ws:",
        "Goes before every key at Redis: the registry of instances and connections.",
    ),
    variable("HUBCAST_WORKER_THREADS", "", "Worker threads. Default: one per core that the process may use."),
    variable(
        "HUBCAST_CONNECTIONS_MAX",
        "",
        "Most WebSocket connections. Default, and the most possible: the file limit less 200 for everything else.",
    ),
    variable(
        "HUBCAST_HANDSHAKES_PER_SECOND",
        "",
        "Connections let in a second, twice as many at once; the others get 503 and their turn in Retry-After. Default for each worker thread: 10000, with TLS 1200, a third of what a core can do. 0: no limit.",
    ),
    variable(
        "HUBCAST_HANDSHAKES_PENDING_MAX",
        "4096",
        "Connections that are not upgraded yet; more get 503. As many as the kernel keeps for us.",
    ),
    variable(
        "HUBCAST_HANDSHAKES_PER_ADDRESS",
        "0",
        "The same a second for one address (of IPv6: one /64); more get 429. Off: behind a proxy all have one address.",
    ),
    variable(
        "HUBCAST_HANDSHAKES_PER_USER",
        "0",
        "Connections of one user a second, twice as many at once; more get 429. Off: reconnecting is what pages do when a network comes back; 1 to 5 stops a page that loops.",
    ),
    variable(
        "HUBCAST_CONNECTIONS_PER_ADDRESS",
        "0",
        "Connections of one address; more get 429. Off, as above; 100 leaves room for an office behind one.",
    ),
    variable(
        "HUBCAST_CONNECTIONS_PER_USER",
        "0",
        "Connections of one user on this instance; more get 429. Off: how many pages and devices one has is yours to say.",
    ),
    variable(
        "HUBCAST_PING_INTERVAL",
        "54s",
        "Ping interval: below the 60 s after which common proxies cut idle connections.",
    ),
    variable(
        "HUBCAST_PONG_TIMEOUT",
        "10s",
        "How long nothing at all may arrive after a ping. Mobile radios take seconds to wake.",
    ),
    variable("HUBCAST_WRITE_TIMEOUT", "10s", "Oldest age of an unsent frame once the socket refuses bytes; then 4101."),
    variable("HUBCAST_HANDSHAKE_TIMEOUT", "10s", "For request heads, bodies and the upgrade. Slower ones are attacks."),
    variable("HUBCAST_PUBLISH_TIMEOUT", "2s", "How long Redis may take to confirm a publish before the answer is 504."),
    variable(
        "HUBCAST_OUTBOX_MESSAGES",
        "1024",
        "Frames that wait for one connection: one vectored write takes that many.",
    ),
    variable("HUBCAST_OUTBOX_BYTES", "1MiB", "Bytes that wait for one connection: seconds of a slow mobile link."),
    variable("HUBCAST_MESSAGE_BYTES_MAX", "64KiB", "Largest message from a client: commands are small."),
    variable("HUBCAST_PUBLISH_BYTES_MAX", "1MiB", "Largest payload of a publication, from anywhere."),
    variable("HUBCAST_SUBSCRIPTIONS_MAX", "128", "Subscriptions of one connection: a page needs a few dozen."),
    variable(
        "HUBCAST_COMMANDS_PER_SECOND",
        "10000",
        "Commands of one connection, but publishes; twice as many at once. Tokens, recoveries and history count as 50. More are answered rate_limited; who goes on is closed with 1008. Far above what a page needs, far below what a core can do. 0: no limit.",
    ),
    variable(
        "HUBCAST_PUBLISHES_PER_SECOND",
        "0",
        "The same for publishes. Off: a publisher that is faster than its subscribers waits for them anyway; set it where strangers may publish.",
    ),
    variable(
        "HUBCAST_BYTES_PER_SECOND",
        "0",
        "What is read of one connection, such as 256KiB; the rest waits in its socket. Off: as above.",
    ),
    variable(
        "HUBCAST_PINGS_PER_SECOND",
        "50",
        "WebSocket pings and pongs of one connection, 20 seconds' worth at once; more end it with 1008. Clients send one in 20 s or so.",
    ),
    variable(
        "HUBCAST_BAD_REQUESTS_PER_MINUTE",
        "10000",
        "Commands that nobody can understand, of one connection; more end it with 1008. A client with a fault lives, a flood does not.",
    ),
    variable(
        "HUBCAST_RATES_PER_USER",
        "10",
        "All connections of one user together may send so many times the commands, publishes and bytes of one. More are refused; nobody is closed for it, and coming back does not help. Needs HUBCAST_AUTH=jwt. 10: a person with ten busy pages. 0: no limit, as below.",
    ),
    variable(
        "HUBCAST_RATES_PER_ADDRESS",
        "0",
        "The same for all connections of one address (of IPv6: one /64). Off: behind a proxy all have one address, and a mobile network has thousands of people behind one; on an open network 20 to 100.",
    ),
    variable(
        "HUBCAST_RATES_PER_INSTANCE",
        "0",
        "The same for all connections of this instance. Off: they take turns as it is.",
    ),
    variable(
        "HUBCAST_SUBSCRIPTIONS_PER_USER",
        "0",
        "Subscriptions of all connections of one user; more are refused with limit_exceeded. Off: how many pages one has is yours to say.",
    ),
    variable("HUBCAST_SUBSCRIPTIONS_PER_ADDRESS", "0", "The same for one address. Off, as its rates are."),
    variable(
        "HUBCAST_SUBSCRIPTIONS_PER_INSTANCE",
        "0",
        "The same for this instance: 150 bytes each. Off: connections and channels are limited already.",
    ),
    variable(
        "HUBCAST_MEMORY_PER_USER",
        "0",
        "What may arrive in parts of messages of all connections of one user, and what may wait in the outboxes of those that are slow, such as 4MiB. Above it the one that adds to it, or is slow for longest, is closed with 1013. Off: each connection has its bounds.",
    ),
    variable("HUBCAST_MEMORY_PER_ADDRESS", "0", "The same for one address. Off, as its rates are."),
    variable(
        "HUBCAST_CHANNELS_MAX",
        "",
        "Channels with a subscriber here, 1 KiB each. More are refused with limit_exceeded. Default: what fits into a quarter of the container's or machine's memory, at most 1000000. 0: no limit.",
    ),
    variable(
        "HUBCAST_MEMORY_MAX",
        "",
        "What frames that wait and messages that arrive may take. From 3/4 on, connections and publishes get 503, then the clients that are slow for longest are closed with 1013. Default: half of what the container or machine has.",
    ),
    variable(
        "HUBCAST_HISTORY_MEMORY_MAX",
        "",
        "Without Redis, what the histories of all channels may take. The oldest events go first then, earlier than their rule says; whoever asks for them is told. Default: an eighth of what the container or machine has.",
    ),
    variable(
        "HUBCAST_DRAIN_TIME",
        "20s",
        "Closes are spread over this on SIGTERM: below the 30 s that Kubernetes waits.",
    ),
    variable(
        "HUBCAST_CHANNEL_RULES",
        "",
        "JSON list of rules, first match wins: {\"match\":\"chat:*\",\"access\":\"public\",\"client_publish\":true,\"presence\":true,\"history\":{\"size\":100,\"ttl\":\"10m\"},\"cache\":true,\"slow\":\"drop_oldest\",\"coalesce\":\"5ms\"}. Without any, clients may publish everywhere.",
    ),
    variable(
        "HUBCAST_COALESCE",
        "0s",
        "How long publications wait, up to 100ms, to leave in one write; a rule's \"coalesce\" goes before it. Off: latency is the promise.",
    ),
    variable("HUBCAST_LOG", "info", "Log filter: a level, or directives such as hubcast=debug."),
    variable("HUBCAST_LOG_FORMAT", "text", "text or json."),
];
