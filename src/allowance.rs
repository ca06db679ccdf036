//! How much one connection may ask for: commands, publishes, pings, bad requests and bytes.
//!
//! A command that is too much is refused and told when to go on; one who does not listen is closed. Bytes that are
//! too many wait in the socket, where TCP tells the client.

use std::time::Duration;

use crate::close::CloseReason;
use crate::meter::{Meter, Rate, Verdict};
use crate::metrics::Limited;
use crate::protocol::{Command, ErrorCode, Refusal, Wanted};

/// A token, a recovery and a question about the past count as so many commands: that is what they take. A page with
/// 128 channels comes back in one go all the same, with a cursor and a token for each.
const COSTLY_COMMANDS: usize = 50;

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
    Refused(Limited, Refusal),
    /// The connection has to go.
    Close(Limited, CloseReason),
}

impl Allowance {
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
        let (meter, rate, count, limit, reason) = match command {
            Ok(Command::Publish { .. }) => {
                (&mut self.publishes, &may.publishes, 1, Limited::Publishes, "too many publishes")
            }
            Ok(Command::Subscribe(targets) | Command::Unsubscribe(targets)) => {
                let costly =
                    |wanted: &Wanted<'_>| usize::from(wanted.token.is_some()) + usize::from(wanted.after.is_some());
                let count = targets.len() + targets.iter().flatten().map(costly).sum::<usize>() * COSTLY_COMMANDS;
                (&mut self.commands, &may.commands, count, Limited::Commands, "too many commands")
            }
            Ok(Command::Auth { .. } | Command::History { .. }) => {
                (&mut self.commands, &may.commands, COSTLY_COMMANDS, Limited::Commands, "too many commands")
            }
            _ => (&mut self.commands, &may.commands, 1, Limited::Commands, "too many commands"),
        };
        match meter.take(rate, count, now_us) {
            Verdict::Within => {}
            Verdict::Over(wait) => {
                let retry_after_ms = Some(wait.as_millis() as u64 + 1);
                let refusal = Refusal { retry_after_ms, ..Refusal::new(ErrorCode::RateLimited, reason) };
                return Err(Excess::Refused(limit, refusal));
            }
            Verdict::Abuse => return Err(Excess::Close(limit, CloseReason::RateLimited(reason))),
        }
        match command {
            Err(_) if self.bad_requests.take(&may.bad_requests, 1, now_us) != Verdict::Within => {
                Err(Excess::Close(Limited::BadRequests, CloseReason::RateLimited("too many bad requests")))
            }
            _ => Ok(()),
        }
    }

    /// Counts a ping or a pong of the WebSocket layer.
    ///
    /// # Errors
    /// Those were too many.
    pub fn ping(&mut self, may: &Allowances, now_us: u64) -> Result<(), Excess> {
        match self.pings.take(&may.pings, 1, now_us) {
            Verdict::Within => Ok(()),
            _ => Err(Excess::Close(Limited::Pings, CloseReason::RateLimited("too many pings or pongs"))),
        }
    }

    /// Counts bytes that were read; returns how long not to read more.
    pub fn read(&mut self, bytes: usize, may: &Allowances, now_us: u64) -> Duration {
        match self.bytes.take(&may.bytes, bytes, now_us) {
            Verdict::Within => Duration::ZERO,
            _ => self.bytes.ahead(now_us).saturating_sub(may.bytes.burst()),
        }
    }
}
