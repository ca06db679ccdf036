//! How much one connection may ask for: commands, publishes, pings, bad requests and bytes.
//!
//! A command that is too much is refused and told when to go on, and the connection is not read for a while; one who does
//! not listen is closed. Bytes that are too many wait in the socket, where TCP tells the client. What connections share
//! (`tab`) is counted after what is their own.

use std::time::Duration;

use crate::close::CloseReason;
use crate::meter::{Meter, Rate, Verdict};
use crate::metrics::{Limit, Limited, Together};
use crate::protocol::{Command, ErrorCode, Refusal, Wanted};
use crate::tab::{Share, too_many};

/// A token, a recovery and a question about the past count as so many commands: that is what they take. A page with
/// 128 channels comes back in one go all the same, with a cursor and a token for each.
const COSTLY_COMMANDS: usize = 50;

/// Commands that are refused are read at so many times the rate: somebody who goes on is closed once as much again as
/// a burst was tried in vain, and until then the others notice little of him.
const HASTE: u32 = 2;

/// After each command that nobody can understand nothing is read for so long: a client with a fault does not notice.
const BAD_REQUEST_REST: Duration = Duration::from_millis(1);

/// Who is refused for what others do is not read for so long at least: he is refused ten times a second, not a million.
const SHARED_REST_MIN: Duration = Duration::from_millis(100);

/// Nobody is left unread for longer for what was refused: he may have a close or a pong to say.
const REST_MAX: Duration = Duration::from_secs(1);

/// What each connection may do.
#[derive(Clone, Copy, Debug)]
pub struct Allowances {
    /// `HUBCAST_COMMANDS_PER_SECOND`; each channel of a list is a command.
    pub commands: Rate,
    /// `HUBCAST_PUBLISHES_PER_SECOND`
    pub publishes: Rate,
    /// `HUBCAST_PINGS_PER_SECOND`: pings and pongs of the WebSocket layer.
    pub pings: Rate,
    /// `HUBCAST_BAD_REQUESTS_PER_MINUTE`
    pub bad_requests: Rate,
    /// `HUBCAST_BYTES_PER_SECOND`
    pub bytes: Rate,
    /// Most bytes to read at once, so that a read is never more than a quarter of a second ahead.
    pub read_bytes: usize,
    /// `HUBCAST_CHANNELS_MAX`; 0: no limit.
    pub channels_max: usize,
}

/// What one connection did lately.
#[derive(Debug, Default)]
pub struct Allowance {
    /// What it has on the tabs that it shares with others.
    shares: Vec<Share>,
    /// How long nothing more is to be read, for what was refused since [`Allowance::rest`].
    rest: Duration,
    commands: Meter,
    publishes: Meter,
    pings: Meter,
    bad_requests: Meter,
    bytes: Meter,
}

/// Why something is not carried out.
#[derive(Debug)]
pub enum Excess {
    /// It is refused.
    Refused(Limit, Refusal),
    /// The connection has to go.
    Close(Limit, CloseReason),
}

impl Allowance {
    /// Nothing was done yet; it shares these tabs.
    pub fn new(shares: Vec<Share>) -> Self {
        Self { shares, ..Self::default() }
    }

    /// From now on it shares one more.
    pub fn share(&mut self, share: Share) {
        self.shares.push(share);
    }

    /// Counts a command, or a publish.
    ///
    /// # Errors
    /// What to do instead of it.
    pub fn command(
        &mut self,
        command: &Result<Command<'_>, Refusal>,
        may: &Allowances,
        now_us: u64,
    ) -> Result<(), Excess> {
        let is_publish = matches!(command, Ok(Command::Publish { .. }));
        let count = cost(command);
        let (meter, rate, limit, reason) = match is_publish {
            true => (&mut self.publishes, &may.publishes, Limited::Publishes, "too many publishes"),
            false => (&mut self.commands, &may.commands, Limited::Commands, "too many commands"),
        };
        match meter.take(rate, count, now_us) {
            Verdict::Within => {}
            Verdict::Over(wait) => {
                self.rest += rate.time_of(count) / HASTE;
                return Err(Excess::Refused(limit.into(), rate_limited(wait, reason)));
            }
            Verdict::Abuse => return Err(Excess::Close(limit.into(), CloseReason::RateLimited(reason))),
        }
        if command.is_err() && may.bad_requests.is_limited() {
            self.rest += BAD_REQUEST_REST;
            if self.bad_requests.take(&may.bad_requests, 1, now_us) != Verdict::Within {
                let reason = CloseReason::RateLimited("too many bad requests");
                return Err(Excess::Close(Limited::BadRequests.into(), reason));
            }
        }
        for share in &self.shares {
            let (taken, what) = match is_publish {
                true => (share.publishes(count, now_us), Together::Publishes),
                false => (share.commands(count, now_us), Together::Commands),
            };
            if let Err(wait) = taken {
                let wait = wait.max(SHARED_REST_MIN);
                self.rest = self.rest.max(wait);
                let refusal = rate_limited(wait, too_many(share.scope(), what));
                return Err(Excess::Refused(Limit::Shared(share.scope(), what), refusal));
            }
        }
        Ok(())
    }

    /// Counts a ping or a pong of the WebSocket layer.
    ///
    /// # Errors
    /// Those were too many.
    pub fn ping(&mut self, may: &Allowances, now_us: u64) -> Result<(), Excess> {
        match self.pings.take(&may.pings, 1, now_us) {
            Verdict::Within => Ok(()),
            _ => Err(Excess::Close(Limited::Pings.into(), CloseReason::RateLimited("too many pings or pongs"))),
        }
    }

    /// Counts bytes that were read; how long not to read more, and for which limit, if they are too many.
    pub fn read(&mut self, bytes: usize, may: &Allowances, now_us: u64) -> Option<(Duration, Limit)> {
        let own = match self.bytes.take(&may.bytes, bytes, now_us) {
            Verdict::Within => Duration::ZERO,
            _ => self.bytes.ahead(now_us).saturating_sub(may.bytes.burst()),
        };
        let shared = |share: &Share| (share.read(bytes, now_us), Limit::Shared(share.scope(), Together::Bytes));
        let all = self.shares.iter().map(shared).chain([(own, Limited::Bytes.into())]);
        all.filter(|(wait, _)| !wait.is_zero()).max_by_key(|(wait, _)| *wait)
    }

    /// How long nothing more is to be read, for what was refused since the last call.
    pub fn rest(&mut self) -> Duration {
        std::mem::take(&mut self.rest).min(REST_MAX)
    }

    /// One more subscription would be one too many of those that it shares a tab with.
    pub fn refuses_subscription(&self) -> Option<(Limit, &'static str)> {
        let share = self.shares.iter().find(|share| share.has_all_subscriptions())?;
        let limit = Limit::Shared(share.scope(), Together::Subscriptions);
        Some((limit, too_many(share.scope(), Together::Subscriptions)))
    }

    /// It has so many subscriptions now.
    pub fn subscribed(&mut self, number: usize) {
        self.shares.iter_mut().for_each(|share| share.subscribed(number));
    }

    /// So many bytes of it are arriving now; whether it added to what is too much with those that it shares a tab with.
    pub fn arriving(&mut self, bytes: usize) -> Option<(Limit, &'static str)> {
        let mut excess = None;
        for share in &mut self.shares {
            if share.arriving(bytes) {
                let limit = Limit::Shared(share.scope(), Together::Memory);
                excess = Some((limit, too_many(share.scope(), Together::Memory)));
            }
        }
        excess
    }
}

/// As how many commands it counts.
fn cost(command: &Result<Command<'_>, Refusal>) -> usize {
    match command {
        Ok(Command::Subscribe(targets) | Command::Unsubscribe(targets)) => {
            let costly =
                |wanted: &Wanted<'_>| usize::from(wanted.token.is_some()) + usize::from(wanted.after.is_some());
            targets.len() + targets.iter().flatten().map(costly).sum::<usize>() * COSTLY_COMMANDS
        }
        Ok(Command::Auth { .. } | Command::History { .. }) => COSTLY_COMMANDS,
        _ => 1,
    }
}

fn rate_limited(wait: Duration, reason: &'static str) -> Refusal {
    Refusal { retry_after_ms: Some(wait.as_millis() as u64 + 1), ..Refusal::new(ErrorCode::RateLimited, reason) }
}
