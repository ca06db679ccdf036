//! A reader that is behind, of a channel at Redis: what it costs that channel, and that it costs no other.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use hubcast::gateway::Gateway;
use hubcast::parked::{Parcel, Parked};
use serde_json::{Value, json};
use socket2::SockRef;
use tokio::task::JoinHandle;

use crate::harness::{Client, HANDSHAKE, Raw, Redis, eventually, gateway, http, metric, ready};

const MESSAGES: usize = 1_000;

/// So large that a few hundred fill an outbox, and the kernel's buffers before it.
const PAYLOAD_BYTES: usize = 8_000;

const SLOW: &str = r#"hubcast_connections_closed_total{reason="slow_consumer"}"#;
const DROPPED: &str = r#"hubcast_dropped_total{reason="redis_queue_full"}"#;

/// A subscriber of channel `a` for which the kernel takes little.
async fn reader(gateway: &Gateway) -> Raw {
    let mut raw = Raw::connect(gateway).await;
    SockRef::from(&raw.socket).set_recv_buffer_size(64 << 10).unwrap();
    raw.send(format!("GET /ws?channels=a HTTP/1.1\r\n{HANDSHAKE}").as_bytes()).await;
    raw.head().await;
    eventually("it to be subscribed", async || {
        let answer = http(gateway, "GET /api/channels/a", "", b"").await;
        (answer.status == 200 && answer.json()["subscribers"] == 1).then_some(())
    })
    .await;
    raw
}

async fn instance(redis: &Redis, env: &[(&str, &str)]) -> Gateway {
    let url = redis.url();
    let gateway = gateway(&[&[("HUBCAST_REDIS_URL", url.as_str())], env].concat());
    ready(&gateway).await;
    gateway
}

/// Publishes so many to `a` and then one to `b`, as one burst on one link to Redis.
async fn burst(redis: &Redis, messages: usize) {
    let mut connection = redis::Client::open(redis.url()).unwrap().get_multiplexed_async_connection().await.unwrap();
    let filler = "x".repeat(PAYLOAD_BYTES);
    let mut pipeline = redis::pipe();
    for n in 0..messages {
        pipeline.cmd("PUBLISH").arg("hub:a").arg(format!("\"{n:05}{filler}\"")).ignore();
    }
    pipeline.cmd("PUBLISH").arg("hub:b").arg("1").ignore();
    pipeline.query_async::<()>(&mut connection).await.unwrap();
}

/// What a reader makes of what it is sent.
struct Reading {
    /// Events of the burst so far.
    taken: Arc<AtomicUsize>,
    /// From now on it reads as fast as it can.
    is_hasty: Arc<AtomicBool>,
    /// What came after the last of them: a gap, or the code of a close; nothing where the burst is complete.
    end: JoinHandle<(Raw, Option<Value>)>,
}

/// Reads the burst in its order, slowly at first: some 800 KB a second, so that its socket takes something now and then.
fn trickle(mut raw: Raw, messages: usize) -> Reading {
    let (taken, is_hasty) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
    let reading = (Arc::clone(&taken), Arc::clone(&is_hasty));
    let end = tokio::spawn(async move {
        let mut pause = tokio::time::interval(Duration::from_millis(10));
        while taken.load(Ordering::Relaxed) < messages {
            if !is_hasty.load(Ordering::Relaxed) {
                pause.tick().await;
            }
            match next(&mut raw).await {
                Value::String(event) => {
                    let n = taken.fetch_add(1, Ordering::Relaxed);
                    assert!(event.starts_with(&format!("{n:05}x")), "expected {n}");
                }
                end => return (raw, Some(end)),
            }
        }
        (raw, None)
    });
    Reading { taken: reading.0, is_hasty: reading.1, end }
}

/// The data of the next event, the next gap, or the code of a close.
async fn next(raw: &mut Raw) -> Value {
    loop {
        let frame = raw.frame().await.expect("a close comes first");
        if frame.first == 0x88 {
            return json!(u16::from_be_bytes([frame.payload[0], frame.payload[1]]));
        }
        let frame: Value = serde_json::from_slice(&frame.payload).unwrap();
        match frame["type"].as_str() {
            Some("event") => return frame["data"].clone(),
            Some("gap") => return frame,
            _ => {}
        }
    }
}

/// A trickling reader holds up its own channel. Nobody else's waits, and on its own nothing is lost.
#[tokio::test(flavor = "multi_thread")]
async fn a_trickling_reader_holds_up_no_other_channel() {
    let redis = Redis::start().await;
    let gateway = instance(&redis, &[]).await;
    let trickling = trickle(reader(&gateway).await, MESSAGES);
    let mut fellow = Client::subscribed(&gateway, "a").await;
    let mut neighbour = Client::subscribed(&gateway, "b").await;
    let fellow = tokio::spawn(async move {
        for n in 0..MESSAGES {
            let text = fellow.text().await;
            assert!(text.contains(&format!("\"data\":\"{n:05}x")), "expected {n}");
        }
    });
    burst(&redis, MESSAGES).await;
    neighbour.expect(&json!({"type": "event", "channel": "b", "data": 1})).await;
    let (read, closed) = (trickling.taken.load(Ordering::Relaxed), metric(&gateway, SLOW).await);
    assert!(read < MESSAGES / 4 && closed == 0.0, "the neighbour waited: {read} read, {closed} closed");
    trickling.is_hasty.store(true, Ordering::Relaxed);
    let (_trickler, end) = trickling.end.await.expect("it got its messages in order");
    assert_eq!(end, None, "it got all of them");
    fellow.await.expect("its fellow, too");
    for series in [SLOW, DROPPED] {
        assert_eq!(metric(&gateway, series).await, 0.0, "{series}");
    }
}

/// What waits for a reader was answered as published: a drain closes nobody before it is delivered.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_parked_is_delivered_before_a_drain_closes() {
    // A drain waits for half a second, so for no more than is read at once.
    const FEW: usize = 400;
    let redis = Redis::start().await;
    let gateway = instance(&redis, &[("HUBCAST_DRAIN_TIME", "1ms")]).await;
    let trickling = trickle(reader(&gateway).await, FEW);
    let mut neighbour = Client::subscribed(&gateway, "b").await;
    burst(&redis, FEW).await;
    neighbour.expect(&json!({"type": "event", "channel": "b", "data": 1})).await;
    let draining = tokio::spawn(gateway.drain());
    trickling.is_hasty.store(true, Ordering::Relaxed);
    let (mut trickler, end) = trickling.end.await.expect("it got its messages in order");
    assert_eq!(end, None, "all of it came before the close");
    assert_eq!(next(&mut trickler).await, 1012);
    drop((trickler, neighbour));
    draining.await.unwrap();
}

/// The link is lost while messages wait: they are dropped, counted, and told as part of the gap, in their place.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_parked_when_the_link_is_lost_is_told_as_a_gap() {
    let redis = Redis::start().await;
    let gateway = instance(&redis, &[]).await;
    let trickling = trickle(reader(&gateway).await, MESSAGES);
    let mut neighbour = Client::subscribed(&gateway, "b").await;
    burst(&redis, MESSAGES).await;
    neighbour.expect(&json!({"type": "event", "channel": "b", "data": 1})).await;
    redis.command(&["CLIENT", "KILL", "TYPE", "pubsub"]).await;
    let gap = |channel: &str| json!({"type": "gap", "channel": channel, "reason": "upstream"});
    neighbour.expect(&gap("b")).await;
    trickling.is_hasty.store(true, Ordering::Relaxed);
    let (mut trickler, end) = trickling.end.await.expect("it got its messages in order");
    assert_eq!(end, Some(gap("a")), "nothing was parked");
    let taken = trickling.taken.load(Ordering::Relaxed);
    assert_eq!(metric(&gateway, DROPPED).await, (MESSAGES - taken) as f64);
    redis.command(&["PUBLISH", "hub:a", "\"after\""]).await;
    assert_eq!(next(&mut trickler).await, "after");
    assert_eq!(metric(&gateway, SLOW).await, 0.0);
}

/// What waits is bounded: what does not fit is counted, and told exactly where it is missing.
#[test]
fn what_is_parked_is_bounded() {
    for payload in [Vec::new(), vec![b'x'; 1 << 20]] {
        let mut parked = Parked::default();
        let mut fitted = 0;
        while parked.take_dropped_count() == 0 {
            parked.push(b"a".to_vec(), payload.clone());
            fitted += 1;
        }
        fitted -= 1;
        parked.push(b"a".to_vec(), payload.clone());
        parked.push(b"b".to_vec(), payload.clone());
        assert_eq!(parked.take_dropped_count(), 2);
        assert!(parked.holds(b"a") && parked.holds(b"b") && !parked.holds(b"c"));
        parked.keep_fence(7);
        assert_eq!(parked.pop(b"b"), Some(Parcel::Gap), "nothing but that");
        assert!(!parked.holds(b"b"));
        assert_eq!(parked.pop(b"a"), Some(Parcel::Message(payload.clone())));
        parked.push(b"a".to_vec(), payload.clone());
        for _ in 1..fitted {
            assert_eq!(parked.pop(b"a"), Some(Parcel::Message(payload.clone())));
        }
        assert_eq!(parked.pop(b"a"), Some(Parcel::Gap), "one, however many are missing");
        assert_eq!((parked.take_fence(), parked.is_empty()), (None, false));
        assert_eq!(parked.pop(b"a"), Some(Parcel::Message(payload.clone())), "what came once there was room");
        assert_eq!((parked.take_fence(), parked.take_fence(), parked.is_empty()), (Some(7), None, true));
        parked.push(b"a".to_vec(), payload.clone());
        parked.miss(b"a".to_vec());
        parked.forget(b"a");
        assert_eq!((parked.take_dropped_count(), parked.pop(b"a")), (1, None));
    }
}
