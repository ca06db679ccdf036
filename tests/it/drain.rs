//! SIGTERM: the real binary, under load, loses nothing that it accepted.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use futures_util::StreamExt;
use futures_util::future::join_all;
use rustix::process::Signal;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_tungstenite::tungstenite::Message;

use crate::binary::{Binary, exchange};
use crate::harness::{Client, Raw, await_metric, gateway, soon};

/// One request on a keep-alive connection; the status and the head.
async fn request(socket: &mut TcpStream, path: &str, body: &str) -> Option<u16> {
    let request = format!("POST {path} HTTP/1.1\r\nHost: t\r\nContent-Length: {}\r\n\r\n{body}", body.len());
    socket.write_all(request.as_bytes()).await.ok()?;
    let mut answer = Vec::new();
    while !answer.ends_with(b"}\n") {
        let mut buffer = [0; 1024];
        let len = socket.read(&mut buffer).await.ok().filter(|len| *len > 0)?;
        answer.extend(&buffer[..len]);
    }
    String::from_utf8_lossy(&answer).split(' ').nth(1)?.parse().ok()
}

#[tokio::test(flavor = "multi_thread")]
async fn sigterm_under_load_gives_each_reader_everything_accepted_and_1012() {
    const CLIENTS: usize = 2_000;
    let binary = Binary::start(20_000, &[("HUBCAST_DRAIN_TIME", "2s")]);
    let url = format!("ws://{}/ws?channels=c", binary.public);
    let mut clients = Vec::new();
    for _ in 0..CLIENTS {
        let (mut socket, _) = tokio_tungstenite::connect_async(&url).await.expect("connected");
        for expected in ["welcome", "subscribed"] {
            let frame = soon(expected, socket.next()).await.unwrap().unwrap();
            assert_eq!(serde_json::from_str::<Value>(frame.to_text().unwrap()).unwrap()["type"], expected);
        }
        clients.push(socket);
    }
    // One publisher, until the API is gone; `accepted` is what was answered 200.
    let accepted = Arc::new(AtomicU64::new(0));
    let publishing = tokio::spawn({
        let (accepted, internal) = (Arc::clone(&accepted), binary.internal);
        async move {
            let mut socket = TcpStream::connect(internal).await.unwrap();
            let mut interval = tokio::time::interval(std::time::Duration::from_millis(20));
            for n in 0.. {
                interval.tick().await;
                match request(&mut socket, "/api/publish/c", &n.to_string()).await {
                    Some(status) => assert_eq!(status, 200, "publishes are accepted until the last close"),
                    None => break,
                }
                accepted.store(n + 1, Ordering::Release);
            }
        }
    });
    let reading: Vec<_> = clients
        .into_iter()
        .map(|mut socket| {
            tokio::spawn(async move {
                let (mut next, mut was_told) = (0, false);
                loop {
                    match soon("a frame", socket.next()).await {
                        Some(Ok(Message::Text(text))) => {
                            let frame: Value = serde_json::from_str(&text).unwrap();
                            match frame["type"].as_str() {
                                Some("event") => assert_eq!(frame["data"], json!(next), "in order, none missing"),
                                Some("draining") => was_told = frame["retry_after_ms"].is_u64(),
                                other => panic!("{other:?}"),
                            }
                            next += u64::from(frame["type"] == "event");
                        }
                        Some(Ok(Message::Close(Some(frame)))) => {
                            assert_eq!(u16::from(frame.code), 1012);
                            break;
                        }
                        other => panic!("{other:?}"),
                    }
                }
                while let Some(Ok(_)) = socket.next().await {}
                assert!(was_told, "draining comes first");
                next
            })
        })
        .collect();
    soon("some load", async {
        let mut interval = tokio::time::interval(std::time::Duration::from_millis(10));
        while accepted.load(Ordering::Acquire) < 20 {
            interval.tick().await;
        }
    })
    .await;
    let started = std::time::Instant::now();
    let accepted_before = accepted.load(Ordering::Acquire);
    binary.process.signal(Signal::TERM);
    let began = std::time::Instant::now();
    let refused = refusal(&binary).await;
    assert!(refused.to_lowercase().contains("retry-after"), "{refused}");
    let results = join_all(reading).await;
    for result in results {
        let got = result.expect("the reader got everything, in order, and 1012");
        assert!(got >= accepted_before, "{accepted_before} were accepted before the signal, a reader got {got}");
    }
    let (status, output) = binary.end().await;
    assert!(status.success(), "{status}");
    assert!(started.elapsed() >= std::time::Duration::from_millis(1_900), "closes are spread over the window");
    assert!(output.contains(&format!("{CLIENTS} closed, {CLIENTS} flushed, 0 cut off")), "{output}");
    publishing.await.unwrap();
    crate::observe::fault(
        "sigterm under load",
        None,
        began.elapsed(),
        "2,000 readers, a drain of 2 s: all accepted and 1012 for each; exit 0",
    );
}

/// Waits until the gateway is not ready any more; from then on a new connection is refused at once.
async fn refusal(binary: &Binary) -> String {
    crate::harness::eventually("readyz to turn", async || {
        let ready = exchange(binary.internal, "GET /readyz HTTP/1.1\r\nHost: t\r\nConnection: close\r\n\r\n").await?;
        ready.starts_with("HTTP/1.1 503").then_some(())
    })
    .await;
    let answer = exchange(binary.public, &format!("GET /ws HTTP/1.1\r\n{}", crate::harness::HANDSHAKE)).await;
    answer.filter(|answer| answer.starts_with("HTTP/1.1 503")).expect("the public listener refuses")
}

/// Accepted before its close frame means: delivered. Nobody is closed with less.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_published_during_the_drain_reaches_those_still_open() {
    let gateway = gateway(&[("HUBCAST_DRAIN_TIME", "400ms")]);
    let mut clients = join_all((0..20).map(|_| Client::subscribed(&gateway, "c"))).await;
    let broker = Arc::clone(gateway.broker());
    let mut draining = tokio::spawn(gateway.drain());
    for client in &mut clients {
        assert_eq!(client.json().await["type"], "draining");
    }
    let mut published = 0;
    let mut interval = tokio::time::interval(std::time::Duration::from_millis(5));
    let drained = loop {
        tokio::select! {
            drained = &mut draining => break drained.unwrap(),
            _ = interval.tick() => {
                let payload = published.to_string();
                let payload = hubcast::publication::Payload::Json(&payload);
                broker.start_publish("c", payload, None).await.unwrap().outcome().await.unwrap();
                published += 1;
            }
        }
        // Everybody answers the close at once.
        if published == 1 {
            for mut client in clients.drain(..) {
                tokio::spawn(async move {
                    let mut next = 0;
                    loop {
                        match client.message().await {
                            Message::Text(text) => assert!(text.ends_with(&format!("\"data\":{next}}}"))),
                            Message::Close(frame) => return assert_eq!(u16::from(frame.unwrap().code), 1012),
                            other => panic!("{other:?}"),
                        }
                        next += 1;
                    }
                });
            }
        }
    };
    assert_eq!((drained.closed, drained.cut_off), (20, 20 - drained.flushed));
    assert!(drained.flushed >= 19, "{drained:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn peers_that_do_not_answer_are_counted_as_cut_off() {
    let gateway = gateway(&[("HUBCAST_DRAIN_TIME", "10ms")]);
    let mut silent = Raw::upgrade(&gateway, "/ws", b"").await;
    await_metric(&gateway, "hubcast_connections", 1.0).await;
    let drained = soon("the drain", gateway.drain()).await;
    assert_eq!((drained.closed, drained.flushed, drained.cut_off), (1, 0, 1));
    assert_eq!(silent.close_frame().await.0, 1012);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_signal_ends_at_once() {
    let binary = Binary::start(20_000, &[("HUBCAST_DRAIN_TIME", "1h")]);
    let url = format!("ws://{}/ws", binary.public);
    let (_clients, _) = tokio_tungstenite::connect_async(&url).await.expect("connected");
    let (_clients2, _) = tokio_tungstenite::connect_async(&url).await.expect("connected");
    binary.process.signal(Signal::TERM);
    refusal(&binary).await;
    binary.process.signal(Signal::INT);
    let (status, _) = binary.end().await;
    assert_eq!(status.code(), Some(1));
}
