//! RFC 6455's edges, with frames no well-behaved client sends.

use hubcast::close::CloseReason;
use hubcast::websocket::{Message, Parser};

use crate::harness::{Raw, RawFrame, gateway, masked};

const PING: &str = r#"{"type":"ping"}"#;
const PONG: &[u8] = br#"{"type":"pong"}"#;

#[tokio::test(flavor = "multi_thread")]
async fn close_codes_of_the_client_are_echoed() {
    let gateway = gateway(&[]);
    for code in [1000, 1001, 1003, 1007, 1011, 1014, 3000, 4999_u16] {
        let mut raw = Raw::upgrade(&gateway, "/ws", b"").await;
        raw.send(&masked(0x88, &[&code.to_be_bytes()[..], b"bye"].concat())).await;
        assert_eq!(raw.close_frame().await, (code, String::new()));
        assert_eq!(raw.frame().await, None);
    }
    let mut raw = Raw::upgrade(&gateway, "/ws", b"").await;
    raw.send(&masked(0x88, b"")).await;
    raw.frame().await.expect("the welcome");
    assert_eq!(raw.frame().await, Some(RawFrame { first: 0x88, payload: Vec::new() }));
    crate::harness::await_metric(&gateway, r#"hubcast_connections_closed_total{reason="client"}"#, 9.0).await;
}

/// A ping between fragments is answered at once, and the message is still complete afterwards.
#[tokio::test(flavor = "multi_thread")]
async fn fragments_and_control_frames_interleave_in_pieces_of_any_size() {
    let gateway = gateway(&[]);
    let stream = [
        masked(0x01, &PING.as_bytes()[..5]),
        masked(0x89, b"are you there?"),
        masked(0x00, b""),
        masked(0x8A, b"unsolicited"),
        masked(0x80, &PING.as_bytes()[5..]),
    ]
    .concat();
    for piece in [1, 2, 3, 7, stream.len()] {
        let mut raw = Raw::upgrade(&gateway, "/ws", b"").await;
        raw.frame().await.expect("the welcome");
        for bytes in stream.chunks(piece) {
            raw.send(bytes).await;
        }
        assert_eq!(raw.frame().await, Some(RawFrame { first: 0x8A, payload: b"are you there?".to_vec() }));
        assert_eq!(raw.frame().await, Some(RawFrame { first: 0x81, payload: PONG.to_vec() }), "pieces of {piece}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn bytes_right_behind_the_upgrade_request_are_not_lost() {
    let gateway = gateway(&[]);
    let behind = [masked(0x81, PING.as_bytes()), masked(0x81, PING.as_bytes())[..9].to_vec()].concat();
    let mut raw = Raw::upgrade(&gateway, "/ws", &behind).await;
    raw.frame().await.expect("the welcome");
    assert_eq!(raw.frame().await.unwrap().payload, PONG);
    raw.send(&masked(0x81, PING.as_bytes())[9..]).await;
    assert_eq!(raw.frame().await.unwrap().payload, PONG);
}

#[tokio::test(flavor = "multi_thread")]
async fn echo_is_there_only_when_asked_for() {
    let gateway = crate::harness::gateway_with(&[("HUBCAST_MESSAGE_BYTES_MAX", "1MiB")], |config| config.echo = true);
    let mut raw = Raw::upgrade(&gateway, "/echo", b"").await;
    for (first, payload) in [(0x81, b"text".to_vec()), (0x82, vec![0xFF; 70_000]), (0x81, Vec::new())] {
        raw.send(&masked(first, &payload)).await;
        assert_eq!(raw.frame().await, Some(RawFrame { first, payload }));
    }
    for number in 0..10 {
        raw.send(&masked(0x89, &[number])).await;
    }
    for number in 0..10 {
        assert_eq!(raw.frame().await, Some(RawFrame { first: 0x8A, payload: vec![number] }));
    }
}

/// The parser alone, where time and count matter: no socket could show them quickly.
#[test]
fn fragments_are_bounded_in_count_and_time() {
    for (message_bytes_max, fragments_max) in [(1000, 1024), (64 << 10, 1024), (128 << 10, 2048)] {
        let mut parser = Parser::new(message_bytes_max);
        let mut feed = |bytes: &[u8], now_us: u64| {
            let mut bytes = bytes.to_vec();
            let mut input = bytes.as_mut_slice();
            parser.next(&mut input, now_us).map(|message| message.is_some())
        };
        assert_eq!(feed(&masked(0x01, b""), 1), Ok(false));
        for _ in 1..fragments_max {
            assert_eq!(feed(&masked(0x00, b""), 1), Ok(false));
        }
        assert_eq!(feed(&masked(0x80, b""), 1), Err(CloseReason::Policy("too many fragments")));
    }

    let mut parser = Parser::new(1 << 20);
    let mut next = |bytes: &mut [u8], now_us| parser.next(&mut &mut *bytes, now_us).map(|message| message.is_none());
    assert_eq!(next(&mut masked(0x01, b"slow"), 1), Ok(true));
    assert_eq!(next(&mut masked(0x00, b"slower"), 29_000_000), Ok(true));
    assert_eq!(
        next(&mut masked(0x8A, b"")[..1], 31_000_000),
        Err(CloseReason::Policy("message took too long to arrive"))
    );
}

proptest::proptest! {
    #![proptest_config(proptest::test_runner::Config {
        cases: 5000,
        rng_seed: proptest::test_runner::RngSeed::Fixed(6455),
        failure_persistence: None,
        ..Default::default()
    })]

    /// Any messages, fragmented and cut anywhere, come out as they went in.
    #[test]
    fn messages_survive_any_fragmentation_and_any_cuts(
        messages in proptest::collection::vec((".{0,40}", 1_usize..4), 1..8),
        cuts in proptest::collection::vec(1_usize..40, 1..50),
    ) {
        let mut stream = Vec::new();
        for (text, fragments) in &messages {
            let size = text.len().div_ceil(*fragments).max(1);
            let parts: Vec<&[u8]> = if text.is_empty() { vec![b""] } else { text.as_bytes().chunks(size).collect() };
            for (index, part) in parts.iter().enumerate() {
                let opcode = if index == 0 { 0x01 } else { 0x00 };
                let fin = if index + 1 == parts.len() { 0x80 } else { 0x00 };
                stream.extend(masked(opcode | fin, part));
            }
        }
        let mut parser = Parser::new(1 << 20);
        let mut received = Vec::new();
        let mut rest = stream.as_mut_slice();
        for cut in cuts.iter().cycle() {
            if rest.is_empty() {
                break;
            }
            let (piece, after) = rest.split_at_mut((*cut).min(rest.len()));
            rest = after;
            let mut input = piece;
            while let Some(message) = parser.next(&mut input, 1).unwrap() {
                match message {
                    Message::Text(text) => received.push(text.into_owned()),
                    other => panic!("{other:?}"),
                }
            }
        }
        let sent: Vec<_> = messages.into_iter().map(|(text, _)| text).collect();
        proptest::prop_assert_eq!(received, sent);
    }

    /// Whatever arrives, the parser neither panics nor keeps more than the limit.
    #[test]
    fn any_bytes_are_survived(bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..300)) {
        let mut parser = Parser::new(1000);
        let mut bytes = bytes;
        let mut input = bytes.as_mut_slice();
        while let Ok(Some(_)) = parser.next(&mut input, 1) {}
    }
}
