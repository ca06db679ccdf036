//! The public listener's HTTP: the WebSocket handshake of RFC 6455 §4.2, and nothing else.
//!
//! `GET /ws` upgrades to the protocol or raw mode, `GET /echo` (only with `--echo`) to an echo for
//! conformance tests; everything else is 404. Each violation has its own status, before anything is
//! allocated for the connection.

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::header::{self, HeaderMap, HeaderValue};
use hyper::{Method, Request, Response, StatusCode, Version};

use crate::answer::ApiError;
use crate::metrics::Refused;
use crate::origin::Origins;
use crate::protocol::{self, ErrorCode, SUBPROTOCOL, SUBPROTOCOL_RAW};
use crate::publication::Format;

/// Longest name of a user.
pub const USER_BYTES_MAX: usize = 128;

/// Why a handshake is refused.
#[derive(Debug)]
pub struct Refusal {
    /// The metric's label.
    pub why: Refused,
    /// What the client is told.
    pub response: Box<Response<Full<Bytes>>>,
}

/// What kind of service the client asked for in its handshake.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Mode {
    /// `hubcast.v1`, with channels to subscribe at once.
    Json(Vec<String>),
    /// `hubcast.raw.v1` on one channel.
    Raw(String),
    /// `/echo`, for conformance tests.
    Echo,
}

impl Mode {
    /// The wire format of the mode.
    pub fn format(&self) -> Format {
        match self {
            Self::Json(_) => Format::Json,
            Self::Raw(_) | Self::Echo => Format::Raw,
        }
    }
}

/// A request that is a valid handshake.
pub struct Handshake {
    /// What the client asked for.
    pub mode: Mode,
    /// Who it says it is (`?user=`): nobody checks it without authentication.
    pub user: Option<Box<str>>,
    /// Its token (`Authorization: Bearer` or `?token=`), which nothing may log.
    pub token: Option<Box<str>>,
    /// The 101 answer.
    pub response: Response<Full<Bytes>>,
}

/// Checks a request and prepares the upgrade.
///
/// # Errors
/// Why it is refused.
pub fn check(request: &mut Request<Incoming>, is_echo_on: bool, origins: &Origins) -> Result<Handshake, Refusal> {
    let path = request.uri().path();
    let is_echo = is_echo_on && path == "/echo";
    if path != "/ws" && !is_echo {
        return Err(refusal(Refused::Handshake, &ApiError::not_found()));
    }
    check_request(request)?;
    if !origins.allow(request.headers()) {
        let error = ErrorCode::Forbidden.with("this page may not connect here: see HUBCAST_ORIGINS");
        return Err(refusal(Refused::Origin, &error));
    }
    let subprotocol = subprotocol(request.headers());
    let mode = match (is_echo, subprotocol) {
        (true, _) => Mode::Echo,
        (false, Some(SUBPROTOCOL_RAW)) => Mode::Raw(raw_channel(request.uri().query())?),
        (false, _) => Mode::Json(channels(request.uri().query())),
    };
    let user = user(request.uri().query())?;
    let token = token(request);
    // The crate computes the accept key; the connection itself is taken over by our own code.
    let (answer, _) = fastwebsockets::upgrade::upgrade(&mut *request)
        .map_err(|error| bad_handshake(StatusCode::BAD_REQUEST, &error.to_string()))?;
    let mut response = answer.map(|_| Full::default());
    if let Some(name) = subprotocol {
        response.headers_mut().insert(header::SEC_WEBSOCKET_PROTOCOL, HeaderValue::from_static(name));
    }
    Ok(Handshake { mode, user, token, response })
}

/// RFC 6455 §4.2.1, in the order in which a client would have to mend it.
fn check_request(request: &Request<Incoming>) -> Result<(), Refusal> {
    let refuse = |status, message: &str| Err(bad_handshake(status, message));
    let headers = request.headers();
    if request.method() != Method::GET {
        let mut refusal = bad_handshake(StatusCode::METHOD_NOT_ALLOWED, "a WebSocket handshake is a GET");
        refusal.response.headers_mut().insert(header::ALLOW, HeaderValue::from_static("GET"));
        return Err(refusal);
    }
    if request.version() != Version::HTTP_11 {
        return refuse(StatusCode::BAD_REQUEST, "a WebSocket handshake needs HTTP/1.1");
    }
    if !fastwebsockets::upgrade::is_upgrade_request(request) {
        let mut refusal = bad_handshake(StatusCode::UPGRADE_REQUIRED, "connect here with a WebSocket client");
        refusal.response.headers_mut().insert(header::UPGRADE, HeaderValue::from_static("websocket"));
        refusal.response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("Upgrade, close"));
        return Err(refusal);
    }
    if headers.get(header::SEC_WEBSOCKET_VERSION).is_none_or(|version| version != "13") {
        let mut refusal = bad_handshake(StatusCode::UPGRADE_REQUIRED, "only version 13 is spoken here");
        refusal.response.headers_mut().insert(header::SEC_WEBSOCKET_VERSION, HeaderValue::from_static("13"));
        return Err(refusal);
    }
    let mut keys = headers.get_all(header::SEC_WEBSOCKET_KEY).iter();
    let is_nonce = |key: &HeaderValue| BASE64_STANDARD.decode(key).is_ok_and(|nonce| nonce.len() == 16);
    match (keys.next(), keys.next()) {
        (Some(key), None) if is_nonce(key) => Ok(()),
        _ => refuse(StatusCode::BAD_REQUEST, "Sec-WebSocket-Key must be 16 bytes in base64, once"),
    }
}

/// The first subprotocol of the client's list that we speak.
fn subprotocol(headers: &HeaderMap) -> Option<&'static str> {
    let offers = headers.get_all(header::SEC_WEBSOCKET_PROTOCOL).iter();
    offers.filter_map(|value| value.to_str().ok()).flat_map(|list| list.split(',')).find_map(|offer| {
        match offer.trim() {
            SUBPROTOCOL => Some(SUBPROTOCOL),
            SUBPROTOCOL_RAW => Some(SUBPROTOCOL_RAW),
            _ => None,
        }
    })
}

/// `?channels=a,b`: to be subscribed at connect; the comma separates. Names are judged like a command's.
fn channels(query: Option<&str>) -> Vec<String> {
    let lists = parameters(query, "channels");
    lists.iter().flat_map(|list| list.split(',')).filter(|name| !name.is_empty()).map(str::to_owned).collect()
}

/// `?channel=x` of raw mode, which has no other way to name it, nor to tell what is wrong with it.
fn raw_channel(query: Option<&str>) -> Result<String, Refusal> {
    match parameters(query, "channel").as_slice() {
        [channel] => match protocol::check_channel_name(channel) {
            Ok(()) => Ok(channel.clone()),
            Err(refusal) => Err(bad_handshake(StatusCode::BAD_REQUEST, &refusal.message)),
        },
        _ => Err(bad_handshake(StatusCode::BAD_REQUEST, "raw mode needs ?channel= with one name")),
    }
}

/// `?user=x`: at most 128 bytes, printable.
fn user(query: Option<&str>) -> Result<Option<Box<str>>, Refusal> {
    match parameters(query, "user").as_slice() {
        [] => Ok(None),
        [user] if user.is_empty() => Ok(None),
        [user] if check_user(user) => Ok(Some(user.as_str().into())),
        _ => Err(bad_handshake(StatusCode::BAD_REQUEST, "user is one name of at most 128 printable bytes")),
    }
}

/// Whether a user can have this name.
pub fn check_user(user: &str) -> bool {
    user.len() <= USER_BYTES_MAX && !user.chars().any(char::is_control)
}

/// The token of the `Authorization` header, or else of the query, which is all that a browser can set.
fn token(request: &Request<Incoming>) -> Option<Box<str>> {
    let header = bearer(request.headers()).and_then(|token| std::str::from_utf8(token).ok());
    let query = || parameters(request.uri().query(), "token").into_iter().next();
    header.map(|token| token.trim().into()).or_else(|| query().map(Into::into))
}

/// What follows `Bearer` in the `Authorization` header (RFC 6750 §2.1).
pub fn bearer(headers: &HeaderMap) -> Option<&[u8]> {
    let value = headers.get(header::AUTHORIZATION)?.as_bytes();
    let (scheme, token) = value.split_at_checked("Bearer ".len())?;
    scheme.eq_ignore_ascii_case(b"Bearer ").then_some(token)
}

fn parameters(query: Option<&str>, name: &str) -> Vec<String> {
    let pairs = form_urlencoded::parse(query.unwrap_or_default().as_bytes());
    pairs.filter(|(key, _)| key == name).map(|(_, value)| value.into_owned()).collect()
}

fn bad_handshake(status: StatusCode, message: &str) -> Refusal {
    refusal(Refused::Handshake, &ApiError::handshake(status, message))
}

fn refusal(why: Refused, error: &ApiError) -> Refusal {
    Refusal { why, response: Box::new(error.last_response()) }
}
