//! Outgoing WebSocket frames, encoded once and shared by every outbox they wait in.
//!
//! Server frames are unmasked (RFC 6455 §5.1), so header and payload are the same bytes
//! for all subscribers: a [`Frame`] is one buffer, and a queue holds only an `Arc` of it.

use std::sync::Arc;

use crate::clock;
use crate::close::CloseReason;

/// Longest payload of a control frame (RFC 6455 §5.5).
pub const CONTROL_PAYLOAD_BYTES_MAX: usize = 125;

/// Frame types (RFC 6455 §5.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Opcode {
    /// Continuation of a fragmented message.
    Continuation = 0x0,
    /// UTF-8 text.
    Text = 0x1,
    /// Bytes.
    Binary = 0x2,
    /// Connection close.
    Close = 0x8,
    /// Ping.
    Ping = 0x9,
    /// Pong.
    Pong = 0xA,
}

/// One complete frame, ready for the socket.
#[derive(Debug)]
pub struct Frame {
    bytes: Box<[u8]>,
    /// When it was made, in microseconds of [`clock::now_us`].
    pub created_us: u64,
}

impl Frame {
    /// Builds an unfragmented frame whose payload is the given parts, one after another.
    pub fn new(opcode: Opcode, parts: &[&[u8]]) -> Arc<Self> {
        let payload_len = parts.iter().map(|part| part.len()).sum();
        // Exactly: what is spare would cost a second allocation.
        let mut bytes = Vec::with_capacity(header_len(payload_len) + payload_len);
        push_header(&mut bytes, opcode, payload_len);
        for part in parts {
            bytes.extend_from_slice(part);
        }
        Self::from_encoded(bytes)
    }

    /// A text frame.
    pub fn text(payload: &str) -> Arc<Self> {
        Self::new(Opcode::Text, &[payload.as_bytes()])
    }

    /// A close frame; an unknown code gives an empty payload (RFC 6455 §5.5.1).
    pub fn close(reason: &CloseReason) -> Arc<Self> {
        let Some(code) = reason.code() else {
            return Self::new(Opcode::Close, &[]);
        };
        let text = reason.text();
        let room = text.floor_char_boundary(CONTROL_PAYLOAD_BYTES_MAX - 2);
        Self::new(Opcode::Close, &[&code.to_be_bytes(), &text.as_bytes()[..room]])
    }

    fn from_encoded(bytes: Vec<u8>) -> Arc<Self> {
        Arc::new(Self { bytes: bytes.into_boxed_slice(), created_us: clock::now_us() })
    }

    /// Header and payload as they go over the wire.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Bytes on the wire.
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Never true: a frame has at least its header.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }
}

const FIN: u8 = 0x80;

const fn header_len(payload_len: usize) -> usize {
    match payload_len {
        0..=CONTROL_PAYLOAD_BYTES_MAX => 2,
        126..=0xFFFF => 4,
        _ => 10,
    }
}

fn push_header(bytes: &mut Vec<u8>, opcode: Opcode, payload_len: usize) {
    bytes.push(FIN | opcode as u8);
    if payload_len <= CONTROL_PAYLOAD_BYTES_MAX {
        bytes.push(payload_len as u8);
    } else if let Ok(len) = u16::try_from(payload_len) {
        bytes.push(126);
        bytes.extend_from_slice(&len.to_be_bytes());
    } else {
        bytes.push(127);
        bytes.extend_from_slice(&(payload_len as u64).to_be_bytes());
    }
}
