//! What one connection may do, and what all may take together: stories of floods, each with a neighbour who hears on.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use hubcast::gateway::Gateway;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};

use crate::binary::Binary;
use crate::harness::{Client, HANDSHAKE, Raw, await_metric, eventually, gateway, masked, metric, publish, soon};

async fn limited(gateway: &Gateway, limit: &str) -> f64 {
    metric(gateway, &format!(r#"hubcast_limited_total{{limit="{limit}"}}"#)).await
}

/// A publication still reaches whoever did nothing.
async fn hears(gateway: &Gateway, neighbour: &mut Client) {
    publish(gateway, "news", b"1").await;
    neighbour.expect(&json!({"type": "event", "channel": "news", "data": 1})).await;
}

/// Sends a command many times in one go, each with its number as the id.
async fn flood(client: &mut Client, command: &Value, times: usize) {
    for id in 0..times {
        let mut command = command.clone();
        command["id"] = id.into();
        client.feed_text(&command.to_string()).await;
    }
    client.flush().await;
}

/// Whoever sends too many commands is told when to go on, and can; whoever goes on at once is closed.
#[tokio::test(flavor = "multi_thread")]
async fn commands_above_the_rate_are_refused_and_a_flood_is_closed() {
    let gateway = gateway(&[("HUBCAST_COMMANDS_PER_SECOND", "5")]);
    let mut neighbour = Client::subscribed(&gateway, "news").await;
    let mut client = Client::connect(&gateway).await;
    flood(&mut client, &json!({"type": "ping"}), 15).await;
    let mut refused = 0;
    for id in 0..15 {
        let answer = client.json().await;
        assert_eq!(answer["id"], id);
        if answer["type"] == "error" {
            assert_eq!(answer["code"], "rate_limited", "{answer}");
            assert!((1..=2_000).contains(&answer["retry_after_ms"].as_u64().unwrap()), "{answer}");
            refused += 1;
        } else {
            assert!(answer["type"] == "pong" && refused == 0, "{answer}");
        }
    }
    assert!((1..=5).contains(&refused), "ten at once are fine: {refused}");
    assert_eq!(limited(&gateway, "commands").await, f64::from(refused));
    eventually("a pong", async || {
        client.send(&json!({"type": "ping"})).await;
        let answer = client.json().await;
        let wait = answer["retry_after_ms"].as_u64();
        tokio::time::sleep(Duration::from_millis(wait.unwrap_or_default())).await;
        wait.is_none().then_some(())
    })
    .await;
    flood(&mut client, &json!({"type": "ping"}), 200).await;
    assert_eq!(client.close_frame().await, (1008, "too many commands".to_owned()));
    await_metric(&gateway, r#"hubcast_connections_closed_total{reason="rate_limited"}"#, 1.0).await;
    hears(&gateway, &mut neighbour).await;
    crate::observe::threat(46, "above the rate: rate_limited; a flood: 1008");
}

/// Each channel of a list is a command; a list is never more than a burst, so that it can be carried out at all.
#[tokio::test(flavor = "multi_thread")]
async fn a_list_of_channels_costs_what_its_channels_cost() {
    let gateway = gateway(&[("HUBCAST_COMMANDS_PER_SECOND", "10")]);
    let mut client = Client::connect(&gateway).await;
    let names: Vec<_> = (0..100).map(|number| format!("c{number}")).collect();
    client.send(&json!({"type": "subscribe", "channels": names})).await;
    for name in &names {
        client.expect(&json!({"type": "subscribed", "channel": name})).await;
    }
    client.send(&json!({"type": "unsubscribe", "channels": names})).await;
    let answer = client.json().await;
    assert_eq!((&answer["type"], &answer["code"]), (&json!("error"), &json!("rate_limited")), "{answer}");
}

#[tokio::test(flavor = "multi_thread")]
async fn publishes_have_a_rate_of_their_own() {
    let gateway = gateway(&[("HUBCAST_PUBLISHES_PER_SECOND", "5")]);
    let mut neighbour = Client::subscribed(&gateway, "news").await;
    let mut client = Client::connect(&gateway).await;
    flood(&mut client, &json!({"type": "ping"}), 100).await;
    for id in 0..100 {
        client.expect(&json!({"type": "pong", "id": id})).await;
    }
    flood(&mut client, &json!({"type": "publish", "channel": "a", "data": 1}), 15).await;
    let mut published = 0;
    for _ in 0..15 {
        published += usize::from(client.json().await["type"] == "published");
    }
    assert!((10..15).contains(&published), "{published}");
    assert_eq!(limited(&gateway, "publishes").await, (15 - published) as f64);
    flood(&mut client, &json!({"type": "publish", "channel": "a", "data": 1}), 100).await;
    assert_eq!(client.close_frame().await, (1008, "too many publishes".to_owned()));
    hears(&gateway, &mut neighbour).await;
}

/// Control frames cost a flooder its connection, pings as well as pongs that nobody asked for, also in raw mode.
#[tokio::test(flavor = "multi_thread")]
async fn floods_of_pings_and_pongs_end_with_1008() {
    let gateway = gateway(&[("HUBCAST_PINGS_PER_SECOND", "1")]);
    let mut neighbour = Client::subscribed(&gateway, "news").await;
    for first in [0x89, 0x8A] {
        let mut raw = Raw::upgrade(&gateway, "/ws", b"").await;
        raw.send(&masked(first, b"x").repeat(200)).await;
        assert_eq!(raw.close_frame().await, (1008, "too many pings or pongs".to_owned()));
    }
    assert_eq!(limited(&gateway, "pings").await, 2.0);
    // As many at once as twenty seconds allow are nothing special.
    let mut raw = Raw::upgrade(&gateway, "/ws", b"").await;
    raw.send(&masked(0x89, b"x").repeat(20)).await;
    raw.frame().await.expect("the welcome");
    assert_eq!(raw.frame().await.expect("a pong").first, 0x8A);
    hears(&gateway, &mut neighbour).await;
    crate::observe::threat(40, "above the rate: 1008, counted; a neighbour receives");
    crate::observe::threat(41, "above the rate: 1008, counted; a neighbour receives");
}

#[tokio::test(flavor = "multi_thread")]
async fn so_many_bad_requests_are_forgiven_and_no_more() {
    let gateway = gateway(&[("HUBCAST_BAD_REQUESTS_PER_MINUTE", "5")]);
    let mut neighbour = Client::subscribed(&gateway, "news").await;
    let mut client = Client::connect(&gateway).await;
    for text in ["{", "[]", r#"{"type":7}"#, r#"{"type":"dance"}"#, r#"{"type":"publish","channel":"a b","data":1}"#] {
        client.send_text(text).await;
        let answer = client.json().await;
        assert!(matches!(answer["code"].as_str(), Some("bad_request" | "unknown_type")), "{answer}");
    }
    client.send(&json!({"type": "ping"})).await;
    client.expect(&json!({"type": "pong"})).await;
    client.send_text("{").await;
    assert_eq!(client.close_frame().await, (1008, "too many bad requests".to_owned()));
    assert_eq!(limited(&gateway, "bad_requests").await, 1.0);
    hears(&gateway, &mut neighbour).await;
    crate::observe::threat(44, "sustained: 1008, counted");
}

/// Bytes above the rate wait in the socket: nothing is refused and nothing lost, it takes its time.
#[tokio::test(flavor = "multi_thread")]
async fn bytes_above_the_rate_wait() {
    let gateway = gateway(&[("HUBCAST_BYTES_PER_SECOND", "4KiB")]);
    let mut neighbour = Client::subscribed(&gateway, "news").await;
    let mut client = Client::connect(&gateway).await;
    let started = Instant::now();
    // Some 250 bytes each, 12.5 KiB in all: what is above a burst takes more than two seconds.
    let command = json!({"type": "ping", "padding": "x".repeat(200)});
    flood(&mut client, &command, 50).await;
    hears(&gateway, &mut neighbour).await;
    for id in 0..50 {
        client.expect(&json!({"type": "pong", "id": id})).await;
    }
    assert!(started.elapsed() > Duration::from_secs(1), "{:?}", started.elapsed());
    assert!(limited(&gateway, "bytes").await > 0.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_instance_has_so_many_channels() {
    let gateway = gateway(&[("HUBCAST_CHANNELS_MAX", "2"), ("HUBCAST_SUBSCRIPTIONS_MAX", "3")]);
    let mut client = Client::subscribed(&gateway, "a").await;
    let mut other = Client::subscribed(&gateway, "b").await;
    client.send(&json!({"type": "subscribe", "channels": ["c", "b"]})).await;
    let refused = client.json().await;
    assert_eq!((&refused["code"], &refused["channel"]), (&json!("limit_exceeded"), &json!("c")), "{refused}");
    client.expect(&json!({"type": "subscribed", "channel": "b"})).await;
    let mut raw = Client::open(&gateway, "/ws?channel=c", Some("hubcast.raw.v1")).await;
    assert_eq!(raw.close_frame().await, (1013, "too many channels on this instance".to_owned()));
    assert_eq!(limited(&gateway, "channels").await, 2.0);
    for client in [&mut client, &mut other] {
        client.send(&json!({"type": "unsubscribe", "channel": "b"})).await;
        client.expect(&json!({"type": "unsubscribed", "channel": "b"})).await;
    }
    client.send(&json!({"type": "subscribe", "channel": "c"})).await;
    client.expect(&json!({"type": "subscribed", "channel": "c"})).await;
    await_metric(&gateway, "hubcast_channels", 2.0).await;
    crate::observe::threat(47, "above the channels of an instance: limit_exceeded, raw 1013");
}

/// One request to a process's internal listener, and its whole answer.
async fn ask(addr: SocketAddr, request_line: &str, body: &[u8]) -> String {
    let mut socket = TcpStream::connect(addr).await.unwrap();
    let head =
        format!("{request_line} HTTP/1.1\r\nHost: t\r\nConnection: close\r\nContent-Length: {}\r\n\r\n", body.len());
    socket.write_all(&[head.as_bytes(), body].concat()).await.unwrap();
    let mut answer = String::new();
    soon("an answer", socket.read_to_string(&mut answer)).await.unwrap();
    answer
}

async fn scrape(addr: SocketAddr, series: &str) -> f64 {
    let text = ask(addr, "GET /metrics", b"").await;
    let value = text.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' ')?.parse().ok());
    value.unwrap_or_else(|| panic!("no {series} in {text}"))
}

/// A handshake with a receive buffer that fills soon; the status.
async fn upgrade(addr: SocketAddr, path: &str) -> (u16, Raw) {
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(4096).unwrap();
    let mut raw = Raw { socket: socket.connect(addr).await.unwrap() };
    raw.send(format!("GET {path} HTTP/1.1\r\n{HANDSHAKE}").as_bytes()).await;
    let status = raw.head().await[9..12].parse().unwrap();
    (status, raw)
}

/// Clients that never read, each with other messages, fill the memory that there is for what waits. Nobody new is let in
/// and nothing is published, until the slowest have gone; then everything is as before.
#[tokio::test(flavor = "multi_thread")]
async fn before_memory_ends_nobody_comes_in_and_the_slowest_go() {
    let binary = Binary::start(
        1000,
        &[
            ("HUBCAST_MEMORY_MAX", "16MiB"),
            ("HUBCAST_CHANNEL_RULES", r#"[{"match":"slow-*","slow":"drop_oldest"}]"#),
            ("HUBCAST_LOG", "error"),
        ],
    );
    let (status, mut neighbour) = upgrade(binary.public, "/ws?channels=news").await;
    assert_eq!(status, 101);
    let mut stalled = Vec::new();
    for number in 0..40 {
        let (status, raw) = upgrade(binary.public, &format!("/ws?channels=slow-{number}")).await;
        assert_eq!(status, 101);
        stalled.push(raw);
    }
    let payload = vec![b'x'; 200_000];
    let (mut publishes_refused, mut handshakes_refused, mut round) = (false, false, 0);
    let pressing = async {
        while !publishes_refused || !handshakes_refused {
            let path = format!("POST /api/publish/slow-{}", round % 40);
            let answer = ask(binary.internal, &path, &payload).await;
            if answer.starts_with("HTTP/1.1 503") {
                assert!(
                    answer.contains("\"unavailable\"") && answer.to_lowercase().contains("retry-after"),
                    "{answer}"
                );
                publishes_refused = true;
                handshakes_refused |= upgrade(binary.public, "/ws").await.0 == 503;
            } else {
                assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
            }
            round += 1;
        }
    };
    soon("memory to be tight", pressing).await;
    let tight = std::time::Instant::now();
    assert!(scrape(binary.internal, r#"hubcast_limited_total{limit="memory"}"#).await >= 1.0);
    assert!(scrape(binary.internal, r#"hubcast_connections_refused_total{reason="memory"}"#).await >= 1.0);
    eventually("the slowest to go", async || {
        (scrape(binary.internal, r#"hubcast_connections_closed_total{reason="overload"}"#).await >= 1.0).then_some(())
    })
    .await;
    eventually("room again", async || {
        let answer = ask(binary.internal, "POST /api/publish/news", b"\"again\"").await;
        (answer.starts_with("HTTP/1.1 200") && upgrade(binary.public, "/ws").await.0 == 101).then_some(())
    })
    .await;
    assert!(scrape(binary.internal, r#"hubcast_ledger_bytes{kind="frames"}"#).await < 12.0 * 1024.0 * 1024.0);
    loop {
        let frame = neighbour.frame().await.expect("the neighbour is served");
        if frame.payload.ends_with(b"\"data\":\"again\"}") {
            break;
        }
    }
    drop(stalled);
    crate::observe::threat(
        65,
        "new ones and publishes 503, then the slowest are closed with 1013; room again afterwards",
    );
    crate::observe::fault(
        "memory cap",
        None,
        tight.elapsed(),
        "at HUBCAST_MEMORY_MAX=16MiB: 503, then the slowest are closed",
    );
}

/// Parts of messages that never end are bounded over all connections: whoever adds to too many has to go.
#[tokio::test(flavor = "multi_thread")]
async fn what_arrives_in_parts_is_bounded_over_all_connections() {
    let binary = Binary::start(1000, &[("HUBCAST_MEMORY_MAX", "8MiB")]);
    let mut senders = Vec::new();
    for _ in 0..60 {
        let (status, mut raw) = upgrade(binary.public, "/ws").await;
        assert_eq!(status, 101);
        // All but the last byte of a message.
        let message = masked(0x81, &[b' '; 60_000]);
        raw.send(&message[..message.len() - 1]).await;
        senders.push(raw);
    }
    eventually("somebody to go", async || {
        (scrape(binary.internal, r#"hubcast_connections_closed_total{reason="overload"}"#).await >= 10.0).then_some(())
    })
    .await;
    // A quarter of the 8 MiB, and what the last ones brought at once.
    let arriving = scrape(binary.internal, r#"hubcast_ledger_bytes{kind="arriving"}"#).await;
    assert!(arriving > 0.0 && arriving < 3.0 * 1024.0 * 1024.0, "{arriving}");
    assert_eq!(upgrade(binary.public, "/ws").await.0, 101, "who brings nothing is welcome");
    drop(senders);
    eventually("nothing to be arriving", async || {
        (scrape(binary.internal, r#"hubcast_ledger_bytes{kind="arriving"}"#).await == 0.0).then_some(())
    })
    .await;
    crate::observe::threat(37, "parts of messages over all connections: bounded, those who add to them are closed");
}
