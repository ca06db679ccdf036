//! Publish once, every subscriber has it: the gateway without Redis.

use futures_util::future::join_all;
use serde_json::json;
use tokio_tungstenite::tungstenite::Message;

use crate::harness::{Client, gateway, http, publish};

#[tokio::test(flavor = "multi_thread")]
async fn a_publication_reaches_every_subscriber_of_its_channel_and_nobody_else() {
    let gateway = gateway(&[]);
    let mut news = join_all((0..20).map(|_| Client::subscribed(&gateway, "news"))).await;
    let mut sport = Client::subscribed(&gateway, "sport").await;
    publish(&gateway, "news", br#"{"n": 1}"#).await;
    publish(&gateway, "sport", br#"{"n": 2}"#).await;
    for client in &mut news {
        assert_eq!(client.text().await, r#"{"type":"event","channel":"news","data":{"n": 1}}"#);
    }
    sport.expect(&json!({"type": "event", "channel": "sport", "data": {"n": 2}})).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn payloads_arrive_byte_for_byte() {
    let gateway = gateway(&[]);
    let mut client = Client::subscribed(&gateway, "c").await;
    let cases: [(&[u8], &str); 7] = [
        (br#"{ "b":1.50,"a":1e999 , "b":2}"#, r#""data":{ "b":1.50,"a":1e999 , "b":2}"#),
        (b"\n[1]\n", "\"data\":\n[1]\n"),
        (b"plain \"text\"", r#""data":"plain \"text\"""#),
        (b"", r#""data":"""#),
        ("\u{fc}".as_bytes(), "\"data\":\"\u{fc}\""),
        (b"\xff\x00", r#""data_base64":"/wA=""#),
        (b"null", r#""data":null"#),
    ];
    for (payload, member) in cases {
        publish(&gateway, "c", payload).await;
        assert_eq!(client.text().await, format!(r#"{{"type":"event","channel":"c",{member}}}"#));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn raw_mode_delivers_payloads_and_nothing_else() {
    let gateway = gateway(&[]);
    let mut raw = Client::open(&gateway, "/ws?channel=c", Some("hubcast.raw.v1")).await;
    let mut json_client = Client::subscribed(&gateway, "c").await;
    publish(&gateway, "c", b"{\"a\":1}").await;
    publish(&gateway, "c", b"\xff").await;
    assert_eq!(raw.message().await, Message::text("{\"a\":1}"));
    assert_eq!(raw.message().await, Message::binary(b"\xff".as_slice()));
    json_client.expect(&json!({"type": "event", "channel": "c", "data": {"a": 1}})).await;
    raw.send_text("anything").await;
    assert_eq!(raw.close_frame().await.0, 1003);
}

#[tokio::test(flavor = "multi_thread")]
async fn raw_mode_needs_exactly_one_valid_channel() {
    let gateway = gateway(&[]);
    for path in ["/ws", "/ws?channel=", "/ws?channel=a&channel=b", "/ws?channel=a%20b", "/ws?channel=__a"] {
        let refused = Client::try_open(&gateway, path, Some("hubcast.raw.v1")).await;
        let status = match refused.err() {
            Some(tokio_tungstenite::tungstenite::Error::Http(response)) => response.status().as_u16(),
            other => panic!("{path}: {other:?}"),
        };
        assert_eq!(status, 400, "{path}");
    }
}

/// 8 clients publish to one channel at once while others join: everybody sees one order.
#[tokio::test(flavor = "multi_thread")]
async fn all_subscribers_see_one_order_under_concurrent_publishers_and_joins() {
    const PUBLISHERS: usize = 8;
    const EACH: usize = 500;
    let gateway = gateway(&[]);
    let mut early = join_all((0..4).map(|_| Client::subscribed(&gateway, "c"))).await;
    let publishers = join_all((0..PUBLISHERS).map(|_| Client::connect(&gateway))).await;
    let publishing = publishers.into_iter().enumerate().map(|(publisher, mut client)| {
        tokio::spawn(async move {
            for n in 0..EACH {
                client.feed_text(&json!({"type": "publish", "channel": "c", "data": [publisher, n]}).to_string()).await;
            }
            // Its publishes are carried out in order, so the last answer covers all.
            client.send(&json!({"type": "ping"})).await;
            client.expect(&json!({"type": "pong"})).await;
        })
    });
    let publishing: Vec<_> = publishing.collect();
    let mut late = join_all((0..4).map(|_| Client::subscribed(&gateway, "c"))).await;
    join_all(publishing).await;
    publish(&gateway, "c", b"\"end\"").await;

    let mut order = Vec::new();
    for (index, client) in early.iter_mut().chain(&mut late).enumerate() {
        let mut seen = Vec::new();
        loop {
            let data = client.json().await["data"].clone();
            if data == "end" {
                break;
            }
            seen.push((data[0].as_u64().unwrap(), data[1].as_u64().unwrap()));
        }
        match index {
            0 => order.clone_from(&seen),
            // Who joined later has the end of the same order.
            _ => assert!(order.ends_with(&seen), "client {index} saw another order"),
        }
        for publisher in 0..PUBLISHERS as u64 {
            let own: Vec<_> = seen.iter().filter(|(from, _)| *from == publisher).map(|(_, n)| *n).collect();
            assert!(own.is_sorted(), "client {index}: publisher {publisher} was reordered");
        }
    }
    assert_eq!(order.len(), PUBLISHERS * EACH);
}

#[tokio::test(flavor = "multi_thread")]
async fn channels_end_with_their_last_subscriber() {
    let gateway = gateway(&[]);
    let mut client = Client::subscribed(&gateway, "c").await;
    let other = Client::subscribed(&gateway, "c").await;
    let counted = http(&gateway, "GET /api/channels/c", "", b"").await;
    assert_eq!(counted.json(), json!({"channel": "c", "subscribers": 2, "pending": 0}));
    client.send(&json!({"type": "unsubscribe", "channel": "c", "id": 1})).await;
    client.expect(&json!({"type": "unsubscribed", "channel": "c", "id": 1})).await;
    drop(other);
    crate::harness::await_metric(&gateway, "hubcast_channels", 0.0).await;
    assert_eq!(http(&gateway, "GET /api/channels/c", "", b"").await.status, 404);
    assert_eq!(crate::harness::metric(&gateway, "hubcast_connections").await, 1.0);
}
