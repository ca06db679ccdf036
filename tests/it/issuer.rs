//! Somebody who signs tokens, with keys of every kind, and who publishes them at an address.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use base64::Engine as _;
use base64::prelude::BASE64_URL_SAFE_NO_PAD as BASE64;
use jsonwebtoken::{Algorithm, EncodingKey, Header};
use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

use crate::observe;

/// Every secret of the tests has the word in it that no log may have.
pub const SECRET: &str = "canary canary canary canary canary 1";

pub const ISSUER: &str = "https://issuer.example";

pub const RSA_PRIVATE: &str = include_str!("../keys/rsa_private.pem");
pub const RSA_PUBLIC: &str = include_str!("../keys/rsa_public.pem");

pub fn now_s() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs()
}

/// The claims, with an `exp` in an hour, an `iat` of now and [`ISSUER`] unless they say otherwise.
fn completed(mut claims: Value) -> Value {
    for (claim, value) in [("exp", json!(now_s() + 3600)), ("iat", json!(now_s())), ("iss", json!(ISSUER))] {
        if claims.get(claim).is_none() {
            claims[claim] = value;
        }
    }
    claims
}

/// A token that gateways with [`SECRET`] take.
pub fn token(claims: Value) -> String {
    signed(&Header::new(Algorithm::HS256), &completed(claims), &EncodingKey::from_secret(SECRET.as_bytes()).unwrap())
}

/// A token with just these header, claims and key; no log may have it.
pub fn signed(header: &Header, claims: &Value, key: &EncodingKey) -> String {
    let token = jsonwebtoken::encode(header, claims, key).unwrap();
    observe::secret(&token);
    token
}

/// A token signed with a private key in PEM.
pub fn signed_by(private_pem: &str, algorithm: Algorithm, kid: Option<&str>, claims: Value) -> String {
    let pem = private_pem.as_bytes();
    let key = match algorithm {
        Algorithm::ES256 | Algorithm::ES384 => EncodingKey::from_ec_pem(pem),
        Algorithm::EdDSA => EncodingKey::from_ed_pem(pem),
        _ => EncodingKey::from_rsa_pem(pem),
    };
    let header = Header { kid: kid.map(str::to_owned), ..Header::new(algorithm) };
    signed(&header, &completed(claims), &key.unwrap())
}

/// A key as it stands in a JWK Set.
pub fn jwk(kid: &str, pair: &rcgen::KeyPair) -> Value {
    let point = pair.public_key_raw();
    let (x, y) = point[1..].split_at((point.len() - 1) / 2);
    json!({"kty": "EC", "crv": "P-256", "kid": kid, "use": "sig", "x": BASE64.encode(x), "y": BASE64.encode(y)})
}

/// An address that answers what it is told to, and counts how often.
#[derive(Clone)]
pub struct Publisher {
    pub addr: SocketAddr,
    state: Arc<Mutex<(u16, Value, usize)>>,
}

impl Publisher {
    pub async fn start(answer: Value) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let publisher = Self { addr: listener.local_addr().unwrap(), state: Arc::new(Mutex::new((200, answer, 0))) };
        let state = Arc::clone(&publisher.state);
        tokio::spawn(async move {
            while let Ok((mut socket, _)) = listener.accept().await {
                let mut request = [0; 2048];
                let _ = socket.read(&mut request).await;
                let (status, body) = {
                    let mut state = state.lock();
                    state.2 += 1;
                    (state.0, state.1.to_string())
                };
                let head =
                    format!("HTTP/1.1 {status} X\r\nConnection: close\r\nContent-Length: {}\r\n\r\n", body.len());
                let _ = socket.write_all(format!("{head}{body}").as_bytes()).await;
            }
        });
        publisher
    }

    pub fn url(&self) -> String {
        format!("http://{}/jwks.json", self.addr)
    }

    pub fn answer(&self, status: u16, body: Value) {
        let mut state = self.state.lock();
        (state.0, state.1) = (status, body);
    }

    pub fn asked(&self) -> usize {
        self.state.lock().2
    }
}

/// A header and claims as they are, with any signature.
pub fn forged(header: &Value, claims: &str, signature: &str) -> String {
    let part = |text: &str| BASE64.encode(text);
    format!("{}.{}.{signature}", part(&header.to_string()), part(claims))
}
