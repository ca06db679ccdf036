//! Who somebody is (`HUBCAST_AUTH=jwt`): the keys that count now, and the tokens that do not count any more.
//!
//! A token is verified at once where its key is known. Only where it names one that the issuer may have published
//! meanwhile, it has to wait for that (`jwks`).

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use parking_lot::RwLock;
use tracing::{debug, error, info};

use crate::admin;
use crate::auth_config::{JwtConfig, KeySource, is_long_enough};
use crate::broker::Broker;
use crate::connection::Shared;
use crate::identity::Identity;
use crate::jwks::Jwks;
use crate::jwt::{self, Fault, Key};
use crate::metrics::{Metrics, Reloaded};
use crate::reload::{Files, Fingerprint};
use crate::revocation::Revocations;

/// How often revocations are exchanged with Redis, and how often where there is no link yet.
const EXCHANGE_INTERVAL: Duration = Duration::from_secs(10);
const EXCHANGE_RETRY: Duration = Duration::from_millis(200);

/// Verifies tokens.
#[derive(Debug)]
pub struct Authenticator {
    config: JwtConfig,
    /// Those of `HUBCAST_JWT_SECRET` and `HUBCAST_JWT_PUBLIC_KEY`.
    keys: RwLock<Arc<[Key]>>,
    jwks: Option<Jwks>,
    /// What is revoked.
    pub revocations: Revocations,
    files: Files,
    /// What the files held at the start.
    loaded: Fingerprint,
}

/// Seconds since 1970. Tokens count by the wall clock: it is the issuer's, too.
pub fn unix_s() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

impl Authenticator {
    /// Reads the keys.
    ///
    /// # Errors
    /// A file that cannot be read, or a key that is none.
    pub fn load(config: JwtConfig) -> Result<Self, String> {
        let paths = [&config.secret, &config.public_key].into_iter().flatten().filter_map(|source| match source {
            KeySource::File(path) => Some(path.clone()),
            KeySource::Text(_) => None,
        });
        let files = Files { what: Reloaded::JwtKeys, paths: paths.collect() };
        let contents = files.read();
        let keys = contents.files.and_then(|files| static_keys(&config, &files))?;
        let jwks = config.jwks_url.clone().map(|url| Jwks::new(url, config.learn_interval)).transpose()?;
        let revocations = Revocations::new(config.claimed.life_max_s);
        Ok(Self { config, keys: RwLock::new(keys), jwks, revocations, files, loaded: contents.fingerprint })
    }

    /// Follows the files of keys for ever; what cannot be used leaves the keys as they were.
    pub async fn watch_files(self: Arc<Self>, shared: Arc<Shared>) {
        if self.files.paths.is_empty() {
            return;
        }
        let apply = |contents: &[Vec<u8>]| {
            *self.keys.write() = static_keys(&self.config, contents)?;
            Ok(())
        };
        self.files.clone().watch(shared, self.loaded, apply).await;
    }

    /// Follows the issuer's keys for ever, and says when there are some.
    pub async fn watch_jwks(self: Arc<Self>, broker: Arc<Broker>) {
        let Some(jwks) = &self.jwks else { return };
        let mut was_good = None;
        let note = |outcome: Result<(), String>| {
            let is_good = Some(outcome.is_ok());
            let has_changed = std::mem::replace(&mut was_good, is_good) != is_good;
            broker.shared.metrics.reloaded(Reloaded::Jwks, outcome.is_ok());
            if outcome.is_ok() {
                broker.health.keys_are_there();
            }
            match outcome {
                Ok(()) if has_changed => info!(keys = jwks.keys().len(), "fetched the keys of HUBCAST_JWKS_URL"),
                Err(error) if has_changed => error!(%error, "cannot fetch the keys of HUBCAST_JWKS_URL, retrying"),
                _ => {}
            }
        };
        jwks.watch(note).await;
    }

    /// Exchanges revocations with the other instances for ever, and cuts off whom they concern.
    pub async fn watch_revocations(self: Arc<Self>, broker: Arc<Broker>, key: String) {
        let mut seen_s = 0;
        loop {
            let now_s = unix_s();
            self.revocations.forget(now_s);
            broker.shared.metrics.revocations.set(self.revocations.len() as i64);
            let link = broker.shared.registry.as_ref().and_then(|registry| registry.link());
            let pause = match link {
                _ if broker.shared.registry.is_none() => EXCHANGE_INTERVAL,
                None => EXCHANGE_RETRY,
                Some(mut link) => match self.revocations.exchange(&mut link, &key, seen_s, now_s).await {
                    Ok(is_news) => {
                        seen_s = now_s;
                        if is_news {
                            admin::cut_revoked(&broker, &self);
                        }
                        EXCHANGE_INTERVAL
                    }
                    Err(error) => {
                        debug!(%error, "cannot exchange revocations");
                        EXCHANGE_RETRY
                    }
                },
            };
            tokio::time::sleep(pause).await;
        }
    }

    /// Verifies a token by the keys that are known. Without one at all, nobody is let in.
    ///
    /// # Errors
    /// Why it is refused; [`Fault::UnknownKey`] may be another one after [`Authenticator::authenticate`].
    pub fn check(&self, token: &str) -> Result<Identity, Fault> {
        let fetched = self.jwks.as_ref().map(Jwks::keys);
        let keys = self.keys.read().clone();
        let keys = keys.iter().chain(fetched.iter().flat_map(|keys| keys.iter()));
        let identity = jwt::verify(token, keys, &self.config.claimed, unix_s())?;
        if self.revocations.concern(&identity) { Err(Fault::Revoked) } else { Ok(identity) }
    }

    /// Whether the keys that are known say all there is to say of a token.
    pub fn is_settled(&self, outcome: &Result<Identity, Fault>) -> bool {
        self.jwks.is_none() || *outcome != Err(Fault::UnknownKey)
    }

    /// Verifies a token, and fetches its key if that may be a new one.
    ///
    /// # Errors
    /// Why it is refused.
    pub async fn authenticate(&self, token: &str) -> Result<Identity, Fault> {
        let outcome = self.check(token);
        if self.is_settled(&outcome) {
            return outcome;
        }
        self.learn().await;
        self.check(token)
    }

    /// A token names a key that is not known: fetches it, if it may be a new one.
    pub async fn learn(&self) {
        if let Some(jwks) = &self.jwks {
            jwks.learn().await;
        }
    }

    /// Counts how verifying came out, and notes why for whoever looks into it.
    pub fn count(metrics: &Metrics, outcome: &Result<Identity, Fault>) {
        metrics.authenticated(outcome.as_ref().err());
        if let Err(fault) = outcome {
            debug!(%fault, "a token is refused");
        }
    }
}

/// The keys of the two variables, whose files hold this.
fn static_keys(config: &JwtConfig, contents: &[Vec<u8>]) -> Result<Arc<[Key]>, String> {
    let mut contents = contents.iter();
    let mut bytes = |source: &Option<KeySource>| match source {
        None => None,
        Some(KeySource::Text(text)) => Some(text.clone().into_bytes()),
        Some(KeySource::File(_)) => contents.next().cloned(),
    };
    let (secret, public_key) = (bytes(&config.secret), bytes(&config.public_key));
    let secret = secret.map(|secret| {
        let secret = secret.trim_ascii();
        if is_long_enough(secret) {
            jwt::secret_key(secret, config.algorithm)
        } else {
            Err("it is too short".to_owned())
        }
    });
    let public_key = public_key.map(|pem| jwt::public_key(&pem, config.algorithm));
    let named = [(secret, "HUBCAST_JWT_SECRET"), (public_key, "HUBCAST_JWT_PUBLIC_KEY")].into_iter();
    named.filter_map(|(key, name)| Some(key?.map_err(|error| format!("{name}: {error}")))).collect()
}
