//! What everybody else sees of one WebSocket connection: its outbox, its socket's writing side and
//! its signs of life. The reading side is its own task's (`session.rs`).

use std::io::{self, IoSlice};
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::task::{Context as TaskContext, Poll};

use atomic_waker::AtomicWaker;
use parking_lot::Mutex;

use crate::behind::Backfill;
use crate::caller::{Caller, Holder};
use crate::clock;
use crate::close::CloseReason;
use crate::cursor::Cursor;
use crate::eviction::Evicted;
use crate::fanout::{Fanout, Subscriber};
use crate::frame::{Frame, Opcode};
use crate::identity::Identity;
use crate::metrics::Drop as DropReason;
use crate::outbox::{Flushed, Outbox, Phase, Push};
use crate::presence_store::Member;
use crate::publication::Format;
use crate::socket::Socket;
use crate::websocket;
use crate::writer::{Transport, Writer};

pub use crate::shared::{Connections, Shared};

/// One WebSocket connection.
#[derive(Debug)]
pub struct Connection {
    number: u64,
    remote: SocketAddr,
    holder: Holder,
    format: Format,
    socket: Socket,
    outbox: Outbox,
    waker: AtomicWaker,
    reason: OnceLock<CloseReason>,
    shared: Arc<Shared>,
    opened_us: u64,
    /// Channels that it is to leave because the backend wants it.
    asked: Mutex<Vec<Box<str>>>,
    is_asked: AtomicBool,
    /// It may be behind on a channel with history.
    is_behind: AtomicBool,
    /// Subscriptions, for the API.
    pub subscriptions: AtomicUsize,
    last_seen_us: AtomicU64,
    /// Since when a message is arriving in pieces (0: none is).
    assembling_us: AtomicU64,
    /// When the next ping goes out, and when the one that is unanswered did (0: none).
    ping_due_us: AtomicU64,
    ping_sent_us: AtomicU64,
}

static NEXT_NUMBER: AtomicU64 = AtomicU64::new(1);

/// Keeps a connection in the list of open ones, and in the metrics.
#[derive(Debug)]
pub struct Open(Arc<Connection>);

/// What a connection's own task can be woken for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wake {
    /// The connection was told to close, or its socket failed.
    Closing,
    /// The socket takes bytes again, and this task has the write right.
    Writable,
    /// There is something to read.
    Readable,
    /// The backend wants it to leave channels, or it may be told what it missed.
    Asked,
}

impl Connection {
    /// Opens a connection on an upgraded socket. The first ping is due at `ping_due_us`.
    pub fn open(
        shared: Arc<Shared>,
        socket: Socket,
        remote: SocketAddr,
        caller: Caller,
        format: Format,
        ping_due_us: u64,
    ) -> Open {
        let now_us = clock::now_us();
        let connection = Arc::new(Self {
            number: NEXT_NUMBER.fetch_add(1, Ordering::Relaxed),
            remote,
            holder: caller.into(),
            format,
            socket,
            outbox: Outbox::default(),
            waker: AtomicWaker::new(),
            reason: OnceLock::new(),
            shared,
            opened_us: now_us,
            asked: Mutex::default(),
            is_asked: AtomicBool::new(false),
            is_behind: AtomicBool::new(false),
            subscriptions: AtomicUsize::new(0),
            last_seen_us: AtomicU64::new(now_us),
            assembling_us: AtomicU64::new(0),
            ping_due_us: AtomicU64::new(ping_due_us),
            ping_sent_us: AtomicU64::new(0),
        });
        let shared = &connection.shared;
        shared.connections.insert(connection.number, Arc::clone(&connection));
        shared.register(connection.number);
        shared.metrics.connections.inc();
        shared.metrics.connections_total.inc();
        Open(connection)
    }

    /// The id that clients and the API see: unique over all instances and boots.
    pub fn id(&self) -> String {
        format!("{}-{}", self.shared.instance_id, self.number)
    }

    /// The instance and the number in an id: in lists, connections stand in this order.
    pub fn parse_id(id: &str) -> Option<(&str, u64)> {
        let (instance_id, number) = id.rsplit_once('-')?;
        Some((instance_id, number.parse().ok()?))
    }

    /// The number in this instance, in the order of opening.
    pub fn number(&self) -> u64 {
        self.number
    }

    /// The client's address as text: without a port where a proxy told none.
    pub fn remote(&self) -> String {
        if self.remote.port() == 0 { self.remote.ip().to_string() } else { self.remote.to_string() }
    }

    /// The client's address.
    pub fn address(&self) -> IpAddr {
        self.remote.ip()
    }

    /// Whose it is.
    pub fn holder(&self) -> &Holder {
        &self.holder
    }

    /// The name of the user whose it is, if it has one.
    pub fn user(&self) -> Option<&str> {
        self.holder.user()
    }

    /// It has shown a good token: from now on that counts, and other instances know whose it is.
    pub fn authenticated(&self, identity: &Arc<Identity>) {
        self.holder.take(identity);
        self.shared.register(self.number);
    }

    /// Has the own task look at its tokens for single channels, if there are any.
    pub fn recheck_grants(&self) {
        if self.holder.has_grants() {
            self.is_asked.store(true, Ordering::Release);
            self.waker.wake();
        }
    }

    /// When it was opened, in milliseconds since 1970.
    pub fn connected_at_ms(&self) -> u64 {
        clock::unix_ms(self.opened_us)
    }

    /// How long it has been open, in milliseconds.
    pub fn age_ms(&self) -> u64 {
        (clock::now_us() - self.opened_us) / 1000
    }

    /// The transport, for reading and for options.
    pub fn socket(&self) -> &Socket {
        &self.socket
    }

    /// What all connections share.
    pub fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    /// Why it was told to close, if it was.
    pub fn close_reason(&self) -> Option<&CloseReason> {
        self.reason.get()
    }

    /// Closes the connection; the first reason counts, later calls do nothing.
    pub fn close(&self, reason: CloseReason) {
        if self.reason.set(reason).is_err() {
            return;
        }
        if let Some(reason) = self.reason.get() {
            let dropped = match reason {
                CloseReason::Lost => self.outbox.fail(),
                reason => self.outbox.close(Frame::close(reason), reason.keeps_queue()),
            };
            let why = match reason {
                CloseReason::SlowConsumer => DropReason::SlowConsumer,
                _ => DropReason::ConnectionLost,
            };
            self.shared.metrics.dropped(why, dropped);
        }
        self.waker.wake();
        self.shared.lanes.made_progress();
    }

    /// Has the connection's own task leave a channel.
    pub fn ask_to_leave(&self, channel: &str) {
        let mut asked = self.asked.lock();
        if !asked.iter().any(|asked| **asked == *channel) {
            asked.push(channel.into());
        }
        drop(asked);
        self.is_asked.store(true, Ordering::Release);
        self.waker.wake();
    }

    /// For the connection's own task: whether there is something for it to look at, see [`Wake::Asked`].
    pub fn is_asked(&self) -> bool {
        self.is_asked.load(Ordering::Acquire)
    }

    /// For the connection's own task: the channels that it is to leave.
    pub fn take_asked(&self) -> Vec<Box<str>> {
        self.is_asked.store(false, Ordering::Release);
        std::mem::take(&mut *self.asked.lock())
    }

    /// For the connection's own task: where it is behind and may be told now what it missed, see [`Outbox::ask_missed`].
    pub fn ask_missed(&self) -> Vec<(Arc<str>, Cursor)> {
        if !self.is_behind.load(Ordering::Acquire) || !self.is_behind.swap(false, Ordering::AcqRel) {
            return Vec::new();
        }
        let missed = self.outbox.ask_missed(&self.shared.outbox);
        // Whoever has it fall behind meanwhile says so afterwards.
        if self.outbox.is_behind() {
            self.is_behind.store(true, Ordering::Release);
        }
        missed
    }

    /// Has the own task look whether it can be told what it missed.
    fn remind(&self) {
        if self.is_behind.load(Ordering::Relaxed) {
            self.is_asked.store(true, Ordering::Release);
            self.waker.wake();
        }
    }

    /// Ends the outbox without another byte.
    pub fn cut(&self) {
        self.shared.metrics.dropped(DropReason::ConnectionLost, self.outbox.fail());
    }

    /// Answers a ping; a flush is added to `fanout` if one is needed.
    pub fn pong(self: &Arc<Self>, payload: &[u8], fanout: &mut Fanout<Arc<Self>>) {
        if self.outbox.pong(Frame::new(Opcode::Pong, &[payload])) {
            fanout.schedule(Arc::clone(self));
        }
    }

    /// Writes what is pending. Only for the owner of the write right: a lane, or the own task on [`Wake::Writable`].
    pub fn flush(&self, writer: &mut Writer, now_us: u64) {
        match self.outbox.flush(self, writer, &self.shared.outbox, now_us) {
            Flushed::Idle => self.remind(),
            Flushed::Blocked | Flushed::Finished => self.waker.wake(),
            Flushed::Failed => {
                self.close(CloseReason::Lost);
                // It may have been closing already, and waits for its last bytes.
                self.waker.wake();
            }
        }
    }

    /// Frames and bytes that wait.
    pub fn depth(&self) -> (usize, usize) {
        self.outbox.depth()
    }

    /// Since when its socket refuses bytes, if it does.
    pub fn refused_since_us(&self) -> Option<u64> {
        self.outbox.refused_since_us()
    }

    /// Bytes of the past that it asked for and has not read.
    pub fn replay_bytes(&self) -> usize {
        self.outbox.replay_bytes()
    }

    /// Whether the socket failed or was given up.
    pub fn has_failed(&self) -> bool {
        self.outbox.phase() == Phase::Failed
    }

    /// Notes that something arrived.
    pub fn seen(&self, now_us: u64) {
        self.last_seen_us.store(now_us, Ordering::Relaxed);
    }

    /// Notes since when a message is arriving in pieces (0: none is): a peer that stops there is noticed by the sweep.
    pub fn assembles(&self, since_us: u64) {
        if self.assembling_us.load(Ordering::Relaxed) != since_us {
            self.assembling_us.store(since_us, Ordering::Relaxed);
        }
    }

    /// For the connection's own task: the next thing to do. With `may_read` false, what arrives waits.
    pub fn poll_wake(&self, context: &mut TaskContext<'_>, may_read: bool) -> Poll<Wake> {
        self.waker.register(context.waker());
        if self.reason.get().is_some() {
            return Poll::Ready(Wake::Closing);
        }
        if self.poll_writable(context).is_ready() {
            return Poll::Ready(Wake::Writable);
        }
        if may_read && self.is_asked() {
            return Poll::Ready(Wake::Asked);
        }
        if may_read && self.socket.tcp().poll_read_ready(context).is_ready() {
            return Poll::Ready(Wake::Readable);
        }
        Poll::Pending
    }

    /// For the connection's own task while it closes: flushes until the close frame is out or the socket failed.
    pub fn poll_finish(&self, context: &mut TaskContext<'_>, writer: &mut Writer) -> Poll<()> {
        loop {
            self.waker.register(context.waker());
            if matches!(self.outbox.phase(), Phase::Finished | Phase::Failed) {
                return Poll::Ready(());
            }
            if self.poll_writable(context).is_pending() {
                return Poll::Pending;
            }
            self.flush(writer, clock::now_us());
        }
    }

    /// Whether its own socket holds it up.
    pub(crate) fn is_refused(&self) -> bool {
        self.outbox.phase() == Phase::Blocked
    }

    fn poll_writable(&self, context: &mut TaskContext<'_>) -> Poll<()> {
        match self.outbox.phase() {
            Phase::Blocked => self.socket.tcp().poll_write_ready(context).map(drop),
            _ => Poll::Pending,
        }
    }

    /// One look of the sweep: closes the connection if it was silent or slow for too long, and pings it when due. If it
    /// is the gateway that `was_stopped` meanwhile, nobody was either.
    pub fn sweep(
        self: &Arc<Self>,
        (now_us, unix_ms): (u64, u64),
        was_stopped: bool,
        ping: &Arc<Frame>,
        liveness: &Liveness,
        fanout: &mut Fanout<Arc<Self>>,
    ) {
        if self.reason.get().is_some() {
            return;
        }
        if let Some(reason) = self.holder.overdue(unix_ms) {
            return self.close(reason);
        }
        if self.holder.has_old_grants(unix_ms) {
            self.recheck_grants();
        }
        if was_stopped {
            return;
        }
        if websocket::takes_too_long(self.assembling_us.load(Ordering::Relaxed), now_us) {
            return self.close(websocket::TOO_LONG);
        }
        if self.outbox.sweep(now_us, liveness.write_timeout_us) {
            return self.close(CloseReason::SlowConsumer);
        }
        self.remind();
        let ping_sent_us = self.ping_sent_us.load(Ordering::Relaxed);
        if ping_sent_us > 0 && self.last_seen_us.load(Ordering::Relaxed) >= ping_sent_us {
            self.ping_sent_us.store(0, Ordering::Relaxed);
        } else if ping_sent_us > 0 && now_us > ping_sent_us + liveness.pong_timeout_us {
            return self.close(CloseReason::Timeout);
        }
        if now_us >= self.ping_due_us.load(Ordering::Relaxed) {
            self.ping_due_us.store(now_us + liveness.ping_interval_us, Ordering::Relaxed);
            // A ping that is still unanswered keeps its own deadline.
            let _ = self.ping_sent_us.compare_exchange(0, now_us, Ordering::Relaxed, Ordering::Relaxed);
            if self.outbox.ping(Arc::clone(ping)) {
                fanout.schedule(Arc::clone(self));
            }
        }
    }
}

/// The intervals that keep connections honest.
#[derive(Debug)]
pub struct Liveness {
    /// `HUBCAST_PING_INTERVAL`
    pub ping_interval_us: u64,
    /// `HUBCAST_PONG_TIMEOUT`
    pub pong_timeout_us: u64,
    /// `HUBCAST_WRITE_TIMEOUT`
    pub write_timeout_us: u64,
}

impl Subscriber for Arc<Connection> {
    fn format(&self) -> Format {
        self.format
    }

    fn push(&self, frame: &Arc<Frame>) -> Push {
        let push = self.outbox.push(frame, &self.shared.outbox);
        let metrics = &self.shared.metrics;
        match push {
            Push::Slow => metrics.dropped(DropReason::SlowConsumer, frame.messages()),
            Push::Dropped => {
                metrics.dropped(DropReason::DropOldest, frame.messages());
                self.is_behind.store(true, Ordering::Release);
            }
            Push::Evicted(Evicted { oldest, conflated }) => {
                self.is_behind.store(true, Ordering::Release);
                metrics.dropped(DropReason::DropOldest, oldest);
                metrics.dropped(DropReason::Conflated, conflated);
            }
            Push::Queued | Push::Schedule | Push::Late | Push::Closed => {}
        }
        push
    }

    fn replay(&self, frames: &[Arc<Frame>]) -> Push {
        self.outbox.replay(frames)
    }

    fn backfill(&self, backfill: &Backfill<'_>) -> Push {
        let push = self.outbox.backfill(backfill);
        if !matches!(push, Push::Dropped | Push::Closed) {
            self.shared.metrics.backfilled.inc_by(backfill.events as u64);
        }
        push
    }

    fn has_room(&self) -> bool {
        self.outbox.has_room(&self.shared.outbox)
    }

    fn has_all(&self) -> bool {
        self.outbox.has_all()
    }

    fn entered(&self, channel: &Arc<str>) {
        self.shared.presence.enter(channel, Member::new(self.user(), &self.id()));
    }

    fn left(&self, channel: &Arc<str>) {
        self.shared.presence.leave(channel, Member::new(self.user(), &self.id()));
    }
}

impl Transport for Connection {
    fn try_write(&self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        self.socket.try_write(slices)
    }

    fn flush(&self, has_progress: &mut bool) -> io::Result<()> {
        Transport::flush(&self.socket, has_progress)
    }
}

impl std::ops::Deref for Open {
    type Target = Arc<Connection>;

    fn deref(&self) -> &Arc<Connection> {
        &self.0
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        let shared = &self.0.shared;
        shared.connections.remove(&self.0.number);
        shared.register(self.0.number);
        shared.metrics.connections.dec();
        shared.metrics.closed(self.0.reason.get().unwrap_or(&CloseReason::Internal));
    }
}
