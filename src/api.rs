//! The internal listener's HTTP: publishing, looking, disconnecting, health and metrics.
//!
//! - `POST /api/publish` `{"channel"|"channels","data"}` or `{"messages":[{"channel","data"}]}`
//! - `POST /api/publish/{channel}` with the payload as the body
//! - `GET /api/channels?prefix=&limit=&page=`, `GET /api/channels/{channel}`
//! - `GET /api/instances`
//! - `GET /api/connections?channel=&instance=&limit=&page=`
//! - `POST /api/disconnect` `{"connection_id"|"channel","code"?,"reason"?}`
//! - `GET /metrics`, `GET /livez`, `GET /readyz` (these three without a key)

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper::body::Incoming;
use hyper::header::{self, HeaderValue};
use hyper::{Method, Request, Response, StatusCode};
use percent_encoding::percent_decode_str;
use serde::Deserialize;
use serde_json::value::RawValue;
use serde_json::{Value, json};
use subtle::ConstantTimeEq;

use crate::broker::Broker;
use crate::channel::{Channel, Fanout};
use crate::clock;
use crate::close::CloseReason;
use crate::connection::Connection;
use crate::protocol::{self, ErrorCode, Refusal};
use crate::publication::Payload;
use crate::registry::Roll;

/// A batch may be as large as this many single payloads of the largest size.
const BATCH_PAYLOADS: usize = 16;

/// Entries of a page, and the most that can be asked for.
const PAGE_DEFAULT: usize = 100;
const PAGE_MAX: usize = 1000;

/// What the API works on.
#[derive(Debug)]
pub struct Api {
    /// Where publications go.
    pub broker: Arc<Broker>,
    /// `HUBCAST_API_KEYS`; none means no key is needed.
    pub keys: Vec<String>,
    /// How long a body may take (`HUBCAST_HANDSHAKE_TIMEOUT`).
    pub body_timeout: Duration,
}

/// A refusal with its HTTP status.
#[derive(Debug)]
pub struct ApiError {
    status: StatusCode,
    refusal: Refusal,
}

type Answer = Result<Response<Full<Bytes>>, ApiError>;

impl Api {
    /// Answers one request.
    pub async fn handle(&self, request: Request<Incoming>) -> Response<Full<Bytes>> {
        match self.route(request).await {
            Ok(response) => response,
            Err(error) => error_response(&error),
        }
    }

    async fn route(&self, request: Request<Incoming>) -> Answer {
        let path = request.uri().path().to_owned();
        let allowed = match path.as_str() {
            "/api/publish" | "/api/disconnect" => Method::POST,
            path if path.starts_with("/api/publish/") => Method::POST,
            _ => Method::GET,
        };
        let route = path.strip_prefix("/api/");
        if route.is_some() {
            self.check_key(&request)?;
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
            (_, Some("channels")) => self.channels(&Query::of(&request)),
            (_, Some("instances")) => self.instances().await,
            (_, Some("connections")) => self.connections(&Query::of(&request)),
            (_, Some(route)) => match route.split_once('/') {
                Some(("publish", channel)) => self.publish_body(channel, request).await,
                Some(("channels", channel)) => self.channel(channel),
                _ => Err(ApiError::not_found()),
            },
            (_, None) => Err(ApiError::not_found()),
        }
    }

    /// `Authorization: Bearer KEY` or `X-API-Key: KEY`, compared in constant time.
    fn check_key(&self, request: &Request<Incoming>) -> Result<(), ApiError> {
        if self.keys.is_empty() {
            return Ok(());
        }
        let bearer =
            request.headers().get(header::AUTHORIZATION).and_then(|value| value.as_bytes().strip_prefix(b"Bearer "));
        let given = bearer.or_else(|| request.headers().get("x-api-key").map(HeaderValue::as_bytes));
        let matches =
            |given: &[u8]| self.keys.iter().fold(false, |any, key| any | bool::from(key.as_bytes().ct_eq(given)));
        match given {
            Some(given) if matches(given) => Ok(()),
            Some(_) => Err(ErrorCode::Unauthorized.with("the API key is wrong")),
            None => Err(ErrorCode::Unauthorized.with("an API key is needed")),
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
        shared.metrics.channels.set(self.broker.hub.len() as i64);
        let mut response = text(StatusCode::OK, shared.metrics.text());
        let kind = HeaderValue::from_static("application/openmetrics-text; version=1.0.0; charset=utf-8");
        response.headers_mut().insert(header::CONTENT_TYPE, kind);
        response
    }

    async fn publish(&self, request: Request<Incoming>) -> Answer {
        refuse_idempotency(&request)?;
        let body = self.body(request, self.broker.publish_bytes_max.saturating_mul(BATCH_PAYLOADS)).await?;
        let mut started = Vec::new();
        for (channel, data) in publish_messages(&body)? {
            let publishing = match protocol::check_channel_name(&channel) {
                Ok(()) => self.broker.start_publish(&channel, Payload::Json(data.get())).await,
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
                Ok(()) => json!({ "channel": channel }),
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
        refuse_idempotency(&request)?;
        let channel = decode(channel)?;
        protocol::check_channel_name(&channel)?;
        let payload = self.body(request, self.broker.publish_bytes_max).await?;
        self.broker.start_publish(&channel, Payload::Unchecked(&payload)).await?.outcome().await?;
        Ok(json_response(StatusCode::OK, &json!({ "results": [{ "channel": channel }] })))
    }

    /// Reads a body within its limits of size and time.
    async fn body(&self, request: Request<Incoming>, bytes_max: usize) -> Result<Bytes, ApiError> {
        let limited = Limited::new(request.into_body(), bytes_max);
        match tokio::time::timeout(self.body_timeout, limited.collect()).await {
            Ok(Ok(body)) => Ok(body.to_bytes()),
            Ok(Err(error)) if error.is::<LengthLimitError>() => {
                Err(ErrorCode::TooLarge.with(format!("the body is above {bytes_max} bytes")))
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

    /// A page holds the connections opened after the one whose number the page token is.
    fn connections(&self, query: &Query) -> Answer {
        let limit = query.limit()?;
        let after = match query.get("page") {
            None => 0,
            Some(page) => page.parse().map_err(|_| ErrorCode::BadRequest.with("page is not a page token"))?,
        };
        if query.get("user").is_some() {
            return Err(ErrorCode::BadRequest.with("connections have no user: authentication is not on"));
        }
        let shared = &self.broker.shared;
        let is_elsewhere = query.get("instance").is_some_and(|instance| *instance != *shared.instance_id);
        let all: Vec<_> = match query.get("channel") {
            _ if is_elsewhere => Vec::new(),
            Some(name) => self.broker.hub.channel(name).map_or_else(Vec::new, |channel| channel.subscribers()),
            None => shared.connections.iter().map(|connection| Arc::clone(&connection)).collect(),
        };
        let mut sorted: BTreeMap<u64, Arc<Connection>> = all.into_iter().map(|c| (c.number(), c)).collect();
        let mut listed = sorted.split_off(&(after + 1));
        let page = listed.keys().nth(limit).copied().map(|next| {
            listed.split_off(&next);
            listed.keys().last().map(u64::to_string)
        });
        let connections: Vec<_> = listed.values().map(|connection| connection_json(connection)).collect();
        Ok(json_response(StatusCode::OK, &json!({ "connections": connections, "page": page.flatten() })))
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

    async fn disconnect(&self, request: Request<Incoming>) -> Answer {
        let body = self.body(request, self.broker.publish_bytes_max).await?;
        let wanted: Disconnect = serde_json::from_slice(&body).map_err(|error| bad_json(&error))?;
        let code = wanted.code.unwrap_or(1008);
        if !matches!(code, 1000 | 1001 | 1008 | 1011..=1013 | 3000..=4999) {
            return Err(ErrorCode::BadRequest.with("code is 1000, 1001, 1008, 1011 to 1013 or 3000 to 4999"));
        }
        // What was accepted before goes before the close frame.
        let mut fanout = Fanout::default();
        self.broker.hub.deliver_held(&mut fanout);
        self.broker.shared.submit(&mut fanout);
        let reason = wanted.reason.unwrap_or_else(|| "disconnected by the backend".into());
        if reason.len() > 123 {
            return Err(ErrorCode::BadRequest.with("reason is at most 123 bytes"));
        }
        let shared = &self.broker.shared;
        let found = match (wanted.connection_id, wanted.channel) {
            (Some(id), None) => {
                let number = Connection::number_of(&id, &shared.instance_id);
                let found = number.and_then(|number| shared.connections.get(&number).map(|found| Arc::clone(&found)));
                vec![found.ok_or_else(ApiError::not_found)?]
            }
            (None, Some(name)) => self.broker.hub.channel(&name).map_or_else(Vec::new, |channel| channel.subscribers()),
            _ => return Err(ErrorCode::BadRequest.with("either connection_id or channel is needed")),
        };
        for connection in &found {
            connection.close(CloseReason::Disconnected { code, reason: reason.clone() });
        }
        Ok(json_response(StatusCode::OK, &json!({ "disconnected": found.len() })))
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Disconnect {
    connection_id: Option<String>,
    channel: Option<String>,
    code: Option<u16>,
    reason: Option<Box<str>>,
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

/// Retries are not recognised yet, so nobody may rely on it.
fn refuse_idempotency(request: &Request<Incoming>) -> Result<(), ApiError> {
    match request.headers().get("idempotency-key") {
        Some(_) => Err(ErrorCode::BadRequest.with("Idempotency-Key needs history, which is not available")),
        None => Ok(()),
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

fn connection_json(connection: &Connection) -> Value {
    let (frames, bytes) = connection.depth();
    json!({
        "connection_id": connection.id(),
        "instance_id": connection.shared().instance_id,
        "remote_address": connection.remote().to_string(),
        "connected_ms": (clock::now_us() - connection.opened_us) / 1000,
        "subscriptions": connection.subscriptions.load(Ordering::Relaxed),
        "outbox": { "frames": frames, "bytes": bytes },
    })
}

impl ApiError {
    /// No such resource.
    pub fn not_found() -> Self {
        ErrorCode::NotFound.with("there is nothing here")
    }

    /// A handshake that is refused with the given status.
    pub fn handshake(status: StatusCode, message: &str) -> Self {
        let code =
            if status == StatusCode::SERVICE_UNAVAILABLE { ErrorCode::Unavailable } else { ErrorCode::BadRequest };
        Self { status, refusal: Refusal::new(code, message.to_owned()) }
    }

    /// The response, after which the connection ends: whoever is refused holds nothing.
    pub fn last_response(&self) -> Response<Full<Bytes>> {
        let mut response = error_response(self);
        response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
        response
    }

    fn method_not_allowed() -> Self {
        ErrorCode::MethodNotAllowed.with("this path takes another method")
    }
}

impl From<Refusal> for ApiError {
    fn from(refusal: Refusal) -> Self {
        Self { status: status_of(refusal.code), refusal }
    }
}

impl ErrorCode {
    fn with(self, message: impl Into<std::borrow::Cow<'static, str>>) -> ApiError {
        Refusal::new(self, message).into()
    }
}

fn status_of(code: ErrorCode) -> StatusCode {
    match code {
        ErrorCode::BadRequest | ErrorCode::UnknownType => StatusCode::BAD_REQUEST,
        ErrorCode::Unauthorized => StatusCode::UNAUTHORIZED,
        ErrorCode::Forbidden => StatusCode::FORBIDDEN,
        ErrorCode::NotFound => StatusCode::NOT_FOUND,
        ErrorCode::MethodNotAllowed => StatusCode::METHOD_NOT_ALLOWED,
        ErrorCode::TooLarge => StatusCode::PAYLOAD_TOO_LARGE,
        ErrorCode::LimitExceeded => StatusCode::TOO_MANY_REQUESTS,
        ErrorCode::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
        ErrorCode::OutcomeUnknown => StatusCode::GATEWAY_TIMEOUT,
    }
}

fn bad_json(error: &serde_json::Error) -> ApiError {
    ErrorCode::BadRequest.with(format!("the body is not what is expected here: {error}"))
}

fn error_json(refusal: &Refusal) -> Value {
    json!({ "code": refusal.code.as_str(), "message": refusal.message })
}

/// `{"error":{"code","message"}}` with the fitting status.
pub fn error_response(error: &ApiError) -> Response<Full<Bytes>> {
    let mut response = json_response(error.status, &json!({ "error": error_json(&error.refusal) }));
    if error.status == StatusCode::SERVICE_UNAVAILABLE {
        response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
    }
    if matches!(error.status, StatusCode::PAYLOAD_TOO_LARGE | StatusCode::REQUEST_TIMEOUT) {
        // The rest of the body is not read, so the connection cannot go on.
        response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    response
}

fn json_response(status: StatusCode, body: &Value) -> Response<Full<Bytes>> {
    let mut response = text(status, format!("{body}\n"));
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

fn text(status: StatusCode, body: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    response
}
