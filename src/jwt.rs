//! Verifying tokens: JSON Web Tokens (RFC 7519) by keys that are known. Pure, no I/O.
//!
//! Each key has one algorithm, and a token is only ever tried with keys of the algorithm in its header and of its
//! `kid`: a token cannot choose how it is checked. Where keys come from is `authenticator`'s.

use std::fmt;

use jsonwebtoken::errors::ErrorKind;
use jsonwebtoken::{Algorithm, AlgorithmFamily, DecodingKey, Validation};
use serde::{Deserialize, Deserializer, de::Error as _};

use crate::handshake::check_user;
use crate::identity::{Capabilities, Identity};

/// Longest token: half of what a request's head may have.
pub const TOKEN_BYTES_MAX: usize = 8 << 10;

/// Longest `jti`.
const TOKEN_ID_BYTES_MAX: usize = 128;

/// How far the issuer's clock may be ahead of ours, for `nbf`.
const CLOCK_LEEWAY_S: u64 = 60;

/// What marks a private key in PEM (RFC 7468).
const PRIVATE: &str = "PRIVATE KEY-----";

/// One key.
#[derive(Clone, Debug)]
pub struct Key {
    /// Its `kid`; a key without one is tried with any token of its algorithm.
    pub id: Option<String>,
    /// The only algorithm that it is good for.
    pub algorithm: Algorithm,
    /// The secret or public key.
    pub key: DecodingKey,
}

/// What a token has to say beside a good signature.
#[derive(Clone, Debug)]
pub struct Claimed {
    /// `HUBCAST_JWT_ISSUER`
    pub issuer: Option<String>,
    /// `HUBCAST_JWT_AUDIENCE`
    pub audience: Option<String>,
    /// `HUBCAST_JWT_LIFE_MAX`, in seconds.
    pub life_max_s: u64,
}

/// Why a token is refused. Whoever sent it is told nothing of this, but an operator is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// There is none, and one is needed.
    Missing,
    /// It is no token, or has a header that is not understood.
    Malformed(String),
    /// There is no key for its algorithm and `kid`.
    UnknownKey,
    /// The signature is not that of the key.
    Signature,
    /// `exp` is over.
    Expired,
    /// A claim is missing, or has a value that is not taken.
    Claims(String),
    /// It was revoked.
    Revoked,
}

impl Fault {
    /// Every label, in the order of [`Fault::index`].
    pub const LABELS: [&'static str; 7] =
        ["missing", "malformed", "unknown_key", "signature", "expired", "claims", "revoked"];

    /// Position in [`Fault::LABELS`].
    pub fn index(&self) -> usize {
        match self {
            Self::Missing => 0,
            Self::Malformed(_) => 1,
            Self::UnknownKey => 2,
            Self::Signature => 3,
            Self::Expired => 4,
            Self::Claims(_) => 5,
            Self::Revoked => 6,
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Missing => "there is no token",
            Self::Malformed(what) | Self::Claims(what) => what,
            Self::UnknownKey => "no key here has its algorithm and kid",
            Self::Signature => "its signature is wrong",
            Self::Expired => "it has expired",
            Self::Revoked => "it was revoked",
        })
    }
}

/// The claims that mean something here.
#[derive(Deserialize)]
struct Claims {
    sub: Option<String>,
    jti: Option<String>,
    #[serde(default, deserialize_with = "seconds")]
    exp: Option<u64>,
    #[serde(default, deserialize_with = "seconds")]
    iat: Option<u64>,
    #[serde(default, deserialize_with = "seconds")]
    nbf: Option<u64>,
    #[serde(flatten)]
    capabilities: Capabilities,
}

/// Verifies a token at a moment, in seconds since 1970.
///
/// # Errors
/// Why it is refused.
pub fn verify<'a>(
    token: &str,
    keys: impl IntoIterator<Item = &'a Key>,
    claimed: &Claimed,
    now_s: u64,
) -> Result<Identity, Fault> {
    if token.len() > TOKEN_BYTES_MAX {
        return Err(Fault::Malformed(format!("it is above {TOKEN_BYTES_MAX} bytes")));
    }
    let header = jsonwebtoken::decode_header(token).map_err(|error| Fault::Malformed(error.to_string()))?;
    let is_meant = |key: &&Key| {
        let is_its_id = key.id.is_none() || key.id == header.kid;
        key.algorithm == header.alg && is_its_id
    };
    let mut fault = Fault::UnknownKey;
    for key in keys.into_iter().filter(is_meant) {
        match jsonwebtoken::decode::<Claims>(token, &key.key, &claimed.validation(key.algorithm)) {
            Ok(token) => return claimed.identity(token.claims, now_s),
            Err(error) => fault = fault_of(&error),
        }
        if fault != Fault::Signature {
            break;
        }
    }
    Err(fault)
}

impl Claimed {
    /// What the library checks; times are ours, so that one moment counts for all.
    fn validation(&self, algorithm: Algorithm) -> Validation {
        let mut validation = Validation::new(algorithm);
        validation.validate_exp = false;
        validation.validate_aud = self.audience.is_some();
        let mut required = Vec::new();
        if let Some(audience) = &self.audience {
            validation.set_audience(&[audience]);
            required.push("aud");
        }
        if let Some(issuer) = &self.issuer {
            validation.set_issuer(&[issuer]);
            required.push("iss");
        }
        validation.set_required_spec_claims(&required);
        validation
    }

    fn identity(&self, claims: Claims, now_s: u64) -> Result<Identity, Fault> {
        let wrong = |what: String| Err(Fault::Claims(what));
        let Some(expires_s) = claims.exp else { return wrong("exp is missing".to_owned()) };
        if expires_s <= now_s {
            return Err(Fault::Expired);
        }
        if expires_s - now_s > self.life_max_s {
            let most = self.life_max_s;
            return wrong(format!("exp is more than {most} s away (HUBCAST_JWT_LIFE_MAX)"));
        }
        if claims.nbf.is_some_and(|nbf| nbf > now_s + CLOCK_LEEWAY_S) {
            return wrong("nbf is not over yet".to_owned());
        }
        let user = claims.sub.filter(|sub| !sub.is_empty());
        if user.as_deref().is_some_and(|user| !check_user(user)) {
            return wrong("sub is no name of at most 128 printable bytes".to_owned());
        }
        if claims.jti.as_ref().is_some_and(|id| id.len() > TOKEN_ID_BYTES_MAX) {
            return wrong(format!("jti is above {TOKEN_ID_BYTES_MAX} bytes"));
        }
        Ok(Identity {
            user: user.map(Into::into),
            token_id: claims.jti.map(Into::into),
            issued_s: claims.iat,
            expires_s,
            capabilities: claims.capabilities,
        })
    }
}

fn fault_of(error: &jsonwebtoken::errors::Error) -> Fault {
    match error.kind() {
        ErrorKind::InvalidSignature => Fault::Signature,
        ErrorKind::MissingRequiredClaim(claim) => Fault::Claims(format!("{claim} is missing")),
        ErrorKind::InvalidClaimFormat(claim) => Fault::Claims(format!("{claim} has a wrong type")),
        ErrorKind::InvalidAudience => Fault::Claims("aud is another one (HUBCAST_JWT_AUDIENCE)".to_owned()),
        ErrorKind::InvalidIssuer => Fault::Claims("iss is another one (HUBCAST_JWT_ISSUER)".to_owned()),
        ErrorKind::Json(error) => Fault::Claims(error.to_string()),
        other => Fault::Malformed(format!("{other:?}")),
    }
}

/// A NumericDate: seconds since 1970, fractions allowed (RFC 7519 §2).
fn seconds<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u64>, D::Error> {
    let number = serde_json::Number::deserialize(deserializer)?;
    let seconds = number.as_u64().or_else(|| number.as_f64().filter(|seconds| *seconds >= 0.0).map(|s| s as u64));
    seconds.map(Some).ok_or_else(|| D::Error::custom("a time is not a number of seconds since 1970"))
}

/// A public key in PEM, with the algorithm that its kind has unless `algorithm` says which.
///
/// # Errors
/// What is wrong with it, for a person.
pub fn public_key(pem: &[u8], algorithm: Option<Algorithm>) -> Result<Key, String> {
    if pem.windows(PRIVATE.len()).any(|text| text == PRIVATE.as_bytes()) {
        return Err("that is a private key: the public one belongs here".to_owned());
    }
    let key = DecodingKey::from_rsa_pem(pem)
        .or_else(|_| DecodingKey::from_ec_pem(pem))
        .or_else(|_| DecodingKey::from_ed_pem(pem))
        .map_err(|_| "there is no RSA, EC or Ed25519 public key in PEM")?;
    let algorithm = algorithm.filter(|algorithm| algorithm.family() == key.family());
    Key { id: None, algorithm: algorithm.unwrap_or_else(|| usual_algorithm(&key)), key }.checked()
}

/// What keys of its kind are usually used with.
pub fn usual_algorithm(key: &DecodingKey) -> Algorithm {
    let len = key.try_get_as_bytes().map_or(0, <[u8]>::len);
    match key.family() {
        AlgorithmFamily::Hmac => Algorithm::HS256,
        AlgorithmFamily::Rsa => Algorithm::RS256,
        // The point of a P-384 key, as it is or compressed (SEC 1, 2.3.3).
        AlgorithmFamily::Ec if matches!(len, 97 | 49) => Algorithm::ES384,
        AlgorithmFamily::Ec => Algorithm::ES256,
        AlgorithmFamily::Ed => Algorithm::EdDSA,
    }
}

/// A secret, for HMAC.
///
/// # Errors
/// What is wrong with it, for a person.
pub fn secret_key(secret: &[u8], algorithm: Option<Algorithm>) -> Result<Key, String> {
    let algorithm = algorithm.filter(|algorithm| algorithm.family() == AlgorithmFamily::Hmac);
    let key = DecodingKey::from_secret(secret).map_err(|error| error.to_string())?;
    Ok(Key { id: None, algorithm: algorithm.unwrap_or(Algorithm::HS256), key })
}

impl Key {
    /// The key, if its algorithm can be used with it.
    ///
    /// # Errors
    /// What is wrong with it, for a person.
    pub fn checked(self) -> Result<Self, String> {
        let tried = jsonwebtoken::crypto::verify("AA", b"", &self.key, self.algorithm);
        tried.map(|_| self).map_err(|error| format!("the key cannot be used: {error:?}"))
    }
}
