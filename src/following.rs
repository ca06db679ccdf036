//! The channels with history that this instance follows at Redis, beyond the time anybody is in them.
//!
//! [`Following`] guards a channel's [`Follow`] and carries out what that asks for: it tells the channel's members, lets
//! in who waited, and lists reads and marks for the task that asks Redis (`repair.rs`). Lock order: following, then the
//! hub's.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use dashmap::DashMap;
use parking_lot::{Mutex, MutexGuard};
use tokio::sync::Notify;

use crate::channel::Channel;
use crate::clock::{self, micros};
use crate::continuity::{Follow, Output};
use crate::cursor::Cursor;
use crate::fanout::{Fanout, Subscriber};
use crate::history_store::{Loss, Retention};
use crate::history_view::Told;
use crate::members::Position;
use crate::publication::{Message, Payload};
use crate::replay::Replays;

/// Followed channels that nobody is in; of more, those left first are forgotten.
const IDLE_MAX: usize = 1 << 16;

/// The part of the interval after which a silent position is checked.
const PATIENCE: std::ops::Range<f64> = 0.5..1.0;

/// All channels that are followed.
#[derive(Debug, Default)]
pub struct Followings {
    channels: DashMap<Box<str>, Arc<Following>>,
    requests: Arc<Requests>,
}

/// One channel that is followed.
#[derive(Debug)]
pub struct Following {
    /// The channel's name.
    pub name: Box<str>,
    /// What its rule keeps.
    pub retention: Retention,
    state: Mutex<State>,
    requests: Arc<Requests>,
    asked: Mutex<Asked>,
    /// Its own part of the interval between two checks, so that channels that began together do not stay together.
    patience: f64,
    /// When something was last heard of the position.
    active_us: AtomicU64,
    /// When the channel was last seen in the hub.
    used_us: AtomicU64,
}

#[derive(Debug)]
struct State {
    follow: Follow<Position>,
    /// Kept, so that a message allocates none.
    out: Vec<Output<Position>>,
}

/// What channels want of Redis. Each is in each list once at most, so they are bounded by their number.
#[derive(Debug, Default)]
pub struct Requests {
    list: Mutex<Lists>,
    notify: Notify,
}

#[derive(Debug, Default)]
struct Lists {
    /// Somebody waits for it.
    urgent: VecDeque<Arc<Following>>,
    /// Nothing but a look whether the position is still what it was. Some of these were made urgent meanwhile.
    checks: VecDeque<Arc<Following>>,
}

/// What one channel wants: one thing at a time. Changed only while the lists are locked, too.
#[derive(Debug, Default)]
struct Asked {
    what: Option<What>,
    is_urgent: bool,
    is_in_checks: bool,
}

/// A request of one channel.
#[derive(Debug)]
pub struct Request {
    /// Whose.
    pub following: Arc<Following>,
    /// What.
    pub what: What,
}

/// What is to be done at Redis.
#[derive(Debug)]
pub enum What {
    /// Read stream and position; of the stream there is no need if the position is still this.
    Read(Option<Cursor>),
    /// Mark a loss.
    Mark(Loss),
    /// Wait until all messages are here that Redis sent before this.
    Fence,
    /// Nothing for a while: a request failed.
    Pause,
}

impl Followings {
    /// What is known of a channel; from now on it is followed.
    pub fn following(&self, name: &str, retention: &Retention, is_cached: bool) -> Arc<Following> {
        let fresh = || {
            let state = State { follow: Follow::new(retention.size, is_cached), out: Vec::new() };
            Arc::new(Following {
                name: name.into(),
                retention: *retention,
                state: Mutex::new(state),
                requests: Arc::clone(&self.requests),
                asked: Mutex::default(),
                patience: rand::random_range(PATIENCE),
                active_us: AtomicU64::new(clock::now_us()),
                used_us: AtomicU64::new(clock::now_us()),
            })
        };
        Arc::clone(&self.channels.entry(name.into()).or_insert_with(fresh))
    }

    /// What the channels want of Redis.
    pub fn requests(&self) -> &Requests {
        &self.requests
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.channels.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.channels.is_empty()
    }

    /// Has the positions of some channels checked at once, also those that are only retained.
    pub fn check_where(&self, is_doubted: impl Fn(&str) -> bool) {
        let doubted = self.channels.iter().filter(|following| is_doubted(&following.name));
        let doubted: Vec<_> = doubted.map(|following| Arc::clone(&following)).collect();
        for following in doubted {
            following.ask(Follow::doubt);
        }
    }

    /// Has positions checked of which nothing was heard for about `interval`, and forgets channels that nobody has been
    /// in for as long as their entries live.
    pub fn look_through(&self, interval: Duration) {
        let now_us = clock::now_us();
        let (mut silent, mut idle) = (Vec::new(), Vec::new());
        for following in &self.channels {
            if following.is_used() {
                following.used_us.store(now_us, Ordering::Relaxed);
                let due_us = following.active_us.load(Ordering::Relaxed) + micros(interval.mul_f64(following.patience));
                if due_us <= now_us {
                    silent.push(Arc::clone(&following));
                }
            } else {
                idle.push(following.used_us.load(Ordering::Relaxed));
            }
        }
        silent.iter().for_each(Following::check);
        drop(silent);
        idle.sort_unstable();
        let oldest_us = idle.len().checked_sub(IDLE_MAX).map_or(0, |surplus| idle[surplus]);
        self.channels.retain(|_, following| {
            let used_us = following.used_us.load(Ordering::Relaxed);
            following.is_used() || used_us >= oldest_us && now_us < used_us + micros(following.retention.ttl)
        });
    }
}

impl Following {
    /// The state alone: for what asks for nothing.
    pub(crate) fn hold(self: &Arc<Self>) -> impl std::ops::DerefMut<Target = Follow<Position>> + '_ {
        MutexGuard::map(self.state.lock(), |state| &mut state.follow)
    }

    /// Lets `act` do something to the state, and carries out what that asks for. `channel` is the one in the hub, if
    /// there is one.
    pub(crate) fn with<S: Subscriber, R>(
        self: &Arc<Self>,
        channel: Option<&Arc<Channel<S>>>,
        fanout: &mut Fanout<S>,
        act: impl FnOnce(&mut Follow<Position>, &mut Vec<Output<Position>>, &mut Fanout<S>) -> R,
    ) -> R {
        let mut state = self.state.lock();
        let State { follow, out } = &mut *state;
        let result = act(follow, out, fanout);
        self.active_us.store(clock::now_us(), Ordering::Relaxed);
        let is_awaited = follow.is_awaited();
        if is_awaited && self.asked.lock().is_put_off() {
            self.hurry();
        }
        let mut replays = Replays::new(&self.name);
        for output in out.drain(..) {
            match output {
                Output::Read { unless } => self.request(What::Read(unless), is_awaited),
                Output::Fence => self.request(What::Fence, true),
                Output::Mark(loss) => self.request(What::Mark(loss), true),
                Output::Pause => self.request(What::Pause, is_awaited),
                Output::Tell(told) => channel.into_iter().for_each(|channel| tell(channel, told.clone(), fanout)),
                Output::Admit(admission) => {
                    channel.into_iter().for_each(|channel| channel.let_in(&admission, &mut replays, fanout));
                }
            }
        }
        result
    }

    /// Has the position checked, if one is known.
    pub(crate) fn check(self: &Arc<Self>) {
        self.ask(|follow, out| {
            if follow.position().is_some() {
                follow.check(out);
            }
        });
        self.active_us.store(clock::now_us(), Ordering::Relaxed);
    }

    /// Lets `act` do what asks for a read and nothing else: nobody is told anything before the answer.
    pub(crate) fn ask<R>(
        self: &Arc<Self>,
        act: impl FnOnce(&mut Follow<Position>, &mut Vec<Output<Position>>) -> R,
    ) -> R {
        let mut out = Vec::new();
        let mut state = self.state.lock();
        let result = act(&mut state.follow, &mut out);
        let is_awaited = state.follow.is_awaited();
        for output in out {
            if let Output::Read { unless } = output {
                self.request(What::Read(unless), is_awaited);
            }
        }
        result
    }

    /// Whether a channel in the hub has it: that, and the list of all.
    fn is_used(self: &Arc<Self>) -> bool {
        Arc::strong_count(self) > 1
    }

    fn request(self: &Arc<Self>, what: What, is_urgent: bool) {
        let mut lists = self.requests.list.lock();
        let mut asked = self.asked.lock();
        (asked.what, asked.is_urgent) = (Some(what), is_urgent);
        if is_urgent {
            lists.urgent.push_back(Arc::clone(self));
        } else if !std::mem::replace(&mut asked.is_in_checks, true) {
            lists.checks.push_back(Arc::clone(self));
        }
        self.requests.notify.notify_one();
    }

    /// Somebody waits now for what was put off.
    fn hurry(self: &Arc<Self>) {
        let mut lists = self.requests.list.lock();
        let mut asked = self.asked.lock();
        // It may just have been taken.
        if asked.is_put_off() {
            asked.is_urgent = true;
            lists.urgent.push_back(Arc::clone(self));
        }
    }
}

fn tell<S: Subscriber>(channel: &Arc<Channel<S>>, told: Told, fanout: &mut Fanout<S>) {
    match told {
        Told::Gap(gap) => channel.tell_gap(&gap, fanout),
        Told::Event { cursor, payload } => {
            channel.gather(Message { payload: Payload::Unchecked(&payload), cursor: Some(cursor) }, fanout);
        }
    }
}

impl Asked {
    fn is_put_off(&self) -> bool {
        self.what.is_some() && !self.is_urgent
    }
}

impl Requests {
    /// The next one, those that somebody waits for first.
    pub fn pop(&self) -> Option<Request> {
        let mut lists = self.list.lock();
        loop {
            let is_urgent = !lists.urgent.is_empty();
            let list = if is_urgent { &mut lists.urgent } else { &mut lists.checks };
            let following = list.pop_front()?;
            let mut asked = following.asked.lock();
            asked.is_in_checks &= is_urgent;
            if let Some(what) = asked.what.take() {
                drop(asked);
                return Some(Request { following, what });
            }
        }
    }

    /// Waits until one was listed since the last wait.
    pub async fn listed(&self) {
        self.notify.notified().await;
    }
}
