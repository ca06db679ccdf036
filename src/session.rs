//! The life of one WebSocket connection, in its own task: read, carry out commands, close.
//!
//! The task waits with no buffer of its own; bytes are read into the worker's and carried out at
//! once. It stops reading while publishing has to wait (a subscriber that is late, a full queue to
//! Redis), but goes on writing its own outbox and answering a close: two clients that publish to
//! each other cannot lock each other up.

use std::cell::RefCell;
use std::io;
use std::panic::AssertUnwindSafe;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use futures_util::FutureExt as _;
use tracing::debug;

use crate::admission::Admission;
use crate::allowance::{Allowance, Allowances};
use crate::broker::Broker;
use crate::clock;
use crate::close::CloseReason;
use crate::connection::{Connection, Open, Wake};
use crate::ending;
use crate::event::{self, Welcome};
use crate::fanout::Fanout;
use crate::frame::{Frame, Opcode};
use crate::handshake::Mode;
use crate::hub::Subscriptions;
use crate::ledger::Arriving;
use crate::metrics::Limited;
use crate::pass::{Pass, Verified};
use crate::protocol::{self, Command, Request};
use crate::publication::Format;
use crate::publisher::{self, Job};
use crate::rules::ChannelRules;
use crate::websocket::{Message, Parser};
use crate::writer::Writer;

/// Bytes read at once.
pub(crate) const READ_BYTES: usize = 64 << 10;

/// A connection that sent so much at once lets others have their turn.
const TURN_BYTES: usize = 16 << 10;

/// A turn ends after so much work, in publishes: a quarter of what a lane writes at once, so that many who flood
/// together hold up a publication little.
const TURN_WORK: usize = 256;

/// Whatever else a client sends counts as so many publishes, which are only put in their order.
pub(crate) const FRAME_WORK: usize = 4;

/// What a connection may hold of what is arriving, however much that is in all.
const TRIFLE_BYTES: usize = 4 << 10;

/// Commands (and channels of their lists) that one frame may carry: their answers must fit into an outbox.
const ANSWERS_MAX: usize = 4096;

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::new(Scratch::default());
}

/// What a worker needs while it serves one connection, shared by all that it serves.
struct Scratch {
    read: Box<[u8]>,
    writer: Writer,
}

impl Default for Scratch {
    fn default() -> Self {
        Self { read: vec![0; READ_BYTES].into(), writer: Writer::default() }
    }
}

/// What the sessions of a gateway share.
#[derive(Debug)]
pub struct SessionContext {
    /// Where publications go.
    pub broker: Arc<Broker>,
    /// Who may publish where.
    pub rules: ChannelRules,
    /// `HUBCAST_MESSAGE_BYTES_MAX`
    pub message_bytes_max: usize,
    /// `HUBCAST_SUBSCRIPTIONS_MAX`
    pub subscriptions_max: usize,
    /// What a connection may do.
    pub allowances: Allowances,
    /// Who is let in.
    pub admission: Arc<Admission>,
    /// `HUBCAST_PING_INTERVAL`, for the welcome.
    pub ping_interval: Duration,
}

/// How a session ended, for the drain's summary.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// Drained: everything accepted and our close frame went out, and the peer ended the connection.
    Flushed,
    /// Drained, but lost or cut before that.
    CutOff,
    /// It ended for another reason than a drain.
    Other,
}

/// One connection's task.
pub struct Session {
    pub(crate) connection: Open,
    pub(crate) context: Arc<SessionContext>,
    pub(crate) subscriptions: Subscriptions<Arc<Connection>>,
    parser: Parser,
    /// What it holds of bytes that are not carried out yet, in the ledger.
    arriving: Arriving,
    pub(crate) allowance: Allowance,
    /// Who it is; without authentication there is none.
    pub(crate) pass: Option<Box<Pass>>,
    /// When what is carried out now was read.
    pub(crate) batch_us: u64,
    /// How long not to read, because it sent too much.
    rest: Duration,
    /// What it did in this turn.
    pub(crate) work: usize,
    is_echo: bool,
    /// What it is to begin with.
    mode: Option<Mode>,
    /// Answers that the current frame may still have.
    pub(crate) answers_left: usize,
    /// Read but not carried out yet: publishing has to wait.
    backlog: Vec<u8>,
    /// Subscribers that are late; while there are any, nothing is read.
    late: Vec<Arc<Connection>>,
    /// Publishes that the queue to Redis had no room for.
    pub(crate) unqueued: Vec<Job>,
}

impl Session {
    /// A session on an open connection. `backlog` is what arrived right behind the upgrade request. Boxed, since the
    /// future of [`Session::run`] holds it twice.
    pub fn new(
        connection: Open,
        context: Arc<SessionContext>,
        (pass, allowance): (Option<Pass>, Allowance),
        backlog: &[u8],
        mode: Mode,
    ) -> Box<Self> {
        let hub = Arc::clone(&context.broker.hub);
        Box::new(Self {
            subscriptions: Subscriptions::new(hub, Arc::clone(&connection)),
            parser: Parser::new(context.message_bytes_max),
            connection,
            context,
            arriving: Arriving::default(),
            allowance,
            pass: pass.map(Box::new),
            batch_us: clock::now_us(),
            rest: Duration::ZERO,
            work: 0,
            is_echo: mode == Mode::Echo,
            mode: Some(mode),
            answers_left: ANSWERS_MAX,
            backlog: backlog.to_vec(),
            late: Vec::new(),
            unqueued: Vec::new(),
        })
    }

    /// Serves the connection until it ends. A panic is the end of this connection alone, and its peer is told.
    pub async fn run(mut self: Box<Self>) -> End {
        if AssertUnwindSafe(self.serve()).catch_unwind().await.is_err() {
            self.connection.shared().metrics.panics.inc();
            self.connection.close(CloseReason::Internal);
        }
        // From here on nothing is delivered to this connection, and it holds nothing while it waits for its peer.
        let (connection, _pass) = self.end();
        let is_clean = Box::pin(ending::finish(&connection)).await;
        let reason = connection.close_reason();
        debug!(connection = connection.id(), reason = reason.map(CloseReason::label), "disconnected");
        match reason {
            Some(CloseReason::Drain) if is_clean => End::Flushed,
            Some(CloseReason::Drain) => End::CutOff,
            _ => End::Other,
        }
    }

    /// What is left of it until the connection has ended: that still counts as its user's.
    fn end(self: Box<Self>) -> (Open, Option<Box<Pass>>) {
        (self.connection, self.pass)
    }

    async fn serve(&mut self) {
        debug!(connection = self.connection.id(), remote = %self.connection.remote(), "connected");
        if let Some(mode) = self.mode.take() {
            self.start(&mode);
        }
        loop {
            if self.is_stalled() || !self.backlog.is_empty() {
                Box::pin(self.pause()).await;
            }
            match std::future::poll_fn(|context| self.connection.poll_wake(context, true)).await {
                Wake::Closing => break,
                Wake::Writable => {
                    self.flush();
                    self.catch_up();
                }
                // Much at once: whoever this batch scheduled is flushed before the next one is read.
                Wake::Readable if self.read() => {
                    tokio::task::yield_now().await;
                    self.work = 0;
                }
                Wake::Readable => {}
                Wake::Asked => {
                    self.leave_asked();
                    self.catch_up();
                }
            }
        }
    }

    fn start(&mut self, mode: &Mode) {
        let mut fanout = Fanout::default();
        // Whoever revoked its token during the handshake has looked for it before it was to be seen.
        self.check_revoked();
        match mode {
            Mode::Json(channels) => {
                let shared = self.connection.shared();
                let welcome = event::welcome(&Welcome {
                    connection_id: &self.connection.id(),
                    instance_id: &shared.instance_id,
                    ping_interval_ms: self.context.ping_interval.as_millis() as u64,
                    message_bytes_max: self.context.message_bytes_max,
                    publish_bytes_max: self.context.broker.publish_bytes_max,
                    subscriptions_max: self.context.subscriptions_max,
                    authentication: self.pass.as_ref().map(|pass| pass.authenticated()),
                });
                self.reply(&welcome, &mut fanout);
                match self.pass.as_mut().filter(|pass| pass.is_stranger()) {
                    Some(stranger) => stranger.want(channels),
                    None => self.subscribe_all(channels, &mut fanout),
                }
            }
            Mode::Raw(channel) if self.is_channel_too_many(channel) => {
                self.connection.shared().metrics.limited(Limited::Channels);
                self.connection.close(CloseReason::Overload("too many channels on this instance"));
            }
            Mode::Raw(_) if let Some((limit, message)) = self.allowance.refuses_subscription() => {
                self.connection.shared().metrics.limited(limit);
                self.connection.close(CloseReason::Overload(message));
            }
            Mode::Raw(channel) => {
                self.subscriptions.subscribe(channel, None, &mut fanout);
                self.note_subscriptions();
            }
            Mode::Echo => {}
        }
        let backlog = std::mem::take(&mut self.backlog);
        self.settle(fanout, backlog);
    }

    /// Subscribes to channels that were named without a command.
    pub(crate) fn subscribe_all(&mut self, channels: &[String], fanout: &mut Fanout<Arc<Connection>>) {
        let targets = channels.iter().map(|name| protocol::target(name.as_str().into())).collect();
        let command = Ok(Command::Subscribe(targets));
        if !channels.is_empty() {
            self.execute(Request { id: None, command }, fanout);
        }
    }

    /// Publishing waits: for subscribers that are late, or for room in the queue to Redis. Or everything does: as it was
    /// too much, or until it is known who it is.
    fn is_stalled(&self) -> bool {
        let is_verifying = self.pass.as_ref().is_some_and(|pass| pass.is_verifying());
        !self.late.is_empty() || !self.unqueued.is_empty() || !self.rest.is_zero() || is_verifying
    }

    /// Gives others their turn and waits until publishing can go on, writing the own outbox meanwhile;
    /// then carries out the backlog.
    async fn pause(&mut self) {
        let broker = Arc::clone(&self.context.broker);
        while self.is_stalled() || !self.backlog.is_empty() {
            let late = std::mem::take(&mut self.late);
            let unqueued = std::mem::take(&mut self.unqueued);
            let rest = std::mem::take(&mut self.rest);
            let shown = self.pass.as_mut().and_then(|pass| pass.take_unverified());
            let room = async {
                tokio::task::yield_now().await;
                if !rest.is_zero() {
                    tokio::time::sleep(rest).await;
                }
                broker.shared.lanes.room(late).await;
                if let Some(servers) = &broker.servers {
                    for job in unqueued {
                        if let Err(job) = servers.publisher(job.channel()).send(job).await {
                            publisher::refuse(job, &broker);
                        }
                    }
                }
                match shown {
                    Some(shown) => Some(shown.verify(broker.authenticator.as_deref()).await),
                    None => None,
                }
            };
            let Some(verified) = self.wait(pin!(room)).await else { return };
            self.work = 0;
            let mut fanout = Fanout::default();
            if let Some(verified) = verified {
                self.take_verified(verified, &mut fanout);
            }
            let backlog = std::mem::take(&mut self.backlog);
            self.settle(fanout, backlog);
            // Whoever sends without end has to leave a channel all the same.
            if self.connection.is_asked() {
                self.leave_asked();
                self.catch_up();
            }
        }
    }

    /// Writes the own outbox until there is room. `None`: the connection closes.
    async fn wait(&self, mut room: Pin<&mut impl Future<Output = Option<Verified>>>) -> Option<Option<Verified>> {
        loop {
            let wake = std::future::poll_fn(|context| match room.as_mut().poll(context) {
                Poll::Ready(verified) => Poll::Ready(Err(verified)),
                Poll::Pending => self.connection.poll_wake(context, false).map(Ok),
            });
            match wake.await {
                Err(verified) => return Some(verified),
                Ok(Wake::Closing) => return None,
                Ok(_) => self.flush(),
            }
        }
    }

    /// Writes the own outbox; the task has the write right.
    fn flush(&self) {
        let shared = self.connection.shared();
        SCRATCH.with_borrow_mut(|scratch| {
            self.connection.flush(&mut scratch.writer, clock::now_us());
            shared.metrics.flushed(&mut scratch.writer);
        });
        shared.lanes.made_progress();
    }

    /// Asks for what the client missed where it is behind, if there is room for it.
    fn catch_up(&mut self) {
        let missed = self.connection.ask_missed();
        if !missed.is_empty() {
            let mut fanout = Fanout::default();
            for (channel, at) in missed {
                self.subscriptions.catch_up(&channel, at, &mut fanout);
            }
            self.submit(&mut fanout);
        }
    }

    /// Reads what has arrived and carries it out; returns whether others should have their turn before the next read.
    fn read(&mut self) -> bool {
        let read_bytes = self.context.allowances.read_bytes;
        SCRATCH.with_borrow_mut(|scratch| match self.connection.socket().try_read(&mut scratch.read[..read_bytes]) {
            Ok(len) if len > 0 => {
                self.connection.shared().metrics.bytes_received.inc_by(len as u64);
                let mut fanout = Fanout::default();
                let rest = self.carry_out(&mut scratch.read[..len], &mut fanout);
                self.backlog.extend_from_slice(rest);
                self.end_turn(&mut fanout);
                if let Some((rest, limit)) = self.allowance.read(len, &self.context.allowances, self.batch_us) {
                    self.connection.shared().metrics.limited(limit);
                    self.rest = self.rest.max(rest);
                }
                // What is left is carried out after a pause, in which they have it.
                self.backlog.is_empty() && (len >= TURN_BYTES || self.work >= TURN_WORK)
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => false,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => true,
            Ok(_) | Err(_) => {
                self.connection.close(CloseReason::Lost);
                false
            }
        })
    }

    /// Carries out a backlog, keeping what has to wait again.
    fn settle(&mut self, mut fanout: Fanout<Arc<Connection>>, mut backlog: Vec<u8>) {
        let rest = self.carry_out(&mut backlog, &mut fanout).len();
        backlog.drain(..backlog.len() - rest);
        // An empty one keeps no memory: many were held back once.
        self.backlog = if backlog.is_empty() { Vec::new() } else { backlog };
        self.end_turn(&mut fanout);
    }

    fn end_turn(&mut self, fanout: &mut Fanout<Arc<Connection>>) {
        self.note_arriving();
        self.submit(fanout);
        self.rest = self.rest.max(self.allowance.rest());
    }

    /// Whoever adds to what is arriving while that is too much has to go, before it takes all memory; but not for a
    /// trifle.
    fn note_arriving(&mut self) {
        self.connection.assembles(self.parser.assembling_since_us());
        let memory = &self.connection.shared().memory;
        let held = self.parser.held() + self.backlog.capacity();
        let is_more = self.arriving.set(held);
        let shared = self.allowance.arriving(held);
        let excess = match shared {
            _ if !is_more || held <= TRIFLE_BYTES => None,
            None if memory.is_arriving_too_much() => {
                Some((Limited::Memory.into(), "too much is arriving at once, come back later"))
            }
            shared => shared,
        };
        if let Some((limit, message)) = excess {
            self.connection.shared().metrics.limited(limit);
            self.connection.close(CloseReason::Overload(message));
        }
    }

    pub(crate) fn submit(&mut self, fanout: &mut Fanout<Arc<Connection>>) {
        self.answer(fanout);
        let late = self.connection.shared().submit(fanout);
        self.late.extend(late);
    }

    /// Handles complete messages until publishing has to wait; returns what is left.
    fn carry_out<'a>(&mut self, mut input: &'a mut [u8], fanout: &mut Fanout<Arc<Connection>>) -> &'a [u8] {
        let now_us = clock::now_us();
        self.connection.seen(now_us);
        self.batch_us = now_us;
        while !self.is_stalled() && !fanout.needs_pause() && self.work < TURN_WORK {
            match self.parser.next(&mut input, now_us) {
                Ok(Some(message)) => self.handle(message, fanout),
                Ok(None) => return &[],
                Err(violation) => self.connection.close(violation),
            }
            if self.connection.close_reason().is_some() {
                return &[];
            }
        }
        input
    }

    fn handle(&mut self, message: Message<'_>, fanout: &mut Fanout<Arc<Connection>>) {
        self.work += 1;
        match message {
            Message::Ping(_) | Message::Pong if self.is_ping_too_many(fanout) => {}
            Message::Ping(payload) => self.connection.pong(&payload, fanout),
            Message::Pong => {}
            Message::Close(code) => self.connection.close(CloseReason::Client(code)),
            Message::Text(text) if self.is_echo => self.reply(&Frame::text(&text), fanout),
            Message::Binary(bytes) if self.is_echo => self.reply(&Frame::new(Opcode::Binary, &[&bytes]), fanout),
            Message::Text(text) if self.is_json() => {
                self.answers_left = ANSWERS_MAX;
                protocol::parse(&text, |request| self.execute(request, fanout));
            }
            Message::Binary(_) if self.is_json() => {
                self.connection.close(CloseReason::UnsupportedData("binary frames are not part of hubcast.v1"));
            }
            _ => self.connection.close(CloseReason::UnsupportedData("raw mode takes no data frames")),
        }
    }

    /// Counts a ping or pong; if it was too many, the connection is closed.
    fn is_ping_too_many(&mut self, fanout: &mut Fanout<Arc<Connection>>) -> bool {
        let excess = self.allowance.ping(&self.context.allowances, self.batch_us).err();
        excess.map(|excess| self.refuse(None, excess, fanout)).is_some()
    }

    pub(crate) fn is_json(&self) -> bool {
        use crate::fanout::Subscriber;
        self.connection.format() == Format::Json
    }

    /// Answers the publishes in a row that asked for it, once they are delivered.
    pub(crate) fn answer(&self, fanout: &mut Fanout<Arc<Connection>>) {
        if !fanout.answers.is_empty() {
            self.context.broker.deliver(fanout);
            for answer in std::mem::take(&mut fanout.answers) {
                self.reply(&answer, fanout);
            }
        }
    }

    pub(crate) fn reply(&self, frame: &Arc<Frame>, fanout: &mut Fanout<Arc<Connection>>) {
        fanout.push(&self.connection, frame);
    }
}
