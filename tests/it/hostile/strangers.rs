//! What those who say nothing, or half of it, may hold, and for how long (threat rows 7, 37, 62).

use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::harness::{Raw, eventually, http, masked, metric, soon};
use crate::hostile::target::Target;
use crate::observe;

/// Counted at once, not when the connection is gone.
const SENT_AWAY: &str = r#"hubcast_limited_total{limit="memory"}"#;
const TIMEOUT: &str = r#"hubcast_connections_refused_total{reason="timeout"}"#;
const ARRIVING: &str = r#"hubcast_ledger_bytes{kind="arriving"}"#;

/// A message of so many bytes, but for its last one.
fn all_but_the_last(len: usize) -> Vec<u8> {
    let mut message = masked(0x81, &vec![b' '; len]);
    message.pop();
    message
}

/// Once half of the places are taken, whoever holds one in silence has two seconds and not the whole timeout.
#[tokio::test(flavor = "multi_thread")]
async fn silent_handshakes_in_a_crowd_have_two_seconds() {
    let env = [("HUBCAST_HANDSHAKES_PENDING_MAX", "4"), ("HUBCAST_HANDSHAKE_TIMEOUT", "20s")];
    let mut target = Target::start(&env).await;
    let began = Instant::now();
    let mut silent = Vec::new();
    for _ in 0..4 {
        silent.push(Raw::connect(&target).await);
        // Accepted one after another: the last two find half of the places taken.
        target.assert_neighbour_receives().await;
    }
    for late in &mut silent[2..] {
        soon("the end of a silent one", late.socket.read_to_end(&mut Vec::new())).await.unwrap();
    }
    let took = began.elapsed();
    assert!(took >= Duration::from_millis(1_900) && took < Duration::from_secs(15), "{took:?}");
    target.await_growth(TIMEOUT, 0.0, 2.0).await;
    for early in &mut silent[..2] {
        let open = early.socket.try_read(&mut [0]).unwrap_err();
        assert_eq!(open.kind(), std::io::ErrorKind::WouldBlock, "they came in time");
    }
    drop(silent);
    target.assert_unharmed().await;
    observe::threat(7, "4 silent ones where 4 places are: the last two are closed after 2 s, the timeout being 20 s");
}

/// The API takes so many connections at once; one more waits for its turn, and gets it.
#[tokio::test(flavor = "multi_thread")]
async fn the_api_takes_128_connections_at_once() {
    const REQUEST: &[u8] = b"GET /livez HTTP/1.1\r\nHost: t\r\n\r\n";
    async fn ask(socket: &mut TcpStream) {
        socket.write_all(REQUEST).await.unwrap();
        let mut answer = [0; 15];
        soon("an answer", socket.read_exact(&mut answer)).await.unwrap();
        assert_eq!(&answer, b"HTTP/1.1 200 OK");
        // The rest of it has come with the head.
        while socket.try_read(&mut [0; 4096]).is_ok_and(|len| len > 0) {}
    }
    let mut target = Target::start(&[]).await;
    let mut kept = Vec::new();
    for _ in 0..128 {
        let mut socket = TcpStream::connect(target.binary.internal).await.unwrap();
        ask(&mut socket).await;
        kept.push(socket);
    }
    let mut waiting = TcpStream::connect(target.binary.internal).await.unwrap();
    waiting.write_all(REQUEST).await.unwrap();
    // Whoever is in is served, in which time the one who waits would have been, too.
    for _ in 0..5 {
        for socket in &mut kept {
            ask(socket).await;
        }
    }
    let unanswered = waiting.try_read(&mut [0]).unwrap_err();
    assert_eq!(unanswered.kind(), std::io::ErrorKind::WouldBlock);
    kept.pop();
    let mut answer = [0; 15];
    soon("its turn", waiting.read_exact(&mut answer)).await.unwrap();
    drop((kept, waiting));
    target.assert_unharmed().await;
    observe::threat(62, "128 connections to the API are held: one more waits for its turn");
}

/// While too much is arriving, whoever brings much has to go, and nobody for a trifle.
#[tokio::test(flavor = "multi_thread")]
async fn nobody_goes_for_a_trifle() {
    const QUARTER: f64 = 2.0 * 1024.0 * 1024.0;
    let mut target = Target::start(&[("HUBCAST_MEMORY_MAX", "8MiB")]).await;
    let mut much = Vec::new();
    while metric(&target, SENT_AWAY).await == 0.0 {
        let mut raw = Raw::upgrade(&target, "/ws", b"").await;
        raw.send(&all_but_the_last(60_000)).await;
        much.push(raw);
    }
    let mut little = Vec::new();
    while metric(&target, ARRIVING).await <= QUARTER {
        let mut raw = Raw::upgrade(&target, "/ws", b"").await;
        raw.frame().await.expect("the welcome");
        raw.send(&all_but_the_last(2_000)).await;
        little.push(raw);
        assert!(little.len() < 500, "it never becomes too much");
    }
    // A last one while it is too much.
    let mut last = Raw::upgrade(&target, "/ws", b"").await;
    last.frame().await.expect("the welcome");
    last.send(&all_but_the_last(2_000)).await;
    little.push(last);
    for raw in &mut little {
        // The end of the message: an answer to it, which nobody gets who was closed.
        raw.send(&[b' ' ^ 0x78]).await;
        let answer = raw.frame().await.expect("it is open");
        assert_eq!(answer.first, 0x81, "{:?}", String::from_utf8_lossy(&answer.payload));
    }
    drop((much, little));
    target.assert_unharmed().await;
    observe::threat(37, "half messages of 2 kB while too much is arriving: they stay, those of 60 kB go");
}

/// Who is being closed holds nothing while its peer is waited for.
#[tokio::test(flavor = "multi_thread")]
async fn a_closing_session_lets_go_of_what_it_held() {
    let mut target = Target::start(&[]).await;
    let mut deaf = Vec::new();
    for _ in 0..20 {
        let mut raw = Raw::upgrade(&target, "/ws", b"").await;
        raw.send(&masked(0x01, &[b' '; 60_000])).await;
        deaf.push(raw);
    }
    eventually("it to arrive", async || (metric(&target, ARRIVING).await > 20.0 * 60_000.0).then_some(())).await;
    for raw in &mut deaf {
        raw.send(&masked(0x82, b"")).await;
        assert_eq!(raw.close_frame().await.0, 1002);
    }
    let scrape = eventually("their buffers", async || {
        let text = http(&target, "GET /metrics", "", b"").await.body;
        text.lines().any(|line| line == format!("{ARRIVING} 0")).then_some(text)
    })
    .await;
    // They are still waited for: nobody has answered the close.
    let connections = scrape.lines().find_map(|line| line.strip_prefix("hubcast_connections ")).expect("the gauge");
    assert_eq!(connections, "21");
    drop(deaf);
    target.assert_unharmed().await;
    observe::threat(43, "20 closed ones that do not answer: nothing is held for them");
}
