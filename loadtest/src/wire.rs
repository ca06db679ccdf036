//! The least of WebSocket that a load generator needs: cheaper than any server it measures.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};

use anyhow::{Context as _, bail};

/// The channel of all measurements.
pub(crate) const CHANNEL: &str = "load";

/// What precedes a publication's data in an event frame's payload.
pub(crate) const EVENT_HEAD: &str = r#"{"type":"event","channel":"load","data":"#;

/// Digits of the sequence number, which is the first thing in the data: `{"s":"0000000042",…`.
const SEQUENCE: std::ops::Range<usize> = EVENT_HEAD.len() + 6..EVENT_HEAD.len() + 16;

/// Data of exactly `len` bytes (at least 30) that carries a sequence number.
pub(crate) fn data(sequence: u64, len: usize) -> String {
    let mut data = format!(r#"{{"s":"{sequence:010}","p":""#);
    data.extend(std::iter::repeat_n('x', len.saturating_sub(data.len() + 2)));
    data.push_str("\"}");
    data
}

/// The sequence number of an event's payload, if it is one of ours.
pub(crate) fn sequence(payload: &[u8]) -> Option<u64> {
    if !payload.starts_with(EVENT_HEAD.as_bytes()) {
        return None;
    }
    payload.get(SEQUENCE)?.iter().try_fold(0, |number, digit| Some(number * 10 + u64::from(digit.checked_sub(b'0')?)))
}

/// A publish command as a masked frame; the mask is zero, which RFC 6455 allows and costs nothing.
pub(crate) fn publish(sequence: u64, len: usize) -> Vec<u8> {
    let command = format!(r#"{{"type":"publish","channel":"{CHANNEL}","data":{}}}"#, data(sequence, len));
    frame(command.as_bytes(), true)
}

/// A text frame.
pub(crate) fn frame(payload: &[u8], is_masked: bool) -> Vec<u8> {
    let mask_bit = if is_masked { 0x80 } else { 0 };
    let mut frame = vec![0x81];
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

/// Connects, upgrades and waits until `expected` (part of a frame) has arrived; returns the socket, non-blocking.
pub(crate) fn connect(addr: SocketAddr, path: &str, expected: &str) -> anyhow::Result<TcpStream> {
    let mut socket = TcpStream::connect(addr).with_context(|| format!("cannot connect to {addr}"))?;
    socket.set_nodelay(true)?;
    write!(
        socket,
        "GET {path} HTTP/1.1\r\nHost: {addr}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
         Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    )?;
    let mut seen = Vec::new();
    let mut buffer = [0; 2048];
    while !seen.windows(expected.len()).any(|window| window == expected.as_bytes()) {
        let len = socket.read(&mut buffer)?;
        if len == 0 {
            bail!("refused: {}", String::from_utf8_lossy(&seen).lines().next().unwrap_or_default());
        }
        seen.extend(&buffer[..len]);
    }
    socket.set_nonblocking(true)?;
    Ok(socket)
}
