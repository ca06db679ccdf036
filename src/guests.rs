//! Who has how many connections here, and how fast they come: by address, and by user.
//!
//! An entry lives while its guest has a connection, or came so often or did so much lately that it still
//! counts. Strangers without a connection are bounded by [`STRANGERS_MAX`]; beyond it those who have no
//! entry yet are let in uncounted: the limits of the instance hold for them, and nobody can lock others
//! out by filling the table. An IPv6 guest is its /64, which is what one subscriber gets (RFC 6177).

use std::hash::Hash;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use dashmap::DashMap;
use dashmap::mapref::entry::Entry;

use crate::clock;
use crate::meter::{Meter, Rate};
use crate::tab::{Bounds, Tab};

/// Most entries without a connection: 12 MB of addresses.
pub const STRANGERS_MAX: usize = 65_536;

/// How often a full table is looked through, at most.
const SWEEP_INTERVAL_US: u64 = 1_000_000;

/// Guests of one kind.
#[derive(Debug)]
pub struct Guests<K: Eq + Hash> {
    known: DashMap<K, Guest, foldhash::quality::RandomState>,
    /// Connections that are counted.
    stays: AtomicUsize,
    /// When entries that are over were last looked for.
    swept_us: AtomicU64,
    connections_max: usize,
    handshakes: Rate,
    /// What the connections of a guest may do together, if that is limited.
    bounds: Option<Arc<Bounds>>,
}

#[derive(Debug)]
struct Guest {
    connections: usize,
    handshakes: Meter,
    tab: Option<Arc<Tab>>,
}

/// Why a guest may not have one more connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unwelcome {
    /// It has as many as it may have.
    Connections,
    /// It comes too often; after this time it may come again.
    Handshakes(Duration),
}

/// Counts one connection of a guest until it is dropped. Nothing is kept where nothing is limited.
#[derive(Debug)]
pub struct Stay<K: Eq + Hash>(Option<Box<Counted<K>>>);

#[derive(Debug)]
struct Counted<K: Eq + Hash> {
    guests: Arc<Guests<K>>,
    key: K,
    tab: Option<Arc<Tab>>,
}

impl<K: Eq + Hash> Default for Stay<K> {
    /// Not counted.
    fn default() -> Self {
        Self(None)
    }
}

impl<K: Eq + Hash + Clone> Guests<K> {
    /// Guests that may have so many connections each (0: any number), come so often, and do so much.
    pub fn new(connections_max: usize, handshakes: Rate, bounds: Option<Bounds>) -> Arc<Self> {
        Arc::new(Self {
            known: DashMap::with_hasher(foldhash::quality::RandomState::default()),
            stays: AtomicUsize::new(0),
            swept_us: AtomicU64::new(0),
            connections_max,
            handshakes,
            bounds: bounds.filter(Bounds::is_limited).map(Arc::new),
        })
    }

    /// One more connection of a guest.
    ///
    /// # Errors
    /// Why not.
    pub fn enter(self: &Arc<Self>, key: &K, now_us: u64) -> Result<Stay<K>, Unwelcome> {
        if self.connections_max == 0 && !self.handshakes.is_limited() && self.bounds.is_none() {
            return Ok(Stay::default());
        }
        let is_full = self.is_full(now_us);
        let mut guest = match self.known.entry(key.clone()) {
            Entry::Occupied(known) => known.into_ref(),
            Entry::Vacant(_) if is_full => return Ok(Stay::default()),
            Entry::Vacant(unknown) => unknown.insert(self.guest()),
        };
        if self.connections_max > 0 && guest.connections >= self.connections_max {
            return Err(Unwelcome::Connections);
        }
        guest.handshakes.try_take(&self.handshakes, 1, now_us).map_err(Unwelcome::Handshakes)?;
        guest.connections += 1;
        self.stays.fetch_add(1, Ordering::Relaxed);
        let counted = Counted { guests: Arc::clone(self), key: key.clone(), tab: guest.tab.clone() };
        Ok(Stay(Some(Box::new(counted))))
    }

    fn guest(&self) -> Guest {
        let tab = self.bounds.as_ref().map(|bounds| Arc::new(Tab::new(Arc::clone(bounds))));
        Guest { connections: 0, handshakes: Meter::default(), tab }
    }

    /// How many entries there are.
    pub fn len(&self) -> usize {
        self.known.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.known.is_empty()
    }

    /// Whether there are too many strangers, even without those whose time is over.
    fn is_full(&self, now_us: u64) -> bool {
        let entries_max = self.stays.load(Ordering::Relaxed) + STRANGERS_MAX;
        if self.known.len() < entries_max {
            return false;
        }
        let swept_us = self.swept_us.load(Ordering::Relaxed);
        if now_us.saturating_sub(swept_us) >= SWEEP_INTERVAL_US {
            self.swept_us.store(now_us, Ordering::Relaxed);
            self.known.retain(|_, guest| guest.connections > 0 || guest.is_owed(now_us));
        }
        self.known.len() >= entries_max
    }
}

impl Guest {
    fn is_owed(&self, now_us: u64) -> bool {
        !self.handshakes.ahead(now_us).is_zero() || self.tab.as_ref().is_some_and(|tab| tab.is_owed(now_us))
    }
}

impl<K: Eq + Hash> Stay<K> {
    /// What the guest's connections do together, if that is limited.
    pub fn tab(&self) -> Option<&Arc<Tab>> {
        self.0.as_ref()?.tab.as_ref()
    }
}

impl<K: Eq + Hash> Drop for Stay<K> {
    fn drop(&mut self) {
        let Some(Counted { guests, key, .. }) = self.0.take().map(|stay| *stay) else { return };
        guests.stays.fetch_sub(1, Ordering::Relaxed);
        // Whoever comes often or does much is remembered until that is over.
        let is_counted = guests.handshakes.is_limited();
        guests.known.remove_if_mut(&key, |_, guest| {
            guest.connections -= 1;
            guest.connections == 0 && !is_counted && !guest.is_owed(clock::now_us())
        });
    }
}

/// The address that counts: IPv4 as such, also where it comes as IPv6; of IPv6 the /64.
pub fn network(addr: IpAddr) -> IpAddr {
    match addr.to_canonical() {
        IpAddr::V6(addr) => IpAddr::V6(Ipv6Addr::from_bits(addr.to_bits() & !u128::from(u64::MAX))),
        v4 => v4,
    }
}
