//! Cursors: the ids of a channel's entries, `ms-sequence` as Redis Streams have them. Pure.
//!
//! An id never comes again after Redis went back to an older state, whatever its clocks do: each new millisecond starts
//! at 48 random bits, and within one the step is random too. To clients a cursor is opaque.

use std::collections::VecDeque;
use std::fmt;

/// Every part of an id is below: what a double, and so a Lua script, holds exactly.
const PART_MAX: u64 = 1 << 53;

/// How many random bits an id takes from its publisher.
pub const RANDOM_BITS: u32 = 48;

/// The step within a millisecond has so many bits less.
const STEP_SHIFT: u32 = 16;

/// The id of an entry: a place in a channel's chain. In the order of ids, which along one chain is the order of time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Cursor {
    /// Milliseconds since 1970 by the clock of the server that gave it, or later.
    pub ms: u64,
    /// What tells it from others of the same millisecond.
    pub sequence: u64,
}

impl Cursor {
    /// Reads a cursor as it is written. Whatever no script can have given is none: signs, leading zeros, parts of 2^53
    /// and more.
    pub fn parse(text: &str) -> Option<Self> {
        let (ms, sequence) = text.split_once('-')?;
        Some(Self { ms: part(ms)?, sequence: part(sequence)? })
    }

    /// As [`Cursor::parse`], for bytes.
    pub fn parse_bytes(text: &[u8]) -> Option<Self> {
        Self::parse(str::from_utf8(text).ok()?)
    }

    /// What a chain starts from: an id without an entry.
    pub fn genesis(now_ms: u64, random: u64) -> Self {
        Self { ms: now_ms, sequence: random_bits(random) }
    }

    /// The id of the entry that follows this one.
    #[must_use]
    pub fn next(self, now_ms: u64, random: u64) -> Self {
        let random = random_bits(random);
        let sequence = self.sequence + 1 + (random >> STEP_SHIFT);
        if now_ms > self.ms {
            Self { ms: now_ms, sequence: random }
        } else if sequence < PART_MAX {
            Self { ms: self.ms, sequence }
        } else {
            Self { ms: self.ms + 1, sequence: random }
        }
    }
}

impl fmt::Display for Cursor {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}-{}", self.ms, self.sequence)
    }
}

/// The bits of a random number that ids are made of.
pub fn random_bits(random: u64) -> u64 {
    random & ((1 << RANDOM_BITS) - 1)
}

fn part(digits: &str) -> Option<u64> {
    let is_plain = digits.bytes().all(|byte| byte.is_ascii_digit()) && (digits == "0" || !digits.starts_with('0'));
    digits.parse().ok().filter(|part| is_plain && *part < PART_MAX)
}

/// The last ids of a kind, in the order in which they came; so many, and older ones are forgotten.
#[derive(Debug)]
pub struct Ids {
    pub(crate) ids: VecDeque<Cursor>,
    max: usize,
    more: usize,
}

impl Ids {
    /// Room for `max` ids, at least one.
    pub fn new(max: usize) -> Self {
        Self { ids: VecDeque::new(), max: max.max(1), more: 0 }
    }

    /// Room for so many more, for a while.
    pub(crate) fn widen(&mut self, more: usize) {
        self.more = more;
    }

    /// The end of that while.
    pub(crate) fn narrow(&mut self) {
        self.more = 0;
        self.ids.drain(..self.ids.len().saturating_sub(self.max));
        self.ids.shrink_to(self.max);
    }

    /// For how many there is room now.
    pub(crate) fn room(&self) -> usize {
        self.max + self.more
    }

    /// Whether it is among them: a search through all.
    pub fn has(&self, id: Cursor) -> bool {
        self.ids.contains(&id)
    }

    /// One more.
    pub fn push(&mut self, id: Cursor) {
        if self.ids.len() == self.room() {
            self.ids.pop_front();
        }
        self.ids.push_back(id);
    }
}
