//! What is refused, when there is too much of it or it takes too long.

use std::process::{Command, Stdio};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::binary::{Binary, exchange};
use crate::harness::{Client, HANDSHAKE, Raw, await_metric, gateway, http, metric, soon};

#[tokio::test(flavor = "multi_thread")]
async fn connections_above_the_limit_are_told_to_come_back() {
    let gateway = gateway(&[("HUBCAST_CONNECTIONS_MAX", "3")]);
    let mut clients = Vec::new();
    for _ in 0..3 {
        clients.push(Client::connect(&gateway).await);
    }
    let mut refused = Raw::connect(&gateway).await;
    refused.send(format!("GET /ws HTTP/1.1\r\n{HANDSHAKE}").as_bytes()).await;
    let head = refused.head().await.to_lowercase();
    assert!(head.starts_with("http/1.1 503") && head.contains("retry-after: "), "{head}");
    assert_eq!(metric(&gateway, r#"hubcast_connections_refused_total{reason="limit"}"#).await, 1.0);
    assert_eq!(http(&gateway, "GET /livez", "", b"").await.status, 200);
    clients.pop();
    await_metric(&gateway, "hubcast_connections", 2.0).await;
    // The place is given back a moment after the connection is uncounted.
    crate::harness::eventually("a free place", async || Client::try_open(&gateway, "/ws", None).await.ok()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn handshakes_that_do_not_come_are_given_up() {
    let gateway = gateway(&[("HUBCAST_HANDSHAKE_TIMEOUT", "200ms")]);
    let mut silent = Raw::connect(&gateway).await;
    let mut slow = Raw::connect(&gateway).await;
    slow.send(b"GET /ws HTTP/1.1\r\nHost: t\r\n").await;
    for raw in [&mut silent, &mut slow] {
        let mut rest = Vec::new();
        soon("the end of the connection", raw.socket.read_to_end(&mut rest)).await.unwrap();
        assert!(!rest.starts_with(b"HTTP/1.1 1"), "{}", String::from_utf8_lossy(&rest));
    }
    await_metric(&gateway, r#"hubcast_connections_refused_total{reason="timeout"}"#, 2.0).await;
}

#[test]
fn the_file_limit_bounds_connections_whatever_is_wanted() {
    for (wanted, places) in [(None, 100), (Some("50"), 50), (Some("5000"), 100)] {
        let output = Command::new("sh")
            .args(["-c", "ulimit -n 300; exec \"$0\" --print-config", env!("CARGO_BIN_EXE_hubcast")])
            .envs(wanted.map(|wanted| ("HUBCAST_CONNECTIONS_MAX", wanted)))
            .stdout(Stdio::piped())
            .output()
            .unwrap();
        let printed = String::from_utf8(output.stdout).unwrap();
        assert!(printed.contains(&format!("HUBCAST_CONNECTIONS_MAX={places}\n")), "{printed}");
    }
}

/// Twice as many sockets as there are files: clients above the limit are refused, and the API still answers.
#[tokio::test(flavor = "multi_thread")]
async fn a_full_house_leaves_room_for_the_api() {
    const PLACES: usize = 100;
    let binary = Binary::start(200 + PLACES as u32, &[]);
    let request = format!("GET /ws HTTP/1.1\r\n{HANDSHAKE}");
    let mut sockets = Vec::new();
    let mut statuses = Vec::new();
    for _ in 0..4 * PLACES {
        let mut socket = TcpStream::connect(binary.public).await.unwrap();
        socket.write_all(request.as_bytes()).await.unwrap();
        let mut answer = [0; 12];
        soon("an answer", socket.read_exact(&mut answer)).await.unwrap();
        statuses.push(String::from_utf8_lossy(&answer[9..]).into_owned());
        sockets.push(socket);
        let livez = exchange(binary.internal, "GET /livez HTTP/1.1\r\nHost: t\r\nConnection: close\r\n\r\n").await;
        assert!(livez.is_some_and(|livez| livez.starts_with("HTTP/1.1 200")));
    }
    assert!(statuses[..PLACES].iter().all(|status| status == "101"), "{statuses:?}");
    assert!(statuses[PLACES..].iter().all(|status| status == "503"), "{statuses:?}");
    crate::observe::threat(62, "four times as many sockets as places: 503 above them, the API answers");
}
