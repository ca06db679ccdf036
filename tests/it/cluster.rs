//! Looking at connections and acting on them wherever they live, from whichever instance is asked.

use std::time::{Duration, Instant};

use futures_util::future::join_all;
use hubcast::gateway::Gateway;
use serde_json::{Value, json};

use crate::binary::Binary;
use crate::harness::{Client, Redis, await_metric, eventually, gateway, http, ready};
use crate::proxy::Proxy;

async fn three(redis: &Redis) -> [Gateway; 3] {
    let gateways = [(); 3].map(|()| gateway(&[("HUBCAST_REDIS_URL", &redis.url())]));
    for gateway in &gateways {
        ready(gateway).await;
        eventually("all three to know each other", async || {
            let answer = http(gateway, "GET /api/instances", "", b"").await;
            (answer.status == 200 && answer.json()["instances"].as_array()?.len() == 3).then_some(())
        })
        .await;
    }
    gateways
}

async fn user(gateway: &Gateway, user: &str, channel: &str) -> (Client, String) {
    let mut client = Client::open(gateway, &format!("/ws?user={user}"), Some("hubcast.v1")).await;
    let id = client.json().await["connection_id"].as_str().unwrap().to_owned();
    client.send(&json!({"type": "subscribe", "channel": channel})).await;
    client.expect(&json!({"type": "subscribed", "channel": channel})).await;
    (client, id)
}

async fn post(gateway: &Gateway, path: &str, body: &Value) -> (u16, Value) {
    let answer = http(gateway, &format!("POST {path}"), "", body.to_string().as_bytes()).await;
    (answer.status, answer.json())
}

fn ids(list: &Value) -> Vec<String> {
    let connections = list["connections"].as_array().unwrap();
    connections.iter().map(|connection| connection["connection_id"].as_str().unwrap().to_owned()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_are_listed_and_paged_over_all_instances() {
    let redis = Redis::start().await;
    let gateways = three(&redis).await;
    let mut clients = Vec::new();
    for (at, gateway) in gateways.iter().cycle().take(9).enumerate() {
        let name = if at % 2 == 0 { "even" } else { "odd" };
        clients.push(user(gateway, name, &format!("c{}", at % 3)).await);
    }
    for gateway in &gateways {
        let (mut seen, mut token) = (Vec::new(), String::new());
        loop {
            let page = http(gateway, &format!("GET /api/connections?limit=2{token}"), "", b"").await.json();
            assert!(page["connections"].as_array().unwrap().len() <= 2);
            seen.extend(ids(&page));
            match page["page"].as_str() {
                Some(next) => token = format!("&page={next}"),
                None => break,
            }
        }
        let mut expected: Vec<_> = clients.iter().map(|(_, id)| id.clone()).collect();
        expected.sort_by_key(|id| seen.iter().position(|other| other == id));
        assert_eq!(seen, expected, "each once");
        let odd = http(gateway, "GET /api/connections?user=odd", "", b"").await.json();
        assert_eq!(odd["connections"].as_array().unwrap().len(), 4);
        assert!(odd["connections"].as_array().unwrap().iter().all(|connection| connection["user"] == "odd"));
        let in_c0 = http(gateway, "GET /api/connections?channel=c0", "", b"").await.json();
        assert_eq!(in_c0["connections"].as_array().unwrap().len(), 3);
        let elsewhere = &gateways[2].broker().shared.instance_id;
        let there = http(gateway, &format!("GET /api/connections?instance={elsewhere}"), "", b"").await.json();
        assert_eq!(there["connections"].as_array().unwrap().len(), 3);
        assert!(there.get("unreachable").is_none());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_backend_disconnects_wherever_the_connection_lives() {
    let redis = Redis::start().await;
    let gateways = three(&redis).await;
    let (mut one, id) = user(&gateways[2], "alice", "a").await;
    let body = json!({"connection_id": id, "code": 4000, "reason": "banned"});
    assert_eq!(post(&gateways[0], "/api/disconnect", &body).await, (200, json!({"disconnected": 1})));
    assert_eq!(one.close_frame().await, (4000, "banned".to_owned()));
    let mut bobs = join_all(gateways.iter().map(|gateway| user(gateway, "bob", "b"))).await;
    let (_stays, _) = user(&gateways[1], "carol", "c").await;
    let body = json!({"user": "bob"});
    assert_eq!(post(&gateways[1], "/api/disconnect", &body).await, (200, json!({"disconnected": 3})));
    for (bob, _) in &mut bobs {
        assert_eq!(bob.close_frame().await.0, 3003);
    }
    let mut others = join_all(gateways.iter().map(|gateway| user(gateway, "dave", "d"))).await;
    let body = json!({"channel": "d"});
    assert_eq!(post(&gateways[0], "/api/disconnect", &body).await, (200, json!({"disconnected": 3})));
    for (other, _) in &mut others {
        assert_eq!(other.close_frame().await.0, 3003);
    }
    let nobody = format!("{}-999999999", gateways[1].broker().shared.instance_id);
    for (body, status) in [
        (json!({"connection_id": nobody}), 404),
        (json!({"connection_id": "nowhere-1"}), 404),
        (json!({"user": "nobody"}), 200),
        (json!({"user": "x", "channel": "c"}), 400),
    ] {
        assert_eq!(post(&gateways[0], "/api/disconnect", &body).await.0, status, "{body}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_backend_ends_subscriptions_wherever_they_are() {
    let redis = Redis::start().await;
    let gateways = three(&redis).await;
    let mut alices = join_all(gateways.iter().map(|gateway| user(gateway, "alice", "c"))).await;
    let (mut bob, bob_id) = user(&gateways[2], "bob", "c").await;
    let mut raw = Client::open(&gateways[1], "/ws?channel=c&user=alice", Some("hubcast.raw.v1")).await;
    eventually("the raw one", async || {
        let answer = http(&gateways[1], "GET /api/channels/c", "", b"").await;
        (answer.status == 200 && answer.json()["subscribers"] == 2).then_some(())
    })
    .await;
    let ended = json!({"type": "unsubscribed", "channel": "c", "reason": "backend"});
    let body = json!({"user": "alice", "channel": "c"});
    assert_eq!(post(&gateways[0], "/api/unsubscribe", &body).await, (200, json!({"unsubscribed": 4})));
    for (alice, _) in &mut alices {
        alice.expect(&ended).await;
    }
    assert_eq!(raw.close_frame().await.0, 3003);
    raw.finish().await;
    assert_eq!(post(&gateways[0], "/api/publish", &json!({"channel": "c", "data": 1})).await.0, 200);
    bob.expect(&json!({"type": "event", "channel": "c", "data": 1})).await;
    let body = json!({"connection_id": bob_id, "channel": "c"});
    assert_eq!(post(&gateways[0], "/api/unsubscribe", &body).await, (200, json!({"unsubscribed": 1})));
    bob.expect(&ended).await;
    assert_eq!(post(&gateways[0], "/api/unsubscribe", &body).await.0, 404, "it is not subscribed any more");
    for (alice, _) in &mut alices {
        alice.send(&json!({"type": "ping"})).await;
        alice.expect(&json!({"type": "pong"})).await;
    }
    for gateway in &gateways {
        await_metric(gateway, "hubcast_channels", 0.0).await;
    }
}

/// A real process that is stopped: it is there for the registry, and answers nothing.
#[tokio::test(flavor = "multi_thread")]
async fn an_instance_that_does_not_answer_is_named() {
    let redis = Redis::start().await;
    let gateway = gateway(&[("HUBCAST_REDIS_URL", &redis.url())]);
    ready(&gateway).await;
    let frozen = Binary::start(1000, &[("HUBCAST_REDIS_URL", &redis.url())]);
    let own = gateway.broker().shared.instance_id.to_string();
    let frozen_id = eventually("the other instance", async || {
        let answer = http(&gateway, "GET /api/instances", "", b"").await;
        let instances = answer.json()["instances"].as_array()?.clone();
        instances.iter().map(|i| i["instance_id"].as_str().unwrap().to_owned()).find(|id| *id != own)
    })
    .await;
    eventually("an answer of both", async || {
        let list = http(&gateway, "GET /api/connections", "", b"").await.json();
        list.get("unreachable").is_none().then_some(())
    })
    .await;
    let (_client, id) = user(&gateway, "alice", "c").await;
    frozen.process.signal(rustix::process::Signal::STOP);
    let list = http(&gateway, "GET /api/connections", "", b"").await.json();
    assert_eq!((ids(&list), &list["unreachable"]), (vec![id], &json!([frozen_id])));
    let body = json!({"connection_id": format!("{frozen_id}-1")});
    assert_eq!(post(&gateway, "/api/disconnect", &body).await.0, 503, "it may be there");
    let body = json!({"user": "alice"});
    let answer = post(&gateway, "/api/disconnect", &body).await;
    assert_eq!(answer, (200, json!({"disconnected": 1, "unreachable": [frozen_id]})));
    frozen.process.signal(rustix::process::Signal::CONT);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_takes_two_seconds_at_most_even_where_redis_takes_longer() {
    let redis = Redis::start().await;
    let proxy = Proxy::start(redis.addr()).await;
    let url = format!("redis://{}/", proxy.addr());
    let gateways = [gateway(&[("HUBCAST_REDIS_URL", &url)]), gateway(&[("HUBCAST_REDIS_URL", &redis.url())])];
    for gateway in &gateways {
        eventually("both to know each other", async || {
            let answer = http(gateway, "GET /api/instances", "", b"").await;
            (answer.status == 200 && answer.json()["instances"].as_array()?.len() == 2).then_some(())
        })
        .await;
    }
    // There and back, each of the two questions to the registry takes 1.6 s, which its link allows.
    proxy.delay(Duration::from_millis(800));
    let began = Instant::now();
    let answer = http(&gateways[0], "GET /api/connections", "", b"").await;
    let took = began.elapsed();
    assert_eq!((answer.status, &answer.json()["unreachable"]), (200, &json!(["redis"])), "{answer:?}");
    assert!(took < Duration::from_secs(3), "{took:?}");
}
