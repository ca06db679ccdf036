//! A page costs what it shows, however long the history that it is of.

use std::time::Duration;

use bytes::Bytes;
use hubcast::history_memory::Memory;
use hubcast::history_redis::{Place, publish_script};
use hubcast::history_store::{Loss, Moment, Retention, Window};
use hubcast::history_view::Range;
use hubcast::topology::Topology;
use redis::aio::MultiplexedConnection;
use serde_json::{Value, json};

use crate::harness::{Client, Redis, gateway, http, ready};

const CHANNEL: &str = "h:long";

const RULES: (&str, &str) =
    ("HUBCAST_CHANNEL_RULES", r#"[{"match":"h:*","history":{"size":10000,"ttl":"10m"},"client_publish":true}]"#);

async fn link(redis: &Redis) -> MultiplexedConnection {
    redis::Client::open(redis.url()).unwrap().get_multiplexed_async_connection().await.unwrap()
}

/// Bytes that Redis has sent so far.
async fn sent(redis: &Redis) -> u64 {
    let info: String = redis.query(&["INFO", "stats"]).await.unwrap();
    let bytes = info.lines().find_map(|line| line.strip_prefix("total_net_output_bytes:"));
    bytes.and_then(|bytes| bytes.trim().parse().ok()).expect("a number")
}

fn numbers(page: &Value) -> Vec<u64> {
    let events = page["events"].as_array().expect("events");
    events.iter().map(|event| event["data"]["number"].as_u64().unwrap_or_else(|| panic!("{event}"))).collect()
}

/// Of 10,000 events of 1 KiB each page brings its own 50 from Redis, from either end on, by either way.
#[tokio::test]
async fn a_page_reads_its_own_part_of_a_long_history() {
    const EVENTS: u64 = 10_000;
    const PAGE: u64 = 50;
    let redis = Redis::start().await;
    let gateway = gateway(&[RULES, ("HUBCAST_REDIS_URL", &redis.url())]);
    ready(&gateway).await;
    let place = Place::new("ws:", CHANNEL, &Topology::servers_of(1, "hub:"));
    let retention = Retention::new(10_000, Duration::from_secs(600));
    let mut link = link(&redis).await;
    redis.command(&["SCRIPT", "LOAD", &publish_script()]).await;
    for batch in 0..EVENTS / 500 {
        let mut pipeline = redis::pipe();
        for number in batch * 500..(batch + 1) * 500 {
            let payload = json!({"number": number, "rest": "x".repeat(1000)}).to_string();
            pipeline.invoke_script(&place.publish(payload.as_bytes(), &retention, rand::random(), None));
        }
        pipeline.exec_async(&mut link).await.unwrap();
    }
    let mut client = Client::connect(&gateway).await;
    for is_forward in [false, true] {
        let (mut cursor, mut seen) = (if is_forward { Some("0-1".to_owned()) } else { None }, Vec::new());
        for page in 0..6 {
            let direction = if is_forward { "after" } else { "before" };
            let before = sent(&redis).await;
            let answer = if page % 2 == 0 {
                let from = cursor.as_ref().map(|cursor| format!("&{direction}={cursor}")).unwrap_or_default();
                http(&gateway, &format!("GET /api/history/{CHANNEL}?limit={PAGE}{from}"), "", b"").await.json()
            } else {
                let mut command = json!({"type": "history", "channel": CHANNEL, "limit": PAGE});
                command[direction] = cursor.into();
                client.send(&command).await;
                client.json().await
            };
            let cost = sent(&redis).await - before;
            assert!(cost < 2 * PAGE * 1024, "{cost} bytes from Redis for a page of {PAGE} KiB");
            let mut events = answer["events"].as_array().expect("events").clone();
            if is_forward && page == 0 {
                assert_eq!(events.remove(0)["reason"], "trimmed", "it asked from before the first");
            }
            let answer = json!({"events": events, "has_more": answer["has_more"]});
            assert_eq!((numbers(&answer).len() as u64, &answer["has_more"]), (PAGE, &json!(true)));
            let edge = if is_forward { events.last() } else { events.first() };
            cursor = edge.map(|event| event["cursor"].as_str().expect("a cursor").to_owned());
            if is_forward {
                seen.extend(numbers(&answer));
            } else {
                seen.splice(0..0, numbers(&answer));
            }
        }
        let expected = if is_forward { 0..6 * PAGE } else { EVENTS - 6 * PAGE..EVENTS };
        assert_eq!(seen, expected.collect::<Vec<_>>());
    }
}

/// With markers and big payloads between, in reads of any size: what the page's own read shows is what that of all would.
#[tokio::test]
async fn a_page_of_a_part_is_that_of_the_whole() {
    let redis = Redis::start().await;
    let mut link = link(&redis).await;
    let (place, memory) = (Place::new("t:", "c", &Topology::servers_of(1, "hub:")), Memory::default());
    let retention = Retention::new(400, Duration::from_secs(3600));
    let start = Moment::now();
    for number in 0..450_u64 {
        let at = Moment { now_ms: start.now_ms + number, random: rand::random() };
        let payload = vec![b'x'; if number % 200 < 3 { 600 << 10 } else { 10 }];
        place.publish(&payload, &retention, at.random, None).invoke_async::<()>(&mut link).await.unwrap();
        memory.publish("c", Bytes::from(payload), &retention, None, at, |_| ());
        if number % 7 == 3 {
            for is_redis in [true, false] {
                let whole = match is_redis {
                    true => place.read(&mut link, None, &retention, 0).await.unwrap(),
                    false => memory.read("c", None, &retention, at),
                };
                let shared = whole.entries.iter().rev().nth(number as usize % 5).map(|entry| entry.id);
                let loss = Loss { shared, own: whole.top.next(0, 7), passed: Vec::new() };
                match is_redis {
                    true => drop(place.mark(&mut link, &loss, &retention, rand::random()).await.unwrap()),
                    false => drop(memory.mark("c", &loss, &retention, at)),
                }
            }
        }
    }
    let at = Moment { now_ms: start.now_ms + 450, random: 0 };
    let at_redis = place.read(&mut link, None, &retention, 0).await.unwrap();
    let in_memory = memory.read("c", None, &retention, at);
    assert!(at_redis.entries.iter().filter(|entry| entry.marker().is_some()).count() > 30);
    assert_eq!((at_redis.entries.len(), in_memory.entries.len()), (400, 400));
    for limit in [1, 2, 30, 31, 32, 33, 100, 1000] {
        for place_in in [0, 1, 2, 50, 51, 199, 330, 398, 399] {
            let ranges = |window: &Window| {
                let id = window.entries[place_in].id;
                let beside = hubcast::cursor::Cursor { sequence: id.sequence ^ 1, ..id };
                let never = hubcast::cursor::Cursor { ms: 0, sequence: 0 };
                [id, beside, window.top, never]
                    .into_iter()
                    .flat_map(|id| [Range::After(id), Range::Before(id), Range::Newest])
            };
            for range in ranges(&at_redis) {
                let read = place.read_page(&mut link, (range, limit), &retention, 0).await.unwrap();
                assert_eq!(read.page(range, limit), at_redis.page(range, limit), "{range:?} {limit}");
                assert!(read.entries.len() <= limit + 60, "{} entries for {limit}", read.entries.len());
            }
            for range in ranges(&in_memory) {
                let read = memory.read_page("c", range, limit, &retention, at);
                assert_eq!(read.page(range, limit), in_memory.page(range, limit), "{range:?} {limit}");
                assert!(read.entries.len() <= limit + 60, "{} entries for {limit}", read.entries.len());
            }
        }
    }
}
