//! What a channel with history is told when Redis or the way to it fails: every message once and in order, or a gap
//! exactly where something is lost.

use std::time::Duration;

use hubcast::gateway::Gateway;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::harness::{Client, Redis, await_metric, eventually, gateway_with, http, metric, ready};
use crate::history::{RULES, event, publish, subscribe};
use crate::proxy::Proxy;

const CHANNEL: &str = "h:1";

/// An instance whose probes are quick, and that checks its positions often.
async fn instance(url: &str) -> Gateway {
    let gateway = gateway_with(&[RULES, ("HUBCAST_REDIS_URL", url), ("HUBCAST_PUBLISH_TIMEOUT", "500ms")], |config| {
        config.redis_probe_interval = Duration::from_millis(200);
        config.history_check_interval = Duration::from_secs(2);
    });
    ready(&gateway).await;
    gateway
}

/// A `redis-server` that writes to its own directory.
struct Durable {
    redis: Redis,
    _dir: TempDir,
}

async fn durable(arguments: &[&str]) -> Durable {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().to_str().expect("UTF-8").to_owned();
    let mut redis = Redis::reserve_with("", &[&["--dir", &path], arguments].concat());
    redis.restart().await;
    Durable { redis, _dir: dir }
}

/// Publishes a number as soon as Redis can be reached; its cursor. Certainly not twice: 503 means that nothing was sent.
async fn publish_when_it_can(gateway: &Gateway, number: u32) -> String {
    eventually("redis to take a publish", async || {
        let path = format!("POST /api/publish/{CHANNEL}");
        let answer = http(gateway, &path, "", number.to_string().as_bytes()).await;
        match answer.status {
            200 => answer.json()["results"][0]["cursor"].as_str().map(str::to_owned),
            status => {
                assert_eq!(status, 503, "{}", answer.json());
                None
            }
        }
    })
    .await
}

async fn expect_all(client: &mut Client, cursors: &[(String, u32)]) {
    for (cursor, number) in cursors {
        client.expect(&event(cursor, *number)).await;
    }
}

async fn published(gateway: &Gateway, numbers: std::ops::Range<u32>) -> Vec<(String, u32)> {
    let mut cursors = Vec::new();
    for number in numbers {
        cursors.push((publish(gateway, CHANNEL, number).await, number));
    }
    cursors
}

#[tokio::test]
async fn a_redis_that_comes_back_as_it_was_costs_no_gap() {
    let mut durable = durable(&["--appendonly", "yes", "--appendfsync", "always"]).await;
    let (here, there) = (instance(&durable.redis.url()).await, instance(&durable.redis.url()).await);
    let (mut client, _) = subscribe(&there, CHANNEL, None).await;
    expect_all(&mut client, &published(&here, 0..3).await).await;
    durable.redis.kill();
    durable.redis.restart().await;
    let back = std::time::Instant::now();
    let next = publish_when_it_can(&here, 3).await;
    client.expect(&event(&next, 3)).await;
    assert_eq!(metric(&there, "hubcast_gaps_total").await, 0.0);
    assert_eq!(metric(&there, "hubcast_history_breaks_total").await, 0.0);
    crate::observe::fault("redis comes back as it was", None, back.elapsed(), "the next event follows, no gap");
}

#[tokio::test]
async fn what_was_published_while_the_link_was_cut_is_repaired() {
    let redis = Redis::start().await;
    let mut proxy = Proxy::start(redis.addr()).await;
    let (here, there) = (instance(&redis.url()).await, instance(&format!("redis://{}/", proxy.addr())).await);
    let (mut client, _) = subscribe(&there, CHANNEL, None).await;
    expect_all(&mut client, &published(&here, 0..3).await).await;
    proxy.cut().await;
    let missed = published(&here, 3..8).await;
    proxy.heal().await;
    expect_all(&mut client, &missed).await;
    expect_all(&mut client, &published(&here, 8..10).await).await;
    assert_eq!(metric(&there, "hubcast_gaps_total").await, 0.0);
}

/// Redis ends the listening connection alone, as it does when its output buffer is full.
#[tokio::test]
async fn what_was_published_while_nobody_listened_is_repaired() {
    let redis = Redis::start().await;
    let (here, there) = (instance(&redis.url()).await, instance(&redis.url()).await);
    let (mut client, _) = subscribe(&there, CHANNEL, None).await;
    let began = std::time::Instant::now();
    for round in 0..5 {
        redis.command(&["CLIENT", "KILL", "TYPE", "PUBSUB"]).await;
        expect_all(&mut client, &published(&here, round * 4..round * 4 + 4).await).await;
    }
    assert_eq!(metric(&there, "hubcast_gaps_total").await, 0.0);
    crate::observe::fault(
        "listening links killed",
        None,
        began.elapsed(),
        "five times in a row, with publishes right behind: all repaired, no gap",
    );
}

/// While the link is cut more is published than the history keeps.
#[tokio::test]
async fn what_is_trimmed_before_the_repair_is_a_told_gap() {
    let redis = Redis::start().await;
    let mut proxy = Proxy::start(redis.addr()).await;
    let (here, there) = (instance(&redis.url()).await, instance(&format!("redis://{}/", proxy.addr())).await);
    let (mut client, _) = subscribe(&there, CHANNEL, None).await;
    let first = published(&here, 0..1).await;
    expect_all(&mut client, &first).await;
    proxy.cut().await;
    let missed = published(&here, 1..41).await;
    proxy.heal().await;
    let gap = client.json().await;
    let (after, next) = (&first[0].0, &missed[20].0);
    let expected = json!({"type": "gap", "channel": CHANNEL, "after": after, "next": next, "reason": "trimmed"});
    assert_eq!(gap, expected);
    expect_all(&mut client, &missed[20..]).await;
}

/// Redis comes back from an older snapshot: what it acknowledged after that is lost.
#[tokio::test]
async fn a_redis_that_comes_back_older_is_a_told_gap_and_a_mark_for_those_who_were_away() {
    let mut durable = durable(&[]).await;
    let (here, there) = (instance(&durable.redis.url()).await, instance(&durable.redis.url()).await);
    let (mut stayed, _) = subscribe(&there, CHANNEL, None).await;
    let kept = published(&here, 0..3).await;
    durable.redis.command(&["SAVE"]).await;
    let (mut left, _) = subscribe(&there, CHANNEL, Some(&kept[2].0)).await;
    let lost = published(&here, 3..6).await;
    expect_all(&mut stayed, &[&kept[..], &lost].concat()).await;
    expect_all(&mut left, &lost[..1]).await;
    drop(left);

    durable.redis.kill();
    durable.redis.restart().await;
    let back = std::time::Instant::now();
    let gap = stayed.json().await;
    assert_eq!(gap, json!({"type": "gap", "channel": CHANNEL, "after": lost[2].0, "reason": "upstream"}));
    await_metric(&there, "hubcast_history_breaks_total", 1.0).await;
    crate::observe::fault(
        "redis comes back older",
        Some(back.elapsed()),
        back.elapsed(),
        "those connected and those away are told where it broke",
    );
    let next = publish_when_it_can(&here, 6).await;
    stayed.expect(&event(&next, 6)).await;

    // Away since before the loss: told where it is, and the rest.
    let (mut early, subscribed) = subscribe(&here, CHANNEL, Some(&kept[1].0)).await;
    assert_eq!(subscribed["recovered"], true);
    early.expect(&event(&kept[2].0, 2)).await;
    let broken = json!({"type": "gap", "channel": CHANNEL, "after": kept[2].0, "next": next, "reason": "upstream"});
    early.expect(&broken).await;
    early.expect(&event(&next, 6)).await;
    // Away since what is lost: it has to begin anew.
    let (_, subscribed) = subscribe(&here, CHANNEL, Some(&lost[0].0)).await;
    assert_eq!((&subscribed["recovered"], &subscribed["cursor"]), (&json!(false), &json!(next)));
    // Whoever reads the history sees it too.
    let history = http(&here, &format!("GET /api/history/{CHANNEL}"), "", b"").await.json();
    let kinds: Vec<_> = history["events"].as_array().unwrap().iter().map(|event| event["type"].clone()).collect();
    assert_eq!(kinds, ["event", "event", "event", "gap", "event"]);
    assert_eq!(
        metric(&here, "hubcast_history_breaks_total").await + metric(&there, "hubcast_history_breaks_total").await,
        1.0
    );
}

#[tokio::test]
async fn a_redis_that_comes_back_empty_is_a_told_gap() {
    let mut redis = Redis::start().await;
    let (here, there) = (instance(&redis.url()).await, instance(&redis.url()).await);
    let (mut client, _) = subscribe(&there, CHANNEL, None).await;
    let lost = published(&here, 0..3).await;
    expect_all(&mut client, &lost).await;
    redis.kill();
    redis.restart().await;
    let next = publish_when_it_can(&here, 3).await;
    let gap = client.json().await;
    assert_eq!((&gap["type"], &gap["after"]), (&json!("gap"), &json!(lost[2].0)), "{gap}");
    client.expect(&event(&next, 3)).await;
    let (_, subscribed) = subscribe(&here, CHANNEL, Some(&lost[2].0)).await;
    assert_eq!(subscribed["recovered"], false);
}

/// The connection stays, the data goes: seen by a look at the position, without any message.
#[tokio::test]
async fn a_loss_without_a_lost_link_is_noticed_while_nothing_is_published() {
    let redis = Redis::start().await;
    let gateway = instance(&redis.url()).await;
    let (mut client, _) = subscribe(&gateway, CHANNEL, None).await;
    let lost = published(&gateway, 0..3).await;
    expect_all(&mut client, &lost).await;
    redis.command(&["FLUSHALL"]).await;
    let gap = client.json().await;
    assert_eq!((&gap["type"], &gap["after"]), (&json!("gap"), &json!(lost[2].0)), "{gap}");
}

/// It takes over the state of another one, and no connection is lost.
#[tokio::test]
async fn a_redis_that_becomes_another_one_is_noticed() {
    let (redis, other) = (Redis::start().await, Redis::start().await);
    let gateway = gateway_with(&[RULES, ("HUBCAST_REDIS_URL", &redis.url())], |config| {
        config.history_check_interval = Duration::from_secs(600);
    });
    ready(&gateway).await;
    let (mut client, _) = subscribe(&gateway, CHANNEL, None).await;
    let lost = published(&gateway, 0..3).await;
    expect_all(&mut client, &lost).await;
    redis.command(&["REPLICAOF", "127.0.0.1", &other.addr().port().to_string()]).await;
    eventually("it to have nothing", async || redis.query::<u32>(&["DBSIZE"]).await.ok().filter(|size| *size == 0))
        .await;
    redis.command(&["REPLICAOF", "NO", "ONE"]).await;
    let gap = client.json().await;
    assert_eq!((&gap["type"], &gap["after"]), (&json!("gap"), &json!(lost[2].0)), "{gap}");
}

/// An answer that does not come in time says so; whatever became of the message, it is there at most once.
#[tokio::test]
async fn a_frozen_redis_leaves_an_unknown_outcome_and_no_duplicate() {
    let redis = Redis::start().await;
    let gateway = instance(&redis.url()).await;
    let (mut client, _) = subscribe(&gateway, CHANNEL, None).await;
    redis.freeze();
    let mut keys = Vec::new();
    for number in 0..3u32 {
        let key = format!("Idempotency-Key: {number}\r\n");
        let answer = http(&gateway, &format!("POST /api/publish/{CHANNEL}"), &key, number.to_string().as_bytes()).await;
        assert!(answer.status == 504 || answer.status == 503, "{}", answer.json());
        keys.push(key);
    }
    redis.thaw();
    let mut cursors = Vec::new();
    for (number, key) in keys.iter().enumerate() {
        let cursor = eventually("the repeated publish to be taken", async || {
            let path = format!("POST /api/publish/{CHANNEL}");
            let answer = http(&gateway, &path, key, number.to_string().as_bytes()).await;
            (answer.status == 200).then(|| answer.json()["results"][0]["cursor"].as_str().unwrap().to_owned())
        })
        .await;
        cursors.push((cursor, number as u32));
    }
    cursors.sort_by_key(|(cursor, _)| hubcast::cursor::Cursor::parse(cursor));
    expect_all(&mut client, &cursors).await;
    let last = publish_when_it_can(&gateway, 9).await;
    client.expect(&event(&last, 9)).await;
}

/// Whoever had received what is lost has gone, and so has his instance's subscription: it still knows, and tells the others.
#[tokio::test]
async fn a_loss_after_the_last_one_left_is_a_mark_for_those_who_come_back_elsewhere() {
    let mut durable = durable(&[]).await;
    let (here, there) = (instance(&durable.redis.url()).await, instance(&durable.redis.url()).await);
    let (mut client, _) = subscribe(&there, CHANNEL, None).await;
    let kept = published(&here, 0..3).await;
    durable.redis.command(&["SAVE"]).await;
    let lost = published(&here, 3..6).await;
    expect_all(&mut client, &[&kept[..], &lost].concat()).await;
    drop(client);
    eventually("the channel to be left", async || (durable.redis.numsub("hub:h:1").await == 0).then_some(())).await;

    durable.redis.kill();
    durable.redis.restart().await;
    await_metric(&there, "hubcast_history_breaks_total", 1.0).await;
    let next = publish_when_it_can(&here, 6).await;
    let (mut early, subscribed) = subscribe(&here, CHANNEL, Some(&kept[2].0)).await;
    assert_eq!(subscribed["recovered"], true);
    let gap = json!({"type": "gap", "channel": CHANNEL, "after": kept[2].0, "next": next, "reason": "upstream"});
    early.expect(&gap).await;
    early.expect(&event(&next, 6)).await;
}

/// The answer to an UNSUBSCRIBE is still on its way: Redis sends nothing more, so whoever comes is not told that it does.
#[tokio::test]
async fn nobody_is_let_in_while_the_channel_is_given_up() {
    let redis = Redis::start().await;
    let proxy = Proxy::start(redis.addr()).await;
    let gateway = gateway_with(&[RULES, ("HUBCAST_REDIS_URL", &format!("redis://{}/", proxy.addr()))], |_| {});
    ready(&gateway).await;
    let (client, _) = subscribe(&gateway, CHANNEL, None).await;
    drop(client);
    proxy.delay(Duration::from_millis(500));
    eventually("redis to take the UNSUBSCRIBE", async || (redis.numsub("hub:h:1").await == 0).then_some(())).await;
    proxy.delay(Duration::ZERO);
    let (mut client, _) = subscribe(&gateway, CHANNEL, None).await;
    // Past the history: nothing but the subscription brings it.
    redis.command(&["PUBLISH", "hub:h:1", "9"]).await;
    client.expect(&json!({"type": "event", "channel": CHANNEL, "data": 9})).await;
}

/// Nobody was in the channel for a while: what came meanwhile is known when somebody comes back.
#[tokio::test]
async fn a_channel_that_nobody_was_in_goes_on_where_it_is() {
    let redis = Redis::start().await;
    let gateway = instance(&redis.url()).await;
    let (client, _) = subscribe(&gateway, CHANNEL, None).await;
    let seen = published(&gateway, 0..1).await;
    drop(client);
    eventually("the channel to be left", async || (redis.numsub("hub:h:1").await == 0).then_some(())).await;
    let missed = published(&gateway, 1..4).await;
    let (mut back, subscribed) = subscribe(&gateway, CHANNEL, Some(&seen[0].0)).await;
    assert_eq!(subscribed["recovered"], true);
    expect_all(&mut back, &missed).await;
    expect_all(&mut back, &published(&gateway, 4..5).await).await;
    assert_eq!(back_is_quiet(&mut back).await, json!({"type": "pong"}));
}

async fn back_is_quiet(client: &mut Client) -> Value {
    client.send(&json!({"type": "ping"})).await;
    client.json().await
}

/// Who came between two losses stands where no event is: neither is told the other's cursor.
#[tokio::test]
async fn a_gap_names_no_cursor_where_those_who_are_told_stand_at_different_ones() {
    let redis = Redis::start().await;
    let gateway = instance(&redis.url()).await;
    let (mut early, _) = subscribe(&gateway, CHANNEL, None).await;
    let lost = published(&gateway, 0..3).await;
    expect_all(&mut early, &lost).await;
    redis.command(&["FLUSHALL"]).await;
    early.expect(&json!({"type": "gap", "channel": CHANNEL, "after": lost[2].0, "reason": "trimmed"})).await;
    let (mut late, subscribed) = subscribe(&gateway, CHANNEL, None).await;
    assert_ne!(subscribed["cursor"], json!(lost[2].0));
    redis.command(&["FLUSHALL"]).await;
    for client in [&mut early, &mut late] {
        client.expect(&json!({"type": "gap", "channel": CHANNEL, "reason": "trimmed"})).await;
    }
    let both = published(&gateway, 3..4).await;
    for client in [&mut early, &mut late] {
        expect_all(client, &both).await;
    }
    redis.command(&["FLUSHALL"]).await;
    for client in [&mut early, &mut late] {
        client.expect(&json!({"type": "gap", "channel": CHANNEL, "after": both[0].0, "reason": "trimmed"})).await;
    }
}
