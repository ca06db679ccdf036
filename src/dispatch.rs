//! What a session does with each command of its client, and what it answers.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::allowance::Excess;
use crate::asker::Asker;
use crate::channel::Wish;
use crate::close::{self, CloseReason};
use crate::connection::Connection;
use crate::event;
use crate::fanout::Fanout;
use crate::history_reader::Question;
use crate::history_view::Range;
use crate::identity::Action;
use crate::metrics::{Limit, Limited, Source};
use crate::presence_reader;
use crate::protocol::{Command, ErrorCode, Refusal, Request, Target, Wanted};
use crate::publication::Payload;
use crate::publisher::{Job, Reply};
use crate::session::{FRAME_WORK, Session};

/// Bytes of the past that may wait for a client and it still gets more: a page of many channels that comes back.
const REPLAY_BYTES_MAX: usize = 16 << 20;

impl Session {
    /// Counts an answer to the current frame. False: it had its share, and is told so once.
    fn may_answer(&mut self, id: Option<&str>, fanout: &mut Fanout<Arc<Connection>>) -> bool {
        if self.answers_left == 1 {
            let refusal = Refusal::new(ErrorCode::LimitExceeded, "too many commands in one frame, the rest is ignored");
            self.reply(&event::error(id, &refusal, None), fanout);
        }
        self.answers_left = self.answers_left.saturating_sub(1);
        self.answers_left > 0
    }

    pub(crate) fn execute(&mut self, request: Request<'_>, fanout: &mut Fanout<Arc<Connection>>) {
        let id = request.id;
        if self.connection.close_reason().is_some() || !self.may_answer(id, fanout) {
            return;
        }
        if !matches!(request.command, Ok(Command::Publish { .. })) {
            self.work += FRAME_WORK;
            self.answer(fanout);
        }
        if let Err(refusal) = self.check_pass(&request) {
            return self.reply(&event::error(id, &refusal, None), fanout);
        }
        if let Err(excess) = self.allowance.command(&request.command, &self.context.allowances, self.batch_us) {
            return self.refuse(id, excess, fanout);
        }
        match request.command {
            Err(refusal) => self.reply(&event::error(id, &refusal, None), fanout),
            Ok(Command::Ping) => self.reply(&event::pong(id), fanout),
            Ok(Command::Auth { token }) => self.show_token(id, &token, fanout),
            Ok(Command::Subscribe(targets)) => {
                self.each(id, targets, fanout, |session, wanted, fanout| session.subscribe(id, wanted, fanout));
            }
            Ok(Command::Unsubscribe(targets)) => {
                self.each(id, targets, fanout, |session, wanted, fanout| {
                    session.unsubscribe(id, &wanted.channel, fanout);
                });
            }
            Ok(Command::History { channel, range, limit }) => {
                if let Err(refusal) = self.history(id, &channel, range, limit) {
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

    /// It was too much: says so, or closes the connection.
    pub(crate) fn refuse(&mut self, id: Option<&str>, excess: Excess, fanout: &mut Fanout<Arc<Connection>>) {
        let metrics = &self.connection.shared().metrics;
        match excess {
            Excess::Refused(limit, refusal) => {
                metrics.limited(limit);
                self.reply(&event::error(id, &refusal, None), fanout);
            }
            Excess::Close(limit, reason) => {
                metrics.limited(limit);
                self.connection.close(reason);
            }
        }
    }

    /// Whether one more channel would be one too many here.
    pub(crate) fn is_channel_too_many(&self, channel: &str) -> bool {
        let (hub, channels_max) = (&self.context.broker.hub, self.context.allowances.channels_max);
        channels_max > 0 && hub.len() >= channels_max && hub.channel(channel).is_none()
    }

    /// Whether one more subscription would be too many of those that share the user, address or instance.
    fn shared_subscription_too_many(&self, channel: &str) -> Option<(Limit, &'static str)> {
        self.allowance.refuses_subscription().filter(|_| !self.subscriptions.contains(channel))
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
            self.work += FRAME_WORK;
            match target {
                Ok(wanted) => carry_out(self, &wanted, fanout),
                Err((given, refusal)) => self.reply(&event::error(id, &refusal, Some(&given)), fanout),
            }
        }
    }

    fn subscribe(&mut self, id: Option<&str>, wanted: &Wanted<'_>, fanout: &mut Fanout<Arc<Connection>>) {
        let channel = &*wanted.channel;
        let granted = wanted.token.as_ref().map_or(Ok(()), |token| self.take_grant(channel, token));
        if let Err(refusal) = granted.and_then(|()| self.authorize(Action::Subscribe, channel)) {
            return self.reply(&event::error(id, &refusal, Some(channel)), fanout);
        }
        if self.subscriptions.len() >= self.context.subscriptions_max && !self.subscriptions.contains(channel) {
            self.connection.shared().metrics.limited(Limited::Subscriptions);
            let refusal = Refusal::new(ErrorCode::LimitExceeded, "too many subscriptions on this connection");
            return self.reply(&event::error(id, &refusal, Some(channel)), fanout);
        }
        if let Some((limit, message)) = self.shared_subscription_too_many(channel) {
            self.connection.shared().metrics.limited(limit);
            return self
                .reply(&event::error(id, &Refusal::new(ErrorCode::LimitExceeded, message), Some(channel)), fanout);
        }
        if self.is_channel_too_many(channel) {
            self.connection.shared().metrics.limited(Limited::Channels);
            let refusal = Refusal::new(ErrorCode::LimitExceeded, "too many channels on this instance");
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
        self.drop_grant(channel);
        self.note_subscriptions();
    }

    /// Leaves the channels that the backend wants it to leave, and those for which its tokens are over.
    pub(crate) fn leave_asked(&mut self) {
        let mut fanout = Fanout::default();
        self.recheck_grants(&mut fanout);
        for channel in self.connection.take_asked() {
            if !self.subscriptions.contains(&channel) {
                continue;
            }
            if self.is_json() {
                self.subscriptions.unsubscribe(&channel, &event::ended(&channel, "backend"), &mut fanout);
                self.drop_grant(&channel);
            } else {
                // Its one subscription is all that a raw connection is for.
                let reason = "unsubscribed by the backend".into();
                self.connection.close(CloseReason::Disconnected { code: close::DISCONNECTED, reason });
            }
        }
        self.note_subscriptions();
        self.submit(&mut fanout);
    }

    pub(crate) fn note_subscriptions(&mut self) {
        self.allowance.subscribed(self.subscriptions.len());
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
        self.authorize(Action::Publish, channel)?;
        broker.check_payload(data.as_bytes())?;
        broker.check_memory()?;
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

    /// Has the question answered by the task that reads the past.
    fn history(&self, id: Option<&str>, channel: &str, range: Range, limit: usize) -> Result<(), Refusal> {
        self.authorize(Action::History, channel)?;
        let asker = Asker::Socket(Arc::clone(&self.connection), id.map(Into::into));
        self.context.broker.ask_history(Question { channel: channel.into(), range, limit, asker })
    }

    /// Has the question answered by the task that reads presence.
    fn presence(&self, id: Option<&str>, channel: &str, limit: usize, page: Option<&str>) -> Result<(), Refusal> {
        self.authorize(Action::Presence, channel)?;
        if !self.context.rules.presence(channel) {
            return Err(Refusal::new(ErrorCode::Forbidden, "the rule of this channel has no presence"));
        }
        let asker = Asker::Socket(Arc::clone(&self.connection), id.map(Into::into));
        let question = presence_reader::Question::new(channel, limit, page, asker)?;
        self.connection.shared().presence.ask(question).map_err(|_| presence_reader::unavailable())
    }
}
