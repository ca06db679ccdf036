//! Who is at the other end of a connection, as far as everybody may see it.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use parking_lot::RwLock;

use crate::close::CloseReason;
use crate::identity::Identity;

/// Never, in milliseconds since 1970.
const NEVER_MS: u64 = u64::MAX;

/// Who opens a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Caller {
    /// Nobody is asked; it may have said so itself.
    Unasked(Option<Box<str>>),
    /// It has shown a good token.
    Known(Arc<Identity>),
    /// It has to show one by then (ms since 1970).
    Stranger(u64),
}

/// Whose an open connection is, and until when.
#[derive(Debug)]
pub struct Holder {
    user: OnceLock<Box<str>>,
    /// What its token says; `None` without authentication, or before it.
    identity: RwLock<Option<Arc<Identity>>>,
    /// When the token expires, or before there is one, the time to show it (ms since 1970).
    expires_ms: AtomicU64,
    /// The same of the first that expires of its tokens for single channels.
    grants_expire_ms: AtomicU64,
}

impl From<Caller> for Holder {
    fn from(caller: Caller) -> Self {
        let (user, identity, expires_ms) = match caller {
            Caller::Unasked(user) => (user, None, NEVER_MS),
            Caller::Known(identity) => (identity.user.clone(), Some(Arc::clone(&identity)), identity.expires_s * 1000),
            Caller::Stranger(until_ms) => (None, None, until_ms),
        };
        Self {
            user: user.map(OnceLock::from).unwrap_or_default(),
            identity: RwLock::new(identity),
            expires_ms: AtomicU64::new(expires_ms),
            grants_expire_ms: AtomicU64::new(NEVER_MS),
        }
    }
}

impl Holder {
    /// As its token says, or without authentication as the client does.
    pub fn user(&self) -> Option<&str> {
        self.user.get().map(|user| &**user)
    }

    /// What its token says, if it has shown one.
    pub fn identity(&self) -> Option<Arc<Identity>> {
        self.identity.read().clone()
    }

    /// It has shown a good token: from now on that counts. Its user stays whose it is.
    pub(crate) fn take(&self, identity: &Arc<Identity>) {
        if let Some(user) = &identity.user {
            self.user.get_or_init(|| user.clone());
        }
        *self.identity.write() = Some(Arc::clone(identity));
        self.expires_ms.store(identity.expires_s * 1000, Ordering::Relaxed);
    }

    /// Why it has to go at a moment (ms since 1970), if it has.
    pub(crate) fn overdue(&self, unix_ms: u64) -> Option<CloseReason> {
        let is_over = self.expires_ms.load(Ordering::Relaxed) <= unix_ms;
        is_over.then(|| match *self.identity.read() {
            Some(_) => CloseReason::TokenExpired,
            None => CloseReason::AuthTimeout,
        })
    }

    /// Notes when the first of its tokens for single channels expires, if there are any.
    pub(crate) fn grants_expire(&self, first_s: Option<u64>) {
        self.grants_expire_ms.store(first_s.map_or(NEVER_MS, |first_s| first_s * 1000), Ordering::Relaxed);
    }

    /// Whether it has shown tokens for single channels.
    pub(crate) fn has_grants(&self) -> bool {
        self.grants_expire_ms.load(Ordering::Relaxed) != NEVER_MS
    }

    /// Whether one of them is over.
    pub(crate) fn has_old_grants(&self, unix_ms: u64) -> bool {
        self.grants_expire_ms.load(Ordering::Relaxed) <= unix_ms
    }
}
