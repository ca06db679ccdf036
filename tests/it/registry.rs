//! What Redis knows of instances and their connections, and that it does not know it for longer than it is true.

use std::collections::BTreeSet;
use std::time::Duration;

use hubcast::gateway::Gateway;
use serde_json::{Value, json};

use crate::binary::Binary;
use crate::harness::{Client, Redis, await_metric, eventually, gateway, gateway_with, http, metric};
use crate::proxy::Proxy;

/// An instance whose lease is short enough to wait for.
fn instance(redis: &Redis) -> Gateway {
    gateway_with(&[("HUBCAST_REDIS_URL", &redis.url())], |config| config.registry_lease = Duration::from_millis(600))
}

async fn keys(redis: &Redis) -> BTreeSet<String> {
    match redis.command(&["KEYS", "ws:*"]).await {
        redis::Value::Array(keys) => keys.into_iter().map(|key| redis::from_redis_value(key).unwrap()).collect(),
        other => panic!("{other:?}"),
    }
}

async fn record(redis: &Redis, key: &str) -> Option<Value> {
    let text: Option<String> = redis::from_redis_value(redis.command(&["GET", key]).await).unwrap();
    text.map(|text| serde_json::from_str(&text).unwrap())
}

async fn await_keys(redis: &Redis, what: &str, expected: &[String]) {
    let expected: BTreeSet<_> = expected.iter().cloned().collect();
    eventually(what, async || {
        let mut keys = keys(redis).await;
        keys.remove("ws:sweeper");
        (keys == expected).then_some(())
    })
    .await;
}

async fn instances(gateway: &Gateway) -> Vec<Value> {
    let answer = http(gateway, "GET /api/instances", "", b"").await;
    assert_eq!(answer.status, 200);
    answer.json()["instances"].as_array().unwrap().clone()
}

fn instance_keys(id: &str) -> Vec<String> {
    vec![format!("ws:instance:{id}"), "ws:instances".to_owned()]
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_is_in_redis_for_as_long_as_it_lives() {
    let redis = Redis::start().await;
    let gateway = instance(&redis);
    let id = gateway.broker().shared.instance_id.to_string();
    await_keys(&redis, "the instance", &instance_keys(&id)).await;
    let day_ms = 24 * 60 * 60 * 1000;
    eventually("a list that ends when nobody is left", async || {
        redis.query::<i64>(&["PTTL", "ws:instances"]).await.ok().filter(|ttl_ms| (1..=day_ms).contains(ttl_ms))
    })
    .await;
    let mut alice = Client::open(&gateway, "/ws?user=alice", Some("hubcast.v1")).await;
    let connection_id = alice.json().await["connection_id"].as_str().unwrap().to_owned();
    let nobody = Client::connect(&gateway).await;
    let key = format!("ws:conn:{connection_id}");
    let alice_is = eventually("her record", async || record(&redis, &key).await).await;
    assert_eq!((&alice_is["v"], &alice_is["instance"], &alice_is["user"]), (&json!(1), &json!(id), &json!("alice")));
    assert!(alice_is["remote"].as_str().unwrap().starts_with("127.0.0.1:"));
    let now_ms = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_millis() as u64;
    assert!(alice_is["connected_at_ms"].as_u64().unwrap().abs_diff(now_ms) < 60_000);
    let lives_ms = async || -> i64 { redis::from_redis_value(redis.command(&["PTTL", &key]).await).unwrap() };
    let mut last = lives_ms().await;
    assert!((1..=2400).contains(&last), "four leases at most, not {last} ms");
    eventually("its renewal", async || {
        let now = lives_ms().await;
        (std::mem::replace(&mut last, now) < now).then_some(())
    })
    .await;
    eventually("the count", async || (instances(&gateway).await[0]["connections"] == 2).then_some(())).await;
    drop(alice);
    drop(nobody);
    await_keys(&redis, "both to be gone", &instance_keys(&id)).await;
    let _left_open = Client::connect(&gateway).await;
    gateway.drain().await;
    await_keys(&redis, "an empty registry after the drain", &[]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_killed_instance_left_is_swept_up_by_another() {
    let redis = Redis::start().await;
    let survivors = [instance(&redis), instance(&redis)];
    let killed = Binary::start(1000, &[("HUBCAST_REDIS_URL", &redis.url())]);
    let mut clients = Vec::new();
    for _ in 0..20 {
        let url = format!("ws://{}/ws", killed.public);
        clients.push(tokio_tungstenite::connect_async(url).await.unwrap());
    }
    let all = eventually("three instances", async || {
        let all = instances(&survivors[0]).await;
        let dying = all.iter().find(|instance| instance["connections"] == 20)?.clone();
        (all.len() == 3).then_some(dying)
    });
    // Its count is in the record that it writes every ten seconds; the entries are there at once.
    let id = all.await["instance_id"].as_str().unwrap().to_owned();
    eventually("its connections", async || (keys(&redis).await.len() >= 20 + 5).then_some(())).await;
    killed.process.signal(rustix::process::Signal::KILL);
    let began = std::time::Instant::now();
    // The rest of its lease is over at once.
    redis.command(&["DEL", &format!("ws:instance:{id}")]).await;
    let left = survivors.each_ref().map(|gateway| gateway.broker().shared.instance_id.to_string());
    let mut expected: Vec<_> = left.iter().flat_map(|id| instance_keys(id)).collect();
    expected.dedup();
    await_keys(&redis, "what it left to be gone", &expected).await;
    assert_eq!(instances(&survivors[1]).await.len(), 2);
    crate::observe::fault(
        "instance killed",
        None,
        began.elapsed(),
        "its 20 connections leave the registry, its lease being over",
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn an_instance_that_was_taken_for_dead_registers_anew() {
    let redis = Redis::start().await;
    let gateway = instance(&redis);
    let _client = Client::connect(&gateway).await;
    let known = eventually("the connection", async || {
        let mut keys = keys(&redis).await;
        keys.remove("ws:sweeper");
        // The instance, the list of instances, the connection, the list of connections.
        (keys.len() == 4).then(|| keys.into_iter().collect::<Vec<_>>())
    })
    .await;
    // The second time nothing that was on its way can help.
    for _ in 0..2 {
        redis.command(&["FLUSHALL"]).await;
        await_keys(&redis, "everything to be back", &known).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_registry_is_written_anew_when_redis_comes_back_empty() {
    let mut redis = Redis::start().await;
    let gateway = instance(&redis);
    let gone = Client::connect(&gateway).await;
    let _stays = Client::connect(&gateway).await;
    let before = eventually("both", async || Some(keys(&redis).await).filter(|keys| keys.len() >= 5)).await;
    redis.kill();
    eventually("the loss", async || {
        (metric(&gateway, r#"hubcast_redis_link_up{link="registry"}"#).await == 0.0).then_some(())
    })
    .await;
    drop(gone);
    assert_eq!(http(&gateway, "GET /api/instances", "", b"").await.status, 503);
    let _new = Client::connect(&gateway).await;
    redis.restart().await;
    let after = eventually("two connections again", async || {
        let keys = keys(&redis).await;
        (keys.iter().filter(|key| key.starts_with("ws:conn:")).count() == 2).then_some(keys)
    })
    .await;
    assert_eq!(metric(&gateway, r#"hubcast_redis_reconnects_total{link="registry"}"#).await, 1.0);
    assert_eq!(before.intersection(&after).filter(|key| key.starts_with("ws:conn:")).count(), 1, "one of the old ones");
}

/// Its own lifetime is two minutes.
#[tokio::test(flavor = "multi_thread")]
async fn who_is_closed_while_redis_cannot_be_reached_is_not_in_it_afterwards() {
    let redis = Redis::start().await;
    let mut proxy = Proxy::start(redis.addr()).await;
    let gateway = gateway(&[("HUBCAST_REDIS_URL", &format!("redis://{}/", proxy.addr()))]);
    let mut gone = Client::open(&gateway, "/ws", None).await;
    let mut stays = Client::open(&gateway, "/ws", None).await;
    let mut key = [String::new(), String::new()];
    for (key, client) in key.iter_mut().zip([&mut gone, &mut stays]) {
        *key = format!("ws:conn:{}", client.json().await["connection_id"].as_str().unwrap());
        eventually("its record", async || record(&redis, key).await).await;
    }
    proxy.cut().await;
    await_metric(&gateway, r#"hubcast_redis_link_up{link="registry"}"#, 0.0).await;
    drop(gone);
    await_metric(&gateway, "hubcast_connections", 1.0).await;
    proxy.heal().await;
    eventually("the record to be gone", async || record(&redis, &key[0]).await.is_none().then_some(())).await;
    assert!(record(&redis, &key[1]).await.is_some());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_user_has_one_printable_name() {
    let gateway = gateway_with(&[], |_| {});
    let long = format!("/ws?user={}", "x".repeat(129));
    for path in ["/ws?user=a&user=b", "/ws?user=a%0Ab", long.as_str()] {
        match Client::try_open(&gateway, path, None).await.err() {
            Some(tokio_tungstenite::tungstenite::Error::Http(response)) => assert_eq!(response.status(), 400, "{path}"),
            other => panic!("{path}: {other:?}"),
        }
    }
    let mut client = Client::open(&gateway, &long[..long.len() - 1], None).await;
    assert_eq!(client.json().await["type"], "welcome");
}

#[tokio::test(flavor = "multi_thread")]
async fn without_redis_the_instance_knows_itself() {
    let gateway = gateway_with(&[], |_| {});
    let _client = Client::connect(&gateway).await;
    let all = instances(&gateway).await;
    assert_eq!(all.len(), 1);
    assert_eq!(all[0]["instance_id"], *gateway.broker().shared.instance_id);
    assert_eq!(all[0]["connections"], 1);
}
