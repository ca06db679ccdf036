//! What Redis knows of one channel, against what the hub wants: a level-triggered state machine.
//!
//! At most one operation is outstanding per channel, so a confirmation is never ambiguous. Pure;
//! `tests/it/outbox_model.rs` explores its races with loom.

/// How long a channel without subscribers stays subscribed (µs): a page reload costs Redis nothing.
pub const LINGER_US: u64 = 1_000_000;

/// The state of a channel at Redis.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Upstream {
    /// No SUBSCRIBE is sent.
    Absent,
    /// SUBSCRIBE is sent and not confirmed.
    Subscribing,
    /// Redis confirmed: what is published arrives here.
    Live,
    /// UNSUBSCRIBE is sent and not confirmed.
    Releasing,
}

/// What the multiplexer has to do for a channel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Nothing until something changes.
    Rest,
    /// Send SUBSCRIBE.
    Subscribe,
    /// Send UNSUBSCRIBE.
    Unsubscribe,
    /// Look again at this time (µs): the channel lingers.
    LookAgainAt(u64),
    /// Drop the channel: nobody wants it and Redis does not have it.
    Forget,
}

impl Upstream {
    /// Decides the next step and records it as taken. `idle_since_us` is when the last subscriber
    /// left, or `None` while there are subscribers.
    pub fn reconcile(&mut self, idle_since_us: Option<u64>, now_us: u64) -> Step {
        match (*self, idle_since_us) {
            (Self::Absent, None) => {
                *self = Self::Subscribing;
                Step::Subscribe
            }
            (Self::Absent, Some(_)) => Step::Forget,
            (Self::Live, Some(since_us)) if now_us >= since_us + LINGER_US => {
                *self = Self::Releasing;
                Step::Unsubscribe
            }
            (Self::Live, Some(since_us)) => Step::LookAgainAt(since_us + LINGER_US),
            (Self::Live, None) | (Self::Subscribing | Self::Releasing, _) => Step::Rest,
        }
    }

    /// Redis confirmed a SUBSCRIBE. True: the channel became live.
    pub fn confirm_subscribe(&mut self) -> bool {
        let is_ours = *self == Self::Subscribing;
        if is_ours {
            *self = Self::Live;
        }
        is_ours
    }

    /// Redis confirmed an UNSUBSCRIBE, or ended the subscription by itself. True: a live channel was lost.
    pub fn confirm_unsubscribe(&mut self) -> bool {
        let was_live = *self == Self::Live;
        if matches!(self, Self::Live | Self::Releasing) {
            *self = Self::Absent;
        }
        was_live
    }

    /// Redis did not carry out an UNSUBSCRIBE. True if one was outstanding.
    pub fn keep(&mut self) -> bool {
        let was_releasing = *self == Self::Releasing;
        if was_releasing {
            *self = Self::Live;
        }
        was_releasing
    }

    /// The link is gone, and every subscription and outstanding operation with it.
    pub fn lose(&mut self) {
        *self = Self::Absent;
    }
}
