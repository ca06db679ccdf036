//! Too much of what each by itself may be sent (threat rows 40, 41, 44, 46 to 48, 59).

use futures_util::future::join_all;
use serde_json::json;
use tokio::io::AsyncWriteExt as _;

use crate::harness::{Client, Raw, Redis, await_metric, eventually, masked, metric, publish};
use crate::hostile::target::Target;
use crate::observe;

/// How often each flood comes: what one leaves behind would be seen twenty times.
const ROUNDS: usize = 20;

const RATE_LIMITED: &str = r#"hubcast_connections_closed_total{reason="rate_limited"}"#;

fn limited(limit: &str) -> String {
    format!("hubcast_limited_total{{limit=\"{limit}\"}}")
}

/// Floods of each kind, one after another: each ends its own connection with 1008 and its reason, and is counted.
#[tokio::test(flavor = "multi_thread")]
async fn floods_end_their_own_connection() {
    let env = [
        ("HUBCAST_PINGS_PER_SECOND", "1"),
        ("HUBCAST_COMMANDS_PER_SECOND", "5"),
        ("HUBCAST_BAD_REQUESTS_PER_MINUTE", "5"),
    ];
    let mut target = Target::start(&env).await;
    let floods = [
        (40, "pings", masked(0x89, b"x").repeat(200), "pings", "too many pings or pongs"),
        (41, "pongs", masked(0x8A, b"x").repeat(200), "pings", "too many pings or pongs"),
        (44, "no JSON", masked(0x81, b"{").repeat(200), "bad_requests", "too many bad requests"),
        (44, "no command", masked(0x81, br#"{"type":7}"#).repeat(200), "bad_requests", "too many bad requests"),
        (46, "commands", masked(0x81, br#"{"type":"ping"}"#).repeat(400), "commands", "too many commands"),
    ];
    let mut closed = 0.0;
    for (row, what, bytes, limit, reason) in floods {
        let before = metric(&target, &limited(limit)).await;
        for _ in 0..ROUNDS {
            let mut raw = Raw::upgrade(&target, "/ws", b"").await;
            // It may be closed before all of it is sent.
            let _ = raw.socket.write_all(&bytes).await;
            assert_eq!(raw.close_frame().await, (1008, reason.to_owned()), "{what}");
            closed += 1.0;
        }
        await_metric(&target, RATE_LIMITED, closed).await;
        let refused = metric(&target, &limited(limit)).await - before;
        // Of commands, each that is above the rate is; of the rest the one that ends it.
        assert!(refused == ROUNDS as f64 || limit == "commands" && refused > ROUNDS as f64, "{what}: {refused}");
        target.assert_neighbour_receives().await;
        observe::threat(row, format!("{ROUNDS} floods of {what}: 1008 each, counted"));
    }
    target.assert_unharmed().await;
}

/// Channels above those of the instance are refused, and there is room again once others are gone.
#[tokio::test(flavor = "multi_thread")]
async fn channels_above_those_of_the_instance_are_refused() {
    let mut target = Target::start(&[("HUBCAST_CHANNELS_MAX", "11")]).await;
    let names = |start: usize| (start..start + 20).map(|number| format!("c{number}")).collect::<Vec<_>>();
    for round in 1..=ROUNDS {
        let mut client = Client::connect(&target).await;
        client.send(&json!({"type": "subscribe", "channels": names(round * 20)})).await;
        for number in 0..20 {
            let answer = client.json().await;
            let is_within = number < 10;
            assert_eq!(answer["type"], if is_within { "subscribed" } else { "error" }, "{answer}");
            assert!(is_within || answer["code"] == "limit_exceeded", "{answer}");
        }
        drop(client);
        await_metric(&target, "hubcast_channels", 1.0).await;
        await_metric(&target, &limited("channels"), 10.0 * round as f64).await;
    }
    target.assert_unharmed().await;
    observe::threat(47, "20 times 20 channels where 11 may be: limit_exceeded, counted, room again afterwards");
}

/// Subscribing and leaving as fast as it goes, on channels that all share: nothing is left, here and at Redis.
#[tokio::test(flavor = "multi_thread")]
async fn churn_harms_nobody() {
    const CHANNELS: usize = 5;
    let redis = Redis::start().await;
    let mut target = Target::start(&[("HUBCAST_REDIS_URL", &redis.url())]).await;
    let public = target.binary.public;
    for _ in 0..2 {
        let churning = (0..16_usize).map(|who| {
            tokio::spawn(async move {
                let mut client = Client::try_open_at(public, "/ws", None).await.unwrap();
                client.json().await;
                for round in 0..100 {
                    let channel = format!("c{}", (who * 7 + round * 3) % CHANNELS);
                    let commands =
                        json!([{"type": "subscribe", "channel": channel}, {"type": "unsubscribe", "channel": channel}]);
                    client.send(&commands).await;
                    while client.json().await["type"] != "unsubscribed" {}
                }
            })
        });
        for task in join_all(churning).await {
            task.unwrap();
        }
        target.assert_neighbour_receives().await;
        await_metric(&target, "hubcast_channels", 1.0).await;
        target.rebase();
    }
    for channel in 0..CHANNELS {
        let name = format!("hub:c{channel}");
        eventually("the unsubscribe", async || (redis.numsub(&name).await == 0).then_some(())).await;
    }
    target.assert_unharmed().await;
    observe::threat(48, "3,200 joins and leaves of 16 on 5 channels: no channel is left, here and at Redis");
}

/// Clients that never read: each is closed, and what waited for it is gone with it.
#[tokio::test(flavor = "multi_thread")]
async fn those_who_never_read_are_closed() {
    const SLOW: &str = r#"hubcast_connections_closed_total{reason="slow_consumer"}"#;
    let mut target = Target::start(&[("HUBCAST_OUTBOX_BYTES", "256KiB")]).await;
    let payload = format!("\"{}\"", "x".repeat(100_000));
    for round in 1..=2 {
        let stalled = join_all((0..ROUNDS).map(|_| Raw::upgrade(&target, "/ws?channels=c", b""))).await;
        await_metric(&target, "hubcast_subscriptions", ROUNDS as f64 + 1.0).await;
        let expected = (round * ROUNDS) as f64;
        while metric(&target, SLOW).await < expected {
            publish(&target, "c", payload.as_bytes()).await;
            target.assert_neighbour_receives().await;
        }
        await_metric(&target, "hubcast_connections", 1.0).await;
        drop(stalled);
        target.rebase();
    }
    assert!(metric(&target, r#"hubcast_dropped_total{reason="slow_consumer"}"#).await >= 2.0 * ROUNDS as f64);
    target.assert_unharmed().await;
    observe::threat(59, format!("{ROUNDS} who never read, twice: 4101, counted; nothing waits for them any more"));
}
