//! Single stories of `continuity` that random worlds brought to light, told step by step.

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::Bytes;
use hubcast::continuity::{Follow, Output};
use hubcast::cursor::Cursor;
use hubcast::history_store::{Content, Entry, Loss, Marked, Retention, Window};
use hubcast::history_view::{Gap, GapReason, Told};

use crate::continuity_judge::judge;
use crate::continuity_model::{Client, Counts, Kind, Knobs, Log, Via};
use crate::continuity_world::{Connection, Mark, World};

fn at(ms: u64) -> Cursor {
    Cursor { ms, sequence: 7 }
}

fn event(ms: u64, previous: u64) -> Entry {
    Entry { id: at(ms), previous: at(previous), content: Content::Event(Bytes::from_static(b"1")) }
}

fn marker(ms: u64, previous: u64, shared: u64) -> Entry {
    Entry { content: Content::Marker(Some(at(shared))), ..event(ms, previous) }
}

/// A world of one instance and one channel in which nothing happens by itself.
fn quiet(kind: Kind) -> World {
    let ttl = Duration::from_secs(6);
    let retention = Retention { size: 3, ttl, position_ttl: 3 * ttl };
    World::new(Knobs {
        seed: 1,
        kind,
        retention,
        is_cached: false,
        instances: 1,
        channels: 1,
        clients: 0,
        retained: 1,
        slow: 0,
        lost: 0,
        doubled: 0,
        swapped: 0,
    })
}

/// Publishes at a node, at once, and with success.
fn publish(world: &mut World, node: usize) -> Cursor {
    let (number, retention, at) = (world.publishes.len(), world.retention(), world.moment(node));
    let entry = world.nodes[node].chains[0].publish(number.to_string().into_bytes().into(), &retention, at);
    world.spread(node, 0, &entry);
    world.publishes.push((0, true));
    entry.id
}

/// What the last read shows, and what is asked for then.
fn answer(follow: &mut Follow<usize>, entries: &[Entry], top: u64) -> Vec<Output<usize>> {
    let mut out = Vec::new();
    follow.read_answered(Some(&Window { entries: entries.to_vec(), top: at(top) }), &mut out);
    out
}

/// Redis is emptied, its clock being behind, and then has what was there before. An event follows, and is lost: that it
/// came after what had been lost and is back is known, and marked.
#[test]
fn what_came_back_is_not_lost_any_more() {
    let mut follow = Follow::new(3, false);
    follow.confirmed(&mut Vec::new());
    answer(&mut follow, &[], 10);
    follow.check(&mut Vec::new());
    assert_eq!(answer(&mut follow, &[], 5), [Output::Mark(Loss { shared: None, own: at(10), passed: vec![] })]);
    follow.marked(Some(Marked::Written(at(6))), &mut Vec::new());
    answer(&mut follow, &[], 10);
    assert_eq!(follow.position(), Some(at(10)));
    follow.message(event(11, 10), &mut Vec::new());
    follow.check(&mut Vec::new());
    let loss = Loss { shared: Some(at(10)), own: at(11), passed: vec![at(6)] };
    assert_eq!(answer(&mut follow, &[event(12, 10)], 12), [Output::Mark(loss)]);
}

/// Redis is emptied, and then has an older state again (a backup, say): what had followed there is lost for whoever comes
/// back to it, and marked.
#[test]
fn what_followed_on_a_branch_that_comes_back_is_marked() {
    let mut follow = Follow::new(3, false);
    follow.confirmed(&mut Vec::new());
    answer(&mut follow, &[], 10);
    follow.message(event(11, 10), &mut Vec::new());
    follow.check(&mut Vec::new());
    assert_eq!(answer(&mut follow, &[], 5), [Output::Mark(Loss { shared: None, own: at(11), passed: vec![] })]);
    follow.marked(Some(Marked::Written(at(6))), &mut Vec::new());
    let loss = Loss { shared: Some(at(10)), own: at(11), passed: vec![at(6)] };
    assert_eq!(answer(&mut follow, &[], 10), [Output::Mark(loss)]);
    follow.marked(Some(Marked::Written(at(12))), &mut Vec::new());
    answer(&mut follow, &[marker(12, 10, 10)], 12);
    assert_eq!((follow.position(), follow.is_at_rest()), (Some(at(12)), true), "it is marked once");
}

/// Messages that did not fit wait for a read; what it shows goes between them. A gap stands after the shared id, not after
/// what had been waiting.
#[test]
fn a_gap_stands_before_what_had_waited() {
    let mut follow = Follow::new(6, false);
    follow.confirmed(&mut Vec::new());
    answer(&mut follow, &[], 10);
    follow.message(event(14, 11), &mut Vec::new());
    follow.message(event(11, 10), &mut Vec::new());
    let told = answer(&mut follow, &[event(11, 10), event(14, 11), marker(15, 14, 11)], 15);
    let event = |ms| Output::Tell(Told::Event { cursor: at(ms), payload: Bytes::from_static(b"1") });
    let gap = Gap { after: Some(at(11)), next: Some(at(14)), reason: GapReason::Upstream };
    assert_eq!(told[..3], [event(11), Output::Tell(Told::Gap(gap)), event(14)]);
}

/// A read fails with its link. The next one does not wait for the pause: whoever resumes elsewhere has not been told yet
/// what was lost. Nor is it asked for twice.
#[test]
fn a_new_link_ends_the_pause() {
    let mut follow = Follow::<usize>::new(3, false);
    follow.confirmed(&mut Vec::new());
    answer(&mut follow, &[], 10);
    let asked = |act: fn(&mut Follow<usize>, &mut Vec<Output<usize>>), follow: &mut Follow<usize>| {
        let mut out = Vec::new();
        act(follow, &mut out);
        out
    };
    follow.check(&mut Vec::new());
    assert_eq!(asked(|follow, out| follow.read_answered(None, out), &mut follow), [Output::Pause]);
    assert_eq!(asked(Follow::check, &mut follow), [], "it pauses");
    assert_eq!(asked(Follow::doubt, &mut follow), [Output::Read { unless: Some(at(10)) }]);
    assert_eq!(asked(Follow::resume, &mut follow), [], "it is under way");
    let loss = Loss { shared: None, own: at(10), passed: vec![] };
    assert_eq!(answer(&mut follow, &[], 5), [Output::Mark(loss)]);
}

/// Of the judge: an event that comes while the answer to a read is under way may be newer than that. Only the next read
/// shows whether it is lost.
#[test]
fn an_answer_says_nothing_of_what_came_after_the_question() {
    let mut world = quiet(Kind::Rewind);
    let (inbox, afters) = (Vec::new(), BTreeMap::new());
    world.connections.push(Connection { instance: 0, is_open: true, inbox, afters });
    world.join(0, 0, None);
    world.run_until(10);
    let before = world.nodes[0].chains.clone();
    world.with(0, 0, |slot, out| slot.follow.check(out));
    world.knobs.slow = 1000;
    world.run_until(10);
    world.knobs.slow = 0;
    world.publish(0);
    world.run_until(10);
    let slot = &world.instances[0].slots[&0];
    assert!(!slot.follow.is_at_rest(), "the answer is under way");
    assert!(slot.saw.contains_key(&slot.follow.position().unwrap()), "the event has come");
    world.run_until(1500);
    assert!(world.due.is_empty(), "{:?}", world.due);
    world.change_primary(before, 0, false);
    world.run_until(2000);
    assert_eq!((world.due.len(), world.marks.len()), (1, 1));
}

/// Of the judge: the old primary lives on while the new one has the marker. Who reads at the old one is not shown it, and
/// is told once its instance reads at the new one; who reads at the new one is told before anything else.
#[test]
fn what_an_old_primary_shows_comes_before_the_gap() {
    let mut world = quiet(Kind::Zombie);
    let shared = publish(&mut world, 0);
    let copy = world.nodes[0].chains.clone();
    world.run_until(50);
    let own = publish(&mut world, 0);
    world.change_primary(copy.clone(), 0, false);
    world.change_primary(copy, 0, true);
    let (zombie, primary) = (1, 2);
    let (loss, retention, at) =
        (Loss { shared: Some(shared), own, passed: vec![] }, world.retention(), world.moment(2));
    let (_, marker) = world.nodes[primary].chains[0].mark(&loss, &retention, at);
    let marker = marker.unwrap();
    world.spread(primary, 0, &marker);
    world.marks.push(Mark { channel: 0, id: marker.id, loss, same: 0 });
    world.due.insert((0, own));
    world.run_until(100);
    let [old, new] = [zombie, primary].map(|node| publish(&mut world, node));
    let mut judge_read = |top: Cursor, told: Cursor| {
        let (via, is_visible) = (Via::Read(2, 100, top), true);
        let subscribed = |recovered, after, via| Log::Subscribed { cursor: shared, recovered, after, is_visible, via };
        let gap = |after| Log::Gap(Gap { after: Some(after), next: None, reason: GapReason::Upstream });
        let mut client = Client::new([0].into(), false);
        let log = [subscribed(false, None, Via::Read(1, 0, shared)), subscribed(true, Some(shared), via)];
        let mut log = Vec::from(log);
        log.extend([Log::Event(told, via), gap(told)]);
        log.extend((told != new).then_some(Log::Event(new, Via::Live)));
        client.logs.insert(0, log);
        judge(&mut world, &[client], &mut Counts::default())
    };
    assert_eq!(judge_read(old, old), Ok(()));
    let judged = judge_read(new, new).unwrap_err();
    assert!(judged.starts_with("3: ") && judged.contains("told only after"), "{judged}");
}
