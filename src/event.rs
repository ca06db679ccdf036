//! What the server says in `hubcast.v1`, one function per frame type. Pure, no I/O.
//!
//! Member order and names are the wire contract (README, "Protocol"). Channel names consist of
//! characters that JSON does not escape; everything else from outside goes through serde_json.

use std::sync::Arc;

use crate::cursor::Cursor;
use crate::eviction::Loss;
use crate::frame::Frame;
use crate::history_view::{Gap, Start};
use crate::presence_store::{self, Event};
use crate::protocol::{CHANNEL_BYTES_MAX, ErrorCode, Refusal};
use crate::publication::{self, Message};

/// What a client is told about its connection, first of all.
pub struct Welcome<'a> {
    /// This connection, as `/api/connections` and `/api/disconnect` name it.
    pub connection_id: &'a str,
    /// The gateway instance.
    pub instance_id: &'a str,
    /// How often the gateway pings, in milliseconds.
    pub ping_interval_ms: u64,
    /// Largest message the client may send, in bytes.
    pub message_bytes_max: usize,
    /// Largest payload of a publish, in bytes.
    pub publish_bytes_max: usize,
    /// Most subscriptions of the connection.
    pub subscriptions_max: usize,
    /// Whether it has shown a token; `None` where nobody has to.
    pub authentication: Option<Option<Authenticated<'a>>>,
}

/// What a client is told of its token.
pub struct Authenticated<'a> {
    /// Whose it is.
    pub user: Option<&'a str>,
    /// How long it is good for, in milliseconds.
    pub expires_in_ms: u64,
}

impl Authenticated<'_> {
    fn members(&self) -> String {
        let user = self.user.map_or_else(String::new, |user| format!(r#","user":{}"#, quoted(user)));
        format!(r#"{user},"expires_in_ms":{}"#, self.expires_in_ms)
    }
}

/// `{"type":"welcome",…}`
pub fn welcome(welcome: &Welcome<'_>) -> Arc<Frame> {
    let authentication = match &welcome.authentication {
        None => String::new(),
        Some(None) => r#","authenticated":false"#.to_owned(),
        Some(Some(authenticated)) => format!(r#","authenticated":true{}"#, authenticated.members()),
    };
    Frame::text(&format!(
        r#"{{"type":"welcome","connection_id":"{}","instance_id":"{}","ping_interval_ms":{},"limits":{{"message_bytes":{},"publish_bytes":{},"subscriptions":{}}}{authentication}}}"#,
        welcome.connection_id,
        welcome.instance_id,
        welcome.ping_interval_ms,
        welcome.message_bytes_max,
        welcome.publish_bytes_max,
        welcome.subscriptions_max,
    ))
}

/// `{"type":"subscribed",…}`; on a channel with history with where the client stands.
pub fn subscribed(id: Option<&str>, channel: &str, start: Option<&Start>) -> Arc<Frame> {
    let mut json = begun("subscribed", id, Some(channel));
    if let Some(start) = start {
        json.push_str(&format!(r#","cursor":"{}","recovered":{}"#, start.cursor, start.recovered));
    }
    json.push('}');
    Frame::border(channel, &json)
}

/// `{"type":"unsubscribed",…}`, the answer to a command.
pub fn unsubscribed(id: Option<&str>, channel: &str) -> Arc<Frame> {
    Frame::border(channel, &format!("{}}}", begun("unsubscribed", id, Some(channel))))
}

/// `{"type":"authenticated",…}`; without anything where nobody has to.
pub fn authenticated(id: Option<&str>, authenticated: Option<&Authenticated<'_>>) -> Arc<Frame> {
    let members = authenticated.map(Authenticated::members).unwrap_or_default();
    ended_object(begun("authenticated", id, None) + &members)
}

/// `{"type":"unsubscribed",…}` without a command: the backend wants it, or it is not granted any more.
pub fn ended(channel: &str, reason: &str) -> Arc<Frame> {
    let json = format!(r#"{{"type":"unsubscribed","channel":"{channel}","reason":"{reason}"}}"#);
    Frame::border(channel, &json)
}

/// `{"type":"published",…}`
pub fn published(id: &str, cursor: Option<Cursor>) -> Arc<Frame> {
    let mut json = begun("published", Some(id), None);
    if let Some(cursor) = cursor {
        json.push_str(&format!(r#","cursor":"{cursor}""#));
    }
    ended_object(json)
}

/// `{"type":"pong",…}`
pub fn pong(id: Option<&str>) -> Arc<Frame> {
    ended_object(begun("pong", id, None))
}

/// `{"type":"gap",…}`: continuity broke before this frame.
pub fn gap(channel: &str, gap: &Gap) -> Arc<Frame> {
    Frame::text(&gap_json(channel, gap))
}

/// `{"type":"gap",…}` for one client alone: what it was too slow for.
pub fn lost(loss: Loss) -> Arc<Frame> {
    Frame::gap(&gap_json(&loss.channel, &loss.gap), loss)
}

/// The same as part of another object.
pub fn gap_json(channel: &str, gap: &Gap) -> String {
    let mut json = begun("gap", None, Some(channel));
    for (member, cursor) in [("after", gap.after), ("next", gap.next)] {
        if let Some(cursor) = cursor {
            json.push_str(&format!(r#","{member}":"{cursor}""#));
        }
    }
    json.push_str(&format!(r#","reason":"{}"}}"#, gap.reason.as_str()));
    json
}

/// `{"type":"event",…}` of the past: it does not count against the outbox.
pub fn replayed(channel: &str, message: &Message<'_>) -> Arc<Frame> {
    Frame::replayed(channel, &publication::event_json(channel, message))
}

/// `{"type":"history",…}`; `members` are those of the object, as JSON.
pub fn history(id: Option<&str>, members: &str) -> Arc<Frame> {
    Frame::replay(&with_members("history", id, members))
}

/// `{"type":"join",…}` or `{"type":"leave",…}` with a `user`, or the `connection_id` of one without.
pub fn presence_event(channel: &str, event: &Event) -> Arc<Frame> {
    let (kind, identity) = match event {
        Event::Join(identity) => ("join", identity),
        Event::Leave(identity) => ("leave", identity),
    };
    let (member, who) = match presence_store::user_of(identity) {
        Some(user) => ("user", user),
        None => ("connection_id", presence_store::connection_of(identity)),
    };
    Frame::text(&format!(r#"{{"type":"{kind}","channel":"{channel}","{member}":{}}}"#, quoted(who)))
}

/// `{"type":"presence",…}`; `members` are those of the object, as JSON.
pub fn presence(id: Option<&str>, members: &str) -> Arc<Frame> {
    Frame::text(&with_members("presence", id, members))
}

fn with_members(kind: &str, id: Option<&str>, members: &str) -> String {
    let json = begun(kind, id, None);
    format!("{json},{members}}}")
}

/// `{"type":"draining",…}`: a planned close follows.
pub fn draining(retry_after_ms: u64) -> Arc<Frame> {
    Frame::text(&format!(r#"{{"type":"draining","retry_after_ms":{retry_after_ms}}}"#))
}

/// `{"type":"error",…}`; `channel` may be anything the client wrote.
pub fn error(id: Option<&str>, refusal: &Refusal, channel: Option<&str>) -> Arc<Frame> {
    let mut json = String::from(r#"{"type":"error""#);
    push_id(&mut json, id);
    json.push_str(&format!(r#","code":"{}","message":{}"#, refusal.code.as_str(), quoted(&refusal.message)));
    if let Some(channel) = channel.filter(|channel| !channel.is_empty()) {
        let shown = &channel[..channel.floor_char_boundary(CHANNEL_BYTES_MAX)];
        json.push_str(&format!(r#","channel":{}"#, quoted(shown)));
    }
    if let Some(retry_after_ms) = refusal.retry_after_ms {
        json.push_str(&format!(r#","retry_after_ms":{retry_after_ms}"#));
    }
    if refusal.code == ErrorCode::OutcomeUnknown {
        json.push_str(r#","outcome":"unknown""#);
    }
    ended_object(json)
}

/// The first members of an object.
fn begun(kind: &str, id: Option<&str>, channel: Option<&str>) -> String {
    let mut json = format!(r#"{{"type":"{kind}""#);
    push_id(&mut json, id);
    if let Some(channel) = channel {
        json.push_str(r#","channel":""#);
        json.push_str(channel);
        json.push('"');
    }
    json
}

fn ended_object(mut json: String) -> Arc<Frame> {
    json.push('}');
    Frame::text(&json)
}

/// The id is JSON text already, kept as the client wrote it.
fn push_id(json: &mut String, id: Option<&str>) {
    if let Some(id) = id {
        json.push_str(r#","id":"#);
        json.push_str(id);
    }
}

/// A string as JSON.
pub fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}
