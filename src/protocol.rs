//! The commands of `hubcast.v1`: text in, typed [`Request`]s out. Pure, no I/O, never awaits.
//!
//! A frame holds one JSON object or an array of them. Every command is judged by itself: a bad
//! one is a [`Refusal`] with the command's id and does not stop the rest. What the server says
//! is in `event.rs`.

use std::borrow::Cow;

use serde::Deserialize;
use serde_json::value::RawValue;

use crate::cursor::Cursor;
use crate::history_view::{PAGE_EVENTS, PAGE_EVENTS_MAX, Range};

/// The subprotocol name of the JSON protocol.
pub const SUBPROTOCOL: &str = "hubcast.v1";

/// The subprotocol name of raw mode.
pub const SUBPROTOCOL_RAW: &str = "hubcast.raw.v1";

/// Longest request id, in bytes of JSON; it is copied into the reply.
const ID_BYTES_MAX: usize = 256;

const TOKEN_TEXT: &str = "token is a string";

/// Longest error message, in bytes.
const MESSAGE_BYTES_MAX: usize = 200;

/// Longest channel name, in bytes.
pub const CHANNEL_BYTES_MAX: usize = 255;

/// Members of an answer of presence, and the most that can be asked for.
const PRESENCE_LIMIT_DEFAULT: usize = 100;
const PRESENCE_LIMIT_MAX: usize = 1000;

/// Error codes of the protocol and the HTTP API.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorCode {
    /// The command cannot be understood.
    BadRequest,
    /// The command's `type` is not known.
    UnknownType,
    /// No token or API key, or one that is not good.
    Unauthorized,
    /// Not allowed by the channel's rule and the token.
    Forbidden,
    /// No such resource or route (HTTP API only).
    NotFound,
    /// The route has no such method (HTTP API only).
    MethodNotAllowed,
    /// A limit of this connection is reached.
    LimitExceeded,
    /// It comes too often; the error says when to go on.
    RateLimited,
    /// Redis did not take it; nothing was sent.
    Unavailable,
    /// Redis did not answer in time; it may or may not have been sent.
    OutcomeUnknown,
    /// The payload is above its limit.
    TooLarge,
}

impl ErrorCode {
    /// The code as it is written in replies. An unknown outcome is `unavailable`, and the error's `outcome` tells the
    /// difference.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::BadRequest => "bad_request",
            Self::UnknownType => "unknown_type",
            Self::Unauthorized => "unauthorized",
            Self::Forbidden => "forbidden",
            Self::NotFound => "not_found",
            Self::MethodNotAllowed => "method_not_allowed",
            Self::LimitExceeded => "limit_exceeded",
            Self::RateLimited => "rate_limited",
            Self::Unavailable | Self::OutcomeUnknown => "unavailable",
            Self::TooLarge => "too_large",
        }
    }
}

/// Why a command or request was not carried out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// What kind of error it is.
    pub code: ErrorCode,
    /// What is wrong, for a person.
    pub message: Cow<'static, str>,
    /// When trying again makes sense, in milliseconds.
    pub retry_after_ms: Option<u64>,
}

impl Refusal {
    /// A refusal without a retry hint.
    pub fn new(code: ErrorCode, message: impl Into<Cow<'static, str>>) -> Self {
        Self { code, message: message.into(), retry_after_ms: None }
    }

    /// Nothing was sent: Redis is away.
    pub fn unavailable() -> Self {
        let message = "redis is not reachable, nothing was sent";
        Self { retry_after_ms: Some(1000), ..Self::new(ErrorCode::Unavailable, message) }
    }

    /// Redis did not answer in time.
    pub fn outcome_unknown() -> Self {
        let message = "redis did not answer in time, outcome unknown";
        Self { retry_after_ms: Some(1000), ..Self::new(ErrorCode::OutcomeUnknown, message) }
    }

    /// Redis answered with an error, such as a missing permission.
    pub fn redis_error(error: &str) -> Self {
        Self::new(ErrorCode::Unavailable, format!("redis refused: {error}"))
    }

    /// A payload above `HUBCAST_PUBLISH_BYTES_MAX`.
    pub fn payload_too_large(limit_bytes: usize) -> Self {
        Self::new(ErrorCode::TooLarge, format!("the payload is above {limit_bytes} bytes"))
    }

    fn bad_request(message: impl Into<Cow<'static, str>>) -> Self {
        Self::new(ErrorCode::BadRequest, message)
    }
}

/// One command of a client with the id that its reply carries.
#[derive(Debug, PartialEq, Eq)]
pub struct Request<'a> {
    /// The id's JSON text, a string or a number.
    pub id: Option<&'a str>,
    /// The command, or why there is none.
    pub command: Result<Command<'a>, Refusal>,
}

/// What a client can ask for.
#[derive(Debug, PartialEq, Eq)]
pub enum Command<'a> {
    /// Join channels; each gets its own reply.
    Subscribe(Vec<Target<'a>>),
    /// Leave channels; each gets its own reply.
    Unsubscribe(Vec<Target<'a>>),
    /// Publish to a channel.
    Publish {
        /// The channel's name, valid.
        channel: Cow<'a, str>,
        /// The payload's JSON text, byte for byte.
        data: &'a str,
    },
    /// Who is in a channel?
    Presence {
        /// The channel's name, valid.
        channel: Cow<'a, str>,
        /// Most members of the answer.
        limit: usize,
        /// Where to go on: the `page` of an answer.
        page: Option<Cow<'a, str>>,
    },
    /// What was published to a channel?
    History {
        /// The channel's name, valid.
        channel: Cow<'a, str>,
        /// Which part.
        range: Range,
        /// Most events of the answer.
        limit: usize,
    },
    /// Show a token.
    Auth {
        /// The token, which nothing may log.
        token: Cow<'a, str>,
    },
    /// Answered by `pong`.
    Ping,
}

/// One channel of a batch, or its name as given and what is wrong with it.
pub type Target<'a> = Result<Wanted<'a>, (Cow<'a, str>, Refusal)>;

/// A channel that is to be joined or left.
#[derive(Debug, PartialEq, Eq)]
pub struct Wanted<'a> {
    /// Its name, valid.
    pub channel: Cow<'a, str>,
    /// Where the client stands. A text that no cursor of ours can be stands nowhere.
    pub after: Option<Cursor>,
    /// A token for this channel.
    pub token: Option<Cow<'a, str>>,
}

/// Reads one text frame and hands each of its commands to `handle`, in order.
pub fn parse<'a>(text: &'a str, mut handle: impl FnMut(Request<'a>)) {
    if !text.trim_ascii_start().starts_with('[') {
        return handle(parse_command(text));
    }
    match serde_json::from_str::<Vec<&RawValue>>(text) {
        Ok(commands) if commands.is_empty() => handle(refused("an empty array has no command")),
        Ok(commands) => commands.into_iter().for_each(|command| handle(parse_command(command.get()))),
        Err(error) => handle(refused(format!("not JSON: {error}"))),
    }
}

/// Checks a channel name: 1 to 255 bytes of `A-Z a-z 0-9 _ - . : / @ # = , ;`, not starting with `__`.
///
/// # Errors
/// A `bad_request` refusal that says what is allowed.
pub fn check_channel_name(name: &str) -> Result<(), Refusal> {
    let allowed = |byte: u8| {
        byte.is_ascii_alphanumeric()
            || matches!(byte, b'_' | b'-' | b'.' | b':' | b'/' | b'@' | b'#' | b'=' | b',' | b';')
    };
    if name.is_empty() || name.len() > CHANNEL_BYTES_MAX {
        return Err(Refusal::bad_request("a channel name has 1 to 255 bytes"));
    }
    if name.starts_with("__") {
        return Err(Refusal::bad_request("channel names starting with __ are reserved"));
    }
    if !name.bytes().all(allowed) {
        return Err(Refusal::bad_request("a channel name consists of A-Z a-z 0-9 _ - . : / @ # = , ;"));
    }
    Ok(())
}

/// The members of a command, each kept as JSON text so that a wrong type still has its id.
#[derive(Deserialize)]
struct Members<'a> {
    #[serde(borrow, rename = "type", default, deserialize_with = "present")]
    kind: Option<&'a RawValue>,
    #[serde(borrow, default, deserialize_with = "present")]
    id: Option<&'a RawValue>,
    #[serde(borrow, default, deserialize_with = "present")]
    channel: Option<&'a RawValue>,
    #[serde(borrow, default, deserialize_with = "present")]
    channels: Option<&'a RawValue>,
    #[serde(borrow, default, deserialize_with = "present")]
    data: Option<&'a RawValue>,
    #[serde(borrow, default, deserialize_with = "present")]
    after: Option<&'a RawValue>,
    #[serde(borrow, default, deserialize_with = "present")]
    before: Option<&'a RawValue>,
    #[serde(borrow)]
    limit: Option<&'a RawValue>,
    #[serde(borrow)]
    page: Option<&'a RawValue>,
    #[serde(borrow, default, deserialize_with = "present")]
    token: Option<&'a RawValue>,
}

/// Keeps a JSON `null` apart from an absent member.
pub(crate) fn present<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Option<&'de RawValue>, D::Error> {
    <&RawValue>::deserialize(deserializer).map(Some)
}

fn parse_command(text: &str) -> Request<'_> {
    let members = match serde_json::from_str::<Members<'_>>(text) {
        Ok(members) => members,
        Err(error) if error.is_data() && !text.trim_ascii_start().starts_with('{') => {
            return refused("a command is a JSON object");
        }
        Err(error) => return refused(format!("not a command: {error}")),
    };
    let id = match members.id.map(request_id) {
        None => None,
        Some(Ok(id)) => Some(id),
        Some(Err(refusal)) => return Request { id: None, command: Err(refusal) },
    };
    Request { id, command: command(&members) }
}

fn command<'a>(members: &Members<'a>) -> Result<Command<'a>, Refusal> {
    let kind = members.kind.and_then(string).ok_or_else(|| Refusal::bad_request("type must be a string"))?;
    match kind.as_ref() {
        "subscribe" => targets(members).map(Command::Subscribe),
        "unsubscribe" => targets(members).map(Command::Unsubscribe),
        "publish" => {
            let channel = one_channel(members)?;
            let data = members.data.ok_or_else(|| Refusal::bad_request("data is missing"))?;
            Ok(Command::Publish { channel, data: data.get() })
        }
        "presence" => {
            let channel = one_channel(members)?;
            let limit = members.limit.map_or("", RawValue::get);
            let page = text(members.page, "page is a string")?;
            Ok(Command::Presence { channel, limit: presence_limit(limit)?, page })
        }
        "history" => {
            let channel = one_channel(members)?;
            let after = text(members.after, "after is a cursor")?;
            let before = text(members.before, "before is a cursor")?;
            let limit = history_limit(members.limit.map_or("", RawValue::get))?;
            Ok(Command::History { channel, range: history_range(after.as_deref(), before.as_deref())?, limit })
        }
        "auth" => {
            let token = text(members.token, TOKEN_TEXT)?.ok_or_else(|| Refusal::bad_request("token is missing"))?;
            Ok(Command::Auth { token })
        }
        "ping" => Ok(Command::Ping),
        _ => Err(Refusal::new(ErrorCode::UnknownType, "this type is not known")),
    }
}

/// How many members an answer of presence has: 0 for the counts alone; 100 where nothing is said.
///
/// # Errors
/// `bad_request`
pub fn presence_limit(text: &str) -> Result<usize, Refusal> {
    match text.parse() {
        _ if text.is_empty() => Ok(PRESENCE_LIMIT_DEFAULT),
        Ok(limit @ 0..=PRESENCE_LIMIT_MAX) => Ok(limit),
        _ => Err(Refusal::bad_request(format!("limit is 0 to {PRESENCE_LIMIT_MAX}"))),
    }
}

/// Which part of a history is asked for: after a cursor, before one, or the newest.
///
/// # Errors
/// `bad_request`
pub fn history_range(after: Option<&str>, before: Option<&str>) -> Result<Range, Refusal> {
    let cursor = |text, what: &'static str| Cursor::parse(text).ok_or_else(|| Refusal::bad_request(what));
    match (after, before) {
        (None, None) => Ok(Range::Newest),
        (Some(after), None) => cursor(after, "after is not a cursor").map(Range::After),
        (None, Some(before)) => cursor(before, "before is not a cursor").map(Range::Before),
        (Some(_), Some(_)) => Err(Refusal::bad_request("either after or before, not both")),
    }
}

/// How many events an answer of history has; 100 where nothing is said.
///
/// # Errors
/// `bad_request`
pub fn history_limit(text: &str) -> Result<usize, Refusal> {
    match text.parse() {
        _ if text.is_empty() => Ok(PAGE_EVENTS),
        Ok(limit @ 1..=PAGE_EVENTS_MAX) => Ok(limit),
        _ => Err(Refusal::bad_request(format!("limit is 1 to {PAGE_EVENTS_MAX}"))),
    }
}

fn one_channel<'a>(members: &Members<'a>) -> Result<Cow<'a, str>, Refusal> {
    let channel = members.channel.ok_or_else(|| Refusal::bad_request("channel is missing"))?;
    raw_target(channel, None, None).map(|wanted| wanted.channel).map_err(|(_, refusal)| refusal)
}

fn text<'a>(raw: Option<&'a RawValue>, what: &'static str) -> Result<Option<Cow<'a, str>>, Refusal> {
    raw.map(|raw| string(raw).ok_or_else(|| Refusal::bad_request(what))).transpose()
}

fn targets<'a>(members: &Members<'a>) -> Result<Vec<Target<'a>>, Refusal> {
    match (members.channel, members.channels) {
        (Some(channel), None) => Ok(vec![raw_target(channel, members.after, members.token)]),
        (None, Some(channels)) => {
            let channels = serde_json::from_str::<Vec<&RawValue>>(channels.get())
                .map_err(|_| Refusal::bad_request("channels must be an array"))?;
            if channels.is_empty() {
                return Err(Refusal::bad_request("channels is empty"));
            }
            Ok(channels.into_iter().map(batch_element).collect())
        }
        _ => Err(Refusal::bad_request("either channel or channels is needed")),
    }
}

/// A name, or an object with one.
fn batch_element(element: &RawValue) -> Target<'_> {
    if !element.get().starts_with('{') {
        return raw_target(element, None, None);
    }
    #[derive(Deserialize)]
    struct Element<'a> {
        #[serde(borrow)]
        channel: &'a RawValue,
        #[serde(borrow, default, deserialize_with = "present")]
        after: Option<&'a RawValue>,
        #[serde(borrow, default, deserialize_with = "present")]
        token: Option<&'a RawValue>,
    }
    match serde_json::from_str::<Element<'_>>(element.get()) {
        Ok(element) => raw_target(element.channel, element.after, element.token),
        Err(_) => Err((Cow::Borrowed(""), Refusal::bad_request("channel is missing"))),
    }
}

fn raw_target<'a>(raw: &'a RawValue, after: Option<&'a RawValue>, token: Option<&'a RawValue>) -> Target<'a> {
    let Some(name) = string(raw) else {
        return Err((Cow::Borrowed(""), Refusal::bad_request("a channel is a string")));
    };
    let wanted = target(name)?;
    match text(after, "after is a cursor").and_then(|after| Ok((after, text(token, TOKEN_TEXT)?))) {
        Ok((after, token)) => Ok(Wanted { after: after.and_then(|after| Cursor::parse(&after)), token, ..wanted }),
        Err(refusal) => Err((wanted.channel, refusal)),
    }
}

/// A channel by the name that somebody gave.
pub fn target(name: Cow<'_, str>) -> Target<'_> {
    match check_channel_name(&name) {
        Ok(()) => Ok(Wanted { channel: name, after: None, token: None }),
        Err(refusal) => Err((name, refusal)),
    }
}

fn request_id(raw: &RawValue) -> Result<&str, Refusal> {
    let text = raw.get();
    let is_id = text.starts_with(|first: char| first == '"' || first == '-' || first.is_ascii_digit());
    if !is_id || text.len() > ID_BYTES_MAX {
        return Err(Refusal::bad_request("id is a string or a number of at most 256 bytes"));
    }
    Ok(text)
}

/// The value of a JSON string, borrowed where it has no escapes.
fn string(raw: &RawValue) -> Option<Cow<'_, str>> {
    let inner = raw.get().strip_prefix('"')?.strip_suffix('"')?;
    if inner.contains('\\') { serde_json::from_str(raw.get()).ok().map(Cow::Owned) } else { Some(Cow::Borrowed(inner)) }
}

/// The parser's messages may quote what the client sent, so their length is bounded.
fn refused<'a>(message: impl Into<Cow<'static, str>>) -> Request<'a> {
    let mut message = message.into();
    if message.len() > MESSAGE_BYTES_MAX {
        let shown = message.floor_char_boundary(MESSAGE_BYTES_MAX);
        message.to_mut().truncate(shown);
    }
    Request { id: None, command: Err(Refusal::bad_request(message)) }
}
