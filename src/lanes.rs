//! Flush lanes: the deferred tasks that write scheduled outboxes to their sockets.
//!
//! All publishers (a socket's task, an HTTP request, the Redis multiplexer) only push, and submit
//! what they scheduled once their whole batch is pushed. A lane flushes in slices that take turns
//! between jobs and yields to the runtime in between, so a channel with 15,000 subscribers does not
//! hold up a small one, and what is published meanwhile leaves in the same writes.
//! The queue needs no bound of its own: an outbox is in at most one job.
//!
//! What a socket published waits in its channel until the lane's turn: what others publish there meanwhile is
//! pushed in the same walk. A channel that coalesces waits for its window first.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::Poll;
use std::vec::IntoIter;

use atomic_waker::AtomicWaker;
use crossbeam_utils::CachePadded;
use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::sync::futures::Notified;

use crate::channel::Channel;
use crate::clock;
use crate::close::CloseReason;
use crate::connection::{Connection, Shared};
use crate::fanout::{Fanout, Subscriber};
use crate::metrics::Metrics;
use crate::writer::Writer;

/// Connections flushed before the next job has its turn: some 300 µs of writes.
const SLICE: usize = 64;

/// A job above this size is split over all lanes, so that every core helps.
const SPLIT: usize = 512;

/// What a lane does next.
#[derive(Debug)]
enum Job {
    /// Pushes what a channel has gathered.
    Deliver(Arc<Channel<Arc<Connection>>>),
    /// Writes outboxes whose write right the job has.
    Flush(IntoIter<Arc<Connection>>),
}

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
        for connection in fanout.slow.drain(..) {
            connection.close(CloseReason::SlowConsumer);
        }
        for job in fanout.jobs.drain(..) {
            self.submit_flush(job);
        }
        for channel in fanout.gathered.drain(..) {
            self.submit_delivery(channel);
        }
        fanout.paused();
        std::mem::take(&mut fanout.late)
    }

    fn submit_flush(&self, mut job: Vec<Arc<Connection>>) {
        if job.len() > SPLIT {
            let part = job.len().div_ceil(self.lanes.len());
            while job.len() > part {
                let rest = job.split_off(job.len() - part);
                self.enqueue(self.next_lane(), Job::Flush(rest.into_iter()));
            }
        }
        if !job.is_empty() {
            self.enqueue(self.own_lane(), Job::Flush(job.into_iter()));
        }
    }

    fn submit_delivery(self: &Arc<Self>, channel: Arc<Channel<Arc<Connection>>>) {
        let window = channel.window();
        if window.is_zero() {
            return self.enqueue(self.own_lane(), Job::Deliver(channel));
        }
        let lanes = Arc::clone(self);
        tokio::spawn(async move {
            tokio::time::sleep(window).await;
            lanes.enqueue(lanes.own_lane(), Job::Deliver(channel));
        });
    }

    /// The lane of this worker runs right after the current task, on the same core.
    fn own_lane(&self) -> usize {
        tokio::runtime::worker_index().unwrap_or_else(|| self.next_lane())
    }

    fn next_lane(&self) -> usize {
        self.next.fetch_add(1, Ordering::Relaxed)
    }

    fn enqueue(&self, index: usize, job: Job) {
        let lane = &self.lanes[index % self.lanes.len()];
        lane.jobs.lock().push_back(job);
        lane.waker.wake();
    }

    /// Waits until every one of `late` has room again, or is closing.
    pub async fn room(&self, mut late: Vec<Arc<Connection>>) {
        loop {
            let progress = self.progress();
            late.retain(|connection| !connection.has_room());
            if late.is_empty() {
                return;
            }
            progress.await;
        }
    }

    /// Waits until every one of `late` has room again, is closing, or is held up by its own socket.
    pub async fn written(&self, mut late: Vec<Arc<Connection>>) {
        loop {
            let progress = self.progress();
            late.retain(|connection| !connection.is_refused() && !connection.has_room());
            if late.is_empty() {
                return;
            }
            progress.await;
        }
    }

    /// Waits until somebody who was late may have room.
    pub fn progress(&self) -> Notified<'_> {
        self.progress.notified()
    }

    /// Tells those who wait for room to look again.
    pub fn made_progress(&self) {
        self.progress.notify_waiters();
    }

    /// Runs lane `index` for ever.
    pub async fn run(shared: &Shared, index: usize) {
        let lanes = &shared.lanes;
        let lane = &lanes.lanes[index];
        let mut writer = Writer::default();
        let mut flushed = 0;
        loop {
            let job = match lane.take_job() {
                Some(job) => job,
                None => {
                    let job = lane.next_job().await;
                    // Everybody else who is ready to publish goes first: it leaves in the same writes.
                    tokio::task::yield_now().await;
                    job
                }
            };
            match job {
                Job::Deliver(channel) => deliver(&channel, shared),
                Job::Flush(mut connections) => {
                    flushed += flush_slice(&mut connections, &mut writer, &shared.metrics);
                    if connections.len() > 0 {
                        lane.jobs.lock().push_back(Job::Flush(connections));
                    }
                    lanes.made_progress();
                }
            }
            if flushed >= SLICE {
                flushed = 0;
                tokio::task::yield_now().await;
            }
        }
    }
}

/// Pushes what a channel has gathered. Whoever publishes there next waits for those that are late.
fn deliver(channel: &Channel<Arc<Connection>>, shared: &Shared) {
    let mut fanout = Fanout::default();
    channel.deliver(&mut fanout);
    shared.submit(&mut fanout);
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
fn flush_slice(job: &mut IntoIter<Arc<Connection>>, writer: &mut Writer, metrics: &Metrics) -> usize {
    let started_us = clock::now_us();
    let before = job.len();
    for connection in job.by_ref().take(SLICE) {
        connection.flush(writer, started_us);
    }
    metrics.flushed(writer);
    before - job.len()
}
