//! Channel rules: what holds for a channel, by its name (`HUBCAST_CHANNEL_RULES`).

use serde::Deserialize;

/// The rules in order; the first match wins.
#[derive(Clone, Debug, Default)]
pub struct ChannelRules {
    rules: Vec<ChannelRule>,
    /// As it was given.
    json: String,
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
    #[serde(rename = "match")]
    pattern: String,
    #[serde(default)]
    client_publish: bool,
    #[serde(default)]
    slow: SlowPolicy,
}

/// What happens to a slow consumer of the channel.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(rename_all = "snake_case")]
enum SlowPolicy {
    /// The connection is closed with 4101.
    #[default]
    Close,
}

impl ChannelRules {
    /// Reads the JSON list.
    ///
    /// # Errors
    /// What is wrong with it, for a person.
    pub fn parse(json: &str) -> Result<Self, String> {
        let rules: Vec<ChannelRule> = serde_json::from_str(json).map_err(|error| error.to_string())?;
        for rule in &rules {
            let name = rule.pattern.strip_suffix('*').unwrap_or(&rule.pattern);
            if name.contains('*') {
                return Err(format!("{:?} has a * that is not at the end", rule.pattern));
            }
            // The only policy so far; named so that a rule can say it.
            let SlowPolicy::Close = rule.slow;
        }
        Ok(Self { rules, json: json.to_owned() })
    }

    /// Whether clients may publish to the channel: as its rule says; without any rules, yes.
    pub fn client_publish(&self, channel: &str) -> bool {
        match self.rules.iter().find(|rule| rule.matches(channel)) {
            Some(rule) => rule.client_publish,
            None => self.rules.is_empty(),
        }
    }
}

impl ChannelRule {
    fn matches(&self, channel: &str) -> bool {
        match self.pattern.strip_suffix('*') {
            Some(prefix) => channel.starts_with(prefix),
            None => channel == self.pattern,
        }
    }
}
