//! Tokens that nobody signed, that say too much or too little, or whose time is over (threat rows 16 to 19, 21 to 23, 45).

use std::time::{Duration, Instant};

use jsonwebtoken::{Algorithm, EncodingKey, Header};
use serde_json::{Value, json};
use tokio_tungstenite::tungstenite::Error;

use crate::harness::{Client, eventually, metric, publish};
use crate::hostile::target::Target;
use crate::issuer::{self, ISSUER, Publisher, RSA_PUBLIC, SECRET, now_s, token};
use crate::observe;

const TEXT: &str = "a valid token is needed";
const CANARY_KEY: &str = "canary of another 32 bytes or so, at least";

async fn start(env: &[(&str, &str)]) -> Target {
    let jwt = [("HUBCAST_AUTH", "jwt"), ("HUBCAST_JWT_SECRET", SECRET), ("HUBCAST_JWT_PUBLIC_KEY", RSA_PUBLIC)];
    Target::start(&[&jwt, env].concat()).await
}

fn closed(reason: &str) -> String {
    format!("hubcast_connections_closed_total{{reason=\"{reason}\"}}")
}

/// What the handshake is answered, and the text of a refusal.
async fn handshake(target: &Target, token: &str) -> (u16, String) {
    let bearer = format!("Bearer {token}");
    match Client::try_open_with(target, "/ws", &[("authorization", &bearer)]).await {
        Ok(_) => (101, String::new()),
        Err(Error::Http(response)) => {
            let body: Value = serde_json::from_slice(response.body().as_deref().unwrap()).unwrap();
            (response.status().as_u16(), body["error"]["message"].as_str().unwrap().to_owned())
        }
        Err(other) => panic!("{other}"),
    }
}

/// The same by a command: the error's code, and the close frame.
async fn in_band(target: &Target, token: &str) -> (String, (u16, String)) {
    let mut client = Client::connect(target).await;
    client.send(&json!({"type": "auth", "token": token, "id": 1})).await;
    let answer = client.json().await;
    assert_eq!(answer["id"], 1);
    (answer["code"].as_str().unwrap_or_default().to_owned(), client.close_frame().await)
}

/// Tokens that nobody may take, each with the row of the table.
fn corpus() -> Vec<(u32, &'static str, String)> {
    let secret = EncodingKey::from_secret(SECRET.as_bytes()).unwrap();
    let hs = Header::new(Algorithm::HS256);
    let good = json!({"exp": now_s() + 60, "sub": "mallory", "iss": ISSUER});
    let with = |claim: &str, value: Value| {
        let mut claims = good.clone();
        claims[claim] = value;
        issuer::signed(&hs, &claims, &secret)
    };
    let raw_claims = |claims: &str| {
        let unsigned = issuer::forged(&json!({"alg": "HS256", "typ": "JWT"}), claims, "");
        let message = unsigned.trim_end_matches('.');
        format!("{message}.{}", jsonwebtoken::crypto::sign(message.as_bytes(), &secret, Algorithm::HS256).unwrap())
    };
    let claims = good.to_string();
    let other = EncodingKey::from_secret(CANARY_KEY.as_bytes()).unwrap();
    let public_as_secret = EncodingKey::from_secret(RSA_PUBLIC.as_bytes()).unwrap();
    let signed = issuer::signed(&hs, &good, &secret);
    let (head, signature) = signed.rsplit_once('.').unwrap();
    let crit = Header { crit: Some(vec!["exp2".to_owned()]), ..hs.clone() };
    let max =
        issuer::signed(&hs, &json!({"exp": now_s() + 60, "iss": ISSUER, "subscribe": ["x".repeat(9000)]}), &secret);
    vec![
        (16, "no token", "canary".to_owned()),
        (16, "four parts", format!("{signed}.x")),
        (16, "no signature", format!("{head}.")),
        (16, "another's signature", issuer::signed(&hs, &good, &other)),
        (16, "a signature cut short", format!("{head}.{}", &signature[..20])),
        (16, "claims of somebody else", {
            let (header, _) = head.split_once('.').unwrap();
            let forged = issuer::forged(
                &json!({}),
                &json!({"exp": now_s() + 60, "sub": "admin", "iss": ISSUER}).to_string(),
                signature,
            );
            format!("{header}.{}", forged.split_once('.').unwrap().1)
        }),
        (16, "above 8 KiB", max),
        (17, "alg none", issuer::forged(&json!({"alg": "none"}), &claims, "")),
        (17, "alg None", issuer::forged(&json!({"alg": "None", "typ": "JWT"}), &claims, "AA")),
        (17, "no alg", issuer::forged(&json!({"typ": "JWT"}), &claims, signature)),
        (17, "HS256 by the RSA key as secret", issuer::signed(&hs, &good, &public_as_secret)),
        (17, "HS512", issuer::signed(&Header::new(Algorithm::HS512), &good, &secret)),
        (17, "RS256 with a signature of HS256", issuer::forged(&json!({"alg": "RS256"}), &claims, signature)),
        (17, "crit", issuer::signed(&crit, &good, &secret)),
        (17, "b64 false", issuer::forged(&json!({"alg": "HS256", "b64": false, "crit": ["b64"]}), &claims, signature)),
        (18, "no exp", issuer::signed(&hs, &json!({"sub": "mallory", "iss": ISSUER}), &secret)),
        (18, "exp over", with("exp", json!(now_s() - 1))),
        (18, "exp as text", with("exp", json!((now_s() + 60).to_string()))),
        (18, "exp null", with("exp", Value::Null)),
        (18, "exp negative", with("exp", json!(-1))),
        (18, "exp in a list", with("exp", json!([now_s() + 60]))),
        (18, "exp in the year 9999", with("exp", json!(253_402_300_799_u64))),
        (18, "exp 1e300", with("exp", json!(1e300))),
        (18, "exp 1e999", raw_claims(r#"{"exp":1e999,"iss":"https://issuer.example"}"#)),
        (18, "exp NaN", raw_claims(r#"{"exp":NaN,"iss":"https://issuer.example"}"#)),
        (18, "exp twice", raw_claims(&format!(r#"{{"iss":"https://issuer.example","exp":1,"exp":{}}}"#, now_s() + 60))),
        (18, "nbf in an hour", with("nbf", json!(now_s() + 3600))),
        (18, "another issuer", with("iss", json!("https://evil.example"))),
        (18, "sub with a line feed", with("sub", json!("a\nb"))),
        (18, "sub of 129 bytes", with("sub", json!("a".repeat(129)))),
        (18, "sub that is a number", with("sub", json!(1))),
        (18, "capabilities that are no list", with("subscribe", json!("*"))),
        (18, "a pattern with a * within", with("subscribe", json!(["a*b"]))),
        (18, "a pattern with {sub}", with("subscribe", json!(["user:{sub}:*"]))),
    ]
}

/// One answer for all of them, in the handshake and by a command, whatever is wrong: 401, or `unauthorized` and 3000.
#[tokio::test(flavor = "multi_thread")]
async fn forged_tokens_are_refused_alike() {
    let mut target = start(&[("HUBCAST_JWT_ISSUER", ISSUER)]).await;
    // Taken, so that what follows is refused for what it has wrong and nothing else.
    assert_eq!(handshake(&target, &token(json!({}))).await.0, 101);
    let mut refused = 0.0;
    for (row, what, token) in corpus() {
        assert_eq!(handshake(&target, &token).await, (401, TEXT.to_owned()), "{what}");
        let (code, close) = in_band(&target, &token).await;
        assert_eq!(
            (code.as_str(), close.0, close.1.as_str()),
            ("unauthorized", 3000, "the token is not valid"),
            "{what}"
        );
        refused += 1.0;
        observe::threat(row, format!("{what}: 401; in band unauthorized, 3000"));
    }
    target.await_growth(&closed("unauthorized"), 0.0, refused).await;
    let by_reason = ["malformed", "unknown_key", "signature", "expired", "claims"];
    let mut counted = 0.0;
    for reason in by_reason {
        let count = metric(&target, &format!(r#"hubcast_authentications_total{{result="{reason}"}}"#)).await;
        assert!(count > 0.0, "{reason}");
        counted += count;
    }
    assert_eq!(counted, 2.0 * refused);
    target.assert_unharmed().await;
}

/// Tokens and keys, good and bad ones, however they come: a log of text tells none of them either.
#[tokio::test(flavor = "multi_thread")]
async fn a_log_of_text_tells_no_secret() {
    let env = [("HUBCAST_LOG_FORMAT", "text"), ("HUBCAST_LOG", "trace"), ("HUBCAST_API_KEYS", "canary-key")];
    let jwt = [("HUBCAST_AUTH", "jwt"), ("HUBCAST_JWT_SECRET", SECRET)];
    let mut target = Target::start_with_key(&[&env[..], &jwt].concat(), "canary-key").await;
    let good = token(json!({"sub": "somebody", "jti": "1"}));
    let bad = [format!("{good}canary"), "canary".to_owned(), format!("{good}.canary")];
    for token in bad.iter().chain([&good]) {
        observe::secret(token);
        handshake(&target, token).await;
        let query = format!("/ws?token={token}&canary=canary");
        drop(Client::try_open_with(&target, &query, &[("user-agent", "canary")]).await);
        in_band_or_not(&target, token).await;
        let header = format!("Authorization: Bearer {token}\r\n");
        crate::harness::http(&target, "POST /api/publish/c?key=canary", &header, b"canary").await;
    }
    eventually("all to have left", async || (metric(&target, "hubcast_connections").await == 1.0).then_some(())).await;
    let log = target.binary.log();
    assert!(log.lines().count() > bad.len(), "it has something to tell: {log}");
    for secret in bad.iter().chain([&good]).map(String::as_str).chain([observe::CANARY]) {
        assert!(!log.contains(secret), "the log tells {secret}");
    }
    target.assert_unharmed().await;
}

/// The same by a command, whatever the answer.
async fn in_band_or_not(target: &Target, token: &str) {
    let mut client = Client::connect(target).await;
    client.send(&json!({"type": "auth", "token": token})).await;
    client.json().await;
}

/// A token that says where its key is: nobody goes there.
#[tokio::test(flavor = "multi_thread")]
async fn a_token_cannot_name_its_own_key() {
    let mut target = start(&[]).await;
    let pair = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap();
    let evil = Publisher::start(json!({"keys": [issuer::jwk("evil", &pair)]})).await;
    let key = EncodingKey::from_ec_pem(pair.serialize_pem().as_bytes()).unwrap();
    let header = Header::new(Algorithm::ES256);
    let jwk = serde_json::from_value(issuer::jwk("evil", &pair)).unwrap();
    let headers = [
        ("jku", Header { jku: Some(evil.url()), kid: Some("evil".to_owned()), ..header.clone() }),
        ("x5u", Header { x5u: Some(evil.url()), ..header.clone() }),
        ("jwk", Header { jwk: Some(jwk), ..header.clone() }),
        ("kid as an address", Header { kid: Some(evil.url()), ..header }),
    ];
    for (what, header) in headers {
        let claims = json!({"exp": now_s() + 60, "iss": format!("http://{}", evil.addr)});
        let token = issuer::signed(&header, &claims, &key);
        assert_eq!(handshake(&target, &token).await, (401, TEXT.to_owned()), "{what}");
    }
    assert_eq!(evil.asked(), 0);
    observe::threat(19, "jku, x5u, jwk, kid, iss: 401, and nobody asked the address that they name");
    target.assert_unharmed().await;
}

/// Within a second of `exp` it is over, and nothing that is published afterwards arrives.
#[tokio::test(flavor = "multi_thread")]
async fn a_token_expires_while_connected() {
    let mut target = start(&[]).await;
    let exp = now_s() + 2;
    let path = format!("/ws?channels=c&token={}", token(json!({"exp": exp, "subscribe": ["c"]})));
    let mut client = Client::open(&target, &path, None).await;
    assert_eq!(client.json().await["type"], "welcome");
    client.expect(&json!({"type": "subscribed", "channel": "c"})).await;
    publish(&target, "c", b"\"in time\"").await;
    assert_eq!(client.json().await["data"], "in time");
    assert_eq!(client.close_frame().await, (3000, "token expired".to_owned()));
    assert!((exp..=exp + 1).contains(&now_s()), "it ended at the wrong time");
    let over = Instant::now();
    publish(&target, "c", b"\"too late\"").await;
    client.finish().await;
    assert!(over.elapsed() < Duration::from_secs(5));
    target.await_growth(&closed("token_expired"), 0.0, 1.0).await;
    observe::threat(21, "3000 within a second of exp, and what was published then did not arrive");
    target.assert_unharmed().await;
}

/// Connections that never say who they are: they can do nothing, their number is bounded, and they end.
#[tokio::test(flavor = "multi_thread")]
async fn strangers_do_not_stay() {
    let mut target = start(&[("HUBCAST_HANDSHAKE_TIMEOUT", "1s"), ("HUBCAST_HANDSHAKES_PENDING_MAX", "5")]).await;
    let started = Instant::now();
    let mut strangers = Vec::new();
    for _ in 0..5 {
        strangers.push(Client::connect(&target).await);
    }
    // Their places are those of handshakes: one more has to come later.
    let full = Client::try_open_with(&target, "/ws", &[]).await.err().expect("there is no place");
    assert!(matches!(full, Error::Http(ref response) if response.status() == 503), "{full}");
    for command in [
        json!({"type": "subscribe", "channel": "neighbours"}),
        json!({"type": "publish", "channel": "neighbours", "data": "x", "id": 1}),
        json!({"type": "history", "channel": "neighbours"}),
        json!({"type": "presence", "channel": "neighbours"}),
        json!({"type": "unsubscribe", "channel": "neighbours"}),
    ] {
        strangers[0].send(&command).await;
        assert_eq!(strangers[0].json().await["code"], "unauthorized", "{command}");
    }
    observe::threat(45, "each command before authentication: unauthorized");
    for stranger in &mut strangers {
        assert_eq!(stranger.close_frame().await, (3008, "no authentication in time".to_owned()));
    }
    assert!((900..5_000).contains(&started.elapsed().as_millis()), "{:?}", started.elapsed());
    observe::threat(22, "3008 at the handshake timeout; until then a place of a handshake, and no command");
    drop(strangers);
    target.await_growth(&closed("auth_timeout"), 0.0, 5.0).await;
    eventually("their places", async || Client::try_open_with(&target, "/ws", &[]).await.ok()).await;
    target.assert_unharmed().await;
}

/// Refused alike, be there somebody in the channel or not.
#[tokio::test(flavor = "multi_thread")]
async fn a_refusal_does_not_tell_whether_the_channel_exists() {
    let mut target = start(&[]).await;
    let path = format!("/ws?token={}", token(json!({"sub": "mallory", "subscribe": ["mine"]})));
    let mut client = Client::open(&target, &path, None).await;
    assert_eq!(client.json().await["type"], "welcome");
    for kind in ["subscribe", "publish", "history", "presence"] {
        let mut answers = Vec::new();
        for channel in ["neighbours", "neighbourz"] {
            client.send(&json!({"type": kind, "channel": channel, "data": 1, "id": 1})).await;
            answers.push(client.text().await.replace(channel, "?"));
        }
        assert_eq!(answers[0], answers[1]);
        assert!(answers[0].contains("forbidden"), "{}", answers[0]);
    }
    client.send(&json!({"type": "subscribe", "channel": "mine"})).await;
    client.expect(&json!({"type": "subscribed", "channel": "mine"})).await;
    observe::threat(23, "forbidden, byte for byte the same whether the channel exists; it stays open");
    drop(client);
    target.assert_unharmed().await;
}
