//! Flush lanes: the deferred tasks that write scheduled outboxes to their sockets.
//!
//! All publishers (a socket's task, an HTTP request, the Redis multiplexer) only push, and submit
//! what they scheduled once their whole batch is pushed. A lane flushes in slices that take turns
//! between jobs and yields to the runtime in between, so a channel with 15,000 subscribers does not
//! hold up a small one, and what is published meanwhile leaves in the same writes.
//! The queue needs no bound of its own: an outbox is in at most one job.
//!
//! A channel that coalesces has its outboxes wait for the window's end before they reach a lane. Whatever else
//! is queued for such a connection (replies, pings, other channels) leaves at that moment too.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::Poll;
use std::vec::IntoIter;

use atomic_waker::AtomicWaker;
use crossbeam_utils::CachePadded;
use parking_lot::Mutex;
use tokio::sync::Notify;

use crate::channel::Fanout;
use crate::clock;
use crate::close::CloseReason;
use crate::connection::Connection;
use crate::metrics::Metrics;
use crate::writer::Writer;

/// Connections flushed before the next job has its turn: some 300 µs of writes.
const SLICE: usize = 64;

/// A job above this size is split over all lanes, so that every core helps.
const SPLIT: usize = 512;

type Job = IntoIter<Arc<Connection>>;

/// The lanes, one per worker thread.
#[derive(Debug)]
pub struct Lanes {
    lanes: Box<[CachePadded<Lane>]>,
    next: AtomicUsize,
    progress: Notify,
}

#[derive(Debug, Default)]
struct Lane {
    jobs: Mutex<VecDeque<Job>>,
    waker: AtomicWaker,
}

impl Lanes {
    /// `count` lanes; each needs a task that runs [`Lanes::run`].
    pub fn new(count: usize) -> Self {
        let lanes = (0..count.max(1)).map(|_| CachePadded::new(Lane::default())).collect();
        Self { lanes, next: AtomicUsize::new(0), progress: Notify::new() }
    }

    /// How many lanes there are.
    pub fn count(&self) -> usize {
        self.lanes.len()
    }

    /// Closes the slow consumers of a fan-out, hands its jobs to the lanes, and returns the connections
    /// that were late: the caller publishes no more until [`Lanes::room`] returns.
    pub fn submit(self: &Arc<Self>, fanout: &mut Fanout<Arc<Connection>>) -> Vec<Arc<Connection>> {
        debug_assert!(fanout.bundle.is_empty(), "publications would wait for the next read");
        for connection in fanout.slow.drain(..) {
            connection.close(CloseReason::SlowConsumer);
        }
        for job in fanout.jobs.drain(..) {
            self.submit_job(job);
        }
        for (window, job) in fanout.held.drain(..) {
            // One timer for each window and channel; what is published meanwhile finds its outboxes scheduled.
            let lanes = Arc::clone(self);
            tokio::spawn(async move {
                tokio::time::sleep(window).await;
                lanes.submit_job(job);
            });
        }
        fanout.paused();
        std::mem::take(&mut fanout.late)
    }

    fn submit_job(&self, mut job: Vec<Arc<Connection>>) {
        if job.len() > SPLIT {
            let part = job.len().div_ceil(self.lanes.len());
            while job.len() > part {
                let rest = job.split_off(job.len() - part);
                self.enqueue(self.next.fetch_add(1, Ordering::Relaxed), rest);
            }
        }
        // The lane of this worker runs right after the current task, on the same core.
        let own = tokio::runtime::worker_index().unwrap_or_else(|| self.next.fetch_add(1, Ordering::Relaxed));
        self.enqueue(own, job);
    }

    fn enqueue(&self, index: usize, job: Vec<Arc<Connection>>) {
        if job.is_empty() {
            return;
        }
        let lane = &self.lanes[index % self.lanes.len()];
        lane.jobs.lock().push_back(job.into_iter());
        lane.waker.wake();
    }

    /// Waits until every one of `late` has room again, or is closing.
    pub async fn room(&self, mut late: Vec<Arc<Connection>>) {
        loop {
            let progress = self.progress.notified();
            late.retain(|connection| !connection.has_room());
            if late.is_empty() {
                return;
            }
            progress.await;
        }
    }

    /// Tells those who wait for room to look again.
    pub fn made_progress(&self) {
        self.progress.notify_waiters();
    }

    /// Runs lane `index` for ever.
    pub async fn run(&self, index: usize, metrics: &Metrics) {
        let lane = &self.lanes[index];
        let mut writer = Writer::default();
        let mut flushed = 0;
        loop {
            let mut job = match lane.take_job() {
                Some(job) => job,
                None => {
                    let job = lane.next_job().await;
                    // Everybody else who is ready to publish goes first: it leaves in the same writes.
                    tokio::task::yield_now().await;
                    job
                }
            };
            flushed += flush_slice(&mut job, &mut writer, metrics);
            if job.len() > 0 {
                lane.jobs.lock().push_back(job);
            }
            self.made_progress();
            if flushed >= SLICE {
                flushed = 0;
                tokio::task::yield_now().await;
            }
        }
    }
}

impl Lane {
    fn take_job(&self) -> Option<Job> {
        self.jobs.lock().pop_front()
    }

    async fn next_job(&self) -> Job {
        std::future::poll_fn(|context| {
            self.waker.register(context.waker());
            self.take_job().map_or(Poll::Pending, Poll::Ready)
        })
        .await
    }
}

/// Flushes the next connections of a job; returns how many.
fn flush_slice(job: &mut Job, writer: &mut Writer, metrics: &Metrics) -> usize {
    let started_us = clock::now_us();
    let before = job.len();
    for connection in job.by_ref().take(SLICE) {
        connection.flush(writer, started_us);
    }
    metrics.flushed(writer);
    before - job.len()
}
