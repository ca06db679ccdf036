//! What gives way in the queue of a slow consumer, and how that is told.
//!
//! Only channels whose rule says so lose anything: first those of which the latest counts, then those that drop
//! the oldest. A frame of which a part is sent stays, and so does everything else. In the place of a loss stands
//! a `gap`, before the next event of its channel; one stands for all losses with no event between them. Of a
//! channel of which the latest counts it stands for all that is missing behind it, too: whoever is behind has many
//! small holes there, and reloads once. Gaps do not count against the bounds, so that every eviction makes room;
//! there are never more than events and borders in the queue, and channels. Where the oldest go and there is a history,
//! the client falls behind instead (`behind.rs`).

use std::collections::HashSet;
use std::hash::{DefaultHasher, Hasher};
use std::sync::Arc;

use crate::backlog::{Backlog, Load};
use crate::cursor::Cursor;
use crate::event;
use crate::frame::{Frame, Role};
use crate::history_view::{Gap, GapReason};
use crate::outbox::Limits;
use crate::slow_policy::EvictionLane;

/// What eviction has to know of publications that share a frame.
#[derive(Debug)]
pub struct Evictable {
    /// Where they were published.
    pub channel: Arc<str>,
    /// How they give way.
    pub lane: EvictionLane,
    /// Where the channel stood before.
    pub before: Option<Cursor>,
    /// The cursor of the first of them.
    pub first: Option<Cursor>,
    /// The last cursor that they have.
    pub last: Option<Cursor>,
}

/// What was lost where a gap stands.
#[derive(Clone, Debug)]
pub struct Loss {
    /// Of which channel.
    pub channel: Arc<str>,
    /// Of that only the latest counts.
    pub is_latest: bool,
    /// As it is told.
    pub gap: Gap,
}

/// How many messages went so that another one has room.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Evicted {
    /// Because they were the oldest.
    pub oldest: usize,
    /// Because a newer one has the same key.
    pub conflated: usize,
}

/// The channel of which a frame begins or ends a subscription, as a hash: one that is the same by chance costs a gap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Border(u64);

impl Border {
    /// That of a channel.
    pub fn of(channel: &str) -> Self {
        let mut hasher = DefaultHasher::new();
        hasher.write(channel.as_bytes());
        Self(hasher.finish())
    }
}

/// What a frame is to one channel.
enum Sight<'a> {
    Event(&'a Evictable),
    Gap(&'a Loss),
    Border,
}

impl Backlog {
    /// Queues a frame for which there is no room, and lets go what takes its place, if that is enough.
    pub fn push_evicting(&mut self, frame: &Arc<Frame>, limits: &Limits) -> Option<Evicted> {
        let evictable = self.evictable_now();
        if evictable.messages == 0 || !limits.admit(self.counted().less(evictable), frame) {
            return None;
        }
        let mut evicted = Evicted { oldest: 0, conflated: self.conflate(frame) };
        while !limits.admit(self.counted(), frame) && !self.is_withheld(frame) {
            let Some(oldest) = self.oldest() else { break };
            evicted.oldest += self.evict(oldest);
        }
        match self.is_withheld(frame) {
            true => evicted.oldest += frame.messages(),
            false => self.push(Arc::clone(frame)),
        }
        self.is_conflated = self.latest > 0;
        Some(evicted)
    }

    /// Loses a frame that was not queued, if its channel allows that.
    pub fn lose(&mut self, frame: &Frame) -> bool {
        let Role::Event(event) = frame.role() else { return false };
        let end = self.frames.len();
        if self.fall_behind(end, event).is_none() {
            self.tell(end, event);
        }
        true
    }

    /// What may be evicted, without the events that gaps have promised.
    fn evictable_now(&self) -> Load {
        let promised = self.telling.iter().flat_map(|telling| telling.promised());
        let frames = promised.filter_map(|(channel, next)| {
            let is_it = |frame: &&Arc<Frame>| frame.event().is_some_and(|event| event.is(channel, next));
            self.frames.iter().skip(self.begun()).find(is_it)
        });
        frames.fold(self.evictable, |load, frame| load.less(Load::of(frame)))
    }

    fn is_promised(&self, event: &Evictable) -> bool {
        let Some(telling) = &self.telling else { return false };
        telling.promised().any(|(channel, next)| event.is(channel, next))
    }

    /// The frame that goes next.
    fn oldest(&self) -> Option<usize> {
        let of_lane = |is_latest: bool| {
            let goes = |event: &Evictable| event.is_latest() == is_latest && !self.is_promised(event);
            (self.begun()..self.frames.len()).find(|at| self.frames[*at].event().is_some_and(goes))
        };
        // Without looking through a queue that has none.
        Some(self.latest).filter(|latest| *latest > 0).and_then(|_| of_lane(true)).or_else(|| of_lane(false))
    }

    /// Drops a frame and tells of it, or drops its whole channel until there is room; returns how many messages that were.
    fn evict(&mut self, at: usize) -> usize {
        let Some(frame) = self.frames.get(at).cloned() else { return 0 };
        if let Some(dropped) = frame.event().and_then(|event| self.fall_behind(at, event)) {
            return dropped;
        }
        self.remove(at);
        frame.event().into_iter().for_each(|event| self.tell(at, event));
        frame.messages()
    }

    /// Leaves only the newest of each key, of which one may be arriving; returns how many messages that drops.
    fn conflate(&mut self, arriving: &Frame) -> usize {
        if self.latest == 0 {
            return 0;
        }
        if self.is_conflated {
            return self.superseded_by(arriving).map_or(0, |at| self.evict(at));
        }
        let is_superseded = self.superseded(arriving);
        let frames = std::mem::take(&mut self.frames);
        self.forget_counts();
        let mut dropped = 0;
        for (at, (frame, is_superseded)) in frames.into_iter().zip(is_superseded).enumerate() {
            match frame.role() {
                Role::Event(event) if is_superseded => {
                    dropped += frame.messages();
                    self.tell(self.frames.len(), event);
                }
                // One that stands before it by now tells of it, too.
                Role::Gap(loss) if at >= self.begun() && self.covering(self.frames.len(), loss).is_some() => {}
                _ => self.push(frame),
            }
            if at == 0 {
                self.begin_head(self.head_sent);
            }
        }
        dropped
    }

    /// In a queue that is conflated: the frame with the key of one that arrives.
    fn superseded_by(&self, arriving: &Frame) -> Option<usize> {
        let newer = arriving.event()?;
        let is_older = |event: &Evictable| {
            newer.key().is_some()
                && event.key() == newer.key()
                && event.channel == newer.channel
                && !self.is_promised(event)
        };
        (self.begun()..self.frames.len()).find(|at| self.frames[*at].event().is_some_and(is_older))
    }

    /// For each frame, whether there is a newer one with its key.
    fn superseded(&self, arriving: &Frame) -> Vec<bool> {
        let mut newer: HashSet<_> =
            arriving.event().and_then(|event| Some((&event.channel, event.key()?))).into_iter().collect();
        let mut is_superseded = vec![false; self.frames.len()];
        for at in (self.begun()..self.frames.len()).rev() {
            let event = self.frames[at].event().filter(|event| !self.is_promised(event));
            let key = event.and_then(|event| Some((&event.channel, event.key()?)));
            is_superseded[at] = key.is_some_and(|key| !newer.insert(key));
        }
        is_superseded
    }

    /// Tells of a loss at a place: by the gap that stands for it already, or by one there.
    fn tell(&mut self, at: usize, event: &Evictable) {
        let loss = Loss {
            channel: Arc::clone(&event.channel),
            is_latest: event.is_latest(),
            gap: Gap { after: self.position(at, event), next: None, reason: GapReason::Slow },
        };
        match self.covering(at, &loss) {
            Some(covering) => self.renew(covering),
            None => {
                self.insert(at, event::lost(loss));
                self.renew(at);
            }
        }
    }

    /// Has a gap stand for those that follow with nothing between, and name the next event.
    fn renew(&mut self, at: usize) {
        let Some(Role::Gap(loss)) = self.frames.get(at).map(|frame| frame.role()) else { return };
        let mut loss = Loss::clone(loss);
        let border = Border::of(&loss.channel);
        let mut next = None;
        let mut follower = at + 1;
        while let Some(frame) = self.frames.get(follower) {
            match frame.sight(&loss.channel, border) {
                Some(Sight::Border) => break,
                Some(Sight::Event(event)) => {
                    next = next.or(Some(event.first));
                    let is_passed = event.last.is_some() || loss.gap.after.is_none();
                    if self.gap_count() == 1 || is_passed && !loss.is_latest {
                        break;
                    }
                }
                // Behind events without a cursor: the client stands there where it stands here.
                Some(Sight::Gap(later)) if next.is_some() && !loss.is_latest => {
                    let gap = Gap { after: loss.gap.after, ..later.gap };
                    self.replace(follower, Loss { gap, ..Loss::clone(later) });
                }
                Some(Sight::Gap(_)) => {
                    self.remove(follower);
                    continue;
                }
                None => {}
            }
            follower += 1;
        }
        let next = next.flatten();
        if next != loss.gap.next {
            loss.gap.next = next;
            self.replace(at, loss);
        }
    }

    fn replace(&mut self, at: usize, loss: Loss) {
        self.remove(at);
        self.insert(at, event::lost(loss));
    }

    /// Has an open gap of its channel name the event that was queued last.
    pub(crate) fn follow_last(&mut self) {
        let Some(last) = self.frames.len().checked_sub(1) else { return };
        let Some(event) = self.frames[last].event().filter(|event| event.first.is_some()) else { return };
        let border = Border::of(&event.channel);
        let sight = |at: &usize| self.frames[*at].sight(&event.channel, border).is_some();
        if let Some(at) = (self.begun()..last).rev().find(sight) {
            self.renew(at);
        }
    }

    /// Gaps that come back from a writer, among so many frames, may have to name an event that came meanwhile.
    pub(crate) fn renew_first(&mut self, count: usize) {
        (self.begun()..count).rev().for_each(|at| self.renew(at));
    }

    /// The gap before a place that stands for a loss there.
    fn covering(&self, at: usize, loss: &Loss) -> Option<usize> {
        if self.gap_count() == 0 {
            return None;
        }
        let border = Border::of(&loss.channel);
        for before in (self.begun()..at).rev() {
            match self.frames[before].sight(&loss.channel, border) {
                Some(Sight::Gap(_)) => return Some(before),
                Some(Sight::Event(_)) if loss.is_latest => {}
                Some(Sight::Event(_) | Sight::Border) => return None,
                None => {}
            }
        }
        None
    }

    /// The last cursor of the channel that the client has before a place: on channels with history.
    pub(crate) fn position(&self, at: usize, event: &Evictable) -> Option<Cursor> {
        event.before.or(event.last)?;
        let border = Border::of(&event.channel);
        for before in (0..at).rev() {
            match self.frames[before].sight(&event.channel, border) {
                Some(Sight::Gap(loss)) => return loss.gap.after,
                Some(Sight::Event(Evictable { last: Some(last), .. })) => return Some(*last),
                Some(Sight::Border) => return event.before,
                Some(Sight::Event(_)) | None => {}
            }
        }
        let told = self.telling.as_ref().and_then(|telling| telling.position(&event.channel));
        told.or(event.before)
    }
}

impl Loss {
    /// On a channel with history: no event has come behind it yet.
    pub(crate) fn is_open(&self) -> bool {
        self.gap.after.is_some() && self.gap.next.is_none()
    }
}

impl Evictable {
    fn is_latest(&self) -> bool {
        matches!(self.lane, EvictionLane::Latest(_))
    }

    /// The history keeps it, so it may be told later.
    pub(crate) fn is_kept(&self) -> bool {
        !self.is_latest() && self.before.is_some()
    }

    /// Newer ones of the same key take its place.
    fn key(&self) -> Option<u64> {
        match self.lane {
            EvictionLane::Latest(key) => key,
            EvictionLane::DropOldest => None,
        }
    }

    fn is(&self, channel: &Arc<str>, first: Cursor) -> bool {
        self.first == Some(first) && self.channel == *channel
    }
}

impl Frame {
    /// The publications that may go.
    fn event(&self) -> Option<&Evictable> {
        match self.role() {
            Role::Event(event) => Some(event),
            Role::Plain | Role::Border(_) | Role::Gap(_) => None,
        }
    }

    /// What it is to a channel, if anything.
    fn sight(&self, channel: &Arc<str>, border: Border) -> Option<Sight<'_>> {
        match self.role() {
            Role::Event(event) => (event.channel == *channel).then_some(Sight::Event(event)),
            Role::Gap(loss) => (loss.channel == *channel).then_some(Sight::Gap(loss)),
            Role::Border(other) => (*other == border).then_some(Sight::Border),
            Role::Plain => None,
        }
    }
}
