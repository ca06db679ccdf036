//! What the configuration says about who may connect: `HUBCAST_AUTH`, keys, and what tokens have to say.

use std::path::PathBuf;
use std::time::Duration;

use hyper::Uri;
use jsonwebtoken::{Algorithm, AlgorithmFamily};

use crate::config::{ConfigError, Values};
use crate::jwt::Claimed;

/// Shorter secrets can be guessed from one token (RFC 7518 §3.2: as long as the hash).
const SECRET_BYTES_MIN: usize = 32;

const SECRET_ALLOWED: &str = "a secret of at least 32 bytes, or a file with one as /path or file:PATH";
const PUBLIC_KEY_ALLOWED: &str = "a public key in PEM, or a file with one as /path or file:PATH";
const JWKS_ALLOWED: &str = "an address such as https://issuer.example.org/jwks.json (http only on loopback)";
const LIFE_ALLOWED: &str = "a duration from 1s to 31days such as 1h or 1day";
const ALGORITHM_ALLOWED: &str = "HS256, HS384, HS512, RS256, RS384, RS512, PS256, PS384, PS512, ES256, ES384 or EdDSA";

/// The variables that mean nothing without `HUBCAST_AUTH=jwt`.
const JWT_VARIABLES: [&str; 6] = [
    "HUBCAST_JWT_SECRET",
    "HUBCAST_JWT_PUBLIC_KEY",
    "HUBCAST_JWKS_URL",
    "HUBCAST_JWT_ALGORITHM",
    "HUBCAST_JWT_ISSUER",
    "HUBCAST_JWT_AUDIENCE",
];

/// Who may connect.
#[derive(Clone, Debug)]
pub struct AuthConfig {
    /// With `HUBCAST_AUTH=jwt`: how tokens are verified.
    pub jwt: Option<JwtConfig>,
    /// Somebody wrote `HUBCAST_AUTH`: nobody is let in by oversight.
    pub is_explicit: bool,
    /// `HUBCAST_JWT_LIFE_MAX`, in seconds.
    life_max_s: u64,
}

/// How tokens are verified.
#[derive(Clone, Debug)]
pub struct JwtConfig {
    /// `HUBCAST_JWT_SECRET`
    pub secret: Option<KeySource>,
    /// `HUBCAST_JWT_PUBLIC_KEY`
    pub public_key: Option<KeySource>,
    /// `HUBCAST_JWKS_URL`
    pub jwks_url: Option<Uri>,
    /// How seldom keys are fetched because a token names one; not a variable, for tests.
    pub learn_interval: Duration,
    /// `HUBCAST_JWT_ALGORITHM`, for the keys of its kind.
    pub algorithm: Option<Algorithm>,
    /// What the claims have to say.
    pub claimed: Claimed,
}

/// Where a key is.
#[derive(Clone)]
pub enum KeySource {
    /// Here.
    Text(String),
    /// In a file, which is read again when it changes.
    File(PathBuf),
}

impl KeySource {
    fn parse(text: &str) -> Option<Self> {
        let path = text.strip_prefix("file:").or_else(|| text.starts_with('/').then_some(text));
        match path {
            Some(path) => Some(Self::File(path.into())),
            // An environment file has no lines within a value.
            None => (!text.is_empty()).then(|| Self::Text(text.replace("\\n", "\n"))),
        }
    }

    fn print(&self) -> String {
        match self {
            Self::Text(_) => "***".to_owned(),
            Self::File(path) => format!("file:{}", path.display()),
        }
    }
}

impl std::fmt::Debug for KeySource {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(&self.print())
    }
}

impl AuthConfig {
    pub(crate) fn parse(values: &Values) -> Result<Self, ConfigError> {
        let is_jwt = values.get("HUBCAST_AUTH", "none or jwt", |text| match text {
            "none" => Some(false),
            "jwt" => Some(true),
            _ => None,
        })?;
        let life_max_s = values.get("HUBCAST_JWT_LIFE_MAX", LIFE_ALLOWED, life)?;
        let jwt = if is_jwt { Some(JwtConfig::parse(values, life_max_s)?) } else { None };
        if let Some(name) = JWT_VARIABLES.iter().find(|name| !is_jwt && !values.text(name).is_empty()) {
            return Err(ConfigError::new(&format!("{name}: allowed only with HUBCAST_AUTH=jwt")));
        }
        Ok(Self { jwt, is_explicit: values.is_given("HUBCAST_AUTH"), life_max_s })
    }

    /// Whether keys have to be fetched before anybody can be let in.
    pub fn has_jwks(&self) -> bool {
        self.jwt.as_ref().is_some_and(|jwt| jwt.jwks_url.is_some())
    }

    /// The effective value of a variable of authentication.
    pub(crate) fn print(&self, name: &str) -> Option<String> {
        let jwt = self.jwt.as_ref();
        let key = |source: fn(&JwtConfig) -> &Option<KeySource>| {
            jwt.and_then(|jwt| source(jwt).as_ref()).map(KeySource::print).unwrap_or_default()
        };
        let claim = |claim: fn(&Claimed) -> &Option<String>| {
            jwt.and_then(|jwt| claim(&jwt.claimed).clone()).unwrap_or_default()
        };
        Some(match name {
            "HUBCAST_AUTH" => if jwt.is_some() { "jwt" } else { "none" }.to_owned(),
            "HUBCAST_JWT_SECRET" => key(|jwt| &jwt.secret),
            "HUBCAST_JWT_PUBLIC_KEY" => key(|jwt| &jwt.public_key),
            "HUBCAST_JWKS_URL" => {
                jwt.and_then(|jwt| jwt.jwks_url.as_ref()).map(ToString::to_string).unwrap_or_default()
            }
            "HUBCAST_JWT_ALGORITHM" => {
                jwt.and_then(|jwt| jwt.algorithm).map(|algorithm| format!("{algorithm:?}")).unwrap_or_default()
            }
            "HUBCAST_JWT_ISSUER" => claim(|claimed| &claimed.issuer),
            "HUBCAST_JWT_AUDIENCE" => claim(|claimed| &claimed.audience),
            "HUBCAST_JWT_LIFE_MAX" => {
                humantime::format_duration(Duration::from_secs(self.life_max_s)).to_string().replace(' ', "")
            }
            _ => return None,
        })
    }
}

impl JwtConfig {
    fn parse(values: &Values, life_max_s: u64) -> Result<Self, ConfigError> {
        let some = |name| Some(values.text(name)).filter(|text| !text.is_empty());
        let config = Self {
            secret: values.get("HUBCAST_JWT_SECRET", SECRET_ALLOWED, |text| optional(text, secret))?,
            public_key: values.get("HUBCAST_JWT_PUBLIC_KEY", PUBLIC_KEY_ALLOWED, |text| optional(text, public_key))?,
            jwks_url: values.get("HUBCAST_JWKS_URL", JWKS_ALLOWED, |text| optional(text, jwks_url))?,
            learn_interval: Duration::from_secs(10),
            algorithm: values
                .get("HUBCAST_JWT_ALGORITHM", ALGORITHM_ALLOWED, |text| optional(text, |text| text.parse().ok()))?,
            claimed: Claimed { issuer: some("HUBCAST_JWT_ISSUER"), audience: some("HUBCAST_JWT_AUDIENCE"), life_max_s },
        };
        let has_key = config.secret.is_some() || config.public_key.is_some() || config.jwks_url.is_some();
        if !has_key {
            let keys = "HUBCAST_JWT_SECRET, HUBCAST_JWT_PUBLIC_KEY or HUBCAST_JWKS_URL";
            return Err(ConfigError::new(&format!("HUBCAST_AUTH=jwt: allowed only with {keys}")));
        }
        if let Some(algorithm) = config.algorithm {
            let is_hmac = algorithm.family() == AlgorithmFamily::Hmac;
            let fits = if is_hmac { config.secret.is_some() } else { config.public_key.is_some() };
            if !fits {
                let key = if is_hmac { "HUBCAST_JWT_SECRET" } else { "HUBCAST_JWT_PUBLIC_KEY" };
                return Err(ConfigError::new(&format!("HUBCAST_JWT_ALGORITHM={algorithm:?}: allowed only with {key}")));
            }
        }
        Ok(config)
    }
}

/// An empty text is no value, and no mistake.
fn optional<T>(text: &str, parse: impl Fn(&str) -> Option<T>) -> Option<Option<T>> {
    if text.is_empty() { Some(None) } else { parse(text).map(Some) }
}

fn secret(text: &str) -> Option<KeySource> {
    let is_long = |source: &KeySource| !matches!(source, KeySource::Text(text) if !is_long_enough(text.as_bytes()));
    KeySource::parse(text).filter(is_long)
}

/// Whether nobody can guess it.
pub(crate) fn is_long_enough(secret: &[u8]) -> bool {
    secret.len() >= SECRET_BYTES_MIN
}

fn public_key(text: &str) -> Option<KeySource> {
    let is_pem = |source: &KeySource| !matches!(source, KeySource::Text(text) if !text.contains("-----BEGIN "));
    KeySource::parse(text).filter(is_pem)
}

/// In seconds; a month is more than anybody wants to remember revocations for.
fn life(text: &str) -> Option<u64> {
    let life_s = humantime::parse_duration(text).ok()?.as_secs();
    (1..=31 * 86_400).contains(&life_s).then_some(life_s)
}

/// Keys are not fetched where somebody on the way could put in his own.
fn jwks_url(text: &str) -> Option<Uri> {
    let uri: Uri = text.parse().ok()?;
    let host = uri.host()?;
    let is_loopback = host == "localhost" || host.trim_matches(['[', ']']).parse().is_ok_and(is_loopback);
    let is_safe = match uri.scheme_str()? {
        "https" => true,
        "http" => is_loopback,
        _ => false,
    };
    is_safe.then_some(uri)
}

fn is_loopback(address: std::net::IpAddr) -> bool {
    address.is_loopback()
}
