//! Handshakes and requests that no well-behaved client sends (threat rows 1 to 11, 14, 15, 66, 68).

use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::harness::{HANDSHAKE, Instance, Raw, await_metric, masked, metric, soon};
use crate::hostile::target::Target;
use crate::observe;

const REFUSED: &str = r#"hubcast_connections_refused_total{reason="handshake"}"#;

/// Sends the bytes and gives all that comes back until the server ends the connection, which it must.
async fn until_the_end(addr: std::net::SocketAddr, bytes: &[u8]) -> String {
    let socket = TcpStream::connect(addr).await.expect("the listener is there");
    let (mut reading, mut writing) = socket.into_split();
    // The server may end it before it has taken everything.
    let sending = async { drop(writing.write_all(bytes).await) };
    let receiving = async {
        let mut answer = Vec::new();
        let _ = reading.read_to_end(&mut answer).await;
        String::from_utf8_lossy(&answer).into_owned()
    };
    soon("the end of the connection", async { tokio::join!(receiving, sending).0 }).await
}

/// The first line and the head in lower case: header names are.
fn has(answer: &str, status: &str, header: &str) -> bool {
    let head = answer.split("\r\n\r\n").next().unwrap_or_default().to_lowercase();
    let status_line = head.strip_prefix("http/1.").map_or("", |rest| &rest[2..]);
    !status_line.is_empty() && status_line.starts_with(status) && head.contains(header)
}

/// Each bad handshake has its own status, and nothing is read behind it.
#[tokio::test(flavor = "multi_thread")]
async fn handshakes_are_checked_before_the_upgrade() {
    let mut target = Target::start(&[]).await;
    let get = |path: &str, headers: &str| format!("GET {path} HTTP/1.1\r\n{headers}");
    let key = "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n";
    let without_key = HANDSHAKE.replace(key, "");
    let with_key = |value: &str| HANDSHAKE.replace("dGhlIHNhbXBsZSBub25jZQ==", value);
    let allow_get = "allow: get";
    let cases = [
        (1, "no upgrade", get("/ws", "Host: test\r\n\r\n"), "426", "upgrade: websocket"),
        (
            1,
            "upgrade to something else",
            get("/ws", &HANDSHAKE.replace("websocket", "h2c")),
            "426",
            "upgrade: websocket",
        ),
        (
            2,
            "version 8",
            get("/ws", &HANDSHAKE.replace("Version: 13", "Version: 8")),
            "426",
            "sec-websocket-version: 13",
        ),
        (
            2,
            "no version",
            get("/ws", &HANDSHAKE.replace("Sec-WebSocket-Version: 13\r\n", "")),
            "426",
            "sec-websocket-version: 13",
        ),
        (3, "no key", get("/ws", &without_key), "400", ""),
        (3, "two keys", get("/ws", &format!("{key}{HANDSHAKE}")), "400", ""),
        (3, "a short key", get("/ws", &with_key("short")), "400", ""),
        (3, "a key of 17 bytes", get("/ws", &with_key("MTIzNDU2Nzg5MDEyMzQ1Njc=")), "400", ""),
        (3, "a key that is not base64", get("/ws", &with_key("!!!!IHNhbXBsZSBub25jZQ==")), "400", ""),
        (4, "POST", format!("POST /ws HTTP/1.1\r\n{HANDSHAKE}"), "405", allow_get),
        (4, "HTTP/1.0", format!("GET /ws HTTP/1.0\r\n{HANDSHAKE}"), "400", ""),
        (5, "a header of 1 MB", get("/ws", &format!("X-Long: {}\r\n{HANDSHAKE}", "x".repeat(1 << 20))), "431", ""),
        (5, "a path of 1 MB", get(&format!("/ws?{}", "x".repeat(1 << 20)), HANDSHAKE), "4", ""),
        (6, "2,000 headers", get("/ws", &format!("{}{HANDSHAKE}", "X-Many: x\r\n".repeat(2_000))), "431", ""),
        (10, "obs-fold", get("/ws", &format!("X-Folded: a\r\n b\r\n{HANDSHAKE}")), "400", ""),
        (10, "a space before the colon", get("/ws", &format!("X-Space : a\r\n{HANDSHAKE}")), "400", ""),
        (10, "a bare LF in a value", get("/ws", &format!("X-Bare: a\nX: b\x00\r\n{HANDSHAKE}")), "400", ""),
        (66, "/metrics", get("/metrics", HANDSHAKE), "404", ""),
        (66, "/api/publish", "POST /api/publish/c HTTP/1.1\r\nHost: t\r\nContent-Length: 1\r\n\r\n1".into(), "404", ""),
        (66, "/debug/pprof", get("/debug/pprof/", "Host: t\r\n\r\n"), "404", ""),
        (66, "/readyz", get("/readyz", "Host: t\r\n\r\n"), "404", ""),
        (66, "/echo, which is off", get("/echo", HANDSHAKE), "404", ""),
        (
            68,
            "the preface of HTTP/2",
            "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00".into(),
            "",
            "",
        ),
    ];
    for (row, what, request, status, header) in cases {
        let before = metric(&target, REFUSED).await;
        let trap = format!("{request}GET /ws HTTP/1.1\r\nHost: t\r\n\r\n");
        let answer = until_the_end(target.public(), trap.as_bytes()).await;
        if row == 68 {
            assert!(!answer.starts_with("HTTP/1.1 1") && !answer.starts_with("HTTP/1.1 2"), "{what}: {answer}");
        } else {
            assert!(has(&answer, status, header), "{what}: {answer}");
        }
        assert!(answer.matches("HTTP/1.1").count() <= 1, "{what}: what follows is not read as HTTP: {answer}");
        target.await_growth(REFUSED, before, 1.0).await;
        let seen = answer.split("\r\n").next().filter(|line| !line.is_empty()).unwrap_or("closed without an answer");
        observe::threat(
            row,
            format!("{what}: {}", seen.trim_start_matches("HTTP/1.1 ").trim_start_matches("HTTP/1.0 ")),
        );
    }
    assert_eq!(metric(&target, "hubcast_connections_opened_total").await, 1.0, "the neighbour's");
    target.assert_unharmed().await;
}

/// A head that comes in single bytes, up to its limit: what it costs is bounded by what hyper buffers.
#[tokio::test(flavor = "multi_thread")]
async fn a_head_in_single_bytes_costs_little() {
    let mut target = Target::start(&[]).await;
    let before = target.cpu_ticks();
    let mut socket = TcpStream::connect(target.public()).await.unwrap();
    socket.set_nodelay(true).unwrap();
    let (mut reading, mut writing) = socket.split();
    let sending = async {
        let head = format!("GET /ws HTTP/1.1\r\nX-Long: {}", "x".repeat(1 << 20));
        let mut sent = 0;
        for byte in head.as_bytes() {
            if writing.write_all(&[*byte]).await.is_err() {
                break;
            }
            sent += 1;
        }
        sent
    };
    let receiving = async {
        let mut answer = Vec::new();
        let _ = reading.read_to_end(&mut answer).await;
        String::from_utf8_lossy(&answer).into_owned()
    };
    let (sent, answer) = soon("the refusal", async { tokio::join!(sending, receiving) }).await;
    assert!(has(&answer, "431", ""), "{answer}");
    let ticks = target.cpu_ticks() - before;
    assert!(ticks < 100, "{ticks} ticks of 10 ms for one head");
    target.assert_unharmed().await;
    observe::threat(5, "a head in single bytes: 431 at 16 KiB, below a second of CPU");
    println!("{sent} bytes were taken, {} ms of CPU", ticks * 10);
}

/// 500 sockets that say nothing, and 500 that begin and stop.
#[tokio::test(flavor = "multi_thread")]
async fn heads_that_do_not_come_are_given_up() {
    const EACH: usize = 500;
    const TIMEOUT: &str = r#"hubcast_connections_refused_total{reason="timeout"}"#;
    // Long enough that all of a wave are there at once: each takes as much memory as the first.
    let mut target = Target::start(&[("HUBCAST_HANDSHAKE_TIMEOUT", "2s")]).await;
    for wave in 1..=3 {
        let started = Instant::now();
        let mut sockets = Vec::new();
        for number in 0..2 * EACH {
            let mut raw = Raw::connect(&target).await;
            if number % 2 == 0 {
                raw.send(b"GET /ws HTTP/1.1\r\nHost: t\r\nX-Sl").await;
            }
            sockets.push(raw);
        }
        target.assert_neighbour_receives().await;
        for raw in &mut sockets {
            let mut rest = Vec::new();
            soon("the end of the connection", raw.socket.read_to_end(&mut rest)).await.unwrap();
            assert!(!rest.starts_with(b"HTTP/1.1 1"), "{}", String::from_utf8_lossy(&rest));
        }
        assert!(started.elapsed() >= Duration::from_secs(2), "they had their time");
        await_metric(&target, TIMEOUT, (wave * 2 * EACH) as f64).await;
        if wave < 3 {
            target.rebase();
        }
    }
    target.assert_unharmed().await;
    observe::threat(7, "3 waves of 1,000 sockets: all closed at the timeout, counted, their files back");
}

/// Bodies: too slow, too large, and requests that two parsers would read in two ways.
#[tokio::test(flavor = "multi_thread")]
async fn bodies_are_bounded_and_read_in_one_way() {
    const GIB: &str = "1073741824";
    let env = [("HUBCAST_HANDSHAKE_TIMEOUT", "1s"), ("HUBCAST_PUBLISH_BYTES_MAX", "1000")];
    let mut target = Target::start(&env).await;
    let post = |headers: &str, body: &str| format!("POST /api/publish/c HTTP/1.1\r\nHost: t\r\n{headers}\r\n{body}");
    let chunk = |text: &str| format!("{:x}\r\n{text}\r\n", text.len());
    let chunked = "Transfer-Encoding: chunked\r\n";
    let both = |first: &str, second: &str| post(&format!("{first}{second}"), "1\r\n1\r\n0\r\n\r\n");
    let cases = [
        (8, "a body that stops", post("Content-Length: 5\r\n", "1"), "408"),
        (8, "a chunked body that stops", post(chunked, "5\r\n1"), "408"),
        (9, "1 GiB declared", post(&format!("Content-Length: {GIB}\r\n"), ""), "413"),
        (9, "1 byte too many declared", post("Content-Length: 1001\r\n", ""), "413"),
        (9, "1 byte too many in chunks", post(chunked, &(chunk(&"1".repeat(1001)) + "0\r\n\r\n")), "413"),
        (10, "two Content-Length", post("Content-Length: 1\r\nContent-Length: 2\r\n", "1"), "400"),
        (10, "+5", post("Content-Length: +5\r\n", "12345"), "400"),
        (10, "-1", post("Content-Length: -1\r\n", ""), "400"),
        (10, "2^64", post("Content-Length: 18446744073709551616\r\n", ""), "400"),
        (10, "chunked is not last", post("Transfer-Encoding: chunked, identity\r\n", ""), "400"),
        (10, "an unknown coding", post("Transfer-Encoding: xchunked\r\n", ""), "400"),
        (10, "a chunk size that is no number", post(chunked, "zz\r\n1"), "400"),
        (10, "chunked in HTTP/1.0", post(chunked, "1\r\n1\r\n0\r\n\r\n").replace("HTTP/1.1", "HTTP/1.0"), "400"),
        (10, "obs-fold", post("Content-Length:\r\n 1\r\n", "1"), "400"),
        // RFC 9112 section 6.3: the coding alone counts, and the connection ends.
        (10, "CL then TE", both("Content-Length: 4\r\n", chunked), "200"),
        (10, "TE then CL", both(chunked, "Content-Length: 4\r\n"), "200"),
    ];
    for (row, what, request, status) in cases {
        let series = format!("hubcast_api_answers_total{{status=\"{status}\"}}");
        let before = metric(&target, &series).await;
        let is_alone = row == 8 || what.ends_with("chunks") || what.contains("TE");
        let trap = if is_alone { "" } else { "GET /livez HTTP/1.1\r\nHost: t\r\n\r\n" };
        let request = request + trap;
        let answer = until_the_end(target.internal(), request.as_bytes()).await;
        // What hyper cannot read it answers, and may end the connection before that is sent: the rest is unread.
        let is_unanswered = row == 10 && status == "400" && answer.is_empty();
        assert!(is_unanswered || has(&answer, status, ""), "{what}: {answer}");
        assert!(answer.matches("HTTP/1.").count() <= 1, "{what}: what follows is not read: {answer}");
        // Those that ask for metrics are answers themselves.
        let more = if status == "200" { 2.0 } else { 1.0 };
        let after = metric(&target, &series).await;
        assert!(after >= before + more, "{what}: {series} went from {before} to {after}");
        let note = if status == "200" { ", by the coding alone, then closed (RFC 9112 6.3)" } else { "" };
        let seen = if is_unanswered { "closed at once, counted as" } else { "" };
        observe::threat(row, format!("{what}: {seen} {status}{note}").replace(":  ", ": "));
    }
    for what in [both("Content-Length: 4\r\n", chunked), both(chunked, "Content-Length: 4\r\n")] {
        let trap = what + "GET /livez HTTP/1.1\r\nHost: t\r\n\r\n";
        let answer = until_the_end(target.internal(), trap.as_bytes()).await;
        assert!(answer.matches("HTTP/1.").count() <= 1, "what follows is not read: {answer}");
    }
    // Chunks without end: it is not read to any end, and what comes back is the end of the connection.
    let endless = post(chunked, &chunk(&"1".repeat(500)).repeat(20_000));
    until_the_end(target.internal(), endless.as_bytes()).await;
    observe::threat(9, "10 MB of chunks at a limit of 1,000 bytes: ended, memory back");
    target.assert_unharmed().await;
}

/// Right behind the upgrade request: frames if it succeeds, nothing at all if it does not.
#[tokio::test(flavor = "multi_thread")]
async fn bytes_behind_the_upgrade_are_frames_or_nothing() {
    let mut target = Target::start(&[]).await;
    let mut raw = Raw::upgrade(&target, "/ws", &masked(0x89, b"right behind")).await;
    let firsts = [raw.frame().await.expect("a frame"), raw.frame().await.expect("another")];
    assert!(firsts.iter().any(|frame| frame.first == 0x8A && frame.payload == b"right behind"), "{firsts:?}");
    drop(raw);
    observe::threat(11, "a frame in the same write: answered");
    let mut raw = Raw::upgrade(&target, "/ws", b"GET /metrics HTTP/1.1\r\nHost: t\r\n\r\n").await;
    assert_eq!(raw.close_frame().await.0, 1002);
    observe::threat(11, "a request in the same write: taken for a frame, 1002");
    let refused = format!("GET /ws HTTP/1.1\r\nHost: t\r\n\r\nGET /ws HTTP/1.1\r\n{HANDSHAKE}");
    let answer = until_the_end(target.public(), refused.as_bytes()).await;
    assert_eq!((has(&answer, "426", ""), answer.matches("HTTP/1.1 ").count()), (true, 1), "{answer}");
    observe::threat(11, "a handshake behind a refused one: not read");
    target.assert_unharmed().await;
}

/// Offers that are not known are declined, not refused.
#[tokio::test(flavor = "multi_thread")]
async fn unknown_offers_are_declined() {
    let mut target = Target::start(&[]).await;
    let cases = [
        (14, "Sec-WebSocket-Protocol: graphql-ws"),
        (14, "Sec-WebSocket-Protocol: hubcast.v2, , soap"),
        (15, "Sec-WebSocket-Extensions: permessage-deflate; server_max_window_bits=99"),
        (15, "Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits=\"\x7f\"; ;;,,"),
        (15, "Sec-WebSocket-Extensions: x-webkit-deflate-frame, \t;=\"unended"),
    ];
    for (row, offer) in cases {
        let mut raw = Raw::connect(&target).await;
        raw.send(format!("GET /ws HTTP/1.1\r\n{offer}\r\n{HANDSHAKE}").as_bytes()).await;
        let head = raw.head().await.to_lowercase();
        // hyper refuses control characters in any header.
        let is_control = offer.contains('\x7f');
        assert!(head.starts_with(if is_control { "http/1.1 400" } else { "http/1.1 101" }), "{offer}: {head}");
        assert!(!head.contains("sec-websocket-protocol") && !head.contains("sec-websocket-extensions"), "{head}");
        if !is_control {
            assert_eq!(raw.frame().await.expect("the welcome").first, 0x81);
            raw.send(&masked(0xC1, b"\x00")).await;
            assert_eq!(raw.close_frame().await.0, 1002, "nothing was agreed");
        }
        observe::threat(row, if is_control { "a control character: 400" } else { "101 without the header" });
    }
    target.assert_unharmed().await;
    observe::threat(38, "RSV1 without an agreement: 1002");
}
