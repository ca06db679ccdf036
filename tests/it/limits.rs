//! What is refused, when there is too much of it or it takes too long.

use std::process::{Command, Stdio};

use tokio::io::AsyncReadExt;

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
