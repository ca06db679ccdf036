//! The internal listener's HTTP: publishing, looking, disconnecting, health and metrics.
//!
//! - `POST /api/publish` `{"channel"|"channels","data"}` or `{"messages":[{"channel","data"}]}`
//! - `POST /api/publish/{channel}` with the payload as the body
//! - `GET /api/channels?prefix=&limit=&page=`, `GET /api/channels/{channel}`
//! - `GET /api/presence/{channel}?limit=&page=`
//! - `GET /api/history/{channel}?after=&before=&limit=`
//! - `GET /api/instances`
//! - `GET /api/connections?user=&channel=&instance=&limit=&page=`
//! - `POST /api/disconnect` `{"connection_id"|"user"|"channel","code"?,"reason"?}`
//! - `POST /api/unsubscribe` `{"connection_id"|"user","channel"}`
//! - `POST /api/revoke` `{"user"|"token_id"}`
//! - `GET /metrics`, `GET /livez`, `GET /readyz` (these three without a key)

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper::body::{Body, Incoming};
use hyper::header::{self, HeaderValue};
use hyper::{Method, Request, Response, StatusCode};
use percent_encoding::percent_decode_str;
use serde::Deserialize;
use serde_json::value::RawValue;
use serde_json::{Value, json};
use tokio::sync::oneshot;

use crate::admin::Ask;
use crate::answer::{Answer, ApiError, bad_json, error_json, error_response, json_response, status_of, text};
use crate::api_keys::ApiKeys;
use crate::asker::Asker;
use crate::broker::Broker;
use crate::channel::Channel;
use crate::cluster::Answers;
use crate::connection::Connection;
use crate::cursor::Cursor;
use crate::history_reader;
use crate::hub::Histories;
use crate::ledger;
use crate::presence_reader::{self, Question};
use crate::protocol::{self, ErrorCode, Refusal};
use crate::publication::Payload;
use crate::registry::Roll;

/// A batch may be as large as this many single payloads of the largest size.
const BATCH_PAYLOADS: usize = 16;

/// Longest `Idempotency-Key`, in bytes.
const IDEMPOTENCY_KEY_BYTES_MAX: usize = 255;

/// Entries of a page, and the most that can be asked for.
const PAGE_DEFAULT: usize = 100;
const PAGE_MAX: usize = 1000;

/// What the API works on.
#[derive(Debug)]
pub struct Api {
    /// Where publications go.
    pub broker: Arc<Broker>,
    /// Who may use it.
    pub keys: Arc<ApiKeys>,
    /// How long a body may take (`HUBCAST_HANDSHAKE_TIMEOUT`).
    pub body_timeout: Duration,
}

impl Api {
    /// Answers one request.
    pub async fn handle(&self, request: Request<Incoming>) -> Response<Full<Bytes>> {
        let response = self.route(request).await.unwrap_or_else(|error| error_response(&error));
        self.broker.shared.metrics.answered(response.status());
        response
    }

    async fn route(&self, request: Request<Incoming>) -> Answer {
        let path = request.uri().path().to_owned();
        let allowed = match path.as_str() {
            "/api/publish" | "/api/disconnect" | "/api/unsubscribe" | "/api/revoke" => Method::POST,
            path if path.starts_with("/api/publish/") => Method::POST,
            _ => Method::GET,
        };
        let route = path.strip_prefix("/api/");
        if route.is_some() {
            self.keys.check(request.headers(), &allowed, &path, &self.broker.shared.metrics)?;
        }
        if request.method() != allowed {
            return Err(ApiError::method_not_allowed());
        }
        match (path.as_str(), route) {
            ("/livez", _) => Ok(text(StatusCode::OK, "ok\n".to_owned())),
            ("/readyz", _) => Ok(self.readyz()),
            ("/metrics", _) => Ok(self.metrics()),
            (_, Some("publish")) => self.publish(request).await,
            (_, Some("disconnect")) => self.disconnect(request).await,
            (_, Some("unsubscribe")) => self.unsubscribe(request).await,
            (_, Some("revoke")) => self.revoke(request).await,
            (_, Some("channels")) => self.channels(&Query::of(&request)),
            (_, Some("instances")) => self.instances().await,
            (_, Some("connections")) => self.connections(&Query::of(&request)).await,
            (_, Some(route)) => match route.split_once('/') {
                Some(("publish", channel)) => self.publish_body(channel, request).await,
                Some(("channels", channel)) => self.channel(channel),
                Some(("history", channel)) => self.history(channel, &Query::of(&request)).await,
                Some(("presence", channel)) => self.presence(channel, &Query::of(&request)).await,
                _ => Err(ApiError::not_found()),
            },
            (_, None) => Err(ApiError::not_found()),
        }
    }

    fn readyz(&self) -> Response<Full<Bytes>> {
        let reasons = self.broker.health.not_ready();
        let status = if reasons.is_empty() { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
        json_response(status, &json!({ "ready": reasons.is_empty(), "reasons": reasons }))
    }

    /// Gauges that would cost something on the message path are computed here.
    fn metrics(&self) -> Response<Full<Bytes>> {
        let shared = &self.broker.shared;
        let (mut frames, mut bytes, mut subscriptions) = (0, 0, 0);
        for connection in &shared.connections {
            let depth = connection.depth();
            frames += depth.0;
            bytes += depth.1;
            subscriptions += connection.subscriptions.load(Ordering::Relaxed);
        }
        shared.metrics.outbox_frames.set(frames as i64);
        shared.metrics.outbox_bytes.set(bytes as i64);
        shared.metrics.subscriptions.set(subscriptions as i64);
        shared.metrics.ledger(ledger::frame_bytes(), ledger::arriving_bytes());
        shared.metrics.channels.set(self.broker.hub.len() as i64);
        if let Histories::Memory(memory) = self.broker.hub.histories() {
            shared.metrics.history_memory.set(memory.bytes() as i64);
        }
        let mut response = text(StatusCode::OK, shared.metrics.text());
        let kind = HeaderValue::from_static("application/openmetrics-text; version=1.0.0; charset=utf-8");
        response.headers_mut().insert(header::CONTENT_TYPE, kind);
        response
    }

    async fn publish(&self, request: Request<Incoming>) -> Answer {
        let key = idempotency_key(&request)?;
        let body = self.body(request, self.broker.publish_bytes_max.saturating_mul(BATCH_PAYLOADS)).await?;
        let mut started = Vec::new();
        for (index, (channel, data)) in publish_messages(&body)?.into_iter().enumerate() {
            let key = key.as_deref().map(|key| format!("{key}#{index}"));
            let publishing = match protocol::check_channel_name(&channel) {
                Ok(()) => self.broker.start_publish(&channel, Payload::Json(data.get()), key.as_deref()).await,
                Err(refusal) => Err(refusal),
            };
            started.push((channel, publishing));
        }
        let mut results = Vec::with_capacity(started.len());
        let mut worst = StatusCode::OK;
        for (channel, publishing) in started {
            let outcome = match publishing {
                Ok(publishing) => publishing.outcome().await,
                Err(refusal) => Err(refusal),
            };
            results.push(match outcome {
                Ok(cursor) => published_json(&channel, cursor),
                Err(refusal) => {
                    let status = status_of(refusal.code);
                    worst = worst.max(status);
                    json!({ "channel": channel, "error": error_json(&refusal) })
                }
            });
        }
        Ok(json_response(worst, &json!({ "results": results })))
    }

    async fn publish_body(&self, channel: &str, request: Request<Incoming>) -> Answer {
        let key = idempotency_key(&request)?;
        let channel = decode(channel)?;
        protocol::check_channel_name(&channel)?;
        let payload = self.body(request, self.broker.publish_bytes_max).await?;
        let publishing = self.broker.start_publish(&channel, Payload::Unchecked(&payload), key.as_deref()).await?;
        let cursor = publishing.outcome().await?;
        Ok(json_response(StatusCode::OK, &json!({ "results": [published_json(&channel, cursor)] })))
    }

    /// Reads a body within its limits of size and time; one that says it is too large is not read at all.
    pub(crate) async fn body(&self, request: Request<Incoming>, bytes_max: usize) -> Result<Bytes, ApiError> {
        let too_large = || ErrorCode::TooLarge.with(format!("the body is above {bytes_max} bytes"));
        if request.body().size_hint().lower() > bytes_max as u64 {
            return Err(too_large());
        }
        let mut body = request.into_body();
        let limited = Limited::new(&mut body, bytes_max);
        match tokio::time::timeout(self.body_timeout, limited.collect()).await {
            Ok(Ok(body)) => Ok(body.to_bytes()),
            Ok(Err(error)) if error.is::<LengthLimitError>() => {
                // What is left of a body that is a little too large is thrown away: with unread input hyper ends the
                // connection without the answer.
                let mut rest = Limited::new(body, bytes_max);
                let discard = async { while let Some(Ok(_)) = rest.frame().await {} };
                let _ = tokio::time::timeout(self.body_timeout, discard).await;
                Err(too_large())
            }
            Ok(Err(error)) => Err(ErrorCode::BadRequest.with(format!("the body broke off: {error}"))),
            Err(_) => {
                let refusal = Refusal::new(ErrorCode::BadRequest, "the body took too long to arrive");
                Err(ApiError { status: StatusCode::REQUEST_TIMEOUT, refusal })
            }
        }
    }

    fn channel(&self, name: &str) -> Answer {
        let channel = self.broker.hub.channel(&decode(name)?).ok_or_else(ApiError::not_found)?;
        Ok(json_response(StatusCode::OK, &channel_json(&channel)))
    }

    /// Who is in a channel, over all instances; 404 where its rule has no presence.
    async fn presence(&self, channel: &str, query: &Query) -> Answer {
        let channel = decode(channel)?;
        protocol::check_channel_name(&channel)?;
        if !self.broker.hub.has_presence(&channel) {
            return Err(ErrorCode::NotFound.with("the rule of this channel has no presence"));
        }
        let limit = protocol::presence_limit(query.get("limit").unwrap_or_default())?;
        let (sender, answer) = oneshot::channel();
        let question = Question::new(&channel, limit, query.get("page"), Asker::Http(sender))?;
        self.broker.shared.presence.ask(question).map_err(|_| presence_reader::unavailable())?;
        let members = answer.await.unwrap_or_else(|_| Err(presence_reader::unavailable()))?;
        Ok(members_response(&members))
    }

    /// What was published to a channel; 404 where its rule has no history.
    async fn history(&self, channel: &str, query: &Query) -> Answer {
        let channel = decode(channel)?;
        protocol::check_channel_name(&channel)?;
        if self.broker.hub.rules().history(&channel).is_none() {
            return Err(ErrorCode::NotFound.with("the rule of this channel has no history"));
        }
        let range = protocol::history_range(query.get("after"), query.get("before"))?;
        let limit = protocol::history_limit(query.get("limit").unwrap_or_default())?;
        let (sender, answer) = oneshot::channel();
        let question = history_reader::Question { channel: channel.into(), range, limit, asker: Asker::Http(sender) };
        self.broker.ask_history(question)?;
        let members = answer.await.unwrap_or_else(|_| Err(history_reader::unavailable()))?;
        Ok(members_response(&members))
    }

    /// A page holds the names after the one that the page token names.
    fn channels(&self, query: &Query) -> Answer {
        let limit = query.limit()?;
        let prefix = query.get("prefix").unwrap_or_default();
        let after = query.get("page").unwrap_or_default();
        let mut names: Vec<_> = self.broker.hub.channels();
        names.retain(|channel| channel.name().starts_with(prefix) && channel.name() > after);
        names.sort_unstable_by(|a, b| a.name().cmp(b.name()));
        let is_more = names.len() > limit;
        names.truncate(limit);
        let page = names.last().filter(|_| is_more).map(|last| last.name().to_owned());
        let channels: Vec<_> = names.iter().map(|channel| channel_json(channel)).collect();
        Ok(json_response(StatusCode::OK, &json!({ "channels": channels, "page": page })))
    }

    /// A page holds the connections after the one that the page token names, of all instances.
    async fn connections(&self, query: &Query) -> Answer {
        let limit = query.limit()?;
        let after = query.get("page").map(str::to_owned);
        if after.as_deref().is_some_and(|after| Connection::parse_id(after).is_none()) {
            return Err(ErrorCode::BadRequest.with("page is not a page token"));
        }
        let owned = |name| query.get(name).map(str::to_owned);
        let ask = Ask::Connections { user: owned("user"), channel: owned("channel"), after, limit: limit + 1 };
        let Answers { answers, unreachable } = self.ask(ask, query.get("instance")).await;
        let lists = answers.into_iter().filter_map(|mut answer| match answer["connections"].take() {
            Value::Array(list) => Some(list),
            _ => None,
        });
        let id = |connection: &Value| connection["connection_id"].as_str().unwrap_or_default().to_owned();
        let mut connections: Vec<_> = lists.flatten().collect();
        connections
            .sort_by_cached_key(|connection| Connection::parse_id(&id(connection)).map(|(i, n)| (i.to_owned(), n)));
        let is_more = connections.len() > limit;
        connections.truncate(limit);
        let page = connections.last().filter(|_| is_more).map(id);
        Ok(json_response(StatusCode::OK, &told(json!({ "connections": connections, "page": page }), &unreachable)))
    }

    /// The live instances: this one alone without Redis.
    async fn instances(&self) -> Answer {
        let shared = &self.broker.shared;
        let records = match &shared.registry {
            None => vec![(shared.instance_id.to_string(), Roll::instance(&**shared))],
            Some(registry) => registry.instances().await.map_err(|_| Refusal::unavailable())?,
        };
        let mut instances: Vec<_> = records
            .into_iter()
            .map(|(id, mut record)| {
                record["instance_id"] = id.into();
                record
            })
            .collect();
        instances.sort_by(|a, b| a["instance_id"].as_str().cmp(&b["instance_id"].as_str()));
        Ok(json_response(StatusCode::OK, &json!({ "instances": instances })))
    }
}

/// The members of an object, as JSON already.
fn members_response(members: &str) -> Response<Full<Bytes>> {
    let mut response = text(StatusCode::OK, format!("{{{members}}}\n"));
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

/// An answer, with the instances that are not in it.
pub(crate) fn told(mut answer: Value, unreachable: &BTreeSet<String>) -> Value {
    if !unreachable.is_empty() {
        answer["unreachable"] = json!(unreachable);
    }
    answer
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct PublishRequest<'a> {
    channel: Option<String>,
    channels: Option<Vec<String>>,
    #[serde(borrow, default, deserialize_with = "protocol::present")]
    data: Option<&'a RawValue>,
    #[serde(borrow)]
    messages: Option<Vec<PublishMessage<'a>>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct PublishMessage<'a> {
    channel: String,
    #[serde(borrow)]
    data: &'a RawValue,
}

/// The messages of any of the three forms.
fn publish_messages(body: &[u8]) -> Result<Vec<(String, &RawValue)>, ApiError> {
    let request: PublishRequest<'_> = serde_json::from_slice(body).map_err(|error| bad_json(&error))?;
    match request {
        PublishRequest { channel: Some(channel), channels: None, data: Some(data), messages: None } => {
            Ok(vec![(channel, data)])
        }
        PublishRequest { channel: None, channels: Some(channels), data: Some(data), messages: None } => {
            Ok(channels.into_iter().map(|channel| (channel, data)).collect())
        }
        PublishRequest { channel: None, channels: None, data: None, messages: Some(messages) } => {
            Ok(messages.into_iter().map(|message| (message.channel, message.data)).collect())
        }
        _ => Err(ErrorCode::BadRequest.with("needed: channel and data, channels and data, or messages")),
    }
}

/// What makes a publish the repetition of an earlier one.
fn idempotency_key(request: &Request<Incoming>) -> Result<Option<String>, ApiError> {
    let Some(key) = request.headers().get("idempotency-key") else { return Ok(None) };
    match key.to_str() {
        Ok(key) if (1..=IDEMPOTENCY_KEY_BYTES_MAX).contains(&key.len()) => Ok(Some(key.to_owned())),
        _ => Err(ErrorCode::BadRequest.with("Idempotency-Key is 1 to 255 visible ASCII characters")),
    }
}

fn published_json(channel: &str, cursor: Option<Cursor>) -> Value {
    match cursor {
        Some(cursor) => json!({ "channel": channel, "cursor": cursor.to_string() }),
        None => json!({ "channel": channel }),
    }
}

/// The query parameters of a request.
struct Query(Vec<(String, String)>);

impl Query {
    fn of(request: &Request<Incoming>) -> Self {
        Self(form_urlencoded::parse(request.uri().query().unwrap_or_default().as_bytes()).into_owned().collect())
    }

    /// The value of a parameter; an empty one is as good as none.
    fn get(&self, name: &str) -> Option<&str> {
        self.0.iter().find(|(key, value)| key == name && !value.is_empty()).map(|(_, value)| value.as_str())
    }

    fn limit(&self) -> Result<usize, ApiError> {
        let Some(limit) = self.get("limit") else { return Ok(PAGE_DEFAULT) };
        match limit.parse() {
            Ok(limit @ 1..=PAGE_MAX) => Ok(limit),
            _ => Err(ErrorCode::BadRequest.with(format!("limit is 1 to {PAGE_MAX}"))),
        }
    }
}

fn decode(segment: &str) -> Result<String, ApiError> {
    match percent_decode_str(segment).decode_utf8() {
        Ok(decoded) => Ok(decoded.into_owned()),
        Err(_) => Err(ErrorCode::BadRequest.with("the channel name is not UTF-8")),
    }
}

fn channel_json(channel: &Channel<Arc<Connection>>) -> Value {
    let (subscribers, pending) = channel.counts();
    json!({ "channel": channel.name(), "subscribers": subscribers, "pending": pending })
}
