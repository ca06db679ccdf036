//! What becomes of publications that a slow consumer has no room for, by the rule of their channel. Pure.

use std::collections::HashMap;
use std::hash::BuildHasher;
use std::sync::{Arc, LazyLock};

use serde_json::Value;
use serde_json::value::RawValue;

use crate::publication::Payload;

/// The policy of a channel.
#[derive(Clone, Debug, Default)]
pub enum SlowPolicy {
    /// The connection is closed with 4101.
    #[default]
    Close,
    /// The oldest go.
    DropOldest,
    /// Of those with the same key only the newest stays; then the oldest go. Without a pointer all have one key.
    Latest(Option<Pointer>),
}

/// How publications of a channel give way. The first lane goes first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EvictionLane {
    /// A newer one of the same key takes its place; without a key it only grows old.
    Latest(Option<u64>),
    /// It only grows old.
    DropOldest,
}

/// A JSON pointer (RFC 6901): where in a payload the key is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pointer(Arc<[Box<str>]>);

/// Nobody outside can tell which keys have the same hash.
static KEYS: LazyLock<foldhash::quality::RandomState> = LazyLock::new(Default::default);

impl SlowPolicy {
    /// Whether only the newest of each key counts: then none may be tied to another.
    pub fn is_latest(&self) -> bool {
        matches!(self, Self::Latest(_))
    }

    /// Whether publications give way.
    pub fn is_lossy(&self) -> bool {
        !matches!(self, Self::Close)
    }

    /// How a publication gives way, if it does.
    pub fn lane(&self, payload: Payload<'_>) -> Option<EvictionLane> {
        match self {
            Self::Close => None,
            Self::DropOldest => Some(EvictionLane::DropOldest),
            Self::Latest(None) => Some(EvictionLane::Latest(Some(0))),
            Self::Latest(Some(pointer)) => Some(EvictionLane::Latest(pointer.key(payload))),
        }
    }
}

impl Pointer {
    /// Reads a pointer as RFC 6901 writes it.
    pub fn parse(text: &str) -> Option<Self> {
        if text.is_empty() {
            return Some(Self(Arc::new([])));
        }
        let tokens = text.strip_prefix('/')?.split('/');
        // In a token `~` is written `~0`, and `/` is `~1`.
        let is_escaped = |token: &str| token.split('~').skip(1).all(|rest| rest.starts_with(['0', '1']));
        let token = |token: &str| is_escaped(token).then(|| token.replace("~1", "/").replace("~0", "~").into());
        Some(Self(tokens.map(token).collect::<Option<_>>()?))
    }

    /// A hash of what it points to; `None` if that is not there.
    fn key(&self, payload: Payload<'_>) -> Option<u64> {
        let text = str::from_utf8(payload.bytes()).ok()?;
        let whole: &RawValue = serde_json::from_str(text).ok()?;
        let found = self.0.iter().try_fold(whole, |value, token| member(value, token))?;
        // Parsed: one value has several spellings.
        let value: Value = serde_json::from_str(found.get()).ok()?;
        Some(KEYS.hash_one(value))
    }
}

/// One step of a pointer.
fn member<'a>(value: &'a RawValue, token: &str) -> Option<&'a RawValue> {
    if value.get().starts_with('[') {
        let is_index = token == "0" || !token.starts_with(['0', '+']);
        let index = token.parse::<usize>().ok().filter(|_| is_index)?;
        return serde_json::from_str::<Vec<&RawValue>>(value.get()).ok()?.get(index).copied();
    }
    serde_json::from_str::<HashMap<String, &RawValue>>(value.get()).ok()?.get(token).copied()
}
