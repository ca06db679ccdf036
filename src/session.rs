//! The life of one WebSocket connection, in its own task: read, carry out commands, close.
//!
//! The task waits with no buffer of its own; bytes are read into the worker's and carried out at
//! once. It stops reading while publishing has to wait (a subscriber that is late, a full queue to
//! Redis), but goes on writing its own outbox and answering a close: two clients that publish to
//! each other cannot lock each other up.

use std::cell::RefCell;
use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::Poll;
use std::time::Duration;

use crate::asker::Asker;
use crate::broker::Broker;
use crate::channel::Wish;
use crate::clock;
use crate::close::CloseReason;
use crate::connection::{Connection, Open, Wake};
use crate::ending;
use crate::event::{self, Welcome};
use crate::fanout::Fanout;
use crate::frame::{Frame, Opcode};
use crate::handshake::Mode;
use crate::history_reader::Question;
use crate::hub::Subscriptions;
use crate::metrics::Source;
use crate::presence_reader;
use crate::protocol::{self, Command, ErrorCode, Refusal, Request, Target, Wanted};
use crate::publication::{Format, Payload};
use crate::publisher::{self, Job, Reply};
use crate::rules::ChannelRules;
use crate::websocket::{Message, Parser};
use crate::writer::Writer;

/// Bytes read at once.
const READ_BYTES: usize = 64 << 10;

/// Commands (and channels of their lists) that one frame may carry: their answers must fit into an outbox.
const ANSWERS_MAX: usize = 4096;

/// Bytes of the past that may wait for a client and it still gets more: a page of many channels that comes back.
const REPLAY_BYTES_MAX: usize = 16 << 20;

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
    connection: Open,
    context: Arc<SessionContext>,
    subscriptions: Subscriptions<Arc<Connection>>,
    parser: Parser,
    is_echo: bool,
    /// Answers that the current frame may still have.
    answers_left: usize,
    /// Read but not carried out yet: publishing has to wait.
    backlog: Vec<u8>,
    /// Subscribers that are late; while there are any, nothing is read.
    late: Vec<Arc<Connection>>,
    /// Publishes that the queue to Redis had no room for.
    unqueued: Vec<Job>,
}

impl Session {
    /// A session on an open connection. `backlog` is what arrived right behind the upgrade request.
    pub fn new(connection: Open, context: Arc<SessionContext>, backlog: &[u8], is_echo: bool) -> Self {
        let hub = Arc::clone(&context.broker.hub);
        Self {
            subscriptions: Subscriptions::new(hub, Arc::clone(&connection)),
            parser: Parser::new(context.message_bytes_max),
            connection,
            context,
            is_echo,
            answers_left: ANSWERS_MAX,
            backlog: backlog.to_vec(),
            late: Vec::new(),
            unqueued: Vec::new(),
        }
    }

    /// Serves the connection until it ends.
    pub async fn run(mut self, mode: Mode) -> End {
        self.start(&mode);
        drop(mode);
        loop {
            if self.is_stalled() || !self.backlog.is_empty() {
                Box::pin(self.pause()).await;
            }
            match std::future::poll_fn(|context| self.connection.poll_wake(context, true)).await {
                Wake::Closing => break,
                Wake::Writable => self.flush(),
                // A full buffer: whoever this batch scheduled is flushed before the next one is read.
                Wake::Readable if self.read() == READ_BYTES => tokio::task::yield_now().await,
                Wake::Readable => {}
                Wake::Asked => self.leave_asked(),
            }
        }
        // From here on nothing is delivered to this connection.
        let Self { connection, subscriptions, .. } = self;
        drop(subscriptions);
        let is_clean = Box::pin(ending::finish(&connection)).await;
        match connection.close_reason() {
            Some(CloseReason::Drain) if is_clean => End::Flushed,
            Some(CloseReason::Drain) => End::CutOff,
            _ => End::Other,
        }
    }

    fn start(&mut self, mode: &Mode) {
        let mut fanout = Fanout::default();
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
                });
                self.reply(&welcome, &mut fanout);
                let targets = channels.iter().map(|name| protocol::target(name.as_str().into())).collect();
                let command = Ok(Command::Subscribe(targets));
                if !channels.is_empty() {
                    self.execute(Request { id: None, command }, &mut fanout);
                }
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

    /// Publishing waits: for subscribers that are late, or for room in the queue to Redis.
    fn is_stalled(&self) -> bool {
        !self.late.is_empty() || !self.unqueued.is_empty()
    }

    /// Gives others their turn and waits until publishing can go on, writing the own outbox meanwhile;
    /// then carries out the backlog.
    async fn pause(&mut self) {
        let broker = Arc::clone(&self.context.broker);
        while self.is_stalled() || !self.backlog.is_empty() {
            let late = std::mem::take(&mut self.late);
            let unqueued = std::mem::take(&mut self.unqueued);
            let room = async {
                tokio::task::yield_now().await;
                broker.shared.lanes.room(late).await;
                if let Some(servers) = &broker.servers {
                    for job in unqueued {
                        if let Err(job) = servers.publisher(job.channel()).send(job).await {
                            publisher::refuse(job, &broker);
                        }
                    }
                }
            };
            let mut room = pin!(room);
            loop {
                let wake = std::future::poll_fn(|context| {
                    if room.as_mut().poll(context).is_ready() {
                        return Poll::Ready(None);
                    }
                    self.connection.poll_wake(context, false).map(Some)
                });
                match wake.await {
                    None => break,
                    Some(Wake::Closing) => return,
                    Some(_) => self.flush(),
                }
            }
            let backlog = std::mem::take(&mut self.backlog);
            self.settle(Fanout::default(), backlog);
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

    /// Reads what has arrived and carries it out; returns how many bytes that were.
    fn read(&mut self) -> usize {
        SCRATCH.with_borrow_mut(|scratch| match self.connection.socket().try_read(&mut scratch.read) {
            Ok(len) if len > 0 => {
                self.connection.shared().metrics.bytes_received.inc_by(len as u64);
                let mut fanout = Fanout::default();
                let rest = self.carry_out(&mut scratch.read[..len], &mut fanout);
                self.backlog.extend_from_slice(rest);
                self.submit(&mut fanout);
                len
            }
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => 0,
            Ok(_) | Err(_) => {
                self.connection.close(CloseReason::Lost);
                0
            }
        })
    }

    /// Carries out a backlog, keeping what has to wait again.
    fn settle(&mut self, mut fanout: Fanout<Arc<Connection>>, mut backlog: Vec<u8>) {
        let rest = self.carry_out(&mut backlog, &mut fanout).len();
        backlog.drain(..backlog.len() - rest);
        self.backlog = backlog;
        self.submit(&mut fanout);
    }

    fn submit(&mut self, fanout: &mut Fanout<Arc<Connection>>) {
        self.answer(fanout);
        let late = self.connection.shared().submit(fanout);
        self.late.extend(late);
    }

    /// Handles complete messages until publishing has to wait; returns what is left.
    fn carry_out<'a>(&mut self, mut input: &'a mut [u8], fanout: &mut Fanout<Arc<Connection>>) -> &'a [u8] {
        let now_us = clock::now_us();
        self.connection.seen(now_us);
        while !self.is_stalled() && !fanout.needs_pause() {
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
        match message {
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

    fn is_json(&self) -> bool {
        use crate::fanout::Subscriber;
        self.connection.format() == Format::Json
    }

    /// Counts an answer to the current frame. False: it had its share, and is told so once.
    fn may_answer(&mut self, id: Option<&str>, fanout: &mut Fanout<Arc<Connection>>) -> bool {
        if self.answers_left == 1 {
            let refusal = Refusal::new(ErrorCode::LimitExceeded, "too many commands in one frame, the rest is ignored");
            self.reply(&event::error(id, &refusal, None), fanout);
        }
        self.answers_left = self.answers_left.saturating_sub(1);
        self.answers_left > 0
    }

    fn execute(&mut self, request: Request<'_>, fanout: &mut Fanout<Arc<Connection>>) {
        let id = request.id;
        if !self.may_answer(id, fanout) {
            return;
        }
        if !matches!(request.command, Ok(Command::Publish { .. })) {
            self.answer(fanout);
        }
        match request.command {
            Err(refusal) => self.reply(&event::error(id, &refusal, None), fanout),
            Ok(Command::Ping) => self.reply(&event::pong(id), fanout),
            Ok(Command::Subscribe(targets)) => {
                self.each(id, targets, fanout, |session, wanted, fanout| session.subscribe(id, wanted, fanout));
            }
            Ok(Command::Unsubscribe(targets)) => {
                self.each(id, targets, fanout, |session, wanted, fanout| {
                    session.unsubscribe(id, &wanted.channel, fanout);
                });
            }
            Ok(Command::History { channel, range, limit }) => {
                let asker = Asker::Socket(Arc::clone(&self.connection), id.map(Into::into));
                let question = Question { channel: channel.as_ref().into(), range, limit, asker };
                if let Err(refusal) = self.context.broker.ask_history(question) {
                    self.reply(&event::error(id, &refusal, Some(&channel)), fanout);
                }
            }
            Ok(Command::Presence { channel, limit, page }) => {
                if let Err(refusal) = self.presence(id, &channel, limit, page.as_deref()) {
                    self.reply(&event::error(id, &refusal, Some(&channel)), fanout);
                }
            }
            Ok(Command::Publish { channel, data }) => {
                if let Err(refusal) = self.publish(id, &channel, data, fanout) {
                    self.reply(&event::error(id, &refusal, Some(&channel)), fanout);
                }
            }
        }
    }

    /// Carries out one element of a batch after another; a bad one does not stop the rest.
    fn each(
        &mut self,
        id: Option<&str>,
        targets: Vec<Target<'_>>,
        fanout: &mut Fanout<Arc<Connection>>,
        mut carry_out: impl FnMut(&mut Self, &Wanted<'_>, &mut Fanout<Arc<Connection>>),
    ) {
        for target in targets {
            if !self.may_answer(id, fanout) {
                return;
            }
            match target {
                Ok(wanted) => carry_out(self, &wanted, fanout),
                Err((given, refusal)) => self.reply(&event::error(id, &refusal, Some(&given)), fanout),
            }
        }
    }

    fn subscribe(&mut self, id: Option<&str>, wanted: &Wanted<'_>, fanout: &mut Fanout<Arc<Connection>>) {
        let channel = &*wanted.channel;
        if self.subscriptions.len() >= self.context.subscriptions_max && !self.subscriptions.contains(channel) {
            let refusal = Refusal::new(ErrorCode::LimitExceeded, "too many subscriptions on this connection");
            return self.reply(&event::error(id, &refusal, Some(channel)), fanout);
        }
        // Who has not read the last recoveries yet begins anew: what waits for a client is bounded.
        let after = wanted.after.filter(|_| self.connection.replay_bytes() < REPLAY_BYTES_MAX);
        if !self.subscriptions.subscribe(channel, Some(Wish { id, after }), fanout) {
            let refusal = Refusal::new(ErrorCode::LimitExceeded, "this subscription is pending already");
            self.reply(&event::error(id, &refusal, Some(channel)), fanout);
        }
        self.note_subscriptions();
    }

    fn unsubscribe(&mut self, id: Option<&str>, channel: &str, fanout: &mut Fanout<Arc<Connection>>) {
        self.subscriptions.unsubscribe(channel, &event::unsubscribed(id, channel), fanout);
        self.note_subscriptions();
    }

    /// Leaves the channels that the backend wants it to leave.
    fn leave_asked(&mut self) {
        let mut fanout = Fanout::default();
        for channel in self.connection.take_asked() {
            if !self.subscriptions.contains(&channel) {
                continue;
            }
            if self.is_json() {
                self.subscriptions.unsubscribe(&channel, &event::ended(&channel), &mut fanout);
            } else {
                // Its one subscription is all that a raw connection is for.
                let reason = "unsubscribed by the backend".into();
                self.connection.close(CloseReason::Disconnected { code: 1008, reason });
            }
        }
        self.note_subscriptions();
        self.submit(&mut fanout);
    }

    fn note_subscriptions(&self) {
        self.connection.subscriptions.store(self.subscriptions.len(), Ordering::Relaxed);
    }

    fn publish(
        &mut self,
        id: Option<&str>,
        channel: &str,
        data: &str,
        fanout: &mut Fanout<Arc<Connection>>,
    ) -> Result<(), Refusal> {
        let broker = &self.context.broker;
        if !self.context.rules.client_publish(channel) {
            return Err(Refusal::new(ErrorCode::Forbidden, "clients may not publish to this channel"));
        }
        broker.check_payload(data.as_bytes())?;
        let Some(servers) = &broker.servers else {
            let cursor = broker.gather(channel, Payload::Json(data), None, Source::Socket, fanout);
            fanout.answers.extend(id.map(|id| event::published(id, cursor)));
            return Ok(());
        };
        broker.shared.metrics.publication(Source::Socket);
        let reply = Reply::Socket(Arc::clone(&self.connection), id.map(Into::into));
        let job = Job::new(channel, data.as_bytes(), None, reply);
        // Once one publish waits, the next ones wait behind it.
        if self.unqueued.is_empty() {
            self.unqueued.extend(servers.publisher(channel).try_send(job).err());
        } else {
            self.unqueued.push(job);
        }
        Ok(())
    }

    /// Has the question answered by the task that reads presence.
    fn presence(&self, id: Option<&str>, channel: &str, limit: usize, page: Option<&str>) -> Result<(), Refusal> {
        if !self.context.rules.presence(channel) {
            return Err(Refusal::new(ErrorCode::Forbidden, "the rule of this channel has no presence"));
        }
        let asker = Asker::Socket(Arc::clone(&self.connection), id.map(Into::into));
        let question = presence_reader::Question::new(channel, limit, page, asker)?;
        self.connection.shared().presence.ask(question).map_err(|_| presence_reader::unavailable())
    }

    /// Answers the publishes in a row that asked for it, once they are delivered.
    fn answer(&self, fanout: &mut Fanout<Arc<Connection>>) {
        if !fanout.answers.is_empty() {
            self.context.broker.deliver(fanout);
            for answer in std::mem::take(&mut fanout.answers) {
                self.reply(&answer, fanout);
            }
        }
    }

    fn reply(&self, frame: &Arc<Frame>, fanout: &mut Fanout<Arc<Connection>>) {
        fanout.push(&self.connection, frame);
    }
}
