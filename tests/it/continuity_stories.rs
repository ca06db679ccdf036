//! Single stories of `continuity` that random worlds brought to light, told step by step.

use bytes::Bytes;
use hubcast::continuity::{Follow, Output};
use hubcast::cursor::Cursor;
use hubcast::history_store::{Content, Entry, Loss, Marked, Window};

fn at(ms: u64) -> Cursor {
    Cursor { ms, sequence: 7 }
}

fn event(ms: u64, previous: u64) -> Entry {
    Entry { id: at(ms), previous: at(previous), content: Content::Event(Bytes::from_static(b"1")) }
}

fn marker(ms: u64, previous: u64, shared: u64) -> Entry {
    Entry { content: Content::Marker(Some(at(shared))), ..event(ms, previous) }
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
