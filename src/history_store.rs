//! What history keeps of a channel. Pure, no I/O: clock and random bits are passed in.
//!
//! A channel is a chain: each entry names its predecessor, the first one a random *genesis*. The stream holds its newest
//! entries, by number and age; the *position*, the newest id, outlives them. Three operations touch it (`publish`,
//! `mark`, `read`), here for the store in memory and as scripts in `history_redis.rs`; a property test holds the two together. A *break marker*
//! is an entry that says: after `shared`, entries were lost that somebody had received.

use std::collections::VecDeque;
use std::time::Duration;

use bytes::Bytes;

use crate::clock;
use crate::cursor::Cursor;
use crate::history_view::{Range, Room};

/// How long the answer to a publish with an idempotency key is remembered.
pub const IDEMPOTENCY_WINDOW: Duration = Duration::from_secs(5 * 60);

/// What an entry in memory takes beside its payload.
const ENTRY_BYTES: usize = 128;

/// How long a position lives at least without being used.
const POSITION_TTL_MIN: Duration = Duration::from_secs(24 * 60 * 60);

/// And how many times as long as the entries.
const POSITION_TTLS: u32 = 10;

/// What a channel's rule says of its history.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Retention {
    /// Most entries, at least one.
    pub size: usize,
    /// How old they get.
    pub ttl: Duration,
    /// How long the position lives after its last use.
    pub position_ttl: Duration,
}

impl Retention {
    /// The newest `size` entries, none older than `ttl`.
    pub fn new(size: usize, ttl: Duration) -> Self {
        Self { size: size.max(1), ttl, position_ttl: POSITION_TTL_MIN.max(ttl * POSITION_TTLS) }
    }

    pub(crate) fn ttl_ms(&self) -> u64 {
        self.ttl.as_millis() as u64
    }

    pub(crate) fn position_ttl_ms(&self) -> u64 {
        self.position_ttl.as_millis() as u64
    }
}

/// A place in a chain that is taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Its id.
    pub id: Cursor,
    /// The id of the one before it, be that an entry or the genesis.
    pub previous: Cursor,
    /// What is there.
    pub content: Content,
}

/// What an entry is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Content {
    /// A publication: its payload.
    Event(Bytes),
    /// A break marker: the newest id that the lost branch shares with this chain, if one is known.
    Marker(Option<Cursor>),
}

impl Entry {
    /// The newest id shared with a lost branch, for a break marker.
    pub fn marker(&self) -> Option<Option<Cursor>> {
        match self.content {
            Content::Event(_) => None,
            Content::Marker(shared) => Some(shared),
        }
    }

    /// A break marker that does not know where the lost branch began.
    pub fn is_blind_marker(&self) -> bool {
        self.marker() == Some(None)
    }

    /// Bytes of the payload.
    pub fn len(&self) -> usize {
        match &self.content {
            Content::Event(payload) => payload.len(),
            Content::Marker(_) => 0,
        }
    }

    /// What it takes in memory.
    fn bytes(&self) -> usize {
        self.len() + ENTRY_BYTES
    }

    /// Whether it has no payload, or an empty one.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// A loss that is to be marked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Loss {
    /// The newest id in common, if there is one.
    pub shared: Option<Cursor>,
    /// The id that must be lost.
    pub own: Cursor,
    /// Markers without a shared id that are known already; nor does one count that is older than what is lost.
    pub passed: Vec<Cursor>,
}

/// What marking a loss came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Marked {
    /// Nothing is lost: the id is there.
    Exists,
    /// Somebody was faster: this marker says the same.
    Already(Cursor),
    /// This marker was written.
    Written(Cursor),
}

/// When an operation happens, and what makes its ids unique.
#[derive(Clone, Copy, Debug)]
pub struct Moment {
    /// Milliseconds since 1970.
    pub now_ms: u64,
    /// Random; the lower 48 bits are used.
    pub random: u64,
}

impl Moment {
    /// This one.
    pub fn now() -> Self {
        Self { now_ms: clock::unix_ms(clock::now_us()), random: rand::random() }
    }
}

/// Where an id stands against a read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// On the chain.
    On,
    /// On no chain that leads here.
    Fork,
    /// Trimmed, or lost so long ago that it cannot be told apart.
    Old,
}

/// A channel's stream and position at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Window {
    /// The stream, oldest first. Read for a page: its first entry, the one asked from, and what the page has room for.
    pub entries: Vec<Entry>,
    /// The position: the newest id, whose entry may be trimmed.
    pub top: Cursor,
}

impl Window {
    /// What the oldest entry that is left names as its predecessor.
    pub fn horizon(&self) -> Option<Cursor> {
        self.entries.first().map(|entry| entry.previous)
    }

    /// Where in the entries an id is.
    pub fn find(&self, id: Cursor) -> Option<usize> {
        self.entries.binary_search_by_key(&id, |entry| entry.id).ok()
    }

    /// Whether the chain certainly has an id.
    pub fn has(&self, id: Cursor) -> bool {
        id == self.top || self.horizon() == Some(id) || self.find(id).is_some()
    }

    /// Where an id stands. Ids grow along a chain, and nothing is between the horizon and the first entry.
    pub fn judge(&self, id: Cursor) -> Standing {
        if self.has(id) {
            Standing::On
        } else if id > self.horizon().unwrap_or(self.top) {
            Standing::Fork
        } else {
            Standing::Old
        }
    }

    /// The entries after an id, if the window continues it.
    pub fn after(&self, id: Cursor) -> Option<&[Entry]> {
        if let Some(at) = self.find(id) {
            Some(&self.entries[at + 1..])
        } else if self.horizon() == Some(id) {
            Some(&self.entries)
        } else {
            (id == self.top).then_some(&[])
        }
    }
}

/// When an entry goes where there is no room: the last one of its channel, and of which millisecond.
pub(crate) type Rank = (bool, u64);

/// One channel's chain: its stream and its position.
#[derive(Clone, Debug, Default)]
pub struct Chain {
    stream: VecDeque<Entry>,
    /// What that takes.
    bytes: usize,
    top: Option<Cursor>,
    /// When the position is forgotten.
    expires_ms: u64,
}

impl Chain {
    /// The position; a new chain if there is none. Being used, it is kept.
    pub fn position(&mut self, retention: &Retention, at: Moment) -> Cursor {
        let top = match self.top.filter(|_| self.expires_ms > at.now_ms) {
            Some(top) => top,
            None => {
                self.stream.clear();
                self.bytes = 0;
                Cursor::genesis(at.now_ms, at.random)
            }
        };
        self.top = Some(top);
        self.expires_ms = at.now_ms + retention.position_ttl_ms();
        top
    }

    /// Drops what is too old.
    fn trim(&mut self, retention: &Retention, now_ms: u64) {
        while self.stream.front().is_some_and(|entry| entry.id.ms + retention.ttl_ms() <= now_ms) {
            self.forget_oldest();
        }
    }

    /// Drops the oldest entry, if there is one.
    pub(crate) fn forget_oldest(&mut self) -> bool {
        let oldest = self.stream.pop_front();
        self.bytes -= oldest.as_ref().map_or(0, Entry::bytes);
        oldest.is_some()
    }

    /// What its entries take.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// What goes first where there is no room for all entries of all channels, oldest first here: the old ones, and the
    /// last one of a channel after all others. With what it takes.
    pub(crate) fn ranks(&self) -> impl Iterator<Item = (Rank, usize)> + '_ {
        let newest = self.stream.len().saturating_sub(1);
        self.stream.iter().enumerate().map(move |(at, entry)| ((at == newest, entry.id.ms), entry.bytes()))
    }

    fn append(&mut self, top: Cursor, content: Content, retention: &Retention, at: Moment) -> Entry {
        let entry = Entry { id: top.next(at.now_ms, at.random), previous: top, content };
        self.bytes += entry.bytes();
        self.stream.push_back(entry.clone());
        while self.stream.len() > retention.size {
            self.forget_oldest();
        }
        self.top = Some(entry.id);
        entry
    }

    /// Appends a publication.
    pub fn publish(&mut self, payload: Bytes, retention: &Retention, at: Moment) -> Entry {
        let top = self.position(retention, at);
        self.append(top, Content::Event(payload), retention, at)
    }

    /// Writes a break marker, unless nothing is lost or it is marked already. With the entry, if one was written.
    pub fn mark(&mut self, loss: &Loss, retention: &Retention, at: Moment) -> (Marked, Option<Entry>) {
        let top = self.position(retention, at);
        self.trim(retention, at.now_ms);
        if loss.own == top || self.stream.iter().any(|entry| entry.id == loss.own) {
            return (Marked::Exists, None);
        }
        let says_it = |entry: &&Entry| {
            let is_of_this = || entry.id > loss.own && !loss.passed.contains(&entry.id);
            entry.marker() == Some(loss.shared) && (loss.shared.is_some() || is_of_this())
        };
        if let Some(marker) = self.stream.iter().find(says_it) {
            return (Marked::Already(marker.id), None);
        }
        let entry = self.append(top, Content::Marker(loss.shared), retention, at);
        (Marked::Written(entry.id), Some(entry))
    }

    /// Stream and position at one moment. Whoever holds the position `unless` has no need of the stream: it comes empty
    /// if nothing was appended since.
    pub fn read(&mut self, unless: Option<Cursor>, retention: &Retention, at: Moment) -> Window {
        let top = self.position(retention, at);
        self.trim(retention, at.now_ms);
        let entries = if unless == Some(top) { Vec::new() } else { self.stream.iter().cloned().collect() };
        Window { entries, top }
    }

    /// What [`Window::page`] needs of the stream, and the position.
    pub fn read_page(&mut self, range: Range, limit: usize, retention: &Retention, at: Moment) -> Window {
        let top = self.position(retention, at);
        self.trim(retention, at.now_ms);
        let mut room = Room::of_page(limit);
        let mut is_full = false;
        // One that has no room is read too: it says that there is more.
        let is_read = |entry: &&Entry| !std::mem::replace(&mut is_full, !room.takes(entry));
        let from = |cursor| self.stream.partition_point(|entry| entry.id < cursor);
        let entries = match range {
            Range::After(cursor) => {
                let start = from(cursor);
                let next = self.stream.partition_point(|entry| entry.id <= cursor);
                let known = self.stream.range(..start.min(1)).chain(self.stream.range(start..next));
                known.chain(self.stream.range(next..).take_while(is_read)).cloned().collect()
            }
            Range::Before(_) | Range::Newest => {
                let end = if let Range::Before(cursor) = range { from(cursor) } else { self.stream.len() };
                let count = self.stream.range(..end).rev().take_while(is_read).count();
                self.stream.range(end - count..end).cloned().collect()
            }
        };
        Window { entries, top }
    }

    /// Whether the stream is empty.
    pub fn is_empty(&self) -> bool {
        self.stream.is_empty()
    }

    /// What goes first where there is too much: positions alone, then what was published to longest ago.
    pub(crate) fn worth(&self) -> (bool, Option<Cursor>) {
        (!self.stream.is_empty(), self.top)
    }

    /// Drops what is too old; true if nothing is left, not even the position.
    pub fn expire(&mut self, retention: &Retention, now_ms: u64) -> bool {
        self.trim(retention, now_ms);
        self.expires_ms <= now_ms
    }
}
