//! Slow clients of channels whose rule lets publications go: they stay, and are told exactly what they missed.

use std::collections::BTreeMap;
use std::time::Duration;

use hubcast::gateway::Gateway;
use serde_json::{Value, json};
use socket2::SockRef;
use tokio::task::JoinHandle;

use crate::harness::{Client, HANDSHAKE, Raw, Redis, await_metric, eventually, gateway, http, metric, publish, ready};

const RULES: &str = r#"[
    {"match":"news","slow":"drop_oldest"},
    {"match":"log","client_publish":true,"slow":"drop_oldest","history":{"size":10000,"ttl":"10m"}},
    {"match":"short","slow":"drop_oldest","history":{"size":400,"ttl":"10m"}},
    {"match":"prices","slow":"latest","latest_by":"/symbol"},
    {"match":"rates","slow":"latest","latest_by":"/symbol","history":{"size":10000,"ttl":"10m"}}
]"#;

/// Small outboxes, so that what the kernel holds is not all there is.
fn small(more: &[(&str, &str)]) -> Gateway {
    gateway(&[&[("HUBCAST_CHANNEL_RULES", RULES), ("HUBCAST_OUTBOX_MESSAGES", "64")], more].concat())
}

/// A client that will read when it is asked to.
async fn stalled(gateway: &Gateway, path: &str, headers: &str) -> Raw {
    let mut raw = Raw::connect(gateway).await;
    SockRef::from(&raw.socket).set_recv_buffer_size(64 << 10).unwrap();
    raw.send(format!("GET {path} HTTP/1.1\r\n{headers}{HANDSHAKE}").as_bytes()).await;
    raw.head().await;
    raw
}

/// A client that reads what it gets; so many events.
async fn healthy(gateway: &Gateway, channel: &str, events: usize) -> JoinHandle<Vec<Value>> {
    let mut client = Client::connect(gateway).await;
    client.send(&json!({"type": "subscribe", "channel": channel})).await;
    client.json().await;
    tokio::spawn(async move {
        let mut got = Vec::new();
        while got.len() < events {
            got.push(client.json().await);
        }
        got
    })
}

fn filler() -> String {
    "x".repeat(8_000)
}

/// What the stalled client is sent once it reads, up to the event with this number.
async fn read_up_to(raw: &mut Raw, last: u64) -> Vec<Value> {
    let mut frames = Vec::new();
    loop {
        let frame = raw.frame().await.expect("the connection lives");
        let json: Value = serde_json::from_slice(&frame.payload).unwrap();
        if ["event", "gap", "subscribed", "pong"].contains(&json["type"].as_str().unwrap()) {
            frames.push(json);
        }
        if frames.last().is_some_and(|frame| frame["data"]["n"] == last) {
            return frames;
        }
    }
}

async fn dropped(gateway: &Gateway) -> [u64; 3] {
    let of = async |reason| metric(gateway, &format!(r#"hubcast_dropped_total{{reason="{reason}"}}"#)).await as u64;
    [of("drop_oldest").await, of("conflated").await, of("slow_consumer").await]
}

/// A gap stands exactly where numbers are missing, and fits the cursors there; returns how many are.
fn check_gaps(frames: &[Value], healthy: &[Value]) -> u64 {
    let cursor_of = |n: u64| healthy[n as usize]["cursor"].clone();
    let (mut next, mut at, mut missing) = (0, frames[0]["cursor"].clone(), 0);
    let mut gap: Option<&Value> = None;
    for frame in &frames[1..] {
        match frame["type"].as_str().unwrap() {
            "gap" => {
                assert!(gap.is_none(), "two gaps in a row");
                assert_eq!(frame["reason"], "slow");
                assert_eq!(frame["after"], at);
                gap = Some(frame);
            }
            "event" => {
                let n = frame["data"]["n"].as_u64().unwrap();
                assert_eq!(gap.is_some(), n != next, "{n} follows {next}");
                assert_eq!(frame["cursor"], cursor_of(n));
                if let Some(gap) = gap.take() {
                    assert_eq!(gap["next"], frame["cursor"]);
                }
                missing += n - next;
                next = n + 1;
                at = frame["cursor"].clone();
            }
            _ => {}
        }
    }
    assert!(gap.is_none());
    missing
}

/// With a history it misses nothing but time: each event comes once, in order, with a gap wherever it fell behind, which
/// names what was before and what comes next. Returns the gaps.
fn check_backfill(frames: &[Value], healthy: &[Value]) -> usize {
    let mut next = 0;
    let mut gaps = 0;
    for (at, frame) in frames.iter().enumerate().skip(1) {
        if frame["type"] == "gap" {
            let next = &frames[at + 1]["cursor"];
            assert_eq!(
                *frame,
                json!({"type": "gap", "channel": "log", "after": frames[at - 1]["cursor"], "next": next, "reason": "slow"})
            );
            gaps += 1;
        } else {
            assert_eq!(*frame, healthy[next], "{next} after {gaps} gaps");
            next += 1;
        }
    }
    assert_eq!(next, healthy.len());
    gaps
}

/// Twice it falls behind and reads on: it stays and gets everything, and no publish waits for it.
async fn reads_in_bursts(gateway: &Gateway) {
    const MESSAGES: u64 = 3_000;
    let mut slow = stalled(gateway, "/ws?channels=log", "").await;
    let mut publisher = Client::connect(gateway).await;
    publisher.send(&json!({"type": "subscribe", "channel": "log"})).await;
    publisher.json().await;
    await_metric(gateway, "hubcast_subscriptions", 2.0).await;
    let (mut frames, mut all) = (Vec::new(), Vec::new());
    for n in 0..MESSAGES {
        let data = json!({"n": n, "filler": filler()});
        publisher.send(&json!({"type": "publish", "channel": "log", "data": data, "id": n})).await;
        let both = [publisher.json().await, publisher.json().await];
        assert!(both.iter().any(|frame| frame["id"] == n));
        all.extend(both.into_iter().filter(|frame| frame["data"]["n"] == n));
        assert_eq!(all.len() as u64, n + 1);
        if n == MESSAGES / 2 {
            frames = read_up_to(&mut slow, n).await;
        }
    }
    frames.extend(read_up_to(&mut slow, MESSAGES - 1).await);
    assert_eq!(check_backfill(&frames, &all), 2);
    let [lost, conflated, closed] = dropped(gateway).await;
    assert!(lost > 1_000, "{lost}");
    assert_eq!([conflated, closed], [0, 0]);
    assert_eq!(metric(gateway, "hubcast_backfilled_total").await as u64, lost);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_reads_in_bursts_gets_everything_where_history_is_on() {
    reads_in_bursts(&small(&[])).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_reads_in_bursts_gets_everything_from_redis() {
    let redis = Redis::start().await;
    let gateway = small(&[("HUBCAST_REDIS_URL", &redis.url())]);
    ready(&gateway).await;
    reads_in_bursts(&gateway).await;
}

/// What the history has not any more is told as lost; the rest comes.
#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_is_behind_a_short_history_is_told_what_is_trimmed() {
    const MESSAGES: u64 = 2_000;
    let (frames, all, [dropped, ..]) = while_stalled("short", MESSAGES, |n| json!({"n": n, "filler": filler()})).await;
    let at = frames.iter().position(|frame| frame["type"] == "gap").unwrap();
    assert_eq!(frames.iter().filter(|frame| frame["type"] == "gap").count(), 1);
    let (before, after) = (&frames[at - 1], &frames[at + 1]);
    assert_eq!((&frames[at]["after"], &frames[at]["next"]), (&before["cursor"], &after["cursor"]));
    assert_eq!(frames[at]["reason"], "trimmed");
    assert_eq!(after["data"]["n"], MESSAGES - 400, "all that is left");
    let (head, tail) = (&frames[1..at], &frames[at + 1..]);
    assert!(head.iter().eq(&all[..at - 1]) && tail.iter().eq(&all[all.len() - 400..]));
    assert_eq!(dropped, MESSAGES - head.len() as u64);
}

/// Publishes numbers to a client that does not read; what it gets afterwards, what a healthy one got, and the drops.
async fn while_stalled(
    channel: &str,
    messages: u64,
    data: impl Fn(u64) -> Value,
) -> (Vec<Value>, Vec<Value>, [u64; 3]) {
    let gateway = small(&[]);
    let mut slow = stalled(&gateway, &format!("/ws?channels={channel}"), "").await;
    let healthy = healthy(&gateway, channel, messages as usize).await;
    await_metric(&gateway, "hubcast_subscriptions", 2.0).await;
    for n in 0..messages {
        publish(&gateway, channel, data(n).to_string().as_bytes()).await;
    }
    let all = healthy.await.unwrap();
    let dropped = dropped(&gateway).await;
    let frames = read_up_to(&mut slow, messages - 1).await;
    if channel != "short" {
        // What is withheld from one that is behind was never in its outbox.
        assert_eq!(metric(&gateway, "hubcast_deliveries_total").await as u64, 2 * messages);
    }
    // It is as good as any other again.
    publish(&gateway, channel, json!({"n": messages}).to_string().as_bytes()).await;
    assert_eq!(read_up_to(&mut slow, messages).await.len(), 1);
    assert_eq!(metric(&gateway, r#"hubcast_connections_closed_total{reason="slow_consumer"}"#).await, 0.0);
    (frames, all, dropped)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_stalls_under_drop_oldest_is_told_exactly_what_it_missed() {
    let (frames, all, dropped) = while_stalled("news", 2_000, |n| json!({"n": n, "filler": filler()})).await;
    let missing = check_gaps(&frames, &all);
    assert!(missing > 100, "{missing}");
    assert_eq!(dropped, [missing, 0, 0]);
    let gaps = frames.iter().filter(|frame| frame["type"] == "gap").count();
    assert_eq!(gaps, 1, "it stalled once");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_stalls_under_latest_has_the_newest_of_every_key() {
    const MESSAGES: u64 = 2_000;
    for channel in ["prices", "rates"] {
        // The last 10 symbols change seldom: their newest values are among the oldest.
        let symbol = |n: u64| if n.is_multiple_of(250) { 10 + n / 250 } else { n * n % 7 };
        let data = |n| json!({"symbol": symbol(n), "n": n, "filler": filler()});
        let (frames, all, dropped) = while_stalled(channel, MESSAGES, data).await;
        let mut newest = BTreeMap::new();
        let mut last = None;
        let events: Vec<_> = frames.iter().filter(|frame| frame["type"] == "event").collect();
        for event in &events {
            let n = event["data"]["n"].as_u64().unwrap();
            assert!(last < Some(n), "in order");
            assert_eq!(event["cursor"], all[n as usize]["cursor"]);
            last = Some(n);
            newest.insert(event["data"]["symbol"].as_u64().unwrap(), n);
        }
        let expected: BTreeMap<_, _> = (0..MESSAGES).map(|n| (symbol(n), n)).collect();
        assert_eq!(newest, expected);
        assert_eq!(dropped, [0, MESSAGES - events.len() as u64, 0]);
        let at = frames.iter().position(|frame| frame["type"] == "gap").expect("a gap");
        let gap = &frames[at];
        assert_eq!(frames.iter().filter(|frame| frame["type"] == "gap").count(), 1);
        assert_eq!((&gap["after"], &gap["next"]), (&frames[at - 1]["cursor"], &frames[at + 1]["cursor"]));
        assert_eq!(gap["after"].is_null(), channel == "prices");
        // Up to the gap nothing is missing.
        assert_eq!(events[at - 2]["data"]["n"], at as u64 - 2);
    }
}

/// Redis is emptied while one client is slow. Whoever has all of it is told where that was; of the other's last cursor
/// nothing is known, so it is told only that.
#[tokio::test(flavor = "multi_thread")]
async fn a_gap_names_cursors_only_to_whom_nothing_else_is_missing() {
    const MESSAGES: u64 = 1_000;
    let redis = Redis::start().await;
    let gateway = small(&[("HUBCAST_REDIS_URL", &redis.url())]);
    ready(&gateway).await;
    let mut slow = stalled(&gateway, "/ws?channels=rates", "").await;
    let (mut fast, _) = crate::history::subscribe(&gateway, "rates", None).await;
    await_metric(&gateway, "hubcast_subscriptions", 2.0).await;
    let data = |n: u64| json!({"symbol": n % 7, "n": n, "filler": filler()}).to_string();
    let mut last = Value::Null;
    for n in 0..MESSAGES {
        publish(&gateway, "rates", data(n).as_bytes()).await;
        last = fast.json().await["cursor"].take();
    }
    assert!(dropped(&gateway).await[1] > 0, "the slow one misses some");
    redis.command(&["FLUSHALL"]).await;
    redis.command(&["CLIENT", "KILL", "TYPE", "normal"]).await;
    fast.expect(&json!({"type": "gap", "channel": "rates", "after": last, "reason": "trimmed"})).await;
    eventually("redis to take a publish", async || {
        let path = "POST /api/publish/rates";
        (http(&gateway, path, "", data(MESSAGES).as_bytes()).await.status == 200).then_some(())
    })
    .await;
    let frames = read_up_to(&mut slow, MESSAGES).await;
    let gaps: Vec<_> = frames.iter().filter(|frame| frame["reason"] == "trimmed").collect();
    assert_eq!(gaps, [&json!({"type": "gap", "channel": "rates", "reason": "trimmed"})]);
}

/// Replies wait behind what they followed, and are never what goes.
#[tokio::test(flavor = "multi_thread")]
async fn replies_outlast_publications() {
    const MESSAGES: u64 = 600;
    let gateway = small(&[]);
    let mut slow = stalled(&gateway, "/ws?channels=news", "").await;
    let mut pings = 0;
    for n in 0..MESSAGES {
        publish(&gateway, "news", json!({"n": n, "filler": filler()}).to_string().as_bytes()).await;
        if n % 20 == 0 {
            slow.send(&crate::harness::masked(0x81, br#"{"type":"ping"}"#)).await;
            pings += 1;
        }
    }
    let frames = read_up_to(&mut slow, MESSAGES - 1).await;
    let mut pongs = frames.iter().filter(|frame| frame["type"] == "pong").count();
    // The last pings may have been read after the last publication was queued.
    while pongs < pings {
        let frame = slow.frame().await.expect("the connection lives");
        pongs += usize::from(frame.payload == br#"{"type":"pong"}"#);
    }
    let [oldest, ..] = dropped(&gateway).await;
    assert_eq!(check_gaps(&frames, &vec![Value::Null; MESSAGES as usize]), oldest);
    assert!(oldest > 0);
}

/// Who cannot be told is closed, whatever the rule says.
#[tokio::test(flavor = "multi_thread")]
async fn a_raw_client_that_stalls_is_closed_under_any_rule() {
    let gateway = small(&[]);
    let _slow = stalled(&gateway, "/ws?channel=news", "Sec-WebSocket-Protocol: hubcast.raw.v1\r\n").await;
    await_metric(&gateway, "hubcast_subscriptions", 1.0).await;
    let closed = r#"hubcast_connections_closed_total{reason="slow_consumer"}"#;
    eventually("the raw client to be closed", async || {
        publish(&gateway, "news", filler().as_bytes()).await;
        (metric(&gateway, closed).await > 0.0).then_some(())
    })
    .await;
    assert_eq!(dropped(&gateway).await[..2], [0, 0]);
}

/// What takes nothing at all is closed in time though its frames are ever new ones; what trickles is not.
#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_takes_nothing_is_closed_in_time_and_one_that_trickles_is_not() {
    const WRITE_TIMEOUT: Duration = Duration::from_millis(800);
    let gateway = small(&[("HUBCAST_WRITE_TIMEOUT", "800ms")]);
    let mut trickling = stalled(&gateway, "/ws?channels=news", "").await;
    let _stalled = stalled(&gateway, "/ws?channels=prices", "").await;
    let closed = r#"hubcast_connections_closed_total{reason="slow_consumer"}"#;
    let started = std::time::Instant::now();
    let mut n = 0;
    let mut slowest = Duration::ZERO;
    while started.elapsed() < 5 * WRITE_TIMEOUT {
        let data = json!({"n": n, "symbol": n, "filler": filler()}).to_string();
        let publishing = std::time::Instant::now();
        publish(&gateway, "news", data.as_bytes()).await;
        publish(&gateway, "prices", data.as_bytes()).await;
        slowest = slowest.max(publishing.elapsed());
        n += 1;
        if n % 10 == 0 {
            trickling.frame().await.expect("it lives");
        }
    }
    assert!(slowest < Duration::from_millis(400), "a publisher waited {slowest:?}");
    assert_eq!(metric(&gateway, closed).await, 1.0);
    assert!(dropped(&gateway).await[0] > 0);
    read_up_to(&mut trickling, n - 1).await;
}
