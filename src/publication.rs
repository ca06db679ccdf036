//! A publication on its way to the subscribers, encoded at most once per wire format.

use std::borrow::Cow;
use std::cell::OnceCell;
use std::sync::Arc;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;

use crate::event;
use crate::frame::{Frame, Opcode};

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

/// One message to one channel.
pub struct Publication<'a> {
    channel: &'a str,
    payload: Payload<'a>,
    json: OnceCell<Arc<Frame>>,
    raw: OnceCell<Arc<Frame>>,
}

impl<'a> Publication<'a> {
    /// A publication of `payload` to `channel`, a valid name.
    pub fn new(channel: &'a str, payload: Payload<'a>) -> Self {
        Self { channel, payload, json: OnceCell::new(), raw: OnceCell::new() }
    }

    /// The channel's name.
    pub fn channel(&self) -> &'a str {
        self.channel
    }

    /// The frame for subscribers of the given format; made when the first one is met.
    pub fn frame(&self, format: Format) -> &Arc<Frame> {
        match format {
            Format::Json => self.json.get_or_init(|| event_frame(self.channel, self.payload)),
            Format::Raw => self.raw.get_or_init(|| raw_frame(self.payload.bytes())),
        }
    }
}

/// `{"type":"event","channel":…,"data":…}` with JSON byte for byte, other text as a JSON string, bytes as `data_base64`.
fn event_frame(channel: &str, payload: Payload<'_>) -> Arc<Frame> {
    let (member, data) = match payload {
        Payload::Json(text) => ("data", Cow::Borrowed(text)),
        Payload::Unchecked(bytes) => match str::from_utf8(bytes) {
            Ok(text) if is_json(text) => ("data", Cow::Borrowed(text)),
            Ok(text) => ("data", Cow::Owned(event::quoted(text))),
            Err(_) => ("data_base64", Cow::Owned(format!("\"{}\"", BASE64_STANDARD.encode(bytes)))),
        },
    };
    Frame::new(
        Opcode::Text,
        &[
            br#"{"type":"event","channel":""#,
            channel.as_bytes(),
            br#"",""#,
            member.as_bytes(),
            br#"":"#,
            data.as_bytes(),
            b"}",
        ],
    )
}

fn raw_frame(payload: &[u8]) -> Arc<Frame> {
    let opcode = if str::from_utf8(payload).is_ok() { Opcode::Text } else { Opcode::Binary };
    Frame::new(opcode, &[payload])
}

fn is_json(text: &str) -> bool {
    serde_json::from_str::<serde::de::IgnoredAny>(text).is_ok()
}
