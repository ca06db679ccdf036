//! `hubcast token`: mints tokens for development, and explains what one allows and why not.
//!
//! It works by the configuration of the gateway that would be started with the same variables.

use std::fmt::Write as _;

use base64::Engine as _;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use jsonwebtoken::{Algorithm, EncodingKey, Header};
use serde::Serialize;

use crate::access::{self, Who};
use crate::auth_config::{JwtConfig, KeySource};
use crate::authenticator::{Authenticator, unix_s};
use crate::config::Config;
use crate::identity::{Action, Identity};
use crate::protocol;

/// What a token is to say.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Wanted {
    /// Whose it is.
    #[serde(rename = "sub", skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// By which it can be revoked.
    #[serde(rename = "jti", skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// Patterns of channels.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub subscribe: Vec<String>,
    /// Patterns of channels.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub publish: Vec<String>,
    /// Patterns of channels.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub presence: Vec<String>,
    /// Patterns of channels.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub history: Vec<String>,
}

#[derive(Serialize)]
struct Claims<'a> {
    #[serde(flatten)]
    wanted: &'a Wanted,
    iat: u64,
    exp: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    iss: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    aud: Option<&'a str>,
}

/// Signs a token with `HUBCAST_JWT_SECRET`, and proves that the gateway would take it.
///
/// # Errors
/// What is missing, or why the gateway would not take it.
pub fn mint(config: &Config, wanted: &Wanted, life_s: u64) -> Result<String, String> {
    let jwt = with_jwt(config)?;
    let secret = match &jwt.secret {
        Some(KeySource::Text(secret)) => secret.clone().into_bytes(),
        Some(KeySource::File(path)) => std::fs::read(path).map_err(|error| format!("{}: {error}", path.display()))?,
        None => return Err("only with HUBCAST_JWT_SECRET: private keys stay with their issuer".to_owned()),
    };
    let now_s = unix_s();
    let claims = Claims {
        wanted,
        iat: now_s,
        exp: now_s + life_s,
        iss: jwt.claimed.issuer.as_deref(),
        aud: jwt.claimed.audience.as_deref(),
    };
    let algorithm = jwt.algorithm.filter(|algorithm| algorithm.family() == jsonwebtoken::AlgorithmFamily::Hmac);
    let header = Header::new(algorithm.unwrap_or(Algorithm::HS256));
    let key = EncodingKey::from_secret(secret.trim_ascii()).map_err(|error| error.to_string())?;
    let token = jsonwebtoken::encode(&header, &claims, &key).map_err(|error| error.to_string())?;
    let checked = Authenticator::load(jwt.clone())?.check(&token);
    checked.map(|_| token).map_err(|fault| format!("the gateway would refuse it: {fault}"))
}

/// What a token says, whether it is taken, and what it allows on the channels.
///
/// # Errors
/// There is nothing to verify it by.
pub async fn explain(config: &Config, token: &str, channels: &[String]) -> Result<String, String> {
    let authenticator = Authenticator::load(with_jwt(config)?.clone())?;
    let mut text = String::new();
    for (part, name) in token.split('.').zip(["header", "claims"]) {
        let shown = BASE64_URL_SAFE_NO_PAD.decode(part).ok().and_then(|bytes| String::from_utf8(bytes).ok());
        let shown = shown.unwrap_or_else(|| "not readable".to_owned());
        let _ = writeln!(text, "{name:9}  {}", shown.escape_debug().to_string().replace("\\\"", "\""));
    }
    match authenticator.authenticate(token).await {
        Err(fault) => {
            let _ = writeln!(text, "token      refused: {fault}");
        }
        Ok(identity) => {
            let user = identity.user.as_deref().unwrap_or("nobody in particular");
            let left_s = identity.expires_s.saturating_sub(unix_s());
            let _ = writeln!(text, "token      taken: {user}, for {left_s} s more (unless it is revoked)");
            for channel in channels {
                decisions(&mut text, config, &identity, channel);
            }
        }
    }
    Ok(text)
}

fn decisions(text: &mut String, config: &Config, identity: &Identity, channel: &str) {
    if let Err(refusal) = protocol::check_channel_name(channel) {
        let _ = writeln!(text, "{channel:?}: {}", refusal.message);
        return;
    }
    let rules = &config.channel_rules;
    match rules.explain(channel) {
        Some((place, pattern)) => drop(writeln!(text, "{channel}: rule {place}, {pattern}")),
        None => drop(writeln!(text, "{channel}: no rule")),
    }
    let who = Who { user: identity.user.as_deref(), capabilities: &identity.capabilities, grant: None };
    for action in Action::ALL {
        let verdict = match access::decide(rules, Some(who), action, channel) {
            Ok(allowed) => format!("allowed: {allowed}"),
            Err(forbidden) => format!("refused: {forbidden}"),
        };
        let _ = writeln!(text, "  {:9}  {verdict}", action.as_str());
    }
}

fn with_jwt(config: &Config) -> Result<&JwtConfig, String> {
    config.auth.jwt.as_ref().ok_or_else(|| "only with HUBCAST_AUTH=jwt: else no token is looked at".to_owned())
}
