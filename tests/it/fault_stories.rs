//! Faults of `fault_world.rs` by themselves, seen closely: what each costs a channel with history.

use std::cell::Cell;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use hubcast::gateway::Gateway;
use serde_json::json;

use crate::harness::{self, Client, Redis, await_metric, eventually, gateway, http, metric, ready, soon};
use crate::history::{event, publish, subscribe};
use crate::observe;
use crate::proxy::Proxy;
use crate::redis_pair::Pair;

const CHANNEL: &str = "h:1";

const RULES: &str = r#"[{"match":"h:*","history":{"size":1000,"ttl":"10m"}},{"match":"*"}]"#;

async fn instance(redis: SocketAddr, env: &[(&str, &str)]) -> Gateway {
    let url = format!("redis://{redis}/");
    let gateway = gateway(&[&[("HUBCAST_CHANNEL_RULES", RULES), ("HUBCAST_REDIS_URL", url.as_str())], env].concat());
    ready(&gateway).await;
    gateway
}

/// Numbers with the cursors that were answered.
async fn published(gateway: &Gateway, numbers: std::ops::Range<u32>) -> Vec<(String, u32)> {
    let mut cursors = Vec::new();
    for number in numbers {
        cursors.push((publish(gateway, CHANNEL, number).await, number));
    }
    cursors
}

/// Publishes a number once; its cursor, if it was acknowledged.
async fn try_publish(gateway: &Gateway, number: u32) -> Option<(String, u32)> {
    let answer = http(gateway, &format!("POST /api/publish/{CHANNEL}"), "", number.to_string().as_bytes()).await;
    let cursor = || answer.json()["results"][0]["cursor"].as_str().expect("a cursor").to_owned();
    (answer.status == 200).then(|| (cursor(), number))
}

async fn expect_all(client: &mut Client, cursors: &[(String, u32)]) {
    for (cursor, number) in cursors {
        client.expect(&event(cursor, *number)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_redis_killed_in_the_middle_of_writes_that_it_logs_loses_nothing() {
    const AFTER: usize = 20;
    let mut pair = Pair::start().await;
    pair.log_writes().await;
    let (here, there) = (instance(pair.redis().addr(), &[]).await, instance(pair.redis().addr(), &[]).await);
    let (mut client, _) = subscribe(&there, CHANNEL, None).await;
    let (is_back, kept) = (Cell::new(None), Cell::new(0));
    let load = async {
        let mut acknowledged = Vec::new();
        for number in 0.. {
            acknowledged.extend(try_publish(&here, number).await);
            kept.set(acknowledged.len());
            if is_back.get().is_some_and(|(before, _)| acknowledged.len() >= before + AFTER) {
                break;
            }
        }
        acknowledged
    };
    let fault = async {
        eventually("some to be acknowledged", async || (kept.get() >= AFTER).then_some(())).await;
        let before = kept.get();
        pair.kill_logged(Duration::from_millis(200)).await;
        is_back.set(Some((before, Instant::now())));
    };
    let (acknowledged, ()) = tokio::join!(load, fault);
    let last = acknowledged.last().expect("there are some").1;
    let mut expected = acknowledged.iter().peekable();
    loop {
        let frame = client.json().await;
        assert_eq!(frame["type"], "event", "{frame}");
        // Of the one that was under way nobody knew.
        match expected.next_if(|(cursor, _)| frame["cursor"] == *cursor) {
            Some((_, number)) => assert_eq!(frame["data"], *number),
            None => assert!(acknowledged.iter().all(|(_, number)| frame["data"] != *number), "{frame}"),
        }
        if frame["data"] == last {
            break;
        }
    }
    assert_eq!(expected.next(), None);
    assert_eq!(metric(&there, "hubcast_gaps_total").await, 0.0);
    let back = is_back.get().expect("it came back").1;
    let what = "killed under load with a log of writes: what was acknowledged comes once and in order, no gap";
    observe::fault("redis comes back as it was", None, back.elapsed(), what);
}

/// What the replica lacks was acknowledged and delivered.
#[tokio::test(flavor = "multi_thread")]
async fn a_replica_promoted_behind_its_primary_is_a_told_gap_for_those_here_and_those_away() {
    let mut pair = Pair::start().await;
    let mut ways = [Proxy::start(pair.redis().addr()).await, Proxy::start(pair.redis().addr()).await];
    let (here, there) = (instance(ways[0].addr(), &[]).await, instance(ways[1].addr(), &[]).await);
    let (mut stayed, _) = subscribe(&there, CHANNEL, None).await;
    let kept = published(&here, 0..3).await;
    let link = pair.copy_and_part().await;
    let lost = published(&here, 3..6).await;
    expect_all(&mut stayed, &[&kept[..], &lost].concat()).await;

    pair.promote().await;
    pair.kill_standby();
    drop(link);
    for way in &mut ways {
        way.lead_to(pair.redis().addr()).await;
    }
    let promoted = Instant::now();
    stayed.expect(&json!({"type": "gap", "channel": CHANNEL, "after": lost[2].0, "reason": "upstream"})).await;
    let told = promoted.elapsed();
    let next = eventually("the new primary to take a publish", async || try_publish(&here, 6).await).await;
    expect_all(&mut stayed, std::slice::from_ref(&next)).await;

    let (mut early, subscribed) = subscribe(&here, CHANNEL, Some(&kept[1].0)).await;
    assert_eq!(subscribed["recovered"], true);
    expect_all(&mut early, &kept[2..]).await;
    let gap = json!({"type": "gap", "channel": CHANNEL, "after": kept[2].0, "next": next.0, "reason": "upstream"});
    early.expect(&gap).await;
    expect_all(&mut early, std::slice::from_ref(&next)).await;
    let (_, subscribed) = subscribe(&here, CHANNEL, Some(&lost[2].0)).await;
    assert_eq!((&subscribed["recovered"], &subscribed["cursor"]), (&json!(false), &json!(next.0)));
    let what = "what it lacked is a gap for those who stayed and those who come back";
    observe::fault("replica promoted behind its primary", Some(told), told, what);
}

/// Redis itself ends the connection of a listener that does not take what is sent.
#[tokio::test(flavor = "multi_thread")]
async fn a_listener_that_redis_gives_up_is_repaired_from_the_stream() {
    let pair = Pair::start().await;
    let mut way = Proxy::start(pair.redis().addr()).await;
    let (here, there) = (instance(pair.redis().addr(), &[]).await, instance(way.addr(), &[]).await);
    let (mut client, _) = subscribe(&there, CHANNEL, None).await;
    let mut flooded = Client::subscribed(&there, "flood").await;
    expect_all(&mut client, &published(&here, 0..3).await).await;
    let told = tokio::spawn(async move { while flooded.json().await["type"] != "gap" {} });
    way.freeze();
    let held_up = published(&here, 3..8).await;
    pair.overflow("hub:flood").await;
    let not_sent = published(&here, 8..10).await;
    way.heal().await;
    let healed = Instant::now();
    expect_all(&mut client, &[held_up, not_sent, published(&here, 10..12).await].concat()).await;
    let over = healed.elapsed();
    assert_eq!(metric(&there, r#"hubcast_redis_reconnects_total{link="subscribe"}"#).await, 1.0);
    // Without history there is nothing to repair it from.
    soon("the gap of the channel that was flooded", told).await.expect("it is told");
    assert_eq!(metric(&there, "hubcast_gaps_total").await, 1.0);
    let what = "redis logged it; what was held up, and what was not sent, comes from the stream; a gap where there is no history";
    observe::fault("output buffer of redis overflows", None, over, what);
}

/// A way to a gateway's clients.
struct Way<'a>(&'a Proxy, &'a Gateway);

impl harness::Instance for Way<'_> {
    fn public(&self) -> SocketAddr {
        self.0.addr()
    }

    fn internal(&self) -> SocketAddr {
        self.1.internal_addr()
    }
}

/// The way to a client goes silent, and neither side is told.
#[tokio::test(flavor = "multi_thread")]
async fn a_client_whose_way_is_half_open_is_let_go_and_misses_nothing_when_it_comes_back() {
    let redis = Redis::start().await;
    let env = [("HUBCAST_PING_INTERVAL", "300ms"), ("HUBCAST_PONG_TIMEOUT", "300ms")];
    let gateway = instance(redis.addr(), &env).await;
    let proxy = Proxy::start(gateway.addr()).await;
    let way = Way(&proxy, &gateway);
    let (mut client, _) = subscribe(&way, CHANNEL, None).await;
    let seen = published(&gateway, 0..3).await;
    expect_all(&mut client, &seen).await;
    proxy.abandon();
    let began = Instant::now();
    let missed = published(&gateway, 3..6).await;
    await_metric(&gateway, r#"hubcast_connections_closed_total{reason="timeout"}"#, 1.0).await;
    let noticed = began.elapsed();
    await_metric(&gateway, "hubcast_connections", 0.0).await;
    let missed = [missed, published(&gateway, 6..8).await].concat();
    let (mut client, subscribed) = subscribe(&way, CHANNEL, Some(&seen[2].0)).await;
    assert_eq!((&subscribed["recovered"], &subscribed["cursor"]), (&json!(true), &json!(seen[2].0)));
    expect_all(&mut client, &missed).await;
    expect_all(&mut client, &published(&gateway, 8..9).await).await;
    assert_eq!(metric(&gateway, "hubcast_gaps_total").await, 0.0);
    let what = "through a proxy that goes silent: let go after a ping's interval and timeout of 300 ms each; what it missed comes once";
    observe::fault("client's way half open", Some(noticed), noticed, what);
}

/// No end of them is told, nothing is published here, and history is read on the publishing connection.
#[tokio::test(flavor = "multi_thread")]
async fn connections_to_redis_that_go_silent_are_all_made_anew() {
    let redis = Redis::start().await;
    let proxy = Proxy::start(redis.addr()).await;
    let (here, there) = (instance(redis.addr(), &[]).await, instance(proxy.addr(), &[]).await);
    let (mut client, _) = subscribe(&there, CHANNEL, None).await;
    let seen = published(&here, 0..3).await;
    expect_all(&mut client, &seen).await;
    proxy.abandon();
    let missed = published(&here, 3..6).await;
    eventually("three new connections", async || (proxy.connections() == 3).then_some(())).await;
    // Whether what it missed is a gap depends on how long it was read in vain.
    let last = published(&here, 6..7).await;
    eventually("the last one", async || (client.json().await["data"] == last[0].1).then_some(())).await;
    let (mut back, subscribed) = subscribe(&there, CHANNEL, Some(&seen[2].0)).await;
    assert_eq!(subscribed["recovered"], true);
    expect_all(&mut back, &[missed, last].concat()).await;
}
