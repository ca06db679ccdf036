//! A rolling deploy: real processes that replace each other, and instances of different builds side by side.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use hubcast::gateway::Gateway;
use parking_lot::Mutex;
use rustix::process::Signal;
use serde_json::{Value, json};
use tokio_tungstenite::tungstenite::Message;

use crate::binary::Binary;
use crate::harness::{Client, Redis, await_metric, eventually, gateway, http, publish, ready, soon};

const RULES: (&str, &str) =
    ("HUBCAST_CHANNEL_RULES", r#"[{"match":"c","presence":true,"history":{"size":1000,"ttl":"1m"}}]"#);

const INSTANCES: usize = 3;
const USERS: usize = 30;

/// Instances that take clients.
type Fleet = Arc<Mutex<Vec<SocketAddr>>>;

fn start(redis: &Redis) -> Binary {
    let url = redis.url();
    let env = [("HUBCAST_REDIS_URL", url.as_str()), ("HUBCAST_DRAIN_TIME", "1s"), RULES];
    Binary::start(1000, &env)
}

/// Tries one instance after the other.
async fn connect(first: usize, fleet: &Fleet, path: &str) -> Client {
    let mut interval = tokio::time::interval(Duration::from_millis(10));
    for attempt in first.. {
        interval.tick().await;
        let addr = {
            let fleet = fleet.lock();
            fleet[attempt % fleet.len()]
        };
        if let Ok(client) = Client::try_open_at(addr, path, None).await {
            return client;
        }
    }
    unreachable!("it counts up")
}

/// A client as a browser has it: whenever it is closed it comes back elsewhere, and misses nothing. From the publication
/// `settled` on nobody joins or leaves; it ends with `end`, and gives how often it was connected.
async fn user(number: usize, fleet: Fleet) -> usize {
    let (mut is_settled, mut last, mut after) = (false, None, None);
    let path = format!("/ws?user=u{number}");
    for connections in 1.. {
        let mut client = soon("an instance that takes it", connect(number + connections, &fleet, &path)).await;
        let mut subscribe = json!({"type": "subscribe", "channel": "c"});
        if let Some(after) = after.take() {
            subscribe["after"] = after;
        }
        client.send(&subscribe).await;
        loop {
            let text = match client.message().await {
                Message::Text(text) => text,
                Message::Close(frame) => {
                    assert_eq!(u16::from(frame.expect("a code").code), 1012);
                    client.finish().await;
                    break;
                }
                other => panic!("{other:?}"),
            };
            let mut frame: Value = serde_json::from_str(&text).unwrap();
            if frame.get("cursor").is_some() {
                after = Some(frame["cursor"].take());
            }
            match frame["type"].as_str().unwrap() {
                "event" if frame["data"] == "end" => return connections,
                "event" if frame["data"] == "settled" => is_settled = true,
                "event" => {
                    let this = frame["data"].as_u64().unwrap();
                    assert!(last.is_none_or(|last| this == last + 1), "{this} after {last:?}");
                    last = Some(this);
                }
                "join" | "leave" => assert!(!is_settled, "they only move: {frame}"),
                "subscribed" => assert_eq!(frame["recovered"], connections > 1),
                "welcome" | "draining" => {}
                other => panic!("{other}: {frame}"),
            }
        }
    }
    unreachable!("it counts up")
}

/// Publishes numbers until it is told to stop, then the end.
async fn publish_numbers(gateway: &Gateway, is_over: &AtomicBool) {
    let mut interval = tokio::time::interval(Duration::from_millis(5));
    let mut number = 0;
    while !is_over.load(Ordering::Acquire) {
        interval.tick().await;
        number += 1;
        publish(gateway, "c", number.to_string().as_bytes()).await;
    }
    publish(gateway, "c", b"\"end\"").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rolling_deploy_moves_everybody_who_miss_nothing_and_presence_says_nothing() {
    let redis = Redis::start().await;
    let observer = Arc::new(gateway(&[("HUBCAST_REDIS_URL", &redis.url()), RULES]));
    ready(&observer).await;
    let mut instances: VecDeque<_> = (0..INSTANCES).map(|_| start(&redis)).collect();
    let fleet: Fleet = Arc::new(Mutex::new(instances.iter().map(|instance| instance.public).collect()));
    let is_over = Arc::new(AtomicBool::new(false));
    let users: Vec<_> = (0..USERS).map(|number| tokio::spawn(user(number, Arc::clone(&fleet)))).collect();
    let publishing = tokio::spawn({
        let (observer, is_over) = (Arc::clone(&observer), Arc::clone(&is_over));
        async move { publish_numbers(&observer, &is_over).await }
    });
    let all_here = async || {
        eventually("everybody to be there once", async || {
            let there = http(&observer, "GET /api/presence/c?limit=0", "", b"").await.json();
            (there["users"] == USERS && there["connections"] == USERS).then_some(())
        })
        .await;
    };
    all_here().await;
    // After all joins, in the channel's order.
    publish(&observer, "c", b"\"settled\"").await;
    let began = std::time::Instant::now();
    for _ in 0..INSTANCES {
        let new = start(&redis);
        fleet.lock().push(new.public);
        instances.push_back(new);
        let old = instances.pop_front().expect("three are there");
        fleet.lock().retain(|addr| *addr != old.public);
        old.process.signal(Signal::TERM);
        let (status, output) = old.end().await;
        assert!(status.success(), "{status}");
        assert!(output.contains("0 cut off"), "{output}");
        all_here().await;
    }
    is_over.store(true, Ordering::Release);
    soon("the end of the publications", publishing).await.unwrap();
    let mut moves = 0;
    for user in users {
        moves += soon("a user to see the end", user).await.unwrap() - 1;
    }
    assert!(moves >= USERS, "each instance was replaced, and its users moved: {moves}");
    let left = http(&observer, "GET /api/instances", "", b"").await.json();
    assert_eq!(left["instances"].as_array().unwrap().len(), INSTANCES + 1);
    crate::observe::fault(
        "rolling deploy",
        None,
        began.elapsed(),
        "three instances replaced in turn: every client has every number",
    );
}

/// A newer build writes more into its records, and asks what this one does not know.
#[tokio::test(flavor = "multi_thread")]
async fn an_instance_of_another_build_is_listed_and_harms_nobody() {
    let redis = Redis::start().await;
    let rules = ("HUBCAST_CHANNEL_RULES", r#"[{"match":"h","history":{"size":10,"ttl":"1m"}},{"match":"*"}]"#);
    let gateway = gateway(&[("HUBCAST_REDIS_URL", &redis.url()), rules]);
    ready(&gateway).await;
    let own = gateway.broker().shared.instance_id.to_string();
    eventually("its own record", async || {
        let answer = http(&gateway, "GET /api/instances", "", b"").await;
        (answer.status == 200 && answer.json()["instances"].as_array()?.len() == 1).then_some(())
    })
    .await;
    let began = std::time::Instant::now();
    let record = json!({"v": 2, "connections": 7, "started_at_ms": 1, "version": "9.0.0", "zone": {"name": "b"}});
    redis.command(&["SET", "ws:instance:newer", &record.to_string()]).await;
    redis.command(&["SADD", "ws:instances", "newer"]).await;
    for envelope in [
        json!({"v": 2, "id": 1, "from": "newer", "ask": {"connections": {"limit": 1}}}),
        json!({"v": 1, "id": 2, "from": "newer", "ask": {"teleport": {}}}),
        json!({"v": 1, "id": 3, "from": "newer", "hint": 4}),
        json!([1]),
    ] {
        for channel in ["hub:__control".to_owned(), format!("hub:__control:{own}")] {
            redis.command(&["PUBLISH", &channel, &envelope.to_string()]).await;
        }
    }
    let list = http(&gateway, "GET /api/instances", "", b"").await.json();
    let newer = list["instances"].as_array().unwrap().iter().find(|instance| instance["instance_id"] == "newer");
    assert_eq!(newer.expect("it is listed")["connections"], 7);
    let mut client = Client::subscribed(&gateway, "c").await;
    let answer = http(&gateway, "GET /api/connections", "", b"").await.json();
    assert_eq!((answer["connections"].as_array().unwrap().len(), &answer["unreachable"]), (1, &json!(["newer"])));
    redis.command(&["PUBLISH", "hub:c", "1"]).await;
    client.expect(&json!({"type": "event", "channel": "c", "data": 1})).await;
    foreign_frames_reach_no_client(&redis, &gateway, &mut client).await;
    crate::observe::fault(
        "instance of another build",
        None,
        began.elapsed(),
        "records, questions and frames of a newer build: listed, ignored, named, dropped, and history read at Redis",
    );
}

/// What instances with another version, or other rules, say to each other on a channel.
async fn foreign_frames_reach_no_client(redis: &Redis, gateway: &Gateway, client: &mut Client) {
    let mut link = redis::Client::open(redis.url()).unwrap().get_multiplexed_async_connection().await.unwrap();
    let mut say = async |channel: &str, payload: &[u8]| {
        redis::cmd("PUBLISH").arg(channel).arg(payload).exec_async(&mut link).await.unwrap();
    };
    let mut history = Client::connect(gateway).await;
    history.send(&json!({"type": "subscribe", "channel": "h"})).await;
    assert_eq!(history.json().await["type"], "subscribed");
    publish(gateway, "h", b"1").await;
    assert_eq!(history.json().await["data"], 1);
    // Here, "c" has no presence.
    say("hub:c", b"\xFFhubcast/1 {\"join\":\"alice\"}").await;
    let unreadable: [&[u8]; 4] = [b"\xFFhubcast/2 {}", b"\xFF\x02e 1-1 1-0 {}", b"\xFF\x01e nonsense", b"\xFF\x1F"];
    for frame in unreadable {
        say("hub:c", frame).await;
    }
    // Binary data may begin with the same byte.
    for (data, base64) in [(b"\xFF\xFEx", "//54"), (b"\xFF\x00x", "/wB4")] {
        say("hub:c", data).await;
        client.expect(&json!({"type": "event", "channel": "c", "data_base64": base64})).await;
    }
    await_metric(gateway, r#"hubcast_dropped_total{reason="redis_unreadable"}"#, 4.0).await;
    // A newer build's entry has one field more, and its message another version.
    let top: String = redis.query(&["GET", "ws:history_top:h"]).await.unwrap();
    let (ms, _) = top.split_once('-').unwrap();
    let next = format!("{}-1", ms.parse::<u64>().unwrap() + 1);
    redis.command(&["XADD", "ws:history:h", &next, "p", &top, "e", "2", "zone", "b"]).await;
    redis.command(&["SET", "ws:history_top:h", &next, "KEEPTTL"]).await;
    say("hub:h", &[b"\xFF\x02", format!("e {next} {top} b 2").as_bytes()].concat()).await;
    let read = history.json().await;
    assert_eq!((&read["type"], &read["data"]), (&json!("event"), &json!(2)), "{read}");
}
