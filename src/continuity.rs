//! One channel with history on one instance: what is delivered, and where continuity broke. Pure: no I/O, no clock.
//!
//! Live messages come in any order, some twice, some never; Redis may go back to an older state. [`Follow`] takes a
//! message if it names the position as its predecessor. Whatever else comes is held until the stream is read: one read
//! at a time serves repair, position check and recovery. If what this instance had is on no chain that leads to what
//! the read shows, Redis lost it: the subscribers are told, and a break marker is asked for so that others learn of it
//! (`losses.rs`).
//!
//! The model that this follows was tried against random worlds; `tests/it/continuity_model.rs` does the same to this.

use crate::cursor::{Cursor, Ids};
use crate::history_store::{Content, Entry, Loss, Standing, Window};
use crate::history_view::{Gap, GapReason, RECOVERY_EVENTS_MAX, Start, Told, with_gaps};
use crate::hold::Hold;
use crate::joining::{Joiner, Joining};

/// Ids that are remembered, in multiples of the history's size.
const REMEMBERED_SIZES: usize = 2;

/// How many more of them while a read is under way: what goes by live meanwhile, so that its answer can be told from
/// another branch.
const REMEMBERED_FOR_READ: usize = 2 * RECOVERY_EVENTS_MAX;

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
    /// Wait until all messages are here that Redis sent before this. Answer by [`Follow::fenced`].
    Fence,
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
    pub(crate) position: Option<Cursor>,
    /// The last cursor that was told.
    told_last: Option<Cursor>,
    /// Entries passed, in order, lost branches included: one unbroken piece that ends at the position.
    pub(crate) ring: Ids,
    /// Those of earlier pieces: never delivered again.
    pub(crate) before: Ids,
    /// The greatest id ever passed.
    newest: Cursor,
    /// Ids heard and known to be lost: late copies and what continues them are dropped.
    pub(crate) lost: Ids,
    /// Markers whose gap was told ahead of them.
    pub(crate) told: Ids,
    /// Markers without shared id that were passed.
    pub(crate) passed: Ids,
    /// An id that the chain must have, else it is lost: our marker, or a message whose loss is being marked.
    pub(crate) must: Option<Cursor>,
    /// For a loss known from messages: the newest predecessor that they name and the chain has.
    pub(crate) link: Option<Cursor>,
    /// Nothing is in common with what was: go on with what is newer than all.
    pub(crate) skips: bool,
    /// What was lost on a branch that came back was found by the last read.
    pub(crate) is_return_known: bool,
    /// Who waits to be let in.
    pub(crate) waiting: Joining<J>,
    /// Messages that did not fit.
    pub(crate) hold: Hold,
    /// Messages that came so far.
    number: u64,
    /// Entries that went by live since the read was sent.
    pub(crate) live: usize,
    /// A read whose answer came before the messages of what it shows. While they are awaited those it is for are let in
    /// as soon as the last of them is there.
    early: Option<Window>,
    is_confirmed: bool,
    pub(crate) busy: Busy,
    /// A read was asked for meanwhile.
    again: bool,
    pauses: bool,
}

/// The request that is under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Busy {
    Rest,
    /// What was the case when the read was sent: what the chain must have, and how many messages had come.
    Reading {
        before: Option<Cursor>,
        asked: u64,
    },
    /// The messages that the read showed are awaited.
    Fencing {
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
        let ids = || Ids::new(REMEMBERED_SIZES * size);
        Self {
            is_cached,
            position: None,
            told_last: None,
            ring: ids(),
            before: ids(),
            newest: Cursor { ms: 0, sequence: 0 },
            lost: Ids::new(REMEMBERED_SIZES * size + REMEMBERED_FOR_READ),
            told: ids(),
            passed: ids(),
            must: None,
            link: None,
            skips: false,
            is_return_known: false,
            waiting: Joining::new(),
            hold: Hold::default(),
            number: 0,
            live: 0,
            early: None,
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
        self.busy == Busy::Rest && self.hold.is_empty() && self.waiting.is_empty()
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

    /// Whether somebody, or a message, waits for a read, be it for the next one.
    pub fn is_awaited(&self) -> bool {
        self.waiting.is_asked() || !self.hold.is_empty() || (self.is_confirmed && self.waiting.is_unasked())
    }

    /// Somebody subscribes, perhaps after a cursor. It is let in once a read says so that is sent after this, and after
    /// the SUBSCRIBE was confirmed.
    pub fn join(&mut self, who: J, after: Option<Cursor>, out: &mut Vec<Output<J>>) {
        self.wait(Joiner { who, after, is_behind: false }, out);
    }

    /// A member fell behind at a cursor and wants what it missed, which it is told as one that joins is let in.
    pub fn come_back(&mut self, who: J, at: Cursor, out: &mut Vec<Output<J>>) {
        self.wait(Joiner { who, after: Some(at), is_behind: true }, out);
    }

    fn wait(&mut self, joiner: Joiner<J>, out: &mut Vec<Output<J>>) {
        self.waiting.push(joiner);
        if self.is_confirmed {
            self.check(out);
        }
    }

    /// Somebody that was not let in yet has gone. True if it waited.
    pub fn leave(&mut self, who: &J) -> bool {
        self.waiting.remove(who)
    }

    /// Has the position checked: now and then while nothing comes, and when a link is back.
    pub fn check(&mut self, out: &mut Vec<Output<J>>) {
        if self.busy != Busy::Rest || self.pauses {
            self.again = true;
            return;
        }
        self.again = false;
        self.waiting.ask(self.is_confirmed);
        self.live = 0;
        self.ring.widen(REMEMBERED_FOR_READ);
        self.busy = Busy::Reading { before: self.must.or(self.position), asked: self.number };
        // Whoever begins at the position has no need of what was before it.
        let wants_past = self.waiting.wants_past(self.is_cached);
        let is_only_a_check = self.hold.is_empty() && !wants_past && self.must.is_none() && !self.skips;
        out.push(Output::Read { unless: self.position.filter(|_| is_only_a_check) });
    }

    /// Redis may have lost something, or be back: a pause has no reason any more, and what is known is checked at once.
    pub fn doubt(&mut self, out: &mut Vec<Output<J>>) {
        if self.pauses {
            self.resume(out);
        } else if self.position.is_some() {
            self.check(out);
        }
    }

    /// The pause is over.
    pub fn resume(&mut self, out: &mut Vec<Output<J>>) {
        self.pauses = false;
        if self.position.is_some() || self.waiting.is_unasked() {
            self.check(out);
        }
    }

    /// A message from Pub/Sub, in any order, perhaps twice. A read under way does not stop what fits.
    pub fn message(&mut self, entry: Entry, out: &mut Vec<Output<J>>) {
        self.number += 1;
        let is_marking = matches!(self.busy, Busy::Marking { .. });
        let waits = is_marking || self.position.is_none() || self.skips || !self.hold.is_empty();
        if waits || !self.take(&entry, out) {
            self.hold.push(self.number, entry);
            self.check(out);
        } else if let Some(window) = self.early.take_if(|window| self.position == Some(window.top)) {
            self.serve(&window, out);
        }
    }

    /// True: delivered, or known. False: the stream must be read.
    fn take(&mut self, entry: &Entry, out: &mut Vec<Output<J>>) -> bool {
        if Some(entry.previous) == self.position {
            self.live += 1;
            self.waiting.record(entry);
            self.advance(std::slice::from_ref(entry), None, out);
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

    pub(crate) fn knows(&self, id: Cursor) -> bool {
        self.lost.has(id) || self.ring.has(id)
    }

    /// Passes entries that continue the position, or, with a reason for the gap, are next after it.
    fn advance(&mut self, entries: &[Entry], gap: Option<GapReason>, out: &mut Vec<Output<J>>) {
        let is_told = |entry: &Entry| match entry.content {
            // Redis went back to a branch that was delivered before.
            Content::Event(_) => entry.id <= self.newest && (self.ring.has(entry.id) || self.before.has(entry.id)),
            Content::Marker(_) => self.told.has(entry.id),
        };
        let passed: Vec<_> = entries.iter().collect();
        let told = with_gaps(self.position, self.told_last, &passed, is_told);
        if let Some(reason) = gap {
            self.tell_gap(reason, told.first().and_then(Told::cursor), out);
        }
        for told in told {
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

    pub(crate) fn tell_gap(&mut self, reason: GapReason, next: Option<Cursor>, out: &mut Vec<Output<J>>) {
        out.push(Output::Tell(Told::Gap(Gap { after: self.told_last, next, reason })));
    }

    /// The answer to a read; `None`: it failed, or may have.
    pub fn read_answered(&mut self, answer: Option<&Window>, out: &mut Vec<Output<J>>) {
        let Busy::Reading { before, asked } = self.busy else { return };
        self.busy = Busy::Rest;
        let Some(window) = answer else { return self.retry(out) };
        self.lost.ids.retain(|id| !window.has(*id));
        // Ahead of, or beside, what the read shows: with the position from before it was sent.
        if let Some(before) = before
            && (window.judge(before) == Standing::Fork || self.is_beside(before, window))
        {
            return self.mark(before, window, out);
        }
        if self.must == before {
            (self.must, self.link) = (None, None);
        }
        if let Some(own) = self.lost_of_held(window, asked).or_else(|| self.lost_of_passed(window)) {
            return self.mark(own, window, out);
        }
        self.settle(window, asked, false, out);
    }

    /// Whatever Redis sent before the last answer is here.
    pub fn fenced(&mut self, out: &mut Vec<Output<J>>) {
        let Busy::Fencing { asked } = self.busy else { return };
        self.busy = Busy::Rest;
        match self.early.take() {
            Some(window) => self.settle(&window, asked, true, out),
            None => self.go_on(out),
        }
    }

    /// Goes by what a read shows, at once or after a fence.
    fn settle(&mut self, window: &Window, asked: u64, is_fenced: bool, out: &mut Vec<Output<J>>) {
        if self.must.is_none() && !self.skips {
            self.take_fitting(window, out);
        }
        if !is_fenced && self.may_be_early(window) {
            self.busy = Busy::Fencing { asked };
            self.early = Some(window.clone());
            return out.push(Output::Fence);
        }
        if !self.catch_up(window, out) {
            self.waiting.put_back();
            return self.check(out);
        }
        self.take_held(window, asked, out);
        self.serve(window, out);
        self.go_on(out);
    }

    /// Messages have a link of their own: what is missing here may only be late. But they come in order: if one came that
    /// is newer and does not fit, it is not.
    fn may_be_early(&self, window: &Window) -> bool {
        let Some(position) = self.position.filter(|_| self.is_confirmed && !self.skips) else { return false };
        window.judge(position) == Standing::Old && !self.hold.iter().any(|(_, entry)| entry.id > position)
    }

    fn go_on(&mut self, out: &mut Vec<Output<J>>) {
        if !self.hold.is_empty() || self.again || (self.waiting.is_unasked() && self.is_confirmed) {
            self.check(out);
        } else {
            self.ring.narrow();
        }
    }

    /// Goes on to what the window shows. False: live went on along another branch meanwhile, look again.
    fn catch_up(&mut self, window: &Window, out: &mut Vec<Output<J>>) -> bool {
        let Some(position) = self.position.filter(|_| !self.skips) else {
            self.begin_anew(window, None, out);
            return true;
        };
        match window.judge(position) {
            Standing::On => {
                self.advance(window.after(position).unwrap_or_default(), None, out);
                true
            }
            Standing::Old => {
                self.begin_anew(window, Some(GapReason::Trimmed), out);
                true
            }
            // More than can be told apart went by: the next check looks at what was passed then.
            Standing::Fork => self.knows(window.top) || self.live >= self.ring.room(),
        }
    }

    /// Nothing to compare with, or nothing in common: what is newer than all that was passed is told.
    fn begin_anew(&mut self, window: &Window, gap: Option<GapReason>, out: &mut Vec<Output<J>>) {
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
        self.advance(fresh, gap, out);
        self.position = Some(window.top);
        self.newest = self.newest.max(window.top);
    }

    /// Takes what was held and fits where the channel stands, up to where the window goes on: that has the gaps in their
    /// places. What does not fit, is older, and not another branch's, was passed.
    fn take_fitting(&mut self, window: &Window, out: &mut Vec<Output<J>>) {
        let mut hold = std::mem::take(&mut self.hold);
        hold.retain(|_, entry| {
            let is_passed = |position| entry.id <= position && window.judge(entry.id) != Standing::Fork;
            let goes_on = self.position.is_some_and(|position| window.judge(position) == Standing::On);
            goes_on || (!self.take(entry, out) && !self.position.is_some_and(is_passed))
        });
        self.hold = hold;
    }

    /// Takes what was held and now fits. What the window shows, or is older, is passed, even where the ring forgot it;
    /// what a read was asked for after it came, and is not there, is trimmed.
    fn take_held(&mut self, window: &Window, asked: u64, out: &mut Vec<Output<J>>) {
        for _ in 0..2 {
            let mut hold = std::mem::take(&mut self.hold);
            let is_newer = |id| window.judge(id) == Standing::Fork;
            hold.retain(|number, entry| !self.take(entry, out) && number > asked && is_newer(entry.id));
            self.hold = hold;
        }
    }

    /// Lets those in that the read was for.
    fn serve(&mut self, window: &Window, out: &mut Vec<Output<J>>) {
        let Some(position) = self.position else { return };
        for admission in self.waiting.let_in(window, &self.ring, position, self.is_cached) {
            out.push(Output::Admit(admission));
            self.told_last.get_or_insert(position);
        }
    }

    pub(crate) fn retry(&mut self, out: &mut Vec<Output<J>>) {
        self.waiting.put_back();
        self.pauses = true;
        out.push(Output::Pause);
    }
}
