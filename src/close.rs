//! Every way a connection ends: the close code, the reason text and the metric label, in one table.
//!
//! Codes are those of RFC 6455 §7.4.1 and the IANA registry; 4101 is ours. A reason text
//! stays under the 123 bytes that a close frame has room for.

use std::borrow::Cow;

/// Why a connection ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CloseReason {
    /// The peer sent a close frame; its code (if any) is echoed.
    Client(Option<u16>),
    /// The socket ended or failed without a close frame.
    Lost,
    /// The peer broke RFC 6455; the text says how.
    ProtocolError(&'static str),
    /// A frame type this endpoint does not take, such as binary on the JSON protocol.
    UnsupportedData(&'static str),
    /// Text that is not UTF-8.
    InvalidPayload,
    /// Too many fragments, or a message that took too long to arrive.
    Policy(&'static str),
    /// A message above `HUBCAST_MESSAGE_BYTES_MAX`.
    TooBig,
    /// The gateway itself failed.
    Internal,
    /// Planned restart: come back, spread out.
    Drain,
    /// Nothing at all arrived within the pong timeout after our ping.
    Timeout,
    /// The connection's own socket refused bytes for too long or for too many messages.
    SlowConsumer,
    /// It did too much of something, and did not stop when it was told so.
    RateLimited(&'static str),
    /// The instance has no room for it any more.
    Overload(&'static str),
    /// Its token was refused; the text says no more than that.
    Unauthorized(&'static str),
    /// Its token has expired.
    TokenExpired,
    /// Its token was revoked.
    Revoked,
    /// It did not authenticate in time.
    AuthTimeout,
    /// The API asked for it: `POST /api/disconnect`, or `/api/unsubscribe` in raw mode.
    Disconnected {
        /// The close code to send.
        code: u16,
        /// The reason text to send, at most 123 bytes.
        reason: Box<str>,
    },
}

/// The code of [`CloseReason::Disconnected`] where the backend says none: forbidden, so that clients stay away.
pub const DISCONNECTED: u16 = 3003;

impl CloseReason {
    /// Every label that [`CloseReason::label`] can return, for metrics that start at zero.
    pub const LABELS: [&'static str; 18] = [
        "client",
        "lost",
        "protocol_error",
        "unsupported_data",
        "invalid_payload",
        "policy",
        "too_big",
        "internal",
        "drain",
        "timeout",
        "slow_consumer",
        "disconnected",
        "rate_limited",
        "overload",
        "unauthorized",
        "token_expired",
        "revoked",
        "auth_timeout",
    ];

    /// The close code to send, or `None` where the peer's close frame had none.
    pub fn code(&self) -> Option<u16> {
        Some(match self {
            Self::Client(code) => return *code,
            Self::Lost | Self::Internal => 1011,
            Self::ProtocolError(_) => 1002,
            Self::UnsupportedData(_) => 1003,
            Self::InvalidPayload => 1007,
            Self::Policy(_) | Self::RateLimited(_) => 1008,
            Self::TooBig => 1009,
            Self::Drain => 1012,
            Self::Overload(_) => 1013,
            Self::Unauthorized(_) | Self::TokenExpired | Self::Revoked => 3000,
            Self::Timeout | Self::AuthTimeout => 3008,
            Self::SlowConsumer => 4101,
            Self::Disconnected { code, .. } => *code,
        })
    }

    /// The reason text of the close frame.
    pub fn text(&self) -> Cow<'_, str> {
        Cow::Borrowed(match self {
            Self::Client(_) => "",
            Self::Lost => "connection lost",
            Self::ProtocolError(what)
            | Self::UnsupportedData(what)
            | Self::Policy(what)
            | Self::RateLimited(what)
            | Self::Overload(what)
            | Self::Unauthorized(what) => what,
            Self::TokenExpired => "token expired",
            Self::Revoked => "token revoked",
            Self::AuthTimeout => "no authentication in time",
            Self::InvalidPayload => "text is not UTF-8",
            Self::TooBig => "message too big",
            Self::Internal => "internal error",
            Self::Drain => "server restarting, come back",
            Self::Timeout => "nothing arrived after our ping",
            Self::SlowConsumer => "slow consumer",
            Self::Disconnected { reason, .. } => reason,
        })
    }

    /// The label of `hubcast_connections_closed_total{reason}`.
    pub fn label(&self) -> &'static str {
        Self::LABELS[self.index()]
    }

    /// Position in [`CloseReason::LABELS`].
    pub fn index(&self) -> usize {
        match self {
            Self::Client(_) => 0,
            Self::Lost => 1,
            Self::ProtocolError(_) => 2,
            Self::UnsupportedData(_) => 3,
            Self::InvalidPayload => 4,
            Self::Policy(_) => 5,
            Self::TooBig => 6,
            Self::Internal => 7,
            Self::Drain => 8,
            Self::Timeout => 9,
            Self::SlowConsumer => 10,
            Self::Disconnected { .. } => 11,
            Self::RateLimited(_) => 12,
            Self::Overload(_) => 13,
            Self::Unauthorized(_) => 14,
            Self::TokenExpired => 15,
            Self::Revoked => 16,
            Self::AuthTimeout => 17,
        }
    }

    /// Whether frames accepted before the close are still sent before the close frame.
    /// A slow consumer's are not: its socket is the one that would not take them. Nor are those of one who may not hear
    /// them any more.
    pub fn keeps_queue(&self) -> bool {
        !matches!(
            self,
            Self::SlowConsumer | Self::Timeout | Self::Lost | Self::Overload(_) | Self::TokenExpired | Self::Revoked
        )
    }
}
