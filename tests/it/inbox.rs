//! The queue between the Redis driver and the multiplexer, when it is full.

use hubcast::inbox::{Arrival, Inbox};
use redis::{PushInfo, PushKind, Value};

/// The queue behind the link is bounded: what does not fit is counted, and told exactly where it is missing.
#[test]
fn a_full_inbox_remembers_where_the_gap_is() {
    let inbox = Inbox::new(&[]);
    let push = |kind, channel: &str, payload: &str| {
        let data = vec![Value::BulkString(channel.into()), Value::BulkString(payload.into())];
        inbox.push(PushInfo { kind, data });
    };
    let mut fitted = 0;
    while inbox.take_dropped_count() == 0 {
        push(PushKind::Message, "a", "x");
        fitted += 1;
    }
    push(PushKind::Message, "b", "x");
    assert_eq!(inbox.take_dropped_count(), 1);
    assert!(inbox.take_dropped().is_empty(), "not before everything older is delivered");
    let after_gap = || match inbox.pop() {
        Some(Arrival::Message { after_gap, .. }) => Some(after_gap),
        other => panic!("{other:?}"),
    };
    assert_eq!(after_gap(), Some(false));
    push(PushKind::Message, "a", "y");
    for _ in 0..fitted - 2 {
        assert_eq!(after_gap(), Some(false));
    }
    assert_eq!(after_gap(), Some(true), "the first message behind the gap carries it");
    let silent: Vec<_> = inbox.take_dropped().into_iter().collect();
    assert_eq!(silent, [b"b".to_vec()], "and a channel that stays silent is told at the end");
    assert_eq!(inbox.lost(), None);
}

/// However many messages there are, the link lives: its probes and confirmations have room of their own.
#[test]
fn a_full_inbox_takes_what_the_link_lives_by() {
    let inbox = Inbox::new(&["control".to_owned()]);
    let push = |kind, channel: &str, payload: Vec<u8>| {
        let data = vec![Value::BulkString(channel.into()), Value::BulkString(payload)];
        inbox.push(PushInfo { kind, data });
    };
    let is_full = || inbox.take_dropped_count() > 0;
    for payload in [Vec::new(), vec![b'x'; 1 << 20]] {
        while !is_full() {
            push(PushKind::Message, "a", payload.clone());
        }
        let full = inbox.len();
        push(PushKind::Message, "control", b"probe".to_vec());
        push(PushKind::Subscribe, "b", Vec::new());
        push(PushKind::Message, "c", b"x".to_vec());
        assert_eq!((inbox.len(), inbox.take_dropped_count(), inbox.lost()), (full + 2, 1, None));
        for _ in 0..full {
            assert!(matches!(inbox.pop(), Some(Arrival::Message { channel, .. }) if channel == b"a"));
        }
        assert!(matches!(inbox.pop(), Some(Arrival::Message { channel, .. }) if channel == b"control"));
        assert!(matches!(inbox.pop(), Some(Arrival::Subscribed(channel)) if channel == b"b"));
        assert_eq!(inbox.take_dropped().len(), 2, "a and c");
        push(PushKind::Message, "a", b"x".to_vec());
        assert!(inbox.pop().is_some() && !is_full(), "there is room again");
    }
    // Not without a bound: a confirmation cannot be dropped without losing track, so the link is given up.
    let mut confirmations = 0;
    while inbox.lost().is_none() {
        push(PushKind::Subscribe, "b", Vec::new());
        confirmations += 1;
    }
    assert!(confirmations > 1 << 15);
}
