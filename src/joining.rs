//! Who waits to be let in to a channel with history, and what goes by live meanwhile. Pure; owned by [`crate::continuity`].

use std::collections::HashMap;

use crate::continuity::Admission;
use crate::cursor::{Cursor, Ids};
use crate::history_store::{Entry, Window};
use crate::history_view::{RECOVERY_EVENTS_MAX, REPLY_BYTES_MAX};

/// Those who wait for the answer to a read, and those who came after it was sent.
#[derive(Debug)]
pub(crate) struct Joining<J> {
    /// For a read to be sent.
    joiners: Vec<Joiner<J>>,
    /// For its answer.
    serving: Vec<Joiner<J>>,
    /// What went by live since the read was sent, for those that it serves; `None` if nobody needs it, or it is too much.
    recent: Option<Vec<Entry>>,
}

/// One of them.
#[derive(Debug)]
pub(crate) struct Joiner<J> {
    pub(crate) who: J,
    pub(crate) after: Option<Cursor>,
    /// A member that fell behind there.
    pub(crate) is_behind: bool,
}

impl<J: PartialEq> Joining<J> {
    /// Nobody.
    pub(crate) fn new() -> Self {
        Self { joiners: Vec::new(), serving: Vec::new(), recent: None }
    }

    /// Nobody waits.
    pub(crate) fn is_empty(&self) -> bool {
        self.joiners.is_empty() && self.serving.is_empty()
    }

    /// Somebody waits for a read to be sent.
    pub(crate) fn is_unasked(&self) -> bool {
        !self.joiners.is_empty()
    }

    /// Somebody waits for an answer.
    pub(crate) fn is_asked(&self) -> bool {
        !self.serving.is_empty()
    }

    /// One more.
    pub(crate) fn push(&mut self, joiner: Joiner<J>) {
        self.joiners.push(joiner);
    }

    /// Somebody has gone. True if it waited.
    pub(crate) fn remove(&mut self, who: &J) -> bool {
        let waiting = self.joiners.len() + self.serving.len();
        self.joiners.retain(|joiner| joiner.who != *who);
        self.serving.retain(|joiner| joiner.who != *who);
        self.joiners.len() + self.serving.len() < waiting
    }

    /// A read is sent: it is for all, or, while the channel is not live, for nobody new.
    pub(crate) fn ask(&mut self, is_live: bool) {
        if is_live {
            self.serving.append(&mut self.joiners);
        }
        self.recent = (!self.serving.is_empty()).then(Vec::new);
    }

    /// Whether what was before the position is of use to somebody that the read is for.
    pub(crate) fn wants_past(&self, is_cached: bool) -> bool {
        self.serving.iter().any(|joiner| joiner.after.is_some() || is_cached)
    }

    /// Keeps what goes by live.
    pub(crate) fn record(&mut self, entry: &Entry) {
        let Some(recent) = &mut self.recent else { return };
        recent.push(entry.clone());
        if recent.len() > RECOVERY_EVENTS_MAX || recent.iter().map(Entry::len).sum::<usize>() > REPLY_BYTES_MAX {
            self.recent = None;
        }
    }

    /// The answer is of no use: all wait for the next read.
    pub(crate) fn put_back(&mut self) {
        self.serving.append(&mut self.joiners);
        std::mem::swap(&mut self.serving, &mut self.joiners);
        self.recent = None;
    }

    /// Those that the read was for are let in, where the channel stands now; `passed` ends there.
    pub(crate) fn let_in(
        &mut self,
        window: &Window,
        passed: &Ids,
        position: Cursor,
        is_cached: bool,
    ) -> Vec<Admission<J>> {
        let recent = self.recent.take();
        let since = since(window.top, position, passed, recent.as_deref());
        // Many come back at once, to few places.
        let mut starts = HashMap::new();
        let start = |after: Option<Cursor>, is_behind| match after.filter(|_| is_behind) {
            Some(at) => window.catch_up(at, since, position),
            None => window.start(after, since, position, is_cached),
        };
        let admission = |Joiner { who: joiner, after, is_behind }| {
            let start = starts.entry((after, is_behind)).or_insert_with(|| start(after, is_behind)).clone();
            Admission { joiner, start }
        };
        std::mem::take(&mut self.serving).into_iter().map(admission).collect()
    }
}

/// What went by live after the read that showed `top`, if it is known.
fn since<'a>(top: Cursor, position: Cursor, passed: &Ids, recent: Option<&'a [Entry]>) -> Option<&'a [Entry]> {
    if position == top {
        return Some(&[]);
    }
    let passed = &passed.ids;
    let count = passed.len() - 1 - passed.iter().rposition(|id| *id == top)?;
    let recent = recent?;
    Some(&recent[recent.len().checked_sub(count)?..])
}
