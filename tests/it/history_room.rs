//! What histories in memory take together is bounded, and whoever asks for what went for that is told.

use std::time::Duration;

use hubcast::history_memory::Memory;
use hubcast::history_store::{Moment, Retention};
use hubcast::sharded::Count;
use serde_json::json;

use crate::harness::{Client, eventually, gateway, http, metric, ready};
use crate::history::{publish, subscribe};

const MAX: usize = 1 << 20;

/// Gives what is published, as many entries as are left of each channel.
fn left(memory: &Memory, channels: &[&str], retention: &Retention, at: Moment) -> Vec<usize> {
    channels.iter().map(|channel| memory.read(channel, None, retention, at).entries.len()).collect()
}

#[test]
fn the_oldest_entries_go_and_the_last_of_a_channel_stays_longest() {
    let (memory, forgotten) = (Memory::default(), Count::default());
    memory.bound(MAX, forgotten.clone());
    let retention = Retention::new(10_000, Duration::from_secs(3600));
    let at = |number| Moment { now_ms: 1_000_000 + number, random: 0 };
    let publish = |channel: &str, bytes: usize, number: u64| {
        memory.publish(channel, vec![0; bytes].into(), &retention, None, at(number), |_| ());
        assert!(memory.bytes() <= MAX, "{} bytes", memory.bytes());
    };
    // A thousand bytes each, 850 of them, and a small channel that is older and one that is newer than all others.
    for number in 0..3 {
        publish("old", 1000 - 128, number);
    }
    for number in 0..900 {
        publish(["one", "two"][number as usize % 2], 1000 - 128, 10 + number);
    }
    for number in 0..3 {
        publish("new", 1000 - 128, 2000 + number);
    }
    assert_eq!((memory.bytes(), forgotten.get()), (906_000, 0));
    memory.make_room();
    assert_eq!(forgotten.get(), 0, "it is not full yet");
    for number in 0..20 {
        publish("new", 1000 - 128, 2010 + number);
    }
    memory.make_room();
    assert!((MAX / 8 * 5..=MAX / 4 * 3).contains(&memory.bytes()), "{} bytes", memory.bytes());
    assert_eq!(forgotten.get() as usize, 926 - memory.bytes() / 1000);
    let kept = left(&memory, &["old", "one", "two", "new"], &retention, at(3000));
    assert_eq!((kept[0], kept[3]), (1, 23), "{kept:?}");
    assert!(kept[1].abs_diff(kept[2]) <= 1 && kept[1] > 300, "{kept:?}");
    // Before anybody looks: who publishes finds room in his own channel, to the byte.
    for number in 0..900 {
        publish("burst", 1000 - 128, 3000 + number);
    }
    assert_eq!(left(&memory, &["old", "new"], &retention, at(4000)), [1, 23]);
    let kept = left(&memory, &["burst"], &retention, at(4000))[0];
    assert!((200..300).contains(&kept), "{kept}");
    // Everything that went in comes out.
    memory.expire(4000 + 1_000_000 + 3_600_000);
    assert_eq!(memory.bytes(), 0);
    publish("one", 10, 3_700_000);
    assert_eq!(memory.expire(1_000_000 + 100 * 86_400_000), 0, "no channel is left");
    assert_eq!(memory.bytes(), 0);
}

/// One channel fills the room: another one's clients, and its own, are told what went for that, and not one byte too many.
#[tokio::test]
async fn whoever_asks_for_what_went_for_want_of_room_is_told() {
    const RULES: &str = r#"[{"match":"h:*","history":{"size":1000,"ttl":"10m"},"client_publish":true}]"#;
    let gateway = gateway(&[("HUBCAST_CHANNEL_RULES", RULES), ("HUBCAST_HISTORY_MEMORY_MAX", "8MiB")]);
    ready(&gateway).await;
    let mut cursors = Vec::new();
    for number in 0..4 {
        cursors.push(publish(&gateway, "h:small", number).await);
    }
    let body = format!("\"{}\"", "x".repeat(900 << 10));
    for _ in 0..30 {
        assert_eq!(http(&gateway, "POST /api/publish/h:big", "", body.as_bytes()).await.status, 200);
        assert!(metric(&gateway, "hubcast_history_memory_bytes").await <= f64::from(8 << 20));
    }
    let events = async |channel: &str| {
        let history = http(&gateway, &format!("GET /api/history/{channel}?limit=1000"), "", b"").await;
        history.json()["events"].as_array().expect("events").len()
    };
    eventually("the small channel to lose its oldest", async || (events("h:small").await == 1).then_some(())).await;
    assert!(metric(&gateway, "hubcast_history_forgotten_total").await >= 3.0 + 20.0);

    // Resuming, paging, and going on from what is still there.
    let (_, subscribed) = subscribe(&gateway, "h:small", Some(&cursors[1])).await;
    assert_eq!((&subscribed["recovered"], &subscribed["cursor"]), (&json!(false), &json!(cursors[3])));
    let (mut client, subscribed) = subscribe(&gateway, "h:small", Some(&cursors[2])).await;
    assert_eq!(subscribed["recovered"], true);
    assert_eq!(client.json().await["data"], 3);
    let page = http(&gateway, &format!("GET /api/history/h:small?after={}", cursors[0]), "", b"").await.json();
    let gap =
        json!({"type": "gap", "channel": "h:small", "after": cursors[0], "next": cursors[3], "reason": "trimmed"});
    assert_eq!((&page["events"][0], &page["events"][1]["data"]), (&gap, &json!(3)));
    let last = publish(&gateway, "h:small", 4).await;
    let mut late = Client::connect(&gateway).await;
    late.send(&json!({"type": "history", "channel": "h:small"})).await;
    assert_eq!(late.json().await["cursor"], json!(last));
    assert_eq!(client.json().await["data"], 4);
}
