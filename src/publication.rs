//! A publication on its way to the subscribers, encoded at most once per wire format.

use std::borrow::Cow;
use std::cell::OnceCell;
use std::sync::Arc;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;

use crate::event;
use crate::frame::{self, Frame, Opcode};

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

/// One message to one channel, or several that arrived together and are pushed as a bundle.
pub struct Publication<'a> {
    channel: &'a str,
    payloads: &'a [Payload<'a>],
    json: OnceCell<Arc<Frame>>,
    raw: OnceCell<Arc<Frame>>,
}

impl<'a> Publication<'a> {
    /// A publication of `payloads` to `channel`, a valid name.
    pub fn new(channel: &'a str, payloads: &'a [Payload<'a>]) -> Self {
        Self { channel, payloads, json: OnceCell::new(), raw: OnceCell::new() }
    }

    /// The channel's name.
    pub fn channel(&self) -> &'a str {
        self.channel
    }

    /// How many messages it has.
    pub fn messages(&self) -> usize {
        self.payloads.len()
    }

    /// The frame for subscribers of the given format; made when the first one is met.
    pub fn frame(&self, format: Format) -> &Arc<Frame> {
        match format {
            Format::Json => self.json.get_or_init(|| self.encode(encode_event)),
            Format::Raw => self.raw.get_or_init(|| self.encode(encode_raw)),
        }
    }

    fn encode(&self, encode: fn(&mut Vec<u8>, &str, Payload<'_>)) -> Arc<Frame> {
        let mut bytes = Vec::new();
        self.payloads.iter().for_each(|payload| encode(&mut bytes, self.channel, *payload));
        Frame::bundle(bytes, self.payloads.len())
    }
}

/// `{"type":"event","channel":…,"data":…}` with JSON byte for byte, other text as a JSON string, bytes as `data_base64`.
fn encode_event(bytes: &mut Vec<u8>, channel: &str, payload: Payload<'_>) {
    let (member, data) = match payload {
        Payload::Json(text) => ("data", Cow::Borrowed(text)),
        Payload::Unchecked(bytes) => match str::from_utf8(bytes) {
            Ok(text) if is_json(text) => ("data", Cow::Borrowed(text)),
            Ok(text) => ("data", Cow::Owned(event::quoted(text))),
            Err(_) => ("data_base64", Cow::Owned(format!("\"{}\"", BASE64_STANDARD.encode(bytes)))),
        },
    };
    frame::encode(
        bytes,
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
    );
}

fn encode_raw(bytes: &mut Vec<u8>, _channel: &str, payload: Payload<'_>) {
    let is_text = matches!(payload, Payload::Json(_)) || str::from_utf8(payload.bytes()).is_ok();
    frame::encode(bytes, if is_text { Opcode::Text } else { Opcode::Binary }, &[payload.bytes()]);
}

fn is_json(text: &str) -> bool {
    serde_json::from_str::<serde::de::IgnoredAny>(text).is_ok()
}
