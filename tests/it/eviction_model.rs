//! Random publications, replies and refusals of the socket: a slow consumer's outbox against a naive model.
//!
//! The model never forgets what was lost before it was told: it keeps it in its place, marked, and works out anew
//! each time which gaps that makes. What the socket gets must be the same, byte for byte. Where the oldest go and there is
//! a history, it falls behind instead, and is brought up piece by piece.

use std::cell::{Cell, RefCell};
use std::io::{self, IoSlice};
use std::sync::Arc;

use hubcast::clock;
use hubcast::outbox::{Flushed, Outbox, Phase, Push};
use hubcast::writer::{Transport, Writer};
use proptest::prelude::*;

use crate::eviction_world::{CHANNELS, Kind, LIMITS, Model, Op};

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
    let catch_up = proptest::option::of(1..4_usize).prop_map(Op::CatchUp);
    proptest::collection::vec(prop_oneof![10 => pushes(), 2 => flush, 1 => catch_up], 1..120)
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
        if let Op::CatchUp(most) = op {
            model.catch_up(&outbox, *most);
            assert_eq!(outbox.depth(), model.depth(), "after {op:?}");
            continue;
        }
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
