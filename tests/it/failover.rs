//! The primary changes, and clients stay: Redis Sentinel, TLS, and servers that are cut off.

use std::time::Duration;

use hubcast::gateway::Gateway;
use serde_json::json;

use crate::binary::{Binary, exchange};
use crate::harness::{
    Client, Redis, await_metric, eventually, gateway, gateway_with, http, metric, publish, ready, soon,
};
use crate::proxy::Proxy;
use crate::sentinels::{MASTER, Sentinels};
use crate::tls_redis::{RIGHTS, TlsRedis};

fn instance(sentinel_urls: &str) -> Gateway {
    instance_with(sentinel_urls, &[])
}

fn instance_with(sentinel_urls: &str, env: &[(&str, &str)]) -> Gateway {
    let sentinel = [
        ("HUBCAST_REDIS_URL", sentinel_urls),
        ("HUBCAST_REDIS_MODE", "sentinel"),
        ("HUBCAST_REDIS_SENTINEL_MASTER", MASTER),
    ];
    gateway(&[&sentinel, env].concat())
}

/// Publishes until Redis takes it.
async fn publish_at_last(gateway: &Gateway, channel: &str, payload: &[u8]) {
    eventually("a publish to succeed", async || {
        let answer = http(gateway, &format!("POST /api/publish/{channel}"), "", payload).await;
        (answer.status == 200).then_some(())
    })
    .await;
}

/// The next frames: a gap, once the channel is live again, then the event.
async fn expect_repaired(client: &mut Client, channel: &str, data: u32) {
    client.expect(&json!({"type": "gap", "channel": channel, "reason": "upstream"})).await;
    client.expect(&json!({"type": "event", "channel": channel, "data": data})).await;
}

/// Instances that followed later may have published at the old primary: a gap more when all have followed.
async fn expect_second_gap(client: &mut Client, channel: &str) {
    client.expect(&json!({"type": "gap", "channel": channel, "reason": "upstream"})).await;
}

/// Every instance listens to this primary now, and the channel's clients are told the gap.
async fn await_repair(sentinels: &mut Sentinels, new: std::net::SocketAddr, instances: i64) {
    eventually("both to listen to the new primary", async || {
        (sentinels.node(new).numsub("hub:c").await == instances).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sentinel_failover_costs_a_gap_and_no_client() {
    let mut sentinels = Sentinels::start_with_password("canary").await;
    // The nodes' password goes with the addresses of the sentinels, which want none themselves.
    let urls = sentinels.urls().replace("redis://", "redis://:canary@");
    let gateways = [instance(&urls), instance(&urls)];
    let mut clients = Vec::new();
    for gateway in &gateways {
        ready(gateway).await;
        clients.push(Client::subscribed(gateway, "c").await);
    }
    publish(&gateways[0], "c", b"1").await;
    for client in &mut clients {
        client.expect(&json!({"type": "event", "channel": "c", "data": 1})).await;
    }
    eventually("a sentinel that knows whose link it has", async || {
        sentinels.clients().await.contains("name=hubcast-").then_some(())
    })
    .await;
    let old = sentinels.kill_primary().await;
    let new = sentinels.await_failover(old).await;
    let decided = std::time::Instant::now();
    await_repair(&mut sentinels, new, 2).await;
    let followed = decided.elapsed();
    publish_at_last(&gateways[1], "c", b"2").await;
    for client in &mut clients {
        expect_repaired(client, "c", 2).await;
        expect_second_gap(client, "c").await;
    }
    // It comes back as a replica; nobody goes there.
    sentinels.node(old).restart().await;
    sentinels.await_role(old, "slave").await;
    publish(&gateways[0], "c", b"3").await;
    for client in &mut clients {
        client.expect(&json!({"type": "event", "channel": "c", "data": 3})).await;
    }
    for gateway in &gateways {
        assert_eq!(http(gateway, "GET /api/instances", "", b"").await.json()["instances"].as_array().unwrap().len(), 2);
        assert_eq!(metric(gateway, "hubcast_connections").await, 1.0);
    }
    crate::observe::fault(
        "redis failover (sentinel)",
        Some(followed),
        followed,
        "both instances follow, clients stay and are told a gap",
    );
}

/// Publications, numbered from 1, and those that Redis has acknowledged.
#[derive(Default)]
struct Numbers {
    last: u64,
    acknowledged: Vec<u64>,
}

impl Numbers {
    /// Publishes until so many more are acknowledged.
    async fn publish(&mut self, gateways: &[Gateway], count: usize) {
        let enough = self.acknowledged.len() + count;
        let mut interval = tokio::time::interval(Duration::from_millis(10));
        let publishes = async {
            while self.acknowledged.len() < enough {
                interval.tick().await;
                self.last += 1;
                let gateway = &gateways[self.last as usize % gateways.len()];
                let answer = http(gateway, "POST /api/publish/c", "", self.last.to_string().as_bytes()).await;
                if answer.status == 200 {
                    self.acknowledged.push(self.last);
                }
            }
        };
        soon("publishes to succeed", publishes).await;
    }
}

/// The numbers from 1 that a client is told; each that was acknowledged is there, or a gap is in its place.
async fn expect_all(client: &mut Client, acknowledged: &[u64], user: &str) {
    let (mut last, mut has_gap) = (0, false);
    loop {
        let frame = client.json().await;
        match frame["type"].as_str().unwrap() {
            "gap" => has_gap = true,
            "event" if frame["data"] == "end" => break,
            "event" => {
                let this = frame["data"].as_u64().unwrap();
                assert!(this > last, "{user}: {this} after {last}");
                let is_missed = acknowledged.iter().any(|number| last < *number && *number < this);
                assert!(!is_missed || has_gap, "{user}: {this} after {last} without a gap, of {acknowledged:?}");
                (last, has_gap) = (this, false);
            }
            other => panic!("{user}: {other}: {frame}"),
        }
    }
    assert!(has_gap || acknowledged.last().is_none_or(|number| *number <= last), "{user}: the end after {last}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sentinel_failover_keeps_history_and_presence_or_says_what_is_lost() {
    let mut sentinels = Sentinels::start().await;
    let rules = ("HUBCAST_CHANNEL_RULES", r#"[{"match":"c","presence":true,"history":{"size":1000,"ttl":"1m"}}]"#);
    let gateways = [(); 2].map(|()| instance_with(&sentinels.urls(), &[rules]));
    let mut clients = Vec::new();
    for (gateway, user) in gateways.iter().zip(["alice", "bob"]) {
        ready(gateway).await;
        let path = format!("/ws?channels=c&user={user}");
        let mut client = Client::open(gateway, &path, None).await;
        while client.json().await != json!({"type": "join", "channel": "c", "user": user}) {}
        clients.push(client);
    }
    clients[0].expect(&json!({"type": "join", "channel": "c", "user": "bob"})).await;
    let mut numbers = Numbers::default();
    numbers.publish(&gateways, 50).await;
    let old = sentinels.kill_primary().await;
    let new = sentinels.await_failover(old).await;
    await_repair(&mut sentinels, new, 2).await;
    numbers.publish(&gateways, 50).await;
    for gateway in &gateways {
        eventually("both to be there", async || {
            let answer = http(gateway, "GET /api/presence/c?limit=0", "", b"").await;
            (answer.status == 200 && answer.json()["users"] == 2 && answer.json()["connections"] == 2).then_some(())
        })
        .await;
    }
    publish_at_last(&gateways[0], "c", b"\"end\"").await;
    for (client, user) in clients.iter_mut().zip(["alice", "bob"]) {
        expect_all(client, &numbers.acknowledged, user).await;
    }
    // Whoever would have been taken for gone is told of before this, and its debounce is 5 s.
    let mut carol = Client::open(&gateways[1], "/ws?channels=c&user=carol", None).await;
    while carol.json().await != json!({"type": "join", "channel": "c", "user": "carol"}) {}
    drop(carol);
    for client in &mut clients {
        for kind in ["join", "leave"] {
            client.expect(&json!({"type": kind, "channel": "c", "user": "carol"})).await;
        }
    }
}

/// Its connections stay open, so only the sentinels tell.
#[tokio::test(flavor = "multi_thread")]
async fn a_primary_that_freezes_is_left_as_soon_as_the_sentinels_have_another() {
    let mut sentinels = Sentinels::start().await;
    let gateway = instance(&sentinels.urls());
    ready(&gateway).await;
    let mut client = Client::subscribed(&gateway, "c").await;
    let old = sentinels.freeze_primary().await;
    let new = sentinels.await_failover(old).await;
    await_repair(&mut sentinels, new, 1).await;
    publish_at_last(&gateway, "c", b"1").await;
    expect_repaired(&mut client, "c", 1).await;
    expect_second_gap(&mut client, "c").await;
    sentinels.node(old).thaw();
    sentinels.await_role(old, "slave").await;
    publish(&gateway, "c", b"2").await;
    client.expect(&json!({"type": "event", "channel": "c", "data": 2})).await;
}

/// A process of its own, because the trusted authorities come from its environment.
#[tokio::test(flavor = "multi_thread")]
async fn redis_is_reached_through_tls_with_a_user_and_only_if_its_certificate_is_good() {
    let redis = TlsRedis::start().await;
    let start = |ca: std::path::PathBuf| {
        let ca = ca.to_str().unwrap().to_owned();
        let rules = ("HUBCAST_CHANNEL_RULES", r#"[{"match":"*","presence":true,"history":{"size":9,"ttl":"1m"}}]"#);
        Binary::start(1000, &[("HUBCAST_REDIS_URL", &redis.url()), ("SSL_CERT_FILE", &ca), rules])
    };
    let (trusting, distrusting) = (start(redis.ca_file()), start(redis.other_ca_file()));
    let is_ready = async |binary: &Binary| {
        let answer = exchange(binary.internal, "GET /readyz HTTP/1.1\r\nHost: h\r\n\r\n").await?;
        answer.starts_with("HTTP/1.1 200").then_some(())
    };
    eventually("the one that trusts it to be ready", async || is_ready(&trusting).await).await;
    let request = "POST /api/publish/c HTTP/1.1\r\nHost: h\r\nContent-Length: 1\r\n\r\n1";
    assert!(exchange(trusting.internal, request).await.unwrap().starts_with("HTTP/1.1 200"));
    eventually("three connections that say who they are", async || {
        let clients = redis.command(&["CLIENT", "LIST"]);
        (clients.matches("name=hubcast-").count() == 3 && clients.contains("user=hub")).then_some(())
    })
    .await;
    assert_eq!(is_ready(&distrusting).await, None);
    // With no more rights than these, history, presence and the registry work too.
    let mut client = Client::try_open_at(trusting.public, "/ws?user=alice&channels=c", None).await.unwrap();
    for expected in ["welcome", "subscribed", "join"] {
        assert_eq!(client.json().await["type"], expected);
    }
    assert!(include_str!("../../README.md").contains(RIGHTS));
    eventually("the connection in the registry", async || {
        redis.command(&["SCARD", "ws:instances"]).contains('1').then_some(())
    })
    .await;
}

/// A gateway behind a proxy of its own, whose probes are quick.
async fn behind(proxy: &Proxy, probe_interval: Duration) -> Gateway {
    let url = format!("redis://{}/", proxy.addr());
    let gateway = gateway_with(&[("HUBCAST_REDIS_URL", &url), ("HUBCAST_PUBLISH_TIMEOUT", "500ms")], |config| {
        config.redis_probe_interval = probe_interval;
    });
    ready(&gateway).await;
    gateway
}

#[tokio::test(flavor = "multi_thread")]
async fn a_partition_is_noticed_and_healed_and_harms_only_who_is_cut_off() {
    let redis = Redis::start().await;
    let mut proxy = Proxy::start(redis.addr()).await;
    let cut_off = behind(&proxy, Duration::from_millis(200)).await;
    let other = gateway(&[("HUBCAST_REDIS_URL", &redis.url())]);
    ready(&other).await;
    let mut clients = [Client::subscribed(&cut_off, "c").await, Client::subscribed(&other, "c").await];
    for (round, is_silent) in [(1, true), (2, false)] {
        // Silent: packets vanish and connections stay. Otherwise they are refused.
        let began = std::time::Instant::now();
        if is_silent {
            proxy.freeze()
        } else {
            proxy.cut().await
        }
        await_metric(&cut_off, r#"hubcast_redis_link_up{link="subscribe"}"#, 0.0).await;
        let noticed = began.elapsed();
        assert_eq!(http(&cut_off, "GET /readyz", "", b"").await.status, 503);
        publish(&other, "c", round.to_string().as_bytes()).await;
        clients[1].expect(&json!({"type": "event", "channel": "c", "data": round})).await;
        let status = http(&cut_off, "POST /api/publish/c", "", b"0").await.status;
        assert!(matches!(status, 503 | 504), "{status}: not sent, or not known");
        proxy.heal().await;
        let healed = std::time::Instant::now();
        ready(&cut_off).await;
        clients[0].expect(&json!({"type": "gap", "channel": "c", "reason": "upstream"})).await;
        let name = if is_silent { "partition to redis, silent" } else { "partition to redis, refused" };
        crate::observe::fault(
            name,
            Some(noticed),
            healed.elapsed(),
            "probes each 200 ms; 503 meanwhile, the other instance goes on",
        );
        publish(&cut_off, "c", b"9").await;
        for client in &mut clients {
            eventually("the new one", async || (client.json().await["data"] == 9).then_some(())).await;
        }
    }
    proxy.delay(Duration::from_millis(100));
    publish(&other, "c", b"10").await;
    for client in &mut clients {
        client.expect(&json!({"type": "event", "channel": "c", "data": 10})).await;
    }
}

/// At the intervals of a real gateway.
#[tokio::test(flavor = "multi_thread")]
async fn thirty_seconds_of_a_frozen_redis_cost_a_gap() {
    const FROZEN: Duration = Duration::from_secs(30);
    let redis = Redis::start().await;
    let gateway = gateway(&[("HUBCAST_REDIS_URL", &redis.url())]);
    ready(&gateway).await;
    let mut client = Client::subscribed(&gateway, "c").await;
    redis.freeze();
    let frozen = std::time::Instant::now();
    let thaw = tokio::time::sleep(FROZEN);
    assert_eq!(http(&gateway, "POST /api/publish/c", "", b"0").await.status, 504, "the outcome is unknown");
    await_metric(&gateway, r#"hubcast_redis_link_up{link="subscribe"}"#, 0.0).await;
    let noticed = frozen.elapsed();
    assert_eq!(http(&gateway, "GET /readyz", "", b"").await.status, 503);
    client.send(&json!({"type": "ping"})).await;
    client.expect(&json!({"type": "pong"})).await;
    let mut late = Client::connect(&gateway).await;
    late.send(&json!({"type": "subscribe", "channel": "c"})).await;
    thaw.await;
    redis.thaw();
    let thawed = std::time::Instant::now();
    client.expect(&json!({"type": "gap", "channel": "c", "reason": "upstream"})).await;
    late.expect(&json!({"type": "subscribed", "channel": "c"})).await;
    publish_at_last(&gateway, "c", b"1").await;
    for client in [&mut client, &mut late] {
        client.expect(&json!({"type": "event", "channel": "c", "data": 1})).await;
    }
    crate::observe::fault(
        "redis frozen 30 s",
        Some(noticed),
        thawed.elapsed(),
        "504, sockets go on; told a gap, subscribed, and the next publish arrives",
    );
}
