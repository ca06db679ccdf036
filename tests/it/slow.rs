//! Slow clients hurt nobody; fast ones are never taken for slow.

use std::time::{Duration, Instant};

use futures_util::future::join_all;
use hubcast::close::CloseReason;
use hubcast::frame::Frame;
use hubcast::outbox::{Flushed, Limits, Outbox, Push};
use hubcast::outbox_state::STALL_US_MAX;
use hubcast::writer::{Transport, Writer};
use serde_json::json;
use socket2::SockRef;

use crate::harness::{Client, HANDSHAKE, Raw, await_metric, eventually, gateway, http, masked, metric, publish, soon};

/// The whole burst is written before anybody reads its end: the server is late, the readers are not.
#[tokio::test(flavor = "multi_thread")]
async fn a_pipelined_burst_to_good_readers_closes_nobody() {
    const READERS: usize = 100;
    const MESSAGES: usize = 20_000;
    let gateway = gateway(&[]);
    let readers = join_all((0..READERS).map(|_| Client::subscribed(&gateway, "burst"))).await;
    let reading: Vec<_> = readers
        .into_iter()
        .map(|mut reader| {
            tokio::spawn(async move {
                for n in 0..MESSAGES {
                    let text = reader.text().await;
                    assert!(text.contains(&format!("\"data\":[{n},")), "expected {n}, got {text}");
                }
            })
        })
        .collect();
    let mut publisher = Client::connect(&gateway).await;
    // More than the kernel holds for a socket, so that sockets do refuse bytes on the way.
    let filler = "x".repeat(200);
    for n in 0..MESSAGES {
        publisher.feed_text(&format!(r#"{{"type":"publish","channel":"burst","data":[{n},"{filler}"]}}"#)).await;
    }
    publisher.flush().await;
    for reader in reading {
        reader.await.expect("the reader got every message, in order");
    }
    assert_eq!(metric(&gateway, r#"hubcast_connections_closed_total{reason="slow_consumer"}"#).await, 0.0);
    assert_eq!(metric(&gateway, r#"hubcast_dropped_total{reason="slow_consumer"}"#).await, 0.0);
}

/// The socket refuses bytes and the outbox is full, but only for a moment: the publisher waits, nobody is closed.
#[tokio::test(flavor = "multi_thread")]
async fn a_reader_that_pauses_for_a_moment_is_not_slow() {
    const MESSAGES: usize = 20_000;
    let gateway = gateway(&[]);
    let mut reader = Raw::connect(&gateway).await;
    reader
        .send(format!("GET /ws?channel=c HTTP/1.1\r\nSec-WebSocket-Protocol: hubcast.raw.v1\r\n{HANDSHAKE}").as_bytes())
        .await;
    reader.head().await;
    await_metric(&gateway, "hubcast_channels", 1.0).await;
    let mut publisher = Client::connect(&gateway).await;
    let publishing = tokio::spawn(async move {
        let filler = "x".repeat(200);
        for n in 0..MESSAGES {
            publisher.feed_text(&format!(r#"{{"type":"publish","channel":"c","data":"{n:05}{filler}"}}"#)).await;
        }
        publisher.flush().await;
        publisher
    });
    eventually("a full outbox", async || (metric(&gateway, "hubcast_outbox_frames").await >= 1024.0).then_some(()))
        .await;
    for n in 0..MESSAGES {
        let frame = reader.frame().await.expect("the connection is open");
        assert_eq!(frame.payload[1..6], *format!("{n:05}").as_bytes());
    }
    publishing.await.unwrap();
}

/// Two clients that publish to each other and do not read: nobody deadlocks, and the flow goes on once they read.
#[tokio::test(flavor = "multi_thread")]
async fn clients_that_flood_each_other_do_not_lock_each_other_up() {
    let gateway = gateway(&[("HUBCAST_OUTBOX_MESSAGES", "8")]);
    let mut clients = [Client::subscribed(&gateway, "a").await, Client::subscribed(&gateway, "b").await];
    for (client, other) in clients.iter_mut().zip(["b", "a"]) {
        for n in 0..2_000 {
            client.feed_text(&format!(r#"{{"type":"publish","channel":"{other}","data":{n}}}"#)).await;
        }
        client.flush().await;
    }
    for (mut client, own) in clients.into_iter().zip(["a", "b"]) {
        for n in 0..2_000 {
            client.expect(&json!({"type": "event", "channel": own, "data": n})).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stalled_reader_is_closed_and_moves_nobody_elses_latency() {
    const READERS: usize = 500;
    const MESSAGES: u64 = 400;
    // Some 600 ms of this traffic: as at the defaults, a reader that stalls is known before its outbox is full.
    let gateway = gateway(&[("HUBCAST_OUTBOX_BYTES", "512KiB")]);
    let payload = format!("\"{}\"", "x".repeat(8_000));
    // Whatever else the machine does moves latencies too, but not each time while the reader stalls.
    let mut seen = Vec::new();
    for round in 1..=3 {
        let quiet = latencies(&gateway, READERS, &payload, MESSAGES).await;
        let began = Instant::now();
        let mut stalled = Raw::connect(&gateway).await;
        SockRef::from(&stalled.socket).set_recv_buffer_size(4096).unwrap();
        stalled.send(format!("GET /ws?channels=c HTTP/1.1\r\n{}", HANDSHAKE).as_bytes()).await;
        stalled.head().await;
        let with_stalled = latencies(&gateway, READERS, &payload, MESSAGES).await;
        let closed = r#"hubcast_connections_closed_total{reason="slow_consumer"}"#;
        await_metric(&gateway, closed, f64::from(round)).await;
        assert!(metric(&gateway, r#"hubcast_dropped_total{reason="slow_consumer"}"#).await > 0.0);
        seen.push((quiet, with_stalled));
        if with_stalled < quiet * 2 + Duration::from_millis(20) {
            crate::observe::fault(
                "client never reads",
                None,
                began.elapsed(),
                "4 s of load to 500 others; 4101, counted",
            );
            return crate::observe::threat(59, "4101, counted; the 99th percentile of the others stays");
        }
    }
    panic!("the 99th percentile with a stalled reader, after that without: {seen:?}");
}

/// The 99th percentile of the time from a publish to its arrival, over all readers.
async fn latencies(gateway: &hubcast::gateway::Gateway, readers: usize, payload: &str, messages: u64) -> Duration {
    let readers = join_all((0..readers).map(|_| Client::subscribed(gateway, "c"))).await;
    let started = Instant::now();
    let reading: Vec<_> = readers
        .into_iter()
        .map(|mut reader| {
            tokio::spawn(async move {
                let mut arrivals = Vec::new();
                for _ in 0..messages {
                    reader.text().await;
                    arrivals.push(started.elapsed());
                }
                arrivals
            })
        })
        .collect();
    // Open loop: a publish that has to wait counts from when it was due.
    let mut interval = tokio::time::interval(Duration::from_millis(10));
    let mut published = Vec::new();
    for _ in 0..messages {
        let due = interval.tick().await;
        published.push(due.into_std().saturating_duration_since(started));
        publish(gateway, "c", payload.as_bytes()).await;
    }
    let mut latencies = Vec::new();
    for reader in reading {
        let arrivals = soon("a reader", reader).await.expect("it got every message");
        latencies.extend(arrivals.iter().zip(&published).map(|(arrived, sent)| arrived.saturating_sub(*sent)));
    }
    latencies.sort_unstable();
    latencies[latencies.len() * 99 / 100]
}

/// A slow consumer that reads again within the second gets what was begun, and then 4101.
#[tokio::test(flavor = "multi_thread")]
async fn a_slow_consumer_is_told_so() {
    let gateway = gateway(&[("HUBCAST_OUTBOX_MESSAGES", "4")]);
    let mut stalled = Raw::upgrade(&gateway, "/ws?channels=c", b"").await;
    let payload = format!("\"{}\"", "x".repeat(200_000));
    let publishing = async {
        for _ in 0..40 {
            publish(&gateway, "c", payload.as_bytes()).await;
        }
    };
    let reading = async {
        await_metric_above(&gateway, r#"hubcast_dropped_total{reason="slow_consumer"}"#).await;
        stalled.close_frame().await
    };
    let ((), (code, reason)) = tokio::join!(publishing, reading);
    assert_eq!((code, reason.as_str()), (4101, "slow consumer"));
    assert_eq!(stalled.frame().await, None);
}

async fn await_metric_above(gateway: &hubcast::gateway::Gateway, series: &str) {
    eventually(series, async || (metric(gateway, series).await > 0.0).then_some(())).await;
}

/// A trickling reader never fills a bound on a quiet channel: the age of its oldest frame gives it away.
#[tokio::test(flavor = "multi_thread")]
async fn an_old_unsent_frame_makes_a_slow_consumer() {
    let gateway = gateway(&[("HUBCAST_WRITE_TIMEOUT", "400ms")]);
    let mut raw = Raw::connect(&gateway).await;
    SockRef::from(&raw.socket).set_recv_buffer_size(2048).unwrap();
    raw.send(format!("GET /ws?channels=c HTTP/1.1\r\n{}", HANDSHAKE).as_bytes()).await;
    raw.head().await;
    let payload = format!("\"{}\"", "x".repeat(900_000));
    for _ in 0..8 {
        publish(&gateway, "c", payload.as_bytes()).await;
        if metric(&gateway, "hubcast_outbox_frames").await > 0.0 {
            break;
        }
    }
    await_metric(&gateway, r#"hubcast_connections_closed_total{reason="slow_consumer"}"#, 1.0).await;
    await_metric(&gateway, "hubcast_connections", 0.0).await;
}

/// The write deadline counts from the last refusal, not from the last message: quiet connections live.
#[tokio::test(flavor = "multi_thread")]
async fn an_idle_connection_outlives_its_write_deadline_and_many_pings() {
    let gateway = gateway(&[
        ("HUBCAST_WRITE_TIMEOUT", "100ms"),
        ("HUBCAST_PING_INTERVAL", "40ms"),
        ("HUBCAST_PONG_TIMEOUT", "2s"),
    ]);
    let mut raw = Raw::upgrade(&gateway, "/ws?channels=c", b"").await;
    raw.frame().await.expect("the welcome");
    raw.frame().await.expect("the confirmation");
    publish(&gateway, "c", b"1").await;
    raw.frame().await.expect("the event");
    for _ in 0..20 {
        assert_eq!(raw.frame().await.expect("a ping").first, 0x89);
        raw.send(&masked(0x8A, b"")).await;
    }
    publish(&gateway, "c", b"2").await;
    loop {
        let frame = raw.frame().await.expect("the connection lives");
        if frame.first == 0x81 {
            assert!(frame.payload.ends_with(b"\"data\":2}"));
            break;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn silence_after_a_ping_is_a_timeout() {
    let gateway = gateway(&[("HUBCAST_PING_INTERVAL", "50ms"), ("HUBCAST_PONG_TIMEOUT", "100ms")]);
    let mut mute = Raw::upgrade(&gateway, "/ws", b"").await;
    let mut tired = Raw::upgrade(&gateway, "/ws", b"").await;
    tired.frame().await.expect("the welcome");
    assert_eq!(tired.frame().await.expect("a ping").first, 0x89);
    tired.send(&masked(0x8A, b"")).await;
    assert_eq!(mute.close_frame().await.0, 3008);
    assert_eq!(tired.close_frame().await.0, 3008, "one pong does not last for ever");
    await_metric(&gateway, r#"hubcast_connections_closed_total{reason="timeout"}"#, 2.0).await;
}

/// A big channel's flush takes turns with a small one's.
#[tokio::test(flavor = "multi_thread")]
async fn frames_of_many_channels_go_out_in_turns() {
    let gateway = gateway(&[("HUBCAST_WORKER_THREADS", "1")]);
    let mut big = join_all((0..1_000).map(|_| Client::subscribed(&gateway, "big"))).await;
    let mut small = Client::subscribed(&gateway, "small").await;
    let answer = http(
        &gateway,
        "POST /api/publish",
        "",
        json!({"messages": [{"channel": "big", "data": 1}, {"channel": "small", "data": 2}]}).to_string().as_bytes(),
    )
    .await;
    assert_eq!(answer.status, 200);
    small.expect(&json!({"type": "event", "channel": "small", "data": 2})).await;
    for client in &mut big {
        client.expect(&json!({"type": "event", "channel": "big", "data": 1})).await;
    }
}

/// A socket that takes as many bytes per call as its script says; 0 refuses, and after the script it takes all.
pub struct Scripted(parking_lot::Mutex<(Vec<usize>, Vec<u8>)>);

impl Scripted {
    pub fn new(script: &[usize]) -> Self {
        Self(parking_lot::Mutex::new((script.to_vec(), Vec::new())))
    }

    /// First byte and payload of each (short) frame that it took.
    pub fn frames(&self) -> Vec<(u8, Vec<u8>)> {
        let mut rest = self.0.lock().1.clone();
        let mut frames = Vec::new();
        while !rest.is_empty() {
            let frame: Vec<_> = rest.drain(..2 + usize::from(rest[1])).collect();
            frames.push((frame[0], frame[2..].to_vec()));
        }
        frames
    }
}

impl Transport for Scripted {
    fn try_write(&self, slices: &[std::io::IoSlice<'_>]) -> std::io::Result<usize> {
        let (script, written) = &mut *self.0.lock();
        let all: Vec<u8> = slices.iter().flat_map(|slice| slice.iter().copied()).collect();
        let len = if script.is_empty() { all.len() } else { script.remove(0).min(all.len()) };
        written.extend(&all[..len]);
        if len == 0 { Err(std::io::ErrorKind::WouldBlock.into()) } else { Ok(len) }
    }
}

/// Publishers began to wait before the socket refused: they are held up no longer than if it had refused before.
#[test]
fn an_outbox_that_was_late_and_then_refused_is_slow_in_time() {
    let limits = Limits { messages: 4, bytes: 1000 };
    for (taken, is_held_up) in [(1, true), (3, false)] {
        let outbox: Outbox = Outbox::default();
        let frame = Frame::text("x");
        let socket = Scripted::new(&[taken * frame.len(), 0]);
        let pushes: Vec<_> = (0..5).map(|_| outbox.push(&frame, &limits)).collect();
        assert_eq!((pushes[0], pushes[3], pushes[4]), (Push::Schedule, Push::Queued, Push::Late));
        assert_eq!(outbox.flush(&socket, &mut Writer::default(), &limits, 1), Flushed::Blocked);
        assert_eq!(outbox.has_room(&limits), !is_held_up);
        assert!(!outbox.sweep(1 + STALL_US_MAX, u64::MAX));
        assert_eq!(outbox.sweep(2 + STALL_US_MAX, u64::MAX), is_held_up, "{taken} frames taken");
    }
}

/// The socket refuses right after the close that drops the queue: the close frame still follows what was begun.
#[test]
fn a_refused_close_frame_is_not_lost() {
    let limits = Limits { messages: 10, bytes: 1000 };
    // One byte of the event leaves and the rest is refused; or nothing leaves at all.
    for (script, expected) in [([1, 0, 0].as_slice(), [0x81, 0x88].as_slice()), (&[0, 0], &[0x88])] {
        let outbox: Outbox = Outbox::default();
        let socket = Scripted::new(script);
        let mut writer = Writer::default();
        assert_eq!(outbox.push(&Frame::text("begun"), &limits), Push::Schedule);
        assert_eq!(outbox.flush(&socket, &mut writer, &limits, 1), Flushed::Blocked);
        assert_eq!(outbox.push(&Frame::text("dropped"), &limits), Push::Queued);
        outbox.close(Frame::close(&CloseReason::SlowConsumer), false);
        assert_eq!(outbox.flush(&socket, &mut writer, &limits, 2), Flushed::Blocked);
        assert_eq!(outbox.flush(&socket, &mut writer, &limits, 3), Flushed::Finished);
        let firsts: Vec<_> = socket.frames().into_iter().map(|(first, _)| first).collect();
        assert_eq!(firsts, expected);
    }
}

/// A transport that takes everything, and holds back so many bytes until its socket takes some again, as TLS does.
#[derive(Default)]
struct Holding(parking_lot::Mutex<usize>);

impl Transport for Holding {
    fn try_write(&self, slices: &[std::io::IoSlice<'_>]) -> std::io::Result<usize> {
        self.flush(&mut false)?;
        *self.0.lock() = 2;
        Ok(slices.iter().map(|slice| slice.len()).sum())
    }

    fn flush(&self, has_progress: &mut bool) -> std::io::Result<()> {
        match &mut *self.0.lock() {
            0 => Ok(()),
            held => {
                if *held == 1 {
                    *has_progress = true;
                    *held = 0;
                }
                Err(std::io::ErrorKind::WouldBlock.into())
            }
        }
    }
}

/// What a transport took is not sent while its socket refuses it: nobody is idle, it has an age, and a close waits.
#[test]
fn what_a_transport_holds_back_belongs_to_the_blocked_outbox() {
    let limits = Limits { messages: 10, bytes: 1000 };
    let (outbox, socket) = (Outbox::default(), Holding::default());
    let outbox: &Outbox = &outbox;
    let flush = |now_us| outbox.flush(&socket, &mut Writer::default(), &limits, now_us);
    assert_eq!(outbox.push(&Frame::text("x"), &limits), Push::Schedule);
    assert_eq!(flush(100), Flushed::Blocked);
    assert_eq!((outbox.depth(), outbox.push(&Frame::text("y"), &limits)), ((0, 0), Push::Queued));
    assert_eq!(flush(200), Flushed::Blocked, "nothing is written over what is refused");
    assert_eq!(outbox.depth().0, 1);
    *socket.0.lock() = 0;
    assert_eq!(flush(300), Flushed::Blocked, "taken, and refused in turn");
    assert_eq!(outbox.depth(), (0, 0));
    assert!(!outbox.sweep(1_100, 1_000));
    *socket.0.lock() = 1;
    assert_eq!(flush(600), Flushed::Blocked);
    assert!(!outbox.sweep(1_500, 1_000), "its socket took something at 600");
    assert!(outbox.sweep(1_700, 1_000), "and nothing since");
    outbox.close(Frame::close(&CloseReason::SlowConsumer), false);
    assert_eq!(flush(1_800), Flushed::Blocked);
    *socket.0.lock() = 0;
    assert_eq!(flush(1_900), Flushed::Finished);
}
