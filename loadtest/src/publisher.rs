//! The publishers: a socket, the HTTP API or Redis, pipelined and never waited for.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::SocketAddr;

use anyhow::{Context as _, bail};
use clap::ValueEnum;
use mio::{Interest, Registry, Token};

use crate::machine::now_us;
use crate::stream::Stream;
use crate::wire;

/// How publications reach the gateway.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Via {
    /// `publish` commands on a WebSocket
    Socket,
    /// `POST /api/publish/{channel}`
    Http,
    /// `PUBLISH` at Redis
    Redis,
}

/// Where publishers connect to.
#[derive(Clone, Debug)]
pub(crate) struct Destination {
    pub via: Via,
    pub addr: SocketAddr,
    pub is_tls: bool,
    pub redis_prefix: String,
    pub api_key: Option<String>,
    pub token: Option<String>,
}

/// A group of publishers that take turns.
pub(crate) struct Publishers {
    destination: Destination,
    links: Vec<Link>,
    token_base: usize,
    channels: usize,
    payload: usize,
    published: u64,
    buffer: Vec<u8>,
}

struct Link {
    socket: Stream,
    /// What the socket did not take yet.
    unsent: Vec<u8>,
    /// An answer that is not complete yet.
    input: Vec<u8>,
    is_ready: bool,
}

impl Publishers {
    /// Begins to connect `count` publishers.
    pub(crate) fn connect(
        destination: Destination,
        count: usize,
        token_base: usize,
        channels: usize,
        payload: usize,
        registry: &Registry,
    ) -> anyhow::Result<Self> {
        let request = match destination.via {
            Via::Socket => wire::upgrade(&destination.addr.to_string(), "/ws", destination.token.as_deref()),
            Via::Http | Via::Redis => Vec::new(),
        };
        let mut links = Vec::with_capacity(count);
        for at in 0..count {
            let mut socket = Stream::open(destination.addr, &request, destination.is_tls).context("a publisher")?;
            registry.register(&mut socket.tcp, Token(token_base + at), Interest::READABLE | Interest::WRITABLE)?;
            let is_ready = destination.via != Via::Socket;
            links.push(Link { socket, unsent: Vec::new(), input: Vec::new(), is_ready });
        }
        Ok(Self { destination, links, token_base, channels, payload, published: 0, buffer: vec![0; 1 << 16] })
    }

    /// Whether all can publish.
    pub(crate) fn is_ready(&self) -> bool {
        self.links.iter().all(|link| link.is_ready)
    }

    /// How many publications there were.
    pub(crate) fn published(&self) -> u64 {
        self.published
    }

    /// Queues the next publication; channels and publishers take turns.
    pub(crate) fn publish(&mut self, due_us: u64) {
        let channels = self.channels as u64;
        let channel = wire::channel((self.published % channels) as usize);
        let data = wire::data(self.published / channels, due_us, self.payload);
        let link = (self.published % self.links.len() as u64) as usize;
        let message = match self.destination.via {
            Via::Socket => {
                let command = format!(r#"{{"type":"publish","channel":"{channel}","data":{data}}}"#);
                wire::frame(command.as_bytes(), true)
            }
            Via::Http => {
                let key = self.destination.api_key.as_ref().map(|key| format!("X-API-Key: {key}\r\n"));
                let (addr, len) = (self.destination.addr, data.len());
                format!(
                    "POST /api/publish/{channel} HTTP/1.1\r\nHost: {addr}\r\n{}Content-Length: {len}\r\n\r\n{data}",
                    key.unwrap_or_default()
                )
                .into_bytes()
            }
            Via::Redis => {
                let channel = format!("{}{channel}", self.destination.redis_prefix);
                let (name_len, len) = (channel.len(), data.len());
                format!("*3\r\n$7\r\nPUBLISH\r\n${name_len}\r\n{channel}\r\n${len}\r\n{data}\r\n").into_bytes()
            }
        };
        self.links[link].unsent.extend(message);
        self.published += 1;
    }

    /// Sends what the sockets take; true if something is left.
    pub(crate) fn flush(&mut self) -> anyhow::Result<bool> {
        let mut is_left = false;
        for link in self.links.iter_mut().filter(|link| !link.unsent.is_empty()) {
            let mut sent = 0;
            while sent < link.unsent.len() {
                match link.socket.write(&link.unsent[sent..]) {
                    Ok(len) => sent += len,
                    Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                    Err(error) => return Err(error).context("a publisher's connection"),
                }
            }
            link.unsent.drain(..sent);
            is_left |= !link.unsent.is_empty();
        }
        Ok(is_left)
    }

    /// Reads the answers of the publisher of `token`; false if the token belongs to somebody else.
    pub(crate) fn ready(&mut self, token: Token) -> anyhow::Result<bool> {
        let at = token.0.checked_sub(self.token_base).filter(|at| *at < self.links.len());
        let Some(link) = at.map(|at| &mut self.links[at]) else { return Ok(false) };
        loop {
            match link.socket.read(&mut self.buffer) {
                Ok(0) => bail!("a publisher's connection ended: {}", String::from_utf8_lossy(&link.input)),
                Ok(len) => link.input.extend(&self.buffer[..len]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => return Err(error).context("a publisher's connection"),
            }
        }
        let rest = match self.destination.via {
            Via::Socket => link.check_frames()?,
            Via::Http => check_responses(&link.input)?,
            Via::Redis => check_replies(&link.input)?,
        };
        let used = link.input.len() - rest;
        link.input.drain(..used);
        Ok(true)
    }
}

impl Link {
    /// Checks what came; returns how many bytes are left over.
    fn check_frames(&mut self) -> anyhow::Result<usize> {
        let mut rest = self.input.as_slice();
        if !self.is_ready {
            let Some((status, head, frames)) = wire::split_head(rest) else { return Ok(rest.len()) };
            if status != 101 {
                bail!("the publisher was refused: {}", String::from_utf8_lossy(head));
            }
            self.is_ready = true;
            rest = frames;
        }
        while let Some((first, payload, after)) = wire::split_frame(rest) {
            rest = after;
            if first == 0x89 {
                self.unsent.extend(wire::frame_of(0x8A, payload, true));
            } else if first == 0x88 || payload.starts_with(br#"{"type":"error""#) {
                bail!("the server refuses: {}", String::from_utf8_lossy(payload));
            }
        }
        Ok(rest.len())
    }
}

fn check_responses(mut rest: &[u8]) -> anyhow::Result<usize> {
    while let Some((status, head, body)) = wire::split_head(rest) {
        let head = String::from_utf8_lossy(head).to_ascii_lowercase();
        let len = head.lines().find_map(|line| line.strip_prefix("content-length:")).unwrap_or("0").trim().parse()?;
        let Some((body, after)) = body.split_at_checked(len) else { break };
        if status != 200 {
            bail!("the server refuses: {status} {}", String::from_utf8_lossy(body));
        }
        rest = after;
    }
    Ok(rest.len())
}

fn check_replies(mut rest: &[u8]) -> anyhow::Result<usize> {
    while let Some(end) = rest.iter().position(|byte| *byte == b'\n') {
        if rest[0] == b'-' {
            bail!("Redis refuses: {}", String::from_utf8_lossy(&rest[..end]));
        }
        rest = &rest[end + 1..];
    }
    Ok(rest.len())
}

/// The schedule of one run.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pace {
    /// Publications a second, on a schedule fixed beforehand; none: a closed loop.
    pub rate: Option<f64>,
    /// Publications in flight, in a closed loop.
    pub window: u64,
    started_us: u64,
    sent: u64,
}

impl Pace {
    /// A schedule that is not started yet.
    pub(crate) fn new(rate: Option<f64>, window: u64) -> Self {
        Self { rate, window, started_us: now_us(), sent: 0 }
    }

    /// The same schedule, from now.
    pub(crate) fn start(mut self) -> Self {
        self.started_us = now_us();
        self.sent = 0;
        self
    }

    /// When the next publication is due, given how many are in flight; none: not before another has arrived.
    pub(crate) fn due_us(&self, in_flight: u64, now_us: u64) -> Option<u64> {
        match self.rate {
            Some(rate) => Some(self.started_us + (self.sent as f64 * 1e6 / rate) as u64),
            None => (in_flight < self.window).then_some(now_us),
        }
    }

    /// One more was sent.
    pub(crate) fn sent(&mut self) {
        self.sent += 1;
    }
}
