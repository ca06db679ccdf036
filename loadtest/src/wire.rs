//! The least of WebSocket that a load generator needs: cheaper than any server it measures.
//!
//! Every publication carries its sequence number in its channel and the time at which it was due, so any
//! process on this machine can check order and latency from the bytes alone.

/// What precedes the channel's number in an event frame's payload.
const EVENT_HEAD: &[u8] = br#"{"type":"event","channel":"load-"#;

/// Digits of a channel number, a sequence number and a time: fixed, so that nothing has to be searched.
const CHANNEL_DIGITS: usize = 6;
const SEQUENCE_DIGITS: usize = 10;
const DUE_DIGITS: usize = 15;

/// The length of a channel's name.
pub(crate) const CHANNEL_BYTES: usize = "load-".len() + CHANNEL_DIGITS;

/// What precedes the sequence number, and what comes between it and the time.
const DATA_HEAD: &[u8] = br#""data":{"s":""#;
const DUE_HEAD: &[u8] = br#"","t":""#;

/// The least data that carries a publication's numbers.
pub(crate) const PAYLOAD_BYTES_MIN: usize = 56;

/// The name of channel `index`.
pub(crate) fn channel(index: usize) -> String {
    format!("load-{index:06}")
}

/// Data of exactly `len` bytes (at least [`PAYLOAD_BYTES_MIN`]).
pub(crate) fn data(sequence: u64, due_us: u64, len: usize) -> String {
    let mut data = format!(r#"{{"s":"{sequence:010}","t":"{due_us:015}","p":""#);
    data.extend(std::iter::repeat_n('x', len.saturating_sub(data.len() + 2)));
    data.push_str("\"}");
    data
}

/// What a delivered event says about itself.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Event {
    pub channel: usize,
    pub sequence: u64,
    pub due_us: u64,
}

/// Reads an event frame's payload; none if it is another frame, or not one of ours.
pub(crate) fn event(payload: &[u8]) -> Option<Event> {
    let rest = payload.strip_prefix(EVENT_HEAD)?;
    let (channel, rest) = rest.split_at_checked(CHANNEL_DIGITS)?;
    let rest = match rest.strip_prefix(b"\",").and_then(|rest| rest.strip_prefix(DATA_HEAD)) {
        Some(rest) => rest,
        // With history on, a cursor stands in between.
        None => &rest[rest.windows(DATA_HEAD.len()).position(|window| window == DATA_HEAD)? + DATA_HEAD.len()..],
    };
    let (sequence, rest) = rest.split_at_checked(SEQUENCE_DIGITS)?;
    let (due, _) = rest.strip_prefix(DUE_HEAD)?.split_at_checked(DUE_DIGITS)?;
    Some(Event { channel: number(channel)? as usize, sequence: number(sequence)?, due_us: number(due)? })
}

fn number(digits: &[u8]) -> Option<u64> {
    let mut number = 0;
    for digit in digits {
        let digit = digit.wrapping_sub(b'0');
        if digit > 9 {
            return None;
        }
        number = number * 10 + u64::from(digit);
    }
    Some(number)
}

/// A text frame. The mask is zero, which RFC 6455 allows and costs nothing.
pub(crate) fn frame(payload: &[u8], is_masked: bool) -> Vec<u8> {
    frame_of(0x81, payload, is_masked)
}

/// A frame that begins with `first`.
pub(crate) fn frame_of(first: u8, payload: &[u8], is_masked: bool) -> Vec<u8> {
    let mask_bit = if is_masked { 0x80 } else { 0 };
    let mut frame = Vec::with_capacity(payload.len() + 14);
    frame.push(first);
    match payload.len() {
        len @ 0..=125 => frame.push(mask_bit | len as u8),
        len @ 126..=0xFFFF => {
            frame.push(mask_bit | 126);
            frame.extend((len as u16).to_be_bytes());
        }
        len => {
            frame.push(mask_bit | 127);
            frame.extend((len as u64).to_be_bytes());
        }
    }
    if is_masked {
        frame.extend([0; 4]);
    }
    frame.extend(payload);
    frame
}

/// Splits the first complete frame off: its first byte, its payload, the rest.
pub(crate) fn split_frame(bytes: &[u8]) -> Option<(u8, &[u8], &[u8])> {
    let (&[first, second], rest) = bytes.split_first_chunk()?;
    let (len, rest) = match second & 0x7F {
        126 => rest.split_first_chunk().map(|(len, rest)| (usize::from(u16::from_be_bytes(*len)), rest))?,
        127 => rest.split_first_chunk().map(|(len, rest)| (u64::from_be_bytes(*len) as usize, rest))?,
        short => (usize::from(short), rest),
    };
    let rest = if second & 0x80 == 0 { rest } else { rest.get(4..)? };
    let (payload, rest) = rest.split_at_checked(len)?;
    Some((first, payload, rest))
}

/// The head of a request that upgrades, with a token if there is one to show.
pub(crate) fn upgrade(host: &str, path: &str, token: Option<&str>) -> Vec<u8> {
    let authorization = token.map(|token| format!("Authorization: Bearer {token}\r\n")).unwrap_or_default();
    format!(
        "GET {path} HTTP/1.1\r\nHost: {host}\r\n{authorization}Connection: Upgrade\r\nUpgrade: websocket\r\n\
         Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    )
    .into_bytes()
}

/// The seconds of an HTTP head's `Retry-After`.
pub(crate) fn retry_after(head: &[u8]) -> Option<u64> {
    let head = str::from_utf8(head).ok()?.to_ascii_lowercase();
    head.lines().find_map(|line| line.strip_prefix("retry-after:")?.trim().parse().ok())
}

/// Splits an HTTP head off: its status, the rest. None: it is not complete.
pub(crate) fn split_head(bytes: &[u8]) -> Option<(u16, &[u8], &[u8])> {
    let end = bytes.windows(4).position(|window| window == b"\r\n\r\n")?;
    let status = bytes.get(9..12).and_then(number).unwrap_or(0) as u16;
    Some((status, &bytes[..end], &bytes[end + 4..]))
}
