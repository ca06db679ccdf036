//! Tokens that are good by themselves and not taken any more: by user, or by their id (`jti`).
//!
//! An entry is remembered for as long as a token may live (`HUBCAST_JWT_LIFE_MAX`); by then none that it concerns is
//! left. With Redis all instances share them: `{key_prefix}revoked` is a sorted set of `u:{user}` and `t:{token id}`
//! by the second of their revocation. Each instance reads what is new there, so that one which was away, or began
//! later, knows it as well; and what it could not write yet, it writes later.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use parking_lot::RwLock;
use redis::RedisResult;
use serde::{Deserialize, Serialize};

use crate::commands::Commands;
use crate::identity::Identity;

/// Most that are remembered: 10 MB.
pub const REVOCATIONS_MAX: usize = 100_000;

/// How far the clocks of instances may be apart, and what is read again for that.
const CLOCK_SKEW_S: u64 = 120;

/// Entries of one command.
const BATCH_ENTRIES: usize = 1000;

/// Whose tokens are revoked.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Revoked {
    /// All of a user that were issued up to then.
    User(Box<str>),
    /// The one with this `jti`.
    Token(Box<str>),
}

impl Revoked {
    fn member(&self) -> String {
        match self {
            Self::User(user) => format!("u:{user}"),
            Self::Token(id) => format!("t:{id}"),
        }
    }

    fn parse(member: &str) -> Option<Self> {
        match member.split_once(':')? {
            ("u", user) => Some(Self::User(user.into())),
            ("t", id) => Some(Self::Token(id.into())),
            _ => None,
        }
    }
}

/// What is revoked, as this instance knows it.
#[derive(Debug)]
pub struct Revocations {
    life_max_s: u64,
    known: RwLock<Known>,
}

#[derive(Debug, Default)]
struct Known {
    /// Since which second.
    since_s: HashMap<Revoked, u64>,
    /// What Redis does not have yet.
    unwritten: Vec<Revoked>,
}

/// There are too many already.
#[derive(Debug)]
pub struct TooMany;

impl Revocations {
    /// Nothing is revoked yet; tokens live so long at most.
    pub fn new(life_max_s: u64) -> Self {
        Self { life_max_s, known: RwLock::default() }
    }

    /// Revokes what was issued up to a second. True: that is news.
    ///
    /// # Errors
    /// [`REVOCATIONS_MAX`] is reached.
    pub fn add(&self, revoked: &Revoked, at_s: u64, now_s: u64) -> Result<bool, TooMany> {
        let mut known = self.known.write();
        if known.since_s.len() >= REVOCATIONS_MAX {
            known.since_s.retain(|_, since_s| *since_s + self.life_max_s > now_s);
            if known.since_s.len() >= REVOCATIONS_MAX && !known.since_s.contains_key(revoked) {
                return Err(TooMany);
            }
        }
        match known.since_s.entry(revoked.clone()) {
            Entry::Occupied(mut known) if *known.get() < at_s => drop(known.insert(at_s)),
            Entry::Occupied(_) => return Ok(false),
            Entry::Vacant(unknown) => drop(unknown.insert(at_s)),
        }
        Ok(true)
    }

    /// What was added last has to be written to Redis, too.
    pub fn note_unwritten(&self, revoked: &Revoked) {
        self.known.write().unwritten.push(revoked.clone());
    }

    /// Whether a token is not taken any more.
    pub fn concern(&self, identity: &Identity) -> bool {
        let known = self.known.read();
        if known.since_s.is_empty() {
            return false;
        }
        // Of a second in which both happened nobody knows the order; a token without `iat` may be of any time.
        let is_user = identity.user.as_ref().is_some_and(|user| {
            let since_s = known.since_s.get(&Revoked::User(user.clone()));
            since_s.is_some_and(|since_s| identity.issued_s.is_none_or(|issued_s| issued_s <= *since_s))
        });
        let token = identity.token_id.clone().map(Revoked::Token);
        is_user || token.is_some_and(|token| known.since_s.contains_key(&token))
    }

    /// How many are remembered.
    pub fn len(&self) -> usize {
        self.known.read().since_s.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Forgets what no living token can be concerned by.
    pub fn forget(&self, now_s: u64) {
        self.known.write().since_s.retain(|_, since_s| *since_s + self.life_max_s > now_s);
    }

    /// Writes what Redis does not have and reads what is new there since `seen_s` (0: everything). True: there was
    /// something new.
    ///
    /// # Errors
    /// Redis did not answer: what was to be written stays for the next time.
    pub async fn exchange(&self, link: &mut Commands, key: &str, seen_s: u64, now_s: u64) -> RedisResult<bool> {
        let unwritten = std::mem::take(&mut self.known.write().unwritten);
        if let Err(error) = self.write(link, key, &unwritten).await {
            self.known.write().unwritten.extend(unwritten);
            return Err(error);
        }
        let over_s = now_s.saturating_sub(self.life_max_s);
        redis::cmd("ZREMRANGEBYSCORE").arg(key).arg("-inf").arg(over_s).exec_async(link).await?;
        let from_s = seen_s.saturating_sub(CLOCK_SKEW_S);
        let mut range = redis::cmd("ZRANGEBYSCORE");
        range.arg(key).arg(from_s).arg("+inf").arg("WITHSCORES").arg("LIMIT").arg(0).arg(REVOCATIONS_MAX);
        let entries: Vec<(String, u64)> = range.query_async(link).await?;
        let mut is_news = false;
        for (member, at_s) in entries {
            if let Some(revoked) = Revoked::parse(&member) {
                is_news |= self.add(&revoked, at_s, now_s).unwrap_or(false);
            }
        }
        Ok(is_news)
    }

    async fn write(&self, link: &mut Commands, key: &str, unwritten: &[Revoked]) -> RedisResult<()> {
        for batch in unwritten.chunks(BATCH_ENTRIES) {
            let mut add = redis::cmd("ZADD");
            add.arg(key).arg("GT");
            {
                let known = self.known.read();
                for revoked in batch {
                    add.arg(known.since_s.get(revoked).copied().unwrap_or_default()).arg(revoked.member());
                }
            }
            add.exec_async(link).await?;
            redis::cmd("EXPIRE").arg(key).arg(self.life_max_s).exec_async(link).await?;
        }
        Ok(())
    }
}
