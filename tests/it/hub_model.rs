//! Random subscribes, unsubscribes, publishes, lost connections and Redis turns against a naive model.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use hubcast::channel::Wish;
use hubcast::event;
use hubcast::fanout::{Fanout, Subscriber};
use hubcast::frame::Frame;
use hubcast::hub::{Hub, Subscriptions};
use hubcast::members::Members;
use hubcast::outbox::{Limits, Push};
use hubcast::publication::{Format, Payload};
use hubcast::rules::ChannelRules;
use hubcast::topology::Topology;
use hubcast::upstream::Step;
use parking_lot::Mutex;
use proptest::prelude::*;

const CHANNELS: usize = 4;
const CLIENTS: usize = 4;

/// A subscriber that keeps what it is sent.
#[derive(Clone, Default)]
struct Recorder(Arc<Mutex<Vec<String>>>);

impl Subscriber for Recorder {
    fn format(&self) -> Format {
        Format::Json
    }

    fn push(&self, frame: &Arc<Frame>) -> Push {
        let mut bytes = frame.bytes();
        for _ in 0..frame.messages() {
            let (start, end) = match bytes[1] {
                126 => (4, 4 + usize::from(u16::from_be_bytes([bytes[2], bytes[3]]))),
                len => (2, 2 + usize::from(len)),
            };
            self.0.lock().push(String::from_utf8(bytes[start..end].to_vec()).unwrap());
            bytes = &bytes[end..];
        }
        assert!(bytes.is_empty());
        Push::Queued
    }

    fn replay(&self, frames: &[Arc<Frame>]) -> Push {
        frames.iter().fold(Push::Queued, |_, frame| self.push(frame))
    }

    fn has_room(&self) -> bool {
        true
    }

    fn has_all(&self) -> bool {
        true
    }
}

/// Most publications that wait in a channel.
const BUNDLE: usize = 4;

const LIMITS: Limits = Limits { messages: 8 * BUNDLE, bytes: 1 << 20 };

#[derive(Clone, Copy, Debug)]
enum Op {
    Subscribe(usize, usize),
    Unsubscribe(usize, usize),
    /// It waits in its channel.
    Publish(usize),
    /// What waits there is pushed.
    Deliver(usize),
    /// The connection is lost and a new one takes its place.
    Lose(usize),
    /// The multiplexer sends what is due; Redis confirms later.
    Reconcile,
    /// Redis confirms the oldest outstanding operation.
    Confirm,
    /// The link to Redis is lost.
    LoseLink,
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let client = 0..CLIENTS;
    let channel = 0..CHANNELS;
    let op = prop_oneof![
        5 => (client.clone(), channel.clone()).prop_map(|(who, channel)| Op::Subscribe(who, channel)),
        4 => (client.clone(), channel.clone()).prop_map(|(who, channel)| Op::Unsubscribe(who, channel)),
        5 => channel.clone().prop_map(Op::Publish),
        2 => channel.prop_map(Op::Deliver),
        1 => client.prop_map(Op::Lose),
        4 => Just(Op::Reconcile),
        4 => Just(Op::Confirm),
        1 => Just(Op::LoseLink),
    ];
    proptest::collection::vec(op, 1..80)
}

/// What should be the case, told in sets.
#[derive(Default)]
struct Model {
    with_redis: bool,
    /// Who was told `subscribed` and not `unsubscribed`.
    joined: BTreeMap<usize, BTreeSet<usize>>,
    /// Who waits for the channel to become live.
    pending: BTreeMap<usize, BTreeSet<usize>>,
    /// What Redis has, and what it has been asked for and not confirmed (true: subscribe).
    at_redis: BTreeSet<usize>,
    outstanding: Vec<(usize, bool)>,
    owes_gap: BTreeSet<usize>,
    /// What waits in each channel.
    gathered: BTreeMap<usize, Vec<usize>>,
}

fn name(channel: usize) -> String {
    format!("c{channel}")
}

fn check(with_redis: bool, ops: &[Op]) {
    let rules = ChannelRules::default();
    let hub = if with_redis {
        Hub::with_upstream(rules, LIMITS, Arc::new(Topology::servers_of(1, "")))
    } else {
        Hub::local(rules, LIMITS)
    };
    let new_client = || {
        let recorder = Recorder::default();
        (recorder.clone(), Subscriptions::new(Arc::clone(&hub), recorder))
    };
    let mut clients: Vec<_> = (0..CLIENTS).map(|_| new_client()).collect();
    let mut expected: Vec<Vec<String>> = vec![Vec::new(); CLIENTS];
    let mut model = Model { with_redis, ..Model::default() };
    let mut fanout = Fanout::default();
    for (number, op) in ops.iter().enumerate() {
        match *op {
            Op::Subscribe(who, channel) => {
                let id = number.to_string();
                let wish = Wish { id: Some(&id), after: None };
                let was_taken = clients[who].1.subscribe(&name(channel), Some(wish), &mut fanout);
                model.deliver(channel, &mut expected);
                let answer = format!(r#"{{"type":"subscribed","id":{number},"channel":"c{channel}"}}"#);
                if model.is_live(channel) && !model.waits(channel, who) || model.is_joined(channel, who) {
                    model.joined.entry(channel).or_default().insert(who);
                    expected[who].push(answer);
                } else if was_taken {
                    model.pending.entry(channel).or_default().insert(who);
                }
            }
            Op::Unsubscribe(who, channel) => {
                let reply = event::unsubscribed(None, &name(channel));
                if clients[who].1.unsubscribe(&name(channel), &reply, &mut fanout) {
                    model.deliver(channel, &mut expected);
                }
                model.leave(channel, who);
                expected[who].push(format!(r#"{{"type":"unsubscribed","channel":"c{channel}"}}"#));
            }
            Op::Publish(channel) => {
                if model.gathered.get(&channel).is_some_and(|gathered| gathered.len() == BUNDLE) {
                    model.deliver(channel, &mut expected);
                }
                if hub.channel(&name(channel)).is_some() {
                    model.gathered.entry(channel).or_default().push(number);
                }
                hub.gather(&name(channel), Payload::Json(&number.to_string()).into(), &mut fanout);
            }
            Op::Deliver(channel) => {
                hub.channel(&name(channel)).inspect(|channel| channel.deliver(&mut fanout));
                model.deliver(channel, &mut expected);
            }
            Op::Lose(who) => {
                clients[who] = new_client();
                expected[who].clear();
                (0..CHANNELS).for_each(|channel| model.leave(channel, who));
            }
            Op::Reconcile if with_redis => {
                // Far in the future: nothing lingers.
                for channel in hub.take_changed(0) {
                    let at: usize = channel.name()[1..].parse().unwrap();
                    match channel.reconcile(0, u64::MAX) {
                        Step::Subscribe => model.outstanding.push((at, true)),
                        Step::Unsubscribe => model.outstanding.push((at, false)),
                        Step::Forget => hub.forget(&channel),
                        Step::Rest => {}
                        Step::LookAgainAt(_) => panic!("nothing lingers"),
                    }
                }
            }
            Op::Confirm if with_redis && !model.outstanding.is_empty() => {
                let (at, is_subscribe) = model.outstanding.remove(0);
                assert!(!model.outstanding.iter().any(|(other, _)| *other == at), "one operation per channel");
                let channel = hub.channel(&name(at)).expect("a channel with an operation outstanding is kept");
                if is_subscribe {
                    hub.confirm_subscribe(&channel, &mut fanout);
                    model.deliver(at, &mut expected);
                    model.at_redis.insert(at);
                    model.confirm(at, &clients, &mut expected);
                } else {
                    hub.confirm_unsubscribe(&channel);
                    model.at_redis.remove(&at);
                }
            }
            Op::LoseLink if with_redis => {
                hub.lose_upstream(0);
                model.outstanding.clear();
                model.at_redis.clear();
                let joined = model.joined.iter().filter(|(_, who)| !who.is_empty());
                model.owes_gap.extend(joined.map(|(channel, _)| *channel));
            }
            Op::Reconcile | Op::Confirm | Op::LoseLink => {}
        }
        for (who, (recorder, _)) in clients.iter().enumerate() {
            assert_eq!(*recorder.0.lock(), expected[who], "client {who} after {op:?} (number {number})");
        }
    }
    clients.clear();
    settle(&hub, &model.outstanding);
    assert_eq!(hub.len(), 0, "everybody has left, and channels are left behind");
}

/// Redis confirms all that is outstanding, and what follows from that.
fn settle(hub: &Arc<Hub<Recorder>>, outstanding: &[(usize, bool)]) {
    let mut fanout = Fanout::default();
    for (at, is_subscribe) in outstanding {
        let channel = hub.channel(&name(*at)).expect("a channel with an operation outstanding is kept");
        match is_subscribe {
            true => hub.confirm_subscribe(&channel, &mut fanout),
            false => hub.confirm_unsubscribe(&channel),
        }
    }
    loop {
        let changed = hub.take_changed(0);
        if changed.is_empty() {
            return;
        }
        for channel in changed {
            match channel.reconcile(0, u64::MAX) {
                Step::Unsubscribe => hub.confirm_unsubscribe(&channel),
                Step::Forget => hub.forget(&channel),
                step => assert_eq!(step, Step::Rest, "nobody is there"),
            }
        }
    }
}

impl Model {
    fn is_joined(&self, channel: usize, who: usize) -> bool {
        self.joined.get(&channel).is_some_and(|joined| joined.contains(&who))
    }

    fn waits(&self, channel: usize, who: usize) -> bool {
        self.pending.get(&channel).is_some_and(|pending| pending.contains(&who))
    }

    /// Live: Redis has it and was not asked to give it up.
    fn is_live(&self, channel: usize) -> bool {
        !self.with_redis || self.at_redis.contains(&channel) && !self.outstanding.contains(&(channel, false))
    }

    /// What waits is pushed to all members.
    fn deliver(&mut self, channel: usize, expected: &mut [Vec<String>]) {
        for number in self.gathered.remove(&channel).unwrap_or_default() {
            for who in self.joined.get(&channel).into_iter().flatten() {
                expected[*who].push(format!(r#"{{"type":"event","channel":"c{channel}","data":{number}}}"#));
            }
        }
    }

    fn leave(&mut self, channel: usize, who: usize) {
        self.pending.entry(channel).or_default().remove(&who);
        self.joined.entry(channel).or_default().remove(&who);
    }

    /// The gap that members are owed comes first, then those who waited are let in. Their answers carry
    /// ids of their own, so they are taken over as they came and checked for their kind and number only.
    fn confirm(
        &mut self,
        channel: usize,
        clients: &[(Recorder, Subscriptions<Recorder>)],
        expected: &mut [Vec<String>],
    ) {
        if self.owes_gap.remove(&channel) {
            for who in self.joined.get(&channel).into_iter().flatten() {
                expected[*who].push(format!(r#"{{"type":"gap","channel":"c{channel}","reason":"upstream"}}"#));
            }
        }
        for who in self.pending.remove(&channel).into_iter().flatten() {
            let seen = clients[who].0.0.lock();
            let answers = &seen[expected[who].len()..];
            assert!(!answers.is_empty(), "client {who} waits and is not let in");
            for answer in answers {
                assert!(answer.starts_with(r#"{"type":"subscribed""#), "{answer}");
                assert!(answer.ends_with(&format!(r#""channel":"c{channel}"}}"#)), "{answer}");
            }
            expected[who].extend_from_slice(answers);
            self.joined.entry(channel).or_default().insert(who);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 3000,
        rng_seed: proptest::test_runner::RngSeed::Fixed(42),
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn the_local_hub_behaves_like_sets(ops in ops()) {
        check(false, &ops);
    }

    #[test]
    fn the_hub_with_redis_behaves_like_sets_that_wait_for_confirmations(ops in ops()) {
        check(true, &ops);
    }

    /// Positions stay valid over any joins and leaves, across segments.
    #[test]
    fn members_are_a_set_with_stable_positions(leaves in proptest::collection::vec(0_usize..5000, 0..5000)) {
        let mut members = Members::default();
        let mut positions: BTreeMap<usize, _> = (0..2500).map(|member| (member, members.insert(member))).collect();
        for (round, leave) in leaves.iter().enumerate() {
            match positions.remove(leave) {
                Some(position) => prop_assert_eq!(members.remove(position), Some(*leave)),
                None => drop(positions.insert(5000 + round, members.insert(5000 + round))),
            }
        }
        prop_assert_eq!(members.len(), positions.len());
        let mut present: Vec<_> = members.iter().copied().collect();
        present.sort_unstable();
        prop_assert_eq!(present, positions.into_keys().collect::<Vec<_>>());
    }
}
