//! Who is let in: before the upgrade, before any work for it, and before anything is allocated.
//!
//! A reconnect storm is served at the rate that the machine sustains; the rest is told to come back, spread
//! over the time that the rest needs (`Retry-After`). So those who are admitted are served well, and those who are
//! connected notice little, instead of everybody waiting for everybody.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::guests::{self, Guests, Stay, Unwelcome};
use crate::limits_config::LimitsConfig;
use crate::meter::{Meter, Rate};
use crate::metrics::{Refused, Scope};
use crate::tab::{Bounds, Share, Tab};

/// Who finds no place, not for a rate's sake, comes back at a random moment within this time.
const PLACE_WAIT: Duration = Duration::from_secs(5);

/// Nobody is sent away for longer.
const WAIT_MAX: Duration = Duration::from_secs(60);

/// The limits before the upgrade.
#[derive(Debug)]
pub struct Admission {
    /// A permit per connection (`HUBCAST_CONNECTIONS_MAX`).
    places: Arc<Semaphore>,
    connections_max: usize,
    /// A permit per handshake in progress (`HUBCAST_HANDSHAKES_PENDING_MAX`).
    pending: Arc<Semaphore>,
    pending_max: usize,
    /// `HUBCAST_HANDSHAKES_PER_SECOND`
    rate: Rate,
    handshakes: Mutex<Handshakes>,
    addresses: Arc<Guests<IpAddr>>,
    users: Arc<Guests<Box<str>>>,
    /// What all connections do together, if that is limited.
    instance: Option<Arc<Tab>>,
}

#[derive(Debug, Default)]
struct Handshakes {
    /// Those that were let in.
    admitted: Meter,
    /// Those that were not: in what time they all could be, one after another.
    refused: Meter,
}

/// Why somebody is not let in, and when to come again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Denied {
    /// The metric's label.
    pub why: Refused,
    /// For `Retry-After`.
    pub wait: Duration,
}

/// A connection that was let in: the place it takes.
#[derive(Debug)]
pub struct Place {
    _place: OwnedSemaphorePermit,
    address: Option<Stay<IpAddr>>,
}

impl Place {
    /// Its place among the connections of its address, where that is known before a proxy tells it.
    pub fn address(&self) -> Option<&Stay<IpAddr>> {
        self.address.as_ref()
    }
}

/// A handshake in progress, until it is dropped.
#[derive(Debug)]
pub struct Pending {
    _permit: OwnedSemaphorePermit,
}

impl Admission {
    /// Limits as configured, for so many connections. What users do together counts only where they show who they are.
    pub fn new(limits: &LimitsConfig, connections_max: usize, is_authenticated: bool) -> Self {
        let bounds = |scope| limits.bounds(scope);
        Self {
            places: Arc::new(Semaphore::new(connections_max)),
            connections_max,
            pending: Arc::new(Semaphore::new(limits.handshakes_pending_max)),
            pending_max: limits.handshakes_pending_max,
            rate: limits.handshakes.rate(),
            handshakes: Mutex::default(),
            addresses: Guests::new(
                limits.connections_per_address,
                limits.handshakes_per_address.rate(),
                Some(bounds(Scope::Address)),
            ),
            users: Guests::new(
                limits.connections_per_user,
                limits.handshakes_per_user.rate(),
                is_authenticated.then(|| bounds(Scope::User)),
            ),
            instance: Some(bounds(Scope::Instance))
                .filter(Bounds::is_limited)
                .map(|it| Arc::new(Tab::new(Arc::new(it)))),
        }
    }

    /// Lets a connection in, or not; without an address it is one that a proxy will tell. Nobody is let in while
    /// memory `is_tight`. Who is refused for its address costs the others nothing.
    ///
    /// # Errors
    /// Why not, and when to come again.
    pub fn admit(&self, addr: Option<IpAddr>, is_tight: bool, now_us: u64) -> Result<(Place, Pending), Denied> {
        if is_tight {
            return Err(Denied { why: Refused::Memory, wait: random(PLACE_WAIT) });
        }
        let address = addr.map(|addr| self.admit_address(addr, now_us)).transpose()?;
        let place = Arc::clone(&self.places).try_acquire_owned();
        let place = place.map_err(|_| Denied { why: Refused::Limit, wait: random(PLACE_WAIT) })?;
        let pending = Arc::clone(&self.pending).try_acquire_owned();
        let mut handshakes = self.handshakes.lock();
        let pending =
            pending.map_err(|_| Denied { why: Refused::Pending, wait: handshakes.turn(&self.rate, now_us) })?;
        handshakes.admit(&self.rate, now_us)?;
        drop(handshakes);
        Ok((Place { _place: place, address }, Pending { _permit: pending }))
    }

    /// Whether more than half of the handshakes that may be in progress are: whoever comes then has to hurry, so that
    /// those who only hold a place do not take them all.
    pub fn is_crowded(&self) -> bool {
        self.pending.available_permits() < self.pending_max / 2
    }

    /// One more connection of an address.
    ///
    /// # Errors
    /// It has as many as it may have, or too many in a short time.
    pub fn admit_address(&self, addr: IpAddr, now_us: u64) -> Result<Stay<IpAddr>, Denied> {
        self.addresses.enter(&guests::network(addr), now_us).map_err(|unwelcome| match unwelcome {
            Unwelcome::Connections => Denied { why: Refused::AddressConnections, wait: random(PLACE_WAIT) },
            Unwelcome::Handshakes(wait) => Denied { why: Refused::AddressRate, wait },
        })
    }

    /// What a connection shares with all others.
    pub fn share(&self) -> Option<Share> {
        self.instance.as_ref().map(Share::new)
    }

    /// A place for somebody who is told that there is none for him: as long as more than half of all are free.
    pub fn spare_place(&self) -> Option<OwnedSemaphorePermit> {
        let is_spare = self.places.available_permits() > self.connections_max / 2;
        is_spare.then(|| Arc::clone(&self.places).try_acquire_owned().ok()).flatten()
    }

    /// One more connection of a user, whatever its address; of nobody in particular there may be any number.
    ///
    /// # Errors
    /// It has as many as it may have, or too many in a short time.
    pub fn admit_user(&self, user: Option<&str>, now_us: u64) -> Result<Stay<Box<str>>, Denied> {
        let denied = |unwelcome| match unwelcome {
            Unwelcome::Connections => Denied { why: Refused::UserConnections, wait: random(PLACE_WAIT) },
            Unwelcome::Handshakes(wait) => Denied { why: Refused::UserRate, wait },
        };
        user.map_or(Ok(Stay::default()), |user| self.users.enter(&user.into(), now_us).map_err(denied))
    }
}

impl Handshakes {
    fn admit(&mut self, rate: &Rate, now_us: u64) -> Result<(), Denied> {
        let admitted = self.admitted.try_take(rate, 1, now_us);
        admitted.map_err(|_| Denied { why: Refused::Rate, wait: self.turn(rate, now_us) })
    }

    /// When somebody who is refused may come: one after another at the rate. Whole seconds blur that by one.
    fn turn(&mut self, rate: &Rate, now_us: u64) -> Duration {
        if !rate.is_limited() {
            random(PLACE_WAIT)
        } else if self.refused.ahead(now_us) < WAIT_MAX {
            let _ = self.refused.take(rate, 1, now_us);
            self.refused.ahead(now_us)
        } else {
            WAIT_MAX / 2 + random(WAIT_MAX / 2)
        }
    }
}

impl Denied {
    /// The value of `Retry-After`: whole seconds, at least one.
    pub fn retry_after_s(&self) -> u64 {
        self.wait.as_secs_f64().ceil().max(1.0) as u64
    }

    /// What a person is told.
    pub fn message(&self) -> &'static str {
        match self.why {
            Refused::AddressConnections => "too many connections from this address",
            Refused::AddressRate => "too many connections in a short time from this address",
            Refused::UserConnections => "too many connections of this user",
            Refused::UserRate => "too many connections in a short time of this user",
            Refused::Memory => "too much waits for slow clients",
            Refused::Pending | Refused::Rate => "too many connect at once",
            _ => "too many connections",
        }
    }
}

fn random(most: Duration) -> Duration {
    most.mul_f64(rand::random())
}
