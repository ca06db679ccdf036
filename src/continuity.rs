//! One channel with history on one instance: what is delivered, and where continuity broke. Pure: no I/O, no clock.
//!
//! Live messages come in any order, some twice, some never; Redis may go back to an older state. [`Follow`] takes a
//! message if it names the position as its predecessor. Whatever else comes is held until the stream is read: one read
//! at a time serves repair, position check and recovery. If what this instance had is on no chain that leads to what
//! the read shows, Redis lost it: the subscribers are told, and a break marker is asked for so that others learn of it.
//!
//! The model that this follows was tried against random worlds; `tests/it/continuity_model.rs` does the same to this.

use std::collections::HashMap;

use crate::cursor::{Cursor, Ids};
use crate::history_store::{Content, Entry, Loss, Marked, Standing, Window};
use crate::history_view::{Gap, GapReason, RECOVERY_EVENTS_MAX, REPLY_BYTES_MAX, Start, Told, with_gaps};

/// Most messages that are held for a read. What comes then is dropped: the read after this one has it.
const HELD_MAX: usize = 40;

/// Ids that are remembered, in multiples of the history's size.
const REMEMBERED_SIZES: usize = 2;

/// What has to be done. Pushed in order; each read and each mark is to be answered once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Output<J> {
    /// Tell every subscriber that was let in.
    Tell(Told),
    /// Let somebody in.
    Admit(Admission<J>),
    /// Read stream and position, in one atomic step; whoever knows that the position is still `unless` may leave the
    /// stream out. Answer by [`Follow::read_answered`].
    Read {
        /// The position that is held, if the stream is of no use while that is the newest.
        unless: Option<Cursor>,
    },
    /// Mark a loss. Answer by [`Follow::marked`].
    Mark(Loss),
    /// A request failed: call [`Follow::resume`] after a pause with jitter.
    Pause,
}

/// A subscriber that is let in. From here on it is told what all are told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Admission<J> {
    /// Who.
    pub joiner: J,
    /// Where it begins.
    pub start: Start,
}

/// Held from the first subscriber until the history's TTL after the last.
#[derive(Debug)]
pub struct Follow<J> {
    is_cached: bool,
    /// The last entry passed; `None`: not known yet.
    position: Option<Cursor>,
    /// The last cursor that was told.
    told_last: Option<Cursor>,
    /// Entries passed, in order, lost branches included: one unbroken piece that ends at the position.
    ring: Ids,
    /// Those of earlier pieces: never delivered again.
    before: Ids,
    /// The greatest id ever passed.
    newest: Cursor,
    /// Ids heard and known to be lost: late copies and what continues them are dropped.
    lost: Ids,
    /// Markers whose gap was told ahead of them.
    told: Ids,
    /// Markers without shared id that were passed.
    passed: Ids,
    /// An id that the chain must have, else it is lost: our marker, or a message whose loss is being marked.
    must: Option<Cursor>,
    /// For a loss known from messages: the newest predecessor that they name and the chain has.
    link: Option<Cursor>,
    /// Nothing is in common with what was: go on with what is newer than all.
    skips: bool,
    /// Who waits for a read to be sent, and who for its answer.
    joiners: Vec<Joiner<J>>,
    serving: Vec<Joiner<J>>,
    /// Messages that did not fit, with their numbers.
    hold: Vec<(u64, Entry)>,
    /// Messages that came so far.
    number: u64,
    /// What went by live since the read was sent, for those that it serves; `None` if nobody needs it, or it is too much.
    recent: Option<Vec<Entry>>,
    is_confirmed: bool,
    busy: Busy,
    /// A read was asked for meanwhile.
    again: bool,
    pauses: bool,
}

#[derive(Debug)]
struct Joiner<J> {
    who: J,
    after: Option<Cursor>,
    /// A member that fell behind there.
    is_behind: bool,
}

/// The request that is under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Busy {
    Rest,
    /// What was the case when the read was sent: what the chain must have, and how many messages had come.
    Reading {
        before: Option<Cursor>,
        asked: u64,
    },
    /// `stays`: only messages were lost, the position itself is on the chain.
    Marking {
        shared: Option<Cursor>,
        own: Cursor,
        stays: bool,
    },
}

impl<J: PartialEq> Follow<J> {
    /// A channel of which nothing is known, with a history of `size` entries; those who join one that `is_cached` begin
    /// with its last event.
    pub fn new(size: usize, is_cached: bool) -> Self {
        let ids = || Ids::new(REMEMBERED_SIZES * size.max(1));
        Self {
            is_cached,
            position: None,
            told_last: None,
            ring: ids(),
            before: ids(),
            newest: Cursor { ms: 0, sequence: 0 },
            lost: Ids::new(REMEMBERED_SIZES * size + HELD_MAX),
            told: ids(),
            passed: ids(),
            must: None,
            link: None,
            skips: false,
            joiners: Vec::new(),
            serving: Vec::new(),
            hold: Vec::new(),
            number: 0,
            recent: None,
            is_confirmed: false,
            busy: Busy::Rest,
            again: false,
            pauses: false,
        }
    }

    /// The last entry passed.
    pub fn position(&self) -> Option<Cursor> {
        self.position
    }

    /// No request is under way, and nothing waits for one.
    pub fn is_at_rest(&self) -> bool {
        self.busy == Busy::Rest && self.hold.is_empty() && self.joiners.is_empty() && self.serving.is_empty()
    }

    /// Redis confirmed the SUBSCRIBE: what came before is read now.
    pub fn confirmed(&mut self, out: &mut Vec<Output<J>>) {
        self.is_confirmed = true;
        self.check(out);
    }

    /// The subscription is gone, by our wish or with its link.
    pub fn unconfirmed(&mut self) {
        self.is_confirmed = false;
    }

    /// Whether messages of the channel arrive here.
    pub fn is_confirmed(&self) -> bool {
        self.is_confirmed
    }

    /// Whether somebody, or a message, waits for a read.
    pub fn is_awaited(&self) -> bool {
        !self.serving.is_empty() || !self.hold.is_empty()
    }

    /// Somebody subscribes, perhaps after a cursor. It is let in once a read says so that is sent after this, and after
    /// the SUBSCRIBE was confirmed.
    pub fn join(&mut self, who: J, after: Option<Cursor>, out: &mut Vec<Output<J>>) {
        self.joiners.push(Joiner { who, after, is_behind: false });
        if self.is_confirmed {
            self.check(out);
        }
    }

    /// A member fell behind at a cursor and wants what it missed, which it is told as one that joins is let in.
    pub fn come_back(&mut self, who: J, at: Cursor, out: &mut Vec<Output<J>>) {
        self.joiners.push(Joiner { who, after: Some(at), is_behind: true });
        if self.is_confirmed {
            self.check(out);
        }
    }

    /// Somebody that was not let in yet has gone. True if it waited.
    pub fn leave(&mut self, who: &J) -> bool {
        let waiting = self.joiners.len() + self.serving.len();
        self.joiners.retain(|joiner| joiner.who != *who);
        self.serving.retain(|joiner| joiner.who != *who);
        self.joiners.len() + self.serving.len() < waiting
    }

    /// Has the position checked: now and then while nothing comes, and when a link is back.
    pub fn check(&mut self, out: &mut Vec<Output<J>>) {
        if self.busy != Busy::Rest || self.pauses {
            self.again = true;
            return;
        }
        self.again = false;
        if self.is_confirmed {
            self.serving.append(&mut self.joiners);
        }
        self.recent = (!self.serving.is_empty()).then(Vec::new);
        self.busy = Busy::Reading { before: self.must.or(self.position), asked: self.number };
        // Whoever begins at the position has no need of what was before it.
        let wants_past = self.serving.iter().any(|joiner| joiner.after.is_some() || self.is_cached);
        let is_only_a_check = self.hold.is_empty() && !wants_past && self.must.is_none() && !self.skips;
        out.push(Output::Read { unless: self.position.filter(|_| is_only_a_check) });
    }

    /// The pause is over.
    pub fn resume(&mut self, out: &mut Vec<Output<J>>) {
        self.pauses = false;
        if self.position.is_some() || !self.joiners.is_empty() {
            self.check(out);
        }
    }

    /// A message from Pub/Sub, in any order, perhaps twice. A read under way does not stop what fits.
    pub fn message(&mut self, entry: Entry, out: &mut Vec<Output<J>>) {
        self.number += 1;
        let is_marking = matches!(self.busy, Busy::Marking { .. });
        let waits = is_marking || self.position.is_none() || self.skips || !self.hold.is_empty();
        if waits || !self.take(&entry, out) {
            if self.hold.len() < HELD_MAX {
                self.hold.push((self.number, entry));
            }
            self.check(out);
        }
    }

    /// True: delivered, or known. False: the stream must be read.
    fn take(&mut self, entry: &Entry, out: &mut Vec<Output<J>>) -> bool {
        if Some(entry.previous) == self.position {
            self.record(entry);
            self.advance(std::slice::from_ref(entry), out);
            return true;
        }
        if self.knows(entry.id) {
            return true;
        }
        // It continues a branch that was told as lost.
        let is_lost = self.lost.has(entry.previous);
        if is_lost {
            self.lost.push(entry.id);
        }
        is_lost
    }

    fn knows(&self, id: Cursor) -> bool {
        self.lost.has(id) || self.ring.has(id)
    }

    /// Keeps what goes by live for those who wait for a read.
    fn record(&mut self, entry: &Entry) {
        let Some(recent) = &mut self.recent else { return };
        recent.push(entry.clone());
        if recent.len() > RECOVERY_EVENTS_MAX || recent.iter().map(Entry::len).sum::<usize>() > REPLY_BYTES_MAX {
            self.recent = None;
        }
    }

    /// Passes entries that continue the position.
    fn advance(&mut self, entries: &[Entry], out: &mut Vec<Output<J>>) {
        let is_told = |entry: &Entry| match entry.content {
            // Redis went back to a branch that was delivered before.
            Content::Event(_) => entry.id <= self.newest && (self.ring.has(entry.id) || self.before.has(entry.id)),
            Content::Marker(_) => self.told.has(entry.id),
        };
        let passed: Vec<_> = entries.iter().collect();
        for told in with_gaps(self.position, self.told_last, &passed, is_told) {
            self.told_last = told.cursor().or(self.told_last);
            out.push(Output::Tell(told));
        }
        for entry in entries {
            self.position = Some(entry.id);
            self.newest = self.newest.max(entry.id);
            self.ring.push(entry.id);
            if entry.is_blind_marker() {
                self.passed.push(entry.id);
            }
        }
    }

    fn tell_gap(&mut self, reason: GapReason, out: &mut Vec<Output<J>>) {
        out.push(Output::Tell(Told::Gap(Gap { after: self.told_last, next: None, reason })));
    }

    /// The answer to a read; `None`: it failed, or may have.
    pub fn read_answered(&mut self, answer: Option<&Window>, out: &mut Vec<Output<J>>) {
        let Busy::Reading { before, asked } = self.busy else { return };
        self.busy = Busy::Rest;
        let Some(window) = answer else { return self.retry(out) };
        self.lost.ids.retain(|id| window.find(*id).is_none());
        // Ahead of, or beside, what the read shows: with the position from before it was sent.
        if let Some(before) = before
            && (window.judge(before) == Standing::Fork || self.is_beside(before, window))
        {
            return self.mark(before, window, out);
        }
        if self.must == before {
            (self.must, self.link) = (None, None);
        }
        if let Some(own) = self.lost_of_held(window, asked) {
            return self.mark(own, window, out);
        }
        if !self.catch_up(window, out) {
            self.put_back();
            return self.check(out);
        }
        self.take_held(asked, out);
        self.serve(window, out);
        if !self.hold.is_empty() || self.again || (!self.joiners.is_empty() && self.is_confirmed) {
            self.check(out);
        }
    }

    /// Older than the window, yet lost: it was passed after the predecessor of the window's first entry.
    fn is_beside(&self, id: Cursor, window: &Window) -> bool {
        let Some(first) = window.entries.first().filter(|first| id < first.id && id != first.previous) else {
            return false;
        };
        let place = |id| self.ring.ids.iter().position(|passed| *passed == id);
        place(first.previous).zip(place(id)).is_some_and(|(first, own)| first < own)
    }

    /// Messages that came before the read was sent and are not there: lost as well. The newest of them.
    fn lost_of_held(&mut self, window: &Window, asked: u64) -> Option<Cursor> {
        let is_lost = |(number, entry): &&(u64, Entry)| {
            *number <= asked
                && !self.knows(entry.id)
                && !self.lost.has(entry.previous)
                && window.judge(entry.id) == Standing::Fork
        };
        let lost: Vec<_> = self.hold.iter().filter(is_lost).map(|(_, entry)| (entry.id, entry.previous)).collect();
        let own = lost.iter().map(|(id, _)| *id).max()?;
        let links = lost.iter().map(|(_, previous)| *previous).filter(|id| window.judge(*id) == Standing::On);
        (self.must, self.link) = (Some(own), Some(links.max().unwrap_or(window.top)));
        lost.iter().for_each(|(id, _)| self.lost.push(*id));
        Some(own)
    }

    /// Goes on to what the window shows. False: live went on along another branch meanwhile, look again.
    fn catch_up(&mut self, window: &Window, out: &mut Vec<Output<J>>) -> bool {
        let Some(position) = self.position.filter(|_| !self.skips) else {
            self.begin_anew(window, out);
            return true;
        };
        match window.judge(position) {
            Standing::On => {
                self.advance(window.after(position).unwrap_or_default(), out);
                true
            }
            Standing::Old => {
                self.tell_gap(GapReason::Trimmed, out);
                self.begin_anew(window, out);
                true
            }
            Standing::Fork => self.knows(window.top),
        }
    }

    /// Nothing to compare with, or nothing in common: what is newer than all that was passed is told.
    fn begin_anew(&mut self, window: &Window, out: &mut Vec<Output<J>>) {
        let start = match self.position {
            Some(_) => window.entries.partition_point(|entry| entry.id <= self.newest),
            None => window.entries.len(),
        };
        let (old, fresh) = window.entries.split_at(start);
        self.position.get_or_insert(window.top);
        self.skips = false;
        std::mem::take(&mut self.ring.ids).into_iter().for_each(|id| self.before.push(id));
        for entry in old {
            if entry.is_blind_marker() {
                self.passed.push(entry.id);
            }
            if !self.knows(entry.id) {
                self.ring.push(entry.id);
            }
        }
        if fresh.is_empty() && !self.knows(window.top) {
            self.ring.push(window.top);
        }
        self.advance(fresh, out);
        self.position = Some(window.top);
        self.newest = self.newest.max(window.top);
    }

    /// Takes what was held and now fits. What a read was asked for after it came, and is not there, is trimmed.
    fn take_held(&mut self, asked: u64, out: &mut Vec<Output<J>>) {
        for _ in 0..2 {
            let mut held = std::mem::take(&mut self.hold);
            held.sort_by_key(|(_, entry)| entry.id);
            held.retain(|(number, entry)| !self.take(entry, out) && *number > asked);
            self.hold = held;
        }
    }

    /// Lets those in that the read was for.
    fn serve(&mut self, window: &Window, out: &mut Vec<Output<J>>) {
        let recent = self.recent.take();
        let Some(position) = self.position else { return };
        let since = self.since(window.top, position, recent.as_deref());
        // Many come back at once, to few places.
        let mut starts = HashMap::new();
        let start = |after: Option<Cursor>, is_behind| match after.filter(|_| is_behind) {
            Some(at) => window.catch_up(at, since, position),
            None => window.start(after, since, position, self.is_cached),
        };
        for Joiner { who: joiner, after, is_behind } in std::mem::take(&mut self.serving) {
            let start = starts.entry((after, is_behind)).or_insert_with(|| start(after, is_behind)).clone();
            out.push(Output::Admit(Admission { joiner, start }));
            self.told_last = Some(position);
        }
    }

    /// What went by live after the read, if it is known.
    fn since<'a>(&self, top: Cursor, position: Cursor, recent: Option<&'a [Entry]>) -> Option<&'a [Entry]> {
        if position == top {
            return Some(&[]);
        }
        let passed = &self.ring.ids;
        let count = passed.len() - 1 - passed.iter().rposition(|id| *id == top)?;
        let recent = recent?;
        Some(&recent[recent.len().checked_sub(count)?..])
    }

    fn put_back(&mut self) {
        self.serving.append(&mut self.joiners);
        std::mem::swap(&mut self.serving, &mut self.joiners);
        self.recent = None;
    }

    fn retry(&mut self, out: &mut Vec<Output<J>>) {
        self.put_back();
        self.pauses = true;
        out.push(Output::Pause);
    }

    /// Redis lost `own`.
    fn mark(&mut self, own: Cursor, window: &Window, out: &mut Vec<Output<J>>) {
        let link = self.link.filter(|link| window.has(*link));
        let shared = link.or_else(|| self.ring.ids.iter().copied().filter(|id| window.has(*id)).max());
        let is_ahead = |position: Cursor| own != position && window.judge(position) == Standing::Fork;
        let is_older = self.position.is_some_and(is_ahead) && self.knows(window.top);
        self.put_back();
        self.busy = Busy::Marking { shared, own, stays: is_older || link.is_some() };
        out.push(Output::Mark(Loss { shared, own, passed: self.passed.ids.iter().copied().collect() }));
    }

    /// The answer to a mark; `None`: it failed, or may have.
    pub fn marked(&mut self, answer: Option<Marked>, out: &mut Vec<Output<J>>) {
        let Busy::Marking { shared, own, stays } = self.busy else { return };
        self.busy = Busy::Rest;
        match answer {
            None => return self.retry(out),
            Some(Marked::Exists) => {}
            Some(Marked::Already(marker) | Marked::Written(marker)) => {
                self.lost.push(own);
                self.must = Some(marker);
                // Where only messages were lost, it is told when the marker is passed, in the stream's order.
                if !stays {
                    self.lose_position(shared, marker, out);
                }
            }
        }
        self.check(out);
    }

    /// Told at once, since live events may follow the shared id before the next read.
    fn lose_position(&mut self, shared: Option<Cursor>, marker: Cursor, out: &mut Vec<Output<J>>) {
        self.tell_gap(GapReason::Upstream, out);
        self.told.push(marker);
        self.passed.push(marker);
        match shared {
            Some(shared) => self.position = Some(shared),
            None => self.skips = true,
        }
    }
}
