//! Keys that an issuer publishes (JWK Set, RFC 7517), at one address that the operator names.
//!
//! They are fetched at the start, every few minutes, and, seldom, when a token names a key that is not known:
//! who rotates his keys need not tell us. While the address does not answer, the keys that are known stay.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::header::{self, HeaderValue};
use hyper::{Request, StatusCode, Uri};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use jsonwebtoken::DecodingKey;
use jsonwebtoken::jwk::{AlgorithmParameters, Jwk, PublicKeyUse};
use parking_lot::RwLock;
use serde::Deserialize;
use serde_json::Value;
use tokio::sync::Mutex;
use tokio::time::{Instant, timeout};
use tracing::debug;

use crate::jwt::{self, Key};

/// How long it may take.
const FETCH_TIMEOUT: Duration = Duration::from_secs(5);

/// How often they are fetched if nothing asks for it.
const INTERVAL: Duration = Duration::from_secs(300);

/// How long until the next try where it failed.
const RETRY: Duration = Duration::from_secs(5);

/// Most that is read: a hundred keys with their certificates.
const BYTES_MAX: usize = 256 << 10;

/// Most keys of a set.
const KEYS_MAX: usize = 100;

/// The issuer's keys.
pub struct Jwks {
    url: Uri,
    client: Client<HttpsConnector<HttpConnector>, Empty<Bytes>>,
    keys: RwLock<Arc<[Key]>>,
    /// When they were last asked for; whoever fetches holds it, and the others wait for what he brings.
    asked: Mutex<Option<Instant>>,
    /// At most once in this time they are fetched for a token's sake: strangers can name any key.
    learn_interval: Duration,
}

impl std::fmt::Debug for Jwks {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Jwks").field("url", &self.url).finish_non_exhaustive()
    }
}

impl Jwks {
    /// No keys yet.
    ///
    /// # Errors
    /// The system has no certificates to trust.
    pub fn new(url: Uri, learn_interval: Duration) -> Result<Self, String> {
        let connector = HttpsConnectorBuilder::new()
            .with_provider_and_native_roots(rustls::crypto::ring::default_provider())
            .map_err(|error| format!("HUBCAST_JWKS_URL: {error}"))?
            .https_or_http()
            .enable_http1()
            .build();
        let client = Client::builder(TokioExecutor::new()).build(connector);
        Ok(Self { url, client, keys: RwLock::new(Arc::new([])), asked: Mutex::new(None), learn_interval })
    }

    /// The keys as they are known.
    pub fn keys(&self) -> Arc<[Key]> {
        Arc::clone(&self.keys.read())
    }

    /// Fetches the keys once and then for ever; `note` hears how it went each time.
    pub async fn watch(&self, mut note: impl FnMut(Result<(), String>)) {
        loop {
            let outcome = {
                let mut asked = self.asked.lock().await;
                *asked = Some(Instant::now());
                self.fetch().await
            };
            let pause = if outcome.is_ok() { INTERVAL } else { RETRY };
            note(outcome);
            tokio::time::sleep(pause.mul_f64(rand::random_range(0.8..1.0))).await;
        }
    }

    /// A token names a key that is not known: fetches them, unless that was done just now.
    pub async fn learn(&self) {
        let before = self.keys();
        let mut asked = self.asked.lock().await;
        let is_new = !Arc::ptr_eq(&before, &self.keys());
        if is_new || asked.is_some_and(|asked| asked.elapsed() < self.learn_interval) {
            return;
        }
        *asked = Some(Instant::now());
        if let Err(error) = self.fetch().await {
            debug!(%error, "cannot fetch the keys that a token names");
        }
    }

    async fn fetch(&self) -> Result<(), String> {
        let keys = timeout(FETCH_TIMEOUT, self.get()).await.map_err(|_| "it took too long".to_owned()).flatten()?;
        *self.keys.write() = keys;
        Ok(())
    }

    async fn get(&self) -> Result<Arc<[Key]>, String> {
        let mut request = Request::new(Empty::new());
        *request.uri_mut() = self.url.clone();
        request.headers_mut().insert(header::ACCEPT, HeaderValue::from_static("application/json"));
        let response = self.client.request(request).await.map_err(|error| format!("{error}: {:?}", cause(&error)))?;
        if response.status() != StatusCode::OK {
            return Err(format!("it answered {}", response.status()));
        }
        let body = Limited::new(response.into_body(), BYTES_MAX).collect().await;
        parse(&body.map_err(|error| error.to_string())?.to_bytes())
    }
}

fn cause(error: &dyn std::error::Error) -> Option<String> {
    error.source().map(ToString::to_string)
}

/// The usable keys of a set: what is for something else, or not understood, is passed over.
fn parse(json: &[u8]) -> Result<Arc<[Key]>, String> {
    #[derive(Deserialize)]
    struct Set {
        keys: Vec<Value>,
    }
    let set: Set = serde_json::from_slice(json).map_err(|error| format!("it is no JWK Set: {error}"))?;
    let keys: Arc<[Key]> = set.keys.into_iter().take(KEYS_MAX).filter_map(key).collect();
    if keys.is_empty() { Err("no key in it can be used".to_owned()) } else { Ok(keys) }
}

fn key(json: Value) -> Option<Key> {
    let jwk: Jwk = serde_json::from_value(json).ok()?;
    let is_for_signatures = matches!(jwk.common.public_key_use, None | Some(PublicKeyUse::Signature));
    // A secret that is published is none.
    let is_public = !matches!(jwk.algorithm, AlgorithmParameters::OctetKey(_) | AlgorithmParameters::Other(_));
    if !is_for_signatures || !is_public {
        return None;
    }
    let key = DecodingKey::from_jwk(&jwk).ok()?;
    let algorithm = match jwk.common.key_algorithm {
        Some(algorithm) => algorithm.try_into().ok()?,
        None => jwt::usual_algorithm(&key),
    };
    Key { id: jwk.common.key_id, algorithm, key }.checked().ok()
}
