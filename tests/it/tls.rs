//! TLS for clients: what holds without it holds with it, and certificates change while connections live.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;
use futures_util::{SinkExt, StreamExt};
use hubcast::gateway::Gateway;
use hubcast::socket::Socket;
use hubcast::tls::{Tls, TlsPaths};
use rcgen::{CertificateParams, KeyPair};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, HandshakeKind, RootCertStore, SupportedProtocolVersion};
use serde_json::{Value, json};
use socket2::SockRef;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;

use crate::harness::{HANDSHAKE, Raw, await_metric, eventually, gateway, masked, metric, publish, soon};

const FAILED: &str = r#"hubcast_reload_failed{file="certificate"}"#;
const RELOADS: &str = r#"hubcast_reloads_total{file="certificate"}"#;
const REFUSED: &str = r#"hubcast_connections_refused_total{reason="tls"}"#;

/// A certificate that signed itself, for `localhost`, and the files that a gateway reads.
struct Pair {
    dir: TempDir,
}

impl Pair {
    fn new() -> Self {
        let pair = Self { dir: TempDir::new().unwrap() };
        let (certificate, key) = Self::generate();
        fs::write(pair.certificate(), certificate).unwrap();
        fs::write(pair.key(), key).unwrap();
        pair
    }

    fn generate() -> (String, String) {
        let key = KeyPair::generate().unwrap();
        let params = CertificateParams::new(["localhost".to_owned()]).unwrap();
        (params.self_signed(&key).unwrap().pem(), key.serialize_pem())
    }

    fn certificate(&self) -> PathBuf {
        self.dir.path().join("tls.crt")
    }

    fn key(&self) -> PathBuf {
        self.dir.path().join("tls.key")
    }

    fn gateway(&self, env: &[(&str, &str)]) -> Gateway {
        let (certificate, key) = (self.certificate(), self.key());
        let paths = [("HUBCAST_TLS_CERT", certificate.to_str().unwrap()), ("HUBCAST_TLS_KEY", key.to_str().unwrap())];
        gateway(&[&paths[..], env].concat())
    }
}

fn trusting(certificate: &Path, versions: &[&'static SupportedProtocolVersion]) -> Arc<ClientConfig> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(certificate).unwrap()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider).with_protocol_versions(versions).unwrap();
    let mut config = builder.with_root_certificates(roots).with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Arc::new(config)
}

fn trusting_all_versions(certificate: &Path) -> Arc<ClientConfig> {
    trusting(certificate, rustls::ALL_VERSIONS)
}

/// A TLS connection on which a test can send anything.
async fn secured(gateway: &Gateway, config: &Arc<ClientConfig>) -> std::io::Result<TlsStream<TcpStream>> {
    let socket = TcpStream::connect(gateway.addr()).await?;
    secured_over(socket, config).await
}

async fn secured_over(socket: TcpStream, config: &Arc<ClientConfig>) -> std::io::Result<TlsStream<TcpStream>> {
    let connector = TlsConnector::from(Arc::clone(config));
    soon("the TLS handshake", connector.connect(ServerName::try_from("localhost").unwrap(), socket)).await
}

/// A WebSocket client over TLS: tungstenite over rustls.
struct Client(WebSocketStream<TlsStream<TcpStream>>);

impl Client {
    async fn subscribed(gateway: &Gateway, config: &Arc<ClientConfig>, channel: &str) -> Self {
        let stream = secured(gateway, config).await.expect("the handshake succeeds");
        let url = format!("wss://localhost/ws?channels={channel}");
        let (socket, _) = soon("the upgrade", tokio_tungstenite::client_async(url, stream)).await.unwrap();
        let mut client = Self(socket);
        assert_eq!(client.json().await["type"], "welcome");
        assert_eq!(client.json().await, json!({"type": "subscribed", "channel": channel}));
        client
    }

    async fn json(&mut self) -> Value {
        loop {
            match soon("a frame", self.0.next()).await {
                Some(Ok(Message::Text(text))) => return serde_json::from_str(&text).unwrap(),
                Some(Ok(Message::Ping(_))) => {}
                other => panic!("expected text, got {other:?}"),
            }
        }
    }

    async fn expect_data(&mut self, data: &Value) {
        assert_eq!(&self.json().await["data"], data);
    }
}

/// Both versions, the protocol that is offered, tickets that resume, and commands in both directions.
#[tokio::test(flavor = "multi_thread")]
async fn clients_speak_tls_1_2_and_1_3_and_resume() {
    let pair = Pair::new();
    let gateway = pair.gateway(&[]);
    for version in [&rustls::version::TLS12, &rustls::version::TLS13] {
        let config = trusting(&pair.certificate(), &[version]);
        for kind in [HandshakeKind::Full, HandshakeKind::Resumed] {
            let mut client = Client::subscribed(&gateway, &config, "news").await;
            let session = client.0.get_ref().get_ref().1;
            assert_eq!(session.protocol_version(), Some(version.version));
            assert_eq!(session.alpn_protocol(), Some(&b"http/1.1"[..]));
            assert_eq!(session.handshake_kind(), Some(kind), "{version:?}");
            client.0.send(Message::text(r#"{"type":"publish","channel":"news","data":{"n":1}}"#)).await.unwrap();
            client.expect_data(&json!({"n": 1})).await;
        }
    }
    assert_eq!(metric(&gateway, REFUSED).await, 0.0);
}

/// What is sent right behind the upgrade request comes in the same record: no readiness of the socket tells of it.
#[tokio::test(flavor = "multi_thread")]
async fn bytes_right_behind_the_upgrade_request_are_not_lost() {
    let pair = Pair::new();
    let gateway = pair.gateway(&[]);
    let ping = masked(0x81, br#"{"type":"ping"}"#);
    let mut stream = secured(&gateway, &trusting_all_versions(&pair.certificate())).await.unwrap();
    let request = format!("GET /ws HTTP/1.1\r\n{HANDSHAKE}");
    stream.write_all(&[request.as_bytes(), &ping, &ping[..9]].concat()).await.unwrap();
    stream.write_all(&ping[9..]).await.unwrap();
    let mut received = Vec::new();
    while String::from_utf8_lossy(&received).matches(r#"{"type":"pong"}"#).count() < 2 {
        let mut buffer = [0; 1024];
        let len = soon("the pongs", stream.read(&mut buffer)).await.unwrap();
        assert!(len > 0, "{}", String::from_utf8_lossy(&received));
        received.extend(&buffer[..len]);
    }
}

/// More than sockets hold, in both directions: everything comes, in order, byte for byte.
#[tokio::test(flavor = "multi_thread")]
async fn a_pipelined_burst_over_tls_comes_whole_and_in_order() {
    const READERS: usize = 8;
    const MESSAGES: usize = 10_000;
    let pair = Pair::new();
    let gateway = pair.gateway(&[]);
    let config = trusting_all_versions(&pair.certificate());
    let filler = "x".repeat(1_000);
    let mut reading = Vec::new();
    for _ in 0..READERS {
        let mut reader = Client::subscribed(&gateway, &config, "burst").await;
        let filler = filler.clone();
        reading.push(tokio::spawn(async move {
            for n in 0..MESSAGES {
                reader.expect_data(&json!([n, filler])).await;
            }
        }));
    }
    let mut publisher = Client::subscribed(&gateway, &config, "other").await;
    for n in 0..MESSAGES {
        let text = format!(r#"{{"type":"publish","channel":"burst","data":[{n},"{filler}"]}}"#);
        publisher.0.feed(Message::text(text)).await.unwrap();
    }
    publisher.0.flush().await.unwrap();
    for reader in reading {
        reader.await.expect("the reader got every message, in order");
    }
    assert_eq!(metric(&gateway, r#"hubcast_connections_closed_total{reason="slow_consumer"}"#).await, 0.0);
}

/// New handshakes get the new certificate, whoever is connected stays, and half a pair changes nothing.
#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_is_exchanged_without_dropping_anybody() {
    let pair = Pair::new();
    let gateway = pair.gateway(&[]);
    let old = trusting_all_versions(&pair.certificate());
    let mut early = Client::subscribed(&gateway, &old, "news").await;
    let (certificate, key) = Pair::generate();
    fs::write(pair.key(), key).unwrap();
    await_metric(&gateway, FAILED, 1.0).await;
    // Another client configuration, or a ticket would resume without looking at the certificate.
    let old = trusting_all_versions(&pair.certificate());
    Client::subscribed(&gateway, &old, "news").await;
    fs::write(pair.certificate(), certificate).unwrap();
    await_metric(&gateway, RELOADS, 1.0).await;
    assert_eq!(metric(&gateway, FAILED).await, 0.0);
    let new = trusting_all_versions(&pair.certificate());
    let mut late = Client::subscribed(&gateway, &new, "news").await;
    let served = late.0.get_ref().get_ref().1.peer_certificates().unwrap()[0].clone();
    assert_eq!(served, CertificateDer::from_pem_file(pair.certificate()).unwrap());
    publish(&gateway, "news", b"1").await;
    early.expect_data(&json!(1)).await;
    late.expect_data(&json!(1)).await;
    fs::remove_file(pair.certificate()).unwrap();
    await_metric(&gateway, FAILED, 1.0).await;
    Client::subscribed(&gateway, &new, "news").await;
    publish(&gateway, "news", b"2").await;
    early.expect_data(&json!(2)).await;
}

/// A client that stops reading is closed with the reason of slow consumers, and nobody else notices.
#[tokio::test(flavor = "multi_thread")]
async fn a_slow_consumer_over_tls_is_told_so() {
    let pair = Pair::new();
    let gateway = pair.gateway(&[("HUBCAST_OUTBOX_MESSAGES", "4")]);
    let config = trusting_all_versions(&pair.certificate());
    let mut stalled = Client::subscribed(&gateway, &config, "c").await;
    let mut neighbour = Client::subscribed(&gateway, &config, "d").await;
    let payload = format!("\"{}\"", "x".repeat(200_000));
    let publishing = async {
        for _ in 0..40 {
            publish(&gateway, "c", payload.as_bytes()).await;
        }
    };
    let reading = async {
        let dropped = r#"hubcast_dropped_total{reason="slow_consumer"}"#;
        eventually(dropped, async || (metric(&gateway, dropped).await > 0.0).then_some(())).await;
        loop {
            match soon("the close frame", stalled.0.next()).await {
                Some(Ok(Message::Close(Some(frame)))) => return (u16::from(frame.code), frame.reason.to_string()),
                Some(Ok(_)) => {}
                other => panic!("expected a close frame, got {other:?}"),
            }
        }
    };
    let ((), (code, reason)) = tokio::join!(publishing, reading);
    assert_eq!((code, reason.as_str()), (4101, "slow consumer"));
    publish(&gateway, "d", b"1").await;
    neighbour.expect_data(&json!(1)).await;
}

/// All that waits for a trickling reader may be in TLS records already: they have an age, too.
#[tokio::test(flavor = "multi_thread")]
async fn records_that_nobody_takes_make_a_slow_consumer() {
    let pair = Pair::new();
    let gateway = pair.gateway(&[("HUBCAST_WRITE_TIMEOUT", "400ms")]);
    let socket = TcpStream::connect(gateway.addr()).await.unwrap();
    SockRef::from(&socket).set_recv_buffer_size(2048).unwrap();
    let mut stream = secured_over(socket, &trusting_all_versions(&pair.certificate())).await.unwrap();
    stream.write_all(format!("GET /ws?channels=c HTTP/1.1\r\n{HANDSHAKE}").as_bytes()).await.unwrap();
    await_metric(&gateway, "hubcast_channels", 1.0).await;
    let payload = format!("\"{}\"", "x".repeat(60_000));
    let closed = r#"hubcast_connections_closed_total{reason="slow_consumer"}"#;
    for _ in 0..200 {
        publish(&gateway, "c", payload.as_bytes()).await;
        // Not only until it is written.
        let waits = async || metric(&gateway, "hubcast_outbox_frames").await > 0.0;
        if waits().await && waits().await && waits().await {
            break;
        }
    }
    await_metric(&gateway, closed, 1.0).await;
    await_metric(&gateway, "hubcast_connections", 0.0).await;
}

/// Records of one byte each are work out of proportion: one read of the session takes so many and no more, however
/// many have come, so that others have their turn.
#[tokio::test(flavor = "multi_thread")]
async fn one_read_takes_so_many_records_and_no_more() {
    const BYTES: usize = 20_000;
    // Sixteen reads of 4 KiB, and a record of one byte takes 23 of that.
    const MOST: usize = 16 * 4096 / 22;
    let pair = Pair::new();
    let paths = TlsPaths { certificate: pair.certificate(), key: pair.key() };
    let tls = Tls::load(&paths).unwrap();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    let (server, _) = listener.accept().await.unwrap();
    let config = trusting_all_versions(&pair.certificate());
    let (client, server) = tokio::join!(secured_over(client, &config), tls.accept(server));
    let (mut client, (tcp, session)) = (client.unwrap(), server.unwrap().into_inner());
    let (socket, _) = Socket::tls(tcp, session, Bytes::new()).unwrap();
    let sent = Arc::new(AtomicUsize::new(0));
    let sending = tokio::spawn({
        let sent = Arc::clone(&sent);
        async move {
            for _ in 0..BYTES {
                client.write_all(b"x").await.unwrap();
                client.flush().await.unwrap();
                sent.fetch_add(1, Ordering::Relaxed);
            }
            client
        }
    });
    let (mut buffer, mut taken, mut most) = (vec![0; 64 << 10], 0, 0);
    eventually("more than one read to wait", async || (sent.load(Ordering::Relaxed) > 2 * MOST).then_some(())).await;
    while taken < BYTES {
        soon("more records", socket.tcp().readable()).await.unwrap();
        match socket.try_read(&mut buffer) {
            Ok(len) => {
                (taken, most) = (taken + len, most.max(len));
                assert!(len <= MOST, "{len} records in one go");
            }
            Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock),
        }
    }
    assert!(most > MOST / 2, "so many never waited, {most} at most");
    sending.await.unwrap();
}

/// Garbage, plain HTTP, half a handshake and silence: each is counted, and clients come and hear as before.
#[tokio::test(flavor = "multi_thread")]
async fn a_flood_of_garbage_harms_nobody() {
    const EACH: usize = 50;
    let pair = Pair::new();
    let gateway = pair.gateway(&[("HUBCAST_HANDSHAKE_TIMEOUT", "1s")]);
    let config = trusting_all_versions(&pair.certificate());
    let mut neighbour = Client::subscribed(&gateway, &config, "news").await;
    let garbage: [&[u8]; 3] =
        [&[0xFF; 4096], b"GET /ws HTTP/1.1\r\nHost: a\r\n\r\n", b"\x16\x03\x01\x00\x05\x01\x00\x00\x01\x00"];
    let mut silent = Vec::new();
    for _ in 0..EACH {
        for bytes in garbage {
            let mut raw = Raw::connect(&gateway).await;
            raw.send(bytes).await;
            silent.push(raw);
        }
        let mut raw = Raw::connect(&gateway).await;
        raw.send(&[0x16, 0x03, 0x01]).await;
        silent.push(raw);
    }
    publish(&gateway, "news", b"1").await;
    neighbour.expect_data(&json!(1)).await;
    Client::subscribed(&gateway, &config, "news").await;
    await_metric(&gateway, REFUSED, (EACH * garbage.len()) as f64).await;
    await_metric(&gateway, r#"hubcast_connections_refused_total{reason="timeout"}"#, EACH as f64).await;
    await_metric(&gateway, "hubcast_connections", 1.0).await;
    // Garbage after the handshake ends that connection only.
    let mut broken = Client::subscribed(&gateway, &config, "news").await;
    broken.0.get_mut().get_mut().0.write_all(&[0x17, 0x03, 0x03, 0x00, 0x20]).await.unwrap();
    broken.0.get_mut().get_mut().0.write_all(&[0; 32]).await.unwrap();
    await_metric(&gateway, "hubcast_connections", 1.0).await;
    publish(&gateway, "news", b"2").await;
    neighbour.expect_data(&json!(2)).await;
}

/// A drain closes with 1012, and the TLS session in its own way: no reader can take the end for an attacker's.
#[tokio::test(flavor = "multi_thread")]
async fn a_drain_over_tls_ends_everybody_cleanly() {
    const CLIENTS: usize = 20;
    let pair = Pair::new();
    let gateway = pair.gateway(&[("HUBCAST_DRAIN_TIME", "100ms")]);
    let config = trusting_all_versions(&pair.certificate());
    let mut readers = Vec::new();
    for _ in 0..CLIENTS {
        let mut stream = secured(&gateway, &config).await.unwrap();
        stream.write_all(format!("GET /ws?channels=c HTTP/1.1\r\n{HANDSHAKE}").as_bytes()).await.unwrap();
        readers.push(tokio::spawn(async move {
            let mut received = Vec::new();
            // rustls tells an end without close_notify as an error.
            soon("the end", stream.read_to_end(&mut received)).await.expect("a clean end");
            received
        }));
    }
    await_metric(&gateway, "hubcast_subscriptions", CLIENTS as f64).await;
    publish(&gateway, "c", b"\"last\"").await;
    let drained = gateway.drain().await;
    assert_eq!((drained.closed, drained.flushed, drained.cut_off), (CLIENTS, CLIENTS, 0));
    for reader in readers {
        let received = reader.await.unwrap();
        let text = String::from_utf8_lossy(&received);
        let close = received.windows(4).position(|window| window[0] == 0x88 && window[2..] == 1012_u16.to_be_bytes());
        assert!(close.is_some() && text.contains(r#""data":"last""#), "{text}");
    }
}

#[tokio::test]
async fn a_pair_that_does_not_fit_stops_the_start() {
    let (pair, other) = (Pair::new(), Pair::new());
    let cases = [
        (pair.certificate(), other.key(), "the certificate and the key"),
        (pair.key(), pair.key(), "there is none in the file"),
        (pair.certificate(), pair.certificate(), "the key"),
        (pair.dir.path().join("missing"), pair.key(), "No such file"),
    ];
    for (certificate, key, message) in cases {
        let env = [
            ("HUBCAST_LISTEN", "127.0.0.1:0"),
            ("HUBCAST_INTERNAL_LISTEN", "127.0.0.1:0"),
            ("HUBCAST_TLS_CERT", certificate.to_str().unwrap()),
            ("HUBCAST_TLS_KEY", key.to_str().unwrap()),
        ];
        let env = env.map(|(name, value)| (name.to_owned(), value.to_owned()));
        let config = hubcast::config::Config::from_env(env).unwrap();
        let error = Gateway::start(config).expect_err("it must not start").to_string();
        assert!(error.starts_with("HUBCAST_TLS_CERT, HUBCAST_TLS_KEY: ") && error.contains(message), "{error}");
    }
}
