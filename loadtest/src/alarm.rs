//! A timer with microseconds: what `poll` rounds up to milliseconds would count as latency.

use std::os::fd::{AsRawFd as _, OwnedFd};

use mio::unix::SourceFd;
use mio::{Interest, Registry, Token};
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};

/// One timer.
pub(crate) struct Alarm {
    timer: OwnedFd,
}

impl Alarm {
    /// A timer that wakes the poll of `registry` with `token`.
    pub(crate) fn new(registry: &Registry, token: Token) -> anyhow::Result<Self> {
        let timer = timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC)?;
        registry.register(&mut SourceFd(&timer.as_raw_fd()), token, Interest::READABLE)?;
        Ok(Self { timer })
    }

    /// Rings once, at `at_us` on the clock of [`crate::machine::now_us`]; what was set before is forgotten.
    pub(crate) fn set(&self, at_us: u64) -> anyhow::Result<()> {
        let at = Timespec { tv_sec: (at_us / 1_000_000) as i64, tv_nsec: ((at_us % 1_000_000) * 1_000) as i64 };
        let never = Timespec { tv_sec: 0, tv_nsec: 0 };
        timerfd_settime(&self.timer, TimerfdTimerFlags::ABSTIME, &Itimerspec { it_interval: never, it_value: at })?;
        Ok(())
    }
}
