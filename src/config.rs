//! Configuration: what the `HUBCAST_` variables say, or their defaults (`variables`).
//!
//! Pure: [`Config::from_env`] takes the variables as a list, and `main` alone passes it the real
//! ones. A bad value or an unknown name stops the start with one line that says what is allowed.
//!
//! Memory of a connection at the defaults: about 1 KiB idle; at most the outbox bound of 1 MiB plus one
//! publication more while its socket refuses bytes, and that for at most 10 s; plus a message that
//! is arriving, at most 64 KiB. The kernel keeps up to 128 KiB of unsent bytes beside it.

use std::collections::HashMap;
use std::fmt;
use std::net::SocketAddr;
use std::time::Duration;

use bytesize::ByteSize;

use crate::api_keys::KeyList;
use crate::auth_config::AuthConfig;
use crate::edge_config::EdgeConfig;
use crate::limits_config::{LimitsConfig, machine_bytes};
use crate::outbox;
use crate::redis_config::{
    PREFIX_ALLOWED, REDIS_URL_ALLOWED, RedisMode, has_database, masked_url, masked_urls, redis_mode, redis_prefix,
    redis_urls,
};
use crate::rules::{COALESCE_ALLOWED, ChannelRules, parse_coalesce};
use crate::variables::VARIABLES;

/// Names that Kubernetes injects for a Service called `hubcast`, with `HUBCAST_` cut off.
const KUBERNETES: [&str; 3] = ["SERVICE_", "PORT_", "PORT"];

const HISTORY_MEMORY_ALLOWED: &str = "a size of at least 1MiB such as 256MiB or 4GiB";

/// Descriptors kept for everything that is not a WebSocket connection: the internal listener's
/// connections, refusals in progress, Redis, the runtime.
pub const RESERVED_FILES: usize = 200;

/// The effective configuration.
#[derive(Clone, Debug)]
pub struct Config {
    /// `HUBCAST_LISTEN`
    pub listen: SocketAddr,
    /// `HUBCAST_INTERNAL_LISTEN`
    pub internal_listen: SocketAddr,
    /// `HUBCAST_ORIGINS`, proxies and TLS
    pub edge: EdgeConfig,
    /// `HUBCAST_AUTH`, and how tokens are verified
    pub auth: AuthConfig,
    /// `HUBCAST_INSECURE_INTERNAL`
    pub insecure_internal: bool,
    /// `HUBCAST_API_KEYS`
    pub api_keys: KeyList,
    /// `HUBCAST_REDIS_URL`; none without Redis.
    pub redis_urls: Vec<String>,
    /// `HUBCAST_REDIS_MODE`
    pub redis_mode: RedisMode,
    /// `HUBCAST_REDIS_SENTINEL_MASTER`
    pub redis_sentinel_master: String,
    /// `HUBCAST_REDIS_PARTITIONS`
    pub redis_partitions: usize,
    /// `HUBCAST_REDIS_CHANNEL_PREFIX`
    pub redis_channel_prefix: String,
    /// `HUBCAST_REDIS_KEY_PREFIX`
    pub redis_key_prefix: String,
    /// How long the registry keeps an instance that does not renew its lease; not a variable, for tests.
    pub registry_lease: Duration,
    /// Who comes back to a channel within this time was never away; not a variable, for tests.
    pub presence_debounce: Duration,
    /// A channel with history of which nothing is heard for so long has its position checked; not a variable.
    pub history_check_interval: Duration,
    /// How often a probe goes through Redis; not a variable, for tests.
    pub redis_probe_interval: Duration,
    /// `HUBCAST_WORKER_THREADS`
    pub worker_threads: usize,
    /// `HUBCAST_CONNECTIONS_MAX`; `None`: what the file limit allows.
    pub connections_max: Option<usize>,
    /// `HUBCAST_PING_INTERVAL`
    pub ping_interval: Duration,
    /// `HUBCAST_PONG_TIMEOUT`
    pub pong_timeout: Duration,
    /// `HUBCAST_WRITE_TIMEOUT`
    pub write_timeout: Duration,
    /// `HUBCAST_HANDSHAKE_TIMEOUT`
    pub handshake_timeout: Duration,
    /// `HUBCAST_PUBLISH_TIMEOUT`
    pub publish_timeout: Duration,
    /// `HUBCAST_OUTBOX_MESSAGES` and `HUBCAST_OUTBOX_BYTES`
    pub outbox: outbox::Limits,
    /// `HUBCAST_MESSAGE_BYTES_MAX`
    pub message_bytes_max: usize,
    /// `HUBCAST_PUBLISH_BYTES_MAX`
    pub publish_bytes_max: usize,
    /// `HUBCAST_SUBSCRIPTIONS_MAX`
    pub subscriptions_max: usize,
    /// How much is allowed in time, and over many connections.
    pub limits: LimitsConfig,
    /// `HUBCAST_HISTORY_MEMORY_MAX`
    pub history_memory_max: usize,
    /// `HUBCAST_DRAIN_TIME`
    pub drain_time: Duration,
    /// `HUBCAST_CHANNEL_RULES` and `HUBCAST_COALESCE`
    pub channel_rules: ChannelRules,
    /// `HUBCAST_LOG`
    pub log: String,
    /// `HUBCAST_LOG_FORMAT` is `json`.
    pub log_json: bool,
    /// `--echo`
    pub echo: bool,
    /// Lines to log at start: what was ignored, and why.
    pub notes: Vec<String>,
}

/// What is wrong with a variable, in one line.
#[derive(Debug)]
pub struct ConfigError(String);

impl ConfigError {
    pub(crate) fn new(line: &str) -> Self {
        Self(line.to_owned())
    }
}

impl fmt::Display for ConfigError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.0)
    }
}

impl std::error::Error for ConfigError {}

impl Config {
    /// Reads the variables among `env` that start with `HUBCAST_`.
    ///
    /// # Errors
    /// The first variable that is unknown or has a bad value.
    pub fn from_env(env: impl IntoIterator<Item = (String, String)>) -> Result<Self, ConfigError> {
        let values = Values::collect(env)?;
        let worker_threads = values.get("HUBCAST_WORKER_THREADS", "a number from 1 to 1024", |text| match text {
            "" => Some(std::thread::available_parallelism().map_or(1, usize::from)),
            text => whole(text, 1, 1024),
        })?;
        let config = Self {
            listen: values.get("HUBCAST_LISTEN", "an address and port such as 0.0.0.0:8080", address)?,
            internal_listen: values.get(
                "HUBCAST_INTERNAL_LISTEN",
                "an address and port such as 127.0.0.1:8081",
                address,
            )?,
            edge: EdgeConfig::parse(&values)?,
            auth: AuthConfig::parse(&values)?,
            insecure_internal: values.get("HUBCAST_INSECURE_INTERNAL", "true or false", |text| text.parse().ok())?,
            api_keys: KeyList::parse(&values.text("HUBCAST_API_KEYS")),
            redis_urls: values.get("HUBCAST_REDIS_URL", REDIS_URL_ALLOWED, redis_urls)?,
            redis_mode: values.get("HUBCAST_REDIS_MODE", "standalone, sentinel or cluster", redis_mode)?,
            redis_sentinel_master: values.text("HUBCAST_REDIS_SENTINEL_MASTER"),
            redis_partitions: values
                .get("HUBCAST_REDIS_PARTITIONS", "a number from 1 to 16384", |text| whole(text, 1, 16_384))?,
            redis_channel_prefix: values.get("HUBCAST_REDIS_CHANNEL_PREFIX", PREFIX_ALLOWED, redis_prefix)?,
            redis_key_prefix: values.get("HUBCAST_REDIS_KEY_PREFIX", PREFIX_ALLOWED, redis_prefix)?,
            registry_lease: Duration::from_secs(30),
            presence_debounce: Duration::from_secs(5),
            history_check_interval: Duration::from_secs(25),
            redis_probe_interval: Duration::from_secs(5),
            worker_threads,
            connections_max: values.get("HUBCAST_CONNECTIONS_MAX", "a number from 1", |text| match text {
                "" => Some(None),
                text => whole(text, 1, usize::MAX).map(Some),
            })?,
            ping_interval: values.duration("HUBCAST_PING_INTERVAL")?,
            pong_timeout: values.duration("HUBCAST_PONG_TIMEOUT")?,
            write_timeout: values.duration("HUBCAST_WRITE_TIMEOUT")?,
            handshake_timeout: values.duration("HUBCAST_HANDSHAKE_TIMEOUT")?,
            publish_timeout: values.duration("HUBCAST_PUBLISH_TIMEOUT")?,
            outbox: outbox::Limits {
                messages: values.number("HUBCAST_OUTBOX_MESSAGES")?,
                bytes: values.size("HUBCAST_OUTBOX_BYTES")?,
            },
            message_bytes_max: values.size("HUBCAST_MESSAGE_BYTES_MAX")?,
            publish_bytes_max: values.size("HUBCAST_PUBLISH_BYTES_MAX")?,
            subscriptions_max: values.number("HUBCAST_SUBSCRIPTIONS_MAX")?,
            limits: LimitsConfig::parse(&values, worker_threads)?,
            history_memory_max: values.get("HUBCAST_HISTORY_MEMORY_MAX", HISTORY_MEMORY_ALLOWED, history_memory_max)?,
            drain_time: values.duration("HUBCAST_DRAIN_TIME")?,
            channel_rules: values.channel_rules()?,
            log: values.get("HUBCAST_LOG", "a level (error, warn, info, debug, trace) or directives", log_filter)?,
            log_json: values.get("HUBCAST_LOG_FORMAT", "text or json", log_format)?,
            echo: false,
            notes: values.notes.clone(),
        };
        config.check_internal()?;
        config.check_public()?;
        config.check_redis()?;
        Ok(config)
    }

    /// Reads the process's own variables; what is not UTF-8 in them is replaced, so it does not go unnoticed.
    ///
    /// # Errors
    /// As [`Config::from_env`].
    pub fn from_process_env() -> Result<Self, ConfigError> {
        let env = std::env::vars_os();
        let text = |part: std::ffi::OsString| part.to_string_lossy().into_owned();
        Self::from_env(env.map(|(name, value)| (text(name), text(value))))
    }

    /// An API that anybody on the network can use must be said explicitly.
    fn check_internal(&self) -> Result<(), ConfigError> {
        if self.is_internal_open_to_anybody() && !self.insecure_internal {
            return Err(ConfigError(format!(
                "HUBCAST_INTERNAL_LISTEN={}: off loopback, allowed only with HUBCAST_API_KEYS or HUBCAST_INSECURE_INTERNAL=true",
                self.internal_listen
            )));
        }
        Ok(())
    }

    /// That anybody on the network may connect must be said explicitly, and rules may not promise what nobody checks.
    fn check_public(&self) -> Result<(), ConfigError> {
        if self.is_open_to_anybody() && !self.auth.is_explicit {
            return Err(ConfigError(format!(
                "HUBCAST_LISTEN={}: off loopback, allowed only with HUBCAST_AUTH=jwt, or HUBCAST_AUTH=none if anybody may connect",
                self.listen
            )));
        }
        match self.channel_rules.needs_authentication() {
            Some(pattern) if self.auth.jwt.is_none() => Err(ConfigError(format!(
                "HUBCAST_CHANNEL_RULES={}: the rule of {pattern} is allowed only with HUBCAST_AUTH=jwt",
                self.channel_rules
            ))),
            _ => Ok(()),
        }
    }

    /// Whether the public listener lets anybody on the network in.
    pub fn is_open_to_anybody(&self) -> bool {
        !self.listen.ip().is_loopback() && self.auth.jwt.is_none()
    }

    /// Whether the internal listener does.
    pub fn is_internal_open_to_anybody(&self) -> bool {
        !self.internal_listen.ip().is_loopback() && self.api_keys.is_empty()
    }

    /// What the mode needs of the URLs.
    fn check_redis(&self) -> Result<(), ConfigError> {
        let (mode, urls) = (self.redis_mode, &self.redis_urls);
        if urls.is_empty() && mode != RedisMode::Standalone {
            let mode = mode.as_str();
            return Err(ConfigError(format!("HUBCAST_REDIS_MODE={mode}: allowed only with HUBCAST_REDIS_URL")));
        }
        if mode == RedisMode::Cluster && urls.iter().any(|url| has_database(url)) {
            let shown = masked_urls(urls);
            return Err(ConfigError(format!(
                "HUBCAST_REDIS_URL={shown}: a cluster has no databases, allowed is no /db"
            )));
        }
        Ok(())
    }

    /// The effective value of each variable, one a line, secrets masked.
    pub fn print(&self, connections_max: usize) -> String {
        let time = |duration: Duration| humantime::format_duration(duration).to_string().replace(' ', "");
        let lines: Vec<String> = VARIABLES
            .iter()
            .map(|variable| {
                let value = match variable.name {
                    "HUBCAST_LISTEN" => self.listen.to_string(),
                    "HUBCAST_INTERNAL_LISTEN" => self.internal_listen.to_string(),
                    "HUBCAST_INSECURE_INTERNAL" => self.insecure_internal.to_string(),
                    "HUBCAST_API_KEYS" => self.api_keys.masked(),
                    "HUBCAST_REDIS_URL" => masked_urls(&self.redis_urls),
                    "HUBCAST_REDIS_MODE" => self.redis_mode.as_str().to_owned(),
                    "HUBCAST_REDIS_SENTINEL_MASTER" => self.redis_sentinel_master.clone(),
                    "HUBCAST_REDIS_PARTITIONS" => self.redis_partitions.to_string(),
                    "HUBCAST_REDIS_CHANNEL_PREFIX" => self.redis_channel_prefix.clone(),
                    "HUBCAST_REDIS_KEY_PREFIX" => self.redis_key_prefix.clone(),
                    "HUBCAST_WORKER_THREADS" => self.worker_threads.to_string(),
                    "HUBCAST_CONNECTIONS_MAX" => connections_max.to_string(),
                    "HUBCAST_PING_INTERVAL" => time(self.ping_interval),
                    "HUBCAST_PONG_TIMEOUT" => time(self.pong_timeout),
                    "HUBCAST_WRITE_TIMEOUT" => time(self.write_timeout),
                    "HUBCAST_HANDSHAKE_TIMEOUT" => time(self.handshake_timeout),
                    "HUBCAST_PUBLISH_TIMEOUT" => time(self.publish_timeout),
                    "HUBCAST_OUTBOX_MESSAGES" => self.outbox.messages.to_string(),
                    "HUBCAST_OUTBOX_BYTES" => size(self.outbox.bytes),
                    "HUBCAST_MESSAGE_BYTES_MAX" => size(self.message_bytes_max),
                    "HUBCAST_PUBLISH_BYTES_MAX" => size(self.publish_bytes_max),
                    "HUBCAST_SUBSCRIPTIONS_MAX" => self.subscriptions_max.to_string(),
                    "HUBCAST_HISTORY_MEMORY_MAX" => size(self.history_memory_max),
                    "HUBCAST_DRAIN_TIME" => time(self.drain_time),
                    "HUBCAST_CHANNEL_RULES" => self.channel_rules.to_string(),
                    "HUBCAST_COALESCE" => time(self.channel_rules.coalesce_default()),
                    "HUBCAST_LOG" => self.log.clone(),
                    "HUBCAST_LOG_FORMAT" => if self.log_json { "json" } else { "text" }.to_owned(),
                    other => {
                        let parts = [self.edge.print(other), self.limits.print(other), self.auth.print(other)];
                        parts.into_iter().flatten().next().unwrap_or_default()
                    }
                };
                format!("{}={value}\n", variable.name)
            })
            .collect();
        lines.concat()
    }
}

/// The given variables over the defaults.
pub(crate) struct Values {
    given: HashMap<String, String>,
    notes: Vec<String>,
}

impl Values {
    fn collect(env: impl IntoIterator<Item = (String, String)>) -> Result<Self, ConfigError> {
        let mut values = Self { given: HashMap::new(), notes: Vec::new() };
        let mut ignored = Vec::new();
        for (name, value) in env {
            if VARIABLES.iter().any(|variable| variable.name == name) {
                values.given.insert(name, value);
            } else if is_from_kubernetes(&name) {
                ignored.push(name);
            } else if name.starts_with("HUBCAST_") {
                return Err(unknown(&name));
            }
        }
        if !ignored.is_empty() {
            ignored.sort_unstable();
            values.notes.push(format!("ignored, as injected by Kubernetes for a Service: {}", ignored.join(" ")));
        }
        Ok(values)
    }

    pub(crate) fn text(&self, name: &str) -> String {
        let default = VARIABLES.iter().find(|variable| variable.name == name).map_or("", |variable| variable.default);
        self.given.get(name).map_or(default, String::as_str).trim().to_owned()
    }

    pub(crate) fn get<T>(
        &self,
        name: &str,
        allowed: &str,
        parse: impl Fn(&str) -> Option<T>,
    ) -> Result<T, ConfigError> {
        let text = self.text(name);
        parse(&text).ok_or_else(|| {
            let shown = match name {
                "HUBCAST_REDIS_URL" => masked_url(&text),
                "HUBCAST_JWT_SECRET" => "***".to_owned(),
                _ => text.clone(),
            };
            ConfigError(format!("{name}={shown}: allowed is {allowed}"))
        })
    }

    /// Whether somebody wrote it.
    pub(crate) fn is_given(&self, name: &str) -> bool {
        self.given.contains_key(name)
    }

    fn duration(&self, name: &str) -> Result<Duration, ConfigError> {
        let allowed = "a duration from 1ms to 1day such as 500ms, 10s or 2m";
        let range = Duration::from_millis(1)..=Duration::from_secs(86_400);
        self.get(name, allowed, |text| humantime::parse_duration(text).ok().filter(|duration| range.contains(duration)))
    }

    fn size(&self, name: &str) -> Result<usize, ConfigError> {
        let parse = |text: &str| text.parse::<ByteSize>().ok().map(|size| size.0 as usize);
        let allowed = "a size from 1 byte to 1GiB such as 64KiB or 1MiB";
        self.get(name, allowed, |text| parse(text).filter(|bytes| (1..=1 << 30).contains(bytes)))
    }

    pub(crate) fn number(&self, name: &str) -> Result<usize, ConfigError> {
        self.get(name, "a number from 1 to 1000000", |text| whole(text, 1, 1_000_000))
    }

    fn channel_rules(&self) -> Result<ChannelRules, ConfigError> {
        let text = self.text("HUBCAST_CHANNEL_RULES");
        let rules = ChannelRules::parse(&text).map_err(|error| {
            let allowed = r#"a list such as [{"match":"chat:*","client_publish":true,"slow":"close"}]"#;
            ConfigError(format!("HUBCAST_CHANNEL_RULES={text}: {error}; allowed is {allowed}"))
        })?;
        Ok(rules.with_coalesce(self.get("HUBCAST_COALESCE", COALESCE_ALLOWED, parse_coalesce)?))
    }
}

/// `HUBCAST_SERVICE_*`, `HUBCAST_PORT`, `HUBCAST_PORT_*`, also with a suffix of the Service's name before them.
fn is_from_kubernetes(name: &str) -> bool {
    let Some(rest) = name.strip_prefix("HUBCAST_") else { return false };
    rest == "PORT"
        || KUBERNETES[..2].iter().any(|injected| rest.starts_with(injected) || rest.contains(&format!("_{injected}")))
        || rest.ends_with(&format!("_{}", KUBERNETES[2]))
}

fn unknown(name: &str) -> ConfigError {
    let nearest = VARIABLES
        .iter()
        .max_by(|a, b| strsim::jaro_winkler(name, a.name).total_cmp(&strsim::jaro_winkler(name, b.name)));
    ConfigError(format!("{name}: unknown, did you mean {}?", nearest.map_or("", |variable| variable.name)))
}

/// The size in the largest unit that gives a whole number.
pub(crate) fn size(bytes: usize) -> String {
    let units = [(30, "GiB"), (20, "MiB"), (10, "KiB")];
    let unit = units.into_iter().find(|(shift, _)| bytes > 0 && bytes.is_multiple_of(1 << shift));
    unit.map_or_else(|| format!("{bytes}B"), |(shift, unit)| format!("{}{unit}", bytes >> shift))
}

fn history_memory_max(text: &str) -> Option<usize> {
    if text.is_empty() {
        return Some(machine_bytes() / 8);
    }
    let bytes = text.parse::<ByteSize>().ok()?.0;
    (bytes >= 1 << 20).then_some(bytes as usize)
}

fn address(text: &str) -> Option<SocketAddr> {
    text.parse().ok()
}

fn whole(text: &str, least: usize, most: usize) -> Option<usize> {
    text.parse().ok().filter(|number| (least..=most).contains(number))
}

fn log_filter(text: &str) -> Option<String> {
    text.parse::<tracing_subscriber::EnvFilter>().is_ok().then(|| text.to_owned())
}

fn log_format(text: &str) -> Option<bool> {
    match text {
        "text" => Some(false),
        "json" => Some(true),
        _ => None,
    }
}
