//! Who may use the API: the keys of `HUBCAST_API_KEYS`, from the list itself or from files that are rotated.
//!
//! Of a key only its SHA-256 is kept, and a given one is compared with all of them in constant time: neither its
//! length nor how much of it is right can be measured.

use std::path::PathBuf;
use std::sync::Arc;

use hyper::Method;
use hyper::header::{HeaderMap, HeaderValue};
use parking_lot::RwLock;
use ring::digest;
use subtle::ConstantTimeEq;

use crate::answer::ApiError;
use crate::connection::Shared;
use crate::handshake::bearer;
use crate::metrics::{ApiRefused, Metrics, Reloaded};
use crate::protocol::ErrorCode;
use crate::reload::{Files, Fingerprint};

/// Most keys of one gateway: all are compared at each request.
const KEYS_MAX: usize = 1000;

/// What `HUBCAST_API_KEYS` says.
#[derive(Clone, Debug, Default)]
pub struct KeyList {
    keys: Vec<String>,
    files: Vec<PathBuf>,
}

/// What a key is good for, as bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Rights(u8);

impl Rights {
    const PUBLISH: Self = Self(1);
    const READ: Self = Self(2);
    const ADMIN: Self = Self(4);
    const ALL: Self = Self(7);

    fn parse(name: &str) -> Option<Self> {
        match name {
            "publish" => Some(Self::PUBLISH),
            "read" => Some(Self::READ),
            "admin" => Some(Self::ADMIN),
            _ => None,
        }
    }

    /// What a request needs: publishing, looking, or changing something.
    fn needed(method: &Method, path: &str) -> Self {
        match path.strip_prefix("/api/publish") {
            Some("") => Self::PUBLISH,
            Some(rest) if rest.starts_with('/') => Self::PUBLISH,
            _ if method == Method::GET => Self::READ,
            _ => Self::ADMIN,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::PUBLISH => "publish",
            Self::READ => "read",
            _ => "admin",
        }
    }
}

#[derive(Debug)]
struct Key {
    digest: [u8; digest::SHA256_OUTPUT_LEN],
    rights: Rights,
}

/// The keys in effect.
#[derive(Debug)]
pub struct ApiKeys {
    list: KeyList,
    keys: RwLock<Vec<Key>>,
    /// What the files held at the start.
    loaded: Fingerprint,
}

impl KeyList {
    /// Reads the list: keys, and files of keys as `file:PATH` or an absolute path.
    pub(crate) fn parse(text: &str) -> Self {
        let mut list = Self::default();
        for entry in text.split(',').map(str::trim).filter(|entry| !entry.is_empty()) {
            match entry.strip_prefix("file:").or_else(|| entry.starts_with('/').then_some(entry)) {
                Some(path) => list.files.push(path.into()),
                None => list.keys.push(entry.to_owned()),
            }
        }
        list
    }

    /// Whether no key is needed.
    pub fn is_empty(&self) -> bool {
        self.keys.is_empty() && self.files.is_empty()
    }

    /// The list as it is written, without its secrets.
    pub(crate) fn masked(&self) -> String {
        let keys = self.keys.iter().map(|_| "***".to_owned());
        keys.chain(self.files.iter().map(|path| format!("file:{}", path.display()))).collect::<Vec<_>>().join(",")
    }

    fn files(&self) -> Files {
        Files { what: Reloaded::ApiKeys, paths: self.files.clone() }
    }

    /// The keys, with those of the files that have these contents.
    fn resolve(&self, contents: &[Vec<u8>]) -> Result<Vec<Key>, String> {
        let mut keys: Vec<_> = self.keys.iter().map(|key| Key::new(key, Rights::ALL)).collect();
        for (path, content) in self.files.iter().zip(contents) {
            let content = parse_file(content).map_err(|error| format!("{}: {error}", path.display()))?;
            keys.extend(content);
        }
        if keys.len() > KEYS_MAX {
            return Err(format!("more than {KEYS_MAX} keys"));
        }
        Ok(keys)
    }
}

impl Key {
    fn new(key: &str, rights: Rights) -> Self {
        Self { digest: sha256(key.as_bytes()), rights }
    }
}

/// One key a line, then what it is good for (nothing: everything); `#` begins a comment.
fn parse_file(content: &[u8]) -> Result<Vec<Key>, String> {
    let text = std::str::from_utf8(content).map_err(|_| "it is not text".to_owned())?;
    let mut keys = Vec::new();
    for (index, line) in text.lines().enumerate() {
        let mut words = line.split_whitespace().take_while(|word| !word.starts_with('#'));
        let Some(key) = words.next() else { continue };
        let mut rights = 0;
        for word in words {
            let right = Rights::parse(word);
            rights |= right.ok_or_else(|| format!("line {}: a right is publish, read or admin", index + 1))?.0;
        }
        keys.push(Key::new(key, if rights == 0 { Rights::ALL } else { Rights(rights) }));
    }
    if keys.is_empty() { Err("there is no key in it".to_owned()) } else { Ok(keys) }
}

impl ApiKeys {
    /// Reads the files.
    ///
    /// # Errors
    /// A file that cannot be read or has no key: a gateway that lets nobody, or everybody, use its API does not start.
    pub fn load(list: KeyList) -> Result<Self, String> {
        let contents = list.files().read();
        let keys = contents.files.and_then(|files| list.resolve(&files));
        let keys = keys.map_err(|error| format!("HUBCAST_API_KEYS: {error}"))?;
        Ok(Self { list, keys: RwLock::new(keys), loaded: contents.fingerprint })
    }

    /// Follows the files for ever; a bad one leaves the keys as they were.
    pub async fn watch(self: Arc<Self>, shared: Arc<Shared>) {
        if self.list.files.is_empty() {
            return;
        }
        let apply = |contents: &[Vec<u8>]| {
            *self.keys.write() = self.list.resolve(contents)?;
            Ok(())
        };
        self.list.files().watch(shared, self.loaded, apply).await;
    }

    /// Whether a request to /api may go on: `Authorization: Bearer KEY` or `X-API-Key: KEY`.
    ///
    /// # Errors
    /// 401 without a key or with a wrong one, 403 if it is not good for that.
    pub fn check(&self, headers: &HeaderMap, method: &Method, path: &str, metrics: &Metrics) -> Result<(), ApiError> {
        if self.list.is_empty() {
            return Ok(());
        }
        let Some(given) = given(headers) else {
            metrics.api_refused(ApiRefused::NoKey);
            return Err(ErrorCode::Unauthorized.with("an API key is needed"));
        };
        let needed = Rights::needed(method, path);
        match self.rights(given).0 {
            0 => {
                metrics.api_refused(ApiRefused::WrongKey);
                Err(ErrorCode::Unauthorized.with("the API key is wrong"))
            }
            rights if rights & needed.0 == 0 => {
                metrics.api_refused(ApiRefused::NoRight);
                Err(ErrorCode::Forbidden.with(format!("this needs a key with the right {}", needed.name())))
            }
            _ => Ok(()),
        }
    }

    /// What a key is good for, in a time that says nothing about it or the right ones.
    fn rights(&self, given: &[u8]) -> Rights {
        let given = sha256(given);
        let rights = |key: &Key| key.rights.0 * key.digest.ct_eq(&given).unwrap_u8();
        Rights(self.keys.read().iter().fold(0, |all, key| all | rights(key)))
    }
}

fn given(headers: &HeaderMap) -> Option<&[u8]> {
    bearer(headers).or_else(|| headers.get("x-api-key").map(HeaderValue::as_bytes))
}

fn sha256(bytes: &[u8]) -> [u8; digest::SHA256_OUTPUT_LEN] {
    let mut output = [0; digest::SHA256_OUTPUT_LEN];
    output.copy_from_slice(digest::digest(&digest::SHA256, bytes).as_ref());
    output
}
