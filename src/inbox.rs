//! The bounded queue between the Redis driver, which must not wait, and the multiplexer.
//!
//! Policy when full: a message is dropped, counted, and its channel remembered, so that its
//! subscribers are told a gap exactly where it was. What the link itself lives by, confirmations and
//! control messages (own probes above all), has room beyond that: too many messages are no reason to
//! give up a link that works. A confirmation that does not fit even there cannot be dropped without
//! losing track, so then it is given up.

use std::collections::HashSet;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

use crossbeam_channel::{Receiver, Sender, TrySendError, bounded};
use parking_lot::Mutex;
use redis::{PushInfo, PushKind, Value};
use tokio::sync::Notify;

/// Messages that can wait: half a second of the most that one Redis link brings.
const ENTRIES_MAX: usize = 1 << 16;

/// What can wait beside them: the confirmations of all commands that may be outstanding (64 of 512 names), and some
/// control messages.
const RESERVE_MAX: usize = 64 * 512 + 4096;

/// Payload bytes that can wait.
const BYTES_MAX: usize = 64 << 20;

/// One message in [`Inbox::waiting`]; what is below counts bytes.
const MESSAGE: usize = 1 << 40;

/// Something that Redis pushed.
#[derive(Debug)]
pub enum Arrival {
    /// A published message. `after_gap`: messages of the channel before it were dropped here.
    Message {
        /// The Redis channel, prefix included.
        channel: Vec<u8>,
        /// The payload.
        payload: Vec<u8>,
        /// Something is missing before this one.
        after_gap: bool,
    },
    /// A SUBSCRIBE of this channel is confirmed.
    Subscribed(Vec<u8>),
    /// An UNSUBSCRIBE of this channel is confirmed, or Redis ended the subscription.
    Unsubscribed(Vec<u8>),
}

/// The queue of one link.
#[derive(Debug)]
pub struct Inbox {
    sender: Sender<Arrival>,
    receiver: Receiver<Arrival>,
    /// Messages and their bytes that wait, in one number: a message costs one addition.
    waiting: AtomicUsize,
    /// The channels whose messages may use the reserve.
    control: Box<[String]>,
    dropped: Mutex<HashSet<Vec<u8>>>,
    has_dropped: AtomicBool,
    dropped_count: AtomicU64,
    lost: OnceLock<&'static str>,
    notify: Notify,
}

impl Inbox {
    /// An empty queue. Messages on the channels `control` may use the reserve.
    pub fn new(control: &[String]) -> Self {
        let (sender, receiver) = bounded(ENTRIES_MAX + RESERVE_MAX);
        Self {
            sender,
            receiver,
            waiting: AtomicUsize::new(0),
            control: control.into(),
            dropped: Mutex::default(),
            has_dropped: AtomicBool::new(false),
            dropped_count: AtomicU64::new(0),
            lost: OnceLock::new(),
            notify: Notify::new(),
        }
    }

    /// Takes what the driver pushes. Never waits.
    pub fn push(&self, push: PushInfo) {
        let mut data = push.data.into_iter();
        let arrival = match (push.kind, data.next(), data.next()) {
            (
                PushKind::Message | PushKind::SMessage,
                Some(Value::BulkString(channel)),
                Some(Value::BulkString(payload)),
            ) => Some(Arrival::Message { channel, payload, after_gap: false }),
            (PushKind::Subscribe | PushKind::SSubscribe, Some(Value::BulkString(channel)), _) => {
                Some(Arrival::Subscribed(channel))
            }
            (PushKind::Unsubscribe | PushKind::SUnsubscribe, Some(Value::BulkString(channel)), _) => {
                Some(Arrival::Unsubscribed(channel))
            }
            (PushKind::Disconnection, ..) => {
                self.lose("redis ended the connection");
                None
            }
            _ => None,
        };
        if let Some(arrival) = arrival {
            self.enqueue(arrival);
        }
        self.notify.notify_one();
    }

    fn enqueue(&self, mut arrival: Arrival) {
        if let Arrival::Message { channel, payload, after_gap } = &mut arrival {
            let waiting = self.waiting.load(Ordering::Relaxed) + payload.len();
            let is_full = waiting >= ENTRIES_MAX * MESSAGE || waiting % MESSAGE > BYTES_MAX;
            if is_full && !self.is_control(channel) {
                return self.drop_message(std::mem::take(channel));
            }
            self.waiting.fetch_add(MESSAGE + payload.len(), Ordering::Relaxed);
            *after_gap = self.has_dropped.load(Ordering::Relaxed) && self.dropped.lock().remove(channel);
        }
        match self.sender.try_send(arrival) {
            Ok(()) => {}
            Err(TrySendError::Full(Arrival::Message { channel, payload, .. })) => {
                self.waiting.fetch_sub(MESSAGE + payload.len(), Ordering::Relaxed);
                self.drop_message(channel);
            }
            Err(_) => self.lose("no room for a confirmation"),
        }
    }

    fn is_control(&self, channel: &[u8]) -> bool {
        self.control.iter().any(|control| control.as_bytes() == channel)
    }

    fn drop_message(&self, channel: Vec<u8>) {
        self.dropped.lock().insert(channel);
        self.has_dropped.store(true, Ordering::Relaxed);
        self.dropped_count.fetch_add(1, Ordering::Relaxed);
    }

    fn lose(&self, why: &'static str) {
        self.lost.get_or_init(|| why);
    }

    /// Why the link is lost, if it is and everything that arrived before is taken.
    pub fn lost(&self) -> Option<&'static str> {
        self.lost.get().copied()
    }

    /// Waits until something was pushed since the last wait.
    pub async fn arrived(&self) {
        self.notify.notified().await;
    }

    /// How much waits.
    pub fn len(&self) -> usize {
        self.receiver.len()
    }

    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.receiver.is_empty()
    }

    /// The next arrival.
    pub fn pop(&self) -> Option<Arrival> {
        let arrival = self.receiver.try_recv().ok()?;
        if let Arrival::Message { payload, .. } = &arrival {
            self.waiting.fetch_sub(MESSAGE + payload.len(), Ordering::Relaxed);
        }
        Some(arrival)
    }

    /// Once the queue is empty: channels that lost messages after everything that was taken.
    pub fn take_dropped(&self) -> HashSet<Vec<u8>> {
        if !self.has_dropped.load(Ordering::Relaxed) || !self.is_empty() {
            return HashSet::new();
        }
        self.has_dropped.store(false, Ordering::Relaxed);
        std::mem::take(&mut *self.dropped.lock())
    }

    /// How many messages were dropped since the last call.
    pub fn take_dropped_count(&self) -> usize {
        self.dropped_count.swap(0, Ordering::Relaxed) as usize
    }
}
