//! Frames that no well-behaved client sends (threat rows 26 to 39, 42, 43, 56).

use std::time::{Duration, Instant};

use serde_json::json;
use tokio::io::AsyncWriteExt;

use crate::harness::{HANDSHAKE, Raw, await_metric, eventually, masked};
use crate::hostile::target::Target;
use crate::observe;

const PING: &str = r#"{"type":"ping"}"#;

/// How often each attack of the table is repeated: once might leave too little to be seen.
const ROUNDS: usize = 20;

fn header(first: u8, len: u64) -> Vec<u8> {
    let mut frame = vec![first];
    match len {
        0..=125 => frame.push(0x80 | len as u8),
        126..=0xFFFF => frame.extend([&[0x80 | 126][..], &(len as u16).to_be_bytes()].concat()),
        _ => frame.extend([&[0x80 | 127][..], &len.to_be_bytes()].concat()),
    }
    frame.extend([0; 4]);
    frame
}

/// The label of `hubcast_connections_closed_total` for a code of ours.
fn label(code: u16) -> &'static str {
    match code {
        1002 => "protocol_error",
        1003 => "unsupported_data",
        1007 => "invalid_payload",
        1008 => "policy",
        1009 => "too_big",
        other => panic!("{other} is not in the table"),
    }
}

fn cases() -> Vec<(u32, &'static str, Vec<u8>, u16)> {
    let unmasked = [&[0x81, PING.len() as u8][..], PING.as_bytes()].concat();
    let long_form = |len: u16| [&[0x81, 0x80 | 126][..], &len.to_be_bytes(), &[0; 4]].concat();
    let longest_form = |len: u64| [&[0x81, 0x80 | 127][..], &len.to_be_bytes(), &[0; 4]].concat();
    let close = |payload: &[u8]| masked(0x88, payload);
    let many = |first: u8, payload: &[u8], number: usize| {
        [masked(0x01, payload), masked(first, payload).repeat(number - 1)].concat()
    };
    let mut cases = vec![
        (26, "unmasked", unmasked, 1002),
        (26, "unmasked, length only", vec![0x81, 125], 1002),
        (27, "RSV1", masked(0xC1, PING.as_bytes()), 1002),
        (27, "RSV2", masked(0xA1, PING.as_bytes()), 1002),
        (27, "RSV3", masked(0x91, PING.as_bytes()), 1002),
        (27, "RSV1 of a ping, first byte only", vec![0xC9], 1002),
        (29, "fragmented ping", masked(0x09, b""), 1002),
        (29, "ping of 126 bytes, header only", vec![0x89, 0x80 | 126], 1002),
        (29, "pong of 2^16 bytes, header only", vec![0x8A, 0x80 | 127], 1002),
        (29, "close of 126 bytes, header only", vec![0x88, 0x80 | 126], 1002),
        (30, "continuation of nothing", masked(0x80, b"x"), 1002),
        (30, "text inside a message", [masked(0x01, b"["), masked(0x81, b"1")].concat(), 1002),
        (30, "binary inside a message", [masked(0x01, b"["), masked(0x02, b"1")].concat(), 1002),
        (30, "continuation after the end", [masked(0x81, PING.as_bytes()), masked(0x80, b"")].concat(), 1002),
        (31, "close of one byte", close(b"\x03"), 1002),
        (32, "close reason not UTF-8", close(b"\x03\xe8\xff"), 1007),
        (32, "close reason cut inside a character", close(b"\x03\xe8\xe2\x82"), 1007),
        (33, "not UTF-8", masked(0x81, b"\xff"), 1007),
        (33, "a surrogate", masked(0x81, b"\"\xed\xa0\x80\""), 1007),
        (33, "an overlong form", masked(0x81, b"\"\xc0\xaf\""), 1007),
        (33, "not UTF-8 at the end", masked(0x81, b"\"\xe2\x82"), 1007),
        (33, "split over fragments", [masked(0x01, b"\xe2"), masked(0x00, b"\x28")].concat(), 1007),
        (33, "bad before the frame is complete", [header(0x81, 1000), b"\xff\xff\xff\xff".to_vec()].concat(), 1007),
        (34, "16-bit length for 125", long_form(125), 1002),
        (34, "16-bit length for 0", long_form(0), 1002),
        (34, "64-bit length for 65535", longest_form(65_535), 1002),
        (34, "64-bit length with the top bit", longest_form(1 << 63), 1002),
        (34, "64-bit length of all ones", longest_form(u64::MAX), 1002),
        (35, "2^62 bytes declared", longest_form(1 << 62), 1009),
        (35, "2^62 bytes in a fragment", [masked(0x01, b"x"), header(0x80, 1 << 62)].concat(), 1009),
        (36, "one byte too many, header only", header(0x81, 1001), 1009),
        (36, "one byte too many in fragments", [masked(0x01, &[b' '; 600]), header(0x80, 401)].concat(), 1009),
        (37, "1,025 empty fragments", many(0x00, b"", 1025), 1008),
        (39, "binary", masked(0x82, b"{}"), 1003),
        (39, "binary in fragments", [masked(0x02, b"{"), masked(0x80, b"}")].concat(), 1003),
    ];
    for opcode in [0x3, 0x4, 0x5, 0x6, 0x7, 0xB, 0xC, 0xD, 0xE, 0xF] {
        cases.push((28, "reserved opcode", masked(0x80 | opcode, b""), 1002));
    }
    for code in [0, 1, 999, 1004, 1005, 1006, 1015, 1016, 1100, 2000, 2999, 5000, 65_535_u16] {
        cases.push((31, "close code that may not be sent", close(&code.to_be_bytes()), 1002));
    }
    cases
}

/// Each violation closes its connection with the right code and a reason, in the order of its rows.
#[tokio::test(flavor = "multi_thread")]
async fn violations_are_closed_with_their_code() {
    let mut target = Target::start(&[("HUBCAST_MESSAGE_BYTES_MAX", "1000")]).await;
    for (row, what, bytes, code) in cases() {
        let series = format!("hubcast_connections_closed_total{{reason=\"{}\"}}", label(code));
        let before = target.closed(label(code)).await;
        for _ in 0..ROUNDS {
            let mut raw = Raw::upgrade(&target, "/ws", b"").await;
            // It may be refused, and reset, before all of it is sent.
            let _ = raw.socket.write_all(&bytes).await;
            let (closed_with, reason) = raw.close_frame().await;
            assert_eq!(closed_with, code, "{what}");
            assert!(!reason.is_empty(), "{what}: a close of ours carries a reason");
            assert_eq!(raw.frame().await, None, "{what}: nothing follows our close frame");
        }
        target.await_growth(&series, before, ROUNDS as f64).await;
        observe::threat(row, format!("{what}: {code}"));
    }
    target.assert_unharmed().await;
}

/// What is allowed to the last byte is allowed.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_just_within_the_limits_is_answered() {
    let mut target = Target::start(&[("HUBCAST_MESSAGE_BYTES_MAX", "1000")]).await;
    let command = |len: usize| format!("{}{}", " ".repeat(len - PING.len()), PING).into_bytes();
    let within: [(u32, &str, Vec<u8>); 4] = [
        (36, "999 bytes", masked(0x81, &command(999))),
        (36, "1,000 bytes", masked(0x81, &command(1000))),
        (36, "1,000 bytes in two frames", {
            let text = command(1000);
            [masked(0x01, &text[..999]), masked(0x80, &text[999..])].concat()
        }),
        (37, "1,024 fragments", {
            let text = command(1000);
            let mut frames = masked(0x01, &text[..1]);
            frames.extend(text[1..999].iter().flat_map(|byte| masked(0x00, &[*byte])));
            frames.extend(masked(0x00, b"").repeat(24));
            frames.extend(masked(0x80, &text[999..]));
            frames
        }),
    ];
    for (row, what, bytes) in within {
        let mut raw = Raw::upgrade(&target, "/ws", b"").await;
        raw.frame().await.expect("the welcome");
        raw.send(&bytes).await;
        assert_eq!(raw.frame().await.expect("the pong").payload, br#"{"type":"pong"}"#, "{what}");
        observe::threat(row, format!("{what}: answered"));
    }
    target.assert_unharmed().await;
}

/// 10,000 headers that promise 2^62 bytes: nothing is reserved on their word.
#[tokio::test(flavor = "multi_thread")]
async fn declared_lengths_reserve_nothing() {
    const AT_ONCE: usize = 500;
    let mut target = Target::start(&[]).await;
    let before = target.rss_kib_now();
    for _ in 0..10_000 / AT_ONCE {
        let mut attackers = Vec::new();
        for _ in 0..AT_ONCE {
            let mut raw = Raw::upgrade(&target, "/ws", b"").await;
            raw.send(&header(0x81, 1 << 62)).await;
            attackers.push(raw);
        }
        for raw in &mut attackers {
            assert_eq!(raw.close_frame().await.0, 1009);
        }
    }
    let grown = target.rss_kib_now().saturating_sub(before) >> 10;
    assert!(grown < 50, "{grown} MiB");
    target.assert_unharmed().await;
    observe::threat(35, "10,000 such headers: below 50 MiB while they were held");
}

/// Half a message each, and no end of it.
#[tokio::test(flavor = "multi_thread")]
async fn messages_without_end_cost_what_they_sent() {
    const ATTACKERS: usize = 1000;
    let mut target = Target::start(&[]).await;
    let before = target.rss_kib_now();
    let fragments = [masked(0x01, b"["), masked(0x00, b" ").repeat(1022)].concat();
    let mut attackers = Vec::new();
    for _ in 0..ATTACKERS {
        let mut raw = Raw::upgrade(&target, "/ws", b"").await;
        raw.send(&fragments).await;
        attackers.push(raw);
    }
    for raw in &mut attackers {
        // Control frames pass between fragments, so the answer says that all before it was read.
        raw.frame().await.expect("the welcome");
        raw.send(&masked(0x89, b"")).await;
        assert_eq!(raw.frame().await.expect("a pong").first, 0x8A);
    }
    let grown = target.rss_kib_now().saturating_sub(before) >> 10;
    assert!(grown < 30, "{grown} MiB for {ATTACKERS} connections");
    for raw in &mut attackers {
        raw.send(&[masked(0x00, b""), masked(0x00, b"")].concat()).await;
        assert_eq!(raw.close_frame().await.0, 1008);
    }
    drop(attackers);
    target.assert_unharmed().await;
    observe::threat(37, "1,000 connections of 1,023 fragments: below 30 MiB; with the 1,025th 1008");
}

/// Raw mode takes no data at all; control frames are answered.
#[tokio::test(flavor = "multi_thread")]
async fn raw_mode_takes_no_data() {
    let mut target = Target::start(&[]).await;
    for first in [0x81, 0x82] {
        let mut raw = Raw::connect(&target).await;
        let request = format!("GET /ws?channel=c HTTP/1.1\r\nSec-WebSocket-Protocol: hubcast.raw.v1\r\n{HANDSHAKE}");
        raw.send(request.as_bytes()).await;
        raw.head().await;
        raw.send(&masked(0x89, b"?")).await;
        assert_eq!(raw.frame().await.expect("a pong").first, 0x8A);
        raw.send(&masked(first, b"{}")).await;
        assert_eq!(raw.close_frame().await.0, 1003);
    }
    target.assert_unharmed().await;
    observe::threat(39, "data in raw mode: 1003");
}

/// A connection that answers nothing, and one that stops answering.
#[tokio::test(flavor = "multi_thread")]
async fn silence_after_a_ping_is_a_timeout() {
    let env = [("HUBCAST_PING_INTERVAL", "300ms"), ("HUBCAST_PONG_TIMEOUT", "300ms")];
    let mut target = Target::start(&env).await;
    let started = Instant::now();
    let mut mute = Raw::upgrade(&target, "/ws", b"").await;
    let closed = tokio::spawn(async move { mute.close_frame().await.0 });
    while !closed.is_finished() {
        target.assert_neighbour_receives().await;
    }
    let code = closed.await.unwrap();
    assert_eq!(code, 3008);
    let took = started.elapsed();
    await_metric(&target, r#"hubcast_connections_closed_total{reason="timeout"}"#, 1.0).await;
    target.assert_unharmed().await;
    observe::threat(42, "3008 after the ping's interval and the pong's timeout");
    observe::fault("mute client (half-open)", None, took, "3008 at an interval and a timeout of 300 ms each");
}

/// What follows a close is ignored, and whoever does not answer ours is not waited for.
#[tokio::test(flavor = "multi_thread")]
async fn a_close_is_the_end() {
    let mut target = Target::start(&[]).await;
    let mut raw = Raw::upgrade(&target, "/ws?channels=c", b"").await;
    let publish = json!({"type": "publish", "channel": "neighbours", "data": "after the close"}).to_string();
    raw.send(&[masked(0x88, &1000_u16.to_be_bytes()), masked(0x81, publish.as_bytes())].concat()).await;
    assert_eq!(raw.close_frame().await.0, 1000);
    assert_eq!(raw.frame().await, None);
    drop(raw);
    target.assert_neighbour_receives().await;
    observe::threat(43, "data after a close: ignored");

    let started = Instant::now();
    let mut deaf = Raw::upgrade(&target, "/ws", b"").await;
    deaf.send(&masked(0x82, b"")).await;
    assert_eq!(deaf.close_frame().await.0, 1003);
    await_metric(&target, "hubcast_connections", 1.0).await;
    let took = started.elapsed();
    // The peer's end is still open; ours is gone.
    target.assert_unharmed().await;
    assert!(took >= Duration::from_secs(4), "it had its time: {took:?}");
    drop(deaf);
    observe::threat(43, "a peer that never answers a close: ended after 5 s, its file is back");
}

/// Only our own names are labels, whatever codes come.
#[tokio::test(flavor = "multi_thread")]
async fn close_codes_of_clients_are_no_labels() {
    let mut target = Target::start(&[]).await;
    let series =
        async |target: &Target| crate::harness::http(target, "GET /metrics", "", b"").await.body.lines().count();
    let before = series(&target).await;
    for code in (3000..5000_u16).step_by(40) {
        let mut raw = Raw::upgrade(&target, "/ws", b"").await;
        raw.send(&masked(0x88, &[&code.to_be_bytes()[..], b"{reason=\"forged\"}"].concat())).await;
        assert_eq!(raw.close_frame().await, (code, String::new()), "echoed without its text");
    }
    eventually("all to be closed", async || (target.closed("client").await == 50.0).then_some(())).await;
    assert_eq!(series(&target).await, before);
    target.assert_unharmed().await;
    observe::threat(56, "50 codes of 3000 to 4999: the same number of series");
}
