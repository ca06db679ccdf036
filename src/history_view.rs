//! What is told of what a read of history shows: recovery from a cursor, pages, and where a gap stands. Pure.

use std::sync::Arc;

use bytes::Bytes;

use crate::cursor::Cursor;
use crate::history_store::{Content, Entry, Standing, Window};

/// Most events that a client is caught up with; who missed more begins anew.
pub const RECOVERY_EVENTS_MAX: usize = 300;

/// Most payload bytes of one recovery, and of one page of history: what fits beside a full outbox.
pub const REPLY_BYTES_MAX: usize = 1 << 20;

/// Events of a page of history when none are asked for.
pub const PAGE_EVENTS: usize = 100;

/// Most events of a page.
pub const PAGE_EVENTS_MAX: usize = 1000;

/// Something a client is told on a channel with history.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Told {
    /// A publication.
    Event {
        /// Where the client then stands.
        cursor: Cursor,
        /// As published.
        payload: Bytes,
    },
    /// Continuity broke here.
    Gap(Gap),
}

/// Where continuity broke.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gap {
    /// The last cursor told before, if there was one and it is known.
    pub after: Option<Cursor>,
    /// The cursor of the first event that follows, if one does at once.
    pub next: Option<Cursor>,
    /// Why.
    pub reason: GapReason,
}

impl Gap {
    /// Something may be missing here; what comes next is not known.
    pub fn upstream(after: Option<Cursor>) -> Self {
        Self { after, next: None, reason: GapReason::Upstream }
    }
}

/// Where a subscriber begins.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Start {
    /// Where those stand who are there already.
    pub position: Cursor,
    /// Just before the first event that it is told: its own cursor if `recovered`.
    pub cursor: Cursor,
    /// Nothing is missing between its cursor and what it is told.
    pub recovered: bool,
    /// It asked for what it missed.
    pub is_resumed: bool,
    /// What it is told before all else: what it missed, or the last event.
    pub missed: Arc<[Told]>,
}

impl Start {
    /// At the newest event, with nothing told of the past.
    pub fn at(position: Cursor) -> Self {
        Self { position, cursor: position, recovered: false, is_resumed: false, missed: Arc::new([]) }
    }

    /// The last cursor that it is told with its start.
    pub fn told(&self) -> Cursor {
        self.missed.iter().rev().find_map(Told::cursor).unwrap_or(self.cursor)
    }

    /// The same for somebody who stands at `after` and is told what it `missed`, if that is known.
    fn resumed(position: Cursor, after: Cursor, missed: Option<Vec<Told>>) -> Self {
        let Some(missed) = missed else { return Self { is_resumed: true, ..Self::at(position) } };
        Self { position, cursor: after, recovered: true, is_resumed: true, missed: missed.into() }
    }
}

/// Why continuity broke.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GapReason {
    /// Redis lost what it had acknowledged.
    Upstream,
    /// What was missed is older than the history.
    Trimmed,
    /// The client was too slow for its channel's rule.
    Slow,
}

impl GapReason {
    /// As the wire names it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Upstream => "upstream",
            Self::Trimmed => "trimmed",
            Self::Slow => "slow",
        }
    }
}

/// Part of a history, oldest first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Page {
    /// Events, and the gaps between them.
    pub told: Vec<Told>,
    /// There is more in the direction that was asked for.
    pub has_more: bool,
}

/// Which part of a history.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Range {
    /// The oldest events after a cursor.
    After(Cursor),
    /// The newest events before a cursor.
    Before(Cursor),
    /// The newest events.
    Newest,
}

/// What there is room for in an answer: so many events, and [`REPLY_BYTES_MAX`]; one event however big.
#[derive(Debug)]
pub(crate) struct Room {
    events_max: usize,
    events: usize,
    bytes: usize,
}

impl Room {
    fn new(events_max: usize) -> Self {
        Self { events_max, events: 0, bytes: 0 }
    }

    /// That of a page.
    pub(crate) fn of_page(limit: usize) -> Self {
        Self::new(limit.min(PAGE_EVENTS_MAX))
    }

    /// Whether there is room for another entry.
    pub(crate) fn takes(&mut self, entry: &Entry) -> bool {
        self.events += usize::from(entry.marker().is_none());
        self.bytes += entry.len();
        self.events <= self.events_max && (self.bytes <= REPLY_BYTES_MAX || self.events <= 1)
    }
}

impl Window {
    /// Where a subscriber begins that stands at `after`, if it says so. `more` was appended since the read; `None`: that
    /// is not known. One that is not caught up begins with the last event where the channel `is_cached`.
    pub fn start(&self, after: Option<Cursor>, more: Option<&[Entry]>, position: Cursor, is_cached: bool) -> Start {
        let missed = after.zip(more).and_then(|(after, more)| self.recover(after, more));
        let start = match after {
            Some(after) => Start::resumed(position, after, missed),
            None => Start::at(position),
        };
        match more.filter(|_| is_cached && !start.recovered).and_then(|more| self.last(more)) {
            Some((cursor, told)) => Start { cursor, missed: told.into(), ..start },
            None => start,
        }
    }

    /// What is told next to one that fell behind at `after`: what follows, as much as a recovery may have. If that is not
    /// all there is (not `recovered`), `cursor` is where it stands then. A gap goes first where it cannot be brought
    /// back to where it was.
    pub fn catch_up(&self, after: Cursor, more: Option<&[Entry]>, position: Cursor) -> Start {
        let gap = |reason, next| Told::Gap(Gap { after: Some(after), next, reason });
        let all = |more| self.entries.iter().chain(more).collect();
        let missed: Option<(bool, Vec<_>)> = more.and_then(|more| match self.missed(after, more) {
            Some(missed) => Some((false, missed)),
            None => (self.judge(after) == Standing::Old).then(|| (true, all(more))),
        });
        let Some((is_trimmed, missed)) = missed else {
            return Start { recovered: true, missed: [gap(GapReason::Upstream, None)].into(), ..Start::at(position) };
        };
        let mut room = Room::new(RECOVERY_EVENTS_MAX);
        let count = missed.iter().take_while(|entry| room.takes(entry)).count();
        let before = if is_trimmed { missed.first().map(|entry| entry.previous) } else { Some(after) };
        let mut told = with_gaps(before, before, &missed[..count], |_| false);
        if is_trimmed && !matches!(told.first(), Some(Told::Gap(_))) {
            told.insert(0, gap(GapReason::Trimmed, told.first().and_then(Told::cursor)));
        }
        let recovered = count == missed.len();
        let cursor = if recovered { position } else { missed[count - 1].id };
        Start { cursor, recovered, missed: told.into(), ..Start::at(position) }
    }

    /// The last event, and the gaps after it; with the cursor just before.
    fn last(&self, more: &[Entry]) -> Option<(Cursor, Vec<Told>)> {
        let entries: Vec<_> = self.entries.iter().chain(more).collect();
        let last = entries.iter().rposition(|entry| entry.marker().is_none())?;
        let before = entries[last].previous;
        Some((before, with_gaps(Some(before), Some(before), &entries[last..], |_| false)))
    }

    /// What a client missed that stands at `after`; `more` was appended since the read. `None`: it is not continued
    /// there, or it is too much, and it begins anew.
    pub fn recover(&self, after: Cursor, more: &[Entry]) -> Option<Vec<Told>> {
        let missed = self.missed(after, more)?;
        let events = missed.iter().filter(|entry| entry.marker().is_none()).count();
        let bytes: usize = missed.iter().map(|entry| entry.len()).sum();
        let is_known = !missed.iter().any(|entry| entry.is_blind_marker());
        let fits = events <= RECOVERY_EVENTS_MAX && bytes <= REPLY_BYTES_MAX;
        (is_known && fits).then(|| with_gaps(Some(after), Some(after), &missed, |_| false))
    }

    /// What follows an id here and in what was appended since, if that continues it.
    fn missed<'a>(&'a self, after: Cursor, more: &'a [Entry]) -> Option<Vec<&'a Entry>> {
        let (entries, more) = match self.after(after) {
            Some(entries) => (entries, more),
            None => (&[][..], &more[more.iter().position(|entry| entry.id == after)? + 1..]),
        };
        Some(entries.iter().chain(more).collect())
    }

    /// A page; `limit` is brought into bounds. An event that alone is too big is a page of its own.
    pub fn page(&self, range: Range, limit: usize) -> Page {
        let (start, end) = match range {
            Range::After(cursor) => (self.entries.partition_point(|entry| entry.id <= cursor), self.entries.len()),
            Range::Before(cursor) => (0, self.entries.partition_point(|entry| entry.id < cursor)),
            Range::Newest => (0, self.entries.len()),
        };
        let entries = &self.entries[start..end];
        let mut room = Room::of_page(limit);
        let mut fits = |entry: &&Entry| room.takes(entry);
        let (before, taken): (_, Vec<_>) = match range {
            Range::After(cursor) => (Some(cursor), entries.iter().take_while(&mut fits).collect()),
            Range::Before(_) | Range::Newest => {
                let count = entries.iter().rev().take_while(&mut fits).count();
                let taken = &entries[entries.len() - count..];
                (taken.first().map(|entry| entry.previous), taken.iter().collect())
            }
        };
        let has_more = taken.len() < entries.len();
        let mut told = with_gaps(before, before, &taken, |_| false);
        if let Some(reason) = self.is_broken_at(range)
            && !matches!(told.first(), Some(Told::Gap(_)))
        {
            let next = told.first().and_then(Told::cursor);
            told.insert(0, Told::Gap(Gap { after: before, next, reason }));
        }
        Page { told, has_more }
    }

    /// Why something is missing for a client that asks for what is after a cursor: it is too old, or was lost.
    fn is_broken_at(&self, range: Range) -> Option<GapReason> {
        let Range::After(cursor) = range else { return None };
        match self.judge(cursor) {
            Standing::On => None,
            Standing::Old => Some(GapReason::Trimmed),
            Standing::Fork => Some(GapReason::Upstream),
        }
    }
}

impl Told {
    /// The cursor of an event.
    pub fn cursor(&self) -> Option<Cursor> {
        match self {
            Self::Event { cursor, .. } => Some(*cursor),
            Self::Gap(_) => None,
        }
    }
}

/// What is told of entries from `start` on to somebody who was last told `last`: the events, and a gap for each marker,
/// right after its shared id where that is here, else in its own place. Entries that `is_told` knows are passed in silence.
pub fn with_gaps(
    start: Option<Cursor>,
    last: Option<Cursor>,
    entries: &[&Entry],
    is_told: impl Fn(&Entry) -> bool,
) -> Vec<Told> {
    let is_here = |id| start == Some(id) || entries.iter().any(|entry| entry.id == id);
    let markers = || entries.iter().filter(|entry| entry.marker().is_some() && !is_told(entry));
    let place = |marker: &Entry| marker.marker().flatten().filter(|shared| is_here(*shared)).unwrap_or(marker.id);
    let breaks: Vec<_> = markers().map(|marker| place(marker)).collect();
    let mut told = Telling { told: Vec::new(), last };
    if start.is_some_and(|start| breaks.contains(&start)) {
        told.gap();
    }
    for entry in entries {
        match &entry.content {
            Content::Event(payload) if !is_told(entry) => told.event(entry.id, payload),
            Content::Event(_) | Content::Marker(_) => {}
        }
        if breaks.contains(&entry.id) {
            told.gap();
        }
    }
    told.told
}

/// Puts together what is told; gaps with nothing between them are one.
struct Telling {
    told: Vec<Told>,
    last: Option<Cursor>,
}

impl Telling {
    fn gap(&mut self) {
        if !matches!(self.told.last(), Some(Told::Gap(_))) {
            self.told.push(Told::Gap(Gap { after: self.last, next: None, reason: GapReason::Upstream }));
        }
    }

    fn event(&mut self, cursor: Cursor, payload: &Bytes) {
        if let Some(Told::Gap(gap)) = self.told.last_mut() {
            gap.next = Some(cursor);
        }
        self.told.push(Told::Event { cursor, payload: payload.clone() });
        self.last = Some(cursor);
    }
}
