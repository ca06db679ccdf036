//! The API's requests that act on connections, wherever they live: disconnect, unsubscribe, revoke.

use hyper::body::Incoming;
use hyper::{Request, StatusCode};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::admin::{self, Ask, Target};
use crate::answer::{Answer, ApiError, bad_json, json_response};
use crate::api::{Api, told};
use crate::authenticator::unix_s;
use crate::close;
use crate::cluster::Answers;
use crate::connection::Connection;
use crate::protocol::{self, ErrorCode, Refusal};
use crate::revocation::{REVOCATIONS_MAX, Revoked};

impl Api {
    pub(crate) async fn disconnect(&self, request: Request<Incoming>) -> Answer {
        let body = self.body(request, self.broker.publish_bytes_max).await?;
        let wanted: Disconnect = serde_json::from_slice(&body).map_err(|error| bad_json(&error))?;
        let code = wanted.code.unwrap_or(close::DISCONNECTED);
        if !matches!(code, 1000 | 1001 | 1008 | 1011..=1013 | 3000..=4999) {
            return Err(ErrorCode::BadRequest.with("code is 1000, 1001, 1008, 1011 to 1013 or 3000 to 4999"));
        }
        let reason = wanted.reason.unwrap_or_else(|| "disconnected by the backend".into());
        if reason.len() > 123 {
            return Err(ErrorCode::BadRequest.with("reason is at most 123 bytes"));
        }
        let target = match (wanted.connection_id, wanted.user, wanted.channel) {
            (Some(id), None, None) => Target::Connection(id),
            (None, Some(user), None) => Target::User(user),
            (None, None, Some(channel)) => Target::Channel(channel),
            _ => return Err(ErrorCode::BadRequest.with("one of connection_id, user and channel is needed")),
        };
        self.act(Ask::Disconnect { target: target.clone(), code, reason }, &target, "disconnected").await
    }

    pub(crate) async fn unsubscribe(&self, request: Request<Incoming>) -> Answer {
        let body = self.body(request, self.broker.publish_bytes_max).await?;
        let wanted: Unsubscribe = serde_json::from_slice(&body).map_err(|error| bad_json(&error))?;
        protocol::check_channel_name(&wanted.channel)?;
        let target = match (wanted.connection_id, wanted.user) {
            (Some(id), None) => Target::Connection(id),
            (None, Some(user)) => Target::User(user),
            _ => return Err(ErrorCode::BadRequest.with("either connection_id or user is needed")),
        };
        let ask = Ask::Unsubscribe { target: target.clone(), channel: wanted.channel };
        self.act(ask, &target, "unsubscribed").await
    }

    /// Takes a user's tokens, or one token, no more; who has shown them is cut off.
    pub(crate) async fn revoke(&self, request: Request<Incoming>) -> Answer {
        let body = self.body(request, self.broker.publish_bytes_max).await?;
        let wanted: Revoke = serde_json::from_slice(&body).map_err(|error| bad_json(&error))?;
        let revoked = match (wanted.user, wanted.token_id) {
            (Some(user), None) => Revoked::User(user),
            (None, Some(id)) => Revoked::Token(id),
            _ => return Err(ErrorCode::BadRequest.with("either user or token_id is needed")),
        };
        let Some(authenticator) = &self.broker.authenticator else {
            return Err(ErrorCode::BadRequest.with("there are no tokens: HUBCAST_AUTH is none"));
        };
        let at_s = unix_s();
        if authenticator.revocations.add(&revoked, at_s, at_s).is_err() {
            let message = format!("{REVOCATIONS_MAX} are revoked already");
            return Err(ErrorCode::LimitExceeded.with(message));
        }
        // For whoever is away, or comes later.
        authenticator.revocations.note_unwritten(&revoked);
        let Answers { answers, unreachable } = self.ask(Ask::Revoke { revoked, at_s }, None).await;
        Ok(json_response(StatusCode::OK, &told(json!({ "disconnected": count(&answers) }), &unreachable)))
    }

    /// Has all instances, or only one, carry something out.
    pub(crate) async fn ask(&self, ask: Ask, only: Option<&str>) -> Answers {
        let own = &*self.broker.shared.instance_id;
        let own_answer = only.is_none_or(|only| only == own).then(|| admin::carry_out(&ask, &self.broker));
        if only == Some(own) {
            return Answers { answers: own_answer.into_iter().collect(), ..Answers::default() };
        }
        let mut answers = self.broker.cluster.ask(&self.broker, ask, only).await;
        answers.answers.extend(own_answer);
        answers
    }

    /// The same for an action, told as how many connections it concerned.
    async fn act(&self, ask: Ask, target: &Target, told_as: &str) -> Answer {
        let only = match target {
            Target::Connection(id) => Some(Connection::parse_id(id).ok_or_else(ApiError::not_found)?.0.to_owned()),
            Target::User(_) | Target::Channel(_) => None,
        };
        let Answers { answers, unreachable } = self.ask(ask, only.as_deref()).await;
        let count = count(&answers);
        if count == 0 && only.is_some() {
            return Err(if unreachable.is_empty() { ApiError::not_found() } else { Refusal::unavailable().into() });
        }
        Ok(json_response(StatusCode::OK, &told(json!({ told_as: count }), &unreachable)))
    }
}

/// How many connections it concerned on all instances.
fn count(answers: &[Value]) -> u64 {
    answers.iter().filter_map(|answer| answer["count"].as_u64()).sum()
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Revoke {
    user: Option<Box<str>>,
    token_id: Option<Box<str>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Disconnect {
    connection_id: Option<String>,
    user: Option<String>,
    channel: Option<String>,
    code: Option<u16>,
    reason: Option<Box<str>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Unsubscribe {
    connection_id: Option<String>,
    user: Option<String>,
    channel: String,
}
