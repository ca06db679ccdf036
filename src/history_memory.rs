//! The histories of an instance that is alone, in memory.
//!
//! A channel's past is locked while something is appended and delivered, and while somebody joins: so the order of the
//! entries is the order of the channel, and a join misses nothing. Lock order: answers, past, then the hub's.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use bytes::Bytes;
use dashmap::DashMap;
use parking_lot::{Mutex, MutexGuard};

use crate::cursor::Cursor;
use crate::history_store::{Chain, Entry, IDEMPOTENCY_WINDOW, Loss, Marked, Moment, Retention, Window};
use crate::history_view::{Range, Start};

/// Channels that nobody is in. Anybody can make one by subscribing, so beyond this they are forgotten, first those of which
/// only the position is left, then those published to longest ago: whoever comes back to one begins anew.
const IDLE_MAX: usize = 1 << 16;

/// Answers that are remembered; beyond it the oldest are forgotten, and a publish that is repeated after that is another one.
const ANSWERS_MAX: usize = 1 << 16;

/// The store.
#[derive(Debug, Default)]
pub struct Memory {
    channels: DashMap<Box<str>, Arc<Past>>,
    answers: Mutex<Answers>,
}

/// The past of one channel.
#[derive(Debug)]
pub struct Past {
    retention: Retention,
    chain: Mutex<Chain>,
}

/// What was answered to publishes that may be repeated.
#[derive(Debug, Default)]
struct Answers {
    /// The cursor, and until when (ms) it is remembered.
    cursors: HashMap<Repeat, (Cursor, u64)>,
    /// The same in the order in which they end.
    ending: VecDeque<(u64, Repeat)>,
}

/// What makes a publish a repeated one.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Repeat {
    channel: Box<str>,
    idempotency_key: Box<str>,
}

/// What a publish came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Published {
    /// It is appended, and was delivered.
    Appended(Entry),
    /// A publish with the same idempotency key was answered with this id.
    Repeated(Cursor),
}

impl Published {
    /// The cursor that the publisher is answered.
    pub fn cursor(&self) -> Cursor {
        match self {
            Self::Appended(entry) => entry.id,
            Self::Repeated(cursor) => *cursor,
        }
    }
}

/// A past while nobody else changes it.
#[derive(Debug)]
pub struct Held<'a> {
    chain: MutexGuard<'a, Chain>,
    retention: &'a Retention,
}

impl Past {
    /// Keeps everybody else away from it.
    pub fn hold(&self) -> Held<'_> {
        Held { chain: self.chain.lock(), retention: &self.retention }
    }
}

impl Held<'_> {
    /// See [`Chain::read`].
    pub fn read(&mut self, unless: Option<Cursor>, at: Moment) -> Window {
        self.chain.read(unless, self.retention, at)
    }

    /// Where a subscriber begins, see [`Window::start`].
    pub fn start(&mut self, after: Option<Cursor>, is_cached: bool) -> Start {
        let at = Moment::now();
        if after.is_none() && !is_cached {
            return Start::at(self.chain.position(self.retention, at));
        }
        let window = self.read(None, at);
        window.start(after, Some(&[]), window.top, is_cached)
    }
}

impl Memory {
    /// The past of a channel; a new one if there is none.
    pub fn past(&self, channel: &str, retention: &Retention) -> Arc<Past> {
        if let Some(past) = self.channels.get(channel) {
            return Arc::clone(&past);
        }
        let fresh = || Arc::new(Past { retention: *retention, chain: Mutex::default() });
        Arc::clone(&self.channels.entry(channel.into()).or_insert_with(fresh))
    }

    /// Appends a publication, once per idempotency key, and has it delivered before anything else happens to the channel.
    pub fn publish(
        &self,
        channel: &str,
        payload: Bytes,
        retention: &Retention,
        key: Option<&str>,
        at: Moment,
        deliver: impl FnOnce(&Entry),
    ) -> Published {
        let append = || {
            let past = self.past(channel, retention);
            let mut chain = past.chain.lock();
            let entry = chain.publish(payload, retention, at);
            deliver(&entry);
            entry
        };
        let Some(key) = key else { return Published::Appended(append()) };
        let mut answers = self.answers.lock();
        let repeat = Repeat { channel: channel.into(), idempotency_key: key.into() };
        match answers.cursors.get(&repeat) {
            Some((cursor, ends_ms)) if *ends_ms > at.now_ms => Published::Repeated(*cursor),
            _ => {
                let entry = append();
                answers.remember(repeat, entry.id, at.now_ms);
                Published::Appended(entry)
            }
        }
    }

    /// See [`Chain::mark`].
    pub fn mark(&self, channel: &str, loss: &Loss, retention: &Retention, at: Moment) -> (Marked, Option<Entry>) {
        self.past(channel, retention).chain.lock().mark(loss, retention, at)
    }

    /// See [`Chain::read`].
    pub fn read(&self, channel: &str, unless: Option<Cursor>, retention: &Retention, at: Moment) -> Window {
        self.past(channel, retention).hold().read(unless, at)
    }

    /// See [`Chain::read_page`].
    pub fn read_page(&self, channel: &str, range: Range, limit: usize, retention: &Retention, at: Moment) -> Window {
        self.past(channel, retention).hold().chain.read_page(range, limit, retention, at)
    }

    /// Drops what is too old, in all channels, and what is too much; to be called now and then. The number of channels left.
    pub fn expire(&self, now_ms: u64) -> usize {
        let mut idle = Vec::new();
        self.channels.retain(|_, past| {
            let mut chain = past.chain.lock();
            // Whoever holds it may be about to use it.
            let is_used = Arc::strong_count(past) > 1;
            let is_gone = chain.expire(&past.retention, now_ms) && !is_used;
            idle.extend((!is_used && !is_gone).then(|| chain.worth()));
            !is_gone
        });
        if let Some(last) = idle.len().checked_sub(IDLE_MAX + 1) {
            let (_, last, _) = idle.select_nth_unstable(last);
            self.channels.retain(|_, past| Arc::strong_count(past) > 1 || past.chain.lock().worth() > *last);
        }
        self.answers.lock().expire(now_ms);
        self.channels.len()
    }
}

impl Answers {
    fn remember(&mut self, repeat: Repeat, cursor: Cursor, now_ms: u64) {
        if self.ending.len() == ANSWERS_MAX
            && let Some((ends_ms, _)) = self.ending.front()
        {
            self.expire(*ends_ms);
        }
        let ends_ms = now_ms + IDEMPOTENCY_WINDOW.as_millis() as u64;
        self.ending.push_back((ends_ms, repeat.clone()));
        self.cursors.insert(repeat, (cursor, ends_ms));
    }

    fn expire(&mut self, now_ms: u64) {
        while let Some((_, repeat)) = self.ending.pop_front_if(|(ends_ms, _)| *ends_ms <= now_ms) {
            // One that was answered anew ends later.
            if self.cursors.get(&repeat).is_some_and(|(_, ends_ms)| *ends_ms <= now_ms) {
                self.cursors.remove(&repeat);
            }
        }
    }
}
