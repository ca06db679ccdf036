//! Who a connection is, as its token says: user, capabilities, and until when.

use serde::{Deserialize, Deserializer, de::Error as _};

use crate::pattern::Pattern;

/// What is checked of a token's claims beside its signature.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Hear what is published.
    Subscribe,
    /// Publish.
    Publish,
    /// Ask who is there.
    Presence,
    /// Ask what was published.
    History,
}

impl Action {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Subscribe, Self::Publish, Self::Presence, Self::History];

    /// The name of the claim, of the metric's label and of the command.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Subscribe => "subscribe",
            Self::Publish => "publish",
            Self::Presence => "presence",
            Self::History => "history",
        }
    }
}

/// What somebody may do, and where: the claims of the same names, each a list of patterns.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct Capabilities {
    #[serde(default, deserialize_with = "patterns")]
    subscribe: Box<[Pattern]>,
    #[serde(default, deserialize_with = "patterns")]
    publish: Box<[Pattern]>,
    #[serde(default, deserialize_with = "patterns")]
    presence: Box<[Pattern]>,
    #[serde(default, deserialize_with = "patterns")]
    history: Box<[Pattern]>,
}

impl Capabilities {
    /// Whether an action is granted on a channel.
    pub fn allow(&self, action: Action, channel: &str) -> bool {
        let patterns = match action {
            Action::Subscribe => &self.subscribe,
            Action::Publish => &self.publish,
            Action::Presence => &self.presence,
            Action::History => &self.history,
        };
        patterns.iter().any(|pattern| pattern.matches(channel))
    }
}

/// What a verified token says of whoever has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// The claim `sub`.
    pub user: Option<Box<str>>,
    /// The claim `jti`, by which one token can be revoked.
    pub token_id: Option<Box<str>>,
    /// The claim `iat`, in seconds since 1970.
    pub issued_s: Option<u64>,
    /// The claim `exp`, in seconds since 1970.
    pub expires_s: u64,
    /// What it grants.
    pub capabilities: Capabilities,
}

fn patterns<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Box<[Pattern]>, D::Error> {
    let texts = Vec::<String>::deserialize(deserializer)?;
    let patterns = texts.iter().map(|text| Pattern::parse_plain(text));
    patterns.collect::<Result<_, _>>().map_err(D::Error::custom)
}
