//! Much of something that each by itself may be (threat rows 37, 55, 60, 64).

use std::time::{Duration, Instant};

use futures_util::future::join_all;
use serde_json::json;
use socket2::SockRef;
use tokio::io::AsyncReadExt as _;

use crate::harness::{Client, Raw, Redis, await_metric, http, masked, metric, publish, soon};
use crate::hostile::target::Target;
use crate::observe;

const SLOW: &str = r#"hubcast_connections_closed_total{reason="slow_consumer"}"#;

/// One shared buffer, however many wait for it; and what is larger than allowed nobody gets.
#[tokio::test(flavor = "multi_thread")]
async fn a_mebibyte_to_very_many_is_kept_once() {
    const CLIENTS: usize = 1_000;
    const BYTES: usize = (1 << 20) - 2;
    let mut target = Target::start(&[]).await;
    let payload = format!("\"{}\"", "x".repeat(BYTES));
    // What the allocator keeps of the first wave is there for the second.
    for _ in 0..2 {
        let mut clients = join_all((0..CLIENTS).map(|_| Raw::upgrade(&target, "/ws?channels=big", b""))).await;
        await_metric(&target, "hubcast_subscriptions", CLIENTS as f64 + 1.0).await;
        let before_kib = target.rss_kib_now();
        // Nobody reads yet: it waits for all of them.
        publish(&target, "big", payload.as_bytes()).await;
        let waiting = metric(&target, r#"hubcast_ledger_bytes{kind="frames"}"#).await;
        let grown_kib = target.rss_kib_now().saturating_sub(before_kib);
        assert!(grown_kib < 100 << 10, "{grown_kib} KiB for {CLIENTS} clients");
        assert!(waiting < 3.0 * 1024.0 * 1024.0, "{waiting} bytes in the ledger");
        target.assert_neighbour_receives().await;
        let read = clients
            .iter_mut()
            .map(|client| async { while client.frame().await.expect("it stays connected").payload.len() < BYTES {} });
        join_all(read).await;
        drop(clients);
        await_metric(&target, "hubcast_connections", 1.0).await;
        target.rebase();
    }
    let larger = format!("\"{}\"", "x".repeat(BYTES + 1));
    assert_eq!(http(&target, "POST /api/publish/big", "", larger.as_bytes()).await.status, 413);
    let answer = format!("1 MiB to {CLIENTS} who do not read yet: RSS grew by less than 100 MiB; 1 byte more: 413");
    observe::threat(64, answer);
    target.assert_unharmed().await;
}

/// Whoever takes a byte at a time is as slow as who takes none: it is the age of what waits that counts.
#[tokio::test(flavor = "multi_thread")]
async fn a_byte_a_moment_is_too_slow() {
    let mut target = Target::start(&[("HUBCAST_WRITE_TIMEOUT", "2s")]).await;
    let mut client = Raw::connect(&target).await;
    SockRef::from(&client.socket).set_recv_buffer_size(1024).unwrap();
    client.send(format!("GET /ws?channels=c HTTP/1.1\r\n{}", crate::harness::HANDSHAKE).as_bytes()).await;
    client.head().await;
    await_metric(&target, "hubcast_channels", 2.0).await;
    // More than the kernel takes, less than the outbox does.
    let filler = "x".repeat(32 << 10);
    let began = Instant::now();
    for n in 0..24 {
        publish(&target, "c", format!("\"{n} {filler}\"").as_bytes()).await;
    }
    let trickling = tokio::spawn(async move {
        let mut pause = tokio::time::interval(Duration::from_millis(50));
        loop {
            pause.tick().await;
            if client.socket.read_u8().await.is_err() {
                return;
            }
        }
    });
    await_metric(&target, SLOW, 1.0).await;
    let took = began.elapsed();
    assert!(took > Duration::from_secs(1), "{took:?}");
    target.assert_neighbour_receives().await;
    observe::threat(60, "20 bytes a second: 4101 by age, below every bound");
    observe::fault("client reads 1 byte a second", None, took, "20 bytes a second, 4101 at a write timeout of 2 s");
    trickling.abort();
    let _ = trickling.await;
    target.assert_unharmed().await;
}

/// A message that begins and does not go on: its sender is noticed though it sends nothing more.
#[tokio::test(flavor = "multi_thread")]
async fn a_message_that_stops_half_way_is_given_up() {
    let mut target = Target::start(&[]).await;
    let mut whole = Raw::upgrade(&target, "/ws", b"").await;
    let mut begun = Raw::upgrade(&target, "/ws", b"").await;
    // A complete fragment, and the beginning of a frame.
    whole.send(&masked(0x01, b"[")).await;
    begun.send(&masked(0x81, &[b' '; 100])[..50]).await;
    let began = Instant::now();
    let mut pause = tokio::time::interval(Duration::from_secs(5));
    for client in [&mut whole, &mut begun] {
        let mut rest = Vec::new();
        let mut end = std::pin::pin!(client.socket.read_to_end(&mut rest));
        // Meanwhile the neighbour hears something now and then.
        loop {
            tokio::select! {
                ended = &mut end => {
                    ended.unwrap();
                    break;
                }
                _ = pause.tick() => target.assert_neighbour_receives().await,
            }
            assert!(began.elapsed() < Duration::from_secs(50), "it is not closed");
        }
        let text = String::from_utf8_lossy(&rest);
        assert!(text.contains("message took too long to arrive"), "{text}");
    }
    assert!((29..45).contains(&began.elapsed().as_secs()), "{:?}", began.elapsed());
    observe::threat(37, "a message that stops half way: 1008 after 30 s, though nothing more arrives");
    target.assert_unharmed().await;
}

/// From the oldest cursor again and again: each recovery is bounded, reads are shared, and whoever loops has to wait.
#[tokio::test(flavor = "multi_thread")]
async fn recoveries_are_bounded() {
    const CLIENTS: usize = 200;
    const ENTRIES: usize = 300;
    let redis = Redis::start().await;
    let rules = r#"[{"match":"h","history":{"size":1000,"ttl":"10m"}}]"#;
    let url = redis.url();
    let env = [
        ("HUBCAST_REDIS_URL", url.as_str()),
        ("HUBCAST_CHANNEL_RULES", rules),
        ("HUBCAST_COMMANDS_PER_SECOND", "1000"),
    ];
    let mut target = Target::start(&env).await;
    let mut first = None;
    for n in 0..ENTRIES {
        let answer = http(&target, "POST /api/publish/h", "", format!("\"{n} {}\"", "x".repeat(1000)).as_bytes()).await;
        let cursor = answer.json()["results"][0]["cursor"].as_str().unwrap().to_owned();
        first.get_or_insert(cursor);
    }
    let resume = json!({"type": "subscribe", "channel": "h", "after": first.unwrap()});
    let reads = metric(&target, "hubcast_history_reads_total").await;
    let mut clients = join_all((0..CLIENTS).map(|_| Client::connect(&target))).await;
    join_all(clients.iter_mut().map(|client| client.send(&resume))).await;
    let recovered = clients.iter_mut().map(|client| async {
        let subscribed = client.json().await;
        assert_eq!(
            (&subscribed["type"], &subscribed["recovered"]),
            (&json!("subscribed"), &json!(true)),
            "{subscribed}"
        );
        for _ in 1..ENTRIES {
            assert_eq!(client.json().await["type"], "event");
        }
    });
    soon("all recoveries", join_all(recovered)).await;
    let reads = metric(&target, "hubcast_history_reads_total").await - reads;
    assert!(reads <= CLIENTS as f64 / 4.0, "{reads} reads for {CLIENTS} clients");
    target.assert_neighbour_receives().await;
    // One that loops: each counts as 50 commands, so it is soon told to wait.
    let mut looping = Client::connect(&target).await;
    let leave = json!({"type": "unsubscribe", "channel": "h"});
    let mut told = String::new();
    for _ in 0..1_000 {
        looping.send(&resume).await;
        looping.send(&leave).await;
        let mut answer = looping.json().await;
        while !matches!(answer["type"].as_str(), Some("unsubscribed" | "error")) {
            answer = looping.json().await;
        }
        if answer["type"] == "error" {
            told = answer["code"].as_str().unwrap().to_owned();
            break;
        }
    }
    assert_eq!(told, "rate_limited");
    target.assert_neighbour_receives().await;
    observe::threat(
        55,
        format!("{CLIENTS} recoveries of {ENTRIES} events at once: {reads} reads; one that loops: rate_limited"),
    );
    drop((clients, looping));
    target.assert_unharmed().await;
}
