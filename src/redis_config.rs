//! How Redis is named in the configuration: modes, URLs and prefixes.

/// What `HUBCAST_REDIS_URL` names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RedisMode {
    /// One server, or several independent ones that share the channels.
    Standalone,
    /// Sentinels that know the primary.
    Sentinel,
    /// Some nodes of a Redis Cluster.
    Cluster,
}

impl RedisMode {
    /// As it is written.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Standalone => "standalone",
            Self::Sentinel => "sentinel",
            Self::Cluster => "cluster",
        }
    }
}

pub(crate) const REDIS_URL_ALLOWED: &str = "a comma list of redis:// or rediss://[user:password@]host:port[/db]";

/// Reads the list.
pub(crate) fn redis_urls(text: &str) -> Option<Vec<String>> {
    let is_url = |url: &String| {
        (url.starts_with("redis://") || url.starts_with("rediss://")) && redis::parse_redis_url(url).is_some()
    };
    let urls = text.split(',').map(str::trim).filter(|url| !url.is_empty()).map(str::to_owned).collect::<Vec<_>>();
    urls.iter().all(is_url).then_some(urls)
}

/// Reads the mode.
pub(crate) fn redis_mode(text: &str) -> Option<RedisMode> {
    [RedisMode::Standalone, RedisMode::Sentinel, RedisMode::Cluster].into_iter().find(|mode| mode.as_str() == text)
}

pub(crate) const PREFIX_ALLOWED: &str = "text without { and }, which would move the hash slot";

/// Reads a prefix.
pub(crate) fn redis_prefix(text: &str) -> Option<String> {
    (!text.contains(['{', '}'])).then(|| text.to_owned())
}

/// The list without its secrets.
pub(crate) fn masked_urls(urls: &[String]) -> String {
    urls.iter().map(|url| masked_url(url)).collect::<Vec<_>>().join(",")
}

/// Everything between the scheme and the `@` may be secret.
pub(crate) fn masked_url(url: &str) -> String {
    match (url.split_once("://"), url.rsplit_once('@')) {
        (Some((scheme, _)), Some((_, host))) => format!("{scheme}://***@{host}"),
        _ => url.to_owned(),
    }
}

/// Whether a URL names a database.
pub(crate) fn has_database(url: &str) -> bool {
    redis::parse_redis_url(url).is_some_and(|url| url.path().len() > 1)
}
