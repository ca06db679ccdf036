//! The frames of `hubcast.v1` that a server sends, as far as this command listens to them.

use std::borrow::Cow;
use std::fmt::Write as _;

use serde::Deserialize;
use serde_json::value::RawValue;

/// Names of one command: a frame of them stays far below `HUBCAST_MESSAGE_BYTES_MAX`.
pub(crate) const NAMES_MAX: usize = 64;

/// Any frame: what its type does not have is absent.
#[derive(Deserialize)]
pub(crate) struct Frame<'a> {
    #[serde(rename = "type", borrow)]
    pub kind: Cow<'a, str>,
    pub channel: Option<Cow<'a, str>>,
    pub cursor: Option<Cow<'a, str>>,
    pub recovered: Option<bool>,
    pub after: Option<Cow<'a, str>>,
    pub next: Option<Cow<'a, str>>,
    pub reason: Option<Cow<'a, str>>,
    pub code: Option<Cow<'a, str>>,
    pub message: Option<Cow<'a, str>>,
    pub retry_after_ms: Option<u64>,
    #[serde(borrow)]
    pub data: Option<&'a RawValue>,
}

/// The command that subscribes to channels, each after its cursor.
pub(crate) fn subscribe(channels: &[(&str, Option<&str>)]) -> String {
    let mut command = r#"{"type":"subscribe","channels":["#.to_owned();
    for (at, (channel, after)) in channels.iter().enumerate() {
        let comma = if at > 0 { "," } else { "" };
        // Names and cursors came from here or from a server's JSON; writing to a string does not fail.
        let _ = match after {
            Some(after) => {
                let (channel, after) = (serde_json::json!(channel), serde_json::json!(after));
                write!(command, r#"{comma}{{"channel":{channel},"after":{after}}}"#)
            }
            None => write!(command, "{comma}{}", serde_json::json!(channel)),
        };
    }
    command.push_str("]}");
    command
}
