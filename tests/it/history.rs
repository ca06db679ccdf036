//! Nothing lost in silence: cursors, recovery, pages of history, and the last event at subscribe, with and without Redis.

use std::time::Duration;

use hubcast::gateway::Gateway;
use hubcast::history_redis::publish_script;
use serde_json::{Value, json};

use crate::harness::{Client, HttpAnswer, Instance, Redis, await_metric, gateway, http, metric, ready};
use crate::proxy::Proxy;

pub const RULES: (&str, &str) = (
    "HUBCAST_CHANNEL_RULES",
    r#"[{"match":"h:*","history":{"size":20,"ttl":"10m"},"client_publish":true},{"match":"price","cache":true},{"match":"*"}]"#,
);

const CHANNEL: &str = "h:1";

/// Instances that are one: one without Redis, two with it.
pub async fn world(redis: Option<&Redis>) -> Vec<Gateway> {
    let url = redis.map(Redis::url);
    let mut env = vec![RULES];
    env.extend(url.as_deref().map(|url| ("HUBCAST_REDIS_URL", url)));
    let mut gateways = Vec::new();
    for _ in 0..if redis.is_some() { 2 } else { 1 } {
        gateways.push(gateway(&env));
        ready(&gateways[gateways.len() - 1]).await;
    }
    gateways
}

/// Both kinds of world, one after another: what is published at the first instance is read at the last.
async fn in_each(story: impl AsyncFn(&Gateway, &Gateway)) {
    let gateways = world(None).await;
    story(&gateways[0], &gateways[0]).await;
    let redis = Redis::start().await;
    let gateways = world(Some(&redis)).await;
    story(&gateways[0], &gateways[1]).await;
}

/// Publishes a number; its cursor.
pub async fn publish(gateway: &Gateway, channel: &str, number: u32) -> String {
    cursor(&http(gateway, &format!("POST /api/publish/{channel}"), "", number.to_string().as_bytes()).await)
}

fn cursor(answer: &HttpAnswer) -> String {
    assert_eq!(answer.status, 200, "{}", answer.json());
    answer.json()["results"][0]["cursor"].as_str().expect("a cursor").to_owned()
}

pub async fn subscribe(gateway: &impl Instance, channel: &str, after: Option<&str>) -> (Client, Value) {
    let mut client = Client::connect(gateway).await;
    let mut command = json!({"type": "subscribe", "channel": channel});
    if let Some(after) = after {
        command["after"] = after.into();
    }
    client.send(&command).await;
    let subscribed = client.json().await;
    assert_eq!((&subscribed["type"], &subscribed["channel"]), (&"subscribed".into(), &channel.into()), "{subscribed}");
    (client, subscribed)
}

pub fn event(cursor: &str, number: u32) -> Value {
    json!({"type": "event", "channel": CHANNEL, "cursor": cursor, "data": number})
}

#[tokio::test]
async fn a_client_that_comes_back_goes_on_where_it_was() {
    in_each(async |here, there| {
        let first = publish(here, CHANNEL, 1).await;
        let (mut client, subscribed) = subscribe(there, CHANNEL, None).await;
        assert_eq!((&subscribed["cursor"], &subscribed["recovered"]), (&json!(first), &json!(false)));
        let second = publish(here, CHANNEL, 2).await;
        client.expect(&event(&second, 2)).await;
        drop(client);

        let third = publish(here, CHANNEL, 3).await;
        let fourth = publish(here, CHANNEL, 4).await;
        let (mut client, subscribed) = subscribe(there, CHANNEL, Some(&second)).await;
        assert_eq!((&subscribed["cursor"], &subscribed["recovered"]), (&json!(second), &json!(true)));
        client.expect(&event(&third, 3)).await;
        client.expect(&event(&fourth, 4)).await;
        let fifth = publish(here, CHANNEL, 5).await;
        client.expect(&event(&fifth, 5)).await;
        assert_eq!(metric(there, r#"hubcast_recoveries_total{recovered="true"}"#).await, 1.0);
    })
    .await;
}

#[tokio::test]
async fn a_client_that_missed_too_much_is_told_so() {
    in_each(async |here, there| {
        let (_, subscribed) = subscribe(there, CHANNEL, None).await;
        let long_ago = subscribed["cursor"].as_str().unwrap().to_owned();
        let mut last = String::new();
        for number in 0..30 {
            last = publish(here, CHANNEL, number).await;
        }
        for after in [&long_ago, "1-1", "anything"] {
            let (mut client, subscribed) = subscribe(there, CHANNEL, Some(after)).await;
            assert_eq!((&subscribed["cursor"], &subscribed["recovered"]), (&json!(last), &json!(false)), "{after}");
            client.send(&json!({"type": "ping"})).await;
            client.expect(&json!({"type": "pong"})).await;
        }
    })
    .await;
}

#[tokio::test]
async fn a_repeated_subscribe_says_where_the_client_stands_and_changes_nothing() {
    in_each(async |here, there| {
        let (mut client, _) = subscribe(there, CHANNEL, None).await;
        let first = publish(here, CHANNEL, 1).await;
        client.expect(&event(&first, 1)).await;
        client.send(&json!({"type": "subscribe", "id": 7, "channels": [{"channel": CHANNEL, "after": "1-1"}]})).await;
        let again = json!({"type": "subscribed", "id": 7, "channel": CHANNEL, "cursor": first, "recovered": false});
        client.expect(&again).await;
        let second = publish(here, CHANNEL, 2).await;
        client.expect(&event(&second, 2)).await;
    })
    .await;
}

#[tokio::test]
async fn a_client_that_publishes_is_told_the_cursor() {
    in_each(async |here, there| {
        let (mut reader, _) = subscribe(there, CHANNEL, None).await;
        let mut client = Client::connect(here).await;
        client.send(&json!({"type": "publish", "id": 1, "channel": CHANNEL, "data": 5})).await;
        let published = client.json().await;
        let cursor = published["cursor"].as_str().expect("a cursor");
        assert_eq!(published, json!({"type": "published", "id": 1, "cursor": cursor}));
        reader.expect(&event(cursor, 5)).await;
    })
    .await;
}

#[tokio::test]
async fn history_is_paged_both_ways() {
    in_each(async |here, there| {
        let mut cursors = Vec::new();
        for number in 0..6 {
            cursors.push(publish(here, CHANNEL, number).await);
        }
        let events = |range: std::ops::Range<usize>| -> Vec<_> {
            range.map(|at| event(&cursors[at], at as u32)).collect()
        };
        let body = |range, has_more| {
            json!({"channel": CHANNEL, "events": events(range), "has_more": has_more, "cursor": cursors[5]})
        };
        let mut client = Client::connect(there).await;
        for (asked, query, told) in [
            (json!({}), String::new(), body(0..6, false)),
            (json!({"limit": 2}), "?limit=2".into(), body(4..6, true)),
            (
                json!({"limit": 2, "before": cursors[4]}),
                format!("?limit=2&before={}", cursors[4]),
                body(2..4, true),
            ),
            (json!({"limit": 3, "after": cursors[0]}), format!("?limit=3&after={}", cursors[0]), body(1..4, true)),
            (json!({"after": cursors[3]}), format!("?after={}", cursors[3]), body(4..6, false)),
        ] {
            let mut command = json!({"type": "history", "id": "h", "channel": CHANNEL});
            command.as_object_mut().unwrap().extend(asked.as_object().unwrap().clone());
            client.send(&command).await;
            let mut expected = told.clone();
            expected["type"] = "history".into();
            expected["id"] = "h".into();
            client.expect(&expected).await;
            let answer = http(there, &format!("GET /api/history/{CHANNEL}{query}"), "", b"").await;
            assert_eq!((answer.status, answer.json()), (200, told));
        }
    })
    .await;
}

#[tokio::test]
async fn history_that_is_not_there_is_refused() {
    in_each(async |here, _| {
        for (path, status) in [
            ("/api/history/plain", 404),
            ("/api/history/__x", 400),
            ("/api/history/h:1?after=1-1&before=2-1", 400),
            ("/api/history/h:1?after=x", 400),
            ("/api/history/h:1?limit=0", 400),
            ("/api/history/h:1?limit=1001", 400),
        ] {
            assert_eq!(http(here, &format!("GET {path}"), "", b"").await.status, status, "{path}");
        }
        let mut client = Client::connect(here).await;
        for (command, code) in [
            (json!({"channel": "plain"}), "forbidden"),
            (json!({"channel": CHANNEL, "after": 1}), "bad_request"),
            (json!({"channel": CHANNEL, "limit": 0}), "bad_request"),
            (json!({}), "bad_request"),
        ] {
            let mut command = command;
            command["type"] = "history".into();
            client.send(&command).await;
            let error = client.json().await;
            assert_eq!((&error["type"], &error["code"]), (&"error".into(), &code.into()), "{error}");
        }
    })
    .await;
}

#[tokio::test]
async fn a_publish_that_is_repeated_with_its_key_is_one() {
    in_each(async |here, there| {
        let (mut client, _) = subscribe(there, CHANNEL, None).await;
        let body = json!({"messages": [{"channel": CHANNEL, "data": 1}, {"channel": CHANNEL, "data": 2}]}).to_string();
        let mut answers = Vec::new();
        for gateway in [here, there, here] {
            answers
                .push(http(gateway, "POST /api/publish", "Idempotency-Key: order 7\r\n", body.as_bytes()).await.json());
        }
        assert_eq!(answers[0], answers[1]);
        assert_eq!(answers[0], answers[2]);
        let cursor_of = |at: usize| answers[0]["results"][at]["cursor"].as_str().unwrap().to_owned();
        client.expect(&event(&cursor_of(0), 1)).await;
        client.expect(&event(&cursor_of(1), 2)).await;
        let other = http(here, &format!("POST /api/publish/{CHANNEL}"), "Idempotency-Key: order 8\r\n", b"3").await;
        client.expect(&event(&cursor(&other), 3)).await;

        let plain = http(here, "POST /api/publish/plain", "Idempotency-Key: k\r\n", b"1").await;
        assert_eq!(plain.status, 400, "{}", plain.json());
        let long = format!("Idempotency-Key: {}\r\n", "k".repeat(256));
        assert_eq!(http(here, &format!("POST /api/publish/{CHANNEL}"), &long, b"1").await.status, 400);
    })
    .await;
}

/// Names of channels may have colons, and so may keys: what one says of both is not what another one says.
#[tokio::test]
async fn a_key_is_one_of_its_channel() {
    in_each(async |here, there| {
        let mut cursors = Vec::new();
        for (channel, key) in [("h:orders", "42:x"), ("h:orders:42", "x"), ("h:orders", "42:x")] {
            let key = format!("Idempotency-Key: {key}\r\n");
            cursors.push(cursor(&http(here, &format!("POST /api/publish/{channel}"), &key, b"1").await));
        }
        assert!(cursors[0] == cursors[2] && cursors[0] != cursors[1], "{cursors:?}");
        for (channel, top) in [("h:orders", &cursors[0]), ("h:orders:42", &cursors[1])] {
            let history = http(there, &format!("GET /api/history/{channel}"), "", b"").await.json();
            assert_eq!((&history["cursor"], history["events"].as_array().unwrap().len()), (&json!(top), 1));
        }
    })
    .await;
}

/// Whoever joins a channel of which little is kept, while much is published: no gap, not one event missing.
#[tokio::test(flavor = "multi_thread")]
async fn a_busy_channel_with_a_small_history_has_no_gaps() {
    const EVENTS: u64 = 10_000;
    let redis = Redis::start().await;
    let proxy = Proxy::start(redis.addr()).await;
    let here = world(Some(&redis)).await.remove(0);
    let there = gateway(&[RULES, ("HUBCAST_REDIS_URL", &format!("redis://{}/", proxy.addr()))]);
    ready(&there).await;
    proxy.delay(Duration::from_millis(5));
    let (mut first, _) = subscribe(&there, "price", None).await;
    let publishing = tokio::spawn(async move {
        let numbers: Vec<_> = (0..EVENTS).collect();
        for numbers in numbers.chunks(20) {
            let messages: Vec<_> = numbers.iter().map(|number| json!({"channel": "price", "data": number})).collect();
            let body = json!({ "messages": messages }).to_string();
            assert_eq!(http(&here, "POST /api/publish", "", body.as_bytes()).await.status, 200);
        }
        here
    });
    async fn read(client: &mut Client, numbers: std::ops::Range<u64>) {
        for number in numbers {
            let event = client.json().await;
            assert_eq!((&event["type"], event["data"].as_u64()), (&json!("event"), Some(number)), "{event}");
        }
    }
    read(&mut first, 0..1000).await;
    let mut reading = vec![tokio::spawn(async move { read(&mut first, 1000..EVENTS).await })];
    for _ in 0..5 {
        let (mut client, _) = subscribe(&there, "price", None).await;
        let number = client.json().await["data"].as_u64().expect("an event");
        reading.push(tokio::spawn(async move { read(&mut client, number + 1..EVENTS).await }));
    }
    for reading in reading {
        reading.await.expect("it reads all");
    }
    publishing.await.expect("it publishes");
    assert_eq!(metric(&there, "hubcast_gaps_total").await, 0.0);
    let reads = metric(&there, "hubcast_history_reads_total").await;
    assert!(reads < 60.0, "{reads} reads for six that joined");
}

#[tokio::test]
async fn a_cached_channel_begins_with_its_last_event() {
    in_each(async |here, there| {
        let (mut client, empty) = subscribe(there, "price", None).await;
        assert_eq!(empty["recovered"], false);
        let told =
            |cursor: &str, number: u32| json!({"type": "event", "channel": "price", "cursor": cursor, "data": number});
        let first = publish(here, "price", 1).await;
        client.expect(&told(&first, 1)).await;
        let second = publish(here, "price", 2).await;
        client.expect(&told(&second, 2)).await;

        let (mut late, subscribed) = subscribe(there, "price", None).await;
        assert_eq!((&subscribed["cursor"], &subscribed["recovered"]), (&json!(first), &json!(false)));
        late.expect(&told(&second, 2)).await;
        // Who has it already is not told it again.
        let (mut back, subscribed) = subscribe(there, "price", Some(&second)).await;
        assert_eq!((&subscribed["cursor"], &subscribed["recovered"]), (&json!(second), &json!(true)));
        let third = publish(here, "price", 3).await;
        late.expect(&told(&third, 3)).await;
        back.expect(&told(&third, 3)).await;
    })
    .await;
}

#[tokio::test]
async fn many_that_come_back_at_once_cost_few_reads() {
    let redis = Redis::start().await;
    let gateways = world(Some(&redis)).await;
    let first = publish(&gateways[0], CHANNEL, 0).await;
    for number in 1..=10 {
        publish(&gateways[0], CHANNEL, number).await;
    }
    let before = metric(&gateways[1], "hubcast_history_reads_total").await;
    let mut clients = Vec::new();
    for _ in 0..200 {
        clients.push(Client::connect(&gateways[1]).await);
    }
    // They have all asked before the channel is confirmed: one read serves them, one more is what was asked for meanwhile.
    redis.freeze();
    for client in &mut clients {
        client.send(&json!({"type": "subscribe", "channel": CHANNEL, "after": first})).await;
    }
    for client in &mut clients {
        client.send(&json!({"type": "ping"})).await;
        client.expect(&json!({"type": "pong"})).await;
    }
    redis.thaw();
    for client in &mut clients {
        assert_eq!(client.json().await["recovered"], true);
        for number in 1..=10 {
            assert_eq!(client.json().await["data"], number);
        }
    }
    await_metric(&gateways[1], r#"hubcast_recoveries_total{recovered="true"}"#, 200.0).await;
    let reads = metric(&gateways[1], "hubcast_history_reads_total").await - before;
    assert!(reads <= 2.0, "{reads} reads for 200 clients");
}

/// What README says of the script, by a client that is not ours.
#[tokio::test]
async fn a_backend_publishes_by_the_script_itself() {
    let redis = Redis::start().await;
    let gateways = world(Some(&redis)).await;
    let (mut client, _) = subscribe(&gateways[0], CHANNEL, None).await;
    let script = publish_script();
    let keys = ["ws:history:h:1", "ws:history_top:h:1", "ws:history_answer:h:1 k"];
    let arguments = ["20", "600000", "86400000", "123456789", "PUBLISH", "hub:h:1", "7", "300000"];
    let call = [&["EVAL", &script, "3"][..], &keys, &arguments].concat();
    let cursor: String = redis.query(&call).await.expect("a cursor");
    client.expect(&event(&cursor, 7)).await;
    assert_eq!(redis.query::<Vec<String>>(&call).await.expect("the same, in a list"), std::slice::from_ref(&cursor));
    let next = publish(&gateways[1], CHANNEL, 8).await;
    client.expect(&event(&next, 8)).await;
    // Past the history: delivered, and outside of it.
    redis.command(&["PUBLISH", "hub:h:1", "9"]).await;
    client.expect(&json!({"type": "event", "channel": CHANNEL, "data": 9})).await;
    let last = publish(&gateways[1], CHANNEL, 10).await;
    client.expect(&event(&last, 10)).await;
    assert_eq!(metric(&gateways[0], "hubcast_gaps_total").await, 0.0);
}

/// The entry is appended, and the script fails after that: nobody may be told that nothing was sent.
#[tokio::test]
async fn a_script_that_fails_half_way_has_an_unknown_outcome() {
    let redis = Redis::start().await;
    let gateways = world(Some(&redis)).await;
    publish(&gateways[0], CHANNEL, 1).await;
    redis.command(&["ACL", "SETUSER", "default", "resetchannels", "&hub:__*"]).await;
    let answer = http(&gateways[0], &format!("POST /api/publish/{CHANNEL}"), "", b"2").await;
    assert_eq!((answer.status, &answer.json()["error"]["outcome"]), (504, &json!("unknown")), "{}", answer.json());
    let history = http(&gateways[0], &format!("GET /api/history/{CHANNEL}"), "", b"").await.json();
    assert_eq!(history["events"].as_array().unwrap().len(), 2);
    // Where nothing ran, nothing was sent.
    redis.command(&["CONFIG", "SET", "maxmemory", "1"]).await;
    let answer = http(&gateways[0], &format!("POST /api/publish/{CHANNEL}"), "", b"3").await;
    assert_eq!(answer.status, 503, "{}", answer.json());
    redis.command(&["CONFIG", "SET", "maxmemory", "0"]).await;
    let history = http(&gateways[0], &format!("GET /api/history/{CHANNEL}"), "", b"").await.json();
    assert_eq!(history["events"].as_array().unwrap().len(), 2);
}

/// Somebody emptied the script cache: those who publish then are told that nothing was sent, and the next ones publish.
#[tokio::test]
async fn a_script_that_redis_forgot_is_loaded_again() {
    let redis = Redis::start().await;
    let gateways = world(Some(&redis)).await;
    publish(&gateways[0], CHANNEL, 1).await;
    redis.command(&["SCRIPT", "FLUSH"]).await;
    let refused = http(&gateways[0], &format!("POST /api/publish/{CHANNEL}"), "", b"2").await;
    assert_eq!(refused.status, 503, "{}", refused.json());
    let last = publish(&gateways[0], CHANNEL, 3).await;
    let answer = http(&gateways[0], &format!("GET /api/history/{CHANNEL}"), "", b"").await.json();
    assert_eq!((answer["events"].as_array().unwrap().len(), &answer["cursor"]), (2, &json!(last)));
}
