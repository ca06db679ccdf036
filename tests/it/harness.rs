//! A little world: gateways on free ports, clients nobody here wrote, raw sockets, a real Redis.

use std::net::{Ipv4Addr, SocketAddr, TcpListener, UdpSocket};
use std::process::Child;
use std::sync::Arc;
use std::time::Duration;

use futures_util::{SinkExt, StreamExt};
use hubcast::config::Config;
use hubcast::gateway::Gateway;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream};

use crate::observe;
pub use crate::redis_server::Redis;

/// Longer than anything takes here, shorter than anybody waits.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// Waits for a future, and fails the test if it does not come.
pub async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    match tokio::time::timeout(PATIENCE, future).await {
        Ok(value) => value,
        Err(_) => panic!("waited in vain for {what}"),
    }
}

/// Polls until `check` gives a value.
pub async fn eventually<T>(what: &str, mut check: impl AsyncFnMut() -> Option<T>) -> T {
    let mut interval = tokio::time::interval(Duration::from_millis(10));
    soon(what, async {
        loop {
            interval.tick().await;
            if let Some(value) = check().await {
                return value;
            }
        }
    })
    .await
}

/// Where a gateway listens, whether it is in this process or another.
pub trait Instance {
    fn public(&self) -> SocketAddr;
    fn internal(&self) -> SocketAddr;
}

impl Instance for Gateway {
    fn public(&self) -> SocketAddr {
        self.addr()
    }

    fn internal(&self) -> SocketAddr {
        self.internal_addr()
    }
}

impl<T: Instance> Instance for Arc<T> {
    fn public(&self) -> SocketAddr {
        T::public(self)
    }

    fn internal(&self) -> SocketAddr {
        T::internal(self)
    }
}

/// What gateways of this process log goes to a file of the run, which `tests/verification.rs` reads.
fn start_log() {
    static STARTED: std::sync::Once = std::sync::Once::new();
    STARTED.call_once(|| {
        let file = std::sync::Mutex::new(observe::file("it.log"));
        tracing_subscriber::fmt().json().with_env_filter("hubcast=debug").with_writer(file).init();
    });
}

/// A gateway of this process with the given variables, on free ports. Dropping it ends it.
pub fn gateway(env: &[(&str, &str)]) -> Gateway {
    gateway_with(env, |_| {})
}

/// As [`gateway`], with a hand on what is not a variable.
pub fn gateway_with(env: &[(&str, &str)], adjust: impl FnOnce(&mut Config)) -> Gateway {
    start_log();
    let free = [("HUBCAST_LISTEN", "127.0.0.1:0"), ("HUBCAST_INTERNAL_LISTEN", "127.0.0.1:0")];
    let env = free.iter().chain(env).map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
    let mut config = Config::from_env(env).expect("the test's configuration is valid");
    adjust(&mut config);
    Gateway::start(config).expect("free ports can be bound")
}

/// Waits until the gateway is ready.
pub async fn ready(gateway: &impl Instance) {
    eventually("the gateway to be ready", async || {
        (http(gateway, "GET /readyz", "", b"").await.status == 200).then_some(())
    })
    .await;
}

/// A WebSocket client (tungstenite).
pub struct Client {
    socket: WebSocketStream<MaybeTlsStream<TcpStream>>,
}

impl Client {
    /// Connects and takes the welcome.
    pub async fn connect(gateway: &impl Instance) -> Self {
        let mut client = Self::open(gateway, "/ws", None).await;
        let welcome = client.json().await;
        assert_eq!(welcome["type"], "welcome", "{welcome}");
        client
    }

    /// Connects, subscribes to one channel, and waits until that is confirmed.
    pub async fn subscribed(gateway: &impl Instance, channel: &str) -> Self {
        let mut client = Self::connect(gateway).await;
        client.send(&json!({"type": "subscribe", "channel": channel})).await;
        client.expect(&json!({"type": "subscribed", "channel": channel})).await;
        client
    }

    /// Connects to any path, with any subprotocols.
    pub async fn open(gateway: &impl Instance, path: &str, subprotocol: Option<&str>) -> Self {
        Self::try_open(gateway, path, subprotocol).await.expect("the handshake succeeds")
    }

    /// As [`Client::open`], for handshakes that may fail.
    pub async fn try_open(
        gateway: &impl Instance,
        path: &str,
        subprotocol: Option<&str>,
    ) -> Result<Self, tokio_tungstenite::tungstenite::Error> {
        Self::try_open_at(gateway.public(), path, subprotocol).await
    }

    /// As [`Client::try_open`], for gateways that are processes of their own.
    pub async fn try_open_at(
        addr: SocketAddr,
        path: &str,
        subprotocol: Option<&str>,
    ) -> Result<Self, tokio_tungstenite::tungstenite::Error> {
        let headers = subprotocol.map(|name| ("sec-websocket-protocol", name));
        Self::request(addr, path, headers.as_slice()).await
    }

    /// As [`Client::try_open`], with any headers.
    pub async fn try_open_with(
        gateway: &impl Instance,
        path: &str,
        headers: &[(&'static str, &str)],
    ) -> Result<Self, tokio_tungstenite::tungstenite::Error> {
        Self::request(gateway.public(), path, headers).await
    }

    async fn request(
        addr: SocketAddr,
        path: &str,
        headers: &[(&'static str, &str)],
    ) -> Result<Self, tokio_tungstenite::tungstenite::Error> {
        let mut request = format!("ws://{addr}{path}").into_client_request().expect("a valid address");
        for (name, value) in headers {
            request.headers_mut().insert(*name, value.parse().expect("a valid header"));
        }
        let (socket, _) = soon("the handshake", tokio_tungstenite::connect_async(request)).await?;
        Ok(Self { socket })
    }

    pub async fn send(&mut self, command: &Value) {
        self.send_text(&command.to_string()).await;
    }

    pub async fn send_text(&mut self, text: &str) {
        self.send_message(Message::text(text)).await;
    }

    pub async fn send_message(&mut self, message: Message) {
        self.socket.send(message).await.expect("the connection is open");
    }

    /// Queues a text frame without flushing it.
    pub async fn feed_text(&mut self, text: &str) {
        self.socket.feed(Message::text(text)).await.expect("the connection is open");
    }

    pub async fn flush(&mut self) {
        self.socket.flush().await.expect("the connection is open");
    }

    /// The next frame that is not a ping; tungstenite answers pings while reading.
    pub async fn message(&mut self) -> Message {
        loop {
            match soon("a frame", self.socket.next()).await {
                Some(Ok(Message::Ping(_))) => {}
                Some(Ok(message)) => return message,
                other => panic!("expected a frame, got {other:?}"),
            }
        }
    }

    /// The next text frame, byte for byte.
    pub async fn text(&mut self) -> String {
        match self.message().await {
            Message::Text(text) => text.to_string(),
            other => panic!("expected text, got {other:?}"),
        }
    }

    pub async fn json(&mut self) -> Value {
        let text = self.text().await;
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{text}: {error}"))
    }

    pub async fn expect(&mut self, expected: &Value) {
        assert_eq!(&self.json().await, expected);
    }

    /// The code and reason of the close frame, after whatever else is still on its way.
    pub async fn close_frame(&mut self) -> (u16, String) {
        let close = async {
            loop {
                match self.socket.next().await {
                    Some(Ok(Message::Close(Some(frame)))) => return (frame.code.into(), frame.reason.to_string()),
                    Some(Ok(_)) => {}
                    other => panic!("expected a close frame, got {other:?}"),
                }
            }
        };
        soon("the close frame", close).await
    }

    /// Answers the close and waits for the end of the connection.
    pub async fn finish(&mut self) {
        soon("the end of the connection", async { while let Some(Ok(_)) = self.socket.next().await {} }).await;
    }
}

/// A socket to the public listener on which a test can send anything.
pub struct Raw {
    pub socket: TcpStream,
}

/// A frame as it came over the wire.
#[derive(Debug, PartialEq, Eq)]
pub struct RawFrame {
    pub first: u8,
    pub payload: Vec<u8>,
}

pub const HANDSHAKE: &str = "Host: test\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
    Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n";

impl Raw {
    pub async fn connect(gateway: &impl Instance) -> Self {
        Self { socket: TcpStream::connect(gateway.public()).await.expect("the listener is there") }
    }

    /// Upgrades `path`; `behind` is sent in the same write as the request.
    pub async fn upgrade(gateway: &impl Instance, path: &str, behind: &[u8]) -> Self {
        let mut raw = Self::connect(gateway).await;
        let mut request = format!("GET {path} HTTP/1.1\r\n{HANDSHAKE}").into_bytes();
        request.extend_from_slice(behind);
        raw.send(&request).await;
        let head = raw.head().await;
        assert!(head.starts_with("HTTP/1.1 101"), "{head}");
        raw
    }

    pub async fn send(&mut self, bytes: &[u8]) {
        self.socket.write_all(bytes).await.expect("the connection is open");
    }

    /// Reads up to the empty line that ends a response head.
    pub async fn head(&mut self) -> String {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(soon("a response head", self.socket.read_u8()).await.expect("a complete head"));
        }
        String::from_utf8(head).expect("heads are text")
    }

    /// The next frame, or `None` at the end of the connection.
    pub async fn frame(&mut self) -> Option<RawFrame> {
        soon("a frame", self.read_frame()).await
    }

    async fn read_frame(&mut self) -> Option<RawFrame> {
        let first = self.socket.read_u8().await.ok()?;
        let len = match self.socket.read_u8().await.ok()? {
            126 => u64::from(self.socket.read_u16().await.ok()?),
            127 => self.socket.read_u64().await.ok()?,
            short => u64::from(short),
        };
        let mut payload = vec![0; len as usize];
        self.socket.read_exact(&mut payload).await.ok()?;
        Some(RawFrame { first, payload })
    }

    /// The code and reason of the next close frame, skipping data.
    pub async fn close_frame(&mut self) -> (u16, String) {
        let close = async {
            loop {
                let frame = self.read_frame().await.expect("a close frame before the end");
                if frame.first == 0x88 {
                    return frame;
                }
            }
        };
        let frame = soon("the close frame", close).await;
        let (code, reason) = frame.payload.split_at(2);
        (u16::from_be_bytes([code[0], code[1]]), String::from_utf8_lossy(reason).into_owned())
    }
}

/// A client frame, masked with a fixed key.
pub fn masked(first: u8, payload: &[u8]) -> Vec<u8> {
    let mask = [0x12, 0x34, 0x56, 0x78];
    let mut frame = vec![first];
    match payload.len() {
        len @ 0..=125 => frame.push(0x80 | len as u8),
        len @ 126..=0xFFFF => {
            frame.push(0x80 | 126);
            frame.extend((len as u16).to_be_bytes());
        }
        len => {
            frame.push(0x80 | 127);
            frame.extend((len as u64).to_be_bytes());
        }
    }
    frame.extend(mask);
    frame.extend(payload.iter().zip(mask.iter().cycle()).map(|(byte, mask)| byte ^ mask));
    frame
}

/// What an HTTP request came to.
#[derive(Debug)]
pub struct HttpAnswer {
    pub status: u16,
    pub head: String,
    pub body: String,
}

impl HttpAnswer {
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{}: {error}", self.body))
    }
}

/// One request to the internal listener, on a connection of its own.
pub async fn http(gateway: &impl Instance, request_line: &str, headers: &str, body: &[u8]) -> HttpAnswer {
    let mut socket = TcpStream::connect(gateway.internal()).await.expect("the listener is there");
    let head = format!(
        "{request_line} HTTP/1.1\r\nHost: test\r\nConnection: close\r\n{headers}Content-Length: {}\r\n\r\n",
        body.len()
    );
    let mut answer = Vec::new();
    soon("an HTTP answer", async {
        socket.write_all(head.as_bytes()).await.expect("the listener reads");
        // A refused body may end the connection before it is sent.
        let _ = socket.write_all(body).await;
        let _ = socket.read_to_end(&mut answer).await;
    })
    .await;
    let text = String::from_utf8_lossy(&answer);
    let (head, body) = text.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no HTTP answer: {text:?}"));
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).expect("a status line");
    HttpAnswer { status, head: head.to_owned(), body: body.to_owned() }
}

/// Publishes by HTTP and expects success.
pub async fn publish(gateway: &impl Instance, channel: &str, payload: &[u8]) {
    let answer = http(gateway, &format!("POST /api/publish/{channel}"), "", payload).await;
    assert_eq!(answer.status, 200, "{answer:?}");
}

/// The value of one series of `/metrics`.
pub async fn metric(gateway: &impl Instance, series: &str) -> f64 {
    let answer = http(gateway, "GET /metrics", "", b"").await;
    let value = answer.body.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' ')?.parse().ok());
    value.unwrap_or_else(|| panic!("no {series} in\n{}", answer.body))
}

/// Waits until a series has a value.
pub async fn await_metric(gateway: &impl Instance, series: &str, expected: f64) {
    eventually(&format!("{series} {expected}"), async || (metric(gateway, series).await == expected).then_some(()))
        .await;
}

/// A process of ours that ends with the test.
pub struct Process(pub Child);

impl Process {
    pub fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_child(&self.0);
        rustix::process::kill_process(pid, signal).expect("the process is there");
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Below the kernel's own range, or the next connection of anybody might leave from this port.
const PORTS: std::ops::Range<u16> = 10_000..32_000;

/// A free TCP port of the loopback interface, ours for as long as this lives.
///
/// The claim is the UDP port of the same number. Redis does not need it, and the kernel gives it to one
/// process only, so that tests of several processes do not choose the same port.
pub struct Port {
    number: u16,
    _claim: UdpSocket,
}

impl Port {
    pub fn claim() -> Self {
        let claimed = (0..1000).find_map(|_| {
            let number = rand::random_range(PORTS);
            let claim = UdpSocket::bind((Ipv4Addr::LOCALHOST, number)).ok()?;
            // Bound and let go at once: it is free.
            TcpListener::bind((Ipv4Addr::LOCALHOST, number)).ok()?;
            Some(Self { number, _claim: claim })
        });
        claimed.expect("a free port")
    }

    pub fn addr(&self) -> SocketAddr {
        (Ipv4Addr::LOCALHOST, self.number).into()
    }
}
