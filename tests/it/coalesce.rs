//! Write coalescing: publications of one window leave together, and nothing else changes.

use std::time::Instant;

use hubcast::gateway::Gateway;
use serde_json::json;

use crate::harness::{Client, await_metric, gateway, http, metric, publish};

const EVERYWHERE: (&str, &str) = ("HUBCAST_COALESCE", "100ms");

/// Publishes 0, 1, … one after another and waits until all are written; returns how many writes that took.
/// `frames` were sent before: they may have arrived before they are counted.
async fn writes_for(gateway: &Gateway, channel: &str, publications: usize, subscribers: usize, frames: usize) -> f64 {
    await_metric(gateway, "hubcast_frames_sent_total", frames as f64).await;
    let writes = metric(gateway, "hubcast_writes_total").await;
    for n in 0..publications {
        publish(gateway, channel, n.to_string().as_bytes()).await;
    }
    await_metric(gateway, "hubcast_frames_sent_total", (frames + publications * subscribers) as f64).await;
    metric(gateway, "hubcast_writes_total").await - writes
}

async fn expect_in_order(client: &mut Client, channel: &str, publications: usize) {
    for n in 0..publications {
        client.expect(&json!({"type": "event", "channel": channel, "data": n})).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn publications_of_one_window_leave_in_one_write_each_in_its_own_frame() {
    let gateway = gateway(&[EVERYWHERE]);
    let mut clients = Vec::new();
    for _ in 0..5 {
        clients.push(Client::subscribed(&gateway, "c").await);
    }
    let started = Instant::now();
    let writes = writes_for(&gateway, "c", 100, clients.len(), 2 * clients.len()).await;
    // One write a subscriber and window; a slow machine needs more windows, not more writes in one.
    let windows = started.elapsed().as_millis() / 100 + 1;
    assert!(writes <= (windows * 5) as f64, "{writes} writes in {windows} windows");
    for client in &mut clients {
        expect_in_order(client, "c", 100).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rule_of_its_own_goes_before_the_default() {
    let rules = r#"[{"match":"fast:*","coalesce":"0ms"},{"match":"slow:*","coalesce":"100ms"}]"#;
    let all = gateway(&[EVERYWHERE, ("HUBCAST_CHANNEL_RULES", rules)]);
    let some = gateway(&[("HUBCAST_CHANNEL_RULES", rules)]);
    // Before each: two frames a client, and the twenty events of the case before.
    for (gateway, channel, is_held, frames) in
        [(&all, "fast:a", false, 2), (&all, "b", true, 24), (&some, "slow:a", true, 2), (&some, "b", false, 24)]
    {
        let mut client = Client::subscribed(gateway, channel).await;
        let mut writes = 0.0;
        let started = Instant::now();
        for n in 0..20 {
            if is_held {
                writes = writes_for(gateway, channel, 20, 1, frames).await;
                expect_in_order(&mut client, channel, 20).await;
                break;
            }
            // Each has arrived before the next is published: nothing can share a write.
            writes += writes_for(gateway, channel, 1, 1, frames + n).await;
            client.expect(&json!({"type": "event", "channel": channel, "data": 0})).await;
            assert_eq!(writes, (n + 1) as f64, "{channel}");
        }
        let windows = started.elapsed().as_millis() / 100 + 1;
        assert!(!is_held || writes <= windows as f64, "{channel}: {writes} writes in {windows} windows");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_burst_above_the_outbox_in_one_window_closes_nobody_and_loses_nothing() {
    let gateway = gateway(&[EVERYWHERE, ("HUBCAST_OUTBOX_MESSAGES", "16")]);
    let mut readers = Vec::new();
    for _ in 0..3 {
        readers.push(Client::subscribed(&gateway, "c").await);
    }
    let mut publisher = Client::connect(&gateway).await;
    for n in 0..200 {
        publisher.feed_text(&json!({"type": "publish", "channel": "c", "data": n}).to_string()).await;
    }
    publisher.flush().await;
    for reader in &mut readers {
        expect_in_order(reader, "c", 200).await;
    }
    assert_eq!(metric(&gateway, "hubcast_connections").await, 4.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_and_other_channels_do_not_wait_for_the_window() {
    let gateway = gateway(&[("HUBCAST_CHANNEL_RULES", r#"[{"match":"c","coalesce":"100ms","client_publish":true}]"#)]);
    let mut client = Client::subscribed(&gateway, "c").await;
    client.feed_text(&json!({"type": "subscribe", "channel": "d"}).to_string()).await;
    client.feed_text(&json!({"type": "publish", "channel": "c", "data": 1, "id": 7}).to_string()).await;
    client.feed_text(&json!({"type": "unsubscribe", "channel": "d"}).to_string()).await;
    client.send(&json!({"type": "ping"})).await;
    client.expect(&json!({"type": "subscribed", "channel": "d"})).await;
    client.expect(&json!({"type": "published", "id": 7})).await;
    client.expect(&json!({"type": "unsubscribed", "channel": "d"})).await;
    client.expect(&json!({"type": "pong"})).await;
    client.expect(&json!({"type": "event", "channel": "c", "data": 1})).await;
}

/// In the channel's own order everything waits for what was published before.
#[tokio::test(flavor = "multi_thread")]
async fn who_leaves_in_the_window_gets_what_was_published_before() {
    let gateway = gateway(&[EVERYWHERE]);
    let mut client = Client::subscribed(&gateway, "c").await;
    publish(&gateway, "c", b"1").await;
    client.send(&json!({"type": "unsubscribe", "channel": "c"})).await;
    client.expect(&json!({"type": "event", "channel": "c", "data": 1})).await;
    client.expect(&json!({"type": "unsubscribed", "channel": "c"})).await;
    let mut other = Client::subscribed(&gateway, "d").await;
    publish(&gateway, "d", b"2").await;
    let body = json!({"channel": "d"}).to_string();
    assert_eq!(http(&gateway, "POST /api/disconnect", "", body.as_bytes()).await.status, 200);
    other.expect(&json!({"type": "event", "channel": "d", "data": 2})).await;
    assert_eq!(other.close_frame().await.0, 3003);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drain_in_the_window_loses_nothing() {
    let gateway = gateway(&[EVERYWHERE, ("HUBCAST_DRAIN_TIME", "10ms")]);
    let mut client = Client::subscribed(&gateway, "c").await;
    publish(&gateway, "c", b"1").await;
    let draining = tokio::spawn(async move { gateway.drain().await });
    client.expect(&json!({"type": "event", "channel": "c", "data": 1})).await;
    assert_eq!(client.json().await["type"], "draining");
    assert_eq!(client.close_frame().await.0, 1012);
    client.finish().await;
    drop(client);
    let summary = draining.await.unwrap();
    assert_eq!((summary.closed, summary.cut_off), (1, 0));
}
