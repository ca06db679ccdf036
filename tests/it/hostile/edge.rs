//! Those who are not let in: foreign pages, callers without a key, crowds (threat rows 12, 13, 24, 61 to 63).

use futures_util::future::join_all;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::admission::knock;
use crate::harness::{HANDSHAKE, Raw, await_metric, eventually, http, metric, soon};
use crate::hostile::target::Target;
use crate::observe;

const ROUNDS: usize = 20;

fn refused(reason: &str) -> String {
    format!("hubcast_connections_refused_total{{reason=\"{reason}\"}}")
}

/// The status of a handshake with more headers.
async fn handshake(target: &Target, headers: &str) -> String {
    let mut raw = Raw::connect(target).await;
    raw.send(format!("GET /ws HTTP/1.1\r\n{headers}{HANDSHAKE}").as_bytes()).await;
    raw.head().await[9..12].to_owned()
}

/// Foreign pages are refused before the upgrade, each time; without a list, those that come with a visitor's cookies.
#[tokio::test(flavor = "multi_thread")]
async fn foreign_pages_are_turned_away() {
    let listed = [("HUBCAST_ORIGINS", "https://app.example.org,https://*.apps.example.org")];
    let foreign =
        ["null", "https://app.example.org.evil.com", "https://evilapps.example.org", "http://app.example.org"];
    for (row, env, origins, cookies) in
        [(12, &listed[..], &foreign[..], ""), (13, &[], &["https://www.example.com"], "Cookie: session=1\r\n")]
    {
        let mut target = Target::start(env).await;
        for _ in 0..ROUNDS {
            for origin in origins {
                assert_eq!(handshake(&target, &format!("Origin: {origin}\r\n{cookies}")).await, "403", "{origin}");
            }
        }
        let times = (ROUNDS * origins.len()) as f64;
        await_metric(&target, &refused("origin"), times).await;
        // No browser, and no cookie that would say who it is.
        assert_eq!(handshake(&target, "").await, "101");
        target.assert_unharmed().await;
        observe::threat(row, format!("{times} foreign pages: 403 before the upgrade, counted; without an Origin 101"));
    }
}

/// No key, wrong ones, one that is good for something else: nothing is done, and each is counted.
#[tokio::test(flavor = "multi_thread")]
async fn callers_without_the_right_key_do_nothing() {
    let dir = tempfile::TempDir::new().unwrap();
    let path = dir.path().join("keys");
    std::fs::write(&path, "canary-all\ncanary-screen read\n").unwrap();
    let mut target = Target::start_with_key(&[("HUBCAST_API_KEYS", path.to_str().unwrap())], "canary-all").await;
    let wrong = [
        ("", 401, "no_key"),
        ("X-API-Key: canary-al\r\n", 401, "wrong_key"),
        ("X-API-Key: canary-alll\r\n", 401, "wrong_key"),
        ("Authorization: Bearer canary-\r\n", 401, "wrong_key"),
        ("X-API-Key: canary-screen\r\n", 403, "no_right"),
    ];
    for _ in 0..ROUNDS {
        for (header, status, _) in wrong {
            for (request, body) in [
                ("POST /api/publish/neighbours", &b"\"forged\""[..]),
                ("POST /api/disconnect", br#"{"channel":"neighbours"}"#),
            ] {
                assert_eq!(http(&target, request, header, body).await.status, status, "{request} {header}");
            }
        }
    }
    for (reason, kinds) in [("no_key", 1), ("wrong_key", 3), ("no_right", 1)] {
        let series = format!("hubcast_api_refused_total{{reason=\"{reason}\"}}");
        assert_eq!(metric(&target, &series).await, (kinds * 2 * ROUNDS) as f64, "{reason}");
    }
    target.assert_unharmed().await;
    observe::threat(24, "no key, wrong ones, one for something else: 401, 401, 403, counted; nothing was published");
}

/// One address that comes too often, and a storm of all: who is not let in is told when to come back.
#[tokio::test(flavor = "multi_thread")]
async fn crowds_are_let_in_at_the_rate() {
    for (row, env, source, status, reason) in [
        (61, ("HUBCAST_HANDSHAKES_PER_ADDRESS", "2"), [127, 0, 0, 3], 429, "address_rate"),
        (63, ("HUBCAST_HANDSHAKES_PER_SECOND", "2"), [127, 0, 0, 1], 503, "rate"),
    ] {
        let mut target = Target::start(&[env]).await;
        let answers = join_all((0..100).map(|_| knock(&target, source, "/ws"))).await;
        let sent_away: Vec<_> = answers.iter().filter(|(answer, ..)| *answer != 101).collect();
        assert!((50..=98).contains(&sent_away.len()), "{}", sent_away.len());
        assert!(sent_away.iter().all(|(answer, head, _)| *answer == status && head.contains("retry-after: ")));
        assert_eq!(metric(&target, &refused(reason)).await, sent_away.len() as f64);
        target.assert_neighbour_receives().await;
        observe::threat(
            row,
            format!("100 at once where two a second may come: most {status} with Retry-After, counted"),
        );
        drop(answers);
        target.assert_unharmed().await;
    }
}

/// Four times as many sockets as there are files: clients above the limit are refused, and the API still answers.
#[tokio::test(flavor = "multi_thread")]
async fn a_full_house_leaves_room_for_the_api() {
    // One of them is the neighbour's.
    const PLACES: usize = 100;
    let mut target = Target::start_with_files(200 + PLACES as u32, &[]).await;
    let request = format!("GET /ws HTTP/1.1\r\n{HANDSHAKE}");
    for _ in 0..2 {
        let (mut sockets, mut statuses) = (Vec::new(), Vec::new());
        for _ in 0..4 * PLACES {
            let mut socket = TcpStream::connect(target.binary.public).await.unwrap();
            socket.write_all(request.as_bytes()).await.unwrap();
            let mut answer = [0; 12];
            soon("an answer", socket.read_exact(&mut answer)).await.unwrap();
            statuses.push(String::from_utf8_lossy(&answer[9..]).into_owned());
            sockets.push(socket);
            assert_eq!(http(&target, "GET /livez", "", b"").await.status, 200);
        }
        let (inside, outside): (Vec<_>, Vec<_>) = statuses.iter().partition(|status| *status == "101");
        // The place of whoever has just left may be taken yet.
        assert!((PLACES - 2..PLACES).contains(&inside.len()), "{statuses:?}");
        assert!(outside.iter().all(|status| *status == "503"), "{statuses:?}");
        target.assert_neighbour_receives().await;
        drop(sockets);
        // The places are given back a moment after the connections are uncounted.
        await_metric(&target, "hubcast_connections", 1.0).await;
        eventually("the places", async || (handshake(&target, "").await == "101").then_some(())).await;
        await_metric(&target, "hubcast_connections", 1.0).await;
        target.rebase();
    }
    target.assert_unharmed().await;
    observe::threat(62, "four times as many sockets as places: 503 above them, the API answers; files back");
}
