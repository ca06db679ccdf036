//! What each fuzz target does with its bytes: no panic, and the same as a slow reference says.
//!
//! `tests/it/fuzz.rs` runs them on the stable compiler, over `fuzz/corpus` and what proptest makes of it;
//! `fuzz/fuzz_targets` hands them to cargo-fuzz.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;
use hubcast::channel::Wish;
use hubcast::cursor::Cursor;
use hubcast::event;
use hubcast::fanout::{Fanout, Subscriber};
use hubcast::frame::Frame;
use hubcast::hub::{Hub, Subscriptions};
use hubcast::outbox::{Limits, Push};
use hubcast::protocol::{self, Command};
use hubcast::publication::{Format, Payload};
use hubcast::rules::ChannelRules;
use hubcast::websocket::{Message, Parser};
use hubcast::{control, handshake, history_redis, presence_store};

/// What is done with the bytes.
type Target = fn(&[u8]);

/// All targets by the names of their corpora.
pub const TARGETS: [(&str, Target); 7] = [
    ("frames", frames),
    ("handshake", handshake),
    ("commands", commands),
    ("cursor", cursor),
    ("envelope", envelope),
    ("channel_name", channel_name),
    ("subscriptions", subscriptions),
];

type Seen = (u8, Vec<u8>);

/// The first byte says how the rest is cut and how long messages may be: whatever the cuts, the parser sees what a
/// parser sees that has everything at once.
pub fn frames(bytes: &[u8]) {
    let Some((&seed, stream)) = bytes.split_first() else { return };
    let limit = 1 << (seed & 0x0F);
    let mut cut = usize::from(seed >> 4) + 1;
    let mut copy = stream.to_vec();
    let mut parser = Parser::new(limit);
    let (mut seen, mut ended) = (Vec::new(), None);
    let mut rest = copy.as_mut_slice();
    while !rest.is_empty() && ended.is_none() {
        let (mut piece, after) = rest.split_at_mut(cut.min(rest.len()));
        rest = after;
        // Pieces of changing lengths, the same for the same seed.
        cut = cut * 5 % 97 + 1;
        loop {
            match parser.next(&mut piece, 1) {
                Ok(Some(message)) => seen.push(flat(&message)),
                Ok(None) => break,
                Err(reason) => {
                    ended = reason.code();
                    break;
                }
            }
        }
    }
    assert_eq!((seen, ended), reference(stream, limit));
}

fn flat(message: &Message<'_>) -> Seen {
    match message {
        Message::Text(text) => (1, text.as_bytes().to_vec()),
        Message::Binary(bytes) => (2, bytes.to_vec()),
        Message::Close(code) => (8, code.map(u16::to_be_bytes).into_iter().flatten().collect()),
        Message::Ping(payload) => (9, payload.to_vec()),
        Message::Pong => (10, Vec::new()),
    }
}

/// RFC 6455 as its sections 5.2 to 5.6 and 7.4 say it, over a whole stream: messages, and the code that ends it.
fn reference(stream: &[u8], limit: usize) -> (Vec<Seen>, Option<u16>) {
    let mut seen = Vec::new();
    let mut message: Option<(u8, Vec<u8>, usize)> = None;
    let mut at = 0;
    loop {
        let frame = match header(&stream[at..]) {
            Ok(Some(frame)) => frame,
            Ok(None) => return (seen, None),
            Err(code) => return (seen, Some(code)),
        };
        let (fin, opcode, mask, len, used) = frame;
        if opcode < 8 {
            let before = message.as_ref().map_or(0, |(_, payload, _)| payload.len());
            match (&message, opcode) {
                (None, 0) | (Some(_), 1 | 2) => return (seen, Some(1002)),
                (Some((_, _, fragments)), 0) if *fragments >= 1024 => return (seen, Some(1008)),
                _ if len > (limit - before) as u64 => return (seen, Some(1009)),
                _ => {}
            }
        }
        at += used;
        let here = &stream[at..stream.len().min(at.saturating_add(len as usize))];
        let payload: Vec<u8> = here.iter().enumerate().map(|(index, byte)| byte ^ mask[index % 4]).collect();
        let is_complete = here.len() as u64 == len;
        at += here.len();
        if opcode >= 8 {
            if !is_complete {
                return (seen, None);
            }
            match control(opcode, &payload) {
                Ok(control) => seen.push(control),
                Err(code) => return (seen, Some(code)),
            }
            continue;
        }
        let (kind, whole, fragments) = message.get_or_insert_with(|| (opcode, Vec::new(), 0));
        whole.extend(payload);
        *fragments += 1;
        let utf8 = str::from_utf8(whole);
        let is_bad = utf8.is_err_and(|error| error.error_len().is_some() || fin && is_complete);
        if *kind == 1 && is_bad {
            return (seen, Some(1007));
        }
        if !is_complete {
            return (seen, None);
        }
        if fin {
            seen.extend(message.take().map(|(kind, whole, _)| (kind, whole)));
        }
    }
}

type Header = (bool, u8, [u8; 4], u64, usize);

fn header(bytes: &[u8]) -> Result<Option<Header>, u16> {
    let Some(&first) = bytes.first() else { return Ok(None) };
    let (fin, opcode) = (first & 0x80 != 0, first & 0x0F);
    if first & 0x70 != 0 || !matches!(opcode, 0..=2 | 8..=10) {
        return Err(1002);
    }
    let Some(&second) = bytes.get(1) else { return Ok(None) };
    let short = second & 0x7F;
    if second & 0x80 == 0 || opcode >= 8 && (!fin || short > 125) {
        return Err(1002);
    }
    let extended = match short {
        126 => 2,
        127 => 8,
        _ => 0,
    };
    if bytes.len() < 2 + extended {
        return Ok(None);
    }
    let number = bytes[2..2 + extended].iter().fold(0_u64, |number, byte| number << 8 | u64::from(*byte));
    let len = if extended == 0 { u64::from(short) } else { number };
    if extended == 2 && len < 126 || extended == 8 && !(65_536..1 << 63).contains(&len) {
        return Err(1002);
    }
    let used = 2 + extended + 4;
    let Some(mask) = bytes.get(used - 4..used) else { return Ok(None) };
    Ok(Some((fin, opcode, [mask[0], mask[1], mask[2], mask[3]], len, used)))
}

fn control(opcode: u8, payload: &[u8]) -> Result<Seen, u16> {
    match (opcode, payload) {
        (9, payload) => Ok((9, payload.to_vec())),
        (10, _) => Ok((10, Vec::new())),
        (_, []) => Ok((8, Vec::new())),
        (_, [_]) => Err(1002),
        (_, [high, low, text @ ..]) => {
            let code = u16::from_be_bytes([*high, *low]);
            if !matches!(code, 1000..=1003 | 1007..=1014 | 3000..=4999) {
                return Err(1002);
            }
            str::from_utf8(text).map(|_| (8, vec![*high, *low])).map_err(|_| 1007)
        }
    }
}

/// The bytes of a request, through the server's HTTP to the check of the handshake.
pub fn handshake(bytes: &[u8]) {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let answer = runtime.block_on(async {
        let (mut client, server) = tokio::io::duplex(1 << 20);
        let service = hyper::service::service_fn(|mut request| async move {
            let origins = hubcast::origin::Origins::default();
            let answer = match handshake::check(&mut request, false, &origins) {
                Ok(accepted) => accepted.response,
                Err(_) => {
                    let mut refused = hyper::Response::new(http_body_util::Full::default());
                    *refused.status_mut() = hyper::StatusCode::IM_A_TEAPOT;
                    refused
                }
            };
            Ok::<_, std::io::Error>(answer)
        });
        let io = hyper_util::rt::TokioIo::new(server);
        let mut builder = hyper::server::conn::http1::Builder::new();
        builder.max_buf_size(16 << 10).half_close(false);
        let serving = async { drop(builder.serve_connection(io, service).with_upgrades().await) };
        let asking = async {
            let _ = client.write_all(bytes).await;
            let _ = client.shutdown().await;
            let mut answer = Vec::new();
            let _ = client.read_to_end(&mut answer).await;
            answer
        };
        tokio::join!(asking, serving).0
    });
    if answer.starts_with(b"HTTP/1.1 101") {
        let request = String::from_utf8_lossy(bytes).to_lowercase();
        assert!(request.trim_start().starts_with("get /ws"), "{request}");
        for needed in ["upgrade", "websocket", "sec-websocket-key", "sec-websocket-version"] {
            assert!(request.contains(needed), "accepted without {needed}: {request}");
        }
    }
}

/// Every frame of text has at least one answer, and what a command carries is what it may carry.
pub fn commands(bytes: &[u8]) {
    let Ok(text) = str::from_utf8(bytes) else { return };
    let mut requests = 0;
    protocol::parse(text, |request| {
        requests += 1;
        if let Some(id) = request.id {
            let id: serde_json::Value = serde_json::from_str(id).expect("an id is JSON");
            assert!(id.is_string() || id.is_number());
        }
        match request.command {
            Ok(Command::Publish { channel, data }) => {
                assert!(protocol::check_channel_name(&channel).is_ok());
                serde_json::from_str::<serde::de::IgnoredAny>(data).expect("data is JSON");
                assert!(text.contains(data), "byte for byte");
            }
            Ok(Command::Subscribe(targets) | Command::Unsubscribe(targets)) => {
                assert!(!targets.is_empty());
                for target in targets.into_iter().flatten() {
                    assert!(protocol::check_channel_name(&target.channel).is_ok());
                }
            }
            Ok(Command::History { channel, .. } | Command::Presence { channel, .. }) => {
                assert!(protocol::check_channel_name(&channel).is_ok());
            }
            Ok(_) => {}
            Err(refusal) => assert!(refusal.message.len() <= 200 && !refusal.message.is_empty()),
        }
    });
    assert!(requests > 0, "{text:?} has no answer");
}

/// What is read as a cursor is written so again; what cannot be one is none.
pub fn cursor(bytes: &[u8]) {
    let part = |text: &str| {
        let is_number = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
        is_number
            && (text == "0" || !text.starts_with('0'))
            && text.len() <= 16
            && text.parse::<u64>().is_ok_and(|n| n < 1 << 53)
    };
    let is_cursor = str::from_utf8(bytes).is_ok_and(|text| {
        let parts: Vec<_> = text.split('-').collect();
        parts.len() == 2 && parts.iter().all(|text| part(text))
    });
    let parsed = Cursor::parse_bytes(bytes);
    assert_eq!(parsed.is_some(), is_cursor, "{bytes:?}");
    if let Some(cursor) = parsed {
        assert_eq!(cursor.to_string().as_bytes(), bytes);
        let next = cursor.next(0, u64::MAX);
        assert!(next > cursor);
    }
}

/// All that is read from Redis Pub/Sub: entries of history, events of presence, envelopes of instances.
pub fn envelope(bytes: &[u8]) {
    let message = Bytes::copy_from_slice(bytes);
    if let Some(entry) = history_redis::parse_envelope(&message) {
        assert!(history_redis::is_envelope(bytes));
        if let hubcast::history_store::Content::Event(payload) = entry.content {
            assert!(bytes.ends_with(&payload));
        }
    }
    let _ = presence_store::Event::parse(bytes);
    let _ = control::read(bytes);
}

/// The rule as design section 4 says it, byte by byte.
pub fn channel_name(bytes: &[u8]) {
    let Ok(name) = str::from_utf8(bytes) else { return };
    let allowed = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-.:/@#=,;";
    let is_name = (1..=255).contains(&name.len())
        && name.chars().all(|letter| allowed.contains(letter))
        && !(name.len() >= 2 && &name.as_bytes()[..2] == b"__");
    assert_eq!(protocol::check_channel_name(name).is_ok(), is_name, "{name:?}");
}

/// A subscriber that counts.
#[derive(Clone, Default)]
struct Counter(Arc<AtomicUsize>);

impl Subscriber for Counter {
    fn format(&self) -> Format {
        Format::Json
    }

    fn push(&self, frame: &Arc<Frame>) -> Push {
        self.0.fetch_add(frame.messages(), Ordering::Relaxed);
        Push::Queued
    }

    fn replay(&self, frames: &[Arc<Frame>]) -> Push {
        frames.iter().fold(Push::Queued, |_, frame| self.push(frame))
    }

    fn has_room(&self) -> bool {
        true
    }

    fn has_all(&self) -> bool {
        true
    }
}

/// Each byte is an operation on the table of subscriptions; sets in a `HashMap` say what must be the case.
pub fn subscriptions(bytes: &[u8]) {
    const CLIENTS: usize = 8;
    let hub = Hub::local(ChannelRules::default(), Limits { messages: 1024, bytes: 1 << 20 });
    let new_client = || {
        let counter = Counter::default();
        (counter.clone(), Subscriptions::new(Arc::clone(&hub), counter))
    };
    let mut clients: Vec<_> = (0..CLIENTS).map(|_| new_client()).collect();
    let mut expected = [0; CLIENTS];
    let mut model: HashMap<String, BTreeSet<usize>> = HashMap::new();
    let mut fanout = Fanout::default();
    for operation in bytes {
        let (what, who, channel) = (operation >> 6, usize::from(operation >> 3 & 7), format!("c{}", operation & 7));
        match what {
            0 => {
                let wish = Wish { id: None, after: None };
                clients[who].1.subscribe(&channel, Some(wish), &mut fanout);
                expected[who] += 1;
                model.entry(channel).or_default().insert(who);
            }
            1 => {
                let reply = event::unsubscribed(None, &channel);
                clients[who].1.unsubscribe(&channel, &reply, &mut fanout);
                expected[who] += 1;
                model.entry(channel).or_default().remove(&who);
            }
            2 => {
                hub.gather(&channel, Payload::Json("1").into(), &mut fanout);
                hub.channel(&channel).inspect(|channel| channel.deliver(&mut fanout));
                model.get(&channel).into_iter().flatten().for_each(|who| expected[*who] += 1);
            }
            _ => {
                clients[who] = new_client();
                expected[who] = 0;
                for members in model.values_mut() {
                    members.remove(&who);
                }
            }
        }
        model.retain(|_, members| !members.is_empty());
        assert_eq!(hub.len(), model.len(), "channels that have somebody");
        for (who, (counter, subscriptions)) in clients.iter().enumerate() {
            assert_eq!(counter.0.load(Ordering::Relaxed), expected[who], "client {who}");
            assert_eq!(subscriptions.len(), model.values().filter(|members| members.contains(&who)).count());
        }
    }
    drop(clients);
    assert_eq!(hub.len(), 0, "everybody has left, and channels are left behind");
}
