//! Whose word counts for a client's address: forwarding headers and the PROXY protocol.

use std::net::SocketAddr;
use std::time::Duration;

use hubcast::proxies::{ForwardingHeader, Proxies};
use hyper::header::{HeaderMap, HeaderName, HeaderValue};

use crate::harness::{Client, HANDSHAKE, Raw, await_metric, gateway, http, publish};

const REFUSED: &str = r#"hubcast_connections_refused_total{reason="proxy_protocol"}"#;

fn client(header: ForwardingHeader, peer: &str, lines: &[&[u8]]) -> String {
    let networks = ["10.0.0.0/8", "192.0.2.1/32", "2001:db8::/32"].map(|network| network.parse().unwrap());
    let other = match header {
        ForwardingHeader::XForwardedFor => ("forwarded", "for=198.51.100.66"),
        ForwardingHeader::Forwarded => ("x-forwarded-for", "198.51.100.66"),
    };
    let mut headers = HeaderMap::new();
    for line in lines {
        headers.append(HeaderName::from_static(header.as_str()), HeaderValue::from_bytes(line).unwrap());
    }
    // The client's own.
    headers.insert(HeaderName::from_static(other.0), HeaderValue::from_static(other.1));
    let client = Proxies::new(networks.to_vec(), header).client(peer.parse().unwrap(), &headers);
    if client.port() == 0 { client.ip().to_string() } else { client.to_string() }
}

/// The right-most address that is no listed proxy; whoever is not listed speaks only for itself.
#[test]
fn forwarding_headers_are_believed_from_the_right_and_only_of_listed_proxies() {
    let cases: [(&str, &[&str], &str); 15] = [
        ("203.0.113.9:5000", &["198.51.100.1"], "203.0.113.9:5000"),
        ("203.0.113.9:5000", &[], "203.0.113.9:5000"),
        ("10.1.1.1:5000", &[], "10.1.1.1:5000"),
        ("10.1.1.1:5000", &["198.51.100.1"], "198.51.100.1"),
        ("[::ffff:10.1.1.1]:5000", &["198.51.100.1"], "198.51.100.1"),
        ("10.1.1.1:5000", &["6.6.6.6, 198.51.100.1"], "198.51.100.1"),
        ("10.1.1.1:5000", &["6.6.6.6, 198.51.100.1 ,10.2.2.2,192.0.2.1"], "198.51.100.1"),
        ("10.1.1.1:5000", &["6.6.6.6, 198.51.100.1", "10.2.2.2"], "198.51.100.1"),
        ("10.1.1.1:5000", &["10.3.3.3, 10.2.2.2"], "10.3.3.3"),
        ("10.1.1.1:5000", &["198.51.100.1:4711"], "198.51.100.1:4711"),
        ("10.1.1.1:5000", &["2a00::1"], "2a00::1"),
        ("10.1.1.1:5000", &["[2a00::1]:4711"], "[2a00::1]:4711"),
        ("[2001:db8::5]:5000", &["[2a00::1]"], "2a00::1"),
        ("10.1.1.1:5000", &["198.51.100.1, unknown, 10.2.2.2"], "10.2.2.2"),
        ("10.1.1.1:5000", &["198.51.100.1, 999.1.1.1"], "10.1.1.1:5000"),
    ];
    for (peer, lines, expected) in cases {
        let bytes: Vec<_> = lines.iter().map(|line| line.as_bytes()).collect();
        assert_eq!(client(ForwardingHeader::XForwardedFor, peer, &bytes), expected, "{peer} {lines:?}");
    }
    // What the client wrote itself need not be text: what the proxy has put behind it counts all the same.
    for (line, expected) in [
        (&b"\xff\xfe, 198.51.100.1"[..], "198.51.100.1"),
        (b"198.51.100.1, \xff", "10.1.1.1:5000"),
        (b"\xc3\x28", "10.1.1.1:5000"),
    ] {
        assert_eq!(client(ForwardingHeader::XForwardedFor, "10.1.1.1:5000", &[line]), expected, "{line:?}");
    }
    let cases: [(&[&str], &str); 6] = [
        (&["for=198.51.100.1"], "198.51.100.1"),
        (&["For=\"[2a00::1]:4711\";proto=https;by=10.0.0.1"], "[2a00::1]:4711"),
        (&["for=6.6.6.6, proto=http; for=198.51.100.1, for=10.2.2.2"], "198.51.100.1"),
        (&["for=198.51.100.1, for=_hidden"], "10.1.1.1:5000"),
        (&["for=198.51.100.1, proto=https"], "10.1.1.1:5000"),
        (&["by=198.51.100.1"], "10.1.1.1:5000"),
    ];
    for (lines, expected) in cases {
        let bytes: Vec<_> = lines.iter().map(|line| line.as_bytes()).collect();
        assert_eq!(client(ForwardingHeader::Forwarded, "10.1.1.1:5000", &bytes), expected, "{lines:?}");
    }
}

/// The address that the API shows of the only connection.
async fn shown(gateway: &hubcast::gateway::Gateway) -> String {
    let answer = http(gateway, "GET /api/connections", "", b"").await.json();
    answer["connections"][0]["remote_address"].as_str().unwrap().to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_api_shows_the_client_behind_a_listed_proxy_and_nobody_elses_word() {
    let request = format!("GET /ws HTTP/1.1\r\nX-Forwarded-For: 6.6.6.6, 198.51.100.1\r\n{HANDSHAKE}");
    for (env, is_believed) in [(&[("HUBCAST_TRUSTED_PROXIES", "127.0.0.0/8")][..], true), (&[], false)] {
        let gateway = gateway(env);
        let mut raw = Raw::connect(&gateway).await;
        raw.send(request.as_bytes()).await;
        assert!(raw.head().await.starts_with("HTTP/1.1 101"));
        raw.frame().await.expect("the welcome");
        let own = raw.socket.local_addr().unwrap().to_string();
        assert_eq!(shown(&gateway).await, if is_believed { "198.51.100.1" } else { &own });
    }
}

/// A header of version 2 (`proxy-protocol.txt` section 2.2) for TCP over IPv4, with `more` behind the addresses.
fn version_2(command: u8, source: SocketAddr, more: &[u8]) -> Vec<u8> {
    let SocketAddr::V4(source) = source else { panic!("{source}") };
    let mut header = b"\r\n\r\n\0\r\nQUIT\n".to_vec();
    header.extend([0x20 | command, 0x11]);
    header.extend((12 + more.len() as u16).to_be_bytes());
    header.extend(source.ip().octets());
    header.extend([127, 0, 0, 1]);
    header.extend(source.port().to_be_bytes());
    header.extend(8080_u16.to_be_bytes());
    header.extend(more);
    header
}

#[tokio::test(flavor = "multi_thread")]
async fn both_versions_of_the_proxy_protocol_tell_the_client() {
    let gateway = gateway(&[("HUBCAST_TRUSTED_PROXIES", "127.0.0.1"), ("HUBCAST_PROXY_PROTOCOL", "on")]);
    let client: SocketAddr = "198.51.100.7:4711".parse().unwrap();
    let upgrade = format!("GET /ws HTTP/1.1\r\n{HANDSHAKE}").into_bytes();
    let cases = [
        (b"PROXY TCP4 198.51.100.7 127.0.0.1 4711 8080\r\n".to_vec(), Some("198.51.100.7:4711")),
        (b"PROXY TCP6 2a00::1 ::1 4711 8080\r\n".to_vec(), Some("[2a00::1]:4711")),
        (b"PROXY UNKNOWN\r\n".to_vec(), None),
        (version_2(1, client, b""), Some("198.51.100.7:4711")),
        (version_2(1, client, &[0x04, 0x00, 0x02, 0, 0]), Some("198.51.100.7:4711")),
        // The proxy's own health check.
        (version_2(0, client, b""), None),
    ];
    for (header, expected) in cases {
        // In one write with the request, and in pieces as bad as they come.
        for piece in [1, 7, usize::MAX] {
            let mut raw = Raw::connect(&gateway).await;
            for bytes in [&header[..], &upgrade].concat().chunks(piece.min(header.len() + upgrade.len())) {
                raw.send(bytes).await;
            }
            assert!(raw.head().await.starts_with("HTTP/1.1 101"), "{header:?}");
            raw.frame().await.expect("the welcome");
            let own = raw.socket.local_addr().unwrap().to_string();
            assert_eq!(shown(&gateway).await, expected.unwrap_or(&own), "{header:?}");
            drop(raw);
            await_metric(&gateway, "hubcast_connections", 0.0).await;
        }
    }
}

/// Everybody else is closed without an answer, is counted, and holds up nobody.
#[tokio::test(flavor = "multi_thread")]
async fn what_does_not_begin_with_a_proxys_header_is_closed() {
    let env = [("HUBCAST_TRUSTED_PROXIES", "127.0.0.1"), ("HUBCAST_PROXY_PROTOCOL", "on")];
    let gateway = gateway(&[&env[..], &[("HUBCAST_HANDSHAKE_TIMEOUT", "500ms")]].concat());
    let client: SocketAddr = "198.51.100.7:4711".parse().unwrap();
    let mut neighbour = Raw::connect(&gateway).await;
    neighbour.send(format!("PROXY UNKNOWN\r\nGET /ws?channels=news HTTP/1.1\r\n{HANDSHAKE}").as_bytes()).await;
    neighbour.head().await;
    let mut too_long = b"\r\n\r\n\0\r\nQUIT\n\x21\x11".to_vec();
    too_long.extend(u16::MAX.to_be_bytes());
    let bad = [
        format!("GET /ws HTTP/1.1\r\n{HANDSHAKE}").into_bytes(),
        b"PROXY TCP4 198.51.100.7 127.0.0.1 4711\r\n".to_vec(),
        b"PROXY TCP4 999.51.100.7 127.0.0.1 4711 8080\r\n".to_vec(),
        [&b"PROXY "[..], &[b'x'; 200]].concat(),
        version_2(7, client, b""),
        too_long,
    ];
    for (count, bytes) in bad.iter().enumerate() {
        let mut raw = Raw::connect(&gateway).await;
        raw.send(bytes).await;
        assert_eq!(raw.frame().await, None, "{bytes:?}");
        await_metric(&gateway, REFUSED, (count + 1) as f64).await;
    }
    let mut silent = Raw::connect(&gateway).await;
    silent.send(b"PROXY TCP4 ").await;
    assert_eq!(silent.frame().await, None, "cut after the handshake timeout");
    await_metric(&gateway, r#"hubcast_connections_refused_total{reason="timeout"}"#, 1.0).await;
    publish(&gateway, "news", b"1").await;
    for _ in 0..3 {
        neighbour.frame().await.expect("welcome, confirmation and event");
    }

    let gateway = crate::harness::gateway(&[("HUBCAST_TRUSTED_PROXIES", "10.0.0.0/8"), env[1]]);
    let mut stranger = Raw::connect(&gateway).await;
    stranger.send(b"PROXY TCP4 198.51.100.7 127.0.0.1 4711 8080\r\n").await;
    let ended = tokio::time::timeout(Duration::from_secs(10), stranger.frame()).await;
    assert_eq!(ended, Ok(None), "at once, and not after the handshake timeout");
    await_metric(&gateway, REFUSED, 1.0).await;
    assert!(Client::try_open(&gateway, "/ws", None).await.is_err());
}

/// Limits per address are those of the clients, not of the proxy that they all come through.
#[tokio::test(flavor = "multi_thread")]
async fn clients_behind_a_listed_proxy_count_for_their_own_addresses() {
    let gateway = gateway(&[("HUBCAST_TRUSTED_PROXIES", "127.0.0.1"), ("HUBCAST_CONNECTIONS_PER_ADDRESS", "1")]);
    let mut open = Vec::new();
    for (address, status) in [("198.51.100.1", "101"), ("198.51.100.1", "429"), ("198.51.100.2", "101")] {
        let mut raw = Raw::connect(&gateway).await;
        raw.send(format!("GET /ws HTTP/1.1\r\nX-Forwarded-For: {address}\r\n{HANDSHAKE}").as_bytes()).await;
        let head = raw.head().await;
        assert_eq!(head.split(' ').nth(1), Some(status), "{address}\n{head}");
        open.push(raw);
    }
    await_metric(&gateway, r#"hubcast_connections_refused_total{reason="address_connections"}"#, 1.0).await;
}
