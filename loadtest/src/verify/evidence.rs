//! What publishers and clients write down while a run goes on: all that the judge is shown. Pure.

use std::fmt;
use std::hash::{BuildHasher, BuildHasherDefault, DefaultHasher};
use std::num::NonZeroU32;

/// A message's identity within its channel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct MessageId {
    /// The number of its publisher.
    pub publisher: u16,
    /// Counts the messages of one publisher to one channel, from 0.
    pub sequence: u32,
}

impl fmt::Display for MessageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}#{}", self.publisher, self.sequence)
    }
}

/// A cursor in four bytes, or none: equal cursors stay equal, and one pair of different ones in four billion is not noticed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Mark(Option<NonZeroU32>);

impl Mark {
    pub(crate) const NONE: Self = Self(None);

    pub(crate) fn of(cursor: Option<&str>) -> Self {
        let hash = |cursor| BuildHasherDefault::<DefaultHasher>::default().hash_one(cursor) as u32;
        Self(cursor.map(|cursor: &str| NonZeroU32::new(hash(cursor)).unwrap_or(NonZeroU32::MAX)))
    }

    pub(crate) fn is_some(self) -> bool {
        self.0.is_some()
    }

    /// Whether both are there and not the same.
    pub(crate) fn differs(self, other: Self) -> bool {
        self.is_some() && other.is_some() && self != other
    }
}

/// What came of a publish.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// 200: it is demanded.
    Acked,
    /// Nothing was sent: nobody may have it.
    Refused,
    /// It may have been sent or not.
    Unknown,
}

/// One message that a publisher tried to publish. Times are microseconds since the run began.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Publication {
    /// Before the first byte of the request was written.
    pub started_us: u64,
    /// After the answer was read.
    pub ended_us: u64,
    pub outcome: Outcome,
    /// The cursor of the answer, where the channel has history.
    pub cursor: Mark,
}

/// One line of a client's log.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Entry {
    Event {
        message: MessageId,
        cursor: Mark,
    },
    /// Something rarer: an index into [`Log::told`].
    Told(u32),
}

/// Something that a client was told of its channel, or noticed.
#[derive(Clone, Debug)]
pub(crate) struct Told {
    /// When the client had read it.
    pub at_us: u64,
    pub what: What,
}

#[derive(Clone, Debug)]
pub(crate) enum What {
    /// `after` is what the client asked for.
    Subscribed {
        after: Mark,
        cursor: Mark,
        recovered: Option<bool>,
    },
    Gap {
        after: Mark,
        next: Mark,
        reason: String,
    },
    /// The subscription or its connection is over, and why.
    Ended(String),
    /// An event whose data no publisher of this run wrote.
    Foreign(String),
}

impl fmt::Display for What {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Subscribed { recovered: None, .. } => write!(f, "subscribed"),
            Self::Subscribed { recovered: Some(recovered), .. } => write!(f, "subscribed recovered:{recovered}"),
            Self::Gap { reason, .. } => write!(f, "gap {reason}"),
            Self::Ended(why) => write!(f, "ended: {why}"),
            Self::Foreign(data) => write!(f, "foreign event {data}"),
        }
    }
}

/// What one client saw of one channel, in the order in which it came.
#[derive(Clone, Debug, Default)]
pub(crate) struct Log {
    pub entries: Vec<Entry>,
    pub told: Vec<Told>,
}

impl Log {
    pub(crate) fn event(&mut self, message: MessageId, cursor: Mark) {
        self.entries.push(Entry::Event { message, cursor });
    }

    pub(crate) fn tell(&mut self, at_us: u64, what: What) {
        self.entries.push(Entry::Told(self.told.len() as u32));
        self.told.push(Told { at_us, what });
    }

    /// What is written down at a place, in words.
    fn words(&self, at: usize) -> String {
        match self.entries[at] {
            Entry::Event { message, .. } => message.to_string(),
            Entry::Told(told) => {
                let Told { at_us, what } = &self.told[told as usize];
                format!("[{what}, at {:.3} s]", *at_us as f64 / 1e6)
            }
        }
    }

    /// What is written down between two places and a little around them, in words.
    pub(crate) fn around(&self, first: usize, last: usize) -> String {
        const MARGIN: usize = 3;
        const SHOWN_MAX: usize = 16;
        let from = first.saturating_sub(MARGIN);
        let to = self.entries.len().min(last.saturating_add(MARGIN + 1));
        let mut words: Vec<_> = (from..to.min(from + SHOWN_MAX)).map(|at| self.words(at)).collect();
        if from > 0 {
            words.insert(0, "…".to_owned());
        }
        if from + words.len() < self.entries.len() {
            words.push("…".to_owned());
        }
        words.join(" ")
    }
}
