//! Floods of each kind, as `hubcast-loadtest flood` makes them, by counters and not by the clock: a flooder's turn is short,
//! what is carried out for him is what his meters allow, and what is refused is read slowly.

use std::time::{Duration, Instant};

use serde_json::json;
use tokio::io::AsyncWriteExt;

use crate::harness::{Client, Raw, gateway, masked, metric, soon};

/// Whole frames of one kind, as many as fit into 64 KiB: what a worker reads at once.
fn chunk(frame: &[u8]) -> Vec<u8> {
    frame.repeat((64 << 10) / frame.len())
}

fn command(text: &str) -> Vec<u8> {
    masked(0x81, text.as_bytes())
}

/// All on one thread: while somebody's 64 KiB are carried out, whoever comes after him is served, and then the rest is.
#[tokio::test]
async fn a_flood_waits_its_turn_behind_a_neighbour() {
    let gateway = gateway(&[("HUBCAST_COMMANDS_PER_SECOND", "0"), ("HUBCAST_BAD_REQUESTS_PER_MINUTE", "0")]);
    let churn =
        [command(r#"{"type":"subscribe","channel":"flood"}"#), command(r#"{"type":"unsubscribe","channel":"flood"}"#)];
    let kinds = [
        ("commands", command(r#"{"type":"ping"}"#)),
        ("bad JSON", command(r#"{"type":"#)),
        ("churn", churn.concat()),
        ("publishes", command(r#"{"type":"publish","id":1,"channel":"flood","data":1}"#)),
    ];
    let frames_sent = &gateway.broker().shared.metrics.frames_sent;
    for (kind, frame) in kinds {
        let chunk = chunk(&frame);
        let mut neighbour = Client::connect(&gateway).await;
        let mut flooder = Raw::upgrade(&gateway, "/ws", b"").await;
        flooder.frame().await.expect("the welcome");
        let mut most = 0;
        for _ in 0..20 {
            let before = frames_sent.get();
            soon("the flood to be sent", flooder.socket.write_all(&chunk)).await.unwrap();
            neighbour.send(&json!({"type": "ping"})).await;
            neighbour.expect(&json!({"type": "pong"})).await;
            most = most.max(frames_sent.get() - before);
            // The last answer is the one to the last command: nothing is lost by taking turns.
            for _ in 0..chunk.len() / frame.len() * if kind == "churn" { 2 } else { 1 } {
                flooder.frame().await.expect("an answer");
            }
        }
        assert!(most < 600, "{kind}: {most} frames before the neighbour's");
    }
}

/// A flood gets carried out what its rate allows, however fast it comes; what is above is read at twice the rate, until
/// the connection is closed.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_refused_is_read_slowly() {
    let gateway = gateway(&[("HUBCAST_COMMANDS_PER_SECOND", "100")]);
    let mut flooder = Raw::upgrade(&gateway, "/ws", b"").await;
    let started = Instant::now();
    flooder.send(&command(r#"{"type":"ping"}"#).repeat(2_000)).await;
    let (mut pongs, mut refused) = (0, 0);
    let closed = loop {
        let frame = flooder.frame().await.expect("a close frame before the end");
        match frame.payload.windows(6).any(|part| part == b"\"pong\"") {
            _ if frame.first == 0x88 => break frame.payload,
            true => pongs += 1,
            false => refused += 1,
        }
    };
    let elapsed = started.elapsed();
    assert_eq!(&closed[2..], b"too many commands");
    assert!(pongs <= 201 + (elapsed.as_secs_f64() * 100.0) as usize, "{pongs} in {elapsed:?}");
    // Of 200 at least that are refused all but the last turn of 51 were followed by a rest of 5 ms each.
    assert!(refused >= 200 && elapsed > Duration::from_millis(700), "{refused} in {elapsed:?}");
}

/// Nobody gets to say more than a thousand senseless things a second.
#[tokio::test(flavor = "multi_thread")]
async fn what_nobody_understands_is_read_slowly() {
    let gateway = gateway(&[("HUBCAST_BAD_REQUESTS_PER_MINUTE", "1000")]);
    let mut flooder = Raw::upgrade(&gateway, "/ws", b"").await;
    let started = Instant::now();
    flooder.send(&command("{").repeat(1_500)).await;
    let (code, reason) = flooder.close_frame().await;
    assert_eq!((code, reason.as_str()), (1008, "too many bad requests"));
    assert!(started.elapsed() > Duration::from_millis(800), "{:?}", started.elapsed());
    assert_eq!(metric(&gateway, r#"hubcast_limited_total{limit="bad_requests"}"#).await, 1.0);
}
