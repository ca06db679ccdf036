//! The histories of an instance that is alone, in memory.
//!
//! A channel's past is locked while something is appended and delivered, and while somebody joins: so the order of the
//! entries is the order of the channel, and a join misses nothing. Lock order: answers, past, then the hub's.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use dashmap::DashMap;
use parking_lot::{Mutex, MutexGuard};

use crate::cursor::Cursor;
use crate::history_store::{Chain, Entry, IDEMPOTENCY_WINDOW, Loss, Marked, Moment, Rank, Retention, Window};
use crate::history_view::{Range, Start};
use crate::sharded::Count;

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
    room: Arc<Room>,
}

/// How much there is room for in all channels together.
#[derive(Debug, Default)]
struct Room {
    /// Bytes of all entries.
    taken: AtomicUsize,
    bound: OnceLock<Bound>,
}

#[derive(Debug)]
struct Bound {
    bytes_max: usize,
    forgotten: Count,
}

/// The past of one channel.
#[derive(Debug)]
pub struct Past {
    retention: Retention,
    chain: Mutex<Chain>,
    room: Arc<Room>,
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

/// A past while nobody else changes it. What it takes then is counted at the end.
#[derive(Debug)]
pub struct Held<'a> {
    chain: MutexGuard<'a, Chain>,
    retention: &'a Retention,
    room: &'a Room,
    /// What it is counted with.
    counted: usize,
}

impl Past {
    /// Keeps everybody else away from it.
    pub fn hold(&self) -> Held<'_> {
        let chain = self.chain.lock();
        Held { counted: chain.bytes(), chain, retention: &self.retention, room: &self.room }
    }
}

impl Drop for Past {
    fn drop(&mut self) {
        self.room.change(self.chain.get_mut().bytes(), 0);
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        self.room.change(self.counted, self.chain.bytes());
    }
}

impl Room {
    fn change(&self, before: usize, after: usize) {
        // A sum that wraps around goes down.
        self.taken.fetch_add(after.wrapping_sub(before), Ordering::Relaxed);
    }
}

impl Held<'_> {
    /// Drops the oldest entries while there is no room for all.
    fn make_room(&mut self) {
        let Some(bound) = self.room.bound.get() else { return };
        self.room.change(std::mem::replace(&mut self.counted, self.chain.bytes()), self.chain.bytes());
        while self.room.taken.load(Ordering::Relaxed) > bound.bytes_max && self.chain.forget_oldest() {
            bound.forgotten.inc();
            self.room.change(std::mem::replace(&mut self.counted, self.chain.bytes()), self.chain.bytes());
        }
    }

    /// Drops the entries that go before others, up to a rank.
    fn forget(&mut self, last: Rank) {
        while self.chain.ranks().next().is_some_and(|(rank, _)| rank <= last) {
            self.chain.forget_oldest();
            if let Some(bound) = self.room.bound.get() {
                bound.forgotten.inc();
            }
        }
    }

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
    /// Bounds what all entries take together; to be said once. Counts those that go for that before their rule says.
    pub fn bound(&self, bytes_max: usize, forgotten: Count) {
        let _ = self.room.bound.set(Bound { bytes_max, forgotten });
    }

    /// What all entries take.
    pub fn bytes(&self) -> usize {
        self.room.taken.load(Ordering::Relaxed)
    }

    /// Where seven eighths of the room are taken: drops the oldest entries of all channels until three quarters are. To be
    /// called often; what is published meanwhile finds its room in its own channel.
    pub fn make_room(&self) {
        let Some(bytes_max) = self.room.bound.get().map(|bound| bound.bytes_max) else { return };
        if self.bytes() <= bytes_max / 8 * 7 {
            return;
        }
        let mut ranks = Vec::new();
        self.channels.iter().for_each(|past| ranks.extend(past.chain.lock().ranks()));
        ranks.sort_unstable();
        let mut excess = self.bytes().saturating_sub(bytes_max / 4 * 3);
        let last = ranks.into_iter().find(|(_, bytes)| {
            excess = excess.saturating_sub(*bytes);
            excess == 0
        });
        if let Some((last, _)) = last {
            self.channels.iter().for_each(|past| past.hold().forget(last));
        }
    }

    /// The past of a channel; a new one if there is none.
    pub fn past(&self, channel: &str, retention: &Retention) -> Arc<Past> {
        if let Some(past) = self.channels.get(channel) {
            return Arc::clone(&past);
        }
        let room = || Arc::clone(&self.room);
        let fresh = || Arc::new(Past { retention: *retention, chain: Mutex::default(), room: room() });
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
            let mut held = past.hold();
            let entry = held.chain.publish(payload, retention, at);
            deliver(&entry);
            held.make_room();
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
        self.past(channel, retention).hold().chain.mark(loss, retention, at)
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
            let mut held = past.hold();
            // Whoever holds it may be about to use it.
            let is_used = Arc::strong_count(past) > 1;
            let is_gone = held.chain.expire(&past.retention, now_ms) && !is_used;
            idle.extend((!is_used && !is_gone).then(|| held.chain.worth()));
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
