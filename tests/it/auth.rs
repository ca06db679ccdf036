//! Who connects, and what it may do: tokens, keys, capabilities, rules, revocation.

use std::time::Duration;

use hubcast::gateway::Gateway;
use jsonwebtoken::Algorithm;
use rcgen::KeyPair;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::harness::{
    Client, Redis, await_metric, eventually, gateway, gateway_with, http, metric, publish, ready, soon,
};
use crate::issuer::{self, Publisher, RSA_PRIVATE, RSA_PUBLIC, SECRET, now_s, token};

const JWT: (&str, &str) = ("HUBCAST_AUTH", "jwt");
const KEY: (&str, &str) = ("HUBCAST_JWT_SECRET", SECRET);

/// A gateway that takes [`token`]s.
fn guarded(env: &[(&str, &str)]) -> Gateway {
    gateway(&[&[JWT, KEY], env].concat())
}

async fn status(gateway: &Gateway, path: &str, headers: &[(&'static str, &str)]) -> u16 {
    match Client::try_open_with(gateway, path, headers).await {
        Ok(_) => 101,
        Err(tokio_tungstenite::tungstenite::Error::Http(response)) => response.status().as_u16(),
        Err(other) => panic!("{other}"),
    }
}

async fn by_query(gateway: &Gateway, token: &str) -> u16 {
    status(gateway, &format!("/ws?token={token}"), &[]).await
}

/// A client that has shown its token in the handshake, and its welcome.
async fn shown(gateway: &Gateway, claims: Value) -> (Client, Value) {
    let mut client = Client::open(gateway, &format!("/ws?token={}", token(claims)), None).await;
    let welcome = client.json().await;
    (client, welcome)
}

async fn answer(client: &mut Client, command: Value) -> Value {
    client.send(&command).await;
    client.json().await
}

async fn code(client: &mut Client, command: Value) -> String {
    let answer = answer(client, command).await;
    answer["code"].as_str().or_else(|| answer["type"].as_str()).unwrap().to_owned()
}

/// In the header, in the query, or by the first command: it is known whose connection it is, and until when.
#[tokio::test(flavor = "multi_thread")]
async fn a_token_comes_in_three_ways() {
    let gateway = guarded(&[]);
    let claims = json!({"sub": "alice", "subscribe": ["news"]});
    let bearer = format!("Bearer {}", token(claims.clone()));
    let mut header =
        Client::try_open_with(&gateway, "/ws?channels=news", &[("authorization", bearer.as_str())]).await.unwrap();
    let welcome = header.json().await;
    assert_eq!((&welcome["authenticated"], &welcome["user"]), (&json!(true), &json!("alice")), "{welcome}");
    assert!((3_590_000..=3_600_000).contains(&welcome["expires_in_ms"].as_u64().unwrap()), "{welcome}");
    header.expect(&json!({"type": "subscribed", "channel": "news"})).await;

    let (mut query, welcome) = shown(&gateway, claims.clone()).await;
    assert_eq!(welcome["user"], "alice");
    assert_eq!(code(&mut query, json!({"type": "subscribe", "channel": "news"})).await, "subscribed");

    // By a command: what the handshake asked for follows it.
    let mut command = Client::open(&gateway, "/ws?channels=news,secret", None).await;
    let welcome = command.json().await;
    assert_eq!(welcome["authenticated"], false, "{welcome}");
    assert!(welcome.get("user").is_none());
    for early in [
        json!({"type": "subscribe", "channel": "news"}),
        json!({"type": "publish", "channel": "news", "data": 1, "id": 1}),
        json!({"type": "history", "channel": "news"}),
        json!({"type": "presence", "channel": "news"}),
        json!({"type": "unsubscribe", "channel": "news"}),
    ] {
        assert_eq!(code(&mut command, early).await, "unauthorized");
    }
    assert_eq!(code(&mut command, json!({"type": "ping"})).await, "pong");
    let reply = answer(&mut command, json!({"type": "auth", "token": token(claims), "id": "a"})).await;
    assert_eq!((&reply["type"], &reply["id"], &reply["user"]), (&json!("authenticated"), &json!("a"), &json!("alice")));
    command.expect(&json!({"type": "subscribed", "channel": "news"})).await;
    let refused = command.json().await;
    assert_eq!((&refused["code"], &refused["channel"]), (&json!("forbidden"), &json!("secret")));

    let list = http(&gateway, "GET /api/connections?user=alice", "", b"").await.json();
    assert_eq!(list["connections"].as_array().unwrap().len(), 3, "{list}");
    publish(&gateway, "news", b"1").await;
    for client in [&mut header, &mut query, &mut command] {
        client.expect(&json!({"type": "event", "channel": "news", "data": 1})).await;
    }
    // Nobody says himself who he is.
    assert_eq!(status(&gateway, "/ws?user=alice", &[]).await, 400);
    await_metric(&gateway, r#"hubcast_authentications_total{result="accepted"}"#, 3.0).await;
}

/// Where nobody has to show a token the same client works: its `auth` is answered, and means nothing.
#[tokio::test]
async fn without_authentication_a_token_is_not_looked_at() {
    let gateway = gateway(&[]);
    let mut client = Client::open(&gateway, "/ws?token=x&user=bob", None).await;
    assert!(client.json().await.get("authenticated").is_none());
    client.send(&json!({"type": "auth", "token": "x", "id": 1})).await;
    client.expect(&json!({"type": "authenticated", "id": 1})).await;
    assert_eq!(http(&gateway, "POST /api/revoke", "", br#"{"user":"bob"}"#).await.status, 400);
}

/// HMAC, RSA, EC and EdDSA: a token is taken by the key and algorithm that were configured, and by no other.
#[tokio::test(flavor = "multi_thread")]
async fn keys_of_every_kind_verify() {
    let pair = |algorithm| KeyPair::generate_for(algorithm).unwrap();
    let (p256, p384) = (pair(&rcgen::PKCS_ECDSA_P256_SHA256), pair(&rcgen::PKCS_ECDSA_P384_SHA384));
    let ed = pair(&rcgen::PKCS_ED25519);
    let public = [RSA_PUBLIC.to_owned(), p256.public_key_pem(), p384.public_key_pem(), ed.public_key_pem()];
    let private = [RSA_PRIVATE.to_owned(), p256.serialize_pem(), p384.serialize_pem(), ed.serialize_pem()];
    let kinds = [
        (0, None, Algorithm::RS256),
        (0, Some("RS512"), Algorithm::RS512),
        (0, Some("PS256"), Algorithm::PS256),
        (1, None, Algorithm::ES256),
        (2, None, Algorithm::ES384),
        (3, None, Algorithm::EdDSA),
    ];
    let claims = json!({"sub": "alice"});
    for (key, named, algorithm) in kinds {
        let mut env = vec![JWT, ("HUBCAST_JWT_PUBLIC_KEY", public[key].as_str())];
        env.extend(named.map(|named| ("HUBCAST_JWT_ALGORITHM", named)));
        let gateway = gateway(&env);
        for (other, _, tried) in kinds {
            let token = issuer::signed_by(&private[other], tried, None, claims.clone());
            let expected = if tried == algorithm { 101 } else { 401 };
            assert_eq!(by_query(&gateway, &token).await, expected, "{tried:?} at {algorithm:?}");
        }
        assert_eq!(by_query(&gateway, &token(claims.clone())).await, 401, "{algorithm:?}");
    }
    let gateway = guarded(&[("HUBCAST_JWT_PUBLIC_KEY", RSA_PUBLIC), ("HUBCAST_JWT_ALGORITHM", "HS512")]);
    let key = jsonwebtoken::EncodingKey::from_secret(SECRET.as_bytes()).unwrap();
    for (algorithm, expected) in [(Algorithm::HS512, 101), (Algorithm::HS256, 401), (Algorithm::HS384, 401)] {
        let header = jsonwebtoken::Header::new(algorithm);
        let token = issuer::signed(&header, &json!({"exp": now_s() + 60}), &key);
        assert_eq!(by_query(&gateway, &token).await, expected, "{algorithm:?}");
    }
    assert_eq!(by_query(&gateway, &issuer::signed_by(RSA_PRIVATE, Algorithm::RS256, None, claims)).await, 101);
}

/// What the token grants and what the channel's rule says decide together, for each command.
#[tokio::test(flavor = "multi_thread")]
async fn capabilities_and_rules_decide() {
    let rules = r#"[{"match":"lobby","access":"public","presence":true,"history":{"size":5,"ttl":"1m"}},
        {"match":"user:{sub}:*","presence":true,"client_publish":true},
        {"match":"chat:*","client_publish":true,"presence":true,"history":{"size":5,"ttl":"1m"}}]"#;
    let gateway = guarded(&[("HUBCAST_CHANNEL_RULES", rules)]);
    let claims = json!({"sub": "alice", "subscribe": ["chat:1", "news:*"], "publish": ["chat:1", "lobby", "user:*"],
        "presence": ["chat:1"], "history": ["chat:2"]});
    let (mut client, _) = shown(&gateway, claims).await;
    for (channel, subscribe, publish, presence, history) in [
        ("chat:1", true, true, true, false),
        ("chat:2", false, false, false, true),
        ("news:x", true, false, false, false),
        ("other", false, false, false, false),
        // Public: all may hear it and ask for it; whether clients publish is the rule's to say.
        ("lobby", true, false, true, true),
        ("user:alice:inbox", true, true, true, true),
        ("user:bob:inbox", false, true, false, false),
        ("user:alice", false, false, false, false),
        ("user::x", false, false, false, false),
    ] {
        let command = |kind: &str| json!({"type": kind, "channel": channel, "data": 1, "id": 1});
        for (kind, is_allowed) in
            [("subscribe", subscribe), ("publish", publish), ("presence", presence), ("history", history)]
        {
            client.send(&command(kind)).await;
            let mut answer = client.json().await;
            while answer["id"] != 1 {
                answer = client.json().await;
            }
            // Granted, and yet there is nothing to ask for.
            let has_none = (kind, channel) == ("history", "user:alice:inbox");
            assert_eq!(answer["code"] == "forbidden", !is_allowed || has_none, "{kind} {channel}: {answer}");
        }
    }
    assert!(metric(&gateway, r#"hubcast_forbidden_total{action="subscribe"}"#).await >= 4.0);
}

fn code_of(answer: &Value) -> String {
    answer["code"].as_str().or_else(|| answer["type"].as_str()).unwrap().to_owned()
}

/// A name ends before what follows `{sub}`: nobody gets at another's channels by a clever name.
#[tokio::test(flavor = "multi_thread")]
async fn nobody_owns_what_is_anothers() {
    let gateway = guarded(&[("HUBCAST_CHANNEL_RULES", r#"[{"match":"user:{sub}:*"},{"match":"box/{sub}"}]"#)]);
    for (user, channel, is_allowed) in [
        ("alice", "user:alice:x", true),
        ("alice:x", "user:alice:x:y", false),
        ("alice:x", "user:alice:x", false),
        ("ali", "user:alice:x", false),
        ("alice", "user:ali:x", false),
        ("", "user::x", false),
        ("a*", "user:a:x", false),
        ("alice:x", "box/alice:x", true),
        ("alice", "box/alice", true),
        ("alice", "box/alicex", false),
    ] {
        let (mut client, _) = shown(&gateway, json!({"sub": user})).await;
        let answer = code(&mut client, json!({"type": "subscribe", "channel": channel})).await;
        assert_eq!(answer == "subscribed", is_allowed, "{user:?} {channel}: {answer}");
    }
}

/// A token for one channel grants what the connection's does not, until it expires or is another's.
#[tokio::test(flavor = "multi_thread")]
async fn a_channels_own_token_grants_it_for_a_while() {
    let gateway = guarded(&[]);
    let (mut client, _) = shown(&gateway, json!({"sub": "alice"})).await;
    let of = |claims: Value| json!({"type": "subscribe", "channel": "room", "token": token(claims)});
    let room = json!(["room"]);
    assert_eq!(code(&mut client, of(json!({"subscribe": ["other"]}))).await, "forbidden");
    assert_eq!(code(&mut client, of(json!({"sub": "bob", "subscribe": room}))).await, "forbidden");
    assert_eq!(code(&mut client, of(json!({"subscribe": room, "exp": 1}))).await, "unauthorized");
    // In a batch, each with its own.
    let elements = json!([{"channel": "room", "token": token(json!({"sub": "alice", "subscribe": room, "publish": room,
        "exp": now_s() + 2}))}, "other"]);
    assert_eq!(code(&mut client, json!({"type": "subscribe", "channels": elements})).await, "subscribed");
    assert_eq!(code_of(&client.json().await), "forbidden");
    client.send(&json!({"type": "publish", "channel": "room", "data": 1, "id": 1})).await;
    let both = [code_of(&client.json().await), code_of(&client.json().await)];
    assert!(both.contains(&"published".to_owned()) && both.contains(&"event".to_owned()), "{both:?}");
    client.expect(&json!({"type": "unsubscribed", "channel": "room", "reason": "token_expired"})).await;
    assert_eq!(code(&mut client, json!({"type": "publish", "channel": "room", "data": 1})).await, "forbidden");
    // Leaving gives it up, too.
    assert_eq!(code(&mut client, of(json!({"subscribe": room}))).await, "subscribed");
    assert_eq!(code(&mut client, json!({"type": "unsubscribe", "channel": "room"})).await, "unsubscribed");
    assert_eq!(code(&mut client, json!({"type": "subscribe", "channel": "room"})).await, "forbidden");
}

/// A newer token takes the place of the older one: it lives longer, and what it does not grant any more ends.
#[tokio::test(flavor = "multi_thread")]
async fn a_token_is_refreshed_in_place() {
    let gateway = guarded(&[]);
    let (mut client, _) = shown(&gateway, json!({"sub": "alice", "subscribe": ["a", "b"], "exp": now_s() + 2})).await;
    for channel in ["a", "b"] {
        assert_eq!(code(&mut client, json!({"type": "subscribe", "channel": channel})).await, "subscribed");
    }
    let next = token(json!({"sub": "alice", "subscribe": ["a"], "publish": ["a"]}));
    assert_eq!(code(&mut client, json!({"type": "auth", "token": next})).await, "authenticated");
    client.expect(&json!({"type": "unsubscribed", "channel": "b", "reason": "forbidden"})).await;
    // Beyond the end of the first one.
    let deadline = now_s() + 4;
    eventually("the first token to be over", async || (now_s() >= deadline).then_some(())).await;
    client.send(&json!({"type": "publish", "channel": "a", "data": "still here"})).await;
    assert_eq!(client.json().await["data"], "still here");
    assert_eq!(code(&mut client, json!({"type": "auth", "token": token(json!({"sub": "bob"}))})).await, "unauthorized");
    assert_eq!(client.close_frame().await, (3000, "the token is another user's".to_owned()));
}

/// A user's connections are counted by the token, also where it comes by a command.
#[tokio::test(flavor = "multi_thread")]
async fn connections_of_a_user_are_counted_by_its_token() {
    let gateway = guarded(&[("HUBCAST_CONNECTIONS_PER_USER", "1")]);
    let (first, _) = shown(&gateway, json!({"sub": "alice"})).await;
    assert_eq!(by_query(&gateway, &token(json!({"sub": "alice"}))).await, 429);
    let mut second = Client::connect(&gateway).await;
    second.send(&json!({"type": "auth", "token": token(json!({"sub": "alice"}))})).await;
    assert_eq!(second.close_frame().await, (1013, "too many connections of this user".to_owned()));
    drop(first);
    eventually("the first one's place", async || {
        (by_query(&gateway, &token(json!({"sub": "alice"}))).await == 101).then_some(())
    })
    .await;
}

/// So is how often they come, from any address: whoever loops is sent away and told when to come, and nobody else is.
#[tokio::test(flavor = "multi_thread")]
async fn connections_of_a_user_in_a_short_time_are_counted_by_its_token() {
    let gateway = guarded(&[("HUBCAST_HANDSHAKES_PER_USER", "1")]);
    for _ in 0..2 {
        let (client, _) = shown(&gateway, json!({"sub": "alice"})).await;
        drop(client);
    }
    let mut by_command = Client::connect(&gateway).await;
    by_command.send(&json!({"type": "auth", "token": token(json!({"sub": "alice"}))})).await;
    let (code, reason) = by_command.close_frame().await;
    assert_eq!((code, reason.as_str()), (1013, "too many connections in a short time of this user"));
    assert_eq!(by_query(&gateway, &token(json!({"sub": "bob"}))).await, 101);
    assert_eq!(by_query(&gateway, &token(json!({"sub": "alice"}))).await, 429);
    assert!(metric(&gateway, r#"hubcast_connections_refused_total{reason="user_rate"}"#).await >= 1.0);
    eventually("a token of the bucket", async || {
        (by_query(&gateway, &token(json!({"sub": "alice"}))).await == 101).then_some(())
    })
    .await;
}

/// Over all instances, for those who come later, and for one that begins later.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_revoked_is_cut_everywhere() {
    let redis = Redis::start().await;
    let url = redis.url();
    let start = || guarded(&[("HUBCAST_REDIS_URL", &url)]);
    let (a, b) = (start(), start());
    ready(&a).await;
    ready(&b).await;
    eventually("both to know each other", async || {
        let list = http(&a, "GET /api/instances", "", b"").await.json();
        (list["instances"].as_array().map_or(0, Vec::len) == 2).then_some(())
    })
    .await;
    let old = json!({"sub": "alice", "iat": now_s() - 10});
    let (mut on_a, _) = shown(&a, old.clone()).await;
    let (mut on_b, _) = shown(&b, old.clone()).await;
    let (mut stolen, _) = shown(&b, json!({"sub": "bob", "jti": "t1"})).await;
    let (mut bystander, _) = shown(&b, json!({"sub": "bob", "jti": "t2"})).await;
    let (mut guest, _) = shown(&a, json!({"sub": "carol"})).await;
    let grant = token(json!({"jti": "g1", "subscribe": ["room"]}));
    assert_eq!(code(&mut guest, json!({"type": "subscribe", "channel": "room", "token": grant})).await, "subscribed");
    for (body, cut) in [(json!({"user": "alice"}), 2), (json!({"token_id": "t1"}), 1), (json!({"token_id": "g1"}), 0)] {
        let answer = http(&a, "POST /api/revoke", "", body.to_string().as_bytes()).await;
        assert_eq!((answer.status, answer.json()), (200, json!({"disconnected": cut})), "{body}");
    }
    for client in [&mut on_a, &mut on_b, &mut stolen] {
        assert_eq!(client.close_frame().await, (3000, "token revoked".to_owned()));
    }
    guest.expect(&json!({"type": "unsubscribed", "channel": "room", "reason": "token_expired"})).await;
    assert_eq!(code(&mut bystander, json!({"type": "ping"})).await, "pong");
    eventually("the revocations to be at Redis", async || {
        (redis.query::<usize>(&["ZCARD", "ws:revoked"]).await.unwrap() == 3).then_some(())
    })
    .await;
    assert!(redis.query::<i64>(&["TTL", "ws:revoked"]).await.unwrap() > 80_000);
    let later = start();
    ready(&later).await;
    await_metric(&later, "hubcast_revocations", 3.0).await;
    for gateway in [&a, &b, &later] {
        assert_eq!(by_query(gateway, &token(old.clone())).await, 401);
        assert_eq!(by_query(gateway, &token(json!({"sub": "bob", "jti": "t1"}))).await, 401);
        assert_eq!(by_query(gateway, &token(json!({"sub": "bob", "jti": "t2"}))).await, 101);
        // Signed after that, it is good again.
        assert_eq!(by_query(gateway, &token(json!({"sub": "alice", "iat": now_s() + 1}))).await, 101);
    }
    for body in ["{}", r#"{"user":"a","token_id":"b"}"#, r#"{"users":"a"}"#, "x"] {
        assert_eq!(http(&a, "POST /api/revoke", "", body.as_bytes()).await.status, 400, "{body}");
    }
}

/// Keys that the issuer publishes: none, some, others; and an address that fails keeps those that are known.
#[tokio::test(flavor = "multi_thread")]
async fn published_keys_are_followed() {
    let pair = || KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap();
    let (first, second, stranger) = (pair(), pair(), pair());
    let publisher = Publisher::start(json!({"keys": []})).await;
    let gateway = gateway(&[JWT, ("HUBCAST_JWKS_URL", &publisher.url())]);
    let signed = |pair: &KeyPair, kid: &str| {
        issuer::signed_by(&pair.serialize_pem(), Algorithm::ES256, Some(kid), json!({"sub": "alice"}))
    };
    // Nobody can be let in yet, and the gateway says so.
    eventually("it to have asked", async || (publisher.asked() > 0).then_some(())).await;
    let answer = http(&gateway, "GET /readyz", "", b"").await;
    assert_eq!((answer.status, &answer.json()["reasons"]), (503, &json!(["jwks"])));
    await_metric(&gateway, r#"hubcast_reload_failed{file="jwks"}"#, 1.0).await;
    let secret = json!({"kty": "oct", "kid": "s", "k": "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA", "alg": "HS256"});
    let other = json!({"kty": "EC", "crv": "secp256k1", "kid": "k", "x": "AA", "y": "AA"});
    publisher.answer(200, json!({"keys": [secret, other, issuer::jwk("one", &first)]}));
    ready(&gateway).await;
    assert_eq!(by_query(&gateway, &signed(&first, "one")).await, 101);
    assert_eq!(by_query(&gateway, &signed(&stranger, "one")).await, 401);
    assert_eq!(by_query(&gateway, &signed(&stranger, "s")).await, 401);
    // Strangers can name keys as they like: nobody is asked again so soon.
    let asked = publisher.asked();
    for kid in 0..20 {
        assert_eq!(by_query(&gateway, &signed(&stranger, &kid.to_string())).await, 401);
    }
    assert_eq!(publisher.asked(), asked);
    // A new key: the first token that names it has it fetched, whichever way it is shown.
    let gateway = gateway_with(&[JWT, ("HUBCAST_JWKS_URL", &publisher.url())], |config| {
        config.auth.jwt.as_mut().unwrap().learn_interval = Duration::ZERO;
    });
    ready(&gateway).await;
    let mut client = Client::connect(&gateway).await;
    publisher.answer(200, json!({"keys": [issuer::jwk("one", &first), issuer::jwk("two", &second)]}));
    client.send(&json!({"type": "auth", "token": signed(&second, "two")})).await;
    client.send(&json!({"type": "ping"})).await;
    assert_eq!(client.json().await["type"], "authenticated");
    assert_eq!(client.json().await["type"], "pong");
    publisher.answer(200, json!({"keys": [issuer::jwk("one", &first), issuer::jwk("three", &stranger)]}));
    assert_eq!(by_query(&gateway, &signed(&stranger, "three")).await, 101);
    publisher.answer(500, json!(null));
    assert_eq!(by_query(&gateway, &signed(&second, "two")).await, 401);
    assert_eq!(by_query(&gateway, &signed(&first, "one")).await, 101);
}

/// Keys in files are rotated without a restart, as those of the API.
#[tokio::test(flavor = "multi_thread")]
async fn keys_in_files_are_rotated() {
    let dir = TempDir::new().unwrap();
    let (secret, public) = (dir.path().join("secret"), dir.path().join("key.pem"));
    std::fs::write(&secret, format!("{SECRET}\n")).unwrap();
    std::fs::write(&public, RSA_PUBLIC).unwrap();
    let gateway = gateway(&[
        JWT,
        ("HUBCAST_JWT_SECRET", secret.to_str().unwrap()),
        ("HUBCAST_JWT_PUBLIC_KEY", &format!("file:{}", public.display())),
    ]);
    let rsa = issuer::signed_by(RSA_PRIVATE, Algorithm::RS256, None, json!({}));
    assert_eq!(by_query(&gateway, &token(json!({}))).await, 101);
    assert_eq!(by_query(&gateway, &rsa).await, 101);
    std::fs::write(&secret, "another secret of more than 32 bytes").unwrap();
    await_metric(&gateway, r#"hubcast_reloads_total{file="jwt_keys"}"#, 1.0).await;
    assert_eq!(by_query(&gateway, &token(json!({}))).await, 401);
    std::fs::write(&public, "no key").unwrap();
    await_metric(&gateway, r#"hubcast_reload_failed{file="jwt_keys"}"#, 1.0).await;
    assert_eq!(by_query(&gateway, &rsa).await, 101);
}

/// Raw mode has no way to show a token later, nor to be told what is wrong.
#[tokio::test(flavor = "multi_thread")]
async fn raw_mode_needs_its_token_at_once() {
    let gateway = guarded(&[]);
    let raw = [("sec-websocket-protocol", "hubcast.raw.v1")];
    let token = token(json!({"subscribe": ["x"]}));
    for (path, expected) in [
        ("/ws?channel=x".to_owned(), 401),
        (format!("/ws?channel=y&token={token}"), 403),
        (format!("/ws?channel=x&token={token}"), 101),
    ] {
        assert_eq!(status(&gateway, &path, &raw).await, expected, "{path}");
    }
    for why in ["unauthorized", "forbidden"] {
        await_metric(&gateway, &format!(r#"hubcast_connections_refused_total{{reason="{why}"}}"#), 1.0).await;
    }
}

/// Presence knows users by their tokens.
#[tokio::test(flavor = "multi_thread")]
async fn presence_is_of_those_whom_tokens_name() {
    let rules = r#"[{"match":"c","access":"public","presence":true}]"#;
    let env = [JWT, KEY, ("HUBCAST_CHANNEL_RULES", rules)];
    let gateway = gateway_with(&env, |config| config.presence_debounce = Duration::from_millis(10));
    let mut alice = Client::connect(&gateway).await;
    alice
        .send(
            &json!([{"type": "auth", "token": token(json!({"sub": "alice"}))}, {"type": "subscribe", "channel": "c"}]),
        )
        .await;
    assert_eq!(alice.json().await["type"], "authenticated");
    alice.expect(&json!({"type": "subscribed", "channel": "c"})).await;
    alice.expect(&json!({"type": "join", "channel": "c", "user": "alice"})).await;
    let members = soon("an answer", answer(&mut alice, json!({"type": "presence", "channel": "c"}))).await;
    assert_eq!(members["members"][0]["user"], "alice", "{members}");
}
