//! What somebody may do on a channel: the one decision, made from the channel's rule and the token. Pure.

use std::fmt;

use crate::identity::{Action, Capabilities};
use crate::protocol::{ErrorCode, Refusal};
use crate::rules::{Audience, ChannelRules};

/// Who asks.
#[derive(Clone, Copy, Debug)]
pub struct Who<'a> {
    /// The token's `sub`.
    pub user: Option<&'a str>,
    /// What the connection's token grants.
    pub capabilities: &'a Capabilities,
    /// What a token for this one channel grants, where the client has shown one.
    pub grant: Option<&'a Capabilities>,
}

/// Why something is allowed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Allowed {
    /// Nobody is asked who he is (`HUBCAST_AUTH=none`).
    Unasked,
    /// The rule says that the channel is public.
    Public,
    /// The channel is the user's own.
    Own,
    /// The connection's token grants it.
    Token,
    /// A token for this channel grants it.
    Grant,
}

/// Why something is not allowed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Forbidden {
    /// No rule lets clients publish there.
    NoPublishing,
    /// Neither the rule nor a token grants it.
    NotGranted,
}

/// Decides. It depends on names alone, so a refusal does not tell whether the channel exists; without `who` nobody is
/// asked who he is.
///
/// # Errors
/// It is not allowed.
pub fn decide(rules: &ChannelRules, who: Option<Who<'_>>, action: Action, channel: &str) -> Result<Allowed, Forbidden> {
    if action == Action::Publish && !rules.client_publish(channel) {
        return Err(Forbidden::NoPublishing);
    }
    let Some(Who { user, capabilities, grant }) = who else { return Ok(Allowed::Unasked) };
    match rules.audience(channel) {
        // Who may hear a channel is not asked again whether he may ask what he heard.
        Audience::Public if action != Action::Publish => Ok(Allowed::Public),
        Audience::User(owner) if action != Action::Publish && user == Some(owner) => Ok(Allowed::Own),
        _ if capabilities.allow(action, channel) => Ok(Allowed::Token),
        _ if grant.is_some_and(|grant| grant.allow(action, channel)) => Ok(Allowed::Grant),
        _ => Err(Forbidden::NotGranted),
    }
}

impl From<Forbidden> for Refusal {
    fn from(forbidden: Forbidden) -> Self {
        Self::new(
            ErrorCode::Forbidden,
            match forbidden {
                Forbidden::NoPublishing => "clients may not publish to this channel",
                Forbidden::NotGranted => "this is not granted here",
            },
        )
    }
}

impl fmt::Display for Allowed {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Unasked => "HUBCAST_AUTH is none",
            Self::Public => "the channel's rule says public",
            Self::Own => "the channel is the user's own",
            Self::Token => "the token grants it",
            Self::Grant => "the channel's token grants it",
        })
    }
}

impl fmt::Display for Forbidden {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::NoPublishing => "no rule with \"client_publish\":true lets clients publish there",
            Self::NotGranted => "neither the channel's rule nor the token grants it",
        })
    }
}
