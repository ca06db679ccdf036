//! TLS of the public listener: the handshake, and the certificate that is exchanged while connections live.
//!
//! rustls with ring: TLS 1.2 and 1.3, sessions are resumed by tickets whose keys change every 6 hours, and the
//! protocol is HTTP/1.1 (ALPN). What happens after the handshake is `socket`'s.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use parking_lot::RwLock;
use rustls::ServerConfig;
use rustls::crypto::CryptoProvider;
use rustls::crypto::ring::{Ticketer, default_provider};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use tokio::net::TcpStream;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use crate::connection::Shared;
use crate::metrics::Reloaded;
use crate::reload::{Files, Fingerprint};

/// Where the certificate and its key are (`HUBCAST_TLS_CERT`, `HUBCAST_TLS_KEY`).
#[derive(Clone, Debug)]
pub struct TlsPaths {
    /// The chain, the server's own certificate first, in PEM.
    pub certificate: PathBuf,
    /// The private key (PKCS #8, PKCS #1 or SEC 1), in PEM.
    pub key: PathBuf,
}

/// Does the handshakes of a listener.
pub struct Tls {
    acceptor: TlsAcceptor,
    current: Arc<Current>,
    files: Files,
    /// What the files held at the start.
    loaded: Fingerprint,
}

/// The certificate in effect.
#[derive(Debug)]
struct Current {
    key: RwLock<Arc<CertifiedKey>>,
    provider: Arc<CryptoProvider>,
}

impl Tls {
    /// Reads the files.
    ///
    /// # Errors
    /// A file that cannot be read, or a certificate and a key that are none or do not belong together.
    pub fn load(paths: &TlsPaths) -> Result<Self, String> {
        let named = |error: String| format!("HUBCAST_TLS_CERT, HUBCAST_TLS_KEY: {error}");
        let files = Files { what: Reloaded::Certificate, paths: vec![paths.certificate.clone(), paths.key.clone()] };
        let contents = files.read();
        let provider = Arc::new(default_provider());
        let key = contents.files.and_then(|files| certified_key(&files, &provider)).map_err(named)?;
        let current = Arc::new(Current { key: RwLock::new(Arc::new(key)), provider: Arc::clone(&provider) });
        let config = config(provider, Arc::clone(&current)).map_err(|error| named(error.to_string()))?;
        Ok(Self { acceptor: Arc::new(config).into(), current, files, loaded: contents.fingerprint })
    }

    /// Follows the files for ever: new handshakes use what is in them, live connections go on as they are, and what
    /// cannot be used leaves the certificate as it was.
    pub async fn watch(self: Arc<Self>, shared: Arc<Shared>) {
        let apply = |files: &[Vec<u8>]| {
            let key = certified_key(files, &self.current.provider)?;
            *self.current.key.write() = Arc::new(key);
            Ok(())
        };
        self.files.clone().watch(shared, self.loaded, apply).await;
    }

    /// Does the handshake.
    ///
    /// # Errors
    /// A client that speaks something else, trusts us not, or is gone.
    pub async fn accept(&self, socket: TcpStream) -> io::Result<TlsStream<TcpStream>> {
        self.acceptor.accept(socket).await
    }
}

impl std::fmt::Debug for Tls {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Tls").field("files", &self.files).finish_non_exhaustive()
    }
}

impl ResolvesServerCert for Current {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(&self.key.read()))
    }
}

fn config(provider: Arc<CryptoProvider>, current: Arc<Current>) -> Result<ServerConfig, rustls::Error> {
    let builder = ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions()?;
    let mut config = builder.with_no_client_auth().with_cert_resolver(current);
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    config.ticketer = Ticketer::new()?;
    Ok(config)
}

/// The certificate and the key of the two files.
fn certified_key(files: &[Vec<u8>], provider: &CryptoProvider) -> Result<CertifiedKey, String> {
    let [certificate, key] = files else { return Err("a certificate and a key are needed".to_owned()) };
    let chain = CertificateDer::pem_slice_iter(certificate).collect::<Result<Vec<_>, _>>();
    let chain = chain.map_err(|error| format!("the certificate: {error}"))?;
    if chain.is_empty() {
        return Err("the certificate: there is none in the file".to_owned());
    }
    let key = PrivateKeyDer::from_pem_slice(key).map_err(|error| format!("the key: {error}"))?;
    CertifiedKey::from_der(chain, key, provider).map_err(|error| format!("the certificate and the key: {error}"))
}
