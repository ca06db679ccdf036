//! Many instances as one over a real Redis, and what happens when it is not there.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use hubcast::gateway::Gateway;
use serde_json::{Value, json};

use crate::harness::{
    Client, Redis, await_metric, eventually, gateway, gateway_with, http, metric, publish, ready, soon,
};

/// Back within this after Redis is: the promise.
const REPAIR_TIME: Duration = Duration::from_secs(2);

/// A gateway on `redis`, ready.
async fn instance(redis: &Redis) -> Gateway {
    let gateway = gateway(&[("HUBCAST_REDIS_URL", &redis.url())]);
    ready(&gateway).await;
    gateway
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_is_published_anywhere_reaches_clients_of_both_instances_once_in_one_order() {
    const EACH: usize = 300;
    let redis = Redis::start().await;
    let instances = [instance(&redis).await, instance(&redis).await];
    let mut readers = Vec::new();
    for gateway in instances.iter().chain(&instances) {
        readers.push(Client::subscribed(gateway, "c").await);
    }
    // Sockets on both, HTTP on both, and plain PUBLISH.
    let publishers = [Client::connect(&instances[0]).await, Client::connect(&instances[1]).await];
    let sockets = publishers.into_iter().enumerate().map(|(who, mut client)| async move {
        for n in 0..EACH {
            client.send(&json!({"type": "publish", "channel": "c", "data": [who, n], "id": n})).await;
        }
        for n in 0..EACH {
            client.expect(&json!({"type": "published", "id": n})).await;
        }
    });
    let https = instances.iter().zip(2..).map(|(gateway, who)| async move {
        let messages: Vec<_> = (0..EACH).map(|n| json!({"channel": "c", "data": [who, n]})).collect();
        let body = json!({ "messages": messages }).to_string();
        assert_eq!(http(gateway, "POST /api/publish", "", body.as_bytes()).await.status, 200);
    });
    let plain = async {
        for n in 0..EACH {
            redis.command(&["PUBLISH", "hub:c", &format!("[4,{n}]")]).await;
        }
    };
    tokio::join!(join_all(sockets), join_all(https), plain);

    let mut order: Vec<Value> = Vec::new();
    for (index, reader) in readers.iter_mut().enumerate() {
        let mut seen = Vec::new();
        for _ in 0..5 * EACH {
            seen.push(reader.json().await["data"].clone());
        }
        for who in 0..5 {
            let own: Vec<_> = seen.iter().filter(|data| data[0] == who).map(|data| data[1].as_u64().unwrap()).collect();
            assert_eq!(own, (0..EACH as u64).collect::<Vec<_>>(), "reader {index}, publisher {who}");
        }
        if index == 0 { order = seen } else { assert_eq!(order, seen, "reader {index} saw another order") }
    }
}

/// Payloads from Redis are anybody's bytes.
#[tokio::test(flavor = "multi_thread")]
async fn one_odd_publish_closes_nobody() {
    let redis = Redis::start().await;
    let gateway = gateway(&[("HUBCAST_REDIS_URL", &redis.url()), ("HUBCAST_PUBLISH_BYTES_MAX", "1000")]);
    let mut client = Client::subscribed(&gateway, "c").await;
    let publisher = redis::Client::open(redis.url()).unwrap();
    let mut publisher = publisher.get_multiplexed_async_connection().await.unwrap();
    // All at once, so that they are delivered in a row.
    let mut pipeline = redis::pipe();
    for payload in [b"\xff\xfe".as_slice(), b"", b"text", b"{\"a\": 1}", &[b'x'; 1001], b"1"] {
        pipeline.atomic().publish("hub:c", payload);
    }
    pipeline.exec_async(&mut publisher).await.unwrap();
    client.expect(&json!({"type": "event", "channel": "c", "data_base64": "//4="})).await;
    client.expect(&json!({"type": "event", "channel": "c", "data": ""})).await;
    client.expect(&json!({"type": "event", "channel": "c", "data": "text"})).await;
    assert_eq!(client.text().await, r#"{"type":"event","channel":"c","data":{"a": 1}}"#);
    client.expect(&json!({"type": "gap", "channel": "c", "reason": "upstream"})).await;
    client.expect(&json!({"type": "event", "channel": "c", "data": 1})).await;
    assert_eq!(metric(&gateway, r#"hubcast_dropped_total{reason="redis_too_large"}"#).await, 1.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn subscriptions_at_redis_follow_those_of_clients() {
    let redis = Redis::start().await;
    let gateway = instance(&redis).await;
    assert_eq!(redis.numsub("hub:c").await, 0, "lazy: nobody wants it yet");
    let mut first = Client::subscribed(&gateway, "c").await;
    let second = Client::subscribed(&gateway, "c").await;
    assert_eq!(redis.numsub("hub:c").await, 1, "one for all");
    drop(second);
    // A reload: the last one leaves and comes back while the channel lingers.
    first.send(&json!([{"type": "unsubscribe", "channel": "c"}, {"type": "subscribe", "channel": "c"}])).await;
    first.expect(&json!({"type": "unsubscribed", "channel": "c"})).await;
    first.expect(&json!({"type": "subscribed", "channel": "c"})).await;
    publish(&gateway, "c", b"1").await;
    first.expect(&json!({"type": "event", "channel": "c", "data": 1})).await;
    drop(first);
    eventually("the unsubscribe", async || (redis.numsub("hub:c").await == 0).then_some(())).await;
    await_metric(&gateway, "hubcast_channels", 0.0).await;
}

/// Many clients come and go on a few channels at once; nothing is stuck at the end.
#[tokio::test(flavor = "multi_thread")]
async fn churn_leaves_nothing_behind_at_redis() {
    const CHANNELS: usize = 20;
    let redis = Redis::start().await;
    let gateway = Arc::new(instance(&redis).await);
    let churning = (0..16_usize).map(|who| {
        let gateway = Arc::clone(&gateway);
        tokio::spawn(async move {
            let mut client = Client::connect(&gateway).await;
            for round in 0..100 {
                let channel = format!("c{}", (who * 7 + round * 3) % CHANNELS);
                client.send(&json!([{"type": "subscribe", "channel": channel}, {"type": "ping", "id": round}])).await;
                if round % 3 == 0 {
                    client.send(&json!({"type": "unsubscribe", "channel": channel})).await;
                    while client.json().await["type"] != "unsubscribed" {}
                    continue;
                }
                while client.json().await != json!({"type": "subscribed", "channel": channel}) {}
                client.send(&json!({"type": "unsubscribe", "channel": channel})).await;
                while client.json().await != json!({"type": "unsubscribed", "channel": channel}) {}
            }
        })
    });
    for task in join_all(churning).await {
        task.unwrap();
    }
    eventually("no channel is left", async || (metric(&gateway, "hubcast_channels").await == 0.0).then_some(())).await;
    for channel in 0..CHANNELS {
        assert_eq!(redis.numsub(&format!("hub:c{channel}")).await, 0);
    }
    crate::observe::threat(48, "churn of many clients: no channel is left, here and at Redis");
}

/// A publish that starts after `subscribed` was seen is never lost, whatever else comes and goes.
#[tokio::test(flavor = "multi_thread")]
async fn ten_thousand_races_of_subscribe_and_publish_lose_nothing_after_subscribed() {
    const TASKS: usize = 20;
    const ROUNDS: usize = 500;
    let redis = Redis::start().await;
    let gateway = Arc::new(instance(&redis).await);
    let overlapped = Arc::new(AtomicUsize::new(0));
    let racing = (0..TASKS).map(|task| {
        let (gateway, overlapped) = (Arc::clone(&gateway), Arc::clone(&overlapped));
        tokio::spawn(async move {
            let mut subscriber = Client::connect(&gateway).await;
            let mut publisher = Client::connect(&gateway).await;
            for round in 0..ROUNDS {
                // Few names, so that subscribes also race the lingering and the leaving of others.
                let channel = format!("race{}", (task + round) % 50);
                let tag = task * ROUNDS + round;
                let early = json!({"type": "publish", "channel": channel, "data": [tag, "early"], "id": "early"});
                publisher.send(&early).await;
                subscriber.send(&json!({"type": "subscribe", "channel": channel})).await;
                let mut was_early_seen = false;
                loop {
                    let frame = subscriber.json().await;
                    was_early_seen |= frame["data"] == json!([tag, "early"]);
                    if frame == json!({"type": "subscribed", "channel": channel}) {
                        break;
                    }
                }
                publisher
                    .send(&json!({"type": "publish", "channel": channel, "data": [tag, "late"], "id": "late"}))
                    .await;
                loop {
                    let frame = subscriber.json().await;
                    was_early_seen |= frame["data"] == json!([tag, "early"]);
                    if frame["data"] == json!([tag, "late"]) {
                        break;
                    }
                }
                overlapped.fetch_add(usize::from(was_early_seen), Ordering::Relaxed);
                publisher.expect(&json!({"type": "published", "id": "early"})).await;
                publisher.expect(&json!({"type": "published", "id": "late"})).await;
                subscriber.send(&json!({"type": "unsubscribe", "channel": channel})).await;
                while subscriber.json().await["type"] != "unsubscribed" {}
            }
        })
    });
    for task in join_all(racing).await {
        task.unwrap();
    }
    // The early publish was sent before the subscribe and still seen: the two were under way together.
    let overlapped = overlapped.load(Ordering::Relaxed);
    println!("{overlapped} of {} races overlapped", TASKS * ROUNDS);
    assert!(overlapped > 0, "no race overlapped: the test shows nothing");
}

#[tokio::test(flavor = "multi_thread")]
async fn redis_may_come_after_the_gateway() {
    let mut redis = Redis::reserve();
    let gateway = gateway(&[("HUBCAST_REDIS_URL", &redis.url())]);
    let readyz = http(&gateway, "GET /readyz", "", b"").await;
    assert_eq!((readyz.status, readyz.json()), (503, json!({"ready": false, "reasons": ["redis"]})));
    assert_eq!(http(&gateway, "GET /livez", "", b"").await.status, 200);
    let mut client = Client::connect(&gateway).await;
    client
        .send(&json!([
            {"type": "subscribe", "channel": "c", "id": 1},
            {"type": "subscribe", "channel": "cancelled", "id": 2},
            {"type": "subscribe", "channel": "c", "id": 3},
            {"type": "unsubscribe", "channel": "cancelled", "id": 4},
            {"type": "ping", "id": 5},
        ]))
        .await;
    client.expect(&json!({"type": "unsubscribed", "channel": "cancelled", "id": 4})).await;
    client.expect(&json!({"type": "pong", "id": 5})).await;
    let refused = http(&gateway, "POST /api/publish/c", "", b"1").await;
    assert_eq!((refused.status, &refused.json()["error"]["code"]), (503, &json!("unavailable")));
    client.send(&json!({"type": "publish", "channel": "c", "data": 1, "id": 6})).await;
    let error = client.json().await;
    assert_eq!((&error["id"], &error["code"]), (&json!(6), &json!("unavailable")));
    assert!(error["retry_after_ms"].is_u64());

    redis.restart().await;
    let back = Instant::now();
    client.expect(&json!({"type": "subscribed", "channel": "c", "id": 1})).await;
    client.expect(&json!({"type": "subscribed", "channel": "c", "id": 3})).await;
    assert!(back.elapsed() < REPAIR_TIME, "live after {:?}", back.elapsed());
    crate::observe::fault("redis down at start", None, back.elapsed(), "503 meanwhile; live without a restart");
    ready(&gateway).await;
    publish(&gateway, "c", b"2").await;
    client.expect(&json!({"type": "event", "channel": "c", "data": 2})).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_redis_closes_nobody_and_everybody_is_told_the_gap() {
    const CHANNELS: usize = 1200;
    let mut redis = Redis::start().await;
    let gateway = gateway(&[("HUBCAST_REDIS_URL", &redis.url()), ("HUBCAST_SUBSCRIPTIONS_MAX", "2000")]);
    ready(&gateway).await;
    let mut clients = join_all((0..3).map(|_| Client::subscribed(&gateway, "c"))).await;
    let mut raw = Client::open(&gateway, "/ws?channel=c", Some("hubcast.raw.v1")).await;
    let mut many = Client::connect(&gateway).await;
    let names: Vec<_> = (0..CHANNELS).map(|n| format!("many{n}")).collect();
    many.send(&json!({"type": "subscribe", "channels": names})).await;
    for _ in 0..CHANNELS {
        assert_eq!(many.json().await["type"], "subscribed");
    }
    for outage in 1..=2 {
        redis.kill();
        let killed = Instant::now();
        eventually("the loss is noticed", async || {
            (http(&gateway, "GET /readyz", "", b"").await.status == 503).then_some(())
        })
        .await;
        let noticed = killed.elapsed();
        let answer = http(&gateway, "POST /api/publish/c", "", b"1").await;
        assert_eq!(answer.status, 503, "{answer:?}");
        // Local work goes on.
        let mut newcomer = Client::connect(&gateway).await;
        newcomer.send(&json!([{"type": "subscribe", "channel": "c"}, {"type": "ping"}])).await;
        newcomer.expect(&json!({"type": "pong"})).await;

        redis.restart().await;
        let back = Instant::now();
        for client in &mut clients {
            client.expect(&json!({"type": "gap", "channel": "c", "reason": "upstream"})).await;
        }
        newcomer.expect(&json!({"type": "subscribed", "channel": "c"})).await;
        for _ in 0..CHANNELS {
            let gap = many.json().await;
            assert_eq!((&gap["type"], &gap["reason"]), (&json!("gap"), &json!("upstream")));
        }
        assert!(back.elapsed() < REPAIR_TIME, "repaired after {:?}", back.elapsed());
        crate::observe::fault(
            "redis restart",
            Some(noticed),
            back.elapsed(),
            "1,201 channels live again and told a gap; nobody closed",
        );
        ready(&gateway).await;
        publish(&gateway, "c", b"\"after\"").await;
        for client in clients.iter_mut().chain([&mut newcomer]) {
            client.expect(&json!({"type": "event", "channel": "c", "data": "after"})).await;
        }
        assert_eq!(raw.text().await, "\"after\"", "raw subscribers get payloads and nothing else");
        assert_eq!(metric(&gateway, "hubcast_gaps_total").await, f64::from(outage) * (CHANNELS as f64 + 1.0));
    }
    assert_eq!(metric(&gateway, "hubcast_connections_closed_total{reason=\"slow_consumer\"}").await, 0.0);
    assert!(metric(&gateway, "hubcast_redis_reconnects_total{link=\"subscribe\"}").await >= 2.0);
    assert!(metric(&gateway, "hubcast_redis_resubscribes_total").await >= 2.0 * CHANNELS as f64);
}

/// SIGSTOP: the connections stand and nothing is answered.
#[tokio::test(flavor = "multi_thread")]
async fn a_frozen_redis_is_found_out_and_everything_else_goes_on() {
    let redis = Redis::start().await;
    let env = [("HUBCAST_REDIS_URL", redis.url()), ("HUBCAST_PUBLISH_TIMEOUT", "300ms".into())];
    let env = env.each_ref().map(|(name, value)| (*name, value.as_str()));
    let gateway = gateway_with(&env, |config| config.redis_probe_interval = Duration::from_millis(300));
    ready(&gateway).await;
    let mut client = Client::subscribed(&gateway, "c").await;
    redis.freeze();
    let unknown = http(&gateway, "POST /api/publish/c", "", b"1").await;
    assert_eq!((unknown.status, &unknown.json()["error"]["code"]), (504, &json!("unavailable")));
    assert_eq!(unknown.json()["error"]["outcome"], "unknown");
    eventually("publishes are refused", async || {
        (http(&gateway, "POST /api/publish/c", "", b"2").await.status == 503).then_some(())
    })
    .await;
    eventually("the loss is noticed", async || {
        (metric(&gateway, "hubcast_redis_link_up{link=\"subscribe\"}").await == 0.0).then_some(())
    })
    .await;
    client.send(&json!({"type": "ping"})).await;
    client.expect(&json!({"type": "pong"})).await;
    let _newcomer = Client::connect(&gateway).await;

    redis.thaw();
    let back = Instant::now();
    // Redis still has the first publish in its socket; whether it arrives before or after the loss is its own affair.
    let gap = json!({"type": "gap", "channel": "c", "reason": "upstream"});
    while client.json().await != gap {}
    assert!(back.elapsed() < REPAIR_TIME, "repaired after {:?}", back.elapsed());
    ready(&gateway).await;
    publish(&gateway, "c", b"3").await;
    while client.json().await["data"] != json!(3) {}
}

/// Redis drops a subscriber that does not keep up; the gateway notices and says so.
#[tokio::test(flavor = "multi_thread")]
async fn a_link_that_redis_cuts_is_repaired() {
    let redis = Redis::start().await;
    let gateway = instance(&redis).await;
    let mut client = Client::subscribed(&gateway, "c").await;
    redis.command(&["CLIENT", "KILL", "TYPE", "pubsub"]).await;
    client.expect(&json!({"type": "gap", "channel": "c", "reason": "upstream"})).await;
    publish(&gateway, "c", b"1").await;
    client.expect(&json!({"type": "event", "channel": "c", "data": 1})).await;
    assert_eq!(metric(&gateway, "hubcast_gaps_total").await, 1.0);
}

/// One name that the ACL forbids does not keep the others of its batch from becoming live.
#[tokio::test(flavor = "multi_thread")]
async fn a_channel_that_redis_refuses_keeps_only_itself_waiting() {
    let redis = Redis::start().await;
    redis
        .command(&[
            "ACL",
            "SETUSER",
            "hub",
            "on",
            ">secret",
            "~*",
            "+@all",
            "resetchannels",
            "&hub:ok*",
            "&hub:__control*",
        ])
        .await;
    let url = redis.url().replace("redis://", "redis://hub:secret@");
    let gateway = gateway(&[("HUBCAST_REDIS_URL", &url)]);
    ready(&gateway).await;
    let mut client = Client::connect(&gateway).await;
    client.send(&json!({"type": "subscribe", "channels": ["ok1", "bad", "ok2"]})).await;
    let mut live =
        [client.json().await, client.json().await].map(|frame| frame["channel"].as_str().unwrap().to_owned());
    live.sort();
    assert_eq!(live, ["ok1", "ok2"]);
    client.send(&json!({"type": "publish", "channel": "bad", "data": 1, "id": 1})).await;
    assert_eq!(client.json().await["code"], "unavailable");
    redis.command(&["ACL", "SETUSER", "hub", "&hub:bad"]).await;
    client.expect(&json!({"type": "subscribed", "channel": "bad"})).await;
}

/// A burst through Redis that is faster than the readers: the multiplexer waits for them, nobody is closed.
#[tokio::test(flavor = "multi_thread")]
async fn a_burst_through_redis_closes_nobody() {
    const MESSAGES: usize = 20_000;
    let redis = Redis::start().await;
    let gateway = instance(&redis).await;
    let readers = join_all((0..20).map(|_| Client::subscribed(&gateway, "c"))).await;
    let reading: Vec<_> = readers
        .into_iter()
        .map(|mut reader| {
            tokio::spawn(async move {
                for n in 0..MESSAGES {
                    assert!(reader.text().await.ends_with(&format!("\"data\":{n}}}")));
                }
            })
        })
        .collect();
    let mut connection = redis::Client::open(redis.url()).unwrap().get_multiplexed_async_connection().await.unwrap();
    let mut pipeline = redis::pipe();
    for n in 0..MESSAGES {
        pipeline.cmd("PUBLISH").arg("hub:c").arg(n).ignore();
    }
    pipeline.query_async::<()>(&mut connection).await.unwrap();
    for reader in reading {
        soon("a reader", reader).await.expect("it got every message, in order");
    }
    assert_eq!(metric(&gateway, "hubcast_dropped_total{reason=\"redis_queue_full\"}").await, 0.0);
}

/// A publish is answered when Redis has it; the drain closes nobody before it has come back from there.
#[tokio::test(flavor = "multi_thread")]
async fn what_was_answered_is_delivered_before_a_drain_closes() {
    const MESSAGES: usize = 2_000;
    let redis = Redis::start().await;
    let gateway = gateway(&[("HUBCAST_REDIS_URL", &redis.url()), ("HUBCAST_DRAIN_TIME", "1ms")]);
    ready(&gateway).await;
    let readers = join_all((0..5).map(|_| Client::subscribed(&gateway, "c"))).await;
    let messages: Vec<_> = (0..MESSAGES).map(|n| json!({"channel": "c", "data": n})).collect();
    let body = json!({ "messages": messages }).to_string();
    assert_eq!(http(&gateway, "POST /api/publish", "", body.as_bytes()).await.status, 200);
    let draining = tokio::spawn(gateway.drain());
    for mut reader in readers {
        let mut next = 0;
        while next < MESSAGES {
            let frame = reader.json().await;
            if frame["type"] == "event" {
                assert_eq!(frame["data"], json!(next));
                next += 1;
            }
        }
        assert_eq!(reader.close_frame().await.0, 1012);
    }
    let drained = soon("the drain", draining).await.unwrap();
    assert_eq!((drained.closed, drained.flushed), (5, 5));
}

/// While Redis is away, channels that come and go leave nothing behind.
#[tokio::test(flavor = "multi_thread")]
async fn churn_without_redis_does_not_pile_up() {
    let mut redis = Redis::reserve();
    let gateway = gateway(&[("HUBCAST_REDIS_URL", &redis.url())]);
    let mut client = Client::connect(&gateway).await;
    for n in 0..3_000 {
        let channel = format!("random{n}");
        client
            .feed_text(
                &json!([{"type": "subscribe", "channel": channel}, {"type": "unsubscribe", "channel": channel}])
                    .to_string(),
            )
            .await;
    }
    client.send(&json!({"type": "subscribe", "channel": "stays"})).await;
    client.send(&json!({"type": "ping"})).await;
    while client.json().await != json!({"type": "pong"}) {}
    await_metric(&gateway, "hubcast_channels", 1.0).await;
    redis.restart().await;
    client.expect(&json!({"type": "subscribed", "channel": "stays"})).await;
}
