//! What all connections of one user, of one address, or of this instance may do and hold together, on top of what each
//! may (`allowance`).
//!
//! Its connections share a tab by an `Arc`, so that counting a command on it looks nothing up and takes no lock. The
//! table of guests keeps it while anything on it is ahead of its rate: whoever comes back finds it as he left it. One
//! who is refused takes nothing from the others of his user or address, and none of them is closed for what he does.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use crate::meter::{Rate, SharedMeter};
use crate::metrics::{Scope, Together};

/// What the connections on a tab may do and hold together; 0 and [`Rate::UNLIMITED`]: no limit.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// Whose connections they are.
    pub scope: Scope,
    /// As many commands as so many connections.
    pub commands: Rate,
    /// Likewise.
    pub publishes: Rate,
    /// Likewise.
    pub bytes: Rate,
    /// `HUBCAST_SUBSCRIPTIONS_PER_USER`, `_ADDRESS`, `_INSTANCE`
    pub subscriptions_max: usize,
    /// `HUBCAST_MEMORY_PER_USER`, `_ADDRESS`
    pub memory_max: usize,
}

/// What the connections of one guest did lately, and what they hold.
#[derive(Debug)]
pub struct Tab {
    bounds: Arc<Bounds>,
    commands: SharedMeter,
    publishes: SharedMeter,
    bytes: SharedMeter,
    subscriptions: AtomicUsize,
    arriving: AtomicUsize,
}

/// What one connection holds on a tab, until it is dropped.
#[derive(Debug)]
pub struct Share {
    tab: Arc<Tab>,
    subscriptions: usize,
    arriving: usize,
}

impl Bounds {
    /// Whether there is any limit.
    pub fn is_limited(&self) -> bool {
        let rates = [self.commands, self.publishes, self.bytes];
        rates.iter().any(Rate::is_limited) || self.subscriptions_max > 0 || self.memory_max > 0
    }
}

impl Tab {
    /// Nothing is on it.
    pub fn new(bounds: Arc<Bounds>) -> Self {
        Self {
            bounds,
            commands: SharedMeter::default(),
            publishes: SharedMeter::default(),
            bytes: SharedMeter::default(),
            subscriptions: AtomicUsize::new(0),
            arriving: AtomicUsize::new(0),
        }
    }

    /// Whether what was done lately still counts.
    pub fn is_owed(&self, now_us: u64) -> bool {
        [&self.commands, &self.publishes, &self.bytes].iter().any(|meter| !meter.ahead(now_us).is_zero())
    }
}

impl Share {
    /// One more connection on a tab.
    pub fn new(tab: &Arc<Tab>) -> Self {
        Self { tab: Arc::clone(tab), subscriptions: 0, arriving: 0 }
    }

    /// Whose connections share it.
    pub fn scope(&self) -> Scope {
        self.tab.bounds.scope
    }

    /// Counts commands.
    ///
    /// # Errors
    /// They are too many, for so long.
    pub fn commands(&self, count: usize, now_us: u64) -> Result<(), Duration> {
        self.tab.commands.try_take(&self.tab.bounds.commands, count, now_us)
    }

    /// Counts publishes.
    ///
    /// # Errors
    /// They are too many, for so long.
    pub fn publishes(&self, count: usize, now_us: u64) -> Result<(), Duration> {
        self.tab.publishes.try_take(&self.tab.bounds.publishes, count, now_us)
    }

    /// Counts bytes that were read; returns how long not to read more.
    pub fn read(&self, bytes: usize, now_us: u64) -> Duration {
        let rate = &self.tab.bounds.bytes;
        self.tab.bytes.take(rate, bytes, now_us).saturating_sub(rate.burst())
    }

    /// Whether one more subscription would be one too many. Connections that ask in the same moment may get one each.
    pub fn has_all_subscriptions(&self) -> bool {
        let most = self.tab.bounds.subscriptions_max;
        most > 0 && self.tab.subscriptions.load(Ordering::Relaxed) >= most
    }

    /// The connection has so many subscriptions now.
    pub fn subscribed(&mut self, number: usize) {
        hold(&self.tab.subscriptions, &mut self.subscriptions, number);
    }

    /// So many bytes of the connection are arriving now. True: it added to what is too much.
    pub fn arriving(&mut self, bytes: usize) -> bool {
        let is_more = bytes > self.arriving;
        hold(&self.tab.arriving, &mut self.arriving, bytes);
        let most = self.tab.bounds.memory_max;
        is_more && most > 0 && self.tab.arriving.load(Ordering::Relaxed) > most
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.subscribed(0);
        self.arriving(0);
    }
}

/// Has a part of what is on a tab be so much now.
fn hold(all: &AtomicUsize, part: &mut usize, now: usize) {
    let before = std::mem::replace(part, now);
    match now.checked_sub(before) {
        Some(0) => {}
        Some(more) => drop(all.fetch_add(more, Ordering::Relaxed)),
        None => drop(all.fetch_sub(before - now, Ordering::Relaxed)),
    }
}

/// What somebody is told who meets a limit that he shares.
pub(crate) fn too_many(scope: Scope, what: Together) -> &'static str {
    match (what, scope) {
        (Together::Commands, Scope::User) => "too many commands of this user",
        (Together::Commands, Scope::Address) => "too many commands from this address",
        (Together::Commands, Scope::Instance) => "too many commands on this instance",
        (Together::Publishes, Scope::User) => "too many publishes of this user",
        (Together::Publishes, Scope::Address) => "too many publishes from this address",
        (Together::Publishes, Scope::Instance) => "too many publishes on this instance",
        (Together::Subscriptions, Scope::User) => "too many subscriptions of this user",
        (Together::Subscriptions, Scope::Address) => "too many subscriptions from this address",
        (Together::Subscriptions, Scope::Instance) => "too many subscriptions on this instance",
        (Together::Bytes | Together::Memory, Scope::User) => "too much at once of this user, come back later",
        (Together::Bytes | Together::Memory, Scope::Address) => "too much at once from this address, come back later",
        (Together::Bytes | Together::Memory, Scope::Instance) => "too much at once, come back later",
    }
}
