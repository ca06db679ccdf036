//! Random publications, replies and refusals of the socket: a slow consumer's outbox against a naive model.
//!
//! The model never forgets what was lost before it was told: it keeps it in its place, marked, and works out anew
//! each time which gaps that makes. What the socket gets must be the same, byte for byte.

use std::cell::{Cell, RefCell};
use std::io::{self, IoSlice};
use std::sync::Arc;

use hubcast::clock;
use hubcast::cursor::Cursor;
use hubcast::event;
use hubcast::eviction::Evicted;
use hubcast::frame::Frame;
use hubcast::history_view::{Gap, GapReason, Start};
use hubcast::outbox::{Flushed, Limits, Outbox, Phase, Push};
use hubcast::publication::{Format, Message, Origin, Payload, Publication};
use hubcast::rules::ChannelRules;
use hubcast::writer::{Transport, Writer};
use proptest::prelude::*;

const RULES: &str = r#"[{"match":"drop*","slow":"drop_oldest"},{"match":"latest*","slow":"latest","latest_by":"/k"},
    {"match":"one","slow":"latest"}]"#;

/// Those with an `h` have history.
const CHANNELS: [&str; 6] = ["close", "drop", "drop_h", "latest", "latest_h", "one"];

#[derive(Clone, Debug)]
enum Op {
    /// To a channel, with a key or none, so much filler, so many at once, with a cursor where there is history.
    Publish { channel: usize, key: Option<u8>, filler: usize, count: usize, is_plain: bool },
    /// An answer of so many bytes, perhaps of the past.
    Reply { filler: usize, is_replay: bool },
    /// The channel is subscribed to anew.
    Subscribe(usize),
    /// The socket takes so many bytes. Meanwhile these are published.
    Flush(usize, Vec<Op>),
}

fn pushes() -> impl Strategy<Value = Op> {
    let publish = (0..CHANNELS.len(), proptest::option::weighted(0.9, 0..4_u8), 0..60_usize, 1..4_usize, any::<u8>());
    prop_oneof![
        12 => publish.prop_map(|(channel, key, filler, count, plain)| Op::Publish {
            channel,
            key,
            filler,
            count: if CHANNELS[channel].starts_with("drop") { count } else { 1 },
            is_plain: plain < 25,
        }),
        1 => (0..90_usize, any::<bool>()).prop_map(|(filler, is_replay)| Op::Reply { filler, is_replay }),
        1 => (0..CHANNELS.len()).prop_map(Op::Subscribe),
    ]
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let bytes = prop_oneof![Just(0), 0..400_usize, 0..2000_usize];
    let flush =
        (bytes, proptest::collection::vec(pushes(), 0..6)).prop_map(|(bytes, meanwhile)| Op::Flush(bytes, meanwhile));
    proptest::collection::vec(prop_oneof![5 => pushes(), 1 => flush], 1..120)
}

#[derive(Clone, Debug)]
enum Kind {
    Plain,
    Replay,
    Border { channel: usize, at: Option<Cursor> },
    Event { channel: usize, key: Option<u8>, first: Option<Cursor>, last: Option<Cursor> },
}

/// Something that was pushed, perhaps lost since.
#[derive(Clone, Debug)]
struct Item {
    id: usize,
    frame: Arc<Frame>,
    kind: Kind,
    is_lost: bool,
}

/// A frame as it would leave: an item, or a gap that stands for some.
#[derive(Clone, Debug)]
struct Leaving {
    frame: Arc<Frame>,
    kind: Kind,
    /// The item, or those lost.
    ids: Vec<usize>,
    gap: Option<(usize, Gap)>,
}

#[derive(Clone, Default)]
struct Told {
    /// Where the client stands by what left.
    at: [Option<Cursor>; CHANNELS.len()],
    /// The event that a gap named, and that has to follow.
    promised: [Option<Cursor>; CHANNELS.len()],
}

#[derive(Default)]
struct Model {
    items: Vec<Item>,
    /// What is partly sent, and how much.
    head: Option<(Leaving, usize)>,
    told: Told,
    wire: Vec<u8>,
    top: [u64; CHANNELS.len()],
    number: usize,
    lost: usize,
}

const LIMITS: Limits = Limits { messages: 8, bytes: 900 };

fn is_lossy(channel: usize) -> bool {
    channel > 0
}

fn is_latest(channel: usize) -> bool {
    channel > 2
}

impl Told {
    fn pass(&mut self, leaving: &Leaving) {
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
            Kind::Plain | Kind::Replay => {}
        }
    }
}

impl Model {
    /// What would leave, in order.
    fn leaving(&self) -> Vec<Leaving> {
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
                Kind::Border { channel, .. } => standing[channel] = None,
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
    fn depth(&self) -> (usize, usize) {
        let head = self.head.iter().map(|(head, sent)| (head.frame.messages(), head.frame.len() - sent));
        let rest = self.leaving().into_iter().map(|leaving| (leaving.frame.messages(), leaving.frame.len()));
        head.chain(rest).fold((0, 0), |sum, one| (sum.0 + one.0, sum.1 + one.1))
    }

    /// Whether a frame fits to what counts, without the items that `is_gone` names.
    fn admits(&self, frame: &Frame, is_gone: impl Fn(&Item) -> bool) -> bool {
        let head = self.head.iter().filter(|(head, _)| head.gap.is_none() && !matches!(head.kind, Kind::Replay));
        let head = head.map(|(head, sent)| (head.frame.messages(), head.frame.len() - sent));
        let counts = |item: &&Item| !item.is_lost && !matches!(item.kind, Kind::Replay) && !is_gone(item);
        let items = self.items.iter().filter(counts).map(|item| (item.frame.messages(), item.frame.len()));
        let (messages, bytes) = head.chain(items).fold((0, 0), |sum, one| (sum.0 + one.0, sum.1 + one.1));
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
        self.items[at].is_lost = true;
        self.items[at].frame.messages()
    }

    /// Pushes an item; says what that must come to.
    fn push(&mut self, item: Item, is_blocked: bool) -> Option<Push> {
        if self.admits(&item.frame, |_| false) || !is_blocked {
            self.items.push(item);
            return None;
        }
        let can_go = self.items.iter().any(|item| self.may_go(item));
        if !can_go || !self.admits(&item.frame, |item| self.may_go(item)) {
            let is_lost = matches!(item.kind, Kind::Event { channel, .. } if is_lossy(channel));
            let push = is_lost.then_some(Push::Dropped);
            self.lost += if is_lost { item.frame.messages() } else { 0 };
            self.items.push(Item { is_lost, ..item });
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
        while !self.admits(&item.frame, |_| false) {
            let oldest = |latest: bool| {
                let is_it =
                    |item: &Item| matches!(item.kind, Kind::Event { channel, .. } if is_latest(channel) == latest);
                self.items.iter().position(|item| self.may_go(item) && is_it(item))
            };
            let at = oldest(true).or_else(|| oldest(false)).unwrap();
            evicted.oldest += self.lose(at);
        }
        self.items.push(item);
        self.lost += evicted.oldest + evicted.conflated;
        Some(Push::Evicted(evicted))
    }

    /// Makes the frame of an operation.
    fn item(&mut self, op: &Op) -> Item {
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
            Op::Flush(..) => unreachable!(),
        };
        Item { id: self.number, frame, kind, is_lost: false }
    }

    fn cursor(&self, channel: usize) -> Option<Cursor> {
        CHANNELS[channel].ends_with("_h").then_some(Cursor { ms: self.top[channel] + 1, sequence: 0 })
    }

    /// The socket takes bytes of what left; `taken` are the items of that, `told` what the client was told before.
    fn send(&mut self, leaving: Vec<Leaving>, taken: Vec<Item>, told: Told, mut skip: usize, allowance: &mut usize) {
        self.told = told;
        let mut gone = Vec::new();
        for leaving in leaving {
            let len = (leaving.frame.len() - skip).min(*allowance);
            if len == 0 && skip == 0 {
                break;
            }
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

/// Takes so many bytes, and has something happen during the first write.
struct Socket<'a> {
    allowance: Cell<usize>,
    wire: &'a RefCell<Vec<u8>>,
    meanwhile: RefCell<Option<Box<dyn FnOnce() + 'a>>>,
}

impl Transport for Socket<'_> {
    fn try_write(&self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        self.meanwhile.take().into_iter().for_each(|meanwhile| meanwhile());
        let bytes: Vec<u8> = slices.iter().flat_map(|slice| slice.iter().copied()).collect();
        let len = bytes.len().min(self.allowance.get());
        self.allowance.set(self.allowance.get() - len);
        self.wire.borrow_mut().extend_from_slice(&bytes[..len]);
        if len == 0 { Err(io::ErrorKind::WouldBlock.into()) } else { Ok(len) }
    }
}

/// Pushes to both; false if the outbox was slow, which only a machine that halts makes it.
fn push(outbox: &Outbox, model: &mut Model, op: &Op) -> bool {
    let item = model.item(op);
    let is_blocked = outbox.phase() == Phase::Blocked;
    let push = match item.kind {
        Kind::Replay => {
            let push = outbox.replay(&[Arc::clone(&item.frame)]);
            model.items.push(item);
            return push != Push::Slow;
        }
        _ => outbox.push(&item.frame, &LIMITS),
    };
    let expected = model.push(item, is_blocked);
    match (push, expected) {
        (Push::Slow, _) => return false,
        (push, Some(expected)) => assert_eq!(push, expected, "{op:?}"),
        (push, None) => assert!(matches!(push, Push::Queued | Push::Schedule | Push::Late), "{push:?} after {op:?}"),
    }
    true
}

fn check(ops: &[Op]) -> usize {
    let outbox: Outbox = Outbox::default();
    let wire = RefCell::default();
    let mut model = Model::default();
    let mut writer = Writer::default();
    let end = [Op::Flush(usize::MAX, Vec::new())];
    let start = (0..CHANNELS.len()).map(Op::Subscribe);
    for op in start.collect::<Vec<_>>().iter().chain(ops).chain(&end) {
        let Op::Flush(bytes, meanwhile) = op else {
            if !push(&outbox, &mut model, op) {
                return 0;
            }
            assert_eq!(outbox.depth(), model.depth(), "after {op:?}");
            continue;
        };
        if outbox.phase() == Phase::Idle {
            continue;
        }
        // The writer takes all; meanwhile the queue has only what comes.
        let head = model.head.take();
        let skip = head.as_ref().map_or(0, |(_, sent)| *sent);
        let leaving: Vec<_> = head.into_iter().map(|(head, _)| head).chain(model.leaving()).collect();
        let taken = std::mem::take(&mut model.items);
        let told = model.told.clone();
        leaving.iter().for_each(|leaving| model.told.pass(leaving));
        let is_slow = Cell::new(false);
        let shared = RefCell::new(&mut model);
        let pushes = || {
            meanwhile.iter().for_each(|op| is_slow.set(is_slow.get() | !push(&outbox, &mut shared.borrow_mut(), op)))
        };
        let socket =
            Socket { allowance: Cell::new(*bytes), wire: &wire, meanwhile: RefCell::new(Some(Box::new(pushes))) };
        let flushed = outbox.flush(&socket, &mut writer, &LIMITS, clock::now_us());
        drop(socket);
        if is_slow.get() {
            return 0;
        }
        let mut allowance = *bytes;
        model.send(leaving, taken, told, skip, &mut allowance);
        while model.head.is_none() && allowance > 0 && !model.items.is_empty() {
            let (leaving, taken, told) = (model.leaving(), std::mem::take(&mut model.items), model.told.clone());
            model.send(leaving, taken, told, 0, &mut allowance);
        }
        let at = wire.borrow().iter().zip(&model.wire).take_while(|(ours, theirs)| ours == theirs).count();
        let rest = |bytes: &[u8]| String::from_utf8_lossy(&bytes[at.saturating_sub(200)..]).into_owned();
        assert!(*wire.borrow() == model.wire, "{}\nexpected {}", rest(&wire.borrow()), rest(&model.wire));
        assert_eq!(outbox.depth(), model.depth(), "after {op:?}");
        assert_eq!(flushed == Flushed::Idle, model.depth().0 == 0);
    }
    assert_eq!(outbox.phase(), Phase::Idle);
    model.lost
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 4000,
        rng_seed: proptest::test_runner::RngSeed::Fixed(42),
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn a_slow_consumer_gets_what_is_left_and_is_told_of_the_rest(ops in ops()) {
        check(&ops);
    }
}
