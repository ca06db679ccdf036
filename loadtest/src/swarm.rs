//! The subscribers: many connections on one thread, every delivery checked.

use std::collections::VecDeque;
use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{IpAddr, SocketAddr};

use anyhow::{Context as _, bail};
use hdrhistogram::Histogram;
use mio::net::TcpStream;
use mio::{Interest, Registry, Token};
use serde::{Deserialize, Serialize};
use socket2::{Domain, Socket, Type};

use crate::flights::Flights;
use crate::machine::now_us;
use crate::stream::Stream;
use crate::tally::{Tally, histogram};
use crate::wire;

/// One read takes at most this much.
const READ_BYTES: usize = 1 << 20;

/// Connects that are begun before what has arrived is taken: some 3 ms.
const CONNECTS_A_TURN: usize = 64;

/// Who subscribes to what.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Plan {
    pub addr: SocketAddr,
    pub is_tls: bool,
    pub token: Option<String>,
    /// Local addresses to connect from, in turn; each has its own 28,000 ports. None: the system's choice.
    pub sources: Vec<IpAddr>,
    /// The number of the first connection, how many there are, and the step to the next.
    pub first: usize,
    pub connections: usize,
    pub stride: usize,
    /// Channels in all, and subscriptions of each connection.
    pub channels: usize,
    pub subscriptions: usize,
    /// Connects under way at once.
    pub connecting_max: usize,
    /// Whether publications of a channel have one publisher, and so a known order.
    pub is_ordered: bool,
}

/// A group of subscribers.
pub(crate) struct Swarm {
    plan: Plan,
    connections: Vec<Connection>,
    /// Connections of this group have the tokens that follow.
    token_base: usize,
    waiting: VecDeque<usize>,
    /// Those who were told to come later, and when.
    later: Vec<(u64, usize)>,
    connecting: usize,
    live: usize,
    /// How often somebody was told to come later.
    pub sent_away: u64,
    /// From the beginning of a connect to its last subscription, in microseconds.
    pub connect_us: Histogram<u64>,
    /// Why connections failed before they were live.
    pub failures: Vec<String>,
    pub tally: Tally,
    /// Subscriptions of each channel in this group.
    receivers: Vec<u32>,
    flights: Flights,
    buffer: Vec<u8>,
}

#[derive(Debug)]
struct Connection {
    socket: Option<Stream>,
    /// When its connect began.
    began_us: u64,
    state: State,
    /// Bytes of a frame that is not complete yet.
    tail: Vec<u8>,
    subscriptions: Box<[Subscription]>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Closed,
    Connecting,
    Upgrading,
    /// This many subscriptions are not confirmed yet.
    Subscribing(usize),
    Live,
}

#[derive(Clone, Copy, Debug, Default)]
struct Subscription {
    /// The sequence number that comes next, where the order is known.
    next: u64,
    /// A digest of the order of all that came, where it is not.
    order: u64,
}

impl Swarm {
    /// Nobody connected yet.
    pub(crate) fn new(plan: Plan, token_base: usize, interval_us: u64) -> Self {
        let mut receivers = vec![0; plan.channels];
        let connections = (0..plan.connections).map(|at| {
            for slot in 0..plan.subscriptions {
                receivers[plan.channel(at, slot)] += 1;
            }
            Connection {
                socket: None,
                began_us: 0,
                state: State::Closed,
                tail: Vec::new(),
                subscriptions: vec![Subscription::default(); plan.subscriptions].into(),
            }
        });
        let connections = connections.collect();
        Self {
            waiting: (0..plan.connections).collect(),
            connections,
            token_base,
            later: Vec::new(),
            connecting: 0,
            live: 0,
            sent_away: 0,
            connect_us: histogram(),
            failures: Vec::new(),
            tally: Tally::new(now_us(), interval_us),
            receivers,
            flights: Flights::default(),
            buffer: vec![0; READ_BYTES],
            plan,
        }
    }

    /// How many are connected and have all their subscriptions.
    pub(crate) fn live(&self) -> usize {
        self.live
    }

    /// Whether nobody is still on the way.
    pub(crate) fn is_settled(&self) -> bool {
        self.waiting.is_empty() && self.later.is_empty() && self.connecting == 0
    }

    /// Receivers of the channel that has fewest.
    pub(crate) fn receivers_min(&self) -> u32 {
        self.receivers.iter().copied().min().unwrap_or(0)
    }

    /// How many publications have reached everybody here, all before them included.
    pub(crate) fn completed(&self) -> u64 {
        self.flights.completed()
    }

    /// Starts as many connects as may be under way, a few at a time.
    pub(crate) fn connect_more(&mut self, registry: &Registry) -> anyhow::Result<()> {
        let turn_us = now_us();
        for (_, at) in self.later.extract_if(.., |(due_us, _)| *due_us <= turn_us) {
            self.waiting.push_back(at);
        }
        for _ in self.connecting..self.plan.connecting_max.min(self.connecting + CONNECTS_A_TURN) {
            let Some(at) = self.waiting.pop_front() else { break };
            let began_us = now_us();
            let number = self.plan.first + at * self.plan.stride;
            let source = (!self.plan.sources.is_empty()).then(|| self.plan.sources[number % self.plan.sources.len()]);
            let socket = connect(self.plan.addr, source).with_context(|| format!("connection {number}"))?;
            let mut socket = Stream::new(socket, self.plan.addr, self.plan.is_tls)?;
            registry.register(&mut socket.tcp, Token(self.token_base + at), Interest::READABLE | Interest::WRITABLE)?;
            self.connections[at].socket = Some(socket);
            self.connections[at].began_us = began_us;
            self.connections[at].state = State::Connecting;
            self.connecting += 1;
        }
        Ok(())
    }

    /// Cuts every connection and lets all of them come back.
    pub(crate) fn drop_all(&mut self) {
        for (at, connection) in self.connections.iter_mut().enumerate() {
            if connection.state == State::Live {
                connection.socket = None;
                connection.state = State::Closed;
                connection.tail = Vec::new();
                self.waiting.push_back(at);
                self.live -= 1;
            }
        }
    }

    /// Takes whatever the socket of `token` has; false if the token belongs to somebody else.
    pub(crate) fn ready(&mut self, token: Token, registry: &Registry) -> anyhow::Result<bool> {
        let Some(at) = token.0.checked_sub(self.token_base).filter(|at| *at < self.connections.len()) else {
            return Ok(false);
        };
        match self.connections[at].state {
            State::Closed => {}
            State::Connecting => self.upgrade(at, registry)?,
            _ => self.receive(at),
        }
        Ok(true)
    }

    fn upgrade(&mut self, at: usize, registry: &Registry) -> anyhow::Result<()> {
        let Some(socket) = &mut self.connections[at].socket else { return Ok(()) };
        match socket.tcp.peer_addr() {
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::NotConnected && socket.tcp.take_error()?.is_none() => {
                return Ok(());
            }
            Err(error) => {
                self.end(at, &format!("connect: {error}"));
                return Ok(());
            }
        }
        socket.tcp.set_nodelay(true)?;
        let names: Vec<_> =
            (0..self.plan.subscriptions).map(|slot| wire::channel(self.plan.channel(at, slot))).collect();
        let path = format!("/ws?channels={}", names.join(","));
        let request = wire::upgrade(&self.plan.addr.to_string(), &path, self.plan.token.as_deref());
        // A fresh socket takes a whole request.
        if !matches!(socket.write(&request), Ok(len) if len == request.len()) {
            self.end(at, "the request was not taken");
            return Ok(());
        }
        // A TLS handshake that writes more than a fresh socket takes is none of ours.
        registry.reregister(&mut socket.tcp, Token(self.token_base + at), Interest::READABLE)?;
        self.connections[at].state = State::Upgrading;
        Ok(())
    }

    fn receive(&mut self, at: usize) {
        loop {
            let connection = &mut self.connections[at];
            let Some(socket) = &mut connection.socket else { return };
            let kept = connection.tail.len();
            if self.buffer.len() < kept + READ_BYTES {
                self.buffer.resize(kept + READ_BYTES, 0);
            }
            self.buffer[..kept].copy_from_slice(&connection.tail);
            let len = match socket.read(&mut self.buffer[kept..]) {
                Ok(0) => return self.end(at, "closed without a close frame"),
                Ok(len) => len,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(error) => return self.end(at, &error.to_string()),
            };
            let buffer = std::mem::take(&mut self.buffer);
            let rest = self.take_bytes(at, &buffer[..kept + len]);
            let tail = &mut self.connections[at].tail;
            tail.clear();
            tail.extend(rest);
            if tail.is_empty() && tail.capacity() > READ_BYTES {
                *tail = Vec::new();
            }
            let is_drained = len < buffer.len() - kept;
            self.buffer = buffer;
            if is_drained {
                return;
            }
        }
    }

    /// Takes all that is complete; returns the rest.
    fn take_bytes<'a>(&mut self, at: usize, mut bytes: &'a [u8]) -> &'a [u8] {
        if self.connections[at].state == State::Upgrading {
            let Some((status, head, rest)) = wire::split_head(bytes) else { return bytes };
            if let Some(seconds) = wire::retry_after(head).filter(|_| matches!(status, 429 | 503)) {
                self.send_away(at, seconds);
                return &[];
            }
            if status != 101 {
                self.end(at, &format!("refused with {status}"));
                return &[];
            }
            self.connections[at].state = State::Subscribing(self.plan.subscriptions);
            bytes = rest;
        }
        let now_us = now_us();
        while let Some((first, payload, rest)) = wire::split_frame(bytes) {
            bytes = rest;
            match wire::event(payload) {
                Some(event) => self.deliver(at, &event, now_us),
                None => self.other_frame(at, first, payload),
            }
        }
        self.flights.advance(&self.receivers);
        bytes
    }

    /// It comes back at some moment of the second after the one it was told.
    fn send_away(&mut self, at: usize, seconds: u64) {
        let connection = &mut self.connections[at];
        (connection.state, connection.socket) = (State::Closed, None);
        self.connecting -= 1;
        self.sent_away += 1;
        self.later.push((now_us() + seconds * 1_000_000 + at as u64 * 7_919 % 1_000_000, at));
    }

    fn deliver(&mut self, at: usize, event: &wire::Event, now_us: u64) {
        let channels = self.plan.channels;
        let slot = (event.channel + channels - self.plan.channel(at, 0)) % channels;
        let Some(subscription) = self.connections[at].subscriptions.get_mut(slot) else { return };
        if !self.plan.is_ordered {
            subscription.order = subscription.order.rotate_left(5) ^ event.sequence.wrapping_mul(0x9E37_79B9_7F4A_7C15);
        } else if event.sequence < subscription.next {
            self.tally.repeated += 1;
            return;
        } else {
            self.tally.lost += event.sequence - subscription.next;
            subscription.next = event.sequence + 1;
        }
        self.tally.deliver(now_us, event.due_us);
        self.flights.saw(event.sequence * channels as u64 + event.channel as u64);
    }

    fn other_frame(&mut self, at: usize, first: u8, payload: &[u8]) {
        match first {
            0x88 => {
                let code = payload.first_chunk().map_or(1005, |code| u16::from_be_bytes(*code));
                let reason = String::from_utf8_lossy(payload.get(2..).unwrap_or_default()).into_owned();
                self.end(at, &format!("{code} {reason}"));
            }
            0x89 => {
                if let Some(socket) = &mut self.connections[at].socket {
                    // A pong that a full socket refuses is one that the server does not miss: bytes are on their way.
                    let _ = socket.write(&wire::frame_of(0x8A, payload, true));
                }
            }
            _ if payload.starts_with(br#"{"type":"subscribed""#) => self.subscribed(at),
            _ if payload.starts_with(br#"{"type":"error""#) => {
                self.end(at, &String::from_utf8_lossy(payload));
            }
            _ => {}
        }
    }

    fn subscribed(&mut self, at: usize) {
        if let State::Subscribing(missing) = self.connections[at].state {
            self.connections[at].state = State::Subscribing(missing - 1);
            if missing == 1 {
                self.connections[at].state = State::Live;
                let took_us = now_us().saturating_sub(self.connections[at].began_us);
                let _ = self.connect_us.record(took_us);
                self.connecting -= 1;
                self.live += 1;
            }
        }
    }

    fn end(&mut self, at: usize, reason: &str) {
        let connection = &mut self.connections[at];
        match std::mem::replace(&mut connection.state, State::Closed) {
            State::Closed => {}
            State::Live => {
                self.live -= 1;
                *self.tally.ended.entry(reason.to_owned()).or_default() += 1;
            }
            _ => {
                self.connecting -= 1;
                self.failures.push(reason.to_owned());
            }
        }
        connection.socket = None;
        connection.tail = Vec::new();
    }

    /// Starts a new tally.
    pub(crate) fn begin(&mut self, interval_us: u64) {
        self.tally = Tally::new(now_us(), interval_us);
    }

    /// Ends a run after `published` publications in all: what has not come is lost.
    pub(crate) fn finish(&mut self, published: u64) {
        if self.plan.is_ordered {
            for (at, connection) in self.connections.iter_mut().enumerate() {
                for (slot, subscription) in connection.subscriptions.iter_mut().enumerate() {
                    let of_channel = sequence_after(published, self.plan.channel(at, slot), self.plan.channels);
                    self.tally.lost += of_channel.saturating_sub(subscription.next);
                    subscription.next = of_channel;
                }
            }
        } else {
            self.tally.lost += self.flights.missing(published, &self.receivers);
            self.tally.repeated += self.order_breaks();
        }
        self.flights = Flights::after(published);
    }

    /// Subscribers that saw a channel in another order than its first subscriber.
    fn order_breaks(&self) -> u64 {
        let mut orders = vec![None; self.plan.channels];
        let mut breaks = 0;
        for (at, connection) in self.connections.iter().enumerate().filter(|(_, it)| it.state == State::Live) {
            for (slot, subscription) in connection.subscriptions.iter().enumerate() {
                let first = orders[self.plan.channel(at, slot)].get_or_insert(subscription.order);
                breaks += u64::from(*first != subscription.order);
            }
        }
        breaks
    }
}

impl Plan {
    /// The channel of a connection's subscription.
    fn channel(&self, at: usize, slot: usize) -> usize {
        ((self.first + at * self.stride) * self.subscriptions + slot) % self.channels
    }
}

/// How many of the first `published` publications, dealt out in turn, went to a channel.
fn sequence_after(published: u64, channel: usize, channels: usize) -> u64 {
    published.saturating_sub(channel as u64).div_ceil(channels as u64)
}

/// Begins a connect.
fn connect(addr: SocketAddr, source: Option<IpAddr>) -> anyhow::Result<TcpStream> {
    let Some(source) = source else { return Ok(TcpStream::connect(addr)?) };
    if source.is_ipv4() != addr.is_ipv4() {
        bail!("{source} cannot reach {addr}");
    }
    let socket = Socket::new(Domain::for_address(addr), Type::STREAM, None)?;
    socket.set_nonblocking(true)?;
    socket.bind(&SocketAddr::new(source, 0).into()).with_context(|| format!("no local address {source}"))?;
    match socket.connect(&addr.into()) {
        Ok(()) => {}
        Err(error) if error.raw_os_error() == Some(rustix::io::Errno::INPROGRESS.raw_os_error()) => {}
        Err(error) => return Err(error.into()),
    }
    Ok(TcpStream::from_std(socket.into()))
}
