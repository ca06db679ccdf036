//! The internal listener: publishing in all forms, looking, disconnecting, health.

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::harness::{Client, await_metric, gateway, http, metric, publish, soon};

#[tokio::test(flavor = "multi_thread")]
async fn every_form_of_publish_delivers_and_reports_each_channel() {
    let gateway = gateway(&[("HUBCAST_PUBLISH_BYTES_MAX", "100")]);
    let mut client = Client::subscribed(&gateway, "a").await;
    let long = "x".repeat(100);
    let cases: [(Value, u16, Value, Vec<Value>); 4] = [
        (json!({"channel": "a", "data": {"n": 1}}), 200, json!([{"channel": "a"}]), vec![json!({"n": 1})]),
        (
            json!({"channels": ["a", "b", "a"], "data": 2}),
            200,
            json!([{"channel": "a"}, {"channel": "b"}, {"channel": "a"}]),
            vec![json!(2), json!(2)],
        ),
        (
            json!({"messages": [{"channel": "a", "data": null}, {"channel": "b", "data": 3}]}),
            200,
            json!([{"channel": "a"}, {"channel": "b"}]),
            vec![json!(null)],
        ),
        (
            json!({"messages": [{"channel": "a", "data": 4}, {"channel": "x y", "data": 5}, {"channel": "a", "data": long}, {"channel": "a", "data": 6}]}),
            413,
            json!([{"channel": "a"}, {"channel": "x y", "error": "bad_request"}, {"channel": "a", "error": "too_large"}, {"channel": "a"}]),
            vec![json!(4), json!(6)],
        ),
    ];
    for (body, status, results, delivered) in cases {
        let answer = http(&gateway, "POST /api/publish", "", body.to_string().as_bytes()).await;
        assert_eq!(answer.status, status, "{body}");
        let mut got = answer.json()["results"].clone();
        for result in got.as_array_mut().unwrap() {
            if let Some(error) = result.get_mut("error") {
                *error = error["code"].clone();
            }
        }
        assert_eq!(got, results, "{body}");
        for data in delivered {
            client.expect(&json!({"type": "event", "channel": "a", "data": data})).await;
        }
    }
    let answer = http(&gateway, "POST /api/publish/a%3Ab/c", "", b"{}").await;
    assert_eq!((answer.status, &answer.json()["results"][0]["channel"]), (200, &json!("a:b/c")));
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_requests_have_their_status() {
    let gateway = gateway(&[("HUBCAST_PUBLISH_BYTES_MAX", "100"), ("HUBCAST_HANDSHAKE_TIMEOUT", "500ms")]);
    let big = vec![b'1'; 101];
    let cases: [(&str, &str, &[u8], u16, &str); 13] = [
        ("POST /api/publish", "", b"not json", 400, "bad_request"),
        ("POST /api/publish", "", br#"{"channel":"a"}"#, 400, "bad_request"),
        ("POST /api/publish", "", br#"{"channel":"a","data":1,"dta":2}"#, 400, "bad_request"),
        ("POST /api/publish/__a", "", b"1", 400, "bad_request"),
        ("POST /api/publish/a", "Idempotency-Key: k\r\n", b"1", 400, "bad_request"),
        ("POST /api/publish/a", "", &big, 413, "too_large"),
        ("GET /api/publish", "", b"", 405, "method_not_allowed"),
        ("POST /api/channels", "", b"", 405, "method_not_allowed"),
        ("GET /api/nothing", "", b"", 404, "not_found"),
        ("GET /nothing", "", b"", 404, "not_found"),
        ("GET /api/channels?limit=0", "", b"", 400, "bad_request"),
        ("GET /api/connections?page=x", "", b"", 400, "bad_request"),
        ("POST /api/disconnect", "", br#"{"connection_id":"nobody"}"#, 404, "not_found"),
    ];
    for (request, headers, body, status, code) in cases {
        let answer = http(&gateway, request, headers, body).await;
        assert_eq!(answer.status, status, "{request} {answer:?}");
        assert_eq!(answer.json()["error"]["code"], code, "{request}");
        assert!(answer.json()["error"]["message"].is_string(), "{request}");
        assert!(answer.head.to_lowercase().contains("content-type: application/json"), "{request}");
    }
    // A body that never comes is given up.
    let mut slow = TcpStream::connect(gateway.internal_addr()).await.unwrap();
    slow.write_all(b"POST /api/publish/a HTTP/1.1\r\nHost: t\r\nContent-Length: 5\r\n\r\n1").await.unwrap();
    let mut answer = String::new();
    soon("the slow request's answer", slow.read_to_string(&mut answer)).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 408"), "{answer}");
}

#[tokio::test(flavor = "multi_thread")]
async fn api_keys_open_the_api_and_health_needs_none() {
    let gateway = gateway(&[("HUBCAST_API_KEYS", "canary-first, canary-second")]);
    let keyed = [
        ("", 401),
        ("Authorization: Bearer wrong\r\n", 401),
        ("Authorization: canary-first\r\n", 401),
        ("X-API-Key: \r\n", 401),
        ("Authorization: Bearer canary-first\r\n", 200),
        ("X-API-Key: canary-second\r\n", 200),
    ];
    for (header, status) in keyed {
        assert_eq!(http(&gateway, "POST /api/publish/a", header, b"1").await.status, status, "{header}");
    }
    for path in ["/livez", "/readyz", "/metrics"] {
        assert_eq!(http(&gateway, &format!("GET {path}"), "", b"").await.status, 200, "{path}");
    }
    crate::observe::threat(24, "no key, a wrong one, an empty one: 401; health needs none");
}

#[tokio::test(flavor = "multi_thread")]
async fn pipelined_publishes_are_answered_in_order_and_flushed_together() {
    const REQUESTS: usize = 100;
    let gateway = gateway(&[("HUBCAST_WORKER_THREADS", "1")]);
    let mut client = Client::subscribed(&gateway, "a").await;
    let mut socket = TcpStream::connect(gateway.internal_addr()).await.unwrap();
    let burst: String = (0..REQUESTS)
        .map(|n| format!("POST /api/publish/a HTTP/1.1\r\nHost: t\r\nContent-Length: 3\r\n\r\n{n:3}"))
        .collect();
    socket.write_all(burst.as_bytes()).await.unwrap();
    for n in 0..REQUESTS {
        assert_eq!(client.json().await["data"], json!(n));
    }
    let mut answers = Vec::new();
    let mut buffer = [0; 4096];
    while String::from_utf8_lossy(&answers).matches("HTTP/1.1 200").count() < REQUESTS {
        let len = soon("the answers", socket.read(&mut buffer)).await.unwrap();
        assert!(len > 0, "keep-alive: {}", String::from_utf8_lossy(&answers));
        answers.extend(&buffer[..len]);
    }
    // 100 messages to one client, a sample of the latency histogram for each flush.
    let flushes = metric(&gateway, "hubcast_publish_to_socket_seconds_count").await;
    assert!(flushes < REQUESTS as f64 / 2.0, "{flushes} flushes");
}

#[tokio::test(flavor = "multi_thread")]
async fn channels_and_connections_are_listed_in_pages() {
    let gateway = gateway(&[]);
    let mut clients = Vec::new();
    for name in ["a:1", "a:2", "a:3", "b"] {
        clients.push(Client::subscribed(&gateway, name).await);
    }
    let page = http(&gateway, "GET /api/channels?prefix=a:&limit=2", "", b"").await.json();
    let names = |page: &Value| {
        page["channels"]
            .as_array()
            .unwrap()
            .iter()
            .map(|c| c["channel"].as_str().unwrap().to_owned())
            .collect::<Vec<_>>()
    };
    assert_eq!(names(&page), ["a:1", "a:2"]);
    let next = format!("GET /api/channels?prefix=a:&limit=2&page={}", page["page"].as_str().unwrap());
    let page = http(&gateway, &next, "", b"").await.json();
    assert_eq!((names(&page), &page["page"]), (vec!["a:3".to_owned()], &Value::Null));

    let mut seen = Vec::new();
    let mut token = String::new();
    loop {
        let page = http(&gateway, &format!("GET /api/connections?limit=3{token}"), "", b"").await.json();
        seen.extend(page["connections"].as_array().unwrap().clone());
        match page["page"].as_str() {
            Some(next) => token = format!("&page={next}"),
            None => break,
        }
    }
    assert_eq!(seen.len(), 4);
    assert_eq!(seen[0]["subscriptions"], 1);
    let in_b = http(&gateway, "GET /api/connections?channel=b", "", b"").await.json();
    assert_eq!(in_b["connections"][0]["connection_id"], seen[3]["connection_id"]);
    let elsewhere = http(&gateway, "GET /api/connections?instance=other", "", b"").await.json();
    assert_eq!(elsewhere["connections"], json!([]));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_backend_disconnects_one_connection_or_a_whole_channel() {
    let gateway = gateway(&[]);
    let mut one = Client::subscribed(&gateway, "a").await;
    let mut two = Client::subscribed(&gateway, "a").await;
    let mut three = Client::subscribed(&gateway, "b").await;
    let list = http(&gateway, "GET /api/connections?channel=b", "", b"").await.json();
    let body = json!({"connection_id": list["connections"][0]["connection_id"], "code": 4000, "reason": "banned"});
    assert_eq!(
        http(&gateway, "POST /api/disconnect", "", body.to_string().as_bytes()).await.json(),
        json!({"disconnected": 1})
    );
    assert_eq!(three.close_frame().await, (4000, "banned".to_owned()));
    let answer = http(&gateway, "POST /api/disconnect", "", br#"{"channel":"a"}"#).await;
    assert_eq!(answer.json(), json!({"disconnected": 2}));
    assert_eq!(one.close_frame().await.0, 3003);
    assert_eq!(two.close_frame().await.0, 3003);
    for mut client in [one, two, three] {
        client.finish().await;
    }
    await_metric(&gateway, r#"hubcast_connections_closed_total{reason="disconnected"}"#, 3.0).await;
    await_metric(&gateway, "hubcast_channels", 0.0).await;
}

/// What is counted, and that it comes back to zero.
#[tokio::test(flavor = "multi_thread")]
async fn metrics_tell_the_truth() {
    let gateway = gateway(&[]);
    let mut a = Client::subscribed(&gateway, "a").await;
    let mut b = Client::subscribed(&gateway, "a").await;
    publish(&gateway, "a", b"1").await;
    a.send_text(r#"{"type":"publish","channel":"a","data":2}"#).await;
    for client in [&mut a, &mut b] {
        client.text().await;
        client.text().await;
    }
    for (series, value) in [
        ("hubcast_connections", 2.0),
        ("hubcast_connections_opened_total", 2.0),
        ("hubcast_subscriptions", 2.0),
        ("hubcast_channels", 1.0),
        (r#"hubcast_publications_total{source="http"}"#, 1.0),
        (r#"hubcast_publications_total{source="socket"}"#, 1.0),
        ("hubcast_deliveries_total", 4.0),
        // Two welcomes, two confirmations, four events.
        ("hubcast_frames_sent_total", 8.0),
        ("hubcast_fanout_duration_seconds_count", 2.0),
        ("hubcast_outbox_frames", 0.0),
        ("hubcast_outbox_bytes", 0.0),
    ] {
        await_metric(&gateway, series, value).await;
    }
    drop((a, b));
    for series in ["hubcast_connections", "hubcast_subscriptions", "hubcast_channels"] {
        await_metric(&gateway, series, 0.0).await;
    }
    await_metric(&gateway, r#"hubcast_connections_closed_total{reason="lost"}"#, 2.0).await;
}
