//! Channel rules: what holds for a channel, by its name (`HUBCAST_CHANNEL_RULES`).

use std::time::Duration;

use serde::{Deserialize, Deserializer, de::Error as _};

use crate::history_store::Retention;
use crate::pattern::Pattern;
use crate::slow_policy::{Pointer, SlowPolicy};

/// The rules in order; the first match wins.
#[derive(Clone, Debug, Default)]
pub struct ChannelRules {
    rules: Vec<ChannelRule>,
    /// As it was given.
    json: String,
    /// For channels whose rule does not say (`HUBCAST_COALESCE`).
    coalesce: Duration,
}

impl std::fmt::Display for ChannelRules {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(&self.json)
    }
}

/// One rule.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct ChannelRule {
    #[serde(rename = "match", deserialize_with = "pattern")]
    pattern: Pattern,
    #[serde(default)]
    access: Option<AccessRule>,
    #[serde(default)]
    client_publish: bool,
    #[serde(default)]
    presence: bool,
    #[serde(default)]
    history: Option<HistoryRule>,
    #[serde(default)]
    cache: bool,
    #[serde(default)]
    slow: SlowRule,
    #[serde(default, deserialize_with = "latest_by")]
    latest_by: Option<Pointer>,
    #[serde(default, deserialize_with = "coalesce")]
    coalesce: Option<Duration>,
}

/// What a rule says of who may come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
enum AccessRule {
    /// Everybody who is authenticated.
    Public,
    /// Whoever has a token that grants it.
    Token,
}

/// Who may subscribe to a channel, as far as its rule says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Audience<'a> {
    /// Everybody.
    Public,
    /// This user, and whoever has a token that grants it.
    User(&'a str),
    /// Whoever has a token that grants it.
    Token,
}

/// What a rule says of history.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct HistoryRule {
    size: usize,
    #[serde(deserialize_with = "ttl")]
    ttl: Duration,
}

/// Most entries of a history: what a read may have to bring from Redis at once.
const HISTORY_SIZE_MAX: usize = 10_000;

/// How old entries can get: from a second, below which clocks matter, to a month.
const HISTORY_TTL_MIN: Duration = Duration::from_secs(1);
const HISTORY_TTL_MAX: Duration = Duration::from_secs(31 * 24 * 60 * 60);

/// Of a channel whose rule has `cache` and no history: only its last event counts.
const CACHE: HistoryRule = HistoryRule { size: 1, ttl: Duration::from_secs(24 * 60 * 60) };

/// What a rule says of slow consumers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
enum SlowRule {
    #[default]
    Close,
    DropOldest,
    Latest,
}

/// The longest window that makes sense: beyond it people notice, and one who waits has better means.
pub const COALESCE_MAX: Duration = Duration::from_millis(100);

/// Reads a window, if it is allowed.
pub fn parse_coalesce(text: &str) -> Option<Duration> {
    humantime::parse_duration(text).ok().filter(|window| *window <= COALESCE_MAX)
}

/// What a window may be, for a person.
pub const COALESCE_ALLOWED: &str = "a duration from 0ms to 100ms such as 5ms";

fn pattern<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Pattern, D::Error> {
    Pattern::parse(&String::deserialize(deserializer)?).map_err(D::Error::custom)
}

fn coalesce<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Duration>, D::Error> {
    let text = String::deserialize(deserializer)?;
    match parse_coalesce(&text) {
        Some(window) => Ok(Some(window)),
        None => Err(D::Error::custom(format!("coalesce {text:?} is not {COALESCE_ALLOWED}"))),
    }
}

fn latest_by<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Pointer>, D::Error> {
    let text = String::deserialize(deserializer)?;
    match Pointer::parse(&text) {
        Some(pointer) => Ok(Some(pointer)),
        None => Err(D::Error::custom(format!("latest_by {text:?} is not a JSON pointer such as /symbol"))),
    }
}

fn ttl<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    let text = String::deserialize(deserializer)?;
    match humantime::parse_duration(&text) {
        Ok(ttl) if (HISTORY_TTL_MIN..=HISTORY_TTL_MAX).contains(&ttl) => Ok(ttl),
        _ => Err(D::Error::custom(format!("ttl {text:?} is not a duration from 1s to 31d such as 10m"))),
    }
}

impl ChannelRules {
    /// Reads the JSON list.
    ///
    /// # Errors
    /// What is wrong with it, for a person.
    pub fn parse(json: &str) -> Result<Self, String> {
        if json.is_empty() {
            return Ok(Self::default());
        }
        let rules: Vec<ChannelRule> = serde_json::from_str(json).map_err(|error| error.to_string())?;
        for rule in &rules {
            rule.check().map_err(|error| format!("{error}, in the rule of {}", rule.pattern))?;
        }
        Ok(Self { rules, json: json.to_owned(), coalesce: Duration::ZERO })
    }

    /// Sets what holds for channels whose rule names no window.
    #[must_use]
    pub fn with_coalesce(mut self, window: Duration) -> Self {
        self.coalesce = window;
        self
    }

    /// Whether any channel coalesces.
    pub fn coalesces(&self) -> bool {
        let has_window = |rule: &ChannelRule| rule.coalesce.is_some_and(|window| !window.is_zero());
        !self.coalesce.is_zero() || self.rules.iter().any(has_window)
    }

    /// The window of channels whose rule names none.
    pub fn coalesce_default(&self) -> Duration {
        self.coalesce
    }

    /// How long publications of the channel wait for others to share a write; zero: not at all.
    pub fn coalesce(&self, channel: &str) -> Duration {
        self.rule(channel).and_then(|rule| rule.coalesce).unwrap_or(self.coalesce)
    }

    /// Whether the channel has presence: who is here is known, and joins and leaves are told.
    pub fn presence(&self, channel: &str) -> bool {
        self.rule(channel).is_some_and(|rule| rule.presence)
    }

    /// How much of the channel's past is kept, if it has history.
    pub fn history(&self, channel: &str) -> Option<Retention> {
        let rule = self.rule(channel)?;
        let history = rule.history.or_else(|| rule.cache.then_some(CACHE))?;
        Some(Retention::new(history.size, history.ttl))
    }

    /// Whether any channel has history.
    pub fn any_history(&self) -> bool {
        self.rules.iter().any(|rule| rule.history.is_some() || rule.cache)
    }

    /// Whether a subscriber is sent the channel's last event first.
    pub fn cache(&self, channel: &str) -> bool {
        self.rule(channel).is_some_and(|rule| rule.cache)
    }

    /// What slow consumers of the channel lose.
    pub fn slow(&self, channel: &str) -> SlowPolicy {
        let rule = self.rule(channel);
        rule.map_or(SlowPolicy::Close, |rule| match rule.slow {
            SlowRule::Close => SlowPolicy::Close,
            SlowRule::DropOldest => SlowPolicy::DropOldest,
            SlowRule::Latest => SlowPolicy::Latest(rule.latest_by.clone()),
        })
    }

    /// Whether any channel has presence.
    pub fn any_presence(&self) -> bool {
        self.rules.iter().any(|rule| rule.presence)
    }

    /// Whether clients may publish to the channel: as its rule says; without any rules, yes.
    pub fn client_publish(&self, channel: &str) -> bool {
        self.rule(channel).map_or(self.rules.is_empty(), |rule| rule.client_publish)
    }

    /// Who may subscribe to the channel; without a rule, whoever has a token that grants it.
    pub fn audience<'a>(&self, channel: &'a str) -> Audience<'a> {
        let Some(rule) = self.rule(channel) else { return Audience::Token };
        match (rule.access, rule.pattern.owner(channel)) {
            (Some(AccessRule::Public), _) => Audience::Public,
            (_, Some(user)) => Audience::User(user),
            (Some(AccessRule::Token) | None, None) => Audience::Token,
        }
    }

    /// The first rule that means nothing unless it is known who somebody is.
    pub fn needs_authentication(&self) -> Option<&Pattern> {
        let needs = |rule: &&ChannelRule| rule.pattern.is_private() || rule.access == Some(AccessRule::Token);
        self.rules.iter().find(needs).map(|rule| &rule.pattern)
    }

    /// The rule that holds for the channel, as it was written, and its place in the list.
    pub fn explain(&self, channel: &str) -> Option<(usize, &Pattern)> {
        let place = self.rules.iter().position(|rule| rule.pattern.matches(channel))?;
        Some((place + 1, &self.rules[place].pattern))
    }

    fn rule(&self, channel: &str) -> Option<&ChannelRule> {
        self.rules.iter().find(|rule| rule.pattern.matches(channel))
    }
}

impl ChannelRule {
    /// What the JSON alone does not rule out.
    fn check(&self) -> Result<(), String> {
        if self.history.is_some_and(|history| !(1..=HISTORY_SIZE_MAX).contains(&history.size)) {
            return Err(format!("the history has a size that is not 1 to {HISTORY_SIZE_MAX}"));
        }
        if self.latest_by.is_some() && self.slow != SlowRule::Latest {
            return Err("there is a latest_by without \"slow\":\"latest\"".to_owned());
        }
        if self.pattern.is_private() && self.access.is_some() {
            return Err("{sub} says who may come, so there is no \"access\"".to_owned());
        }
        Ok(())
    }
}
