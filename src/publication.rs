//! A publication on its way to the subscribers, encoded at most once per wire format.

use std::borrow::Cow;
use std::cell::OnceCell;
use std::sync::Arc;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;

use crate::cursor::Cursor;
use crate::event;
use crate::eviction::Evictable;
use crate::frame::{self, Frame, Opcode};
use crate::slow_policy::SlowPolicy;

/// How a subscriber wants its publications.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// `hubcast.v1`: an `event` object.
    Json,
    /// `hubcast.raw.v1`: the payload and nothing else.
    Raw,
}

/// The published bytes.
#[derive(Clone, Copy, Debug)]
pub enum Payload<'a> {
    /// JSON text that a parser has accepted already.
    Json(&'a str),
    /// Bytes that nobody has looked at.
    Unchecked(&'a [u8]),
}

impl<'a> Payload<'a> {
    /// The payload as published.
    pub fn bytes(self) -> &'a [u8] {
        match self {
            Self::Json(text) => text.as_bytes(),
            Self::Unchecked(bytes) => bytes,
        }
    }
}

/// What is published at once, with its place in the channel's chain where that has one.
#[derive(Clone, Copy, Debug)]
pub struct Message<'a> {
    /// The published bytes.
    pub payload: Payload<'a>,
    /// Where a client stands that has it; on channels with history.
    pub cursor: Option<Cursor>,
}

impl<'a> From<Payload<'a>> for Message<'a> {
    /// Outside of any chain.
    fn from(payload: Payload<'a>) -> Self {
        Self { payload, cursor: None }
    }
}

/// The channel that publications come from.
#[derive(Clone, Copy, Debug)]
pub struct Origin<'a> {
    /// Its name.
    pub channel: &'a Arc<str>,
    /// What its slow consumers lose.
    pub slow: &'a SlowPolicy,
    /// Where it stood before them.
    pub before: Option<Cursor>,
}

/// One message to one channel, or several that arrived together and are pushed as a bundle.
pub struct Publication<'a> {
    channel: &'a str,
    messages: &'a [Message<'a>],
    origin: Option<Origin<'a>>,
    json: OnceCell<Arc<Frame>>,
    raw: OnceCell<Arc<Frame>>,
}

impl<'a> Publication<'a> {
    /// A publication of `messages` to `channel`, a valid name.
    pub fn new(channel: &'a str, messages: &'a [Message<'a>]) -> Self {
        Self { channel, messages, origin: None, json: OnceCell::new(), raw: OnceCell::new() }
    }

    /// The same from a channel whose rule says what slow consumers lose.
    pub fn of(origin: Origin<'a>, messages: &'a [Message<'a>]) -> Self {
        Self { origin: Some(origin), ..Self::new(origin.channel, messages) }
    }

    /// The channel's name.
    pub fn channel(&self) -> &'a str {
        self.channel
    }

    /// How many messages it has.
    pub fn messages(&self) -> usize {
        self.messages.len()
    }

    /// The frame for subscribers of the given format; made when the first one is met.
    pub fn frame(&self, format: Format) -> &Arc<Frame> {
        match format {
            Format::Json => self.json.get_or_init(|| self.encode(encode_event, self.evictable())),
            // Raw subscribers cannot be told what they lose.
            Format::Raw => self.raw.get_or_init(|| self.encode(encode_raw, None)),
        }
    }

    fn encode(&self, encode: fn(&mut Vec<u8>, &str, &Message<'_>), evictable: Option<Evictable>) -> Arc<Frame> {
        let mut bytes = Vec::new();
        self.messages.iter().for_each(|message| encode(&mut bytes, self.channel, message));
        match evictable {
            Some(event) => Frame::evictable(bytes, self.messages.len(), event),
            None => Frame::bundle(bytes, self.messages.len()),
        }
    }

    /// What eviction has to know, unless slow consumers are closed.
    fn evictable(&self) -> Option<Evictable> {
        let Origin { channel, slow, before } = self.origin?;
        let newest = self.messages.last()?;
        Some(Evictable {
            channel: Arc::clone(channel),
            lane: slow.lane(newest.payload)?,
            before,
            first: self.messages.first()?.cursor,
            last: self.messages.iter().rev().find_map(|message| message.cursor),
        })
    }
}

/// A frame with an event.
fn encode_event(bytes: &mut Vec<u8>, channel: &str, message: &Message<'_>) {
    let (member, data) = data(message.payload);
    let cursor = message.cursor.map(|cursor| cursor.to_string());
    let (before, cursor) = cursor.as_deref().map_or(("", ""), |cursor| (r#"","cursor":""#, cursor));
    let parts = [r#"{"type":"event","channel":""#, channel, before, cursor, r#"",""#, member, r#"":"#, &data, "}"];
    frame::encode(bytes, Opcode::Text, &parts.map(str::as_bytes));
}

/// `{"type":"event","channel":…,"cursor":…,"data":…}` as part of another object.
pub fn event_json(channel: &str, message: &Message<'_>) -> String {
    let (member, data) = data(message.payload);
    let cursor = message.cursor.map(|cursor| format!(r#","cursor":"{cursor}""#)).unwrap_or_default();
    format!(r#"{{"type":"event","channel":"{channel}"{cursor},"{member}":{data}}}"#)
}

/// JSON byte for byte, other text as a JSON string, bytes as `data_base64`.
fn data(payload: Payload<'_>) -> (&'static str, Cow<'_, str>) {
    match payload {
        Payload::Json(text) => ("data", Cow::Borrowed(text)),
        Payload::Unchecked(bytes) => match str::from_utf8(bytes) {
            Ok(text) if is_json(text) => ("data", Cow::Borrowed(text)),
            Ok(text) => ("data", Cow::Owned(event::quoted(text))),
            Err(_) => ("data_base64", Cow::Owned(format!("\"{}\"", BASE64_STANDARD.encode(bytes)))),
        },
    }
}

fn encode_raw(bytes: &mut Vec<u8>, _channel: &str, message: &Message<'_>) {
    let payload = message.payload;
    let is_text = matches!(payload, Payload::Json(_)) || str::from_utf8(payload.bytes()).is_ok();
    frame::encode(bytes, if is_text { Opcode::Text } else { Opcode::Binary }, &[payload.bytes()]);
}

fn is_json(text: &str) -> bool {
    serde_json::from_str::<serde::de::IgnoredAny>(text).is_ok()
}
