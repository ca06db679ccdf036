//! Who is let in: stories of crowds at the door, of those who are sent away, and of those who are inside meanwhile.

use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use futures_util::future::join_all;
use hubcast::gateway::Gateway;
use hubcast::guests::{Guests, STRANGERS_MAX, Unwelcome, network};
use hubcast::meter::{Meter, Rate, Verdict};
use serde_json::json;
use tokio::io::AsyncReadExt;
use tokio::net::TcpSocket;

use crate::harness::{Client, HANDSHAKE, Instance, Raw, await_metric, eventually, gateway, metric, publish, soon};

/// A handshake from a local address: the status, and the head with what followed of the body.
pub async fn knock(gateway: &impl Instance, source: [u8; 4], path: &str) -> (u16, String, Raw) {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind((Ipv4Addr::from(source), 0).into()).unwrap();
    let mut raw = Raw { socket: socket.connect(gateway.public()).await.unwrap() };
    raw.send(format!("GET {path} HTTP/1.1\r\n{HANDSHAKE}").as_bytes()).await;
    let mut head = raw.head().await;
    let status = head[9..12].parse().unwrap();
    if status != 101 {
        soon("the end", raw.socket.read_to_string(&mut head)).await.unwrap();
    }
    (status, head.to_lowercase(), raw)
}

fn retry_after(head: &str) -> u64 {
    let value = head.lines().find_map(|line| line.strip_prefix("retry-after: "));
    value.unwrap_or_else(|| panic!("no retry-after in {head}")).parse().unwrap()
}

async fn refused(gateway: &Gateway, reason: &str) -> f64 {
    metric(gateway, &format!(r#"hubcast_connections_refused_total{{reason="{reason}"}}"#)).await
}

/// A publication still reaches whoever is inside.
async fn hears(gateway: &Gateway, neighbour: &mut Client) {
    publish(gateway, "news", b"1").await;
    neighbour.expect(&json!({"type": "event", "channel": "news", "data": 1})).await;
}

/// Forty come at once to a gateway that lets two a second in: the first are served, the others are told when their
/// turn is, one after another, and whoever waits that long is let in.
#[tokio::test(flavor = "multi_thread")]
async fn a_storm_is_served_at_the_rate_and_the_rest_gets_turns() {
    let gateway = gateway(&[("HUBCAST_HANDSHAKES_PER_SECOND", "2")]);
    let mut neighbour = Client::subscribed(&gateway, "news").await;
    let answers = join_all((0..40).map(|_| knock(&gateway, [127, 0, 0, 1], "/ws"))).await;
    let (admitted, sent_away): (Vec<_>, Vec<_>) = answers.iter().partition(|(status, ..)| *status == 101);
    // Four at once, of which the neighbour was one, and what the rate lets in while they come.
    assert!((3..20).contains(&admitted.len()), "{}", admitted.len());
    assert!(sent_away.iter().all(|(status, head, _)| *status == 503 && head.contains("\"code\":\"unavailable\"")));
    let mut turns: Vec<_> = sent_away.iter().map(|(_, head, _)| retry_after(head)).collect();
    turns.sort_unstable();
    assert_eq!((turns[0], turns.len() as f64), (1, refused(&gateway, "rate").await));
    let last = turns[turns.len() - 1];
    assert!((5..=21).contains(&last), "at two a second the last turn is {last}");
    hears(&gateway, &mut neighbour).await;
    eventually("a turn", async || Client::try_open(&gateway, "/ws", None).await.ok()).await;
    crate::observe::threat(63, "admitted at the rate, the rest told when to come back");
}

/// Those who connect and say nothing take no place from those who speak, beyond a bound.
#[tokio::test(flavor = "multi_thread")]
async fn silent_handshakes_are_bounded() {
    let gateway = gateway(&[("HUBCAST_HANDSHAKES_PENDING_MAX", "3")]);
    let mut neighbour = Client::subscribed(&gateway, "news").await;
    let silent = join_all((0..3).map(|_| Raw::connect(&gateway))).await;
    let (status, head, _) = knock(&gateway, [127, 0, 0, 1], "/ws").await;
    assert_eq!(status, 503, "{head}");
    assert!((1..=5).contains(&retry_after(&head)), "{head}");
    assert_eq!(refused(&gateway, "pending").await, 1.0);
    hears(&gateway, &mut neighbour).await;
    drop(silent);
    eventually("room", async || Client::try_open(&gateway, "/ws", None).await.ok()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_address_has_so_many_connections_and_no_more() {
    let gateway = gateway(&[("HUBCAST_CONNECTIONS_PER_ADDRESS", "2")]);
    let mut neighbour = Client::subscribed(&gateway, "news").await;
    let mut inside = Vec::new();
    for expected in [101, 101, 429, 429] {
        let (status, head, raw) = knock(&gateway, [127, 0, 0, 2], "/ws").await;
        assert_eq!(status, expected, "{head}");
        if status == 429 {
            assert!(retry_after(&head) >= 1 && head.contains("\"code\":\"rate_limited\""), "{head}");
        } else {
            inside.push(raw);
        }
    }
    assert_eq!(refused(&gateway, "address_connections").await, 2.0);
    hears(&gateway, &mut neighbour).await;
    inside.pop();
    eventually("a free place", async || (knock(&gateway, [127, 0, 0, 2], "/ws").await.0 == 101).then_some(())).await;
}

/// One address that comes too often is sent away, and costs the others none of the instance's handshakes.
#[tokio::test(flavor = "multi_thread")]
async fn an_address_that_comes_too_often_is_sent_away_alone() {
    let gateway = gateway(&[("HUBCAST_HANDSHAKES_PER_ADDRESS", "1"), ("HUBCAST_HANDSHAKES_PER_SECOND", "10")]);
    let answers = join_all((0..60).map(|_| knock(&gateway, [127, 0, 0, 3], "/ws"))).await;
    let admitted = answers.iter().filter(|(status, ..)| *status == 101).count();
    assert!((2..20).contains(&admitted), "{admitted}");
    assert!(answers.iter().all(|(status, ..)| matches!(status, 101 | 429)), "nobody else's limit is used up");
    assert_eq!(refused(&gateway, "address_rate").await, (60 - admitted) as f64);
    assert_eq!(refused(&gateway, "rate").await, 0.0);
    let mut neighbour = Client::subscribed(&gateway, "news").await;
    hears(&gateway, &mut neighbour).await;
    crate::observe::threat(61, "an address that comes too often: turned away, the others are not");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_user_has_so_many_connections_from_wherever() {
    let gateway = gateway(&[("HUBCAST_CONNECTIONS_PER_USER", "2")]);
    let one = knock(&gateway, [127, 0, 0, 1], "/ws?user=alice").await;
    let _two = knock(&gateway, [127, 0, 0, 2], "/ws?user=alice").await;
    let (status, head, _) = knock(&gateway, [127, 0, 0, 3], "/ws?user=alice").await;
    assert_eq!(status, 429, "{head}");
    assert!(retry_after(&head) >= 1 && head.contains("this user"), "{head}");
    assert_eq!(refused(&gateway, "user_connections").await, 1.0);
    for path in ["/ws?user=bob", "/ws", "/ws", "/ws"] {
        assert_eq!(knock(&gateway, [127, 0, 0, 1], path).await.0, 101, "{path}");
    }
    await_metric(&gateway, "hubcast_connections_opened_total", 6.0).await;
    drop(one);
    let path = "/ws?user=alice";
    eventually("a free place", async || (knock(&gateway, [127, 0, 0, 1], path).await.0 == 101).then_some(())).await;
}

/// Three hundred who are refused at once all read why: while there are places, they may take them for that.
#[tokio::test(flavor = "multi_thread")]
async fn a_crowd_that_is_sent_away_is_told_so() {
    let gateway = gateway(&[("HUBCAST_HANDSHAKES_PER_ADDRESS", "1")]);
    let mut neighbour = Client::subscribed(&gateway, "news").await;
    let crowd = join_all((0..300).map(|_| knock(&gateway, [127, 0, 0, 2], "/ws"))).await;
    let sent_away: Vec<_> = crowd.iter().filter(|(status, ..)| *status != 101).collect();
    assert!(sent_away.len() > 200, "{}", sent_away.len());
    assert!(sent_away.iter().all(|(status, head, _)| *status == 429 && retry_after(head) >= 1));
    assert_eq!(refused(&gateway, "address_rate").await, sent_away.len() as f64);
    hears(&gateway, &mut neighbour).await;
}

/// A bucket lets a burst through, then the rate, says when to go on, and knows who does not listen.
#[test]
fn a_meter_is_a_token_bucket() {
    let second = Duration::from_secs(1);
    let rate = Rate::new(10, second, second);
    let mut meter = Meter::default();
    let now = 5_000_000;
    assert!((0..10).all(|_| meter.take(&rate, 1, now) == Verdict::Within));
    assert_eq!(meter.take(&rate, 1, now), Verdict::Over(second / 5));
    assert_eq!(meter.take(&rate, 4, now), Verdict::Over(second * 9 / 10));
    // Whoever waits that long has the next one; who is refused without taking has it sooner.
    assert_eq!(meter.take(&rate, 1, now + 600_000), Verdict::Within);
    assert_eq!(meter.try_take(&rate, 1, now + 600_000), Err(second / 10));
    assert_eq!(meter.try_take(&rate, 1, now + 700_000), Ok(()));
    // More than a burst is as good as a burst; as much again in vain is abuse.
    assert_eq!(meter.take(&rate, 1000, now + 700_000), Verdict::Over(second * 2));
    assert_eq!(meter.take(&rate, 1, now + 700_000), Verdict::Abuse);
    assert_eq!(meter.take(&rate, 10, now + 60_000_000), Verdict::Within);
    assert_eq!(meter.take(&Rate::UNLIMITED, 1 << 40, now), Verdict::Within);
    assert_eq!(Rate::new(0, second, second), Rate::UNLIMITED);
    // One of more than a thousand million a second, and one a day, are not lost to rounding.
    assert_eq!(Meter::default().take(&Rate::new(1 << 40, second, second), 1_000_000, now), Verdict::Within);
    let mut seldom = Meter::default();
    let daily = Rate::new(1, second * 86_400, second);
    assert_eq!(seldom.take(&daily, 1, now), Verdict::Within);
    assert_eq!(seldom.take(&daily, 1, now), Verdict::Over(second * 2 * 86_400));
}

#[test]
fn an_ipv6_guest_is_its_network_and_ipv4_has_one_spelling() {
    let network = |text: &str| network(text.parse::<IpAddr>().unwrap()).to_string();
    assert_eq!(network("2001:db8:1:2:3:4:5:6"), "2001:db8:1:2::");
    assert_eq!(network("2001:db8:1:2:ffff::1"), "2001:db8:1:2::");
    assert_eq!(network("2001:db8:1:3::1"), "2001:db8:1:3::");
    assert_eq!(network("::ffff:192.0.2.7"), "192.0.2.7");
    assert_eq!(network("192.0.2.7"), "192.0.2.7");
}

/// Whoever comes from more addresses than the table holds fills it, and locks nobody out; when their time is over the
/// table forgets them.
#[test]
fn the_table_of_addresses_is_bounded() {
    let second = Duration::from_secs(1);
    let guests = Guests::new(3, Rate::new(2, second, second), None);
    let now = 1_000_000;
    let _stays: Vec<_> = (0..10).map(|key| guests.enter(&key, now).unwrap()).collect();
    for key in 10..STRANGERS_MAX as u32 * 2 {
        drop(guests.enter(&key, now));
    }
    assert_eq!(guests.len(), STRANGERS_MAX + 10);
    let stranger = guests.enter(&u32::MAX, now).unwrap();
    assert_eq!(guests.len(), STRANGERS_MAX + 10, "let in, and not counted");
    drop(stranger);
    // Who is known is still limited.
    let _two = guests.enter(&3, now).unwrap();
    assert_eq!(guests.enter(&3, now).unwrap_err(), Unwelcome::Handshakes(second / 2));
    let _three = guests.enter(&3, now + 5_000_000).unwrap();
    assert_eq!(guests.enter(&3, now + 5_000_000).unwrap_err(), Unwelcome::Connections);
    (1..=100).for_each(|back| drop(guests.enter(&(u32::MAX - back), now + 5_000_000)));
    assert!(guests.len() < 200, "the others are forgotten");
}
