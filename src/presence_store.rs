//! What presence keeps of a channel, what happens to it, and the store in memory. Pure, no I/O.
//!
//! A channel has two sets. *Members* are `identity \0 connection_id` in the order of bytes: a user's connections
//! stand side by side, and a page goes on after any of them. *Users* are the identities, each with the time at which
//! its leave will be announced: 0 while it is here. Three operations change them (`join`, `leave`, `settle`), here
//! and as scripts in `presence_redis.rs`; a property test holds the two together.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::Bound;
use std::sync::Arc;

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

/// Between an identity and its connection; users have no control characters.
const SEPARATOR: char = '\0';

/// Goes before the connection's id where that is the identity.
const ANONYMOUS: char = '\x01';

/// What an event starts with on the channel's Redis channel: neither JSON nor text can.
pub const MAGIC: &[u8] = b"\xFFhubcast/1 ";

/// Who came or went, by identity.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Event {
    /// Its first connection is here.
    Join(Box<str>),
    /// Its last one left, and none came back in time.
    Leave(Box<str>),
}

impl Event {
    /// Reads a payload that starts with [`MAGIC`]; `None` if the rest is not an event.
    pub fn parse(payload: &[u8]) -> Option<Self> {
        serde_json::from_slice(payload.strip_prefix(MAGIC)?).ok()
    }
}

/// One connection of one identity.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Member(Arc<str>);

impl Member {
    /// A connection with its user, if it has one.
    pub fn new(user: Option<&str>, connection_id: &str) -> Self {
        Self(match user {
            Some(user) => format!("{user}{SEPARATOR}{connection_id}").into(),
            None => format!("{ANONYMOUS}{connection_id}{SEPARATOR}{connection_id}").into(),
        })
    }

    /// A member by its text, if it is one.
    pub fn parse(text: &str) -> Option<Self> {
        text.contains(SEPARATOR).then(|| Self(text.into()))
    }

    /// The text, in whose order members stand.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    fn split(&self) -> (&str, &str) {
        self.0.split_once(SEPARATOR).unwrap_or((&self.0, ""))
    }

    /// Whose connection it is: what joins and leaves.
    pub fn identity(&self) -> &str {
        self.split().0
    }

    /// The connection.
    pub fn connection_id(&self) -> &str {
        self.split().1
    }

    /// The user, where there is one.
    pub fn user(&self) -> Option<&str> {
        user_of(self.identity())
    }
}

/// The user of an identity; without one, the connection is what follows the mark.
pub fn user_of(identity: &str) -> Option<&str> {
    (!identity.starts_with(ANONYMOUS)).then_some(identity)
}

/// The connection of an identity without a user.
pub fn connection_of(identity: &str) -> &str {
    identity.strip_prefix(ANONYMOUS).unwrap_or(identity)
}

/// A connection that joins or leaves.
#[derive(Clone, Debug)]
pub struct Change {
    /// Which.
    pub member: Member,
    /// Its identity has been announced on its behalf: a join says nothing, and a leave will be told even if the
    /// store knows nothing of it.
    pub is_announced: bool,
}

/// A part of the members, and how many there are in all.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Page {
    /// Identities that are here.
    pub users: usize,
    /// Their connections.
    pub connections: usize,
    /// In order.
    pub members: Vec<Member>,
}

/// The store of an instance that is alone.
#[derive(Debug, Default)]
pub struct Memory {
    channels: Mutex<HashMap<Box<str>, Sets>>,
}

#[derive(Debug, Default)]
struct Sets {
    members: BTreeSet<Member>,
    /// When the leave of each is due, in milliseconds; 0 while it is here.
    users: BTreeMap<Box<str>, u64>,
    /// How many of them are here.
    here: usize,
}

impl Memory {
    /// Connections are here; returns what has to be told.
    pub fn join(&self, channel: &str, changes: &[Change]) -> Vec<Event> {
        let mut channels = self.channels.lock();
        let sets = channels.entry(channel.into()).or_default();
        let mut events = Vec::new();
        for Change { member, is_announced } in changes {
            sets.members.insert(member.clone());
            if sets.set(member.identity(), Some(0)).is_none() && !is_announced {
                events.push(Event::Join(member.identity().into()));
            }
        }
        events
    }

    /// Connections are gone. Returns for each how many milliseconds are left until it must be settled; 0: it need not.
    pub fn leave(&self, channel: &str, changes: &[Change], debounce_ms: u64, now_ms: u64) -> Vec<u64> {
        let mut channels = self.channels.lock();
        let sets = channels.entry(channel.into()).or_default();
        let leave = |Change { member, is_announced }: &Change| {
            sets.members.remove(member);
            let identity = member.identity();
            let before = sets.users.get(identity).copied();
            if sets.has(identity) || (before.is_none() && !is_announced) {
                return 0;
            }
            // Who is leaving already keeps its time: a repetition puts nothing off.
            let due_ms = before.filter(|due_ms| *due_ms > 0).unwrap_or(now_ms + debounce_ms);
            sets.set(identity, Some(due_ms));
            due_ms.saturating_sub(now_ms).max(1)
        };
        let left_ms = changes.iter().map(leave).collect();
        if sets.is_empty() {
            channels.remove(channel);
        }
        left_ms
    }

    /// Announces the leaves that are due. Returns for each how many milliseconds are left (0: nothing is left to do),
    /// and what has to be told.
    pub fn settle(&self, channel: &str, identities: &[&str], now_ms: u64) -> (Vec<u64>, Vec<Event>) {
        let mut channels = self.channels.lock();
        let Some(sets) = channels.get_mut(channel) else { return (vec![0; identities.len()], Vec::new()) };
        let mut events = Vec::new();
        let settle = |identity: &&str| match sets.users.get(*identity).copied() {
            None | Some(0) => 0,
            Some(due_ms) if due_ms > now_ms => due_ms - now_ms,
            Some(_) if sets.has(identity) => {
                sets.set(identity, Some(0));
                0
            }
            Some(_) => {
                sets.set(identity, None);
                events.push(Event::Leave((*identity).into()));
                0
            }
        };
        let left_ms = identities.iter().map(settle).collect();
        if sets.is_empty() {
            channels.remove(channel);
        }
        (left_ms, events)
    }

    /// The counts, and up to `limit` members after `after`.
    pub fn page(&self, channel: &str, after: Option<&Member>, limit: usize) -> Page {
        let channels = self.channels.lock();
        let Some(sets) = channels.get(channel) else { return Page::default() };
        let after = after.map_or(Bound::Unbounded, Bound::Excluded);
        Page {
            users: sets.here,
            connections: sets.members.len(),
            members: sets.members.range((after, Bound::Unbounded)).take(limit).cloned().collect(),
        }
    }
}

impl Sets {
    /// Whether a connection of the identity is here.
    fn has(&self, identity: &str) -> bool {
        let first = Member(format!("{identity}{SEPARATOR}").into());
        self.members.range(first..).next().is_some_and(|member| member.identity() == identity)
    }

    /// Sets when the leave of an identity is due, or forgets it; returns what was set before.
    fn set(&mut self, identity: &str, due_ms: Option<u64>) -> Option<u64> {
        let before = match due_ms {
            Some(due_ms) => self.users.insert(identity.into(), due_ms),
            None => self.users.remove(identity),
        };
        self.here += usize::from(due_ms == Some(0));
        self.here -= usize::from(before == Some(0));
        before
    }

    fn is_empty(&self) -> bool {
        self.members.is_empty() && self.users.is_empty()
    }
}
