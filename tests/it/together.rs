//! What the connections of one user, of one address, and of the instance may do and hold together: in each story two who
//! share, one who comes back, and somebody else whom it does not concern.

use std::net::Ipv4Addr;
use std::time::Duration;

use hubcast::clock;
use hubcast::gateway::Gateway;
use hubcast::guests::{Guests, STRANGERS_MAX, Stay};
use hubcast::meter::Rate;
use hubcast::metrics::Scope;
use hubcast::tab::{Bounds, Share};
use serde_json::{Value, json};
use tokio::net::TcpSocket;

use crate::harness::{Client, HANDSHAKE, Raw, await_metric, eventually, gateway, masked, metric, publish};
use crate::issuer::{SECRET, token};

const PROXIED: (&str, &str) = ("HUBCAST_TRUSTED_PROXIES", "127.0.0.1");
const JWT: [(&str, &str); 2] = [("HUBCAST_AUTH", "jwt"), ("HUBCAST_JWT_SECRET", SECRET)];

async fn shared_limited(gateway: &Gateway, scope: &str, limit: &str) -> f64 {
    metric(gateway, &format!(r#"hubcast_shared_limited_total{{scope="{scope}",limit="{limit}"}}"#)).await
}

/// A client of an address, as the proxy in front tells it, with its welcome taken.
async fn from(gateway: &Gateway, address: &str) -> Client {
    let mut client = Client::try_open_with(gateway, "/ws", &[("x-forwarded-for", address)]).await.unwrap();
    assert_eq!(client.json().await["type"], "welcome");
    client
}

/// A client that has shown a user's token in the handshake.
async fn of(gateway: &Gateway, user: &str) -> Client {
    let claims = json!({"sub": user, "subscribe": ["*"], "publish": ["*"]});
    let mut client = Client::open(gateway, &format!("/ws?token={}", token(claims)), None).await;
    assert_eq!(client.json().await["user"], user);
    client
}

async fn answer(client: &mut Client, command: &Value) -> Value {
    client.send(command).await;
    client.json().await
}

async fn ping(client: &mut Client) -> Value {
    answer(client, &json!({"type": "ping"})).await
}

/// Has clients send a command in turns until one is refused.
async fn refused(clients: &mut [&mut Client], command: &Value) -> Value {
    eventually("a refusal", async || {
        for client in clients.iter_mut() {
            let answer = answer(client, command).await;
            if answer["type"] == "error" {
                return Some(answer);
            }
        }
        None
    })
    .await
}

/// Whoever comes back right after a refusal is refused too. A tab is full again in seconds, so that has a few tries.
async fn stays_refused(first: &mut Client, mut come_back: impl AsyncFnMut() -> Client, message: &str) {
    for _ in 0..10 {
        refused(&mut [first], &json!({"type": "ping"})).await;
        if ping(&mut come_back().await).await["message"] == message {
            return;
        }
    }
    panic!("coming back gives a new burst");
}

/// Two of one network share its rate: each is below what a connection may do, together they are not. They are told so, and
/// stay; who comes back gets no new burst; another network does not notice.
#[tokio::test(flavor = "multi_thread")]
async fn connections_of_an_address_share_its_commands() {
    let gateway = gateway(&[PROXIED, ("HUBCAST_COMMANDS_PER_SECOND", "3"), ("HUBCAST_RATES_PER_ADDRESS", "1")]);
    let mut one = from(&gateway, "2001:db8:1:2::1").await;
    let mut two = from(&gateway, "2001:db8:1:2:ffff::2").await;
    let refusal = refused(&mut [&mut one, &mut two], &json!({"type": "ping"})).await;
    let message = "too many commands from this address";
    assert_eq!((&refusal["code"], &refusal["message"]), (&json!("rate_limited"), &json!(message)), "{refusal}");
    assert!((100..=2_001).contains(&refusal["retry_after_ms"].as_u64().unwrap()), "{refusal}");
    assert!(shared_limited(&gateway, "address", "commands").await >= 1.0);
    drop(two);
    stays_refused(&mut one, async || from(&gateway, "2001:db8:1:2::3").await, message).await;
    assert_eq!(ping(&mut from(&gateway, "2001:db8:1:3::1").await).await["type"], "pong");
    assert_eq!(metric(&gateway, r#"hubcast_connections_closed_total{reason="rate_limited"}"#).await, 0.0);
    eventually("a pong", async || (ping(&mut one).await["type"] == "pong").then_some(())).await;
    crate::observe::threat(46, "connections of one address share its rate, and so does who comes back");
}

/// A user is one, from whatever address and however the token is shown; ?user= without a token is nobody's.
#[tokio::test(flavor = "multi_thread")]
async fn connections_of_a_user_share_its_commands() {
    let env = [("HUBCAST_COMMANDS_PER_SECOND", "40"), ("HUBCAST_RATES_PER_USER", "1")];
    let gateway = gateway(&[&JWT[..], &env].concat());
    let mut one = of(&gateway, "alice").await;
    let mut two = Client::connect(&gateway).await;
    let shown = answer(&mut two, &json!({"type": "auth", "token": token(json!({"sub": "alice"}))})).await;
    assert_eq!(shown["user"], "alice");
    // The first has only what the second leaves: 80 at once for both.
    for _ in 0..10 {
        assert_eq!(ping(&mut two).await["type"], "pong");
    }
    let refusal = refused(&mut [&mut one], &json!({"type": "ping"})).await;
    let message = "too many commands of this user";
    assert_eq!((&refusal["code"], &refusal["message"]), (&json!("rate_limited"), &json!(message)), "{refusal}");
    assert!(shared_limited(&gateway, "user", "commands").await >= 1.0);
    assert_eq!(ping(&mut of(&gateway, "bob").await).await["type"], "pong");
    drop(two);
    eventually("a refusal after coming back", async || {
        refused(&mut [&mut one], &json!({"type": "ping"})).await;
        (ping(&mut of(&gateway, "alice").await).await["message"] == message).then_some(())
    })
    .await;
}

/// Publishes and bytes are shared as commands are: here by all of the instance, and of an address.
#[tokio::test(flavor = "multi_thread")]
async fn publishes_and_bytes_are_shared_too() {
    let limited = gateway(&[PROXIED, ("HUBCAST_PUBLISHES_PER_SECOND", "2"), ("HUBCAST_RATES_PER_INSTANCE", "1")]);
    let (mut one, mut two) = (from(&limited, "192.0.2.1").await, from(&limited, "192.0.2.2").await);
    let publish = json!({"type": "publish", "id": 1, "channel": "a", "data": 1});
    let refusal = refused(&mut [&mut one, &mut two], &publish).await;
    assert_eq!(refusal["message"], "too many publishes on this instance", "{refusal}");
    assert_eq!(ping(&mut two).await["type"], "pong", "commands are counted by themselves");

    let limited = gateway(&[PROXIED, ("HUBCAST_BYTES_PER_SECOND", "4KiB"), ("HUBCAST_RATES_PER_ADDRESS", "1")]);
    let padded = json!({"type": "ping", "padding": "x".repeat(3_000)});
    let mut crowd = Vec::new();
    eventually("bytes to wait", async || {
        let mut client = from(&limited, "192.0.2.1").await;
        client.send(&padded).await;
        crowd.push(client);
        (shared_limited(&limited, "address", "bytes").await >= 1.0).then_some(())
    })
    .await;
    for client in &mut crowd {
        client.expect(&json!({"type": "pong"})).await;
    }
    assert_eq!(metric(&limited, r#"hubcast_limited_total{limit="bytes"}"#).await, 0.0, "none did too much by itself");
}

/// Subscriptions are counted over all connections that share: the last one too many is refused, what somebody leaves is
/// free for the others.
#[tokio::test(flavor = "multi_thread")]
async fn subscriptions_are_counted_together() {
    let env = [
        ("HUBCAST_CHANNEL_RULES", r#"[{"match":"*","access":"public"}]"#),
        ("HUBCAST_SUBSCRIPTIONS_PER_USER", "2"),
        ("HUBCAST_SUBSCRIPTIONS_PER_INSTANCE", "4"),
    ];
    let gateway = gateway(&[&JWT[..], &env].concat());
    let mut alice = [of(&gateway, "alice").await, of(&gateway, "alice").await];
    let subscribe = |channel: &str| json!({"type": "subscribe", "channel": channel});
    for client in &mut alice {
        assert_eq!(answer(client, &subscribe("a")).await["type"], "subscribed");
    }
    let refusal = answer(&mut alice[1], &subscribe("b")).await;
    assert_eq!((&refusal["code"], &refusal["channel"]), (&json!("limit_exceeded"), &json!("b")), "{refusal}");
    assert_eq!(refusal["message"], "too many subscriptions of this user");
    assert_eq!(answer(&mut alice[1], &subscribe("a")).await["type"], "subscribed", "a repeat is no other one");
    let (mut bob, mut carol) = (of(&gateway, "bob").await, of(&gateway, "carol").await);
    for channel in ["a", "b"] {
        assert_eq!(answer(&mut bob, &subscribe(channel)).await["type"], "subscribed");
    }
    assert_eq!(answer(&mut carol, &subscribe("a")).await["message"], "too many subscriptions on this instance");
    assert_eq!(shared_limited(&gateway, "user", "subscriptions").await, 1.0);
    assert_eq!(shared_limited(&gateway, "instance", "subscriptions").await, 1.0);
    let [one, mut two] = alice;
    drop(one);
    eventually("a free subscription", async || {
        (answer(&mut two, &subscribe("b")).await["type"] == "subscribed").then_some(())
    })
    .await;
}

/// A handshake from a local address that no proxy tells.
async fn knock(gateway: &Gateway, source: [u8; 4]) -> Raw {
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(4096).unwrap();
    socket.bind((Ipv4Addr::from(source), 0).into()).unwrap();
    let mut raw = Raw { socket: socket.connect(gateway.addr()).await.unwrap() };
    raw.send(format!("GET /ws HTTP/1.1\r\n{HANDSHAKE}").as_bytes()).await;
    assert!(raw.head().await.starts_with("HTTP/1.1 101"));
    raw
}

/// Parts of messages count together: whoever adds to what is too much for his address has to go, and nobody elsewhere.
#[tokio::test(flavor = "multi_thread")]
async fn an_address_has_so_much_arriving() {
    let gateway = gateway(&[("HUBCAST_MEMORY_PER_ADDRESS", "40KiB")]);
    let message = masked(0x81, &[b' '; 30_000]);
    let part = &message[..message.len() - 1];
    let mut first = knock(&gateway, [127, 0, 0, 2]).await;
    first.send(part).await;
    let mut elsewhere = knock(&gateway, [127, 0, 0, 3]).await;
    elsewhere.send(part).await;
    let mut second = knock(&gateway, [127, 0, 0, 2]).await;
    second.send(part).await;
    let (code, reason) = tokio::select! {
        closed = first.close_frame() => closed,
        closed = second.close_frame() => closed,
    };
    assert_eq!((code, reason.as_str()), (1013, "too much at once from this address, come back later"));
    assert_eq!(shared_limited(&gateway, "address", "memory").await, 1.0);
    elsewhere.send(&message[message.len() - 1..]).await;
    let frames = async {
        while elsewhere.frame().await.expect("it stays").payload.windows(11).all(|it| it != b"bad_request") {}
    };
    frames.await;
}

/// What waits for those of one address who do not read counts together too: the slowest goes, and nobody elsewhere.
#[tokio::test(flavor = "multi_thread")]
async fn an_address_has_so_much_waiting() {
    let gateway = gateway(&[
        ("HUBCAST_MEMORY_PER_ADDRESS", "1500KiB"),
        ("HUBCAST_CHANNEL_RULES", r#"[{"match":"*","slow":"drop_oldest"}]"#),
    ]);
    let mut stalled = Vec::new();
    for host in [2, 2, 3] {
        let mut raw = knock(&gateway, [127, 0, 0, host]).await;
        raw.send(&masked(0x81, br#"{"type":"subscribe","channel":"a"}"#)).await;
        stalled.push(raw);
    }
    await_metric(&gateway, "hubcast_subscriptions", 3.0).await;
    let payload = vec![b'x'; 200_000];
    eventually("too much to wait", async || {
        publish(&gateway, "a", &payload).await;
        (shared_limited(&gateway, "address", "memory").await >= 1.0).then_some(())
    })
    .await;
    // The other two have a mebibyte each, in which the oldest go.
    for _ in 0..20 {
        publish(&gateway, "a", &payload).await;
    }
    assert_eq!(metric(&gateway, r#"hubcast_connections_closed_total{reason="slow_consumer"}"#).await, 0.0);
    await_metric(&gateway, r#"hubcast_connections_closed_total{reason="overload"}"#, 1.0).await;
    assert_eq!(shared_limited(&gateway, "address", "memory").await, 1.0);
}

fn bounds() -> Bounds {
    let second = Duration::from_secs(1);
    Bounds {
        scope: Scope::Address,
        commands: Rate::new(10, second, second * 100),
        publishes: Rate::UNLIMITED,
        bytes: Rate::UNLIMITED,
        subscriptions_max: 0,
        memory_max: 0,
    }
}

/// A tab outlives its connections as long as something is on it, and no longer; in a full table strangers have none.
#[test]
fn a_tab_is_kept_while_it_is_owed() {
    let guests = Guests::new(0, Rate::UNLIMITED, Some(bounds()));
    let share = |stay: &Stay<u32>| stay.tab().map(Share::new);
    let now_us = clock::now_us();
    let enter = |key: u32| guests.enter(&key, now_us).unwrap();
    drop(enter(1));
    assert!(guests.is_empty(), "nothing was done");
    let stay = enter(1);
    assert_eq!(share(&stay).unwrap().commands(1_000, now_us), Ok(()));
    drop(stay);
    assert_eq!(guests.len(), 1);
    let stay = enter(1);
    assert_eq!(share(&stay).unwrap().commands(20, now_us), Err(Duration::from_secs(2)));
    // Who is refused takes nothing: the next one that is there is there for anybody.
    assert_eq!(share(&enter(1)).unwrap().commands(20, now_us + 2_000_000), Ok(()));
    assert_eq!(share(&enter(2)).unwrap().commands(1, now_us), Ok(()));
    let stays: Vec<_> = (10..STRANGERS_MAX as u32 + 10).map(enter).collect();
    for stay in &stays {
        assert_eq!(share(stay).unwrap().commands(1_000, now_us), Ok(()));
    }
    drop(stays);
    assert!(guests.len() >= STRANGERS_MAX);
    assert!(share(&enter(9)).is_none(), "let in, and not counted");
    drop(guests.enter(&9, now_us + 200_000_000).unwrap());
    assert!(guests.len() < 10, "the others are forgotten");
}
