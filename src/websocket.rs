//! The incoming half of RFC 6455: an incremental parser of client frames. Pure, no I/O.
//!
//! Bytes arrive in pieces of any size. A frame that lies whole in the piece is unmasked in
//! place and handed out without a copy; otherwise its payload is gathered as it comes, so
//! no byte is looked at twice and nothing is reserved on the word of a header alone.
//! An idle connection's parser owns no heap memory.

use std::borrow::Cow;

use crate::close::CloseReason;
use crate::frame::{CONTROL_PAYLOAD_BYTES_MAX, Opcode};

/// Most fragments of one message, where messages are at most 64 KiB: millions of empty ones would pin a connection
/// for nothing. Where larger messages are allowed, so is a fragment for each of their `FRAGMENT_BYTES`.
pub const FRAGMENTS_MAX: usize = 1024;

/// The smallest fragments in which a message of the largest size may come: what the Autobahn TestSuite sends.
const FRAGMENT_BYTES: usize = 64;

/// Longest time from a message's first byte to its last, in microseconds.
pub const ASSEMBLY_US_MAX: u64 = 30_000_000;

/// What the peer sent, complete.
#[derive(Debug, PartialEq, Eq)]
pub enum Message<'a> {
    /// A text message, checked to be UTF-8.
    Text(Cow<'a, str>),
    /// A binary message.
    Binary(Cow<'a, [u8]>),
    /// A ping with its payload.
    Ping(Cow<'a, [u8]>),
    /// A pong; the payload does not matter.
    Pong,
    /// A close frame with its code.
    Close(Option<u16>),
}

/// Parser state of one connection.
#[derive(Debug)]
pub struct Parser {
    message_bytes_max: usize,
    partial: Option<Box<Partial>>,
}

/// What is kept while something is incomplete.
#[derive(Debug, Default)]
struct Partial {
    /// Bytes of a header that is not complete yet.
    header: Vec<u8>,
    /// The frame whose payload is arriving, and how much of it has.
    frame: Option<(Header, usize)>,
    /// Payload of the control frame that is arriving.
    control: Vec<u8>,
    /// The data message so far, over all its frames.
    message: Option<Assembly>,
}

/// A data message whose end has not arrived.
#[derive(Debug)]
struct Assembly {
    text: bool,
    payload: Vec<u8>,
    /// How much of `payload` is known to be UTF-8.
    valid: usize,
    fragments: usize,
    started_us: u64,
}

#[derive(Clone, Copy, Debug)]
struct Header {
    fin: bool,
    opcode: Opcode,
    mask: [u8; 4],
    len: usize,
}

impl Parser {
    /// A parser that refuses messages above `message_bytes_max` bytes.
    pub fn new(message_bytes_max: usize) -> Self {
        Self { message_bytes_max, partial: None }
    }

    /// Bytes that are kept of what is incomplete.
    pub fn held(&self) -> usize {
        let Some(partial) = &self.partial else { return 0 };
        let message = partial.message.as_ref().map_or(0, |message| message.payload.capacity());
        size_of::<Partial>() + partial.header.capacity() + partial.control.capacity() + message
    }

    /// Since when a message is arriving in pieces (µs); 0: none is.
    pub fn assembling_since_us(&self) -> u64 {
        let message = self.partial.as_ref().and_then(|partial| partial.message.as_ref());
        message.map_or(0, |message| message.started_us)
    }

    /// Takes the next complete message from the front of `input` and advances it, or returns
    /// `None` once all of `input` is consumed. The input is unmasked in place.
    ///
    /// # Errors
    /// The close reason that answers the violation; the parser must not be used afterwards.
    pub fn next<'a>(&mut self, input: &mut &'a mut [u8], now_us: u64) -> Result<Option<Message<'a>>, CloseReason> {
        while !input.is_empty() {
            let Some((header, got)) = self.current_frame(input)? else { continue };
            if got == 0 && input.len() >= header.len {
                let payload = take_front(input, header.len);
                fastwebsockets::unmask(payload, header.mask);
                self.end_of_pieces();
                if let Some(message) = self.whole_frame(header, payload, now_us)? {
                    return Ok(Some(message));
                }
                continue;
            }
            let part_len = input.len().min(header.len - got);
            let part = take_front(input, part_len);
            let mut mask = header.mask;
            mask.rotate_left(got % 4);
            fastwebsockets::unmask(part, mask);
            if let Some(message) = self.frame_part(header, got, part, now_us)? {
                return Ok(Some(message));
            }
        }
        self.check_assembly_time(now_us)?;
        Ok(None)
    }

    /// The frame that is arriving and how much of its payload is here. `None`: the header needs more bytes.
    fn current_frame(&mut self, input: &mut &mut [u8]) -> Result<Option<(Header, usize)>, CloseReason> {
        let header = match self.partial.as_mut() {
            Some(partial) if partial.frame.is_some() => return Ok(partial.frame),
            // A header in pieces is completed byte by byte: it is at most 14 long.
            Some(partial) => {
                partial.header.push(take_front(input, 1)[0]);
                let Some((header, _)) = parse_header(&partial.header)? else { return Ok(None) };
                partial.header.clear();
                header
            }
            None => match parse_header(input)? {
                Some((header, used)) => {
                    take_front(input, used);
                    header
                }
                None => {
                    let rest = take_front(input, input.len());
                    self.partial().header.extend_from_slice(rest);
                    return Ok(None);
                }
            },
        };
        self.admit(header)?;
        if header.len > 0 && input.is_empty() {
            self.partial().frame = Some((header, 0));
            return Ok(None);
        }
        Ok(Some((header, 0)))
    }

    /// Checks a header against the message it belongs to, before any of its payload is looked at.
    fn admit(&self, header: Header) -> Result<(), CloseReason> {
        if header.opcode as u8 >= Opcode::Close as u8 {
            return Ok(());
        }
        let message = self.partial.as_ref().and_then(|partial| partial.message.as_ref());
        match (header.opcode, message) {
            (Opcode::Continuation, None) => Err(CloseReason::ProtocolError("continuation without a message")),
            (Opcode::Text | Opcode::Binary, Some(_)) => {
                Err(CloseReason::ProtocolError("new message inside a fragmented one"))
            }
            (_, Some(message)) if message.fragments >= FRAGMENTS_MAX.max(self.message_bytes_max / FRAGMENT_BYTES) => {
                Err(CloseReason::Policy("too many fragments"))
            }
            (_, message) => {
                let before = message.map_or(0, |message| message.payload.len());
                if header.len > self.message_bytes_max - before {
                    return Err(CloseReason::TooBig);
                }
                Ok(())
            }
        }
    }

    /// A frame that lay whole in the input: handed out without a copy unless it is a fragment.
    fn whole_frame<'a>(
        &mut self,
        header: Header,
        payload: &'a mut [u8],
        now_us: u64,
    ) -> Result<Option<Message<'a>>, CloseReason> {
        match header.opcode {
            Opcode::Text if header.fin => {
                let text = str::from_utf8(payload).map_err(|_| CloseReason::InvalidPayload)?;
                Ok(Some(Message::Text(Cow::Borrowed(text))))
            }
            Opcode::Binary if header.fin => Ok(Some(Message::Binary(Cow::Borrowed(payload)))),
            Opcode::Text | Opcode::Binary | Opcode::Continuation => {
                self.append(header, payload, 0, now_us)?;
                self.end_of_frame(header)
            }
            _ => control_message(header.opcode, Cow::Borrowed(payload)).map(Some),
        }
    }

    /// A piece of a frame that arrives in several.
    fn frame_part<'a>(
        &mut self,
        header: Header,
        got: usize,
        part: &[u8],
        now_us: u64,
    ) -> Result<Option<Message<'a>>, CloseReason> {
        let is_control = header.opcode as u8 >= Opcode::Close as u8;
        if is_control {
            self.partial().control.extend_from_slice(part);
        } else {
            self.append(header, part, got, now_us)?;
        }
        let got = got + part.len();
        if got < header.len {
            self.partial().frame = Some((header, got));
            return Ok(None);
        }
        if !is_control {
            self.end_of_pieces();
            return self.end_of_frame(header);
        }
        let payload = std::mem::take(&mut self.partial().control);
        self.end_of_pieces();
        control_message(header.opcode, Cow::Owned(payload)).map(Some)
    }

    /// Adds payload to the message, and checks the UTF-8 of it as far as it can be known.
    fn append(&mut self, header: Header, part: &[u8], got: usize, now_us: u64) -> Result<(), CloseReason> {
        let message = self.partial().message.get_or_insert_with(|| Assembly {
            text: header.opcode == Opcode::Text,
            payload: Vec::new(),
            valid: 0,
            fragments: 0,
            started_us: now_us,
        });
        if got == 0 {
            message.fragments += 1;
        }
        message.payload.extend_from_slice(part);
        if message.text {
            match str::from_utf8(&message.payload[message.valid..]) {
                Ok(_) => message.valid = message.payload.len(),
                Err(error) if error.error_len().is_none() => message.valid += error.valid_up_to(),
                Err(_) => return Err(CloseReason::InvalidPayload),
            }
        }
        self.check_assembly_time(now_us)
    }

    fn end_of_frame<'a>(&mut self, header: Header) -> Result<Option<Message<'a>>, CloseReason> {
        if !header.fin {
            return Ok(None);
        }
        let Some(message) = self.partial().message.take() else {
            return Ok(None);
        };
        self.end_of_pieces();
        if !message.text {
            return Ok(Some(Message::Binary(Cow::Owned(message.payload))));
        }
        let text = String::from_utf8(message.payload).map_err(|_| CloseReason::InvalidPayload)?;
        Ok(Some(Message::Text(Cow::Owned(text))))
    }

    fn check_assembly_time(&self, now_us: u64) -> Result<(), CloseReason> {
        if takes_too_long(self.assembling_since_us(), now_us) { Err(TOO_LONG) } else { Ok(()) }
    }

    fn partial(&mut self) -> &mut Partial {
        self.partial.get_or_insert_default()
    }

    /// The current frame is complete; gives the heap memory back unless its message is not.
    fn end_of_pieces(&mut self) {
        match &mut self.partial {
            Some(partial) if partial.message.is_some() => partial.frame = None,
            _ => self.partial = None,
        }
    }
}

/// Whether a message that has been arriving since then (µs; 0: there is none) has taken too long.
pub fn takes_too_long(since_us: u64, now_us: u64) -> bool {
    since_us > 0 && now_us.saturating_sub(since_us) > ASSEMBLY_US_MAX
}

/// What is answered then.
pub const TOO_LONG: CloseReason = CloseReason::Policy("message took too long to arrive");

fn control_message<'a>(opcode: Opcode, payload: Cow<'a, [u8]>) -> Result<Message<'a>, CloseReason> {
    match opcode {
        Opcode::Ping => Ok(Message::Ping(payload)),
        Opcode::Close => close_code(&payload).map(Message::Close),
        _ => Ok(Message::Pong),
    }
}

/// The code of a close frame's payload (RFC 6455 §5.5.1, §7.4).
fn close_code(payload: &[u8]) -> Result<Option<u16>, CloseReason> {
    match payload {
        [] => Ok(None),
        [_] => Err(CloseReason::ProtocolError("close code of one byte")),
        [high, low, text @ ..] => {
            let code = u16::from_be_bytes([*high, *low]);
            if !matches!(code, 1000..=1003 | 1007..=1014 | 3000..=4999) {
                return Err(CloseReason::ProtocolError("close code not allowed"));
            }
            match str::from_utf8(text) {
                Ok(_) => Ok(Some(code)),
                Err(_) => Err(CloseReason::InvalidPayload),
            }
        }
    }
}

/// Reads a client frame's header (RFC 6455 §5.2): the header and its length, or `None` if bytes are missing.
/// Violations are reported from the first byte that shows them.
fn parse_header(bytes: &[u8]) -> Result<Option<(Header, usize)>, CloseReason> {
    let Some(&first) = bytes.first() else { return Ok(None) };
    if first & 0x70 != 0 {
        return Err(CloseReason::ProtocolError("reserved bit set"));
    }
    let fin = first & 0x80 != 0;
    let opcode = match first & 0x0F {
        0x0 => Opcode::Continuation,
        0x1 => Opcode::Text,
        0x2 => Opcode::Binary,
        0x8 => Opcode::Close,
        0x9 => Opcode::Ping,
        0xA => Opcode::Pong,
        _ => return Err(CloseReason::ProtocolError("reserved opcode")),
    };
    let Some(&second) = bytes.get(1) else { return Ok(None) };
    if second & 0x80 == 0 {
        return Err(CloseReason::ProtocolError("frame is not masked"));
    }
    let short = usize::from(second & 0x7F);
    if opcode as u8 >= Opcode::Close as u8 && (!fin || short > CONTROL_PAYLOAD_BYTES_MAX) {
        return Err(CloseReason::ProtocolError("control frame fragmented or over 125 bytes"));
    }
    let (len, at) = match short {
        126 => match bytes.get(2..4) {
            Some(&[a, b]) => (u64::from(u16::from_be_bytes([a, b])), 4),
            _ => return Ok(None),
        },
        127 => match bytes.get(2..10).and_then(|field| <[u8; 8]>::try_from(field).ok()) {
            Some(field) => (u64::from_be_bytes(field), 10),
            None => return Ok(None),
        },
        short => (short as u64, 2),
    };
    let minimal = match at {
        4 => len > 125,
        10 => len > u64::from(u16::MAX) && len >> 63 == 0,
        _ => true,
    };
    if !minimal {
        return Err(CloseReason::ProtocolError("length not minimally encoded"));
    }
    // What cannot be addressed is above every limit.
    let Ok(len) = usize::try_from(len) else { return Err(CloseReason::TooBig) };
    let Some(&[a, b, c, d]) = bytes.get(at..at + 4) else { return Ok(None) };
    Ok(Some((Header { fin, opcode, mask: [a, b, c, d], len }, at + 4)))
}

fn take_front<'a>(input: &mut &'a mut [u8], len: usize) -> &'a mut [u8] {
    let (front, rest) = std::mem::take(input).split_at_mut(len);
    *input = rest;
    front
}
