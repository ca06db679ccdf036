//! Outgoing WebSocket frames, encoded once and shared by every outbox they wait in.
//!
//! Server frames are unmasked (RFC 6455 §5.1), so header and payload are the same bytes
//! for all subscribers: a [`Frame`] is one buffer, and a queue holds only an `Arc` of it. Messages
//! that are published together are bundled: still a frame each on the wire, but one entry of the queue.
//! What eviction has to know of publications is made once with them, and shared likewise.

use std::sync::Arc;

use crate::clock;
use crate::close::CloseReason;
use crate::eviction::{Border, Evictable, Loss};
use crate::ledger::Kept;

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

/// One complete frame, or a bundle of several data frames, ready for the socket.
#[derive(Debug)]
pub struct Frame {
    bytes: Kept,
    messages: u32,
    role: Role,
    /// It is of the past, and does not count against the bounds of an outbox.
    pub is_replay: bool,
    /// When it was made, in microseconds of [`clock::now_us`].
    pub created_us: u64,
}

/// What a frame is to the queue of a slow consumer.
#[derive(Debug)]
pub enum Role {
    /// It stays, and says nothing about what may go.
    Plain,
    /// It stays, and a subscription begins or ends with it, or it is an event of the past.
    Border(Border),
    /// Publications that may go.
    Event(Box<Evictable>),
    /// It tells what went.
    Gap(Box<Loss>),
}

impl Frame {
    /// Builds an unfragmented frame whose payload is the given parts, one after another.
    pub fn new(opcode: Opcode, parts: &[&[u8]]) -> Arc<Self> {
        let mut bytes = Vec::new();
        encode(&mut bytes, opcode, parts);
        Self::bundle(bytes, 1)
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

    /// A bundle of `messages` frames that are encoded already, one after another.
    pub fn bundle(bytes: Vec<u8>, messages: usize) -> Arc<Self> {
        Arc::new(Self::of(bytes, messages))
    }

    /// A text frame of what a client asked for from the past.
    pub fn replay(payload: &str) -> Arc<Self> {
        Arc::new(Self { is_replay: true, ..Self::text_of(Role::Plain, payload) })
    }

    /// The same of an event: behind it the client stands where its channel stood before the next one.
    pub fn replayed(channel: &str, payload: &str) -> Arc<Self> {
        Arc::new(Self { is_replay: true, ..Self::text_of(Role::Border(Border::of(channel)), payload) })
    }

    /// As [`Frame::bundle`], of a channel whose slow consumers lose publications.
    pub fn evictable(bytes: Vec<u8>, messages: usize, event: Evictable) -> Arc<Self> {
        Arc::new(Self { role: Role::Event(Box::new(event)), ..Self::of(bytes, messages) })
    }

    /// A text frame with which a subscription to the channel begins or ends.
    pub fn border(channel: &str, payload: &str) -> Arc<Self> {
        Arc::new(Self::text_of(Role::Border(Border::of(channel)), payload))
    }

    /// A text frame that tells a slow consumer what it lost.
    pub fn gap(payload: &str, loss: Loss) -> Arc<Self> {
        Arc::new(Self::text_of(Role::Gap(Box::new(loss)), payload))
    }

    fn text_of(role: Role, payload: &str) -> Self {
        let mut bytes = Vec::new();
        encode(&mut bytes, Opcode::Text, &[payload.as_bytes()]);
        Self { role, ..Self::of(bytes, 1) }
    }

    fn of(bytes: Vec<u8>, messages: usize) -> Self {
        let bytes = Kept::from(bytes);
        Self { bytes, messages: messages as u32, role: Role::Plain, is_replay: false, created_us: clock::now_us() }
    }

    /// What it is to the queue of a slow consumer.
    pub fn role(&self) -> &Role {
        &self.role
    }

    /// Whether it waits only as long as nothing else needs its place, or tells of what did.
    pub fn is_lossy(&self) -> bool {
        matches!(self.role, Role::Event(_) | Role::Gap(_))
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

    /// How many frames it has on the wire: more than one in a bundle.
    pub fn messages(&self) -> usize {
        self.messages as usize
    }

    /// How many of them are not completely among the first `sent` bytes.
    pub fn messages_after(&self, sent: usize) -> usize {
        self.messages() - self.ends().take_while(|end| *end <= sent).count()
    }

    /// What has to follow once `sent` bytes are out, so that the peer has whole messages: up to the end of the
    /// message that was begun. `None` at a border.
    pub fn begun(self: &Arc<Self>, sent: usize) -> Option<Arc<Self>> {
        let (mut complete, mut border) = (0, 0);
        for end in self.ends().take_while(|end| *end <= sent) {
            complete += 1;
            border = end;
        }
        if border == sent {
            return None;
        }
        if complete + 1 == self.messages() {
            return Some(Arc::clone(self));
        }
        let end = border + frame_len(&self.bytes[border..]);
        let bytes = Kept::from(self.bytes[..end].to_vec());
        let (is_replay, created_us) = (self.is_replay, self.created_us);
        Some(Arc::new(Self { bytes, messages: complete as u32 + 1, role: Role::Plain, is_replay, created_us }))
    }

    /// Where its frames end.
    fn ends(&self) -> impl Iterator<Item = usize> {
        let mut end = 0;
        (0..self.messages).map(move |_| {
            end += frame_len(&self.bytes[end..]);
            end
        })
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

/// The length of the unmasked frame at the start of `bytes`.
fn frame_len(bytes: &[u8]) -> usize {
    match bytes[1] {
        126 => 4 + usize::from(u16::from_be_bytes([bytes[2], bytes[3]])),
        127 => 10 + bytes[2..10].iter().fold(0, |len, byte| len << 8 | usize::from(*byte)),
        len => 2 + usize::from(len),
    }
}

/// Appends an unfragmented frame whose payload is the given parts, one after another.
pub fn encode(bytes: &mut Vec<u8>, opcode: Opcode, parts: &[&[u8]]) {
    let payload_len = parts.iter().map(|part| part.len()).sum();
    let len = header_len(payload_len) + payload_len;
    match bytes.is_empty() {
        // Exactly: what is spare would cost a frame alone a second allocation.
        true => bytes.reserve_exact(len),
        false => bytes.reserve(len),
    }
    push_header(bytes, opcode, payload_len);
    for part in parts {
        bytes.extend_from_slice(part);
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
