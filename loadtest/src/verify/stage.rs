//! What publishers and clients of one run share: names, the clock, and how far the run is.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::watch;

/// How far a run is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Phase {
    /// All come.
    Gather,
    /// Publishers publish, clients come and go.
    Publish,
    /// Nothing new; clients stay, and wait for what is under way.
    Settle,
    /// All leave.
    Over,
}

pub(crate) struct Stage {
    /// Tells the messages of this run from those of others.
    pub run: u64,
    pub channels: Vec<String>,
    /// Bytes of each message's data.
    pub size: usize,
    /// Where clients connect, each time to one at random.
    pub urls: Vec<String>,
    pub idempotent: bool,
    started: Instant,
    phase: watch::Sender<Phase>,
    /// Why the run cannot go on.
    failure: OnceLock<String>,
    pub tally: Tally,
}

/// Counters, for whoever watches.
#[derive(Default)]
pub(crate) struct Tally {
    /// Subscriptions that are live.
    pub live: AtomicUsize,
    pub deliveries: AtomicU64,
    pub acked: AtomicU64,
    /// Connections that ended other than on purpose, and attempts that failed.
    pub ended: AtomicU64,
    pub failed: AtomicU64,
    /// Connections that clients left on purpose.
    pub left: AtomicU64,
}

impl Stage {
    pub(crate) fn new(run: u64, channels: Vec<String>, size: usize, urls: Vec<String>, idempotent: bool) -> Self {
        Self {
            run,
            channels,
            size,
            urls,
            idempotent,
            started: Instant::now(),
            phase: watch::Sender::new(Phase::Gather),
            failure: OnceLock::new(),
            tally: Tally::default(),
        }
    }

    /// Microseconds since the run began.
    pub(crate) fn now_us(&self) -> u64 {
        self.started.elapsed().as_micros() as u64
    }

    pub(crate) fn phase(&self) -> Phase {
        *self.phase.borrow()
    }

    /// Goes on to a phase; never back.
    pub(crate) fn enter(&self, phase: Phase) {
        self.phase.send_if_modified(|now| std::mem::replace(now, phase.max(*now)) < phase);
    }

    /// Ends the run before its time.
    pub(crate) fn give_up(&self, why: String) {
        // The first reason is the one that counts.
        let _ = self.failure.set(why);
        self.enter(Phase::Over);
    }

    pub(crate) fn failure(&self) -> Option<&str> {
        self.failure.get().map(String::as_str)
    }

    /// Follows the phases.
    pub(crate) fn watch(&self) -> watch::Receiver<Phase> {
        self.phase.subscribe()
    }

    /// Waits, but not beyond a phase.
    pub(crate) async fn pause(&self, pause: Duration, until: Phase) {
        let mut phase = self.watch();
        // The sender lives as long as the stage does; a time that is up is what is waited for.
        let _ = tokio::time::timeout(pause, phase.wait_for(|now| *now >= until)).await;
    }
}

/// Counts one more.
pub(crate) fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}
