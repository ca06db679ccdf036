//! What Redis lost of a channel: how it is noticed, marked for others, and told. The other half of [`Follow`].

use crate::continuity::{Busy, Follow, Output};
use crate::cursor::Cursor;
use crate::history_store::{Entry, Loss, Marked, Standing, Window};
use crate::history_view::GapReason;

impl<J: PartialEq> Follow<J> {
    /// Older than the window, yet lost: it was passed after the predecessor of the window's first entry.
    pub(crate) fn is_beside(&self, id: Cursor, window: &Window) -> bool {
        let Some(first) = window.entries.first().filter(|first| id < first.id && id != first.previous) else {
            return false;
        };
        let place = |id| self.ring.ids.iter().position(|passed| *passed == id);
        place(first.previous).zip(place(id)).is_some_and(|(first, own)| first < own)
    }

    /// Messages that came before the read was sent and are not there: lost as well. The newest of them.
    pub(crate) fn lost_of_held(&mut self, window: &Window, asked: u64) -> Option<Cursor> {
        let is_lost = |(number, entry): &&(u64, Entry)| {
            *number <= asked
                && window.judge(entry.id) == Standing::Fork
                && !self.knows(entry.id)
                && !self.lost.has(entry.previous)
        };
        let lost: Vec<_> = self.hold.iter().filter(is_lost).map(|(_, entry)| (entry.id, entry.previous)).collect();
        let own = lost.iter().map(|(id, _)| *id).max()?;
        let links = lost.iter().map(|(_, previous)| *previous).filter(|id| window.judge(*id) == Standing::On);
        (self.must, self.link) = (Some(own), Some(links.max().unwrap_or(window.top)));
        lost.iter().for_each(|(id, _)| self.lost.push(*id));
        Some(own)
    }

    /// The chain begins anew, on a branch that was passed before: what followed there then, and is not there, is lost. The
    /// newest of that.
    pub(crate) fn lost_of_passed(&mut self, window: &Window) -> Option<Cursor> {
        let is_known = std::mem::take(&mut self.is_return_known);
        let is_continued = |position| !self.skips && window.judge(position) != Standing::Old;
        if is_known || self.position.is_none_or(is_continued) {
            return None;
        }
        let mut passed: Vec<_> = self.before.ids.iter().chain(&self.ring.ids).copied().collect();
        passed.truncate(passed.len().saturating_sub(self.live));
        let link = passed.iter().rposition(|id| window.has(*id))?;
        let lost: Vec<_> =
            passed[link + 1..].iter().copied().filter(|id| window.judge(*id) == Standing::Fork).collect();
        let own = lost.iter().copied().max()?;
        lost.into_iter().for_each(|id| self.lost.push(id));
        (self.must, self.link, self.is_return_known) = (Some(own), Some(passed[link]), true);
        Some(own)
    }

    /// Redis lost `own`.
    pub(crate) fn mark(&mut self, own: Cursor, window: &Window, out: &mut Vec<Output<J>>) {
        let link = self.link.filter(|link| window.has(*link));
        let shared = link.or_else(|| self.ring.ids.iter().copied().filter(|id| window.has(*id)).max());
        let is_ahead = |position: Cursor| own != position && window.judge(position) == Standing::Fork;
        let is_older = self.position.is_some_and(is_ahead) && self.ring.has(window.top);
        self.waiting.put_back();
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
        self.tell_gap(GapReason::Upstream, None, out);
        self.told.push(marker);
        self.passed.push(marker);
        match shared {
            Some(shared) => self.position = Some(shared),
            None => self.skips = true,
        }
    }
}
