//! `hubcast.v1`, command by command.

use serde_json::{Value, json};
use tokio_tungstenite::tungstenite::Message;

use crate::harness::{Client, gateway};

#[tokio::test(flavor = "multi_thread")]
async fn the_welcome_names_the_connection_and_its_limits() {
    let gateway = gateway(&[("HUBCAST_SUBSCRIPTIONS_MAX", "7"), ("HUBCAST_PING_INTERVAL", "30s")]);
    let mut client = Client::open(&gateway, "/ws", Some("unknown, hubcast.v1")).await;
    let welcome = client.json().await;
    let instance = welcome["instance_id"].as_str().unwrap();
    assert!(welcome["connection_id"].as_str().unwrap().starts_with(instance), "{welcome}");
    assert_eq!(welcome["ping_interval_ms"], 30_000);
    assert_eq!(welcome["limits"], json!({"message_bytes": 65536, "publish_bytes": 1048576, "subscriptions": 7}));
}

#[tokio::test(flavor = "multi_thread")]
async fn channels_in_the_query_are_subscribed_at_connect() {
    let gateway = gateway(&[]);
    let mut client = Client::open(&gateway, "/ws?channels=a,b%20c,d", None).await;
    assert_eq!(client.json().await["type"], "welcome");
    client.expect(&json!({"type": "subscribed", "channel": "a"})).await;
    let error = client.json().await;
    assert_eq!((&error["code"], &error["channel"]), (&json!("bad_request"), &json!("b c")));
    client.expect(&json!({"type": "subscribed", "channel": "d"})).await;
}

/// One command in, the frames out. `message` is for people, so it is not compared.
#[tokio::test(flavor = "multi_thread")]
async fn each_command_is_answered_with_its_id() {
    let long_id = format!("\"{}\"", "x".repeat(300));
    let long_name = "x".repeat(256);
    let cases = [
        (r#"{"type":"ping"}"#.to_owned(), vec![json!({"type": "pong"})]),
        (r#"{"type":"ping","id":"a\"b"}"#.into(), vec![json!({"type": "pong", "id": "a\"b"})]),
        (r#"{"type":"ping","id":-1.5e3}"#.into(), vec![json!({"type": "pong", "id": -1500.0})]),
        (
            r#" {"id":1,"type":"subscribe","channel":"a:/@#=,;._-Z9"}"#.into(),
            vec![json!({"type": "subscribed", "id": 1, "channel": "a:/@#=,;._-Z9"})],
        ),
        (
            r#"{"type":"subscribe","channel":"\u0061","id":2}"#.into(),
            vec![json!({"type": "subscribed", "id": 2, "channel": "a"})],
        ),
        (
            r#"{"type":"subscribe","channel":"a","id":3}"#.into(),
            vec![json!({"type": "subscribed", "id": 3, "channel": "a"})],
        ),
        (
            r#"{"type":"subscribe","id":4,"channels":["b",{"channel":"c","after":"1-2","token":"t"},7,"x y",{}]}"#
                .into(),
            vec![
                json!({"type": "subscribed", "id": 4, "channel": "b"}),
                json!({"type": "subscribed", "id": 4, "channel": "c"}),
                json!({"type": "error", "id": 4, "code": "bad_request"}),
                json!({"type": "error", "id": 4, "code": "bad_request", "channel": "x y"}),
                json!({"type": "error", "id": 4, "code": "bad_request"}),
            ],
        ),
        (
            r#"{"type":"unsubscribe","id":5,"channels":["b","never"]}"#.into(),
            vec![
                json!({"type": "unsubscribed", "id": 5, "channel": "b"}),
                json!({"type": "unsubscribed", "id": 5, "channel": "never"}),
            ],
        ),
        (
            r#"{"type":"publish","id":6,"channel":"nobody","data":null}"#.into(),
            vec![json!({"type": "published", "id": 6})],
        ),
        (
            r#"{"type":"publish","channel":"c","data":{"x": 1}}"#.into(),
            vec![json!({"type": "event", "channel": "c", "data": {"x": 1}})],
        ),
        (r#"{"type":"publish","id":7,"channel":"c"}"#.into(), vec![error_with_id(7, "bad_request")]),
        (r#"{"type":"publish","id":8,"data":1}"#.into(), vec![error_with_id(8, "bad_request")]),
        (r#"{"type":"subscribe","id":9}"#.into(), vec![error_with_id(9, "bad_request")]),
        (
            r#"{"type":"subscribe","id":10,"channel":"a","channels":["a"]}"#.into(),
            vec![error_with_id(10, "bad_request")],
        ),
        (r#"{"type":"subscribe","id":11,"channels":[]}"#.into(), vec![error_with_id(11, "bad_request")]),
        (r#"{"type":"histories","id":12,"channel":"a"}"#.into(), vec![error_with_id(12, "unknown_type")]),
        (r#"{"type":5,"id":13}"#.into(), vec![error_with_id(13, "bad_request")]),
        (r#"{"id":14}"#.into(), vec![error_with_id(14, "bad_request")]),
        (
            format!(r#"{{"type":"subscribe","id":15,"channel":"{long_name}"}}"#),
            vec![json!({"type": "error", "id": 15, "code": "bad_request", "channel": long_name[..255]})],
        ),
        (
            r#"{"type":"subscribe","id":16,"channel":"__probe"}"#.into(),
            vec![json!({"type": "error", "id": 16, "code": "bad_request", "channel": "__probe"})],
        ),
        (r#"{"type":"ping","id":{}}"#.into(), vec![json!({"type": "error", "code": "bad_request"})]),
        (format!(r#"{{"type":"ping","id":{long_id}}}"#), vec![json!({"type": "error", "code": "bad_request"})]),
        (r#"{"type":"ping","type":"ping"}"#.into(), vec![json!({"type": "error", "code": "bad_request"})]),
        ("not json".into(), vec![json!({"type": "error", "code": "bad_request"})]),
        ("".into(), vec![json!({"type": "error", "code": "bad_request"})]),
        ("[]".into(), vec![json!({"type": "error", "code": "bad_request"})]),
        ("[".repeat(10_000), vec![json!({"type": "error", "code": "bad_request"})]),
        (format!("\"{}\"", "x".repeat(60_000)), vec![json!({"type": "error", "code": "bad_request"})]),
        (
            r#"[{"type":"ping","id":1},7,{"type":"nope","id":2},{"type":"ping","id":3}]"#.into(),
            vec![
                json!({"type": "pong", "id": 1}),
                json!({"type": "error", "code": "bad_request"}),
                error_with_id(2, "unknown_type"),
                json!({"type": "pong", "id": 3}),
            ],
        ),
    ];
    let gateway = gateway(&[]);
    let mut client = Client::connect(&gateway).await;
    for (command, answers) in cases {
        client.send_text(&command).await;
        for expected in answers {
            let mut answer = client.json().await;
            let message = answer.as_object_mut().unwrap().remove("message");
            assert_eq!(answer, expected, "to {command:.200}");
            assert!(
                message.is_none_or(|message| message.as_str().is_some_and(|text| text.len() <= 200)),
                "{command:.200}"
            );
        }
    }
}

fn error_with_id(id: u64, code: &str) -> Value {
    json!({"type": "error", "id": id, "code": code})
}

#[tokio::test(flavor = "multi_thread")]
async fn one_connection_has_a_bounded_number_of_subscriptions() {
    let gateway = gateway(&[("HUBCAST_SUBSCRIPTIONS_MAX", "2")]);
    let mut client = Client::connect(&gateway).await;
    client.send(&json!({"type": "subscribe", "channels": ["a", "b", "c", "a"], "id": 1})).await;
    client.expect(&json!({"type": "subscribed", "channel": "a", "id": 1})).await;
    client.expect(&json!({"type": "subscribed", "channel": "b", "id": 1})).await;
    let error = client.json().await;
    assert_eq!((&error["code"], &error["channel"]), (&json!("limit_exceeded"), &json!("c")));
    client.expect(&json!({"type": "subscribed", "channel": "a", "id": 1})).await;
    client.send(&json!({"type": "unsubscribe", "channel": "b"})).await;
    client.expect(&json!({"type": "unsubscribed", "channel": "b"})).await;
    client.send(&json!({"type": "subscribe", "channel": "c"})).await;
    client.expect(&json!({"type": "subscribed", "channel": "c"})).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn rules_say_where_clients_may_publish() {
    let rules = r#"[{"match":"chat:secret"},{"match":"chat:*","client_publish":true,"slow":"close"}]"#;
    let gateway = gateway(&[("HUBCAST_CHANNEL_RULES", rules), ("HUBCAST_PUBLISH_BYTES_MAX", "20")]);
    let mut client = Client::connect(&gateway).await;
    for (channel, data, answer) in [
        ("chat:1", "1", json!({"type": "published", "id": 1})),
        ("chat:secret", "1", json!({"type": "error", "id": 1, "code": "forbidden", "channel": "chat:secret"})),
        ("news", "1", json!({"type": "error", "id": 1, "code": "forbidden", "channel": "news"})),
        (
            "chat:1",
            "123456789012345678901",
            json!({"type": "error", "id": 1, "code": "too_large", "channel": "chat:1"}),
        ),
    ] {
        client.send_text(&format!(r#"{{"type":"publish","channel":"{channel}","data":{data},"id":1}}"#)).await;
        let mut reply = client.json().await;
        reply.as_object_mut().unwrap().remove("message");
        assert_eq!(reply, answer);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn binary_frames_are_not_part_of_the_protocol() {
    let gateway = gateway(&[]);
    let mut client = Client::connect(&gateway).await;
    client.send_message(Message::binary(b"{}".as_slice())).await;
    assert_eq!(client.close_frame().await.0, 1003);
}

/// A frame full of commands is answered up to a bound, and the rest with one error.
#[tokio::test(flavor = "multi_thread")]
async fn one_frame_has_a_bounded_number_of_answers() {
    let gateway = gateway(&[]);
    let mut client = Client::connect(&gateway).await;
    client.send_text(&format!("[{}1]", "1,".repeat(30_000))).await;
    for _ in 1..4096 {
        assert_eq!(client.json().await["code"], "bad_request");
    }
    assert_eq!(client.json().await["code"], "limit_exceeded");
    client.send_text(r#"{"type":"ping"}"#).await;
    client.expect(&json!({"type": "pong"})).await;
}
