//! The naive model of a slow consumer's outbox, for `eviction_model.rs`.

use std::sync::Arc;

use hubcast::behind::Backfill;
use hubcast::cursor::Cursor;
use hubcast::event;
use hubcast::eviction::Evicted;
use hubcast::frame::Frame;
use hubcast::history_view::{Gap, GapReason, Start};
use hubcast::outbox::{Limits, Outbox, Push};
use hubcast::publication::{Format, Message, Origin, Payload, Publication};
use hubcast::rules::ChannelRules;

const RULES: &str = r#"[{"match":"drop*","slow":"drop_oldest"},{"match":"latest*","slow":"latest","latest_by":"/k"},
    {"match":"one","slow":"latest"}]"#;

/// Those with an `h` have history.
pub(crate) const CHANNELS: [&str; 6] = ["close", "drop", "drop_h", "latest", "latest_h", "one"];

#[derive(Clone, Debug)]
pub(crate) enum Op {
    /// To a channel, with a key or none, so much filler, so many at once, with a cursor where there is history.
    Publish { channel: usize, key: Option<u8>, filler: usize, count: usize, is_plain: bool },
    /// An answer of so many bytes, perhaps of the past.
    Reply { filler: usize, is_replay: bool },
    /// The channel is subscribed to anew.
    Subscribe(usize),
    /// What was missed is told where that is asked for: all of it, or so many events.
    CatchUp(Option<usize>),
    /// The socket takes so many bytes. Meanwhile these are published.
    Flush(usize, Vec<Op>),
}

#[derive(Clone, Debug)]
pub(crate) enum Kind {
    Plain,
    Replay,
    /// An event of the past.
    Past {
        channel: usize,
        cursor: Cursor,
    },
    Border {
        channel: usize,
        at: Option<Cursor>,
    },
    Event {
        channel: usize,
        key: Option<u8>,
        first: Option<Cursor>,
        last: Option<Cursor>,
    },
}

/// Something that was pushed, perhaps lost since.
#[derive(Clone, Debug)]
pub(crate) struct Item {
    id: usize,
    pub(crate) frame: Arc<Frame>,
    pub(crate) kind: Kind,
    is_lost: bool,
}

/// A frame as it would leave: an item, or a gap that stands for some.
#[derive(Clone, Debug)]
pub(crate) struct Leaving {
    pub(crate) frame: Arc<Frame>,
    pub(crate) kind: Kind,
    /// The item, or those lost.
    ids: Vec<usize>,
    gap: Option<(usize, Gap)>,
}

#[derive(Clone, Default)]
pub(crate) struct Told {
    /// Where the client stands by what left.
    at: [Option<Cursor>; CHANNELS.len()],
    /// The event that a gap named, and that has to follow.
    promised: [Option<Cursor>; CHANNELS.len()],
}

#[derive(Default)]
pub(crate) struct Model {
    pub(crate) items: Vec<Item>,
    /// What is partly sent, and how much.
    pub(crate) head: Option<(Leaving, usize)>,
    pub(crate) told: Told,
    pub(crate) wire: Vec<u8>,
    top: [u64; CHANNELS.len()],
    number: usize,
    pub(crate) lost: usize,
    behind: [Option<Behind>; CHANNELS.len()],
    /// Nothing was taken since it fell behind.
    is_stalled: bool,
}

#[derive(Clone, Copy)]
pub(crate) struct Behind {
    at: Cursor,
    is_told: bool,
}

pub(crate) const LIMITS: Limits = Limits { messages: 8, bytes: 900 };

fn is_lossy(channel: usize) -> bool {
    channel > 0
}

fn is_latest(channel: usize) -> bool {
    channel > 2
}

/// Of what it drops there is a history.
fn is_kept(channel: usize) -> bool {
    channel == 2
}

impl Kind {
    /// Of the past: it does not count against the bounds.
    fn is_past(&self) -> bool {
        matches!(self, Self::Replay | Self::Past { .. })
    }
}

impl Told {
    pub(crate) fn pass(&mut self, leaving: &Leaving) {
        if let Some((channel, gap)) = &leaving.gap {
            self.promised[*channel] = gap.next;
            return;
        }
        match leaving.kind {
            Kind::Event { channel, last, .. } => {
                self.at[channel] = last.or(self.at[channel]);
                self.promised[channel] = None;
            }
            Kind::Border { channel, at } => {
                self.at[channel] = at;
                self.promised[channel] = None;
            }
            Kind::Past { channel, cursor } => {
                self.at[channel] = Some(cursor);
                self.promised[channel] = None;
            }
            Kind::Plain | Kind::Replay => {}
        }
    }
}

impl Model {
    /// What would leave, in order.
    pub(crate) fn leaving(&self) -> Vec<Leaving> {
        let mut told = self.told.clone();
        let mut leaving: Vec<Leaving> = Vec::new();
        // By channel: the gap that stands for a loss here, and whether it has its next event.
        let mut standing: [Option<(usize, bool)>; CHANNELS.len()] = Default::default();
        for item in &self.items {
            match item.kind {
                Kind::Event { channel, .. } if item.is_lost => match standing[channel] {
                    Some((at, _)) => leaving[at].ids.push(item.id),
                    None => {
                        standing[channel] = Some((leaving.len(), false));
                        let gap = Gap { after: told.at[channel], next: None, reason: GapReason::Slow };
                        let frame = Arc::clone(&item.frame);
                        leaving.push(Leaving {
                            frame,
                            kind: Kind::Plain,
                            ids: vec![item.id],
                            gap: Some((channel, gap)),
                        });
                    }
                },
                Kind::Event { channel, first, .. } => {
                    if let Some((at, false)) = standing[channel] {
                        leaving[at].gap.as_mut().unwrap().1.next = first;
                        standing[channel] = is_latest(channel).then_some((at, true));
                    }
                }
                Kind::Border { channel, .. } | Kind::Past { channel, .. } => standing[channel] = None,
                Kind::Plain | Kind::Replay => {}
            }
            if !item.is_lost {
                leaving.push(Leaving {
                    frame: Arc::clone(&item.frame),
                    kind: item.kind.clone(),
                    ids: vec![item.id],
                    gap: None,
                });
                told.pass(&leaving[leaving.len() - 1]);
            }
        }
        for leaving in &mut leaving {
            if let Some((channel, gap)) = &leaving.gap {
                leaving.frame = event::gap(CHANNELS[*channel], gap);
            }
        }
        leaving
    }

    /// Messages and bytes that wait.
    pub(crate) fn depth(&self) -> (usize, usize) {
        let head = self.head.iter().map(|(head, sent)| (head.frame.messages(), head.frame.len() - sent));
        let rest = self.leaving().into_iter().map(|leaving| (leaving.frame.messages(), leaving.frame.len()));
        head.chain(rest).fold((0, 0), |sum, one| (sum.0 + one.0, sum.1 + one.1))
    }

    fn counted(&self, is_gone: impl Fn(&Item) -> bool) -> (usize, usize) {
        let head = self.head.iter().filter(|(head, _)| head.gap.is_none() && !head.kind.is_past());
        let head = head.map(|(head, sent)| (head.frame.messages(), head.frame.len() - sent));
        let counts = |item: &&Item| !item.is_lost && !item.kind.is_past() && !is_gone(item);
        let items = self.items.iter().filter(counts).map(|item| (item.frame.messages(), item.frame.len()));
        head.chain(items).fold((0, 0), |sum, one| (sum.0 + one.0, sum.1 + one.1))
    }

    /// Whether a frame fits to what counts, without the items that `is_gone` names.
    fn admits(&self, frame: &Frame, is_gone: impl Fn(&Item) -> bool) -> bool {
        let (messages, bytes) = self.counted(is_gone);
        messages == 0 || messages + frame.messages() <= LIMITS.messages && bytes + frame.len() <= LIMITS.bytes
    }

    fn may_go(&self, item: &Item) -> bool {
        let Kind::Event { channel, first, .. } = item.kind else { return false };
        !item.is_lost && is_lossy(channel) && (first.is_none() || self.told.promised[channel] != first)
    }

    fn key(item: &Item) -> Option<(usize, u8)> {
        match item.kind {
            Kind::Event { channel, key, .. } if is_latest(channel) => Some((channel, key?)),
            _ => None,
        }
    }

    fn lose(&mut self, at: usize) -> usize {
        if let Kind::Event { channel, .. } = self.items[at].kind
            && self.fall_behind(channel, at)
        {
            let behind = |item: &Item| matches!(item.kind, Kind::Event { channel: other, .. } if other == channel);
            let gone: Vec<_> = self.items.extract_if(at.., |item| behind(item)).collect();
            return gone.iter().filter(|item| !item.is_lost).map(|item| item.frame.messages()).sum();
        }
        self.items[at].is_lost = true;
        self.items[at].frame.messages()
    }

    /// From here on the history has it, unless another subscription follows.
    fn fall_behind(&mut self, channel: usize, from: usize) -> bool {
        let is_border = |item: &Item| match item.kind {
            Kind::Border { channel: other, .. } | Kind::Past { channel: other, .. } => other == channel,
            _ => false,
        };
        if !is_kept(channel) || self.items[from..].iter().any(is_border) {
            return false;
        }
        let mut at = self.told.at[channel];
        for item in self.items[..from].iter().filter(|item| !item.is_lost) {
            match item.kind {
                Kind::Event { channel: other, last, .. } if other == channel => at = last.or(at),
                Kind::Border { channel: other, at: then } if other == channel => at = then,
                Kind::Past { channel: other, cursor } if other == channel => at = Some(cursor),
                _ => {}
            }
        }
        self.behind[channel] = Some(Behind { at: at.unwrap(), is_told: false });
        self.is_stalled = true;
        true
    }

    fn is_withheld(&self, item: &Item) -> bool {
        matches!(item.kind, Kind::Event { channel, .. } if self.behind[channel].is_some())
    }

    /// Where what was missed can be asked for.
    fn missed(&self) -> Vec<(usize, Behind)> {
        let (messages, bytes) = self.counted(|_| false);
        let is_past = self.items.iter().map(|item| &item.kind).chain(self.head.iter().map(|(head, _)| &head.kind));
        let has_room = messages <= LIMITS.messages / 2 && bytes <= LIMITS.bytes / 2;
        if self.is_stalled || !has_room || is_past.into_iter().any(Kind::is_past) {
            return Vec::new();
        }
        let behind = self.behind.iter().enumerate();
        behind.filter_map(|(channel, behind)| Some((channel, (*behind)?))).collect()
    }

    /// Tells what was missed, or the first events of it.
    pub(crate) fn catch_up(&mut self, outbox: &Outbox, most: Option<usize>) {
        let asked: Vec<_> = outbox.ask_missed(&LIMITS).iter().map(|(name, at)| (name.to_string(), *at)).collect();
        let missed = self.missed();
        let expected: Vec<_> =
            missed.iter().map(|(channel, behind)| (CHANNELS[*channel].to_owned(), behind.at)).collect();
        assert_eq!(asked, expected);
        assert!(outbox.ask_missed(&LIMITS).is_empty(), "once");
        for (channel, behind) in missed {
            let top = self.cursor(channel).unwrap();
            let all = (behind.at.ms + 1..=top.ms).map(|ms| Cursor { ms, sequence: 0 });
            let cursors: Vec<_> = all.take(most.unwrap_or(usize::MAX)).collect();
            let past = |cursor: &Cursor| {
                event::replayed(CHANNELS[channel], &Message { payload: Payload::Json("1"), cursor: Some(*cursor) })
            };
            let frames: Vec<_> = cursors.iter().map(past).collect();
            let then = cursors.last().copied().filter(|last| *last < top);
            let gap = Gap { after: Some(behind.at), next: cursors.first().copied(), reason: GapReason::Slow };
            let gap = event::gap(CHANNELS[channel], &gap);
            let (name, at, events) = (CHANNELS[channel], behind.at, frames.len());
            let elsewhere = Cursor { ms: at.ms + 1, sequence: 1 };
            let backfill =
                |at| Backfill { channel: name, at, gap: Some(Arc::clone(&gap)), frames: &frames, events, then };
            assert_eq!(outbox.backfill(&backfill(elsewhere)), Push::Dropped);
            assert_ne!(outbox.backfill(&backfill(at)), Push::Dropped);
            self.behind[channel] = then.map(|at| Behind { at, is_told: true });
            let gap = Some((gap, Kind::Plain)).filter(|_| !behind.is_told);
            let past = frames.into_iter().zip(cursors).map(|(frame, cursor)| (frame, Kind::Past { channel, cursor }));
            for (frame, kind) in gap.into_iter().chain(past) {
                self.number += 1;
                self.items.push(Item { id: self.number, frame, kind, is_lost: false });
            }
        }
    }

    /// Pushes an item; says what that must come to.
    pub(crate) fn push(&mut self, item: Item, is_blocked: bool) -> Option<Push> {
        if self.is_withheld(&item) {
            self.lost += item.frame.messages();
            return Some(Push::Dropped);
        }
        let kind = item.kind.clone();
        let push = self.push_told(item, is_blocked);
        if let Kind::Border { channel, .. } = kind {
            self.behind[channel] = None;
        }
        push
    }

    fn push_told(&mut self, item: Item, is_blocked: bool) -> Option<Push> {
        if self.admits(&item.frame, |_| false) || !is_blocked {
            self.items.push(item);
            return None;
        }
        let can_go = self.items.iter().any(|item| self.may_go(item));
        if !can_go || !self.admits(&item.frame, |item| self.may_go(item)) {
            let is_lost = matches!(item.kind, Kind::Event { channel, .. } if is_lossy(channel));
            let push = is_lost.then_some(Push::Dropped);
            self.lost += if is_lost { item.frame.messages() } else { 0 };
            let is_behind = matches!(item.kind, Kind::Event { channel, .. } if is_lost && self.fall_behind(channel, self.items.len()));
            self.items.extend((!is_behind).then_some(Item { is_lost, ..item }));
            return push;
        }
        let mut evicted = Evicted::default();
        for at in 0..self.items.len() {
            let key = Self::key(&self.items[at]);
            let newer = |newer: &Item| !newer.is_lost && Self::key(newer) == key;
            let is_superseded = key.is_some() && self.items[at + 1..].iter().chain([&item]).any(newer);
            if is_superseded && self.may_go(&self.items[at]) {
                evicted.conflated += self.lose(at);
            }
        }
        while !self.admits(&item.frame, |_| false) && !self.is_withheld(&item) {
            let oldest = |latest: bool| {
                let is_it =
                    |item: &Item| matches!(item.kind, Kind::Event { channel, .. } if is_latest(channel) == latest);
                self.items.iter().position(|item| self.may_go(item) && is_it(item))
            };
            let at = oldest(true).or_else(|| oldest(false)).unwrap();
            evicted.oldest += self.lose(at);
        }
        if self.is_withheld(&item) {
            evicted.oldest += item.frame.messages();
        } else {
            self.items.push(item);
        }
        self.lost += evicted.oldest + evicted.conflated;
        Some(Push::Evicted(evicted))
    }

    /// Makes the frame of an operation.
    pub(crate) fn item(&mut self, op: &Op) -> Item {
        self.number += 1;
        let (frame, kind) = match *op {
            Op::Publish { channel, key, filler, count, is_plain } => {
                let name = CHANNELS[channel];
                let before = self.cursor(channel);
                let key_json = key.map(|key| format!(r#""k":{key},"#)).unwrap_or_default();
                let payload = format!(r#"{{{key_json}"n":{},"f":"{}"}}"#, self.number, "x".repeat(filler));
                let messages: Vec<_> = (0..count)
                    .map(|_| {
                        self.top[channel] += u64::from(!is_plain);
                        let cursor = self.cursor(channel).filter(|_| !is_plain);
                        Message { payload: Payload::Json(&payload), cursor }
                    })
                    .collect();
                let (first, last) = (messages[0].cursor, messages[count - 1].cursor);
                let slow = ChannelRules::parse(RULES).unwrap().slow(name);
                let origin = Origin { channel: &name.into(), slow: &slow, before };
                let frame = Publication::of(origin, &messages).frame(Format::Json).clone();
                let key = if name == "one" { Some(0) } else { key };
                (frame, Kind::Event { channel, key, first, last })
            }
            Op::Reply { filler, is_replay: true } => (Frame::replay(&"r".repeat(filler)), Kind::Replay),
            Op::Reply { filler, .. } => (Frame::text(&"t".repeat(filler)), Kind::Plain),
            Op::Subscribe(channel) => {
                let at = self.cursor(channel);
                let frame = event::subscribed(None, CHANNELS[channel], at.map(Start::at).as_ref());
                (frame, Kind::Border { channel, at })
            }
            Op::Flush(..) | Op::CatchUp(_) => unreachable!(),
        };
        Item { id: self.number, frame, kind, is_lost: false }
    }

    fn cursor(&self, channel: usize) -> Option<Cursor> {
        CHANNELS[channel].ends_with("_h").then_some(Cursor { ms: self.top[channel] + 1, sequence: 0 })
    }

    /// The socket takes bytes of what left; `taken` are the items of that, `told` what the client was told before.
    pub(crate) fn send(
        &mut self,
        leaving: Vec<Leaving>,
        taken: Vec<Item>,
        told: Told,
        mut skip: usize,
        allowance: &mut usize,
    ) {
        self.told = told;
        let mut gone = Vec::new();
        for leaving in leaving {
            let len = (leaving.frame.len() - skip).min(*allowance);
            if len == 0 && skip == 0 {
                break;
            }
            self.is_stalled &= len == 0;
            *allowance -= len;
            self.wire.extend_from_slice(&leaving.frame.bytes()[skip..][..len]);
            self.told.pass(&leaving);
            gone.extend(leaving.ids.iter().copied());
            if skip + len < leaving.frame.len() {
                self.head = Some((leaving, skip + len));
                break;
            }
            skip = 0;
        }
        let left = taken.into_iter().filter(|item| !gone.contains(&item.id));
        self.items = left.chain(std::mem::take(&mut self.items)).collect();
    }
}
